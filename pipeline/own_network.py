"""Calls the functions of a workflow that make a network and its tensors, and writes down what they gave.

They are called each time a workflow is run, because what they read (a file of weights, a data set) may have changed;
what they gave is kept in the results folder under the digest of its contents, and workers read it from there. The
digest of a network covers the source of its function, for the same weights in another forward are another network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import DataError
from layerwise.pipeline.artifacts import digest_of
from layerwise.pipeline.source import file_digest, source_digest
from layerwise.pipeline.workflow.sources import Tensors
from layerwise.results.durable import replace_file
from layerwise.stages.contract import ModelSource, TensorSource
from layerwise.stages.models.code import call, split
from layerwise.stages.models.folder import SINGLE

if TYPE_CHECKING:
    from torch import Tensor


def make_network(python: str, dtype: str, data: Mapping[str, TensorSource], root: Path) -> tuple[ModelSource, str]:
    """Call the function of a network, and keep its weights.

    Args:
        python: the function.
        dtype: what the network is computed in.
        data: the workflow's tensors; the network is tried on two entries of the first.
        root: the results folder.
    Returns:
        the network as a source, and its digest.
    Raises:
        UsageError: the function fails.
        UnsupportedModel: it gives no network.
        DataError: there are no tensors to try it on.
    """
    from layerwise.stages.models.classifier import EXAMPLE, made_by, weights_of

    weights = _bytes(weights_of(made_by(python)))
    example = _bytes({"inputs": _example(data)})
    material = {"code": _code_digest(python), "weights": _sha256(weights), "dtype": dtype}
    digest = digest_of(material)
    folder = root / "networks" / digest_of({**material, "example": _sha256(example)})[:16]
    for name, content in ((SINGLE, weights), (EXAMPLE, example)):
        _keep(folder / name, content, root)
    return ModelSource(folder, dtype, trust=True, python=python), digest


def make_tensors(name: str, entry: Tensors, root: Path) -> tuple[TensorSource, str]:
    """Call the function of an entry of `data:`, and keep what it gives.

    Returns:
        the tensors as a source, and their digest.
    Raises:
        UsageError: the function fails.
        DataError: it gives something else than inputs, or inputs and labels.
    """
    tensors = _chosen(name, entry, _checked(name, entry.python, call(entry.python)))
    content = _bytes(tensors)
    digest = _sha256(content)
    path = root / "tensors" / f"{name}-{digest[:16]}.safetensors"
    _keep(path, content, root)
    return TensorSource(name, path, len(tensors["inputs"]), "labels" in tensors), digest


def _checked(name: str, python: str, given: Any) -> dict[str, Tensor]:
    import torch

    parts = given if isinstance(given, tuple) else (given,)
    hint = "the function takes nothing and gives inputs, (entries, ...), or (inputs, labels), as tensors or arrays"
    if len(parts) not in (1, 2):
        raise DataError(f"data.{name}: {python} gives {len(parts)} things", hint=hint)
    try:
        tensors = [torch.as_tensor(part) for part in parts]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"data.{name}: {python} gives no tensors: {error}", hint=hint) from error
    inputs = tensors[0]
    if inputs.dim() < 2 or len(inputs) < 2:
        raise DataError(f"data.{name}: {python} gives inputs of shape {tuple(inputs.shape)}", hint=hint)
    if inputs.is_floating_point() and not inputs.isfinite().all():
        raise DataError(f"data.{name}: {python} gives inputs that are NaN or Inf")
    if len(tensors) == 1:
        return {"inputs": inputs}
    labels = tensors[1]
    if labels.shape != inputs.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"data.{name}: {python} gives labels of shape {tuple(labels.shape)} and dtype {labels.dtype} for "
            f"{len(inputs)} inputs",
            hint="labels are one whole number for each input",
        )
    return {"inputs": inputs, "labels": labels.long()}


def _chosen(name: str, entry: Tensors, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As many entries as were asked for, spread evenly, so that no seed is needed."""
    import torch

    total = len(tensors["inputs"])
    wanted = total if entry.entries is None else entry.entries
    if not 1 <= wanted <= total:
        raise DataError(f"data.{name}: {wanted} entries asked for, but {entry.python} gives {total}")
    chosen = torch.arange(wanted) * total // wanted
    return {key: tensor.detach().cpu()[chosen].contiguous() for key, tensor in tensors.items()}


def _example(data: Mapping[str, TensorSource]) -> Tensor:
    """Two entries that differ, as far as there are such."""
    import torch
    from safetensors.torch import load_file

    if not data:
        raise DataError("a network of your own needs data", hint="add `data: {calibration: {python: ...}}`")
    inputs = load_file(next(iter(data.values())).path)["inputs"]
    other = next((entry for entry in inputs if not torch.equal(entry, inputs[0])), inputs[0])
    return torch.stack([inputs[0], other])


def _code_digest(python: str) -> str:
    parts = split(python)
    assert parts is not None, "the workflow was checked"
    file, module, function = parts
    return digest_of({"source": source_digest(module) if file is None else file_digest(file), "function": function})


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    content: bytes = save(dict(tensors))
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _keep(path: Path, content: bytes, root: Path) -> None:
    """Write what is not there yet, or was damaged."""
    if not (path.is_file() and path.read_bytes() == content):
        replace_file(path, content, root / "tmp")
