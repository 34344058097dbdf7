"""Crops and their captions, for SODiff's stage 1 (Sec. 4.1: made before training, of what the crop shows).

    python -m data.caption --data DF2K LSDIR --out crops       # then: sodiff.py train --paper --data crops

    OUT/NAME_0.png ...   OUT/captions.jsonl: {"file", "caption", "qf"}, a line a crop

A LLaVA describes each crop's JPEG, of a quality factor `qf` from 5 to 95. What is there already is not made
again: after an interruption run the same command once more."""

from __future__ import annotations

import argparse
import json
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from common import Crops, device, jpeg, rng
from data.captions import read_captions
from data.files import UserError, append, atomic, first_line, list_images, note
from data.results.tables import save_png
from data.runs import CommandLine, run_cli

QUESTION = "Describe this image in one detailed sentence."
CROP_AND_QF = 11  # a stream of random numbers, beside those of common.STREAMS


def names_of(data: list[Path], out: Path, per_image: int) -> dict[str, Path]:
    """{a crop's name in OUT: its photograph}; deep/cat.png makes deep_cat.png_0.png and so on."""
    names: dict[str, Path] = {}
    for file in list_images(data):
        if out.resolve() in file.resolve().parents:
            continue  # OUT lies within a folder of photographs
        root = next((folder for folder in data if folder in file.parents), file.parent)
        for k in range(per_image):
            name = f"{'_'.join(file.relative_to(root).parts)}_{k}.png"
            if name in names:
                raise UserError(f"--data: crops of {names[name]} and {file} would both be {name}; caption "
                                "each folder into an --out of its own")
            names[name] = file
    return names


def captioned(log: Path) -> set[str]:
    """The files that captions.jsonl names; what a kill left of a last line is removed."""
    if not log.exists():
        return set()
    *lines, last = log.read_text(errors="replace").split("\n")
    if last:  # torn, or an editor's
        with suppress(ValueError):
            json.loads(last)
            lines.append(last)
        atomic(log, lambda tmp: tmp.write_text("".join(f"{line}\n" for line in lines)))
    return {file.name for file in read_captions([log.parent])}


def crop_and_jpeg(photo, name: str, size: int, seed: int) -> tuple[Image.Image, Image.Image, int]:
    """A random crop, its JPEG and the QF, a function of the name: other files in the folder do not matter."""
    r = rng(seed, CROP_AND_QF, zlib.crc32(name.encode()))
    y, x = (int(r.integers(side - size + 1)) for side in photo.shape[:2])
    hq = Image.fromarray(photo[y:y + size, x:x + size])
    qf = int(r.integers(5, 96))
    return hq, jpeg(hq, qf), qf


def llava(model: str, max_tokens: int):
    """[pictures] -> [captions], by a LLaVA of transformers; greedy: the same picture has the same caption."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    dtype = torch.float16 if device().type == "cuda" else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(model)
        network = LlavaForConditionalGeneration.from_pretrained(model, dtype=dtype)
    except Exception as error:
        raise UserError(f"--model {model}: cannot be loaded ({first_line(error)[:120]}); name a LLaVA's "
                        "folder or id") from None
    network.eval().to(device())

    @torch.inference_mode()
    def describe(pictures: list[Image.Image]) -> list[str]:
        prompts = [f"USER: <image>\n{QUESTION} ASSISTANT:"] * len(pictures)
        inputs = processor(images=pictures, text=prompts, return_tensors="pt").to(network.device, dtype)
        out = network.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)  # (B, prompt + answer)
        answers = out[:, inputs["input_ids"].shape[1]:]
        texts = processor.batch_decode(answers, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    return describe


def caption(args: argparse.Namespace) -> None:
    names = names_of(args.data, args.out, args.per_image)
    log = args.out / "captions.jsonl"
    photos = Crops(args.data, args.crop, args.seed)
    done = captioned(log)
    todo = [(name, file) for name, file in names.items() if name not in done]
    note(f"{len(names) - len(todo)} of {len(names)} crops have their caption already")
    describe = llava(args.model, args.max_tokens) if todo else None
    bad = 0
    for i in tqdm(range(0, len(todo), args.batch), "caption", unit="batch", disable=None):
        rows = []
        jpegs = []
        for name, file in todo[i:i + args.batch]:
            photo = photos.read(file)
            if photo is None:  # it has been named
                bad += 1
                continue
            hq, lq, qf = crop_and_jpeg(photo, name, args.crop, args.seed)
            save_png(hq, args.out / name)  # before its line below: what captions.jsonl names is there
            jpegs.append(lq)
            rows.append({"file": name, "qf": qf})
        if rows:
            lines = (json.dumps({"file": row["file"], "caption": text, "qf": row["qf"]})
                     for row, text in zip(rows, describe(jpegs)))
            append(log, "".join(f"{line}\n" for line in lines))
    print(f"{log}: {len(captioned(log))} captions")
    if bad:
        raise UserError(f"{bad} crops of images that cannot be read were left out; the others are done")


def main(argv: list[str] | None = None) -> None:
    p = CommandLine("caption.py", description="crops with LLaVA's captions, for SODiff's stage 1",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", nargs="+", type=Path, required=True, metavar="DIR",
                   help="folders of photographs")
    p.add_argument("--out", type=Path, required=True, metavar="DIR",
                   help="for the crops and captions.jsonl; continued if it is there")
    p.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="folder or hub id of a LLaVA")
    p.add_argument("--crop", type=int, default=512, help="side in pixels")
    p.add_argument("--per-image", type=int, default=1, help="crops of each photograph")
    p.add_argument("--max-tokens", type=int, default=64, help="of a caption")
    p.add_argument("--batch", type=int, default=8, help="crops captioned at once")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    for name in ("crop", "per_image", "max_tokens", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    caption(args)


if __name__ == "__main__":
    run_cli(main)
