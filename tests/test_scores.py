"""`detkit.scores` against pycocotools, which it must equal, and against brute force where pycocotools has nothing."""

from __future__ import annotations

import contextlib
import io
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from detkit.boxes import iou
from detkit.data import Dataset, Sample
from detkit.detections import Detections
from detkit.errors import InvalidValue, UsageError
from detkit.scores import score

pytest.importorskip("pycocotools")
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NAMES = ("bolt", "nut", "Unterlegscheibe ⌀")


class Referee(COCOeval):  # type: ignore[misc]
    """pycocotools, which overwrites ``ignore`` with ``iscrowd``, made to keep it for difficult objects."""

    def _prepare(self) -> None:
        super()._prepare()
        for objects in self._gts.values():
            for one in objects:
                one["ignore"] = one["iscrowd"] or one["difficult"]


def referee(data: Dataset, detections: list[Detections], limit: int) -> dict[str, float]:
    """Return the twelve numbers as pycocotools counts them, means taken from its arrays."""
    objects: list[dict[str, Any]] = []
    for i, sample in enumerate(data):
        for j, name in enumerate(sample.names):
            x0, y0, x1, y1 = sample.boxes[j].tolist()
            assert sample.crowd is not None and sample.difficult is not None and sample.area is not None
            objects.append(
                {
                    "id": len(objects) + 1,
                    "image_id": i + 1,
                    "category_id": data.classes.index(name) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(sample.area[j]),
                    "iscrowd": int(sample.crowd[j]),
                    "difficult": bool(sample.difficult[j]),
                }
            )
    found = [
        {
            "image_id": i + 1,
            "category_id": data.classes.index(name) + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": value,
        }
        for i, one in enumerate(detections)
        for name, value, (x0, y0, x1, y1) in zip(one.names, one.scores.tolist(), one.boxes.tolist(), strict=True)
        if name in data.classes
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i + 1, "width": 640, "height": 640} for i in range(len(data))],
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
        run = Referee(truth, results, "bbox")
        run.params.maxDets = [1, 10, limit]
        run.evaluate()
        run.accumulate()

    def mean(values: Any) -> float:
        measured = values[values > -1]
        return float(np.mean(measured)) if len(measured) else math.nan

    precision, recall = run.eval["precision"], run.eval["recall"]
    return {
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


def make(
    seed: int, *, num_images: int, max_objects: int, max_found: int, levels: int, flags: float = 0.15
) -> tuple[Dataset, list[Detections]]:
    """Draw images of some objects and detections near them; ``levels`` distinct scores, so that many are tied."""
    rng = np.random.default_rng(seed)
    samples, detections = [], []
    for i in range(num_images):
        n = int(rng.integers(0, max_objects + 1))
        size = np.exp(rng.uniform(np.log(6), np.log(220), (n, 2)))
        corner = rng.uniform(0, 420, (n, 2))
        boxes = np.round(np.concatenate([corner, corner + size], axis=1), int(rng.integers(0, 3)))
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
        scores = np.sort(rng.integers(0, levels + 1, m) / levels)[::-1]
        detections.append(detected(near, found_labels, scores))
    return Dataset.from_samples(NAMES, samples), detections


def detected(boxes: Any, labels: Any, scores: Any, classes: tuple[str, ...] = NAMES) -> Detections:
    return Detections(
        path="",
        width=640,
        height=640,
        classes=classes,
        boxes=np.asarray(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.asarray(labels, dtype=np.int64),
        scores=np.asarray(scores, dtype=np.float64),
    )


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(1, 8),
    max_objects=st.integers(0, 12),
    max_found=st.integers(0, 25),
    levels=st.sampled_from([1, 3, 10, 1000]),
    flags=st.sampled_from([0.0, 0.15, 1.0]),
)
@example(seed=0, num_images=3, max_objects=0, max_found=9, levels=10, flags=0.0)
@example(seed=0, num_images=3, max_objects=9, max_found=0, levels=10, flags=0.0)
def test_equals_pycocotools(
    *, seed: int, num_images: int, max_objects: int, max_found: int, levels: int, flags: float
) -> None:
    data, detections = make(
        seed, num_images=num_images, max_objects=max_objects, max_found=max_found, levels=levels, flags=flags
    )
    assert dict(score(data, detections)) == pytest.approx(referee(data, detections, 100), abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("limit", [100, 300])
def test_more_than_100_detections_count_where_the_limit_allows(limit: int) -> None:
    data, detections = make(7, num_images=3, max_objects=700, max_found=2500, levels=50)
    assert max(len(one) for one in detections) > 300
    found = score(data, detections, max_detections=limit)
    assert dict(found) == pytest.approx(referee(data, detections, limit), abs=1e-9)
    assert found[f"AR{limit}"] > 0
    assert found.protocol.max_detections == limit
    if limit == 300:
        assert found["AP"] > score(data, detections)["AP"]


@pytest.mark.parametrize("limit", [1, 5, 10])
def test_small_limits(limit: int) -> None:
    data, detections = make(1, num_images=4, max_objects=10, max_found=30, levels=50)
    kept = []
    for one in detections:
        rank = [int(np.sum(one.labels[:i] == label)) for i, label in enumerate(one.labels)]
        keep = np.array(rank, dtype=int) < limit
        kept.append(detected(one.boxes[keep], one.labels[keep], one.scores[keep]))
    expected = referee(data, kept, 100)
    found = score(data, detections, max_detections=limit)
    assert found["AP"] == pytest.approx(expected["AP"])
    assert found["AR10"] == found[f"AR{limit}"] == pytest.approx(expected["AR10"])


def test_classes_are_matched_by_name() -> None:
    data, detections = make(3, num_images=6, max_objects=8, max_found=20, levels=1000)
    other = ("never seen", NAMES[2], NAMES[0], NAMES[1])
    table = np.array([other.index(name) for name in NAMES])
    renamed = [
        detected(
            np.concatenate([one.boxes, [[0, 0, 9, 9]]]),
            np.append(table[one.labels], 0),
            np.append(one.scores, 0.0),
            other,
        )
        for one in detections
    ]
    plain, permuted = score(data, detections), score(data, renamed)
    assert dict(plain) == dict(permuted)
    assert plain.per_class == permuted.per_class
    assert plain.protocol == permuted.protocol
    assert plain.score_threshold == permuted.score_threshold


def test_a_class_the_model_lacks_scores_zero() -> None:
    data, _ = make(3, num_images=6, max_objects=8, max_found=0, levels=1, flags=0)
    perfect = [
        detected(
            sample.boxes[[name != "nut" for name in sample.names]],
            [(NAMES[2], NAMES[0]).index(name) for name in sample.names if name != "nut"],
            np.ones(sum(name != "nut" for name in sample.names)),
            (NAMES[2], NAMES[0]),
        )
        for sample in data
    ]
    found = score(data, perfect)
    assert found.per_class["nut"]["AP"] == 0
    assert found.per_class["bolt"]["AP"] == pytest.approx(1)
    assert found["AP"] == pytest.approx(2 / 3)
    assert found.best_f1 == pytest.approx(2 / 3)
    assert found.score_threshold == 0.5


def test_nothing_at_all() -> None:
    for classes in ((), NAMES):
        empty = score(Dataset.from_samples(classes, []), [])
        assert all(math.isnan(value) for value in empty.values())
        assert empty.score_threshold is None and empty.best_f1 is None
    image = Dataset.from_samples(NAMES, [Sample(path="a.jpg", width=640, height=640)])
    without = score(image, [detected([[0, 0, 9, 9]], [0], [0.5])])
    assert math.isnan(without["AP"]) and without.score_threshold is None
    assert json.loads(json.dumps(without.to_dict()))["scores"]["AP"] is None
    assert "AP50" in repr(without)


def test_nothing_prints(capfd: pytest.CaptureFixture[str]) -> None:
    data, detections = make(3, num_images=4, max_objects=5, max_found=9, levels=10)
    score(data, detections, max_detections=300)
    assert capfd.readouterr() == ("", "")


def test_refuses_what_does_not_fit() -> None:
    data, detections = make(3, num_images=4, max_objects=5, max_found=9, levels=10)
    with pytest.raises(UsageError, match="3 detections for 4 images"):
        score(data, detections[:3])
    with pytest.raises(InvalidValue, match="max_detections"):
        score(data, detections, max_detections=0)


def test_a_detection_without_width_in_a_crowd() -> None:
    sample = Sample(
        path="a.jpg",
        width=640,
        height=640,
        boxes=np.array([[0.0, 0, 100, 100], [200, 200, 300, 300]]),
        names=("bolt", "bolt"),
        crowd=np.array([True, False]),
    )
    data = Dataset.from_samples(NAMES, [sample])
    found = score(data, [detected([[50, 50, 50, 60], [200, 200, 300, 300]], [0, 0], [0.9, 0.8])])
    assert found.best_f1 == pytest.approx(2 / 3)  # the first one is wrong


def test_a_negative_area_is_not_the_mark_of_difficult_objects() -> None:
    data, detections = make(3, num_images=6, max_objects=8, max_found=20, levels=100, flags=0.0)
    negative = replace(data, area=np.full(len(data.boxes), -1.0))
    assert score(negative, detections)["AP"] == score(data, detections)["AP"] > 0


def test_what_users_read() -> None:
    data, detections = make(3, num_images=6, max_objects=8, max_found=20, levels=100)
    found = score(data, detections)
    assert list(found) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    text = str(found)
    assert "Unterlegscheibe ⌀" in text and "at most 100 detections" in text and "6 images" in text
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["scores"]["AP"] == found["AP"]
    assert plain["protocol"]["data"] == data.digest()
    assert plain["protocol"]["engine"].startswith("hotcoco ")
    counted = np.sum(~(data.crowd | data.difficult))
    assert sum(row["boxes"] for row in found.per_class.values()) == counted


def test_detections_below_the_floor_do_not_count() -> None:
    data, detections = make(3, num_images=6, max_objects=8, max_found=20, levels=10)
    found = score(data, detections, score_floor=0.5)
    assert dict(found) == dict(score(data, [one.above(0.5) for one in detections]))
    assert found.protocol.score_floor == 0.5


def test_scores_of_seen_images_are_marked() -> None:
    data, detections = make(3, num_images=2, max_objects=8, max_found=20, levels=10)
    found = replace(score(data, detections), seen_in="training")
    assert str(found).startswith("SEEN IN TRAINING")
    assert found.to_dict()["seen_in"] == "training"


def brute_force_f1(data: Dataset, detections: list[Detections], threshold: float) -> float:
    """Return the mean over classes with ground truth of F1 at IoU 0.5, one detection after the other."""
    values = []
    for label in range(len(data.classes)):
        right = wrong = objects = 0
        for i, one in enumerate(detections):
            rows = slice(int(data.offsets[i]), int(data.offsets[i + 1]))
            own = data.labels[rows] == label
            truth, crowd = data.boxes[rows][own], data.crowd[rows][own]
            ignored = crowd | data.difficult[rows][own]
            objects += int(np.sum(~ignored))
            taken: set[int] = set()
            for at in np.flatnonzero(one.labels == label):
                if one.scores[at] < threshold:
                    continue
                overlaps = iou(one.boxes[at : at + 1], truth)[0] if len(truth) else np.zeros(0)
                for g in np.flatnonzero(crowd):
                    corner = np.minimum(one.boxes[at, 2:], truth[g, 2:]) - np.maximum(one.boxes[at, :2], truth[g, :2])
                    own_area = np.prod(one.boxes[at, 2:] - one.boxes[at, :2])
                    overlaps[g] = np.prod(np.clip(corner, 0, None)) / own_area if own_area else 0
                fits = [g for g in range(len(truth)) if overlaps[g] >= 0.5 and (g not in taken or crowd[g])]
                if not fits:
                    wrong += 1
                    continue
                best = min(fits, key=lambda g: (bool(ignored[g]), -overlaps[g], -g))
                taken.add(best)
                right += not ignored[best]
        if objects:
            values.append(2 * right / (objects + right + wrong))
    return float(np.mean(values)) if values else 0.0


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), levels=st.sampled_from([1, 5, 40]), flags=st.sampled_from([0.0, 0.2]))
def test_threshold_is_that_of_the_best_f1(seed: int, levels: int, flags: float) -> None:
    data, detections = make(seed, num_images=4, max_objects=8, max_found=14, levels=levels, flags=flags)
    found = score(data, detections)
    every = [brute_force_f1(data, detections, level / levels) for level in range(levels + 1)]
    if found.score_threshold is None:
        assert max(every) == 0
        return
    assert found.best_f1 == pytest.approx(max(every), abs=1e-9)
    assert brute_force_f1(data, detections, found.score_threshold) == pytest.approx(max(every), abs=1e-9)
