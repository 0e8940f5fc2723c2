"""Pascal VOC's mean average precision, which differs from COCO's AP50 in how objects are chosen and curves are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from detkit.scores.protocol import mean, plain

if TYPE_CHECKING:
    from detkit.scores.matching import Matching
    from detkit.scores.protocol import Floats


@dataclass(frozen=True, eq=False, kw_only=True)
class VOCScores:
    """Average precision as the devkits of Pascal VOC compute it (``VOCevaldet.m``), at IoU 0.5.

    A detection is right if the object of its class that it overlaps most is not taken yet; unlike COCO's it never
    falls back on another. Difficult objects, and crowds, count neither way. Every detection that the protocol's limit
    leaves is scored, as VOC itself knows no limit.
    """

    map_07: float
    """Mean over classes of the 11-point average precision: the mean of the best precision at recalls 0, .1 ... 1."""
    map_10: float
    """Mean over classes of the area under the monotone precision-recall curve, the rule since VOC 2010."""
    per_class: dict[str, dict[str, float]]
    """``AP07`` and ``AP10`` of each class; NaN without objects."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; None stands for NaN."""
        per_class = {name: {k: plain(v) for k, v in row.items()} for name, row in self.per_class.items()}
        return {"mAP_07": plain(self.map_07), "mAP_10": plain(self.map_10), "per_class": per_class}


def score_voc(matching: Matching) -> VOCScores:
    """Compute both numbers from the detections of a matching."""
    data, found = matching.data, matching.found
    detection, target, overlap = matching.candidates  # from IoU 0.5, as here
    best = np.lexsort((target, -overlap, detection))  # the first of equal ones, as MATLAB's comparison with ``>``
    detection, first = np.unique(detection[best], return_index=True)
    target = target[best][first]

    matched = np.full(len(found.scores), -1, dtype=np.int64)
    matched[detection] = target
    counts = np.ones(len(matched), dtype=bool)
    counts[detection] = ~matching.ignored[target]
    # Of the detections whose best object is the same, the best-scored one is right; rows fall by score within a class.
    right = np.zeros(len(matched), dtype=bool)
    _, first_of_object = np.unique(target, return_index=True)
    right[detection[first_of_object]] = True

    per_class: dict[str, dict[str, float]] = {}
    for k, name in enumerate(data.classes):
        rows = slice(*np.searchsorted(found.labels, [k, k + 1]).tolist())
        of_class = counts[rows]
        per_class[name] = _average_precision(right[rows][of_class], int(matching.positives[k]))
    return VOCScores(
        map_07=mean(np.array([row["AP07"] for row in per_class.values()])),
        map_10=mean(np.array([row["AP10"] for row in per_class.values()])),
        per_class=per_class,
    )


def _average_precision(right: np.ndarray[Any, np.dtype[np.bool_]], positives: int) -> dict[str, float]:
    if not positives:
        return {"AP07": float("nan"), "AP10": float("nan")}
    hits = np.cumsum(right)
    recall: Floats = np.concatenate([[0.0], hits / positives, [1.0]])
    precision: Floats = np.concatenate([[0.0], hits / np.arange(1, len(right) + 1), [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # The devkit's recall levels are 0:0.1:1; its comparison is ``rec >= t``.
    levels = np.searchsorted(recall[1:-1], np.arange(11) / 10, side="left")
    at_levels = np.append(envelope[1:-1], 0.0)[levels]
    return {"AP07": float(at_levels.mean()), "AP10": float(np.sum(np.diff(recall) * envelope[1:]))}
