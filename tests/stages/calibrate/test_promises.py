"""Every statistic of the table keeps what `layerwise.testing` says that statistics promise."""

from __future__ import annotations

import pytest

from layerwise.stages.calibrate import STATISTICS
from layerwise.testing import Promise, statistic_promises


@pytest.mark.parametrize("promise", [promise for name in STATISTICS for promise in statistic_promises(name)], ids=str)
def test_a_statistic_keeps_its_promises(promise: Promise) -> None:
    promise()
