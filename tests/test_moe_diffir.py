"""moe_diffir.py, equation by equation: router and prompts, modulation, compensator; then what is measured."""

import json
import re
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image
from torch.autograd import grad
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

import common
import moe_diffir
from common import TINY_SD, text_tokens, to_tensor
from conftest import CAT, before_stage_2, moved_by, rows_of, said_by, tops, train_args
from data import make_cir
from data.files import UserError, list_images, load_tensors
from data.make_cir import compress
from data.results import ablations
from data.results import moe_diffir as measures
from data.results.moe_diffir import gates_of, print_latent_errors, routing
from data.runs import filled_rows
from data.tiles import tiling
from moe_diffir import CIRPairs, MoEDiffIR, PromptGenerator, Stage1, Stage2, top_k_gates

SMALL = Stage1(width=16, heads=2, spade=16, crop=64)
SIZES = pytest.mark.parametrize("h, w", [(16, 8), (13, 9)])  # the latter no multiples of the UNet's stride, 4


@pytest.fixture(scope="module")
def run(trained):
    return trained("moe_diffir")


@pytest.fixture(scope="module")
def empty():
    return text_tokens(TINY_SD, [""])[0]


@pytest.fixture(scope="module")
def model(empty):
    torch.manual_seed(0)
    return MoEDiffIR(TINY_SD, SMALL, empty, Stage2(levels=(0, 1, 2, 3), blocks=1)).eval()


@pytest.fixture
def stirred(empty):
    """A model whose layers that start at zero do not: modulation, adapter and compensator take part."""
    torch.manual_seed(1)
    model = MoEDiffIR(TINY_SD, SMALL, empty, Stage2(levels=(0, 1, 2, 3), blocks=1)).eval()
    for p in model.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return model


# ---- data


def test_a_sample_is_the_same_crop_of_both(photos, tmp_path):
    """With a lossless second version both crops are equal; all tasks are drawn; a period's samples repeat."""
    make_cir.bench([photos], tmp_path, [("jpeg", "5"), ("webp", "15")])
    for name in ("cat.png", "flower.png"):
        shutil.copy(tmp_path / "original" / name, tmp_path / "jpeg" / "5" / name)
    benchmark = make_cir.read([([photos], tmp_path)], [("jpeg", "5"), ("webp", "15"), ("vvc", "47")])
    pairs = CIRPairs(benchmark, Stage1(crop=64), 32, 0)
    samples = [pairs[n] for n in range(60)]
    same = [bool(torch.equal(x_lq, x_hq)) for _, x_lq, x_hq in samples]
    other = CIRPairs({hq: versions[1:] for hq, versions in benchmark.items()}, Stage1(crop=64), 32, 0)
    assert 15 < sum(same) < 45 and same == [not torch.equal(x_lq, other[n][1]) for n, x_lq, _ in samples]
    again = CIRPairs(benchmark, Stage1(crop=64), 32, 0, period=7)
    assert all(torch.equal(a, b) for a, b in zip(again[23][1:3], pairs[23 % 7][1:3]))


def test_a_version_that_cannot_be_read_is_named_and_its_successor_taken(photos, tmp_path, capsys):
    make_cir.bench([photos], tmp_path, [("jpeg", "5"), ("webp", "15")])
    benchmark = make_cir.read([([photos], tmp_path)], [("jpeg", "5"), ("webp", "15")])
    whole = CIRPairs({hq: versions[1:] for hq, versions in benchmark.items()}, Stage1(crop=64), 32, 0)
    for _, file in (versions[0] for versions in benchmark.values()):
        file.write_bytes(file.read_bytes()[:200])
    damaged = CIRPairs(benchmark, Stage1(crop=64), 32, 0)
    assert all(torch.equal(damaged[n][1], whole[n][1]) for n in range(12))
    assert capsys.readouterr().err.count("skipped: ") == 2
    nothing = CIRPairs({hq: versions[:1] for hq, versions in benchmark.items()}, Stage1(crop=64), 32, 0)
    with pytest.raises(UserError, match="none of its 1 compressed versions can be read"):
        nothing[0]


# ---- router and prompts, Eqs. 3 and 1


@pytest.fixture
def generator():
    """Of seven prompts of 16 channels with a prior of width 8; its router, zero at first, is not."""
    torch.manual_seed(2)
    generator = PromptGenerator(SMALL, 8)
    for w in (generator.W_g, generator.W_noise):
        torch.nn.init.normal_(w.weight)
    return generator


def test_eq_3_by_hand_at_every_position(generator):
    f, noise = torch.randn(4, 10, 16), torch.randn(4, 10, 7)
    x = f.detach().numpy().astype(float)
    W_g, W_noise = (w.weight.detach().numpy().astype(float).T for w in (generator.W_g, generator.W_noise))
    logits = x @ W_g + noise.numpy() * np.log1p(np.exp(x @ W_noise))
    got = generator.gate(f, None, noise)
    for row, g in zip(logits.reshape(40, 7), got.reshape(40, 7)):
        soft = np.exp(row) / np.exp(row).sum()
        expected = [v if v in sorted(soft)[-3:] else 0 for v in soft]
        assert np.allclose(g.detach().numpy(), expected, atol=1e-6)
    quiet = generator.gate(f, None, None)
    assert torch.equal(quiet, generator.gate(f, None, None))
    assert torch.allclose(quiet, top_k_gates(torch.tensor(x @ W_g).float(), 3), atol=1e-6)


def test_only_the_chosen_prompts_learn_and_the_router_by_their_gates(generator):
    y, gates = generator(torch.randn(1, 1, 16), (1, 1), None, None)
    d_prompts, d_router = grad(y.square().sum(), [generator.P, generator.W_g.weight])
    moved = d_prompts.abs().sum((1, 2)) > 0
    assert torch.equal(moved, gates[0, 0] > 0) and moved.sum() == 3 and d_router.abs().sum() > 0


def test_the_prior_reaches_the_router_and_nothing_else(generator, monkeypatch):
    f, dp = torch.randn(1, 10, 16), torch.randn(2, 1, 5, 8)
    (y, gates), (_, other) = (generator(f, (2, 5), d, None) for d in dp)
    assert not torch.equal(gates, other)
    monkeypatch.setattr(generator, "gate", lambda *_: gates)
    assert torch.equal(generator(f, (2, 5), dp[1], None)[0], y)


@pytest.mark.parametrize("kind", ["none", "single", "multiple"])
def test_table_2s_other_prompts(kind):
    generator = PromptGenerator(Stage1(width=16, heads=2, prompt=kind), None)
    f = torch.randn(2, 6, 16)
    y, g = generator(f, (2, 3), None, None)
    if kind == "none":
        assert torch.equal(y, f)
    if kind == "single":
        assert torch.allclose((y - f)[0], (y - f)[1], atol=1e-6) and (y - f).abs().sum() > 0
    if kind == "multiple":  # all, by soft weights
        torch.nn.init.normal_(generator.W_g.weight)
        y, g = generator(f, (2, 3), None, None)
        assert torch.allclose(g, (f @ generator.W_g.weight.T).softmax(2), atol=1e-6)
        expected = sum(g[..., i:i + 1] * (f @ P) for i, P in enumerate(generator.P))
        assert torch.allclose(y, expected, atol=1e-5)


def test_the_module_is_the_released_codes_formulas():
    """Weights by name, and the forward again in plain functions: ViT blocks and a norm a scale; a position's
    features meet the prior, choose three experts and are multiplied by them; features alone go on."""
    torch.manual_seed(3)
    cfg = Stage1(width=32, depth=2, heads=4)
    module = moe_diffir.MoEPromptModule(cfg, 4, 4, 24)
    for name, p in module.named_parameters():
        torch.nn.init.normal_(p, std=0.2 if p.ndim > 1 else 0.5)
    w = module.state_dict()
    z, dp, noise = torch.randn(2, 4, 16, 24), torch.randn(2, 49, 24), torch.randn(2, 4, 7, 16, 24)

    def attention(q_of, kv_of, name, heads, bias):
        q, k, v = (F.linear(x, w[f"{name}.to_{n}.weight"], w[f"{name}.to_{n}.bias"] if bias else None)
                   for x, n in ((q_of, "q"), (kv_of, "k"), (kv_of, "v")))
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        mixed = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3) @ v
        out = [w[f"{name}.to_out.0.{n}"] for n in ("weight", "bias")]
        return F.linear(mixed.transpose(1, 2).flatten(2), *out)

    def norm(x, name):
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"])
    with torch.no_grad():
        ys, gates = module(z, dp, noise)
        f = z
        for i, (y, g) in enumerate(zip(ys, gates)):
            f = F.conv2d(f, w[f"conv.{i}.weight"], w[f"conv.{i}.bias"], 2 if i else 1, 1)
            size = f.shape[2:]
            assert y.shape == (2, 32, 16 // 2**i, 24 // 2**i) == (*f.shape[:2], *size)
            x = f.flatten(2).transpose(1, 2)
            for b in range(2):
                block = f"vit.{i}.{b}"
                x = x + attention(*[norm(x, f"{block}.norm1")] * 2, f"{block}.attn1", 4, True)
                hidden = F.gelu(F.linear(norm(x, f"{block}.norm3"), w[f"{block}.ff.net.0.proj.weight"],
                                         w[f"{block}.ff.net.0.proj.bias"]))
                assert hidden.shape[2] == 4 * 32
                x = x + F.linear(hidden, w[f"{block}.ff.net.2.weight"], w[f"{block}.ff.net.2.bias"])
            x = norm(x, f"vit.{i}.2")
            u = attention(x, dp, f"prompt.{i}.meet", 8, False)
            own = noise[:, i, :, :size[0], :size[1]].flatten(2).transpose(1, 2)
            h = u @ w[f"prompt.{i}.W_g.weight"].T + own * F.softplus(u @ w[f"prompt.{i}.W_noise.weight"].T)
            p = h.softmax(2)
            p = p * (p >= p.sort(2).values[..., -3:-2])
            assert torch.allclose(g, p, atol=1e-5)
            expected = sum(p[..., k:k + 1] * (x @ w[f"prompt.{i}.P"][k]) for k in range(7))
            expected = expected.transpose(1, 2).unflatten(2, size)
            assert torch.allclose(y, expected, atol=1e-4 * expected.std())
            f = x.transpose(1, 2).unflatten(2, size)


# ---- modulation of the UNet, Sec. 3.4


@SIZES
def test_untrained_modulation_leaves_the_base_untouched(model, empty, h, w):
    """The UNet's forward written out is the library's; the module's strides end on the UNet's own."""
    z_t, z_lq = torch.randn(2, 2, 16, h, w)
    x, t, c = torch.rand(2, 3, 8 * h, 8 * w) * 2 - 1, torch.tensor([3, 700]), torch.randn(2, 77, 96)
    with torch.no_grad():
        eps_hat, *_ = model(z_t, t, z_lq, x, torch.randn(2, 3, 7, h, w))
        assert (eps_hat - model.sd.unet(z_t, t, model.text(x)).sample).abs().max() < 1e-6
        out = model.unet(z_t, t, c, model.module(z_lq, model.degradation_prior(x))[0])
        assert (out - model.sd.unet(z_t, t, c).sample).abs().max() < 1e-6


@SIZES
def test_spade_is_its_formula_on_the_residual_branches_of_stablesr(stirred, h, w):
    """Against the library's forward, in which hooks modulate what ends the branches."""
    unet, t, seen = stirred.sd.unet, torch.tensor([100, 700]), []
    z, c = torch.randn(2, 16, h, w), torch.randn(2, 77, 96)
    features = [torch.randn(2, 16, -(-h // 2**i), -(-w // 2**i)) for i in range(3)]
    spade_of = {resnet: spade for spade, (_, resnet) in zip(stirred.spade, stirred.modulated)}

    def hooked(i, resnet):
        def modulate(conv2, args, branch):
            seen.append(resnet)
            gamma, beta = spade_of[resnet].maps(features[i]).chunk(2, 1)
            return branch + gamma * F.group_norm(branch, unet.config.norm_num_groups, eps=1e-5) + beta
        return resnet.conv2.register_forward_hook(modulate)
    with torch.no_grad():
        got, plain = stirred.unet(z, t, c, features), unet(z, t, c).sample
        hooks = [hooked(2, unet.mid_block.resnets[0])]
        hooks += [hooked(2 - n, resnet) for n, block in enumerate(unet.up_blocks) for resnet in block.resnets]
        expected = unet(z, t, c).sample
    [hook.remove() for hook in hooks]
    assert len(seen) == len({*seen}) == len(stirred.spade) == 7  # the mid block's first, six that lead up
    assert torch.allclose(got, expected, atol=1e-4) and (got - plain).abs().max() > 0.01


# ---- priors of CLIP, Secs. 3.2 and 3.3


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP image encoder as one would download it, in miniature."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("clip")
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=16)).save_pretrained(folder)
    return folder


def test_clip_sees_the_picture_as_its_processor_would(clip, tmp_path):
    """Frozen, and in single precision, whatever it was saved in."""
    picture, prior = CAT.crop((0, 0, 200, 200)), moe_diffir.Prior(str(clip))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs, x = processor(picture, return_tensors="pt").pixel_values, to_tensor(picture)[None]
    assert (moe_diffir.clip_input(x, 32) - theirs).abs().max() < 0.05  # theirs rounds to 8 bits
    assert prior(x).shape == (1, 5, 32) and not any(p.requires_grad for p in prior.parameters())
    CLIPVisionModel.from_pretrained(clip).half().save_pretrained(tmp_path)
    half = moe_diffir.Prior(str(tmp_path))
    assert half.net.dtype == torch.float32 and torch.allclose(half(x), prior(x), atol=0.02)


@torch.no_grad()
def test_the_prior_sees_windows_of_the_training_crop(model):
    """The mean over those that cover a picture; one smaller than a window is seen as it is."""
    crop, other = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    of, prior, two = model.degradation_prior, model.prior, torch.cat([crop, other], 3)
    small = crop[:, :, :40, :50]
    assert torch.equal(of(crop), prior(crop)) and torch.equal(of(small), prior(small))
    assert torch.allclose(of(crop.repeat(1, 1, 3, 2)), prior(crop), atol=1e-5)
    assert torch.allclose(of(two), (prior(crop) + prior(other)) / 2, atol=1e-5)
    halves = (prior(two[..., :64]) + prior(two[..., 36:100])) / 2
    assert torch.allclose(of(two[..., :100]), halves, atol=1e-5)
    assert (prior(two) - prior(crop)).abs().max() > 1e-3  # what the whole at once would give


def test_the_adapter_is_clip_adapters_on_clips_tokens_and_learned_ones(model, empty):
    """t + ReLU(W_2 ReLU(W_1 t)), without biases; the learned tokens start as the empty caption's."""
    v2t, x, tokens = model.v2t, torch.rand(2, 3, 64, 64) * 2 - 1, []
    hook = v2t.clip.register_forward_hook(lambda m, a, out: tokens.append(out.last_hidden_state[:, 1:]))
    with torch.no_grad():
        c = v2t(x)
        hook.remove()
        t = F.conv2d(tokens[0].transpose(1, 2).reshape(2, 192, 16, 16), v2t.conv.weight, v2t.conv.bias, 1, 1)
        t = torch.cat([t.flatten(2).transpose(1, 2), empty.expand(2, -1, -1)], 1)
        W_1, W_2 = (v2t.mlp[i].weight for i in (0, 2))
        assert W_1.shape == (24, 96) and not any(b.endswith("bias") for b in v2t.mlp.state_dict())
        assert torch.allclose(c, t + (t @ W_1.T).relu().matmul(W_2.T).relu(), atol=1e-5)
        assert c.shape == (2, 256 + 77, 96) and torch.equal(v2t.learned, empty)


# ---- the decoder compensator, Fig. 3d


@SIZES
def test_the_encoder_written_out_is_the_librarys(model, h, w):
    """Its features: of the last ResBlock before each downsampling and at the end."""
    vae, noise, seen = model.sd.vae, torch.randn(1, 16, h, w), []
    x = torch.rand(1, 3, 8 * h, 8 * w) * 2 - 1
    hooks = [block.resnets[-1].register_forward_hook(lambda m, a, out: seen.append(out))
             for block in vae.encoder.down_blocks]
    with torch.no_grad():
        z, features = model.encode(x)
        seen.clear()
        posterior = vae.encode(x).latent_dist
        sample = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
        assert torch.allclose(model.encode(x, noise)[0], sample, atol=1e-5)
    [hook.remove() for hook in hooks]
    assert torch.allclose(z, posterior.mean * vae.config.scaling_factor, atol=1e-6)
    assert [f.shape[1] for f in features] == [16, 32, 64, 128]
    assert all(torch.allclose(f, g, atol=1e-6) for f, g in zip(features, seen[:4]))


@SIZES
def test_compensator_is_its_formula_between_the_decoders_blocks(model, stirred, h, w):
    """Against the library's decoder, plain where untrained or w is 0, else with hooks that add to it."""
    vae, compensator = stirred.sd.vae, stirred.compensator
    x = torch.rand(1, 3, 8 * h, 8 * w) * 2 - 1
    z, features = stirred.encode(x)
    plain = vae.decode(z / vae.config.scaling_factor).sample
    assert torch.allclose(model.compensator(model.sd, z, features), plain, atol=1e-5)
    for buffer in compensator.buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5)

    def decode(w):
        return compensator(stirred.sd, z, features, w)
    full, half, none = map(decode, (1.0, 0.5, 0.0))

    def hooked(i, block):
        def add(resnet, args, h):
            mean, std = getattr(compensator, f"mean{i}"), getattr(compensator, f"std{i}")
            both = torch.cat([features[i], h], 1)
            return h + std[len(std) // 2:] * compensator.fuse[str(i)]((both - mean) / std)
        return block.resnets[-1].register_forward_hook(add)
    hooks = [hooked(3 - i, block) for i, block in enumerate(vae.decoder.up_blocks)]
    expected = vae.decode(z / vae.config.scaling_factor).sample
    [hook.remove() for hook in hooks]
    assert torch.allclose(full, expected, atol=1e-4) and torch.allclose(none, plain, atol=1e-5)
    assert (full - plain).abs().mean() > (half - plain).abs().mean() > 1e-4
    assert all(g.any() for g in grad(full.square().sum(), list(compensator.parameters())))


def test_units_of_channels_and_of_those_that_never_change(stirred):
    """Deviations as measured; where one is 0 or nearly, as of an encoder's unused channel, a floor."""
    compensator = stirred.compensator
    with torch.no_grad():
        z, features = stirred.encode(torch.rand(4, 3, 64, 64) * 2 - 1)
        features[1][:, 3], features[1][:, 4] = 5.0, 1e-5 * torch.randn(features[1][:, 4].shape)
        compensator(stirred.sd, z, features, measure=True)
        mean, std = compensator.mean1.flatten(), compensator.std1.flatten()  # of half size
        assert std[3] == std[4] == std.min() == pytest.approx(1e-3) and mean[3] == 5
        assert std[0] == pytest.approx(features[1][:, 0].std().item(), rel=1e-4)
        compensator(stirred.sd, torch.zeros_like(z), [torch.zeros_like(f) for f in features], measure=True)
    x_hat = compensator(stirred.sd, z, features)  # in units of blank pictures
    moved = grad(x_hat.square().mean(), list(compensator.parameters()))
    assert x_hat.isfinite().all() and all(g.isfinite().all() for g in moved)


# ---- sampling


def test_eps_of_both_parametrisations(model, monkeypatch):
    z_0, eps = torch.randn(2, 2, 16, 4, 4)
    alpha_bar = model.sd.alpha_bar[torch.tensor([10, 900])]
    a = alpha_bar.view(-1, 1, 1, 1)
    z_t, v = a.sqrt() * z_0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * z_0
    assert torch.equal(moe_diffir.diffuse(z_0, eps, alpha_bar), z_t)
    assert torch.equal(model.eps(z_t, eps, alpha_bar), eps)
    monkeypatch.setattr(model.sd, "prediction", "v_prediction")
    assert torch.allclose(model.eps(z_t, v, alpha_bar), eps, atol=1e-5)
    assert torch.allclose(model.sd.x0(z_t, v, alpha_bar), z_0, atol=1e-5)


@torch.no_grad()
def test_sampling_is_diffusers_ancestral_of_fixed_small_variance(stirred, monkeypatch):
    """From pure noise, t from 999 to 0, both included; each picture's noise by its own generator."""
    model = stirred
    monkeypatch.setattr(model, "cfg", Stage1(t_star=0))
    scheduler = DDPMScheduler.from_pretrained(TINY_SD, subfolder="scheduler", timestep_spacing="linspace",
                                              variance_type="fixed_small", clip_sample=False)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [999, 749, 500, 250, 0]
    z_lq, x = torch.randn(2, 16, 8, 8), torch.rand(2, 3, 64, 64) * 2 - 1
    ys, c = model.module(z_lq, model.degradation_prior(x))[0], model.text(x)
    one, two = (torch.Generator().manual_seed(n) for n in (1, 2))
    z = torch.cat([torch.randn(1, 16, 8, 8, generator=g) for g in (one, two)])
    for t in scheduler.timesteps:
        done = scheduler.step(model.unet(z, t[None], c, ys), t, z, generator=[one, two])
        z = done.prev_sample
    got = model.sample(z_lq, x, 5, [torch.Generator().manual_seed(n) for n in (1, 2)])
    assert torch.allclose(got, done.pred_original_sample, atol=1e-3 * got.std())


def test_the_module_runs_once_a_picture_however_many_steps(model, monkeypatch):
    calls, real = [], model.module.forward
    monkeypatch.setattr(model, "cfg", Stage1(t_star=0))
    monkeypatch.setattr(model.module, "forward", lambda *args: calls.append(1) or real(*args))
    with torch.no_grad():
        model.sample(torch.randn(1, 16, 8, 8), torch.rand(1, 3, 64, 64), 4, [torch.Generator()])
    assert len(calls) == 1


# ---- losses, Eqs. 2 and 4


def test_eq_2_from_noise_is_uniform_in_t_and_standard_normal_and_each_samples_own(model):
    cfg, n, alpha_bar = Stage1(t_star=0), torch.arange(400), model.sd.alpha_bar
    z_lq, z_0 = torch.randn(2, 400, 16, 2, 2)
    t, eps = moe_diffir.draw(n, z_lq, z_0, cfg, alpha_bar, 0)
    counts = torch.histc(t.float(), 4, 0, 1000)
    assert 0 <= t.min() < 20 and 980 < t.max() < 1000 and counts.min() > 60
    assert eps.shape == z_0.shape and abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    own = moe_diffir.draw(n[7:9], z_lq[7:9], z_0[7:9], cfg, alpha_bar, 0)
    assert torch.equal(own[0], t[7:9]) and torch.equal(own[1], eps[7:9])
    other = moe_diffir.draw(n, z_lq, z_0, cfg, alpha_bar, 1)
    assert not torch.equal(other[0], t) and not torch.equal(other[1], eps)


def test_eq_2_from_the_compressed_latent_asks_for_what_one_step_restores(model, monkeypatch):
    (z_lq, z_0), x = torch.randn(2, 3, 16, 4, 4), torch.rand(3, 3, 32, 32)
    t, eps = moe_diffir.draw(torch.arange(3), z_lq, z_0, Stage1(), model.sd.alpha_bar, 0)
    z_t, seen = model.sd.alpha_bar[49].sqrt() * z_lq, []
    assert t.tolist() == [49] * 3
    assert torch.allclose(moe_diffir.diffuse(z_0, eps, model.sd.alpha_bar[t]), z_t, atol=1e-5)
    monkeypatch.setattr(model, "unet", lambda *args: seen.extend(args[:2]) or eps)
    with torch.no_grad():
        got = model.sample(z_lq, x, 1, [])
    assert torch.equal(seen[0], z_t) and torch.equal(seen[1], t) and torch.allclose(got, z_0, atol=1e-5)
    assert Stage1.paper().t_star == 0 and Stage2.paper().sampling == 200


def test_losses_equal_their_formulas(run):
    a, b = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    assert moe_diffir.loss_sd(a, b).item() == pytest.approx(np.square(a.numpy() - b.numpy()).mean(), rel=1e-5)
    distance = common.lpips("tiny-vgg")
    x, y = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    assert moe_diffir.loss_decoder(distance, x, y) == pytest.approx(distance(x, y).mean().item(), rel=1e-5)
    assert moe_diffir.loss_decoder(distance, y, y) == 0
    for row in rows_of(run.folder)[:4]:  # every position chooses K = 3 prompts at each of three scales
        load = {k: v for k, v in row.items() if k.startswith("load")}
        assert sum(load.values()) == pytest.approx(9, abs=1e-4) and sum(k[4] == "1" for k in load) == 7


# ---- both stages


def test_stage_1_moves_its_modules_and_nothing_else(stirred):
    z, x, noise = torch.randn(2, 16, 8, 8), torch.rand(2, 3, 64, 64), torch.randn(2, 3, 7, 8, 8)
    eps_hat, *_ = stirred(z, torch.tensor([100, 300]), z, x, noise)
    moved = moved_by(moe_diffir.loss_sd(eps_hat, torch.randn_like(z)), stirred)
    assert tops(moved) == {"module", "spade", "v2t"}  # both CLIPs are frozen
    assert {"v2t.patch.weight", "v2t.position", "v2t.conv.weight", "v2t.learned",
            "module.prompt.0.P", "module.prompt.0.W_g.weight",
            "module.prompt.0.W_noise.weight", "module.prompt.0.meet.to_q.weight"} <= moved
    assert "sd" not in tops(n for n, p in stirred.named_parameters() if p.requires_grad)


def test_the_module_learns_from_the_second_step_on(empty):
    """SPADE's last layer is zero at first: only its gradient is not. After one step of it all have some."""
    torch.manual_seed(0)
    model, z = MoEDiffIR(TINY_SD, SMALL, empty), torch.randn(2, 16, 8, 8)
    x, noise = torch.rand(2, 3, 64, 64), torch.randn(2, 3, 7, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(2):
        optimizer.zero_grad()
        eps_hat, *_ = model(z, torch.tensor([99, 99]), z, x, noise)
        moe_diffir.loss_sd(eps_hat, torch.randn_like(z)).backward()
        assert all(spade.maps[2].weight.grad.abs().sum() > 0 for spade in model.spade)
        reached = [prompt.P.grad.abs().sum() > 0 for prompt in model.module.prompt]
        assert reached == [step == 1] * 3
        optimizer.step()


@pytest.mark.parametrize("t_star, sampling", [(49, 1), (0, 3)])
def test_a_run_of_either_start(t_star, sampling, photos, tmp_path, monkeypatch):
    """What the UNet is given and asked for; z_0 and restore are of as many steps as the run says."""
    encoded, given, asked, drawn, steps = [], [], [], [], []

    def record(owner, name, note):
        def recorded(*args, real=getattr(owner, name), **more):
            out = real(*args, **more)
            note(out, *args)
            return out
        monkeypatch.setattr(owner, name, recorded)
    record(common.SD, "encode", lambda z, *_: encoded.append(z))
    record(MoEDiffIR, "forward", lambda _, model, *args: given.extend(args))
    record(MoEDiffIR, "sample", lambda _, model, z_lq, x_lq, n, *more: steps.append(n))
    record(moe_diffir, "draw", lambda out, n, *latents: drawn.extend([*out, *latents]))
    record(moe_diffir, "loss_sd", lambda _, eps_hat, eps: asked.append(eps))
    more = ["--codecs", "jpeg:5", "--s1-steps", 1, "--s2-steps", 1, "--t-star", t_star]
    more += ["--s2-sampling", 3] if not t_star else []
    moe_diffir.main(train_args("moe_diffir", tmp_path / "run", photos, *more))
    (z_lq, z_0), (t, eps, *latents, cfg, alpha_bar, seed) = encoded[:2], drawn
    assert all(map(torch.equal, latents, (z_lq, z_0))) and cfg.t_star == t_star and seed == 0
    z_t = moe_diffir.diffuse(z_0, eps, alpha_bar[t])
    assert all(map(torch.equal, (*given[:3], *asked), (z_t, t, z_lq, eps)))
    # with t*: one step's errors after stage 1; three batches of latents; eval of two pictures; again errors
    assert steps == [1, 1] * bool(t_star) + [sampling] * (3 + 2) + [1, 1] * bool(t_star)
    restore = ["restore", photos / "cat.png", "-o", tmp_path / "o.png", "--weights", tmp_path / "run"]
    moe_diffir.main([*map(str, restore)])
    if not t_star:
        moe_diffir.main([*map(str, restore), "--steps", "2"])
    assert steps[9 if t_star else 5:] == ([1] if t_star else [3, 2])


def test_a_run_keeps_what_it_trained(run):
    """Stage 1: its modules, and the empty caption's tokens. Stage 2: the compensator and its units."""
    files = (run.folder / "model" / f"stage{n}.safetensors" for n in (1, 2))
    (stage1, _), (stage2, header) = map(load_tensors, files)
    assert tops(stage1) == {"empty", "module", "spade", "v2t"}
    assert tops(stage2) == {"fuse", "mean1", "std1", "mean2", "std2"}
    assert header["tasks"][0] == "jpeg:5" and header["stage1.width"] == 16


def test_rows_made_already_are_not_made_again(tmp_path):
    path, cfg, made = tmp_path / "latents" / "a.npy", Stage2(batch=2), []
    acc = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"), is_main_process=True,
                          autocast=torch.no_grad, wait_for_everyone=lambda: None)

    def filled(path):
        made.clear()
        samples = [(n, 2.0 * n) for n in range(7)]
        return filled_rows(path, (7,), samples, cfg, acc, lambda n, x: made.extend(n.tolist()) or x).tolist()
    assert filled(path) == [0, 2, 4, 6, 8, 10, 12] and made == [*range(7)]
    torn = np.load(path, mmap_mode="r+")
    torn[4] = np.nan  # by a kill
    torn.flush()
    assert filled(path) == [0, 2, 4, 6, 8, 10, 12] and made == [4, 5]  # their batch
    acc.num_processes, acc.process_index = 2, 1
    filled(tmp_path / "b.npy")
    assert made == [2, 3, 6]  # the second of two processes


def test_latents_on_the_fly_are_those_of_the_cache(run, tmp_path, photos, no_evaluation):
    path, = (run.folder / "latents").iterdir()
    z_0 = np.load(path)
    assert path.name.startswith("5-64-1-") and z_0.shape == (5, 16, 8, 8) and np.isfinite(z_0).all()
    out, more = before_stage_2(run, tmp_path / "run"), ["--stage", 2, "--cache-latents", 0, "--s2-steps", 1]
    moe_diffir.main(train_args("moe_diffir", out, photos, *more))
    a, b = (rows_of(folder)[4]["lpips"] for folder in (run.folder, out))
    assert a == pytest.approx(b, rel=1e-4)


def test_ablations_with_a_frozen_clip(tmp_path, photos, clip, capsys, no_evaluation):
    """Tables 2 and 3 by flags; CLIP encoders stay frozen and out of the checkpoint, and are found again."""
    def train(name, *flags):
        more = ["--codecs", "jpeg:5", "--s1-steps", "1", "--s2-steps", "1", "--cache-latents", "0", *flags]
        moe_diffir.main(train_args("moe_diffir", tmp_path / name, photos, *more))
        return moe_diffir.load(tmp_path / name)
    model = train("clip", "--dp", str(clip), "--clip", str(clip), "--experts", "4", "--top-k", "1")
    tensors = load_tensors(tmp_path / "clip" / "model" / "stage1.safetensors")[0]
    assert tensors["module.prompt.0.P"].shape[0] == 4
    assert not any("vision_model" in k or "embeddings" in k or k.startswith("prior.") for k in tensors)
    assert "1 of the paper's 21 tasks" in capsys.readouterr().out
    gates = gates_of(model, CAT.crop((0, 0, 40, 40)))
    assert [len(g) for g in gates] == [4, 4, 4] and all(0 < g.sum() < 1 for g in gates)
    assert moe_diffir.restore(model, CAT.crop((0, 0, 40, 40)), 1).size == (40, 40)
    model = train("none", "--no-v2t", "--no-dp", "--prompt", "none")
    assert model.prior is None and model.v2t is None
    assert gates_of(model, CAT.crop((0, 0, 40, 40))) == []
    with pytest.raises(UserError, match="routes nothing"):
        moe_diffir.main(["figures", "--weights", str(tmp_path / "none")])


# ---- inference


@pytest.mark.parametrize("t_star, steps, levels", [(49, 1, 6), (0, 3, 30)])
def test_tiles_keep_the_picture(run, monkeypatch, t_star, steps, levels):
    """Padded to 8 pixels the whole is encoded once, windows twice. From noise more is made up."""
    model, calls, real = run.model, [], run.model.encode
    monkeypatch.setattr(model, "cfg", replace(model.cfg, t_star=t_star))
    lq = compress(CAT.crop((0, 0, 300, 250)), "jpeg", "10")[0]
    monkeypatch.setattr(model, "encode", lambda x: calls.append(x.shape) or real(x))
    whole = moe_diffir.restore(model, lq, steps)
    assert calls == [(1, 3, 256, 304)]
    tiled = moe_diffir.restore(model, lq, steps, 1.0, tiling(model, 128)(lq.size))
    assert len(calls) == 1 + 2 * (1 + 9)  # encoding, decoding: the mosaic, then 3 x 3 windows
    assert np.abs(np.asarray(tiled).astype(float) - np.asarray(whole)).mean() < levels
    args = SimpleNamespace(weights=run.folder, base=None, tile=None, steps=steps, fidelity=0.0)
    bare = np.asarray(moe_diffir.restorer(args, model)(lq)[0])
    assert np.array_equal(bare, moe_diffir.restore(model, lq, steps, fidelity=0.0))
    assert not np.array_equal(bare, whole)


# ---- eval, profile and figures


def test_routing_in_closed_form():
    """Two codecs, each with prompts of its own: one bit; with the same prompts for both: none."""
    gates = [[torch.tensor([1.0, 0, 0])], [torch.tensor([0, 1.0, 0])]]
    row, = routing([("jpeg", "5", gates[0])] * 20 + [("vvc", "47", gates[1])] * 20)
    assert row["bits"] == pytest.approx(1, abs=1e-5) and row["by chance"] < 0.1 and row["sets"] == 2
    row, = routing([(codec, "5", gates[n % 2]) for codec in ("jpeg", "webp") for n in range(20)])
    assert row["bits"] == pytest.approx(0, abs=1e-6)


def test_latent_errors_in_closed_form(photos, capsys):
    """Of a model whose latents are pixels and whose one step halves them."""
    model = SimpleNamespace(cell=1, encode=lambda x: (x, []), sample=lambda z, x, steps, noise: z / 2)
    one = own = 0
    for file in list_images([photos]):
        image = Image.open(file)
        z_hq, z_lq = (np.asarray(i, float) / 127.5 - 1 for i in (image, compress(image, "jpeg", "5")[0]))
        one, own = one + np.square(z_lq / 2 - z_hq).mean(), own + np.square(z_lq - z_hq).mean()
    found = print_latent_errors(model, [photos], [("jpeg", "5"), ("jpeg", "10"), ("hific", "low")])
    assert found == {"jpeg:5": pytest.approx(one / own, rel=1e-4)}
    assert f"jpeg:5 {one / own:.3f}" in capsys.readouterr().out


def test_eval_tells_of_every_codec(run, photos):
    for said in ("trains on 12 of the paper's 21 tasks, without c_psnr, c_ssim, hific", "vvc:47, 2 images",
                 "restored, 1 step", "VAE(original)", "gap, 1 step",
                 "latent error after one step, of the compressed latent's own: jpeg:5",
                 "what the prompts picked tell of the codec, 8"):
        assert said in run.printed, said
    results = json.loads((run.folder / "metrics.json").read_text())
    assert set(results["results"]) == {"jpeg:5", "webp:5", "hevc:47", "vvc:47"}
    assert len(results["mutual_information"]) == 3
    low, high, ours = (results["codecs"]["vvc"][row]["PSNR"]
                       for row in ("VAE(compressed)", "VAE(original)", "restored, 1 step"))
    gap = results["gap_closed"]["vvc"]["restored, 1 step"]
    assert gap == pytest.approx((ours - low) / (high - low))
    assert list_images([photos]) == sorted(photos.glob("*.png"))  # nothing of the hidden cache
    kept = ablations.figures(measures, run.folder / "metrics.json")  # without LPIPS, which is not to be had
    over_all = np.mean([task["restored, 1 step"]["PSNR"] for task in results["results"].values()])
    assert kept["all tasks"]["PSNR"] == pytest.approx(over_all, abs=1e-4) and len(kept["latent error"]) == 4


def test_eval_of_pairs_unseen_levels_and_fid(run, photos, tmp_path, monkeypatch):
    """FID and the metrics without reference by a stand-in for pyiqa: which pictures go where."""
    sets, own, ours, other = [], tmp_path / "own", "restored, 1 step", "by run, 1 step"
    shutil.copytree(run.folder / "model", own / "model")

    def create_metric(name, device):
        fid = lambda a, b: sets.append([len({f.read_bytes() for f in list_images([x])}) for x in (a, b)]) or (
            5.0 if "jpeg 5" in a else 3.0)
        return fid if name == "fid" else lambda x: torch.tensor(0.5)

    def evaluate(*args):
        args = ["eval", "--weights", own, "--steps", 1, *args]
        said = said_by(moe_diffir.main, [*map(str, args)], tmp_path)
        return said, json.loads((own / "metrics.json").read_text())
    monkeypatch.setitem(sys.modules, "pyiqa", SimpleNamespace(create_metric=create_metric))
    codecs = "--data", photos, "--codecs", "vvc:52", "jpeg:25", "jpeg:5", "--metrics", "all"
    said, found = evaluate(*codecs, "--against", run.folder)
    assert re.search(r"Table 1.*\n .*SSIM.*CLIPIQA.* FID\n", said)
    levels = [found["results"][task][ours]["PSNR"] for task in ("jpeg:25", "jpeg:5")]
    of_jpeg = found["codecs"]["jpeg"][ours]
    assert of_jpeg["FID"] == (3 + 5) / 2 and of_jpeg["PSNR"] == pytest.approx(np.mean(levels))
    assert sets == [[2, 2]] * 15  # 3 conditions of 5 rows, of two photographs each: no original twice
    tasks, all_tasks = found["results"].values(), found["all_tasks"]
    assert list(all_tasks) == ["compressed", ours, other] and all_tasks[other] == all_tasks[ours]
    assert all(all_tasks[row][k] == pytest.approx(np.mean([task[row][k] for task in tasks]))
               for row in all_tasks for k in ("PSNR", "SSIM", "FID"))
    row, = re.findall(r"^by run, 1 step  .*", said.split("Tables 2 and 3")[1], re.M)
    assert f"{all_tasks[other]['PSNR']:.2f}" in row and "over all 3 tasks" in said

    lq, hq = tmp_path / "lq", tmp_path / "hq"  # hq: other originals than --data's
    lq.mkdir(), hq.mkdir()
    shutil.copy(photos / "cat.png", hq)
    for file in photos.glob("*.png"):
        compress(Image.open(file), "jpeg", "5")[0].save(lq / file.name)
    hific = "--pairs", lq, photos, "--task", "hific:low", "--pairs", hq, hq, "--task", "hific:high"
    said, table = evaluate(*hific, "--codecs", "jpeg:5", "--data", photos)
    assert list(table["results"]) == ["jpeg:5", "hific:low", "hific:high"]
    of_jpeg, low, high = table["results"].values()
    assert low == of_jpeg == {row: {k: v for k, v in values.items() if k not in ("CLIPIQA", "MANIQA", "FID")}
                              for row, values in found["results"]["jpeg:5"].items() if row != other}
    assert high["compressed"]["SSIM"] == pytest.approx(1)
    mean = table["codecs"]["hific"][ours]
    assert mean["SSIM"] == pytest.approx(np.mean([task[ours]["SSIM"] for task in (low, high)]))
    assert "hific:low, 2 images" in said and "hific:high, 1 images" in said
    row, = re.findall(r"^hific, restored, 1 step  .*", said.split("Table 1")[1], re.M)
    assert f"{mean['PSNR']:.2f}" in row and f"{mean['SSIM']:.4f}" in row
    assert list(evaluate(*hific)[1]["results"]) == ["hific:low", "hific:high"]


def test_figures_rows_sum_to_one(run, photos, tmp_path, capsys):
    shutil.copytree(run.folder / "model", tmp_path / "model")
    moe_diffir.main(["figures", "--weights", str(tmp_path), "--data", str(photos),
                     "--codecs", "jpeg:5", "jpeg:15", "vvc:47"])
    table = json.loads((tmp_path / "samples" / "router.json").read_text())
    share = torch.tensor(table["share"])
    assert share.shape == (3, 3, 7) and torch.allclose(share.sum(2), torch.ones(3, 3), atol=1e-5)
    apart = torch.tensor(table["total_variation"]["scales"])
    expected = (share[:, :2].mean(1) - share[:, 2]).abs().sum(1) / 2
    assert torch.allclose(apart[:, 0, 1], expected, atol=1e-5)
    assert "what the prompts picked tell" in capsys.readouterr().out
    picture = Image.open(tmp_path / "samples" / "router.png")
    assert picture.width > 900 and len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_profile_counts_by_part_for_one_step_and_two_hundred(capsys):
    moe_diffir.main(["profile", "--paper", "--size", "256", "--no-time"])
    said = capsys.readouterr().out
    rows = {cells[0]: cells for cells in (re.split(r"  +", line) for line in said.splitlines())}
    parameters = {name: cells[1] for name, cells in rows.items() if len(cells) > 2}
    assert parameters["a step: UNet"] == "865.91 M" and parameters["once: VAE decoder"] == "49.49 M"
    assert parameters["once: degradation prior (CLIP)"] == "87.46 M"
    sums = [re.search(rf"^{n} steps?: ([\d.]+) T MACs of .* layers, ([\d.]+) T of all", said, re.M)
            for n in (1, 200)]
    for column, group in ((2, 1), (3, 2)):  # of convolutions and linear layers; of all products
        one, all_steps = (float(of[group]) for of in sums)
        a_step = sum(float(cells[column].split()[0]) for name, cells in rows.items() if "a step" in name)
        assert all_steps - one == pytest.approx(199 * a_step, rel=1e-3)
        assert one == pytest.approx(float(rows["total"][column].split()[0]), rel=1e-3)
