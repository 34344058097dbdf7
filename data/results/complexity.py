"""Parameters, multiply-accumulates, time and memory of inference, part by part.

    python codiff.py profile --paper --size 1024 --no-time       as for all four scripts

Counting happens on the meta device: no weights are loaded, no memory is needed. MACs are counted twice: as
the papers do (convolutions and linear layers, LoRA not fused), and in full (all products, LoRA fused)."""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import ROOT, SD, TINY_SD, UserError, device, read_json
from data.results.evaluate import peak_memory, text_table

SD21_CONFIG = ROOT / "data" / "sd21-base"  # its configs, no weights

# ------------------------------------------------------------------------------------- counting


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def macs(call) -> tuple[int, int]:
    """Multiply-accumulates of one call: (convolutions and linear layers, all products)."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    counts = {str(op): n // 2 for op, n in counter.get_flop_counts()["Global"].items()}
    layers = ("aten.convolution", "aten.addmm", "aten.mm")
    return sum(n for op, n in counts.items() if op in layers), sum(counts.values())


def seconds(call, budget: float = 3.0) -> float:
    """Median time of a call, repeated for `budget` seconds after a first, which counts if it took longer."""
    times: list[float] = []
    while len(times) < 2 or sum(times[1:]) < budget:
        began = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        if times[0] > budget:
            return times[0]
    return statistics.median(times[1:])


def in_steps(n: int, column: dict[str, float]) -> float:
    """The sum over all parts where those of the phase "a step" run n times."""
    return sum(v * (n if name.startswith("a step:") else 1) for name, v in column.items())


def print_counts(build, parts, size: tuple[int, int], steps: tuple[int, ...]) -> dict[str, int]:
    """The complexity table for one image of `size` (width, height); returns {part: MACs, LoRA fused}.
    build(lora) -> model; parts(model, x) -> {name: (modules, call)}."""
    with torch.device("meta"):
        lora, fused = build(True), build(False)
        width, height = (n + -n % fused.cell for n in size)  # restoring pads
        x, rows, full = torch.empty(1, 3, height, width), [], {}
        for (name, (modules, call)), (bare, plain) in zip(parts(lora, x).items(), parts(fused, x).values()):
            parameters, full[name] = sum(map(count, bare)), macs(plain)[1]
            rows.append([name, parameters, sum(map(count, modules)) - parameters, macs(call)[0], full[name]])
    rows.append(total := ["total", *map(sum, zip(*(r[1:] for r in rows)))])
    header = ["", "parameters", "LoRA", "MACs, conv + linear", "MACs, all (LoRA fused)"]
    table = [[name, *(f"{n / 1e6:.2f} M" for n in numbers[:2]), *(f"{n / 1e12:.4g} T" for n in numbers[2:])]
             for name, *numbers in rows]
    if not total[2]:  # no LoRA at all
        header, table = [h for i, h in enumerate(header) if i != 2], [r[:2] + r[3:] for r in table]
    print(f"one image of {width} x {height} pixels\n{text_table(header, table)}", flush=True)
    if total[2]:
        print(f"as the papers count it: {sum(total[1:3]) / 1e6:.1f} M parameters, LoRA included, and "
              f"{total[3] / 1e12:.2f} T MACs of convolutions and linear layers,\nLoRA not fused; with all "
              f"products and LoRA fused it is {total[4] / 1e12:.2f} T", flush=True)
    for n in steps:
        print(f"{n} step{'s' * (n > 1)}: {in_steps(n, full) / 1e12:.4g} T MACs in all", flush=True)
    return full


def print_times(build, parts, size: tuple[int, int], steps: tuple[int, ...], full: dict[str, int]) -> None:
    """Milliseconds and TFLOP/s of every part on this device, by phase too where names are "phase: part"."""
    where = device()
    with torch.inference_mode():
        model = build(False).to(where)
        common.for_inference(model.sd if hasattr(model, "hyper_encoders") else model)  # as oscar.load has it
        width, height = (n + -n % model.cell for n in size)
        calls = parts(model, torch.rand(1, 3, height, width, device=where))
        timings = {name: (seconds(call), full[name])
                   for name, (_, call) in tqdm(calls.items(), "timing", leave=False, disable=None)}
    phases = dict.fromkeys(name.split(":")[0] for name in timings if ":" in name)
    summed = {phase: [v for name, v in timings.items() if name.startswith(f"{phase}:")] for phase in phases}
    summed["total"] = list(timings.values())
    rows = timings | {name: tuple(map(sum, zip(*values))) for name, values in summed.items()}
    table = [[name, f"{1000 * s:.1f}", f"{2e-12 * n / s:.2f}"] for name, (s, n) in rows.items()]
    name = f"{where.type}, {torch.get_num_threads()} threads"
    if where.type == "cuda":
        name = torch.cuda.get_device_name()
    print(f"\n{name}, {str(common.INFERENCE_DTYPE)[6:]}, random weights")
    print(text_table(["", "ms", "TFLOP/s"], table) + f"\npeak memory: {peak_memory()}")
    for n in steps:
        print(f"{n} step{'s' * (n > 1)}: {in_steps(n, {name: s for name, (s, _) in timings.items()}):.2f} s")


# ------------------------------------------------------- models and their parts, in order of inference


def vae_parts(sd: SD, x: Tensor, z: Tensor) -> tuple[tuple, tuple]:
    """(encoder, decoder), each as (modules, call)."""
    vae = sd.vae
    return (([vae.encoder, vae.quant_conv], lambda: vae.encode(x)),
            ([vae.decoder, vae.post_quant_conv], lambda: vae.decode(z)))


def empty_latent(sd: SD, x: Tensor) -> Tensor:
    return x.new_zeros(1, sd.vae.config.latent_channels, x.shape[2] // sd.f, x.shape[3] // sd.f)


def codiff_model(codiff, base, cfg1, cfg2, lora: bool):
    G = codiff.CODiff(base, cfg2, codiff.CaVE(cfg1.widths, cfg1.blocks), weights=False)
    return G.add_lora(cfg2.rank) if lora else G


def codiff_parts(G, x: Tensor) -> dict[str, tuple[list[nn.Module], callable]]:
    x = x.to(G.sd.vae.dtype)
    z, cave = empty_latent(G.sd, x), G.cave
    tokens, c_L = (x.new_zeros(1, x.shape[2] * x.shape[3] // cave.stride**2, d)
                   for d in (G.proj.in_features, G.proj.out_features))
    embedding = [cave.m_head, cave.m_down1, cave.m_down2, cave.m_down3, cave.m_body_encoder]
    encoder, decoder = vae_parts(G.sd, x, z)
    return {"CaVE, embedding path": (embedding, lambda: cave.embed(x)),
            "linear map": ([G.proj], lambda: G.proj(tokens)),
            "VAE encoder": encoder, "UNet": ([G.sd.unet], lambda: G.sd.unet(z, G.T_L, c_L)),
            "VAE decoder": decoder}


def sodiff_model(sodiff, base, cfg1, cfg2, lora: bool):
    text = read_json(Path(base) / "text_encoder" / "config.json")
    saipe = sodiff.SAIPE(cfg1, text["max_position_embeddings"], text["hidden_size"])
    G = sodiff.SODiff(base, saipe.E_down, saipe.T_align, cfg2, weights=False)
    return G.add_lora(cfg2.rank) if lora else G


def sodiff_parts(G, x: Tensor) -> dict[str, tuple[list[nn.Module], callable]]:
    x = x.to(G.sd.vae.dtype)
    z, (h, w) = empty_latent(G.sd, x), x.shape[2:]
    f_mid = x.new_zeros(1, G.E_down.head[1].out_channels, h // 4, w // 4)
    e_img = x.new_zeros(1, *G.T_align.queries.shape[1:])
    encoder, decoder = vae_parts(G.sd, x, z)
    return {"SAIPE: E_down": ([G.E_down], lambda: G.E_down(x)),
            "SAIPE: T_align": ([G.T_align], lambda: G.T_align(f_mid)),
            "time predictor": ([G.predictor], lambda: G.predictor(x)), "VAE encoder": encoder,
            "UNet": ([G.sd.unet], lambda: G.sd.unet(z, x.new_zeros(1), e_img)), "VAE decoder": decoder}


def oscar_model(oscar, base, cfg1, cfg2, lora: bool):
    G = oscar.OSCAR(base, cfg1, weights=False)
    return G.add_lora(cfg2.rank) if lora else G


def oscar_parts(G, x: Tensor, r: int) -> dict[str, tuple[list[nn.Module], callable]]:
    from oscar import S
    z_0, Q, x = empty_latent(G.sd, x), G.hyper_encoders[r], x.to(G.sd.vae.dtype)  # z_0, Q: float32
    z, quantizer = empty_latent(G.sd, x), Q.quantizer
    idx = torch.zeros(1, z.shape[2] // S[r], z.shape[3] // S[r], dtype=torch.long, device=x.device)
    prompt, (encoder, decoder) = x.new_zeros(1, *G.prompt.shape), vae_parts(G.sd, x, z)
    return {"encode: VAE encoder": encoder,
            "encode: hyper-encoder": ([Q.backbone, quantizer.project_in], lambda: Q.encode(z_0)),
            "decode: hyper-encoder": ([Q.proj, quantizer.project_out], lambda: Q.decode(idx)),
            "decode: UNet": ([G.sd.unet], lambda: G.sd.unet(z, G.t[r], prompt)),
            "decode: VAE decoder": decoder}


def print_hyper_encoders(oscar, build, size: tuple[int, int]) -> None:
    """Parameters and MACs of every hyper-encoder, and the parameters of all else."""
    with torch.device("meta"):
        G, rows = build(True), []
        x = torch.empty(1, 3, *(n + -n % G.cell for n in size[::-1]))
        for r, Q in enumerate(G.hyper_encoders):
            calls = oscar_parts(G, x, r)
            each = [macs(calls[f"{phase}: hyper-encoder"][1])[1] / 1e9 for phase in ("encode", "decode")]
            rows.append([f"{oscar.NAMES[r]} bpp", str(oscar.S[r]), str(oscar.V[r]), f"{count(Q) / 1e6:.2f} M",
                         *(f"{n:.1f} G" for n in each)])
        whole = count(G) - count(G.hyper_encoders)
    header = ["", "s", "V", "parameters", "MACs to encode", "MACs to decode"]
    print(f"hyper-encoders (the paper: 3.8 M to 7.1 M parameters each)\n{text_table(header, rows)}")
    print(f"\nUNet, VAE, LoRA and prompt: {whole / 1e6:.1f} M parameters (the paper: 965.9 M)\n")


def moe_diffir_model(moe_diffir, base, cfg1, cfg2, lora: bool):
    width = read_json(Path(base) / "unet" / "config.json")["cross_attention_dim"]
    return moe_diffir.MoEDiffIR(base, cfg1, torch.zeros(77, width), 12, cfg2, weights=False)


def moe_diffir_parts(model, x: Tensor) -> dict[str, tuple[list[nn.Module], callable]]:
    x, unet, compensator = x.to(model.sd.vae.dtype), model.sd.unet, model.compensator
    z, t = empty_latent(model.sd, x), torch.zeros(1, device=x.device)
    c, dp = model.empty[None].to(x), model.degradation_prior(x)
    features, (_, seen) = model.module(z, t, dp)[0], model.encode(x)
    (encoder, _), decoder = vae_parts(model.sd, x, z)
    levels = seen[:len(compensator.fuse)][::-1]
    return {"once: VAE encoder": (encoder, lambda: model.encode(x)),
            "once: degradation prior (CLIP)": ([model.prior], lambda: model.degradation_prior(x)),
            "once: Visual2Text and CLIP": ([model.v2t], lambda: model.text(x)),
            "a step: MoE-Prompt Module": ([model.module], lambda: model.module(z, t, dp)),
            "a step: UNet": ([unet], lambda: unet(z, t, c)),
            "a step: SPADE": ([model.spade], lambda: [spade.maps(features[i]) for spade, (i, _) in zip(
                model.spade, model.branches())]),
            "once: VAE decoder": decoder,
            "once: compensator": ([compensator], lambda: [compensator.residual(i, e, e)
                                                          for i, e in enumerate(levels)])}


# ---------------------------------------------------------------------------------- command line


def picture_size(text: str) -> tuple[int, int]:
    """'768x512' -> (768, 512), '1024' -> (1024, 1024)."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and (height or width).isdecimal() and int(width) and int(height or width)):
        raise argparse.ArgumentTypeError(f"{text}: give pixels, as 1024 or 768x512")
    return int(width), int(height or width)


def main(name: str, argv: list[str]) -> None:
    script = importlib.import_module(name)
    p = common.CommandLine(f"{name}.py profile", description="parameters, MACs, time, memory")
    p.add_argument("--size", type=picture_size, default="1024", help="of the image: 1024 or 768x512")
    p.add_argument("--paper", action="store_true", help="the paper's base and widths; nothing is downloaded")
    p.add_argument("--base", help="diffusers folder (default: data/tiny-sd; with --paper data/sd21-base)")
    p.add_argument("--time", action=argparse.BooleanOptionalAction, default=True, help="time it here, too")
    if name == "oscar":
        p.add_argument("--bpp", type=script.parse_bpp, default=2, help="the rate to time (default: 0.0313)")
    args = p.parse_args(argv)
    base = args.base or (SD21_CONFIG if args.paper else TINY_SD)
    if not (Path(base) / "unet" / "config.json").exists():
        raise UserError(f"--base {base}: not a diffusers folder (unet/config.json is missing)")
    cfg1, cfg2 = (stage.paper() if args.paper else stage() for stage in (script.Stage1, script.Stage2))
    build = partial(globals()[f"{name}_model"], script, base, cfg1, cfg2)
    parts, steps = globals()[f"{name}_parts"], (1, 50) if name == "moe_diffir" else ()
    if name == "oscar":
        print_hyper_encoders(script, build, args.size)
        print(f"at {script.NAMES[args.bpp]} bpp, ", end="")
        parts = partial(parts, r=args.bpp)
    full = print_counts(build, parts, args.size, steps)
    if args.time:
        print_times(build, parts, args.size, steps, full)
