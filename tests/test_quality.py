"""Where restoring makes a picture worse, and that it is said: data/quality.py, data/results/quality.py."""

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from codiff import CaVE
from common import spread_crops, to_tensor
from conftest import CAT
from data.files import UserError
from data.pictures import restore_files
from data.quality import RECORD, WORSE, remarks
from data.results import quality
from data.results.evaluate import jpegs

PHOTO = CAT.crop((100, 40, 161, 93))


def psnr(a, b) -> float:
    return peak_signal_noise_ratio(*((to_tensor(i) + 1) / 2 for i in (a, b)), data_range=1.0).item()


def jpeg(image: Image.Image, qf: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=qf)
    return Image.open(file)


# ---- measured


def test_the_bound_has_the_highest_mean_of_all_there_are():
    rng = np.random.default_rng(0)
    for _ in range(20):
        qf_hat = rng.permutation(30).astype(float)
        gain = (12 - qf_hat) / 6 + rng.normal(0, 1, 30)
        best = max(range(-1, 30), key=lambda top: sum(g for q, g in zip(qf_hat, gain) if q <= top))
        assert quality.pays_up_to(qf_hat, gain) == best
    assert quality.pays_up_to(qf_hat, -np.ones(30)) == 0 and quality.pays_up_to(qf_hat, np.ones(30)) == 100


def test_gains_are_differences_of_psnr(tmp_path, monkeypatch):
    """A model that is one level off everywhere, and says 7; one that returns the original has no gain."""
    for name, image in (("a", PHOTO), ("b", PHOTO.rotate(90)), ("blank", Image.new("RGB", (16, 16)))):
        image.save(tmp_path / f"{name}.png")
    off = np.asarray(PHOTO).astype(int)
    off = Image.fromarray((off + np.where(off < 255, 1, -1)).astype(np.uint8))
    monkeypatch.setattr(quality, "QFS", (5, 90))
    rows = quality.measure(lambda lq: (off, 7.0), [tmp_path / "a.png"])
    expected = [psnr(off, PHOTO) - psnr(jpeg(PHOTO, qf), PHOTO) for qf in (5, 90)]
    assert rows[:, :2].tolist() == [[5, 7], [90, 7]]
    assert rows[:, 2].tolist() == pytest.approx(expected, abs=1e-3)
    with pytest.raises(UserError, match="a.png: none of 1 images can be measured"):
        quality.measure(lambda lq: (PHOTO, 7.0), [tmp_path / "a.png"])
    with pytest.raises(UserError, match="do not predict"):
        quality.measure(lambda lq: (PHOTO, None), [tmp_path / "a.png"])


def test_the_record_is_a_curve_by_predicted_qf_and_a_table_by_true():
    rows = np.array([[5, 4, 2.0], [10, 3, 1.0], [20, 11, 0.5], [30, 13, -1.5], [30, 31, -4.0]])
    record = quality.record_of(rows)
    assert (record["pays up to"], record["right"], record["JPEGs"]) == (11, 1, 5)
    assert (record["predicted QF"], record["gain"]) == ([3.5, 12, 31], [1.5, -0.5, -4])
    assert record["by QF"] == {"QF": [5, 10, 20, 30], "predicted QF": [4, 3, 11, 22],
                               "gain": [2, 1, 0.5, -2.75]}
    header, lines = quality.table_of(record)
    assert header == ["QF", "5", "10", "20", "30"]
    assert lines[1] == ["PSNR gained", "+2.0", "+1.0", "+0.5", "-2.8"]


def test_what_is_measured_lies_beside_the_weights(trained, photos, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained("sodiff").folder / "model", tmp_path / "model")
    monkeypatch.setattr(quality, "QFS", (5, 90))
    quality.main(["sodiff", "--weights", str(tmp_path), "--data", str(photos)])
    assert "which is right for" in capsys.readouterr().out
    record = json.loads((tmp_path / RECORD).read_text())
    gains = record["by QF"]["gain"]
    assert record["JPEGs"] == 4 and gains[0] > gains[1] and remarks(tmp_path)(0.0) == ""
    with pytest.raises(SystemExit):
        quality.main(["oscar"])
    assert "invalid choice: 'oscar'" in capsys.readouterr().err


# ---- said


def recorded(folder, **changes):
    record = {"pays up to": 20, "predicted QF": [10, 30, 50], "gain": [1.0, -1.0, -5.0]} | changes
    (folder / RECORD).parent.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def test_a_remark_tells_the_loss_above_the_bound_alone(tmp_path):
    assert remarks(tmp_path)(95.0) == ""  # no record: no opinion
    remark = remarks(recorded(tmp_path))
    assert remark(None) == remark(20.0) == ""
    for qf_hat, loss in ((20.5, 0.1), (40.0, 3.0), (95.0, 5.0)):
        assert remark(qf_hat) == f", above QF 20: about {loss} dB {WORSE}"


@pytest.mark.parametrize("changes", [{"pays up to": None}, {"gain": "x"}, {"gain": [1.0]}, {"gain": []}])
def test_a_foreign_record_is_named(tmp_path, changes):
    with pytest.raises(UserError, match="quality.json: not as data.results.quality writes it"):
        remarks(recorded(tmp_path, **changes))


def test_a_folder_is_told_once_whatever_fails(tmp_path, capsys):
    for i in range(4):
        PHOTO.save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_text("no picture")
    qfs, remark = iter((10.0, 40.0, 90.0)), remarks(recorded(tmp_path))
    pairs = [(tmp_path / f"{i}.png", tmp_path / "out" / f"{i}.png") for i in range(4)]
    with pytest.raises(UserError, match="1 of 4"):
        restore_files(pairs, lambda image: (image, remark(next(qfs))))
    said = capsys.readouterr()
    assert said.out.count(WORSE) == 2 and said.err.count(f"2 of 3 restored pictures: {WORSE}") == 1
    restore_files(pairs[:1], lambda image: (image, remark(10.0)))
    assert WORSE not in "".join(capsys.readouterr())


# ---- seen by CaVE


def test_crops_are_spread_over_the_picture_on_jpegs_grid():
    places = torch.arange(300 * 90).view(300, 90)  # row by row
    image = Image.fromarray(np.stack([places // 256, places % 256, 0 * places], -1).astype(np.uint8))
    crops = ((spread_crops(image, 64) + 1) * 127.5).round().long()
    assert crops.shape == (8, 3, 64, 64)
    first = crops[:, 0, 0, 0] * 256 + crops[:, 1, 0, 0]
    tops, lefts = first // 90, first % 90
    assert set(tops.tolist()) == {0, 80, 160, 240} and set(lefts.tolist()) == {0, 64}
    assert spread_crops(image.crop((0, 0, 5, 3)), 64).shape == (1, 3, 64, 64)
    assert len(spread_crops(Image.new("RGB", (1500, 1000)), 64)) == 16


def test_caves_qf_is_the_mean_over_crops():
    cave = CaVE((8, 8, 16, 16), 1, 64).initialise(1.0, 0.0).eval()
    q_hat, _ = cave((spread_crops(PHOTO, 64) + 1) / 2)
    assert cave.qf(PHOTO) == pytest.approx(100 * (1 - q_hat.mean().item()), abs=1e-3)


# ---- JPEGs of JPEGs


def test_a_double_jpeg_is_of_the_first_one_cut():
    args = SimpleNamespace(qf=[10, 50], double=[30], shift=4)
    conditions = jpegs(args)
    assert [*conditions] == ["JPEG QF 30 then 10 off by 4", "JPEG QF 30 then 50 off by 4"]
    cut = Image.fromarray(np.asarray(jpeg(PHOTO, 30))[4:, 4:])
    for condition, qf in zip(conditions.values(), args.qf):
        assert np.array_equal(condition(PHOTO, None), jpeg(cut, qf))
    args.double = []
    once, _ = jpegs(args).values()
    assert np.array_equal(once(PHOTO, None), np.asarray(jpeg(PHOTO, 10))[4:, 4:])
    assert once(PHOTO.crop((0, 0, 3, 9)), None).size == (1, 5)
    args.shift = 0
    assert [*jpegs(args)] == ["JPEG QF 10", "JPEG QF 50"]
    assert np.array_equal(jpegs(args)["JPEG QF 10"](PHOTO, None), jpeg(PHOTO, 10))
