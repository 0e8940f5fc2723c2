"""The records of files with detections, as columns: COCO's results, and the JSON of `detkit.detections.Detections`.

What images and classes they speak of is for the caller to find out. A record that is as it should be is decoded with
its types; a piece with any other record is decoded as plain values and looked through one by one.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from detkit.boxes import xywh_to_xyxy
from detkit.formats.cocoscan import piece_at
from detkit.formats.identities import Id, Listed
from detkit.formats.jsonrecords import Place, is_box, is_number, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from detkit.boxes import Boxes
    from detkit.data import Flags, Indices
    from detkit.formats.findings import Finding
    from detkit.formats.identities import ClassKey, ImageKey


class Result(msgspec.Struct, gc=False, omit_defaults=True):
    """One detection as COCO's results files have it, with the names that its ids stand for where these are told."""

    image_id: Id
    category_id: Id
    bbox: tuple[float, float, float, float]
    score: float
    segmentation: Any = None
    file_name: str = ""
    category_name: str = ""


class _One(msgspec.Struct, gc=False):
    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Any = None


class _OfImage(msgspec.Struct, gc=False):
    detections: list[_One]
    path: str = ""
    width: int = 0
    height: int = 0
    image_id: Id | None = None


_results = msgspec.json.Decoder(list[Result])
_plain = msgspec.json.Decoder(list[Any])
_of_image = msgspec.json.Decoder(_OfImage)
_tables = msgspec.json.Decoder(dict[str, msgspec.Raw])
_names = attrgetter("file_name", "image_id")
_kinds = attrgetter("category_name", "category_id")
_NO_SPACE = re.compile(rb"\S")


@dataclass
class Records:
    """Consecutive records as columns, those that are at fault left out."""

    place: Place
    table: str
    """How a record is found in the file: ``annotations``, with its number in brackets."""
    records: Indices
    """The numbers of the records."""
    images: Sequence[ImageKey]
    classes: Sequence[ClassKey]
    boxes: Boxes
    """xyxy, whatever the file has."""
    scores: NDArray[np.float64]
    masks: list[Any] | None
    size: tuple[int, int] | None = None
    """Where the file tells all detections of one image together: its width and height, zeros where not told."""
    image: ImageKey = ("", None)
    """In that case, the image."""

    @property
    def box_key(self) -> str:
        """What a record calls its box."""
        return "bbox" if self.size is None else "box"

    @property
    def mask_key(self) -> str:
        """What a record calls its mask."""
        return "segmentation" if self.size is None else "mask"

    def at(self, row: int, key: str = "") -> str:
        """Say where a row is in the file."""
        return f"{self.table}[{self.records[row]}]{'.' if key else ''}{key}"

    def error(self, row: int, code: str, message: str, key: str = "") -> None:
        """Add an error about a row."""
        self.place.error(code, message, self.at(row, key), int(self.records[row]))

    def take(self, chosen: Flags) -> Records:
        """Return the rows where ``chosen`` is true."""
        if chosen.all():
            return self

        def pick(column: Any) -> Any:
            return None if column is None else [v for v, wanted in zip(column, chosen.tolist(), strict=True) if wanted]

        columns = {name: getattr(self, name)[chosen] for name in ("records", "boxes", "scores")}
        columns |= {name: pick(getattr(self, name)) for name in ("images", "classes", "masks")}
        return Records(self.place, self.table, size=self.size, image=self.image, **columns)


class ResultsFile:
    """One file; every fault is added to ``findings`` and the rest goes on."""

    def __init__(self, path: Path, name: str, findings: list[Finding]) -> None:
        self._path = path
        self._place = Place(findings, name)
        self.file_names: Mapping[Id, str] = {}
        """What file names the file itself gives its image ids; complete once `records` has begun."""
        self.names: Mapping[Id, str] = {}
        """The same for categories."""

    def records(self) -> Iterator[Records]:
        """Yield the records in pieces."""
        for piece in self._pieces():
            sound = np.ones(len(piece.scores), dtype=bool)
            with np.errstate(over="ignore", invalid="ignore"):
                sides = piece.boxes[:, 2:] - piece.boxes[:, :2]
            fine = (sides >= 0).all(axis=1) & np.isfinite(sides).all(axis=1)
            for row in np.flatnonzero(~fine).tolist():
                box = [round(value, 3) for value in piece.boxes[row].tolist()]
                why = "has a negative width or height" if (sides[row] < 0).any() else "is beyond all numbers"
                piece.error(row, "bad-box", f"the box from {box[:2]} to {box[2:]} {why}", piece.box_key)
                sound[row] = False
            for row in np.flatnonzero((piece.scores < 0) | (piece.scores > 1)).tolist():
                piece.error(row, "bad-score", f"{piece.scores[row]:g}; expected a number from 0 to 1", "score")
                sound[row] = False
            yield piece.take(sound)

    def _pieces(self) -> Iterator[Records]:
        with self._path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                self._reject("nothing at all")
                return
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # its pages come and go
        begin = 3 if content[:3] == b"\xef\xbb\xbf" else 0
        start = _NO_SPACE.search(content, begin)
        end = content.find(b"\n", start.start() if start else begin)
        whole = end >= 0 and content[max(begin, end - 16) : end].rstrip()[-1:] == b"}"
        if start is None or start[0] != b"{":
            yield from self._list(memoryview(content)[begin:], "")
        elif whole and _NO_SPACE.search(content, end):  # an object in the first line, and more behind it
            content.seek(begin)
            for number, line in enumerate(iter(content.readline, b""), start=1):
                if line.strip():
                    yield from self._line(line.rstrip(), number)
        else:
            yield from self._object(memoryview(content)[begin:])

    def _line(self, line: bytes, number: int) -> Iterator[Records]:
        place = Place(self._place.findings, self._place.file, number)
        try:
            found = _of_image.decode(line)
        except (ValueError, RecursionError):
            found = _OfImage([])
        if found.path or found.image_id is not None:
            yield _columns_of_image(found, place)
        else:
            value = place.decode(line)
            if value is not None:
                yield from _look_through_image(value, place, "")

    def _object(self, content: memoryview) -> Iterator[Records]:
        try:
            tables: dict[str, Any] = _tables.decode(content)
            listed: dict[str, Any] = {
                key: msgspec.json.decode(tables[key]) for key in ("images", "categories") if key in tables
            }
        except (ValueError, RecursionError):
            value = self._place.decode(bytes(content))  # says what is wrong, and lets NaN through
            if value is None:
                return
            tables = listed = value
        if "detections" in tables:
            value = self._place.decode(bytes(content))
            yield from _look_through_image(value, self._place, "") if value is not None else ()
        elif "annotations" in tables:
            own = self._listed(listed)
            self.file_names, self.names = own.file_names, own.names
            table = tables["annotations"]
            if isinstance(table, list):
                yield from self._look_through(table, "annotations", 0)
            elif isinstance(table, msgspec.Raw):
                yield from self._list(memoryview(table), "annotations")
            else:
                self._reject(f"'annotations' that is {shown(table)}")
        else:
            self._reject(f"an object with {', '.join(map(repr, list(tables)[:5])) or 'nothing in it'}")

    def _reject(self, what: str) -> None:
        message = (
            f"{what}; expected COCO results, a list of objects with 'image_id', 'category_id', 'bbox' and 'score', or "
            "one line for each image as `detkit predict --json` prints it"
        )
        self._place.error("not-predictions", message)

    def _listed(self, tables: dict[str, Any]) -> Listed:
        found: dict[str, list[Any]] = {}
        for key, name in (("images", "file_name"), ("categories", "name")):
            listed = tables.get(key, [])
            found[key] = []
            for i, record in enumerate(listed if isinstance(listed, list) else [listed]):
                try:
                    found[key] += getattr(msgspec.convert({key: [record]}, Listed), key)
                except msgspec.ValidationError:
                    message = f"{shown(record)}; expected an object with 'id' and '{name}'"
                    self._place.error("bad-record", message, f"{key}[{i}]", i)
        return Listed(**found)

    def _list(self, content: memoryview, table: str) -> Iterator[Records]:
        try:
            raw = msgspec.json.decode(content, type=msgspec.Raw)
            text, at, begin = memoryview(raw), 1, 0
            if bytes(text[:1]) != b"[":
                self._reject(shown(msgspec.json.decode(raw)))
                return
            while at < len(text) - 1:
                piece, at = piece_at(text, at, len(text) - 1, None, _decoded)
                if piece and isinstance(piece[0], Result):
                    yield _columns(piece, self._place, table, begin)
                else:
                    yield from self._look_through(piece, table, begin)
                begin += len(piece)
        except msgspec.ValidationError as error:  # a number beyond all floats
            self._place.error("malformed", str(error), table)
        except (ValueError, RecursionError) as error:
            try:
                values = json.loads(bytes(content))  # Python writes NaN, which JSON does not have
            except json.JSONDecodeError as fault:
                self._place.error("malformed", f"not JSON: {fault.msg}", f"line {fault.lineno}, column {fault.colno}")
            except (ValueError, RecursionError):
                self._place.error("malformed", f"not JSON: {error}")
            else:
                if isinstance(values, list):
                    yield from self._look_through(values, table, 0)
                else:
                    self._reject(shown(values))

    def _look_through(self, values: list[Any], table: str, begin: int) -> Iterator[Records]:
        """Go through records of which at least one is unusual."""
        good: list[Result] = []
        records: list[int] = []
        for i, value in enumerate(values, start=begin):
            at = f"{table}[{i}]"
            if isinstance(value, dict) and "detections" in value and "bbox" not in value:
                yield from _look_through_image(value, self._place, at)
                continue
            found = _result(value, self._place, at, i)
            if found is not None:
                good.append(found)
                records.append(i)
        piece = _columns(good, self._place, table, 0)
        piece.records = np.array(records, dtype=np.int64)
        yield piece


def _decoded(content: bytes) -> list[Any]:
    """Return results, or plain values where one of them is unusual."""
    try:
        found: list[Any] = _results.decode(content)
    except msgspec.ValidationError:
        found = _plain.decode(content)
    return found


def _columns(results: list[Result], place: Place, table: str, begin: int) -> Records:
    n = len(results)
    xywh = np.fromiter(chain.from_iterable(map(attrgetter("bbox"), results)), np.float64, 4 * n).reshape(-1, 4)
    masks = list(map(attrgetter("segmentation"), results))
    with np.errstate(over="ignore"):  # found by `ResultsFile.records`
        boxes = xywh_to_xyxy(xywh)
    return Records(
        place,
        table,
        records=np.arange(begin, begin + n),
        images=list(map(_names, results)),
        classes=list(map(_kinds, results)),
        boxes=boxes,
        scores=np.fromiter(map(attrgetter("score"), results), np.float64, n),
        masks=masks if any(masks) else None,
    )


def _columns_of_image(found: _OfImage, place: Place, at: str = "", records: list[int] | None = None) -> Records:
    n = len(found.detections)
    image: ImageKey = (found.path, None) if found.image_id is None else ("", found.image_id)
    masks = [one.mask for one in found.detections]
    return Records(
        place,
        f"{at}{'.' if at else ''}detections",
        records=np.arange(n) if records is None else np.array(records, dtype=np.int64),
        images=[image] * n,
        classes=[(one.name, None) for one in found.detections],
        boxes=np.array([one.box for one in found.detections], dtype=np.float64).reshape(-1, 4),
        scores=np.array([one.score for one in found.detections], dtype=np.float64),
        masks=masks if any(masks) else None,
        size=(found.width, found.height),
        image=image,
    )


def _result(value: Any, place: Place, at: str, i: int) -> Result | None:
    """Return a record of COCO's results; None, and an error for everything that is wrong, where it is not one."""
    if not isinstance(value, dict):
        place.error("bad-record", f"expected an object, found {shown(value)}", at, i)
        return None
    sound = True
    for key in ("image_id", "category_id"):
        if isinstance(value.get(key), bool) or not isinstance(value.get(key), (int, str)):
            place.error("bad-id", f"{shown(value.get(key))}; expected a number or a string", f"{at}.{key}", i)
            sound = False
    sound &= _sound_numbers(value, "bbox", "[x, y, width, height]", place, at, i)
    texts = {key: value.get(key) or "" for key in ("file_name", "category_name")}
    for key, text in texts.items():
        if not isinstance(text, str):
            place.error("bad-record", f"{shown(text)}; expected text", f"{at}.{key}", i)
            sound = False
    if not sound:
        return None
    mask = value.get("segmentation")
    return Result(value["image_id"], value["category_id"], tuple(value["bbox"]), value["score"], mask, **texts)


def _look_through_image(value: dict[str, Any], place: Place, at: str) -> Iterator[Records]:
    """Yield the detections of one image, as `detkit.detections.Detections.to_dict` has them."""
    dot = "." if at else ""
    detections, path, image_id = value.get("detections"), value.get("path"), value.get("image_id")
    if not isinstance(detections, list):
        place.error("bad-record", f"'detections' is {shown(detections)}; expected a list", at)
        return
    path = path if isinstance(path, str) else ""
    image_id = image_id if isinstance(image_id, (int, str)) and not isinstance(image_id, bool) else None
    if not path and image_id is None:
        place.error("bad-record", "neither 'path' nor 'image_id' says which image this is", at)
        return
    sides = [value.get(key) for key in ("width", "height")]
    width, height = (side if type(side) is int and side > 0 else 0 for side in sides)
    good: list[_One] = []
    records: list[int] = []
    for i, one in enumerate(detections):
        here = f"{at}{dot}detections[{i}]"
        if not isinstance(one, dict):
            place.error("bad-record", f"expected an object, found {shown(one)}", here, i)
            continue
        sound = _sound_numbers(one, "box", "[xmin, ymin, xmax, ymax]", place, here, i)
        if not isinstance(one.get("name"), str):
            place.error("no-name", f"{shown(one.get('name'))}; expected a class name", f"{here}.name", i)
        elif sound:
            good.append(_One(one["name"], one["score"], tuple(one["box"]), one.get("mask")))
            records.append(i)
    yield _columns_of_image(_OfImage(good, path, width, height, image_id), place, at, records)


def _sound_numbers(value: dict[str, Any], box: str, corners: str, place: Place, at: str, i: int) -> bool:  # noqa: PLR0917
    sound = True
    if not is_box(value.get(box)):
        message = f"{shown(value.get(box))}; expected four finite numbers, {corners}"
        place.error("bad-box", message, f"{at}.{box}", i)
        sound = False
    if not is_number(value.get("score")):
        why = "; only ground truth has none" if "score" not in value else ""
        place.error("bad-score", f"{shown(value.get('score'))}; expected a number from 0 to 1{why}", f"{at}.score", i)
        sound = False
    return sound
