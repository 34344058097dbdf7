"""data/results/ablations.py and pages.py: what is run, what the tables say of it, and that the pages say the same."""

import importlib
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import ROOT, UserError
from data.results import ablations, pages
from data.results.pages import CHOICES, CLAIMS, COLUMNS, HERE, Claim, differs, verdict


@pytest.mark.parametrize("script, flags", [(s, c.flags) for s, choices in CHOICES.items() for c in choices])
def test_flags_are_the_scripts(script, flags, tmp_path):
    with pytest.raises(UserError, match="nowhere"):  # the flags have been read when the folder is looked for
        importlib.import_module(script).main(["train", *shlex.split(flags), "--data", str(tmp_path / "nowhere")])


@pytest.mark.parametrize("script", CHOICES)
def test_claims_compare_choices(script):
    names = [c.name for c in CHOICES[script]]
    assert len(set(names)) == len(names) and names[0] == pages.DEFAULT
    assert {name for claim in CLAIMS[script] for name in (claim.better, claim.worse)} <= set(names)


def rows_of(**values):
    """{choice: PSNR of seeds 0, 1, ...}"""
    return [{"choice": name, "seed": seed, "figures": {"QF": {"PSNR": v}}} for name, vs in values.items() for seed, v in enumerate(vs) if v is not None]


def test_differences_are_taken_seed_by_seed():
    rows = rows_of(a=[3.0, 5.0, None, 4.0], b=[2.5, None, 1.0, 4.5])
    assert pages.differences(rows, "a", "b", ("QF", "PSNR")) == [0.5, -0.5] and pages.differences(rows, "a", "c", ("QF", "PSNR")) == []


def test_apart_is_a_paired_t_test():
    """Three differences of deviation 1: beyond 4.303 standard errors of sqrt(1 / 3), Student's 97.5 % for two degrees of freedom."""
    for shift, apart in ((2.47, False), (2.50, True), (-2.50, True)):
        assert differs([shift - 1, shift, shift + 1]) == apart
    assert differs([1.0]) is None and differs([]) is None and differs([0.0, 0.0]) is False


def test_verdicts():
    def said(better, worse):
        return verdict(Claim("a is better", "a", "b", ""), rows_of(a=better, b=worse), "QF")[2:]
    assert said([3, 3.2, 3.1], [2, 2.2, 2.11]) == ["QF: PSNR 3.10 ± 0.10 (**+1.00**), 2.10 ± 0.10", "**reproduced**"]
    assert said([2, 2.2, 2.11], [3, 3.2, 3.1])[1] == "**reversed**"
    assert said([2, 4, 3], [1, 2.5, 3.5])[1] == "not told apart"
    assert said([2], [1])[1] == "one seed: not known" and said([], [1])[1] == "not run"


@pytest.fixture
def trainings(monkeypatch, tmp_path):
    """The commands run, in the place of running them: a training takes its seed for its PSNR, `--losses l2` fails."""
    commands = []

    def run(command, env=None, **_):
        if command[0] == "git":
            return SimpleNamespace(stdout="abc\n")
        commands.append(command[2:])
        assert env["OMP_NUM_THREADS"] == "1"
        if "l2" in command:
            return SimpleNamespace(returncode=1, stdout="no memory\n")
        if command[2] in ("profile", "figures"):
            return SimpleNamespace(returncode=0, stdout=f"{command[2]} says\nthis\n{tmp_path}/fig.png\n")
        out = Path(command[command.index("--out" if "train" in command else "--weights") + 1])
        out.mkdir(exist_ok=True)
        (out / "config.json").touch()
        (out / "log.jsonl").write_text('{"right": 0.2}\n{"right": 0.7}\n')
        row = {name: 20.0 + (int(out.name[-1]) if "train" in command or "-" in out.name else 0) for _, name in COLUMNS["codiff"]} | {"DISTS": None}
        beside = {name: {"PSNR": psnr} for name, psnr in (("compressed", 18), ("compressed, blurred", 19), ("VAE(compressed)", 20), ("VAE(original)", 30))}
        results = {condition: beside | {"restored": row} for condition in ("JPEG QF 1", "JPEG QF 5", "JPEG QF 10")}
        (out / "metrics.json").write_text(json.dumps({"results": results}))
        return SimpleNamespace(returncode=0, stdout="")
    monkeypatch.setattr(ablations.subprocess, "run", run)
    return commands


PAGE = "before\n" + "".join(f"<!-- {name} -->\nformer\n<!-- end of {name} -->\n" for name in ("default", "ablations", "expected")) + "after\n"


def test_every_run_is_done_once_and_one_that_fails_is_named(trainings, tmp_path):
    page = tmp_path / "codiff.md"
    page.write_text(PAGE)
    args = ["codiff", "--seeds", "2", "--only", "default", "l2", "--out", str(tmp_path / "runs"), "--results", str(tmp_path), "--data", str(tmp_path)]
    for trained, measured in ((4, 2), (6, 2)):  # the second time only what failed
        with pytest.raises(UserError, match="2 of the runs failed: .*l2, seed [01]: no memory"):
            ablations.main(args)
        assert [c[0] for c in trainings].count("train") == trained and [c[0] for c in trainings].count("eval") == measured
    rows = json.loads((tmp_path / "codiff.json").read_text())
    assert [(r["choice"], r["seed"], r["commit"], r["figures"]["D"]) for r in rows] == [("default", s, "abc", {"right": 0.7}) for s in (0, 1)]
    assert str(tmp_path) not in json.dumps(rows)  # nothing of the machine's folders
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "former" not in text
    assert "| 20.50 ± 0.71 |" in text and "| default: JPEG QF 10 | 20.50 ± 0.71 |" in text and "not run" in text and "commit abc" in text
    with pytest.raises(UserError, match="--only nothing: choose from default, learnable"):
        ablations.main(["codiff", "--only", "nothing"])


def test_what_changes_stage_2_alone_goes_on_from_the_defaults_stage_1(trainings, tmp_path):
    """(Should its flags reach stage 1 after all, the run refuses them: --resume: stage1... was ...)"""
    (tmp_path / "codiff.md").write_text(PAGE)
    default = tmp_path / "codiff" / "default-0"
    (default / "last").mkdir(parents=True)
    for name in ("config.json", "metrics.json", "last/stage1.safetensors", "last/stage2.safetensors"):
        (default / name).write_text("{}")
    ablations.main(["codiff", "--only", "l2-gan", "empty", "--seeds", "1", "--out", str(tmp_path), "--results", str(tmp_path)])
    resumed = {c[2][len(str(tmp_path)):]: "--resume" in c for c in trainings if c[0] == "train"}
    assert resumed == {"/codiff/l2-gan-0": True, "/codiff/empty-0": False}
    assert [p.name for p in (tmp_path / "codiff" / "l2-gan-0" / "last").iterdir()] == ["stage1.safetensors"]
    assert not (tmp_path / "codiff" / "empty-0" / "last").exists()
    assert all(r["seconds"] is not None for r in json.loads((tmp_path / "codiff.json").read_text()))


def test_the_weights_that_ship_are_measured_and_not_trained(trainings, tmp_path, monkeypatch):
    (tmp_path / "codiff.md").write_text(PAGE)
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(ablations, "SHIPPED", tmp_path / "runs")
    (tmp_path / "runs" / "codiff-shipped").mkdir(parents=True)
    ablations.main(["codiff", "--only", "default", "--seeds", "1", "--out", str(tmp_path / "runs"), "--results", str(tmp_path)])
    (tmp_path / "runs" / "codiff-shipped" / "metrics.json").write_text((tmp_path / "runs" / "codiff" / "default-0" / "metrics.json").read_text())
    ablations.main(["codiff", "--only", "shipped", "--out", str(tmp_path / "runs"), "--results", str(tmp_path)])
    assert [c[0] for c in trainings] == ["train", "eval", "eval"]
    assert "| restored, weights that ship | 20.00 |" in (tmp_path / "codiff.md").read_text()


def test_what_commands_print_comes_onto_the_page(trainings, tmp_path):
    (tmp_path / "codiff.md").write_text(PAGE + "".join(f"<!-- {name} -->\n\n<!-- end of {name} -->\n" for name in ("cost", "time", "figures")))
    for only in ("default", "printed"):
        ablations.main(["codiff", "--only", only, "--seeds", "1", "--out", str(tmp_path), "--results", str(tmp_path), "--data", str(tmp_path)])
    text = (tmp_path / "codiff.md").read_text()
    assert "```\nfigures says\nthis\n```" in text and "`python codiff.py profile --size 1024` (" in text and "20.00" in text
    assert [c for c in trainings if c[0] == "figures"] == [["figures", f"--weights={tmp_path}/codiff/default-0", "--data", str(tmp_path),
                                                             f"--against={tmp_path}/codiff/explicit-0"]]
    assert str(tmp_path) not in text


def test_figures_of_another_commit_or_version_are_named(trainings, tmp_path, capsys):
    page, path = tmp_path / "codiff.md", tmp_path / "codiff.json"
    page.write_text(PAGE)
    ablations.main(["codiff", "--seeds", "1", "--only", "default", "--out", str(tmp_path), "--results", str(tmp_path)])
    path.write_text(path.read_text().replace("abc", "def"))
    pages.main(["--results", str(tmp_path)])
    assert "another commit (def)" in capsys.readouterr().err
    for text, says in (("{}", "not written by this version"), ("[", "not readable as JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            pages.main(["--results", str(tmp_path)])
    page.write_text("no comments")
    path.write_text("[]")
    with pytest.raises(UserError, match="comments"):
        pages.main(["--results", str(tmp_path)])


@pytest.mark.parametrize("script", CHOICES)
def test_pages_say_what_the_figures_do(script):
    path = HERE / f"{script}.json"
    if path.exists():
        page = path.with_suffix(".md").read_text()
        for name, text in pages.blocks(script, json.loads(path.read_text())).items():
            assert f"<!-- {name} -->\n{text}\n<!-- end of {name} -->" in page


def test_the_readme_says_what_the_figures_do():
    figures = {script: json.loads(path.read_text()) for script in CHOICES if (path := HERE / f"{script}.json").exists()}
    if figures.keys() == CHOICES.keys():
        assert f"<!-- results -->\n{pages.summary(figures)}\n<!-- end of results -->" in (ROOT / "README.md").read_text()


def test_what_else_a_default_run_measures_stands_beside_the_weights_that_ship():
    rows = [{"choice": choice, "seed": seed, "commit": "", "machine": "", "seconds": None, "bundled": {}, "figures": {"rank correlation": {"tau": tau}}}
            for choice, seed, tau in ((pages.DEFAULT, 0, -0.5), (pages.DEFAULT, 1, -0.7), (pages.SHIPS, 0, -0.9))]
    table = pages.default_table("sodiff", rows)
    assert "| rank correlation with the true QF | tau |" in table and "predicted QF" not in table
    assert "| default run | -0.600 ± 0.141 |\n| weights that ship | -0.900 |" in table


def test_gains():
    """JPEG 20 dB, blurred 21, VAE(JPEG) 22, VAE(original) 32; restored 24 and 26."""
    rows = [{"choice": pages.DEFAULT, "figures": {"QF": {"PSNR": v}} | {f"QF, {name}": {"PSNR": x} for name, x in (
        ("compressed", 20.0), ("compressed, blurred", 21.0), ("VAE(compressed)", 22.0), ("VAE(original)", 32.0))}} for v in (24.0, 26.0)]
    assert pages.gains(rows, pages.DEFAULT, "QF") == ["+5.00 ± 1.41", "+4.00 ± 1.41", "30.0 %"]
    assert pages.gains(rows, pages.SHIPS, "QF") == ["-"] * 3
