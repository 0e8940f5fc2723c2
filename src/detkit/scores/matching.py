"""Which detection finds which object: the detections that count, as columns, and their matches at any overlap.

The rules are those of cocoapi's ``evaluateImg``: detections of an image and class choose by falling score, each the
free object it overlaps most, ignored ones last, the later of two equal ones; crowd regions are always free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from detkit.boxes import Boxes, xyxy_to_xywh
from detkit.data import Dataset, Flags, Indices

if TYPE_CHECKING:
    from detkit.detections import Detections
    from detkit.scores.protocol import Floats

LEAST_IOU = 0.5
"""The smallest overlap at which anything is matched here."""

_PAIRS_AT_ONCE = 200_000
"""Pairs looked at together: their columns stay in a processor's cache, which makes it three times as fast."""


class Found(NamedTuple):
    """The detections that count, as columns: image after image."""

    images: Indices
    labels: Indices
    """Indices into the classes of the data."""
    boxes: Boxes
    scores: Floats
    masks: tuple[Any, ...] | None = None
    """COCO segmentations, where every detection has one."""

    def take(self, rows: Indices | Flags) -> Found:
        """Return some of them, without masks."""
        return Found(self.images[rows], self.labels[rows], self.boxes[rows], self.scores[rows])


def gather(data: Dataset, detections: Sequence[Detections], score_floor: float) -> Found:
    """Join one `Detections` for each image; those of classes unknown to the data, or below the floor, are left out."""
    index = {name: k for k, name in enumerate(data.classes)}
    tables: dict[tuple[str, ...], Indices] = {}
    parts: list[Indices] = []
    for one in detections:
        if one.classes not in tables:
            tables[one.classes] = np.array([index.get(name, -1) for name in one.classes], dtype=np.int64)
        parts.append(tables[one.classes][one.labels])
    labels = np.concatenate([np.zeros(0, np.int64), *parts])
    boxes = np.concatenate([np.zeros((0, 4)), *(one.boxes for one in detections)])
    scores = np.concatenate([np.zeros(0), *(one.scores for one in detections)])
    images = np.repeat(np.arange(len(data)), [len(one) for one in detections])
    counts = labels >= 0
    if score_floor > 0:
        counts &= scores >= score_floor
    masks: tuple[Any, ...] | None = None
    if any(one.masks is not None for one in detections):
        every = [mask for one in detections for mask in (one.masks or (None,) * len(one))]
        masks = tuple(every[row] for row in np.flatnonzero(counts))
    return Found(images[counts], labels[counts], boxes[counts], scores[counts], masks)


class Matching:
    """The detections of each class by falling score, at most so many of an image, matched to objects of their class."""

    def __init__(self, data: Dataset, found: Found, max_detections: int) -> None:
        self.data = data
        order = np.argsort(-found.scores, kind="stable")
        order = order[np.argsort(found.labels[order].astype(np.min_scalar_type(len(data.classes))), kind="stable")]
        if np.bincount(found.images).max(initial=0) > max_detections:
            group = found.images[order] * len(data.classes) + found.labels[order]
            order = order[rank_within(group) < max_detections]
        self.found = found.take(order)
        """Sorted by class, then by falling score, then by image: the order of cocoapi's ``accumulate``."""
        self.ignored: Flags = data.crowd | data.difficult
        """Objects that are neither found nor missed."""
        self.positives: Indices = np.bincount(data.labels[~self.ignored], minlength=len(data.classes))
        """Objects of each class that count."""

    @cached_property
    def candidates(self) -> tuple[Indices, Indices, Floats]:
        """Rows of `found` and of objects of their class that overlap by `LEAST_IOU`, and by how much; in the order in
        which detections choose."""
        data, found = self.data, self.found
        k = len(data.classes)
        detection, target, overlap = _overlapping(
            data,
            found.boxes,
            key=found.images * k + found.labels,
            target_key=image_of_each_box(data) * k + data.labels,
            least=LEAST_IOU,
        )
        best_first = np.lexsort((-target, -overlap, self.ignored[target], detection))
        return detection[best_first], target[best_first], overlap[best_first]

    def at(self, threshold: float) -> Indices:
        """Return the object that each detection of `found` matches at an overlap of at least ``threshold``, or -1."""
        detection, target, overlap = self.candidates
        enough = overlap >= min(threshold, 1 - 1e-10)
        return _choose(detection[enough], target[enough], len(self.found.scores), self.data.crowd)

    def judged(self, matched: Indices) -> Flags:
        """Return which detections are right or wrong: not those on ignored objects or of classes without objects."""
        if not len(self.ignored):
            return np.zeros(len(matched), dtype=bool)
        judged: Flags = (self.positives[self.found.labels] > 0) & ~((matched >= 0) & self.ignored[matched])
        return judged


def pairs_of_any_class(data: Dataset, images: Indices, boxes: Boxes, least: float) -> tuple[Indices, Indices, Floats]:
    """Return rows of detections and of objects of any class that overlap by ``least``, and by how much."""
    return _overlapping(data, boxes, key=images, target_key=image_of_each_box(data), least=least)


def rank_within(group: Indices) -> Indices:
    """Return for each row how many rows of the same group come before it."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return rank


def image_of_each_box(data: Dataset) -> Indices:
    """Return the ``(num_boxes,)`` index of the image that each box is on."""
    return np.repeat(np.arange(len(data)), data.boxes_per_image())


def _overlapping(
    data: Dataset, boxes: Boxes, *, key: Indices, target_key: Indices, least: float
) -> tuple[Indices, Indices, Floats]:
    """Return pairs of rows with equal keys that overlap by ``least``; computed as cocoapi does, to the last bit."""
    own, others = np.ascontiguousarray(boxes.T), np.ascontiguousarray(data.boxes.T)
    parts: list[tuple[Indices, Indices, Floats]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for pairs in _pairs_of(key, target_key):
        detection, target = pairs
        for low, high in ((0, 2), (1, 3)):
            near = own[low].take(detection) < others[high].take(target)
            near &= others[low].take(target) < own[high].take(detection)
            detection, target = detection[near], target[near]
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # a box beyond all images matches nothing
            a, b = xyxy_to_xywh(boxes[detection]), xyxy_to_xywh(data.boxes[target])
            sides = np.minimum(a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
            intersection = sides[:, 0] * sides[:, 1]
            area = a[:, 2] * a[:, 3]
            union = np.where(data.crowd[target], area, area + b[:, 2] * b[:, 3] - intersection)
            overlap = intersection / union
        enough = (sides > 0).all(axis=1) & (overlap >= least)
        parts.append((detection[enough], target[enough], overlap[enough]))
    detections, targets, overlaps = (np.concatenate(column) for column in zip(*parts, strict=True))
    return detections, targets, overlaps


def _pairs_of(key: Indices, target_key: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Yield all pairs of rows with equal keys, some at a time."""
    target_order = np.argsort(target_key, kind="stable")
    ordered = target_key[target_order]
    keys, inverse = np.unique(key, return_inverse=True)
    low_of_key = np.searchsorted(ordered, keys, side="left")
    count_of_key = np.searchsorted(ordered, keys, side="right") - low_of_key
    low, num_candidates = low_of_key[inverse], count_of_key[inverse]
    total = np.concatenate([[0], np.cumsum(num_candidates)])
    start = 0
    while start < len(key):
        stop = max(int(np.searchsorted(total, total[start] + _PAIRS_AT_ONCE, side="right")) - 1, start + 1)
        number = num_candidates[start:stop]
        first = np.repeat(low[start:stop] - (total[start:stop] - total[start]), number)
        yield np.repeat(np.arange(start, stop), number), target_order[first + np.arange(len(first))]
        start = stop


def _choose(detection: Indices, target: Indices, num_detections: int, always_free: Flags) -> Indices:
    """Give each detection the first of its candidates that is free; they come in the order of choice."""
    matched = [-1] * num_detections
    free = [True] * len(always_free)
    crowd = always_free.tolist()
    for d, g in zip(detection.tolist(), target.tolist(), strict=True):
        if matched[d] < 0 and (free[g] or crowd[g]):
            matched[d] = g
            free[g] = False
    return np.array(matched, dtype=np.int64)
