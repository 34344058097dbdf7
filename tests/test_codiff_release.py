"""codiff.py with checkpoints in the released format, against what the released code computes on the same weights."""

import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

import codiff
from codiff import CaVE, Stage1
from common import ROOT, UserError, layers, paper_values

sys.path.append(str(ROOT / "tests" / "oracles"))
from fill import fill_state_dict, fill_value  # noqa: E402


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """(folder of the base, cave.pth, codiff.pkl), every weight filled from its name; key names as released."""
    folder = tmp_path_factory.mktemp("release")
    unet = UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), attention_head_dim=(2, 4, 4, 4), cross_attention_dim=1024, use_linear_projection=True)
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=(32, 32, 64, 64),
                        latent_channels=4, layers_per_block=2)
    fill_state_dict(unet).save_pretrained(folder / "base" / "unet")
    fill_state_dict(vae).save_pretrained(folder / "base" / "vae")
    DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(folder / "base" / "scheduler")
    cave = fill_state_dict(CaVE(paper_values(Stage1).widths, paper_values(Stage1).blocks))
    torch.save(cave.state_dict(), folder / "cave.pth", _use_new_zipfile_serialization=False)

    def lora(model, names, adapter):
        out = {}
        for name in names:
            w = model.get_submodule(name).weight
            shapes = {"A": (16, *w.shape[1:]), "B": (w.shape[0], 16, *[1] * (w.dim() - 2))}
            out |= {key: 0.5 * fill_value(key, shape) for k, shape in shapes.items() for key in [f"{name}.lora_{k}.{adapter(name)}.weight"]}
        return out
    unet_lora = lora(unet, layers(unet, without="time_emb"), lambda n: "default_" + (
        "decoder" if n.startswith(("up_blocks", "conv_out")) else "others" if n.startswith("mid_block") else "encoder"))
    for k in ("weight", "bias"):
        value = unet.state_dict()[f"conv_in.{k}"]
        unet_lora[f"conv_in.base_layer.{k}"] = value + 0.1 * fill_value(f"conv_in.base_layer.{k}", value.shape)
    vae_lora = lora(vae, layers(vae, ("encoder", "quant_conv")), lambda n: "default_encoder")
    assert (len(unet_lora), len(vae_lora)) == (516, 62)
    proj = {k: fill_value(f"proj.{k}", shape) for k, shape in (("weight", (1024, 512)), ("bias", (1024,)))}
    torch.save({"rank_unet": 16, "rank_vae": 16, "unet_lora_encoder_modules": ["conv_in"], "vae_lora_encoder_modules": ["quant_conv"],
                "state_dict_unet": unet_lora, "state_dict_vae": vae_lora, "proj": proj}, folder / "codiff.pkl")
    return folder / "base", folder / "cave.pth", folder / "codiff.pkl"


def test_released_checkpoints_compute_what_the_release_computes(release):
    base, cave, pkl = release
    G, expected = codiff.load_official(cave, pkl, str(base)), np.load(ROOT / "tests" / "oracles" / "codiff_64.npz")
    x = torch.from_numpy(expected["image_uint8"]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        tokens = G.cave.embed((x + 1) / 2)
        z_L = G.sd.encode(x)
        x_hat, z_hat = G(x)
        got = {"embedding": tokens, "qf": G.cave.qf_pred(G.cave.encode((x + 1) / 2)[0]), "latent": z_L,
               "unet_out": G.sd.unet(z_L, 499, G.proj(tokens)).sample, "x0": z_hat, "output": x_hat}
    for name, value in got.items():
        assert np.abs(value.numpy() - expected[name]).max() < 1e-3, name


def test_restore_takes_released_checkpoints(release, tmp_path):
    base, cave, pkl = release
    photo = ROOT / "data" / "photos" / "val" / "chelsea.png"
    codiff.main(["restore", str(photo), "-o", str(tmp_path / "x.png"), "--weights-official", str(cave), str(pkl), "--base", str(base), "--tile", "256"])
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("change, says", [
    (lambda c: c.pop("proj"), "weight is missing"), (lambda c: c.pop("state_dict_vae"), "state_dict_vae is missing"),
    (lambda c: c["state_dict_unet"].pop("conv_out.lora_A.default_decoder.weight"), "codiff.pkl"),
    (lambda c: c["proj"].update(weight=torch.zeros(96, 512)), "another size")])
def test_a_checkpoint_that_lacks_something_is_refused(release, tmp_path, change, says):
    base, cave, pkl = release
    content = torch.load(pkl, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "codiff.pkl")
    with pytest.raises(UserError, match=says):
        codiff.load_official(cave, tmp_path / "codiff.pkl", str(base))


def test_nothing_in_a_pickle_is_executed(release, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())
    torch.save({"m_head.weight": Evil()}, tmp_path / "cave.pth")
    with pytest.raises(UserError, match="loads safely"):
        codiff.load_official(tmp_path / "cave.pth", release[2], str(release[0]))
    assert not (tmp_path / "ran").exists()
