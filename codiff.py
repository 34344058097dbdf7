"""CODiff: Compression-Aware One-Step Diffusion Model for JPEG Artifact Removal (ICCV 2025, 2502.09873v2).

    x_lq -> VAE enc (LoRA) -> z_L -> UNet (LoRA; t = T_L, prompt c_L) -> Eq. 1 -> z_hat -> VAE dec -> x_hat
       \\-> CaVE (stage 1; frozen in stage 2) -> tokens -> linear -> c_L

| paper    | code       | shape                   | range                                                    |
| -------- | ---------- | ----------------------- | -------------------------------------------------------- |
| I_L, I_H | x_lq, x_hq | (B, 3, H, W)            | [-1, 1]; the JPEG and its original                       |
| c_L      | c_L        | (B, H W / 1024, D_text) | CaVE's tokens (512 wide) after the release's linear map  |
| z_L, z_H | z_L, z_H   | (B, C, H / 8, W / 8)    | latents of both, scaling factor applied                  |
| z_hat_H  | z_hat      | as z_L                  | one-step estimate of the original's latent               |
| I_hat_H  | x_hat      | as x_lq                 | the restored picture                                     |
| T_L      | T_L        | integer                 | timestep at which the JPEG's latent enters               |
| QF       | q          | (B,)                    | (100 - QF) / 100, in (0, 1)                              |

What differs from paper or release stands at its place, marked DIFFERS.
Left out: the DAPE prompt of Table 3 (another project's network).

    python codiff.py train                     # both stages on the bundled tiny-sd, a table and a picture
    python codiff.py restore photo.jpg -o photo.png
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

from common import (SD, Crops, Discriminator, Settings, add_lora, frozen, jpeg, load_trained, noise_for,
                    pad_to, rng, setting, to_image, to_tensor, whole)

# ----------------------------------------------------------------------------------------- settings

LEARNING, PROMPTS = ("dual", "explicit", "implicit"), ("cave", "learnable", "empty")
LOSSES = "l2", "dists", "gan"


@dataclass
class Stage1(Settings):
    """CaVE, Sec. 3.2."""
    number = 1
    #                           tiny run             paper run
    widths: tuple     = setting((16, 32, 64, 128),   (64, 128, 256, 512), "Sec. 3.2.2")
    blocks: int       = setting(1,                   4,                   "released code")
    gain: float       = setting(1.0,                 0.2,                 "released code: orthogonal start")
    highpass: float   = setting(8.0,                 0.0,                 "ours: gain of first filters")
    crop: int         = setting(64,                  256,                 "Sec. 4.1", least=1)
    qf_min: int       = setting(8,                   8,                   "Sec. 4.1", least=1, most="qf_max")
    qf_max: int       = setting(95,                  95,                  "Sec. 4.1", most=100)
    off_grid: float   = setting(0.5,                 0.5,                 "released code: of crops", most=1)
    learning: str     = setting("dual",              "dual",        "Table 4", "learning", choices=LEARNING)
    lambda_rec: float = setting(3.0,                 1000.0,              "Sec. 4.1, Eq. 6's lambda")
    lr: float         = setting(1e-3,                2e-5,                "Sec. 4.1")
    batch: int        = setting(16,                  128,                 "Sec. 4.1", least=1)
    steps: int        = setting(400,                 200_000,             "Sec. 4.1", least=1)


@dataclass
class Stage2(Settings):
    """The one-step generator and its discriminator, Secs. 3.1 and 3.3."""
    number = 2
    #                             tiny run  paper run
    T_L: int            = setting(99,       499,      "released code", most=999)
    rank: int           = setting(16,       16,       "Sec. 4.1", least=1)
    crop: int           = setting(128,      256,      "Sec. 4.1", least=1)
    qf_min: int         = setting(5,        8,        "Sec. 4.1", least=1, most="qf_max")
    qf_max: int         = setting(12,       95,       "Sec. 4.1", most=100)
    off_grid: float     = setting(0.0,      0.5,      "released code: of crops", most=1)
    prompt: str         = setting("cave",   "cave",   "Table 3", "prompt", choices=PROMPTS)
    losses: tuple       = setting(LOSSES,   LOSSES,   "Table 5: what counts", "losses", choices=LOSSES)
    dists: str          = setting("tiny-vgg", "vgg16", "Eq. 7")
    lambda_P: float     = setting(1.0,      1.0,      "Sec. 4.1, Eq. 7")
    lambda_G: float     = setting(5e-3,     5e-3,     "Sec. 4.1, Eq. 10")
    T_D: int            = setting(0,        199,      "released code: D's timestep", most=999)
    lr: float           = setting(2e-3,     5e-5,     "Sec. 4.1")
    lr_D: float         = setting(5e-4,     5e-5,     "Sec. 4.1: one for both")
    weight_decay: float = setting(1e-5,     1e-5,     "Sec. 4.1")
    clip: float         = setting(1.0,      1.0,      "released code: gradient norm")
    checkpointing: bool = setting(False,    False,    "ours: less memory, more time")
    batch: int          = setting(4,        32,       "Sec. 4.1", least=1)
    steps: int          = setting(320,      100_000,  "Sec. 4.1", least=1)


# --------------------------------------------------------------------------------------------- data


class JPEGPairs(Crops):
    """Sample n -> (n, x_lq, x_hq, q): a crop, flipped and turned as released, and its JPEG, QF uniform in
    qf_min..qf_max (Sec. 4.1). DIFFERS: the release draws three in four from {10, 20, ..., 60}."""

    def __init__(self, folders, cfg: Stage1 | Stage2, stride: int, seed: int):
        cfg.check_multiple("crop", stride)
        super().__init__(folders, cfg.crop + 8, seed)  # 8 pixels more: room for the offset below
        self.cfg = cfg

    def __getitem__(self, n: int) -> tuple[int, Tensor, Tensor, Tensor]:
        r = rng(self.seed, "degradation", n)
        hq = Image.fromarray(self.crop(n))  # crop + 8 pixels a side
        qf = int(r.integers(self.cfg.qf_min, self.cfg.qf_max + 1))
        lq = jpeg(hq, qf)
        # Photographs from the web have often been cropped after compression: of our crops, too, `off_grid`
        # (half of them in the release) begin anywhere in JPEG's grid of 8x8 blocks, the others on it.
        left, top = r.integers(0, 9, 2).tolist() if r.random() < self.cfg.off_grid else (0, 0)
        box = (left, top, left + self.cfg.crop, top + self.cfg.crop)
        return n, to_tensor(lq.crop(box)), to_tensor(hq.crop(box)), torch.tensor((100 - qf) / 100)


# -------------------------------------------------------------------------------------------- model


class Residual(nn.Module):
    """x + Conv(ReLU(BN(Conv(x)))), Sec. 3.2.2. DIFFERS: the release's BN has momentum 0.9, this one 0.1."""

    def __init__(self, c: int):
        super().__init__()
        self.res = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c, eps=1e-4), nn.ReLU(),
                                 nn.Conv2d(c, c, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res(x)


class CaVE(nn.Module):
    """Compression-aware visual embedder, Fig. 3: a UNet whose bottom features are the prompt's tokens.

    Input (B, 3, H, W) in [0, 1], H and W multiples of 32. Modules carry the names of the released
    checkpoint. DIFFERS: the paper says that all down-convolutions have stride 4; in the release the first
    has stride 2, which makes 32 in all, and one token per 32x32 pixels."""

    cell = 32

    def __init__(self, widths: tuple[int, int, int, int], blocks: int, crop: int = 256):
        super().__init__()
        c1, c2, c3, c4 = widths
        self.width = c4  # of a token
        self.crop = crop  # pixels a side, of what it learns on

        def body(c):
            return [Residual(c) for _ in range(blocks)]

        self.m_head = nn.Conv2d(3, c1, 3, padding=1)                      # H
        self.m_down1 = nn.Sequential(*body(c1), nn.Conv2d(c1, c2, 2, 2))  # H / 2
        self.m_down2 = nn.Sequential(*body(c2), nn.Conv2d(c2, c3, 4, 4))  # H / 8
        self.m_down3 = nn.Sequential(*body(c3), nn.Conv2d(c3, c4, 4, 4))  # H / 32
        self.m_body_encoder = nn.Sequential(*body(c4))
        # From here on: stage 1 only. The way back up, for implicit learning:
        self.m_body_decoder = nn.Sequential(*body(c4))
        self.m_up3 = nn.Sequential(nn.ConvTranspose2d(c4, c3, 4, 4), *body(c3))
        self.m_up2 = nn.Sequential(nn.ConvTranspose2d(c3, c2, 4, 4), *body(c2))
        self.m_up1 = nn.Sequential(nn.ConvTranspose2d(c2, c1, 2, 2), *body(c1))
        self.m_tail = nn.Conv2d(c1, 3, 3, padding=1)
        # P, for explicit learning. DIFFERS: Sec. 3.2.2 averages the tokens and then applies P; the release
        # averages after P's convolutions, which makes its 3x3 kernels more than multiplications.
        self.qf_pred = nn.Sequential(*body(c4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),  # (B, c4)
                                     nn.Linear(c4, c4), nn.ReLU(), nn.Linear(c4, c4), nn.ReLU(),
                                     nn.Linear(c4, 1), nn.Sigmoid())

    @torch.no_grad()
    def initialise(self, gain: float, highpass: float) -> CaVE:
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.orthogonal_(m.weight, gain)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.1, 1.0)
        if highpass:
            # QF shows in fine detail, which random filters drown in brightness: without these second
            # differences of each colour, some hundred steps teach the QF head no more than a constant.
            d2, one = torch.tensor([[-1.0, 2.0, -1.0], [0.0, 1.0, 0.0]])
            kernels = torch.outer(d2, d2) / 4, torch.outer(one, d2) / 2, torch.outer(d2, one) / 2  # 3x3 each
            for i, kernel in enumerate(kernels):
                for colour in range(3):
                    self.m_head.weight[3 * i + colour] = 0
                    self.m_head.weight[3 * i + colour, colour] = highpass * kernel
        return self

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        h0 = self.m_head(x)    # (B, c1, H, W)
        h1 = self.m_down1(h0)  # (B, c2, H / 2, W / 2)
        h2 = self.m_down2(h1)  # (B, c3, H / 8, W / 8)
        h3 = self.m_down3(h2)  # (B, c4, H / 32, W / 32)
        return self.m_body_encoder(h3), [h0, h1, h2, h3]  # Eq. 3's tokens, still a map; skips

    def embed(self, x: Tensor) -> Tensor:
        # Eq. 3: the paper's c_L, which has no linear map; tokens row by row
        return self.encode(x)[0].flatten(2).transpose(1, 2)  # (B, H W / 1024, c4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(q_hat (B,), reconstruction (B, 3, H, W)): what dual learning supervises."""
        f, (h0, h1, h2, h3) = self.encode(x)
        h = self.m_body_decoder(f) + h3    # (B, c4, H / 32, W / 32)
        h = self.m_up3(h) + h2             # (B, c3, H / 8, W / 8)
        h = self.m_up2(h) + h1             # (B, c2, H / 2, W / 2)
        h = self.m_up1(h) + h0             # (B, c1, H, W)
        return self.qf_pred(f).squeeze(1), self.m_tail(h)

    @torch.inference_mode()
    def qf(self, image: Image.Image) -> float:
        """Mean of crops as large as in training: padding shows in P, and of whole pictures QF is too low."""
        x = common.spread_crops(image, self.crop).to(self.m_head.weight)  # (n, 3, crop, crop)
        return 100 - 100 * self.qf_pred(self.encode((x + 1) / 2)[0]).mean().item()


class CODiff(nn.Module):
    """The one-step generator G_theta of Eq. 2, to which `add_lora` adds LoRA. Its prompt is CaVE's tokens, or
    for Table 3's ablation the same `tokens` (L, D_text) for every image."""

    def __init__(self, base: str | Path, cfg: Stage2, cave: CaVE | None, tokens: Tensor | None = None,
                 weights: bool = True):
        super().__init__()
        self.base, self.T_L = base, cfg.T_L
        self.sd = SD(base, weights=weights)
        self.cave = cave.eval().requires_grad_(False) if cave else None  # frozen, Sec. 3.3
        if cave:
            self.proj = nn.Linear(cave.width, self.sd.unet.config.cross_attention_dim)  # as released
        elif cfg.prompt == "learnable":
            self.tokens = nn.Parameter(torch.randn_like(tokens) * 0.02)
        else:
            self.register_buffer("tokens", tokens)  # of the empty caption
        self.cell = CaVE.cell  # a token's, 32 pixels; a latent's is 8
        self.stride = max(CaVE.cell, self.sd.stride)

    def add_lora(self, rank: int) -> CODiff:
        """LoRA on the UNet and on the VAE encoder, Sec. 3.3. The decoder stays.
        DIFFERS: the release scales LoRA by 0.5 and also trains conv_in's own weights; the paper says LoRA."""
        add_lora(self.sd.unet, rank)  # all but the time embeddings
        add_lora(self.sd.vae, rank, ("encoder", "quant_conv"))
        return self

    def train(self, mode: bool = True):
        super().train(mode)
        if self.cave:
            self.cave.eval()  # frozen, and its BatchNorm statistics with it
        return self

    def condition(self, x_lq: Tensor) -> Tensor:
        """c_L (B, L, D_text)."""
        if self.cave is None:
            return self.tokens.expand(len(x_lq), -1, -1)
        tokens = self.cave.embed(((x_lq + 1) / 2).to(self.proj.weight.dtype))  # (B, H W / 1024, c4)
        return self.proj(tokens)

    def denoise(self, x_lq: Tensor, z_L: Tensor) -> Tensor:
        c_L = self.condition(x_lq)
        eps = self.sd.unet(z_L.to(self.sd.unet.dtype), self.T_L, c_L).sample  # (B, C, h, w)
        # Eq. 1:  z_hat = (z_L - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)
        return self.sd.x0(z_L, eps, self.sd.alpha_bar[self.T_L])

    def forward(self, x_lq: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x_lq (B, 3, H, W) in [-1, 1], sides multiples of `cell` -> (x_hat, z_hat). With `noise` z_L is a
        sample of the VAE's posterior, else its mean."""
        z_L = self.sd.encode(x_lq, noise)  # (B, C, H / 8, W / 8)
        z_hat = self.denoise(x_lq, z_L)    # as z_L
        # Eq. 2; clamped before the losses, as released
        return self.sd.decode(z_hat).clamp(-1, 1), z_hat


# ------------------------------------------------------------------------------------------- losses


def loss_qf(q_hat: Tensor, q: Tensor) -> Tensor:
    # Eq. 4. DIFFERS: printed of QF itself; here, as in the release, of (100 - QF) / 100, the sigmoid's range,
    # which lambda = 1000 was weighed against
    return F.l1_loss(q_hat, q)


def loss_rec(x_hat: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 5.  DIFFERS: printed as a norm; the mean, as in the release, is what lambda = 1000 weighs
    return F.l1_loss(x_hat, x_hq)


def loss_2(x_hat: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 7, first term, on [0, 1]; the second is common.DISTS
    return F.mse_loss((x_hat + 1) / 2, (x_hq + 1) / 2)


def loss_G(logits_fake: Tensor) -> Tensor:
    # Eq. 8: -log sigmoid(D(z_hat)) = softplus(-D(z_hat))
    return F.softplus(-logits_fake).mean()


def loss_D(logits_fake: Tensor, logits_real: Tensor) -> Tensor:
    # Eq. 9: -log(1 - sigmoid(D(z_hat))) - log sigmoid(D(z_H)).  DIFFERS: the release halves it, times 1e-2.
    # DIFFERS: Eqs. 8 and 9 are expectations over t; T_D is one, as released. D's head, "a lightweight MLP" in
    # the paper, is two 4x4 convolutions as released: 52.5 M parameters at SD 2.1's size.
    return F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()


# ------------------------------------------------------------------------------------------ stage 1


def stage1(run, cfg: Stage1) -> None:
    """Dual learning of CaVE: QF prediction (explicit) and reconstruction (implicit), Sec. 3.2. `run`, of
    data/runs.py, knows where training stood; it brings batches, keeps the log and saves."""
    torch.manual_seed(run.seed)
    cave = CaVE(cfg.widths, cfg.blocks).initialise(cfg.gain, cfg.highpass)
    pairs = JPEGPairs(run.data, cfg, CaVE.cell, run.seed)
    # Of several processes each BatchNorm sees its own share. bf16 would lose what these L1 losses measure.
    acc = run.start(cfg, float32=True, CaVE=cave)
    cave, adam = acc.prepare(cave.train(), torch.optim.Adam(cave.parameters(), cfg.lr))
    # Eq. 6's weights; Table 4 learns by one of the two alone
    w = {"qf": 1.0 * (cfg.learning != "implicit"), "rec": cfg.lambda_rec * (cfg.learning != "explicit")}
    first = run.resume({"cave": cave}, {"adam": adam})  # 0, or the step at which the run was stopped
    for step, (_, x_lq, x_hq, q) in run.batches(pairs, first):
        with acc.accumulate(cave):  # cfg.accumulate batches make a step
            # forward
            q_hat, x_rec = cave((x_lq + 1) / 2)  # (B,), (B, 3, H, W) in [0, 1]
            # losses
            terms = {"qf": loss_qf(q_hat, q), "rec": loss_rec(x_rec, (x_hq + 1) / 2)}
            weighted = {k: w[k] * term for k, term in terms.items()}
            loss = sum(weighted.values())  # Eq. 6
            run.ledger(step, weighted)
            # backward, clip, learning rate, step
            acc.backward(loss)
            common.clip(acc, adam, cfg.clip)
            common.set_lr(adam, cfg.lr, step, cfg)
            adam.step()  # accelerate has it wait for the step's last batch, and zero_grad too
            adam.zero_grad()
        run.log(step, **terms, loss=loss)
        run.save(step)
    run.finish(cave)


def load_cave(weights: Path) -> CaVE:
    """CaVE as stage 1 of the run in the folder `weights` left it."""
    cfg, tensors, _ = Stage1.read(weights, "codiff")
    return load_trained(CaVE(cfg.widths, cfg.blocks, cfg.crop), tensors, weights)


# ------------------------------------------------------------------------------------------ stage 2


def networks(run, cfg: Stage2) -> tuple[CODiff, Discriminator]:
    """The generator and its discriminator, untrained but for CaVE."""
    cave = load_cave(run.folder) if cfg.prompt == "cave" else None
    tokens = None if cave else common.text_tokens(run.base, [""])[0]  # (77, D_text)
    G = CODiff(run.base, cfg, cave, tokens)
    D = Discriminator(run.base, cfg.rank)
    G.add_lora(cfg.rank)
    for m in (G.sd.unet, G.sd.vae, D.unet) if cfg.checkpointing else ():
        m.enable_gradient_checkpointing()
    return G.train(), D.train()


def stage2(run, cfg: Stage2, dists: nn.Module) -> None:
    """The generator against its discriminator, with CaVE frozen, Sec. 3.3."""
    torch.manual_seed(run.seed + 1)
    G, D = networks(run, cfg)
    pairs = JPEGPairs(run.data, cfg, G.stride, run.seed + 1)
    real = SD(run.base, with_unet=False)  # makes z_H, untouched as in the release
    acc = run.start(cfg, generator=G, discriminator=D, untouched=real)
    opt_G = torch.optim.AdamW(G.parameters(), cfg.lr, weight_decay=cfg.weight_decay)
    opt_D = torch.optim.AdamW(D.parameters(), cfg.lr_D, weight_decay=cfg.weight_decay)
    G, D, opt_G, opt_D = acc.prepare(G, D, opt_G, opt_D)
    dists.to(acc.device)
    critic = acc.unwrap_model(D)
    shape = real.latent_shape(cfg.crop)  # (C, h, w)
    gan = "gan" in cfg.losses
    # Weights in Eqs. 7 and 10; Table 5 leaves terms out
    w = {"l2": 1.0 * ("l2" in cfg.losses), "dists": cfg.lambda_P * ("dists" in cfg.losses),
         "gan_g": cfg.lambda_G * gan}
    first = run.resume({"G": G, "D": D}, {"opt_G": opt_G, "opt_D": opt_D})
    for step, (n, x_lq, x_hq, _) in run.batches(pairs, first):
        logged = {}
        with acc.accumulate(G, D):
            # G: forward
            x_hat, z_hat = G(x_lq, noise_for(n, shape, run.seed, "z_L"))  # (B, 3, H, W), (B, C, h, w)
            # G: losses. DIFFERS: in the release the critic's UNet runs under no_grad, which makes Eq. 8 a
            # constant for G and leaves Eq. 9 to the head; here its parameters are frozen, not its graph.
            with frozen(critic):  # until after backward: checkpointing runs its forward again there
                terms = {"l2": loss_2(x_hat, x_hq), "dists": dists(x_hat, x_hq).mean(),
                         "gan_g": loss_G(critic(z_hat, cfg.T_D))}
                weighted = {k: w[k] * term for k, term in terms.items()}
                loss = sum(weighted.values())  # Eq. 10
                run.ledger(step, weighted)
                # G: backward
                acc.backward(loss)
            # G: clip, learning rate, step
            common.clip(acc, opt_G, cfg.clip)
            common.set_lr(opt_G, cfg.lr, step, cfg)
            opt_G.step()
            opt_G.zero_grad()
            # D: forward, loss, backward, clip, step; at a constant rate, so that it keeps telling them apart
            if gan:
                with torch.no_grad(), acc.autocast():
                    z_H = real.encode(x_hq, noise_for(n, shape, run.seed, "z_H")).float()  # (B, C, h, w)
                fake, true = D(torch.cat([z_hat.detach(), z_H]), cfg.T_D).chunk(2)  # (B, 1, ., .) each
                l_D = loss_D(fake, true)
                run.ledger(step, {"gan_d": l_D})
                acc.backward(l_D)
                common.clip(acc, opt_D, cfg.clip)
                opt_D.step()
                opt_D.zero_grad()
                logged = {"gan_d": l_D, "right": critic.accuracy(fake, true)}
        run.log(step, **logged, **terms, loss=loss)
        run.save(step)
    run.finish(G, fingerprint=acc.unwrap_model(G).sd.fingerprint)


# ------------------------------------------------------------------------------- one-step inference


def load(weights: Path, base: str | None = None) -> CODiff:
    """The trained generator of a run's folder, LoRA fused, on the device at hand, ready for `restore`."""
    cfg, tensors, header = Stage2.read(weights, "codiff")
    cave = load_cave(weights) if cfg.prompt == "cave" else None
    G = CODiff(base or header["base"], cfg, cave, tensors.get("tokens")).add_lora(cfg.rank)  # to be filled
    G.sd.check(header, weights)
    return common.for_inference(load_trained(G, tensors, weights))


@torch.inference_mode()
def restore(model: CODiff, image: Image.Image, color_fix: str = "adain", tiles=whole) -> Image.Image:
    """One JPEG-compressed image, any size, to its restored self: one UNet call, no noise drawn; networks on
    the whole of it, or as `tiles` applies them. AdaIN to the input's colours is the release's. DIFFERS: it
    resizes to multiples of 8 and samples the latent; here pad, crop, and the mean."""
    x_lq = to_tensor(image)[None]          # (1, 3, H, W)
    x = pad_to(x_lq, model.cell)           # sides: multiples of 32
    z_L = tiles(model.sd.encode, x)        # (1, C, h, w)
    z_hat = tiles(model.denoise, x, z_L)   # Eq. 1, the one step
    x_hat = tiles(model.sd.decode, z_hat)  # as x
    x_hat = x_hat[:, :, :image.height, :image.width].clamp(-1, 1).float()  # without the padding
    if color_fix == "adain":
        x_hat = adain(x_hat, x_lq.to(x_hat.device))
    return to_image(x_hat[0])


def adain(x: Tensor, reference: Tensor) -> Tensor:
    """x (B, C, h, w) with each channel's mean and standard deviation changed to the reference's."""
    mean, mean_to = (m.mean((2, 3), keepdim=True) for m in (x, reference))  # (B, C, 1, 1)
    x, reference = x - mean, reference - mean_to
    std, std_to = (m.norm(dim=(2, 3), keepdim=True) / m[0, 0].numel()**0.5 for m in (x, reference))
    return torch.addcmul(mean_to, x, std_to / std.clamp_min(1e-5))  # a flat channel stays flat


# ------------------------------------------------------------------------------------- command line


def train(args) -> None:
    cfg1, cfg2 = Stage1.of(args), Stage2.of(args)
    # Before any work, as its weights may have to be downloaded:
    dists = common.dists(cfg2.dists)
    run = common.tool("runs").Run(args, common.SD21_BASE, cfg1, cfg2)
    if args.stage == "1" or args.stage == "all" and cfg2.prompt == "cave":
        stage1(run, cfg1)
    if args.stage in ("2", "all"):
        stage2(run, cfg2, dists)
        run.evaluate()


def model_flags(p) -> None:
    """Of restore and eval."""
    p.model_flags("codiff")
    p.add_argument("--color-fix", choices=["adain", "none"], default="adain",
                   help="AdaIN matches each channel's mean and deviation to the input's")


def restorer(args, model: CODiff | None = None):
    """What restore does, by the model of `args` or another: image -> (restored image, remark)."""
    model = model or load(args.weights, args.base)
    tiles_for = common.tool("tiles").tiling(model, args.tile)
    remark = common.tool("quality").remarks(args.weights)
    return lambda image: (restore(model, image, args.color_fix, tiles_for(image.size)),
                          remark(model.cave and model.cave.qf(image)))


def main(argv: list[str] | None = None) -> None:
    cli = common.tool("runs").CommandLine.of(sys.modules[__name__])
    cli.train(train, Stage1, Stage2)
    model_flags(cli.restore(restorer))
    cli.start(argv)


if __name__ == "__main__":
    main()
