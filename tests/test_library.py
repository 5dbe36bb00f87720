"""What a notebook calls gives what the commands print, and what docs/library.md shows works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import layerwise
from layerwise.errors import NotFinite, UsageError, WorkflowError
from layerwise.pipeline.workflow.yaml12 import dump
from layerwise.results.store import Store

PAGE = (Path(__file__).parents[1] / "docs" / "library.md").read_text(encoding="utf-8")
RUN = "run-a"
DEMO = Path(__file__).parents[1] / "workflows" / "demo"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two runs of one search and its levels; the second found both in the cache."""
    store = Store.open(tmp_path / "layerwise-results", create=True)
    for run, cache in ((RUN, "miss"), ("run-b", "hit")):
        store.append("runs", [{"name": "demo", "status": "ok"}], run_id=run, attempt=1, first_seq=0)
        for seq, stage in enumerate(("compress", "search")):
            at = {"run_id": run, "stage": stage, "stage_key": stage[0] * 64, "attempt": 1, "first_seq": seq}
            uses = {"compress": "compress", "search": "allocate"}[stage]
            store.append("stages", [{"uses": uses, "cache": cache, "status": "ok"}], **at)
    made = {"run_id": RUN, "attempt": 1, "first_seq": 0}
    levels = [{"unit": "q", "level": f"rtn-{bits}b", "bits": bits, "status": "ok"} for bits in (2, 4)]
    store.append("levels", levels, **made, stage="compress", stage_key="c" * 64)
    allocations = [
        {"candidate": f"{bits}" * 6, "solver": "ilp", "bits": float(bits), "bytes": 10 * bits, "kl": 1 / (3 * bits)}
        for bits in (2, 4)
    ]
    store.append("allocations", allocations, **made, stage="search", stage_key="s" * 64)
    return store


@pytest.mark.parametrize("run", [RUN, "run-b", None])
def test_the_frontier_is_the_command_s_to_the_last_digit(store: Store, run: str | None) -> None:
    from layerwise.pipeline.cli import app
    from layerwise.results.format import format_table

    frame = layerwise.open_results(store.root, run).frontier(over="bytes")
    command = ["frontier", *([run] if run else []), "--over", "bytes", "--format", "csv", "--results", str(store.root)]
    printed = CliRunner().invoke(app, command).stdout
    assert len(frame) == 2
    assert format_table(frame, "csv") == printed


def test_the_tables_hold_what_an_earlier_run_computed(store: Store) -> None:
    results = layerwise.open_results(store.root, "run-b")
    assert results.levels()["level"].tolist() == ["rtn-2b", "rtn-4b"]
    assert results.profile().empty
    assert results.candidates().empty
    assert "run run-b" in repr(results)
    assert "search" in repr(results)
    assert "<td>search</td>" in results._repr_html_()


def test_no_results_is_an_exception_with_the_command_s_message(tmp_path: Path, store: Store) -> None:
    with pytest.raises(UsageError, match="is not a results folder"):
        layerwise.open_results(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="there is no run 'other'"):
        layerwise.open_results(store.root, "other")


def test_a_weight_gets_the_level_that_a_menu_gives_it() -> None:
    import torch

    from layerwise.stages.compress.gptq import Params, quantized

    torch.manual_seed(0)
    weight, inputs = torch.randn(8, 32), torch.randn(64, 32)
    hessian = inputs.T @ inputs
    level = layerwise.compress_weight(weight, hessian=hessian, bits=3, group_size=16)
    (same,) = quantized(weight, hessian, Params.model_validate({"bits": 3, "group_size": 16}))
    assert torch.equal(level.decode(), same.decode())
    assert (level.name, level.recipe, level.size_bytes) == (same.name, same.recipe, same.size_bytes)


def test_what_does_not_fit_is_said() -> None:
    import torch

    weight = torch.ones(4, 8)
    with pytest.raises(UsageError, match="gptq needs the Hessian"):
        layerwise.compress_weight(weight, "gptq", bits=4)
    with pytest.raises(UsageError, match=r"of 8 inputs expected \(8, 8\)"):
        layerwise.compress_weight(weight, "gptq", bits=4, hessian=torch.eye(4))
    with pytest.raises(UsageError, match="rtn: bits"):
        layerwise.compress_weight(weight, "rtn")
    with pytest.raises(UsageError, match="would make 2 levels"):
        layerwise.compress_weight(weight, "rtn", bits=[2, 3])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"expected \(out, in\)"):
        layerwise.compress_weight(weight[0], "rtn", bits=4)
    with pytest.raises(UsageError, match="does not work on one weight"):
        layerwise.compress_weight(weight, "drop")
    with pytest.raises(NotFinite):
        layerwise.compress_weight(weight * float("nan"), "rtn", bits=4)


def test_a_workflow_that_a_script_made_is_the_one_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heldout.txt").write_text("Once upon a time. " * 200)
    workflow: dict[str, object] = {
        "version": 1,
        "name": "made",
        "model": str(DEMO / "model"),
        "data": {"heldout": {"text": "heldout.txt", "sequence_length": 16}},
        "params": {"bits": [3, 4]},
        "stages": {"levels": {"uses": "compress", "with": {"menu": [{"method": "rtn", "bits": "${{ params.bits }}"}]}}},
    }
    first = layerwise.run(workflow, "results")
    (tmp_path / "made.yaml").write_text(dump(workflow))
    assert layerwise.run("made.yaml", "results").run == first.run
    other = layerwise.run(workflow, "results", params={"bits": [2]})
    assert other.run != first.run
    assert set(other.levels()["bits"].dropna()) == {2.0, 16.0}  # the second as it is
    with pytest.raises(WorkflowError, match=r"workflow:.*unknown stage 'compres' \(did you mean 'compress'\?\)"):
        layerwise.run({**workflow, "stages": {"levels": {"uses": "compres"}}}, "results")
    with pytest.raises(UsageError, match="holds what YAML cannot say"):
        layerwise.run({**workflow, "model": object()}, "results")


def test_every_snippet_of_the_page_runs(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(store.root.parent)
    Path("model").symlink_to(DEMO / "model")
    Path("calibration.txt").write_text("Once upon a time. " * 200)
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "docs/library.md", "exec"), {})
        assert capsys.readouterr().out
