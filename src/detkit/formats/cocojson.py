"""Reading one COCO JSON file into columns: typed and fast where the file is plain, record by record where it is not."""

from __future__ import annotations

import json
import mmap
import os
import posixpath
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from detkit.boxes import area as box_area
from detkit.boxes import xywh_to_xyxy
from detkit.data import Dataset
from detkit.errors import ImageError
from detkit.formats.cococolumns import (
    Annotations,
    Ids,
    Images,
    annotation_pieces,
    are_unique,
    image_pieces,
    is_number,
    join_annotations,
    join_images,
    plain_annotations,
    plain_images,
    positions,
    to_ids,
    to_list,
)
from detkit.formats.findings import Finding, image_finding
from detkit.formats.imagefiles import leaves, read_headers
from detkit.formats.jsonrecords import is_box, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from detkit.data import Extra, Flags, Indices


CATEGORY_ORDER = "categories"
"""Key of `Dataset.file_extra` with the names of the categories as the file lists them, where the ids do not rise. No
key of the file itself is called so, as that is the table."""

_NO_EXTRA: Extra = {}
_NO_TABLE = msgspec.Raw(b"[]")
_tables = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Content(NamedTuple):
    """Tables are raw where the file is well-formed, to be decoded with types; values where only Python reads it."""

    images: msgspec.Raw | list[Any]
    annotations: msgspec.Raw | list[Any]
    rest: dict[str, Any]
    """What else the file says, the categories among it."""


_NOTHING = _Content([], [], {"categories": []})


class CocoFile:
    """One file, parsed; every problem is added to ``findings`` and the rest goes on."""

    def __init__(self, path: Path, findings: list[Finding]) -> None:
        self.path = path
        self._findings = findings
        with path.open("rb") as file:
            whole = _mapped(file)
            content = self._decode(whole)
            with annotation_pieces(content.annotations, file, whole) as pieces:
                images = self._read_images(content.images)
                if images is None:
                    content, images = _NOTHING, join_images([])
                self._images = images
                self.file_names = images.file_names
                rest = content.rest
                self._extra = {key: value for key, value in rest.items() if key != "categories"}
                self._category_ids, self.classes, self._class_extra = self._read_categories(rest.get("categories"))
                self._boxes = self._read_annotations(content.annotations, pieces)

    def dataset(self, folder: Path, prefix: str) -> Dataset:
        """Build the data set with images from ``folder``, without the records that are at fault."""
        sizes = self._sizes(folder)
        self._unique("images", self._images.ids, "id")
        self._unique("images", self.file_names, "file_name")
        boxes = self._boxes
        for row in np.flatnonzero(boxes.area < 0).tolist():
            message = f"'area' is {boxes.area[row]:g}; expected a number from 0"
            self._error("bad-area", message, "annotations", int(boxes.records[row]))
        self._unique("annotations", boxes.ids, "id", boxes.records)
        owner = self._look_up(boxes.image_ids, self._images.ids, boxes.records, "image_id", "image")
        labels = self._look_up(boxes.category_ids, self._category_ids, boxes.records, "category_id", "category")
        known = (owner >= 0) & (labels >= 0)
        if not known.all():
            boxes, owner, labels = boxes.take(known), owner[known], labels[known]
        xyxy = xywh_to_xyxy(boxes.xywh)
        area, unknown = boxes.area, np.isnan(boxes.area)
        area[unknown] = box_area(xyxy[unknown])
        # Most files list annotations image by image; then nothing is moved.
        order = slice(None) if (owner[1:] >= owner[:-1]).all() else np.argsort(owner, kind="stable")
        counts = np.bincount(owner, minlength=len(sizes))
        box_ids = None if isinstance(boxes.ids, list) or _are_positions(boxes.ids) else boxes.ids[order]

        def arrange(column: list[Any] | None) -> tuple[Any, ...] | None:
            if column is None or isinstance(order, slice):
                return None if column is None else tuple(column)
            return tuple(column[i] for i in order.tolist())

        extra = _with_ids(self._images.extra, self._images.ids)
        usable = self._usable_images()
        data = Dataset(
            classes=tuple(n if n not in self.classes[:i] else f"{n} ({i})" for i, n in enumerate(self.classes)),
            image_ids=tuple(
                prefix + name if good else f"\0{i}"
                for i, (name, good) in enumerate(zip(self.file_names, usable.tolist(), strict=True))
            ),
            paths=tuple(f"{folder}/{name}" for name in self.file_names),
            sizes=sizes,
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes=xyxy[order],
            labels=labels[order],
            difficult=boxes.difficult[order],
            crowd=boxes.crowd[order],
            area=area[order],
            records=boxes.records[order],
            sources=(str(self.path),) * len(sizes),
            masks=arrange(boxes.masks),
            extra=tuple(extra) if extra is not None else None,
            box_extra=arrange(_with_ids(boxes.extra, boxes.ids) if isinstance(boxes.ids, list) else boxes.extra),
            class_extra=self._class_extra if any(self._class_extra) else None,
            file_extra={str(self.path): self._extra} if self._extra else {},
            box_ids=box_ids,
            numbered=True,
        )
        return data if usable.all() else data.take(np.flatnonzero(usable))

    def _usable_images(self) -> Flags:
        """Return which images have a name of their own that stays in the folder."""
        names, first = self.file_names, dict[str, int]()
        listed = "\n".join(("", *names))
        if len({"", *names}) > len(names) and not any(sign in listed for sign in ("..", ":", "\\", "\0", "\n/")):
            return np.ones(len(names), dtype=bool)  # in one look, as nearly always
        usable = [bool(n) and not leaves(n) and first.setdefault(n, i) == i for i, n in enumerate(names)]
        return np.array(usable, dtype=bool)

    def _error(self, code: str, message: str, table: str = "", record: int | None = None) -> None:
        place = f"{table}[{record}]" if record is not None else table
        self._findings.append(
            Finding(code=code, severity="error", message=message, file=str(self.path), record=record, place=place)
        )

    def _decode(self, content: memoryview) -> _Content:
        try:
            tables = _tables.decode(content)
            images, annotations = tables.pop("images", msgspec.Raw(b"null")), tables.pop("annotations", _NO_TABLE)
            rest = {key: msgspec.json.decode(value) for key, value in tables.items()}
            if _begins_list(images):
                return _Content(images, annotations, rest)
            self._error("not-coco", f"'images' is {shown(msgspec.json.decode(images))}; expected a list")
            return _NOTHING
        except msgspec.ValidationError as error:
            if "out of range" in str(error):  # 1e400 is JSON, and no float
                self._error("malformed", str(error))
            else:
                self._error("not-coco", f"{error}; expected an object with 'images', 'annotations' and 'categories'")
            return _NOTHING
        except (ValueError, RecursionError) as error:
            cause = str(error)
        # Python writes NaN, which JSON does not have. Its own reader takes it, and then the record can be named.
        try:
            value = json.loads(bytes(content))
            found, listed = value.pop("images", None), value.pop("annotations", None)
            if isinstance(found, list):
                return _Content(found, listed if isinstance(listed, list) else [], value)
            self._error("not-coco", "there is no list 'images'")
        except json.JSONDecodeError as error:
            self._error("malformed", f"not JSON: {error.msg}", f"line {error.lineno}, column {error.colno}")
        except (ValueError, AttributeError, RecursionError):
            self._error("malformed", cause)
        return _NOTHING

    def _read_images(self, table: msgspec.Raw | list[Any]) -> Images | None:
        """Return the columns; None, and a finding, where nothing can be read."""
        pieces: list[Images] = []
        begin = 0
        try:
            for piece in image_pieces(table) if isinstance(table, msgspec.Raw) else [table]:
                if isinstance(piece, Images):
                    for i, name in enumerate(piece.file_names):
                        if not _is_plain(name):
                            piece.file_names[i] = self._file_name(begin + i, {"file_name": name})
                    pieces.append(piece)
                else:
                    records = [self._record("images", i, image) for i, image in enumerate(piece, start=begin)]
                    names = [self._file_name(i, image) for i, image in enumerate(records, start=begin)]
                    pieces.append(plain_images(records, names))
                begin += len(pieces[-1].sizes)
        except (ValueError, RecursionError) as error:
            self._error("malformed", str(error), "images")
            return None
        return join_images(pieces)

    def _record(self, table: str, i: int, record: Any) -> dict[str, Any]:
        """Return a record with a usable id, or an empty one and a finding."""
        if not isinstance(record, dict):
            self._error("bad-record", f"expected an object, found {shown(record)}", table, i)
        elif not isinstance(record.get("id"), (int, str)):
            self._error("bad-id", f"'id' is {shown(record.get('id'))}; expected a number or a string", table, i)
        else:
            return record
        return {}

    def _file_name(self, i: int, image: dict[str, Any]) -> str:
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            if image:
                self._error("no-file-name", f"'file_name' is {shown(name)}", "images", i)
            return ""
        if leaves(name):
            self._error("outside-folder", f"file_name {name!r} leads out of the image folder", "images", i)
        return posixpath.normpath(name.replace("\\", "/"))

    def _sizes(self, folder: Path) -> Indices:
        sizes = self._images.sizes
        unknown = [
            i
            for i in np.flatnonzero((sizes <= 0).any(axis=1)).tolist()
            if self.file_names[i] and not leaves(self.file_names[i])
        ]
        for i, header in zip(unknown, read_headers([f"{folder}/{self.file_names[i]}" for i in unknown]), strict=True):
            if isinstance(header, ImageError):
                self._findings.append(image_finding(header, None, str(self.path), f"images[{i}] has no size"))
            else:
                sizes[i] = header.width, header.height
        return sizes

    def _read_categories(self, categories: Any) -> tuple[Ids, tuple[str, ...], tuple[Extra, ...]]:
        """Return id, name and further keys of each category, in the order of the ids where those are numbers."""
        if categories is not None and not isinstance(categories, list):
            self._error("not-coco", f"'categories' is {shown(categories)}; expected a list")
            categories = []
        if categories is None:
            self._error(
                "no-categories",
                "there are no 'categories', so it is not COCO. JumpStart's annotations.json looks alike, "
                "but its boxes are corners: --format jumpstart reads it",
            )
            return [], (), ()
        records = [
            record for i, category in enumerate(categories) if (record := self._record("categories", i, category))
        ]
        self._unique("categories", [record["id"] for record in records], "id")
        for i, record in enumerate(records):
            if not isinstance(record.get("name"), str) or not record["name"]:
                self._error("no-name", f"'name' is {shown(record.get('name'))}", "categories", i)
        self._unique("categories", [str(record.get("name")) for record in records], "name")
        listed = [str(record.get("name")) for record in records]
        if all(isinstance(record["id"], int) for record in records):
            records.sort(key=lambda record: int(record["id"]))
        names = [str(record.get("name")) for record in records]
        if names != listed:
            self._extra[CATEGORY_ORDER] = listed
        ids = to_ids([record["id"] for record in records])
        further: list[Extra] = [{k: v for k, v in record.items() if k not in ("id", "name")} for record in records]
        return ids, tuple(names), tuple(_with_ids(further, ids) or ())

    def _unique(self, table: str, ids: Ids, key: str, records: Indices | None = None) -> None:
        """Note every value that is there already."""
        if are_unique(ids):
            return
        first: dict[Any, int] = {}
        for i, value in enumerate(to_list(ids)):
            if value in (None, "") or first.setdefault(value, i) == i:
                continue
            before, here = (int(records[at]) if records is not None else at for at in (first[value], i))
            message = f"{key} {shown(value)} is there already, in {table}[{before}]"
            self._error(f"duplicate-{key.replace('_', '-')}", message, table, here)

    def _look_up(self, ids: Ids, known: Ids, records: Indices, key: str, kind: str) -> Indices:
        found = positions(ids, known)
        unknown = np.flatnonzero(found < 0).tolist()
        texts = set(map(str, to_list(known))) if unknown else set()
        values = to_list(ids) if unknown else []
        for row in unknown:
            message = f"{key} {shown(values[row])} is the id of no {kind}"
            if str(values[row]) in texts:
                message += ", only as a number or a string; write ids alike everywhere"
            self._error(f"unknown-{kind}", message, "annotations", int(records[row]))
        return found

    def _read_annotations(
        self, table: msgspec.Raw | list[Any], raw_pieces: Iterator[Annotations | list[Any]]
    ) -> Annotations:
        pieces: list[Annotations] = []
        begin = 0
        try:
            if isinstance(table, msgspec.Raw) and not _begins_list(table):
                value = msgspec.json.decode(table)
                if value is not None:
                    self._error("not-coco", f"'annotations' is {shown(value)}; expected a list")
                table = []
            for piece in raw_pieces if isinstance(table, msgspec.Raw) else [table]:
                if isinstance(piece, Annotations):
                    piece.records += begin
                    pieces.append(piece)
                    begin += len(piece.records)
                else:
                    pieces.append(self._look_through(piece, begin))
                    begin += len(piece)
        except (ValueError, RecursionError) as error:
            self._error("malformed", str(error), "annotations")
            return join_annotations([])
        return join_annotations(pieces)

    def _look_through(self, annotations: list[Any], begin: int) -> Annotations:
        """Go through records that are unusual in some way: further keys, or something wrong."""
        good: list[dict[str, Any]] = []
        records: list[int] = []
        for i, annotation in enumerate(annotations, start=begin):
            if not isinstance(annotation, dict):
                self._error("bad-record", f"expected an object, found {shown(annotation)}", "annotations", i)
                continue
            wrong = [
                f"'{key}' is {shown(annotation.get(key))}; expected a number or a string"
                for key in ("image_id", "category_id", "id")
                if not isinstance(annotation.get(key), (int, str)) and not (key == "id" and annotation.get(key) is None)
            ]
            if wrong:
                self._error("bad-id", "; ".join(wrong), "annotations", i)
            elif not is_box(annotation.get("bbox")):
                found = shown(annotation.get("bbox"))
                self._error("bad-box", f"'bbox' is {found}; expected [x, y, width, height]", "annotations", i)
            else:
                self._require_numbers(annotation, i)
                good.append(annotation)
                records.append(i)
        return plain_annotations(good, records)

    def _require_numbers(self, annotation: dict[str, Any], i: int) -> None:
        """Text such as "0" would count as true."""
        for code, keys in (("bad-flag", ("iscrowd", "difficult")), ("bad-area", ("area",))):
            for key in keys:
                value = annotation.get(key)
                if value is not None and not is_number(value):
                    self._error(code, f"'{key}' is {shown(value)}; expected a number", "annotations", i)


def _begins_list(table: msgspec.Raw) -> bool:
    return bytes(memoryview(table)[:1]) == b"["


def _are_positions(ids: Ids) -> bool:
    """Return whether ids are 1, 2, 3 ..., as they are written where none are known."""
    return bool(np.array_equal(ids, np.arange(len(ids)) + 1)) if isinstance(ids, np.ndarray) else not len(ids)


def _with_ids(extra: Sequence[Extra] | None, ids: Ids) -> list[Extra] | None:
    """Return the further keys of records with their ids, where these are not 1, 2, 3 ... or missing."""
    if _are_positions(ids) or all(value is None for value in to_list(ids)):
        return None if extra is None else list(extra)
    further = extra if extra is not None else (_NO_EXTRA,) * len(ids)
    return [e if i is None else {"id": i, **e} for i, e in zip(to_list(ids), further, strict=True)]


def _is_plain(name: str) -> bool:
    """Return whether a file name is relative and in normal form, as far as a quick look tells."""
    return bool(name) and not ("\\" in name or "//" in name or "/." in name or name[0] in "./" or name[-1] == "/")


def _mapped(file: IO[bytes]) -> memoryview:
    """Return a file's bytes, without the mark that some editors put before UTF-8; its pages come and go."""
    if not os.fstat(file.fileno()).st_size:
        return memoryview(b"")
    content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return memoryview(content)[3 if content[:3] == b"\xef\xbb\xbf" else 0 :]
