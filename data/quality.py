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
    if not path.exists():
        return lambda qf_hat: ""
    record = read_json(path)
    try:
        top, *curve = float(record["pays up to"]), record["predicted QF"], record["gain"]
        np.interp(top, *curve)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not as data.results.quality writes it; delete it, or measure") from None

    def remark(qf_hat: float | None) -> str:
        if qf_hat is None or qf_hat <= top:
            return ""
        loss = max(0.1, -np.interp(qf_hat, *curve))
        return f", above QF {top:.0f}: about {loss:.1f} dB {WORSE}"
    return remark


def summarise(remarks: list[str]) -> None:
    """Once for all pictures: how many had better be left as they were."""
    if worse := sum(WORSE in remark for remark in remarks):
        note(f"{worse} of {len(remarks)} restored pictures: {WORSE}. These weights take more from so good a "
             "picture than they mend; keep the input")
