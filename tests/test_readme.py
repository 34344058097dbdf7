"""README, data/README and result pages are true of the code: names, flags, links and pictures exist."""

import importlib
import pkgutil
import re
import runpy
import sys

import pytest

from common import ROOT
from data.results import ablations
from data.results.tables import paper

SCRIPTS = ("codiff", "oscar", "sodiff", "moe_diffir")
COMMANDS = {script: ("train", "restore", "eval", "profile", "figures", "trace") for script in SCRIPTS}
COMMANDS["oscar"] = ("train", "compress", "decompress", "eval", "profile", "figures", "trace")
TOOLS = {"caption": [], "make_cir": [], "pieces": [], "make_tiny_sd": ["train"], "make_tiny_nets": [],
         "convert": ["codiff"], "results.ablations": ["codiff"], "results.memory": [], "results.pages": [],
         "results.quality": ["codiff"], "results.rosetta": []}  # words before --help
RESULTS = ROOT / "data" / "results"
PAGES = {path: path.read_text() for path in [ROOT / "README.md", ROOT / "data" / "README.md",
                                             *sorted(RESULTS.glob("*.md")),
                                             *sorted((ROOT / "data" / "course").rglob("*.md"))]}
README, MAP = PAGES[ROOT / "README.md"], PAGES[RESULTS / "map.md"]
ALL = "\n".join(PAGES.values())
NAMES = re.findall(r"`((?:codiff|oscar|sodiff|moe_diffir|common)\.(?!py\b)[\w.]+)`", README)
COMMAND_LINES = re.findall(r"^(?:uv run|python|accelerate launch|CUDA_VISIBLE_DEVICES=\S+).*", README, re.M)
CODE = re.findall(r"^\|.*\| `((?:codiff|oscar|sodiff|moe_diffir|common|data)\.[\w.]+)` \|$", ALL, re.M)
SECTION = re.compile(r"^## From the paper to a command$(.*?)^## ", re.M | re.S)
ITEMS = {"codiff": (5, 7), "sodiff": (4, 5), "oscar": (0, 8), "moe_diffir": (3, 6)}  # tables, figures
FLAG = re.compile(r"--[A-Za-z0-9][A-Za-z0-9-]*")


def help_of(main, words: list[str], capsys) -> set[str]:
    """The flags that a command's --help lists."""
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    return set(FLAG.findall(capsys.readouterr().out))


def help_of_script(script: str, command: str, capsys) -> set[str]:
    return help_of(importlib.import_module(script).main, [command], capsys)


def help_of_tool(tool: str, capsys) -> set[str]:
    return help_of(importlib.import_module(f"data.{tool}").main, TOOLS[tool], capsys)


def test_every_name_in_the_maps_exists():
    assert len(CODE) >= 70 and len(NAMES) >= 20
    for name in {*CODE, *NAMES}:
        assert pkgutil.resolve_name(name), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_equation_tag_in_the_script_is_in_the_map(script):
    tags = set(re.findall(r"Eq\. (\d+)", (ROOT / f"{script}.py").read_text()))
    rows = re.findall(rf"^\| {script.replace('_', '-')} \|.*", MAP, re.M | re.I)
    mapped = set(re.findall(r"Eq\. (\d+)", "\n".join(rows)))
    assert tags and tags <= mapped, "an equation is missing from the map"


@pytest.mark.parametrize("script, command", [(s, c) for s in SCRIPTS for c in COMMANDS[s]])
def test_the_flags_of_a_command_exist(script, command, capsys):
    lines = re.findall(rf"\b{script}\.py {command}\b([^\n`#]*)", ALL)
    assert lines, "no page names this command"
    assert set(FLAG.findall(" ".join(lines))) <= help_of_script(script, command, capsys)


@pytest.mark.parametrize("tool", TOOLS)
def test_the_flags_of_a_tool_exist(tool, capsys):
    lines = re.findall(rf"-m data\.{tool}\b([^\n`#]*)", ALL)
    assert lines, "no page names this tool"
    assert set(FLAG.findall(" ".join(lines))) <= help_of_tool(tool, capsys)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_the_readmes_commands_are_read(line, parsed):
    parsed(line.split("#")[0])


def test_no_page_names_a_command_or_a_flag_that_there_is_not(capsys):
    for script, command in re.findall(r"\b(codiff|oscar|sodiff|moe_diffir)\.py ([a-z]+)", ALL):
        assert command in COMMANDS[script], f"{script}.py {command}"
    for tool in re.findall(r"-m data\.([a-z_]+(?:\.[a-z_]+)*)", ALL):
        assert tool in TOOLS
    known = {"--help", "--nproc-per-node"}  # the latter is torchrun's
    for script in SCRIPTS:
        known = known.union(*(help_of_script(script, command, capsys) for command in COMMANDS[script]))
    known = known.union(*(help_of_tool(tool, capsys) for tool in TOOLS))
    assert not set(FLAG.findall(ALL)) - known


def section_of(script: str) -> str:
    return SECTION.search(PAGES[RESULTS / f"{script}.md"])[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_table_and_figure_of_a_paper_has_its_command_or_none(script):
    rows = re.findall(r"^\| (Table|Fig\.) (\d)[ab]? \|.*\| (.*) \|$", section_of(script), re.M)
    tables, figures = ITEMS[script]
    assert {row[:2] for row in rows} == {*(("Table", f"{n + 1}") for n in range(tables)),
                                         *(("Fig.", f"{n + 1}") for n in range(figures))}
    assert all("`python " in command or "none, " in command for *_, command in rows)


@pytest.mark.parametrize("script, line", [(s, line) for s in SCRIPTS
                                          for line in re.findall(r"`(python [^`]+)`", section_of(s))])
def test_commands_that_make_a_papers_items_are_read(script, line, parsed, tmp_path, capsys):
    args = parsed(line)
    if "results.ablations" in line:
        assert args.script == script
        ablations.main([*line.split()[3:], "--dry-run", "--results", str(tmp_path)])
        commands = capsys.readouterr().out.splitlines()
        assert len(commands) == 2 * len(args.only or paper(script).CHOICES)  # train and eval


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, target


def test_every_picture_is_shown():
    shown = set(re.findall(r"!\[[^]]*\]\((?:data/results/)?([^)\s]+)\)", ALL))
    assert {path.name for path in RESULTS.glob("*.png")} == shown


def prose(text: str) -> str:
    """A page without its tables and code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


def test_pages_are_short():
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 2200
    for script in SCRIPTS:
        assert 500 < len(prose(PAGES[RESULTS / f"{script}.md"]).split()) <= 2000


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_page_leads_with_result_picture_stops_and_exercises(script):
    page = PAGES[RESULTS / f"{script}.md"]
    order = [page.index(f"\n{what}") for what in ("**Result.**", "![", "## In ten stops", "## Exercises", "## ")]
    assert order[:4] == sorted(order[:4]) and order[4] == order[2]
    assert page.index("\n## The default run") > order[3]


@pytest.mark.parametrize("script, gains", [("codiff", 3), ("sodiff", 2), ("moe_diffir", 3)])
def test_a_result_is_the_tables(script, gains):
    page = PAGES[RESULTS / f"{script}.md"]
    result = re.search(r"^\*\*Result\.\*\*(.*?)^$", page, re.M | re.S)[1]
    table = re.search("<!-- default -->(.*)<!-- end of default -->", page, re.S)[1]
    said = re.findall(r"(\d\.\d\d) dB", result)
    assert len(said) == gains and all(f"| +{gain} " in table for gain in said)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_a_command(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "profile", "--size", "0"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2 and capsys.readouterr().err.startswith(f"{script}.py profile: argument --size")
