"""A script's figures: the paper's analysis figures, then how the training went, drawn into RUN/samples.

    python SCRIPT.py figures
    python SCRIPT.py figures --weights FOLDER --keep    # FOLDER is the default run's: the curves' reference

The former are told in data/results/SCRIPT.py. The latter are the ledger, and every logged value beside the
default run's, which data/results/curves/SCRIPT.json holds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor

from common import PHOTOS
from data.files import ROOT, UserError, atomic, note, read_json
from data.results.tables import HERE, ledger_table, paper, text_table
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
    """Means of all values up to each, the later ones weighing more."""
    out, total, weight = [], 0.0, 0.0
    for v in values:
        total, weight = keep * total + v, keep * weight + 1
        out.append(total / weight)
    return out


# ------------------------------------------------------------------------------- how a training went

def ledgers(run: Path) -> dict[str, dict]:
    """{stage: its ledger}, of those that the run's folder has."""
    paths = {stage: run / f"ledger-stage{stage}.json" for stage in "12"}
    return {stage: read_json(path) for stage, path in paths.items() if path.exists()}


def frozen(name: str, stage: str, ledger: dict) -> str:
    columns = next(iter(ledger["norms"].values()))
    parts = [f"{group} (in part)" if group in columns else group for group in ledger["frozen"]]
    here = ", ".join(parts) or "no part of these modules"
    return f"Without gradient here: {here}. Frozen in the paper: {paper(name).FROZEN[stage]}."


def curves(run: Path) -> dict[str, dict[str, list]]:
    """{stage: {"step": steps, name: [means, deviations]}}, of the last steps, weighted exponentially; of all
    that the log has without @."""
    stages: dict[str, dict[str, list]] = {}
    for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        for k, v in row.items():
            if "@" not in k and k != "stage":
                stages.setdefault(str(row["stage"]), {}).setdefault(k, []).append(v)
    for stage in stages.values():
        for k in stage.keys() - {"step"}:
            mean, power = smoothed(stage[k], 0.95), smoothed([v * v for v in stage[k]], 0.95)
            stage[k] = [mean, [max(0.0, p - m * m) ** 0.5 for m, p in zip(mean, power)]]
    return stages


def keep(run: Path, path: Path) -> None:
    """Makes the default run of SCRIPT.json, whose folder this is, the curves' reference."""
    of = next(r for r in read_json(HERE / path.name) if (r["choice"], r["seed"]) == ("default", 0))
    stages = curves(run)
    for stage in stages.values():
        every = max(1, len(stage["step"]) // 40)
        stage |= {k: [[float(f"{x:.4g}") for x in values[::every]] for values in stage[k]]
                  for k in stage.keys() - {"step"}} | {"step": stage["step"][::every]}
    reference = {k: of[k] for k in ("command", "commit", "machine")}
    reference |= {"config": read_json(run / "config.json"), "curves": stages}
    atomic(path, lambda tmp: tmp.write_text(json.dumps(reference) + "\n"))


def draw_curves(own: dict, reference: dict, title: str):
    """A panel a value: the run in blue, the reference in grey."""
    names = [(stage, k) for stage in sorted(own.keys() | reference.keys())
             for k in reference.get(stage, {}) | own.get(stage, {}) if k != "step"]
    figure, axes = panels(-(-len(names) // 4), 4, 13, 0.4 + 2.1 * -(-len(names) // 4))
    for axis in axes.flat[len(names):]:
        axis.axis("off")
    for axis, (stage, k) in zip(axes.flat, names):
        for curve, color in ((reference, "0.5"), (own, "tab:blue")):
            if k in curve.get(stage, {}):
                step, (mean, deviation) = curve[stage]["step"], curve[stage][k]
                axis.plot(step, mean, color=color, linewidth=1.2)
                if curve is reference:
                    band = ([m + sign * d for m, d in zip(mean, deviation)] for sign in (-1, 1))
                    axis.fill_between(step, *band, color="0.85")
                if min(mean) > 0 and max(mean) > 10 * min(mean):
                    axis.set_yscale("log")
        axis.set_title(f"stage {stage}: {k}", fontsize=9)
        axis.tick_params(which="both", labelsize=7)
    figure.suptitle(title, fontsize=9)
    return figure


def training(name: str, run: Path, path: Path) -> None:
    """Prints the run's ledgers; draws its curves beside the reference's, if it has a log."""
    for stage, ledger in ledgers(run).items():
        print(f"\nstage {stage}, step 1: gradient norm of each loss term, by what it would move\n"
              f"{text_table(*ledger_table(ledger['norms']))}\n{frozen(name, stage, ledger)}")
    if not (run / "log.jsonl").exists():
        return note(f"{run}: no log.jsonl, so no curves")
    reference = read_json(path)
    was, now = reference["config"], read_json(run / "config.json")
    other = ", ".join(f"{k} {now.get(k)} (reference: {was.get(k)})" for k in was | now
                      if was.get(k) != now.get(k))
    grey = f"{reference['command']}, commit {reference['commit']}, mean ± deviation"
    title = f"blue: {run.name}; grey: {grey}; {'other' if other else 'same'} settings{other and ': ' + other}"
    print(f"\n{title}")
    save({"curves": draw_curves(curves(run), reference["curves"], shorten(title, 190))}, run)


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
    p.add_argument("--keep", action="store_true", help="make the run the reference of others' curves")
    own.figure_flags(p, script)
    args = p.parse_args(argv)
    pyplot()  # or refuses, before any work
    path = HERE / "curves" / f"{name}.json"
    if args.keep:
        return keep(args.weights, path)
    own.figures(script, args)
    training(name, args.weights, path)
