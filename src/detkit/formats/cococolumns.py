"""The tables of a COCO JSON file as columns, decoded piece by piece, so that a million records never exist at once.

A record that holds what COCO's own files hold is decoded with its types. A piece with any other record, be it with
further keys or with a fault, is decoded as plain values and looked through one by one.
"""

from __future__ import annotations

import math
import re
import sys
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from detkit.formats import cocoscan
from detkit.formats.cocoscan import BETWEEN
from detkit.formats.imagefiles import LARGEST_SIDE
from detkit.formats.parallel import Helper, processes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from detkit.boxes import Boxes
    from detkit.data import Extra, Flags, Indices

Ids: TypeAlias = "NDArray[np.int64] | list[Any]"
"""A column of ids: an array where all are integers, else a list."""

_NO_MASK: list[Any] = []
_CODES = tuple(cocoscan.CODES.items())
_UNUSUAL = (msgspec.ValidationError, OverflowError)
"""Another record than most, an id of more than 64 bits."""
_BYTES_PER_HELPER = 1 << 24
"""A helper costs 0.05 s of CPU and reads a megabyte in 5 ms."""
_SAMPLE = 4096
"""Bytes of a table that show what its records are like."""


class _Image(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    id: int
    file_name: str
    width: int
    height: int


KNOWN = frozenset(cocoscan.Annotation.__struct_fields__)
KNOWN_OF_IMAGE = frozenset(_Image.__struct_fields__)
_decode_images = msgspec.json.Decoder(list[_Image]).decode


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
    text, at = memoryview(table), 1
    while at < len(text) - 1:
        piece, at = cocoscan.piece_at(text, at, len(text) - 1, None, _images)
        yield piece


def _images(content: bytes) -> Images | list[Any]:
    try:
        images = _decode_images(content)
        n = len(images)
        ids = np.fromiter(map(attrgetter("id"), images), np.int64, n)
        sides = np.fromiter(chain.from_iterable(map(attrgetter("width", "height"), images)), np.int64, 2 * n)
    except _UNUSUAL:
        return cocoscan.decode_plain(content)
    sizes = np.where((sides >= 1) & (sides <= LARGEST_SIDE), sides, 0).reshape(-1, 2)
    return Images(ids, list(map(attrgetter("file_name"), images)), sizes)


@contextmanager
def annotation_pieces(
    table: msgspec.Raw | list[Any], file: IO[bytes], whole: memoryview
) -> Iterator[Iterator[Annotations | list[Any]]]:
    """Do the same for annotations; records are counted from the beginning of each piece.

    ``whole`` is the file, mapped. Shares of a large table are decoded by helpers while the context lasts.
    """
    text = memoryview(table if isinstance(table, msgspec.Raw) else b"[]")
    with ExitStack() as stack:
        yield _annotation_pieces(text, [stack.enter_context(share) for share in _shares(text, file, whole)])


class _Share(Helper):
    """A part of the annotations that a helper decodes."""

    def __init__(self, begin: int, end: int, border: re.Match[bytes], file: IO[bytes]) -> None:
        """Start after a border that seems to be between two records of the text; text and share are those bytes."""
        self.border = border
        self._begin = begin
        packages = str(Path(msgspec.__file__).parents[1])
        super().__init__(cocoscan.__file__, file, packages, str(begin + border.end() - 1), str(end))

    def pieces(self) -> dict[int, tuple[Annotations, int]]:
        """Return what was decoded from each place of the text, and where the record after it begins."""
        found: dict[int, tuple[Annotations, int]] = {}
        answer, at = self.answer(), 0

        def take(code: str, count: int) -> NDArray[Any]:
            nonlocal at
            values = np.frombuffer(answer, code, count, at)
            at += values.nbytes
            return values

        with suppress(ValueError, OverflowError):  # it was something else that answered
            while at < len(answer):
                begin, after, count = take("q", 3).tolist()
                columns = {name: take(code, count * (4 if name == "xywh" else 1)) for name, code in _CODES}
                found[begin - self._begin] = _of_columns(columns), after - self._begin
        return found


def _shares(text: memoryview, file: IO[bytes], whole: memoryview) -> list[_Share]:
    """Start a helper for each share but the first, where that pays: masks are no columns."""
    count = min(processes(), len(text) // _BYTES_PER_HELPER)
    first = BETWEEN.search(text, _SAMPLE) if count > 1 else None
    try:
        if first is None or cocoscan.plain_columns(bytes(text[: first.start() + 1]) + b"]") is None:
            return []
    except (ValueError, RecursionError):
        return []  # an unusual file
    begin = _address(text) - _address(whole.obj)
    borders = [border for i in range(1, count) if (border := BETWEEN.search(text, len(text) * i // count))]
    ends = [*(border.start() + 1 for border in borders[1:]), len(text) - 1]
    return [_Share(begin, begin + end, border, file) for border, end in zip(borders, ends, strict=True)]


def _address(content: Any) -> int:
    """Return where bytes lie in memory; that of two parts of a mapped file tells how far they are apart."""
    return np.frombuffer(content, np.uint8).ctypes.data


def _annotation_pieces(text: memoryview, shares: list[_Share]) -> Iterator[Annotations | list[Any]]:
    """Go from record to record: what a helper decoded from there is taken, the rest is decoded here."""
    at, end = 1, len(text) - 1
    decoded: dict[int, tuple[Annotations, int]] = {}
    while at < end:
        while shares and at > shares[0].border.start():
            at = max(at, shares[0].border.end() - 1)
            decoded = shares.pop(0).pieces()
        piece: Annotations | list[Any]
        if at in decoded:
            piece, at = decoded.pop(at)
        else:
            piece, at = cocoscan.piece_at(text, at, end, shares[0].border if shares else None, _annotations)
        yield piece


def _annotations(content: bytes) -> Annotations | list[Any]:
    try:
        annotations = cocoscan.decode_annotations(content)
        columns = cocoscan.columns_of(annotations)
    except _UNUSUAL:
        return cocoscan.decode_plain(content)
    found = _of_columns({name: np.asarray(column) for name, column in columns.items()})
    found.masks = _masks([a.segmentation for a in annotations])
    return found


def _of_columns(columns: dict[str, NDArray[Any]]) -> Annotations:
    """Return columns whose types and shapes are those of `cocoscan.CODES`."""
    masked = columns["masked"]
    return Annotations(
        image_ids=columns["image_ids"],
        category_ids=columns["category_ids"],
        xywh=columns["xywh"].reshape(-1, 4),
        ids=columns["ids"],
        area=columns["area"],
        crowd=columns["crowd"].view(np.bool_),
        difficult=columns["difficult"].view(np.bool_),
        records=np.arange(len(columns["ids"])),
        masks=[_NO_MASK if there else None for there in masked.tolist()] if masked.any() else None,
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
        masks=_masks([a.get("segmentation") for a in good]),
        extra=extra if any(extra) else None,
    )


def _masks(segmentations: list[Any]) -> list[Any] | None:
    """Return masks, None where there is none; an empty list, which many tools write for a box, stays one."""
    if all(mask is None for mask in segmentations):
        return None
    return [mask or (None if mask is None else _NO_MASK) for mask in segmentations]


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
    low, high = int(known.min()), int(known.max())
    if high - low < 4 * (len(known) + len(ids)):  # a table of all ids between takes little, and no search
        table = np.full(high - low + 1, -1)
        table[known[::-1] - low] = np.arange(len(known))[::-1]
        between = (ids >= low) & (ids <= high)
        return np.where(between, table[np.where(between, ids - low, 0)], -1)
    order = np.argsort(known, kind="stable")
    at = np.minimum(np.searchsorted(known, ids, sorter=order), len(known) - 1)
    found = order[at]
    return np.where(known[found] == ids, found, -1)


def is_number(value: Any) -> bool:
    """Return whether a value is a number that a float can hold."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _side(value: Any) -> int:
    return int(value) if isinstance(value, (int, float)) and 1 <= value <= LARGEST_SIDE else 0
