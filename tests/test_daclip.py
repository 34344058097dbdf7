"""DA-CLIP's controller, converted, against its formulas."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionModel

import moe_diffir
from data import convert
from data.files import ROOT, UserError

sys.path.append(str(ROOT / "tests" / "oracles"))
from fill import fill_value  # noqa: E402

WIDTH, HEADS, HIDDEN, PATCH, SIZE, LAYERS = 128, 2, 256, 8, 32, 2


def vit(blocks: str) -> dict[str, torch.Tensor]:
    """An image encoder of open_clip's in miniature, every weight filled from its name."""
    w = WIDTH
    shapes = {"conv1.weight": (w, 3, PATCH, PATCH), "class_embedding": (w,), "proj": (w, 32),
              "positional_embedding": ((SIZE // PATCH) ** 2 + 1, w)}
    shapes |= {f"{ln}.{part}": (w,) for ln in ("ln_pre", "ln_post") for part in ("weight", "bias")}
    for i in range(LAYERS):
        of_block = {"ln_1.weight": (w,), "ln_1.bias": (w,), "ln_2.weight": (w,), "ln_2.bias": (w,),
                    "attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,),
                    "attn.out_proj.weight": (w, w), "attn.out_proj.bias": (w,),
                    "mlp.c_fc.weight": (HIDDEN, w), "mlp.c_fc.bias": (HIDDEN,),
                    "mlp.c_proj.weight": (w, HIDDEN), "mlp.c_proj.bias": (w,)}
        shapes |= {f"{blocks}.{i}.{k}": shape for k, shape in of_block.items()}
    return {k: fill_value(k, shape) for k, shape in shapes.items()}


def checkpoint(blocks: str = "transformer.transformer.resblocks", before: str = "") -> dict:
    """As open_clip leaves it after training: the optimizer's learning rate is one of NumPy's numbers."""
    weights = {f"{before}visual_control.{k}": v for k, v in vit(blocks).items()}
    for i in range(LAYERS):
        weights[f"{before}visual_control.transformer.zero_modules.{i}.weight"] = torch.ones(WIDTH, WIDTH)
        weights[f"{before}visual_control.transformer.zero_modules.{i}.bias"] = torch.ones(WIDTH)
    for name in ("clip.visual.", "visual."):
        weights |= {f"{before}{name}{k}": v + 1 for k, v in vit("transformer.resblocks").items()}
    weights[f"{before}logit_scale"] = torch.tensor(4.6)
    return {"epoch": 50, "name": "daclip", "state_dict": weights,
            "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-9), "params": [0]}]}}


def converted(content, folder):
    torch.save(content, folder / "daclip.pt")
    convert.main(["daclip", str(folder / "daclip.pt"), "--out", str(folder / "clip")])
    return folder / "clip"


def tokens(p: dict, x: torch.Tensor) -> torch.Tensor:
    """x (B, 3, SIZE, SIZE) -> (B, 1 + (SIZE / PATCH)^2, WIDTH), as open_clip's ViT computes them."""
    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), p[f"{name}.weight"], p[f"{name}.bias"])

    def heads(x):
        return x.unflatten(2, (HEADS, 64)).transpose(1, 2)  # (B, heads, L, 64)
    x = F.conv2d(x, p["conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([p["class_embedding"].expand(len(x), 1, WIDTH), x], 1) + p["positional_embedding"]
    x = norm("ln_pre", x)
    for b in (f"transformer.resblocks.{i}" for i in range(LAYERS)):
        qkv = F.linear(norm(f"{b}.ln_1", x), p[f"{b}.attn.in_proj_weight"], p[f"{b}.attn.in_proj_bias"])
        q, k, v = map(heads, qkv.split(WIDTH, 2))
        a = ((q @ k.transpose(2, 3) / 8).softmax(3) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(a, p[f"{b}.attn.out_proj.weight"], p[f"{b}.attn.out_proj.bias"])
        h = F.gelu(F.linear(norm(f"{b}.ln_2", x), p[f"{b}.mlp.c_fc.weight"], p[f"{b}.mlp.c_fc.bias"]))
        x = x + F.linear(h, p[f"{b}.mlp.c_proj.weight"], p[f"{b}.mlp.c_proj.bias"])
    return x


@pytest.mark.parametrize("before", ["", "module."])
@pytest.mark.parametrize("blocks", ["transformer.transformer.resblocks", "transformer.resblocks"])
@torch.no_grad()
def test_the_controller_computes_what_its_formulas_say(tmp_path, capsys, blocks, before):
    """As it is, and trained in several processes; its blocks wrapped, and not."""
    p = {k.replace(blocks, "transformer.resblocks"): v for k, v in vit(blocks).items()}
    folder, x = converted(checkpoint(blocks, before), tmp_path), torch.randn(2, 3, SIZE, SIZE)
    assert f"--dp {folder}" in capsys.readouterr().out
    assert {f.name for f in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert {f.name for f in tmp_path.iterdir()} == {"clip", "daclip.pt"}
    net, expected = CLIPVisionModel.from_pretrained(folder), tokens(p, x)
    assert expected.std() > 0.1 and net.dtype == torch.float32
    assert torch.allclose(net(x).last_hidden_state, expected, atol=1e-4)
    prior = moe_diffir.Prior(str(folder))
    x = torch.rand(1, 3, 48, 64) * 2 - 1
    assert torch.allclose(prior(x), tokens(p, moe_diffir.clip_input(x, SIZE)), atol=1e-4)


@torch.no_grad()
def test_a_state_dict_alone_in_half_precision(tmp_path):
    content = {k: v.half() for k, v in checkpoint()["state_dict"].items()}
    net = CLIPVisionModel.from_pretrained(converted(content, tmp_path))
    kept = net.state_dict()
    assert all(v.dtype == torch.float32 for v in kept.values())
    name = next(k for k in kept if k.endswith("encoder.layers.1.self_attn.k_proj.bias"))
    theirs = content["visual_control.transformer.transformer.resblocks.1.attn.in_proj_bias"]
    assert torch.equal(kept[name], theirs[WIDTH:2 * WIDTH].float())


def test_a_learning_rate_of_numpy_1_is_read(tmp_path):
    """As in the released file; its tensors are not looked at here."""
    path = tmp_path / "old.pt"
    torch.save(checkpoint()["optimizer"], path, _use_new_zipfile_serialization=False)
    assert b"numpy._core.multiarray" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert convert.load_pickle(path)["param_groups"][0]["lr"] == 1e-9


def without(c, name):
    c["state_dict"] = {k: v for k, v in c["state_dict"].items() if name not in k}


BLOCK = "visual_control.transformer.transformer.resblocks.1"


def put(name, *shape):
    return lambda c: c["state_dict"].update({name: torch.ones(shape)})


@pytest.mark.parametrize("change, says", [
    (lambda c: without(c, "visual_control"), "not DA-CLIP's controller .visual_control.* is missing"),
    (lambda c: without(c, "visual_control.conv1"), "visual_control.* is missing"),
    (lambda c: without(c, "visual_control.positional"), "visual_control.* is missing"),
    (lambda c: without(c, "visual_control.transformer"), "visual_control.* is missing"),
    (lambda c: c.update(state_dict=[1]), "visual_control.* is missing"),
    (put("visual_control.conv1.weight", 32, 3, 8, 8), "visual_control.* is missing"),
    (put("visual_control.conv1.weight", 128, 192), "visual_control.* is missing"),
    (lambda c: without(c, f"{BLOCK}.ln_2.bias"), "daclip.pt: does not fit: .*layers.1.layer_norm2.bias"),
    (put(f"{BLOCK}.ls_1.gamma", 128), "daclip.pt: does not fit: .*ls_1"),
    (put(f"{BLOCK}.attn.in_proj_bias", 128), "daclip.pt: does not fit: .*proj.bias"),
    (put("structcond_stage_model.conv_first.0.bias", 256), "MoE-DiffIR's checkpoint, which has no converter"),
    (lambda c: c.update(state_dict={f"structcond_stage_model.DACLIP_model.{k}": v
                                    for k, v in c["state_dict"].items()}), "which has no converter")])
def test_another_checkpoint_is_refused(tmp_path, change, says):
    content = checkpoint()
    change(content)
    with pytest.raises(UserError, match=says) as refused:
        converted(content, tmp_path)
    assert "\n" not in str(refused.value)
    assert {f.name for f in tmp_path.iterdir()} == {"daclip.pt"}


def test_a_lightning_checkpoint_is_named_and_nothing_of_it_runs(tmp_path, monkeypatch):
    """As MoE-DiffIR's is: a callback's class stands in it as a key."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    for i in range(3):
        module = type(sys)(name.rsplit(".", 2 - i)[0])
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules[name].ModelCheckpoint = ModelCheckpoint
    with pytest.raises(UserError) as refused:
        converted(checkpoint() | {"callbacks": {ModelCheckpoint: {}}}, tmp_path)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path / 'daclip.pt'}: not a checkpoint that loads safely (it holds {name}.M")
    assert "Lightning" in said and "MoE-DiffIR's" in said and "\n" not in said and "\x1b" not in said


@pytest.mark.parametrize("at", ["config.json", "notes.txt", None])
def test_nothing_is_overwritten(tmp_path, at):
    target = tmp_path / "clip" / at if at else tmp_path / "clip"
    target.parent.mkdir(exist_ok=True)
    target.write_text("mine")
    with pytest.raises(UserError, match="--out .*clip: holds a run or other files"):
        converted(checkpoint(), tmp_path)
    assert target.read_text() == "mine" and {f.name for f in tmp_path.iterdir()} == {"clip", "daclip.pt"}


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "clip").mkdir()
    assert (converted(checkpoint(), tmp_path) / "model.safetensors").exists()


def test_a_missing_file_is_one_line(tmp_path):
    command = [sys.executable, "-m", "data.convert", "daclip", "none.pt", "--out", str(tmp_path / "clip")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "convert.py: none.pt: no such file\n")
