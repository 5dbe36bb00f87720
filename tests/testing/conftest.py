"""What the tests of the suites share: which promises something breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from layerwise.testing import Promise


@pytest.fixture(scope="session")
def broken() -> Callable[[Iterable[Promise]], set[str]]:
    """The texts of the promises that are not kept; each is told with its text."""

    def find(promises: Iterable[Promise]) -> set[str]:
        found = set()
        for promise in promises:
            try:
                promise()
            except AssertionError as error:
                assert f"{promise.of} breaks the promise that {promise.text}: " in str(error)
                found.add(promise.text)
        return found

    return find
