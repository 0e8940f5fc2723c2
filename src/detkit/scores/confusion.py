"""Which class was taken for which, and how far off the boxes are, at the operating point of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from detkit.scores.matching import pairs_of_any_class

if TYPE_CHECKING:
    from detkit.boxes import Boxes
    from detkit.data import Dataset, Indices
    from detkit.scores.matching import Matching

IOU = 0.5


@dataclass(frozen=True, eq=False, kw_only=True)
class Confusion:
    """How often objects of a class were found as each class.

    Detections with at least ``score_threshold`` and objects are paired whatever their class, one to one, the largest
    overlap first, from IoU 0.5. Those that are left with a difficult object or a crowd, and these, do not count.
    """

    classes: tuple[str, ...]
    matrix: NDArray[np.int64]
    """``(classes + 1, classes + 1)``: row, the object's class; column, the detection's. Last row: detections without an
    object (background); last column: objects without a detection (missed)."""
    score_threshold: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"classes": list(self.classes), "matrix": self.matrix.tolist(), "score_threshold": self.score_threshold}


@dataclass(frozen=True, eq=False, kw_only=True)
class Pairing:
    """Detections at the operating point, each with the object it lies on whatever its class, or -1."""

    labels: Indices
    boxes: Boxes
    images: Indices
    targets: Indices


def operating_point(matching: Matching, best_threshold: float | None) -> float:
    """Return the best threshold; where nothing is right, the score down to which there are as many as objects.

    Without objects that is 1, the highest score: JSON has no infinity.
    """
    if best_threshold is not None:
        return best_threshold
    scores, wanted = matching.found.scores, int(matching.positives.sum())
    if wanted >= len(scores):
        return 0.0
    return float(np.partition(scores, len(scores) - wanted)[len(scores) - wanted]) if wanted else 1.0


def pair_up(data: Dataset, matching: Matching, score_threshold: float) -> Pairing:
    """Pair detections of at least ``score_threshold`` with objects of any class, the largest overlap first.

    Of equal overlaps, as those of one box under two names, that of the better score comes first.
    Ignored objects come last, as in COCO's matching: a crowd region holds all of a box that lies in it.
    """
    found = matching.found.take(matching.found.scores >= score_threshold)
    detection, target, overlap = pairs_of_any_class(data, found.images, found.boxes, IOU)
    order = np.lexsort((target, detection, -found.scores[detection], -overlap, matching.ignored[target]))
    matched = [-1] * len(found.scores)
    free, ignored = [True] * len(data.boxes), matching.ignored.tolist()
    for d, g in zip(detection[order].tolist(), target[order].tolist(), strict=True):
        if matched[d] < 0 and (free[g] or ignored[g]):
            matched[d] = g
            free[g] = False
    return Pairing(
        labels=found.labels, boxes=found.boxes, images=found.images, targets=np.array(matched, dtype=np.int64)
    )


def count_confusions(data: Dataset, matching: Matching, pairing: Pairing, score_threshold: float) -> Confusion:
    """Count the pairs by class."""
    k = len(data.classes)
    matrix = np.zeros((k + 1, k + 1), dtype=np.int64)
    on_object = pairing.targets >= 0
    known = pairing.targets[on_object]
    counts = ~matching.ignored[known] if len(known) else np.zeros(0, dtype=bool)
    np.add.at(matrix, (data.labels[known[counts]], pairing.labels[on_object][counts]), 1)
    matrix[k, :k] = np.bincount(pairing.labels[~on_object], minlength=k)
    missed = ~matching.ignored
    missed[known] = False
    matrix[:k, k] = np.bincount(data.labels[missed], minlength=k)
    return Confusion(classes=data.classes, matrix=matrix, score_threshold=score_threshold)
