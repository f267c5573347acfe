"""The errors that commands report as one line, their exit codes, and suggestions.

Exit code 2: another value on the command line, or in the environment, is needed: none is at that
path, there is one already, it is out of range. Exit code 1: the arguments stand, the work failed:
a damaged file, a full disk, no network, a lost rank, a run in use.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable


class Failure(Exception):
    """Work that could not be done, for a reason the user can act on: one line, exit code 1."""


class NotFinite(Failure):
    """Infinite or NaN values where images should be: one line naming the step and the images."""


class UsageError(ValueError):
    """A bad argument: one line saying what was given and what is allowed, exit code 2."""


class MachineRefusal(UsageError):
    """A refusal that this machine's ranks meet, and other machines' ranks may not.

    speaks  whether this is the rank that says it; None: the machine's first is
    """

    def __init__(self, text: str, *, speaks: bool | None = None) -> None:
        super().__init__(text)
        local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        self.speaks = local == "0" if speaks is None else speaks


class SaidElsewhere(Exception):
    """Another rank ends the work and says why; this one ends without a word, with its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"another rank has ended with exit code {code}")
        self.code = code


FORESEEN = (Failure, UsageError, OSError)


def exit_code(error: Exception) -> int:
    """2 for a bad argument, which a path is that no file can have; 1 for other foreseen errors."""
    no_path = isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.EILSEQ)
    return 2 if no_path or isinstance(error, UsageError) else 1


def nearest(given: object, allowed: Iterable[object]) -> str:
    """ " (did you mean 'x'?)" for the closest of `allowed`, "" when none is close."""
    close = difflib.get_close_matches(str(given), [str(a) for a in allowed if a is not None], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
