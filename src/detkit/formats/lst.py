"""MXNet's ``.lst``: a line for each image, fields separated by TAB.

``index A B extra... (id xmin ymin xmax ymax extra...)* path``: what im2rec packs into a ``.rec``. Written are A = 2,
B = 5 and corners with all their digits; the paths begin in ``images/``, im2rec's second argument.
"""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import TYPE_CHECKING

from detkit.errors import ImageError, InvalidData
from detkit.formats import Format
from detkit.formats.findings import Finding, raise_errors
from detkit.formats.imagefiles import folder_of, given_folder, leaves, place_images, read_headers, require_finite
from detkit.formats.mxlabels import (
    LabelReader,
    LabelWriteOptions,
    join_files,
    leave_out_negatives,
    turned_image,
    write_labels,
)
from detkit.formats.rows import FLOAT32, SIX_DECIMALS, ListOptions, write_class_names
from detkit.formats.splits import parts, split_names
from detkit.formats.textlines import number_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detkit.data import Dataset

_SNIFFED = 4096
_SHORT, _LONG, _LOOKED_AT = 9, 14, 100
"""Characters of a number with six decimals, and of one with more digits than a 32-bit float; lines that are looked at
for numbers that are not short."""
_MOST_IMAGES = 2**64


def sniff(path: Path) -> bool:
    """Return whether a ``.lst`` file, or one of a folder's, begins with a line of numbers and a path."""
    return any(_is_list(file) for file in _find(path))


def read(path: Path, options: ListOptions) -> Dataset:
    """Read one file, or all those of a folder as splits. Raises one `InvalidData` with everything that is wrong."""
    files = _find(path)
    if not files:
        raise InvalidData(f"{path}: no .lst file; expected one, or a folder with some")
    root = path if path.is_dir() else path.parent
    findings: list[Finding] = []
    splits = split_names([file.stem for file in files])
    lines = [_lines(file) for file in files]
    folders = [_images_folder(some, split, root, options.images) for some, split in zip(lines, splits, strict=True)]
    several = len({folder for folder, some in zip(folders, lines, strict=True) if any(map(str.strip, some))}) > 1
    readers = []
    for file, split, some, folder in zip(files, splits, lines, folders, strict=True):
        prefix = f"{folder.relative_to(root).as_posix()}/" if several and folder != root else ""
        readers.append((split, _read_file(file, some, folder, prefix, findings)))
    return join_files(readers, findings, root, options.classes)


def _find(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.glob("*.lst") if file.is_file() and not file.name.startswith("."))
    return [path] if path.suffix.lower() == ".lst" and path.is_file() else []


def _is_list(file: Path) -> bool:
    """Whether the first line begins with two numbers and has more; a list without TAB is explained by reading it."""
    with file.open("rb") as stream:
        fields = stream.read(_SNIFFED).removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0].split()
    try:
        return len(fields) > 2 and int(fields[0]) == float(fields[0]) and float(fields[1]) is not None
    except (ValueError, OverflowError):
        return False


def _lines(file: Path) -> list[str]:
    return file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").split("\n")


def _images_folder(lines: list[str], split: str, root: Path, given: str) -> Path:
    if given:
        return given_folder(root, given)
    names = [line.rpartition("\t")[2].strip() for line in lines]
    return folder_of(names, [root / "images", root, root / "images" / split, root / split, root / "JPEGImages"])


def _read_file(file: Path, lines: list[str], folder: Path, prefix: str, findings: list[Finding]) -> LabelReader:
    long = any(len(field) > _SHORT for line in lines[:_LOOKED_AT] for field in line.split("\t")[1:-1])
    reader = LabelReader(file, findings, normalised=FLOAT32 if long else SIX_DECIMALS)
    indices: dict[int, int] = {}
    names: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _read_line(line, number, reader, folder, prefix, indices, names)
    return reader


def _read_line(  # noqa: PLR0917
    line: str,
    number: int,
    reader: LabelReader,
    folder: Path,
    prefix: str,
    indices: dict[int, int],
    names: dict[str, int],
) -> None:
    place, record = f"line {number}", number - 1
    first, *label, name = [field.strip() for field in line.split("\t")] if "\t" in line else ["", ""]
    if len(label) < 2:
        message = "expected index, header width, object width ..., path with TAB between them, found "
        message += f"{len(label) + 2 if first else 1} field(s)"
        message += "; three are an image with its class, without boxes" if len(label) == 1 else ""
        reader.error("bad-line", message, place, record)
        return
    try:
        index, values = int(first), [float(value) for value in label]
    except ValueError as error:
        reader.error("not-a-number", f"{error}; all fields but the last are numbers", place, record)
        return
    name = posixpath.normpath(name) if name else name
    if not 0 <= index < _MOST_IMAGES:
        reader.error("bad-index", f"the index is {index}; expected a whole number from 0", place, record)
    elif indices.setdefault(index, number) != number:
        message = f"the index {index} is there already, in line {indices[index]}; MXNet would find one of the two only"
        reader.error("duplicate-index", message, place, record)
    if not name:
        reader.error("no-path", "the last field, the image's path, is empty", place, record)
    elif leaves(name):
        message = f"the path {name!r} leads out of the image folder; expected one within {folder}"
        reader.error("outside-folder", message, place, record)
    elif names.setdefault(name, number) != number:
        message = f"image {name!r} is there already, in line {names[name]}; give it once, with all its objects"
        reader.error("image-twice", message, place, record)
    else:
        exact = any(len(field) > _LONG for field in label)
        reader.add(prefix + name, f"{folder}/{name}", values, place=place, record=record, exact=exact)


def write(data: Dataset, folder: Path, options: LabelWriteOptions) -> None:
    """Write ``images/``, ``classes.txt`` and ``train.lst``, or a file for each split. Raises `InvalidData`."""
    require_finite(data)
    raise_errors([*_unreadable_names(data), *_turned_images(data)])
    data = leave_out_negatives(data, options.negatives)
    index = {image_id: i for i, image_id in enumerate(data.image_ids)}
    texts: dict[str, str] = {}
    for split, part in parts(data).items():
        labels = write_labels(part, difficult=options.difficult)
        texts[split or "train"] = "".join(
            "\t".join([str(index[image_id]), *map(number_text, label), image_id]) + "\n"
            for image_id, label in zip(part.image_ids, labels, strict=True)
        )
    place_images(data, folder / "images")
    write_class_names(data.classes, folder)
    for split, text in texts.items():
        (folder / f"{split}.lst").write_bytes(text.encode("utf-8", "surrogateescape"))


def _unreadable_names(data: Dataset) -> Iterator[Finding]:
    for i, image_id in enumerate(data.image_ids):
        if len(image_id.split()) != 1 or image_id != image_id.strip():
            yield Finding(
                code="space-in-name",
                severity="error",
                message="the name has white space in it, where MXNet's C++ reader (path_imglist) ends the path",
                file=data.paths[i],
                image=i,
                place=repr(image_id),
            )


def _turned_images(data: Dataset) -> Iterator[Finding]:
    """Look into the images; one that is missing is told of when they are placed."""
    for i, header in enumerate(read_headers(data.paths)):
        finding = None if isinstance(header, ImageError) else turned_image(data, i, header)
        if finding is not None:
            yield finding


FORMAT = Format(
    name="lst",
    summary="MXNet list: train.lst (index, header, objects and path of each image), images/, classes.txt",
    sniff=sniff,
    read=read,
    write=write,
    options=ListOptions,
    write_options=LabelWriteOptions,
    carries=frozenset({"image_ids", "classes", "split_indices"}),
)
