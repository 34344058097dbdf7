"""CODiff's released checkpoints, converted, against what the released code computes on the same weights."""

import contextlib
import io
import sys

import numpy as np
import pytest
import torch

import codiff
from codiff import CaVE, Stage1
from common import to_image, to_tensor
from conftest import CAT
from data import convert
from data.files import ROOT, UserError
from data.tiles import tiling

sys.path.append(str(ROOT / "tests" / "oracles"))
from fill import fill_state_dict, fill_value  # noqa: E402
from release import lora, save_base, unet_lora  # noqa: E402


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """(folder of the base, cave.pth, codiff.pkl): every weight filled from its name, keys as released."""
    folder = tmp_path_factory.mktemp("release")
    unet, vae = save_base(folder / "base")
    cave = fill_state_dict(CaVE(Stage1.paper().widths, Stage1.paper().blocks))
    torch.save(cave.state_dict(), folder / "cave.pth", _use_new_zipfile_serialization=False)
    of_unet = unet_lora(unet, 0.1)
    of_vae = lora(vae, lambda name: name.startswith(("encoder", "quant_conv")), lambda _: "default_encoder")
    assert (len(of_unet), len(of_vae)) == (516, 62)
    proj = {k: fill_value(f"proj.{k}", shape) for k, shape in (("weight", (1024, 512)), ("bias", (1024,)))}
    torch.save({"rank_unet": 16, "rank_vae": 16, "unet_lora_encoder_modules": ["conv_in"],
                "vae_lora_encoder_modules": ["quant_conv"], "state_dict_unet": of_unet,
                "state_dict_vae": of_vae, "proj": proj}, folder / "codiff.pkl")
    return folder / "base", folder / "cave.pth", folder / "codiff.pkl"


def converted(base, cave, pkl, out):
    convert.main(["codiff", str(cave), str(pkl), "--out", str(out), "--base", str(base)])
    return out


@pytest.fixture(scope="module")
def run(release, tmp_path_factory):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        out = converted(*release, tmp_path_factory.mktemp("converted") / "run")
    assert "CaVE's decoder is left out" in said.getvalue()
    return out


def test_released_checkpoints_compute_what_the_release_computes(run):
    G, expected = codiff.load(run), np.load(ROOT / "tests" / "oracles" / "codiff_64.npz")
    x = torch.from_numpy(expected["image_uint8"]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        tokens = G.cave.embed((x + 1) / 2)
        z_L = G.sd.encode(x)
        x_hat, z_hat = G(x)
        got = {"embedding": tokens, "qf": G.cave.qf_pred(G.cave.encode((x + 1) / 2)[0]), "latent": z_L,
               "unet_out": G.sd.unet(z_L, 499, G.proj(tokens)).sample, "x0": z_hat, "output": x_hat}
    for name, value in got.items():
        assert np.abs(value.numpy() - expected[name]).max() < 1e-3, name


@pytest.mark.parametrize("height, width", [(64, 96), (160, 32)])
def test_restore_pads_no_further_than_cave_needs(run, height, width):
    """The UNet's three strides would ask for multiples of 64; the release runs it on any latent."""
    G, photo = codiff.load(run), CAT.crop((100, 20, 100 + width, 20 + height))
    with torch.inference_mode():
        plain = to_image(G(to_tensor(photo)[None])[0][0])
    assert G.stride == 64 and np.array_equal(codiff.restore(G, photo, "none"), plain)
    if height == 64:  # and in windows
        wide = CAT.crop((100, 20, 380, 100))
        assert codiff.restore(G, wide, tiles=tiling(G, 256)(wide.size)).size == (280, 80)


def test_caves_decoder_is_left_out(run):
    cave, x = codiff.load_cave(run), torch.rand(1, 3, 64, 64)
    assert not cave(x)[1].any() and cave.encode(x)[0].any()


def test_nothing_is_overwritten(run, release):
    with pytest.raises(UserError, match="holds a run"):
        converted(*release, run)


@pytest.mark.parametrize("files", [1, 3])
def test_the_number_of_files_is_checked(tmp_path, capsys, files):
    with pytest.raises(SystemExit):
        convert.main(["codiff", *["cave.pth"] * files, "--out", str(tmp_path / "run")])
    assert "takes cave.pth and codiff.pkl" in capsys.readouterr().err


@pytest.mark.parametrize("change, says", [
    (lambda c: c.pop("proj"), "proj is missing"), (lambda c: c.update(proj=[1]), "proj does not hold"),
    (lambda c: c.pop("state_dict_vae"), "state_dict_vae is missing"),
    (lambda c: c["proj"].pop("bias"), "proj.bias is missing"),
    (lambda c: c["state_dict_unet"].pop("conv_out.lora_A.default_decoder.weight"), "codiff.pkl: .*conv_out"),
    (lambda c: c["proj"].update(weight=torch.zeros(96, 512)), "another size")])
def test_a_checkpoint_that_lacks_something_is_refused(release, tmp_path, change, says, monkeypatch):
    base, cave, pkl = release
    content, load = torch.load(pkl, weights_only=True), convert.load_pickle
    change(content)
    monkeypatch.setattr(convert, "load_pickle", lambda path: content if path == pkl else load(path))
    with pytest.raises(UserError, match=says):
        converted(base, cave, pkl, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content, says", [(None, "no such file"), (b"", "loads safely"),
                                           (b"no pickle at all", "loads safely")])
def test_foreign_files_are_refused_in_one_line(release, tmp_path, content, says):
    if content is not None:
        (tmp_path / "cave.pth").write_bytes(content)
    with pytest.raises(UserError, match=says) as refused:
        converted(release[0], tmp_path / "cave.pth", release[2], tmp_path / "run")
    assert "\n" not in str(refused.value)


def test_nothing_in_a_pickle_is_executed(release, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())
    torch.save({"m_head.weight": Evil()}, tmp_path / "cave.pth")
    with pytest.raises(UserError, match="loads safely"):
        converted(release[0], tmp_path / "cave.pth", release[2], tmp_path / "run")
    assert not (tmp_path / "ran").exists()
