"""Tells, before any stage is made, that a text to report on holds what was calibrated or searched on.

Names and files are compared when a workflow is read (`workflow/heldout.py`); here it is what the texts say. A copy
under another name, or with other line breaks, would give figures that are too good, and nothing in them would show it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from layerwise.errors import DataError
from layerwise.pipeline.runs.plan import StagePlan
from layerwise.pipeline.workflow import Node
from layerwise.results.told import warn_once
from layerwise.stages.contract import TensorSource, TextSource

MOST = 0.01
"""Of a text's passages, how many may also stand in another: licences and headings do, here and there."""


def check_separate(plans: Iterable[StagePlan], data: Mapping[str, TextSource | TensorSource]) -> None:
    """Compare the texts of stages that report, and are to be made, with those of all that do not report.

    Tensors are not looked into: which of them are held out is for the function that gives them.

    Raises:
        DataError: one holds more than a hundredth of another.
    """
    plans = list(plans)
    fitted = dict.fromkeys(name for plan in plans if not plan.node.stage.reports for name in _texts(plan.node))
    reported = dict.fromkeys(
        name for plan in plans if plan.node.stage.reports and plan.artifact is None for name in _texts(plan.node)
    )
    for name in reported:
        for other in fitted:
            text, seen = data[name], data[other]
            if isinstance(text, TextSource) and isinstance(seen, TextSource):
                _compare(text, seen)


def _texts(node: Node) -> list[str]:
    values = [getattr(node.params, key) for key in node.stage.data]
    return [name for value in values for name in ([value] if isinstance(value, str) else value or ())]


def _compare(text: TextSource, other: TextSource) -> None:
    from layerwise.stages.data.overlap import PASSAGE, overlap
    from layerwise.stages.data.reading import read_text

    found = overlap(read_text(text), read_text(other))
    if not found.shared:
        return
    told = (
        f"data.{text.name}: {found.shared} of its {found.passages} passages of {PASSAGE} bytes also stand in "
        f"data.{other.name}, the first is '{found.first[:60]}...'"
    )
    if found.share > MOST:
        raise DataError(
            f"{told}; held-out text must be separate", hint=f"take what they share out of data.{other.name}"
        )
    warn_once(told)
