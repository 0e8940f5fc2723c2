"""Precision against recall, and precision, recall and F1 against the score threshold, all at IoU 0.5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from detkit.scores.matching import LEAST_IOU
from detkit.scores.protocol import RECALLS, plain

if TYPE_CHECKING:
    from detkit.data import Indices
    from detkit.scores.matching import Matching
    from detkit.scores.protocol import Floats

THRESHOLDS: Floats = np.linspace(0.0, 1.0, 101)
"""Score thresholds at which the curves are read."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Curves:
    """Curves at IoU 0.5; NaN for classes without objects. The mean over classes is ``np.nanmean(curve, axis=0)``."""

    classes: tuple[str, ...]
    recalls: Floats
    """``(101,)``, 0 to 1."""
    precision_at_recall: Floats
    """``(classes, 101)``: the best precision with at least that recall, as COCO reads it."""
    thresholds: Floats
    """``(101,)``, 0 to 1."""
    precision: Floats
    """``(classes, 101)``, of the detections with at least that score; NaN where there are none."""
    recall: Floats
    """``(classes, 101)``."""
    f1: Floats
    """``(classes, 101)``."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, rounded to four digits; None stands for NaN."""
        columns = ("precision_at_recall", "precision", "recall", "f1")
        return {
            "recalls": self.recalls.round(4).tolist(),
            "thresholds": self.thresholds.round(4).tolist(),
            "classes": {
                name: {column: _plain(getattr(self, column)[k]) for column in columns}
                for k, name in enumerate(self.classes)
            },
        }


@dataclass(frozen=True)
class BestThreshold:
    """Where the mean over classes of F1 at IoU 0.5 is highest."""

    score: float | None
    """Halfway between the last detection to keep and the first to drop; None where no detection is right."""
    f1: float | None
    """None without objects or detections."""


class _Counts:
    """Right and judged detections of each class, falling by score."""

    def __init__(self, matching: Matching) -> None:
        matched = matching.at(LEAST_IOU)
        judged = matching.judged(matched)
        self.positives = matching.positives
        self.labels, self.scores = matching.found.labels[judged], matching.found.scores[judged]
        hit = matched[judged] >= 0
        self.any_hit = bool(hit.any())
        self.first = np.flatnonzero(np.diff(self.labels, prepend=-1))
        """Row where each class begins that has any."""
        sizes = np.diff(self.first, append=len(self.labels))
        self.kept = np.arange(len(self.labels)) - np.repeat(self.first, sizes) + 1
        """Detections of the class down to this one."""
        hits: Indices = np.cumsum(hit)
        self.hits = hits - np.repeat(hits[self.first] - hit[self.first], sizes)
        """Of these, the right ones."""
        self.f1 = 2 * self.hits / (self.positives[self.labels] + self.kept)


def find_best_threshold(matching: Matching) -> BestThreshold:
    """Try every distinct score as the threshold of all classes."""
    if not matching.positives.any() or not len(matching.found.scores):
        return BestThreshold(None, None)
    counts = _Counts(matching)
    if not len(counts.labels):
        return BestThreshold(None, None)
    if not counts.any_hit:
        return BestThreshold(None, 0.0)
    # Keeping one more detection changes the F1 of its class only: the mean is a running sum over falling scores.
    change = np.diff(counts.f1, prepend=0.0)
    change[counts.first] = counts.f1[counts.first]
    falling = np.argsort(-counts.scores, kind="stable")
    scores = counts.scores[falling]
    mean_f1 = np.cumsum(change[falling]) / np.count_nonzero(matching.positives)
    last_of_score = np.append(scores[1:] < scores[:-1], True)
    best = int(np.argmax(np.where(last_of_score, mean_f1, -1.0)))
    keep, drop = float(scores[best]), float(scores[best + 1]) if best + 1 < len(scores) else 0.0
    middle = (keep + drop) / 2
    return BestThreshold(middle if middle > drop else keep, float(mean_f1[best]))


def draw_curves(matching: Matching, precision_at_50: Floats) -> Curves:
    """Read the curves; ``precision_at_50`` is the engine's ``(recall, class)`` array at IoU 0.5."""
    counts = _Counts(matching)
    num_classes = len(matching.data.classes)
    precision, recall, f1 = (np.full((num_classes, len(THRESHOLDS)), np.nan) for _ in range(3))
    for k in np.flatnonzero(matching.positives).tolist():
        rows = slice(*np.searchsorted(counts.labels, [k, k + 1]).tolist())
        kept = np.searchsorted(-counts.scores[rows], -THRESHOLDS, side="right")
        hits = np.concatenate([[0], counts.hits[rows]])[kept]
        precision[k] = np.divide(hits, kept, out=np.full(len(kept), np.nan), where=kept > 0)
        recall[k] = hits / matching.positives[k]
        f1[k] = 2 * hits / (matching.positives[k] + kept)
    return Curves(
        classes=matching.data.classes,
        recalls=RECALLS,
        precision_at_recall=np.where(precision_at_50.T > -1, precision_at_50.T, np.nan),
        thresholds=THRESHOLDS,
        precision=precision,
        recall=recall,
        f1=f1,
    )


def _plain(values: Floats) -> list[float | None]:
    return [plain(value) for value in values.round(4).tolist()]
