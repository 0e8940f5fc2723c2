"""How many objects too many or too few are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detkit.data import Dataset
from detkit.detections import Detections
from detkit.metrics import Metric

SCORE = 0.5


def compute(data: Dataset, detections: Sequence[Detections]) -> Mapping[str, float]:
    pairs = zip(data.boxes_per_image().tolist(), detections, strict=True)
    errors = [abs(len(found.above(SCORE)) - count) for count, found in pairs]
    return {"count_error": sum(errors) / max(len(errors), 1)}


METRIC = Metric(
    name="count_error",
    summary="objects too many or too few in a picture, on average",
    compute=compute,
    higher_is_better=False,
)
