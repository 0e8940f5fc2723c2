"""Pascal VOC's numbers against a plain port of the devkit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from detkit.data import Dataset, Sample
from detkit.scores import score

if TYPE_CHECKING:
    from conftest import Detect, Make
    from detkit.detections import Detections


def evaluate_as_the_devkit(data: Dataset, detections: list[Detections], name: str) -> tuple[float, float]:
    """Return 11-point and area AP of a class: ``VOCevaldet.m`` of VOC2007, ``VOCap.m`` of VOC2010, line by line.

    Its boxes count pixels from 1 and hold the last one, so that widths are ``xmax - xmin + 1``.
    """
    truth, taken, positives = [], [], 0
    for sample in data:
        own = np.array([one == name for one in sample.names], dtype=bool)
        assert sample.difficult is not None
        truth.append((sample.boxes[own] + [1, 1, 0, 0], sample.difficult[own]))
        taken.append([False] * int(own.sum()))
        positives += int((~sample.difficult[own]).sum())
    rows = [
        (value, i, box + np.array([1, 1, 0, 0]))
        for i, one in enumerate(detections)
        for box, value, label in zip(one.boxes, one.scores.tolist(), one.names, strict=True)
        if label == name
    ]
    rows.sort(key=lambda row: -row[0])  # stable, as MATLAB's
    right, wrong = np.zeros(len(rows)), np.zeros(len(rows))
    for d, (_, i, bb) in enumerate(rows):
        boxes, difficult = truth[i]
        most, at = -math.inf, -1
        for j, bbgt in enumerate(boxes):
            bi = (max(bb[0], bbgt[0]), max(bb[1], bbgt[1]), min(bb[2], bbgt[2]), min(bb[3], bbgt[3]))
            iw, ih = bi[2] - bi[0] + 1, bi[3] - bi[1] + 1
            if iw > 0 and ih > 0:
                ua = (
                    (bb[2] - bb[0] + 1) * (bb[3] - bb[1] + 1)
                    + (bbgt[2] - bbgt[0] + 1) * (bbgt[3] - bbgt[1] + 1)
                    - iw * ih
                )
                if iw * ih / ua > most:
                    most, at = iw * ih / ua, j
        if most >= 0.5:
            if not difficult[at]:
                if not taken[i][at]:
                    right[d], taken[i][at] = 1, True
                else:
                    wrong[d] = 1
        else:
            wrong[d] = 1
    if not positives:
        return math.nan, math.nan
    # Detections on difficult objects are neither: their rows repeat the precision before them (0/0 at the top).
    fp, tp = np.cumsum(wrong), np.cumsum(right)
    rec, prec = tp / positives, np.divide(tp, fp + tp, out=np.zeros(len(rows)), where=fp + tp > 0)
    ap07 = sum(max(prec[rec >= t / 10], default=0.0) / 11 for t in range(11))
    mrec, mpre = np.concatenate([[0], rec, [1]]), np.concatenate([[0], prec, [0]])
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    ap10 = sum((mrec[i] - mrec[i - 1]) * mpre[i] for i in range(1, len(mrec)) if mrec[i] != mrec[i - 1])
    return float(ap07), float(ap10)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(1, 6),
    max_found=st.sampled_from([0, 12, 40]),
    levels=st.sampled_from([3, 20, None]),
    hard=st.sampled_from([0.0, 0.3, 1.0]),
)
@example(seed=1, num_images=5, max_found=40, levels=3, hard=0.3)
def test_equals_the_devkit(
    make: Make, detected: Detect, *, seed: int, num_images: int, max_found: int, levels: int | None, hard: float
) -> None:
    data, detections = make(seed, num_images=num_images, max_objects=9, max_found=max_found, levels=levels, flags=hard)
    # Whole pixels, as in VOC's files: the overlaps of both are then exact.
    samples = [
        Sample(path=s.path, width=640, height=640, boxes=np.round(s.boxes), names=s.names, difficult=s.difficult)
        for s in data
    ]
    whole = Dataset.from_samples(data.classes, samples)
    found = [detected(np.round(one.boxes), one.labels, one.scores) for one in detections]
    voc = score(whole, found).voc
    expected = {name: evaluate_as_the_devkit(whole, found, name) for name in whole.classes}
    for name, (ap07, ap10) in expected.items():
        row = voc.per_class[name]
        assert (row["AP07"], row["AP10"]) == pytest.approx((ap07, ap10), abs=1e-9, nan_ok=True)
    measured = [pair for pair in expected.values() if not math.isnan(pair[0])]
    means = np.mean(measured, axis=0).tolist() if measured else [math.nan, math.nan]
    assert [voc.map_07, voc.map_10] == pytest.approx(means, abs=1e-9, nan_ok=True)


def test_eleven_points_by_hand(detected: Detect) -> None:
    """Four objects; right, wrong, right, wrong, right: precision 1, 2/3 and 3/5 at recall 1/4, 2/4 and 3/4."""
    boxes = np.array([[0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 10], [300, 0, 310, 10]], dtype=float)
    data = Dataset.from_samples(
        ("bolt",), [Sample(path="a.jpg", width=640, height=640, boxes=boxes, names=("bolt",) * 4)]
    )
    nowhere = [[0, 300, 10, 310], [100, 300, 110, 310]]
    found = detected(
        [boxes[0], nowhere[0], boxes[1], nowhere[1], boxes[2]], [0] * 5, [0.9, 0.8, 0.7, 0.6, 0.5], ("bolt",)
    )
    voc = score(data, [found]).voc
    # Recalls 0, .1, .2: 1; .3, .4, .5: 2/3; .6, .7: 3/5; .8, .9, 1: nothing.
    assert voc.map_07 == pytest.approx((3 * 1 + 3 * 2 / 3 + 2 * 3 / 5) / 11)
    assert voc.map_10 == pytest.approx(0.25 * (1 + 2 / 3 + 3 / 5))
    assert voc.to_dict() == {
        "mAP_07": voc.map_07,
        "mAP_10": voc.map_10,
        "per_class": {"bolt": {"AP07": voc.map_07, "AP10": voc.map_10}},
    }


def test_a_detection_never_falls_back_on_another_object(detected: Detect) -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 2, 10, 12]], dtype=float)
    data = Dataset.from_samples(
        ("bolt",), [Sample(path="a.jpg", width=640, height=640, boxes=boxes, names=("bolt",) * 2)]
    )
    # Both overlap the first object most; the second of them overlaps the other by 0.74.
    both = [[0, 0, 10, 10], [0, 0.5, 10, 10.5]]
    scores = score(data, [detected(both, [0, 0], [0.9, 0.8], ("bolt",))])
    assert scores["AP50"] == pytest.approx(1)
    assert scores.voc.map_10 == pytest.approx(0.5)
    # A third one on the other object finds it.
    scores = score(data, [detected([*both, [0, 2, 10, 12]], [0, 0, 0], [0.9, 0.8, 0.7], ("bolt",))])
    assert scores.voc.map_10 == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_a_crowd_counts_neither_way(detected: Detect) -> None:
    boxes = np.array([[0, 0, 100, 100], [200, 0, 210, 10]], dtype=float)
    crowd = np.array([True, False])
    data = Dataset.from_samples(
        ("bolt",), [Sample(path="a.jpg", width=640, height=640, boxes=boxes, names=("bolt",) * 2, crowd=crowd)]
    )
    inside = [[0, 0, 20, 20], [50, 50, 70, 90]]
    voc = score(data, [detected([*inside, boxes[1]], [0, 0, 0], [0.9, 0.8, 0.7], ("bolt",))]).voc
    assert voc.map_07 == voc.map_10 == 1
