"""Being asked to stop: Ctrl-C and SIGTERM end a run after the step it is in."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that gets the name of a signal that asks to stop; a second one acts as usual."""
    received: list[str] = []
    previous = {}

    def note(number: int, _frame) -> None:
        received.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
