"""`detkit.drawing`: what must hold of any picture; how good it looks was judged by eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from detkit.data import Dataset, Sample
from detkit.detections import Detections
from detkit.drawing import PALETTE, colour_of, comparison_sheet, draw, sheet, write_picture
from detkit.errors import ImageError, InvalidValue, StorageError, UsageError
from detkit.masks import encode

CLASSES = ("bolt", "Schraube größer als 10 mm", "螺丝")
GREY = 128


def detected(boxes: list[list[float]], labels: list[int], scores: list[float], size: int = 200) -> Detections:
    return Detections(
        path="",
        width=size,
        height=size,
        classes=CLASSES,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        scores=np.array(scores, dtype=np.float64),
    )


def grey(width: int = 200, height: int = 200) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def changed(picture: PillowImage.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    return np.asarray((np.asarray(picture) != GREY).any(axis=2))


def test_pixels_change_on_the_sides_of_the_box_and_nowhere_else() -> None:
    picture = draw(grey(), detected([[50, 60, 150, 170]], [0], [0.9]), labels=False)
    pixels = np.asarray(picture)
    for y, x in ((60, 100), (169, 100), (100, 50), (100, 149), (60, 50), (169, 149)):
        assert tuple(pixels[y, x]) == PALETTE[0]
    assert np.argwhere(changed(picture)).min(axis=0).tolist() == [59, 49]
    assert np.argwhere(changed(picture)).max(axis=0).tolist() == [170, 150]
    assert not changed(picture)[64:166, 54:146].any()


def test_the_image_itself_is_left_alone() -> None:
    pixels, picture = grey(), PillowImage.fromarray(grey())
    for image in (pixels, picture):
        draw(image, detected([[50, 60, 150, 170]], [0], [0.9]))
    assert (pixels == GREY).all() and not changed(picture).any()


def test_zero_detections_and_none_leave_the_picture_as_it_is() -> None:
    for nothing in (None, detected([], [], [])):
        assert not changed(draw(grey(), nothing)).any()
    assert not changed(draw(grey(), detected([[50, 60, 150, 170]], [0], [0.4]), score_threshold=0.5)).any()


def test_a_label_lies_above_its_box_and_stays_inside_the_image() -> None:
    box = [[50.0, 60.0, 150.0, 170.0]]
    with_label = changed(draw(grey(), detected(box, [0], [0.9])))
    without = changed(draw(grey(), detected(box, [0], [0.9]), labels=False))
    rows = np.argwhere(with_label & ~without)[:, 0]
    assert rows.min() >= 40 and rows.max() < 60
    for corner in ([0, 0, 20, 20], [180, 0, 200, 20], [0, 180, 20, 200], [180, 180, 200, 200], [0, 0, 200, 200]):
        picture = draw(grey(), detected([[float(v) for v in corner]], [0], [0.9]))
        chip = np.argwhere((np.asarray(picture) == PALETTE[0]).all(axis=2))
        assert picture.size == (200, 200)
        assert np.ptp(chip, axis=0).max() >= 20
        text = (np.asarray(picture) < 60).all(axis=2)
        assert text.sum() > 20, "the text is cut off"


def test_labels_evade_each_other() -> None:
    stacked = detected([[50, 60, 150, 170]] * 3, [0, 0, 0], [0.9, 0.8, 0.7])
    alone = detected([[50, 60, 150, 170]], [0], [0.9])

    def coloured(found: Detections) -> int:
        return int((np.asarray(draw(grey(), found)) == PALETTE[0]).all(axis=2).sum())

    frame = int((np.asarray(draw(grey(), alone, labels=False)) == PALETTE[0]).all(axis=2).sum())
    assert coloured(stacked) - frame > 2 * (coloured(alone) - frame)


@pytest.mark.parametrize("label", range(len(CLASSES)))
@pytest.mark.parametrize("size", [(200, 200), (24, 200), (1, 1), (3000, 40)])
def test_any_name_on_any_size(label: int, size: tuple[int, int]) -> None:
    width, height = size
    found = detected([[0, 0, width, height], [-50, -50, -10, -10], [1e5, 0, 2e5, 9]], [label] * 3, [0.9, 0.8, 0.7])
    assert draw(grey(width, height), found).size == size


def test_ground_truth_is_dashed_and_labelled_where_it_was_missed() -> None:
    truth = Sample(path="", width=200, height=200, boxes=np.array([[50.0, 60.0, 150.0, 170.0]]), names=("bolt",))
    top = np.asarray(draw(grey(), truth=truth, classes=CLASSES))[60, 55:145]
    assert (top == 255).all(axis=1).any() and (top == PALETTE[0]).all(axis=1).any()

    square = Sample(path="", width=200, height=200, boxes=np.array([[50.0, 50.0, 150.0, 150.0]]), names=("bolt",))
    pixels = np.asarray(draw(grey(), truth=square, labels=False))
    assert np.array_equal(pixels, pixels.transpose(1, 0, 2)), "all four sides are dashed alike"

    def above(found: Detections) -> bool:
        return bool(changed(draw(grey(), found, truth=truth))[42:58].any())

    assert above(detected([], [], []))
    assert above(detected([[0, 180, 20, 200]], [0], [0.9]))
    low = detected([[50, 62, 150, 172]], [0], [0.9])
    assert np.array_equal(
        changed(draw(grey(), low, truth=truth, labels=True))[:42], changed(draw(grey(), low, labels=True))[:42]
    )


@pytest.mark.parametrize("min_side", [0, 400])
def test_masks_are_filled_and_let_the_image_through(min_side: int) -> None:
    """Inside of a mask the grey is tinted, on its edge more so, and around it nothing changes."""
    y, x = np.mgrid[:200, :200]
    disc = (x - 100) ** 2 + (y - 100) ** 2 < 50**2
    square = [[60, 60, 140, 60, 140, 140, 60, 140]]
    for mask, inside, edge, outside in (
        (encode(disc), (100, 100), (100, 51), (58, 58)),
        (square, (100, 100), (100, 60), (57, 100)),
    ):
        found = Detections.from_arrays([[50, 50, 150, 150]], [0.9], labels=[0], classes=["a"], masks=[mask])
        truth = Sample(path="", width=200, height=200, boxes=found.boxes, names=("a",), masks=found.masks)
        for picture in (
            draw(grey(), found, min_side=min_side),
            draw(grey(), truth=truth, classes=["a"], min_side=min_side),
        ):
            factor = picture.width // 200
            shades = [np.array(picture.getpixel((px * factor, py * factor))) for px, py in (inside, edge, outside)]
            before, colour = grey()[0, 0].astype(int), np.array(colour_of("a", ["a"]))
            shares = [float(np.abs(shade - before).sum() / np.abs(colour - before).sum()) for shade in shades]
            assert 0.2 < shares[0] < 0.5
            assert shares[1] > shares[0] + 0.15
            assert shares[2] == 0


def test_small_images_are_enlarged_to_the_side_asked_for() -> None:
    picture = draw(grey(100, 50), detected([[10, 10, 90, 40]], [0], [0.9]), min_side=400, labels=False)
    assert picture.size == (800, 400)
    assert tuple(np.asarray(picture)[80, 400]) == PALETTE[0]
    assert draw(grey(100, 50), min_side=20).size == (100, 50)


def test_colours_are_stable_and_differ() -> None:
    assert len({colour_of(name, CLASSES) for name in CLASSES}) == len(CLASSES)
    assert colour_of("bolt", CLASSES) == PALETTE[0]
    assert colour_of("bolt") == colour_of("bolt")
    assert len(set(PALETTE)) == len(PALETTE)
    assert colour_of("c13", [f"c{i}" for i in range(20)]) == PALETTE[13 % len(PALETTE)]


def test_every_kind_of_image(tmp_path: Path) -> None:
    PillowImage.fromarray(grey(60, 40)).save(tmp_path / "a.png")
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), grey(60, 40), PillowImage.new("RGBA", (60, 40))):
        assert draw(image).size == (60, 40)
        assert draw(image).mode == "RGB"
    with pytest.raises(ImageError, match="no such file"):
        draw(tmp_path / "b.png")


def test_sheet_size_and_places() -> None:
    pictures = [PillowImage.new("RGB", (300, 200), (200, 0, 0)) for _ in range(5)]
    bare = sheet(pictures, columns=3, cell=240)
    margin, gap, cell_height = 20, 17, 160
    assert bare.size == (2 * margin + 3 * 240 + 2 * gap, 2 * margin + 2 * cell_height + gap)
    pixels = np.asarray(bare)
    assert tuple(pixels[margin + 80, margin + 120]) == (200, 0, 0)
    assert tuple(pixels[-margin - 80, -margin - 120]) == tuple(pixels[0, 0]), "the sixth cell is empty"
    full = sheet(
        pictures, columns=3, cell=240, titles=["a"] * 5, headings=["b"] * 3, caption="c" * 999, legend={"d": PALETTE[0]}
    )
    assert full.width == bare.width and full.height > bare.height
    assert sheet(pictures[:1], columns=3, cell=240).width == 2 * margin + 240
    assert sheet([], columns=2).height > 0
    with pytest.raises(InvalidValue, match="columns"):
        sheet(pictures, columns=3, group=2)


def make_data(folder: Path, num_images: int, num_boxes: int) -> Dataset:
    samples = []
    for i in range(num_images):
        path = folder / f"{i}.png"
        PillowImage.fromarray(grey(120, 90 + 10 * i)).save(path)
        boxes = np.array([[5.0 * j, 5.0 * j, 5.0 * j + 30, 5.0 * j + 30] for j in range(num_boxes)]).reshape(-1, 4)
        names = tuple(CLASSES[j % 3] for j in range(num_boxes))
        samples.append(Sample(path=str(path), width=120, height=90 + 10 * i, boxes=boxes, names=names))
    return Dataset.from_samples(CLASSES, samples)


@pytest.mark.parametrize("num_boxes", [0, 2, 15])
def test_comparison_sheet(tmp_path: Path, num_boxes: int) -> None:
    data = make_data(tmp_path, 5, num_boxes)
    found = [detected(sample.boxes.tolist(), [0] * num_boxes, [0.5] * num_boxes) for sample in data]
    small = comparison_sheet(data, found, columns=2, limit=2, cell=200)
    large = comparison_sheet(data, found, columns=2, limit=5, cell=200, caption="model x")
    assert small.width == large.width > 400
    assert large.height > 2 * small.height
    with pytest.raises(UsageError, match="4 detections for 5 images"):
        comparison_sheet(data, found[:4])
    with pytest.raises(InvalidValue, match="multiple of 2"):
        comparison_sheet(data, found, columns=3)
    with pytest.raises(InvalidValue, match="limit"):
        comparison_sheet(data, found, limit=0)


def test_comparison_sheet_of_no_images() -> None:
    assert comparison_sheet(Dataset.from_samples(CLASSES, []), []).width > 0


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_write_picture(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "folder" / f"a.{ending}"
    write_picture(PillowImage.new("RGB", (30, 20)), path)
    with PillowImage.open(path) as picture:
        assert picture.size == (30, 20)
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_write_picture_refuses(tmp_path: Path) -> None:
    for name in ("a.txt", "a.psd"):  # Pillow reads the second, and does not write it
        with pytest.raises(InvalidValue, match=r"\.png"):
            write_picture(PillowImage.new("RGB", (3, 2)), tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_picture(PillowImage.new("RGB", (3, 2)), tmp_path / "file" / "a.png")
