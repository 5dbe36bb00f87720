"""Labels without a weight; what a weight says of itself is tested with its format."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from layerwise.kernels import labels
from layerwise.kernels.quantized import Quantized


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("ordered", [True, False])
def test_a_recipe_and_the_weight_packed_by_it_have_one_label(group_size: int, sym: bool, ordered: bool) -> None:
    groups = 1 if group_size == -1 else 2
    zero = None if sym else torch.zeros(4, groups, dtype=torch.uint8)
    packed = Quantized.pack(
        torch.zeros(4, 64, dtype=torch.uint8),
        torch.ones(4, groups).half(),
        zero,
        bits=4,
        group_size=group_size,
        order=torch.arange(64) if ordered else None,
    )
    assert packed.label == labels.quantized(4, group_size, sym, ordered)


def test_a_share_is_rounded_to_whole_percent() -> None:
    assert [labels.percent(part, 1000) for part in (0, 4, 6, 995, 1000)] == [0, 0, 1, 100, 100]
    assert labels.percent(0, 0) == 0


def test_labels_load_no_torch() -> None:
    program = "import sys; from layerwise.kernels import labels; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
