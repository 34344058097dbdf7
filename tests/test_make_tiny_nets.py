"""data/make_tiny_nets.py: its trainings go on, common reads what they make, pictures keep their size."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CAT
from transformers import CLIPModel, CLIPTokenizer

import common
import moe_diffir
from data import make_tiny_nets as recipe
from data.pictures import read_image


class Stub(torch.nn.Module):
    """In the teacher's place: a picture in half its size, a quarter ..."""
    def __init__(self, name):
        super().__init__()

    def forward(self, x):
        return [F.avg_pool2d(x, 2**i) for i in range(1, 6)]

    distance = recipe.Teacher.distance


@pytest.mark.parametrize("kind", ["alex", "clip", "decoder"])
def test_a_stopped_training_goes_on_bit_for_bit(kind, tmp_path, monkeypatch, capsys):
    for i in (0, 100):
        CAT.crop((i, 0, i + 260, 260)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(recipe, "Teacher", Stub)
    monkeypatch.setattr(recipe, "JUDGED", [("blur", 0.5), ("tiny-sd", 0)])
    monkeypatch.setattr(recipe, "TASKS", {"jpeg": ("5", "10", "15"), "avc": ("47", "42", "37")})
    flags = ["--data", tmp_path, "--val", tmp_path, "--steps", 2, "--pixels", 32768, "--every", 0]
    training = {"decoder": recipe.Decoding, "clip": recipe.Contrast}.get(kind, recipe.Distillation)
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


def test_a_kept_clip_sees_and_reads_as_it_was_trained(tmp_path, monkeypatch):
    """In transformers' layout, with its tokenizer; MoE-DiffIR's prior is its image encoder."""
    tokenizer = recipe.load_part(CLIPTokenizer, common.TINY_SD, "tokenizer")
    net = recipe.new_clip(tokenizer).eval()
    torch.save({"average": net.state_dict()}, tmp_path / "clip.pt")
    recipe.main(["keep", "--out", str(tmp_path), "--to", str(tmp_path / "data")])
    kept = CLIPModel.from_pretrained(folder := tmp_path / "data" / "tiny-clip").float()
    x, read = torch.rand(2, 3, 128, 128), CLIPTokenizer.from_pretrained(folder)
    ids = read("a photo", return_tensors="pt").input_ids
    monkeypatch.setattr(moe_diffir, "ROOT", tmp_path)
    with torch.no_grad():
        for name, given in (("get_image_features", x), ("get_text_features", ids)):
            own, again = (getattr(n, name)(given).pooler_output for n in (net, kept))
            assert torch.allclose(own, again, atol=0.01 * own.abs().max())
        prior = moe_diffir.Prior("tiny-clip")(x)
        own = net.vision_model(moe_diffir.clip_input(x, 128)).last_hidden_state
        assert prior.shape == (2, 257, 192) and torch.allclose(prior, own, atol=0.01 * own.abs().max())


@torch.no_grad()
def test_tiny_clip_names_the_codec_of_photographs_new_to_it():
    """Of seven, here at their middle levels; 1 / 7 would be chance."""
    folder = common.ROOT / "data" / "tiny-clip"
    net, read = CLIPModel.from_pretrained(folder).float(), CLIPTokenizer.from_pretrained(folder)
    tasks = [(codec, level) for codec, levels in recipe.TASKS.items() for level in levels]
    ids = read([recipe.codec_text(*task) for task in tasks], padding=True, return_tensors="pt").input_ids
    named = F.normalize(net.get_text_features(ids).pooler_output, dim=1)
    photos = [read_image(file)[0] for file in common.list_images([common.PHOTOS / "val"])]
    pieces = np.stack([np.asarray(photo.crop((x, 60, x + 192, 252))) for photo in photos for x in (20, 200)])
    right = []
    for codec, level in tasks[1::3]:
        x = recipe.batch(recipe.compressed(pieces, codec, level)[:, 27:155, 38:166])
        seen = net.get_image_features(moe_diffir.clip_input(x, 128)).pooler_output
        right += [tasks[i][0] == codec for i in (seen @ named.T).argmax(1).tolist()]
    assert np.mean(right) > 0.75


def test_video_codecs_tiles_are_pieces(monkeypatch):
    """65 pieces of one frame each by AVC, of two: each comes back in its place."""
    a = np.asarray(CAT.crop((0, 0, 192, 192)))
    pieces = np.stack([np.roll(a, 2 * i, axis=1) for i in range(65)])
    got = recipe.compressed(pieces, "avc", "30").astype(float)
    wrong = [np.abs(got[i] - pieces[j]).mean() for i, j in ((3, 4), (64, 0))]
    assert np.abs(got - pieces).mean((1, 2, 3)).max() < 5 < min(wrong)


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
