"""read_dataset and write_dataset: which format, which split, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest

from detkit import read_dataset, write_dataset
from detkit.data import Dataset, Sample
from detkit.errors import InvalidValue, UnknownName, UsageError
from detkit.testing import tiny_dataset

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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


@contextmanager
def converting(source: Path, out: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run ``detkit convert`` and yield, once it is writing, the process and the folder that it writes to."""
    before = set(out.parent.iterdir())
    command = [sys.executable, "-m", "detkit.cli", "convert", source, out, "--to", "voc", "--images-as", "copy"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (found := [p for p in set(out.parent.iterdir()) - before if any(p.glob("JPEGImages/*"))]):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.001)
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Enough images that writing them takes a while, all the same one."""
    first = tiny_dataset(tmp_path / "pictures")[0]
    box = np.array([[1.0, 1, 5, 5]])
    samples = [
        Sample(path=first.path, width=first.width, height=first.height, boxes=box, names=("a",), image_id=f"{i}.jpg")
        for i in range(3000)
    ]
    (tmp_path / "here").mkdir()
    return write_dataset(Dataset.from_samples(["a"], samples), tmp_path / "large")


@pytest.mark.skipif(sys.platform == "win32", reason="signals and locks of POSIX")
def test_killed_conversion_leaves_no_half_data_set(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "here/out"
    with converting(large, out) as (process, beside):
        process.kill()
        process.wait()
        assert not out.exists()
        assert beside.is_dir(), "nobody could tidy up"
        for age, name in ((0, "young"), (7200, "old")):
            unlocked = beside.with_name(f"{beside.name.rpartition('-')[0]}-{name}.new")
            unlocked.mkdir()
            os.utime(unlocked, (time.time() - age, time.time() - age))
    (tmp_path / "here/.out.mine").mkdir()
    assert write_dataset(read_dataset(large).take(range(5)), out, "voc") == out
    left = sorted(path.name for path in out.parent.iterdir())
    assert left[1:] == [".out.mine", "out"], "the next one tidies up"
    assert left[0].endswith("-young.new"), "its process may be about to lock it"
    assert len(read_dataset(out)) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="paths have 260 characters at most")
@pytest.mark.parametrize("name", ["n" * 250, "ü" * 125])
def test_folders_of_the_longest_names(tiny: Dataset, tmp_path: Path, name: str) -> None:
    assert write_dataset(tiny, tmp_path / name, "coco") == tmp_path / name
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", name[:20]))] == [name]


@pytest.mark.skipif(sys.platform == "win32", reason="signals and locks of POSIX")
def test_nobody_removes_what_another_still_writes(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "here/out"
    with converting(large, out) as (process, beside):
        process.send_signal(signal.SIGSTOP)
        write_dataset(read_dataset(large).take(range(5)), out, "voc")
        assert beside.is_dir()
        process.send_signal(signal.SIGCONT)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 3, "the other was first"
        assert b"error" in told
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert len(read_dataset(out)) == 5
