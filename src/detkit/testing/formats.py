"""What every data set format must do; authors of formats subclass `FormatTests`."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from detkit import plugins
from detkit.data import Dataset, Sample
from detkit.errors import DetkitWarning, InvalidData, StorageError, UnknownName, Unsupported, UsageError
from detkit.io import read_dataset, write_dataset
from detkit.testing.data import tiny_dataset

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detkit.formats import Format


_opened: list[list[Path]] = []
"""Where `_watching` collects; an audit hook cannot be removed, so there is one that looks here."""


@functools.cache
def _install_hook() -> None:
    def note(event: str, arguments: tuple[object, ...]) -> None:
        if _opened and event == "open" and isinstance(arguments[0], (str, bytes)):
            _opened[-1].append(Path(os.path.realpath(os.fsdecode(arguments[0]))))

    sys.addaudithook(note)


@contextlib.contextmanager
def _watching() -> Iterator[list[Path]]:
    """Collect every file that Python opens within the block."""
    _install_hook()
    _opened.append([])
    try:
        yield _opened[-1]
    finally:
        _opened.pop()


class FormatTests:
    """The conformance suite of a format::

        class TestMine(FormatTests):
            format_name = "mine"

    A format that cannot be written overrides `write`.
    """

    format_name: str
    carries_empty_images = True
    """Whether an image without boxes can be written."""

    @property
    def format(self) -> Format:
        """The format, as its plugin offers it."""
        assert self.format_name in plugins.formats(), f"no plugin offers the format {self.format_name!r}"
        return plugins.formats()[self.format_name]

    def write(self, data: Dataset, folder: Path) -> Path:
        """Put a data set on disk in this format."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DetkitWarning)
            return Path(write_dataset(data, folder, self.format_name))

    @pytest.fixture
    def data(self, tmp_path: Path) -> Dataset:
        """Eight small pictures, the last without a box where the format can say so."""
        data = tiny_dataset(tmp_path / "pictures")
        return data if self.carries_empty_images else data.take(range(len(data) - 1))

    def assert_same(self, data: Dataset, back: Dataset) -> None:
        """Compare image by image, and column by column those that the format says it carries."""
        if "image_ids" in self.format.carries:
            assert back.image_ids == data.image_ids
        assert len(back) == len(data)
        assert np.array_equal(back.sizes, data.sizes)
        for before, after in zip(data, back, strict=True):
            assert after.names == before.names
            assert after.boxes.dtype == np.float64
            assert np.array_equal(after.boxes, before.boxes), f"boxes of {before.image_id} changed"
        for name in self.format.carries & {"difficult", "crowd", "area"}:
            assert np.array_equal(getattr(back, name), getattr(data, name)), f"{name} changed"
        for name in self.format.carries & {"classes", "masks", "box_extra", "class_extra"}:
            assert getattr(back, name) == getattr(data, name), f"{name} changed"
        if "extra" in self.format.carries:
            new = set() if any("id" in extra for extra in data.extra or ()) else {"id"}  # a format may give some
            kept = [{k: v for k, v in extra.items() if k not in new} for extra in back.extra or [{}] * len(back)]
            assert kept == list(data.extra or [{}] * len(data)), "extra changed"
        if "file_extra" in self.format.carries:  # by the name of another file now
            assert [*back.file_extra.values()] == [*data.file_extra.values()]
        if "box_ids" in self.format.carries:
            ids = [None if one.box_ids is None else one.box_ids.tolist() for one in (data, back)]
            assert ids[0] == ids[1]

    def test_round_trip(self, data: Dataset, tmp_path: Path) -> None:
        back = read_dataset(self.write(data, tmp_path / "out"))
        self.assert_same(data, back)
        assert not self.carries_empty_images or len(back[len(back) - 1].boxes) == 0
        for before, after in zip(data, back, strict=True):
            assert np.array_equal(before.image(), after.image())

    def test_carries_what_it_says(self, data: Dataset, tmp_path: Path) -> None:
        n = len(data.boxes)
        full = replace(
            data,
            classes=(*data.classes, "unused") if "classes" in self.format.carries else data.classes,
            difficult=np.arange(n) % 3 == 0,
            crowd=np.arange(n) % 4 == 0,
            area=data.area / 2,
            masks=tuple([[0.0, 0.0, 4.0, 0.0, 4.0, float(i)]] if i % 2 else None for i in range(n)),
            extra=tuple({"weather": f"rain {i}"} for i in range(len(data))),
            box_extra=tuple({"pose": f"side {i}"} for i in range(n)),
            file_extra={data.sources[0]: {"about": "rain"}},
            box_ids=np.arange(n) * 7 + 3,
        )
        full = replace(full, class_extra=tuple({"colour": f"hue {i}"} for i in range(len(full.classes))))
        if self.format.write is None:
            self.assert_same(full, read_dataset(self.write(full, tmp_path / "out"), self.format_name))
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.assert_same(full, read_dataset(write_dataset(full, tmp_path / "out", self.format_name)))
        told = [str(warning.message) for warning in caught if isinstance(warning.message, DetkitWarning)]
        lost = self.format.not_carried(full, self.format.write_options())
        assert ("left behind" in " ".join(told)) == bool(lost)
        assert all(any(f"{name} ({count})" in line for line in told) for name, count in lost.items()), (told, lost)

    def test_image_without_objects_is_never_lost_in_silence(self, data: Dataset, tmp_path: Path) -> None:
        if self.carries_empty_images or self.format.write is None:
            pytest.skip("such images are carried, or nothing is written")
        empty = data.take([0]).keep_boxes(np.zeros(len(data[0].names), dtype=bool))
        with pytest.raises(InvalidData, match=re.escape(empty.image_ids[0])):
            write_dataset(empty, tmp_path / "out", self.format_name)
        assert not (tmp_path / "out").exists()

    def test_splits(self, data: Dataset, tmp_path: Path) -> None:
        if "split_indices" not in self.format.carries:
            pytest.skip("the format carries no splits")
        splits = {"train": np.array([0, 1, 5]), "val": np.array([2, 3]), "both": np.array([0, 1, 2, 3, 5])}
        if "image_ids" not in self.format.carries:
            del splits["both"]  # an image without a name is not known again in another file
        for chosen in (splits, {"train": splits["train"]}):
            folder = self.write(replace(data, split_indices=chosen), tmp_path / f"out-{len(chosen)}")
            back = read_dataset(folder)
            assert len(back) == len(data), "images of no split must stay"
            if "image_ids" in self.format.carries:
                assert sorted(back.image_ids) == sorted(data.image_ids)
            assert set(back.split_indices) == set(chosen)
            for name, indices in chosen.items():
                self.assert_same(data.take(indices), back.splits[name])
                self.assert_same(data.take(indices), read_dataset(f"{folder}:{name}"))

    def test_boxes_at_the_border(self, data: Dataset, tmp_path: Path) -> None:
        first = data[0]
        border = np.array([[0.0, 0, first.width, first.height], [0, 0, 2, 3]])
        edge = Dataset.from_samples(
            data.classes,
            [replace(first, boxes=border, names=data.classes[:2], area=None, difficult=None, crowd=None, records=None)],
        )
        self.assert_same(edge, read_dataset(self.write(edge, tmp_path / "out")))

    def test_sniffs_only_its_own(self, data: Dataset, tmp_path: Path) -> None:
        assert self.format.sniff(self.write(data, tmp_path / "out"))
        assert not self.format.sniff(tmp_path / "pictures")
        (tmp_path / "empty").mkdir()
        assert not self.format.sniff(tmp_path / "empty")

    def test_unknown_option(self, data: Dataset, tmp_path: Path) -> None:
        with pytest.raises(UnknownName, match="no_such_option"):
            read_dataset(self.write(data, tmp_path / "out"), self.format_name, no_such_option=1)

    def test_unknown_split(self, data: Dataset, tmp_path: Path) -> None:
        with pytest.raises(UnknownName, match="no split 'nowhere'"):
            read_dataset(self.write(data, tmp_path / "out"), split="nowhere")

    def test_write_keeps_what_is_there(self, data: Dataset, tmp_path: Path) -> None:
        if self.format.write is None:
            with pytest.raises(Unsupported):
                write_dataset(data, tmp_path / "out", self.format_name)
            return
        (tmp_path / "out").mkdir()
        (tmp_path / "out/mine.txt").write_text("precious")
        with pytest.raises(UsageError, match="not empty"):
            write_dataset(data, tmp_path / "out", self.format_name)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]

    def test_write_all_or_nothing(self, data: Dataset, tmp_path: Path) -> None:
        if self.format.write is None:
            pytest.skip("the format cannot be written")
        Path(data.paths[-1]).unlink()
        with pytest.raises((InvalidData, StorageError), match=data.image_ids[-1]):
            write_dataset(data, tmp_path / "out", self.format_name)
        assert [path.name for path in tmp_path.iterdir()] == ["pictures"]

    def test_write_stays_in_the_folder(self, data: Dataset, tmp_path: Path) -> None:
        if self.format.write is None:
            pytest.skip("the format cannot be written")
        sample: Sample = replace(data[0], image_id="../../escaped.jpg")
        with pytest.raises(InvalidData, match="escaped"):
            write_dataset(Dataset.from_samples(data.classes, [sample]), tmp_path / "a/b/out", self.format_name)
        assert not list(tmp_path.rglob("escaped*"))

    def test_reads_only_its_folder(self, data: Dataset, tmp_path: Path) -> None:
        folder = self.write(data, tmp_path / "out")
        with _watching() as opened:
            read_dataset(folder)
        outside = [path for path in opened if path.is_relative_to(tmp_path) and not path.is_relative_to(folder)]
        assert not outside, f"files beside the data set were opened: {outside}"
        assert any(path.is_relative_to(folder) for path in opened)

    def test_folder_can_move(self, data: Dataset, tmp_path: Path) -> None:
        moved = self.write(data, tmp_path / "out").rename(tmp_path / "moved")
        self.assert_same(data, read_dataset(moved))
        assert all(Path(path).is_relative_to(moved) for path in read_dataset(moved).paths)
