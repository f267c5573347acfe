"""Words that several error lines share. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: object, allowed: Iterable[object]) -> str:
    """ " (did you mean 'x'?)" for the closest of `allowed`, "" when none is close."""
    close = difflib.get_close_matches(str(given), [str(a) for a in allowed if a is not None], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
