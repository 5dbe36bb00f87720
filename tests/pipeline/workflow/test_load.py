"""Loading a workflow: what it holds, and that all mistakes are reported at once. The head of a file has 5 lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import UsageError, WorkflowError
from layerwise.pipeline.executors import Resources
from layerwise.pipeline.workflow import load_workflow
from layerwise.pipeline.workflow.yaml12 import Place, dump

FULL = """
    params: {budgets: [2.5, 3.0], seed: 7}
    resources: {cpus: 2, memory: 2GiB}
    x-anything: {of: [mine, ${{ nonsense]}
    stages:
      stats: {uses: calibrate}
      levels:
        uses: compress
        needs: stats
        with:
          menu:
            - {method: gptq, bits: [3, 4]}
            - {method: sparsegpt, patterns: [2:4]}
      search:
        uses: allocate
        needs: [levels]
        foreach: [ilp, evolve]
        resources: {cpus: 1, gpus: 0.5}
        description: the search of ${{ item }}
        with: {solver: "${{ item }}", budgets: {bits: "${{ params.budgets }}"}, seed: "${{ params.seed }}"}
      best: {uses: pick, foreach: "${{ needs.search }}"}
      score: {uses: evaluate, needs: [search, best]}
    """.replace("${{ nonsense]", "nonsense]")


def test_a_workflow_holds_everything_with_defaults_filled_in(desk: Any) -> None:
    workflow = desk.load(FULL)
    assert workflow.name == "flow"
    assert workflow.model.path == desk.folder / "model"
    assert workflow.model.dtype == "float32"
    assert workflow.data["calibration"].paths == (desk.folder / "calibration.txt",)
    assert workflow.data["calibration"].tokens == 2048
    assert workflow.data["heldout"].tokens is None
    assert workflow.params == {"budgets": [2.5, 3.0], "seed": 7}
    assert workflow.resources == Resources(2, 0, 2 << 30)
    nodes = {node.id: node for node in workflow.nodes}
    assert list(nodes) == [*("stats", "levels", "search@ilp", "search@evolve", "best@ilp", "best@evolve", "score")]
    search = nodes["search@evolve"]
    assert search.params.solver == "evolve"
    assert search.params.budgets == {"bits": [2.5, 3.0]}
    assert search.params.seed == 7
    assert search.inputs == {"database": ("levels",)}
    assert search.resources == Resources(1, 0.5, 2 << 30, "cuda")
    assert search.description == "the search of evolve"
    assert search.place == Place(str(desk.folder / "flow.yaml"), 19, 3)
    assert nodes["levels"].params.menu[1].patterns == ("2:4",)


def test_the_resolved_workflow_is_a_workflow_that_means_the_same(desk: Any, tmp_path: Path) -> None:
    workflow = desk.load(FULL)
    elsewhere = desk.write(dump(workflow.resolved()), "far/away/resolved.yaml")
    again = load_workflow(elsewhere, find_stage=desk.stages)
    assert again.resolved() == workflow.resolved()
    assert [(node.id, node.params, dict(node.inputs), node.resources) for node in again.nodes] == [
        (node.id, node.params, dict(node.inputs), node.resources) for node in workflow.nodes
    ]


def test_all_mistakes_are_reported_at_once_sorted_by_line(desk: Any) -> None:
    head = """\
version: 1
modle: model
data:
  calibration: {text: nowhere.txt, tokens: 2Kx}
  held out: {text: heldout.txt}
params: {solvers: [ilp]}
stages:
"""
    body = """\
  stats: {uses: calibrate, with: {data: calibratoin}}
  levels:
    uses: compress
    needs: [stat]
    with: {menu: [{method: gptq, bits: [3], damp_percent: 2}]}
  search:
    uses: alocate
    neds: [levels]
  other:
    uses: allocate
    needs: [levels, stats]
    foreach: ${{ params.solver }}
    with: {methd: x, budgets: {bits: few}}
  best: {uses: pick, needs: [stats]}
  score: 7
"""
    path = desk.write(head + body)
    with pytest.raises(WorkflowError) as caught:
        load_workflow(path, find_stage=desk.stages)
    assert [str(mistake).removeprefix(f"{path}:") for mistake in caught.value.mistakes] == [
        "2:1: modle: unknown key (did you mean 'model'?)",
        "4:44: data.calibration.tokens: must be a whole number like 65536, 64k, 32Ki or 2Mi, got text '2Kx'",
        "5:3: data.held out: 'held out' cannot be a name: use letters, digits, '_' and '-', a letter first",
        "8:41: stages.stats.with.data: no data entry 'calibratoin' (did you mean 'calibration'?)",
        "11:13: stages.levels.needs.0: unknown stage id 'stat' (did you mean 'stats'?)",
        "12:59: stages.levels.with.menu.0.damp_percent: must be less than 1, got 2",
        "14:11: stages.search.uses: unknown stage 'alocate' (did you mean 'allocate'?)",
        "15:5: stages.search.neds: unknown key (did you mean 'needs'?)",
        "19:14: stages.other.foreach: unknown name 'params.solver': 'params' has no 'solver' (did you mean 'solvers'?)",
        "20:12: stages.other.with.methd: unknown key (known: solver, population, seed, workers)",
        "20:38: stages.other.with.budgets.bits: must be a number or a list, got text 'few'",
        "21:3: stages.best: needs an input of type 'allocations'; add 'other' to needs",
        "21:30: stages.best.needs.0: 'stats' gives a statistics, which 'pick' cannot take (it takes: allocations)",
        "22:10: stages.score: must be a map, got the whole number 7",
    ]
    assert str(caught.value).splitlines()[-2:] == [
        "14 errors",
        "hint: `layerwise schema --stage compress` lists the parameters of 'compress'",
    ]
    assert caught.value.exit_code == 2


def test_a_key_given_twice_is_reported_among_the_others(desk: Any) -> None:
    assert desk.mistakes("stages:\n  a: {uses: calibrate}\n  a: {uses: x}\n  b: {uses: calibrat}\n") == [
        "8:3: stages.a: this key is given twice (first on line 7)",
        "9:13: stages.b.uses: unknown stage 'calibrat' (did you mean 'calibrate'?)",
    ]


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("", "1:1: version: this key is required; begin the file with 'version: 1'"),
        ("version: 0", "1:10: version: this layerwise reads version 1, got the whole number 0"),
        ("version: '1'", "1:10: version: this layerwise reads version 1, got text '1'"),
        ("version: true", "1:10: version: this layerwise reads version 1, got true"),
    ],
)
def test_the_version_is_mandatory(desk: Any, version: str, message: str) -> None:
    body = f"{version}\nmodel: model\nstages: {{a: {{uses: pickle}}}}\n".lstrip()
    wrong = desk.mistakes(body, head="")
    assert wrong[0] == message
    assert len(wrong) == 2


def test_a_newer_version_is_the_only_thing_said(desk: Any) -> None:
    path = desk.write("version: 2\nstuff: 1\n")
    with pytest.raises(WorkflowError, match="hint: upgrade layerwise") as caught:
        load_workflow(path, find_stage=desk.stages)
    assert len(caught.value.mistakes) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "1:1: stages: this key is required"),
        ("stages: {}", "6:9: stages: must have at least 1 entry, has 0"),
        ("stages: [a]", "6:9: stages: must be a map, got a list"),
        ("stages: {a: {}}", "6:10: stages.a.uses: this key is required"),
        ("stages: {a b: {uses: calibrate}}", "6:10: stages.a b: 'a b' cannot name a stage: use letters, digits"),
        ("stages: {a: {uses: 3}}", "6:20: stages.a.uses: must be text, got the whole number 3"),
        ("stages: {a: {uses: calibrate, needs: 3}}", "6:38: stages.a.needs: must be text or a list, got the whole"),
        ("stages: {a: {uses: calibrate, with: [1]}}", "6:37: stages.a.with: must be a map, got a list"),
        (
            "stages: {a: {uses: calibrate, resources: {gpus: -1}}}",
            "6:49: stages.a.resources.gpus: must be at least 0, got -1",
        ),
        (
            "stages: {a: {uses: calibrate}}\nresources: {memory: 2GB!}",
            "7:21: resources.memory: must be a size like 512MiB or 2GiB, got text '2GB!'",
        ),
        (
            "stages: {a: {uses: calibrate, with: {shards: '${{ params.x }}'}}}",
            "6:46: stages.a.with.shards: unknown name",
        ),
        ("stages: {a: {uses: calibrate}}\nname: [a]", "7:7: name: must be text, got a list"),
        ("stages: {a: {uses: calibrate}, a@b: {uses: calibrate}, a: 1}", "6:56: stages.a: this key is given twice"),
    ],
)
def test_mistakes_of_form_have_their_place(desk: Any, body: str, message: str) -> None:
    (wrong,) = desk.mistakes(body + "\n")
    assert wrong.startswith(message)


def test_something_that_is_not_a_map_is_no_workflow(desk: Any) -> None:
    assert desk.mistakes("- a\n", head="") == ["1:1: a workflow is a map, but this is a list"]
    with pytest.raises(UsageError, match="no such file"):
        load_workflow(desk.folder / "nowhere.yaml")


def test_stages_may_be_found_by_a_function(desk: Any) -> None:
    def find(name: str) -> Any:
        if name != "calibrate":
            raise UsageError(f"unknown stage '{name}' (known: calibrate)")
        return desk.stages[name]

    path = desk.write(desk.head + "stages: {a: {uses: calibrate}, b: {uses: x}}\n")
    with pytest.raises(WorkflowError, match=r"6:42: stages\.b\.uses: unknown stage 'x' \(known: calibrate\)"):
        load_workflow(path, find_stage=find)


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys, layerwise.pipeline.workflow.graph, layerwise.pipeline.workflow.schema\n"
        "print(*sorted({'torch', 'ray', 'pandas', 'pyarrow', 'numpy', 'scipy', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
