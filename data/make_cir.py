"""The benchmark for universal compressed image restoration (MoE-DiffIR, Sec. 3.5), of your photographs.

    python -m data.make_cir --data photos --out bench                  # JPEG, WebP, HEVC, VVC, 3 levels each
    python -m data.make_cir --data photos --out bench --codecs jpeg vvc:52 avc
    python -m data.make_cir --out bench --pairs LQ_DIR HQ_DIR --task hific:low     # others' pictures join it

    OUT/original/NAME.png   OUT/CODEC/LEVEL/NAME.png   OUT/bench.json: the bits that each file really took

JPEG and WebP come with Pillow; HEVC, VVC and AVC need FFmpeg (`pip install -e '.[codecs]'` brings one). What
is there already is not made again. `moe_diffir.py train` makes what it needs in the same way.

For training give it data.pieces' pieces: what it makes of them is as good, to 0.1 dB, as the same pieces of
whole compressed photographs, though a few per cent larger (HEVC and VVC at their lowest level 15 to 35).
For the bits of whole photographs give it those."""

from __future__ import annotations

import functools
import io
import json
import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, features
from tqdm import tqdm

from data.files import UserError, atomic, list_images, note, outputs, read_json, write_json
from data.pictures import read_image
from data.results.tables import mean, save_png, text_table
from data.runs import CommandLine, once, processes, run_cli

# Lowest level first. The seven codecs of the paper's 21 tasks, and AVC, which it keeps unseen in training (as
# it does JPEG QF 25, Sec. 3.5, and VVC QP 32, 52, Table 2). DIFFERS: the release has JPEG at 10, 15, 20, WebP
# at 1, 5, 10. The supplement's JPEG rows are those, so that Table 1 may rest on them.
LEVELS = {"jpeg": ("5", "10", "15"), "webp": ("5", "10", "15"),
          "hevc": ("47", "42", "37"), "vvc": ("47", "42", "37"),
          "c_psnr": ("low", "med", "high"), "c_ssim": ("low", "med", "high"), "hific": ("low", "med", "high"),
          "avc": ("47", "42", "37")}
TRAINED = ["jpeg", "webp", "hevc", "vvc"]  # of the seven, those that we can encode
RANGE = {"jpeg": (1, 100), "webp": (0, 100), "hevc": (0, 51), "vvc": (0, 63), "avc": (0, 51)}
# DIFFERS: the paper names no encoder; the release's folders are of the reference software, HM and VTM. Here
# x265 and libvvenc.
# Stream format, pixel format, options at QP q. All three would code an I frame at q - 3; x265 and x264
# add a message with their settings, larger than small pictures.
FFMPEG = {
    "hevc": ("hevc", "yuv420p", "-c:v libx265 -x265-params qp={q}:ipratio=1.0:info=0"),
    "vvc": ("vvc", "yuv420p10le",
            "-c:v libvvenc -qp {q} -qpa 0 -vvenc-params IntraQPOffset=0 -preset faster"),
    "avc": ("h264", "yuv420p", "-c:v libx264 -qp {q} -i_qfactor 1.0 -bsf:v filter_units=remove_types=6")}
RAW = ["-f", "rawvideo", "-pix_fmt", "rgb24"]
COLOURS = ["-sws_flags", "accurate_rnd+full_chroma_int+full_chroma_inp"]  # the fast conversion darkens
CODEC_SECONDS = 120  # an encoder or decoder that takes longer on one picture has hung
CACHE = ".cir-bench"  # in a folder of training photographs: hidden, so that nobody takes it for photographs

Task = tuple[str, str]  # (codec, level)

# --------------------------------------------------------------------------------------- codecs


@functools.lru_cache
def ffmpeg() -> str:
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
        return get_ffmpeg_exe()
    except ImportError:
        raise UserError("needs imageio-ffmpeg: pip install -e '.[codecs]'") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"needs an FFmpeg that imageio-ffmpeg finds ({reason})") from None


def run_ffmpeg(options: list[str], data: bytes) -> bytes:
    """What FFmpeg makes of `data`."""
    try:
        done = subprocess.run([ffmpeg(), "-hide_banner", *options, "pipe:1"], input=data,
                              capture_output=True, timeout=CODEC_SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(f"the encoder hung and was stopped after {CODEC_SECONDS} s") from None
    except OSError as error:
        raise UserError(f"{ffmpeg()}: cannot be run ({error.strerror})") from None
    if done.returncode or not done.stdout:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["without a word"]
        raise UserError(f"FFmpeg failed ({said[-1][:200]})")
    return done.stdout


@functools.lru_cache
def missing_for(codec: str) -> str | None:
    """What this machine lacks to run the codec, if anything."""
    if codec not in FFMPEG:
        has_it = codec != "webp" or features.check("webp")
        return None if has_it else "this Pillow was built without WebP"
    encoder = FFMPEG[codec][2].split()[1]
    try:
        done = subprocess.run([ffmpeg(), "-hide_banner", "-encoders"], capture_output=True, text=True,
                              timeout=CODEC_SECONDS)
    except UserError as error:
        return str(error)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{ffmpeg()}: cannot be run ({error})"
    return None if f" {encoder} " in done.stdout else f"{ffmpeg()} was built without {encoder}"


def encode_video(pixels: np.ndarray, codec: str, q: str) -> bytes:
    """(H, W, 3) uint8, even sides -> the stream of one intra frame at QP q."""
    stream, pix_fmt, options = FFMPEG[codec]
    size = f"{pixels.shape[1]}x{pixels.shape[0]}"
    source = [*RAW, "-s", size, "-i", "pipe:0"]
    encoder = [*COLOURS, "-pix_fmt", pix_fmt, *options.format(q=q).split(), "-f", stream]
    return run_ffmpeg(source + encoder, pixels.tobytes())


def compress(image: Image.Image, codec: str, level: str) -> tuple[Image.Image, int]:
    """(the picture decoded, its bytes). For 4:2:0 video odd sides repeat their edge, cut off again after."""
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
    a = np.frombuffer(decoded, np.uint8).reshape(a.shape)[:image.height, :image.width]
    return Image.fromarray(a), len(stream)


# ---------------------------------------------------------------------------------------- tasks


def parse_tasks(names: list[str]) -> list[Task]:
    """['vvc', 'jpeg:25'] -> [('vvc', '47'), ('vvc', '42'), ('vvc', '37'), ('jpeg', '25')]."""
    tasks = []
    for name in names:
        codec, _, level = name.partition(":")
        if codec not in RANGE:
            raise UserError(f"--codecs {name}: choose from {', '.join(RANGE)}, or one level as vvc:52; "
                            "others come through --pairs")
        low, high = RANGE[codec]
        if level and not (level.isdecimal() and low <= int(level) <= high):
            raise UserError(f"--codecs {name}: the level must be from {low} to {high}")
        tasks += [(codec, level)] if level else [(codec, level) for level in LEVELS[codec]]
    return list(dict.fromkeys(tasks))


def task_name(text: str) -> Task:
    """'hific:low' -> ('hific', 'low'), which become names of folders."""
    codec, _, level = text.partition(":")
    plain = all(part.translate(str.maketrans("", "", "_-.")).isalnum() for part in (codec, level))
    if not plain or codec == "original":
        raise UserError(f"--task {text}: give CODEC:LEVEL, as hific:low")
    return codec, level


def available(tasks: list[Task]) -> tuple[list[Task], dict[str, str]]:
    """(the tasks that this machine can do, {codec: why not}); says what it leaves out."""
    missing = {codec: missing_for(codec) for codec, _ in tasks if missing_for(codec)}
    for codec, why in missing.items():
        note(f"{codec}: skipped, {why}")
    tasks = [task for task in tasks if task[0] not in missing]
    if not tasks:
        raise UserError(f"--codecs: none of {', '.join(missing)} can be run here")
    return tasks, missing


def coverage(tasks) -> str:
    """Which of the paper's 21 tasks there are."""
    tasks = set(tasks)
    absent = {codec: [f"{codec}:{level}" for level in levels if (codec, level) not in tasks]
              for codec, levels in LEVELS.items() if codec != "avc"}
    number = 21 - sum(map(len, absent.values()))
    names = [name for codec, some in absent.items() for name in ([codec] if len(some) == 3 else some)]
    return f"{number} of the paper's 21 tasks" + (f", without {', '.join(names)}" if names else "")


# ------------------------------------------------------------------------------------ benchmark


def recorded_size(path: Path, stamp: dict) -> int | None:
    """The bytes recorded in a PNG of the benchmark, if it was made from this source in this way."""
    try:
        with Image.open(path) as image:
            record = json.loads(image.info.get("cir", "{}"))
        return record["bytes"] if record.get("stamp") == stamp else None
    except (OSError, ValueError, KeyError, SyntaxError):
        return None


def brought(out: Path) -> list[Path]:
    """The folders OUT/CODEC/LEVEL that --pairs made."""
    return [p for p in out.glob("*/*") if p.is_dir() and p.parent.name not in (*RANGE, "original")]


def save_with_record(image: Image.Image, path: Path, size: int, stamp: dict) -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("cir", json.dumps({"bytes": size, "stamp": stamp}))
    atomic(path, lambda tmp: image.save(tmp, "PNG", pnginfo=chunks, compress_level=3))


def originals(folders: list[Path], out: Path) -> list[tuple[Path, Path]]:
    """(photograph, OUT/original/NAME.png) of all photographs."""
    def find(paths):
        files = [f for f in list_images(paths) if out.resolve() not in f.resolve().parents]
        if not files:
            raise UserError(f"{', '.join(map(str, paths))}: no images in this folder")
        return files
    return outputs([str(f) for f in folders], out / "original", find=find)


def make_versions(file: Path, original: Path, out: Path, tasks: list[Task], bar) -> tuple[list, list[str]]:
    """Makes one photograph's pictures: ([(codec, level, NAME, bits per pixel)], [what failed])."""
    name = original.relative_to(out / "original")
    stat = file.stat()
    image = None  # read if any is to be made
    rows = []
    problems = []
    for codec, level in [("original", ""), *tasks]:
        target = out / codec / level / name
        stamp = {"source": [stat.st_size, stat.st_mtime_ns], "codec": codec, "level": level,
                 "options": list(FFMPEG.get(codec, ()))}
        try:
            size = recorded_size(target, stamp)
            if size is None:
                image = image or read_image(file, on_white=True)[0]
                paired = codec == "original" and any((of / name).exists() for of in brought(out))
                if paired and read_image(target)[0].tobytes() != image.tobytes():
                    raise UserError(f"{target} is there already, by --pairs, and another picture than "
                                    f"{file}; name another --out")
                result, size = (image, 0) if codec == "original" else compress(image, codec, level)
                save_with_record(result, target, size, stamp)
            with Image.open(target) as picture:
                rows.append((codec, level, str(name), 8 * size / (picture.width * picture.height)))
        except UserError as error:
            if codec == "original":
                return rows, [str(error)]
            problems.append(f"{codec}:{level} {file}: {error}")
        bar.update()
    return rows, problems


def bench(folders: list[Path], out: Path, tasks: list[Task]) -> tuple[dict, list[str]]:
    """Every photograph at every task, as OUT/CODEC/LEVEL/NAME.png, and as OUT/original/NAME.png.

    Returns ({codec: {level: {NAME: bits per pixel}}}, [what failed]); what is there is not made again."""
    jobs = originals(folders, out)
    found = {}
    problems = []
    bar = tqdm(total=len(jobs) * (1 + len(tasks)), desc="bench", unit="picture", disable=None)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for rows, failed in pool.map(lambda pair: make_versions(*pair, out, tasks, bar), jobs):
            for codec, level, name, bpp in rows:
                if codec != "original":
                    found.setdefault(codec, {}).setdefault(level, {})[name] = bpp
            for problem in failed:
                note(f"skipped: {problem}")
            problems += failed
    return found, problems


def matched(lq: Path, hq: Path) -> dict[str, tuple[Path, Path]]:
    """{name: (compressed, original)} of two folders with the same names (suffixes may differ) and sizes."""
    one, two = named(lq), named(hq)
    problems = [f"{name} (only in {lq})" for name in one.keys() - two.keys()]
    problems += [f"{name} (only in {hq})" for name in two.keys() - one.keys()]
    for name in one.keys() & two.keys():
        a, b = (read_image(files[name])[0] for files in (one, two))
        if a.size != b.size:
            problems.append(f"{name} ({a.width} x {a.height} in {lq}, {b.width} x {b.height} in {hq})")
    if problems:
        raise UserError(f"--pairs {lq} {hq}: do not match: {', '.join(sorted(problems))}")
    return {name: (one[name], two[name]) for name in sorted(one)}


def named(folder: Path) -> dict[str, Path]:
    """Images by their path in the folder, without suffix."""
    found: dict[str, Path] = {}
    for f in list_images([folder]):
        if (first := found.setdefault(str(f.relative_to(folder).with_suffix("")), f)) != f:
            raise UserError(f"--pairs: {first} and {f.name} have one name; put one of them elsewhere")
    return found


def add_pairs(out: Path, lq: Path, hq: Path, task: Task) -> dict:
    """Puts pictures that another program compressed into the benchmark. Their bits are not known."""
    pairs = matched(lq, hq)
    codec, level = task
    for name, (compressed, original) in tqdm(pairs.items(), f"{codec}:{level}", disable=None):
        target = out / "original" / f"{name}.png"
        image = read_image(original, on_white=True)[0]
        if not target.exists():
            save_png(image, target)
        elif read_image(target)[0].tobytes() != image.tobytes():
            raise UserError(f"--pairs: {target} is there already and another picture than {original}; "
                            "name another --out")
        save_png(read_image(compressed, on_white=True)[0], out / codec / level / f"{name}.png")
    return {codec: {level: {f"{name}.png": None for name in pairs}}}


# -------------------------------------------------------------------------------- for training

Caches = list[tuple[list[Path], Path]]  # folders of photographs and their benchmark


def wanted(folders: list[Path], cache: Path | None, names: list[str] | None) -> tuple[Caches, list[Task]]:
    """What a training takes: where the benchmark of its photographs is, or will be, and its tasks."""
    caches = caches_of(folders, cache)
    tasks = training_tasks(names, caches)
    refuse_to_wait(caches, tasks)
    return caches, tasks


def made(caches: Caches, tasks: list[Task]) -> dict[Path, list[tuple[int, Path]]]:
    """That benchmark, read; by the first process it is completed."""
    once(complete, caches, tasks)
    return read(caches, tasks)


def caches_of(folders: list[Path], cache: Path | None) -> Caches:
    """One inside each folder, or `cache` for all."""
    return [(folders, cache)] if cache else [([folder], folder / CACHE) for folder in folders]


def training_tasks(names: list[str] | None, caches: Caches) -> list[Task]:
    """What to train on: of `names` what this machine can do, and whatever --pairs put into the caches."""
    added = {(path.parent.name, path.name) for _, out in caches for path in brought(out)}
    return available(parse_tasks(names or TRAINED))[0] + sorted(added)


def refuse_to_wait(caches: Caches, tasks: list[Task]) -> None:
    """Of several processes one would make what is not there yet, and the others give up waiting for it."""
    ours = [task for task in tasks if task[0] in RANGE]
    commands = []
    for folders, out in caches if processes() > 1 else ():
        record = out / "bench.json"
        failed = " ".join(["", *read_json(record)["failed"]]) if record.exists() else ""
        if any(not (out / codec / level / original.relative_to(out / "original")).exists()
               for file, original in originals(folders, out) if f" {file}: " not in failed
               for codec, level in ours):
            command = ["python", "-m", "data.make_cir", "--data", *map(str, folders), "--out", str(out),
                       "--codecs", *map(":".join, ours)]
            commands.append(shlex.join(command))
    if commands:
        raise UserError(f"--data: make the benchmark before several processes train: {' && '.join(commands)}")


def complete(caches: Caches, tasks: list[Task]) -> None:
    """Makes what is not there yet, if no other process waits for it, and says what there is."""
    for folders, out in () if processes() > 1 else caches:
        bench(folders, out, [task for task in tasks if task[0] in RANGE])
    print(f"trains on {coverage(tasks)}")


def read(caches: Caches, tasks: list[Task]) -> dict[Path, list[tuple[int, Path]]]:
    """{OUT/original/NAME: [(number of the task, OUT/CODEC/LEVEL/NAME), ...]} of photographs that have any."""
    found = {}
    for folders, out in caches:
        for _, original in originals(folders, out):
            name = original.relative_to(out / "original")
            paths = [out / codec / level / name for codec, level in tasks]
            versions = [(i, path) for i, path in enumerate(paths) if path.exists()]
            if versions and original.exists():
                found[original] = versions
    if not found:
        raise UserError(f"{caches[0][1]}: holds no photograph with a compressed version")
    return found


# -------------------------------------------------------------------------------- command line


def report(path: Path, found: dict, missing: dict[str, str], problems: list[str] | None) -> None:
    """Adds what was made to bench.json, and prints the bits of all that it names. Problems are those of
    --data; without (None) the earlier ones stay."""
    before = read_json(path) if path.exists() else {}
    files = before.get("bits_per_pixel", {})
    problems = before.get("failed", []) if problems is None else problems
    for codec, levels in found.items():
        for level, names in levels.items():
            files.setdefault(codec, {}).setdefault(level, {}).update(names)
    versions = {"pillow": Image.__version__, "libjpeg-turbo": features.version("libjpeg_turbo"),
                "webp": features.version("webp")}
    if any(codec in FFMPEG for codec in found):
        import imageio_ffmpeg
        versions |= {"imageio-ffmpeg": imageio_ffmpeg.__version__,
                     "ffmpeg": imageio_ffmpeg.get_ffmpeg_version()}
    write_json(path, {"versions": versions, "skipped": missing, "failed": problems, "bits_per_pixel": files})
    rows = []
    for codec, levels in files.items():
        for level, names in levels.items():
            bpp = list(names.values())
            bits = [None] * 3 if None in bpp else [mean(bpp), min(bpp), max(bpp)]
            rows.append([codec, level, str(len(names)), *bits])
    rows += [[codec, "-", "skipped", None, None, None] for codec in missing]
    print(text_table(["codec", "level", "images", "bits per pixel", "least", "most"], rows))
    print(f"{coverage((codec, level) for codec in files for level in files[codec])}: {path}")


def main(argv: list[str] | None = None) -> None:
    p = CommandLine("make_cir.py", description="the CIR benchmark of your photographs (MoE-DiffIR)")
    p.add_argument("--data", nargs="+", type=Path, metavar="DIR", help="photographs to compress")
    p.add_argument("--out", type=Path, required=True, help="the benchmark's folder")
    p.add_argument("--codecs", nargs="+", metavar="CODEC[:LEVEL]", default=TRAINED,
                   help=f"as vvc (all three levels), vvc:52, avc (default: {' '.join(TRAINED)})")
    p.add_argument("--pairs", nargs=2, type=Path, metavar=("LQ_DIR", "HQ_DIR"),
                   help="pictures that another program compressed, and their originals")
    p.add_argument("--task", metavar="CODEC:LEVEL", help="what --pairs holds, as hific:low")
    args = p.parse_args(argv)
    if not args.data and not args.pairs:
        raise UserError("give --data (photographs to compress), or --pairs (compressed by another program)")
    if bool(args.pairs) != bool(args.task):
        raise UserError("--pairs and --task CODEC:LEVEL (as hific:low) go together")
    task = task_name(args.task) if args.task else None
    found = {}
    missing = {}
    problems = None
    if args.data:
        tasks, missing = available(parse_tasks(args.codecs))
        found, problems = bench(args.data, args.out, tasks)
    if args.pairs:
        for codec, levels in add_pairs(args.out, *args.pairs, task).items():
            found[codec] = found.get(codec, {}) | levels
    report(args.out / "bench.json", found, missing, problems)
    if problems:
        raise UserError(f"{len(problems)} pictures could not be made; the others are done")


if __name__ == "__main__":
    run_cli(main)
