"""What a training call comes to: every effective setting, where it came from, and what the framework will be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from detkit.dialects import Note


class Row(msgspec.Struct, frozen=True):
    """One line of `Explanation`."""

    name: str
    value: Any
    origin: str
    kind: Literal["parameter", "option"]
    native: str
    """What the framework is told, where that differs."""
    description: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Every effective setting of a training call and where it came from."""

    backend: str
    model: str
    reason: str
    """Why this model, where it was chosen automatically."""
    rows: tuple[Row, ...]
    like: str = ""
    """Whose hyperparameters were given, if another tool's."""
    notes: tuple[Note, ...] = ()
    """What each of those becomes here."""

    def to_dict(self) -> dict[str, Any]:
        rows, notes = ([msgspec.structs.asdict(row) for row in found] for found in (self.rows, self.notes))
        about = {"backend": self.backend, "model": self.model, "reason": self.reason, "like": self.like}
        return {**about, "hyperparameters": notes, "settings": rows}
