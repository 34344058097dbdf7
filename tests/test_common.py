"""common.py against independent oracles: diffusers' schedulers, torchmetrics' DISTS, PEFT unfused, closed forms."""

import argparse
import io
import json

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.dists as reference_dists
import torchvision
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image

import common
from codiff import adain
from common import (SD, TINY_SD, Crops, Discriminator, Tiles, UserError, add_lora, dists_small, dists_vgg16,
                    for_inference, frozen, jpeg, load_tensors, load_trained, noise_for, outputs, pad_to, read_image,
                    save_tensors, to_image, to_tensor, trained)
from data.files import atomic, write_json
from data.pictures import fixed_norms, starts
from data.results.complexity import macs
from data.results.evaluate import block_grid, detail, psnr_b


def learning(module):
    return [p for p in module.parameters() if p.requires_grad]


@pytest.fixture(scope="module")
def sd():
    return SD(TINY_SD)


# ---- one step of diffusion


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_x0_inverts_the_schedulers_own_noising(sd, prediction):
    scheduler = DDPMScheduler.from_pretrained(TINY_SD, subfolder="scheduler", prediction_type=prediction)
    z, eps = torch.randn(3, 16, 8, 8), torch.randn(3, 16, 8, 8)
    for t in (0, 199, 499, 999):
        steps = torch.full((3,), t)
        z_t = scheduler.add_noise(z, eps, steps)
        out = eps if prediction == "epsilon" else scheduler.get_velocity(z, eps, steps)
        sd_prediction, sd.prediction = sd.prediction, prediction
        try:
            one = sd.x0(z_t, out, sd.alpha_bar[t])
            assert torch.allclose(one, z, atol=2e-3)  # sqrt(alpha_bar) is 0.068 at t = 999
            assert torch.allclose(sd.x0(z_t, out, sd.alpha_bar[steps]), one)
        finally:
            sd.prediction = sd_prediction


def test_latents_have_unit_scale_and_decode_to_the_image(sd):
    x = to_tensor(read_image(common.ROOT / "data/photos/val/chelsea.png")[0])[None, :, :256, :256]
    with torch.no_grad():
        z = sd.encode(x)
        assert z.shape == (1, sd.vae.config.latent_channels, 32, 32)
        assert 0.3 < z.std() < 3
        assert 10 * torch.log10(4 / (sd.decode(z) - x).square().mean()) > 24
        noise = torch.randn_like(z)
        spread = (sd.encode(x, noise) - z) / noise
    assert spread.min() > 0  # a sample is mean + std * noise


# ---- LoRA


def sd21(which):
    with torch.device("meta"):
        if which == "unet":
            return UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), attention_head_dim=[5, 10, 20, 20],
                                        cross_attention_dim=1024, use_linear_projection=True)
        return AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                             block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)


@pytest.mark.parametrize("which, under, without, modules, millions", [
    ("unet", ("",), "time_emb", 258, 16.22), ("vae", ("encoder", "quant_conv"), "time_emb", 32, 1.48),
    ("unet", ("down_blocks", "mid_block"), "time_embedding", 119, None)])
def test_lora_covers_the_released_modules_of_sd21(which, under, without, modules, millions):
    model = sd21(which).requires_grad_(False)
    with torch.device("meta"):
        add_lora(model, 16, under, without)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == modules
    if millions:
        assert sum(p.numel() for p in learning(model)) / 1e6 == pytest.approx(millions, abs=0.005)


def test_lora_fused_equals_unfused():
    x, t, c = torch.randn(1, 16, 8, 8), 199, torch.randn(1, 5, 96)
    plain, lora = SD(TINY_SD), SD(TINY_SD)
    add_lora(lora.unet, 4)
    for name, p in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    with torch.no_grad():
        unfused = lora.unet(x, t, c).sample
        fused = for_inference(lora).unet(x, t, c).sample
        assert (fused - unfused).abs().max() < 1e-4 and (plain.unet(x, t, c).sample - unfused).abs().max() > 1e-2
    assert not any("lora" in n for n, _ in lora.named_parameters())


def test_a_base_is_known_by_its_weights(tmp_path):
    one, two = SD(TINY_SD), SD(TINY_SD, with_unet=False)
    assert one.fingerprint == SD(TINY_SD).fingerprint != two.fingerprint
    one.check({"fingerprint": one.fingerprint}, tmp_path)
    with pytest.raises(UserError, match="another base"):
        two.check({"fingerprint": one.fingerprint}, tmp_path)


# ---- DISTS


def test_dists_equals_torchmetrics_with_the_same_vgg(monkeypatch):
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None)
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights=None: vgg)
    monkeypatch.setattr(reference_dists, "vgg16", lambda weights=None: vgg)
    x = torch.rand(2, 3, 64, 80)
    y = (x + 0.2 * torch.randn_like(x)).clamp(0, 1)
    expected = reference_dists.deep_image_structure_and_texture_similarity(x, y)
    got = dists_vgg16()(x * 2 - 1, y * 2 - 1)
    assert got.shape == (2,) and torch.allclose(got, expected, atol=1e-5)


def test_small_dists_is_a_distance_with_a_gradient_and_no_trainable_weight():
    d, x = dists_small(), torch.rand(2, 3, 48, 48) * 2 - 1
    assert d(x, x).abs().max() < 1e-5 and not learning(d)
    noisy = (x + 0.1 * torch.randn_like(x)).requires_grad_()
    assert (d(noisy, x) > 1e-3).all() and (d(noisy + torch.randn_like(x), x) > d(noisy, x)).all()
    loss = d(noisy, x).mean()
    loss.backward()
    assert noisy.grad.abs().sum() > 0
    assert torch.equal(dists_small()(noisy, x), d(noisy, x))  # the seed fixes its weights


# ---- discriminator


def test_discriminator_passes_gradients_to_generator_lora_prompt_and_head():
    D = Discriminator(TINY_SD, 4)
    z = torch.randn(2, 16, 12, 12, requires_grad=True)
    with frozen(D):
        assert not learning(D)
        D(z, 199).mean().backward()
        assert z.grad.abs().sum() > 0 and all(p.grad is None for p in D.parameters())
    D(z.detach(), 199).square().mean().backward()
    moved = {n.split(".")[0] if "lora" not in n else n[n.index("lora"):n.index("lora") + 6] for n, p in D.named_parameters()
             if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {"prompt", "head", "lora_B"}  # lora_A follows once B has left zero
    assert all("lora" in n or not n.startswith("unet.") for n, p in D.named_parameters() if p.requires_grad)


def test_discriminators_unet_is_the_bases_mid_block():
    D, base = Discriminator(TINY_SD, 4), SD(TINY_SD).unet
    z, c, seen = torch.randn(1, 16, 8, 8), torch.randn(1, 7, base.config.cross_attention_dim), {}
    base.mid_block.register_forward_hook(lambda m, i, out: seen.update(mid=out))
    with torch.no_grad():
        base(z, 199, c)
        assert torch.allclose(D.unet(z, 199, c).sample, seen["mid"], atol=1e-5)


def test_accuracy_counts_logits_on_the_right_side():
    fake, real = torch.tensor([[-1.0, 2.0]]), torch.tensor([[0.5, 3.0]])
    assert Discriminator.accuracy(fake, real) == 0.75
    assert Discriminator.accuracy(torch.full((4,), 0.1), torch.full((4,), 0.1)) == 0.5


# ---- images


@pytest.mark.parametrize("h, w", [(1, 1), (7, 5), (33, 64), (65, 31)])
def test_pad_to_reaches_the_multiple_and_keeps_the_image(h, w):
    x = torch.rand(1, 3, h, w)
    y = pad_to(x, 32)
    assert y.shape[2] % 32 == 0 and y.shape[3] % 32 == 0 and y.shape[2] - h < 32 and y.shape[3] - w < 32
    assert torch.equal(y[..., :h, :w], x)


def test_read_image_covers_modes_alpha_and_orientation(tmp_path):
    def roundtrip(image, name, **options):
        image.save(tmp_path / name, **options)
        return read_image(tmp_path / name)
    grey16 = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
    assert np.array(roundtrip(grey16, "16.png")[0])[0, :, 0].tolist() == [0, 100, 255]
    assert roundtrip(Image.new("CMYK", (4, 3), (255, 0, 0, 0)), "c.tif")[0].getpixel((0, 0))[0] < 60
    assert roundtrip(Image.new("RGB", (4, 3), "red").convert("P"), "p.png")[0].getpixel((0, 0)) == (255, 0, 0)
    rgb, alpha = roundtrip(Image.new("RGBA", (4, 3), (0, 0, 0, 51)), "a.png")
    assert rgb.getpixel((0, 0)) == (0, 0, 0) and alpha.getpixel((0, 0)) == 51
    assert read_image(tmp_path / "a.png", on_white=True)[0].getpixel((0, 0)) == (204, 204, 204)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert roundtrip(Image.new("RGB", (4, 3)), "e.jpg", exif=exif)[0].size == (3, 4)


def test_tensor_image_round_trip_is_exact():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8))
    assert np.array_equal(np.array(to_image(to_tensor(image))), np.array(image))


def test_jpeg_is_libjpegs_at_that_quality():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=10, subsampling="4:2:0")
    assert np.array_equal(np.array(jpeg(image, 10)), np.array(Image.open(buffer)))


def test_adain_takes_the_references_statistics():
    x, y = torch.randn(2, 3, 20, 20) * 3 + 1, torch.randn(2, 3, 9, 9)
    out = adain(x, y)
    assert torch.allclose(out.mean((2, 3)), y.mean((2, 3)), atol=1e-5)
    assert torch.allclose(out.std((2, 3), correction=0), y.std((2, 3), correction=0), atol=1e-4)


def test_psnr_b_is_psnr_without_blocks_and_lower_with_them():
    flat = torch.full((1, 1, 64, 64), 100.0)
    assert psnr_b(flat + 5, flat) == pytest.approx(10 * np.log10(255**2 / 25), abs=1e-4)
    blocks = flat + 5 * (-1) ** (torch.arange(64) // 8).view(1, 1, 1, 64)
    assert psnr_b(blocks, flat) < psnr_b(flat + 5, flat) - 1


def test_detail_is_how_much_luma_changes_from_pixel_to_pixel():
    x = torch.rand(1, 1, 20, 24)
    assert detail(x, x) == 1 and detail(0.5 * x + 3, x) == pytest.approx(0.5) and detail(torch.nn.functional.avg_pool2d(x, 3, 1), x[..., 1:-1, 1:-1]) < 0.6
    assert detail(x, torch.ones_like(x)) is None and detail(x[..., :1], x[..., :1]) is None


def test_block_grid_is_one_without_blocks_and_counts_steps_with_them():
    ramp = np.add.outer(2 * np.arange(64), 2 * np.arange(64)) % 256
    assert block_grid(Image.fromarray(ramp.astype(np.uint8)).convert("RGB"))[0] == pytest.approx(1, abs=1e-3)
    steps = np.arange(64) + 4 * (np.arange(64) // 8)  # 1 within blocks, 5 across their borders
    blocks = np.add.outer(steps, steps).astype(np.uint8)
    assert block_grid(Image.fromarray(blocks).convert("RGB"))[0] == pytest.approx(5, abs=0.05)  # Pillow rounds
    assert block_grid(Image.new("RGB", (9, 9))) == (None, None)


# ---- tiles


@pytest.mark.parametrize("cells, size", [(5, 16), (16, 16), (17, 16), (29, 16), (30, 16), (31, 16), (128, 16),
                                         (9, 4), (157, 8)])
def test_windows_cover_everything_and_overlap(cells, size):
    firsts = starts(cells, size, 1)
    covered = {i for first in firsts for i in range(first, first + size)}
    assert covered >= set(range(cells)) and max(firsts) == max(0, cells - size)
    assert all(0 < b - a <= size - size // 4 for a, b in zip(firsts, firsts[1:]))


@pytest.mark.parametrize("cells, size, step", [(65, 64, 8), (127, 64, 8), (130, 64, 8), (1000, 72, 8), (33, 32, 8), (49, 16, 4)])
def test_windows_begin_where_the_networks_strides_do(cells, size, step):
    firsts = starts(cells, size, step)
    assert firsts[0] == 0 and all(first % step == 0 for first in firsts)
    assert all(step <= b - a <= size - size // 4 + step for a, b in zip(firsts, firsts[1:]))
    assert cells <= firsts[-1] + size < cells + step  # the last one is cut by less than a stride


def test_tiling_a_pointwise_network_is_exact_at_every_scale():
    network, x = torch.nn.Conv2d(3, 3, 1), torch.randn(1, 3, 8 * 21, 8 * 5)

    def both_stages(tiles):
        z = tiles(lambda x: torch.nn.functional.avg_pool2d(network(x), 4), x)
        return tiles(lambda z, x: torch.nn.functional.interpolate(z, scale_factor=4) * network(x), z, x)
    with torch.no_grad():
        whole, parts = Tiles(network, x, 8, None, 16), Tiles(network, x, 8, 64, 16)
        assert torch.allclose(both_stages(whole), both_stages(parts), atol=1e-5)
        assert torch.equal(whole.mosaic(x), x)
        mosaic = parts.mosaic(x)
    assert mosaic.shape == (1, 3, 64, 40)
    assert set(mosaic[0, 0].flatten().tolist()) <= set(x[0, 0].flatten().tolist())  # the image's own patches
    assert torch.equal(mosaic[0, :, :16], x[0, :, :16])
    assert torch.equal(mosaic[0, :, -16:], x[0, :, -24:-8])  # patches begin at whole strides as well


@pytest.mark.parametrize("height, width, tile", [(8 * 37, 8 * 21, 128), (8 * 5, 8 * 43, 192), (8 * 40, 8 * 40, 288)])
def test_tiles_of_any_size_meet_a_network_with_strides(height, width, tile):
    """A network whose output hangs on its grid: windows that begin elsewhere would not agree with the whole. Its maps
    are smaller than a cell, and one is flat, as in the VAE's attention."""
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = torch.nn.ModuleList(torch.nn.GroupNorm(2, 4) for _ in range(3))

        def forward(self, x):
            z = self.norms[0](torch.nn.functional.avg_pool2d(x, 8))
            z = z + self.norms[1](z.flatten(2)).view_as(z)
            small = torch.nn.functional.max_pool2d(z, 2, ceil_mode=True)
            return z + torch.nn.functional.interpolate(self.norms[2](small), scale_factor=2)[..., :z.shape[2], :z.shape[3]]

    torch.manual_seed(0)
    network, x = Network(), torch.randn(1, 4, height // 8, width // 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():
        whole, parts, astray = (Tiles(network, x, 8, t, align)(network, x) for t, align in ((None, 16), (tile, 16), (tile, 8)))
    assert parts.shape == whole.shape
    error, without_grid = ((p - whole).abs().mean() / whole.std() for p in (parts, astray))
    assert error < 0.06 and error < 0.6 * without_grid  # what is left: statistics of a sample


def test_fixed_norms_keep_the_first_calls_statistics():
    torch.manual_seed(0)
    norm, x, y = torch.nn.GroupNorm(4, 8), torch.randn(1, 8, 32, 32) * 3 + 1, torch.randn(1, 8, 16, 16)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    plain = norm(x), norm(y)
    with torch.no_grad(), fixed_norms([norm], [4, 4], [4, 4]):
        assert torch.allclose(norm(x), plain[0], atol=1e-5)
        assert torch.allclose(norm(x.flatten(2)[..., :100]), plain[0].flatten(2)[..., :100], atol=1e-5)
        assert not torch.allclose(norm(y), plain[1], atol=1e-2)
    assert torch.equal(norm(y), plain[1])


def test_fixed_norms_give_the_border_a_large_maps_share():
    """A map whose border is 1 and inside 0: the statistics must be those of the larger map, border as wide."""
    norm = torch.nn.GroupNorm(1, 1)
    small, large = torch.ones(1, 1, 32, 32), torch.ones(1, 1, 128, 64)
    small[..., 2:-2, 2:-2] = large[..., 2:-2, 2:-2] = 0
    with fixed_norms([norm], [16, 8], [4, 4]):
        got = norm(small)
    assert torch.allclose(got.unique(), torch.nn.functional.group_norm(large, 1).unique(), atol=1e-4)


def test_macs_of_convolution_linear_and_attention():
    conv, linear = torch.nn.Conv2d(3, 8, 3, padding=1, device="meta"), torch.nn.Linear(8, 5, bias=False, device="meta")
    x, q = torch.empty(1, 3, 10, 12, device="meta"), torch.empty(1, 2, 20, 4, device="meta")
    assert macs(lambda: conv(x)) == (10 * 12 * 8 * 3 * 9,) * 2
    assert macs(lambda: linear(conv(x).flatten(2).transpose(1, 2)))[0] == 10 * 12 * (8 * 27 + 8 * 5)
    assert macs(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == (0, 2 * 2 * 20 * 20 * 4)


# ---- data


def test_crops_are_a_function_of_seed_and_number(tmp_path, capsys):
    a = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(a).save(tmp_path / "a.png")
    Image.fromarray(a[:10, :12]).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    one, two = Crops([tmp_path], 24, 3), Crops([tmp_path], 24, 3)
    forward = [one.crop(n) for n in range(9)]
    backward = [two.crop(n) for n in reversed(range(9))][::-1]
    assert all(np.array_equal(p, q) and p.shape == (24, 24, 3) for p, q in zip(forward, backward))
    assert not all(np.array_equal(p, q) for p, q in zip(forward, [Crops([tmp_path], 24, 4).crop(n) for n in range(9)]))
    capsys.readouterr()
    again = Crops([tmp_path], 24, 3)
    again.read.cache_clear()
    assert [again.file(n).name for n in range(30)].count("broken.png") == 0
    assert capsys.readouterr().err.count("broken.png: not an image") == 1  # named once
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 training images"):
        Crops([tmp_path / "b"], 24, 0)


def test_noise_depends_on_the_sample_not_on_the_batch():
    whole = noise_for(torch.tensor([4, 5, 6, 7]), (2, 3), 0, 1)
    parts = torch.cat([noise_for(torch.tensor([4, 5]), (2, 3), 0, 1), noise_for(torch.tensor([6, 7]), (2, 3), 0, 1)])
    assert torch.equal(whole, parts) and not torch.equal(whole, noise_for(torch.tensor([4, 5, 6, 7]), (2, 3), 0, 2))


# ---- plumbing


def test_two_learning_rates_fall_together(tmp_path):
    class Acc:
        sync_gradients = False
    run, m = common.Run.__new__(common.Run), torch.nn.Linear(1, 1)
    run.acc, run.cfg = Acc, common.Stage(decay=0.5)
    run.cfg.steps, seen = 100, []
    optimizers = [torch.optim.SGD(m.parameters(), lr) for lr in (1.0, 0.1)]
    for step in range(100):
        for o in optimizers:
            run.update(m, o, step)
        seen.append([o.param_groups[0]["lr"] for o in optimizers])
    run.update(m, optimizers[0], 99, decays=False)
    assert optimizers[0].param_groups[0]["lr"] == 1
    assert torch.tensor(seen)[:, 1].mul(10).allclose(torch.tensor(seen)[:, 0])
    assert [seen[i][0] for i in (0, 50, 75)] == [1.0, 1.0, 0.5] and seen[-1][0] == pytest.approx(0.02)


def test_the_weights_that_ship_serve_where_there_is_no_run(tmp_path, monkeypatch, capsys):
    def default():
        p = argparse.ArgumentParser()
        common.model_flags(p, "codiff")
        return p.parse_args([]).weights
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "SHIPPED", tmp_path / "weights")
    assert default() == tmp_path / "runs" / "codiff"
    (tmp_path / "weights" / "codiff").mkdir(parents=True)
    assert default() == tmp_path / "weights" / "codiff"
    (tmp_path / "runs" / "codiff" / "model").mkdir(parents=True)
    assert default() == tmp_path / "runs" / "codiff"


def test_nested_tensors_and_a_trained_module_come_back(tmp_path):
    def make(width=4):
        return torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 1))
    module, other = make(), make()
    module[0].requires_grad_(False), other[0].requires_grad_(False)
    assert trained(module).keys() == {"1.weight", "1.bias", "1.running_mean", "1.running_var",
                                      "1.num_batches_tracked", "2.weight", "2.bias"}
    path = tmp_path / "deep" / "state.safetensors"
    save_tensors(path, {"modules": {"m": trained(module)}, "count": {3: {"step": torch.tensor(7.0)}}}, step=9)
    state, header = load_tensors(path)
    assert header == {"step": 9} and state["count"]["3"]["step"] == 7
    load_trained(other, state["modules"]["m"], path)
    assert torch.equal(other[2].weight, module[2].weight) and not torch.equal(other[0].weight, module[0].weight)
    for bad in (make(5), torch.nn.Linear(3, 4)):
        with pytest.raises(UserError, match="state.safetensors: does not fit"):
            load_trained(bad, state["modules"]["m"], path)


def test_outputs_never_overwrite_an_input(tmp_path):
    for name in ("a.png", "a.jpg", "b.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "only").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "only" / "d.png")
    with pytest.raises(UserError, match="overwrite"):
        outputs([str(tmp_path / "only")], tmp_path / "only")
    with pytest.raises(UserError, match="overwrite"):
        outputs([str(tmp_path / "a.png")], tmp_path / "a.png")
    pairs = dict(outputs([str(tmp_path)], tmp_path / "out"))
    assert {str(p.relative_to(tmp_path / "out")) for p in pairs.values()} == {"a.png.png", "a.jpg.png", "b.png", "only/d.png"}
    assert outputs([str(tmp_path / "b.jpg")], tmp_path / "c.png") == [(tmp_path / "b.jpg", tmp_path / "c.png")]
    for folder in ("one", "two"):  # the same name in both: refused before any work
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "x.jpg")
    with pytest.raises(UserError, match="another result"):
        outputs([str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "one")], tmp_path / "out")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def torn(tmp):
        tmp.write_text("{")
        raise OSError(28, "No space left on device")
    with pytest.raises(UserError, match="No space left"):
        atomic(path, torn)
    assert json.loads(path.read_text()) == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]
