"""What error lines share: suggestions, and the errors that commands report as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Failure(Exception):
    """Work that could not be done, for a reason the user can act on: one line, exit code 1."""


class NotFinite(Failure):
    """Infinite or NaN values where images should be: one line naming the step and the images."""


class UsageError(ValueError):
    """A bad argument: one line saying what was given and what is allowed, exit code 2."""


def nearest(given: object, allowed: Iterable[object]) -> str:
    """ " (did you mean 'x'?)" for the closest of `allowed`, "" when none is close."""
    close = difflib.get_close_matches(str(given), [str(a) for a in allowed if a is not None], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
