"""Exercise of data/results/moe_diffir.md. Write `loss_balance`, then: python -m pytest tests/exercises/test_moe_diffir.py"""

import pytest
import torch

from moe_diffir import top_k_gates


def loss_balance(gates):
    """Squared coefficient of variation (variance / mean^2, both over the N experts) of the experts' importance, the sum
    of their gates (.., N) over all positions of a batch (Shazeer et al. 2017, Sec. 4): 0 if all are used alike."""
    raise NotImplementedError("this is what you write")


def test_experts_used_alike_cost_nothing():
    assert loss_balance(torch.eye(7)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("n", [2, 7])
def test_one_expert_for_all_costs_n_minus_1(n):
    gates = torch.zeros(5, n)
    gates[:, 1] = 1
    assert loss_balance(gates).item() == pytest.approx(n - 1, rel=1e-4)


def test_how_many_pictures_does_not_matter():
    gates = torch.rand(6, 7)
    assert loss_balance(gates.repeat(3, 1)).item() == pytest.approx(loss_balance(gates).item(), rel=1e-4)


def test_a_step_along_it_evens_them_out():
    torch.manual_seed(0)
    logits = (torch.randn(64, 7) + torch.tensor([3.0, 0, 0, 0, 0, 0, 0])).requires_grad_(True)
    before = loss_balance(top_k_gates(logits, 3))
    before.backward()
    assert loss_balance(top_k_gates((logits - 20 * logits.grad).detach(), 3)) < before
