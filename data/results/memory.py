"""paper-run.md's table of training at the papers' sizes, card -> flags -> memory, computed without a GPU.

    python -m data.results.memory                     # all scripts: six minutes of one core
    python -m data.results.memory --scripts codiff

Stages run as they are, on fake tensors: these have shapes but no numbers, and nothing is computed. What
counts is the most bytes that tensors take at one time. Not counted is what `LEFT` is for: CUDA's context,
cuDNN's workspaces, gaps between tensors."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import weakref
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import common
from common import PHOTOS, TINY_SD
from data import files, speed
from data.results.complexity import SD21_CONFIG
from data.results.seeds import markdown
from data.results.tables import papers
from data.runs import CommandLine, Run, run_cli

CARDS, LEFT = (12, 16, 24, 80), 1.5  # GB as sold, of 10^9 bytes; GiB
FLOAT32 = "group_norm", "layer_norm", "softmax.int", "softplus"  # to autocast on CUDA, not on a CPU
SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True}  # UNet: SODiff's discriminator

# --------------------------------------------------------------------------------------- fake tensors


class Peak(TorchDispatchMode):
    """Within this block: the bytes of the tensors made in it, `now`, and the most there were, `peak`."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}  # of storages, while they live
        self.now = self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.prim.device.default:
            return args[0].fake_device  # asked for so often that it takes half of the time
        if operator is torch.ops.aten._local_scalar_dense.default:
            return 0 if args[0].dtype is torch.bool else 1  # any(..), norms, optimizers' steps
        if operator is torch.ops.aten.equal.default:
            return args[0].shape == args[1].shape  # frozen weights of one name, in networks of one base
        out = operator(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)]:
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = -(-storage.nbytes() // 512) * 512  # as CUDA's allocator rounds
                self.now += self.sizes[storage._cdata]
                weakref.finalize(storage, self.free, storage._cdata).atexit = False
        self.peak = max(self.peak, self.now)
        return out

    def free(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


@contextlib.contextmanager
def autocast_as_on_cuda():
    """For fake tensors of a CPU. (Those of CUDA have no backward without a GPU.)"""
    def in_float32(operator, *args, **options):
        with torch.autocast("cpu", enabled=False):
            return operator(*(a.float() if isinstance(a, Tensor) else a for a in args), **options)
    library = torch.library.Library("aten", "IMPL")
    for name in FLOAT32:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, partial(in_float32, operator), "AutocastCPU")
    try:
        yield
    finally:
        library._destroy()


class Through(Exception):
    """The last micro-batch is."""


class DryRun(Run):
    """A run that reads nothing but a photograph, and notes the peaks of three micro-batches."""

    def __init__(self, memory: Peak, sizes: tuple[int, int]):
        self.memory, self.peaks = memory, []
        self.numbers = [torch.arange(size) for size in sizes]  # of samples: no fake ones
        self.base, self.data, self.folder, self.config = "", [PHOTOS / "train"], PHOTOS, {"tasks": [""] * 21}
        self.seed = 7  # which has OSCAR draw rates that take most

    def batches(self, data, first: int):
        sample = [torch.as_tensor(t) for t in data[0][1:]]
        built = self.memory.now
        # Step 0 has a ledger, for which graphs are kept. From step 1 on there are the optimizers' states, and
        # an earlier micro-batch's gradients. The third is a step 0 again, for which these do not count.
        for step, n in zip((0, 1, 0), (self.numbers[0], *self.numbers)):
            self.memory.peak = began = self.memory.now
            yield step, [n, *(torch.stack([t] * len(n)) for t in sample)]
            self.peaks.append(self.memory.peak - (0 if step else began - built))
        raise Through

    def ledger(self, step: int, terms: dict[str, Tensor]) -> None:
        """As much for all terms at once, in less time."""
        super().ledger(step, {"": sum(term.sum() for term in terms.values())})
        self.norms = {}

    def log(self, step: int, **values) -> None:
        """Nor save."""

    save = log


def part(kind, base, name: str, weights: bool = True):
    """In load_part's place: SD 2.1-base's, or where `base` is not the run's but the paper's, SDXL's."""
    if name == "text_encoder":
        return kind(kind.config_class.from_pretrained(SD21_CONFIG, subfolder=name))
    if name == "unet" and base:
        return kind.from_config(SDXL)
    return files.load_part(kind, TINY_SD if name == "tokenizer" else SD21_CONFIG, name, name == "tokenizer")


def replaced(script):
    """What would read weights, or numbers."""
    import torchvision
    vgg16 = torchvision.models.vgg16
    shapes = {"T_align.queries": (1, 77, 1024), "empty": (77, 1024)}
    stage1 = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, {"tasks": [""] * 21}
    yield patch.object(speed, "chosen", torch.bfloat16)  # float16 takes as much
    yield patch.object(common, "load_part", part)
    yield patch.object(common.Settings, "read", classmethod(lambda cls, *_: (cls.paper(), *stage1)))
    yield patch.object(script, "load_trained", lambda module, *_: module)
    yield patch.object(torchvision.models, "vgg16", lambda **_: vgg16())
    yield patch.object(Tensor, "numpy", lambda self: np.zeros(1))  # for SD's fingerprint
    yield patch.object(torch.optim.Optimizer, "zero_grad", lambda self: None)  # see DryRun
    if script.__name__ == "oscar":
        # dead codes are found in the numbers; the codebook is small
        yield patch.object(script.Quantizer, "update", lambda self, *_: self.pending.clear())
        yield patch.object(script, "choose_mapping", lambda *_: [0] * len(script.RATES))
    if script.__name__ == "moe_diffir":
        clip = script.clip_encoder
        yield patch.object(script, "clip_encoder", lambda name, flag, weights: clip(name, flag, False))
        yield patch.object(script, "cache_latents", lambda *_: torch.empty(64, 4, 32, 32))  # a file's


def peaks(script, cfg, sizes: tuple[int, int]) -> tuple[float, float]:
    """The most GiB that a stage with the settings `cfg` takes, for micro-batches of two sizes."""
    stage = getattr(script, f"stage{cfg.number}")
    given = {"dists": lambda: common.dists("vgg16"), "cfg1": script.Stage1.paper,
             "lpips": lambda: common.lpips("vgg16"),
             "benchmark": lambda: {photo: [(0, photo)] for photo in files.list_images([PHOTOS / "train"])}}
    run = DryRun(memory := Peak(), sizes)
    with contextlib.ExitStack() as stack:
        for context in (*replaced(script), autocast_as_on_cuda(), contextlib.redirect_stdout(io.StringIO()),
                        contextlib.redirect_stderr(io.StringIO())):
            stack.enter_context(context)
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        fake.fake_tensor_converter.set_tensor_memo = lambda *_: None  # Module.to bears no weak references
        stack.enter_context(memory)
        stack.enter_context(contextlib.suppress(Through))
        stage(run, cfg, *(given[name]() for name in [*inspect.signature(stage).parameters][2:]))
    first, later, large = (peak / 2**30 for peak in run.peaks)
    return max(first, later), large


# ----------------------------------------------------------------------------------------- the table


def ways(script, number: int) -> list[tuple[int, str, float]]:
    """(micro-batch, flags, GiB) of all ways to take the paper's batch in pieces."""
    rows, cfg = [], getattr(script, f"Stage{number}").paper()
    for changed in ({}, {"checkpointing": True}) if hasattr(cfg, "checkpointing") else ({},):
        one, whole = peaks(script, replace(cfg, **changed), (1, cfg.batch))
        for pieces in (2**i for i in range(cfg.batch.bit_length())):  # batches are powers of two
            size = cfg.batch // pieces
            flags = [f"{cfg.flag('accumulate')} {pieces}"] * (pieces > 1) + [*map(cfg.flag, changed)]
            rows.append((size, " ".join(flags), one + (whole - one) * (size - 1) / (cfg.batch - 1)))  # a line
    return rows


def best(rows: list[tuple[int, str, float]], card: int) -> tuple[str, str]:
    """(flags, GiB) of the largest micro-batch that fits. Checkpointing, a third more work, is worth it where
    that doubles it; of two as good, the one that takes less."""
    fitting = [row for row in rows if row[2] < card * 1e9 / 2**30 - LEFT]
    if not fitting:
        return "", "does not fit"
    _, flags, gib = max(fitting, key=lambda row: (row[0] / (2 if "checkpointing" in row[1] else 1), -row[2]))
    return flags, f"{gib:.1f}"


def main(argv: list[str] | None = None) -> None:
    p = CommandLine("memory", description="memory of training at the papers' sizes, by card")
    p.add_argument("--scripts", nargs="+", choices=papers(), default=papers())
    of = {}
    todo = [(name, number) for name in p.parse_args(argv).scripts for number in (1, 2)]
    for name, number in tqdm(todo, disable=None):
        of.setdefault(name, []).append(ways(importlib.import_module(name), number))
    lines = []
    for name, rows in of.items():
        found = [[*zip(*(best(row, card) for row in rows))] for card in CARDS]
        flags = [" ".join(filter(None, flags)) for flags, _ in found]
        cells = [(f"`{f}` " if f else "as it is: ") + " / ".join(gib) for f, (_, gib) in zip(flags, found)]
        lines.append([f"`{name}.py`", *cells])
    print(markdown(["GiB of stage 1 / 2", *(f"{card} GB" for card in CARDS)], lines))


if __name__ == "__main__":
    run_cli(main)
