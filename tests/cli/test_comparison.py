"""``detkit compare``."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def two(cli: Any, data: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished runs ``runs/first`` and ``runs/second`` of the same split."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(trained / "runs", folder / "runs")
    done = cli("train", data, "--model", "echo/memory", "--name", "second", "epochs=1", cwd=folder)
    assert done.code == 0, done.err
    return folder


def test_runs_on_what_they_kept_aside(cli: Any, two: Path) -> None:
    done = cli("compare", "first", "second", cwd=two)
    assert done.code == 0, done.err
    assert "COCO protocol" in done.out and "4 images" in done.out
    assert [line.split()[0] for line in done.out.splitlines()[1:3]] == ["first", "second"]


def test_names_files_and_pages(cli: Any, two: Path, tmp_path: Path) -> None:
    words = ("compare", "ours=first", "second", "--save", tmp_path / "page.html", "--save", tmp_path / "table.csv")
    done = cli(*words, "--json", cwd=two)
    assert done.code == 0, done.err
    assert [entry["name"] for entry in done.json["entries"]] == ["ours", "second"]
    assert set(done.json) == {"metric", "protocol", "entries", "differences", "warnings"}
    assert (tmp_path / "table.csv").read_text().startswith("name,AP,")
    assert "ours" in (tmp_path / "page.html").read_text()
    assert "page.html" in done.err


def test_predictions_of_another_tool(cli: Any, data: Path, two: Path, tmp_path: Path) -> None:
    truth = json.loads((data / "annotations.json").read_text())
    results = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 0.9}
        for one in truth["annotations"]
    ]
    (tmp_path / "theirs.json").write_text(json.dumps(results))
    done = cli("compare", "first", tmp_path / "theirs.json", data, "--allow-seen", "--json", cwd=two)
    assert done.code == 0, done.err
    first, theirs = done.json["entries"]
    assert theirs["AP"] == pytest.approx(1) and theirs["seen_in"] == ""
    assert first["seen_in"] == "training"
    alone = cli("evaluate", tmp_path / "theirs.json", data, cwd=two)
    assert alone.code == 0 and "1.000" in alone.out, alone.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "no run 'nowhere'; known: first, second"),
        (["a=first", "a=second"], "two entries have the same name"),
        (["first", "--class-map", "x"], "scratch=scratches"),
        (["first", "--metric", "AP95"], "AP or AP50 or AP75"),
        (["first", "second", "--format", "coco"], "name the data set, too"),
        (["first", "second", "--save", "page.pdf"], "ends in .html"),
    ],
)
def test_wrong_use(words: list[str], message: str, cli: Any, two: Path) -> None:
    done = cli("compare", *words, cwd=two)
    assert done.code == 2, done.out + done.err
    assert message in done.err


def test_words_that_could_be_two_things(cli: Any, data: Path, two: Path, tmp_path: Path) -> None:
    """A run called like a parameter is a run; a folder that a run is named after has to be told from it."""
    here = shutil.copytree(two, tmp_path / "here")
    shutil.copytree(here / "runs/first", here / "runs/lr=0.1")
    assert cli("compare", "lr=0.1", "second", cwd=here).code == 0
    done = cli("compare", "first", "secnd", cwd=here)
    assert done.code == 2 and "did you mean 'second'" in done.err
    shutil.copytree(data, here / "first")
    done = cli("compare", "second", "first", cwd=here)
    assert done.code == 2 and "write ./first for the data, runs/first for the run" in done.err
    assert cli("compare", "second", "runs/first", cwd=here).code == 0


def test_predictions_with_images_and_categories_are_no_data_set(
    cli: Any, data: Path, two: Path, tmp_path: Path
) -> None:
    beside = shutil.copytree(data, tmp_path / "data")
    truth = json.loads((beside / "annotations.json").read_text())
    for one in truth["annotations"]:
        one["score"] = 0.9
    (beside / "full.json").write_text(json.dumps(truth))
    done = cli("compare", "first", beside / "full.json", cwd=two)
    assert done.code == 1 and "full.json" in done.err  # it has predictions on images that were not kept aside
