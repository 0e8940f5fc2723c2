"""The record by which a plugin offers a metric of its own, computed from the same data and detections as detkit's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from detkit.data import Dataset
from detkit.detections import Detections


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A named way to turn ground truth and detections into numbers.

    ``compute`` is given the data and one `Detections` for each of its images, in order, those below the protocol's
    score floor (0.001) left out; it matches classes by name and returns finite numbers, or NaN where there is nothing
    to measure:

    >>> from detkit.data import Dataset
    >>> found = Metric(name="found", summary="detections per image", higher_is_better=True,
    ...     compute=lambda data, detections: {"found": sum(map(len, detections)) / max(len(data), 1)})
    >>> found.compute(Dataset.from_samples(["bolt"], []), [])
    {'found': 0.0}
    """

    name: str
    """What the user asks for, lower case with underscores; unique among all plugins."""
    summary: str
    """One line for listings, with the unit where there is one."""
    compute: Callable[[Dataset, Sequence[Detections]], Mapping[str, float]]
    """Data and one `Detections` per image in; one or more named numbers out."""
    higher_is_better: bool
    """Which way comparisons and searches go."""
