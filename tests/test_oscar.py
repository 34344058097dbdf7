"""oscar.py: each equation, the codebook, the file format, and the command line end to end."""

import collections
import copy
import io
import json
import math
import time
import zlib
from functools import partial
from itertools import product
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
from common import (ROOT, SD, TINY_SD, Discriminator, Run, UserError, dists_small, frozen, load_tensors,
                    load_trained, read_image, read_model, rng, save_tensors)
from conftest import said_by, same_run
from data.results import complexity, evaluate, figures
from oscar import (BPP, NAMES, OSCAR, RATES, S, V, HyperEncoder, HyperEncoders, Quantizer, Stage1, Stage2,
                   parse_file, sobel, write_file)

PHOTOS = ROOT / "data" / "photos"
AT = "--bpp", "0.0313", "--weights"


# ---- rates and networks


def test_bit_rates_are_the_papers():
    assert BPP == pytest.approx([float(n) for n in NAMES], abs=6e-5)
    assert oscar.parse_bpp("0.0019") == 0 and oscar.parse_bpp("0.09375") == 6 and oscar.parse_bpp(".125") == 7


def test_hyper_encoders_have_the_released_sizes():
    with torch.device("meta"):
        Qs = HyperEncoders(Stage1.paper(), 4)
    sizes = {s: sum(p.numel() for p in Q.parameters()) / 1e6 for s, Q in zip(S, Qs)}
    assert sizes == pytest.approx({8: 16.57, 4: 14.10, 2: 10.75, 1: 7.41}, abs=0.01)


@pytest.mark.parametrize("s", [1, 2, 4, 8])
def test_a_hyper_encoder_downsamples_by_s_and_back(s):
    Q = HyperEncoder(16, 8, 12, 4, s, 32).eval()
    z_0 = torch.randn(2, 16, 16, 24)
    idx = Q.encode(z_0)
    assert idx.shape == (2, 16 // s, 24 // s) and 0 <= idx.min() and idx.max() < 32
    assert torch.allclose(Q.decode(idx), Q(z_0)[0], atol=1e-5) and Q.decode(idx).shape == z_0.shape


def test_photos_are_functions_of_seed_and_number():
    cfg = Stage1(crop=64, zoom=2, jitter=0.2)
    one, two = (oscar.Photos([PHOTOS / "train"], cfg, 64, 7) for _ in range(2))
    for n in (0, 5, 40):
        x = one[n][1]
        assert x.shape == (3, 64, 64) and x.abs().max() <= 1 and torch.equal(x, two[n][1])
    plain = oscar.Photos([PHOTOS / "train"], Stage1(crop=64, zoom=1, jitter=0.0), 64, 7)
    assert torch.equal(plain[3][1], oscar.to_tensor(plain.crop(3)))


# ---- the codebook


def test_quantizer_finds_the_nearest_code():
    torch.manual_seed(0)
    q = Quantizer(12, 8, 50)
    e, idx = q.encode(torch.randn(3, 12, 5, 7))
    assert torch.allclose(e.norm(dim=-1), torch.ones(3, 5, 7), atol=1e-5)
    for b, y, x in product(range(3), range(5), range(7)):  # brute force, by distance
        assert idx[b, y, x] == min(range(50), key=lambda k: (e[b, y, x] - q.embed[k]).double().norm().item())


def test_one_moving_average_step_by_hand():
    q = Quantizer(2, 2, 3)
    q.embed.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    q.embed_avg.copy_(2 * q.embed)
    q.cluster_size.fill_(2.0)
    e = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    q.pending = [(e[:2], torch.tensor([0, 0])), (e[2:], torch.tensor([1, 2]))]  # two micro-batches
    live = q.update(0.8, lambda t: t, torch.Generator().manual_seed(0))
    assert live == 3 and not q.pending
    assert torch.allclose(q.cluster_size, torch.tensor([0.8 * 2 + 0.2 * 2, 0.8 * 2 + 0.2, 0.8 * 2 + 0.2]))
    averages = torch.tensor([[1.6 + 0.2 * 1.8, 0.2 * 0.6], [0.2 * 0.6, 1.6 + 0.2 * 0.8], [-1.6, -0.2]])
    assert torch.allclose(q.embed_avg, averages)
    assert torch.allclose(q.embed, averages / averages.square().sum(1, keepdim=True).sqrt())


def test_dead_codes_are_drawn_from_the_batch():
    q = Quantizer(2, 2, 8)
    q.cluster_size[:4], q.embed_avg[:4] = 1.0, q.embed[:4]
    e = F.normalize(torch.randn(64, 2), dim=1)
    q.pending = [(e, torch.arange(64) % 4)]
    before = q.embed.clone()
    assert q.update(0.9, lambda t: t, torch.Generator().manual_seed(1)) == 4
    for code in q.embed[4:]:
        assert (e - code).norm(dim=1).min() < 1e-6
    assert not torch.equal(before, q.embed) and torch.all(q.cluster_size[4:] == 8)
    twice = [Quantizer(2, 2, 8) for _ in range(2)]
    for other in twice:  # a function of batch and generator alone
        other.load_state_dict(q.state_dict())
        other.pending = [(e, torch.arange(64) % 4)]
        other.update(0.9, lambda t: t, torch.Generator().manual_seed(2))
    assert torch.equal(twice[0].embed, twice[1].embed)


def test_straight_through_gradient_and_commitment():
    torch.manual_seed(0)
    q = Quantizer(6, 4, 9)
    h = torch.randn(2, 6, 3, 3, requires_grad=True)
    out, l_vq = q(h)
    e, idx = q.encode(h)
    codes = q.embed[idx]
    assert torch.allclose(out, q.decode(codes), atol=1e-6)
    w = torch.randn_like(out)
    through, = torch.autograd.grad((out * w).sum(), h, retain_graph=True)
    direct, = torch.autograd.grad((q.decode(e) * w).sum(), h, retain_graph=True)  # as if not quantised
    assert torch.allclose(through, direct, atol=1e-5)
    # |e - q|^2 of unit vectors
    assert l_vq.item() == pytest.approx((2 - 2 * (e * codes).sum(-1)).mean().item(), rel=1e-5)
    assert l_vq.requires_grad and not q.embed.requires_grad


# ---- alignment and mapping


def alpha_bars():
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000)**2, 0)


def test_eq_12_whole_tensors_have_the_cosine_sqrt_alpha_bar():
    torch.manual_seed(0)
    z_0, eps = torch.randn(2_000_000), torch.randn(2_000_000)
    for t in (20, 250, 500, 900):
        a = alpha_bars()[t]
        noisy = a.sqrt() * z_0 + (1 - a).sqrt() * eps
        assert F.cosine_similarity(noisy, z_0, dim=0).item() == pytest.approx(a.sqrt().item(), abs=0.005)


def test_eq_12_positions_have_the_monte_carlo_cosine():
    torch.manual_seed(0)
    z_0 = torch.randn(8, 4, 64, 64)
    G = oscar.G_sim(z_0, torch.randn_like(z_0), alpha_bars())
    assert G.shape == (1000,) and torch.all(G[1:] < G[:-1])
    for t in (20, 250, 500, 900):
        a = alpha_bars()[t]
        noisy = a.sqrt() * z_0 + (1 - a).sqrt() * torch.randn_like(z_0)
        assert G[t].item() == pytest.approx(F.cosine_similarity(noisy, z_0, dim=1).mean().item(), abs=0.01)
    assert G[500].item() == pytest.approx(0.477, abs=0.01)  # four channels; sqrt(alpha_bar) is 0.526


class Noise(torch.nn.Module):
    """Stands in for a hyper-encoder: the forward diffusion at a known timestep."""

    def __init__(self, t):
        super().__init__()
        self.a = alpha_bars()[t]

    def encode(self, z_0):
        return z_0

    def decode(self, z_0):
        return self.a.sqrt() * z_0 + (1 - self.a).sqrt() * torch.randn_like(z_0)


def test_eqs_9_to_13_find_the_timestep_of_a_true_diffusion_state(tmp_path, capsys):
    torch.manual_seed(0)
    z, true = [torch.randn(4, 16, 32, 32) for _ in range(8)], [700, 600, 500, 400, 300, 200, 100, 50]
    measured = oscar.F_sim(torch.nn.ModuleList(map(Noise, true)), z).tolist()
    z_0 = torch.cat(z)
    expected = oscar.G_sim(z_0, torch.randn_like(z_0), alpha_bars()).tolist()
    oscar.measure_mapping(measured, expected, alpha_bars(), tmp_path / "mapping.json")
    mapping = json.loads((tmp_path / "mapping.json").read_text())
    assert [mapping[name]["t"] for name in NAMES] == pytest.approx(true, abs=6)
    said = capsys.readouterr().out
    assert "sqrt(abar_t)" in said and "clamped" not in said


def test_a_cosine_that_no_timestep_has_is_named(tmp_path, capsys):
    G = alpha_bars().sqrt().tolist()  # 0.9996 to 0.0683
    oscar.measure_mapping([0.05, *[0.5] * 6, 0.9999], G, alpha_bars(), tmp_path / "mapping.json")
    mapping = json.loads((tmp_path / "mapping.json").read_text())
    assert [mapping[name]["t"] for name in (NAMES[0], NAMES[7])] == [999, 0]
    clamped = [line for line in capsys.readouterr().out.splitlines() if "clamped" in line]
    assert clamped == ["0.0019 bpp: 0.0500 is outside G_sim's 0.0683 to 0.9996: t is clamped to 999",
                       "0.1250 bpp: 0.9999 is outside G_sim's 0.0683 to 0.9996: t is clamped to 0"]


def test_processes_share_the_measuring_and_find_what_one_finds():
    torch.manual_seed(0)
    Qs, alpha_bar, sums = HyperEncoders(Stage1(N=8, M=8, D=4), 16), alpha_bars(), []
    cfg, sd = Stage1(crop=64, batch=4, steps=5), SD(TINY_SD, with_unet=False)
    photos = oscar.Photos([PHOTOS / "train"], cfg, 64, 0)

    def share(rank, processes):
        acc = SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))
        run = SimpleNamespace(acc=acc, cfg=cfg, seed=0)
        run.batches = partial(Run.batches, run)
        return oscar.latents(run, sd, photos, 7)
    whole, *halves = share(0, 1), share(0, 2), share(1, 2)
    assert [sum(map(len, z)) for z, _ in (whole, *halves)] == [8, 4, 4]  # whole batches
    F_sim, *F_halves = (oscar.F_sim(Qs, z) for z, _ in (whole, *halves))
    assert torch.allclose(F_sim, sum(F_halves) / 2, atol=1e-6)
    G_sim, *G_halves = (oscar.G_sim(torch.cat(z), torch.cat(eps), alpha_bar) for z, eps in (whole, *halves))
    assert torch.allclose(G_sim, sum(G_halves) / 2, atol=1e-6)
    for z, _ in halves:
        pairs = []
        oscar.set_gain(copy.deepcopy(Qs), z, lambda pair: pairs.append(pair) or pair)
        sums.append(torch.stack(pairs))
    square_0, square = sum(sums).T
    oscar.set_gain(Qs, whole[0])
    assert torch.allclose(torch.stack([Q.gain for Q in Qs]), (square_0 / square).sqrt(), rtol=1e-4)


def test_gain_gives_z_tilde_the_rms_of_z_0():
    torch.manual_seed(0)
    Qs = HyperEncoders(Stage1(N=8, M=8, D=4), 16)
    z = [3 * torch.randn(2, 16, 8, 8), torch.randn(1, 16, 16, 8)]
    square = sum(z_0.square().sum() for z_0 in z)
    oscar.set_gain(Qs, z)
    for Q in Qs:
        decoded = sum(Q.decode(Q.encode(z_0)).square().sum() for z_0 in z)
        assert decoded.item() == pytest.approx(square.item(), rel=1e-4)


def test_after_stage_1_a_quantised_latent_is_as_large_as_a_state_of_eq_11(run):
    """On the crops that a real, short stage 1 measured: z_0's RMS, residual noise nearly orthogonal to z_0."""
    tensors, header = read_model(run[0], "oscar", stage=1)
    cfg, sd = Stage1.read(header), SD(TINY_SD, with_unet=False)
    Qs, mapping = HyperEncoders(cfg, 16), json.loads((run[0] / "model" / "mapping.json").read_text())
    load_trained(Qs, tensors, run[0])
    photos = oscar.Photos([PHOTOS / "train"], cfg, 64, 0)
    with torch.no_grad():
        z_0 = sd.encode(torch.stack([photos[n][1] for n in range(cfg.measure)]))
    for name, Q in zip(NAMES, Qs.eval()):
        with torch.no_grad():
            z_tilde = Q.decode(Q.encode(z_0))
        rms, rms_0 = (z.square().mean().sqrt().item() for z in (z_tilde, z_0))
        assert rms == pytest.approx(rms_0, rel=0.05), name
        eps = figures.residual(Q, [z_0], sd.alpha_bar[mapping[name]["t"]])
        assert abs(torch.corrcoef(torch.stack([eps, z_0.flatten()]))[0, 1].item()) < 0.3, name


class NoFloat64(TorchDispatchMode):
    """As a device without float64: MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else (out,):
            assert not isinstance(t, torch.Tensor) or t.dtype != torch.float64, func
        return out


def test_nothing_needs_float64(model):
    image = read_image(PHOTOS / "val" / "chelsea.png")[0].crop((100, 40, 180, 100))
    z_0 = [torch.randn(2, 16, 8, 8)]
    Qs = HyperEncoders(Stage1(N=8, M=8, D=4), 16)
    with NoFloat64():
        oscar.set_gain(Qs, z_0)
        oscar.F_sim(Qs, z_0)
        oscar.G_sim(z_0[0], torch.randn_like(z_0[0]), alpha_bars())
        Qs.train()(z_0[0])
        Qs[0].quantizer.update(0.9, lambda t: t, torch.Generator())
        oscar.decompress(model, oscar.compress(model, image, 3))


# ---- losses


def test_losses_equal_their_formulas():
    torch.manual_seed(0)
    z_0, z = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    vectors = (t.permute(0, 2, 3, 1).reshape(-1, 4).numpy() for t in (z_0, z))
    by_hand = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*vectors)]
    assert oscar.loss_sim(z_0, z).item() == pytest.approx(-np.mean(by_hand), abs=1e-6)
    x, y = torch.rand(1, 3, 8, 8) * 2 - 1, torch.rand(1, 3, 8, 8) * 2 - 1
    assert oscar.loss_mse(x, y).item() == pytest.approx(np.square((x - y).numpy() / 2).mean(), rel=1e-5)
    fake, real = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    bce = F.binary_cross_entropy_with_logits
    assert torch.allclose(oscar.loss_G(fake), bce(fake, torch.ones_like(fake)))
    both = bce(fake, torch.zeros_like(fake)) + bce(real, torch.ones_like(real))
    assert torch.allclose(oscar.loss_D(fake, real), both)


def test_sobel_is_scipys():
    x = torch.rand(1, 3, 20, 30) * 2 - 1
    luma = (((x[0] + 1) / 2).numpy() * np.array([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    g = np.sqrt(ndimage.sobel(luma, 0, mode="nearest")**2 + ndimage.sobel(luma, 1, mode="nearest")**2 + 1e-6)
    assert np.allclose((sobel(x)[0, 1].numpy() + 1) / 2, g, atol=1e-5)
    assert torch.equal(sobel(x)[:, 0], sobel(x)[:, 2])


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    G = OSCAR(TINY_SD, Stage1(N=16, M=16, D=8), [600, 500, 400, 390, 300, 290, 280, 200])
    return G.add_lora(4).train()


def test_denoising_is_eq_3_at_the_rates_own_timestep(generator):
    z = torch.randn(1, 16, 8, 12)
    with torch.no_grad():
        for r in (0, 7):
            t = generator.t[r]
            eps = generator.sd.unet(z, torch.tensor([t]), generator.prompt[None]).sample
            a = float(alpha_bars()[t])
            assert torch.allclose(generator.denoise(z, r), (z - (1 - a)**0.5 * eps) / a**0.5, atol=1e-4)


def test_each_loss_moves_hyper_encoder_lora_and_prompt_and_nothing_else(generator):
    D, dists = Discriminator(TINY_SD, 4), dists_small()
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    z_0 = generator.sd.encode(x)
    z_tilde, l_vq, z_hat, x_hat = generator(z_0, 4)
    with frozen(D):
        losses = {"sim": oscar.loss_sim(z_0, z_tilde), "vq": l_vq, "mse": oscar.loss_mse(x_hat, x),
                  "dists": dists(x_hat, x).mean(), "ea": oscar.loss_ea(dists, x_hat, x),
                  "gan_g": oscar.loss_G(D(z_hat, 0))}
    names, parameters = zip(*((n, p) for n, p in generator.named_parameters() if p.requires_grad))
    assert all("lora_" in n or n.startswith(("hyper_encoders.", "prompt")) for n in names)
    Q = generator.hyper_encoders[4]
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        moved = {n for n, g in zip(names, grads) if g is not None and g.abs().sum() > 0}
        rates = {n.split(".")[1] for n in moved if n.startswith("hyper_encoders.")}
        assert rates == {"4"}, name  # this rate's alone
        assert ("hyper_encoders.4.proj.0.weight" in moved) == (name != "vq"), name
        assert "hyper_encoders.4.backbone.0.weight" in moved, name
        assert any("lora_B" in n for n in moved) == ("prompt" in moved) == (name not in ("sim", "vq")), name
    Q.quantizer.pending.clear()
    oscar.loss_D(*D(torch.cat([z_hat.detach(), z_0]), 0).chunk(2)).backward()
    assert all(p.grad is None for p in generator.parameters())
    moved = {n.split(".")[0] for n, p in D.named_parameters() if p.grad is not None}
    assert moved == {"unet", "prompt", "head"}


# ---- the file format


@pytest.fixture(scope="module")
def codec():
    """What parse_file asks of a model, for SD 2.1's sizes."""
    sd = SimpleNamespace(f=8, vae=SimpleNamespace(config=SimpleNamespace(latent_channels=4)))
    return SimpleNamespace(cells=[8 * s for s in S], digest=b"\xab\xcd", true_norms=False, sd=sd)


def shape(r, width, height):
    return tuple(math.ceil(n / (8 * S[r])) for n in (height, width))


@pytest.mark.parametrize("r", range(8))
def test_indices_survive_packing(codec, r):
    rows, cols = shape(r, 130, 70)
    streams = [rng(r, i).integers(0, V[r], (rows, cols)) for i in range(20)]
    streams += [np.full((rows, cols), k) for k in (0, V[r] - 1, V[r] // 2, 1)]
    streams += [np.arange(rows * cols).reshape(rows, cols) % V[r]]
    for idx in streams:
        data = write_file(r, (130, 70), idx, codec.digest)
        got = parse_file(data, codec)
        assert got[:2] == (r, (130, 70)) and np.array_equal(got[2], idx) and got[3] == b""
        bits = "".join(f"{i:0{V[r].bit_length() - 1}b}" for i in idx.ravel())  # a plain reading of the format
        length = math.ceil(len(bits) / 8)
        assert data[10:-4] == int(bits.ljust(length * 8, "0"), 2).to_bytes(length, "big")


@pytest.mark.parametrize("r", range(8))
def test_a_file_is_14_bytes_longer_than_its_indices(codec, r):
    idx = np.zeros(shape(r, 768, 512), int)
    nominal = 768 * 512 * BPP[r] / 8
    assert len(write_file(r, (768, 512), idx, codec.digest)) == nominal + 14
    assert len(write_file(r, (768, 512), idx, codec.digest, b"\1\2\3\4")) == nominal + 18
    assert len(write_file(r, (2**16 - 1, 1), np.zeros((0, 0), int), codec.digest)) == 14


def test_norms_travel(codec):
    codec = SimpleNamespace(**{**vars(codec), "true_norms": True})
    data = write_file(2, (64, 64), np.ones((4, 4), int), codec.digest, bytes([1, 2, 250, 255]))
    assert parse_file(data, codec)[3] == bytes([1, 2, 250, 255])
    z_0 = torch.randn(1, 4, 30, 40) * torch.tensor([0.1, 0.5, 2.0, 7.0]).view(1, 4, 1, 1)
    exact = z_0.square().mean((0, 2, 3)).sqrt()
    assert torch.allclose(oscar.read_norms(oscar.write_norms(z_0)), exact, rtol=0.014)


# Written by version 3, from (37 k + 5) mod 1024, k = 0 .. 14, in 10 bits each.
STORED = bytes.fromhex("4f533001abcd82004600"
                       "0142a13c74264be38d084b5525dd9c705e682cc82f064b")


def test_a_stored_file_of_version_3_still_parses(codec):
    r, size, idx, norms = parse_file(STORED, codec)
    assert (NAMES[r], size, norms) == ("0.0098", (130, 70), b"")
    assert idx.shape == (3, 5) and idx.ravel().tolist() == [(37 * k + 5) % 1024 for k in range(15)]
    assert write_file(r, size, idx, codec.digest) == STORED


def with_checksum(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


def test_a_thousand_mutations_are_refused_or_parse_and_allocate_nothing(codec, monkeypatch):
    """Cut, flipped, lengthened, spliced; half of them with a checksum that fits, as a malicious file has."""
    sizes = []
    real = oscar.unpack_bits

    def measured(data, number, bits):
        sizes.append(number * bits / 8 - len(data))
        return real(data, number, bits)
    monkeypatch.setattr(oscar, "unpack_bits", measured)
    originals = [write_file(r, (130, 70), rng(r).integers(0, V[r], shape(r, 130, 70)), codec.digest)
                 for r in range(8)]
    refused, began = 0, time.time()
    for i in range(1000):
        g = rng(1000, i)
        data, kind = bytearray(originals[i % 8][:-4]), g.integers(5)
        at = int(g.integers(min(len(data), 16 if g.random() < 0.7 else 10**9)))  # headers above all
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data[at] ^= 1 << int(g.integers(8))
        elif kind == 2:
            data[at:at] = g.bytes(int(g.integers(1, 9)))
        elif kind == 3:
            data[at:at + int(g.integers(1, 6))] = g.bytes(int(g.integers(1, 6)))
        else:
            data += g.bytes(int(g.integers(1, 200)))
        fits = g.random() < 0.5
        mutated = with_checksum(bytes(data)) if fits else bytes(data) + originals[i % 8][-4:]
        if mutated == originals[i % 8]:
            continue
        try:
            r, size, idx, _ = parse_file(mutated, codec)
            assert fits and idx.shape == shape(r, *size) and idx.max() < V[r]
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 700 and time.time() - began < 20
    assert max(sizes) <= 0  # never more indices than the file's bytes hold


@pytest.mark.parametrize("change, says", [
    (lambda d: b"", "empty"), (lambda d: b"\x89PNG\r\n" + d, "not an OSCAR file"),
    (lambda d: d[:2], "checksum"), (lambda d: d[:20], "checksum"), (lambda d: d + b"x", "checksum"),
    (lambda d: with_checksum(d[:2] + b"\x20" + d[3:-4]), "version 2 of the format; .* reads version 3"),
    (lambda d: with_checksum(d[:2] + b"\x31" + d[3:-4]), "another model"),
    (lambda d: with_checksum(d[:4] + b"zz" + d[6:-4]), "another model"),
    (lambda d: with_checksum(d[:3] + b"\x08" + d[4:-4]), "bit-rate number 8"),
    (lambda d: with_checksum(d[:6] + b"\0\0" + d[8:-4]), "claims 0 x 70"),
    (lambda d: with_checksum(d[:6] + b"\xff\xff\xff\xff" + d[10:-4]), "claims 65535 x 65535"),
    (lambda d: with_checksum(d[:6] + b"\x02\x02" + d[8:-4]), "need")])
def test_each_kind_of_bad_file_has_its_line(codec, change, says):
    with pytest.raises(UserError, match=says):
        parse_file(change(STORED), codec)


# ---- the command line


SHORT = ["--s1-N", 16, "--s1-M", 16, "--s1-D", 8, "--s1-crop", 64, "--s1-batch", 2, "--s1-measure", 8,
         "--s2-crop", 64, "--s2-batch", 2, "--s1-save-every", 2, "--s2-save-every", 2]


def make_val(folder):
    Image.open(PHOTOS / "val" / "chelsea.png").crop((100, 40, 233, 131)).save(folder / "cat.png")
    return folder


@pytest.fixture(scope="session")
def val(tmp_path_factory):
    return make_val(tmp_path_factory.mktemp("val"))


def train_args(out, val):
    return [str(a) for a in ("train", "--out", out, "--s1-steps", 4, "--s2-steps", 4, "--val", val, *SHORT)]


@pytest.fixture(scope="session")
def run(tmp_path_factory, val):
    """The default command line, at reduced steps and widths, from a folder that is not the repo's."""
    out = tmp_path_factory.mktemp("oscar") / "run"
    return out, said_by(oscar.main, train_args(out, val), tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="session")
def model(run):
    return oscar.load(run[0])


def test_train_end_to_end(run):
    out, printed = run
    for said in ("stage 1 on", "stage 2 on", "|grad sim|", "|grad gan_g|", "the release's t", "OSCAR 0.1250",
                 "JPEG, quality 1", "VAE alone", "rd.png"):
        assert said in printed
    norms = next(line for line in printed.splitlines() if "|grad gan_g|" in line)
    assert float(norms.split()[-1]) > 0  # the released code's is exactly 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [(s, i) for s in (1, 2) for i in range(4)]
    assert {f"{k}@{name}" for k in ("cos", "live") for name in NAMES} <= rows[0].keys()
    l_sim = -next(v for k, v in rows[-1].items() if k.startswith("cos@"))
    assert rows[-1]["repa"] == pytest.approx(rows[-1]["vq"] + l_sim, abs=1e-6)
    drawn = [NAMES[int(rng(0, 5, step).integers(8))] for step in range(4)]  # a rate a step
    assert [[k[4:] for k in row if k.startswith("cos@")] for row in rows[4:]] == [[name] for name in drawn]
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert files == {"config.json", "log.jsonl", "metrics.json", "samples/eval.png", "samples/rd.png",
                     "last/stage1.safetensors", "last/stage2.safetensors", "model/mapping.json",
                     "model/stage1.safetensors", "model/stage2.safetensors"}
    mapping = json.loads((out / "model" / "mapping.json").read_text())
    header = load_tensors(out / "model" / "stage2.safetensors")[1]
    assert header["t"] == [mapping[name]["t"] for name in NAMES]
    results = json.loads((out / "metrics.json").read_text())["results"]
    for r, name in enumerate(NAMES):
        padded = {1: 136 * 96, 2: 144 * 96, 4: 160 * 96, 8: 192 * 128}[S[r]]  # from 133 x 91
        frame = results[f"OSCAR {name}"]["bpp"] * 133 * 91 / 8 - padded * BPP[r] / 8
        assert 13.999 < frame < 15


def test_decompress_equals_the_in_memory_reconstruction_for_any_size(model, run, tmp_path, monkeypatch):
    """compress and decompress as commands, against hyper-encoder, UNet and VAE called one by one."""
    monkeypatch.setattr(oscar, "load", lambda *_: model)  # eight times the same
    photo, source = Image.open(PHOTOS / "val" / "chelsea.png"), tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    boxes = {"odd": (121, 135), "deep/even": (128, 64), "one": (1, 1), "wide": (201, 3), "eights": (72, 104)}
    for name, (w, h) in boxes.items():
        photo.crop((90, 60, 90 + w, 60 + h)).save(source / f"{name}.png")
    for r in (0, 3, 4, 7):
        files, images = tmp_path / f"files{r}", tmp_path / f"images{r}"
        oscar.main(["compress", str(source), str(files), "--bpp", NAMES[r], "--weights", str(run[0])])
        oscar.main(["decompress", str(files), str(images), "--weights", str(run[0])])
        for name, (w, h) in boxes.items():
            image = read_image(source / f"{name}.png")[0]
            x = oscar.pad_to(oscar.to_tensor(image)[None], 8 * S[r])
            with torch.inference_mode():
                Q = model.hyper_encoders[r]
                z_hat = model.denoise(Q.decode(Q.encode(model.sd.encode(x))), r)
                expected = oscar.to_image(model.sd.decode(z_hat)[0, :, :h, :w])
            length = math.ceil(math.prod(shape(r, w, h)) * math.log2(V[r]) / 8) + 14
            assert len((files / f"{name}.oscar").read_bytes()) == length, (name, NAMES[r])
            got = Image.open(images / f"{name}.png")
            assert got.size == (w, h), (name, NAMES[r])
            assert np.array_equal(np.asarray(got), np.asarray(expected)), (name, NAMES[r])


@pytest.mark.parametrize("r", [0, 3, 4])
def test_tiles_keep_the_picture_and_the_file_readable(model, r):
    image = read_image(PHOTOS / "val" / "chelsea.png")[0].resize((300, 330))
    data = oscar.compress(model, image, r, tile=256)
    assert len(data) == len(oscar.compress(model, image, r))
    whole, tiles = (np.asarray(oscar.decompress(model, data, tile)).astype(float) for tile in (None, 256))
    assert whole.shape == tiles.shape == (330, 300, 3)
    assert 0 < np.abs(whole - tiles).mean() < 0.1 * whole.std()


def test_alpha_is_dropped_and_said_so(model, run, tmp_path, capsys):
    image = Image.new("RGBA", (40, 30), (200, 10, 10, 128))
    image.save(tmp_path / "a.png")
    a, b, weights = str(tmp_path / "a"), str(tmp_path / "b.png"), ["--weights", str(run[0])]
    oscar.main(["compress", f"{a}.png", f"{a}.oscar", "--bpp", "0.0625", *weights])
    assert "alpha" in capsys.readouterr().out
    oscar.main(["decompress", f"{a}.oscar", b, *weights])
    assert Image.open(b).mode == "RGB"


def test_a_picture_longer_than_a_file_can_say_is_named_and_the_others_done(run, tmp_path, capsys):
    Image.new("RGB", (2**16, 1)).save(tmp_path / "long.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "short.png")
    with pytest.raises(UserError, match="1 of 2"):
        oscar.main(["compress", str(tmp_path), str(tmp_path / "out"), *AT, str(run[0])])
    assert "long.png: 65536 x 1 pixels; a file holds 65535 a side" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["short.oscar"]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, tmp_path, val, monkeypatch):
    """Stopped by Ctrl-C within both stages, resumed each time: codebooks, mapping and losses are the same."""
    out, args, real = tmp_path / "run", train_args(tmp_path / "run", val), oscar.update_codebook
    for stop in (("stage1", 3), ("stage2", 3)):
        def interrupted(run, Q, r, decay, step, seed):
            if (run.stage, step) == stop:
                raise KeyboardInterrupt
            real(run, Q, r, decay, step, seed)
        monkeypatch.setattr(oscar, "update_codebook", interrupted)
        with pytest.raises(KeyboardInterrupt):
            oscar.main([*args, *(["--resume"] if (out / "config.json").exists() else [])])
        monkeypatch.setattr(oscar, "update_codebook", real)
    oscar.main([*args, "--resume"])
    same_run(out, run[0], "model/mapping.json")


def test_two_processes_give_the_losses_of_one(run, two_processes, tmp_path, val):
    """Both stages: the codebooks see all processes' vectors. (Later steps part a little, once rounding has
    sent one vector to another of two codes about as near.)"""
    two_processes("oscar", train_args(tmp_path / "run", val))
    one, two = ([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
                for folder in (run[0], tmp_path / "run"))
    assert len(one) == len(two) == 8
    G_one, G_two = (json.loads((folder / "model" / "mapping.json").read_text())["G_sim"]
                    for folder in (run[0], tmp_path / "run"))  # each process measured half of the crops
    assert G_one == pytest.approx(G_two, abs=1e-5)
    for a, b in zip(one, two):
        near = {"rel": 1e-3, "abs": 1e-4} if a["step"] < 2 else {"rel": 0.2, "abs": 0.2}
        assert {k: pytest.approx(v, **near) for k, v in a.items()} == b


# ---- the paper's ablations, figures, complexity


def test_ablations(run, tmp_path, val, capsys, no_evaluation):
    out = tmp_path / "run"
    oscar.main([*train_args(out, val), "--no-alignment", "--s2-steps", "1", "--losses", "dists,gan"])
    assert not (out / "model" / "stage1.safetensors").exists()
    assert oscar.load(out).t == list(oscar.RELEASED_T)
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    cfg = Stage2()
    loss = cfg.lambda_repa * row["repa"] + cfg.lambda_dists * row["dists"] + cfg.lambda_2 * row["gan_g"]
    assert row["loss"] == pytest.approx(loss, rel=1e-4)
    assert row["repa"] == row["vq"]  # no L_sim


def test_mappings(run, tmp_path):
    def chosen(mapping, seed=0):
        return oscar.choose_mapping(Stage2(mapping=str(mapping)), None, 1000, seed)
    t = chosen("random")
    assert t == chosen("random") != chosen("random", 1)
    assert len(t) == 8 and 0 <= min(t) and max(t) < 1000
    assert chosen(run[0] / "model" / "mapping.json") == oscar.load(run[0]).t
    for bad in ('{"0.0019": {"t": 3}}', "no JSON", "[]"):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(UserError, match="not one like a run's"):
            chosen(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text(json.dumps({name: {"t": 1000} for name in NAMES}))
    with pytest.raises(UserError, match="must lie in"):
        chosen(tmp_path / "bad.json")


def test_residual_of_a_true_diffusion_state_is_gaussian():
    torch.manual_seed(0)
    z = [torch.randn(2, 16, 32, 32)]
    eps = figures.residual(Noise(300), z, alpha_bars()[300])
    assert abs(eps.mean()) < 0.01 and eps.std() == pytest.approx(1, abs=0.01) and len(eps) == 2 * 16 * 32 * 32


def test_figures(run, capsys):
    oscar.main(["figures", "--weights", str(run[0])])
    said = capsys.readouterr().out
    for name in ("fig2", "fig4", "fig8"):
        assert Image.open(run[0] / "samples" / f"{name}.png").width > 500
    assert "0.1250 bpp, after" in said


RATES_OF_A_CODEC = [(0.1, 20.0), (0.2, 24.0), (0.45, 27.0), (0.8, 29.5), (1.3, 31.0)]


def test_bd_rate_has_its_closed_forms():
    halved = [(bpp / 2, quality) for bpp, quality in RATES_OF_A_CODEC]
    assert evaluate.bd_rate(halved, RATES_OF_A_CODEC) == pytest.approx(-50)
    assert evaluate.bd_rate(RATES_OF_A_CODEC, halved) == pytest.approx(100)
    assert evaluate.bd_rate(RATES_OF_A_CODEC, RATES_OF_A_CODEC) == pytest.approx(0, abs=1e-9)
    # log rate 0.2 q - 6 against 0.1 q - 4, over the qualities 22 to 30 that both have: their mean difference
    one, two = ([(math.exp(a * q + b), q) for q in qs]
                for a, b, qs in ((0.2, -6, (18, 21, 24, 27, 30)), (0.1, -4, (22, 26, 30, 34))))
    assert evaluate.bd_rate(one, two) == pytest.approx(100 * math.expm1(0.1 * 26 - 2))
    better = [(bpp, quality + 20) for bpp, quality in RATES_OF_A_CODEC]
    assert evaluate.bd_rate(better, RATES_OF_A_CODEC) is None  # no quality that both reach
    assert evaluate.bd_rate(RATES_OF_A_CODEC[:3], RATES_OF_A_CODEC) is None
    assert evaluate.text_table([""], [[evaluate.bd_rate([], halved)]]).split()[-1] == "-"


def test_eval_measures_as_the_paper_does(run, tmp_path, val, monkeypatch, capsys):
    """Central pixels, MUSIQ and CLIPIQA (here: any two numbers), BD-rates against a codec."""
    asked, out = [], changed(run[0], tmp_path / "run", {})
    monkeypatch.setattr(evaluate, "pyiqa_metric", lambda name: asked.append(name) or (lambda x: x.mean()))
    oscar.main(["eval", "--weights", str(out), "--data", str(val), "--metrics", "all", "--centre", "64",
                "--anchor", "JPEG"])
    assert asked == ["musiq", "clipiqa"]
    metrics = json.loads((out / "metrics.json").read_text())
    results = metrics["results"]
    for r, name in enumerate(NAMES):  # of 133 x 91 pixels, 64 x 64
        assert results[f"OSCAR {name}"]["bpp"] == pytest.approx(BPP[r] + 14 * 8 / 64**2)
    cat = read_image(val / "cat.png")[0]
    buffer = io.BytesIO()
    cat.crop((34, 13, 98, 77)).save(buffer, "JPEG", quality=50, optimize=True)
    assert results["JPEG, quality 50"]["bpp"] == pytest.approx(8 * len(buffer.getvalue()) / 64**2)
    assert {k for k in results if k.startswith("WebP")} == {"WebP, quality 0"}
    assert metrics["bd_rate"].keys() == {"PSNR", "SSIM", "LPIPS-VGG", "DISTS", "MUSIQ", "CLIPIQA"}
    assert "BD-rate of OSCAR against JPEG" in capsys.readouterr().out
    panels = [k for k in metrics["bd_rate"] if results["VAE alone"][k] is not None]
    assert {"MUSIQ", "CLIPIQA"} < set(panels)
    assert Image.open(out / "samples" / "rd.png").width == pytest.approx(len(panels) * 4.5 * 110, abs=1)


def test_profile_times_hyper_encoders_as_inference_has_them(monkeypatch, capsys):
    """In float32, where VAE and UNet are in bf16, as on CUDA."""
    monkeypatch.setattr(common, "INFERENCE_DTYPE", torch.bfloat16)
    monkeypatch.setattr(complexity, "seconds", lambda call: call() is None or 1.0)
    seen, full = [], collections.defaultdict(int)

    def parts(G, x):
        seen.append((G.sd.unet.dtype, {p.dtype for p in G.hyper_encoders.parameters()}))
        return complexity.oscar_parts(G, x, 2)
    build = partial(complexity.oscar_model, oscar, TINY_SD, Stage1(), Stage2())
    complexity.print_times(build, parts, (64, 64), (), full)
    assert seen == [(torch.bfloat16, {torch.float32})]


def test_profile_counts_the_papers_model(capsys):
    oscar.main(["profile", "--paper", "--size", "768x512", "--no-time"])
    said = capsys.readouterr().out
    assert "965.9 M parameters (the paper: 965.9 M)" in said and "one image of 768 x 512 pixels" in said
    rows = {line.split()[0]: line.split()[2:6] for line in said.splitlines() if " bpp " in line}
    assert rows["0.0019"] == ["8", "256", "16.57", "M"] and rows["0.1250"] == ["1", "256", "7.41", "M"]


# ---- bad input


@pytest.mark.parametrize("args, says", [
    (["compress", "{photo}", "{tmp}/x.oscar", "--bpp", "0.5"], ", ".join(NAMES)),
    (["compress", "{photo}", "{tmp}/x.oscar", "--bpp", "lots"], "0.0019"),
    (["compress", "{photo}", "{tmp}/x.oscar"], "--bpp"),
    (["compress", "{tmp}/none.png", "{tmp}/x.oscar", *AT, "{run}"], "no such file"),
    (["compress", "{photo}", "{photo}/x.oscar", *AT, "{run}"], "cannot be written"),
    (["compress", "{photo}", "{tmp}/x.oscar", *AT, "{tmp}"], "no such file; oscar.py train"),
    (["compress", "{photo}", "{tmp}/x.oscar", *AT, "{run}", "--tile", "100"], "--tile 100"),
    (["decompress", "{photo}", "{tmp}/x.png", "--weights", "{run}"], "not an OSCAR file"),
    (["decompress", "{tmp}/empty.oscar", "{tmp}/x.png", "--weights", "{run}"], "empty"),
    (["decompress", "{tmp}", "{tmp}/out", "--weights", "{run}"], "2 of 2"),
    (["decompress", "{tmp}/none", "{tmp}/x.png", "--weights", "{run}"], "no such file"),
    (["decompress", "{tmp}/pictures", "{tmp}/out", "--weights", "{run}"], "nor a folder of .oscar files"),
    (["train", "--out", "{run}"], "--resume"),
    (["train", "--mapping", "{tmp}/none.json", "--out", "{tmp}/r"], "none.json"),
    (["train", "--losses", "mse,lpips", "--out", "{tmp}/r"], "lpips"),
    (["train", "--s1-crop", "100", "--out", "{tmp}/r"], "multiple of 64"),
    (["train", "--stage", "2", "--out", "{tmp}/r"], "stage 1 first"),
    (["eval", "--weights", "{run}", "--centre", "0"], "--centre 0: must be at least 1"),
    (["eval", "--weights", "{run}", "--anchor", "BPG"], "JPEG"),
    (["profile", "--size", "0"], "--size")])
def test_bad_input_is_one_line(run, tmp_path, capsys, args, says):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "empty.oscar").write_bytes(b"")
    (tmp_path / "cut.oscar").write_bytes(STORED[:25])
    names = {"photo": PHOTOS / "val" / "chelsea.png", "tmp": tmp_path, "run": run[0]}
    before = {p for p in tmp_path.rglob("*")}
    with pytest.raises((UserError, SystemExit)) as stopped:
        oscar.main([a.format(**names) for a in args])
    message = capsys.readouterr().err + ("" if stopped.type is SystemExit else str(stopped.value))
    assert says.format(**names) in message
    assert stopped.type is UserError or stopped.value.code == 2
    made = {p for p in tmp_path.rglob("*") if p.is_file() and p.suffix in (".png", ".oscar")}
    assert made <= before  # nothing half-written


def changed(run, out, header, tensors=lambda t: None):
    """A copy of a run's model with parts of its header or tensors changed."""
    path = out / "model" / "stage2.safetensors"
    weights, recorded = load_tensors(run / "model" / path.name)
    tensors(weights)
    save_tensors(path, weights, **recorded | header)
    return out


@pytest.mark.parametrize("header, says", [
    ({"script": "codiff"}, "not made by oscar.py"), ({"fingerprint": "0" * 64}, "another base"),
    ({"stage1.N": 8}, "does not fit")])
def test_models_of_other_scripts_bases_or_sizes_are_refused(run, tmp_path, header, says):
    with pytest.raises(UserError, match=says):
        oscar.load(changed(run[0], tmp_path / "run", header))


def test_a_model_of_other_rates_is_refused(run, monkeypatch):
    monkeypatch.setattr(oscar, "RATES", {**RATES, "0.0019": (8, 512)})
    with pytest.raises(UserError, match="does not fit"):
        oscar.load(run[0])


def test_a_file_of_another_model_is_refused(model, run, tmp_path, val):
    other = oscar.load(changed(run[0], tmp_path / "run", {}, lambda tensors: tensors["prompt"].add_(0.01)))
    data = oscar.compress(other, Image.open(val / "cat.png"), 4)
    with pytest.raises(UserError, match="another model"):
        oscar.decompress(model, data)
    assert oscar.decompress(other, data).size == (133, 91)
