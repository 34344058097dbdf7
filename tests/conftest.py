"""What more than one test file needs."""

import contextlib
import importlib
import io
import multiprocessing
import os
import shutil
import socket

import pytest
import torch

import codiff


def said_by(main, args: list[str], cwd) -> str:
    """What `main(args)` prints, run from the folder `cwd`."""
    with contextlib.chdir(cwd), contextlib.redirect_stdout(io.StringIO()) as out:
        main(args)
    return out.getvalue()


@pytest.fixture(scope="session")
def codiff_run(tmp_path_factory):
    import test_codiff
    out = tmp_path_factory.mktemp("whole") / "run"
    codiff.main(test_codiff.train_args(out, test_codiff.make_val(tmp_path_factory.mktemp("val"))))
    return out


@pytest.fixture(scope="session")
def two_processes(codiff_run, tmp_path_factory):
    """{script: its run's folder}: trained by two CPU processes (gloo) with the batches of one, CODiff from the other
    run's stage 1 on."""
    folder, names, args = tmp_path_factory.mktemp("two"), ("codiff", "oscar", "sodiff"), []
    for name in names:
        tests, val = importlib.import_module(f"test_{name}"), folder / f"val_{name}"
        val.mkdir()
        args.append(tests.train_args(folder / name, tests.make_val(val)))
    shutil.copytree(codiff_run, folder / "codiff")
    (folder / "codiff" / "last" / "stage2.safetensors").unlink()
    args[0] += ["--stage", "2"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = multiprocessing.get_context("forkserver")  # its children need not import everything anew
    processes.set_forkserver_preload(["codiff", "oscar", "sodiff"])
    children = [processes.Process(target=one_of_two, args=(rank, port, names, args, folder / f"printed{rank}")) for rank in (0, 1)]
    [child.start() for child in children]
    [child.join() for child in children]
    assert [child.exitcode for child in children] == [0, 0], (folder / "printed0").read_text()
    printed = (folder / "printed0").read_text()
    assert printed.count("stage 2 on cpu x 2") == printed.count("peak memory") == 3
    assert "peak memory" not in (folder / "printed1").read_text()  # one process evaluates
    return {name: folder / name for name in names}


def one_of_two(rank: int, port: int, names: tuple[str, ...], args: list[list[str]], printed) -> None:
    """Process `rank` of two, with the environment that accelerate launch and torchrun give."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with open(printed, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        for name, a in zip(names, args):
            importlib.import_module(name).main(a)
