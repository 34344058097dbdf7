"""A training of any script: its folder, its log, and that stopping, killing or sharing it changes nothing."""

import errno
import fcntl
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import codiff
from common import PHOTOS, TINY_SD, rng
from conftest import SCRIPTS, STOP, as_here, before_stage_2, child_processes, rows_of, same_run, train_args
from data.files import ROOT, UserError, in_repo, load_tensors
from data.results import figures
from data.results.tables import paper
from data.runs import LOCKS, loader, lock, run_cli

# Of each script, calls after which Ctrl-C comes: in the third step of each stage, one after the last
# checkpoint; in MoE-DiffIR also between the stages, among the latents.
STOPS = {"codiff": [("1", "loss_rec", 3), ("2", "loss_G", 3)],
         "sodiff": [("1", "loss_align", 3), ("2", "loss_qf", 3)],
         "oscar": [("1", "loss_sim", 8 * 2 + 3), ("2", "loss_mse", 3)],  # eight rates a step
         "moe_diffir": [("1", "loss_sd", 3), ("2", "make_latents", 2), ("2", "loss_decoder", 3)]}
BESIDE = {"oscar": {"model/mapping.json", "samples/rd.png"}}


# ---- what a training leaves


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_leaves_its_files_and_a_line_a_step(name, trained):
    run = trained(name)
    files = {str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file()}
    stages = {f"{folder}/stage{n}.safetensors" for folder in ("last", "model") for n in (1, 2)}
    latents = {f for f in files if f.startswith("latents/")}  # MoE-DiffIR's cache
    assert len(latents) == (name == "moe_diffir")
    assert files == latents | stages | BESIDE.get(name, set()) | {".lock", "config.json", "log.jsonl",
                                                                  "ledger-stage1.json", "ledger-stage2.json",
                                                                  "metrics.json", "samples/eval.png"}
    rows = rows_of(run.folder)
    assert [(row["stage"], row["step"]) for row in rows] == [(n, step) for n in (1, 2) for step in range(4)]
    assert all(math.isfinite(v) for row in rows for v in row.values())
    assert json.loads((run.folder / "config.json").read_text())["base"] == "data/tiny-sd"


# What each term moves at the first step, of stages 1 and 2; all else is exactly 0. (The released GAN term
# moves nothing of G. MoE-DiffIR's SPADE begins at zero, and lets no gradient of `sd` through yet.)
D, SAIPE, Q = ["D.prompt", "D.unet LoRA", "D.head"], ["E_down", "T_align", "D_up"], ["G.hyper_encoders"]
G = {"codiff": ["G.vae LoRA", "G.unet LoRA", "G.proj"], "sodiff": ["G.unet LoRA", "G.predictor"],
     "oscar": ["G.prompt", "G.unet LoRA", *Q]}
SHARED = ["m_head", "m_down", "m_body_encoder"]
MOVES = {"codiff": [{"qf": [*SHARED, "qf_pred"], "rec": [*SHARED, "m_body_decoder", "m_up", "m_tail"]},
                    dict.fromkeys(("l2", "dists", "gan_g"), G["codiff"]) | {"gan_d": D}],
         "sodiff": [{"rec": ["E_down", "D_up"], "align": ["E_down", "T_align"]},
                    dict.fromkeys(("mse", "ea", "gan_g"), G["sodiff"])
                    | {"qf": ["G.predictor"], "gan_d": ["D.unet LoRA", "D.proj", "D.head"]}],
         "oscar": [{"sim": ["backbone", "quantizer", "proj"], "vq": ["backbone", "quantizer"],
                    "z": ["backbone", "quantizer", "proj"]},
                   {"repa": Q} | dict.fromkeys(("mse", "dists", "ea", "gan_g"), G["oscar"]) | {"gan_d": D}],
         "moe_diffir": [{"sd": ["spade", "v2t"]}, {"lpips": ["fuse"]}]}
FROZEN = {"codiff": [[], ["G.vae", "G.unet", "G.cave", "D.unet"]],
          "sodiff": [[], ["G.vae", "G.unet", "G.E_down", "G.T_align", "D.unet"]],
          "oscar": [[], ["G.vae", "G.unet", "D.unet"]],
          "moe_diffir": [["vae", "unet", "prior", "v2t"], []]}  # of v2t CLIP


def moves(folder, *stages) -> list[dict]:
    norms = [json.loads((folder / f"ledger-stage{n}.json").read_text())["norms"] for n in stages or (1, 2)]
    return [{term: [k for k, v in row.items() if v] for term, row in stage.items()} for stage in norms]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_ledgers_zeros_are_where_the_paper_wants_them(name, trained):
    run = trained(name)
    assert moves(run.folder) == MOVES[name]
    assert "stage 1 on" in run.printed and "stage 2 on" in run.printed and "M trainable" in run.printed
    tables = run.printed.split("step 1: gradient norm of each loss term, by what it would move\n")[1:]
    assert len(tables) == 2
    for n, table in enumerate(tables):
        ledger = json.loads((run.folder / f"ledger-stage{n + 1}.json").read_text())
        assert sorted(ledger["frozen"]) == sorted(FROZEN[name][n])
        header, _, *rows = table.splitlines()[:2 + len(MOVES[name][n])]
        assert re.split("  +", header.strip()) == [*next(iter(ledger["norms"].values()))]
        assert {k: [*map(float, v)] for k, *v in map(str.split, rows)} == {
            k: [pytest.approx(v, rel=5e-3) for v in row.values()] for k, row in ledger["norms"].items()}


# ---- its curves


@pytest.mark.parametrize("name", SCRIPTS)
def test_curves_stand_beside_the_references(name, trained, tmp_path, monkeypatch, capsys):
    run, drawn = trained(name), {}
    monkeypatch.setattr(figures, "save", lambda made, folder: drawn.update(made))
    shipped = figures.HERE / "curves" / f"{name}.json"
    figures.keep(run.folder, tmp_path / f"{name}.json")
    for reference in (shipped, tmp_path / f"{name}.json"):
        figures.training(name, run.folder, reference)
        said, curves = capsys.readouterr().out, drawn["curves"]
        assert ("other settings: " in said) == ("stage2.steps 4 (reference: " in said) == (reference == shipped)
        assert "stage 2, step 1: gradient norm" in said and "Frozen in the paper: " in said
        logged = {f"stage {n}: {k}": [row[k] for row in rows_of(run.folder) if row["stage"] == n]
                  for n in (1, 2) for k in rows_of(run.folder)[4 * n - 1]
                  if "@" not in k and k not in ("stage", "step")}
        panels = {axis.get_title(): axis for axis in curves.axes if axis.get_title()}
        assert panels.keys() == logged.keys()  # of the shipped reference, too
        for title, v in logged.items():
            mean = np.average(v, weights=0.95 ** np.arange(4)[::-1])
            grey, blue = panels[title].lines
            assert (blue.get_xdata()[-1], blue.get_ydata()[-1]) == (3, pytest.approx(mean, rel=1e-4))
            if reference != shipped:
                deviation = np.average((v - mean)**2, weights=0.95 ** np.arange(4)[::-1]) ** 0.5
                band = panels[title].collections[0].get_paths()[0].vertices
                top = band[band[:, 0] == 3, 1].max()
                assert top == pytest.approx(mean + deviation, rel=1e-3, abs=1e-3 * np.abs(v).max())
                assert grey.get_ydata()[-1] == pytest.approx(mean, rel=1e-3)
    assert shipped.stat().st_size < 20_000
    figures.training(name, tmp_path, shipped)
    assert capsys.readouterr().err == f"{tmp_path}: no log.jsonl, so no curves\n"


# ---- stopped and resumed


@pytest.mark.parametrize("name", SCRIPTS)
def test_stopped_and_resumed_it_equals_the_uninterrupted_run(name, trained, photos, tmp_path, monkeypatch):
    """Stage by stage, stopped in each. Bit for bit; what a kill tears on the way is cleared away."""
    run, out = trained(name), tmp_path / "run"

    def go_on(stage):
        begun = (out / "last" / f"stage{stage}.safetensors").exists() or out.exists() and stage == "1"
        run.script.main(train_args(name, out, photos, "--stage", stage, *["--resume"] * begun))
    for i, (stage, function, times) in enumerate(STOPS[name]):
        real, calls = getattr(run.script, function), []

        def interrupted(*args, real=real, calls=calls, times=times):
            calls.append(1)
            if len(calls) == times:
                raise KeyboardInterrupt  # what Ctrl-C becomes
            return real(*args)
        with monkeypatch.context() as patch:
            patch.setattr(run.script, function, interrupted)
            with pytest.raises(KeyboardInterrupt):
                go_on(stage)
        if function != "make_latents":
            assert load_tensors(out / "last" / f"stage{stage}.safetensors")[1] == {"step": 2}
        assert len(rows_of(out)) == (2 if stage == "1" else 4 + 2 * (function != "make_latents"))
        for torn in (".log.7.tmp.jsonl", "last/.stage1.7.tmp.safetensors", "last/.tmpABCDEF"):
            (out / torn).write_bytes(b"{")
        with open(out / "log.jsonl", "a") as log:
            log.write('{"stage": 2, "st')
        if stage == "1":
            go_on(stage)
    go_on("2")
    same_run(out, run.folder)


def test_killed_at_eight_moments_and_resumed_it_equals_the_uninterrupted_run(trained, photos, tmp_path):
    """SIGKILL once the log has grown by 0 or 1 lines, after a further random delay: in the middle of a step,
    of a checkpoint, of loading. Every session resumes the one before; all is the uninterrupted run's."""
    r, kills, runs, every = rng(20), 0, [tmp_path / "run0"], ["--s1-save-every", 1, "--s2-save-every", 1]

    def lines(out):
        return (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0
    while kills < 8:
        out = runs[-1]
        resume = ["--resume"] if (out / "config.json").exists() else []
        args = ["codiff", train_args("codiff", out, photos, *every, *resume), torch.get_num_threads()]
        process = child_processes().Process(target=as_here, args=args)
        process.start()
        goal, deadline = lines(out) + r.integers(2), time.time() + 60
        while process.is_alive() and lines(out) < goal and time.time() < deadline:
            time.sleep(0.01)  # seldom enough to leave the child its processor
        time.sleep(r.uniform(0, 0.3))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # it reached its end before the signal: on with another run
            same_run(out, trained("codiff").folder)
            runs.append(tmp_path / f"run{len(runs)}")
        else:
            assert process.exitcode == -signal.SIGKILL
    if runs[-1].exists():
        codiff.main(train_args("codiff", runs[-1], photos, *every, "--resume"))
        same_run(runs[-1], trained("codiff").folder)


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(trained, photos, tmp_path, monkeypatch):
    out, real, calls = tmp_path / "run", codiff.loss_qf, []

    def broken(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 4 else 1)
    with monkeypatch.context() as patch:
        patch.setattr(codiff, "loss_qf", broken)
        with pytest.raises(UserError, match="stage1, step 3: qf is nan; .*stage1.safetensors is the last"):
            codiff.main(train_args("codiff", out, photos))
    assert load_tensors(out / "last" / "stage1.safetensors")[1] == {"step": 2}
    codiff.main(train_args("codiff", out, photos, "--stage", 1, "--resume"))
    assert rows_of(out) == rows_of(trained("codiff").folder)[:4]


@contextmanager
def full_disk(size: int):
    """No file may grow beyond `size` bytes, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(trained, photos, tmp_path):
    args = train_args("codiff", tmp_path / "run", photos, "--stage", 1)
    with full_disk(1_000_000), pytest.raises(UserError, match="stage1.safetensors: cannot be written"):
        codiff.main(args)  # the first checkpoint has 7 MB
    with full_disk(300), pytest.raises(UserError, match="(log.jsonl|config.json): cannot be written"):
        codiff.main([*args, "--resume"])
    codiff.main([*args, "--resume"])
    assert [p.name for p in tmp_path.rglob(".*")] == [".lock"]
    assert rows_of(tmp_path / "run") == rows_of(trained("codiff").folder)[:4]


def test_ctrl_c_with_loader_processes_ends_in_one_line(tmp_path):
    out = tmp_path / "run"
    more = ["--stage", 1, "--s1-steps", 400, "--s1-workers", 2, "--s1-save-every", 1]
    args = [sys.executable, str(ROOT / "codiff.py"), *train_args("codiff", out, PHOTOS / "val", *more)]
    run = subprocess.Popen(args, stderr=subprocess.PIPE, text=True, start_new_session=True,
                           env=os.environ | {"OMP_NUM_THREADS": "1"},
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a terminal's
    log = out / "log.jsonl"
    while run.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the loader's processes as well
    said = run.communicate()[1]
    assert run.returncode == 2 and "Traceback" not in said
    assert "interrupted; what was saved is whole" in said
    steps = log.read_text().count("\n")
    assert steps - 1 <= load_tensors(out / "last" / "stage1.safetensors")[1]["step"] <= steps


@pytest.mark.parametrize("error, told", [
    (RuntimeError("unable to write to file </torch_7_8_0>: No space left on device (28)"), True),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_7_8_0>: Success (0)"), True),
    (RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error. "), True),
    (RuntimeError("unable to mmap 64 bytes from file </torch_7_8_0>: Cannot allocate memory (12)"), True),
    (OSError(errno.ENOSPC, "No space left on device"), True), (RuntimeError("mat1 and mat2"), False)])
def test_workers_without_shared_memory_are_named_in_one_line(monkeypatch, error, told):
    class Broken:
        def __init__(self, *_, **options):
            self.workers = options["num_workers"]

        def __iter__(self):
            yield "a batch"
            raise error
    monkeypatch.setattr(torch.utils.data, "DataLoader", Broken)
    acc = SimpleNamespace(device=torch.device("cpu"))
    for workers in (2, 0):
        batches = loader([], [], codiff.Stage1(workers=workers), acc)
        assert next(batches) == "a batch"
        with pytest.raises(UserError if told and workers else type(error)) as end:
            next(batches)
        said = str(end.value)
        assert ("--s1-workers 2" in said and "--shm-size" in said) == (told and workers == 2)


class OfNothing(torch.utils.data.Dataset):
    def __getitem__(self, n):
        raise UserError(f"{n}.png: cannot be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_a_sample_is_one_line(workers):
    acc = SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(UserError, match="^7.png: cannot be read$"):
        next(loader(OfNothing(), [[7]], codiff.Stage1(workers=workers), acc))


def test_out_of_memory_is_one_line(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
    with pytest.raises(SystemExit, match="2"):
        run_cli(main)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Tried to allocate 2 GiB. Train with a smaller --s1-batch" in said


# ---- shared by micro-batches and processes


@pytest.mark.parametrize("name, stage", [("codiff", 2), ("sodiff", 2), ("oscar", 2), ("moe_diffir", 1),
                                         ("moe_diffir", 2)])
@pytest.mark.usefixtures("no_evaluation")
def test_accumulation_and_checkpointing_leave_the_losses_as_they_are(name, stage, trained, photos, tmp_path):
    """A stage's first half anew; MoE-DiffIR's second has no UNet to checkpoint."""
    run, out = trained(name), tmp_path / "run"
    out = out if stage == 1 else before_stage_2(run, out)
    more = [f"--s{stage}-checkpointing"] * ((name, stage) != ("moe_diffir", 2))
    steps = f"--s{stage}-steps", 2, f"--s{stage}-accumulate", 2
    run.script.main(train_args(name, out, photos, "--stage", stage, *steps, *more))
    compare(name, rows_of(run.folder)[:2 if stage == 1 else 6], rows_of(out), 1e-2)
    assert moves(out, stage) == [MOVES[name][stage - 1]]


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_give_the_losses_of_one(name, trained, two_processes, photos, tmp_path):
    """Each stage from what one process left before it, as OSCAR's codes flip by rounding. Of CODiff stage 2
    alone: in stage 1 BatchNorm sees half a batch in each process."""
    run, first = trained(name), tmp_path / "first"
    second = before_stage_2(run, tmp_path / "second")
    stages = {2: second} if name == "codiff" else {1: first, 2: second}
    commands = [train_args(name, out, photos, "--stage", stage) for stage, out in stages.items()]
    said = two_processes(name, *commands, evaluate=name == "codiff")
    assert [s.count("gradient norm of each") for s in said] == [len(stages), 0]
    for stage, out in stages.items():
        assert moves(out, stage) == [MOVES[name][stage - 1]]
        compare(name, rows_of(run.folder)[:4 if stage == 1 else None], rows_of(out), 2e-3)
    if name == "oscar":  # each process measured half of the crops
        one, two = (json.loads((f / "model" / "mapping.json").read_text()) for f in (run.folder, first))
        assert one["G_sim"] == pytest.approx(two["G_sim"], abs=1e-5)


def compare(name: str, one: list[dict], two: list[dict], rel: float) -> None:
    """(OSCAR's later steps part, once rounding has sent a vector to another of two codes about as near.)"""
    assert len(one) == len(two)
    for a, b in zip(one, two):
        near = {"rel": rel, "abs": 1e-6}
        if name == "oscar":
            near = {"rel": rel, "abs": 1e-4} if a["step"] < 2 else {"rel": 0.2, "abs": 0.2}
        assert {k: pytest.approx(v, **near) for k, v in a.items()} == b


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_batch_that_processes_cannot_share_is_refused_before_anything_is_read(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--s2-batch 4: must be a multiple of 3"):
        importlib.import_module(name).main(["train", "--stage", "2", "--s2-batch", "4", "--base", "no/such",
                                            "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


# Beside the papers' ablations
MORE_SWITCHES = {"moe_diffir": ["--prompt single", "--t-star 0 --s2-sampling 2 --cache-latents 0"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_switch_trains_in_two_processes(name, trained, two_processes, photos, tmp_path):
    """Two steps of what the switch changes; the last one is stopped after a step and resumed, too."""
    trained(name)  # makes MoE-DiffIR's benchmark
    choices = {c.flags: c.stage for c in paper(name).CHOICES if c.flags and not c.paper_only}
    choices = dict.fromkeys(MORE_SWITCHES.get(name, []), 1) | choices

    def command(out, flags, stage, *more):
        steps = [word for n in (1, 2)[stage - 1:] for word in (f"--s{n}-steps", 2, f"--s{n}-save-every", 1)]
        if stage == 2 and not out.exists():
            before_stage_2(trained(name), out)
        stages = "2" if stage == 2 else "all"
        return train_args(name, out, photos, "--stage", stages, *steps, *flags.split(), *more)
    commands = [command(tmp_path / str(i), *switch) for i, switch in enumerate(choices.items())]
    last, again = [*choices.items()][-1], tmp_path / "again"
    commands += [[STOP, *command(again, *last)], command(again, *last, "--resume")]
    two_processes(name, *commands, stages=len(choices) + 1 + (last[1] == 2))
    assert rows_of(again) == rows_of(tmp_path / str(len(choices) - 1))


def test_what_the_first_of_two_processes_refuses_ends_both(tmp_path, two_processes):
    (tmp_path / "run").mkdir()
    lock(tmp_path / "run")
    args = ["train", "--out", str(tmp_path / "run"), "--s1-steps", "1"]
    said = two_processes("codiff", args, codes=(2, 2))
    assert "another training writes into it" in said[0] and "Traceback" not in said[0] + said[1]
    assert "another training" not in said[1] and [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


# ---- the folder


def test_two_trainings_do_not_write_into_one_folder(tmp_path):
    def in_another_process(folder) -> int:
        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        LOCKS.clear()
        try:
            lock(folder)
        except UserError as error:
            os._exit(1 if "another training writes into it" in str(error) else 2)
        os._exit(0)
    assert in_another_process(tmp_path) == 0  # and its lock has died with it
    lock(tmp_path), lock(tmp_path)  # the same process may go on
    assert in_another_process(tmp_path) == 1 and in_another_process(tmp_path / "b") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "b"]


@pytest.mark.parametrize("answer",
                         [None, "EWOULDBLOCK", "EACCES", "ENOLCK", "ENOSYS", "EOPNOTSUPP", "EINVAL"])
def test_any_file_system_locks_or_one_line_says_that_it_does_not(tmp_path, monkeypatch, capsys, answer):
    """NFS (None) locks files opened for writing alone; others answer that they lock nothing."""
    def flock(descriptor, operation):
        if answer or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(getattr(errno, answer or "EBADF"), answer)
    monkeypatch.setattr(fcntl, "flock", flock)
    if answer in ("EWOULDBLOCK", "EACCES"):
        with pytest.raises(UserError, match="another training writes into it"):
            lock(tmp_path)
    else:
        lock(tmp_path)
        told = capsys.readouterr().err
        assert told.count("this file system has no locks") == (answer is not None) == told.count("\n")


def test_overwriting_what_another_process_trains_deletes_nothing(trained, photos, tmp_path):
    out = shutil.copytree(trained("codiff").folder, tmp_path / "run")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with open(out / ".lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another training writes into it"):
            codiff.main(train_args("codiff", out, photos, "--overwrite"))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_each_stage_has_its_own_photographs_and_overwrite_begins_anew(tmp_path, no_evaluation):
    """Stage 2 may be asked for too early; stage 1 then goes on with what it had."""
    out, short = tmp_path / "run", ["--s1-batch", 1, "--s2-batch", 1, "--s2-steps", 1]

    def train(*args):
        codiff.main(train_args("codiff", out, PHOTOS / "val", *short, *args))
        config = json.loads((out / "config.json").read_text())
        return [[Path(d).name for d in config.get(f"data{stage}", [])] for stage in (1, 2)]
    assert train("--stage", 1, "--s1-steps", 1) == [["train"], []]
    with pytest.raises(UserError, match="data1 was .* but is .* now"):
        train("--stage", 1, "--s1-steps", 1, "--data", PHOTOS / "val", "--resume")
    assert train("--stage", 2, "--s1-steps", 1, "--data", PHOTOS / "val") == [["train"], ["val"]]
    assert train("--stage", 1, "--s1-steps", 1, "--resume") == [["train"], ["val"]]
    assert train("--stage", 1, "--s1-steps", 2, "--data", PHOTOS / "val", "--overwrite") == [["val"], []]
    assert [(row["stage"], row["step"]) for row in rows_of(out)] == [(1, 0), (1, 1)]
    assert not (out / "model" / "stage2.safetensors").exists()


def test_bundled_paths_are_recorded_relative_to_the_repo(tmp_path, monkeypatch):
    assert in_repo(TINY_SD) == "data/tiny-sd" and in_repo("some/repository") == "some/repository"
    assert in_repo(tmp_path) == str(tmp_path.resolve())
    monkeypatch.chdir(tmp_path)
    assert codiff.SD("data/tiny-sd", with_unet=False).cell == 8  # found from anywhere
