"""OSCAR's released checkpoint, converted, against what the released code computes on the same weights."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import oscar
from data import convert
from data.files import ROOT, UserError

sys.path.append(str(ROOT / "tests" / "oracles"))
from fill import fill_value  # noqa: E402
from release import save_base, unet_lora  # noqa: E402

EXPECTED = np.load(ROOT / "tests" / "oracles" / "oscar_64x128.npz")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """(folder, oscar.pkl): weights filled from their names, keys as released. Bases: folder / prediction."""
    folder = tmp_path_factory.mktemp("release")
    unet, _ = (save_base(folder / prediction, prediction) for prediction in ("v_prediction", "epsilon"))
    torch.save({"hyper_encoders": hyper_encoders(), "embeddings": fill_value("embeddings", (77, 1024)),
                "rank_unet": 16, "unet_lora_encoder_modules": ["conv_in"],
                "state_dict_unet": unet_lora(unet[0], 0.0)}, folder / "oscar.pkl")
    return folder, folder / "oscar.pkl"


def hyper_encoders() -> dict:
    """Under the release's names: conv for our Residual and ReLU; codebooks with a leading dimension of 1."""
    weights = {}
    for k, v in oscar.HyperEncoders(oscar.Stage1.paper(), 4).state_dict().items():
        if k.endswith("gain"):  # ours
            continue
        code = k.endswith(("embed", "embed_avg", "cluster_size"))
        key = k.replace("quantizer.", "quantizer._codebook.") if code else re.sub(
            r"(conv_[ab]\.\d)\.0\.layers\.", r"\1.conv.", k)
        weights[key] = fill_value(f"hyper_encoders.{key}", (1, *v.shape) if code else v.shape)
        weights[f"{k.split('.')[0]}.quantizer._codebook.initted"] = torch.ones(1)
    return weights


def converted(pkl, base, out):
    convert.main(["oscar", str(pkl), "--out", str(out), "--base", str(base)])
    return out


@pytest.fixture(scope="module")
def runs(release, tmp_path_factory):
    """{prediction: the release, converted}."""
    out = tmp_path_factory.mktemp("runs")
    return {p: converted(release[1], release[0] / p, out / p) for p in ("epsilon", "v_prediction")}


@pytest.mark.parametrize("prediction, prefix", [("epsilon", "eps"), ("v_prediction", "v")])
def test_a_released_checkpoint_computes_what_the_release_computes(runs, prediction, prefix):
    G = oscar.load(runs[prediction])
    assert G.true_norms and G.t == list(oscar.RELEASED_T)
    x = torch.from_numpy(EXPECTED["image_uint8"]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        z_0 = G.sd.encode(x)
        assert np.abs(z_0.numpy() - EXPECTED["latent"]).max() < 1e-3
        rms = z_0.square().mean((0, 2, 3)).sqrt()
        for r, Q in enumerate(G.hyper_encoders):
            idx = Q.encode(z_0)
            assert np.array_equal(idx.flatten(1).numpy(), EXPECTED[f"{r}_idx"]), r
            z_hat = G.denoise(Q.decode(idx, rms), r)
            assert np.abs(z_hat.numpy() - EXPECTED[f"{prefix}_{r}_x0"]).max() < 1e-3, r
            if f"{prefix}_{r}_output" in EXPECTED:
                x_hat = G.sd.decode(z_hat).clamp(-1, 1).numpy()
                assert np.abs(x_hat - EXPECTED[f"{prefix}_{r}_output"]).max() < 1e-3


def test_files_of_a_released_model_carry_its_norms(runs, tmp_path):
    weights = ["--weights", str(runs["epsilon"])]
    Image.fromarray(EXPECTED["image_uint8"][0]).save(tmp_path / "a.png")
    oscar.main(["compress", str(tmp_path / "a.png"), str(tmp_path / "a.oscar"), "--bpp", "0.1250", *weights])
    assert len((tmp_path / "a.oscar").read_bytes()) <= 64 * 128 * 0.125 / 8 + 20
    oscar.main(["decompress", str(tmp_path / "a.oscar"), str(tmp_path / "b.png"), *weights])
    got = np.asarray(Image.open(tmp_path / "b.png")).astype(float)
    released = (EXPECTED["eps_7_output"][0].transpose(1, 2, 0) + 1) * 127.5
    assert np.abs(got - released).mean() < 2  # the norms are a percent off


@pytest.mark.parametrize("change, says", [
    (lambda c: c["hyper_encoders"].update({"0.backbone.4.attn.in_proj_weight": torch.ones(1)}), "first rel"),
    (lambda c: c.pop("embeddings"), "embeddings is missing"),
    (lambda c: c.update(embeddings=3), "embeddings is missing"),
    (lambda c: c.pop("state_dict_unet"), "state_dict_unet is missing"),
    (lambda c: c["hyper_encoders"].pop("3.proj.12.bias"), "3.proj.12.bias"),
    (lambda c: c["state_dict_unet"].pop("conv_out.lora_A.default_decoder.weight"), "oscar.pkl: .*conv_out")])
def test_a_checkpoint_that_does_not_fit_is_refused(release, tmp_path, change, says, monkeypatch):
    content = torch.load(release[1], weights_only=True, mmap=True)
    change(content)
    monkeypatch.setattr(convert, "load_pickle", lambda path: content)
    with pytest.raises(UserError, match=says):
        converted(release[1], release[0] / "epsilon", tmp_path / "run")
    assert not (tmp_path / "run").exists()
