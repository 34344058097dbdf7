"""Makes `data/tiny-sd`: a Stable Diffusion in miniature, in the diffusers layout of SD 2.1-base.

    python -m data.make_tiny_sd --data PHOTOS --val OTHER_PHOTOS     (from the repo's root)

Each `--data` folder may hold a `captions.jsonl` ({"file", "caption"} a line). Three stages, all
resumable (run the same command again), on CUDA or a CPU:

    1. VAE: the encoder starts as an exact 8x8 principal component analysis of the photographs
       (`pca_encoder`) and is frozen while the decoder learns; then both train; all on cheap crops of
       64x64. There the decoder comes to rely on that size: GroupNorm sees a fixed share of zero-padded
       border, and contrast is wrong at any other (27.8 dB at 64x64, 19.7 at 256x256; after a phase of
       192x192 alone 27.1 there, 24.6 at 288x288). So it ends on crops of 64 to 288 pixels a side.
    2. text encoder + UNet: text-to-image noise prediction on the latents, as Stable Diffusion; the text
       encoder also learns to tell captions apart, as CLIP.
    3. validation figures, written to `data/tiny-sd/README.md` with the recipe.

Matrices of VAE and UNet are trained with Muon (orthogonalised momentum, Jordan et al. 2024), the rest with
AdamW.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common import ROOT, load_part, load_trained, run_cli, trained
from data.files import UserError, atomic, list_images, load_tensors, note, save_tensors
from data.pictures import read_image, rng, to_tensor, torch_rng

LATENTS, WIDTHS, TEXT = 16, (16, 32, 64, 128), 96


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by five Newton-Schulz steps (matrices and conv kernels).
    torch.optim.Muon does the same for 2-d weights only and in bfloat16, which many CPUs emulate."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(p.grad)
                u = p.grad.add(m, alpha=group["momentum"]).flatten(1)
                u = orthogonal(u) * max(1, u.shape[0] / u.shape[1]) ** 0.5
                p.add_(u.view_as(p), alpha=-group["lr"])


def orthogonal(g: Tensor) -> Tensor:
    x = g / (g.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def optimizers(parts: dict[float, list[torch.nn.Module]], lr: float, adam_lr: float,
               plain: list[torch.nn.Module] = []):
    """Muon and AdamW over modules; the dict's keys scale the learning rates. AdamW alone for the `plain`
    ones."""
    muon, adam = [], []
    if plain:
        params = [p for m in plain for p in m.parameters()]
        adam.append({"params": params, "lr": adam_lr, "base": adam_lr})
    for scale, modules in parts.items():
        params = [p for m in modules for p in m.parameters()]
        wide = [p for p in params if p.ndim >= 2 and min(p.shape[:2]) >= 8 and p.shape[0] < 1000]
        ids = {id(p) for p in wide}
        rest = [p for p in params if id(p) not in ids]
        muon.append({"params": wide, "lr": lr * scale, "base": lr * scale})
        adam.append({"params": rest, "lr": adam_lr * scale, "base": adam_lr * scale})
    adamw = torch.optim.AdamW(adam, adam_lr, betas=(0.9, 0.99), weight_decay=0.0)
    return {"muon": Muon(muon, lr), "adam": adamw} if muon else {"adam": adamw}


@torch.no_grad()
def pca_encoder(vae: AutoencoderKL, photos: list[np.ndarray]) -> None:
    """Sets the encoder to the linear map that keeps the `LATENTS` strongest principal components of
    8x8 patches, each scaled to unit variance: 2x2 cells are gathered by the three strided convolutions,
    each followed by as many components as it has channels. Residual branches start at zero. The last
    GroupNorm and SiLU are made linear: every latent stands there with both signs, since
    silu(a) - silu(-a) = a, and beside constants +-A, which alone set the group's variance."""
    for name, m in vae.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            torch.nn.init.zeros_(m.weight), torch.nn.init.zeros_(m.bias)

    def clear(m, eye=0):
        m.weight.zero_(), m.bias.zero_()
        for c in range(eye):
            m.weight[c, c, m.weight.shape[2] // 2, m.weight.shape[3] // 2] = 1
        return m

    enc, h = vae.encoder, torch.stack([crop(p, (192, 192), rng(7, i)) for i, p in enumerate(photos)])
    clear(enc.conv_in, 3)
    for i, block in enumerate(enc.down_blocks):
        shortcut = block.resnets[0].conv_shortcut
        if shortcut is not None:
            clear(shortcut, shortcut.in_channels)
        if block.downsamplers is None:
            break
        conv, n = clear(block.downsamplers[0].conv), h.shape[1]
        cells = F.pixel_unshuffle(h, 2).permute(0, 2, 3, 1).reshape(-1, 4 * n)
        mean, (power, basis) = cells.mean(0), torch.linalg.eigh(torch.cov(cells.T))
        k = LATENTS if i == 2 else min(conv.out_channels, 4 * n)
        basis = basis.flip(1)[:, :k] / (power.flip(0)[:k].sqrt() if i == 2 else 1)
        conv.weight[:k, :n, :2, :2] = basis.T.reshape(k, n, 2, 2)
        conv.bias[:k] = -mean @ basis
        h = F.conv2d(F.pad(h, (0, 1, 0, 1)), conv.weight[:k, :n], conv.bias[:k], stride=2)
    groups, big = enc.conv_norm_out.num_groups, 20.0
    size, each = WIDTHS[-1] // groups, LATENTS // groups
    spread = enc.down_blocks[-1].resnets[0].conv_shortcut
    clear(spread), clear(enc.conv_out), clear(vae.quant_conv, 2 * LATENTS)
    for i in range(LATENTS):
        plus = i // each * size + i % each
        for channel, sign in ((plus, 1), (plus + each, -1)):
            spread.weight[channel, i] = sign
            enc.conv_norm_out.weight[channel] = big * (2 / size) ** 0.5
            enc.conv_out.weight[i, channel, 1, 1] = sign
    for g in range(groups):
        spread.bias[g * size + 2 * each], spread.bias[g * size + 2 * each + 1] = big, -big
    enc.conv_out.bias[LATENTS:] = -6.0  # log-variance: posterior noise of 0.05


def crop(photo: np.ndarray, size: tuple[int, int], r: np.random.Generator) -> Tensor:
    """A random crop, half of the time mirrored; (3, *size) in [-1, 1]. Offsets are arbitrary, so
    that the 8x8 grid of photographs that are JPEGs themselves falls anywhere."""
    y, x = (r.integers(n - m + 1) for n, m in zip(photo.shape, size))
    a = photo[y:y + size[0], x:x + size[1]]
    return torch.from_numpy(a[:, ::-1].copy() if r.random() < 0.5 else a.copy()).permute(2, 0, 1) / 127.5 - 1


def new_models(captions: list[str]):
    vae = AutoencoderKL(
        block_out_channels=WIDTHS, layers_per_block=1, latent_channels=LATENTS, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        scaling_factor=1.0)
    unet = UNet2DConditionModel(
        in_channels=LATENTS, out_channels=LATENTS, block_out_channels=(64, 96, 128), layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        attention_head_dim=[2, 3, 4], cross_attention_dim=TEXT, use_linear_projection=True, sample_size=16)
    tokenizer = CLIPTokenizer().train_new_from_iterator(captions, 1024)
    tokenizer.model_max_length = 77
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT, intermediate_size=4 * TEXT, num_hidden_layers=2,
        num_attention_heads=3, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    return vae, unet, text, tokenizer


def loop(name: str, work: Path, steps: int, modules, optims, loss_at, save_s: float = 120) -> float:
    """Runs `loss_at(step)` for `steps` optimisation steps, saving and resuming; returns the seconds spent."""
    path, first, spent = work / f"{name}.safetensors", 0, 0.0
    if path.exists():
        state, header = load_tensors(path)
        for k, m in modules.items():
            load_trained(m, state["modules"].get(k, {}), path)
        for k, o in optims.items():
            moments = {int(i): m for i, m in state["optimizers"][k].items()}
            o.load_state_dict(o.state_dict() | {"state": moments})
        first, spent = header["step"], header["seconds"]
    start = saved = time.time()
    smooth: dict[str, float] = {}
    bar = tqdm(range(first, steps), name, initial=first, total=steps, mininterval=10)
    for step in bar:
        lr = min(1, (step + 1) / 50) * min(1, (1 - step / steps) / 0.7)
        for o in optims.values():
            for group in o.param_groups:
                group["lr"] = group["base"] * lr
            o.zero_grad(set_to_none=True)
        terms = loss_at(step)
        terms["loss"].backward()
        for o in optims.values():
            o.step()
        for k, v in terms.items():
            smooth[k] = 0.98 * smooth.get(k, v.item()) + 0.02 * v.item()
        if not math.isfinite(smooth["loss"]):
            raise UserError(f"{name}: the loss is not finite at step {step}; {path} holds an earlier state")
        bar.set_postfix({k: f"{v:.4f}" for k, v in smooth.items()}, refresh=False)
        if time.time() - saved > save_s or step + 1 == steps:
            saved = time.time()
            state = {"modules": {k: trained(m) for k, m in modules.items()},
                     "optimizers": {k: o.state_dict()["state"] for k, o in optims.items()}}
            save_tensors(path, state, step=step + 1, seconds=spent + saved - start)
    return spent + time.time() - start


def train_vae(vae, photos, work, steps, large_steps, batch, device) -> float:
    def phase(name, optims, steps, batch, sides, joint_from, stream):
        def loss_at(step):
            r = rng(stream, step)
            chosen = [photos[i] for i in r.integers(len(photos), size=batch)]
            size = [min(8 * r.integers(sides[0] // 8, sides[1] // 8 + 1),
                        *(p.shape[k] // 8 * 8 for p in chosen)) for k in (0, 1)]
            x = torch.stack([crop(p, size, r) for p in chosen])
            x = x.to(device, memory_format=torch.channels_last)
            with torch.set_grad_enabled(step >= joint_from):
                posterior = vae.encode(x).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=torch_rng(stream + 1, step))
                z = posterior.mean + posterior.std * noise.to(device)
            x_hat = vae.decode(z).sample
            mse, kl = F.mse_loss(x_hat, x), posterior.kl().mean() / x[0].numel()
            return {"loss": mse + 0.1 * F.l1_loss(x_hat, x) + 1e-5 * kl, "mse": mse, "kl": kl}

        return loop(name, work, steps, {"vae": vae}, optims, loss_at)

    decoder, encoder = [vae.decoder, vae.post_quant_conv], [vae.encoder, vae.quant_conv]
    optims = optimizers({1.0: decoder, 0.1: encoder}, 0.02, 2e-3)
    small = phase("vae", optims, steps, batch, (64, 64), int(0.6 * steps), 1)
    optims = optimizers({1.0: decoder}, 0.01, 1e-3)
    return small + phase("vae_large", optims, large_steps, max(1, batch // 4), (64, 288), large_steps, 11)


@torch.no_grad()
def cache_latents(vae, photos, device) -> list[list[Tensor]]:
    """Per photograph: latents at full and at half size, every second one mirrored."""
    def encode(x):
        x = x[None, :, :x.shape[1] // 8 * 8, :x.shape[2] // 8 * 8].to(device)
        return vae.encode(x).latent_dist.mean[0]

    out = []
    for i, p in enumerate(tqdm(photos, "latents", mininterval=10)):
        x = torch.from_numpy(p[:, ::-1].copy() if i % 2 else p.copy()).permute(2, 0, 1) / 127.5 - 1
        half = F.interpolate(x[None], scale_factor=0.5, mode="bilinear", antialias=True)[0]
        out.append([encode(x), encode(half)])
    return out


class ImageTower(torch.nn.Module):
    """The other half of a small CLIP (Radford et al. 2021): latents (B, C, h, w) and the text encoder's last
    token to a common space, in which picture and caption shall find each other within the batch."""

    def __init__(self):
        super().__init__()
        widths, layers = (LATENTS, 64, 128, 128), []
        for a, b in zip(widths, widths[1:]):
            layers += [torch.nn.Conv2d(a, b, 3, 2, 1), torch.nn.SiLU()]
        self.image = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
                                         torch.nn.Linear(widths[-1], TEXT))
        self.text, self.log_scale = torch.nn.Linear(TEXT, TEXT), torch.nn.Parameter(torch.tensor(2.0))

    def loss(self, z: Tensor, e_text: Tensor) -> Tensor:
        a, b = F.normalize(self.image(z), dim=1), F.normalize(self.text(e_text[:, -1]), dim=1)
        logits, right = self.log_scale.exp() * a @ b.T, torch.arange(len(z), device=z.device)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def train_unet(unet, text, tokenizer, scheduler, latents, captions, work, steps, batch, device,
               text_only: bool = False) -> float:
    ids = tokenizer(captions + [""], padding="max_length", truncation=True, max_length=77,
                    return_tensors="pt").input_ids
    alpha_bar = scheduler.alphas_cumprod.to(device)
    # Denoising alone teaches so small a text encoder to forget its words (captions' outputs differed by 3e-6
    # of their power after training with Muon, by 5e-3 with AdamW); Stable Diffusion's comes from CLIP, which
    # tells captions apart.
    clip = ImageTower().to(device)
    unet.requires_grad_(not text_only)
    optims = optimizers({} if text_only else {1.0: [unet]}, 0.01, 1e-3, [text, clip])
    spoken = np.array([i for i, c in enumerate(captions) if c])

    def windows(which, half, r):
        views = [latents[i][half] for i in which]
        size = min(24, *(n for v in views for n in v.shape[1:])) // 4 * 4
        corners = [[r.integers(n - size + 1) for n in v.shape[1:]] for v in views]
        return torch.stack([v[:, y:y + size, x:x + size] for v, (y, x) in zip(views, corners)])

    def loss_at(step):
        r, g = rng(3, step), torch_rng(4, step)
        which, half = r.integers(len(latents), size=batch), r.integers(2)
        z = windows(which, half, r)
        which[r.random(batch) < 0.1] = -1  # the empty caption, for guidance
        t = torch.randint(len(alpha_bar), (batch,), generator=g).to(device)
        eps = torch.randn(z.shape, generator=g).to(device)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        e_text = text(ids[which].to(device)).last_hidden_state
        eps_hat = unet(a.sqrt() * z + (1 - a).sqrt() * eps, t, e_text).sample
        terms = {"denoise": F.mse_loss(eps_hat, eps)}
        pairs = r.permutation(spoken)[:32]
        terms["clip"] = clip.loss(windows(pairs, half, r), text(ids[pairs].to(device)).last_hidden_state)
        return {"loss": terms["denoise"] + 0.1 * terms["clip"], **terms}

    modules = {"text": text, "clip": clip} if text_only else {"unet": unet, "text": text, "clip": clip}
    return loop("text" if text_only else "unet", work, steps, modules, optims, loss_at)


@torch.no_grad()
def validate(vae, unet, text, tokenizer, scheduler, files, device) -> dict[str, float]:
    """PSNR of the VAE, and how far one UNet call from t = 250 brings z_t back to z (the noisy latent
    z_t / sqrt(alpha_bar) has noise-to-signal (1 - alpha_bar) / alpha_bar), on central 256 px crops."""
    ids = tokenizer([""], padding="max_length", max_length=77, return_tensors="pt").input_ids.to(device)
    c, t, psnr, before, after = text(ids).last_hidden_state, 250, [], [], []
    a = scheduler.alphas_cumprod[t].item()
    for i, f in enumerate(files):
        x = to_tensor(read_image(f)[0])
        y0, x0 = (x.shape[1] - 256) // 2, (x.shape[2] - 256) // 2
        x = x[None, :, y0:y0 + 256, x0:x0 + 256].to(device)
        z = vae.encode(x).latent_dist.mean
        psnr.append(10 * math.log10(4 / F.mse_loss(vae.decode(z).sample.clamp(-1, 1), x).item()))
        z = z * vae.config.scaling_factor
        noise = torch.randn(z.shape, generator=torch_rng(5, i)).to(device)
        z_t = a ** 0.5 * z + (1 - a) ** 0.5 * noise
        z_hat = (z_t - (1 - a) ** 0.5 * unet(z_t, t, c).sample) / a ** 0.5
        before.append(F.mse_loss(z_t / a ** 0.5, z).item()), after.append(F.mse_loss(z_hat, z).item())
    return {"vae_psnr_db": np.mean(psnr), "latent_mse_noisy_t250": np.mean(before),
            "latent_mse_one_step_t250": np.mean(after)}


README = """# tiny-sd: a Stable Diffusion in miniature

For trying, testing and teaching this repository's four scripts without a GPU or a download. It has the
folder layout and the classes of SD 2.1-base ({params}) and paints nothing worth looking at
by itself; its VAE is what matters.

Made by `data/make_tiny_sd.py` (the recipe is one command and resumes), with

    {command}

| | |
| --- | --- |
| data | {images} photographs, {captioned} with a caption: see below |
| VAE | {vae_steps} steps of {vae_batch} crops of 64x64, {vae_large_steps} of single crops of 64 to 288 px \
a side (decoder only), {vae_minutes:.0f} minutes |
| UNet and text encoder | {unet_steps} steps of {unet_batch} latent crops of 12x12 (half-size photographs) \
or 24x24, {unet_minutes:.0f} minutes |
| machine | {machine} |
| VAE PSNR on {val} unseen photographs (central 256x256) | **{vae_psnr_db:.2f} dB** |
| latent MSE at t = 250: noisy z_t / sqrt(alpha_bar) | {latent_mse_noisy_t250:.3f} |
| the same after one UNet call | **{latent_mse_one_step_t250:.3f}** |

{sources}
"""


def read_data(args) -> tuple[list[np.ndarray], list[str]]:
    """Photographs and their captions, an empty one where there is none."""
    files = list_images(args.data)
    known = {}
    for folder in map(Path, args.data):
        if (folder / "captions.jsonl").exists():
            lines = (folder / "captions.jsonl").read_text("utf-8-sig").split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
            known |= {folder / row["file"]: row["caption"] for row in rows}
    captions = [known.get(f, "") for f in files]
    photos = [np.asarray(read_image(f)[0]) for f in tqdm(files, "photographs", mininterval=10)]
    keep = [i for i, p in enumerate(photos)
            if min(p.shape[:2]) >= 192 and (captions[i] or not args.text_only)]
    return [photos[i] for i in keep], [captions[i] for i in keep]


def make(args) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    photos, captions = read_data(args)
    captioned = sum(map(bool, captions))
    note(f"{len(photos)} photographs of at least 192 px, {captioned} with a caption; on {device}")
    torch.manual_seed(0)
    vae, unet, text, tokenizer = new_models(captions)
    work, out = Path(args.work), Path(args.out)
    if args.text_only:
        vae, unet = (load_part(type(m), out, name) for m, name in ((vae, "vae"), (unet, "unet")))
        tokenizer = load_part(CLIPTokenizer, out, "tokenizer")
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(out, subfolder="text_encoder"))  # random weights
    else:
        pca_encoder(vae, photos[::7][:200])
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    vae.to(device, memory_format=torch.channels_last), unet.to(device), text.to(device)

    vae_s = 0 if args.text_only else train_vae(vae, photos, work, args.vae_steps, args.vae_large_steps,
                                               args.vae_batch, device)
    latents = cache_latents(vae.eval(), photos, device)
    if not args.text_only:
        scale = 1 / torch.cat([z[0].flatten() for z in latents]).std().item()
        vae.register_to_config(scaling_factor=round(scale, 5))
    latents = [[v * vae.config.scaling_factor for v in views] for views in latents]
    unet_s = train_unet(unet, text, tokenizer, scheduler, latents, captions, work, args.unet_steps,
                        args.unet_batch, device, args.text_only)

    if args.text_only:
        return text.half().save_pretrained(out / "text_encoder")
    StableDiffusionPipeline(vae.half(), text.half(), tokenizer, unet.half(), scheduler, None, None,
                            requires_safety_checker=False).save_pretrained(out)
    val = list_images(args.val)
    vae, unet, text = vae.float(), unet.float().eval(), text.float().eval()
    figures = validate(vae, unet, text, tokenizer, scheduler, val, device)
    parts = {"VAE": vae, "UNet": unet, "text encoder": text}
    describe(args, parts, device, images=len(photos), captioned=captioned, val=len(val),
             vae_minutes=vae_s / 60, unet_minutes=unet_s / 60, **figures)
    print(json.dumps({k: round(float(v), 4) for k, v in figures.items()}))


def describe(args, parts: dict[str, torch.nn.Module], device: str, **figures) -> None:
    """Writes the README of `--out`."""
    sources = "Sources of the photographs: not recorded (`--sources`)."
    if args.sources:
        sources = Path(args.sources).read_text()
    machine = f"{torch.get_num_threads()} cores, {platform.machine()}, no GPU"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    settings = {k: getattr(args, k)
                for k in ("vae_steps", "vae_large_steps", "vae_batch", "unet_steps", "unet_batch")}
    flags = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in settings.items())
    sizes = {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items()}
    text = README.format(
        params=", ".join(f"{k} {n / 1e6:.2f} M" for k, n in sizes.items()),
        command=f"python -m data.make_tiny_sd --data PHOTOS --val OTHERS {flags}",
        machine=machine, sources=sources, **settings, **figures)
    atomic(Path(args.out) / "README.md", lambda tmp: tmp.write_text(text))


def main(argv=None):
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--data", nargs="+", required=True, help="folders of photographs")
    cli.add_argument("--val", nargs="+", required=True,
                     help="photographs to measure on, none of them in --data")
    cli.add_argument("--out", default=ROOT / "data" / "tiny-sd")
    cli.add_argument("--work", default=ROOT / "runs" / "tiny-sd", help="training state, for resuming")
    cli.add_argument("--sources",
                     help="a text file on the photographs' sources and terms, copied into the README")
    cli.add_argument("--vae-steps", type=int, default=20000)
    cli.add_argument("--vae-large-steps", type=int, default=5000)
    cli.add_argument("--vae-batch", type=int, default=8)
    cli.add_argument("--unet-steps", type=int, default=20000)
    cli.add_argument("--unet-batch", type=int, default=16)
    cli.add_argument("--threads", type=int, help="CPU threads")
    cli.add_argument("--text-only", action="store_true", help="train the text encoder of --out anew, for "
                     "--unet-steps steps, with its UNet frozen")
    make(cli.parse_args(argv))


if __name__ == "__main__":
    run_cli(main)
