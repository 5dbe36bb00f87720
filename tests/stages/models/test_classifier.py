"""Networks of the user's own: taken apart, run in parts, and refused where the parts are not the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import UnsupportedModel
from layerwise.stages.models.classifier import Classifier, put_weights, weights_of
from layerwise.stages.models.inputs import observed
from layerwise.stages.models.network import BEGIN, select_units
from layerwise.testing.networks import small_cnn, small_vit

IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [small_cnn, small_vit])
def test_run_in_parts_it_gives_what_the_network_gives(make: Any) -> None:
    network = Classifier(make(), IMAGES[:2])
    stream = network.begin(IMAGES)
    hidden = stream.hidden
    for block in range(network.n_blocks):
        hidden = network.run_block(block, hidden, stream)
    torch.testing.assert_close(network.end(hidden, stream), make()(IMAGES), rtol=1e-5, atol=1e-6)


def test_the_stages_of_a_cnn_are_its_blocks_and_every_convolution_and_linear_layer_a_unit() -> None:
    network = Classifier(small_cnn(), IMAGES[:2])
    assert network.block_names == ("stages.0", "stages.1", "stages.2")
    found = {unit.name: (unit.role, unit.shape, unit.groups, unit.positions) for unit in network.units}
    assert found == {
        "stem": ("conv", (16, 9), 1, (BEGIN,)),
        "stages.0.spatial": ("conv", (16, 9), 16, (0,)),
        "stages.0.mixing": ("conv", (16, 16), 1, (0,)),
        "stages.1.spatial": ("conv", (16, 36), 4, (1,)),
        "stages.1.mixing": ("conv", (32, 16), 1, (1,)),
        "stages.1.shortcut": ("conv", (32, 16), 1, (1,)),
        "stages.2.spatial": ("conv", (32, 36), 8, (2,)),
        "stages.2.mixing": ("conv", (32, 32), 1, (2,)),
        "head": ("head", (10, 32), 1, (3,)),
    }
    assert not network.uncovered
    # A block that changes the shape of what it passes on cannot be left out.
    assert [parent.name for parent in network.parents] == ["stages.0", "stages.2"]
    assert {unit.name for unit in select_units(network.units, ["head"], [])} == {"head"}


def test_flops_are_those_of_every_place_of_an_image() -> None:
    network = Classifier(small_cnn(), IMAGES[:2])
    # By hand: 8 x 8 places before the stride of stage 1, 4 x 4 behind it.
    places = {unit.name: 64 if unit.name.startswith(("stem", "stages.0")) else 16 for unit in network.units}
    assert {unit.name: unit.share for unit in network.units} == places | {"head": 1.0}


def test_half_blocks_of_a_vision_transformer_can_be_left_out() -> None:
    network = Classifier(small_vit(), IMAGES[:2])
    assert network.block_names == ("blocks.0", "blocks.1")
    halves = {parent.name: parent.role for parent in network.parents}
    assert halves == {
        "blocks.0": "block", "blocks.0.attention": "attention", "blocks.0.mlp": "mlp",
        "blocks.1": "block", "blocks.1.attention": "attention", "blocks.1.mlp": "mlp",
    }  # fmt: skip
    network.leave_out(["blocks.0.mlp"])
    own = small_vit()
    own.blocks[0].mlp.forward = torch.zeros_like  # type: ignore[index,union-attr]
    torch.testing.assert_close(network.logits(IMAGES), own(IMAGES))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(4, 8, 3, groups=4, stride=2),
        nn.Conv2d(4, 4, 4, padding="same", groups=2),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, 1, bias=False),
    ],
    ids=["plain", "ragged", "grouped", "same", "reflected", "1x1"],
)
def test_a_convolution_is_its_weight_times_the_rows_that_are_observed(conv: nn.Conv2d) -> None:
    images = torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(2))
    network = Classifier(
        nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(conv.out_channels, 3)), images[:2]
    )
    (unit,) = [unit for unit in network.units if unit.role == "conv"]
    rows: list[Tensor] = []
    with observed(network, [unit], lambda _, X, whole: rows.append(X)):
        network.logits(images)
    groups = zip(rows[0].tensor_split(unit.groups, 1), network.weight(unit).chunk(unit.groups), strict=True)
    found = torch.cat([X @ W.T for X, W in groups], 1)
    # The oracle is torch's own convolution; 36 products are summed in another order.
    expected = conv(images) - (0 if conv.bias is None else conv.bias[:, None, None])
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1).reshape(len(found), -1), rtol=1e-5, atol=1e-5)


class Chained(nn.Module):
    """Blocks one after another, and a linear layer; how they are used is each test's affair."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class Skipping(Chained):
    """What comes after the blocks looks at what went into them, by way of the first one's answer."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        return self.head(self.blocks[2](self.blocks[1](first)) + first)


class Throwing(Chained):
    """Another answer each time."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.nn.functional.dropout(x, 0.5, training=True)))


class LookingBack(Chained):
    """What comes after the blocks looks at the input again."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x) + x)


@pytest.mark.parametrize("network", [Skipping, Throwing, LookingBack])
def test_a_network_whose_parts_are_not_the_network_is_refused_with_the_difference(network: Any) -> None:
    with pytest.raises(UnsupportedModel, match=r"other logits than the model \(they differ by up to \d") as refused:
        Classifier(network(), torch.randn(2, 8, generator=torch.Generator().manual_seed(0)))
    assert "pass on one tensor" in refused.value.hint


class Residual(Chained):
    """No block gets the very tensor that the one before it gave: there is no chain."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_a_network_without_a_chain_is_one_block() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    network = Classifier(Residual(), x[:2])
    assert network.block_names == ("",)
    assert not network.parents
    assert [unit.name for unit in network.units] == ["blocks.0", "blocks.1", "blocks.2", "head"]
    stream = network.begin(x)
    torch.testing.assert_close(network.run_block(0, stream.hidden, stream), Residual()(x))


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (nn.Sequential(nn.Linear(8, 3), nn.Unflatten(1, (3, 1))), r"gives \(2, 3, 1\) for a batch"),
        (nn.Linear(9, 3), r"does not run on a batch of shape \(2, 8\)"),
    ],
)
def test_what_gives_no_logits_is_refused(network: nn.Module, found: str) -> None:
    with pytest.raises(UnsupportedModel, match=found):
        Classifier(network, torch.randn(2, 8))


def test_weights_that_are_shared_are_stored_once_and_put_back_everywhere() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.other.weight = self.one.weight

    first, second = Tied(), Tied()
    stored = weights_of(first)
    assert "other.weight" not in stored
    assert {"one.weight", "norm.running_mean", "norm.num_batches_tracked"} <= set(stored)
    put_weights(second, stored, Path("weights"))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    with pytest.raises(UnsupportedModel, match="another network than it gave at first"):
        put_weights(nn.Linear(4, 4), stored, Path("weights"))
