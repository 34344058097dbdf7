"""The tables of the result pages, from the figures of ablations.py: data/results/SCRIPT.json.

    python -m data.results.pages          # writes what stands between two comments, <!-- NAME --> and its end

A test compares pages and figures."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import common
from common import ROOT, UserError, note, read_json
from data.files import atomic

HERE, DEFAULT, SHIPS = Path(__file__).parent, "default", "shipped"


@dataclass
class Choice:
    name: str  # of its runs' folders, and in the table
    flags: str
    where: str = ""  # in the paper
    stage: int = 1  # the first that they change


@dataclass
class Claim:
    """That `better` beats `worse`, as the paper says and measures it; here by the column `metric`, under
    `condition` if not under the table's first (OSCAR's last)."""
    says: str
    better: str
    worse: str
    paper: str
    metric: str = "PSNR"
    condition: str = ""


# of the tables: (condition, metric)
QF_5 = [("JPEG QF 5", metric) for metric in ("PSNR", "PSNR-B", "SSIM", "detail", "grid Y")]
TASKS = ("jpeg:5", "webp:5", "hevc:47", "vvc:47", "vvc:52", "avc:47")
COLUMNS = {"codiff": [("JPEG QF 1", "PSNR"), *QF_5], "sodiff": QF_5,
           "oscar": [(f"OSCAR {bpp}", metric) for bpp in ("0.0313", "0.1250")
                     for metric in ("PSNR", "SSIM", "detail")],
           "moe_diffir": [(task, "PSNR") for task in TASKS[:4]]}
TABLE = [*QF_5, ("JPEG QF 5", "grid C"), *(("JPEG QF 10", metric) for metric in ("PSNR", "SSIM", "grid Y"))]

CHOICES = {
    "codiff": [
        Choice(DEFAULT, "", "CaVE, dual learning, all losses"),
        Choice("learnable", "--prompt learnable", "Table 3"), Choice("empty", "--prompt empty", "Table 3"),
        Choice("explicit", "--learning explicit", "Table 4"),
        Choice("implicit", "--learning implicit", "Table 4"),
        Choice("l2", "--losses l2", "Table 5", 2), Choice("l2-dists", "--losses l2,dists", "Table 5", 2),
        Choice("l2-gan", "--losses l2,gan", "Table 5", 2)],
    "sodiff": [
        Choice(DEFAULT, "", "SAIPE, timestep predictor, all losses"),
        Choice("no-align", "--lambda-align 0", "Table 2"),
        Choice("fixed-t", "--timestep fixed", "Table 3", 2),
        Choice("no-L_qf", "--beta 0", "Table 3", 2), Choice("no-L_EA", "--losses mse,gan", "Table 4", 2),
        Choice("no-L_G", "--losses mse,ea", "Table 4", 2)],
    "oscar": [
        Choice(DEFAULT, "", "alignment, measured mapping, all losses"),
        Choice("no-alignment", "--no-alignment", "Fig. 7"),
        Choice("no-alignment-long", "--no-alignment --s2-steps 480", "as long as both stages"),
        Choice("random-t", "--mapping random", "Fig. 7", 2),
        Choice("no-L_EA", "--losses mse,dists,gan", "Fig. 7", 2),
        Choice("no-L_G", "--losses mse,ea,dists", "Fig. 7", 2)],
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
        Claim("DISTS brings back what L2 blurs", "l2-dists", "l2", "LPIPS 0.2109, 0.3976", "detail",
              "JPEG QF 5"),
        Claim("so does the GAN loss", "l2-gan", "l2", "LPIPS 0.3899, 0.3976", "detail", "JPEG QF 5"),
        Claim("and it adds to DISTS", DEFAULT, "l2-dists", "DISTS 0.1147, 0.1229", "detail",
              "JPEG QF 5")],
    "sodiff": [
        Claim("alignment with text guides better", DEFAULT, "no-align", "DISTS 0.0862, 0.1261"),
        Claim("a predicted timestep is better than a fixed one", DEFAULT, "fixed-t", "LPIPS 0.3124, 0.3779"),
        Claim("learning QF helps it", DEFAULT, "no-L_qf", "LPIPS 0.3124, 0.3270"),
        Claim("L_EA keeps edges", DEFAULT, "no-L_EA", "DISTS 0.1558, 0.2475", "detail"),
        Claim("the GAN loss adds texture", DEFAULT, "no-L_G", "MUSIQ 69.6, 58.1", "detail")],
    "oscar": [
        Claim("aligned representations restore better", DEFAULT, "no-alignment", "Fig. 7, curves"),
        Claim("also where stage 2 gets stage 1's time", DEFAULT, "no-alignment-long", "our check"),
        Claim("a measured mapping is better than a random one", DEFAULT, "random-t", "Fig. 7, curves"),
        Claim("L_EA-DISTS brings detail", DEFAULT, "no-L_EA", "Fig. 7, curves", "detail"),
        Claim("so does the GAN loss", DEFAULT, "no-L_G", "Fig. 7, curves", "detail")],
    "moe_diffir": [
        Claim("prompts help", "moe", "none", "LIVE-1 29.02, 28.73 dB"),
        Claim("many are better than a single one", "multiple", "single", "28.98, 28.86 dB"),
        Claim("MoE-Prompt is better than their plain mixture", "moe", "multiple", "29.02, 28.98 dB"),
        Claim("the prior DP raises fidelity", "moe-dp", "moe", "29.07, 29.02 dB"),
        Claim("the adapter brings detail", "moe-v2t", "moe", "LPIPS 0.1145, 0.1179", "detail"),
        Claim("one expert cannot model all tasks", DEFAULT, "N1-K1", "Fig. 6a, curves"),
        Claim("fourteen are harder to train than seven", DEFAULT, "N14-K3", "Fig. 6a, curves"),
        Claim("choosing one instead of three raises PSNR", "N7-K1", DEFAULT, "Fig. 6b, curves")]}

# commands whose words stand on the page: {name of the block: command}
PRINTED = {script: {"cost": f"profile --paper --size {size} --no-time", "time": f"profile --size {size}"}
           for script, size in (("codiff", "1024"), ("sodiff", "1024"), ("oscar", "768x512"),
                                ("moe_diffir", "1024"))}
PRINTED["codiff"]["figures"] = PRINTED["oscar"]["figures"] = "figures"

# more of what a default run measures: {title: {label: condition}}
MORE = {"codiff": {},
        "moe_diffir": {"": {"latent error, one step": "latent error"},
                       "what the router's choice tells of the codec": {"excess bits": "router"}},
        "sodiff": {"true QF": {"predicted QF": "predicted QF", "timestep": "timestep"},
                   "rank correlation with the true QF": {"": "rank correlation"}},
        "oscar": {"bpp": {"F_sim(r)": "cosine", "t(r)": "t"}}}

# of the README's table: parameters and MACs of the paper's size at 1024 x 1024, as `profile` counts them
COST = {"codiff": "0.996 G, 9.46 T", "sodiff": "0.980 G, 8.94 T", "oscar": "0.977 G, 8.60 T",
        "moe_diffir": "1.838 G, 12.5 T (1 step)"}
TITLES = {"codiff": "CODiff", "sodiff": "SODiff", "oscar": "OSCAR", "moe_diffir": "MoE-DiffIR"}
NAMED = {DEFAULT: "default run", SHIPS: "weights that ship"}

# the choice that the page's second exercise tries, and what is expected: {condition: metrics}
JPEG = {f"JPEG QF {qf}": ["PSNR", "SSIM", "detail"] for qf in (5, 10)}
EXERCISE = {"codiff": ("l2", JPEG), "sodiff": ("fixed-t", JPEG),
            "oscar": ("random-t", {f"OSCAR {bpp}": ["PSNR", "SSIM", "detail"]
                                   for bpp in ("0.0098", "0.0313", "0.0625", "0.1250")}),
            "moe_diffir": ("none", {"latent error": ["jpeg:5", "webp:5", "hevc:47", "vvc:47"]})}

# ------------------------------------------------------------------------------------------- figures


def commit(script: str) -> str:
    """The last commit that touched what a training depends on; 'unknown' without git."""
    files = [f"{script}.py", "common.py", "data/pictures.py", "data/files.py", "data/tiny-sd", "data/photos"]
    command = ["git", "-C", ROOT, "log", "-1", "--format=%h", "--", *files]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def figures_of(path: Path) -> list[dict]:
    """The rows of SCRIPT.json, one a run."""
    rows, script = read_json(path), path.stem
    keys = {"choice", "seed", "commit", "machine", "seconds", "bundled", "figures"}
    if not isinstance(rows, list) or not all(isinstance(r, dict) and keys <= r.keys() for r in rows):
        raise UserError(f"{path}: not written by this version; move it away and run the ablations again")
    if old := {r["commit"] for r in rows} - {commit(script)}:
        note(f"{path}: runs of another commit ({', '.join(sorted(old))}); the code is at {commit(script)}")
    return rows


def values(rows: list[dict], choice: str, column: tuple[str, str], where: str = "figures") -> list[float]:
    """A metric under a condition, of every seed of a choice; none if it has not been run."""
    condition, metric = column
    own = [r[where].get(condition, {}).get(metric) for r in rows if r["choice"] == choice]
    return [v for v in own if v is not None]


def differences(rows: list[dict], choice: str, other: str, column: tuple[str, str]) -> list[float]:
    """A choice's metric less another's, seed by seed: of the same crops and first weights."""
    one, two = ({r["seed"]: values([r], name, column) for r in rows if r["choice"] == name}
                for name in (choice, other))
    return [one[seed][0] - two[seed][0] for seed in one if one[seed] and two.get(seed)]


def differs(differences: list[float]) -> bool | None:
    """Whether seeds alone do that in less than one case of twenty (paired t-test); None with one seed."""
    from scipy.stats import ttest_1samp
    return None if len(differences) < 2 else bool(ttest_1samp(differences, 0).pvalue < 0.05)


# -------------------------------------------------------------------------------------------- tables


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def decimals(metric: str) -> int:
    digits = {"bpp": 4, "right": 2, "timestep": 1, "predicted QF": 1, "t": 0}
    return 2 if "PSNR" in metric or "grid" in metric else digits.get(metric, 3)


def number(own: list[float], metric: str, differences: list[float] | None = None) -> str:
    """Mean and deviation; then, if given, the mean difference, bold where seeds alone do not do that."""
    if not own:
        return "-"
    n = decimals(metric)
    text = f"{mean(own):.{n}f}" + (f" ± {stdev(own):.{n}f}" if len(own) > 1 and stdev(own) else "")
    if not differences:
        return text
    difference = f"{mean(differences):+.{n}f}"
    return f"{text} (**{difference}**)" if differs(differences) else f"{text} ({difference})"


def default_table(script: str, rows: list[dict]) -> str:
    """The default run, and the weights that ship, between what a method must beat and what it can reach."""
    columns = [(task, "PSNR") for task in TASKS] if script == "moe_diffir" else TABLE
    def line(label, choice, row=""):
        cells = [number(values(rows, choice, (condition + row, m)), m) for condition, m in columns]
        return [label, *cells]
    if script == "oscar":
        conditions = dict.fromkeys(c for r in rows for c, v in r["figures"].items() if "PSNR" in v)
        metrics = ("bpp", "PSNR", "SSIM", "detail")
        lines = [[c, *(number(values(rows, DEFAULT, (c, m)), m) for m in metrics),
                  *(number(values(rows, SHIPS, (c, m)), m) for m in metrics[1:] if c.startswith("OSCAR"))]
                 for c in conditions]
        header = ["", "true bpp", *metrics[1:], *(f"shipped: {m}" for m in metrics[1:])]
        table = markdown(header, (cells + [""] * (len(header) - len(cells)) for cells in lines))
    else:
        lines = [line("compressed", DEFAULT, ", compressed"),
                 line("the same, blurred", DEFAULT, ", compressed, blurred"),
                 line("VAE(compressed): the base alone", DEFAULT, ", VAE(compressed)"),
                 line("**restored**, default run", DEFAULT), line("restored, weights that ship", SHIPS),
                 line("VAE(original): the base's ceiling", DEFAULT, ", VAE(original)")]
        table = markdown(["", *(f"{condition}: {m}" for condition, m in columns)], lines)
        table += "\n\n" + gains_table(script, rows)
    for title, conditions in MORE[script].items():
        own = [r["figures"] for r in rows if r["choice"] in NAMED]
        columns = next((figures[c] for figures in own for c in conditions.values() if c in figures), {})
        cells = {(label, choice): [number(values(rows, choice, (c, m)), c) for m in columns]
                 for label, c in conditions.items() for choice in NAMED}
        lines = ([f"{label}, {NAMED[choice]}".removeprefix(", "), *line]
                 for (label, choice), line in cells.items() if set(line) - {"-"})
        table += "\n\n" + markdown([title, *columns], lines)
    if right := values(rows, DEFAULT, ("D", "right")):
        table += (f"\n\nOver stage 2's second half the discriminator was right about "
                  f"{number(right, 'right')} of the latents; 0.5 would be chance.")
    return f"{about(rows, (DEFAULT, SHIPS))}\n\n{table}"


def gains(rows: list[dict], choice: str, condition: str) -> list[str]:
    """PSNR over the compressed picture and over it blurred; how much of the way from what the VAE makes of
    the compressed picture to what it makes of the original restoring goes."""
    beside = (", compressed", ", compressed, blurred", ", VAE(compressed)", ", VAE(original)")
    own = values(rows, choice, (condition, "PSNR"))
    if not own:
        return ["-"] * 3
    jpeg, blurred, low, high = (mean(values(rows, choice, (condition + row, "PSNR"))) for row in beside)
    closed = [100 * (v - low) / (high - low) for v in own]
    return [signed([v - jpeg for v in own]), signed([v - blurred for v in own]), f"{mean(closed):.1f} %"]


def signed(own: list[float]) -> str:
    return f"{mean(own):+.2f}" + (f" ± {stdev(own):.2f}" if len(own) > 1 else "")


def gains_table(script: str, rows: list[dict]) -> str:
    conditions = TASKS if script == "moe_diffir" else dict.fromkeys(condition for condition, _ in TABLE)
    lines = [[f"{condition}, {NAMED[choice]}", *gains(rows, choice, condition)]
             for condition in conditions for choice in NAMED if values(rows, choice, (condition, "PSNR"))]
    return markdown(["PSNR", "over the compressed", "over the same, blurred", "gap closed"], lines)


def summary(figures: dict[str, list[dict]]) -> str:
    """The README's table, a row a paper."""
    def line(script, rows):
        def psnr(choice, condition):
            return number(values(rows, choice, (condition, "PSNR")), "PSNR")
        here = f"[{TITLES[script]}](data/results/{script}.md)"
        seconds = [r["seconds"] for r in rows if r["choice"] == DEFAULT and r["seconds"]]
        minutes = f"{mean(seconds) / 60:.0f} min" if seconds else "-"
        if script == "oscar":
            conditions = [f"OSCAR {bpp}" for bpp in ("0.0313", "0.1250")]
            what = "PSNR at 0.0313 and 0.1250 bpp"
            made = [" and ".join(psnr(choice, c) for c in conditions) for choice in NAMED]
            beside, closed = f"JPEG's lowest: {psnr(DEFAULT, 'JPEG, quality 1')}", "-"
        else:
            condition = "jpeg:5" if script == "moe_diffir" else "JPEG QF 5"
            what, closed = "JPEG QF 5, PSNR", gains(rows, DEFAULT, condition)[-1]
            made = [psnr(choice, condition) for choice in NAMED]
            beside = (f"{psnr(DEFAULT, condition + ', compressed')}, "
                      f"blurred {psnr(DEFAULT, condition + ', compressed, blurred')}")
        return [here, what, beside, *made, closed, minutes, COST[script]]
    header = ["", "", "before", "after `train`", "weights that ship", "gap closed", "training, one thread",
              "parameters, MACs"]
    return markdown(header, (line(script, rows) for script, rows in figures.items()))


def about(rows: list[dict], choices: Iterable[str]) -> str:
    own = [r for r in rows if r["choice"] in choices]
    seeds, seconds = len({r["seed"] for r in own}), [r["seconds"] for r in own if r["seconds"]]
    where = ", ".join([*sorted({r["machine"] for r in own}), *sorted({f"commit {r['commit']}" for r in own})])
    text = f"{len(own)} runs, {seeds} seed{'s' * (seeds > 1)}; {where}"
    if not seconds:
        return f"{text}."
    return f"{text}; {mean(seconds) / 60:.0f} minutes a training, {sum(seconds) / 3600:.1f} hours in all."


def ablation_tables(script: str, rows: list[dict]) -> str:
    """A row a choice, then what they say of the paper's claims."""
    columns, done = COLUMNS[script], {r["choice"] for r in rows}
    choices = [c for c in CHOICES[script] if c.name in done]
    def line(choice):
        own = [values(rows, choice.name, column) for column in columns]
        default = [None if choice.name == DEFAULT else differences(rows, choice.name, DEFAULT, column)
                   for column in columns]
        flags = f"`{choice.flags}`" if choice.flags else "**default**"
        return [f"{flags}: {choice.where}", *(number(v, c[1], d) for v, c, d in zip(own, columns, default))]
    table = markdown(["", *(f"{condition}: {metric}" for condition, metric in columns)], map(line, choices))
    usual = columns[-1 if script == "oscar" else 0][0]
    claims = markdown(["the paper says", "its figures", "here", ""],
                      (verdict(claim, rows, claim.condition or usual) for claim in CLAIMS[script]))
    legend = ("Mean ± deviation over seeds (mean difference to the default of the same seed; bold: seeds "
              "alone do that in less than one case of twenty, paired t-test). *Detail*: luma's steps from "
              "pixel to pixel over the original's, 1 being as sharp.")
    return f"{about(rows, done - {SHIPS})} {legend}\n\n{table}\n\n{claims}"


def verdict(claim: Claim, rows: list[dict], condition: str) -> list[str]:
    a, b = (values(rows, name, (condition, claim.metric)) for name in (claim.better, claim.worse))
    if not a or not b:
        return [claim.says, claim.paper, "-", "not run"]
    pairs = differences(rows, claim.better, claim.worse, (condition, claim.metric))
    apart, one, two = differs(pairs), number(a, claim.metric, pairs), number(b, claim.metric)
    if apart is None:
        said = "one seed: not known"
    else:
        said = "not told apart" if not apart else "**reproduced**" if mean(pairs) > 0 else "**reversed**"
    return [claim.says, claim.paper, f"{condition}: {claim.metric} {one}, {two}", said]


def expected(script: str, rows: list[dict]) -> str:
    """What the page's second exercise comes to: its choice and the default on the bundled photographs."""
    choice, columns = EXERCISE[script]
    def line(name, condition):
        found = (number(values(rows, name, (condition, m), "bundled"), m) for m in columns[condition])
        return [f"{name}: {condition}", *found]
    table = markdown(["", *next(iter(columns.values()))],
                     (line(name, condition) for condition in columns for name in (DEFAULT, choice)))
    seeds = len({r["seed"] for r in rows if r["choice"] in (DEFAULT, choice)})
    return (f"On the bundled photographs, mean ± deviation of {seeds} seeds, of one thread each "
            f"(more threads round differently, which is much like another seed):\n\n{table}")


def blocks(script: str, rows: list[dict]) -> dict[str, str]:
    printed = [r for r in rows if "printed" in r]
    said = {r["choice"]: f"`{r['command']}` ({r['machine']}, commit {r['commit']}):\n\n"
                         f"```\n{r['printed']}\n```" for r in printed}
    trained = [r for r in rows if r not in printed]
    return said | {"default": default_table(script, trained), "ablations": ablation_tables(script, trained),
                   "expected": expected(script, trained)}


def write(results: Path) -> None:
    """Puts the tables of every SCRIPT.json into SCRIPT.md beside it; the README's once all four are there."""
    paths = {script: results / f"{script}.json" for script in CHOICES}
    figures = {script: figures_of(path) for script, path in paths.items() if path.exists()}
    for script, rows in figures.items():
        put(results / f"{script}.md", blocks(script, rows))
    if results == HERE and figures.keys() == CHOICES.keys():
        put(ROOT / "README.md", {"results": summary(figures)})


def put(page: Path, new_blocks: dict[str, str]) -> None:
    text = page.read_text()
    for name, new in new_blocks.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise UserError(f"{page}: the comments {name!r}, between which figures go, are missing")
        head, rest = text.split(begin, 1)
        text = head + begin + new + end + rest.split(end, 1)[1]
    atomic(page, lambda tmp: tmp.write_text(text))


def main(argv: list[str] | None = None) -> None:
    p = common.CommandLine("pages", description="the result pages' tables, from their figures")
    p.add_argument("--results", type=Path, default=HERE, help="the folder of figures and pages")
    write(p.parse_args(argv).results)


if __name__ == "__main__":
    common.run_cli(main)
