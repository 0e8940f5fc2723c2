"""The simulated AWS account, and a model to use in it, for every test that asks for them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

import detkit
from detkit import Dataset
from detkit.job import Model
from detkit.testing import tiny_dataset
from detkit_sagemaker import runs
from detkit_sagemaker.artifacts import Place
from detkit_sagemaker.testing import Simulator
from detkit_sagemaker.testing.fixtures import simulator, simulator_images

__all__ = ["simulator", "simulator_images"]


@pytest.fixture(autouse=True)
def no_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated log is whole when a job has ended."""
    monkeypatch.setattr(runs, "_LAG_S", 0.0)


@dataclass(frozen=True)
class Trained:
    """A model that was trained here, and the images that it was trained on."""

    model: Model
    data: Dataset


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """What `detkit-echo` has learned of eight small pictures, the last without a box."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETKIT_CACHE", str(folder / "cache"))
        data = tiny_dataset(folder / "images")
        train, val = data.split(0.75, 0.25, seed=0)
        run = detkit.Trainer(model="echo/memory", epochs=2).fit(train, val, name=str(folder / "run"), quiet=True)
        yield Trained(run.model, data)


@pytest.fixture
def echo_account(simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulator:
    """An account with our container as ``echo:latest``, a role for the scheduler, and a ledger of its own."""
    monkeypatch.setenv("DETKIT_LEDGER", str(tmp_path / "ledger.jsonl"))
    monkeypatch.setenv("DETKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DETKIT_SCHEDULER_ROLE", "detkit-simulator")
    return simulator


@pytest.fixture
def aws_model(trained: Trained, tmp_path: Path) -> Model:
    """A model as the stand-in of AWS's built-in algorithm leaves it, brought back to this machine."""
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    with tarfile.open(tmp_path / "weights", "w") as tar:
        tar.add(trained.model.path, ".")
    (tmp_path / "hyperparams.json").write_text(json.dumps({"nms_topk": 400}))
    with tarfile.open(folder / "model.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "weights", "model_algo_1-0000.params")
        tar.add(tmp_path / "hyperparams.json", "hyperparams.json")
    place = Place(
        region="us-east-1",
        artifact="s3://gone/model.tar.gz",
        image="811284229777.dkr.ecr.us-east-1.amazonaws.com/object-detection:1",
    )
    (folder / "aws.json").write_bytes(msgspec.json.encode(place))
    manifest = msgspec.structs.replace(trained.model.manifest, backend="sagemaker", engine="", model="object-detection")
    (folder / "detkit.json").write_bytes(msgspec.json.encode(manifest))
    return Model(folder)
