"""`transform`: changes of a model after which it computes the same and its weights compress better.

Each transform is one file and one line in `TRANSFORMS`: a function `fn(network, params) -> names` that changes a
network for good and gives the parameters that it changed, and the class `Params` of the same file, a `TransformEntry`.
It refuses, with the reason, a network that it cannot change so; what it did is checked on logits by the stage. Other
packages join through the entry point group `layerwise.transforms`, with the same `module:function` text.

Neither this module nor the methods import torch before they work, because a workflow is checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from layerwise.stages.contract import Params
from layerwise.stages.registry import lookup, names, params_beside

if TYPE_CHECKING:
    from layerwise.stages.models.causal_lm import CausalLM

TRANSFORMS = {"rotation": "layerwise.stages.transform.rotation:rotation"}

TRANSFORM_GROUP = "layerwise.transforms"


class TransformEntry(Params):
    """Base of every transform's parameters.

    `method` chooses the transform; a subclass narrows it to its own name.
    """

    method: str

    impl: ClassVar[int] = 1
    """Raised by hand whenever the same inputs would give other weights; part of the stage's key."""

    @property
    def name(self) -> str:
        """What the transform goes by in results: its method, and what else tells it from others of that method."""
        return self.method


@dataclass(frozen=True)
class Transform:
    """A method and the model of its parameters.

    Args:
        params: checks an entry of the workflow.
        run: changes a network; see the module.
    """

    params: type[TransformEntry]
    run: Callable[[CausalLM, Any], Collection[str]]


def transform_names() -> list[str]:
    """Every method that a workflow may name."""
    return names(TRANSFORMS, TRANSFORM_GROUP)


def find_transform(name: str) -> Transform:
    """The transform behind `method: name`.

    Raises:
        UsageError: nobody offers it; names the nearest known one.
    """
    run = lookup(name, TRANSFORMS, group=TRANSFORM_GROUP, kind="method")
    return Transform(params_beside(run, TransformEntry, name), run)
