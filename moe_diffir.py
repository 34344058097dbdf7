"""MoE-DiffIR: Task-customized Diffusion Priors for Universal Compressed Image Restoration (ECCV 2024,
arXiv 2407.10833v1).

    x_lq -> VAE enc -> z_lq -> z_t at t* -> UNet -> eps -> x0, or N DDIM steps -> z_0 -> VAE dec -> x_hat
      |                  \\-> MoE-Prompt Module --^ SPADE in ResBlocks       compensator (stage 2) --^
      |-> prior DP -----------> its routers                                (encoder features of x_lq)
      \\-> quality enhancer -> CLIP -> Visual2Text adapter -> c (the UNet's text tokens)

| paper    | code       | shape                | range                                                       |
| -------- | ---------- | -------------------- | ----------------------------------------------------------- |
| LQ, hr   | x_lq, x_hq | (B, 3, H, W)         | [-1, 1]; the compressed image and its original              |
| z_lq     | z_lq       | (B, C, H / 8, W / 8) | latent of x_lq, scaling factor applied                      |
| z_t, z_0 | z_t, z_0   | as z_lq              | latent at time t; the original's, or the UNet's estimate    |
| DP       | dp         | (B, M, D)            | degradation prior, tokens of an image encoder               |
| x        | x          | (B, width)           | a router's input, pooled; one router for each scale         |
| G(x)     | gates      | (B, N)               | K softmax values, the others 0                              |
| prompts  | prompts    | (N, 32, width)       | the experts, N = 7; K = 3 of them are chosen                |

No code or weights were released. Where the paper is silent the code says "ours"; what differs from the paper
stands at its place, in lines beginning DIFFERS. The benchmark of Sec. 3.5 is data/make_cir.py's.

    python moe_diffir.py train         # benchmark of the bundled photographs, both stages, a table, a picture
    python moe_diffir.py restore photo.webp -o photo.png
"""

from __future__ import annotations

import functools
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import (PHOTOS, SD, SD21_BASE, CommandLine, Crops, Run, Stage, Tiles, UserError, both, device,
                    load_trained, noise_for, pad_to, read_model, rng, to_image, to_tensor, torch_rng)

# ------------------------------------------------------------------------------------ configurations

CLIP_B32, CLIP_H14 = "openai/clip-vit-base-patch32", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PROMPTS, LPIPS, STARTS = ("none", "single", "multiple", "moe"), ("small", "vgg"), ("lq", "noise")
Benchmark = dict[Path, list[tuple[int, Path]]]  # photograph: [(number of the task, compressed version), ...]


def check(flag: str, value: float, least: int, most: int, why: str = "") -> None:
    if not least <= value <= most:
        raise UserError(f"{flag} {value}: must be from {least} to {most}{why}")


@dataclass
class Stage1(Stage):
    """MoE-Prompt Module and Visual2Text adapter, Secs. 3.2 to 3.4."""
    #                           tiny run  paper run
    experts: int         = both(7,        7,         "Sec. 4.3, Fig. 6: N prompts a scale", "experts")
    top_k: int           = both(3,        3,         "Sec. 4.3, Fig. 6: K of them chosen", "top_k")
    prompt: str          = both("moe",    "moe",     "Table 2", "prompt", PROMPTS)
    prompt_length: int   = both(32,       32,        "ours: tokens of a prompt")
    width: int           = both(64,       320,       "ours: channels of the module, at every scale")
    heads: int           = both(4,        8,         "ours")
    dp: str              = both("small",  CLIP_B32,  "Sec. 3.2, Table 3: 'small', 'none' or a CLIP", "dp")
    v2t: str             = both("small",  CLIP_H14,  "Sec. 3.3, Table 3; H/14 has SD 2.1's space", "clip")
    enhancer: int        = both(1,        4,         "ours: transformer blocks of the quality enhancer")
    lambda_dp: float     = both(0.1,      0.0,       "ours: small prior tells tasks apart, as DA-CLIP's")
    crop: int            = both(128,      256,       "Sec. 4.1")
    start: str           = both("lq",     "noise",   "Eq. 2; see stage1 and sample", "start", STARTS)
    start_t: int         = both(49,       999,       "ours: t* of 'lq'; where sampling starts", most=999)
    t_max: int           = both(499,      999,       "Eq. 2: 'noise' has t uniform in 0..t_max", most=999)
    lr: float            = both(1e-3,     5e-5,      "Sec. 4.1")
    clip: float          = both(1.0,      1.0,       "ours: gradient norm; 0 clips nothing")
    batch: int           = both(8,        32,        "Sec. 4.1")
    steps: int           = both(350,      400_000,   "Sec. 4.1")

    def __post_init__(self):
        super().__post_init__()
        check("--top-k", self.top_k, 1, self.experts)
        check("--s1-start-t", self.start_t, 0, {"lq": 499}.get(self.start, 999), f" (--start {self.start})")
        if self.width % self.heads or self.width % 4:
            raise UserError(f"--s1-width {self.width}: must be a multiple of 4 and --s1-heads {self.heads}")

    def check_steps(self, flag: str, steps: int) -> None:
        most = 1 if self.start == "lq" else self.start_t + 1
        check(flag, steps, 1, most, f" (--start {self.start}, --s1-start-t {self.start_t})")


@dataclass
class Stage2(Stage):
    """Decoder compensator, Sec. 3.4."""
    #                           tiny run  paper run
    sampling: int        = both(1,        50,        "ours: steps that make z_0, here and in restore")
    levels: int          = both(1,        4,         "ours: decoder levels compensated, from full size down")
    blocks: int          = both(1,        2,         "ours: residual blocks at each of them")
    lpips: str           = both("small",  "vgg",     "Eq. 4; 'small' needs no download", None, LPIPS)
    cache_latents: int   = both(300,      70_000,    "Sec. 4.1: z_0 in advance; 0: none", "cache_latents")
    crop: int            = both(256,      256,       "Sec. 4.1")
    lr: float            = both(1e-3,     1e-4,      "Sec. 4.1")
    decay: float         = both(0.8,      0.0,       "ours: last part of the run in which lr falls to 0")
    clip: float          = both(1.0,      1.0,       "ours: gradient norm; 0 clips nothing")
    batch: int           = both(1,        32,        "Sec. 4.1")
    steps: int           = both(300,      100_000,   "Sec. 4.1")

    def __post_init__(self):
        super().__post_init__()
        check("--s2-levels", self.levels, 1, 4)


# --------------------------------------------------------------------------------------------- data


class CIRPairs(Crops):
    """Sample n -> (n, x_lq, x_hq, task): the same crop of a photograph and of one of its compressed versions,
    each task as likely as another, flipped and rotated (Sec. 4.1). DIFFERS: the paper resizes to 256x256, and
    so blurs what compression did. `period`: sample n is sample n % period."""

    def __init__(self, benchmark: Benchmark, cfg: Stage, multiple: int, seed: int, period: int = 0):
        cfg.check_crop(multiple)
        super().__init__(list(benchmark), cfg.crop, seed)
        self.versions, self.period = benchmark, period
        self.few = sum(map(len, benchmark.values())) <= 256  # as of the bundled photographs: kept in memory

    @functools.lru_cache(maxsize=256)
    def read_once(self, file: Path) -> np.ndarray:
        return Crops.read.__wrapped__(self, file)

    def __getitem__(self, n: int) -> tuple[int, Tensor, Tensor, int]:
        n = n % self.period if self.period else n
        hq = self.file(n)
        task, lq = self.versions[hq][int(rng(self.seed, 2, n).integers(len(self.versions[hq])))]
        x_lq = self.view(self.read_once(lq) if self.few else self.read(lq), n)
        return n, to_tensor(x_lq), to_tensor(self.view(self.read(hq), n)), task


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
    g = logits.softmax(-1)
    chosen = g.topk(k).indices
    return torch.zeros_like(g).scatter(-1, chosen, g.gather(-1, chosen))


def attend(f: Tensor, p: Tensor) -> Tensor:
    """softmax(f p^T / sqrt(C)) p: the features' "form of matrix multiplication" with a prompt (Sec. 3.2)."""
    return (f @ p.transpose(-1, -2) * f.shape[-1] ** -0.5).softmax(-1) @ p


class PromptGenerator(nn.Module):
    """MoE-Prompt Generator, Fig. 2b: the degradation prior meets the features, a router picks K of N prompts,
    these interact with the features. Also Table 2's Single, Multiple and No Prompt (Fig. 2a, 2c)."""

    def __init__(self, cfg: Stage1, dp_width: int | None):
        super().__init__()
        self.kind, self.k = cfg.prompt, cfg.top_k
        if self.kind == "single":  # "image-like", of 8x8 here, enlarged to the features' size
            self.prompts = nn.Parameter(torch.randn(1, cfg.width, 8, 8) * 0.02)
        elif self.kind != "none":
            self.prompts = nn.Parameter(torch.randn(cfg.experts, cfg.prompt_length, cfg.width))
            self.W_g = nn.Linear(cfg.width, cfg.experts, bias=False)
        if self.kind == "moe":
            self.norm_x = nn.LayerNorm(cfg.width, elementwise_affine=False)
            self.W_noise = zero_init(nn.Linear(cfg.width, cfg.experts, bias=False))
            if dp_width:
                from diffusers.models.attention_processor import Attention
                self.norm = nn.LayerNorm(cfg.width)
                self.meet = Attention(cfg.width, dp_width, heads=cfg.heads, dim_head=cfg.width // cfg.heads)

    def gate(self, f: Tensor, dp: Tensor | None, noise: Tensor | None) -> Tensor:
        """G(x) (B, N) of features f (B, L, width), prior dp (B, M, D), in training noise (B, N) ~ N(0, 1)."""
        x = self.norm_x((f if dp is None else self.meet(self.norm(f), dp)).mean(1))
        logits = self.W_g(x)
        if noise is not None:
            # Eq. 3: x W_g + N(0, 1) Softplus(x W_noise)
            logits = logits + noise * F.softplus(self.W_noise(x))
        return top_k_gates(logits, self.k)

    def forward(self, f: Tensor, size: tuple[int, int], dp: Tensor | None, noise: Tensor | None,
                gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features (B, L, width) of a map of `size` -> (f and the prompts' part, gates, given or new)."""
        if self.kind == "none":
            return f, None
        if self.kind == "single":
            return f + F.interpolate(self.prompts, size, mode="bilinear").flatten(2).transpose(1, 2), None
        if self.kind == "multiple":
            gates = self.W_g(f.mean(1)).softmax(-1) if gates is None else gates
            mixed = torch.einsum("bn,nlc->blc", gates, self.prompts)
            return f + attend(f, mixed), gates
        gates = self.gate(f, dp, noise) if gates is None else gates
        weight, chosen = gates.topk(self.k)
        # Eq. 1: y = sum over the chosen of G(x)_i E_i(x), E_i(x) = softmax(f P_i^T / sqrt(C)) P_i
        y = attend(f[:, None], self.prompts[chosen])  # (B, K, L, width)
        return f + (weight[:, :, None, None] * y).sum(1), gates


class MoEPromptModule(nn.Module):
    """Fig. 3c: features of the compressed image at the UNet's scales (h, h/2, h/4, h/8 in SD 2.1), each by a
    ViT block and a prompt generator."""

    def __init__(self, cfg: Stage1, channels: int, widths: list[int], dp_width: int | None):
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps
        super().__init__()
        c = cfg.width
        self.waves, self.time = Timesteps(c, True, 0), TimestepEmbedding(c, c)
        self.down = nn.ModuleList(nn.Conv2d(c if i else channels, c, 3, 2 if i else 1, 1)
                                  for i in range(len(widths)))
        self.at_t = nn.ModuleList(nn.Linear(c, c) for _ in widths)
        self.vit = nn.ModuleList(transformer_block(c, cfg.heads) for _ in widths)
        self.prompt = nn.ModuleList(PromptGenerator(cfg, dp_width) for _ in widths)
        self.out = nn.ModuleList(nn.Conv2d(c, w, 3, padding=1) for w in widths)

    def forward(self, z_lq: Tensor, t: Tensor, dp: Tensor | None, noise: Tensor | None = None,
                gates: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """z_lq (B, C, h, w), t (B,), noise (B, scales, N) -> (features, gates), one of each a scale."""
        f, time, features, all_gates = z_lq, self.time(self.waves(t).to(z_lq.dtype)), [], []
        for i, down in enumerate(self.down):
            f = F.silu(down(f) + self.at_t[i](time)[:, :, None, None])
            size = f.shape[2:]
            f = self.vit[i](f.flatten(2).transpose(1, 2))  # (B, L, width), L = h w / 4^i
            own_noise, own_gates = None if noise is None else noise[:, i], gates[i] if gates else None
            f, g = self.prompt[i](f, size, dp, own_noise, own_gates)
            f = f.transpose(1, 2).unflatten(2, size)
            features.append(self.out[i](f))
            all_gates.append(g)
        return features, [g for g in all_gates if g is not None]


class SPADE(nn.Module):
    """h -> h + gamma Norm(h) + beta, gamma and beta by convolutions from the module's feature f at h's scale;
    they start at zero, from the untouched UNet. DIFFERS: Park et al. (2019) keep only the normalised h, which
    would change the UNet from the start."""

    def __init__(self, c_f: int, c: int, hidden: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, affine=False)
        self.maps = nn.Sequential(nn.Conv2d(c_f, hidden, 3, padding=1), nn.SiLU(),
                                  zero_init(nn.Conv2d(hidden, 2 * c, 3, padding=1)))

    def forward(self, h: Tensor, f: Tensor) -> Tensor:
        gamma, beta = self.maps(f).chunk(2, 1)
        return h + self.norm(h) * gamma + beta


CLIP_SIZES = {  # of those that `clip_encoder` can build without their weights
    "small": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 64, "patch_size": 8},
    CLIP_B32: {},  # transformers' defaults
    CLIP_H14: {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
               "num_attention_heads": 16, "patch_size": 14, "hidden_act": "gelu"}}


def clip_encoder(name: str, flag: str, weights: bool = True) -> nn.Module:
    """A CLIP image encoder: frozen, but for 'small', the tiny run's, random at first and trained along."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    if name == "small" or not weights:
        return CLIPVisionModel(CLIPVisionConfig(**CLIP_SIZES[name])).requires_grad_(name == "small")
    try:
        return CLIPVisionModel.from_pretrained(name).float().requires_grad_(False)
    except Exception as error:  # no network, no such repository, a folder that holds something else
        why = str(error).splitlines()[0][:150]
        raise UserError(f"{flag} {name}: no CLIP image encoder there ({why}); give a local folder") from None


def clip_input(x: Tensor, size: int) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> as CLIP expects it: size x size, its own mean and deviation."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    mean, std = torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD], device=x.device).view(2, 1, 3, 1, 1)
    x = F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    return ((x + 1) / 2 - mean) / std


class Prior(nn.Module):
    """Degradation prior DP, Sec. 3.2: all tokens of a frozen CLIP image encoder. DIFFERS: the paper takes
    DA-CLIP's, an open_clip checkpoint of a forked architecture; here any CLIP of transformers."""

    def __init__(self, name: str, weights: bool = True):
        super().__init__()
        self.net = clip_encoder(name, "--dp", weights)
        self.width = self.net.config.hidden_size

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> dp (B, M, width)."""
        return self.net(clip_input(x, self.net.config.image_size).to(self.net.dtype)).last_hidden_state


class SmallPrior(nn.Module):
    """The tiny run's stand-in for it: log-energies, in 4x4 regions, of learned filters on second differences,
    which show what a codec did, not brightness. Trained along, and to tell tasks apart, as DA-CLIP was."""

    def __init__(self, tasks: int):
        super().__init__()
        c = self.width = 16
        self.fine = nn.Conv2d(9, c, 5, padding=2, bias=False)
        self.coarse = nn.Conv2d(c, c, 5, 2, padding=2, bias=False)
        self.out = nn.Sequential(nn.LayerNorm(2 * c), nn.Linear(2 * c, c), nn.GELU(), nn.Linear(c, c))
        self.head = nn.Linear(c, tasks)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> dp (B, 16, width)."""
        x = F.pad(x.to(self.fine.weight.dtype), (1, 1, 1, 1), "replicate")
        across = 2 * x[..., 1:-1, 1:-1] - x[..., 1:-1, :-2] - x[..., 1:-1, 2:]
        down = 2 * x[..., 1:-1, 1:-1] - x[..., :-2, 1:-1] - x[..., 2:, 1:-1]
        fine = self.fine(4 * torch.cat([across, down, across - down], 1))
        energy = [F.adaptive_avg_pool2d(f.square(), 4) for f in (fine, self.coarse(F.silu(fine)))]
        return self.out((torch.cat(energy, 1) + 1e-5).log().flatten(2).transpose(1, 2))


class Visual2Text(nn.Module):
    """Sec. 3.3: quality enhancer (transformer blocks on patches of 16, adding to the picture), CLIP's image
    encoder, and the adapter: an MLP over channels and one over tokens. Its output is added to the empty
    caption's tokens, and starts at zero (ours): training starts from SD with an empty prompt."""

    def __init__(self, cfg: Stage1, L: int, D: int, weights: bool = True):
        super().__init__()
        self.clip = clip_encoder(cfg.v2t, "--clip", weights)
        c, d, self.size = cfg.width, self.clip.config.hidden_size, self.clip.config.image_size
        side = 8 if cfg.v2t == "small" else 16
        self.patch = nn.Conv2d(3, c, side, side)
        self.position = nn.Parameter(torch.randn(1, (self.size // side) ** 2, c) * 0.02)
        self.enhance = nn.Sequential(*(transformer_block(c, cfg.heads) for _ in range(cfg.enhancer)))
        self.unpatch = zero_init(nn.ConvTranspose2d(c, 3, side, side))
        self.channels = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, D), nn.GELU(), nn.Linear(D, D))
        tokens = (self.size // self.clip.config.patch_size) ** 2
        self.tokens = nn.Sequential(nn.Linear(tokens, L), nn.GELU(), zero_init(nn.Linear(L, L)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> (B, L, D), to be added to the empty caption's tokens."""
        x = clip_input(x, self.size).to(self.position.dtype)
        f = self.patch(x)
        size, f = f.shape[2:], self.enhance(f.flatten(2).transpose(1, 2) + self.position)
        x = x + self.unpatch(f.transpose(1, 2).unflatten(2, size))
        tokens = self.channels(self.clip(x).last_hidden_state[:, 1:])  # without the class token
        return self.tokens(tokens.transpose(1, 2)).transpose(1, 2)


class ResidualBlock(nn.Module):
    """x + Conv(SiLU(Conv(SiLU(x))))."""

    def __init__(self, c: int):
        super().__init__()
        self.body = nn.Sequential(nn.SiLU(), nn.Conv2d(c, c, 3, 1, 1), nn.SiLU(), nn.Conv2d(c, c, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def forward_hooks(*pairs) -> ExitStack:
    """(module, hook)s, removed at the end of the `with` that they are for."""
    stack = ExitStack()
    for module, hook in pairs:
        stack.enter_context(module.register_forward_hook(hook))
    return stack


class Compensator(nn.Module):
    """Fig. 3d: the VAE decoder with, at some of its levels, a residual from its features and the encoder's of
    the compressed image, zero at first; as in StableSR's controllable feature wrapping (ours), weight w too.
    Features come in and residuals go out in units of their channels' deviations over training pictures: those
    differ by orders of magnitude, and normalising each picture by itself would set crops and wholes apart."""

    def __init__(self, widths: list[int], cfg: Stage2):
        """`widths`: the VAE's, full size first; a decoder ends at full size."""
        super().__init__()
        self.fuse = nn.ModuleList()
        for i, c in enumerate(widths[:cfg.levels][::-1]):
            hidden = max(c, 32)
            self.fuse.append(nn.Sequential(
                nn.Conv2d(2 * c, hidden, 3, padding=1), *(ResidualBlock(hidden) for _ in range(cfg.blocks)),
                nn.SiLU(), zero_init(nn.Conv2d(hidden, c, 3, padding=1))))
            self.register_buffer(f"mean{i}", torch.zeros(2 * c, 1, 1))
            self.register_buffer(f"std{i}", torch.ones(2 * c, 1, 1))

    def residual(self, i: int, e: Tensor, h: Tensor) -> Tensor:
        """Level i: encoder's and decoder's features (B, c, h, w) -> what is added to the latter."""
        mean, std = getattr(self, f"mean{i}"), getattr(self, f"std{i}")
        return std[h.shape[1]:] * self.fuse[i]((torch.cat([e.to(h.dtype), h], 1) - mean) / std)

    def at_levels(self, sd: SD, features: list[Tensor], work):
        """Within it work(i, e, h) sees the decoder's features h of each level i that is compensated, and the
        encoder's e of the same size; what it returns, if anything, takes h's place."""
        n = len(self.fuse)
        layers = [block.resnets[-1] for block in sd.vae.decoder.up_blocks][-n:]
        hooks = (lambda _, args, h, i=i, e=e: work(i, e, h) for i, e in enumerate(features[:n][::-1]))
        return forward_hooks(*zip(layers, hooks))

    def forward(self, sd: SD, z_0: Tensor, features: list[Tensor], w: float = 1.0) -> Tensor:
        with self.at_levels(sd, features, lambda i, e, h: h + w * self.residual(i, e, h)):
            return sd.decode(z_0)

    def measure_units(self, sd: SD, z: Tensor, features: list[Tensor]) -> None:
        """Sets the units from some pictures' latents and features."""
        def measure(i, e, h):
            std, mean = torch.std_mean(torch.cat([e, h], 1).float(), (0, 2, 3), keepdim=True)
            getattr(self, f"mean{i}").copy_(mean[0])
            getattr(self, f"std{i}").copy_(std[0].clamp(min=1e-3))  # a channel may never change
        with self.at_levels(sd, features, measure):
            sd.decode(z)


def diffuse(z: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """z noised to alpha_bar, a scalar or (B,)."""
    a = alpha_bar.to(z.device).view(-1, 1, 1, 1)
    return a.sqrt() * z + (1 - a).sqrt() * noise


class MoEDiffIR(nn.Module):
    """Frozen Stable Diffusion, the modules that stage 1 trains around it, stage 2's compensator, if any."""

    def __init__(self, base: str | Path, cfg: Stage1, empty: Tensor, tasks: int, cfg2: Stage2 | None = None,
                 weights: bool = True):
        """`empty` (L, D_text): the empty caption's tokens; `tasks`: how many the small prior tells apart."""
        super().__init__()
        self.base, self.sd, self.cfg = base, SD(base, weights=weights), cfg
        self.cell, self.multiple = self.sd.f, self.sd.multiple
        unet, vae = self.sd.unet.config, self.sd.vae.config
        self.prior = None
        if cfg.prompt == "moe" and cfg.dp != "none":
            self.prior = SmallPrior(tasks) if cfg.dp == "small" else Prior(cfg.dp, weights)
        dp_width = self.prior.width if self.prior else None
        self.module = MoEPromptModule(cfg, vae.latent_channels, unet.block_out_channels, dp_width)
        self.spade = nn.ModuleList(SPADE(unet.block_out_channels[i], conv2.out_channels, cfg.width,
                                         unet.norm_num_groups) for i, conv2 in self.branches())
        self.v2t = Visual2Text(cfg, *empty.shape, weights) if cfg.v2t != "none" else None
        self.register_buffer("empty", empty)
        self.compensator = Compensator(vae.block_out_channels, cfg2) if cfg2 else None

    def text(self, x_lq: Tensor) -> Tensor:
        """c (B, L, D_text)."""
        c = self.empty.expand(len(x_lq), -1, -1)
        return c if self.v2t is None else c + self.v2t(x_lq)

    def degradation_prior(self, x_lq: Tensor) -> Tensor | None:
        """dp, the mean over windows of the training crop's size that cover x_lq: reduced to the prior's input
        a larger picture would lose what a codec left in it."""
        size, (H, W) = self.cfg.crop, x_lq.shape[2:]
        ys, xs = (np.linspace(0, max(0, n - size), -(-n // size)).round().astype(int) for n in (H, W))
        windows = [x_lq[..., y:y + size, x:x + size] for y in ys for x in xs]
        return sum(map(self.prior, windows)) / len(windows) if self.prior else None

    def branches(self) -> list[tuple[int, nn.Module]]:
        """(scale, last layer of a residual branch) where StableSR has SPADE: the mid block's first ResBlock's
        and those of the up blocks."""
        up, mid = enumerate(reversed(self.sd.unet.up_blocks)), self.sd.unet.mid_block.resnets[0]
        scales = [(i, resnet.conv2) for i, block in up for resnet in block.resnets]
        return [*scales, (scales[-1][0], mid.conv2)]

    def modulation(self, features: list[Tensor]) -> ExitStack:
        """Within it skip(h) + branch(h) of these ResBlocks is skip(h) + SPADE(branch(h)) (Sec. 3.4)."""
        return forward_hooks(*((conv2, lambda _, args, h, spade=spade, i=i: spade(h, features[i]))
                               for spade, (i, conv2) in zip(self.spade, self.branches())))

    def denoise(self, z_t: Tensor, t: Tensor, z_lq: Tensor, dp: Tensor | None, c: Tensor,
                noise: Tensor | None = None, gates: list[Tensor] | None = None):
        """(the modulated UNet's output at timesteps t (B,), the gates)."""
        dtype = self.sd.unet.dtype
        features, gates = self.module(z_lq.to(dtype), t, dp, noise, gates)
        with self.modulation(features):
            return self.sd.unet(z_t.to(dtype), t, c).sample, gates

    def eps(self, z_t: Tensor, out: Tensor, alpha_bar: Tensor) -> Tensor:
        """The noise that the UNet's output implies, of v sqrt(alpha_bar) v + sqrt(1 - alpha_bar) z_t."""
        a, out = alpha_bar.view(-1, 1, 1, 1), out.float()
        return out if self.sd.prediction == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * z_t.float()

    def forward(self, z_t: Tensor, t: Tensor, z_lq: Tensor, x_lq: Tensor, noise: Tensor):
        """Training: (eps_hat, gates, the small prior's guess of the task or None)."""
        dp = self.degradation_prior(x_lq)
        out, gates = self.denoise(z_t, t, z_lq, dp, self.text(x_lq), noise)
        guess = self.prior.head(dp.mean(1)) if isinstance(self.prior, SmallPrior) else None
        return self.eps(z_t, out, self.sd.alpha_bar[t]), gates, guess

    def step(self, t: int, t_next: int | None, dp, c, gates: dict, z_t: Tensor, z_lq: Tensor) -> Tensor:
        """One call of the UNet: z_t -> z at t_next by DDIM (Song et al. 2021, eta = 0); the last: -> z_0."""
        times, alpha_bar = torch.full((len(z_t),), t, device=z_t.device), self.sd.alpha_bar
        out, gates[t] = self.denoise(z_t, times, z_lq, dp, c, gates=gates.get(t))
        z_0 = self.sd.x0(z_t, out, alpha_bar[t])
        if t_next is None:
            return z_0
        return diffuse(z_0, self.eps(z_t, out, alpha_bar[t]), alpha_bar[t_next])

    def sample(self, z_lq: Tensor, dp: Tensor | None, c: Tensor, steps: int, noise: Tensor,
               tiles=lambda step, *maps: step(*maps)) -> tuple[Tensor, dict[int, list[Tensor]]]:
        """(z_0, {t: gates}) in `steps` calls of the UNet: z_lq is noised to start_t, then DDIM over evenly
        spaced timesteps to 0. With one step it is the x0 prediction. Start "lq": z_lq gets no noise."""
        ts, gates = [round(self.cfg.start_t * (steps - i) / steps) for i in range(steps)], {}
        alpha_bar = self.sd.alpha_bar[self.cfg.start_t].to(z_lq.device)
        z = alpha_bar.sqrt() * z_lq if self.cfg.start == "lq" else diffuse(z_lq, noise, alpha_bar)
        for t, t_next in zip(ts, [*ts[1:], None]):
            # in tiles the mosaic goes first, and its gates are every window's
            z = tiles(functools.partial(self.step, t, t_next, dp, c, gates), z, z_lq)
        return z, gates

    def encode(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """(z, the VAE encoder's features of x before each downsampling and at the end)."""
        features: list[Tensor] = []
        last_layers = (block.resnets[-1] for block in self.sd.vae.encoder.down_blocks)
        with forward_hooks(*((layer, lambda _, args, h: features.append(h)) for layer in last_layers)):
            return self.sd.encode(x, noise), features


# ------------------------------------------------------------------------------------------- losses


def loss_sd(eps_hat: Tensor, eps: Tensor) -> Tensor:
    # Eq. 2
    return F.mse_loss(eps_hat.float(), eps)


class FeatureDistance(nn.Module):
    """In the place of LPIPS, for runs without network: squared distances of the features of `dists_small`'s
    random network, each stage in units of the original's variance. Its value is not LPIPS and is never called
    so. Stage 0, the picture itself, weighs most: features alone reward texture before there is fidelity."""

    def __init__(self):
        super().__init__()
        self.net = common.dists_small()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        stages = zip((1.0, 0.01, 0.01, 0.01), self.net.features(x), self.net.features(y))
        return sum(w * (p - q).square().mean((1, 2, 3)) / (q.var((1, 2, 3)) + 1e-3) for w, p, q in stages)


def lpips_vgg() -> nn.Module:
    import lpips
    common.dists_vgg16()  # has the same backbone, and says in one line where that is not to be had
    return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)


def loss_decoder(lpips: nn.Module, x_hat: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 4: L_lpips[z_lq, z_0, hr], x_hat being the compensated decoder's, of z_0 and x_lq's encoder features
    return lpips(x_hat, x_hq).mean()


# ------------------------------------------------------------------------------------------ stage 1


def stage1(run: Run, cfg: Stage1, benchmark: Benchmark) -> MoEDiffIR:
    """MoE-Prompt Module and Visual2Text adapter, all else frozen, Sec. 3.4. DIFFERS: the paper says "only the
    MoE-Prompt Module", but has no other stage for the adapter and its quality enhancer.
    DIFFERS: with start "lq", the tiny run's, z_t = sqrt(alpha_bar) z_lq at one t*, which one step restores;
    Eq. 2's eps is what makes z_0 that z_t. (One step cannot take out the noise that it was given.)"""
    torch.manual_seed(run.seed)
    model = MoEDiffIR(run.base, cfg, common.text_tokens(run.base, [""])[0], len(run.config["tasks"]))
    modules = {"UNet": model.sd.unet, "VAE": model.sd.vae, "MoE-Prompt Module": model.module,
               "SPADE": model.spade, "degradation prior": model.prior, "Visual2Text": model.v2t}
    acc = run.start(1, cfg, some_unused=cfg.v2t == "small", **{name: m for name, m in modules.items() if m})
    pairs = CIRPairs(benchmark, cfg, model.cell, run.seed)
    optimizer = torch.optim.Adam(model.parameters(), cfg.lr, betas=(0.9, 0.999))
    model, optimizer = acc.prepare(model, optimizer)
    model.train()
    sd = acc.unwrap_model(model).sd
    shape, router_shape = sd.latent_shape(cfg.crop), (len(sd.unet.config.block_out_channels), cfg.experts)
    for step, (n, x_lq, x_hq, task) in run.loop(pairs, {"model": model}, {"adam": optimizer}):
        with acc.accumulate(model):
            z_lq, z_0 = run.encode(sd, x_lq, n, 3), run.encode(sd, x_hq, n, 4)
            t = n.new_tensor([rng(run.seed, 5, i).integers(cfg.t_max + 1) for i in n.tolist()])
            eps = noise_for(n, shape, run.seed, 6)
            if cfg.start == "lq":
                t, a = torch.full_like(n, cfg.start_t), sd.alpha_bar[cfg.start_t]
                eps = (a / (1 - a)).sqrt() * (z_lq - z_0)  # (z_t - sqrt(a) z_0) / sqrt(1 - a)
            z_t = diffuse(z_0, eps, sd.alpha_bar[t])
            eps_hat, gates, guess = model(z_t, t, z_lq, x_lq, noise_for(n, router_shape, run.seed, 7))
            terms = {"sd": loss_sd(eps_hat, eps)}
            if guess is not None and cfg.lambda_dp:
                terms["dp"] = cfg.lambda_dp * F.cross_entropy(guess, task)
            loss = sum(terms.values())
            run.gradients(step, model, **terms)
            acc.backward(loss)
            run.update(model, optimizer, step)
        load = {f"load{i}.{e}@": share for i, g in enumerate(gates)  # of every expert, at every scale
                for e, share in enumerate((g > 0).float().mean(0))}
        run.log(**terms, loss=loss, **load)
    run.save(model)
    return acc.unwrap_model(model).eval()


def load_stage1(weights: Path, base: str | Path, cfg2: Stage2) -> MoEDiffIR:
    """The model as stage 1 of the run in the folder `weights` left it, with a new compensator. (Its file also
    holds the empty caption's tokens: restoring needs no text encoder.)"""
    tensors, header = read_model(weights, "moe_diffir", stage=1)
    empty = torch.zeros_like(tensors.get("empty", torch.zeros(1, 1)))
    model = MoEDiffIR(base, Stage1.read(header), empty, len(header["tasks"]))
    load_trained(model, tensors, weights)
    model.compensator = Compensator(model.sd.vae.config.block_out_channels, cfg2)
    return model


# ------------------------------------------------------------------------------------------ stage 2


class LatentPairs(CIRPairs):
    """Sample n -> (n, x_lq, x_hq, z_0), z_0 from the file that `cache_latents` made, if any."""
    latents: Path | None = None

    def __getitem__(self, n: int) -> tuple[int, Tensor, Tensor, Tensor]:
        n, x_lq, x_hq, _ = super().__getitem__(n)
        z_0 = np.load(self.latents, mmap_mode="r")[n] if self.latents else np.nan
        return n, x_lq, x_hq, torch.tensor(z_0)


@torch.no_grad()
def make_latents(model: MoEDiffIR, cfg: Stage2, n: Tensor, x_lq: Tensor, seed: int) -> Tensor:
    """z_0 (B, C, h, w) of samples n by stage 1's model, as `restore` makes it."""
    z_lq = model.encode(x_lq)[0].float()
    dp, c, noise = model.degradation_prior(x_lq), model.text(x_lq), noise_for(n, z_lq.shape[1:], seed, 8)
    return model.sample(z_lq, dp, c, cfg.sampling, noise)[0]


def cache_latents(run: Run, cfg: Stage2, model: MoEDiffIR, pairs: LatentPairs) -> Path:
    """The file of the first cfg.cache_latents samples' z_0. A row that is not made yet is NaN, so that a run
    killed at any moment goes on where it was; the name says what rows depend on beside the run."""
    files = zlib.crc32(str([(hq.name, dict(lqs).keys()) for hq, lqs in pairs.versions.items()]).encode())
    path = run.folder / "latents" / f"{cfg.cache_latents}-{cfg.crop}-{cfg.sampling}-{files:08x}.npy"
    acc = run.acc
    unmade = np.full((cfg.cache_latents, *model.sd.latent_shape(cfg.crop)), np.nan, np.float32)
    run.first(lambda: path.exists() or common.atomic(path, lambda tmp: np.save(tmp, unmade)))
    z_0 = np.load(path, mmap_mode="r+")
    own = torch.arange(len(z_0)).split(cfg.batch)[acc.process_index::acc.num_processes]
    todo = [rows for rows in map(Tensor.tolist, own) if np.isnan(z_0[rows]).any()]
    loader = torch.utils.data.DataLoader(pairs, batch_sampler=todo, num_workers=cfg.workers,
                                         worker_init_fn=common.leave_ctrl_c_to_the_parent)
    for n, x_lq, _, _ in tqdm(loader, "latents", unit="batch", disable=None if run.main else True):
        with acc.autocast():
            z_0[n.numpy()] = make_latents(model, cfg, n.to(acc.device), x_lq.to(acc.device), run.seed).cpu()
    acc.wait_for_everyone()
    return path


def stage2(run: Run, cfg: Stage2, benchmark: Benchmark) -> None:
    """The decoder compensator, all else frozen, Sec. 3.4."""
    torch.manual_seed(run.seed + 1)
    model = load_stage1(run.folder, run.base, cfg).requires_grad_(False)
    sd, compensator = model.sd, model.compensator.requires_grad_(True)
    lpips, name = (FeatureDistance(), "features") if cfg.lpips == "small" else (lpips_vgg(), "lpips")
    acc = run.start(2, cfg, **{"stage 1's model": model, "compensator": compensator})
    acc.print("loss:", "LPIPS-VGG" if name == "lpips" else "random features' distance, not the metric LPIPS")
    pairs = LatentPairs(benchmark, cfg, model.cell, run.seed + 1, cfg.cache_latents)
    model.to(acc.device).eval()
    lpips.to(acc.device)
    if cfg.cache_latents:
        pairs.latents = cache_latents(run, cfg, model, pairs)
    x_lq = torch.stack([pairs[n][1] for n in range(16)]).to(acc.device)  # the same in every process
    with torch.no_grad():
        compensator.measure_units(sd, *model.encode(x_lq))
    optimizer = torch.optim.Adam(compensator.parameters(), cfg.lr, betas=(0.9, 0.999))
    compensator, optimizer = acc.prepare(compensator, optimizer)
    for step, (n, x_lq, x_hq, z_0) in run.loop(pairs, {"compensator": compensator}, {"adam": optimizer}):
        with acc.accumulate(compensator):
            with torch.no_grad(), acc.autocast():
                _, features = model.encode(x_lq)
                if not cfg.cache_latents:
                    z_0 = make_latents(model, cfg, n, x_lq, run.seed)
            x_hat = compensator(sd, z_0, features).clamp(-1, 1)
            loss = loss_decoder(lpips, x_hat, x_hq)
            run.gradients(step, compensator, **{name: loss})
            acc.backward(loss)
            run.update(compensator, optimizer, step)
        run.log(**{name: loss})
    run.save(compensator, fingerprint=sd.fingerprint)


# --------------------------------------------------------------------------------------- inference


def load(weights: Path, base: str | None = None) -> MoEDiffIR:
    """The trained model of a run's folder, on the device at hand, ready for `restore`."""
    tensors, header = read_model(weights, "moe_diffir")
    cfg = Stage2.read(header)
    model = load_stage1(weights, base or header["base"], cfg)
    model.sd.check(header, weights)
    load_trained(model.compensator, tensors, weights)
    model.sampling, model.tasks = cfg.sampling, header["tasks"]
    return common.for_inference(model)


@torch.inference_mode()
def restore(model: MoEDiffIR, image: Image.Image, steps: int | None = None, fidelity: float = 1.0,
            tile: int | None = None) -> tuple[Image.Image, list[Tensor]]:
    """One compressed image, any size -> (its restored self, gates (N,) of every scale at the first timestep).
    The noise is the same every time. In tiles the gates are those of the mosaic that stands for all."""
    x_lq = to_tensor(image)[None].to(device())
    x, dp, c = pad_to(x_lq, model.cell), model.degradation_prior(x_lq), model.text(x_lq)
    tiles = Tiles(model, x, model.cell, tile, model.multiple)  # without `tile`, tiles(f, x) is f(x)
    encode = functools.lru_cache(1)(model.encode)  # without `tile`, decoding asks for the same x again
    z_lq = tiles(lambda x: encode(x)[0], x).float()
    noise = torch.randn(z_lq.shape, generator=torch_rng(0)).to(z_lq.device)
    z_0, gates_at = model.sample(z_lq, dp, c, steps or model.sampling, noise, tiles)
    x_hat = tiles(lambda z_0, x: model.compensator(model.sd, z_0, encode(x)[1], fidelity), z_0, x)
    gates = [g[0].float().cpu() for g in gates_at[model.cfg.start_t]]
    return to_image(x_hat[0, :, :image.height, :image.width]), gates


def sampling_options(args, model: MoEDiffIR, steps: list[int]) -> dict:
    """restore's options, checked."""
    for n in steps:
        model.cfg.check_steps("--steps", n)
    check("--fidelity", args.fidelity, 0, 1)
    return {"fidelity": args.fidelity, "tile": common.check_tile(args.tile, model.multiple)}


# ------------------------------------------------------------------------------------- command line


def train(args) -> None:
    from data import make_cir
    from data.results import evaluate
    cfg1, cfg2 = Stage1.of(args), Stage2.of(args)
    cfg1.check_steps("--s2-sampling", cfg2.sampling)
    caches = make_cir.caches_of(args.data or [PHOTOS / "train"], args.cache)
    tasks = make_cir.training_tasks(args.codecs, caches)
    make_cir.refuse_to_wait(caches, tasks)
    run = Run(args, "moe_diffir", SD21_BASE, cfg1, cfg2, tasks=[":".join(task) for task in tasks])
    run.first(make_cir.complete, caches, tasks)
    benchmark = make_cir.read(caches, tasks)
    if args.stage in ("1", "all"):
        model = stage1(run, cfg1, benchmark)
        if cfg1.start == "lq":  # one step's
            run.first(evaluate.print_latent_errors, model, args.val or [PHOTOS / "val"], tasks)
        del model
    if args.stage in ("2", "all"):
        stage2(run, cfg2, benchmark)
        run.evaluate("--lowest")


def model_flags(p) -> None:
    """Of restore and eval."""
    common.model_flags(p, "moe_diffir")
    p.add_argument("--fidelity", type=float, default=1.0, help="the compensator's weight, 0 to 1")


def restorer(args):
    """What restore does: image -> (restored image, remark)."""
    model = load(args.weights, args.base)
    steps = model.sampling if args.steps is None else args.steps
    options = sampling_options(args, model, [steps])
    return lambda image: (restore(model, image, steps, **options)[0], "")


def main(argv: list[str] | None = None) -> None:
    cli = CommandLine("moe_diffir.py", description="MoE-DiffIR: many codecs restored (arXiv 2407.10833)")
    p = cli.train(train, Stage1, Stage2)
    p.add_argument("--codecs", nargs="+", metavar="CODEC[:LEVEL]",
                   help="what to train on, besides what data.make_cir --pairs put into the cache")
    p.add_argument("--cache", type=Path, metavar="DIR",
                   help="for the compressed photographs (default: .cir-bench in each --data folder)")
    p.add_argument("--no-dp", dest="dp", action="store_const", const="none", help="Table 3: no prior DP")
    p.add_argument("--no-v2t", dest="clip", action="store_const", const="none", help="Table 3: empty prompt")
    p = cli.restore(restorer)
    model_flags(p)
    p.add_argument("--steps", type=int, help="calls of the UNet (default: as many as it was trained with)")
    cli.run(argv)


if __name__ == "__main__":
    common.run_cli(main)
