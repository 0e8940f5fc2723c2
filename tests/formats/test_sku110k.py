"""SKU-110K: the conformance suite, and what CSV files get wrong."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit import read_dataset, write_dataset
from detkit.errors import DetkitWarning, InvalidData, UsageError
from detkit.io import recognise
from detkit.testing import FormatTests, tiny_dataset

GOOD = "a.jpg,1,2,10,12,object,40,30"


class TestConformance(FormatTests):
    format_name = "sku110k"


def put(root: Path, *lines: str, csv_file: str = "annotations/annotations_train.csv") -> Path:
    """Write two pictures of 40 x 30 pixels, and a CSV file."""
    for name in ("a.jpg", "b.jpg"):
        (root / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(root / "images" / name)
    (root / csv_file).parent.mkdir(exist_ok=True)
    (root / csv_file).write_text("".join(f"{line}\n" for line in lines))
    return root


def faults(path: Path, **options: Any) -> list[tuple[str, int | None]]:
    with pytest.raises(InvalidData) as caught:
        read_dataset(path, "sku110k", **options)
    found = caught.value.findings
    assert all(str(f.file).startswith(str(path)) for f in found)
    assert all(f.place == f"line {f.line}" for f in found if f.line is not None)
    return [(f.code, f.line) for f in found]


def test_the_layout_of_the_release(tmp_path: Path) -> None:
    put(tmp_path, GOOD, "a.jpg,3.5,4,20,30,object,40,30")
    put(tmp_path, "b.jpg,0,0,40,30,object,40,30", csv_file="annotations/annotations_val.csv")
    data = read_dataset(tmp_path)
    assert {name: part.image_ids for name, part in data.splits.items()} == {"train": ("a.jpg",), "val": ("b.jpg",)}
    assert data.boxes.tolist() == [[1, 2, 10, 12], [3.5, 4, 20, 30], [0, 0, 40, 30]]
    assert data.classes == ("object",)
    assert data.records.tolist() == [0, 1, 0]
    one = read_dataset(tmp_path / "annotations/annotations_val.csv")
    assert one.paths == (f"{tmp_path}/images/b.jpg",)
    assert not one.split_indices


def test_six_columns_and_images_without_objects(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg,1,2,10,12,object", "b.jpg,,,,,", csv_file="boxes.csv")
    data = read_dataset(tmp_path)
    assert data.image_ids == ("a.jpg", "b.jpg")
    assert data.sizes.tolist() == [[40, 30], [40, 30]]
    assert data.boxes_per_image().tolist() == [1, 0]


def test_lines_of_an_image_need_not_be_together(tmp_path: Path) -> None:
    put(tmp_path, GOOD, "b.jpg,0,0,5,5,tag,40,30", "a.jpg,5,5,9,9,tag,40,30")
    data = read_dataset(tmp_path)
    assert [sample.names for sample in data] == [("object", "tag"), ("tag",)]
    assert data.boxes.tolist() == [[1, 2, 10, 12], [5, 5, 9, 9], [0, 0, 5, 5]]
    assert data.records.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("a.jpg,1,2,10,12", "bad-columns"),
        ("a.jpg;1;2;10;12;object", "bad-columns"),
        ("a.jpg,1,2,10,12,object,40", "bad-columns"),
        ("a.jpg,1,2,wide,12,object,40,30", "bad-number"),
        ("a.jpg,1,2,,12,object,40,30", "bad-number"),
        ("a.jpg,1,2,inf,12,object,40,30", "bad-number"),
        ("a.jpg,1,2,10,12,,40,30", "no-name"),
        (",1,2,10,12,object,40,30", "no-image"),
        ("../a.jpg,1,2,10,12,object,40,30", "outside-folder"),
        ("/a.jpg,1,2,10,12,object,40,30", "outside-folder"),
        ("a.jpg,1,2,10,12,object,40,31", "size-differs"),
        ("a.jpg,1,2,10,12,object,-40,30", "bad-size"),
        ("a.jpg,1,2,10,12,object,40.5,30", "bad-size"),
        ("a.jpg,1,2,10,12,object,1e18,30", "bad-size"),
        ("a.jpg,,,,,,40,30", "contradiction"),
        ('a.jpg,1,2,10,12,"object,40,30', "malformed"),
        (f"a.jpg,1,2,10,12,{'x' * 200_000},40,30", "malformed"),
    ],
)
def test_lines_that_are_wrong(tmp_path: Path, line: str, code: str) -> None:
    put(tmp_path, GOOD, "", line)
    assert faults(tmp_path) == [(code, 3)]


def test_findings_of_all_files_at_once(tmp_path: Path) -> None:
    put(tmp_path, GOOD, "a.jpg,1")
    put(tmp_path, "b.jpg,1,2,3,4,object", "b.jpg,1,2,3,x,object", csv_file="annotations/annotations_val.csv")
    with pytest.raises(InvalidData) as caught:
        read_dataset(tmp_path)
    assert [f.code for f in caught.value.findings] == ["bad-columns", "bad-number"]
    assert caught.value.partial is not None
    assert caught.value.partial.boxes.tolist() == [[1, 2, 10, 12], [1, 2, 3, 4]]


@pytest.mark.parametrize(
    "header",
    [
        "image_name,x1,y1,x2,y2,class,image_width,image_height",
        "\ufeffImage, xmin, ymin, xmax, ymax, Label, width, height",
    ],
)
def test_a_known_header_is_skipped(tmp_path: Path, header: str) -> None:
    put(tmp_path, header, GOOD)
    assert read_dataset(tmp_path).records.tolist() == [1]


@pytest.mark.parametrize(
    "header",
    ["filename,width,height,class,xmin,ymin,xmax,ymax", "image_name,x1,x2,y1,y2,class,image_width,image_height"],
)
def test_another_header_is_refused(tmp_path: Path, header: str) -> None:
    put(tmp_path, header, GOOD)
    assert faults(tmp_path / "annotations/annotations_train.csv") == [("bad-header", 1)]
    with pytest.raises(UsageError, match="none of the known formats"):
        recognise(tmp_path)


def test_class_order_and_typos(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg,1,2,10,12,tag,40,30", GOOD)
    assert read_dataset(tmp_path).classes == ("object", "tag")
    assert read_dataset(tmp_path, classes=["tag", "more", "object"]).classes == ("tag", "more", "object")
    assert faults(tmp_path, classes=["objects", "tag"]) == [("unknown-class", 2)]


def test_missing_image(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg,1,2,10,12,object", "gone.jpg,1,2,10,12,object")
    assert faults(tmp_path) == [("missing-image", None)]


def test_corrupted_images(tmp_path: Path) -> None:
    put(tmp_path, GOOD, "b.jpg,1,2,10,12,object,40,30")
    content = (tmp_path / "images/b.jpg").read_bytes()
    (tmp_path / "images/b.jpg").write_bytes(content[: len(content) // 2])
    assert len(read_dataset(tmp_path)) == 2
    with pytest.warns(DetkitWarning, match=r"1 of 2 images cannot be decoded and are left out: b\.jpg"):
        assert read_dataset(tmp_path, corrupted="skip").image_ids == ("a.jpg",)


def test_images_to_leave_out(tmp_path: Path) -> None:
    put(tmp_path, GOOD, "b.jpg,1,2,10,12,object,40,30", "c.jpg,1,2,10,12,object")
    (tmp_path / "broken.txt").write_text("b.jpg\n\nc.jpg\nof_another_split.jpg\n")
    for exclude in ("b.jpg,c.jpg", "broken.txt", str(tmp_path / "broken.txt"), ["b.jpg", "c.jpg"]):
        data = read_dataset(tmp_path, exclude=exclude)
        assert data.image_ids == ("a.jpg",)
        assert data.boxes.tolist() == [[1, 2, 10, 12]]
    assert ("unknown-image", None) in faults(tmp_path, exclude="borken.txt")


def test_folder_of_images(tmp_path: Path) -> None:
    put(tmp_path, GOOD)
    (tmp_path / "images").rename(tmp_path / "shelves")
    assert read_dataset(tmp_path, images="shelves").paths == (f"{tmp_path}/shelves/a.jpg",)
    with pytest.raises(InvalidData, match="there is no folder"):
        read_dataset(tmp_path, images="shelf")


def test_what_we_write_is_plain_csv(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures")
    data = replace(data, classes=("disc, red", 'a "square"'), split_indices={"train": np.array([0, 7])})
    with pytest.warns(DetkitWarning, match=r"left behind: class order \(2\)$"):
        folder = write_dataset(data, tmp_path / "out", "sku110k")
    with (folder / "annotations/annotations_train.csv").open(newline="") as stream:
        first, last = csv.reader(stream)
    assert first == ["000.jpg", *(str(int(x)) for x in data.boxes[0]), "disc, red", "96", "96"]
    assert last == ["007.png", "", "", "", "", "", "96", "96"]
    assert (folder / "annotations/annotations_unsplit.csv").is_file()
    assert read_dataset(folder).classes == ('a "square"', "disc, red")


@pytest.mark.parametrize("name", ["", " disc", "a\rb"])
def test_names_that_csv_would_change(tmp_path: Path, name: str) -> None:
    data = replace(tiny_dataset(tmp_path / "pictures"), classes=(name, "square"))
    with pytest.raises(InvalidData, match="rename it"):
        write_dataset(data, tmp_path / "out", "sku110k")


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "name,one,two,three,four,five\na,1,2,3,4,5\n", "\xff\n", '"a\n'])
def test_sniffs_no_other_csv(tmp_path: Path, text: str) -> None:
    (tmp_path / "table.csv").write_text(text, encoding="latin-1")
    for path in (tmp_path, tmp_path / "table.csv"):
        with pytest.raises(UsageError, match="none of the known formats"):
            recognise(path)


def test_one_split_of_all_images_stays_one(tmp_path: Path) -> None:
    data = replace(tiny_dataset(tmp_path / "pictures"), split_indices={"train": np.arange(8)})
    back = read_dataset(write_dataset(data, tmp_path / "out", "sku110k"))
    assert {name: list(at) for name, at in back.split_indices.items()} == {"train": list(range(8))}
