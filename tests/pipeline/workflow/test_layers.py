"""`extends`, `--profile`, `-s` and `-p`: what wins, and where a mistake in them is shown."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import WorkflowError
from layerwise.pipeline.workflow import load_workflow
from layerwise.pipeline.workflow.layers import merge
from layerwise.pipeline.workflow.yaml12 import Place, plant

BODY = """
    params: {solver: ilp, seed: 1, rate: 0.5, on: true, budgets: [3.0], extra: {a: 1}, free: null}
    stages:
      stats: {uses: calibrate}
      levels: {uses: compress, needs: [stats], with: {menu: [{method: gptq, bits: [3, 4]}, {method: wanda}]}}
      search:
        uses: allocate
        needs: [levels]
        with: {solver: "${{ params.solver }}", budgets: {bits: "${{ params.budgets }}"}, seed: "${{ params.seed }}"}
    profiles:
      smoke:
        params: {budgets: [4.0]}
        data: {calibration: {tokens: 64}}
        stages: {search: {with: {population: 8}, resources: {cpus: 2}}}
      wrong:
        stages: {search: {with: {population: 0}}}
    """


def search(workflow: Any) -> Any:
    return next(node for node in workflow.nodes if node.id == "search")


# --- -p ---


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("solver", "evolve", "evolve"),
        ("solver", "3", "3"),  # a text default: never anything else
        ("seed", "7", 7),
        ("seed", "1e3", 1000),
        ("rate", "1e-4", 1e-4),
        ("rate", "2", 2),
        ("on", "false", False),
        ("budgets", "[2.5, 4]", [2.5, 4]),
        ("extra", "{b: 2}", {"b": 2}),
        ("free", "[a]", ["a"]),
        ("free", "a", "a"),
        ("seed", 7, 7),
        ("budgets", (2.5, 4), [2.5, 4]),
    ],
)
def test_a_parameter_takes_the_type_of_its_default(desk: Any, name: str, text: Any, value: Any) -> None:
    body = BODY.replace('"${{ params.solver }}"', "ilp")
    found = desk.load(body, params={name: text}).params[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("seed", "x", "-p seed=x: must be a whole number, as its default is, got text 'x'"),
        ("seed", "1.5", "-p seed=1.5: must be a whole number, as its default is, got the number 1.5"),
        ("seed", "true", "-p seed=true: must be a whole number, as its default is, got true"),
        ("rate", "[", "-p rate=[: must be a number, as its default is, got text '['"),
        ("on", "yes", "-p on=yes: must be true or false, as its default is, got text 'yes'"),
        ("budgets", "3", "-p budgets=3: must be a list like [1, 2], as its default is, got the whole number 3"),
        ("extra", "3", "-p extra=3: must be a map like {a: 1}, as its default is, got the whole number 3"),
        (
            "sed",
            "3",
            "-p sed=3: unknown parameter 'sed' (did you mean 'seed'?); "
            "declared: solver, seed, rate, on, budgets, extra, free",
        ),
        # The parameter is well-formed, but what uses it does not take the value: the option has to change.
        ("seed", "13", "-p seed=13: stages.search.with.seed: 13 brings bad luck"),
        (
            "solver",
            "ipl",
            "-p solver=ipl: stages.search.with.solver: 'ipl' is not one of evolve, ilp, dp (did you mean 'ilp'?)",
        ),
        ("budgets", "[3, x]", "-p budgets=[3, x]: stages.search.with.budgets.bits.1: must be a number, got text 'x'"),
    ],
)
def test_a_wrong_parameter_is_reported_at_the_option(desk: Any, name: str, text: str, message: str) -> None:
    assert desk.mistakes(BODY, params={name: text}) == [message]


def test_a_workflow_without_parameters_says_so(desk: Any) -> None:
    assert desk.mistakes("stages: {a: {uses: calibrate}}\n", params={"x": "1"}) == [
        "-p x=1: unknown parameter 'x'; the workflow declares none"
    ]


def test_a_parameter_may_not_be_an_expression(desk: Any) -> None:
    assert desk.mistakes("params: {a: '${{ params.b }}', b: 1}\nstages: {a: {uses: calibrate}}\n") == [
        "6:13: params.a: a parameter is a plain value; an expression cannot stand here"
    ]


# --- -s ---


def test_any_key_can_be_set_and_a_later_one_wins(desk: Any) -> None:
    workflow = desk.load(
        BODY,
        sets=[
            "stages.search.with.population=3",
            "stages.search.with.population=1e2",
            "stages.search.with.budgets={bytes: [1, 2]}",
            "stages.levels.with.menu.0.bits.1=8",
            "stages.levels.with.menu.1={method: sparsegpt, patterns: [2:4]}",
            "stages.search.resources.cpus=3",
            "data.calibration.tokens=4Ki",
            "params.seed=5",
            "name=renamed",
        ],
    )
    assert search(workflow).params.population == 100
    assert search(workflow).params.budgets == {"bytes": [1, 2]}
    assert search(workflow).params.seed == 5
    assert search(workflow).resources.cpus == 3
    menu = next(node for node in workflow.nodes if node.id == "levels").params.menu
    assert menu[0].bits == [3, 8]
    assert menu[1].patterns == ("2:4",)
    assert workflow.data["calibration"].tokens == 4096
    assert workflow.name == "renamed"


def test_what_is_set_wins_over_the_profile_and_parameters_over_both(desk: Any) -> None:
    options = {"profile": "smoke", "sets": ["params.budgets=[5.0]", "stages.search.with.population=9"]}
    assert search(desk.load(BODY, **options)).params.budgets == {"bits": [5.0]}
    assert search(desk.load(BODY, **options)).params.population == 9
    assert search(desk.load(BODY, **options, params={"budgets": "[6.0]"})).params.budgets == {"bits": [6.0]}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("stages.serch.with.seed=1", "unknown stage 'serch' (did you mean 'search'?)"),
        ("stages.search.wiht.seed=1", "unknown key 'wiht' (did you mean 'with'?)"),
        ("stage.search.with.seed=1", "unknown key 'stage' (did you mean 'stages'?)"),
        ("data.calib.tokens=1", "unknown data entry 'calib' (did you mean 'calibration'?)"),
        ("params.sed=1", "unknown parameter 'sed' (did you mean 'seed'?)"),
        ("version=2", "'version' cannot be set from the command line"),
        ("profiles.smoke.name=x", "'profiles' cannot be set from the command line"),
        (
            "stages.levels.with.menu.2.bits=3",
            "unknown path: 'stages.levels.with.menu' is a list of 2 entries, counted from 0; it has no '2'",
        ),
        ("stages.levels.with.menu.x=3", "unknown path: 'stages.levels.with.menu' is a list of 2 entries"),
        ("model.dtype=float16", "unknown path: 'model' is text 'model' and has no 'dtype' inside; set it as a whole"),
        ("stages.search.with.budgets.bits.0=3", "unknown path: 'stages.search.with.budgets.bits' is an expression"),
        ("stages.search.with.seed", "write it as path.to.key=value"),
        ("=3", "write it as path.to.key=value"),
        ("name=[a", "while parsing a flow sequence"),
        ("stages.search.with.sed=1", "stages.search.with.sed: unknown key (known: population, workers)"),
        ("stages.search.with.population=-1", "stages.search.with.population: must be greater than 0, got -1"),
        ("stages.search.with.budget.bits=3", "stages.search.with.budget: unknown key (known: population, workers)"),
        ("stages.search.needs=[stast]", "stages.search.needs.0: unknown stage id 'stast' (did you mean 'stats'?)"),
        ("data.calibration.text=gone.txt", "data.calibration.text: file not found: "),
    ],
)
def test_a_wrong_setting_is_reported_at_the_option(desk: Any, option: str, message: str) -> None:
    assert desk.mistakes(BODY, sets=[option])[0].startswith(f"-s {option}: {message}")


# --- profiles ---


def test_a_profile_merges_maps_and_replaces_lists(desk: Any) -> None:
    workflow = desk.load(BODY, profile="smoke")
    assert search(workflow).params.budgets == {"bits": [4.0]}
    assert search(workflow).params.solver == "ilp"
    assert search(workflow).params.population == 8
    assert search(workflow).resources.cpus == 2
    assert workflow.data["calibration"].tokens == 64
    assert workflow.data["calibration"].sequence_length == 128


def test_a_mistake_in_a_profile_counts_only_when_it_is_used(desk: Any) -> None:
    desk.load(BODY)
    assert desk.mistakes(BODY, profile="wrong") == [
        "21:42: stages.search.with.population: must be greater than 0, got 0"
    ]


def test_an_unknown_profile_and_unknown_keys_in_one_are_reported(desk: Any) -> None:
    assert desk.mistakes(BODY, profile="smok") == ["--profile: unknown profile 'smok' (did you mean 'smoke'?)"]
    assert desk.mistakes("stages: {a: {uses: calibrate}}\n", profile="x") == [
        "--profile: unknown profile 'x' (the workflow has no profiles)"
    ]
    body = "params: {seed: 1}\nstages: {a: {uses: calibrate}}\nprofiles: {p: {stagse: {}, params: {sed: 1}}, q: 3}\n"
    assert desk.mistakes(body) == [
        "8:16: profiles.p.stagse: unknown key (did you mean 'stages'?)",
        "8:37: profiles.p.params.sed: no such parameter is declared (did you mean 'seed'?)",
        "8:50: profiles.q: must be a map, got the whole number 3",
    ]


# --- extends ---


def test_a_file_extends_another_and_every_path_is_relative_to_the_file_that_names_it(desk: Any) -> None:
    for folder in ("base", "base/model"):
        (desk.folder / folder).mkdir()
    for file in ("base/calibration.txt", "base/heldout.txt", "mine.txt"):
        (desk.folder / file).write_text("text")
    desk.write(desk.head + "stages:\n  stats: {uses: calibrate, with: {shards: 4}}\n", "base/base.yaml")
    path = desk.write(
        """\
        extends: base/base.yaml
        data: {heldout: {text: mine.txt}}
        stages:
          stats: {with: {data: heldout}}
        """
    )
    workflow = load_workflow(path, find_stage=desk.stages)
    assert workflow.name == "flow"
    assert workflow.model.path == desk.folder / "base/model"
    assert workflow.data["calibration"].paths == (desk.folder / "base/calibration.txt",)
    assert workflow.data["heldout"].paths == (desk.folder / "mine.txt",)
    (stats,) = workflow.nodes
    assert (stats.params.shards, stats.params.data) == (4, "heldout")


def test_mistakes_keep_the_file_they_stand_in(desk: Any) -> None:
    base = desk.write(desk.head + "stages:\n  stats: {uses: calibrate, with: {shards: 0}}\n", "base.yaml")
    path = desk.write("extends: base.yaml\nstages:\n  stats: {with: {dat: x}}\n")
    with pytest.raises(WorkflowError) as caught:
        load_workflow(path, find_stage=desk.stages)
    assert [str(mistake) for mistake in caught.value.mistakes] == [
        f"{base}:7:43: stages.stats.with.shards: must be at least 1, got 0",
        f"{path}:3:18: stages.stats.with.dat: unknown key (did you mean 'data'?)",
    ]


def test_a_circle_of_files_and_a_missing_one_are_reported_where_they_are_named(desk: Any) -> None:
    desk.write("extends: c.yaml\n", "b.yaml")
    last = desk.write("name: c\nextends: a.yaml\n", "c.yaml")
    first = desk.write("extends: b.yaml\n", "a.yaml")
    with pytest.raises(WorkflowError) as caught:
        load_workflow(first, find_stage=desk.stages)
    assert str(caught.value.mistakes[0]) == (
        f"{last}:2:10: extends: the files extend each other in a circle: a.yaml -> b.yaml -> c.yaml -> a.yaml"
    )
    lost = desk.write("extends: gone.yaml\n")
    with pytest.raises(WorkflowError) as caught:
        load_workflow(lost, find_stage=desk.stages)
    assert str(caught.value.mistakes[0]) == f"{lost}:1:10: extends: {desk.folder / 'gone.yaml'}: no such file"


trees = st.recursive(
    st.integers(0, 9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


def plainly_merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    both = {key: plainly_merged(below[key], above[key]) for key in below.keys() & above.keys()}
    return below | above | both


@given(trees, trees)
def test_merging_agrees_with_its_definition(below: Any, above: Any) -> None:
    low, high = plant({"top": below}, Place("low")), plant({"top": above}, Place("high"))
    assert merge(low, high).plain() == plainly_merged({"top": below}, {"top": above})
    assert merge(low, low).plain() == low.plain()


@given(trees, trees)
def test_every_scalar_of_a_merged_tree_keeps_the_file_it_was_written_in(below: Any, above: Any) -> None:
    low, high = plant({"top": below}, Place("low")), plant({"top": above}, Place("high"))
    for path, node in merge(low, high).walk():
        if isinstance(node.value, int):
            source = high if high.find(path) is not None else low
            assert node.place == source.place
            assert node.value == source.find(path).value
