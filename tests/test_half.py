"""CUDA's path on the CPU: training under autocast and inference in half precision, against float32."""

import importlib
import json
import shutil
from functools import partial

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import common
from conftest import CAT, SCRIPTS, AnywhereHalf, rows_of, train_args
from data import speed
from data.runs import Run
from data.tiles import Tiles, untiled

DTYPES = torch.float32, torch.bfloat16, torch.float16
STAGES = ["--s1-steps", 2, "--s2-steps", 2, "--s1-accumulate", 2, "--s2-accumulate", 2]
# Rounding gives 1 to 3 of OSCAR's 64 positions another code, hence its larger crop.
FLAGS = {"codiff": ["--s2-checkpointing", "--s1-widths", "16,16,24,32", "--s2-lr", 6e-4],
         "sodiff": ["--s2-checkpointing"],
         "oscar": ["--s2-checkpointing", "--s2-crop", 128, "--s2-batch", 4, "--s1-lr", 1e-3, "--s1-ema", 0.9,
                   "--s1-lambda-z", 1],
         "moe_diffir": ["--cache-latents", 4, "--codecs", "jpeg"]}
LOSSES = 0.02  # relative, in a stage's first step; then comes Adam, which takes a gradient's mere sign
COSINES = ("sim", "repa")  # OSCAR's; at first about 0
LEVELS = {"oscar": 5.0}  # of 255, on average, between pictures of the same weights; others' 1


@pytest.fixture(scope="module", params=SCRIPTS)
def trained_thrice(request, tmp_path_factory):
    """(script, {dtype: folder of a run of 2 + 2 steps}). Stage 2 begins in all of them from float32's stage 1:
    else it would inherit what two steps of Adam make of rounding."""
    script, folders = importlib.import_module(request.param), {}
    photos = tmp_path_factory.mktemp("photos")
    CAT.crop((100, 40, 292, 168)).save(photos / "cat.png")
    (photos / "captions.jsonl").write_text('{"file": "cat.png", "caption": "a cat"}\n')
    for dtype in DTYPES:
        folders[dtype] = tmp_path_factory.mktemp(request.param) / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(speed, "dtype", lambda: dtype)
            patch.setattr(accelerate, "Accelerator", AnywhereHalf)
            patch.setattr(Run, "evaluate", lambda *_: None)
            more = [*STAGES, *FLAGS[request.param], "--data", photos]
            more += ["--s2-steps", 1] * (dtype is torch.float16)  # CPUs are slow at it
            for stage in (1, 2):
                AcceleratorState._reset_state()  # a process of its own keeps its precision
                script.main(train_args(request.param, folders[dtype], photos, "--stage", stage, *more))
                if stage == 1 and dtype is not torch.float32:
                    for name in ("last/stage1.safetensors", "model/stage1.safetensors", "model/mapping.json"):
                        if (folders[torch.float32] / name).exists():
                            shutil.copy(folders[torch.float32] / name, folders[dtype] / name)
    AcceleratorState._reset_state()
    return script, folders


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_training_under_autocast_follows_float32(trained_thrice, dtype):
    script, folders = trained_thrice
    exact, low = rows_of(folders[torch.float32]), rows_of(folders[dtype])
    steps = [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [(row["stage"], row["step"]) for row in low] == steps[:len(steps) - (dtype is torch.float16)]
    for a, b in zip(exact, low):
        rel, own = LOSSES * (1 if a["step"] == 0 else 10), {k: v for k, v in a.items() if "@" not in k}
        assert {k: pytest.approx(v, rel=rel, abs=3e-3 if k in COSINES else 1e-4) for k, v in own.items()} == {
            k: b[k] for k in own}
    for stage in (1, 2):  # float16's small gradients come unscaled, and zeros are zeros
        norms = [json.loads((folders[kind] / f"ledger-stage{stage}.json").read_text())["norms"]
                 for kind in (torch.float32, dtype)]
        assert norms[0] == {term: {k: pytest.approx(norm, rel=0.3, abs=0) for k, norm in row.items()}
                            for term, row in norms[1].items()}
    assert script.__name__ != "codiff" or exact[:2] == low[:2]  # CaVE's L1 losses: float32 on CUDA as well


@pytest.mark.parametrize("half, tile", [(torch.bfloat16, None), (torch.bfloat16, 128), (torch.float16, None)])
def test_inference_in_half_precision_follows_float32(trained_thrice, half, tile, monkeypatch):
    (script, folders), photo, pictures = trained_thrice, common.jpeg(CAT.crop((100, 60, 270, 110)), 10), []
    for dtype in (torch.float32, half):
        monkeypatch.setattr(speed, "dtype", lambda: dtype)
        model = script.load(folders[torch.float32])
        assert next(model.sd.unet.parameters()).dtype == dtype and model.sd.alpha_bar.dtype == torch.float32
        tiles_for = partial(Tiles, model, tile=tile) if tile else untiled
        if script.__name__ == "oscar":
            picture = script.decompress(model, script.compress(model, photo, 2, tiles_for), tiles_for)
        else:
            picture = script.restore(model, photo, tiles=tiles_for(photo.size, model.cell))
        pictures.append(np.asarray(picture[0] if isinstance(picture, tuple) else picture).astype(float))
    difference = np.abs(np.subtract(*pictures)).mean()
    assert pictures[1].shape == (50, 170, 3) and difference < LEVELS.get(script.__name__, 1.0)
