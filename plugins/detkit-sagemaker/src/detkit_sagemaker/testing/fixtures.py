"""The pytest fixture ``simulator``; import it and ``simulator_images`` in a conftest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

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
    """A simulated AWS account. The environment leads boto3 to it for the time of the test."""
    with Simulator(images=simulator_images, folder=tmp_path / "aws") as aws:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in aws.environment.items():
            monkeypatch.setenv(name, value)
        yield aws
