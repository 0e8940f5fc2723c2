"""torchvision, GluonCV and Detectron2 by changing one word: the same boxes, names and thresholds, one report."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import detkit
from detkit import plugins
from detkit.boxes import iou
from detkit.errors import DetkitError
from detkit.shapes import write_shapes
from detkit.testing import tiny_dataset

NEU = Path(__file__).parents[3] / "shared/data/neu-det"

_STEADY = {"warmup_iterations": 0, "lr_scheduler": "constant"}
MEMORISE: dict[str, dict[str, Any]] = {
    "torchvision/fcos_tiny": {"iterations": 240, "batch_size": 4, "image_size": 96, "augmentations": (), **_STEADY},
    "gluoncv/ssd_300_mobilenet0.25": {
        **{"iterations": 120, "batch_size": 8, "learning_rate": 4e-3, "augmentations": ()}
    },
    "detectron2/faster_rcnn_tiny": {"iterations": 160, "batch_size": 4, "image_size": 64, **_STEADY},
}
"""With these, each one learns eight images by heart."""


def ready(model: str) -> bool:
    try:
        plugins.backend(model.partition("/")[0]).interpreter(None)  # type: ignore[attr-defined]
    except DetkitError:
        return False
    return True


MODELS = [model for model in MEMORISE if ready(model)]

pytestmark = pytest.mark.skipif(
    "detectron2/faster_rcnn_tiny" not in MODELS or len(MODELS) < 2,
    reason="needs Detectron2, see docs/how-to/detectron2.md, and another framework",
)


def train(model: str, data: detkit.Dataset, folder: Path, **settings: Any) -> detkit.Run:
    often = {"validate_every": "1000 epochs", "checkpoint_every": "1000 epochs", "threads": 1, "device": "cpu"}
    trainer = detkit.Trainer(model=model, **{**often, **settings})
    return trainer.fit(data, data, name=str(folder / model.replace("/", "-")), quiet=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> detkit.Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def memorised(tiny: detkit.Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, detkit.Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {model: train(model, tiny, folder, **MEMORISE[model]) for model in MODELS}


@pytest.mark.timeout(900)
def test_eight_images_by_heart_are_the_same_boxes_in_all(
    memorised: dict[str, detkit.Run], tiny: detkit.Dataset
) -> None:
    """Corners, order of axes, 0-based labels, the image without objects, and what a score threshold leaves out."""
    found = {}
    for model, run in memorised.items():
        with detkit.Predictor(run, score_threshold=0.5) as predictor:
            found[model] = list(predictor.predict(tiny))
        for sample, one in zip(tiny, found[model], strict=True):
            assert sorted(one.names) == sorted(sample.names), (model, sample.path)
            assert (one.width, one.height, one.path) == (sample.width, sample.height, sample.path)
            assert (one.scores >= 0.5).all()
            if len(sample.boxes):
                overlaps = iou(one.boxes, sample.boxes)
                assert (overlaps.max(axis=1) > 0.7).all(), (model, sample.path)
                assert [sample.names[i] for i in overlaps.argmax(axis=1)] == list(one.names)
        assert run.metrics["val/AP50"] == pytest.approx(detkit.evaluate(run, tiny, allow_seen=True)["AP50"], abs=1e-6)
    for model, other in itertools.combinations(found, 2):
        for ours, theirs in zip(found[model], found[other], strict=True):
            overlaps = iou(ours.boxes, theirs.boxes)
            assert (overlaps.max(axis=1, initial=0) > 0.7).all(), (model, other, ours.path)
            nearest = overlaps.argmax(axis=1) if len(ours) else []
            assert [theirs.names[i] for i in nearest] == list(ours.names), (model, other, ours.path)


@pytest.mark.timeout(900)
def test_one_report(memorised: dict[str, detkit.Run], tiny: detkit.Dataset, tmp_path: Path) -> None:
    comparison = detkit.compare(memorised, tiny, allow_seen=True)
    assert all(model in str(comparison) for model in MODELS)
    page = comparison.save(tmp_path / "report.html").read_text()
    assert all(model in page for model in MODELS)
    manifests = [run.model.manifest for run in memorised.values()]
    assert {tuple(manifest.classes) for manifest in manifests} == {tiny.classes}
    kept = [{name for name in manifest.metrics if "loss" not in name} for manifest in manifests]
    assert all(one == kept[0] for one in kept)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", MODELS)
def test_one_word_changes_the_framework(model: str, tmp_path: Path) -> None:
    """A sample of NEU-DET, or of drawn pictures where that is not there, through each by the same call."""
    if NEU.is_dir():
        data = detkit.read_dataset(NEU)
        train_data, test = data.take(range(0, len(data), 60)), data.take(range(7, len(data), 90))
    else:
        data = detkit.read_dataset(write_shapes(tmp_path / "shapes", num_images=30, size=96))
        train_data, test = data.take(range(20)), data.take(range(20, 30))
    small = {} if model.startswith("gluoncv") else {"image_size": 128}
    trainer = detkit.Trainer(model=model, epochs=1, batch_size=8, threads=1, device="cpu", **small)
    run = trainer.fit(train_data, test, name=str(tmp_path / "run"), quiet=True)
    assert {"train/loss", "val/AP", "val/AP50"} <= set(run.metrics)
    with detkit.Predictor(run, score_threshold=0.001) as predictor:
        found = list(predictor.predict(test))
    assert {one.classes for one in found} == {data.classes}
    assert [one.path for one in found] == list(test.paths)
    assert sum(map(len, found)) > 0
