"""captions.jsonl, a line {"file", "caption", "qf"} a picture beside it: read, checked, tokenized."""

from __future__ import annotations

import json
from pathlib import Path

from data.files import UserError, files_in, note


def read_captions(folders: list[Path]) -> dict[Path, dict]:
    """{image: {"caption": ..., "qf": ... or absent}} of every captions.jsonl in the folders."""
    rows = {}
    for path in (p for d in folders for p in files_in(Path(d), lambda f: f.name == "captions.jsonl")):
        lines = path.read_text("utf-8-sig", errors="replace").split("\n")
        for i, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                rows[path.parent / row["file"]] = row
                if not isinstance(row["caption"], str) or row.get("qf", 1) not in range(1, 101):
                    raise ValueError
            except (ValueError, TypeError, KeyError):
                raise UserError(f'{path}, line {i}: not {{"file": ..., "caption": ..., "qf": 1 to 100}}; '
                                "mend or delete it (if data.caption wrote it, run that again)") from None
    return rows


def tokenized(folders: list[Path], files: list[Path], tokenizer, required: bool) -> dict[Path, dict]:
    """The files' captions, with "ids" (77,); says what is missing and what is cut. Files without one are left
    out if captions are `required`, else have ""."""
    captions = {f: row for f, row in read_captions(folders).items() if row["caption"]}
    known = [f for f in files if f in captions]
    if required and not known:
        raise UserError(f"{folders[0]}: no captions.jsonl tells of the images, which L_align needs; make one "
                        "with `python -m data.caption`, or train with --lambda-align 0")
    rows = {f: captions.get(f, {"caption": ""}) for f in (known if required else files)}
    texts = [row["caption"] for row in rows.values()]
    length = tokenizer.model_max_length
    long = sum(len(ids) > length for ids in tokenizer(texts, verbose=False).input_ids)
    note(f"{len(files)} images, {len(files) - len(known)} without a caption{', left out' * required}, "
         f"{long} cut to {length} tokens, {len(captions.keys() - rows.keys())} captions without image")
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return {f: {**row, "ids": own} for (f, row), own in zip(rows.items(), ids)}
