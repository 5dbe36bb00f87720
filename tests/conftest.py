"""Fixtures that every folder may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from layerwise.pipeline.executors import RawExecutor, Resources


@pytest.fixture(scope="session")
def ray_executor() -> Iterator[RawExecutor]:
    """The one Ray of the test session, two cores, started by the first test that asks; mark such tests `ray`.

    It starts under a `RAY_ADDRESS` where nothing answers, which must not matter.
    """
    from layerwise.pipeline.executors.ray import RayExecutor
    from layerwise.pipeline.executors.ray_session import RaySession

    executor = RayExecutor(Resources(), RaySession(cores=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        assert executor.workers == 2
    yield executor
    executor.close()
