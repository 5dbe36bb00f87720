"""What touches the residual stream of a network: found by what it does, not by what a family calls it.

A few random hidden states run through each part of the network, and

- a *norm* is a module that answers alike when its input is scaled. From its answers to probes follow its gain and bias,
  and whether it subtracts the mean. It stands on the stream if it gets the block's very input when all weights of the
  block are zero, so that every branch adds nothing;
- a *reader* is a unit whose inputs are the answers of such a norm, or the stream itself, up to a factor for each token
  (a router's weight);
- a *writer* is a unit whose output arrives in the stream as it is: with `u vᵀ` added to its weight W, the next point
  where the stream is seen moves along u, by any factor for each token. In the same way, parameters whose rows are added
  (embeddings, positions, biases) are those whose change along u arrives along u;
- a *branch norm* is a norm whose output arrives in that way: it stands between a branch and the stream.

Left out: what is added to the stream and is no parameter (a table of sines). Whoever uses this checks the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.errors import UnsupportedModel
from layerwise.stages.models.inputs import observed
from layerwise.stages.models.installed import installed, laid_out
from layerwise.stages.models.network import BEGIN, Unit, View
from layerwise.stages.models.units import first_tensor

if TYPE_CHECKING:
    from layerwise.stages.models.causal_lm import CausalLM

TRIAL = (2, 16)
"""Batch and length of the hidden states that the parts are tried on."""

PARALLEL = 1e-3
"""Rows are parallel if no more than this share of them stands across. Rounding in float32 leaves some 1e-6; of random
directions in 16 dimensions not one in 1e40 is so close."""


@dataclass(frozen=True)
class Norm:
    """A norm over the channels of the stream: `n(x) * gain + bias`, n(x) being x over its root mean square.

    Args:
        name: of its module.
        gain: (width,), float64.
        bias: (width,), float64; zero where it has none.
        centred: n subtracts the mean first, as LayerNorm does.
        weight: the parameter that the gain comes from; None if it is fixed.
        neutral: the value of that parameter at which the gain is one: 1, or 0 of a norm that multiplies by 1 + weight.
        shift: the parameter that is the bias, or None.
    """

    name: str
    gain: Tensor
    bias: Tensor
    centred: bool
    weight: str | None
    neutral: float
    shift: str | None

    @property
    def even(self) -> bool:
        """Whether all channels have one gain."""
        return bool(self.gain.max() - self.gain.min() <= 1e-6 * self.gain.abs().max())


@dataclass
class Residual:
    """What touches the residual stream.

    Args:
        width: channels of the stream.
        norms: by name, those that stand on the stream in front of what reads it.
        branch_norms: those between a branch and the stream.
        readers: with the norm that they read through, None for those that read the stream itself.
        writers: units whose output is added to it.
        rows: parameters of which every row along the last dimension is added to it.
    """

    width: int
    norms: dict[str, Norm] = field(default_factory=dict)
    branch_norms: list[Norm] = field(default_factory=list)
    readers: list[tuple[Unit, Norm | None]] = field(default_factory=list)
    writers: list[Unit] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)

    @property
    def centred(self) -> bool:
        """Whether any norm subtracts the mean."""
        return any(norm.centred for norm in (*self.norms.values(), *self.branch_norms))


def find_residual(network: CausalLM) -> Residual:
    """Find what touches the stream of a network.

    Raises:
        UnsupportedModel: a block does not pass the stream on, or a norm on it has a gain of an unknown form.
    """
    with torch.no_grad():
        return _Finder(network).find()


@dataclass(frozen=True)
class _Call:
    """One call of a module: its name, input and output, as rows of the stream's width."""

    name: str
    inputs: Tensor
    outputs: Tensor


Run = Callable[[], Tensor]
"""Runs a part of the network and gives what comes out of it."""


class _Finder:
    def __init__(self, network: CausalLM) -> None:
        self.network = network
        self.generator = torch.Generator().manual_seed(0)
        self.stream = network.begin(_tokens(network, self.generator))
        self.width = self.stream.hidden.shape[-1]
        # Random rather than real hidden states: these may have channels so large that they drown what is measured.
        self.hidden = self._random(*self.stream.hidden.shape).to(self.stream.hidden)
        self.direction = self._random(self.width)
        self.found = Residual(self.width)
        inside = f"{network.block_path}."
        self.of_blocks = {name for name in network.parameters if name.startswith(inside)}
        modules = network.model.named_modules()
        self.outside = {name: module for name, module in modules if not name.startswith(inside)}
        self.own_tensors = {unit.view.tensor for unit in network.units if unit.view is not None}

    def find(self) -> Residual:
        self._before_the_blocks()
        for block in range(self.network.n_blocks):
            self._in_block(block)
        self._behind_the_blocks()
        return self.found

    # --- the parts ---

    def _before_the_blocks(self) -> None:
        def run() -> Tensor:
            return self.network.begin(self.stream.ids).hidden

        norms = self._norms(self._watch(run, self.outside))
        self._branch_norms(run, norms, ())
        points = [norm.name for norm in self.found.branch_norms]
        parameters = [name for name, _ in self.network.model.named_parameters() if name not in self.of_blocks]
        linear = [unit for unit in self._linear_outside() if unit.shape[0] == self.width]
        self._rows(run, parameters, points)
        self._writers(run, {unit.name: [unit] for unit in linear}, points)

    def _in_block(self, block: int) -> None:
        network, path = self.network, f"{self.network.block_path}.{block}"

        def run() -> Tensor:
            return network.run_block(block, self.hidden, self.stream)

        modules = {f"{path}.{name}": module for name, module in network.blocks[block].named_modules() if name}
        parameters = [f"{path}.{name}" for name, _ in network.blocks[block].named_parameters()]
        calls = self._watch(run, modules)
        norms = self._norms(calls)
        with self._zeroed(parameters):
            silent = self._watch(run, modules)
            output = run()
        if not _along(output, self.hidden):
            raise UnsupportedModel(
                f"{path} changes the residual stream itself: with all its weights at zero it does not give back its "
                "input, as where a norm stands behind the addition",
                hint="a transform of the stream needs a model whose branches are added to it",
            )
        on_stream = [call.name for call in silent if call.name in norms and _along(call.inputs, self.hidden)]
        self._branch_norms(run, {name: norm for name, norm in norms.items() if name not in on_stream}, on_stream)
        points = [*on_stream, *(norm.name for norm in self.found.branch_norms if norm.name in norms)]
        units = [unit for unit in network.units if unit.block == block]
        self._readers(run, _by_kind(units, lambda unit: unit.shape[1] == self.width), calls, norms, on_stream)
        self._writers(run, _by_kind(units, lambda unit: unit.shape[0] == self.width), points)
        self._rows(run, [name for name in parameters if name not in self.own_tensors], points)

    def _behind_the_blocks(self) -> None:
        def run() -> Tensor:
            return self.network.end(self.hidden, self.stream)

        calls = self._watch(run, self.outside)
        norms = self._norms(call for call in calls if _along(call.inputs, self.hidden))
        linear = [unit for unit in self._linear_outside() if unit.shape[1] == self.width]
        self._readers(run, {unit.name: [unit] for unit in linear}, calls, norms, list(norms))

    def _linear_outside(self) -> list[Unit]:
        """The linear layers outside of the blocks: the head, and projections that are no units."""
        known = {unit.name: unit for unit in self.network.units}
        found = []
        for name, module in self.outside.items():
            if isinstance(module, nn.Linear):
                shape = (module.weight.shape[0], module.weight.shape[1])
                found.append(
                    known.get(name) or Unit(name, name, "linear", None, shape, (BEGIN,), View(f"{name}.weight"))
                )
        return found

    # --- what is found in a part ---

    def _readers(
        self,
        run: Run,
        kinds: Mapping[str, Sequence[Unit]],
        calls: Sequence[_Call],
        norms: Mapping[str, Norm],
        on_stream: Sequence[str],
    ) -> None:
        seen: dict[str, list[Tensor]] = {}
        units = [unit for members in kinds.values() for unit in members]
        with observed(self.network, units, lambda unit, rows, _: seen.setdefault(unit.kind, []).append(rows.clone())):
            run()
        sources: list[tuple[Norm | None, Tensor]] = [
            (norms[call.name], call.outputs) for call in calls if call.name in on_stream
        ]
        raw = torch.cat([self.hidden.flatten(0, -2), *(call.inputs for call in calls if call.name in on_stream)])
        for kind, rows in seen.items():
            for norm, outputs in [*sources, (None, raw)]:
                if _along(torch.cat(rows), outputs):
                    self.found.readers += [(unit, norm) for unit in kinds[kind]]
                    break
        self.found.norms |= {name: norms[name] for name in on_stream}

    def _writers(self, run: Run, kinds: Mapping[str, Sequence[Unit]], points: Sequence[str]) -> None:
        for units in kinds.values():
            if self._arrives(run, points, self._units_moved(units)):
                self.found.writers += units

    def _rows(self, run: Run, parameters: Sequence[str], points: Sequence[str]) -> None:
        for name in parameters:
            shape = self.network.parameter(name).shape
            if len(shape) and shape[-1] == self.width and self._arrives(run, points, self._rows_moved(name)):
                self.found.rows.append(name)

    def _branch_norms(self, run: Run, norms: Mapping[str, Norm], points: Sequence[str]) -> None:
        self.found.branch_norms += [
            norm for name, norm in norms.items() if self._arrives(run, points, self._output_moved(name))
        ]

    # --- how it is found out ---

    def _watch(self, run: Run, modules: Mapping[str, nn.Module]) -> list[_Call]:
        """The calls of modules without parts that map states of the stream's width to such, in their order."""
        calls: list[_Call] = []

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
                if not tensors or not isinstance(output, Tensor) or not output.is_floating_point():
                    return
                hidden = first_tensor(args, kwargs)
                if hidden.shape == output.shape and hidden.shape[-1:] == (self.width,):
                    calls.append(_Call(name, hidden.reshape(-1, self.width), output.reshape(-1, self.width)))

            return hook

        with ExitStack() as stack:
            for name, module in modules.items():
                if not any(True for _ in module.children()):
                    stack.callback(module.register_forward_hook(keep(name), with_kwargs=True).remove)
            run()
        return calls

    def _norms(self, calls: Any) -> dict[str, Norm]:
        """Those of the modules called that are norms."""
        found = {name: self._probed(name) for name in dict.fromkeys(call.name for call in calls)}
        return {name: norm for name, norm in found.items() if norm is not None}

    def _probed(self, name: str) -> Norm | None:
        """What a module does to the channels; None if it is no norm."""
        module = self.network.module(name)
        # Large, so that no epsilon shows; with a mean, so that it shows who subtracts it.
        probe = 1e3 * (self._random(1, 8, self.width) + 1)
        try:
            plus, twice, minus = (module(factor * probe)[0].double() for factor in (1.0, 2.0, -1.0))
        except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):  # it takes something else
            return None
        if not torch.allclose(twice, plus, rtol=1e-4, atol=1e-5) or not torch.isfinite(plus).all():
            return None
        odd, bias = (plus - minus) / 2, ((plus + minus) / 2).mean(0)
        rows = probe[0].double()
        for centred in (False, True):
            n = rows - rows.mean(1, keepdim=True) if centred else rows
            n = n / n.square().mean(1, keepdim=True).sqrt()
            gain = (odd * n).sum(0) / n.square().sum(0)
            if (odd - n * gain).norm() <= 1e-4 * odd.norm():
                return self._named(name, module, gain, bias, centred)
        return None

    def _named(self, name: str, module: nn.Module, gain: Tensor, bias: Tensor, centred: bool) -> Norm:
        """A norm with the parameters that its gain and bias come from, and their exact values."""
        vectors = {
            f"{name}.{own}": parameter.detach().double()
            for own, parameter in module.named_parameters(recurse=False)
            if parameter.shape == (self.width,)
        }
        weight, neutral, shift = None, 1.0, None
        for parameter, value in vectors.items():
            for base in (0.0, 1.0):
                if weight is None and torch.allclose(gain, base + value, rtol=1e-4, atol=1e-5):
                    weight, neutral, gain = parameter, 1.0 - base, base + value
        for parameter, value in vectors.items():
            if parameter != weight and torch.allclose(bias, value, rtol=1e-4, atol=1e-5):
                shift, bias = parameter, value
        if weight is None and torch.allclose(gain, torch.ones_like(gain), rtol=1e-4):
            gain = torch.ones_like(gain)
        if shift is None and bias.abs().max() <= 1e-5:
            bias = torch.zeros_like(bias)
        return Norm(name, gain, bias, centred, weight, neutral, shift)

    def _arrives(self, run: Run, points: Sequence[str], change: AbstractContextManager[None]) -> bool:
        """Whether a change along the direction is one along the direction at the first point that it reaches."""
        before = self._points(run, points)
        with change:
            after = self._points(run, points)
        for old, new in zip(before, after, strict=True):
            moved = (new - old).double()
            if moved.abs().max() > 1e-5 * old.abs().max():
                u = self.direction.double() / self.direction.double().norm()
                return bool((moved - torch.outer(moved @ u, u)).norm() <= PARALLEL * moved.norm())
        return False

    def _points(self, run: Run, names: Sequence[str]) -> list[Tensor]:
        """Where the stream is seen: the inputs of some norms, in the order of their calls, and what comes out."""
        points: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            points.append(first_tensor(args, kwargs).reshape(-1, self.width).clone())

        with ExitStack() as stack:
            for name in dict.fromkeys(names):
                handle = self.network.module(name).register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            output = run()
        return [*points, output.reshape(-1, self.width)]

    def _units_moved(self, units: Sequence[Unit]) -> AbstractContextManager[None]:
        weights = {}
        for unit in units:
            W = self.network.weight(unit)
            change = torch.outer(self.direction, self._random(unit.shape[1])).to(W)
            weights[unit] = laid_out(self.network, unit, W + change * (_size(W) / change.norm()))
        return installed(self.network, weights)

    def _rows_moved(self, name: str) -> AbstractContextManager[None]:
        before = self.network.parameter(name).data
        change = self._random(*before.shape[:-1], 1).to(before) * self.direction.to(before)
        return self._replaced({name: before + change * (_size(before) / change.norm())})

    @contextmanager
    def _output_moved(self, name: str) -> Iterator[None]:
        handle = self.network.module(name).register_forward_hook(
            lambda module, args, output: output + self.direction.to(output)
        )
        try:
            yield
        finally:
            handle.remove()

    def _zeroed(self, parameters: Sequence[str]) -> AbstractContextManager[None]:
        kept = {name: self.network.parameter(name).data for name in parameters}
        return self._replaced({name: tensor.new_zeros(()).expand(tensor.shape) for name, tensor in kept.items()})

    @contextmanager
    def _replaced(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        before = {name: self.network.parameter(name).data for name in tensors}
        try:
            for name, tensor in tensors.items():
                self.network.parameter(name).data = tensor
            yield
        finally:
            for name, tensor in before.items():
                self.network.parameter(name).data = tensor

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def _tokens(network: CausalLM, generator: torch.Generator) -> Tensor:
    config: Any = network.model.config
    return torch.randint(0, max(1, int(config.get_text_config().vocab_size)), TRIAL, generator=generator)


def _by_kind(units: Sequence[Unit], wanted: Callable[[Unit], bool]) -> dict[str, list[Unit]]:
    """Units by kind: all experts together, because a few tokens do not reach each of them."""
    found: dict[str, list[Unit]] = {}
    for unit in units:
        if wanted(unit):
            found.setdefault(unit.kind, []).append(unit)
    return found


def _size(tensor: Tensor) -> float:
    """Norm of a change that is as large as what is changed; something to go by where that is zero."""
    size: float = tensor.norm().item()
    return size or float(tensor.numel()) ** 0.5


def _along(rows: Tensor, others: Tensor) -> bool:
    """Whether every row that is not zero, and there is one, is a multiple of one of the others."""
    a, b = (_directions(tensor) for tensor in (rows, others))
    if not len(a) or not len(b) or a.shape[1] != b.shape[1]:
        return False
    across = 1 - (a @ b.T).abs().amax(1).clamp(max=1)  # half the square of the sine
    return bool((across <= PARALLEL**2 / 2).all())


def _directions(tensor: Tensor) -> Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1]).double()
    sizes = rows.norm(dim=1)
    kept = sizes > 1e-6 * sizes.max() if len(sizes) else sizes > 0
    directions: Tensor = rows[kept] / sizes[kept, None]
    return directions
