"""Exercise of data/results/oscar.md. Write `ideal_bits`, then: python -m pytest tests/exercises/test_oscar.py"""

import math

import pytest
import torch


def ideal_bits(idx, counts):
    """Bits that an ideal entropy coder takes for the indices idx (any shape, integers), if it expects code k as often
    as training saw it, `counts` (V,), and one time more, so that none is impossible."""
    raise NotImplementedError("this is what you write")


def test_codes_all_alike_take_what_the_format_takes():
    idx = torch.randint(64, (3, 5, 7))
    assert float(ideal_bits(idx, torch.full((64,), 9.0))) == pytest.approx(idx.numel() * 6)


def test_closed_form():
    """Seen 6 and 0 times: expected with probabilities 7/8 and 1/8."""
    bits = ideal_bits(torch.tensor([0, 0, 1]), torch.tensor([6.0, 0.0]))
    assert float(bits) == pytest.approx(2 * math.log2(8 / 7) + 3)


def test_it_pays_where_some_codes_are_rare():
    torch.manual_seed(0)
    p = torch.tensor([0.7, 0.2, 0.05, 0.05])
    idx = torch.multinomial(p, 10_000, replacement=True)
    entropy = -(p * p.log2()).sum().item()
    assert float(ideal_bits(idx, 1e6 * p)) / 10_000 == pytest.approx(entropy, abs=0.02) and entropy < 2


def test_nothing_takes_no_bits():
    assert float(ideal_bits(torch.zeros(0, dtype=torch.long), torch.ones(4))) == 0
