"""The workflow file: reading it, checking all of it, and the graph that it describes.

`load.py` shows the order in which the other modules work; nothing here looks at an artifact or imports anything heavy.
"""

from __future__ import annotations

from layerwise.pipeline.workflow.load import Node, Workflow, load_workflow

__all__ = ["Node", "Workflow", "load_workflow"]
