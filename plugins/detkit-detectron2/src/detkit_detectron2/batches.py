"""From image files to what Detectron2's models take: decoded by detkit, changed by Detectron2's own augmentations.

What is random about one image in one epoch is drawn from a seed of its own (`TrainingLoop.image_seed`), so batches are
the same with any number of workers and after any resume.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import RandomCrop, ResizeTransform, Transform, TransformList
from detectron2.structures import BitMasks, Boxes, Instances
from numpy.typing import NDArray
from torch import Tensor

from detkit.data import Dataset
from detkit.errors import InvalidData, InvalidValue
from detkit.images import Image
from detkit.masks import decode
from detkit.ranks import Ranks
from detkit_detectron2.configs import test_size
from detkit_detectron2.mapping import Mapper
from detkit_torchvision.caching import Cache, shared_cache

Batch = list[dict[str, Any]]
"""One for each image: ``image``, uint8 ``(3, h, w)``, and ``instances``."""

_LEAST_SIDE = 1e-5
"""Pixels of a box that Detectron2's mapper keeps."""

_numpy_random = threading.Lock()
"""Detectron2's augmentations draw from numpy's one generator, whose seed is set for each image."""


def resize(image: Image, width: int, height: int, format: str) -> Image:
    """Return an RGB image at another size, as Detectron2 resizes, its channels in the order of ``INPUT.FORMAT``."""
    if image.shape[:2] != (height, width):
        image = ResizeTransform(image.shape[0], image.shape[1], height, width).apply_image(image)
    return np.ascontiguousarray(image[:, :, ::-1]) if format == "BGR" else image


def as_tensor(image: Image) -> Tensor:
    """Return an ``(h, w, 3)`` image as a ``(3, h, w)`` tensor of the same memory."""
    return torch.from_numpy(image).permute(2, 0, 1)


class Inputs:
    """The images of a data set, kept in memory once decoded while they fit, and their objects.

    Where training takes them at one size, as validation always does, they are kept at that size, else at their own.
    Processes that train together on a machine keep them once for all.
    """

    def __init__(
        self,
        data: Dataset,
        cfg: CfgNode,
        budget: int,
        ranks: Ranks | None = None,
        *,
        trains: bool = False,
        mapper: str | None = None,
    ) -> None:
        """``budget`` is how many bytes of images may be kept; a data set that needs more is decoded every time.

        ``mapper`` names the user's own, which makes every example that has a seed, and reads the images itself.
        """
        if cfg.INPUT.FORMAT not in {"BGR", "RGB"}:
            raise InvalidValue("INPUT.FORMAT", cfg.INPUT.FORMAT, "BGR or RGB")
        self.data = data
        self._format, self._has_masks = cfg.INPUT.FORMAT, cfg.MODEL.MASK_ON
        self._mapper = None if mapper is None else Mapper(mapper, data, cfg)
        self._augmentations = build_augmentation(cfg, is_train=True) if trains else []
        if trains and cfg.INPUT.CROP.ENABLED:
            self._augmentations.insert(0, RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        self._crops = bool(trains and cfg.INPUT.CROP.ENABLED)
        sizes, sampling = set(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        same = (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        self._one_size = not trains or (
            not self._crops and sampling == "choice" and {(size, cfg.INPUT.MAX_SIZE_TRAIN) for size in sizes} == {same}
        )
        if trains and self._one_size:
            del self._augmentations[0]  # the resizing, which is done once
        own = [(int(width), int(height)) for width, height in data.sizes]
        self.sizes = [test_size(cfg, *size) for size in own] if self._one_size else own
        """Width and height at which images are kept."""
        needed = sum(3 * width * height for width, height in self.sizes)
        self._cache: Cache | None = [None] * len(data) if needed <= budget and mapper is None else None
        if ranks is not None and ranks.size > 1:  # machines may differ, and all have to do the same
            fits, together = ranks.sum([float(self._cache is not None), float(ranks.place.local_size > 1)])
            if together:
                self._cache = shared_cache(self.sizes, ranks) if fits == ranks.size else None
        self.num_bytes = needed if self._cache is not None else 0
        """What the kept images take in all."""

    def image(self, index: int) -> Tensor:
        """Return one image, uint8 ``(3, h, w)``. Raises `detkit.errors.ImageError` naming the file."""
        if self._cache is not None and (cached := self._cache[index]) is not None:
            return cached
        image = as_tensor(resize(self.data[index].image(), *self.sizes[index], self._format))
        if self._cache is not None:
            self._cache[index] = image
        return image

    def example(self, index: int, seed: Sequence[int] | None = None) -> dict[str, Any]:
        """Return one image with its objects, changed at random where there is a ``seed``; crowd regions are left out.

        Raises `InvalidData` naming the image for a mask that cannot be read.
        """
        if self._mapper is not None and seed is not None:
            with _numpy_random:
                return self._mapper.example(index, seed)
        image = self.image(index)
        width, height = self.sizes[index]
        rows, keep = self._rows(index)
        boxes = self.data.boxes[rows][keep] * (np.array([width, height] * 2) / np.tile(self.data.sizes[index], 2))
        masks = self._masks(index, rows, keep) if self._has_masks else None
        if seed is not None:
            transforms = self._drawn(height, width, seed)
            if transforms.transforms:
                changed = np.ascontiguousarray(transforms.apply_image(image.permute(1, 2, 0).numpy()))
                image = as_tensor(changed)
                boxes = transforms.apply_box(boxes) if len(boxes) else boxes
                if masks is not None:
                    own = [transforms.apply_segmentation(mask) for mask in masks]
                    masks = np.ascontiguousarray(own) if own else np.zeros((0, *changed.shape[:2]), dtype=np.uint8)
        return {"image": image, "instances": self._instances(image, boxes, self.data.labels[rows][keep], masks)}

    def _instances(
        self, image: Tensor, boxes: NDArray[np.float64], labels: NDArray[np.int64], masks: NDArray[np.uint8] | None
    ) -> Instances:
        height, width = image.shape[-2:]
        found = Instances((height, width))
        if masks is not None:
            found.gt_masks = BitMasks(torch.from_numpy(masks))
            if self._crops and len(masks):
                boxes = found.gt_masks.get_bounding_boxes().tensor.double().numpy()
        boxes = np.clip(boxes, 0, [width, height, width, height])
        found.gt_boxes = Boxes(torch.from_numpy(boxes).float())
        found.gt_classes = torch.from_numpy(labels.astype(np.int64))
        kept = (boxes[:, 2:] - boxes[:, :2] > _LEAST_SIDE).all(axis=1)
        return found if kept.all() else found[torch.from_numpy(kept)]

    def _masks(self, index: int, rows: slice, keep: NDArray[np.bool_]) -> NDArray[np.uint8]:
        size = (int(self.data.sizes[index, 0]), int(self.data.sizes[index, 1]))
        every = self.data.masks[rows] if self.data.masks is not None else (None,) * len(keep)
        found = np.zeros((int(keep.sum()), *reversed(self.sizes[index])), dtype=np.uint8)
        try:
            for pixels, mask in zip(found, (mask for mask, kept in zip(every, keep, strict=True) if kept), strict=True):
                pixels[:] = decode(mask, size, self.sizes[index])
        except InvalidData as error:
            raise InvalidData(f"{self.data.image_ids[index]}: {error}") from None
        return found

    def _drawn(self, height: int, width: int, seed: Sequence[int]) -> TransformList:
        """Draw what happens to an image of a size; nothing is done yet, so that threads do not wait for each other."""
        drawn: list[Transform] = []
        with _numpy_random:
            np.random.seed(np.random.SeedSequence(list(seed)).generate_state(4))
            for augmentation in self._augmentations:
                blank = np.broadcast_to(np.uint8(0), (height, width, 3))  # of which they look at the shape
                transform = augmentation.get_transform(blank)
                if type(transform).__name__ == "NoOpTransform":
                    continue
                drawn.append(transform)
                height, width = _size_after(transform, height, width)
        return TransformList(drawn)

    def _rows(self, index: int) -> tuple[slice, NDArray[np.bool_]]:
        rows = slice(int(self.data.offsets[index]), int(self.data.offsets[index + 1]))
        return rows, ~self.data.crowd[rows]


def _size_after(transform: Transform, height: int, width: int) -> tuple[int, int]:
    if isinstance(transform, ResizeTransform):
        return transform.new_h, transform.new_w
    return (transform.h, transform.w) if type(transform).__name__ == "CropTransform" else (height, width)
