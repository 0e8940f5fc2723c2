"""How numbers are computed: what counts, at which overlaps, sizes and limits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

IOU_THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
"""Overlaps at which AP and AR are averaged (cocoapi ``cocoeval.py``, ``Params.setDetParams``, to the last bit)."""

RECALLS: Floats = np.linspace(0.0, 1.0, 101)
"""Recalls at which precision is read (same source)."""

AREAS = (("all", 0.0, 1e10), ("small", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large", 96.0**2, 1e10))
"""Object sizes in square pixels, both ends inside (same source)."""

SCORE_FLOOR = 0.001
"""Score from which on models are asked for detections when they are evaluated (that of Ultralytics' ``val``)."""

CROWD_RULE = "a crowd region absorbs any number of detections; it is neither found nor missed"
DIFFICULT_RULE = "a difficult object absorbs one detection; it is neither found nor missed (COCO's ignore)"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How numbers were computed. Two sets of scores compare only where their protocols are equal."""

    max_detections: int
    """The best-scored detections of each class in each image that count."""
    score_floor: float = 0.0
    """Detections below it do not count."""
    iou_thresholds: tuple[float, ...] = IOU_THRESHOLDS
    areas: tuple[tuple[str, float, float], ...] = AREAS
    """Name, least and greatest area in square pixels."""
    crowd: str = CROWD_RULE
    difficult: str = DIFFICULT_RULE
    classes: tuple[str, ...]
    """The data's class names; those without ground truth are left out of every mean."""
    num_images: int
    images: str = ""
    """sha256 of the list of image ids, in order."""
    data: str
    """`Dataset.digest` of the ground truth."""
    engine: str
    """Name and version of what matched boxes."""

    def __str__(self) -> str:
        return (
            f"COCO protocol: IoU {self.iou_thresholds[0]:.2f}-{self.iou_thresholds[-1]:.2f}, "
            f"at most {self.max_detections} detections per class and image "
            f"from score {self.score_floor:g}, crowd and difficult ignored; "
            f"{self.num_images} images, {len(self.classes)} classes, data {self.data[:12]}, {self.engine}"
        )


def mean(values: Floats) -> float:
    """Return the mean of what was measured; -1 and NaN mark what was not."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else math.nan


def plain(value: float) -> float | None:
    """Return a number for JSON, which has no NaN; None stands for it."""
    return None if math.isnan(value) else value
