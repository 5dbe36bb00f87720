"""JSON documents that carry their own digest, so that a file which has changed on the disk is never believed.

A sealed document is a JSON object with one more member, `sha256`: the hash of all others in one spelling. It covers
what the document means and not how it is spaced, so it can be read and indented by any program. What has no seal, or
one that does not fit, is `Damaged`, and whoever reads it decides what that means: an answer that is missing, an
artifact to make again. It tells accidents, not forgery: whoever writes a file can seal it too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.results.told import warn_once

SEAL = "sha256"
"""The member that holds the digest."""


class Damaged(ValueError):
    """A document that is not what was written; says in a few words what was found."""


def canonical(document: Any) -> bytes:
    """One spelling for equal JSON documents."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest_of(document: Any) -> str:
    """SHA-256 of a JSON document, 64 hex digits."""
    return hashlib.sha256(canonical(document)).hexdigest()


def sealed(document: Mapping[str, Any], indent: int | None = None) -> bytes:
    """A document as the content of a file, its seal last.

    Raises:
        TypeError: it is not JSON.
    """
    plain = json.loads(json.dumps(document))  # as it will be read: names of members are strings, tuples are lists
    return json.dumps({**plain, SEAL: digest_of(plain)}, indent=indent).encode() + b"\n"


def unsealed(data: bytes) -> dict[str, Any]:
    """The document of a file, without its seal.

    Raises:
        Damaged: it is not what `sealed` made.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged("it is no JSON") from error
    if not isinstance(document, dict) or SEAL not in document:
        raise Damaged("it carries no checksum")
    seal = document.pop(SEAL)
    if seal != digest_of(document):
        raise Damaged("its checksum differs")
    return document


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The document of a file; None if there is no such file, or, with a warning, if it is damaged."""
    try:
        return unsealed(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, Damaged) as error:
        warn_once(f"{path} is damaged ({error}): it is passed over")
        return None
