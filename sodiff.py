"""SODiff: Semantic-Oriented Diffusion Model for JPEG Compression Artifacts Removal (AAAI 2026, whose text is followed here;
arXiv 2508.07346).

    stage 1   I_L -> E_down -> F_mid -> D_up    -> I_rec   ~ I_H
                                    \\-> T_align -> e_img   ~ e_text = text encoder(LLaVA's caption of I_L)
    stage 2   I_L -> VAE enc -> z_L -> UNet (LoRA; t = tau, prompt e_img) -> eps -> Eq. 6 -> z_hat -> VAE dec -> x_hat
               |-> SAIPE (E_down, T_align; frozen) -> e_img
               \\-> time predictor -> QF_pred, tau

| paper        | code          | shape                | range                                                   |
| ------------ | ------------- | -------------------- | ------------------------------------------------------- |
| I_L, I_H     | x_lq, x_hq    | (B, 3, H, W)         | [-1, 1]; the JPEG and its original                      |
| F_mid        | f_mid         | (B, C, H / 4, W / 4) | features of the shared encoder                          |
| e_img, e_text | e_img, e_text | (B, 77, D_text)     | image prompt; the text encoder's last hidden state      |
| z_L, z_H     | z_L, z_hq     | (B, c, H / 8, W / 8) | latents of the JPEG and its original, scaled            |
| z_hat_H      | z_hat         | as z_L               | one-step estimate of z_H                                |
| l_i, g_i     | logits, g     | (B, T_max)           | the timesteps' logits; Gumbel noise, in training        |
| tau_pred     | tau           | (B,)                 | real timestep in [0, T_max - 1]                         |
| QF_pred      | qf_hat        | (B,)                 | predicted quality factor, about 5 to 95                 |

The authors have released no code: what the paper leaves open is settled here, where it says OURS or "ours".
Left out: the DAPE prompt of Table 2 (another project's network).

    python sodiff.py train                     # both stages on the bundled tiny-sd, then a table and a picture
    python sodiff.py restore photo.jpg -o photo.png
"""

from __future__ import annotations

import argparse
import json
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.transforms.functional import center_crop
from tqdm import tqdm

from common import (LORA_FILE, ROOT, SD, SD21_BASE, SD21_CONFIG, TINY_SD, Crops, Discriminator, Metrics, Parser, Run,
                    UserError, adain, add_eval, add_figures, add_lora, add_profile, add_restore, add_train, atomic, both,
                    device, dists_small, dists_vgg16, evaluate, fill, find_base, fingerprint, for_inference, frozen,
                    fuse_lora, gradient_norms, jpeg, layers, list_images, load_tensors, matplotlib, noise_for, note,
                    outputs, pad_to, paper_values, peak_memory, profile, read_image, read_json, read_model, restore_files,
                    rng, run_cli, save_lora, save_png, save_tensors, sobel, stage_config, text_encoder, text_table, text_tokens,
                    tile_size, tiled, to_image, to_tensor, token_ids, torch_rng, trainable, update, write_json)

# ------------------------------------------------------------------------------------ configurations


@dataclass
class Stage1:
    """SAIPE, Sec. 3.1."""
    #                           tiny run    paper run
    width: int           = both(48,         180,      "Sec. 3.1")
    heads: int           = both(6,          6,        "ours: SwinIR's")
    depth: int           = both(2,          6,        "ours: Swin layers in each of the two RSTBs; SwinIR's 6")
    features: int        = both(64,         256,      "ours: FAVOR+'s random features")
    pool_heads: int      = both(6,          16,       "ours: heads of the attention pooling")
    crop: int            = both(128,        512,      "Sec. 4.1")
    qf_min: int          = both(5,          5,        "Sec. 4.1")
    qf_max: int          = both(95,         95,       "Sec. 4.1")
    lambda_align: float  = both(0.5,        0.5,      "Sec. 4.1, Eq. 5; 0: Table 2's No Align", "lambda_align")
    lr: float            = both(1e-3,       2e-4,     "Sec. 4.1")
    decay: float         = both(0.5,        0.0,      "ours: last part of the run in which lr falls to 0")
    clip: float          = both(0.0,        0.0,      "ours: gradient norm; 0 clips nothing")
    batch: int           = both(4,          16,       "Sec. 4.1")
    steps: int           = both(300,        50_000,   "Sec. 4.1")
    accumulate: int      = both(1,          1,        "ours: micro-batches a step")
    workers: int         = both(0,          8,        "ours: loader processes")
    save_every: int      = both(100,        2000,     "ours")


LOSSES = ("mse", "ea", "gan")


@dataclass
class Stage2:
    """The one-step generator, its time predictor and its discriminator, Secs. 3.2 and 3.3."""
    #                           tiny run            paper run
    timestep: str        = both("predicted",        "predicted",           "Table 3; 'fixed': tau_0 for all", "timestep", ("predicted", "fixed"))
    tau_0: int           = both(49,                 499,                   "ours: where tau starts, or stays if fixed")
    spread: float        = both(5.0,                0.0,                   "ours: width of the bell that the logits start as; 0: flat")
    widths: tuple        = both((32, 64, 128, 256), (64, 128, 256, 512),   "ours: the predictor's residual blocks")
    highpass: float      = both(8.0,                0.0,                   "ours: gain of high-pass filters that the predictor starts with")
    rank: int            = both(16,                 16,                    "Sec. 4.1")
    crop: int            = both(128,                512,                   "Sec. 4.1")
    qf_min: int          = both(5,                  5,                     "Sec. 4.1")
    qf_max: int          = both(95,                 95,                    "Sec. 4.1")
    qf_power: float      = both(5.0,                1.0,                   "ours: QF = min + (max - min) u^power; 1: uniform, Sec. 4.1")
    qf_crops: int        = both(3,                  0,                     "ours: further crops a sample, QF uniform, that L_qf alone sees")
    losses: tuple        = both(LOSSES,             LOSSES,                "Table 4: the terms that count", "losses", LOSSES)
    dists: str           = both("small",            "vgg16",               "Eq. 7; 'small' needs no download", choices=("small", "vgg16"))
    lambda_EA: float     = both(0.002,              1.0,                   "Eq. 7")
    alpha: float         = both(1e-2,               1e-2,                  "Sec. 4.1, Eq. 12")
    beta: float          = both(1e-3,               1e-3,                  "Sec. 4.1, Eq. 12; 0: Table 3's w/o L_qf", "beta")
    lr: float            = both(2e-3,               1e-5,                  "Sec. 4.1")
    decay: float         = both(0.5,                0.0,                   "ours: last part of the run in which lr falls to 0")
    weight_decay: float  = both(1e-2,               1e-2,                  "ours: AdamW's own")
    clip: float          = both(0.0,                0.0,                   "ours: gradient norm; 0 clips nothing")
    batch: int           = both(2,                  2,                     "Sec. 4.1")
    steps: int           = both(420,                150_000,               "Sec. 4.1")
    accumulate: int      = both(1,                  1,                     "ours: micro-batches a step")
    checkpointing: bool  = both(False,              False,                 "ours: less memory, more time")
    workers: int         = both(0,                  8,                     "ours: loader processes")
    save_every: int      = both(100,                1000,                  "ours")


# --------------------------------------------------------------------------------------------- data


class JPEGPairs(Crops):
    """Sample n -> (n, x_lq, x_hq, qf, ...), a crop and its JPEG. With `captions` (stage 1) follow the caption's token
    ids, and where the caption comes with the QF at which LLaVA saw the crop, that is the QF. Else (stage 2) x_lq and qf
    of `qf_crops` further crops of half the size."""

    def __init__(self, folders, cfg: Stage1 | Stage2, multiple: int, seed: int, captions: dict | None = None):
        if cfg.crop % multiple:
            raise UserError(f"--s{cfg.__class__.__name__[-1]}-crop {cfg.crop}: must be a multiple of {multiple}")
        super().__init__(folders, cfg.crop, seed)
        self.cfg, self.captions = cfg, captions

    def __getitem__(self, n: int) -> tuple:
        row = self.captions[self.file(n)] if self.captions else {}
        qf = row.get("qf") or self.quality(getattr(self.cfg, "qf_power", 1), n)
        hq = Image.fromarray(self.crop(n))
        sample = n, to_tensor(jpeg(hq, qf)), to_tensor(hq), torch.tensor(float(qf))
        return (*sample, row["ids"]) if self.captions else (*sample, *self.more(n))

    def quality(self, power: float, *key: int) -> int:
        return self.cfg.qf_min + int((self.cfg.qf_max + 1 - self.cfg.qf_min) * rng(self.seed, 2, *key).random() ** power)

    def more(self, n: int) -> tuple[Tensor, Tensor]:
        k, side = self.cfg.qf_crops, self.cfg.crop // 2
        qfs = [self.quality(1, n, j) for j in range(k)]
        crops = [jpeg(Image.fromarray(self.crop(2**40 + n * k + j)[:side, :side]), qf) for j, qf in enumerate(qfs)]
        return torch.stack([to_tensor(c) for c in crops]) if k else torch.empty(0, 3, side, side), torch.tensor(qfs, dtype=torch.float32)


def read_captions(folders: list[Path]) -> dict[Path, dict]:
    """{image: {"caption": ..., "qf": ... or absent}} of every captions.jsonl in the folders, "file" relative to it."""
    rows = {}
    for path in (p for folder in folders if Path(folder).is_dir() for p in sorted(Path(folder).rglob("captions.jsonl"))):
        for i, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            try:
                row = json.loads(line)
                ok = isinstance(row["file"], str) and isinstance(row["caption"], str) and row.get("qf", 1) in range(1, 101)
            except (ValueError, TypeError, KeyError):
                ok = False
            if not ok:
                raise UserError(f'{path}, line {i}: not {{"file": ..., "caption": ..., "qf": 1 to 100}} as JSON; mend or delete that line '
                                "(if caption wrote it, run that again)")
            rows[path.parent / row["file"]] = row
    return rows


def tokenized(captions: dict[Path, dict], files: list[Path], tokenizer) -> dict[Path, dict]:
    """Every file's caption ("" where there is none), with "ids"; says what is missing and what is cut."""
    rows = {f: captions.get(f, {"caption": ""}) for f in files}
    texts = [r["caption"] for r in rows.values()]
    long = sum(len(ids) > tokenizer.model_max_length for ids in tokenizer(texts, verbose=False).input_ids)
    note(f"{len(files)} images, {sum(t == '' for t in texts)} without a caption (\"\" stands for it), {long} captions cut to "
         f"{tokenizer.model_max_length} tokens, {len(captions.keys() - rows.keys())} captions without their image")
    return {f: {**r, "ids": ids} for (f, r), ids in zip(rows.items(), token_ids(tokenizer, texts))}


# ----------------------------------------------------------------------------------- SAIPE, Sec. 3.1


class RSTB(nn.Module):
    """Residual Swin Transformer block (SwinIR): Swin layers of window 8, every second one shifted, and a convolution."""

    def __init__(self, c: int, heads: int, depth: int):
        super().__init__()
        self.swin = nn.Sequential(*[SwinTransformerBlock(c, heads, [8, 8], [4 * (i % 2)] * 2, mlp_ratio=2.0) for i in range(depth)])
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, f: Tensor) -> Tensor:
        return f + self.conv(self.swin(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))  # torchvision's layers are channels-last


class SharedEncoder(nn.Module):
    """E_down: (B, 3, H, W) in [-1, 1] -> F_mid (B, c, H / 4, W / 4). OURS: downsampling by pixel-unshuffle."""

    def __init__(self, c: int, heads: int, depth: int):
        super().__init__()
        self.head = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, c, 3, padding=1))
        self.body = nn.Sequential(RSTB(c, heads, depth), RSTB(c, heads, depth), nn.Conv2d(c, c, 3, padding=1))

    def forward(self, x_lq: Tensor) -> Tensor:
        f = self.head(x_lq)
        return f + self.body(f)


class ReconstructionDecoder(nn.Module):
    """D_up. OURS: one RSTB of two layers; it predicts what is to be added to I_L."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.body, self.norm = RSTB(c, heads, 2), nn.LayerNorm(c)
        self.tail = nn.Sequential(nn.Conv2d(c, 48, 3, padding=1), nn.PixelShuffle(4))

    def forward(self, f_mid: Tensor, x_lq: Tensor) -> Tensor:
        f = self.norm(self.body(f_mid).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x_lq + self.tail(f)


def orthogonal_features(m: int, d: int) -> Tensor:
    """m random directions in d dimensions, orthogonal in blocks of d, with the lengths of Gaussian vectors."""
    blocks = [q * r.diagonal().sign() for q, r in (torch.linalg.qr(torch.randn(d, d)) for _ in range(-(-m // d)))]
    # (without the signs a block's first vector would always lie in the same half of space)
    return torch.cat([q.T for q in blocks])[:m] * torch.randn(m, d).norm(dim=1, keepdim=True)


def favor(q: Tensor, k: Tensor, v: Tensor, omega: Tensor) -> Tensor:
    """FAVOR+ (Choromanski et al. 2021): softmax(q k^T / sqrt(d)) v, approximately, in time and memory linear in N.

    With phi(x) = exp(omega x - |x|^2 / 2) > 0 and Gaussian rows omega, E[phi(q) phi(k)] = exp(q k), so that phi(k)^T v can
    be summed over the N keys first. q, k, v: (B, heads, N, d); omega: (m, d), m random features."""
    with torch.autocast("cuda" if q.is_cuda else "cpu", enabled=False):  # exponentials: float32
        q, k, omega = (x.float() for x in (q, k, omega))

        def phi(x: Tensor, over: tuple[int, ...]) -> Tensor:
            x = x * x.shape[-1] ** -0.25
            h = x @ omega.T - x.square().sum(-1, keepdim=True) / 2  # (B, heads, N, m)
            return (h - h.amax(over, keepdim=True).detach()).exp() + 1e-6  # the maximum cancels below

        phi_q, phi_k = phi(q, (-1,)), phi(k, (-2, -1))
        weighted = phi_q @ (phi_k.transpose(-1, -2) @ v.float())
        return weighted / (phi_q @ phi_k.sum(-2).unsqueeze(-1))


class PerformerLayer(nn.Module):
    """A Transformer encoder layer, normalised first, with FAVOR+ for attention."""

    def __init__(self, c: int, heads: int, features: int):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        self.register_buffer("omega", orthogonal_features(features, c // heads))  # drawn once, kept with the weights

    def forward(self, x: Tensor) -> Tensor:  # (B, N, c)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(favor(q, k, v, self.omega).transpose(1, 2).flatten(2).to(x.dtype))
        return x + self.mlp(self.norm2(x))


class GuidanceEmbedder(nn.Module):
    """T_align: F_mid (B, c, h, w) -> e_img (B, tokens, d_text), shaped as the text encoder's output.

    OURS: all widths and depths, and the query added to what it attends to (as a Transformer decoder does), without
    which all tokens would start out equal."""

    def __init__(self, c: int, heads: int, features: int, pool_heads: int, tokens: int, d_text: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c))
        self.performer = nn.Sequential(*[PerformerLayer(c, heads, features) for _ in range(2)])
        self.scales = nn.ModuleList([nn.Sequential(nn.Conv2d(c, c, k, padding=k // 2, groups=c), nn.Conv2d(c, c, 1)) for k in (3, 5, 7)])
        self.queries = nn.Parameter(torch.randn(1, tokens, d_text) * 0.02)
        self.pool = nn.MultiheadAttention(d_text, pool_heads, kdim=c, vdim=c, batch_first=True)
        self.norm, self.out = nn.LayerNorm(d_text), nn.Linear(d_text, d_text)

    def forward(self, f_mid: Tensor) -> Tensor:
        # Eq. 2
        h, w = f_mid.shape[2:]
        f = self.performer(self.mlp(f_mid.flatten(2).transpose(1, 2)))  # (B, h w, c)
        f = f.transpose(1, 2).unflatten(2, (h, w))
        f = sum(conv(f) for conv in self.scales).flatten(2).transpose(1, 2)
        q = self.queries.expand(len(f), -1, -1)
        return self.out(self.norm(q + self.pool(q, f, f, need_weights=False)[0]))


class SAIPE(nn.Module):
    """Semantic-aligned image prompt extractor, Fig. 2, as stage 1 trains it."""

    def __init__(self, cfg: Stage1, tokens: int, d_text: int):
        super().__init__()
        self.E_down = SharedEncoder(cfg.width, cfg.heads, cfg.depth)
        self.T_align = GuidanceEmbedder(cfg.width, cfg.heads, cfg.features, cfg.pool_heads, tokens, d_text)
        self.D_up = ReconstructionDecoder(cfg.width, cfg.heads)

    def forward(self, x_lq: Tensor) -> tuple[Tensor, Tensor]:
        """(I_rec (B, 3, H, W), e_img (B, tokens, d_text)); sides of x_lq are multiples of 4."""
        # Eq. 1
        f_mid = self.E_down(x_lq)
        return self.D_up(f_mid, x_lq), self.T_align(f_mid)


# -------------------------------------------------------------------------- time predictor, Sec. 3.3


class ResidualBlock(nn.Module):
    """OURS: stride 2, each channel normalised on its own map: how sparse fine detail is tells QF, however much there is."""

    def __init__(self, c_in: int, c: int):
        super().__init__()
        self.res = nn.Sequential(nn.Conv2d(c_in, c, 3, 2, 1), nn.GroupNorm(c, c), nn.ReLU(),
                                 nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(c, c))
        self.skip = nn.Conv2d(c_in, c, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.res(x))


class TimePredictor(nn.Module):
    """I_L (B, 3, H, W) in [-1, 1] -> (QF_pred (B,), logits (B, T_max)): four residual blocks, shared average pooling
    and two linear branches. OURS: the logits start the same for all images, all zero (tau = (T_max - 1) / 2), or with
    `spread` as a bell of that deviation around tau_0. In the tiny run six filters a colour start as second differences,
    times `highpass`: QF shows in fine detail, which random filters drown in brightness."""

    def __init__(self, widths: tuple[int, ...], T_max: int, tau_0: int, spread: float, highpass: float):
        super().__init__()
        self.blocks = nn.Sequential(*[ResidualBlock(a, b) for a, b in zip((3, *widths), widths)])
        self.qf, self.logits = nn.Linear(widths[-1], 1), nn.Linear(widths[-1], T_max)
        nn.init.constant_(self.qf.bias, 0.5)
        nn.init.zeros_(self.logits.weight)
        self.logits.bias.data = -((torch.arange(T_max) - tau_0) / spread).square() / 2 if spread else torch.zeros(T_max)
        if highpass:
            d2, one, first = torch.tensor([-1.0, 2.0, -1.0]), torch.tensor([0.0, 1.0, 0.0]), self.blocks[0].res[0].weight.data
            kernels = highpass * torch.stack([torch.outer(d2, d2) / 4, torch.outer(one, d2) / 2, torch.outer(d2, one) / 2])
            kernels = torch.cat([kernels, -kernels])  # ReLU passes one sign of each
            first[:18] = torch.einsum("kyx,co->kcoyx", kernels, torch.eye(3)).flatten(0, 1)[:len(first)]

    def forward(self, x_lq: Tensor) -> tuple[Tensor, Tensor]:
        h = self.blocks(x_lq).mean((2, 3))
        return 100 * self.qf(h)[:, 0], self.logits(h)


def expected_timestep(logits: Tensor, g: Tensor | None = None) -> Tensor:
    """tau (B,) in [0, T_max - 1], differentiable. OURS: without noise at inference, which makes it deterministic."""
    # Eq. 11
    logits = logits.float() if g is None else logits.float() + g
    return (logits.softmax(1) * torch.arange(logits.shape[1], device=logits.device)).sum(1)  # autocast would do a matmul in bf16


def gumbel_for(n: Tensor, T_max: int, *key: int) -> Tensor:
    """g (B, T_max) ~ Gumbel(0, 1), row i a function of (*key, n[i])."""
    u = torch.stack([torch.rand(T_max, generator=torch_rng("cpu", *key, i)) for i in n.tolist()])
    return -(-u.log()).log().to(n.device)


# ------------------------------------------------------------------------------ generator, Sec. 3.2


class SODiff(nn.Module):
    """The one-step generator, without LoRA: `train_lora` adds it, `load` fuses it. `predictor` None: tau_0 for all."""

    def __init__(self, base: Path, E_down: SharedEncoder, T_align: GuidanceEmbedder, cfg: Stage2, weights: bool = True):
        super().__init__()
        self.base, self.tau_0, self.sd = base, cfg.tau_0, SD(base, weights=weights)
        self.E_down, self.T_align = E_down.requires_grad_(False), T_align.requires_grad_(False)
        T_max = len(self.sd.alpha_bar)
        if not 0 <= cfg.tau_0 < T_max:
            raise UserError(f"--s2-tau-0 {cfg.tau_0}: the base's timesteps are 0 to {T_max - 1}")
        self.predictor = TimePredictor(cfg.widths, T_max, cfg.tau_0, cfg.spread, cfg.highpass) if cfg.timestep == "predicted" else None
        self.multiple = self.sd.multiple

    def train_lora(self, rank: int) -> None:
        """LoRA on all attention, feed-forward and convolution layers of the UNet, Sec. 4.1; the VAE stays frozen."""
        add_lora(self.sd.unet, rank, layers(self.sd.unet, without="time_emb"))

    def condition(self, x_lq: Tensor, g: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """(e_img (B, 77, D_text), QF_pred (B,) or None, tau (B,)) of the picture."""
        x_lq = x_lq.to(self.sd.vae.dtype)
        e_img = self.T_align(self.E_down(x_lq))
        if self.predictor is None:
            return e_img, None, x_lq.new_full((len(x_lq),), self.tau_0, dtype=torch.float32)
        qf_hat, logits = self.predictor(x_lq)
        return e_img, qf_hat.float(), expected_timestep(logits, g)

    def denoise(self, z_L: Tensor, e_img: Tensor, tau: Tensor) -> Tensor:
        eps = self.sd.unet(z_L.to(self.sd.unet.dtype), tau, e_img).sample
        # Eq. 6:  z_hat = (z_L - sqrt(1 - alpha_bar_tau) eps) / sqrt(alpha_bar_tau).  OURS: tau enters UNet and alpha_bar
        # as a real number (alpha_bar interpolated in log-SNR), so that the loss can move it
        return self.sd.x0(z_L, eps, tau)

    def generate(self, x_lq: Tensor, e_img: Tensor, tau: Tensor, noise: Tensor | None = None,
                 run=lambda stage, *maps: stage(*maps)) -> tuple[Tensor, Tensor]:
        """x_lq, sides multiples of `multiple` -> (x_hat, z_hat). `run` lets `common.tiled` cut the stages into windows."""
        z_L = run(lambda x: self.sd.encode(x, noise), x_lq)
        z_hat = run(lambda z: self.denoise(z, e_img, tau), z_L)
        return run(self.sd.decode, z_hat).clamp(-1, 1), z_hat

    def forward(self, x_lq: Tensor, noise: Tensor, g: Tensor, x_more: Tensor) -> tuple[Tensor, ...]:
        """(x_hat, z_hat, e_img, QF_pred of x_lq and x_more, tau), as training needs them."""
        e_img, qf_hat, tau = self.condition(x_lq, g)
        if self.predictor and len(x_more):
            qf_hat = torch.cat([qf_hat, self.predictor(x_more)[0].float()])
        return *self.generate(x_lq, e_img, tau, noise), e_img, qf_hat, tau


# ------------------------------------------------------------------------------------------- losses


def loss_rec(x_rec: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 3, on [0, 1]
    return F.l1_loss((x_rec + 1) / 2, (x_hq + 1) / 2)


def loss_align(e_img: Tensor, e_text: Tensor) -> Tensor:
    # Eq. 4
    return F.mse_loss(e_img, e_text)


def loss_mse(x_hat: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 7, first term, on [0, 1]
    return F.mse_loss((x_hat + 1) / 2, (x_hq + 1) / 2)


def loss_ea(dists: nn.Module, x_hat: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 7, L_EA: DISTS of the edges (Sobel magnitude of the luma) and of the pictures
    return (dists(sobel(x_hat), sobel(x_hq)) + dists(x_hat, x_hq)).mean()


def loss_G(logits_fake: Tensor) -> Tensor:
    # Eq. 8: -log sigmoid(D(F(z_hat, t))) = softplus(-D(F(z_hat, t)))
    return F.softplus(-logits_fake).mean()


def loss_D(logits_fake: Tensor, logits_real: Tensor) -> Tensor:
    # Eq. 9: -log(1 - sigmoid(D(F(z_hat, t)))) - log sigmoid(D(F(z_H, t)))
    return F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()


def loss_qf(qf_hat: Tensor, qf: Tensor) -> Tensor:
    # Eq. 10, in units of QF: there beta = 1e-3 makes it as large as the other terms
    return F.l1_loss(qf_hat, qf)


# ------------------------------------------------------------------------------------------ stage 1


def stage1(run: Run, cfg: Stage1, base: Path, data: list[Path], seed: int) -> None:
    """SAIPE: reconstruction, and alignment with the caption's embedding by the base's own text encoder, Sec. 3.1.
    With lambda_align = 0 (Table 2) T_align waits for stage 2, and no captions are needed."""
    pairs, captions = JPEGPairs(data, cfg, 8, seed), read_captions(data)
    if cfg.lambda_align and not captions:
        raise UserError(f"--data {' '.join(map(str, data))}: no captions.jsonl, which L_align needs; make one with `sodiff.py caption`, "
                        "or train with --lambda-align 0")
    torch.manual_seed(seed)
    tokenizer, encoder = text_encoder(base)
    saipe = SAIPE(cfg, tokenizer.model_max_length, encoder.config.hidden_size)
    saipe.T_align.requires_grad_(cfg.lambda_align > 0)
    acc = run.start(1, cfg, E_down=saipe.E_down, T_align=saipe.T_align, D_up=saipe.D_up, **{"text encoder": encoder})
    pairs.captions = captions = tokenized(captions, pairs.files, tokenizer)
    optimizer = torch.optim.Adam(trainable(saipe), cfg.lr)
    saipe, optimizer = acc.prepare(saipe, optimizer)
    saipe.train(), encoder.to(acc.device)
    for step, (n, x_lq, x_hq, _, ids) in run.loop(pairs, {"saipe": saipe}, {"adam": optimizer}):
        with acc.accumulate(saipe):
            x_rec, e_img = saipe(x_lq)
            with torch.no_grad():
                e_text = encoder(ids)[0]
            l_rec = loss_rec(x_rec, x_hq)
            l_align = loss_align(e_img, e_text)
            # Eq. 5
            loss = l_rec + cfg.lambda_align * l_align
            if step == 0:
                terms = {"rec": l_rec, "align": cfg.lambda_align * l_align} if cfg.lambda_align else {"rec": l_rec}
                acc.print("step 1: " + "  ".join(f"{k} {v:.3g}" for k, v in gradient_norms(terms, trainable(saipe)).items()))
            acc.backward(loss)
            update(acc, saipe, optimizer, cfg, step)
        run.log(rec=l_rec, align=l_align, loss=loss)
    if acc.is_main_process:
        saipe = acc.unwrap_model(saipe)
        save_tensors(run.model / "stage1.safetensors", saipe.state_dict(), config=asdict(cfg))
        if cfg.lambda_align:
            report_alignment(saipe.eval(), base, captions, "training")
    acc.wait_for_everyone()  # stage 2 reads that file


def load_saipe(model: Path) -> tuple[SAIPE, Stage1]:
    """SAIPE as stage 1 left it, without D_up, which nothing else needs."""
    path = model / "stage1.safetensors"
    tensors, header = load_tensors(path)
    if "T_align.queries" not in tensors:
        raise UserError(f"{path}: not a SAIPE checkpoint of sodiff.py")
    cfg = Stage1(**header["config"])
    saipe = SAIPE(cfg, *tensors["T_align.queries"].shape[1:])
    del saipe.D_up
    fill(saipe, tensors, saipe.state_dict(), path)
    return saipe.eval(), cfg


@torch.inference_mode()
def prompts(model: SAIPE | SODiff, images: list[Image.Image]) -> Tensor:
    """e_img (N, 77, D_text) of pictures."""
    e_img = [model.T_align(model.E_down(pad_to(to_tensor(i)[None], 8).to(device(), model.T_align.queries.dtype))) for i in images]
    return torch.cat(e_img).float().cpu()


@torch.inference_mode()
def alignment(e_img: Tensor, e_text: Tensor) -> tuple[float, float]:
    """Mean cosine of each e_img (N, 77, D) with its own caption's e_text, and with the N - 1 others'."""
    cosines = F.normalize(e_img.flatten(1), dim=1) @ F.normalize(e_text.flatten(1), dim=1).T
    own = cosines.diagonal().mean().item()
    return own, ((cosines.sum() - cosines.trace()) / (len(cosines) * (len(cosines) - 1))).item()


def captioned(captions: dict[Path, dict], limit: int = 64) -> tuple[list[Image.Image], list[str]]:
    """(pictures' central 256x256 pixels, captions), no caption twice: what alignment is measured on."""
    images: dict[str, Image.Image] = {}
    for file, row in captions.items():
        if row["caption"] and row["caption"] not in images and len(images) < limit:
            with suppress(UserError):  # training has named it
                image = read_image(file)[0]
                images[row["caption"]] = center_crop(image, [min(256, image.height), min(256, image.width)])
    return list(images.values()), list(images)


def report_alignment(model: SAIPE | SODiff, base: Path, captions: dict[Path, dict], which: str) -> dict:
    """Prints and returns the cosines at three QFs, if there are two different captions to compare."""
    images, texts = captioned(captions)
    if len(texts) < 2:
        return {}
    e_text = text_tokens(base, texts)
    rows = {f"QF {qf}": alignment(prompts(model, [jpeg(i, qf) for i in images]), e_text) for qf in (5, 20, 80)}
    print(f"\ncosine of e_img, {len(texts)} {which} photographs\n" + text_table(["", "own e_text", "others'"], [[k, *v] for k, v in rows.items()]))
    return rows


# ------------------------------------------------------------------------------------------ stage 2


def stage2(run: Run, cfg: Stage2, base: Path, disc_base: Path, data: list[Path], seed: int) -> None:
    """The generator and its time predictor against the discriminator, SAIPE frozen, Secs. 3.2 and 3.3."""
    if not (run.model / "stage1.safetensors").exists():
        raise UserError(f"--stage 2: {run.model / 'stage1.safetensors'} is missing; run stage 1 first (train --stage 1)")
    torch.manual_seed(seed + 1)
    saipe, cfg1 = load_saipe(run.model)
    G = SODiff(base, saipe.E_down, saipe.T_align, cfg)
    G.train_lora(cfg.rank)
    G.T_align.requires_grad_(cfg1.lambda_align == 0)  # Table 2, No Align: T_align learns here
    D = Discriminator(disc_base, cfg.rank, given=G.sd.unet.config.cross_attention_dim, sd=G.sd)
    dists = dists_vgg16() if cfg.dists == "vgg16" else dists_small()
    if cfg.checkpointing:
        for m in (G.sd.unet, G.sd.vae, D.unet):
            m.enable_gradient_checkpointing()
    acc = run.start(2, cfg, **{"UNet + LoRA": G.sd.unet, "VAE": G.sd.vae, "E_down": G.E_down, "T_align": G.T_align,
                               "time predictor": G.predictor, "discriminator": D})
    acc.print("perceptual loss: " + ("DISTS (VGG16)" if cfg.dists == "vgg16" else
                                     "DISTS' terms on a small random network (no download; not the metric DISTS)"))
    pairs = JPEGPairs(data, cfg, G.multiple, seed + 1)
    opt_G, opt_D = (torch.optim.AdamW(trainable(m), cfg.lr, weight_decay=cfg.weight_decay) for m in (G, D))
    G, D, opt_G, opt_D = acc.prepare(G, D, opt_G, opt_D)
    G.train(), D.train(), dists.to(acc.device)
    critic, sd = acc.unwrap_model(D), acc.unwrap_model(G).sd
    w = {term: float(term in cfg.losses) for term in LOSSES}  # Table 4; 1 each by default
    shape = (sd.vae.config.latent_channels, cfg.crop // sd.f, cfg.crop // sd.f)
    T, T_max = len(critic.alpha_bar), len(sd.alpha_bar)

    for step, (n, x_lq, x_hq, qf, x_more, qf_more) in run.loop(pairs, {"G": G, "D": D}, {"opt_G": opt_G, "opt_D": opt_D}):
        with acc.accumulate(G, D):
            x_hat, z_hat, e_img, qf_hat, tau = G(x_lq, noise_for(n, shape, seed, 3), gumbel_for(n, T_max, seed, 5), x_more.flatten(0, 1))
            l_mse = loss_mse(x_hat, x_hq)
            l_ea = loss_ea(dists, x_hat, x_hq)
            l_qf = l_mse.new_zeros(()) if qf_hat is None else loss_qf(qf_hat, torch.cat([qf, qf_more.flatten()]))
            e_img = e_img.detach()
            with frozen(critic):  # until after backward: checkpointing runs the critic's forward again there
                t = random_timesteps(n, T, seed, 6)
                l_G = loss_G(critic(z_hat, t, e_img, noise_for(n, shape, seed, 7)))
                # Eq. 12, with Eq. 7's L_recon = L_MSE + L_EA
                loss = w["mse"] * l_mse + w["ea"] * cfg.lambda_EA * l_ea + w["gan"] * cfg.alpha * l_G + cfg.beta * l_qf
                if step == 0:
                    terms = {"mse": l_mse, "ea": cfg.lambda_EA * l_ea, "gan_g": cfg.alpha * l_G} | ({} if qf_hat is None else {"qf": cfg.beta * l_qf})
                    acc.print("step 1: " + "  ".join(f"{k} {v:.3g}" for k, v in gradient_norms(terms, trainable(G)).items()))
                acc.backward(loss)
            update(acc, G, opt_G, cfg, step)

            with torch.no_grad(), acc.autocast():
                z_hq = sd.encode(x_hq, noise_for(n, shape, seed, 4)).float()
            t, noise = random_timesteps(n, T, seed, 8), (noise_for(n, shape, seed, key) for key in (9, 10))
            fake, true = D(torch.cat([z_hat.detach(), z_hq]), torch.cat([t, t]), torch.cat([e_img, e_img]), torch.cat([*noise])).chunk(2)
            l_D = loss_D(fake, true)
            acc.backward(l_D)
            update(acc, D, opt_D, cfg, step)
        run.log(mse=l_mse, ea=l_ea, gan_g=l_G, gan_d=l_D, qf=l_qf, tau=tau.mean(), loss=loss)

    if acc.is_main_process:
        G = acc.unwrap_model(G)
        save_lora(G.sd.unet, run.model / "unet_lora")
        save_tensors(run.model / "stage2.safetensors", own_tensors(G))
        write_json(run.model / "config.json", {"script": "sodiff", "base": str(base), "base_sha256": fingerprint(base),
                                               "disc_base": str(disc_base), "stage2": asdict(cfg)})


def random_timesteps(n: Tensor, T: int, *key: int) -> Tensor:
    """t (B,) uniform in 0..T - 1, entry i a function of (*key, n[i])."""
    return torch.tensor([int(rng(*key, i).integers(T)) for i in n.tolist()], device=n.device)


def own_tensors(G: SODiff) -> dict[str, Tensor]:
    """The weights that stage 2 trains besides LoRA: the time predictor; T_align, where it waited for stage 2."""
    return {k: v for k, v in G.state_dict().items() if k.startswith("predictor.") or k.startswith("T_align.") and G.T_align.queries.requires_grad}


# ------------------------------------------------------------------------------- one-step inference


def load(weights: Path, base: str | None = None) -> SODiff:
    """The trained generator of a run's folder, LoRA fused, on the device at hand, ready for `restore`."""
    (config, folder), model = read_model(weights, "sodiff", base), weights / "model"
    saipe, cfg1 = load_saipe(model)
    G = SODiff(folder, saipe.E_down, saipe.T_align, Stage2(**config["stage2"]))
    G.T_align.requires_grad_(cfg1.lambda_align == 0)
    fuse_lora(G.sd.unet, load_tensors(model / "unet_lora" / LORA_FILE)[0], model / "unet_lora" / LORA_FILE)
    fill(G, load_tensors(model / "stage2.safetensors")[0], own_tensors(G), model / "stage2.safetensors")
    return for_inference(G)


@torch.inference_mode()
def restore(model: SODiff, image: Image.Image, color_fix: str = "none", tile: int | None = None) -> tuple[Image.Image, float | None, float]:
    """One JPEG-compressed image, any size -> (its restored self, predicted QF, timestep): one UNet call, no noise drawn.
    e_img, QF and tau are the whole picture's; in tiles, those of the mosaic that stands for it."""
    kept = []

    def generate(x: Tensor, run) -> Tensor:
        if not kept:
            kept.append(model.condition(x))
        e_img, _, tau = kept[0]
        return model.generate(x, e_img, tau, run=run)[0]

    x_lq = to_tensor(image)[None]
    x_hat, mosaic = tiled(generate, model.sd, pad_to(x_lq, model.multiple), model.multiple, tile)
    x_hat = x_hat[:, :, :image.height, :image.width].float()
    if color_fix == "adain":
        x_hat = adain(x_hat, *(mosaic or (x_hat, x_lq.to(x_hat.device))))
    _, qf_hat, tau = kept[0]
    return to_image(x_hat[0]), None if qf_hat is None else qf_hat.clamp(1, 100).item(), tau.item()


# ------------------------------------------------------------------------------------------ caption


QUESTION = "Describe this image in one detailed sentence."


def caption_command(args) -> None:
    """Sec. 4.1: crops, and LLaVA's captions of their JPEGs, made before training. Writes OUT/NAME_0.png ... and a line a
    crop in OUT/captions.jsonl, {"file", "caption", "qf"}; what is there already is not made again."""
    for flag in ("crop", "per_image", "max_tokens", "batch"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be at least 1")
    files = [f for f in list_images(args.data) if args.out.resolve() not in f.resolve().parents]
    log, crops, roots, names = args.out / "captions.jsonl", Crops(args.data, args.crop, args.seed), [Path(d) for d in args.data], {}
    for file in files:
        root = next((r for r in roots if r in file.parents), file.parent)
        for k in range(args.per_image):
            name = f"{'_'.join(file.relative_to(root).parts)}_{k}.png"
            if name in names:
                raise UserError(f"--data: crops of {names[name]} and {file} would both be {name}; caption each folder into an --out of its own")
            names[name] = file
    done, bad = finished_captions(log), 0
    todo = [(file, name) for name, file in names.items() if name not in done]
    note(f"{len(names) - len(todo)} of {len(names)} crops have their caption already")
    describe = llava(args.model, args.max_tokens) if todo else None
    for i in tqdm(range(0, len(todo), args.batch), "caption", unit="batch", disable=None):
        rows, pictures = [], []
        for file, name in todo[i:i + args.batch]:
            photo = crops.read(file)
            if photo is None:
                bad += 1
                continue
            r = rng(args.seed, 11, zlib.crc32(name.encode()))  # of the name: other files in the folder change nothing
            y, x = (int(r.integers(side - args.crop + 1)) for side in photo.shape[:2])
            hq, qf = Image.fromarray(photo[y:y + args.crop, x:x + args.crop]), int(r.integers(5, 96))
            save_png(hq, args.out / name)
            rows.append({"file": name, "qf": qf}), pictures.append(jpeg(hq, qf))
        if rows:
            lines = [json.dumps({"file": row["file"], "caption": text, "qf": row["qf"]}) + "\n" for row, text in zip(rows, describe(pictures))]
            try:
                with open(log, "a") as f:
                    f.write("".join(lines))
            except OSError as error:
                raise UserError(f"{log}: cannot be written ({error.strerror}); mend that and run the same command again") from None
    print(f"{log}: {len(finished_captions(log))} captions")
    if bad:
        raise UserError(f"caption: {bad} crops of images that cannot be read were left out; the others are done")


def finished_captions(log: Path) -> set[str]:
    """The files that captions.jsonl names; a last line that a kill tore is removed."""
    if log.exists() and (text := log.read_text(errors="replace")) and not text.endswith("\n"):
        atomic(log, lambda tmp: tmp.write_text(text[:text.rfind("\n") + 1]))
    return {file.name for file in read_captions([log.parent])} if log.exists() else set()


def llava(model: str, max_tokens: int):
    """[pictures] -> [captions], by a LLaVA of transformers; greedy, so that the same picture has the same caption."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    try:
        processor = AutoProcessor.from_pretrained(model)
        net = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float16 if device().type == "cuda" else torch.float32)
    except Exception as error:
        raise UserError(f"--model {model}: cannot be loaded ({str(error).splitlines()[0][:120]}); give a folder or hub id of a LLaVA") from None
    net.eval().to(device())

    @torch.inference_mode()
    def describe(pictures: list[Image.Image]) -> list[str]:
        prompt = f"USER: <image>\n{QUESTION} ASSISTANT:"
        inputs = processor(images=pictures, text=[prompt] * len(pictures), return_tensors="pt").to(net.device, net.dtype)
        out = net.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    return describe


# -------------------------------------------------------------------------------- profile, figures


def parts(G: SODiff, x_lq: Tensor) -> dict[str, tuple[list[nn.Module], callable]]:
    """Inference's parts in order, {name: (modules, call)}, on inputs of x_lq's size."""
    vae, (h, w) = G.sd.vae, x_lq.shape[2:]
    x = x_lq.to(vae.dtype)
    z = x.new_zeros(1, vae.config.latent_channels, h // G.sd.f, w // G.sd.f)
    f_mid = x.new_zeros(1, G.E_down.head[1].out_channels, h // 4, w // 4)
    e_img = x.new_zeros(1, *G.T_align.queries.shape[1:])
    return {"SAIPE: E_down": ([G.E_down], lambda: G.E_down(x)),
            "SAIPE: T_align": ([G.T_align], lambda: G.T_align(f_mid)),
            "time predictor": ([G.predictor], lambda: G.predictor(x)),
            "VAE encoder": ([vae.encoder, vae.quant_conv], lambda: vae.encode(x)),
            "UNet": ([G.sd.unet], lambda: G.sd.unet(z, x.new_zeros(1), e_img)),
            "VAE decoder": ([vae.decoder, vae.post_quant_conv], lambda: vae.decode(z))}


def profile_command(args) -> None:
    """Parameters and MACs by part, time and memory. The paper has no such table."""
    base = find_base([args.base or (SD21_CONFIG if args.paper else TINY_SD)])
    cfg1, cfg2 = (paper_values(s) if args.paper else s() for s in (Stage1, Stage2))
    text = read_json(base / "text_encoder" / "config.json")

    def build(lora: bool) -> SODiff:
        saipe = SAIPE(cfg1, text["max_position_embeddings"], text["hidden_size"])
        G = SODiff(base, saipe.E_down, saipe.T_align, cfg2, weights=False)
        if lora:
            G.train_lora(cfg2.rank)
        return G
    profile(build, parts, args.size, args.time)


@torch.inference_mode()
def predictions(model: SODiff, files: list[Path], qfs: list[int]) -> tuple[Tensor, Tensor]:
    """Predicted QF and timestep (len(qfs), len(files)) of every file's JPEGs."""
    out = []
    photos = [read_image(f)[0] for f in files]
    for qf in tqdm(qfs, "predicted QF", leave=False, disable=None):
        x = (pad_to(to_tensor(jpeg(p, qf))[None], 32).to(device(), model.sd.vae.dtype) for p in photos)
        out.append([(qf_hat.item(), expected_timestep(logits).item()) for qf_hat, logits in map(model.predictor, x)])
    return torch.tensor(out).unbind(-1)


def report_predictions(model: SODiff, files: list[Path]) -> dict:
    """Prints and returns mean predicted QF and tau by true QF, and their rank correlations with it."""
    qfs = [5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95]
    qf_hat, tau = predictions(model, files, qfs)
    true = torch.tensor(qfs, dtype=torch.float32)[:, None].expand_as(qf_hat).flatten()
    rho = {name: spearman_corrcoef(v.flatten(), true).item() for name, v in (("QF", qf_hat), ("tau", tau))}
    means = {"predicted QF": qf_hat.mean(1).tolist(), "timestep": tau.mean(1).tolist()}
    print("\n" + text_table(["true QF", *map(str, qfs)], [[k, *(f"{v:.1f}" for v in vs)] for k, vs in means.items()]))
    print(f"rank correlation with the true QF ({len(true)} JPEGs): predicted QF {rho['QF']:.3f}, timestep {rho['tau']:.3f}")
    return {"true QF": qfs, **means, "rank correlation": rho}


def draw_fig3(plt, runs: dict[str, SODiff], images: list[Image.Image], e_text: Tensor):
    qfs, rows = (5, 10, 20, 40, 80), []
    figure, axes = plt.subplots(1, len(runs), figsize=(5.2 * len(runs), 4.4), squeeze=False, layout="constrained")
    for ax, (name, m) in zip(axes[0], runs.items()):
        e_img = torch.stack([prompts(m, [jpeg(i, qf) for i in images]) for qf in qfs])  # (QF, N, 77, D_text)
        flat = torch.cat([e_text.flatten(1), e_img.flatten(0, 1).flatten(1)])
        xy = (flat - flat.mean(0)) @ torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:2].T
        text_xy, img_xy = xy[:len(images)], xy[len(images):].unflatten(0, (len(qfs), -1))
        ax.scatter(*img_xy.flatten(0, 1).T, s=16, color="tab:blue", alpha=0.6, label="e_img (QF 5 to 80)")
        ax.scatter(*text_xy.T, s=28, color="tab:red", label="e_text")
        for a, b in zip(text_xy, img_xy.mean(0)):
            ax.plot(*torch.stack([a, b]).T, color="grey", linewidth=0.5)
        ax.set(title=name, xlabel="first principal component", ylabel="second")
        rows.append([name, *alignment(e_img.mean(0), e_text), (e_img.flatten(2).norm(dim=2).mean() / e_text.flatten(1).norm(dim=1).mean()).item()])
    axes[0, -1].legend(fontsize=8)
    print(text_table(["", "cosine, own e_text", "others'", "|e_img| / |e_text|"], rows))
    return figure


def figures_command(args) -> None:
    """Fig. 3: e_img and e_text in two dimensions (PCA; the paper takes UMAP), aligned and, from a second run, not.
    And predicted QF and timestep against the true QF."""
    plt, model = matplotlib(), load(args.weights)
    images, texts = captioned(read_captions(args.data or [ROOT / "data" / "photos"]))
    pictures = {}
    if len(texts) < 2:
        note("no Fig. 3: it needs at least two photographs with captions (captions.jsonl beside them)")
    else:
        runs = {"aligned (stage 1)": model}
        if (args.against / "model" / "config.json").exists():
            runs["not aligned"] = load(args.against)
        else:
            note(f"draws the aligned e_img only; to compare: sodiff.py train --lambda-align 0 --out {args.against}")
        pictures["fig3"] = draw_fig3(plt, runs, images, text_tokens(model.base, texts))
    if model.predictor is not None:
        qfs = [1, 2, 3, 4, *range(5, 96, 5)]
        pictures["timestep"], axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        files = list_images(args.data or [ROOT / "data" / "photos" / "val"])
        for ax, v, name in zip(axes, predictions(model, files, qfs), ("predicted QF", "predicted timestep")):
            ax.plot(qfs, v, color="tab:blue", alpha=0.25, linewidth=0.7)
            ax.plot(qfs, v.mean(1), color="tab:blue", label=f"mean of {len(files)} photographs")
            ax.set(xlabel="true QF", ylabel=name)
        axes[0].plot([0, 95], [0, 95], color="grey", linestyle=":", label="exact")
        axes[0].legend(fontsize=8)
    for name, figure in pictures.items():
        target = args.weights / "samples" / f"{name}.png"
        atomic(target, lambda tmp: figure.savefig(tmp, dpi=110))
        print(target)


# ------------------------------------------------------------------------------------- command line

SDXL = ["stabilityai/stable-diffusion-xl-base-1.0"]


def train_command(args) -> None:
    if args.paper and not args.data:
        raise UserError("--paper needs --data: the crops and captions that `sodiff.py caption` makes of DF2K and LSDIR (see data/README.md)")
    cfg1, cfg2 = stage_config(Stage1, "s1", args), stage_config(Stage2, "s2", args)
    if cfg2.beta < 0:
        raise UserError(f"--beta {cfg2.beta}: must not be negative")
    base = find_base([args.base] if args.base else SD21_BASE if args.paper else [TINY_SD])
    disc_base = find_base([args.disc_base] if args.disc_base else SDXL if args.paper else [base], "--disc-base", ("unet", "vae", "scheduler"))
    data = args.data or [ROOT / "data" / "photos" / "train"]
    run = Run(args.out, {"script": "sodiff", "base_sha256": fingerprint(base), "disc_base_sha256": fingerprint(disc_base),
                         "seed": args.seed, "data": sorted(str(Path(d).resolve()) for d in data),
                         "stage1": asdict(cfg1), "stage2": asdict(cfg2)}, args.stage, args.resume, args.overwrite)
    if args.stage in ("1", "all"):
        stage1(run, cfg1, base, data, args.seed)
    if args.stage in ("2", "all"):
        stage2(run, cfg2, base, disc_base, data, args.seed)
        if run.main:
            evaluation(load(run.folder, str(base)), run.folder, args.val, [5, 10, 20])
            print(f"peak memory: {peak_memory()}")


def evaluation(model: SODiff, out: Path, data, qfs: list[int], color_fix: str = "none", tile: int | None = None, extra: bool = False) -> None:
    folders, picture = data or [ROOT / "data" / "photos" / "val"], out / "samples" / "eval.png"
    files = list_images(folders)
    conditions = {f"JPEG QF {qf}": lambda image, _, qf=qf: jpeg(image, qf) for qf in qfs}
    results = evaluate(files, conditions, lambda image: restore(model, image, color_fix, tile)[0], SD(model.base, with_unet=False).to(device()),
                       Metrics(device(), ("musiq", "maniqa", "clipiqa") if extra else ()), picture)
    write_json(out / "metrics.json", {"images": [f.name for f in files], "color_fix": color_fix, "results": results,
                                      "alignment": report_alignment(model, model.base, read_captions(folders), "of these"),
                                      "predictor": report_predictions(model, files) if model.predictor else {}})
    print(f"\ncolour fix: {color_fix}   metrics: {out / 'metrics.json'}   picture: {picture}")


def eval_command(args) -> None:
    model = load(args.weights, args.base)
    evaluation(model, args.weights, args.data, args.qf, args.color_fix, tile_size(args.tile, model.multiple), args.metrics == "all")


def restore_command(args) -> None:
    pairs, model = outputs(args.input, args.output), load(args.weights, args.base)
    tile = tile_size(args.tile, model.multiple)

    def one(image: Image.Image) -> tuple[Image.Image, str]:
        result, qf_hat, tau = restore(model, image, args.color_fix, tile)
        return result, ("" if qf_hat is None else f", predicted QF {qf_hat:.0f}") + f", timestep {tau:.1f}"
    restore_files(pairs, one)


def main(argv: list[str] | None = None) -> None:
    cli = Parser(prog="sodiff.py", description="SODiff: one-step JPEG artifact removal (arXiv 2508.07346)")
    commands = cli.add_subparsers(dest="command", required=True, parser_class=Parser)
    add_train(commands, "sodiff", {"s1": Stage1, "s2": Stage2}, train_command).add_argument(
        "--disc-base", help="diffusers folder or hub id of the discriminator's UNet (default: the base; with --paper SDXL)")
    add_restore(commands, "sodiff", restore_command)
    add_eval(commands, "sodiff", eval_command).add_argument("--qf", type=int, nargs="+", default=[5, 10, 20], help="JPEG quality factors")
    for name in ("restore", "eval"):
        commands.choices[name].add_argument("--color-fix", choices=["adain", "none"], default="none",
                                            help="AdaIN matches each channel's mean and deviation to the input's")
    p = commands.add_parser("caption", help="crops with LLaVA's captions, for stage 1", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", nargs="+", required=True, metavar="DIR", help="folders of photographs")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the crops and captions.jsonl; continued if it is there")
    p.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="folder or hub id of a LLaVA")
    p.add_argument("--crop", type=int, default=512, help="side in pixels")
    p.add_argument("--per-image", type=int, default=1, help="crops of each photograph")
    p.add_argument("--max-tokens", type=int, default=64, help="of a caption")
    p.add_argument("--batch", type=int, default=8, help="crops captioned at once")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=caption_command)
    add_profile(commands, profile_command)
    add_figures(commands, "sodiff", figures_command).add_argument(
        "--against", type=Path, default=ROOT / "runs" / "sodiff-no-align", help="a run trained with --lambda-align 0")
    args = cli.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_cli(main)
