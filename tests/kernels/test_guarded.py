"""The guarded buffers find what they are there for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from layerwise.kernels.dense import Dense


@pytest.mark.parametrize("place", [-1, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int16, torch.uint8])
def test_a_write_just_outside_a_buffer_is_found(guard: Any, place: int, dtype: torch.dtype) -> None:
    buffer = guard.around(torch.zeros(2, 3, dtype=dtype))
    guard.check()
    outside = torch.as_strided(buffer, (1,), (1,), buffer.storage_offset() + place)
    was = outside.clone()
    outside.fill_(1)
    with pytest.raises(AssertionError, match="before" if place < 0 else "after"):
        guard.check()
    outside.copy_(was)


def test_what_is_allocated_inside_is_poisoned_and_watched(guard: Any) -> None:
    with guard:
        made = [torch.empty(5), torch.zeros(3).new_empty(4), torch.empty_like(torch.zeros(2).half())]
        zeros = torch.zeros(4, dtype=torch.int32)
    assert all(tensor.isnan().all() for tensor in made)
    assert zeros.tolist() == [0, 0, 0, 0]
    assert len(guard._buffers) == 6  # new_empty and empty_like were made from two more


def test_every_tensor_of_a_packed_weight_is_watched(guard: Any) -> None:
    packed = guard.around(Dense((2, 2), torch.eye(2)))
    assert torch.equal(packed.dense(), torch.eye(2))
    assert packed.weight.data_ptr() % 16 == 0
    assert packed.weight.storage_offset() > 0
