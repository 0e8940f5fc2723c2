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
