"""FCOS that learns each object from the points that predict it best, instead of from those near its centre."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.models.detection.fcos import FCOS
from torchvision.ops import generalized_box_iou_loss

POINTS_PER_OBJECT = 13
SCORE_POWER, IOU_POWER = 1.0, 6.0
"""Candidates of an object, and alpha and beta of the alignment, as in TOOD, section 3.2 and its configuration."""

BOX_WEIGHT = 2.0
"""Weight of the boxes' loss beside the classes', as in TOOD's configuration."""


class Assignment(NamedTuple):
    """Which points of a batch learn which object, by image and then by point."""

    images: Tensor
    """``(f,)`` indices of images."""
    points: Tensor
    """``(f,)`` indices of an image's points."""
    objects: Tensor
    """``(f,)`` the object of each, counted through the batch."""
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
        points = (anchors[0][:, :2] + anchors[0][:, 2:]) / 2  # those of every image, as a batch has one size
        chosen = assign(logits.detach().sigmoid(), boxes.detach(), points, targets)
        where = (chosen.images, chosen.points)
        labels, true = (torch.cat([target[name] for target in targets])[chosen.objects] for name in ("labels", "boxes"))
        found, quality = boxes[where], chosen.quality
        wanted = torch.zeros_like(logits)
        wanted[(*where, labels)] = quality
        total = quality.sum().clamp(min=1.0)
        hardness = (logits.sigmoid() - wanted).abs() ** 2  # quality focal loss: Li et al., 2020, with its beta of 2
        classification = hardness * binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        overlap = _paired_iou(found.detach(), true)
        return {
            "classification": classification.sum() / total,
            "bbox_regression": BOX_WEIGHT * (quality * generalized_box_iou_loss(found, true)).sum() / total,
            "bbox_iou": binary_cross_entropy_with_logits(ious[where][:, 0], overlap, reduction="sum")
            / max(1, len(found)),
        }


@torch.no_grad()
def assign(scores: Tensor, boxes: Tensor, points: Tensor, targets: Sequence[dict[str, Tensor]]) -> Assignment:
    """Choose the points that learn each object of a batch.

    ``scores`` are ``(b, p, classes)`` in 0 to 1, ``boxes`` ``(b, p, 4)`` xyxy and ``points`` ``(p, 2)`` in pixels. An
    object that holds no point wants the nearest one; a point that several objects want learns the one that it overlaps
    most.
    """
    num_points, device = len(points), boxes.device
    true, labels = (torch.cat([target[name] for target in targets]) for name in ("boxes", "labels"))
    counts = torch.tensor([len(target["labels"]) for target in targets], device=device)
    image = torch.arange(len(targets), device=device).repeat_interleave(counts)
    x, y = points[:, 0], points[:, 1]
    x0, y0, x1, y1 = (side[:, None] for side in true.unbind(1))
    inside = (x > x0) & (y > y0) & (x < x1) & (y < y1)
    if len(empty := (~inside.any(dim=1)).nonzero()[:, 0]):
        inside[empty, torch.cdist((true[empty, :2] + true[empty, 2:]) / 2, points).argmin(dim=1)] = True

    # Only pairs of an object and a point inside it are looked at: a small part of all.
    pairs = wanting, point = inside.nonzero(as_tuple=True)
    overlaps = _paired_iou(boxes[image[wanting], point], true[wanting])
    fits = scores[image[wanting], point, labels[wanting]] ** SCORE_POWER * overlaps**IOU_POWER
    fit, overlap = (values.new_full(inside.shape, -1.0).index_put_(pairs, values) for values in (fits, overlaps))
    best = fit.topk(min(POINTS_PER_OBJECT, num_points), dim=1)
    wanting, rank = (best.values >= 0).nonzero(as_tuple=True)
    point = best.indices[wanting, rank]

    place = image[wanting] * num_points + point
    wins = overlap[wanting, point] == _maximum(overlap[wanting, point], place, len(boxes) * num_points)[place]
    owner = place.new_full((len(boxes) * num_points,), len(true))
    owner.scatter_reduce_(0, place[wins], wanting[wins], "amin")  # of equal ones the first
    chosen = (owner < len(true)).nonzero()[:, 0]
    objects, point = owner[chosen], chosen % num_points
    fits, overlaps = fit[objects, point], overlap[objects, point]
    best_fit, best_overlap = (_maximum(values, objects, len(true)) for values in (fits, overlaps))
    quality = fits / (best_fit[objects] + 1e-9) * best_overlap[objects]
    return Assignment(chosen // num_points, point, objects, quality)


def _maximum(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Return the largest value of each group, 0 for an empty one; values are at least 0."""
    return values.new_zeros(num_groups).scatter_reduce(0, groups, values, "amax")


def _paired_iou(found: Tensor, true: Tensor) -> Tensor:
    """Return the ``(n,)`` IoU of each box with the one in its place."""
    shared = (torch.minimum(found[:, 2:], true[:, 2:]) - torch.maximum(found[:, :2], true[:, :2])).clamp(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (found, true)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-7)
