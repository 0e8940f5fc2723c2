"""What is right and wrong on each image, at any score threshold, and which images to show.

Detections choose their objects by falling score, so leaving out those below a score changes nothing for the others:
what is right and what is false holds at every threshold. Only whether an object is missed depends on it, namely on the
score of the detection that finds it. So a page has only to hide and show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from detkit.scores.matching import LEAST_IOU, image_of_each_box

if TYPE_CHECKING:
    from detkit.data import Dataset, Indices
    from detkit.scores import Scores

RIGHT, FALSE, MISSED, IGNORED = "right", "false", "missed", "ignored"
"""Kinds of boxes; ignored are detections of difficult objects and crowds, and of classes without objects."""


class Judged:
    """What is right, false and missed of one entry's detections at IoU 0.5, at any threshold."""

    def __init__(self, scores: Scores) -> None:
        matching = scores.basis.matching
        found, matched = matching.found, matching.at(LEAST_IOU)
        judged = matching.judged(matched)
        order = np.lexsort((-found.scores, found.images))
        self.threshold = min(scores.confusion.score_threshold, 1.0)
        self.labels, self.boxes, self.scores = found.labels[order], found.boxes[order], found.scores[order]
        self.kinds = np.where(judged, np.where(matched >= 0, RIGHT, FALSE), IGNORED)[order]
        self._starts = np.searchsorted(found.images[order], np.arange(len(scores.data) + 1))
        self.counts = ~matching.ignored
        """Objects that count."""
        self.found_at = np.full(len(scores.data.boxes), -1.0)
        """Score of the detection that finds each object; -1 where none does."""
        self.found_at[matched[matched >= 0]] = found.scores[matched >= 0]
        false = (self.kinds == FALSE) & (self.scores >= self.threshold)
        missed = self.counts & (self.found_at < self.threshold)
        owner = image_of_each_box(scores.data)
        self.mistakes: Indices = np.bincount(found.images[order][false], minlength=len(scores.data))
        """False detections and missed objects of each image at the threshold."""
        self.mistakes = self.mistakes + np.bincount(owner[missed], minlength=len(scores.data))

    def on(self, image: int) -> range:
        """Return the rows of an image's detections, falling by score."""
        return range(int(self._starts[image]), int(self._starts[image + 1]))


def one_of_each_class(data: Dataset, names: Sequence[str]) -> list[tuple[int, str]]:
    """Return an image for each class, that with the median number of its objects and few others; none twice."""
    owner, counted = image_of_each_box(data), ~(data.crowd | data.difficult)
    chosen: dict[int, str] = {}
    for name in names:
        of_class = counted & (data.labels == data.classes.index(name))
        counts = np.bincount(owner[of_class], minlength=len(data))
        candidates = np.array([i for i in np.flatnonzero(counts).tolist() if i not in chosen], dtype=np.int64)
        if len(candidates):
            typical = np.median(counts[counts > 0])
            others = data.boxes_per_image()[candidates] - counts[candidates]
            order = np.lexsort((candidates, others, np.abs(counts[candidates] - typical)))
            chosen[int(candidates[order[0]])] = name
    return list(chosen.items())


def worst_disagreements(judged: Sequence[Judged], most: int) -> list[int]:
    """Return the images on which the numbers of mistakes lie furthest apart, then those with most of them."""
    mistakes = np.stack([one.mistakes for one in judged])
    apart, total = np.ptp(mistakes, axis=0), mistakes.sum(axis=0)
    order = np.lexsort((np.arange(len(total)), -total, -apart))
    return [i for i in order[:most].tolist() if total[i]]
