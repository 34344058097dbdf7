"""The papers' ablations in the miniature, each with several seeds, and what they say of the papers' claims.

    python -m data.results.ablations SCRIPT --data GB82 CID22     # hours; stopped and begun again, it goes on
    python -m data.results.ablations SCRIPT --only shipped --data GB82 CID22      # the weights that ship
    python -m data.results.ablations SCRIPT --only printed --data GB82 CID22      # profile and figures

Every run is a default run but for its flags: `train`, whose table is of the bundled photographs, then `eval`
of `--data`. One process of one thread a core. All figures go into data/results/SCRIPT.json, from which
data/results/pages.py writes the pages' tables. What is run is told in data/results/SCRIPT.py."""

from __future__ import annotations

import json
import os
import platform
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

from tqdm import tqdm

from common import PHOTOS
from data.files import ROOT, SHIPPED, UserError, atomic, note, read_json, write_json
from data.results import pages
from data.results.seeds import DEFAULT, SHIPS
from data.results.tables import HERE, paper, papers
from data.runs import CommandLine, run_cli

# ------------------------------------------------------------------------------------------- running


@dataclass
class Job:
    script: str
    choice: str
    seed: int
    train: str
    eval: str


def jobs_of(script: str, seeds: int, only: list[str], data: list[str], more: str) -> list[Job]:
    own = paper(script)
    names = [*(c.name for c in own.CHOICES), SHIPS, "printed"]
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"--only {' '.join(unknown)}: choose from {', '.join(names)}")
    named = " ".join(["--data", *(Path(d).resolve().name for d in data)])
    whole, short = (f"{named} {measure}".strip() for measure in own.EVAL)
    jobs = [Job(script, c.name, seed, " ".join(f"--seed {seed} {c.flags} {more}".split()),
                whole if c.name == DEFAULT else short)
            for seed in range(seeds) for c in own.CHOICES if not only or c.name in only]
    jobs += [Job(script, SHIPS, 0, "", whole)] * (SHIPS in only)
    return jobs + [Job(script, name, 0, "", command) for name, command in own.PRINTED.items()
                   if "printed" in only]


def machine() -> str:
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{cpu[1] if cpu else platform.processor() or platform.machine()}, one thread"


def do(job: Job, folder: Path, data: list[str]) -> dict:
    """Trains and measures; a row of the json. What a kill left is gone on with. The weights that ship are
    only measured; of `profile` and `figures` is kept what they print."""
    own = paper(job.script)
    log = folder.parent / f"{folder.name}.log"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    begin = time.time()

    def run(*argv: str) -> str:
        with open(log, "a") as out:
            command = [sys.executable, str(ROOT / f"{job.script}.py"), *argv]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=out, env=env, text=True)
            out.write(done.stdout)
        if done.returncode:
            last = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-1:]
            raise UserError(f"{job.choice}, seed {job.seed}: {''.join(last)} (see {log})")
        return done.stdout
    folder.parent.mkdir(parents=True, exist_ok=True)
    row = asdict(job) | {"command": f"python {job.script}.py eval {job.eval}", "machine": machine(),
                         "commit": pages.commit(job.script), "seconds": None, "bundled": {}}
    measure = "--data", *data, *own.EVAL[job.choice not in (DEFAULT, SHIPS)].split()
    if job.choice in own.PRINTED:
        of = [f"--weights={folder.parent / DEFAULT}-0", "--data", *data] if job.eval == "figures" else []
        if of and own.AGAINST:
            of.append(f"--against={folder.parent / own.AGAINST}-0")
        lines = run(*job.eval.split(), *of).strip().splitlines()
        text = "\n".join(line for line in lines if not line.endswith(".png"))
        return row | {"command": f"python {job.script}.py {job.eval}", "figures": {}, "printed": text}
    if job.choice == SHIPS:
        run("eval", "--weights", str(SHIPPED / job.script), *measure)
        return row | {"figures": figures(own, ROOT / "runs" / f"{job.script}-shipped" / "metrics.json")}
    resumed = (folder / "config.json").exists()
    shared = not resumed and begin_with_stage_1_of_the_default(job, folder)
    run("train", "--out", str(folder), *shlex.split(job.train), *(["--resume"] if resumed or shared else []))
    row |= {"command": f"python {job.script}.py train {job.train}",
            "seconds": None if resumed else round(time.time() - begin),
            "bundled": figures(own, folder / "metrics.json")}
    run("eval", "--weights", str(folder), *measure)
    measured = figures(own, folder / "metrics.json", folder)
    return row | {"figures": measured | {"D": discriminator(folder / "log.jsonl")}}


def begin_with_stage_1_of_the_default(job: Job, folder: Path) -> bool:
    """Where a choice changes stage 2 alone, stage 1 is the default's, bit for bit: not trained again."""
    default = folder.with_name(f"{DEFAULT}-{job.seed}")
    there = (default / "last" / "stage1.safetensors").exists()
    if not there or next(c.stage for c in paper(job.script).CHOICES if c.name == job.choice) == 1:
        return False
    others = shutil.ignore_patterns("stage2*", "metrics.json", "samples")
    atomic(folder, lambda tmp: shutil.copytree(default, tmp, ignore=others))
    return True


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
            flat[name] = {k: v for k, v in values.items() if v is not None}
    flat |= {name: values for name, values in own.more_figures(metrics, run).items() if values}
    return {name: {k: round(v, 4) for k, v in values.items()} for name, values in flat.items()}


def run_all(jobs: list[Job], data: list[str], out: Path, processes: int, path: Path) -> list[str]:
    """Does what the json lacks, and writes into it after every run; returns what failed."""
    rows = read_json(path) if path.exists() else []
    now = pages.commit(jobs[0].script)
    failed = []
    done = [tuple(row[k] for k in ("choice", "seed", "train", "eval", "commit")) for row in rows]
    todo = [job for job in jobs if (job.choice, job.seed, job.train, job.eval, now) not in done]
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="run")
    with ThreadPoolExecutor(processes) as pool, bar:
        started = {pool.submit(do, job, out / job.script / f"{job.choice}-{job.seed}", data): job
                   for job in todo}
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


# -------------------------------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> None:
    p = CommandLine("ablations", description="a paper's ablations, with seeds")
    p.add_argument("script", choices=papers())
    p.add_argument("--seeds", type=int, default=3, help="0, 1, ... of every choice")
    p.add_argument("--only", nargs="+", default=[], metavar="NAME",
                   help="of the choices; the default is one of them")
    p.add_argument("--data", nargs="+", default=[str(PHOTOS / "val")], metavar="DIR",
                   help="photographs to measure on (default: bundled)")
    p.add_argument("--flags", default="", help="more of them, for every training: --flags='--s2-steps 2000'")
    p.add_argument("--processes", type=int, default=os.cpu_count(), help="side by side, of one thread each")
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "ablations", help="the runs' folder")
    p.add_argument("--results", type=Path, default=HERE, help="the folder of figures and pages")
    args = p.parse_args(argv)
    path = args.results / f"{args.script}.json"
    jobs = jobs_of(args.script, args.seeds, args.only, args.data, args.flags)
    failed = run_all(jobs, args.data, args.out, args.processes, path)
    pages.write(args.results)
    if failed:
        raise UserError(f"{len(failed)} of the runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    run_cli(main)
