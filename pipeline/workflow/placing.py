"""On which device the tasks of a stage compute, and how many GPUs each of them is given.

A stage that can use a GPU gets one if the workflow or the stage says `device: cuda` or asks for `gpus`, and, with
`device: auto`, if this machine has one. What this machine has is seen without loading torch, because a cached run does
not; whether torch can use it shows before the first stage is made (`layerwise.pipeline.runs.devices`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from layerwise.pipeline.executors import Resources
from layerwise.stages.contract import Params, Stage

NODES = Path("/dev")
"""Where NVIDIA's driver puts a file for each GPU that a process may use."""
HIDDEN = ("", "-1", "none")
"""Of CUDA_VISIBLE_DEVICES: no GPU is to be used."""


@dataclass(frozen=True)
class Asked:
    """What a workflow asks for, for the tasks of a stage.

    Args:
        resources: as they stand in the file; their device is not looked at.
        device: `auto`, `cpu` or `cuda`.
        own_device, own_gpus: whether the stage says so itself, or takes over what holds for all.
    """

    resources: Resources
    device: str
    own_device: bool = False
    own_gpus: bool = False


def place(asked: Asked, stage: Stage, params: Params, at_hand: Callable[[], bool]) -> tuple[Asked, Resources, str]:
    """Where a stage computes.

    Args:
        asked: what for.
        stage, params: of it.
        at_hand: whether this machine has a GPU.
    Returns:
        what remains of the request, as it stands in a resolved workflow; what a task gets; and a mistake, if it is one.
    """
    able = stage.on_gpu is not None and stage.on_gpu(params)
    wanted, gpus = asked.device == "cuda", asked.resources.gpus
    own_gpus = asked.own_gpus and gpus > 0
    if asked.device == "cpu" or not able:
        mistake = ""
        if asked.device == "cpu" and own_gpus:
            mistake = f"asks for {gpus:g} gpus, but its device is cpu: leave one of the two out"
        elif not able and ((wanted and asked.own_device) or own_gpus):
            superfluous = "device" if asked.own_device and wanted else "gpus"
            mistake = f"'{stage.name}' cannot use a GPU{_unless(stage)}: leave `{superfluous}` out"
        without = replace(asked.resources, gpus=0, device="cpu")
        return replace(asked, resources=without, device="cpu" if able else "auto"), without, mistake
    if wanted or gpus or at_hand():
        return asked, replace(asked.resources, gpus=gpus or 1, device="cuda"), ""
    return asked, replace(asked.resources, device="cpu"), ""


def _unless(stage: Stage) -> str:
    return "" if stage.on_gpu is None else " with these parameters"


def gpu_at_hand() -> bool:
    """Whether this machine has a GPU for this process, and a torch that is built for it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip().lower() in HIDDEN:
        return False
    if not any(node.name.removeprefix("nvidia").isdigit() for node in NODES.glob("nvidia*")):
        return False
    torch = find_spec("torch")
    folders = (torch.submodule_search_locations or []) if torch is not None else []
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders)
