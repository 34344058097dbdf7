"""What is printed and drawn of measurements of whatever kind; which papers are measured."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image, ImageDraw

from data.files import ROOT, UserError, atomic, note
from data.pictures import read_image

HERE = Path(__file__).parent

# --------------------------------------------------------------------------------------- papers


def papers() -> list[str]:
    """The scripts that have a page here, SCRIPT.md, and beside it what is measured of them, SCRIPT.py."""
    return sorted(page.stem for page in HERE.glob("*.md") if (ROOT / f"{page.stem}.py").exists())


def paper(script: str) -> ModuleType:
    """What is measured of this script's paper alone: data/results/SCRIPT.py."""
    return importlib.import_module(f"data.results.{script}")


def no_flags(p, script: ModuleType) -> None:
    """Of a command that has the same flags for all papers."""


# --------------------------------------------------------------------------------------- tables


def mean(values: list[float | None]) -> float | None:
    """Of what could be measured: a blank page has no PSNR once it is restored exactly, a tiny one no SSIM."""
    values = [v for v in values if v is not None and math.isfinite(v)]
    return sum(values) / len(values) if values else None


def means(rows: list[dict]) -> dict:
    """Key by key, of rows with the same keys."""
    return {k: mean([row[k] for row in rows]) for k in rows[0]}


def text_table(header: list[str], rows: list[list]) -> str:
    def cell(v):
        return v if isinstance(v, str) else "-" if v is None else f"{v:.4f}" if abs(v) < 2 else f"{v:.2f}"
    cells = [header] + [[cell(v) for v in row] for row in rows]
    widths = [max(len(r[c]) for r in cells) for c in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def ledger_table(norms: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """(Header, rows) of a stage's ledger: a loss term a row, a group of parameters a column."""
    rows = [[term, *(f"{norm:.3g}" for norm in row.values())] for term, row in norms.items()]
    return ["", *next(iter(norms.values()))], rows


def plural(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n > 1)}"


def peak_memory() -> str:
    """The process's peak: on the GPU where there is one, else resident on the host."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    if sys.platform == "win32":
        return "not known on Windows"
    import resource
    scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30:.2f} GiB"


# ------------------------------------------------------------------------------------- pictures


def readable(files):
    """(file, picture) of those that can be read; the others are named."""
    for file in files:
        try:
            image = read_image(file)[0]
        except UserError as error:
            note(f"skipped: {error}")
            continue
        yield file, image


def read_all(files: list[Path]) -> list[Image.Image]:
    images = [image for _, image in readable(files)]
    if not images:
        raise UserError(f"{files[0]}: none of {len(files)} images can be read")
    return images


def centre(image: Image.Image, side: int) -> Image.Image:
    """The central side x side pixels, or what there is of them."""
    left, top = (max(0, (n - side) // 2) for n in image.size)
    return image.crop((left, top, min(left + side, image.width), min(top + side, image.height)))


def save_png(image: Image.Image, path: Path) -> None:
    atomic(path, lambda tmp: image.save(tmp, "PNG"))


def comparison_picture(rows: list[list[Image.Image]], labels: list[str], path: Path) -> None:
    """One PNG: a row of equally tall pictures per entry of `rows`, `labels` above the columns."""
    gap = 6
    bar = 18  # for the labels
    widths = [max(r[c].width for r in rows) for c in range(len(labels))]
    lefts = [sum(widths[:c]) + gap * c for c in range(len(labels))]
    size = (lefts[-1] + widths[-1], bar + sum(r[0].height + gap for r in rows))
    canvas = Image.new("RGB", size, "white")
    for left, label in zip(lefts, labels):
        ImageDraw.Draw(canvas).text((left + 2, 3), label, fill="black")
    y = bar
    for row in rows:
        for left, picture in zip(lefts, row):
            canvas.paste(picture, (left, y))
        y += row[0].height + gap
    save_png(canvas, path)
