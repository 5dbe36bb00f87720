"""Finds the units of a network: every weight that something is multiplied by, and the half-blocks and blocks above
them.

Linear layers and convolutions are known by their module. Other parameters of two or three dimensions (the experts of a
mixture, a router) are known by their use: a few tokens run through each block, and whatever part of such a parameter
was a factor of a product is a unit, together with all parts of it that stand alike.

A half-block is known by what it does. Among the children of a block those that hold units are run again with the first
position of their input changed: where later positions answer differently, it mixes positions and is attention, else it
is (a part of) the feed-forward half. With all of them answering zero the block must give back its input; otherwise
their answers are not simply added to the hidden state, and only the block as a whole can be dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.stages.models.inputs import Products, alike
from layerwise.stages.models.network import BEGIN, Uncovered, Unit, View

if TYPE_CHECKING:
    from layerwise.stages.models.in_blocks import InBlocks, Stream

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers that serving engines join into one, because they read the same input."""


@dataclass(frozen=True)
class Answer:
    """What a module gives back, so far as it takes to give back zeros instead.

    Args:
        width: of the first tensor's last dimension.
        length: of the tuple that it is the first of; None if it comes alone.
    """

    width: int
    length: int | None

    @classmethod
    def of(cls, output: Any) -> Answer | None:
        """None for an answer of another form."""
        if isinstance(output, Tensor):
            return cls(output.shape[-1], None)
        if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
            return cls(output[0].shape[-1], len(output))
        return None

    def wrapped(self, first: Tensor) -> Any:
        """A tensor in the form of the answer."""
        return first if self.length is None else (first, *(None,) * (self.length - 1))

    def silent(self) -> Callable[..., Any]:
        """A forward that answers zeros without running."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = first_tensor(args, kwargs)
            return self.wrapped(hidden.new_zeros(*hidden.shape[:-1], self.width))

        return forward

    def passing_on(self) -> Callable[..., Any]:
        """A forward that answers its own input."""
        return lambda *args, **kwargs: self.wrapped(first_tensor(args, kwargs))


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a module: what is called so, else the first tensor that it gets."""
    if not args and isinstance(kwargs.get("hidden_states"), Tensor):
        hidden: Tensor = kwargs["hidden_states"]
        return hidden
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


@dataclass(frozen=True)
class Found:
    """The units of one block.

    Args:
        units: its weights, in the order of their modules.
        parents: the block, then its half-blocks; none where the network cannot do without the block.
        uncovered: what is no unit.
        silenced: by half-block, the modules that answer zero when it is dropped.
        one_piece: why the block has no half-blocks; empty where it has.
        output: hidden state after the block.
    """

    units: list[Unit]
    parents: list[Unit]
    uncovered: list[Uncovered]
    silenced: dict[str, dict[str, Answer]]
    one_piece: str
    output: Tensor


def units_of_block(network: InBlocks, index: int, hidden: Tensor, stream: Stream) -> Found:
    """Take one block apart, by running a few tokens through it.

    Args:
        network: with its blocks found.
        index: of the block.
        hidden: its input, (2, length, width).
        stream: how it is called.
    """
    block, path = network.blocks[index], network.block_names[index]
    network.bring(index)
    strays = dict(_stray_parameters(block, path))
    uses: dict[str, tuple[View, tuple[int, int]]] = {}
    rows: dict[str, int] = {}

    def seen(view: View, shape: tuple[int, int], X: Tensor) -> None:
        uses.setdefault(view.tensor, (view, shape))
        rows[view.tensor] = rows.get(view.tensor, 0) + int((X != 0).any(1).sum())

    calls = _Calls(dict(block.named_children()), path)
    with calls, Products(strays, seen):
        output = network.run_block(index, hidden, stream)

    n_tokens = hidden.shape[0] * hidden.shape[1]
    units, uncovered = [], []
    for name, module in block.named_modules():
        full = ".".join(filter(None, (path, name)))
        kind = name or full.rpartition(".")[2]
        unit = layer_unit(full, kind, index, module, _fused_group(index, kind, block))
        if unit is not None:
            units.append(unit)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            stray = ".".join(filter(None, (full, parameter_name)))
            if stray in uses:
                view, shape = uses[stray]
                views = alike(view, parameter)
                share = min(1.0, rows[stray] / (n_tokens * len(views)))
                units += [_stray_unit(name, index, path, one, shape, share) for one in views]
            elif stray in strays:
                uncovered.append(Uncovered(stray, index, parameter.numel(), "nothing was seen to be multiplied by it"))

    alone = not path or not units or any(unit.name == path for unit in units)
    if alone or output.shape != hidden.shape:
        why = "it is the network, or one layer, or holds none" if alone else "it gives its hidden state another shape"
        return Found(units, [], uncovered, {}, f"it cannot be left out: {why}", output)
    top = Unit(path, "block", "block", index, (0, 0), (index,))
    halves, silenced, why = _halves(network, index, hidden, stream, calls, units, top)
    inside = {
        name: half.name
        for half in halves
        for name in (unit.name for unit in units)
        if _within(name, silenced[half.name])
    }
    units = [replace(unit, parent=inside.get(unit.name, top.name)) for unit in units]
    return Found(units, [top, *halves], uncovered, silenced, why, output)


def _within(name: str, modules: dict[str, Answer]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def layer_unit(full: str, kind: str, index: int, module: nn.Module, group: str | None = None) -> Unit | None:
    """The unit that a module is, if it is one: a linear layer or a convolution.

    Args:
        full: its name.
        kind: its name inside its block.
        index: of the block.
        module: the module.
        group: what it is fused with.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear | Conv1D):
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.shape
        shape = (columns, rows) if transposed else (rows, columns)
        view = View(f"{full}.weight", transposed=transposed)
        return Unit(full, kind, "linear", index, shape, (index,), view, group)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        shape = (module.weight.shape[0], module.weight[0].numel())
        return Unit(full, kind, "conv", index, shape, (index,), View(f"{full}.weight"), groups=module.groups)
    return None


def _stray_parameters(block: nn.Module, path: str) -> Iterator[tuple[str, Tensor]]:
    """Weights of two and more dimensions that belong to no linear layer and no convolution."""
    from transformers.pytorch_utils import Conv1D

    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2:
                yield ".".join(part for part in (path, name, parameter_name) if part), parameter


def _stray_unit(module: str, index: int, path: str, view: View, shape: tuple[int, int], share: float) -> Unit:
    """The unit of a parameter, or of a part of one."""
    parameter = view.tensor.rpartition(".")[2]
    if view.whole:
        kind = module if parameter == "weight" else f"{module}.{parameter}"
        return Unit(f"{path}.{kind}", kind, "parameter", index, shape, (index,), view, share=share)
    number = view.index[0] if view.rows is None else view.rows[0] // (view.rows[1] - view.rows[0])
    kind = f"{module}.{parameter}"
    return Unit(f"{path}.{module}.{number}.{parameter}", kind, "expert", index, shape, (index,), view, share=share)


def _fused_group(index: int, kind: str, block: nn.Module) -> str | None:
    parent, _, leaf = kind.rpartition(".")
    for family in FUSED:
        members = [f"{parent}.{name}" if parent else name for name in family]
        if leaf in family and all(_has_submodule(block, member) for member in members):
            return f"{index}.{parent}.{'+'.join(family)}"
    return None


def _has_submodule(module: nn.Module, name: str) -> bool:
    return any(name == path for path, _ in module.named_modules())


# --- half-blocks ------------------------------------------------------------------------------------------------------


class _Calls:
    """How the children of a block were called, and what they answered, in the order of their calls."""

    def __init__(self, children: dict[str, nn.Module], path: str) -> None:
        self.made: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
        self._children = {f"{path}.{name}": child for name, child in children.items()}
        self._stack = ExitStack()

    def __enter__(self) -> _Calls:
        for name, child in self._children.items():
            handle = child.register_forward_hook(self._keep(name), with_kwargs=True)
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def _keep(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            # Some blocks add to an answer in place.
            self.made[name] = args, kwargs, _copied(output)

        return keep


def _copied(output: Any) -> Any:
    if isinstance(output, tuple | list):
        return tuple(map(_copied, output))
    return output.clone() if isinstance(output, Tensor) else output


def _halves(
    network: InBlocks, index: int, hidden: Tensor, stream: Stream, calls: _Calls, units: Sequence[Unit], top: Unit
) -> tuple[list[Unit], dict[str, dict[str, Answer]], str]:
    """The half-blocks, the modules that each silences, and why there are none."""
    if hidden.dim() != 3:
        return [], {}, "its hidden state is not a row for each position"
    silenced: dict[str, dict[str, Answer]] = {}
    halves: list[Unit] = []
    forward: dict[str, Answer] = {}
    for name, (args, kwargs, output) in calls.made.items():
        if not any(_within(unit.name, {name: Answer(0, None)}) for unit in units):
            continue
        answer = Answer.of(output)
        if answer is None:
            return [], {}, f"{name} answers with a {type(output).__name__}"
        if not _takes_hidden(args, kwargs, hidden.shape[:-1]):
            return [], {}, f"{name} works on something else than a row for each token"
        if _mixes_positions(network.module(name), args, kwargs, output):
            kind = name.removeprefix(f"{top.name}.")
            halves.append(Unit(name, kind, "attention", index, (0, 0), (index,), parent=top.name))
            silenced[name] = {name: answer}
        else:
            forward[name] = answer
    if forward:
        name = next(iter(forward)) if len(forward) == 1 else f"{top.name}.mlp"
        kind = name.removeprefix(f"{top.name}.")
        halves.append(Unit(name, kind, "mlp", index, (0, 0), (index,), parent=top.name))
        silenced[name] = forward
    everything = {module: answer for modules in silenced.values() for module, answer in modules.items()}
    try:
        with patched({network.module(name): answer.silent() for name, answer in everything.items()}):
            output = network.run_block(index, hidden, stream)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        return [], {}, f"it does not run without its halves: {error}"
    if not torch.allclose(output, hidden, rtol=1e-5, atol=1e-6, equal_nan=True):
        return [], {}, "its halves are not simply added to the hidden state"
    return halves, silenced, ""


def _takes_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], tokens: torch.Size) -> bool:
    """Whether the first tensor that a module gets is a row for each token; a convolution's has them in columns."""
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    return first is not None and first_tensor(args, kwargs).shape[:-1] in (tokens, (tokens.numel(),))


def _mixes_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    """Whether later positions answer differently when the first one is changed."""
    hidden = first_tensor(args, kwargs)
    changed = hidden.clone()
    position = (slice(None), 0) if hidden.dim() > 2 else (0,)
    changed[position] = changed[position].flip(-1) + 1
    args = tuple(changed if value is hidden else value for value in args)
    kwargs = {name: changed if value is hidden else value for name, value in kwargs.items()}
    with torch.no_grad():
        answer = module(*args, **kwargs)
    before, after = (value[0] if isinstance(value, tuple | list) else value for value in (output, answer))
    # Some answer with all tokens in one row.
    moved = (after - before).reshape(*hidden.shape[:-1], -1).abs().nan_to_num()
    later = moved[:, 1:] if hidden.dim() > 2 else moved[1:]
    return bool(later.max() > 1e-4 * moved.max())


@contextmanager
def patched(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules run other functions for a while."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward  # uncovers the class's own
            else:
                module.forward = own


# --- outside of the blocks --------------------------------------------------------------------------------------------


def units_outside(model: nn.Module, n_blocks: int) -> list[Unit]:
    """The embedding and the head; one unit, the head, where they share their weight."""
    embedding, head = _only(model, "get_input_embeddings"), _only(model, "get_output_embeddings")
    names = {module: name for name, module in model.named_modules()}
    found = []
    tied = embedding is not None and head is not None and embedding.weight is head.weight
    if isinstance(embedding, nn.Embedding) and not tied:
        found.append(_outside(names[embedding], "embedding", embedding, (BEGIN,), multiplied=False))
    if isinstance(head, nn.Linear):
        found.append(_outside(names[head], "head", head, (BEGIN, n_blocks) if tied else (n_blocks,)))
    return found


def _outside(name: str, role: Any, module: Any, positions: tuple[int, ...], *, multiplied: bool = True) -> Unit:
    shape = (module.weight.shape[0], module.weight.shape[1])
    return Unit(name, name, role, None, shape, positions, View(f"{name}.weight"), multiplied=multiplied)


def _only(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
