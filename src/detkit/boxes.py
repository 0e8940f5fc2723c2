"""Box geometry on arrays.

Boxes are ``(n, 4)`` float64 arrays of ``xmin, ymin, xmax, ymax`` in absolute pixels, 0-based and half-open: a box
that covers a whole image is ``0, 0, width, height``. Everything in detkit holds boxes this way; formats and engines
convert at their own edge.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Boxes: TypeAlias = NDArray[np.float64]
"""``(n, 4)`` boxes, ``xmin, ymin, xmax, ymax``, absolute pixels, 0-based, half-open."""


def xywh_to_xyxy(boxes: Boxes) -> Boxes:
    """Convert ``left, top, width, height`` (COCO) to detkit's corners.

    >>> xywh_to_xyxy(np.array([[10.0, 20.0, 30.0, 40.0]])).tolist()
    [[10.0, 20.0, 40.0, 60.0]]
    """
    out = np.array(boxes, dtype=np.float64)
    out[:, 2:] += out[:, :2]
    return out


def xyxy_to_xywh(boxes: Boxes) -> Boxes:
    """Convert detkit's corners to ``left, top, width, height`` (COCO)."""
    out = np.array(boxes, dtype=np.float64)
    out[:, 2:] -= out[:, :2]
    return out


def area(boxes: Boxes) -> NDArray[np.float64]:
    """Return the area of each box in square pixels; inverted boxes have none."""
    sides = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None)
    return np.asarray(sides[:, 0] * sides[:, 1])


def clip(boxes: Boxes, width: float, height: float) -> Boxes:
    """Return the boxes cut off at the image's border."""
    return np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float64))


def iou(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """Return the ``(len(a), len(b))`` intersection over union of every pair.

    >>> iou(np.array([[0.0, 0.0, 2.0, 2.0]]), np.array([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]])).round(3).tolist()
    [[1.0, 0.333]]
    """
    corner_low = np.maximum(a[:, None, :2], b[None, :, :2])
    corner_high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.clip(corner_high - corner_low, 0, None)
    intersection = sides[..., 0] * sides[..., 1]
    union = area(a)[:, None] + area(b)[None, :] - intersection
    overlap: NDArray[np.float64] = np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)
    return overlap


def nms(
    boxes: NDArray[np.floating[Any]],
    scores: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
    threshold: float,
    *,
    class_candidates: int | None = None,
    limit: int | None = None,
) -> NDArray[np.int64]:
    """Return the rows that non-maximum suppression within each class keeps, best score first, at most ``limit``.

    A box goes where its intersection over union with a kept, higher-scored box of its class exceeds ``threshold``. Only
    the best ``class_candidates`` of each class take part. It is computed in the precision of ``boxes``, and takes
    ``limit`` times the candidates of a class at most, however many there are.

    >>> square = [0.0, 0.0, 4.0, 4.0]
    >>> nms(np.array([square, square, square]), np.array([0.5, 0.9, 0.4]), np.array([0, 0, 1]), 0.5).tolist()
    [1, 2]
    """
    by_class = np.lexsort((-scores, labels))  # stable, so that equal scores keep their order
    boxes, scores, labels = boxes[by_class], scores[by_class], labels[by_class]
    starts = np.flatnonzero(np.diff(labels, prepend=labels[:1] - 1))
    ends = np.repeat([*starts[1:], len(labels)], np.diff([*starts, len(labels)])) if len(labels) else labels
    alive = np.ones(len(labels), dtype=np.bool_)
    if class_candidates is not None and len(labels):
        rank = np.arange(len(labels)) - np.repeat(starts, np.diff([*starts, len(labels)]))
        alive = rank < class_candidates
        ends = np.minimum(ends, np.arange(len(labels)) - rank + class_candidates)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[int] = []
    order = np.flatnonzero(alive)
    for i in order[np.lexsort((by_class[order], -scores[order]))].tolist():
        if not alive[i]:
            continue
        if len(kept) == limit:
            break
        kept.append(i)
        rest = slice(i + 1, int(ends[i]))
        sides = np.minimum(boxes[rest, 2:], boxes[i, 2:]) - np.maximum(boxes[rest, :2], boxes[i, :2])
        np.maximum(sides, 0, out=sides)
        shared = sides[:, 0] * sides[:, 1]
        alive[rest] &= ~(shared > threshold * (areas[rest] + areas[i] - shared))
    return by_class[kept] if kept else np.empty(0, dtype=np.int64)


def orient(boxes: Boxes, orientation: int, width: float, height: float) -> Boxes:
    """Move boxes drawn on the stored pixels to where EXIF ``orientation`` shows them.

    ``width`` and ``height`` are those of the stored, unrotated pixels. The eight values are those of tag 0x0112 in the
    EXIF 2.32 specification (CIPA DC-008), section 4.6.4.A.
    """
    x0, y0, x1, y1 = boxes.T
    w, h = width, height
    corners = {
        1: (x0, y0, x1, y1),
        2: (w - x1, y0, w - x0, y1),
        3: (w - x1, h - y1, w - x0, h - y0),
        4: (x0, h - y1, x1, h - y0),
        5: (y0, x0, y1, x1),
        6: (h - y1, x0, h - y0, x1),
        7: (h - y1, w - x1, h - y0, w - x0),
        8: (y0, w - x1, y1, w - x0),
    }[orientation]
    return np.stack(corners, axis=1)
