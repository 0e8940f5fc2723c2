"""Progress bars for long work, on standard error, shown only where a caller has asked for them."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Item = TypeVar("Item")

_shown = ContextVar("_shown", default=False)


@contextlib.contextmanager
def shown(wanted: bool = True) -> Iterator[None]:
    """Let `track` show its bar within the block, or not."""
    token = _shown.set(wanted)
    try:
        yield
    finally:
        _shown.reset(token)


def track(items: Iterable[Item], doing: str, total: int) -> Iterator[Item]:
    """Yield the items, with a bar that says what is done with them; one within another shows none."""
    if not _shown.get():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as bar

    with shown(False):
        yield from bar(items, doing, total=total, console=Console(stderr=True), transient=True)
