"""sodiff.py: each equation, which parameters each loss moves, captions, and the command line end to end."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

import common
import sodiff
from common import ROOT, SD, TINY_SD, UserError, dists_small, frozen, read_image, run_cli, text_tokens
from conftest import said_by, same_run
from data import caption
from data.files import load_tensors
from data.results import complexity, evaluate
from sodiff import (SAIPE, JPEGPairs, NoisedDiscriminator, SODiff, Stage1, Stage2, TimePredictor,
                    alpha_bar_at, expected_timestep, favor, gumbel_for, sobel)

PHOTOS = ROOT / "data" / "photos"
SMALL = Stage1(width=24, heads=3, depth=2, features=16, crop=64)


# ---- SAIPE


def softmax_attention(q, k, v):
    return ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1) @ v


def test_favor_approximates_softmax_attention():
    """q, k ~ 0.25 N(0, 1): error below 10 % at 256 features, falling with their number."""
    g, errors = torch.Generator().manual_seed(0), {}
    q, k = (0.25 * torch.randn(2, 4, 200, 32, generator=g) for _ in range(2))
    v = torch.randn(2, 4, 200, 32, generator=g)
    exact = softmax_attention(q, k, v)
    for m in (64, 256, 1024):
        torch.manual_seed(m)
        approximate = favor(q, k, v, sodiff.orthogonal_features(m, 32))
        errors[m] = ((approximate - exact).norm() / exact.norm()).item()
    assert errors[256] < 0.1 and errors[64] > errors[256] > errors[1024], errors


def test_favor_is_unbiased_where_attention_is_sharp():
    """Each single weight phi(q) phi(k) estimates exp(q k / sqrt(d)): mean over many draws of omega."""
    torch.manual_seed(0)
    q, k = 0.7 * torch.randn(1, 1, 3, 8), 0.7 * torch.randn(1, 1, 3, 8)
    estimates = []
    for _ in range(3000):
        omega = sodiff.orthogonal_features(64, 8)
        x, y = q * 8 ** -0.25, k * 8 ** -0.25
        phi = [(s @ omega.T - s.square().sum(-1, keepdim=True) / 2).exp() / 8 for s in (x, y)]
        estimates.append(phi[0] @ phi[1].transpose(-1, -2))
    exact = (q @ k.transpose(-1, -2) / 8 ** 0.5).exp()
    assert torch.allclose(torch.stack(estimates).mean(0), exact, rtol=0.05)


def test_favor_costs_linear_memory_and_time():
    """Bytes kept for the backward pass and multiplications: four times the tokens, four times as much."""
    omega, cost = sodiff.orthogonal_features(64, 16), {}
    for n in (1024, 4096):
        q = torch.randn(1, 2, n, 16, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            favor(q, q, q, omega)
        cost[n] = sum(kept), complexity.macs(lambda q=q: favor(q, q, q, omega))[1]
    assert all(b / a == pytest.approx(4, rel=0.02) for a, b in zip(*cost.values())), cost


def test_random_features_are_orthogonal_with_gaussian_lengths():
    torch.manual_seed(0)
    omega = sodiff.orthogonal_features(4096, 16)
    block = F.normalize(omega[:16], dim=1)
    assert torch.allclose(block @ block.T, torch.eye(16), atol=1e-5)
    lengths = omega.square().sum(1)  # chi-squared with 16 degrees of freedom
    assert lengths.mean() == pytest.approx(16, rel=0.03) and lengths.var() == pytest.approx(32, rel=0.1)


def test_swin_shift_is_masked_attention_within_shifted_windows():
    """The second layer of an RSTB, on a map of 16x24: every token attends to those in its own 8x8 window of
    the grid shifted by 4, and to nothing beyond the picture's border."""
    torch.manual_seed(0)
    layer = sodiff.RSTB(12, 3, 2).swin[1]
    attn, (h, w) = layer.attn, (16, 24)
    x = torch.randn(1, h, w, 12)
    y, x_ = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    window = ((y + 4) // 8 * 100 + (x_ + 4) // 8).flatten()
    q, k, v = attn.qkv(x.flatten(1, 2)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    dy, dx = (c.flatten()[:, None] - c.flatten()[None] for c in (y, x_))
    same = window[:, None] == window[None]
    index = ((dy + 7) * 15 + dx + 7).where(same, 0)
    bias = attn.relative_position_bias_table[index].permute(2, 0, 1)
    scores = (q @ k.transpose(-1, -2) / 2 + bias).masked_fill(~same, -torch.inf)
    expected = attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)).view(1, h, w, 12)
    assert torch.allclose(attn(x), expected, atol=1e-5)


def test_saipe_has_the_papers_shapes():
    with torch.device("meta"):
        saipe = SAIPE(Stage1.paper(), 77, 1024)
        x = torch.empty(1, 3, 512, 512)
        f_mid = saipe.E_down(x)
        x_rec, e_img = saipe(x)
    assert f_mid.shape == (1, 180, 128, 128) and x_rec.shape == x.shape and e_img.shape == (1, 77, 1024)
    assert [len(rstb.swin) for rstb in (*saipe.E_down.body[:2], saipe.D_up.body)] == [6, 6, 2]
    assert [layer.attn.shift_size for layer in saipe.E_down.body[0].swin] == [[0, 0], [4, 4]] * 3


def test_eq_1_sees_the_picture_through_f_mid_alone_and_tokens_differ():
    saipe = SAIPE(SMALL, 77, 96)
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    x_rec, e_img = saipe(x)
    assert x_rec.shape == x.shape and torch.equal(x_rec, saipe.D_up(saipe.E_down(x)))
    blind = saipe.D_up(torch.zeros_like(saipe.E_down(x)))
    assert torch.equal(blind[0], blind[1]) and not torch.equal(x_rec[0], x_rec[1])
    assert e_img[0].std(0).mean() > 1e-3


def test_stage1_losses_move_their_branches():
    saipe = SAIPE(SMALL, 77, 96)
    x_rec, e_img = saipe(torch.rand(2, 3, 32, 32))

    def moved(loss):
        names, parameters = zip(*saipe.named_parameters())
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return {name.split(".")[0] for name, g in zip(names, grads) if g is not None and g.abs().sum() > 0}
    assert moved(sodiff.loss_rec(x_rec, torch.zeros_like(x_rec))) == {"E_down", "D_up"}
    assert moved(sodiff.loss_align(e_img, torch.zeros_like(e_img))) == {"E_down", "T_align"}


def test_alignment_compares_own_and_others():
    e = torch.eye(4).view(4, 2, 2)
    assert evaluate.alignment(e, e) == (1.0, 0.0)
    assert evaluate.alignment(e, e.roll(1, 0)) == (0.0, pytest.approx(1 / 3))


# ---- time predictor


def test_eq_11_is_its_sum():
    logits, g = torch.randn(3, 50), gumbel_for(torch.arange(3), 50, 1)
    for row, noise, tau in zip(logits.tolist(), g.tolist(), expected_timestep(logits, g).tolist()):
        weights = [np.exp(l + n) for l, n in zip(row, noise)]
        assert tau == pytest.approx(sum(i * w for i, w in enumerate(weights)) / sum(weights), rel=1e-5)
    assert torch.allclose(expected_timestep(logits), logits.softmax(1) @ torch.arange(50.0))


def test_gumbel_noise_makes_argmax_a_draw_from_the_softmax():
    logits, n = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]), 20_000
    drawn = (logits + gumbel_for(torch.arange(n), 5, 7)).argmax(1).bincount(minlength=5)
    p = logits.softmax(0)
    assert ((drawn / n - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()
    assert torch.equal(gumbel_for(torch.tensor([3, 9]), 5, 7)[1], gumbel_for(torch.tensor([9]), 5, 7)[0])


def test_gradient_of_tau_by_numbers():
    logits = torch.randn(1, 12, requires_grad=True)
    expected_timestep(logits).sum().backward()

    def tau(values):
        weights = np.exp(values)
        return (weights * np.arange(12)).sum() / weights.sum()
    at = logits.detach().double().numpy()[0]
    numeric = [(tau(at + 1e-5 * one) - tau(at - 1e-5 * one)) / 2e-5 for one in np.eye(12)]
    assert np.allclose(logits.grad[0].numpy(), numeric, atol=1e-4)


@pytest.mark.parametrize("tau_0, spread, tau", [(49, 12.0, 49), (800, 30.0, 800), (49, 0.0, 499.5)])
def test_tau_starts_where_it_is_told(tau_0, spread, tau):
    qf_hat, logits = TimePredictor((8, 8, 8, 16), 1000, tau_0, spread, 8.0)(torch.rand(2, 3, 40, 56) * 2 - 1)
    assert qf_hat.shape == (2,) and logits.shape == (2, 1000)
    assert expected_timestep(logits).tolist() == pytest.approx([tau] * 2, abs=0.02)


def test_highpass_filters_see_no_brightness():
    first = TimePredictor((32, 8, 8, 16), 10, 5, 0.0, 8.0).blocks[0].res[0].weight
    assert first[:18].sum((1, 2, 3)).abs().max() < 1e-6 and (first[:18].abs().sum((1, 2, 3)) > 1).all()


def test_alpha_bar_between_timesteps():
    alpha_bar = SD(TINY_SD, with_unet=False).alpha_bar
    t = torch.tensor([0.0, 1.0, 499.0, 999.0], requires_grad=True)
    assert torch.allclose(alpha_bar_at(alpha_bar, t), alpha_bar[[0, 1, 499, 999]], rtol=1e-5)
    between = torch.linspace(300, 302, 9, requires_grad=True)
    a = alpha_bar_at(alpha_bar, between)
    assert (a.diff() < 0).all()
    middle = (alpha_bar[300].logit() + alpha_bar[301].logit()) / 2
    assert torch.allclose((a / (1 - a)).log()[2], middle, atol=1e-5)
    a.sum().backward()
    at = between.detach().double()[1:-1]
    above, below = (alpha_bar_at(alpha_bar.double(), at + step) for step in (1e-2, -1e-2))
    inside = at % 1 != 0
    assert torch.allclose(between.grad[1:-1][inside].double(), ((above - below) / 2e-2)[inside], rtol=2e-2)


# ---- generator and discriminator


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    saipe = SAIPE(SMALL, 77, 96)
    return SODiff(TINY_SD, saipe.E_down, saipe.T_align, Stage2(widths=(8, 8, 8, 16))).add_lora(4).train()


def test_generator_is_equation_6(generator):
    x, logits, sd = torch.rand(2, 3, 64, 96) * 2 - 1, generator.predictor.logits, generator.sd
    with torch.no_grad():
        logits.weight.normal_(std=0.5)  # so that the two pictures' timesteps differ
        x_hat, z_hat, e_img, qf_hat, tau = generator(x, torch.zeros(2, 16, 8, 12), None)
        assert tau[0] != tau[1] and e_img.shape == (2, 77, 96) and qf_hat.shape == (2,)
        logits.weight.zero_()
        z = sd.vae.encode(x).latent_dist.mode() * sd.vae.config.scaling_factor
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)**2
        table = torch.cumprod(1 - betas, 0)
        for i in range(2):
            low, part = int(tau[i]), float(tau[i]) % 1
            a = torch.lerp(table[low].logit(), table[low + 1].logit(), part).sigmoid().item()
            eps = sd.unet(z[i:i + 1], tau[i], e_img[i:i + 1]).sample
            assert torch.allclose(z_hat[i:i + 1], (z[i:i + 1] - (1 - a)**0.5 * eps) / a**0.5, atol=1e-3)
        decoded = sd.vae.decode(z_hat / sd.vae.config.scaling_factor).sample.clamp(-1, 1)
        assert torch.allclose(x_hat, decoded, atol=1e-4)


def test_losses_equal_their_formulas():
    x, y = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    assert sodiff.loss_rec(x, y) == pytest.approx(np.abs(x.numpy() - y.numpy()).mean() / 2, rel=1e-5)
    assert sodiff.loss_mse(x, y) == pytest.approx(((x.numpy() - y.numpy())**2).mean() / 4, rel=1e-5)
    assert sodiff.loss_qf(torch.tensor([10.0, 50.0]), torch.tensor([20.0, 45.0])) == 7.5
    dists = dists_small()
    assert sodiff.loss_ea(dists, x, x) == pytest.approx(0, abs=1e-5)
    both = dists(sobel(x), sobel(y)).mean() + dists(x, y).mean()
    assert sodiff.loss_ea(dists, x, y) == pytest.approx(both.item(), rel=1e-5)
    fake, real, bce = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), F.binary_cross_entropy_with_logits
    ones, zeros = torch.ones_like(fake), torch.zeros_like(fake)
    assert torch.allclose(sodiff.loss_G(fake), bce(fake, ones))
    assert torch.allclose(sodiff.loss_D(fake, real), bce(fake, zeros) + bce(real, ones))


def test_sobel_is_the_edges_of_the_luma():
    x = torch.rand(1, 3, 9, 11) * 2 - 1
    luma = np.tensordot([0.299, 0.587, 0.114], (x[0].numpy() + 1) / 2, 1)
    y = np.pad(luma, 1, "edge")
    gx = sum(n * (y[i:i + 9, 2:] - y[i:i + 9, :-2]) for i, n in enumerate((1, 2, 1)))
    gy = sum(n * (y[2:, i:i + 11] - y[:-2, i:i + 11]) for i, n in enumerate((1, 2, 1)))
    assert np.allclose(sobel(x)[0].numpy(), 2 * np.sqrt(gx**2 + gy**2 + 1e-6) - 1, atol=1e-5)


def test_each_stage2_loss_moves_lora_and_predictor_and_nothing_else(generator):
    D, dists = NoisedDiscriminator(TINY_SD, 4, generator.sd), dists_small()
    x, n = torch.rand(2, 3, 64, 64) * 2 - 1, torch.arange(2)
    z = torch.randn(2, 16, 8, 8)
    x_hat, z_hat, e_img, qf_hat, tau = generator(x, z, gumbel_for(n, 1000, 0))
    t = torch.tensor([5, 700])
    with frozen(D):
        losses = {"mse": sodiff.loss_mse(x_hat, x), "ea": sodiff.loss_ea(dists, x_hat, x),
                  "gan_g": sodiff.loss_G(D(z_hat, t, e_img, z)),
                  "qf": sodiff.loss_qf(qf_hat, torch.tensor([5.0, 90.0]))}
    names, parameters = zip(*((k, p) for k, p in generator.named_parameters() if p.requires_grad))
    assert all(k.startswith("predictor.") or k.startswith("sd.unet.") and "lora_" in k for k in names)
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        moved = {k for k, g in zip(names, grads) if g is not None and g.abs().sum() > 0}
        # tau's branch has zero weights at first: its own gradient is there, the shared blocks' comes with QF
        assert any("lora_B" in k for k in moved) == (name != "qf"), name
        assert ("predictor.logits.bias" in moved) == (name != "qf"), name
        assert ("predictor.qf.weight" in moved) == (name == "qf"), name
        assert any("predictor.blocks" in k for k in moved) == (name == "qf"), name
    latents = torch.cat([z_hat.detach(), z])
    logits = D(latents, torch.cat([t, t]), torch.cat([e_img, e_img]), torch.randn_like(latents))
    sodiff.loss_D(*logits.chunk(2)).backward()
    assert all(p.grad is None for p in generator.parameters())
    moved = {k.split(".")[0] for k, p in D.named_parameters() if p.grad is not None}
    assert moved == {"unet", "proj", "head"}


def test_discriminator_sees_noised_latents_and_the_given_condition(generator):
    D, t = NoisedDiscriminator(TINY_SD, 4, generator.sd), torch.tensor([3, 800])
    z, noise, e_img = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8), torch.randn(2, 5, 96)
    a = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000)**2, 0)[t].view(2, 1, 1, 1)
    z_t = a**0.5 * z + (1 - a)**0.5 * noise
    assert torch.allclose(D(z, t, e_img, noise), D.head(D.unet(z_t, t, D.proj(e_img)).sample), atol=1e-4)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """A UNet of SDXL's kind, with a VAE of another scaling factor."""
    folder = tmp_path_factory.mktemp("sdxl")
    torch.manual_seed(0)
    UNet2DConditionModel(
        in_channels=16, out_channels=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], transformer_layers_per_block=[1, 2],
        attention_head_dim=[2, 4], cross_attention_dim=40, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8).save_pretrained(folder / "unet")
    shutil.copytree(TINY_SD / "scheduler", folder / "scheduler")
    (folder / "vae").mkdir()
    config = json.loads((TINY_SD / "vae" / "config.json").read_text())
    config["scaling_factor"] /= 2
    (folder / "vae" / "config.json").write_text(json.dumps(config))
    return folder


def test_discriminator_of_sdxls_kind(sdxl, generator):
    D, seen = NoisedDiscriminator(sdxl, 4, generator.sd), {}
    assert D.rescale == pytest.approx(0.5)
    D.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs, z=args[0]), with_kwargs=True)
    z = torch.randn(2, 16, 8, 12, requires_grad=True)
    D(z, 100, torch.randn(2, 77, 96), torch.zeros_like(z)).sum().backward()
    extra = seen["added_cond_kwargs"]
    assert extra["text_embeds"].shape == (2, 20) and not extra["text_embeds"].any()
    assert extra["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 2
    assert torch.allclose(seen["z"], z * 0.5 * D.alpha_bar[100].sqrt()) and z.grad.abs().sum() > 0


def test_discriminator_of_another_latent_is_refused(generator, tmp_path):
    shutil.copytree(TINY_SD, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config(config | {"in_channels": 4}).save_pretrained(tmp_path / "other" / "unet")
    with pytest.raises(UserError, match="--disc-base .*: takes 4 latent channels, but the base makes 16"):
        NoisedDiscriminator(tmp_path / "other", 4, generator.sd)
    (tmp_path / "other" / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match="--disc-base .*: no vae there"):
        NoisedDiscriminator(tmp_path / "other", 4, generator.sd)


# ---- captions


def folder_with(tmp_path, text: str | bytes):
    Image.open(PHOTOS / "val" / "chelsea.png").crop((0, 0, 90, 80)).save(tmp_path / "cat.png")
    Image.open(PHOTOS / "val" / "chelsea.png").crop((90, 0, 180, 80)).save(tmp_path / "dog.png")
    (tmp_path / "captions.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


GOOD = '{"file": "cat.png", "caption": "the face of a cat", "qf": 7}\n'


@pytest.mark.parametrize("line", ['{"file": "dog.png", "capt', '{"file": "dog.png"}', '["dog.png"]', "3",
                                  "null", '{"file": 3, "caption": "x"}', '{"file": "dog.png", "caption": 3}',
                                  '{"file": "dog.png", "caption": "x", "qf": 700}', "\xff"])
def test_a_bad_line_of_captions_is_named(tmp_path, line):
    with pytest.raises(UserError, match="captions.jsonl, line 2: ") as error:
        sodiff.read_captions([folder_with(tmp_path, GOOD + line + "\n")])
    assert "\n" not in str(error.value)


def test_captions_meet_their_images(tmp_path, capsys):
    orange = "orange " * 200
    folder = folder_with(tmp_path, GOOD + json.dumps({"file": "gone.png", "caption": orange}) + "\n")
    tokenizer = common.load_part(CLIPTokenizer, TINY_SD, "tokenizer")
    encoder = common.load_part(CLIPTextModel, TINY_SD, "text_encoder")
    pairs = JPEGPairs([folder], SMALL, 8, 0)
    captions = sodiff.read_captions([folder, folder / "cat.png"])
    pairs.captions = sodiff.tokenized(captions, pairs.files, tokenizer)
    said = '2 images, 1 without a caption ("" stands for it), 0 cut to 77 tokens, 1 captions without image'
    assert said in capsys.readouterr().err
    for n in range(4):
        _, x_lq, x_hq, qf, ids = pairs[n]
        cat = pairs.file(n).name == "cat.png"
        assert (qf == 7) == cat  # the QF at which it was captioned
        e_text = text_tokens(TINY_SD, ["the face of a cat" if cat else ""])
        assert torch.allclose(encoder(ids[None])[0], e_text, atol=1e-5)
        assert torch.equal(x_lq, common.to_tensor(common.jpeg(common.to_image(x_hq), int(qf))))
    sodiff.tokenized({folder / "cat.png": {"caption": orange}}, [folder / "cat.png"], tokenizer)
    assert "1 cut to 77 tokens" in capsys.readouterr().err


def test_a_captioned_crop_is_mirrored_and_never_turned(tmp_path):
    """A picture that is dark above and bright below stays so: its caption says so."""
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "dusk.png")
    pairs = JPEGPairs([tmp_path], Stage1(crop=64), 32, 0)

    def ways(numbers):
        crops = [pairs[n][2].mean(0) for n in numbers]
        return {"down" if c[-1].mean() > c[0].mean() + 0.1 else "else" for c in crops}
    pairs.captions = {tmp_path / "dusk.png": {"ids": torch.zeros(77)}}
    assert ways(range(24)) == {"down", "else"}  # as in stage 2
    pairs.turns = 1
    assert ways(range(24)) == {"down"}
    Image.linear_gradient("L").rotate(90).convert("RGB").save(tmp_path / "dusk.png")
    pairs = JPEGPairs([tmp_path], Stage1(crop=64), 32, 0)
    pairs.captions, pairs.turns = {tmp_path / "dusk.png": {"ids": torch.zeros(77)}}, 1
    assert len({bool(c[:, 0].mean() > c[:, -1].mean()) for c in (pairs[n][2].mean(0) for n in range(24))}) == 2


def test_quality_factors_cover_their_range():
    pairs = JPEGPairs([PHOTOS / "val"], Stage2(crop=32, qf_power=1.0), 32, 0)
    low = JPEGPairs([PHOTOS / "val"], Stage2(crop=32, qf_power=3.0), 32, 0)
    qfs, lows = (np.array([float(p[n][3]) for n in range(400)]) for p in (pairs, low))
    assert qfs.min() == lows.min() == 5 and qfs.max() >= 94 and abs(qfs.mean() - 50) < 5
    assert abs(np.median(lows) - (5 + 91 / 8)) < 4  # u^3 at u = 1/2


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """A LLaVA of the real classes, in miniature, with random weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                              LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)
    folder = tmp_path_factory.mktemp("llava")
    special, alphabet = ["<pad>", "<s>", "</s>", "<image>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {c: i for i, c in enumerate(special + alphabet)}
    core = Tokenizer(models.BPE(letters, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>",
                                        pad_token="<pad>", additional_special_tokens=["<image>"])
    image = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(image, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1).save_pretrained(folder)
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**narrow, num_hidden_layers=2, image_size=28, patch_size=14)
    text = LlamaConfig(**narrow, vocab_size=len(letters), num_hidden_layers=1, num_key_value_heads=2,
                       bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=3)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_caption_writes_crops_and_lines_and_resumes(llava, tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    (photos / "deep").mkdir(parents=True)
    boxes = {"a.png": (0, 0, 100, 90), "deep/b.png": (100, 0, 200, 90), "small.png": (0, 0, 20, 20)}
    for name, box in boxes.items():
        Image.open(PHOTOS / "val" / "chelsea.png").crop(box).save(photos / name)
    (photos / "broken.png").write_bytes(b"\x89PNG")
    args = [*map(str, ("--data", photos, "--out", out, "--model", llava, "--crop", 64, "--max-tokens", 5,
                       "--batch", 2))]
    with pytest.raises(UserError, match="1 crops of images that cannot be read"):
        caption.main(args)
    log = (out / "captions.jsonl").read_text()
    rows = [json.loads(line) for line in log.splitlines()]
    assert [row["file"] for row in rows] == ["a.png_0.png", "deep_b.png_0.png", "small.png_0.png"]
    for row in rows:
        assert [*row] == ["file", "caption", "qf"] and 5 <= row["qf"] <= 95
        assert "ASSISTANT" not in row["caption"] and Image.open(out / row["file"]).size == (64, 64)
    a = np.asarray(Image.open(photos / "a.png").convert("RGB"))
    crop = np.asarray(Image.open(out / "a.png_0.png"))
    assert any(np.array_equal(a[y:y + 64, x:x + 64], crop) for y in range(27) for x in range(37))

    (out / "captions.jsonl").write_text(log[:-9])  # a kill in the middle of a line
    (photos / "0.png").write_bytes((photos / "a.png").read_bytes())  # and a new photograph, first in the list
    (photos / "broken.png").unlink()
    caption.main(args)
    assert "2 of 4 crops have their caption already" in capsys.readouterr().err
    again = {row["file"]: row for row in map(json.loads, (out / "captions.jsonl").read_text().splitlines())}
    assert again.pop("0.png_0.png") and list(again.values()) == rows
    assert sodiff.read_captions([out])[out / "a.png_0.png"]["qf"] == rows[0]["qf"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.png").write_bytes((photos / "a.png").read_bytes())
    with pytest.raises(UserError, match="would both be a.png_0.png"):
        caption.main([*args, "--data", str(photos), str(tmp_path / "more")])


# ---- the command line


SHORT = ["--s1-width", 24, "--s1-crop", 64, "--s1-batch", 2, "--s2-crop", 64, "--s2-batch", 2,
         "--s2-widths", "16,16,16,32"]


def make_val(folder):
    Image.open(PHOTOS / "val" / "chelsea.png").crop((100, 40, 233, 131)).save(folder / "cat.png")
    Image.open(PHOTOS / "val" / "flower.jpg").crop((200, 100, 333, 191)).save(folder / "flower.png")
    rows = [{"file": f"{name}.png", "caption": f"a {name}"} for name in ("cat", "flower")]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def val(tmp_path_factory):
    return make_val(tmp_path_factory.mktemp("val"))


def train_args(out, val):
    steps = ["--s1-steps", 4, "--s2-steps", 4, "--s1-save-every", 2, "--s2-save-every", 2]
    return [*map(str, ("train", "--out", out, "--val", val, *steps, *SHORT))]


@pytest.fixture(scope="session")
def run(tmp_path_factory, val):
    """The default command line, at reduced steps and widths, from a folder that is not the repo's."""
    out = tmp_path_factory.mktemp("sodiff") / "run"
    return out, said_by(sodiff.main, train_args(out, val), tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="session")
def model(run):
    return sodiff.load(run[0])


def test_train_end_to_end(run, model):
    out, printed = run
    for said in ("stage 1 on", "stage 2 on", "|grad align|", "|grad qf|", "own e_text", "rank correlation",
                 "VAE(original)", "JPEG QF 20"):
        assert said in printed
    norms = next(line for line in printed.splitlines() if "|grad gan_g|" in line).split()
    assert float(norms[norms.index("gan_g|") + 1]) > 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [(s, i) for s in (1, 2) for i in range(4)]
    cfg = Stage2()
    for row in rows[:4]:
        assert row["loss"] == pytest.approx(row["rec"] + 0.5 * row["align"], rel=1e-4)
    for row in rows[4:]:
        weighted = cfg.lambda_EA * row["ea"] + cfg.alpha * row["gan_g"] + cfg.beta * row["qf"]
        assert row["loss"] == pytest.approx(row["mse"] + weighted, rel=1e-4)
    assert len({row["tau"] for row in rows[4:]}) == 4 and rows[3]["align"] < rows[0]["align"]
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert files == {"config.json", "log.jsonl", "metrics.json", "samples/eval.png",
                     "last/stage1.safetensors", "last/stage2.safetensors",
                     "model/stage1.safetensors", "model/stage2.safetensors"}
    results = json.loads((out / "metrics.json").read_text())
    assert set(results["alignment"]) == {"QF 5", "QF 20", "QF 80"}
    assert len(results["predictor"]["timestep"]) == 11


def test_a_run_keeps_what_it_trained(run, model):
    """Stage 1: SAIPE. Stage 2: LoRA and the predictor; of SAIPE only buffers."""
    saipe, G = (load_tensors(run[0] / "model" / f"stage{n}.safetensors")[0] for n in (1, 2))
    assert {k.split(".")[0] for k in saipe} == {"E_down", "T_align", "D_up"}
    parameters = {k for k, _ in model.named_parameters()}  # LoRA is fused there
    assert {k for k in G if k in parameters} == {k for k in parameters if k.startswith("predictor.")}
    assert all(k.startswith("sd.unet.") for k in G if "lora_" in k) and any("lora_" in k for k in G)


def test_restore_prints_what_it_predicts_and_is_deterministic(run, model, tmp_path, capsys):
    photo = read_image(PHOTOS / "val" / "chelsea.png")[0]
    photo.crop((0, 0, 121, 90)).save(tmp_path / "a.jpg", quality=10)
    with_alpha = photo.crop((0, 0, 40, 33)).convert("RGBA")
    with_alpha.putalpha(77)
    with_alpha.save(tmp_path / "b.png")
    inputs, out = [str(tmp_path / name) for name in ("a.jpg", "b.png")], tmp_path / "out"
    sodiff.main(["restore", *inputs, "-o", str(out), "--weights", str(run[0])])
    said = capsys.readouterr().out
    image, qf_hat, tau = sodiff.restore(model, read_image(tmp_path / "a.jpg")[0])
    assert f"121 x 90, predicted QF {qf_hat:.0f}, timestep {tau:.1f}" in said
    assert said.count("predicted QF") == 2
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(out / "a.png")))
    assert set(np.array(Image.open(out / "b.png").getchannel("A")).ravel()) == {77}


def test_tiles_keep_the_picture(model):
    """Windows, whose QF, timestep and prompt come from one mosaic."""
    lq = common.jpeg(read_image(PHOTOS / "val" / "chelsea.png")[0].crop((0, 0, 300, 260)), 10)
    whole, _, tau = sodiff.restore(model, lq)
    tiled, _, tau_tiled = sodiff.restore(model, lq, tile=128)
    assert np.abs(np.asarray(tiled).astype(float) - np.asarray(whole)).mean() < 6
    assert abs(tau - tau_tiled) < 20


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, tmp_path, val, monkeypatch):
    """Ctrl-C in the third step of both stages, after the second is saved; resumed each time."""
    out, args = tmp_path / "run", train_args(tmp_path / "run", val)
    for loss in ("loss_align", "loss_qf"):
        calls, real = [], getattr(sodiff, loss)

        def interrupted(*a, calls=calls, real=real):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*a)
        monkeypatch.setattr(sodiff, loss, interrupted)
        with pytest.raises(KeyboardInterrupt):
            sodiff.main([*args, *(["--resume"] if (out / "config.json").exists() else [])])
        monkeypatch.setattr(sodiff, loss, real)
    sodiff.main([*args, "--resume"])
    same_run(out, run[0])


def test_two_processes_give_the_losses_of_one(run, two_processes, tmp_path, val):
    two_processes("sodiff", train_args(tmp_path / "run", val))
    logs = (folder / "log.jsonl" for folder in (run[0], tmp_path / "run"))
    one, two = ([json.loads(line) for line in log.read_text().splitlines()] for log in logs)
    assert len(one) == len(two) == 8
    for a, b in zip(one, two):
        assert {k: pytest.approx(v, rel=2e-3) for k, v in a.items()} == b


# ---- the paper's ablations, profile, figures


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A photograph without a caption."""
    folder = tmp_path_factory.mktemp("photos")
    shutil.copy(PHOTOS / "train" / "coffee.png", folder)
    return folder


@pytest.fixture(scope="session")
def not_aligned(tmp_path_factory, photos, val):
    out = tmp_path_factory.mktemp("not aligned") / "run"
    more = ["--data", str(photos), "--lambda-align", "0", "--s1-steps", "2", "--s2-steps", "2"]
    sodiff.main([*train_args(out, val), *more])
    return out


def test_no_align_trains_the_embedder_in_stage_2(not_aligned, photos, tmp_path):
    """Table 2: without captions T_align stays as drawn in stage 1, moves in stage 2, and is saved with it."""
    files = (not_aligned / "model" / f"stage{n}.safetensors" for n in (1, 2))
    (before, header), (after, _) = map(load_tensors, files)
    torch.manual_seed(0)
    drawn = SAIPE(Stage1.read(header), 77, 96).state_dict()
    assert torch.equal(before["T_align.queries"], drawn["T_align.queries"])
    assert not torch.equal(before["D_up.tail.0.weight"], drawn["D_up.tail.0.weight"])
    assert not torch.equal(after["T_align.queries"], before["T_align.queries"])
    assert torch.equal(sodiff.load(not_aligned).T_align.queries.cpu(), after["T_align.queries"])
    with pytest.raises(UserError, match="no captions.jsonl"):
        sodiff.main(["train", "--out", str(tmp_path / "x"), "--data", str(photos)])


def test_figures_compare_aligned_and_not(run, not_aligned, val, capsys):
    sodiff.main(["figures", "--weights", str(run[0]), "--against", str(not_aligned), "--data", str(val)])
    said = capsys.readouterr().out
    assert "not aligned" in said and "aligned (stage 1)" in said
    for name in ("fig3.png", "timestep.png"):
        picture = Image.open(run[0] / "samples" / name)
        assert picture.width > 900 and len(picture.convert("RGB").getcolors(1 << 20)) > 50
        (run[0] / "samples" / name).unlink()


def continued(run, out, val, *args):
    """Stage 2 anew on a copy of the run's stage 1; its last log line."""
    shutil.copytree(run[0], out)
    (out / "last" / "stage2.safetensors").unlink()
    sodiff.main([*train_args(out, val), "--stage", "2", *args])
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])


def test_fixed_timestep_losses_beta_and_checkpointing(run, tmp_path, val, no_evaluation):
    row = continued(run, tmp_path / "fixed", val, "--timestep", "fixed", "--s2-tau-0", "30",
                    "--losses", "ea,gan", "--s2-steps", "1")
    assert row["tau"] == 30 and row["qf"] == 0
    expected = Stage2().lambda_EA * row["ea"] + Stage2().alpha * row["gan_g"]
    assert row["loss"] == pytest.approx(expected, rel=1e-4)
    model = sodiff.load(tmp_path / "fixed")
    assert model.predictor is None
    assert sodiff.restore(model, Image.new("RGB", (40, 40)))[1:] == (None, 30.0)
    row = continued(run, tmp_path / "beta", val, "--beta", "0", "--losses", "mse", "--s2-steps", "1",
                    "--s2-checkpointing", "--s2-accumulate", "2")
    assert row["loss"] == row["mse"] and row["qf"] > 0
    first = json.loads((run[0] / "log.jsonl").read_text().splitlines()[4])
    for term in ("mse", "gan_g"):
        assert row[term] == pytest.approx(first[term], rel=1e-3)


def test_another_discriminator(run, tmp_path, val, sdxl, no_evaluation):
    out = tmp_path / "run"
    continued(run, out, val, "--disc-base", str(sdxl), "--s2-steps", "1")
    assert load_tensors(out / "model" / "stage2.safetensors")[1]["stage2.disc_base"] == str(sdxl)
    with pytest.raises(UserError, match="--resume: stage2.disc_base"):
        sodiff.main([*train_args(out, val), "--s2-steps", "1", "--resume"])


def test_profile_counts_the_papers_model_by_part(capsys):
    sodiff.main(["profile", "--paper", "--size", "512", "--no-time"])
    rows = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "865.91 M" in rows["UNet"] and "16.22 M" in rows["UNet"] and "34.16 M" in rows["VAE encoder"]
    assert {"SAIPE: E_down", "SAIPE: T_align", "time predictor", "VAE decoder", "total"} <= rows.keys()


# ---- bad input


@pytest.mark.parametrize("command, says", [
    ("train --out {new} --stage 2", "stage 1 first"),
    ("train --out {copy} --stage 2 --s2-tau-0 1000", "--s2-tau-0 1000: must be at least 0, at most 999"),
    ("train --out {copy} --stage 2 --disc-base {empty}", "--disc-base {empty}: no unet there"),
    ("train --out {new} --s1-crop 100", "--s1-crop 100"),
    ("train --out {new} --losses l2", "--losses l2: choose from mse"),
    ("train --out {new} --timestep random", "--timestep random"),
    ("train --out {new} --data {torn}", "captions.jsonl, line 1"),
    ("train --out {new} --paper", "--paper needs --data"),
    ("restore {photo} --weights {run} --tile 100", "--tile 100"),
    ("restore {photo} --weights {empty}", "stage2.safetensors: no such file"),
    ("restore nowhere.jpg --weights {run}", "nowhere.jpg"),
    ("figures --weights {run} --data {torn}", "captions.jsonl, line 1"),
    ("caption --data {empty} --out {new}", "no images"),
    ("caption --data {torn} --out {new} --model {empty}", "--model {empty}: cannot be loaded"),
    ("caption --data {torn} --out {new} --batch 0", "--batch 0")])
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, capsys, command, says):
    names = {name: tmp_path / name for name in ("empty", "torn", "new", "copy")}
    names["empty"].mkdir()
    names["torn"].mkdir()
    folder_with(names["torn"], '{"file": "cat.png", "cap')
    names |= {"run": run[0], "photo": PHOTOS / "val" / "chelsea.png"}
    args = [word.format(**names) for word in command.split()]
    if "{copy}" in command:
        shutil.copytree(run[0], names["copy"])
        (names["copy"] / "last" / "stage2.safetensors").unlink()
        args += [*map(str, ("--s1-steps", 4, "--s1-save-every", 2, *SHORT))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: caption.main(args[1:]) if args[0] == "caption" else sodiff.main(args))
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and says.format(**names) in said[-1]


def test_damaged_and_foreign_models_are_refused(run, tmp_path):
    def half(content):
        return content[:len(content) // 2]

    def of_codiff(content):
        return content.replace(b"sodiff", b"codiff", 1)
    for i, (name, damage, says) in enumerate([("stage1", half, "stage1.safetensors: not a readable"),
                                              ("stage2", half, "stage2.safetensors: not a readable"),
                                              ("stage2", of_codiff, "not made by sodiff.py")]):
        out = tmp_path / str(i)
        shutil.copytree(run[0], out)
        file = out / "model" / f"{name}.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(UserError, match=says):
            sodiff.load(out)
    out = tmp_path / "swapped"
    shutil.copytree(run[0], out)
    shutil.copy(out / "model" / "stage2.safetensors", out / "model" / "stage1.safetensors")
    with pytest.raises(UserError, match="not made by sodiff.py"):
        sodiff.load(out)
