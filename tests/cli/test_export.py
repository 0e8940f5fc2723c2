"""``detkit export``, with a plugin whose engine writes one small file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

PLUGIN = """
from dataclasses import replace
import detkit_echo
from detkit.hookspecs import hookimpl

@hookimpl
def detkit_backends():
    for echo in detkit_echo.detkit_backends():
        yield replace(echo, name="writer", engine="writer_engine:Engine", formats=("text",))
"""

ENGINE = """
from detkit_echo.engine import EchoEngine

class Engine(EchoEngine):
    def export(self, model, format, to):
        (to / "more").mkdir(parents=True, exist_ok=True)
        (to / "more/weights.bin").write_bytes(bytes(2_000_000))
        (to / "model.txt").write_text(model.name)
        return to / "model.txt"
"""


@pytest.fixture
def runs(trained: Path, tmp_path: Path, make_distribution: Callable[..., str]) -> dict[str, Any]:
    """A run of the plugin's, and a model of it that lies elsewhere; returns where and how commands run."""
    path = make_distribution("writer", writer="writer")
    (tmp_path / "site/writer.py").write_text(PLUGIN)
    (tmp_path / "site/writer_engine.py").write_text(ENGINE)
    shutil.copytree(trained / "runs/first", tmp_path / "runs/first")
    manifest = tmp_path / "runs/first/model/detkit.json"
    content = msgspec.json.decode(manifest.read_bytes())
    manifest.write_bytes(msgspec.json.encode({**content, "backend": "writer", "engine": "writer_engine:Engine"}))
    shutil.copytree(tmp_path / "runs/first/model", tmp_path / "models/a")
    return {"cwd": tmp_path, "PYTHONPATH": path}


def test_it_goes_into_the_run(cli: Any, runs: dict[str, Any]) -> None:
    for model in ("first", "runs/first", "runs/first/model"):
        done = cli("export", model, "text", **runs)
        assert done.out == "runs/first/export/text/model.txt\n2.0 MB are in runs/first/export/text\n", done.err
    inside = cli("export", ".", "text", **{**runs, "cwd": runs["cwd"] / "runs/first/model"})
    assert inside.out.startswith("../export/text/model.txt\n") or "/runs/first/export/text/model.txt" in inside.out


def test_what_fails_leaves_nothing(cli: Any, runs: dict[str, Any]) -> None:
    """Not in a folder that holds an earlier export, and no folder that was made for it."""
    engine = runs["cwd"] / "site/writer_engine.py"
    cli("export", "first", "text", "--to", "out", **runs)
    text = ENGINE.replace("write_text(model.name)", "write_text('half')").replace(
        'return to / "model.txt"', "raise UsageError('no more room')"
    )
    engine.write_text("from detkit.errors import UsageError\n" + text)
    for folder in ("out", "new/deep/out"):
        done = cli("export", "first", "text", "--to", folder, **runs)
        assert (done.code, "no more room" in done.err) == (2, True), done.err
    assert (runs["cwd"] / "out/model.txt").read_text() == "writer/memory"
    assert sorted(path.name for path in (runs["cwd"] / "out").iterdir()) == ["model.txt", "more"]
    assert not (runs["cwd"] / "new").exists()


def test_model_of_no_run_needs_a_folder(cli: Any, runs: dict[str, Any]) -> None:
    done = cli("export", "models/a", "text", **runs)
    assert (done.code, "models/a belongs to no run; name the folder for its export with --to" in done.err) == (2, True)
    assert not (runs["cwd"] / "models/export").exists()
    mine = runs["cwd"] / "mine"
    mine.mkdir()
    (mine / "precious.txt").write_text("not exported")
    told = cli("export", "models/a", "text", "--to", mine, "--json", **runs).json
    assert told == {
        "file": str(mine / "model.txt"),
        "folder_bytes": 2_000_000 + len("writer/memory") + len("not exported"),
        "verified": None,
    }
    assert "precious" not in cli("export", "models/a", "text", "--to", mine, **runs).out
