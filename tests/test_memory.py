"""GPU memory, computed on fake tensors."""

import pytest
import torch
from accelerate.state import AcceleratorState
from torch._subclasses.fake_tensor import FakeTensorMode

import codiff
from common import TINY_SD
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


def test_a_stage_runs_and_checkpointing_takes_less(monkeypatch):
    monkeypatch.setattr(memory, "SD21_CONFIG", TINY_SD)
    AcceleratorState._reset_state()  # a process of its own keeps its precision
    plain, checkpointed = (memory.peaks(codiff, codiff.Stage2(checkpointing=c), (1, 8)) for c in (False, True))
    AcceleratorState._reset_state()
    assert plain[0] < plain[1] and checkpointed[1] < plain[1]


def test_best_flags():
    rows = [(4, "", 9.0), (2, "--a 2", 5.0), (1, "--a 4", 3.0), (4, "--c", 7.0), (2, "--a 2 --checkpointing", 4.0)]
