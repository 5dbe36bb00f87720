"""layerwise spends a compression budget layer by layer.

The ways in are the command line (`layerwise run flow.yaml`), the functions of this module (docs/library.md), the
results store (`layerwise.results`) and the solver library (`layerwise.solvers`). This module loads nothing heavy, so
`import layerwise.solvers` stays free of torch and Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from layerwise.version import __version__ as __version__

if TYPE_CHECKING:
    import os

    from torch import Tensor
    from transformers import PreTrainedModel

    from layerwise.results.opened import Results
    from layerwise.stages.levels.level import Level


def load(path: str | os.PathLike[str], dtype: str = "float32") -> PreTrainedModel:
    """A folder that was exported with `format: native`, as a transformers model with decoded weights.

    The folder holds all that it takes: neither the dense model nor code of its own is needed.

    Args:
        path: the folder.
        dtype: that the model computes in.
    Returns:
        the model, in evaluation mode; what was dropped is left out of it.
    Raises:
        CorruptArtifact: it is no such folder, or damaged.
        UnsupportedModel: its configuration is that of no causal language model.
    """
    from pathlib import Path

    from layerwise.stages.export.native import load as load_native

    return load_native(Path(path), dtype).model


def run(
    workflow: str | os.PathLike[str] | Mapping[str, Any],
    results: str | os.PathLike[str] = "layerwise-results",
    *,
    params: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
    profile: str | None = None,
    executor: Literal["ray", "inline"] = "inline",
    address: str | None = None,
) -> Results:
    """Run a workflow, as `layerwise run` does; what is done already is not done again.

    Args:
        workflow: its file, or what would stand in one of the present folder.
        results: the results folder, made if missing.
        params: values of declared parameters, as of `-p`.
        sets: `path.to.key=value`, as of `-s`.
        profile: a block of the workflow's `profiles`.
        executor: where the work runs: in this process, or on Ray.
        address: of a running Ray cluster to work on, for `ray`.
    Returns:
        the results of the run, also if everything was found in the cache.
    Raises:
        WorkflowError: every mistake in the workflow, with its place.
        LayerwiseError: a stage stopped; what was finished is kept, and the same call goes on.
    """
    from pathlib import Path

    from layerwise.pipeline.commands.options import agree
    from layerwise.pipeline.display import open_display
    from layerwise.pipeline.runs.run import Run
    from layerwise.pipeline.workflow import load_workflow
    from layerwise.results.opened import Results

    source = workflow if isinstance(workflow, Mapping) else Path(workflow)
    loaded = load_workflow(source, params=params, sets=sets, profile=profile)
    prepared = Run(loaded, Path(results), open_display())
    agree(prepared.workflow)
    prepared.execute(executor, ["layerwise.run"], address=address)
    return Results.of(prepared.store, prepared.id)


def open_results(results: str | os.PathLike[str] = "layerwise-results", run: str | None = None) -> Results:
    """The results of a run, as DataFrames.

    Args:
        results: the results folder.
        run: the run's id, the start of it, or the name of a workflow; None for the newest run.
    Raises:
        UsageError: no such folder, no such run, or several start like this.
    """
    from pathlib import Path

    from layerwise.results.opened import Results
    from layerwise.results.store import Store

    return Results.of(Store.open(Path(results)), run)


def compress_weight(
    weight: Tensor, method: str = "gptq", *, hessian: Tensor | None = None, bits: int | None = None, **menu: Any
) -> Level:
    """One weight, compressed by one method.

    Args:
        weight: (out, in), any float dtype; not changed.
        method: as in a menu: `gptq`, `rtn`, `magnitude`, ...
        hessian: (in, in), `X.T @ X` of inputs X (tokens, in), for methods that need it; not changed.
        bits: bits per weight, for methods that take it.
        menu: the method's other keys, as in a menu.
    Returns:
        the level: `decode()` is the weight that it stands for, `size_bytes` what it takes.
    Raises:
        UsageError: an unknown method or key, a shape that does not fit, several levels at once, or a method that does
            not work on one weight alone.
        NotFinite: NaN or Inf in the weight or the Hessian.
    """
    from layerwise.stages.compress.one_weight import compress_weight as compress

    return compress(weight, method, hessian, menu if bits is None else {"bits": bits, **menu})
