"""The papers' ablations in the miniature, each with several seeds, and what they say of the papers' claims.

    python -m data.results.ablations codiff --data GB82 CID22     # hours; stopped and begun again, it goes on
    python -m data.results.ablations codiff --only shipped --data GB82 CID22      # the weights that ship
    python -m data.results.ablations codiff --only printed --data GB82 CID22      # profile and figures

Every run is a default run but for its flags: `train`, whose table is of the bundled photographs, then `eval`
of `--data`. One process of one thread a core. All figures go into data/results/codiff.json, from which
data/results/pages.py writes the pages' tables."""

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

from tqdm import tqdm

import common
from common import PHOTOS, ROOT, SHIPPED, UserError, note, read_json, write_json
from data.files import atomic
from data.results import pages
from data.results.pages import CHOICES, DEFAULT, HERE, PRINTED, SHIPS, commit

# what is measured: of the default run and the weights that ship; of the other choices
EVAL = {"codiff": ("--qf 1 5 10 20", "--qf 1 5"), "sodiff": ("--qf 5 10 20", "--qf 5"),
        "oscar": ("", "--bpp 0.0313 0.1250"),
        "moe_diffir": ("--codecs jpeg:5 webp:5 hevc:47 vvc:47 vvc:52 avc:47",
                       "--codecs jpeg:5 webp:5 hevc:47 vvc:47")}
AGAINST = {"codiff": "explicit", "sodiff": "no-align"}  # what `figures` draws beside the default run


# ------------------------------------------------------------------------------------------- running


@dataclass
class Job:
    script: str
    choice: str
    seed: int
    train: str
    eval: str


def jobs_of(script: str, seeds: int, only: list[str] | None, data: list[str], more: str) -> list[Job]:
    names, only = [*(c.name for c in CHOICES[script]), SHIPS, "printed"], only or ()
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"--only {' '.join(unknown)}: choose from {', '.join(names)}")
    named = " ".join(["--data", *(Path(d).resolve().name for d in data)])
    whole, short = (f"{named} {measure}".strip() for measure in EVAL[script])
    jobs = [Job(script, c.name, seed, " ".join(f"--seed {seed} {c.flags} {more}".split()),
                whole if c.name == DEFAULT else short)
            for seed in range(seeds) for c in CHOICES[script] if not only or c.name in only]
    jobs += [Job(script, SHIPS, 0, "", whole)] * (SHIPS in only)
    return jobs + [Job(script, name, 0, "", command) for name, command in PRINTED[script].items()
                   if "printed" in only]


def machine() -> str:
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{cpu[1] if cpu else platform.processor() or platform.machine()}, one thread"


def do(job: Job, folder: Path, data: list[str]) -> dict:
    """Trains and measures; a row of the json. What a kill left is gone on with. The weights that ship are
    only measured; of `profile` and `figures` is kept what they print."""
    log, begin = folder.parent / f"{folder.name}.log", time.time()
    script, env = str(ROOT / f"{job.script}.py"), os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*argv: str) -> str:
        with open(log, "a") as out:
            command = [sys.executable, script, *argv]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=out, env=env, text=True)
            out.write(done.stdout)
        if done.returncode:
            last = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-1:]
            raise UserError(f"{job.choice}, seed {job.seed}: {''.join(last)} (see {log})")
        return done.stdout
    folder.parent.mkdir(parents=True, exist_ok=True)
    row = asdict(job) | {"command": f"python {job.script}.py eval {job.eval}", "commit": commit(job.script),
                         "machine": machine(), "seconds": None, "bundled": {}}
    measure = "--data", *data, *EVAL[job.script][job.choice not in (DEFAULT, SHIPS)].split()
    if job.choice in PRINTED[job.script]:
        of = [f"--weights={folder.parent / DEFAULT}-0", "--data", *data] if job.eval == "figures" else []
        if of and (other := AGAINST.get(job.script)):
            of.append(f"--against={folder.parent / other}-0")
        lines = run(*job.eval.split(), *of).strip().splitlines()
        text = "\n".join(line for line in lines if not line.endswith(".png"))
        return row | {"command": f"python {job.script}.py {job.eval}", "figures": {}, "printed": text}
    if job.choice == SHIPS:
        run("eval", "--weights", str(SHIPPED / job.script), *measure)
        return row | {"figures": figures(read_json(ROOT / "runs" / f"{job.script}-shipped" / "metrics.json"))}
    resumed = (folder / "config.json").exists()
    shared = not resumed and begin_with_stage_1_of_the_default(job, folder)
    run("train", "--out", str(folder), *shlex.split(job.train), *(["--resume"] if resumed or shared else []))
    row |= {"command": f"python {job.script}.py train {job.train}",
            "seconds": None if resumed else round(time.time() - begin),
            "bundled": figures(read_json(folder / "metrics.json"))}
    run("eval", "--weights", str(folder), *measure)
    measured = figures(read_json(folder / "metrics.json")) | {"D": discriminator(folder / "log.jsonl")}
    if (mapping := folder / "model" / "mapping.json").exists():  # OSCAR's
        rates = {name: rate for name, rate in read_json(mapping).items() if name != "G_sim"}
        measured |= {key: {name: rate[key] for name, rate in rates.items()} for key in ("cosine", "t")}
    return row | {"figures": measured}


def begin_with_stage_1_of_the_default(job: Job, folder: Path) -> bool:
    """Where a choice changes stage 2 alone, stage 1 is the default's, bit for bit: not trained again."""
    default, choice = folder.with_name(f"{DEFAULT}-{job.seed}"), job.choice
    there = (default / "last" / "stage1.safetensors").exists()
    if not there or next(c.stage for c in CHOICES[job.script] if c.name == choice) == 1:
        return False
    others = shutil.ignore_patterns("stage2*", "metrics.json", "samples")
    atomic(folder, lambda tmp: shutil.copytree(default, tmp, ignore=others))
    return True


def discriminator(log: Path) -> dict[str, float]:
    """How often D told made from real over stage 2's second half; 0.5 is chance."""
    right = [row["right"] for row in map(json.loads, log.read_text().splitlines()) if "right" in row]
    return {"right": round(mean(right[len(right) // 2:]), 4)} if right else {}


def figures(metrics: dict) -> dict[str, dict[str, float]]:
    """{condition: {metric: value}} of metrics.json: what the model made, and what a table sets beside it."""
    flat = {}
    for condition, rows in metrics["results"].items():
        if not isinstance(next(iter(rows.values())), dict):  # OSCAR's
            rows = {"restored": rows}
        for row, values in rows.items():
            name = condition if row.startswith("restored") else f"{condition}, {row}"
            flat[name] = {k: round(v, 4) for k, v in values.items() if v is not None}
    says, routes = metrics.get("predictor", {}), metrics.get("mutual_information")
    more = {name: dict(zip(map(str, says["true QF"]), says[name])) if says else None
            for name in ("predicted QF", "timestep")}  # SODiff's
    more |= {"rank correlation": says.get("rank correlation"), "latent error": metrics.get("latent_error"),
             "router": routes and {f"scale h / {2 ** i}": row["excess"] for i, row in enumerate(routes)}}
    return flat | {name: {k: round(v, 4) for k, v in rows.items()} for name, rows in more.items() if rows}


def run_all(jobs: list[Job], data: list[str], out: Path, processes: int, path: Path) -> list[str]:
    """Does what the json lacks, and writes into it after every run; returns what failed."""
    rows, now, failed = read_json(path) if path.exists() else [], commit(jobs[0].script), []
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
    p = common.CommandLine("ablations", description="a paper's ablations, with seeds")
    p.add_argument("script", choices=list(CHOICES))
    p.add_argument("--seeds", type=int, default=3, help="0, 1, ... of every choice")
    p.add_argument("--only", nargs="+", metavar="NAME", help="of the choices; the default is one of them")
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
    common.run_cli(main)
