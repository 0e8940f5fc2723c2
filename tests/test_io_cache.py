"""What read_dataset keeps: the second reading is equal, and nothing stale ever comes back."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from detkit import files, io, read_dataset, reading_cache, write_dataset
from detkit.errors import DetkitWarning, InvalidData
from detkit.testing import tiny_dataset

if TYPE_CHECKING:
    from collections.abc import Callable

    from detkit.data import Dataset


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that keeps even what was read quickly and changed just now; returns its folder."""
    folder = tmp_path_factory.mktemp("kept")
    monkeypatch.setenv("DETKIT_CACHE", str(folder))
    monkeypatch.setattr(io, "SLOW_S", -1.0)
    monkeypatch.setattr(reading_cache, "_UNSETTLED_S", -60.0)
    return folder / "datasets"


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Every column has something to lose."""
    data = tiny_dataset(tmp_path / "pictures")
    n = len(data.boxes)
    return replace(
        data,
        difficult=np.arange(n) % 3 == 0,
        crowd=np.arange(n) % 4 == 0,
        area=data.area / 2,
        masks=tuple([[0.0, 0.0, 4.0, 0.0, 4.0, float(i)]] if i % 2 else None for i in range(n)),
        extra=tuple({"weather": {"rain": [i, None]}} for i in range(len(data))),
        box_extra=tuple({"pose": f"side {i % 2}"} for i in range(n)),
        class_extra=tuple({"supercategory": f"shape {i}"} for i in range(len(data.classes))),
        file_extra={"": {"info": {"year": 2026}, "licenses": [{"id": 1}]}},
        box_ids=np.arange(n) * 3 + 100,
        split_indices={"train": np.array([0, 1, 5]), "val": np.array([2, 3])},
    )


def written(data: Dataset, folder: Path, format: str) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DetkitWarning)
        return write_dataset(data, folder, format)


def assert_equal(one: Dataset, other: Dataset) -> None:
    for column in fields(one):
        a, b = getattr(one, column.name), getattr(other, column.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b), column.name
        elif column.name == "split_indices":
            assert {k: v.tolist() for k, v in a.items()} == {k: v.tolist() for k, v in b.items()}
        else:
            assert a == b, column.name


def hit(path: Path | str, *arguments: Any, **options: Any) -> bool:
    """Return whether a reading comes from the cache, and check that it is what would be read without one."""
    calls: list[Path] = []

    def recognised(path: Path, format: str | None = None) -> Any:
        calls.append(path)
        return original(path, format)

    original = io.recognise
    io.recognise = recognised
    try:
        found = read_dataset(path, *arguments, **options)
    finally:
        io.recognise = original
    before = os.environ["DETKIT_CACHE"]
    os.environ["DETKIT_CACHE"] = "off"
    try:
        assert_equal(found, read_dataset(path, *arguments, **options))
    finally:
        os.environ["DETKIT_CACHE"] = before
    return not calls


@pytest.mark.parametrize("format", ["voc", "coco"])
@pytest.mark.parametrize("given", [None, "named"])
def test_second_reading_is_equal(data: Dataset, tmp_path: Path, format: str, given: str | None) -> None:
    folder = written(data, tmp_path / "out", format)
    named = format if given else None
    assert [hit(folder, named) for _ in range(3)] == [False, True, True]
    assert_equal(read_dataset(folder, named, split="val"), read_dataset(f"{folder}:val", named))


def test_relative_paths_stay_relative(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        written(data if name == "a" else data.take([0, 1]), tmp_path / name / "out", "voc")
    for name, length in (("a", 8), ("b", 2), ("a", 8)):
        monkeypatch.chdir(tmp_path / name)
        found = read_dataset("out")
        assert len(found) == length
        assert found.paths[0].startswith("out/")
        assert hit("out")


def test_options_and_formats_are_kept_apart(data: Dataset, tmp_path: Path) -> None:
    folder = written(data, tmp_path / "out", "voc")
    assert [hit(folder), hit(folder, origin=0), hit(folder, "voc")] == [False] * 3
    assert [hit(folder), hit(folder, origin=0), hit(folder, "voc")] == [True] * 3
    assert (read_dataset(folder, origin=0).boxes[:, :2] == read_dataset(folder).boxes[:, :2] + 1).all()


def edit(file: Path) -> None:
    file.write_text(file.read_text().replace("<xmin>", "<xmin>0", 1))


def swap(file: Path) -> None:
    status = file.stat()
    other = file.with_suffix(".tmp")
    other.write_text(re.sub(r"<ymax>(\d)", lambda m: f"<ymax>{(int(m[1]) + 1) % 10}", file.read_text(), count=1))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(file)
    assert file.stat().st_size == status.st_size
    assert file.stat().st_mtime_ns == status.st_mtime_ns


def remove(root: Path, stem: str) -> None:
    for file in (root / f"Annotations/{stem}.xml", *root.glob(f"JPEGImages/{stem}.*")):
        file.unlink()
    for file in root.glob("ImageSets/Main/*.txt"):
        file.write_text(file.read_text().replace(f"{stem}\n", ""))


def add(root: Path) -> None:
    text = (root / "Annotations/000.xml").read_text()
    (root / "Annotations/more.xml").write_text(re.sub("<filename>.*</filename>", "", text))
    shutil.copy(next(root.glob("JPEGImages/000.*")), root / "JPEGImages/more.png")


def rename(root: Path) -> None:
    image = next(root.glob("JPEGImages/000.*"))
    image.rename(image.with_suffix(".JPEG"))


CHANGES: dict[str, Callable[[Path], None]] = {
    "an annotation edited": lambda root: edit(root / "Annotations/000.xml"),
    "an annotation replaced by one of the same size and time": lambda root: swap(root / "Annotations/000.xml"),
    "an annotation and its image removed": lambda root: remove(root, "001"),
    "an annotation and its image added": add,
    "an image replaced": lambda root: Image.new("RGB", (9, 9)).save(next(root.glob("JPEGImages/000.*"))),
    "an image renamed": rename,
    "a split changed": lambda root: (root / "ImageSets/Main/val.txt").write_text("003\n"),
    "a split added": lambda root: (root / "ImageSets/Main/test.txt").write_text("004\n") and None,
    "a hidden file added": lambda root: (root / ".note").write_text("x") and None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_read_anew(data: Dataset, tmp_path: Path, change: str) -> None:
    folder = written(data, tmp_path / "out", "voc")
    for file in (folder / "JPEGImages").iterdir():  # not the pictures of the other tests
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)
    assert [hit(folder) for _ in range(2)] == [False, True]
    CHANGES[change](folder)
    assert [hit(folder) for _ in range(2)] == [False, True]


def test_a_link_more_to_an_image_changes_nothing(data: Dataset, tmp_path: Path) -> None:
    folder = written(data, tmp_path / "out", "voc")
    read_dataset(folder)
    for image in (folder / "JPEGImages").iterdir():
        os.link(image, tmp_path / image.name)
    assert hit(folder)


def test_files_of_a_single_coco_file(data: Dataset, tmp_path: Path) -> None:
    folder = written(replace(data, split_indices={}), tmp_path / "set/out", "coco")
    file = folder / "annotations.json"
    assert [hit(file) for _ in range(2)] == [False, True]
    (tmp_path / "set/runs/one").mkdir(parents=True)  # what runs leave behind is none of its business
    assert hit(file)
    content = json.loads(file.read_bytes())
    content["annotations"].pop()
    file.write_text(json.dumps(content))
    assert [hit(file) for _ in range(2)] == [False, True]
    image = next((folder / "images").iterdir())
    content = image.read_bytes()
    image.unlink()
    image.write_bytes(content)
    assert [hit(file) for _ in range(2)] == [False, True]
    image.unlink()
    assert [hit(file) for _ in range(2)] == [False, True]


def test_images_that_appear_where_they_are_looked_for_first(data: Dataset, tmp_path: Path) -> None:
    folder = written(replace(data, split_indices={}), tmp_path / "set", "coco")
    (folder / "annotations").mkdir()
    file = (folder / "annotations.json").rename(folder / "annotations/train.json")
    (folder / "images").rename(folder / "train")
    assert [hit(file) for _ in range(2)] == [False, True]
    shutil.copytree(folder / "train", folder / "images/train")
    assert not hit(file)
    assert "/images/train/" in read_dataset(file).paths[0]


def test_warnings_are_repeated(data: Dataset, tmp_path: Path) -> None:
    folder = written(data, tmp_path / "out", "voc")
    file = folder / "Annotations/000.xml"
    file.write_text(re.sub(r"<xmin>\d+", "<xmin>0", file.read_text(), count=1))
    told = []
    for _ in range(2):
        with pytest.warns(DetkitWarning, match="read as 0-based") as caught:
            read_dataset(folder)
        told.append([(str(warning.message), warning.category) for warning in caught])
    assert told[0] == told[1]
    assert len(told[0]) == 1


def test_data_with_errors_is_not_kept(data: Dataset, tmp_path: Path, cache: Path) -> None:
    folder = written(data, tmp_path / "out", "voc")
    (folder / "Annotations/000.xml").write_text("<annotation>")
    for _ in range(2):
        with pytest.raises(InvalidData, match="malformed"):
            read_dataset(folder)
    assert not cache.exists()


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    elif how == "flipped":
        content[len(content) // 2] ^= 1
    elif how == "foreign":
        content[:] = b"something else"
    else:
        content.clear()
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "flipped", "foreign", "empty"])
def test_a_damaged_file_is_replaced(data: Dataset, tmp_path: Path, cache: Path, how: str) -> None:
    folder = written(data, tmp_path / "out", "voc")
    read_dataset(folder)
    (kept,) = cache.iterdir()
    damage(kept, how)
    assert [hit(folder) for _ in range(2)] == [False, True]
    assert list(cache.iterdir()) == [kept]


@pytest.mark.parametrize("place", ["a file", "nowhere to write"])
def test_a_cache_that_cannot_be_written(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = written(data, tmp_path / "out", "voc")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETKIT_CACHE", {"a file": f"{tmp_path}/file", "nowhere to write": "/proc/detkit"}[place])
    assert [hit(folder) for _ in range(2)] == [False, False]


def test_what_is_small_or_new_is_not_kept(
    data: Dataset, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(data, tmp_path / "out", "voc")
    monkeypatch.setattr(reading_cache, "_UNSETTLED_S", 2.0)
    read_dataset(folder)
    assert not cache.exists()
    monkeypatch.setattr(reading_cache, "_UNSETTLED_S", -60.0)
    monkeypatch.setattr(io, "SLOW_S", 60.0)
    read_dataset(folder)
    assert not cache.exists()


def test_the_least_recently_used_go(
    data: Dataset, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [written(data, tmp_path / f"out{i}", "voc") for i in range(4)]
    first: Path | None = None
    for i, folder in enumerate(folders[:3]):
        read_dataset(folder)
        first = first or next(cache.iterdir())
        newest = max(cache.iterdir(), key=lambda file: file.stat().st_mtime)
        os.utime(newest, (time.time() - 100 + i,) * 2)
    assert first is not None
    assert hit(folders[0])  # used just now
    monkeypatch.setattr(reading_cache, "LIMIT", reading_cache.cache_size() + 1)
    monkeypatch.setattr(reading_cache, "LARGEST", reading_cache.LIMIT)
    read_dataset(folders[3])
    assert len(list(cache.iterdir())) == 3
    assert first.exists()
    assert not hit(folders[1])
    assert reading_cache.cache_size() <= reading_cache.LIMIT


def test_off(data: Dataset, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETKIT_CACHE", "off")
    folder = written(data, tmp_path / "out", "voc")
    assert len(read_dataset(folder)) == len(data)
    assert files.cache_folder() is None
    assert not cache.exists()
    monkeypatch.delenv("DETKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg/detkit"
