"""Optimal Localisation Recall Precision error, a number of Oksuz, Cam, Akbas and Kalkan.

"Localization Recall Precision (LRP): A New Performance Metric for Object Detection", ECCV 2018 (arXiv 1807.01696), and
"One Metric to Measure Them All", TPAMI 2021 (arXiv 2011.10772). For one class and the detections from a score on::

    LRP = (sum over found of (1 - IoU) / (1 - tau)  +  false  +  missed) / (found + false + missed)

oLRP is the least LRP that any score gives. Its components are those at that score: ``loc`` is the mean of 1 - IoU over
what is found, ``fp`` is 1 - precision, ``fn`` is 1 - recall.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from detkit.boxes import Boxes, area, iou
from detkit.data import Dataset, Flags, Indices
from detkit.detections import Detections

Floats = NDArray[np.float64]

TAU = 0.5
"""Overlap from which on an object is found; that of both papers."""

NAMES = ("oLRP", "oLRP_loc", "oLRP_fp", "oLRP_fn")
"""Best is 0 and worst is 1 for all, but for the second, which ends at 1 - tau."""


def compute(data: Dataset, detections: Sequence[Detections]) -> dict[str, float]:
    """Return oLRP, oLRP_loc, oLRP_fp and oLRP_fn, means over the classes with objects; lower is better.

    Classes are matched by name. Crowd regions and difficult objects are neither found nor missed. A class of which
    no detection is worth keeping has oLRP 1 and oLRP_fn 1, and nothing to measure the other two on: it is left out of
    their means, as in the authors' code. NaN stands where no class is left.
    """
    positives = np.bincount(data.labels[~(data.crowd | data.difficult)], minlength=len(data.classes))
    nothing = (np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0))
    columns = zip(nothing, *_outcomes(data, detections), strict=True)
    labels, scores, overlaps = (np.concatenate(column) for column in columns)
    counts = (labels >= 0) & ~np.isnan(overlaps)
    order = np.lexsort((-scores[counts], labels[counts]))
    labels, scores, overlaps = (column[counts][order] for column in (labels, scores, overlaps))
    bounds = np.searchsorted(labels, np.arange(len(data.classes) + 1))
    rows = [
        _optimum(scores[bounds[k] : bounds[k + 1]], overlaps[bounds[k] : bounds[k + 1]], int(positives[k]))
        for k in np.flatnonzero(positives)
    ]
    return {name: _mean([row[i] for row in rows]) for i, name in enumerate(NAMES)}


def _outcomes(data: Dataset, detections: Sequence[Detections]) -> Iterator[tuple[Indices, Floats, Floats]]:
    """Yield for each image the labels, as the data counts them, the scores, and the overlaps of its detections.

    The label is -1 for a class that the data does not have. The overlap is 0 where nothing is found, and NaN where the
    detection counts nowhere, because it lies on an object that does not.
    """
    index = {name: k for k, name in enumerate(data.classes)}
    for first, last, found in zip(data.offsets[:-1], data.offsets[1:], detections, strict=True):
        of_image = slice(first, last)
        crowd = data.crowd[of_image]
        ignored = crowd | data.difficult[of_image]
        table = np.array([index.get(name, -1) for name in found.classes], dtype=np.int64)
        labels = table[found.labels]
        pairs = iou(found.boxes, data.boxes[of_image])
        pairs[:, crowd] = _share_inside(found.boxes, data.boxes[of_image][crowd])
        pairs[labels[:, None] != data.labels[of_image]] = 0
        target = _match(pairs, crowd, ignored)
        overlaps = np.zeros(len(found))
        hit = np.flatnonzero(target >= 0)
        overlaps[hit] = np.where(ignored[target[hit]], math.nan, pairs[hit, target[hit]])
        yield labels, found.scores, overlaps


def _match(pairs: Floats, crowd: Flags, ignored: Flags) -> Indices:
    """Return the object that each detection finds, or -1, from the overlap of every detection with every object.

    The rules are those of cocoapi's ``evaluateImg``: detections choose by falling score, and take the best free object,
    ignored ones last, the later of two equal ones; a crowd is always free.
    """
    detection, target = np.nonzero(pairs >= TAU)
    best_first = np.lexsort((-target, -pairs[detection, target], ignored[target], detection))
    matched = [-1] * len(pairs)
    free = [True] * len(crowd)
    for d, g in zip(detection[best_first].tolist(), target[best_first].tolist(), strict=True):
        if matched[d] < 0 and free[g]:
            matched[d] = g
            free[g] = bool(crowd[g])
    return np.array(matched, dtype=np.int64)


def _share_inside(boxes: Boxes, regions: Boxes) -> Floats:
    """Return the ``(len(boxes), len(regions))`` share of each box that lies in each region, COCO's IoU with a crowd."""
    low = np.maximum(boxes[:, None, :2], regions[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    inside = np.clip(high - low, 0, None).prod(axis=2)
    whole = np.broadcast_to(area(boxes)[:, None], inside.shape)
    share: Floats = np.divide(inside, whole, out=np.zeros_like(inside), where=whole > 0)
    return share


def _optimum(scores: Floats, overlaps: Floats, positives: int) -> tuple[float, float, float, float]:
    """Return oLRP and its components for one class; detections come by falling score.

    A score keeps or drops all detections that have it. Of scores that are equally good the highest is taken.
    """
    found = overlaps > 0
    hits = np.cumsum(found)
    false = np.cumsum(~found)
    missed = positives - hits
    distance = np.cumsum(np.where(found, 1 - overlaps, 0))
    lrp = (distance / (1 - TAU) + false + missed) / (positives + false)
    last_of_score = np.flatnonzero(np.diff(scores, append=-math.inf))
    if not len(lrp) or lrp[last_of_score].min() >= 1:
        return 1.0, math.nan, math.nan, 1.0
    at = last_of_score[np.argmin(lrp[last_of_score])]
    kept = hits[at] + false[at]
    return float(lrp[at]), float(distance[at] / hits[at]), float(false[at] / kept), float(missed[at] / positives)


def _mean(values: Sequence[float]) -> float:
    measured = [value for value in values if not math.isnan(value)]
    return math.fsum(measured) / len(measured) if measured else math.nan
