"""The weights that ship: each loads with the bundled base, and does its job on photographs new to it."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchvision.transforms.functional import gaussian_blur

import codiff
import sodiff
from common import PHOTOS, jpeg, to_tensor
from data import convert, files
from data.files import ROOT, SHIPPED, load_tensors
from data.pictures import read_image
from data.quality import WORSE
from data.results.evaluate import results_of

CAT = read_image(PHOTOS / "val" / "chelsea.png")[0].crop((100, 40, 356, 296))


def psnr(image) -> float:
    return peak_signal_noise_ratio(*(to_tensor(x)[None] for x in (image, CAT)), data_range=2.0).item()


def over_blurred_jpeg(restored, lq) -> float:
    return psnr(restored) - psnr(gaussian_blur(lq, 7, 0.8))


def test_they_are_named_and_small():
    folders = sorted(f for f in SHIPPED.iterdir() if f.is_dir())
    text = (SHIPPED / "README.md").read_text()
    for folder in folders:
        own = [f for f in folder.rglob("*") if f.is_file()]
        assert f"`{folder.name}/`" in text and sum(f.stat().st_size for f in own) <= 6e6
        headers = [load_tensors(f)[1] for f in own if f.suffix == ".safetensors"]
        assert headers and all((h["script"], h["base"]) == (folder.name, "data/tiny-sd") for h in headers)


def test_measuring_them_leaves_their_folder_as_it_is(monkeypatch):
    monkeypatch.chdir(ROOT)  # from where their folder is named in the README
    for weights in (Path("data/weights/codiff"), SHIPPED / "codiff"):
        assert results_of(SimpleNamespace(weights=weights)) == ROOT / "runs" / "codiff-shipped"


@pytest.mark.parametrize("script", sorted(f.name for f in SHIPPED.iterdir() if f.is_dir()))
def test_they_restore_better_than_blurring(script):
    script = importlib.import_module(script)
    model = script.load(SHIPPED / script.__name__)
    if script.__name__ == "oscar":
        by_rate = [psnr(script.decompress(model, script.compress(model, CAT, r))) for r in (2, 7)]
        assert by_rate[1] > by_rate[0] + 1 and by_rate[1] > psnr(jpeg(CAT, 1))
    else:
        lq = jpeg(CAT, 5)
        restored = script.restore(model, lq)
        assert over_blurred_jpeg(restored[0] if isinstance(restored, tuple) else restored, lq) > 0.5


@pytest.mark.parametrize("script", [codiff, sodiff])
def test_where_the_jpeg_is_better_they_say_so(script):
    args = SimpleNamespace(weights=SHIPPED / script.__name__, base=None, tile=None, color_fix="adain")
    restore = script.restorer(args)
    photo = CAT.crop((100, 40, 260, 200))
    for qf, worse in ((5, False), (90, True)):
        lq = jpeg(photo, qf)
        restored, remark = restore(lq)
        before, after = (np.square(np.subtract(i, photo, dtype=float)).mean() for i in (lq, restored))
        assert (WORSE in remark) == worse == (after > before)


def test_a_run_in_half_precision_restores_the_same(trained, tmp_path, monkeypatch, capsys):
    run, half = trained("codiff"), tmp_path / "weights" / "codiff"
    convert.main(["half", str(run.folder), "--out", str(half)])
    monkeypatch.setattr(files, "SHIPPED", tmp_path / "weights")
    model = codiff.load(half)
    assert "the weights that ship" in capsys.readouterr().err
    lq = jpeg(read_image(PHOTOS / "val" / "flower.jpg")[0].crop((0, 0, 96, 96)), 5)
    a, b = (np.asarray(codiff.restore(m, lq), float) for m in (run.model, model))
    assert np.abs(a - b).mean() < 0.5
    one, two = (sum(p.stat().st_size for p in (f / "model").rglob("*")) for f in (half, run.folder))
    assert one < 0.55 * two


def test_no_configuration_of_a_base_names_a_folder_of_the_machine_that_made_it():
    configs = [*(ROOT / "data").rglob("config.json"), *(ROOT / "data").rglob("*_config.json")]
    assert len(configs) >= 8
    for path in configs:
        texts = [v for v in json.loads(path.read_text()).values() if isinstance(v, str)]
        assert not any(text.startswith("/") for text in texts), path
