"""Cases to score, the referee, and matching one detection after the other."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from detkit.boxes import iou
from detkit.data import Dataset, Sample
from detkit.detections import Detections

NAMES = ("bolt", "nut", "Unterlegscheibe ⌀")


@dataclass(frozen=True)
class Judged:
    """What pycocotools says."""

    numbers: dict[str, float]
    """The twelve numbers, means taken from its arrays at the greatest limit."""
    precision: np.ndarray
    """``(iou, recall, class, area, limit)``."""


Make = Callable[..., tuple[Dataset, list[Detections]]]
Detect = Callable[..., Detections]
Referee = Callable[..., Judged]
Match = Callable[..., list[list[int]]]


@pytest.fixture(scope="session")
def names() -> tuple[str, ...]:
    return NAMES


@pytest.fixture(scope="session")
def make() -> Make:
    return draw


@pytest.fixture(scope="session")
def detected() -> Detect:
    return detections_of


@pytest.fixture(scope="session")
def referee() -> Referee:
    pytest.importorskip("pycocotools")
    return ask_pycocotools


@pytest.fixture(scope="session")
def match_by_hand() -> Match:
    return match_one_by_one


@pytest.fixture(scope="session")
def overlaps_of() -> Callable[[np.ndarray, Dataset, int], np.ndarray]:
    return overlaps_with_objects


def draw(
    seed: int, *, num_images: int, max_objects: int, max_found: int, levels: int | None, flags: float = 0.15
) -> tuple[Dataset, list[Detections]]:
    """Draw images of some objects and detections near them.

    ``levels`` is the number of distinct scores, so that many are tied; None are without ties. ``flags`` is the share of
    crowds, and that of difficult objects.
    """
    rng = np.random.default_rng(seed)
    samples, detections = [], []
    for i in range(num_images):
        n = int(rng.integers(0, max_objects + 1))
        size = np.exp(rng.uniform(np.log(6), np.log(220), (n, 2)))
        corner = rng.uniform(0, 420, (n, 2))
        boxes = np.concatenate([corner, corner + size], axis=1)
        for j in np.flatnonzero(rng.random(n) < 0.3)[1:]:  # beside another one, so that detections have a choice
            boxes[j] = boxes[j - 1] + np.tile(rng.normal(0, 3, 2), 2)
        boxes = np.round(boxes, int(rng.integers(0, 3)))
        labels = rng.integers(0, len(NAMES), n)
        samples.append(
            Sample(
                path=f"{i}.jpg",
                width=640,
                height=640,
                boxes=boxes,
                names=tuple(NAMES[k] for k in labels),
                crowd=rng.random(n) < flags,
                difficult=rng.random(n) < flags,
            )
        )
        m = int(rng.integers(0, max_found + 1))
        if n:
            pick = rng.integers(0, n, m)
            near = boxes[pick] + rng.normal(0, 4, (m, 4)) * (rng.random((m, 1)) < 0.7)
            found_labels = np.where(rng.random(m) < 0.85, labels[pick], rng.integers(0, len(NAMES), m))
        else:
            near, found_labels = rng.uniform(0, 400, (m, 4)), rng.integers(0, len(NAMES), m)
        near = np.concatenate([np.minimum(near[:, :2], near[:, 2:]), np.maximum(near[:, :2], near[:, 2:])], axis=1)
        values = rng.random(m) if levels is None else rng.integers(0, levels + 1, m) / levels
        detections.append(detections_of(near, found_labels, np.sort(values)[::-1]))
    return Dataset.from_samples(NAMES, samples), detections


def detections_of(
    boxes: Any, labels: Any, scores: Any, classes: tuple[str, ...] = NAMES, masks: Sequence[Any] | None = None
) -> Detections:
    return Detections(
        path="",
        width=640,
        height=640,
        classes=classes,
        boxes=np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.asarray(labels, dtype=np.int64),
        scores=np.asarray(scores, dtype=np.float64),
        masks=None if masks is None else tuple(masks),
    )


def ask_pycocotools(data: Dataset, detections: list[Detections], limit: int = 100, kind: str = "bbox") -> Judged:
    """Evaluate boxes, or masks where ``kind`` is ``segm``, at the limits 1, 10 and ``limit``."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    class Referee(COCOeval):  # type: ignore[misc]
        """It overwrites ``ignore`` with ``iscrowd``; this keeps it for difficult objects."""

        def _prepare(self) -> None:
            super()._prepare()
            for objects in self._gts.values():
                for one in objects:
                    one["ignore"] = one["iscrowd"] or one["difficult"]

    objects: list[dict[str, Any]] = []
    for i in range(len(data)):
        for row in range(int(data.offsets[i]), int(data.offsets[i + 1])):
            objects.append(
                {
                    "id": row + 1,
                    "image_id": i + 1,
                    "category_id": int(data.labels[row]) + 1,
                    "bbox": _xywh(data.boxes[row]),
                    "area": float(data.area[row]),
                    "iscrowd": int(data.crowd[row]),
                    "difficult": bool(data.difficult[row]),
                    **({"segmentation": data.masks[row]} if data.masks is not None else {}),
                }
            )
    found = [
        {
            "image_id": i + 1,
            "category_id": data.classes.index(name) + 1,
            "score": value,
            # A record with a box is one of boxes to `loadRes`, whatever else it has.
            **({"bbox": _xywh(box)} if kind == "bbox" else {"segmentation": mask}),
        }
        for i, one in enumerate(detections)
        for name, value, box, mask in zip(
            one.names, one.scores.tolist(), one.boxes, one.masks or (None,) * len(one), strict=True
        )
        if name in data.classes
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i + 1, "width": w, "height": h} for i, (w, h) in enumerate(data.sizes.tolist())],
            "annotations": objects,
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(data.classes)],
        }
        truth.createIndex()
        results = COCO()
        results.dataset = {**truth.dataset, "annotations": []}
        if found:
            results = truth.loadRes(found)
        else:
            results.createIndex()
        run = Referee(truth, results, kind)
        run.params.maxDets = [1, 10, limit]
        run.evaluate()
        run.accumulate()

    def mean(values: Any) -> float:
        measured = values[values > -1]
        return float(np.mean(measured)) if len(measured) else math.nan

    precision, recall = run.eval["precision"], run.eval["recall"]
    numbers = {
        "AP": mean(precision[:, :, :, 0, 2]),
        "AP50": mean(precision[0, :, :, 0, 2]),
        "AP75": mean(precision[5, :, :, 0, 2]),
        "APs": mean(precision[:, :, :, 1, 2]),
        "APm": mean(precision[:, :, :, 2, 2]),
        "APl": mean(precision[:, :, :, 3, 2]),
        "AR1": mean(recall[:, :, 0, 0]),
        "AR10": mean(recall[:, :, 0, 1]),
        f"AR{limit}": mean(recall[:, :, 0, 2]),
        "ARs": mean(recall[:, :, 1, 2]),
        "ARm": mean(recall[:, :, 2, 2]),
        "ARl": mean(recall[:, :, 3, 2]),
    }
    return Judged(numbers=numbers, precision=precision)


def _xywh(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = box.tolist()
    return [x0, y0, x1 - x0, y1 - y0]


def match_one_by_one(
    data: Dataset, detections: list[Detections], overlap: float = 0.5, least_score: float = 0.0
) -> list[list[int]]:
    """Return for each detection of each image the row of the object that it finds, or -1; -2 below the score.

    These are cocoapi's rules, for detections that fall by score and for fewer than any limit.
    """
    matched = []
    for i, one in enumerate(detections):
        rows = range(int(data.offsets[i]), int(data.offsets[i + 1]))
        overlaps = overlaps_with_objects(one.boxes, data, i)
        taken: set[int] = set()
        of_image = []
        for at, label in enumerate(one.labels):
            if one.scores[at] < least_score:
                of_image.append(-2)
                continue
            fits = [
                g
                for g in rows
                if data.labels[g] == label
                and overlaps[at, g - rows.start] >= overlap
                and (g not in taken or data.crowd[g])
            ]
            ignored = data.crowd | data.difficult
            best = min(fits, key=lambda g: (bool(ignored[g]), -overlaps[at, g - rows.start], -g), default=-1)
            taken.add(best)
            of_image.append(best)
        matched.append(of_image)
    return matched


def overlaps_with_objects(boxes: np.ndarray, data: Dataset, image: int) -> np.ndarray:
    """Return the overlap of every box with every object of an image; with a crowd, the share of the box inside."""
    rows = range(int(data.offsets[image]), int(data.offsets[image + 1]))
    truth = data.boxes[rows.start : rows.stop]
    overlaps = iou(boxes, truth) if len(truth) and len(boxes) else np.zeros((len(boxes), len(truth)))
    for g in np.flatnonzero(data.crowd[rows.start : rows.stop]):
        for d, box in enumerate(boxes):
            sides = np.clip(np.minimum(box[2:], truth[g, 2:]) - np.maximum(box[:2], truth[g, :2]), 0, None)
            own = np.prod(box[2:] - box[:2])
            overlaps[d, g] = np.prod(sides) / own if own else 0
    return overlaps
