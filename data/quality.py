"""A word where restoring makes a picture worse: above a quality that was measured.

A base's latents lose something by themselves, and from some quality on more than the JPEG did.
data/results/quality.py measures from where on, and puts that down beside a model's weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.files import UserError, note, read_json

RECORD = Path("model", "quality.json")  # in a run's folder
WORSE = "worse than the input"


def remarks(weights: str | Path):
    """remark(predicted QF or None) -> what restoring says of it. Weights without a record know no better."""
    path = Path(weights) / RECORD
    record = read_json(path) if path.exists() else {"pays up to": 100, "predicted QF": [0], "gain": [0]}
    try:
        top, *curve = float(record["pays up to"]), record["predicted QF"], record["gain"]
        np.interp(top, *curve)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not as data.results.quality writes it; delete it, or measure") from None

    def remark(qf_hat: float | None) -> str:
        if qf_hat is None:
            return ""
        loss = max(0.1, -np.interp(qf_hat, *curve))
        word = f": about {loss:.1f} dB {WORSE}" if qf_hat > top else ""
        return f", predicted QF {qf_hat:.0f}{word}"
    return remark


def summarise(remarks: list[str]) -> None:
    """Once for all pictures: how many had better be left as they were."""
    if worse := sum(WORSE in remark for remark in remarks):
        note(f"{worse} of {len(remarks)} restored pictures are {WORSE}: where that is so good, these weights "
             "take away more than they mend; keep it")
