"""A script's profile: parameters, multiply-accumulates, time and memory of inference, part by part.

    python SCRIPT.py profile --paper --size 1024 --no-time

Counting happens on the meta device: no weights are loaded, no memory is needed. MACs are counted twice: as
the papers do (convolutions and linear layers, LoRA not fused), and in full (all products, LoRA fused). The
model and its parts, in order of inference, are the paper's: data/results/SCRIPT.py."""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import SD, TINY_SD, device
from data import speed
from data.files import ROOT, UserError
from data.results.tables import paper, peak_memory, plural, text_table
from data.runs import CommandLine, name_of

SD21_CONFIG = ROOT / "data" / "sd21-base"  # its configs, no weights
Parts = dict[str, tuple[list[nn.Module], callable]]  # name: (modules, a call of them)

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


def random_picture(size: tuple[int, int], cell: int, **where) -> Tensor:
    """(1, 3, H, W) of a picture of `size` (width, height), padded to whole cells as restoring does."""
    width, height = (n + -n % cell for n in size)
    return torch.rand(1, 3, height, width, **where)


def print_counts(build, parts, size: tuple[int, int], steps: tuple[int, ...]) -> dict[str, int]:
    """The complexity table for one image of `size` (width, height); returns {part: MACs, LoRA fused}.
    build(lora) -> model; parts(model, x) -> {name: (modules, call)}."""
    rows = []
    full = {}
    with torch.device("meta"):
        lora = build(True)
        fused = build(False)
        x = random_picture(size, fused.cell)
        for (name, (modules, call)), (bare, plain) in zip(parts(lora, x).items(), parts(fused, x).values()):
            parameters = sum(map(count, bare))
            full[name] = macs(plain)[1]
            rows.append([name, parameters, sum(map(count, modules)) - parameters, macs(call)[0], full[name]])
    layers = {name: n for name, _, _, n, _ in rows}  # convolutions and linear layers alone
    rows.append(total := ["total", *map(sum, zip(*(r[1:] for r in rows)))])
    header = ["", "parameters", "LoRA", "MACs, conv + linear", "MACs, all (LoRA fused)"]
    table = [[name, *(f"{n / 1e6:.2f} M" for n in numbers[:2]), *(f"{n / 1e12:.4g} T" for n in numbers[2:])]
             for name, *numbers in rows]
    if not total[2]:  # no LoRA at all
        for row in (header, *table):
            del row[2]
    print(f"one image of {x.shape[3]} x {x.shape[2]} pixels\n{text_table(header, table)}", flush=True)
    if total[2]:
        print(f"as the papers count it: {sum(total[1:3]) / 1e6:.1f} M parameters, LoRA included, and "
              f"{total[3] / 1e12:.2f} T MACs of convolutions and linear layers,\nLoRA not fused; with all "
              f"products and LoRA fused it is {total[4] / 1e12:.2f} T", flush=True)
    for n in steps:
        print(f"{plural(n, 'step')}: {in_steps(n, layers) / 1e12:.4g} T MACs of convolutions and linear "
              f"layers, {in_steps(n, full) / 1e12:.4g} T of all products", flush=True)
    return full


def print_times(build, parts, size: tuple[int, int], steps: tuple[int, ...], full: dict[str, int],
                ready=common.for_inference) -> None:
    """Milliseconds and TFLOP/s of every part on this device, by phase too where names are "phase: part".
    ready(model) makes it what the script's `load` returns."""
    where = device()
    with torch.inference_mode():
        model = build(False).to(where)
        ready(model)
        calls = parts(model, random_picture(size, model.cell, device=where))
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
    print(f"\n{name}, {speed.name_of(speed.dtype())}, random weights")
    print(text_table(["", "ms", "TFLOP/s"], table) + f"\npeak memory: {peak_memory()}")
    for n in steps:
        print(f"{plural(n, 'step')}: {in_steps(n, {name: s for name, (s, _) in timings.items()}):.2f} s")


# ---------------------------------------------------------------------- parts that all models have


def vae_parts(sd: SD, x: Tensor, z: Tensor) -> tuple[tuple, tuple]:
    """(encoder, decoder), each as (modules, call)."""
    vae = sd.vae
    return (([vae.encoder, vae.quant_conv], lambda: vae.encode(x)),
            ([vae.decoder, vae.post_quant_conv], lambda: vae.decode(z)))


def empty_latent(sd: SD, x: Tensor) -> Tensor:
    return x.new_zeros(1, sd.vae.config.latent_channels, x.shape[2] // sd.cell, x.shape[3] // sd.cell)


# ---------------------------------------------------------------------------------- command line


def picture_size(text: str) -> tuple[int, int]:
    """'768x512' -> (768, 512), '1024' -> (1024, 1024)."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and (height or width).isdecimal() and int(width) and int(height or width)):
        raise argparse.ArgumentTypeError(f"{text}: give pixels, as 1024 or 768x512")
    return int(width), int(height or width)


def print_profile(script, args, build, parts, steps: tuple = (), ready=common.for_inference) -> None:
    """What profile prints of a model; with `steps` also of so many calls of its parts "a step: ..."."""
    full = print_counts(build, parts, args.size, steps)
    if args.time:
        print_times(build, parts, args.size, steps, full, ready)


def main(script, argv: list[str]) -> None:
    name = name_of(script)
    own = paper(name)
    p = CommandLine(f"{name}.py profile", description="parameters, MACs, time, memory")
    p.add_argument("--size", type=picture_size, default="1024", help="of the image: 1024 or 768x512")
    p.add_argument("--paper", action="store_true", help="the paper's base and widths; nothing is downloaded")
    p.add_argument("--base", help="diffusers folder (default: data/tiny-sd; with --paper data/sd21-base)")
    p.add_argument("--time", action=argparse.BooleanOptionalAction, default=True, help="time it here, too")
    own.profile_flags(p, script)
    args = p.parse_args(argv)
    base = args.base or (SD21_CONFIG if args.paper else TINY_SD)
    if not (Path(base) / "unet" / "config.json").exists():
        raise UserError(f"--base {base}: not a diffusers folder (unet/config.json is missing)")
    cfg1, cfg2 = (stage.paper() if args.paper else stage() for stage in (script.Stage1, script.Stage2))
    own.profile(script, args, partial(own.build, script, base, cfg1, cfg2))
