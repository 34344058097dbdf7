"""What more than one test file needs."""

import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import socket

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what the tests compare bit for bit is so on CPUs alone

import lpips
import pytest
import torch

import common

del lpips.LPIPS  # with a network or without: LPIPS and DISTS show as '-' here

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # two workers share two cores


def said_by(main, args: list[str], cwd) -> str:
    """What `main(args)` prints, run from the folder `cwd`."""
    with contextlib.chdir(cwd), contextlib.redirect_stdout(io.StringIO()) as out:
        main(args)
    return out.getvalue()


@pytest.fixture
def no_evaluation(monkeypatch):
    """For tests that look at a training alone."""
    monkeypatch.setattr(common.Run, "evaluate", lambda *_: None)


def same_run(one, two, *more: str) -> None:
    """Folders of two runs hold the same losses, figures, weights and other files, and nothing half written."""
    for name in ("log.jsonl", "metrics.json", *more):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for name in ("stage1.safetensors", "stage2.safetensors"):
        a, b = (common.load_tensors(folder / "model" / name)[0] for folder in (one, two))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert not [p for p in one.rglob(".*") if p.is_file()]


def child_processes():
    """Their server imports what they need once, for all of this file's and test_codiff.py's."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.preload"])  # from the repo: Python 3.11 knows no other path there
    return processes


def as_here(main, args: list[str], threads: int) -> None:
    """Runs main(args) in a child process; only with the parent's number of threads are sums the same bit for bit."""
    torch.set_num_threads(threads)
    main(args)


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """two_processes(script, args): the command in two CPU processes (gloo), each with half of the batch; what both
    print."""
    def train(script, args, codes=(0, 0), evaluate=False):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        printed = [tmp_path_factory.mktemp(script) / f"printed{rank}" for rank in (0, 1)]
        children = [child_processes().Process(target=one_of_two, args=(rank, port, script, args, printed[rank], evaluate)) for rank in (0, 1)]
        [child.start() for child in children]
        [child.join() for child in children]
        said = [p.read_text() for p in printed]
        assert tuple(child.exitcode for child in children) == codes, said[0] + said[1]
        assert [s.count("peak memory") for s in said] == [evaluate, 0]  # one process evaluates
        assert [s.count("stage 2 on cpu x 2") for s in said] == [codes == (0, 0), 0]
        return said
    return train


def one_of_two(rank: int, port: int, script: str, args: list[str], printed, evaluate: bool) -> None:
    """Process `rank` of two, with the environment that accelerate launch and torchrun give."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if not evaluate:
        common.Run.evaluate = lambda *_: None
    with open(printed, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        common.run_cli(functools.partial(importlib.import_module(script).main, args))
