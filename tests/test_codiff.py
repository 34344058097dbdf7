"""codiff.py: each equation, which parameters each loss moves, and the command line end to end."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import codiff
from codiff import CODiff, CaVE, JPEGPairs, Stage1
from common import ROOT, TINY_SD, Discriminator, UserError, dists_small, frozen, load_tensors, read_image, run_cli, trainable

PHOTOS = ROOT / "data" / "photos"
WIDTHS = Stage1.widths, Stage1.blocks


def paper(stage):
    return stage(**{k: f.metadata["paper"] for k, f in stage.__dataclass_fields__.items()})


def command(*args, **options):
    return subprocess.run([sys.executable, ROOT / "codiff.py", *map(str, args)], capture_output=True, text=True, **options)


# ---- stage 1


def test_cave_has_the_released_size_and_one_token_per_32_pixels():
    with torch.device("meta"):
        cave = CaVE(paper(Stage1).widths, paper(Stage1).blocks)
        parts = (cave.m_head, cave.m_down1, cave.m_down2, cave.m_down3, cave.m_body_encoder)
        assert sum(p.numel() for p in cave.parameters()) / 1e6 == pytest.approx(74.9, abs=0.05)
        assert sum(p.numel() for m in parts for p in m.parameters()) / 1e6 == pytest.approx(27.74, abs=0.005)
        assert len(cave.state_dict()) == 346
        x = torch.zeros(2, 3, 256, 256)
        assert cave.embed(x).shape == (2, 64, 512)  # not the 1,024 of h / 8
        q_hat, x_rec = cave(x)
    assert q_hat.shape == (2,) and x_rec.shape == x.shape


def test_tokens_are_row_major():
    cave = CaVE(*WIDTHS).eval()
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
    cave = CaVE(*WIDTHS)
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
    G = CODiff(TINY_SD, CaVE(*WIDTHS), 199)
    G.train_lora(4)
    return G.train()


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
        grads = torch.autograd.grad(loss, trainable(generator), retain_graph=True, allow_unused=True)
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


@pytest.fixture(scope="session")
def val(tmp_path_factory):
    folder = tmp_path_factory.mktemp("val")
    Image.open(PHOTOS / "val" / "chelsea.png").crop((100, 40, 260, 170)).save(folder / "cat.png")
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory, val):
    """The default command line, at reduced steps, from a folder that is not the repo's."""
    out = tmp_path_factory.mktemp("runs") / "codiff"
    done = command("train", "--out", out, "--s1-steps", 6, "--s2-steps", 6, "--s1-save-every", 2, "--s2-save-every", 2,
                   cwd=tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 0, done.stderr
    return out, done


def test_train_end_to_end(run):
    out, done = run
    for said in ("stage 1 on", "stage 2 on", "|grad qf|", "|grad gan_g|", "VAE(original)", "JPEG QF 20", "trainable"):
        assert said in done.stdout
    norms = next(line for line in done.stdout.splitlines() if "|grad gan_g|" in line).split()
    assert float(norms[-1]) > 0  # the released code's is exactly 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [(1, s) for s in range(6)] + [(2, s) for s in range(6)]
    assert {"l2", "dists", "gan_g", "gan_d"} <= rows[-1].keys()
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert files == {"config.json", "log.jsonl", "metrics.json", "samples/eval.png", "last/stage1.safetensors", "last/stage2.safetensors",
                     "model/config.json", "model/stage1.safetensors", "model/stage2.safetensors",
                     "model/unet_lora/pytorch_lora_weights.safetensors", "model/vae_lora/pytorch_lora_weights.safetensors"}
    results = json.loads((out / "metrics.json").read_text())["results"]
    for rows in results.values():  # 8 bit, 2 images; a JPEG at QF 5 is worse than at QF 20
        assert rows["VAE(original)"]["PSNR"] > rows["VAE(compressed)"]["PSNR"]
    assert results["JPEG QF 20"]["compressed"]["PSNR"] > results["JPEG QF 5"]["compressed"]["PSNR"] + 2
    assert Image.open(out / "samples" / "eval.png").width > 1000


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
    (source / "broken.jpg").write_bytes((source / "a.jpg").read_bytes()[:200])
    before = {p: p.read_bytes() for p in source.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="1 of 5"):
        codiff.main(["restore", str(source), "-o", str(tmp_path / "out"), "--weights", str(out)])
    assert "broken.jpg" in capsys.readouterr().err
    sizes = {str(p.relative_to(tmp_path / "out")): Image.open(p).size for p in (tmp_path / "out").rglob("*.png")}
    assert sizes == {"a.png": (121, 135), "deep/b.png": (7, 5), "one.png": (1, 1), "c.png": (40, 33)}
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
def uninterrupted(tmp_path_factory, val):
    out = tmp_path_factory.mktemp("whole") / "run"
    codiff.main(train_args(out, val))
    return out


@pytest.mark.parametrize("sig, after", [(signal.SIGKILL, 8), (signal.SIGKILL, 17), (signal.SIGINT, 13)])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(uninterrupted, tmp_path, val, sig, after):
    """A process is stopped once its log has `after` lines, of 10 a stage, and the run is resumed."""
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, ROOT / "codiff.py", *train_args(out, val)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= after):
        time.sleep(0.01)
    process.send_signal(sig)
    said, code = process.communicate()[1], process.returncode
    assert not (out / "metrics.json").exists(), "it ended before the signal came"
    codiff.main([*train_args(out, val), "--resume"])
    assert code == (-signal.SIGKILL if sig == signal.SIGKILL else 2)
    assert sig == signal.SIGKILL or ("--resume" in said and "Traceback" not in said)
    for name in ("log.jsonl", "metrics.json"):
        assert (out / name).read_bytes() == (uninterrupted / name).read_bytes(), name
    for name in ("stage1.safetensors", "stage2.safetensors", "unet_lora/pytorch_lora_weights.safetensors", "vae_lora/pytorch_lora_weights.safetensors"):
        a, b = (load_tensors(folder / "model" / name)[0] for folder in (out, uninterrupted))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert not [p for p in out.rglob(".*") if p.is_file()]


def test_checkpointing_and_accumulation_leave_the_losses_as_they_are(uninterrupted, tmp_path, val):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    (out / "last" / "stage2.safetensors").unlink()
    codiff.main([*train_args(out, val), "--stage", "2", "--s2-checkpointing", "--s2-accumulate", "2"])
    one, two = ([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (uninterrupted, out))
    assert len(one) == len(two) == 20
    for a, b in zip(one, two):
        assert {k: pytest.approx(v, rel=1e-2) for k, v in a.items()} == b


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
        config = json.loads((target / "model" / "config.json").read_text())
        (target / "model" / "config.json").write_text(json.dumps(config | changes))
    return how


@pytest.mark.parametrize("how, says", [
    (cut("model/stage1.safetensors"), "stage1.safetensors"), (cut("model/stage2.safetensors"), "stage2.safetensors"),
    (cut("model/unet_lora/pytorch_lora_weights.safetensors"), "unet_lora"), (cut("model/config.json"), "config.json"),
    (edit(script="oscar"), "oscar.py"), (edit(base_sha256="0" * 64), "000000000000"),
    (lambda t: (t / "model" / "config.json").unlink(), "no such file")])
def test_damaged_and_foreign_checkpoints(run, tmp_path, how, says):
    target = damage(run[0], tmp_path / "w", how)
    with pytest.raises(UserError, match=says):
        codiff.load(target)


@pytest.mark.parametrize("args, says", [
    (["restore", "nowhere.jpg"], "nowhere.jpg"), (["restore", "{empty}"], "no images"), (["restore", "{text}"], "notes.jpg"),
    (["restore", "{zero}"], "is empty"), (["restore", "{photo}", "--weights", "{empty}"], "config.json"),
    (["restore", "{photo}", "-o", "x.jpg"], "PNG"), (["train", "--paper", "--out", "{new}"], "--data"),
    (["train", "--out", "{new}", "--base", "no/such-base"], "no/such-base"), (["train", "--out", "{new}", "--base", "{empty}"], "unet/config.json"),
    (["train", "--out", "{new}", "--stage", "2"], "stage 1 first"), (["train", "--out", "{new}", "--data", "{empty}"], "no images"),
    (["train", "--out", "{run}"], "--resume"), (["train", "--out", "{run}", "--resume"], "stage1.steps"),
    (["train", "--out", "{new}", "--resume"], "holds no run"), (["train", "--out", "{new}", "--s1-batch", "0"], "--s1-batch"), (["train", "--out", "{new}", "--s1-crop", "100"], "--s1-crop 100"),
    (["eval", "--data", "nowhere"], "nowhere")])
def test_bad_input(run, tmp_path, monkeypatch, args, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.jpg").write_text("not a picture")
    (tmp_path / "zero.jpg").write_bytes(b"")
    names = {"empty": tmp_path / "empty", "text": tmp_path / "notes.jpg", "zero": tmp_path / "zero.jpg", "new": tmp_path / "new",
             "photo": PHOTOS / "val" / "chelsea.png", "run": run[0]}
    args = [a.format(**names) for a in args]
    if args[0] != "train" and "--weights" not in args:
        args += ["--weights", str(run[0])]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        codiff.main(args)
    message = str(error.value)
    if "could not be restored" not in message:  # then the reason went to stderr, once per file
        assert says in message and "\n" not in message


@pytest.mark.parametrize("args", [["train", "--s1-lr", "fast"], ["sharpen"], ["train", "--no-such-flag"], ["eval", "--data", "nowhere"]])
def test_an_error_is_one_line_and_exit_code_2(args, capsys):
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: codiff.main(args))
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_process_says_the_same(tmp_path):
    done = command("restore", "x.jpg", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == "codiff.py: x.jpg: no such file or folder\n"
