"""The time of a whole forward pass: of a model on packed weights, and of the dense one.

The forward pass is the model's own, of a batch of random tokens without a cache, so `batch · tokens` rows go through
every unit.

Left out: decoding with a cache, where attention grows from token to token; experts, which see a part of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import UsageError
from layerwise.kernels.device import this_device
from layerwise.stages.contract import ModelSource

if TYPE_CHECKING:
    from layerwise.kernels.timing import Sampling


@dataclass(frozen=True)
class ForwardPass:
    """What is timed, and how.

    Args:
        model: the dense model.
        device: `cpu` or `cuda`.
        batch: sequences.
        tokens: of each sequence.
        sampling: how much is measured.
    """

    model: ModelSource
    device: str
    batch: int
    tokens: int
    sampling: Sampling


def time_loaded(work: ForwardPass) -> dict[str, Any]:
    """The dense model as transformers loads it; the fields of `Timing`."""
    from layerwise.stages.models.causal_lm import CausalLM

    return _time({"loaded": _forward(CausalLM.load(replace(work.model, device="cpu")).model, work)}, work)["loaded"]


def time_packed(
    work: ForwardPass, database: Path, levels: Mapping[str, str], table: Path, exact: bool
) -> dict[str, Any]:
    """The model of an allocation, and in turns with it that of all units dense, so that the two can be compared.

    The second is the same whatever the allocation drops: all linear layers of the database, packed as they are.

    Args:
        work: what is timed.
        database: holds the levels.
        levels: unit to level name.
        table: of this machine; it chooses the kernels of both.
        exact: let only kernels run that round nothing but their result.
    Returns:
        `packed` and `dense`, each as the fields of `Timing`.
    """
    from layerwise.stages.levels.database import DatabaseIndex

    units = DatabaseIndex(database).units
    models = {"packed": levels, "dense": {entry.name: None for entry in units if entry.unit.replaceable}}
    forwards = {name: _forward(_packed(work, database, of, table, exact), work) for name, of in models.items()}
    return _time(forwards, work)


def _packed(work: ForwardPass, database: Path, levels: Mapping[str, str | None], table: Path, exact: bool) -> Any:
    """A model with some units at some levels; at None, a unit runs as the dense weight that the model has.

    Linear layers run on kernels; whatever else has a level gets the weight that it decodes to. What is left of a narrow
    half-block runs as the whole, with zeros: only its dense export is smaller.
    """
    from layerwise.kernels.dense import Dense
    from layerwise.kernels.dispatch import Dispatcher
    from layerwise.kernels.latency_table import LatencyTable
    from layerwise.kernels.linear import replace_linears
    from layerwise.stages.apply.packed import pack_units
    from layerwise.stages.levels.database import UNCHANGED, Database
    from layerwise.stages.models.causal_lm import CausalLM

    here = this_device(work.device)
    dispatcher = Dispatcher(LatencyTable.load(table, here), here, exact=exact)
    known = Database(database, work.model)
    network = CausalLM.load(replace(known.model(work.model), device="cpu"))
    units = {unit.name: unit for unit in network.units}
    chosen = known.index.with_inside({unit: level for unit, level in levels.items() if level is not None})
    packed = pack_units(known, chosen)
    for name in levels:
        if name in units and units[name].replaceable and name not in packed:
            packed[name] = Dense(units[name].shape, network.weight(units[name]).contiguous())
    dropped = []
    for name, level in chosen.items():
        entry = known.index.by_name[name]
        if name in packed or level == entry.levels[UNCHANGED].name:
            continue
        if entry.is_parent:
            dropped += [] if known.index.inside(name, level) else [name]
        else:
            network.overwrite(entry.unit, known.level(name, level).decode())
    network.leave_out(dropped)
    return replace_linears(network.model, packed, dispatcher)


def _forward(model: Any, work: ForwardPass) -> Callable[[], object]:
    import torch

    _check_length(model, work)
    model = model.to(work.device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (work.batch, work.tokens), generator=generator).to(work.device)
    return lambda: model(input_ids=ids, use_cache=False)


def _time(forwards: Mapping[str, Callable[[], object]], work: ForwardPass) -> dict[str, dict[str, Any]]:
    """What each takes, measured in turns, as the fields of `Timing`."""
    from layerwise.kernels.timing import time_cpu, time_cuda

    timer = time_cpu if work.device == "cpu" else time_cuda
    calls = {name: [forward] for name, forward in forwards.items()}
    return {name: asdict(timing) for name, timing in timer(calls, work.sampling).items()}


def _check_length(model: Any, work: ForwardPass) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and work.tokens > longest:
        raise UsageError(
            f"the model takes sequences of at most {longest} tokens, not {work.tokens}", hint="lower tokens"
        )
