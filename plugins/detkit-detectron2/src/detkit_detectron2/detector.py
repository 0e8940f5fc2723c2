"""An opened network: images in, detections out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from safetensors.torch import load_file
from torch import Tensor

from detkit.backends import PredictOptions
from detkit.detections import Detections
from detkit.images import Image
from detkit.job import Model
from detkit.masks import encode
from detkit_detectron2.batches import as_tensor, resize
from detkit_detectron2.configs import put_thresholds, read_cfg, test_size
from detkit_detectron2.weights import ARTIFACT


def open_network(model: Model, options: PredictOptions) -> tuple[Any, CfgNode]:
    """Return the network of a finished model, on the CPU, and its configuration."""
    cfg = read_cfg(model)
    most = options.max_detections or model.manifest.max_detections
    put_thresholds(cfg, options.score_threshold, options.nms_threshold, most)
    network = build_model(cfg)
    network.load_state_dict(load_file(model.path / ARTIFACT))
    network.eval()
    return network, cfg


class Detectron2Detector:
    """An opened network; also what validation uses while it trains."""

    def __init__(self, network: Any, cfg: CfgNode, classes: Sequence[str]) -> None:
        self._network, self._cfg, self._classes = network, cfg, tuple(classes)

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        sizes = [(image.shape[1], image.shape[0]) for image in images]
        inputs = [
            as_tensor(resize(image, *test_size(self._cfg, *size), self._cfg.INPUT.FORMAT))
            for image, size in zip(images, sizes, strict=True)
        ]
        return self.detect_inputs(inputs, sizes)

    @torch.no_grad()
    def detect_inputs(self, inputs: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Detect on uint8 images that have the network's input size; ``sizes`` are the original width and height.

        Images of one shape go through it together. Others do not: padding reaches what is found near a border.
        """
        self._network.eval()
        together: dict[tuple[int, ...], list[int]] = {}
        for number, tensor in enumerate(inputs):
            together.setdefault(tuple(tensor.shape), []).append(number)
        found: dict[int, Detections] = {}
        for numbers in together.values():
            asked = [{"image": inputs[n], "width": sizes[n][0], "height": sizes[n][1]} for n in numbers]
            for number, result in zip(numbers, self._network(asked), strict=True):
                found[number] = self._detections(result["instances"].to("cpu"), *sizes[number])
        return [found[number] for number in range(len(inputs))]

    def _detections(self, result: Any, width: int, height: int) -> Detections:
        scores = result.scores.double().numpy()
        order = np.argsort(-scores, kind="stable")
        masks = None
        if result.has("pred_masks"):
            masks = tuple(encode(mask.numpy()) for mask in result.pred_masks[torch.from_numpy(order)])
        boxes = np.clip(result.pred_boxes.tensor.double().numpy(), 0, [width, height, width, height])
        return Detections(
            path="",
            width=width,
            height=height,
            classes=self._classes,
            boxes=boxes[order],
            labels=result.pred_classes.numpy()[order],
            scores=scores[order],
            masks=masks,
        )

    def close(self) -> None:
        self._network = None
