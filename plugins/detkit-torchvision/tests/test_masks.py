"""Mask R-CNN through the engine and the API: what it needs, what it finds, and how that is scored, sent and written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import lay_out, make_job
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

import detkit
from detkit.data import Dataset
from detkit.errors import InvalidData
from detkit.masks import decode
from detkit_torchvision.detector import TorchvisionDetector
from detkit_torchvision.engine import TorchvisionEngine
from detkit_torchvision.models import build

MODEL = "maskrcnn_resnet50_fpn"


def test_data_without_masks_are_refused_before_a_run_is_started(masked: Dataset, tiny: Dataset) -> None:
    trainer = detkit.Trainer(model=f"torchvision/{MODEL}", weights="none", iterations=1)
    count = len(tiny.boxes)
    with pytest.raises(InvalidData, match=f"{count} of {count} objects of the train data have none"):
        trainer.fit(tiny, tiny, quiet=True)
    with pytest.raises(InvalidData, match="objects of the validation data have none"):
        trainer.fit(masked, tiny, quiet=True)
    assert masked.masks is not None
    row = int(masked.offsets[2])
    some = replace(masked, masks=(*masked.masks[:row], [], *masked.masks[row + 1 :]))
    expected = rf"{MODEL} learns masks, and 1 of {count} .* first in {masked.image_ids[2]}\n.*fasterrcnn"
    with pytest.raises(InvalidData, match=expected):
        trainer.fit(some, masked, quiet=True)
    assert not Path("runs").exists()


def test_crowd_regions_need_no_masks(masked: Dataset, tmp_path: Path) -> None:
    assert masked.masks is not None
    crowd = np.arange(len(masked.boxes)) == 0
    data = replace(masked, masks=(None, *masked.masks[1:]), crowd=crowd)[:2]
    job = make_job(MODEL, data, backbone="resnet18")
    TorchvisionEngine().train(job, lay_out(tmp_path / "run", job, data))


class Answering(torch.nn.Module):
    """Stands where a network does, and answers with one result whatever it is given."""

    def __init__(self, result: dict[str, Tensor]) -> None:
        super().__init__()
        self.result = result

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [self.result] * len(images)


def test_masks_lie_where_torchvision_pastes_them(masked: Dataset) -> None:
    """At the original size, which is not the input's, and in the order of the scores."""
    torch.manual_seed(2)
    box, shares = torch.tensor([10.0, 5.0, 50.0, 45.0]), torch.rand(1, 1, 28, 28)
    result = {
        "boxes": torch.stack([box / 4, box * 2]),
        "scores": torch.tensor([0.1, 0.9]),
        "labels": torch.tensor([1, 2]),
        "masks": torch.cat([torch.zeros(1, 1, 28, 28), shares]),
    }
    detector = TorchvisionDetector(Answering(result), MODEL, masked.classes, 120)
    [found] = detector.detect([masked[0].image()[:60]])  # 96 x 60 pixels, and 192 x 120 of the input
    assert found.boxes[0].tolist() == box.tolist()
    assert found.masks is not None
    expected = paste_masks_in_image(shares, box[None], (60, 96))[0, 0].numpy() >= 0.5
    assert 100 < expected.sum() < 1500
    assert (decode(found.masks[0], (96, 60)) == expected).all()
    assert not decode(found.masks[1], (96, 60)).any()


def test_a_network_that_finds_nothing(masked: Dataset) -> None:
    network: Any = build(MODEL, 2, image_size=64, score_threshold=0.999)
    [found] = TorchvisionDetector(network, MODEL, masked.classes, 64).detect([masked[0].image()])
    assert len(found) == 0
    assert found.masks == ()


def test_through_the_api(masked: Dataset) -> None:
    """Trained and judged by masks; what a worker finds, and a file of results, have them."""
    settings: dict[str, Any] = {"image_size": 64, "batch_size": 2, "iterations": 2, "device": "cpu", "name": "masks"}
    trainer = detkit.Trainer(model=f"torchvision/{MODEL}", backbone="resnet18", best_metric="mask_AP", **settings)
    run = trainer.fit(masked, masked, weights="none", quiet=True)
    assert {"val/mask_AP", "val/mask_AP50", "val/loss_mask"} <= set(run.model.manifest.metrics)
    path = masked.paths[0]
    here, there = (detkit.Predictor(run, isolate=isolate, score_threshold=0.0) for isolate in (False, True))
    ours, theirs = here(path), there(path)
    here.close()
    there.close()
    assert len(ours) > 0
    assert ours.masks is not None
    assert ours.masks == theirs.masks
    assert ours.to_dict()["detections"][0]["mask"] == ours.masks[0]
    assert ours.masks[0]["size"] == [96, 96]  # type: ignore[call-overload]
    assert {"mask_AP", "mask_AP50"} <= set(dict(detkit.evaluate(run, masked, allow_seen=True)))
