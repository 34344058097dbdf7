"""Tables: what a trained model restores, against the untouched input and what its base can reach.

    python codiff.py eval --data my_photos --qf 5 10 20        as for all four scripts; `train` ends with it

Prints the table, writes RUN/metrics.json and a picture to look at, RUN/samples/eval.png."""

from __future__ import annotations

import importlib
import io
import math
import socket
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, features
from torch import Tensor
from tqdm import tqdm

import common
from common import (PHOTOS, ROOT, SD, SHIPPED, UserError, atomic, device, jpeg, list_images, note, pad_to,
                    read_image, rng, to_image, to_tensor, write_json)

# -------------------------------------------------------------------------------------- metrics


class Metrics:
    """Full-reference metrics on the 8-bit images that a user gets. `names` is the table's header; a value
    is None where its network's weights are not to be had."""

    def __init__(self, extra: tuple[str, ...] = (), net: str = "Alex"):
        """`extra`: metrics of pyiqa; `net`: LPIPS' backbone, Alex or VGG; their values do not compare."""
        self.lpips, self.dists = None, None
        try:
            import lpips
            socket.setdefaulttimeout(8)  # a download that gets no answer fails after seconds
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # lpips calls torchvision by an old keyword
                self.lpips = lpips.LPIPS(net=net.lower(), verbose=False).to(device())
            self.dists = common.dists_vgg16().to(device())
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            note(f"LPIPS and DISTS show as '-', since their networks' weights are not to be had: {reason}")
        self.extra = {k: pyiqa_metric(k) for k in extra}
        self.names = ["PSNR", "PSNR-B", "SSIM", "detail", "grid Y", "grid C", f"LPIPS-{net}", "DISTS",
                      *(k.upper() for k in extra)]

    @torch.inference_mode()
    def __call__(self, image: Image.Image, target: Image.Image) -> dict[str, float | None]:
        from torchmetrics.functional.image import (peak_signal_noise_ratio,
                                                   structural_similarity_index_measure)
        x, y = ((to_tensor(i)[None] + 1) * 127.5 for i in (image, target))
        luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        xl, yl = (x * luma).sum(1, keepdim=True), (y * luma).sum(1, keepdim=True)
        xn, yn = (i.to(device()) / 127.5 - 1 for i in (x, y))
        side = min(x.shape[2:])  # too small a picture has no structure, and no deep features
        ssim = structural_similarity_index_measure(x, y, data_range=255.0) if side > 10 else None
        deep = [net(xn, yn) if net and side >= 32 else None for net in (self.lpips, self.dists)]
        values = [peak_signal_noise_ratio(x, y, data_range=255.0), psnr_b(xl, yl), ssim, detail(xl, yl),
                  *block_grid(image), *deep]
        values += [metric((xn + 1) / 2) for metric in self.extra.values()]
        return {k: None if v is None else float(v) for k, v in zip(self.names, values)}


def pyiqa_metric(name: str):
    try:
        import pyiqa
    except ImportError:
        raise UserError("--metrics all needs pyiqa (non-commercial licence): "
                        "pip install -e '.[metrics]'") from None
    return pyiqa.create_metric(name, device=device())


class FID:
    """Frechet inception distance by pyiqa between all restored pictures of a codec and their originals. A
    condition's codec is its name up to a colon: vvc of vvc:47. Pictures wait on disk until `values`."""

    def __init__(self):
        self.metric, self.folder, self.pictures = pyiqa_metric("fid"), tempfile.TemporaryDirectory(), {}

    def keep(self, condition: str, row: str, file: Path, image: Image.Image) -> None:
        codec = condition.split(":")[0]
        number = self.pictures.setdefault(codec, {}).setdefault(row, 0)
        self.pictures[codec][row] += 1
        for name, picture in {row: image, f"{row}, original": read_image(file)[0]}.items():
            save_png(picture, Path(self.folder.name) / codec / name / f"{number:06d}.png")

    def values(self) -> dict[str, dict[str, float]]:
        """{codec: {row: FID}}."""
        def of(codec, row):
            folder = Path(self.folder.name) / codec
            return float(self.metric(str(folder / row), str(folder / f"{row}, original")))
        return {codec: {row: of(codec, row) for row in rows} for codec, rows in self.pictures.items()}


def psnr_b(x: Tensor, y: Tensor) -> Tensor:
    """PSNR with the blocking-effect factor (Yim and Bovik 2011) of 8x8 blocks; (1, 1, H, W) in [0, 255]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio_with_blocked_effect
    h, w = (n // 8 * 8 for n in x.shape[2:])  # torchmetrics counts blocks from the image's size
    if min(h, w) < 16:
        return torch.tensor(float("nan"))
    return peak_signal_noise_ratio_with_blocked_effect(x[..., :h, :w], y[..., :h, :w], data_range=255.0)


def detail(x: Tensor, y: Tensor) -> Tensor | None:
    """Sharpness: luma's mean step from pixel to pixel over the original's; (1, 1, H, W). Blur is below 1;
    noise, ringing and blocks count as well."""
    steps = [sum(i.diff(dim=axis).abs().mean() for axis in (2, 3)) for i in (x, y)]
    return steps[0] / steps[1] if min(x.shape[2:]) > 1 and steps[1] > 0 else None


def block_grid(image: Image.Image) -> tuple[float | None, float | None]:
    """What is left of a JPEG's blocks: the mean step across their borders over that elsewhere, in luma at 8x8
    and as the mean of Cb and Cr at 16x16 (4:2:0). About 1 in a photograph, far more where blocks show."""
    def ratio(channel, period):
        if min(channel.shape) <= period + 1:
            return None
        steps = [np.abs(np.diff(channel, axis=axis)).mean(1 - axis) for axis in (0, 1)]
        border = slice(period - 1, None, period)
        return float(np.mean([s[border].mean() / max(np.delete(s, border).mean(), 1e-3) for s in steps]))
    y, cb, cr = np.asarray(image.convert("YCbCr"), np.float64).transpose(2, 0, 1)
    return ratio(y, 8), mean([ratio(cb, 16), ratio(cr, 16)])


# --------------------------------------------------------------------------- tables and pictures


def mean(values: list[float | None]) -> float | None:
    """Of what could be measured: a blank page has no PSNR once it is restored exactly, a tiny one no SSIM."""
    values = [v for v in values if v is not None and math.isfinite(v)]
    return sum(values) / len(values) if values else None


def readable(files):
    """(file, picture) of those that can be read; the others are named."""
    for file in files:
        try:
            image = read_image(file)[0]
        except UserError as error:
            note(f"skipped: {error}")
            continue
        yield file, image


def read_all(files: list[Path]) -> list[Image.Image]:
    images = [image for _, image in readable(files)]
    if not images:
        raise UserError(f"{files[0]}: none of {len(files)} images can be read")
    return images


def text_table(header: list[str], rows: list[list]) -> str:
    def cell(v):
        return v if isinstance(v, str) else "-" if v is None else f"{v:.4f}" if abs(v) < 2 else f"{v:.2f}"
    cells = [header] + [[cell(v) for v in row] for row in rows]
    widths = [max(len(r[c]) for r in cells) for c in range(len(header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def save_png(image: Image.Image, path: Path) -> None:
    atomic(path, lambda tmp: image.save(tmp, "PNG"))


def comparison_picture(rows: list[list[Image.Image]], labels: list[str], path: Path) -> None:
    """One PNG: a row of equally tall pictures per entry of `rows`, `labels` above the columns."""
    gap, bar = 6, 18
    widths = [max(r[c].width for r in rows) for c in range(len(labels))]
    lefts = [sum(widths[:c]) + gap * c for c in range(len(labels))]
    size = (lefts[-1] + widths[-1], bar + sum(r[0].height + gap for r in rows))
    canvas, y = Image.new("RGB", size, "white"), bar
    for left, label in zip(lefts, labels):
        ImageDraw.Draw(canvas).text((left + 2, 3), label, fill="black")
    for row in rows:
        for left, picture in zip(lefts, row):
            canvas.paste(picture, (left, y))
        y += row[0].height + gap
    save_png(canvas, path)


def centre(size: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """The box of the central side x side pixels, or what there is of them."""
    left, top = (max(0, (n - side) // 2) for n in size)
    return left, top, min(left + side, size[0]), min(top + side, size[1])


@torch.inference_mode()
def through_vae(sd: SD, image: Image.Image) -> Image.Image:
    """What the untouched base's VAE alone makes of a picture: no latent method on it can do better."""
    x = pad_to(to_tensor(image)[None].to(sd.alpha_bar.device), sd.f)
    return to_image(sd.decode(sd.encode(x))[0, :, :image.height, :image.width])


@torch.inference_mode()
def compare(files: list[Path], conditions: dict, restore: dict, base, metrics: Metrics, picture: Path,
            drawn: list[str] | None = None, keep=None) -> dict:
    """Restores every file under every condition and averages the metrics over the files.

    conditions: {name: degrade(image, file) -> image, or None where it has none of this file}; restore: {row:
    restore(image) -> image}. Prints a table a condition, draws `picture` of the conditions `drawn` (the
    first) and returns {condition: {row: {metric: mean}}}. Rows: the degraded input; the same blurred, which
    any method must beat; through the VAE and back; restored; the original through the VAE. What cannot be
    read or degraded is named and left out. keep(condition, row, file, image) sees every picture."""
    sd, drawn, strips = SD(base, with_unet=False).to(device()), drawn or list(conditions)[:1], []
    sums: dict[str, dict[str, list]] = {name: {} for name in conditions}
    for file, target in readable(tqdm(files, "eval", disable=None)):
        ceiling = through_vae(sd, target)
        ceiling_metrics = metrics(ceiling, target)
        for name, degrade in conditions.items():
            try:
                if (lq := degrade(target, file)) is None:  # a condition of other files
                    continue
                images = rows_of(lq, restore, sd)
            except Exception as error:  # whatever it is, it ends this picture alone
                note(f"skipped: {common.why(error, file)}")
                continue
            for row, image in images.items():
                sums[name].setdefault(row, []).append(metrics(image, target))
                if keep:
                    keep(name, row, file, image)
            sums[name].setdefault("VAE(original)", []).append(ceiling_metrics)
            if name in drawn and len(strips) < 4:
                shown = [images["compressed"], *(images[row] for row in restore), target, ceiling]
                strips.append([i.crop(centre(i.size, 384)) for i in shown])
    results = {name: {row: {m: mean([v[m] for v in vs]) for m in vs[0]} for row, vs in rows.items()}
               for name, rows in sums.items() if rows}
    if not results:
        raise UserError(f"eval: none of the {len(files)} images can be read and compressed")
    for name, rows in results.items():
        print(f"\n{name}, {len(sums[name]['compressed'])} images (padded and cropped; 8-bit)")
        print(text_table(["", *metrics.names], [[row, *values.values()] for row, values in rows.items()]))
    labels = [f"compressed ({', '.join(drawn)})", *restore, "original", "VAE(original): the base's ceiling"]
    if strips:
        comparison_picture(strips, labels, picture)
    return results


def rows_of(lq: Image.Image, restore: dict, sd: SD) -> dict[str, Image.Image]:
    from torchvision.transforms.functional import gaussian_blur
    images = {"compressed": lq, "compressed, blurred": gaussian_blur(lq, 7, 0.8),
              "VAE(compressed)": through_vae(sd, lq)}
    return images | {row: one(lq) for row, one in restore.items()}


# -------------------------------------------------------------------------------- CODiff, SODiff

NO_REFERENCE = ("musiq", "maniqa", "clipiqa")


def evaluate_jpeg(script, args) -> None:
    model, files, picture = script.load(args.weights, args.base), list_images(args.data), picture_of(args)
    tile, more = common.check_tile(args.tile, model.multiple), {}
    if script.__name__ == "codiff":
        more["color_fix"] = args.color_fix
        restore = partial(script.restore, color_fix=args.color_fix, tile=tile)
    else:
        def restore(model, image):
            return script.restore(model, image, tile)[0]
    rows = {"restored": partial(restore, model)}
    rows |= {f"by {run.name}": partial(restore, script.load(run, args.base)) for run in args.against}
    conditions = {f"JPEG QF {qf}": lambda image, _, qf=qf: jpeg(image, qf) for qf in args.qf}
    metrics = Metrics(NO_REFERENCE if args.metrics == "all" else ())
    more["results"] = compare(files, conditions, rows, model.base, metrics, picture)
    if script.__name__ == "sodiff":
        more["alignment"] = report_alignment(model, script.read_captions(args.data))
        more["predictor"] = report_predictions(model, files) if model.predictor else {}
    finish(args, files, **more)


@torch.inference_mode()
def prompts(model, images: list[Image.Image]) -> Tensor:
    """SODiff's e_img (N, 77, D_text) of pictures."""
    dtype = model.T_align.queries.dtype
    x = (pad_to(to_tensor(image)[None], model.cell).to(device(), dtype) for image in images)
    return torch.cat([model.T_align(model.E_down(x_lq)) for x_lq in x]).float().cpu()


def alignment(e_img: Tensor, e_text: Tensor) -> tuple[float, float]:
    """Mean cosine of each e_img (N, 77, D) with its own caption's e_text, and with the N - 1 others'."""
    e_img, e_text = (torch.nn.functional.normalize(e.flatten(1), dim=1) for e in (e_img, e_text))
    cosines, n = e_img @ e_text.T, len(e_img)
    return cosines.diagonal().mean().item(), ((cosines.sum() - cosines.trace()) / (n * (n - 1))).item()


def captioned(captions: dict[Path, dict], limit: int = 64) -> tuple[list[Image.Image], list[str]]:
    """(pictures' central 256x256 pixels, captions), no caption twice: what alignment is measured on."""
    from torchvision.transforms.functional import center_crop
    images: dict[str, Image.Image] = {}
    for file, row in captions.items():
        if row["caption"] and row["caption"] not in images and len(images) < limit:
            try:
                image = read_image(file)[0]
            except UserError:  # has been named
                continue
            images[row["caption"]] = center_crop(image, [min(256, image.height), min(256, image.width)])
    return list(images.values()), list(images)


def report_alignment(model, captions: dict[Path, dict]) -> dict:
    """Prints and returns the cosines at three QFs, if there are two different captions to compare."""
    images, texts = captioned(captions)
    if len(texts) < 2:
        return {}
    e_text = common.text_tokens(model.base, texts)
    compressed = {f"QF {qf}": [jpeg(image, qf) for image in images] for qf in (5, 20, 80)}
    rows = {name: alignment(prompts(model, jpegs), e_text) for name, jpegs in compressed.items()}
    print(f"\ncosine of e_img, {len(texts)} photographs\n"
          + text_table(["", "own e_text", "others'"], [[k, *v] for k, v in rows.items()]))
    return rows


@torch.inference_mode()
def predictions(model, files: list[Path], qfs: list[int]) -> tuple[Tensor, Tensor]:
    """SODiff's predicted QF and timestep (len(qfs), len(files)) of every file's JPEGs."""
    out, photos = [], read_all(files)
    for qf in tqdm(qfs, "predicted QF", leave=False, disable=None):
        x = (pad_to(to_tensor(jpeg(photo, qf))[None], model.cell) for photo in photos)
        seen = (model.condition(x_lq.to(device()))[1:] for x_lq in x)
        out.append([(qf_hat.item(), tau.item()) for qf_hat, tau in seen])
    return torch.tensor(out).unbind(-1)


def report_predictions(model, files: list[Path]) -> dict:
    """Prints and returns mean predicted QF and tau by true QF, and their rank correlations with it."""
    from torchmetrics.functional import spearman_corrcoef
    qfs = [5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95]
    qf_hat, tau = predictions(model, files, qfs)
    true = torch.tensor(qfs, dtype=torch.float32)[:, None].expand_as(qf_hat).flatten()
    rho = {name: spearman_corrcoef(v.flatten(), true).item() for name, v in (("QF", qf_hat), ("tau", tau))}
    means = {"predicted QF": qf_hat.mean(1).tolist(), "timestep": tau.mean(1).tolist()}
    rows = [[k, *(f"{v:.1f}" for v in vs)] for k, vs in means.items()]
    print("\n" + text_table(["true QF", *map(str, qfs)], rows))
    print(f"rank correlation with the true QF ({len(true)} JPEGs): "
          f"predicted QF {rho['QF']:.3f}, timestep {rho['tau']:.3f}")
    return {"true QF": qfs, **means, "rank correlation": rho}


# ----------------------------------------------------------------------------------------- OSCAR

CLASSICAL = {"JPEG": {"optimize": True}, "WebP": {"method": 6}, "AVIF": {}}  # Pillow's, and their options
if not features.check("avif"):
    del CLASSICAL["AVIF"]
QUALITIES = (5, 10, 20, 35, 50)  # an anchor's, beside its lowest


def classical_codecs(anchor: str | None) -> dict[str, tuple]:
    """{name: (encode, decode)}: each codec at its lowest quality, the anchor at six."""
    def encode(image, kind, quality):
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=quality, **CLASSICAL[kind])
        return buffer.getvalue()

    def decode(data):
        return Image.open(io.BytesIO(data)).convert("RGB")
    return {f"{kind}, quality {q}": (partial(encode, kind=kind, quality=q), decode) for kind in CLASSICAL
            for q in (1 if kind == "JPEG" else 0, *(QUALITIES if kind == anchor else ()))}


def curve(results: dict, codec: str, metric: str) -> list[tuple[float, float]]:
    """A codec's points (true bpp, value of the metric)."""
    points = [(v["bpp"], v.get(metric)) for name, v in results.items() if name.startswith(codec)]
    return [p for p in points if p[1] is not None]


def bd_rate(points: list[tuple[float, float]], anchor: list[tuple[float, float]]) -> float | None:
    """Bjontegaard's rate difference (VCEG-M33) in percent: cubic fits of log rate to quality, the mean
    distance between them over the qualities that both reach. None if there are none, or under four points."""
    if min(len(points), len(anchor)) < 4:
        return None
    (rates, q), (anchor_rates, anchor_q) = zip(*points), zip(*anchor)
    low, high = max(min(q), min(anchor_q)), min(max(q), max(anchor_q))
    if low >= high:
        return None

    def area(rates, q):
        fit = np.polynomial.Polynomial.fit(q, np.log(rates), 3).integ()
        return fit(high) - fit(low)
    return 100 * float(np.expm1((area(rates, q) - area(anchor_rates, anchor_q)) / (high - low)))


def print_bd_rate(results: dict, anchor: str, names: list[str]) -> dict[str, float | None]:
    rates = {k: bd_rate(curve(results, "OSCAR", k), curve(results, anchor, k)) for k in names}
    print(f"\nBD-rate of OSCAR against {anchor}, percent ('-': no quality that both reach)")
    print(text_table(["", *names], [["BD-rate", *rates.values()]]))
    return rates


@torch.inference_mode()
def evaluate_codec(script, args) -> None:
    """The rate-distortion table over real files: true bits per pixel and metrics, mean over the photographs;
    beside it classical codecs at their lowest setting, and the VAE alone. A picture, the curve."""
    model, files, rates = script.load(args.weights, args.base), list_images(args.data), sorted(set(args.bpp))
    metrics = Metrics(("musiq", "clipiqa") if args.metrics == "all" else (), "VGG")
    tile = common.check_tile(args.tile, model.multiple)
    if args.centre is not None and args.centre < 1:
        raise UserError(f"--centre {args.centre}: must be at least 1")
    codecs = {f"OSCAR {script.NAMES[r]}": (partial(script.compress, model, r=r, tile=tile),
                                           partial(script.decompress, model, tile=tile)) for r in rates}
    codecs |= classical_codecs(args.anchor)
    sums: dict[str, list[dict]] = {name: [] for name in [*codecs, "VAE alone"]}
    strips = []
    for file, image in readable(tqdm(files, "eval", disable=None)):
        image = image.crop(centre(image.size, args.centre)) if args.centre else image
        pictures = [image]
        for name, (encode, decode) in codecs.items():
            try:
                data = encode(image)
                pictures.append(decode(data))
            except Exception as error:  # WebP ends at 16,383 pixels a side
                note(f"skipped: {name} of {common.why(error, file)}")
                continue
            bpp = 8 * len(data) / (image.width * image.height)
            sums[name].append({"bpp": bpp, **metrics(pictures[-1], image)})
        pictures.append(through_vae(model.sd, image))
        sums["VAE alone"].append({"bpp": None, **metrics(pictures[-1], image)})
        if len(strips) < 4 and len(pictures) == len(codecs) + 2:
            strips.append([p.crop(centre(image.size, 256)) for p in pictures])
    if not sums["VAE alone"]:
        raise UserError(f"eval: none of the {len(files)} images can be read")
    results = {name: {k: mean([row[k] for row in rows]) for k in rows[0]}
               for name, rows in sums.items() if rows}
    nominal = {f"OSCAR {script.NAMES[r]}": script.BPP[r] for r in rates}
    names = [n for n in metrics.names if n not in ("PSNR-B", "detail") and "grid" not in n]  # 8x8 is JPEG's
    print(f"\n{len(sums['VAE alone'])} images (padded and cropped; 8-bit; bits counted from the files)")
    print(text_table(["", "nominal bpp", "true bpp", *names],
                     [[name, nominal.get(name), row["bpp"], *(row[k] for k in names)]
                      for name, row in results.items()]))
    if strips:  # of pictures that every codec could take
        labels = [f"{name}: {results[name]['bpp']:.4f} bpp" for name in codecs]
        comparison_picture(strips, ["original", *labels, "VAE alone: the base's ceiling"], picture_of(args))
    try:
        from data.results.figures import draw_curve
        print(f"rate-distortion curve: {draw_curve(results, results_of(args) / 'samples' / 'rd.png')}")
    except UserError as error:
        note(f"no rate-distortion curve: {error}")
    bd_rates = print_bd_rate(results, args.anchor, names) if args.anchor else {}
    finish(args, files, results=results, bd_rate=bd_rates)


# ------------------------------------------------------------------------------------ MoE-DiffIR


def evaluate_codecs(script, args) -> None:
    """Tables for every task, means for every codec (Table 1), the routing; with --metrics all also FID."""
    from data.make_cir import matched, task_name
    model, picks, current = script.load(args.weights, args.base), [], []
    steps = list(dict.fromkeys(args.steps or [model.sampling]))
    options = script.sampling_options(args, model, steps)
    added = [task_name(task) for task in args.task]
    if len(set(added)) < len(added) or len(added) != len(args.pairs):
        raise UserError("--pairs and --task CODEC:LEVEL (as hific:low) go together, every pair with its own")
    lq_of = {task: {hq: lq for lq, hq in matched(*pair).values()} for task, pair in zip(added, args.pairs)}
    tasks, files = [*lq_of], []
    if args.codecs or not added:
        tasks, files = list(dict.fromkeys([*tasks_of(args, model), *tasks])), list_images(args.data)
    encoded = set(files)

    def degraded(task, image, file):
        current[:] = [task]
        if task not in lq_of:
            return compressed(task, image, file) if file in encoded else None
        return read_image(lq_of[task][file])[0] if file in lq_of[task] else None

    def restored(n, image):
        image, gates = script.restore(model, image, n, **options)
        if n == steps[0] and gates:
            picks.append((*current[-1], gates))
        return image
    conditions = {":".join(task): partial(degraded, task) for task in tasks}
    rows = {f"restored, {n} step{'s' * (n > 1)}": partial(restored, n) for n in steps}
    lowest = list({codec: f"{codec}:{level}" for codec, level in reversed(tasks)}.values())[::-1]
    fid, picture = FID() if args.metrics == "all" else None, picture_of(args)
    metrics = Metrics(("clipiqa", "maniqa") if fid else ())
    files = list(dict.fromkeys([*files, *(hq for pair in lq_of.values() for hq in pair)]))
    results = compare(files, conditions, rows, model.base, metrics, picture, lowest, fid and fid.keep)
    by_codec, gap = codec_means(results, list(rows), fid.values() if fid else {})
    finish(args, files, options=options, results=results, codecs=by_codec, gap_closed=gap,
           latent_error=print_latent_errors(model, args.data, [task for task in tasks if task not in lq_of]),
           mutual_information=print_routing(picks))


def compressed(task, image: Image.Image, file: Path) -> Image.Image:
    from data.make_cir import compress
    try:
        return compress(image, *task)[0]
    except UserError as error:
        raise UserError(f"{':'.join(task)} {file}: {error}") from None


def tasks_of(args, model) -> list[tuple[str, str]]:
    """--codecs, or the lowest level (after training) or all levels of what it was trained on."""
    from data.make_cir import LEVELS, RANGE, available, parse_tasks
    trained = [codec for codec in dict.fromkeys(t.split(":")[0] for t in model.tasks) if codec in RANGE]
    lowest = [f"{codec}:{LEVELS[codec][0]}" for codec in trained]
    return available(parse_tasks(args.codecs or (lowest if args.lowest else trained)))[0]


def codec_means(results: dict, rows: list[str], fid: dict) -> tuple[dict, dict]:
    """({codec: {row: {metric: mean over its levels}}}, {codec: {row: share of the gap closed}}), printed."""
    levels: dict[str, list[dict]] = {}
    for name, result in results.items():
        levels.setdefault(name.split(":")[0], []).append(result)
    codecs = {codec: {row: {m: mean([r[row][m] for r in of]) for m in of[0][row]} for row in of[0]}
              for codec, of in levels.items()}

    def closed(v, row):
        low, here, high = (v[k]["PSNR"] for k in ("VAE(compressed)", row, "VAE(original)"))
        return None if None in (low, here, high) or low == high else (here - low) / (high - low)
    gap = {codec: {row: closed(v, row) for row in rows} for codec, v in codecs.items()}
    header = ["", *next(iter(codecs.values())), *(row.replace("restored", "gap") for row in rows)]
    def percent(share):
        return "-" if share is None else f"{100 * share:.1f} %"
    shares = {codec: [*map(percent, v.values())] for codec, v in gap.items()}
    table = [[codec, *(r["PSNR"] for r in v.values()), *shares[codec]] for codec, v in codecs.items()]
    print("\nPSNR of each codec (mean over its levels above), and the share of the gap from VAE(compressed) "
          "to VAE(original) that is closed\n" + text_table(header, table))
    for codec, values in codecs.items():
        for row, value in fid.get(codec, {}).items():
            values[row]["FID"] = value
    table = [[f"{codec}, {row}", *v[row].values()] for codec, v in codecs.items()
             for row in ("compressed", *rows)]
    print("\nTable 1: means of each codec over its levels above\n"
          + text_table(["", *next(iter(codecs.values()))[rows[0]]], table))
    return codecs, gap


@torch.inference_mode()
def print_latent_errors(model, data: list[Path], tasks: list[tuple[str, str]]) -> dict[str, float]:
    """Prints and returns for each codec, at the first of its `tasks`, the squared error of z_0 after one step
    to the original's latent, as a multiple of z_lq's own: below 1 stage 1 helps. Of 256 x 256 pixels in the
    middle of every photograph."""
    from data.make_cir import RANGE
    first = list({task[0]: task for task in reversed(tasks) if task[0] in RANGE}.values())[::-1]
    errors = {task: torch.zeros(2) for task in first}
    for file, image in readable(list_images(data)):
        def tensor(picture):
            return pad_to(to_tensor(picture.crop(centre(picture.size, 256)))[None], model.cell).to(device())
        z_hq = model.encode(tensor(image))[0].float()
        noise = torch.randn(z_hq.shape, generator=torch.Generator().manual_seed(0)).to(z_hq.device)
        for task in first:
            try:
                x_lq = tensor(compressed(task, image, file))
            except UserError as error:
                note(f"skipped: {error}")
                continue
            z_lq = model.encode(x_lq)[0].float()
            z_0, _ = model.sample(z_lq, model.degradation_prior(x_lq), model.text(x_lq), 1, noise)
            errors[task] += torch.stack([(z - z_hq).square().mean().cpu() for z in (z_0, z_lq)])
    ratios = {":".join(task): (one / own).item() for task, (one, own) in errors.items() if own}
    for name, ratio in ratios.items():
        print(f"latent error after one step, of the compressed latent's own: {name} {ratio:.3f}")
    return ratios


def routing(picks: list[tuple[str, str, list[Tensor]]]) -> list[dict[str, float]]:
    """For every scale: mutual information between codec and chosen prompt set in bits, and its mean over 200
    shuffles of the codecs, which a router that ignores them has by chance. `picks`: (codec, level, gates of
    every scale)."""
    from torchmetrics.functional.clustering import mutual_info_score
    names, rows = list(dict.fromkeys(codec for codec, _, _ in picks)), []
    codecs = torch.tensor([names.index(codec) for codec, _, _ in picks])
    for scale in zip(*(gates for _, _, gates in picks)):
        sets = torch.stack([g > 0 for g in scale]).long().unique(dim=0, return_inverse=True)[1]
        shuffles = (rng(0, 9, k).permutation(len(codecs)) for k in range(200))
        bits, *shuffled = (mutual_info_score(c, sets).item() / torch.tensor(2.0).log().item()
                           for c in (codecs, *(codecs[s] for s in shuffles)))
        rows.append({"bits": bits, "by chance": mean(shuffled), "excess": bits - mean(shuffled),
                     "sets": len(sets.unique())})
    return rows


def print_routing(picks: list[tuple[str, str, list[Tensor]]]) -> list[dict[str, float]]:
    rows = routing(picks) if picks else []
    if rows and len({codec for codec, _, _ in picks}) > 1:
        print(f"\nrouter: what the chosen prompt set tells of the codec, {len(picks)} compressed pictures\n"
              + text_table(["scale", "bits", "by chance", "excess", "different sets"],
                           [[f"h / {2**i}", r["bits"], r["by chance"], r["excess"], str(r["sets"])]
                            for i, r in enumerate(rows)]))
    return rows


# ---------------------------------------------------------------------------------- command line


def results_of(args) -> Path:
    """The run's folder; of the weights that ship, one of their own beside the runs."""
    shipped = args.weights.resolve().parent == SHIPPED
    return ROOT / "runs" / f"{args.weights.name}-shipped" if shipped else args.weights


def picture_of(args) -> Path:
    return results_of(args) / "samples" / "eval.png"


def finish(args, files: list[Path], **results) -> None:
    path = results_of(args) / "metrics.json"
    write_json(path, {"images": [f.name for f in files], **results})
    print(f"\nmetrics: {path}   picture: {picture_of(args)}\npeak memory: {peak_memory()}")


def peak_memory() -> str:
    """The process's peak: on the GPU where there is one, else resident on the host."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    if sys.platform == "win32":
        return "not known on Windows"
    import resource
    scale = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30:.2f} GiB"


EVALUATE = {"codiff": evaluate_jpeg, "sodiff": evaluate_jpeg, "oscar": evaluate_codec,
            "moe_diffir": evaluate_codecs}


def main(name: str, argv: list[str]) -> None:
    script = importlib.import_module(name)
    p = common.CommandLine(f"{name}.py eval", description="the paper's table")
    script.model_flags(p)
    p.add_argument("--data", nargs="+", default=[PHOTOS / "val"], metavar="DIR",
                   help="original photographs (default: the bundled ones)")
    p.add_argument("--metrics", choices=["basic", "all"], default="basic",
                   help="all adds those without a reference, by pyiqa (extra: metrics)")
    if name in ("codiff", "sodiff"):
        p.add_argument("--qf", type=int, nargs="+", default=[5, 10, 20], help="JPEG quality factors")
        p.add_argument("--against", nargs="+", type=Path, default=[], metavar="RUN", help="other models, too")
    elif name == "oscar":
        p.add_argument("--bpp", type=script.parse_bpp, nargs="+", default=range(len(script.RATES)),
                       help=f"of {', '.join(script.NAMES)} (default: all)")
        p.add_argument("--centre", type=int, metavar="PX", help="only the central pixels (the paper: 1024)")
        p.add_argument("--anchor", choices=CLASSICAL, help="also BD-rates against this codec")
    else:
        p.add_argument("--steps", type=int, nargs="+", help="calls of the UNet, a row each")
        p.add_argument("--codecs", nargs="+", metavar="CODEC[:LEVEL]",
                       help="as vvc (all three levels) or vvc:52 (default: those it was trained on)")
        p.add_argument("--lowest", action="store_true", help="only the lowest levels, as after training")
        p.add_argument("--pairs", nargs=2, type=Path, action="append", default=[],
                       metavar=("LQ_DIR", "HQ_DIR"), help="pictures that another program compressed, and "
                       "their originals, once for each --task; alone, unless --codecs is given too")
        p.add_argument("--task", action="append", default=[], metavar="CODEC:LEVEL",
                       help="what --pairs holds, as hific:low")
    EVALUATE[name](script, p.parse_args(argv))
