"""What the training loops hand on: to losses, encoders, the discriminator and the optimizers."""

import accelerate
import pytest
import torch

from codiff import CaVE
from common import SD, Discriminator
from conftest import SCRIPTS, before_stage_2, rows_of, train_args
from data.files import load_tensors
from data.runs import Run
from moe_diffir import MoEDiffIR

# {loss: (which argument, what it must be)} of each stage; a pair (x_lq, x_hq) is twice x for the codec
TARGETS = {"codiff": ({"loss_rec": (1, lambda lq, hq: (hq + 1) / 2)}, {"loss_2": (1, lambda lq, hq: hq)}),
           "sodiff": ({"loss_rec": (1, lambda lq, hq: hq)},
                      {"loss_mse": (1, lambda lq, hq: hq), "loss_ea": (2, lambda lq, hq: hq)}),
           "oscar": ({}, {"loss_mse": (1, lambda lq, hq: hq), "loss_ea": (2, lambda lq, hq: hq)}),
           "moe_diffir": ({}, {"loss_decoder": (2, lambda lq, hq: hq)})}


@pytest.fixture
def record(monkeypatch):
    """record(owner, name): the calls of a function from now on, a pair (arguments, result) each."""
    def recorded(owner, name):
        calls, real = [], getattr(owner, name)

        def called(*args, **more):
            calls.append((args, real(*args, **more)))
            return calls[-1][1]
        monkeypatch.setattr(owner, name, called)
        return calls
    return recorded


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_is_fed_with_what_it_should(name, stage, trained, photos, tmp_path, monkeypatch, record):
    run, rates, batches = trained(name), {}, []
    script, real, finish = run.script, Run.batches, Run.finish

    def seen(*args):
        for step, batch in real(*args):
            batches.append(batch)
            yield step, batch

    def finished(self, *args, **more):
        rates.update({k: o.param_groups[0]["lr"] for k, o in self.optimizers.items()})
        return finish(self, *args, **more)
    monkeypatch.setattr(Run, "batches", seen)
    monkeypatch.setattr(Run, "finish", finished)
    compared = {loss: record(script, loss) for loss in TARGETS[name][stage - 1]}
    encoded = record(MoEDiffIR if (name, stage) == ("moe_diffir", 2) else SD, "encode")
    embedded, sums = record(CaVE, "forward"), record(accelerate.Accelerator, "backward")
    judged = record(Discriminator, "forward")
    told = record(script, "loss_D") if hasattr(script, "loss_D") else []
    out = tmp_path / "run" if stage == 1 else before_stage_2(run, tmp_path / "run")
    script.main(train_args(name, out, photos, "--stage", stage, f"--s{stage}-steps", 1))

    (_, lq, *hq), = batches
    hq = lq if name == "oscar" else hq[0]
    for loss, (at, wanted) in TARGETS[name][stage - 1].items():
        assert torch.equal(compared[loss][0][0][at], wanted(lq, hq)), loss
    if (name, stage) == ("codiff", 1):
        assert torch.equal(embedded[0][0][1], (lq + 1) / 2)  # as inference does
    elif (name, stage) == ("moe_diffir", 2):
        assert torch.equal(encoded[-1][0][1], lq)  # what the compensator may see
        std = load_tensors(out / "model" / "stage2.safetensors")[0]["std1"]
        assert not torch.equal(std, torch.ones_like(std))  # measured
    elif name != "sodiff" or stage == 2:
        of = (lq,) if name == "oscar" else (lq, hq)
        assert all(torch.equal(args[1], x) for (args, _), x in zip(encoded, of))
    if (name, stage) == ("oscar", 1):  # Eq. 8, and lengths; the row has means of eight rates
        row, = rows_of(out)
        total = 8 * (row["sim"] + row["vq"] + script.Stage1().lambda_z * row["z"])
        assert sums[0][0][1].item() == pytest.approx(total, rel=1e-4)

    cfg = (script.Stage1, script.Stage2)[stage - 1]()
    lr = {"adam": cfg.lr, "opt_G": cfg.lr, "opt_D": getattr(cfg, "lr_D", None)}
    assert rates and all(rate == pytest.approx(lr[k]) for k, rate in rates.items())

    if told and stage == 2:  # D's real and fake ones
        ((_, z_hat, *_), _), ((_, z, *_), logits), *_ = judged
        fake, true = told[0][0]
        assert torch.equal(fake, logits[:2]) and torch.equal(true, logits[2:])
        if name != "sodiff":  # whose D sees them noised
            z_H = encoded[name == "codiff"][1].float()
            assert torch.equal(z[:2], z_hat) and torch.equal(z[2:], z_H)
