"""Every model of the family trains a step, is saved, opened again and detects, in this process."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import SMALL, lay_out, make_job, replace_option
from safetensors.torch import load_file

from detkit.backends import PredictOptions
from detkit.data import Dataset, Sample
from detkit.job import Model, Workspace
from detkit.masks import decode
from detkit_torchvision.architecture import Architecture, anchor_ratios, anchor_sizes
from detkit_torchvision.copying import copy_by_name, head_rows
from detkit_torchvision.engine import TorchvisionEngine
from detkit_torchvision.freezing import stages
from detkit_torchvision.models import MODELS, build, chosen_architecture
from detkit_torchvision.training import Training


@pytest.mark.parametrize("model", sorted(MODELS))
def test_train_resume_save_open_detect(model: str, masked: Dataset, tmp_path: Path) -> None:
    """Two steps, the second of them once more from the checkpoint after the first, end with the same weights."""
    data = masked[:2]
    settings = {"batch_size": 1} if model == "ssd300_vgg16" else {}  # its 300 pixels take long
    job = make_job(model, data, iterations=2, checkpoint_every="1 iteration", **settings)
    workspace = lay_out(tmp_path / "run", job, data)
    shutil.rmtree(workspace.channel("validation"))  # no copy of the best weights makes checkpoints smaller
    trained = TorchvisionEngine().train(job, workspace)
    assert all(np.isfinite(value) for value in trained.metrics.values())
    whole = load_file(workspace.model / "weights.safetensors")
    newest = max(workspace.checkpoints.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    newest.unlink()
    trained = TorchvisionEngine().train(job, workspace)
    resumed = load_file(workspace.model / "weights.safetensors")
    assert any("resumed after step 1 of 2" in str(event["values"]) for event in events(workspace))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    workspace.finish(job, trained, started=0.0)
    detector = TorchvisionEngine().load(Model(workspace.model), PredictOptions(device="cpu", max_detections=7))
    images = [data[0].image(), data[1].image()[:50]]
    found = detector.detect(images)
    for one, image in zip(found, images, strict=True):
        assert (one.height, one.width) == image.shape[:2]
        assert len(one) <= 7
        assert one.boxes.dtype == np.float64
        assert np.isfinite(one.boxes).all()
        assert (np.diff(one.scores) <= 0).all()
        assert set(one.names) <= set(data.classes)
        assert (one.masks is not None) == MODELS[model].masks
        assert all(decode(mask, (one.width, one.height)).shape == image.shape[:2] for mask in one.masks or ())
    detector.close()


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_step_in_bf16_with_a_frozen_stage(model: str, masked: Dataset, tmp_path: Path) -> None:
    settings = {"iterations": 2, "checkpoint_every": "9 iterations"}
    batch_size = 1 if model == "ssd300_vgg16" else 2  # its 300 pixels take long; norms of 1 x 1 pixels need two images
    job = make_job(model, masked[:2], batch_size=batch_size, frozen_stages=1, amp="bf16", **settings)
    training = Training(job, lay_out(tmp_path / "run", job, masked[:2]))
    training.validation = None
    training.prepare()
    first, *later = stages(training.network)
    before = [[value.clone() for part in stage for value in part.state_dict().values()] for stage in (first, later[-1])]
    for _ in training.steps():
        break
    after = [[value for part in stage for value in part.state_dict().values()] for stage in (first, later[-1])]
    assert all(torch.equal(old, new) for old, new in zip(before[0], after[0], strict=True))
    moved = any(not torch.equal(old, new) for old, new in zip(before[1], after[1], strict=True))
    assert moved or training.steps_left_out
    assert all(value.isfinite().all() for value in training.network.state_dict().values())


@pytest.mark.parametrize(
    ("model", "backbone"),
    [
        ("fasterrcnn_resnet50_fpn", "resnet34"),
        ("fasterrcnn_resnet50_fpn", "resnext50_32x4d"),
        ("fasterrcnn_resnet50_fpn", "mobilenet_v3_large"),
        ("fasterrcnn_resnet50_fpn_v2", "resnet18"),
        ("fasterrcnn_mobilenet_v3_large_fpn", "resnet18"),
        ("maskrcnn_resnet50_fpn_v2", "mobilenet_v3_small"),
        ("retinanet_resnet50_fpn", "mobilenet_v2"),
        ("retinanet_resnet50_fpn_v2", "resnet18"),
        ("fcos_resnet50_fpn", "mobilenet_v3_small"),
    ],
)
def test_other_backbones(model: str, backbone: str) -> None:
    """The pyramid keeps the model's strides whatever it stands on, so each level has its anchors."""
    network: Any = build(model, 2, image_size=64, architecture=Architecture(backbone=backbone)).eval()
    own: Any = build(model, 2, image_size=64).eval()
    with torch.inference_mode():
        levels, expected = (one.backbone(torch.zeros(1, 3, 128, 128)) for one in (network, own))
        network([torch.zeros(3, 64, 64, dtype=torch.uint8)])
    if "mobilenet" not in model:
        assert {name: level.shape for name, level in levels.items()} == {
            n: level.shape for n, level in expected.items()
        }
    assert len(levels) == len(expected)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert len(stages(network)) == 5


def test_no_activation_makes_autograd_copy_what_it_was_given() -> None:
    """As hard swish does in place: its gradient needs what came in."""
    network: Any = build("ssdlite320_mobilenet_v3_large", 2, image_size=320).train()
    images = torch.zeros(2, 3, 320, 320, dtype=torch.uint8)
    boxes = [{"boxes": torch.tensor([[4.0, 4.0, 90.0, 90.0]]), "labels": torch.tensor([1])}] * 2
    with torch.profiler.profile() as profile:
        network(images, boxes)
    called = {event.key for event in profile.key_averages()}
    assert "aten::hardswish" in called
    assert "aten::hardswish_" not in called


def test_architecture_is_kept_with_the_model(masked: Dataset, tmp_path: Path) -> None:
    """Numbers that ``auto`` took from the boxes are told, recorded, and used where the model is opened."""
    auto = {"anchor_sizes": "auto", "anchor_ratios": "auto", "proposals": "auto", "backbone": "resnet18"}
    job = make_job("fasterrcnn_resnet50_fpn", masked, image_size=192, **auto)
    workspace = lay_out(tmp_path / "run", job, masked)
    trained = TorchvisionEngine().train(job, workspace)
    sides = np.sort(2 * np.sqrt((masked.boxes[:, 2:] - masked.boxes[:, :2]).prod(axis=1)))  # 96 pixels become 192
    sizes, ratios = trained.native["anchor_sizes"], trained.native["anchor_ratios"]
    assert sides[0] - 1 <= sizes[0] < sizes[1] < sizes[2] < sizes[3] < sizes[4]
    assert abs(sizes[0] - np.quantile(sides, 0.1)) <= 0.5
    assert ratios == [1, 1, 1]  # discs and squares
    assert (trained.native["backbone"], trained.native["proposals"]) == ("resnet18", 1000)
    told = [str(event["values"]["message"]) for event in events(workspace) if event["kind"] == "log"]
    assert [line for line in told if "anchor_sizes=" in line and "proposals=1000" in line]
    workspace.finish(job, trained, started=0.0)
    network: Any = TorchvisionEngine().load(Model(workspace.model), PredictOptions(device="cpu"))._network
    assert network.rpn.anchor_generator.sizes == tuple((size,) for size in sizes)
    assert network.rpn.anchor_generator.aspect_ratios == ((1, 1, 1),) * 5


def events(workspace: Workspace) -> list[dict[str, Any]]:
    return [json.loads(line) for line in workspace.metrics_file.read_text().splitlines()]


def test_anchors_of_the_training_boxes() -> None:
    sides = np.geomspace(10, 640, 101)[:, None] * [1, 2]
    boxes = np.concatenate([np.zeros((101, 2)), sides], axis=1)
    assert anchor_sizes(boxes) == tuple(float(round(sides[row, 0] * 2**0.5)) for row in (10, 30, 50, 70, 90))
    assert anchor_ratios(boxes) == (2, 2, 2)
    alike = anchor_sizes(boxes[:1])  # all of one size: a third of an octave apart
    assert alike == (14, 18, 23, 29, 37)
    assert anchor_sizes(boxes[:1] / 100) == (4, 6, 8, 11, 14)


def test_chosen_anchors_and_proposals() -> None:
    sizes, ratios = (8.0, 16.0, 24.0, 48.0, 96.0), (0.5, 2.0)
    chosen = Architecture(anchor_sizes=sizes, anchor_ratios=ratios, proposals=5000)
    network: Any = build("fasterrcnn_resnet50_fpn", 2, image_size=64, architecture=chosen)
    assert network.rpn.anchor_generator.sizes == tuple((size,) for size in sizes)
    assert network.rpn.head.cls_logits.out_channels == 2
    assert set(network.rpn._pre_nms_top_n.values()) == set(network.rpn._post_nms_top_n.values()) == {5000}
    network = build("fasterrcnn_mobilenet_v3_large_320_fpn", 2, image_size=64, architecture=chosen)
    assert network.rpn.anchor_generator.sizes == (sizes,) * 3
    fewer = replace(chosen, anchor_ratios=(), proposals=300)
    network = build("fasterrcnn_resnet50_fpn_v2", 2, image_size=64, max_detections=400, architecture=fewer)
    assert network.rpn._pre_nms_top_n == {"training": 2000, "testing": 400}  # detections cannot outnumber them
    network = build("retinanet_resnet50_fpn", 2, image_size=64, architecture=replace(fewer, proposals=None))
    assert network.anchor_generator.sizes[1] == (16, 20, 25)
    many = Dataset.from_samples(
        ["a"], [Sample(path="a.png", width=99, height=99, boxes=np.tile([0, 0, 9, 9], (130, 1)), names=("a",) * 130)]
    )
    params = {"backbone": None, "anchor_sizes": (), "anchor_ratios": (), "proposals": "auto"}
    assert chosen_architecture("fasterrcnn_resnet50_fpn", params, 99, many).proposals == 1300


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
