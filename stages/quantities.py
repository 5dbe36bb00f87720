"""Numbers as people write them in a workflow: `2Mi` tokens, `2GiB` of memory, `4` where a list is meant."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

_COUNT_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_BYTE_UNITS = {
    **{"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}
_QUANTITY = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]{0,3})", re.ASCII)

LARGEST = 2**63 - 1
"""Of whole numbers: tables and tensors count in 64 bits."""


def _quantity(value: object, units: dict[str, int], wanted: str) -> object:
    """Text with a unit as a whole number; anything else is left to pydantic."""
    if not isinstance(value, str):
        return value
    match = _QUANTITY.fullmatch(value)
    if match is None or match[2] not in units or not (amount := float(match[1]) * units[match[2]]).is_integer():
        raise ValueError(f"must be {wanted}, got text '{value}'")
    return int(amount)


def parse_count(value: object) -> object:
    """`2Mi` -> 2097152, `64k` -> 64000; a number stays as it is."""
    return _quantity(value, _COUNT_UNITS, "a whole number like 65536, 64k, 32Ki or 2Mi")


def parse_bytes(value: object) -> object:
    """`2GiB` -> 2147483648, `500MB` -> 500000000; a number of bytes stays as it is."""
    return _quantity(value, _BYTE_UNITS, "a size like 512MiB or 2GiB")


Count = Annotated[
    int,
    Field(gt=0, le=LARGEST),
    BeforeValidator(parse_count),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string", "pattern": r"^\d"}]}),
]
ByteSize = Annotated[
    int,
    Field(gt=0, le=LARGEST),
    BeforeValidator(parse_bytes),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string", "pattern": r"^\d"}]}),
]


def listed(item: Any) -> BeforeValidator:
    """For a tuple that may be written as one value: `bits: 4` for `bits: [4]`.

    Args:
        item: the type of an entry.
    """
    return BeforeValidator(
        lambda value: value if isinstance(value, list | tuple) else (value,), json_schema_input_type=item | list[item]
    )
