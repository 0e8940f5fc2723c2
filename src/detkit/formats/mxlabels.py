"""MXNet's label of an image, as it stands in a line of a ``.lst`` and in a record of a ``.rec``.

``A B extra... (id xmin ymin xmax ymax extra...)*``: A is the width of the header, itself included, B that of an object.
Corners are shares of the image's sides, as its file has them: MXNet turns nothing the way EXIF says. An id of -1 fills
up, or stands for an image without objects.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from msgspec import Meta

from detkit.errors import DetkitWarning, InvalidData
from detkit.formats.findings import Finding, raise_errors
from detkit.formats.rows import Rows, read_class_names
from detkit.formats.splits import join
from detkit.params import Options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from detkit.data import Dataset
    from detkit.images import Header

HEADER_WIDTH, OBJECT_WIDTH = 2, 5

_LARGEST_SHARE = 2.0
"""A corner further out than this is in other units: no object hangs over by the image's whole size."""
_LARGEST_PERCENTAGE = 100.0
_LARGEST_CLASS = 2**31
_FILLING = frozenset({(-1.0, -1.0, -1.0, -1.0), (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 1.0)})
"""Corners of objects with the id -1 that mean no object."""


class LabelReader:
    """Puts images and the objects of their labels into rows, and says of everything wrong at which place it is.

    ``normalised`` is that of `Rows`.
    """

    def __init__(self, file: Path, findings: list[Finding], *, normalised: float) -> None:
        self.file = str(file)
        self._findings = findings
        self._rows = Rows(findings, normalised=normalised, stored=True)
        self._places: dict[str, tuple[str, int]] = {}
        self._foreign: list[tuple[str, int, float]] = []

    @property
    def largest_label(self) -> int:
        """The largest class so far; -1 where there is none."""
        return self._rows.largest_label

    def error(self, code: str, message: str, place: str, record: int) -> None:
        """Note what is wrong; ``record`` is the number of the line or record, from 0."""
        line = record + 1 if self.file.endswith(".lst") else None
        self._findings.append(
            Finding(code=code, severity="error", message=message, file=self.file, record=record, place=place, line=line)
        )

    def add(
        self, image_id: str, path: str, label: Sequence[float], *, place: str, record: int, exact: bool = False
    ) -> None:
        """Add an image with its label; ``exact`` is that of `Rows.add_box`."""
        self._places[image_id] = place, record
        self._rows.add_image(image_id, path, source=self.file)
        header, width = label[0], label[1]
        if not (header.is_integer() and HEADER_WIDTH <= header <= len(label)):
            message = f"the label's first number is {header:g}; expected the width of its header, 2 or more"
            self.error("bad-header", message, place, record)
            return
        if not (width.is_integer() and width >= OBJECT_WIDTH):
            message = f"the label's second number is {width:g}; expected the width of an object, 5 or more"
            self.error("bad-header", message, place, record)
            return
        begin, step = int(header), int(width)
        spare = (len(label) - begin) % step
        if spare and any(value != -1 for value in label[-spare:]):
            message = (
                f"{len(label) - begin} numbers follow the header; expected a multiple of the objects' width, {step}"
            )
            self.error("bad-width", message, place, record)
            return
        for number, at in enumerate(range(begin, len(label) - spare, step), start=1):
            self._add_object(label[at : at + step], f"{place}, object {number}", record, exact)

    def _add_object(self, values: Sequence[float], place: str, record: int, exact: bool) -> None:
        label, corners = values[0], tuple(values[1:OBJECT_WIDTH])
        if not label.is_integer() or abs(label) >= _LARGEST_CLASS:
            self.error("bad-class", f"the class is {label:g}; expected a whole number from 0", place, record)
        elif label < 0:
            if label != -1 or corners not in _FILLING:
                message = f"the class is {label:g}; expected a whole number from 0 (or -1 with all corners -1 or 0)"
                self.error("bad-class", message, place, record)
        elif not all(map(math.isfinite, values)):
            self.error("non-finite", "it is not made of numbers", place, record)
        elif max(map(abs, corners)) > _LARGEST_SHARE:
            self._foreign.append((place, record, max(corners, key=abs)))
        else:
            extra = {
                f"extra_{i}": int(value) if value.is_integer() else value
                for i, value in enumerate(values[OBJECT_WIDTH:], start=1)
            }
            self._rows.add_box(corners, int(label), record, extra=extra, exact=exact)

    def dataset(self, classes: Sequence[str]) -> Dataset:
        """Return the images and objects that are sound."""
        largest = max((abs(value) for _, _, value in self._foreign), default=0.0)
        units = "percentages, or pixels of small images" if largest <= _LARGEST_PERCENTAGE else "pixels"
        expected = f"expected shares of the image's sides, 0 to 1. these look like {units}; divide them"
        for place, record, value in self._foreign:
            self.error("not-normalised", f"a corner lies at {value:g}; {expected}", place, record)
        known = len(self._findings)
        data = self._rows.dataset(classes)
        for i, finding in enumerate(self._findings[known:], start=known):
            place, record = self._places[finding.place]
            line = record + 1 if self.file.endswith(".lst") else None
            self._findings[i] = replace(finding, place=f"{place} ({finding.place})", record=record, line=line)
        return _with_difficult(data)


def _with_difficult(data: Dataset) -> Dataset:
    """Take the number after the corners for the flag ``difficult``, where it is 0 or 1 throughout."""
    if data.box_extra is None:
        return data
    flags = [extra.get("extra_1", 0) for extra in data.box_extra]
    if not set(flags) <= {0, 1}:
        return data
    rest = tuple({key: value for key, value in extra.items() if key != "extra_1"} for extra in data.box_extra)
    return replace(data, difficult=np.array(flags, dtype=bool), box_extra=rest if any(rest) else None)


def join_files(
    readers: Sequence[tuple[str, LabelReader]], findings: list[Finding], folder: Path, classes: Sequence[str]
) -> Dataset:
    """Return the data of all files, as splits. Raises one `InvalidData` with everything that is wrong in them.

    ``classes`` are the names that the user gives; those of ``classes.txt`` in ``folder`` where there are none.
    """
    largest = max((reader.largest_label for _, reader in readers), default=-1)
    try:
        names = read_class_names(folder, classes, ", ".join(reader.file for _, reader in readers), largest=largest)
    except InvalidData:
        raise_errors(findings)
        raise
    return join([(split, reader.dataset(names)) for split, reader in readers], findings)


class LabelWriteOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to write MXNet's labels."""

    difficult: Annotated[bool, Meta(description="write the flag as a sixth number of each object")] = False
    negatives: Annotated[
        Literal["raise", "drop", "dummy"],
        Meta(
            description="images without objects, on which most of MXNet's readers fail: refuse, leave out, or give "
            "them one object -1 0 0 0 0, which mx.io.ImageDetRecordIter alone understands"
        ),
    ] = "raise"


def leave_out_negatives(data: Dataset, negatives: Literal["raise", "drop", "dummy"]) -> Dataset:
    """Return the images that can have a label; a warning counts the others. Raises `InvalidData` naming each."""
    empty = data.boxes_per_image() == 0
    if negatives == "dummy" or not empty.any():
        return data
    if negatives == "raise":
        findings = [
            Finding(
                code="no-objects",
                severity="error",
                message="there is no object on it, and MXNet's readers fail on such an image",
                file=data.sources[i] or data.paths[i],
                image=i,
                place=data.image_ids[i],
            )
            for i in np.flatnonzero(empty).tolist()
        ]
        hint = "leave them out with negatives=drop, or write negatives=dummy for mx.io.ImageDetRecordIter"
        raise_errors(findings, hint)
    warnings.warn(f"left out {empty.sum()} of {len(data)} images, on which is no object", DetkitWarning, stacklevel=4)
    position = np.cumsum(~empty) - 1
    splits = {name: position[at[~empty[at]]] for name, at in data.split_indices.items()}
    return replace(data.take(np.flatnonzero(~empty)), split_indices=splits)


def turned_image(data: Dataset, i: int, header: Header) -> Finding | None:
    """Return the finding for an image whose boxes are those of the picture as EXIF turns it: MXNet does not turn it."""
    recorded, displayed = tuple(data.sizes[i].tolist()), (header.width, header.height)
    if min(recorded) > 0 and recorded != displayed and not (header.orientation >= 5 and recorded == displayed[::-1]):
        return Finding(
            code="wrong-size",
            severity="error",
            message=f"the annotation says {recorded[0]}x{recorded[1]}, the image is {header.width}x{header.height}, "
            "and boxes become shares of its sides; mend the size",
            file=data.sources[i] or data.paths[i],
            image=i,
            place=data.image_ids[i],
        )
    stored = header.orientation >= 5 and recorded == displayed[::-1]
    if header.orientation == 1 or (stored and header.width != header.height):
        return None
    return Finding(
        code="turned-image",
        severity="error",
        message=f"EXIF orientation {header.orientation} turns it, but not in MXNet, where the boxes would lie "
        "elsewhere; turn the pixels themselves, for example with ImageMagick's `mogrify -auto-orient`",
        file=data.paths[i],
        image=i,
        place=data.image_ids[i],
    )


def write_labels(data: Dataset, *, difficult: bool) -> list[list[float]]:
    """Return the label of each image. Raises `InvalidData` where an image's size is not known."""
    if (data.sizes <= 0).any():
        unknown = data.image_ids[int(np.flatnonzero((data.sizes <= 0).any(axis=1))[0])]
        raise InvalidData(f"{unknown}: its size is not known, and corners are shares of it; give width and height")
    sides = np.tile(data.sizes, 2).repeat(data.boxes_per_image(), axis=0)
    far = np.flatnonzero((abs(data.boxes) > _LARGEST_SHARE * sides).any(axis=1))
    if len(far):
        image = int(np.searchsorted(data.offsets, far[0], side="right")) - 1
        raise InvalidData(
            f"{data.image_ids[image]}: {len(far)} box(es) lie further out than an image's whole size, and would be "
            "read as pixels; run `detkit check` and mend them"
        )
    columns = [data.labels[:, None], data.boxes / sides, *([data.difficult[:, None]] if difficult else [])]
    objects = np.concatenate(columns, axis=1, dtype=np.float64)
    width = objects.shape[1]
    begin = [float(HEADER_WIDTH), float(width)]
    dummy = [*begin, -1.0, *[0.0] * (width - 1)]
    return [
        [*begin, *objects[start:stop].ravel().tolist()] if stop > start else dummy
        for start, stop in pairwise(data.offsets.tolist())
    ]
