"""SKU-110K: one CSV line for each box, without a header, a file for each split.

``image_name,x1,y1,x2,y2,class,image_width,image_height`` in pixels from 0; the last two columns may be absent, and all
between the name and them are empty for an image without objects. The class column holds names.
"""

from __future__ import annotations

import csv
import io
import math
import warnings
from array import array
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from msgspec import Meta

from detkit.errors import DetkitWarning, ImageError, InvalidData, did_you_mean
from detkit.formats import Format
from detkit.formats.findings import Finding
from detkit.formats.imagefiles import (
    LARGEST_SIDE,
    folder_of,
    given_folder,
    is_file,
    leaves,
    place_images,
    require_finite,
)
from detkit.formats.rows import Rows
from detkit.formats.splits import join, parts, split_names
from detkit.formats.textlines import file_error, line_error, read_lines, read_number, read_text
from detkit.images import read_image
from detkit.params import Options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from detkit.data import Dataset

_CORNERS = (["x1", "y1", "x2", "y2"], ["xmin", "ymin", "xmax", "ymax"])
_CLASS_HEADERS = frozenset({"class", "class_name", "label", "name"})
_MOST_FILES = 64
_SNIFFED = 4


class SkuOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to read SKU-110K."""

    classes: Annotated[
        tuple[str, ...], Meta(description="class names in order; where not given, those that occur, sorted")
    ] = ()
    images: Annotated[
        str, Meta(description="folder of the images; where not given, it is looked for near the CSV files")
    ] = ""
    exclude: Annotated[
        tuple[str, ...], Meta(description="images to leave out: names, or a text file with one name a line")
    ] = ()
    corrupted: Annotated[
        Literal["raise", "skip"],
        Meta(description="skip: decode every image and leave out those that cannot be decoded, with a warning"),
    ] = "raise"


def sniff(path: Path) -> bool:
    """Return whether a CSV file, or one in a folder or its ``annotations``, begins with lines of boxes."""
    return bool(_find(path))


def read(path: Path, options: SkuOptions) -> Dataset:
    """Read one CSV file, or all those of a folder as splits.

    Raises one `InvalidData` with everything that is wrong in all of them.
    """
    files = _find(path) or ([path] if path.is_file() else [])
    if not files:
        raise InvalidData(
            f"{path}: no CSV file of image_name,x1,y1,x2,y2,class,image_width,image_height lines; "
            "looked for annotations/*.csv and *.csv"
        )
    root = path if path.is_dir() else path.parent
    if path.is_file() and root.name.lower() == "annotations":
        root = root.parent
    findings: list[Finding] = []
    tables = [_Table(file, findings) for file in files]
    present = sorted({name for table in tables for name in table.classes})
    classes = options.classes or tuple(present)
    for table in tables:
        table.require_classes(classes)
    if options.images:
        folder = given_folder(root, options.images)
    else:
        names = [name for table in tables for name in islice(table.images, 64)]
        folder = folder_of(names, [root / "images", root / "Images", root / "JPEGImages", root])
    excluded = _excluded(root, options.exclude, {name for table in tables for name in table.images}, findings)
    if options.corrupted == "skip":
        excluded |= _corrupted(folder, {name for table in tables for name in table.images} - excluded)
    splits = split_names([file.stem for file in files])
    read = [(split, table.dataset(folder, classes, excluded)) for split, table in zip(splits, tables, strict=True)]
    return join(read, findings)


def write(data: Dataset, folder: Path, _options: Options) -> None:
    """Write ``images/`` and ``annotations.csv``, or ``annotations/annotations_<split>.csv`` for splits."""
    require_finite(data)
    for name in (*data.image_ids, *data.classes):
        if not name or name != name.strip() or "\r" in name or "\0" in name:
            raise InvalidData(f"{name!r} cannot stand in a CSV file; rename it")
    pieces = parts(data)
    place_images(data, folder / "images")
    for split, part in pieces.items():
        file = folder / (f"annotations/annotations_{split}.csv" if split else "annotations.csv")
        file.parent.mkdir(exist_ok=True)
        with file.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows(_lines(part))


def _lines(data: Dataset) -> Iterator[list[object]]:
    for i, (image_id, (width, height)) in enumerate(zip(data.image_ids, data.sizes.tolist(), strict=True)):
        rows = range(int(data.offsets[i]), int(data.offsets[i + 1]))
        if not rows:
            yield [image_id, "", "", "", "", "", width, height]
        for row in rows:
            corners = [int(value) if value.is_integer() else value for value in data.boxes[row].tolist()]
            yield [image_id, *corners, data.classes[data.labels[row]], width, height]


def _find(path: Path) -> list[Path]:
    """Return the CSV files of boxes: the file itself, those of ``annotations``, or those of the folder."""
    if path.is_file():
        return [path] if _is_table(path) else []
    for folder in (path / "annotations", path):
        files = sorted(folder.glob("*.csv")) if folder.is_dir() else []
        if len(files) > _MOST_FILES and not any(map(_is_table, files[:_MOST_FILES])):
            continue  # some other kind of data
        found = [file for file in files if _is_table(file)]
        if found:
            # One with nothing right in it is read all the same, if it is called like the others.
            return [file for file in files if file in found or file.name.startswith("annotations")]
    return []


def _is_table(file: Path) -> bool:
    """Return whether one of the first lines has the right columns, after a header that is known, or none."""
    if file.suffix.lower() != ".csv" or not is_file(file):
        return False
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            text = stream.read(1 << 14)
        records = list(islice(csv.reader(io.StringIO(text, newline="")), _SNIFFED))
    except (OSError, UnicodeDecodeError, csv.Error):
        return False
    records = [[field.strip() for field in record] for record in records if any(record)]
    if records and _is_unknown_header(records[0]):
        return False
    return any(len(record) in (6, 8) and _corners(record) is not None for record in records)


def _is_header(record: list[str]) -> bool:
    lower = [field.lower() for field in record]
    return (
        len(lower) in (6, 8)
        and lower[1:5] in _CORNERS
        and lower[5] in _CLASS_HEADERS
        and lower[6:] in ([], ["image_width", "image_height"], ["width", "height"])
    )


def _is_unknown_header(record: list[str]) -> bool:
    fields = record[1:5]
    return (
        len(record) > 5 and all(fields) and not _is_header(record) and all(math.isnan(read_number(f)) for f in fields)
    )


def _corners(record: list[str]) -> list[float] | None:
    """Return four numbers, none for an image without objects; None where it is neither."""
    if not any(record[1:6]):
        return []
    corners = [read_number(field) for field in record[1:5]]
    return None if any(map(math.isnan, corners)) else corners


class _Table:
    """The lines of one file as columns; those of an image need not be together."""

    def __init__(self, file: Path, findings: list[Finding]) -> None:
        self.file, self.findings = file, findings
        self.images: dict[str, int] = {}
        self.classes: dict[str, int] = {}
        self._sizes: list[tuple[int, int]] = []
        self._corners = array("d")
        self._owners = array("q")
        self._labels = array("q")
        self._lines = array("q")
        self._empty: dict[int, int] = {}
        """Lines that say that there is nothing on an image."""
        reader = csv.reader(io.StringIO(read_text(file, findings), newline=""), strict=True)
        try:
            for record in reader:
                self._add([field.strip() for field in record], reader.line_num)
        except csv.Error as error:
            self._error("malformed", reader.line_num, f"no valid CSV: {error}")
        boxes = np.bincount(np.array(self._owners, dtype=np.int64), minlength=len(self.images))
        for owner, line in self._empty.items():
            if boxes[owner]:
                self._error("contradiction", line, f"the line says that nothing is there; {boxes[owner]} boxes are")

    def _error(self, code: str, line: int, message: str) -> None:
        self.findings.append(line_error(code, self.file, line, message))

    def _add(self, record: list[str], line: int) -> None:
        if not any(record) or (line == 1 and _is_header(record)):
            return
        if len(record) not in (6, 8):
            message = f"{len(record)} columns; expected image_name,x1,y1,x2,y2,class[,image_width,image_height]"
            self._error("bad-columns", line, message)
            return
        corners = _corners(record)
        name, label = record[0], record[5]
        if line == 1 and _is_unknown_header(record):
            message = "the header is not known; expected none, or image_name,x1,y1,x2,y2,class,image_width,image_height"
            self._error("bad-header", line, message)
        elif corners is None:
            wrong = next(field for field in record[1:5] if math.isnan(read_number(field)))
            self._error("bad-number", line, f"{wrong[:40]!r} is not a number; expected x1,y1,x2,y2 in pixels")
        elif not name or leaves(name):
            code = "outside-folder" if name else "no-image"
            self._error(code, line, f"{name!r} is no file name within the folder of images")
        elif corners and not label:
            self._error("no-name", line, "the class is empty")
        else:
            owner = self.images.setdefault(name, len(self.images))
            self._measure(owner, name, record[6:], line)
            if not corners:
                self._empty[owner] = line
                return
            self._corners.extend(corners)
            self._owners.append(owner)
            self._labels.append(self.classes.setdefault(label, len(self.classes)))
            self._lines.append(line)

    def _measure(self, owner: int, name: str, fields: list[str], line: int) -> None:
        """Note an image's size, 0 x 0 where the line has none; all lines must agree."""
        sides = [read_number(field) for field in fields] or [0.0, 0.0]
        if not all(side.is_integer() and 0 <= side <= LARGEST_SIDE for side in sides):
            message = f"{','.join(fields)[:80]!r} is no size; expected image_width,image_height in pixels"
            self._error("bad-size", line, message)
            sides = [0.0, 0.0]
        size = int(sides[0]), int(sides[1])
        if owner == len(self._sizes):
            self._sizes.append(size)
        elif min(self._sizes[owner]) == 0:
            self._sizes[owner] = size
        elif min(size) and size != self._sizes[owner]:
            before = "x".join(map(str, self._sizes[owner]))
            self._error("size-differs", line, f"{name} is {size[0]}x{size[1]} here, and {before} in a line before")

    def require_classes(self, classes: Sequence[str]) -> None:
        """Note an error for each box whose class is not among those that the user wants."""
        unknown = {number: name for name, number in self.classes.items() if name not in set(classes)}
        for line, label in zip(self._lines, self._labels, strict=True) if unknown else ():
            if label in unknown:
                name = unknown[label]
                message = f"no class {name!r} in classes={','.join(classes)};{did_you_mean(name, classes)}"
                self._error("unknown-class", line, message.rstrip(";"))

    def dataset(self, folder: Path, classes: Sequence[str], excluded: set[str]) -> Dataset:
        """Return the images, in the order of their first lines, without those excluded and boxes of other classes."""
        index = {name: i for i, name in enumerate(classes)}
        table = np.array([index.get(name, -1) for name in self.classes], dtype=np.int64)
        labels = table[np.array(self._labels, dtype=np.int64)]
        owners = np.array(self._owners, dtype=np.int64)
        order = np.argsort(owners, kind="stable")
        order = order[labels[order] >= 0]
        bounds = np.searchsorted(owners[order], np.arange(len(self.images) + 1))
        corners = np.array(self._corners, dtype=np.float64).reshape(-1, 4)[order]
        lines = np.array(self._lines, dtype=np.int64)[order]
        labels = labels[order]
        rows = Rows(self.findings)
        for owner, name in enumerate(self.images):
            if name in excluded:
                continue
            rows.add_image(name, str(folder / name), source=str(self.file), size=self._sizes[owner])
            mine = slice(int(bounds[owner]), int(bounds[owner + 1]))
            for box, label, line in zip(
                corners[mine].tolist(), labels[mine].tolist(), lines[mine].tolist(), strict=True
            ):
                rows.add_box(box, label, line - 1)
        return rows.dataset(classes)


def _excluded(root: Path, given: Sequence[str], known: set[str], findings: list[Finding]) -> set[str]:
    """Return the names to leave out; a list that is about none of the images is most likely the wrong one."""
    names = set(given)
    if len(given) == 1 and given[0] not in known:
        file = next((place for place in (root / given[0], Path(given[0])) if is_file(place)), None)
        names = {line for _, line in read_lines(file, findings)} if file else names
    if names and not names & known:
        findings.append(
            file_error(
                "unknown-image",
                root,
                f"exclude={','.join(given)[:80]} names none of the images; expected image names of the CSV files, or a "
                "text file with one a line",
            )
        )
    return names


def _corrupted(folder: Path, names: set[str]) -> set[str]:
    """Decode images, and return those that are there and cannot be decoded."""
    bad = [name for name in sorted(names) if is_file(folder / name) and not _decodes(folder / name)]
    if bad:
        warnings.warn(
            f"{len(bad)} of {len(names)} images cannot be decoded and are left out: {', '.join(bad)}",
            DetkitWarning,
            stacklevel=4,
        )
    return set(bad)


def _decodes(path: Path) -> bool:
    try:
        read_image(path)
    except ImageError:
        return False
    return True


FORMAT = Format(
    name="sku110k",
    summary="SKU-110K: annotations/annotations_<split>.csv or one CSV, a line for each box, with a folder of images",
    sniff=sniff,
    read=read,
    write=write,
    options=SkuOptions,
    carries=frozenset({"image_ids", "split_indices"}),
)
