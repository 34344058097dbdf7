"""The bug zoo: each patch of tests/zoo changes one line, by which nothing crashes and one number moves, as
data/course/zoo.md asks and data/course/solutions/zoo.md says."""

import contextlib
import importlib
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys

import pytest
import torch

from common import ROOT
from conftest import SCRIPTS, child_processes

PATCHES = ROOT / "tests" / "zoo"
PAGE, SOLUTIONS = ((ROOT / "data" / "course" / name).read_text() for name in ("zoo.md", "solutions/zoo.md"))
FAULTS = range(1, 9)


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A copy of what commands need."""
    folder = tmp_path_factory.mktemp("zoo")
    for name in ("common", *SCRIPTS):
        shutil.copy(ROOT / f"{name}.py", folder)
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (folder / "runs").mkdir()
    return folder


@contextlib.contextmanager
def fault(n: int, repo):
    """Within this block the copy has the fault: the one place where the patch's lines are, is changed."""
    patch = (PATCHES / f"{n}.patch").read_text()
    file = repo / re.search(r"^\+\+\+ b/(.+)$", patch, re.M)[1]
    hunk = re.split(r"^@@.*\n", patch, flags=re.M)[1].splitlines(True)
    old, new = ("".join(line[1:] for line in hunk if line[0] != other) for other in "+-")
    text = file.read_text()
    assert text.count(old) == 1, f"{n}.patch no longer fits {file.name}"
    file.write_text(text.replace(old, new))
    try:
        yield
    finally:
        file.write_text(text)


def section(n: int) -> str:
    return re.search(rf"^## {n}\. .*?(?=^## |\Z)", PAGE, re.M | re.S)[0]


def commands_of(n: int) -> list[str]:
    """The commands of the page, which may go over several lines."""
    block = re.search(r"^```bash\n(.*?)^```", section(n), re.M | re.S)[1]
    return re.findall(r'(?:[^\n"]|"[^"]*")+', block)


def child(rank: int, processes: int, port: int, words: list[str], folder, printed) -> None:
    """`python WORDS` in the copy, as one of some processes; a training without the evaluation at its end."""
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost",
                       "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                       "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    os.chdir(folder)
    for name in [k for k in sys.modules if k.split(".")[0] in ("common", "data", *SCRIPTS)]:
        del sys.modules[name]  # the repo's
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # two versions of a file within one second
    with open(printed, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        importlib.import_module("data.runs").Run.evaluate = lambda *_: None
        if words[0] == "-c":
            exec(words[1], {})
        else:
            importlib.import_module(words[0].removesuffix(".py")).main(words[1:])


def printed_by(n: int, repo) -> str:
    """What the page's commands print, the last one's at the end; every one must succeed."""
    said = ""
    for line in commands_of(n):
        words = [word for word in shlex.split(line) if not word.startswith("CUDA_VISIBLE_DEVICES")]
        if words[0] not in ("python", "torchrun"):
            subprocess.run(line, shell=True, cwd=repo, check=True)
            continue
        processes = int(words[2]) if words[0] == "torchrun" else 1
        rest = words[3:] if words[0] == "torchrun" else words[1:]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        files = [repo / f"printed{rank}" for rank in range(processes)]
        children = [child_processes().Process(target=child, args=(rank, processes, port, rest, repo, file))
                    for rank, file in enumerate(files)]
        [c.start() for c in children]
        [c.join() for c in children]
        said += files[0].read_text()
        assert not any(c.exitcode for c in children), said
    return said


def number(n: int, repo) -> float:
    """The one that the page asks for."""
    said = printed_by(n, repo)
    if n == 1:
        return gradient_norm(said, "gan_g")
    if n == 5:
        return float(re.search(r"^restored +(\S+)", said, re.M)[1])
    return float(said.split()[-1])


def gradient_norm(said: str, term: str) -> float:
    """Of a loss term, over all parameters: from what is printed at step 1, whether a number or several."""
    told = said[said.index("step 1"):]
    norms = re.findall(r"\d[\d.e-]*", re.search(rf"\b{term}\b(.*)", told)[1])
    return math.hypot(*map(float, norms))


@pytest.mark.parametrize("n", [pytest.param(n, marks=[pytest.mark.slow] * (n in (1, 4, 5))) for n in FAULTS])
def test_a_fault_moves_its_number_and_crashes_nothing(n, repo):
    row = re.search(rf"^\| {n} \|.*\| ([\d.e-]+) \| ([\d.e-]+) \|$", SOLUTIONS, re.M)
    right, wrong = map(float, row.groups())
    assert not math.isclose(right, wrong, rel_tol=0.04)
    assert number(n, repo) == pytest.approx(right, rel=0.015, abs=1e-6)
    with fault(n, repo):
        assert number(n, repo) == pytest.approx(wrong, rel=0.015, abs=1e-6)


@pytest.mark.parametrize("n", FAULTS)
def test_a_patch_is_one_line_and_can_be_taken_back(n, repo):
    lines = (PATCHES / f"{n}.patch").read_text().splitlines()[2:]
    assert [sum(line[0] == sign for line in lines) for sign in "+-"] == [1, 1]
    if not shutil.which("git"):
        pytest.skip("no git")
    scripts = []
    for options in ([], ["-R"], None):
        scripts.append([file.read_text() for file in sorted(repo.glob("*.py"))])
        if options is not None:
            subprocess.run(["git", "apply", *options, PATCHES / f"{n}.patch"], cwd=repo, check=True,
                           env=os.environ | {"GIT_CEILING_DIRECTORIES": str(repo.parent)})
    assert scripts[0] == scripts[2] != scripts[1]


def test_the_page_has_what_the_zoo_has_and_no_answers():
    assert sorted(p.name for p in PATCHES.iterdir()) == [f"{n}.patch" for n in FAULTS]
    asked, answered = re.findall(r"^## (\d)\. ", PAGE, re.M), re.findall(r"^\*\*(\d)\. ", SOLUTIONS, re.M)
    assert asked == answered == [*map(str, FAULTS)]
    assert all("**Question:**" in section(n) for n in FAULTS)
    assert len(PAGE.split()) <= 700
