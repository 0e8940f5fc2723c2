"""COCO detection JSON: one file, or one for each split.

Ids of any kind are read (from 0, from 1, with gaps, strings) and written as 1..n. Unknown keys of images and
annotations are kept; ``info``, ``licenses`` and the other keys of categories are not. ``area`` is the object's, so
that of its mask where there is one. A VOC "difficult" flag travels as ``"difficult": 1``.
"""

from __future__ import annotations

import mmap
import re
from itertools import repeat
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from detkit.boxes import xyxy_to_xywh
from detkit.data import Dataset, Extra
from detkit.errors import InvalidData
from detkit.files import inside
from detkit.formats import Format
from detkit.formats.cococolumns import KNOWN, KNOWN_OF_IMAGE
from detkit.formats.cocojson import CocoFile
from detkit.formats.findings import Finding
from detkit.formats.imagefiles import folder_of, place_images, require_finite
from detkit.formats.splits import SPLIT_FOLDERS, join, parts, split_names
from detkit.params import Options

if TYPE_CHECKING:
    from pathlib import Path

_OTHER_TASKS = ("captions_", "person_keypoints_", "image_info_")
"""How the names of files begin that COCO puts beside its detection files, about the same images."""
_NO_EXTRA: Extra = {}
_MOST_FILES = 64
"""A folder with more JSON files than this is something else, such as LabelMe."""


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
    """Return COCO's JSON object: categories 1..K in class order, images 1..n, annotations 1..m.

    Raises `InvalidData` where a box is not finite.
    """
    require_finite(data)
    images: list[dict[str, Any]] = [
        {"id": i, "file_name": name, "width": width, "height": height}
        for i, (name, (width, height)) in enumerate(zip(data.image_ids, data.sizes.tolist(), strict=True), start=1)
    ]
    if data.extra is not None:
        images = [{**extra, **image} for extra, image in zip(data.extra, images, strict=True)]
    owner = np.repeat(np.arange(1, len(data) + 1), data.boxes_per_image())
    annotations: list[dict[str, Any]] = [
        {**extra, "id": i, "image_id": image, "category_id": label, "bbox": bbox, "area": area, "iscrowd": crowd}
        for i, (extra, image, label, bbox, area, crowd) in enumerate(
            zip(
                data.box_extra if data.box_extra is not None else repeat(_NO_EXTRA, len(owner)),
                owner.tolist(),
                (data.labels + 1).tolist(),
                _numbers(xyxy_to_xywh(data.boxes)),
                _numbers(data.area),
                data.crowd.astype(int).tolist(),
                strict=True,
            ),
            start=1,
        )
    ]
    if data.masks is not None:
        for annotation, mask in zip(annotations, data.masks, strict=True):
            if mask is not None:
                annotation["segmentation"] = mask
    for row in np.flatnonzero(data.difficult).tolist():
        annotations[row]["difficult"] = 1
    categories = [{"id": i, "name": name} for i, name in enumerate(data.classes, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(data: Dataset, folder: Path, _options: Options) -> None:
    """Write ``images/`` and ``annotations.json``, or ``annotations/<split>.json`` where the data came split."""
    contents = {f"annotations/{name}.json" if name else "annotations.json": part for name, part in parts(data).items()}
    encoded = {name: msgspec.json.encode(to_coco(part)) for name, part in contents.items()}
    place_images(data, folder / "images")
    for name, content in encoded.items():
        target = folder / inside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


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
    files = [file for file in files if _is_coco(file)] if len(files) <= _MOST_FILES else []
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
        folder = root / given
        if not folder.is_dir():
            raise InvalidData(
                f"read_dataset(..., images={given!r}): there is no folder {folder}; it is looked for from {root}"
            )
        return folder
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
    carries_key=lambda key, _: key not in KNOWN,
    carries_image_key=lambda key, _: key not in KNOWN_OF_IMAGE,
    carries=frozenset(
        {"image_ids", "classes", "difficult", "crowd", "area", "masks", "extra", "box_extra", "split_indices"}
    ),
)
