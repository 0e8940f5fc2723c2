"""Masks in files of detections: COCO's run-length encoding, its counts packed into text or not, and polygons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from detkit.formats.jsonrecords import is_number, shown

if TYPE_CHECKING:
    from detkit.data import Indices

_LONGEST = 12
"""Characters of one count: 60 bits, far more than an image has pixels."""


def mask_fault(mask: Any, size: list[int]) -> str:
    """Say what is wrong with a mask; nothing where it can be used on an image of this width and height."""
    if isinstance(mask, list):
        sound = all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(is_number, p)) for p in mask)
        return "" if sound else "a polygon is no list of at least three points x, y, x, y ..."
    if not isinstance(mask, dict) or not {"size", "counts"} <= set(mask):
        return f"{shown(mask)}; expected COCO's encoding with 'size' and 'counts', or polygons"
    if mask["size"] != size[::-1]:
        return f"its size is {shown(mask['size'])}; that of the image, height first, is {size[::-1]}"
    counts, pixels = mask["counts"], size[0] * size[1]
    if isinstance(counts, list):
        sound = all(type(count) is int and count >= 0 for count in counts) and sum(counts) == pixels
    else:
        runs = _unpacked(counts) if isinstance(counts, str) else None
        if runs is None:
            return f"its counts cannot be read: {shown(counts)}; expected COCO's text, or a list of numbers"
        # Each run by itself first: the sum of small ones cannot overflow.
        sound = bool((runs >= 0).all() and (runs <= pixels).all()) and int(runs.sum()) == pixels
    return "" if sound else f"its counts do not add up to {size[0]}x{size[1]} pixels; it may have been cut off"


def _unpacked(text: str) -> Indices | None:
    """Return the run lengths in COCO's text, as cocoapi's ``rleFrString`` reads them; None where it is none.

    A character less 48 holds five bits of a number, the lowest first, and a sixth that says whether more follow; the
    fifth bit of the last is the sign. From the fourth number on, each is the difference from the last but one.
    """
    if not text.isascii():
        return None
    if not text:
        return np.zeros(0, np.int64)
    codes = np.frombuffer(text.encode(), np.uint8) - 48  # what is below wraps around
    if codes.max() > 63 or codes[-1] & 32:
        return None
    last = (codes < 32).nonzero()[0]
    length = last.copy()
    length[0] += 1
    length[1:] -= last[:-1]
    if length.max() > _LONGEST:
        return None
    # From the last character to the first: a negative one's bits above all others are set.
    runs: Indices = ((codes[last] & 31) ^ 16).astype(np.int64) - 16
    for back in range(1, int(length.max())):
        more = length > back
        runs[more] = runs[more] << 5 | codes[last[more] - back] & 31
    for begin in (1, 2):
        np.cumsum(runs[begin::2], out=runs[begin::2])
    return runs
