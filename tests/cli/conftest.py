"""The command line is run as users run it: as a process, in a folder of its own, training the echo backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from detkit.io import write_dataset
from detkit.testing import tiny_dataset

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Done]


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a user who has set nothing but these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DETKIT_")}
    return {**kept, "COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb", **variables}


@pytest.fixture(scope="session")
def cli() -> Cli:
    """``cli("train", data, cwd=folder, DETKIT_EPOCHS="3")`` runs a command and returns its `Done`."""

    def run(*words: str | Path, cwd: Path, **variables: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "detkit.cli", *map(str, words)],
            cwd=cwd,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty small pictures as a COCO folder."""
    folder = tmp_path_factory.mktemp("data")
    return write_dataset(tiny_dataset(folder / "drawn", num_images=20), folder / "shapes", "coco")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, cli: Cli, data: Path) -> Path:
    """A folder with the finished run ``runs/first``. Tests only read it."""
    folder = tmp_path_factory.mktemp("trained")
    done = cli("train", data, "--model", "echo/memory", "--name", "first", "epochs=3", cwd=folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def make_distribution(tmp_path: Path) -> Callable[..., str]:
    """Put a distribution with these entry points on a path of its own and return that path."""

    def make(name: str, **entry_points: str) -> str:
        info = tmp_path / "site" / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{key} = {value}" for key, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[detkit]", *lines]) + "\n")
        return os.pathsep.join([str(info.parent), *filter(None, [os.environ.get("PYTHONPATH")])])

    return make
