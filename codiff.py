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

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common import (ROOT, SD, SD21_BASE, TINY_SD, Crops, Discriminator, Metrics, Parser, Run, UserError, adain,
                    add_eval, add_lora, add_restore, add_train, both, device, dists_small, dists_vgg16, evaluate,
                    find_base, fingerprint, frozen, fuse_lora, gradient_norms, jpeg, layers, list_images, load_tensors,
                    noise_for, outputs, pad_to, peak_memory, read_json, restore_files, rng, run_cli, save_lora, save_tensors,
                    stage_config, to_image, to_tensor, trainable, write_json)

# ------------------------------------------------------------------------------------ configurations


@dataclass
class Stage1:
    """CaVE, Sec. 3.2."""
    #                           tiny run              paper run
    widths: tuple        = both((16, 32, 64, 128),    (64, 128, 256, 512), "Sec. 3.2.2")
    blocks: int          = both(1,                    4,                   "released code")
    gain: float          = both(1.0,                  0.2,                 "released code: orthogonal initialisation")
    crop: int            = both(64,                   256,                 "Sec. 4.1")
    qf_min: int          = both(5,                    8,                   "Sec. 4.1")
    qf_max: int          = both(95,                   95,                  "Sec. 4.1")
    lambda_rec: float    = both(1000.0,               1000.0,              "Sec. 4.1, Eq. 6's lambda")
    lr: float            = both(2e-3,                 2e-5,                "Sec. 4.1")
    decay: float         = both(0.5,                  0.0,                 "ours: last part of the run in which lr falls to 0")
    batch: int           = both(16,                   128,                 "Sec. 4.1")
    steps: int           = both(240,                  200_000,             "Sec. 4.1")
    accumulate: int      = both(1,                    1,                   "ours: micro-batches a step")
    workers: int         = both(0,                    8,                   "ours: loader processes")
    save_every: int      = both(100,                  2000,                "ours")


@dataclass
class Stage2:
    """The one-step generator and its discriminator, Secs. 3.1 and 3.3."""
    #                           tiny run      paper run
    T_L: int             = both(49,           499,       "released code")
    rank: int            = both(16,           16,        "Sec. 4.1")
    crop: int            = both(128,          256,       "Sec. 4.1")
    qf_min: int          = both(5,            8,         "Sec. 4.1")
    qf_max: int          = both(30,           95,        "Sec. 4.1")
    dists: str           = both("small",      "vgg16",   "Eq. 7; 'small' needs no download")
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

    def __init__(self, widths: tuple[int, int, int, int], blocks: int, gain: float = 0.2):
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
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.orthogonal_(m.weight, gain)
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.1, 1.0)

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
    """The one-step generator G_theta of Eq. 2, without LoRA: `train_lora` adds it, `load` fuses it."""

    def __init__(self, base: Path, cave: CaVE, T_L: int):
        super().__init__()
        self.sd, self.cave, self.T_L = SD(base), cave.eval().requires_grad_(False), T_L
        self.proj = nn.Linear(cave.m_body_encoder[0].res[0].in_channels, self.sd.unet.config.cross_attention_dim)
        self.multiple = max(CaVE.stride, self.sd.multiple)  # both are powers of two

    def train_lora(self, rank: int) -> None:
        """LoRA on the UNet (all but the time embeddings) and on the VAE encoder, Sec. 3.3. The decoder stays.
        DIFFERS: the release scales LoRA by 0.5 and also trains conv_in's own weights; the paper says LoRA."""
        add_lora(self.sd.unet, rank, layers(self.sd.unet, without="time_emb"))
        add_lora(self.sd.vae, rank, layers(self.sd.vae, ("encoder", "quant_conv")))

    def train(self, mode: bool = True):
        super().train(mode)
        self.cave.eval()  # frozen, and its BatchNorm statistics with it
        return self

    def forward(self, x_lq: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x_lq (B, 3, H, W) in [-1, 1], sides multiples of `multiple` -> (x_hat, z_hat)."""
        c_L = self.proj(self.cave.embed((x_lq + 1) / 2))
        z_L = self.sd.encode(x_lq, noise)
        eps = self.sd.unet(z_L, self.T_L, c_L).sample
        # Eq. 1:  z_hat = (z_L - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)
        z_hat = self.sd.x0(z_L, eps, self.T_L)
        # Eq. 2
        return self.sd.decode(z_hat).clamp(-1, 1), z_hat


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


def decayed(cfg: Stage1 | Stage2, step: int) -> float:
    """lr, constant and then linear to zero over the run's last `decay` part."""
    return cfg.lr * min(1.0, (1 - step / cfg.steps) / cfg.decay if cfg.decay else 1.0)


# ------------------------------------------------------------------------------------------ stage 1


def stage1(run: Run, cfg: Stage1, data: list[Path], seed: int) -> None:
    """Dual learning of CaVE: QF prediction (explicit) and reconstruction (implicit), Sec. 3.2."""
    torch.manual_seed(seed)
    cave = CaVE(cfg.widths, cfg.blocks, cfg.gain)
    acc = run.start(1, cfg, CaVE=cave, embedding=nn.ModuleList([cave.m_head, cave.m_down1, cave.m_down2, cave.m_down3,
                                                               cave.m_body_encoder]))
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
            loss = l_qf + cfg.lambda_rec * l_rec
            terms = {"qf": l_qf, "rec": cfg.lambda_rec * l_rec}
            if step == 0:
                norms = gradient_norms(terms, trainable(cave))
                acc.print("step 1: " + "  ".join(f"{k} {v:.3g}" for k, v in norms.items()))
            acc.backward(loss)
            for group in optimizer.param_groups:
                group["lr"] = decayed(cfg, step)
            optimizer.step()
            optimizer.zero_grad()
        run.log(qf=l_qf, rec=l_rec, loss=loss)
    if acc.is_main_process:
        save_tensors(run.model / "stage1.safetensors", acc.unwrap_model(cave).state_dict(), config=asdict(cfg))


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
    if not (run.model / "stage1.safetensors").exists():
        raise UserError(f"--stage 2: {run.model / 'stage1.safetensors'} is missing; run stage 1 first (train --stage 1)")
    torch.manual_seed(seed + 1)
    G, D = CODiff(base, load_cave(run.model), cfg.T_L), Discriminator(base, cfg.rank)
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
    settings = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    opt_G, opt_D = torch.optim.AdamW(trainable(G), **settings), torch.optim.AdamW(trainable(D), **settings)
    G, D, opt_G, opt_D = acc.prepare(G, D, opt_G, opt_D)
    G.train(), D.train(), dists.to(acc.device), real.to(acc.device)
    critic = acc.unwrap_model(D)
    shape = (real.vae.config.latent_channels, cfg.crop // real.f, cfg.crop // real.f)

    for step, (n, x_lq, x_hq, _) in run.loop(pairs, {"G": G, "D": D}, {"opt_G": opt_G, "opt_D": opt_D}):
        with acc.accumulate(G, D):
            x_hat, z_hat = G(x_lq, noise_for(n, shape, seed, 3))
            l_2 = loss_2(x_hat, x_hq)
            l_dists = dists(x_hat, x_hq).mean()
            # Eq. 7
            l_per = l_2 + cfg.lambda_P * l_dists
            # DIFFERS: in the release the critic's UNet runs under no_grad, which makes Eq. 8 a constant for
            # the generator and leaves Eq. 9 to the head; here its parameters are frozen, not its graph.
            with frozen(critic):  # until after backward: checkpointing runs the critic's forward again there
                l_G = loss_G(critic(z_hat, cfg.T_D))
                # Eq. 10
                loss = l_per + cfg.lambda_G * l_G
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
        save_tensors(run.model / "stage2.safetensors", {f"proj.{k}": v for k, v in G.proj.state_dict().items()})
        write_json(run.model / "config.json", {"script": "codiff", "base": str(base), "base_sha256": fingerprint(base),
                                               "stage2": asdict(cfg)})


def update(acc, module, optimizer, cfg: Stage2, step: int) -> None:
    """Clip, step, zero; with accumulation only on a step's last micro-batch (accelerate skips the others)."""
    if acc.sync_gradients:
        acc.clip_grad_norm_(trainable(module), cfg.clip)
    for group in optimizer.param_groups:
        group["lr"] = decayed(cfg, step)
    optimizer.step()
    optimizer.zero_grad()


# ------------------------------------------------------------------------------- one-step inference


def load(weights: Path, base: str | None = None) -> CODiff:
    """The trained generator of a run's folder, LoRA fused, on the device at hand, ready for `restore`."""
    config = read_json(weights / "model" / "config.json")
    if config.get("script") != "codiff":
        raise UserError(f"{weights}: trained by {config.get('script')}.py, not by codiff.py")
    folder = find_base([base or config["base"]])
    if fingerprint(folder) != config["base_sha256"]:
        raise UserError(f"{weights}: trained on a base with SHA-256 {config['base_sha256'][:12]}, but {folder} has "
                        f"{fingerprint(folder)[:12]}; name the right one with --base")
    model = CODiff(folder, load_cave(weights / "model"), config["stage2"]["T_L"])
    fuse_lora(model.sd.unet, weights / "model" / "unet_lora")
    fuse_lora(model.sd.vae, weights / "model" / "vae_lora")
    tensors, _ = load_tensors(weights / "model" / "stage2.safetensors")
    try:
        model.proj.load_state_dict({k.removeprefix("proj."): v for k, v in tensors.items()})
    except RuntimeError:
        raise UserError(f"{weights / 'model' / 'stage2.safetensors'}: does not fit this base or CaVE") from None
    return model.eval().to(device(), memory_format=torch.channels_last)


@torch.inference_mode()
def restore(model: CODiff, image: Image.Image, color_fix: str = "adain") -> Image.Image:
    """One JPEG-compressed image, any size, to its restored self: one UNet call, no noise drawn.
    DIFFERS: the release resizes to multiples of 8 and samples the latent; here pad, crop, and the mean."""
    where = model.sd.alpha_bar.device
    x_lq = to_tensor(image)[None].to(where, memory_format=torch.channels_last)
    with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
        x_hat, _ = model(pad_to(x_lq, model.multiple))
    x_hat = x_hat[:, :, :image.height, :image.width].float()
    return to_image(adain(x_hat, x_lq)[0] if color_fix == "adain" else x_hat[0])


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
    if args.stage in ("1", "all"):
        stage1(run, cfg1, data, args.seed)
    if args.stage in ("2", "all"):
        stage2(run, cfg2, base, data, args.seed)
        if run.main:
            evaluation(run.folder, args.val, [5, 10, 20], base=str(base))
            print(f"peak memory: {peak_memory()}")


def evaluation(weights: Path, data, qfs: list[int], base: str | None = None, color_fix: str = "adain", extra: bool = False) -> None:
    files = list_images(data or [ROOT / "data" / "photos" / "val"])
    model = load(weights, base)
    plain = SD(find_base([base or read_json(weights / "model" / "config.json")["base"]])).to(device())
    conditions = {f"JPEG QF {qf}": lambda image, qf=qf: jpeg(image, qf) for qf in qfs}
    picture = weights / "samples" / "eval.png"
    results = evaluate(files, conditions, lambda image: restore(model, image, color_fix), plain.eval(), Metrics(device(), extra), picture)
    write_json(weights / "metrics.json", {"images": [f.name for f in files], "color_fix": color_fix, "results": results})
    print(f"\ncolour fix: {color_fix}   metrics: {weights / 'metrics.json'}   picture: {picture}")


def eval_command(args) -> None:
    evaluation(args.weights, args.data, args.qf, args.base, args.color_fix, args.metrics == "all")


def restore_command(args) -> None:
    pairs = outputs(args.input, args.output)
    model = load(args.weights, args.base)
    restore_files(pairs, lambda image: restore(model, image, args.color_fix))


def main(argv: list[str] | None = None) -> None:
    cli = Parser(prog="codiff.py", description="CODiff: one-step JPEG artifact removal (arXiv 2502.09873)")
    commands = cli.add_subparsers(dest="command", required=True, parser_class=Parser)
    add_train(commands, "codiff", {"s1": Stage1, "s2": Stage2}, train_command)
    add_restore(commands, "codiff", restore_command)
    add_eval(commands, "codiff", eval_command).add_argument("--qf", type=int, nargs="+", default=[5, 10, 20], help="JPEG quality factors")
    for name in ("restore", "eval"):
        commands.choices[name].add_argument("--color-fix", choices=["adain", "none"], default="adain",
                                            help="AdaIN matches each channel's mean and deviation to the input's (default: adain)")
    args = cli.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_cli(main)
