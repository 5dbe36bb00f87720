"""What every statistic promises; see `layerwise.stages.calibrate.Statistic`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING

from layerwise.stages.calibrate import Statistic, find_statistic
from layerwise.stages.models.network import Unit
from layerwise.testing.encodings import same_bits
from layerwise.testing.promises import Promise, answer_of_fresh_interpreter, demand, keep_all

if TYPE_CHECKING:
    from torch import Tensor

ROWS, OUT, IN = 60, 6, 20
"""Tokens, and the shape of the unit that the statistics are of."""

SPLITS = ((0, 0, 7, 31, ROWS), (0, 1, 2, ROWS - 1, ROWS, ROWS), (0, 30, ROWS))
"""Where batches end; some are empty, as those of an expert that no token of a batch is sent to."""


def check_statistic(name: str) -> None:
    """Check every promise of a statistic.

    Args:
        name: of the statistic.
    Raises:
        AssertionError: a promise is broken; says which.
    """
    keep_all(statistic_promises(name))


def statistic_promises(name: str) -> list[Promise]:
    """The promises of `check_statistic`, one by one."""
    statistic = find_statistic(name)
    kept = {"its name means the same in another process, which need not load torch": partial(_by_name, name, statistic)}
    if statistic.of == "hidden":
        kept["hidden states are counted where they are kept"] = partial(_no_size, statistic)
    else:
        kept |= {
            "what is measured is float32, of values in any dtype": partial(_float32, statistic),
            "measuring and merging change nothing": partial(_unchanged, statistic),
            "merged batches in any order are the same to rounding": partial(_any_order, statistic),
            "what stands for a unit without inputs has the same shape": partial(_neutral, statistic),
            "its size is that of what is measured": partial(_size, statistic),
        }
    if statistic.of == "inputs":
        kept["merged batches are the same as the whole"] = partial(_batches, statistic)
    return [Promise(f"statistic {name}", text, check) for text, check in kept.items()]


def random_inputs(seed: int = 0, rows: int = ROWS, columns: int = IN) -> Tensor:
    """Correlated inputs of a unit, (rows, columns), no two columns of one size, none of mean zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn((columns, columns), generator=generator)
    return torch.randn((rows, columns), generator=generator) @ mix + torch.linspace(-1, 2, columns)


def example_unit(out: int = OUT, columns: int = IN) -> Unit:
    """A linear layer."""
    return Unit("layers.0.up_proj", "up_proj", "linear", 0, (out, columns), (0,))


def measured(statistic: Statistic, inputs: Tensor, gradients: Sequence[Tensor] = ()) -> Tensor:
    """A statistic of a unit, given its inputs (rows, in) and the gradients of its weight, each (out, in)."""
    if statistic.of == "inputs":
        return statistic.measure(inputs)
    return reduce(statistic.merge, map(statistic.measure, gradients))


def random_gradients(seed: int = 0, out: int = OUT, columns: int = IN, n: int = 4) -> list[Tensor]:
    """Gradients of a unit's weight, each of one sequence."""
    return list(random_inputs(seed + 1, n * out, columns).split(out))


def _parts(statistic: Statistic) -> list[Tensor]:
    """What is measured of some batches."""
    batches = random_gradients() if statistic.of == "gradients" else random_inputs().split((7, 24, 19, 10))
    return [statistic.measure(batch) for batch in batches]


def _float32(statistic: Statistic) -> None:
    import torch

    values = random_inputs(rows=OUT).bfloat16()
    found, expected = statistic.measure(values), statistic.measure(values.float())
    demand(found.dtype == torch.float32, f"of bfloat16 values it is {found.dtype}")
    demand(same_bits(found, expected), "bfloat16 values and the same in float32 give different ones")
    demand(same_bits(found, statistic.measure(values)), "measured twice, it is not the same")
    demand(same_bits(found, statistic.measure(values.T.contiguous().T)), "another layout of memory gives another one")


def _unchanged(statistic: Statistic) -> None:
    values = random_inputs(rows=OUT)
    first, second = statistic.measure(values), statistic.measure(values + 1)
    demand(same_bits(values, random_inputs(rows=OUT)), "measuring changes what is measured")
    before = first.clone(), second.clone()
    statistic.merge(first, second)
    demand(same_bits(first, before[0]) and same_bits(second, before[1]), "merging changes what is merged")


def _batches(statistic: Statistic) -> None:
    whole = random_inputs()
    expected = statistic.measure(whole)
    for ends in SPLITS:
        batches = [whole[start:end] for start, end in itertools.pairwise(ends)]
        _demand_close(statistic, reduce(statistic.merge, map(statistic.measure, batches)), expected, f"split at {ends}")


def _any_order(statistic: Statistic) -> None:
    parts = _parts(statistic)
    expected = reduce(statistic.merge, parts)
    for order in itertools.permutations(range(len(parts))):
        found = reduce(statistic.merge, [parts[number] for number in order])
        _demand_close(statistic, found, expected, f"in the order {order}")
    halves = [reduce(statistic.merge, parts[:2]), reduce(statistic.merge, parts[2:])]
    _demand_close(statistic, statistic.merge(*halves), expected, "two and two together")


def _demand_close(statistic: Statistic, found: Tensor, expected: Tensor, when: str) -> None:
    """The same up to the rounding of float32 sums: of n terms, n units in the last place of the greatest sum there is
    without cancellation."""
    import torch

    demand(found.shape == expected.shape, f"{when} the shape is {tuple(found.shape)}, not {tuple(expected.shape)}")
    terms = statistic.measure(random_inputs().abs()) if statistic.of == "inputs" else expected
    bound = ROWS * torch.finfo(torch.float32).eps * max(expected.abs().max().item(), terms.abs().max().item())
    off = (found - expected).abs().max().item()
    demand(off <= bound, f"{when} it is off by {off:.3g}, where rounding explains {bound:.3g}")


def _neutral(statistic: Statistic) -> None:
    import torch

    unit, expected = example_unit(), _parts(statistic)[0]
    for n_tokens in (0, 1, ROWS):
        neutral = statistic.neutral(unit, n_tokens)
        demand(neutral.shape == expected.shape, f"it is {tuple(neutral.shape)}, not {tuple(expected.shape)}")
        demand(neutral.dtype == torch.float32, f"it is {neutral.dtype}")
        demand(neutral.isfinite().all(), "it is not finite")


def _size(statistic: Statistic) -> None:
    tensor = _parts(statistic)[0]
    said, found = statistic.size_bytes(example_unit()), tensor.numel() * tensor.element_size()
    demand(said == found, f"it is said to take {said} bytes, and takes {found}")


def _no_size(statistic: Statistic) -> None:
    demand(statistic.size_bytes(example_unit()) == 0, "a unit's share of them is not 0 bytes")


def _by_name(name: str, statistic: Statistic) -> None:
    found = answer_of_fresh_interpreter(
        "import sys\nfrom layerwise.stages.calibrate import find_statistic\n"
        f"print(find_statistic({name!r}).of, 'torch' in sys.modules)"
    )
    demand(found == f"{statistic.of} False", f"there it is of {found.replace(' ', ', with torch loaded: ')}")
