"""A run, its export, and pictures that neither has seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from grids import export_grid, pictures

import detkit
from detkit import Dataset, Trainer


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing gets into the user's cache, and nothing comes from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return pictures(tmp_path_factory.mktemp("pictures") / "seen")


@pytest.fixture(scope="session")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return pictures(tmp_path_factory.mktemp("pictures") / "unseen", seed=1)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, seen: Dataset) -> detkit.Run:
    """Any run: what it has learnt is not exported, but its manifest is."""
    return Trainer(model="echo/memory", name=str(tmp_path_factory.mktemp("runs") / "one")).fit(seen, seen)


@pytest.fixture(scope="session")
def file(run: detkit.Run) -> Path:
    return export_grid(run, run.path / "export" / "onnx")
