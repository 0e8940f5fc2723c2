"""What all verbs print alike: errors, warnings, JSON, tables."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from detkit.errors import DetkitError

FINDINGS, WRONG_USE, BACKEND_FAILED, STOPPED = 1, 2, 3, 130
"""Exit codes beside 0; 130 is what shells use for Ctrl-C."""

_PIPE_WIDTH = 160


def report(error: DetkitError, *, as_json: bool) -> int:
    """Print an error, for programs also as JSON on standard output, and return its exit code."""
    tell(f"error: {error}")
    if as_json:
        print_json({"error": str(error), "code": error.exit_code})
    return error.exit_code


def show_warning(message: Warning | str, *_position: object, **_more: object) -> None:
    """Stand in for `warnings.showwarning`: users need the words, not the line of code."""
    tell(f"warning: {message}")


def tell(text: str) -> None:
    """Print to standard error, where everything goes that is not the answer."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any, *, indent: int = 2) -> None:
    """Print one JSON value; NaN becomes null, a path its text. ``indent=-1`` keeps it on one line."""
    import msgspec

    try:
        text = msgspec.json.encode(value, enc_hook=str)
    except UnicodeEncodeError:  # a file name that is no text
        text = json.dumps(value, default=str).encode()
    print(msgspec.json.format(text, indent=indent).decode(), flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; the first column is never cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))
    console.print(table)


def shown(path: Path | str) -> str:
    """Return a path or URL as one would type it in a shell here."""
    if isinstance(path, str):
        return shlex.quote(path)
    relative = os.path.relpath(path)
    return shlex.quote(str(path) if relative.startswith("..") else relative)
