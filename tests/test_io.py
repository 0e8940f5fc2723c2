"""read_dataset and write_dataset: which format, which split, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from detkit import read_dataset, write_dataset
from detkit.errors import InvalidValue, UnknownName, UsageError
from detkit.testing import tiny_dataset

if TYPE_CHECKING:
    from pathlib import Path

    from detkit.data import Dataset


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return tiny_dataset(tmp_path / "pictures")


def test_formats_convert_into_each_other(data: Dataset, tmp_path: Path) -> None:
    current = data
    for i, name in enumerate(("voc", "coco", "voc")):
        current = read_dataset(write_dataset(current, tmp_path / f"{i}", name))
    assert current.digest() == data.digest()


def test_colon_in_a_name_is_no_split(data: Dataset, tmp_path: Path) -> None:
    folder = write_dataset(data, tmp_path / "a:b")
    assert len(read_dataset(folder)) == len(data)


def test_two_splits_named(data: Dataset, tmp_path: Path) -> None:
    folder = write_dataset(data, tmp_path / "out")
    with pytest.raises(UsageError, match="'train', the call 'val'"):
        read_dataset(f"{folder}:train", split="val")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file or folder"):
        read_dataset(tmp_path / "nowhere")


def test_nothing_known(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)none of the known formats.*voc: .*coco: "):
        read_dataset(tmp_path / "pictures")


def test_two_formats_at_once(data: Dataset, tmp_path: Path) -> None:
    folder = write_dataset(data, tmp_path / "out", "voc")
    (folder / "annotations.json").write_text('{"images": [], "categories": []}')
    with pytest.raises(UsageError, match="several formats: voc, coco"):
        read_dataset(folder)
    assert len(read_dataset(folder, "voc")) == len(data)


def test_unknown_format(tmp_path: Path, data: Dataset) -> None:
    with pytest.raises(UnknownName, match="did you mean 'coco'"):
        read_dataset(tmp_path, "cocoo")
    with pytest.raises(UnknownName, match="did you mean 'voc'"):
        write_dataset(data, tmp_path / "out", "vocs")


def test_options_are_text_on_the_command_line(data: Dataset, tmp_path: Path) -> None:
    folder = write_dataset(data, tmp_path / "out", "voc")
    shifted = read_dataset(folder, origin="0", classes="square,disc")
    assert shifted.classes == ("square", "disc")
    assert (shifted.boxes[:, :2] == data.boxes[:, :2] + 1).all()
    with pytest.raises(InvalidValue, match="origin"):
        read_dataset(folder, origin=2)


def test_write_into_an_empty_folder(data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert write_dataset(data, tmp_path / "out") == tmp_path / "out"
    assert (tmp_path / "out/annotations.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]


def test_write_over_a_file(data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(UsageError, match="nothing is overwritten"):
        write_dataset(data, tmp_path / "out")
