"""The papers' analysis figures, drawn from a trained model into RUN/samples.

    python codiff.py figures         Figs. 4, 7     python sodiff.py figures        Fig. 3; QF and timestep
    python oscar.py figures          Figs. 2, 4, 8  python moe_diffir.py figures    the router's choices"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import common
from common import (PHOTOS, ROOT, UserError, atomic, device, jpeg, list_images, note, pad_to, read_image,
                    read_json, to_tensor, write_json)
from data.results.evaluate import (CLASSICAL, alignment, captioned, curve, predictions, print_routing,
                                   prompts, read_all, text_table)


def pyplot():
    """Drawing to files."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures needs matplotlib: pip install -e '.[figures]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


def save(figures: dict, weights: Path) -> None:
    """{name: figure} -> RUN/samples/NAME.png."""
    for name, figure in figures.items():
        target = weights / "samples" / f"{name}.png"
        atomic(target, lambda tmp: figure.savefig(tmp, dpi=110))
        print(target)


def principal_components(points: Tensor) -> Tensor:
    """(N, D) -> (N, 2)."""
    points = points - points.mean(0)
    return points @ torch.linalg.svd(points, full_matrices=False).Vh[:2].T


def smoothed(values: list[float], keep: float = 0.9) -> list[float]:
    out = values[:1]
    for v in values[1:]:
        out.append(keep * out[-1] + (1 - keep) * v)
    return out


# ---------------------------------------------------------------------------------------- CODiff


@torch.inference_mode()
def read_cave(cave, files: list[Path], qfs: list[int], what: str) -> tuple[Tensor, Tensor]:
    """Mean token (len(qfs), len(files), C) and predicted QF (len(qfs), len(files)) of every file's JPEGs."""
    c, qf_hat = [], []
    photos = read_all(files)
    for qf in tqdm(qfs, what, leave=False, disable=None):
        x = (pad_to(to_tensor(jpeg(photo, qf))[None], cave.stride).to(device()) for photo in photos)
        maps = [cave.encode((x_lq + 1) / 2)[0] for x_lq in x]
        c.append(torch.cat([m.mean((2, 3)) for m in maps]).cpu())
        qf_hat.append(torch.cat([100 - 100 * cave.qf_pred(m)[:, 0] for m in maps]).cpu())
    return torch.stack(c), torch.stack(qf_hat)


def codiff_figures(codiff, args) -> None:
    """Fig. 4: CaVE's embeddings by QF in two dimensions (PCA), QFs never trained on ringed in red. Fig. 7:
    mean squared error of the predicted QF at QF 1 to 6. Dual beside explicit learning."""
    plt, files, runs = pyplot(), list_images(args.data), {}
    for folder in (args.weights, args.against):
        if folder == args.weights or (folder / "model" / "stage1.safetensors").exists():
            cfg = codiff.Stage1.read(common.read_model(folder, "codiff", stage=1)[1])
            runs[cfg.learning] = cfg, codiff.load_cave(folder).eval().to(device())
    if len(runs) < 2:
        note(f"draws {', '.join(runs)} learning only; to compare: "
             f"codiff.py train --stage 1 --learning explicit --out {args.against}")
    fig4, axes = plt.subplots(1, len(runs), figsize=(5.2 * len(runs), 4), squeeze=False, layout="constrained")
    fig7, bars = plt.subplots(figsize=(5, 3), layout="constrained")
    far, near, results = [1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90], [1, 2, 3, 4, 5, 6], {}
    for i, (learning, (cfg, cave)) in enumerate(runs.items()):
        c = read_cave(cave, files, far, f"Fig. 4, {learning}")[0]
        for qf, points in zip(far, principal_components(c.flatten(0, 1)).unflatten(0, c.shape[:2])):
            edge = "none" if cfg.qf_min <= qf <= cfg.qf_max else "red"
            color = plt.cm.viridis(qf / 95)
            axes[0, i].scatter(*points.T, s=30, color=color, edgecolors=edge, label=f"QF {qf}")
        axes[0, i].set_title(f"{learning} learning")
        qf_hat = read_cave(cave, files, near, f"Fig. 7, {learning}")[1]
        error = (qf_hat - torch.tensor(near)[:, None]).square().mean(1).tolist()
        bars.bar([qf + 0.4 * i - 0.2 for qf in near], error, 0.4, label=f"{learning} learning")
        results[learning] = dict(zip(map(str, near), error))
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    bars.set(xlabel="quality factor", ylabel="QF prediction, MSE")
    bars.legend()
    save({"fig4": fig4, "fig7": fig7}, args.weights)
    rows = [[learning, *v.values()] for learning, v in results.items()]
    print(text_table(["MSE of the predicted QF at", *map(str, near)], rows))


# ---------------------------------------------------------------------------------------- SODiff


def draw_fig3(plt, runs: dict, images: list[Image.Image], e_text: Tensor):
    """e_img and e_text in two dimensions, a panel a run."""
    qfs, rows, n = (5, 10, 20, 40, 80), [], len(images)
    size = (5.2 * len(runs), 4.4)
    figure, axes = plt.subplots(1, len(runs), figsize=size, squeeze=False, layout="constrained")
    for ax, (name, model) in zip(axes[0], runs.items()):
        jpegs = [[jpeg(image, qf) for image in images] for qf in qfs]
        e_img = torch.stack([prompts(model, of_qf) for of_qf in jpegs])  # (QF, N, 77, D_text)
        xy = principal_components(torch.cat([e_text.flatten(1), e_img.flatten(0, 1).flatten(1)]))
        text_xy, img_xy = xy[:n], xy[n:].unflatten(0, (len(qfs), n))
        ax.scatter(*img_xy.flatten(0, 1).T, s=16, color="tab:blue", alpha=0.6, label="e_img (QF 5 to 80)")
        ax.scatter(*text_xy.T, s=28, color="tab:red", label="e_text")
        for pair in torch.stack([text_xy, img_xy.mean(0)], 1):
            ax.plot(*pair.T, color="grey", linewidth=0.5)
        ax.set(title=name, xlabel="first principal component", ylabel="second")
        size = e_img.flatten(2).norm(dim=2).mean() / e_text.flatten(1).norm(dim=1).mean()
        rows.append([name, *alignment(e_img.mean(0), e_text), size.item()])
    axes[0, -1].legend(fontsize=8)
    print(text_table(["", "cosine, own e_text", "others'", "|e_img| / |e_text|"], rows))
    return figure


def sodiff_figures(sodiff, args) -> None:
    """Fig. 3: e_img and e_text in two dimensions (PCA; the paper takes UMAP), aligned and, from a second run,
    not. And predicted QF and timestep against the true QF."""
    plt, model, figures = pyplot(), sodiff.load(args.weights), {}
    images, texts = captioned(sodiff.read_captions(args.data or [PHOTOS]))
    if len(texts) < 2:
        note("no Fig. 3: it needs at least two photographs with captions (captions.jsonl beside them)")
    else:
        runs = {"aligned (stage 1)": model}
        if (args.against / "model" / "stage2.safetensors").exists():
            runs["not aligned"] = sodiff.load(args.against)
        else:
            note("draws the aligned e_img only; to compare: "
                 f"sodiff.py train --lambda-align 0 --out {args.against}")
        figures["fig3"] = draw_fig3(plt, runs, images, common.text_tokens(model.base, texts))
    if model.predictor is not None:
        qfs, files = [1, 2, 3, 4, *range(5, 96, 5)], list_images(args.data or [PHOTOS / "val"])
        figures["timestep"], axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        for ax, v, name in zip(axes, predictions(model, files, qfs), ("predicted QF", "predicted timestep")):
            ax.plot(qfs, v, color="tab:blue", alpha=0.25, linewidth=0.7)
            ax.plot(qfs, v.mean(1), color="tab:blue", label=f"mean of {len(files)} photographs")
            ax.set(xlabel="true QF", ylabel=name)
        axes[0].plot([0, 95], [0, 95], color="grey", linestyle=":", label="exact")
        axes[0].legend(fontsize=8)
    save(figures, args.weights)


# ----------------------------------------------------------------------------------------- OSCAR


def draw_curve(results: dict, target: Path) -> Path:
    """Fig. 5: a panel for each metric that could be measured, against true bits per pixel."""
    plt = pyplot()
    panels = ("PSNR", "SSIM", "LPIPS-VGG", "DISTS", "MUSIQ", "CLIPIQA")
    panels = [k for k in panels if results["VAE alone"].get(k) is not None]
    size = (4.5 * len(panels), 3.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, metric in zip(axes[0], panels):
        axis.plot(*zip(*curve(results, "OSCAR", metric)), "o-", label="OSCAR")
        for name, marker in zip(CLASSICAL, "sv^"):
            if points := curve(results, name, metric):
                axis.plot(*zip(*points), f"{marker}-", color="gray", label=name)
        axis.axhline(results["VAE alone"][metric], color="gray", linestyle=":", label="VAE alone")
        axis.set(xlabel="bits per pixel, from the file's length", ylabel=metric, xscale="log")
    axes[0, 0].legend(fontsize=7)
    atomic(target, lambda tmp: figure.savefig(tmp, dpi=110))
    plt.close(figure)
    return target


@torch.inference_mode()
def residual(Q, z: list[Tensor], alpha_bar: Tensor) -> Tensor:
    """eps of OSCAR's Eq. 11, flat: (z_tilde - sqrt(alpha_bar_t) z_0) / sqrt(1 - alpha_bar_t)."""
    a = alpha_bar
    eps = [(Q.decode(Q.encode(z_0)) - a.sqrt() * z_0) / (1 - a).sqrt() for z_0 in z]
    return torch.cat([e.flatten() for e in eps]).cpu()


def describe(eps: Tensor, z_0: Tensor, a: Tensor) -> list[float]:
    """Mean, deviation, excess kurtosis of the residual noise; its cosine to z_0; z_tilde's RMS over z_0's."""
    z_tilde = a.sqrt() * z_0 + (1 - a).sqrt() * eps
    kurtosis = (eps - eps.mean()).pow(4).mean() / eps.var()**2 - 3
    cosine = torch.nn.functional.cosine_similarity(eps, z_0, dim=0)
    return [v.item() for v in (eps.mean(), eps.std(), kurtosis, cosine, z_tilde.norm() / z_0.norm())]


def draw_residuals(axes, eps: Tensor, title: str, color: str) -> None:
    """Histogram and QQ-plot against a standard normal."""
    top, bottom = axes
    draw_histogram(top, eps, None, color)
    top.set_title(title, fontsize=9)
    p = (torch.arange(200) + 0.5) / 200
    quantiles = torch.distributions.Normal(0, 1).icdf(p)
    bottom.plot(quantiles, eps.sort().values[(p * len(eps)).long()], ".", markersize=3, color=color)
    bottom.plot([-3, 3], [-3, 3], color="red", linewidth=1)


def draw_histogram(axis, eps: Tensor, label: str | None, color: str) -> None:
    axis.hist(eps.clamp(-4, 4).numpy(), 81, range=(-4, 4), density=True, color=color, alpha=0.6, label=label)
    u = torch.linspace(-4, 4, 161)
    axis.plot(u, torch.distributions.Normal(0, 1).log_prob(u).exp(), color="red", linewidth=1)


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


@torch.inference_mode()
def training_latents(oscar, sd, config: dict, cfg) -> list[Tensor]:
    """Of the first crops, which stage 1 measured."""
    photos = oscar.Photos([ROOT / folder for folder in config["data1"]], cfg, 1, config["seed"])
    crops = (photos[n][1][None].to(device()) for n in range(min(64, cfg.measure)))
    return [sd.encode(x).float() for x in crops]


def hyper_encoders_of(oscar, weights: Path, config: dict, cfg, z: list[Tensor]) -> tuple:
    """Those that stage 1 starts from, and its result; both give z_tilde the RMS of the training latents z."""
    torch.manual_seed(config["seed"])
    before, after = (oscar.HyperEncoders(cfg, z[0].shape[1]).to(device()) for _ in range(2))
    common.load_trained(after, common.read_model(weights, "oscar", stage=1)[0], weights)
    oscar.set_gain(before, z)
    return before, after.eval()


def oscar_figures(oscar, args) -> None:
    """Fig. 4: residual noise before and after alignment, as histogram and QQ-plot, on training crops. Fig. 8:
    the same at one rate, and every rate's cosine through both stages. Fig. 2's idea: cosine -> timestep."""
    plt, model, results = pyplot(), oscar.load(args.weights), {}
    config = read_json(args.weights / "config.json")
    table = read_json(args.weights / "model" / "mapping.json")
    cfg = oscar.Stage1.read(config)
    z = training_latents(oscar, model.sd, config, cfg)
    before, after = hyper_encoders_of(oscar, args.weights, config, cfg, z)
    kinds = (("before", before, "tab:orange"), ("after", after, "tab:blue"),
             ("after stage 2", model.hyper_encoders, None))  # of the last the numbers, no picture
    fig4, axes = plt.subplots(2, 6, figsize=(16, 5), layout="constrained")
    fig8, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for i, r in enumerate((0, 2, 7)):
        a = model.sd.alpha_bar[table[oscar.NAMES[r]]["t"]]
        for j, (when, Qs, color) in enumerate(kinds):
            eps, name = residual(Qs[r], z, a), f"{oscar.NAMES[r]} bpp, {when}"
            results[name] = describe(eps, torch.cat([z_0.flatten() for z_0 in z]).cpu(), a.cpu())
            if color:
                draw_residuals(axes[:, 2 * i + j], eps, name, color)
            if color and r == 2:
                draw_histogram(left, eps, f"{when} alignment", color)
    left.set_title(f"residual noise, {oscar.NAMES[2]} bpp")
    left.legend(fontsize=7)
    log = [json.loads(line) for line in (args.weights / "log.jsonl").read_text().splitlines()]
    draw_cosines(right, log, oscar.NAMES)
    fig2, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    approximation = "sqrt(alpha_bar_t), Eq. 12's approximation"
    axis.plot(model.sd.alpha_bar.cpu().sqrt(), "--", color="gray", label=approximation)
    axis.plot(table["G_sim"], color="red", label="G_sim(t), a latent position's expectation")
    for name in oscar.NAMES:
        axis.plot(table[name]["t"], table[name]["cosine"], "o", label=f"{name} bpp: t = {table[name]['t']}")
    axis.set(xlabel="pseudo diffusion timestep t", ylabel="cosine similarity")
    axis.legend(fontsize=7)
    save({"fig2": fig2, "fig4": fig4, "fig8": fig8}, args.weights)
    print(text_table(["residual noise", "mean", "deviation", "excess kurtosis", "cosine to z_0",
                      "RMS of z_tilde / z_0"], [[name, *v] for name, v in results.items()]))
    with torch.inference_mode():
        x = (pad_to(to_tensor(photo)[None], model.cell) for photo in read_all(list_images(args.data)))
        photos = [model.sd.encode(x_hq.to(device())).float() for x_hq in x]
    now, on_photos = (oscar.F_sim(model.hyper_encoders, latents).tolist() for latents in (z, photos))
    rows = [[f"{k} bpp", table[k]["cosine"], *fs] for k, *fs in zip(oscar.NAMES, now, on_photos)]
    print("\ncosine: the mapping's, on training crops before stage 2; now, on them and on the photographs\n"
          + text_table(["", "mapping's", "now", "photographs"], rows))


# ------------------------------------------------------------------------------------ MoE-DiffIR


@torch.inference_mode()
def gates_of(model, image: Image.Image) -> list[Tensor]:
    """Gates (N,) of every scale for a picture, at the timestep where sampling starts."""
    x_lq = to_tensor(image)[None].to(device())
    z_lq, _ = model.encode(pad_to(x_lq, model.cell))
    t = torch.full((1,), model.cfg.start_t, device=x_lq.device)
    return [g[0].float().cpu() for g in model.module(z_lq, t, model.degradation_prior(x_lq))[1]]


def moe_diffir_figures(moe_diffir, args) -> None:
    """Which prompts the router picks for which codec and level: each row's shares sum to 1. Below, how far
    apart the codecs' rows are: total variation, 0 for the same prompts, 1 for none in common."""
    from data.make_cir import available, compress, parse_tasks
    plt, model = pyplot(), moe_diffir.load(args.weights)
    kind = model.module.prompt[0].kind
    if kind != "moe":
        raise UserError(f"figures: {args.weights} was trained with --prompt {kind}, which routes nothing")
    files, (tasks, _) = list_images(args.data), available(parse_tasks(args.codecs))
    picks, scales, names = [], len(model.module.prompt), [":".join(task) for task in tasks]
    for file in tqdm(files, "figures", disable=None):
        image = read_image(file)[0]
        picks += [(*task, gates_of(model, compress(image, *task)[0])) for task in tasks]
    share = torch.zeros(scales, len(tasks), len(picks[0][2][0]))
    for codec, level, gates in picks:
        chosen = torch.stack([(g > 0).float() / (g > 0).sum() for g in gates])
        share[:, tasks.index((codec, level))] += chosen / len(files)
    codecs = list(dict.fromkeys(codec for codec, _ in tasks))
    rows_of = [[i for i, (c, _) in enumerate(tasks) if c == codec] for codec in codecs]
    of_codec = torch.stack([share[:, rows].mean(1) for rows in rows_of], 1)
    apart = (of_codec[:, :, None] - of_codec[:, None]).abs().sum(-1) / 2
    save({"router": draw_router(plt, share, names, apart, codecs)}, args.weights)
    variation = {"codecs": codecs, "scales": apart.tolist()}
    write_json(args.weights / "samples" / "router.json", {
        "tasks": names, "images": len(files), "share": share.tolist(), "total_variation": variation,
        "mutual_information": print_routing(picks)})


def draw_router(plt, share: Tensor, tasks: list[str], apart: Tensor, codecs: list[str]):
    heights, scales = (0.22 * len(tasks), 0.4 * len(codecs)), len(share)
    figure, axes = plt.subplots(2, scales, figsize=(3.4 * scales + 1, 1.6 + sum(heights)), squeeze=False,
                                layout="constrained", height_ratios=heights)
    for i in range(scales):
        top = axes[0, i].imshow(share[i], vmin=0, vmax=float(share.max()), cmap="viridis", aspect="auto")
        prompts_of = range(share.shape[2])
        axes[0, i].set(title=f"scale h / {2**i}", xlabel="prompt", xticks=prompts_of,
                       xticklabels=[n + 1 for n in prompts_of], yticks=range(len(tasks)),
                       yticklabels=tasks if i == 0 else [])
        below = axes[1, i].imshow(apart[i], vmin=0, vmax=1, cmap="magma")
        ticks = range(len(codecs))
        axes[1, i].set(xticks=ticks, yticks=ticks, yticklabels=codecs if i == 0 else [])
        axes[1, i].set_xticklabels(codecs, rotation=45)
    figure.colorbar(top, ax=axes[0], label="share of the choices")
    figure.colorbar(below, ax=axes[1], label="total variation")
    return figure


# ---------------------------------------------------------------------------------- command line


def main(name: str, argv: list[str]) -> None:
    p = common.CommandLine(f"{name}.py figures", description="the paper's figures, from a trained model")
    p.add_argument("--weights", type=Path, default=ROOT / "runs" / name, help="a run's folder")
    p.add_argument("--data", nargs="+", metavar="DIR", default=None if name == "sodiff" else [PHOTOS / "val"],
                   help="photographs (default: the bundled ones)")
    if name in ("codiff", "sodiff"):
        other = {"codiff": "explicit", "sodiff": "no-align"}[name]
        p.add_argument("--against", type=Path, default=ROOT / "runs" / f"{name}-{other}",
                       help="a second run's folder, for comparison")
    if name == "moe_diffir":
        from data.make_cir import TRAINED
        p.add_argument("--codecs", nargs="+", metavar="CODEC[:LEVEL]", default=TRAINED)
    globals()[f"{name}_figures"](importlib.import_module(name), p.parse_args(argv))
