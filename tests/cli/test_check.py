"""``detkit check``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from detkit.io import write_dataset
from detkit.testing import tiny_dataset

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A COCO folder with one box outside its image and a picture cut off."""
    coco = write_dataset(tiny_dataset(tmp_path / "drawn", num_images=40), tmp_path / "data", images="copy")
    content = json.loads((coco / "annotations.json").read_text())
    content["annotations"][3]["bbox"] = [-50, 0, 9, 9]
    (coco / "annotations.json").write_text(json.dumps(content))
    picture = coco / "images/004.jpg"
    picture.write_bytes(picture.read_bytes()[:-600])
    return coco


def test_sound_data(cli: Any, data: Path, tmp_path: Path) -> None:
    done = cli("check", data, cwd=tmp_path, DETKIT_CACHE="cache")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "0 errors, 0 warnings, 0 notes"


def test_findings(cli: Any, broken: Path, tmp_path: Path) -> None:
    done = cli("check", "data", "--html", "page.html", cwd=tmp_path, DETKIT_CACHE="cache")
    assert done.code == 1
    assert "error: truncated-image (1)" in done.out
    assert "data/annotations.json:1:" in done.out
    assert "annotations[3], id 4 (" in done.out
    assert done.out.splitlines()[-1] == "2 errors, 0 warnings, 0 notes"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    again = cli("check", "data", "--html", "page.html", cwd=tmp_path, DETKIT_CACHE="cache")
    assert again.code == 2
    assert "exists already" in again.err


def test_for_programs(cli: Any, broken: Path, tmp_path: Path) -> None:
    found = cli("check", "data", "--json", cwd=tmp_path, DETKIT_CACHE="cache").json
    assert set(found) == {"images", "boxes", "classes", "splits", "counts", "findings"}
    assert found["counts"] == {"outside": 1, "truncated-image": 1}
    assert set(found["findings"][0]) == {
        *("code", "severity", "message", "file", "line", "column", "place", "record", "image", "image_file")
    }
    assert cli("check", "data", "--format", "json", cwd=tmp_path, DETKIT_CACHE="cache").json == found
    sarif = cli("check", "data", "--format", "sarif", cwd=tmp_path, DETKIT_CACHE="cache").json
    assert len(sarif["runs"][0]["results"]) == 2
    github = cli("check", "data", "--format", "github", "--look", "none", cwd=tmp_path, DETKIT_CACHE="cache")
    assert github.out.startswith("::error file=data/annotations.json,line=1,col=")
    assert len(github.out.splitlines()) == 1


def test_strict(cli: Any, tmp_path: Path) -> None:
    write_dataset(tiny_dataset(tmp_path / "drawn", num_images=8), tmp_path / "data")
    assert cli("check", "data", cwd=tmp_path, DETKIT_CACHE="cache").code == 0
    done = cli("check", "data", "--strict", cwd=tmp_path, DETKIT_CACHE="cache")
    assert done.code == 1
    assert "warning: rare-class (2)" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected one data set, found 0"),
        (["data", "more"], "expected one data set, found 2"),
        (["data", "--format", "xml"], "one of text, json, github, sarif"),
        (["data", "--look", "some"], "one of pixels, headers, none"),
        (["data", "--orgin", "0"], "no option of format coco 'orgin'"),
        (["--train", "data"], "data is given by position: `detkit check DATA`, not as '--train'"),
        (["nowhere"], "there is no file or folder nowhere"),
    ],
)
def test_wrong_use(words: list[str], message: str, cli: Any, broken: Path, tmp_path: Path) -> None:
    done = cli("check", *words, cwd=tmp_path, DETKIT_CACHE="cache")
    assert done.code == 2
    assert message in done.err
