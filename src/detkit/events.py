"""What a run tells while it goes on: one `Event` per line of ``metrics.jsonl``, and the same as a line of a log."""

from __future__ import annotations

import contextlib
from typing import Literal

import msgspec

_MARK = "detkit "
NUMBER = r"([-+0-9.eE]+)"


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of ``metrics.jsonl``."""

    t: float
    """Seconds since the epoch (POSIX)."""
    kind: Literal["log", "progress", "metric", "state"]
    values: dict[str, float | str]
    """``train/*``, ``val/loss*``, ``val/AP`` ... for metrics; ``message`` for logs; ``state`` for states."""
    step: int | None = None
    """Optimizer steps done."""
    epoch: float | None = None
    """Epochs done, with a fraction."""


def to_line(event: Event) -> str:
    """Return an event as a line for a log that others read: ``detkit val/AP=0.31; {...}``.

    The numbers come first, for whoever looks for them with a `pattern`; the rest is the event as JSON.
    """
    numbers = "".join(f"{name}={value:.9g}; " for name, value in event.values.items() if isinstance(value, float | int))
    return f"{_MARK}{numbers}{msgspec.json.encode(event).decode()}"


def from_line(line: str) -> Event | None:
    """Return the event that `to_line` wrote; None for any other line."""
    start = line.find("{")
    if line.startswith(_MARK) and start > 0:
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(line[start:], type=Event)
    return None


def validation_loss(part: str) -> str:
    """Return how a part of the loss, or ``loss`` itself, is called where it is of the validation images.

    >>> validation_loss("classification"), validation_loss("loss_cls"), validation_loss("loss")
    ('val/loss_classification', 'val/loss_cls', 'val/loss')
    """
    return f"val/{part}" if part.startswith("loss") else f"val/loss_{part}"


def pattern(name: str) -> str:
    """Return the regular expression that finds a number by its name in such lines, as its only group."""
    return rf"^{_MARK}(?:\S+=\S+; )*{name}={NUMBER};"
