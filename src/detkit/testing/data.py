"""A data set of a few small pictures that a detector can learn in seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from detkit.data import Dataset, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_COLOURS = ((220, 40, 40), (40, 90, 220), (40, 170, 60), (230, 190, 30), (150, 60, 180), (30, 180, 190))


def tiny_dataset(
    folder: Path,
    *,
    num_images: int = 8,
    size: int = 96,
    classes: Sequence[str] = ("disc", "square"),
    seed: int = 0,
) -> Dataset:
    """Draw pictures into ``folder`` and return them with their boxes, which have whole coordinates.

    Each picture has one or two objects, every class its own colour and shape; the last picture has none. JPEG and PNG
    take turns. Picture i depends on ``seed`` and i alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rngs = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(num_images)]
    return Dataset.from_samples(
        classes,
        [
            _draw(folder, i, rng, size, classes, 0 if i == num_images - 1 else 1 + i // 2 % 2)
            for i, rng in enumerate(rngs)
        ],
    )


def _draw(  # noqa: PLR0917
    folder: Path, i: int, rng: np.random.Generator, size: int, classes: Sequence[str], num_objects: int
) -> Sample:
    image = Image.fromarray((rng.normal(128, 6, (size, size, 3))).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    boxes, names = [], []
    for k in range(num_objects):
        label = (i + k) % len(classes)
        side = int(rng.integers(size // 5, size // 3))
        # Two objects keep to the left and the right half.
        low, high = (k * size // 2, (k + 1) * size // 2) if num_objects == 2 else (0, size)
        x, y = int(rng.integers(low, high - side)), int(rng.integers(0, size - side))
        shape = pen.rectangle if label % 2 else pen.ellipse
        shape((x, y, x + side - 1, y + side - 1), fill=_COLOURS[label % len(_COLOURS)])
        boxes.append((x, y, x + side, y + side))
        names.append(classes[label])
    path = folder / f"{i:03}.{'png' if i % 2 else 'jpg'}"
    image.save(path, quality=95)
    return Sample(
        path=str(path),
        width=size,
        height=size,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        names=tuple(names),
        image_id=path.name,
    )
