"""What training from an earlier model did to the classes that it knew: AP before and after, as a record."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec

FILE = "output/data/forgetting.json"
"""Where a run directory has the record."""


class APChange(msgspec.Struct, frozen=True, kw_only=True):
    """AP of the parent and of the new model on the same objects; None where there are none."""

    objects: int
    before: float | None
    after: float | None
    difference: float | None
    """``after`` less ``before``."""

    @classmethod
    def between(cls, before: float, after: float, objects: int) -> APChange:
        """Put two scores side by side; NaN becomes None."""
        one, other = (value if math.isfinite(value) else None for value in (before, after))
        difference = None if one is None or other is None else other - one
        return cls(objects=objects, before=one, after=other, difference=difference)

    def __str__(self) -> str:
        numbers = (self.before, self.after)
        shown = " -> ".join("-" if value is None else f"{value:.3f}" for value in numbers)
        return shown if self.difference is None else f"{shown} ({self.difference:+.3f})"


class Forgetting(msgspec.Struct, frozen=True, kw_only=True):
    """Parent and new model on images held out of the parent's training, by class; only classes that both know."""

    data: str
    """Which images these are."""
    images: int
    overall: APChange
    """Means over the classes."""
    classes: dict[str, APChange]

    def __str__(self) -> str:
        width = max(len(name) for name in (*self.classes, "class"))
        lines = [f"forgetting on {self.images} {self.data}: AP {self.overall}"]
        lines += [f"{'class':<{width}}  objects  AP before -> after"]
        lines += [f"{name:<{width}}  {change.objects:>7}  {change}" for name, change in self.classes.items()]
        return "\n".join(lines)


def read_forgetting(run: Path) -> Forgetting | None:
    """Return the record of a run directory, None where it has none."""
    file = run / FILE
    return msgspec.json.decode(file.read_bytes(), type=Forgetting) if file.is_file() else None
