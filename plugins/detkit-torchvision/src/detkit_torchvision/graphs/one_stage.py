"""SSD, RetinaNet and FCOS as graphs: a batch of images to the candidates that torchvision gives to suppression."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from detkit_torchvision.graphs.parts import Features, GridAnchors, best, decode, indices_along, rows


class SsdGraph(nn.Module):
    """The best ``topk_candidates`` of each class, one class after the other. Images have one size."""

    anchors: Tensor

    def __init__(self, network: Any, example: Tensor) -> None:
        super().__init__()
        self.features, self.head = Features(network.backbone, network.transform), network.head
        self.coder, self.candidates = network.box_coder, network.topk_candidates
        pixels = example[:1].float()
        with torch.no_grad():
            levels = self.features(pixels)
        size = (example.shape[-2], example.shape[-1])
        self.register_buffer("anchors", network.anchor_generator(ImageList(pixels, [size]), levels)[0])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = self.head(self.features(images))
        shares = outputs["cls_logits"].softmax(dim=-1)[..., 1:]
        boxes = decode(self.coder, outputs["bbox_regression"], self.anchors.expand(shares.shape[0], -1, -1))
        scores, anchors = best(shares.transpose(1, 2), self.candidates)
        labels = indices_along(1, anchors)
        return rows(boxes, anchors.flatten(1)), scores.flatten(1), labels.flatten(1)


class LevelsGraph(nn.Module):
    """The best ``topk_candidates`` of each level, whatever their classes."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.features, self.head = Features(network.backbone, network.transform), network.head
        self.anchors = GridAnchors(network.anchor_generator.cell_anchors)
        self.coder, self.candidates = network.box_coder, network.topk_candidates

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.features(images)
        outputs = self.head(features)
        split = {name: self.anchors.split(output, features) for name, output in outputs.items()}
        found = []
        for level, feature in enumerate(features):
            outputs = {name: outputs[level] for name, outputs in split.items()}
            num_classes = outputs["cls_logits"].shape[-1]
            scores, places = self.scored(outputs)
            points = torch.div(places, num_classes, rounding_mode="floor")
            anchors = self.anchors(level, feature, images)[points]
            boxes = self.decoded(rows(outputs["bbox_regression"], points), anchors)
            found.append((boxes, scores, places % num_classes))
        boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return boxes, scores, labels

    @abstractmethod
    def scored(self, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the best scores of a level, and their places in points times classes."""

    @abstractmethod
    def decoded(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Return boxes ``(b, k, 4)``."""


class RetinaNetGraph(LevelsGraph):
    """RetinaNet."""

    def scored(self, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits, places = best(outputs["cls_logits"].flatten(1), self.candidates)
        return logits.sigmoid(), places

    def decoded(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        return decode(self.coder, deltas, anchors)


class FcosGraph(LevelsGraph):
    """FCOS, and `detkit_torchvision.alignment.AlignedFCOS`."""

    def scored(self, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        shares = outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid()
        found: tuple[Tensor, Tensor] = best(shares.sqrt().flatten(1), self.candidates)
        return found

    def decoded(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        boxes: Tensor = self.coder.decode(deltas, anchors)
        return boxes
