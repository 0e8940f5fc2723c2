"""From images to what SSD trains on: random changes by GluonCV, one square size, a target for every anchor."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PillowImage

from detkit.data import Dataset
from detkit.images import Image
from detkit_gluoncv.runtime import (
    SSDTargetGenerator,
    box_transforms,
    image_transforms,
    mx,
    random_color_distort,
    random_crop_with_constraints,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of RGB values 0 to 1 over ImageNet; what GluonCV's base networks were trained with."""

_BEST = 9
"""MXNet's interpolation by the direction: area to shrink, cubic to enlarge."""

_LEAST_CROP = 0.3
"""Smallest share of a side that GluonCV's crop takes (its ``min_scale``)."""

_LEAST_SIDE = 8
"""Pixels below which GluonCV's crop may have no height or width."""


class Batch(NamedTuple):
    images: Any
    """``(b, 3, size, size)`` float32, normalised."""
    class_targets: Any
    """``(b, anchors)``: 0 background, else label + 1."""
    box_targets: Any
    """``(b, anchors, 4)`` encoded offsets."""
    indices: list[int]


def to_input(images: Sequence[Image], image_size: int, context: Any) -> Any:
    """Return ``(h, w, 3)`` uint8 images as one ``(b, 3, size, size)`` normalised array; shapes are not kept."""
    return normalise([resize(mx.nd.array(image, dtype="uint8"), image_size, _BEST) for image in images], context)


def normalise(resized: Sequence[Any], context: Any) -> Any:
    """Stack ``(size, size, 3)`` arrays of values 0 to 255 and normalise them."""
    stacked = mx.nd.stack(*resized).as_in_context(context)
    return mx.nd.image.normalize(mx.nd.image.to_tensor(stacked), mean=MEAN, std=STD)


def shrink(image: Image, image_size: int) -> Image:
    """Return an image no larger than its smallest crop needs: large ones cost seconds and gigabytes in float32."""
    factor = int(min(image.shape[:2]) * _LEAST_CROP / image_size)
    if factor < 2:
        return image
    return np.asarray(PillowImage.fromarray(image).reduce(factor))


def target(data: Dataset, index: int) -> np.ndarray:
    """Return an image's boxes and labels as the ``(n, 5)`` float32 rows that GluonCV uses, without crowd regions."""
    rows = slice(int(data.offsets[index]), int(data.offsets[index + 1]))
    keep = ~data.crowd[rows]
    return np.concatenate([data.boxes[rows][keep], data.labels[rows][keep][:, None]], axis=1).astype(np.float32)


def change(
    image: Image, boxes: np.ndarray, image_size: int, names: Sequence[str], seed: Sequence[int]
) -> tuple[Any, np.ndarray]:
    """Change an image and its ``(n, 5)`` boxes at random, by the named changes, and resize both.

    With all names this is GluonCV's ``SSDDefaultTrainTransform``, whose parts draw from the generators of the process;
    they are seeded here, so that what happens depends on ``seed`` alone.
    """
    number = int(np.random.default_rng(seed).integers(2**32))
    np.random.seed(number)
    random.seed(number)
    pixels = mx.nd.array(image, dtype="uint8")
    if "color" in names:
        pixels = random_color_distort(pixels)
    if "expand" in names and np.random.uniform() > 0.5:
        pixels, (left, top, _, _) = image_transforms.random_expand(pixels, fill=[255 * m for m in MEAN])
        boxes = box_transforms.translate(boxes, x_offset=left, y_offset=top)
    if "crop" in names and min(pixels.shape[:2]) >= _LEAST_SIDE:
        height, width, _ = pixels.shape
        boxes, area = random_crop_with_constraints(boxes, (width, height))
        pixels = mx.image.fixed_crop(pixels, *area)
    height, width, _ = pixels.shape
    pixels = resize(pixels, image_size, np.random.randint(0, 5) if names else _BEST)
    boxes = box_transforms.resize(boxes, (width, height), (image_size, image_size))
    if "hflip" in names:
        pixels, (flipped, _) = image_transforms.random_flip(pixels, px=0.5)
        boxes = box_transforms.flip(boxes, (image_size, image_size), flip_x=flipped)
    return pixels.astype("float32"), boxes


class Targets:
    """Tells every anchor what it is to learn, as SSD does: the object of the largest overlap, from IoU .5 on."""

    def __init__(self, anchors: Any) -> None:
        self._anchors = anchors.as_in_context(mx.cpu())
        self.num_anchors = int(anchors.shape[1])
        self._generator = SSDTargetGenerator(negative_mining_ratio=-1)

    def __call__(self, boxes: Sequence[np.ndarray]) -> tuple[Any, Any]:
        """Return class and box targets of ``(n, 5)`` boxes in input pixels; an image may have none."""
        classes, offsets = zip(*(self._one(rows) for rows in boxes), strict=True)
        return mx.nd.concat(*classes, dim=0), mx.nd.concat(*offsets, dim=0)

    def _one(self, rows: np.ndarray) -> tuple[Any, Any]:
        """One image at a time: memory grows with anchors times boxes, and rows that pad would be matched, too."""
        if not len(rows):  # all is background; the generator would match a box that is none
            return mx.nd.zeros((1, self.num_anchors)), mx.nd.zeros((1, self.num_anchors, 4))
        known = mx.nd.array(rows[None])
        classes, offsets, _ = self._generator(self._anchors, None, known[:, :, :4], known[:, :, 4:5])
        return classes, offsets


def resize(pixels: Any, image_size: int, interpolation: int) -> Any:
    if pixels.shape[:2] == (image_size, image_size):
        return pixels
    return image_transforms.imresize(pixels, image_size, image_size, interp=interpolation)
