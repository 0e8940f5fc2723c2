"""What check finds and what prepare makes of it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit import read_dataset, write_dataset
from detkit.boxes import orient
from detkit.data import Dataset, Sample
from detkit.errors import InvalidData
from detkit.formats.checks import check_annotations, prepare
from detkit.formats.findings import Finding, count_codes
from detkit.formats.imagefiles import read_headers
from detkit.images import read_image
from detkit.testing import tiny_dataset

GOOD = (2.0, 3.0, 12.0, 14.0)
BAD = {
    "non-finite": (1.0, np.nan, 5.0, 5.0),
    "inverted": (9.0, 3.0, 5.0, 8.0),
    "zero-area": (5.0, 3.0, 5.0, 8.0),
    "outside": (30.0, 3.0, 42.0, 8.0),
}


def _check(data: Dataset) -> list[Finding]:
    return check_annotations(data, read_headers(data.paths))


def picture(folder: Path, *boxes: tuple[float, ...], name: str = "a.png") -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(folder / name)
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    sample = Sample(path=str(folder / name), width=40, height=30, boxes=array, names=("disc",) * len(array))
    return Dataset.from_samples(("disc",), [sample])


@pytest.mark.parametrize(
    ("box", "code"),
    [
        *((box, code) for code, box in BAD.items()),
        ((np.inf, 0, 5, 5), "non-finite"),
        ((5, 5, 6, 6), "zero-area"),
        ((5, 5, 9, 5), "zero-area"),
        ((50, 5, 60, 9), "outside"),
        ((-9, 5, -2, 9), "outside"),
        ((-0.5, 5, 0, 9), "outside"),
        ((0, 0, 40, 31.5), "outside"),
        ((-1, 0, 40, 31), "overhang"),
        ((0, 0, 40, 30), None),
        ((5, 5, 6, 9), None),
    ],
)
def test_one_box(tmp_path: Path, box: tuple[float, ...], code: str | None) -> None:
    found = _check(picture(tmp_path, GOOD, box))
    assert [finding.code for finding in found] == ([code] if code else [])
    for finding in found:
        assert (finding.image, finding.box, finding.record) == (0, 1, 1)
        assert finding.severity == ("warning" if code == "overhang" else "error")
        assert str(finding).startswith(f"{tmp_path}/a.png: object 2 (disc): box ")
        assert str(finding).endswith(f"[{code}]")


def test_duplicates(tmp_path: Path) -> None:
    data = picture(tmp_path, GOOD, (1, 1, 5, 5), GOOD, GOOD)
    found = _check(data)
    assert [(finding.code, finding.severity, finding.box) for finding in found] == [
        ("duplicate", "warning", 2),
        ("duplicate", "warning", 3),
    ]
    assert found[0].message == "same class and box as object 1"
    two = replace(data, classes=("disc", "square"), labels=np.array([0, 0, 1, 1]))
    assert [finding.box for finding in _check(two)] == [3]


def test_place_in_json(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures")
    folder = write_dataset(data, tmp_path / "out")
    boxes = data.boxes.copy()
    boxes[3, 2] = boxes[3, 0]
    (finding,) = _check(replace(read_dataset(folder), boxes=boxes))
    assert str(finding).startswith(f"{folder}/annotations.json: annotations[3] ({data.classes[data.labels[3]]}): box")


def test_images(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path)
    Path(data.paths[0]).unlink()
    Path(data.paths[1]).write_bytes(b"no picture")
    Path(data.paths[3]).write_bytes(b"")
    Image.new("RGB", (96, 95)).save(data.paths[2])
    found = _check(data)
    assert [(finding.code, finding.image) for finding in found] == [
        ("missing-image", 0),
        ("unreadable-image", 1),
        ("wrong-size", 2),
        ("unreadable-image", 3),
    ]
    assert "the annotation says 96x96, the image is 96x95" in str(found[2])
    assert check_annotations(data, None) == []
    for on_invalid in ("raise", "drop"):
        with pytest.raises(InvalidData, match=r"(?s)4 error\(s\).*never dropped silently") as caught:
            prepare(data, on_invalid=on_invalid)
        assert list(caught.value.findings) == found


def test_a_jpeg_cut_off_after_its_header_passes_until_it_is_decoded(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path)
    content = Path(data.paths[0]).read_bytes()
    Path(data.paths[0]).write_bytes(content[: len(content) // 2])
    assert not _check(data)
    assert len(prepare(data, on_invalid="raise").data) == len(data)
    with pytest.raises(InvalidData, match=r"000\.jpg"):
        data[0].image()


def test_prepare_keeps_good_data_as_it_is(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path)
    ready = prepare(data, on_invalid="raise")
    assert ready.data.digest() == data.digest()
    assert ready.image_digests == [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in data.paths]
    assert (ready.dropped, ready.warnings) == ({}, [])


def test_bad_boxes_raise_or_go(tmp_path: Path) -> None:
    boxes = [*BAD.values(), GOOD, GOOD, *[BAD["zero-area"]] * 10]
    data = replace(picture(tmp_path, *boxes), split_indices={"train": np.array([0])})
    with pytest.raises(InvalidData) as caught:
        prepare(data, on_invalid="raise")
    text = str(caught.value)
    assert len(caught.value.findings) == 14
    assert text.startswith("14 error(s) in the data (zero-area 11, non-finite 1, inverted 1, outside 1):")
    assert text.count("[zero-area]") == 7
    assert "... and 4 more" in text
    assert "--on-invalid drop" in text
    ready = prepare(data, on_invalid="drop")
    assert ready.dropped == {"zero-area": 11, "non-finite": 1, "inverted": 1, "outside": 1}
    assert ready.data.boxes.tolist() == [list(GOOD)] * 2
    assert list(ready.data.splits) == ["train"]
    assert [finding.code for finding in ready.warnings] == ["duplicate"]
    assert all(finding.box is not None and finding.box < 2 for finding in ready.warnings)


def test_an_image_whose_boxes_all_go_stays(tmp_path: Path) -> None:
    ready = prepare(picture(tmp_path, BAD["inverted"]), on_invalid="drop")
    assert (len(ready.data), len(ready.data.boxes), len(ready.image_digests)) == (1, 0, 1)


def test_only_negatives(tmp_path: Path) -> None:
    assert _check(picture(tmp_path)) == []
    assert len(prepare(picture(tmp_path), on_invalid="raise").data.boxes) == 0


def test_nothing_at_all() -> None:
    empty = Dataset.from_samples(("disc",), [])
    assert [finding.code for finding in check_annotations(empty, None)] == ["no-images"]
    with pytest.raises(InvalidData, match="no images"):
        prepare(empty, on_invalid="drop")


def test_overhang_is_not_clipped(tmp_path: Path) -> None:
    ready = prepare(picture(tmp_path, (-1, 0, 40, 31)), on_invalid="raise")
    assert ready.data.boxes.tolist() == [[-1, 0, 40, 31]]
    assert count_codes(ready.warnings) == {"overhang": 1}


def test_unknown_size_comes_from_the_file(tmp_path: Path) -> None:
    data = replace(picture(tmp_path, GOOD, (0, 0, 45, 30)), sizes=np.zeros((1, 2), dtype=np.int64))
    assert count_codes(check_annotations(data, None)) == {}
    assert count_codes(_check(data)) == {"outside": 1}
    assert prepare(data, on_invalid="drop").data.sizes.tolist() == [[40, 30]]


STORED = (4, 6, 16, 11)


def turned(folder: Path, orientation: int) -> tuple[str, list[float]]:
    """Save 40 x 30 stored pixels with a white box and a tag; return where the box is seen."""
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    x0, y0, x1, y1 = STORED
    pixels[y0:y1, x0:x1] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = folder / f"{orientation}.png"
    Image.fromarray(pixels).save(path, exif=exif)
    rows, columns = np.nonzero(read_image(path)[:, :, 0] > 128)
    return str(path), [float(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_follow_the_pixels(tmp_path: Path, orientation: int) -> None:
    path, seen = turned(tmp_path, orientation)
    stored = np.array([STORED], dtype=np.float64)
    assert orient(stored, orientation, 40, 30).tolist() == [seen]
    width, height = (30, 40) if orientation >= 5 else (40, 30)

    as_seen = Sample(path=path, width=width, height=height, boxes=np.array([seen]), names=("box",))
    ready = prepare(Dataset.from_samples(("box",), [as_seen]), on_invalid="raise")
    assert ready.data.boxes.tolist() == [seen]
    # Without the swap of the sides nothing tells on which picture the boxes were drawn.
    assert count_codes(ready.warnings) == ({"turned-image": 1} if 2 <= orientation <= 4 else {})

    if orientation >= 5:
        as_stored = Sample(path=path, width=40, height=30, boxes=stored, names=("box",))
        data = Dataset.from_samples(("box",), [as_stored])
        assert count_codes(_check(data)) == {"turned-boxes": 1}
        ready = prepare(data, on_invalid="raise")
        assert ready.data.boxes.tolist() == [seen]
        assert ready.data.sizes.tolist() == [[30, 40]]
        assert ready.data.area.tolist() == [60]
        assert count_codes(ready.warnings) == {"turned-boxes": 1}
        masked = replace(data, masks=([[4.0, 6.0, 16.0, 6.0, 16.0, 11.0]],))
        with pytest.raises(InvalidData, match="turned-masks"):
            prepare(masked, on_invalid="drop")


def test_a_turned_image_of_yet_another_size(tmp_path: Path) -> None:
    path, _ = turned(tmp_path, 6)
    data = Dataset.from_samples(("box",), [Sample(path=path, width=41, height=30)])
    (finding,) = _check(data)
    assert (finding.code, finding.severity) == ("wrong-size", "error")
    assert "the annotation says 41x30, the image is 30x40 as displayed (EXIF orientation 6)" in finding.message


def test_words() -> None:
    finding = Finding(code="zero-area", severity="error", message="no area", file="a.xml", place="object 3 (RBC)")
    assert str(finding) == "a.xml: object 3 (RBC): no area [zero-area]"
