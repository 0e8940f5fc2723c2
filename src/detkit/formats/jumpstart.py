"""What JumpStart's object detection trains on: ``images/`` and ``annotations.json``.

It looks like COCO and is not: boxes are corners, ``[xmin, ymin, xmax, ymax]``, and there are no ``categories``, so the
names come from ``classes.txt`` or the user. AWS does not say where category ids start; detkit writes them from 0.
"""

from __future__ import annotations

import mmap
import posixpath
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta

from detkit.errors import DetkitWarning, InvalidData
from detkit.formats import Format
from detkit.formats.findings import raise_errors
from detkit.formats.imagefiles import folder_of, given_folder, leaves, place_images, require_finite
from detkit.formats.jsonrecords import Place, is_box, is_id, plain, shown, side
from detkit.formats.rows import CLASS_FILE, ListOptions, Rows, read_class_names, write_class_names

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from detkit.data import Dataset, Extra, Flags
    from detkit.formats.findings import Finding
    from detkit.params import Options

_FILE = "annotations.json"
_IMAGE_KEYS = frozenset({"id", "file_name", "width", "height"})
_BOX_KEYS = frozenset({"id", "image_id", "category_id", "bbox"})
_TOLERANCE_PX = 1.0
_MOST = 0.9
"""Share of the boxes that must lie in their images as width and height, to be taken for that."""


class JumpStartOptions(ListOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to read JumpStart's annotations."""

    first_id: Annotated[
        Literal["auto", 0, 1], Meta(description="category id of the first class; auto tells by the ids that occur")
    ] = "auto"


def sniff(path: Path) -> bool:
    """Return whether a JSON file, or a folder's ``annotations.json``, has ``images`` and no ``categories``."""
    file = path / _FILE if path.is_dir() else path
    if file.suffix.lower() != ".json" or not file.is_file() or not file.stat().st_size:
        return False
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return (
            content.find(b'"images"') >= 0
            and content.find(b'"annotations"') >= 0
            and content.find(b'"file_name"') >= 0
            and content.rfind(b'"categories"') < 0
        )


def read(path: Path, options: JumpStartOptions) -> Dataset:
    """Read one file of annotations. Raises one `InvalidData` with everything that is wrong in it."""
    file = path / _FILE if path.is_dir() else path
    if not file.is_file():
        raise InvalidData(f"{path}: there is no {_FILE}; expected a JumpStart folder, {_FILE} and images/")
    findings: list[Finding] = []
    place = Place(findings, str(file))
    content = place.decode(file.read_bytes()) or {}
    raise_errors(findings)
    if "categories" in content:
        place.error("not-jumpstart", "there are 'categories', so it is COCO, whose boxes are no corners; --format coco")
    images = _read_images(content.get("images"), place)
    objects = _read_objects(content.get("annotations", []), {image.id for image in images}, place)
    numbers = {found.number for of_image in objects.values() for found in of_image}
    names: tuple[str, ...] = ()
    if numbers or options.classes or (file.parent / CLASS_FILE).is_file():
        names = read_class_names(
            file.parent, options.classes, "JumpStart's annotations.json", largest=max(numbers, default=-1)
        )
    first = _first_id(numbers, len(names), file) if options.first_id == "auto" else options.first_id
    here, image_names = file.parent, [image.name for image in images]
    folder = given_folder(here, options.images) if options.images else folder_of(image_names, [here / "images", here])
    rows = Rows(findings)
    for image in images:
        source, size = str(file), image.size
        rows.add_image(image.name, f"{folder}/{image.name}", source=source, size=size, extra=image.extra)
        for found in objects.get(image.id, ()):
            rows.add_box(found.corners, found.number - first, found.record, extra=found.extra)
    data = rows.dataset(names)
    if first:
        data = replace(data, class_extra=tuple({"category_id": number + first} for number in range(len(names))))
    _refuse_width_and_height(data, place)
    raise_errors(findings, partial=data)
    return data


def write(data: Dataset, folder: Path, _options: Options) -> None:
    """Write ``images/``, ``annotations.json`` and ``classes.txt``.

    Raises `InvalidData` where a box is not finite, and where so many have swapped corners that reading takes them for
    COCO's.
    """
    require_finite(data)
    if _has_width_and_height(data).any():
        raise InvalidData(
            "boxes have their corners swapped, and would be taken for COCO's [x, y, width, height]; run `detkit check` "
            "and mend them"
        )
    write_class_names(data.classes, folder)
    place_images(data, folder / "images")
    content = {
        "images": [
            {"file_name": name, "height": height, "width": width, "id": i}
            for i, (name, (width, height)) in enumerate(zip(data.image_ids, data.sizes.tolist(), strict=True))
        ],
        "annotations": [
            {"image_id": image, "bbox": [plain(value) for value in corners], "category_id": label}
            for image, corners, label in zip(
                np.repeat(np.arange(len(data)), data.boxes_per_image()).tolist(),
                data.boxes.tolist(),
                data.labels.tolist(),
                strict=True,
            )
        ],
    }
    (folder / _FILE).write_bytes(msgspec.json.encode(content))


class _Image(NamedTuple):
    id: int | str
    name: str
    size: tuple[int, int]
    extra: Extra


class _Object(NamedTuple):
    corners: list[float]
    number: int
    """Its category id."""
    record: int
    extra: Extra


def _records(value: Any, table: str, place: Place) -> Iterator[tuple[int, dict[str, Any]]]:
    if not isinstance(value, list):
        place.error("bad-record", f"'{table}' is {shown(value)}; expected a list")
        return
    for i, record in enumerate(value):
        if isinstance(record, dict):
            yield i, record
        else:
            place.error("bad-record", f"expected an object, found {shown(record)}", f"{table}[{i}]", i)


def _read_images(value: Any, place: Place) -> list[_Image]:
    images: list[_Image] = []
    first: dict[int | str, int] = {}
    for i, record in _records(value, "images", place):
        at = f"images[{i}]"
        number, name = record.get("id"), record.get("file_name")
        if not isinstance(number, (int, str)):
            place.error("bad-id", f"'id' is {shown(number)}; expected a number or a string", at, i)
        elif first.setdefault(number, i) != i:
            place.error("duplicate-id", f"id {shown(number)} is there already, in images[{first[number]}]", at, i)
        elif not isinstance(name, str) or not name:
            place.error("no-file-name", f"'file_name' is {shown(name)}", at, i)
        elif leaves(name):
            place.error("outside-folder", f"file_name {name!r} leads out of the image folder", at, i)
        else:
            size = side(record.get("width")), side(record.get("height"))
            extra = place.keep({key: item for key, item in record.items() if key not in _IMAGE_KEYS}, at)
            images.append(
                _Image(number, posixpath.normpath(name.replace("\\", "/")), size if all(size) else (0, 0), extra)
            )
    return images


def _read_objects(value: Any, images: set[int | str], place: Place) -> dict[int | str, list[_Object]]:
    """Return the objects of each image that has some."""
    objects: dict[int | str, list[_Object]] = {}
    for i, record in _records(value, "annotations", place):
        at = f"annotations[{i}]"
        image, number, box = (record.get(key) for key in ("image_id", "category_id", "bbox"))
        if not isinstance(image, (int, str)) or image not in images:
            place.error("unknown-image", f"image_id {shown(image)} is the id of no image that can be read", at, i)
        elif not is_id(number):
            place.error("bad-id", f"'category_id' is {shown(number)}; expected a whole number from 0", at, i)
        elif not is_box(box):
            place.error("bad-box", f"'bbox' is {shown(box)}; expected [xmin, ymin, xmax, ymax]", at, i)
        else:
            extra = place.keep({key: item for key, item in record.items() if key not in _BOX_KEYS}, at)
            objects.setdefault(image, []).append(_Object(box, number, i, extra))
    return objects


def _first_id(numbers: set[int], classes: int, file: Path) -> int:
    """Return the category id of the first class: 0, unless only ids from 1 to the number of classes fit."""
    if not numbers or min(numbers) == 0 or max(numbers) > classes:
        return 0  # an id beyond the names is an error of its own
    first = int(max(numbers) == classes)
    why = "so they are taken as counted from 1" if first else "and are taken as counted from 0"
    warnings.warn(
        f"{file}: category ids {min(numbers)} to {max(numbers)} occur for {classes} class names, {why}; "
        f"first_id={first} says so for good, first_id={1 - first} the other",
        DetkitWarning,
        stacklevel=3,
    )
    return first


def _has_width_and_height(data: Dataset) -> Flags:
    """Return which boxes make no sense as corners; none where they do not as COCO's ``[x, y, width, height]``, too."""
    width, height = np.repeat(data.sizes, data.boxes_per_image(), axis=0).T
    x, y, a, b = data.boxes.T
    inverted = (a < x) | (b < y)
    fits = (a >= 0) & (b >= 0) & (x + a <= width + _TOLERANCE_PX) & (y + b <= height + _TOLERANCE_PX)
    likely = inverted.any() and fits[inverted].all() and fits.mean() >= _MOST
    return np.asarray(inverted & likely)


def _refuse_width_and_height(data: Dataset, place: Place) -> None:
    inverted = _has_width_and_height(data)
    if not inverted.any():
        return
    example = int(data.records[np.flatnonzero(inverted)[0]])
    place.error(
        "not-corners",
        f"{int(inverted.sum())} of {len(data.boxes)} boxes have their corners swapped, and lie in their images as "
        "[x, y, width, height], which is COCO's. JumpStart wants [xmin, ymin, xmax, ymax] and would learn nothing. "
        "give the file COCO's 'categories', then `detkit convert DATA OUT --from coco --to jumpstart` writes corners",
        f"annotations[{example}]",
        example,
    )


FORMAT = Format(
    name="jumpstart",
    summary="SageMaker JumpStart object detection: images/ and annotations.json with corners and no categories",
    sniff=sniff,
    read=read,
    write=write,
    options=JumpStartOptions,
    carries=frozenset({"image_ids", "classes"}),
)
