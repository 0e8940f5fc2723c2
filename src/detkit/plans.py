"""What starting a job would do, said before anything is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

MEGABYTE = 1_000_000


def to_cents(amount: float) -> float:
    """Return US dollars in whole cents, rounded up and at least one: an amount that is enough.

    >>> to_cents(0.2301), to_cents(0.23), to_cents(0.0)
    (0.24, 0.23, 0.01)
    """
    return max(math.ceil(amount * 100 - 1e-6), 1) / 100


def _time(seconds: float) -> str:
    """Return a time in plain hours, or minutes where it is less than one."""
    return f"{round(seconds / 3600, 2):g} h" if seconds >= 3600 else f"{round(seconds / 60, 1):g} min"


@dataclass(frozen=True, kw_only=True)
class Concern:
    """Something that would go wrong, or may."""

    level: Literal["error", "warning"]
    message: str
    """What is wrong, what is expected and what to type."""

    def __str__(self) -> str:
        return f"{self.level}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a place would be asked for, and what that may cost. Nothing of it has been done."""

    place: str
    """Where the job would run."""
    notes: tuple[str, ...] = ()
    """What happens to the data and the settings on the way."""
    uploads: Mapping[str, int] | None = None
    """``bytes`` and ``files`` that would travel there, and those that are there: ``bytes_there``, ``files_there``."""
    requests: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    """Every call that would create something, ``(operation, request)``, exactly as it would be sent."""
    worst_case_s: float | None = None
    """Seconds after which the place ends the job whatever it does."""
    price_per_hour: float | None = None
    """Of all machines together, US dollars, estimated; None where no price is known."""
    price_source: str = ""
    """Where the price is from and of which day."""
    concerns: tuple[Concern, ...] = ()

    @property
    def errors(self) -> tuple[Concern, ...]:
        """What the place would reject."""
        return tuple(concern for concern in self.concerns if concern.level == "error")

    @property
    def worst_case_cost(self) -> float | None:
        """US dollars if the job takes all the time that it may, an estimate; None where nothing is known."""
        if self.price_per_hour is None or self.worst_case_s is None:
            return None
        return self.price_per_hour * self.worst_case_s / 3600

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {**asdict(self), "worst_case_cost": self.worst_case_cost}

    def __str__(self) -> str:
        return "\n".join([*self._head(), *self._calls(), *map(str, self.concerns)])

    def summary(self) -> str:
        """Return the plan without the requests."""
        return "\n".join([*self._head(), *map(str, self.concerns)])

    def _head(self) -> list[str]:
        lines = [f"place      {self.place}"]
        if self.uploads is not None:
            to_send, there = self.uploads, self.uploads.get("bytes_there", 0)
            lines.append(
                f"data       {to_send['bytes'] / MEGABYTE:.1f} MB in {to_send['files']} files to upload"
                + (f", {there / MEGABYTE:.1f} MB are there already" if there else "")
            )
        if self.worst_case_s is not None:
            lines.append(f"time       at most {_time(self.worst_case_s)}, then the job is ended")
        if self.worst_case_cost is not None:
            most = to_cents(self.worst_case_cost)
            lines.append(
                f"cost       at most {most:.2f} USD, {self.price_per_hour:.3g} USD/h; an estimate: {self.price_source}"
            )
        elif self.requests:
            lines.append("cost       unknown: " + (self.price_source or "there is no price for this machine"))
        return [*lines, *(f"note       {note}" for note in self.notes)]

    def _calls(self) -> list[str]:
        import msgspec

        return [
            f"{operation} {msgspec.json.format(msgspec.json.encode(request), indent=2).decode()}"
            for operation, request in self.requests
        ]
