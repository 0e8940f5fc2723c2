"""Masks become pixels at any size, and pixels masks; what is no mask is an error with a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from detkit.errors import InvalidData
from detkit.masks import decode, encode

SIZE = (60, 50)
SQUARE = [[5, 10, 30, 10, 30, 20, 5, 20]]


def test_three_ways_to_write_a_mask() -> None:
    pixels = np.zeros((50, 60), dtype=bool)
    pixels[10:20, 5:30] = True
    column = [5 * 50 + 10, *[10, 40] * 24, 10, 29 * 50 + 30 + 50]
    for mask in (SQUARE, encode(pixels), {"size": [50, 60], "counts": column}):
        assert (decode(mask, SIZE) == pixels).all()
    assert isinstance(encode(pixels)["counts"], str)
    two = decode([*SQUARE, [40, 30, 50, 30, 50, 40, 40, 40]], SIZE)
    assert (two[10:20, 5:30].all(), two[30:40, 40:50].all(), two.sum()) == (True, True, 350)


@pytest.mark.parametrize("to", [(120, 100), (30, 25), (60, 100), (90, 40)])
def test_at_another_size(to: tuple[int, int]) -> None:
    """A disc keeps its place and its share of the image, however it is written."""
    y, x = np.mgrid[:50, :60] + 0.5
    disc = (x - 30) ** 2 + (y - 20) ** 2 < 15**2
    turns = np.linspace(0, 2 * np.pi, 60)
    outline = np.column_stack([30 + 15 * np.cos(turns), 20 + 15 * np.sin(turns)]).ravel().tolist()
    for mask in (encode(disc), [outline]):
        drawn = decode(mask, SIZE, to)
        assert drawn.shape == to[::-1]
        assert abs(drawn.mean() - disc.mean()) < 0.02
        rows, columns = np.nonzero(drawn)
        assert abs((columns.mean() + 0.5) / to[0] - 0.5) < 0.02
        assert abs((rows.mean() + 0.5) / to[1] - 0.4) < 0.02


def test_empty_masks() -> None:
    nothing = np.zeros((50, 60), dtype=bool)
    assert not decode(encode(nothing), SIZE).any()
    assert not decode([], SIZE).any()


@pytest.mark.parametrize(
    "mask",
    [
        7,
        None,
        [[1, 2, 3]],
        [[1, 2, 3, 4]],
        [["a"] * 6],
        {"size": [50, 60]},
        {"counts": "T8"},
        {"size": [50, 60], "counts": "!"},
        {"size": [60, 50], "counts": [3000]},
        {"size": [2**40, 2**40], "counts": "0"},
        {"size": ["a", 60], "counts": [5]},
    ],
)
def test_what_is_no_mask(mask: Any) -> None:
    with pytest.raises(InvalidData, match="a mask cannot be read: .*expected COCO's polygons or run-length"):
        decode(mask, SIZE)
