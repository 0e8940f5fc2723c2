"""These tests need the real Detectron2: importable here, or by the interpreter that the backend is run with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import detkit
from detkit import plugins
from detkit.errors import DetkitError
from detkit.testing import tiny_dataset

_CHECKOUT = os.environ.get("DETKIT_DETECTRON2")
"""A checkout that is imported unbuilt; kept, as the conformance suite takes ``DETKIT_*`` away from each case."""


def _interpreter() -> str | None:
    try:
        return plugins.backend("detectron2").interpreter(None)  # type: ignore[attr-defined]
    except DetkitError:
        return None


@pytest.fixture(scope="session")
def worker_python() -> str:
    """Return the interpreter that has Detectron2. Making it is the caller's."""
    python = _interpreter()
    if python is None:
        pytest.skip("no interpreter has Detectron2: detkit backends install detectron2 --source PATH")
    return python


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> detkit.Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def _checkout_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    if _CHECKOUT:
        monkeypatch.setenv("DETKIT_DETECTRON2", _CHECKOUT)


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to a fresh folder, and Detectron2's cache of weights is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETKIT_RUNS", raising=False)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
