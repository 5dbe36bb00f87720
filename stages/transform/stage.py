"""`transform`: a model that computes the same and whose weights compress better, as a `model` artifact with its `base`.

The whole model is loaded in float32, changed there (in float64, part by part), and compared with what it was: its
logits on random tokens may differ by no more than float32 makes of another order of the same sums. Then it is written
in the checkpoint's own dtype, names and files, and the folder is loaded again as anybody would, to see that it holds
what was meant.

A compressed model is decoded on its way in, so what comes out is dense; parts that it has dropped stay dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from layerwise.errors import NotFinite, UnsupportedModel
from layerwise.stages.contract import Context, ModelSource, Params, Port, Stage
from layerwise.stages.transform import find_transform, transform_names

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.models.causal_lm import CausalLM
    from layerwise.stages.models.compressed import CompressedModel, CompressedUnit

ENTRY_TYPES = tuple(find_transform(name).params for name in transform_names())
AnyEntry: Any = reduce(lambda one, other: one | other, ENTRY_TYPES)  # type: ignore[arg-type,return-value]
if len(ENTRY_TYPES) > 1:
    AnyEntry = Annotated[AnyEntry, Field(discriminator="method")]

CHECKED = (4, 2, 32)
"""Batches, sequences of a batch and tokens of a sequence that logits are compared on."""


class TransformParams(Params):
    """The transforms, and how exactly the model must stay the same."""

    transforms: list[AnyEntry] = Field(
        min_length=1, description="one after another; each with its `method` and its parameters"
    )
    tolerance: float = Field(
        1e-4,
        gt=0,
        description="by how much a logit may differ from the untransformed model's, both computed in float32: a share "
        "of the greatest logit if that is above 1",
    )

    @property
    def name(self) -> str:
        """What the model goes by in results."""
        return "+".join(entry.name for entry in self.transforms)

    def material(self) -> dict[str, Any]:
        """With the implementation number of each method."""
        entries = [entry.material() | {"impl": entry.impl} for entry in self.transforms]
        return self.model_dump(mode="json", exclude={"transforms"}) | {"transforms": entries}

    def sources(self) -> Iterable[str]:
        """The modules of its methods."""
        return dict.fromkeys(find_transform(entry.method).run.__module__ for entry in self.transforms)


def transform(context: Context, params: TransformParams) -> None:
    """Write a `model` artifact with a `base` (`layerwise.stages.models.compressed`).

    Raises:
        UnsupportedModel: a transform cannot be made of this model, or it changes what the model computes.
        NotFinite: the model gives NaN or Inf.
    """
    from layerwise.stages.models.compressed import model_of

    work = partial(_transform, source=model_of(context, "model"), out=context.out)
    (measured,) = context.executor.map(work, [params], note="models")
    common = {"candidate": params.name, "n_tokens": measured["n_tokens"], "status": "ok"}
    differences: dict[str, float] = measured["differences"]
    context.record("metrics", [{**common, "metric": metric, "value": value} for metric, value in differences.items()])


def _transform(params: TransformParams, *, source: ModelSource, out: Path) -> dict[str, Any]:
    """Transform, check and write; gives the greatest differences of a logit."""
    from layerwise.stages.models.causal_lm import CausalLM
    from layerwise.stages.models.checkpoint import Checkpoint
    from layerwise.stages.models.compressed import BASE, CompressedModel, Document, source_of
    from layerwise.stages.transform.folder import Layout

    network = CausalLM.load(replace(source, dtype="float32", compressed=None))
    layout = Layout.of(network, Checkpoint(source.path, source.trust))
    before = None if source.compressed is None else CompressedModel(source.compressed)
    if before is not None:
        before.install(network)
    tokens, tied = _tokens(network), network.tied
    expected = _logits(network, tokens)
    changed: dict[str, None] = {}
    for entry in params.transforms:
        changed |= dict.fromkeys(find_transform(entry.method).run(network, entry))
    added = layout.added(network, changed)
    exact = _difference(expected, _logits(network, tokens))
    _check(exact, expected, params, "changes what the model computes")

    (out / BASE).mkdir(exist_ok=True)
    layout.save(network, added, out / BASE)
    dropped = () if before is None else _keep_dropped(before, out)
    about = {
        "transform": params.name,
        "transforms": [entry.model_dump(mode="json") for entry in params.transforms],
        "untied": tied and not network.tied,
    }
    Document(dropped, about if before is None else about | {"of": dict(before.document.about)}).save(out)

    layout.round(network, added)
    meant = _logits(network, tokens)
    del network  # before it is loaded again
    written = _logits(CausalLM.load(replace(source_of(out, source), dtype="float32")), tokens)
    _check(_difference(meant, written), expected, params, "was written, but the folder loads as another model")
    return {
        "differences": {"logit_difference": exact, "stored_logit_difference": _difference(expected, written)},
        "n_tokens": sum(ids.numel() for ids in tokens),
    }


def _tokens(network: CausalLM) -> list[Tensor]:
    import torch

    config: Any = network.model.config
    vocabulary = int(config.get_text_config().vocab_size)
    batches, sequences, length = CHECKED
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (sequences, length), generator=generator) for _ in range(batches)]


def _logits(network: CausalLM, tokens: Sequence[Tensor]) -> Tensor:
    import torch

    logits = torch.cat([network.logits(ids) for ids in tokens])
    if not torch.isfinite(logits).all():
        raise NotFinite("the model gives NaN or Inf on random tokens", hint="check its weights")
    return logits


def _difference(expected: Tensor, found: Tensor) -> float:
    return (found - expected).abs().max().item()


def _check(difference: float, expected: Tensor, params: TransformParams, what: str) -> None:
    greatest = expected.abs().max().item()
    allowed = params.tolerance * max(1.0, greatest)
    if difference > allowed:
        raise UnsupportedModel(
            f"{params.name} {what}: its logits differ by up to {difference:.3g}, with tolerance {params.tolerance:g} "
            f"they may by {allowed:.3g} (the greatest is {greatest:.3g})",
            hint="this family has a part that the transform does not know; compress the model as it is",
        )


def _keep_dropped(before: CompressedModel, out: Path) -> tuple[CompressedUnit, ...]:
    """Take over what a compressed model has dropped, which a dense folder cannot say."""
    from layerwise.stages.levels.files import write_unit

    dropped = tuple(entry for entry in before.document.units if entry.unit.is_parent)
    for entry in dropped:
        write_unit(out, entry.unit.name, [before.level(entry.unit.name)])
    return dropped


STAGE = Stage("transform", TransformParams, transform, gives="model", takes={"model": Port("model", optional=True)})
