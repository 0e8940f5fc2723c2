"""FCOS that learns each object from the points that predict it best, instead of from those near its centre."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.models.detection.fcos import FCOS
from torchvision.ops import box_iou, generalized_box_iou_loss

POINTS_PER_OBJECT = 13
SCORE_POWER, IOU_POWER = 1.0, 6.0
"""Candidates of an object, and alpha and beta of the alignment, as in TOOD, section 3.2 and its configuration."""

BOX_WEIGHT = 2.0
"""Weight of the boxes' loss beside the classes', as in TOOD's configuration."""


class Assignment(NamedTuple):
    """Which points of an image learn which object."""

    points: Tensor
    """``(f,)`` indices of points."""
    objects: Tensor
    """``(f,)`` the object of each."""
    quality: Tensor
    """``(f,)`` how well it predicts the object beside the object's other points: the class score to reach, 0 to 1."""


class AlignedFCOS(FCOS):  # type: ignore[misc]  # torchvision has no types
    """torchvision's FCOS with another loss: task-aligned assignment, after Feng et al., "TOOD" (2021).

    An object is learned by the points inside it whose class score and box fit it best already, on whatever level; a
    point's class score is to become as high as its fit. What torchvision calls centerness is the IoU of the box here
    (Wu et al., "IoU-aware single-stage object detector", 2020), as a box is ranked by both.
    """

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        num_anchors_per_level: list[int],
    ) -> dict[str, Tensor]:
        logits, offsets, ious = (
            head_outputs[name].float() for name in ("cls_logits", "bbox_regression", "bbox_ctrness")
        )
        boxes = self.head.box_coder.decode(offsets, torch.stack(anchors))
        wanted = torch.zeros_like(logits)
        found_boxes, true_boxes, found_ious, qualities = [], [], [], []
        for index, (target, anchor) in enumerate(zip(targets, anchors, strict=True)):
            points = (anchor[:, :2] + anchor[:, 2:]) / 2
            chosen = assign(logits[index].detach().sigmoid(), boxes[index].detach(), points, target)
            wanted[index, chosen.points, target["labels"][chosen.objects]] = chosen.quality
            found_boxes.append(boxes[index, chosen.points])
            true_boxes.append(target["boxes"][chosen.objects])
            found_ious.append(ious[index, chosen.points, 0])
            qualities.append(chosen.quality)
        found, true, quality = torch.cat(found_boxes), torch.cat(true_boxes), torch.cat(qualities)
        total = quality.sum().clamp(min=1.0)
        hardness = (logits.sigmoid() - wanted).abs() ** 2  # quality focal loss: Li et al., 2020, with its beta of 2
        classification = hardness * binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        overlap = _paired_iou(found.detach(), true)
        return {
            "classification": classification.sum() / total,
            "bbox_regression": BOX_WEIGHT * (quality * generalized_box_iou_loss(found, true)).sum() / total,
            "bbox_iou": binary_cross_entropy_with_logits(torch.cat(found_ious), overlap, reduction="sum")
            / max(1, len(found)),
        }


@torch.no_grad()
def assign(scores: Tensor, boxes: Tensor, points: Tensor, target: dict[str, Tensor]) -> Assignment:
    """Choose the points that learn each object of an image.

    ``scores`` are ``(p, classes)`` in 0 to 1, ``boxes`` ``(p, 4)`` xyxy and ``points`` ``(p, 2)`` in pixels. An object
    that holds no point wants the nearest one; a point that several objects want learns the one that it overlaps most.
    """
    true, labels = target["boxes"], target["labels"]
    if not len(true):
        nothing = torch.zeros(0, dtype=torch.int64, device=boxes.device)
        return Assignment(nothing, nothing, boxes.new_zeros(0))
    iou = box_iou(boxes, true)
    alignment = scores[:, labels] ** SCORE_POWER * iou**IOU_POWER
    inside = torch.cat([points[:, None] - true[:, :2], true[:, 2:] - points[:, None]], dim=2).amin(dim=2) > 0
    best = alignment.masked_fill(~inside, -1.0).topk(min(POINTS_PER_OBJECT, len(points)), dim=0)
    candidate = torch.zeros_like(inside).scatter_(0, best.indices, best.values >= 0)
    nearest = torch.cdist(points, (true[:, :2] + true[:, 2:]) / 2).argmin(dim=0)
    candidate[nearest, torch.arange(len(true), device=true.device)] |= ~candidate.any(dim=0)
    overlap, owner = iou.masked_fill(~candidate, -1.0).max(dim=1)
    chosen = (overlap >= 0).nonzero()[:, 0]
    owner, overlap = owner[chosen], overlap[chosen]
    fit = alignment[chosen, owner]
    best_fit, best_overlap = (_maximum(values, owner, len(true)) for values in (fit, overlap))
    return Assignment(chosen, owner, fit / (best_fit[owner] + 1e-9) * best_overlap[owner])


def _maximum(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Return the largest value of each group, 0 for an empty one."""
    return values.new_zeros(num_groups).scatter_reduce(0, groups, values, "amax")


def _paired_iou(found: Tensor, true: Tensor) -> Tensor:
    """Return the ``(n,)`` IoU of each box with the one in its place."""
    shared = (torch.minimum(found[:, 2:], true[:, 2:]) - torch.maximum(found[:, :2], true[:, :2])).clamp(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (found, true)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-7)
