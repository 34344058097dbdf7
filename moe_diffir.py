"""MoE-DiffIR: Task-customized Diffusion Priors for Universal Compressed Image Restoration (ECCV 2024,
arXiv 2407.10833v1).

    x_lq -> VAE enc -> z_lq -> z_t at t*, or noise -> UNet -> x0, or N steps -> z_0 -> VAE dec -> x_hat
      |                  \\-> MoE-Prompt Module --------^ SPADE in ResBlocks   compensator (stage 2) --^
      |-> prior DP -----------> its routers                                (encoder features of x_lq)
      \\-> quality enhancer -> CLIP -> Visual2Text adapter -> c (in place of the caption's tokens)

| paper    | code       | shape                | range                                                       |
| -------- | ---------- | -------------------- | ----------------------------------------------------------- |
| LQ, hr   | x_lq, x_hq | (B, 3, H, W)         | [-1, 1]; the compressed image and its original              |
| z_lq     | z_lq       | (B, C, H / 8, W / 8) | latent of x_lq, scaling factor applied                      |
| z_t, z_0 | z_t, z_0   | as z_lq              | latent at time t; the original's, or the UNet's estimate    |
| DP       | dp         | (B, M, D)            | degradation prior, tokens of an image encoder               |
| -        | f          | (B, L, width)        | `MoEPromptModule`'s features at a scale's L positions       |
| x        | x          | as f                 | input of the router, `gate`; one for each scale             |
| G(x)     | gates      | (B, L, N)            | K softmax values at every position, the others 0            |
| prompts  | P          | (N, width, width)    | experts, E_i(f) = f P_i; N = 7, K = 3 of them are chosen    |
| y        | y          | as f                 | what the prompts make of f                                  |

Where the paper is silent the code does what the authors' does ("released code"), or says "ours"; where it
parts from the paper or the release is marked DIFFERS.

    python moe_diffir.py train         # benchmark (Sec. 3.5, data/make_cir.py), stages, a table, a picture
    python moe_diffir.py restore photo.webp -o photo.png
"""

from __future__ import annotations

import functools
import math
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
from torch.utils.checkpoint import checkpoint

from common import (ROOT, SD, Crops, Settings, UserError, device, load_trained, noise_for, pad_to, rng,
                    setting, to_image, to_tensor, torch_rng, whole)

# ----------------------------------------------------------------------------------------- settings

CLIP_B32 = "openai/clip-vit-base-patch32"
CLIP_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TINY_CLIP = "tiny-clip"  # of data: a CLIP in miniature, trained as DA-CLIP to name what a codec did, too
PROMPTS = "none", "single", "multiple", "moe"
Benchmark = dict[Path, list[tuple[int, Path]]]  # photograph: [(number of the task, compressed version), ...]


@dataclass
class Stage1(Settings):
    """MoE-Prompt Module and Visual2Text adapter, Secs. 3.2 to 3.4."""
    number = 1
    #                             tiny run  paper run
    experts: int        = setting(7,        7,        "Fig. 6: N prompts a scale", "experts", least=1)
    top_k: int          = setting(3,        3,        "Fig. 6: K chosen", "top_k", least=1, most="experts")
    prompt: str         = setting("moe",    "moe",    "Table 2", "prompt", choices=PROMPTS)
    width: int          = setting(64,       256,      "released code: channels at every scale", least=4)
    depth: int          = setting(1,        2,        "released code: ViT blocks a scale", least=1)
    heads: int          = setting(4,        4,        "released code", least=1)
    spade: int          = setting(64,       128,      "released code: SPADE's hidden channels", least=1)
    dp: str             = setting(TINY_CLIP, CLIP_B32, "Sec. 3.2, Table 3: a CLIP, or 'none'", "dp")
    v2t: str            = setting(TINY_CLIP, CLIP_H14, "Sec. 3.3, Table 3; H/14 has SD 2.1's space", "clip")
    enhancer: int       = setting(1,        4,        "ours: transformer blocks of the quality enhancer")
    crop: int           = setting(128,      256,      "Sec. 4.1", least=1)
    t_star: int         = setting(49,       0,        "ours: one step's t; 0: N steps", "t_star", most=499)
    checkpointing: bool = setting(False,    False,    "ours: of UNet and SPADE; less memory, more time")
    lr: float           = setting(1e-3,     5e-5,     "Sec. 4.1")
    clip: float         = setting(1.0,      1.0,      "ours: gradient norm; 0 clips nothing")
    batch: int          = setting(8,        32,       "Sec. 4.1", least=1)
    steps: int          = setting(350,      400_000,  "Sec. 4.1", least=1)

    def __post_init__(self):
        super().__post_init__()
        self.check_multiple("width", self.heads)

    def check_steps(self, flag: str, steps: int) -> None:
        least, most = (1, 1) if self.t_star else (2, 1000)  # one step from noise restores nothing
        if not least <= steps <= most:
            raise UserError(f"{flag} {steps}: must be from {least} to {most} (--t-star {self.t_star})")


@dataclass
class Stage2(Settings):
    """Decoder compensator, Sec. 3.4."""
    number = 2
    #                              tiny run  paper run
    sampling: int        = setting(1,        200,      "released code: steps to z_0, in restore too", least=1)
    levels: tuple        = setting((1, 2),   (1, 2),   "released code: H / 2^i that it works at", most=3)
    blocks: int          = setting(1,        2,        "ours: residual blocks at each of them")
    lpips: str           = setting("tiny-vgg", "vgg16", "Eq. 4; VGG: released code")
    cache_latents: int   = setting(300,      70_000,   "Sec. 4.1: z_0 in advance; 0: none", "cache_latents")
    crop: int            = setting(256,      256,      "Sec. 4.1", least=1)
    lr: float            = setting(1e-4,     1e-4,     "Sec. 4.1")
    clip: float          = setting(1.0,      1.0,      "ours: gradient norm; 0 clips nothing")
    batch: int           = setting(1,        32,       "Sec. 4.1", least=1)
    steps: int           = setting(300,      100_000,  "Sec. 4.1", least=1)


# --------------------------------------------------------------------------------------------- data


class CIRPairs(Crops):
    """Sample n -> (n, x_lq, x_hq): the same crop of a photograph and of one of its compressed versions,
    each task as likely as another, flipped and rotated (Sec. 4.1). DIFFERS: the paper resizes to 256x256, and
    so blurs what compression did; the release crops, too. `period`: sample n is sample n % period."""

    def __init__(self, benchmark: Benchmark, cfg: Settings, cell: int, seed: int, period: int = 0):
        cfg.check_multiple("crop", cell)
        super().__init__(list(benchmark), cfg.crop, seed)
        self.versions = benchmark
        self.period = period
        self.few = sum(map(len, benchmark.values())) <= 256  # as of the bundled photographs: kept in memory

    @functools.lru_cache(maxsize=256)
    def read_once(self, file: Path) -> np.ndarray:
        return Crops.read.__wrapped__(self, file)

    def __getitem__(self, n: int) -> tuple[int, Tensor, Tensor]:
        n = n % self.period if self.period else n
        hq = self.file(n)
        versions = self.versions[hq]
        at = int(rng(self.seed, "degradation", n).integers(len(versions)))
        read = self.read_once if self.few else self.read
        photos = (read(file) for _, file in versions[at:] + versions[:at])  # of a bad one its successor
        if (lq := next((photo for photo in photos if photo is not None), None)) is None:
            raise UserError(f"{hq}: none of its {len(versions)} compressed versions can be read")
        return n, to_tensor(self.view(lq, n)), to_tensor(self.view(self.read(hq), n))  # by n: the same view


# -------------------------------------------------------------------------------------------- model


def transformer_block(width: int, heads: int) -> nn.Module:
    """Pre-norm attention and MLP on tokens (B, L, width), as in ViT (Dosovitskiy et al. 2021)."""
    from diffusers.models.attention import BasicTransformerBlock
    return BasicTransformerBlock(width, heads, width // heads, activation_fn="gelu", attention_bias=True)


def zero_init(layer: nn.Module) -> nn.Module:
    """The layer with all parameters zero: what follows it starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def top_k_gates(logits: Tensor, k: int) -> Tensor:
    # Eq. 3, Top-K(Softmax(.)): the K largest keep their values, the others are 0
    g = logits.softmax(-1)  # (.., N)
    chosen = g.topk(k).indices  # (.., K)
    return torch.zeros_like(g).scatter(-1, chosen, g.gather(-1, chosen))


class PromptGenerator(nn.Module):
    """MoE-Prompt Generator, Fig. 2b: the degradation prior meets the features, a router picks K of N prompts
    for every position, these interact with the features. Also Table 2's others: No Prompt; Single, an image
    that is added (Fig. 2a); Multiple, all N prompts by their weights (Fig. 2c). DIFFERS: the release's Single
    is one matrix for all scales, its Multiple 21 vectors a scale, added; it has no No Prompt.
    DIFFERS: the release has a router a task, and is told the task in testing too (in training, whose pool of
    samples shuffles pictures but not tasks, a wrong one). The paper tells of none: one router here."""

    def __init__(self, cfg: Stage1, dp_width: int | None):
        super().__init__()
        self.kind = cfg.prompt
        self.k = cfg.top_k if cfg.prompt == "moe" else cfg.experts  # how many are chosen
        c = cfg.width
        if self.kind == "single":  # "image-like", of 8x8 here, enlarged to the features' size
            self.P = nn.Parameter(torch.randn(1, c, 8, 8) * 0.02)
        elif self.kind != "none":
            self.P = nn.Parameter(torch.rand(cfg.experts, c, c) - 0.5)  # the experts, (N, C, C)
            self.W_g = zero_init(nn.Linear(c, cfg.experts, bias=False))  # Eq. 3
        if self.kind == "moe":
            self.W_noise = zero_init(nn.Linear(c, cfg.experts, bias=False))  # Eq. 3
            if dp_width:
                from diffusers.models.attention_processor import Attention
                self.meet = Attention(c, dp_width, heads=2 * cfg.heads, dim_head=c // cfg.heads)

    def gate(self, f: Tensor, dp: Tensor | None, noise: Tensor | None) -> Tensor:
        """G(x) (B, L, N) of features f (B, L, C), prior dp (B, M, D), in training noise (B, L, N) ~ N(0, 1).
        DIFFERS: the release draws that noise in testing too."""
        x = f if dp is None else self.meet(f, dp)  # cross-attention: (B, L, C)
        logits = self.W_g(x)                       # (B, L, N)
        if noise is not None:
            # Eq. 3: x W_g + N(0, 1) Softplus(x W_noise)
            logits = logits + noise * F.softplus(self.W_noise(x))
        return top_k_gates(logits, self.k)

    def forward(self, f: Tensor, size: tuple[int, int], dp: Tensor | None,
                noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features f (B, L, C) of a map of `size` -> (y, as f; the gates)."""
        if self.kind == "none":
            return f, None
        if self.kind == "single":
            image = F.interpolate(self.P, size, mode="bilinear")  # (1, C, h, w)
            return f + image.flatten(2).transpose(1, 2), None     # (B, L, C)
        gates = self.gate(f, dp, noise) if self.kind == "moe" else self.gate(f, None, None)
        # Eq. 1: y = sum_i G(x)_i E_i(f), E_i(f) = f P_i, Sec. 3.2's "matrix multiplication"
        return torch.einsum("bln,blc,ncd->bld", gates, f, self.P), gates


class MoEPromptModule(nn.Module):
    """Fig. 3c: features of the compressed image at the UNet's scales (h, h/2, h/4, h/8 in SD 2.1), each by a
    convolution and ViT blocks; of each scale SPADE gets what the prompts make of them, the next scale the
    features themselves. DIFFERS: the release norms all scales' features but the last's, by a slip."""

    def __init__(self, cfg: Stage1, channels: int, scales: int, dp_width: int | None):
        super().__init__()
        c = cfg.width
        self.conv = nn.ModuleList(nn.Conv2d(c if i else channels, c, 3, 2 if i else 1, 1)
                                  for i in range(scales))  # Sec. 3.4: all but the first downsample
        self.vit = nn.ModuleList(nn.Sequential(*(transformer_block(c, cfg.heads) for _ in range(cfg.depth)),
                                               nn.LayerNorm(c)) for _ in range(scales))
        self.prompt = nn.ModuleList(PromptGenerator(cfg, dp_width) for _ in range(scales))

    def forward(self, z_lq: Tensor, dp: Tensor | None,
                noise: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """z_lq (B, C, h, w), noise (B, scales, N, h, w) -> each scale's y (B, width, ., .), gates."""
        f = z_lq.to(self.conv[0].weight.dtype)  # without positions, as released
        ys, all_gates = [], []
        for i, (conv, vit, prompt) in enumerate(zip(self.conv, self.vit, self.prompt)):
            f = conv(f)                                 # (B, width, h / 2^i, w / 2^i)
            h, w = f.shape[2:]
            f = vit(f.flatten(2).transpose(1, 2))       # (B, L, width), L = h w / 4^i
            own = None if noise is None else noise[:, i, :, :h, :w].flatten(2).transpose(1, 2)  # (B, L, N)
            y, gates = prompt(f, (h, w), dp, own)
            f, y = (m.transpose(1, 2).unflatten(2, (h, w)) for m in (f, y))  # (B, width, h / 2^i, w / 2^i)
            ys.append(y)
            all_gates.append(gates)
        return ys, [g for g in all_gates if g is not None]


class SPADE(nn.Module):
    """h -> h + gamma Norm(h) + beta, gamma and beta by convolutions from y, the prompts' part at h's scale.
    DIFFERS: Park et al. (2019), and the release from random weights, have (1 + gamma) Norm(h) + beta, which
    changes the UNet from the start; here they start at zero. The release's Norm has parameters, too."""

    def __init__(self, c_y: int, c: int, hidden: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, affine=False)  # gamma and beta come from y
        self.maps = nn.Sequential(nn.Conv2d(c_y, hidden, 3, padding=1), nn.ReLU(),
                                  zero_init(nn.Conv2d(hidden, 2 * c, 3, padding=1)))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        gamma, beta = self.maps(y).chunk(2, 1)  # as h
        return h + self.norm(h) * gamma + beta

    def resblock(self, resnet: nn.Module, h: Tensor, time: Tensor, y: Tensor) -> Tensor:
        """A ResBlock of the UNet, skip(h) + branch(h), with SPADE on its branch (Sec. 3.4); time (B, c_t)."""
        g = resnet.conv1(F.silu(resnet.norm1(h)))  # (B, c, h, w)
        g = g + resnet.time_emb_proj(F.silu(time))[:, :, None, None]  # of time: (B, c, 1, 1)
        g = resnet.conv2(F.silu(resnet.norm2(g)))
        skip = h if resnet.conv_shortcut is None else resnet.conv_shortcut(h)  # as g
        return skip + self(g, y)


def clip_encoder(name: str, flag: str, weights: bool = True) -> nn.Module:
    """A CLIP's image encoder, frozen; without `weights` its architecture only."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, logging
    logging.set_verbosity_error()  # it would list a whole CLIP's text encoder as left over
    logging.disable_progress_bar()
    folder = ROOT / "data" / name if name == TINY_CLIP else name
    sizes = {CLIP_B32: {}, CLIP_H14: {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                                      "num_attention_heads": 16, "patch_size": 14, "hidden_act": "gelu"}}
    try:
        if weights:
            return CLIPVisionModel.from_pretrained(folder).float().requires_grad_(False)
        config = (CLIPVisionConfig(**sizes[name]) if name in sizes  # counted without a download
                  else CLIPVisionConfig.from_pretrained(folder))
        return CLIPVisionModel(config).requires_grad_(False)
    except Exception as error:  # no network, no such repository, a folder that holds something else
        why = str(error).splitlines()[0][:150]
        raise UserError(f"{flag} {name}: no CLIP image encoder ({why}); name a local one, keep it") from None


def clip_input(x: Tensor, size: int) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> as CLIP expects it: size x size, its own mean and deviation."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=x.device).view(2, 1, 3, 1, 1)
    x = F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True).clamp(-1, 1)  # (B, 3, ., .)
    return ((x + 1) / 2 - mean) / std


class Prior(nn.Module):
    """Degradation prior DP, Sec. 3.2: all tokens of a frozen CLIP image encoder: the paper's DA-CLIP (`python
    -m data.convert daclip`), or any. DIFFERS: without --dp the paper run takes CLIP's B/32. The release
    leaves out class token, positions and normalisation, and reshapes where it should transpose."""

    def __init__(self, name: str, weights: bool = True):
        super().__init__()
        self.net = clip_encoder(name, "--dp", weights)
        self.width = self.net.config.hidden_size  # D

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> dp (B, M, width)."""
        return self.net(clip_input(x, self.net.config.image_size).to(self.net.dtype)).last_hidden_state


class Visual2Text(nn.Module):
    """Sec. 3.3: quality enhancer (transformer blocks, adding to the picture), CLIP's image encoder, adapter
    (tokens plus an MLP's of them, as CLIP-Adapter). Beside CLIP's stand learned tokens, which start as the
    empty caption's (ours); a picture of any size is reduced to CLIP's (ours). DIFFERS: the release has CLIP
    RN50, which transformers lacks, without its normalisation, and an enhancer that no optimiser has."""

    def __init__(self, cfg: Stage1, empty: Tensor, weights: bool = True):
        super().__init__()
        self.clip = clip_encoder(cfg.v2t, "--clip", weights)
        c = cfg.width
        d = self.clip.config.hidden_size
        D = empty.shape[1]  # the UNet's text width
        self.size = self.clip.config.image_size
        side = self.clip.config.patch_size
        self.patch = nn.Conv2d(3, c, side, side)  # side x side pixels to a token
        self.position = nn.Parameter(torch.randn(1, (self.size // side) ** 2, c) * 0.02)
        self.enhance = nn.Sequential(*(transformer_block(c, cfg.heads) for _ in range(cfg.enhancer)))
        self.unpatch = zero_init(nn.ConvTranspose2d(c, 3, side, side))
        self.conv = nn.Conv2d(d, D, 3, padding=1)  # to the text encoder's width
        self.learned = nn.Parameter(empty.clone())  # (77, D_text)
        self.mlp = nn.Sequential(nn.Linear(D, D // 4, bias=False), nn.ReLU(),
                                 nn.Linear(D // 4, D, bias=False), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> c (B, 256 + 77, D_text)."""
        x = clip_input(x, self.size).to(self.position.dtype)            # (B, 3, size, size)
        patches = self.patch(x)                                         # (B, width, 16, 16)
        f = self.enhance(patches.flatten(2).transpose(1, 2) + self.position)  # (B, 256, width)
        x = x + self.unpatch(f.transpose(1, 2).unflatten(2, patches.shape[2:]))  # enhanced, as x
        tokens = self.clip(x).last_hidden_state[:, 1:]                  # without the class token: (B, 256, d)
        side = math.isqrt(tokens.shape[1])                              # 16: CLIP's pictures are square
        grid = self.conv(tokens.transpose(1, 2).unflatten(2, (side, side)))  # (B, D, 16, 16)
        c = torch.cat([grid.flatten(2).transpose(1, 2), self.learned.expand(len(x), -1, -1)], 1)
        return c + self.mlp(c)                                          # (B, 256 + 77, D)


class ResidualBlock(nn.Module):
    """x + Conv(SiLU(Conv(SiLU(x))))."""

    def __init__(self, c: int):
        super().__init__()
        self.body = nn.Sequential(nn.SiLU(), nn.Conv2d(c, c, 3, 1, 1), nn.SiLU(), nn.Conv2d(c, c, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Compensator(nn.Module):
    """Fig. 3d: the VAE decoder with, at some levels, a residual of its features and the encoder's of x_lq, at
    first zero, weighted by w, as StableSR's feature wrapping, which the release takes over. All in units of
    the channels' deviations over training pictures, which differ by orders of magnitude; each picture's own
    would set crops apart. DIFFERS: plain residual blocks, the release's are dense."""

    def __init__(self, widths: list[int], cfg: Stage2):
        """`widths`: the VAE's, full size first."""
        super().__init__()
        self.levels = cfg.levels
        self.fuse = nn.ModuleDict()
        for i in self.levels:
            c = widths[i]  # channels
            hidden = max(c, 32)
            self.fuse[str(i)] = nn.Sequential(
                nn.Conv2d(2 * c, hidden, 3, padding=1), *(ResidualBlock(hidden) for _ in range(cfg.blocks)),
                nn.SiLU(), zero_init(nn.Conv2d(hidden, c, 3, padding=1)))
            self.register_buffer(f"mean{i}", torch.zeros(2 * c, 1, 1))
            self.register_buffer(f"std{i}", torch.ones(2 * c, 1, 1))

    def residual(self, i: int, e: Tensor, h: Tensor) -> Tensor:
        """Level i: encoder's and decoder's features (B, c, h, w) -> what is added to the latter."""
        mean, std = getattr(self, f"mean{i}"), getattr(self, f"std{i}")
        return std[h.shape[1]:] * self.fuse[str(i)]((torch.cat([e.to(h.dtype), h], 1) - mean) / std)

    def measure_units(self, i: int, e: Tensor, h: Tensor) -> None:
        std, mean = torch.std_mean(torch.cat([e, h], 1).float(), (0, 2, 3), keepdim=True)
        getattr(self, f"mean{i}").copy_(mean[0])  # (2 c, 1, 1)
        getattr(self, f"std{i}").copy_(std[0].clamp(min=1e-3))  # a channel may never change

    def forward(self, sd: SD, z_0: Tensor, features: list[Tensor], w: float = 1.0, measure=False) -> Tensor:
        """The VAE decoder's forward, with what is added between the ResBlocks and the upsampling of a level;
        with `measure` instead sets the units, from some pictures' latents and features."""
        decoder = sd.vae.decoder
        h = decoder.conv_in(sd.vae.post_quant_conv(sd.unscaled(z_0)))  # (B, c, h, w)
        h = decoder.mid_block(h)
        for i, block in zip(range(len(features))[::-1], decoder.up_blocks):  # from H / 8 to full size, i = 0
            for resnet in block.resnets:
                h = resnet(h, None)
            if i in self.levels and measure:
                self.measure_units(i, features[i], h)
            elif i in self.levels:
                h = h + w * self.residual(i, features[i], h)  # Fig. 3d
            for upsample in block.upsamplers or ():
                h = upsample(h)
        return decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h)))  # (B, 3, H, W)


def diffuse(z: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """z noised to alpha_bar, a scalar or (B,)."""
    a = alpha_bar.to(z.device).view(-1, 1, 1, 1)  # (B, 1, 1, 1)
    return a.sqrt() * z + (1 - a).sqrt() * noise


class MoEDiffIR(nn.Module):
    """Frozen Stable Diffusion, the modules that stage 1 trains around it, stage 2's compensator, if any.
    `empty` (L, D_text): the empty caption's tokens."""

    def __init__(self, base: str | Path, cfg: Stage1, empty: Tensor, cfg2: Stage2 | None = None,
                 weights: bool = True):
        super().__init__()
        self.base = base
        self.cfg = cfg
        self.sd = SD(base, weights=weights)
        self.cell, self.stride = self.sd.cell, self.sd.stride
        unet, vae = self.sd.unet.config, self.sd.vae.config
        wanted = cfg.prompt == "moe" and cfg.dp != "none"
        self.prior = Prior(cfg.dp, weights) if wanted else None  # only MoE-Prompt reads it
        dp_width = self.prior.width if self.prior else None
        self.module = MoEPromptModule(cfg, vae.latent_channels, len(unet.block_out_channels), dp_width)
        # as in StableSR, in all ResBlocks of the up blocks, full size first, and in the mid block's first
        blocks = [*reversed(self.sd.unet.up_blocks)]
        self.modulated = [(i, resnet) for i, block in enumerate(blocks) for resnet in block.resnets]
        self.modulated.append((len(blocks) - 1, self.sd.unet.mid_block.resnets[0]))  # (scale, ResBlock)
        self.spade = nn.ModuleList(SPADE(cfg.width, resnet.out_channels, cfg.spade, unet.norm_num_groups)
                                   for _, resnet in self.modulated)
        self.v2t = Visual2Text(cfg, empty, weights) if cfg.v2t != "none" else None
        self.register_buffer("empty", empty)
        self.compensator = Compensator(vae.block_out_channels, cfg2) if cfg2 else None

    def text(self, x_lq: Tensor) -> Tensor:
        """c (B, tokens, D_text)."""
        return self.v2t(x_lq) if self.v2t else self.empty.expand(len(x_lq), -1, -1)

    def degradation_prior(self, x_lq: Tensor) -> Tensor | None:
        """dp, the mean over windows of the training crop's size that cover x_lq: reduced to the prior's input
        a larger picture would lose what a codec left in it."""
        size = self.cfg.crop
        ys, xs = (np.linspace(0, max(0, n - size), -(-n // size)).round().astype(int) for n in x_lq.shape[2:])
        windows = [x_lq[..., y:y + size, x:x + size] for y in ys for x in xs]  # (B, 3, size, size) each
        return sum(map(self.prior, windows)) / len(windows) if self.prior else None

    def unet(self, z_t: Tensor, t: Tensor, c: Tensor, ys: list[Tensor]) -> Tensor:
        """The UNet's forward, with SPADE in these ResBlocks: (B, C, h, w)."""
        unet = self.sd.unet
        spade = {resnet: own for own, (_, resnet) in zip(self.spade, self.modulated)}
        z_t = z_t.to(unet.dtype)

        def modulated(resnet, *given):
            if self.cfg.checkpointing and torch.is_grad_enabled():
                return checkpoint(spade[resnet].resblock, resnet, *given, use_reentrant=False)
            return spade[resnet].resblock(resnet, *given)
        time = unet.time_embedding(unet.get_time_embed(z_t, t))  # (B, c_time)
        h = unet.conv_in(z_t)  # (B, c_0, h, w)
        skips = [h]  # for the way up
        for block in unet.down_blocks:
            h, own = block(h, time, **({"encoder_hidden_states": c} if hasattr(block, "attentions") else {}))
            skips += own  # one for each ResBlock and downsampling
        mid = unet.mid_block
        h = modulated(mid.resnets[0], h, time, ys[-1])  # (B, c, h / 8, w / 8)
        for attention, resnet in zip(mid.attentions, mid.resnets[1:]):
            h = resnet(attention(h, c, return_dict=False)[0], time)
        for block, y in zip(unet.up_blocks, reversed(ys)):  # from h / 8 to h
            for j, resnet in enumerate(block.resnets):
                h = modulated(resnet, torch.cat([h, skips.pop()], 1), time, y)  # (B, c_i, h / 2^i, w / 2^i)
                if hasattr(block, "attentions"):
                    h = block.attentions[j](h, c, return_dict=False)[0]
            for upsample in block.upsamplers or ():
                h = upsample(h, skips[-1].shape[2:])  # odd sides were rounded up
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))  # (B, C, h, w)

    def eps(self, z_t: Tensor, out: Tensor, alpha_bar: Tensor) -> Tensor:
        """The noise that the UNet's output implies, of v sqrt(alpha_bar) v + sqrt(1 - alpha_bar) z_t."""
        a = alpha_bar.view(-1, 1, 1, 1)
        out = out.float()
        return out if self.sd.prediction == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * z_t.float()

    def forward(self, z_t: Tensor, t: Tensor, z_lq: Tensor, x_lq: Tensor, noise: Tensor):
        """Training: (eps_hat, the gates of each scale)."""
        dp = self.degradation_prior(x_lq)             # (B, M, D)
        ys, gates = self.module(z_lq, dp, noise)      # (B, width, ., .), (B, L, N) a scale
        out = self.unet(z_t, t, self.text(x_lq), ys)  # (B, C, h, w)
        return self.eps(z_t, out, self.sd.alpha_bar[t]), gates

    def sample(self, z_lq: Tensor, x_lq: Tensor, steps: int, generators: list[torch.Generator],
               tiles=whole) -> Tensor:
        """z_0 in `steps` calls of the UNet: ancestral sampling (Ho et al. 2020) from noise, each picture's by
        its generator, over evenly spaced timesteps, T - 1 to 0. With t*: one call, from z_lq as it is."""
        from diffusers.utils.torch_utils import randn_tensor
        dp = self.degradation_prior(x_lq)  # (B, M, D)
        c = self.text(x_lq)                # (B, tokens, D_text)
        module = functools.lru_cache(1)(lambda z_lq: self.module(z_lq, dp)[0])  # once; in windows once a step

        def predict(t, z_t, z_lq):
            times = torch.full((len(z_t),), t, device=z_t.device)  # (B,)
            return self.sd.x0(z_t, self.unet(z_t, times, c, module(z_lq)), self.sd.alpha_bar[t])
        alpha_bar = self.sd.alpha_bar.to(z_lq.device)
        if t := self.cfg.t_star:
            return tiles(functools.partial(predict, t), alpha_bar[t].sqrt() * z_lq, z_lq)
        times = torch.linspace(len(alpha_bar) - 1, 0, steps).round().int().tolist()
        z = randn_tensor(z_lq.shape, generators, z_lq.device)  # z_T
        for t, s in zip(times, [*times[1:], None]):
            z_0 = tiles(functools.partial(predict, t), z, z_lq)  # (B, C, h, w)
            if s is not None:
                # z_s ~ q(z_s | z_t, z_0), of variance beta-tilde
                a, b = alpha_bar[t], alpha_bar[s]
                variance = (1 - b) / (1 - a) * (1 - a / b)
                eps = (z - a.sqrt() * z_0) / (1 - a).sqrt()
                z = b.sqrt() * z_0 + (1 - b - variance).sqrt() * eps
                z = z + variance.sqrt() * randn_tensor(z.shape, generators, z.device)
        return z_0

    def encode(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """(z, features of x before each downsampling and at the end): the VAE encoder's forward."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        vae = self.sd.vae
        encoder = vae.encoder
        h = encoder.conv_in(x.to(vae.dtype))                            # (B, c, H, W)
        features = []
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                h = resnet(h, None)
            features.append(h)                                          # (B, c_i, H / 2^i, W / 2^i)
            for downsample in block.downsamplers or ():
                h = downsample(h)
        h = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(h))))  # (B, 2 C, h, w)
        return self.sd.sample(DiagonalGaussianDistribution(vae.quant_conv(h)), noise), features


# ------------------------------------------------------------------------------------------- losses


def draw(n: Tensor, z_lq: Tensor, z_0: Tensor, cfg: Stage1, alpha_bar: Tensor, seed: int) -> tuple:
    """t (B,) and eps (B, C, h, w) of Eq. 2, for samples n: random.
    DIFFERS: with a t*, as in the tiny run, t is always that, and eps what leads from z_0 to the z_t that is
    sqrt(alpha_bar) z_lq, which one step restores. (One step cannot take out the noise that it was given.)"""
    if cfg.t_star:
        a = alpha_bar[cfg.t_star]
        return torch.full_like(n, cfg.t_star), (a / (1 - a)).sqrt() * (z_lq - z_0)
    t = n.new_tensor([rng(seed, "t", i).integers(len(alpha_bar)) for i in n.tolist()])
    return t, noise_for(n, z_0.shape[1:], seed, "eps")


def loss_sd(eps_hat: Tensor, eps: Tensor) -> Tensor:
    # Eq. 2
    return F.mse_loss(eps_hat.float(), eps)


def loss_decoder(lpips: nn.Module, x_hat: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 4: L_lpips[z_lq, z_0, hr], x_hat being the compensated decoder's.  DIFFERS: the release adds L1, GAN
    return lpips(x_hat, x_hq).mean()


# ------------------------------------------------------------------------------------------ stage 1


def stage1(run, cfg: Stage1, benchmark: Benchmark) -> MoEDiffIR:
    """MoE-Prompt Module with SPADE and Visual2Text adapter, all else frozen, Sec. 3.4. `run`, of
    data/runs.py, knows where training stood; it brings batches, keeps the log and saves.

    DIFFERS: the paper says "only the MoE-Prompt Module", but has no other stage for the adapter. In the
    release the module alone learns by two slips: SPADE's learning rate, lr // 2, is 0, and the adapter is
    frozen. Its originals are sharpened: the paper does not say so, and its tables compare with plain ones."""
    torch.manual_seed(run.seed)
    model = MoEDiffIR(run.base, cfg, common.text_tokens(run.base, [""])[0]).train()
    pairs = CIRPairs(benchmark, cfg, model.cell, run.seed)
    acc = run.start(cfg, **dict(model.named_children()))
    if cfg.checkpointing:
        model.sd.unet.enable_gradient_checkpointing()
    adam = torch.optim.Adam(model.parameters(), cfg.lr, betas=(0.9, 0.999))
    model, adam = acc.prepare(model, adam)
    sd = acc.unwrap_model(model).sd
    shape = sd.latent_shape(cfg.crop)  # (C, h, w)
    gates_shape = (len(sd.unet.config.block_out_channels), cfg.experts, *shape[1:])  # (scales, N, h, w)
    first = run.resume({"model": model}, {"adam": adam})  # 0, or the step at which the run was stopped
    for step, (n, x_lq, x_hq) in run.batches(pairs, first):
        with acc.accumulate(model):  # cfg.accumulate batches make a step
            # forward
            with torch.no_grad(), acc.autocast():
                z_lq = sd.encode(x_lq, noise_for(n, shape, run.seed, "z_L")).float()  # (B, C, h, w)
                z_0 = sd.encode(x_hq, noise_for(n, shape, run.seed, "z_H")).float()
            t, eps = draw(n, z_lq, z_0, cfg, sd.alpha_bar, run.seed)
            z_t = diffuse(z_0, eps, sd.alpha_bar[t])  # (B, C, h, w)
            eps_hat, gates = model(z_t, t, z_lq, x_lq, noise_for(n, gates_shape, run.seed, "router"))
            # loss
            loss = loss_sd(eps_hat, eps)  # Eq. 2
            run.ledger(step, {"sd": loss})
            # backward, clip, learning rate, step
            acc.backward(loss)
            common.clip(acc, adam, cfg.clip)
            common.set_lr(adam, cfg.lr, step, cfg)
            adam.step()  # accelerate has it wait for the step's last batch, and zero_grad too
            adam.zero_grad()
        # at how many positions each expert is chosen, at every scale
        load = {f"load{i}.{e}@": share for i, g in enumerate(gates)
                for e, share in enumerate((g > 0).float().mean((0, 1)))}
        run.log(step, sd=loss, **load)
        run.save(step)
    run.finish(model)
    return acc.unwrap_model(model).eval()


def load_stage1(weights: Path, base: str | Path, cfg2: Stage2) -> MoEDiffIR:
    """The model as stage 1 of the run in the folder `weights` left it, with a new compensator."""
    cfg, tensors, header = Stage1.read(weights, "moe_diffir")
    empty = torch.zeros_like(tensors.get("empty", torch.zeros(1, 1)))  # restoring needs no text encoder
    model = MoEDiffIR(base, cfg, empty)
    load_trained(model, tensors, weights)
    model.compensator = Compensator(model.sd.vae.config.block_out_channels, cfg2)
    return model


# ------------------------------------------------------------------------------------------ stage 2


@torch.no_grad()
def make_latents(model: MoEDiffIR, cfg: Stage2, n: Tensor, x_lq: Tensor, seed: int) -> Tensor:
    """z_0 (B, C, h, w) of samples n by stage 1's model, as `restore` makes it."""
    z_lq = model.encode(x_lq)[0].float()  # (B, C, h, w)
    generators = [torch_rng(seed, "z_T", i) for i in n.tolist()]
    return model.sample(z_lq, x_lq, cfg.sampling, generators)


def cache_latents(run, cfg: Stage2, model: MoEDiffIR, pairs: CIRPairs) -> Tensor:
    """z_0 of the first cfg.cache_latents samples, in a file whose name says what rows depend on."""
    files = zlib.crc32(str([(hq.name, dict(lqs).keys()) for hq, lqs in pairs.versions.items()]).encode())
    path = run.folder / "latents" / f"{cfg.cache_latents}-{cfg.crop}-{cfg.sampling}-{files:08x}.npy"
    shape = (cfg.cache_latents, *model.sd.latent_shape(cfg.crop))
    return common.tool("runs").filled_rows(path, shape, pairs, cfg, run.acc,
                                           lambda n, x_lq, *_: make_latents(model, cfg, n, x_lq, run.seed))


def stage2(run, cfg: Stage2, benchmark: Benchmark, lpips: nn.Module) -> None:
    """The decoder compensator, all else frozen, Sec. 3.4."""
    torch.manual_seed(run.seed + 1)
    model = load_stage1(run.folder, run.base, cfg).requires_grad_(False).eval()
    sd = model.sd
    compensator = model.compensator.requires_grad_(True)
    acc = run.start(cfg, **{"stage 1's model": model, "compensator": compensator})
    pairs = CIRPairs(benchmark, cfg, model.cell, run.seed + 1, period=cfg.cache_latents)
    model.to(acc.device)
    lpips.to(acc.device)
    known = cache_latents(run, cfg, model, pairs) if cfg.cache_latents else None  # (samples, C, h, w)
    x_lq = torch.stack([pairs[n][1] for n in range(16)]).to(acc.device)  # the same in every process
    with torch.no_grad(), acc.autocast():
        compensator(sd, *model.encode(x_lq), measure=True)
    adam = torch.optim.Adam(compensator.parameters(), cfg.lr, betas=(0.9, 0.999))
    compensator, adam = acc.prepare(compensator, adam)
    first = run.resume({"compensator": compensator}, {"adam": adam})
    for step, (n, x_lq, x_hq) in run.batches(pairs, first):
        with acc.accumulate(compensator):
            # forward
            with torch.no_grad(), acc.autocast():
                _, features = model.encode(x_lq)  # (B, c_i, H / 2^i, W / 2^i) each
                z_0 = (known[n.cpu()].to(n.device) if cfg.cache_latents
                       else make_latents(model, cfg, n, x_lq, run.seed))  # (B, C, h, w)
            x_hat = compensator(sd, z_0, features).clamp(-1, 1)  # (B, 3, H, W); clamped: ours
            # loss
            terms = {"lpips": loss_decoder(lpips, x_hat, x_hq)}
            loss = sum(terms.values())  # Eq. 4
            run.ledger(step, terms)
            # backward, clip, learning rate, step
            acc.backward(loss)
            common.clip(acc, adam, cfg.clip)
            common.set_lr(adam, cfg.lr, step, cfg)
            adam.step()
            adam.zero_grad()
        run.log(step, **terms)
        run.save(step)
    run.finish(compensator, fingerprint=sd.fingerprint)


# --------------------------------------------------------------------------------------- inference


def load(weights: Path, base: str | None = None) -> MoEDiffIR:
    """The trained model of a run's folder, on the device at hand, ready for `restore`."""
    cfg, tensors, header = Stage2.read(weights, "moe_diffir")
    model = load_stage1(weights, base or header["base"], cfg)
    model.sd.check(header, weights)
    load_trained(model.compensator, tensors, weights)
    model.sampling = cfg.sampling
    model.tasks = header["tasks"]
    return common.for_inference(model)


@torch.inference_mode()
def restore(model: MoEDiffIR, image: Image.Image, steps: int | None = None, fidelity: float = 1.0,
            tiles=whole) -> Image.Image:
    """One compressed image, any size -> its restored self. The noise is the same every time."""
    x_lq = to_tensor(image)[None].to(device())       # (1, 3, H, W)
    x = pad_to(x_lq, model.cell)                     # sides: multiples of 8
    encode = functools.lru_cache(1)(model.encode)    # the whole picture is encoded once, windows twice
    z_lq = tiles(lambda x: encode(x)[0], x).float()  # (1, C, h, w), the mean.  DIFFERS: released, a sample
    z_0 = model.sample(z_lq, x_lq, steps or model.sampling, [torch_rng(0)], tiles)
    x_hat = tiles(lambda z_0, x: model.compensator(model.sd, z_0, encode(x)[1], fidelity), z_0, x)
    return to_image(x_hat[0, :, :image.height, :image.width])


# ------------------------------------------------------------------------------------- command line


def train(args) -> None:
    cfg1, cfg2 = Stage1.of(args), Stage2.of(args)
    cfg1.check_steps("--s2-sampling", cfg2.sampling)
    cfg1.dp, cfg1.v2t = (str(Path(name).resolve()) if Path(name).is_dir() else name
                         for name in (cfg1.dp, cfg1.v2t))
    lpips = common.lpips(cfg2.lpips)
    make_cir = common.tool("make_cir")
    caches, tasks = make_cir.wanted(args.data or [common.PHOTOS / "train"], args.cache, args.codecs)
    run = common.tool("runs").Run(args, common.SD21_BASE, cfg1, cfg2, tasks=[*map(":".join, tasks)])
    benchmark = make_cir.made(caches, tasks)
    if args.stage in ("1", "all"):
        model = stage1(run, cfg1, benchmark)
        if cfg1.t_star and run.acc.is_main_process:  # what one step does already
            val = args.val or [common.PHOTOS / "val"]
            common.tool("results.moe_diffir").print_latent_errors(model, val, tasks)
        del model
    if args.stage in ("2", "all"):
        stage2(run, cfg2, benchmark, lpips)
        run.evaluate("--lowest")


def model_flags(p) -> None:
    """Of restore and eval."""
    p.model_flags("moe_diffir")
    p.add_argument("--fidelity", type=float, default=1.0, help="the compensator's weight, 0 to 1")


def check_sampling(args, model: MoEDiffIR, steps: list[int]) -> None:
    for n in steps:
        model.cfg.check_steps("--steps", n)
    if not 0 <= args.fidelity <= 1:
        raise UserError(f"--fidelity {args.fidelity}: must be from 0 to 1")


def restorer(args, model: MoEDiffIR | None = None):
    """What restore does, by the model of `args` or another: image -> (restored image, remark)."""
    model = model or load(args.weights, args.base)
    steps = model.sampling if args.steps is None else args.steps
    check_sampling(args, model, [steps])
    tiles_for = common.tool("tiles").tiling(model, args.tile)
    return lambda image: (restore(model, image, steps, args.fidelity, tiles_for(image.size)), "")


def main(argv: list[str] | None = None) -> None:
    cli = common.tool("runs").CommandLine.of(sys.modules[__name__])
    p = cli.train(train, Stage1, Stage2)
    p.add_argument("--codecs", nargs="+", metavar="CODEC[:LEVEL]", help="what to train on, beside --pairs")
    p.add_argument("--cache", type=Path, help="compressed photographs' folder (default: DATA/.cir-bench)")
    p.add_argument("--no-dp", dest="1.dp", action="store_const", const="none", help="Table 3: no prior DP")
    p.add_argument("--no-v2t", dest="1.v2t", action="store_const", const="none", help="Table 3: empty prompt")
    p = cli.restore(restorer)
    model_flags(p)
    p.add_argument("--steps", type=int, help="calls of the UNet (default: as many as it was trained with)")
    cli.start(argv)


if __name__ == "__main__":
    main()
