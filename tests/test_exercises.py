"""The pages' exercises: red until they are done, green with their solution; ten stops a page."""

import importlib.util
import re

import pytest

from common import ROOT

SCRIPTS = ("codiff", "sodiff", "oscar", "moe_diffir")


def page(script):
    return (ROOT / "data" / "results" / f"{script}.md").read_text()


def solutions(script):
    return (ROOT / "data" / "course" / "solutions" / f"{script}.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_exercise_is_red_and_its_solution_green(script, tmp_path):
    """With its solution in the place of the function that is to be written."""
    exercise = (ROOT / "tests" / "exercises" / f"test_{script}.py").read_text()
    solution = re.search(r"^```python\n(.*?)^```", solutions(script), re.M | re.S)[1]
    name = re.search(r"^def (\w+)", solution, re.M)[1]
    missing = r'raise NotImplementedError\("this is what you write"\)\n'
    todo = re.compile(rf"^def {name}\(.*?{missing}", re.M | re.S)
    assert len(todo.findall(exercise)) == 1
    solved = todo.sub(lambda _: solution, exercise)
    for text, outcomes in ((exercise, {"red"}), (solved, {"green"})):
        (tmp_path / "exercise.py").write_text(text)
        spec = importlib.util.spec_from_file_location("exercise", tmp_path / "exercise.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert {outcome(test) for test in cases_of(module)} == outcomes


def cases_of(module):
    for name, function in vars(module).items():
        if name.startswith("test_"):
            marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
            yield from ((lambda row=row: function(*row) if isinstance(row, tuple) else function(row))
                        for row in marks[0].args[1]) if marks else [function]


def outcome(test):
    try:
        test()
    except NotImplementedError:
        return "red"
    return "green"


@pytest.mark.parametrize("script", SCRIPTS)
def test_solutions_are_not_on_the_page(script):
    exercises = re.findall(r"^\*\*(\d)\. (?:Read|Change|Build)\.\*\*", page(script), re.M)
    answers = re.split(r"^\*\*(\d)\.\*\*", solutions(script), flags=re.M)[1:]
    assert exercises == answers[::2] == ["1", "2", "3"]
    words = " ".join(page(script).split())
    for answer in answers[1::2]:
        assert " ".join(answer.split()[:8]) not in words


def test_exercises_are_not_collected_by_default(request):
    assert not [item.nodeid for item in request.session.items if "exercises" in item.path.parts]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_page_has_ten_stops(script):
    stops = re.findall(r"^\| (\d+) \|.*\| `[\w.]+` \|$", page(script), re.M)  # (test_readme.py: they exist)
    assert [int(n) for n in stops] == list(range(1, 11))
