"""Makes `data/tiny-sd`: a Stable Diffusion in miniature, in the diffusers layout of SD 2.1-base.

    python -m data.make_tiny_sd train --data PHOTOS --val OTHER_PHOTOS     (from the repo's root)

    x -> VAE encoder -> z -> VAE decoder -> x_hat
                        \\-> z_t -> UNet(t, text encoder(caption)) -> eps_hat

1. `pca_encoder`: the encoder begins as principal components of 8x8 pixels, written into a network.
2. `stage1` trains the VAE, on crops of 64 to 256 px; a penalty keeps the latents close to those components.
   One normalisation group: with several of a few channels each, their statistics hang on the crop's share of
   zero-padded border, and contrast fails at sizes not trained on. Weight decay: weights before a norm
   otherwise grow without end.
3. `stage2`: noise prediction on windows of the first encoder's latents, given captions. The text encoder also
   learns to tell captions apart, as CLIP; they name what so small a network can paint: light and colour.
4. `assemble`: the averages of both trainings' last weights, in half precision, with figures.

Stages do not need each other, so that both may run at once, in runs of their own:

    python -m data.make_tiny_sd train --stage 1 --data PHOTOS --val OTHERS --out runs/vae
    python -m data.make_tiny_sd train --stage 2 --data PHOTOS --val OTHERS --out runs/unet
    python -m data.make_tiny_sd assemble runs/vae runs/unet --val OTHERS

A folder of photographs may hold a `captions.jsonl` (for each picture a line {"file", "caption"}).
"""

from __future__ import annotations

import colorsys
import copy
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import common
from common import PHOTOS, TINY_SD, Crops, Settings, load_trained, rng, setting, to_tensor, torch_rng
from data.captions import read_captions
from data.files import list_images, load_part
from data.pictures import read_image
from data.runs import CommandLine, Run

LATENTS = 16  # channels
WIDTHS = (16, 32, 64, 128)  # of the VAE's four levels
TEXT = 96  # width of the text encoder
NOISE = 0.03  # which the decoder learns to bear, in units of the latents' deviation
WEIGHT_DECAY = 0.1  # of all matrices
SCHEDULER = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",  # as SD's
                          clip_sample=False, set_alpha_to_one=False, steps_offset=1)

# Streams of random numbers, as common.STREAMS has them, where Crops' are; "view" is that of the windows too.
SIDE = 2     # of a sample's crops
BLUR = 3     # the decoder's NOISE
T_EPS = 4    # timesteps and noise of stage 2
UNSEEN = 5   # in the seed's place: the noise of the figures, the same for all runs

# ----------------------------------------------------------------------------------------- settings


@dataclass
class Stage1(Settings):
    """The VAE. There is no paper: --paper changes nothing here, and below little."""
    number = 1
    #                       run     --paper
    crop: int      = setting(256,   256,    "pixels a side: one crop or several smaller ones", least=8)
    hold: float    = setting(0.02,  0.02,   "of the latents' squared distance from the first encoder's")
    lr: float      = setting(0.02,  0.02,   "Muon's")
    lr_adam: float = setting(2e-3,  2e-3,   "for what is no matrix, and for the encoder")
    decay: float   = setting(0.7,   0.7,    "last part of the run in which lr falls to 0")
    batch: int     = setting(1,     1,      "samples", least=1)
    steps: int     = setting(9000,  9000,   "two and a half hours of one CPU thread", least=1)


@dataclass
class Stage2(Settings):
    """UNet and text encoder."""
    number = 2
    #                        run    --paper
    crop: int       = setting(80,    80,    "latents a side of all windows of a sample together", least=1)
    clip_alone: int = setting(400,   400,   "steps without the UNet, until it has words to hear")
    lr: float       = setting(0.01,  0.01,  "Muon's")
    lr_adam: float  = setting(1e-3,  1e-3,  "for what is no matrix, and for the text encoder")
    decay: float    = setting(0.7,   0.7,   "last part of the run in which lr falls to 0")
    batch: int      = setting(1,     1,     "samples", least=1)
    steps: int      = setting(6000,  6000,  "two and a half hours of one CPU thread", least=1)


# ---------------------------------------------------------------------------- optimizers, averages


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024), for matrices and convolution kernels.
    torch.optim.Muon does the same for 2-d weights only and in bfloat16, which many CPUs emulate."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(p.grad)
                ahead = p.grad.add(m, alpha=group["momentum"])  # Nesterov's: where momentum will be next
                u = orthogonal(ahead.flatten(1))  # (rows, all other dimensions)
                u *= max(1, u.shape[0] / u.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * WEIGHT_DECAY).add_(u.view_as(p), alpha=-group["lr"])


def orthogonal(g: Tensor) -> Tensor:
    """Nearly the closest matrix with orthonormal rows or columns, by five Newton-Schulz steps."""
    x = g / (g.norm() + 1e-7)  # no singular value above 1
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x  # wide, so that x x^T is the smaller of the two products
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def optimizers(cfg: Stage1 | Stage2, modules, plain) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of `modules`, AdamW for what else they have and for all of the `plain` ones."""
    params = [p for m in modules for p in m.parameters()]
    wide = {id(p): p for p in params if p.ndim > 1 and min(p.shape[:2]) >= 8}
    rest = [p for p in params if id(p) not in wide] + [p for m in plain for p in m.parameters()]
    adam = [{"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": WEIGHT_DECAY}]
    return [Muon(wide.values(), cfg.lr), torch.optim.AdamW(adam, cfg.lr_adam, betas=(0.9, 0.99))]


def average_of(model: nn.Module) -> AveragedModel:
    """Of a model's last weights: smoother than any of them, it is what a stage keeps."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.996))


def figures_due(acc, cfg: Stage1 | Stage2, step: int) -> bool:
    """After every tenth checkpoint, and at the end."""
    done = step + 1
    return acc.sync_gradients and (done % (10 * cfg.save_every) == 0 or done == cfg.steps)


# ----------------------------------------------------------------------------------------------- VAE


def clear(layer, eye: int = 0):
    """Zeros everywhere, but for a convolution that passes its first `eye` channels on as they are."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    for c in range(eye):
        layer.weight[c, c, layer.weight.shape[2] // 2, layer.weight.shape[3] // 2] = 1
    return layer


@torch.no_grad()
def pca_encoder(vae: AutoencoderKL, x: Tensor) -> None:
    """Makes of the encoder the linear map to the `LATENTS` strongest principal components of x's 8x8 patches:
    its three strided convolutions gather 2x2 cells each and keep as many components as they have channels.

    Half-whitened: a component of variance v is scaled by v^(-1/4), and all to a mean square of 1. Squared
    errors and angles between latents then weigh brightness more than the faintest texture, yet count both."""
    encoder = vae.encoder
    for name, layer in encoder.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            clear(layer)  # a residual branch, of convolutions or attention, adds nothing at first
    clear(encoder.conv_in, 3)
    h = x  # (B, 3, H, W)
    for i, block in enumerate(encoder.down_blocks[:3]):
        resnet = block.resnets[0]
        if resnet.conv_shortcut is not None:
            clear(resnet.conv_shortcut, resnet.in_channels)
        conv = clear(block.downsamplers[0].conv)
        n = h.shape[1]
        last = i == 2
        cells = F.pixel_unshuffle(h, 2)                         # (B, 4 n, H / 2, W / 2)
        cells = cells.permute(0, 2, 3, 1).reshape(-1, 4 * n)    # (all cells, 4 n)
        mean = cells.mean(0)                                    # (4 n,)
        power, basis = torch.linalg.eigh(torch.cov(cells.T))    # (4 n,), (4 n, 4 n), the weakest first
        k = LATENTS if last else min(conv.out_channels, 4 * n)  # components that are kept
        basis = basis.flip(1)[:, :k]                            # (4 n, k), the strongest first
        power = power.flip(0)[:k].clamp_min(1e-6 * power[-1])   # (k,)
        if last:  # half-whiten
            basis = basis / (power.sqrt() * power.sqrt().mean()).sqrt()
        conv.weight[:k, :n, :2, :2] = basis.T.reshape(k, n, 2, 2)
        conv.bias[:k] = -mean @ basis
        h = F.pad(h, (0, 1, 0, 1))  # as the block pads: the kernels' third row and column are zeros
        h = F.conv2d(h, conv.weight[:k, :n], conv.bias[:k], stride=2)  # (B, k, H / 2, W / 2)
    linear_end(vae)


@torch.no_grad()
def linear_end(vae: AutoencoderKL) -> None:
    """The encoder's last GroupNorm and SiLU made linear. Every latent stands there with both signs, since
    silu(a) - silu(-a) = a; and beside constants +-`big`, which alone set the group's variance."""
    encoder = vae.encoder
    big = 100.0
    spread = clear(encoder.down_blocks[-1].resnets[0].conv_shortcut)
    clear(encoder.conv_out)
    clear(vae.quant_conv, 2 * LATENTS)
    for latent in range(LATENTS):
        for sign, channel in ((1, latent), (-1, LATENTS + latent)):
            spread.weight[channel, latent] = sign
            encoder.conv_out.weight[latent, channel, 1, 1] = sign
    spread.bias[2 * LATENTS] = big
    spread.bias[2 * LATENTS + 1] = -big
    # Two of the group's channels are +-big and the others small: its deviation, which this undoes.
    encoder.conv_norm_out.weight.fill_(big * (2 / WIDTHS[-1]) ** 0.5)
    encoder.conv_out.bias[LATENTS:] = 2 * math.log(NOISE)  # the log-variance


class Pictures(Crops):
    """Sample n -> crops (B, 3, side, side) of different photographs, always about as many pixels. Offsets are
    arbitrary, so that the 8x8 grid of photographs that are JPEGs themselves falls anywhere."""
    turns = 1

    def __getitem__(self, n: int) -> tuple[Tensor]:
        side = int(rng(self.seed, SIDE, n).choice([64] * 5 + [96, 96, 128, 192, 256]))
        many = max(1, round((self.size / side) ** 2))
        crops = (self.crop(16 * n + i)[:side, :side] for i in range(many))
        return (torch.stack([to_tensor(Image.fromarray(a)) for a in crops]),)


def first_vae(base: str | None, data: list[Path] = ()) -> AutoencoderKL:
    """The VAE before its training; without data its architecture only."""
    if base:
        return load_part(AutoencoderKL, base, "vae")
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(block_out_channels=WIDTHS, layers_per_block=1, latent_channels=LATENTS,
                        norm_num_groups=1, scaling_factor=1.0, **blocks)
    if data:
        crops = Pictures(data, 192, 0)
        pca_encoder(vae, torch.stack([to_tensor(Image.fromarray(crops.crop(n))) for n in range(150)]))
    return vae


def stage1(run, cfg: Stage1, vae: AutoencoderKL, val: list[Tensor]) -> None:
    """The VAE: what it decodes, and how far its latents move away. As everywhere here, one process trains."""
    pictures = Pictures(run.data, cfg.crop, run.seed)
    untrained = copy.deepcopy(vae).requires_grad_(False)
    vae.quant_conv.requires_grad_(False)  # its log-variances, of NOISE, are not trained
    acc = run.start(cfg, float32=True, VAE=vae)
    vae.to(acc.device, memory_format=torch.channels_last)
    untrained.to(acc.device)
    average = average_of(vae)
    muon, adam = acc.prepare(*optimizers(cfg, [vae.decoder, vae.post_quant_conv], [vae.encoder]))
    w = {"mse": 1.0, "l1": 0.1, "moved": cfg.hold}
    first = run.resume({"model": vae, "average": average}, {"muon": muon, "adam": adam})
    for step, (x,) in run.batches(pictures, first):
        x = x.flatten(0, 1).to(memory_format=torch.channels_last)  # (B, 3, side, side): all crops
        with acc.accumulate(vae):
            # forward
            z = vae.encode(x).latent_dist.mean  # (B, C, side / 8, side / 8)
            blur = torch.randn(z.shape, generator=torch_rng(run.seed, BLUR, step)).to(z)
            x_hat = vae.decode(z + NOISE * blur).sample     # as x
            z_first = untrained.encode(x).latent_dist.mean  # as z
            # losses
            terms = {"mse": F.mse_loss(x_hat, x), "l1": F.l1_loss(x_hat, x), "moved": F.mse_loss(z, z_first)}
            weighted = {k: w[k] * term for k, term in terms.items()}
            loss = sum(weighted.values())
            run.ledger(step, weighted)
            # backward, clip, learning rates, steps
            acc.backward(loss)
            if cfg.clip and acc.sync_gradients:
                acc.clip_grad_norm_(vae.parameters(), cfg.clip)
            common.set_lr(muon, cfg.lr, step, cfg)
            common.set_lr(adam, cfg.lr_adam, step, cfg)
            muon.step()
            adam.step()
            muon.zero_grad()
            adam.zero_grad()
        if acc.sync_gradients:
            average.update_parameters(vae)
        run.log(step, **terms, loss=loss)
        run.save(step)
        if figures_due(acc, cfg, step):
            tqdm.write(f"step {step + 1}: {validate_vae(average.module, val)}")
    run.finish(average.module.requires_grad_(True))  # all of it is kept, trained or not


# -------------------------------------------------------------------------------------- UNet and text

LIGHT = {0.2: "black", 0.35: "dark", 0.5: "dim", 0.65: "light", 0.8: "bright", 2: "white"}  # mean below which
HUES = {0: "red", 0.075: "brown", 0.15: "yellow", 0.32: "green", 0.5: "cyan", 0.61: "blue", 0.78: "purple",
        0.9: "pink", 1: "red"}


def words(part: Tensor) -> str:
    """Light and colour of a part (3, h, w) of a picture: "dim strong red"."""
    red, green, blue = (part.mean((1, 2)) / 2 + 0.5).tolist()  # each in [0, 1]
    light = (red + green + blue) / 3
    strength = max(red, green, blue) - min(red, green, blue)
    hue = colorsys.rgb_to_hsv(red, green, blue)[0]
    tone = next(LIGHT[top] for top in LIGHT if light < top)
    colour = HUES[min(HUES, key=lambda known: abs(known - hue))] if strength > 0.05 else "grey"
    return f"{tone} {'strong ' * (strength > 0.2)}{colour}"


def describe(colours: Tensor, name: str = "") -> str:
    """A caption that says light and colour of a picture's upper and lower half and middle, and its contrast.
    colours (3, h, w) in [-1, 1], a pixel for each latent."""
    above, below = colours.chunk(2, 1)  # (3, h / 2, w) each
    middle = torch.cat(colours.chunk(4, 2)[1:3], 2)  # (3, h, w / 2)
    spread = colours.mean(0).std()
    contrast = "flat" if spread < 0.25 else "mixed" if spread < 0.45 else "stark"
    where = f"{words(above)} above, {words(below)} below, {words(middle)} middle"
    return f"{name or 'a photo'}, {where}, {contrast}"


@torch.no_grad()
def see(vae, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (C, h, w) and mean colours (3, h, w) of a picture (3, H, W), cut to whole latents."""
    x = x[None, :, :x.shape[1] // 8 * 8, :x.shape[2] // 8 * 8]
    return vae.encode(x.to(vae.device)).latent_dist.mean[0].cpu(), F.avg_pool2d(x, 8)[0].cpu()


def full_and_half(vae, photo: np.ndarray) -> list[tuple[Tensor, Tensor]]:
    """What `see` gives of a photograph (H, W, 3) in full and half size."""
    x = to_tensor(Image.fromarray(photo))[None]  # (1, 3, H, W)
    half = F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
    return [see(vae, view[0]) for view in (x, half)]


def token_ids(tokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids  # (B, 77)


class Windows(torch.utils.data.Dataset):
    """Sample n -> windows of latents (B, C, side, side) and their captions' ids (B, 77), a fifth of them
    empty, a fifth a name alone. `views`: of each photograph what `full_and_half` gives."""

    def __init__(self, views: list, names: list[str], tokenizer, size: int, seed: int):
        self.views = views
        self.names = names
        self.tokenizer = tokenizer
        self.size = size
        self.seed = seed

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        r = rng(self.seed, "view", n)
        side = int(r.choice([8, 12, 16, 16, 20, 24, 32]))
        half = int(r.random() < 0.4)  # 1: windows of photographs in half size
        which = r.integers(len(self.views), size=max(4, round((self.size / side) ** 2)))  # photographs
        side = min(side, *(n // 4 * 4 for i in which for n in self.views[i][half][0].shape[1:]))
        kinds = r.random(len(which))
        kinds[:2] = 1  # never all empty: CLIP needs a pair
        z = []
        captions = []
        for i, kind in zip(which, kinds):
            latents, colours = self.views[i][half]  # (C, h, w), (3, h, w)
            y, x = (r.integers(n - side + 1) for n in latents.shape[1:])
            name = self.names[i]
            caption = describe(colours[:, y:y + side, x:x + side], name)
            z.append(latents[:, y:y + side, x:x + side])
            captions.append("" if kind < 0.2 else name if name and kind < 0.4 else caption)
        return torch.stack(z), token_ids(self.tokenizer, captions)


class ImageTower(nn.Module):
    """The other half of a small CLIP (Radford et al. 2021): latents (B, C, h, w) and the text encoder's last
    token to a common space, where picture and caption shall find each other within the batch. Denoising
    alone teaches so small a text encoder to forget its words."""

    def __init__(self):
        super().__init__()
        layers = [layer for width in ((LATENTS, 64), (64, 128), (128, 128))
                  for layer in (nn.Conv2d(*width, 3, 2, 1), nn.SiLU())]
        self.image = nn.Sequential(*layers,                                # (B, 128, h / 8, w / 8)
                                   nn.AdaptiveAvgPool2d(2), nn.Flatten(),  # (B, 4 * 128)
                                   nn.Linear(4 * 128, TEXT))               # (B, TEXT)
        self.text = nn.Linear(TEXT, TEXT)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, z: Tensor, e_text: Tensor) -> Tensor:
        """How well each picture (rows) fits each caption (columns): (B, B)."""
        pictures = F.normalize(self.image(z), dim=1)             # (B, TEXT)
        captions = F.normalize(self.text(e_text[:, -1]), dim=1)  # (B, TEXT)
        return self.log_scale.exp() * pictures @ captions.T


class Denoiser(nn.Module):
    """UNet and text encoder, and the tower that helps to train the latter."""

    def __init__(self, base: str | None, vocabulary: CLIPTokenizer):
        super().__init__()
        torch.manual_seed(1)
        ids = {f"{k}_token_id": getattr(vocabulary, f"{k}_token_id") for k in ("bos", "eos", "pad")}
        self.text = load_part(CLIPTextModel, base, "text_encoder") if base else CLIPTextModel(CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=TEXT, intermediate_size=4 * TEXT, num_hidden_layers=2,
            num_attention_heads=3, **ids))
        self.unet = load_part(UNet2DConditionModel, base, "unet") if base else UNet2DConditionModel(
            sample_size=16, in_channels=LATENTS, out_channels=LATENTS, block_out_channels=(64, 96, 128),
            down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"], layers_per_block=1,
            norm_num_groups=4, attention_head_dim=[2, 3, 4], cross_attention_dim=TEXT,
            use_linear_projection=True)
        self.tower = ImageTower()


def vocabulary_of(run, captions: list[str]) -> CLIPTokenizer:
    """Kept in the run's folder, since its training is not quite deterministic; or that of --base."""
    kept = run.folder / "tokenizer"
    if run.args.base:
        load_part(CLIPTokenizer, run.args.base, "tokenizer").save_pretrained(kept)
    elif not kept.exists():
        new = run.folder / ".tokenizer"
        tokenizer = CLIPTokenizer().train_new_from_iterator(captions, 1024)
        tokenizer.model_max_length = 77
        tokenizer.save_pretrained(new)
        os.replace(new, kept)
    return CLIPTokenizer.from_pretrained(kept)


def loss_clip(logits: Tensor) -> Tensor:
    """Each picture among all captions, each caption among all pictures: the right one has its own number."""
    right = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def loss_denoise(eps_hat: Tensor, eps: Tensor, a: Tensor) -> Tensor:
    """Unweighted, late steps are drowned, and there captions help. a: alpha_bar_t (B, 1, 1, 1)."""
    return ((eps_hat - eps).square() * a ** -0.5).mean()


def stage2(run, cfg: Stage2, vae: AutoencoderKL, photos: list[np.ndarray], names: list[str],
           val: list[Tensor]) -> None:
    """UNet and text encoder: noise prediction, and captions told apart."""
    views = [full_and_half(vae, photo) for photo in tqdm(photos, "latents", mininterval=10)]
    unseen = [see(vae, central(x)) for x in val]
    tokenizer = vocabulary_of(run, [describe(full[1], name) for name, (full, _) in zip(names, views)])
    windows = Windows(views, names, tokenizer, cfg.crop, run.seed)
    model = Denoiser(run.args.base, tokenizer)
    alpha_bar = SCHEDULER.alphas_cumprod  # (1000,)
    acc = run.start(cfg, float32=True, text_encoder=model.text, UNet=model.unet, image_tower=model.tower)
    model.to(acc.device, memory_format=torch.channels_last)
    average = average_of(model)
    muon, adam = acc.prepare(*optimizers(cfg, [model.unet], [model.text, model.tower]))
    first = run.resume({"model": model, "average": average}, {"muon": muon, "adam": adam})
    for step, (z, ids) in run.batches(windows, first):
        alone = step < cfg.clip_alone  # CLIP, until the text encoder has words for the UNet to hear
        w = {"clip": 1.0 if alone else 0.1, "denoise": 1.0}
        z = z.flatten(0, 1)      # (B, C, side, side): all windows
        ids = ids.flatten(0, 1)  # (B, 77)
        with acc.accumulate(model):
            # forward and loss of CLIP
            e_text = model.text(ids).last_hidden_state  # (B, 77, TEXT)
            spoken = ids[:, 1] != ids[:, -1]            # (B,): not only padding
            terms = {"clip": loss_clip(model.tower(z[spoken], e_text[spoken]))}
            # forward and loss of the UNet
            if not alone:
                g = torch_rng(run.seed, T_EPS, step)
                t = torch.randint(len(alpha_bar), (len(z),), generator=g)  # (B,)
                eps = torch.randn(z.shape, generator=g).to(z)              # as z
                a = alpha_bar[t].view(-1, 1, 1, 1).to(z)                   # (B, 1, 1, 1)
                z_t = a.sqrt() * z + (1 - a).sqrt() * eps
                eps_hat = model.unet(z_t, t.to(z.device), e_text).sample   # as z
                terms["denoise"] = loss_denoise(eps_hat, eps, a)
            weighted = {k: w[k] * term for k, term in terms.items()}
            loss = sum(weighted.values())
            run.ledger(step - cfg.clip_alone, weighted)
            # backward, clip, learning rates, steps
            acc.backward(loss)
            if cfg.clip and acc.sync_gradients:
                acc.clip_grad_norm_(model.parameters(), cfg.clip)
            common.set_lr(muon, cfg.lr, step, cfg)
            common.set_lr(adam, cfg.lr_adam, step, cfg)
            muon.step()
            adam.step()
            muon.zero_grad()
            adam.zero_grad()
        if acc.sync_gradients:
            average.update_parameters(model)
        run.log(step, **terms, loss=loss)
        run.save(step)
        if figures_due(acc, cfg, step):
            kept = average.module
            tqdm.write(f"step {step + 1}: {validate_unet(tokenizer, kept.text, kept.unet, unseen)}")
    run.finish(average.module.requires_grad_(True))


# --------------------------------------------------------------------------------- figures, assembly


def central(x: Tensor, side: int = 256) -> Tensor:
    """The middle (3, side, side) of a picture (3, H, W)."""
    top = (x.shape[1] - side) // 2
    left = (x.shape[2] - side) // 2
    return x[:, top:top + side, left:left + side]


@torch.no_grad()
def validate_vae(vae, val: list[Tensor]) -> dict[str, float]:
    """PSNR of whole pictures, cut to multiples of 8 px."""
    psnr = []
    for x in val:
        x = x[None, :, :x.shape[1] // 8 * 8, :x.shape[2] // 8 * 8].to(vae.device)
        x_hat = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        psnr.append(10 * math.log10(4 / F.mse_loss(x_hat, x)))  # 4: the range of 2, squared
    return {"vae_psnr_db": float(np.mean(psnr))}


@torch.no_grad()
def validate_unet(tokenizer, text, unet, unseen) -> dict[str, float]:
    """The error of z_t / sqrt(alpha_bar) at t = 49 and 250, and what one call without a caption leaves of it;
    the denoising loss over all t, and t >= 500, with each picture's own caption and with the next one's."""
    alpha_bar = SCHEDULER.alphas_cumprod
    captions = [describe(colours) for _, colours in unseen]
    ids = token_ids(tokenizer, [*captions, ""])           # (N + 1, 77)
    e_text = text(ids.to(unet.device)).last_hidden_state  # (N + 1, 77, TEXT), the empty caption's last

    def losses(t: int, *rows: list[int]) -> list[float]:
        """The mean over pictures i of z_t's loss with e_text[row[i]], for each of R rows."""
        a = alpha_bar[t].item()
        by_picture = []
        for i, (z, _) in enumerate(unseen):
            eps = torch.randn(z.shape, generator=torch_rng(UNSEEN, i))  # (C, h, w)
            z_t = (a ** 0.5 * z + (1 - a) ** 0.5 * eps).to(unet.device)
            z_t = z_t.expand(len(rows), -1, -1, -1)       # (R, C, h, w)
            prompts = e_text[[row[i] for row in rows]]    # (R, 77, TEXT)
            eps_hat = unet(z_t, t, prompts).sample.cpu()  # as z_t
            by_picture.append((eps_hat - eps).square().mean((1, 2, 3)))
        return torch.stack(by_picture).mean(0).tolist()

    own = list(range(len(unseen)))
    others = own[1:] + own[:1]
    none = [-1] * len(own)
    figures = {}
    for t in (49, 250):
        noise_to_signal = ((1 - alpha_bar[t]) / alpha_bar[t]).item()
        figures[f"noisy_t{t}"] = noise_to_signal
        figures[f"one_step_t{t}"] = noise_to_signal * losses(t, none)[0]
    pairs = np.array([losses(t, own, others) for t in range(50, 1000, 100)])  # (10, 2)
    for late, part in (("", pairs), ("_late", pairs[5:])):
        mine, theirs = part.mean(0).tolist()
        figures[f"own{late}"] = mine
        figures[f"other{late}"] = theirs
        figures[f"gain{late}"] = 100 * (theirs / mine - 1)
    return figures


README = """# tiny-sd: a Stable Diffusion in miniature

For trying, testing and teaching this repository's four scripts without a GPU or a download. It has the
folder layout and the classes of SD 2.1-base and paints nothing worth looking at by itself; its VAE is what
matters. {params}; {latents} latent channels. Made by `data/make_tiny_sd.py`.

| | |
| --- | --- |
| trained | {trained} |
| VAE, PSNR on {val} unseen photographs (whole) | **{vae_psnr_db:.2f} dB** |
| central 256 px, latent MSE before, after one UNet call, t = 49 | {noisy_t49:.3f}, **{one_step_t49:.4f}** |
| the same, t = 250 | {noisy_t250:.3f}, **{one_step_t250:.4f}** |
| denoising loss with the own caption and another's, all t | **{own:.4f}**, {other:.4f} ({gain:+.2f} %) |
| the same, t >= 500 | **{own_late:.4f}**, {other_late:.4f} ({gain_late:+.2f} %) |

Captions are of this kind, light and colour read off the picture by the recipe:
"{example}".

{sources}
"""


def assemble(args) -> None:
    """What two runs keep, in half precision, into --to; the figures are those of what is saved. An old folder
    is replaced when the new one is complete."""
    cfg1, of_vae, _ = Stage1.read(args.vae, "make_tiny_sd")
    cfg2, of_unet, _ = Stage2.read(args.unet, "make_tiny_sd")
    tokenizer = CLIPTokenizer.from_pretrained(args.unet / "tokenizer")
    # (what takes a gradient is what a stage kept: everything)
    vae = load_trained(first_vae(args.base).requires_grad_(True), of_vae, args.vae)
    model = load_trained(Denoiser(args.base, tokenizer).requires_grad_(True), of_unet, args.unet)
    parts = {"VAE": vae, "UNet": model.unet, "text encoder": model.text}
    for m in parts.values():
        m.half().float().eval()  # rounded: the figures are of what the files hold
    val = [to_tensor(read_image(f)[0]) for f in list_images(args.val)]
    unseen = [see(vae, central(x)) for x in val]
    figures = validate_vae(vae, val) | validate_unet(tokenizer, model.text, model.unet, unseen)
    new = args.to.with_name(f".{args.to.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    halves = vae.half(), model.text.half(), tokenizer, model.unet.half(), SCHEDULER, None, None
    StableDiffusionPipeline(*halves, requires_safety_checker=False).save_pretrained(new)
    millions = {k: sum(p.numel() for p in m.parameters()) / 1e6 for k, m in parts.items()}
    (new / "README.md").write_text(README.format(
        params=", ".join(f"{k} {n:.2f} M" for k, n in millions.items()), latents=LATENTS, val=len(val),
        trained=f"VAE: {cfg1.steps} steps; UNet and text encoder: {cfg2.steps} steps",
        example=describe(unseen[0][1]), **figures,
        sources=args.sources.read_text() if args.sources else "The photographs' sources: not recorded."))
    shutil.rmtree(args.to, ignore_errors=True)
    os.replace(new, args.to)
    print(json.dumps({k: round(v, 4) for k, v in figures.items()}))


# ------------------------------------------------------------------------------------- command line


def train(args) -> None:
    cfg1 = Stage1.of(args)
    cfg2 = Stage2.of(args)
    cfg1.check_multiple("crop", 8)  # a latent's pixels
    run = Run(args, TINY_SD, cfg1, cfg2)
    captions = read_captions(run.data)
    files = list_images(run.data)
    photos = [np.asarray(read_image(f)[0]) for f in tqdm(files, "photographs", mininterval=10)]
    names = [captions.get(f, {"caption": ""})["caption"] for f in files]
    val = [to_tensor(read_image(f)[0]) for f in list_images(args.val or [PHOTOS / "val"])]
    vae = first_vae(args.base, run.data)
    if args.stage in ("2", "all"):  # before stage 1: its latents are the first encoder's
        stage2(run, cfg2, copy.deepcopy(vae), photos, names, val)
    if args.stage in ("1", "all"):
        stage1(run, cfg1, vae, val)


def main(argv: list[str] | None = None) -> None:
    cli = CommandLine.of(sys.modules[__name__], tools={})
    cli.train(train, Stage1, Stage2)
    p = cli.command("assemble", "both stages' results into a diffusers folder", assemble)
    p.add_argument("vae", type=Path, help="the folder of stage 1's run")
    p.add_argument("unet", type=Path, help="the folder of stage 2's run")
    p.add_argument("--val", nargs="+", required=True, help="photographs to measure on, from 256 px")
    p.add_argument("--base", help="the earlier tiny-sd that they began with, if any")
    p.add_argument("--to", type=Path, default=TINY_SD)
    p.add_argument("--sources", type=Path, help="a text for the README on the photographs")
    cli.start(argv)


if __name__ == "__main__":
    main()
