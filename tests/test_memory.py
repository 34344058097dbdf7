"""GPU memory, computed on fake tensors."""

from dataclasses import replace

import torch
from accelerate.state import AcceleratorState
from torch._subclasses.fake_tensor import FakeTensorMode

import codiff
from data.results import memory


def test_peak_is_what_is_alive_at_once():
    with FakeTensorMode(), memory.Peak() as peak:
        x = torch.empty(1024, 256)                           # 1024 KiB
        w = torch.empty(256, 256, requires_grad=True)        # 256
        y = (x @ w).relu()                                   # 1024, and as much for the product
        assert (peak.now, peak.peak) == (2304 * 1024, 3328 * 1024)
        y.sum().backward()                                   # in place of the product its gradient; 256 for w's
        assert (peak.now, peak.peak) == (2560 * 1024, 3584 * 1024 + 2 * 512)  # the sum and its gradient: 512 each
        del x, w, y
    assert peak.now == 0


def test_autocast_as_on_cuda():
    conv, x = torch.nn.Conv2d(4, 4, 1), torch.ones(1, 4, 8, 8)
    norm = torch.nn.GroupNorm(2, 4)

    def dtypes():
        with torch.autocast("cpu", torch.bfloat16):
            return conv(x).dtype, norm(conv(x)).dtype
    with memory.autocast_as_on_cuda():
        assert dtypes() == (torch.bfloat16, torch.float32)
    assert dtypes() == (torch.bfloat16, torch.bfloat16)


def test_a_stage_takes_its_states_and_more_for_larger_batches():
    cfg = replace(codiff.Stage1.paper(), widths=(16, 32, 64, 128), blocks=1, crop=64)
    AcceleratorState._reset_state()  # a process of its own keeps its precision
    one, four = memory.peaks(codiff, cfg, (1, 4))
    AcceleratorState._reset_state()
    states = sum(p.nbytes for p in codiff.CaVE(cfg.widths, cfg.blocks).parameters()) * 4 / 2**30
    assert states < one < four < 4 * one  # weights, gradients, Adam's two; activations


def test_the_largest_micro_batch_that_fits():
    rows = [(8, "", 40.0), (4, "--n 2", 9.0), (2, "--n 4", 5.0),
            (8, "--checkpointing", 15.0), (4, "--n 2 --checkpointing", 8.0), (2, "--n 4 --checkpointing", 4.0)]
    assert [memory.best(rows, card) for card in (5, 8, 12, 24, 80)] == [
        ("", "does not fit"), ("--n 4", "5.0"), ("--n 2", "9.0"), ("--n 2", "9.0"), ("", "40.0")]
    assert memory.best([rows[2], rows[3]], 24) == ("--checkpointing", "15.0")  # more than twice as large
    assert memory.best([rows[1], (8, "--checkpointing", 8.0)], 24) == ("--checkpointing", "8.0")  # twice, in less
