"""COCO's records decoded piece by piece, so that a million of them never exist at once.

This module needs nothing but the standard library and msgspec and runs as a script, too:
`detkit.formats.cococolumns` starts it in helper processes for shares of a large file. A helper finds the whole file as
its standard input; told where its share begins and ends, it writes the columns of what is plain in there.
"""

from __future__ import annotations

import gc
import math
import mmap
import re
import sys
from array import array
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

if __name__ == "__main__":
    sys.path.append(sys.argv[1])  # where msgspec is

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

Columns: TypeAlias = "dict[str, array[Any]]"

_Decoded = TypeVar("_Decoded")

PIECE = 1 << 18
"""Bytes that are decoded at a time; a thousand records or two, whose columns are small enough to be allocated fast."""
BETWEEN = re.compile(rb"\}\s*,\s*\{")
"""What stands between two records; it may also stand within one, and then a cut there does not decode."""
CODES = {"xywh": "d", "image_ids": "q", "category_ids": "q", "ids": "q", "area": "d"}
CODES |= {"crowd": "B", "difficult": "B", "masked": "B"}
"""The columns of annotations and the type of each, as `array` calls it; ``xywh`` has four numbers a record.

``masked`` tells that there is a ``segmentation``, be it an empty one.
"""


class Annotation(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """A record that holds what COCO's own files hold."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    id: int
    area: float | None = None
    iscrowd: int | None = None
    segmentation: Any = None
    difficult: int | None = None


decode_plain = msgspec.json.Decoder(list[Any]).decode
decode_annotations = msgspec.json.Decoder(list[Annotation]).decode


def piece_at(
    text: memoryview, at: int, end: int, border: re.Match[bytes] | None, decode: Callable[[bytes], _Decoded]
) -> tuple[_Decoded, int]:
    """Decode some records from ``at``, where one begins; return what becomes of them, and where the next one begins.

    A cut at the wrong place leaves a bracket or a string open, which never decodes; then the piece becomes twice as
    long, so that the work stays proportional to the length. It ends no later than at ``border``, where that is right.
    """
    tried, wanted = at, PIECE
    while True:
        cut = BETWEEN.search(text, at + wanted, end)
        if border is not None and tried < border.start() and (cut is None or border.start() < cut.start()):
            cut = border
        stop = cut.start() + 1 if cut else end
        try:
            piece = decode(b"".join((b"[", text[at:stop], b"]")))
        except msgspec.ValidationError:
            raise  # well-formed
        except msgspec.DecodeError:
            if cut is None:
                raise
            tried, wanted = stop, 2 * (stop - at)
        else:
            return piece, cut.end() - 1 if cut else end


def columns_of(annotations: list[Annotation]) -> Columns:
    """Return the columns of records. Raises `OverflowError` for an id of more than 64 bits."""
    n = len(annotations)

    def flags(values: list[int | None]) -> bytes:
        return bytes(map(bool, values)) if any(values) else bytes(n)

    area = [a.area for a in annotations]
    if None in area:
        area = [math.nan if value is None else value for value in area]
    columns: dict[str, Any] = {
        "image_ids": [a.image_id for a in annotations],
        "category_ids": [a.category_id for a in annotations],
        "xywh": [number for a in annotations for number in a.bbox],
        "ids": [a.id for a in annotations],
        "area": area,
        "crowd": flags([a.iscrowd for a in annotations]),
        "difficult": flags([a.difficult for a in annotations]),
        "masked": bytes([a.segmentation is not None for a in annotations]),
    }
    return {name: array(code, columns[name]) for name, code in CODES.items()}


def plain_columns(piece: bytes) -> Columns | None:
    """Return the columns of records; None where one has a mask or is unusual in another way."""
    try:
        annotations = decode_annotations(piece)
        return None if any(a.segmentation for a in annotations) else columns_of(annotations)
    except (msgspec.ValidationError, OverflowError):
        return None


def main() -> None:
    """Write the columns of a share of the file that is the standard input, piece by piece.

    Each has three numbers before it: where it begins, where the next record does, how many there are. That a record
    begins where the share does is a guess. If it is wrong, no piece of it is one that is looked for.
    """
    gc.disable()  # which looks through thousands of boxes again and again, and nothing is in cycles
    at, end = map(int, sys.argv[2:])
    text = memoryview(mmap.mmap(sys.stdin.fileno(), 0, access=mmap.ACCESS_READ))
    while at < end:
        try:
            columns, after = piece_at(text, at, end, None, plain_columns)
        except (ValueError, RecursionError):
            return  # it is not JSON, or not all of it is in this share
        if columns is not None:
            sys.stdout.buffer.write(array("q", [at, after, len(columns["ids"])]))
            for column in columns.values():
                sys.stdout.buffer.write(column)
        at = after


if __name__ == "__main__":
    main()
