"""``detkit convert``, ``split``, ``merge``, ``sample``, ``remap``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from detkit import read_dataset

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    Cli = Callable[..., Any]


def test_convert_there_and_back(cli: Cli, data: Path, tmp_path: Path) -> None:
    done = cli("convert", data, "voc", "--to", "voc", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == "voc: voc, 20 images, 28 boxes"
    done = cli("convert", "voc", "coco", "--to", "coco", "--origin", "1", "--json", cwd=tmp_path)
    assert done.json["folder"] == str(tmp_path / "coco")
    assert done.json["classes"] == read_dataset(data).boxes_per_class()
    before, after = read_dataset(data), read_dataset(tmp_path / "coco")
    assert [(s.image_id, s.names, s.boxes.tolist()) for s in before] == [
        (s.image_id, s.names, s.boxes.tolist()) for s in after
    ]


def test_what_is_left_behind_is_said_once(cli: Cli, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "data/annotations.json"
    assert cli("convert", data, "data", "--to", "coco", "--images-as", "copy", cwd=tmp_path).code == 0
    content = json.loads(file.read_text())
    content["annotations"][0]["iscrowd"] = 1
    content["images"][0]["weather"] = "rain"
    file.write_text(json.dumps(content))
    done = cli("convert", "data", "voc", "--to", "voc", cwd=tmp_path)
    assert done.code == 0
    assert done.err.count("left behind: crowd (1), weather (1)") == 1, done.err


def test_split_merge_sample_remap(cli: Cli, data: Path, tmp_path: Path) -> None:
    done = cli("split", data, "cut", "train=0.5", "hold=0.5", "--seed", "3", "--to", "voc", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "splits   hold 10, train 10" in done.out
    assert sorted(p.name for p in (tmp_path / "cut/ImageSets/Main").iterdir()) == ["hold.txt", "train.txt"]
    done = cli("split", "cut", "again", "a=1", cwd=tmp_path)
    assert done.code == 2
    assert "train (10)" in done.err
    assert "--anew" in done.err
    assert cli("split", "cut", "again", "--anew", "--json", cwd=tmp_path).json["splits"] == {
        "train": 13,
        "val": 3,
        "test": 4,
    }
    assert cli("sample", "cut:train", "few", "--size", "0.4", "--json", cwd=tmp_path).json["images"] == 4
    assert cli("merge", data, "few", "both", cwd=tmp_path).code == 2
    assert cli("merge", data, "few", "both", "--prefix-names", "--json", cwd=tmp_path).json["images"] == 24
    done = cli("remap", "few", "named", "disc=round thing", "--drop", "square", "--json", cwd=tmp_path)
    assert list(done.json["classes"]) == ["round thing"]
    assert "boxes of square are left out" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "DATA", "out", "--to", "coc"], "no format 'coc'; did you mean 'coco'"),
        (["convert", "DATA", "out", "--to", "voc", "--orgin", "0"], "no option of coco or voc 'orgin'"),
        (["convert", "DATA", "--to", "voc"], "expected DATA OUT; found"),
        (["convert", "nowhere", "out", "--to", "voc"], "there is no file or folder nowhere"),
        (["convert", "DATA", "out", "--to", "voc", "--images-as", "move"], "images-as='move'"),
        (
            ["convert", "--train", "DATA", "out", "--to", "voc"],
            "by position: `detkit convert DATA OUT`, not as '--train'",
        ),
        (["merge", "--val", "DATA", "out"], "by position: `detkit merge DATA DATA... OUT`, not as '--val'"),
        (["convert", "DATA", "out", "--to", "voc", "--leash", "1"], "no option of coco or voc 'leash'"),
        (["merge", "DATA", "out"], "expected DATA DATA... OUT"),
        (["split", "DATA", "out", "train=0.5"], "sum to 1, not 0.5"),
        (["split", "DATA", "out", "train=half"], "for example train=0.8"),
        (["split", "DATA", "out", "a=.5", "a=.5"], "a is given twice"),
        (["sample", "DATA", "out", "--size", "21"], "from 1 to 20"),
        (["remap", "DATA", "out"], "nothing to change"),
        (["remap", "DATA", "out", "Disc=disc"], "no class 'Disc'; did you mean 'disc'"),
    ],
)
def test_wrong_use(words: list[str], message: str, cli: Cli, data: Path, tmp_path: Path) -> None:
    done = cli(*(data if word == "DATA" else word for word in words), cwd=tmp_path)
    assert done.code == 2
    assert message in done.err
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_target_is_never_overwritten(cli: Cli, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    done = cli("convert", data, "out", "--to", "voc", cwd=tmp_path)
    assert done.code == 2
    assert "not empty" in done.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
