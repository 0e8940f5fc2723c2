"""What models found, written to files: COCO's results, lines of JSON, or a table."""

from __future__ import annotations

import csv
import io
import json
import tempfile
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec
import numpy as np

from detkit.boxes import xyxy_to_xywh
from detkit.detections import COLUMNS
from detkit.errors import ClassMismatch, DetkitWarning, InvalidData, InvalidValue, UsageError
from detkit.files import atomic_write
from detkit.formats.coco import written_ids
from detkit.formats.resultfiles import Result

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from detkit.data import Dataset
    from detkit.detections import Detections
    from detkit.formats.identities import Id

ENDINGS = (".json", ".jsonl", ".csv")
"""Of files, in lower case, and what is in them: `write_predictions` says."""

_SPOOLED = 1 << 22
"""Bytes of the list of images that are held in memory before they go to a file."""


def write_predictions(path: str | Path, data: Dataset | None, detections: Iterable[Detections]) -> Path:
    """Write `Detections` as the file's ending says, one after the other as they come; return the path.

    ``.json`` is COCO results. With ``data``, whose images the detections are for, one for each in order, it is the
    plain list that ``pycocotools``' ``COCO.loadRes`` takes. Ids are those that ``write_dataset(data, ..., "coco")``
    writes: those of the COCO file that the data was read from where these are not simply 1, 2, 3 ..., else 1, 2, 3 ...
    in the order of images and classes. Without (None) the list is the ``annotations`` of an object that has the
    ``images``, with their sizes and numbered as they come, and the ``categories``, too. Each record also says
    ``file_name`` and ``category_name``, which other tools pass over and `read_predictions` goes by.

    ``.jsonl`` is a line of JSON for each image, `Detections.to_dict`. ``.csv`` is a table with a row for each
    detection, `detkit.detections.COLUMNS`; images without any have none.

    The file appears as a whole or not at all. Raises `InvalidValue` for another ending, `UsageError` where the counts
    differ, `ClassMismatch` for a class that the data lacks, `InvalidData` for numbers that are not finite,
    `StorageError`; and what ``detections`` raises, as it is.
    """
    path = Path(path)
    ending = require_ending(path)
    detections = _marked(detections)
    if data is not None:
        detections = _one_for_each(detections, len(data))
    try:
        with atomic_write(path) as file:
            if ending == ".jsonl":
                for found in detections:
                    file.write(_line(found))
            elif ending == ".csv":
                _write_table(file, detections)
            elif data is not None:
                _write_results(file, path, data, detections)
            else:
                _write_with_images(file, detections)
    except _NotOurs as error:
        raise error.cause from None
    return path


class _NotOurs(Exception):
    """Carries an `OSError` of the detections, such as a camera's, past what takes it for one of the file."""

    def __init__(self, cause: OSError) -> None:
        self.cause = cause


def _marked(detections: Iterable[Detections]) -> Iterator[Detections]:
    try:
        yield from detections
    except OSError as error:
        raise _NotOurs(error) from error


def require_ending(path: Path) -> str:
    """Return the ending of a file that `write_predictions` can write. Raises `InvalidValue`."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise InvalidValue("path", str(path), f"a file name that ends in {', '.join(ENDINGS)}")
    return ending


def _one_for_each(detections: Iterable[Detections], wanted: int) -> Iterator[Detections]:
    count = 0
    for count, found in enumerate(detections, start=1):
        if count > wanted:
            raise UsageError(f"more detections for {wanted} images; expected one for each, in order")
        yield found
    if count != wanted:
        raise UsageError(f"{count} detections for {wanted} images; expected one for each, in order")


def _write_results(file: IO[bytes], path: Path, data: Dataset, detections: Iterable[Detections]) -> None:
    image_ids, category_ids = written_ids(data)
    if len(set(image_ids)) < len(image_ids):
        warnings.warn(
            f"{path}: images of different splits have the same ids in their own files; write the predictions of each "
            "split alone for tools that go by image_id",
            DetkitWarning,
            stacklevel=3,
        )
    records = _Records(file)
    for found, image_id, name in zip(detections, image_ids, data.image_ids, strict=True):
        unknown = list(dict.fromkeys(kind for kind in found.names if kind not in category_ids))
        if unknown:
            raise ClassMismatch(f"detections on {name}", list(category_ids), [*category_ids, *unknown])
        records.add(_results(found, image_id, name, category_ids))
    records.end()
    file.write(b"\n")


def _write_with_images(file: IO[bytes], detections: Iterable[Detections]) -> None:
    category_ids: dict[str, Id] = {}
    # Which images there are is known only behind the last; many of them are too much for memory.
    with tempfile.SpooledTemporaryFile(_SPOOLED) as spooled:
        file.write(b'{"annotations": ')
        records, images = _Records(file), _Records(spooled)
        for number, found in enumerate(detections, start=1):
            for name in found.classes:
                category_ids.setdefault(name, len(category_ids) + 1)
            records.add(_results(found, number, found.path, category_ids))
            images.add([{"id": number, "file_name": found.path, "width": found.width, "height": found.height}])
        records.end()
        images.end()
        file.write(b',\n"images": ')
        spooled.seek(0)
        while piece := spooled.read(1 << 20):
            file.write(piece)
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    file.write(b',\n"categories": ' + _encode(categories) + b"}\n")


class _Records:
    """Writes a list of JSON, a line for each record."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._separator = file, b"["

    def add(self, records: Iterable[Any]) -> None:
        """Write some more."""
        lines = b",\n".join(map(_encode, records))
        if lines:
            self._file.write(self._separator + lines)
            self._separator = b",\n"

    def end(self) -> None:
        """Close the list."""
        self._file.write(b"[]" if self._separator == b"[" else b"]")


def _results(found: Detections, image_id: Id, name: str, category_ids: Mapping[str, Id]) -> list[Result]:
    _require_finite(found, name)
    masks = found.masks if found.masks is not None else (None,) * len(found)
    return [
        Result(image_id, category_ids[kind], tuple(box), score, mask, name, kind)
        for kind, box, score, mask in zip(
            found.names, xyxy_to_xywh(found.boxes).tolist(), found.scores.tolist(), masks, strict=True
        )
    ]


def _line(found: Detections) -> bytes:
    _require_finite(found, found.path)
    return _encode(found.to_dict()) + b"\n"


def _write_table(file: IO[bytes], detections: Iterable[Detections]) -> None:
    text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="", write_through=True)
    writer = csv.writer(text)  # RFC 4180
    writer.writerow(COLUMNS)
    for found in detections:
        _require_finite(found, found.path)
        writer.writerows(found.to_rows())
    text.detach()


def _require_finite(found: Detections, name: str) -> None:
    if not (np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()):
        raise InvalidData(f"detections on {name} hold numbers that are not finite; expected pixels and scores")


def _encode(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # a file name that is no text
        return json.dumps(msgspec.to_builtins(value)).encode()
