"""What eval and profile measure, in closed form: data/results/evaluate.py, complexity.py, tables.py."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data.files import list_images
from data.results.complexity import macs
from data.results.evaluate import Metrics, block_grid, detail, psnr_b
from data.results.tables import mean, read_all


def test_psnr_b_is_psnr_without_blocks_and_lower_with_them():
    flat = torch.full((1, 1, 64, 64), 100.0)
    assert psnr_b(flat + 5, flat) == pytest.approx(10 * np.log10(255**2 / 25), abs=1e-4)
    blocks = flat + 5 * (-1) ** (torch.arange(64) // 8).view(1, 1, 1, 64)
    assert psnr_b(blocks, flat) < psnr_b(flat + 5, flat) - 1


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
