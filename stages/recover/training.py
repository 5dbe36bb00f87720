"""The loop that trains every repair: AdamW on a few free tensors, in stretches that end with a checkpoint.

A stretch begins from what a checkpoint holds, whether it was read or is still in memory, and which sequences a step
takes is a function of its number. So a training that was killed goes on to the same weights, bit for bit on a CPU. A
checkpoint is one safetensors file: free tensors, the moments of AdamW, the best free tensors so far, and the step.

Kept in the end is the state with the least loss on sequences that were not trained on. Where a loss is no longer finite
the training stops, and that state stays.

Left out: more than one device.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from layerwise.errors import DataError, NotFinite, UsageError
from layerwise.results.durable import settle_file
from layerwise.results.links import unfinished
from layerwise.stages.models.installed import as_parameters
from layerwise.stages.recover.losses import Answer, loss_of
from layerwise.stages.recover.parts import Scheduled
from layerwise.stages.recover.recomputed import recomputed

if TYPE_CHECKING:
    from layerwise.stages.models.causal_lm import CausalLM
    from layerwise.stages.recover.parts import Part
    from layerwise.stages.recover.training_params import TrainingParams

TEACHER_BYTES = 512 << 20
"""Of the teacher's answers to all sequences, which are kept if they fit, and else made anew at each step."""
TEACHER_BATCH = 8
"""Sequences that the teacher answers at a time: always the same together, so that its answers are the same bits."""

STATE = "state"
"""Key in the header of a checkpoint."""


@dataclass
class State:
    """Where a training stands.

    Args:
        step: steps made.
        best_step: after which the held-out loss was least; 0 for the start.
        best: that loss.
        idle: checks since then.
    """

    step: int = 0
    best_step: int = 0
    best: float = math.inf
    idle: int = 0


def split_sequences(sequences: Tensor, params: TrainingParams, name: str) -> tuple[Tensor, Tensor]:
    """Sequences to train on and held-out ones, the last of the text.

    Raises:
        DataError: too few for one step and one check.
    """
    n_heldout = max(1, round(len(sequences) * params.heldout))
    needed = params.batch_size * params.accumulate
    if len(sequences) - n_heldout < needed:
        raise DataError(
            f"data.{name}: {len(sequences)} sequences of {sequences.shape[1]} tokens, {n_heldout} of them held out, "
            f"are too few: a step trains on {needed}",
            hint="give more text, shorter sequences, or a smaller batch_size or accumulate",
        )
    return sequences[:-n_heldout], sequences[-n_heldout:]


def check_teacher(student: CausalLM, teacher: CausalLM, params: TrainingParams) -> None:
    """Refuse a teacher whose answers cannot be compared.

    Raises:
        UsageError: it has another vocabulary, or for `squarehead` other blocks.
    """
    vocabularies = [int(network.model.config.get_text_config().vocab_size) for network in (student, teacher)]  # type: ignore[union-attr,operator]
    if vocabularies[0] != vocabularies[1]:
        raise UsageError(
            f"the model knows {vocabularies[0]} tokens, the workflow's dense one, its teacher, {vocabularies[1]}",
            hint="they are of different families: repair a model that was made of the workflow's",
        )
    widths = [int(network.model.config.get_text_config().hidden_size) for network in (student, teacher)]  # type: ignore[union-attr,operator]
    if params.loss.get("squarehead") and (student.n_blocks, widths[0]) != (teacher.n_blocks, widths[1]):
        raise UsageError(
            f"squarehead compares {student.n_blocks} blocks {widths[0]} wide with {teacher.n_blocks} that are "
            f"{widths[1]}",
            hint="leave squarehead out of `loss`",
        )


class Speaker:
    """A network that answers, with other weights where some are given.

    Args:
        network: never changed.
        params: says what is asked for.
    """

    def __init__(self, network: CausalLM, params: TrainingParams) -> None:
        self.network = network
        self.units = {unit.name: unit for unit in network.units}
        self.hidden = bool(params.loss.get("squarehead"))
        self.bfloat16 = params.precision == "bfloat16"
        self.recomputes = params.checkpointing

    def answer(self, ids: Tensor, tensors: Mapping[str, Tensor]) -> Answer:
        """What it says of some sequences; see `as_parameters` for the weights."""
        parameters = as_parameters(self.network, self.units, tensors)
        hidden: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden.append(output if isinstance(output, Tensor) else output[0])

        with ExitStack() as stack:
            for block in self.network.blocks if self.hidden else ():
                stack.callback(block.register_forward_hook(keep).remove)
            if self.recomputes and torch.is_grad_enabled():
                stack.enter_context(recomputed(self.network.blocks))
            if self.bfloat16:
                stack.enter_context(torch.autocast(self.network.device.type, dtype=torch.bfloat16))
            given = {"input_ids": ids, "use_cache": False}
            logits = torch.func.functional_call(self.network.model, parameters, (), given).logits
        return Answer(logits, hidden)


class Teacher:
    """The dense model's answers to a set of sequences, kept if they fit.

    Args:
        network: the dense model.
        params: says what is asked for.
        sequences: (sequences, length), on the device of the network.
    """

    def __init__(self, network: CausalLM, params: TrainingParams, sequences: Tensor) -> None:
        self.speaker, self.sequences = Speaker(network, params), sequences
        config: Any = network.model.config.get_text_config()  # type: ignore[union-attr,operator]
        width = config.vocab_size + (config.hidden_size * network.n_blocks if self.speaker.hidden else 0)
        self.keeps = 4 * width * sequences.numel() <= TEACHER_BYTES
        self._kept: dict[int, Answer] = {}

    @torch.no_grad()
    def answer(self, chosen: Tensor) -> Answer:
        """To some of the sequences, by their numbers."""
        if not self.keeps:
            return self.speaker.answer(self.sequences[chosen], {})
        parts = [self._batch(int(number) // TEACHER_BATCH).of(number % TEACHER_BATCH) for number in chosen]
        states = zip(*(part.hidden for part in parts), strict=True)
        return Answer(torch.stack([part.logits for part in parts]), [torch.stack(state) for state in states])

    def _batch(self, number: int) -> Answer:
        if number not in self._kept:
            first = number * TEACHER_BATCH
            self._kept[number] = self.speaker.answer(self.sequences[first : first + TEACHER_BATCH], {})
        return self._kept[number]


class Trainer:
    """A training, from checkpoint to checkpoint.

    Args:
        student: the compressed model, decoded.
        teacher: the dense model; None if no loss asks for it.
        parts: what is free.
        train, heldout: (sequences, length) int64, on the device.
        params: of the repair.
        folder: for the checkpoints.
    Raises:
        UsageError: the teacher's answers cannot be compared.
    """

    def __init__(
        self,
        student: CausalLM,
        teacher: CausalLM | None,
        parts: Sequence[Part],
        train: Tensor,
        heldout: Tensor,
        params: TrainingParams,
        folder: Path,
    ) -> None:
        if teacher is not None:
            check_teacher(student, teacher, params)
        self.student, self.params, self.parts, self.folder = Speaker(student, params), params, list(parts), folder
        self.train, self.heldout = train, heldout
        self.teachers = [None if teacher is None else Teacher(teacher, params, text) for text in (train, heldout)]
        self.free = {name: tensor for part in parts for name, tensor in part.free.items()}
        self.rates = {name: rate for part in parts for name, rate in part.rates.items()}
        for tensor in self.free.values():
            tensor.requires_grad_(True)
        by_rate: dict[float, list[str]] = {}
        for name in self.free:
            by_rate.setdefault(self.rates.get(name, 1.0), []).append(name)
        groups = [{"params": [self.free[name] for name in some], "rate": rate} for rate, some in by_rate.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=params.weight_decay)
        self._orders: dict[int, NDArray[np.int64]] = {}
        self.state = State()
        self.best: dict[str, Tensor] = {}

    def __call__(self, until: int) -> dict[str, Any]:
        """Make one stretch of steps and leave a checkpoint.

        Args:
            until: steps after it; 0 for the start, of which only the held-out loss is taken.
        Returns:
            as JSON: `losses` of the steps, `heldout` loss, `best_step`, and why it ends here, if it does: `stop` is
            "nan", with the `step` whose loss was not finite, or "patience".
        Raises:
            NotFinite: the model gives NaN or Inf as it is.
        """
        if until == 0:
            return self._begin()
        start = (until - 1) // self.params.check_every * self.params.check_every
        if self.state.step != start or not self.best:
            self.load(start)
        losses: list[float] = []
        for step in range(start, until):
            loss = self._step(step)
            if not math.isfinite(loss):
                return self._broken(until, losses, step + 1)
            losses.append(loss)
        self.end_stretch()
        self.state.step = until
        heldout = self.heldout_loss()
        if not math.isfinite(heldout):
            return self._broken(until, losses, until)
        if heldout < self.state.best:
            self.state.best, self.state.best_step, self.state.idle = heldout, until, 0
            self.best = self._copies()
        else:
            self.state.idle += 1
        self.save(until)
        tired = bool(self.params.patience) and self.state.idle >= self.params.patience
        return self._told(losses, heldout, "patience" if tired else "", until)

    def _begin(self) -> dict[str, Any]:
        heldout = self.heldout_loss()
        if not math.isfinite(heldout):
            raise NotFinite("the model gives NaN or Inf before it is trained", hint="look at its levels")
        self.state, self.best = State(best=heldout), self._copies()
        self.save(0)
        return self._told([], heldout, "", 0)

    def _broken(self, until: int, losses: list[float], step: int) -> dict[str, Any]:
        """The end of a training whose loss is no longer finite: the best state so far, as the last checkpoint."""
        self.restore_best()
        self.state.step = until
        self.save(until)
        return self._told(losses, self.state.best, "nan", step)

    def _told(self, losses: list[float], heldout: float, stop: str, step: int) -> dict[str, Any]:
        return {"losses": losses, "heldout": heldout, "stop": stop, "step": step, "best_step": self.state.best_step}

    def _step(self, step: int) -> float:
        params, total = self.params, 0.0
        self._at_step(step)
        for batch in self._batches(step):
            loss = self.training_loss(step, batch) / params.accumulate
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.free.values(), params.clip)
        rate = params.learning_rate * self.share_of_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def training_loss(self, step: int, batch: Tensor) -> Tensor:
        """What a step makes smaller, on some of the sequences that are trained on, by their numbers."""
        return self._loss(self.train, self.teachers[0], batch)

    def share_of_rate(self, step: int) -> float:
        """The learning rate of a step as a share of its greatest."""
        return schedule(step, self.params)

    def end_stretch(self) -> None:
        """What is to be done after the steps of a stretch, before its loss is taken; nothing here."""

    def _at_step(self, step: int | None) -> None:
        for part in self.parts:
            if isinstance(part, Scheduled):
                part.at_step(step)

    def _batches(self, step: int) -> Iterator[Tensor]:
        """The sequences of a step: each round takes all in an order of its own, one after another over the steps."""
        total, size = len(self.train), self.params.batch_size
        for number in range(step * self.params.accumulate, (step + 1) * self.params.accumulate):
            places = range(number * size, (number + 1) * size)
            chosen = [int(self._order(place // total)[place % total]) for place in places]
            yield torch.tensor(chosen, device=self.train.device)

    def _order(self, number: int) -> NDArray[np.int64]:
        """Of the sequences, in one round."""
        if number not in self._orders:
            key = np.array([self.params.seed, number], dtype=np.uint64)
            order = np.random.Generator(np.random.Philox(key=key)).permutation(len(self.train))
            self._orders = {kept: self._orders[kept] for kept in self._orders if kept == number - 1} | {number: order}
        return self._orders[number]

    def _loss(self, text: Tensor, teacher: Teacher | None, batch: Tensor) -> Tensor:
        tensors = {name: tensor for part in self.parts for name, tensor in part.tensors().items()}
        ids = text[batch]
        expected = None if teacher is None else teacher.answer(batch)
        return loss_of(self.params.loss, self.student.answer(ids, tensors), expected, ids, self.params.teacher_top_k)

    @torch.no_grad()
    def heldout_loss(self) -> float:
        """The loss on the held-out sequences, of what would be written."""
        self._at_step(None)
        numbers = torch.arange(len(self.heldout), device=self.heldout.device)
        total = 0.0
        for batch in numbers.split(self.params.batch_size):
            total += self._loss(self.heldout, self.teachers[1], batch).item() * len(batch)
        return total / len(numbers)

    def _copies(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.free.items()}

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best state so far in place."""
        for name, tensor in self.free.items():
            tensor.copy_(self.best[name])

    def checkpoint(self, step: int) -> Path:
        """The file of a checkpoint."""
        return self.folder / f"step-{step:08}.safetensors"

    def save(self, step: int) -> None:
        """Write a checkpoint; complete or absent."""
        from safetensors.torch import save_file

        tensors = {f"free/{name}": tensor.detach() for name, tensor in self.free.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, leaf in self.free.items():
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state.get(leaf, {}).items()}
        target = self.checkpoint(step)
        target.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(target) as partial:
            ready = {name: tensors[name].cpu().contiguous() for name in sorted(tensors)}
            save_file(ready, partial, metadata={STATE: json.dumps(asdict(self.state))})
            settle_file(partial, target)

    @torch.no_grad()
    def load(self, step: int) -> None:
        """Go on from a checkpoint."""
        from safetensors import safe_open

        with safe_open(self.checkpoint(step), framework="pt") as file:
            self.state = State(**json.loads(file.metadata()[STATE]))
            names = set(file.keys())
            self.best = {name: file.get_tensor(f"best/{name}").to(tensor.device) for name, tensor in self.free.items()}
            for name, leaf in self.free.items():
                leaf.copy_(file.get_tensor(f"free/{name}"))
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in names]
                self.optimizer.state[leaf] = {
                    key: file.get_tensor(f"{key}/{name}").to("cpu" if key == "step" else leaf.device) for key in keys
                }


def schedule(step: int, params: TrainingParams) -> float:
    """The learning rate of a step as a share of its greatest."""
    if step < params.warmup:
        return (step + 1) / params.warmup
    if params.schedule == "constant":
        return 1.0
    done = (step - params.warmup) / max(1, params.steps - params.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))
