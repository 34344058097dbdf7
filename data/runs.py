"""Around the methods, and knowing none: a training's folder, what a stage's loop leaves to others (where it
stood, its batches, log, checkpoints), the command line.

    RUN/config.json   RUN/log.jsonl   RUN/ledger-stageN.json
    RUN/last/ (to resume)   RUN/model/ (to restore)   RUN/samples/

One process writes, and every file whole or not at all (of the log `resume` drops a torn last line)."""

from __future__ import annotations

import argparse
import errno
import functools
import importlib
import json
import math
import os
import re
import shutil
import sys
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import PHOTOS, SD, TINY_SD, Settings, device, load_trained, trained
from data import speed
from data.files import (ROOT, SHIPPED, UserError, append, atomic, first_line, in_repo,
                        leave_ctrl_c_to_the_parent, list_files, list_images, load_tensors, note, outputs,
                        read_json, save_tensors, write_json)
from data.pictures import compress_files, decompress_files, restore_files
from data.results.tables import ledger_table, text_table

LOCKS: dict[Path, int] = {}
LOCK = ".lock"  # a file's name; it stays, as another that has it open would go on with a deleted one


def lock(folder: Path) -> None:
    """Keeps other processes from writing into the folder until this one ends, however it ends."""
    if os.name != "posix" or folder.resolve() in LOCKS:
        return
    import fcntl
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)  # for writing: NFS locks no other
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):  # the latter says a network drive of Windows
            os.close(descriptor)
            raise UserError(f"{folder}: another training writes into it; wait, or name another") from None
        note(f"{folder}: this file system has no locks ({error.strerror}); let no other training write there")
    LOCKS[folder.resolve()] = descriptor


def open_folder(folder: Path, config: dict, resume: bool, overwrite: bool, stage: str) -> None:
    """Takes the folder for a run of these settings, new or begun, and writes config.json."""
    path = folder / "config.json"
    begun = read_json(path) if path.exists() else {}
    if path.exists() and "script" not in begun:
        raise UserError(f"--out {folder}: its config.json is not a run's; name another folder")
    if resume and not begun:
        raise UserError(f"--resume: {folder} holds no run")
    if begun and not (resume or overwrite or stage == "2"):
        raise UserError(f"--out {folder}: holds a run; --resume it, or --overwrite it by a new one")
    old = [p for p in folder.glob("*") if p.name != LOCK] if overwrite else []
    if old and not begun:
        raise UserError(f"--overwrite: {folder} holds {old[0].name}, but no run; name another --out")
    if old and stage == "2" and config.get("stage2.alignment", True):  # OSCAR without needs none
        raise UserError(f"--overwrite: {folder} holds the stage 1 on which stage 2 builds; to do stage 2 "
                        "again delete last/stage2.safetensors there")
    # by a kill in the middle of a write
    torn = [p for p in [*folder.glob(".*tmp*"), *folder.glob("*/.*tmp*")] if begun and p.is_file()]
    begun = {} if overwrite else begun
    for k, now in config.items() if begun else ():
        # a stage that has not saved anything yet may still get other settings, and other data
        of_stage = next((s for s in "12" if k == f"data{s}" or k.startswith(f"stage{s}.")), None)
        started = of_stage is None or (folder / "last" / f"stage{of_stage}.safetensors").exists()
        if begun.get(k) != now and started:
            raise UserError(f"--resume: {k} was {begun.get(k)}, but is {now} now; or name a new --out")
    lock(folder)
    for p in old or torn:
        shutil.rmtree(p) if p.is_dir() else p.unlink()
    write_json(path, begun | config)


def keep_rows(log: Path, stage: int, steps: int) -> None:
    """Drops from the log what the stage did after its last checkpoint, and a line that a kill tore."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines(True) if line.endswith("\n")]
        rows = [json.loads(line) for line in lines]
        kept = [line for line, row in zip(lines, rows) if row["stage"] != stage or row["step"] < steps]
        atomic(log, lambda tmp: tmp.write_text("".join(kept)))


def once(work, *args, **options) -> None:
    """Calls work(...) in the first process while the others wait. Where it fails there, all end."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    error = None
    try:
        if PartialState().is_main_process:
            work(*args, **options)
    except Exception as caught:
        error = caught
    if broadcast_object_list([bool(error)])[0]:
        raise error or SystemExit(2)


def loader(data, batches, cfg: Settings, acc):
    """Yields these batches of samples' numbers, made in cfg.workers processes."""
    made = torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=cfg.workers,
                                       pin_memory=acc.device.type == "cuda",
                                       worker_init_fn=leave_ctrl_c_to_the_parent)
    try:
        yield from made
    except UserError as error:  # a worker's comes with its traceback
        raise UserError(str(error).strip().splitlines()[-1].partition("UserError: ")[2] or error) from None
    except (RuntimeError, OSError) as error:  # by many names, and from either side
        if cfg.workers and re.search("shared memory|shm|No space left|Bus error|unable to mmap", str(error)):
            flag = cfg.flag("workers")
            raise UserError(f"{flag} {cfg.workers}: no shared memory (/dev/shm) is left for these workers; "
                            f"{flag} 0 needs none, a container may have more: --shm-size 8g") from None
        raise


def filled_rows(path: Path, shape: tuple[int, ...], data, cfg: Settings, acc, make) -> Tensor:
    """An array of this shape, kept in a file; row n is make(samples n, ...) of batches of `data`. Processes
    share the work. A row not made yet is NaN, so that a run killed at any moment goes on where it was."""
    unmade = np.full(shape, np.nan, np.float32)
    once(lambda: path.exists() or atomic(path, lambda tmp: np.save(tmp, unmade)))
    rows = np.load(path, mmap_mode="r+")
    own = torch.arange(len(rows)).split(cfg.batch)[acc.process_index::acc.num_processes]
    todo = [n for n in map(Tensor.tolist, own) if np.isnan(rows[n]).any()]
    for n, *batch in tqdm(loader(data, todo, cfg, acc), path.parent.name, len(todo), unit="batch",
                          disable=None if acc.is_main_process else True):
        with acc.autocast():
            rows[n.numpy()] = make(n.to(acc.device), *(t.to(acc.device) for t in batch)).cpu()
    acc.wait_for_everyone()
    return torch.from_numpy(rows)


def processes() -> int:
    """How many `accelerate launch` or torchrun started, which say so in the environment."""
    return int(os.environ.get("WORLD_SIZE", 1))


def groups(modules: dict[str, nn.Module], train: bool = True) -> dict[str, list[nn.Parameter]]:
    """The ledger's columns: parameters that training changes (or does not) by the first name of their path,
    LoRA's apart; of several modules with theirs: {"G.unet LoRA": [...], "D.head": [...]}."""
    found: dict[str, list[nn.Parameter]] = {}
    for owner, module in modules.items():
        for name, p in module.named_parameters():
            first = next(k for k in name.split(".") if k not in ("sd", "_orig_mod") and not k.isdigit())
            group = first.rstrip("0123456789") + " LoRA" * ("lora_" in name)
            group = f"{owner}.{group}" if len(modules) > 1 else group
            if p.requires_grad == train:
                found.setdefault(group, []).append(p)
    return found


def gradient_norms(acc, term: Tensor, columns: dict[str, list[nn.Parameter]]) -> dict[str, float]:
    """{group: norm of the loss term's gradient}, 0 where it moves nothing, as in what `frozen` holds."""
    scale = acc.scaler.get_scale() if acc.scaler else 1.0  # float16 would round small ones to 0
    free = [p for group in columns.values() for p in group if p.requires_grad]
    grads = (torch.autograd.grad(scale * term.sum(), free, retain_graph=True, allow_unused=True)
             if term.requires_grad else ())
    power = {p: (g.float() / scale).square().sum() for p, g in zip(free, grads) if g is not None}
    return {k: math.sqrt(sum(power.get(p, 0.0) for p in group)) for k, group in columns.items()}


class Run:
    """Of a training. A stage calls start, resume, batches (and in that loop log, save),
    finish; `train` at the end evaluate."""

    def __init__(self, args, paper_base: str, *stages: Settings, **more):
        """`args` of a train command; `more` is recorded beside the stages' settings."""
        from accelerate import PartialState
        self.args, self.folder, self.seed = args, args.out, args.seed
        self.base = args.base or (paper_base if args.paper else TINY_SD)
        self.data = args.data or [PHOTOS / "train"]
        with torch.device("meta"):
            SD(self.base, weights=False)  # what is wanting or foreign had better fail before any work
        list_images([*self.data, *(args.val or [])])
        script = name_of(args.script)
        self.config = {"script": script, "base": in_repo(self.base), "seed": self.seed}
        for stage in "12" if args.stage == "all" else args.stage:
            self.config[f"data{stage}"] = [in_repo(d) for d in self.data]  # each stage may have its own
        self.config |= more
        for cfg in stages:
            self.config |= {f"stage{cfg.number}.{k}": v for k, v in asdict(cfg).items()}
        self.config = json.loads(json.dumps(self.config))  # as it will be read: lists for tuples
        PartialState(cpu=device().type == "cpu", timeout=timedelta(days=1))  # joins other processes, if any
        once(open_folder, self.folder, self.config, args.resume, args.overwrite, args.stage)

    def start(self, cfg: Settings, some_unused=False, float32=False, **modules: nn.Module):
        """Prints a stage's settings and modules; returns its Accelerator: device, processes, precision.
        `some_unused`: a step may leave parameters out, which processes must know; `float32`: never bf16."""
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import AutocastKwargs
        on, kind = device().type, speed.dtype()
        precision = "no" if kind is torch.float32 else speed.name_of(kind)  # one a process
        options = [DistributedDataParallelKwargs(find_unused_parameters=some_unused),
                   AutocastKwargs(enabled=not float32)]
        self.acc = Accelerator(mixed_precision=precision, cpu=on == "cpu",
                               gradient_accumulation_steps=cfg.accumulate, kwargs_handlers=options)
        speed.for_training(modules.values(), self.acc.device, kind)
        # Where accelerate's settings compile, its own would take several processes' wrapper off for good.
        self.acc.unwrap_model = functools.partial(self.acc.unwrap_model, keep_torch_compile=False)
        self.cfg, self.last = cfg, self.folder / "last" / f"stage{cfg.number}.safetensors"
        self.values, self.smooth = {}, {}  # of a step's micro-batches; for the bar
        where = f"{on} x {self.acc.num_processes}, precision {'float32' if float32 else precision}"
        self.acc.print(f"\nstage {cfg.number} on {where}\n ", *(f" {k}={v}" for k, v in asdict(cfg).items()))
        for name, m in modules.items():
            total = sum(p.numel() for p in m.parameters()) / 1e6
            learns = sum(p.numel() for p in m.parameters() if p.requires_grad) / 1e6
            self.acc.print(f"  {name:24s}{total:10.3f} M parameters, {learns:9.3f} M trainable")
        return self.acc

    def resume(self, modules: dict[str, nn.Module], optimizers: dict) -> int:
        """Puts the last checkpoint back, if there is one; returns how many steps are done."""
        self.modules = {k: self.acc.unwrap_model(m) for k, m in modules.items()}
        self.optimizers = optimizers
        self.columns, self.norms = groups(self.modules), {}  # of the ledger
        state, header = load_tensors(self.last) if self.last.exists() else ({}, {"step": 0})
        for name, module in self.modules.items() if state else ():
            load_trained(module, state["modules"].get(name, {}), self.last)
        for name, optimizer in optimizers.items() if state else ():
            moments = {int(i): m for i, m in state["optimizers"].get(name, {}).items()}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        if self.acc.scaler and "scaler" in state:
            self.acc.scaler.load_state_dict({k: v.item() for k, v in state["scaler"].items()})
        speed.compile_for(self.cfg.steps - header["step"], [*self.modules.values()], self.acc.device.type)
        once(keep_rows, self.folder / "log.jsonl", self.cfg.number, header["step"])
        return header["step"]

    def batches(self, data, first: int):
        """Yields (step, micro-batch) from step `first` on. Step s trains on samples s * batch onwards, of
        which each process and micro-batch takes its share."""
        acc, cfg = self.acc, self.cfg
        share = cfg.batch // (cfg.accumulate * acc.num_processes)
        starts = (s * cfg.batch + (a * acc.num_processes + acc.process_index) * share
                  for s in range(first, cfg.steps) for a in range(cfg.accumulate))
        sampler = ([*range(n, n + share)] for n in starts)
        samples = iter(loader(data, sampler, cfg, acc))
        self.bar = tqdm(range(first, cfg.steps), f"stage{cfg.number}", initial=first, total=cfg.steps,
                        mininterval=0.2 if getattr(sys.stderr, "isatty", bool)() else 20,
                        disable=not acc.is_main_process)
        for step in self.bar:
            for _ in range(cfg.accumulate):
                yield step, [t.to(acc.device, non_blocking=True) for t in next(samples)]

    def ledger(self, step: int, terms: dict[str, Tensor]) -> None:
        """At the first step, for `log`: what each weighted loss term would move. Norms of its gradient by
        group of parameters; of the first micro-batch, and of several processes of the first one's share."""
        if step == 0:
            self.norms |= {k: gradient_norms(self.acc, term, self.columns)
                           for k, term in terms.items() if k not in self.norms}

    def log(self, step: int, **values: Tensor | float) -> None:
        """Notes a micro-batch's values; after a step's last one writes their means to log.jsonl, and shows
        those without @; after the first also the ledger. A value that is no number ends the run before that
        can be saved."""
        for k, v in values.items():
            v = torch.as_tensor(v, dtype=torch.float32, device=self.acc.device).detach()
            self.values.setdefault(k, []).append(v)
        if not self.acc.sync_gradients:
            return
        if self.norms:
            ledger = {"norms": self.norms, "frozen": [*groups(self.modules, train=False)]}
            self.acc.print(f"\nstep {step + 1}: gradient norm of each loss term, by what it would move\n"
                           + text_table(*ledger_table(self.norms)))
            once(write_json, self.folder / f"ledger-stage{self.cfg.number}.json", ledger)
            self.norms = {}
        row = {k: self.acc.reduce(torch.stack(v).mean(), "mean").item() for k, v in self.values.items()}
        self.values = {}
        for k, v in row.items():
            if not math.isfinite(v):
                raise UserError(f"stage{self.cfg.number}, step {step}: {k} is {v}; "
                                f"{self.last} is the last good state")
            self.smooth[k] = 0.95 * self.smooth.get(k, v) + 0.05 * v
        self.bar.set_postfix({k: f"{v:.4f}" for k, v in self.smooth.items() if "@" not in k}, refresh=False)
        line = json.dumps({"stage": self.cfg.number, "step": step, **row})
        once(append, self.folder / "log.jsonl", line + "\n")

    def save(self, step: int) -> None:
        """Every `save_every` steps and at the end: all that `resume` needs."""
        done = step + 1
        if self.acc.sync_gradients and (done % self.cfg.save_every == 0 or done == self.cfg.steps):
            state = {"modules": {k: trained(m) for k, m in self.modules.items()},
                     "optimizers": {k: o.state_dict()["state"] for k, o in self.optimizers.items()},
                     "scaler": self.acc.scaler.state_dict() if self.acc.scaler else {}}  # float16's
            once(save_tensors, self.last, state, step=done)

    def finish(self, module: nn.Module, beside: dict | None = None, **header) -> None:
        """The stage's result, model/stageN.safetensors: all that training changed, and the settings; `beside`
        it JSON files, by name."""
        for name, value in (beside or {}).items():
            once(write_json, self.folder / "model" / name, value)
        stage = f"stage{self.cfg.number}"
        header |= {k: v for k, v in self.config.items() if k not in ("data1", "data2", "seed")}
        tensors = trained(self.acc.unwrap_model(module))
        once(save_tensors, self.folder / "model" / f"{stage}.safetensors", tensors, **header, stage=stage)

    def evaluate(self, *options: str) -> None:
        if self.acc.is_main_process:
            options += ("--data", *self.args.val) if self.args.val else ()
            options += ("--precision", self.args.precision) if self.args.precision else ()
            tool("eval", self.args.script, "--weights", self.folder, "--base", self.base, *options)


# --------------------------------------------------------------------------------- command line

# command -> data/results/NAME.py
TOOLS = {"eval": "evaluate", "profile": "complexity", "figures": "figures", "trace": "trace"}


def name_of(script: ModuleType) -> str:
    return Path(script.__file__).stem  # (the name of one that runs is __main__)


def tool(command: str, script: ModuleType, *argv) -> None:
    """Measuring is no part of a method: eval, profile, figures and trace are data/results/NAME.py's."""
    importlib.import_module(f"data.results.{TOOLS[command]}").main(script, [*map(str, argv)])


def tuple_of(item: type):
    return lambda text: tuple(map(item, text.split(",")))  # "l2,gan" -> ("l2", "gan")


class CommandLine(argparse.ArgumentParser):
    """Commands of a script, or a tool's flags; one clear line and exit code 2 for a bad one."""

    def error(self, message):
        note(f"{self.prog}: {message} (see {self.prog} --help)")
        sys.exit(2)

    @classmethod
    def of(cls, script: ModuleType, tools: dict[str, str] = TOOLS) -> CommandLine:
        """`tools`: what measures this script, none for one that is no paper's."""
        cli = cls(f"{name_of(script)}.py", description=script.__doc__.split("\n\n")[0])
        cli.script = script
        cli.tools = tools
        cli.commands = cli.add_subparsers(dest="command", required=True, parser_class=cls)
        for name, file in tools.items():
            cli.commands.add_parser(name, help=f"see data/results/{file}.py", add_help=False)
        return cli

    def command(self, name: str, about: str, run) -> CommandLine:
        p = self.commands.add_parser(name, help=about, description=about)
        p.set_defaults(run=run, script=self.script)
        return p

    def train(self, run, *stages: type[Settings]) -> CommandLine:
        """The run's flags, and one a setting, whose help shows tiny and paper value."""
        def checked(args) -> None:
            if args.seed < 0:
                raise UserError(f"--seed {args.seed}: must not be negative")
            if args.paper and not args.data:
                raise UserError("--paper needs --data: folders of photographs (see data/README.md)")
            for cfg in (stage.of(args) for stage in stages if args.stage in ("all", str(stage.number))):
                cfg.check_multiple("batch", cfg.accumulate * processes())  # each gets its share
            run(args)
        p = self.command("train", "train both stages, then evaluate", checked)
        p.add_argument("--stage", choices=["1", "2", "all"], default="all")
        p.add_argument("--paper", action="store_true", help="the paper's base and settings; needs --data")
        p.add_argument("--data", nargs="+", type=Path, metavar="DIR", help="photographs (default: bundled)")
        p.add_argument("--val", nargs="+", metavar="DIR", help="for the evaluation (default: bundled)")
        p.add_argument("--base", help="diffusers folder or hub id (default: data/tiny-sd, or the paper's)")
        p.add_argument("--out", type=Path, default=ROOT / "runs" / self.prog[:-3], help="the run's folder")
        p.add_argument("--seed", type=int, default=0)
        p.speed_flags()
        begun = p.add_mutually_exclusive_group()
        begun.add_argument("--resume", action="store_true", help="continue the run in --out")
        begun.add_argument("--overwrite", action="store_true", help="delete the run in --out and start anew")
        for stage in stages:
            group = p.add_argument_group(f"stage {stage.number} (tiny run's value | paper run's, source)")
            for f in fields(stage):
                kind, about = type(f.default), f.metadata
                options = {"type": kind, "metavar": "|".join(about["choices"]) or f.name.upper()}
                if kind is bool:
                    options = {"action": argparse.BooleanOptionalAction}
                elif kind is tuple:
                    options = {"type": tuple_of(type(f.default[0])), "metavar": "A,B,..."}
                group.add_argument(stage.flag(f.name), dest=f"{stage.number}.{f.name}", **options,
                                   help=f"{f.default} | {about['paper']}, {about['source']}")
        return p

    def restore(self, restorer) -> CommandLine:
        """restorer(args) -> restore; restore(image) -> (image, remark)."""
        def run(args):
            restore_files(outputs(args.input, args.output), restorer(args), tiled=args.tile is not None)
        p = self.command("restore", "restore images", run)
        p.add_argument("input", nargs="+", help="images, or folders of images")
        p.add_argument("-o", "--output", type=Path, default="restored", help="a folder, or one image's .png")
        return p

    def codec(self, suffix: str, compressor, decompressor) -> tuple[CommandLine, CommandLine]:
        """Two commands: compressor(args) -> compress(image) -> bytes, decompressor(args) -> the way back."""
        def compress(args):
            pairs = outputs([args.input], args.output, suffix)
            compress_files(pairs, compressor(args), tiled=args.tile is not None)

        def decompress(args):
            found = functools.partial(list_files, suffix=suffix)
            decompress_files(outputs([args.input], args.output, find=found), decompressor(args))
        both = (self.command("compress", f"images to {suffix} files, without metadata", compress),
                self.command("decompress", f"{suffix} files to PNG", decompress))
        for p in both:
            p.add_argument("input", help="a file, or a folder of them")
            p.add_argument("output", type=Path, help="a file, or a folder where the input is one")
        return both

    def model_flags(self, script: str) -> None:
        """What `restore` and the tools need to find a trained model."""
        own, shipped = ROOT / "runs" / script, SHIPPED / script
        own = shipped if shipped.exists() and not (own / "model").exists() else own
        self.add_argument("--weights", type=Path, default=own,
                          help="a run's folder (default: your last run's, or the weights that ship)")
        self.add_argument("--base", help="the base it was trained on: folder, hub id (default: as recorded)")
        self.add_argument("--tile", type=int, metavar="PX", help="work in windows of PX x PX pixels")
        self.speed_flags()

    def speed_flags(self) -> None:
        self.add_argument("--precision", choices=speed.PRECISIONS, help="default: the device's fastest")
        self.add_argument("--compile", action=argparse.BooleanOptionalAction,
                          help="networks as compiled graphs; pays from some thousand pictures of one size "
                               "(default: in training on CUDA, for 1000 steps or more)")

    def parse_args(self, argv=None, namespace=None) -> argparse.Namespace:
        args = super().parse_args(argv, namespace)
        speed.choose(args)
        return args

    def start(self, argv: list[str] | None) -> None:
        """Without argv from the shell, where a mistake is one line."""
        if argv is None:
            return run_cli(lambda: self.start(sys.argv[1:]))
        if argv and argv[0] in self.tools:
            return tool(argv[0], self.script, *argv[1:])
        args = self.parse_args(argv)
        args.run(args)


def run_cli(main) -> None:
    """Runs `main()`; what the user can mend becomes one line on stderr and exit code 2, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")  # a name may hold what a terminal cannot print
    try:
        return main()
    except (UserError, OSError) as error:  # of the system, say of a folder that may not be read
        note(f"{Path(sys.argv[0]).name}: {error}")
    except torch.OutOfMemoryError as error:
        note(f"{Path(sys.argv[0]).name}: {first_line(error)} Train with a smaller --s1-batch or --s2-batch, "
             "more --sN-accumulate, or --s2-checkpointing (data/results/paper-run.md)")
    except KeyboardInterrupt:
        note(f"{Path(sys.argv[0]).name}: interrupted; what was saved is whole (train: go on with --resume)")
    sys.exit(2)
