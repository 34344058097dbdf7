"""CODiff: Compression-Aware One-Step Diffusion Model for JPEG Artifact Removal (ICCV 2025, arXiv 2502.09873v2).

    x_lq -> VAE enc (LoRA) -> z_L -> UNet (LoRA; t = T_L, prompt c_L) -> eps -> Eq. 1 -> z_hat -> VAE dec -> x_hat
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

    python codiff.py train                     # both stages on the bundled tiny-sd, then a table and a picture
    python codiff.py restore photo.jpg -o photo.png
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tqdm import tqdm

from common import (LORA_FILE, ROOT, SD, SD21_BASE, SD21_CONFIG, TINY_SD, Crops, Discriminator, Metrics, Parser, Run,
                    UserError, adain, add_eval, add_figures, add_lora, add_profile, add_restore, add_train, atomic, both,
                    device, dists_small, dists_vgg16, evaluate, fill, find_base, fingerprint, for_inference, frozen, fuse_lora,
                    gradient_norms, jpeg, layers, list_images, load_pickle, load_tensors, matplotlib, noise_for, note,
                    outputs, pad_to, paper_values, peak_memory, profile, read_image, read_model, restore_files, rng, run_cli,
                    save_lora, save_tensors, stage_config, text_table, text_tokens, tile_size, tiled, to_image, to_tensor,
                    trainable, update, write_json)

# ------------------------------------------------------------------------------------ configurations


@dataclass
class Stage1:
    """CaVE, Sec. 3.2."""
    #                           tiny run              paper run
    widths: tuple        = both((16, 32, 64, 128),    (64, 128, 256, 512), "Sec. 3.2.2")
    blocks: int          = both(1,                    4,                   "released code")
    gain: float          = both(1.0,                  0.2,                 "released code: orthogonal initialisation")
    highpass: float      = both(8.0,                  0.0,                 "ours: gain of high-pass filters that the head starts with")
    crop: int            = both(64,                   256,                 "Sec. 4.1")
    qf_min: int          = both(8,                    8,                   "Sec. 4.1")
    qf_max: int          = both(95,                   95,                  "Sec. 4.1")
    learning: str        = both("dual",               "dual",              "Table 4", "learning", ("dual", "explicit", "implicit"))
    lambda_rec: float    = both(3.0,                  1000.0,              "Sec. 4.1, Eq. 6's lambda")
    lr: float            = both(1e-3,                 2e-5,                "Sec. 4.1")
    decay: float         = both(0.5,                  0.0,                 "ours: last part of the run in which lr falls to 0")
    clip: float          = both(0.0,                  0.0,                 "ours: gradient norm; 0 clips nothing")
    batch: int           = both(16,                   128,                 "Sec. 4.1")
    steps: int           = both(400,                  200_000,             "Sec. 4.1")
    accumulate: int      = both(1,                    1,                   "ours: micro-batches a step")
    workers: int         = both(0,                    8,                   "ours: loader processes")
    save_every: int      = both(100,                  2000,                "ours")


LOSSES = ("l2", "dists", "gan")


@dataclass
class Stage2:
    """The one-step generator and its discriminator, Secs. 3.1 and 3.3."""
    #                           tiny run      paper run
    T_L: int             = both(49,           499,       "released code")
    rank: int            = both(16,           16,        "Sec. 4.1")
    crop: int            = both(128,          256,       "Sec. 4.1")
    qf_min: int          = both(5,            8,         "Sec. 4.1")
    qf_max: int          = both(30,           95,        "Sec. 4.1")
    prompt: str          = both("cave",       "cave",    "Table 3", "prompt", ("cave", "learnable", "empty"))
    losses: tuple        = both(LOSSES,       LOSSES,    "Table 5: the terms that count", "losses", LOSSES)
    dists: str           = both("small",      "vgg16",   "Eq. 7; 'small' needs no download", choices=("small", "vgg16"))
    lambda_P: float      = both(0.02,         1.0,       "Sec. 4.1, Eq. 7")
    lambda_G: float      = both(5e-3,         5e-3,      "Sec. 4.1, Eq. 10")
    T_D: int             = both(199,          199,       "released code: the discriminator's timestep")
    lr: float            = both(2e-3,         5e-5,      "Sec. 4.1")
    decay: float         = both(0.5,          0.0,       "ours: last part of the run in which lr falls to 0")
    weight_decay: float  = both(1e-5,         1e-5,      "Sec. 4.1")
    clip: float          = both(1.0,          1.0,       "released code: gradient norm")
    batch: int           = both(2,            32,        "Sec. 4.1")
    steps: int           = both(280,          100_000,   "Sec. 4.1")
    accumulate: int      = both(1,            1,         "ours: micro-batches a step")
    checkpointing: bool  = both(False,        False,     "ours: less memory, more time")
    workers: int         = both(0,            8,         "ours: loader processes")
    save_every: int      = both(100,          1000,      "ours")


# --------------------------------------------------------------------------------------------- data


class JPEGPairs(Crops):
    """Sample n -> (n, x_lq, x_hq, q): a crop and its JPEG, QF uniform in qf_min..qf_max (Sec. 4.1).
    DIFFERS: the release draws three in four from {10, 20, ..., 60}.

    Half of the crops are cut off the JPEG's 8x8 grid, at an offset of 0..8 pixels an axis, as in the
    released code: photographs from the web have often been cropped after compression."""

    def __init__(self, folders, cfg: Stage1 | Stage2, multiple: int, seed: int):
        if cfg.crop % multiple:
            raise UserError(f"--s{cfg.__class__.__name__[-1]}-crop {cfg.crop}: must be a multiple of {multiple}")
        super().__init__(folders, cfg.crop + 8, seed)
        self.cfg = cfg

    def __getitem__(self, n: int) -> tuple[int, Tensor, Tensor, Tensor]:
        r = rng(self.seed, 2, n)
        hq = Image.fromarray(self.crop(n))
        qf = int(r.integers(self.cfg.qf_min, self.cfg.qf_max + 1))
        lq = jpeg(hq, qf)
        left, top = r.integers(0, 9, 2).tolist() if r.random() < 0.5 else (0, 0)
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

    def __init__(self, widths: tuple[int, int, int, int], blocks: int, gain: float | None = None, highpass: float = 0.0):
        super().__init__()
        c1, c2, c3, c4 = widths

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
        self.qf_pred = nn.Sequential(*body(c4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c4, c4), nn.ReLU(),
                                     nn.Linear(c4, c4), nn.ReLU(), nn.Linear(c4, 1), nn.Sigmoid())
        if gain:  # to be trained, not loaded
            self.initialise(gain, highpass)

    @torch.no_grad()
    def initialise(self, gain: float, highpass: float) -> None:
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
            for i, kernel in enumerate((torch.outer(d2, d2) / 4, torch.outer(one, d2) / 2, torch.outer(d2, one) / 2)):
                for colour in range(3):
                    self.m_head.weight[3 * i + colour] = 0
                    self.m_head.weight[3 * i + colour, colour] = highpass * kernel

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
    """The one-step generator G_theta of Eq. 2, without LoRA: `train_lora` adds it, `load` fuses it.

    Its prompt is CaVE's tokens, or for Table 3's ablation the same `tokens` (L, D_text) for every image."""

    def __init__(self, base: Path, T_L: int, cave: CaVE | None, tokens: nn.Parameter | None = None, weights: bool = True):
        super().__init__()
        self.base, self.T_L, self.sd = base, T_L, SD(base, weights=weights)
        self.cave, self.tokens = cave.eval().requires_grad_(False) if cave else None, tokens
        self.proj = nn.Linear(cave.m_body_encoder[0].res[0].in_channels, self.sd.unet.config.cross_attention_dim) if cave else None
        self.multiple = max(CaVE.stride, self.sd.multiple)  # both are powers of two

    def train_lora(self, rank: int) -> None:
        """LoRA on the UNet (all but the time embeddings) and on the VAE encoder, Sec. 3.3. The decoder stays.
        DIFFERS: the release scales LoRA by 0.5 and also trains conv_in's own weights; the paper says LoRA."""
        add_lora(self.sd.unet, rank, layers(self.sd.unet, without="time_emb"))
        add_lora(self.sd.vae, rank, layers(self.sd.vae, ("encoder", "quant_conv")))

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
        return self.sd.x0(z_L, eps, self.T_L)

    def forward(self, x_lq: Tensor, noise: Tensor | None = None, run=lambda stage, *maps: stage(*maps)) -> tuple[Tensor, Tensor]:
        """x_lq (B, 3, H, W) in [-1, 1], sides multiples of `multiple` -> (x_hat, z_hat). `run` lets
        `common.tiled` cut the three stages into windows."""
        z_L = run(lambda x: self.sd.encode(x, noise), x_lq)
        z_hat = run(self.denoise, x_lq, z_L)
        # Eq. 2
        return run(self.sd.decode, z_hat).clamp(-1, 1), z_hat


# ------------------------------------------------------------------------------------------- losses


def loss_qf(q_hat: Tensor, q: Tensor) -> Tensor:
    # Eq. 4, on (100 - QF) / 100 as in the release: with the sigmoid's range, lambda = 1000 keeps its meaning
    return F.l1_loss(q_hat, q)


def loss_rec(x_hat: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 5
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


def stage1(run: Run, cfg: Stage1, data: list[Path], seed: int) -> None:
    """Dual learning of CaVE: QF prediction (explicit) and reconstruction (implicit), Sec. 3.2."""
    torch.manual_seed(seed)
    cave = CaVE(cfg.widths, cfg.blocks, cfg.gain, cfg.highpass)
    w_qf, w_rec = {"dual": (1, cfg.lambda_rec), "explicit": (1, 0), "implicit": (0, cfg.lambda_rec)}[cfg.learning]  # Table 4
    acc = run.start(1, cfg, CaVE=cave, embedding=embedding_path(cave))
    pairs = JPEGPairs(data, cfg, CaVE.stride, seed)
    optimizer = torch.optim.Adam(cave.parameters(), cfg.lr)
    cave, optimizer = acc.prepare(cave, optimizer)
    cave.train()
    for step, (n, x_lq, x_hq, q) in run.loop(pairs, {"cave": cave}, {"adam": optimizer}):
        with acc.accumulate(cave):
            q_hat, x_rec = cave((x_lq + 1) / 2)
            l_qf = loss_qf(q_hat, q)
            l_rec = loss_rec(x_rec, (x_hq + 1) / 2)
            # Eq. 6
            loss = w_qf * l_qf + w_rec * l_rec
            terms = {"qf": w_qf * l_qf, "rec": w_rec * l_rec}
            if step == 0:
                norms = gradient_norms(terms, trainable(cave))
                acc.print("step 1: " + "  ".join(f"{k} {v:.3g}" for k, v in norms.items()))
            acc.backward(loss)
            update(acc, cave, optimizer, cfg, step)
        run.log(qf=l_qf, rec=l_rec, loss=loss)
    if acc.is_main_process:
        save_tensors(run.model / "stage1.safetensors", acc.unwrap_model(cave).state_dict(), config=asdict(cfg))
    acc.wait_for_everyone()  # stage 2 reads that file


def embedding_path(cave: CaVE) -> nn.ModuleList:
    """What stage 2 and inference use of it."""
    return nn.ModuleList([cave.m_head, cave.m_down1, cave.m_down2, cave.m_down3, cave.m_body_encoder])


def load_cave(model: Path) -> CaVE:
    tensors, header = load_tensors(model / "stage1.safetensors")
    if "widths" not in header.get("config", {}):
        raise UserError(f"{model / 'stage1.safetensors'}: not a CaVE checkpoint of codiff.py")
    cave = CaVE(tuple(header["config"]["widths"]), header["config"]["blocks"])
    try:
        cave.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{model / 'stage1.safetensors'}: does not fit CaVE ({str(error).splitlines()[1].strip()})") from None
    return cave


# ------------------------------------------------------------------------------------------ stage 2


def stage2(run: Run, cfg: Stage2, base: Path, data: list[Path], seed: int) -> None:
    """The generator against its discriminator, with CaVE frozen, Sec. 3.3."""
    if cfg.prompt == "cave" and not (run.model / "stage1.safetensors").exists():
        raise UserError(f"--stage 2: {run.model / 'stage1.safetensors'} is missing; run stage 1 first (train --stage 1)")
    torch.manual_seed(seed + 1)
    G, D = CODiff(base, cfg.T_L, *prompt_source(cfg, base, run.model)), Discriminator(base, cfg.rank)
    G.train_lora(cfg.rank)
    real = SD(base, with_unet=False)  # z_H comes from the untouched encoder; the paper does not say which (ours)
    dists = dists_vgg16() if cfg.dists == "vgg16" else dists_small()
    if cfg.checkpointing:
        for m in (G.sd.unet, G.sd.vae, D.unet):
            m.enable_gradient_checkpointing()
    acc = run.start(2, cfg, **{"UNet + LoRA": G.sd.unet, "VAE + LoRA": G.sd.vae, "CaVE": G.cave, "proj": G.proj,
                               "discriminator": D})
    acc.print("perceptual loss: " + ("DISTS (VGG16)" if cfg.dists == "vgg16" else
                                     "DISTS' terms on a small random network (no download; not the metric DISTS)"))
    pairs = JPEGPairs(data, cfg, G.multiple, seed + 1)
    opt_G, opt_D = (torch.optim.AdamW(trainable(m), cfg.lr, weight_decay=cfg.weight_decay) for m in (G, D))
    G, D, opt_G, opt_D = acc.prepare(G, D, opt_G, opt_D)
    G.train(), D.train(), dists.to(acc.device), real.to(acc.device)
    critic = acc.unwrap_model(D)
    w = {term: float(term in cfg.losses) for term in LOSSES}  # Table 5; 1 each by default
    shape = (real.vae.config.latent_channels, cfg.crop // real.f, cfg.crop // real.f)

    for step, (n, x_lq, x_hq, _) in run.loop(pairs, {"G": G, "D": D}, {"opt_G": opt_G, "opt_D": opt_D}):
        with acc.accumulate(G, D):
            x_hat, z_hat = G(x_lq, noise_for(n, shape, seed, 3))
            l_2 = loss_2(x_hat, x_hq)
            l_dists = dists(x_hat, x_hq).mean()
            # Eq. 7
            l_per = w["l2"] * l_2 + w["dists"] * cfg.lambda_P * l_dists
            # DIFFERS: in the release the critic's UNet runs under no_grad, which makes Eq. 8 a constant for
            # the generator and leaves Eq. 9 to the head; here its parameters are frozen, not its graph.
            with frozen(critic):  # until after backward: checkpointing runs the critic's forward again there
                l_G = loss_G(critic(z_hat, cfg.T_D))
                # Eq. 10
                loss = l_per + w["gan"] * cfg.lambda_G * l_G
                if step == 0:
                    terms = {"l2": l_2, "dists": cfg.lambda_P * l_dists, "gan_g": cfg.lambda_G * l_G}
                    acc.print("step 1: " + "  ".join(f"{k} {v:.3g}" for k, v in gradient_norms(terms, trainable(G)).items()))
                acc.backward(loss)
            update(acc, G, opt_G, cfg, step)

            with torch.no_grad(), acc.autocast():
                z_hq = real.encode(x_hq, noise_for(n, shape, seed, 4)).float()
            fake, true = D(torch.cat([z_hat.detach(), z_hq]), cfg.T_D).chunk(2)
            l_D = loss_D(fake, true)
            acc.backward(l_D)
            update(acc, D, opt_D, cfg, step)
        run.log(l2=l_2, dists=l_dists, gan_g=l_G, gan_d=l_D, loss=loss)

    if acc.is_main_process:
        G = acc.unwrap_model(G)
        save_lora(G.sd.unet, run.model / "unet_lora")
        save_lora(G.sd.vae, run.model / "vae_lora")
        save_tensors(run.model / "stage2.safetensors", own_tensors(G))
        write_json(run.model / "config.json", {"script": "codiff", "base": str(base), "base_sha256": fingerprint(base),
                                               "stage2": asdict(cfg)})


def prompt_source(cfg: Stage2, base: Path, model: Path) -> tuple[CaVE | None, nn.Parameter | None]:
    """(CaVE, None), or for Table 3's ablations (None, tokens), learnable or those of the empty caption."""
    if cfg.prompt == "cave":
        return load_cave(model), None
    empty = text_tokens(base, [""])[0]
    if cfg.prompt == "empty":
        return None, nn.Parameter(empty, requires_grad=False)
    return None, nn.Parameter(torch.randn(empty.shape) * 0.02)


def own_tensors(G: CODiff) -> dict[str, Tensor]:
    """The generator's weights besides base, LoRA and CaVE: the linear map, or the ablation's tokens."""
    return {k: v for k, v in G.state_dict().items() if k.startswith(("proj.", "tokens"))}


# ------------------------------------------------------------------------------- one-step inference


def load(weights: Path, base: str | None = None) -> CODiff:
    """The trained generator of a run's folder, LoRA fused, on the device at hand, ready for `restore`."""
    (config, folder), model = read_model(weights, "codiff", base), weights / "model"
    tensors, _ = load_tensors(model / "stage2.safetensors")
    tokens = tensors.get("tokens")
    G = CODiff(folder, config["stage2"]["T_L"], None if tokens is not None else load_cave(model),
               None if tokens is None else nn.Parameter(tokens, requires_grad=False))
    fuse_lora(G.sd.unet, load_tensors(model / "unet_lora" / LORA_FILE)[0], model / "unet_lora" / LORA_FILE)
    fuse_lora(G.sd.vae, load_tensors(model / "vae_lora" / LORA_FILE)[0], model / "vae_lora" / LORA_FILE)
    fill(G, tensors, own_tensors(G), model / "stage2.safetensors")
    return for_inference(G)


def load_official(cave_pth: Path, codiff_pkl: Path, base: str | None = None) -> CODiff:
    """The authors' checkpoints (their README links them), on SD 2.1-base. As released: LoRA scaled by 0.5
    (lora_alpha stayed at 8), conv_in's own weights trained too. CaVE's decoder, which only training needs and
    which adds 1 in every block there, is not loaded."""
    folder, stage1, stage2 = find_base([base] if base else SD21_BASE), paper_values(Stage1), paper_values(Stage2)
    cave = CaVE(stage1.widths, stage1.blocks)
    fill(cave, load_pickle(cave_pth), [k for k in cave.state_dict() if not k.startswith(("m_body_decoder", "m_up", "m_tail"))], cave_pth)
    G, release = CODiff(folder, stage2.T_L, cave), load_pickle(codiff_pkl)
    for part, key in ((G.sd.unet, "state_dict_unet"), (G.sd.vae, "state_dict_vae")):
        if not isinstance(release.get(key), dict):
            raise UserError(f"{codiff_pkl}: not CODiff's checkpoint ({key} is missing)")
        own = {k.replace(".base_layer", ""): v for k, v in release[key].items() if ".base_layer." in k}
        fill(part, own, own, codiff_pkl)
        lora = {re.sub(r"lora_([AB])\.\w+\.", r"lora_\1.", k): v for k, v in release[key].items() if ".lora_" in k}
        fuse_lora(part, lora, codiff_pkl, scale=0.5)
    fill(G.proj, release.get("proj", {}), G.proj.state_dict(), codiff_pkl)
    return for_inference(G)


@torch.inference_mode()
def restore(model: CODiff, image: Image.Image, color_fix: str = "adain", tile: int | None = None) -> Image.Image:
    """One JPEG-compressed image, any size, to its restored self: one UNet call, no noise drawn.
    DIFFERS: the release resizes to multiples of 8 and samples the latent; here pad, crop, and the mean."""
    x_lq = to_tensor(image)[None]
    x_hat, mosaic = tiled(lambda x, run: model(x, run=run)[0], model.sd, pad_to(x_lq, model.multiple), model.multiple, tile)
    x_hat = x_hat[:, :, :image.height, :image.width].float()
    if color_fix == "adain":
        x_hat = adain(x_hat, *(mosaic or (x_hat, x_lq.to(x_hat.device))))
    return to_image(x_hat[0])


# -------------------------------------------------------------------------------- profile, figures


def parts(G: CODiff, x_lq: Tensor) -> dict[str, tuple[list[nn.Module], callable]]:
    """Inference's parts in order, {name: (modules, call)}, on inputs of x_lq's size."""
    vae, (h, w) = G.sd.vae, x_lq.shape[2:]
    x = x_lq.to(vae.dtype)
    z = x.new_zeros(1, vae.config.latent_channels, h // G.sd.f, w // G.sd.f)
    tokens, c_L = (x.new_zeros(1, h * w // CaVE.stride**2, d) for d in (G.proj.in_features, G.proj.out_features))
    return {"CaVE, embedding path": ([embedding_path(G.cave)], lambda: G.cave.embed(x)),
            "linear map": ([G.proj], lambda: G.proj(tokens)),
            "VAE encoder": ([vae.encoder, vae.quant_conv], lambda: vae.encode(x)),
            "UNet": ([G.sd.unet], lambda: G.sd.unet(z, G.T_L, c_L)),
            "VAE decoder": ([vae.decoder, vae.post_quant_conv], lambda: vae.decode(z))}


def profile_command(args) -> None:
    """Table 2: parameters and MACs by part, in the paper's counting and in full; time and memory."""
    base = find_base([args.base or (SD21_CONFIG if args.paper else TINY_SD)])
    cfg1, cfg2 = (paper_values(s) if args.paper else s() for s in (Stage1, Stage2))

    def build(lora: bool) -> CODiff:
        G = CODiff(base, cfg2.T_L, CaVE(cfg1.widths, cfg1.blocks), weights=False)
        if lora:
            G.train_lora(cfg2.rank)
        return G
    profile(build, parts, args.size, args.time)


@torch.inference_mode()
def read_cave(cave: CaVE, files: list[Path], qfs: list[int], what: str) -> tuple[Tensor, Tensor]:
    """Mean token (len(qfs), len(files), C) and predicted QF (len(qfs), len(files)) of every file's JPEGs."""
    c, qf_hat = [], []
    photos = [read_image(f)[0] for f in files]
    for qf in tqdm(qfs, what, leave=False, disable=None):
        maps = [cave.encode((pad_to(to_tensor(jpeg(p, qf))[None], CaVE.stride).to(device()) + 1) / 2)[0] for p in photos]
        c.append(torch.cat([m.mean((2, 3)) for m in maps]).cpu())
        qf_hat.append(torch.cat([100 - 100 * cave.qf_pred(m)[:, 0] for m in maps]).cpu())
    return torch.stack(c), torch.stack(qf_hat)


def figures_command(args) -> None:
    """Fig. 4: CaVE's embeddings by QF in two dimensions (PCA), QFs never trained on ringed in red.
    Fig. 7: mean squared error of the predicted QF at QF 1 to 6. Dual beside explicit learning."""
    plt, files = matplotlib(), list_images(args.data or [ROOT / "data" / "photos" / "val"])
    runs = {}
    for path in (folder / "model" / "stage1.safetensors" for folder in (args.weights, args.against)):
        if path.exists() or path.parents[1] == args.weights:
            runs[load_tensors(path)[1]["config"]["learning"]] = path
    if len(runs) < 2:
        note(f"draws {', '.join(runs)} learning only; to compare: codiff.py train --stage 1 --learning explicit --out {args.against}")
    fig4, axes = plt.subplots(1, len(runs), figsize=(5.2 * len(runs), 4), squeeze=False, layout="constrained")
    fig7, bars = plt.subplots(figsize=(5, 3), layout="constrained")
    far, near, results = [1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90], [1, 2, 3, 4, 5, 6], {}
    for i, (learning, path) in enumerate(runs.items()):
        cave, cfg = load_cave(path.parent).eval().to(device()), load_tensors(path)[1]["config"]
        c = read_cave(cave, files, far, f"Fig. 4, {learning}")[0]
        flat = c.flatten(0, 1) - c.mean((0, 1))
        xy = (flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:2].T).unflatten(0, c.shape[:2])
        for qf, points in zip(far, xy):
            seen = cfg["qf_min"] <= qf <= cfg["qf_max"]
            axes[0, i].scatter(*points.T, s=30, color=plt.cm.viridis(qf / 95), edgecolors="none" if seen else "red", label=f"QF {qf}")
        axes[0, i].set_title(f"{learning} learning")
        error = (read_cave(cave, files, near, f"Fig. 7, {learning}")[1] - torch.tensor(near)[:, None]).square().mean(1).tolist()
        bars.bar([qf + 0.4 * i - 0.2 for qf in near], error, 0.4, label=f"{learning} learning")
        results[learning] = dict(zip(map(str, near), error))
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    bars.set(xlabel="quality factor", ylabel="QF prediction, MSE")
    bars.legend()
    for name, figure in (("fig4", fig4), ("fig7", fig7)):
        target = args.weights / "samples" / f"{name}.png"
        atomic(target, lambda tmp: figure.savefig(tmp, dpi=110))
        print(target)
    print(text_table(["MSE of the predicted QF at", *map(str, near)], [[k, *v.values()] for k, v in results.items()]))


# ------------------------------------------------------------------------------------- command line


def train_command(args) -> None:
    if args.paper and not args.data:
        raise UserError("--paper needs --data: the folders of DF2K and LSDIR (see data/README.md)")
    cfg1, cfg2 = stage_config(Stage1, "s1", args), stage_config(Stage2, "s2", args)
    base = find_base([args.base] if args.base else SD21_BASE if args.paper else [TINY_SD])
    data = args.data or [ROOT / "data" / "photos" / "train"]
    run = Run(args.out, {"script": "codiff", "base_sha256": fingerprint(base), "seed": args.seed,
                         "data": sorted(str(Path(d).resolve()) for d in data),
                         "stage1": asdict(cfg1), "stage2": asdict(cfg2)}, args.stage, args.resume, args.overwrite)
    if args.stage == "1" or args.stage == "all" and cfg2.prompt == "cave":
        stage1(run, cfg1, data, args.seed)
    if args.stage in ("2", "all"):
        stage2(run, cfg2, base, data, args.seed)
        if run.main:
            evaluation(load(run.folder, str(base)), run.folder, args.val, [5, 10, 20])
            print(f"peak memory: {peak_memory()}")


def evaluation(model: CODiff, out: Path, data, qfs: list[int], color_fix: str = "adain", tile: int | None = None, extra: bool = False) -> None:
    files, picture = list_images(data or [ROOT / "data" / "photos" / "val"]), out / "samples" / "eval.png"
    conditions = {f"JPEG QF {qf}": lambda image, _, qf=qf: jpeg(image, qf) for qf in qfs}
    results = evaluate(files, conditions, lambda image: restore(model, image, color_fix, tile), SD(model.base, with_unet=False).to(device()),
                       Metrics(device(), ("musiq", "maniqa", "clipiqa") if extra else ()), picture)
    write_json(out / "metrics.json", {"images": [f.name for f in files], "color_fix": color_fix, "results": results})
    print(f"\ncolour fix: {color_fix}   metrics: {out / 'metrics.json'}   picture: {picture}")


def model_for(args) -> CODiff:
    model = load_official(*args.weights_official, args.base) if args.weights_official else load(args.weights, args.base)
    tile_size(args.tile, model.multiple)
    return model


def eval_command(args) -> None:
    out = ROOT / "runs" / "codiff-official" if args.weights_official else args.weights
    evaluation(model_for(args), out, args.data, args.qf, args.color_fix, args.tile, args.metrics == "all")


def restore_command(args) -> None:
    pairs, model = outputs(args.input, args.output), model_for(args)
    restore_files(pairs, lambda image: (restore(model, image, args.color_fix, args.tile), ""))


def main(argv: list[str] | None = None) -> None:
    cli = Parser(prog="codiff.py", description="CODiff: one-step JPEG artifact removal (arXiv 2502.09873)")
    commands = cli.add_subparsers(dest="command", required=True, parser_class=Parser)
    add_train(commands, "codiff", {"s1": Stage1, "s2": Stage2}, train_command)
    add_restore(commands, "codiff", restore_command)
    add_eval(commands, "codiff", eval_command).add_argument("--qf", type=int, nargs="+", default=[5, 10, 20], help="JPEG quality factors")
    for name in ("restore", "eval"):
        commands.choices[name].add_argument("--color-fix", choices=["adain", "none"], default="adain",
                                            help="AdaIN matches each channel's mean and deviation to the input's")
        commands.choices[name].add_argument("--weights-official", nargs=2, type=Path, metavar=("CAVE.PTH", "CODIFF.PKL"),
                                            help="the authors' checkpoints in place of a run's (on SD 2.1-base)")
    add_profile(commands, profile_command)
    add_figures(commands, "codiff", figures_command).add_argument(
        "--against", type=Path, default=ROOT / "runs" / "codiff-explicit", help="a second run's folder, for comparison")
    args = cli.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_cli(main)
