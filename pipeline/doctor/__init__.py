"""`layerwise doctor`: what stands between this machine and a run, one line per thing that can be wrong.

`examination.py` lists all checks in the order in which they are printed; each stands in the module of its group.
`contents.py` reads everything in the results folder, where that is asked for. What is heavy or may crash (torch, the
solvers) is tried in a process of its own (`child.py`), so nothing here needs a package that it is asked to check.

Left out: starting Ray, and what only another machine could tell (a lock that reaches it).
"""

from __future__ import annotations

from layerwise.pipeline.doctor.contents import read_all
from layerwise.pipeline.doctor.examination import as_json, as_line, examine

__all__ = ["as_json", "as_line", "examine", "read_all"]
