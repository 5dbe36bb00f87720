"""`recover`: a compressed model repaired, as a `model` artifact whose levels are still encoded.

Repairs are made one after another; each leaves a whole model in `Context.items`, so that an interrupted stage goes on
with the one that it was at. What does not fit a method stays as it is and is told in the store; a method that fits
nothing is refused before any work.
"""

from __future__ import annotations

from layerwise.stages.contract import Context, Port, Stage, always
from layerwise.stages.data.text import tokenized
from layerwise.stages.recover.params import RecoverParams, mistakes
from layerwise.stages.recover.repairing import check_statistics, repaired
from layerwise.stages.recover.texts import Text


def recover(context: Context, params: RecoverParams) -> None:
    """Write a `model` artifact (`layerwise.stages.models.compressed`).

    Raises:
        UsageError: the model has nothing that a method fits, or the statistics are not of it.
    """
    from layerwise.stages.models.compressed import adopt

    folder = context.input("model")
    check_statistics(context, folder)
    text = None if params.data is None else Text(params.data, tokenized(context, params.data))
    adopt(repaired(context, params, folder, text), context.out)


STAGE = Stage(
    "recover",
    RecoverParams,
    recover,
    gives="model",
    takes={"model": Port("model"), "statistics": Port("statistics", optional=True)},
    data=("data",),
    check=mistakes,
    on_gpu=always,
)
