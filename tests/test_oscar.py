"""oscar.py, equation by equation: hyper-encoders, mapping, losses, the file format; then what is measured."""

import contextlib
import io
import json
import math
import shutil
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch.utils._python_dispatch import TorchDispatchMode

import common
import oscar
from common import PHOTOS, SD, TINY_SD, Discriminator, frozen, load_trained, rng, to_tensor
from conftest import (CAT, alpha_bars, are_binary_cross_entropy, before_stage_2, moved_by, rows_of, said_by,
                      tops, train_args)
from data import make_cir, speed
from data.files import UserError, load_tensors, save_tensors
from data.pictures import compress_files, read_image
from data.results import complexity, evaluate
from data.results import oscar as measures
from data.results.tables import text_table
from data.tiles import tiling
from oscar import (BPP, NAMES, OSCAR, RATES, S, V, HyperEncoder, HyperEncoders, Photos, Quantizer, Stage1,
                   Stage2, parse_file, write_file)

NARROW, C = Stage1(N=8, M=8, D=4), 16  # the tiny VAE's channels


@pytest.fixture(scope="module")
def run(trained):
    return trained("oscar")


@pytest.fixture(scope="module")
def mapping(run):
    return json.loads((run.folder / "model" / "mapping.json").read_text())


# ---- rates, photographs, hyper-encoders: Sec. 3.3


def test_bit_rates_are_the_papers_and_sizes_the_releases():
    assert BPP == pytest.approx([float(n) for n in NAMES], abs=6e-5)
    assert oscar.parse_bpp("0.0019") == 0 and oscar.parse_bpp("0.09375") == 6 and oscar.parse_bpp(".125") == 7
    with torch.device("meta"):
        Qs = HyperEncoders(Stage1.paper(), 4)
    sizes = {s: sum(p.numel() for p in Q.parameters()) / 1e6 for s, Q in zip(S, Qs)}
    assert sizes == pytest.approx({8: 16.57, 4: 14.10, 2: 10.75, 1: 7.41}, abs=0.01)


def test_photos_are_functions_of_seed_and_number():
    one, two = (Photos([PHOTOS / "train"], Stage1(crop=64), 64, 7) for _ in range(2))
    for n in (0, 5, 40):
        x = one[n][1]
        assert x.shape == (3, 64, 64) and x.abs().max() <= 1 and torch.equal(x, two[n][1])
        assert torch.equal(x, to_tensor(one.crop(n)))


@pytest.mark.parametrize("s", [1, 2, 4, 8])
def test_a_hyper_encoder_downsamples_by_s_and_back(s):
    Q, z_0 = HyperEncoder(C, 8, 12, 4, s, 32).eval(), torch.randn(2, C, 16, 24)
    Q.energy.copy_(torch.tensor([9.0, 1.0]))
    with torch.no_grad():
        idx = Q.encode(z_0)
        assert idx.shape == (2, 16 // s, 24 // s) and 0 <= idx.min() and idx.max() < 32
        assert torch.allclose(Q.decode(idx), Q(z_0)[0], atol=1e-5) and Q.decode(idx).shape == z_0.shape
        rms = torch.linspace(0.5, 2, C)  # of a released model's files
        assert torch.allclose(Q.decode(idx, rms).square().mean((2, 3)).sqrt(), rms.expand(2, -1), rtol=1e-4)


def test_the_quantizer_takes_the_nearest_code_with_eq_7s_commitment_and_a_straight_through_gradient():
    torch.manual_seed(0)
    q, h = Quantizer(6, 4, 20), torch.randn(3, 6, 5, 7, requires_grad=True)
    out, l_vq = q(h)
    e, idx = q.encode(h)
    assert torch.allclose(e.norm(dim=-1), torch.ones(3, 5, 7), atol=1e-5)
    distances = (e[..., None, :] - q.embed).double().norm(dim=-1)  # brute force
    assert idx.shape == (3, 5, 7) and torch.equal(idx, distances.argmin(-1))
    codes = q.embed[idx]
    assert torch.allclose(out, q.decode(codes), atol=1e-6)
    w = torch.randn_like(out)
    through, = torch.autograd.grad((out * w).sum(), h, retain_graph=True)
    direct, = torch.autograd.grad((q.decode(e) * w).sum(), h, retain_graph=True)  # as if not quantised
    assert torch.allclose(through, direct, atol=1e-5)
    # |e - q|^2 of unit vectors
    assert l_vq.item() == pytest.approx((2 - 2 * (e * codes).sum(-1)).mean().item(), rel=1e-5)
    assert l_vq.requires_grad and not q.embed.requires_grad
    q.eval()(h)  # only training feeds the codebook
    assert [i.tolist() for _, i in q.pending] == [idx.flatten().tolist()]


def test_one_moving_average_step_by_hand():
    q = Quantizer(2, 2, 3)
    q.embed.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    q.embed_avg.copy_(2 * q.embed)
    q.cluster_size.fill_(2.0)
    e = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    q.pending = [(e[:2], torch.tensor([0, 0])), (e[2:], torch.tensor([1, 2]))]  # two micro-batches
    assert q.update(0.8, lambda t: t, torch.Generator().manual_seed(0)) == 3 and not q.pending
    assert torch.allclose(q.cluster_size, torch.tensor([0.8 * 2 + 0.2 * 2, 0.8 * 2 + 0.2, 0.8 * 2 + 0.2]))
    averages = torch.tensor([[1.6 + 0.2 * 1.8, 0.2 * 0.6], [0.2 * 0.6, 1.6 + 0.2 * 0.8], [-1.6, -0.2]])
    assert torch.allclose(q.embed_avg, averages)
    assert torch.allclose(q.embed, averages / averages.square().sum(1, keepdim=True).sqrt())


def test_dead_codes_are_drawn_from_the_batch():
    qs, e = [Quantizer(2, 2, 8) for _ in range(3)], F.normalize(torch.randn(64, 2), dim=1)
    qs[0].cluster_size[:4], qs[0].embed_avg[:4], start = 1.0, qs[0].embed[:4], qs[0].state_dict()
    before = {k: v.clone() for k, v in start.items()}
    for q, seed in zip(qs, (1, 1, 2)):
        q.load_state_dict(before)
        q.pending = [(e, torch.arange(64) % 4)]
        assert q.update(0.9, lambda t: t, torch.Generator().manual_seed(seed)) == 4
        assert all((e - code).norm(dim=1).min() < 1e-6 for code in q.embed[4:])
        assert not torch.equal(before["embed"], q.embed) and torch.all(q.cluster_size[4:] == 8)
    one, same, other = (q.embed for q in qs)  # a function of batch and generator alone
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_stage_1s_losses_are_one_a_rate_and_move_that_rates_hyper_encoder_alone():
    torch.manual_seed(0)
    Qs, z_0 = HyperEncoders(NARROW, C), torch.randn(2, C, 8, 16)
    losses = dict(zip(("sim", "vq", "z"), Qs(z_0)))
    for r, Q in enumerate(Qs):
        z_tilde, l_vq = Q(z_0)
        expected = {"sim": oscar.loss_sim(z_0, z_tilde), "vq": l_vq, "z": (z_tilde - z_0).square().mean()}
        for name, loss in losses.items():
            assert loss.shape == (8,) and loss[r].item() == pytest.approx(expected[name].item(), rel=1e-4)
            moved = moved_by(loss[r], Qs)
            assert tops(moved) == {str(r)} and f"{r}.backbone.0.weight" in moved, name
            assert (f"{r}.proj.0.weight" in moved) == (name != "vq"), name


# ---- the mapping and the one step: Sec. 3.4, Eqs. 3 to 6 and 9 to 13


def test_denoising_is_eq_3_at_the_rates_own_timestep(run):
    model, z = run.model, torch.randn(1, C, 8, 12)
    for r in (0, 7):
        with torch.no_grad():
            eps = model.sd.unet(z, torch.tensor([model.t[r]]), model.prompt[None]).sample
            z_hat, a = model.denoise(z, r), float(alpha_bars()[model.t[r]])
        assert torch.allclose(z_hat, (z - (1 - a)**0.5 * eps) / a**0.5, atol=1e-4)


def test_eq_12_is_sqrt_alpha_bar_for_whole_tensors_and_less_for_positions():
    """Both against states of the forward diffusion."""
    torch.manual_seed(0)
    z_0 = torch.randn(8, 4, 256, 256)
    G = oscar.G_sim(z_0[..., :64, :64], torch.randn(8, 4, 64, 64), alpha_bars())
    assert G.shape == (1000,) and torch.all(G[1:] < G[:-1])
    for t in (20, 250, 500, 900):
        a = alpha_bars()[t]
        noisy = a.sqrt() * z_0 + (1 - a).sqrt() * torch.randn_like(z_0)
        whole = F.cosine_similarity(noisy.flatten(), z_0.flatten(), dim=0)
        assert whole.item() == pytest.approx(a.sqrt().item(), abs=0.005)
        assert G[t].item() == pytest.approx(F.cosine_similarity(noisy, z_0, dim=1).mean().item(), abs=0.01)
    assert G[500].item() == pytest.approx(0.477, abs=0.01)  # four channels; sqrt(alpha_bar) is 0.526


def noise(t):
    """Stands in for a hyper-encoder: the forward diffusion at a known timestep."""
    a = alpha_bars()[t]
    return SimpleNamespace(encode=lambda z_0: z_0, decode=lambda z_0: (
        a.sqrt() * z_0 + (1 - a).sqrt() * torch.randn_like(z_0)))


def test_eqs_9_to_13_find_the_timestep_of_a_true_diffusion_state_and_eq_11_its_noise():
    torch.manual_seed(0)
    z, true, said = [torch.randn(4, C, 32, 32) for _ in range(8)], [700, 600, 500, 400, 300, 200, 100, 50], []
    measured = oscar.F_sim([*map(noise, true)], z).tolist()
    expected = oscar.G_sim(torch.cat(z), torch.randn(32, C, 32, 32), alpha_bars()).tolist()
    table = oscar.measure_mapping(measured, expected, alpha_bars(), said.append)
    assert [table[name]["t"] for name in NAMES] == pytest.approx(true, abs=6)
    assert [table[name]["cosine"] for name in NAMES] == measured and table["G_sim"] == expected
    assert "sqrt(abar_t)" in said[0] and not any("clamped" in line for line in said)
    eps = measures.residual(noise(300), z[:1], alpha_bars()[300])
    assert abs(eps.mean()) < 0.01 and eps.std() == pytest.approx(1, abs=0.01) and len(eps) == 4 * C * 32 * 32
    G = alpha_bars().sqrt().tolist()  # 0.9996 to 0.0683
    table = oscar.measure_mapping([0.05, *[0.5] * 6, 0.9999], G, alpha_bars(), said.append)
    assert [table[name]["t"] for name in (NAMES[0], NAMES[7])] == [999, 0]
    assert [line for line in said if "clamped" in line] == [  # cosines that no timestep has
        "0.0019 bpp: 0.0500 is outside G_sim's 0.0683 to 0.9996: t is clamped to 999",
        "0.1250 bpp: 0.9999 is outside G_sim's 0.0683 to 0.9996: t is clamped to 0"]


def latents(sd, cfg, rank=0, processes=1):
    acc = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"),
                          autocast=contextlib.nullcontext)
    return oscar.latents(acc, sd, Photos([PHOTOS / "train"], cfg, 64, 0), cfg, 0)


def test_processes_share_the_measuring_and_find_what_one_finds(run):
    torch.manual_seed(0)
    Qs, sd, sums = HyperEncoders(NARROW, C), run.model.sd, []
    cfg = Stage1(crop=64, batch=4, steps=5, measure=8)
    whole, *halves = latents(sd, cfg), latents(sd, cfg, 0, 2), latents(sd, cfg, 1, 2)
    short = latents(sd, Stage1(crop=64, batch=4, steps=1, measure=8))  # trains on fewer than it would measure
    assert [sum(map(len, z)) for z, _ in (whole, *halves, short)] == [8, 4, 4, 4]
    F_sim, *F_halves = (oscar.F_sim(Qs, z) for z, _ in (whole, *halves))
    assert torch.allclose(F_sim, sum(F_halves) / 2, atol=1e-6)
    G_sim, *G_halves = (oscar.G_sim(*map(torch.cat, pair), alpha_bars()) for pair in (whole, *halves))
    assert torch.allclose(G_sim, sum(G_halves) / 2, atol=1e-6)
    for z, _ in halves:
        sums.append([])
        oscar.set_gain(Qs, z, lambda pair, _: sums[-1].append(pair) or torch.ones(2))  # leaves it at 1
    square_0, square = sum(map(torch.stack, sums)).T
    oscar.set_gain(Qs, whole[0])
    assert torch.allclose(torch.stack([Q.gain for Q in Qs]), (square_0 / square).sqrt(), rtol=1e-4)
    z = [3 * torch.randn(2, C, 8, 8), torch.randn(2, C, 8, 8)]
    oscar.set_gain(Qs, z)  # and z_tilde has the RMS of z_0
    for Q in Qs:
        decoded, expected = (sum(t.square().sum().item() for t in ts) for ts in ([Q(z_0)[0] for z_0 in z], z))
        assert decoded == pytest.approx(expected, rel=1e-4)


def test_stage_1_leaves_latents_as_large_as_states_of_eq_11_and_their_mapping(run, mapping):
    """On the crops that it measured: z_0's RMS, residual noise nearly orthogonal to z_0, F_sim as written."""
    (cfg, tensors, _), sd = Stage1.read(run.folder, "oscar"), run.model.sd
    Qs, z_0 = load_trained(HyperEncoders(cfg, C), tensors, run.folder).eval(), torch.cat(latents(sd, cfg)[0])
    for name, Q, F_r in zip(NAMES, Qs, oscar.F_sim(Qs, [z_0]).tolist()):
        rms, rms_0 = (z.square().mean().sqrt().item() for z in (Q(z_0)[0], z_0))
        t, written = mapping[name]["t"], mapping[name]["cosine"]
        assert rms == pytest.approx(rms_0, rel=1e-3) and written == pytest.approx(F_r, abs=1e-5), name
        assert t == np.abs(np.array(mapping["G_sim"]) - written).argmin()
        eps = measures.residual(Q, [z_0], sd.alpha_bar[t])
        assert abs(torch.corrcoef(torch.stack([eps, z_0.flatten()]))[0, 1].item()) < 0.3, name


def test_mappings(run, mapping, tmp_path):
    """Fig. 7."""
    def chosen(mapping, seed=0, **more):
        measured = run.folder / "model" / "mapping.json"
        return oscar.choose_mapping(Stage2(mapping=str(mapping), **more), measured, 1000, seed)
    t, own = chosen("random"), tmp_path / "own.json"
    assert t == chosen("random") != chosen("random", 1)
    assert len(t) == 8 and 0 <= min(t) and max(t) < 1000
    assert chosen("measured") == [mapping[name]["t"] for name in NAMES] == run.model.t
    assert chosen("measured", alignment=False) == list(oscar.RELEASED_T)
    own.write_text(json.dumps({name: {"t": r} for r, name in enumerate(NAMES)}))
    assert chosen(own) == [*range(8)]
    late = json.dumps({name: {"t": 1000} for name in NAMES})
    for text in (late, '{"0.0019": {"t": 3}}', "no JSON", "[]"):
        own.write_text(text)
        with pytest.raises(UserError, match="must lie in" if text == late else "not one like a run's"):
            chosen(own)


class NoFloat64(TorchDispatchMode):
    """As a device without float64: MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else (out,):
            assert not isinstance(t, torch.Tensor) or t.dtype != torch.float64, func
        return out


def test_nothing_needs_float64(run):
    z_0, Qs = torch.randn(2, C, 8, 8), HyperEncoders(NARROW, C)
    with NoFloat64():
        oscar.set_gain(Qs, [z_0])
        oscar.F_sim(Qs, [z_0])
        oscar.G_sim(z_0, torch.randn_like(z_0), alpha_bars())
        Qs(z_0)
        Qs[0].quantizer.update(0.9, lambda t: t, torch.Generator())
        oscar.decompress(run.model, oscar.compress(run.model, CAT.crop((100, 40, 180, 100)), 3))


# ---- losses, both stages: Eqs. 6 and 14 to 16


def test_losses_equal_their_formulas_and_sobel_is_scipys():
    z_0, z, dists = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), common.dists("tiny-vgg")
    vectors = (t.permute(0, 2, 3, 1).reshape(-1, 4).numpy() for t in (z_0, z))
    by_hand = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*vectors)]
    assert oscar.loss_sim(z_0, z).item() == pytest.approx(-np.mean(by_hand), abs=1e-6)
    x, y = torch.rand(1, 3, 20, 30) * 2 - 1, torch.rand(1, 3, 20, 30) * 2 - 1
    assert oscar.loss_mse(x, y).item() == pytest.approx(np.square((x - y).numpy() / 2).mean(), rel=1e-5)
    luma = (((x[0] + 1) / 2).numpy() * np.array([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    g = np.sqrt(ndimage.sobel(luma, 0, mode="nearest")**2 + ndimage.sobel(luma, 1, mode="nearest")**2 + 1e-6)
    assert np.allclose((oscar.sobel(x)[0].numpy() + 1) / 2, g, atol=1e-5)  # in all three channels
    assert oscar.loss_ea(dists, x, y) == dists(oscar.sobel(x), oscar.sobel(y)).mean() > 0
    are_binary_cross_entropy(oscar.loss_G, oscar.loss_D)


def test_each_stage_2_term_moves_its_rates_hyper_encoder_lora_and_prompt_and_nothing_else():
    """Nor does their sum leave the discriminator a gradient, nor its own loss the generator."""
    generator = OSCAR(TINY_SD, Stage1(N=16, M=16, D=8)).add_lora(4).train()
    D, dists, x = Discriminator(TINY_SD, 4), common.dists("tiny-vgg"), torch.rand(1, 3, 64, 64) * 2 - 1
    z_0 = generator.sd.encode(x)
    z_tilde, l_vq, z_hat, x_hat = generator(z_0, 4)
    with frozen(D):
        losses = {"sim": oscar.loss_sim(z_0, z_tilde), "vq": l_vq, "mse": oscar.loss_mse(x_hat, x),
                  "dists": dists(x_hat, x).mean(), "ea": oscar.loss_ea(dists, x_hat, x),
                  "gan_g": oscar.loss_G(D(z_hat, 0))}
    learns = [n for n, p in generator.named_parameters() if p.requires_grad]
    assert all("lora_" in n or n.startswith(("hyper_encoders.", "prompt")) for n in learns)
    for name, loss in losses.items():
        moved = moved_by(loss, generator)
        assert {n.split(".")[1] for n in moved if n.startswith("hyper_encoders.")} == {"4"}, name
        assert ("hyper_encoders.4.proj.0.weight" in moved) == (name != "vq"), name
        assert "hyper_encoders.4.backbone.0.weight" in moved, name
        assert any("lora_B" in n for n in moved) == ("prompt" in moved) == (name not in ("sim", "vq")), name
    sum(losses.values()).backward()
    assert all(p.grad is None for p in D.parameters()) and generator.prompt.grad.any()
    generator.zero_grad()
    oscar.loss_D(*D(torch.cat([z_hat.detach(), z_0]), 0).chunk(2)).backward()
    assert all(p.grad is None for p in generator.parameters())
    assert tops(n for n, p in D.named_parameters() if p.grad is not None) == {"unet", "prompt", "head"}


@pytest.mark.usefixtures("no_evaluation")
@pytest.mark.parametrize("losses, align", [("mse,dists,ea,gan", True), ("dists,gan", False), ("mse", True)])
def test_the_total_is_eq_14_of_the_losses_asked_for(run, tmp_path, photos, losses, align, monkeypatch):
    """Fig. 7. D learns with "gan" alone; after G's backward G has gradients, after D's D, never the other."""
    made, have, networks, gan = [], [], oscar.networks, "gan" in losses
    monkeypatch.setattr(oscar, "networks", lambda *args: made.extend(networks(*args)) or made)
    monkeypatch.setattr(common, "clip", lambda *_: have.append(
        [any(p.grad is not None for p in module.parameters()) for module in made]))
    out = before_stage_2(run, tmp_path / "run") if align else tmp_path / "run"
    more = ["--losses", losses, "--alignment" if align else "--no-alignment", "--s2-steps", 1]
    oscar.main(train_args("oscar", out, photos, "--stage", 2 if align else "all", *more))
    row, cfg = rows_of(out)[-1], Stage2()
    weights = {"mse": 1, "dists": cfg.lambda_dists, "ea": cfg.lambda_dists, "gan": cfg.lambda_2}
    total = sum(weights[k] * row["gan_g" if k == "gan" else k] for k in losses.split(","))
    assert row["loss"] == pytest.approx(cfg.lambda_repa * row["repa"] + cfg.lambda_1 * total, rel=1e-4)
    assert have == [[True, False], [False, True]][:1 + gan]
    kept = load_tensors(out / "last" / "stage2.safetensors")[0]["modules"]
    learnt = {name: any(v.any() for k, v in kept[name].items() if "lora_B" in k) for name in ("G", "D")}
    assert learnt == {"G": True, "D": gan} and ("gan_d" in row) == ("right" in row) == gan
    assert (out / "model" / "stage1.safetensors").exists() == align == (row["repa"] != row["vq"])  # L_sim
    assert (made[0].t != list(oscar.RELEASED_T)) == align and all(Q.gain != 1 for Q in made[0].hyper_encoders)


def test_a_run_logs_every_rate_and_draws_one_a_step_in_stage_2(run, mapping):
    for said in ("the release's t", "OSCAR 0.1250", "JPEG, quality 1", "VAE alone", "rd.png"):
        assert said in run.printed
    rows = rows_of(run.folder)
    assert {f"{k}@{name}" for k in ("cos", "live") for name in NAMES} <= rows[0].keys()
    assert rows[0]["sim"] == pytest.approx(-np.mean([rows[0][f"cos@{name}"] for name in NAMES]), abs=1e-6)
    drawn = [NAMES[int(rng(0, "rate", step).integers(8))] for step in range(4)]
    assert [[k[4:] for k in row if k.startswith("cos@")] for row in rows[4:]] == [[name] for name in drawn]
    assert rows[-1]["repa"] == pytest.approx(rows[-1]["vq"] - rows[-1][f"cos@{drawn[-1]}"], abs=1e-6)
    header = load_tensors(run.folder / "model" / "stage2.safetensors")[1]
    assert header["t"] == [mapping[name]["t"] for name in NAMES]


def test_z_tilde_keeps_z_0s_rms_in_stage_2(run, tmp_path, photos, no_evaluation, monkeypatch):
    """50 steps, on the crops that stage 1 measured: what follows, and what is measured at the end."""
    out, followed, real = before_stage_2(run, tmp_path / "run"), [], oscar.set_gain

    def set_gain(Qs, *measured):
        followed.extend(Q.gain.item() for Q in Qs)
        real(Qs, *measured)
    monkeypatch.setattr(oscar, "set_gain", set_gain)
    more = ["--stage", 2, "--s2-steps", 50, "--s2-save-every", 50, "--s2-batch", 1, "--losses", "mse"]
    oscar.main(train_args("oscar", out, photos, *more))
    model, z_0 = oscar.load(out), torch.cat(latents(run.model.sd, Stage1.read(run.folder, "oscar")[0])[0])
    with torch.no_grad():
        after = torch.stack([Q(z_0)[0].norm() / z_0.norm() for Q in model.hyper_encoders])
        gains = torch.stack([Q.gain for Q in model.hyper_encoders])
    assert (after - 1).abs().max() < 0.05 and (torch.tensor(followed) / gains - 1).abs().max() < 0.15


def test_stage_2s_losses_cannot_change_z_tildes_scale_nor_see_how_a_batch_is_split():
    torch.manual_seed(0)
    G = OSCAR(TINY_SD, Stage1(N=8, M=8, D=4)).add_lora(4).train()
    z_0, last = torch.randn(4, C, 8, 8) * torch.arange(1, 5).view(4, 1, 1, 1), G.hyper_encoders[7].proj[-1]

    def gradients(z_0):
        return torch.autograd.grad(G(z_0, 7)[3].square().mean(), [last.weight, last.bias])
    whole, halves = gradients(z_0), [gradients(z) for z in z_0.split(2)]
    radial = sum((p * g).sum() for p, g in zip((last.weight, last.bias), whole))
    assert abs(radial) < 1e-4 * whole[0].norm() * last.weight.norm()
    for g, *parts in zip(whole, *halves):
        assert torch.allclose(g, sum(parts) / 2, rtol=1e-3, atol=1e-5 * g.norm().item())
    noted = torch.stack(G.hyper_encoders[7].noted)  # of the whole and of its halves
    assert torch.allclose(noted[0], noted[1:].mean(0))


# ---- the file format

# What parse_file asks of a model, for SD 2.1's sizes; a file of version 3, made from (37 k + 5) mod 1024,
# k = 0 .. 14, in 10 bits each.
CODEC = SimpleNamespace(cells=[8 * s for s in S], digest=b"\xab\xcd", true_norms=False, sd=SimpleNamespace(
    vae=SimpleNamespace(config=SimpleNamespace(latent_channels=4))))
STORED = bytes.fromhex("4f533001abcd82004600" "0142a13c74264be38d084b5525dd9c705e682cc82f064b")


def shape(r, width, height):
    return tuple(math.ceil(n / (8 * S[r])) for n in (height, width))


def length(r, width, height):
    return math.ceil(math.prod(shape(r, width, height)) * math.log2(V[r]) / 8) + 14


@pytest.mark.parametrize("r", range(8))
def test_a_file_is_its_indices_and_14_bytes(r):
    rows, cols = shape(r, 130, 70)
    streams = [rng(r, i).integers(0, V[r], (rows, cols)) for i in range(20)]
    streams += [np.full((rows, cols), k) for k in (0, V[r] - 1, V[r] // 2, 1)]
    streams += [np.arange(rows * cols).reshape(rows, cols) % V[r]]
    for idx in streams:
        data = write_file(r, (130, 70), idx, CODEC.digest)
        got = parse_file(data, CODEC)
        assert got[:2] == (r, (130, 70)) and np.array_equal(got[2], idx) and got[3] == b""
        bits = "".join(f"{i:0{V[r].bit_length() - 1}b}" for i in idx.ravel())  # a plain reading of the format
        number = math.ceil(len(bits) / 8)
        assert data[10:-4] == int(bits.ljust(number * 8, "0"), 2).to_bytes(number, "big")
    idx, nominal = np.zeros(shape(r, 768, 512), int), 768 * 512 * BPP[r] / 8
    assert len(write_file(r, (768, 512), idx, CODEC.digest)) == nominal + 14 == length(r, 768, 512)
    assert len(write_file(r, (768, 512), idx, CODEC.digest, b"\1\2\3\4")) == nominal + 18
    assert len(write_file(r, (2**16 - 1, 1), np.zeros((0, 0), int), CODEC.digest)) == 14


def test_a_stored_file_of_version_3_still_parses_and_norms_travel():
    r, size, idx, norms = parse_file(STORED, CODEC)
    assert (NAMES[r], size, norms) == ("0.0098", (130, 70), b"")
    assert idx.shape == (3, 5) and idx.ravel().tolist() == [(37 * k + 5) % 1024 for k in range(15)]
    assert write_file(r, size, idx, CODEC.digest) == STORED
    data = write_file(2, (64, 64), np.ones((4, 4), int), CODEC.digest, bytes([1, 2, 250, 255]))
    released = SimpleNamespace(**vars(CODEC) | {"true_norms": True})
    assert parse_file(data, released)[3] == bytes([1, 2, 250, 255])
    z_0 = torch.randn(1, 4, 30, 40) * torch.tensor([0.1, 0.5, 2.0, 7.0]).view(1, 4, 1, 1)
    exact = z_0.square().mean((0, 2, 3)).sqrt()
    assert torch.allclose(oscar.read_norms(oscar.write_norms(z_0)), exact, rtol=0.014)


def summed(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


def test_a_thousand_mutations_are_refused_or_parse_and_allocate_nothing(monkeypatch):
    """Cut, flipped, lengthened, spliced; half of them with a checksum that fits, as a malicious file has."""
    sizes, real = [], oscar.unpack_bits
    monkeypatch.setattr(oscar, "unpack_bits", lambda data, number, bits: sizes.append(
        number * bits / 8 - len(data)) or real(data, number, bits))
    originals = [write_file(r, (130, 70), rng(r).integers(0, V[r], shape(r, 130, 70)), CODEC.digest)
                 for r in range(8)]
    refused, began = 0, time.time()
    for i in range(1000):
        g, body, checksum = rng(1000, i), originals[i % 8][:-4], originals[i % 8][-4:]
        at = int(g.integers(min(len(body), 16 if g.random() < 0.7 else 10**9)))  # headers above all
        few, many, gone = g.bytes(g.integers(1, 9)), g.bytes(g.integers(1, 200)), int(g.integers(1, 6))
        before, flipped, after = body[:at], bytes([body[at] ^ 1 << int(g.integers(8))]), body[at + 1:]
        body = [before, before + flipped + after, before + few + body[at:], before + few + body[at + gone:],
                body + many][g.integers(5)]
        fits = g.random() < 0.5
        mutated = summed(body) if fits else body + checksum
        if mutated == originals[i % 8]:
            continue
        try:
            r, size, idx, _ = parse_file(mutated, CODEC)
            assert fits and idx.shape == shape(r, *size) and idx.max() < V[r]
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 700 and time.time() - began < 20
    assert max(sizes) <= 0  # never more indices than the file's bytes hold


@pytest.mark.parametrize("data, says", [
    (b"", "empty"), (b"\x89PNG\r\n" + STORED, "not an OSCAR file"), (STORED[:2], "checksum"),
    (STORED[:20], "checksum"), (STORED + b"x", "checksum"),
    *((summed(STORED[:at] + put + STORED[at + len(put):-4]), says) for at, put, says in [
        (2, b"\x20", "version 2 of the format; .* reads version 3"), (2, b"\x31", "another model"),
        (4, b"zz", "another model"), (3, b"\x08", "bit-rate number 8"), (6, b"\0\0", "claims 0 x 70"),
        (6, b"\xff\xff\xff\xff", "claims 65535 x 65535"), (6, b"\x02\x02", "need")])])
def test_each_kind_of_bad_file_has_its_line(data, says):
    with pytest.raises(UserError, match=says):
        parse_file(data, CODEC)


# ---- compress and decompress


def test_decompress_equals_the_in_memory_reconstruction_for_any_size(run, tmp_path, monkeypatch):
    """compress and decompress as commands, against hyper-encoder, UNet and VAE called one by one."""
    model = run.model
    monkeypatch.setattr(oscar, "load", lambda *_: model)  # eight times the same
    boxes = {"odd": (121, 135), "deep/even": (128, 64), "one": (1, 1), "wide": (201, 3), "eights": (72, 104)}
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name, (w, h) in boxes.items():
        CAT.crop((90, 60, 90 + w, 60 + h)).save(tmp_path / "in" / f"{name}.png")
    for r in (0, 3, 4, 7):
        files, images, Q = tmp_path / f"files{r}", tmp_path / f"images{r}", model.hyper_encoders[r]
        oscar.main(["compress", str(tmp_path / "in"), str(files), "--bpp", NAMES[r]])
        oscar.main(["decompress", str(files), str(images)])
        for name, (w, h) in boxes.items():
            x = common.pad_to(to_tensor(CAT.crop((90, 60, 90 + w, 60 + h)))[None], 8 * S[r])
            with torch.inference_mode():
                z_hat = model.denoise(Q.decode(Q.encode(model.sd.encode(x))), r)
                expected = common.to_image(model.sd.decode(z_hat)[0, :, :h, :w])
            assert len((files / f"{name}.oscar").read_bytes()) == length(r, w, h), (name, NAMES[r])
            got = Image.open(images / f"{name}.png")
            assert got.size == (w, h) and np.array_equal(got, expected), (name, NAMES[r])


@pytest.mark.parametrize("r", [0, 3, 4])
def test_tiles_keep_the_picture_and_the_file_readable(run, r):
    model, image, tiles_for = run.model, CAT.resize((300, 330)), tiling(run.model, 256)
    data = oscar.compress(model, image, r, tiles_for)
    assert len(data) == len(oscar.compress(model, image, r))
    whole, tiles = (np.asarray(oscar.decompress(model, data, *how), float) for how in ((), (tiles_for,)))
    assert whole.shape == tiles.shape == (330, 300, 3)
    assert 0 < np.abs(whole - tiles).mean() < 0.1 * whole.std()


def test_a_picture_too_long_for_a_file_is_named_and_the_others_done_without_alpha(run, tmp_path, capsys):
    Image.new("RGB", (2**16, 1)).save(tmp_path / "long.png")
    Image.new("RGBA", (40, 30), (200, 10, 10, 128)).save(tmp_path / "alpha.png")
    with pytest.raises(UserError, match="1 of 2"):
        oscar.main(["compress", str(tmp_path), str(tmp_path / "out"), "--bpp", "0.0625",
                    "--weights", str(run.folder)])
    said = capsys.readouterr()
    assert "long.png: 65536 x 1 pixels; a file holds 65535 a side" in said.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["alpha.oscar"] and "alpha dropped" in said.out
    oscar.main(["decompress", str(tmp_path / "out" / "alpha.oscar"), str(tmp_path / "b.png"),
                "--weights", str(run.folder)])
    assert Image.open(tmp_path / "b.png").mode == "RGB"
    seen = []
    compress_files([(tmp_path / "alpha.png", tmp_path / "a.oscar")],
                   lambda image: seen.append(image.getpixel((0, 0))) or b"x")
    assert np.abs(np.subtract(seen, [(227, 132, 132)])).max() <= 1  # on white


def test_a_model_of_other_widths_or_rates_and_a_file_of_another_model_are_refused(run, tmp_path, monkeypatch):
    path = tmp_path / "model" / "stage2.safetensors"
    weights, header = load_tensors(run.folder / "model" / path.name)
    save_tensors(path, weights, **header | {"stage1.N": 8})
    with pytest.raises(UserError, match="does not fit"):
        oscar.load(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="does not fit"):
        patch.setattr(oscar, "RATES", {**RATES, "0.0019": (8, 512)})
        oscar.load(run.folder)
    save_tensors(path, weights | {"prompt": weights["prompt"] + 0.01}, **header)
    other = oscar.load(tmp_path)
    data = oscar.compress(other, CAT.crop((0, 0, 133, 91)), 4)
    with pytest.raises(UserError, match="another model"):
        oscar.decompress(run.model, data)
    assert oscar.decompress(other, data).size == (133, 91)


# ---- eval, profile and figures


def test_bd_rate_has_its_closed_forms():
    codec = [(0.1, 20.0), (0.2, 24.0), (0.45, 27.0), (0.8, 29.5), (1.3, 31.0)]
    halved = [(bpp / 2, quality) for bpp, quality in codec]
    better = [(bpp, quality + 20) for bpp, quality in codec]
    assert measures.bd_rate(halved, codec) == pytest.approx(-50)
    assert measures.bd_rate(codec, halved) == pytest.approx(100)
    assert measures.bd_rate(codec, codec) == pytest.approx(0, abs=1e-9)
    # log rate 0.2 q - 6 against 0.1 q - 4, over the qualities 22 to 30 that both have: their mean difference
    one, two = ([(math.exp(a * q + b), q) for q in qs]
                for a, b, qs in ((0.2, -6, (18, 21, 24, 27, 30)), (0.1, -4, (22, 26, 30, 34))))
    assert measures.bd_rate(one, two) == pytest.approx(100 * math.expm1(0.1 * 26 - 2))
    assert measures.bd_rate(better, codec) is measures.bd_rate(codec[:3], codec) is None
    falling = [(bpp, -quality) for bpp, quality in codec]  # as LPIPS
    assert measures.bd_rate([(bpp / 2, q) for bpp, q in falling], falling) == pytest.approx(-50)
    assert measures.bd_rate([*codec[:2], (0.45, 23.0), *codec[3:]], codec) is None  # up, down, up again
    assert text_table([""], [[measures.bd_rate([], halved)]]).split()[-1] == "-"


def test_eval_measures_as_the_paper_does(run, tmp_path, photos, monkeypatch, capsys):
    """True bits; central pixels, MUSIQ and CLIPIQA (here: any two numbers), BD-rates against a codec."""
    asked, out = [], shutil.copytree(run.folder, tmp_path / "run")
    monkeypatch.setattr(evaluate, "pyiqa_metric", lambda name: asked.append(name) or (lambda x: x.mean()))
    oscar.main(["eval", "--weights", str(out), "--data", str(photos / "cat.png"), "--metrics", "all",
                "--centre", "64", "--anchor", "JPEG"])
    assert asked == ["musiq", "clipiqa"] and "BD-rate of OSCAR against JPEG" in capsys.readouterr().out
    whole, metrics = (json.loads((of / "metrics.json").read_text()) for of in (run.folder, out))
    results = metrics["results"]
    for r, name in enumerate(NAMES):  # both photographs, padded; of one 64 x 64
        bpp = [8 * length(r, w, h) / (w * h) for w, h in ((133, 91), (107, 101))]
        assert whole["results"][f"OSCAR {name}"]["bpp"] == pytest.approx(np.mean(bpp))
        assert results[f"OSCAR {name}"]["bpp"] == pytest.approx(BPP[r] + 14 * 8 / 64**2)
    buffer = io.BytesIO()
    Image.open(photos / "cat.png").crop((34, 13, 98, 77)).save(buffer, "JPEG", quality=50, optimize=True)
    assert results["JPEG, quality 50"]["bpp"] == pytest.approx(8 * len(buffer.getvalue()) / 64**2)
    assert {k for k in results if k.startswith("WebP")} == {"WebP, quality 0"}
    assert metrics["bd_rate"].keys() == {"PSNR", "SSIM", "tiny LPIPS", "MUSIQ", "CLIPIQA"}  # what can be had
    panels = [k for k in metrics["bd_rate"] if results["VAE alone"][k] is not None]
    assert {"MUSIQ", "CLIPIQA"} < set(panels)
    assert Image.open(out / "samples" / "rd.png").width == pytest.approx(len(panels) * 4.5 * 110, abs=1)


@pytest.mark.parametrize("codec", ["hevc", "vvc"])
def test_eval_takes_video_codecs_and_other_models(run, tmp_path, photos, codec, monkeypatch, capsys, refused):
    """Bits are make_cir's; a model beside itself is itself."""
    out = shutil.copytree(run.folder, tmp_path / "run")
    args = ["eval", "--weights", out, "--data", photos / "cat.png", "--anchor", codec.upper()]
    if why := make_cir.missing_for(codec):
        pytest.skip(why)
    oscar.main([*map(str, args), "--bpp", "0.0019", "0.1250", "--against", str(run.folder)])
    said = capsys.readouterr().out
    assert f"BD-rate of OSCAR against {codec.upper()}" in said and "\nby run 0.1250" in said
    results = json.loads((out / "metrics.json").read_text())["results"]
    for name in ("0.0019", "0.1250"):
        assert results[f"by run {name}"] == results[f"OSCAR {name}"]
    qps = measures.QPS[codec.upper()]
    image = read_image(photos / "cat.png")[0]
    size = make_cir.compress(image, codec, str(qps[0]))[1]
    assert results[f"{codec.upper()}, QP {qps[0]}"]["bpp"] == 8 * size / (133 * 91)
    bits = [bpp for bpp, _ in measures.curve(results, codec.upper(), "PSNR")]
    assert len(bits) == len(qps) and bits == sorted(bits)
    assert [len(measures.curve(results, name, "PSNR")) for name in ("OSCAR", "by run")] == [2, 2]
    monkeypatch.setattr(make_cir, "missing_for", lambda codec: f"no {codec} here")
    assert refused(oscar.main, args).endswith(f"--anchor {codec.upper()}: no {codec} here")


def test_profile_counts_the_papers_model_and_times_hyper_encoders_as_inference_has_them(monkeypatch, capsys):
    """In float32, where VAE and UNet are in bf16, as on CUDA."""
    oscar.main(["profile", "--paper", "--size", "768x512", "--no-time"])
    said = capsys.readouterr().out
    assert "965.9 M parameters (the paper: 965.9 M)" in said and "one image of 768 x 512 pixels" in said
    rows = {line.split()[0]: line.split()[2:6] for line in said.splitlines() if " bpp " in line}
    assert rows["0.0019"] == ["8", "256", "16.57", "M"] and rows["0.1250"] == ["1", "256", "7.41", "M"]
    seen, parts = [], measures.parts
    monkeypatch.setattr(speed, "dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(complexity, "seconds", lambda call: call() is None or 1.0)
    monkeypatch.setattr(measures, "parts", lambda G, x, r: seen.append(
        (x.device.type, G.sd.unet.dtype, {p.dtype for p in G.hyper_encoders.parameters()})) or parts(G, x, r))
    oscar.main(["profile", "--size", "64"])
    assert [dtypes for where, *dtypes in seen if where == "cpu"] == [[torch.bfloat16, {torch.float32}]]


@pytest.mark.usefixtures("no_evaluation")
def test_figures_and_with_a_second_run_fig_8(run, photos, tmp_path, capsys, refused):
    """A run without alignment has neither mapping nor stage 1: it is compared, and draws nothing itself."""
    shutil.copytree(run.folder, tmp_path / "run")
    samples, other = tmp_path / "run" / "samples", tmp_path / "other"
    args = [str(w) for w in ("figures", "--weights", tmp_path / "run", "--data", photos, "--against", other)]
    assert "0.1250 bpp, after" in said_by(oscar.main, args, tmp_path)
    for name in ("fig2", "fig4", "alignment"):
        assert Image.open(samples / f"{name}.png").width > 500
    assert not (samples / "fig8.png").exists()
    assert f"no Fig. 8; to compare: oscar.py train --no-alignment --out {other}" in capsys.readouterr().err
    oscar.main(train_args("oscar", other, photos, "--no-alignment"))
    assert [p.name for p in (other / "model").iterdir()] == ["stage2.safetensors"]
    said_by(oscar.main, args, tmp_path)
    assert Image.open(samples / "fig8.png").width > 500
    assert "was trained with --no-alignment and has no mapping" in refused(
        oscar.main, ["figures", "--weights", other, "--data", photos])
