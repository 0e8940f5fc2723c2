"""Our container on two machines of the simulated account, through torchrun; where torch is."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from detkit import Dataset, Trainer
from detkit.errors import UsageError
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
        backend="sagemaker", role=aws.role, image_uri=image, yes=True, instance_count=2, **{**SETTINGS, **settings}
    )  # type: ignore[arg-type]


def losses(run: Run) -> list[float]:
    return [row["train/loss"] for row in run.history if "train/loss" in row]


def test_two_machines_end_where_one_does(simulator: Simulator, data: Dataset) -> None:
    run = on_two(simulator, epochs=6).fit(data, data, quiet=True)
    alone = Trainer(**SETTINGS, epochs=6, grad_accumulation=2, device="cpu").fit(data, data, quiet=True)  # type: ignore[arg-type]
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    assert run.model.manifest.hardware["processes"] == "2"
    assert run.model.manifest.metrics["val/AP"] == pytest.approx(alone.model.manifest.metrics["val/AP"], abs=1e-3)


def crowded_shelves(folder: Path, given: str) -> str:
    """Run the example with 12 drawn shelves; returns what it prints."""
    script = Path(__file__).parents[3] / "examples/shelves.py"
    command = [sys.executable, script, "--simulate", *f"{given} --images 12 --boxes 147 --epochs 1".split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_crowded_shelves(tmp_path: Path) -> None:
    """The example: 147 boxes an image, two broken files, two machines, a batch transform, and AR at 300."""
    printed = crowded_shelves(tmp_path, "--machines 2 --model torchvision/fcos_tiny --size 640")
    assert re.search(r"left out 2: shelf_0002\.jpg, shelf_0005\.jpg", printed)
    (manifest,) = tmp_path.rglob("model/detkit.json")
    assert json.loads(manifest.read_bytes())["hardware"]["processes"] == "2"
    assert re.search(r"AP \d\.\d+  AP75 \d\.\d+  AR300 \d\.\d+ on 2 shelves", printed)


@pytest.mark.skipif(importlib.util.find_spec("detectron2") is None, reason="there is no Detectron2 in this Python")
@pytest.mark.parametrize("machines", [1, 2])
def test_crowded_shelves_with_detectron2(machines: int, tmp_path: Path) -> None:
    printed = crowded_shelves(tmp_path, f"--machines {machines} --model detectron2/retinanet_tiny --size 320")
    assert re.search(r"AP \d\.\d+  AP75 \d\.\d+  AR300 \d\.\d+ on 2 shelves", printed)
    manifest = json.loads((tmp_path / "shelves/run/model/detkit.json").read_bytes())
    assert (manifest["backend"], manifest["model"]) == ("detectron2", "retinanet_tiny")
    assert manifest["hardware"]["processes"] == str(machines)


def test_weights_of_a_file(simulator: Simulator, data: Dataset, tmp_path: Path) -> None:
    """They travel to the container, which begins like a run of this machine."""
    first = Trainer(**SETTINGS, epochs=2, device="cpu").fit(data, data, name="first", quiet=True)  # type: ignore[arg-type]
    file = shutil.copy(first.model.path / "weights.safetensors", tmp_path / "mine.safetensors")
    here = Trainer(**SETTINGS, epochs=2, device="cpu", weights=file).fit(data, data, name="here", quiet=True)  # type: ignore[arg-type]
    there = on_two(simulator, epochs=2, weights=file).fit(data, data, name="there", instance_count=1, quiet=True)
    assert losses(there) == losses(here)
    assert there.model.manifest.weights.sha256 == here.model.manifest.weights.sha256


def test_weights_that_the_container_fetches(simulator: Simulator, data: Dataset) -> None:
    settings = {"model": "torchvision/ssdlite320_mobilenet_v3_large", "image_size": 320, "iterations": 1}
    trainer = on_two(simulator, **settings)
    assert any("fetches weights=coco" in note for note in trainer.plan(data, data, weights="coco").notes)
    with pytest.raises(UsageError, match="whose cache is empty; .*weights=coco"):
        trainer.plan(data, data, weights="auto")
    with pytest.raises(UsageError, match="which reaches nothing; .*weights=none"):
        trainer.plan(data, data, weights="coco", network_isolation=True)


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
