"""Regular expressions that name units, matched in time linear in the name whatever the expression is.

Python's own matcher goes back and tries again, so that `(a+)+$` takes longer than anybody waits on a name of thirty
letters, and a workflow may come from a stranger. RE2, which Arrow brings along, does not; it knows neither look-around
nor references back, which would need that.
"""

from __future__ import annotations

from functools import lru_cache

LONGEST = 1000
"""Characters of an expression."""


@lru_cache(maxsize=100_000)
def matches(expression: str, name: str) -> bool:
    """Whether a name begins with what the expression says, as `re.match` has it.

    Raises:
        ValueError: RE2 cannot read the expression.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if len(expression) > LONGEST:
        raise ValueError(f"is too long for a regular expression: at most {LONGEST:,} characters")
    try:
        pc.match_substring_regex(pa.scalar(""), expression)  # by itself: it must not close the group below
        return bool(pc.match_substring_regex(pa.scalar(name), rf"\A(?:{expression})").as_py())
    except pa.ArrowInvalid as error:
        if "invalid perl operator: (?" in str(error) or "invalid escape sequence: \\" in str(error):
            hint = " (neither look-around, as in (?!...), nor references back, as in \\1, are known)"
        else:
            hint = ""
        found = str(error).removeprefix("Invalid regular expression: ")
        raise ValueError(f"is no regular expression: {found}{hint}") from None
