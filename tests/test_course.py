"""data/course: the lesson runs, draws, and is red where the student writes; its README's figures are measured."""

import json
import re

import nbformat
import pytest
from nbclient import NotebookClient

from common import ROOT
COURSE = ROOT / "data" / "course"
README = (COURSE / "README.md").read_text()
LESSON = COURSE / "lesson.ipynb"
MISSING = 'raise NotImplementedError("this is what you write")'
# For a test: no download for the run's own table, one small picture, steps as few and small as may be.
QUICK = """import lpips
del lpips.LPIPS
out, s1, s2, more = {out!r}, 3, 2, "--val {picture} --s1-batch 2 --s2-batch 1 --s2-crop 64"
"""


def test_the_lesson_is_kept_without_outputs():
    cells = [cell for cell in json.loads(LESSON.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 9
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.fixture(scope="module")
def lesson(tmp_path_factory, photos):
    """{id: cell} of the executed lesson, from its own folder, and of cells that a student might add."""
    folder = tmp_path_factory.mktemp("lesson")
    notebook = nbformat.read(LESSON, as_version=4)
    ids = [cell.id for cell in notebook.cells]
    exercise = notebook.cells[ids.index("exercise")].source
    answer = (COURSE / "solutions" / "lesson.md").read_text().split("```python\n")[1].split("```")[0]
    picture = photos / "cat.png"
    added = {"quick": QUICK.format(out=str(folder / "run"), picture=picture),
             "wrong answer": exercise.replace(MISSING, "return z_L - (1 - alpha_bar) ** 0.5 * eps"),
             "answer": re.sub(rf"def eq_1.*?{re.escape(MISSING)}\n", answer, exercise, flags=re.S),
             "figures": f"%run codiff.py figures --weights {{out}} --data {picture}"}
    cells = [nbformat.v4.new_code_cell(source, metadata={"tags": ["raises-exception"]})
             for source in added.values()]
    for name, cell in zip(added, cells):
        cell["id"] = name.replace(" ", "-")
    notebook.cells.insert(ids.index("parameters") + 1, cells[0])
    notebook.cells += cells[1:]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(folder / name))
        patch.setenv("HF_HUB_OFFLINE", "1")
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(COURSE)}}).execute()
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell, stream="stdout") -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == stream)


def errors(cell) -> list[str]:
    return [f"{o.ename}: {o.evalue}" for o in cell.outputs if o.output_type == "error"]


def pictures(cell) -> int:
    return sum("image/png" in o.get("data", {}) for o in cell.outputs)


def test_the_lesson_runs_and_draws(lesson):
    assert "ready, in" in printed(lesson["setup"]) and "installing" not in printed(lesson["setup"])
    drawn = ("restore", "tokens", "wrong", "norms", "curves", "own")
    assert {k: pictures(lesson[k]) for k in drawn} == dict.fromkeys(drawn, 1)
    assert all(name in printed(lesson["trace"]) for name in ("c_L", "z_hat", "x_hq"))
    assert printed(lesson["own"]).startswith("JPEG QF 5, 1 images") and "restored" in printed(lesson["own"])
    red = ("exercise", "wrong-answer")
    assert not {k: errors(cell) for k, cell in lesson.items() if errors(cell) and k not in red}


def test_nothing_floods_and_nothing_warns(lesson):
    assert printed(lesson["train"], "stderr").count("stage2: ") < 5  # a bar's states
    assert max(len(cell.outputs) for cell in lesson.values()) < 12
    assert "Warning" not in "".join(printed(cell, "stderr") for cell in lesson.values())


def test_the_exercise_is_red_until_it_is_right(lesson):
    assert errors(lesson["exercise"]) == ["NotImplementedError: this is what you write"]
    assert errors(lesson["wrong-answer"]) == ["AssertionError: not Eq. 1: z_hat is wrong at t = 20"]
    assert "green" in printed(lesson["answer"]) and pictures(lesson["answer"]) == 1


def test_a_notebook_keeps_its_backend(lesson):
    """The figures of a command are shown as well as saved."""
    assert pictures(lesson["figures"]) == 3 and "fig7.png" in printed(lesson["figures"])


# ---- the README


def section(title: str) -> list[list[str]]:
    """The cells of its table."""
    text = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]


def test_two_pages():
    assert len(README.split()) <= 1000


def test_minutes_add_up():
    assert sum(int(minutes) for minutes, *_ in section("A lesson of 90 minutes")) == 90
    minutes = [int(row[-2]) for row in section("Three sessions")]
    assert [sum(minutes[a:b]) for a, b in ((0, 2), (2, 6), (6, 9))] == [90, 90, 90] and len(minutes) == 9


def test_numbers_are_the_measured_ones():
    rows = [row for row in json.loads((ROOT / "data" / "results" / "codiff.json").read_text())
            if row["choice"] == "default"]

    def ends(condition, metric, digits):
        values = [row["bundled"][condition][metric] for row in rows]
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
    compressed, blurred = (rows[0]["bundled"][f"JPEG QF 5, {row}"]["PSNR"]
                           for row in ("compressed", "compressed, blurred"))
    lpips = rows[0]["bundled"]["JPEG QF 5, compressed"]["tiny LPIPS"]
    minutes = [row["seconds"] / 60 for row in rows]
    said = section("Numbers to expect")
    assert [row[1] for row in said if "README" not in row[2]] == [
        f"{compressed:.2f}; {blurred:.2f} dB", f"{ends('JPEG QF 5', 'PSNR', 2)} dB",
        ends("JPEG QF 5", "tiny LPIPS", 3), f"{min(minutes):.1f} to {max(minutes):.1f} min"]
    assert f"{lpips:.3f}" in said[2][0] and len(rows) == 3 and "three seeds" in said[1][2]
    readme = (ROOT / "README.md").read_text()
    quoted = [part for row in said if "README" in row[2] for part in re.split(", | to | dB", row[1]) if part]
    assert len(quoted) == 5 and all(part in readme for part in quoted)


def test_messages_are_those_that_are_printed():
    code = [path.read_text() for path in (*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py"), LESSON)]
    code = [re.sub(r'"\s*f?"', "", re.sub(r"\{[^{}]*\}", "...", text)) for text in code]  # strings in parts
    messages = [row[0].strip("`") for row in section("What goes wrong")]
    assert len(messages) > 8
    for message in messages[1:-1]:  # the first is Python's, the last the exercises'
        parts = [part.strip(" .:;") for part in message.split("...")]
        assert any(all(part in text for part in parts) for text in code), message
    assert messages[-1].split(": ")[1] in MISSING
