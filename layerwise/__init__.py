"""layerwise spends a compression budget layer by layer.

The three ways in are the command line (`layerwise run flow.yaml`), the results store (`layerwise.results`) and the
solver library (`layerwise.solvers`). This module loads nothing heavy, so `import layerwise.solvers` stays free of
torch and Ray.
"""

__version__ = "0.1.0"
