"""Which points learn which object, and losses that fall as boxes and scores come nearer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detkit_torchvision.alignment import POINTS_PER_OBJECT, AlignedFCOS, Assignment, assign
from detkit_torchvision.models import build

GRID = torch.cartesian_prod(torch.arange(4.0, 64, 8), torch.arange(4.0, 64, 8)).flip(1)
"""Points of a level with a stride of 8, row by row, as ``(64, 2)`` x and y."""


def target(boxes: list[list[float]], labels: list[int]) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}


def choose(boxes: Tensor, truth: dict[str, Tensor], scores: Tensor | None = None) -> Assignment:
    scores = torch.full((len(GRID), 3), 0.5) if scores is None else scores
    return assign(scores[None], boxes[None], GRID, [truth])


def test_points_inside_that_fit_best() -> None:
    truth = target([[0, 0, 40, 40]], [1])
    noise = torch.from_numpy(np.random.default_rng(0).uniform(0, 20, (64, 1))).float()
    boxes = torch.tensor([0.0, 0, 40, 40]) + noise * torch.tensor([1.0, 1, 0, 0])
    chosen = choose(boxes, truth)
    assert len(chosen.points) == POINTS_PER_OBJECT
    inside = [i for i, (x, y) in enumerate(GRID.tolist()) if x < 40 and y < 40]
    expected = sorted(inside, key=lambda i: float(noise[i]))[:POINTS_PER_OBJECT]
    assert sorted(chosen.points.tolist()) == sorted(expected)
    iou = box_iou(boxes, truth["boxes"])[:, 0]
    assert chosen.quality.max() == pytest.approx(float(iou[expected].max()))
    by_fit = chosen.quality[torch.argsort(iou[chosen.points])]
    assert (by_fit.diff() >= 0).all()


def test_of_equal_boxes_the_higher_score() -> None:
    truth = target([[0, 0, 64, 64]], [2])
    scores = torch.zeros(64, 3)
    scores[:, 2] = torch.linspace(0.1, 0.9, 64)
    scores[:, 0] = 0.95
    chosen = choose(torch.tensor([[0.0, 0, 60, 60]]).repeat(64, 1), truth, scores)
    assert sorted(chosen.points.tolist()) == list(range(64 - POINTS_PER_OBJECT, 64))


def test_an_object_between_points_gets_the_nearest() -> None:
    truth = target([[5, 5, 11, 11], [0, 0, 64, 64]], [0, 1])
    chosen = choose(torch.tensor([[0.0, 0, 30, 30]]).repeat(64, 1), truth)
    [point] = chosen.points[chosen.objects == 0].tolist()
    assert GRID[point].tolist() in ([4, 4], [4, 12], [12, 4], [12, 12])


def test_a_point_learns_the_object_that_it_overlaps_most() -> None:
    truth = target([[0, 0, 24, 24], [0, 0, 24, 32]], [0, 0])
    boxes = truth["boxes"][torch.arange(64) % 2]
    chosen = choose(boxes, truth)
    assert sorted(chosen.points.tolist()) == [8 * row + column for row in range(4) for column in range(3)]
    for point, chose in zip(chosen.points.tolist(), chosen.objects.tolist(), strict=True):
        assert chose == (1 if point >= 24 else point % 2), "the last row lies in the second alone"


def test_no_objects() -> None:
    chosen = choose(torch.zeros(64, 4), target([], []))
    assert [len(part) for part in chosen] == [0, 0, 0, 0]


def test_a_batch_is_its_images() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(3, 64, 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + 4 + torch.rand(3, 64, 2, generator=generator) * 40], dim=2)
    scores = torch.rand(3, 64, 3, generator=generator)
    truths = [
        target([[0, 0, 40, 40], [5, 5, 11, 11], [0, 0, 64, 30]], [1, 0, 1]),
        target([], []),
        target([[20, 8, 60, 60], [20, 8, 60, 61]], [2, 0]),
    ]
    whole = assign(scores, boxes, GRID, truths)
    first_object = 0
    for image, truth in enumerate(truths):
        own = assign(scores[image : image + 1], boxes[image : image + 1], GRID, [truth])
        rows = whole.images == image
        assert whole.points[rows].tolist() == own.points.tolist()
        assert (whole.objects[rows] - first_object).tolist() == own.objects.tolist()
        assert torch.allclose(whole.quality[rows], own.quality, rtol=1e-6)
        first_object += len(truth["labels"])
    assert first_object == 5 and len(whole.points)


def test_losses_fall_as_predictions_come_nearer() -> None:
    network = build("fcos_tiny", 3, image_size=64)
    assert isinstance(network, AlignedFCOS)
    image = torch.zeros(1, 3, 64, 64)
    features = list(network.backbone(image).values())
    head = network.head(features)
    anchors = network.anchor_generator(network.transform([torch.zeros(3, 64, 64, dtype=torch.uint8)])[0], features)
    truth = target([[8, 8, 56, 56]], [1])
    numbers = [feature.shape[-1] * feature.shape[-2] for feature in features]
    points = (anchors[0][:, :2] + anchors[0][:, 2:]) / 2
    inside = ((points > 8) & (points < 56)).all(dim=1).nonzero()[:POINTS_PER_OBJECT, 0]

    def losses(shift: float, logit: float) -> dict[str, Tensor]:
        boxes = (truth["boxes"] + shift).expand(len(anchors[0]), 4)
        logits = torch.full_like(head["cls_logits"], -6.0)
        logits[0, inside, 1] = logit
        offsets = network.head.box_coder.encode(anchors[0], boxes)[None]
        ious = torch.full_like(head["bbox_ctrness"], 6.0)
        predicted = {"cls_logits": logits, "bbox_regression": offsets, "bbox_ctrness": ious}
        return network.compute_loss([truth], predicted, anchors, numbers)

    before, after = losses(12.0, -1.0), losses(0.0, 6.0)
    assert set(after) == set(before) == {"classification", "bbox_regression", "bbox_iou"}
    assert all(after[name] < 0.2 * before[name] for name in before), (before, after)
    assert after["bbox_regression"] < 1e-3
