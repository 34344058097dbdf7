"""CODiff: Compression-Aware One-Step Diffusion Model for JPEG Artifact Removal (ICCV 2025, 2502.09873v2).

    x_lq -> VAE enc (LoRA) -> z_L -> UNet (LoRA; t = T_L, prompt c_L) -> Eq. 1 -> z_hat -> VAE dec -> x_hat
       \\-> CaVE (stage 1; frozen in stage 2) -> tokens -> linear -> c_L

| paper    | code    | shape                  | range                                             |
| -------- | ------- | ---------------------- | ------------------------------------------------- |
| I_L, I_H | x_lq, x_hq | (B, 3, H, W)        | [-1, 1]; the JPEG and its original                |
| c_L      | c_L     | (B, H W / 1024, 512)   | CaVE's tokens; after the linear map (.., D_text)  |
| z_L      | z_L     | (B, C, H / 8, W / 8)   | latent of the JPEG, scaling factor applied        |
| z_hat_H  | z_hat   | as z_L                 | one-step estimate of the original's latent        |
| T_L      | T_L     | integer                | timestep at which the JPEG's latent enters        |
| QF       | q       | (B,)                   | (100 - QF) / 100, in (0, 1)                       |

What differs from paper or release stands at its place, in lines beginning DIFFERS.
Left out: the DAPE prompt of Table 3 (another project's network).

    python codiff.py train                     # both stages on the bundled tiny-sd, a table and a picture
    python codiff.py restore photo.jpg -o photo.png
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import common
from common import (SD, SD21_BASE, CommandLine, Crops, Discriminator, Run, Stage, Tiles, add_lora, both,
                    frozen, jpeg, load_trained, noise_for, pad_to, read_model, rng, to_image, to_tensor)

# ------------------------------------------------------------------------------------ configurations

LEARNING, PROMPTS = ("dual", "explicit", "implicit"), ("cave", "learnable", "empty")
LOSSES, DISTS = ("l2", "dists", "gan"), ("small", "vgg16")


@dataclass
class Stage1(Stage):
    """CaVE, Sec. 3.2."""
    #                           tiny run             paper run
    widths: tuple        = both((16, 32, 64, 128),   (64, 128, 256, 512), "Sec. 3.2.2")
    blocks: int          = both(1,                   4,                   "released code")
    gain: float          = both(1.0,                 0.2,                 "released code: orthogonal start")
    highpass: float      = both(8.0,                 0.0,                 "ours: gain of first filters")
    crop: int            = both(64,                  256,                 "Sec. 4.1")
    qf_min: int          = both(8,                   8,                   "Sec. 4.1", most=100)
    qf_max: int          = both(95,                  95,                  "Sec. 4.1", most=100)
    off_grid: float      = both(0.5,                 0.5,                 "released code: of crops", most=1)
    learning: str        = both("dual",              "dual",              "Table 4", "learning", LEARNING)
    lambda_rec: float    = both(3.0,                 1000.0,              "Sec. 4.1, Eq. 6's lambda")
    lr: float            = both(1e-3,                2e-5,                "Sec. 4.1")
    batch: int           = both(16,                  128,                 "Sec. 4.1")
    steps: int           = both(400,                 200_000,             "Sec. 4.1")


@dataclass
class Stage2(Stage):
    """The one-step generator and its discriminator, Secs. 3.1 and 3.3."""
    #                           tiny run     paper run
    T_L: int             = both(99,          499,       "released code", most=999)
    rank: int            = both(16,          16,        "Sec. 4.1")
    crop: int            = both(128,         256,       "Sec. 4.1")
    qf_min: int          = both(5,           8,         "Sec. 4.1", most=100)
    qf_max: int          = both(12,          95,        "Sec. 4.1", most=100)
    off_grid: float      = both(0.0,         0.5,       "released code: of crops", most=1)
    prompt: str          = both("cave",      "cave",    "Table 3", "prompt", PROMPTS)
    losses: tuple        = both(LOSSES,      LOSSES,    "Table 5: the terms that count", "losses", LOSSES)
    dists: str           = both("small",     "vgg16",   "Eq. 7; 'small' needs no download", None, DISTS)
    lambda_P: float      = both(0.004,       1.0,       "Sec. 4.1, Eq. 7")
    lambda_G: float      = both(5e-4,        5e-3,      "Sec. 4.1, Eq. 10")
    T_D: int             = both(0,           199,       "released code: D's timestep", most=999)
    lr: float            = both(6e-4,        5e-5,      "Sec. 4.1")
    lead: float          = both(0.3,         0.0,       "ours: first part of the run, of D alone", most=1)
    lr_D: float          = both(5e-4,        5e-5,      "Sec. 4.1: one for both")
    weight_decay: float  = both(1e-5,        1e-5,      "Sec. 4.1")
    clip: float          = both(1.0,         1.0,       "released code: gradient norm")
    checkpointing: bool  = both(False,       False,     "ours: less memory, more time")
    batch: int           = both(4,           32,        "Sec. 4.1")
    steps: int           = both(320,         100_000,   "Sec. 4.1")


# --------------------------------------------------------------------------------------------- data


class JPEGPairs(Crops):
    """Sample n -> (n, x_lq, x_hq, q): a crop and its JPEG, QF uniform in qf_min..qf_max (Sec. 4.1).
    DIFFERS: the release draws three in four from {10, 20, ..., 60}. Crops are flipped and rotated too (ours).

    Of the crops `off_grid` are cut off the JPEG's 8x8 grid, at an offset of 0..8 pixels an axis, half of them
    in the released code: photographs from the web have often been cropped after compression."""

    def __init__(self, folders, cfg: Stage1 | Stage2, multiple: int, seed: int):
        cfg.check_crop(multiple)
        super().__init__(folders, cfg.crop + 8, seed)
        self.cfg = cfg

    def __getitem__(self, n: int) -> tuple[int, Tensor, Tensor, Tensor]:
        r = rng(self.seed, 2, n)
        hq = Image.fromarray(self.crop(n))
        qf = int(r.integers(self.cfg.qf_min, self.cfg.qf_max + 1))
        lq = jpeg(hq, qf)
        left, top = r.integers(0, 9, 2).tolist() if r.random() < self.cfg.off_grid else (0, 0)
        box = (left, top, left + self.cfg.crop, top + self.cfg.crop)
        return n, to_tensor(lq.crop(box)), to_tensor(hq.crop(box)), torch.tensor((100 - qf) / 100)


# -------------------------------------------------------------------------------------------- model


class Residual(nn.Module):
    """x + Conv(ReLU(BN(Conv(x)))), Sec. 3.2.2."""

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

    stride = 32

    def __init__(self, widths: tuple[int, int, int, int], blocks: int):
        super().__init__()
        c1, c2, c3, c4 = widths
        self.width = c4  # of a token

        def body(c):
            return [Residual(c) for _ in range(blocks)]

        self.m_head = nn.Conv2d(3, c1, 3, padding=1)
        self.m_down1 = nn.Sequential(*body(c1), nn.Conv2d(c1, c2, 2, 2))
        self.m_down2 = nn.Sequential(*body(c2), nn.Conv2d(c2, c3, 4, 4))
        self.m_down3 = nn.Sequential(*body(c3), nn.Conv2d(c3, c4, 4, 4))
        self.m_body_encoder = nn.Sequential(*body(c4))
        # From here on: stage 1 only.
        self.m_body_decoder = nn.Sequential(*body(c4))
        self.m_up3 = nn.Sequential(nn.ConvTranspose2d(c4, c3, 4, 4), *body(c3))
        self.m_up2 = nn.Sequential(nn.ConvTranspose2d(c3, c2, 4, 4), *body(c2))
        self.m_up1 = nn.Sequential(nn.ConvTranspose2d(c2, c1, 2, 2), *body(c1))
        self.m_tail = nn.Conv2d(c1, 3, 3, padding=1)
        # DIFFERS: Sec. 3.2.2 averages the tokens first and then applies P; averaging after P's convolutions
        # is what the release does, and what makes its 3x3 kernels more than multiplications.
        self.qf_pred = nn.Sequential(*body(c4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
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
            d2, one = torch.tensor([-1.0, 2.0, -1.0]), torch.tensor([0.0, 1.0, 0.0])
            kernels = torch.outer(d2, d2) / 4, torch.outer(one, d2) / 2, torch.outer(d2, one) / 2
            for i, kernel in enumerate(kernels):
                for colour in range(3):
                    self.m_head.weight[3 * i + colour] = 0
                    self.m_head.weight[3 * i + colour, colour] = highpass * kernel
        return self

    def encode(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        h0 = self.m_head(x)
        h1 = self.m_down1(h0)
        h2 = self.m_down2(h1)
        h3 = self.m_down3(h2)
        return self.m_body_encoder(h3), [h0, h1, h2, h3]

    def embed(self, x: Tensor) -> Tensor:
        """c_L, Eq. 3: row-major tokens (B, HW / 1024, widths[3])."""
        return self.encode(x)[0].flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(q_hat (B,), reconstruction (B, 3, H, W)): what dual learning supervises."""
        c_L, (h0, h1, h2, h3) = self.encode(x)
        h = self.m_body_decoder(c_L) + h3
        h = self.m_up3(h) + h2
        h = self.m_up2(h) + h1
        h = self.m_up1(h) + h0
        return self.qf_pred(c_L).squeeze(1), self.m_tail(h)


class CODiff(nn.Module):
    """The one-step generator G_theta of Eq. 2, to which `add_lora` adds LoRA. Its prompt is CaVE's tokens, or
    for Table 3's ablation the same `tokens` (L, D_text) for every image."""

    def __init__(self, base: str | Path, cfg: Stage2, cave: CaVE | None, tokens: Tensor | None = None,
                 weights: bool = True):
        super().__init__()
        self.base, self.T_L, self.sd = base, cfg.T_L, SD(base, weights=weights)
        self.cave = cave.eval().requires_grad_(False) if cave else None
        if cave:
            self.proj = nn.Linear(cave.width, self.sd.unet.config.cross_attention_dim)
        elif cfg.prompt == "learnable":
            self.tokens = nn.Parameter(torch.randn_like(tokens) * 0.02)
        else:
            self.register_buffer("tokens", tokens)
        self.cell, self.multiple = CaVE.stride, max(CaVE.stride, self.sd.multiple)

    def add_lora(self, rank: int) -> CODiff:
        """LoRA on the UNet (all but the time embeddings) and on the VAE encoder, Sec. 3.3. The decoder stays.
        DIFFERS: the release scales LoRA by 0.5 and also trains conv_in's own weights; the paper says LoRA."""
        add_lora(self.sd.unet, rank)
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
        return self.proj(self.cave.embed(((x_lq + 1) / 2).to(self.proj.weight.dtype)))

    def denoise(self, x_lq: Tensor, z_L: Tensor) -> Tensor:
        eps = self.sd.unet(z_L.to(self.sd.unet.dtype), self.T_L, self.condition(x_lq)).sample
        # Eq. 1:  z_hat = (z_L - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)
        return self.sd.x0(z_L, eps, self.sd.alpha_bar[self.T_L])

    def forward(self, x_lq: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x_lq (B, 3, H, W) in [-1, 1], sides multiples of `cell` -> (x_hat, z_hat)."""
        z_L = self.sd.encode(x_lq, noise)
        z_hat = self.denoise(x_lq, z_L)
        # Eq. 2; clamped before the losses (ours)
        return self.sd.decode(z_hat).clamp(-1, 1), z_hat


# ------------------------------------------------------------------------------------------- losses


def loss_qf(q_hat: Tensor, q: Tensor) -> Tensor:
    # Eq. 4, on (100 - QF) / 100 as in the release: with the sigmoid's range, lambda = 1000 keeps its meaning
    return F.l1_loss(q_hat, q)


def loss_rec(x_hat: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 5.  DIFFERS: printed as a norm; the mean, as in the release, is what lambda = 1000 weighs
    return F.l1_loss(x_hat, x_hq)


def loss_2(x_hat: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 7, first term, on [0, 1]
    return F.mse_loss((x_hat + 1) / 2, (x_hq + 1) / 2)


def loss_G(logits_fake: Tensor) -> Tensor:
    # Eq. 8: -log sigmoid(D(z_hat)) = softplus(-D(z_hat))
    return F.softplus(-logits_fake).mean()


def loss_D(logits_fake: Tensor, logits_real: Tensor) -> Tensor:
    # Eq. 9: -log(1 - sigmoid(D(z_hat))) - log sigmoid(D(z_H)).  DIFFERS: the release halves it, times 1e-2
    return F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()


# ------------------------------------------------------------------------------------------ stage 1


def stage1(run: Run, cfg: Stage1) -> None:
    """Dual learning of CaVE: QF prediction (explicit) and reconstruction (implicit), Sec. 3.2."""
    torch.manual_seed(run.seed)
    cave = CaVE(cfg.widths, cfg.blocks).initialise(cfg.gain, cfg.highpass)
    w_qf, w_rec = float(cfg.learning != "implicit"), cfg.lambda_rec * (cfg.learning != "explicit")  # Table 4
    # Of several processes each BatchNorm sees its own share. bf16 would lose what these L1 losses measure.
    acc = run.start(1, cfg, float32=True, CaVE=cave)
    pairs = JPEGPairs(run.data, cfg, CaVE.stride, run.seed)
    cave, optimizer = acc.prepare(cave, torch.optim.Adam(cave.parameters(), cfg.lr))
    cave.train()
    for step, (n, x_lq, x_hq, q) in run.loop(pairs, {"cave": cave}, {"adam": optimizer}):
        with acc.accumulate(cave):
            q_hat, x_rec = cave((x_lq + 1) / 2)
            l_qf = loss_qf(q_hat, q)
            l_rec = loss_rec(x_rec, (x_hq + 1) / 2)
            # Eq. 6
            loss = w_qf * l_qf + w_rec * l_rec
            run.gradients(step, cave, qf=w_qf * l_qf, rec=w_rec * l_rec)
            acc.backward(loss)
            run.update(cave, optimizer, step)
        run.log(qf=l_qf, rec=l_rec, loss=loss)
    run.save(cave)


def load_cave(weights: Path) -> CaVE:
    """CaVE as stage 1 of the run in the folder `weights` left it."""
    tensors, header = read_model(weights, "codiff", stage=1)
    cfg = Stage1.read(header)
    return load_trained(CaVE(cfg.widths, cfg.blocks), tensors, weights)


# ------------------------------------------------------------------------------------------ stage 2


def stage2(run: Run, cfg: Stage2) -> None:
    """The generator against its discriminator, with CaVE frozen, Sec. 3.3."""
    torch.manual_seed(run.seed + 1)
    cave = load_cave(run.folder) if cfg.prompt == "cave" else None
    tokens = None if cave else common.text_tokens(run.base, [""])[0]
    G, D = CODiff(run.base, cfg, cave, tokens), Discriminator(run.base, cfg.rank)
    G.add_lora(cfg.rank)
    real = SD(run.base, with_unet=False)  # z_H comes from the untouched encoder; the paper does not say which
    dists = common.dists_vgg16() if cfg.dists == "vgg16" else common.dists_small()
    for m in (G.sd.unet, G.sd.vae, D.unet) if cfg.checkpointing else ():
        m.enable_gradient_checkpointing()
    acc, fingerprint = run.start(2, cfg, generator=G, discriminator=D), G.sd.fingerprint
    pairs = JPEGPairs(run.data, cfg, G.multiple, run.seed + 1)
    opt_G, opt_D = (torch.optim.AdamW(m.parameters(), lr, weight_decay=cfg.weight_decay)
                    for m, lr in ((G, cfg.lr), (D, cfg.lr_D)))
    G, D, opt_G, opt_D = acc.prepare(G, D, opt_G, opt_D)
    G.train(), D.train(), dists.to(acc.device), real.to(acc.device)
    critic, shape = acc.unwrap_model(D), real.latent_shape(cfg.crop)
    w = {term: float(term in cfg.losses) for term in LOSSES}  # Table 5; 1 each by default
    lead = int(cfg.lead * cfg.steps * w["gan"])

    for step, (n, x_lq, x_hq, _) in run.loop(pairs, {"G": G, "D": D}, {"opt_G": opt_G, "opt_D": opt_D}):
        with acc.accumulate(G, D):
            alone = step < lead  # D needs longer to tell real from made than G to get away from it
            with torch.set_grad_enabled(not alone):
                x_hat, z_hat = G(x_lq, noise_for(n, shape, run.seed, 3))
            l_2 = loss_2(x_hat, x_hq)
            l_dists = dists(x_hat, x_hq).mean()
            # Eq. 7
            l_per = w["l2"] * l_2 + w["dists"] * cfg.lambda_P * l_dists
            # DIFFERS: in the release the critic's UNet runs under no_grad, which makes Eq. 8 a constant for
            # the generator and leaves Eq. 9 to the head; here its parameters are frozen, not its graph.
            # DIFFERS: Eqs. 8 and 9 are expectations over t; T_D is one, as released. The head, "a lightweight
            # MLP" in the paper, is two 4x4 convolutions as released: 52.5 M parameters at SD 2.1's size.
            with frozen(critic):  # until after backward: checkpointing runs the critic's forward again there
                l_G = loss_G(critic(z_hat, cfg.T_D))
                # Eq. 10
                loss = l_per + w["gan"] * cfg.lambda_G * l_G
                run.gradients(step, G, lead, l2=l_2, dists=cfg.lambda_P * l_dists, gan_g=cfg.lambda_G * l_G)
                if not alone:
                    acc.backward(loss)
                    run.update(G, opt_G, step)

            if w["gan"]:
                z_hq = run.encode(real, x_hq, n, 4)
                fake, true = D(torch.cat([z_hat.detach(), z_hq]), cfg.T_D).chunk(2)
                l_D = loss_D(fake, true)
                acc.backward(l_D)
                run.update(D, opt_D, step, decays=False)
                run.log(gan_d=l_D, right=critic.accuracy(fake, true))
        run.log(l2=l_2, dists=l_dists, gan_g=l_G, loss=loss)
    run.save(G, fingerprint=fingerprint)


# ------------------------------------------------------------------------------- one-step inference


def load(weights: Path, base: str | None = None) -> CODiff:
    """The trained generator of a run's folder, LoRA fused, on the device at hand, ready for `restore`."""
    tensors, header = read_model(weights, "codiff")
    cfg = Stage2.read(header)
    cave = load_cave(weights) if cfg.prompt == "cave" else None
    G = CODiff(base or header["base"], cfg, cave, tensors.get("tokens")).add_lora(cfg.rank)
    G.sd.check(header, weights)
    return common.for_inference(load_trained(G, tensors, weights))


@torch.inference_mode()
def restore(model: CODiff, image: Image.Image, color_fix="adain", tile: int | None = None) -> Image.Image:
    """One JPEG-compressed image, any size, to its restored self: one UNet call, no noise drawn. AdaIN to the
    input's colours is the release's. DIFFERS: it resizes to multiples of 8 and samples the latent; here pad,
    crop, and the mean."""
    x_lq = to_tensor(image)[None]
    x = pad_to(x_lq, model.cell)
    tiles = Tiles(model.sd, x, model.cell, tile, model.multiple)  # without `tile`, tiles(f, x) is f(x)
    z_L = tiles(model.sd.encode, x)
    z_hat = tiles(model.denoise, x, z_L)
    x_hat = tiles(model.sd.decode, z_hat)[:, :, :image.height, :image.width].clamp(-1, 1).float().cpu()
    return to_image((adain(x_hat, x_lq) if color_fix == "adain" else x_hat)[0])


def adain(x: Tensor, reference: Tensor) -> Tensor:
    """x (B, C, h, w) with each channel's mean and standard deviation changed to the reference's."""
    std, mean = torch.std_mean(x, (2, 3), keepdim=True, correction=0)
    std_to, mean_to = torch.std_mean(reference, (2, 3), keepdim=True, correction=0)
    gain = std_to / std.clamp_min(1e-5)
    return torch.addcmul(mean_to - mean * gain, x, gain)


# ------------------------------------------------------------------------------------- command line


def train(args) -> None:
    cfg1, cfg2 = Stage1.of(args), Stage2.of(args)
    run = Run(args, "codiff", SD21_BASE, cfg1, cfg2)
    if args.stage == "1" or args.stage == "all" and cfg2.prompt == "cave":
        stage1(run, cfg1)
    if args.stage in ("2", "all"):
        stage2(run, cfg2)
        run.evaluate()


def model_flags(p) -> None:
    """Of restore and eval."""
    common.model_flags(p, "codiff")
    p.add_argument("--color-fix", choices=["adain", "none"], default="adain",
                   help="AdaIN matches each channel's mean and deviation to the input's")


def restorer(args):
    """What restore does: image -> (restored image, remark)."""
    model = load(args.weights, args.base)
    tile = common.check_tile(args.tile, model.multiple)
    return lambda image: (restore(model, image, args.color_fix, tile), "")


def main(argv: list[str] | None = None) -> None:
    cli = CommandLine("codiff.py", description="CODiff: one-step JPEG artifact removal (arXiv 2502.09873)")
    cli.train(train, Stage1, Stage2)
    model_flags(cli.restore(restorer))
    cli.run(argv)


if __name__ == "__main__":
    common.run_cli(main)
