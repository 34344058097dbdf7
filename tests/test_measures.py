"""What eval and profile measure, in closed form: data/results/evaluate.py, complexity.py, tables.py."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import TINY_SD
from conftest import CAT
from data.files import list_images
from data.results.complexity import macs
from data.results.evaluate import DEFINITIONS, Metrics, block_grid, compare, detail, finish, luma, psnr_b
from data.results.tables import HERE, mean, read_all


def checkerboard(height: int, width: int, step: list[int]) -> torch.Tensor:
    """Blocks of 8x8, in turn 100 and `step` more in R, G and B; (1, 3, H, W)."""
    odd = torch.add(torch.arange(height)[:, None] // 8, torch.arange(width) // 8) % 2
    return 100.0 + odd * torch.tensor(step).view(1, 3, 1, 1)


@pytest.mark.parametrize("height, width", [(64, 64), (40, 96), (43, 61), (50, 17)])
def test_psnr_b_of_two_greys_in_blocks(height, width):
    """All steps but those across borders are zero, there 10: D_B = 100 borders / (FBCNN's number)."""
    flat = torch.full((1, 3, height, width), 105.0)
    assert psnr_b(flat + 5, flat) == pytest.approx(10 * math.log10(255**2 / 25), abs=1e-4)
    blocks = checkerboard(height, width, [10, 10, 10])  # 5 off everywhere
    borders = height * ((width - 1) // 8) + width * ((height - 1) // 8)
    counted = height * (width / 8 - 1) + width * (height / 8 - 1)
    factor = 3 / math.log2(min(height, width)) * 100 * borders / counted
    assert psnr_b(blocks, flat) == pytest.approx(10 * math.log10(255**2 / (25 + factor)), abs=1e-4)
    assert counted == borders or height % 8 or width % 8
    within = blocks.roll((4, 4), (2, 3))  # steps in the blocks' middle only: no effect
    assert psnr_b(within, flat) == pytest.approx(psnr_b(flat + 5, flat).item(), abs=1e-4)
    assert psnr_b(blocks[..., :15], flat[..., :15]) is None


def test_psnr_b_of_colour_has_all_channels_error_and_the_blocks_of_luma():
    x = checkerboard(64, 64, [0, 0, 90])  # luma from 16 to 235, in whole levels: 9 apart
    y = checkerboard(64, 64, [0, 0, 80])
    expected = 10 * math.log10(255**2 / ((0 + 0 + 50) / 3 + 3 / 6 * 9**2))
    assert psnr_b(x, y) == pytest.approx(expected, abs=1e-4)
    assert luma(x).max() - luma(x).min() == pytest.approx(0.114 * 90, abs=1e-4)


def test_ssim_is_the_mean_over_whole_windows():
    from scipy.signal import convolve2d
    window = np.exp(-np.arange(-5, 6)**2 / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum()**2

    def ssim(x, y):
        m_x, m_y, xx, yy, xy = (convolve2d(i, window, "valid") for i in (x, y, x * x, y * y, x * y))
        c_1, c_2 = 2.55**2, 7.65**2
        return ((2 * m_x * m_y + c_1) * (2 * (xy - m_x * m_y) + c_2)
                / ((m_x**2 + m_y**2 + c_1) * (xx - m_x**2 + yy - m_y**2 + c_2))).mean()
    rng = np.random.default_rng(0)
    metrics = Metrics()
    for height, width in ((40, 53), (11, 12)):
        x = rng.integers(0, 256, (height, width, 3), np.uint8)
        y = np.clip(x + rng.normal(0, 30, x.shape), 0, 255).astype(np.uint8)
        expected = np.mean([ssim(x[..., c].astype(float), y[..., c].astype(float)) for c in range(3)])
        found = metrics(Image.fromarray(x), Image.fromarray(y))["SSIM"]
        assert found == pytest.approx(expected, abs=1e-5)
    assert metrics(Image.new("RGB", (10, 40)), Image.new("RGB", (10, 40)))["SSIM"] is None


def test_definitions_are_in_metrics_json_and_on_the_page(tmp_path):
    finish(SimpleNamespace(weights=tmp_path), [], results={})
    found = json.loads((tmp_path / "metrics.json").read_text())["definitions"]
    assert found == DEFINITIONS and {"PSNR", "PSNR-B", "SSIM", "FID"} <= found.keys()
    page = " ".join((HERE / "measuring.md").read_text().split())
    assert all(f"{name}: {definition}" in page for name, definition in found.items())


def test_the_picture_shows_every_condition(tmp_path):
    for i in range(4):
        CAT.crop((i, i, i + 64, i + 64)).save(tmp_path / f"{i}.png")
    conditions = {f"level {i}": lambda image, _: image for i in range(3)}
    files, restore = list_images([tmp_path]), {"restored": lambda image: image}
    compare(files, conditions, restore, TINY_SD, Metrics(), tmp_path / "eval.png")
    picture = Image.open(tmp_path / "eval.png")
    assert picture.height == 18 + 6 * (64 + 6)  # two photographs
    rows = [np.asarray(picture.crop((0, 18 + 70 * i, 84, 82 + 70 * i))).tobytes() for i in range(6)]
    assert rows[0] == rows[1] and rows[2] == rows[3] and len(set(rows)) == 3  # their labels


def test_a_shifted_jpeg_is_compared_with_what_is_left(tmp_path):
    CAT.crop((0, 0, 45, 39)).save(tmp_path / "a.png")
    sizes = []

    def restore(lq):  # knows the original
        sizes.append(lq.size)
        return CAT.crop((4, 4, 45, 39))
    conditions = {"off": lambda image, _: image.crop((4, 4, 45, 39)).convert("L").convert("RGB")}
    rows = compare([tmp_path / "a.png"], conditions, {"restored": restore}, TINY_SD, Metrics(),
                   tmp_path / "eval.png", shift=4)["off"]
    assert sizes == [(41, 35)] and rows["restored"]["SSIM"] == pytest.approx(1)
    assert rows["compressed"]["PSNR"] < 40


def test_detail_is_how_much_luma_changes_from_pixel_to_pixel():
    x = torch.rand(1, 1, 20, 24)
    assert detail(x, x) == 1 and detail(0.5 * x + 3, x) == pytest.approx(0.5)
    assert detail(F.avg_pool2d(x, 3, 1), x[..., 1:-1, 1:-1]) < 0.6
    assert detail(x, torch.ones_like(x)) is None and detail(x[..., :1], x[..., :1]) is None


def test_block_grid_is_one_without_blocks_and_counts_steps_with_them():
    ramp = np.add.outer(2 * np.arange(64), 2 * np.arange(64)) % 256
    assert block_grid(Image.fromarray(ramp.astype(np.uint8)).convert("RGB"))[0] == pytest.approx(1, abs=1e-3)
    steps = np.arange(64) + 4 * (np.arange(64) // 8)  # 1 within blocks, 5 across their borders
    blocks = Image.fromarray(np.add.outer(steps, steps).astype(np.uint8)).convert("RGB")
    assert block_grid(blocks)[0] == pytest.approx(5, abs=0.05)  # Pillow rounds
    assert block_grid(Image.new("RGB", (9, 9))) == (None, None)


def test_means_are_finite_over_what_can_be_measured():
    assert mean([20.0, float("inf"), 30.0]) == 25 and mean([None, float("nan")]) is None
    assert mean([1.0, None]) == 1
    json.dumps({"mean": mean([float("inf")])}, allow_nan=False)


def test_a_picture_of_three_pixels_has_metrics():
    values = Metrics()(Image.new("RGB", (3, 9), "teal"), Image.new("RGB", (3, 9), "olive"))
    assert values["SSIM"] is None and values["PSNR"] > 0


def test_a_bad_picture_among_many_is_named_and_left_out(tmp_path, capsys):
    for name in ("a.png", "c.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xff")
    assert len(read_all(list_images([tmp_path]))) == 2 and "b.jpg" in capsys.readouterr().err


def test_macs_of_convolution_linear_and_attention():
    with torch.device("meta"):
        conv, linear = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(8, 5, bias=False)
        x, q = torch.empty(1, 3, 10, 12), torch.empty(1, 2, 20, 4)
    assert macs(lambda: conv(x)) == (10 * 12 * 8 * 3 * 9,) * 2
    assert macs(lambda: linear(conv(x).flatten(2).transpose(1, 2)))[0] == 10 * 12 * (8 * 27 + 8 * 5)
    assert macs(lambda: F.scaled_dot_product_attention(q, q, q)) == (0, 2 * 2 * 20 * 20 * 4)
