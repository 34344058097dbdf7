"""Makes `data/tiny-sd`: a Stable Diffusion in miniature, in the diffusers layout of SD 2.1-base.

    python -m data.make_tiny_sd train --data PHOTOS --val OTHER_PHOTOS     (from the repo's root)

    x -> VAE encoder -> z -> VAE decoder -> x_hat
                        \\-> z_t -> UNet(t, text encoder(caption)) -> eps_hat

1. `pca_encoder`: the encoder begins as principal components of 8x8 pixels, written into a network.
2. `stage1` trains the VAE, on crops of 64 to 256 px; a penalty keeps the latents close to those components.
   One normalisation group: with several of a few channels each, their statistics hang on the crop's share of
   zero-padded border, and contrast fails at sizes not trained on. Weight decay: weights before a norm
   otherwise grow without end.
3. `stage2`: noise prediction on windows of the first encoder's latents, given captions. The text encoder also
   learns to tell captions apart, as CLIP; they name what so small a network can paint: light and colour.
4. `assemble`: the averages of both trainings' last weights, in half precision, with figures.

Stages do not need each other, so that both may run at once, in runs of their own:

    python -m data.make_tiny_sd train --stage 1 --data PHOTOS --val OTHERS --out runs/vae
    python -m data.make_tiny_sd train --stage 2 --data PHOTOS --val OTHERS --out runs/unet
    python -m data.make_tiny_sd assemble runs/vae runs/unet --val OTHERS

A folder of photographs may hold a `captions.jsonl` (for each picture a line {"file", "caption"}).
"""

import colorsys
import copy
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common import TINY_SD, CommandLine, Crops, Run, Stage, both, load_part, load_trained, run_cli
from data.files import list_images, read_model
from data.pictures import read_image, rng, to_tensor, torch_rng
from sodiff import read_captions

LATENTS, WIDTHS, TEXT = 16, (16, 32, 64, 128), 96
NOISE = 0.03  # which the decoder learns to bear, in units of the latents' deviation
DECAY = 0.1  # of all matrices
SCHEDULER = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",  # as SD's
                          clip_sample=False, set_alpha_to_one=False, steps_offset=1)


@dataclass
class Stage1(Stage):
    """The VAE."""
    crop: int            = both(256,   256,   "pixels a side of a sample: one crop, or several smaller ones")
    hold: float          = both(0.02,  0.02,  "of the latents' squared distance from the first encoder's")
    lr: float            = both(0.02,  0.02,  "Muon's")
    lr_adam: float       = both(2e-3,  2e-3,  "for what is no matrix, and for the encoder")
    decay: float         = both(0.7,   0.7,   "last part of the run in which lr falls to 0")
    batch: int           = both(1,     1,     "samples")
    steps: int           = both(9000,  9000,  "two and a half hours of one CPU thread")


@dataclass
class Stage2(Stage):
    """UNet and text encoder."""
    crop: int            = both(80,    80,    "latents a side of all windows of a sample together")
    clip_alone: int      = both(400,   400,   "steps without the UNet, until it has words to hear")
    lr: float            = both(0.01,  0.01,  "Muon's")
    lr_adam: float       = both(1e-3,  1e-3,  "for what is no matrix, and for the text encoder")
    decay: float         = both(0.7,   0.7,   "last part of the run in which lr falls to 0")
    batch: int           = both(1,     1,     "samples")
    steps: int           = both(6000,  6000,  "two and a half hours of one CPU thread")


# ------------------------------------------------------------------------------------------ training


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024), for matrices and convolution kernels.
    torch.optim.Muon does the same for 2-d weights only and in bfloat16, which many CPUs emulate."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(p.grad)
                u = orthogonal(p.grad.add(m, alpha=group["momentum"]).flatten(1))
                u *= max(1, u.shape[0] / u.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * DECAY).add_(u.view_as(p), alpha=-group["lr"])


def orthogonal(g: Tensor) -> Tensor:
    """Nearly the closest matrix with orthonormal rows or columns, by five Newton-Schulz steps."""
    x = g / (g.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def optimizers(cfg: Stage1 | Stage2, modules, plain) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of `modules`, AdamW for what else they have and for all of the `plain` ones."""
    params = [p for m in modules for p in m.parameters()]
    wide = {id(p): p for p in params if p.ndim > 1 and min(p.shape[:2]) >= 8}
    rest = [p for p in params if id(p) not in wide] + [p for m in plain for p in m.parameters()]
    adam = [{"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": DECAY}]
    return [Muon(wide.values(), cfg.lr), torch.optim.AdamW(adam, cfg.lr_adam, betas=(0.9, 0.99))]


def train_stage(run: Run, number: int, cfg: Stage1 | Stage2, data, model: nn.Module, parts, plain, loss_at,
                figures) -> None:
    """Steps down loss_at(step, batch); what it keeps, and what `figures` sees, is an average of the model's
    last weights."""
    acc = run.start(number, cfg, float32=True, **{type(model).__name__: model})
    model.to(acc.device, memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.996))
    muon, adam = acc.prepare(*optimizers(cfg, parts, plain))
    modules = {"model": model, "average": average}
    for step, batch in run.loop(data, modules, {"muon": muon, "adam": adam}):
        with acc.accumulate(model):
            terms = loss_at(step, batch)
            acc.backward(terms["loss"])
            for optimizer in (muon, adam):
                run.update(model, optimizer, step)
        average.update_parameters(model)
        run.log(**terms)
        if (step + 1) % (10 * cfg.save_every) == 0 or step + 1 == cfg.steps:
            tqdm.write(f"step {step + 1}: {figures(average.module)}")
    run.save(average.module.requires_grad_(True))  # all of it is kept


# ----------------------------------------------------------------------------------------------- VAE


@torch.no_grad()
def pca_encoder(vae: AutoencoderKL, x: Tensor) -> None:
    """Makes of the encoder the linear map to the `LATENTS` strongest principal components of x's 8x8 patches:
    its three strided convolutions gather 2x2 cells each and keep as many components as they have channels.
    Residual branches start at zero.

    Half-whitened: a component of variance v is scaled by v^(-1/4), and all to a mean square of 1. Squared
    errors and angles between latents then weigh brightness more than the faintest texture, yet count both.

    The last GroupNorm and SiLU are made linear: every latent stands there with both signs, since
    silu(a) - silu(-a) = a, and beside constants +-`big` that alone set the group's variance."""
    def clear(layer, eye=0):
        layer.weight.zero_(), layer.bias.zero_()
        for c in range(eye):
            layer.weight[c, c, layer.weight.shape[2] // 2, layer.weight.shape[3] // 2] = 1
        return layer

    enc, h = vae.encoder, x
    for name, layer in enc.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    clear(enc.conv_in, 3)
    for i, block in enumerate(enc.down_blocks[:3]):
        resnet, conv, n = block.resnets[0], clear(block.downsamplers[0].conv), h.shape[1]
        if resnet.conv_shortcut is not None:
            clear(resnet.conv_shortcut, resnet.in_channels)
        cells = F.pixel_unshuffle(h, 2).permute(0, 2, 3, 1).reshape(-1, 4 * n)
        mean, (power, basis) = cells.mean(0), torch.linalg.eigh(torch.cov(cells.T))
        k = LATENTS if i == 2 else min(conv.out_channels, 4 * n)
        basis, power = basis.flip(1)[:, :k], power.flip(0)[:k].clamp_min(1e-6 * power[-1])
        if i == 2:
            basis = basis / (power.sqrt() * power.sqrt().mean()).sqrt()
        conv.weight[:k, :n, :2, :2], conv.bias[:k] = basis.T.reshape(k, n, 2, 2), -mean @ basis
        h = F.conv2d(F.pad(h, (0, 1, 0, 1)), conv.weight[:k, :n], conv.bias[:k], stride=2)
    spread, big = clear(enc.down_blocks[-1].resnets[0].conv_shortcut), 100.0
    enc.conv_norm_out.weight.fill_(big * (2 / WIDTHS[-1]) ** 0.5)
    clear(enc.conv_out), clear(vae.quant_conv, 2 * LATENTS)
    for channel in range(2 * LATENTS):
        sign, latent = (1, -1)[channel // LATENTS], channel % LATENTS
        spread.weight[channel, latent] = enc.conv_out.weight[latent, channel, 1, 1] = sign
    spread.bias[2 * LATENTS], spread.bias[2 * LATENTS + 1] = big, -big
    enc.conv_out.bias[LATENTS:] = 2 * math.log(NOISE)  # the log-variance


class Pictures(Crops):
    """Sample n -> crops (B, 3, side, side) of different photographs, always about as many pixels. Offsets are
    arbitrary, so that the 8x8 grid of photographs that are JPEGs themselves falls anywhere."""
    turns = 1

    def __getitem__(self, n: int) -> tuple[Tensor]:
        side = int(rng(self.seed, 2, n).choice([64] * 5 + [96, 96, 128, 192, 256]))
        crops = (self.crop(16 * n + i)[:side, :side] for i in range(round((self.size / side) ** 2)))
        return (torch.stack([to_tensor(Image.fromarray(a)) for a in crops]),)


def first_vae(base: str | None, data: list[Path] = ()) -> AutoencoderKL:
    """The VAE before its training; without data its architecture only."""
    if base:
        return load_part(AutoencoderKL, base, "vae")
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(block_out_channels=WIDTHS, layers_per_block=1, latent_channels=LATENTS,
                        norm_num_groups=1, scaling_factor=1.0, **blocks)
    if data:
        crops = Pictures(data, 192, 0)
        pca_encoder(vae, torch.stack([to_tensor(Image.fromarray(crops.crop(n))) for n in range(150)]))
    return vae


def stage1(run: Run, cfg: Stage1, vae: AutoencoderKL, val: list[Tensor]) -> None:
    first = copy.deepcopy(vae).requires_grad_(False)
    vae.quant_conv.requires_grad_(False)  # its log-variances, of NOISE, are not trained

    def loss_at(step, batch):
        x = batch[0].flatten(0, 1).to(memory_format=torch.channels_last)
        z = vae.encode(x).latent_dist.mean
        noise = torch.randn(z.shape, generator=torch_rng(run.seed, 3, step)).to(z)
        x_hat = vae.decode(z + NOISE * noise).sample
        mse = F.mse_loss(x_hat, x)
        moved = F.mse_loss(z, first.to(z.device).encode(x).latent_dist.mean)
        return {"loss": mse + 0.1 * F.l1_loss(x_hat, x) + cfg.hold * moved, "mse": mse, "moved": moved}

    train_stage(run, 1, cfg, Pictures(run.data, cfg.crop, run.seed), vae, [vae.decoder, vae.post_quant_conv],
                [vae.encoder], loss_at, lambda vae: validate_vae(vae, val))


# -------------------------------------------------------------------------------------- UNet and text

LIGHT = {0.2: "black", 0.35: "dark", 0.5: "dim", 0.65: "light", 0.8: "bright", 2: "white"}  # mean below which
HUES = {0: "red", 0.075: "brown", 0.15: "yellow", 0.32: "green", 0.5: "cyan", 0.61: "blue", 0.78: "purple",
        0.9: "pink", 1: "red"}


def describe(colours: Tensor, name: str = "") -> str:
    """A caption that says light and colour of a picture's upper and lower half and middle, and its contrast.
    colours (3, h, w) in [-1, 1], a pixel for each latent."""
    def words(part):
        red, green, blue = (part.mean((1, 2)) / 2 + 0.5).tolist()
        light, strength = (red + green + blue) / 3, max(red, green, blue) - min(red, green, blue)
        hue = colorsys.rgb_to_hsv(red, green, blue)[0]
        colour = HUES[min(HUES, key=lambda known: abs(known - hue))] if strength > 0.05 else "grey"
        return f"{next(LIGHT[top] for top in LIGHT if light < top)} {'strong ' * (strength > 0.2)}{colour}"

    above, below = colours.chunk(2, 1)
    middle, spread = torch.cat(colours.chunk(4, 2)[1:3], 2), colours.mean(0).std()
    tone = "flat" if spread < 0.25 else "mixed" if spread < 0.45 else "stark"
    return f"{name or 'a photo'}, {words(above)} above, {words(below)} below, {words(middle)} middle, {tone}"


@torch.no_grad()
def see(vae, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and mean colours, both (C, h, w), of a picture (3, H, W)."""
    x = x[None, :, :x.shape[1] // 8 * 8, :x.shape[2] // 8 * 8]
    return vae.encode(x.to(vae.device)).latent_dist.mean[0].cpu(), F.avg_pool2d(x, 8)[0].cpu()


def token_ids(tokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


class Windows(torch.utils.data.Dataset):
    """Sample n -> windows of latents (B, C, side, side) and their captions' ids (B, 77), a fifth of them
    empty, a fifth a name alone. `views`: of each photograph in full and half size what `see` gives."""

    def __init__(self, views: list, names: list[str], tokenizer, size: int, seed: int):
        self.views, self.names, self.tokenizer, self.size, self.seed = views, names, tokenizer, size, seed

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        r = rng(self.seed, 1, n)
        side, half = int(r.choice([8, 12, 16, 16, 20, 24, 32])), int(r.random() < 0.4)
        which = r.integers(len(self.views), size=max(4, round((self.size / side) ** 2)))
        side = min(side, *(n // 4 * 4 for i in which for n in self.views[i][half][0].shape[1:]))
        z, captions, kinds = [], [], r.random(len(which))
        kinds[:2] = 1  # never all empty: CLIP needs a pair
        for i, kind in zip(which, kinds):
            y, x = (r.integers(n - side + 1) for n in self.views[i][half][0].shape[1:])
            latents, colours = (v[:, y:y + side, x:x + side] for v in self.views[i][half])
            z.append(latents)
            name = self.names[i]
            captions.append("" if kind < 0.2 else name if name and kind < 0.4 else describe(colours, name))
        return torch.stack(z), token_ids(self.tokenizer, captions)


class ImageTower(nn.Module):
    """The other half of a small CLIP (Radford et al. 2021): latents (B, C, h, w) and the text encoder's last
    token to a common space, where picture and caption shall find each other within the batch. Denoising
    alone teaches so small a text encoder to forget its words."""

    def __init__(self):
        super().__init__()
        layers = [layer for width in ((LATENTS, 64), (64, 128), (128, 128))
                  for layer in (nn.Conv2d(*width, 3, 2, 1), nn.SiLU())]
        self.image = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 128, TEXT))
        self.text, self.log_scale = nn.Linear(TEXT, TEXT), nn.Parameter(torch.tensor(2.0))

    def loss(self, z: Tensor, e_text: Tensor) -> Tensor:
        a, b = F.normalize(self.image(z), dim=1), F.normalize(self.text(e_text[:, -1]), dim=1)
        logits, right = self.log_scale.exp() * a @ b.T, torch.arange(len(z), device=z.device)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


class Denoiser(nn.Module):
    """UNet and text encoder, and the tower that helps to train the latter."""

    def __init__(self, base: str | None, vocabulary: CLIPTokenizer):
        super().__init__()
        torch.manual_seed(1)
        ids = {f"{k}_token_id": getattr(vocabulary, f"{k}_token_id") for k in ("bos", "eos", "pad")}
        self.text = load_part(CLIPTextModel, base, "text_encoder") if base else CLIPTextModel(CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=TEXT, intermediate_size=4 * TEXT, num_hidden_layers=2,
            num_attention_heads=3, **ids))
        self.unet = load_part(UNet2DConditionModel, base, "unet") if base else UNet2DConditionModel(
            sample_size=16, in_channels=LATENTS, out_channels=LATENTS, block_out_channels=(64, 96, 128),
            down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"], layers_per_block=1,
            norm_num_groups=4, attention_head_dim=[2, 3, 4], cross_attention_dim=TEXT,
            use_linear_projection=True)
        self.tower = ImageTower()


def vocabulary_of(run: Run, captions: list[str]) -> CLIPTokenizer:
    """Kept in the run's folder, since its training is not quite deterministic; or that of --base."""
    kept = run.folder / "tokenizer"
    if run.args.base:
        load_part(CLIPTokenizer, run.args.base, "tokenizer").save_pretrained(kept)
    elif not kept.exists():
        tokenizer, new = CLIPTokenizer().train_new_from_iterator(captions, 1024), run.folder / ".tokenizer"
        tokenizer.model_max_length = 77
        tokenizer.save_pretrained(new)
        os.replace(new, kept)
    return CLIPTokenizer.from_pretrained(kept)


def stage2(run: Run, cfg: Stage2, vae: AutoencoderKL, photos: list[np.ndarray], names: list[str],
           val: list[Tensor]) -> None:
    def views_of(photo):  # in full and half size
        x = to_tensor(Image.fromarray(photo))[None]
        half = F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)
        return [see(vae, v[0]) for v in (x, half)]

    views = [views_of(photo) for photo in tqdm(photos, "latents", mininterval=10)]
    val_views = [see(vae, central(x)) for x in val]
    tokenizer = vocabulary_of(run, [describe(full[1], name) for name, (full, _) in zip(names, views)])
    model, alpha_bar = Denoiser(run.args.base, tokenizer), SCHEDULER.alphas_cumprod

    def loss_at(step, batch):
        (z, ids), g = (v.flatten(0, 1) for v in batch), torch_rng(run.seed, 4, step)
        t = torch.randint(len(alpha_bar), (len(z),), generator=g)
        eps, a = torch.randn(z.shape, generator=g).to(z), alpha_bar[t].view(-1, 1, 1, 1).to(z)
        e_text = model.text(ids).last_hidden_state
        spoken = ids[:, 1] != ids[:, -1]  # not only padding
        clip = model.tower.loss(z[spoken], e_text[spoken])
        if step < cfg.clip_alone:
            return {"loss": clip}
        eps_hat = model.unet(a.sqrt() * z + (1 - a).sqrt() * eps, t.to(z.device), e_text).sample
        # unweighted, late steps are drowned, and there captions help
        denoise = ((eps_hat - eps).square() * a ** -0.5).mean()
        return {"loss": denoise + 0.1 * clip, "denoise": denoise, "clip": clip}

    train_stage(run, 2, cfg, Windows(views, names, tokenizer, cfg.crop, run.seed), model, [model.unet],
                [model.text, model.tower], loss_at,
                lambda model: validate_unet(tokenizer, model.text, model.unet, val_views))


# --------------------------------------------------------------------------------- figures, assembly


@torch.no_grad()
def validate_vae(vae, val: list[Tensor]) -> dict[str, float]:
    """PSNR of whole pictures, cut to multiples of 8 px."""
    psnr = []
    for x in val:
        x = x[None, :, :x.shape[1] // 8 * 8, :x.shape[2] // 8 * 8].to(vae.device)
        x_hat = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        psnr.append(10 * math.log10(4 / F.mse_loss(x_hat, x)))
    return {"vae_psnr_db": float(np.mean(psnr))}


@torch.no_grad()
def validate_unet(tokenizer, text, unet, val_views) -> dict[str, float]:
    """The error of z_t / sqrt(alpha_bar) at t = 49 and 250, and what one call without a caption leaves of it;
    the denoising loss over all t, and t >= 500, with each picture's own caption and with the next one's."""
    alpha_bar, out = SCHEDULER.alphas_cumprod, {}
    captions = [describe(colours) for _, colours in val_views]
    e_text = text(token_ids(tokenizer, [*captions, ""]).to(unet.device)).last_hidden_state

    def losses(t, *rows):
        """The mean over pictures i of z_t's loss with e_text[row[i]], for each row."""
        a, out = alpha_bar[t].item(), []
        for i, (z, _) in enumerate(val_views):
            eps = torch.randn(z.shape, generator=torch_rng(5, i))
            z_t = (a ** 0.5 * z + (1 - a) ** 0.5 * eps).to(unet.device).expand(len(rows), -1, -1, -1)
            eps_hat = unet(z_t, t, e_text[[row[i] for row in rows]]).sample.cpu()
            out.append((eps_hat - eps).square().mean((1, 2, 3)))
        return torch.stack(out).mean(0).tolist()

    own = list(range(len(val_views)))
    for t in (49, 250):
        out[f"noisy_t{t}"] = ((1 - alpha_bar[t]) / alpha_bar[t]).item()
        out[f"one_step_t{t}"] = out[f"noisy_t{t}"] * losses(t, [-1] * len(own))[0]
    pairs = np.array([losses(t, own, own[1:] + own[:1]) for t in range(50, 1000, 100)])
    for late, part in (("", pairs), ("_late", pairs[5:])):
        mine, others = part.mean(0).tolist()
        out |= {f"own{late}": mine, f"other{late}": others, f"gain{late}": 100 * (others / mine - 1)}
    return out


README = """# tiny-sd: a Stable Diffusion in miniature

For trying, testing and teaching this repository's four scripts without a GPU or a download. It has the
folder layout and the classes of SD 2.1-base and paints nothing worth looking at by itself; its VAE is what
matters. {params}; {latents} latent channels. Made by `data/make_tiny_sd.py`.

| | |
| --- | --- |
| trained | {trained} |
| VAE, PSNR on {val} unseen photographs (whole) | **{vae_psnr_db:.2f} dB** |
| central 256 px, latent MSE before, after one UNet call, t = 49 | {noisy_t49:.3f}, **{one_step_t49:.4f}** |
| the same, t = 250 | {noisy_t250:.3f}, **{one_step_t250:.4f}** |
| denoising loss with the own caption and another's, all t | **{own:.4f}**, {other:.4f} ({gain:+.2f} %) |
| the same, t >= 500 | **{own_late:.4f}**, {other_late:.4f} ({gain_late:+.2f} %) |

Captions are of this kind, light and colour read off the picture by the recipe:
"{example}".

{sources}
"""


def assemble(args) -> None:
    """What two runs keep, in half precision, into --to; the figures are those of what is saved. An old folder
    is replaced when the new one is complete."""
    tokenizer = CLIPTokenizer.from_pretrained(args.unet / "tokenizer")
    vae, model, trained = first_vae(args.base), Denoiser(args.base, tokenizer), []
    for stage, (folder, part) in enumerate(((args.vae, vae), (args.unet, model)), 1):
        tensors, header = read_model(folder, "make_tiny_sd", stage)
        load_trained(part.requires_grad_(True), tensors, folder)
        trained.append(f"{type(part).__name__}: {header[f'stage{stage}.steps']} steps")
    parts = {"VAE": vae, "UNet": model.unet, "text encoder": model.text}
    for m in parts.values():
        m.half().float().eval()
    val = [to_tensor(read_image(f)[0]) for f in list_images(args.val)]
    val_views = [see(vae, central(x)) for x in val]
    figures = validate_vae(vae, val) | validate_unet(tokenizer, model.text, model.unet, val_views)
    new = args.to.with_name(f".{args.to.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    halves = vae.half(), model.text.half(), tokenizer, model.unet.half(), SCHEDULER, None, None
    StableDiffusionPipeline(*halves, requires_safety_checker=False).save_pretrained(new)
    millions = {k: sum(p.numel() for p in m.parameters()) / 1e6 for k, m in parts.items()}
    (new / "README.md").write_text(README.format(
        params=", ".join(f"{k} {n:.2f} M" for k, n in millions.items()), latents=LATENTS, val=len(val),
        trained="; ".join(trained), example=describe(val_views[0][1]), **figures,
        sources=args.sources.read_text() if args.sources else "The photographs' sources: not recorded."))
    shutil.rmtree(args.to, ignore_errors=True)
    os.replace(new, args.to)
    print(json.dumps({k: round(v, 4) for k, v in figures.items()}))


def central(x: Tensor, side: int = 256) -> Tensor:
    y0, x0 = (x.shape[1] - side) // 2, (x.shape[2] - side) // 2
    return x[:, y0:y0 + side, x0:x0 + side]


def train(args) -> None:
    cfg1, cfg2 = Stage1.of(args), Stage2.of(args)
    run = Run(args, "make_tiny_sd", "", cfg1, cfg2)
    known, files = read_captions(run.data), list_images(run.data)
    photos = [np.asarray(read_image(f)[0]) for f in tqdm(files, "photographs", mininterval=10)]
    names = [known.get(f, {"caption": ""})["caption"] for f in files]
    val = [to_tensor(read_image(f)[0]) for f in list_images(args.val)]
    vae = first_vae(args.base, run.data)
    if args.stage in ("2", "all"):
        stage2(run, cfg2, copy.deepcopy(vae), photos, names, val)
    if args.stage in ("1", "all"):
        stage1(run, cfg1, vae, val)


def main(argv=None):
    cli = CommandLine("make_tiny_sd.py", description="a Stable Diffusion in miniature, like data/tiny-sd")
    cli.tools = {}
    cli.train(train, Stage1, Stage2)
    p = cli.command("assemble", "both stages' results into a diffusers folder", assemble)
    p.add_argument("vae", type=Path, help="the folder of stage 1's run")
    p.add_argument("unet", type=Path, help="the folder of stage 2's run")
    p.add_argument("--val", nargs="+", required=True, help="photographs to measure on, from 256 px")
    p.add_argument("--base", help="the earlier tiny-sd that they began with, if any")
    p.add_argument("--to", type=Path, default=TINY_SD)
    p.add_argument("--sources", type=Path, help="a text for the README on the photographs")
    cli.run(argv)


if __name__ == "__main__":
    run_cli(main)
