"""Where tiles lie, and how what is found on them becomes the detections of the whole image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from detkit import Dataset, Detections, Predictor, Run, Sample, Trainer
from detkit.boxes import area, iou
from detkit.errors import InvalidValue
from detkit.images import Image
from detkit.masks import decode, encode
from detkit.testing import tiny_dataset
from detkit.tiling import SMALLEST, Tiling, View

NAMES = ("square", "disc")

lengths = st.integers(1, 700)
sizes = st.integers(SMALLEST, 300)
overlaps = st.floats(0, 0.9)


def detections(boxes: object, scores: object = None, labels: object = None, **more: object) -> Detections:
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    n = len(corners)
    return Detections.from_arrays(
        corners,
        np.linspace(0.9, 0.5, n) if scores is None else scores,
        np.zeros(n, int) if labels is None else labels,
        classes=NAMES,
        **more,  # type: ignore[arg-type]
    )


def seen(view: View, boxes: np.ndarray, scores: object = None, labels: object = None) -> tuple[View, Detections]:
    """What a flawless model answers to a view of an image that has these objects."""
    x0, y0, x1, y1 = view
    scores = np.linspace(0.9, 0.5, len(boxes)) if scores is None else np.asarray(scores)
    labels = np.zeros(len(boxes), int) if labels is None else np.asarray(labels)
    parts = np.clip(boxes, [x0, y0, x0, y0], [x1, y1, x1, y1])
    there = area(parts) > 0
    found = detections(parts[there] - [x0, y0, x0, y0], scores[there], labels[there], width=x1 - x0, height=y1 - y0)
    return view, found


@given(lengths, lengths, sizes, overlaps, st.booleans())
def test_tiles_cover_every_pixel_and_overlap_enough(
    width: int, height: int, size: int, overlap: float, whole: bool
) -> None:
    views = Tiling(size, overlap, whole).views(width, height)
    assert len(set(views)) == len(views)
    if width <= size and height <= size:
        assert views == [(0, 0, width, height)]
        return
    assert (views[0] == (0, 0, width, height)) == whole
    tiles = np.array(views[1:] if whole else views)
    assert ((tiles[:, 2:] - tiles[:, :2]) == np.minimum([width, height], size)).all()
    assert tiles.min() >= 0
    for axis, length in ((0, width), (1, height)):
        starts = np.unique(tiles[:, axis])
        assert starts[0] == 0 and starts[-1] == max(length - size, 0)
        steps = np.diff(starts)
        assert (size - steps >= np.floor(overlap * size) - 1e-9).all() or (steps == 1).all()
        assert len(steps) == 0 or steps.max() - steps.min() <= 1
    assert len(tiles) == len(np.unique(tiles[:, 0])) * len(np.unique(tiles[:, 1]))


def test_settings_that_cannot_be() -> None:
    for size in (0, SMALLEST - 1, 64.0, True, -640):
        with pytest.raises(InvalidValue, match=f"tile_size.*a whole number of pixels from {SMALLEST}"):
            Tiling(size)  # type: ignore[arg-type]
    for overlap in (-0.1, 0.95, 1, float("nan")):
        with pytest.raises(InvalidValue, match="tile_overlap.*a share of the tile's side from 0 to 0.9"):
            Tiling(64, overlap)


@st.composite
def objects(draw: st.DrawFn) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray]:
    """Objects of an image in cells of their own, so that no two touch, each of 24 pixels or fewer and 6 or more."""
    columns, rows = draw(st.integers(2, 8)), draw(st.integers(2, 8))
    cells = draw(st.lists(st.tuples(st.integers(0, columns - 1), st.integers(0, rows - 1)), unique=True, max_size=20))
    boxes = []
    for column, row in cells:
        x, y = 32 * column + draw(st.integers(2, 5)), 32 * row + draw(st.integers(2, 5))
        boxes.append([x, y, x + draw(st.integers(6, 24)), y + draw(st.integers(6, 24))])
    n = len(boxes)
    labels = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    scores = draw(st.lists(st.floats(0.05, 1), min_size=n, max_size=n))
    return 32 * columns, 32 * rows, np.array(boxes, float).reshape(-1, 4), np.array(labels, int), np.array(scores)


@given(objects(), st.integers(64, 128), st.floats(0.4, 0.6), st.booleans())
def test_every_object_is_found_once_where_it_is(
    image: tuple[int, int, np.ndarray, np.ndarray, np.ndarray], size: int, overlap: float, whole: bool
) -> None:
    """No object is larger than the overlap, so some tile has it whole, and many others have a part of it."""
    width, height, boxes, labels, scores = image
    tiling = Tiling(size, overlap, whole)
    found = tiling.merge(width, height, [seen(view, boxes, scores, labels) for view in tiling.views(width, height)])
    assert (found.width, found.height) == (width, height)
    assert sorted(zip(found.names, found.boxes.tolist(), strict=True)) == sorted(
        (NAMES[label], box) for label, box in zip(labels, boxes.tolist(), strict=True)
    )
    assert (np.diff(found.scores) <= 0).all()


@given(st.data())
def test_what_is_far_apart_stays_as_it_is(data: st.DataObject) -> None:
    """Merging is the identity where no two views have the same object, however much boxes of one view overlap."""
    tiling = Tiling(64, 0.25, whole=False)
    views = tiling.views(200, 150)
    found, boxes, scores = [], [], []
    for view in views:
        n = data.draw(st.integers(0, 3))
        # Between 16 and 48, no other tile sees anything of it.
        corners = np.array([[20, 20, 30, 30]] * n, float).reshape(-1, 4) + data.draw(st.integers(0, 10))
        sure = np.array(data.draw(st.lists(st.floats(0.1, 1), min_size=n, max_size=n)))
        assume(not n or not any(inside(corners[0] + np.tile(view[:2], 2), other) for other in views if other != view))
        found.append((view, detections(corners, sure)))
        boxes.extend((corners + np.tile(view[:2], 2)).tolist())
        scores.extend(sure.tolist())
    merged = tiling.merge(200, 150, found)
    assert sorted(zip(merged.scores.tolist(), merged.boxes.tolist(), strict=True)) == sorted(
        zip(scores, boxes, strict=True)
    )


def inside(box: np.ndarray, view: View) -> bool:
    return bool(box[0] < view[2] and box[2] > view[0] and box[1] < view[3] and box[3] > view[1])


def test_an_object_longer_than_any_tile() -> None:
    """Without the whole image, the parts that tiles have of it become one box; with it, its box there stays."""
    road = np.array([[10.0, 40, 390, 60]])
    for whole in (False, True):
        tiling = Tiling(100, 0.2, whole)
        views = tiling.views(400, 100)
        scores = [0.3 if view == (0, 0, 400, 100) else 0.8 + 0.01 * i for i, view in enumerate(views)]
        shaken = [
            seen(view, road + np.array([0, i % 2] * 2), [s])
            for i, (view, s) in enumerate(zip(views, scores, strict=True))
        ]
        found = tiling.merge(400, 100, shaken)
        assert len(found) == 1
        assert iou(found.boxes, road)[0, 0] > 0.9
        assert found.scores.tolist() == [0.3 if whole else max(scores)]


def test_the_whole_one_stays_and_not_the_surer_part() -> None:
    tiling = Tiling(100, 0.4, whole=False)
    views = tiling.views(160, 100)
    assert views == [(0, 0, 100, 100), (60, 0, 160, 100)]
    car = np.array([[70.0, 20, 125, 60]])
    found = tiling.merge(160, 100, [seen(views[0], car, [0.95]), seen(views[1], car, [0.4])])
    assert found.boxes.tolist() == car.tolist()
    assert found.scores.tolist() == [0.4]


def test_neighbours_and_other_classes_are_no_parts() -> None:
    tiling = Tiling(100, 0.4, whole=False)
    views = tiling.views(160, 100)
    boxes = np.array([[62.0, 20, 80, 60], [81, 20, 99, 60], [62, 20, 80, 60]])
    found = tiling.merge(160, 100, [seen(view, boxes, [0.9, 0.8, 0.7], [0, 0, 1]) for view in views])
    assert sorted(found.names) == ["disc", "square", "square"]
    found = tiling.merge(160, 100, [seen(views[0], boxes[:1], labels=[0]), seen(views[1], boxes[:1], labels=[1])])
    assert sorted(found.names) == ["disc", "square"]


def test_a_rough_box_around_a_sliver_is_a_part_all_the_same() -> None:
    """Of the car, the left tile has 12 pixels at its border, and its model draws 4 of them."""
    tiling = Tiling(100, 0.4, whole=False)
    views = tiling.views(160, 100)
    sliver, car = detections([[96, 22, 100, 58]], [0.9]), np.array([[88.0, 20, 150, 60]])
    found = tiling.merge(160, 100, [(views[0], sliver), seen(views[1], car, [0.5])])
    assert found.boxes.tolist() == car.tolist()


def test_the_threshold_decides() -> None:
    views = [(0, 0, 100, 100), (40, 0, 140, 100)]
    a, b = np.array([[50.0, 20, 70, 40]]), np.array([[54.0, 20, 74, 40]])  # IoU 2/3
    for threshold, count in ((0.6, 1), (0.7, 2)):
        found = Tiling(100, 0.6, False, threshold).merge(140, 100, [seen(views[0], a), seen(views[1], b)])
        assert len(found) == count


def test_masks_move_and_join() -> None:
    height, width = 90, 210
    pixels = np.zeros((height, width), dtype=bool)
    pixels[30:50, 20:200] = True
    pixels[30:34, 100:110] = False
    corners = np.array([[20.0, 30, 200, 50]])
    small = np.zeros_like(pixels)
    small[60:70, 15:20] = True
    tiling = Tiling(90, 0.2, whole=False)
    found = []
    for view in tiling.views(width, height):
        x0, y0, x1, y1 = view
        _, one = seen(view, corners)
        masks = [encode(pixels[y0:y1, x0:x1])]
        if x0 == 0:
            one = detections([*one.boxes, [15, 60, 20, 70]], [0.9, 0.8], width=90, height=90)
            polygon = [[15.0, 60, 20, 60, 20, 70, 15, 70]]
            masks.append(polygon)
        found.append((view, replace(one, masks=tuple(masks))))
    merged = tiling.merge(width, height, found)
    assert merged.boxes.tolist() == [*corners.tolist(), [15, 60, 20, 70]]
    assert merged.masks is not None
    assert (decode(merged.masks[0], (width, height)) == pixels).all()
    assert (decode(merged.masks[1], (width, height)) == small).all()


@given(st.integers(0, 12), st.integers(1, 12), st.integers(0, 12), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_masks_of_any_shape(left: int, across: int, right: int, height: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    strip = rng.random((height, across)) < rng.choice([0.0, 0.3, 1.0])
    width = left + across + right
    views = [(0, 0, width, height), (left, 0, left + across, height)]
    box = [[0, 0, across, height]]
    found = [(views[0], detections([])), (views[1], replace(detections(box), masks=(encode(strip),)))]
    merged = Tiling(32).merge(width, height, found)
    assert merged.masks is not None
    whole = np.zeros((height, width), dtype=bool)
    whole[:, left : left + across] = strip
    assert (decode(merged.masks[0], (width, height)) == whole).all()


def test_views_come_in_batches_of_their_own() -> None:
    asked: list[list[tuple[int, ...]]] = []

    def detect(crops: list[Image]) -> list[Detections]:
        asked.append([crop.shape for crop in crops])
        return [detections([], width=crop.shape[1], height=crop.shape[0]) for crop in crops]

    images = [np.zeros((h, w, 3), dtype=np.uint8) for h, w in ((50, 60), (100, 160), (70, 64))]
    found = Tiling(64, 0.2).detect(images, detect, 4)
    assert [(one.width, one.height) for one in found] == [(60, 50), (160, 100), (64, 70)]
    assert [len(batch) for batch in asked] == [4, 4, 3]
    assert asked[0][:2] == [(50, 60, 3), (100, 160, 3)]


def test_many_boxes_take_little_time_and_memory() -> None:
    rng = np.random.default_rng(0)
    low = rng.random((10_000, 2)) * 6000
    boxes = np.concatenate([low, low + rng.integers(8, 40, (10_000, 2))], axis=1)
    tiling = Tiling(1024, 0.1, whole=False)
    views = tiling.views(6040, 6040)
    found = tiling.merge(6040, 6040, [seen(view, boxes, rng.random(10_000)) for view in views])
    assert len(found) == pytest.approx(10_000, rel=0.02)


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Dataset]:
    folder = tmp_path_factory.mktemp("tiling")
    data = tiny_dataset(folder / "images", num_images=10)
    return Trainer(model="echo/memory", epochs=8).fit(data, data, name=str(folder / "run"), quiet=True), data


def mosaic(samples: list[Sample], columns: int) -> tuple[Image, np.ndarray, list[str]]:
    """Lay pictures of one size out in rows; their boxes move along."""
    side = samples[0].width
    rows = len(samples) // columns
    picture = np.zeros((rows * side, columns * side, 3), dtype=np.uint8)
    boxes, names = [], []
    for i, sample in enumerate(samples[: rows * columns]):
        y, x = side * (i // columns), side * (i % columns)
        picture[y : y + side, x : x + side] = sample.image()
        boxes.extend((sample.boxes + np.array([x, y, x, y])).tolist())
        names.extend(sample.names)
    return picture, np.array(boxes), names


def recall(found: Detections, boxes: np.ndarray, names: list[str]) -> float:
    hits = [
        bool((iou(box[None], found.boxes)[0][[other == name for other in found.names]] >= 0.5).any())
        for box, name in zip(boxes, names, strict=True)
    ]
    return sum(hits) / len(hits)


def test_small_objects_are_found_in_tiles_and_missed_without(memory: tuple[Run, Dataset], tmp_path: Path) -> None:
    run, data = memory
    picture, boxes, names = mosaic(list(data)[:9], 3)
    with Predictor(run) as plain, Predictor(run, tile_size=96, tile_overlap=0) as tiled:
        assert recall(plain(picture), boxes, names) < 0.2
        found = tiled(picture)
        assert recall(found, boxes, names) == 1
        assert (found.width, found.height) == (288, 288)
        (again,) = tiled.predict([picture])
        assert again.boxes.tolist() == found.boxes.tolist()
        assert tiled.num_images == 2
        # What fits into a tile is looked at as it is.
        assert tiled(data[0].path).to_dict() == plain(data[0].path).to_dict()


def test_limits_count_for_the_image_where_given(memory: tuple[Run, Dataset]) -> None:
    run, data = memory
    picture, boxes, _ = mosaic(list(data)[:9], 3)
    with Predictor(run, tile_size=96, tile_overlap=0, tile_whole=False, max_detections=4) as limited:
        assert len(limited(picture)) == 4
    with Predictor(run, tile_size=96, tile_overlap=0, tile_whole=False) as free:
        assert len(free(picture)) == len(boxes)


@pytest.mark.parametrize("isolate", [False, True])
def test_a_worker_takes_tiles_too(memory: tuple[Run, Dataset], isolate: bool) -> None:
    run, data = memory
    picture, boxes, names = mosaic(list(data)[:6], 3)
    with Predictor(run, tile_size=96, tile_overlap=0, isolate=isolate, batch_size=2) as predictor:
        assert recall(predictor(picture), boxes, names) == 1
