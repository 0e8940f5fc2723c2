"""Every model of the family trains a step, is saved, opened again and detects, in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import to_builtins
from msgspec.structs import replace as changed
from safetensors.torch import load_file

from detkit.backends import PredictOptions
from detkit.data import Dataset
from detkit.formats.checks import prepare
from detkit.job import Job, Model, Workspace
from detkit_torchvision.copying import copy_by_name, head_rows
from detkit_torchvision.engine import TorchvisionEngine, Training
from detkit_torchvision.models import MODELS, build
from detkit_torchvision.params import MODELS as SPECS
from detkit_torchvision.params import TorchvisionOptions

SMALL = {"ssdlite320_mobilenet_v3_large": 320, "ssd300_vgg16": 300}
"""Input sizes of models that cannot have 64 pixels."""


def make_job(model: str, data: Dataset, **settings: Any) -> Job:
    size = SMALL.get(model, 64)
    quick = {"iterations": 1, "epochs": None, "batch_size": 2, "image_size": size, "weights": None}
    params = changed(SPECS[model].params, **{**quick, "max_detections": 100, **settings})
    return Job(
        backend="torchvision",
        engine="detkit_torchvision.engine:TorchvisionEngine",
        model=model,
        params=to_builtins(params),
        options=to_builtins(TorchvisionOptions(device="cpu")),
        classes=list(data.classes),
    )


def lay_out(folder: Path, job: Job, data: Dataset) -> Workspace:
    workspace = Workspace(folder)
    workspace.create(job)
    ready = prepare(data, on_invalid="raise")
    for channel in ("train", "validation"):
        workspace.write_dataset(channel, ready.data, ready.image_digests)
    return workspace


@pytest.mark.parametrize("model", sorted(MODELS))
def test_train_save_open_detect(model: str, tiny: Dataset, tmp_path: Path) -> None:
    settings = {"batch_size": 1} if model == "ssd300_vgg16" else {}  # its 300 pixels take long
    job = make_job(model, tiny[:2], **settings)
    workspace = lay_out(tmp_path / "run", job, tiny[:2])
    trained = TorchvisionEngine().train(job, workspace)
    workspace.finish(job, trained, started=0.0)
    opened = Model(workspace.model)
    detector = TorchvisionEngine().load(opened, PredictOptions(device="cpu", max_detections=7))
    images = [tiny[0].image(), tiny[1].image()[:50]]
    found = detector.detect(images)
    for one, image in zip(found, images, strict=True):
        assert (one.height, one.width) == image.shape[:2]
        assert len(one) <= 7
        assert one.boxes.dtype == np.float64
        assert np.isfinite(one.boxes).all()
        assert (np.diff(one.scores) <= 0).all()
        assert set(one.names) <= set(tiny.classes)
    detector.close()


@pytest.mark.parametrize("model", sorted(MODELS))
def test_classes_are_copied_by_name(model: str) -> None:
    """Rows follow their class's name into another order, a new class keeps its fresh rows, a lost one is dropped."""
    size = SMALL.get(model, 64)
    torch.manual_seed(0)
    old = build(model, 3, image_size=size)
    for parameter in old.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    torch.manual_seed(1)
    new = build(model, 3, image_size=size)
    fresh = {name: value.clone() for name, value in new.state_dict().items()}
    report = copy_by_name(model, new, old.state_dict(), ["a", "b", "c"], ["c", "d", "a"])
    assert (report.kept, report.new, report.dropped, report.skipped) == (["c", "a"], ["d"], ["b"], [])
    offset = MODELS[model].label_offset
    for name, value in new.state_dict().items():
        if name not in head_rows(new):
            assert torch.equal(value, old.state_dict()[name])
            continue
        rows = head_rows(new)[name]
        now, before, begun = (
            state[name].view(-1, 3 + offset, rows, *value.shape[1:])
            for state in (new.state_dict(), old.state_dict(), fresh)
        )
        assert torch.equal(now[:, offset], before[:, 2 + offset])
        assert torch.equal(now[:, 2 + offset], before[:, offset])
        assert torch.equal(now[:, 1 + offset], begun[:, 1 + offset])
        assert torch.equal(now[:, :offset], before[:, :offset])


@pytest.mark.parametrize(("model", "num_images", "iterations"), [("fcos_tiny", 8, 6), ("retinanet_resnet50_fpn", 6, 3)])
def test_interrupted_step_by_step(model: str, num_images: int, iterations: int, tiny: Dataset, tmp_path: Path) -> None:
    """Training that stops and resumes in the middle of an epoch ends with the very same weights."""
    data = tiny[:num_images]
    every_change = ("hflip", "zoom", "color", "vflip", "mosaic")
    settings = {"checkpoint_every": "2 iterations", "augmentations": every_change, "ema_decay": 0.9}
    whole = make_job(model, data, iterations=iterations, **settings)
    lay = lay_out(tmp_path / "whole", whole, data)
    TorchvisionEngine().train(whole, lay)
    cut = lay_out(tmp_path / "cut", whole, data)
    training = Training(whole, cut)
    training.prepare()
    for step in training.steps():
        if step == 3:  # one step after the checkpoint, which the resume has to repeat
            break
    workers = replace_option(whole, num_workers=2)
    TorchvisionEngine().train(workers, cut)
    left, right = (load_file(w.model / "weights.safetensors") for w in (lay, cut))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def replace_option(job: Job, **options: Any) -> Job:
    return changed(job, options={**job.options, **options})


def test_images_without_boxes_train(tiny: Dataset, tmp_path: Path) -> None:
    empty = tiny.keep_boxes(np.zeros(len(tiny.boxes), dtype=bool))
    mixed = Dataset.from_samples(
        tiny.classes, [tiny[0], *(replace(s, image_id=f"e{i}.png") for i, s in enumerate(empty))]
    )
    for model in ("ssd_tiny", "fcos_tiny", "fasterrcnn_mobilenet_v3_large_320_fpn"):
        job = make_job(model, mixed, iterations=3)
        TorchvisionEngine().train(job, lay_out(tmp_path / model, job, mixed))


def test_a_batch_without_boxes_has_losses() -> None:
    """As above, and quicker, for a network whose loss of boxes is another one: the GIoU."""
    network = build("retinanet_resnet50_fpn_v2", 2, image_size=64).train()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = network([torch.zeros(3, 64, 64, dtype=torch.uint8)] * 2, [nothing] * 2)
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
