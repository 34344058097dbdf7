"""Files: found, named, written whole or not at all, and what is told of those that are bad."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Semaphore

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]  # of the repo
SHIPPED = ROOT / "data" / "weights"  # a trained model a script, for those who have none of their own
IMAGE_SUFFIXES = set(Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg", ".h5", ".hdf"}


class UserError(Exception):
    """Something the user can mend. The message names the file or flag and says what to do."""


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def in_repo(path: str | Path) -> str:
    """As it is recorded: relative to the repo, so that a checkout may move; else absolute, or a hub id."""
    folder = Path(path).resolve()
    if not folder.is_dir():
        return str(path)
    return str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)


def atomic(path: Path, write) -> None:
    """Calls `write(tmp)` and renames tmp to `path`: a reader sees the old file or the new, never half."""
    # (a short name: that of `path` may be as long as a name can be)
    tmp = path.with_name(f".{os.getpid()}.{threading.get_native_id()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        os.replace(tmp, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        with suppress(OSError):  # the folder may be a file
            tmp.unlink(missing_ok=True)


def append(path: Path, text: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); mend that, then go on") from None


def write_json(path: Path, value) -> None:
    atomic(path, lambda tmp: tmp.write_text(json.dumps(value, indent=1, default=str) + "\n"))


def read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def save_tensors(path: Path, tensors: dict, **header) -> None:
    """One safetensors file of tensors and dictionaries of them; `header` goes into its metadata as JSON."""
    flat, todo = {}, [("", tensors)]
    for prefix, level in todo:
        for k, v in level.items():
            if isinstance(v, dict):
                todo.append((f"{prefix}{k}/", v))
            else:
                flat[f"{prefix}{k}"] = torch.as_tensor(v).detach().cpu().contiguous()
    atomic(path, lambda tmp: save_file(flat, tmp, {"header": json.dumps(header)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The inverse of `save_tensors`: (tensors, header)."""
    tensors: dict = {}
    try:
        with safe_open(path, framework="pt") as f:
            header = json.loads((f.metadata() or {}).get("header", "{}"))
            for key in f.keys():
                *above, k = key.split("/")
                level = tensors
                for name in above:
                    level = level.setdefault(name, {})
                level[k] = f.get_tensor(key)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    return tensors, header


def load_part(kind, base: str | Path, name: str, weights: bool = True):
    """One part of a diffusers folder or hub repository; without `weights` its architecture only."""
    from huggingface_hub import model_info, try_to_load_from_cache
    base = ROOT / base if (ROOT / base).is_dir() else base  # the bundled one is recorded relative to the repo
    try:
        if not Path(base).is_dir() and not try_to_load_from_cache(str(base), "unet/config.json"):
            model_info(str(base), timeout=8)  # fails at once, where the libraries below try for minutes
        if not weights:
            return kind.from_config(kind.load_config(base, subfolder=name))
        dtype = {} if name == "tokenizer" else {"torch_dtype": torch.float32}
        return kind.from_pretrained(base, subfolder=name, **dtype)
    except Exception as error:  # no such folder or repository, no network, no access: all the same to users
        why = first_line(error)
        raise UserError(f"{base}: no {name} there ({why}); name a local diffusers folder") from None


def check_base(base: str | Path, sd) -> None:
    """Refuses what is not Stable Diffusion's kind of base, and says what it has."""
    vae, known = sd.vae.config, ("epsilon", "v_prediction")
    foreign = [
        (f"it predicts {sd.prediction}, not one of {known}", sd.prediction not in known),
        (f"its schedule has {len(sd.alpha_bar)} steps, not 1000", len(sd.alpha_bar) != 1000),
        ("its VAE has no quant_conv", not (vae.use_quant_conv and vae.use_post_quant_conv)),
        ("its VAE scales each channel (latents_mean)", vae.latents_mean is not None)]
    if sd.unet:
        unet, c = sd.unet.config, vae.latent_channels
        more = "addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type"
        foreign += [
            (f"its UNet takes {unet.in_channels} channels and gives {unet.out_channels}, latents have {c} "
             "(more go in for inpainting, depth, editing)", (unet.in_channels, unet.out_channels) != (c, c)),
            *((f"its UNet wants more than time and text ({k} {unet[k]}; SDXL's does)", unet[k] is not None)
              for k in more),
            (f"its UNet has texts of several widths {unet.cross_attention_dim}",
             not isinstance(unet.cross_attention_dim, int))]
    for what, wrong in foreign:
        if wrong:
            raise UserError(f"--base {base}: another kind of base than this is about: {what}")


def read_model(weights: str | Path, script: str, stage: int = 2) -> tuple[dict[str, Tensor], dict]:
    """(tensors, header) of a stage's result, if this script made it."""
    weights = Path(weights)
    if weights.resolve() == SHIPPED / script and stage == 2:
        note(f"{in_repo(weights)}: the weights that ship with this program; {script}.py train makes others")
    path = weights / "model" / f"stage{stage}.safetensors"
    if not path.exists():
        raise UserError(f"{path}: no such file; {script}.py train --stage {stage} makes it (stage 1 first)")
    tensors, header = load_tensors(path)
    if (header.get("script"), header.get("stage")) != (script, f"stage{stage}"):
        raise UserError(f"{path}: not made by {script}.py's stage {stage}")
    return tensors, header


def list_images(paths: list[str | Path]) -> list[Path]:
    """The images at `paths`: files, or folders (searched recursively, sorted, nothing hidden)."""
    out = []
    for p in map(Path, paths):
        found = files_in(p, lambda f: f.suffix.lower() in IMAGE_SUFFIXES) if p.is_dir() else [p] * p.exists()
        if not found:
            raise UserError(f"{p}: no {'images in this folder' if p.exists() else 'such file or folder'}")
        out += found
    return out


def list_files(paths: list[Path], suffix: str) -> list[Path]:
    """Files, under any name, and those of this suffix in folders, searched recursively."""
    files = [f for p in paths for f in ([p] if p.is_file() else files_in(p, lambda f: f.suffix == suffix))]
    if not files:
        raise UserError(f"{paths[0]}: no such file, nor a folder of {suffix} files")
    return files


def files_in(folder: Path, wanted) -> list[Path]:
    """The files below it that are wanted(path), sorted, nothing hidden. Folders may be symbolic links, even
    to where the search has been."""
    seen = set()

    def search(folder):
        seen.add(folder.resolve())
        for p in folder.iterdir():
            if p.is_dir() and not p.name.startswith(".") and p.resolve() not in seen:
                yield from search(p)
            elif wanted(p) and not p.name.startswith(".") and p.is_file():
                yield p
    return sorted(search(folder)) if folder.is_dir() else []


def outputs(inputs: list[str], out: Path, suffix: str = ".png", find=list_images) -> list[tuple[Path, Path]]:
    """(input, output) for every file: one file to a file of that name, all else into the folder `out`, whose
    earlier results are no inputs."""
    if len(inputs) == 1 and not Path(inputs[0]).is_dir() and out.suffix and not out.is_dir():
        if out.suffix.lower() != suffix:
            raise UserError(f"{out}: results are {suffix[1:].upper()}; give a name that ends in {suffix}")
        pairs = [(f, out) for f in find([Path(inputs[0])])]
    else:
        pairs = [(f, out / (f.relative_to(root) if root.is_dir() else Path(f.name)).with_suffix(suffix))
                 for root in map(Path, inputs) for f in find([root])
                 if not root.is_dir() or out.resolve() not in f.resolve().parents
                 or out.resolve() == root.resolve()]
    if not pairs:
        raise UserError(f"{inputs[0]}: holds nothing but what lies in {out}; name another output")
    times = Counter(target for _, target in pairs)  # a.jpg and a.png in one folder: a.jpg.png and a.png.png
    pairs = [(f, target.with_name(f.name + suffix) if times[target] > 1 else target) for f, target in pairs]
    taken = {f.resolve() for f, _ in pairs}
    for file, target in pairs:
        if target.resolve() in taken:
            raise UserError(f"{file}: {target} would overwrite an input or another result; name another")
        taken.add(target.resolve())
    return pairs


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def reason(error: Exception, file: Path) -> str:
    """One line on a failure of whatever kind, which names the file."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, UserError):
        return text
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return f"{file}: not enough memory; --tile 512 takes a part of the picture at a time"
    return f"{file}: failed ({type(error).__name__}: {text})"


def each_file(pairs: list[tuple[Path, Path]], what: str, work, at_once: int = 1) -> None:
    """work(input, output, turn) -> remark for each pair, by threads: some read and write, while `at_once` of
    them, which share the cores, have their `turn` at the networks. What comes of it is told in order. A bad
    file is named, the rest goes on, then it fails."""
    turn = Semaphore(at_once)
    busy: set[int] = set()  # threads

    def watched(file: Path, target: Path) -> str:
        busy.add(threading.get_ident())
        try:
            return work(file, target, turn)
        finally:
            busy.discard(threading.get_ident())
    bad = 0
    cores = max(1, torch.get_num_threads() // min(at_once, len(pairs)))
    pool = ThreadPoolExecutor(min(at_once + 2, len(pairs)), "", torch.set_num_threads, (cores,))
    try:
        jobs = [pool.submit(watched, *pair) for pair in pairs]
        for (file, target), job in tqdm(zip(pairs, jobs), what, len(pairs),
                                        disable=None if len(pairs) > 1 else True):
            try:
                tqdm.write(f"{target}  ({job.result()})")
            except Exception as error:  # whatever it is, it ends this file alone
                if len(pairs) == 1:
                    raise UserError(reason(error, file)) from None
                bad += 1
                note(f"skipped: {reason(error, file)}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        end_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc  # Ctrl-C reaches the main thread alone
        for thread in busy.copy():
            end_thread(ctypes.c_ulong(thread), ctypes.py_object(KeyboardInterrupt))
        pool.shutdown()
    if bad:
        others = "; the others are" * (bad < len(pairs))
        raise UserError(f"{what}: {bad} of {len(pairs)} files could not be done{others}")


def leave_ctrl_c_to_the_parent(worker: int) -> None:
    """For a loader's processes, which Ctrl-C, or the parent's end by it, would end with a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # what goes wrong in a sample reaches the parent in another way
