"""What many test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from detkit import Dataset
from detkit.testing import tiny_dataset

collect_ignore = ["stranger"]  # test_stranger.py installs it and runs its tests


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder and no ``DETKIT_*`` in the environment; returns the folder."""
    for name in list(os.environ):
        if name.startswith("DETKIT_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eight small pictures, the last without a box."""
    return tiny_dataset(tmp_path_factory.mktemp("tiny") / "images")
