"""`apply` with `remake: true`: lets the blocks be made again (`remake.py`), and writes the better of the two models.

The model with the levels of the database and the one with levels made again take the same bytes; which one is better is
measured, by KL to the dense model on text that no level was made from again. `about.remade` of `model.json` says
both losses, the text, which of the two was written, and what became of every block.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import DataError
from layerwise.results.links import unfinished
from layerwise.stages.contract import Context, Row
from layerwise.stages.data.text import Tokens, tokenized
from layerwise.stages.evaluate.model_levels import ModelLevels
from layerwise.stages.evaluate.scoring import Measurement, Request, evaluator_factory, score
from layerwise.stages.levels.database import DatabaseIndex

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from layerwise.stages.allocate.allocation import Allocation
    from layerwise.stages.apply.remake import Remaker
    from layerwise.stages.apply.stage import ApplyParams
    from layerwise.stages.contract import ModelSource

RESIDUAL = 0.5
"""How much of the residual a level makes up for, if nothing is said. Held-out KL of `gptq` with groups of 64 on 32 Ki
tokens, as it was and made again with shares of 0, 0.5 and 1: at 2 bits 0.407, 0.403, 0.307, 0.292 on the demo model and
2.07, 2.12, 1.29, 1.36 on stories260k; at 3 bits 0.0782, 0.0783, 0.0647, 0.0633 and 0.361, 0.358, 0.242, 0.265. The
better inputs alone give nothing; what counts is what they are quantized towards."""

SET_ASIDE = 8
"""One sequence in so many is set aside."""

BATCH_TOKENS = 2048
"""That run at a time where the two models are compared."""


def set_aside(sequences: int) -> list[bool]:
    """Which of so many sequences no level is made from: every eighth; of fewer the last, of a single one none."""
    place = min(SET_ASIDE, sequences) - 1
    return [sequences > 1 and number % SET_ASIDE == place for number in range(sequences)]


def remake(context: Context, params: ApplyParams, allocation: Allocation, write: Callable[..., None]) -> None:
    """Make the levels of an allocation again, and write the model with them, or the one without if that is better.

    Args:
        allocation: which levels.
        write: writes a model: takes the allocation, `out`, `instead` and `about`.
    Raises:
        DataError: the text has one sequence only, so there is none to set aside.
    """
    made, judged = _sequences(context, params)
    folder = context.items / "remade"
    blocks = _make_blocks(context, params, allocation, made, folder)
    models = [context.items / "as-chosen", context.items / "made-again"]
    for model, instead in zip(models, (None, folder), strict=True):
        if model.exists():  # of an interrupted run, and perhaps half of it
            shutil.rmtree(model)
        model.mkdir()
        context.executor.map(partial(write, out=model, instead=instead), [allocation])
    before, after = _compare(context, models, judged)
    outcome = Outcome(
        text=params.judge or f"{params.data} (sequences set aside)",
        tokens=judged.total,
        kl_before=before["mean"],
        kl_after=after["mean"],
        blocks=blocks,
    )
    instead = folder if outcome.written else None
    about = {"remade": asdict(outcome) | {"written": outcome.written}}
    context.executor.map(partial(write, out=context.out, instead=instead, about=about), [allocation])
    rows = {allocation.candidate: before, f"{allocation.candidate}@remade": after}
    context.record("metrics", [_row(candidate, outcome.text, measured) for candidate, measured in rows.items()])
    context.progress(len(blocks), len(blocks), f"blocks; {outcome}")


@dataclass(frozen=True)
class Outcome:
    """What making levels again gave.

    Args:
        text: on which the two models were compared.
        tokens: of it.
        kl_before, kl_after: to the dense model, with the levels of the database and with those made again; None where
            not finite.
        blocks: what became of each, as `Remaker` says it.
    """

    text: str
    tokens: int
    kl_before: float | None
    kl_after: float | None
    blocks: Sequence[Mapping[str, Any]]

    @property
    def written(self) -> bool:
        """Whether the model with levels made again is the better one, and so the one that is written."""
        if self.kl_after is None or not any(block["better"] for block in self.blocks):
            return False
        return self.kl_before is None or self.kl_after < self.kl_before

    def __str__(self) -> str:
        if not any(block["better"] for block in self.blocks):
            return "no block is better with levels made again: wrote the levels as they were"
        losses = [format(loss, ".4g") if loss is not None else "not finite" for loss in (self.kl_before, self.kl_after)]
        wrote = "the levels made again" if self.written else "the levels as they were"
        return f"KL on {self.text} {losses[0]} before, {losses[1]} with levels made again: wrote {wrote}"


def _sequences(context: Context, params: ApplyParams) -> tuple[Tokens, Tokens]:
    """What levels are made again with, the sequences set aside among them, and what both models are compared on."""
    import numpy as np

    assert params.data is not None, "filled in by the parameters"
    given = np.load(tokenized(context, params.data).path)
    wanted = min(len(given), max(1, params.tokens // given.shape[1]))
    given = given[np.arange(wanted) * len(given) // wanted]
    if len(given) < 2:
        raise DataError(
            f"data.{params.data}: {len(given)} sequence of {given.shape[1]} tokens, and one must be set aside to judge "
            "levels that are made again",
            hint="give more text, raise `tokens`, or shorten sequence_length",
        )
    made = _saved(context.items / "tokens-made.npy", given)
    if params.judge is not None:
        return made, tokenized(context, params.judge)
    return made, _saved(context.items / "tokens-judged.npy", given[set_aside(len(given))])


def _saved(target: Path, sequences: NDArray[np.int32]) -> Tokens:
    import numpy as np

    with unfinished(target) as temporary:
        with temporary.open("wb") as stream:
            np.save(stream, sequences)
        temporary.replace(target)
    return Tokens(target, int(sequences.size))


def _make_blocks(
    context: Context, params: ApplyParams, allocation: Allocation, made: Tokens, folder: Path
) -> list[dict[str, Any]]:
    database = context.input("database")
    n_blocks = 1 + max(
        (unit.unit.block for unit in DatabaseIndex(database).units if unit.unit.block is not None), default=-1
    )
    factory = partial(
        _open_remaker, context.model, database, allocation, made.path, folder, params.residual, params.steps
    )
    blocks: list[dict[str, Any]] = []
    with context.executor.replicas(factory) as pool:
        for block in range(n_blocks):
            taken = [found["remade"] if found["better"] else [] for found in blocks]
            blocks += pool.map([{"block": block, "taken": taken}], keys=[f"block-{block}"])
            context.progress(len(blocks), n_blocks, "blocks made again")
    return blocks


def _open_remaker(
    model: ModelSource,
    database: Path,
    allocation: Allocation,
    sequences: Path,
    folder: Path,
    residual: float,
    steps: int,
) -> Remaker:
    from layerwise.stages.apply.remake import Remaker

    return Remaker(model, database, allocation, sequences, folder, residual, steps)


def _compare(context: Context, models: Sequence[Path], judged: Tokens) -> list[Measurement]:
    """KL of each model."""
    units = len(ModelLevels(models).unit_names)
    request = Request(tuple((number + 1,) * units for number in range(len(models))), ("kl",))
    with context.executor.replicas(
        evaluator_factory(context, judged, models=models, batch_tokens=BATCH_TOKENS)
    ) as pool:
        return [found["kl"] for found in score(pool, request, workers=context.executor.workers, note="both models")]


def _row(candidate: str, text: str, measured: Measurement) -> Row:
    return {
        "candidate": candidate,
        "data": text,
        "metric": "kl",
        "value": measured["mean"],
        "stderr": measured["stderr"],
        "n_tokens": measured["n_tokens"],
        "status": "nan" if measured["mean"] is None else "ok",
    }
