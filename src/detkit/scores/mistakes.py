"""Signs of mistakes that no number names: classes in another order, boxes in another convention, lists cut short.

Each sign has to be strong before it is told: a poor model has none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from detkit.scores.confusion import IOU, Confusion, Pairing, operating_point
from detkit.scores.matching import image_of_each_box, pairs_of_any_class

if TYPE_CHECKING:
    from detkit.boxes import Boxes
    from detkit.data import Dataset, Indices
    from detkit.detections import Detections
    from detkit.scores.matching import Matching
    from detkit.scores.protocol import Floats

_LEAST_OBJECTS = 5
"""Objects of a class, or pairs, below which nothing is said about them."""

_LOOKED_AT = 20_000
"""Detections that other box conventions are tried on; the first of the operating point, image by image."""

_CONVENTIONS: tuple[tuple[str, Callable[[Boxes, Floats], Boxes]], ...] = (
    ("x, y, width, height, read as corners", lambda b, _: np.hstack([b[:, :2], b[:, :2] + b[:, 2:]])),
    ("corners, read as x, y, width, height", lambda b, _: np.hstack([b[:, :2], b[:, 2:] - b[:, :2]])),
    (
        "centre x, centre y, width, height, read as x, y, width, height",
        lambda b, _: b - np.tile((b[:, 2:] - b[:, :2]) / 2, 2),
    ),
    ("y before x", lambda b, _: b[:, [1, 0, 3, 2]]),
    ("shares of the image's size instead of pixels", lambda b, size: b * np.tile(size, 2)),
)
"""What boxes may be in truth, and how to get them right: ``(n, 4)`` boxes and ``(n, 2)`` image sizes in."""


def find_mistakes(
    detections: Sequence[Detections],
    matching: Matching,
    confusion: Confusion,
    pairing: Pairing,
    max_detections: int,
) -> Iterator[str]:
    """Yield a sentence for each sign."""
    data = matching.data
    yield from _class_order(confusion)
    yield from _box_convention(matching)
    yield from _shift(data, pairing)
    yield from _cut_short(matching, detections, max_detections)


def _class_order(confusion: Confusion) -> Iterator[str]:
    """Most objects of several classes are found, each as another class than its own.

    Either these classes have taken each other's places, whatever the rest does, or they are more than half of all and
    no two are found as the same one. A model that guesses, or calls everything by one name, does neither.
    """
    found = confusion.matrix[:-1, :-1]
    moved: dict[int, int] = {}
    for k, row in enumerate(found):
        if row.sum() >= _LEAST_OBJECTS and row.max() > row.sum() / 2:
            moved[k] = int(row.argmax())
    wrong = {k: j for k, j in moved.items() if k != j}
    if len(wrong) * 2 <= len(moved) or len(set(moved.values())) < len(moved):
        wrong = {k: j for k, j in wrong.items() if _returns(k, wrong)}
    moved_objects, objects = sum(found[k, j] for k, j in wrong.items()), sum(found[k].sum() for k in wrong)
    # More than a coin would do, by three standard deviations.
    if len(wrong) < 2 or moved_objects <= objects / 2 + 1.5 * math.sqrt(objects):
        return
    names = confusion.classes
    told = ", ".join(f"{names[k]!r} as {names[j]!r} ({found[k, j]} of {found[k].sum()})" for k, j in wrong.items())
    yield f"the class names look mixed up: objects are found, but {told}; is the list of classes in the right order?"


def _returns(start: int, moved: dict[int, int]) -> bool:
    """Say whether going from class to class leads back to the first one."""
    at = start
    for _ in moved:
        at = moved.get(at, -1)
        if at == start:
            return True
    return False


def _box_convention(matching: Matching) -> Iterator[str]:
    """Boxes hit few objects as they are, and many after a change of convention."""
    data = matching.data
    found = matching.found.take(matching.found.scores >= operating_point(matching, None))
    found = found.take(np.argsort(found.images, kind="stable")[:_LOOKED_AT])
    if len(found.scores) < _LEAST_OBJECTS:
        return
    share = _share_on_objects(data, found.images, found.boxes)
    best, name = max(
        (_share_on_objects(data, found.images, right(found.boxes, data.sizes[found.images].astype(np.float64))), name)
        for name, right in _CONVENTIONS
    )
    if best >= 0.3 and best > 3 * share and best * len(found.scores) >= _LEAST_OBJECTS:
        yield (
            f"the boxes look like {name}: {share:.0%} of the detections lie on an object as they are, "
            f"{best:.0%} otherwise"
        )


def _share_on_objects(data: Dataset, images: Indices, boxes: Boxes) -> float:
    detection, target, _ = pairs_of_any_class(data, images, boxes, IOU)
    return len(np.unique(detection[~data.crowd[target]])) / len(boxes)


def _shift(data: Dataset, pairing: Pairing) -> Iterator[str]:
    """All boxes lie a pixel beside their objects: one side counts from 0, the other from 1."""
    on_object = pairing.targets >= 0
    if np.count_nonzero(on_object) < 10 * _LEAST_OBJECTS:
        return
    offsets = pairing.boxes[on_object] - data.boxes[pairing.targets[on_object]]
    middle = np.median(offsets, axis=0)
    # Standard error of a median, by the interquartile range of normal values: 1.2533 / 1.349 (Kendall and Stuart).
    spread = np.subtract(*np.percentile(offsets, [75, 25], axis=0)) * 0.929 / np.sqrt(len(offsets))
    for sign in (-1, 1):
        if ((sign * middle > 0.5) & (sign * middle < 1.5) & (spread < 0.1)).all():
            x, y = middle[::2].mean(), middle[1::2].mean()
            yield (
                f"the boxes lie {x:+.2f} pixels in x and {y:+.2f} in y beside their objects (medians of "
                f"{len(offsets)}): does one side count pixels from 1?"
            )


def _cut_short(matching: Matching, detections: Sequence[Detections], max_detections: int) -> Iterator[str]:
    """Images have more objects of a class than detections count, or many images end at the same number of them."""
    data = matching.data
    counted = ~matching.ignored
    kinds = np.stack([image_of_each_box(data)[counted], data.labels[counted]])
    (images, _), of_class = np.unique(kinds, axis=1, return_counts=True)
    crowded = len(np.unique(images[of_class > max_detections]))
    if crowded:
        most = int(of_class.max())
        yield (
            f"{crowded} image(s) have more than {max_detections} objects of a class, up to {most}, and at most "
            f"{max_detections} detections of it count; ask for max_detections={2 * most}"
        )
    objects = np.bincount(image_of_each_box(data)[counted], minlength=len(data))
    counts = np.array([len(one) for one in detections], dtype=np.int64)
    limit = int(counts.max(initial=0))
    full, beyond = counts == limit, objects > limit
    short = int((full & beyond).sum())
    # A model that finds little has fewer and fewer images with more and more detections: nothing piles up at the end.
    piled = 2 * short > beyond.sum() and full.sum() > 2 * (counts == limit - 1).sum()
    if limit > 1 and short >= _LEAST_OBJECTS and piled and (limit < max_detections or not crowded):
        yield (
            f"no image has more than {limit} detections, {int(full.sum())} have exactly that, and {short} "
            f"of these have more objects: the model or the file was cut at {limit}; ask for more at prediction"
        )
