"""Score detections against ground truth: the COCO protocol with its limit on detections where the user put it.

`score` runs no model, so engines validate with it inside the worker and the controller evaluates with it. hotcoco
computes the precision and recall arrays; the numbers are means over them, taken here at the limit that was asked for
(pycocotools prints -1 for AP at any limit but 100).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from detkit.boxes import Boxes, xyxy_to_xywh
from detkit.data import Dataset, Indices
from detkit.detections import Detections
from detkit.errors import InvalidValue, UsageError

Floats: TypeAlias = NDArray[np.float64]

IOU_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).round(2).tolist())
"""Overlaps at which AP and AR are averaged (cocoapi ``cocoeval.py``, ``Params.setDetParams``)."""

AREAS = (("all", 0.0, 1e10), ("small", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large", 96.0**2, 1e10))
"""Object sizes in square pixels, both ends inside (same source)."""

SCORE_FLOOR = 0.001
"""Score from which on models are asked for detections when they are evaluated (that of Ultralytics' ``val``)."""

CROWD_RULE = "a crowd region absorbs any number of detections; it is neither found nor missed"
DIFFICULT_RULE = "a difficult object absorbs one detection; it is neither found nor missed (COCO's ignore)"

_IGNORED_AREA = -1.0
"""An area in no range: cocoapi ignores such an object everywhere. Its own ``ignore`` key is overwritten by iscrowd."""

_MATCH_IOU = 0.5
_PAIRS_AT_ONCE = 2_000_000
"""Candidate pairs held in memory at a time, about 16 MB a column."""


class _Found(NamedTuple):
    """The detections that count, as columns."""

    images: Indices
    labels: Indices
    """Indices into the classes of the data."""
    boxes: Boxes
    scores: Floats


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How numbers were computed. Two sets of scores compare only where their protocols are equal."""

    max_detections: int
    """The best-scored detections of each class in each image that count."""
    score_floor: float = 0.0
    """Detections below it do not count."""
    iou_thresholds: tuple[float, ...] = IOU_THRESHOLDS
    areas: tuple[tuple[str, float, float], ...] = AREAS
    """Name, least and greatest area in square pixels."""
    crowd: str = CROWD_RULE
    difficult: str = DIFFICULT_RULE
    classes: tuple[str, ...]
    """The data's class names; those without ground truth are left out of every mean."""
    num_images: int
    data: str
    """`Dataset.digest` of the ground truth."""
    engine: str
    """Name and version of what matched boxes."""

    def __str__(self) -> str:
        return (
            f"COCO protocol: IoU {self.iou_thresholds[0]:.2f}-{self.iou_thresholds[-1]:.2f}, "
            f"at most {self.max_detections} detections per class and image "
            f"from score {self.score_floor:g}, crowd and difficult ignored; "
            f"{self.num_images} images, {len(self.classes)} classes, data {self.data[:12]}, {self.engine}"
        )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Scores(Mapping[str, float]):
    """The numbers by name, as a mapping: AP AP50 AP75 APs APm APl AR1 AR10 AR<limit> ARs ARm ARl.

    All are in 0..1. With a limit below 10 detections, AR10 is AR at that limit. NaN stands where there is no ground
    truth to find, for example no small object for APs.
    """

    numbers: Mapping[str, float]
    """What the mapping holds; metrics of plugins come after the COCO numbers."""
    per_class: Mapping[str, Mapping[str, float]]
    """For each class of the data: AP, AP50, and ``boxes``, the objects that count (neither crowd nor difficult)."""
    protocol: Protocol
    score_threshold: float | None
    """Score at which the mean over classes of F1 at IoU 0.5 is highest; None where no detection is right.

    It lies halfway between the last detection to keep and the first to drop, so that rounding changes nothing.
    """
    best_f1: float | None
    """That highest mean F1; None without ground truth or detections."""
    seen_in: str = ""
    """``training`` or ``validation`` where the model has seen some of the images and the user allowed it."""

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; None stands for NaN."""
        return {
            "scores": _without_nan(self.numbers),
            "per_class": {name: _without_nan(row) for name, row in self.per_class.items()},
            "score_threshold": self.score_threshold,
            "best_f1": self.best_f1,
            "seen_in": self.seen_in,
            "protocol": asdict(self.protocol),
        }

    def __repr__(self) -> str:
        names = list(self)
        lines = [f"SEEN IN {self.seen_in.upper()}: these images say nothing about new ones"] if self.seen_in else []
        for block in (names[at : at + 6] for at in range(0, len(names), 6)):
            lines.append("  ".join(f"{name:>6}" for name in block))
            lines.append("  ".join(_cell(self[name], len(name)) for name in block))
        width = max([len(name) for name in self.per_class] + [len("class")])
        lines += ["", f"{'class':<{width}}  {'boxes':>6}  {'AP':>6}  {'AP50':>6}"]
        for name, row in self.per_class.items():
            lines.append(f"{name:<{width}}  {row['boxes']:>6.0f}  {_cell(row['AP'])}  {_cell(row['AP50'])}")
        lines.append("")
        if self.score_threshold is not None:
            lines.append(f"best mean F1 at IoU 0.5: {self.best_f1:.3f}, at score {self.score_threshold:.3f}")
        lines.append(str(self.protocol))
        return "\n".join(lines)


def score(
    data: Dataset, detections: Sequence[Detections], *, max_detections: int = 100, score_floor: float = 0.0
) -> Scores:
    """Score one `Detections` for each image of ``data``, in order; those below ``score_floor`` do not count.

    Classes are matched by name. Those that only the model knows have no ground truth here, so their detections count
    nowhere; those that only the data knows score 0. Raises `UsageError` where the counts differ.
    """
    if len(detections) != len(data):
        raise UsageError(f"{len(detections)} detections for {len(data)} images; expected one for each, in order")
    if max_detections < 1:
        raise InvalidValue("max_detections", max_detections, "a whole number from 1")
    found = _gather(data, detections, score_floor)
    limits = sorted({1, min(10, max_detections), max_detections})
    precision, recall, engine = _accumulate(data, found, limits)

    counted = ~(data.crowd | data.difficult)
    num_boxes = np.bincount(data.labels[counted], minlength=len(data.classes))
    threshold, best_f1 = _best_threshold(data, found, max_detections)
    return Scores(
        numbers=_headline(precision, recall, limits),
        per_class={
            name: {
                "AP": _mean(precision[:, :, k, 0, -1]),
                "AP50": _mean(precision[0, :, k, 0, -1]),
                "boxes": int(num_boxes[k]),
            }
            for k, name in enumerate(data.classes)
        },
        protocol=Protocol(
            max_detections=max_detections,
            score_floor=score_floor,
            classes=data.classes,
            num_images=len(data),
            data=data.digest(),
            engine=engine,
        ),
        score_threshold=threshold,
        best_f1=best_f1,
    )


def _gather(data: Dataset, detections: Sequence[Detections], score_floor: float) -> _Found:
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
    return _Found(images[counts], labels[counts], boxes[counts], scores[counts])


def _accumulate(data: Dataset, found: _Found, limits: list[int]) -> tuple[Floats, Floats, str]:
    """Return precision ``(iou, recall, class, area, limit)``, recall ``(iou, class, area, limit)`` and the engine."""
    import hotcoco

    engine = f"hotcoco {hotcoco.__version__}"
    if not len(data) or not data.classes:
        shape = (len(IOU_THRESHOLDS), len(data.classes), len(AREAS), len(limits))
        return np.full((shape[0], 101, *shape[1:]), -1.0), np.full(shape, -1.0), engine
    truth = hotcoco.COCO.from_arrays(
        [{"id": i + 1, "width": w, "height": h} for i, (w, h) in enumerate(data.sizes.tolist())],
        [{"id": k + 1, "name": name} for k, name in enumerate(data.classes)],
        _image_of_each_box(data) + 1,
        data.labels + 1,
        xyxy_to_xywh(data.boxes),
        area=np.where(data.difficult & ~data.crowd, _IGNORED_AREA, np.maximum(data.area, 0)),
        iscrowd=data.crowd,
    )
    rows = np.column_stack([found.images + 1.0, xyxy_to_xywh(found.boxes), found.scores, found.labels + 1.0])
    evaluation = hotcoco.COCOeval(truth, truth.load_res(rows), "bbox")
    evaluation.params.max_dets = limits
    evaluation.evaluate()
    evaluation.accumulate()
    arrays = evaluation.eval
    assert arrays is not None
    return np.asarray(arrays["precision"]), np.asarray(arrays["recall"]), engine


def _headline(precision: Floats, recall: Floats, limits: list[int]) -> dict[str, float]:
    at_75 = IOU_THRESHOLDS.index(0.75)
    top, ten = limits[-1], limits.index(min(10, limits[-1]))
    return {
        "AP": _mean(precision[..., 0, -1]),
        "AP50": _mean(precision[0, ..., 0, -1]),
        "AP75": _mean(precision[at_75, ..., 0, -1]),
        "APs": _mean(precision[..., 1, -1]),
        "APm": _mean(precision[..., 2, -1]),
        "APl": _mean(precision[..., 3, -1]),
        "AR1": _mean(recall[..., 0, 0]),
        "AR10": _mean(recall[..., 0, ten]),
        f"AR{top}": _mean(recall[..., 0, -1]),
        "ARs": _mean(recall[..., 1, -1]),
        "ARm": _mean(recall[..., 2, -1]),
        "ARl": _mean(recall[..., 3, -1]),
    }


def _best_threshold(data: Dataset, found: _Found, max_detections: int) -> tuple[float | None, float | None]:
    """Return the score and the value of the best mean-of-classes F1 at IoU 0.5; every distinct score is tried."""
    num_classes = len(data.classes)
    ignored = data.crowd | data.difficult
    positives = np.bincount(data.labels[~ignored], minlength=num_classes)
    if not positives.any() or not len(found.scores):
        return None, None
    group = found.images * num_classes + found.labels
    order = np.lexsort((-found.scores, group))
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    order = order[rank < max_detections]

    matched = _match(data, found.boxes[order], group[order])
    counts = (positives[found.labels[order]] > 0) & ~((matched >= 0) & ignored[matched])
    label, confidence, hit = found.labels[order][counts], found.scores[order][counts], matched[counts] >= 0
    if not len(label):
        return None, None

    by_class = np.lexsort((-confidence, label))
    label, confidence, hit = label[by_class], confidence[by_class], hit[by_class]
    first = np.flatnonzero(np.diff(label, prepend=-1))
    sizes = np.diff(first, append=len(label))
    kept = np.arange(len(label)) - np.repeat(first, sizes) + 1
    hits: Indices = np.cumsum(hit) - np.repeat(np.cumsum(hit)[first] - hit[first], sizes)
    f1 = 2 * hits / (positives[label] + kept)
    change = np.diff(f1, prepend=0.0)
    change[first] = f1[first]

    # Keeping one more detection changes the F1 of its class only: the mean is a running sum over falling scores.
    falling = np.argsort(-confidence, kind="stable")
    scores = confidence[falling]
    mean_f1 = np.cumsum(change[falling]) / np.count_nonzero(positives)
    last_of_score = np.append(scores[1:] < scores[:-1], True)
    best = int(np.argmax(np.where(last_of_score, mean_f1, -1.0)))
    if not hit.any():
        return None, 0.0
    keep, drop = float(scores[best]), float(scores[best + 1]) if best + 1 < len(scores) else 0.0
    middle = (keep + drop) / 2
    return (middle if middle > drop else keep), float(mean_f1[best])


def _match(data: Dataset, boxes: Boxes, group: Indices) -> Indices:
    """Return the object that each detection matches at IoU 0.5, or -1.

    ``group`` is image times number of classes plus class; detections come sorted by it and by falling score. The rules
    are those of cocoapi's ``evaluateImg``: the best free object, ignored ones last, the later of two equal ones; crowds
    are always free.
    """
    gt_group = _image_of_each_box(data) * len(data.classes) + data.labels
    ignored = data.crowd | data.difficult
    gt_order = np.argsort(gt_group, kind="stable")
    low = np.searchsorted(gt_group[gt_order], group, side="left")
    num_candidates = np.searchsorted(gt_group[gt_order], group, side="right") - low
    total = np.concatenate([[0], np.cumsum(num_candidates)])
    found: list[tuple[Indices, Indices, Floats]] = []
    start = 0
    while start < len(group):
        stop = max(int(np.searchsorted(total, total[start] + _PAIRS_AT_ONCE, side="right")) - 1, start + 1)
        detection = np.repeat(np.arange(start, stop), num_candidates[start:stop])
        offset = np.arange(len(detection)) - (total[detection] - total[start])
        found.append(_overlapping(data, boxes, detection, gt_order[low[detection] + offset]))
        start = stop
    detection, target, overlap = (np.concatenate(column) for column in zip(*found, strict=True))
    best_first = np.lexsort((-target, -overlap, ignored[target], detection))

    matched = [-1] * len(group)
    free = [True] * len(data.boxes)
    always_free = data.crowd.tolist()
    for d, g in zip(detection[best_first].tolist(), target[best_first].tolist(), strict=True):
        if matched[d] < 0 and (free[g] or always_free[g]):
            matched[d] = g
            free[g] = False
    return np.array(matched, dtype=np.int64)


def _overlapping(data: Dataset, boxes: Boxes, detection: Indices, target: Indices) -> tuple[Indices, Indices, Floats]:
    """Return those of the given pairs that overlap enough to match, and their overlap."""
    for low, high in ((0, 2), (1, 3)):
        near = (boxes[detection, low] < data.boxes[target, high]) & (data.boxes[target, low] < boxes[detection, high])
        detection, target = detection[near], target[near]
    a, b = boxes[detection], data.boxes[target]
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    intersection = sides[:, 0] * sides[:, 1]
    own = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    union = np.where(data.crowd[target], own, own + (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) - intersection)
    enough = (intersection > 0) & (intersection >= _MATCH_IOU * union)
    return detection[enough], target[enough], intersection[enough] / union[enough]


def _image_of_each_box(data: Dataset) -> Indices:
    return np.repeat(np.arange(len(data)), data.boxes_per_image())


def _mean(values: Floats) -> float:
    """Return the mean of what was measured; -1 marks classes without ground truth."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else math.nan


def _without_nan(row: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in row.items()}


def _cell(value: float, width: int = 0) -> str:
    text = "-" if math.isnan(value) else f"{value:.3f}"
    return f"{text:>{max(width, 6)}}"
