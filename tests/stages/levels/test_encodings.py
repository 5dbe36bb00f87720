"""Every encoding of the table keeps what `layerwise.testing` says that encodings promise."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from layerwise.kernels.trellis_code import Tiles
from layerwise.stages.compress.pruning import keep_pattern
from layerwise.stages.levels.adapted import with_adapter
from layerwise.stages.levels.block_grid import block_grid_level
from layerwise.stages.levels.dense import dense_level
from layerwise.stages.levels.grid import grid_level
from layerwise.stages.levels.level import ENCODINGS, Level
from layerwise.stages.levels.low_rank import low_rank_level
from layerwise.stages.levels.mask import mask_level
from layerwise.stages.levels.masked_grid import masked_grid_level
from layerwise.stages.levels.parent import parent_level
from layerwise.stages.levels.scales import WHOLE, Scales, quantized_scales
from layerwise.stages.levels.sliced import sliced_level
from layerwise.stages.levels.trellis import trellis_level
from layerwise.testing import Promise, encoding_promises

ROWS, COLUMNS = 5, 21  # odd, so that words and bytes are padded


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((ROWS, COLUMNS), generator=torch.Generator().manual_seed(0)).to(dtype)


def grids() -> Iterator[tuple[str, dict[str, object], Tensor, dict[str, Tensor | Scales | None]]]:
    """Every width and group size, symmetric or not, in order or not, and every way to store scales with some."""
    generator = torch.Generator().manual_seed(1)
    plain = [(-1, True, True), (8, False, True), (7, True, False), (7, False, False)]
    cases = [(bits, *case, "inputs", WHOLE, -1, False) for bits in range(2, 9) for case in plain]
    stored = [(WHOLE, -1), (4, -1), (6, 2), (8, 2)]
    cases += [
        (bits, size, sym, True, along, *scales, scaled)
        for bits, size, sym, along, scales, scaled in itertools.product(
            (2, 3, 8), (-1, 2), (True, False), ("inputs", "outputs"), stored, (True, False)
        )
    ]
    for bits, size, sym, ordered, along, scale_bits, above, scaled in cases:
        lines, length = (ROWS, COLUMNS) if along == "inputs" else (COLUMNS, ROWS)
        groups = 1 if size == -1 else -(-length // size)
        codes = torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=generator)
        scale: Tensor | Scales = (torch.rand((lines, groups), generator=generator) + 0.5).half().float()
        if scale_bits != WHOLE:
            negative = bits == 3 and sym
            scale = quantized_scales(-scale if negative else scale, scale_bits, above, signed=negative)
        zero = torch.randint(0, 2**bits, (lines, groups), generator=generator).float()
        order = torch.randperm(COLUMNS, generator=generator)
        group = None if ordered else (torch.arange(COLUMNS) // size)[order]
        input_scale = torch.rand(COLUMNS, generator=generator) + 0.5 if scaled else None
        recipe = {"method": "made up", "bits": bits, "group_size": size, "sym": sym, "desc_act": not ordered}
        recipe |= {"group_along": along}
        name = f"{bits}b-{size}-{sym}-{ordered}-{along}-{scale_bits}-{above}-{scaled}"
        yield name, recipe, codes, {"scale": scale, "zero": zero, "group": group, "input_scale": input_scale}


def in_blocks() -> Iterator[Level]:
    """Ragged blocks and groups that fit into each other or not, of everything, some and nothing."""
    generator = torch.Generator().manual_seed(4)
    for bits, size, sym, block, share in [
        (2, 4, True, [1, 4], 0.5),
        (3, -1, False, [2, 8], 0.3),
        (5, 7, False, [2, 4], 0.5),
        (8, 4, True, [16, 128], 1.0),
        (4, 32, False, [16, 128], 0.0),
    ]:
        lines = -(-ROWS // block[0]), -(-COLUMNS // block[1])
        kept = torch.rand(lines, generator=generator) < share
        keep = kept.repeat_interleave(block[0], 0)[:ROWS].repeat_interleave(block[1], 1)[:, :COLUMNS]
        groups = 1 if size == -1 else -(-COLUMNS // size)
        recipe = {"method": "made up", "bits": bits, "group_size": size, "sym": sym, "block": block, "sparsity": 0.5}
        codes = torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=generator)
        zero = torch.randint(0, 2**bits, (ROWS, groups), generator=generator)
        scale = torch.rand((ROWS, groups), generator=generator) + 0.5
        yield block_grid_level(f"{bits}b-{share}", recipe, codes, keep=keep, scale=scale, zero=zero)


def trellises(keep: Tensor) -> Iterator[Level]:
    """Whole bits and others, tiles of one column and ragged ones, a scale or many, turned or pruned."""
    generator = torch.Generator().manual_seed(2)
    for bits, width, scales, seed in [(1, 16, 1, 0), (2.5, 1, ROWS, 3), (3.125, 4, 1, None), (4, 256, ROWS, None)]:
        tiles = Tiles(ROWS, COLUMNS, width, bits, 12)
        size = sum(band.sequences * band.size_bytes for band in tiles.bands())
        stream = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
        recipe = {"method": "made up", "bits": bits, "state_bits": 12, "columns": width, "seed": seed}
        scale = torch.rand(scales, generator=generator)
        mask = keep if seed is None else None
        yield trellis_level(f"{bits}b-c{width}", recipe, (ROWS, COLUMNS), stream, scale=scale, keep=mask)


def products(grid: Level) -> Iterator[Level]:
    """Of factors as they are, in every dtype, and of one on a grid."""
    generator = torch.Generator().manual_seed(4)
    for rank, dtype in ((1, torch.float16), (4, torch.bfloat16), (2, torch.float32)):
        A, B = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rank, COLUMNS), (ROWS, rank)))
        yield low_rank_level(f"r{rank}", {"method": "made up"}, dense_level(A), dense_level(B))
    B = torch.randn((ROWS, ROWS), generator=generator).half()
    yield low_rank_level("on a grid", {"method": "made up"}, grid, dense_level(B))


def adapters(below: list[Level]) -> Iterator[Level]:
    """Beside a level of every other encoding, and on top of one another."""
    generator = torch.Generator().manual_seed(3)
    for level in below:
        for rank, dtype in ((1, torch.float16), (4, torch.bfloat16), (2, torch.float32)):
            A, B = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rank, COLUMNS), (ROWS, rank)))
            once = with_adapter(level, A, B, method="made up")
            yield from (once, with_adapter(once, A, B, method="made up"))


def slices(below: list[Level]) -> Iterator[Level]:
    """Of rows and of columns, in one run and in two, over a level of every other encoding of the part that is left."""
    for level in below:
        rows = sliced_level("r", "made up", level, (9, COLUMNS), groups=9, kept=[0, 3, 4, 7, 8], rows=((0, 1),))
        runs = {"groups": 3, "kept": [1], "rows": ((0, 2), (6, 3))}  # two rows of each group, then three
        columns = sliced_level("c", "made up", level, (ROWS, 63), groups=9, kept=[0, 4, 8], columns=((0, 7),))
        yield from (rows, columns, sliced_level("two", "made up", level, (15, COLUMNS), **runs))  # type: ignore[arg-type]


def levels() -> dict[str, list[Level]]:
    keep = weight() > 0.3
    found: dict[str, list[Level]] = {name: [] for name in ENCODINGS}
    for name, recipe, codes, parts in grids():
        found["grid"].append(grid_level(name, dict(recipe), codes, **parts))  # type: ignore[arg-type]
        found["masked_grid"].append(masked_grid_level(name, dict(recipe), codes, keep=keep, **parts))  # type: ignore[arg-type]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found["dense"].append(dense_level(weight(dtype)))
        for mask in (keep, weight() > 1.5, torch.zeros_like(keep), torch.ones_like(keep)):
            share = 1 - mask.float().mean().item()
            found["mask"].append(
                mask_level(f"{dtype}-{share:.2f}", {"method": "made up", "sparsity": share}, weight(dtype), mask)
            )
        pattern = {"method": "made up", "sparsity": 0.5, "pattern": "2:4"}
        found["mask"].append(mask_level(f"{dtype}-2:4", pattern, weight(dtype), keep_pattern(weight().abs(), (2, 4))))
    found["block_grid"] = list(in_blocks())
    found["trellis"] = list(trellises(keep))
    found["low_rank"] = list(products(found["grid"][0]))
    found["adapted"] = list(adapters([some[0] for name, some in found.items() if some]))
    found["sliced"] = list(slices([some[0] for name, some in found.items() if some]))
    return found | {name: [parent_level(name)] for name in ("keep", "drop", "narrow")}


def test_every_encoding_of_the_table_is_tried_here() -> None:
    assert all(levels().values())


@pytest.mark.parametrize(
    "promise", [promise for name, some in levels().items() for promise in encoding_promises(name, some)], ids=str
)
def test_an_encoding_keeps_its_promises(promise: Promise) -> None:
    promise()


def test_a_grid_means_code_less_zero_times_scale_times_input_scale_and_pays_for_each_stored_bit() -> None:
    for name, recipe, codes, parts in grids():
        level = grid_level(name, dict(recipe), codes, **parts)  # type: ignore[arg-type]
        masked = masked_grid_level(name, dict(recipe), codes, keep=weight() > 0.3, **parts)  # type: ignore[arg-type]
        scale, zero, group, inputs = (parts[key] for key in ("scale", "zero", "group", "input_scale"))
        bits, lines = int(recipe["bits"]), codes.T if recipe["group_along"] == "outputs" else codes  # type: ignore[call-overload]
        length, size = lines.shape[1], int(recipe["group_size"])  # type: ignore[call-overload]
        overhead = 0
        if isinstance(scale, Scales):
            overhead += scale.codes.numel() * scale.bits + 16 * scale.above.numel()
            above = [scale.above[:, 0 if scale.size == -1 else g // scale.size] for g in range(scale.codes.shape[1])]
            top = 2 ** (scale.bits - scale.signed)
            sizes = scale.codes.double() % top + 1
            exact = torch.stack(above, 1).double() * sizes / top * torch.where(scale.codes < top, 1, -1)
            values = torch.from_numpy(exact.numpy().astype(np.float16)).double()
        else:
            assert scale is not None
            values, overhead = scale.double(), 16 * scale.numel()
        assert zero is not None
        overhead += 0 if recipe["sym"] else bits * values.numel()
        overhead += (0 if group is None else 32 * COLUMNS) + (0 if inputs is None else 16 * COLUMNS)
        place = torch.arange(length) // (length if size == -1 else size) if group is None else group
        assert isinstance(place, Tensor)
        zeros = torch.full_like(values, 2 ** (bits - 1)) if recipe["sym"] else zero.double()  # type: ignore[union-attr]
        expected = (lines.double() - zeros[:, place]) * values[:, place]
        expected = expected.T if recipe["group_along"] == "outputs" else expected
        if isinstance(inputs, Tensor):
            expected = (expected.float() * inputs.half().float()).double()
        assert torch.equal(level.decode().double(), expected), name
        assert torch.equal(masked.decode().double(), expected * (weight() > 0.3)), name
        assert level.stored_bits == bits * codes.numel() + overhead, name
