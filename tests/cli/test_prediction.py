"""``detkit predict``."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


def test_lines_tell_what_is_in_each_image(cli: Any, data: Path, trained: Path) -> None:
    done = cli("predict", "first", data, cwd=trained)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert len(lines) == 20
    one = r"(disc|square) [01]\.\d\d"
    assert all(
        re.search(rf"\.(jpg|png): (0 detections|1 detection: {one}|2 detections: {one}, {one})$", line)
        for line in lines
    )
    assert any("1 detection: " in line for line in lines)


def test_json_lines(cli: Any, data: Path, trained: Path) -> None:
    done = cli("predict", "last", data / "images" / "000.jpg", "--json", "--isolate", cwd=trained)
    (line,) = done.out.splitlines()
    found = json.loads(line)
    assert set(found) == {"path", "width", "height", "detections"}
    assert set(found["detections"][0]) == {"name", "score", "box"}


@pytest.mark.parametrize(("threshold", "count"), [("1", 0), ("0", 1), ("best", 1)])
def test_score_threshold(threshold: str, count: int, cli: Any, data: Path, trained: Path) -> None:
    done = cli("predict", "last", data / "images/000.jpg", "--json", "--score-threshold", threshold, cwd=trained)
    assert len(done.json["detections"]) == count, done.err


def test_pictures_keep_folders_and_names(cli: Any, data: Path, trained: Path, tmp_path: Path) -> None:
    for place in ("a/one.jpg", "b/one.jpg", "b/deep/one.jpg"):
        (tmp_path / "in" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / "images/000.jpg", tmp_path / "in" / place)
    Image.open(data / "images/000.jpg").save(tmp_path / "in/a/one.tif")
    run = trained / "runs/first"
    done = cli("predict", run, "in", "--save", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    saved = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert saved == {"a/one.jpg", "b/one.jpg", "b/deep/one.jpg", "a/one.tif.png"}
    with Image.open(tmp_path / "out/a/one.jpg") as drawn, Image.open(tmp_path / "in/a/one.jpg") as plain:
        assert drawn.size == plain.size
        assert drawn.tobytes() != plain.tobytes()
    globbed = cli("predict", run, "in/*/*.jpg", "--save", "globbed", cwd=tmp_path)
    assert globbed.code == 0, globbed.err
    assert {path.relative_to(tmp_path / "globbed").as_posix() for path in (tmp_path / "globbed").rglob("*.jpg")} == {
        "a/one.jpg",
        "b/one.jpg",
    }


def test_no_image_is_replaced(cli: Any, data: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copy(data / "images/000.jpg", tmp_path / "one.jpg")
    before = (tmp_path / "one.jpg").read_bytes()
    done = cli("predict", trained / "runs/first", ".", "--save", ".", cwd=tmp_path)
    assert done.code == 2
    assert "would replace" in done.err
    assert (tmp_path / "one.jpg").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["last", "nothing.jpg"], 1, "there is no such file"),
        (["last", "*.nothing"], 2, "no image in"),
        (["lost", "a.jpg"], 2, "no run 'lost'"),
        (["last", "a.jpg", "--score-threshold", "often"], 2, "a number from 0 to 1, or `best`"),
    ],
)
def test_errors(words: list[str], code: int, message: str, cli: Any, trained: Path) -> None:
    done = cli("predict", *words, cwd=trained)
    assert done.code == code
    assert message in done.err and "Traceback" not in done.err


def test_a_split_of_a_data_set(cli: Any, trained: Path, tmp_path: Path) -> None:
    from detkit.data import Dataset
    from detkit.io import write_dataset
    from detkit.testing import tiny_dataset

    drawn = tiny_dataset(tmp_path / "drawn", num_images=6)
    split = Dataset.from_samples(drawn.classes, list(drawn), {"train": [0, 1, 2, 3], "val": [4, 5]})
    write_dataset(split, tmp_path / "voc", "voc")
    done = cli("predict", trained / "runs/first", "voc:val", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert [Path(json.loads(line)["path"]).name for line in done.out.splitlines()] == ["004.jpg", "005.png"]


def test_unknown_threshold_is_said_once(cli: Any, data: Path, tmp_path: Path) -> None:
    from detkit import Trainer
    from detkit.io import read_dataset

    images = read_dataset(data)
    Trainer(model="echo/memory", epochs=1).fit(images, test=images, name=str(tmp_path / "blind"), quiet=True)
    done = cli("predict", "blind", data, "--json", cwd=tmp_path)
    assert done.err.count("score threshold 0.25") == 1
