"""OSCAR, measured: Figs. 5, 7b and BD-rates by eval, hyper-encoders and complexity by profile, Figs. 2, 4
and 8 by figures, Fig. 7 by ablations."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, features
from torch import Tensor
from torch.distributions import Normal
from tqdm import tqdm

import common
from common import device, load_trained
from data import make_cir
from data.files import ROOT, UserError, atomic, list_images, note, read_json, read_model, reason
from data.results.complexity import Parts, count, empty_latent, macs, print_profile, random_picture, vae_parts
from data.results.evaluate import Metrics, finish, padded, picture_of, results_of, through_vae
from data.results.figures import panels, pyplot, save, smoothed
from data.results.seeds import DEFAULT, NAMED, SHIPS, TINY_LPIPS, Choice, Claim, cell, markdown
from data.results.tables import centre, comparison_picture, means, no_flags, read_all, readable, text_table
from data.tiles import tiling

# --------------------------------------------------------------------------------------------- eval

CLASSICAL = {"JPEG": {"optimize": True}, "WebP": {"method": 6}, "AVIF": {}}  # Pillow's, and their options
if not features.check("avif"):
    del CLASSICAL["AVIF"]
QUALITIES = (5, 10, 20, 35, 50)  # an anchor's, beside its lowest
QPS = {"HEVC": (51, 47, 42, 37, 32), "VVC": (63, 57, 52, 47, 42, 37)}  # an anchor's, by make_cir's encoders


def eval_flags(p, script) -> None:
    p.add_argument("--bpp", type=script.parse_bpp, nargs="+", default=range(len(script.RATES)),
                   help=f"of {', '.join(script.NAMES)} (default: all)")
    p.add_argument("--centre", type=int, metavar="PX", help="only the central pixels (the paper: 1024)")
    p.add_argument("--anchor", choices=[*CLASSICAL, *QPS],
                   help="also BD-rates against this codec (HEVC and VVC: intra, by FFmpeg)")
    p.add_argument("--against", nargs="+", type=Path, default=[], metavar="RUN", help="other models, too")


@torch.inference_mode()
def evaluate(script, args) -> None:
    """The rate-distortion table over real files: true bits per pixel and metrics, mean over the photographs;
    beside it other models, classical codecs at their lowest setting, the VAE alone. A picture, the curve."""
    if args.anchor in QPS and (why := make_cir.missing_for(args.anchor.lower())):
        raise UserError(f"--anchor {args.anchor}: {why}")
    if args.centre is not None and args.centre < 1:
        raise UserError(f"--centre {args.centre}: must be at least 1")
    models = {"OSCAR": script.load(args.weights, args.base)}
    models |= {f"by {run.name}": script.load(run, args.base) for run in args.against}
    files = list_images(args.data)
    metrics = Metrics(("musiq", "clipiqa") if args.metrics == "all" else (), "VGG")
    codecs: dict = {}
    nominal = {}
    for name, model in models.items():
        for r in sorted(set(args.bpp)):
            codec = f"{name} {script.NAMES[r]}"
            codecs[codec] = partial(through_file, script, model, r, tiling(model, args.tile))
            nominal[codec] = script.BPP[r]
    codecs |= classical_codecs(args.anchor)
    measured, strips = through_codecs(files, codecs, models["OSCAR"].sd, metrics, args.centre)
    results = {name: means(rows) for name, rows in measured.items() if rows}
    names = [n for n in metrics.names if n not in ("PSNR-B", "detail") and "grid" not in n]  # 8x8 is JPEG's
    print(f"\n{len(measured['VAE alone'])} images (padded and cropped; 8-bit; bits counted from the files)")
    print(text_table(["", "nominal bpp", "true bpp", *names],
                     [[name, nominal.get(name), row["bpp"], *(row[k] for k in names)]
                      for name, row in results.items()]))
    if strips:  # of pictures that every codec could take
        labels = [f"{name}: {results[name]['bpp']:.4f} bpp" for name in codecs]
        comparison_picture(strips, ["original", *labels, "VAE alone: the base's ceiling"], picture_of(args))
    try:
        curves = draw_curve(results, list(models), results_of(args) / "samples" / "rd.png")
        print(f"rate-distortion curve: {curves}")
    except UserError as error:
        note(f"no rate-distortion curve: {error}")
    bd_rates = print_bd_rate(results, args.anchor, names) if args.anchor else {}
    finish(args, files, results=results, bd_rate=bd_rates)


def through_codecs(files: list[Path], codecs: dict, sd, metrics: Metrics,
                   side: int | None) -> tuple[dict[str, list[dict]], list[list[Image.Image]]]:
    """({codec: [metrics and bits per pixel of every file, or of its central pixels]}, rows of a picture).
    codecs: {name: image -> (the image decoded, its file's bytes)}."""
    measured: dict[str, list[dict]] = {name: [] for name in [*codecs, "VAE alone"]}
    strips = []
    for file, image in readable(tqdm(files, "eval", disable=None)):
        image = centre(image, side) if side else image
        pictures = [image]
        for name, through in codecs.items():
            try:
                decoded, size = through(image)
            except Exception as error:  # WebP ends at 16,383 pixels a side
                note(f"skipped: {name} of {reason(error, file)}")
                continue
            pictures.append(decoded)
            bpp = 8 * size / (image.width * image.height)
            measured[name].append({"bpp": bpp, **metrics(decoded, image)})
        pictures.append(through_vae(sd, image))
        measured["VAE alone"].append({"bpp": None, **metrics(pictures[-1], image)})
        if len(strips) < 4 and len(pictures) == len(codecs) + 2:
            strips.append([centre(p, 256) for p in pictures])
    if not measured["VAE alone"]:
        raise UserError(f"eval: none of the {len(files)} images can be read")
    return measured, strips


def through_file(script, model, r: int, tiles_for, image: Image.Image) -> tuple[Image.Image, int]:
    """(the picture decoded, its file's bytes) at bit-rate number r."""
    data = script.compress(model, image, r, tiles_for)
    return script.decompress(model, data, tiles_for), len(data)


def classical_codecs(anchor: str | None) -> dict:
    """{name: image -> (the image decoded, its bytes)}: each of Pillow's codecs at its lowest quality, the
    anchor at several."""
    def through(kind, quality, image):
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=quality, **CLASSICAL[kind])
        return Image.open(buffer).convert("RGB"), len(buffer.getvalue())
    codecs = {f"{kind}, quality {q}": partial(through, kind, q) for kind in CLASSICAL
              for q in (1 if kind == "JPEG" else 0, *(QUALITIES if kind == anchor else ()))}
    return codecs | {f"{anchor}, QP {q}": partial(make_cir.compress, codec=anchor.lower(), level=str(q))
                     for q in QPS.get(anchor, ())}


def curve(results: dict, codec: str, metric: str) -> list[tuple[float, float]]:
    """A codec's points (true bpp, value of the metric)."""
    points = [(v["bpp"], v.get(metric)) for name, v in results.items()
              if name.startswith((f"{codec} ", f"{codec},"))]
    return [p for p in points if p[1] is not None]


def draw_curve(results: dict, models: list[str], target: Path) -> Path:
    """Figs. 5 and 7b: a panel for each metric that could be measured, against true bits per pixel."""
    names = ("PSNR", "SSIM", TINY_LPIPS, "LPIPS-VGG", "DISTS", "MUSIQ", "CLIPIQA")
    names = [k for k in names if results["VAE alone"].get(k) is not None]
    lines = {model: {"marker": "o"} for model in models}
    lines |= {kind: {"marker": m, "color": "gray"} for kind, m in zip([*CLASSICAL, *QPS], "sv^Dp")}
    figure, axes = panels(1, len(names), 4.5 * len(names), 3.4)
    for axis, metric in zip(axes[0], names):
        for name, style in lines.items():
            if points := curve(results, name, metric):
                axis.plot(*zip(*points), label=name, **style)
        axis.axhline(results["VAE alone"][metric], color="gray", linestyle=":", label="VAE alone")
        axis.set(xlabel="bits per pixel, from the file's length", ylabel=metric, xscale="log")
    axes[0, 0].legend(fontsize=7)
    atomic(target, lambda tmp: figure.savefig(tmp, dpi=110))
    pyplot().close(figure)
    return target


def bd_rate(points: list[tuple[float, float]], anchor: list[tuple[float, float]]) -> float | None:
    """Bjontegaard's rate difference (VCEG-M33) in percent: cubic fits of log rate to quality, the mean
    distance between them over the qualities that both reach. None if there are none, or under four points,
    or where quality rises and falls with the rate, which is then no function of quality."""
    if min(len(points), len(anchor)) < 4:
        return None
    rates, q = zip(*sorted(points))
    anchor_rates, anchor_q = zip(*sorted(anchor))
    if not all(sorted(qs) in (list(qs), list(qs)[::-1]) for qs in (q, anchor_q)):
        return None
    low = max(min(q), min(anchor_q))
    high = min(max(q), max(anchor_q))
    if low >= high:
        return None

    def area(rates, q):
        fit = np.polynomial.Polynomial.fit(q, np.log(rates), 3).integ()
        return fit(high) - fit(low)
    return 100 * float(np.expm1((area(rates, q) - area(anchor_rates, anchor_q)) / (high - low)))


def print_bd_rate(results: dict, anchor: str, names: list[str]) -> dict[str, float | None]:
    rates = {k: bd_rate(curve(results, "OSCAR", k), curve(results, anchor, k)) for k in names}
    print(f"\nBD-rate of OSCAR against {anchor}, percent ('-': no quality that both reach, or "
          "quality that rises and falls with the rate)")
    print(text_table(["", *names], [["BD-rate", *rates.values()]]))
    return rates


# ------------------------------------------------------------------------------------------ profile


def profile_flags(p, script) -> None:
    p.add_argument("--bpp", type=script.parse_bpp, default=2, help="the rate to time (default: 0.0313)")


def build(script, base, cfg1, cfg2, lora: bool):
    G = script.OSCAR(base, cfg1, weights=False)
    return G.add_lora(cfg2.rank) if lora else G


def parts(G, x: Tensor, r: int) -> Parts:
    Q = G.hyper_encoders[r]  # float32, as z_0
    z_0 = empty_latent(G.sd, x)
    x = x.to(G.sd.vae.dtype)
    z = empty_latent(G.sd, x)
    idx = torch.zeros(1, z.shape[2] // Q.s, z.shape[3] // Q.s, dtype=torch.long, device=x.device)
    prompt = x.new_zeros(1, *G.prompt.shape)
    encoder, decoder = vae_parts(G.sd, x, z)
    return {"encode: VAE encoder": encoder,
            "encode: hyper-encoder": ([Q.backbone, Q.quantizer.project_in], lambda: Q.encode(z_0)),
            "decode: hyper-encoder": ([Q.proj, Q.quantizer.project_out], lambda: Q.decode(idx)),
            "decode: UNet": ([G.sd.unet], lambda: G.sd.unet(z, G.t[r], prompt)),
            "decode: VAE decoder": decoder}


def print_hyper_encoders(script, build, size: tuple[int, int]) -> None:
    """Parameters and MACs of every hyper-encoder, and the parameters of all else."""
    rows = []
    with torch.device("meta"):
        G = build(True)
        x = random_picture(size, G.cell)
        for r, Q in enumerate(G.hyper_encoders):
            calls = parts(G, x, r)
            each = [macs(calls[f"{phase}: hyper-encoder"][1])[1] / 1e9 for phase in ("encode", "decode")]
            rows.append([f"{script.NAMES[r]} bpp", str(script.S[r]), str(script.V[r]),
                         f"{count(Q) / 1e6:.2f} M", *(f"{n:.1f} G" for n in each)])
        others = count(G) - count(G.hyper_encoders)
    header = ["", "s", "V", "parameters", "MACs to encode", "MACs to decode"]
    print(f"hyper-encoders (the paper: 3.8 M to 7.1 M parameters each)\n{text_table(header, rows)}")
    print(f"\nUNet, VAE, LoRA and prompt: {others / 1e6:.1f} M parameters (the paper: 965.9 M)\n")


def profile(script, args, build) -> None:
    print_hyper_encoders(script, build, args.size)
    print(f"at {script.NAMES[args.bpp]} bpp, ", end="")
    print_profile(script, args, build, partial(parts, r=args.bpp), ready=ready)


def ready(G) -> None:
    """As `load` has it: the hyper-encoders stay in float32."""
    common.for_inference(G.sd)


# ------------------------------------------------------------------------------------------ figures

figure_flags = no_flags
AGAINST = "no-alignment"


@torch.inference_mode()
def residual(Q, z: list[Tensor], alpha_bar: Tensor) -> Tensor:
    """eps of Eq. 11, flat: (z_tilde - sqrt(alpha_bar_t) z_0) / sqrt(1 - alpha_bar_t)."""
    a = alpha_bar
    eps = [(Q.decode(Q.encode(z_0)) - a.sqrt() * z_0) / (1 - a).sqrt() for z_0 in z]
    return torch.cat([e.flatten() for e in eps]).cpu()


def describe(eps: Tensor, z_0: Tensor, a: Tensor) -> list[float]:
    """Mean, deviation, excess kurtosis of the residual noise; its cosine to z_0; z_tilde's RMS over z_0's."""
    z_tilde = a.sqrt() * z_0 + (1 - a).sqrt() * eps
    kurtosis = (eps - eps.mean()).pow(4).mean() / eps.var()**2 - 3
    cosine = F.cosine_similarity(eps, z_0, dim=0)
    return [v.item() for v in (eps.mean(), eps.std(), kurtosis, cosine, z_tilde.norm() / z_0.norm())]


def draw_residuals(axes, eps: Tensor, title: str, color: str) -> None:
    """Histogram and QQ-plot against a standard normal."""
    top, bottom = axes
    draw_histogram(top, eps, None, color)
    top.set_title(title, fontsize=9)
    p = (torch.arange(200) + 0.5) / 200
    measured = eps.sort().values[(p * len(eps)).long()]
    bottom.plot(Normal(0, 1).icdf(p), measured, ".", markersize=3, color=color)
    bottom.plot([-3, 3], [-3, 3], color="red", linewidth=1)


def draw_histogram(axis, eps: Tensor, label: str | None, color: str) -> None:
    axis.hist(eps.clamp(-4, 4).numpy(), 81, range=(-4, 4), density=True, color=color, alpha=0.6, label=label)
    u = torch.linspace(-4, 4, 161)
    axis.plot(u, Normal(0, 1).log_prob(u).exp(), color="red", linewidth=1)


def draw_cosines(axis, log: list[dict], names: list[str]) -> None:
    """Every rate's cosine to z_0 through both stages, from log.jsonl."""
    first = {1: 0, 2: 1 + max((row["step"] for row in log if row["stage"] == 1), default=0)}
    for name in names:
        rows = [row for row in log if f"cos@{name}" in row]
        steps = [first[row["stage"]] + row["step"] for row in rows]
        axis.plot(steps, smoothed([row[f"cos@{name}"] for row in rows]), linewidth=1, label=f"{name} bpp")
    axis.axvline(first[2], color="gray", linestyle=":")
    axis.set(xlabel="step (stage 1 | stage 2)", ylabel="cosine similarity",
             title="cosine to z_0 on the training batches, smoothed")
    axis.legend(fontsize=7)


def draw_mapping(table: dict, alpha_bar: Tensor, names: list[str]):
    """Fig. 2's idea: cosine -> timestep."""
    figure, [[axis]] = panels(1, 1, 6, 3.6)
    approximation = "sqrt(alpha_bar_t), Eq. 12's approximation"
    axis.plot(alpha_bar.cpu().sqrt(), "--", color="gray", label=approximation)
    axis.plot(table["G_sim"], color="red", label="G_sim(t), a latent position's expectation")
    for name in names:
        axis.plot(table[name]["t"], table[name]["cosine"], "o", label=f"{name} bpp: t = {table[name]['t']}")
    axis.set(xlabel="pseudo diffusion timestep t", ylabel="cosine similarity")
    axis.legend(fontsize=7)
    return figure


@torch.inference_mode()
def training_latents(script, sd, config: dict, cfg) -> list[Tensor]:
    """Of the first crops, which stage 1 measured."""
    photos = script.Photos([ROOT / folder for folder in config["data1"]], cfg, 1, config["seed"])
    crops = (photos[n][1][None].to(device()) for n in range(min(64, cfg.measure)))
    return [sd.encode(x).float() for x in crops]


def hyper_encoders_of(script, weights: Path, config: dict, z: list[Tensor]) -> tuple:
    """Those that stage 1 starts from, and its result; both give z_tilde the RMS of the training latents z."""
    cfg, tensors, _ = script.Stage1.read(weights, "oscar")
    torch.manual_seed(config["seed"])
    before, after = (script.HyperEncoders(cfg, z[0].shape[1]).to(device()) for _ in range(2))
    load_trained(after, tensors, weights)
    script.set_gain(before, z)
    return before, after.eval()


def draw_fig8(script, runs: dict, z: list[Tensor]):
    """Residual noise at one rate and every rate's cosine, of models trained with alignment and without."""
    figure, [[left, right]] = panels(1, 2, 10, 3.6)
    for (name, model), color in zip(runs.items(), ("tab:blue", "tab:orange")):
        eps = residual(model.hyper_encoders[2], z, model.sd.alpha_bar[model.t[2]])
        draw_histogram(left, eps, name, color)
        cosines = script.F_sim(model.hyper_encoders, z).tolist()
        right.plot(script.BPP, cosines, "o-", color=color, label=name)
    left.set_title(f"residual noise, {script.NAMES[2]} bpp, at the model's own timestep")
    left.legend(fontsize=7)
    right.set(xlabel="bits per pixel", ylabel="cosine to z_0", title="on the same crops")
    return figure


def figures(script, args) -> None:
    """Fig. 4: residual noise before and after alignment, as histogram and QQ-plot, on training crops. Then
    the same at one rate, and every rate's cosine through both stages. Fig. 2's idea: cosine -> timestep.
    Fig. 8, if there is a second run: trained models, with alignment and without."""
    model = script.load(args.weights)
    config = read_json(args.weights / "config.json")
    if not config["stage2.alignment"]:
        raise UserError(f"figures: {args.weights} was trained with --no-alignment and has no mapping; "
                        "name it as --against")
    table = read_json(args.weights / "model" / "mapping.json")
    z = training_latents(script, model.sd, config, script.Stage1.of_header(config))
    before, after = hyper_encoders_of(script, args.weights, config, z)
    kinds = (("before", before, "tab:orange"), ("after", after, "tab:blue"),
             ("after stage 2", model.hyper_encoders, None))  # of the last the numbers, no picture
    fig4, axes = panels(2, 6, 16, 5)
    alignment, [[left, right]] = panels(1, 2, 10, 3.6)
    flat = torch.cat([z_0.flatten() for z_0 in z]).cpu()
    rows = []
    for i, r in enumerate((0, 2, 7)):
        a = model.sd.alpha_bar[table[script.NAMES[r]]["t"]]
        for j, (when, Qs, color) in enumerate(kinds):
            eps = residual(Qs[r], z, a)
            rows.append([f"{script.NAMES[r]} bpp, {when}", *describe(eps, flat, a.cpu())])
            if color:
                draw_residuals(axes[:, 2 * i + j], eps, rows[-1][0], color)
            if color and r == 2:
                draw_histogram(left, eps, f"{when} alignment", color)
    left.set_title(f"residual noise, {script.NAMES[2]} bpp")
    left.legend(fontsize=7)
    log = [json.loads(line) for line in (args.weights / "log.jsonl").read_text().splitlines()]
    draw_cosines(right, log, script.NAMES)
    drawn = {"fig2": draw_mapping(table, model.sd.alpha_bar, script.NAMES), "fig4": fig4,
             "alignment": alignment}
    if (args.against / "model" / "stage2.safetensors").exists():
        runs = {"with alignment": model, f"without ({args.against.name})": script.load(args.against)}
        drawn["fig8"] = draw_fig8(script, runs, z)
    else:
        note(f"no Fig. 8; to compare: oscar.py train --no-alignment --out {args.against}")
    save(drawn, args.weights)
    print(text_table(["residual noise", "mean", "deviation", "excess kurtosis", "cosine to z_0",
                      "RMS of z_tilde / z_0"], rows))
    print_cosines(script, model, table, z, args.data)


@torch.inference_mode()
def print_cosines(script, model, table: dict, z: list[Tensor], data: list[Path]) -> None:
    x = (padded(photo, model.cell) for photo in read_all(list_images(data)))
    photos = [model.sd.encode(x_hq).float() for x_hq in x]
    now, on_photos = (script.F_sim(model.hyper_encoders, latents).tolist() for latents in (z, photos))
    rows = [[f"{k} bpp", table[k]["cosine"], *fs] for k, *fs in zip(script.NAMES, now, on_photos)]
    print("\ncosine: the mapping's, on training crops before stage 2; now, on them and on the photographs\n"
          + text_table(["", "mapping's", "now", "photographs"], rows))


# --------------------------------------------------------------------------------------------- page

TITLE = "OSCAR"
COST = "0.977 G, 8.60 T"
FROZEN = {"1": "the VAE (Sec. 3.2)",
          "2": "the VAE, of the UNet all but LoRA (Secs. 3.2, 3.4)"}
SHOWN = ("OSCAR 0.0313", "OSCAR 0.1250")
COLUMNS = [(condition, metric) for condition in SHOWN for metric in ("PSNR", "SSIM", TINY_LPIPS, "detail")]
CONDITION = "OSCAR 0.1250"
CHOICES = [
    Choice(DEFAULT, "", "alignment, measured mapping, all losses"),
    Choice("no-alignment", "--no-alignment", "Fig. 7"),
    Choice("no-alignment-long", "--no-alignment", "as long as both stages", longer=2),
    Choice("no-L_sim", "--no-sim", "Fig. 7"),
    Choice("random-t", "--mapping random", "Fig. 7", 2),
    Choice("no-L_EA", "--losses mse,dists,gan", "Fig. 7", 2),
    Choice("no-L_G", "--losses mse,ea,dists", "Fig. 7", 2)]
MISSING = "without it all of stage 1 is missing"
CLAIMS = [
    Claim("aligned representations restore better", DEFAULT, "no-alignment", "Fig. 7, curves", but=MISSING),
    Claim("also where stage 2 gets stage 1's time", DEFAULT, "no-alignment-long", "our check", but=MISSING),
    Claim("alignment by the cosine L_sim alone helps", DEFAULT, "no-L_sim", "a reading of Fig. 7"),
    Claim("a measured mapping is better than a random one", DEFAULT, "random-t", "Fig. 7, curves"),
    Claim("L_EA-DISTS brings detail", DEFAULT, "no-L_EA", "Fig. 7, curves", TINY_LPIPS),
    Claim("so does the GAN loss", DEFAULT, "no-L_G", "Fig. 7, curves", TINY_LPIPS)]
EXERCISE = "random-t", {f"OSCAR {bpp}": ["PSNR", "SSIM", TINY_LPIPS, "detail"]
                        for bpp in ("0.0098", "0.0313", "0.0625", "0.1250")}
MORE = {"bpp": {"F_sim(r)": "cosine", "t(r)": "t"}}
EVAL = "", "--bpp 0.0313 0.1250"
ALSO = {}
PRINTED = {"cost": "profile --paper --size 768x512 --no-time", "time": "profile --size 768x512",
           "figures": "figures"}


def more_figures(metrics: dict, run: Path | None) -> dict:
    if not run or not (mapping := run / "model" / "mapping.json").exists():
        return {}
    cosine = {name: rate["cosine"] for name, rate in read_json(mapping).items() if name != "G_sim"}
    return {"cosine": cosine, "t": dict(zip(cosine, read_model(run, "oscar")[1]["t"]))}  # t as it was used


def rate_table(rows: list[dict], metrics: tuple[str, ...], shipped: tuple[str, ...]) -> str:
    """A row a codec and rate: the default run's metrics, then those of the weights that ship."""
    conditions = dict.fromkeys(c for r in rows for c, v in r["figures"].items() if "PSNR" in v)
    lines = []
    for condition in conditions:
        cells = [cell(rows, DEFAULT, condition, metric) for metric in ("bpp", *metrics)]
        if condition.startswith("OSCAR"):
            cells += [cell(rows, SHIPS, condition, metric) for metric in shipped]
        else:
            cells += [""] * len(shipped)
        lines.append([condition, *cells])
    return markdown(["", "true bpp", *metrics, *(f"shipped: {metric}" for metric in shipped)], lines)


METRICS = ("PSNR", "SSIM", TINY_LPIPS, "detail")
lead_table = partial(rate_table, metrics=("PSNR", TINY_LPIPS, "detail"), shipped=())
default_table = partial(rate_table, metrics=METRICS, shipped=METRICS)


def headline(rows: list[dict]) -> list[str]:
    made = [" and ".join(cell(rows, choice, condition, "PSNR") for condition in SHOWN) for choice in NAMED]
    lowest = {kind: f"{kind}, quality {q}" for kind, q in (("JPEG", 1), ("WebP", 0), ("AVIF", 0))}
    cells = {kind: [cell(rows, DEFAULT, c, m) for m in ("PSNR", "bpp")] for kind, c in lowest.items()}
    before = "lowest: " + "; ".join(f"{kind} {psnr} at {bpp}" for kind, (psnr, bpp) in cells.items())
    return ["PSNR at 0.0313 and 0.1250 bpp", before, *made, "-"]
