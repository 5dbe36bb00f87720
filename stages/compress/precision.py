"""In which precision a method's linear algebra is done, by device.

In float64 neither the order in which a machine adds up nor the blocking turns one code into another. A processor takes
twice the time for it, a GPU for data centres as long as for float32 or twice, any other GPU 32 to 64 times: there it is
float32. Recipes of levels say when it was not float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FAST_FLOAT64 = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})
"""Compute capabilities with at least half as many units for float64 as for float32: P100, V100, A100, H100, B200.

Source: NVIDIA, CUDA C++ Programming Guide, table of throughput of native arithmetic instructions.
"""


def working_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where that is much faster."""
    import torch

    if device.type != "cuda" or not torch.cuda.is_available():
        return torch.float64
    return torch.float64 if torch.cuda.get_device_capability(device) in FAST_FLOAT64 else torch.float32


def precision_recipe(dtype: torch.dtype) -> dict[str, Any]:
    """What a level's recipe says of it: nothing where it was float64."""
    import torch

    return {} if dtype == torch.float64 else {"computed_in": str(dtype).removeprefix("torch.")}
