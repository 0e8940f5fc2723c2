"""Reading one COCO JSON file into columns: typed and fast where the file is plain, record by record where it is not."""

from __future__ import annotations

import json
import math
import posixpath
import sys
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from detkit.boxes import area as box_area
from detkit.boxes import xywh_to_xyxy
from detkit.data import Dataset, Extra
from detkit.errors import ImageError
from detkit.formats.findings import Finding, image_finding
from detkit.formats.imagefiles import LARGEST_SIDE, leaves, read_headers

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray


class _Annotation(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    image_id: int | str
    category_id: int | str
    bbox: tuple[float, float, float, float]
    id: int | str | None = None
    area: float | None = None
    iscrowd: int | None = None
    segmentation: Any = None
    difficult: int | None = None


class _File(msgspec.Struct):
    images: list[Any]
    categories: list[Any] | None = None
    annotations: msgspec.Raw = msgspec.Raw(b"[]")


class _Content(NamedTuple):
    images: list[Any]
    categories: list[Any] | None
    annotations: msgspec.Raw | list[Any]
    """Raw where the file is well-formed, to be decoded with types."""


_KNOWN = frozenset(_Annotation.__struct_fields__)
_KNOWN_OF_IMAGE = frozenset({"id", "file_name", "width", "height"})
_typed = msgspec.json.Decoder(list[_Annotation])


@dataclass
class _Boxes:
    """Annotations as columns, in the file's order, those that cannot be used left out."""

    image_ids: list[Any]
    category_ids: list[Any]
    xywh: NDArray[np.float64]
    ids: list[Any]
    area: NDArray[np.float64]
    """NaN where the file gives none."""
    crowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    masks: list[Any] | None
    extra: list[Extra] | None
    records: NDArray[np.int64]


class CocoFile:
    """One file, parsed; every problem is added to ``findings`` and the rest goes on."""

    def __init__(self, path: Path, findings: list[Finding]) -> None:
        self.path = path
        self._findings = findings
        content = self._decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        self._raw_images = [self._record("images", i, image) for i, image in enumerate(content.images)]
        self.file_names: list[str] = [self._file_name(i, image) for i, image in enumerate(self._raw_images)]
        self._category_index, self.classes = self._read_categories(content.categories)
        self._boxes = self._read_annotations(content.annotations)

    def dataset(self, folder: Path, prefix: str) -> Dataset | None:
        """Build the data set with images from ``folder``; None where anything was wrong."""
        sizes = self._sizes(folder)
        image_index = self._unique("images", (image.get("id") for image in self._raw_images), "id")
        self._unique("images", self.file_names, "file_name")
        boxes = self._boxes
        for row in np.flatnonzero(boxes.area < 0).tolist():
            message = f"'area' is {boxes.area[row]:g}; expected a number from 0"
            self._error("bad-area", message, "annotations", int(boxes.records[row]))
        self._unique("annotations", boxes.ids, "id", boxes.records.tolist())
        owner = self._look_up(boxes.image_ids, image_index, boxes.records, "image_id", "image")
        labels = self._look_up(boxes.category_ids, self._category_index, boxes.records, "category_id", "category")
        if self._findings:
            return None
        order = np.argsort(owner, kind="stable")
        sorted_already = bool((order == np.arange(len(order))).all())
        xyxy = xywh_to_xyxy(boxes.xywh)
        area = np.where(np.isnan(boxes.area), box_area(xyxy), boxes.area)
        counts = np.bincount(owner, minlength=len(sizes))

        def arrange(column: list[Any] | None) -> tuple[Any, ...] | None:
            if column is None or sorted_already:
                return None if column is None else tuple(column)
            return tuple(column[i] for i in order)

        extra = [{k: v for k, v in image.items() if k not in _KNOWN_OF_IMAGE} for image in self._raw_images]
        return Dataset(
            classes=self.classes,
            image_ids=tuple(prefix + name for name in self.file_names),
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
            extra=tuple(extra) if any(extra) else None,
            box_extra=arrange(boxes.extra),
        )

    def _error(self, code: str, message: str, table: str = "", record: int | None = None) -> None:
        place = f"{table}[{record}]" if record is not None else table
        self._findings.append(
            Finding(code=code, severity="error", message=message, file=str(self.path), record=record, place=place)
        )

    def _decode(self, content: bytes) -> _Content:
        try:
            file = msgspec.json.decode(content, type=_File)
            return _Content(file.images, file.categories, file.annotations)
        except msgspec.ValidationError as error:
            if "out of range" in str(error):  # 1e400 is JSON, and no float
                self._error("malformed", str(error))
            else:
                self._error("not-coco", f"{error}; expected an object with 'images', 'annotations' and 'categories'")
            return _Content([], [], [])
        except (msgspec.DecodeError, RecursionError) as error:
            cause = str(error)
        # Python writes NaN, which JSON does not have. Its own reader takes it, and then the record can be named.
        try:
            value = json.loads(content)
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

    def _sizes(self, folder: Path) -> NDArray[np.int64]:
        sizes = np.zeros((len(self._raw_images), 2), dtype=np.int64)
        unknown = []
        for i, image in enumerate(self._raw_images):
            width, height = _side(image.get("width")), _side(image.get("height"))
            if width and height:
                sizes[i] = width, height
            elif self.file_names[i] and not leaves(self.file_names[i]):
                unknown.append(i)
        for i, header in zip(unknown, read_headers([f"{folder}/{self.file_names[i]}" for i in unknown]), strict=True):
            if isinstance(header, ImageError):
                self._findings.append(image_finding(header, None, str(self.path), f"images[{i}] has no size"))
            else:
                sizes[i] = header.width, header.height
        return sizes

    def _read_categories(self, categories: list[Any] | None) -> tuple[dict[Any, int], tuple[str, ...]]:
        """Return the index of each category id, and the names: in the order of the ids where those are numbers."""
        if categories is None:
            self._error(
                "no-categories",
                "there are no 'categories', so it is not COCO. JumpStart's annotations.json looks alike, "
                "but its boxes are corners",
            )
            return {}, ()
        records = [
            record for i, category in enumerate(categories) if (record := self._record("categories", i, category))
        ]
        self._unique("categories", (record["id"] for record in records), "id")
        for i, record in enumerate(records):
            if not isinstance(record.get("name"), str) or not record["name"]:
                self._error("no-name", f"'name' is {_shown(record.get('name'))}", "categories", i)
        self._unique("categories", (str(record.get("name")) for record in records), "name")
        if all(isinstance(record["id"], int) for record in records):
            records.sort(key=lambda record: int(record["id"]))
        names = tuple(str(record.get("name")) for record in records)
        return {record["id"]: i for i, record in enumerate(records)}, names

    def _unique(
        self, table: str, values: Iterable[Any], key: str, records: Sequence[int] | None = None
    ) -> dict[Any, int]:
        """Return the position of each value; a value that is there twice is a finding."""
        listed = list(values)
        index = {value: i for i, value in enumerate(listed)}
        if len(index) != len(listed):
            first: dict[Any, int] = {}
            for i, value in enumerate(listed):
                if value in (None, "") or first.setdefault(value, i) == i:
                    continue
                before, here = (records[at] if records is not None else at for at in (first[value], i))
                message = f"{key} {_shown(value)} is there already, in {table}[{before}]"
                self._error(f"duplicate-{key.replace('_', '-')}", message, table, here)
        return index

    def _look_up(
        self, ids: list[Any], index: dict[Any, int], records: NDArray[np.int64], key: str, kind: str
    ) -> NDArray[np.int64]:
        found = np.fromiter((index.get(value, -1) for value in ids), dtype=np.int64, count=len(ids))
        unknown = np.flatnonzero(found < 0).tolist()
        texts = {str(known) for known in index} if unknown else set()
        for row in unknown:
            message = f"{key} {_shown(ids[row])} is the id of no {kind}"
            if str(ids[row]) in texts:
                message += ", only as a number or a string; write ids alike everywhere"
            self._error(f"unknown-{kind}", message, "annotations", int(records[row]))
        return found

    def _read_annotations(self, annotations: msgspec.Raw | list[Any]) -> _Boxes:
        if isinstance(annotations, msgspec.Raw):
            try:
                return _typed_boxes(_typed.decode(annotations))
            except msgspec.ValidationError:
                annotations = self._untyped(annotations)
        if annotations is None:
            annotations = []
        if not isinstance(annotations, list):
            self._error("not-coco", f"'annotations' is {_shown(annotations)}; expected a list")
            annotations = []
        return self._plain_boxes(annotations)

    def _untyped(self, annotations: msgspec.Raw) -> Any:
        try:
            return msgspec.json.decode(annotations)
        except msgspec.DecodeError as error:  # a number too large for any float
            self._error("malformed", str(error), "annotations")
            return []

    def _plain_boxes(self, annotations: list[Any]) -> _Boxes:
        """Go through records that are unusual in some way: further keys, or something wrong."""
        good: list[dict[str, Any]] = []
        records: list[int] = []
        for i, annotation in enumerate(annotations):
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
        extra: list[Extra] = [{k: v for k, v in a.items() if k not in _KNOWN} for a in good]
        masks = [a.get("segmentation") or None for a in good]
        areas = [a.get("area") for a in good]
        return _Boxes(
            image_ids=[a["image_id"] for a in good],
            category_ids=[a["category_id"] for a in good],
            xywh=np.array([a["bbox"] for a in good], dtype=np.float64).reshape(-1, 4),
            ids=[a.get("id") for a in good],
            area=np.array([area if _is_number(area) else math.nan for area in areas], dtype=np.float64),
            crowd=np.array([bool(a.get("iscrowd")) for a in good], dtype=bool),
            difficult=np.array([bool(a.get("difficult")) for a in good], dtype=bool),
            masks=masks if any(masks) else None,
            extra=extra if any(extra) else None,
            records=np.array(records, dtype=np.int64),
        )

    def _require_numbers(self, annotation: dict[str, Any], i: int) -> None:
        """Text such as "0" would count as true."""
        for code, keys in (("bad-flag", ("iscrowd", "difficult")), ("bad-area", ("area",))):
            for key in keys:
                value = annotation.get(key)
                if value is not None and not _is_number(value):
                    self._error(code, f"'{key}' is {_shown(value)}; expected a number", "annotations", i)


def _typed_boxes(annotations: list[_Annotation]) -> _Boxes:
    n = len(annotations)
    masks = [a.segmentation or None for a in annotations]
    return _Boxes(
        image_ids=[a.image_id for a in annotations],
        category_ids=[a.category_id for a in annotations],
        xywh=np.fromiter(chain.from_iterable(a.bbox for a in annotations), np.float64, 4 * n).reshape(-1, 4),
        ids=[a.id for a in annotations],
        area=np.fromiter((math.nan if a.area is None else a.area for a in annotations), np.float64, n),
        crowd=np.fromiter((bool(a.iscrowd) for a in annotations), bool, n),
        difficult=np.fromiter((bool(a.difficult) for a in annotations), bool, n),
        masks=masks if any(masks) else None,
        extra=None,
        records=np.arange(n),
    )


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(_is_number(v) and not isinstance(v, bool) for v in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _side(value: Any) -> int:
    """Return one side of an image; 0 where it is unknown, and the file has to tell."""
    return int(value) if isinstance(value, (int, float)) and 1 <= value <= LARGEST_SIDE else 0


def _shown(value: Any) -> str:
    text = "missing or null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
