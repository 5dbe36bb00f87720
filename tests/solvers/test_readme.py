"""What the solvers' page tells people is so: every example prints what it says, and the tables are true."""

import doctest
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from layerwise import solvers
from layerwise.errors import UsageError
from layerwise.solvers import SEARCHES, SOLVERS, Problem

FOLDER = Path(__file__).parents[2] / "solvers"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
CAPABILITIES = {
    "several budgets": {"budgets": {"bytes": 9.0, "ms": 9.0}},
    "reverse form": {"minimize": "bytes", "max_loss": 4.0},
    "nested units": {"budgets": {"bytes": 9.0}, "nested": {(0, 0): [1]}},
    "interactions": {"budgets": {"bytes": 9.0}, "interactions": {((1, 0), (2, 1)): 0.5}},
}


def small_problem(**more) -> Problem:
    costs = {"bytes": np.array([[1.0, 2.0, 4.0]] * 3), "ms": np.array([[1.0, 3.0, 4.0]] * 3)}
    return Problem(costs=costs, losses=np.array([[3.0, 1.0, 0.0]] * 3), **more)


def tables() -> list[list[dict[str, str]]]:
    """Every table of the page, as rows by column."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.splitlines()]
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def column(rows: list[dict[str, str]], name: str) -> list[str]:
    return [row[name].strip("`") for row in rows]


def test_every_example_prints_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a picture is drawn
    monkeypatch.setenv("MPLBACKEND", "agg")
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    names: dict[str, object] = {}
    report: list[str] = []
    for language, block in re.findall(r"^```(pycon|python)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(block, "solvers/README.md", "exec"), names)
            continue
        example = parser.get_doctest(block, names, "solvers/README.md", None, None)
        runner.run(example, out=report.append, clear_globs=False)
        names = example.globs
    assert runner.summarize(verbose=False).attempted > 40
    assert not report, "".join(report)


def test_the_page_names_every_solver_and_every_search_where_it_describes_them() -> None:
    guarantees, capabilities, searches = tables()
    assert set(column(guarantees, "solver")) == set(column(capabilities, "solver")) == set(SOLVERS)
    assert set(column(searches, "search")) == {search.__name__ for search in SEARCHES.values()}


@pytest.mark.parametrize("row", tables()[1], ids=lambda row: row["solver"].strip("`"))
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_solver_takes_exactly_what_the_table_says(row: dict[str, str], capability: str) -> None:
    solve, problem = SOLVERS[row["solver"].strip("`")], small_problem(**CAPABILITIES[capability])
    if row[capability] == "–":
        with pytest.raises(UsageError):
            solve(problem)
    else:
        assert problem.feasible(solve(problem).choice)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_reverse_form_with_interactions_is_for_those_that_the_page_names(name: str) -> None:
    problem = small_problem(minimize="bytes", max_loss=4.0, interactions={((1, 0), (2, 1)): 0.5})
    if name in ("brute", "bisect", "uniform", "even"):
        assert problem.feasible(SOLVERS[name](problem).choice)
    else:
        with pytest.raises(UsageError):
            SOLVERS[name](problem)


@pytest.mark.parametrize("row", tables()[2], ids=lambda row: row["search"].strip("`"))
def test_a_search_takes_what_the_page_says_and_refuses_the_reverse_form(row: dict[str, str]) -> None:
    search = SEARCHES[row["search"].strip("`").lower()]
    limits = {"budgets": {"bytes": 8.0, "ms": 9.0}}
    problem = small_problem(**limits, nested={(0, 0): [1]}, fixed={2: 1})
    assert all(problem.feasible(candidate) for candidate in search(problem).ask().candidates)
    with pytest.raises(UsageError):
        search(small_problem(minimize="bytes", max_loss=4.0))


@pytest.mark.parametrize("row", tables()[2], ids=lambda row: row["search"].strip("`"))
def test_a_search_ends_by_itself_where_the_table_says(row: dict[str, str]) -> None:
    signature = inspect.signature(SEARCHES[row["search"].strip("`").lower()])
    evaluations = signature.parameters["stop"].default.evaluations
    said = re.fullmatch(r"([\d,]+) evaluations", row["ends by itself after"])
    assert evaluations == (int(said[1].replace(",", "")) if said else None)


def test_every_file_that_the_page_shows_is_there() -> None:
    assert all((FOLDER / name).is_file() for name in re.findall(r"!\[.*?\]\((.*?)\)", PAGE))


def test_the_library_exports_every_name_that_the_page_imports() -> None:
    imported = re.findall(r"^(?:>>> )?from layerwise\.solvers import (.+)$", PAGE, re.MULTILINE)
    names = {name.strip() for line in imported for name in line.split(",")}
    assert names <= set(solvers.__all__)
