"""SODiff: Semantic-Oriented Diffusion Model for JPEG Compression Artifacts Removal (AAAI 2026, whose text is
followed here; arXiv 2508.07346).

    stage 1   I_L -> E_down -> F_mid -> D_up    -> I_rec   ~ I_H
                                    \\-> T_align -> e_img   ~ e_text = text encoder(LLaVA's caption of I_L)
    stage 2   I_L -> VAE enc -> z_L -> UNet (LoRA; tau, e_img) -> Eq. 6 -> z_hat -> VAE dec -> x_hat
               |-> SAIPE (E_down, T_align; frozen) -> e_img
               \\-> time predictor -> QF_pred, tau

| paper         | code          | shape                | range                                              |
| ------------- | ------------- | -------------------- | -------------------------------------------------- |
| I_L, I_H      | x_lq, x_hq    | (B, 3, H, W)         | [-1, 1]; the JPEG and its original                 |
| F_mid         | f_mid         | (B, c, H / 4, W / 4) | features of the shared encoder                     |
| e_img, e_text | e_img, e_text | (B, 77, D_text)      | image prompt; the text encoder's last hidden state |
| z_L, z_H      | z_L, z_hq     | (B, C, H / 8, W / 8) | latents of the JPEG and its original, scaled       |
| z_hat_H       | z_hat         | as z_L               | one-step estimate of z_H                           |
| l_i, g_i      | logits, g     | (B, T_max)           | the timesteps' logits; Gumbel noise, in training   |
| tau_pred      | tau           | (B,)                 | real timestep in [0, T_max - 1]                    |
| QF_pred       | qf_hat        | (B,)                 | predicted quality factor, about 5 to 95            |

The authors have released no code: what the paper leaves open is settled here, where it says OURS or "ours".
Left out: the DAPE prompt of Table 2 (another project's network).

    python sodiff.py train                     # both stages on the bundled tiny-sd, a table and a picture
    python sodiff.py restore photo.jpg -o photo.png
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import common
from common import (SD, SD21_BASE, CommandLine, Crops, Discriminator, Run, Stage, Tiles, UserError, both,
                    frozen, jpeg, load_trained, noise_for, pad_to, read_model, rng, to_image, to_tensor)

# ------------------------------------------------------------------------------------ configurations

LOSSES, DISTS, TIMESTEPS = ("mse", "ea", "gan"), ("small", "vgg16"), ("predicted", "fixed")
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@dataclass
class Stage1(Stage):
    """SAIPE, Sec. 3.1."""
    #                           tiny run    paper run
    width: int           = both(48,         180,      "Sec. 3.1")
    heads: int           = both(6,          6,        "ours: SwinIR's")
    depth: int           = both(2,          6,        "ours: Swin layers an RSTB; SwinIR's 6")
    features: int        = both(64,         256,      "ours: FAVOR+'s random features")
    pool_heads: int      = both(6,          16,       "ours: heads of the attention pooling")
    crop: int            = both(128,        512,      "Sec. 4.1")
    qf_min: int          = both(5,          5,        "Sec. 4.1", most=100)
    qf_max: int          = both(95,         95,       "Sec. 4.1", most=100)
    lambda_align: float  = both(0.5,        0.5,      "Eq. 5; 0: Table 2's No Align", "lambda_align")
    lr: float            = both(1e-3,       2e-4,     "Sec. 4.1")
    batch: int           = both(4,          16,       "Sec. 4.1")
    steps: int           = both(300,        50_000,   "Sec. 4.1")


@dataclass
class Stage2(Stage):
    """The one-step generator, its time predictor and its discriminator, Secs. 3.2 and 3.3."""
    #                           tiny run     paper run
    timestep: str        = both("predicted", "predicted", "Table 3; fixed: tau_0", "timestep", TIMESTEPS)
    tau_0: int           = both(99,          499,         "ours: fixed tau, or the bell's centre", most=999)
    spread: float        = both(40.0,        0.0,         "ours: of the bell that logits start as; 0: flat")
    widths: tuple        = both((32, 64, 128, 256), (64, 128, 256, 512), "ours: the predictor's blocks")
    highpass: float      = both(8.0,         0.0,         "ours: gain of the filters that it starts with")
    rank: int            = both(16,          16,          "Sec. 4.1")
    disc_base: str       = both("",          SDXL,        "Sec. 4.1: of D; '': the base's own", "disc_base")
    crop: int            = both(128,         512,         "Sec. 4.1")
    qf_min: int          = both(5,           5,           "Sec. 4.1", most=100)
    qf_max: int          = both(95,          95,          "Sec. 4.1", most=100)
    qf_power: float      = both(3.0,         1.0,         "ours: QF = min + (max - min) u^power; 1: Sec. 4.1")
    losses: tuple        = both(LOSSES,      LOSSES,      "Table 4: the terms that count", "losses", LOSSES)
    dists: str           = both("small",     "vgg16",     "Eq. 7; 'small' needs no download", None, DISTS)
    lambda_EA: float     = both(0.002,       1.0,         "Eq. 7")
    alpha: float         = both(1e-2,        1e-2,        "Sec. 4.1, Eq. 12")
    beta: float          = both(1e-3,        1e-3,        "Sec. 4.1, Eq. 12; 0: Table 3's w/o L_qf", "beta")
    lr: float            = both(2e-3,        1e-5,        "Sec. 4.1")
    lr_D: float          = both(5e-4,        1e-5,        "Sec. 4.1: one for both")
    t_F: int             = both(99,          999,         "Eqs. 8, 9: F noises to t from 0 to this", most=999)
    weight_decay: float  = both(1e-2,        1e-2,        "ours: AdamW's own")
    checkpointing: bool  = both(False,       False,       "ours: less memory, more time")
    batch: int           = both(4,           2,           "Sec. 4.1")
    steps: int           = both(300,         150_000,     "Sec. 4.1")


# --------------------------------------------------------------------------------------------- data


class JPEGPairs(Crops):
    """Sample n -> (n, x_lq, x_hq, qf), a crop and its JPEG. In stage 1 also its caption's ids; mirrored at
    most, and at the QF at which LLaVA saw the crop, if the caption tells."""

    def __init__(self, folders, cfg: Stage1 | Stage2, multiple: int, seed: int):
        cfg.check_crop(multiple)
        super().__init__(folders, cfg.crop, seed)
        self.cfg, self.captions = cfg, {}

    def __getitem__(self, n: int) -> tuple:
        row = self.captions[self.file(n)] if self.captions else {}
        qf = row.get("qf") or self.quality(n)
        hq = Image.fromarray(self.crop(n))
        sample = n, to_tensor(jpeg(hq, qf)), to_tensor(hq), torch.tensor(float(qf))
        return (*sample, row["ids"]) if self.captions else sample

    def quality(self, n: int) -> int:
        u = rng(self.seed, 2, n).random() ** getattr(self.cfg, "qf_power", 1)
        return self.cfg.qf_min + int((self.cfg.qf_max + 1 - self.cfg.qf_min) * u)


def read_captions(folders: list[Path]) -> dict[Path, dict]:
    """{image: {"caption": ..., "qf": ... or absent}} of every captions.jsonl in the folders."""
    rows = {}
    for path in (p for folder in folders for p in sorted(Path(folder).rglob("captions.jsonl"))):
        lines = path.read_text("utf-8-sig", errors="replace").split("\n")
        for i, line in ((i, line) for i, line in enumerate(lines, 1) if line.strip()):
            try:
                row = json.loads(line)
                rows[path.parent / row["file"]] = row
                if not isinstance(row["caption"], str) or row.get("qf", 1) not in range(1, 101):
                    raise ValueError
            except (ValueError, TypeError, KeyError):
                raise UserError(f'{path}, line {i}: not {{"file": ..., "caption": ..., "qf": 1 to 100}}; '
                                "mend or delete it (if data.caption wrote it, run that again)") from None
    return rows


def tokenized(captions: dict[Path, dict], files: list[Path], tokenizer) -> dict[Path, dict]:
    """Every file's caption ("" where there is none), with "ids"; says what is missing and what is cut."""
    rows, length = {f: captions.get(f, {"caption": ""}) for f in files}, tokenizer.model_max_length
    texts = [row["caption"] for row in rows.values()]
    long = sum(len(ids) > length for ids in tokenizer(texts, verbose=False).input_ids)
    common.note(f'{len(files)} images, {texts.count("")} without a caption ("" stands for it), '
                f"{long} cut to {length} tokens, {len(captions.keys() - rows.keys())} captions without image")
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return {f: {**row, "ids": own} for (f, row), own in zip(rows.items(), ids)}


# ----------------------------------------------------------------------------------- SAIPE, Sec. 3.1


class RSTB(nn.Module):
    """Residual Swin Transformer block (SwinIR): Swin layers of window 8, every second one shifted; a conv."""

    def __init__(self, c: int, heads: int, depth: int):
        from torchvision.models.swin_transformer import SwinTransformerBlock
        super().__init__()
        self.swin = nn.Sequential(*[SwinTransformerBlock(c, heads, [8, 8], [4 * (i % 2)] * 2, mlp_ratio=2.0)
                                    for i in range(depth)])
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, f: Tensor) -> Tensor:
        return f + self.conv(self.swin(f.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))  # Swin: channels last


class SharedEncoder(nn.Module):
    """E_down: (B, 3, H, W) in [-1, 1] -> F_mid (B, c, H / 4, W / 4). OURS: pixel-unshuffle downsamples."""

    def __init__(self, c: int, heads: int, depth: int):
        super().__init__()
        self.head = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, c, 3, padding=1))
        self.body = nn.Sequential(RSTB(c, heads, depth), RSTB(c, heads, depth), nn.Conv2d(c, c, 3, padding=1))

    def forward(self, x_lq: Tensor) -> Tensor:
        f = self.head(x_lq)
        return f + self.body(f)


class ReconstructionDecoder(nn.Module):
    """D_up. OURS: one RSTB of two layers."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.body, self.norm = RSTB(c, heads, 2), nn.LayerNorm(c)
        self.tail = nn.Sequential(nn.Conv2d(c, 48, 3, padding=1), nn.PixelShuffle(4))

    def forward(self, f_mid: Tensor) -> Tensor:
        f = self.norm(self.body(f_mid).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.tail(f)


def orthogonal_features(m: int, d: int) -> Tensor:
    """m random directions in d dimensions, orthogonal in blocks of d, as long as Gaussian vectors."""
    blocks = (torch.linalg.qr(torch.randn(d, d)) for _ in range(-(-m // d)))
    # (without the signs a block's first vector would always lie in the same half of space)
    directions = torch.cat([(q * r.diagonal().sign()).T for q, r in blocks])[:m]
    return directions * torch.randn(m, d).norm(dim=1, keepdim=True)


def favor(q: Tensor, k: Tensor, v: Tensor, omega: Tensor) -> Tensor:
    """FAVOR+ (Choromanski et al. 2021): softmax(q k^T / sqrt(d)) v, approximately, in time and memory linear
    in N. With phi(x) = exp(omega x - |x|^2 / 2) > 0 and Gaussian rows omega, E[phi(q) phi(k)] = exp(q k), so
    that phi(k)^T v can be summed over the N keys first. q, k, v: (B, heads, N, d); omega: (m, d)."""
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
        self.register_buffer("omega", orthogonal_features(features, c // heads))  # drawn once, and saved

    def forward(self, x: Tensor) -> Tensor:  # (B, N, c)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(favor(q, k, v, self.omega).transpose(1, 2).flatten(2).to(x.dtype))
        return x + self.mlp(self.norm2(x))


class GuidanceEmbedder(nn.Module):
    """T_align: F_mid (B, c, h, w) -> e_img (B, tokens, d_text), shaped as the text encoder's output.
    OURS: all widths and depths, and the query added to what it attends to (as a Transformer decoder does),
    without which all tokens would start out equal."""

    def __init__(self, c: int, heads: int, features: int, pool_heads: int, tokens: int, d_text: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c))
        self.performer = nn.Sequential(*[PerformerLayer(c, heads, features) for _ in range(2)])
        self.scales = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, k, 1, k // 2, groups=c), nn.Conv2d(c, c, 1)) for k in (3, 5, 7))
        self.queries = nn.Parameter(torch.randn(1, tokens, d_text) * 0.02)
        self.pool = nn.MultiheadAttention(d_text, pool_heads, kdim=c, vdim=c, batch_first=True)
        self.norm, self.out = nn.LayerNorm(d_text), nn.Linear(d_text, d_text)

    def forward(self, f_mid: Tensor) -> Tensor:
        # Eq. 2
        f = self.performer(self.mlp(f_mid.flatten(2).transpose(1, 2)))  # (B, h w, c)
        f = f.transpose(1, 2).unflatten(2, f_mid.shape[2:])  # (B, c, h, w)
        f = sum(conv(f) for conv in self.scales).flatten(2).transpose(1, 2)
        q = self.queries.expand(len(f), -1, -1)
        return self.out(self.norm(q + self.pool(q, f, f, need_weights=False)[0]))


class SAIPE(nn.Module):
    """Semantic-aligned image prompt extractor, Fig. 2, as stage 1 trains it."""

    stride = 32  # a window of E_down's: 8 features of 4 pixels each

    def __init__(self, cfg: Stage1, tokens: int, d_text: int):
        super().__init__()
        self.E_down = SharedEncoder(cfg.width, cfg.heads, cfg.depth)
        self.T_align = GuidanceEmbedder(cfg.width, cfg.heads, cfg.features, cfg.pool_heads, tokens, d_text)
        self.D_up = ReconstructionDecoder(cfg.width, cfg.heads)

    def forward(self, x_lq: Tensor) -> tuple[Tensor, Tensor]:
        """(I_rec (B, 3, H, W), e_img (B, tokens, d_text)); sides of x_lq are multiples of `stride`."""
        # Eq. 1
        f_mid = self.E_down(x_lq)
        return self.D_up(f_mid), self.T_align(f_mid)


# -------------------------------------------------------------------------- time predictor, Sec. 3.3


class ResidualBlock(nn.Module):
    """OURS: stride 2, each channel normalised on its own map: how sparse fine detail is tells QF."""

    def __init__(self, c_in: int, c: int):
        super().__init__()
        self.res = nn.Sequential(nn.Conv2d(c_in, c, 3, 2, 1), nn.GroupNorm(c, c), nn.ReLU(),
                                 nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(c, c))
        self.skip = nn.Conv2d(c_in, c, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.res(x))


class TimePredictor(nn.Module):
    """I_L (B, 3, H, W) in [-1, 1] -> (QF_pred (B,), logits (B, T_max)): four residual blocks, shared average
    pooling and two linear branches. OURS: the logits start the same for all images, all zero
    (tau = (T_max - 1) / 2 but for Gumbel noise), or with `spread` as a bell of that deviation about tau_0."""

    def __init__(self, widths: tuple[int, ...], T_max: int, tau_0: int, spread: float, highpass: float):
        super().__init__()
        self.blocks = nn.Sequential(*[ResidualBlock(a, b) for a, b in zip((3, *widths), widths)])
        self.qf, self.logits = nn.Linear(widths[-1], 1), nn.Linear(widths[-1], T_max)
        nn.init.constant_(self.qf.bias, 0.5)
        nn.init.zeros_(self.logits.weight)
        bell = -((torch.arange(T_max) - tau_0) / spread).square() / 2 if spread else torch.zeros(T_max)
        self.logits.bias.data = bell
        if highpass:
            # QF shows in fine detail, which random filters drown in brightness: six filters a colour start as
            # second differences, of both signs, since ReLU passes one.
            d2, same = torch.tensor([-1.0, 2.0, -1.0]), torch.tensor([0.0, 1.0, 0.0])
            kernels = [torch.outer(d2, d2) / 4, torch.outer(same, d2) / 2, torch.outer(d2, same) / 2]
            kernels += [-kernel for kernel in kernels]
            for i, weight in enumerate(self.blocks[0].res[0].weight.data[:18]):
                weight.zero_()
                weight[i % 3] = highpass * kernels[i // 3]

    def forward(self, x_lq: Tensor) -> tuple[Tensor, Tensor]:
        h = self.blocks(x_lq).mean((2, 3))
        return 100 * self.qf(h)[:, 0], self.logits(h)


def expected_timestep(logits: Tensor, g: Tensor | None = None) -> Tensor:
    """tau (B,) in [0, T_max - 1], differentiable. OURS: without noise (g) at inference."""
    # Eq. 11
    logits = logits.float() if g is None else logits.float() + g
    i = torch.arange(logits.shape[1], device=logits.device)
    return (logits.softmax(1) * i).sum(1)  # autocast would do a matmul in bf16


def gumbel_for(n: Tensor, T_max: int, *key: int) -> Tensor:
    """g (B, T_max) ~ Gumbel(0, 1), row i a function of (*key, n[i])."""
    u = torch.stack([torch.rand(T_max, generator=common.torch_rng(*key, i)) for i in n.tolist()])
    return -(-u.log()).log().to(n.device)


def alpha_bar_at(alpha_bar: Tensor, tau: Tensor) -> Tensor:
    """alpha_bar at real timesteps tau: log-SNR = log(alpha_bar / (1 - alpha_bar)) is interpolated linearly
    between the neighbouring integers, differentiably."""
    below = tau.detach().floor().long().clamp(0, len(alpha_bar) - 2)
    log_snr = alpha_bar.logit()
    return torch.lerp(log_snr[below], log_snr[below + 1], (tau - below).to(log_snr.dtype)).sigmoid()


# ------------------------------------------------------------------------------ generator, Sec. 3.2


class SODiff(nn.Module):
    """The one-step generator, to which `add_lora` adds LoRA. `predictor` None: tau_0 for all images."""

    def __init__(self, base: str | Path, E_down: SharedEncoder, T_align: GuidanceEmbedder, cfg: Stage2,
                 weights: bool = True):
        super().__init__()
        self.base, self.tau_0, self.sd = base, cfg.tau_0, SD(base, weights=weights)
        self.E_down, self.T_align = E_down.requires_grad_(False), T_align.requires_grad_(False)
        self.cell, self.multiple, self.predictor = SAIPE.stride, max(SAIPE.stride, self.sd.multiple), None
        T_max = len(self.sd.alpha_bar)
        if cfg.timestep == "predicted":
            self.predictor = TimePredictor(cfg.widths, T_max, cfg.tau_0, cfg.spread, cfg.highpass)

    def add_lora(self, rank: int) -> SODiff:
        """LoRA (rank: Sec. 4.1) on the UNet's attention, feed-forward and convolution layers (ours)."""
        common.add_lora(self.sd.unet, rank)
        return self

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
        # Eq. 6:  z_hat = (z_L - sqrt(1 - alpha_bar_tau) eps) / sqrt(alpha_bar_tau)
        # OURS: tau enters UNet and alpha_bar as a real number, so that the loss can move it
        return self.sd.x0(z_L, eps, alpha_bar_at(self.sd.alpha_bar, tau))

    def forward(self, x_lq: Tensor, noise: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """x_lq, sides multiples of `cell` -> (x_hat, z_hat, e_img, QF_pred, tau)."""
        e_img, qf_hat, tau = self.condition(x_lq, g)
        z_L = self.sd.encode(x_lq, noise)
        z_hat = self.denoise(z_L, e_img, tau)
        return self.sd.decode(z_hat).clamp(-1, 1), z_hat, e_img, qf_hat, tau


class NoisedDiscriminator(Discriminator):
    """D(F(z, t)) of Eqs. 8 and 9: latents are noised to timestep t first, by F; e_img is the given condition.
    Any UNet on as many channels will do, SDXL's too: latents come with the scaling factor of `sd` and take on
    that of the UNet's own VAE."""

    def __init__(self, base: str | Path, rank: int, sd: SD):
        from diffusers import AutoencoderKL, DDPMScheduler
        try:
            super().__init__(base, rank, given=sd.unet.config.cross_attention_dim)
            schedule = common.load_part(DDPMScheduler, base, "scheduler")
            with torch.device("meta"):  # of the VAE only the settings matter
                vae = common.load_part(AutoencoderKL, base, "vae", weights=False)
        except UserError as error:
            raise UserError(f"--disc-base {error}") from None
        takes, makes = self.unet.config.in_channels, sd.vae.config.latent_channels
        if takes != makes:
            raise UserError(f"--disc-base {base}: takes {takes} latent channels, but the base makes {makes}")
        self.rescale = vae.config.scaling_factor / sd.vae.config.scaling_factor
        self.register_buffer("alpha_bar", schedule.alphas_cumprod.float(), persistent=False)

    def forward(self, z: Tensor, t: Tensor, e_img: Tensor, noise: Tensor) -> Tensor:
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        z_t = a.sqrt() * (z * self.rescale) + (1 - a).sqrt() * noise
        return super().forward(z_t, t, e_img, added_cond_kwargs=self.sdxl_inputs(z_t))

    def sdxl_inputs(self, z: Tensor) -> dict[str, Tensor] | None:
        """What SDXL's UNet takes besides: pooled text, here zero; the picture's size in pixels, uncropped."""
        config = self.unet.config
        if config.addition_embed_type != "text_time":
            return None
        height, width = (8 * side for side in z.shape[2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=z.device, dtype=z.dtype)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {"text_embeds": z.new_zeros(len(z), pooled), "time_ids": sizes.expand(len(z), -1)}


# ------------------------------------------------------------------------------------------- losses


def loss_rec(x_rec: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 3, on [0, 1] (ours; L_MSE alike)
    return F.l1_loss((x_rec + 1) / 2, (x_hq + 1) / 2)


def loss_align(e_img: Tensor, e_text: Tensor) -> Tensor:
    # Eq. 4
    return F.mse_loss(e_img, e_text)


def loss_mse(x_hat: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 7, first term, on [0, 1]
    return F.mse_loss((x_hat + 1) / 2, (x_hq + 1) / 2)


def loss_ea(dists: nn.Module, x_hat: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 7, L_EA: DISTS of the edges and of the pictures
    return (dists(sobel(x_hat), sobel(x_hq)) + dists(x_hat, x_hq)).mean()


def sobel(x: Tensor) -> Tensor:
    """Eq. 7's S: the Sobel magnitude of x's luma in [0, 1], sqrt(gx^2 + gy^2 + 1e-6), as three equal channels
    (B, 3, H, W); mapped as pixels are, [0, 1] to [-1, 1] (strong edges, up to 4, lie beyond)."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)
    luma = ((x + 1) / 2 * weights).sum(1, keepdim=True)
    gx = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device)
    edges = F.conv2d(F.pad(luma, (1, 1, 1, 1), "replicate"), torch.stack([gx, gx.T])[:, None])
    return (edges.square().sum(1, keepdim=True) + 1e-6).sqrt().expand(-1, 3, -1, -1) * 2 - 1


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


def stage1(run: Run, cfg: Stage1) -> None:
    """SAIPE: reconstruction, and alignment with the caption's embedding by the base's own text encoder,
    Sec. 3.1. With lambda_align = 0 (Table 2) T_align waits for stage 2, and no captions are needed."""
    from transformers import CLIPTextModel, CLIPTokenizer
    pairs, captions = JPEGPairs(run.data, cfg, SAIPE.stride, run.seed), read_captions(run.data)
    if cfg.lambda_align and not captions:
        raise UserError(f"{run.data[0]}: no captions.jsonl, which L_align needs; make one with "
                        "`python -m data.caption`, or train with --lambda-align 0")
    torch.manual_seed(run.seed)
    tokenizer = common.load_part(CLIPTokenizer, run.base, "tokenizer")
    encoder = common.load_part(CLIPTextModel, run.base, "text_encoder").requires_grad_(False)
    saipe = SAIPE(cfg, tokenizer.model_max_length, encoder.config.hidden_size)
    saipe.T_align.requires_grad_(cfg.lambda_align > 0)
    acc = run.start(1, cfg, E_down=saipe.E_down, T_align=saipe.T_align, D_up=saipe.D_up, text_encoder=encoder)
    # a caption, "on the left", need not fit a turned crop
    pairs.captions, pairs.turns = tokenized(captions, pairs.files, tokenizer), 1
    saipe, optimizer = acc.prepare(saipe, torch.optim.Adam(saipe.parameters(), cfg.lr))
    encoder.to(acc.device)
    for step, (n, x_lq, x_hq, _, ids) in run.loop(pairs, {"saipe": saipe}, {"adam": optimizer}):
        with acc.accumulate(saipe):
            x_rec, e_img = saipe(x_lq)
            with torch.no_grad():
                e_text = encoder(ids)[0]
            l_rec = loss_rec(x_rec, x_hq)
            l_align = loss_align(e_img, e_text)
            # Eq. 5
            loss = l_rec + cfg.lambda_align * l_align
            run.gradients(step, saipe, rec=l_rec, align=cfg.lambda_align * l_align)
            acc.backward(loss)
            run.update(saipe, optimizer, step)
        run.log(rec=l_rec, align=l_align, loss=loss)
    saipe.requires_grad_(True)  # so that a T_align that waits for stage 2 is saved as well
    run.save(saipe)


# ------------------------------------------------------------------------------------------ stage 2


def generator(base: str | Path, weights: Path, cfg: Stage2) -> SODiff:
    """SODiff with LoRA, and with the SAIPE that stage 1 of the run in the folder `weights` left."""
    tensors, header = read_model(weights, "sodiff", stage=1)
    cfg1 = Stage1.read(header)
    saipe = load_trained(SAIPE(cfg1, *tensors["T_align.queries"].shape[1:]), tensors, weights)
    G = SODiff(base, saipe.E_down, saipe.T_align, cfg).add_lora(cfg.rank)
    G.T_align.requires_grad_(cfg1.lambda_align == 0)  # Table 2, No Align: T_align learns in stage 2
    return G


def stage2(run: Run, cfg: Stage2) -> None:
    """The generator and its time predictor against the discriminator, SAIPE frozen, Secs. 3.2 and 3.3."""
    torch.manual_seed(run.seed + 1)
    G = generator(run.base, run.folder, cfg)
    D = NoisedDiscriminator(cfg.disc_base or run.base, cfg.rank, G.sd)
    dists = common.dists_vgg16() if cfg.dists == "vgg16" else common.dists_small()
    for m in (G.sd.unet, G.sd.vae, D.unet) if cfg.checkpointing else ():
        m.enable_gradient_checkpointing()
    acc = run.start(2, cfg, generator=G, discriminator=D)
    pairs = JPEGPairs(run.data, cfg, G.multiple, run.seed + 1)
    opt_G, opt_D = (torch.optim.AdamW(m.parameters(), lr, weight_decay=cfg.weight_decay)
                    for m, lr in ((G, cfg.lr), (D, cfg.lr_D)))
    G, D, opt_G, opt_D = acc.prepare(G, D, opt_G, opt_D)
    G.train(), D.train(), dists.to(acc.device)
    critic, sd, seed = acc.unwrap_model(D), acc.unwrap_model(G).sd, run.seed
    T, T_max, shape = cfg.t_F + 1, len(sd.alpha_bar), sd.latent_shape(cfg.crop)
    w = {term: float(term in cfg.losses) for term in LOSSES}  # Table 4; 1 each by default

    for step, (n, x_lq, x_hq, qf) in run.loop(pairs, {"G": G, "D": D}, {"opt_G": opt_G, "opt_D": opt_D}):
        with acc.accumulate(G, D):
            noise, g = noise_for(n, shape, seed, 3), gumbel_for(n, T_max, seed, 5)
            x_hat, z_hat, e_img, qf_hat, tau = G(x_lq, noise, g)
            l_mse = loss_mse(x_hat, x_hq)
            l_ea = loss_ea(dists, x_hat, x_hq)
            l_qf = 0 * l_mse if qf_hat is None else loss_qf(qf_hat, qf)
            e_img = e_img.detach()
            with frozen(critic):  # until after backward: checkpointing runs the critic's forward again there
                t, noise = random_timesteps(n, T, seed, 6), noise_for(n, shape, seed, 7)
                l_G = loss_G(critic(z_hat, t, e_img, noise))
                # Eq. 12, with Eq. 7's L_recon = L_MSE + L_EA
                l_recon = w["mse"] * l_mse + w["ea"] * cfg.lambda_EA * l_ea
                loss = l_recon + w["gan"] * cfg.alpha * l_G + cfg.beta * l_qf
                run.gradients(step, G, mse=l_mse, ea=cfg.lambda_EA * l_ea, gan_g=cfg.alpha * l_G,
                              qf=cfg.beta * l_qf)
                acc.backward(loss)
            run.update(G, opt_G, step)

            if w["gan"]:
                t, z_hq = random_timesteps(n, T, seed, 8), run.encode(sd, x_hq, n, 4)
                z = torch.cat([z_hat.detach(), z_hq])
                noise = torch.cat([noise_for(n, shape, seed, 9), noise_for(n, shape, seed, 10)])
                fake, true = D(z, torch.cat([t, t]), torch.cat([e_img, e_img]), noise).chunk(2)
                l_D = loss_D(fake, true)
                acc.backward(l_D)
                run.update(D, opt_D, step)
                run.log(gan_d=l_D, right=critic.accuracy(fake, true))
        run.log(mse=l_mse, ea=l_ea, gan_g=l_G, qf=l_qf, tau=tau.mean(), loss=loss)
    run.save(G, fingerprint=sd.fingerprint)


def random_timesteps(n: Tensor, T: int, *key: int) -> Tensor:
    """t (B,) uniform in 0..T - 1, entry i a function of (*key, n[i])."""
    return torch.tensor([int(rng(*key, i).integers(T)) for i in n.tolist()], device=n.device)


# ------------------------------------------------------------------------------- one-step inference


def load(weights: Path, base: str | None = None) -> SODiff:
    """The trained generator of a run's folder, LoRA fused, on the device at hand, ready for `restore`."""
    tensors, header = read_model(weights, "sodiff")
    G = generator(base or header["base"], weights, Stage2.read(header))
    G.sd.check(header, weights)
    return common.for_inference(load_trained(G, tensors, weights))


@torch.inference_mode()
def restore(model: SODiff, image: Image.Image, tile: int | None = None) -> tuple:
    """One JPEG-compressed image, any size -> (its restored self, predicted QF or None, timestep): one UNet
    call, no noise drawn. e_img, QF and tau are the whole picture's, or of patches that stand for it."""
    x = pad_to(to_tensor(image)[None], model.cell)
    tiles = Tiles(model.sd, x, model.cell, tile, model.multiple)  # without `tile`, tiles(f, x) is f(x)
    e_img, qf_hat, tau = model.condition(tiles.mosaic(x))
    z_L = tiles(model.sd.encode, x)
    z_hat = tiles(lambda z: model.denoise(z, e_img, tau), z_L)
    x_hat = tiles(model.sd.decode, z_hat)[:, :, :image.height, :image.width]
    return to_image(x_hat[0]), None if qf_hat is None else qf_hat.clamp(1, 100).item(), tau.item()


# ------------------------------------------------------------------------------------- command line


def train(args) -> None:
    cfg1, cfg2 = Stage1.of(args), Stage2.of(args)
    run = Run(args, "sodiff", SD21_BASE, cfg1, cfg2)
    if args.stage in ("1", "all"):
        stage1(run, cfg1)
    if args.stage in ("2", "all"):
        stage2(run, cfg2)
        run.evaluate()


def model_flags(p) -> None:
    """Of restore and eval."""
    common.model_flags(p, "sodiff")


def restorer(args):
    """What restore does: image -> (restored image, remark)."""
    model = load(args.weights, args.base)
    tile = common.check_tile(args.tile, model.multiple)

    def restore_and_tell(image: Image.Image) -> tuple[Image.Image, str]:
        result, qf_hat, tau = restore(model, image, tile)
        predicted = "" if qf_hat is None else f", predicted QF {qf_hat:.0f}"
        return result, f"{predicted}, timestep {tau:.1f}"
    return restore_and_tell


def main(argv: list[str] | None = None) -> None:
    cli = CommandLine("sodiff.py", description="SODiff: one-step JPEG artifact removal (arXiv 2508.07346)")
    cli.train(train, Stage1, Stage2)
    model_flags(cli.restore(restorer))
    cli.run(argv)


if __name__ == "__main__":
    common.run_cli(main)
