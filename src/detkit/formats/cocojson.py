"""Reading one COCO JSON file into columns: typed and fast where the file is plain, record by record where it is not."""

from __future__ import annotations

import json
import mmap
import posixpath
from typing import TYPE_CHECKING, Any, NamedTuple

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

if TYPE_CHECKING:
    from pathlib import Path

    from detkit.data import Flags, Indices


class _File(msgspec.Struct):
    images: msgspec.Raw
    categories: list[Any] | None = None
    annotations: msgspec.Raw = msgspec.Raw(b"[]")


class _Lists(msgspec.Struct):
    """Says what else ``images`` is."""

    images: list[Any]


class _Content(NamedTuple):
    """Tables are raw where the file is well-formed, to be decoded with types; values where only Python reads it."""

    images: msgspec.Raw | list[Any]
    categories: list[Any] | None
    annotations: msgspec.Raw | list[Any]


class CocoFile:
    """One file, parsed; every problem is added to ``findings`` and the rest goes on."""

    def __init__(self, path: Path, findings: list[Finding]) -> None:
        self.path = path
        self._findings = findings
        content = self._decode(_mapped(path))
        images = self._read_images(content.images)
        if images is None:
            content, images = _Content([], [], []), join_images([])
        self._images = images
        self.file_names = images.file_names
        self._category_ids, self.classes = self._read_categories(content.categories)
        self._boxes = self._read_annotations(content.annotations)

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
        area = np.where(np.isnan(boxes.area), box_area(xyxy), boxes.area)
        # Most files list annotations image by image; then nothing is moved.
        order = slice(None) if (owner[1:] >= owner[:-1]).all() else np.argsort(owner, kind="stable")
        counts = np.bincount(owner, minlength=len(sizes))

        def arrange(column: list[Any] | None) -> tuple[Any, ...] | None:
            if column is None or isinstance(order, slice):
                return None if column is None else tuple(column)
            return tuple(column[i] for i in order.tolist())

        extra = self._images.extra
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
            box_extra=arrange(boxes.extra),
        )
        return data if usable.all() else data.take(np.flatnonzero(usable))

    def _usable_images(self) -> Flags:
        """Return which images have a name of their own that stays in the folder."""
        first: dict[str, int] = {}
        names = enumerate(self.file_names)
        return np.array([bool(n) and not leaves(n) and first.setdefault(n, i) == i for i, n in names], dtype=bool)

    def _error(self, code: str, message: str, table: str = "", record: int | None = None) -> None:
        place = f"{table}[{record}]" if record is not None else table
        self._findings.append(
            Finding(code=code, severity="error", message=message, file=str(self.path), record=record, place=place)
        )

    def _decode(self, content: memoryview) -> _Content:
        try:
            file = msgspec.json.decode(content, type=_File)
            if bytes(memoryview(file.images)[:1]) != b"[":
                msgspec.json.decode(content, type=_Lists)
            return _Content(file.images, file.categories, file.annotations)
        except msgspec.ValidationError as error:
            if "out of range" in str(error):  # 1e400 is JSON, and no float
                self._error("malformed", str(error))
            else:
                self._error("not-coco", f"{error}; expected an object with 'images', 'annotations' and 'categories'")
            return _Content([], [], [])
        except (ValueError, RecursionError) as error:
            cause = str(error)
        # Python writes NaN, which JSON does not have. Its own reader takes it, and then the record can be named.
        try:
            value = json.loads(bytes(content))
            images, categories, annotations = (value.get(key) for key in ("images", "categories", "annotations"))
            if isinstance(images, list):
                categories = categories if isinstance(categories, list) else None
                return _Content(images, categories, annotations if isinstance(annotations, list) else [])
            self._error("not-coco", "there is no list 'images'")
        except json.JSONDecodeError as error:
            self._error("malformed", f"not JSON: {error.msg}", f"line {error.lineno}, column {error.colno}")
        except (ValueError, AttributeError, RecursionError):
            self._error("malformed", cause)
        return _Content([], [], [])

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
            self._error("bad-record", f"expected an object, found {_shown(record)}", table, i)
        elif not isinstance(record.get("id"), (int, str)):
            self._error("bad-id", f"'id' is {_shown(record.get('id'))}; expected a number or a string", table, i)
        else:
            return record
        return {}

    def _file_name(self, i: int, image: dict[str, Any]) -> str:
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            if image:
                self._error("no-file-name", f"'file_name' is {_shown(name)}", "images", i)
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

    def _read_categories(self, categories: list[Any] | None) -> tuple[Ids, tuple[str, ...]]:
        """Return the id of each category, and the names: in the order of the ids where those are numbers."""
        if categories is None:
            self._error(
                "no-categories",
                "there are no 'categories', so it is not COCO. JumpStart's annotations.json looks alike, "
                "but its boxes are corners: --format jumpstart reads it",
            )
            return [], ()
        records = [
            record for i, category in enumerate(categories) if (record := self._record("categories", i, category))
        ]
        self._unique("categories", [record["id"] for record in records], "id")
        for i, record in enumerate(records):
            if not isinstance(record.get("name"), str) or not record["name"]:
                self._error("no-name", f"'name' is {_shown(record.get('name'))}", "categories", i)
        self._unique("categories", [str(record.get("name")) for record in records], "name")
        if all(isinstance(record["id"], int) for record in records):
            records.sort(key=lambda record: int(record["id"]))
        names = tuple(str(record.get("name")) for record in records)
        return to_ids([record["id"] for record in records]), names

    def _unique(self, table: str, ids: Ids, key: str, records: Indices | None = None) -> None:
        """Note every value that is there already."""
        if are_unique(ids):
            return
        first: dict[Any, int] = {}
        for i, value in enumerate(to_list(ids)):
            if value in (None, "") or first.setdefault(value, i) == i:
                continue
            before, here = (int(records[at]) if records is not None else at for at in (first[value], i))
            message = f"{key} {_shown(value)} is there already, in {table}[{before}]"
            self._error(f"duplicate-{key.replace('_', '-')}", message, table, here)

    def _look_up(self, ids: Ids, known: Ids, records: Indices, key: str, kind: str) -> Indices:
        found = positions(ids, known)
        unknown = np.flatnonzero(found < 0).tolist()
        texts = set(map(str, to_list(known))) if unknown else set()
        values = to_list(ids) if unknown else []
        for row in unknown:
            message = f"{key} {_shown(values[row])} is the id of no {kind}"
            if str(values[row]) in texts:
                message += ", only as a number or a string; write ids alike everywhere"
            self._error(f"unknown-{kind}", message, "annotations", int(records[row]))
        return found

    def _read_annotations(self, table: msgspec.Raw | list[Any]) -> Annotations:
        pieces: list[Annotations] = []
        begin = 0
        try:
            if isinstance(table, msgspec.Raw) and bytes(memoryview(table)[:1]) != b"[":
                value = msgspec.json.decode(table)
                if value is not None:
                    self._error("not-coco", f"'annotations' is {_shown(value)}; expected a list")
                table = []
            for piece in annotation_pieces(table) if isinstance(table, msgspec.Raw) else [table]:
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
                self._error("bad-record", f"expected an object, found {_shown(annotation)}", "annotations", i)
                continue
            wrong = [
                f"'{key}' is {_shown(annotation.get(key))}; expected a number or a string"
                for key in ("image_id", "category_id", "id")
                if not isinstance(annotation.get(key), (int, str)) and not (key == "id" and annotation.get(key) is None)
            ]
            if wrong:
                self._error("bad-id", "; ".join(wrong), "annotations", i)
            elif not _is_box(annotation.get("bbox")):
                found = _shown(annotation.get("bbox"))
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
                    self._error(code, f"'{key}' is {_shown(value)}; expected a number", "annotations", i)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(is_number(v) and not isinstance(v, bool) for v in value)


def _is_plain(name: str) -> bool:
    """Return whether a file name is relative and in normal form, as far as a quick look tells."""
    return bool(name) and not ("\\" in name or "//" in name or "/." in name or name[0] in "./" or name[-1] == "/")


def _mapped(path: Path) -> memoryview:
    """Return a file's bytes, without the mark that some editors put before UTF-8; its pages come and go."""
    if not path.stat().st_size:
        return memoryview(b"")
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return memoryview(content)[3 if content[:3] == b"\xef\xbb\xbf" else 0 :]


def _shown(value: Any) -> str:
    text = "missing or null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
