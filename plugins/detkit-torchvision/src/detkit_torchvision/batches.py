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
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from detkit.boxes import Boxes
from detkit.data import Dataset, Indices
from detkit.errors import InvalidData
from detkit.images import Image
from detkit.masks import decode
from detkit.ranks import Ranks
from detkit_torchvision.augmentation import Example, augment, copy_paste, mosaic, resized
from detkit_torchvision.caching import Cache, shared_cache
from detkit_torchvision.models import MODELS, Targets, final_size

_CACHE_SHARE = 0.25
"""Share of the memory that decoded images may take."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""A container's own limit (Linux, cgroup v2): a number of bytes, or ``max``."""

_MOSAIC_SHARE = 0.4
"""Share of the images that become a crop of four; chosen in a prototype on NEU-DET, not tuned."""


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
    stretched: Tensor = F.resize(tensor, [height, width], antialias=True)
    return stretched


def cache_budget() -> int:
    """Return how many bytes of decoded images may be kept in memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        memory = min(memory, int(limit))
    return int(_CACHE_SHARE * memory)


class Inputs:
    """The images of a data set at a network's input size, kept in memory once decoded while they fit.

    Processes that train together on a machine keep them once for all.
    """

    def __init__(self, data: Dataset, model: str, image_size: int, budget: int, ranks: Ranks | None = None) -> None:
        """``budget`` is how many bytes of images may be kept; a data set that needs more is decoded every time."""
        self.data = data
        self._has_masks = MODELS[model].masks
        self.sizes = [final_size(model, image_size, int(w), int(h)) for w, h in data.sizes]
        needed = sum(3 * w * h for w, h in self.sizes)
        self._cache: Cache | None = [None] * len(data) if needed <= budget else None
        if ranks is not None and ranks.size > 1:  # machines may differ, and all have to do the same
            fits, together = ranks.sum([float(needed <= budget), float(ranks.place.local_size > 1)])
            if together:
                self._cache = shared_cache(self.sizes, ranks) if fits == ranks.size else None
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

    def target(self, index: int, label_offset: int) -> tuple[Boxes, Indices]:
        """Return boxes in input pixels and shifted labels; crowd regions are left out."""
        rows, keep = self._rows(index)
        width, height = self.sizes[index]
        scale = np.array([width, height] * 2) / np.tile(self.data.sizes[index], 2)
        boxes = np.clip(self.data.boxes[rows][keep] * scale, 0, [width, height, width, height])
        return boxes, self.data.labels[rows][keep] + label_offset

    def masks(self, index: int) -> Tensor:
        """Return the masks of the same objects, ``(n, h, w)`` uint8. Raises `InvalidData` naming the image."""
        rows, keep = self._rows(index)
        width, height = self.sizes[index]
        found = np.zeros((int(keep.sum()), height, width), dtype=np.uint8)
        size = (int(self.data.sizes[index, 0]), int(self.data.sizes[index, 1]))
        masks = self.data.masks[rows] if self.data.masks is not None else (None,) * len(keep)
        try:
            for pixels, mask in zip(found, (mask for mask, kept in zip(masks, keep, strict=True) if kept), strict=True):
                pixels[:] = decode(mask, size, (width, height))
        except InvalidData as error:
            raise InvalidData(f"{self.data.image_ids[index]}: {error}") from None
        return torch.from_numpy(found)

    def example(self, index: int, label_offset: int) -> Example:
        """Return one image with its objects, and their masks where the network learns them."""
        boxes, labels = self.target(index, label_offset)
        return Example(self.image(index), boxes, labels, self.masks(index) if self._has_masks else None)

    def _rows(self, index: int) -> tuple[slice, NDArray[np.bool_]]:
        rows = slice(int(self.data.offsets[index]), int(self.data.offsets[index + 1]))
        return rows, ~self.data.crowd[rows]


def load_batch(
    inputs: Inputs,
    indices: Sequence[int],
    *,
    seeds: Sequence[Sequence[int]],
    label_offset: int,
    augmentations: Sequence[str],
    scale: float = 1.0,
    pin: bool = False,
) -> Batch:
    """Return the images of one step, each changed at random by a seed of its own, ``scale`` times the input size.

    ``pin`` is for a GPU: what lies in pinned memory is copied there while the step before is still taken.
    """
    images, targets = [], []
    for index, seed in zip(indices, seeds, strict=True):
        rng = np.random.default_rng(seed)
        example = _augmented(inputs, index, label_offset, augmentations, rng)
        if scale != 1:
            height, width = (max(1, round(side * scale)) for side in example.image.shape[-2:])
            example = resized(example, width, height)
        images.append(example.image.pin_memory() if pin else example.image)
        target = {"boxes": torch.from_numpy(example.boxes).float(), "labels": torch.from_numpy(example.labels)}
        if example.masks is not None:
            target["masks"] = example.masks
        targets.append({name: value.pin_memory() for name, value in target.items()} if pin else target)
    return Batch(images, targets, list(indices))


def _augmented(
    inputs: Inputs, index: int, label_offset: int, names: Sequence[str], rng: np.random.Generator
) -> Example:
    def another() -> Example:
        return inputs.example(int(rng.integers(0, len(inputs.data))), label_offset)

    makes_mosaic = "mosaic" in names and rng.random() < _MOSAIC_SHARE
    example = inputs.example(index, label_offset)
    if makes_mosaic:
        others = rng.integers(0, len(inputs.data), 3).tolist()
        example = mosaic(example, [inputs.example(other, label_offset) for other in others], rng)
    example = augment(example, names, rng)
    if "copy_paste" in names:
        example = copy_paste(example, lambda: augment(another(), names, rng), rng)
    return example
