"""``detkit runs``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def test_list(cli: Any, trained: Path, tmp_path: Path) -> None:
    assert "first" in cli("runs", "ls", cwd=trained).out
    (record,) = cli("runs", "ls", "--json", cwd=tmp_path, DETKIT_RUNS=str(trained / "runs")).json
    assert (Path(record["run"]).name, record["status"]) == ("first", "finished")
    empty = cli("runs", "ls", cwd=tmp_path)
    assert (empty.code, "train one with" in empty.out) == (0, True)
    assert cli("runs", "ls", "--json", cwd=tmp_path).json == []


def test_run_of_another_version(cli: Any, trained: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(trained / "runs/first", tmp_path / f"runs/{name}")
    job = tmp_path / "runs/second/input/data/job/job.json"
    job.write_text(job.read_text().replace('"engine"', '"motor"'))
    listed = cli("runs", "ls", "--json", cwd=tmp_path)
    assert (listed.code, [Path(record["run"]).name for record in listed.json]) == (0, ["first"])
    (line,) = listed.err.splitlines()
    assert line.startswith("warning: run runs/second is left out: ")
    shown = cli("runs", "show", "second", cwd=tmp_path)
    assert (shown.code, f"{job} was written by another version of detkit" in shown.err) == (2, True)
    assert cli("runs", "rm", "second", "--yes", cwd=tmp_path).code == 0


def test_show(cli: Any, trained: Path) -> None:
    shown = cli("runs", "show", "first", "--json", cwd=trained).json
    assert shown["params"]["epochs"] == 3
    assert shown["data"]["train"]["images"] == 12 or shown["data"]["train"]["images"] == 13
    assert (shown["failure"], Path(shown["log"]).name) == (None, "log.txt")
    text = cli("runs", "show", "first", cwd=trained).out
    assert "epochs=3" in text and "classes    disc, square" in text


def test_failed_run_says_why(cli: Any, data: Path, tmp_path: Path) -> None:
    cli("train", data, "--model", "echo/memory", "--name", "bad", "--device", "cuda:9", cwd=tmp_path)
    shown = cli("runs", "show", "bad", "--json", cwd=tmp_path).json
    assert (shown["status"], "cuda:9" in shown["failure"]) == ("failed", True)
    assert "failed" in cli("runs", "show", "bad", cwd=tmp_path).out


def test_remove(cli: Any, data: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs/first", tmp_path / "runs/first")
    asked = cli("runs", "rm", "first", cwd=tmp_path)
    assert (asked.code, "--yes" in asked.err) == (2, True)
    assert (tmp_path / "runs/first").is_dir()
    done = cli("runs", "rm", "first", "--yes", "--json", cwd=tmp_path)
    assert done.json == {"removed": [str(tmp_path / "runs/first")]}
    assert not (tmp_path / "runs/first").exists()
    assert len(list((data / "images").iterdir())) == 20


def test_remove_what_never_started(cli: Any, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs/first/input", tmp_path / "runs/half/input")
    assert cli("runs", "rm", "half", "--yes", cwd=tmp_path).code == 0
    assert not (tmp_path / "runs/half").exists()


def test_a_path_is_only_a_path(cli: Any, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs/first/input", tmp_path / "runs/mix/input")
    shutil.copytree(trained / "runs/first", tmp_path / "runs/first")
    for name in ("./mix", "./first"):
        assert cli("runs", "rm", name, "--yes", cwd=tmp_path).code == 2
    assert (tmp_path / "runs/mix").is_dir() and (tmp_path / "runs/first").is_dir()
    assert cli("runs", "rm", "./runs/mix", "runs/first", "--yes", cwd=tmp_path).code == 0
    assert not any((tmp_path / "runs").iterdir())


def test_only_runs_are_removed(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    done = cli("runs", "rm", "precious", "--yes", cwd=tmp_path)
    assert done.code == 2
    assert (tmp_path / "precious").is_dir()
