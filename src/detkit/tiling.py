"""Large images in tiles that overlap, so that small objects keep their pixels, and what was found put together again.

As in sliced inference (Akyon, Altinuc and Temizel, "Slicing Aided Hyper Inference", ICIP 2022), each tile and, if
wanted, the whole image are shown to the model. Here two views are compared in what both of them could see, so that an
object cut by the border of a tile is known again where another tile, or the whole image, has it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from detkit.boxes import Boxes, area
from detkit.data import Indices
from detkit.detections import Detections
from detkit.errors import InvalidValue
from detkit.images import Image
from detkit.masks import decode

View: TypeAlias = tuple[int, int, int, int]
"""A window of an image, xyxy in whole pixels, half-open."""

SMALLEST = 32
"""Pixels of a tile's side."""
_MOST_OVERLAP = 0.9
_NEAR = 0.02
"""Of a tile's side: a box that ends so close to a border inside the image is taken to be cut there."""


@dataclass(frozen=True)
class Tiling:
    """How images are cut, and when two views show the same object. Raises `InvalidValue`."""

    size: int
    """Pixels of a tile's side; an image that fits into one is not cut."""
    overlap: float = 0.2
    """Of two neighbours, as a share of their side; at least."""
    whole: bool = True
    """Whether the whole image is looked at, too: what is larger than a tile needs that."""
    threshold: float = 0.5
    """IoU, and for cut boxes intersection over the smaller, above which two boxes of a class are one object."""

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or isinstance(self.size, bool) or self.size < SMALLEST:
            raise InvalidValue("tile_size", self.size, f"a whole number of pixels from {SMALLEST}")
        if not 0 <= self.overlap <= _MOST_OVERLAP:
            raise InvalidValue("tile_overlap", self.overlap, f"a share of the tile's side from 0 to {_MOST_OVERLAP}")

    def views(self, width: int, height: int) -> list[View]:
        """Return what is shown to the model of an image: the whole where wanted, then its tiles, row by row.

        Tiles have the full size where the image does, are spread evenly and cover every pixel.
        """
        rows, columns = self._starts(height), self._starts(width)
        whole = (0, 0, width, height)
        tiles = [(x, y, min(x + self.size, width), min(y + self.size, height)) for y in rows for x in columns]
        return [whole, *tiles] if self.whole and tiles != [whole] else tiles

    def _starts(self, length: int) -> list[int]:
        room = max(length - self.size, 0)
        stride = max(1, int(self.size * (1 - self.overlap)))
        steps = -(-room // stride)
        return [room * i // max(steps, 1) for i in range(steps + 1)]

    def detect(
        self, images: Sequence[Image], detect: Callable[[list[Image]], list[Detections]], batch_size: int
    ) -> list[Detections]:
        """Return the detections on each image, its views handed to ``detect`` so many at a time."""
        sizes = [(image.shape[1], image.shape[0]) for image in images]
        todo = [(i, view) for i, size in enumerate(sizes) for view in self.views(*size)]
        found: list[list[tuple[View, Detections]]] = [[] for _ in images]
        for begin in range(0, len(todo), batch_size):
            batch = todo[begin : begin + batch_size]
            for (i, view), one in zip(batch, detect([_crop(images[i], view) for i, view in batch]), strict=True):
                found[i].append((view, one))
        return [self.merge(*size, views) for size, views in zip(sizes, found, strict=True)]

    def merge(self, width: int, height: int, found: Sequence[tuple[View, Detections]]) -> Detections:
        """Return what was found on the views of an image as the detections on all of it, each object once.

        Two boxes of one class in two views are the same object where their parts in the common part of both views
        overlap by more than `threshold`: by IoU where both are whole; where a border cuts one of them, by their
        intersection over the smaller. Of the same, the one that is whole stays, the higher score first; boxes that are
        all cut become the one around them, with the highest score. Within a view nothing is merged.
        """
        if len(found) == 1:
            return found[0][1]
        boxes = np.concatenate([one.boxes + np.tile(view[:2], 2) for view, one in found])
        labels = np.concatenate([one.labels for _, one in found])
        scores = np.concatenate([one.scores for _, one in found])
        counts = [len(one) for _, one in found]
        views = np.array([view for view, _ in found], dtype=np.float64)
        windows = np.repeat(views, counts, axis=0)
        cut = _cut(boxes, windows, (width, height))
        same: dict[int, list[int]] = {}
        for a, b in _touching(boxes, labels, views, np.cumsum(counts)):
            agree = self._agree(boxes[a], boxes[b], windows[a], windows[b], cut[a] | cut[b])
            for i, j in zip(a[agree].tolist(), b[agree].tolist(), strict=True):
                same.setdefault(i, []).append(j)
                same.setdefault(j, []).append(i)
        groups = _groups(np.lexsort((-scores, cut)), cut, same)
        first = np.array([group[0] for group in groups], dtype=np.int64)
        kept, sure = boxes[first], scores[first]
        for i, group in enumerate(groups):
            if cut[group[0]]:
                kept[i] = [*boxes[group, :2].min(axis=0), *boxes[group, 2:].max(axis=0)]
                sure[i] = scores[group].max()
        order = np.argsort(-sure, kind="stable")
        masks: tuple[Any, ...] | None = None
        if any(one.masks is not None for _, one in found):
            every = [(mask, view) for view, one in found for mask in (one.masks or (None,) * len(one))]
            chosen = [groups[i] if cut[groups[i][0]] else groups[i][:1] for i in order.tolist()]
            masks = tuple(_joined([every[row] for row in rows], width, height) for rows in chosen)
        return replace(
            found[0][1],
            width=width,
            height=height,
            boxes=kept[order],
            labels=labels[first][order],
            scores=sure[order],
            masks=masks,
        )

    def _agree(
        self, boxes: Boxes, others: Boxes, view: Boxes, other_view: Boxes, cut: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Return of each pair of boxes, a row each, whether they are the same object; ``cut`` where either is."""
        common = _within(view, other_view)
        a, b = _within(boxes, common), _within(others, common)
        shared, sides = area(_within(a, b)), (area(a), area(b))
        return np.asarray(shared > self.threshold * np.where(cut, np.minimum(*sides), sides[0] + sides[1] - shared))


def _crop(image: Image, view: View) -> Image:
    x0, y0, x1, y1 = view
    return np.ascontiguousarray(image[y0:y1, x0:x1])


def _cut(boxes: Boxes, windows: Boxes, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which boxes end at a border of their view that is none of the image's."""
    sides = np.tile(windows[:, 2:] - windows[:, :2], 2)
    inner = windows != np.array([0, 0, *size])
    return np.asarray((inner & (np.abs(boxes - windows) <= np.maximum(_NEAR * sides, 1))).any(axis=1))


def _touching(boxes: Boxes, labels: Indices, views: Boxes, ends: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Yield the pairs of overlapping boxes of one class in two views; those of view i end before ``ends[i]``."""
    for i in range(1, len(views)):
        for j in np.flatnonzero(_overlap(views[:i], views[i])).tolist():
            common = np.concatenate([np.maximum(views[i, :2], views[j, :2]), np.minimum(views[i, 2:], views[j, 2:])])
            a, b = (
                first + np.flatnonzero(_overlap(boxes[first:end], common))
                for first, end in ((ends[j - 1] if j else 0, ends[j]), (ends[i - 1], ends[i]))
            )
            near = (labels[a][:, None] == labels[b]) & _overlap(boxes[a][:, None], boxes[b])
            rows, columns = np.nonzero(near)
            yield a[rows], b[columns]


def _overlap(a: Boxes, b: Boxes) -> NDArray[np.bool_]:
    """Return whether boxes share any area, by the rules of broadcasting."""
    return np.asarray((np.maximum(a[..., :2], b[..., :2]) < np.minimum(a[..., 2:], b[..., 2:])).all(axis=-1))


def _within(boxes: Boxes, bounds: Boxes) -> Boxes:
    """Return the part of each box within the bounds of the same row; none is left of one outside."""
    return np.concatenate([np.maximum(boxes[:, :2], bounds[:, :2]), np.minimum(boxes[:, 2:], bounds[:, 2:])], axis=1)


def _groups(order: Indices, cut: NDArray[np.bool_], same: dict[int, list[int]]) -> list[list[int]]:
    """Return the boxes of each object, that which stands for it first: greedily, what is whole and sure before others.

    A whole box takes those that are the same as itself. Of boxes that are cut, each taken one takes others in turn, as
    a long object may reach through several tiles.
    """
    taken = np.zeros(len(order), dtype=bool)
    groups = []
    for i in order.tolist():
        if taken[i]:
            continue
        taken[i] = True
        group, asked = [i], 0
        while asked < (len(group) if cut[i] else 1):
            for j in same.get(group[asked], ()):
                if not taken[j]:
                    taken[j] = True
                    group.append(j)
            asked += 1
        groups.append(group)
    return groups


def _joined(parts: Sequence[tuple[Any, View]], width: int, height: int) -> Any:
    """Return the masks of one object, each of a view, as COCO's run-length encoding on the whole image."""
    told = [(mask, view) for mask, view in parts if mask is not None]
    if not told:
        return None
    left, right = min(view[0] for _, view in told), max(view[2] for _, view in told)
    strip = np.zeros((height, right - left), dtype=np.bool_)
    for mask, (x0, y0, x1, y1) in told:
        strip[y0:y1, x0 - left : x1 - left] |= decode(mask, (x1 - x0, y1 - y0))
    return _encode(strip, left, width)


def _encode(strip: NDArray[np.bool_], left: int, width: int) -> dict[str, Any]:
    """Return the encoding of a mask whose columns from ``left`` on are given and whose others are empty."""
    from hotcoco import mask as rle

    height = len(strip)
    pixels = strip.ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    runs = np.diff([0, *changes.tolist(), pixels.size]).tolist()
    if pixels[0]:
        runs.insert(0, 0)  # the first one counts what is empty
    runs[0] += left * height
    behind = (width - left) * height - pixels.size
    if len(runs) % 2:
        runs[-1] += behind
    elif behind:
        runs.append(behind)
    encoded = rle.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return {"size": [height, width], "counts": encoded["counts"].decode()}
