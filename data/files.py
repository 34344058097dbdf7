"""Files, written whole or not at all, and what is told of those that cannot be read or written."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend. The message names the file or flag and says what to do."""


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def atomic(path: Path, write) -> None:
    """Calls `write(tmp)` and renames tmp to `path`: a reader sees the old file or the new, never half."""
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        os.replace(tmp, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        with suppress(OSError):  # the folder may be a file
            tmp.unlink(missing_ok=True)


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


def each_file(pairs: list[tuple[Path, Path]], what: str, work) -> None:
    """work(input, output) -> remark for each pair. A bad file is named, the rest goes on, then it fails."""
    bad = 0
    for file, target in tqdm(pairs, what, disable=None if len(pairs) > 1 else True):
        try:
            tqdm.write(f"{target}  ({work(file, target)})")
        except UserError as error:
            if len(pairs) == 1:
                raise
            bad += 1
            note(f"skipped: {error}")
    if bad:
        raise UserError(f"{what}: {bad} of {len(pairs)} files could not be done; the others are")
