"""Where stages compute: what a workflow asks for, what its stages can use, and what the machine has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from layerwise.pipeline.workflow import load, load_workflow, placing
from layerwise.pipeline.workflow.yaml12 import dump

FLOW = """\
{top}
stages:
  stats: {{uses: calibrate}}
  levels: {{uses: compress, needs: stats, with: {{menu: [{{method: gptq, bits: 3}}]}}}}
  search: {{uses: allocate, needs: [levels], with: {{solver: {solver}}}{own}}}
"""


@pytest.mark.parametrize(
    ("top", "own", "at_hand", "device", "gpus"),
    [
        ("", "", False, "cpu", 0),
        ("", "", True, "cuda", 1),
        ("", "resources: {gpus: 0.5}", False, "cuda", 0.5),
        ("device: cpu", "", True, "cpu", 0),
        ("device: cuda", "", False, "cuda", 1),
        ("device: cuda", "device: cpu", True, "cpu", 0),
        ("device: cpu", "device: auto", True, "cuda", 1),
        ("device: cpu", "device: cuda", False, "cuda", 1),
        ("resources: {gpus: 2}", "", False, "cuda", 2),
        ("resources: {gpus: 2}", "device: cpu", False, "cpu", 0),
    ],
)
def test_a_stage_computes_where_it_is_asked_to_and_can(
    desk: Any, monkeypatch: pytest.MonkeyPatch, top: str, own: str, at_hand: bool, device: str, gpus: float
) -> None:
    monkeypatch.setattr(load, "gpu_at_hand", lambda: at_hand)
    workflow = desk.load(FLOW.format(top=top, solver="ilp", own=f", {own}" if own else ""))
    search = workflow.nodes[-1]
    assert (search.resources.device, search.resources.gpus) == (device, gpus)
    assert all((node.resources.device, node.resources.gpus) == ("cpu", 0) for node in workflow.nodes[:-1])
    written = desk.write(dump(workflow.resolved()), "resolved.yaml")
    again = load_workflow(written, find_stage=desk.stages)
    assert again.resolved() == workflow.resolved()
    assert [node.resources for node in again.nodes] == [node.resources for node in workflow.nodes]


def test_a_resolved_workflow_takes_the_gpu_of_the_machine_that_reads_it(
    desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "gpu_at_hand", lambda: True)
    written = desk.write(dump(desk.load(FLOW.format(top="", solver="ilp", own="")).resolved()), "resolved.yaml")
    monkeypatch.setattr(load, "gpu_at_hand", lambda: False)
    assert load_workflow(written, find_stage=desk.stages).nodes[-1].resources.device == "cpu"


@pytest.mark.parametrize(
    ("solver", "own", "said"),
    [
        ("ilp", "device: cpu, resources: {gpus: 1}", "asks for 1 gpus, but its device is cpu"),
        ("dp", "device: cuda", "'allocate' cannot use a GPU with these parameters: leave `device` out"),
        ("dp", "resources: {gpus: 1}", "'allocate' cannot use a GPU with these parameters: leave `gpus` out"),
        ("ilp", "device: gpu", "device: 'gpu' is not one of auto, cpu, cuda"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_a_mistake_of_the_workflow(desk: Any, solver: str, own: str, said: str) -> None:
    (mistake,) = desk.mistakes(FLOW.format(top="", solver=solver, own=f", {own}"))
    assert said in mistake


def test_a_gpu_is_at_hand_where_the_driver_shows_one_and_torch_is_built_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, torch = tmp_path / "dev", tmp_path / "torch"
    (torch / "lib").mkdir(parents=True)
    nodes.mkdir()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(placing, "NODES", nodes)
    monkeypatch.setattr(placing, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(torch)]))
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0"):
        assert not placing.gpu_at_hand()
        (nodes / name).touch()
    assert not placing.gpu_at_hand()
    (torch / "lib" / "libtorch_cuda.so").touch()
    assert placing.gpu_at_hand()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not placing.gpu_at_hand()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert placing.gpu_at_hand()
