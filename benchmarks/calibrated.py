"""A model with calibration and held-out text, for benchmarks that make levels in this process and score them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.solvers import Problem, branch
from layerwise.stages.apply.remake import Given, remake_block
from layerwise.stages.calibrate import find_statistic
from layerwise.stages.compress import Compressor, MenuEntry, Task, find_compressor
from layerwise.stages.compress.block_run import BlockRun
from layerwise.stages.compress.params import maker
from layerwise.stages.contract import ModelSource, TextSource
from layerwise.stages.data.text import cut, encode
from layerwise.stages.evaluate.evaluator import Evaluator
from layerwise.stages.evaluate.scoring import Request
from layerwise.stages.levels.level import Level
from layerwise.stages.models.causal_lm import CausalLM

Levels = dict[str, Level]
"""By unit."""


@dataclass(frozen=True)
class Scored:
    """Held-out losses of a model.

    Args:
        kl, stderr: KL to the dense model, and its standard error over sequences.
        perplexity: of the next token.
    """

    kl: float
    stderr: float
    perplexity: float


class Calibrated:
    """A model with its calibration and held-out sequences.

    Args:
        name, folder: of the model.
        texts: for calibration, and held out.
        length: of a sequence.
        tokens: of each text.
    """

    def __init__(self, name: str, folder: Path, texts: tuple[Path, Path], *, length: int, tokens: int) -> None:
        self.name, self.folder, self._length, self._tokens = name, folder, length, tokens
        self.network = CausalLM.load(ModelSource(folder))
        self.ids, self.heldout = (self._sequences(text) for text in texts)
        self._runs: list[tuple[BlockRun, dict[tuple[str, str], Tensor]]] = []

    def _sequences(self, text: Path) -> Tensor:
        source = TextSource(text.stem, (text,), self._length, self._tokens)
        return torch.from_numpy(cut(encode(source, self.folder), source)).long()

    @property
    def n_weights(self) -> int:
        """Of all units of the blocks."""
        return sum(unit.n_weights for unit in self.network.units if unit.block is not None)

    def levels(self, entry: MenuEntry) -> dict[str, Levels]:
        """Every unit's levels, made from dense inputs, by the name of the level."""
        found: dict[str, Levels] = {name: {} for name in entry.level_names()}
        for block in range(self.network.n_blocks):
            for unit, levels in self._of_block(block, find_compressor(entry.method), entry).items():
                for level in levels:
                    found[level.name][unit] = level
        return found

    def _of_block(self, block: int, compressor: Compressor, params: MenuEntry) -> Mapping[str, list[Level]]:
        run, statistics = self._run(block)
        units = {unit.name: unit for unit in run.units}
        weights = {name: self.network.weight(unit).clone() for name, unit in units.items()}

        def statistic(unit: str, kind: str) -> Tensor:
            if (unit, kind) not in statistics:
                inputs: list[Tensor] = []
                run.watch({}, [unit], lambda _, X: inputs.append(X))
                statistics[unit, kind] = find_statistic(kind).measure(torch.cat(inputs))
            return statistics[unit, kind]

        if params.scope == "block":
            return compressor.run(Task(weights, statistic, units, block=run), params)
        made: dict[str, list[Level]] = {}
        for name, unit in units.items():
            made |= compressor.run(Task({name: weights[name]}, statistic, {name: unit}), params)
        return made

    def _run(self, block: int) -> tuple[BlockRun, dict[tuple[str, str], Tensor]]:
        while len(self._runs) <= block:
            index = len(self._runs)
            inputs = self._runs[-1][0].outputs if self._runs else self._embedded()
            run = BlockRun(self.network, index, self._units(index), self.ids, inputs, inputs)
            run.outputs = run.run({})
            self._runs.append((run, {}))
        return self._runs[block]

    def _embedded(self) -> Tensor:
        return torch.cat([self.network.begin(part).hidden for part in self.ids.split(8)])

    def _units(self, block: int) -> list[Any]:
        return [unit for unit in self.network.units if unit.block == block]

    def score(self, levels: Levels) -> Scored:
        """On the held-out text."""
        weights = {name: [level.decode()] for name, level in levels.items()}
        (found,) = Evaluator(self.network, self.heldout, Weights(weights))(
            Request(((1,) * len(weights),), ("kl", "nll"))
        )
        return Scored(found["kl"]["mean"], found["kl"]["stderr"], math.exp(found["nll"]["mean"]))

    def alone(self, levels: Sequence[Levels], tokens: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """KL on calibration text with one level of one unit alone, (units, levels)."""
        names = list(levels[0])
        source = Weights({name: [choice[name].decode() for choice in levels] for name in names})
        genomes = [
            tuple(level + 1 if other == unit else 0 for other in range(len(names)))
            for unit in range(len(names))
            for level in range(len(levels))
        ]
        scores = Evaluator(self.network, self.ids, source)(Request(tuple(genomes), ("kl",), tokens=tokens))
        return np.array([score["kl"]["mean"] for score in scores]).reshape(len(names), len(levels))

    def best(self, levels: Sequence[Levels], losses: np.ndarray[Any, np.dtype[np.float64]], bits: float) -> Levels:
        """The levels that `branch` chooses within so many effective bits, counted as bytes that are written.

        Raises:
            InfeasibleBudget: none fits.
        """
        names = list(levels[0])
        costs = np.array([[8.0 * choice[name].size_bytes for choice in levels] for name in names])
        chosen = branch(Problem(costs={"bits": costs}, budgets={"bits": bits * self.n_weights}, losses=losses)).choice
        return {name: levels[number][name] for name, number in zip(names, chosen, strict=True)}

    def remade(self, levels: Levels, menu: Sequence[MenuEntry], steps: int = 0) -> Levels:
        """The same levels made again block by block, as `apply` with `remake` does it."""
        dense = prefix = self._embedded()
        found = dict(levels)
        for block in range(self.network.n_blocks):
            units = self._units(block)
            given = []
            for unit in units:
                level = levels[unit.name]
                again = maker(menu, level.name).again(level.name)
                given.append(Given(unit, self.network.weight(unit).clone(), level, again))
            made = remake_block(self.network, block, self.ids, dense, prefix, given, steps=steps)
            found |= made.levels if made.better else {}
            weights = {unit.name: found[unit.name].decode() for unit in units}
            dense = self._run(block)[0].outputs
            prefix = BlockRun(self.network, block, units, self.ids, prefix, prefix).run(weights)
        return found


def effective_bits(levels: Levels) -> float:
    """All bytes that are written for the levels, in bits for each weight."""
    return 8 * sum(level.size_bytes for level in levels.values()) / sum(level.n_weights for level in levels.values())


@dataclass
class Weights:
    """Decoded weights beside the dense ones, a `LevelSource`.

    Args:
        by_unit: those of its levels 1, 2, ...
    """

    by_unit: Mapping[str, Sequence[Tensor]]

    @property
    def unit_names(self) -> tuple[str, ...]:
        return tuple(self.by_unit)

    def weight(self, unit: str, level: int, device: torch.device | str = "cpu") -> Tensor | None:
        return self.by_unit[unit][level - 1].to(device) if level else None

    def drops(self, unit: str, level: int) -> bool:
        return False

    def narrows(self, unit: str, level: int) -> dict[str, int]:
        return {}
