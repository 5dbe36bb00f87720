"""A model with fewer heads or channels as a smaller dense model: weights cut, and a configuration that says so.

A configuration of transformers has one number of heads and one width of the MLPs for all blocks, so all must be equally
narrow, or be filled up with zeros to the widest. Families that say it block by block are not among those that layerwise
loads: OpenELM and DeciLM come with code of their own, and Gemma 3n, which lists its widths of MLPs, passes on more than
a hidden state from block to block.

What is written is tried: on a few tokens it must give the logits of the model with zeros for what went, or it is
refused; a family may use the number of heads in ways that no setting tells of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UnsupportedModel
from layerwise.stages.contract import ModelSource
from layerwise.stages.export.shorter import NATIVE, Shorter, read_config, told
from layerwise.stages.levels.sliced import kept_groups, places_of
from layerwise.stages.models.checkpoint import Checkpoint
from layerwise.stages.models.compressed import CompressedModel, CompressedUnit
from layerwise.stages.models.network import View

if TYPE_CHECKING:
    from torch import Tensor

INNER = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "inner_dim", "feed_forward_size", "d_inner")
"""Settings that say how many channels an MLP has; a configuration knows one of them."""

KINDS = {"attention": "key-value heads with their queries", "mlp": "channels"}
"""By role, what goes."""

KEY_VALUE = ("num_key_value_heads", "num_kv_heads")

TOKENS = (2, 8)
"""Batch and length of what the smaller model is tried on."""


@dataclass(frozen=True)
class Cut:
    """A stored tensor of which less is left.

    Args:
        unit: whose weight or bias it is.
        rows, columns: of the weight, (out, in), what is left.
        view: of the weight, how it stands in the tensor; None for a bias.
    """

    unit: str
    rows: Sequence[int]
    columns: Sequence[int]
    view: View | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is left, as it is stored."""
        if self.view is None:
            return (len(self.rows),)
        shape = (len(self.rows), len(self.columns))
        return shape[::-1] if self.view.transposed else shape

    def of(self, stored: Tensor, model: CompressedModel) -> Tensor:
        """What is left of the tensor, in its dtype."""
        if self.view is None:
            return stored[self.rows].contiguous()
        small = model.level(self.unit).decode()[self.rows][:, self.columns]
        return self.view.stored_form(small, self.shape).to(stored.dtype).contiguous()


@dataclass(frozen=True)
class Narrower:
    """What of the half-blocks is left in the smaller model.

    Args:
        cut: by stored name, the tensors of which less is left.
        settings: what changes in the configuration of the text model.
    """

    cut: Mapping[str, Cut] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def _settings(config: Any, role: str, width: int, total: int) -> dict[str, Any]:
    """What changes in a configuration where half-blocks of a role have so many groups of all.

    Raises:
        UnsupportedModel: it has no setting for it.
    """
    known = config.to_dict()
    if role == "mlp":
        keys = [key for key in INNER if key in known]
        if not keys:
            raise UnsupportedModel("no setting of its config.json says how wide the MLPs are", hint=NATIVE)
        return {keys[0]: width}
    heads = config.num_attention_heads
    return {
        config.attribute_map.get("num_attention_heads", "num_attention_heads"): heads * width // total,
        **{key: width for key in KEY_VALUE if key in known},
        "head_dim": known.get("head_dim") or config.hidden_size // heads,
    }


def narrower(
    source: ModelSource, model: CompressedModel, checkpoint: Checkpoint, left: Shorter, *, pad: bool
) -> Narrower:
    """How wide the half-blocks of a model can be written.

    Args:
        source: the model.
        model: its levels.
        checkpoint: of the dense one.
        left: which blocks are left.
        pad: fill half-blocks that are narrower than others up with zeros.
    Raises:
        UnsupportedModel: they are not all as narrow, and are not to be filled up; a half-block is cut in part; or the
            configuration has no setting for it.
    """
    halves: dict[str, dict[str, list[CompressedUnit]]] = {}
    for entry in model.document.units:
        role = None if entry.unit.is_parent else _role(model.recipe(entry.unit.name))
        if role is not None:
            halves.setdefault(role, {}).setdefault(entry.unit.parent or "", []).append(entry)
    if not halves:
        return Narrower()
    config = read_config(source)
    n_blocks = config.num_hidden_layers - len(left.gone)
    cut: dict[str, Cut] = {}
    settings: dict[str, Any] = {}
    for role, units in halves.items():
        recipes = {half: model.recipe(some[0].unit.name) for half, some in units.items()}
        _check_whole(units, recipes)
        total = max(recipe["groups"] for recipe in recipes.values())
        kept = {recipe["kept"] for recipe in recipes.values()}
        widest = total if len(units) < n_blocks else max(kept)
        entries = [entry for some in units.values() for entry in some]
        if len({*kept, widest}) > 1 and not pad:
            hint = _offer(role, entries, model, checkpoint, widest, total)
            raise UnsupportedModel(_unequal(role, recipes, widest, n_blocks), hint=hint)
        if widest < total:
            widest = _accepted(config, role, widest, total, pad=pad)
        if widest < total:
            settings |= _settings(config, role, widest, total)
            for entry in entries:
                cut |= _cuts(entry, model, checkpoint, widest)
    return Narrower(cut, settings)


def _accepted(config: Any, role: str, width: int, total: int, *, pad: bool) -> int:
    """The least width from a given one on that a configuration takes: Llama's wants the hidden size to be a multiple of
    the number of heads, whatever their size.

    Raises:
        UnsupportedModel: it does not take this one, and half-blocks are not to be filled up.
    """
    why = _refused(config, _settings(config, role, width, total))
    if why is None:
        return width
    # Channels are many, and no configuration is known that minds their number.
    counts = range(1, total + 1) if role == "attention" else ()
    taken = [count for count in counts if _refused(config, _settings(config, role, count, total)) is None]
    wider = min((count for count in taken if count > width), default=total)
    if not pad:
        raise UnsupportedModel(
            f"its config.json cannot say that {width} of {total} {KINDS[role]} are left: {why}",
            hint=f"it takes {', '.join(map(str, taken)) or total}; `pad: true` fills up with zeros to {wider}",
        )
    return wider


def _refused(config: Any, settings: Mapping[str, Any]) -> str | None:
    """Why a configuration does not take some settings; None if it does."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        type(config).from_dict(config.to_dict() | settings)
    except (ValueError, TypeError, StrictDataclassError) as error:
        return told(error)
    return None


def _cuts(entry: CompressedUnit, model: CompressedModel, checkpoint: Checkpoint, width: int) -> dict[str, Cut]:
    """What becomes of the tensors of a unit, by name, where so many groups are left."""
    level, view = model.level(entry.unit.name), _view(entry)
    kept = kept_groups(level)
    gone = [group for group in range(level.recipe["groups"]) if group not in kept]
    # What fills up is zero in the decoded weight.
    rows, columns = places_of(level, sorted([*kept, *gone[: width - len(kept)]]))
    found = {view.tensor: Cut(entry.unit.name, rows, columns, view)}
    bias = view.tensor.removesuffix("weight") + "bias"
    if bias in checkpoint.headers and len(rows) < level.shape[0]:
        found[bias] = Cut(entry.unit.name, rows, columns, None)
    return found


def check_same(source: ModelSource, out: Path) -> None:
    """Compare what a smaller model says with what the model says that it was made of, on a few tokens.

    Raises:
        UnsupportedModel: it says something else, or cannot be loaded.
    """
    import torch

    from layerwise.stages.models.causal_lm import CausalLM

    whole = CausalLM.load(source)
    vocabulary = int(whole.model.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
    ids = torch.randint(0, vocabulary, TOKENS, generator=torch.Generator().manual_seed(0)).to(whole.device)
    expected = whole.logits(ids).float()
    del whole
    found = CausalLM.load(replace(source, path=out, compressed=None)).logits(ids).float()
    # What went may round a sum otherwise, in the dtype of the files or of the computation; the root is far above that.
    stored = {Checkpoint(source.path).dtype(name) for name in Checkpoint(source.path).headers}
    rough = max(torch.finfo(dtype).eps for dtype in (*stored, getattr(torch, source.dtype)) if dtype.is_floating_point)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= rough**0.5:
        raise UnsupportedModel(
            f"the smaller model says something else than the model with zeros for what went: logits differ by "
            f"{difference:.2g} of the largest",
            hint=NATIVE,
        )


def _role(recipe: Mapping[str, Any]) -> str | None:
    """Of a half-block that a unit was cut with; None for a unit that is not cut."""
    role: str | None = recipe["role"] if recipe["encoding"] == "sliced" else None
    return role


def _view(entry: CompressedUnit) -> View:
    """Where the weight stands, in a tensor of its own."""
    assert entry.stored is not None
    if len(entry.stored.places) != 1 or not entry.stored.parts[0].whole:
        raise UnsupportedModel(
            f"{entry.unit.name} shares its tensor in the checkpoint with another weight, and cannot be cut", hint=NATIVE
        )
    return entry.stored.parts[0]


def _check_whole(units: Mapping[str, Sequence[CompressedUnit]], recipes: Mapping[str, Mapping[str, Any]]) -> None:
    """Every unit that was cut with a half-block must still be: a repair may have made one whole again."""
    for half, some in units.items():
        names = {entry.unit.name for entry in some}
        lacking = [name for name in recipes[half]["members"] if name not in names]
        if lacking:
            raise UnsupportedModel(
                f"of {half} only some weights are as narrow as they were made: {lacking[0]} is whole again",
                hint=NATIVE + "; of repairs, those that keep levels as they are",
            )


def _unequal(role: str, recipes: Mapping[str, Mapping[str, Any]], widest: int, n_blocks: int) -> str:
    narrow = min(recipes, key=lambda half: recipes[half]["kept"])
    kept, total = recipes[narrow]["kept"], recipes[narrow]["groups"]
    groups = KINDS[role]
    whole = n_blocks - len(recipes)
    others = f"{whole} of {n_blocks} blocks keep all" if whole else f"another keeps {widest}"
    return f"a configuration has one width for all blocks, but {narrow} keeps {kept} of {total} {groups}, and {others}"


def _offer(
    role: str, cut: Sequence[CompressedUnit], model: CompressedModel, checkpoint: Checkpoint, widest: int, total: int
) -> str:
    """What to do instead, with its bytes."""
    weights = [(entry.unit.n_weights, model.recipe(entry.unit.name)["kept"], _view(entry).tensor) for entry in cut]
    narrow, wide = (
        sum(n * kept // total * checkpoint.dtype(tensor).itemsize for n, kept, tensor in sizes)
        for sizes in (weights, [(n, widest, tensor) for n, _, tensor in weights])
    )
    return (
        f"`pad: true` fills each {role} up with zeros to {widest} of {total}: {wide:,} bytes of those weights in the "
        f"place of {narrow:,}; or search with `equal_width: true`"
    )
