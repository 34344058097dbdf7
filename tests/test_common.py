"""The house's rules, who imports whom; then common.py against independent oracles: diffusers' schedulers,
torchmetrics' DISTS, lpips' LPIPS, PEFT unfused, closed forms."""

import ast
import contextlib
import importlib
import inspect
import io
import json
import re
import sys
import tomllib
import warnings
from importlib.metadata import packages_distributions
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.dists as reference_dists
import torchvision
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

import codiff
import common
from common import (PHOTOS, SD, STREAMS, TINY_SD, Crops, Discriminator, Settings, add_lora, dists, for_inference,
                    frozen, jpeg, load_trained, noise_for, pad_to, set_lr, text_tokens, to_image, to_tensor,
                    trained)
from conftest import CAT, SCRIPTS, moved_by, published_lpips, tops
from data.files import ROOT, UserError, load_part, load_tensors, save_tensors
from data.runs import gradient_norms, groups

# ---- the house

CODE = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
        for path in [*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py")]}


def imported(tree, own_name: str) -> set[str]:
    """The repo's modules that these statements import."""
    found = set()
    for node in tree:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in CODE} - {own_name}


def test_modules_import_each_other_in_no_circle():
    """(When a module is loaded; what a function imports, it imports later.)"""
    above = {name: imported(tree.body, name) for name, tree in CODE.items()}
    while free := [name for name, others in above.items() if not others & above.keys()]:
        above = {name: others for name, others in above.items() if name not in free}
    assert not above


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_common_alone(script):
    assert imported(ast.walk(CODE[script]), script) == {"common"}


def test_common_re_exports_nothing():
    """The functions and classes that others take from it are its own: but for UserError, with which scripts
    refuse, and load_part, with which they read a base."""
    taken = set()
    for node in (node for tree in CODE.values() for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and node.module == "common":
            taken |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "common":
            taken.add(node.attr)
    things = {name: getattr(common, name) for name in taken}
    foreign = {name for name, thing in things.items()
               if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__ != "common"}
    assert foreign <= {"UserError", "load_part"}


def distributions(trees) -> set[str]:
    """What these files import of others: the packages, by the names under which they are installed."""
    names = {n for tree in trees for node in ast.walk(tree) for n in (
             [alias.name for alias in node.names] if isinstance(node, ast.Import) else
             [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])}
    tests = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"tests"}
    names = {name.split(".")[0] for name in names} - sys.stdlib_module_names - tests - {"data", *CODE}
    known = packages_distributions()
    return {re.sub("[-_.]+", "-", known.get(name, [name])[0]).lower() for name in names}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lists = [project["project"]["dependencies"], project["dependency-groups"]["dev"],
             *project["project"]["optional-dependencies"].values()]
    needed, dev, *extras = ({re.match("[a-z-]+", line)[0] for line in lines} for lines in lists)
    assert distributions(CODE.values()) == needed.union(*extras)
    tests = distributions(ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("*.py"))
    assert dev - {"pytest-xdist", "ipykernel"} <= tests | needed.union(*extras) and tests <= dev | needed
    assert project["project"]["optional-dependencies"].keys() == {"metrics", "codecs", "figures"}
    assert extras == [{"pyiqa"}, {"imageio-ffmpeg"}, {"matplotlib"}]
    assert "-n" not in project["tool"]["pytest"]["ini_options"]["addopts"].split()  # xdist may be missing


def streams_of(script: str) -> set[str]:
    text = inspect.getsource(importlib.import_module(script)) + inspect.getsource(Crops)
    text = text.replace('"F, {z}"', '"F, z_hat" seed, "F, z_H"')
    return {*re.findall(r'seed(?: \+ 1)?, f?"([^"]+)"', text)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_two_streams_of_a_script_share_a_number(script):
    used = streams_of(script)
    assert {"photograph", "view"} < used and ("degradation" in used) == (script != "oscar")
    assert len({STREAMS[stream] for stream in used}) == len(used)


def test_every_stream_has_a_user():
    assert STREAMS.keys() == set().union(*map(streams_of, SCRIPTS))


# ---- one step of diffusion


@pytest.fixture(scope="module")
def sd():
    return SD(TINY_SD)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_x0_inverts_the_schedulers_own_noising(sd, prediction, monkeypatch):
    scheduler = DDPMScheduler.from_pretrained(TINY_SD, subfolder="scheduler", prediction_type=prediction)
    z, eps = torch.randn(3, 16, 8, 8), torch.randn(3, 16, 8, 8)
    monkeypatch.setattr(sd, "prediction", prediction)
    for t in (0, 199, 499, 999):
        steps = torch.full((3,), t)
        z_t = scheduler.add_noise(z, eps, steps)
        out = eps if prediction == "epsilon" else scheduler.get_velocity(z, eps, steps)
        one = sd.x0(z_t, out, sd.alpha_bar[t])
        assert torch.allclose(one, z, atol=2e-3)  # sqrt(alpha_bar) is 0.068 at t = 999
        assert torch.allclose(sd.x0(z_t, out, sd.alpha_bar[steps]), one)


def test_latents_are_the_posteriors_at_unit_scale_and_decode_to_the_image(sd):
    x = to_tensor(CAT)[None, :, :256, :256]
    with torch.no_grad():
        z, posterior = sd.encode(x), sd.vae.encode(x).latent_dist
        assert z.shape == (1, *sd.latent_shape(256)) == (1, sd.vae.config.latent_channels, 32, 32)
        assert 0.3 < z.std() < 3
        assert 10 * torch.log10(4 / (sd.decode(z) - x).square().mean()) > 24
        noise, scale = torch.randn_like(z), sd.vae.config.scaling_factor
        sample = posterior.mean + posterior.std * noise
        assert torch.allclose(sd.encode(x, noise), sample * scale, atol=1e-5)
    assert torch.equal(z, posterior.mode() * scale)


def test_a_caption_is_the_text_encoders_last_hidden_state():
    options = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
    ids = CLIPTokenizer.from_pretrained(TINY_SD / "tokenizer")("a cat", **options).input_ids
    encoder = CLIPTextModel.from_pretrained(TINY_SD / "text_encoder", dtype=torch.float32).eval()
    assert torch.allclose(text_tokens(TINY_SD, ["a cat"]), encoder(ids).last_hidden_state, atol=1e-5)


def test_a_base_is_known_by_its_weights(tmp_path):
    one, two = SD(TINY_SD), SD(TINY_SD, with_unet=False)
    assert one.fingerprint == SD(TINY_SD).fingerprint != two.fingerprint
    one.check({"fingerprint": one.fingerprint}, tmp_path)
    with pytest.raises(UserError, match="another base"):
        two.check({"fingerprint": one.fingerprint}, tmp_path)


def test_weights_have_their_own_names_however_they_are_wrapped(tmp_path):
    """By torch.compile around all (accelerate's dynamo), around parts, or both; also if saved so before."""
    def net():
        return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2).requires_grad_(False))
    own, names = net(), {"0.weight", "0.bias"}
    for wrap in ((), (0,), (1,), (0, 1, None), (None,)):
        wrapped = net()
        for i in wrap:
            if i is None:
                wrapped = torch.compile(wrapped, backend="eager")
            else:
                wrapped[i] = torch.compile(wrapped[i], backend="eager")
        as_saved_before = {k: v for k, v in wrapped.state_dict().items() if "0." in k}
        load_trained(net(), as_saved_before, tmp_path)
        load_trained(wrapped, trained(own), tmp_path)
        assert trained(wrapped).keys() == names and torch.equal(trained(wrapped)["0.bias"], own[0].bias)


@pytest.mark.parametrize("scale", [None, 2.0**16])
def test_a_ledger_has_the_norm_of_each_terms_gradient_by_group(scale):
    """Against backward, a term at a time; what is frozen, cut off or constant shows as 0."""
    def net(*names):
        return nn.ModuleDict({name: nn.Linear(3, 3) for name in names})
    G, D = nn.ModuleDict({"sd": nn.ModuleDict({"unet": net("q", "lora_A")}), "enc1": nn.Linear(3, 3),
                          "enc2": nn.Sequential(nn.Linear(3, 3))}), net("head")
    G["sd"]["unet"]["q"].requires_grad_(False)
    G["enc1"] = torch.compile(G["enc1"], backend="eager")
    lora, columns = G["sd"]["unet"]["lora_A"], groups({"G": G, "D": D})
    enc = [*G["enc1"].parameters(), *G["enc2"].parameters()]
    by_hand = {"G.unet LoRA": [*lora.parameters()], "G.enc": enc, "D.head": [*D.parameters()]}
    assert {k: [*map(id, v)] for k, v in columns.items()} == {k: [*map(id, v)] for k, v in by_hand.items()}
    assert [*groups({"G": G, "D": D}, train=False)] == ["G.unet"] and [*groups({"D": D})] == ["head"]
    z = lora(G["sd"]["unet"]["q"](torch.randn(4, 3)))
    y = G["enc2"](G["enc1"](z))
    acc = SimpleNamespace(scaler=scale and SimpleNamespace(get_scale=lambda: scale))
    moves = {"z": {"G.unet LoRA"}, "y": {"G.unet LoRA", "G.enc"}, "per rate": {"G.unet LoRA", "G.enc"},
             "gan_g": {"G.unet LoRA", "G.enc"}, "gan_d": {"D.head"}, "constant": set()}
    for name, moved in moves.items():
        with frozen(D) if name == "gan_g" else contextlib.nullcontext():
            term = {"z": lambda: z.square().mean(), "y": lambda: 1e-9 * y.sin().sum(),
                    "per rate": lambda: y.square().mean(0),
                    "gan_g": lambda: D["head"](y).square().mean(), "constant": lambda: torch.ones(()),
                    "gan_d": lambda: D["head"](y.detach()).square().mean()}[name]()
            norms = gradient_norms(acc, term, columns)
            expected = dict.fromkeys(columns, 0.0)
            if moved:
                term.sum().backward(retain_graph=True)
        for k in moved:
            grads = [p.grad.flatten() for p in columns[k]]
            expected[k] = torch.linalg.vector_norm(torch.cat(grads)).item()
        assert norms == {k: pytest.approx(v, rel=1e-5, abs=0) for k, v in expected.items()}, name
        assert {k for k, v in norms.items() if v} == moved
        [m.zero_grad() for m in (G, D)]


def base_with(folder, part: str, **changes):
    """tiny-sd, but for a part's config."""
    for own in TINY_SD.iterdir():
        (folder / own.name).mkdir(parents=True)
        for file in own.iterdir() if own.is_dir() else ():
            (folder / own.name / file.name).symlink_to(file)
    path = next((folder / part).glob("*config.json"))
    config = json.loads(path.read_text()) | changes
    path.unlink()
    path.write_text(json.dumps(config))
    return folder


FOREIGN = [("unet", {"in_channels": 33}, "takes 33 channels and gives 16, latents have 16"),  # for inpainting
           ("unet", {"in_channels": 17}, "takes 17 channels"),
           ("unet", {"in_channels": 32}, "takes 32 channels"),
           ("unet", {"out_channels": 32}, "gives 32"),
           ("unet", {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                     "projection_class_embeddings_input_dim": 80}, "addition_embed_type text_time"),
           ("unet", {"num_class_embeds": 10}, "num_class_embeds 10"),  # of the upscaler by 4
           ("vae", {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}, "latents_mean"),
           ("vae", {"use_quant_conv": False, "use_post_quant_conv": False}, "no quant_conv"),
           ("vae", {"latent_channels": 4}, "latents have 4"),
           ("scheduler", {"prediction_type": "sample"}, "predicts sample"),
           ("scheduler", {"num_train_timesteps": 50}, "50 steps, not 1000")]


@pytest.mark.parametrize("part, changes, says", FOREIGN)
def test_a_base_of_another_kind_is_refused_before_any_work(tmp_path, refused, part, changes, says):
    base = base_with(tmp_path / "base", part, **changes)
    said = refused(codiff.main, ["train", "--out", tmp_path / "run", "--base", base])
    assert str(base) in said and "another kind of base" in said and says in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_looks_at_its_base_first(tmp_path, refused, script, photos):
    base = base_with(tmp_path / "base", "unet", in_channels=33)
    args = ["train", "--out", tmp_path / "run", "--base", base, "--data", photos, "--stage", "1"]
    assert "takes 33 channels" in refused(importlib.import_module(script).main, args)


def test_a_vaes_shift_factor_is_used(sd, monkeypatch):
    """As diffusers' pipelines do: (z - shift) * scale."""
    x, config = to_tensor(CAT)[None, :, :64, :64], dict(sd.vae.config)
    with torch.no_grad():
        z, x_hat = sd.encode(x), sd.decode(sd.encode(x))
        shifted = FrozenDict(config | {"shift_factor": 0.5, "scaling_factor": 2})
        monkeypatch.setattr(sd.vae, "_internal_dict", shifted)
        assert torch.allclose(sd.encode(x), 2 * (z / config["scaling_factor"] - 0.5), atol=1e-5)
        assert torch.allclose(sd.decode(sd.encode(x)), x_hat, atol=1e-4)


# ---- LoRA


def sd21(which):
    with torch.device("meta"):
        if which == "unet":
            return UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), use_linear_projection=True,
                                        attention_head_dim=[5, 10, 20, 20], cross_attention_dim=1024)
        return AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=2,
                             up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4,
                             block_out_channels=(128, 256, 512, 512))


@pytest.mark.parametrize("which, under, without, modules, millions", [
    ("unet", ("",), "time_emb", 258, 16.22), ("vae", ("encoder", "quant_conv"), "time_emb", 32, 1.48),
    ("unet", ("down_blocks", "mid_block"), "time_embedding", 119, None)])
def test_lora_covers_the_released_modules_of_sd21(which, under, without, modules, millions):
    model = sd21(which).requires_grad_(False)
    with torch.device("meta"):
        add_lora(model, 16, under, without)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == modules
    if millions:
        learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert learns / 1e6 == pytest.approx(millions, abs=0.005)


def test_lora_fused_equals_unfused():
    x, t, c = torch.randn(1, 16, 8, 8), 199, torch.randn(1, 5, 96)
    plain, lora = SD(TINY_SD), SD(TINY_SD)
    add_lora(lora.unet, 4)
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    with torch.no_grad():
        unfused, base = lora.unet(x, t, c).sample, plain.unet(x, t, c).sample
        fused = for_inference(lora).unet(x, t, c).sample
    assert (fused - unfused).abs().max() < 1e-4 and (base - unfused).abs().max() > 1e-2
    assert not any("lora" in n for n, _ in lora.named_parameters())


# ---- DISTS


def test_dists_equals_torchmetrics_with_the_same_vgg(monkeypatch):
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None)
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights=None: vgg)
    monkeypatch.setattr(reference_dists, "vgg16", lambda weights=None: vgg)
    x = torch.rand(2, 3, 64, 80)
    y = (x + 0.2 * torch.randn_like(x)).clamp(0, 1)
    expected = reference_dists.deep_image_structure_and_texture_similarity(x, y)
    got = dists("vgg16")(x * 2 - 1, y * 2 - 1)
    assert got.shape == (2,) and torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("net, kind", [("vgg16", "vgg"), ("tiny-alex", "alex")])
def test_lpips_equals_the_lpips_package_on_the_same_network(net, kind, monkeypatch):
    """tiny-alex in the published network's place: of its widths are lpips' convolutions and weights, too."""
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None)
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights=None, **_: vgg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision by an old keyword
        reference = published_lpips(net=kind, pnet_rand=True, verbose=False)
    ours = common.lpips(net)
    convs, own = ([m for m in n.modules() if isinstance(m, nn.Conv2d)] for n in (reference.net, ours.blocks))
    for a, b in zip(convs, own, strict=True):
        a.weight, a.bias = b.weight, b.bias
    if net == "tiny-alex":
        for lin, w in zip(reference.lins, ours.lin, strict=True):
            lin.model[-1].weight = w
    x = torch.rand(2, 3, 64, 80) * 2 - 1
    y = (x + 0.2 * torch.randn_like(x)).clamp(-1, 1)
    assert torch.allclose(ours(x, y), reference.eval()(x, y).flatten(), rtol=1e-4)


@pytest.mark.parametrize("distance", [dists, common.lpips])
def test_tiny_networks_give_a_distance_with_a_gradient_and_no_trainable_weight(distance):
    d, x = distance("tiny-vgg"), torch.rand(2, 3, 48, 48) * 2 - 1
    assert d(x, x).abs().max() < 1e-5 and not any(p.requires_grad for p in d.parameters())
    noisy = (x + 0.1 * torch.randn_like(x)).requires_grad_()
    assert (d(noisy, x) > 1e-3).all() and (d(noisy + torch.randn_like(x), x) > d(noisy, x)).all()
    d(noisy, x).mean().backward()
    assert noisy.grad.abs().sum() > 0
    black = torch.full_like(x, -1).requires_grad_()
    d(black, x).mean().backward()
    assert black.grad.isfinite().all()
    with pytest.raises(UserError, match="small: no network for DISTS or LPIPS; choose vgg16 or tiny-vgg"):
        distance("small")


def test_an_alexnet_is_refused_for_dists_before_training(refused):
    assert "tiny-alex: has no weights for DISTS" in refused(
        codiff.main, ["train", "--s2-dists", "tiny-alex", "--out", "nowhere"])


# ---- discriminator


def test_discriminator_passes_gradients_to_generator_lora_prompt_and_head():
    D = Discriminator(TINY_SD, 4)
    z = torch.randn(2, 16, 12, 12, requires_grad=True)
    with frozen(D):
        assert not any(p.requires_grad for p in D.parameters())
        D(z, 199).mean().backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None for p in D.parameters())
    moved = moved_by(D(z.detach(), 199).square().mean(), D)
    assert tops(moved) == {"unet", "prompt", "head"}
    assert all("lora_B" in n for n in moved if n.startswith("unet."))  # lora_A follows once B has left zero
    assert all("lora" in n or not n.startswith("unet.") for n, p in D.named_parameters() if p.requires_grad)


def test_discriminators_unet_is_the_bases_mid_block():
    D, base = Discriminator(TINY_SD, 4), SD(TINY_SD).unet
    z, c, seen = torch.randn(1, 16, 8, 8), torch.randn(1, 7, base.config.cross_attention_dim), {}
    base.mid_block.register_forward_hook(lambda m, i, out: seen.update(mid=out))
    with torch.no_grad():
        base(z, 199, c)
        assert torch.allclose(D.unet(z, 199, c).sample, seen["mid"], atol=1e-5)


@pytest.mark.parametrize("base, crop, logits", [("data/sd21-base", 256, 2), (TINY_SD, 128, 3),
                                                (TINY_SD, 64, 2)])
def test_discriminators_head_is_the_releases_at_sd_21s_size(base, crop, logits, monkeypatch):
    """Two convolutions of 4, strides 1 and 1, padding 1. A small UNet's map would be too small for these."""
    monkeypatch.setattr(common, "load_part", lambda *part: load_part(*part, weights=False))
    with torch.device("meta"):
        D = Discriminator(base, 4)
        z = torch.empty(1, D.unet.config.in_channels, crop // 8, crop // 8)
        assert D(z, 0).shape == (1, 1, logits, logits)


def test_accuracy_counts_logits_on_the_right_side():
    fake, real = torch.tensor([[-1.0, 2.0]]), torch.tensor([[0.5, 3.0]])
    assert Discriminator.accuracy(fake, real) == 0.75
    assert Discriminator.accuracy(torch.full((4,), 0.1), torch.full((4,), 0.1)) == 0.5


# ---- pictures and random numbers


@pytest.mark.parametrize("h, w", [(1, 1), (7, 5), (33, 64), (65, 31)])
def test_pad_to_reaches_whole_cells_and_keeps_the_image(h, w):
    x = torch.rand(1, 3, h, w)
    y = pad_to(x, 32)
    assert y.shape[2] % 32 == 0 and y.shape[3] % 32 == 0 and y.shape[2] - h < 32 and y.shape[3] - w < 32
    assert torch.equal(y[..., :h, :w], x)
    rows, columns = ("reflect" if -n % 32 < n else "edge" for n in (h, w))
    wide = np.pad(x[0].numpy(), ((0, 0), (0, 0), (0, -w % 32)), columns)
    assert np.array_equal(y[0], np.pad(wide, ((0, 0), (0, -h % 32), (0, 0)), rows))


def test_a_picture_is_the_same_after_a_tensor_and_jpeg_is_libjpegs():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (33, 41, 3), dtype=np.uint8))
    assert np.array_equal(to_image(to_tensor(image)), image)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=10, subsampling="4:2:0")
    assert np.array_equal(jpeg(image, 10), Image.open(buffer))


def test_crops_are_a_function_of_seed_and_number(tmp_path, capsys):
    a = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(a).save(tmp_path / "a.png")
    Image.fromarray(a[:10, :12]).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    one, two, three = (Crops([tmp_path], 24, seed) for seed in (3, 3, 4))
    forward = [one.crop(n) for n in range(9)]
    backward = [two.crop(n) for n in reversed(range(9))][::-1]
    assert all(np.array_equal(p, q) and p.shape == (24, 24, 3) for p, q in zip(forward, backward))
    assert not all(np.array_equal(p, three.crop(n)) for n, p in enumerate(forward))
    whole = Crops([PHOTOS / "val", PHOTOS / "train"], 24, 3)
    epochs = [[whole.file(len(whole.files) * epoch + i) for i in range(len(whole.files))] for epoch in (0, 1)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == sorted(whole.files)
    capsys.readouterr()
    again = Crops([tmp_path], 24, 3)
    again.read.cache_clear()
    assert [again.file(n).name for n in range(30)].count("broken.png") == 0
    assert capsys.readouterr().err.count("broken.png: not an image") == 1  # named once
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 training images"):
        Crops([tmp_path / "b"], 24, 0)
    for name in ("a.png", "small.png"):  # as of a drive that is gone
        (tmp_path / name).unlink()
    again.read.cache_clear()
    with pytest.raises(UserError, match="no training image can be read any more"):
        again.crop(31)


def test_noise_depends_on_the_sample_and_the_stream_not_on_the_batch():
    n = torch.tensor([4, 5, 6, 7])
    whole = noise_for(n, (2, 3), 0, "z_L")
    assert torch.equal(whole, torch.cat([noise_for(half, (2, 3), 0, "z_L") for half in n.split(2)]))
    assert not torch.equal(whole, noise_for(n, (2, 3), 0, "z_H"))


# ---- settings, and one step of training


def test_settings_keep_to_their_ranges_and_come_back():
    cfg = codiff.Stage1(crop=96)
    header = {f"stage1.{k}": v for k, v in vars(cfg).items()}
    assert codiff.Stage1.of_header(header | {"stage2.crop": 1}) == cfg
    for changed in (header | {"stage1.gone": 1}, {k: v for k, v in header.items() if k != "stage1.lr"}):
        with pytest.raises(UserError, match="another version"):
            codiff.Stage1.of_header(changed)
    for wrong, says in (({"qf_min": 96}, "--s1-qf-min 96: must be at least 1, at most 95"),
                        ({"steps": 0}, "--s1-steps 0"), ({"lr": float("nan")}, "--s1-lr nan"),
                        ({"widths": (8, -1)}, "--s1-widths -1"),
                        ({"learning": "by heart"}, "--learning by heart: choose from dual, explicit")):
        with pytest.raises(UserError, match=says):
            codiff.Stage1(**wrong)
    cfg.check_multiple("crop", 32)
    with pytest.raises(UserError, match="--s1-crop 96: must be a multiple of 64"):
        cfg.check_multiple("crop", 64)


def test_the_rate_falls_over_the_runs_last_part():
    cfg, seen = Settings(decay=0.5), []
    cfg.steps = 100
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    for step in range(100):
        set_lr(optimizer, 3.0, step, cfg)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen[0] == seen[50] == 3 and seen[75] == 1.5 and seen[99] == pytest.approx(0.06)
    set_lr(optimizer, 3.0, 99, Settings(decay=0.0))
    assert optimizer.param_groups[0]["lr"] == 3


@pytest.mark.parametrize(("norm", "whole", "expected"), [(1.0, True, (1.0, 0.5)), (0.0, True, (5.0, 0.5)),
                                                         (1.0, False, (5.0, 0.5))])
def test_each_groups_gradients_are_clipped_once_a_step(norm, whole, expected):
    grads = torch.tensor([3.0, -4.0]), torch.tensor([0.3, 0.4])  # norms 5 and 0.5
    ps = [torch.nn.Parameter(torch.zeros(2)) for _ in grads]
    for p, g in zip(ps, grads):
        p.grad = g.clone()
    acc = SimpleNamespace(sync_gradients=whole, unscale_gradients=lambda optimizer: None)
    common.clip(acc, torch.optim.SGD([{"params": [p]} for p in ps], 1.0), norm)
    for p, g, n in zip(ps, grads, expected):
        assert torch.allclose(p.grad, g * n / g.norm(), atol=1e-5)


def test_nested_tensors_and_a_trained_module_come_back(tmp_path):
    def make(width=4):
        layers = torch.nn.Linear(3, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 1)
        return torch.nn.Sequential(*layers)
    module, other = make(), make()
    module[0].requires_grad_(False), other[0].requires_grad_(False)
    assert trained(module).keys() == {"1.weight", "1.bias", "1.running_mean", "1.running_var",
                                      "1.num_batches_tracked", "2.weight", "2.bias"}
    path = tmp_path / "deep" / "state.safetensors"
    save_tensors(path, {"modules": {"m": trained(module)}, "count": {3: {"step": torch.tensor(7.0)}}}, step=9)
    state, header = load_tensors(path)
    assert header == {"step": 9} and state["count"]["3"]["step"] == 7
    load_trained(other, state["modules"]["m"], path)
    assert torch.equal(other[2].weight, module[2].weight)
    assert not torch.equal(other[0].weight, module[0].weight)
    for bad in (make(5), torch.nn.Linear(3, 4)):
        with pytest.raises(UserError, match="state.safetensors: does not fit"):
            load_trained(bad, state["modules"]["m"], path)
