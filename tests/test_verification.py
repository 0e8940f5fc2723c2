"""What two models found on the same images, compared."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from detkit import Dataset, Detections, Model, Trainer
from detkit.errors import InvalidValue, UsageError
from detkit.files import write_json
from detkit.masks import encode
from detkit.verification import Agreement, _faults, allowed, compare, spread, verify

CLASSES = ("disc", "square")


def found(rows: list[tuple[float, float, float, float, int, float]], path: str = "a.png") -> Detections:
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return Detections.from_arrays(
        table[:, :4], table[:, 5], table[:, 4].astype(int), classes=CLASSES, path=path, width=100, height=80
    )


ROWS = [(10.0, 10.0, 30.0, 30.0, 0, 0.9), (50.0, 10.0, 90.0, 60.0, 1, 0.6), (52.0, 12.0, 88.0, 61.0, 1, 0.4)]


def agreement(first: list[Any], second: list[Any], data: Dataset | None = None) -> Agreement:
    empty = Dataset.from_samples(CLASSES, [])
    return compare(data or empty, [(found(first), found(second))], "exact", 100)


def test_the_same_detections_agree() -> None:
    one = agreement(ROWS, ROWS)
    assert (one.images, one.detections, one.disagreeing) == (1, 3, 0)
    assert one.corners_px_max == one.scores_max == 0


def test_neighbours_are_told_apart_by_their_overlap() -> None:
    """The order of two boxes of one object's may change where their scores tie."""
    swapped = [ROWS[0], (*ROWS[1][:5], 0.4), (*ROWS[2][:5], 0.401)]
    tied = [ROWS[0], (*ROWS[1][:5], 0.401), (*ROWS[2][:5], 0.4)]
    one = agreement(tied, swapped)
    assert one.disagreeing == 0
    assert one.scores_max == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("changed", "disagreeing"),
    [
        ((10.4, 10, 30, 30, 0, 0.9), 0),
        ((10.6, 10, 30, 30, 0, 0.9), 1),  # px
        ((10, 10, 30, 30, 0, 0.904), 0),
        ((10, 10, 30, 30, 0, 0.906), 1),
        ((10, 10, 30, 30, 1, 0.9), 2),  # one is missing, and one is too many
        ((70, 10, 90, 30, 0, 0.9), 2),
        ((10, 10, 30, 30, 0, 0.02), 1),
    ],
)
def test_what_disagrees(changed: tuple[float, ...], disagreeing: int) -> None:
    for first, second in ((ROWS, [changed, *ROWS[1:]]), ([changed, *ROWS[1:]], ROWS)):
        assert agreement(first, second).disagreeing == disagreeing


def test_what_scores_low_needs_no_counterpart() -> None:
    faint = (0.0, 0.0, 9.0, 9.0, 0, 0.04)
    assert agreement([*ROWS, faint], ROWS).disagreeing == 0
    # but it is one: 0.051 here, 0.049 there
    edge = (0.0, 0.0, 9.0, 9.0, 0, 0.051)
    assert agreement([*ROWS, edge], [*ROWS, (*edge[:5], 0.049)]).disagreeing == 0


def test_corners_of_large_images_may_be_off_by_more() -> None:
    first, second = found(ROWS), found([(10.9, 10, 30, 30, 0, 0.9), *ROWS[1:]])
    empty = Dataset.from_samples(CLASSES, [])
    for width, disagreeing in ((400, 1), (500, 0)):
        pair = (replace(first, width=width), replace(second, width=width))
        assert compare(empty, [pair], "exact", 100).disagreeing == disagreeing


def test_a_model_that_finds_nothing_agrees_with_nobody() -> None:
    for first, second in ((ROWS, []), ([], ROWS)):
        one = agreement(first, second)
        assert (one.detections, one.disagreeing) == (3, 3)


def test_nothing_found_proves_nothing() -> None:
    with pytest.raises(UsageError, match=r"neither model finds anything above 0\.05 in these 1 images"):
        agreement([], [(0, 0, 9, 9, 0, 0.04)])


def test_ap_of_both(tiny: Dataset) -> None:
    perfect = [
        Detections.from_arrays(
            one.boxes, np.linspace(0.9, 0.5, len(one.boxes)), names=one.names, classes=tiny.classes, path=one.path
        )
        for one in tiny
    ]
    shifted = [replace(one, boxes=one.boxes + 3) for one in perfect]
    pairs = list(zip(perfect, shifted, strict=True))
    one = compare(tiny, pairs, "quantized", 100)
    assert one.original["AP"] == pytest.approx(1) and one.exported["AP"] < 0.9
    assert one.worst in tiny.paths
    assert "allowed" not in str(one), "of a quantized model, only AP counts"
    assert any(name == "AP" and value.startswith("1.0000 -> ") for name, value, _ in one.table())


def test_few_may_not_disagree_at_all() -> None:
    assert [allowed(n) for n in (0, 99, 100, 101, 1000)] == [0, 0, 1, 2, 10]


def test_images_are_spread_over_the_data(tiny: Dataset) -> None:
    assert spread(tiny, 100) is tiny
    assert list(spread(tiny, 3).image_ids) == [tiny.image_ids[i] for i in (0, 4, 7)]


def masked(pixels: list[tuple[slice, slice] | None]) -> Detections:
    """The first of `ROWS`, each with a mask of these rows and columns, or with none."""
    one = found(ROWS[: len(pixels)])
    masks = []
    for place in pixels:
        mask = np.zeros((80, 100), dtype=np.bool_)
        if place is not None:
            mask[place] = True
        masks.append(None if place is None else encode(mask))
    return replace(one, masks=tuple(masks))


def test_masks_have_to_overlap() -> None:
    whole, most, half = ((slice(10, 30), slice(10, end)) for end in (30, 29, 20))
    empty = Dataset.from_samples(CLASSES, [])
    for first, second, disagreeing in (
        ([whole, None], [whole, None], 0),
        ([whole], [most], 0),
        ([whole], [half], 1),
        ([whole, whole], [whole, None], 1),
    ):
        for pair in ((masked(first), masked(second)), (masked(second), masked(first))):
            assert compare(empty, [pair], "exact", 100).disagreeing == disagreeing
    without = found(ROWS[:1])
    assert compare(empty, [(masked([whole]), without)], "exact", 100).disagreeing == 1


def test_an_export_without_mask_ap_is_at_fault() -> None:
    one = replace_ap(agreement(ROWS, ROWS), {"AP": 0.5, "mask_AP": 0.4}, {"AP": 0.5})
    for drop in (None, 0.1):
        assert _faults(one, drop) == ["mask_AP is 0.4000, and the export has none"]
    assert "mask_AP" in str(one)


def replace_ap(one: Agreement, original: dict[str, float], exported: dict[str, float]) -> Agreement:
    return msgspec.structs.replace(one, original=original, exported=exported)


def test_faint_detections_do_not_hide_sure_ones() -> None:
    """Of 200 that agree, two may differ, but not two of the three that are sure."""
    faint = [(float(x), float(y), x + 4.0, y + 3.0, 0, 0.2) for x in range(0, 100, 5) for y in range(0, 40, 4)]
    low = [(float(x), 60.0, x + 9.0, 70.0, 1, 0.9) for x in (0, 20, 40)]
    moved = [low[0], *((x0 + 2, y0, x1 + 2, y1, label, s) for x0, y0, x1, y1, label, s in low[1:])]
    one = agreement(faint + low, faint + moved)
    assert (one.detections, one.disagreeing, allowed(one.detections)) == (203, 2, 3)
    assert (one.sure, one.sure_disagreeing) == (3, 2)
    assert _faults(one, None) == ["2 of 3 detections above 0.5 disagree"]
    assert _faults(agreement(faint + low, faint + low), None) == []


def test_other_classes_are_no_counterparts() -> None:
    other = replace(found(ROWS), classes=("square", "disc"))
    with pytest.raises(UsageError, match=r"classes square, disc, and the original disc, square"):
        compare(Dataset.from_samples(CLASSES, []), [(found(ROWS), other)], "exact", 100)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny: Dataset) -> Model:
    folder = tmp_path_factory.mktemp("runs")
    return Trainer(model="echo/memory", epochs=8, name=str(folder / "one")).fit(tiny, tiny, quiet=True).model


def test_a_gate_that_proves_nothing_is_refused(model: Model, tiny: Dataset) -> None:
    """Of AP and its drop: numbers that are none, images without AP, and more allowed than there is."""
    for wrong in (float("nan"), float("inf"), -0.1, 1.5):
        with pytest.raises(InvalidValue, match="an AP from 0 to 1"):
            verify(model, model, tiny, max_ap_drop=wrong)
    kept = verify(model, model, tiny, max_ap_drop=0.01)
    assert kept.original["AP"] > 0.01
    with pytest.raises(UsageError, match=r"AP of the original is .* drop of 1 is allowed"):
        verify(model, model, tiny, max_ap_drop=1.0)
    crowds = replace(tiny, crowd=np.ones(len(tiny.boxes), dtype=np.bool_))
    with pytest.raises(UsageError, match="give no AP"):
        verify(model, model, crowds, max_ap_drop=0.01)


def test_classes_are_compared_before_anything_is_found(model: Model, tiny: Dataset, tmp_path: Path) -> None:
    other = Model(shutil.copytree(model.path, tmp_path / "other"))
    swapped = msgspec.structs.replace(other.manifest, classes=other.manifest.classes[::-1])
    write_json(other.path / "detkit.json", swapped)
    with pytest.raises(UsageError, match="in the same order"):
        verify(model, Model(other.path), tiny)
