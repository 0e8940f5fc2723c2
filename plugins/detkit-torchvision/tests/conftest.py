"""Data that several tests train on; torch keeps to one thread, as several tests run beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import detkit
from detkit.testing import tiny_dataset

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> detkit.Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to a fresh folder, and torch's cache of weights is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETKIT_RUNS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
