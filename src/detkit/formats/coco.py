"""COCO detection JSON: one file, or one for each split.

Ids of any kind are read (from 0, from 1, with gaps, strings), and kept for writing, also of a part of the data, as
everything else that means nothing here: unknown keys of images, annotations, categories and of the file. Data without
ids gets 1..n. ``area`` is
the object's, so that of its mask where there is one. A VOC "difficult" flag travels as ``"difficult": 1``.
"""

from __future__ import annotations

import mmap
import re
import warnings
from itertools import count as count_from
from itertools import repeat
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from detkit.boxes import Boxes, xyxy_to_xywh
from detkit.data import Dataset, Extra
from detkit.errors import DetkitWarning, InvalidData
from detkit.files import inside
from detkit.formats import COLUMNS, Format
from detkit.formats.cococolumns import KNOWN, KNOWN_OF_IMAGE
from detkit.formats.cocojson import CATEGORY_ORDER, CocoFile
from detkit.formats.findings import Finding
from detkit.formats.imagefiles import folder_of, given_folder, place_images, require_finite
from detkit.formats.splits import SPLIT_FOLDERS, join, parts, split_names
from detkit.numbering import spelled_out
from detkit.params import Options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from detkit.data import Indices

_OTHER_TASKS = ("captions_", "person_keypoints_", "image_info_")
"""How the names of files begin that COCO puts beside its detection files, about the same images."""
_NO_EXTRA: Extra = {}
_TABLES = frozenset({"images", "annotations", "categories"})
_MANY_FILES, _PROBED = 64, 16
"""Of a folder with more JSON files, such as LabelMe's, so many of the largest and so many others are looked into."""


class CocoOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to read COCO."""

    images: Annotated[
        str, Meta(description="folder of the images; where not given, it is looked for near the JSON file")
    ] = ""


def sniff(path: Path) -> bool:
    """Return whether a JSON file, or one of a folder's, has COCO's ``images`` and ``categories``."""
    return bool(_find(path))


def read(path: Path, options: CocoOptions) -> Dataset:
    """Read one JSON file, or all those of a folder as splits, classes matched by name.

    Raises one `InvalidData` with everything that is wrong in all of them.
    """
    places = _find(path)
    if len(places) > 1:
        listed = "; ".join(", ".join(str(file.relative_to(path)) for _, file in place) for place in places)
        raise InvalidData(
            f"{path}: COCO JSON files lie in {len(places)} places, and which of them belong together is not told: "
            f"{listed}. name the file to read, or keep the others elsewhere"
        )
    files = places[0] if places else []
    if not files and path.is_file():
        files = [("", path)]  # reading it says what is missing
    if not files:
        raise InvalidData(
            f"{path}: no COCO JSON file with 'images' and 'categories'; looked for annotations/*.json, *.json and "
            "{train,valid,test}/*.json"
        )
    root = path if path.is_dir() else path.parent
    if path.is_file() and root.name.lower() == "annotations":
        root = root.parent
    findings: list[Finding] = []
    parsed = [(split, CocoFile(file, findings)) for split, file in files]
    folders = [_images_folder(file, split, root, options.images) for split, file in parsed]
    # A split without images tells nothing about where they are.
    prefixed = len({folder for (_, file), folder in zip(parsed, folders, strict=True) if file.file_names}) > 1
    read: list[tuple[str, Dataset]] = []
    for (split, file), folder in zip(parsed, folders, strict=True):
        prefix = folder.relative_to(root).as_posix() if prefixed and folder.is_relative_to(root) else ""
        read.append((split, file.dataset(folder, "" if prefix in ("", ".") else f"{prefix}/")))
    return join(read, findings)


def to_coco(data: Dataset) -> dict[str, Any]:
    """Return COCO's JSON object, in the order and with the ids of the file that the data comes from.

    Ids are 1..n where none are known, or not each its own any more; those of categories also where they do not rise
    with the classes, as their order is that of the classes for all who read numbers. Annotations without an order of
    the file stand image by image, in class order the categories. Raises `InvalidData` where a box is not finite.
    """
    return _content(data)[0]


def written_ids(data: Dataset) -> tuple[list[int | str], dict[str, int | str]]:
    """Return the ids that `write` gives: of each image in order, and of each class by its name.

    An image in several splits has that of the first. Two images of different splits may have the same.
    """
    image_ids: list[Any] = _image_ids(_in_one_file(data), [])
    for name in reversed(list(data.split_indices)):
        for i, image_id in zip(data.split_indices[name].tolist(), _image_ids(data.splits[name], []), strict=True):
            image_ids[i] = image_id
    if data.split_indices:
        rest = np.setdiff1d(np.arange(len(data)), np.concatenate(list(data.split_indices.values())))
        for i, image_id in zip(rest.tolist(), _image_ids(data.take(rest), []), strict=True):
            image_ids[i] = image_id
    return image_ids, dict(zip(data.classes, _category_ids(data, []), strict=True))


def _in_one_file(data: Dataset) -> Dataset:
    """Return the data with the ids of boxes kept, and of images that do not follow from the order of one file."""
    return spelled_out(data, images=len(set(data.sources)) > 1, classes=False)


def _image_ids(data: Dataset, lost: list[str]) -> list[Any]:
    return _ids([extra.get("id") for extra in data.extra] if data.extra else [], len(data), "images", lost)


def _category_ids(data: Dataset, lost: list[str]) -> list[Any]:
    ids = _ids([extra.get("id") for extra in data.class_extra or ()], len(data.classes), "categories", lost)
    if _are_numbers(ids) and ids != sorted(ids):
        lost.append(f"the ids of categories, which do not rise with the classes; they are 1 to {len(ids)} now")
        return list(range(1, len(ids) + 1))
    return ids


def _are_numbers(ids: Sequence[Any]) -> bool:
    return all(isinstance(i, int) for i in ids)


def _content(data: Dataset) -> tuple[dict[str, Any], list[str]]:
    """Return COCO's JSON object, and what of the data it does not hold."""
    require_finite(data)
    data = _in_one_file(data)
    lost: list[str] = []
    content, order = _of_files(data, lost)
    image_ids = _image_ids(data, lost)
    content["images"] = [
        {**extra, "id": i, "file_name": name, "width": width, "height": height}
        for extra, i, name, (width, height) in zip(
            data.extra if data.extra is not None else repeat(_NO_EXTRA, len(data)),
            image_ids,
            data.image_ids,
            data.sizes.tolist(),
            strict=True,
        )
    ]
    of_classes = data.class_extra or (_NO_EXTRA,) * len(data.classes)
    category_ids = _category_ids(data, lost)
    content["annotations"] = _annotations(data, image_ids, category_ids, lost)
    categories = [
        {**extra, "id": i, "name": name} for extra, i, name in zip(of_classes, category_ids, data.classes, strict=True)
    ]
    # Of categories with text as ids, the order is that of the classes.
    position = {name: i for i, name in enumerate(order)} if _are_numbers(category_ids) else {}
    content["categories"] = sorted(categories, key=lambda category: position.get(category["name"], len(position)))
    return content, lost


def _of_files(data: Dataset, lost: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what the files say beside their tables, and the order of their categories; of two that contradict one
    another, the first counts."""
    found: dict[str, Any] = {}
    for source, extra in data.file_extra.items():
        for key, value in extra.items():
            if (key not in _TABLES or key == CATEGORY_ORDER) and found.setdefault(key, value) != value:
                what = "the order of categories" if key == CATEGORY_ORDER else repr(key)
                lost.append(f"{what} of {source}, which another file contradicts")
    return found, found.pop(CATEGORY_ORDER, [])


def _annotations(data: Dataset, image_ids: list[Any], category_ids: list[Any], lost: list[str]) -> list[dict[str, Any]]:
    rows = _file_order(data)
    owner = np.repeat(np.arange(len(data)), data.boxes_per_image())[rows]

    def arrange(column: Sequence[Any]) -> Iterator[Any]:
        return iter(column if isinstance(rows, slice) else map(column.__getitem__, rows.tolist()))

    kept: list[Any] = [] if data.box_ids is None else data.box_ids[rows].tolist()
    if data.box_extra is not None:
        numbers = kept or repeat(None, len(owner))
        kept = [extra.get("id", i) for extra, i in zip(arrange(data.box_extra), numbers, strict=True)]
    annotations: list[dict[str, Any]] = [
        {**extra, "id": i, "image_id": image, "category_id": label, "bbox": bbox, "area": area, "iscrowd": crowd}
        for extra, i, image, label, bbox, area, crowd in zip(
            arrange(data.box_extra) if data.box_extra is not None else repeat(_NO_EXTRA, len(owner)),
            _ids(kept, len(owner), "annotations", lost),
            np.array(image_ids, dtype=object)[owner].tolist(),
            np.array(category_ids, dtype=object)[data.labels[rows]].tolist(),
            _numbers(_xywh(data.boxes[rows])),
            _numbers(data.area[rows]),
            data.crowd[rows].astype(int).tolist(),
            strict=True,
        )
    ]
    if data.masks is not None:
        for annotation, mask in zip(annotations, arrange(data.masks), strict=True):
            if mask is not None:
                annotation["segmentation"] = mask
    for row in np.flatnonzero(data.difficult[rows]).tolist():
        annotations[row]["difficult"] = 1
    return annotations


def _file_order(data: Dataset) -> Indices | slice:
    """Return the rows in the order of their records, where these are all of one file and each has its own."""
    if len(set(data.sources)) > 1 or (np.diff(data.records) > 0).all():
        return slice(None)
    order = np.argsort(data.records, kind="stable")
    return order if (np.diff(data.records[order]) > 0).all() else slice(None)


def _ids(kept: Sequence[Any], count: int, table: str, lost: list[str]) -> list[Any]:
    """Return the ids that are kept, with the next ones for records without; 1..n where not all differ."""
    known = [i if isinstance(i, (int, str)) else None for i in kept]
    given = [i for i in known if i is not None]
    if not given:
        return list(range(1, count + 1))
    if len(set(given)) == len(given):
        following = count_from(max((i for i in given if isinstance(i, int)), default=0) + 1)
        return known if len(given) == count else [next(following) if i is None else i for i in known]
    lost.append(f"the ids of {table}, some of which are there twice; they are 1 to {count} now")
    return list(range(1, count + 1))


def _xywh(boxes: Boxes) -> Boxes:
    """Return left, top, width, height. Of the widths that lead to the same right edge the one with the fewest decimals
    is taken, which is the one that was read, if it had no more than nine."""
    exact = xyxy_to_xywh(boxes)
    low, sides, high = boxes[:, :2], exact[:, 2:], boxes[:, 2:]
    pending = sides != np.rint(sides)
    for decimals in range(1, 10):
        if not pending.any():
            break
        short = np.round(sides, decimals)
        fits = pending & (low + short == high)
        sides[fits] = short[fits]
        pending &= ~fits
    return exact


def write(data: Dataset, folder: Path, _options: Options) -> None:
    """Write ``images/`` and ``annotations.json``, or ``annotations/<split>.json`` where the data came split.

    Warns of ids and keys of files that cannot be kept: two files were put together that contradict one another, classes
    have another order than their ids, or a file has no image that is written.
    """
    encoded: dict[str, bytes] = {}
    lost: list[str] = []
    files = parts(data)
    named = {source for part in files.values() for source in part.file_extra}
    for split, part in files.items():
        content, of_part = _content(part)
        encoded[f"annotations/{split}.json" if split else "annotations.json"] = msgspec.json.encode(content)
        lost += of_part
    for source in data.file_extra:
        if source not in named:
            lost.append(f"what {source} says beside images and boxes, as none of the images are told as its own")
    if lost:
        warnings.warn(f"coco: left behind: {'; '.join(dict.fromkeys(lost))}", DetkitWarning, stacklevel=3)
    place_images(data, folder / "images")
    for name, text in encoded.items():
        target = folder / inside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text)


def _numbers(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> list[Any]:
    """Return nested lists with whole numbers as ints, as COCO's own files have them."""
    if (values == np.rint(values)).all() and (abs(values) < 2**53).all():
        whole: list[Any] = values.astype(np.int64).tolist()
        return whole
    if values.ndim == 1:
        return [int(value) if value.is_integer() else value for value in values.tolist()]
    return [[int(value) if value.is_integer() else value for value in row] for row in values.tolist()]


def _find(path: Path) -> list[list[tuple[str, Path]]]:
    """Return the detection files of each place that has some, with their splits' names; without one for a single file.

    The places are ``annotations/``, the folder itself, and folders called like splits, which are one.
    """
    if path.is_file():
        return [[("", path)]] if path.suffix.lower() == ".json" and _is_coco(path) else []
    if not path.is_dir():
        return []
    folders = [(entry.name, entry) for entry in sorted(path.iterdir())]
    places: list[list[tuple[str, Path]]] = []
    for folder in [*(entry for name, entry in folders if name.lower() == "annotations"), path]:
        files = _coco_files(folder)
        places.append(list(zip(split_names([file.stem for file in files]), files, strict=True)))
    nested = [(name, file) for name, entry in folders if name.lower() in SPLIT_FOLDERS for file in _coco_files(entry)]
    names = [name for name, _ in nested]
    places.append([(name if names.count(name) == 1 else f"{name}-{file.stem}", file) for name, file in nested])
    return [[("", place[0][1])] if len(place) == 1 else place for place in places if place]


def _coco_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if len(files) > _MANY_FILES:
        largest = sorted(files, key=lambda file: file.stat().st_size if file.is_file() else 0)[-_PROBED:]
        if not any(map(_is_coco, [*largest, *files[:: len(files) // _PROBED]])):
            return []
    files = [file for file in files if _is_coco(file)]
    return [file for file in files if not file.name.startswith(_OTHER_TASKS)] or files


def _is_coco(file: Path) -> bool:
    """Look for both keys; JumpStart's ``annotations.json`` has no categories and other boxes."""
    if not file.is_file() or not file.stat().st_size:
        return False
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b'"images"') >= 0 and content.rfind(b'"categories"') >= 0


def _images_folder(file: CocoFile, split: str, root: Path, given: str) -> Path:
    """Return the folder that has most of a sample of the images; the likeliest one where none has any."""
    if given:
        return given_folder(root, given)
    here, stem = file.path.parent, re.sub(r"^instances_", "", file.path.stem)
    named = [parent / name for name in dict.fromkeys((split, stem)) if name for parent in (root / "images", root)]
    likely = [here / "images", here, root / "images", root, *named, root / "JPEGImages"]
    return folder_of(file.file_names, likely)


FORMAT = Format(
    name="coco",
    summary="COCO detection: annotations.json or annotations/<split>.json, with a folder of images",
    sniff=sniff,
    read=read,
    write=write,
    options=CocoOptions,
    carries_key=lambda key, value: key not in KNOWN or (key == "id" and isinstance(value, (int, str))),
    carries_image_key=lambda key, value: key not in KNOWN_OF_IMAGE or (key == "id" and isinstance(value, (int, str))),
    carries=frozenset(COLUMNS),
)
