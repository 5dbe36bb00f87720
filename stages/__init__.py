"""What a workflow is made of: one file per stage.

A new stage is one file and one line in `STAGES`. Other packages join through the entry point group
`layerwise.stages`, with the same `module:object` text. This module imports nothing heavy.
"""

from __future__ import annotations

from layerwise.stages.contract import Stage
from layerwise.stages.registry import lookup, names

STAGES = {
    "transform": "layerwise.stages.transform.stage:STAGE",
    "calibrate": "layerwise.stages.calibrate.stage:STAGE",
    "compress": "layerwise.stages.compress.stage:STAGE",
    "profile": "layerwise.stages.profile.stage:STAGE",
    "latency": "layerwise.stages.latency.stage:STAGE",
    "allocate": "layerwise.stages.allocate.stage:STAGE",
    "apply": "layerwise.stages.apply.stage:STAGE",
    "recover": "layerwise.stages.recover.stage:STAGE",
    "speed": "layerwise.stages.latency.speed:STAGE",
    "evaluate": "layerwise.stages.evaluate.stage:STAGE",
    "export": "layerwise.stages.export.stage:STAGE",
}


def stage_names() -> list[str]:
    """Every stage that `uses:` may name."""
    return names(STAGES, "layerwise.stages")


def find_stage(name: str) -> Stage:
    """The stage behind `uses: name`.

    Raises:
        UsageError: nobody offers it; names the nearest known one.
    """
    stage = lookup(name, STAGES, group="layerwise.stages", kind="stage")
    assert isinstance(stage, Stage), f"{name} must point at a Stage"
    return stage
