"""`detkit.scores.score` against pycocotools, which it must equal, and what users read of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from detkit.data import Dataset, Sample
from detkit.errors import InvalidValue, UsageError
from detkit.scores import Scores, score

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Detect, Make, Referee
    from detkit.detections import Detections


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
    make: Make,
    referee: Referee,
    *,
    seed: int,
    num_images: int,
    max_objects: int,
    max_found: int,
    levels: int,
    flags: float,
) -> None:
    data, detections = make(
        seed, num_images=num_images, max_objects=max_objects, max_found=max_found, levels=levels, flags=flags
    )
    expected = referee(data, detections).numbers
    assert dict(score(data, detections)) == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("limit", [100, 300])
def test_more_than_100_detections_count_where_the_limit_allows(make: Make, referee: Referee, limit: int) -> None:
    data, detections = make(7, num_images=2, max_objects=400, max_found=2000, levels=50)
    assert max(np.bincount(one.labels).max() for one in detections) > 300
    found = score(data, detections, max_detections=limit)
    expected = referee(data, detections, limit).numbers
    if limit == 300:
        expected["AR100"] = referee(data, detections).numbers["AR100"]
        assert found["AP"] > score(data, detections)["AP"]
    assert dict(found) == pytest.approx(expected, abs=1e-9)
    assert found["AR100"] > 0
    assert found.protocol.max_detections == limit


@pytest.mark.parametrize("limit", [1, 5, 10])
def test_small_limits(make: Make, detected: Detect, referee: Referee, limit: int) -> None:
    data, detections = make(1, num_images=4, max_objects=10, max_found=30, levels=50)
    kept = []
    for one in detections:
        rank = [int(np.sum(one.labels[:i] == label)) for i, label in enumerate(one.labels)]
        keep = np.array(rank, dtype=int) < limit
        kept.append(detected(one.boxes[keep], one.labels[keep], one.scores[keep]))
    expected = referee(data, kept).numbers
    found = score(data, detections, max_detections=limit)
    assert found["AP"] == pytest.approx(expected["AP"])
    assert found["AR10"] == found[f"AR{limit}"] == pytest.approx(expected["AR10"])


def test_classes_are_matched_by_name(make: Make, detected: Detect, names: tuple[str, ...]) -> None:
    data, detections = make(3, num_images=6, max_objects=8, max_found=20, levels=1000)
    other = ("never seen", names[2], names[0], names[1])
    table = np.array([other.index(name) for name in names])
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


def test_a_class_the_model_lacks_scores_zero(make: Make, detected: Detect, names: tuple[str, ...]) -> None:
    data, _ = make(3, num_images=6, max_objects=8, max_found=0, levels=1, flags=0)
    perfect = [
        detected(
            sample.boxes[[name != "nut" for name in sample.names]],
            [(names[2], names[0]).index(name) for name in sample.names if name != "nut"],
            np.ones(sum(name != "nut" for name in sample.names)),
            (names[2], names[0]),
        )
        for sample in data
    ]
    found = score(data, perfect)
    assert found.per_class["nut"]["AP"] == 0
    assert found.per_class["bolt"]["AP"] == pytest.approx(1)
    assert found["AP"] == pytest.approx(2 / 3)
    assert found.best_f1 == pytest.approx(2 / 3)
    assert found.score_threshold == 0.5


def test_nothing_at_all(detected: Detect, names: tuple[str, ...]) -> None:
    for classes in ((), names):
        empty = score(Dataset.from_samples(classes, []), [])
        assert all(math.isnan(value) for value in empty.values())
        assert empty.score_threshold is None and empty.best_f1 is None
    image = Dataset.from_samples(names, [Sample(path="a.jpg", width=640, height=640)])
    without = score(image, [detected([[0, 0, 9, 9]], [0], [0.5])])
    assert math.isnan(without["AP"]) and without.score_threshold is None
    assert json.loads(json.dumps(without.to_dict()))["scores"]["AP"] is None
    assert "AP50" in repr(without)


def test_nothing_prints(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    data, detections = make(3, num_images=4, max_objects=5, max_found=9, levels=10)
    score(data, detections, max_detections=300)
    assert capfd.readouterr() == ("", "")


def test_refuses_what_does_not_fit(make: Make) -> None:
    data, detections = make(3, num_images=4, max_objects=5, max_found=9, levels=10)
    with pytest.raises(UsageError, match="3 detections for 4 images"):
        score(data, detections[:3])
    with pytest.raises(InvalidValue, match="max_detections"):
        score(data, detections, max_detections=0)


def test_a_detection_without_width_in_a_crowd(detected: Detect, names: tuple[str, ...]) -> None:
    sample = Sample(
        path="a.jpg",
        width=640,
        height=640,
        boxes=np.array([[0.0, 0, 100, 100], [200, 200, 300, 300]]),
        names=("bolt", "bolt"),
        crowd=np.array([True, False]),
    )
    data = Dataset.from_samples(names, [sample])
    found = score(data, [detected([[50, 50, 50, 60], [200, 200, 300, 300]], [0, 0], [0.9, 0.8])])
    assert found.best_f1 == pytest.approx(2 / 3)  # the first one is wrong


def test_a_negative_area_is_not_the_mark_of_difficult_objects(make: Make) -> None:
    data, detections = make(3, num_images=6, max_objects=8, max_found=20, levels=100, flags=0.0)
    negative = replace(data, area=np.full(len(data.boxes), -1.0))
    assert score(negative, detections)["AP"] == score(data, detections)["AP"] > 0


def test_what_users_read(make: Make) -> None:
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


def test_detections_below_the_floor_do_not_count(make: Make) -> None:
    data, detections = make(3, num_images=6, max_objects=8, max_found=20, levels=10)
    found = score(data, detections, score_floor=0.5)
    assert dict(found) == dict(score(data, [one.above(0.5) for one in detections]))
    assert found.protocol.score_floor == 0.5


def test_scores_of_seen_images_are_marked(make: Make) -> None:
    data, detections = make(3, num_images=2, max_objects=8, max_found=20, levels=10)
    found = replace(score(data, detections), seen_in="training")
    assert str(found).startswith("SEEN IN TRAINING")
    assert found.to_dict()["seen_in"] == "training"


def plain_values(value: Any) -> Iterator[Any]:
    """Yield every leaf, and check that containers are those of JSON, with text as keys."""
    if type(value) is dict:
        assert all(type(key) is str for key in value)
        value = list(value.values())
    if type(value) in (list, tuple):
        for one in value:
            yield from plain_values(one)
    else:
        yield value


@pytest.mark.parametrize(("num_images", "max_objects", "max_found"), [(6, 8, 20), (3, 8, 0), (3, 0, 8), (0, 0, 0)])
def test_json_is_plain_and_its_keys_are_always_the_same(
    make: Make, num_images: int, max_objects: int, max_found: int
) -> None:
    found = score(*make(3, num_images=num_images, max_objects=max_objects, max_found=max_found, levels=100))
    record = found.to_dict()
    for leaf in plain_values([record, found.curves.to_dict(), found.interval("AP", replicates=20).to_dict()]):
        assert leaf is None or type(leaf) in (str, int, float, bool)
    assert json.loads(json.dumps(record, allow_nan=False))["protocol"]["num_images"] == num_images
    json.dumps(found.curves.to_dict(), allow_nan=False)
    full = score(*make(3, num_images=6, max_objects=8, max_found=20, levels=100)).to_dict()
    assert keys_of(record) == keys_of(full)


def keys_of(record: dict[str, Any]) -> dict[str, Any]:
    return {key: keys_of(value) if isinstance(value, dict) else None for key, value in record.items()}


# --- masks --------------------------------------------------------------------------------------------------------


def with_masks(data: Dataset, detections: list[Detections], seed: int) -> tuple[Dataset, list[Detections]]:
    """Give every box a mask: objects a polygon, detections and crowds run lengths, some of other shapes than theirs."""
    from hotcoco import mask as rle

    rng = np.random.default_rng(seed)

    def ellipse(box: np.ndarray) -> dict[str, Any]:
        x0, y0, x1, y1 = box.tolist()
        y, x = np.mgrid[0:640, 0:640] + 0.5
        inside = ((x - (x0 + x1) / 2) * (y1 - y0)) ** 2 + ((y - (y0 + y1) / 2) * (x1 - x0)) ** 2 <= (
            (x1 - x0) * (y1 - y0) / 2
        ) ** 2
        encoded = rle.encode(np.asfortranarray(inside.astype(np.uint8)))
        return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}

    def polygon(box: np.ndarray) -> list[list[float]]:
        x0, y0, x1, y1 = box.tolist()
        cut = rng.uniform(0.05, 0.3)
        return [[x0 + cut * (x1 - x0), y0, x1, y0 + cut * (y1 - y0), x1 - cut * (x1 - x0), y1, x0, y1]]

    masks = tuple(
        ellipse(box) if crowd or rng.random() < 0.3 else polygon(box)
        for box, crowd in zip(data.boxes, data.crowd, strict=True)
    )
    area = np.array([float(rle.area(mask)) if isinstance(mask, dict) else 0.6 * own for mask, own in zip(
        masks, data.area, strict=True)])  # fmt: skip
    return (
        replace(data, masks=masks, area=area),
        [replace(one, masks=tuple(ellipse(box) for box in one.boxes)) for one in detections],
    )


def mask_numbers(found: Scores) -> dict[str, float]:
    return {name.removeprefix("mask_"): value for name, value in found.items() if name.startswith("mask_")}


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), levels=st.sampled_from([3, 1000]), flags=st.sampled_from([0.0, 0.2]))
@example(seed=11, levels=3, flags=0.5)
def test_masks_equal_pycocotools(make: Make, referee: Referee, seed: int, levels: int, flags: float) -> None:
    boxed = make(seed, num_images=3, max_objects=6, max_found=9, levels=levels, flags=flags)
    data, detections = with_masks(*boxed, seed)
    found = score(data, detections)
    if not len(data.boxes) or not sum(map(len, detections)):
        assert mask_numbers(found) == {}
        return
    expected = referee(data, detections, kind="segm").numbers
    assert mask_numbers(found) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert found["AP"] == pytest.approx(referee(data, detections).numbers["AP"], abs=1e-9, nan_ok=True)


def test_masks_of_one_side_only_are_not_compared(make: Make) -> None:
    boxed = make(3, num_images=4, max_objects=6, max_found=12, levels=100)
    data, detections = with_masks(*boxed, 3)
    assert mask_numbers(score(data, detections))["AP"] != score(data, detections)["AP"]
    assert data.masks is not None
    some = replace(data, masks=(None, *data.masks[1:]))
    full = next(i for i, one in enumerate(detections) if len(one))
    lacking = list(detections)
    lacking[full] = replace(detections[full], masks=(None,) * len(detections[full]))
    for truth, found in ((boxed[0], detections), (data, boxed[1]), (some, detections), (data, lacking)):
        assert mask_numbers(score(truth, found)) == {}
