"""data/results/trace.py: every symbol of every docstring's table comes to be, in the shape the table says."""

import json
import re

import pytest

import codiff
from common import ROOT, TINY_SD
from conftest import NARROW, SCRIPTS
from data.results import trace

VAE, UNET = (json.loads((TINY_SD / part / "config.json").read_text()) for part in ("vae", "unet"))
BASE = {"B": 1, "C": VAE["latent_channels"], "D_text": UNET["cross_attention_dim"]}
SIZES = {"codiff": BASE | {"H": 96, "W": 160, "T_L": codiff.Stage2.T_L},  # a picture of 133 x 91 pixels
         "sodiff": BASE | {"H": 96, "W": 160, "T_max": 1000, "c": 24},
         "oscar": {"B": 1, "C": BASE["C"], "H": 128, "W": 192, "D": 8, "r": 1, "s": 4},
         "moe_diffir": {"B": 1, "C": BASE["C"], "H": 96, "W": 136, "L": 12 * 17, "width": 16, "N": 7,
                        "M": 257, "D": 192}}
TRAINING = {"codiff": {"x_hq", "z_H", "q"}, "sodiff": {"x_hq", "z_H", "e_text", "g"}, "oscar": {"D"},
            "moe_diffir": {"x_hq"}}  # what no inference has
OF_SELF = {"T_L", "s", "t[r]", "P"}  # attributes, which a function has from its first line


def rows_of(printed: str) -> dict[str, list[str]]:
    """{name in code: [min, mean, max, shape, place]}"""
    rows = re.findall(r"^(\S.*?) +(\S+) +(\S+) +(\S+) +(\S+) +(\(.*\)|integer) +(\S+:\d+)$", printed, re.M)
    return {name: row for _, name, *row in rows}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_symbol_of_the_table_is_seen(name, trained, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = trained(name)
    rate = ["--bpp", "0.0098"] if name == "oscar" else []
    run.script.main(["trace", str(photos / "cat.png"), "--weights", str(run.folder), *rate])
    inference, sizes, training = re.split(r"^sizes: (.*)$", capsys.readouterr().out, flags=re.M)
    assert {*sizes.split(", ")} == {f"{k} = {n}" for k, n in SIZES[name].items()}
    made, learned = rows_of(inference), rows_of(training)
    table = re.findall(r"^\| .+? +\| (.+?) +\| .+ \| .+ \|$", run.script.__doc__, re.M)[2:]
    assert sorted([*made, *learned]) == sorted(", ".join(table).split(", "))
    assert learned.keys() == TRAINING[name]
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    for symbol, (low, mean, high, _, place) in (made | learned).items():
        assert float(low) <= float(mean) <= float(high)
        line = lines[int(place.split(":")[1]) - 1]
        assert symbol in OF_SELF or re.search(rf"\b{symbol}\b", line), f"{symbol} is not made in {place}"
    assert not [*tmp_path.iterdir()]


def test_a_table_that_is_wrong_is_told(trained, photos, monkeypatch, refused):
    wrong = {"| as z_L ": "| (B, C, H / 4, W / 4)", "| T_L        |": "| t_L |", "1024, D_text)": "1024, C)"}
    text = codiff.__doc__
    for row, other in wrong.items():
        text = text.replace(row, other)
    monkeypatch.setattr(codiff, "__doc__", text)
    monkeypatch.setattr(trace, "train", lambda *_: None)
    told = refused(codiff.main, ["trace", photos / "cat.png", "--weights", trained("codiff").folder])
    assert told.endswith(" x_hq, c_L, z_H, z_hat, t_L, q: never as the docstring of codiff.py says")
