"""One function over many images in threads: results in order, only a chunk of them in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# Pillow decodes and hashlib hashes outside the GIL: no need for processes, which start slowly
# and would inherit torch's threads.
NUM_THREADS = min(16, os.cpu_count() or 1)
CHUNK = 32 * NUM_THREADS

Result = TypeVar("Result")


def in_order(
    function: Callable[[int], Result], count: int, update: Callable[[int], None]
) -> Iterator[Result]:
    """Yield function(0), ..., function(count - 1); update(done) is called after every chunk.

    raises  what `function` raises, at its turn; close the generator to stop its threads
    """
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for start in range(0, count, CHUNK):
            stop = min(start + CHUNK, count)
            yield from pool.map(function, range(start, stop))
            update(stop)
