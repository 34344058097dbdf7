"""The papers' ablations, in the miniature with several seeds; then what they say of the papers' claims.

    python -m data.results.ablations SCRIPT --data GB82 CID22     # hours; stopped and begun again, it goes on
    python -m data.results.ablations SCRIPT --only shipped --data GB82 CID22      # the weights that ship
    python -m data.results.ablations SCRIPT --only printed --data GB82 CID22      # profile and figures
    python -m data.results.ablations SCRIPT --paper --data pieces --val LIVE1     # at the paper's size: weeks

Every run is a default run but for its flags: `train`, whose table is of the bundled photographs, then `eval`
of `--data`. One process of one thread a core. All figures go into data/results/SCRIPT.json, from which
data/results/pages.py writes the pages' tables. What is run is told in data/results/SCRIPT.py.

With --paper: the paper's settings and metrics, trained on --data, measured on --val; one process a GPU, which
sees no other. Figures go into data/results/SCRIPT-paper.json, and are printed.
With --dry-run nothing is run: the commands are printed, one a line."""

from __future__ import annotations

import json
import os
import platform
import queue
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from types import ModuleType

import torch
from tqdm import tqdm

from common import PHOTOS
from data.files import ROOT, SHIPPED, UserError, atomic, note, read_json, write_json
from data.results import pages
from data.results.figures import ledgers
from data.results.seeds import DEFAULT, SHIPS, cell
from data.results.tables import HERE, paper, papers, text_table
from data.runs import CommandLine, run_cli

# ------------------------------------------------------------------------------------------- running


@dataclass
class Job:
    script: str
    choice: str
    seed: int
    train: list[str]  # a command's words; none: of the weights that ship
    eval: list[str]


def jobs_of(args) -> list[Job]:
    """A choice with a seed each; then what is measured without training, if --only asks for it."""
    own = paper(args.script)
    choices = [c for c in own.CHOICES if args.paper or not c.paper_only]
    names = [*(c.name for c in choices), *([] if args.paper else [SHIPS, *own.ALSO, "printed"])]
    if unknown := [name for name in args.only if name not in names]:
        raise UserError(f"--only {' '.join(unknown)}: choose from {', '.join(names)}")
    size = ["--paper", "--data", *args.data] if args.paper else []

    def train(choice, seed):
        return [*size, "--seed", str(seed), *shlex.split(choice.words(args.script, args.paper)),
                *shlex.split(args.flags)]

    def measure(choice):
        whole, short, *at_paper_size = own.EVAL
        if args.paper:
            flags = f"--metrics all {(at_paper_size or [whole])[0]}"
        else:
            flags = own.ALSO.get(choice) or (whole if choice in (DEFAULT, SHIPS) else short)
        return ["--data", *args.val, *flags.split()]
    jobs = [Job(args.script, c.name, seed, train(c, seed), measure(c.name))
            for seed in range(args.seeds) for c in choices if not args.only or c.name in args.only]
    jobs += [Job(args.script, name, 0, [], measure(name)) for name in (SHIPS, *own.ALSO) if name in args.only]
    photos = ["--data", *args.val]
    return jobs + [Job(args.script, name, 0, [], [*command.split(), *(photos if name == "figures" else [])])
                   for name, command in own.PRINTED.items() if "printed" in args.only]


def row_of(job: Job, args) -> dict:
    """What the json says of a job before it is done: nothing of this machine's folders but their names."""
    def said(words):
        return " ".join(Path(w).resolve().name if w in (*args.data, *args.val) else w for w in words)
    return asdict(job) | {"train": said(job.train), "eval": said(job.eval),
                          "commit": pages.commit(job.script)}


def folder_of(job: Job, args) -> Path:
    return args.out / job.script / f"{job.choice}-{job.seed}"


def commands(job: Job, args) -> list[list[str]]:
    """What a job runs. A training that was begun is gone on with."""
    own = paper(job.script)
    folder = folder_of(job, args)
    script = [sys.executable, str(ROOT / f"{job.script}.py")]
    if job.choice in own.PRINTED:
        of = []
        if job.choice == "figures":
            of = [f"--weights={folder.parent / DEFAULT}-0"]
            of += [f"--against={folder.parent / own.AGAINST}-0"] if own.AGAINST else []
        return [[*script, *job.eval, *of]]
    weights = folder if job.train else SHIPPED / job.script
    measure = [*script, "eval", "--weights", str(weights), *job.eval]
    resume = ["--resume"] if (folder / "config.json").exists() else []
    train = [*script, "train", "--out", str(folder), *job.train, *resume]
    return [train, measure] if job.train else [measure]


def machine(args) -> str:
    if args.paper:
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{cpu[1] if cpu else platform.processor() or platform.machine()}, one thread"


def places(args) -> list[dict[str, str]]:
    """The environment of every process that may run at a time: one thread of this machine, or one GPU."""
    if not args.paper:
        return [{"OMP_NUM_THREADS": "1"}] * (args.processes or os.cpu_count())
    if not torch.cuda.is_available():
        raise UserError("--paper: there is no GPU here (--dry-run prints the commands)")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus.split(",")[:args.processes]]


def do(job: Job, args, place: dict[str, str]) -> dict:
    """Trains and measures; a row of the json. What a kill left is gone on with. The weights that ship are
    only measured; of `profile` and `figures` is kept what they print."""
    own = paper(job.script)
    folder = folder_of(job, args)
    log = folder.parent / f"{folder.name}.log"
    begin = time.time()

    def run(command: list[str]) -> str:
        with open(log, "a") as out:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=out, text=True,
                                  env=os.environ | place)
            out.write(done.stdout)
        if done.returncode:
            last = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-1:]
            raise UserError(f"{job.choice}, seed {job.seed}: {''.join(last)} (see {log})")
        return done.stdout
    folder.parent.mkdir(parents=True, exist_ok=True)
    row = row_of(job, args) | {"machine": machine(args), "seconds": None, "bundled": {}}
    asked = f"python {job.script}.py"
    if job.choice in own.PRINTED:
        lines = run(*commands(job, args)).strip().splitlines()
        text = "\n".join(line for line in lines if not line.endswith(".png"))
        return row | {"command": f"{asked} {row['eval']}", "figures": {}, "printed": text}
    if not job.train:
        run(*commands(job, args))
        measured = figures(own, ROOT / "runs" / f"{job.script}-shipped" / "metrics.json")
        return row | {"command": f"{asked} eval {row['eval']}", "figures": measured}
    resumed = (folder / "config.json").exists()
    if not resumed:
        begin_with_stage_1_of_the_default(job, folder)
    train, measure = commands(job, args)
    run(train)
    row |= {"command": f"{asked} train {row['train']}",
            "seconds": None if resumed else round(time.time() - begin),
            "bundled": figures(own, folder / "metrics.json")}
    run(measure)
    measured = figures(own, folder / "metrics.json", folder)
    row |= {"figures": measured | {"D": discriminator(folder / "log.jsonl")}}
    return row | ({"ledger": ledgers(folder)} if job.choice == DEFAULT else {})


def begin_with_stage_1_of_the_default(job: Job, folder: Path) -> None:
    """Where a choice changes stage 2 alone, stage 1 is the default's, bit for bit: not trained again."""
    default = folder.with_name(f"{DEFAULT}-{job.seed}")
    there = (default / "last" / "stage1.safetensors").exists()
    if there and next(c.stage for c in paper(job.script).CHOICES if c.name == job.choice) == 2:
        others = shutil.ignore_patterns("stage2*", "metrics.json", "samples")
        atomic(folder, lambda tmp: shutil.copytree(default, tmp, ignore=others))


def discriminator(log: Path) -> dict[str, float]:
    """How often D told made from real over stage 2's second half; 0.5 is chance."""
    right = [row["right"] for row in map(json.loads, log.read_text().splitlines()) if "right" in row]
    return {"right": round(mean(right[len(right) // 2:]), 4)} if right else {}


def figures(own: ModuleType, file: Path, run: Path | None = None) -> dict[str, dict[str, float]]:
    """{condition: {metric: value}} of metrics.json: what the model made, and what a table sets beside it."""
    metrics = read_json(file)
    flat = {}
    for condition, rows in metrics["results"].items():
        if not isinstance(next(iter(rows.values())), dict):  # of a codec, which has no rows beside
            rows = {"restored": rows}
        for row, values in rows.items():
            name = condition if row.startswith("restored") else f"{condition}, {row}"
            flat[name] = values
    flat |= {name: values for name, values in own.more_figures(metrics, run).items() if values}
    return {name: {k: round(v, 4) for k, v in values.items() if v is not None}
            for name, values in flat.items()}


def left(jobs: list[Job], args, rows: list[dict]) -> list[Job]:
    """Those that the json's rows do not hold."""
    def key(row):
        return tuple(row[k] for k in ("choice", "seed", "train", "eval", "commit"))
    done = [key(row) for row in rows]
    return [job for job in jobs if key(row_of(job, args)) not in done]


def run_all(jobs: list[Job], args, path: Path) -> list[str]:
    """Does what the json lacks, and writes into it after every run; returns what failed."""
    rows = read_json(path) if path.exists() else []
    failed = []
    todo = left(jobs, args, rows)
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    side_by_side = places(args)
    for place in side_by_side:
        free.put(place)

    def in_a_place(job):
        place = free.get()
        try:
            return do(job, args, place)
        finally:
            free.put(place)
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="run")
    with ThreadPoolExecutor(len(side_by_side)) as pool, bar:
        started = {pool.submit(in_a_place, job): job for job in todo}
        try:
            for future in as_completed(started):
                job = started[future]
                try:
                    row = future.result()
                except UserError as error:
                    failed.append(str(error))
                    note(f"failed: {error}")
                else:
                    rows = [r for r in rows if (r["choice"], r["seed"]) != (job.choice, job.seed)]
                    rows = sorted([*rows, row], key=lambda r: (r["choice"], r["seed"]))
                    write_json(path, rows)
                bar.update()
        except KeyboardInterrupt:  # which the trainings got as well
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def print_commands(jobs: list[Job], args, path: Path) -> None:
    """What run_all would run, to be pasted into a shell. (It copies the default's stage 1 where that is there
    and a choice changes stage 2 alone; the commands train it again, to the same result.)"""
    of_the_miniature = [] if args.paper else ["OMP_NUM_THREADS=1"]
    for job in left(jobs, args, read_json(path) if path.exists() else []):
        for command in commands(job, args):
            print(shlex.join([*of_the_miniature, *command]))


def print_figures(rows: list[dict]) -> None:
    """A table for everything that is restored, a row a choice."""
    choices = dict.fromkeys(r["choice"] for r in rows)
    for condition in dict.fromkeys(c for r in rows for c, v in r["figures"].items() if "PSNR" in v):
        if "," not in condition:  # what stands beside it is not made by the model
            metrics = dict.fromkeys(m for r in rows for m in r["figures"].get(condition, {}))
            table = [[name, *(cell(rows, name, condition, m) for m in metrics)] for name in choices]
            print(f"\n{condition}\n{text_table(['', *metrics], table)}")


# -------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    p = CommandLine("ablations", description="a paper's ablations, with seeds")
    p.add_argument("script", choices=papers())
    p.add_argument("--paper", action="store_true", help="at the paper's size, on one GPU a run; needs --data")
    p.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    p.add_argument("--seeds", type=int, help="0, 1, ... of every choice (default: 3, with --paper 1)")
    p.add_argument("--only", nargs="+", default=[], metavar="NAME",
                   help="of the choices; the default is one of them")
    p.add_argument("--data", nargs="+", default=[], metavar="DIR",
                   help="photographs to measure on (default: bundled); with --paper to train on")
    p.add_argument("--val", nargs="+", default=[], metavar="DIR",
                   help="with --paper: photographs to measure on (default: bundled)")
    p.add_argument("--flags", default="", help="more of them, for every training: --flags='--s2-steps 2000'")
    p.add_argument("--processes", type=int, help="side by side (default: one a core, with --paper one a GPU)")
    p.add_argument("--out", type=Path, help="the runs' folder (default: runs/ablations, or -paper)")
    p.add_argument("--results", type=Path, default=HERE, help="the folder of figures and pages")
    args = p.parse_args(argv)
    if args.paper and not args.data:
        raise UserError("--paper needs --data: folders of photographs to train on (see data/README.md)")
    if args.val and not args.paper:
        raise UserError("--val goes with --paper; without it --data is measured on")
    suffix = "-paper" if args.paper else ""
    args.val = (args.val if args.paper else args.data) or [str(PHOTOS / "val")]
    args.seeds = args.seeds or (1 if args.paper else 3)
    args.out = args.out or ROOT / "runs" / f"ablations{suffix}"
    path = args.results / f"{args.script}{suffix}.json"
    jobs = jobs_of(args)
    if args.dry_run:
        return print_commands(jobs, args, path)
    failed = run_all(jobs, args, path)
    if not args.paper:
        pages.write(args.results)
    elif path.exists():
        print_figures(read_json(path))
    if failed:
        raise UserError(f"{len(failed)} of the runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    run_cli(main)
