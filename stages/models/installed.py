"""Other weights in a network, for a while: what evaluates levels, and what runs a block with some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from layerwise.stages.models.in_blocks import InBlocks
    from layerwise.stages.models.network import Unit


def laid_out(network: InBlocks, unit: Unit, weight: Tensor) -> Tensor:
    """A weight (out, in) as the network keeps this unit's: contiguous, in its layout, dtype and device."""
    assert unit.view is not None
    parameter = network.parameter(unit.view.tensor).data
    part = unit.view.part(parameter)
    return unit.view.stored_form(weight, part.shape).to(parameter).contiguous()


def as_parameters(network: InBlocks, units: Mapping[str, Unit], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as parameters for `torch.func.functional_call`; gradients reach them.

    Args:
        network: whose parameters they take the place of; nothing of it is changed.
        units: by name.
        tensors: by unit, its weight (out, in), or by the full name of any other parameter.
    Returns:
        by the full name of a parameter, in its layout, dtype and device.
    """
    parameters: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        unit = units.get(name)
        if unit is None or unit.view is None:
            parameters[name] = tensor
            continue
        view, whole = unit.view, network.parameter(unit.view.tensor).data
        stored = view.stored_form(tensor, view.part(whole).shape).to(whole)
        if view.whole:
            parameters[view.tensor] = stored
        else:  # one of several in a parameter
            view.part(parameters.setdefault(view.tensor, whole.clone())).copy_(stored)
    return parameters


@contextmanager
def installed(network: InBlocks, weights: Mapping[Unit, Tensor]) -> Iterator[None]:
    """Let units have other weights while parts of the network run.

    A weight that has a parameter to itself is put in its place without a copy. One of several in a parameter (an
    expert) is written into a copy of it, so the parameter itself is never changed.

    Args:
        network: the network.
        weights: by unit, from `laid_out`.
    """
    before: dict[str, Tensor] = {}
    try:
        for unit, weight in weights.items():
            view = unit.view
            assert view is not None
            parameter = network.parameter(view.tensor)
            if view.tensor not in before:
                before[view.tensor] = parameter.data
                if not view.whole:
                    parameter.data = parameter.data.clone()
            if view.whole:
                parameter.data = weight
            else:
                view.part(parameter.data).copy_(weight)
        yield
    finally:
        for name, tensor in before.items():
            network.parameter(name).data = tensor
