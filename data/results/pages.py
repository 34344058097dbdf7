"""The tables of the result pages, from the figures of ablations.py: data/results/SCRIPT.json.

    python -m data.results.pages          # writes what stands between two comments, <!-- NAME --> and its end

A test compares pages and figures."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from data.files import ROOT, UserError, atomic, note, read_json
from data.results.figures import frozen
from data.results.seeds import (DEFAULT, NAMED, SHIPS, TINY_LPIPS, Claim, cell, differences, differs,
                                markdown, number, values)
from data.results.tables import HERE, ledger_table, paper, papers, plural
from data.runs import CommandLine, run_cli

# ------------------------------------------------------------------------------------------- figures


def commit(script: str) -> str:
    """The last commit that touched what a training depends on; 'unknown' without git."""
    files = [f"{script}.py", "common.py", *(f"data/{name}" for name in (
        "runs.py", "files.py", "pictures.py", "tiny-sd", "tiny-vgg", "tiny-clip", "tiny-alex", "photos"))]
    command = ["git", "-C", ROOT, "log", "-1", "--format=%h", "--", *files]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def figures_of(path: Path) -> list[dict]:
    """The rows of SCRIPT.json, one a run."""
    rows = read_json(path)
    keys = {"choice", "seed", "commit", "machine", "seconds", "bundled", "figures"}
    if not isinstance(rows, list) or not all(isinstance(r, dict) and keys <= r.keys() for r in rows):
        raise UserError(f"{path}: not written by this version; move it away and run the ablations again")
    now = commit(path.stem)
    if old := {r["commit"] for r in rows} - {now}:
        note(f"{path}: runs of another commit ({', '.join(sorted(old))}); the code is at {now}")
    return rows


# -------------------------------------------------------------------------------------------- blocks


def about(rows: list[dict], choices: Iterable[str]) -> str:
    own = [r for r in rows if r["choice"] in choices]
    trainings = [r for r in own if r["choice"] != SHIPS]
    seeds = len({r["seed"] for r in trainings})
    seconds = [r["seconds"] for r in trainings if r["choice"] == DEFAULT and r["seconds"]]
    where = ", ".join([*sorted({r["machine"] for r in own}), *sorted({f"commit {r['commit']}" for r in own})])
    text = f"{plural(len(trainings), 'training')}, {plural(seeds, 'seed')}; {where}"
    return f"{text}; {mean(seconds) / 60:.0f} minutes a default run." if seconds else f"{text}."


def folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def default_block(script: str, rows: list[dict]) -> str:
    """The columns that matter, more of what a default run measures ({title: {label: condition}}); all
    columns folded."""
    own = paper(script)
    tables = [own.lead_table(rows)]
    for title, conditions in own.MORE.items():
        named = [r["figures"] for r in rows if r["choice"] in NAMED]
        columns = next((figures[c] for figures in named for c in conditions.values() if c in figures), {})
        lines = [[f"{label}, {name}".removeprefix(", "),
                  *(number(values(rows, choice, (c, m)), c) for m in columns)]
                 for label, c in conditions.items() for choice, name in NAMED.items()]
        tables.append(markdown([title, *columns], (line for line in lines if set(line[1:]) - {"-"})))
    if right := values(rows, DEFAULT, ("D", "right")):
        tables.append(f"Over stage 2's second half the discriminator was right about "
                      f"{number(right, 'right')} of the latents; 0.5 would be chance.")
    tables.append(folded("All columns; seeds, machine, minutes",
                         f"{about(rows, NAMED)}\n\n{own.default_table(rows)}"))
    return "\n\n".join(tables)


def measured_block(row: dict) -> str:
    """Metrics before and after restoring by the weights that ship, a line a condition."""
    figures = row["figures"]
    after = {condition: metrics for condition, metrics in figures.items() if "," not in condition}
    columns = list(dict.fromkeys(m for metrics in after.values() for m in metrics))

    def cells(condition):
        pairs = ((figures[f"{condition}, compressed"].get(m), after[condition].get(m)) for m in columns)
        return (" → ".join("-" if v is None else number([v], m) for v in pair)
                for m, pair in zip(columns, pairs))
    table = markdown(["", *columns], ([condition, *cells(condition)] for condition in after))
    return f"`{row['command']}` ({row['machine']}, commit {row['commit']}), before → after:\n\n{table}"


def ablation_block(script: str, rows: list[dict]) -> str:
    """What the choices say of the paper's claims, then, folded, a row a choice."""
    own = paper(script)
    done = {r["choice"] for r in rows}

    def line(choice):
        words = choice.words(script)
        flags = f"`{words}`" if words else "**default**"
        cells = [f"{flags}: {choice.where}"]
        for column in own.COLUMNS:
            of_seeds = [] if choice.name == DEFAULT else differences(rows, choice.name, DEFAULT, column)
            cells.append(number(values(rows, choice.name, column), column[1], of_seeds))
        return cells
    table = markdown(["", *(f"{condition}: {metric}" for condition, metric in own.COLUMNS)],
                     (line(choice) for choice in own.CHOICES if choice.name in done))
    claims = markdown(["the paper says", "its figures", "here", ""],
                      (verdict(claim, rows, claim.condition or own.CONDITION) for claim in own.CLAIMS))
    legend = ("Mean ± deviation over seeds (mean difference of the first to the second, below of a row to "
              "the default, seed by seed; bold: seeds alone do that in less than one case of twenty, paired "
              "t-test).")
    table = folded("All choices, row by row", f"{about(rows, done - {SHIPS})}\n\n{table}")
    return f"{legend}\n\n{claims}\n\n{table}"


def verdict(claim: Claim, rows: list[dict], condition: str) -> list[str]:
    a, b = (values(rows, name, (condition, claim.metric)) for name in (claim.better, claim.worse))
    if not a or not b:
        return [claim.says, claim.paper, "-", "not run"]
    pairs = differences(rows, claim.better, claim.worse, (condition, claim.metric))
    apart = differs(pairs)
    if apart is None:
        said = "one seed: not known"
    else:
        same = f"same sign, but {claim.but}" if claim.but else "**reproduced**"
        for_it = mean(pairs) < 0 if claim.metric == TINY_LPIPS else mean(pairs) > 0
        said = "not told apart" if not apart else same if for_it else "**reversed**"
    here = f"{number(a, claim.metric, pairs)}, {number(b, claim.metric)}"
    return [claim.says, claim.paper, f"{condition}: {claim.metric} {here}", said]


def expected_block(script: str, rows: list[dict]) -> str:
    """What the page's second exercise comes to: its choice and the default on the bundled photographs."""
    choice, conditions = paper(script).EXERCISE
    lines = ([f"{name}: {condition}", *(cell(rows, name, condition, m, "bundled") for m in metrics)]
             for condition, metrics in conditions.items() for name in (DEFAULT, choice))
    table = markdown(["", *next(iter(conditions.values()))], lines)
    seeds = len({r["seed"] for r in rows if r["choice"] in (DEFAULT, choice)})
    return (f"On the bundled photographs, mean ± deviation of {seeds} seeds, of one thread each "
            f"(more threads round differently, which is much like another seed):\n\n{table}")


def ledger_block(script: str, row: dict) -> str:
    """The ledgers of a run, and what the paper freezes."""
    said = [f"Step 1 of each stage of `{row['command']}` ({row['machine']}, commit {row['commit']}):"]
    for stage, ledger in row["ledger"].items():
        (_, *groups), rows = ledger_table(ledger["norms"])
        said += [markdown([f"stage {stage}", *groups], rows), frozen(script, stage, ledger)]
    return "\n\n".join(said)


def blocks(script: str, rows: list[dict]) -> dict[str, str]:
    """{name: text}. What compares runs is left out, and stands on the page as it was, where these are not of
    one commit."""
    printed = [r for r in rows if "printed" in r]
    also = [r for r in rows if r["choice"] in paper(script).ALSO]
    trained = [r for r in rows if r not in printed + also]
    said = {r["choice"]: f"`{r['command']}` ({r['machine']}, commit {r['commit']}):\n\n"
                         f"```\n{r['printed']}\n```" for r in printed}
    said |= {r["choice"]: measured_block(r) for r in also}
    said["default"] = default_block(script, trained)
    said |= {"ledger": ledger_block(script, r) for r in trained if r.get("ledger") and r["seed"] == 0}
    compared = {"ablations": ({r["choice"] for r in trained} - {SHIPS}, ablation_block),
                "expected": ({DEFAULT, paper(script).EXERCISE[0]}, expected_block)}
    for name, (choices, block) in compared.items():
        if len({r["commit"] for r in trained if r["choice"] in choices}) < 2:
            said[name] = block(script, trained)
    return said


def summary(figures: dict[str, list[dict]]) -> str:
    """The README's table, a row a paper."""
    def line(script, rows):
        own = paper(script)
        seconds = [r["seconds"] for r in rows if r["choice"] == DEFAULT and r["seconds"]]
        minutes = f"{mean(seconds) / 60:.0f} min" if seconds else "-"
        return [f"[{own.TITLE}](data/results/{script}.md)", *own.headline(rows), minutes, own.COST]
    header = ["", "", "before", "after `train`", "weights that ship", "gap closed", "training, one thread",
              "parameters, MACs"]
    return markdown(header, (line(script, rows) for script, rows in figures.items()))


# --------------------------------------------------------------------------------------------- pages


def write(results: Path) -> None:
    """Puts the tables of every SCRIPT.json into SCRIPT.md beside it, if there is one; the README's once all
    are there."""
    paths = {script: results / f"{script}.json" for script in papers()}
    figures = {script: figures_of(path) for script, path in paths.items() if path.exists()}
    for script, rows in figures.items():
        if (page := results / f"{script}.md").exists():
            put(page, blocks(script, rows))
    if results == HERE and figures.keys() == paths.keys():
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
    p = CommandLine("pages", description="the result pages' tables, from their figures")
    p.add_argument("--results", type=Path, default=HERE, help="the folder of figures and pages")
    write(p.parse_args(argv).results)


if __name__ == "__main__":
    run_cli(main)
