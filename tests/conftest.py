"""What many test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from detkit import Dataset
from detkit.testing import tiny_dataset

# Machines are shared: how long one example takes says nothing.
hypothesis.settings.register_profile("detkit", deadline=None)
hypothesis.settings.load_profile("detkit")

collect_ignore = ["stranger"]  # test_stranger.py installs it and runs its tests


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing gets into the user's cache, and nothing comes from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder and no ``DETKIT_*`` in the environment but the cache's; returns the folder."""
    for name in list(os.environ):
        if name.startswith("DETKIT_") and name != "DETKIT_CACHE":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eight small pictures, the last without a box."""
    return tiny_dataset(tmp_path_factory.mktemp("tiny") / "images")
