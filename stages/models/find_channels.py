"""Finds out which rows and columns of a half-block's weights belong to one head, or to one channel of an MLP.

Names and configurations suggest it, and the network decides: where some groups have their columns of the output
projection at zero, whatever stands in their rows must not change the block's answer, and where they have not, it must.
A layout that passes is right whatever the family; one in which heads look at each other (a norm over all of them, as
OLMo 2 has it) passes in no form, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.stages.models.channels import Channels, Segments, index
from layerwise.stages.models.installed import installed, laid_out
from layerwise.stages.models.network import Unit

if TYPE_CHECKING:
    from layerwise.stages.contract import ModelSource
    from layerwise.stages.models.in_blocks import InBlocks, Stream

TOKENS = 8
"""Positions of the trial."""

SAME = 1e-5
"""Relative: what rows that do not count may change by rounding. They change the sums of float32 kernels by nothing."""

Found = Channels | str
"""Or why a half-block cannot be narrowed."""


def find_channels(source: ModelSource) -> dict[str, Any]:
    """What can go from each half-block, by its name: `Channels` as JSON, or under `refused` why nothing can."""
    from layerwise.stages.models.loading import load_network

    network = load_network(source, block_by_block=True)
    roles = {half.name: half.role for half in network.parents}
    return {
        half: {"role": roles[half], "refused": one} if isinstance(one, str) else one.as_json()
        for half, one in channels_of(network).items()
    }


@torch.no_grad()
def channels_of(network: InBlocks) -> dict[str, Found]:
    """The same of a loaded network."""
    config = getattr(network.model, "config", None)
    if config is None:
        return {half.name: "it is no language model" for half in network.parents if half.role != "block"}
    text = config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, text.vocab_size, (2, TOKENS), generator=generator).to(network.device)
    stream = network.begin(ids)
    hidden, found = stream.hidden, dict[str, Found]()
    for block in range(network.n_blocks):
        network.bring(block)
        for half in network.parents:
            if half.block == block and half.role != "block":
                found[half.name] = _Half(network, half, hidden, stream).found(text)
        hidden = network.run_block(block, hidden, stream)
    return found


class _Half:
    """One half-block with the input of its block."""

    def __init__(self, network: InBlocks, half: Unit, hidden: Tensor, stream: Stream) -> None:
        self.network, self.half, self.hidden, self.stream = network, half, hidden, stream
        self.units = {unit.name: unit for unit in network.units if unit.parent == half.name}

    def found(self, config: Any) -> Found:
        """The first layout that the network agrees to, or why there is none."""
        strange = [unit.name for unit in self.units.values() if unit.role != "linear"]
        if strange:
            return f"{strange[0]} is no linear layer: experts and routers have widths of their own"
        width = self.hidden.shape[-1]
        apart = [
            (out, readers)
            for out in reversed(self.units.values())
            if out.shape[0] == width
            and (readers := [unit for unit in self.units.values() if unit is not out])
            and all(unit.shape[1] == width for unit in readers)
        ]
        if not apart:
            return "it is not made of layers that read the hidden state and one that writes it"
        tensors = [unit.view.tensor for unit in self.units.values() if unit.view is not None]
        shared = [name for name, count in self._uses(tensors).items() if count > 1]
        if shared:
            return f"{shared[0]} is shared with another part of the model"
        for out, readers in apart:
            layouts = _heads(config, readers, out) if self.half.role == "attention" else _channels(readers, out)
            for groups, heads, columns, rows in layouts:
                channels = Channels(self.half.name, self.half.role, groups, heads, out.name, columns, rows)
                if groups > 1 and self._agrees(channels):
                    return channels
        if self.half.role == "attention":
            return "its heads share their keys and values, or look at each other, or lie in an order that is not known"
        return "its channels look at each other, or lie in an order that is not known"

    def _uses(self, tensors: Sequence[str]) -> dict[str, int]:
        """How many parameters' names lead to each of some tensors."""
        return {
            name: sum(other is self.network.parameter(name) for other in self.network.parameters.values())
            for name in tensors
        }

    def _agrees(self, channels: Channels) -> bool:
        """Whether the network answers as the layout says."""
        gone = list(range(0, channels.groups, 2))
        out = self.units[channels.out]
        generator = torch.Generator().manual_seed(1)
        narrowed = self.network.weight(out).clone()
        narrowed[:, index(channels.columns, gone, narrowed, 1)] = 0
        changed = {}
        for name, segments in channels.rows.items():
            weight = self.network.weight(self.units[name]).clone()
            rows = index(segments, gone, weight, 0)
            noise = torch.randn((len(rows), weight.shape[1]), generator=generator).to(weight)
            weight[rows] += noise * weight.float().std().to(weight)
            changed[name] = weight
        before, after = self._run({out.name: narrowed}), self._run({out.name: narrowed, **changed})
        if not torch.allclose(before, after, rtol=SAME, atol=SAME * float(before.abs().max())):
            return False
        # Of each reader by itself, or a layout that leaves one out would pass.
        plain = self._run({})
        return all(not torch.equal(plain, self._run({name: weight})) for name, weight in changed.items())

    def _run(self, weights: Mapping[str, Tensor]) -> Tensor:
        replaced = {self.units[name]: laid_out(self.network, self.units[name], w) for name, w in weights.items()}
        with installed(self.network, replaced):
            assert self.half.block is not None
            return self.network.run_block(self.half.block, self.hidden, self.stream).float()


Layout = tuple[int, int, Segments, dict[str, Segments]]
"""Groups, query heads of each, columns, rows."""


def _channels(readers: Sequence[Unit], out: Unit) -> Iterator[Layout]:
    """Layouts of an MLP of so many channels: each reader has a row for each, or two, one half below the other or in
    turns."""
    n = out.shape[1]
    if any(unit.shape[0] not in (n, 2 * n) for unit in readers):
        return
    for twice in (((0, 1), (n, 1)), ((0, 2),)):
        rows: dict[str, Segments] = {unit.name: ((0, 1),) if unit.shape[0] == n else twice for unit in readers}
        yield n, 1, ((0, 1),), rows


def _heads(config: Any, readers: Sequence[Unit], out: Unit) -> Iterator[Layout]:
    """Layouts of an attention: queries, keys and values apart or in one weight, one below the other or by groups."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads < 1 or out.shape[1] % heads:
        return
    size = out.shape[1] // heads
    said = [getattr(config, name, None) for name in ("num_key_value_heads", "num_kv_heads")]
    for groups in dict.fromkeys((*said, heads)):
        if not isinstance(groups, int) or groups < 1 or heads % groups:
            continue
        query = heads // groups * size
        columns: Segments = ((0, query),)
        if len(readers) == 1:
            whole = readers[0]
            if whole.shape[0] != groups * (query + 2 * size):
                continue
            below: Segments = ((0, query), (groups * query, size), (groups * (query + size), size))
            for segments in (below, ((0, query + 2 * size),)):
                yield groups, heads // groups, columns, {whole.name: segments}
        elif all(unit.shape[0] in (groups * query, groups * size) for unit in readers):
            rows: dict[str, Segments] = {unit.name: ((0, unit.shape[0] // groups),) for unit in readers}
            yield groups, heads // groups, columns, rows
