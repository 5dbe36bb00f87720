"""Makes the levels of one allocation again, block by block, for the inputs that they will really get.

The levels of a database are made from the inputs of the dense model, so that a search can mix them. Once an allocation
is chosen nothing needs mixing any more: behind the blocks that are compressed already a level is made once more, by the
same method and of the same bytes, from the inputs X̂ that this prefix leaves, towards what the dense layer answers to
its own inputs X (`layerwise.stages.compress.residual`).

Within a block units are made again in the order in which they run, those that read one input together, each with
what is already compressed of its own block before it. What cannot be made again stays as the database has it: levels of
methods that do more than read a Hessian, units outside of the blocks, units whose inputs are still those of the dense
model, which would come out as they are.

Every eighth sequence of the text is set aside: no level is made from it. Of a block with levels made again and the same
block as it was, the one whose output is nearer to the dense one on those sequences is kept.

Left out: the rows of an expert are not the dense model's, for other tokens may be sent to it; it gets the inputs of the
prefix, but no residual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.errors import NotFinite
from layerwise.stages.apply.making_up import Moving, make_up
from layerwise.stages.apply.remade import RESIDUAL, set_aside
from layerwise.stages.compress import MenuEntry, Task, find_compressor
from layerwise.stages.compress.block_run import BlockRun
from layerwise.stages.compress.params import maker, read_menu
from layerwise.stages.compress.residual import towards_dense
from layerwise.stages.levels.database import UNCHANGED, Database
from layerwise.stages.levels.level import Level
from layerwise.stages.levels.mask import kept
from layerwise.stages.models.causal_lm import CausalLM
from layerwise.stages.models.installed import installed, laid_out
from layerwise.stages.models.network import BEGIN, Unit

if TYPE_CHECKING:
    from layerwise.stages.allocate.allocation import Allocation
    from layerwise.stages.contract import ModelSource

LEAST_TOKENS = 32
"""Tokens that must reach a unit behind the prefix, as `least_tokens` of `compress`; with fewer its level stays."""

DAMP_PERCENT = 0.01
"""Of the residual's correction, for methods that have no `damp_percent` of their own."""


@dataclass(frozen=True)
class Given:
    """A unit of a block with the level that the allocation gives it.

    Args:
        unit: the unit.
        weight: (out, in), what its level stands for.
        level: of the database.
        again: makes the level from another Hessian; None if nothing does.
        keep: (out, in) bool, what an earlier pruning left.
    """

    unit: Unit
    weight: Tensor
    level: Level
    again: MenuEntry | None
    keep: Tensor | None = None


@dataclass(frozen=True)
class RemadeBlock:
    """What became of a block.

    Args:
        levels: those that were made again, by unit.
        kept: why others were not, by unit.
        before, after: squared error of the block's output on the sequences that were set aside, over the square of the
            dense output, with the levels of the database and with those made again, both behind the same prefix.
    """

    levels: Mapping[str, Level] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    before: float | None = None
    after: float | None = None

    @property
    def better(self) -> bool:
        """Whether the levels made again are to be taken."""
        return self.before is not None and self.after is not None and self.after < self.before


def remake_block(
    network: CausalLM,
    index: int,
    ids: Tensor,
    dense: Tensor,
    prefix: Tensor,
    given: Sequence[Given],
    dropped: Sequence[Unit] = (),
    share: float = RESIDUAL,
    steps: int = 0,
) -> RemadeBlock:
    """Make the levels of a block again.

    Args:
        network: the dense model; its weights are put back.
        index: of the block.
        ids: (sequences, length) token ids.
        dense: (sequences, length, width), hidden states before the block in the dense model.
        prefix: the same behind the compressed blocks before.
        given: units of the block that have levels.
        dropped: its half-blocks that are left out.
        share: of the residual that a level makes up for.
        steps: of gradient descent by which the weights that are left make up for those that are compressed, before each
            step of the block.
    Returns:
        the levels, by unit, with the names that they have in the database.
    """
    by_name = {one.unit.name: one for one in given}
    aside = torch.tensor(set_aside(len(ids)))
    pair = _Pair(network, index, [one.unit for one in given], ids, dense, prefix, dropped)
    made: dict[str, Level] = {}
    why: dict[str, str] = {}
    before = {name: one.level.decode() for name, one in by_name.items()}
    after = dict(before)
    left = {name: Moving(name, one.weight, one.keep) for name, one in by_name.items() if one.again is not None}
    for number, step in enumerate(pair.steps()):
        here = [by_name[name] for name in step if by_name[name].again is not None]
        why |= {name: "its method makes no level from a Hessian alone" for name in step if not by_name[name].again}
        if not here:
            continue
        settled = {name: weight for name, weight in after.items() if name not in left}
        moved = steps > 0 and (bool(settled) or not torch.equal(dense, prefix))
        if moved:
            pair.make_up(settled, list(left.values()), ~aside, steps=steps, seed=number)
        inputs = pair.inputs(after, here[0].unit, ~aside)
        inputs.changed |= moved
        for one in here:
            name = one.unit.name
            weight = left.pop(name).tensors()[name] if moved else one.weight
            left.pop(name, None)
            try:
                level = _made(replace(one, weight=weight), inputs, share)
            except NotFinite as error:
                why[name] = error.message
                continue
            if isinstance(level, str):
                why[name] = level
                continue
            made[name], after[name] = level, level.decode()
    if not made or not aside.any():
        return RemadeBlock(kept=why if aside.any() else dict.fromkeys(by_name, "there is no sequence to judge it by"))
    errors = [pair.error(weights, aside) for weights in (before, after)]
    return RemadeBlock(made, why, *errors)


@dataclass
class _Inputs:
    """What is known of the inputs of a unit.

    Args:
        hessian: (in, in), `X̂ X̂ᵀ`.
        residual: (in, in), `(X - X̂) X̂ᵀ`; None where the rows of the two do not belong together.
        tokens: rows.
        changed: whether any input, or the weight itself, is another than in the dense model.
    """

    hessian: Tensor | None = None
    residual: Tensor | None = None
    tokens: int = 0
    changed: bool = False


def _made(one: Given, inputs: _Inputs, share: float) -> Level | str:
    """The level made again, or why it is not."""
    if inputs.hessian is None or not one.unit.multiplied:
        return "no input multiplies it"
    if not inputs.changed:
        return "its inputs are those of the dense model"
    if inputs.tokens < LEAST_TOKENS:
        return f"only {inputs.tokens} tokens reach it behind the compressed blocks"
    assert one.again is not None
    target, hessian = one.weight, inputs.hessian
    if inputs.residual is not None and share:
        damp_percent = getattr(one.again, "damp_percent", DAMP_PERCENT)
        target = towards_dense(one.weight, hessian, share * inputs.residual, damp_percent)
    name = one.unit.name
    keep = {} if one.keep is None else {name: one.keep}
    task = Task({name: target}, lambda unit, kind: hessian, {name: one.unit}, keep)
    (level,) = find_compressor(one.again.method).run(task, one.again)[name]
    if level.size_bytes > one.level.size_bytes:
        return f"it would take {level.size_bytes - one.level.size_bytes} bytes more"
    return replace(level, name=one.level.name, recipe={**level.recipe, "remade": True})


class _Pair:
    """A block in the dense model and behind the compressed prefix, side by side on the same sequences."""

    def __init__(
        self,
        network: CausalLM,
        index: int,
        units: Sequence[Unit],
        ids: Tensor,
        dense: Tensor,
        prefix: Tensor,
        dropped: Sequence[Unit],
    ) -> None:
        self._network, self._dropped = network, dropped
        self._dense = BlockRun(network, index, units, ids, dense, dense)
        self._prefix = BlockRun(network, index, units, ids, prefix, prefix)

    def steps(self) -> list[list[str]]:
        """Units that read one input, in the order in which they run."""
        with self._without():
            return self._prefix.groups()

    def inputs(self, weights: Mapping[str, Tensor], unit: Unit, chosen: Tensor) -> _Inputs:
        """Those of a unit on chosen sequences, with some weights replaced behind the prefix."""
        found = _Inputs()
        for sequences in _batches(chosen, self._dense.batch_size):
            X = _seen(self._dense.of(sequences), {}, unit)
            with self._without():
                X_hat = _seen(self._prefix.of(sequences), weights, unit)
            paired = unit.role != "expert" and [len(x) for x in X] == [len(x) for x in X_hat]
            found.changed |= not paired or any(not torch.equal(*both) for both in zip(X, X_hat, strict=True))
            for number, rows in enumerate(X_hat):
                found.tokens += len(rows)
                found.hessian = _plus(found.hessian, rows.T @ rows)
                if paired:
                    found.residual = _plus(found.residual, (X[number] - rows).T @ rows)
        return found

    def make_up(
        self, settled: Mapping[str, Tensor], left: Sequence[Moving], chosen: Tensor, *, steps: int, seed: int
    ) -> None:
        """Let weights that are left make up for settled ones, on chosen sequences."""
        run = self._prefix.of(chosen.nonzero()[:, 0])
        run.outputs = self._dense.of(chosen.nonzero()[:, 0]).run({})
        with self._without():
            make_up(run, settled, left, steps=steps, seed=seed)

    def error(self, weights: Mapping[str, Tensor], chosen: Tensor) -> float:
        """Squared error of the block's output on chosen sequences, over the square of the dense output."""
        error = square = 0.0
        for sequences in _batches(chosen, self._dense.batch_size):
            expected = self._dense.of(sequences).run({}).double()
            with self._without():
                found = self._prefix.of(sequences).run(weights).double()
            error += (found - expected).square().sum().item()
            square += expected.square().sum().item()
        return error / square if square else float(error > 0)

    def _without(self) -> AbstractContextManager[None]:
        return self._network.without(self._dropped) if self._dropped else nullcontext()


def _seen(run: BlockRun, weights: Mapping[str, Tensor], unit: Unit) -> list[Tensor]:
    rows: list[Tensor] = []
    run.watch(weights, [unit.name], lambda _, X: rows.append(X.float()))
    return rows


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _batches(chosen: Tensor, size: int) -> Iterator[Tensor]:
    yield from chosen.nonzero()[:, 0].split(size)


class Remaker:
    """Makes the blocks of an allocation again, one after another.

    It holds the hidden states before one block, of the dense model and behind the prefix. Asked for a later block, it
    runs those in between with the levels that they got, so that a stage that was interrupted goes on, and any worker
    can take any block.

    Args:
        workflow: the workflow's model.
        database: holds the levels.
        allocation: which of them.
        sequences: (sequences, length) int64 token ids, a file of `layerwise.stages.data.text`.
        folder: gets the levels that were made again, as `write_unit` writes them.
        share, steps: as of `remake_block`.
    """

    def __init__(
        self,
        workflow: ModelSource,
        database: Path,
        allocation: Allocation,
        sequences: Path,
        folder: Path,
        share: float = RESIDUAL,
        steps: int = 0,
    ) -> None:
        from layerwise.stages.data.text import Tokens, load_sequences

        self._database, self._folder = Database(database, workflow), folder
        self._levels = self._database.index.with_inside(allocation.levels)
        self._share, self._steps = share, steps
        self._network = CausalLM.load(self._database.model(workflow))
        self._device = self._network.device
        self._units = {unit.name: unit for unit in (*self._network.units, *self._network.parents)}
        self._ids = load_sequences(Tokens(sequences, 0))
        self._menu = read_menu(self._database.index.menu)
        self._position = 0
        self._dense = self._begun()
        with installed(self._network, self._embeddings()):
            self._prefix = self._begun()

    def __call__(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Make one block again.

        Args:
            item: `block`, and `taken`, for each block before the units whose levels were made again.
        Returns:
            what `RemadeBlock` says, as JSON.
        """
        from layerwise.stages.levels.files import write_unit

        block: int = item["block"]
        while self._position < block:
            self._go_on(remade=item["taken"][self._position])
        given, dropped = self._given(block)
        if not given or any(parent.role == "block" for parent in dropped):
            return {"remade": [], "kept": {}, "before": None, "after": None, "better": False}
        found = remake_block(
            self._network, block, self._ids, self._dense, self._prefix, given, dropped, self._share, self._steps
        )
        if found.better:
            for name, level in found.levels.items():
                write_unit(self._folder, name, [level.to("cpu")])
        return {
            "remade": sorted(found.levels),
            "kept": dict(found.kept),
            "before": found.before,
            "after": found.after,
            "better": found.better,
        }

    def _begun(self) -> Tensor:
        """The hidden states before the first block."""
        return torch.cat([self._network.begin(part.to(self._device)).hidden.cpu() for part in self._ids.split(8)])

    def _embeddings(self) -> dict[Unit, Tensor]:
        """The weights of an embedding that has a level."""
        found = {}
        for entry in self._database.units:
            name = self._levels.get(entry.name)
            if name is not None and entry.unit.positions[0] == BEGIN:
                weight = self._database.level(entry.name, name).to(self._device).decode()
                found[self._units[entry.name]] = laid_out(self._network, self._units[entry.name], weight)
        return found

    def _go_on(self, *, remade: Sequence[str]) -> None:
        """Put both hidden states behind the next block."""
        from layerwise.stages.levels.files import open_unit, read_level

        block = self._position
        given, dropped = self._given(block)
        weights = {}
        for one in given:
            name, level = one.unit.name, one.level
            if name in remade:
                level = read_level(*open_unit(self._folder, name), level.name).to(self._device)
            weights[name] = level.decode()
        units = [one.unit for one in given]
        self._dense = BlockRun(self._network, block, units, self._ids, self._dense, self._dense).run({})
        if not any(parent.role == "block" for parent in dropped):
            run = BlockRun(self._network, block, units, self._ids, self._prefix, self._prefix)
            with self._network.without(dropped):
                self._prefix = run.run(weights)
        self._position += 1

    def _given(self, block: int) -> tuple[list[Given], list[Unit]]:
        """The units of a block with their levels, and what of it is dropped."""
        given, dropped = [], []
        for entry in self._database.units:
            name = self._levels.get(entry.name)
            if name is None or entry.unit.block != block:
                continue
            level = self._database.level(entry.name, name)
            if level.recipe["encoding"] == "drop":
                dropped.append(self._units[entry.name])
            elif not entry.is_parent and level.recipe["encoding"] != "dense":
                known = entry.level(name)
                made_here = known.status == "ok" and known is not entry.levels[UNCHANGED]
                again = maker(self._menu, name).again(name) if made_here and entry.unit.groups == 1 else None
                unit = self._units[entry.name]
                weight = self._network.weight(unit).clone()
                before = self._database.level(entry.name, entry.levels[UNCHANGED].name)
                keep = kept(before).to(self._device) if "mask" in before.tensors else None
                given.append(Given(unit, weight, level.to(self._device), again, keep))
        return given, dropped
