"""A script's eval: what a trained model restores, against the untouched input and what its base can reach.

    python SCRIPT.py eval --data my_photos        `train` ends with it

Prints the table, writes RUN/metrics.json and a picture to look at, RUN/samples/eval.png. The table itself is
the paper's, data/results/SCRIPT.py; here is what such tables share."""

from __future__ import annotations

import argparse
import math
import socket
import textwrap
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import common
from common import PHOTOS, SD, device, jpeg, pad_to, to_image, to_tensor
from data.files import ROOT, SHIPPED, UserError, first_line, note, reason, write_json
from data.results.seeds import TINY_LPIPS
from data.results.tables import (centre, comparison_picture, mean, means, paper, peak_memory, read_all,
                                 readable, text_table)
from data.runs import CommandLine, name_of

# -------------------------------------------------------------------------------------- metrics

DEFINITIONS = {  # in every metrics.json, and on a result page
    "PSNR": "from the mean squared error over all pixels and the three channels.",
    "PSNR-B": "from that error plus luma's blocking effect factor (Yim and Bovik 2011). As in FBCNN's code "
              "8x8 blocks have H (W / 8 - 1) + W (H / 8 - 1) borders, and luma runs from 16 to 235, that of "
              "a grey original from 0 to 255.",
    "SSIM": "the mean over the three channels and all positions whose window, 11x11, Gaussian, sigma 1.5, "
            "lies inside the picture.",
    TINY_LPIPS: "LPIPS (Zhang et al. 2018) on data/tiny-alex, AlexNet in miniature, which no loss uses; its "
                "values do not compare with LPIPS'.",
    "FID": "between the pictures of one condition and their originals, each once. Of several conditions (a "
           "codec's levels, all tasks) the mean."}


class Metrics:
    """Full-reference metrics on the 8-bit images that a user gets. `names` is the table's header."""

    def __init__(self, extra: tuple[str, ...] = (), net: str = "Alex"):
        """`extra`: metrics of pyiqa; `net`: LPIPS' backbone, Alex or VGG; their values do not compare.
        LPIPS and DISTS are measured where their networks' weights are to be had."""
        self.deep = {TINY_LPIPS: common.lpips("tiny-alex").to(device())}
        try:
            import lpips
            socket.setdefaulttimeout(8)  # a download that gets no answer fails after seconds
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # lpips calls torchvision by an old keyword
                self.deep[f"LPIPS-{net}"] = lpips.LPIPS(net=net.lower(), verbose=False).to(device())
            self.deep["DISTS"] = common.dists("vgg16").to(device())
        except Exception as error:
            note(f"without LPIPS and DISTS, whose networks' weights are not to be had: {first_line(error)}")
        self.extra = {k: pyiqa_metric(k) for k in extra}
        self.names = ["PSNR", "PSNR-B", "SSIM", "detail", "grid Y", "grid C", *self.deep,
                      *(k.upper() for k in extra)]

    @torch.inference_mode()
    def __call__(self, image: Image.Image, target: Image.Image) -> dict[str, float | None]:
        from torchmetrics.functional.image import (peak_signal_noise_ratio,
                                                   structural_similarity_index_measure)
        x, y = ((to_tensor(i)[None] + 1) * 127.5 for i in (image, target))  # (1, 3, H, W) in [0, 255]
        xn, yn = (i.to(device()) / 127.5 - 1 for i in (x, y))        # as networks take them, [-1, 1]
        side = min(x.shape[2:])  # too small a picture has no structure, and no deep features
        ssim = None
        if side > 10:  # at the border torchmetrics reflects the picture
            ssim = structural_similarity_index_measure(x, y, data_range=255.0, return_full_image=True)[1]
            ssim = ssim[..., 5:-5, 5:-5].mean()
        deep = [net(xn, yn) if side >= 32 else None for net in self.deep.values()]
        values = [peak_signal_noise_ratio(x, y, data_range=255.0), psnr_b(x, y), ssim,
                  detail(luma(x), luma(y)), *block_grid(image), *deep]
        values += [metric((xn + 1) / 2) for metric in self.extra.values()]
        return {k: None if v is None else float(v) for k, v in zip(self.names, values)}


def pyiqa_metric(name: str):
    try:
        import pyiqa
    except ImportError:
        raise UserError("--metrics all needs pyiqa (non-commercial licence): "
                        "pip install -e '.[metrics]'") from None
    return pyiqa.create_metric(name, device=device())


def luma(x: Tensor) -> Tensor:
    """BT.601's, (1, 3, H, W) -> (1, 1, H, W) in [0, 255]; of a grey picture itself."""
    return (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def psnr_b(x: Tensor, y: Tensor) -> Tensor | None:
    """PSNR with the blocking effect factor (Yim and Bovik 2011) of x in 8x8 blocks, as FBCNN's code; x, y:
    (1, 3, H, W) in [0, 255]. Not torchmetrics', which takes grey pictures and counts H W / 8 - 1 borders."""
    sides = x.shape[2:]
    if min(sides) < 16:
        return None
    grey = (y == y[:, :1]).all()
    blocks = luma(x) if grey else (luma(x) * 219 / 255).round()  # colour: MATLAB's luma, less its 16
    border = inside = n_border = n_inside = 0  # sums of squared steps from pixel to pixel, and their numbers
    for axis, side, across in zip((2, 3), sides, sides[::-1]):
        steps = blocks.diff(dim=axis).square().sum(5 - axis).flatten()  # (side - 1,)
        border += steps[7::8].sum()
        inside += steps.sum() - steps[7::8].sum()
        n_border += across * (side / 8 - 1)
        n_inside += across * (side - side / 8)
    factor = math.log2(8) / math.log2(min(sides)) * (border / n_border - inside / n_inside).clamp(min=0)
    return 10 * torch.log10(255**2 / ((x - y).square().mean() + factor))


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


# ------------------------------------------------------------- restored, beside what a base can reach


def padded(image: Image.Image, cell: int) -> Tensor:
    """A picture as a network takes it: (1, 3, H, W) in [-1, 1], whole cells, on the device at hand."""
    return pad_to(to_tensor(image)[None], cell).to(device())


def jpegs_by_qf(files: list[Path], qfs: list[int], what: str):
    """For each QF, with a bar named `what`, the JPEGs of all files that can be read."""
    photos = read_all(files)
    for qf in tqdm(qfs, what, leave=False, disable=None):
        yield [jpeg(photo, qf) for photo in photos]


@torch.inference_mode()
def through_vae(sd: SD, image: Image.Image) -> Image.Image:
    """What the untouched base's VAE alone makes of a picture: no latent method on it can do better."""
    z = sd.encode(padded(image, sd.cell))  # (1, C, h, w)
    return to_image(sd.decode(z)[0, :, :image.height, :image.width])


def rows_of(lq: Image.Image, restore: dict, sd: SD) -> dict[str, Image.Image]:
    from torchvision.transforms.functional import gaussian_blur
    images = {"compressed": lq, "compressed, blurred": gaussian_blur(lq, 7, 0.8),
              "VAE(compressed)": through_vae(sd, lq)}
    return images | {row: one(lq) for row, one in restore.items()}


@torch.inference_mode()
def compare(files: list[Path], conditions: dict, restore: dict, base, metrics: Metrics, picture: Path,
            drawn: list[str] | None = None, keep=None, shift: int = 0) -> dict:
    """Restores every file under every condition and averages the metrics over the files.

    conditions: {name: degrade(image, file) -> image, or None where it has none of this file}, without the
    image's first `shift` rows and columns; restore: {row: restore(image) -> image}. Prints a table a
    condition, draws `picture` of the conditions `drawn` (all) and returns {condition: {row: {metric: mean}}}.
    Rows: the degraded input; the same blurred, which any method must beat; through the VAE and back;
    restored; the original through the VAE. What cannot be read or degraded is named and left out.
    keep(condition, row, file, image) sees every picture."""
    sd = SD(base, with_unet=False).to(device())
    drawn = drawn or list(conditions)
    measured: dict[str, dict[str, list]] = {name: {} for name in conditions}  # a row's metrics of every file
    strips: dict[str, list] = {name: [] for name in drawn}  # about eight rows in all, each condition once
    for file, photo in readable(tqdm(files, "eval", disable=None)):
        target = cut(photo, shift)
        ceiling = through_vae(sd, target)
        ceiling_metrics = metrics(ceiling, target)
        for name, degrade in conditions.items():
            try:
                if (lq := degrade(photo, file)) is None:  # a condition of other files
                    continue
                images = rows_of(lq, restore, sd)
            except Exception as error:  # whatever it is, it ends this picture alone
                note(f"skipped: {reason(error, file)}")
                continue
            for row, image in images.items():
                measured[name].setdefault(row, []).append(metrics(image, target))
                if keep:
                    keep(name, row, file, image)
            measured[name].setdefault("VAE(original)", []).append(ceiling_metrics)
            if name in drawn and len(strips[name]) < max(1, 8 // len(drawn)):
                shown = [images["compressed"], *(images[row] for row in restore), target, ceiling]
                shown = [centre(i, 384) for i in shown]
                strips[name].append([row_label(name, shown[0].height), *shown])
    results = {name: {row: means(of) for row, of in rows.items()} for name, rows in measured.items() if rows}
    if not results:
        raise UserError(f"eval: none of the {len(files)} images can be read and compressed")
    for name, rows in results.items():
        print(f"\n{name}, {len(measured[name]['compressed'])} images (padded and cropped; 8-bit)")
        print(text_table(["", *metrics.names], [[row, *values.values()] for row, values in rows.items()]))
    labels = ["", "compressed", *restore, "original", "VAE(original): the base's ceiling"]
    if pictures := [strip for of in strips.values() for strip in of]:
        comparison_picture(pictures, labels, picture)
    return results


def row_label(text: str, height: int) -> Image.Image:
    label = Image.new("RGB", (84, height), "white")
    ImageDraw.Draw(label).multiline_text((2, 3), textwrap.fill(text, 12), fill="black")
    return label


# ----------------------------------------------------------------------------- restoration of JPEGs


def jpeg_flags(p, script) -> None:
    p.add_argument("--qf", type=quality, nargs="+", default=[5, 10, 20], help="JPEG quality factors")
    p.add_argument("--double", type=quality, nargs="+", default=[], metavar="QF",
                   help="quality factors of a first JPEG, before each of --qf")
    p.add_argument("--shift", type=int, choices=range(8), default=0, metavar="PX",
                   help="rows and columns cut off after the (first) JPEG, off whose grid it then is: 0 to 7 "
                        "(PSNR-B and grid look where the picture's own grid would be)")
    p.add_argument("--against", nargs="+", type=Path, default=[], metavar="RUN", help="other models, too")


def quality(text: str) -> int:
    if text not in map(str, range(1, 101)):
        raise argparse.ArgumentTypeError(f"{text}: a quality factor is from 1 to 100")
    return int(text)


def jpeg_table(script, args, model, files: list[Path]) -> dict:
    """A condition a QF. Restores as the command does, by the model and by those of other runs."""
    models = {"restored": model}
    models |= {f"by {run.name}": script.load(run, args.base) for run in args.against}
    rows = {name: without_remark(script.restorer(args, m)) for name, m in models.items()}
    metrics = Metrics(("musiq", "maniqa", "clipiqa") if args.metrics == "all" else ())
    return compare(files, jpegs(args), rows, model.base, metrics, picture_of(args), shift=args.shift)


def jpegs(args) -> dict:
    """A condition a QF, cut off its grid of blocks; or a pair of QFs, the second JPEG being of the first one
    cut, as in FBCNN's table."""
    def once(image, _, qf):
        return cut(jpeg(image, qf), args.shift)

    def twice(image, _, first, qf):
        return jpeg(cut(jpeg(image, first), args.shift), qf)
    off = f" off by {args.shift}" if args.shift else ""
    if args.double:
        return {f"JPEG QF {first} then {qf}{off}": partial(twice, first=first, qf=qf)
                for first in args.double for qf in args.qf}
    return {f"JPEG QF {qf}{off}": partial(once, qf=qf) for qf in args.qf}


def cut(image: Image.Image, shift: int) -> Image.Image:
    """Without its first `shift` rows and columns, if it has more."""
    left, top = (min(shift, n - 1) for n in image.size)
    return image.crop((left, top, *image.size))


def without_remark(restore):
    return lambda image: restore(image)[0]


# ---------------------------------------------------------------------------------- command line


def results_of(args) -> Path:
    """The run's folder; of the weights that ship, one of their own beside the runs."""
    shipped = args.weights.resolve().parent == SHIPPED
    return ROOT / "runs" / f"{args.weights.name}-shipped" if shipped else args.weights


def picture_of(args) -> Path:
    return results_of(args) / "samples" / "eval.png"


def finish(args, files: list[Path], **results) -> None:
    path = results_of(args) / "metrics.json"
    write_json(path, {"images": [f.name for f in files], "definitions": DEFINITIONS, **results})
    print(f"\nmetrics: {path}   picture: {picture_of(args)}\npeak memory: {peak_memory()}")


def main(script, argv: list[str]) -> None:
    name = name_of(script)
    own = paper(name)
    p = CommandLine(f"{name}.py eval", description="the paper's table")
    script.model_flags(p)
    p.add_argument("--data", nargs="+", default=[PHOTOS / "val"], metavar="DIR",
                   help="original photographs (default: the bundled ones)")
    p.add_argument("--metrics", choices=["basic", "all"], default="basic",
                   help="all adds those without a reference, by pyiqa (extra: metrics)")
    own.eval_flags(p, script)
    own.evaluate(script, p.parse_args(argv))
