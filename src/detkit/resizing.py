"""Images and masks at another size, as the frameworks that models were trained with resize.

A resize is separable: an output pixel is a weighted sum of a few input pixels of its row, then of its column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from detkit.images import Image

Resampling: TypeAlias = Literal["bilinear", "opencv"]
"""``bilinear``: antialiased, as Pillow and ``torchvision.transforms`` do it; ``opencv``: OpenCV's area mean to shrink,
its cubic to enlarge and its bilinear, not antialiased, where one side shrinks and the other grows."""

_CUBIC = -0.75
"""OpenCV's coefficient of the cubic kernel; Pillow's is -0.5."""
_ONE = 2048
"""OpenCV's weights of bytes are whole numbers, of this sum (``INTER_RESIZE_COEF_SCALE`` in its resize.cpp)."""


class Taps(NamedTuple):
    """Which input pixels make an output pixel along one axis."""

    indices: NDArray[np.int64]
    """``(taps, n)``"""
    weights: NDArray[Any]
    """``(taps, n)``, of sum 1."""


def resize(image: Image, width: int, height: int, resampling: Resampling = "bilinear") -> Image:
    """Return an ``(h, w, 3)`` uint8 image stretched to a size; an image of that size stays as it is."""
    if image.shape[:2] == (height, width):
        return image
    if resampling == "bilinear":
        stretched = PillowImage.fromarray(image).resize((width, height), PillowImage.Resampling.BILINEAR)
        return np.asarray(stretched)
    if width < image.shape[1] and height < image.shape[0]:
        return _shrunk(image, width, height)
    cubic = width > image.shape[1] and height > image.shape[0]
    return _in_whole_numbers(image, width, height, cubic=cubic)


def _shrunk(image: Image, width: int, height: int) -> Image:
    means = apply(image, area_taps(image.shape[0], height), area_taps(image.shape[1], width))
    whole = image.shape[0] % height == 0 and image.shape[1] % width == 0
    return np.asarray((np.floor(means + np.float32(0.5)) if whole else np.rint(means)).astype(np.uint8))


def _in_whole_numbers(image: Image, width: int, height: int, *, cubic: bool) -> Image:
    """Resize with OpenCV's rounding, too: a network that has learnt little can tell the difference of one level."""
    taps = cubic_taps if cubic else linear_taps
    rows, columns = (
        Taps(one.indices, np.rint(one.weights * _ONE).astype(np.int32))
        for one in (taps(image.shape[0], height), taps(image.shape[1], width))
    )
    across = _along(image.swapaxes(0, 1), columns).swapaxes(0, 1)
    if cubic:
        shares = Taps(rows.indices, rows.weights.astype(np.float32) / np.float32(_ONE * _ONE))
        mixed = np.rint(_along(across.astype(np.float32), shares))
    else:
        upper, lower = (
            ((across[indices] >> 4) * weights[:, None, None]) >> 16
            for indices, weights in zip(*rows, strict=True)
        )  # fmt: skip
        mixed = (upper + lower + 2) >> 2
    return np.asarray(np.clip(mixed, 0, 255).astype(np.uint8))


def apply(pixels: NDArray[Any], rows: Taps, columns: Taps) -> NDArray[np.float32]:
    """Return an ``(h, w, ...)`` array with its first two axes resampled."""
    return _along(_along(pixels.swapaxes(0, 1), columns).swapaxes(0, 1), rows)


def _along(pixels: NDArray[Any], taps: Taps) -> NDArray[Any]:
    out = np.zeros((taps.indices.shape[1], *pixels.shape[1:]), dtype=taps.weights.dtype)
    ones = (1,) * (pixels.ndim - 1)
    for indices, weights in zip(*taps, strict=True):
        out += pixels[indices] * weights.reshape(-1, *ones)
    return out


def linear_taps(size: int, to: int) -> Taps:
    """Two neighbours, by the distance of the pixels' centres; the border's pixel stands for what lies beyond it."""
    return _kernel(size, to, (0, 1), lambda share: np.stack([1 - share, share]))


def cubic_taps(size: int, to: int) -> Taps:
    """Four neighbours, by OpenCV's cubic kernel."""

    def weights(share: NDArray[np.float32]) -> NDArray[np.float32]:
        a, x = np.float32(_CUBIC), share
        first = ((a * (x + 1) - 5 * a) * (x + 1) + 8 * a) * (x + 1) - 4 * a
        second = ((a + 2) * x - (a + 3)) * x * x + 1
        third = ((a + 2) * (1 - x) - (a + 3)) * (1 - x) * (1 - x) + 1
        return np.stack([first, second, third, 1 - first - second - third])

    return _kernel(size, to, (-1, 0, 1, 2), weights)


def area_taps(size: int, to: int) -> Taps:
    """Every pixel under the output pixel, by the share of it that is; ``to`` is no more than ``size``."""
    scale = size / to
    low = np.arange(to) * scale
    indices = np.floor(low).astype(np.int64) + np.arange(int(np.ceil(scale)) + 1)[:, None]
    covered = np.minimum(indices + 1, low + scale) - np.maximum(indices, low)
    weights = np.clip(covered, 0, None)
    return Taps(np.minimum(indices, size - 1), (weights / weights.sum(axis=0)).astype(np.float32))


def _kernel(
    size: int, to: int, offsets: tuple[int, ...], weights: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> Taps:
    centre = ((np.arange(to) + 0.5) * (size / to) - 0.5).astype(np.float32)  # as OpenCV has it
    low = np.floor(centre).astype(np.int64)
    indices = np.clip(low + np.array(offsets)[:, None], 0, size - 1)
    return Taps(indices, weights(centre - low.astype(np.float32)))
