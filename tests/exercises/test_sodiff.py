"""Exercise of data/results/sodiff.md. Write `hard_timestep`, then: python -m pytest tests/exercises/test_sodiff.py"""

import torch

from sodiff import expected_timestep


def hard_timestep(logits, g=None):
    """tau (B,): of `logits` (B, T), with noise g if given, the timestep of the largest, in training with Eq. 11's
    gradient (the straight-through estimator)."""
    raise NotImplementedError("this is what you write")


def test_it_is_a_timestep_that_the_schedule_has():
    torch.manual_seed(0)
    logits, g = torch.randn(2, 6, 1000)
    assert torch.equal(hard_timestep(logits), logits.argmax(1).float())
    assert torch.equal(hard_timestep(logits, g), (logits + g).argmax(1).float())


def test_its_gradient_is_that_of_the_expectation():
    torch.manual_seed(1)
    a = torch.randn(4, 50, requires_grad=True)
    b = a.detach().clone().requires_grad_(True)
    weights, g = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.randn(4, 50)
    (weights * hard_timestep(a, g)).sum().backward()
    (weights * expected_timestep(b, g)).sum().backward()
    assert b.grad.abs().max() > 0 and torch.allclose(a.grad, b.grad, atol=1e-6)
