"""What a stage is, and what it is handed.

A stage is a pure function of its input artifacts and its parameters: it reads no environment variable, writes only into
its own output folder, and gets its parallelism, its progress bar and its way into the results store handed in. Then
caching and resume are correct by construction, and the same stage runs in a notebook, in a test and on Ray.

This module imports neither torch nor Ray, and no stage module imports them at its top, because `layerwise validate`
and a fully cached `layerwise run` need every stage's parameters but none of its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

Row = Mapping[str, Any]
"""One record of a results table; columns as in `layerwise.results.schema`."""

Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)
Answer = TypeVar("Answer")


class Params(BaseModel):
    """Base of every stage's and every method's parameters: frozen; unknown keys, inf and NaN are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def material(self) -> dict[str, Any]:
        """What decides the result, as JSON: the part of a stage's key. All of it, unless a stage knows better."""
        return self.model_dump(mode="json")

    def sources(self) -> Iterable[str]:
        """Modules whose source decides the result beside the stage's own: those of the methods that it names."""
        return ()


@dataclass(frozen=True)
class Port:
    """One input of a stage.

    Args:
        type: the artifact type that it takes, as in `Stage.gives` of the producer.
        many: any number of artifacts, not exactly one.
        optional: may stay empty.
    """

    type: str
    many: bool = False
    optional: bool = False


BEFORE = "*"
"""Instead of a port: every stage before this one."""

Check = Callable[[Any, Mapping[str, Sequence[Any]]], Iterable[tuple[tuple[str | int, ...], str]]]
"""Finds mistakes that show only together with the parameters of the stages that feed a stage: takes its parameters and
theirs by port, and under BEFORE those of all that come before; gives (path below `with`, text)."""


@dataclass(frozen=True)
class Stage:
    """What the pipeline knows of a stage before it runs.

    Args:
        name: the word after `uses:`.
        params: the model of `with:`.
        run: the work; it writes its artifact into `context.out`.
        gives: the type of the artifact that it leaves.
        takes: its inputs by name.
        data: the parameters that name an entry of the workflow's `data:` section.
        reports: true when what it measures must come from text that nothing was calibrated or searched on.
        check: what can be seen to be wrong before anything runs.
        measures: of a stage that times things, what it times them on: the machine's fingerprint as JSON, for given
            parameters. It is part of the stage's key, so times taken elsewhere are never found as this machine's.
        fill: completes its parameters from those of the stages that take its artifact, before keys are made: what
            `calibrate` gathers is what the menu behind it needs.
        notes: what it will leave out or fall back to, told before it runs; takes its parameters and the model.
        any_network: whether, with given parameters, it takes networks of the user's own (`model: {python: ...}`), and
            not only language models; never, if left out.
        on_gpu: whether, with given parameters, its work can be done on a GPU, where `Context.device` then is; never,
            if left out.
        impl: raised by hand whenever the same inputs would give other bytes; part of the stage's key, beside a hash of
            its source.
    """

    name: str
    params: type[Params]
    run: Callable[[Context, Any], None]
    gives: str
    takes: Mapping[str, Port] = field(default_factory=dict)
    data: tuple[str, ...] = ()
    reports: bool = False
    check: Check | None = None
    measures: Callable[[Any], Mapping[str, Any]] | None = None
    fill: Callable[[Any, Sequence[Any]], Params] | None = None
    notes: Callable[[Any, ModelSource], Iterable[str]] | None = None
    any_network: Callable[[Any], bool] | None = None
    on_gpu: Callable[[Any], bool] | None = None
    impl: int = 1


def always(params: Any) -> bool:
    """For `Stage.any_network` and `Stage.on_gpu`: whatever the parameters are."""
    return True


@dataclass(frozen=True)
class ModelSource:
    """A model: what a network is loaded from.

    Args:
        path: the dense model, a local folder with safetensors.
        dtype: that it is computed in.
        compressed: a `model` artifact whose levels are laid over it; see `layerwise.stages.models.compressed`.
        trust: whether code that stands in the folder may run; see `layerwise.stages.models.trust`.
        device: that it is computed on, `cpu` or `cuda`.
        python: of a network of the user's own, the function that makes it (`layerwise.stages.models.code`); `path` then
            holds its weights.
    """

    path: Path
    dtype: str = "float32"
    compressed: Path | None = None
    trust: bool = False
    device: str = "cpu"
    python: str | None = None


@dataclass(frozen=True)
class TextSource:
    """Text for calibration, search or reporting.

    Args:
        name: its key in the workflow's `data:` section.
        paths: files of UTF-8 text or of records (`stages/data/records.py`), read in this order.
        sequence_length: tokens of one sequence.
        tokens: how many tokens to use, spread evenly over the text; None for all.
        bos: whether each sequence begins with the beginning-of-sequence token; None for what the tokenizer does.
        column: that holds the text of a record; None for `text`.
    """

    name: str
    paths: tuple[Path, ...]
    sequence_length: int
    tokens: int | None = None
    bos: bool | None = None
    column: str | None = None


@dataclass(frozen=True)
class TensorSource:
    """Tensors for a network of the user's own.

    Args:
        name: its key in the workflow's `data:` section.
        path: a safetensors file with `inputs`, (entries, ...), and, if known, `labels`, (entries,).
        entries: how many.
        labelled: whether there are labels.
    """

    name: str
    path: Path
    entries: int
    labelled: bool = True

    @property
    def sequence_length(self) -> int:
        """An entry counts as a sequence of one token."""
        return 1


class Replicas(Protocol[Item_contra, Answer]):
    """Copies of one loaded object (a model, say) that answer calls in parallel."""

    def map(self, items: Sequence[Item_contra], *, keys: Sequence[str] | None = None, note: str = "") -> list[Answer]:
        """Answer every item; the answers stand in the order of the items, whoever finished first.

        Args:
            items: as in `Executor.map`.
            keys: as in `Executor.map`.
            note: as in `Executor.map`; empty when the stage reports its own progress.
        """
        ...

    def map_together(self, parts: Sequence[Any], *, keys: Sequence[str], calls: int, note: str = "") -> list[Any]:
        """Answer parts of items: a replica gets neighbours at a time, as a tuple, and answers with a list.

        For parts that are cheaper together. Each answer is stored by itself, so that an interrupted stage finds it
        again however many calls there are then.

        Args:
            parts: picklable, and small.
            keys: one name per part.
            calls: into how many the parts without an answer are gathered at most.
            note: as in `map`.
        """
        ...


class Executor(Protocol):
    """Where work inside a stage runs: in this process or on Ray."""

    def map(
        self, fn: Callable[[Item], Answer], items: Sequence[Item], *, keys: Sequence[str] | None = None, note: str = ""
    ) -> list[Answer]:
        """Call `fn` on every item, in parallel; answers in the order of the items.

        Args:
            fn: a function of a module (not a lambda), so that a worker can import it.
            items: picklable, and small: paths and names rather than tensors.
            keys: one name per item. With them each answer is stored as it arrives, so an interrupted stage repeats
                no finished item; an answer must then be JSON, and whatever else `fn` writes must stand under
                `Context.items` before it returns, named by `layerwise.results.durable.settle_file`: then it is checked
                when the answer is found again. Within a stage a function may meet a key only once.
            note: what the items are ("units", "shards"), for the progress display.
        """
        ...

    def replicas(
        self, factory: Callable[[], Callable[[Item], Answer]]
    ) -> AbstractContextManager[Replicas[Item, Answer]]:
        """Load `factory()` once per worker and keep it there; a lost worker is replaced and its call repeated."""
        ...

    @property
    def workers(self) -> int:
        """How many items run at a time."""
        ...


@dataclass(frozen=True)
class Context:
    """All that a stage may touch.

    Args:
        out: its output folder, empty at the start; what stands there at the end is the artifact.
        items: a folder that survives an interruption of this very stage, for files of finished items.
        model: the dense model.
        data: the workflow's texts, or tensors, by name.
        inputs: artifact folders by port; a port that is not `many` has exactly one.
        executor: its parallelism.
        record: appends rows to a results table; they are durable when it returns.
        progress: `(done, total, note)`.
    """

    out: Path
    items: Path
    model: ModelSource
    data: Mapping[str, TextSource | TensorSource]
    inputs: Mapping[str, tuple[Path, ...]]
    executor: Executor
    record: Callable[[str, Sequence[Row]], None]
    progress: Callable[[int, int, str], None]

    @property
    def device(self) -> str:
        """What the work is computed on, `cpu` or `cuda`; what is stored is on the CPU in any case."""
        return self.model.device

    def input(self, port: str) -> Path:
        """The one artifact folder of a port."""
        (path,) = self.inputs[port]
        return path

    def optional(self, port: str) -> Path | None:
        """The artifact folder of a port that may be empty."""
        return next(iter(self.inputs[port]), None)
