"""What every compressor promises; see `layerwise.stages.compress`.

The tasks are small: a weight of 6 x 20, or a block of a Llama of width 20, so that groups of 8 and of 7 are ragged.
Statistics are taken with their own `measure` of correlated inputs, and a method is given those that it needs and no
other.
"""

from __future__ import annotations

import itertools
import json
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

from layerwise.errors import NotFinite, UsageError
from layerwise.stages.calibrate import find_statistic
from layerwise.stages.compress import Compressor, MenuEntry, Task, find_compressor
from layerwise.stages.models.network import Role, Unit
from layerwise.testing.encodings import demand_same_tensors, encoding_promises, same_bits
from layerwise.testing.promises import Promise, answer_of_fresh_interpreter, close, demand, keep_all, refusal
from layerwise.testing.statistics import example_unit, measured, random_gradients, random_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from layerwise.stages.compress.block_run import BlockRun
    from layerwise.stages.levels.level import Level

Menu = Mapping[str, Any]
"""An entry of a menu as it stands in a workflow, without `method`."""

Edit = Callable[["Tensor"], "Tensor"]


def check_compressor(name: str, menus: Sequence[Menu]) -> None:
    """Check every promise of a method.

    Args:
        name: of the method.
        menus: entries that between them use all that its parameters can say; groups of 7 or 8 are ragged here.
    Raises:
        AssertionError: a promise is broken; says which.
    """
    keep_all(compressor_promises(name, menus))


def compressor_promises(name: str, menus: Sequence[Menu]) -> list[Promise]:
    """The promises of `check_compressor`, one by one."""
    demand(menus, "the suite of a method needs at least one menu")
    compressor = find_compressor(name)
    found = [Promise(f"method {name}", "menus are checked without loading torch", partial(_no_torch, name, menus[0]))]
    for number, menu in enumerate(menus):
        entry = compressor.params.model_validate({"method": name, **menu})
        case = _Case(name, compressor, entry)
        kept = dict(EVERY)
        if entry.level_names():
            kept |= HALVES if entry.scope == "half" else PARENTS if entry.parents() else WEIGHTS
        found += [Promise(f"method {name}, menu {number}", text, partial(check, case)) for text, check in kept.items()]
    return found


# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass
class _Case:
    """A method with one menu entry, and the tasks that it is given.

    Args:
        name: of the method.
        compressor: found by it.
        entry: its parameters.
        asked: statistics that it asked for so far, as (unit, name).
    """

    name: str
    compressor: Compressor
    entry: MenuEntry
    asked: list[tuple[str, str]] = field(default_factory=list)

    @cached_property
    def block(self) -> tuple[BlockRun, dict[str, Tensor]]:
        """A block to work on and the weights of its units, for methods of that scope."""
        return _tiny_block()

    def task(
        self,
        edit: Edit | None = None,
        *,
        keep: bool = False,
        spoil: Edit | None = None,
        fewer: Edit | None = None,
        shape: tuple[int, int] | None = None,
    ) -> Task:
        """A fresh task.

        Args:
            edit: what is done to each weight.
            keep: half of each weight was pruned before.
            spoil: what is done to each statistic.
            fewer: what is done to the inputs that a statistic is taken of, (rows, in).
            shape: of the weight; not of a block.
        """
        if self.entry.scope == "half":
            return self._half(edit or _as_it_is, keep, spoil or _as_it_is, fewer or _as_it_is)
        if self.entry.parents():
            parents = {role: replace(example_unit(0, 0), name=role, role=cast(Role, role)) for role in self._roles}
            return Task({}, self._no_statistic, parents)
        block = None
        if self.entry.scope == "block":
            block, given = self.block
            units = {unit.name: unit for unit in block.units}
        else:
            units = {example_unit().name: example_unit(*(shape or ()))}
            given = {name: random_inputs(7, *unit.shape) for name, unit in units.items()}
        weights = {name: edit(weight.clone()) if edit else weight.clone() for name, weight in given.items()}
        masks = {}
        if keep:
            masks = {name: random_inputs(9, *weight.shape) > 0.5 for name, weight in weights.items()}
            weights = {name: weight * masks[name] for name, weight in weights.items()}
        statistic = partial(self._statistic, units, spoil or _as_it_is, fewer or _as_it_is)
        return Task(weights, statistic, units, masks, block)

    def _half(self, edit: Edit, keep: bool, spoil: Edit, fewer: Edit) -> Task:
        """A half-block of the tiny block, of the first role that the entry narrows."""
        from layerwise.stages.models.channels import Channels
        from layerwise.stages.models.find_channels import channels_of

        block, given = self.block
        half = next(half for half in block.network.parents if half.role == self._roles[0])
        channels = channels_of(block.network)[half.name]
        assert isinstance(channels, Channels)
        inside = {unit.name: unit for unit in block.units if unit.name in channels.units}
        weights = {name: edit(given[name].clone()) for name in inside}
        masks = {name: random_inputs(9, *weight.shape) > 0.5 for name, weight in weights.items()} if keep else {}
        weights = {name: weight * masks[name] if keep else weight for name, weight in weights.items()}
        statistic = partial(self._statistic, inside, spoil, fewer)
        return Task(weights, statistic, {half.name: half, **inside}, masks, channels=channels)

    def run(self, task: Task) -> Mapping[str, list[Level]]:
        """What the method makes of a task."""
        return self.compressor.run(task, self.entry)

    def inputs(self, unit: Unit) -> Tensor:
        """What the unit multiplies, (rows, in)."""
        if self.entry.scope != "block":
            return random_inputs(columns=unit.shape[1])
        import torch

        seen: list[Tensor] = []
        self.block[0].watch({}, [unit.name], lambda _, X: seen.append(X))
        return torch.cat(seen)

    @property
    def _roles(self) -> list[str]:
        return sorted(self.entry.parents())

    def _no_statistic(self, unit: str, name: str) -> Tensor:
        raise AssertionError(f"a parent has no statistics, and it asks for {name} of {unit}")

    def _statistic(self, units: Mapping[str, Unit], spoil: Edit, fewer: Edit, unit: str, name: str) -> Tensor:
        demand(name in self.entry.needs, f"it asks for {name}, which is not in its `needs`")
        demand(unit in units, f"it asks for {name} of {unit}, which is not in its task")
        self.asked.append((unit, name))
        shape = units[unit].shape
        inputs = fewer(self.inputs(units[unit]))
        return spoil(measured(find_statistic(name), inputs, random_gradients(3, *shape)))


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _tiny_block() -> tuple[BlockRun, dict[str, Tensor]]:
    """A random block of a Llama, 20 wide, on three sequences of eight tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from layerwise.stages.compress.block_run import BlockRun
    from layerwise.stages.models.causal_lm import CausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=20, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, head_dim=10
    )
    model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    network = CausalLM(model)
    units = [unit for unit in network.units if unit.block == 0]
    ids = torch.randint(0, 32, (3, 8), generator=generator)
    stream = network.begin(ids)
    outputs = network.run_block(0, stream.hidden, stream)
    run = BlockRun(network, 0, units, ids, stream.hidden, outputs)
    return run, {unit.name: network.weight(unit).clone() for unit in units}


# --- promises of every method -----------------------------------------------------------------------------------------


def _no_torch(name: str, menu: Menu) -> None:
    entry = json.dumps({"method": name, **menu})
    program = (
        "import json, sys\nfrom layerwise.stages.compress import find_compressor\n"
        f"entry = find_compressor({name!r}).params.model_validate(json.loads({entry!r}))\n"
        "entry.level_names(), entry.nominal_bits(), entry.material(), entry.needs\n"
        "print('torch' in sys.modules)"
    )
    demand(answer_of_fresh_interpreter(program) == "False", "torch is loaded")


def _parameters(case: _Case) -> None:
    entry = case.entry
    written = json.loads(json.dumps(entry.model_dump(mode="json"), allow_nan=False))
    demand(type(entry).model_validate(written) == entry, f"written to a workflow they are {written}, another entry")
    json.dumps(entry.material(), allow_nan=False)
    demand(pickle.loads(pickle.dumps(entry)) == entry, "a worker gets another entry")
    run = pickle.loads(pickle.dumps(case.compressor.run))
    demand(run is case.compressor.run, "a worker gets another function")


def _names(case: _Case) -> None:
    names = case.entry.level_names()
    demand(len(set(names)) == len(names), f"the names are {names}")
    for name in names:
        demand(re.fullmatch(r"[^/\s]+", name), f"{name!r} cannot be a name in a file of levels")
    task = case.task()
    made = case.run(task)
    demand(made.keys() == task.units.keys(), f"it makes levels of {sorted(made)}, asked for {sorted(task.units)}")
    for levels in made.values():
        found = [level.name for level in levels]
        demand(found == names, f"announced are {names}, made are {found}")


def _bits(case: _Case) -> None:
    announced = case.entry.nominal_bits()
    if announced is None:
        return
    for levels in case.run(case.task()).values():
        found = [level.bits for level in levels]
        same = len(found) == len(announced) and all(map(_same_bits, found, announced))
        demand(same, f"announced are {list(announced)} bits, made are {found}")


def _same_bits(found: float, announced: float) -> bool:
    return close(found, announced, rel=1e-12)  # bits may be logarithms


def _same(case: _Case) -> None:
    first, second = case.run(case.task()), case.run(case.task())
    _demand_same(second, first, "the second time")


def _fallback(case: _Case) -> None:
    other = case.entry.fallback()
    if other is None:
        return
    demand(not other.needs, f"the fallback {other.method} needs statistics, too: {sorted(other.needs)}")
    demand(other.scope == "unit", f"the fallback {other.method} wants a whole block")
    ours, theirs = case.entry.level_names(), other.level_names()
    demand(len(ours) == len(theirs), f"{ours} would be made as {theirs}")


def _demand_same(found: Mapping[str, list[Level]], expected: Mapping[str, list[Level]], when: str) -> None:
    for name, levels in expected.items():
        for one, other in zip(found[name], levels, strict=True):
            demand(dict(one.recipe) == dict(other.recipe), f"{when} the recipe is {one.recipe}, not {other.recipe}")
            demand_same_tensors(one.tensors, other.tensors, f"{when}, in level {one.name} of {name},")


# --- of those that make levels of weights -----------------------------------------------------------------------------


def _encoded(case: _Case) -> None:
    for level in _said_right(case):
        demand(level.bits <= level.effective_bits <= 8 * level.size_bytes / level.n_weights, "bits do not add up")


def _said_right(case: _Case) -> Iterator[Level]:
    """Its levels, which have the shape of their unit, name their method, and keep what their encoding promises."""
    task = case.task()
    for name, levels in case.run(task).items():
        for level in levels:
            demand(level.shape == task.units[name].shape, f"level {level.name} of {name} is of {level.shape}")
            demand(level.recipe["method"] == case.name, f"level {level.name} says method {level.recipe['method']}")
            keep_all(encoding_promises(level.recipe["encoding"], [level]))
            yield level


def _asks(case: _Case) -> None:
    case.asked.clear()
    case.run(case.task())
    hidden = {name for name in case.entry.needs if find_statistic(name).of == "hidden"}
    unused = case.entry.needs - hidden - {name for _, name in case.asked}
    demand(not unused, f"it needs {sorted(unused)}, and never looks at it")


def _task_unchanged(case: _Case) -> None:
    given: list[Tensor] = []

    def remembered(tensor: Tensor) -> Tensor:
        given.append(tensor)
        return tensor

    keep = not _refuses_pruned(case)
    task, untouched = case.task(keep=keep, spoil=remembered), case.task(keep=keep)
    before = None if task.block is None else {unit: task.block.network.weight(u) for unit, u in task.units.items()}
    before = None if before is None else {unit: weight.clone() for unit, weight in before.items()}
    case.run(task)
    demand_same_tensors(task.weights, untouched.weights, "afterwards")
    demand_same_tensors(task.keep, untouched.keep, "afterwards")
    fresh = _remade(case)
    for number, tensor in enumerate(given):
        demand(any(same_bits(tensor, other) for other in fresh), f"statistic {number} that it read is another one now")
    if task.block is not None and before is not None:
        after = {unit: task.block.network.weight(u) for unit, u in task.units.items()}
        demand_same_tensors(after, before, "afterwards, in the network,")


def _remade(case: _Case) -> list[Tensor]:
    """Every statistic that the method may read, taken anew."""
    task = case.task()
    names = [name for name in case.entry.needs if find_statistic(name).of != "hidden"]
    return [task.statistic(unit, name) for unit in task.weights for name in names]


def _bfloat16(case: _Case) -> None:
    stored = case.run(case.task(lambda weight: weight.bfloat16()))
    widened = case.run(case.task(lambda weight: weight.bfloat16().float()))
    _demand_equal_weights(stored, widened, "of the same values in bfloat16", rounded=True)


def _layout(case: _Case) -> None:
    plain, turned = case.run(case.task()), case.run(case.task(lambda weight: weight.T.contiguous().T))
    _demand_equal_weights(turned, plain, "of a transposed layout")


def _demand_equal_weights(
    found: Mapping[str, list[Level]], expected: Mapping[str, list[Level]], when: str, *, rounded: bool = False
) -> None:
    """With `rounded`, levels that say that their values are bfloat16 may be the rounded others."""
    import torch

    for name, levels in expected.items():
        for one, other in zip(found[name], levels, strict=True):
            if not one.n_weights:
                continue  # of a half-block
            weight = other.decode()
            if rounded and one.recipe.get("dtype") == "bfloat16":
                weight = weight.bfloat16().float()
            demand(torch.equal(one.decode(), weight), f"{when}, level {one.name} of {name} is another one")


def _weights_not_finite(case: _Case) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        task = case.task()
        weight = next(iter(task.weights.values()))
        weight[2, 3] = bad
        error = refusal(NotFinite, f"a weight with {bad}", partial(case.run, task))
        expected = f"1 NaN or Inf among its {weight.numel()} values"
        demand(expected in error.message, f"the message does not say '{expected}': {error.message}")


def _statistics_not_finite(case: _Case) -> None:
    def spoiled(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.flatten()[3] = float("nan")
        return tensor

    try:
        made = case.run(case.task(spoil=spoiled))
    except NotFinite:
        return
    _demand_finite(made)


def _zeros(case: _Case) -> None:
    def with_zeros(weight: Tensor) -> Tensor:
        weight[1] = 0  # a whole row
        weight[:, 4] = 0
        return weight

    made = case.run(case.task(with_zeros, spoil=_without_channel))
    _demand_finite(made)
    task = case.task()
    name, weight = next(iter(task.weights.items()))
    weight.zero_()
    for level in case.run(task)[name]:
        demand(not level.decode().any(), f"level {level.name} of a weight of zeros is not zero")


def _without_channel(statistic: Tensor) -> Tensor:
    """The statistic of a unit one of whose inputs is always zero: a row and a column of a square one, else a column."""
    statistic = statistic.clone()
    statistic[..., 5] = 0
    if statistic.shape[-2:] == (statistic.shape[-1],) * 2:
        statistic[..., 5, :] = 0
    return statistic


def _constants(case: _Case) -> None:
    def constant_column(weight: Tensor) -> Tensor:
        weight[:, 2] = 0.25
        return weight

    for edit in (constant_column, lambda weight: weight.fill_(0.25)):
        _demand_finite(case.run(case.task(edit)))


def _dependent_inputs(case: _Case) -> None:
    def one_twice(X: Tensor) -> Tensor:
        X = X.clone()
        X[:, 1], X[:, 3] = X[:, 0], 1.5  # one input twice, another constant
        return X

    def indefinite(statistic: Tensor) -> Tensor:
        if statistic.shape[-2:] != (statistic.shape[-1],) * 2:
            return statistic
        less = statistic.diagonal().max() / 2
        return statistic - less * statistic.new_ones(len(statistic)).diag()

    for edits in ({"fewer": one_twice}, {"fewer": lambda X: X[:3]}, {"fewer": lambda X: X[:1]}, {"spoil": indefinite}):
        try:
            made = case.run(case.task(**edits))
        except NotFinite:
            continue
        _demand_finite(made)


def _any_shape(case: _Case) -> None:
    if case.entry.scope == "block":
        return
    for shape in ((1, 1), (1, 13), (13, 1), (7, 11), (26, 22)):
        for levels in case.run(case.task(shape=shape)).values():
            for level in levels:
                demand(level.shape == shape, f"level {level.name} of a weight of {shape} is of {level.shape}")
                found = level.decode()
                demand(tuple(found.shape) == shape, f"level {level.name} of {shape} decodes to {tuple(found.shape)}")
                demand(found.isfinite().all(), f"level {level.name} of a weight of {shape} has NaN or Inf")


def _not_gathered(case: _Case) -> None:
    if all(find_statistic(name).of == "hidden" for name in case.entry.needs):
        return

    def missing(unit: str, name: str) -> Tensor:
        raise UsageError(f"the statistics have no {name}")

    error = refusal(
        UsageError, "a statistic that was not gathered", lambda: case.run(replace(case.task(), statistic=missing))
    )
    demand("the statistics have no" in error.message, f"the message is another one: {error.message}")


def _demand_finite(made: Mapping[str, list[Level]]) -> None:
    for name, levels in made.items():
        for level in levels:
            finite = not level.n_weights or level.decode().isfinite().all()
            demand(finite, f"level {level.name} of {name} has NaN or Inf")


def _refuses_pruned(case: _Case) -> bool:
    """Whether it makes nothing of a weight that was pruned before, which it must then say."""
    try:
        case.run(case.task(keep=True))
    except NotFinite as error:
        demand("pruned before" in error.message, f"it refuses a pruned weight without saying why: {error.message}")
        return True
    return False


def _pruned(case: _Case) -> None:
    if _refuses_pruned(case):
        return
    task = case.task(keep=True)
    for name, levels in case.run(task).items():
        for level in levels if name in task.keep else ():
            lost = level.decode()[~task.keep[name]]
            demand(not lost.any(), f"{int((lost != 0).sum())} pruned weights of level {level.name} are not zero")


def _zeros_as_said(case: _Case) -> None:
    task = case.task()
    for name, levels in case.run(task).items():
        for level in levels:
            share, pattern = level.recipe.get("sparsity"), level.recipe.get("pattern")
            zeros = level.decode() == 0
            if pattern is not None:
                _demand_pattern(level, zeros, *map(int, pattern.split(":")))
            elif level.recipe.get("block") is not None:
                _demand_blocks(level, zeros, *level.recipe["block"])
            elif share is not None:
                gone = math.ceil(share * level.n_weights - 1e-6)  # a product of floats may miss a whole number
                said = f"level {level.name} of {name} says that {share:.4g} of its {level.n_weights} weights are zero"
                demand(zeros.sum() >= gone, f"{said}, and {int(zeros.sum())} are")
                demand(level.parameters == level.n_weights - gone, f"{said}, and that it keeps {int(level.parameters)}")


def _demand_blocks(level: Level, zeros: Tensor, rows: int, columns: int) -> None:
    """So many blocks, smaller ones at the ends among them, are zero, and all else is kept."""
    sizes, found = [], []
    for top in range(0, level.shape[0], rows):
        for left in range(0, level.shape[1], columns):
            block = zeros[top : top + rows, left : left + columns]
            sizes.append(block.numel())
            found.append(bool(block.all()))
    least = math.ceil(level.recipe["sparsity"] * len(sizes) - 1e-6)
    said = f"level {level.name} says that {least} of its {len(sizes)} blocks of {rows} x {columns} are zero"
    demand(sum(found) >= least, f"{said}, and {sum(found)} are")
    kept = sum(size for size, gone in zip(sizes, found, strict=True) if not gone)
    demand(level.parameters >= kept, f"{said}, and keeps {int(level.parameters)} weights where {kept} are not")
    fewest = sum(sorted(sizes)[: len(sizes) - least])
    most = sum(sorted(sizes, reverse=True)[: len(sizes) - least])
    demand(fewest <= level.parameters <= most, f"{said}, and keeps {int(level.parameters)} weights")


def _demand_pattern(level: Level, zeros: Tensor, n: int, m: int) -> None:
    """N of every M neighbours are kept; of r at the end of a row ceil(r · N / M)."""
    kept = 0
    for start in range(0, level.shape[1], m):
        group = zeros[:, start : start + m]
        most = -(-group.shape[1] * n // m)
        found = int((~group).sum(1).max())
        demand(
            found <= most,
            f"level {level.name} says {n}:{m}, and {found} of columns {start} to {start + group.shape[1] - 1} are kept",
        )
        kept += most * len(zeros)
    demand(level.parameters == kept, f"level {level.name} says that it keeps {int(level.parameters)}, not {kept}")


def _errors(case: _Case) -> None:
    from layerwise.stages.levels.database import describe_levels

    task = case.task()
    hessian = find_statistic("hessian")
    for name, levels in case.run(task).items():
        H = hessian.measure(case.inputs(task.units[name]))
        described = {entry.name: entry for entry in describe_levels(levels, task.weights[name], H)}
        for fewer, more in itertools.pairwise(sorted(levels, key=lambda level: level.bits)):
            worse, better = described[fewer.name].output_error, described[more.name].output_error
            demand(
                fewer.bits == more.bits or (worse is not None and better is not None and better <= worse),
                f"of {name}, {more.name} has an error of {better:.3g}, and {fewer.name} with fewer bits {worse:.3g}",
            )


# --- of those that make levels of parents -----------------------------------------------------------------------------


def _parents_encoded(case: _Case) -> None:
    for levels in case.run(case.task()).values():
        for level in levels:
            demand(level.shape == (0, 0), f"level {level.name} of a parent is of {level.shape}")
            keep_all(encoding_promises(level.recipe["encoding"], [level]))


# --- of those that make levels of half-blocks and of the units inside ------------------------------------------------


def _half_encoded(case: _Case) -> None:
    demand(list(_said_right(case)), "it makes no levels")


def _half_narrower(case: _Case) -> None:
    """What a channel that went reads and writes must not matter: the columns of the projection are zero there."""
    task = case.task()
    made, channels = case.run(task), task.channels
    assert channels is not None
    for level in made[channels.out]:
        from layerwise.stages.models.channels import places

        written = level.decode().any(0)
        columns = [places(channels.columns, [group], level.shape[1]) for group in range(channels.groups)]
        used = sum(bool(written[some].any()) for some in columns)
        demand(0 < used < channels.groups, f"level {level.name} uses {used} of {channels.groups} groups")


Check = Callable[[_Case], None]

EVERY: dict[str, Check] = {
    "parameters survive a workflow file, the key and the way to a worker": _parameters,
    "levels of every unit come in the order of their announced names": _names,
    "bits that are announced are those of the levels": _bits,
    "the same task gives the same levels, bit for bit": _same,
    "a fallback makes the same levels without statistics": _fallback,
}
"""Of every method, one that makes no levels included."""

PARENTS: dict[str, Check] = {
    "levels of parents are encoded as such": _parents_encoded,
}

HALVES: dict[str, Check] = {
    "levels have the shape of their unit, say how they were made, and keep what their encoding promises": _half_encoded,
    "some groups of the half-block go, and not all": _half_narrower,
    "the statistics that are read are those that `needs` names": _asks,
    "weights in any layout of memory give the same levels": _layout,
    "neither weights nor statistics are changed": _task_unchanged,
    "a weight that is not finite is refused": _weights_not_finite,
    "a statistic that is not finite is refused, or does no harm": _statistics_not_finite,
    "rows of zeros and inputs that are always zero do no harm": _zeros,
    "weights that are all the same do no harm": _constants,
    "inputs that depend on each other, few tokens and a Hessian that is not positive definite do no harm, or are "
    "refused": _dependent_inputs,
    "a statistic that was not gathered is missed": _not_gathered,
    "what an earlier pruning left at zero stays so, or it says that it cannot": _pruned,
}
"""Of methods of scope `half`, which make levels of a half-block and of the units inside; what is kept of a weight may
be stored, and so rounded, in the dtype of the checkpoint."""

WEIGHTS: dict[str, Check] = {
    "levels have the shape of their weight, say how they were made, and keep what their encoding promises": _encoded,
    "the statistics that are read are those that `needs` names": _asks,
    "neither weights nor statistics nor the network are changed": _task_unchanged,
    "weights in bfloat16 are taken for the values that they have": _bfloat16,
    "weights in any layout of memory give the same levels": _layout,
    "a weight that is not finite is refused": _weights_not_finite,
    "a statistic that is not finite is refused, or does no harm": _statistics_not_finite,
    "rows of zeros and inputs that are always zero do no harm": _zeros,
    "weights that are all the same do no harm": _constants,
    "inputs that depend on each other, few tokens and a Hessian that is not positive definite do no harm, or are "
    "refused": _dependent_inputs,
    "a weight may have any shape, one row, one column and widths without a Hadamard matrix among them": _any_shape,
    "a statistic that was not gathered is missed": _not_gathered,
    "what an earlier pruning left at zero stays so, or it says that it cannot": _pruned,
    "a level has as many zeros as its recipe says, in that pattern": _zeros_as_said,
    "the error falls with the bits": _errors,
}
