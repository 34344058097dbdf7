"""Exercise of data/results/codiff.md. Write `wavelet`, then: python -m pytest tests/exercises/test_codiff.py"""

import pytest
import torch


def wavelet(x, reference, levels=5):
    """x (B, C, h, w) with the low frequencies, and so the colours, of `reference`. Level i = 0, 1, ... blurs with
    (1, 2, 1) / 4 along both axes, its taps 2^i pixels apart, edges replicated; what all levels take away is detail."""
    raise NotImplementedError("this is what you write")


def checkerboard(size=64):
    i = torch.arange(size)
    return (1.0 - 2 * ((i[:, None] + i) % 2)).expand(1, 3, size, size)


def test_a_picture_keeps_what_it_has():
    x = torch.rand(2, 3, 40, 50)
    assert torch.allclose(wavelet(x, x), x, atol=1e-5)


def test_a_colour_comes_from_the_reference():
    x, colour = torch.rand(1, 3, 40, 50), torch.tensor([0.2, -0.3, 0.5]).view(1, 3, 1, 1)
    assert torch.allclose(wavelet(x, x + colour), x + colour, atol=1e-5)


def test_detail_comes_from_the_picture():
    x, flat = checkerboard(), torch.full((1, 3, 64, 64), 0.25)
    inside = (..., slice(8, -8), slice(8, -8))
    assert torch.allclose(wavelet(x, flat, 3)[inside], (x + 0.25)[inside], atol=1e-5)  # one blur takes all of it away
    assert torch.allclose(wavelet(flat, x, 3)[inside], torch.zeros(1), atol=1e-5)


def test_it_is_linear():
    x, y = torch.rand(2, 1, 3, 32, 32)
    assert torch.allclose(wavelet(x, y), wavelet(x, 0 * y) + wavelet(0 * x, y), atol=1e-5)


@pytest.mark.parametrize("levels, far", [(1, 1), (3, 7)])
def test_levels_reach_further_and_further(levels, far):
    x = torch.zeros(1, 1, 65, 65)
    x[..., 32, 32] = 1  # levels reach 1 + 2 + 4 + ... pixels
    seen = wavelet(0 * x, x, levels)[0, 0, 32].nonzero().flatten()
    assert (seen.min().item(), seen.max().item()) == (32 - far, 32 + far)
