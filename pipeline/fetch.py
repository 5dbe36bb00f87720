"""Brings the dense model and the texts to local folders, and says by digest what they are.

A digest covers what decides results: the weights, configuration and tokenizer files of the model, and the bytes of the
text with how it is cut. Where the files stand does not matter, so a moved project still finds its cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from layerwise.errors import DataError, UnsupportedModel, UsageError
from layerwise.pipeline.artifacts import FileDigests, digest_of
from layerwise.pipeline.workflow import Workflow
from layerwise.pipeline.workflow.sources import Model, Tensors, Text
from layerwise.results.durable import replace_file
from layerwise.results.told import warn_once
from layerwise.stages.contract import ModelSource, TensorSource, TextSource
from layerwise.stages.data.records import COLUMN, RECORDS, document
from layerwise.stages.models.folder import BESIDE, SINGLE, ModelFolder, shards_of
from layerwise.stages.models.positions import length_for
from layerwise.stages.models.trust import CODE, check_links

CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer's average on text: how much of a streamed dataset is read for a number of tokens."""


@dataclass(frozen=True)
class Fetched:
    """The model and the texts, as stages get them.

    Args:
        model: the dense model.
        model_digest: of its files, the dtype it is computed in, and whether its code may run.
        data: the texts by name.
        data_digests: the same, by name.
    """

    model: ModelSource
    model_digest: str
    data: Mapping[str, TextSource | TensorSource]
    data_digests: Mapping[str, str]


def fetch(workflow: Workflow, root: Path, digests: FileDigests) -> Fetched:
    """Find or fetch everything, and hash it.

    Args:
        workflow: says what.
        root: the results folder; fetched text is kept in it.
        digests: remembers the hashes of files that did not change.
    Raises:
        UnsupportedModel: no model in the folder, or it cannot be fetched.
        DataError: a dataset cannot be read, or sequences are longer than the model takes.
        UsageError: a function of the user's is not there, or fails.
    """
    if workflow.model.python is not None:
        return _made(workflow, workflow.model.python, root)
    folder = workflow.model.path if workflow.model.path is not None else _download(workflow.model)
    found = ModelFolder(folder, workflow.model.trust)
    found.check()
    check_links(folder, found.files)
    if found.ignored:
        warn_once(f"{folder}: not part of the model, and not read: {', '.join(found.ignored)}")
    contents = {str(path.relative_to(folder)): digests.sha256(path) for path in found.files}
    trusted = {"trust": True} if workflow.model.trust else {}
    texts = {
        name: _text_source(name, text, root, folder)
        for name, text in workflow.data.items()
        if isinstance(text, Text)  # of a language model all of it is, checked when it was read
    }
    return Fetched(
        ModelSource(folder, workflow.model.dtype, trust=workflow.model.trust),
        digest_of({"files": contents, "dtype": workflow.model.dtype, **trusted}),
        texts,
        {name: _text_digest(text, digests) for name, text in texts.items()},
    )


def _made(workflow: Workflow, python: str, root: Path) -> Fetched:
    """A network of the user's own, and its tensors."""
    from layerwise.pipeline.own_network import make_network, make_tensors

    tensors = {name: entry for name, entry in workflow.data.items() if isinstance(entry, Tensors)}
    made = {name: make_tensors(name, entry, root) for name, entry in tensors.items()}
    sources = {name: source for name, (source, _) in made.items()}
    model, digest = make_network(python, workflow.model.dtype, sources, root)
    return Fetched(model, digest, sources, {name: digest for name, (_, digest) in made.items()})


def _download(model: Model) -> Path:
    """The folder that the hub's cache keeps a model in: configuration and tokenizer, then just its own weights."""
    import huggingface_hub

    assert model.id is not None, "a model is a folder or an id"

    def get(*patterns: str, leave: list[str] | None = None) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                model.id, revision=model.revision, allow_patterns=list(patterns), ignore_patterns=leave
            )
        )

    try:
        folder = get(*(f"*{ending}" for ending in BESIDE), *([CODE] if model.trust else []), leave=["*/*"])
        get(SINGLE)
        index = ModelFolder(folder).index
        if index is not None:
            get(*shards_of(index))
        return folder
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"cannot fetch {model.id}: {error}",
            hint="check the id and the connection, or give the folder of a local copy (model: ./my-model)",
        ) from error


def _text_source(name: str, text: Text, root: Path, model: Path) -> TextSource:
    length = length_for(name, text.sequence_length, model)
    paths = text.paths if text.dataset is None else (_dataset_text(name, text, root),)
    return TextSource(name, paths, length, text.tokens, text.bos, text.column if text.dataset is None else None)


def _text_digest(source: TextSource, digests: FileDigests) -> str:
    contents = [digests.sha256(path) for path in source.paths]
    kinds = [path.suffix.lower() for path in source.paths]
    read = {"as": kinds, "column": source.column} if set(kinds) & set(RECORDS) else {}
    cut = {"sequence_length": source.sequence_length, "tokens": source.tokens, "bos": source.bos}
    return digest_of({"text": contents, **read, **cut})


def _dataset_text(name: str, text: Text, root: Path) -> Path:
    """The beginning of a hub dataset as a text file, as much as the tokens asked for can need; fetched once."""
    path = root / "texts" / f"{name}-{digest_of(text.resolved())[:16]}.txt"
    if path.is_file():
        return path
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"data.{name}: reading the dataset {text.dataset} needs the package `datasets`",
            hint="pip install 'layerwise[datasets]', or give local text files with `text:`",
        ) from error
    enough = None if text.tokens is None else text.tokens * CHARACTERS_PER_TOKEN
    documents: list[str] = []
    size = 0
    try:
        for row in datasets.load_dataset(text.dataset, text.config, split=text.split, streaming=True):
            documents.append(document(row, text.column or COLUMN, f"data.{name}: a record of {text.dataset}"))
            size += len(documents[-1])
            if enough is not None and size >= enough:
                break
    except (OSError, ValueError) as error:
        raise DataError(f"data.{name}: cannot read {text.dataset}: {error}") from error
    replace_file(path, "\n\n".join(documents).encode(), root / "tmp")
    return path
