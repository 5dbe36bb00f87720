"""Which stage feeds which input, found by the types of the artifacts; and in which order stages can run.

Works on `Wiring`s, which hold only what a stage says about its connections, so that a workflow with mistakes elsewhere
is still checked here, and all mistakes are shown at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from layerwise.pipeline.workflow.report import Report, suggest
from layerwise.pipeline.workflow.yaml12 import KeyPath, Place
from layerwise.stages.contract import Port, Stage

Inputs = Mapping[str, tuple[str, ...]]
"""Port -> the stage instances that feed it."""


@dataclass(frozen=True)
class Reference:
    """A stage named in `needs`, `inputs` or `foreach`, and where."""

    stage: str
    place: Place
    path: KeyPath


@dataclass(frozen=True)
class Wiring:
    """One stage instance as far as its connections go.

    Args:
        id: `search`, or `search@ilp` for one instance of a stage with `foreach`.
        entry: its key under `stages:` (`search`).
        stage: None when `uses` names no known stage; then nothing is said about its inputs.
        needs: to be bound by type.
        inputs: port -> what the workflow wants there.
        axis: for an instance of a `foreach`, the stage whose items it runs through: its own, or the one it follows.
        index: which item of the axis it is.
        place: of its key.
        sound: False if the entry has mistakes of form; one of them may be an input that seems to be missing.
    """

    id: str
    entry: str
    stage: Stage | None
    place: Place
    needs: tuple[Reference, ...] = ()
    inputs: Mapping[str, tuple[Reference, ...]] = field(default_factory=dict)
    axis: str | None = None
    index: int = 0
    sound: bool = True

    @property
    def references(self) -> tuple[Reference, ...]:
        """Every stage that it names."""
        return (*self.needs, *(ref for refs in self.inputs.values() for ref in refs))

    @property
    def path(self) -> KeyPath:
        """Where it stands in the workflow."""
        return ("stages", self.entry)


def bind(wirings: Sequence[Wiring], report: Report, offers: Callable[[str], list[str]]) -> dict[str, Inputs]:
    """Find the producers of every input of every stage instance.

    Args:
        wirings: in the order of the file.
        offers: the names of all known stages (not only those of this workflow) that give a type of artifact.
    Returns:
        Inputs by instance id; those that a mistake left open are missing, and the mistake is in the report.
    """
    return {wiring.id: _Binder(wiring, wirings, report, offers).bind() for wiring in wirings}


def run_order(wirings: Sequence[Wiring], report: Report) -> list[str]:
    """Instance ids, producers first; among those that are ready, in the order of the file. A circle is reported."""
    producers = {
        wiring.id: {other.id for ref in wiring.references for other in instances(wiring, ref, wirings)}
        for wiring in wirings
    }
    order: list[str] = []
    done: set[str] = set()
    waiting = [wiring.id for wiring in wirings]
    while (ready := next((id_ for id_ in waiting if producers[id_] <= done), None)) is not None:
        order.append(ready)
        done.add(ready)
        waiting.remove(ready)
    _report_circles([wiring for wiring in wirings if wiring.id in waiting], producers, report)
    return order


def instances(wiring: Wiring, ref: Reference, wirings: Sequence[Wiring]) -> list[Wiring]:
    """The instances that a reference means; of a stage on the same axis, the one with the same item."""
    found = [other for other in wirings if ref.stage in (other.id, other.entry)]
    if wiring.axis is None or wiring.entry == ref.stage:
        return found
    aligned = [other for other in found if (other.axis, other.index) == (wiring.axis, wiring.index)]
    return aligned or found


def _report_circles(waiting: Sequence[Wiring], producers: Mapping[str, set[str]], report: Report) -> None:
    entry = {wiring.id: wiring.entry for wiring in waiting}
    reported: set[str] = set()
    for wiring in waiting:
        circle = [] if wiring.id in reported else _circle(wiring.id, producers)
        if circle:
            reported.update(circle)
            following = (circle[1], entry[circle[1]])
            ref = next(ref for ref in wiring.references if ref.stage in following)
            entries = " -> ".join(dict.fromkeys(entry[id_] for id_ in circle))
            report.add(ref.place, ref.path, f"stages need each other in a circle: {entries} -> {wiring.entry}")


def _circle(start: str, producers: Mapping[str, set[str]]) -> list[str]:
    """The shortest way from a stage through what it needs back to itself, `[a, b, a]`; empty if there is none."""
    ways = [[start]]
    seen: set[str] = set()
    for way in ways:  # grows while it is walked: breadth first
        for source in sorted(producers[way[-1]]):
            if source == start:
                return [*way, start]
            if source not in seen:
                seen.add(source)
                ways.append([*way, source])
    return []


class _Binder:
    """The inputs of one stage instance."""

    def __init__(
        self, wiring: Wiring, wirings: Sequence[Wiring], report: Report, offers: Callable[[str], list[str]]
    ) -> None:
        self.wiring, self.wirings, self.report, self.offers = wiring, wirings, report, offers
        self.bound: dict[str, list[str]] = {}
        self.doubtful = False  # a producer is unknown: it may be the one that seems to be missing

    def bind(self) -> Inputs:
        stage = self.wiring.stage
        found = {(ref.path, ref.stage): self._instances(ref) for ref in self.wiring.references}
        self.doubtful = not (self.wiring.sound and all(found.values()))
        if stage is None:
            return {}
        for port_name, refs in self.wiring.inputs.items():
            self._bind_explicit(stage, port_name, refs, found)
        placed = {ref.stage for refs in self.wiring.inputs.values() for ref in refs}
        by_type = [ref for ref in self.wiring.needs if ref.stage not in placed]
        self._bind_by_type(stage, [(ref, found[ref.path, ref.stage]) for ref in by_type])
        for port_name, port in stage.takes.items():
            if not port.optional and not self.bound.get(port_name) and not self.doubtful:
                self._report_missing(stage, port_name, port)
        return {name: tuple(ids) for name, ids in self.bound.items()}

    def _instances(self, ref: Reference) -> list[Wiring]:
        found = instances(self.wiring, ref, self.wirings)
        if not found:
            known = dict.fromkeys(other.entry for other in self.wirings if other.entry != self.wiring.entry)
            self.report.add(ref.place, ref.path, f"unknown stage id '{ref.stage}'{suggest(ref.stage, known)}")
        return found

    def _bind_explicit(
        self,
        stage: Stage,
        port_name: str,
        refs: Sequence[Reference],
        found: Mapping[tuple[KeyPath, str], list[Wiring]],
    ) -> None:
        path = (*self.wiring.path, "inputs", port_name)
        if port_name not in stage.takes:
            self.doubtful = True
            place = refs[0].place if refs else self.wiring.place
            self.report.add(place, path, f"'{stage.name}' has no such input{suggest(port_name, stage.takes)}")
            return
        port = stage.takes[port_name]
        for ref in refs:
            producers = found[ref.path, ref.stage]
            for producer in producers:
                if producer.stage is not None and producer.stage.gives != port.type:
                    text = f"takes {_a(port.type)}, but '{ref.stage}' gives {_a(producer.stage.gives)}"
                    self.report.add(ref.place, ref.path, text)
                    self.doubtful = True
                    break
            else:
                self._fill(port_name, port, ref, producers)

    def _bind_by_type(self, stage: Stage, needs: Sequence[tuple[Reference, list[Wiring]]]) -> None:
        for ref, producers in needs:
            if not producers or producers[0].stage is None:
                self.doubtful = True
                continue
            gives = producers[0].stage.gives
            ports = [
                name for name, port in stage.takes.items() if port.type == gives and name not in self.wiring.inputs
            ]
            if not ports:
                self.report.add(ref.place, ref.path, self._nothing_takes(stage, ref, gives))
            elif len(ports) > 1:
                choices = " or ".join(f"{name}: {ref.stage}" for name in ports)
                text = f"{_a(gives)} from '{ref.stage}' is ambiguous, say which with inputs: {choices}"
                self.report.add(ref.place, ref.path, text)
                self.doubtful = True
            else:
                self._fill(ports[0], stage.takes[ports[0]], ref, producers)

    def _fill(self, port_name: str, port: Port, ref: Reference, producers: Sequence[Wiring]) -> None:
        """Put producers into a port, unless it has room for one only."""
        already = self.bound.setdefault(port_name, [])
        fanned = ref.stage == producers[0].entry and producers[0].axis is not None if producers else False
        aligned = len(producers) == 1 and producers[0].axis == self.wiring.axis
        if not port.many and fanned and not aligned:
            ids = ", ".join(producer.id for producer in producers)
            text = (
                f"input '{port_name}' takes one {port.type}, but '{ref.stage}' is a foreach ({ids}); "
                f"name one of them, or write foreach: ${{{{ needs.{ref.stage} }}}}"
            )
            self.report.add(ref.place, ref.path, text)
        elif not port.many and already:
            text = (
                f"'{already[0]}' and '{ref.stage}' both give {_a(port.type)}, but input '{port_name}' takes one; "
                f"ambiguous, say which with inputs: {port_name}: {already[0]}"
            )
            self.report.add(ref.place, ref.path, text)
        already += [producer.id for producer in producers if producer.id not in already]

    def _nothing_takes(self, stage: Stage, ref: Reference, gives: str) -> str:
        takes = ", ".join(dict.fromkeys(port.type for port in stage.takes.values())) or "nothing"
        taken = [name for name, port in stage.takes.items() if port.type == gives]
        if taken:
            return f"'{ref.stage}' gives {_a(gives)}, but inputs already says what goes to '{taken[0]}'"
        return f"'{ref.stage}' gives {_a(gives)}, which '{stage.name}' cannot take (it takes: {takes})"

    def _report_missing(self, stage: Stage, port_name: str, port: Port) -> None:
        same_type = [name for name, other in stage.takes.items() if other.type == port.type]
        named = f" as '{port_name}'" if len(same_type) > 1 else ""
        here = dict.fromkeys(w.entry for w in self.wirings if w.stage is not None and w.stage.gives == port.type)
        here.pop(self.wiring.entry, None)
        key = f"inputs: {port_name}" if named else "needs"
        if here:
            advice = f"; add {' or '.join(repr(entry) for entry in here)} to {key}"
        else:
            makers = " or ".join(f"`{name}`" for name in self.offers(port.type))
            advice = (f" (from {_a(makers)} stage)" if makers else "") + f"; add it to {key}"
        text = f"needs an input of type '{port.type}'{named}{advice}"
        self.report.add(self.wiring.place, self.wiring.path, text)


def _a(word: str) -> str:
    return f"{'an' if word.lstrip('`')[:1] in 'aeio' else 'a'} {word}"
