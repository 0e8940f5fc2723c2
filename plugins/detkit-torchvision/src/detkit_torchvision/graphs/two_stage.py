"""Faster R-CNN and Mask R-CNN as graphs: a batch of images to their detections, suppression included."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align
from torchvision.ops.poolers import initLevelMapper

from detkit_torchvision.graphs.parts import Features, GridAnchors, best, decode, indices_along, laid_out, rows
from detkit_torchvision.graphs.suppression import suppress

_LEAST_PROPOSAL, _LEAST_BOX = 1e-3, 1e-2
"""Least width and height in pixels, as in torchvision's ``RegionProposalNetwork`` and ``RoIHeads``."""


class Proposals(nn.Module):
    """The region proposal network: the best boxes ``(b, p, 4)`` of each image, and their scores, 0 for none."""

    def __init__(self, rpn: Any) -> None:
        super().__init__()
        self.head, self.coder = rpn.head, rpn.box_coder
        self.anchors = GridAnchors(rpn.anchor_generator.cell_anchors)
        self.before, self.after = rpn.pre_nms_top_n(), rpn.post_nms_top_n()
        self.nms_threshold, self.score_threshold = rpn.nms_thresh, rpn.score_thresh

    def forward(self, features: list[Tensor], images: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        found_boxes, found_scores = [], []
        for level, outputs in enumerate(zip(*self.head(features), strict=True)):
            objectness, deltas = (one.permute(0, 2, 3, 1) for one in outputs)
            logits, places = best(objectness.flatten(1), self.before)
            anchors = self.anchors(level, features[level], images)[places]
            boxes = decode(self.coder, rows(deltas.reshape(deltas.shape[0], -1, 4), places), anchors)
            boxes = _clip(boxes, edges[:, None])
            scores = logits.sigmoid()
            kept = _at_least(boxes, _LEAST_PROPOSAL) & (scores >= self.score_threshold)
            found_boxes.append(boxes)
            found_scores.append(suppress(boxes, torch.where(kept, scores, 0.0), self.nms_threshold, self.after))
        scores, places = best(torch.cat(found_scores, dim=1), self.after)
        return rows(torch.cat(found_boxes, dim=1), places), scores


class Regions(nn.Module):
    """torchvision's ``MultiScaleRoIAlign``, which returns what it pools level after level."""

    def __init__(self, pool: Any, names: list[str], scales: list[float]) -> None:
        super().__init__()
        self.levels = [names.index(name) for name in pool.featmap_names if name in names]
        self.scales = [scales[level] for level in self.levels]
        finest, coarsest = (int(-math.log2(self.scales[end])) for end in (0, -1))
        self.level_of = initLevelMapper(finest, coarsest, pool.canonical_scale, pool.canonical_level)
        self.size, self.sampling_ratio = pool.output_size, pool.sampling_ratio

    def forward(self, features: list[Tensor], boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ``(1 + r, c, h, w)`` features of the valid boxes of ``(b, p, 4)``, and their places in ``b * p``.

        The first is of no box: layers, and those who run graphs, do not all take none.
        """
        images = indices_along(0, boxes[..., :1]).to(boxes.dtype)
        regions = torch.cat([images, boxes], dim=2).flatten(0, 1)
        levels = torch.where(valid.flatten(), self.level_of([regions[:, 1:]]), -1)
        found_places, found = [], [self.pooled(features, 0, regions[:1] * 0)]
        for index in range(len(self.levels)):
            places = (levels == index).nonzero()[:, 0]
            found_places.append(places)
            found.append(self.pooled(features, index, regions[places]))
        return torch.cat(found), torch.cat(found_places)

    def pooled(self, features: list[Tensor], index: int, regions: Tensor) -> Tensor:
        found: Tensor = roi_align(
            features[self.levels[index]], regions, self.size, self.scales[index], self.sampling_ratio
        )
        return found


class RcnnGraph(nn.Module):
    """Detections, ``max_detections`` of each image at most, label -1 for none; with masks where the network has them.

    It takes the images, and beside them the ``(b, 2)`` height and width of each without padding.
    """

    def __init__(self, network: Any, example: Tensor) -> None:
        super().__init__()
        self.features = Features(network.backbone, network.transform)
        self.proposals = Proposals(network.rpn)
        heads = network.roi_heads
        with torch.no_grad():
            found = network.backbone(example[:1].float())
        found = {"0": found} if isinstance(found, Tensor) else found
        scales = [2.0 ** round(math.log2(one.shape[-2] / example.shape[-2])) for one in found.values()]
        self.box_regions = Regions(heads.box_roi_pool, list(found), scales)
        self.box_head, self.box_predictor, self.coder = heads.box_head, heads.box_predictor, heads.box_coder
        self.score_threshold, self.nms_threshold = heads.score_thresh, heads.nms_thresh
        self.max_detections = heads.detections_per_img
        self.has_masks = heads.has_mask()
        if self.has_masks:
            self.mask_regions = Regions(heads.mask_roi_pool, list(found), scales)
            self.mask_head, self.mask_predictor = heads.mask_head, heads.mask_predictor

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        edges = sizes.flip(1).repeat(1, 2).to(torch.float32)
        features = self.features(images)
        proposals, objectness = self.proposals(features, images, edges)
        boxes, scores = self.refined(features, proposals, objectness > 0, edges)
        boxes, scores, labels = self.detections(boxes, scores)
        if not self.has_masks:
            return boxes, scores, labels
        return boxes, scores, labels, self.masks(features, boxes, labels)

    def refined(self, features: list[Tensor], proposals: Tensor, valid: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Return what becomes of each proposal as each class: boxes ``(b, c, p, 4)`` and scores ``(b, c, p)``."""
        pooled, places = self.box_regions(features, proposals, valid)
        logits, deltas = (outputs[1:] for outputs in self.box_predictor(self.box_head(pooled)))
        num_outputs = logits.shape[1]
        origins = proposals.flatten(0, 1)[places]
        owners = torch.div(places, valid.shape[1], rounding_mode="floor")
        boxes = self.coder.decode_single(deltas, origins).reshape(-1, num_outputs, 4)
        boxes = _clip(boxes, edges[owners][:, None])
        shares = logits.softmax(dim=-1)
        kept = _at_least(boxes, _LEAST_BOX) & (shares > self.score_threshold)
        shares = torch.where(kept, shares, 0.0)
        all_boxes, all_shares = (laid_out(one, places, valid)[:, :, 1:] for one in (boxes, shares))
        return all_boxes.transpose(1, 2), all_shares.transpose(1, 2)

    def detections(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        num_proposals = scores.shape[2]
        kept = suppress(boxes.flatten(0, 1), scores.flatten(0, 1), self.nms_threshold, self.max_detections)
        scores, places = best(kept.reshape(scores.shape).flatten(1), self.max_detections)
        labels = torch.where(scores > 0, torch.div(places, num_proposals, rounding_mode="floor"), -1)
        return rows(boxes.flatten(1, 2), places), scores, labels

    def masks(self, features: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return the ``(b, n, 1, m, m)`` masks of detections, in 0 to 1."""
        pooled, places = self.mask_regions(features, boxes, labels >= 0)
        logits = self.mask_predictor(self.mask_head(pooled))[1:]
        side = logits.shape[-1]
        outputs = (labels.flatten()[places] + 1)[:, None, None, None].expand(-1, 1, side, side)
        masks: Tensor = laid_out(logits.gather(1, outputs).sigmoid(), places, labels)
        return masks


def _clip(boxes: Tensor, edges: Tensor) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), edges)


def _at_least(boxes: Tensor, side: float) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0] >= side) & (boxes[..., 3] - boxes[..., 1] >= side)
