"""data/results/rosetta.md says what the scripts do."""

import re

import pytest

from common import ROOT
from data.files import UserError
from data.results import rosetta

PAGE = (ROOT / "data" / "results" / "rosetta.md").read_text()


def test_the_page_is_the_scripts():
    assert rosetta.page() == PAGE, "python -m data.results.rosetta writes it anew"


def test_every_line_stands_where_it_says():
    cells = re.findall(r"((?:`[^`]+`(?:<br>)?)+) (\w+)\.py:(\d+)", PAGE)
    assert len(cells) > 100 and {script for _, script, _ in cells} == {*rosetta.SCRIPTS}
    for code, script, first in cells:
        lines = (ROOT / f"{script}.py").read_text().splitlines()[int(first) - 1:]
        shown = re.findall("`([^`]+)`", code.replace("\\|", "|"))
        assert shown == [line.strip() for line in lines[:len(shown)]]


@pytest.mark.parametrize("function, start, number", [("stage2", "x_hat, z_hat, e_img =", 0),
                                                     ("stage3", "x_hat, z_hat =", 0), ("stage2", "opt_", 6)])
def test_a_line_that_is_gone_or_not_the_only_one_is_told(function, start, number):
    with pytest.raises(UserError, match=f"codiff.py, {function}: {number} lines begin with '{start}'"):
        rosetta.quoted("codiff", function, start)
