"""The columns of a data set: put one after another, and as a file."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detkit.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detkit.data import Extra, Indices

ARRAYS = ("sizes", "offsets", "boxes", "labels", "difficult", "crowd", "area", "records")
"""Columns that are arrays; `Dataset.box_ids` is one more where there is one."""
_TEXTS = ("classes", "image_ids", "sources", "masks", "extra", "box_extra", "class_extra", "file_extra")
_NO_EXTRA: Extra = {}


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    """Put data sets with the same class names one after another, without splits. Raises `InvalidData` for an image id
    that is there twice.

    What two of them say of one class, or of one file, is taken from the first that says anything.
    """

    def text(name: str, blank: Any, length: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        if all(column is None for column in columns):
            return None
        return tuple(
            value
            for part, column in zip(parts, columns, strict=True)
            for value in (column if column is not None else (blank,) * len(getattr(part, length)))
        )

    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS if name != "offsets"
    }
    counts = np.concatenate([part.boxes_per_image() for part in parts])
    of_classes = [part.class_extra for part in parts if part.class_extra is not None]
    of_files: dict[str, Extra] = {}
    for source, extra in chain.from_iterable(part.file_extra.items() for part in parts):
        of_files.setdefault(source, extra)
    return Dataset(
        classes=parts[0].classes,
        image_ids=text("image_ids", "", "paths"),
        paths=text("paths", "", "paths"),
        sources=text("sources", "", "paths"),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        masks=text("masks", None, "labels"),
        extra=text("extra", _NO_EXTRA, "paths"),
        box_extra=text("box_extra", _NO_EXTRA, "labels"),
        class_extra=tuple(next(filter(None, column), _NO_EXTRA) for column in zip(*of_classes, strict=True))
        if of_classes
        else None,
        file_extra=of_files,
        box_ids=_box_ids(parts),
        **arrays,
    )


def _box_ids(parts: Sequence[Dataset]) -> Indices | None:
    if all(part.box_ids is None for part in parts):
        return None
    return np.concatenate([np.arange(len(p.boxes)) + 1 if p.box_ids is None else p.box_ids for p in parts])


def save_columns(data: Dataset, file: Any, places: Sequence[str]) -> None:
    """Write every column but `paths` to an open ``.npz`` file; nothing is pickled.

    ``places`` take the place of the paths: where each image lies, relative to a folder.
    """
    columns: dict[str, Any] = {name: getattr(data, name) for name in ARRAYS}
    if data.box_ids is not None:
        columns["box_ids"] = data.box_ids
    for name in _TEXTS:
        columns[name] = _as_bytes(getattr(data, name))
    np.savez(file, places=_as_bytes(list(places)), **columns)


def load_columns(file: Path, root: Path) -> Dataset:
    """Read what `save_columns` wrote; ``root`` is the folder that the images' places begin in.

    Files of detkit 0.1 have no places; their images lie in ``images/`` under their ids.
    """
    with np.load(file, allow_pickle=False) as columns:
        present = [*ARRAYS, *(["box_ids"] if "box_ids" in columns else [])]
        arrays = {name: columns[name] for name in present}
        texts = {name: json.loads(columns[name].tobytes()) for name in (*_TEXTS, "places") if name in columns}
    places = texts.pop("places", None) or [f"images/{image_id}" for image_id in texts["image_ids"]]
    of_files = texts.pop("file_extra", {})
    lists: dict[str, Any] = {name: None if value is None else tuple(value) for name, value in texts.items()}
    return Dataset(paths=tuple(f"{root}/{place}" for place in places), file_extra=of_files, **lists, **arrays)


def _as_bytes(value: Any) -> Any:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
