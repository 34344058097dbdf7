"""What more than one test file needs."""

import argparse
import contextlib
import fcntl
import functools
import gc
import importlib
import io
import json
import multiprocessing
import os
import shlex
import shutil
import socket
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what the tests compare bit for bit is so on CPUs alone

import data  # noqa: F401  (before torch)
import accelerate
import lpips
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

from common import PHOTOS
from data.files import load_tensors
from data.pictures import read_image
from data.runs import CommandLine, Run, run_cli

published_lpips = lpips.LPIPS
del lpips.LPIPS  # with a network or without: tables have no LPIPS and DISTS here
gc.set_threshold(20_000)  # at Python's 700 a seventh of the suite is garbage collection
if "PYTEST_XDIST_WORKER" in os.environ:  # two workers share two cores, as does what they start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

SCRIPTS = ("codiff", "sodiff", "oscar", "moe_diffir")
CAT = read_image(PHOTOS / "val" / "chelsea.png")[0]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two processes, a file in one of them, where pytest-xdist is installed and no -n says otherwise."""
    if getattr(config.option, "numprocesses", 0) is None and "PYTEST_XDIST_WORKER" not in os.environ:
        config.option.numprocesses, config.option.dist = 2, "loadfile"


# A script's shortest training: four steps a stage, saved every second, networks as narrow as they may be.
STEPS = {"steps": 4, "save-every": 2, "batch": 2, "crop": 64}
NARROW = {"codiff": [],
          "sodiff": ["--s1-width", 24, "--s2-widths", "16,16,16,32"],
          "oscar": ["--s1-N", 16, "--s1-M", 16, "--s1-D", 8, "--s1-measure", 8],
          "moe_diffir": ["--s1-width", 16, "--s1-heads", 2, "--s1-spade", 16, "--cache-latents", 5]}


def train_args(script: str, out, photos, *more) -> list[str]:
    """(Of two equal flags the later counts.) MoE-DiffIR trains on what it is evaluated on."""
    steps = [word for stage in (1, 2) for k, v in STEPS.items() for word in (f"--s{stage}-{k}", v)]
    data = ["--data", photos] if script == "moe_diffir" else []
    return [*map(str, ("train", "--out", out, "--val", photos, *data, *steps, *NARROW[script], *more))]


# ---- one training a script, for all tests of all workers


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """once(name, make): the folder `name`, in which one worker has called make(folder)."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name, make):
        with open(base / f"{name}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits, and finds it made
            if not (base / f"{name}.done").exists():
                (base / name).mkdir()
                make(base / name)
                (base / f"{name}.done").touch()
        return base / name
    return once


@pytest.fixture(scope="session")
def photos(shared):
    """Two photographs of odd sizes, with captions."""
    def make(folder):
        CAT.crop((100, 40, 233, 131)).save(folder / "cat.png")
        read_image(PHOTOS / "val" / "flower.jpg")[0].crop((250, 150, 357, 251)).save(folder / "flower.png")
        lines = [json.dumps({"file": f"{name}.png", "caption": f"a {name}"}) for name in ("cat", "flower")]
        (folder / "captions.jsonl").write_text("\n".join(lines))
    return shared("photos", make)


@pytest.fixture(scope="session")
def trained(shared, photos):
    """trained(script): its shortest training, from a folder that is not the repo's. Not to be changed."""
    @functools.cache
    def run_of(name: str) -> Trained:
        script = importlib.import_module(name)

        def make(folder):
            printed = said_by(script.main, train_args(name, folder / "run", photos), folder)
            (folder / "printed").write_text(printed)
        return Trained(script, shared(name, make))
    return run_of


class Trained:
    def __init__(self, script, folder):
        self.name, self.script, self.folder = script.__name__, script, folder / "run"
        self.printed = (folder / "printed").read_text()

    @functools.cached_property
    def model(self):
        return self.script.load(self.folder)


def said_by(main, args: list[str], cwd) -> str:
    """What `main(args)` prints, run from the folder `cwd`."""
    with contextlib.chdir(cwd), contextlib.redirect_stdout(io.StringIO()) as out:
        main(args)
    return out.getvalue()


def before_stage_2(run, out):
    """A copy of a run as stage 1 left it."""
    shutil.copytree(run.folder, out)
    (out / "last" / "stage2.safetensors").unlink()
    return out


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_run(one, two) -> None:
    """Folders of two runs hold the same files, losses, figures and weights, and nothing half written."""
    files = {p.relative_to(one) for p in one.rglob("*") if p.is_file()}
    assert files == {p.relative_to(two) for p in two.rglob("*") if p.is_file()}
    for name in files:
        if name.suffix == ".safetensors" and name.parent.name == "model":
            a, b = (load_tensors(folder / name)[0] for folder in (one, two))
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
        elif name.suffix in (".jsonl", ".npy") or name.name.startswith(("ledger", "mapping", "metrics")):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.fixture
def no_evaluation(monkeypatch):
    """For tests that look at a training alone."""
    monkeypatch.setattr(Run, "evaluate", lambda *_: None)


# ---- what a user is told, and what a loss moves


@pytest.fixture
def refused(capsys, monkeypatch):
    """refused(main, args): the one line, with exit code 2, in which a command says what its user can mend."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def line(main, args) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_cli(lambda: main([*map(str, args)]))
        said = capsys.readouterr().err
        assert end.value.code == 2 and "Traceback" not in said
        return said.strip().splitlines()[-1]
    return line


class AnywhereHalf(accelerate.Accelerator):
    """accelerate's Accelerator, which allows float16 on GPUs alone."""

    growth_interval = 3

    def __init__(self, mixed_precision="no", **more):
        if half := mixed_precision == "fp16":
            AcceleratorState._reset_state()
        super().__init__(mixed_precision="no" if half else mixed_precision, **more)
        if half:
            self.state._mixed_precision, self.native_amp = "fp16", True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=self.growth_interval)


class Parsed(Exception):
    """Where a command would begin to work."""


@pytest.fixture
def parsed(monkeypatch):
    """parsed(line): what `python SCRIPT.py ...` or `python -m TOOL ...` reads from its flags, and no more."""
    def parse_args(self, argv):
        raise Parsed(argparse.ArgumentParser.parse_args(self, argv))

    def read(line: str) -> argparse.Namespace:
        words = shlex.split(line)
        at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        name = words[at + 1] if words[at] == "-m" else Path(words[at]).stem
        module = importlib.import_module(name)
        with monkeypatch.context() as patch, pytest.raises(Parsed) as end:
            patch.setattr(CommandLine, "parse_args", parse_args)
            module.main(words[at + 1 + (words[at] == "-m"):])
        args = end.value.args[0]
        if getattr(args, "command", "") == "train":
            module.Stage1.of(args), module.Stage2.of(args)  # refuse what is out of range
        return args
    return read


def moved_by(loss, module) -> set[str]:
    """The parameters of the module that the loss has a gradient for."""
    names, parameters = zip(*((k, p) for k, p in module.named_parameters() if p.requires_grad))
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {k for k, g in zip(names, grads) if g is not None and g.any()}


def tops(names) -> set[str]:
    return {name.split(".")[0] for name in names}


def are_binary_cross_entropy(loss_G, loss_D) -> None:
    fake, real = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    ones, zeros, bce = torch.ones_like(fake), torch.zeros_like(fake), F.binary_cross_entropy_with_logits
    assert torch.allclose(loss_G(fake), bce(fake, ones))
    assert torch.allclose(loss_D(fake, real), bce(fake, zeros) + bce(real, ones))


def alpha_bars():
    """SD's schedule: betas are squares of evenly spaced roots."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000)**2, 0)


# ---- other processes

STOP = "stop"  # before a command


def child_processes():
    """Their server imports once what they need."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.preload"])  # from the repo: Python 3.11 knows no other
    return processes


def as_here(script: str, args: list[str], threads: int) -> None:
    """A command in a child process; with as many threads as here, sums are the same bit for bit."""
    torch.set_num_threads(threads)
    importlib.import_module(script).main(args)


@pytest.fixture
def two_processes(tmp_path):
    """two_processes(script, args, ...): commands in two CPU processes (gloo), each with half of the batch; what
    both print."""
    def train(script, *commands, codes=(0, 0), evaluate=False, stages=None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        printed = [tmp_path / f"printed{rank}" for rank in (0, 1)]
        children = [child_processes().Process(target=one_of_two,
                                              args=(rank, port, script, commands, printed[rank], evaluate))
                    for rank in (0, 1)]
        [child.start() for child in children]
        [child.join() for child in children]
        said = [p.read_text() for p in printed]
        assert tuple(child.exitcode for child in children) == codes, said[0] + said[1]
        assert [s.count("peak memory") for s in said] == [evaluate, 0]  # one process evaluates
        assert [s.count("stage 2 on cpu x 2") for s in said] == [stages or codes == (0, 0), 0]
        return said
    return train


def one_of_two(rank: int, port: int, script: str, commands: list[list[str]], printed, evaluate: bool) -> None:
    """Process `rank` of two, with the environment that accelerate launch and torchrun give. What follows STOP
    is interrupted after its first step."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    save = Run.save

    def save_and_stop(run, step):
        save(run, step)
        raise KeyboardInterrupt
    if not evaluate:
        Run.evaluate = lambda *_: None
        importlib.import_module("data.results.moe_diffir").print_latent_errors = lambda *_: None
    main = importlib.import_module(script).main
    with open(printed, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        for args in commands:
            Run.save = save_and_stop if args[0] == STOP else save
            with contextlib.suppress(KeyboardInterrupt) if args[0] == STOP else contextlib.nullcontext():
                run_cli(functools.partial(main, args)) if args[0] != STOP else main(args[1:])
