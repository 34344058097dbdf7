"""moe_diffir.py and data/make_cir.py: codecs and benchmark, each equation, which parameters learn, and the
command line end to end."""

import io
import json
import re
import os
import shlex
import shutil
import stat
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image
from torch.autograd import grad
from transformers import CLIPVisionConfig, CLIPVisionModel

import common
import moe_diffir
from common import PHOTOS, TINY_SD, UserError, read_image, run_cli, text_tokens
from conftest import said_by, same_run
from data import make_cir
from data.files import load_tensors
from data.make_cir import LEVELS, compress
from data.results.evaluate import print_latent_errors, routing
from moe_diffir import CIRPairs, MoEDiffIR, PromptGenerator, Stage1, Stage2, top_k_gates

SMALL = Stage1(width=16, heads=2, prompt_length=4, crop=64)
CAT = read_image(PHOTOS / "val" / "chelsea.png")[0]


def psnr(a, b):
    return -10 * np.log10(np.square(np.asarray(a, float) - np.asarray(b, float)).mean() / 255**2)


# ---- codecs and benchmark


@pytest.mark.parametrize("codec", ["jpeg", "webp", "hevc", "vvc", "avc"])
def test_levels_order_quality_and_size(codec):
    image = CAT.crop((100, 60, 228, 156))
    results = [compress(image, codec, level) for level in LEVELS[codec]]
    quality, size = zip(*((psnr(picture, image), n) for picture, n in results))
    assert list(quality) == sorted(quality) and list(size) == sorted(size) and quality[0] > 18
    means = [np.asarray(picture, float).mean((0, 1)) for picture in (results[-1][0], image)]
    assert np.abs(means[0] - means[1]).max() < 1.2  # no darkening


@pytest.mark.parametrize("codec", ["jpeg", "webp", "hevc", "vvc", "avc"])
@pytest.mark.parametrize("size", [(33, 47), (64, 21), (17, 16)])
def test_any_size_comes_back(codec, size):
    assert compress(CAT.resize(size), codec, LEVELS[codec][2])[0].size == size


@pytest.mark.parametrize("codec", ["hevc", "vvc", "avc"])
@pytest.mark.parametrize("q", [37, 47])
def test_the_qp_in_the_stream_is_the_one_asked_for(codec, q):
    """Read from its headers: 26 + the picture parameter set's offset + the picture's or slice's."""
    stream = make_cir.encode_video(np.asarray(CAT.crop((0, 0, 128, 96))), codec, str(q))
    trace = [make_cir.ffmpeg(), "-hide_banner", "-v", "trace", "-f", make_cir.FFMPEG[codec][0],
             "-i", "pipe:0", "-c", "copy", "-bsf:v", "trace_headers", "-f", "null", "-"]
    traced = subprocess.run(trace, input=stream, capture_output=True).stderr.decode(errors="replace")
    found = re.findall(r"(\w*(?:init_qp_minus26|(?:slice|sh|ph)_qp_delta)) +[01]+ = (-?\d+)", traced)
    fields = {name: int(value) for name, value in found}
    assert 26 + sum(fields.values()) == q and len(fields) >= 2, fields
    assert b"x265" not in stream and b"x264" not in stream  # no message with the encoder's settings


def make_val(folder):
    for name, box in {"chelsea.png": (150, 60, 278, 156), "flower.jpg": (250, 150, 357, 251)}.items():
        read_image(PHOTOS / "val" / name)[0].crop(box).save(folder / f"{name[:-4]}.png")
    return folder


@pytest.fixture(scope="session")
def val(tmp_path_factory):
    return make_val(tmp_path_factory.mktemp("val"))


def files_in(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.png")}


def test_bench_writes_once_what_it_says(val, tmp_path, capsys):
    out, photos = tmp_path / "bench", tmp_path / "photos"
    shutil.copytree(val, photos, ignore=shutil.ignore_patterns(".*"))
    (photos / "torn.png").write_bytes((val / "flower.png").read_bytes()[:300])
    args = ["--data", str(photos), "--out", str(out), "--codecs", "jpeg", "vvc:47", "avc:37"]
    with pytest.raises(UserError, match="1 pictures could not be made"):
        make_cir.main(args)
    first, said = files_in(out), capsys.readouterr()
    assert "torn.png: not an image" in said.err
    assert "4 of the paper's 21 tasks, without webp, hevc, vvc:42, vvc:37, c_psnr" in said.out
    tasks = ("original", "jpeg/5", "jpeg/10", "jpeg/15", "vvc/47", "avc/37")
    assert set(first) == {f"{task}/{name}.png" for task in tasks for name in ("chelsea", "flower")}
    report = json.loads((out / "bench.json").read_text())
    image, buffer = read_image(photos / "flower.png")[0], io.BytesIO()
    image.save(buffer, "JPEG", quality=10)
    pixels, bits = image.width * image.height, report["bits_per_pixel"]
    assert bits["jpeg"]["10"]["flower.png"] == pytest.approx(8 * len(buffer.getvalue()) / pixels)
    assert bits["vvc"]["47"]["flower.png"] == pytest.approx(8 * compress(image, "vvc", "47")[1] / pixels)
    made = read_image(out / "jpeg" / "10" / "flower.png")[0]
    assert np.array_equal(made, Image.open(buffer).convert("RGB"))
    assert np.array_equal(read_image(out / "original" / "flower.png")[0], image)
    assert {"pillow", "ffmpeg"} <= set(report["versions"])

    (photos / "torn.png").unlink()
    (out / "vvc" / "47" / "flower.png").write_bytes(b"\x89PNG half of one")
    image.save(photos / "chelsea.png")  # another photograph by that name
    make_cir.main([*args, "--codecs", "jpeg:5", "vvc:47"])
    again = files_in(out)
    assert {name for name in first if again[name] != first[name]} == {
        "original/chelsea.png", "jpeg/5/chelsea.png", "vvc/47/chelsea.png", "vvc/47/flower.png"}
    assert np.array_equal(read_image(out / "vvc" / "47" / "flower.png")[0], compress(image, "vvc", "47")[0])
    make_cir.main([*args, "--codecs", "jpeg:5", "vvc:47"])
    assert files_in(out) == again


@pytest.fixture
def ffmpeg_is(tmp_path, monkeypatch):
    """ffmpeg_is(script): a program in FFmpeg's place that knows libx265 only."""
    def replace(script):
        exe = tmp_path / "ffmpeg"
        known = "if '-encoders' in sys.argv: print(' libx265 '); sys.exit()"
        exe.write_text(f"#!{sys.executable}\nimport os, sys, time\n{known}\n{script}\n")
        exe.chmod(exe.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr("data.make_cir.ffmpeg", lambda: str(exe))
        make_cir.missing_for.cache_clear()
    yield replace
    make_cir.missing_for.cache_clear()


def test_an_encoder_that_fails_on_one_image_or_hangs(val, tmp_path, ffmpeg_is, monkeypatch, capsys):
    real, out = make_cir.ffmpeg(), tmp_path / "a"
    ffmpeg_is("if '128x96' in sys.argv: sys.exit('no such picture')\n"
              f"os.execv({real!r}, [{real!r}, *sys.argv[1:]])")
    with pytest.raises(UserError, match="1 pictures"):
        make_cir.main(["--data", str(val), "--out", str(out), "--codecs", "hevc:47", "jpeg:5", "vvc"])
    said = capsys.readouterr()
    assert "hevc:47" in said.err and "chelsea.png: FFmpeg failed (no such picture)" in said.err
    assert "vvc: skipped" in said.err and "without libvvenc" in said.err
    assert re.search(r"vvc +- +skipped", said.out)
    assert set(files_in(out)) == {"original/chelsea.png", "original/flower.png", "jpeg/5/chelsea.png",
                                  "jpeg/5/flower.png", "hevc/47/flower.png"}
    ffmpeg_is("time.sleep(30)")
    monkeypatch.setattr("data.make_cir.CODEC_SECONDS", 0.5)
    with pytest.raises(UserError, match="hung and was stopped after 0.5 s"):
        compress(CAT, "hevc", "47")


def test_without_the_extra_its_codecs_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    make_cir.ffmpeg.cache_clear(), make_cir.missing_for.cache_clear()
    try:
        tasks, missing = make_cir.available(make_cir.parse_tasks(["jpeg", "hevc"]))
        assert {codec for codec, _ in tasks} == {"jpeg"} and "pip install -e '.[codecs]'" in missing["hevc"]
        assert "hevc: skipped" in capsys.readouterr().err
    finally:
        make_cir.ffmpeg.cache_clear(), make_cir.missing_for.cache_clear()


def test_pairs_join_the_benchmark_and_are_trained_on(val, tmp_path, capsys):
    lq, out = tmp_path / "lq", tmp_path / "bench"
    lq.mkdir()
    for file in val.glob("*.png"):
        Image.open(file).save(lq / f"{file.stem}.jpg", quality=20)
    args = ["--out", str(out), "--pairs", str(lq), str(val), "--task", "hific:low"]
    make_cir.main(args)
    assert "1 of the paper's 21 tasks" in capsys.readouterr().out
    made = read_image(out / "hific" / "low" / "flower.png")[0]
    assert np.array_equal(made, read_image(lq / "flower.jpg")[0])
    bits = json.loads((out / "bench.json").read_text())["bits_per_pixel"]["hific"]["low"]
    assert bits == {"chelsea.png": None, "flower.png": None}

    caches = make_cir.caches_of([val], out)
    tasks = make_cir.training_tasks(["jpeg:5"], caches)
    assert tasks == [("jpeg", "5"), ("hific", "low")]
    make_cir.complete(caches, tasks)
    assert "trains on 2 of the paper's 21 tasks" in capsys.readouterr().out
    versions = make_cir.read(caches, tasks)
    assert [[task for task, _ in files] for files in versions.values()] == [[0, 1], [0, 1]]
    with pytest.raises(UserError, match="no photograph with a compressed version"):
        make_cir.read(caches, [("vvc", "47")])

    Image.open(lq / "flower.jpg").crop((0, 0, 50, 40)).save(lq / "flower.jpg")
    shutil.copy(lq / "chelsea.jpg", lq / "extra.jpg")
    says = f"extra (only in {lq}), flower (50 x 40 in {lq}, 107 x 101 in {val})"
    with pytest.raises(UserError, match=re.escape(says)):
        make_cir.main(args)


def test_a_sample_is_the_same_crop_of_both(val, tmp_path):
    """With a lossless second version both crops are equal; all tasks are drawn; a period's samples repeat."""
    make_cir.bench([val], tmp_path, [("jpeg", "5"), ("webp", "15")])
    for name in ("chelsea.png", "flower.png"):
        shutil.copy(tmp_path / "original" / name, tmp_path / "jpeg" / "5" / name)
    benchmark = make_cir.read([([val], tmp_path)], [("jpeg", "5"), ("webp", "15"), ("vvc", "47")])
    pairs = CIRPairs(benchmark, Stage1(crop=64), 32, 0)
    samples = [pairs[n] for n in range(60)]
    same = [bool(torch.equal(x_lq, x_hq)) for _, x_lq, x_hq, _ in samples]
    assert 15 < sum(same) < 45 and same == [task == 0 for *_, task in samples]
    again = CIRPairs(benchmark, Stage1(crop=64), 32, 0, period=7)
    assert all(torch.equal(a, b) for a, b in zip(again[23][1:3], pairs[23 % 7][1:3]))


# ---- router and prompts


def test_eq_3_by_hand():
    torch.manual_seed(0)
    generator = PromptGenerator(SMALL, None)
    torch.nn.init.normal_(generator.W_noise.weight)
    f, noise = torch.randn(4, 10, 16), torch.randn(4, 7)
    x = f.mean(1).detach().numpy().astype(float)
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    W_g, W_noise = (w.weight.detach().numpy().astype(float).T for w in (generator.W_g, generator.W_noise))
    logits = x @ W_g + noise.numpy() * np.log1p(np.exp(x @ W_noise))
    for row, got in zip(logits, generator.gate(f, None, noise)):
        soft = np.exp(row) / np.exp(row).sum()
        expected = [v if v in sorted(soft)[-3:] else 0 for v in soft]
        assert np.allclose(got.detach().numpy(), expected, atol=1e-6)
    quiet = generator.gate(f, None, None)
    assert torch.equal(quiet, generator.gate(f, None, None))
    assert torch.allclose(quiet, top_k_gates(torch.tensor(x @ W_g).float(), 3), atol=1e-6)


def test_the_chosen_prompts_interact_and_only_they_learn():
    """Eq. 1 with E_i(x) = softmax(f P_i^T / sqrt(C)) P_i; the gradient reaches the K chosen prompts and, by
    their gates, the router."""
    torch.manual_seed(1)
    generator = PromptGenerator(SMALL, None)
    f = torch.randn(1, 10, 16)
    y, gates = generator(f, (2, 5), None, None, None)
    expected = f[0].clone()
    for i, g in enumerate(gates[0].tolist()):
        p = generator.prompts[i]
        expected = expected + g * ((f[0] @ p.T / 4).softmax(1) @ p)
    assert torch.allclose(y[0], expected, atol=1e-5)
    d_prompts, d_router = grad(y.square().sum(), [generator.prompts, generator.W_g.weight])
    moved = (d_prompts.abs().sum((1, 2)) > 0)
    assert torch.equal(moved, gates[0] > 0) and moved.sum() == 3 and d_router.abs().sum() > 0


def test_the_prior_reaches_the_router_and_nothing_else():
    torch.manual_seed(2)
    generator = PromptGenerator(SMALL, 8)
    f, dp = torch.randn(1, 10, 16), torch.randn(2, 1, 5, 8)
    (y, gates), (_, other) = (generator(f, (2, 5), d, None, None) for d in dp)
    assert not torch.equal(gates, other)
    assert torch.equal(generator(f, (2, 5), dp[1], None, gates)[0], y)


@pytest.mark.parametrize("kind", ["none", "single", "multiple"])
def test_table_2s_other_prompts(kind):
    generator = PromptGenerator(Stage1(width=16, heads=2, prompt=kind), None)
    f = torch.randn(2, 6, 16)
    y, g = generator(f, (2, 3), None, None, None)
    if kind == "none":
        assert torch.equal(y, f)
    if kind == "single":
        assert torch.allclose((y - f)[0], (y - f)[1], atol=1e-6) and (y - f).abs().sum() > 0
    if kind == "multiple":  # soft weights of all, one fused prompt
        mixed = (g[0][:, None, None] * generator.prompts).sum(0)
        expected = f[0] + (f[0] @ mixed.T / 4).softmax(1) @ mixed
        assert torch.allclose(g.sum(1), torch.ones(2)) and torch.allclose(y[0], expected, atol=1e-5)


def test_routing_in_closed_form():
    """Two codecs, each with prompts of its own: one bit; with the same prompts for both: none."""
    gates = [[torch.tensor([1.0, 0, 0])], [torch.tensor([0, 1.0, 0])]]
    row, = routing([("jpeg", "5", gates[0])] * 20 + [("vvc", "47", gates[1])] * 20)
    assert row["bits"] == pytest.approx(1, abs=1e-5) and row["by chance"] < 0.1 and row["sets"] == 2
    row, = routing([(codec, "5", gates[n % 2]) for codec in ("jpeg", "webp") for n in range(20)])
    assert row["bits"] == pytest.approx(0, abs=1e-6)


# ---- the model around Stable Diffusion


@pytest.fixture(scope="module")
def empty():
    return text_tokens(TINY_SD, [""])[0]


@pytest.fixture(scope="module")
def model(empty):
    torch.manual_seed(0)
    return MoEDiffIR(TINY_SD, SMALL, empty, 12, Stage2(levels=4, blocks=1)).eval()


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("size", [(16, 8), (13, 9)])
def test_untrained_modulation_leaves_the_base_untouched(model, empty, size):
    """Of latents of any size: the module's strides end on the UNet's own."""
    g = torch.Generator().manual_seed(0)
    z_t, z_lq = (torch.randn(2, 16, *size, generator=g) for _ in range(2))
    x = torch.randn(2, 3, *(8 * n for n in size), generator=g).clamp(-1, 1)
    t = torch.tensor([3, 700])
    with torch.no_grad():
        eps_hat, *_ = model(z_t, t, z_lq, x, torch.randn(2, 3, 7, generator=g))
        assert (eps_hat - model.sd.unet(z_t, t, empty.expand(2, -1, -1)).sample).abs().max() < 1e-6
        c = torch.randn(2, 77, 96, generator=g)
        out, _ = model.denoise(z_t, t, z_lq, model.degradation_prior(x), c)
        assert (out - model.sd.unet(z_t, t, c).sample).abs().max() < 1e-6
    assert hooks(model) == 0


def resnet(block, h, emb, modulate=lambda h: h):
    """A ResBlock of the UNet, layer by layer: skip(h) + branch(h), the branch modulated at its end."""
    branch = block.conv1(F.silu(block.norm1(h))) + block.time_emb_proj(F.silu(emb))[:, :, None, None]
    branch = modulate(block.conv2(F.silu(block.norm2(branch))))
    return (h if block.conv_shortcut is None else block.conv_shortcut(h)) + branch


@pytest.mark.parametrize("size", [(16, 16), (13, 9)])
def test_spade_is_its_formula_on_the_residual_branches_of_stablesr(model, size):
    """With known gamma and beta, against the UNet's mid and up blocks layer by layer."""
    unet, g = model.sd.unet, torch.Generator().manual_seed(1)
    z, c = torch.randn(1, 16, *size, generator=g), torch.randn(1, 77, 96, generator=g)
    t, widths = torch.tensor([100]), (64, 96, 128)
    shapes = [[-(-n // 2**i) for n in size] for i in range(3)]
    features = [torch.randn(1, w, *shape, generator=g) for w, shape in zip(widths, shapes)]
    before = [p.clone() for p in model.spade.parameters()]
    for p in model.spade.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=g)
    spade_of, seen = {conv2: spade for spade, (_, conv2) in zip(model.spade, model.branches())}, []

    def modulated(block, i):
        def modulate(h):
            seen.append(block)
            gamma, beta = spade_of[block.conv2].maps(features[i]).chunk(2, 1)
            return h + gamma * F.group_norm(h, unet.config.norm_num_groups, eps=1e-5) + beta
        return modulate
    with torch.no_grad():
        emb = unet.time_embedding(unet.time_proj(t))
        h = unet.conv_in(z)
        skips = [h]
        for block in unet.down_blocks:
            text = {"encoder_hidden_states": c} if hasattr(block, "attentions") else {}
            h, out = block(h, temb=emb, **text)
            skips += out
        first, second = unet.mid_block.resnets
        h = resnet(first, h, emb, modulated(first, 2))
        h = resnet(second, unet.mid_block.attentions[0](h, encoder_hidden_states=c).sample, emb)
        for i, block in zip((2, 1, 0), unet.up_blocks):
            for j, res in enumerate(block.resnets):
                h = resnet(res, torch.cat([h, skips.pop()], 1), emb, modulated(res, i))
                if hasattr(block, "attentions"):
                    h = block.attentions[j](h, encoder_hidden_states=c).sample
            if i:
                h = block.upsamplers[0](h, shapes[i - 1])
        expected = unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
        with model.modulation(features):
            got = unet(z, t, c).sample
        plain = unet(z, t, c).sample
    for p, old in zip(model.spade.parameters(), before):
        p.data = old
    assert len(seen) == len(set(seen)) == len(model.spade) == 7  # the mid block's first, six that lead up
    assert torch.allclose(got, expected, atol=1e-4) and (got - plain).abs().max() > 0.01 and hooks(model) == 0


def test_hooks_go_even_when_something_fails(model):
    z = torch.zeros(1, 16, 8, 8)
    with pytest.raises(RuntimeError):
        model.denoise(z, torch.tensor([1]), z, None, torch.zeros(1, 77, 5), gates=[torch.eye(7)[:1]] * 3)
    assert hooks(model) == 0


def test_ddim_is_diffusers(model, empty, monkeypatch):
    """Four steps from t = 800; the last one's clean latent."""
    monkeypatch.setattr(model, "cfg", Stage1(start="noise", start_t=800))
    scheduler = DDIMScheduler.from_pretrained(TINY_SD, subfolder="scheduler", clip_sample=False,
                                              steps_offset=0, timestep_spacing="leading")
    scheduler.set_timesteps(5)
    g = torch.Generator().manual_seed(0)
    z_lq, noise = (torch.randn(1, 16, 8, 8, generator=g) for _ in range(2))
    with torch.no_grad():
        dp, c = model.prior(torch.rand(1, 3, 64, 64, generator=g)), empty[None]
        z_0, gates = model.sample(z_lq, dp, c, 4, noise)
        assert list(gates) == scheduler.timesteps.tolist()[:4] == [800, 600, 400, 200]
        z = scheduler.add_noise(z_lq, noise, torch.tensor([800]))
        for t in scheduler.timesteps[:4]:
            out = scheduler.step(model.denoise(z, t[None], z_lq, dp, c)[0], t, z)
            z = out.prev_sample
        one, _ = model.sample(z_lq, dp, c, 1, noise)
        z = scheduler.add_noise(z_lq, noise, torch.tensor([800]))
        eps = model.denoise(z, torch.tensor([800]), z_lq, dp, c)[0]
        x0 = scheduler.step(eps, 800, z).pred_original_sample
    assert torch.allclose(z_0, out.pred_original_sample, atol=1e-3) and torch.allclose(one, x0, atol=1e-3)


def test_one_step_starts_at_the_compressed_latent_itself(model, empty, monkeypatch):
    """start "lq": x0 of sqrt(alpha_bar) z_lq at t*, no noise; the true eps* gives the original's."""
    g = torch.Generator().manual_seed(3)
    z_lq, z_0, noise = (torch.randn(1, 16, 8, 8, generator=g) for _ in range(3))
    seen, a = [], model.sd.alpha_bar[49]
    eps = (a.sqrt() * z_lq - a.sqrt() * z_0) / (1 - a).sqrt()

    def denoise(z_t, t, *_, gates):
        seen.append((z_t, t.tolist()))
        return eps, []
    monkeypatch.setattr(model, "denoise", denoise)
    got, _ = model.sample(z_lq, None, empty[None], 1, noise)
    (z_t, t), = seen
    assert t == [49] and torch.equal(z_t, a.sqrt() * z_lq) and torch.allclose(got, z_0, atol=1e-5)


def test_the_prior_sees_windows_of_the_training_crop(model):
    """A picture made of one crop has the crop's prior; another the mean over windows that cover it; one
    smaller than a window is seen as it is."""
    crop, other, wide = torch.rand(3, 2, 3, 64, 64).mul(2).sub(1)
    with torch.no_grad():
        of_crop = model.prior(crop)
        assert torch.equal(model.degradation_prior(crop), of_crop)
        assert torch.allclose(model.degradation_prior(crop.repeat(1, 1, 3, 2)), of_crop, atol=1e-5)
        two = torch.cat([crop, other], 3)
        assert torch.allclose(model.degradation_prior(two), (of_crop + model.prior(other)) / 2, atol=1e-5)
        halves = (model.prior(two[..., :64]) + model.prior(two[..., 36:100])) / 2
        assert torch.allclose(model.degradation_prior(two[..., :100]), halves, atol=1e-5)
        small = wide[:, :, :40, :50]
        assert torch.equal(model.degradation_prior(small), model.prior(small))
        assert (model.prior(two) - of_crop).abs().max() > 1e-3  # what the whole at once would give


def test_eps_of_both_parametrisations(model):
    sd, g = model.sd, torch.Generator().manual_seed(0)
    z_0, eps = (torch.randn(2, 16, 4, 4, generator=g) for _ in range(2))
    alpha_bar = sd.alpha_bar[torch.tensor([10, 900])]
    a = alpha_bar.view(-1, 1, 1, 1)
    z_t, v = a.sqrt() * z_0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * z_0
    assert torch.equal(moe_diffir.diffuse(z_0, eps, alpha_bar), z_t)
    assert torch.equal(model.eps(z_t, eps, alpha_bar), eps)
    sd.prediction = "v_prediction"
    try:
        assert torch.allclose(model.eps(z_t, v, alpha_bar), eps, atol=1e-5)
        assert torch.allclose(sd.x0(z_t, v, alpha_bar), z_0, atol=1e-5)
    finally:
        sd.prediction = "epsilon"


def test_stage_1_moves_its_modules_and_nothing_else(empty):
    torch.manual_seed(0)
    model = MoEDiffIR(TINY_SD, SMALL, empty, 12)
    for p in (model.spade[0].maps[2].weight, model.v2t.tokens[2].weight, model.v2t.unpatch.weight):
        torch.nn.init.normal_(p, std=0.02)
    z = torch.randn(2, 16, 8, 8)
    eps_hat, *_ = model(z, torch.tensor([100, 300]), z, torch.rand(2, 3, 64, 64), torch.randn(2, 3, 7))
    moe_diffir.loss_sd(eps_hat, torch.randn_like(z)).backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {n.split(".")[0] for n in moved} == {"module", "spade", "v2t", "prior"}
    assert {"v2t.patch.weight", "v2t.position", "v2t.channels.1.weight", "prior.fine.weight",
            "prior.coarse.weight", "module.prompt.0.prompts", "module.prompt.0.W_g.weight",
            "module.prompt.0.W_noise.weight", "module.prompt.0.meet.to_q.weight"} <= moved
    assert all(n.split(".")[0] != "sd" for n, p in model.named_parameters() if p.requires_grad)


def test_the_module_learns_from_the_second_step_on(empty):
    """SPADE's last layer is zero at first: only its gradient is not. After one step of it all have some."""
    torch.manual_seed(0)
    model, z = MoEDiffIR(TINY_SD, SMALL, empty, 12), torch.randn(2, 16, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(2):
        optimizer.zero_grad()
        eps_hat, *_ = model(z, torch.tensor([99, 99]), z, torch.rand(2, 3, 64, 64), torch.randn(2, 3, 7))
        moe_diffir.loss_sd(eps_hat, torch.randn_like(z)).backward()
        assert all(spade.maps[2].weight.grad.abs().sum() > 0 for spade in model.spade)
        reached = [out.weight.grad.abs().sum() > 0 for out in model.module.out]
        assert reached == [step == 1] * 3
        optimizer.step()


def test_losses_equal_their_formulas():
    a, b = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    assert moe_diffir.loss_sd(a, b).item() == pytest.approx(np.square(a.numpy() - b.numpy()).mean(), rel=1e-5)
    distance = moe_diffir.FeatureDistance()
    x, y = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    stages = zip((1, 0.01, 0.01, 0.01), distance.net.features(x), distance.net.features(y))
    expected = sum(w * ((u - v)**2).mean((1, 2, 3)) / (v.flatten(1).var(1) + 1e-3) for w, u, v in stages)
    assert moe_diffir.loss_decoder(distance, x, y) == pytest.approx(expected.mean().item(), rel=1e-5)
    assert moe_diffir.loss_decoder(distance, y, y) == 0


def test_compensator_at_w_0_is_the_plain_decoder(empty):
    torch.manual_seed(0)
    model = MoEDiffIR(TINY_SD, SMALL, empty, 12, Stage2(levels=4, blocks=1))
    x = torch.rand(1, 3, 64, 96) * 2 - 1
    z, features = model.encode(x)
    plain = model.sd.decode(z)
    assert [f.shape[1] for f in features] == [16, 32, 64, 128] and torch.equal(model.sd.encode(x), z)
    def decode(w):
        return model.compensator(model.sd, z, features, w)
    assert torch.allclose(decode(1.0), plain, atol=1e-6)  # zero at first
    for fuse in model.compensator.fuse:
        torch.nn.init.normal_(fuse[-1].weight, std=0.02)
    full, half, none = map(decode, (1.0, 0.5, 0.0))
    assert torch.equal(none, plain) and hooks(model) == 0
    assert (full - plain).abs().mean() > (half - plain).abs().mean() > 1e-4
    gradients = grad(full.sum(), list(model.compensator.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


def test_units_of_channels_and_of_those_that_never_change(empty):
    """Deviations as measured; where one is 0 or nearly, as of an encoder's unused channel, a floor."""
    model = MoEDiffIR(TINY_SD, SMALL, empty, 12, Stage2(levels=2, blocks=0))
    x = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        z, features = model.encode(x)
        features[1][:, 3], features[1][:, 4] = 5.0, 1e-5 * torch.randn(features[1][:, 4].shape)
        model.compensator.measure_units(model.sd, z, features)
        mean, std = model.compensator.mean0.flatten(), model.compensator.std0.flatten()  # level 0: half size
        assert std[3] == std[4] == std.min() == pytest.approx(1e-3) and mean[3] == 5
        assert std[0] == pytest.approx(features[1][:, 0].std().item(), rel=1e-4)
    flat = [torch.zeros_like(f) for f in features]  # of blank pictures
    for layer in model.compensator.fuse:
        torch.nn.init.normal_(layer[-1].weight, std=0.02)
    with torch.no_grad():
        model.compensator.measure_units(model.sd, torch.zeros_like(z), flat)
    x_hat = model.compensator(model.sd, z, features)
    moved = grad(x_hat.square().mean(), list(model.compensator.parameters()))
    assert x_hat.isfinite().all() and all(g.isfinite().all() for g in moved)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP image encoder as one would download it, in miniature."""
    folder = tmp_path_factory.mktemp("clip")
    config = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                              num_attention_heads=2, image_size=32, patch_size=16)
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def test_clip_sees_the_picture_as_its_processor_would(clip):
    from transformers import CLIPImageProcessor
    picture = CAT.crop((0, 0, 200, 200))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = processor(picture, return_tensors="pt").pixel_values
    ours = moe_diffir.clip_input(common.to_tensor(picture)[None], 32)
    assert (ours - theirs).abs().max() < 0.05  # theirs rounds to 8 bits
    prior = moe_diffir.Prior(str(clip))
    assert prior(common.to_tensor(picture)[None]).shape == (1, 5, 32)
    assert not any(p.requires_grad for p in prior.parameters())


def test_a_clip_in_half_precision_is_run_in_single(clip, tmp_path):
    CLIPVisionModel.from_pretrained(clip).half().save_pretrained(tmp_path)
    x = torch.rand(1, 3, 64, 64)
    assert moe_diffir.clip_encoder(str(tmp_path), "--clip").dtype == torch.float32
    assert torch.allclose(moe_diffir.Prior(str(tmp_path))(x), moe_diffir.Prior(str(clip))(x), atol=0.02)


# ---- the command line, end to end

SHORT = ["--s1-width", 16, "--s1-heads", 2, "--s1-crop", 64, "--s1-batch", 2, "--s2-crop", 64,
         "--s2-batch", 2, "--cache-latents", 5]


def latents_of(out):
    """The cache's file, relative to the run's folder."""
    return str(next(out.glob("latents/5-64-1-*.npy")).relative_to(out))


def train_args(out, val):
    steps = ["--s1-steps", 4, "--s2-steps", 4, "--s1-save-every", 2, "--s2-save-every", 2]
    return [str(a) for a in ("train", "--out", out, "--data", val, "--val", val, *steps, *SHORT)]


@pytest.fixture(scope="session")
def run(tmp_path_factory, val):
    """The default command line, at reduced steps and widths, from a folder that is not the repo's."""
    out = tmp_path_factory.mktemp("moe") / "run"
    return out, said_by(moe_diffir.main, train_args(out, val), tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="session")
def trained(run):
    return moe_diffir.load(run[0])


def rows_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_train_end_to_end(run, val):
    out, printed = run
    for said in ("trains on 12 of the paper's 21 tasks, without c_psnr, c_ssim, hific", "stage 1 on",
                 "stage 2 on", "|grad sd|", "|grad features|", "not the metric LPIPS", "vvc:47, 2 images",
                 "restored, 1 step", "VAE(original)", "gap, 1 step",
                 "latent error after one step, of the compressed latent's own: jpeg:5",
                 "what the chosen prompt set tells of the codec, 8"):
        assert said in printed, said
    rows = rows_of(out)
    assert [(r["stage"], r["step"]) for r in rows] == [(s, i) for s in (1, 2) for i in range(4)]
    for row in rows[:4]:  # every picture chooses K = 3 prompts at each of three scales
        load = {k: v for k, v in row.items() if k.startswith("load")}
        assert sum(load.values()) == pytest.approx(9, abs=1e-4) and sum(k[4] == "1" for k in load) == 7
        assert row["loss"] == pytest.approx(row["sd"] + row["dp"], rel=1e-4)
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert files == {"config.json", "log.jsonl", "metrics.json", "samples/eval.png", latents_of(out),
                     *(f"{folder}/stage{n}.safetensors" for folder in ("last", "model") for n in (1, 2))}
    results = json.loads((out / "metrics.json").read_text())
    assert set(results["results"]) == {"jpeg:5", "webp:5", "hevc:47", "vvc:47"}
    assert len(results["mutual_information"]) == 3
    low, high, ours = (results["codecs"]["vvc"][row]["PSNR"]
                       for row in ("VAE(compressed)", "VAE(original)", "restored, 1 step"))
    gap = results["gap_closed"]["vvc"]["restored, 1 step"]
    assert gap == pytest.approx((ours - low) / (high - low))
    assert common.list_images([val]) == sorted(val.glob("*.png"))  # nothing of the hidden cache
    z_0 = np.load(out / latents_of(out))
    assert z_0.shape == (5, 16, 8, 8) and np.isfinite(z_0).all()


def test_a_run_keeps_what_it_trained(run):
    """Stage 1: its modules, and the empty caption's tokens. Stage 2: the compensator and its units."""
    (stage1, _), (stage2, header) = (load_tensors(run[0] / "model" / f"stage{n}.safetensors") for n in (1, 2))
    assert {k.split(".")[0] for k in stage1} == {"empty", "module", "spade", "v2t", "prior"}
    assert {k.split(".")[0] for k in stage2} == {"fuse", "mean0", "std0"}
    assert header["tasks"][0] == "jpeg:5" and header["stage1.width"] == 16


def test_restore_keeps_size_and_alpha_and_is_deterministic(run, trained, tmp_path):
    CAT.crop((0, 0, 121, 90)).save(tmp_path / "a.webp", quality=5)
    with_alpha = CAT.crop((0, 0, 40, 33)).convert("RGBA")
    with_alpha.putalpha(77)
    with_alpha.save(tmp_path / "b.png")
    inputs, out = [str(tmp_path / name) for name in ("a.webp", "b.png")], tmp_path / "out"
    moe_diffir.main(["restore", *inputs, "-o", str(out), "--weights", str(run[0])])
    lq = read_image(tmp_path / "a.webp")[0]
    one, gates = moe_diffir.restore(trained, lq, 1)
    assert np.array_equal(np.asarray(one), np.asarray(Image.open(out / "a.png"))) and one.size == (121, 90)
    assert [int((g > 0).sum()) for g in gates] == [3, 3, 3]
    assert set(np.array(Image.open(out / "b.png").getchannel("A")).ravel()) == {77}
    assert not np.array_equal(one, np.asarray(moe_diffir.restore(trained, lq, 1, fidelity=0.0)[0]))


def test_a_whole_picture_is_encoded_once_and_padded_to_8_pixels(trained, monkeypatch):
    """In windows the encoder's features are made again for each."""
    calls, real = [], trained.encode
    monkeypatch.setattr(trained, "encode", lambda x: calls.append(x.shape) or real(x))
    whole = moe_diffir.restore(trained, CAT.crop((0, 0, 250, 120)), 1)[0]
    assert calls == [(1, 3, 120, 256)]
    tiled = moe_diffir.restore(trained, CAT.crop((0, 0, 250, 120)), 1, tile=128)[0]
    assert len(calls) == 1 + 2 * (1 + 3)  # encoding, decoding: the mosaic, then three windows
    assert whole.size == tiled.size == (250, 120) and hooks(trained) == 0


@pytest.mark.parametrize("size", [(1, 1), (9, 75), (150, 203)])
def test_any_size_is_restored(trained, size):
    picture = CAT.crop((0, 0, *size))
    for tile in (None, 128):
        assert moe_diffir.restore(trained, picture, 1, tile=tile)[0].size == size


def test_tiles_keep_the_picture(trained):
    """In windows, in two steps, with one mosaic's gates."""
    lq = compress(CAT.crop((0, 0, 300, 260)), "jpeg", "10")[0]
    whole, gates = moe_diffir.restore(trained, lq, 2)
    tiled, tiled_gates = moe_diffir.restore(trained, lq, 2, tile=128)
    assert np.abs(np.asarray(tiled).astype(float) - np.asarray(whole)).mean() < 6
    assert all((a - b).abs().max() < 0.2 for a, b in zip(gates, tiled_gates)) and hooks(trained) == 0


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, tmp_path, val, monkeypatch):
    """Ctrl-C in the third step of both stages and between them, among the latents; resumed each time."""
    out, args = tmp_path / "run", train_args(tmp_path / "run", val)
    for name, third in (("loss_sd", 3), ("make_latents", 2), ("loss_decoder", 3)):
        calls, real = [], getattr(moe_diffir, name)

        def interrupted(*a, calls=calls, real=real, third=third):
            calls.append(1)
            if len(calls) == third:
                raise KeyboardInterrupt
            return real(*a)
        monkeypatch.setattr(moe_diffir, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            moe_diffir.main([*args, *(["--resume"] if (out / "config.json").exists() else [])])
        monkeypatch.setattr(moe_diffir, name, real)
    moe_diffir.main([*args, "--resume"])
    same_run(out, run[0], latents_of(out))


class LatentPairsThatTell(moe_diffir.LatentPairs):
    """x_lq says which process read it."""

    def __getitem__(self, n):
        n, x_lq, x_hq, z_0 = super().__getitem__(n)
        return n, torch.full_like(x_lq, os.getpid()), x_hq, z_0


@pytest.mark.parametrize("workers", [0, 2])
def test_latents_made_already_are_not_made_again(trained, val, tmp_path, monkeypatch, workers):
    """Pictures are read by the loader's workers, as many as the run has."""
    cfg, made, readers = Stage2(crop=64, batch=2, cache_latents=7, workers=workers), [], set()
    acc = types.SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"),
                                autocast=torch.no_grad, wait_for_everyone=lambda: None)
    run = types.SimpleNamespace(folder=tmp_path, main=True, first=lambda work: work(), acc=acc, seed=0)
    make_cir.bench([val], tmp_path / "bench", [("jpeg", "5")])
    benchmark = make_cir.read([([val], tmp_path / "bench")], [("jpeg", "5")])
    pairs = LatentPairsThatTell(benchmark, cfg, 32, 1, 7)

    def make_latents(model, cfg, n, x, seed):
        made.extend(n.tolist())
        readers.update(x[:, 0, 0, 0].int().tolist())
        return torch.ones(len(n), 16, 8, 8) * n.view(-1, 1, 1, 1)
    monkeypatch.setattr(moe_diffir, "make_latents", make_latents)
    path = moe_diffir.cache_latents(run, cfg, trained, pairs)
    assert made == list(range(7)) and np.array_equal(np.load(path)[:, 0, 0, 0], np.arange(7))
    assert readers == {os.getpid()} if workers == 0 else len(readers - {os.getpid()}) == 2
    z_0 = np.load(path, mmap_mode="r+")
    z_0[4, 3, 2, 1] = np.nan  # a kill tore this one
    z_0.flush()
    made.clear()
    assert moe_diffir.cache_latents(run, cfg, trained, pairs) == path and made == [4, 5]  # their batch
    pairs.latents = path
    assert (pairs[4][3] == 4).all() and (pairs[13][3] == 6).all()
    made.clear()
    acc.num_processes, acc.process_index = 2, 1
    other = moe_diffir.cache_latents(run, Stage2(**vars(cfg) | {"sampling": 7}), trained, pairs)
    assert other != path and made == [2, 3, 6]  # the second of two processes


def test_latents_on_the_fly_are_those_of_the_cache(run, tmp_path, val):
    out = tmp_path / "run"
    shutil.copytree(run[0], out)
    (out / "last" / "stage2.safetensors").unlink()
    args = ["--stage", "2", "--cache-latents", "0", "--s2-steps", "1"]
    moe_diffir.main([*train_args(out, val), *args])
    a, b = (rows_of(folder)[4]["features"] for folder in (run[0], out))
    assert a == pytest.approx(b, rel=1e-4)


def test_two_processes_give_the_losses_of_one(run, two_processes, tmp_path, val):
    two_processes("moe_diffir", train_args(tmp_path / "run", val))
    one, two = rows_of(run[0]), rows_of(tmp_path / "run")
    assert len(one) == len(two) == 8
    for a, b in zip(one, two):
        assert {k: pytest.approx(v, rel=2e-3, abs=1e-6) for k, v in a.items()} == b


def test_ablations_with_a_frozen_clip(tmp_path, val, clip, capsys, no_evaluation):
    """Tables 2 and 3 by flags; CLIP encoders stay frozen and out of the checkpoint, and are found again."""
    def train(name, *flags):
        more = ["--codecs", "jpeg:5", "--s1-steps", "1", "--s2-steps", "1", "--cache-latents", "0", *flags]
        moe_diffir.main([*train_args(tmp_path / name, val), *more])
        return moe_diffir.load(tmp_path / name)
    model = train("clip", "--dp", str(clip), "--clip", str(clip), "--experts", "4", "--top-k", "1")
    tensors = load_tensors(tmp_path / "clip" / "model" / "stage1.safetensors")[0]
    assert tensors["module.prompt.0.prompts"].shape[0] == 4
    assert not any("vision_model" in k or "embeddings" in k or k.startswith("prior.") for k in tensors)
    assert "1 of the paper's 21 tasks" in capsys.readouterr().out
    gates = moe_diffir.restore(model, CAT.crop((0, 0, 40, 40)), 1)[1]
    assert [int((g > 0).sum()) for g in gates] == [1, 1, 1]
    model = train("none", "--no-v2t", "--no-dp", "--prompt", "none")
    assert model.prior is None and model.v2t is None
    assert moe_diffir.restore(model, CAT.crop((0, 0, 40, 40)), 1)[1] == []
    with pytest.raises(UserError, match="routes nothing"):
        moe_diffir.main(["figures", "--weights", str(tmp_path / "none")])


@pytest.mark.parametrize("start", ["lq", "noise"])
def test_eq_2_of_both_starts(start, val, tmp_path, monkeypatch):
    """What the UNet is given and asked for. With "noise", the paper's, the compensator's z_0 and restore are
    of as many steps as the run says."""
    seen, real, loss, steps = [], MoEDiffIR.forward, moe_diffir.loss_sd, []

    def forward(self, z_t, t, z_lq, *rest):
        seen.extend([z_t, t, z_lq, self.sd.alpha_bar[t].view(-1, 1, 1, 1)])
        return real(self, z_t, t, z_lq, *rest)

    def sample(self, z_lq, dp, c, n, noise, *tiles, real=MoEDiffIR.sample):
        steps.append(n)
        return real(self, z_lq, dp, c, n, noise, *tiles)
    encoded, encode = [], common.SD.encode
    monkeypatch.setattr(common.SD, "encode", lambda *a: encoded.append(encode(*a)) or encoded[-1])
    monkeypatch.setattr(MoEDiffIR, "forward", forward)
    monkeypatch.setattr(MoEDiffIR, "sample", sample)
    monkeypatch.setattr(moe_diffir, "loss_sd", lambda out, eps: seen.append(eps) or loss(out, eps))
    flags = ["--s1-start-t", "299", "--s2-sampling", "3"] if start == "noise" else []
    args = [*train_args(tmp_path / "run", val), "--codecs", "jpeg:5", "--s1-steps", "1", "--s2-steps", "1"]
    moe_diffir.main([*args, "--start", start, *flags])
    (z_t, t, z_lq, a, eps), (_, z_0) = seen, encoded[:2]
    noised = a.sqrt() * z_0 + (1 - a).sqrt() * eps
    assert torch.equal(encoded[0], z_lq) and torch.allclose(z_t, noised, atol=1e-5)
    if start == "lq":
        assert t.tolist() == [49, 49] and torch.allclose(z_t, a.sqrt() * z_lq, atol=1e-5)
        assert set(steps) == {1}
        return
    assert len(set(t.tolist())) == 2 and t.max() < 500 and abs(eps.std() - 1) < 0.1
    first_of_eval = steps.index(3) + 3  # after the three batches of five cached latents
    assert steps[first_of_eval - 3:first_of_eval] == [3, 3, 3] and steps[first_of_eval:] == [3, 3, 1, 1]
    CAT.crop((0, 0, 40, 40)).save(tmp_path / "a.png")
    for flags, expected in (([], 3), (["--steps", "2"], 2)):
        moe_diffir.main(["restore", str(tmp_path / "a.png"), "-o", str(tmp_path / "o.png"), "--weights",
                         str(tmp_path / "run"), *flags])
        assert steps[-1] == expected
    assert moe_diffir.Stage2.paper().sampling == 50


def test_latent_errors_in_closed_form(val, capsys):
    """Of a model whose latents are pixels and whose one step halves them."""
    model = types.SimpleNamespace(cell=1, encode=lambda x: (x, []), degradation_prior=lambda x: None,
                                  text=lambda x: None, sample=lambda z, dp, c, steps, noise: (z / 2, {}))
    one = own = 0
    for file in common.list_images([val]):
        image = Image.open(file)
        z_hq, z_lq = (np.asarray(i, float) / 127.5 - 1 for i in (image, compress(image, "jpeg", "5")[0]))
        one, own = one + np.square(z_lq / 2 - z_hq).mean(), own + np.square(z_lq - z_hq).mean()
    found = print_latent_errors(model, [val], [("jpeg", "5"), ("jpeg", "10"), ("hific", "low")])
    assert found == {"jpeg:5": pytest.approx(one / own, rel=1e-4)}
    assert f"jpeg:5 {one / own:.3f}" in capsys.readouterr().out


def test_a_start_without_noise_is_no_start_from_noise():
    with pytest.raises(UserError, match=r"--s1-start-t 999: .*to 499 \(--start lq\)"):
        Stage1.paper().__class__(**(vars(Stage1.paper()) | {"start": "lq"}))
    assert Stage1.paper().start_t == 999 and Stage1().start_t == 49


def test_several_processes_refuse_to_wait_for_the_benchmark(val, tmp_path, monkeypatch, capsys):
    """One line with the command that makes it; after that they train. A picture that cannot be made is no
    reason to refuse for ever."""
    photos, out = tmp_path / "my photos", tmp_path / "run"
    shutil.copytree(val, photos, ignore=shutil.ignore_patterns(".*"))
    (photos / "torn.png").write_bytes(b"\x89PNG")
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = [str(a) for a in ("train", "--out", out, "--data", photos, "--codecs", "jpeg:5", "webp")]
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: moe_diffir.main(args))
    said, = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and not out.exists() and not (photos / ".cir-bench").exists()
    command = shlex.split(said.split("train: ", 1)[1])
    assert command[:3] == ["python", "-m", "data.make_cir"]
    with pytest.raises(UserError, match="1 pictures could not be made"):
        make_cir.main(command[3:])
    caches = make_cir.caches_of([photos], None)
    tasks = make_cir.training_tasks(["jpeg:5", "webp"], caches)
    make_cir.refuse_to_wait(caches, tasks)
    make_cir.main([*map(str, ("--pairs", val, val, "--task", "hific:low", "--out", photos / ".cir-bench"))])
    make_cir.refuse_to_wait(caches, tasks)  # what failed is still known
    shutil.rmtree(photos / ".cir-bench" / "hific")
    made = {str(p.parent.relative_to(photos / ".cir-bench")) for p in (photos / ".cir-bench").rglob("*.png")}
    assert made == {"original", "jpeg/5", "webp/5", "webp/10", "webp/15"}
    (photos / ".cir-bench" / "webp" / "10" / "flower.png").unlink()
    with pytest.raises(UserError, match="make the benchmark"):
        make_cir.refuse_to_wait(caches, tasks)
    monkeypatch.delenv("WORLD_SIZE")
    make_cir.refuse_to_wait(caches, tasks)


def test_eval_of_pairs_unseen_levels_and_fid(run, val, tmp_path, monkeypatch, capsys):
    """FID and the metrics without reference by a stand-in for pyiqa: which pictures go where."""
    folders = []

    def fid(a, b):
        folders.append((a, len(list(common.list_images([a])))))
        return 3.0

    def create_metric(name, device):
        return fid if name == "fid" else lambda x: torch.tensor(0.5)
    monkeypatch.setitem(sys.modules, "pyiqa", types.SimpleNamespace(create_metric=create_metric))
    args, codecs = ["eval", "--weights", str(run[0]), "--steps", "1"], ["vvc:52", "jpeg:25", "jpeg:5"]
    moe_diffir.main([*args, "--data", str(val), "--codecs", *codecs, "--metrics", "all"])
    said, metrics = capsys.readouterr().out, run[0] / "metrics.json"
    found = json.loads(metrics.read_text())
    assert found["codecs"]["jpeg"]["restored, 1 step"]["FID"] == 3
    assert re.search(r"Table 1.*\n .*SSIM.*CLIPIQA.* FID\n", said)
    levels = [found["results"][task]["restored, 1 step"]["PSNR"] for task in ("jpeg:25", "jpeg:5")]
    assert found["codecs"]["jpeg"]["restored, 1 step"]["PSNR"] == pytest.approx(np.mean(levels))
    assert [n for path, n in folders if path.endswith("jpeg/restored, 1 step")] == [4]

    lq = tmp_path / "lq"
    lq.mkdir()
    for file in val.glob("*.png"):
        compress(Image.open(file), "jpeg", "5")[0].save(lq / file.name)
    hq = tmp_path / "hq"  # other originals than --data's
    shutil.copytree(val, hq, ignore=shutil.ignore_patterns("flower*", ".*"))
    hific = ["--pairs", str(lq), str(val), "--task", "hific:low"]
    hific += ["--pairs", str(hq), str(hq), "--task", "hific:high"]
    moe_diffir.main([*args, *hific, "--codecs", "jpeg:5", "--data", str(val)])
    table = json.loads(metrics.read_text())
    assert list(table["results"]) == ["jpeg:5", "hific:low", "hific:high"]
    of_jpeg, low, high = table["results"].values()
    assert low == of_jpeg == {row: {k: v for k, v in values.items() if k not in ("CLIPIQA", "MANIQA")}
                              for row, values in found["results"]["jpeg:5"].items()}
    assert high["compressed"]["SSIM"] == pytest.approx(1)
    mean = table["codecs"]["hific"]["restored, 1 step"]
    assert mean["SSIM"] == pytest.approx(np.mean([task["restored, 1 step"]["SSIM"] for task in (low, high)]))
    said = capsys.readouterr().out
    assert "hific:low, 2 images" in said and "hific:high, 1 images" in said
    row, = re.findall(r"^hific, restored, 1 step  .*", said.split("Table 1")[1], re.M)
    assert f"{mean['PSNR']:.2f}" in row and f"{mean['SSIM']:.4f}" in row
    moe_diffir.main([*args, *hific])
    assert list(json.loads(metrics.read_text())["results"]) == ["hific:low", "hific:high"]


def test_figures_rows_sum_to_one(run, val, capsys):
    moe_diffir.main(["figures", "--weights", str(run[0]), "--data", str(val),
                     "--codecs", "jpeg:5", "jpeg:15", "vvc:47"])
    table = json.loads((run[0] / "samples" / "router.json").read_text())
    share = torch.tensor(table["share"])
    assert share.shape == (3, 3, 7) and torch.allclose(share.sum(2), torch.ones(3, 3), atol=1e-5)
    apart = torch.tensor(table["total_variation"]["scales"])
    expected = (share[:, :2].mean(1) - share[:, 2]).abs().sum(1) / 2
    assert torch.allclose(apart[:, 0, 1], expected, atol=1e-5)
    assert "what the chosen prompt set tells" in capsys.readouterr().out
    picture = Image.open(run[0] / "samples" / "router.png")
    assert picture.width > 900 and len(picture.convert("RGB").getcolors(1 << 20)) > 50
    for kind in ("png", "json"):
        (run[0] / "samples" / f"router.{kind}").unlink()


def test_profile_counts_by_part_for_one_step_and_fifty(capsys):
    moe_diffir.main(["profile", "--paper", "--size", "256", "--no-time"])
    said = capsys.readouterr().out
    rows = {cells[0]: cells for cells in (re.split(r"  +", line) for line in said.splitlines())}
    parameters = {name: cells[1] for name, cells in rows.items() if len(cells) > 2}
    assert parameters["a step: UNet"] == "865.91 M" and parameters["once: VAE decoder"] == "49.49 M"
    assert parameters["once: degradation prior (CLIP)"] == "87.46 M"
    one, fifty = (float(re.search(rf"^{n} steps?: ([\d.]+) T MACs", said, re.M)[1]) for n in (1, 50))
    a_step = sum(float(cells[3].split()[0]) for name, cells in rows.items() if name.startswith("a step"))
    assert fifty - one == pytest.approx(49 * a_step, rel=1e-3)
    assert one == pytest.approx(float(rows["total"][3].split()[0]), rel=1e-3)


# ---- bad input


@pytest.mark.parametrize("command, says", [
    ("train --out {new} --stage 2", "stage 1 first"),
    ("train --out {new} --s1-crop 100", "--s1-crop 100"),
    ("train --out {new} --top-k 8", "--top-k 8: must be from 1 to 7"),
    ("train --out {new} --top-k 0", "--top-k 0"),
    ("train --out {new} --experts 0", "--top-k 3: must be from 1 to 0"),
    ("train --out {new} --prompt two", "--prompt two: choose from none"),
    ("train --out {new} --s2-sampling 0", "--s2-sampling 0"),
    ("train --out {new} --s2-sampling 2", "--s2-sampling 2: must be from 1 to 1 (--start lq"),
    ("train --out {new} --start noise --s2-sampling 51", "--s2-sampling 51: must be from 1 to 50"),
    ("train --out {new} --start there", "--start there: choose from lq, noise"),
    ("train --out {new} --s2-levels 0", "--s2-levels 0"),
    ("train --out {new} --cache-latents -1", "--cache-latents -1"),
    ("train --out {new} --codecs bpg", "--codecs bpg: choose from"),
    ("train --out {new} --dp {empty}", "--dp {empty}: no CLIP"),
    ("train --out {new} --clip {empty}", "--clip {empty}: no CLIP"),
    ("train --out {new} --paper", "--paper needs --data"),
    ("train --out {new} --s1-width 30", "--s1-width 30"),
    ("train --out {new} --s1-t-max 1000", "--s1-t-max 1000"),
    ("make_cir --out {new}", "give --data"),
    ("make_cir --data {empty} --out {new}", "no images"),
    ("make_cir --data {val} --out {new} --codecs vvc:64", "--codecs vvc:64: the level must be from 0 to 63"),
    ("make_cir --data {val} --out {new} --codecs hific", "--pairs"),
    ("make_cir --out {new} --pairs {val} {val}", "--pairs and --task"),
    ("make_cir --out {new} --pairs {val} {val} --task ../x:low", "--task ../x:low"),
    ("make_cir --out {new} --pairs {val} {empty} --task hific:low", "no images"),
    ("restore {photo} --weights {run} --tile 100", "--tile 100"),
    ("restore {photo} --weights {run} --steps 0", "--steps 0"),
    ("restore {photo} --weights {run} --steps 2000", "--steps 2000"),
    ("restore {photo} --weights {run} --fidelity 1.5", "--fidelity 1.5"),
    ("restore {photo} --weights {empty}", "stage2.safetensors: no such file"),
    ("restore nowhere.jpg --weights {run}", "nowhere.jpg"),
    ("eval --weights {run} --task hific:low", "--pairs and --task"),
    ("eval --weights {run} --task a:b --task a:b --pairs {val} {val} --pairs {val} {val}", "with its own"),
    ("eval --weights {run} --steps 1 2", "--steps 2: must be from 1 to 1")])
def test_bad_input_is_one_line(run, val, tmp_path, monkeypatch, capsys, command, says):
    (tmp_path / "empty").mkdir()
    names = {"empty": tmp_path / "empty", "new": tmp_path / "new", "photo": PHOTOS / "val" / "chelsea.png",
             "val": val, "run": run[0]}
    name, *args = [word.format(**names) for word in command.split()]
    if name == "train" and "--paper" not in args:
        args += ["--data", str(val)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: make_cir.main(args) if name == "make_cir" else moe_diffir.main([name, *args]))
    said = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and says.format(**names) in said[-1]


def test_damaged_and_foreign_models_are_refused(run, tmp_path):
    def half(content):
        return content[:len(content) // 2]

    def of_codiff(content):
        return content.replace(b"moe_diffir", b"codiff    ", 1)
    stage2 = (run[0] / "model" / "stage2.safetensors").read_bytes()
    cases = [("stage1", half, "stage1.safetensors: not a readable"),
             ("stage2", half, "stage2.safetensors: not a readable"),
             ("stage2", of_codiff, "not made by moe_diffir.py"),
             ("stage1", lambda _: stage2, "not made by moe_diffir.py.s stage 1")]
    for i, (name, damage, says) in enumerate(cases):
        out = tmp_path / str(i)
        shutil.copytree(run[0], out)
        file = out / "model" / f"{name}.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(UserError, match=says):
            moe_diffir.load(out)
