"""The pytest fixture ``simulator``; import it and ``simulator_images`` in a conftest."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from detkit_sagemaker.testing.simulator import Simulator


@pytest.fixture
def simulator_images() -> Mapping[str, Sequence[str]]:
    """The images of the account; override it to add your own."""
    return {}


@pytest.fixture
def simulator(
    simulator_images: Mapping[str, Sequence[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Simulator]:
    """A simulated AWS account. The environment leads boto3 to it for the time of the test, and has a ledger for it."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.upper().endswith("_PROXY")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DETKIT_LEDGER", str(tmp_path / "aws-ledger.jsonl"))
    with Simulator(images=simulator_images, folder=tmp_path / "aws") as aws:
        for name, value in aws.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("boto3.DEFAULT_SESSION", _session())
        yield aws


@functools.cache
def _session() -> Any:
    """Return boto3's default session for all tests: it has read each service's model once, and has no other's key."""
    import boto3

    return boto3.session.Session()
