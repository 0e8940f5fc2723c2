"""These tests run in a controller that has neither mxnet nor gluoncv; the worker's interpreter must be known."""

from __future__ import annotations

from pathlib import Path

import pytest

import detkit
from detkit import plugins
from detkit.errors import DetkitError
from detkit.testing import tiny_dataset

collect_ignore = ["inside"]  # test_inside.py runs it where mxnet is

MEMORISES = {
    "iterations": 120,
    "batch_size": 8,
    "learning_rate": 4e-3,
    "augmentations": (),
    "validate_every": "120 iterations",
    "threads": 1,
}
"""With these, ssd_300_mobilenet0.25 learns eight images by heart."""


def _interpreter() -> str | None:
    try:
        return plugins.backend("gluoncv").interpreter(None)  # type: ignore[attr-defined]
    except DetkitError:
        return None


@pytest.fixture(scope="session")
def worker_python() -> str:
    """Return the interpreter that has mxnet. Making it is the caller's: `tox -e cross`, or by hand."""
    python = _interpreter()
    if python is None:
        pytest.skip("no interpreter for gluoncv: detkit backends install gluoncv")
    return python


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> detkit.Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def memorised(worker_python: str, tiny: detkit.Dataset, tmp_path_factory: pytest.TempPathFactory) -> detkit.Run:
    """A model that knows eight images by heart."""
    folder = tmp_path_factory.mktemp("memorised")
    trainer = detkit.Trainer(model="gluoncv/ssd_300_mobilenet0.25", **MEMORISES)
    return trainer.fit(tiny, tiny, name=str(folder / "run"), quiet=True)


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to a fresh folder, and GluonCV's cache of weights is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETKIT_RUNS", raising=False)
    monkeypatch.setenv("MXNET_HOME", str(tmp_path / "mxnet"))
