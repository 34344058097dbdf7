"""data/make_tiny_nets.py: its trainings go on, common reads what they make, pictures keep their size."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CAT

import common
from data import make_tiny_nets as recipe


class Stub(torch.nn.Module):
    """In the teacher's place: a picture in half its size, a quarter ..."""
    def __init__(self, name):
        super().__init__()

    def forward(self, x):
        return [F.avg_pool2d(x, 2**i) for i in range(1, 6)]

    distance = recipe.Teacher.distance


@pytest.mark.parametrize("kind", ["alex", "decoder"])
def test_a_stopped_training_goes_on_bit_for_bit(kind, tmp_path, monkeypatch, capsys):
    for i in (0, 100):
        CAT.crop((i, 0, i + 260, 260)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(recipe, "Teacher", Stub)
    monkeypatch.setattr(recipe, "JUDGED", [("blur", 0.5), ("tiny-sd", 0)])
    flags = ["--data", tmp_path, "--val", tmp_path, "--steps", 2, "--pixels", 25600, "--every", 0]
    training = recipe.Decoding if kind == "decoder" else recipe.Distillation
    step = training.step

    def run(out):
        recipe.main([*map(str, (kind, *flags, "--out", tmp_path / out))])
        return torch.load(tmp_path / out / f"{kind}.pt", weights_only=True)

    def only_the_first(self, n):
        if n:
            raise KeyboardInterrupt
        return step(self, n)
    whole = run("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "step", only_the_first)
        run("stopped")
    printed = capsys.readouterr().out
    stopped = run("stopped")
    assert "step 1," in printed and "step 1," not in capsys.readouterr().out  # it did not begin anew
    for part in ("net", "average"):
        assert all(torch.equal(v, stopped[part][k]) for k, v in whole[part].items())


@pytest.mark.parametrize("kind, names", [("vgg", ["lpips", "dists"]), ("alex", ["lpips"])])
def test_common_reads_what_is_kept_and_measures_the_same(kind, names, tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = recipe.Student(kind)
    for w in net.raw.values():
        torch.nn.init.normal_(w)
    torch.save({"average": net.state_dict()}, tmp_path / f"{kind}.pt")
    recipe.main(["keep", "--out", str(tmp_path), "--to", str(tmp_path / "data")])
    monkeypatch.setattr(common, "ROOT", tmp_path)
    x = torch.stack([common.to_tensor(CAT.crop((i, i, i + 96, i + 96))) for i in (0, 100)])
    y = (x + 0.2 * torch.randn_like(x)).clamp(-1, 1)
    for name in names:
        with torch.no_grad():
            own, kept = net.metric(name == "dists")(x, y), getattr(common, name)(f"tiny-{kind}")(x, y)
        own = own * (recipe.UNIT if name == "lpips" else 1)
        assert torch.allclose(own, kept, rtol=5e-3) and own.min() > 0.01


@pytest.mark.parametrize("kind", recipe.DEGRADE)
def test_what_befalls_a_picture_leaves_its_size(kind):
    a = np.asarray(CAT.crop((0, 0, 70, 66)))
    weak, strong = (recipe.DEGRADE[kind](a, s, common.rng(0)).astype(float) for s in (0.1, 1))
    assert weak.shape == a.shape and recipe.DEGRADE[kind](a, 0.5, common.rng(0)).dtype == np.uint8
    assert 0 < np.abs(weak - a).mean() < np.abs(strong - a).mean()


def test_what_a_user_can_mend_is_one_line(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert "pip install --no-deps efficientnet_lite_pytorch" in refused(recipe.main, ["vgg"])
    assert "--pixels 9: must be at least 25600" in refused(recipe.main, ["alex", "--pixels", 9])
    assert "train one first" in refused(recipe.main, ["keep", "--out", tmp_path])
    (tmp_path / "vgg.pt").write_text("torn")
    assert "vgg.pt: not a checkpoint" in refused(recipe.main, ["keep", "--out", tmp_path])
