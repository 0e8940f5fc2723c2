"""DeepDetect: the conformance suite, and what lists and files of boxes get wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit import read_dataset, write_dataset
from detkit.errors import InvalidData, UsageError
from detkit.io import recognise
from detkit.testing import FormatTests, tiny_dataset


class TestConformance(FormatTests):
    format_name = "deepdetect"


def put(root: Path, name: str, *lines: str) -> str:
    """Write one picture of 40 x 30 pixels and its file of boxes; return the line for a list."""
    for folder in ("img", "bbox"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(root / f"img/{name}.jpg")
    (root / f"bbox/{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return f"img/{name}.jpg bbox/{name}.txt"


def two_lists(root: Path, *lines: str) -> Path:
    (root / "train.txt").parent.mkdir(parents=True, exist_ok=True)
    (root / "train.txt").write_text(put(root, "a", *(lines or ("1 2 3 10 12",))))
    (root / "test.txt").write_text(put(root, "b", "2 0 0 40 30") + "\n" + put(root, "none") + "\n")
    (root / "classes.txt").write_text("disc\nsquare\n")
    return root


def faults(path: Path, **options: Any) -> list[tuple[str, str, int | None]]:
    with pytest.raises(InvalidData) as caught:
        read_dataset(path, "deepdetect", **options)
    found = caught.value.findings
    assert all(f.place == f"line {f.line}" for f in found if f.line is not None)
    return [(f.code, Path(f.file).name, f.line) for f in found]


def test_lists_are_splits_and_classes_count_from_one(tmp_path: Path) -> None:
    data = read_dataset(two_lists(tmp_path))
    assert {name: part.image_ids for name, part in data.splits.items()} == {
        "test": ("img/b.jpg", "img/none.jpg"),
        "train": ("img/a.jpg",),
    }
    assert data.boxes.tolist() == [[0, 0, 40, 30], [2, 3, 10, 12]]
    assert [sample.names for sample in data] == [("square",), (), ("disc",)]
    assert data.sizes.tolist() == [[40, 30]] * 3
    one = read_dataset(tmp_path / "train.txt", classes=["ring"])
    assert [sample.names for sample in one] == [("ring",)]
    assert not one.split_indices


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("1 2 3 10", "bad-columns"),
        ("1 2 3 10 12 0.9", "bad-columns"),
        ("1 2 3 ten 12", "bad-number"),
        ("1 2 3 nan 12", "bad-number"),
        ("1.5 2 3 10 12", "bad-class"),
        ("0 2 3 10 12", "background-class"),
        ("3 2 3 10 12", "unknown-class"),
        ("-1 2 3 10 12", "unknown-class"),
    ],
)
def test_boxes_that_are_wrong(tmp_path: Path, line: str, code: str) -> None:
    two_lists(tmp_path, "1 2 3 10 12", "", line)
    assert faults(tmp_path) == [(code, "a.txt", 3)]


def test_lists_that_are_wrong(tmp_path: Path) -> None:
    root = two_lists(tmp_path / "set")
    put(tmp_path, "secret", "1 2 3 10 12")
    lines = [
        "img/a.jpg bbox/a.txt",
        "img/a.jpg",
        "img/gone.jpg bbox/a.txt",
        "img/b.jpg bbox/gone.txt",
        "../img/secret.jpg bbox/a.txt",
        "/etc/hostname /etc/hosts",
        "img/a.jpg bbox/a.txt",
        "img/a.jpg bbox/a.txt bbox/b.txt",
        " ".join("x" * 500),
        f"img/b.jpg {'x' * 999}",
    ]
    (root / "train.txt").write_text("\n".join(lines))
    expected = ["bad-columns", "missing-file", "missing-file", "outside-folder", "outside-folder", "image-twice"]
    expected += ["missing-file", "missing-file", "missing-file"]
    assert faults(root) == [(code, "train.txt", line) for line, code in enumerate(expected, start=2)]


def test_paths_with_blanks(tmp_path: Path) -> None:
    root = two_lists(tmp_path)
    (root / "train.txt").write_text(put(root, "red disc 1", "1 2 3 10 12"))
    assert read_dataset(f"{root}:train").image_ids == ("img/red disc 1.jpg",)
    Image.new("RGB", (40, 30)).save(root / "x", "png")
    for name in ("x y", "y z", "z"):
        (root / name).write_text("1 2 3 10 12\n")
    (root / "train.txt").write_text("x y z")
    assert faults(root) == [("ambiguous-line", "train.txt", 1)]
    (root / "train.txt").write_text("x\ty z")
    assert read_dataset(f"{root}:train").image_ids == ("x",)


@pytest.mark.parametrize("before", ["/opt/platform/data/set/", "C:\\data\\set\\", "./"])
def test_paths_of_another_machine(tmp_path: Path, before: str) -> None:
    root = two_lists(tmp_path)
    (root / "train.txt").write_text(f"{before}img/a.jpg {before}bbox/a.txt\n")
    assert read_dataset(f"{root}:train").paths == (f"{root}/img/a.jpg",)


def test_names_are_never_made_up(tmp_path: Path) -> None:
    (two_lists(tmp_path) / "classes.txt").unlink()
    with pytest.raises(InvalidData, match=r"no names for its classes.*classes\.txt"):
        read_dataset(tmp_path)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    (two_lists(tmp_path) / "classes.txt").write_bytes(b"disc\nsq\xff\n")
    assert faults(tmp_path) == [("not-text", "classes.txt", 2)]


def test_an_image_in_two_lists(tmp_path: Path) -> None:
    root = two_lists(tmp_path)
    (root / "all.txt").write_text("img/a.jpg bbox/a.txt\nimg/b.jpg bbox/b.txt\n")
    data = read_dataset(root)
    assert len(data) == 3
    assert {name: len(at) for name, at in data.split_indices.items()} == {"all": 2, "test": 2, "train": 1}
    (root / "all.txt").write_text("img/a.jpg bbox/b.txt\n")
    assert [code for code, _, _ in faults(root)] == ["image-twice"]


def test_an_image_that_cannot_be_measured(tmp_path: Path) -> None:
    (two_lists(tmp_path) / "img/a.jpg").write_bytes(b"none")
    assert faults(tmp_path) == [("unreadable-image", "a.txt", None)]


def test_what_we_write_is_what_deepdetect_reads(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures")
    folder = write_dataset(data, tmp_path / "one", "deepdetect")
    lines = (folder / "list.txt").read_text().splitlines()
    assert lines[0] == "images/000.jpg bboxes/000.txt"
    assert (folder / "bboxes/007.txt").read_text() == ""
    number, *corners = (folder / "bboxes/000.txt").read_text().split()
    assert number == str(data.labels[0] + 1)
    assert corners == [str(int(value)) for value in data.boxes[0]]
    assert (folder / "classes.txt").read_text() == "disc\nsquare\n"
    folder = write_dataset(replace(data, split_indices={"train": np.array([3])}), tmp_path / "two", "deepdetect")
    assert (folder / "train.txt").read_text() == "images/003.png bboxes/003.txt\n"
    assert len((folder / "unsplit.txt").read_text().splitlines()) == 7


@pytest.mark.parametrize("image_id", ["a.txt", "a b.jpg", "a\u2028b.jpg"])
def test_names_that_cannot_stand_in_a_list(tmp_path: Path, image_id: str) -> None:
    data = replace(tiny_dataset(tmp_path / "pictures").take([0]), image_ids=(image_id,))
    with pytest.raises(InvalidData, match="rename it"):
        write_dataset(data, tmp_path / "out", "deepdetect")


def test_names_that_would_collide(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures")
    with pytest.raises(InvalidData, match=r"'x\.jpg' and 'x\.png' would share"):
        write_dataset(replace(data.take([0, 1]), image_ids=("x.jpg", "x.png")), tmp_path / "out", "deepdetect")
    with pytest.raises(InvalidData, match="cannot be called 'classes'"):
        write_dataset(replace(data, split_indices={"classes": np.array([0])}), tmp_path / "out", "deepdetect")


def test_sniffs_no_other_text(tmp_path: Path) -> None:
    root = two_lists(tmp_path / "set")
    (root / "readme.txt").write_text("two words\n")
    assert recognise(root).name == "deepdetect"
    assert recognise(root / "train.txt").name == "deepdetect"
    for path in (root / "readme.txt", root / "classes.txt", root / "bbox/a.txt", root / "img"):
        with pytest.raises(UsageError, match="none of the known formats"):
            recognise(path)
    (root / "bbox/a.txt").rename(root / "bbox/a.xml")
    (tmp_path / "set/voc.txt").write_text("img/a.jpg bbox/a.xml\n")
    with pytest.raises(UsageError, match="none of the known formats"):
        recognise(root / "voc.txt")


def test_one_split_of_all_images_stays_one(tmp_path: Path) -> None:
    data = replace(tiny_dataset(tmp_path / "pictures"), split_indices={"train": np.arange(8)})
    back = read_dataset(write_dataset(data, tmp_path / "out", "deepdetect"))
    assert {name: list(at) for name, at in back.split_indices.items()} == {"train": list(range(8))}
