"""Items made ready by threads before they are needed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

_AHEAD = 2
"""Items made ready ahead of the step that needs them, beside one for each thread."""

ItemT = TypeVar("ItemT")


def load_ahead(load: Callable[[int], ItemT], numbers: Iterable[int], num_workers: int) -> Iterator[ItemT]:
    """Yield ``load(number)`` for each step or image, in order, loaded by threads before they are needed."""
    if num_workers == 0:
        yield from map(load, numbers)
        return
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(num_workers, thread_name_prefix="decode"))
        waiting: deque[Future[ItemT]] = deque()
        stack.callback(lambda: [future.cancel() for future in waiting])
        for number in numbers:
            waiting.append(pool.submit(load, number))
            if len(waiting) > _AHEAD + num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loading_threads(asked: int | str) -> int:
    """Return the threads for `load_ahead`; ``auto`` is none on one or two cores, where they would only compete."""
    return int(asked) if asked != "auto" else 0 if count_cores() <= 2 else min(8, count_cores() - 1)
