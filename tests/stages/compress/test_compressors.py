"""Every compressor of the table keeps what `layerwise.testing` says that compressors promise."""

from __future__ import annotations

from typing import Any

import pytest

from layerwise.errors import UsageError
from layerwise.stages.compress import COMPRESSORS, find_compressor
from layerwise.testing import Promise, compressor_promises

MENUS: dict[str, list[dict[str, Any]]] = {
    "dense": [{}],
    "rtn": [
        {"bits": [2, 4, 8], "group_size": 8},
        {"bits": 3, "group_size": -1, "sym": False, "grid": "mse"},
        {"bits": [3], "group_size": 2, "group_along": "outputs", "scale_bits": 6, "scale_group": 2},
    ],
    "gptq": [
        {"bits": [2, 4, 8], "group_size": 8},
        {"bits": 3, "group_size": -1, "sym": False, "desc_act": True},
        {"bits": [3, 5], "group_size": 7, "desc_act": True},
        {"bits": [3, 5], "group_size": 7, "desc_act": False, "sym": False, "grid": "mse"},
        {"bits": [3, 5], "group_size": 4, "sym": False, "scale_bits": 4, "group_along": "outputs"},
        {"bits": [2, 8], "group_size": 1000, "scale_bits": 5},
    ],
    "gptq_sequential": [{"bits": [2, 4, 8], "group_size": 8}],
    "awq": [{"bits": [2, 4, 8], "group_size": 8}, {"bits": 3, "group_size": 7, "sym": False, "grid_points": 5}],
    "learned_rounding": [
        {"bits": [2, 4, 8], "group_size": 8, "steps": 10, "batch_size": 2},
        {"bits": [3], "group_size": 7, "steps": 10, "sym": False},
    ],
    "trellis": [
        {"bits": [1, 2, 3, 4], "state_bits": 10},
        {"bits": [1.5, 2.5], "state_bits": 10, "columns": 3, "scales": "row", "seed": 2},
    ],
    "trellis_nearest": [{"bits": [1, 2.5, 4], "state_bits": 10}],
    "magnitude": [
        {"sparsity": [0.25, 0.5, 0.75]},
        {"pattern": ["3:4", "4:8", "1:7"]},
        {"sparsity": 0.3, "then": {"bits": [2, 4], "group_size": 8}},
        {"sparsity": [0.25, 0.5], "block": [4, 3]},
    ],
    "sparsegpt": [
        {"sparsity": [0.25, 0.5, 0.75], "compare": "layer"},
        {"sparsity": [0.25, 0.5, 0.75]},
        {"pattern": ["3:4", "4:8", "1:7"]},
        {"sparsity": 0.5, "block_size": 3, "then": {"bits": [2, 4], "group_size": 8}},
        {"pattern": "2:3", "damp_percent": 0.1, "then": {"bits": [2, 4], "group_size": 7, "sym": False}},
        {"sparsity": 0.3, "then": {"bits": [3, 6], "group_size": -1, "grid": "minmax"}},
        {"sparsity": [0.25, 0.5], "block": [4, 3], "block_size": 7},
        {"sparsity": 0.4, "block": [1, 8], "then": {"bits": [2, 4], "group_size": 8, "sym": False}},
        {"sparsity": 0.4, "block": [2, 7], "then": {"bits": [2, 4], "group_size": 5}},
    ],
    "wanda": [
        {"sparsity": [0.25, 0.5, 0.75]},
        {"pattern": ["3:4", "4:8", "1:7"]},
        {"pattern": "2:4", "then": {"bits": [2, 4, 8], "group_size": 7, "sym": False, "grid": "minmax"}},
        {"sparsity": 0.3, "then": {"bits": [3, 6], "group_size": -1}},
        {"sparsity": 0.4, "block": [3, 8], "then": {"bits": [2, 4], "group_size": 8}},
    ],
    "low_rank": [
        {"ranks": [1, 4], "parameters": [0.5, 0.9], "energy": [0.5, 0.99]},
        {"parameters": 0.5, "dtype": "float32"},
        {"parameters": 0.9, "then": {"bits": [2, 4, 8], "group_size": 7}},
    ],
    "lq_lora": [{"bits": [2, 4, 8], "group_size": 8, "rank": 2}, {"bits": 3, "rank": 100, "rounds": 2, "sym": False}],
    "drop": [{}, {"units": ["attention", "mlp", "block"]}],
    "width": [
        {"units": "mlp", "keep": [0.75, 0.5], "multiple": 4},
        {"units": "attention", "keep": [1], "correct": False},
        {"units": "mlp", "keep": [6], "multiple": 3, "then": {"bits": [3, 4], "group_size": 8}},
    ],
}


def test_every_compressor_of_the_table_is_tried_here() -> None:
    assert set(MENUS) == set(COMPRESSORS)


@pytest.mark.parametrize(
    "promise", [promise for name, menus in MENUS.items() for promise in compressor_promises(name, menus)], ids=str
)
def test_a_compressor_keeps_its_promises(promise: Promise) -> None:
    promise()


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown method 'gtpq' \\(did you mean 'gptq'\\?\\)"):
        find_compressor("gtpq")
