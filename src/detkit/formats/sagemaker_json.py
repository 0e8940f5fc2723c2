"""What SageMaker's built-in object detection takes as image and JSON: folders ``train`` and ``train_annotation``.

One JSON file for each image, of the same stem; boxes are left, top, width, height in pixels. Each pair of folders is a
split. ``categories`` may be missing; then the names come from ``classes.txt`` or the user, never from nowhere.
"""

from __future__ import annotations

import posixpath
import warnings
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from detkit import images
from detkit.errors import DetkitWarning, InvalidData
from detkit.files import inside
from detkit.formats import Format
from detkit.formats.imagefiles import folder_of, is_file, leaves, place_images, require_finite, stem
from detkit.formats.jsonrecords import (
    ClassIds,
    Place,
    annotations_of,
    image_size_of,
    is_id,
    shown,
    size_of,
)
from detkit.formats.rows import CLASS_FILE, Rows, read_class_names
from detkit.formats.splits import join, parts
from detkit.images import list_images
from detkit.params import Options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detkit.data import Dataset
    from detkit.formats.findings import Finding

_SUFFIX = "_annotation"
_ENDINGS = (".jpg", ".jpeg", ".png")
"""What the algorithm decodes."""
_KEYS = frozenset({"file", "image_size", "annotations", "categories"})
_SNIFFED = 1 << 20
"""Bytes of a JSON file that are looked into for its format."""


class SageMakerJsonOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to read SageMaker's image and JSON."""

    classes: Annotated[
        tuple[str, ...],
        Meta(description="class names in order of their ids, where no categories tell; those of classes.txt if absent"),
    ] = ()
    unannotated: Annotated[
        Literal["raise", "negatives", "ignore"], Meta(description="what an image without a JSON file means")
    ] = "raise"


@dataclass(frozen=True)
class _Channel:
    """A folder of images and the one with their JSON files."""

    name: str
    images: Path
    annotations: Path
    files: list[Path]


def sniff(path: Path) -> bool:
    """Return whether a folder holds a folder of JSON files that have ``file`` and ``annotations``."""
    return any(_is_record(channel.files[0]) for channel in _channels(path) if channel.files)


def read(path: Path, options: SageMakerJsonOptions) -> Dataset:
    """Read every JSON file of every pair of folders; each pair is a split, classes are matched by name.

    Raises one `InvalidData` with everything that is wrong in all of them.
    """
    channels = _channels(path)
    if not channels:
        raise InvalidData(f"{path}: no folder of JSON files; expected train/ and train_annotation/, one JSON an image")
    findings: list[Finding] = []
    ids = ClassIds()
    read = [_read_channel(channel, path, ids, options.unannotated, findings) for channel in channels]
    if options.classes or not ids:
        needed = ids.largest >= 0 or options.classes or (path / CLASS_FILE).is_file()
        what = "SageMaker's JSON without 'categories'"
        names = read_class_names(path, options.classes, what, largest=ids.largest) if needed else ()
        for number, name in enumerate(names):
            ids.add(number, name, Place(findings, str(path)), "classes", "classes" if options.classes else CLASS_FILE)
    found = [(channel.name, ids.named(data, findings)) for channel, data in zip(channels, read, strict=True)]
    if _share_a_name(read):
        found = [
            (name, replace(part, image_ids=tuple(f"{name}/{image_id}" for image_id in part.image_ids)))
            for name, part in found
        ]
    return join(found, findings)


def write(data: Dataset, folder: Path, _options: Options) -> None:
    """Write ``train/`` and ``train_annotation/``, or such a pair for each split the data came with.

    Raises `InvalidData` for images that are neither JPEG nor PNG, two that would share a JSON file, a split's name that
    is that of another's annotations, and boxes that are not finite.
    """
    require_finite(data)
    _require_names(data)
    names = [name for name in data.split_indices if name.endswith(_SUFFIX)]
    if names:
        raise InvalidData(f"a split cannot be called {names[0]!r}, like the folder of a split's annotations; rename it")
    categories = [{"class_id": number, "name": name} for number, name in enumerate(data.classes)]
    for split, part in parts(data).items():
        images, annotations = folder / (split or "train"), folder / f"{split or 'train'}{_SUFFIX}"
        images.mkdir()
        annotations.mkdir()
        place_images(part, images)
        for i, image_id in enumerate(part.image_ids):
            record = {
                "file": image_id,
                "image_size": image_size_of(part, i),
                "annotations": annotations_of(part, i),
                "categories": categories,
            }
            target = annotations / inside(f"{stem(image_id)}.json")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(msgspec.json.encode(record))


def _require_names(data: Dataset) -> None:
    first: dict[str, str] = {}
    for image_id in data.image_ids:
        inside(image_id)
        if not image_id.lower().endswith(_ENDINGS):
            raise InvalidData(
                f"image {image_id!r}: SageMaker's object detection takes {', '.join(_ENDINGS)} only; "
                "convert the images to one of these first"
            )
        other = first.setdefault(stem(image_id), image_id)
        if other != image_id:
            raise InvalidData(f"images {other!r} and {image_id!r} would share one JSON file; rename one of them")


def _channels(path: Path) -> list[_Channel]:
    """Return every pair of folders called alike; else the one folder of JSON files and its images."""
    if not path.is_dir():
        return []
    folders = {entry.name: entry for entry in sorted(path.iterdir()) if entry.is_dir() and entry.name[:1] != "."}
    pairs = [name for name in folders if name.endswith(_SUFFIX) and name.removesuffix(_SUFFIX) in folders]
    if pairs:
        names = [(name.removesuffix(_SUFFIX), folders[name]) for name in pairs]
        return [_Channel(name, folders[name], folder, _json_files(folder)) for name, folder in names]
    for folder in folders.values():
        files = _json_files(folder) if any(map(_is_record, islice(folder.glob("*.json"), 1))) else []
        if files:
            return [_Channel("", path, folder, files)]
    return []


def _json_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*.json") if file.is_file() and not file.name.startswith("."))


def _is_record(file: Path) -> bool:
    with file.open("rb") as stream:
        beginning = stream.read(_SNIFFED)
    return all(key in beginning for key in (b'"file"', b'"annotations"', b'"image_size"'))


def _read_channel(channel: _Channel, root: Path, ids: ClassIds, unannotated: str, findings: list[Finding]) -> Dataset:
    records = []
    for file in channel.files:
        place = Place(findings, str(file))
        record = place.decode(file.read_bytes())
        name = record.get("file") if record is not None else None
        if record is None:
            continue
        if not isinstance(name, str) or not name:
            place.error("no-file-name", f"'file' is {shown(name)}; expected the image's path in its folder")
        elif leaves(name):
            place.error("outside-folder", f"'file' {name!r} leads out of the image folder")
        elif not name.lower().endswith(_ENDINGS):
            place.error("image-type", f"'file' {name!r}: SageMaker's object detection takes {', '.join(_ENDINGS)} only")
        else:
            records.append((posixpath.normpath(name.replace("\\", "/")), record, place))
    names = [name for name, _, _ in records]
    beside = [] if channel.name else [root / "images", *(f for f in sorted(root.iterdir()) if f != channel.annotations)]
    folder = folder_of(names, [channel.images, *beside, root])
    _warn_of_other_stems(channel, records)
    rows = Rows(findings)
    for name, record, place in records:
        _read_categories(record.get("categories"), ids, place)
        extra = place.keep({key: value for key, value in record.items() if key not in _KEYS})
        size = size_of(record.get("image_size"))
        rows.add_image(name, f"{folder}/{name}", source=place.file, size=size, extra=extra)
        for i, number, corners, more in place.boxes(record.get("annotations")):
            rows.add_box(corners, ids.position(number), i, extra=place.keep(more, f"annotations[{i}]"))
    if unannotated != "ignore":
        known = set(names)
        for image in list_images(folder):
            name = image.relative_to(folder).as_posix()
            if name in known or image.is_relative_to(channel.annotations):
                continue
            if unannotated == "negatives":
                rows.add_image(name, f"{folder}/{name}", source="")
                continue
            message = (
                "has no JSON file. in Python, read_dataset(..., unannotated='negatives') says that nothing is on it, "
                "unannotated='ignore' leaves it out"
            )
            Place(findings, str(image)).error("unannotated", message)
    return rows.dataset(ids.positions)


def _read_categories(categories: Any, ids: ClassIds, place: Place) -> None:
    if categories is None:
        return
    if not isinstance(categories, list):
        place.error("bad-record", f"'categories' is {shown(categories)}; expected a list")
        return
    for i, category in enumerate(categories):
        at = f"categories[{i}]"
        if isinstance(category, dict) and is_id(category.get("class_id")):
            ids.add(category["class_id"], category.get("name"), place, at, f"{place.file}: {at}")
        else:
            place.error("bad-id", f"expected a 'class_id' that is a whole number from 0, found {shown(category)}", at)


def _warn_of_other_stems(channel: _Channel, records: Sequence[tuple[str, Any, Place]]) -> None:
    other = [
        f"{place.file} is about {name}"
        for name, _, place in records
        if Path(place.file).stem != posixpath.basename(stem(name))
    ]
    if other:
        warnings.warn(
            f"{channel.annotations}: {len(other)} JSON files are called unlike their image, by whose name SageMaker "
            f"finds them: {'; '.join(other[:3])}",
            DetkitWarning,
            stacklevel=4,
        )


def _share_a_name(parts: Sequence[Dataset]) -> bool:
    """Return whether images of two folders are called alike and are different pictures."""
    first: dict[str, str] = {}
    for part in parts:
        for image_id, path in zip(part.image_ids, part.paths, strict=True):
            other = first.setdefault(image_id, path)
            if other != path and is_file(other) and is_file(path) and not _same_picture(other, path):
                return True
    return False


def _same_picture(one: str, other: str) -> bool:
    return Path(one).samefile(other) or images.read_bytes(one) == images.read_bytes(other)


FORMAT = Format(
    name="sagemaker-json",
    summary="SageMaker built-in object detection: train/ and train_annotation/ with one JSON file an image",
    sniff=sniff,
    read=read,
    write=write,
    options=SageMakerJsonOptions,
    carries=frozenset({"image_ids", "classes", "split_indices"}),
)
