"""codiff.py: each equation, which parameters each loss moves, and the command line end to end."""

import functools
import json
import resource
import shutil
import signal
import struct
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import codiff
from codiff import CODiff, CaVE, JPEGPairs, Stage1, Stage2
from common import (ROOT, TINY_SD, Discriminator, UserError, dists_small, frozen, load_tensors, read_image, rng,
                    run_cli, save_tensors, text_tokens)
from conftest import as_here, child_processes, said_by, same_run
from data import convert, files
from data.pictures import starts
from data.results import complexity

PHOTOS = ROOT / "data" / "photos"
WIDTHS = Stage1.widths, Stage1.blocks


# ---- stage 1


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


def test_tokens_are_row_major():
    cave = CaVE(*WIDTHS).initialise(1.0, 0.0).eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        grid, tokens = cave.encode(x)[0], cave.embed(x)
    assert tokens.shape == (1, 6, 128) and torch.equal(tokens[0, 1 * 3 + 2], grid[0, :, 1, 2])


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


def test_stage1_losses_equal_their_formulas():
    q_hat, q = torch.rand(7), torch.rand(7)
    assert codiff.loss_qf(q_hat, q) == pytest.approx(sum(abs(a - b) for a, b in zip(q_hat.tolist(), q.tolist())) / 7, rel=1e-5)
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    assert codiff.loss_rec(x, y) == pytest.approx(np.abs(x.numpy() - y.numpy()).mean(), rel=1e-5)


def test_each_stage1_loss_moves_its_own_branch_and_the_encoder():
    cave = CaVE(*WIDTHS).initialise(1.0, 0.0)
    q_hat, x_rec = cave(torch.rand(2, 3, 64, 64))

    def moved(loss):
        grads = torch.autograd.grad(loss, list(cave.parameters()), retain_graph=True, allow_unused=True)
        return {n.split(".")[0] for (n, _), g in zip(cave.named_parameters(), grads) if g is not None and g.abs().sum() > 0}
    encoder = {"m_head", "m_down1", "m_down2", "m_down3", "m_body_encoder"}
    assert moved(codiff.loss_qf(q_hat, torch.zeros(2))) == encoder | {"qf_pred"}
    assert moved(codiff.loss_rec(x_rec, torch.zeros_like(x_rec))) == encoder | {"m_body_decoder", "m_up3", "m_up2", "m_up1", "m_tail"}


# ---- stage 2


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return CODiff(TINY_SD, Stage2(T_L=199), CaVE(*WIDTHS).initialise(1.0, 0.0)).add_lora(4).train()


def test_generator_is_equations_1_and_2(generator):
    x = torch.rand(1, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        x_hat, z_hat = generator(x)
        sd = generator.sd
        c = generator.proj(generator.cave.embed(x / 2 + 0.5))
        z = sd.vae.encode(x).latent_dist.mode() * sd.vae.config.scaling_factor
        eps = sd.unet(z, torch.tensor([199]), c).sample
        a = float(torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000)**2, 0)[199])
        expected = (z - (1 - a)**0.5 * eps) / a**0.5
        assert torch.allclose(z_hat, expected, atol=1e-4)
        assert torch.allclose(x_hat, sd.vae.decode(expected / sd.vae.config.scaling_factor).sample.clamp(-1, 1), atol=1e-4)


def test_gan_losses_are_binary_cross_entropy():
    fake, real = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    bce = F.binary_cross_entropy_with_logits
    assert torch.allclose(codiff.loss_G(fake), bce(fake, torch.ones_like(fake)))
    assert torch.allclose(codiff.loss_D(fake, real), bce(fake, torch.zeros_like(fake)) + bce(real, torch.ones_like(real)))


def test_each_stage2_loss_moves_the_generators_lora_and_projection_and_nothing_else(generator):
    D, dists = Discriminator(TINY_SD, 4), dists_small()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    x_hat, z_hat = generator(x)
    with frozen(D):
        losses = {"l2": codiff.loss_2(x_hat, x), "dists": dists(x_hat, x).mean(), "gan_g": codiff.loss_G(D(z_hat, 199))}
    names = [n for n, p in generator.named_parameters() if p.requires_grad]
    assert all("lora_" in n or n.startswith("proj.") for n in names)
    for name, loss in losses.items():
        learning = [p for p in generator.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, learning, retain_graph=True, allow_unused=True)
        moved = {n.split(".")[1] if "lora_B" in n else n.split(".")[0] for n, g in zip(names, grads) if g is not None and g.abs().sum() > 0}
        assert moved == {"unet", "vae", "proj"}, name
    decoder = [n for n, p in generator.named_parameters() if "decoder" in n and p.requires_grad]
    assert not decoder
    codiff.loss_D(*D(torch.cat([z_hat.detach(), z_hat.detach() + 1]), 199).chunk(2)).backward()
    assert all(p.grad is None for p in generator.parameters())
    assert {n.split(".")[0] for n, p in D.named_parameters() if p.grad is not None} == {"unet", "prompt", "head"}


def test_training_mode_leaves_caves_statistics_alone(generator):
    before = {k: v.clone() for k, v in generator.cave.state_dict().items()}
    generator.train()(torch.rand(1, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in generator.cave.state_dict().items())


# ---- the command line


SHORT = ["--s1-crop", 64, "--s1-batch", 2, "--s2-crop", 64, "--s2-batch", 2]


def make_val(folder):
    Image.open(PHOTOS / "val" / "chelsea.png").crop((100, 40, 260, 170)).save(folder / "cat.png")
    return folder


@pytest.fixture(scope="session")
def val(tmp_path_factory):
    return make_val(tmp_path_factory.mktemp("val"))


@pytest.fixture(scope="session")
def run(tmp_path_factory, val):
    """The default command line, at reduced steps and crops and on one small photograph, from a folder that is not the repo's."""
    out = tmp_path_factory.mktemp("runs") / "codiff"
    return out, said_by(codiff.main, train_args(out, val), tmp_path_factory.mktemp("elsewhere"))


def test_train_end_to_end(run):
    out, printed = run
    for said in ("stage 1 on", "stage 2 on", "|grad qf|", "|grad gan_g|", "VAE(original)", "JPEG QF 20", "trainable"):
        assert said in printed
    norms = next(line for line in printed.splitlines() if "|grad gan_g|" in line).split()
    assert float(norms[-1]) > 0  # the released code's is exactly 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [(1, s) for s in range(10)] + [(2, s) for s in range(10)]
    assert {"l2", "dists", "gan_g", "gan_d"} <= rows[-1].keys()
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert files == {"config.json", "log.jsonl", "metrics.json", "samples/eval.png", "last/stage1.safetensors",
                     "last/stage2.safetensors", "model/stage1.safetensors", "model/stage2.safetensors"}
    results = json.loads((out / "metrics.json").read_text())["results"]
    for rows in results.values():  # 8 bit; a JPEG at QF 5 is worse than at QF 20
        assert rows["VAE(original)"]["PSNR"] > rows["VAE(compressed)"]["PSNR"]
    assert results["JPEG QF 20"]["compressed"]["PSNR"] > results["JPEG QF 5"]["compressed"]["PSNR"] + 2
    assert Image.open(out / "samples" / "eval.png").width > 4 * 160


def test_other_runs_get_rows_of_their_own(run, val, tmp_path):
    copy = tmp_path / "twin"
    shutil.copytree(run[0], copy)
    args = ["eval", "--weights", str(copy), "--against", str(run[0]), "--data", str(val), "--qf", "5"]
    assert "by codiff" in said_by(codiff.main, args, tmp_path)
    rows = json.loads((copy / "metrics.json").read_text())["results"]["JPEG QF 5"]
    assert rows["by codiff"] == rows["restored"] != rows["compressed"]


def test_while_d_learns_alone_g_stays(tmp_path, no_evaluation):
    args = ["--stage", "2", "--prompt", "empty", "--s2-lead", "1", "--s2-steps", "2", "--s2-crop", "64", "--s2-batch", "1"]
    codiff.main(["train", *args, "--out", str(tmp_path)])
    codiff.main(["train", *args, "--out", str(tmp_path), "--resume"])  # from a state in which G's Adam has none
    kept, _ = load_tensors(tmp_path / "last" / "stage2.safetensors")
    for name, moves in (("G", False), ("D", True)):
        assert moves == any(t.any() for k, t in kept["modules"][name].items() if "lora_B" in k)


def test_restore_a_folder_of_any_sizes(run, tmp_path, capsys):
    out, _ = run
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    photo = Image.open(PHOTOS / "val" / "chelsea.png")
    photo.crop((0, 0, 121, 135)).save(source / "a.jpg", quality=10)
    photo.crop((0, 0, 7, 5)).save(source / "deep" / "b.webp")
    photo.crop((0, 0, 1, 1)).save(source / "one.png")
    with_alpha = photo.crop((0, 0, 40, 33)).convert("RGBA")
    with_alpha.putalpha(77)
    with_alpha.save(source / "c.png")
    photo.crop((0, 0, 50, 30)).convert("CMYK").save(source / "cmyk.tif")
    photo.crop((0, 0, 50, 30)).convert("L").save(source / "grey.png")
    photo.crop((0, 0, 50, 30)).convert("P").save(source / "palette.gif")
    Image.fromarray(np.arange(50 * 30, dtype=np.uint16).reshape(30, 50) * 40).save(source / "16bit.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.crop((0, 0, 50, 30)).save(source / "turned.jpg", exif=turned)
    Image.new("RGB", (5000, 3), "teal").save(source / "wide.bmp")
    (source / "broken.jpg").write_bytes((source / "a.jpg").read_bytes()[:200])
    before = {p: p.read_bytes() for p in source.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="1 of 11"):
        codiff.main(["restore", str(source), "-o", str(tmp_path / "out"), "--weights", str(out)])
    assert "broken.jpg" in capsys.readouterr().err
    sizes = {str(p.relative_to(tmp_path / "out")): Image.open(p).size for p in (tmp_path / "out").rglob("*.png")}
    assert sizes == {"a.png": (121, 135), "deep/b.png": (7, 5), "one.png": (1, 1), "c.png": (40, 33), "cmyk.png": (50, 30), "grey.png": (50, 30),
                     "palette.png": (50, 30), "16bit.png": (50, 30), "turned.png": (30, 50), "wide.png": (5000, 3)}
    means = {name: np.asarray(Image.open(tmp_path / "out" / name)).mean() for name in ("cmyk.png", "grey.png", "palette.png")}
    assert max(means.values()) - min(means.values()) < 8, means  # the same picture
    assert set(np.array(Image.open(tmp_path / "out" / "c.png").getchannel("A")).ravel()) == {77}
    assert before == {p: p.read_bytes() for p in source.rglob("*") if p.is_file()}


def test_inference_is_deterministic_and_the_colour_fix_matches_statistics(run):
    model = codiff.load(run[0])
    lq = codiff.jpeg(read_image(PHOTOS / "val" / "chelsea.png")[0].crop((0, 0, 100, 90)), 10)
    one, two = (np.array(codiff.restore(model, lq)) for _ in range(2))
    assert np.array_equal(one, two)
    assert np.abs(one.mean((0, 1)) - np.array(lq).mean((0, 1))).max() < 1


def train_args(out, val):
    return [str(a) for a in ("train", "--out", out, "--s1-steps", 10, "--s2-steps", 10, "--s1-save-every", 5, "--s2-save-every", 5,
                             "--val", val, *SHORT)]


@pytest.fixture(scope="session")
def uninterrupted(run):
    return run[0]


def lines(out):
    log = out / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def test_after_ctrl_c_resume_equals_the_uninterrupted_run_bit_for_bit(uninterrupted, tmp_path, val, monkeypatch):
    out, calls, real = tmp_path / "run", [], codiff.loss_G
    shutil.copytree(uninterrupted, out)
    (out / "last" / "stage2.safetensors").unlink()

    def interrupted(logits):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt  # what Ctrl-C becomes
        return real(logits)
    monkeypatch.setattr(codiff, "loss_G", interrupted)
    with pytest.raises(KeyboardInterrupt):
        codiff.main([*train_args(out, val), "--stage", "2"])
    assert load_tensors(out / "last" / "stage2.safetensors")[1] == {"step": 5} and lines(out) == 10 + 7
    for torn in (".log.7.tmp.jsonl", "last/.stage1.7.tmp.safetensors", "last/.tmpABCDEF"):  # as a kill leaves them
        (out / torn).write_bytes(b"{")
    with open(out / "log.jsonl", "a") as log:
        log.write('{"stage": 2, "st')
    monkeypatch.setattr(codiff, "loss_G", real)
    codiff.main([*train_args(out, val), "--resume"])
    same_run(out, uninterrupted)


def test_killed_at_twelve_moments_and_resumed_each_time_it_equals_the_uninterrupted_run(uninterrupted, tmp_path, val):
    """SIGKILL once the log has grown by 0 or 1 lines, after a further random delay: in the middle of a step, of a
    checkpoint, of loading. Every session resumes the one before; all losses must be the uninterrupted run's."""
    r, kills, runs = rng(20), 0, [tmp_path / "run0"]
    while kills < 12:
        out = runs[-1]
        resume = ["--resume"] if (out / "config.json").exists() else []
        args = [*train_args(out, val), "--s1-save-every", "1", "--s2-save-every", "1", *resume]
        process = child_processes().Process(target=as_here, args=(codiff.main, args, torch.get_num_threads()))
        process.start()
        goal, deadline = lines(out) + r.integers(2), time.time() + 60
        while process.is_alive() and lines(out) < goal and time.time() < deadline:
            time.sleep(0.01)  # seldom enough to leave the child its processor
        time.sleep(r.uniform(0, 0.3))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:  # it reached its end before the signal: on with another run
            same_run(out, uninterrupted)
            runs.append(tmp_path / f"run{len(runs)}")
        else:
            assert process.exitcode == -signal.SIGKILL
    if kills and runs[-1].exists():
        codiff.main([*train_args(runs[-1], val), "--s1-save-every", "1", "--s2-save-every", "1", "--resume"])
        same_run(runs[-1], uninterrupted)


def test_checkpointing_and_accumulation_leave_the_losses_as_they_are(uninterrupted, tmp_path, val, no_evaluation):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    (out / "last" / "stage2.safetensors").unlink()
    codiff.main([*train_args(out, val), "--stage", "2", "--s2-checkpointing", "--s2-accumulate", "2", "--s2-steps", "4",
                 "--s2-lead", "0.75"])  # 3 steps, as of 10
    one, two = ([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (uninterrupted, out))
    assert len(one) == 20 and len(two) == 14
    for a, b in zip(one, two):
        assert {k: pytest.approx(v, rel=1e-2) for k, v in a.items()} == b


def test_two_processes_give_the_losses_of_one(uninterrupted, two_processes, tmp_path, val):
    """Stage 2. (Stage 1 is exempt: its BatchNorm sees half a batch in each process.)"""
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "last" / "stage2.safetensors").unlink()
    two_processes("codiff", [*train_args(tmp_path / "run", val), "--stage", "2"], evaluate=True)
    one, two = ([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (uninterrupted, tmp_path / "run"))
    assert len(one) == len(two) == 20
    for a, b in zip(one, two):
        assert {k: pytest.approx(v, rel=2e-3) for k, v in a.items()} == b


# ---- the paper's ablations


@pytest.mark.parametrize("learning, still", [("explicit", "m_up1.0.weight"), ("implicit", "qf_pred.7.weight"), ("dual", None)])
def test_learning_moves_only_its_own_branch(tmp_path, learning, still):
    codiff.main(["train", "--stage", "1", "--learning", learning, "--out", str(tmp_path), "--s1-crop", "64", "--s1-batch", "2", "--s1-steps", "2"])
    after = load_tensors(tmp_path / "model" / "stage1.safetensors")[0]
    torch.manual_seed(0)
    cfg = Stage1()
    before = CaVE(cfg.widths, cfg.blocks).initialise(cfg.gain, cfg.highpass).state_dict()
    for name in ("m_up1.0.weight", "qf_pred.7.weight", "m_head.weight"):
        assert torch.equal(before[name], after[name]) == (name == still), name


@pytest.mark.parametrize("prompt", ["learnable", "empty"])
def test_other_prompts_need_no_cave(tmp_path, val, prompt, no_evaluation):
    codiff.main(["train", "--prompt", prompt, "--losses", "l2", "--out", str(tmp_path), "--val", str(val), "--s2-steps", "2", *map(str, SHORT)])
    assert not (tmp_path / "model" / "stage1.safetensors").exists()
    model, empty = codiff.load(tmp_path), text_tokens(TINY_SD, [""])[0]
    assert model.cave is None and model.tokens.shape == empty.shape
    assert torch.equal(model.tokens.cpu(), empty) == (prompt == "empty")
    assert not hasattr(model, "proj")


def test_losses_are_those_asked_for(uninterrupted, tmp_path, val, no_evaluation):
    """Total in the log = weighted sum of the terms that --losses names."""
    for losses, weights in (("dists", (0, Stage2().lambda_P, 0)), ("l2,gan", (1, 0, Stage2().lambda_G))):
        out = tmp_path / losses.replace(",", "_")
        shutil.copytree(uninterrupted, out)
        (out / "last" / "stage2.safetensors").unlink()
        codiff.main([*train_args(out, val), "--stage", "2", "--losses", losses, "--s2-steps", "1"])
        row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        assert row["loss"] == pytest.approx(sum(w * row[k] for w, k in zip(weights, ("l2", "dists", "gan_g"))), rel=1e-4)


def test_empty_prompt_is_the_text_encoders(tmp_path):
    from transformers import CLIPTextModel, CLIPTokenizer
    ids = CLIPTokenizer.from_pretrained(TINY_SD / "tokenizer")("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    expected = CLIPTextModel.from_pretrained(TINY_SD / "text_encoder", dtype=torch.float32).eval()(ids).last_hidden_state
    assert torch.allclose(text_tokens(TINY_SD, ["a cat"]), expected, atol=1e-5)


# ---- profile and figures


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
    ms = [float(line.split()[-2]) for line in said.split("TFLOP/s")[1].splitlines() if line and line.split()[-1].replace(".", "").isdigit()]
    assert len(ms) == 6 and ms[-1] == pytest.approx(sum(ms[:-1]), abs=0.5) and ms[2] > 0


def test_figures(run, tmp_path, capsys):
    codiff.main(["train", "--stage", "1", "--learning", "explicit", "--out", str(tmp_path / "e"), "--s1-crop", "64", "--s1-batch", "2", "--s1-steps", "2"])
    codiff.main(["figures", "--weights", str(run[0]), "--against", str(tmp_path / "e"), "--data", str(PHOTOS / "val" / "chelsea.png")])
    said = capsys.readouterr().out
    for name, width in (("fig4.png", 900), ("fig7.png", 400)):
        picture = Image.open(run[0] / "samples" / name)
        assert picture.width > width and len(picture.convert("RGB").getcolors(1 << 20)) > 50
        (run[0] / "samples" / name).unlink()
    rows = {line.split()[0]: [float(v) for v in line.split()[1:]] for line in said.splitlines() if line.startswith(("dual", "explicit"))}
    cave = codiff.load_cave(run[0]).eval()
    x = codiff.pad_to(codiff.to_tensor(codiff.jpeg(read_image(PHOTOS / "val" / "chelsea.png")[0], 3))[None], 32)
    with torch.no_grad():
        assert rows["dual"][2] == pytest.approx((100 - 100 * cave((x + 1) / 2)[0].item() - 3) ** 2, rel=1e-3)
    assert len(rows["explicit"]) == 6


# ---- half precision


def test_a_run_in_half_precision_restores_the_same(run, tmp_path, monkeypatch, capsys):
    convert.main(["half", str(run[0]), "--out", str(tmp_path / "weights" / "codiff")])
    monkeypatch.setattr(files, "SHIPPED", tmp_path / "weights")
    whole, half = codiff.load(run[0]), codiff.load(tmp_path / "weights" / "codiff")
    assert "the weights that ship" in capsys.readouterr().err
    image = codiff.jpeg(read_image(PHOTOS / "val" / "flower.jpg")[0].crop((0, 0, 96, 96)), 5)
    a, b = (np.asarray(codiff.restore(model, image), float) for model in (whole, half))
    assert np.abs(a - b).mean() < 0.5
    size = sum(p.stat().st_size for p in (tmp_path / "weights" / "codiff").rglob("*.safetensors"))
    assert size < 0.55 * sum(p.stat().st_size for p in (run[0] / "model").rglob("*.safetensors"))


# ---- large images, in tiles


def test_tiles_leave_no_seams(run):
    """384x384, where both ways run: the difference is small, and no larger along the tiles' borders than elsewhere."""
    model = codiff.load(run[0])
    lq = codiff.jpeg(read_image(PHOTOS / "val" / "chelsea.png")[0].resize((384, 384), Image.Resampling.LANCZOS), 5)
    seen = []
    hooks = [m.register_forward_pre_hook(lambda m, a: seen.append(tuple(a[0].shape[2:]))) for m in (model.sd.unet, model.sd.vae.encoder, model.sd.vae.decoder)]
    tiled = np.asarray(codiff.restore(model, lq, "adain", 256)).astype(float)
    assert set(seen) == {(256, 256), (32, 32)} and len(seen) == 3 * (4 + 1)  # nothing ever saw more than a tile
    [h.remove() for h in hooks]
    difference = np.abs(tiled - np.asarray(codiff.restore(model, lq))).mean(2)
    borders = {edge for s in starts(12, 8, 1) for edge in (32 * s, 32 * s + 256) if 0 < edge < 384}
    near = np.zeros(384, bool)
    for edge in borders:
        near[edge - 8:edge + 8] = True
    near = near[:, None] | near
    assert difference.mean() < 2 and difference[near].mean() < 1.2 * difference[~near].mean()


def test_tiles_keep_size_and_alpha(run, tmp_path):
    photo = read_image(PHOTOS / "val" / "chelsea.png")[0]
    photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    photo.crop((0, 0, 301, 187)).save(tmp_path / "a.png")
    Image.new("RGB", (5000, 3), "teal").save(tmp_path / "wide.png")
    codiff.main(["restore", str(tmp_path / "a.png"), str(tmp_path / "wide.png"), "-o", str(tmp_path / "out"), "--tile", "128", "--weights", str(run[0])])
    a, wide = (Image.open(tmp_path / "out" / name) for name in ("a.png", "wide.png"))
    assert a.size == (301, 187) and wide.size == (5000, 3) and "A" not in wide.getbands()
    assert np.array_equal(np.asarray(a.getchannel("A")), np.asarray(Image.open(tmp_path / "a.png").getchannel("A")))


# ---- bad input: one line that names the culprit, exit code 2


def damage(source: Path, target: Path, how) -> Path:
    for file in source.rglob("*"):
        if file.is_file() and "last" not in file.parts:
            (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / file.relative_to(source)).write_bytes(file.read_bytes())
    how(target)
    return target


def cut(name):
    def how(target):
        whole = (target / name).read_bytes()
        (target / name).write_bytes(whole[:len(whole) // 2])
    return how


def edit(**changes):
    def how(target):
        tensors, header = load_tensors(target / "model" / "stage2.safetensors")
        save_tensors(target / "model" / "stage2.safetensors", tensors, **header | changes)
    return how


@pytest.mark.parametrize("how, says", [
    (cut("model/stage1.safetensors"), "stage1.safetensors"), (cut("model/stage2.safetensors"), "stage2.safetensors"),
    (edit(script="oscar"), "not made by codiff.py"), (edit(fingerprint="0" * 64), "trained on another base"),
    (lambda t: (t / "model" / "stage2.safetensors").unlink(), "no such file")])
def test_damaged_and_foreign_checkpoints(run, tmp_path, how, says):
    target = damage(run[0], tmp_path / "w", how)
    with pytest.raises(UserError, match=says):
        codiff.load(target)


def bomb(path: Path) -> Path:
    """A PNG of a few bytes that says it has 50,000 x 50,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
                     + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    return path


@contextmanager
def full_disk(size: int):
    """No file may grow beyond `size` bytes, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_loses_nothing(run, uninterrupted, tmp_path, val):
    old = tmp_path / "cat.png"
    Image.new("RGB", (4, 4)).save(old)
    before = old.read_bytes()
    with full_disk(10_000), pytest.raises(UserError, match="cat.png: cannot be written"):
        codiff.main(["restore", str(val / "cat.png"), "-o", str(old), "--weights", str(run[0])])
    assert old.read_bytes() == before
    args = [*train_args(tmp_path / "run", val), "--stage", "1"]
    with full_disk(1_000_000), pytest.raises(UserError, match="stage1.safetensors: cannot be written"):
        codiff.main(args)  # the first checkpoint, after step 5, has 7 MB
    with full_disk(300), pytest.raises(UserError, match="log.jsonl: cannot be written|config.json: cannot be written"):
        codiff.main([*args, "--resume"])
    codiff.main([*args, "--resume"])
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert (tmp_path / "run" / "log.jsonl").read_text().splitlines() == (uninterrupted / "log.jsonl").read_text().splitlines()[:10]


@pytest.mark.parametrize("args, says", [
    (["restore", "nowhere.jpg"], "nowhere.jpg"), (["restore", "{empty}"], "no images"), (["restore", "{text}"], "notes.jpg"),
    (["restore", "{zero}"], "zero.jpg"), (["restore", "{photo}", "--weights", "{empty}"], "stage2.safetensors"),
    (["restore", "{photo}", "-o", "x.jpg"], "PNG"), (["train", "--paper", "--out", "{new}"], "--data"),
    (["train", "--out", "{new}", "--prompt", "empty", "--base", "no/such-base"], "no/such-base"),
    (["train", "--out", "{new}", "--prompt", "empty", "--base", "{empty}"], "{empty}"),
    (["train", "--out", "{new}", "--stage", "2"], "stage 1 first"), (["train", "--out", "{new}", "--data", "{empty}"], "no images"),
    (["train", "--out", "{run}"], "--resume"), (["train", "--out", "{run}", "--resume"], "stage1.save_every"),
    (["train", "--out", "{new}", "--resume"], "holds no run"), (["train", "--out", "{new}", "--s1-batch", "0"], "--s1-batch"), (["train", "--out", "{new}", "--s1-crop", "100"], "--s1-crop 100"),
    (["eval", "--data", "nowhere"], "nowhere"), (["restore", "{photo}", "--tile", "100"], "--tile 100"), (["restore", "{photo}", "--tile", "32"], "at least 128"),
    (["train", "--out", "{new}", "--prompt", "dape"], "--prompt dape: choose from cave"), (["train", "--out", "{new}", "--losses", "l2,l3"], "--losses l3"),
    (["figures", "--weights", "{empty}"], "stage1.safetensors"), (["restore", "{bomb}"], "bomb.png"),
    (["profile", "--base", "{empty}"], "unet/config.json")])
def test_bad_input(run, tmp_path, monkeypatch, args, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.jpg").write_text("not a picture")
    (tmp_path / "zero.jpg").write_bytes(b"")
    names = {"empty": tmp_path / "empty", "text": tmp_path / "notes.jpg", "zero": tmp_path / "zero.jpg", "new": tmp_path / "new",
             "photo": PHOTOS / "val" / "chelsea.png", "run": run[0], "base": TINY_SD, "bomb": bomb(tmp_path / "bomb.png")}
    args = [a.format(**names) for a in args]
    if args[0] in ("restore", "eval") and "--weights" not in args:
        args += ["--weights", str(run[0])]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        codiff.main(args)
    message = str(error.value)
    assert says.format(**names) in message and "\n" not in message


@pytest.mark.parametrize("args", [["train", "--s1-lr", "fast"], ["sharpen"], ["train", "--no-such-flag"], ["eval", "--data", "nowhere", "--weights", "{run}"], ["profile", "--size", "0"], ["profile", "--size", "0x9"]])
def test_an_error_is_one_line_and_exit_code_2(run, args, capsys):
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: codiff.main([a.format(run=run[0]) for a in args]))
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
