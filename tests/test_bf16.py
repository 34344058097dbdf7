"""CUDA's path without CUDA: training under bf16 autocast and inference in bf16, on the CPU, against float32."""

import importlib
import json

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import common
from common import PHOTOS, read_image

STAGES = ["--s1-steps", 2, "--s2-steps", 2, "--s1-batch", 2, "--s2-batch", 2, "--s1-accumulate", 2, "--s2-accumulate", 2,
          "--s1-crop", 64, "--s2-crop", 64]
FLAGS = {"codiff": ["--s2-checkpointing", "--s1-widths", "16,16,24,32"], "sodiff": ["--s2-checkpointing", "--s1-width", 24, "--s2-widths", "16,16,16,32"],
         "oscar": ["--s2-checkpointing", "--s2-crop", 128, "--s1-lr", 1e-3, "--s1-ema", 0.9, "--s1-lambda-z", 1, "--s1-N", 16, "--s1-M", 16, "--s1-D", 8, "--s1-measure", 8],
         "moe_diffir": ["--s1-width", 16, "--s1-heads", 2, "--s2-sampling", "1", "--cache-latents", 4, "--codecs", "jpeg"]}
LOSSES = 0.02  # relative, in a stage's first step; the second comes after Adam, which takes even the smallest gradient's sign
COSINES = ("sim", "repa")  # OSCAR's; at first about 0. Rounding gives 1 to 3 of 64 positions another code, hence its larger crop
LEVELS = {"codiff": 1.0, "sodiff": 1.0, "oscar": 5.0, "moe_diffir": 1.0}  # of 255, on average, between pictures of the same weights


@pytest.fixture(scope="module", params=FLAGS)
def trained(request, tmp_path_factory):
    """(script, {dtype: folder of a run of 2 + 2 steps}, {dtype: what it printed})."""
    script, folders = importlib.import_module(request.param), {}
    photos = tmp_path_factory.mktemp("photos")
    read_image(PHOTOS / "val" / "chelsea.png")[0].crop((100, 40, 292, 168)).save(photos / "cat.png")
    (photos / "captions.jsonl").write_text('{"file": "cat.png", "caption": "a cat"}\n')
    for dtype in (torch.float32, torch.bfloat16):
        folders[dtype] = tmp_path_factory.mktemp(request.param) / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "INFERENCE_DTYPE", dtype)
            for costly in ("evaluate", "gradients"):  # neither changes what is trained
                patch.setattr(common.Run, costly, lambda *_, **terms: None)
            AcceleratorState._reset_state()  # a process of its own keeps its precision
            script.main([*map(str, ("train", "--data", photos, "--out", folders[dtype], *STAGES, *FLAGS[request.param]))])
    AcceleratorState._reset_state()
    return script, folders


def test_training_under_autocast_follows_float32(trained):
    script, folders = trained
    exact, low = ([json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in folders.values())
    assert [(row["stage"], row["step"]) for row in low] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for a, b in zip(exact, low):
        own = {k: v for k, v in a.items() if "@" not in k}
        assert {k: pytest.approx(v, rel=LOSSES if a["step"] == 0 else 10 * LOSSES, abs=3e-3 if k in COSINES else 1e-4)
                for k, v in own.items()} == {k: b[k] for k in own}
    assert script.__name__ != "codiff" or exact[:2] == low[:2]  # CaVE's L1 losses are float32 on CUDA as well


@pytest.mark.parametrize("tile", [None, 128])
def test_inference_in_bf16_follows_float32(trained, tile, monkeypatch):
    script, folders = trained
    photo = common.jpeg(read_image(PHOTOS / "val" / "chelsea.png")[0].crop((100, 60, 270, 110)), 10)
    pictures = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(common, "INFERENCE_DTYPE", dtype)
        model = script.load(folders[torch.float32])
        assert next(model.sd.unet.parameters()).dtype == dtype and model.sd.alpha_bar.dtype == torch.float32
        if script.__name__ == "oscar":
            picture = script.decompress(model, script.compress(model, photo, 2, tile), tile)
        else:
            picture = script.restore(model, photo, tile=tile)
        pictures.append(np.asarray(picture[0] if isinstance(picture, tuple) else picture).astype(float))
    assert pictures[1].shape == (50, 170, 3) and np.abs(np.subtract(*pictures)).mean() < LEVELS[script.__name__]
