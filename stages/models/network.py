"""What every network is to the stages: units that can get a level of their own, and parts that run one after another.

A unit is a weight matrix, wherever the model keeps it: a linear layer, a convolution, one expert of a stacked tensor,
the output head, the embedding. Above them stand parents (`attention`, `mlp`, `block`), whose levels override those of
the units inside. A `View` says where a matrix stands, in a parameter of the network or in a tensor of the checkpoint.

The network runs in parts. Their numbers are positions: `BEGIN` before the blocks, the index of each block, and the
number of blocks for what comes after them. A unit says at which positions its weight is used; a tied embedding is used
at the first and at the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from layerwise.errors import UnsupportedModel
from layerwise.stages.models.patterns import matches
from layerwise.stages.registry import nearest

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["linear", "conv", "parameter", "expert", "head", "embedding", "attention", "mlp", "block"]
"""`parameter` is a weight that some function multiplies by (a router), `expert` one of several in a parameter."""

PARENTS = ("attention", "mlp", "block")
"""Roles of units that hold other units."""

TARGETS = ("blocks", "head", "embedding")
"""What `targets` may say beside names and kinds: the weights of all blocks, the output head, the embedding."""

BEGIN = -1
"""The position of what stands before the first block."""


@dataclass(frozen=True)
class View:
    """Where a matrix (out, in) stands in a stored tensor.

    Args:
        tensor: name of a parameter of the network, or of a tensor of the checkpoint.
        index: of a stacked tensor, which of its matrices: expert 7.
        rows: of a tensor of several matrices one below the other, the first row and the one after the last.
        transposed: stored as (in, out), as GPT-2's Conv1D does.
    """

    tensor: str
    index: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def whole(self) -> bool:
        """True if nothing else stands in the tensor."""
        return not self.index and self.rows is None

    def part(self, stored: Tensor) -> Tensor:
        """The part of the tensor that holds the matrix, as stored: a view, not a copy."""
        part = stored[self.index] if self.index else stored
        return part if self.rows is None else part[slice(*self.rows)]

    def read(self, stored: Tensor) -> Tensor:
        """The matrix, (out, in), without a copy where that can be; of a convolution, (out, in · kernel)."""
        part = self.part(stored)
        return part.T if self.transposed else part.flatten(1)

    def stored_form(self, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """A matrix (out, in) laid out as the part that `part` gives, which has this shape."""
        return (weight.T if self.transposed else weight).reshape(tuple(shape))

    def write(self, stored: Tensor, weight: Tensor) -> None:
        """Put a matrix (out, in) into the tensor, in the tensor's dtype."""
        part = self.part(stored)
        part.copy_(self.stored_form(weight, part.shape))

    def as_json(self) -> dict[str, Any]:
        """As it stands in an artifact."""
        return asdict(self) | {"index": list(self.index), "rows": None if self.rows is None else list(self.rows)}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> View:
        """What `as_json` gave."""
        rows = entry["rows"]
        return cls(
            entry["tensor"], tuple(entry["index"]), None if rows is None else (rows[0], rows[1]), entry["transposed"]
        )


@dataclass(frozen=True)
class Unit:
    """The smallest thing that gets its own level.

    Args:
        name: full name of its module; of an expert, the module of the experts, its number, the parameter.
        kind: the name inside a block, without an expert's number (`mlp.experts.down_proj`); outside, the name.
        role: what it is.
        block: index of its block; None for the head and the embedding.
        shape: (out, in); (0, 0) for a parent, which has no weight of its own.
        positions: where it is used: BEGIN, block indices, the number of blocks; see the module.
        view: where its weight stands in the network's parameters; None for a parent.
        group: what serving engines fuse it with (`3.self_attn.q_proj+k_proj+v_proj`), or None.
        parent: the name of the unit that it is inside of, or None.
        share: how often it is multiplied for one token: 1, or less for an expert; of a classifier, for one entry of a
            batch, as often as the entry has places (the pixels of a convolution's output).
        multiplied: False where nothing multiplies the weight: an embedding that is looked up. Such a unit has no
            statistics of its inputs.
        groups: of a convolution in groups, how many: rows of the weight in as many equal parts, one below the other,
            each of which multiplies inputs of its own. Its statistics of inputs have one entry for each group.
    """

    name: str
    kind: str
    role: Role
    block: int | None
    shape: tuple[int, int]
    positions: tuple[int, ...]
    view: View | None = None
    group: str | None = None
    parent: str | None = None
    share: float = 1.0
    multiplied: bool = True
    groups: int = 1

    @property
    def n_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def is_parent(self) -> bool:
        return self.role in PARENTS

    @property
    def replaceable(self) -> bool:
        """True for a linear layer with a weight of its own: a module that runs on a packed weight can take its
        place."""
        return self.role in ("linear", "head") and len(self.positions) == 1

    def as_json(self) -> dict[str, Any]:
        """As it stands in an artifact."""
        view = None if self.view is None else self.view.as_json()
        return asdict(self) | {"shape": list(self.shape), "positions": list(self.positions), "view": view}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Unit:
        """What `as_json` gave."""
        view = None if entry["view"] is None else View.from_json(entry["view"])
        rows, columns = entry["shape"]
        changed = {"shape": (rows, columns), "positions": tuple(entry["positions"]), "view": view}
        return cls(**{**entry, **changed})


@dataclass(frozen=True)
class Uncovered:
    """A weight that no unit covers.

    Args:
        tensor: name of the parameter.
        block: index of its block, None outside of the blocks.
        n_weights: how many.
        reason: why not.
    """

    tensor: str
    block: int | None
    n_weights: int
    reason: str


class State(Protocol):
    """What stands before the first block: the hidden states, and all that the parts need beside them."""

    hidden: Tensor


class Network(Protocol):
    """One implementation for each family of models."""

    units: Sequence[Unit]
    """Every weight, in the order of first use."""
    parents: Sequence[Unit]
    """What holds them: half-blocks and blocks, in the same order, a block before what is in it."""
    uncovered: Sequence[Uncovered]
    """Weights of two and more dimensions that are no units."""
    n_blocks: int

    def begin(self, ids: Tensor) -> Any:
        """Everything before the first block, a `State`, of a batch: token ids, or what the network takes."""
        ...

    def run_block(self, index: int, hidden: Tensor, state: Any) -> Tensor:
        """Hidden state after one block."""
        ...

    def end(self, hidden: Tensor, state: Any) -> Tensor:
        """Logits, from the hidden state after the last block."""
        ...


def select_units(
    units: Sequence[Unit], targets: Sequence[str], ignore: Sequence[str], uncovered: Sequence[Uncovered] = ()
) -> list[Unit]:
    """The units that any target names and nothing ignores.

    Args:
        units: of the network.
        targets: `blocks`, `head`, `embedding`; exact names; `re:` and a regular expression that must match from the
            start; kinds (`mlp.down_proj`) or the end of one (`down_proj`). Empty for `blocks`.
        ignore: the same, taken out.
        uncovered: what cannot be chosen, to say so where a target names it.
    Raises:
        UnsupportedModel: a target or an ignored name fits nothing, or nothing is left.
    """
    targets = targets or ("blocks",)
    for what, patterns in (("targets", targets), ("ignore", ignore)):
        for pattern in patterns:
            _check_fits(what, pattern, units, uncovered)
    chosen = [unit for unit in units if _named(unit, targets) and not _named(unit, ignore)]
    if not chosen:
        raise UnsupportedModel(
            f"no unit is left: targets {list(targets)}, ignore {list(ignore)}",
            hint=f"units are named like {units[0].name}" if units else "the blocks hold no linear layers",
        )
    return chosen


def named_by(pattern: str, units: Sequence[Unit], what: str) -> list[Unit]:
    """The units that a pattern names, as in `targets`.

    Args:
        pattern: see `select_units`.
        units: parents among them are named in the same way.
        what: the key that the pattern stands under, for the error.
    Raises:
        UnsupportedModel: it names none.
    """
    _check_fits(what, pattern, units, ())
    return [unit for unit in units if _fits(unit, pattern)]


def _named(unit: Unit, patterns: Iterable[str]) -> bool:
    return any(_fits(unit, pattern) for pattern in patterns)


def _fits(unit: Unit, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return matches(pattern[3:], unit.name)
    if pattern == "blocks":
        return unit.block is not None
    if pattern in ("head", "embedding"):
        # A tied embedding is one unit, the head; both words mean it.
        return unit.role == pattern or (unit.role == "head" and BEGIN in unit.positions)
    return pattern in (unit.name, unit.kind) or unit.kind.endswith(f".{pattern}")


def _check_fits(what: str, pattern: str, units: Sequence[Unit], uncovered: Sequence[Uncovered]) -> None:
    if any(_fits(unit, pattern) for unit in units):
        return
    for weight in uncovered:
        name = weight.tensor.removesuffix(".weight")
        if pattern in (name, weight.tensor) or name.endswith(f".{pattern}"):
            raise UnsupportedModel(
                f"{what}: {weight.tensor} ({weight.n_weights:,} weights) can be no unit: {weight.reason}",
                hint="leave it out of `targets`; it stays as it is and is counted in bytes",
            )
    known = list(dict.fromkeys([*TARGETS, *(unit.kind for unit in units)]))
    if what == "fixed" and pattern in TARGETS:
        raise UnsupportedModel(f"{what}: there is no {pattern} among the units", hint="add it to `targets`")
    if pattern in ("attention", "mlp"):
        hint = f"let it be dropped: {{method: drop, units: [{pattern}]}}"
        raise UnsupportedModel(f"{what}: '{pattern}' has no weight of its own", hint=hint)
    start = "a pattern must match from the start of a name: re:.*q_proj" if pattern.startswith("re:") else None
    raise UnsupportedModel(f"{what}: '{pattern}' names no unit ({nearest(pattern, known)})", hint=start)
