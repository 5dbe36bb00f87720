"""Text into sequences of token ids.

The whole text is one stream of tokens, cut into sequences of equal length, as GPTQ and EvoPress do it. When fewer
tokens are asked for than there are, the sequences are spread evenly over the text, so that no seed is needed and one
chapter does not stand for the book. The ids are written once per stage and memory-mapped by every worker.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import DataError
from layerwise.results.durable import settle_file
from layerwise.results.links import unfinished
from layerwise.stages.contract import Context, TensorSource, TextSource
from layerwise.stages.models.trust import loading

if TYPE_CHECKING:
    from torch import Tensor


TENSORS = ".safetensors"
"""Ending of a file of tensors; token ids are kept in another."""


@dataclass(frozen=True)
class Tokens:
    """A text as sequences of token ids, or the tensors of a network of the user's own.

    Args:
        path: an .npy file, (sequences, length), int32; of tensors, as of `TensorSource`.
        total: tokens in it; of tensors, entries.
        labelled: whether it says what is right: a text does, by its next tokens.
    """

    path: Path
    total: int
    labelled: bool = True


def tokenized(context: Context, name: str) -> Tokens:
    """The sequences of one of the workflow's texts, tokenized on a worker if need be; tensors as they are.

    Args:
        context: the stage's.
        name: key in the workflow's `data:` section.
    Raises:
        DataError: the text is shorter than one sequence, or than the tokens asked for.
    """
    source = context.data[name]
    if isinstance(source, TensorSource):
        return Tokens(source.path, source.entries, source.labelled)
    target = context.items / f"tokens-{name}.npy"
    write = partial(_write_sequences, model=context.model.path, target=target, trust=context.model.trust)
    (total,) = context.executor.map(write, [source], keys=[f"tokens-{name}"])
    return Tokens(target, total)


def load_sequences(tokens: Tokens) -> Tensor:
    """Token ids as (sequences, length) int64; of tensors, the inputs."""
    import torch

    if tokens.path.suffix == TENSORS:
        return _tensors(tokens.path)["inputs"]
    return torch.from_numpy(np.load(tokens.path).astype(np.int64))


def load_labels(tokens: Tokens) -> Tensor | None:
    """The labels beside tensors, (entries,) int64; None where there are none."""
    return _tensors(tokens.path).get("labels") if tokens.path.suffix == TENSORS else None


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def _write_sequences(source: TextSource, *, model: Path, target: Path, trust: bool) -> int:
    sequences = cut(encode(source, model, trust), source)
    with unfinished(target) as temporary:
        with temporary.open("wb") as stream:
            np.save(stream, sequences)
        settle_file(temporary, target)
    return int(sequences.size)


def encode(source: TextSource, model: Path, trust: bool = False) -> NDArray[np.int32]:
    """Token ids of a whole text, in one stream.

    Args:
        source: the text.
        model: the folder that holds the tokenizer.
        trust: whether the folder's own code may run.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        with loading(model, trust) as options:
            tokenizer = AutoTokenizer.from_pretrained(model, **options)
        text = "\n\n".join(path.read_text(encoding="utf-8") for path in source.paths)
    except UnicodeDecodeError as error:
        raise DataError(f"data.{source.name}: not UTF-8 text ({error})") from error
    except (OSError, ValueError) as error:
        raise DataError(f"data.{source.name}: {error}", hint="the model folder must hold its tokenizer") from error
    return np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int32)


def cut(ids: NDArray[np.int32], source: TextSource) -> NDArray[np.int32]:
    """Sequences of equal length out of a stream of tokens.

    Args:
        ids: (tokens,).
        source: says how long and how many.
    Returns:
        (sequences, length), int32.
    Raises:
        DataError: not enough tokens.
    """
    length = source.sequence_length
    available = len(ids) // length
    if available == 0:
        raise DataError(
            f"data.{source.name}: the text has {len(ids)} tokens, fewer than one sequence of {length}",
            hint="give more text or a shorter sequence_length",
        )
    wanted = available if source.tokens is None else source.tokens // length
    if wanted == 0:
        raise DataError(
            f"data.{source.name}: {source.tokens} tokens asked for, fewer than one sequence of {length}",
            hint="ask for more tokens or a shorter sequence_length",
        )
    if wanted > available:
        raise DataError(
            f"data.{source.name}: {source.tokens} tokens asked for, but the text has {len(ids)} "
            f"({available} sequences of {length})",
            hint="ask for fewer tokens or give more text",
        )
    starts = np.arange(wanted) * available // wanted * length
    return np.stack([ids[start : start + length] for start in starts])
