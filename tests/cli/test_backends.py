"""``detkit models``, ``detkit backends`` and ``detkit doctor``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import detkit

if TYPE_CHECKING:
    from collections.abc import Callable


def test_models(cli: Any, tmp_path: Path) -> None:
    records = cli("models", "--json", cwd=tmp_path).json
    (echo,) = [record for record in records if record["model"] == "echo/memory"]
    assert set(echo) == {"model", "backend", "summary", "weights", "licence", "missing"}
    assert "echo/memory" in cli("models", "--backend", "echo", cwd=tmp_path).out
    unknown = cli("models", "--backend", "ecco", cwd=tmp_path)
    assert (unknown.code, "did you mean 'echo'" in unknown.err) == (2, True)


def test_list(cli: Any, tmp_path: Path) -> None:
    found = cli("backends", "ls", "--json", cwd=tmp_path).json
    (echo,) = [record for record in found["backends"] if record["name"] == "echo"]
    assert set(echo) == {
        *("name", "summary", "models", "plugin", "missing", "install"),
        *("python", "environment", "problem"),
    }
    assert (echo["python"], echo["environment"], echo["problem"]) == (sys.executable, None, "")
    assert (echo["plugin"], echo["missing"]) == ("echo", [])


def test_broken_plugin_warns_and_doctor_says_why(
    cli: Any, tmp_path: Path, make_distribution: Callable[..., str]
) -> None:
    path = make_distribution("detkit-broken", broken="there_is_no_such_module")
    models = cli("models", cwd=tmp_path, PYTHONPATH=path)
    assert models.code == 0
    assert models.err.startswith("warning: plugin 'broken' is left out: ModuleNotFoundError")
    assert "echo/memory" in models.out
    done = cli("doctor", "--json", cwd=tmp_path, PYTHONPATH=path)
    assert done.code == 1
    assert any("there_is_no_such_module" in problem for problem in done.json["problems"])
    listed = cli("backends", "ls", "--json", cwd=tmp_path, PYTHONPATH=path).json
    assert listed["broken"][0]["plugin"] == "broken"


def test_doctor(cli: Any, tmp_path: Path) -> None:
    done = cli("doctor", "--json", cwd=tmp_path)
    assert set(done.json) == {
        *("detkit", "python", "executable", "platform", "cores", "memory", "disk_free", "cache", "gpus"),
        *("plugins", "backends", "problems"),
    }
    (echo,) = [backend for backend in done.json["backends"] if backend["name"] == "echo"]
    assert echo["ready"] is True
    assert done.code == (1 if done.json["problems"] else 0)
    assert "backend   echo: ready" in cli("doctor", cwd=tmp_path).out


def test_doctor_finds_the_foreign_detkit(cli: Any, tmp_path: Path, make_distribution: Callable[..., str]) -> None:
    done = cli("doctor", cwd=tmp_path, PYTHONPATH=make_distribution("detkit"))
    assert done.code == 1
    assert "pip uninstall detkit" in done.out


def test_doctor_asks_other_interpreters(cli: Any, tmp_path: Path) -> None:
    done = cli("doctor", "--json", cwd=tmp_path, DETKIT_PYTHON_ECHO="/no/such/python")
    assert done.code == 1
    assert any("/no/such/python" in problem for problem in done.json["problems"])
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\nexit 1\n")
    empty.chmod(0o755)
    done = cli("doctor", "--json", cwd=tmp_path, DETKIT_PYTHON_ECHO=str(empty))
    assert any("cannot run the engine of backend 'echo'" in problem for problem in done.json["problems"])
    (problem,) = cli("backends", "doctor", "echo", "--json", cwd=tmp_path, DETKIT_PYTHON_ECHO=str(empty)).json[
        "problems"
    ]
    assert f"expected detkit-sdk {detkit.__version__} and detkit-echo " in problem
    assert f"in {empty}: type `{empty} -m pip install detkit-sdk==" in problem


def test_environments_of_their_own(cli: Any, tmp_path: Path) -> None:
    """What test_environments.py does not need an environment for."""
    here = {"cwd": tmp_path, "DETKIT_ENVIRONMENTS": str(tmp_path / "environments")}
    assert cli("backends", "list", **here).out == cli("backends", "ls", **here).out
    assert cli("backends", "doctor", **here).out == "no backend has an environment of its own\n"
    outside = cli("backends", "remove", "../x", **here)
    assert (outside.code, "no environment '../x'" in outside.err) == (2, True)
    refused = cli("backends", "install", "echo", **here)
    assert (refused.code, "declares no environment of its own" in refused.err) == (2, True)
    unknown = cli("backends", "install", "ecco", **here)
    assert (unknown.code, "did you mean 'echo'" in unknown.err) == (2, True)
    assert not (tmp_path / "environments").exists()
    (tmp_path / "environments").mkdir()
    (tmp_path / "environments/gone.json").write_text("{}")
    left = cli("backends", "doctor", "--json", **here)
    assert (left.code, left.json["problems"]) == (
        1,
        ["no plugin offers 'gone'; `detkit backends remove gone` removes its environment"],
    )
    assert cli("backends", "remove", "gone", "--json", **here).json == {"removed": "gone"}
    assert cli("backends", "doctor", **here).code == 0


def test_new_backend_passes_the_suite(cli: Any, data: Path, tmp_path: Path) -> None:
    made = cli("backends", "new", "my-net", "--json", cwd=tmp_path)
    assert made.code == 0, made.err
    assert "src/detkit_my_net/engine.py" in made.json["files"]
    folder, site = Path(made.json["folder"]), tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(folder)], check=True)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = cli("backends", "verify", "my-net", "--seconds-per-step", "0.02", cwd=tmp_path, PYTHONPATH=path)
    assert done.code == 0, done.out + done.err
    assert " passed" in done.out
    trained = cli("train", data, data, "--model", "my-net/grid", "--json", "epochs=2", cwd=tmp_path, PYTHONPATH=path)
    assert trained.json["score_threshold"] is not None
    failed = cli("backends", "verify", "my-net", "--json", "cells=nonsense", cwd=tmp_path, PYTHONPATH=path)
    assert (failed.code, failed.json) == (1, {"backend": "my-net", "passed": False})


def test_new_backend_is_well_written(cli: Any, tmp_path: Path) -> None:
    made = cli("backends", "new", "mynet", "--folder", "here", "--json", cwd=tmp_path).json
    for name in made["files"]:
        text = (Path(made["folder"]) / name).read_text()
        assert "$" not in text
        if name.endswith(".py"):
            compile(text, name, "exec")


@pytest.mark.parametrize("name", ["My_Net", "detkit-x", "a b", "-x", "../x", "ünet"])
def test_impossible_names(name: str, cli: Any, tmp_path: Path) -> None:
    done = cli("backends", "new", "--", name, cwd=tmp_path)
    assert (done.code, "is not valid" in done.err) == (2, True)
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "detkit-mynet").mkdir()
    done = cli("backends", "new", "mynet", cwd=tmp_path)
    assert (done.code, "already there" in done.err) == (2, True)
    taken = cli("backends", "new", "echo", cwd=tmp_path)
    assert (taken.code, "already installed" in taken.err) == (2, True)


def test_verify_unknown(cli: Any, tmp_path: Path) -> None:
    done = cli("backends", "verify", "ecco", cwd=tmp_path)
    assert (done.code, "did you mean 'echo'" in done.err) == (2, True)
