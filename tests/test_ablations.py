"""data/results/ablations.py and pages.py: what is run, what tables say of it, that the pages say the same."""

import importlib
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import PHOTOS
from data.files import ROOT, UserError
from data.results import ablations, pages, seeds
from data.results.pages import verdict
from data.results.seeds import DEFAULT, SHIPS, Claim, differs
from data.results.tables import HERE, paper, papers


def test_every_script_is_measured():
    assert papers() == ["codiff", "moe_diffir", "oscar", "sodiff"]
    for name in ("evaluate", "complexity", "figures", "ablations", "pages", "quality", "seeds", "tables"):
        text = (HERE / f"{name}.py").read_text().lower()
        assert not [script for script in papers() if script in text], f"{name} knows one"


@pytest.mark.parametrize("script, flags", [(s, c.words(s)) for s in papers() for c in paper(s).CHOICES])
def test_flags_are_the_scripts(script, flags, tmp_path):
    args = ["train", *shlex.split(flags), "--data", str(tmp_path / "nowhere")]
    with pytest.raises(UserError, match="nowhere"):  # the flags have been read when the folder is looked for
        importlib.import_module(script).main(args)


@pytest.mark.parametrize("script", papers())
def test_claims_compare_choices(script):
    names = [c.name for c in paper(script).CHOICES]
    assert len(set(names)) == len(names) and names[0] == DEFAULT
    assert {name for claim in paper(script).CLAIMS for name in (claim.better, claim.worse)} <= set(names)
    assert {paper(script).AGAINST, paper(script).EXERCISE[0]} <= {*names, None}


def rows_of(**values):
    """{choice: PSNR and tiny LPIPS of seeds 0, 1, ...}"""
    return [{"choice": name, "seed": seed, "figures": {"QF": {"PSNR": v, seeds.TINY_LPIPS: v}}}
            for name, vs in values.items() for seed, v in enumerate(vs) if v is not None]


def test_differences_are_taken_seed_by_seed():
    rows = rows_of(a=[3.0, 5.0, None, 4.0], b=[2.5, None, 1.0, 4.5])
    assert seeds.differences(rows, "a", "b", ("QF", "PSNR")) == [0.5, -0.5]
    assert seeds.differences(rows, "a", "c", ("QF", "PSNR")) == []


def test_apart_is_a_paired_t_test():
    """Three differences of deviation 1: beyond 4.303 standard errors of sqrt(1 / 3), Student's 97.5 % for two
    degrees of freedom."""
    for shift, apart in ((2.47, False), (2.50, True), (-2.50, True)):
        assert differs([shift - 1, shift, shift + 1]) == apart
    assert differs([1.0]) is None and differs([]) is None and differs([0.0, 0.0]) is False


def test_verdicts():
    def said(better, worse, metric="PSNR"):
        return verdict(Claim("a is better", "a", "b", "", metric), rows_of(a=better, b=worse), "QF")[2:]
    told = ["QF: PSNR 3.10 ± 0.10 (**+1.00**), 2.10 ± 0.10", "**reproduced**"]
    assert said([3, 3.2, 3.1], [2, 2.2, 2.11]) == told
    assert said([2, 2.2, 2.11], [3, 3.2, 3.1])[1] == "**reversed**"
    assert said([2, 2.2, 2.11], [3, 3.2, 3.1], seeds.TINY_LPIPS)[1] == "**reproduced**"  # less is better
    assert said([2, 4, 3], [1, 2.5, 3.5])[1] == "not told apart"
    assert said([2], [1])[1] == "one seed: not known" and said([], [1])[1] == "not run"


@pytest.mark.parametrize("script", papers())
@pytest.mark.parametrize("size", [[], ["--paper", "--data", "my pieces", "LSDIR", "--val", "LIVE1"]])
def test_a_dry_run_prints_what_the_script_takes_and_runs_nothing(script, size, parsed, tmp_path, capsys):
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path)]
    ablations.main([script, *size, *folders, "--seeds", "2", "--dry-run"])
    read = [parsed(line) for line in capsys.readouterr().out.splitlines()]
    choices = [c.name for c in paper(script).CHOICES if size or not c.paper_only]
    assert len(read) == 2 * 2 * len(choices) and not [*tmp_path.iterdir()]
    names = [f"{name}-{seed}" for seed in (0, 1) for name in choices]
    trainings, measured = read[::2], read[1::2]
    assert [args.out.name for args in trainings] == [args.weights.name for args in measured] == names
    for args in trainings:
        assert args.paper == bool(size) and args.seed == int(args.out.name[-1])
        assert args.data == ([Path("my pieces"), Path("LSDIR")] if size else None)
    for args in measured:
        assert (args.metrics, args.data) == (("all", ["LIVE1"]) if size else ("basic", [str(PHOTOS / "val")]))


def test_steps_of_a_choice_are_relative_to_the_runs():
    long = next(c for c in paper("oscar").CHOICES if c.longer > 1)
    assert long.words("oscar") == "--no-alignment --s2-steps 480"
    assert long.words("oscar", at_paper_size=True) == "--no-alignment --s2-steps 200000"


@pytest.fixture
def trainings(monkeypatch, tmp_path):
    """The commands run, without running them: a training takes its seed for its PSNR, `--losses l2` fails."""
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
        value = 20.0 + (int(out.name[-1]) if "train" in command or "-" in out.name else 0)
        row = {name: value for _, name in paper("codiff").COLUMNS} | {"DISTS": None}
        beside = {"compressed": 18, "compressed, blurred": 19, "VAE(compressed)": 20, "VAE(original)": 30}
        results = {f"JPEG QF {qf}": {k: {"PSNR": v} for k, v in beside.items()} | {"restored": row}
                   for qf in (1, 5, 10)}
        (out / "metrics.json").write_text(json.dumps({"results": results}))
        return SimpleNamespace(returncode=0, stdout="")
    monkeypatch.setattr(ablations.subprocess, "run", run)
    return commands


def page(*names) -> str:
    return "".join(f"<!-- {name} -->\nformer\n<!-- end of {name} -->\n" for name in names)


PAGE = f"before\n{page('default', 'ablations', 'expected')}after\n"


def run(tmp_path, *args) -> None:
    """Seed 0 of codiff's runs, in tmp_path."""
    out = ["--out", tmp_path, "--results", tmp_path, "--seeds", 1]
    ablations.main(["codiff", *map(str, (*out, *args))])


def test_every_run_is_done_once_and_one_that_fails_is_named(trainings, tmp_path):
    (tmp_path / "codiff.md").write_text(PAGE)
    for trained, measured in ((4, 2), (6, 2)):  # the second time only what failed
        with pytest.raises(UserError, match="2 of the runs failed: .*l2, seed [01]: no memory"):
            run(tmp_path, "--seeds", 2, "--only", "default", "l2", "--data", tmp_path)
        commands = [c[0] for c in trainings]
        assert (commands.count("train"), commands.count("eval")) == (trained, measured)
    rows = json.loads((tmp_path / "codiff.json").read_text())
    assert [(r["choice"], r["seed"], r["commit"]) for r in rows] == [("default", s, "abc") for s in (0, 1)]
    assert all(r["figures"]["D"] == {"right": 0.7} for r in rows)
    assert str(tmp_path) not in json.dumps(rows)  # nothing of the machine's folders
    text = (tmp_path / "codiff.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "former" not in text
    for said in ("| 20.50 ± 0.71 |", "| default: JPEG QF 10 | 20.50 ± 0.71 |", "not run", "commit abc"):
        assert said in text
    with pytest.raises(UserError, match="--only nothing: choose from default, learnable"):
        run(tmp_path, "--only", "nothing")


def test_what_changes_stage_2_alone_goes_on_from_the_defaults_stage_1(trainings, tmp_path):
    """(Should its flags reach stage 1 after all, the run refuses them: --resume: stage1... was ...)"""
    (tmp_path / "codiff.md").write_text(PAGE)
    default = tmp_path / "codiff" / "default-0"
    (default / "last").mkdir(parents=True)
    for name in ("config.json", "metrics.json", "last/stage1.safetensors", "last/stage2.safetensors"):
        (default / name).write_text("{}")
    run(tmp_path, "--only", "l2-gan", "empty")
    resumed = {c[2][len(str(tmp_path)):]: "--resume" in c for c in trainings if c[0] == "train"}
    assert resumed == {"/codiff/l2-gan-0": True, "/codiff/empty-0": False}
    assert [p.name for p in (tmp_path / "codiff" / "l2-gan-0" / "last").iterdir()] == ["stage1.safetensors"]
    assert not (tmp_path / "codiff" / "empty-0" / "last").exists()
    assert all(r["seconds"] is not None for r in json.loads((tmp_path / "codiff.json").read_text()))


def test_at_paper_size_a_run_has_a_gpu_and_figures_are_kept_apart(trainings, tmp_path, monkeypatch, capsys):
    stub, gpus = ablations.subprocess.run, []

    def run_on(command, env=None, **options):
        gpus.append(env and env["CUDA_VISIBLE_DEVICES"])  # (git has none)
        return stub(command, env=env, **options)
    monkeypatch.setattr(ablations.subprocess, "run", run_on)
    monkeypatch.setattr(ablations.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(ablations.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    args = ["--paper", "--data", tmp_path, "--val", PHOTOS / "val", "--only", "default", "learnable"]
    with pytest.raises(UserError, match="there is no GPU here"):
        run(tmp_path, *args)
    monkeypatch.setattr(ablations.torch.cuda, "is_available", lambda: True)
    run(tmp_path, *args)
    assert {*gpus} == {None, "0", "1"} and sorted(c[0] for c in trainings) == ["eval"] * 2 + ["train"] * 2
    rows = json.loads((tmp_path / "codiff-paper.json").read_text())
    assert not (tmp_path / "codiff.json").exists() and {row["machine"] for row in rows} == {"a GPU"}
    assert rows[0]["command"] == f"python codiff.py train --paper --data {tmp_path.name} --seed 0"
    assert rows[0]["eval"] == "--data val --metrics all --qf 1 5 10 20"
    said = capsys.readouterr().out
    assert "\nJPEG QF 5\n" in said and "compressed" not in said and "\nlearnable  20.00" in said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert ablations.places(SimpleNamespace(paper=True, processes=1)) == [{"CUDA_VISIBLE_DEVICES": "6"}]
    refusals = {"--paper needs --data": ["--paper"], "--val goes with --paper": ["--val", tmp_path]}
    for says, words in refusals.items():
        with pytest.raises(UserError, match=says):
            run(tmp_path, *words)


def test_the_weights_that_ship_are_measured_and_not_trained(trainings, tmp_path, monkeypatch):
    (tmp_path / "codiff.md").write_text(PAGE)
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(ablations, "SHIPPED", tmp_path / "runs")
    shipped = tmp_path / "runs" / "codiff-shipped"
    shipped.mkdir(parents=True)
    run(tmp_path, "--only", "default")
    shutil.copy(tmp_path / "codiff" / "default-0" / "metrics.json", shipped)
    run(tmp_path, "--only", "shipped")
    assert [c[0] for c in trainings] == ["train", "eval", "eval"]
    assert "| restored, weights that ship | 20.00 |" in (tmp_path / "codiff.md").read_text()


def test_more_evals_of_the_weights_that_ship_have_a_block_each(trainings, tmp_path, monkeypatch):
    (tmp_path / "codiff.md").write_text(PAGE + page("double"))
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    monkeypatch.setattr(ablations, "SHIPPED", tmp_path / "runs")
    run(tmp_path, "--only", "default")
    (tmp_path / "runs" / "codiff").mkdir(parents=True)
    shutil.copytree(tmp_path / "codiff" / "default-0", tmp_path / "runs" / "codiff-shipped")
    before = (tmp_path / "codiff.md").read_text().split("<!-- double -->")
    run(tmp_path, "--only", "double")
    assert trainings[-1][:4] == ["eval", "--weights", str(tmp_path / "runs" / "codiff"), "--data"]
    assert trainings[-1][5:] == "--double 10 30 --qf 10 30 50 --shift 4".split()
    after = (tmp_path / "codiff.md").read_text().split("<!-- double -->")
    assert after[0] == before[0] and "| JPEG QF 5 | 18.00 → 20.00 |" in after[1]


def test_what_commands_print_comes_onto_the_page(trainings, tmp_path):
    (tmp_path / "codiff.md").write_text(PAGE + page("cost", "time", "figures"))
    for only in ("default", "printed"):
        run(tmp_path, "--only", only, "--data", tmp_path)
    text, folder = (tmp_path / "codiff.md").read_text(), tmp_path / "codiff"
    for said in ("```\nfigures says\nthis\n```", "`python codiff.py profile --size 1024` (", "20.00"):
        assert said in text
    drawn, = (c for c in trainings if c[0] == "figures")
    of = ["--data", str(tmp_path), f"--weights={folder}/default-0", f"--against={folder}/explicit-0"]
    assert drawn == ["figures", *of]
    assert str(tmp_path) not in text


def test_a_default_runs_ledger_comes_onto_the_page(trainings, tmp_path):
    (tmp_path / "codiff.md").write_text(PAGE + page("ledger"))
    ledger = {"norms": {"gan_g": {"G.proj": 0.00123456, "D.head": 0.0}}, "frozen": ["G.cave"]}
    (folder := tmp_path / "codiff" / "default-0").mkdir(parents=True)
    (folder / "ledger-stage2.json").write_text(json.dumps(ledger))
    run(tmp_path, "--only", "default")
    assert json.loads((tmp_path / "codiff.json").read_text())[0]["ledger"] == {"2": ledger}
    text = (tmp_path / "codiff.md").read_text().split("<!-- ledger -->")[1]
    for said in ("`python codiff.py train --seed 0` (", "| stage 2 | G.proj | D.head |\n| --- | --- | --- |\n"
                 "| gan_g | 0.00123 | 0 |\n", "Without gradient here: G.cave. Frozen in the paper: CaVE"):
        assert said in text


def test_figures_of_another_commit_or_version_are_named(trainings, tmp_path, capsys):
    path = tmp_path / "codiff.json"
    (tmp_path / "codiff.md").write_text(PAGE)
    run(tmp_path, "--only", "default")
    path.write_text(path.read_text().replace("abc", "def"))
    pages.main(["--results", str(tmp_path)])
    assert "another commit (def)" in capsys.readouterr().err
    for text, says in (("{}", "not written by this version"), ("[", "not readable as JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            pages.main(["--results", str(tmp_path)])
    (tmp_path / "codiff.md").write_text("no comments")
    path.write_text("[]")
    with pytest.raises(UserError, match="comments"):
        pages.main(["--results", str(tmp_path)])


@pytest.mark.parametrize("script", papers())
def test_pages_say_what_the_figures_do(script):
    path = HERE / f"{script}.json"
    if path.exists():
        page = path.with_suffix(".md").read_text()
        for name, text in pages.blocks(script, json.loads(path.read_text())).items():
            assert f"<!-- {name} -->\n{text}\n<!-- end of {name} -->" in page


@pytest.mark.parametrize("script", papers())
def test_a_page_leads_with_few_columns(script):
    rows = json.loads((HERE / f"{script}.json").read_text())
    lead, folded = pages.default_block(script, rows).split("<details>")
    assert lead.splitlines()[0].count(" | ") <= 4 < paper(script).default_table(rows).splitlines()[0].count(" | ")
    assert paper(script).default_table(rows) in folded and folded.endswith("</details>")


def test_runs_of_two_commits_are_not_compared():
    row = {"machine": "", "seconds": None, "bundled": {}, "figures": {}, "seed": 0}
    rows = [row | {"choice": choice, "commit": "abc"} for choice in (DEFAULT, "random-t", "no-alignment")]
    assert {"default", "ablations", "expected"} == pages.blocks("oscar", rows).keys()
    assert {"default", "expected"} == pages.blocks("oscar", [*rows[:2], rows[2] | {"commit": "def"}]).keys()
    assert {"default"} == pages.blocks("oscar", [rows[0] | {"commit": "def"}, *rows[1:]]).keys()


def test_the_readme_says_what_the_figures_do():
    paths = {script: HERE / f"{script}.json" for script in papers()}
    if all(path.exists() for path in paths.values()):
        table = pages.summary({script: json.loads(path.read_text()) for script, path in paths.items()})
        assert f"<!-- results -->\n{table}\n<!-- end of results -->" in (ROOT / "README.md").read_text()


def test_what_else_a_default_run_measures_stands_beside_the_weights_that_ship():
    other = {"commit": "", "machine": "", "seconds": None, "bundled": {}}
    rows = [other | {"choice": choice, "seed": seed, "figures": {"rank correlation": {"tau": tau}}}
            for choice, seed, tau in ((DEFAULT, 0, -0.5), (DEFAULT, 1, -0.7), (SHIPS, 0, -0.9))]
    table = pages.default_block("sodiff", rows)
    assert "| rank correlation with the true QF | tau |" in table and "predicted QF" not in table
    assert "| default run | -0.600 ± 0.141 |\n| weights that ship | -0.900 |" in table


def test_gains():
    """JPEG 20 dB, blurred 21, VAE(JPEG) 22, VAE(original) 32; restored 24 and 26."""
    beside = {"compressed": 20.0, "compressed, blurred": 21.0, "VAE(compressed)": 22.0, "VAE(original)": 32.0}
    figures = {f"QF, {name}": {"PSNR": v} for name, v in beside.items()}
    rows = [{"choice": DEFAULT, "figures": figures | {"QF": {"PSNR": v}}} for v in (24.0, 26.0)]
    assert seeds.gains(rows, DEFAULT, "QF") == ["+5.00 ± 1.41", "+4.00 ± 1.41", "30.0 %"]
    assert seeds.gains(rows, SHIPS, "QF") == ["-"] * 3
