"""Writes each metric of a run to ``metrics.csv`` in its folder."""

from __future__ import annotations

import csv

from detkit.events import Event
from detkit.runs import Run


def write(event: Event, run: Run) -> None:
    if event.kind == "metric":
        with (run.path / "metrics.csv").open("a", newline="") as file:
            csv.writer(file).writerows([event.step, name, value] for name, value in event.values.items())
