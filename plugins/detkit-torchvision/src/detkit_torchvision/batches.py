"""From image files to batches: decode, resize once as uint8, remember, augment; everything random has its own seed.

What is random about one image in one epoch is drawn from a seed of its own (`TrainingLoop.image_seed`), so batches are
the same with any number of workers and after any resume.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from detkit.data import Dataset
from detkit.images import Image
from detkit_torchvision.models import Targets, final_size

_CACHE_SHARE = 0.25
"""Share of the memory that decoded images may take."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""A container's own limit (Linux, cgroup v2): a number of bytes, or ``max``."""

_MOSAIC_SHARE = 0.4
"""Share of the images that become a crop of four; chosen like the number below."""

_LEAST_VISIBLE = 0.35
"""Share of its area that a box must keep in a crop to stay; chosen in a prototype on NEU-DET, not tuned."""


class Batch(NamedTuple):
    images: list[Tensor]
    """uint8 ``(3, h, w)`` at the network's input size."""
    targets: Targets
    indices: list[int]


def resize(image: Image, width: int, height: int) -> Tensor:
    """Return an ``(h, w, 3)`` image as a uint8 ``(3, height, width)`` tensor, antialiased."""
    tensor = torch.from_numpy(image).permute(2, 0, 1)  # HWC in memory: resizing uint8 so is 5 times as fast
    if image.shape[:2] == (height, width):
        return tensor
    return F.resize(tensor, [height, width], antialias=True)


def cache_budget() -> int:
    """Return how many bytes of decoded images may be kept in memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        memory = min(memory, int(limit))
    return int(_CACHE_SHARE * memory)


class Inputs:
    """The images of a data set at a network's input size, kept in memory once decoded while they fit."""

    def __init__(self, data: Dataset, model: str, image_size: int, budget: int) -> None:
        """``budget`` is how many bytes of images may be kept; a data set that needs more is decoded every time."""
        self.data = data
        self.sizes = [final_size(model, image_size, int(w), int(h)) for w, h in data.sizes]
        needed = sum(3 * w * h for w, h in self.sizes)
        self._cache: list[Tensor | None] | None = [None] * len(data) if needed <= budget else None
        self.num_bytes = needed if self._cache is not None else 0
        """What the kept images take in all."""

    def image(self, index: int) -> Tensor:
        """Return one image. Raises `detkit.errors.ImageError` naming the file."""
        if self._cache is not None and (cached := self._cache[index]) is not None:
            return cached
        image = resize(self.data[index].image(), *self.sizes[index])
        if self._cache is not None:
            self._cache[index] = image
        return image

    def target(self, index: int, label_offset: int) -> tuple[np.ndarray, np.ndarray]:
        """Return boxes in input pixels and shifted labels; crowd regions are left out."""
        sample = slice(int(self.data.offsets[index]), int(self.data.offsets[index + 1]))
        keep = ~self.data.crowd[sample]
        width, height = self.sizes[index]
        scale = np.array([width, height] * 2) / np.tile(self.data.sizes[index], 2)
        boxes = np.clip(self.data.boxes[sample][keep] * scale, 0, [width, height, width, height])
        return boxes, self.data.labels[sample][keep] + label_offset


def load_batch(
    inputs: Inputs,
    indices: Sequence[int],
    *,
    seeds: Sequence[Sequence[int]],
    label_offset: int,
    augmentations: Sequence[str],
    scale: float = 1.0,
) -> Batch:
    """Return the images of one step, each changed at random by a seed of its own, ``scale`` times the input size."""
    images, targets = [], []
    for index, seed in zip(indices, seeds, strict=True):
        rng = np.random.default_rng(seed)
        if "mosaic" in augmentations and rng.random() < _MOSAIC_SHARE:
            image, boxes, labels = mosaic(inputs, index, label_offset, rng)
        else:
            image, (boxes, labels) = inputs.image(index), inputs.target(index, label_offset)
        image, boxes, labels = augment(image, boxes, labels, augmentations, rng)
        if scale != 1:
            height, width = (max(1, round(side * scale)) for side in image.shape[-2:])
            boxes = boxes * np.array([width / image.shape[-1], height / image.shape[-2]] * 2)
            image = F.resize(image, [height, width], antialias=True)
        images.append(image)
        targets.append({"boxes": torch.from_numpy(boxes).float(), "labels": torch.from_numpy(labels)})
    return Batch(images, targets, list(indices))


def mosaic(
    inputs: Inputs, index: int, label_offset: int, rng: np.random.Generator
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Lay an image and three others out as two by two and cut one image's size out at random.

    After Bochkovskiy et al., "YOLOv4" (2020). Others of another size are cut off or padded to that of the first.
    """
    first = inputs.image(index)
    height, width = first.shape[-2:]
    canvas = torch.zeros(3, 2 * height, 2 * width, dtype=first.dtype)
    boxes, labels = [], []
    for place, other in enumerate([index, *rng.integers(0, len(inputs.data), 3).tolist()]):
        image, (own_boxes, own_labels) = inputs.image(other), inputs.target(other, label_offset)
        top, left = height * (place // 2), width * (place % 2)
        shown = image[:, :height, :width]
        canvas[:, top : top + shown.shape[1], left : left + shown.shape[2]] = shown
        cut, visible = _cut(own_boxes, width, height)
        boxes.append(cut[visible] + [left, top, left, top])
        labels.append(own_labels[visible])
    left, top = int(rng.integers(0, width + 1)), int(rng.integers(0, height + 1))
    cut, visible = _cut(np.concatenate(boxes) - [left, top, left, top], width, height)
    crop = canvas[:, top : top + height, left : left + width].contiguous()
    return crop, cut[visible], np.concatenate(labels)[visible]


def augment(
    image: Tensor, boxes: np.ndarray, labels: np.ndarray, names: Sequence[str], rng: np.random.Generator
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Change an image and its boxes at random, by the named changes. Returns new tensors."""
    height, width = image.shape[-2:]
    if "zoom" in names and rng.random() < 0.7:
        image, boxes, labels = _zoom(image, boxes, labels, rng)
    if "hflip" in names and rng.random() < 0.5:
        image = F.horizontal_flip(image)
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    if "vflip" in names and rng.random() < 0.5:
        image = F.vertical_flip(image)
        boxes = np.stack([boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], axis=1)
    if "color" in names:
        image = F.adjust_contrast(image, float(rng.uniform(0.7, 1.4)))
        image = F.adjust_brightness(image, float(rng.uniform(0.85, 1.15)))
    return image, boxes, labels


def _zoom(
    image: Tensor, boxes: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Scale by .7 to 1.6 with a mild change of aspect, then crop or pad to the size before."""
    height, width = image.shape[-2:]
    scale, aspect = rng.uniform(0.7, 1.6), np.sqrt(rng.uniform(0.85, 1.15))
    new_width, new_height = max(1, round(width * scale * aspect)), max(1, round(height * scale / aspect))
    scaled = F.resize(image, [new_height, new_width], antialias=True)
    left = round(rng.uniform(min(0, width - new_width), max(0, width - new_width)))
    top = round(rng.uniform(min(0, height - new_height), max(0, height - new_height)))
    canvas = torch.zeros_like(image)
    x0, y0 = max(0, left), max(0, top)
    x1, y1 = min(width, left + new_width), min(height, top + new_height)
    canvas[:, y0:y1, x0:x1] = scaled[:, y0 - top : y1 - top, x0 - left : x1 - left]
    moved = boxes * (np.array([new_width, new_height] * 2) / np.array([width, height] * 2)) + [left, top, left, top]
    cut, visible = _cut(moved, width, height)
    return canvas, cut[visible], labels[visible]


def _cut(boxes: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut boxes off at the border of an image, and say of which enough is left."""
    cut = np.clip(boxes, 0, [width, height, width, height])
    sides_before, sides_after = boxes[:, 2:] - boxes[:, :2], cut[:, 2:] - cut[:, :2]
    return cut, sides_after.prod(axis=1) >= _LEAST_VISIBLE * sides_before.prod(axis=1)
