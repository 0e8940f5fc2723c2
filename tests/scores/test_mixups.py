"""Confusions and kinds of errors, against counting by their definitions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from detkit.boxes import iou
from detkit.data import Dataset, Sample
from detkit.scores import score

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Detect, Make, Match
    from detkit.detections import Detections

# --- confusion ----------------------------------------------------------------------------------------------------


def confuse(
    overlaps_of: Callable[..., np.ndarray], data: Dataset, detections: list[Detections], least: float
) -> np.ndarray:
    """Return the matrix, pairing image by image, the largest overlap first and ignored objects last."""
    k = len(data.classes)
    matrix = np.zeros((k + 1, k + 1), dtype=int)
    ignored = data.crowd | data.difficult
    for i, one in enumerate(detections):
        first = int(data.offsets[i])
        overlaps = overlaps_of(one.boxes, data, i)
        pairs = [
            (bool(ignored[first + g]), -overlaps[d, g], -one.scores[d], one.labels[d], d, first + g)
            for d, g in np.argwhere(overlaps >= 0.5).tolist()
            if one.scores[d] >= least
        ]
        of_detection: dict[int, int] = {}
        found: set[int] = set()
        for skipped, *_, d, g in sorted(pairs):
            if d not in of_detection and (skipped or g not in found):
                of_detection[d] = g
                found.add(g)
        for d, label in enumerate(one.labels):
            if one.scores[d] >= least:
                target = of_detection.get(d, -1)
                if target < 0:
                    matrix[k, label] += 1
                elif not ignored[target]:
                    matrix[data.labels[target], label] += 1
        for g in range(first, int(data.offsets[i + 1])):
            matrix[data.labels[g], k] += not ignored[g] and g not in found
    return matrix


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([1, 5, None]),
    flags=st.sampled_from([0.0, 0.2, 1.0]),
    max_found=st.sampled_from([0, 5, 30]),
)
@example(seed=4, levels=5, flags=0.2, max_found=30)
def test_confusion_is_counted_pair_by_pair(
    make: Make, overlaps_of: Callable[..., np.ndarray], *, seed: int, levels: int | None, flags: float, max_found: int
) -> None:
    data, detections = make(seed, num_images=4, max_objects=8, max_found=max_found, levels=levels, flags=flags)
    found = score(data, detections)
    confusion = found.confusion
    if found.score_threshold is not None:
        assert confusion.score_threshold == found.score_threshold
    expected = confuse(overlaps_of, data, detections, confusion.score_threshold)
    assert confusion.matrix.tolist() == expected.tolist()
    counted = ~(data.crowd | data.difficult)
    objects = np.bincount(data.labels[counted], minlength=len(data.classes))
    assert confusion.matrix[:-1].sum(axis=1).tolist() == objects.tolist()
    assert confusion.matrix[-1, -1] == 0


def scene(names: list[str], boxes: list[list[float]], **columns: list[bool]) -> Dataset:
    flags = {name: np.array(column, dtype=bool) for name, column in columns.items()}
    sample = Sample(
        path="a.jpg", width=640, height=640, boxes=np.array(boxes, dtype=float), names=tuple(names), **flags
    )
    return Dataset.from_samples(("bolt", "nut"), [sample])


def test_an_object_inside_a_crowd_is_found(detected: Detect) -> None:
    data = scene(["bolt", "bolt"], [[10, 10, 50, 50], [0, 0, 300, 300]], crowd=[False, True])
    found = score(data, [detected([[12, 12, 50, 50], [100, 100, 140, 140]], [0, 0], [0.9, 0.9], data.classes)])
    assert found.confusion.matrix.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_of_one_box_under_two_names_the_better_score_counts(detected: Detect) -> None:
    data = scene(["bolt"], [[0, 0, 10, 10]])
    boxes = [[0, 0, 10, 10], [0, 0, 10, 10], [400, 400, 410, 410]]
    found = score(data, [detected(boxes, [1, 0, 0], [0.9, 0.8, 0.1], data.classes)])
    assert found.confusion.matrix.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]


def test_rows_are_objects_and_columns_detections(detected: Detect) -> None:
    data = scene(["bolt", "bolt", "nut"], [[0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 10]])
    boxes = [*data.boxes[:2], [300, 300, 310, 310]]
    found = score(data, [detected(boxes, [0, 1, 1], [0.9, 0.9, 0.9], data.classes)])
    assert found.confusion.matrix.tolist() == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]
    assert found.confusion.to_dict()["matrix"] == [[1, 1, 0], [0, 0, 1], [0, 1, 0]]


# --- error types --------------------------------------------------------------------------------------------------


def explain(match: Match, data: Dataset, detections: list[Detections]) -> dict[str, tuple[int, float]]:
    """Return the number of each kind, by the definitions of Bolya et al. (2020), and the AP50 that each costs.

    Section 2.2 has the kinds, 2.3 what mending means: a badly placed or wrongly named detection finds its object, if
    nothing else has and none with a better score would; all others are dropped, as are missed objects.
    """
    ignored = data.crowd | data.difficult
    matched = match(data, detections)
    taken = {g for of_image in matched for g in of_image if g >= 0}
    kinds: dict[str, list[tuple[int, int]]] = {
        name: [] for name in ("classification", "localisation", "both", "duplicate", "background")
    }
    aims: dict[tuple[int, int], int] = {}
    for i, one in enumerate(detections):
        objects = [g for g in range(int(data.offsets[i]), int(data.offsets[i + 1])) if not ignored[g]]
        for d, label in enumerate(one.labels):
            if matched[i][d] >= 0:
                continue
            own = {g: iou(one.boxes[d : d + 1], data.boxes[g : g + 1])[0, 0] for g in objects}
            same = {g: value for g, value in own.items() if data.labels[g] == label}
            other = {g: value for g, value in own.items() if data.labels[g] != label}
            most_same, most_other = max(same.values(), default=0.0), max(other.values(), default=0.0)
            if 0.1 <= most_same <= 0.5:
                kind, aim = "localisation", max(same, key=lambda g: same[g])
            elif most_other >= 0.5:
                kind, aim = "classification", max(other, key=lambda g: other[g])
            elif most_same > 0.5:
                kind, aim = "duplicate", -1
            elif most_other <= 0.1:
                kind, aim = "background", -1
            else:
                kind, aim = "both", -1
            kinds[kind].append((i, d))
            if aim >= 0 and aim not in taken:
                aims[i, d] = aim
    winner: dict[int, tuple[int, int]] = {}
    for (i, d), aim in aims.items():
        if aim not in winner or detections[i].scores[d] > detections[winner[aim][0]].scores[winner[aim][1]]:
            winner[aim] = (i, d)
    missed = [g for g in np.flatnonzero(~ignored).tolist() if g not in taken and g not in winner]

    rows = {
        (i, d): (int(one.labels[d]), matched[i][d] >= 0)
        for i, one in enumerate(detections)
        for d in range(len(one))
        if matched[i][d] < 0 or not ignored[matched[i][d]]
    }
    objects_of = np.bincount(data.labels[~ignored], minlength=len(data.classes))

    def mean_ap(rows: dict[tuple[int, int], tuple[int, bool]], objects: np.ndarray) -> float:
        values = []
        for k in np.flatnonzero(objects_of):
            own = sorted((-detections[i].scores[d], right) for (i, d), (label, right) in rows.items() if label == k)
            hits = np.cumsum([right for _, right in own])
            if not objects[k]:
                values.append(0.0)
                continue
            at = [float(np.max((hits / np.arange(1, len(own) + 1))[hits / objects[k] >= r], initial=0)) if own else 0.0
                  for r in np.linspace(0, 1, 101)]  # fmt: skip
            values.append(float(np.mean(at)))
        return float(np.mean(values)) if values else 0.0

    before = mean_ap(rows, objects_of)
    result = {}
    for name, members in kinds.items():
        mended = dict(rows)
        for key in members:
            del mended[key]
            if key in aims and winner[aims[key]] == key:
                mended[key] = (int(data.labels[aims[key]]), True)
        result[name] = (len(members), mean_ap(mended, objects_of) - before)
    fewer = objects_of - np.bincount(data.labels[missed], minlength=len(data.classes))
    result["missed"] = (len(missed), mean_ap(rows, fewer) - before)
    return result


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(1, 5),
    max_found=st.sampled_from([0, 5, 30]),
    flags=st.sampled_from([0.0, 0.3, 1.0]),
)
@example(seed=4, num_images=4, max_found=30, flags=0.3)
@example(seed=4, num_images=4, max_found=30, flags=1.0)
def test_error_types_are_those_of_their_definitions(
    make: Make, match_by_hand: Match, *, seed: int, num_images: int, max_found: int, flags: float
) -> None:
    data, detections = make(seed, num_images=num_images, max_objects=8, max_found=max_found, levels=None, flags=flags)
    found = score(data, detections).error_types
    expected = explain(match_by_hand, data, detections)
    assert {name: kind.count for name, kind in found.items()} == {name: n for name, (n, _) in expected.items()}
    costs = {name: cost for name, (_, cost) in expected.items()}
    assert {name: kind.ap_cost for name, kind in found.items()} == pytest.approx(costs, abs=1e-9)


def test_each_error_is_of_its_kind(detected: Detect) -> None:
    data = scene(
        ["bolt", "bolt", "nut", "bolt", "bolt"],
        [[0, 0, 10, 10], [100, 0, 110, 10], [200, 0, 210, 10], [300, 0, 310, 10], [400, 0, 410, 10]],
        difficult=[False, False, False, False, True],
    )
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [105, 0, 115, 10], [200, 0, 210, 10], [206, 0, 216, 10], [500, 0, 510, 10],
             [406, 0, 416, 10]]  # fmt: skip
    found = score(data, [detected(boxes, [0] * 7, np.linspace(0.9, 0.3, 7), data.classes)])
    counts = {name: kind.count for name, kind in found.error_types.items()}
    # The last one lies beside a difficult object, which is no object: nothing is there.
    assert counts == {
        "classification": 1,
        "localisation": 1,
        "both": 1,
        "duplicate": 1,
        "background": 2,
        "missed": 1,
    }


@pytest.mark.parametrize("limit", [1, 3, 10])
def test_errors_beyond_the_limit_do_not_count(make: Make, detected: Detect, limit: int) -> None:
    data, detections = make(4, num_images=4, max_objects=8, max_found=40, levels=None, flags=0.2)
    kept = []
    for one in detections:
        rank = [int(np.sum(one.labels[:i] == label)) for i, label in enumerate(one.labels)]
        keep = np.array(rank, dtype=int) < limit
        kept.append(detected(one.boxes[keep], one.labels[keep], one.scores[keep]))
    assert score(data, detections, max_detections=limit).error_types == score(data, kept).error_types
