"""Masks of objects: from COCO's polygons and run-length encodings to pixels, at any size, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from detkit.errors import InvalidData

Pixels = NDArray[np.bool_]
"""``(height, width)``, true where the object is."""

_LEAST_NUMBERS = 6
"""Coordinates of a polygon; hotcoco would take four for a box."""


def decode(mask: Any, size: tuple[float, float], to: tuple[int, int] | None = None) -> Pixels:
    """Return the pixels of a mask of an image of ``size``, width and height, at the size ``to``, by default the same.

    Polygons are drawn at the size that is wanted; of a run-length encoding, compressed or a list of counts, the nearest
    pixels are taken. Raises `InvalidData` for a mask that is neither, or of another size than the image.
    """
    from hotcoco import mask as rle

    width, height = to or (round(size[0]), round(size[1]))
    try:
        if isinstance(mask, list):
            if any(len(points) < _LEAST_NUMBERS for points in mask):
                raise ValueError("a polygon has fewer than three points")
            scale = np.array([width, height]) / size
            polygons = [(np.reshape(points, (-1, 2)) * scale).ravel().tolist() for points in mask]
            drawn: Pixels = rle.decode(rle.merge(rle.frPyObjects(polygons, height, width))).astype(bool)
            return drawn
        if list(mask["size"]) != [round(size[1]), round(size[0])]:
            raise ValueError(f"its size is {mask['size']}, that of the image, height first, {[size[1], size[0]]}")
        whole = rle.decode(rle.frPyObjects(mask, *mask["size"]) if isinstance(mask["counts"], list) else mask)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise InvalidData(f"a mask cannot be read: {error}; expected COCO's polygons or run-length encoding") from None
    if (width, height) == tuple(size):
        return np.asarray(whole, dtype=bool)
    rows = ((np.arange(height) + 0.5) * (size[1] / height)).astype(int)
    columns = ((np.arange(width) + 0.5) * (size[0] / width)).astype(int)
    nearest: Pixels = whole[np.ix_(rows, columns)].astype(bool)
    return nearest


def encode(pixels: Pixels) -> dict[str, Any]:
    """Return COCO's compressed run-length encoding, its counts as text."""
    from hotcoco import mask as rle

    encoded = rle.encode(np.asfortranarray(pixels))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
