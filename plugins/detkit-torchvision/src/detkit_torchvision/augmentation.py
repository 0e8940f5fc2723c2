"""Random changes to an image and its objects, boxes and masks alike; each draws from a generator that it is given.

Torch's own generator is not used: the threads that load images share it. Images keep the layout in memory that they are
decoded in, the colours of a pixel together: resizing, copying and batching them is several times as fast as in planes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from detkit.boxes import Boxes, iou
from detkit.data import Indices

_LEAST_VISIBLE = 0.35
"""Share of its area that an object must keep to stay; chosen in a prototype on NEU-DET, not tuned."""

_IOU_OPTIONS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_IOU_TRIALS = 40
"""Liu et al., "SSD" (2016); the numbers are those of torchvision's ``RandomIoUCrop``, and 1 leaves the image whole."""

_PASTE_SHARE = 0.5
"""Share of the images that get objects of another, and of its objects that are taken."""


class Example(NamedTuple):
    """An image and its objects, in its pixels."""

    image: Tensor
    """uint8 ``(3, h, w)``, in memory ``(h, w, 3)``."""
    boxes: Boxes
    """float64 ``(n, 4)``, xyxy."""
    labels: Indices
    masks: Tensor | None = None
    """uint8 ``(n, h, w)`` of 0 and 1; None where the network learns none."""

    def only(self, rows: NDArray[np.bool_]) -> Example:
        """Return the same image with some of its objects."""
        masks = None if self.masks is None else self.masks[torch.from_numpy(rows)]
        return self._replace(boxes=self.boxes[rows], labels=self.labels[rows], masks=masks)


def resized(example: Example, width: int, height: int) -> Example:
    """Stretch an example to a size."""
    before = example.image.shape[-1], example.image.shape[-2]
    if before == (width, height):
        return example
    return Example(
        F.resize(example.image, [height, width], antialias=True),
        example.boxes * np.array([width / before[0], height / before[1]] * 2),
        example.labels,
        _resized_masks(example.masks, width, height),
    )


def mosaic(example: Example, others: Sequence[Example], rng: np.random.Generator) -> Example:
    """Lay an image and three others out as two by two and cut one image's size out at random.

    After Bochkovskiy et al., "YOLOv4" (2020). Others of another size are cut off or padded to that of the first.
    """
    height, width = example.image.shape[-2:]
    canvas = _black(2 * height, 2 * width)
    left, top = int(rng.integers(0, width + 1)), int(rng.integers(0, height + 1))
    boxes, labels, masks = [], [], []
    for place, other in enumerate([example, *others]):
        y, x = height * (place // 2), width * (place % 2)
        framed, visible = _frame(other, width, height)
        framed = framed.only(visible)
        canvas[:, y : y + height, x : x + width] = framed.image
        boxes.append(framed.boxes + np.array([x, y, x, y]))
        labels.append(framed.labels)
        if framed.masks is not None:
            blank = framed.masks.new_zeros(len(framed.masks), height, width)
            masks.append(_laid(framed.masks, blank, x - left, y - top))
    cut, visible = _cut(np.concatenate(boxes) - np.array([left, top, left, top]), width, height)
    crop = canvas[:, top : top + height, left : left + width]
    return Example(crop, cut, np.concatenate(labels), torch.cat(masks) if masks else None).only(visible)


def augment(example: Example, names: Sequence[str], rng: np.random.Generator) -> Example:
    """Change an example at random, by the named changes, and keep its size."""
    if "zoom" in names and rng.random() < 0.7:
        example = _zoom(example, rng)
    if "iou_crop" in names:
        example = _iou_crop(example, rng)
    image, boxes, labels, masks = example
    height, width = image.shape[-2:]
    if "hflip" in names and rng.random() < 0.5:
        image = F.horizontal_flip(image)
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        masks = None if masks is None else masks.flip(-1)
    if "vflip" in names and rng.random() < 0.5:
        image = F.vertical_flip(image)
        boxes = np.stack([boxes[:, 0], height - boxes[:, 3], boxes[:, 2], height - boxes[:, 1]], axis=1)
        masks = None if masks is None else masks.flip(-2)
    if "color" in names:
        image = F.adjust_contrast(image, float(rng.uniform(0.7, 1.4)))
        image = F.adjust_brightness(image, float(rng.uniform(0.85, 1.15)))
    return Example(image, boxes, labels, masks)


def copy_paste(example: Example, source: Callable[[], Example], rng: np.random.Generator) -> Example:
    """Paste random objects of another example into half of the examples; both must have masks.

    After Ghiasi et al., "Simple Copy-Paste" (2021), without blending. Masks lose what is hidden and their boxes shrink
    with them; objects of which too little is left go. A source of another size is cut off or padded.
    """
    if rng.random() >= _PASTE_SHARE:
        return example
    height, width = example.image.shape[-2:]
    framed, visible = _frame(source(), width, height)
    taken = framed.only(visible & (rng.random(len(visible)) < _PASTE_SHARE))
    assert example.masks is not None
    assert taken.masks is not None  # the controller checked
    taken = taken.only(taken.masks.bool().any(dim=2).any(dim=1).numpy())
    assert taken.masks is not None
    hidden = taken.masks.bool().any(dim=0)
    left_over = example.masks * ~hidden
    before, after = (masks.sum(dim=(1, 2)).numpy() for masks in (example.masks, left_over))
    boxes = example.boxes.copy()
    for row in np.flatnonzero((after < before) & (after > 0)):
        boxes[row] = _box_around(left_over[row])
    kept = Example(torch.where(hidden, framed.image, example.image), boxes, example.labels, left_over)
    kept = kept.only((after == before) | (after >= np.maximum(1, _LEAST_VISIBLE * before)))
    assert kept.masks is not None
    return Example(
        kept.image,
        np.concatenate([kept.boxes, taken.boxes]),
        np.concatenate([kept.labels, taken.labels]),
        torch.cat([kept.masks, taken.masks]),
    )


def _zoom(example: Example, rng: np.random.Generator) -> Example:
    """Scale by .7 to 1.6 with a mild change of aspect, then crop or pad to the size before."""
    height, width = example.image.shape[-2:]
    scale, aspect = rng.uniform(0.7, 1.6), np.sqrt(rng.uniform(0.85, 1.15))
    new_width, new_height = max(1, round(width * scale * aspect)), max(1, round(height * scale / aspect))
    left = round(rng.uniform(min(0, width - new_width), max(0, width - new_width)))
    top = round(rng.uniform(min(0, height - new_height), max(0, height - new_height)))
    scaled = resized(example, new_width, new_height)
    framed, visible = _frame(scaled, width, height, left, top)
    return framed.only(visible)


def _iou_crop(example: Example, rng: np.random.Generator) -> Example:
    """Cut a random window out, of which some object covers a share drawn at random, and stretch it to the size before.

    Objects whose centre lies outside go.
    """
    height, width = example.image.shape[-2:]
    boxes = example.boxes
    while len(boxes) and (least := rng.choice(_IOU_OPTIONS)) < 1:
        for _ in range(_IOU_TRIALS):
            new_width, new_height = (np.array([width, height]) * rng.uniform(0.3, 1, 2)).astype(int).tolist()
            if not new_height or not 0.5 <= new_width / new_height <= 2:
                continue
            left, top = (np.array([width - new_width, height - new_height]) * rng.random(2)).astype(int).tolist()
            window = np.array([left, top, left + new_width, top + new_height], dtype=np.float64)
            centres = (boxes[:, :2] + boxes[:, 2:]) / 2
            inside = np.all((centres > window[:2]) & (centres < window[2:]), axis=1)
            if not inside.any() or iou(boxes[inside], window[None]).max() < least:
                continue
            framed, _ = _frame(example.only(inside), new_width, new_height, -left, -top)
            return resized(framed, width, height)
    return example


def _frame(example: Example, width: int, height: int, left: int = 0, top: int = 0) -> tuple[Example, NDArray[np.bool_]]:
    """Lay an example at a place into a black frame, cut off outside, and say of which objects enough is left."""
    masks = example.masks
    if masks is not None:
        masks = _laid(masks, masks.new_zeros(len(masks), height, width), left, top)
    cut, visible = _cut(example.boxes + np.array([left, top, left, top]), width, height)
    return Example(_laid(example.image, _black(height, width), left, top), cut, example.labels, masks), visible


def _black(height: int, width: int) -> Tensor:
    """Return a black image."""
    return torch.zeros(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)


def _laid(layers: Tensor, canvas: Tensor, left: int, top: int) -> Tensor:
    """Lay ``(n, h, w)`` layers at a place into a canvas of another size."""
    (own_height, own_width), (height, width) = layers.shape[-2:], canvas.shape[-2:]
    x0, y0, x1, y1 = max(0, left), max(0, top), min(width, left + own_width), min(height, top + own_height)
    if x0 < x1 and y0 < y1:
        canvas[:, y0:y1, x0:x1] = layers[:, y0 - top : y1 - top, x0 - left : x1 - left]
    return canvas


def _cut(boxes: Boxes, width: int, height: int) -> tuple[Boxes, NDArray[np.bool_]]:
    """Cut boxes off at the border of an image, and say of which enough is left."""
    cut = np.clip(boxes, 0, [width, height, width, height])
    sides_before, sides_after = boxes[:, 2:] - boxes[:, :2], cut[:, 2:] - cut[:, :2]
    return cut, sides_after.prod(axis=1) >= _LEAST_VISIBLE * sides_before.prod(axis=1)


def _resized_masks(masks: Tensor | None, width: int, height: int) -> Tensor | None:
    if masks is None or not len(masks):
        return None if masks is None else masks.new_zeros(0, height, width)
    stretched: Tensor = F.resize(masks, [height, width], interpolation=InterpolationMode.NEAREST_EXACT)
    return stretched


def _box_around(mask: Tensor) -> tuple[float, float, float, float]:
    rows, columns = (torch.nonzero(mask.any(dim=dim)) for dim in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
