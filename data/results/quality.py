"""Up to which quality restoring a JPEG pays, by what the model itself takes that quality to be.

    python -m data.results.quality SCRIPT --data GB82 CID22      # six minutes of one core

Every photograph is compressed at QF 5 to 95 and restored. How much PSNR that gains, by predicted QF, goes
into RUN/model/quality.json, where `restore` looks; of the weights that ship also onto the page."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import PHOTOS, jpeg
from data.files import SHIPPED, UserError, list_images, write_json
from data.quality import RECORD
from data.results import pages
from data.results.seeds import markdown
from data.results.tables import HERE, paper, papers, readable, text_table
from data.runs import CommandLine, run_cli

QFS = range(5, 96, 5)
BIN = 5  # of predicted QF: in the record a point of the curve


def measure(restored_and_qf, files: list[Path]) -> np.ndarray:
    """(JPEGs, 3): QF, predicted QF, PSNR gained. One that either side equals exactly has no such gain."""
    rows = []
    for _, photo in readable(tqdm(files, "quality", disable=None)):
        for qf in QFS:
            lq = jpeg(photo, qf)
            restored, qf_hat = restored_and_qf(lq)
            if qf_hat is None:
                raise UserError("these weights do not predict a JPEG's quality")
            before, after = error(lq, photo), error(restored, photo)
            if before and after:
                rows.append([qf, qf_hat, 10 * np.log10(before / after)])
    if not rows:
        raise UserError(f"{files[0]}: none of {len(files)} images can be measured")
    return np.array(rows)


def error(image: Image.Image, target: Image.Image) -> float:
    return np.square(np.subtract(image, target, dtype=float)).mean()


def pays_up_to(qf_hat: np.ndarray, gain: np.ndarray) -> float:
    """The bound with the highest mean PSNR: pictures up to it are restored, the others left as they are. From
    0, where none pays, to 100, where all do."""
    order = qf_hat.argsort()
    total = np.cumsum(gain[order])
    best = int(total.argmax())
    if total[best] <= 0:
        return 0.0
    return float(qf_hat[order[best]]) if best + 1 < len(total) else 100.0


def record_of(rows: np.ndarray) -> dict:
    """What the file says: the bound, and the share of JPEGs of which it is right; mean gain by predicted QF;
    the same by true QF, for the page."""
    _, qf_hat, gain = rows.T
    top = pays_up_to(qf_hat, gain)

    def means(key):
        return np.array([rows[key == k].mean(0) for k in np.unique(key)]).round(2).T.tolist()
    _, at, gained = means(qf_hat // BIN)
    qf, seen, by_qf = means(rows[:, 0])
    return {"pays up to": round(top, 1), "right": round(float(((qf_hat <= top) == (gain > 0)).mean()), 3),
            "JPEGs": len(rows), "predicted QF": at, "gain": gained,
            "by QF": {"QF": qf, "predicted QF": seen, "gain": by_qf}}


def table_of(record: dict) -> tuple[list[str], list[list[str]]]:
    by_qf = record["by QF"]
    return (["QF", *(f"{qf:.0f}" for qf in by_qf["QF"])],
            [["predicted", *(f"{v:.0f}" for v in by_qf["predicted QF"])],
             ["PSNR gained", *(f"{v:+.1f}" for v in by_qf["gain"])]])


def main(argv: list[str] | None = None) -> None:
    p = CommandLine("quality", description="up to which quality restoring a JPEG pays")
    scripts = [name for name in papers() if hasattr(paper(name), "restored_and_qf")]
    p.add_argument("script", choices=scripts)
    p.add_argument("--weights", type=Path, help="a run's folder (default: the weights that ship)")
    p.add_argument("--base", help="the base it was trained on: folder, hub id (default: as recorded)")
    p.add_argument("--data", nargs="+", default=[PHOTOS / "val"], metavar="DIR",
                   help="original photographs (default: the bundled ones)")
    args = p.parse_args(argv)
    weights = args.weights or SHIPPED / args.script
    script = importlib.import_module(args.script)
    files = list_images(args.data)
    model = script.load(weights, args.base)
    record = record_of(measure(lambda lq: paper(args.script).restored_and_qf(script, model, lq), files))
    write_json(weights / RECORD, record)
    header, rows = table_of(record)
    said = (f"Restoring pays up to a predicted QF of {record['pays up to']:.0f}, which is right for "
            f"{100 * record['right']:.0f} % of {record['JPEGs']} JPEGs.")
    print(f"\n{text_table(header, rows)}\n{said}\n{weights / RECORD}")
    if weights.resolve() == SHIPPED / args.script:
        pages.put(HERE / f"{args.script}.md", {"quality": f"{markdown(header, rows)}\n\n{said}"})


if __name__ == "__main__":
    run_cli(main)
