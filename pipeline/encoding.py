"""Printing on terminals, pipes and logs whose encoding has not every character (`PYTHONIOENCODING=ascii`, Latin-1).

A run that took hours must not end because a line of a table cannot be written. What the encoding lacks is written in
letters that it has, each as wide as what it stands for where there is one; anything else as an escape.
"""

from __future__ import annotations

import codecs
import io
import sys

PLAIN = {
    **{"─": "-", "│": "|", "━": "=", "╸": "=", "╺": " ", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'},
    **{"×": "x", "·": ".", "•": "*", "µ": "u", "μ": "u", "→": ">", "←": "<", "≤": "<", "≥": ">", "≈": "~", "−": "-"},
    **{"…": "...", "\xa0": " "},
}
"""What stands for a character that an encoding lacks."""

_NAME = "layerwise.plain"


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """For `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(char, ascii(char)[1:-1]) for char in lacking), error.end


def never_fail() -> None:
    """Have standard output and standard error write something for every character."""
    codecs.register_error(_NAME, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_NAME)
