"""A script's figures: the paper's analysis figures, drawn from a trained model into RUN/samples.

    python SCRIPT.py figures

Which they are is told in data/results/SCRIPT.py."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from common import PHOTOS
from data.files import ROOT, UserError, atomic
from data.results.tables import paper
from data.runs import CommandLine, name_of


def pyplot():
    """Drawing to files."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures needs matplotlib: pip install -e '.[figures]'") from None
    if "inline" not in os.environ.get("MPLBACKEND", ""):  # a notebook's backend, which its own cells need
        matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def panels(rows: int, columns: int, width: float, height: float, **options):
    """(figure, its axes [rows, columns]), of so many inches in all."""
    return pyplot().subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained",
                             **options)


def save(figures: dict, weights: Path) -> None:
    """{name: figure} -> RUN/samples/NAME.png."""
    for name, figure in figures.items():
        target = weights / "samples" / f"{name}.png"
        atomic(target, lambda tmp: figure.savefig(tmp, dpi=110))
        print(target)


def principal_components(points: Tensor) -> Tensor:
    """(N, D) -> (N, 2)."""
    points = points - points.mean(0)
    return points @ torch.linalg.svd(points, full_matrices=False).Vh[:2].T


def smoothed(values: list[float], keep: float = 0.9) -> list[float]:
    out = values[:1]
    for v in values[1:]:
        out.append(keep * out[-1] + (1 - keep) * v)
    return out


def main(script, argv: list[str]) -> None:
    name = name_of(script)
    own = paper(name)
    p = CommandLine(f"{name}.py figures", description="the paper's figures, from a trained model")
    p.add_argument("--weights", type=Path, default=ROOT / "runs" / name, help="a run's folder")
    p.add_argument("--data", nargs="+", metavar="DIR", default=[PHOTOS / "val"],
                   help="photographs (default: the bundled ones)")
    if own.AGAINST:
        p.add_argument("--against", type=Path, default=ROOT / "runs" / f"{name}-{own.AGAINST}",
                       help="a second run's folder, for comparison")
    own.figure_flags(p, script)
    args = p.parse_args(argv)
    pyplot()  # or refuses, before any work
    own.figures(script, args)
