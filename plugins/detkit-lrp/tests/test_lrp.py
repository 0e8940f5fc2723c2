"""The error against hand-made cases, its definition written out without numpy, and pycocotools' matching."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detkit.data import Dataset, Sample
from detkit.detections import Detections
from detkit_lrp.lrp import NAMES, compute

CLASSES = ("bolt", "nut")
BOX = (0, 0, 100, 100)
FAR = (300, 300, 400, 400)
NAN = math.nan

Row = tuple[str, tuple[float, ...]]


def truth(*images: Sequence[tuple[Any, ...]], classes: Sequence[str] = CLASSES) -> Dataset:
    """Make images of ``(name, box)`` or ``(name, box, "crowd" or "difficult")``."""
    return Dataset.from_samples(
        classes,
        [
            Sample(
                path=f"{i}.jpg",
                width=500,
                height=500,
                boxes=np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4),
                names=tuple(row[0] for row in rows),
                crowd=np.array(["crowd" in row[2:] for row in rows], dtype=bool),
                difficult=np.array(["difficult" in row[2:] for row in rows], dtype=bool),
            )
            for i, rows in enumerate(images)
        ],
    )


def detected(*rows: tuple[str, tuple[float, ...], float], classes: Sequence[str] = CLASSES) -> Detections:
    """Make one image's detections of ``(name, box, score)``."""
    rows = tuple(sorted(rows, key=lambda row: -row[2]))
    return Detections(
        path="",
        width=500,
        height=500,
        classes=tuple(classes),
        boxes=np.array([row[1] for row in rows], dtype=np.float64).reshape(-1, 4),
        labels=np.array([classes.index(row[0]) for row in rows], dtype=np.int64),
        scores=np.array([row[2] for row in rows], dtype=np.float64),
    )


def check(data: Dataset, found: Sequence[Detections], expected: Sequence[float]) -> None:
    numbers = compute(data, found)
    assert tuple(numbers) == NAMES
    assert list(numbers.values()) == pytest.approx(list(expected), abs=1e-12, nan_ok=True)


def test_perfect() -> None:
    data = truth([("bolt", BOX), ("nut", FAR)], [], [("nut", BOX)])
    found = [detected(("bolt", BOX, 0.9), ("nut", FAR, 0.2)), detected(), detected(("nut", BOX, 0.8))]
    check(data, found, [0, 0, 0, 0])


def test_nothing_detected() -> None:
    check(truth([("bolt", BOX)]), [detected()], [1, NAN, NAN, 1])


def test_nothing_right() -> None:
    check(truth([("bolt", BOX)]), [detected(("bolt", FAR, 0.9))], [1, NAN, NAN, 1])


@pytest.mark.parametrize("data", [truth(), truth([]), truth([], classes=()), truth([("bolt", BOX, "crowd")])])
def test_no_objects(data: Dataset) -> None:
    check(data, [detected(("bolt", BOX, 0.9)) for _ in range(len(data))], [NAN, NAN, NAN, NAN])


def test_one_box_at_iou_three_quarters() -> None:
    """Half way from perfect to not found: (1 - 0.75) / (1 - 0.5)."""
    check(truth([("bolt", BOX)]), [detected(("bolt", (0, 0, 75, 100), 0.9))], [0.5, 0.25, 0, 0])


def test_one_box_at_iou_one_half_is_worth_nothing() -> None:
    check(truth([("bolt", BOX)]), [detected(("bolt", (0, 0, 50, 100), 0.9))], [1, NAN, NAN, 1])


def test_components_of_a_mixed_case() -> None:
    """Two of three found, at IoU 1 and 0.8, with one false one between: (0 + 0.2 / 0.5 + 1 + 1) / 4."""
    data = truth([("bolt", BOX), ("bolt", FAR), ("bolt", (200, 0, 250, 50))])
    found = detected(("bolt", BOX, 0.9), ("bolt", (100, 300, 200, 400), 0.8), ("bolt", (300, 300, 380, 400), 0.7))
    check(data, [found], [(0.4 + 1 + 1) / 4, 0.1, 1 / 3, 1 / 3])


def test_the_best_score_drops_what_is_false() -> None:
    check(truth([("bolt", BOX)]), [detected(("bolt", BOX, 0.9), ("bolt", FAR, 0.8))], [0, 0, 0, 0])


def test_one_score_is_kept_or_dropped_as_a_whole() -> None:
    """What is right and what is false has the same score, so no score parts them, whichever image comes first."""
    right, false = detected(("bolt", BOX, 0.8)), detected(("bolt", FAR, 0.8))
    check(truth([("bolt", BOX)], []), [right, false], [0.5, 0, 0.5, 0])
    check(truth([], [("bolt", BOX)]), [false, right], [0.5, 0, 0.5, 0])


def test_each_class_has_a_score_of_its_own() -> None:
    """One score for both classes would keep what is false or drop what is right."""
    data = truth([("bolt", BOX), ("nut", BOX)])
    found = detected(("bolt", BOX, 0.9), ("bolt", FAR, 0.8), ("nut", BOX, 0.2))
    check(data, [found], [0, 0, 0, 0])


def test_an_object_is_found_once() -> None:
    """The surer box takes it, though the other lies better; from 0.9 on: 0.25 / 0.5, from 0.8 on: (0.5 + 1) / 2."""
    found = detected(("bolt", (0, 0, 75, 100), 0.9), ("bolt", BOX, 0.8))
    check(truth([("bolt", BOX)]), [found], [0.5, 0.25, 0, 0])


def test_of_two_equal_objects_the_later_is_taken() -> None:
    """As cocoapi does. It leaves the first to the second box, which lies on it exactly: 2 / 11 / 0.5 over 2 found."""
    data = truth([("bolt", BOX), ("bolt", (20, 0, 120, 100))])
    found = detected(("bolt", (10, 0, 110, 100), 0.9), ("bolt", BOX, 0.8))
    check(data, [found], [2 / 11, 1 / 11, 0, 0])


@pytest.mark.parametrize(("flag", "false"), [("crowd", 0), ("difficult", 1)])
def test_crowds_absorb_all_and_difficult_objects_one(flag: str, false: int) -> None:
    """``FAR`` is neither found nor missed; a second box on it is false where it is a single object."""
    data = truth([("bolt", BOX), ("bolt", FAR, flag)])
    found = detected(("bolt", FAR, 0.9), ("bolt", FAR, 0.8), ("bolt", BOX, 0.7))
    check(data, [found], [false / (1 + false), 0, false / (1 + false), 0])


def test_a_crowd_absorbs_what_lies_inside() -> None:
    data = truth([("bolt", BOX), ("bolt", FAR, "crowd")])
    check(data, [detected(("bolt", (300, 300, 310, 310), 0.9), ("bolt", BOX, 0.7))], [0, 0, 0, 0])


def test_objects_that_count_come_before_those_that_do_not() -> None:
    data = truth([("bolt", BOX, "difficult"), ("bolt", (0, 0, 80, 100))])
    check(data, [detected(("bolt", BOX, 0.9))], [0.4, 0.2, 0, 0])


def test_classes_are_matched_by_name() -> None:
    """The model has them in another order, and one that the data does not know."""
    data = truth([("bolt", BOX)])
    found = detected(("screw", BOX, 0.9), ("bolt", BOX, 0.8), classes=("screw", "nut", "bolt"))
    check(data, [found], [0, 0, 0, 0])


def test_classes_count_alike_and_those_without_objects_not() -> None:
    """One bolt of three is found, no washer is, and there is no nut."""
    data = truth([("bolt", BOX), ("bolt", FAR), ("bolt", FAR), ("washer", BOX)], classes=("bolt", "nut", "washer"))
    found = detected(("bolt", BOX, 0.9), ("nut", BOX, 0.9))
    check(data, [found], [(2 / 3 + 1) / 2, 0, 0, (2 / 3 + 1) / 2])


def test_one_detections_for_each_image() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compute(truth([("bolt", BOX)], []), [detected()])


# --- the definition, written out


def overlap(a: Sequence[float], b: Sequence[float], *, crowd: bool) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = width * height if width > 0 and height > 0 else 0
    own = (a[2] - a[0]) * (a[3] - a[1])
    return shared / (own if crowd else own + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def counts_from(
    score: float, name: str, objects: Sequence[Sequence[tuple[Any, ...]]], found: Sequence[Sequence[tuple[Any, ...]]]
) -> tuple[list[float], int, int]:
    """Match one class anew from this score on: the overlaps of what is found, how many false, how many missed."""
    overlaps, false, missed = [], 0, 0
    for there, seen in zip(objects, found, strict=True):
        mine = [one for one in there if one[0] == name]
        taken: set[int] = set()
        for _, box, _ in sorted((one for one in seen if one[0] == name and one[2] >= score), key=lambda one: -one[2]):
            best: tuple[bool, float, int] | None = None
            for j, (_, target, flag) in enumerate(mine):
                value = overlap(box, target, crowd=flag == "crowd")
                if value >= 0.5 and (flag == "crowd" or j not in taken):
                    best = max(best or (False, 0.0, -1), (flag == "", value, j))
            if best is None:
                false += 1
            else:
                taken.add(best[2])
                overlaps += [best[1]] if best[0] else []
        missed += sum(flag == "" and j not in taken for j, (_, _, flag) in enumerate(mine))
    return overlaps, false, missed


def candidates(name: str, objects: Any, found: Any) -> Iterator[tuple[float, float, float, float]]:
    """Yield LRP and its components for one class at every score, and for keeping nothing."""
    for score in {math.inf, *(one[2] for seen in found for one in seen)}:
        overlaps, false, missed = counts_from(score, name, objects, found)
        if overlaps:
            distances = [1 - value for value in overlaps]
            lrp = (2 * sum(distances) + false + missed) / (len(overlaps) + false + missed)
            loc, fp = sum(distances) / len(overlaps), false / (len(overlaps) + false)
            yield lrp, loc, fp, missed / (len(overlaps) + missed)
        elif missed:
            yield 1.0, NAN, NAN, 1.0


boxes = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(2, 6), st.integers(2, 6)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
objects_of_an_image = st.lists(
    st.tuples(st.sampled_from(CLASSES), boxes, st.sampled_from(["", "", "", "crowd", "difficult"])), max_size=5
)
found_in_an_image = st.lists(
    st.tuples(st.sampled_from(CLASSES), boxes, st.sampled_from([0.25, 0.5, 0.75, 1])), max_size=7
)
cases = st.lists(st.tuples(objects_of_an_image, found_in_an_image), min_size=1, max_size=3)


@settings(deadline=None, max_examples=400)
@given(cases)
def test_equals_the_definition(case: list[tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]]) -> None:
    objects, found = [rows for rows, _ in case], [rows for _, rows in case]
    data, detections = truth(*objects), [detected(*rows) for rows in found]
    of_classes = []
    for k, name in enumerate(CLASSES):
        numbers = compute(data.keep_boxes(data.labels == k), detections)
        expected = list(candidates(name, objects, found))
        if not expected:
            assert np.isnan(list(numbers.values())).all()
            continue
        least = min(row[0] for row in expected)
        # Several scores may be equally good; rounding then decides which one's components are told.
        good = [row for row in expected if row[0] < least + 1e-9]
        assert any(list(numbers.values()) == pytest.approx(row, abs=1e-9, nan_ok=True) for row in good), (numbers, good)
        of_classes.append(list(numbers.values()))
    means = [_mean([row[i] for row in of_classes]) for i in range(4)]
    assert list(compute(data, detections).values()) == pytest.approx(means, abs=1e-9, nan_ok=True)


def _mean(values: Sequence[float]) -> float:
    measured = [value for value in values if not math.isnan(value)]
    return sum(measured) / len(measured) if measured else NAN


# --- matched by pycocotools


@pytest.mark.parametrize("seed", range(6))
def test_equals_what_pycocotools_matches(seed: int) -> None:
    """Take matches and overlaps from cocoapi's own arrays, as the authors' fork of it does."""
    pytest.importorskip("pycocotools")
    rng = np.random.default_rng(seed)
    objects, found = [], []
    for _ in range(30):
        corner, size = rng.uniform(0, 300, (8, 2)), rng.uniform(20, 120, (8, 2))
        true = np.concatenate([corner, corner + size], axis=1).round(1)
        near = true[rng.integers(0, 8, 14)] + rng.normal(0, 5, (14, 4)).round(1)
        flags = rng.choice(["", "", "", "", "crowd", "difficult"], 8)
        objects.append([("bolt", tuple(b), str(flag)) for b, flag in zip(true.tolist(), flags, strict=True)])
        scores = rng.integers(1, 40, 14) / 40
        found.append([("bolt", tuple(b), s) for b, s in zip(near.tolist(), scores.tolist(), strict=True)])
    data, detections = truth(*objects, classes=("bolt",)), [detected(*rows, classes=("bolt",)) for rows in found]
    rows = np.array(list(matched_by_pycocotools(data, detections)))
    positives = int((~(data.crowd | data.difficult)).sum())
    expected = []
    for score in np.unique(rows[:, 0]):
        kept = rows[rows[:, 0] >= score, 1]
        hits, false = kept[kept > 0], np.count_nonzero(kept == 0)
        lrp = ((1 - hits).sum() / 0.5 + false + positives - len(hits)) / (positives + false)
        expected.append((lrp, (1 - hits).mean(), false / len(kept), 1 - len(hits) / positives))
    assert 0.2 < min(expected)[0] < 0.9
    check(data, detections, min(expected))


def matched_by_pycocotools(data: Dataset, detections: Sequence[Detections]) -> Iterator[tuple[float, float]]:
    """Yield score and overlap (0: false) of each detection that counts."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def records(images: Sequence[tuple[Any, Any]]) -> list[dict[str, Any]]:
        rows = [(i, b, s) for i, (boxes, more) in enumerate(images) for b, s in zip(boxes, more, strict=True)]
        return [
            {"id": n + 1, "image_id": i + 1, "category_id": 1, "bbox": [x, y, p - x, q - y], "area": 1.0, **more}
            for n, (i, (x, y, p, q), more) in enumerate(rows)
        ]

    def coco(annotations: list[dict[str, Any]]) -> COCO:
        made = COCO()
        images = [{"id": i + 1, "width": 500, "height": 500} for i in range(len(data))]
        made.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "bolt"}]}
        made.createIndex()
        return made

    with contextlib.redirect_stdout(io.StringIO()):
        flags = [
            (
                one.boxes.tolist(),
                [{"iscrowd": int(c), "difficult": bool(d)} for c, d in zip(one.crowd, one.difficult, strict=True)],
            )
            for one in data
        ]
        seen = [(one.boxes.tolist(), [{"score": s, "iscrowd": 0} for s in one.scores.tolist()]) for one in detections]
        run = COCOeval(coco(records(flags)), coco(records(seen)), "bbox")
        run.params.iouThrs, run.params.areaRng, run.params.maxDets = np.array([0.5]), [[0, 1e10]], [100]
        run._prepare()
        for rows in run._gts.values():
            for one in rows:
                one["ignore"] = one["iscrowd"] or one["difficult"]
        for image in range(1, len(data) + 1):
            run.ious[image, 1] = run.computeIoU(image, 1)
            told = run.evaluateImg(image, 1, [0, 1e10], 100)
            targets = [one["id"] for one in run._gts[image, 1]]
            for d, (target, ignored) in enumerate(zip(told["dtMatches"][0], told["dtIgnore"][0], strict=True)):
                if not ignored:
                    yield told["dtScores"][d], run.ious[image, 1][d, targets.index(target)] if target else 0.0


def test_scores_count_by_their_order_only() -> None:
    data = truth([("bolt", BOX), ("bolt", FAR)])
    found = detected(("bolt", BOX, 0.9), ("bolt", (200, 0, 300, 100), 0.8), ("bolt", FAR, 0.1))
    assert compute(data, [found]) == compute(data, [replace(found, scores=found.scores**3 / 2)])
