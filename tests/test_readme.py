"""The README says what is true of the code: its map's names exist, its commands parse."""

import importlib
import re
import runpy
import sys
from functools import reduce

import pytest

import codiff
import moe_diffir
import oscar
import sodiff
from common import ROOT

TEXT = (ROOT / "README.md").read_text()
MAP = re.findall(r"^\| [^|\n]+\| [^|\n]+\| [^|\n]+\| `([a-z_]+)\.([\w.]+)` \|$", TEXT, re.M)


def test_every_name_in_the_map_exists():
    assert len(MAP) >= 10
    for module, name in MAP:
        assert reduce(getattr, name.split("."), importlib.import_module(module)), f"{module}.{name}"


@pytest.mark.parametrize("script", ["codiff", "oscar", "sodiff", "moe_diffir"])
def test_every_equation_tag_in_the_script_is_in_the_map(script):
    tags = set(re.findall(r"Eq\. (\d+)", (ROOT / f"{script}.py").read_text()))
    rows = [line for line in TEXT.splitlines() if line.lower().startswith(f"| {script.replace('_', '-')} |")]
    assert tags <= set(re.findall(r"Eq\. (\d+)", "\n".join(rows))), "an equation is missing from the map"


@pytest.mark.parametrize("script, commands", [(codiff, "train restore eval profile figures"), (oscar, "train compress decompress eval profile figures"),
                                              (sodiff, "train restore eval caption profile figures"),
                                              (moe_diffir, "train restore eval bench profile figures")])
def test_the_flags_it_names_exist(script, commands, capsys):
    for command in commands.split():
        with pytest.raises(SystemExit):
            script.main([command, "--help"])
        said = capsys.readouterr().out
        lines = re.findall(rf"{script.__name__}\.py {command}([^\n`]*)", TEXT)
        assert lines, command
        for flag in {flag for line in lines for flag in re.findall(r"--[a-z0-9-]+", line.split("#")[0])}:
            assert flag in said, f"{command} {flag}"


@pytest.mark.parametrize("script", ["codiff", "oscar", "sodiff", "moe_diffir"])
def test_a_script_is_a_command(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "profile", "--size", "0"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2 and capsys.readouterr().err.startswith(f"{script}.py profile: argument --size")
