"""The best threshold and the curves, against counting one detection after the other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from detkit.scores import score

if TYPE_CHECKING:
    from conftest import Detect, Make, Match, Referee
    from detkit.data import Dataset
    from detkit.detections import Detections


def count(match: Match, data: Dataset, detections: list[Detections], threshold: float) -> list[tuple[int, int, int]]:
    """Return right and wrong detections of at least this score, and objects, of each class."""
    ignored = data.crowd | data.difficult
    right, wrong = [0] * len(data.classes), [0] * len(data.classes)
    for one, targets in zip(detections, match(data, detections, least_score=threshold), strict=True):
        for label, target in zip(one.labels, targets, strict=True):
            right[label] += target >= 0 and not ignored[target]
            wrong[label] += target == -1
    objects = np.bincount(data.labels[~ignored], minlength=len(data.classes)).tolist()
    return list(zip(right, wrong, objects, strict=True))


def mean_f1(counts: list[tuple[int, int, int]]) -> float:
    values = [2 * right / (objects + right + wrong) for right, wrong, objects in counts if objects]
    return float(np.mean(values)) if values else 0.0


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), levels=st.sampled_from([1, 5, 40]), flags=st.sampled_from([0.0, 0.2]))
def test_threshold_is_that_of_the_best_f1(
    make: Make, match_by_hand: Match, seed: int, levels: int, flags: float
) -> None:
    data, detections = make(seed, num_images=4, max_objects=8, max_found=14, levels=levels, flags=flags)
    found = score(data, detections)
    every = [mean_f1(count(match_by_hand, data, detections, level / levels)) for level in range(levels + 1)]
    if found.score_threshold is None:
        assert max(every) == 0
        return
    assert found.best_f1 == pytest.approx(max(every), abs=1e-9)
    at_best = mean_f1(count(match_by_hand, data, detections, found.score_threshold))
    assert at_best == pytest.approx(max(every), abs=1e-9)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), levels=st.sampled_from([1, 10, 100, None]), flags=st.sampled_from([0.0, 0.2, 1]))
@example(seed=2, levels=100, flags=0.2)
def test_curves_are_what_each_threshold_leaves(
    make: Make, match_by_hand: Match, seed: int, levels: int | None, flags: float
) -> None:
    data, detections = make(seed, num_images=3, max_objects=5, max_found=12, levels=levels, flags=flags)
    curves = score(data, detections).curves
    assert curves.thresholds[[0, 50, 100]].tolist() == [0, 0.5, 1]
    for t, threshold in enumerate(curves.thresholds.tolist()):
        for k, (right, wrong, objects) in enumerate(count(match_by_hand, data, detections, threshold)):
            kept = right + wrong
            expected = (
                right / kept if kept and objects else math.nan,
                right / objects if objects else math.nan,
                2 * right / (objects + kept) if objects else math.nan,
            )
            got = (curves.precision[k, t], curves.recall[k, t], curves.f1[k, t])
            assert got == pytest.approx(expected, abs=1e-12, nan_ok=True)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), levels=st.sampled_from([3, 1000]), flags=st.sampled_from([0.0, 0.2]))
def test_precision_at_recall_is_that_of_pycocotools(
    make: Make, referee: Referee, seed: int, levels: int, flags: float
) -> None:
    data, detections = make(seed, num_images=5, max_objects=8, max_found=20, levels=levels, flags=flags)
    curves = score(data, detections).curves
    precision = referee(data, detections).precision[0, :, :, 0, 2]
    expected = np.where(precision > -1, precision, np.nan).T
    np.testing.assert_allclose(curves.precision_at_recall, expected, rtol=0, atol=1e-12)
    assert curves.recalls.tolist() == np.linspace(0, 1, 101).tolist()


def test_the_threshold_lies_between_what_to_keep_and_what_to_drop(make: Make, detected: Detect) -> None:
    data, _ = make(3, num_images=1, max_objects=8, max_found=0, levels=1, flags=0)
    boxes = data.boxes[:1]
    found = score(data, [detected([*boxes, [600, 600, 610, 610]], [data.labels[0]] * 2, [0.8, 0.4])])
    assert found.score_threshold == pytest.approx(0.6)
    assert found.curves.recall[data.labels[0], 81] == 0 < found.curves.recall[data.labels[0], 80]
