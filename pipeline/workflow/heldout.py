"""Which text a stage may use: one that exists, and for a stage that reports, one that nothing was fitted to.

A figure measured on text that calibration or search has seen is too good, and nothing in it shows. So it is refused
here, before anything runs, whether the text has the same name or is only read from the same place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerwise.pipeline.workflow.entries import Draft
from layerwise.pipeline.workflow.report import Report, suggest
from layerwise.pipeline.workflow.sources import Tensors, Text
from layerwise.pipeline.workflow.yaml12 import KeyPath, Place


@dataclass(frozen=True)
class _Use:
    """A stage's parameter that names a text."""

    text: str
    entry: str
    reports: bool
    place: Place
    path: KeyPath


def check_texts(drafts: Sequence[Draft], data: Mapping[str, Text | Tensors | None], report: Report) -> None:
    """Report every text that is not declared, and every reported-on text that was calibrated or searched on.

    Args:
        data: the workflow's texts; None for one with mistakes.
    """
    uses = [use for draft in drafts for use in _uses(draft)]
    for use in uses:
        if use.text not in data:
            known = suggest(use.text, data) or " (the workflow declares no data)"
            report.add(use.place, use.path, f"no data entry '{use.text}'{known}")
    fitted = {use.text: use.entry for use in reversed(uses) if not use.reports}
    for use in uses:
        for other, entry in fitted.items() if use.reports else ():
            shared = _shared(use.text, other, data)
            if shared:
                text = f"'{use.text}' {shared} 'stages.{entry}' works on; held-out text must be separate"
                report.add(use.place, use.path, text)


def _uses(draft: Draft) -> list[_Use]:
    stage, params = draft.wiring.stage, draft.params
    if stage is None or params is None:
        return []
    found = []
    for key in stage.data:
        value = getattr(params, key)
        given = draft.given.get(key)
        for index, text in enumerate([value] if isinstance(value, str) else value or ()):
            named = given and (given.get(index) or given)
            place = named.place if named else draft.wiring.place
            found.append(_Use(text, draft.wiring.entry, stage.reports, place, (*draft.wiring.path, "with", key)))
    return found


def _shared(text: str, other: str, data: Mapping[str, Text | Tensors | None]) -> str | None:
    """What two texts have in common, as a part of the sentence in `check_texts`."""
    if text == other:
        return "is also what"
    mine, theirs = data.get(text), data.get(other)
    common = mine.origins & theirs.origins if mine is not None and theirs is not None else frozenset()
    return f"reads the same text ({', '.join(sorted(common))}) as '{other}', which" if common else None
