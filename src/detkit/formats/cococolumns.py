"""The tables of a COCO JSON file as columns, decoded piece by piece, so that a million records never exist at once.

A record that holds what COCO's own files hold is decoded with its types. A piece with any other record, be it with
further keys or with a fault, is decoded as plain values and looked through one by one.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from detkit.formats.imagefiles import LARGEST_SIDE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from detkit.boxes import Boxes
    from detkit.data import Extra, Flags, Indices

Ids: TypeAlias = "NDArray[np.int64] | list[Any]"
"""A column of ids: an array where all are integers, else a list."""

_Columns = TypeVar("_Columns")

_PIECE = 1 << 20
"""Bytes that are decoded at a time; a few thousand records, which stay in a processor's cache."""
_BETWEEN = re.compile(rb"\}\s*,\s*\{")
"""What stands between two records; it may also stand within one, and then a cut there does not decode."""


class _Image(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    id: int
    file_name: str
    width: int
    height: int


class _Annotation(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    id: int
    area: float | None = None
    iscrowd: int | None = None
    segmentation: Any = None
    difficult: int | None = None


KNOWN = frozenset(_Annotation.__struct_fields__)
KNOWN_OF_IMAGE = frozenset(_Image.__struct_fields__)
_images = msgspec.json.Decoder(list[_Image])
_annotations = msgspec.json.Decoder(list[_Annotation])
_plain = msgspec.json.Decoder(list[Any])


@dataclass
class Images:
    """Consecutive image records as columns."""

    ids: Ids
    file_names: list[str]
    sizes: Indices
    """``(n, 2)`` width and height, 0 where the file does not say."""
    extra: list[Extra] | None = None


@dataclass
class Annotations:
    """Consecutive annotation records as columns, those that cannot be used left out."""

    image_ids: Ids
    category_ids: Ids
    xywh: Boxes
    ids: Ids
    area: NDArray[np.float64]
    """NaN where the file gives none."""
    crowd: Flags
    difficult: Flags
    records: Indices
    masks: list[Any] | None = None
    extra: list[Extra] | None = None

    def take(self, chosen: Flags) -> Annotations:
        """Return the records where ``chosen`` is true."""

        def pick(column: Any) -> Any:
            if column is None or isinstance(column, np.ndarray):
                return None if column is None else column[chosen]
            return [value for value, wanted in zip(column, chosen.tolist(), strict=True) if wanted]

        return Annotations(**{name: pick(column) for name, column in vars(self).items()})


def image_pieces(table: msgspec.Raw) -> Iterator[Images | list[Any]]:
    """Yield the images of a JSON array in pieces: columns, or plain values where one of a piece is unusual.

    Raises `ValueError` where there is something in it that no JSON value can be.
    """
    return _pieces(table, lambda piece: _image_columns(_images.decode(piece)))


def annotation_pieces(table: msgspec.Raw) -> Iterator[Annotations | list[Any]]:
    """Do the same for annotations; records are counted from the beginning of each piece."""
    return _pieces(table, lambda piece: _annotation_columns(_annotations.decode(piece)))


def _pieces(table: msgspec.Raw, columns: Callable[[bytes], _Columns]) -> Iterator[_Columns | list[Any]]:
    """Cut an array that is known to be well-formed between two records and decode each part.

    A cut at the wrong place leaves a bracket or a string open, which never decodes; then the piece becomes twice as
    long, so that the work stays proportional to the length.
    """
    text = memoryview(table)
    begin, wanted = 1, _PIECE
    while True:
        cut = _BETWEEN.search(text, begin + wanted)
        end = cut.start() + 1 if cut else len(text) - 1
        content = b"".join((b"[", text[begin:end], b"]"))
        try:
            try:
                piece: _Columns | list[Any] = columns(content)
            except (msgspec.ValidationError, OverflowError):  # another record than most, an id of more than 64 bits
                piece = _plain.decode(content)
        except msgspec.ValidationError:
            raise  # a number too large for any float
        except msgspec.DecodeError:
            if cut is None:
                raise
            wanted = 2 * (end - begin)
            continue
        yield piece
        if cut is None:
            return
        begin, wanted = cut.end() - 1, _PIECE


def _image_columns(images: list[_Image]) -> Images:
    n = len(images)
    ids = np.fromiter(map(attrgetter("id"), images), np.int64, n)
    sides = np.fromiter(chain.from_iterable(map(attrgetter("width", "height"), images)), np.int64, 2 * n)
    sizes = np.where((sides >= 1) & (sides <= LARGEST_SIDE), sides, 0).reshape(-1, 2)
    return Images(ids, list(map(attrgetter("file_name"), images)), sizes)


def _annotation_columns(annotations: list[_Annotation]) -> Annotations:
    n = len(annotations)

    def column(name: str) -> Iterator[Any]:
        return map(attrgetter(name), annotations)

    def flags(name: str) -> Flags:
        return np.fromiter(map(bool, column(name)), bool, n) if any(column(name)) else np.zeros(n, dtype=bool)

    try:
        area = np.fromiter(column("area"), np.float64, n)
    except TypeError:  # some have none
        area = np.array([math.nan if value is None else value for value in column("area")], np.float64)
    return Annotations(
        image_ids=np.fromiter(column("image_id"), np.int64, n),
        category_ids=np.fromiter(column("category_id"), np.int64, n),
        xywh=np.fromiter(chain.from_iterable(column("bbox")), np.float64, 4 * n).reshape(-1, 4),
        ids=np.fromiter(column("id"), np.int64, n),
        area=area,
        crowd=flags("iscrowd"),
        difficult=flags("difficult"),
        records=np.arange(n),
        masks=[mask or None for mask in column("segmentation")] if any(column("segmentation")) else None,
    )


def plain_images(records: Sequence[dict[str, Any]], file_names: list[str]) -> Images:
    """Return the columns of image records that are usable, or empty."""
    extra: list[Extra] = [{k: v for k, v in image.items() if k not in KNOWN_OF_IMAGE} for image in records]
    sides = [[_side(image.get("width")), _side(image.get("height"))] for image in records]
    return Images(
        ids=to_ids([image.get("id") for image in records]),
        file_names=file_names,
        sizes=np.array([side if all(side) else [0, 0] for side in sides], dtype=np.int64).reshape(-1, 2),
        extra=extra if any(extra) else None,
    )


def plain_annotations(good: Sequence[dict[str, Any]], records: list[int]) -> Annotations:
    """Return the columns of annotation records that are usable, and have these numbers."""
    known: dict[Any, Extra] = {}
    extra = [_shared({k: v for k, v in a.items() if k not in KNOWN}, known) for a in good]
    masks = [a.get("segmentation") or None for a in good]
    areas = [a.get("area") for a in good]
    return Annotations(
        image_ids=to_ids([a["image_id"] for a in good]),
        category_ids=to_ids([a["category_id"] for a in good]),
        xywh=np.array([a["bbox"] for a in good], dtype=np.float64).reshape(-1, 4),
        ids=to_ids([a.get("id") for a in good]),
        area=np.array([area if is_number(area) else math.nan for area in areas], dtype=np.float64),
        crowd=np.array([bool(a.get("iscrowd")) for a in good], dtype=bool),
        difficult=np.array([bool(a.get("difficult")) for a in good], dtype=bool),
        records=np.array(records, dtype=np.int64),
        masks=masks if any(masks) else None,
        extra=extra if any(extra) else None,
    )


def _shared(extra: dict[str, Any], known: dict[Any, Extra]) -> Extra:
    """Return an earlier mapping with the same texts, so that objects which are alike share one, as in VOC's."""
    if not all(type(value) is str for value in extra.values()):
        return extra
    return known.setdefault(tuple(extra.items()), extra)


def join_images(pieces: Sequence[Images]) -> Images:
    """Put pieces one after another."""
    return Images(
        ids=_join_ids([piece.ids for piece in pieces]),
        file_names=[name for piece in pieces for name in piece.file_names],
        sizes=np.concatenate([np.zeros((0, 2), np.int64), *(piece.sizes for piece in pieces)]),
        extra=_join([(piece.extra, len(piece.sizes)) for piece in pieces], {}),
    )


def join_annotations(pieces: Sequence[Annotations]) -> Annotations:
    """Put pieces one after another."""

    def joined(name: str, like: Any) -> Any:
        return np.concatenate([like, *(getattr(piece, name) for piece in pieces)])

    return Annotations(
        image_ids=_join_ids([piece.image_ids for piece in pieces]),
        category_ids=_join_ids([piece.category_ids for piece in pieces]),
        xywh=joined("xywh", np.zeros((0, 4))),
        ids=_join_ids([piece.ids for piece in pieces]),
        area=joined("area", np.zeros(0)),
        crowd=joined("crowd", np.zeros(0, bool)),
        difficult=joined("difficult", np.zeros(0, bool)),
        records=joined("records", np.zeros(0, np.int64)),
        masks=_join([(piece.masks, len(piece.xywh)) for piece in pieces], None),
        extra=_join([(piece.extra, len(piece.xywh)) for piece in pieces], {}),
    )


def _join(columns: Sequence[tuple[list[Any] | None, int]], blank: Any) -> list[Any] | None:
    if all(column is None for column, _ in columns):
        return None
    return [value for column, length in columns for value in (column if column is not None else [blank] * length)]


def to_ids(values: list[Any]) -> Ids:
    """Return an array if all values are integers of 64 bits, else the list."""
    if all(type(value) is int for value in values):
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError:
            pass
    return values


def _join_ids(columns: Sequence[Ids]) -> Ids:
    arrays = [column for column in columns if isinstance(column, np.ndarray)]
    if len(arrays) == len(columns):
        return np.concatenate([np.zeros(0, np.int64), *arrays])
    return [value for column in columns for value in to_list(column)]


def to_list(ids: Ids) -> list[Any]:
    """Return ids as Python values."""
    return ids if isinstance(ids, list) else ids.tolist()


def are_unique(ids: Ids) -> bool:
    """Return whether no id is there twice."""
    if isinstance(ids, list):
        return len(set(ids)) == len(ids)
    return bool((np.diff(np.sort(ids)) != 0).all())


def positions(ids: Ids, known: Ids) -> Indices:
    """Return where each id is among the known ones, -1 where it is not."""
    if isinstance(ids, list) or isinstance(known, list):
        index = {value: i for i, value in enumerate(to_list(known))}
        return np.fromiter((index.get(value, -1) for value in to_list(ids)), dtype=np.int64, count=len(ids))
    if not len(known):
        return np.full(len(ids), -1)
    order = np.argsort(known, kind="stable")
    at = np.minimum(np.searchsorted(known, ids, sorter=order), len(known) - 1)
    found = order[at]
    return np.where(known[found] == ids, found, -1)


def is_number(value: Any) -> bool:
    """Return whether a value is a number that a float can hold."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _side(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) and 1 <= value <= LARGEST_SIDE else 0
