"""Images and boxes as a reader of lines or records meets them, one after another, and the columns they become."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from msgspec import Meta

from detkit.boxes import Boxes, area, orient
from detkit.data import Dataset, Extra
from detkit.errors import ImageError, InvalidData
from detkit.formats.findings import Finding, image_finding
from detkit.formats.imagefiles import read_headers
from detkit.formats.textlines import read_text
from detkit.params import Options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detkit.data import Indices
    from detkit.images import Header

FLOAT32, SIX_DECIMALS = 2.0**-22, 0.6e-6
"""How far a normalised coordinate may lie from the whole pixel that it stands for, as a share of the image's side: the
rounding of a 32-bit float (24 bits, and two roundings), and of a text with six decimals."""

CLASS_FILE = "classes.txt"

_NO_EXTRA: Extra = {}


class ListOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to read a format that lists images and numbers its classes."""

    classes: Annotated[
        tuple[str, ...],
        Meta(description="class names in order of their numbers; those of classes.txt if absent"),
    ] = ()
    images: Annotated[
        str, Meta(description="folder that the image names begin in; looked for near the file if absent")
    ] = ""


class Rows:
    """Collects images, each followed by its boxes; `dataset` makes columns of them.

    ``normalised`` is for boxes given as shares of the image's sides: one of `FLOAT32` and `SIX_DECIMALS`. ``stored``
    says that boxes are those of the pixels as the file has them; where EXIF turns an image, they are turned along.
    """

    def __init__(self, findings: list[Finding], *, normalised: float | None = None, stored: bool = False) -> None:
        self.findings = findings
        self._normalised = normalised
        self._stored = stored
        self._turned: dict[int, Header] = {}
        self._image_ids: list[str] = []
        self._paths: list[str] = []
        self._sources: list[str] = []
        self._sizes = array("q")
        self._counts: list[int] = []
        self._image_extra: list[Extra] = []
        self._corners = array("d")
        self._labels = array("q")
        self._records = array("q")
        self._difficult = bytearray()
        self._box_extra: list[Extra] = []
        self._exact = bytearray()
        self._polygons: dict[int, Sequence[float]] = {}

    def __len__(self) -> int:
        return len(self._image_ids)

    def add_image(
        self, image_id: str, path: str, *, source: str, size: tuple[int, int] = (0, 0), extra: Extra = _NO_EXTRA
    ) -> None:
        """Begin an image; without a size its file is asked for one."""
        self._image_ids.append(image_id)
        self._paths.append(path)
        self._sources.append(source)
        self._sizes.extend(size)
        self._counts.append(0)
        self._image_extra.append(extra)

    def add_box(
        self,
        corners: Sequence[float],
        label: int,
        record: int,
        difficult: bool = False,
        extra: Extra = _NO_EXTRA,
        *,
        polygon: Sequence[float] = (),
        exact: bool = False,
    ) -> None:
        """Add a box, xyxy, to the image added last; ``record`` is the number of its line or record, from 0.

        ``polygon`` is the outline ``x1 y1 x2 y2 ...`` of an object that has one, in the units of the corners. Shares
        that are ``exact`` have all their digits, and are not rounded to the next whole pixel.
        """
        self._exact.append(exact)
        if polygon:
            self._polygons[len(self._labels)] = polygon
        self._corners.extend(corners)
        self._labels.append(label)
        self._records.append(record)
        self._difficult.append(difficult)
        self._box_extra.append(extra)
        self._counts[-1] += 1

    @property
    def largest_label(self) -> int:
        """The largest label so far; -1 where there is no box."""
        return max(self._labels, default=-1)

    def dataset(self, classes: Sequence[str]) -> Dataset:
        """Return the columns. An image that is there twice, a label without a name or an unreadable size is a finding,
        and left out."""
        sizes = np.array(self._sizes, dtype=np.int64).reshape(-1, 2)
        owner = np.repeat(np.arange(len(sizes)), self._counts)
        labels = np.array(self._labels, dtype=np.int64)
        boxes = np.array(self._corners, dtype=np.float64).reshape(-1, 4)
        usable = self._unique_images() & self._measure(sizes)
        named = self._known_labels(labels, owner, classes)
        if self._normalised is not None:
            tolerances = np.where(np.frombuffer(bytes(self._exact), dtype=bool), 0.0, self._normalised)
            boxes = to_pixels(boxes, sizes[owner], tolerances[:, None])
        offsets = np.concatenate([[0], np.cumsum(self._counts)]).astype(np.int64)
        self._turn(boxes, sizes, offsets)
        areas = area(boxes)
        masks: list[Any] = [None] * len(boxes)
        for row, polygon in self._polygons.items():
            points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
            if self._normalised is not None:
                points = to_pixels(points, sizes[owner[[row]]], self._normalised)
            masks[row] = [points.ravel().tolist()]
            areas[row] = polygon_area(points)
        data = Dataset(
            classes=tuple(classes),
            image_ids=tuple(f"{i}" if not usable[i] else name for i, name in enumerate(self._image_ids)),
            paths=tuple(self._paths),
            sizes=sizes,
            offsets=offsets,
            boxes=boxes,
            labels=np.where(named, labels, 0),
            difficult=np.frombuffer(bytes(self._difficult), dtype=bool),
            crowd=np.zeros(len(boxes), dtype=bool),
            area=areas,
            records=np.array(self._records, dtype=np.int64),
            sources=tuple(self._sources),
            masks=tuple(masks) if self._polygons else None,
            extra=tuple(self._image_extra) if any(self._image_extra) else None,
            box_extra=tuple(self._box_extra) if any(self._box_extra) else None,
        )
        data = data if named.all() else data.keep_boxes(named)
        return data if usable.all() else data.take(np.flatnonzero(usable))

    def _unique_images(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        first: dict[str, int] = {}
        unique = np.ones(len(self), dtype=bool)
        for i, image_id in enumerate(self._image_ids):
            if first.setdefault(image_id, i) != i:
                unique[i] = False
                message = f"image {image_id!r} is there already; give it once, with all its boxes"
                self._error("image-twice", message, i)
        return unique

    def _measure(self, sizes: Indices) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Fill in unknown sizes from the files' headers."""
        readable = np.ones(len(self), dtype=bool)
        unknown = np.flatnonzero((sizes <= 0).any(axis=1)).tolist()
        for i, header in zip(unknown, read_headers([self._paths[i] for i in unknown]), strict=True):
            if isinstance(header, ImageError):
                readable[i] = False
                self.findings.append(image_finding(header, None, self._sources[i], self._image_ids[i]))
            else:
                swapped = self._stored and header.orientation >= 5
                sizes[i] = (header.height, header.width) if swapped else (header.width, header.height)
                if self._stored and header.orientation != 1:
                    self._turned[i] = header
        return readable

    def _turn(self, boxes: Boxes, sizes: Indices, offsets: Indices) -> None:
        """Move boxes drawn on stored pixels to where EXIF shows them."""
        for i, header in self._turned.items():
            rows = slice(int(offsets[i]), int(offsets[i + 1]))
            boxes[rows] = orient(boxes[rows], header.orientation, *sizes[i].tolist())
            sizes[i] = header.width, header.height

    def _known_labels(
        self, labels: Indices, owner: Indices, classes: Sequence[str]
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        known = np.asarray((labels >= 0) & (labels < len(classes)))
        for row in np.flatnonzero(~known).tolist():
            message = f"class {labels[row]} has no name: there are {len(classes)}, counted from 0"
            self._error("unknown-class", message, int(owner[row]), self._records[row])
        return known

    def _error(self, code: str, message: str, image: int, record: int | None = None) -> None:
        self.findings.append(
            Finding(
                code=code,
                severity="error",
                message=message,
                file=self._sources[image],
                record=record,
                place=self._image_ids[image],
            )
        )


def to_pixels(shares: Boxes, sizes: Indices, tolerance: float | Boxes) -> Boxes:
    """Return pixels for coordinates given as shares of the sides; those next to a whole pixel become that pixel.

    ``shares`` is ``(n, 4)`` xyxy or ``(n, 2)`` xy, ``sizes`` ``(n, 2)`` or ``(1, 2)`` width and height; ``tolerance`` a
    share of the side, or ``(n, 1)`` of them. Whole pixels, those with up to nine decimals and 32-bit floats come back
    as they were before they were divided by the sides, if all digits of the shares were kept.
    """
    sides = np.tile(sizes, shares.shape[1] // 2).astype(np.float64)
    pixels = shares * sides
    # Dividing and multiplying loses no more than the last three bits of a share.
    lost = sides * 2.0**-50
    with np.errstate(over="ignore", invalid="ignore"):
        short = np.round(pixels, 9)
        pixels = np.where(np.abs(pixels - short) <= lost, short, pixels)
        single = pixels.astype(np.float32).astype(np.float64)
        pixels = np.where(np.abs(pixels - single) <= lost, single, pixels)
        whole = np.rint(pixels)
        return np.where(np.abs(pixels - whole) <= np.maximum(tolerance * sides, lost), whole, pixels)


def polygon_area(points: Boxes) -> float:
    """Return the area within an outline, ``(n, 2)`` xy, by the shoelace formula."""
    x, y = points.T
    return float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2)


def read_class_names(
    folder: Path, given: Sequence[str], what: str, *, largest: int | None = None, file: Path | None = None
) -> tuple[str, ...]:
    """Return the names given by the user, else those in ``classes.txt`` of a folder, one a line in order of the ids.

    ``file`` is another file that takes its place; ``what`` tells whose names are missing. Raises `InvalidData` where
    there are none: ids alone never become names.
    """
    if given:
        return tuple(given)
    file = file or folder / CLASS_FILE
    if not file.is_file():
        so_far = "" if largest is None or largest < 0 else f" (ids 0 to {largest} occur)"
        raise InvalidData(
            f"{what} has numbers and no names for its classes{so_far}. put {CLASS_FILE} into {folder}, one name a line "
            "in order of the ids, or give them: --classes NAME,NAME, in Python read_dataset(..., classes=[...])"
        )
    findings: list[Finding] = []
    lines = [line.strip() for line in read_text(file, findings).split("\n")]
    while lines and not lines[-1]:
        del lines[-1]
    findings += [
        Finding(
            code="no-name", severity="error", message="the line is empty", file=str(file), line=i, place=f"line {i}"
        )
        for i, line in enumerate(lines, start=1)
        if not line
    ]
    findings += [
        Finding(
            code="duplicate-name",
            severity="error",
            message=f"the name {line!r} is there already, in line {lines.index(line) + 1}",
            file=str(file),
            line=i,
            place=f"line {i}",
        )
        for i, line in enumerate(lines, start=1)
        if line and lines.index(line) != i - 1
    ]
    if findings or not lines:
        raise InvalidData("\n".join(str(finding) for finding in findings) or f"{file} is empty", findings)
    return tuple(lines)


def write_class_names(classes: Sequence[str], folder: Path) -> None:
    """Write ``classes.txt``. Raises `InvalidData` for a name that is no single line."""
    for name in classes:
        if not name.strip() or name != name.strip() or len(name.splitlines()) != 1:
            raise InvalidData(f"the class name {name!r} cannot stand on a line of {CLASS_FILE}; rename it")
    (folder / CLASS_FILE).write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
