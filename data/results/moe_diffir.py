"""MoE-DiffIR, measured: Tables 1 to 3 by eval, the latter two's choices and Fig. 6 by ablations; beside
these, in eval and figures, which prompts the router picks for which codec, and how near one step comes."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common import rng
from data import speed
from data.files import UserError, list_images, note, read_json, write_json
from data.make_cir import LEVELS, RANGE, TRAINED, Task, available, compress, matched, parse_tasks, task_name
from data.pictures import read_image
from data.results.complexity import Parts, empty_latent, print_profile, vae_parts
from data.results.evaluate import Metrics, compare, finish, padded, picture_of, pyiqa_metric
from data.results.figures import panels, save
from data.results.seeds import (DEFAULT, TINY_LPIPS, Choice, Claim, restored_and_gains, restored_headline,
                                restored_table)
from data.results.tables import centre, mean, means, no_flags, plural, readable, save_png, text_table
from data.tiles import tiling

# --------------------------------------------------------------------------------------------- eval


def eval_flags(p, script) -> None:
    p.add_argument("--steps", type=int, nargs="+", help="calls of the UNet, a row each")
    p.add_argument("--codecs", nargs="+", metavar="CODEC[:LEVEL]",
                   help="as vvc (all three levels) or vvc:52 (default: those it was trained on)")
    p.add_argument("--lowest", action="store_true", help="only the lowest levels, as after training")
    p.add_argument("--pairs", nargs=2, type=Path, action="append", default=[],
                   metavar=("LQ_DIR", "HQ_DIR"), help="pictures that another program compressed, and "
                   "their originals, once for each --task; alone, unless --codecs is given too")
    p.add_argument("--task", action="append", default=[], metavar="CODEC:LEVEL",
                   help="what --pairs holds, as hific:low")
    p.add_argument("--against", nargs="+", type=Path, default=[], metavar="RUN", help="other models, too")


def evaluate(script, args) -> None:
    """Tables for every task, means for every codec (Table 1) and over all tasks (Tables 2 and 3), the
    routing; with --metrics all also FID."""
    model = script.load(args.weights, args.base)
    models = {"restored": model} | {f"by {run.name}": script.load(run, args.base) for run in args.against}
    steps = {name: args.steps or [by.sampling] for name, by in models.items()}
    for name, by in models.items():
        script.check_sampling(args, by, steps[name])
    lq_of = pairs_of(args)
    tasks = [*lq_of]
    files = []
    if args.codecs or not lq_of:
        tasks = list(dict.fromkeys([*tasks_of(args, model), *lq_of]))
        files = list_images(args.data)
    encoded = set(files)
    picks = []

    def degraded(task, image, file):
        if task in lq_of:
            lq = read_image(lq_of[task][file])[0] if file in lq_of[task] else None
        else:
            lq = compressed(task, image, file) if file in encoded else None
        if lq:
            picks.append((*task, gates_of(model, lq)))
        return lq

    def restored(by, n, tiles_for, image):
        return script.restore(by, image, n, args.fidelity, tiles_for(image.size))
    conditions = {":".join(task): partial(degraded, task) for task in tasks}
    rows = {f"{name}, {plural(n, 'step')}": partial(restored, by, n, tiling(by, args.tile))
            for name, by in models.items() for n in steps[name]}
    drawn = [":".join(task) for task in first_of_each_codec(tasks)]
    fid = FID() if args.metrics == "all" else None
    metrics = Metrics(("clipiqa", "maniqa") if fid else ())
    files = list(dict.fromkeys([*files, *(hq for pair in lq_of.values() for hq in pair)]))
    results = compare(files, conditions, rows, model.base, metrics, picture_of(args), drawn, fid and fid.keep)
    for name, values in (fid.values() if fid else {}).items():
        for row, value in values.items():
            results[name][row]["FID"] = value
    by_codec, gap = codec_means(results, list(rows))
    over_all = all_tasks(results, ["compressed", *rows])
    errors = {}
    if model.cfg.t_star:  # noise is not taken out in one step
        errors = print_latent_errors(model, args.data, [task for task in tasks if task not in lq_of])
    options = {"fidelity": args.fidelity, "tile": args.tile}
    finish(args, files, options=options, results=results, codecs=by_codec, all_tasks=over_all, gap_closed=gap,
           latent_error=errors, mutual_information=print_routing(picks))


def pairs_of(args) -> dict[Task, dict[Path, Path]]:
    """{task: {original: compressed}} of --pairs."""
    tasks = [task_name(task) for task in args.task]
    if len(set(tasks)) < len(tasks) or len(tasks) != len(args.pairs):
        raise UserError("--pairs and --task CODEC:LEVEL (as hific:low) go together, every pair with its own")
    return {task: {hq: lq for lq, hq in matched(*pair).values()} for task, pair in zip(tasks, args.pairs)}


def tasks_of(args, model) -> list[Task]:
    """--codecs, or the lowest level (after training) or all levels of what it was trained on."""
    trained = [codec for codec in dict.fromkeys(t.split(":")[0] for t in model.tasks) if codec in RANGE]
    lowest = [f"{codec}:{LEVELS[codec][0]}" for codec in trained]
    return available(parse_tasks(args.codecs or (lowest if args.lowest else trained)))[0]


def first_of_each_codec(tasks: list[Task]) -> list[Task]:
    """The lowest level, where all are given."""
    return list({task[0]: task for task in reversed(tasks)}.values())[::-1]


def compressed(task: Task, image: Image.Image, file: Path) -> Image.Image:
    try:
        return compress(image, *task)[0]
    except UserError as error:
        raise UserError(f"{':'.join(task)} {file}: {error}") from None


class FID:
    """Frechet inception distance by pyiqa between a condition's pictures and their originals, each once.
    Pictures wait on disk until `values`."""

    def __init__(self):
        self.metric = pyiqa_metric("fid")
        self.folder = tempfile.TemporaryDirectory()
        self.pictures: dict[str, dict[str, int]] = {}  # {condition: {row: how many}}

    def path(self, condition: str, row: str) -> Path:
        return Path(self.folder.name) / condition.replace(":", " ") / row

    def keep(self, condition: str, row: str, file: Path, image: Image.Image) -> None:
        rows = self.pictures.setdefault(condition, {})
        number = rows[row] = rows.get(row, 0) + 1
        save_png(image, self.path(condition, row) / f"{number:06d}.png")
        if row == "compressed":
            save_png(read_image(file)[0], self.path(condition, "original") / f"{number:06d}.png")

    def values(self) -> dict[str, dict[str, float]]:
        """{condition: {row: FID}}."""
        def of(condition, *rows):
            return float(self.metric(*(str(self.path(condition, row)) for row in rows)))
        return {name: {row: of(name, row, "original") for row in rows}
                for name, rows in self.pictures.items()}


def all_tasks(results: dict, rows: list[str]) -> dict[str, dict[str, float]]:
    """{row: {metric: mean over all conditions}}, printed: Tables 2 and 3."""
    table = {row: means([result[row] for result in results.values()]) for row in rows}
    print(f"\nTables 2 and 3: means over all {plural(len(results), 'task')} above\n"
          + text_table(["", *table["compressed"]], [[row, *of.values()] for row, of in table.items()]))
    return table


def codec_means(results: dict, rows: list[str]) -> tuple[dict, dict]:
    """({codec: {row: {metric: mean over its levels}}}, {codec: {row: share of the gap closed}}), printed."""
    levels: dict[str, list[dict]] = {}
    for name, result in results.items():
        levels.setdefault(name.split(":")[0], []).append(result)
    codecs = {codec: {row: means([r[row] for r in of]) for row in of[0]} for codec, of in levels.items()}

    def closed(v, row):
        low, here, high = (v[k]["PSNR"] for k in ("VAE(compressed)", row, "VAE(original)"))
        return None if None in (low, here, high) or low == high else (here - low) / (high - low)
    gap = {codec: {row: closed(v, row) for row in rows} for codec, v in codecs.items()}
    header = ["", *next(iter(codecs.values())), *(f"gap, {row.removeprefix('restored, ')}" for row in rows)]
    shares = {codec: ["-" if share is None else f"{100 * share:.1f} %" for share in v.values()]
              for codec, v in gap.items()}
    table = [[codec, *(r["PSNR"] for r in v.values()), *shares[codec]] for codec, v in codecs.items()]
    print("\nPSNR of each codec (mean over its levels above), and the share of the gap from VAE(compressed) "
          "to VAE(original) that is closed\n" + text_table(header, table))
    table = [[f"{codec}, {row}", *v[row].values()] for codec, v in codecs.items()
             for row in ("compressed", *rows)]
    print("\nTable 1: means of each codec over its levels above\n"
          + text_table(["", *next(iter(codecs.values()))[rows[0]]], table))
    return codecs, gap


@torch.inference_mode()
@speed.autocast()
def print_latent_errors(model, data: list[Path], tasks: list[Task]) -> dict[str, float]:
    """Prints and returns for each codec, at the first of its `tasks`, the squared error of z_0 after one step
    to the original's latent, as a multiple of z_lq's own: below 1 stage 1 helps. Of 256 x 256 pixels in the
    middle of every photograph."""
    first = first_of_each_codec([task for task in tasks if task[0] in RANGE])
    errors = {task: torch.zeros(2) for task in first}
    for file, image in readable(list_images(data)):
        z_hq = model.encode(padded(centre(image, 256), model.cell))[0].float()  # (1, C, h, w)
        for task in first:
            try:
                x_lq = padded(centre(compressed(task, image, file), 256), model.cell)
            except UserError as error:
                note(f"skipped: {error}")
                continue
            z_lq = model.encode(x_lq)[0].float()
            z_0 = model.sample(z_lq, x_lq, 1, [])
            errors[task] += torch.stack([(z - z_hq).square().mean().cpu() for z in (z_0, z_lq)])
    ratios = {":".join(task): (one / own).item() for task, (one, own) in errors.items() if own}
    for name, ratio in ratios.items():
        print(f"latent error after one step, of the compressed latent's own: {name} {ratio:.3f}")
    return ratios


def routing(picks: list[tuple[str, str, list[Tensor]]]) -> list[dict[str, float]]:
    """For every scale: mutual information in bits between the codec and the prompts that get more than an
    even share of the gates, and its mean over 200 shuffles of the codecs, which a router that ignores them
    has by chance. `picks`: (codec, level, mean gates (N,) of every scale)."""
    from torchmetrics.functional.clustering import mutual_info_score
    names = list(dict.fromkeys(codec for codec, _, _ in picks))
    codecs = torch.tensor([names.index(codec) for codec, _, _ in picks])
    rows = []
    for scale in zip(*(gates for _, _, gates in picks)):
        sets = torch.stack([g > g.mean() for g in scale]).long().unique(dim=0, return_inverse=True)[1]
        shuffles = (rng(0, 9, k).permutation(len(codecs)) for k in range(200))
        bits, *shuffled = (mutual_info_score(c, sets).item() / torch.tensor(2.0).log().item()
                           for c in (codecs, *(codecs[s] for s in shuffles)))
        rows.append({"bits": bits, "by chance": mean(shuffled), "excess": bits - mean(shuffled),
                     "sets": len(sets.unique())})
    return rows


def print_routing(picks: list[tuple[str, str, list[Tensor]]]) -> list[dict[str, float]]:
    rows = routing(picks) if picks else []
    if rows and len({codec for codec, _, _ in picks}) > 1:
        print(f"\nrouter: what the prompts picked tell of the codec, {len(picks)} compressed pictures\n"
              + text_table(["scale", "bits", "by chance", "excess", "different sets"],
                           [[f"h / {2**i}", r["bits"], r["by chance"], r["excess"], str(r["sets"])]
                            for i, r in enumerate(rows)]))
    return rows


# ------------------------------------------------------------------------------------------ profile

profile_flags = no_flags


def build(script, base, cfg1, cfg2, lora: bool):
    width = read_json(Path(base) / "unet" / "config.json")["cross_attention_dim"]
    return script.MoEDiffIR(base, cfg1, torch.zeros(77, width), cfg2, weights=False)


def parts(model, x: Tensor) -> Parts:
    x = x.to(model.sd.vae.dtype)
    unet = model.sd.unet
    compensator = model.compensator
    z = empty_latent(model.sd, x)
    t = torch.zeros(1, device=x.device)
    c = model.text(x)
    dp = model.degradation_prior(x)
    ys = model.module(z, dp)[0]
    features = model.encode(x)[1]
    (encoder, _), decoder = vae_parts(model.sd, x, z)
    return {"once: VAE encoder": (encoder, lambda: model.encode(x)),
            "once: degradation prior (CLIP)": ([model.prior], lambda: model.degradation_prior(x)),
            "once: Visual2Text and CLIP": ([model.v2t], lambda: model.text(x)),
            "once: MoE-Prompt Module": ([model.module], lambda: model.module(z, dp)),
            "a step: UNet": ([unet], lambda: unet(z, t, c)),
            "a step: SPADE": ([model.spade], lambda: [spade.maps(ys[i]) for spade, (i, _) in zip(
                model.spade, model.modulated)]),
            "once: VAE decoder": decoder,
            "once: compensator": ([compensator], lambda: [compensator.residual(i, features[i], features[i])
                                                          for i in compensator.levels])}


profile = partial(print_profile, parts=parts, steps=(1, 200))

# ------------------------------------------------------------------------------------------ figures

AGAINST = None


def figure_flags(p, script) -> None:
    p.add_argument("--codecs", nargs="+", metavar="CODEC[:LEVEL]", default=TRAINED)


@torch.inference_mode()
def gates_of(model, image: Image.Image) -> list[Tensor]:
    """The router's gates (N,) at every scale, mean over the positions of a picture's middle, 256 x 256."""
    x_lq = padded(centre(image, 256), model.cell)
    gates = model.module(model.encode(x_lq)[0], model.degradation_prior(x_lq))[1]  # (1, L, N) each
    return [g[0].mean(0).float().cpu() for g in gates]


def figures(script, args) -> None:
    """Which prompts the router picks for which codec and level: each row's shares sum to 1. Below, how far
    apart the codecs' rows are: total variation, 0 for the same prompts, 1 for none in common."""
    model = script.load(args.weights)
    kind = model.module.prompt[0].kind
    if kind != "moe":
        raise UserError(f"figures: {args.weights} was trained with --prompt {kind}, which routes nothing")
    files = list_images(args.data)
    tasks, _ = available(parse_tasks(args.codecs))
    names = [":".join(task) for task in tasks]
    picks = []
    for file in tqdm(files, "figures", disable=None):
        image = read_image(file)[0]
        picks += [(*task, gates_of(model, compress(image, *task)[0])) for task in tasks]
    share = torch.zeros(len(model.module.prompt), len(tasks), len(picks[0][2][0]))  # (scale, task, prompt)
    for codec, level, gates in picks:
        chosen = torch.stack([g / g.sum() for g in gates])
        share[:, tasks.index((codec, level))] += chosen / len(files)
    codecs = list(dict.fromkeys(codec for codec, _ in tasks))
    rows_of = [[i for i, (c, _) in enumerate(tasks) if c == codec] for codec in codecs]
    of_codec = torch.stack([share[:, rows].mean(1) for rows in rows_of], 1)  # (scale, codec, prompt)
    apart = (of_codec[:, :, None] - of_codec[:, None]).abs().sum(-1) / 2     # (scale, codec, codec)
    save({"router": draw_router(share, names, apart, codecs)}, args.weights)
    variation = {"codecs": codecs, "scales": apart.tolist()}
    write_json(args.weights / "samples" / "router.json", {
        "tasks": names, "images": len(files), "share": share.tolist(), "total_variation": variation,
        "mutual_information": print_routing(picks)})


def draw_router(share: Tensor, tasks: list[str], apart: Tensor, codecs: list[str]):
    heights = (0.22 * len(tasks), 0.4 * len(codecs))
    scales = len(share)
    figure, axes = panels(2, scales, 3.4 * scales + 1, 1.6 + sum(heights), height_ratios=heights)
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
    figure.colorbar(top, ax=axes[0], label="share of the gates")
    figure.colorbar(below, ax=axes[1], label="total variation")
    return figure


# --------------------------------------------------------------------------------------------- page

TITLE = "MoE-DiffIR"
COST = "1.750 G, 298 T (200 steps)"
FROZEN = {"1": "VAE and UNet; the MoE-Prompt Module alone trains (Sec. 3.4)",
          "2": "all but the decoder's compensator (Secs. 3.4, 4.1)"}
TASKS = "jpeg:5", "webp:5", "hevc:47", "vvc:47", "vvc:52", "avc:47"
LEAD = [("jpeg:5", "PSNR"), ("jpeg:5", TINY_LPIPS), ("webp:5", "PSNR"), ("hevc:47", "PSNR")]
TABLE = [*((task, "PSNR") for task in TASKS), *((task, TINY_LPIPS) for task in TASKS[:3]),
         *(("jpeg:5", metric) for metric in ("PSNR-B", "grid Y"))]
COLUMNS = [*((task, "PSNR") for task in TASKS[:4]), *((task, TINY_LPIPS) for task in TASKS[:2]),
           *(("latent error", task) for task in TASKS[:4])]
CONDITION = "jpeg:5"
CHOICES = [
    Choice(DEFAULT, "", "MoE-Prompt, V2T, DP; N 7, K 3"),
    Choice("none", "--prompt none --no-v2t --no-dp", "Table 2"),
    Choice("single", "--prompt single --no-v2t --no-dp", "Table 2"),
    Choice("multiple", "--prompt multiple --no-v2t --no-dp", "Table 2"),
    Choice("moe", "--no-v2t --no-dp", "Tables 2 and 3"), Choice("moe-v2t", "--no-dp", "Table 3"),
    Choice("moe-dp", "--no-v2t", "Table 3"), Choice("N1-K1", "--experts 1 --top-k 1", "Fig. 6"),
    Choice("N14-K3", "--experts 14", "Fig. 6"), Choice("N7-K1", "--top-k 1", "Fig. 6"),
    *(Choice(f"N{n}-K3", f"--experts {n}", "Fig. 6a", paper_only=True) for n in (4, 11, 17, 21)),
    *(Choice(f"N7-K{k}", f"--top-k {k}", "Fig. 6b", paper_only=True) for k in (5, 7))]
CLAIMS = [
    Claim("prompts help", "moe", "none", "LIVE-1 29.02, 28.73 dB"),
    Claim("many are better than a single one", "multiple", "single", "28.98, 28.86 dB"),
    Claim("MoE-Prompt is better than their plain mixture", "moe", "multiple", "29.02, 28.98 dB"),
    Claim("the prior DP raises fidelity", "moe-dp", "moe", "29.07, 29.02 dB"),
    Claim("the adapter brings detail", "moe-v2t", "moe", "LPIPS 0.1145, 0.1179", TINY_LPIPS),
    Claim("one expert cannot model all tasks", DEFAULT, "N1-K1", "Fig. 6a, curves"),
    Claim("fourteen are harder to train than seven", DEFAULT, "N14-K3", "Fig. 6a, curves"),
    Claim("choosing one instead of three raises PSNR", "N7-K1", DEFAULT, "Fig. 6b, curves")]
EXERCISE = "none", {"latent error": ["jpeg:5", "webp:5", "hevc:47", "vvc:47"]}
MORE = {"": {"latent error, one step": "latent error"},
        "what the router's choice tells of the codec": {"excess bits": "router"}}
EVAL = ("--codecs jpeg:5 webp:5 hevc:47 vvc:47 vvc:52 avc:47", "--codecs jpeg:5 webp:5 hevc:47 vvc:47",
        "--codecs jpeg webp hevc vvc")
ALSO = {}
PRINTED = {"cost": "profile --paper --size 1024 --no-time", "time": "profile --size 1024"}


def more_figures(metrics: dict, run: Path | None) -> dict:
    excess = {f"scale h / {2**i}": scale["excess"] for i, scale in enumerate(metrics["mutual_information"])}
    over_all = next(means for row, means in metrics["all_tasks"].items() if row.startswith("restored"))
    return {"latent error": metrics["latent_error"], "router": excess, "all tasks": over_all}


lead_table = partial(restored_table, columns=LEAD)
default_table = partial(restored_and_gains, columns=TABLE)
headline = partial(restored_headline, condition="jpeg:5")
