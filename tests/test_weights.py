"""The weights that ship: each loads with the bundled base and does its job on photographs that nothing was trained on."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchvision.transforms.functional import gaussian_blur

from common import PHOTOS, ROOT, jpeg, load_tensors, read_image, to_tensor
from data.files import SHIPPED
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
        files = [f for f in folder.rglob("*") if f.is_file()]
        assert f"`{folder.name}/`" in text and sum(f.stat().st_size for f in files) <= 6e6
        headers = [load_tensors(f)[1] for f in files if f.suffix == ".safetensors"]
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
