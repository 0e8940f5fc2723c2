"""Our container on two machines of the simulated account, through torchrun; where torch is."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from detkit import Dataset, Trainer
from detkit.runs import Run
from detkit.testing import tiny_dataset
from detkit_sagemaker.testing import Simulator

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("detkit_torchvision") is None,
    reason="no engine without torch trains on several machines",
)

SETTINGS = {
    "model": "torchvision/ssd_tiny",
    "image_size": 64,
    "batch_size": 4,
    "lr_scheduler": "constant",
    "warmup_iterations": 0,
    "batch_norm": "frozen",
}


@pytest.fixture
def simulator_images() -> Mapping[str, Sequence[str]]:
    return {"detkit:latest": [sys.executable, "-m", "detkit_sagemaker.container"]}


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, place in {"RUNS": "runs", "CACHE": "cache", "LEDGER": "ledger.jsonl"}.items():
        monkeypatch.setenv(f"DETKIT_{name}", str(tmp_path / place))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "etc"))


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return tiny_dataset(tmp_path / "data")


def on_two(aws: Simulator, **settings: object) -> Trainer:
    image = aws.image("detkit:latest")
    return Trainer(
        backend="sagemaker", role=aws.role, image_uri=image, yes=True, instance_count=2, **SETTINGS, **settings
    )  # type: ignore[arg-type]


def losses(run: Run) -> list[float]:
    return [row["train/loss"] for row in run.history if "train/loss" in row]


def test_two_machines_end_where_one_does(simulator: Simulator, data: Dataset) -> None:
    run = on_two(simulator, epochs=6).fit(data, data, quiet=True)
    alone = Trainer(**SETTINGS, epochs=6, grad_accumulation=2, device="cpu").fit(data, data, quiet=True)  # type: ignore[arg-type]
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    assert run.model.manifest.hardware["processes"] == "2"
    assert run.model.manifest.metrics["val/AP"] == pytest.approx(alone.model.manifest.metrics["val/AP"], abs=1e-3)


def test_stopped_on_both_machines_and_resumed(simulator: Simulator, data: Dataset) -> None:
    run = on_two(simulator, epochs=200, checkpoint_every="1 epoch").start(data, data)
    while run.last_step < 10:
        assert run.status == "running", run.status
        time.sleep(0.2)
    run.stop()
    assert run.status == "stopped"
    before = run.last_step
    assert before < 400
    again = run.resume(options={"max_runtime": 600})
    assert again.wait().status == "finished"
    assert "resumed after step" in "\n".join(
        str(event.values["message"]) for event in again.events(follow=False) if event.kind == "log"
    )
