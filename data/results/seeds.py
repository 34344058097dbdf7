"""What several seeds say: a paper's choices and claims, the rows of SCRIPT.json, and their cells in its page.

A row is a run: {"choice", "seed", "figures": {condition: {metric: value}}, ...}; a column of a table is a
pair (condition, metric)."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev

DEFAULT = "default"
SHIPS = "shipped"
TINY_LPIPS = "tiny LPIPS"  # no loss uses it
NAMED = {DEFAULT: "default run", SHIPS: "weights that ship"}

# what papers on JPEGs have in their tables, and in the exercise's
QF_5 = [("JPEG QF 5", metric) for metric in ("PSNR", "PSNR-B", "SSIM", TINY_LPIPS, "detail", "grid Y")]
QF_10 = [("JPEG QF 10", metric) for metric in ("PSNR", "SSIM", TINY_LPIPS, "grid Y")]
JPEG_LEAD = [("JPEG QF 5", metric) for metric in ("PSNR", TINY_LPIPS, "detail")]
JPEG_TABLE = [*QF_5, ("JPEG QF 5", "grid C"), *QF_10]
JPEG_EXERCISE = {f"JPEG QF {qf}": ["PSNR", "SSIM", TINY_LPIPS, "detail"] for qf in (5, 10)}


@dataclass
class Choice:
    name: str  # of its runs' folders, and in the table
    flags: str
    where: str = ""  # in the paper
    stage: int = 1  # the first that they change
    longer: int = 1  # stage 2's steps, times the run's
    paper_only: bool = False  # not in the miniature

    def words(self, script: str, at_paper_size: bool = False) -> str:
        """All flags of its `train`."""
        if self.longer == 1:
            return self.flags
        stage2 = importlib.import_module(script).Stage2
        steps = (stage2.paper() if at_paper_size else stage2()).steps
        return f"{self.flags} --s2-steps {self.longer * steps}"


@dataclass
class Claim:
    """That `better` beats `worse`, as the paper says and measures it; here by the column `metric` (of
    TINY_LPIPS less is better), under `condition`, or the paper's CONDITION. `but`: why the same sign here
    is no evidence."""
    says: str
    better: str
    worse: str
    paper: str
    metric: str = "PSNR"
    condition: str = ""
    but: str = ""


# ------------------------------------------------------------------------------------------- values


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


# -------------------------------------------------------------------------------------------- cells


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def decimals(metric: str) -> int:
    digits = {"bpp": 4, "LPIPS-Alex": 4, "LPIPS-VGG": 4, "DISTS": 4, "right": 2, "timestep": 1,
              "predicted QF": 1, "FID": 2, "t": 0}
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


def cell(rows: list[dict], choice: str, condition: str, metric: str, where: str = "figures") -> str:
    return number(values(rows, choice, (condition, metric), where), metric)


def signed(own: list[float]) -> str:
    return f"{mean(own):+.2f}" + (f" ± {stdev(own):.2f}" if len(own) > 1 else "")


# --------------------------------------------------- restored, between what must be beaten and the ceiling


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


def restored_table(rows: list[dict], columns: list[tuple[str, str]]) -> str:
    """The default run, and the weights that ship, between what a method must beat and what it can reach."""
    def line(label, choice, row=""):
        return [label, *(cell(rows, choice, condition + row, metric) for condition, metric in columns)]
    lines = [line("compressed", DEFAULT, ", compressed"),
             line("the same, blurred", DEFAULT, ", compressed, blurred"),
             line("VAE(compressed): the base alone", DEFAULT, ", VAE(compressed)"),
             line("**restored**, default run", DEFAULT), line("restored, weights that ship", SHIPS),
             line("VAE(original): the base's ceiling", DEFAULT, ", VAE(original)")]
    return markdown(["", *(f"{condition}: {metric}" for condition, metric in columns)], lines)


def gains_table(rows: list[dict], columns: list[tuple[str, str]]) -> str:
    """`gains` under each condition of the columns."""
    conditions = dict.fromkeys(condition for condition, _ in columns)
    closed = [[f"{condition}, {NAMED[choice]}", *gains(rows, choice, condition)]
              for condition in conditions for choice in NAMED if values(rows, choice, (condition, "PSNR"))]
    return markdown(["PSNR", "over the compressed", "over the same, blurred", "gap closed"], closed)


def restored_and_gains(rows: list[dict], columns: list[tuple[str, str]]) -> str:
    return f"{restored_table(rows, columns)}\n\n{gains_table(rows, columns)}"


def restored_headline(rows: list[dict], condition: str) -> list[str]:
    """Of JPEG at QF 5, which the paper's tables call `condition`."""
    def both(choice, row=""):
        return " / ".join(cell(rows, choice, condition + row, metric) for metric in ("PSNR", TINY_LPIPS))
    before = f"{both(DEFAULT, ', compressed')}, blurred {both(DEFAULT, ', compressed, blurred')}"
    made = (both(choice) for choice in NAMED)
    return ["JPEG QF 5, PSNR / tiny LPIPS", before, *made, gains(rows, DEFAULT, condition)[-1]]
