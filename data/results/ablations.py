"""The papers' ablations in the miniature, each with several seeds, and what they say of the papers' claims.

    python -m data.results.ablations codiff --data GB82 CID22     # hours; stopped and begun again, it goes on
    python -m data.results.ablations codiff --write               # only the page, from what is there

Every run is a default run but for its flags: `train`, whose table is of the bundled photographs, then `eval`
of `--data`. One process of one thread a core. All figures go into data/results/codiff.json, from which the
page's tables are written (between comments: "ablations", "expected")."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from tqdm import tqdm

import common
from common import PHOTOS, ROOT, UserError, note, read_json, write_json
from data.files import atomic

HERE, DEFAULT = Path(__file__).parent, "default"


@dataclass
class Choice:
    name: str  # of its runs' folders, and in the table
    flags: str
    where: str = ""  # in the paper


@dataclass
class Claim:
    """That `better` beats `worse`, as the paper says and measures it; here by the column `metric`."""
    says: str
    better: str
    worse: str
    paper: str
    metric: str = "PSNR"


# what `eval` measures, and the table's columns: (condition, metrics)
EVAL = {"codiff": "--qf 1 5 10", "sodiff": "--qf 5 10", "oscar": "",
        "moe_diffir": "--codecs jpeg:5 webp:5 hevc:47 vvc:47 vvc:52 avc:47"}
QF_5 = [("JPEG QF 5", metric) for metric in ("PSNR", "PSNR-B", "SSIM", "detail", "grid Y")]
TASKS = ("jpeg:5", "webp:5", "hevc:47", "vvc:47", "vvc:52", "avc:47")
COLUMNS = {"codiff": [("JPEG QF 1", "PSNR"), *QF_5], "sodiff": [*QF_5, ("JPEG QF 10", "PSNR")],
           "oscar": [(f"OSCAR {bpp}", metric) for bpp in ("0.0313", "0.1250")
                     for metric in ("PSNR", "SSIM", "detail")],
           "moe_diffir": [(task, "PSNR") for task in TASKS]}

CHOICES = {
    "codiff": [
        Choice(DEFAULT, "", "CaVE, dual learning, all losses"),
        Choice("learnable", "--prompt learnable", "Table 3"), Choice("empty", "--prompt empty", "Table 3"),
        Choice("explicit", "--learning explicit", "Table 4"),
        Choice("implicit", "--learning implicit", "Table 4"),
        Choice("l2", "--losses l2", "Table 5"), Choice("l2-dists", "--losses l2,dists", "Table 5"),
        Choice("l2-gan", "--losses l2,gan", "Table 5")],
    "sodiff": [
        Choice(DEFAULT, "", "SAIPE, timestep predictor, all losses"),
        Choice("no-align", "--lambda-align 0", "Table 2"),
        Choice("fixed-t", "--timestep fixed", "Table 3"),
        Choice("no-L_qf", "--beta 0", "Table 3"), Choice("no-L_EA", "--losses mse,gan", "Table 4"),
        Choice("no-L_G", "--losses mse,ea", "Table 4")],
    "oscar": [
        Choice(DEFAULT, "", "alignment, measured mapping, all losses"),
        Choice("no-alignment", "--no-alignment", "Fig. 7"),
        Choice("random-t", "--mapping random", "Fig. 7"),
        Choice("no-L_EA", "--losses mse,dists,gan", "Fig. 7"),
        Choice("no-L_G", "--losses mse,ea,dists", "Fig. 7")],
    "moe_diffir": [
        Choice(DEFAULT, "", "MoE-Prompt, V2T, DP; N 7, K 3"),
        Choice("none", "--prompt none --no-v2t --no-dp", "Table 2"),
        Choice("single", "--prompt single --no-v2t --no-dp", "Table 2"),
        Choice("multiple", "--prompt multiple --no-v2t --no-dp", "Table 2"),
        Choice("moe", "--no-v2t --no-dp", "Tables 2 and 3"), Choice("moe-v2t", "--no-dp", "Table 3"),
        Choice("moe-dp", "--no-v2t", "Table 3"), Choice("N1-K1", "--experts 1 --top-k 1", "Fig. 6"),
        Choice("N14-K3", "--experts 14", "Fig. 6"), Choice("N7-K1", "--top-k 1", "Fig. 6"),
        Choice("N7-K7", "--top-k 7", "Fig. 6")]}

CLAIMS = {
    "codiff": [
        Claim("CaVE guides better than a learnable prompt", DEFAULT, "learnable", "LPIPS 0.3426, 0.3471"),
        Claim("and better than none", DEFAULT, "empty", "LPIPS 0.3426, 0.3485"),
        Claim("dual learning is better than explicit", DEFAULT, "explicit", "LPIPS 0.3426, 0.3733"),
        Claim("and better than implicit", DEFAULT, "implicit", "LPIPS 0.3426, 0.3436"),
        Claim("DISTS brings back what L2 blurs", "l2-dists", "l2", "LPIPS 0.2109, 0.3976", "detail"),
        Claim("so does the GAN loss", "l2-gan", "l2", "LPIPS 0.3899, 0.3976", "detail"),
        Claim("and it adds to DISTS", DEFAULT, "l2-dists", "DISTS 0.1147, 0.1229", "detail")],
    "sodiff": [
        Claim("alignment with text guides better", DEFAULT, "no-align", "DISTS 0.0862, 0.1261"),
        Claim("a predicted timestep is better than a fixed one", DEFAULT, "fixed-t", "LPIPS 0.3124, 0.3779"),
        Claim("learning QF helps it", DEFAULT, "no-L_qf", "LPIPS 0.3124, 0.3270"),
        Claim("L_EA keeps edges", DEFAULT, "no-L_EA", "DISTS 0.1558, 0.2475", "detail"),
        Claim("the GAN loss adds texture", DEFAULT, "no-L_G", "MUSIQ 69.6, 58.1", "detail")],
    "oscar": [
        Claim("aligned representations restore better", DEFAULT, "no-alignment", "Fig. 7, curves"),
        Claim("a measured mapping is better than a random one", DEFAULT, "random-t", "Fig. 7, curves"),
        Claim("L_EA-DISTS brings detail", DEFAULT, "no-L_EA", "Fig. 7, curves", "detail"),
        Claim("so does the GAN loss", DEFAULT, "no-L_G", "Fig. 7, curves", "detail")],
    "moe_diffir": [
        Claim("prompts help", "moe", "none", "LIVE-1 29.02, 28.73 dB"),
        Claim("many are better than a single one", "multiple", "single", "28.98, 28.86 dB"),
        Claim("MoE-Prompt is better than their plain mixture", "moe", "multiple", "29.02, 28.98 dB"),
        Claim("the prior DP raises fidelity", "moe-dp", "moe", "29.07, 29.02 dB"),
        Claim("the adapter hardly changes it", "moe-v2t", "moe", "29.03, 29.02 dB"),
        Claim("one expert cannot model all tasks", DEFAULT, "N1-K1", "Fig. 6, curves")]}

# the choice that the page's second exercise tries, and what is expected: {condition: metrics}
JPEG = {"JPEG QF 5": ["PSNR", "SSIM", "detail"], "JPEG QF 10": ["PSNR", "SSIM", "detail"]}
EXERCISE = {"codiff": ("l2", JPEG), "sodiff": ("fixed-t", JPEG),
            "oscar": ("random-t", {f"OSCAR {bpp}": ["PSNR", "SSIM", "detail"]
                                   for bpp in ("0.0098", "0.0313", "0.1250")}),
            "moe_diffir": ("none", {"latent error": ["jpeg:5", "webp:5", "hevc:47", "vvc:47"]})}


# ------------------------------------------------------------------------------------------- running


@dataclass
class Job:
    script: str
    choice: str
    seed: int
    train: str
    eval: str


def jobs_of(script: str, seeds: int, only: list[str] | None, data: list[str], more: str) -> list[Job]:
    names = [c.name for c in CHOICES[script]]
    if unknown := [name for name in only or () if name not in names]:
        raise UserError(f"--only {' '.join(unknown)}: choose from {', '.join(names)}")
    measure = " ".join(["--data", *(Path(d).resolve().name for d in data), EVAL[script]]).strip()
    return [Job(script, c.name, seed, " ".join(f"--seed {seed} {c.flags} {more}".split()), measure)
            for seed in range(seeds) for c in CHOICES[script] if not only or c.name in only]


def commit(script: str) -> str:
    """The last commit that touched what a training depends on; 'unknown' without git."""
    files = [f"{script}.py", "common.py", "data/pictures.py", "data/files.py", "data/tiny-sd", "data/photos"]
    command = ["git", "-C", ROOT, "log", "-1", "--format=%h", "--", *files]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> str:
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{cpu[1] if cpu else platform.processor() or platform.machine()}, one thread"


def do(job: Job, folder: Path, data: list[str]) -> dict:
    """Trains and measures; a row of the json. What a kill left is gone on with."""
    log, begin = folder.parent / f"{folder.name}.log", time.time()
    script, env = str(ROOT / f"{job.script}.py"), os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*argv: str) -> None:
        with open(log, "a") as out:
            code = subprocess.run([sys.executable, script, *argv], stdout=out, stderr=out, env=env).returncode
        if code:
            last = log.read_text(errors="replace").replace("\r", "\n").strip().splitlines()[-1:]
            raise UserError(f"{job.choice}, seed {job.seed}: {''.join(last)} (see {log})")
    folder.parent.mkdir(parents=True, exist_ok=True)
    resumed = (folder / "config.json").exists()
    run("train", "--out", str(folder), *shlex.split(job.train), *(["--resume"] if resumed else []))
    seconds, bundled = time.time() - begin, figures(read_json(folder / "metrics.json"))
    run("eval", "--weights", str(folder), "--data", *data, *EVAL[job.script].split())
    measured = figures(read_json(folder / "metrics.json")) | {"D": discriminator(folder / "log.jsonl")}
    command = f"python {job.script}.py train {job.train}"
    return {**asdict(job), "command": command, "commit": commit(job.script), "machine": machine(),
            "seconds": None if resumed else round(seconds), "bundled": bundled,
            "figures": measured}


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
    more = {"rank correlation": metrics.get("predictor", {}).get("rank correlation"),  # SODiff's
            "latent error": metrics.get("latent_error")}  # MoE-DiffIR's
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


# ------------------------------------------------------------------------------------------- the page


def values(rows: list[dict], choice: str, column: tuple[str, str], where: str = "figures") -> list[float]:
    condition, metric = column
    return [r[where][condition][metric] for r in rows if r["choice"] == choice]


def differs(a: list[float], b: list[float]) -> bool | None:
    """Whether the means of two choices are further apart than two standard errors; None with one seed."""
    if min(len(a), len(b)) < 2:
        return None
    return abs(mean(a) - mean(b)) > 2 * (stdev(a) ** 2 / len(a) + stdev(b) ** 2 / len(b)) ** 0.5


def decimals(metric: str) -> int:
    return 2 if "PSNR" in metric else 3


def cell(own: list[float], default: list[float], metric: str) -> str:
    """Mean and deviation, the difference to the default; bold where seeds alone do not do that."""
    n = decimals(metric)
    text = f"{mean(own):.{n}f}" + (f" ± {stdev(own):.{n}f}" if len(own) > 1 else "")
    if own is default or not default:
        return text
    difference = f"{mean(own) - mean(default):+.{n}f}"
    return f"{text} (**{difference}**)" if differs(own, default) else f"{text} ({difference})"


def verdict(claim: Claim, rows: list[dict], condition: str) -> list[str]:
    a, b = (values(rows, name, (condition, claim.metric)) for name in (claim.better, claim.worse))
    if not a or not b:
        return [claim.says, claim.paper, "-", "not run"]
    apart, n = differs(a, b), decimals(claim.metric)
    if apart is None:
        said = "one seed: not known"
    else:
        said = "not told apart" if not apart else "**reproduced**" if mean(a) > mean(b) else "**reversed**"
    return [claim.says, claim.paper, f"{claim.metric} {mean(a):.{n}f}, {mean(b):.{n}f}", said]


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text_of(script: str, rows: list[dict]) -> str:
    columns, done = COLUMNS[script], {r["choice"] for r in rows}
    choices = [c for c in CHOICES[script] if c.name in done]
    default = {column: values(rows, DEFAULT, column) for column in columns}
    def line(choice):
        own = [default[c] if choice.name == DEFAULT else values(rows, choice.name, c) for c in columns]
        cells = [cell(v, default[c], c[1]) for c, v in zip(columns, own)]
        flags = f"`{choice.flags}`" if choice.flags else "**default**"
        return [f"{flags}: {choice.where}", *cells]
    table = markdown(["", *(f"{condition}: {metric}" for condition, metric in columns)], map(line, choices))
    condition = columns[0][0] if script != "oscar" else columns[-1][0]
    claims = markdown(["the paper says", "its figures", f"here, {condition}", ""],
                      (verdict(claim, rows, condition) for claim in CLAIMS[script]))
    seeds, seconds = len({r["seed"] for r in rows}), [r["seconds"] for r in rows if r["seconds"]]
    about = (f"{len(rows)} runs, {seeds} seeds; {', '.join(sorted({r['machine'] for r in rows}))}; "
             f"{', '.join(sorted({'commit ' + r['commit'] for r in rows}))}; ")
    about += f"{mean(seconds) / 60:.0f} minutes a training with two beside each other. " if seconds else ""
    about += ("Mean ± deviation over seeds (difference to the default; bold: over two standard errors). "
              "*Detail*: the luma's steps from pixel to pixel over the original's, 1 being as sharp.")
    return f"{about}\n\n{table}\n\n{claims}"


def expected(script: str, rows: list[dict]) -> str:
    """What the page's second exercise comes to: its choice and the default on the bundled photographs."""
    choice, columns = EXERCISE[script]
    def line(name, condition):
        found = {m: values(rows, name, (condition, m), "bundled") for m in columns[condition]}
        return [f"{name}: {condition}", *(cell(v, [], m) if v else "not run" for m, v in found.items())]
    table = markdown(["", *next(iter(columns.values()))],
                     (line(name, condition) for condition in columns for name in (DEFAULT, choice)))
    seeds = len({r["seed"] for r in rows if r["choice"] == choice})
    return f"On the bundled photographs, mean ± deviation of {seeds} seeds:\n\n{table}"


def write_page(script: str, path: Path, page: Path) -> None:
    rows, text = read_json(path), page.read_text()
    keys = {*Job.__dataclass_fields__, "commit", "machine", "seconds", "bundled", "figures"}
    if not isinstance(rows, list) or not all(isinstance(r, dict) and keys <= r.keys() for r in rows):
        raise UserError(f"{path}: not written by this version; move it away and run the ablations again")
    if old := {r["commit"] for r in rows} - {commit(script)}:
        note(f"{path}: runs of another commit ({', '.join(sorted(old))}); the code is at {commit(script)}")
    for name, new in (("ablations", text_of(script, rows)), ("expected", expected(script, rows))):
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise UserError(f"{page}: the comments {name!r}, between which figures go, are missing")
        head, rest = text.split(begin, 1)
        text = head + begin + new + end + rest.split(end, 1)[1]
    atomic(page, lambda tmp: tmp.write_text(text))


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
    p.add_argument("--json", type=Path, help="the figures (default: data/results/SCRIPT.json)")
    p.add_argument("--write", action="store_true", help="train nothing, write the page from the figures")
    args = p.parse_args(argv)
    path, failed = args.json or HERE / f"{args.script}.json", []
    if not args.write:
        jobs = jobs_of(args.script, args.seeds, args.only, args.data, args.flags)
        failed = run_all(jobs, args.data, args.out, args.processes, path)
    if path.exists():
        write_page(args.script, path, path.with_suffix(".md"))
    if failed:
        raise UserError(f"{len(failed)} of the runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    common.run_cli(main)
