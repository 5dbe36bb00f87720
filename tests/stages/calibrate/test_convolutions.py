"""Hessians of convolutions, against X Xᵀ of patches that were cut out by hand, in float64."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from layerwise.stages.calibrate import find_statistic
from layerwise.stages.calibrate.collect import collect, group_names, statistic_file
from layerwise.stages.calibrate.collect import merge as merged
from layerwise.stages.models.classifier import Classifier
from layerwise.testing.networks import small_cnn

IMAGES = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def patches_by_hand(conv: nn.Conv2d, images: Tensor) -> list[Tensor]:
    """By group, every patch as a row, (rows, channels · kernel): cut out in a plain loop."""
    (size, _), (step, _), (margin, _) = conv.kernel_size, conv.stride, conv.padding  # type: ignore[misc]
    padded = nn.functional.pad(images, [int(margin)] * 4).double()
    rows: list[list[Tensor]] = [[] for _ in range(conv.groups)]
    for image in padded:
        for top in range(0, image.shape[1] - size + 1, step):
            for left in range(0, image.shape[2] - size + 1, step):
                patch = image[:, top : top + size, left : left + size]
                for group, part in enumerate(patch.chunk(conv.groups)):
                    rows[group].append(part.flatten())
    return [torch.stack(part) for part in rows]


def test_hessians_of_a_cnn_are_those_of_its_patches_group_by_group_whatever_the_shards(tmp_path: Path) -> None:
    network = Classifier(small_cnn(), IMAGES[:2])
    units = [unit for unit in network.units if unit.role == "conv"]
    inputs: dict[str, Tensor] = {}
    for unit in units:
        network.module(unit.name).register_forward_pre_hook(
            lambda module, args, name=unit.name: inputs.__setitem__(name, args[0])
        )
    network.logits(IMAGES)
    expected = {unit.name: patches_by_hand(network.module(unit.name), inputs[unit.name]) for unit in units}  # type: ignore[arg-type]

    gathered = [
        collect(network, units, part, tmp_path, statistics=["hessian", "channels"], shard=shard, batch_size=4)
        for shard, part in enumerate(IMAGES.split(7))
    ]
    owners = gathered[0].owners
    # A strided convolution and its shortcut read the same tensor, but not the same rows of it.
    assert owners["stages.1.shortcut"] == "stages.1.shortcut"
    for unit in units:
        rows = expected[unit.name]
        assert sum(part.counts[unit.name] for part in gathered) == len(rows[0])
        for statistic in ("hessian", "channels"):
            target = statistic_file(tmp_path / "merged", statistic, unit.positions[-1])
            parts = [statistic_file(tmp_path, statistic, unit.positions[-1], shard) for shard in range(2)]
            merged(parts, target, find_statistic(statistic).merge)
            from safetensors.torch import load_file

            found = load_file(target)
            for name, X in zip(group_names(owners[unit.name], unit.groups), rows, strict=True):
                # float32 sums over up to 768 rows
                wanted = X.T @ X if statistic == "hessian" else X.square().sum(0)
                got = found[name] if statistic == "hessian" else found[name][0]
                torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
