"""MoE-DiffIR: Task-customized Diffusion Priors for Universal Compressed Image Restoration (ECCV 2024, arXiv 2407.10833v1).

    x_lq -> VAE enc -> z_lq -> + noise -> z_t -> UNet (frozen) -> eps -> x0, or DDIM over N steps -> z_0 -> VAE dec -> x_hat
       |                 \\-> MoE-Prompt Module ----^ SPADE on skips and mid block       compensator (stage 2) ----^
       |-> prior DP ----------> its routers                                              (encoder features of x_lq)
       \\-> quality enhancer -> CLIP -> Visual2Text adapter -> c (the UNet's text tokens)

| paper     | code      | shape                    | range                                                       |
| --------- | --------- | ------------------------ | ----------------------------------------------------------- |
| LQ, hr    | x_lq, x_hq | (B, 3, H, W)            | [-1, 1]; the compressed image and its original              |
| z_lq      | z_lq      | (B, C, H / 8, W / 8)     | latent of x_lq, scaling factor applied                      |
| z_t, z_0  | z_t, z_0  | as z_lq                  | noised latent; the UNet's estimate of the original's latent |
| DP        | dp        | (B, M, D)                | degradation prior, tokens of an image encoder               |
| x         | x         | (B, width)               | a router's input, pooled; one router for each scale         |
| G(x)      | gates     | (B, N)                   | K softmax values, the others 0                              |
| prompts   | prompts   | (N, 32, width)           | the experts, N = 7; K = 3 of them are chosen                |

No code or weights were released. Where the paper is silent the code says "ours" and README.md lists it; what differs
from the paper stands at its place, in lines beginning DIFFERS.

    python moe_diffir.py train                     # benchmark of the bundled photographs, both stages, table, picture
    python moe_diffir.py restore photo.webp -o photo.png
    python moe_diffir.py bench --data photos --out bench
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin, features
from torch import Tensor, nn
from tqdm import tqdm

from common import (FID, ROOT, SD, SD21_BASE, SD21_CONFIG, TINY_SD, Crops, Metrics, Parser, Run, UserError, adain, add_eval,
                    add_figures, add_profile, add_restore, add_train, atomic, both, brief_network, device, dists_small, evaluate,
                    fill, find_base, fingerprint, for_inference, gradient_norms, list_images, load_tensors, matplotlib, mean,
                    noise_for, note, outputs, pad_to, paper_values, peak_memory, profile, read_image, read_json, read_model,
                    restore_files, rng, run_cli, save_png, save_tensors, stage_config, text_table, text_tokens, tile_size,
                    tiled, to_image, to_tensor, torch_rng, trainable, update, write_json)

# ------------------------------------------------------------------------------------ configurations

CLIP_B32, CLIP_H14 = "openai/clip-vit-base-patch32", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass
class Stage1:
    """MoE-Prompt Module and Visual2Text adapter, Secs. 3.2 to 3.4."""
    #                           tiny run      paper run
    experts: int         = both(7,            7,         "Sec. 4.3, Fig. 6: N prompts a scale", "experts")
    top_k: int           = both(3,            3,         "Sec. 4.3, Fig. 6: K of them chosen", "top_k")
    prompt: str          = both("moe",        "moe",     "Table 2", "prompt", ("none", "single", "multiple", "moe"))
    prompt_length: int   = both(32,           32,        "ours: tokens of a prompt")
    width: int           = both(64,           320,       "ours: channels of the module, at every scale")
    heads: int           = both(4,            8,         "ours")
    dp: str              = both("small",      CLIP_B32,  "Sec. 3.2, Table 3: 'small' (trained along), 'none', or a CLIP", "dp")
    v2t: str             = both("small",      CLIP_H14,  "Sec. 3.3, Table 3: as --dp; H/14 shares SD 2.1's text space", "clip")
    enhancer: int        = both(1,            4,         "ours: transformer blocks of the quality enhancer")
    lambda_dp: float     = both(0.1,          0.0,       "ours: the small prior learns to tell tasks apart, as DA-CLIP did")
    balance: float       = both(0.0,          0.0,       "ours: weight of Shazeer et al.'s load balancing", "balance")
    crop: int            = both(128,          256,       "Sec. 4.1")
    t_max: int           = both(499,          999,       "Eq. 2: t is uniform in 0..t_max")
    lr: float            = both(1e-3,         5e-5,      "Sec. 4.1")
    decay: float         = both(0.5,          0.0,       "ours: last part of the run in which lr falls to 0")
    clip: float          = both(1.0,          1.0,       "ours: gradient norm; 0 clips nothing")
    batch: int           = both(8,            32,        "Sec. 4.1")
    steps: int           = both(350,          400_000,   "Sec. 4.1")
    accumulate: int      = both(1,            1,         "ours: micro-batches a step")
    workers: int         = both(0,            8,         "ours: loader processes")
    save_every: int      = both(100,          2000,      "ours")


@dataclass
class Stage2:
    """Decoder compensator, Sec. 3.4."""
    #                           tiny run      paper run
    start_t: int         = both(1,            999,       "ours: where sampling starts, from z_lq noised to it")
    sampling: tuple      = both((1, 2),       (1, 50),   "ours: steps of sampling, in turn, for training; both are evaluated")
    levels: int          = both(1,            4,         "ours: levels of the decoder that are compensated, from full size down")
    blocks: int          = both(0,            2,         "ours: residual blocks at each of them")
    lpips: str           = both("small",      "vgg",     "Eq. 4; 'small' needs no download", choices=("small", "vgg"))
    cache_latents: int   = both(256,          70_000,    "Sec. 4.1: z_0 made in advance; 0 makes them on the fly", "cache_latents")
    crop: int            = both(256,          256,       "Sec. 4.1")
    lr: float            = both(3e-4,         1e-4,      "Sec. 4.1")
    decay: float         = both(0.8,          0.0,       "ours: last part of the run in which lr falls to 0")
    clip: float          = both(1.0,          1.0,       "ours: gradient norm; 0 clips nothing")
    batch: int           = both(2,            32,        "Sec. 4.1")
    steps: int           = both(450,          100_000,   "Sec. 4.1")
    accumulate: int      = both(1,            1,         "ours: micro-batches a step")
    workers: int         = both(0,            8,         "ours: loader processes")
    save_every: int      = both(100,          1000,      "ours")


# ------------------------------------------------------------------------ the CIR benchmark, Sec. 3.5

LEVELS = {"jpeg": ("5", "10", "15"), "webp": ("5", "10", "15"), "hevc": ("47", "42", "37"), "vvc": ("47", "42", "37"),
          "c_psnr": ("low", "med", "high"), "c_ssim": ("low", "med", "high"), "hific": ("low", "med", "high"),  # the 21 tasks
          "avc": ("47", "42", "37")}  # unseen in training, as are JPEG QF 25 and VVC QP 32 and 52 (Table 2)
TRAINED = ["jpeg", "webp", "hevc", "vvc"]  # of the seven, those that we can encode
RANGE = {"jpeg": (1, 100), "webp": (0, 100), "hevc": (0, 51), "vvc": (0, 63), "avc": (0, 51)}  # lowest level first in LEVELS
# Stream format, pixel format, options at QP q. x265 and libvvenc would code an I frame at q - 3 and x265 and x264 add a
# message with their settings, larger than small pictures; accurate_rnd: FFmpeg's fast colour conversion darkens.
FFMPEG = {"hevc": ("hevc", "yuv420p", "-c:v libx265 -x265-params qp={q}:ipratio=1.0:info=0"),
          "vvc": ("vvc", "yuv420p10le", "-c:v libvvenc -qp {q} -qpa 0 -vvenc-params IntraQPOffset=0 -preset faster"),
          "avc": ("h264", "yuv420p", "-c:v libx264 -qp {q} -i_qfactor 1.0 -bsf:v filter_units=remove_types=6")}
RAW = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
COLOURS = ["-sws_flags", "accurate_rnd+full_chroma_int+full_chroma_inp"]
CODEC_SECONDS = 120  # an encoder or decoder that takes longer on one picture has hung
CACHE = ".cir-bench"  # in a folder of training photographs: hidden, so that nobody takes it for photographs


@functools.lru_cache
def ffmpeg() -> str:
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
        return get_ffmpeg_exe()
    except ImportError:
        raise UserError("needs imageio-ffmpeg: pip install -e '.[codecs]'") from None
    except RuntimeError as error:
        raise UserError(f"needs an FFmpeg that imageio-ffmpeg finds ({str(error).splitlines()[0]})") from None


def run_ffmpeg(options: list[str], data: bytes) -> bytes:
    """What FFmpeg makes of `data`."""
    try:
        done = subprocess.run([ffmpeg(), "-hide_banner", *options, "pipe:1"], input=data, capture_output=True, timeout=CODEC_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"the encoder hung and was stopped after {CODEC_SECONDS} s") from None
    except OSError as error:
        raise UserError(f"{ffmpeg()}: cannot be run ({error.strerror})") from None
    if done.returncode or not done.stdout:
        raise UserError(f"FFmpeg failed ({(done.stderr.decode(errors='replace').strip().splitlines() or ['without a word'])[-1][:200]})")
    return done.stdout


@functools.lru_cache
def why_not(codec: str) -> str | None:
    """What this machine lacks to run the codec, if anything."""
    if codec not in FFMPEG:
        return None if codec != "webp" or features.check("webp") else "this Pillow was built without WebP"
    try:
        encoder = FFMPEG[codec][2].split()[1]
        done = subprocess.run([ffmpeg(), "-hide_banner", "-encoders"], capture_output=True, text=True, timeout=CODEC_SECONDS)
        return None if f" {encoder} " in done.stdout else f"{ffmpeg()} was built without {encoder}"
    except UserError as error:
        return str(error)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{ffmpeg()}: cannot be run ({error})"


def encode_video(pixels: np.ndarray, codec: str, q: str) -> bytes:
    """(H, W, 3) uint8, even sides -> the stream of one intra frame at QP q."""
    form, pix_fmt, options = FFMPEG[codec]
    size = f"{pixels.shape[1]}x{pixels.shape[0]}"
    return run_ffmpeg([*RAW, "-s", size, "-i", "pipe:0", *COLOURS, "-pix_fmt", pix_fmt, *options.format(q=q).split(), "-f", form], pixels.tobytes())


def compress(image: Image.Image, codec: str, level: str) -> tuple[Image.Image, int]:
    """(the picture decoded, its bytes). For 4:2:0 video odd sides repeat their edge, which is cut off again."""
    if codec not in FFMPEG:
        buffer = io.BytesIO()
        try:
            image.save(buffer, codec, quality=int(level))
        except (OSError, ValueError) as error:
            raise UserError(f"Pillow failed ({error})") from None
        return Image.open(buffer).convert("RGB"), buffer.tell()
    a = np.asarray(image)
    a = np.pad(a, ((0, a.shape[0] % 2), (0, a.shape[1] % 2), (0, 0)), "edge")
    stream = encode_video(a, codec, level)
    decoded = run_ffmpeg(["-f", FFMPEG[codec][0], "-i", "pipe:0", *COLOURS, *RAW], stream)
    if len(decoded) != a.size:
        raise UserError(f"FFmpeg decoded {len(decoded)} bytes where {a.size} were due")
    return Image.fromarray(np.frombuffer(decoded, np.uint8).reshape(a.shape)[:image.height, :image.width]), len(stream)


def parse_tasks(names: list[str]) -> list[tuple[str, str]]:
    """['vvc', 'jpeg:25'] -> [('vvc', '47'), ('vvc', '42'), ('vvc', '37'), ('jpeg', '25')]."""
    tasks = []
    for name in names:
        codec, _, level = name.partition(":")
        if codec not in RANGE:
            raise UserError(f"--codecs {name}: choose from {', '.join(RANGE)}, or one level as vvc:52; others come through --pairs")
        if level and not (level.isdecimal() and RANGE[codec][0] <= int(level) <= RANGE[codec][1]):
            raise UserError(f"--codecs {name}: the level must be from {RANGE[codec][0]} to {RANGE[codec][1]}")
        tasks += [(codec, level)] if level else [(codec, level) for level in LEVELS[codec]]
    return list(dict.fromkeys(tasks))


def available(tasks: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """(the tasks that this machine can do, {codec: why not}); says what it leaves out."""
    missing = {codec: why for codec, _ in tasks if (why := why_not(codec))}
    for codec, why in missing.items():
        note(f"{codec}: skipped, {why}")
    tasks = [task for task in tasks if task[0] not in missing]
    if not tasks:
        raise UserError(f"--codecs: none of {', '.join(missing)} can be run here")
    return tasks, missing


def made(path: Path, stamp: dict) -> int | None:
    """The bytes recorded in a PNG of the benchmark, if it was made from this source in this way."""
    try:
        with Image.open(path) as image:
            record = json.loads(image.info.get("cir", "{}"))
        return record["bytes"] if record.get("stamp") == stamp else None
    except (OSError, ValueError, KeyError, SyntaxError):
        return None


def save_with_record(image: Image.Image, path: Path, size: int, stamp: dict) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("cir", json.dumps({"bytes": size, "stamp": stamp}))
    atomic(path, lambda tmp: image.save(tmp, "PNG", pnginfo=chunks, compress_level=1))


def originals(folders: list, out: Path) -> list[tuple[Path, Path]]:
    """(photograph, OUT/original/NAME.png) of all photographs."""
    def find(paths):
        files = [f for f in list_images(paths) if out.resolve() not in f.resolve().parents]
        if not files:
            raise UserError(f"{', '.join(map(str, paths))}: no images in this folder")
        return files
    return outputs([str(f) for f in folders], str(out / "original"), find=find)


def bench(folders: list, out: Path, tasks: list[tuple[str, str]]) -> tuple[dict, list[str]]:
    """Every photograph at every task, as OUT/CODEC/LEVEL/NAME.png, and as OUT/original/NAME.png.

    Returns ({codec: {level: {NAME: bits per pixel}}}, [what failed]); what is there already is not made again."""
    def one(pair):
        file, original = pair
        name, stat, rows, problems = original.relative_to(out / "original"), file.stat(), [], []
        source, image = [stat.st_size, stat.st_mtime_ns], None
        for codec, level in [("original", ""), *tasks]:
            target = out / codec / level / name
            stamp = {"source": source, "codec": codec, "level": level, "options": list(FFMPEG.get(codec, ()))}
            try:
                size = made(target, stamp)
                if size is None:
                    image = image or read_image(file)[0]
                    result, size = (image, 0) if codec == "original" else compress(image, codec, level)
                    save_with_record(result, target, size, stamp)
                with Image.open(target) as picture:
                    rows.append((codec, level, str(name), 8 * size / (picture.width * picture.height)))
            except UserError as error:
                problems.append(f"{codec}:{level} {file}: {error}" if codec != "original" else str(error))
                if codec == "original":
                    break
            bar.update()
        return rows, problems

    jobs, found, problems = originals(folders, out), {}, []
    with tqdm(total=len(jobs) * (1 + len(tasks)), desc="bench", unit="picture", disable=None) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for rows, bad in pool.map(one, jobs):
            for codec, level, name, bpp in rows:
                if codec != "original":
                    found.setdefault(codec, {}).setdefault(level, {})[name] = bpp
            for problem in bad:
                note(f"skipped: {problem}")
            problems += bad
    return found, problems


def matched(lq: Path, hq: Path) -> dict[str, tuple[Path, Path]]:
    """{name: (compressed, original)} of two folders with the same names (suffixes may differ) and sizes."""
    one, two = ({str(f.relative_to(folder).with_suffix("")): f for f in list_images([folder])} for folder in (lq, hq))
    problems = [f"{name} (only in {folder})" for folder, mine, other in ((lq, one, two), (hq, two, one)) for name in mine if name not in other]
    for name in one.keys() & two.keys():
        sizes = [read_image(side[name])[0].size for side in (one, two)]
        if sizes[0] != sizes[1]:
            problems.append(f"{name} ({' x '.join(map(str, sizes[0]))} in {lq}, {' x '.join(map(str, sizes[1]))} in {hq})")
    if problems:
        raise UserError(f"--pairs {lq} {hq}: do not match: {', '.join(sorted(problems))}")
    return {name: (one[name], two[name]) for name in sorted(one)}


def add_pairs(out: Path, lq: Path, hq: Path, task: tuple[str, str]) -> dict:
    """Puts pictures that another program compressed into the benchmark. Their bits are not known."""
    for name, (compressed, original) in tqdm(matched(lq, hq).items(), ":".join(task), disable=None):
        target, image = out / "original" / f"{name}.png", read_image(original)[0]
        if not target.exists():
            save_png(image, target)
        elif read_image(target)[0].tobytes() != image.tobytes():
            raise UserError(f"--pairs: {target} is there already and another picture than {original}; name another --out")
        save_png(read_image(compressed)[0], out / task[0] / task[1] / f"{name}.png")
    return {task[0]: {task[1]: {f"{name}.png": None for name in matched(lq, hq)}}}


def covered(tasks) -> str:
    """Which of the paper's 21 tasks there are."""
    tasks = set(tasks)
    lacking = {codec: [level for level in levels if (codec, level) not in tasks] for codec, levels in LEVELS.items() if codec != "avc"}
    names = [name for codec, levels in lacking.items() for name in ([codec] if len(levels) == 3 else [f"{codec}:{level}" for level in levels])]
    return f"{21 - sum(map(len, lacking.values()))} of the paper's 21 tasks" + (f", without {', '.join(names)}" if names else "")


def bench_command(args) -> None:
    tasks, missing = available(parse_tasks(args.codecs)) if args.data else ([], {})
    if not args.data and not args.pairs:
        raise UserError("bench: give --data (photographs to compress), or --pairs (compressed by another program)")
    if bool(args.pairs) != bool(args.task):
        raise UserError("--pairs: needs --task CODEC:LEVEL, as hific:low" if args.pairs else "--task: goes with --pairs")
    found, problems = bench(args.data, args.out, tasks) if args.data else ({}, [])
    if args.pairs:
        found |= add_pairs(args.out, *args.pairs, task_name(args.task))
    path = args.out / "bench.json"
    files = read_json(path).get("bits_per_pixel", {}) if path.exists() else {}
    for codec, levels in found.items():
        for level, names in levels.items():
            files.setdefault(codec, {}).setdefault(level, {}).update(names)
    versions = {"pillow": Image.__version__, "libjpeg-turbo": features.version("libjpeg_turbo"), "webp": features.version("webp")}
    if any(codec in FFMPEG for codec, _ in tasks):
        import imageio_ffmpeg
        versions |= {"imageio-ffmpeg": imageio_ffmpeg.__version__, "ffmpeg": imageio_ffmpeg.get_ffmpeg_version()}
    write_json(path, {"versions": versions, "skipped": missing, "failed": problems, "bits_per_pixel": files})
    rows = [[codec, level, str(len(names)), *((f(v) for f in (mean, min, max)) if None not in (v := list(names.values())) else [None] * 3)]
            for codec, levels in files.items() for level, names in levels.items()]
    rows += [[codec, "-", "skipped", None, None, None] for codec in missing]
    print(text_table(["codec", "level", "images", "bits per pixel", "least", "most"], rows))
    print(f"{covered((c, l) for c in files for l in files[c])}: {path}")
    if problems:
        raise UserError(f"bench: {len(problems)} pictures could not be made; the others are done")


def task_name(text: str) -> tuple[str, str]:
    codec, _, level = text.partition(":")
    if not all(part and part.replace("_", "").replace("-", "").replace(".", "").isalnum() for part in (codec, level)) or codec == "original":
        raise UserError(f"--task {text}: give CODEC:LEVEL, as hific:low")
    return codec, level


class CIRPairs(Crops):
    """Sample n -> (n, x_lq, x_hq, task): the same crop of a photograph and of one of its compressed versions, each task as
    likely as another, flipped and rotated (Sec. 4.1). DIFFERS: the paper resizes to 256x256, which would blur what
    compression did. `period`: sample n is sample n % period."""

    def __init__(self, caches: list[tuple[list[Path], Path]], tasks: list[tuple[str, str]], cfg: Stage1 | Stage2, multiple: int,
                 seed: int, period: int = 0):
        """`caches`: (folders of photographs, their benchmark)."""
        if cfg.crop % multiple:
            raise UserError(f"--s{cfg.__class__.__name__[-1]}-crop {cfg.crop}: must be a multiple of {multiple}")
        self.versions, self.period = {}, period
        for folders, out in caches:
            for _, file in originals(folders, out):
                paths = [out / codec / level / file.relative_to(out / "original") for codec, level in tasks]
                if file.exists() and any(p.exists() for p in paths):
                    self.versions[file] = [(i, p) for i, p in enumerate(paths) if p.exists()]
        if not self.versions:
            raise UserError(f"{caches[0][1]}: holds no photograph with a compressed version")
        super().__init__(list(self.versions), cfg.crop, seed)
        self.few = sum(map(len, self.versions.values())) <= 256

    @functools.lru_cache(maxsize=256)
    def kept(self, file: Path) -> np.ndarray | None:
        return Crops.read.__wrapped__(self, file)

    def __getitem__(self, n: int) -> tuple[int, Tensor, Tensor, int]:
        n = n % self.period if self.period else n
        file = self.file(n)
        task, lq = self.versions[file][int(rng(self.seed, 2, n).integers(len(self.versions[file])))]
        x_lq, x_hq = (self.view(a, n) for a in ((self.kept if self.few else self.read)(lq), self.read(file)))
        return n, to_tensor(x_lq), to_tensor(x_hq), task


# -------------------------------------------------------------------------------------------- model


def transformer_block(width: int, heads: int) -> nn.Module:
    """Pre-norm attention and MLP on tokens (B, L, width), as in ViT (Dosovitskiy et al. 2021)."""
    from diffusers.models.attention import BasicTransformerBlock
    return BasicTransformerBlock(width, heads, width // heads, activation_fn="gelu", attention_bias=True)


def zero(layer: nn.Module) -> nn.Module:
    """The layer with all parameters zero: what follows it starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def top_k_gates(logits: Tensor, k: int) -> Tensor:
    # Eq. 3, Top-K(Softmax(.)): the K largest keep their values, the others are 0
    g = logits.softmax(-1)
    chosen = g.topk(k).indices
    return torch.zeros_like(g).scatter(-1, chosen, g.gather(-1, chosen))


class PromptGenerator(nn.Module):
    """MoE-Prompt Generator, Fig. 2b: the degradation prior meets the features, a router picks K of N prompts, these
    interact with the features. Also Table 2's Single, Multiple and No Prompt (Fig. 2a, 2c)."""

    def __init__(self, cfg: Stage1, dp_width: int | None):
        super().__init__()
        self.kind, self.k = cfg.prompt, cfg.top_k
        if self.kind == "single":  # "image-like", of 8x8 here, enlarged to the features' size
            self.prompts = nn.Parameter(torch.randn(1, cfg.width, 8, 8) * 0.02)
        elif self.kind != "none":
            self.prompts = nn.Parameter(torch.randn(cfg.experts, cfg.prompt_length, cfg.width))
            self.W_g = nn.Linear(cfg.width, cfg.experts, bias=False)
        if self.kind == "moe":
            self.norm_x = nn.LayerNorm(cfg.width, elementwise_affine=False)
            self.W_noise = zero(nn.Linear(cfg.width, cfg.experts, bias=False))
            if dp_width:
                from diffusers.models.attention_processor import Attention
                self.norm = nn.LayerNorm(cfg.width)
                self.meet = Attention(cfg.width, dp_width, heads=cfg.heads, dim_head=cfg.width // cfg.heads)

    def gate(self, f: Tensor, dp: Tensor | None, noise: Tensor | None) -> Tensor:
        """G(x) (B, N) for features f (B, L, width), prior dp (B, M, D), noise (B, N) ~ N(0, 1) in training only."""
        x = self.norm_x((f if dp is None else self.meet(self.norm(f), dp)).mean(1))
        logits = self.W_g(x)
        if noise is not None:
            # Eq. 3: x W_g + N(0, 1) Softplus(x W_noise)
            logits = logits + noise * F.softplus(self.W_noise(x))
        return top_k_gates(logits, self.k)

    def forward(self, f: Tensor, size: tuple[int, int], dp: Tensor | None, noise: Tensor | None, gates: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features (B, L, width) of a map of `size` -> (f with the prompts' part, gates). Given `gates` are used."""
        if self.kind == "none":
            return f, None
        if self.kind == "single":
            return f + F.interpolate(self.prompts, size, mode="bilinear").flatten(2).transpose(1, 2), None
        if self.kind == "multiple":
            gates = self.W_g(f.mean(1)).softmax(-1) if gates is None else gates
            mixed = torch.einsum("bn,nlc->blc", gates, self.prompts)
            return f + attend(f, mixed), gates
        gates = self.gate(f, dp, noise) if gates is None else gates
        weight, chosen = gates.topk(self.k)
        # Eq. 1: y = sum over the chosen of G(x)_i E_i(x), E_i(x) = softmax(f P_i^T / sqrt(C)) P_i
        y = attend(f[:, None], self.prompts[chosen])
        return f + (weight[:, :, None, None] * y).sum(1), gates


def attend(f: Tensor, p: Tensor) -> Tensor:
    """softmax(f p^T / sqrt(C)) p: the features' "form of matrix multiplication" with a prompt (Sec. 3.2)."""
    return (f @ p.transpose(-1, -2) * f.shape[-1] ** -0.5).softmax(-1) @ p


class MoEPromptModule(nn.Module):
    """Fig. 3c: features of the compressed image at the UNet's scales (h, h/2, h/4, h/8 for SD 2.1), each through one ViT
    block and a prompt generator."""

    def __init__(self, cfg: Stage1, channels: int, widths: list[int], dp_width: int | None):
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps
        super().__init__()
        c = cfg.width
        self.waves, self.time = Timesteps(c, True, 0), TimestepEmbedding(c, c)
        self.down = nn.ModuleList(nn.Conv2d(c if i else channels, c, 3, 2 if i else 1, 1) for i in range(len(widths)))
        self.at_t = nn.ModuleList(nn.Linear(c, c) for _ in widths)
        self.vit = nn.ModuleList(transformer_block(c, cfg.heads) for _ in widths)
        self.prompt = nn.ModuleList(PromptGenerator(cfg, dp_width) for _ in widths)
        self.out = nn.ModuleList(nn.Conv2d(c, w, 3, padding=1) for w in widths)

    def forward(self, z_lq: Tensor, t: Tensor, dp: Tensor | None, noise: Tensor | None = None,
                gates: list[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """z_lq (B, C, h, w), t (B,), noise (B, scales, N) -> (features, gates), one of each a scale."""
        f, at, outs, used = z_lq, self.time(self.waves(t).to(z_lq.dtype)), [], []
        for i, (down, at_t, vit, prompt, out) in enumerate(zip(self.down, self.at_t, self.vit, self.prompt, self.out)):
            f = F.silu(down(f) + at_t(at)[:, :, None, None])
            size = f.shape[2:]
            f, g = prompt(vit(f.flatten(2).transpose(1, 2)), size, dp, None if noise is None else noise[:, i], gates[i] if gates else None)
            f = f.transpose(1, 2).unflatten(2, size)
            outs.append(out(f)), used.append(g)
        return outs, used if used[0] is not None else []


class SPADE(nn.Module):
    """h -> h + gamma Norm(h) + beta, gamma and beta by convolutions from the module's feature at h's scale; the last
    convolution is zero at first, so training starts from the untouched UNet. DIFFERS: Park et al. (2019) keep only
    the normalised h, which would change the UNet from the start."""

    def __init__(self, c: int, hidden: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, affine=False)
        self.maps = nn.Sequential(nn.Conv2d(c, hidden, 3, padding=1), nn.SiLU(), zero(nn.Conv2d(hidden, 2 * c, 3, padding=1)))

    def forward(self, h: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return h + self.norm(h) * gamma + beta


def small_clip():
    """The tiny run's stand-in for CLIP: its image encoder, 64x64 pixels in patches of 8, random at first, trained along."""
    from transformers import CLIPVisionConfig
    return CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8)


def clip_config(name: str):
    """The configuration of a CLIP image encoder: 'small', one of the paper run's two (offline), a folder or a hub id."""
    from transformers import CLIPVisionConfig
    known = {"small": small_clip, CLIP_B32: CLIPVisionConfig,
             CLIP_H14: lambda: CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                                                patch_size=14, hidden_act="gelu")}
    return known[name]() if name in known else CLIPVisionConfig.from_pretrained(name)


def clip_encoder(name: str, flag: str, weights: bool = True) -> nn.Module:
    """A CLIP image encoder: frozen, except the small one."""
    from transformers import CLIPVisionModel
    try:
        if name == "small" or not weights:
            return CLIPVisionModel(clip_config(name)).requires_grad_(name == "small")
        return CLIPVisionModel.from_pretrained(name).requires_grad_(False)
    except Exception as error:  # no network, no such repository, a folder that holds something else
        raise UserError(f"{flag} {name}: no CLIP image encoder there ({str(error).splitlines()[0][:150]}); give a local folder") from None


def clip_input(x: Tensor, size: int) -> Tensor:
    """x (B, 3, H, W) in [-1, 1] -> as CLIP expects it: size x size, its own mean and deviation."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    x = F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    return ((x + 1) / 2 - mean) / std


class Prior(nn.Module):
    """Degradation prior DP, Sec. 3.2: all tokens of a frozen CLIP image encoder. DIFFERS: the paper takes DA-CLIP's, whose
    released file is an open_clip checkpoint of a forked architecture; here any CLIP of transformers."""

    def __init__(self, name: str, weights: bool = True):
        super().__init__()
        self.net = clip_encoder(name, "--dp", weights)
        self.width = self.net.config.hidden_size

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> dp (B, M, width)."""
        return self.net(clip_input(x, self.net.config.image_size).to(self.net.dtype)).last_hidden_state


class SmallPrior(nn.Module):
    """The tiny run's stand-in for it: log-energies of learned filters on second differences (which show what a codec did and
    not how bright the picture is), in 4x4 regions. Trained with the module, and to tell the tasks apart, as DA-CLIP was."""

    def __init__(self, tasks: int):
        super().__init__()
        c = self.width = 16
        self.fine, self.coarse = nn.Conv2d(9, c, 5, padding=2, bias=False), nn.Conv2d(c, c, 5, 2, padding=2, bias=False)
        self.out = nn.Sequential(nn.LayerNorm(2 * c), nn.Linear(2 * c, c), nn.GELU(), nn.Linear(c, c))
        self.head = nn.Linear(c, tasks)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> dp (B, 16, width)."""
        x = F.pad(x.to(self.fine.weight.dtype), (1, 1, 1, 1), "replicate")
        across = 2 * x[..., 1:-1, 1:-1] - x[..., 1:-1, :-2] - x[..., 1:-1, 2:]
        down = 2 * x[..., 1:-1, 1:-1] - x[..., :-2, 1:-1] - x[..., 2:, 1:-1]
        fine = self.fine(4 * torch.cat([across, down, across - down], 1))
        energy = [F.adaptive_avg_pool2d(f.square(), 4) for f in (fine, self.coarse(F.silu(fine)))]
        return self.out((torch.cat(energy, 1) + 1e-5).log().flatten(2).transpose(1, 2))


class Visual2Text(nn.Module):
    """Sec. 3.3: quality enhancer (transformer blocks on patches of 16, adding to the picture), CLIP's image encoder, and
    the adapter: an MLP over channels and one over tokens. Its output is added to the empty caption's tokens, and
    starts at zero (ours): training starts from SD with an empty prompt."""

    def __init__(self, cfg: Stage1, length: int, width: int, weights: bool = True):
        super().__init__()
        self.clip = clip_encoder(cfg.v2t, "--clip", weights)
        c, d = cfg.width, self.clip.config.hidden_size
        self.size = self.clip.config.image_size
        patches = self.size // 8 if cfg.v2t == "small" else self.size // 16
        tokens = (self.size // self.clip.config.patch_size) ** 2
        self.patch = nn.Conv2d(3, c, self.size // patches, self.size // patches)
        self.position = nn.Parameter(torch.randn(1, patches**2, c) * 0.02)
        self.enhance = nn.Sequential(*(transformer_block(c, cfg.heads) for _ in range(cfg.enhancer)))
        self.unpatch = zero(nn.ConvTranspose2d(c, 3, self.size // patches, self.size // patches))
        self.channels = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, width), nn.GELU(), nn.Linear(width, width))
        self.tokens = nn.Sequential(nn.Linear(tokens, length), nn.GELU(), zero(nn.Linear(length, length)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1] -> (B, length, width), to be added to the empty caption's tokens."""
        x = clip_input(x, self.size).to(self.position.dtype)
        f = self.patch(x)
        f = self.enhance(f.flatten(2).transpose(1, 2) + self.position).transpose(1, 2).unflatten(2, f.shape[2:])
        seen = self.clip(x + self.unpatch(f)).last_hidden_state[:, 1:]  # without the class token
        return self.tokens(self.channels(seen).transpose(1, 2)).transpose(1, 2)


class Compensator(nn.Module):
    """Fig. 3d: at levels of the VAE decoder, a residual from the decoder's features and the encoder's of the compressed
    image; zero at first. As in StableSR's controllable feature wrapping (ours), whose weight w it shares. Features come
    in, and residuals go out, in units of their channels' deviations over some training pictures: those of the decoder
    differ by orders of magnitude, and a normalisation of each picture by itself would make crops and pictures differ."""

    def __init__(self, widths: list[int], blocks: int):
        """`widths`: the decoder's, of the levels that are compensated, full size last."""
        super().__init__()
        self.fuse = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * c, max(c, 32), 3, padding=1), *(Res(max(c, 32)) for _ in range(blocks)),
                          nn.SiLU(), zero(nn.Conv2d(max(c, 32), c, 3, padding=1)))
            for c in widths)
        for i, c in enumerate(widths):
            self.register_buffer(f"mean{i}", torch.zeros(2 * c, 1, 1))
            self.register_buffer(f"std{i}", torch.ones(2 * c, 1, 1))

    def residual(self, i: int, e: Tensor, h: Tensor) -> Tensor:
        """Level i: encoder's and decoder's features (B, c, h, w) -> what is added to the latter."""
        std = getattr(self, f"std{i}")
        return std[h.shape[1]:] * self.fuse[i]((torch.cat([e.to(h.dtype), h], 1) - getattr(self, f"mean{i}")) / std)


class Res(nn.Module):
    """x + Conv(SiLU(Conv(SiLU(x))))."""

    def __init__(self, c: int):
        super().__init__()
        self.body = nn.Sequential(nn.SiLU(), nn.Conv2d(c, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, c, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@contextmanager
def hooked(*pairs):
    """Forward hooks (module, hook), removed at the end."""
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class MoEDiffIR(nn.Module):
    """Frozen Stable Diffusion, the modules that stage 1 trains around it, and stage 2's compensator, if any."""

    def __init__(self, base: Path, cfg: Stage1, empty: Tensor, tasks: int, cfg2: Stage2 | None = None, weights: bool = True):
        """`empty` (L, D_text): the empty caption's tokens; `tasks`: how many the small prior tells apart; `cfg2`: the
        compensator's settings, None for none."""
        super().__init__()
        self.base, self.sd = base, SD(base, weights=weights)
        unet, vae = self.sd.unet.config, self.sd.vae.config
        routed = cfg.prompt == "moe" and cfg.dp != "none"
        self.prior = None if not routed else SmallPrior(tasks) if cfg.dp == "small" else Prior(cfg.dp, weights)
        self.module = MoEPromptModule(cfg, vae.latent_channels, unet.block_out_channels, self.prior.width if self.prior else None)
        widths = [*unet.block_out_channels, unet.block_out_channels[-1]]  # the last is the mid block's
        self.spade = nn.ModuleList(SPADE(c, cfg.width, unet.norm_num_groups) for c in widths)
        self.v2t = Visual2Text(cfg, *empty.shape, weights) if cfg.v2t != "none" else None
        self.register_buffer("empty", empty)
        self.compensator = Compensator(vae.block_out_channels[:cfg2.levels][::-1], cfg2.blocks) if cfg2 else None
        self.multiple = self.sd.multiple

    def text(self, x_lq: Tensor) -> Tensor:
        """c (B, L, D_text)."""
        c = self.empty.expand(len(x_lq), -1, -1)
        return c if self.v2t is None else c + self.v2t(x_lq)

    def modulation(self, features: list[Tensor]):
        """Within it the UNet's skips and its mid block are modulated by the module's features (Sec. 3.4)."""
        unet = self.sd.unet
        maps = [spade.maps(f).chunk(2, 1) for spade, f in zip(self.spade, [*features, features[-1]])]

        def skips(i, block):
            def hook(_, args, output):
                h, kept = output
                here = len(block.resnets)  # after these comes the downsampled map, the next scale's
                return h, (*(self.spade[i](s, *maps[i]) for s in kept[:here]), *kept[here:])
            return hook
        return hooked(*((block, skips(i, block)) for i, block in enumerate(unet.down_blocks)),
                      (unet.mid_block, lambda _, args, h: self.spade[-1](h, *maps[-1])))

    def denoise(self, z_t: Tensor, t: Tensor, z_lq: Tensor, dp: Tensor | None, c: Tensor, noise=None, gates=None) -> tuple[Tensor, list[Tensor]]:
        """(the modulated UNet's output at timesteps t (B,), the gates)."""
        dtype = self.sd.unet.dtype
        features, gates = self.module(z_lq.to(dtype), t, dp, noise, gates)
        with self.modulation(features):
            return self.sd.unet(z_t.to(dtype), t, c).sample, gates

    def forward(self, z_t: Tensor, t: Tensor, z_lq: Tensor, x_lq: Tensor, noise: Tensor) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Training: (eps_hat, gates, the small prior's guess of the task)."""
        dp = self.prior(x_lq) if self.prior else None
        out, gates = self.denoise(z_t, t, z_lq, dp, self.text(x_lq), noise)
        return self.sd.eps(z_t, out, t), gates, self.prior.head(dp.mean(1)) if isinstance(self.prior, SmallPrior) else None

    def sample(self, z_lq: Tensor, dp: Tensor | None, c: Tensor, start_t: int, steps: int, noise: Tensor, gates: dict,
               run=lambda stage, *maps: stage(*maps)) -> Tensor:
        """z_0 in `steps` calls of the UNet: z_lq is noised to start_t, then DDIM over evenly spaced timesteps to 0. With
        one step it is the x0 prediction. `gates`: {t: gates}, those that are missing are filled in."""
        sd, ts = self.sd, timesteps(start_t, steps)
        a = sd.alpha_bar_at(ts[0]).to(z_lq.device)
        z = a.sqrt() * z_lq + (1 - a).sqrt() * noise
        for t, t_next in zip(ts, [*ts[1:], None]):
            def step(z_t, z_lq):
                out, gates[t] = self.denoise(z_t, torch.full((len(z_t),), t, device=z_t.device), z_lq, dp, c, gates=gates.get(t))
                z_0 = sd.x0(z_t, out, t)
                if t_next is None:
                    return z_0
                a = sd.alpha_bar_at(t_next)
                return a.sqrt() * z_0 + (1 - a).sqrt() * sd.eps(z_t, out, t)  # DDIM (Song et al. 2021) with eta = 0
            z = run(step, z, z_lq)
        return z

    def encode(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """(z, the VAE encoder's features of x before each downsampling and at the end)."""
        seen: list[Tensor] = []
        with hooked(*((block.resnets[-1], lambda _, args, h: seen.append(h)) for block in self.sd.vae.encoder.down_blocks)):
            return self.sd.encode(x, noise), seen

    def decode(self, z_0: Tensor, seen: list[Tensor], w: float = 1.0) -> Tensor:
        """x_hat of z_0, compensated with weight w by the encoder's features of x_lq; at w = 0 the plain decoder."""
        def add(level, e):
            return lambda _, args, h: h + w * self.compensator.residual(level, e, h)
        levels = self.levels() if self.compensator and w else []
        with hooked(*((block, add(i, e)) for i, (block, e) in enumerate(zip(levels, seen[:len(levels)][::-1])))):
            return self.sd.decode(z_0)

    def levels(self) -> list[nn.Module]:
        """The last layer of each level of the decoder that is compensated."""
        return [block.resnets[-1] for block in self.sd.vae.decoder.up_blocks][-len(self.compensator.fuse):]

    @torch.no_grad()
    def measure_units(self, x: Tensor) -> None:
        """Sets the compensator's units from pictures x."""
        found: list[Tensor] = []
        z, seen = self.encode(x)
        with hooked(*((layer, lambda _, args, h: found.append(h)) for layer in self.levels())):
            self.sd.decode(z)
        for i, (e, h) in enumerate(zip(seen[:len(found)][::-1], found)):
            std, mean = torch.std_mean(torch.cat([e, h], 1).float(), (0, 2, 3))
            getattr(self.compensator, f"mean{i}").copy_(mean[:, None, None])
            getattr(self.compensator, f"std{i}").copy_(std[:, None, None])


def timesteps(start_t: int, steps: int) -> list[int]:
    """start_t and the evenly spaced ones below it; the last step goes from the last of them to the clean latent."""
    return [round(start_t * (steps - i) / steps) for i in range(steps)]


# ------------------------------------------------------------------------------------------- losses


def loss_sd(eps_hat: Tensor, eps: Tensor) -> Tensor:
    # Eq. 2
    return F.mse_loss(eps_hat.float(), eps)


def loss_balance(gates: list[Tensor]) -> Tensor:
    """Shazeer et al. (2017), importance loss: squared coefficient of variation of the experts' summed gates, mean over
    the scales. 0 where all experts weigh the same over the batch. Not in the paper (--balance)."""
    importance = torch.stack([g.sum(0) for g in gates])
    return (importance.var(1, correction=0) / importance.mean(1).square()).mean()


class FeatureDistance(nn.Module):
    """In the place of LPIPS, for runs without network: squared distances of the features of `dists_small`'s random network,
    each stage in units of the original's variance. Its value is not LPIPS and is never called so. The zeroth
    stage is the picture itself and weighs most: features alone reward texture before the tiny run has fidelity."""

    weights = (1.0, 0.01, 0.01, 0.01)

    def __init__(self):
        super().__init__()
        self.net = dists_small()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = 0
        for w, p, q in zip(self.weights, self.net.features(x), self.net.features(y)):
            total = total + w * (p - q).square().mean((1, 2, 3)) / (q.var((1, 2, 3)) + 1e-3)
        return total


def lpips_vgg() -> nn.Module:
    import lpips
    try:
        with brief_network():
            return lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)
    except Exception as error:
        raise UserError(f"--s2-lpips vgg: VGG16's weights are neither cached nor downloadable ({str(error).splitlines()[0]}); "
                        "--s2-lpips small needs none") from None


def loss_decoder(lpips: nn.Module, x_hat: Tensor, x_hq: Tensor) -> Tensor:
    # Eq. 4: L_lpips[z_lq, z_0, hr], x_hat being what the compensated decoder makes of z_0 and the encoder's features
    return lpips(x_hat, x_hq).mean()


# ------------------------------------------------------------------------------------------ stage 1


def stage1(run: Run, cfg: Stage1, base: Path, caches: list[tuple[list[Path], Path]], tasks: list[tuple[str, str]], seed: int) -> None:
    """MoE-Prompt Module and Visual2Text adapter, all else frozen, Sec. 3.4. DIFFERS: the paper says "only the MoE-Prompt
    Module", but has no other stage for the adapter and its quality enhancer."""
    torch.manual_seed(seed)
    model = MoEDiffIR(base, cfg, text_tokens(base, [""])[0], len(tasks))
    acc = run.start(1, cfg, some_unused=cfg.v2t == "small", **{"UNet": model.sd.unet, "VAE": model.sd.vae, "MoE-Prompt Module": model.module, "SPADE": model.spade,
                               "degradation prior": model.prior, "Visual2Text": model.v2t})
    pairs = CIRPairs(caches, tasks, cfg, model.multiple, seed)
    optimizer = torch.optim.Adam(trainable(model), cfg.lr, betas=(0.9, 0.999))
    model, optimizer = acc.prepare(model, optimizer)
    model.train()
    sd = acc.unwrap_model(model).sd
    scales, shape = len(sd.unet.config.block_out_channels), (sd.vae.config.latent_channels, cfg.crop // sd.f, cfg.crop // sd.f)
    for step, (n, x_lq, x_hq, task) in run.loop(pairs, {"model": model}, {"adam": optimizer}):
        with acc.accumulate(model):
            with torch.no_grad(), acc.autocast():
                z_lq, z_0 = (sd.encode(x, noise_for(n, shape, seed, key)).float() for x, key in ((x_lq, 3), (x_hq, 4)))
            t = torch.tensor([int(rng(seed, 5, i).integers(cfg.t_max + 1)) for i in n.tolist()], device=n.device)
            eps = noise_for(n, shape, seed, 6)
            a = sd.alpha_bar_at(t).view(-1, 1, 1, 1)
            eps_hat, gates, guess = model(a.sqrt() * z_0 + (1 - a).sqrt() * eps, t, z_lq, x_lq, noise_for(n, (scales, cfg.experts), seed, 7))
            l_sd = loss_sd(eps_hat, eps)
            loss, terms = l_sd, {"sd": l_sd}
            if guess is not None and cfg.lambda_dp:
                terms["dp"] = cfg.lambda_dp * F.cross_entropy(guess, task)
                loss = loss + terms["dp"]
            if gates and cfg.balance:
                terms["balance"] = cfg.balance * loss_balance(gates)
                loss = loss + terms["balance"]
            if step == 0:
                acc.print("step 1: " + "  ".join(f"{k} {v:.3g}" for k, v in gradient_norms(terms, trainable(model)).items()))
            acc.backward(loss)
            update(acc, model, optimizer, cfg, step)
        run.log(**terms, loss=loss, **{f"load{i}.{e}@": share for i, g in enumerate(gates) for e, share in enumerate((g > 0).float().mean(0))})
    if acc.is_main_process:
        model = acc.unwrap_model(model)
        save_tensors(run.model / "stage1.safetensors", own_tensors(model), config=asdict(cfg))
    acc.wait_for_everyone()  # stage 2 reads that file


def own_tensors(model: MoEDiffIR) -> dict[str, Tensor]:
    """What stage 1 trains, and the empty caption's tokens, without which restoring would need the text encoder."""
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    return {k: v for k, v in model.state_dict().items() if k not in frozen and not k.startswith("compensator.")}


def load_stage1(model: Path, base: Path, cfg2: Stage2 | None) -> MoEDiffIR:
    path = model / "stage1.safetensors"
    tensors, header = load_tensors(path)
    if "empty" not in tensors:
        raise UserError(f"{path}: not a checkpoint of moe_diffir.py's stage 1")
    ours = MoEDiffIR(base, Stage1(**header["config"]), torch.zeros_like(tensors["empty"]),
                     len(tensors.get("prior.head.bias", ())), cfg2)
    fill(ours, tensors, own_tensors(ours), path)
    return ours


# ------------------------------------------------------------------------------------------ stage 2


class LatentPairs(CIRPairs):
    """Sample n -> (n, x_lq, x_hq, z_0), z_0 from the cache."""

    folder: Path | None = None

    def __getitem__(self, n: int):
        n, x_lq, x_hq, _ = super().__getitem__(n)
        z_0 = load_shard(self.folder, n // SHARD)[f"{n}"] if self.folder else torch.zeros(())
        return n, x_lq, x_hq, z_0


SHARD = 64  # latents a file


@functools.lru_cache(maxsize=8)
def load_shard(folder: Path, i: int) -> dict[str, Tensor]:
    return load_tensors(folder / f"{i:06d}.safetensors")[0]


@torch.no_grad()
def make_latent(model: MoEDiffIR, cfg: Stage2, n: Tensor, x_lq: Tensor, seed: int) -> Tensor:
    """z_0 (B, C, h, w) of samples n as stage 1's model restores them, each in as many steps as its number says."""
    z_lq, _ = model.encode(x_lq)
    dp, c, out = model.prior(x_lq) if model.prior else None, model.text(x_lq), torch.empty_like(z_lq, dtype=torch.float32)
    noise = noise_for(n, z_lq.shape[1:], seed, 8)
    for i, steps in enumerate(cfg.sampling):
        rows = (n % len(cfg.sampling) == i).nonzero()[:, 0]
        if len(rows):
            out[rows] = model.sample(z_lq[rows].float(), None if dp is None else dp[rows], c[rows], cfg.start_t, steps, noise[rows], {})
    return out


def cache_latents(folder: Path, model: MoEDiffIR, cfg: Stage2, pairs: LatentPairs, acc, seed: int) -> None:
    """z_0 of the first cfg.cache_latents samples, in shards; those there already, of the same settings, stay."""
    total = cfg.cache_latents
    settings = {"seed": seed, "start_t": cfg.start_t, "sampling": list(cfg.sampling), "crop": cfg.crop}
    for i in tqdm(range(-(-total // SHARD)), "latents", unit="shard", disable=None if acc.is_main_process else True):
        path, members = folder / f"{i:06d}.safetensors", range(i * SHARD, min((i + 1) * SHARD, total))
        if i % acc.num_processes != acc.process_index:
            continue
        if path.exists() and load_tensors(path)[1] == settings | {"count": len(members)}:
            continue
        z_0 = {}
        for first in range(0, len(members), cfg.batch):
            part = members[first:first + cfg.batch]
            x_lq = torch.stack([CIRPairs.__getitem__(pairs, n)[1] for n in part]).to(acc.device)
            with acc.autocast():
                made = make_latent(model, cfg, torch.tensor(part, device=acc.device), x_lq, seed)
            z_0 |= {str(n): z.float() for n, z in zip(part, made)}
        save_tensors(path, z_0, **settings, count=len(members))
    acc.wait_for_everyone()


class StageTwo(nn.Module):
    """What stage 2 calls through accelerate."""

    def __init__(self, model: MoEDiffIR):
        super().__init__()
        self.model = model

    def forward(self, z_0: Tensor, seen: list[Tensor]) -> Tensor:
        return self.model.decode(z_0, seen).clamp(-1, 1)


def stage2(run: Run, cfg: Stage2, base: Path, caches: list[tuple[list[Path], Path]], tasks: list[tuple[str, str]], seed: int) -> None:
    """The decoder compensator, all else frozen, Sec. 3.4."""
    if not (run.model / "stage1.safetensors").exists():
        raise UserError(f"--stage 2: {run.model / 'stage1.safetensors'} is missing; run stage 1 first (train --stage 1)")
    torch.manual_seed(seed + 1)
    model = load_stage1(run.model, base, cfg).requires_grad_(False)
    model.compensator.requires_grad_(True)
    lpips, name = (FeatureDistance(), "features") if cfg.lpips == "small" else (lpips_vgg(), "lpips")
    acc = run.start(2, cfg, **{"VAE": model.sd.vae, "stage 1's modules": nn.ModuleList([model.module, model.spade]), "compensator": model.compensator})
    acc.print("loss: " + ("LPIPS-VGG" if cfg.lpips == "vgg" else "distance of a small random network's features (no download; not the metric LPIPS)"))
    pairs = LatentPairs(caches, tasks, cfg, model.multiple, seed + 1, cfg.cache_latents)
    model.to(acc.device).eval(), lpips.to(acc.device)
    if cfg.cache_latents:
        cache_latents(run.folder / "latents", model, cfg, pairs, acc, seed)
        pairs.folder = run.folder / "latents"
    model.measure_units(torch.stack([pairs[n][1] for n in range(16)]).to(acc.device))  # the same in every process
    optimizer = torch.optim.Adam(model.compensator.parameters(), cfg.lr, betas=(0.9, 0.999))
    decoder = StageTwo(model)
    decoder, optimizer = acc.prepare(decoder, optimizer)
    for step, (n, x_lq, x_hq, z_0) in run.loop(pairs, {"compensator": model.compensator}, {"adam": optimizer}):
        with acc.accumulate(decoder):
            with torch.no_grad(), acc.autocast():
                _, seen = model.encode(x_lq)
                if not cfg.cache_latents:
                    z_0 = make_latent(model, cfg, n, x_lq, seed)
            loss = loss_decoder(lpips, decoder(z_0, seen), x_hq)
            if step == 0:
                acc.print("step 1: " + "  ".join(f"{k} {v:.3g}" for k, v in gradient_norms({name: loss}, trainable(decoder)).items()))
            acc.backward(loss)
            update(acc, decoder, optimizer, cfg, step)
        run.log(**{name: loss})
    if acc.is_main_process:
        save_tensors(run.model / "stage2.safetensors", model.compensator.state_dict())
        write_json(run.model / "config.json", {"script": "moe_diffir", "base": str(base), "base_sha256": fingerprint(base),
                                               "tasks": [":".join(task) for task in tasks], "stage2": asdict(cfg)})


# --------------------------------------------------------------------------------------- inference


def load(weights: Path, base: str | None = None) -> MoEDiffIR:
    """The trained model of a run's folder, on the device at hand, ready for `restore`; `start_t` and `sampling` as trained."""
    (config, folder), path = read_model(weights, "moe_diffir", base), weights / "model" / "stage2.safetensors"
    cfg = Stage2(**config["stage2"])
    model = load_stage1(weights / "model", folder, cfg)
    fill(model.compensator, load_tensors(path)[0], model.compensator.state_dict(), path)
    model.start_t, model.sampling, model.tasks = cfg.start_t, cfg.sampling, config["tasks"]
    return for_inference(model)


@torch.inference_mode()
def restore(model: MoEDiffIR, image: Image.Image, steps: int = 1, start_t: int | None = None, fidelity: float = 1.0,
            color_fix: str = "none", tile: int | None = None) -> tuple[Image.Image, list[Tensor]]:
    """One compressed image, any size -> (its restored self, gates (N,) of every scale at the first timestep), in one call of
    the UNet or several; the noise is the same for every call. The text tokens are the whole picture's; prior and
    gates too, or in tiles those of the mosaic that stands for it."""
    x_lq = to_tensor(image)[None]
    start_t, c, kept = model.start_t if start_t is None else start_t, model.text(x_lq.to(device())), {}

    def generate(x: Tensor, run) -> Tensor:
        if not kept:
            kept.update(dp=model.prior(x) if model.prior else None, gates={})

        def encode(x):
            z_lq, kept["seen"] = model.encode(x)
            kept["x"] = x
            return z_lq.float()

        def decode(z_0, x):
            if tile or kept["x"] is not x:  # in windows: this one's features again, rather than those of all at once
                encode(x)
            return model.decode(z_0, kept["seen"], fidelity)
        z_lq = run(encode, x)
        noise = torch.randn(z_lq.shape, generator=torch_rng("cpu", 0)).to(z_lq.device)
        return run(decode, model.sample(z_lq, kept["dp"], c, start_t, steps, noise, kept["gates"], run), x).clamp(-1, 1)

    x_hat, mosaic = tiled(generate, model, pad_to(x_lq, model.multiple), model.multiple, tile)
    x_hat = x_hat[:, :, :image.height, :image.width].float()
    if color_fix == "adain":
        x_hat = adain(x_hat, *(mosaic or (x_hat, x_lq.to(x_hat.device))))
    return to_image(x_hat[0]), [g[0].float().cpu() for g in kept["gates"][start_t]]


def sampling(args, model: MoEDiffIR, steps: tuple[int, ...]) -> dict:
    """restore's options, checked."""
    start_t = model.start_t if args.start_t is None else args.start_t
    if not 0 <= start_t < len(model.sd.alpha_bar):
        raise UserError(f"--start-t {start_t}: must be from 0 to {len(model.sd.alpha_bar) - 1}")
    for n in steps:
        if not 1 <= n <= start_t + 1:
            raise UserError(f"--steps {n}: must be from 1 to {start_t + 1}, --start-t and one")
    if not 0 <= args.fidelity <= 1:
        raise UserError(f"--fidelity {args.fidelity}: must be from 0 to 1")
    return {"start_t": start_t, "fidelity": args.fidelity, "color_fix": args.color_fix, "tile": tile_size(args.tile, model.multiple)}


# ------------------------------------------------------------------------- routing, profile, figures


def routing(picks: list[tuple[str, str, list[Tensor]]]) -> list[dict[str, float]]:
    """For every scale: mutual information between codec and chosen prompt set in bits, and its mean over 200 shuffles
    of the codecs, which a router that ignores them has by chance. `picks`: (codec, level, gates of every scale)."""
    rows = []
    for scale in zip(*(gates for _, _, gates in picks)):
        codecs, sets = [codec for codec, _, _ in picks], [tuple(g.nonzero()[:, 0].tolist()) for g in scale]
        by_chance = [mutual_information([codecs[i] for i in rng(0, 9, k).permutation(len(codecs))], sets) for k in range(200)]
        rows.append({"bits": (bits := mutual_information(codecs, sets)), "by chance": mean(by_chance), "excess": bits - mean(by_chance),
                     "sets": len(set(sets))})
    return rows


def mutual_information(a: list, b: list) -> float:
    """I(a; b) of two lists of labels, in bits, from their counts."""
    _, ia = np.unique(np.array([str(v) for v in a]), return_inverse=True)
    _, ib = np.unique(np.array([str(v) for v in b]), return_inverse=True)
    p = np.zeros((ia.max() + 1, ib.max() + 1))
    np.add.at(p, (ia, ib), 1 / len(a))
    q = p.sum(1, keepdims=True) * p.sum(0, keepdims=True)
    return float((p[p > 0] * np.log2(p[p > 0] / q[p > 0])).sum())


def print_routing(picks: list[tuple[str, str, list[Tensor]]]) -> list[dict[str, float]]:
    rows = routing(picks)
    if rows and len({codec for codec, _, _ in picks}) > 1:
        print(f"\nrouter: what the chosen prompt set tells of the codec, {len(picks)} compressed pictures\n"
              + text_table(["scale", "bits", "by chance", "excess", "different sets"],
                           [[f"h / {2**i}", r["bits"], r["by chance"], r["excess"], str(r["sets"])] for i, r in enumerate(rows)]))
    return rows


@torch.inference_mode()
def gates_of(model: MoEDiffIR, image: Image.Image) -> list[Tensor]:
    """Gates (N,) of every scale for a picture, at the timestep where sampling starts."""
    x = pad_to(to_tensor(image)[None], model.multiple).to(device())
    z_lq, _ = model.encode(x)
    t = torch.full((1,), model.start_t, device=x.device)
    return [g[0].float().cpu() for g in model.module(z_lq, t, model.prior(x) if model.prior else None)[1]]


def figures_command(args) -> None:
    """Which prompts the router picks for which codec and level: each row's shares sum to 1. Below, how far apart the
    codecs' rows are: total variation, 0 for the same prompts, 1 for none in common."""
    plt, model = matplotlib(), load(args.weights)
    if model.module.prompt[0].kind != "moe":
        raise UserError(f"figures: {args.weights} was trained with --prompt {model.module.prompt[0].kind}, which routes nothing")
    files, (tasks, _) = list_images(args.data or [ROOT / "data" / "photos" / "val"]), available(parse_tasks(args.codecs))
    picks, scales = [], len(model.module.prompt)
    for file in tqdm(files, "figures", disable=None):
        image = read_image(file)[0]
        picks += [(codec, level, gates_of(model, compress(image, codec, level)[0])) for codec, level in tasks]
    share = torch.zeros(scales, len(tasks), len(picks[0][2][0]))
    for codec, level, gates in picks:
        share[:, tasks.index((codec, level))] += torch.stack([(g > 0).float() / (g > 0).sum() for g in gates]) / len(files)
    codecs = list(dict.fromkeys(codec for codec, _ in tasks))
    of_codec = torch.stack([share[:, [i for i, (c, _) in enumerate(tasks) if c == codec]].mean(1) for codec in codecs], 1)
    apart = (of_codec[:, :, None] - of_codec[:, None]).abs().sum(-1) / 2

    figure, axes = plt.subplots(2, scales, figsize=(3.4 * scales + 1, 1.6 + 0.22 * len(tasks) + 0.4 * len(codecs)), squeeze=False,
                                layout="constrained", height_ratios=(0.22 * len(tasks), 0.4 * len(codecs)))
    for i in range(scales):
        top = axes[0, i].imshow(share[i], vmin=0, vmax=float(share.max()), cmap="viridis", aspect="auto")
        axes[0, i].set(title=f"scale h / {2**i}", xlabel="prompt", xticks=range(share.shape[2]), xticklabels=range(1, share.shape[2] + 1),
                       yticks=range(len(tasks)), yticklabels=[":".join(t) for t in tasks] if i == 0 else [])
        below = axes[1, i].imshow(apart[i], vmin=0, vmax=1, cmap="magma")
        axes[1, i].set(xticks=range(len(codecs)), yticks=range(len(codecs)), yticklabels=codecs if i == 0 else [])
        axes[1, i].set_xticklabels(codecs, rotation=45)
    figure.colorbar(top, ax=axes[0], label="share of the choices")
    figure.colorbar(below, ax=axes[1], label="total variation")
    target = args.weights / "samples" / "router.png"
    atomic(target, lambda tmp: figure.savefig(tmp, dpi=110))
    rows = print_routing(picks)
    write_json(args.weights / "samples" / "router.json", {"tasks": [":".join(t) for t in tasks], "images": len(files), "share": share.tolist(),
                                                          "total_variation": {"codecs": codecs, "scales": apart.tolist()}, "mutual_information": rows})
    print(target)


def parts(model: MoEDiffIR, x_lq: Tensor) -> dict[str, tuple[list[nn.Module], callable]]:
    """Inference's parts in order, {name: (modules, call)}, on inputs of x_lq's size."""
    vae, unet = model.sd.vae, model.sd.unet
    x = x_lq.to(vae.dtype)
    z = x.new_zeros(1, vae.config.latent_channels, *(n // model.sd.f for n in x.shape[2:]))
    t, c, dp = torch.zeros(1, device=x.device), model.empty[None].to(x), model.prior(x)
    features, (_, seen) = model.module(z, t, dp)[0], model.encode(x)

    def modulated():
        with model.modulation(features):
            return unet(z, t, c)
    return {"once: VAE encoder": ([vae.encoder, vae.quant_conv], lambda: model.encode(x)),
            "once: degradation prior (CLIP)": ([model.prior], lambda: model.prior(x)),
            "once: Visual2Text and CLIP": ([model.v2t], lambda: model.text(x)),
            "a step: MoE-Prompt Module": ([model.module], lambda: model.module(z, t, dp)),
            "a step: UNet": ([unet], lambda: unet(z, t, c)),
            "a step: SPADE": ([model.spade], lambda: [s.maps(f) for s, f in zip(model.spade, [*features, features[-1]])]),
            "once: VAE decoder": ([vae.decoder, vae.post_quant_conv], lambda: vae.decode(z)),
            "once: compensator": ([model.compensator], lambda: [model.compensator.residual(i, e, e) for i, e in enumerate(seen[:len(model.compensator.fuse)][::-1])])}


def profile_command(args) -> None:
    """Parameters and MACs by part, for one step and fifty; time and memory."""
    base = find_base([args.base or (SD21_CONFIG if args.paper else TINY_SD)])
    cfg1, cfg2 = (paper_values(s) if args.paper else s() for s in (Stage1, Stage2))
    width = read_json(base / "unet" / "config.json")["cross_attention_dim"]
    profile(lambda lora: MoEDiffIR(base, cfg1, torch.zeros(77, width), 12, cfg2, weights=False), parts, args.size, args.time, steps=(1, 50))


# ------------------------------------------------------------------------------------- command line


def train_command(args) -> None:
    if args.paper and not args.data:
        raise UserError("--paper needs --data: the folder of DF2K (see data/README.md)")
    cfg1, cfg2 = stage_config(Stage1, "s1", args), stage_config(Stage2, "s2", args)
    check(cfg1, cfg2)
    base = find_base([args.base] if args.base else SD21_BASE if args.paper else [TINY_SD])
    data = [Path(d) for d in args.data or [ROOT / "data" / "photos" / "train"]]
    tasks, missing = available(parse_tasks(args.codecs))
    caches = [(data, args.cache)] if args.cache else [([d], d / CACHE) for d in data]
    learned = {(d.parent.name, d.name) for _, out in caches for d in out.glob("*/*") if d.is_dir() and d.parent.name not in (*RANGE, "original")}
    tasks += sorted(learned)  # put there by bench --pairs
    run = Run(args.out, {"script": "moe_diffir", "base_sha256": fingerprint(base), "seed": args.seed,
                         "data": sorted(str(d.resolve()) for d in data), "tasks": [":".join(t) for t in tasks],
                         "stage1": asdict(cfg1), "stage2": asdict(cfg2)}, args.stage, args.resume, args.overwrite)
    if run.main:
        for folders, out in caches:
            bench(folders, out, [t for t in tasks if t not in learned])
        print(f"trains on {covered(tasks)}" + "".join(f"\n{codec}: skipped, {why}" for codec, why in missing.items()))
    run.wait()
    if args.stage in ("1", "all"):
        stage1(run, cfg1, base, caches, tasks, args.seed)
    if args.stage in ("2", "all"):
        stage2(run, cfg2, base, caches, tasks, args.seed)
        if run.main:
            lowest = [(codec, LEVELS[codec][0]) for codec in dict.fromkeys(codec for codec, _ in tasks) if codec in RANGE]
            model = load(run.folder, str(base))
            evaluation(model, run.folder, args.val, lowest, model.sampling, {})
            print(f"peak memory: {peak_memory()}")


def check(cfg1: Stage1, cfg2: Stage2) -> None:
    if not 1 <= cfg1.top_k <= cfg1.experts:
        raise UserError(f"--top-k {cfg1.top_k}: must be from 1 to {cfg1.experts}, the number of --experts")
    if cfg1.width % cfg1.heads or cfg1.width % 4:
        raise UserError(f"--s1-width {cfg1.width}: must be a multiple of 4 and of --s1-heads {cfg1.heads}")
    for n in cfg2.sampling:
        if not 1 <= n <= cfg2.start_t + 1:
            raise UserError(f"--s2-sampling {n}: must be from 1 to {cfg2.start_t + 1}, --s2-start-t and one")
    if not 0 <= cfg1.t_max < 1000 or not 0 <= cfg2.start_t < 1000:
        raise UserError(f"--s1-t-max {cfg1.t_max}, --s2-start-t {cfg2.start_t}: must be from 0 to 999")
    if cfg2.levels < 1 or cfg2.blocks < 0:
        raise UserError(f"--s2-levels {cfg2.levels}, --s2-blocks {cfg2.blocks}: at least one level, and no negative number of blocks")
    if cfg2.cache_latents < 0:
        raise UserError(f"--cache-latents {cfg2.cache_latents}: must be 0 (none) or more")


def evaluation(model: MoEDiffIR, out: Path, data, tasks: list[tuple[str, str]], steps: tuple[int, ...], options: dict,
               pairs: dict | None = None, extra: bool = False) -> None:
    """Tables for every task, means for every codec, the routing; with `extra` also FID, from all pictures of a codec."""
    files, picture, picks = list_images(data or [ROOT / "data" / "photos" / "val"]), out / "samples" / "eval.png", []
    if pairs:
        files = [hq for _, hq in pairs.values()]
    lq_of = {hq: lq for lq, hq in (pairs or {}).values()}

    def degrade(codec, level, image, file):
        try:
            lq = read_image(lq_of[file])[0] if lq_of else compress(image, codec, level)[0]
        except UserError as error:
            raise UserError(f"{codec}:{level} {file}: {error}") from None
        current[:] = codec, level
        return lq

    def restored(n, image):
        image, gates = restore(model, image, n, **options)
        if n == steps[0] and gates:
            picks.append((*current, gates))
        return image
    current = ["", ""]
    rows = {f"restored, {n} step{'s' * (n > 1)}": functools.partial(restored, n) for n in dict.fromkeys(steps)}
    conditions = {":".join(task): functools.partial(degrade, *task) for task in tasks}
    lowest = [":".join(task) for i, task in enumerate(tasks) if task[0] not in [t[0] for t in tasks[:i]]]
    fid = FID(device()) if extra else None
    results = evaluate(files, conditions, rows, SD(model.base, with_unet=False).to(device()),
                       Metrics(device(), ("clipiqa", "maniqa") if extra else ()), picture, lowest, fid.keep if fid else None)
    by_codec = fid.values() if fid else {}
    codecs = {c: [r for name, r in results.items() if name.split(":")[0] == c] for c in dict.fromkeys(n.split(":")[0] for n in results)}
    average = {c: {row: {m: mean([r[row][m] for r in levels]) for m in levels[0][row]} for row in levels[0]} for c, levels in codecs.items()}
    for c, values in average.items():
        for row in values:
            values[row] |= {"FID": by_codec[c][row]} if row in by_codec.get(c, {}) else {}
    gap = {c: {row: (v[row]["PSNR"] - v["VAE(compressed)"]["PSNR"]) / (v["VAE(original)"]["PSNR"] - v["VAE(compressed)"]["PSNR"]) for row in rows}
           for c, v in average.items()}
    print("\nPSNR of each codec (mean over its levels above), and the share of the gap from VAE(compressed) to VAE(original) that is closed\n"
          + text_table(["", *next(iter(average.values())), *(row.replace("restored", "gap") for row in rows)],
                       [[c, *(r["PSNR"] for r in v.values()), *(f"{100 * g:.1f} %" for g in gap[c].values())] for c, v in average.items()]))
    if by_codec:
        print("\nFID of each codec, all its levels\n" + text_table(["", *next(iter(by_codec.values()))], [[c, *v.values()] for c, v in by_codec.items()]))
    router = print_routing(picks)
    write_json(out / "metrics.json", {"images": [f.name for f in files], "options": options, "results": results, "codecs": average,
                                      "gap_closed": gap, "mutual_information": router})
    print(f"\nmetrics: {out / 'metrics.json'}   picture: {picture}")


def model_for(args, steps: tuple[int, ...] | None) -> tuple[MoEDiffIR, dict, tuple[int, ...]]:
    model = load(args.weights, args.base)
    steps = steps or model.sampling
    return model, sampling(args, model, steps), steps


def eval_command(args) -> None:
    pairs, tasks = None, []
    if bool(args.pairs) != bool(args.task):
        raise UserError("--pairs: needs --task CODEC:LEVEL, as hific:low" if args.pairs else "--task: goes with --pairs")
    if args.pairs:
        pairs, tasks = matched(*args.pairs), [task_name(args.task)]
    model, options, steps = model_for(args, tuple(args.steps or ()))
    tasks = tasks or available(parse_tasks(args.codecs or [c for c in dict.fromkeys(t.split(":")[0] for t in model.tasks) if c in RANGE]))[0]
    evaluation(model, args.weights, args.data, tasks, steps, options, pairs, args.metrics == "all")


def restore_command(args) -> None:
    files, (model, options, _) = outputs(args.input, args.output), model_for(args, (args.steps,))
    restore_files(files, lambda image: (restore(model, image, args.steps, **options)[0], ""))


def main(argv: list[str] | None = None) -> None:
    cli = Parser(prog="moe_diffir.py", description="MoE-DiffIR: restoration for many codecs (arXiv 2407.10833)")
    commands = cli.add_subparsers(dest="command", required=True, parser_class=Parser)
    p = add_train(commands, "moe_diffir", {"s1": Stage1, "s2": Stage2}, train_command)
    p.add_argument("--codecs", nargs="+", metavar="CODEC[:LEVEL]", default=TRAINED, help="what to train on, besides what bench --pairs put into the cache")
    p.add_argument("--cache", type=Path, metavar="DIR", help=f"where the compressed photographs are kept (default: {CACHE} in each folder of --data)")
    p.add_argument("--no-dp", dest="s1_dp", action="store_const", const="none", help="Table 3: no degradation prior")
    p.add_argument("--no-v2t", dest="s1_v2t", action="store_const", const="none", help="Table 3: no Visual2Text, the empty prompt in its place")
    add_restore(commands, "moe_diffir", restore_command).add_argument("--steps", type=int, default=1, help="calls of the UNet")
    p = add_eval(commands, "moe_diffir", eval_command)
    p.add_argument("--steps", type=int, nargs="+", help="calls of the UNet, one row each (default: 1 and the run's own number)")
    p.add_argument("--codecs", nargs="+", metavar="CODEC[:LEVEL]", help="as vvc (all three levels) or vvc:52 (default: those it was trained on)")
    for name in ("restore", "eval"):
        q = commands.choices[name]
        q.add_argument("--start-t", type=int, help="timestep at which sampling starts (default: the run's)")
        q.add_argument("--fidelity", type=float, default=1.0, help="the compensator's weight, 0 to 1")
        q.add_argument("--color-fix", choices=["adain", "none"], default="none", help="AdaIN matches each channel's mean and deviation to the input's")
    b = commands.add_parser("bench", help="the CIR benchmark of your photographs", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    b.add_argument("--data", nargs="+", metavar="DIR", help="photographs to compress")
    b.add_argument("--out", type=Path, required=True, help="the benchmark's folder")
    b.add_argument("--codecs", nargs="+", metavar="CODEC[:LEVEL]", default=TRAINED, help="as vvc (all three levels), vvc:52, avc")
    b.set_defaults(run=bench_command)
    for q in (p, b):
        q.add_argument("--pairs", nargs=2, type=Path, metavar=("LQ_DIR", "HQ_DIR"), help="pictures that another program compressed, and their originals")
        q.add_argument("--task", metavar="CODEC:LEVEL", help="what --pairs holds, as hific:low")
    add_profile(commands, profile_command)
    add_figures(commands, "moe_diffir", figures_command).add_argument("--codecs", nargs="+", metavar="CODEC[:LEVEL]", default=TRAINED)
    args = cli.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run_cli(main)
