"""What a misspelt name may have been meant to be."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], instead: str = "") -> str:
    """`did you mean A, B?` of the nearest names, or `instead` if none is near."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {', '.join(near)}?" if near else instead
