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
| z_L, z_H      | z_L, z_H      | (B, C, H / 8, W / 8) | latents of the JPEG and its original, scaled       |
| z_hat_H       | z_hat         | as z_L               | one-step estimate of z_H                           |
| I_hat_H       | x_hat         | as x_lq              | the restored picture                               |
| l_i, g_i      | logits, g     | (B, T_max)           | the timesteps' logits; Gumbel noise, in training   |
| tau_pred      | tau           | (B,)                 | real timestep in [0, T_max - 1]                    |
| QF_pred       | qf_hat        | (B,)                 | predicted quality factor, about 5 to 95            |

The authors have released no code: what the paper leaves open is settled here, where it says OURS or
"ours"; all of it is listed in data/results/sodiff.md.
Left out: the DAPE prompt of Table 2 (another project's network).

    python sodiff.py train                     # both stages on the bundled tiny-sd, a table and a picture
    python sodiff.py restore photo.jpg -o photo.png
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import common  # before torch: how its threads wait
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common import (SD, Crops, Discriminator, Settings, UserError, frozen, jpeg, load_trained, noise_for,
                    pad_to, rng, setting, to_image, to_tensor, whole)

# ----------------------------------------------------------------------------------------- settings

LOSSES = "mse", "ea", "gan"
TIMESTEPS = ("predicted", "fixed")
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@dataclass
class Stage1(Settings):
    """SAIPE, Sec. 3.1."""
    number = 1
    #                             tiny run  paper run
    width: int          = setting(48,       180,      "Sec. 3.1", least=1)
    heads: int          = setting(6,        6,        "ours: SwinIR's", least=1)
    depth: int          = setting(2,        6,        "ours: Swin layers an RSTB; SwinIR's 6")
    features: int       = setting(64,       256,      "ours: FAVOR+'s random features", least=1)
    pool_heads: int     = setting(6,        16,       "ours: heads of the attention pooling", least=1)
    crop: int           = setting(128,      512,      "Sec. 4.1", least=1)
    qf_min: int         = setting(5,        5,        "Sec. 4.1", least=1, most="qf_max")
    qf_max: int         = setting(95,       95,       "Sec. 4.1", most=100)
    lambda_align: float = setting(0.5,      0.5,      "Eq. 5; 0: Table 2's No Align", "lambda_align")
    lr: float           = setting(1e-3,     2e-4,     "Sec. 4.1")
    batch: int          = setting(4,        16,       "Sec. 4.1", least=1)
    steps: int          = setting(300,      50_000,   "Sec. 4.1", least=1)


@dataclass
class Stage2(Settings):
    """The one-step generator, its time predictor and its discriminator, Secs. 3.2 and 3.3."""
    number = 2
    #                             tiny run            paper run
    timestep: str       = setting("predicted",        "predicted", "Table 3", "timestep", choices=TIMESTEPS)
    tau_0: int          = setting(99,                 499,      "ours: of --timestep fixed", most=999)
    widths: tuple       = setting((32, 64, 128, 256), (64, 128, 256, 512), "ours: the predictor's blocks")
    rank: int           = setting(16,                 16,       "Sec. 4.1", least=1)
    disc_base: str      = setting("",                 SDXL,     "Sec. 4.1; '': the base's own", "disc_base")
    crop: int           = setting(128,                512,      "Sec. 4.1", least=1)
    qf_min: int         = setting(5,                  5,        "Sec. 4.1", least=1, most="qf_max")
    qf_max: int         = setting(95,                 95,       "Sec. 4.1", most=100)
    qf_power: float     = setting(3.0,                1.0,      "ours: QF = min + (max - min) u^power")
    losses: tuple       = setting(LOSSES,             LOSSES,   "Table 4: terms", "losses", choices=LOSSES)
    dists: str          = setting("tiny-vgg",         "vgg16",  "Eq. 7")
    lambda_EA: float    = setting(0.02,               1.0,      "Eq. 7, unweighted")
    alpha: float        = setting(1e-2,               1e-2,     "Sec. 4.1, Eq. 12")
    beta: float         = setting(1e-3,               1e-3,     "Sec. 4.1, Eq. 12; 0: Table 3", "beta")
    lr: float           = setting(2e-3,               1e-5,     "Sec. 4.1")
    lr_D: float         = setting(5e-4,               1e-5,     "Sec. 4.1: one for both")
    t_F: int            = setting(99,                 999,      "Eqs. 8, 9: F noises to 0..t_F", most=999)
    weight_decay: float = setting(1e-2,               1e-2,     "ours: AdamW's own")
    checkpointing: bool = setting(False,              False,    "ours: less memory, more time")
    batch: int          = setting(4,                  2,        "Sec. 4.1", least=1)
    steps: int          = setting(300,                150_000,  "Sec. 4.1", least=1)


# --------------------------------------------------------------------------------------------- data


class JPEGPairs(Crops):
    """Sample n -> (n, x_lq, x_hq, qf), a crop and its JPEG. In stage 1 also its caption's ids; mirrored at
    most, and at the QF at which LLaVA saw the crop, if the caption tells."""

    def __init__(self, folders, cfg: Stage1 | Stage2, stride: int, seed: int):
        cfg.check_multiple("crop", stride)
        super().__init__(folders, cfg.crop, seed)
        self.cfg = cfg
        self.captions: dict[Path, dict] = {}  # with ids, in stage 1

    def __getitem__(self, n: int) -> tuple:
        row = self.captions[self.file(n)] if self.captions else {}
        qf = row.get("qf") or self.quality(n)
        hq = Image.fromarray(self.crop(n))
        sample = n, to_tensor(jpeg(hq, qf)), to_tensor(hq), torch.tensor(float(qf))
        return (*sample, row["ids"]) if self.captions else sample

    def quality(self, n: int) -> int:
        # Sec. 4.1 draws QF uniformly (power 1); the tiny run, whose time is short, more often a low one.
        u = rng(self.seed, "degradation", n).random() ** getattr(self.cfg, "qf_power", 1)
        return self.cfg.qf_min + int((self.cfg.qf_max + 1 - self.cfg.qf_min) * u)


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
        g = self.swin(f.permute(0, 2, 3, 1))  # (B, h, w, c), as Swin layers take it
        return f + self.conv(g.permute(0, 3, 1, 2))


class SharedEncoder(nn.Module):
    """E_down: (B, 3, H, W) in [-1, 1] -> F_mid (B, c, H / 4, W / 4). OURS: pixel-unshuffle downsamples."""

    def __init__(self, c: int, heads: int, depth: int):
        super().__init__()
        self.head = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, c, 3, padding=1))
        self.body = nn.Sequential(RSTB(c, heads, depth), RSTB(c, heads, depth), nn.Conv2d(c, c, 3, padding=1))

    def forward(self, x_lq: Tensor) -> Tensor:
        f = self.head(x_lq)  # (B, c, H / 4, W / 4)
        return f + self.body(f)


class ReconstructionDecoder(nn.Module):
    """D_up. OURS: one RSTB of two layers."""

    def __init__(self, c: int, heads: int):
        super().__init__()
        self.body = RSTB(c, heads, 2)
        self.norm = nn.LayerNorm(c)
        self.tail = nn.Sequential(nn.Conv2d(c, 48, 3, padding=1), nn.PixelShuffle(4))

    def forward(self, f_mid: Tensor) -> Tensor:
        f = self.body(f_mid).permute(0, 2, 3, 1)  # (B, h, w, c), as LayerNorm takes it
        return self.tail(self.norm(f).permute(0, 3, 1, 2))  # (B, 3, H, W)


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

        phi_q = phi(q, (-1,))      # each query's maximum, or the keys' common one:
        phi_k = phi(k, (-2, -1))   # what cancels in the quotient must not depend on the key
        weighted = phi_q @ (phi_k.transpose(-1, -2) @ v.float())  # (m, d) first: (B, heads, N, d)
        return weighted / (phi_q @ phi_k.sum(-2).unsqueeze(-1))   # over (B, heads, N, 1)


class PerformerLayer(nn.Module):
    """A Transformer encoder layer, normalised first, with FAVOR+ for attention."""

    def __init__(self, c: int, heads: int, features: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv = nn.Linear(c, 3 * c)
        self.out = nn.Linear(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c))
        self.register_buffer("omega", orthogonal_features(features, c // heads))  # drawn once, and saved

    def forward(self, x: Tensor) -> Tensor:  # (B, N, c)
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        attended = favor(q, k, v, self.omega).transpose(1, 2).flatten(2)  # (B, N, c)
        x = x + self.out(attended.to(x.dtype))
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
        self.norm = nn.LayerNorm(d_text)
        self.out = nn.Linear(d_text, d_text)

    def forward(self, f_mid: Tensor) -> Tensor:
        # Eq. 2: MLP and Performer, convolutions at three scales, attention pooling
        f = self.performer(self.mlp(f_mid.flatten(2).transpose(1, 2)))  # (B, h w, c)
        f = f.transpose(1, 2).unflatten(2, f_mid.shape[2:])             # (B, c, h, w)
        f = sum(conv(f) for conv in self.scales)                        # as before
        f = f.flatten(2).transpose(1, 2)                                # (B, h w, c)
        q = self.queries.expand(len(f), -1, -1)                         # (B, tokens, d_text)
        pooled, _ = self.pool(q, f, f, need_weights=False)              # as q
        return self.out(self.norm(q + pooled))


class SAIPE(nn.Module):
    """Semantic-aligned image prompt extractor, Fig. 2, as stage 1 trains it."""

    cell = 32  # a window of E_down's: 8 features of 4 pixels each

    def __init__(self, cfg: Stage1, tokens: int, d_text: int):
        super().__init__()
        self.E_down = SharedEncoder(cfg.width, cfg.heads, cfg.depth)
        self.T_align = GuidanceEmbedder(cfg.width, cfg.heads, cfg.features, cfg.pool_heads, tokens, d_text)
        self.D_up = ReconstructionDecoder(cfg.width, cfg.heads)

    def forward(self, x_lq: Tensor) -> tuple[Tensor, Tensor]:
        """(I_rec (B, 3, H, W), e_img (B, tokens, d_text)); sides of x_lq are multiples of `cell`."""
        # Eq. 1
        f_mid = self.E_down(x_lq)  # (B, c, H / 4, W / 4)
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
    pooling and two linear branches. OURS: all logits start at zero, so that tau does at (T_max - 1) / 2;
    18 first filters as second differences: QF shows in fine detail, which random ones drown in brightness."""

    def __init__(self, widths: tuple[int, ...], T_max: int):
        super().__init__()
        self.blocks = nn.Sequential(*[ResidualBlock(a, b) for a, b in zip((3, *widths), widths)])
        self.qf = nn.Linear(widths[-1], 1)
        self.logits = nn.Linear(widths[-1], T_max)
        nn.init.constant_(self.qf.bias, 0.5)  # QF 50, the middle
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)
        d2, one = torch.tensor([[-1.0, 2.0, -1.0], [0.0, 1.0, 0.0]])
        kernels = torch.stack([torch.outer(d2, d2), 2 * torch.outer(one, d2), 2 * torch.outer(d2, one)])
        signs = torch.tensor([2.0, -2.0])  # both, since ReLU passes one
        filters = torch.einsum("s,khw,cd->skcdhw", signs, kernels, torch.eye(3))  # (2, 3, 3, 3, 3, 3)
        first = self.blocks[0].res[0].weight.data
        first[:18] = filters.flatten(0, 2)[:len(first)]

    def forward(self, x_lq: Tensor) -> tuple[Tensor, Tensor]:
        h = self.blocks(x_lq).mean((2, 3))  # (B, widths[-1])
        return 100 * self.qf(h)[:, 0], self.logits(h)


def expected_timestep(logits: Tensor, g: Tensor | None = None) -> Tensor:
    """tau (B,) in [0, T_max - 1], differentiable. OURS: without noise (g) at inference."""
    # Eq. 11: tau = sum over i of i softmax(l + g)_i, at temperature 1
    logits = logits.float() if g is None else logits.float() + g
    i = torch.arange(logits.shape[1], device=logits.device)  # (T_max,)
    return (logits.softmax(1) * i).sum(1)  # no matmul: autocast would do it in bf16


def gumbel_for(n: Tensor, T_max: int, seed: int, stream: str) -> Tensor:
    """g (B, T_max) ~ Gumbel(0, 1), row i that of sample n[i]."""
    u = torch.stack([torch.rand(T_max, generator=common.torch_rng(seed, stream, i)) for i in n.tolist()])
    return -(-u.log()).log().to(n.device)


def alpha_bar_at(alpha_bar: Tensor, tau: Tensor) -> Tensor:
    """alpha_bar at real timesteps tau: log-SNR = log(alpha_bar / (1 - alpha_bar)) is interpolated linearly
    between the neighbouring integers, differentiably."""
    below = tau.detach().floor().long().clamp(0, len(alpha_bar) - 2)  # (B,)
    log_snr = alpha_bar.logit()  # (T_max,)
    share = (tau - below).to(log_snr.dtype)  # of the way to the next integer
    return torch.lerp(log_snr[below], log_snr[below + 1], share).sigmoid()


# ------------------------------------------------------------------------------ generator, Sec. 3.2


class SODiff(nn.Module):
    """The one-step generator, to which `add_lora` adds LoRA. `predictor` None: tau_0 for all images."""

    def __init__(self, base: str | Path, E_down: SharedEncoder, T_align: GuidanceEmbedder, cfg: Stage2,
                 weights: bool = True):
        super().__init__()
        self.base = base
        self.tau_0 = cfg.tau_0
        self.sd = SD(base, weights=weights)
        self.E_down = E_down.requires_grad_(False)  # SAIPE is frozen, Sec. 4.1
        self.T_align = T_align.requires_grad_(False)
        self.predictor = None
        if cfg.timestep == "predicted":
            self.predictor = TimePredictor(cfg.widths, T_max=len(self.sd.alpha_bar))
        self.cell = SAIPE.cell
        self.stride = max(SAIPE.cell, self.sd.stride)

    def add_lora(self, rank: int) -> SODiff:
        """LoRA (rank: Sec. 4.1) on the UNet's attention, feed-forward and convolution layers (ours)."""
        common.add_lora(self.sd.unet, rank)
        return self

    def condition(self, x_lq: Tensor, g: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """(e_img (B, 77, D_text), QF_pred (B,) or None, tau (B,)) of the picture."""
        x_lq = x_lq.to(self.sd.vae.dtype)
        e_img = self.T_align(self.E_down(x_lq))  # (B, 77, D_text)
        if self.predictor is None:
            return e_img, None, x_lq.new_full((len(x_lq),), self.tau_0, dtype=torch.float32)
        qf_hat, logits = self.predictor(x_lq)  # (B,), (B, T_max)
        return e_img, qf_hat.float(), expected_timestep(logits, g)

    def denoise(self, z_L: Tensor, e_img: Tensor, tau: Tensor) -> Tensor:
        eps = self.sd.unet(z_L.to(self.sd.unet.dtype), tau, e_img).sample  # (B, C, h, w)
        # Eq. 6:  z_hat = (z_L - sqrt(1 - alpha_bar_tau) eps) / sqrt(alpha_bar_tau)
        # OURS: tau enters UNet and alpha_bar as a real number, so that the loss can move it
        return self.sd.x0(z_L, eps, alpha_bar_at(self.sd.alpha_bar, tau))

    def forward(self, x_lq: Tensor, noise: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """x_lq, sides multiples of `cell` -> (x_hat, z_hat, e_img, QF_pred, tau)."""
        e_img, qf_hat, tau = self.condition(x_lq, g)
        z_L = self.sd.encode(x_lq, noise)      # (B, C, H / 8, W / 8)
        z_hat = self.denoise(z_L, e_img, tau)  # as z_L
        return self.sd.decode(z_hat).clamp(-1, 1), z_hat, e_img, qf_hat, tau


class NoisedDiscriminator(Discriminator):
    """D(F(z, t)) of Eqs. 8 and 9: latents are noised to timestep t first, by F; e_img is the given condition.
    Any UNet on as many channels will do, SDXL's too: latents are of unit variance there as here."""

    def __init__(self, base: str | Path, rank: int, sd: SD):
        from diffusers import DDPMScheduler
        try:
            super().__init__(base, rank, given=sd.unet.config.cross_attention_dim)
            schedule = common.load_part(DDPMScheduler, base, "scheduler")
        except UserError as error:
            raise UserError(f"--disc-base {error}") from None
        takes = self.unet.config.in_channels
        makes = sd.vae.config.latent_channels
        if takes != makes:
            raise UserError(f"--disc-base {base}: takes {takes} latent channels, but the base makes {makes}")
        self.register_buffer("alpha_bar", schedule.alphas_cumprod.float(), persistent=False)

    def forward(self, z: Tensor, t: Tensor, e_img: Tensor, noise: Tensor) -> Tensor:
        a = self.alpha_bar[t].view(-1, 1, 1, 1)  # (B, 1, 1, 1)
        z_t = a.sqrt() * z + (1 - a).sqrt() * noise  # F(z, t)
        return super().forward(z_t, t, e_img, added_cond_kwargs=self.sdxl_inputs(z_t))

    def sdxl_inputs(self, z: Tensor) -> dict[str, Tensor] | None:
        """What SDXL's UNet takes besides: pooled text, here zero; the picture's size in pixels, uncropped."""
        config = self.unet.config
        if config.addition_embed_type != "text_time":
            return None
        height, width = (8 * side for side in z.shape[2:])
        sizes = torch.tensor([height, width, 0, 0, height, width], device=z.device, dtype=z.dtype)  # (6,)
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
    (B, 3, H, W); mapped as pixels are, [0, 1] to [-1, 1] (strong edges, up to 4.5, lie beyond)."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)
    luma = ((x + 1) / 2 * weights).sum(1, keepdim=True)  # (B, 1, H, W)
    gx = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device)
    both = torch.stack([gx, gx.T])[:, None]  # (2, 1, 3, 3)
    edges = F.conv2d(F.pad(luma, (1, 1, 1, 1), "replicate"), both)  # (B, 2, H, W)
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


def stage1(run, cfg: Stage1) -> None:
    """SAIPE: reconstruction, and alignment with the caption's embedding by the base's own text encoder,
    Sec. 3.1. With lambda_align = 0 (Table 2) T_align waits for stage 2, and no captions are needed. `run`, of
    data/runs.py, knows where training stood; it brings batches, keeps the log and saves."""
    from transformers import CLIPTextModel, CLIPTokenizer
    torch.manual_seed(run.seed)
    tokenizer = common.load_part(CLIPTokenizer, run.base, "tokenizer")
    encoder = common.load_part(CLIPTextModel, run.base, "text_encoder").requires_grad_(False)
    pairs = JPEGPairs(run.data, cfg, SAIPE.cell, run.seed)
    tokenized = common.tool("captions").tokenized
    pairs.captions = tokenized(run.data, pairs.files, tokenizer, required=cfg.lambda_align > 0)
    pairs.files = [*pairs.captions]  # one without a caption would teach the empty caption's e_text
    pairs.turns = 1  # a caption, "above the roof", need not fit a turned crop
    saipe = SAIPE(cfg, tokenizer.model_max_length, encoder.config.hidden_size)
    saipe.T_align.requires_grad_(cfg.lambda_align > 0)
    acc = run.start(cfg, E_down=saipe.E_down, T_align=saipe.T_align, D_up=saipe.D_up, text_encoder=encoder)
    saipe, adam = acc.prepare(saipe, torch.optim.Adam(saipe.parameters(), cfg.lr))
    encoder.to(acc.device)
    w = {"rec": 1.0, "align": cfg.lambda_align}  # Eq. 5's weights
    first = run.resume({"saipe": saipe}, {"adam": adam})  # 0, or the step at which the run was stopped
    for step, (_, x_lq, x_hq, _, ids) in run.batches(pairs, first):
        with acc.accumulate(saipe):  # cfg.accumulate batches make a step
            # forward
            x_rec, e_img = saipe(x_lq)  # (B, 3, H, W), (B, 77, D_text)
            with torch.no_grad():
                e_text = encoder(ids)[0]  # as e_img
            # losses
            terms = {"rec": loss_rec(x_rec, x_hq), "align": loss_align(e_img, e_text)}
            weighted = {k: w[k] * term for k, term in terms.items()}
            loss = sum(weighted.values())  # Eq. 5
            run.ledger(step, weighted)
            # backward, clip, learning rate, step
            acc.backward(loss)
            common.clip(acc, adam, cfg.clip)
            common.set_lr(adam, cfg.lr, step, cfg)
            adam.step()  # accelerate has it wait for the step's last batch, and zero_grad too
            adam.zero_grad()
        run.log(step, **terms, loss=loss)
        run.save(step)
    saipe.requires_grad_(True)  # so that a T_align that waits for stage 2 is saved as well
    run.finish(saipe)


# ------------------------------------------------------------------------------------------ stage 2


def generator(base: str | Path, weights: Path, cfg: Stage2) -> SODiff:
    """SODiff with LoRA, and with the SAIPE that stage 1 of the run in the folder `weights` left."""
    cfg1, tensors, _ = Stage1.read(weights, "sodiff")
    saipe = SAIPE(cfg1, *tensors["T_align.queries"].shape[1:])  # 77 tokens of D_text
    load_trained(saipe, tensors, weights)
    G = SODiff(base, saipe.E_down, saipe.T_align, cfg).add_lora(cfg.rank)
    G.T_align.requires_grad_(cfg1.lambda_align == 0)  # Table 2, No Align: T_align learns in stage 2
    return G


def networks(run, cfg: Stage2) -> tuple[SODiff, NoisedDiscriminator]:
    """The generator and its discriminator, untrained but for SAIPE."""
    G = generator(run.base, run.folder, cfg)
    D = NoisedDiscriminator(cfg.disc_base or run.base, cfg.rank, G.sd)
    for m in (G.sd.unet, G.sd.vae, D.unet) if cfg.checkpointing else ():
        m.enable_gradient_checkpointing()
    return G.train(), D.train()


def stage2(run, cfg: Stage2, dists: nn.Module) -> None:
    """The generator and its time predictor against the discriminator, SAIPE frozen, Secs. 3.2 and 3.3."""
    torch.manual_seed(run.seed + 1)
    G, D = networks(run, cfg)
    pairs = JPEGPairs(run.data, cfg, G.stride, run.seed + 1)
    acc = run.start(cfg, generator=G, discriminator=D)
    opt_G = torch.optim.AdamW(G.parameters(), cfg.lr, weight_decay=cfg.weight_decay)
    opt_D = torch.optim.AdamW(D.parameters(), cfg.lr_D, weight_decay=cfg.weight_decay)
    G, D, opt_G, opt_D = acc.prepare(G, D, opt_G, opt_D)
    dists.to(acc.device)
    critic = acc.unwrap_model(D)
    sd = acc.unwrap_model(G).sd
    shape = sd.latent_shape(cfg.crop)  # (C, h, w)
    gan = "gan" in cfg.losses
    # Weights in Eqs. 7 and 12; Table 4 leaves terms out
    w = {"mse": 1.0 * ("mse" in cfg.losses), "ea": cfg.lambda_EA * ("ea" in cfg.losses),
         "gan_g": cfg.alpha * gan, "qf": cfg.beta}
    first = run.resume({"G": G, "D": D}, {"opt_G": opt_G, "opt_D": opt_D})
    for step, (n, x_lq, x_hq, qf) in run.batches(pairs, first):
        logged = {}
        with acc.accumulate(G, D):
            # G: forward
            g = gumbel_for(n, len(sd.alpha_bar), run.seed, "gumbel")  # (B, T_max)
            x_hat, z_hat, e_img, qf_hat, tau = G(x_lq, noise_for(n, shape, run.seed, "z_L"), g)
            # G: losses, backward
            with frozen(critic):  # until after backward: checkpointing runs its forward again there
                t = random_timesteps(n, cfg.t_F + 1, run.seed, "t, G")  # (B,)
                fake = critic(z_hat, t, e_img.detach(), noise_for(n, shape, run.seed, "F, G"))
                terms = {"mse": loss_mse(x_hat, x_hq), "ea": loss_ea(dists, x_hat, x_hq),
                         "gan_g": loss_G(fake)}
                if qf_hat is not None:  # Table 3's fixed timestep comes without a predictor
                    terms["qf"] = loss_qf(qf_hat, qf)
                weighted = {k: w[k] * term for k, term in terms.items()}
                loss = sum(weighted.values())  # Eq. 12, its L_recon being Eq. 7's L_MSE + L_EA
                run.ledger(step, weighted)
                acc.backward(loss)
            # G: clip, learning rate, step
            common.clip(acc, opt_G, cfg.clip)
            common.set_lr(opt_G, cfg.lr, step, cfg)
            opt_G.step()
            opt_G.zero_grad()
            # D: forward, loss, backward, clip, learning rate (falls with G's), step
            if gan:
                with torch.no_grad(), acc.autocast():
                    z_H = sd.encode(x_hq, noise_for(n, shape, run.seed, "z_H")).float()  # (B, C, h, w)
                t = random_timesteps(n, cfg.t_F + 1, run.seed, "t, D")  # the same for both
                noise = torch.cat([noise_for(n, shape, run.seed, f"F, {z}") for z in ("z_hat", "z_H")])
                z = torch.cat([z_hat.detach(), z_H])  # (2 B, C, h, w)
                fake, true = D(z, t.repeat(2), e_img.detach().repeat(2, 1, 1), noise).chunk(2)
                l_D = loss_D(fake, true)
                run.ledger(step, {"gan_d": l_D})
                acc.backward(l_D)
                common.clip(acc, opt_D, cfg.clip)
                common.set_lr(opt_D, cfg.lr_D, step, cfg)
                opt_D.step()
                opt_D.zero_grad()
                logged = {"gan_d": l_D, "right": critic.accuracy(fake, true)}
        run.log(step, **logged, **terms, tau=tau.mean(), loss=loss)
        run.save(step)
    run.finish(G, fingerprint=sd.fingerprint)


def random_timesteps(n: Tensor, T: int, seed: int, stream: str) -> Tensor:
    """t (B,) uniform in 0..T - 1, entry i that of sample n[i]."""
    return torch.tensor([int(rng(seed, stream, i).integers(T)) for i in n.tolist()], device=n.device)


# ------------------------------------------------------------------------------- one-step inference


def load(weights: Path, base: str | None = None) -> SODiff:
    """The trained generator of a run's folder, LoRA fused, on the device at hand, ready for `restore`."""
    cfg, tensors, header = Stage2.read(weights, "sodiff")
    G = generator(base or header["base"], weights, cfg)
    G.sd.check(header, weights)
    return common.for_inference(load_trained(G, tensors, weights))


@torch.inference_mode()
def restore(model: SODiff, image: Image.Image, tiles=whole) -> tuple[Image.Image, float | None, float]:
    """One JPEG-compressed image, any size -> (its restored self, predicted QF or None, timestep): one UNet
    call, no noise drawn; networks on the whole of it, or as `tiles` applies them. e_img, QF and tau are the
    picture's, or of patches that stand for it."""
    x = pad_to(to_tensor(image)[None], model.cell)       # (1, 3, H, W), sides: multiples of 32
    e_img, qf_hat, tau = model.condition(tiles.mosaic(x))  # (1, 77, D_text), (1,), (1,)
    z_L = tiles(model.sd.encode, x)                      # (1, C, h, w)
    z_hat = tiles(lambda z: model.denoise(z, e_img, tau), z_L)  # Eq. 6, the one step
    x_hat = tiles(model.sd.decode, z_hat)                # as x
    x_hat = x_hat[:, :, :image.height, :image.width]     # without the padding
    return to_image(x_hat[0]), None if qf_hat is None else qf_hat.clamp(1, 100).item(), tau.item()


# ------------------------------------------------------------------------------------- command line


def train(args) -> None:
    cfg1, cfg2 = Stage1.of(args), Stage2.of(args)
    # Before any work, as its weights may have to be downloaded:
    dists = common.dists(cfg2.dists)
    run = common.tool("runs").Run(args, common.SD21_BASE, cfg1, cfg2)
    if args.stage in ("1", "all"):
        stage1(run, cfg1)
    if args.stage in ("2", "all"):
        stage2(run, cfg2, dists)
        run.evaluate()


def model_flags(p) -> None:
    """Of restore and eval."""
    p.model_flags("sodiff")


def restorer(args, model: SODiff | None = None):
    """What restore does, by the model of `args` or another: image -> (restored image, remark)."""
    model = model or load(args.weights, args.base)
    tiles_for = common.tool("tiles").tiling(model, args.tile)
    remark = common.tool("quality").remarks(args.weights)

    def restore_and_tell(image: Image.Image) -> tuple[Image.Image, str]:
        result, qf_hat, tau = restore(model, image, tiles_for(image.size))
        predicted = "" if qf_hat is None else f", predicted QF {qf_hat:.0f}"
        return result, f"{predicted}{remark(qf_hat)}, timestep {tau:.1f}"
    return restore_and_tell


def main(argv: list[str] | None = None) -> None:
    cli = common.tool("runs").CommandLine.of(sys.modules[__name__])
    cli.train(train, Stage1, Stage2)
    model_flags(cli.restore(restorer))
    cli.start(argv)


if __name__ == "__main__":
    main()
