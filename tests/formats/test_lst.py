"""MXNet's .lst: numbers and places of what is wrong, and what im2rec and the readers of MXNet need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import detkit
from detkit import read_dataset, write_dataset
from detkit.errors import DetkitWarning, InvalidData, UsageError
from detkit.testing import FormatTests, tiny_dataset


class TestLst(FormatTests):
    format_name = "lst"
    carries_empty_images = False


@pytest.fixture
def data(tmp_path: Path) -> detkit.Dataset:
    """Seven small pictures with objects and one without."""
    return tiny_dataset(tmp_path / "pictures")


@pytest.fixture
def folder(data: detkit.Dataset, tmp_path: Path) -> Path:
    """The seven with objects as a list."""
    return write_dataset(data.take(range(7)), tmp_path / "out", "lst")


def change(folder: Path, line: int, old: str, new: str) -> None:
    """Replace a text that is once in a line, counted from 1."""
    lines = (folder / "train.lst").read_text().splitlines()
    assert lines[line - 1].count(old) == 1, lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new)
    (folder / "train.lst").write_text("\n".join(lines) + "\n")


def set_lines(folder: Path, *lines: str) -> None:
    (folder / "train.lst").write_text("".join(f"{line}\n" for line in lines))


def codes(error: pytest.ExceptionInfo[InvalidData]) -> list[tuple[str, int | None]]:
    return [(finding.code, finding.line) for finding in error.value.findings]


def test_a_line_as_im2rec_wants_it(data: detkit.Dataset, folder: Path) -> None:
    first, second, third, *_ = (folder / "train.lst").read_text().splitlines()
    assert first.split("\t")[:3] == ["0", "2", "5"]
    assert first.split("\t")[-1] == "000.jpg"
    assert [float(value) * 96 for value in first.split("\t")[4:8]] == data[0].boxes[0].tolist()
    assert second.startswith("1\t2\t5\t1\t")
    assert len(third.split("\t")) == 3 + 2 * 5 + 1
    assert (folder / "classes.txt").read_text() == "disc\nsquare\n"
    assert sorted(path.name for path in (folder / "images").iterdir()) == list(data.image_ids[:7])


def test_fractions_of_pixels_come_back(data: detkit.Dataset, tmp_path: Path) -> None:
    """All of them, also those that lie next to a whole pixel."""
    some = data.take(range(7))
    fractions = np.array([0, 1e-7, 1 / 3, 0.125, 1e-9, 0.1, 0.7, 0.001, 0.25, 0.4])
    shifted = replace(some, boxes=some.boxes + fractions[:, None])
    back = read_dataset(write_dataset(shifted, tmp_path / "out", "lst"))
    np.testing.assert_allclose(back.boxes, shifted.boxes, rtol=0, atol=1e-12)


def test_six_decimals_are_whole_pixels(data: detkit.Dataset, folder: Path) -> None:
    """Tools write %f; what comes back is the pixel that it was."""
    rounded = []
    for line in (folder / "train.lst").read_text().splitlines():
        index, *label, name = line.split("\t")
        rounded.append("\t".join([index, *(f"{float(value):f}" for value in label), name]))
    set_lines(folder, *rounded)
    assert np.array_equal(read_dataset(folder).boxes, data.boxes)


def test_headers_and_objects_of_any_width(folder: Path) -> None:
    set_lines(
        folder,
        "7\t4\t5\t96\t96\t0\t0.25\t0.25\t0.5\t0.5\t000.jpg",
        "9\t2\t7\t1.0\t0.25\t0.25\t0.5\t0.5\t3\t0.5\t001.png",
        "3\t2\t5\t-1\t-1\t-1\t-1\t-1\t0\t0\t0\t1\t1\t-1\t-1\t-1\t-1\t-1\t002.jpg",
        "4\t2\t5\t-1\t0\t0\t0\t0\t003.png",
        "5\t2\t5\t004.jpg",
    )
    data = read_dataset(folder)
    assert [sample.names for sample in data] == [("disc",), ("square",), ("disc",), (), ()]
    assert data[0].boxes.tolist() == [[24, 24, 48, 48]]
    assert data.box_extra == ({}, {"extra_1": 3, "extra_2": 0.5}, {})
    assert not data.difficult.any()


def test_difficult_is_the_sixth_number(data: detkit.Dataset, tmp_path: Path) -> None:
    flags = np.arange(len(data.boxes)) % 2 == 0
    marked = replace(data, difficult=flags).take(range(7))
    folder = write_dataset(marked, tmp_path / "out", "lst", difficult=True)
    back = read_dataset(folder)
    assert np.array_equal(back.difficult, flags)
    assert back.box_extra is None
    assert (folder / "train.lst").read_text().startswith("0\t2\t6\t")
    with pytest.warns(DetkitWarning, match=r"left behind: difficult \(5\)"):
        plain = write_dataset(marked, tmp_path / "plain", "lst")
    assert not read_dataset(plain).difficult.any()


def test_every_line_at_fault_is_told(folder: Path) -> None:
    box = "0\t0.25\t0.25\t0.5\t0.5"
    set_lines(
        folder,
        f"0\t2\t5\t{box}\t000.jpg",
        f"0\t2\t5\t{box}\t001.png",
        f"-2\t2\t5\t{box}\t001.png",
        f"1.5\t2\t5\t{box}\t001.png",
        "",
        f"4\t1\t5\t{box}\t003.png",
        f"5\t2\t4\t{box}\t002.jpg",
        f"6\t2\t5\t{box}\t1\tsub/006.jpg",
        "7\t2\t5\t0.5\t0.25\t0.25\t0.5\t0.5\t004.jpg",
        "8\t2\t5\t-3\t0.25\t0.25\t0.5\t0.5\t005.png",
        "9\t2\t5\t-1\t0.25\t0.25\t0.5\t0.5\t006.jpg",
        "10\t3.000000\t006.jpg",
        "11 2 5 0 0.25 0.25 0.5 0.5 006.jpg",
        f"12\t2\t5\t{box}\t",
        f"13\t2\t5\t{box}\t../000.jpg",
        f"14\t2\t5\t{box}\t./000.jpg",
        "15\t2\t5\t0\tnan\t0.25\t0.5\t0.5\tsub/007.jpg",
        "16\t2\t5\t9\t0.25\t0.25\t0.5\t0.5\tsub/008.jpg",
    )
    with pytest.raises(InvalidData) as caught:
        read_dataset(folder)
    assert sorted(codes(caught), key=lambda found: (found[1], found[0])) == [
        ("duplicate-index", 2),
        ("bad-index", 3),
        ("image-twice", 3),
        ("not-a-number", 4),
        ("bad-header", 6),
        ("bad-header", 7),
        ("bad-width", 8),
        ("missing-image", 8),
        ("bad-class", 9),
        ("bad-class", 10),
        ("bad-class", 11),
        ("bad-line", 12),
        ("bad-line", 13),
        ("no-path", 14),
        ("outside-folder", 15),
        ("image-twice", 16),
        ("missing-image", 17),
        ("non-finite", 17),
        ("missing-image", 18),
        ("unknown-class", 18),
    ]
    messages = [str(finding) for finding in caught.value.findings]
    assert any(text.startswith(f"{folder}/train.lst: line 10, object 1: the class is -3") for text in messages)
    assert any("line 18 (sub/008.jpg): class 9 has no name" in text for text in messages)


@pytest.mark.parametrize(("scale", "units"), [(100, "percentages"), (96, "percentages"), (640, "pixels")])
def test_coordinates_in_other_units(folder: Path, scale: int, units: str) -> None:
    box = "\t".join(str(share * scale) for share in (0.25, 0.25, 0.5, 0.75))
    set_lines(folder, f"0\t2\t5\t1\t{box}\t000.jpg", f"1\t2\t5\t0\t{box}\t001.png")
    told = f"line 2, object 1: a corner lies at {0.75 * scale:g}.*these look like {units}"
    with pytest.raises(InvalidData, match=told) as caught:
        read_dataset(folder)
    assert codes(caught) == [("not-normalised", 1), ("not-normalised", 2)]


def test_a_box_beyond_the_image_is_checks_affair(folder: Path) -> None:
    set_lines(folder, "0\t2\t5\t1\t0.25\t0.25\t1.5\t0.5\t000.jpg")
    (found,) = [finding for finding in detkit.check(read_dataset(folder)) if finding.severity == "error"]
    assert (found.code, found.place) == ("outside", "line 1, object 1 (square)")


def test_names_are_never_invented(folder: Path) -> None:
    (folder / "classes.txt").unlink()
    with pytest.raises(InvalidData, match=r"train\.lst has numbers and no names for its classes \(ids 0 to 1 occur\)"):
        read_dataset(folder)
    assert read_dataset(folder, classes=["a", "b", "c"]).classes == ("a", "b", "c")


def test_one_file_and_images_elsewhere(data: detkit.Dataset, folder: Path) -> None:
    (folder / "images").rename(folder / "somewhere")
    with pytest.raises(InvalidData, match="missing-image 7"):
        read_dataset(folder / "train.lst")
    back = read_dataset(folder / "train.lst", images="somewhere")
    assert back.image_ids == data.image_ids[:7]
    with pytest.raises(InvalidData, match="there is no folder"):
        read_dataset(folder, images="nowhere")


def test_paths_with_spaces_are_read_and_not_written(data: detkit.Dataset, folder: Path, tmp_path: Path) -> None:
    (folder / "images/000.jpg").rename(folder / "images/a b.jpg")
    change(folder, 1, "000.jpg", "a b.jpg")
    back = read_dataset(folder)
    assert back.image_ids[0] == "a b.jpg"
    with pytest.raises(InvalidData, match=r"'a b.jpg': the name has white space in it, where MXNet's C\+\+ reader"):
        write_dataset(back, tmp_path / "again", "lst")
    assert not (tmp_path / "again").exists()


def test_images_without_objects(data: detkit.Dataset, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"(?s)007.png: there is no object on it.*negatives=drop"):
        write_dataset(data, tmp_path / "out", "lst")
    with pytest.warns(DetkitWarning, match="left out 1 of 8 images") as caught:
        folder = write_dataset(data, tmp_path / "dropped", "lst", negatives="drop")
    assert caught[0].filename == __file__
    assert read_dataset(folder).image_ids == data.image_ids[:7]
    assert not (folder / "images/007.png").exists()
    folder = write_dataset(data, tmp_path / "dummy", "lst", negatives="dummy")
    assert (folder / "train.lst").read_text().endswith("7\t2\t5\t-1\t0\t0\t0\t0\t007.png\n")
    assert read_dataset(folder).digest() == data.digest()


def test_dropped_images_leave_their_splits(data: detkit.Dataset, tmp_path: Path) -> None:
    split = replace(data, split_indices={"train": np.array([0, 7, 2]), "val": np.array([1, 3, 4, 5, 6])})
    with pytest.warns(DetkitWarning, match="left out 1 of 8"):
        back = read_dataset(write_dataset(split, tmp_path / "out", "lst", negatives="drop"))
    assert back.splits["train"].image_ids == ("000.jpg", "002.jpg")
    assert len(back.splits["val"]) == 5


def test_splits_in_folders_of_their_own(data: detkit.Dataset, tmp_path: Path) -> None:
    """One name in two folders is two images."""
    for split in ("train", "val"):
        some = write_dataset(data.take([0]), tmp_path / split, "lst")
        target = tmp_path / "set" / split
        target.mkdir(parents=True)
        (some / "images/000.jpg").rename(target / "000.jpg")
        (some / "train.lst").rename(tmp_path / "set" / f"{split}.lst")
    back = read_dataset(tmp_path / "set", classes="disc,square")
    assert back.image_ids == ("train/000.jpg", "val/000.jpg")
    assert list(back.splits) == ["train", "val"]


def test_byte_order_mark_and_carriage_returns(data: detkit.Dataset, folder: Path) -> None:
    text = (folder / "train.lst").read_text()
    (folder / "train.lst").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_dataset(folder).digest() == data.take(range(7)).digest()


@pytest.mark.parametrize("text", ["", "000.jpg 000.txt\n", "hello\n", "1\t2\n"])
def test_other_lists_are_not_recognised(tmp_path: Path, text: str) -> None:
    (tmp_path / "train.lst").write_text(text)
    with pytest.raises(UsageError, match="none of the known formats"):
        read_dataset(tmp_path)
