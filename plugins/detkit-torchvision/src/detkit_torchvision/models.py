"""The catalogue: every network by its name, built with fresh weights; nothing is downloaded here.

Every network takes uint8 images that already have their final size (`final_size`), and labels shifted by
`MODELS[name].label_offset`:

    losses = model(images, targets)   # in training mode: {loss name: scalar}
    results = model(images)           # in evaluation mode: [{"boxes", "labels", "scores"}, ...]
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from detkit_torchvision.architecture import OWN, Architecture, anchor_ratios, anchor_sizes, own_proposals
from detkit_torchvision.family import FAMILY
from detkit_torchvision.spec import Network, Settings, Spec
from detkit_torchvision.stock import STOCK

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from detkit.data import Dataset

Targets = list[dict[str, Tensor]]

MODELS: Mapping[str, Spec] = {**FAMILY, **STOCK}

PROPOSALS_PER_OBJECT = 10
"""What ``proposals=auto`` takes."""


def build(
    name: str,
    num_classes: int,
    *,
    image_size: int,
    score_threshold: float = 0.01,
    nms_threshold: float | None = None,
    max_detections: int = 100,
    architecture: Architecture = OWN,
) -> Network:
    """Builds a network with fresh weights; `num_classes` does not count a background."""
    spec = MODELS[name]
    settings = Settings(
        num_outputs=num_classes + spec.label_offset,
        image_size=image_size,
        score_threshold=score_threshold,
        nms_threshold=spec.nms_threshold if nms_threshold is None else nms_threshold,
        max_detections=max_detections,
        architecture=architecture,
    )
    model = spec.construct(settings)
    for module in model.modules():
        if isinstance(module, nn.Hardswish):
            module.inplace = False  # in place, autograd would copy what comes in
    model.transform = Normalize(spec.mean, spec.std, size_divisible=spec.size_divisible)
    return model


def final_size(name: str, image_size: int, width: int, height: int) -> tuple[int, int]:
    """The width and height to which an image is resized before it enters the network."""
    max_ratio = MODELS[name].max_ratio
    if max_ratio is None:
        return image_size, image_size
    scale = min(image_size / min(width, height), round(image_size * max_ratio) / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def input_size(wanted: int | str, model: str, data: Dataset) -> int:
    """The network's input size; ``auto`` is torchvision's, or for our own models the data's, 160 to 320."""
    if wanted != "auto":
        return int(wanted)
    spec = MODELS[model]
    if spec.coco is not None:
        return spec.image_size
    median = float(np.median(data.sizes.max(axis=1)))
    return int(np.clip(32 * round(median / 32), 160, 320))


def chosen_architecture(model: str, params: Mapping[str, Any], image_size: int, data: Dataset) -> Architecture:
    """Return what the parameters choose of a network, with numbers of the training boxes where they say ``auto``."""
    sizes, ratios, proposals = (params[name] for name in ("anchor_sizes", "anchor_ratios", "proposals"))
    if proposals == "auto":
        proposals = max(own_proposals(model), math.ceil(PROPOSALS_PER_OBJECT * len(data.boxes) / len(data)))
    if "auto" in (sizes, ratios):
        inputs = [final_size(model, image_size, width, height) for width, height in data.sizes.tolist()]
        scales = np.repeat(np.tile(np.array(inputs) / data.sizes, 2), data.boxes_per_image(), axis=0)
        boxes = (data.boxes * scales)[~data.crowd]
        if sizes == "auto":
            sizes = anchor_sizes(boxes) if len(boxes) else ()
        if ratios == "auto":
            ratios = anchor_ratios(boxes) if len(boxes) else ()
    return Architecture(params["backbone"], tuple(sizes), tuple(ratios), proposals)


class Normalize(nn.Module):
    """Stands in for torchvision's GeneralizedRCNNTransform, which resizes image by image in float32.

    Moves the images as uint8 to the network's device, normalises them there and pads them to a common size. Targets
    must lie on that device already. The caller sets `channels_last` together with the network's memory format.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, size_divisible: int) -> None:
        super().__init__()
        self.size_divisible = size_divisible
        self.channels_last = False
        # Not persistent: the state dict stays the one torchvision's own model has.
        shape = (3, 1, 1)
        self.register_buffer("scale", 1 / (255 * torch.tensor(std)).view(shape), persistent=False)
        self.register_buffer("shift", -(torch.tensor(mean) / torch.tensor(std)).view(shape), persistent=False)

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Targets | None = None
    ) -> tuple[ImageList, Targets | None]:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (
            math.ceil(max(side) / self.size_divisible) * self.size_divisible for side in zip(*sizes, strict=True)
        )
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        device = self.scale.device
        if set(sizes) == {(height, width)}:
            if not isinstance(images, Tensor):  # images are (h, w, 3) in memory, and stay so
                here = [image.to(device, non_blocking=True).permute(1, 2, 0) for image in images]
                images = torch.stack(here).permute(0, 3, 1, 2)
            batch = images.to(device, torch.float32, non_blocking=True, memory_format=layout)
            batch.mul_(self.scale).add_(self.shift)
        else:
            # Padding is 0 after normalisation, as in torchvision: COCO weights were trained with it.
            batch = torch.zeros(len(sizes), 3, height, width, device=device).to(memory_format=layout)
            for padded, image, (h, w) in zip(batch, images, sizes, strict=True):
                padded[:, :h, :w] = image.to(device, non_blocking=True) * self.scale + self.shift
        return ImageList(batch, sizes), targets

    def postprocess(
        self,
        result: Targets,
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> Targets:
        """Leaves boxes in pixels of the input: the caller resized it and scales them back."""
        return result
