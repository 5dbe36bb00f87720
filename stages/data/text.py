"""Text into sequences of token ids.

The whole text is one stream of tokens, cut into sequences of equal length, as GPTQ and EvoPress do it, each after the
beginning-of-sequence token of a tokenizer that adds one. When fewer tokens are asked for than there are, the sequences
are spread evenly over the text, so that no seed is needed and one chapter does not stand for the book. The ids are
written once per stage and memory-mapped by every worker.

A long text is tokenized in pieces of 2^18 characters; a tokenizer that puts a space before a text puts one before each.
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
from layerwise.stages.data.reading import pieces, read_text
from layerwise.stages.data.records import Message
from layerwise.stages.models.positions import vocabulary
from layerwise.stages.models.trust import loading

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


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
    sequences = sequences_of(source, model, trust)
    with unfinished(target) as temporary:
        with temporary.open("wb") as stream:
            np.save(stream, sequences)
        settle_file(temporary, target)
    return int(sequences.size)


def sequences_of(source: TextSource, model: Path, trust: bool = False) -> NDArray[np.int32]:
    """The sequences of a text.

    Args:
        source: the text.
        model: the folder that holds the tokenizer.
        trust: whether the folder's own code may run.
    Returns:
        (sequences, length), int32.
    Raises:
        DataError: not enough tokens, no tokenizer, no text, or a token that the model has no row for.
    """
    tokenizer = _tokenizer(source, model, trust)
    sequences = cut(_encoded(tokenizer, _text(source, tokenizer)), source, _first_token(tokenizer, source))
    rows, highest = vocabulary(model), int(sequences.max())
    if rows is not None and highest >= rows:
        raise DataError(
            f"data.{source.name}: the tokenizer gives token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}), "
            f"but the model has only the tokens 0 to {rows - 1}",
            hint="the tokenizer in the model's folder belongs to another model, or its embedding was not resized",
        )
    return sequences


def encode(source: TextSource, model: Path, trust: bool = False) -> NDArray[np.int32]:
    """Token ids of a whole text, in one stream, without any that a tokenizer adds.

    Args:
        source: the text.
        model: the folder that holds the tokenizer.
        trust: whether the folder's own code may run.
    """
    tokenizer = _tokenizer(source, model, trust)
    return _encoded(tokenizer, _text(source, tokenizer))


def _text(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of all files; conversations as the model's own chat template writes them.

    Raises:
        DataError: there are conversations, and the tokenizer has no template, or the template refuses one.
    """
    from jinja2 import TemplateError

    def render(messages: list[Message]) -> str:
        try:
            return str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))
        except (ValueError, TemplateError) as error:
            raise DataError(
                f"data.{source.name}: the tokenizer makes no text of a conversation: {str(error).splitlines()[0]}",
                hint="give the text itself (`column:`), or a model with a chat template that takes these roles",
            ) from error

    return read_text(source, render)


def _tokenizer(source: TextSource, model: Path, trust: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        with loading(model, trust) as options:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"data.{source.name}: {error}", hint="the model folder must hold its tokenizer") from error
    return tokenizer


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[np.int32]:
    parts = tokenizer(pieces(text), add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


def _first_token(tokenizer: PreTrainedTokenizerBase, source: TextSource) -> int | None:
    """What each sequence begins with, if with anything: the beginning-of-sequence token.

    Raises:
        DataError: it is asked for, and the tokenizer has none.
    """
    token: int | None = tokenizer.bos_token_id
    if source.bos is None:
        return token if token is not None and tokenizer("a")["input_ids"][:1] == [token] else None
    if source.bos and token is None:
        raise DataError(
            f"data.{source.name}: bos: true, but the tokenizer has no beginning-of-sequence token",
            hint="leave `bos` out: it follows the tokenizer",
        )
    return token if source.bos else None


def cut(ids: NDArray[np.int32], source: TextSource, first: int | None = None) -> NDArray[np.int32]:
    """Sequences of equal length out of a stream of tokens.

    Args:
        ids: (tokens,).
        source: says how long and how many.
        first: the token that each begins with, beside those of the stream; None for none.
    Returns:
        (sequences, length), int32.
    Raises:
        DataError: not enough tokens.
    """
    length = source.sequence_length
    step = length if first is None else length - 1
    available = len(ids) // step
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
    starts = np.arange(wanted) * available // wanted * step
    sequences = np.stack([ids[start : start + step] for start in starts])
    return sequences if first is None else np.insert(sequences, 0, first, axis=1)
