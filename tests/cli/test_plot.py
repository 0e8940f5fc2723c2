"""``detkit plot``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")


@pytest.fixture
def two(trained: Path, tmp_path: Path) -> Path:
    """A folder with the runs ``first`` and ``second``."""
    for name in ("first", "second"):
        shutil.copytree(trained / "runs/first", tmp_path / "runs" / name)
    return tmp_path


def test_where_it_goes(cli: Any, two: Path) -> None:
    done = cli("plot", "first", cwd=two)
    assert (done.code, done.out) == (0, "runs/first/output/curves.html\n"), done.err
    assert (two / "runs/first/output/curves.html").read_text().startswith("<!doctype html>")
    assert cli("plot", "first", "second", cwd=two).out == "curves.html\n"
    assert cli("plot", "last", "-o", "some where/x.png", cwd=two).out == "'some where/x.png'\n"
    assert (two / "some where/x.png").read_bytes().startswith(b"\x89PNG")


def test_json(cli: Any, two: Path) -> None:
    done = cli("plot", "first", "second", "--metric", "AP", "--steps", "-o", "x.svg", "--json", cwd=two)
    assert done.code == 0, done.err
    assert (done.json["file"], done.json["position"]) == ("x.svg", "step")
    first, second = done.json["runs"]
    assert set(first) == {"name", "path", "status", "best", "series"}
    assert (first["name"], second["name"], first["status"]) == ("first", "second", "finished")
    assert first["series"] == ["val/AP"]
    assert set(first["best"]) == {"step", "val/AP"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["firts"], "did you mean 'first'"),
        (["first", "-o", "x.gif"], "ends in .html"),
        (["first", "--metric", "mAP"], "no metric 'mAP'"),
    ],
)
def test_wrong_use(words: list[str], message: str, cli: Any, two: Path) -> None:
    done = cli("plot", *words, cwd=two)
    assert done.code == 2
    assert message in done.err
    assert not list(two.glob("*.*"))


@pytest.fixture(scope="module")
def tuned(cli: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study ``runs/found``. Tests only read it."""
    pytest.importorskip("optuna")
    folder = tmp_path_factory.mktemp("tuned")
    words = ("tune", data, "--model", "echo/memory", "learning_rate=0.1..0.5", "--trials", "3", "--name", "found")
    done = cli(*words, "epochs=2", cwd=folder)
    assert done.code == 0, done.err
    return folder


def test_a_study(cli: Any, tuned: Path) -> None:
    done = cli("plot", "found", cwd=tuned)
    assert (done.code, done.out) == (0, "runs/found/output/study.html\n"), done.err
    assert done.err == "importance is not drawn: learning_rate is all that is searched\n"
    assert "<svg" in (tuned / "runs/found/output/study.html").read_text()
    done = cli("plot", "runs/found", "-o", "x.png", "--json", cwd=tuned)
    assert (done.json["file"], done.json["study"]) == ("x.png", "runs/found")
    assert (done.json["drawn"], list(done.json["missing"])) == (
        ["History", "Parallel coordinates", "Courses"],
        ["Importance"],
    )
    assert done.json["best"]["number"] in range(3)
    assert cli("plot", "runs/found/trials/0000", "-o", "y.svg", cwd=tuned).out == "y.svg\n", "a trial is a run"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["found", "found/trials/0000"], "a study is drawn alone"),
        (["found", "--metric", "AP"], "drawn by the metric that it was judged by"),
        (["found", "-o", "x.gif"], "ends in .html"),
    ],
)
def test_wrong_use_of_a_study(words: list[str], message: str, cli: Any, tuned: Path) -> None:
    done = cli("plot", *words, cwd=tuned)
    assert done.code == 2
    assert message in done.err
