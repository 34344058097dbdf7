"""What makes it fast changes nothing: precision, kernels, compiled graphs, threads."""

import ast
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.autoencoders.vae import Decoder
from torch import nn

import codiff
import common
from common import SD, TINY_SD
from conftest import CAT, SCRIPTS, AnywhereHalf, same_run, train_args
from data import speed, tiles
from data.files import ROOT, UserError, each_file, load_part, load_tensors
from data.pictures import at_once
from data.runs import Run

# ---- threads


@pytest.mark.parametrize("theirs", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_openmps_threads_wait_as_the_user_says_or_briefly(theirs):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    clean = {k: v for k, v in os.environ.items() if k not in names}
    code = f"import data, os, json; print(json.dumps([os.environ.get(k) for k in {names}]))"
    said = subprocess.run([sys.executable, "-c", code], env=clean | theirs, cwd=ROOT, capture_output=True)
    found = json.loads(said.stdout)
    assert found == [theirs.get(k) for k in names] if theirs else found in ([None, "10000"], ["PASSIVE", None])


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_say_so_before_torch_loads(script):
    imports = [node.names[0].name if isinstance(node, ast.Import) else node.module
               for node in ast.parse((ROOT / f"{script}.py").read_text()).body
               if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [name for name in imports if name.split(".")[0] not in sys.stdlib_module_names][0] == "common"
    shared = (ROOT / "common.py").read_text()
    assert shared.index("\nimport data ") < shared.index("\nimport torch\n")


# ---- folders


def test_files_are_done_together_and_told_in_order(tmp_path, capsys):
    at_work, most = [], []

    def work(file, target, turn):
        if file.name == "c":
            raise KeyError("odd")
        with turn:
            at_work.append(file)
            most.append(len(at_work))
            time.sleep(0.2 if file.name == "a" else 0.02)  # the first is the last to end
            at_work.remove(file)
        return file.name
    for limit in (1, 2):
        most.clear()
        with pytest.raises(UserError, match="1 of 6"):
            each_file([(tmp_path / k, tmp_path / "out") for k in "abcdef"], "restore", work, limit)
        out, err = capsys.readouterr()
        assert [line[-2] for line in out.splitlines()] == [*"abdef"] and "c: failed" in err
        assert max(most) == limit


def test_ctrl_c_ends_the_threads_and_no_file_is_torn(tmp_path):
    ended = []

    def work(file, target, turn):
        try:
            if file.name == "b":
                time.sleep(0.2)
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            for _ in range(2000):
                time.sleep(0.005)
        finally:
            ended.append(file)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs lack
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        each_file([(tmp_path / k, tmp_path / "out") for k in "abcdefgh"], "restore", work, 2)
    signal.signal(signal.SIGINT, before)
    assert len(ended) == 4 and time.monotonic() - began < 5


def test_two_pictures_at_a_time_where_they_are_small(tmp_path):
    small, large, none = (tmp_path / name for name in ("small.png", "large.png", "none.png"))
    CAT.save(small), CAT.resize((1200, 1000)).save(large)
    assert [at_once([(f, f)], tiled) for f, tiled in
            ((small, False), (none, False), (large, False), (small, True))] == [2, 2, 1, 1]


# ---- precision


def gpu(monkeypatch, bf16: bool) -> None:
    """A GPU that has bf16, or emulates it as a T4 does, and says that it has it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16)


@pytest.mark.parametrize("has, name, expected, said", [
    ("bf16", None, "bf16", ""), ("bf16", "float32", "float32", ""), ("bf16", "fp16", "bf16", "goes on with bf16"),
    ("fp16", None, "fp16", ""), ("fp16", "bf16", "fp16", "goes on with fp16"), ("fp16", "float32", "float32", ""),
    (None, None, "float32", ""), (None, "fp16", "float32", "goes on with float32")])
def test_precision_is_what_the_hardware_has(monkeypatch, capsys, has, name, expected, said):
    monkeypatch.setattr(speed, "chosen", None)
    if has:
        gpu(monkeypatch, has == "bf16")
    speed.choose(SimpleNamespace(precision=name))
    err = capsys.readouterr().err
    assert speed.name_of(speed.dtype()) == expected and said in err and err.count("\n") == bool(said)


def small_unet():
    """tiny-sd's UNet with LoRA that is not zero, and what it takes."""
    torch.manual_seed(0)
    unet = load_part(UNet2DConditionModel, TINY_SD, "unet").requires_grad_(False)
    common.add_lora(unet, 2)
    for name, p in unet.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    return unet, (torch.randn(1, unet.config.in_channels, 16, 16), 99, torch.randn(1, 77, unet.config.cross_attention_dim))


def outcome(unet, inputs) -> list[torch.Tensor]:
    """A UNet's output, and the gradients of what it trains."""
    out = unet(*inputs).sample.float()
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [p for p in unet.parameters() if p.requires_grad])]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_frozen_weights_in_half_precision_are_autocasts_copies(half):
    unet, inputs = small_unet()
    with torch.autocast("cpu", half):
        before = outcome(unet, inputs)
    size = sum(p.nbytes for p in unet.parameters())
    speed.for_training([unet], torch.device("cpu"), half)
    kinds = {p.requires_grad: p.dtype for p in unet.parameters() if p.ndim > 1}
    assert kinds == {True: torch.float32, False: half} and sum(p.nbytes for p in unet.parameters()) < 0.6 * size
    with torch.autocast("cpu", half):
        assert all(map(torch.equal, outcome(unet, inputs), before))


def test_networks_of_one_base_keep_its_frozen_weights_once():
    unet, inputs = small_unet()
    D, before = common.Discriminator(TINY_SD, 2), outcome(unet, inputs)
    changed = D.unet.down_blocks[0].resnets[0].conv1.base_layer.weight
    changed.data += 1  # not the base's any more
    own = changed.clone()
    speed.for_training([unet, D], torch.device("cpu"), torch.float32)

    def frozen(network):
        return {p.data_ptr(): p for p in network.parameters() if not p.requires_grad and p.ndim > 1}
    alone = [p for pointer, p in frozen(D).items() if pointer not in frozen(unet)]
    assert len(frozen(D)) > 20 and len(alone) == 1 and torch.equal(alone[0], own)
    assert all(map(torch.equal, outcome(unet, inputs), before))


def test_two_optimizers_share_a_scaler(monkeypatch):
    """Each unscales its own gradients alone: the other's are a part of what a step sums up."""
    monkeypatch.setattr(AnywhereHalf, "growth_interval", 100)

    def trained(precision):
        torch.manual_seed(0)
        AcceleratorState._reset_state()
        acc = AnywhereHalf(mixed_precision=precision, cpu=True, gradient_accumulation_steps=2)
        G, D = (nn.Linear(3, 3) for _ in range(2))
        G, D, opt_G, opt_D = acc.prepare(G, D, *(torch.optim.SGD(m.parameters(), 0.1) for m in (G, D)))
        for x in torch.randn(4, 5, 3):
            with acc.accumulate(G, D), acc.autocast():
                for module, optimizer in ((G, opt_G), (D, opt_D)):
                    acc.backward(module(x).float().square().mean())
                    common.clip(acc, optimizer, 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
        return torch.cat([p.detach().flatten() for m in (G, D) for p in m.parameters()])
    exact, half = trained("no"), trained("fp16")
    AcceleratorState._reset_state()
    assert torch.allclose(exact, half, atol=1e-3)


@pytest.mark.usefixtures("no_evaluation")
def test_a_run_in_float16_resumes_with_its_scaler(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(speed, "dtype", lambda: torch.float16)
    monkeypatch.setattr(accelerate, "Accelerator", AnywhereHalf)
    flags = ["--stage", 1, "--s1-save-every", 4, "--s1-steps", 6]
    args = [train_args("codiff", tmp_path / name, photos, *flags) for name in ("whole", "killed")]
    codiff.main(args[0])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        log = Run.log

        def killed(run, step, **values):
            if step == 5:
                raise KeyboardInterrupt
            log(run, step, **values)
        patch.setattr(Run, "log", killed)
        codiff.main(args[1])
    scaler = load_tensors(tmp_path / "killed" / "last" / "stage1.safetensors")[0]["scaler"]
    assert scaler["scale"] > 2**12 and scaler["_growth_tracker"] > 0  # it has grown, and is under way again
    codiff.main([*args[1], "--resume"])
    same_run(tmp_path / "whole", tmp_path / "killed")
    AcceleratorState._reset_state()


def test_a_picture_out_of_range_is_refused():
    with pytest.raises(UserError, match="--precision float32"):
        common.to_image(torch.full((3, 4, 4), torch.inf))


# ---- kernels


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 1)])
def test_merged_upsampling_is_upsampling_and_convolution(size):
    conv = nn.Conv2d(6, 5, 3, padding=1)
    x = torch.randn(2, 6, *size)
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert torch.allclose(speed.merged(conv)(x), expected, atol=2e-6)


@pytest.mark.parametrize("on", ["cpu", "mps"])
def test_a_rewritten_vae_is_the_same_function(on):
    sd = SD(TINY_SD, with_unet=False)
    x = common.to_tensor(CAT.crop((0, 0, 96, 64)))[None]
    with torch.inference_mode():
        z = sd.encode(x)
        expected = z, sd.decode(z)
        speed.for_inference(sd, on)
        assert torch.allclose(sd.encode(x), expected[0], atol=1e-5)
        assert torch.allclose(sd.decode(z), expected[1], atol=2e-6 if on == "cpu" else 1e-5)


def test_attention_in_chunks_is_attention():
    attn = load_part(AutoencoderKL, TINY_SD, "vae").encoder.mid_block.attentions[0]
    x = torch.randn(1, attn.to_q.in_features, 67, 63)  # 4,221 queries: two chunks
    with torch.inference_mode():
        expected = attn(x)
        attn.set_processor(speed.ChunkedAttention())
        assert torch.allclose(attn(x), expected, atol=1e-5)


def test_compiled_networks_are_the_same_functions(monkeypatch):
    monkeypatch.setattr(speed, "BACKEND", "aot_eager")
    torch.manual_seed(0)
    net = Decoder(4, block_out_channels=(8,), norm_num_groups=4)
    z = torch.randn(1, 4, 8, 8)

    def outcome():
        out = net(z)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [*net.parameters()])]
    before, names = outcome(), [*net.state_dict()]
    speed.compile_for(speed.PAYS_BACK - 1, [net], "cuda")  # too few steps are left
    assert net._compiled_call_impl is None
    monkeypatch.setattr(speed, "compiled", True)
    speed.compile_for(1, [net], "cpu")
    assert net._compiled_call_impl and names == [*net.state_dict()]
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(outcome(), before))
    torch._dynamo.reset()


def test_where_nothing_can_be_compiled_it_goes_on(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no C compiler\nmore of it")
    monkeypatch.setattr(speed, "BACKEND", broken)
    net = SD(TINY_SD, with_unet=False).vae
    speed.compile_networks([net], "cpu")
    assert net.decoder._compiled_call_impl is None
    err = capsys.readouterr().err
    assert err.startswith("--compile: does not work here (") and err.count("\n") == 1


def test_compiled_graphs_and_windows_do_not_mix(capsys, monkeypatch):
    monkeypatch.setattr(speed, "compiled", None)
    speed.choose(SimpleNamespace(compile=True, tile=512))
    assert speed.compiled is False and "--compile: not with --tile" in capsys.readouterr().err


def test_apples_gpus_work_in_windows(monkeypatch, capsys):
    model = nn.Conv2d(1, 1, 1)
    model.stride, model.cell = 32, 32
    monkeypatch.setattr(tiles, "device", lambda: torch.device("mps"))
    for tile, expected, said in ((None, 768, ""), (512, 512, ""), (1024, 768, "at most 768")):
        assert tiles.tiling(model, tile)((2000, 2000)).size == expected // 32
        assert said in capsys.readouterr().err
    monkeypatch.undo()
    assert tiles.tiling(model, None) is tiles.untiled
