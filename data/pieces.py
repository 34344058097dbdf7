"""Photographs cut into pieces of 512 pixels, once, before the paper run.

    python -m data.pieces --data DF2K LSDIR --out pieces       # then: codiff.py train --paper --data pieces

    OUT/NAME_ROW_COLUMN.webp ...    of several folders, which must be named at once: OUT/FOLDER/NAME_...

For a crop its whole file is decoded: of a photograph ten times the crop, while a GPU waits. Pieces cover the
photograph, overlapping where a side is no multiple of 512; a shorter side stays. No paper's crop is larger.
WebP without loss takes no more room than the photographs' PNGs, and is read faster than pieces as PNG.

captions.jsonl is left behind, as a caption tells of a whole photograph: SODiff's stage 1 takes data.caption's
crops. What is there already is not made again: after an interruption run the same command once more."""

from __future__ import annotations

import argparse
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from PIL import Image, features
from tqdm import tqdm

from data.files import UserError, atomic, files_in, leave_ctrl_c_to_the_parent, list_images, note, outputs
from data.pictures import read_image
from data.runs import CommandLine, run_cli

SIZE = 512
NOTE = 270  # EXIF's ImageDescription


def starts(side: int) -> list[int]:
    """Where the fewest pieces that cover a side begin, evenly spread."""
    n = math.ceil(side / SIZE)
    return [round(i * (side - SIZE) / (n - 1)) for i in range(n)] if n > 1 else [0]


def jobs_of(folders: list[Path], out: Path) -> list[tuple[Path, Path]]:
    """(photograph, OUT/.../NAME): no two of the same name, so that NAME_ROW_COLUMN is unique as well."""
    def find(paths):
        return [f for f in list_images(paths) if out.resolve() not in f.resolve().parents]

    taken: dict[str, Path] = {}  # a folder of pieces: that of their photographs (on some disks A is a)
    jobs = []
    for folder in folders:
        target = out / folder.resolve().name if len(folders) > 1 else out
        if not folder.is_dir():
            raise UserError(f"--data {folder}: no such folder")
        if taken.setdefault(str(target).casefold(), folder) is not folder:
            raise UserError(f"--data {folder}: {target} would hold another folder's pieces too; rename one")
        jobs += outputs([str(folder)], target, find=find)
    return jobs


def record(piece: Path) -> dict:
    """What `cut` wrote into a piece: its photograph's size and time, the number of rows and columns."""
    try:
        with Image.open(piece) as image:
            return json.loads(image.getexif()[NOTE])
    except (OSError, ValueError, KeyError, SyntaxError):  # not there, or not ours
        return {}


def cut(job: tuple[Path, Path]) -> tuple[int, str | None]:
    """Makes one photograph's pieces: (how many, what is wrong with it). The first is written last and vouches
    for the others. Not being able to write ends the command: no other photograph would fare better."""
    def piece(row, column):
        return target.with_name(f"{target.stem}_{row}_{column}.webp")

    file, target = job
    try:
        source = [file.stat().st_size, file.stat().st_mtime_ns]
        old = record(piece(0, 0))
        there = [(r, c) for r in range(old.get("rows", 0)) for c in range(old.get("columns", 0))]
        if old.get("source") == source and all(piece(*cell).exists() for cell in there):
            return len(there), None
        image = read_image(file, on_white=True)[0]
    except (OSError, UserError) as error:
        return 0, str(error)
    for cell in there:  # the photograph has changed, perhaps its size too
        piece(*cell).unlink(missing_ok=True)
    tops = starts(image.height)
    lefts = starts(image.width)
    exif = Image.Exif()
    exif[NOTE] = json.dumps({"source": source, "rows": len(tops), "columns": len(lefts)})
    cells = [(r, c) for r in range(len(tops)) for c in range(len(lefts))]
    for r, c in reversed(cells):
        right = min(lefts[c] + SIZE, image.width)
        bottom = min(tops[r] + SIZE, image.height)
        part = image.crop((lefts[c], tops[r], right, bottom))
        atomic(piece(r, c), lambda tmp: part.save(tmp, "WEBP", lossless=True, quality=0, method=0, exif=exif))
    return len(cells), None


def main(argv: list[str] | None = None) -> None:
    p = CommandLine("pieces.py", description="photographs cut into pieces of 512 pixels, for training",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", nargs="+", type=Path, required=True, metavar="DIR", help="photographs")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="continued if it is there")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = p.parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1")
    if not features.check("webp"):
        raise UserError("this Pillow was built without WebP; install another")
    jobs = jobs_of(args.data, args.out)
    pieces = 0
    bad = 0
    pool = ProcessPoolExecutor(args.workers, initializer=leave_ctrl_c_to_the_parent, initargs=(0,))
    try:
        for n, problem in tqdm(pool.map(cut, jobs), "pieces", len(jobs), unit="photograph", disable=None):
            pieces += n
            if problem:
                bad += 1
                note(f"skipped: {problem}")
    except BrokenProcessPool:
        raise UserError("a process was killed, perhaps for want of memory; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)
    print(f"{args.out}: {pieces} pieces of {len(jobs) - bad} photographs")
    whole = {target.with_suffix("") for _, target in jobs}
    if others := [f for f in files_in(args.out, lambda f: f.suffix == ".webp")
                  if f.parent / f.stem.rsplit("_", 2)[0] not in whole]:
        note(f"{others[0]}: a piece of none of these photographs, nor are {len(others) - 1} more; "
             f"training on {args.out} takes them, too")
    if bad:
        raise UserError(f"{bad} of {len(jobs)} photographs could not be read; the others are done")


if __name__ == "__main__":
    run_cli(main)
