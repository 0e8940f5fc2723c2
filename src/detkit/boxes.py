"""Box geometry on arrays.

Boxes are ``(n, 4)`` float64 arrays of ``xmin, ymin, xmax, ymax`` in absolute pixels, 0-based and half-open: a box
that covers a whole image is ``0, 0, width, height``. Everything in detkit holds boxes this way; formats and engines
convert at their own edge.
"""

from __future__ import annotations

from typing import TypeAlias

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
