"""codiff.py, equation by equation: shapes, formulas, what each loss moves; then what is measured."""

import functools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import codiff
import common
from codiff import CODiff, CaVE, JPEGPairs, Stage1, Stage2
from common import PHOTOS, TINY_SD, Discriminator, frozen, jpeg, text_tokens
from conftest import (CAT, alpha_bars, are_binary_cross_entropy, before_stage_2, moved_by, rows_of, said_by,
                      tops, train_args)
from data.files import load_tensors
from data.results import complexity
from data.tiles import starts, tiling

WIDTHS = Stage1.widths, Stage1.blocks


@pytest.fixture(scope="module")
def run(trained):
    return trained("codiff")


# ---- data


def test_the_original_is_the_same_crop_off_the_grid_too():
    pairs = JPEGPairs([PHOTOS / "train"], Stage1(crop=64, qf_min=100, qf_max=100, off_grid=1.0), 32, 0)
    assert all((x_lq - x_hq).abs().mean() < 0.02 for _, x_lq, x_hq, _ in map(pairs.__getitem__, range(12)))


def test_pairs_are_jpegs_at_the_stated_quality_half_of_them_off_the_grid():
    cfg = Stage1(crop=64, qf_min=8, qf_max=95)
    pairs, aligned, qfs = JPEGPairs([PHOTOS / "train"], cfg, 32, 0), 0, []
    for n in range(60):
        m, x_lq, x_hq, q = pairs[n]
        assert m == n and x_lq.shape == x_hq.shape == (3, 64, 64) and x_lq.abs().max() <= 1
        qfs.append(100 - 100 * q)
        if qfs[-1] > 30:  # JPEG again at its own quality and grid barely changes it; off the grid it does
            continue
        edge = (x_lq[:, :, 1:] - x_lq[:, :, :-1]).abs().mean((0, 1))
        on = [edge[k - 1::8].mean() for k in range(1, 9)]
        aligned += int(np.argmax(on) == 7) - int(max(on) < 1.05 * np.median(on))
    assert min(qfs) >= 8 and max(qfs) <= 95 and 35 < np.mean(qfs) < 68
    low = [n for n in range(60) if qfs[n] <= 30]
    assert 0.2 * len(low) <= aligned <= 0.9 * len(low)


# ---- CaVE and stage 1, Eqs. 3 to 6


def test_cave_has_the_released_size_and_one_token_per_32_pixels():
    with torch.device("meta"):
        cave = CaVE(Stage1.paper().widths, Stage1.paper().blocks)
        embedding = [cave.m_head, cave.m_down1, cave.m_down2, cave.m_down3, cave.m_body_encoder]
        assert sum(p.numel() for p in cave.parameters()) / 1e6 == pytest.approx(74.9, abs=0.05)
        assert sum(map(complexity.count, embedding)) / 1e6 == pytest.approx(27.74, abs=0.005)
        assert len(cave.state_dict()) == 346
        x = torch.zeros(2, 3, 256, 256)
        assert cave.embed(x).shape == (2, 64, 512)  # not the 1,024 of h / 8
        q_hat, x_rec = cave(x)
    assert q_hat.shape == (2,) and x_rec.shape == x.shape


def test_caves_decoder_takes_the_encoders_maps():
    cave, x = CaVE((8, 8, 16, 16), 1).initialise(1.0, 0.0).eval(), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        f, (h0, h1, h2, h3) = cave.encode(x)
        h = cave.m_up2(cave.m_up3(cave.m_body_decoder(f) + h3) + h2) + h1
        assert torch.allclose(cave(x)[1], cave.m_tail(cave.m_up1(h) + h0), atol=1e-5)


def test_tokens_are_row_major():
    cave = CaVE(*WIDTHS).initialise(1.0, 0.0).eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        grid, tokens = cave.encode(x)[0], cave.embed(x)
    assert tokens.shape == (1, 6, 128) and torch.equal(tokens[0, 1 * 3 + 2], grid[0, :, 1, 2])


def test_stage1_losses_equal_their_formulas():
    q_hat, q = np.random.rand(2, 7).astype(np.float32)
    mean = np.abs(q_hat - q).mean()
    assert codiff.loss_qf(*map(torch.tensor, (q_hat, q))) == pytest.approx(mean, rel=1e-5)
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    assert codiff.loss_rec(x, y) == pytest.approx(np.abs(x.numpy() - y.numpy()).mean(), rel=1e-5)


def test_each_stage1_loss_moves_its_own_branch_and_the_encoder():
    cave = CaVE(*WIDTHS).initialise(1.0, 0.0)
    q_hat, x_rec = cave(torch.rand(2, 3, 64, 64))
    encoder = {"m_head", "m_down1", "m_down2", "m_down3", "m_body_encoder"}
    assert tops(moved_by(codiff.loss_qf(q_hat, torch.zeros(2)), cave)) == encoder | {"qf_pred"}
    back = {"m_body_decoder", "m_up3", "m_up2", "m_up1", "m_tail"}
    assert tops(moved_by(codiff.loss_rec(x_rec, torch.zeros_like(x_rec)), cave)) == encoder | back


@pytest.mark.parametrize("learning, still", [("explicit", "m_up1.0.weight"), ("implicit", "qf_pred.7.weight"),
                                             ("dual", None)])
def test_learning_moves_only_its_own_branch(tmp_path, photos, learning, still):
    """Table 4."""
    more = ["--stage", 1, "--learning", learning, "--s1-steps", 2]
    codiff.main(train_args("codiff", tmp_path / "run", photos, *more))
    after = load_tensors(tmp_path / "run" / "model" / "stage1.safetensors")[0]
    torch.manual_seed(0)
    cfg = Stage1()
    before = CaVE(cfg.widths, cfg.blocks).initialise(cfg.gain, cfg.highpass).state_dict()
    for name in ("m_up1.0.weight", "qf_pred.7.weight", "m_head.weight"):
        assert torch.equal(before[name], after[name]) == (name == still), name


# ---- stage 2, Eqs. 1, 2 and 7 to 10


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return CODiff(TINY_SD, Stage2(T_L=199), CaVE(*WIDTHS).initialise(1.0, 0.0)).add_lora(4).train()


def test_generator_is_equations_1_and_2(generator):
    x, sd, a = torch.rand(1, 3, 64, 96) * 2 - 1, generator.sd, float(alpha_bars()[199])
    scale = sd.vae.config.scaling_factor
    with torch.no_grad():
        x_hat, z_hat = generator(x)
        c = generator.proj(generator.cave.embed(x / 2 + 0.5))
        z = sd.vae.encode(x).latent_dist.mode() * scale
        eps = sd.unet(z, torch.tensor([199]), c).sample
        expected = (z - (1 - a)**0.5 * eps) / a**0.5
        assert torch.allclose(z_hat, expected, atol=1e-4)
        assert torch.allclose(x_hat, sd.vae.decode(expected / scale).sample.clamp(-1, 1), atol=1e-4)


def test_gan_losses_are_binary_cross_entropy():
    are_binary_cross_entropy(codiff.loss_G, codiff.loss_D)


def test_each_stage2_loss_moves_the_generators_lora_and_projection_and_nothing_else(generator):
    D, dists = Discriminator(TINY_SD, 4), common.dists("tiny-vgg")
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    x_hat, z_hat = generator(x)
    with frozen(D):
        losses = {"l2": codiff.loss_2(x_hat, x), "dists": dists(x_hat, x).mean(),
                  "gan_g": codiff.loss_G(D(z_hat, 199))}
    names = [n for n, p in generator.named_parameters() if p.requires_grad]
    assert all("lora_" in n or n.startswith("proj.") for n in names)
    assert not any("decoder" in n for n in names)
    for name, loss in losses.items():
        moved = {n.split(".")[1] if "lora_B" in n else n.split(".")[0] for n in moved_by(loss, generator)}
        assert moved == {"unet", "vae", "proj"}, name
    codiff.loss_D(*D(torch.cat([z_hat.detach(), z_hat.detach() + 1]), 199).chunk(2)).backward()
    assert all(p.grad is None for p in generator.parameters())
    assert tops(n for n, p in D.named_parameters() if p.grad is not None) == {"unet", "prompt", "head"}


def test_training_mode_leaves_caves_statistics_alone(generator):
    before = {k: v.clone() for k, v in generator.cave.state_dict().items()}
    generator.train()(torch.rand(1, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in generator.cave.state_dict().items())


@pytest.mark.parametrize("losses", ["l2,dists,gan", "dists", "l2,gan"])
def test_the_total_is_eq_10_of_the_losses_asked_for(run, tmp_path, photos, losses, no_evaluation):
    """Table 5."""
    row = rows_of(run.folder)[-1]
    if losses != "l2,dists,gan":
        out = before_stage_2(run, tmp_path / "run")
        codiff.main(train_args("codiff", out, photos, "--stage", 2, "--losses", losses, "--s2-steps", 1))
        row = rows_of(out)[-1]
    weights = {"l2": 1, "dists": Stage2().lambda_P, "gan": Stage2().lambda_G}
    total = sum(weights[k] * row["gan_g" if k == "gan" else k] for k in losses.split(","))
    assert row["loss"] == pytest.approx(total, rel=1e-4) and ("gan_d" in row) == ("gan" in losses)


@pytest.mark.parametrize("prompt", ["learnable", "empty"])
def test_other_prompts_need_no_cave(tmp_path, photos, prompt, no_evaluation):
    """Table 3."""
    more = ["--prompt", prompt, "--losses", "l2", "--s2-steps", 2]
    codiff.main(train_args("codiff", tmp_path / "run", photos, *more))
    assert not (tmp_path / "run" / "model" / "stage1.safetensors").exists()
    model, empty = codiff.load(tmp_path / "run"), text_tokens(TINY_SD, [""])[0]
    assert model.cave is None and model.tokens.shape == empty.shape
    assert torch.equal(model.tokens.cpu(), empty) == (prompt == "empty")
    assert not hasattr(model, "proj")


# ---- one-step inference


def test_adain_takes_the_references_statistics():
    x, y = torch.randn(2, 3, 20, 20) * 3 + 1, torch.randn(2, 3, 9, 9)
    out = codiff.adain(x, y)
    assert torch.allclose(out.mean((2, 3)), y.mean((2, 3)), atol=1e-5)
    assert torch.allclose(out.std((2, 3), correction=0), y.std((2, 3), correction=0), atol=1e-4)


def test_a_restored_picture_has_its_inputs_colours(run):
    lq = jpeg(CAT.crop((0, 0, 100, 90)), 10)
    restored = np.array(codiff.restore(run.model, lq))
    assert np.abs(restored.mean((0, 1)) - np.array(lq).mean((0, 1))).max() < 1


def test_restore_heeds_color_fix(run):
    lq = jpeg(CAT.crop((0, 0, 70, 60)), 10)
    args = SimpleNamespace(weights=run.folder, base=None, tile=None, color_fix="none")
    own = np.asarray(codiff.restorer(args, run.model)(lq)[0])
    assert np.array_equal(own, codiff.restore(run.model, lq, "none"))
    assert not np.array_equal(own, codiff.restore(run.model, lq))


def test_tiles_leave_no_seams(run):
    """384x384, where both ways run: the difference is small, and no larger along the tiles' borders."""
    model, seen = run.model, []
    lq = jpeg(CAT.resize((384, 384), Image.Resampling.LANCZOS), 5)
    hooks = [m.register_forward_pre_hook(lambda m, a: seen.append(tuple(a[0].shape[2:])))
             for m in (model.sd.unet, model.sd.vae.encoder, model.sd.vae.decoder)]
    tiled = np.asarray(codiff.restore(model, lq, "adain", tiling(model, 256)(lq.size))).astype(float)
    assert {*seen} == {(256, 256), (32, 32)} and len(seen) == 3 * (4 + 1)  # nothing saw more than a tile
    [h.remove() for h in hooks]
    difference = np.abs(tiled - np.asarray(codiff.restore(model, lq))).mean(2)
    borders = {edge for s in starts(12, 8, 1) for edge in (32 * s, 32 * s + 256) if 0 < edge < 384}
    near = np.zeros(384, bool)
    for edge in borders:
        near[edge - 8:edge + 8] = True
    near = near[:, None] | near
    assert difference.mean() < 2 and difference[near].mean() < 1.2 * difference[~near].mean()


# ---- eval, profile and figures


def test_eval_sets_the_restored_beside_the_input_and_the_ceiling(run):
    assert all(said in run.printed for said in ("VAE(original)", "JPEG QF 20", "peak memory"))
    results = json.loads((run.folder / "metrics.json").read_text())["results"]
    for rows in results.values():  # 8 bit; a JPEG at QF 5 is worse than at QF 20
        assert rows["VAE(original)"]["PSNR"] > rows["VAE(compressed)"]["PSNR"]
    assert results["JPEG QF 20"]["compressed"]["PSNR"] > results["JPEG QF 5"]["compressed"]["PSNR"] + 2
    assert Image.open(run.folder / "samples" / "eval.png").width > 4 * 133


def test_other_runs_get_rows_of_their_own(run, photos, tmp_path):
    shutil.copytree(run.folder, tmp_path / "twin")
    args = ["--weights", tmp_path / "twin", "--against", run.folder, "--data", photos / "cat.png", "--qf", 5]
    assert "by run" in said_by(codiff.main, ["eval", *map(str, args)], tmp_path)
    rows = json.loads((tmp_path / "twin" / "metrics.json").read_text())["results"]["JPEG QF 5"]
    assert rows["by run"] == rows["restored"] != rows["compressed"]


def test_eval_takes_jpegs_of_jpegs(run, photos, tmp_path):
    shutil.copytree(run.folder / "model", tmp_path / "model")
    args = ["--data", photos / "cat.png", "--double", 30, "--qf", 10, "--shift", 4, "--weights", tmp_path]
    said_by(codiff.main, ["eval", *map(str, args)], tmp_path)
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    photo = np.asarray(Image.open(photos / "cat.png"))
    twice = jpeg(Image.fromarray(np.asarray(jpeg(Image.fromarray(photo), 30))[4:, 4:]), 10)
    error = np.square(np.subtract(twice, photo[4:, 4:], dtype=float)).mean()
    assert [*results] == ["JPEG QF 30 then 10 off by 4"]
    found = results["JPEG QF 30 then 10 off by 4"]["compressed"]["PSNR"]
    assert found == pytest.approx(10 * np.log10(255**2 / error), abs=1e-3)


def test_profile_reproduces_table_2(capsys):
    codiff.main(["profile", "--paper", "--size", "1024", "--no-time"])
    said = capsys.readouterr().out
    assert "995.5 M parameters" in said and "9.46 T MACs" in said and "10.86 T" in said
    total = next(line for line in said.splitlines() if line.startswith("total")).split()
    assert total[1:] == ["977.83", "M", "17.70", "M", "9.456", "T", "10.86", "T"]


def test_profile_times_the_tiny_model(capsys, monkeypatch):
    monkeypatch.setattr(complexity, "seconds", functools.partial(complexity.seconds, budget=0.1))
    codiff.main(["profile", "--size", "100"])  # padded to 128
    said = capsys.readouterr().out
    assert "128 x 128" in said and "TFLOP/s" in said and "peak memory" in said
    lines = [line.split() for line in said.split("TFLOP/s")[1].splitlines() if line]
    ms = [float(line[-2]) for line in lines if line[-1].replace(".", "").isdigit()]
    assert len(ms) == 6 and ms[-1] == pytest.approx(sum(ms[:-1]), abs=0.5) and ms[2] > 0


def test_figures(run, photos, tmp_path):
    explicit, dual = tmp_path / "explicit", tmp_path / "dual"
    more = ["--stage", 1, "--learning", "explicit", "--s1-steps", 2]
    codiff.main(train_args("codiff", explicit, photos, *more))
    shutil.copytree(run.folder / "model", dual / "model")
    args = ["figures", "--weights", dual, "--against", explicit, "--data", PHOTOS / "val" / "chelsea.png"]
    said = said_by(codiff.main, [*map(str, args)], tmp_path)
    for name, width in (("fig4.png", 900), ("fig7.png", 400)):
        picture = Image.open(dual / "samples" / name)
        assert picture.width > width and len(picture.convert("RGB").getcolors(1 << 20)) > 50
    rows = {line.split()[0]: [float(v) for v in line.split()[1:]] for line in said.splitlines()
            if line.startswith(("dual", "explicit"))}
    predicted = codiff.load_cave(run.folder).eval().qf(jpeg(CAT, 3))
    assert rows["dual"][2] == pytest.approx((predicted - 3) ** 2, rel=1e-3) and len(rows["explicit"]) == 6
