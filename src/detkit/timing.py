"""Where the seconds of a training go: images per second while it runs, and the parts of a step at its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from detkit.ranks import Place

ItemT = TypeVar("ItemT")

PROGRESS_EVERY_S = 0.5
"""At most so often progress is reported."""

SAMPLED = 16
"""On a GPU one step of so many is waited for, part by part; waiting for each would slow them all."""

SCALING = ("data", "forward", "backward", "optimizer", "validation")
"""Parts that each of several processes has its share of."""


class Meter:
    """Images per second and time left, over the steps since the last report."""

    def __init__(self, step: int, total: int) -> None:
        self._total = total
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin a new interval, after a report or something that is not training."""
        self._images, self._step, self._last = 0, step, time.monotonic()

    def update(self, step: int, num_images: int) -> dict[str, float] | None:
        """Count a step; returns numbers to report at most twice a second, and at the end."""
        self._images += num_images
        elapsed = time.monotonic() - self._last
        if elapsed < PROGRESS_EVERY_S and step < self._total:
            return None
        numbers = {
            "total_steps": float(self._total),
            "images_per_s": self._images / elapsed if elapsed else 0.0,
            "eta_s": (self._total - step) * elapsed / (step - self._step),
        }
        self.restart(step)
        return numbers


class Clock:
    """Seconds of this process by what it did. Parts do not overlap; what belongs to none counts as ``other``."""

    def __init__(self, synchronise: Callable[[], object] | None = None) -> None:
        """``synchronise`` waits for a device that works on its own."""
        self._began = _process_began()
        self._synchronise = synchronise
        self._seconds: dict[str, float] = {}
        self._sampled: dict[str, float] = {}
        self.steps = 0
        """Steps so far; the first is measured for itself, as it also makes a device ready."""

    @contextmanager
    def part(self, name: str, *, on_device: bool = False) -> Iterator[None]:
        """Count the time inside; where a device works on its own, that of its steps is sampled."""
        waits = self._synchronise if on_device else None
        if waits is None:
            began = time.time()
            yield
            self.add(name, time.time() - began)
            return
        if self.steps % SAMPLED != 1 and self.steps:
            yield
            return
        waits()
        began = time.time()
        yield
        waits()
        kept = self._sampled if self.steps else self._seconds
        kept[name] = kept.get(name, 0.0) + time.time() - began

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def move(self, source: str, target: str, seconds: float) -> None:
        """Say that some seconds of one part were those of another."""
        seconds = min(max(0.0, seconds), self._seconds.get(source, 0.0))
        self.add(source, -seconds)
        self.add(target, seconds)

    def each(self, items: Iterable[ItemT], name: str) -> Iterator[ItemT]:
        """Yield the items; the time to get each counts."""
        iterator, end = iter(items), object()
        while True:
            with self.part(name):
                item = next(iterator, end)
            if item is end:
                return
            yield item  # type: ignore[misc]

    def started(self) -> None:
        """Count all from the beginning of the process until now as ``start``."""
        self._seconds["start"] = time.time() - self._began

    def report(self) -> dict[str, float]:
        """Return the seconds of each part, ``total``, and ``not_scaling``: those that more processes do not share."""
        total = time.time() - self._began
        samples = -(-(self.steps - 1) // SAMPLED)
        for name, seconds in self._sampled.items():
            self.add(name, seconds * (self.steps - 1) / samples)
        self._sampled = {}
        known = {name: round(seconds, 3) for name, seconds in self._seconds.items()}
        other = max(0.0, total - sum(self._seconds.values()))
        scaling = sum(self._seconds.get(name, 0.0) for name in SCALING)
        return {**known, "other": round(other, 3), "not_scaling": round(total - scaling, 3), "total": round(total, 3)}


def tell(seconds: Mapping[str, float], place: Place, bytes_per_step: int = 0) -> str:
    """Say in a line where the time went."""
    total = seconds["total"] or 1.0
    parts = {name: value for name, value in seconds.items() if name not in {"total", "not_scaling"}}
    told = ", ".join(f"{name} {value / total:.0%}" for name, value in parts.items() if value / total >= 0.005)
    several = ""
    if place.size > 1:
        sent = f"; {bytes_per_step / 1e6:.1f} MB of gradients a step" if bytes_per_step else ""
        several = f" on each of {place.size} processes{sent}; {seconds['not_scaling']:.1f} s that more would not share"
    return f"{seconds['total']:.1f} s{several}: {told}"


def _process_began() -> float:
    """Return when this process began (POSIX); now, where the system does not say."""
    try:
        import psutil

        return float(psutil.Process().create_time())
    except Exception:  # it only makes the first part shorter
        return time.time()
