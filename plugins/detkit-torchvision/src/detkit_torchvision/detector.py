"""An opened network: images in, detections out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detkit.detections import Detections
from detkit.images import Image
from detkit.masks import encode
from detkit_torchvision.batches import resize
from detkit_torchvision.models import MODELS, final_size

_IN_MASK = 0.5
"""Share from which a pixel is the object's, as torchvision's documentation has it."""


class TorchvisionDetector:
    """An opened network; also what validation uses while it trains."""

    def __init__(self, network: Any, model: str, classes: Sequence[str], image_size: int) -> None:
        self._network, self._model, self._classes = network, model, tuple(classes)
        self._image_size = image_size

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        sizes = [(image.shape[1], image.shape[0]) for image in images]
        inputs = [
            resize(image, *final_size(self._model, self._image_size, *size))
            for image, size in zip(images, sizes, strict=True)
        ]
        return self.detect_inputs(inputs, sizes)

    @torch.inference_mode()
    def detect_inputs(self, inputs: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Detect on uint8 images that have the network's input size; ``sizes`` are the original width and height."""
        self._network.eval()
        offset = MODELS[self._model].label_offset
        found = []
        for result, tensor, (width, height) in zip(self._network(list(inputs)), inputs, sizes, strict=True):
            scale = np.array([width / tensor.shape[-1], height / tensor.shape[-2]] * 2)
            boxes = result["boxes"].double().cpu().numpy() * scale
            scores = result["scores"].double().cpu().numpy()
            order = np.argsort(-scores, kind="stable")
            masks = None
            if "masks" in result:
                masks = _encoded(result["masks"].float().cpu()[order], torch.from_numpy(boxes[order]), width, height)
            found.append(
                Detections(
                    path="",
                    width=width,
                    height=height,
                    classes=self._classes,
                    boxes=np.clip(boxes, 0, [width, height, width, height])[order],
                    labels=(result["labels"].cpu().numpy() - offset)[order],
                    scores=scores[order],
                    masks=masks,
                )
            )
        return found

    def close(self) -> None:
        self._network = None


def _encoded(shares: Tensor, boxes: Tensor, width: int, height: int) -> tuple[dict[str, Any], ...]:
    """Lay ``(n, 1, 28, 28)`` masks into their boxes at an image's own size, one at a time, and encode them."""
    return tuple(
        encode(paste_masks_in_image(share[None], box[None], (height, width))[0, 0].numpy() >= _IN_MASK)
        for share, box in zip(shares, boxes, strict=True)
    )
