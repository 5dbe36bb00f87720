"""Every stage of the table keeps what `layerwise.testing` says that stages promise, on one chain of them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layerwise.stages import STAGES
from layerwise.testing import Bench, check_stage

CHAIN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "transform": ({"transforms": [{"method": "rotation"}]}, ()),
    "calibrate": ({"statistics": ["hessian", "channels", "fisher", "block_inputs"]}, ()),
    "compress": (
        {
            "menu": [
                {"method": "gptq", "bits": [2, 4], "group_size": 16},
                {"method": "gptq_sequential", "bits": 3, "group_size": 16},
                {"method": "drop"},
                {"method": "dense"},
            ]
        },
        ("statistics",),
    ),
    "profile": ({"tokens": 64}, ("database",)),
    "allocate": (
        {
            "solver": "evolve",
            "budgets": {"bits": [4.0, 5.0]},
            "preset": "quick",
            "generations": 2,
            "tokens_per_selection": [64, 256],
            "finalists": 2,
            "recover": {"method": "eora", "rank": 2},
        },
        ("database", "profile", "statistics"),
    ),
    "apply": ({}, ("allocations", "database")),
    "recover": (
        {
            "repairs": [
                {"method": "eora", "rank": 2},
                {"method": "perp", "steps": 3, "check_every": 2, "batch_size": 2},
                {"method": "lora", "steps": 4, "check_every": 2, "batch_size": 2},
            ]
        },
        ("model", "statistics"),
    ),
    "evaluate": ({}, ("allocations", "database", "models")),
    "export": ({}, ("model",)),
}
"""Parameters and ports; artifacts are those of the stages before it."""

TIMING = {"latency", "speed"}
"""They measure the machine; their own tests say what they promise beside times."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def made(bench: Bench) -> dict[str, Path]:
    """The artifacts of the chain by the ports that they fit, as they are needed."""
    found: dict[str, Path] = {}
    gives = {"calibrate": ["statistics"], "compress": ["database"], "profile": ["profile"]}
    gives |= {"allocate": ["allocations"], "apply": ["model", "models"]}
    for stage, ports in gives.items():
        params, inputs = CHAIN[stage]
        artifact = bench.run(stage, params, **{port: found[port] for port in inputs})
        found |= dict.fromkeys(ports, artifact)
    return found


def test_every_stage_of_the_table_is_tried_here() -> None:
    assert CHAIN.keys() | TIMING == STAGES.keys()


@pytest.mark.parametrize("stage", CHAIN)
def test_a_stage_keeps_its_promises(bench: Bench, made: dict[str, Path], stage: str) -> None:
    params, inputs = CHAIN[stage]
    check_stage(bench, stage, params, **{port: made[port] for port in inputs})
