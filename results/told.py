"""What is wrong with a file is said once by a process, however often the file is met: a log is followed for hours."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

_told: set[str] = set()


def warn_once(text: str) -> None:
    """Warn, unless these very words have been said."""
    if text not in _told:
        _told.add(text)
        logger.warning("%s", text)
