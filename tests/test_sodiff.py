"""sodiff.py, equation by equation: shapes, formulas, what each loss moves; captions; what is measured."""

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
import oscar
import sodiff
from common import PHOTOS, SD, TINY_SD, frozen, jpeg, pad_to, text_tokens, to_image, to_tensor
from conftest import (CAT, alpha_bars, are_binary_cross_entropy, before_stage_2, moved_by, rows_of, said_by,
                      tops, train_args)
from data import caption
from data.captions import read_captions, tokenized
from data.files import UserError, load_part, load_tensors
from data.results import complexity
from data.results.sodiff import alignment
from data.tiles import tiling
from sodiff import (SAIPE, JPEGPairs, NoisedDiscriminator, SODiff, Stage1, Stage2, TimePredictor,
                    alpha_bar_at, expected_timestep, favor, gumbel_for, sobel)

SMALL = Stage1(width=24, heads=3, depth=2, features=16, crop=64)


@pytest.fixture(scope="module")
def run(trained):
    return trained("sodiff")


# ---- SAIPE


def test_favor_approximates_softmax_attention():
    """q, k ~ 0.25 N(0, 1): error below 10 % at 256 features, falling with their number."""
    g, errors = torch.Generator().manual_seed(0), {}
    q, k = (0.25 * torch.randn(2, 4, 200, 32, generator=g) for _ in range(2))
    v = torch.randn(2, 4, 200, 32, generator=g)
    exact = F.scaled_dot_product_attention(q, k, v)
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
    assert tops(moved_by(sodiff.loss_rec(x_rec, torch.zeros_like(x_rec)), saipe)) == {"E_down", "D_up"}
    assert tops(moved_by(sodiff.loss_align(e_img, torch.zeros_like(e_img)), saipe)) == {"E_down", "T_align"}


def test_the_totals_are_eqs_5_and_12(run):
    rows, cfg = rows_of(run.folder), Stage2()
    for row in rows[:4]:
        assert row["loss"] == pytest.approx(row["rec"] + 0.5 * row["align"], rel=1e-4)
    for row in rows[4:]:
        weighted = cfg.lambda_EA * row["ea"] + cfg.alpha * row["gan_g"] + cfg.beta * row["qf"]
        assert row["loss"] == pytest.approx(row["mse"] + weighted, rel=1e-4)
    assert len({row["tau"] for row in rows[4:]}) == 4


def test_inference_has_stage_1s_prompt_extractor(run):
    cfg, tensors, _ = Stage1.read(run.folder, "sodiff")
    saipe, x = SAIPE(cfg, 77, 96).eval(), torch.rand(1, 3, 64, 96) * 2 - 1
    saipe.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        assert torch.allclose(run.model.condition(x)[0], saipe(x)[1], atol=1e-4)


def test_a_run_keeps_what_it_trained(run):
    """Stage 1: SAIPE. Stage 2: LoRA and the predictor; of SAIPE only buffers."""
    saipe, G = (load_tensors(run.folder / "model" / f"stage{n}.safetensors")[0] for n in (1, 2))
    assert tops(saipe) == {"E_down", "T_align", "D_up"}
    parameters = {k for k, _ in run.model.named_parameters()}  # LoRA is fused there
    assert {k for k in G if k in parameters} == {k for k in parameters if k.startswith("predictor.")}
    assert all(k.startswith("sd.unet.") for k in G if "lora_" in k) and any("lora_" in k for k in G)


def test_alignment_compares_own_and_others():
    e = torch.eye(4).view(4, 2, 2)
    assert alignment(e, e) == (1.0, 0.0, 1.0)
    assert alignment(e, e.roll(1, 0)) == (0.0, pytest.approx(1 / 3), 4.0)


# ---- time predictor


def test_eq_11_is_its_sum():
    logits, g = torch.randn(3, 50), gumbel_for(torch.arange(3), 50, 1, "gumbel")
    for row, noise, tau in zip(logits.tolist(), g.tolist(), expected_timestep(logits, g).tolist()):
        weights = [np.exp(l + n) for l, n in zip(row, noise)]
        assert tau == pytest.approx(sum(i * w for i, w in enumerate(weights)) / sum(weights), rel=1e-5)
    assert torch.allclose(expected_timestep(logits), logits.softmax(1) @ torch.arange(50.0))


def test_gumbel_noise_makes_argmax_a_draw_from_the_softmax():
    logits, n = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5]), 20_000
    drawn = (logits + gumbel_for(torch.arange(n), 5, 7, "gumbel")).argmax(1).bincount(minlength=5)
    p = logits.softmax(0)
    assert ((drawn / n - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()
    two, one = (gumbel_for(torch.tensor(rows), 5, 7, "gumbel") for rows in ([3, 9], [9]))
    assert torch.equal(two[1], one[0])


def test_gradient_of_tau_by_numbers():
    logits = torch.randn(1, 12, requires_grad=True)
    expected_timestep(logits).sum().backward()

    def tau(values):
        weights = np.exp(values)
        return (weights * np.arange(12)).sum() / weights.sum()
    at = logits.detach().double().numpy()[0]
    numeric = [(tau(at + 1e-5 * one) - tau(at - 1e-5 * one)) / 2e-5 for one in np.eye(12)]
    assert np.allclose(logits.grad[0].numpy(), numeric, atol=1e-4)


def test_tau_starts_in_the_middle():
    qf_hat, logits = TimePredictor((8, 8, 8, 16), 1000)(torch.rand(2, 3, 40, 56) * 2 - 1)
    assert qf_hat.shape == (2,) and logits.shape == (2, 1000)
    assert expected_timestep(logits).tolist() == pytest.approx([499.5] * 2, abs=0.02)


def test_18_of_the_predictors_first_filters_see_detail_and_no_brightness():
    first = TimePredictor((32, 8, 8, 16), 10).blocks[0].res[0].weight
    assert first[:18].sum((1, 2, 3)).abs().max() < 1e-6 and (first[:18].abs().sum((1, 2, 3)) > 1).all()
    assert torch.equal(first[:9], -first[9:18]) and len(first[:18].flatten(1).unique(dim=0)) == 18


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
        table = alpha_bars().double()
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
    dists = common.dists("tiny-vgg")
    assert sodiff.loss_ea(dists, x, x) == pytest.approx(0, abs=1e-5)
    assert torch.equal(sobel(x), oscar.sobel(x))  # tested there
    both = dists(sobel(x), sobel(y)).mean() + dists(x, y).mean()
    assert sodiff.loss_ea(dists, x, y) == pytest.approx(both.item(), rel=1e-5)
    are_binary_cross_entropy(sodiff.loss_G, sodiff.loss_D)


def test_each_stage2_loss_moves_lora_and_predictor_and_nothing_else(generator):
    D, dists = NoisedDiscriminator(TINY_SD, 4, generator.sd), common.dists("tiny-vgg")
    x, z = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 16, 8, 8)
    x_hat, z_hat, e_img, qf_hat, tau = generator(x, z, gumbel_for(torch.arange(2), 1000, 0, "gumbel"))
    t = torch.tensor([5, 700])
    with frozen(D):
        losses = {"mse": sodiff.loss_mse(x_hat, x), "ea": sodiff.loss_ea(dists, x_hat, x),
                  "gan_g": sodiff.loss_G(D(z_hat, t, e_img, z)),
                  "qf": sodiff.loss_qf(qf_hat, torch.tensor([5.0, 90.0]))}
    names = [k for k, p in generator.named_parameters() if p.requires_grad]
    assert all(k.startswith("predictor.") or k.startswith("sd.unet.") and "lora_" in k for k in names)
    for name, loss in losses.items():
        moved = moved_by(loss, generator)
        # tau's branch has zero weights at first: its own gradient is there, the shared blocks' comes with QF
        assert any("lora_B" in k for k in moved) == (name != "qf"), name
        assert ("predictor.logits.bias" in moved) == (name != "qf"), name
        assert ("predictor.qf.weight" in moved) == (name == "qf"), name
        assert any("predictor.blocks" in k for k in moved) == (name == "qf"), name
    latents = torch.cat([z_hat.detach(), z])
    logits = D(latents, torch.cat([t, t]), torch.cat([e_img, e_img]), torch.randn_like(latents))
    sodiff.loss_D(*logits.chunk(2)).backward()
    assert all(p.grad is None for p in generator.parameters())
    assert tops(k for k, p in D.named_parameters() if p.grad is not None) == {"unet", "proj", "head"}


def test_discriminator_sees_noised_latents_and_the_given_condition(generator):
    D, t = NoisedDiscriminator(TINY_SD, 4, generator.sd), torch.tensor([3, 800])
    z, noise, e_img = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8), torch.randn(2, 5, 96)
    a = alpha_bars()[t].view(2, 1, 1, 1)
    z_t = a**0.5 * z + (1 - a)**0.5 * noise
    assert torch.allclose(D(z, t, e_img, noise), D.head(D.unet(z_t, t, D.proj(e_img)).sample), atol=1e-4)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A UNet of SDXL's kind."""
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
    return folder


def test_discriminator_of_sdxls_kind(sdxl, generator):
    D, seen = NoisedDiscriminator(sdxl, 4, generator.sd), {}
    D.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs, z=args[0]), with_kwargs=True)
    z = torch.randn(2, 16, 8, 12, requires_grad=True)
    D(z, 100, torch.randn(2, 77, 96), torch.zeros_like(z)).sum().backward()
    extra = seen["added_cond_kwargs"]
    assert extra["text_embeds"].shape == (2, 20) and not extra["text_embeds"].any()
    assert extra["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 2
    assert torch.allclose(seen["z"], z * D.alpha_bar[100].sqrt()) and z.grad.abs().sum() > 0


def test_discriminator_of_another_latent_is_refused(generator, tmp_path):
    shutil.copytree(TINY_SD, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "unet" / "config.json").read_text())
    UNet2DConditionModel.from_config(config | {"in_channels": 4}).save_pretrained(tmp_path / "other" / "unet")
    with pytest.raises(UserError, match="--disc-base .*: takes 4 latent channels, but the base makes 16"):
        NoisedDiscriminator(tmp_path / "other", 4, generator.sd)
    for part in ("scheduler", "unet"):
        shutil.rmtree(tmp_path / "other" / part)
        with pytest.raises(UserError, match=f"--disc-base .*: no {part} there"):
            NoisedDiscriminator(tmp_path / "other", 4, generator.sd)


# ---- captions


def folder_with(tmp_path, text: str):
    CAT.crop((0, 0, 90, 80)).save(tmp_path / "cat.png")
    CAT.crop((90, 0, 180, 80)).save(tmp_path / "dog.png")
    (tmp_path / "captions.jsonl").write_text(text, "utf-8")
    return tmp_path


GOOD = '{"file": "cat.png", "caption": "the face of a cat", "qf": 7}\n'


@pytest.mark.parametrize("line", ['{"file": "dog.png", "capt', '{"file": "dog.png"}', '["dog.png"]', "3",
                                  "null", '{"file": 3, "caption": "x"}', '{"file": "dog.png", "caption": 3}',
                                  '{"file": "dog.png", "caption": "x", "qf": 700}', "\xff"])
def test_a_bad_line_of_captions_is_named(tmp_path, line):
    with pytest.raises(UserError, match="captions.jsonl, line 2: ") as error:
        read_captions([folder_with(tmp_path, GOOD + line + "\n")])
    assert "\n" not in str(error.value)


def test_captions_meet_their_images(tmp_path, capsys):
    orange = "orange " * 200
    folder = folder_with(tmp_path, GOOD + json.dumps({"file": "gone.png", "caption": orange}) + "\n")
    tokenizer = load_part(CLIPTokenizer, TINY_SD, "tokenizer")
    encoder = load_part(CLIPTextModel, TINY_SD, "text_encoder")
    pairs = JPEGPairs([folder], SMALL, 8, 0)
    both = tokenized([folder, folder / "cat.png"], pairs.files, tokenizer, False)
    said = "2 images, 1 without a caption, 0 cut to 77 tokens, 1 captions without image"
    assert said in capsys.readouterr().err
    only = tokenized([folder, folder / "cat.png"], pairs.files, tokenizer, True)
    assert [f.name for f in only] == ["cat.png"] and "1 without a caption, left out" in capsys.readouterr().err
    pairs.captions = both
    for n in range(4):
        _, x_lq, x_hq, qf, ids = pairs[n]
        cat = pairs.file(n).name == "cat.png"
        assert (qf == 7) == cat  # the QF at which it was captioned
        e_text = text_tokens(TINY_SD, ["the face of a cat" if cat else ""])
        assert torch.allclose(encoder(ids[None])[0], e_text, atol=1e-5)
        assert torch.equal(x_lq, to_tensor(jpeg(to_image(x_hq), int(qf))))
    tokenized([folder_with(tmp_path, GOOD.replace("the", orange))], [folder / "cat.png"], tokenizer, True)
    assert "1 cut to 77 tokens" in capsys.readouterr().err
    (folder / "captions.jsonl").unlink()
    with pytest.raises(UserError, match="no captions.jsonl"):
        tokenized([folder], pairs.files, tokenizer, True)
    assert {row["caption"] for row in tokenized([folder], pairs.files, tokenizer, False).values()} == {""}


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
    crops = [pairs[n][2].mean(0) for n in range(24)]
    assert len({bool(c[:, 0].mean() > c[:, -1].mean()) for c in crops}) == 2


def test_quality_factors_cover_their_range():
    pairs = (JPEGPairs([PHOTOS / "val"], Stage2(crop=32, qf_power=power), 32, 0) for power in (1.0, 3.0))
    qfs, lows = (np.array([p.quality(n) for n in range(400)]) for p in pairs)
    assert qfs.min() == lows.min() == 5 and qfs.max() >= 94 and abs(qfs.mean() - 50) < 5
    assert abs(np.median(lows) - (5 + 91 / 8)) < 4  # u^3 at u = 1/2


@pytest.fixture(scope="module")
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
        CAT.crop(box).save(photos / name)
    (photos / "broken.png").write_bytes(b"\x89PNG")
    args = [*map(str, ("--data", photos, "--out", out, "--model", llava, "--crop", 64, "--max-tokens", 5,
                       "--batch", 1))]
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

    (out / "captions.jsonl").write_text(log[:-1])  # a whole line, which an editor ended so
    caption.captioned(out / "captions.jsonl")
    assert (out / "captions.jsonl").read_text() == log
    (out / "captions.jsonl").write_text(log[:-9])  # a kill in the middle of a line
    (photos / "0.png").write_bytes((photos / "a.png").read_bytes())  # and a new photograph, first in the list
    (photos / "broken.png").unlink()
    caption.main(args)
    assert "2 of 4 crops have their caption already" in capsys.readouterr().err
    again = {row["file"]: row for row in map(json.loads, (out / "captions.jsonl").read_text().splitlines())}
    assert again.pop("0.png_0.png") and list(again.values()) == rows
    assert read_captions([out])[out / "a.png_0.png"]["qf"] == rows[0]["qf"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.png").write_bytes((photos / "a.png").read_bytes())
    with pytest.raises(UserError, match="would both be a.png_0.png"):
        caption.main([*args, "--data", str(photos), str(tmp_path / "more")])


# ---- one-step inference, and the paper's ablations


def test_restore_prints_what_it_predicts(run, tmp_path):
    lq = jpeg(CAT.crop((0, 0, 121, 90)), 10)
    lq.save(tmp_path / "a.png")
    args = ["restore", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--weights", str(run.folder)]
    _, qf_hat, tau = sodiff.restore(run.model, lq)
    said = said_by(sodiff.main, args, tmp_path)
    assert f"121 x 90, predicted QF {qf_hat:.0f}, timestep {tau:.1f}" in said


def test_tiles_keep_the_picture(run, monkeypatch):
    """Windows, whose QF, timestep and prompt come from one mosaic."""
    lq = jpeg(CAT.crop((0, 0, 300, 260)), 10)
    whole, _, _ = sodiff.restore(run.model, lq)
    given, condition = [], run.model.condition
    monkeypatch.setattr(run.model, "condition", lambda x: given.append(x) or condition(x))
    tiles = tiling(run.model, 128)(lq.size)
    tiled, _, _ = sodiff.restore(run.model, lq, tiles)
    assert np.abs(np.asarray(tiled).astype(float) - np.asarray(whole)).mean() < 6
    assert torch.equal(given[0], tiles.mosaic(pad_to(to_tensor(lq)[None], run.model.cell)))


@pytest.fixture(scope="module")
def not_aligned(tmp_path_factory, photos):
    """Table 2's No Align, trained on a photograph without a caption."""
    out = tmp_path_factory.mktemp("not aligned")
    shutil.copy(PHOTOS / "train" / "coffee.png", out)
    more = ["--data", out / "coffee.png", "--lambda-align", 0, "--s1-steps", 2, "--s2-steps", 2]
    sodiff.main(train_args("sodiff", out / "run", photos / "cat.png", *more))
    return out / "run"


def test_no_align_trains_the_embedder_in_stage_2(not_aligned):
    """Without captions T_align stays as drawn in stage 1, moves in stage 2, and is saved with it."""
    files = (not_aligned / "model" / f"stage{n}.safetensors" for n in (1, 2))
    (before, header), (after, _) = map(load_tensors, files)
    torch.manual_seed(0)
    drawn = SAIPE(Stage1.of_header(header), 77, 96).state_dict()
    assert torch.equal(before["T_align.queries"], drawn["T_align.queries"])
    assert not torch.equal(before["D_up.tail.0.weight"], drawn["D_up.tail.0.weight"])
    assert not torch.equal(after["T_align.queries"], before["T_align.queries"])
    assert torch.equal(sodiff.load(not_aligned).T_align.queries.cpu(), after["T_align.queries"])


def continued(run, out, photos, *args):
    """Stage 2's first step anew; its log line."""
    args = train_args("sodiff", before_stage_2(run, out), photos, "--stage", 2, "--s2-steps", 1, *args)
    sodiff.main(args)
    return rows_of(out)[-1]


def test_fixed_timestep_and_losses(run, tmp_path, photos, no_evaluation):
    """Tables 3 and 4."""
    more = ["--timestep", "fixed", "--s2-tau-0", 30, "--losses", "ea,gan"]
    row = continued(run, tmp_path / "fixed", photos, *more)
    assert row["tau"] == 30 and "qf" not in row
    expected = Stage2().lambda_EA * row["ea"] + Stage2().alpha * row["gan_g"]
    assert row["loss"] == pytest.approx(expected, rel=1e-4)
    model = sodiff.load(tmp_path / "fixed")
    assert model.predictor is None
    assert sodiff.restore(model, Image.new("RGB", (40, 40)))[1:] == (None, 30.0)
    row = continued(run, tmp_path / "beta", photos, "--beta", 0, "--losses", "mse")
    assert row["loss"] == row["mse"] and row["qf"] > 0 and "gan_d" not in row


def test_another_discriminator(run, tmp_path, photos, sdxl, no_evaluation):
    out = tmp_path / "run"
    continued(run, out, photos, "--disc-base", sdxl)
    assert load_tensors(out / "model" / "stage2.safetensors")[1]["stage2.disc_base"] == str(sdxl)
    with pytest.raises(UserError, match="--resume: stage2.disc_base"):
        sodiff.main(train_args("sodiff", out, photos, "--s2-steps", 1, "--resume"))


# ---- eval, profile and figures


def test_eval_reports_alignment_and_predictions(run):
    for said in ("own e_text", "rank correlation", "VAE(original)", "JPEG QF 20"):
        assert said in run.printed
    results = json.loads((run.folder / "metrics.json").read_text())
    assert set(results["alignment"]) == {"QF 5", "QF 20", "QF 80"}
    assert len(results["predictor"]["timestep"]) == 11


def test_figures_compare_aligned_and_not(run, not_aligned, photos, tmp_path):
    shutil.copytree(run.folder / "model", tmp_path / "model")
    args = ["figures", "--weights", tmp_path, "--against", not_aligned, "--data", photos]
    said = said_by(sodiff.main, [*map(str, args)], tmp_path)
    assert "not aligned" in said and "aligned (stage 1)" in said
    for name in ("fig3.png", "timestep.png"):
        picture = Image.open(tmp_path / "samples" / name)
        assert picture.width > 900 and len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_profile_counts_the_papers_model_by_part(capsys):
    sodiff.main(["profile", "--paper", "--size", "512", "--no-time"])
    rows = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "865.91 M" in rows["UNet"] and "16.22 M" in rows["UNet"] and "34.16 M" in rows["VAE encoder"]
    assert {"SAIPE: E_down", "SAIPE: T_align", "time predictor", "VAE decoder", "total"} <= rows.keys()
