"""Which files of a model folder are the model: those that transformers reads, and nothing that lies beside them.

Weights are `model.safetensors`, else the shards that `model.safetensors.index.json` names, which may stand in folders
below. Everybody who loads, hashes, counts, ships or exports a model asks here, so that all of them mean the same files.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

from layerwise.errors import UnsupportedModel

INDEX = "model.safetensors.index.json"
"""Says which weights are in which file, where there are several."""

SINGLE = "model.safetensors"

CONFIG = "config.json"

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
"""What a tokenizer stands in."""

QUANTIZED = "quantization_config"
"""Where a configuration says how its weights are quantized."""

POINTER = b"version https://git-lfs"
"""What stands in a file of a clone without Git LFS."""

BESIDE = (".json", ".txt", ".model", ".jinja")
"""Endings of the files beside the weights that belong to a model: configuration, tokenizer."""

ADAPTER = "adapter_"
"""What the files of a PEFT adapter begin with; it is another model than the one below it."""

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
"""Endings of files that hold weights, in this format or another."""

AGAIN = "copy or download the model again, or save it with `save_pretrained`"


class ModelFolder:
    """A folder as `save_pretrained` writes it, and whatever came to lie in it.

    Args:
        path: the folder.
        trust: whether code that stands in it belongs to the model.
    """

    def __init__(self, path: Path, trust: bool = False) -> None:
        self.path, self.trust = path, trust

    def check(self) -> None:
        """Refuse what is no dense model, before anybody loads it.

        Raises:
            UnsupportedModel: no configuration, or none that can be read; a file that stands for one elsewhere; a pipe
                or a folder in the place of one; weights that are quantized already; or what `weights` raises.
        """
        path = self.path / CONFIG
        for place in (self.path / name for name in (CONFIG, SINGLE, INDEX, *TOKENIZER)):
            if place.exists() and not place.is_file():  # a pipe would never end
                kind = "a folder" if place.is_dir() else "no regular file"
                raise UnsupportedModel(f"{place} is {kind}, where a file of the model should stand", hint=AGAIN)
        if not path.is_file():
            raise UnsupportedModel(f"{self.path} holds no {CONFIG}", hint="give the folder of a Hugging Face model")
        for file in self.files:
            with file.open("rb") as stream:
                if stream.read(len(POINTER)) == POINTER:
                    raise UnsupportedModel(
                        f"{file} is a pointer of Git LFS and not what it points to", hint="run `git lfs pull` there"
                    )
        try:
            config = json.loads(path.read_bytes())
        except ValueError as error:
            raise UnsupportedModel(f"{path} is no JSON: {error}", hint=AGAIN) from error
        if not isinstance(config, dict):
            raise UnsupportedModel(f"{path} holds no settings by name", hint=AGAIN)
        if config.get(QUANTIZED):
            told = config[QUANTIZED]
            method = told.get("quant_method", "without a name") if isinstance(told, dict) else told
            raise UnsupportedModel(
                f"{self.path} is already quantized ({method}, says {QUANTIZED} in its {CONFIG})",
                hint="give the dense model that it was made of",
            )

    @property
    def index(self) -> Path | None:
        """The index of the weight files, where it is what says which they are."""
        index = self.path / INDEX
        return index if index.is_file() and not (self.path / SINGLE).is_file() else None

    @cached_property
    def weights(self) -> tuple[Path, ...]:
        """The weight files, in name order; none, where there are no safetensors.

        Raises:
            UnsupportedModel: the index is no index, or names files outside of the folder or that are not there.
        """
        if (self.path / SINGLE).is_file():
            return (self.path / SINGLE,)
        if self.index is None:
            return ()
        names = shards_of(self.index)
        missing = [name for name in names if not (self.path / name).is_file()]
        if missing:
            raise UnsupportedModel(
                f"{self.index} names {len(names)} weight files, of which {len(missing)} are not there: "
                f"{', '.join(missing[:3])}",
                hint=AGAIN,
            )
        return tuple(self.path / name for name in names)

    @property
    def beside(self) -> tuple[Path, ...]:
        """Configuration and tokenizer, code if it is trusted, and no index of weight files."""
        endings = (*BESIDE, ".py") if self.trust else BESIDE
        return tuple(
            file
            for file in sorted(self.path.iterdir())
            if file.suffix in endings
            and file.is_file()
            and not file.name.endswith(".index.json")
            and not file.name.startswith(ADAPTER)
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """All that makes the model what it is."""
        return (*self.weights, *self.beside, *([] if self.index is None else [self.index]))

    @property
    def ignored(self) -> tuple[str, ...]:
        """What looks as if it were the model's and is not: other weights, adapters, an index that nothing reads."""
        mine = set(self.files)
        return tuple(
            file.name
            for file in sorted(self.path.iterdir())
            if file not in mine
            and (
                file.suffix in WEIGHTS
                or file.name.endswith(".index.json")
                or file.name.startswith(ADAPTER)
                or (file.is_dir() and not any(path.parent == file for path in mine) and _holds_weights(file))
            )
        )


def shards_of(index: Path) -> list[str]:
    """The weight files that an index names, relative to its folder, in name order.

    Raises:
        UnsupportedModel: it is no index, or names files outside of its folder.
    """
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not names:
            raise ValueError("it names no files")
        paths = [Path(name) for name in names]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedModel(f"{index} is no index of weight files: {_told(error)}", hint=AGAIN) from error
    for path in paths:
        if path.is_absolute() or ".." in path.parts:
            raise UnsupportedModel(
                f"{index} names weights outside of its folder: {path}", hint="move them into the folder"
            )
    return names


def _holds_weights(folder: Path) -> bool:
    return any(file.suffix in WEIGHTS for file in folder.iterdir())


def _told(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)
