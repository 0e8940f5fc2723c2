"""Data set formats: one module each, every one offered through the same plugin hook as a stranger's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detkit.data import Dataset
from detkit.params import Options


@dataclass(frozen=True, kw_only=True)
class Format:
    """How to recognise, read and write one format; plugins return these from ``detkit_formats``."""

    name: str
    """What users write in ``format=``."""
    summary: str
    """One sentence for listings."""
    sniff: Callable[[Path], bool]
    """Whether a path looks like this format; cheap, opens at most a few files, never raises for a readable path."""
    read: Callable[[Path, Any], Dataset]
    """``read(path, options)`` with an instance of `options`. Raises `InvalidData` with every finding, never skips."""
    write: Callable[[Dataset, Path], None] | None = None
    """``write(data, folder)`` into a new or empty folder; the caller made it beside its final place."""
    options: type[Options] = Options
    """Typed reading options; all have defaults."""
    carries: frozenset[str] = field(default_factory=frozenset)
    """Columns beyond boxes and names that survive writing and reading, e.g. ``difficult``, ``crowd``, ``masks``."""
