"""The columns of a data set: put one after another, and as a file."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detkit.data import Dataset
from detkit.errors import DetkitWarning
from detkit.numbering import has_ids, spelled_out_alike, with_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detkit.data import Extra

ARRAYS = ("sizes", "offsets", "boxes", "labels", "difficult", "crowd", "area", "records")
"""Columns that are arrays; `Dataset.box_ids` is one more where there is one."""
_TEXTS = ("classes", "image_ids", "sources", "masks", "extra", "box_extra", "class_extra", "file_extra")
_NO_EXTRA: Extra = {}
_SHOWN = 3


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    """Put data sets with the same class names one after another, without splits. Raises `InvalidData` for an image id
    that is there twice.

    Of what two of them say differently of one class, what the first says counts, with a warning; what they say of one
    file is taken from the first.
    """
    parts = _with_box_ids(spelled_out_alike(parts))

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
        class_extra=_class_extra(parts),
        file_extra=of_files,
        box_ids=None if parts[0].box_ids is None else np.concatenate([part.box_ids for part in parts]),
        numbered=all(part.numbered for part in parts),
        **arrays,
    )


def _with_box_ids(parts: Sequence[Dataset]) -> list[Dataset]:
    """Return the parts with numbers as ids of all their boxes, the next ones for those without, or of none.

    Where some have text, numbers are kept as text is, in ``box_extra``.
    """
    known = [part.box_ids for part in parts if part.box_ids is not None]
    following = max((int(ids.max()) for ids in known if len(ids)), default=0) + 1
    count = sum(len(part.boxes) for part in parts)
    if not known:
        return list(parts)
    if any(has_ids(part.box_extra) for part in parts) or following + count > np.iinfo(np.int64).max:
        return [
            replace(part, box_extra=with_ids(part.box_extra, part.box_ids), box_ids=None)
            if part.box_ids is not None
            else part
            for part in parts
        ]
    found = []
    for part in parts:
        ids = part.box_ids
        if ids is None:
            ids = np.arange(following, following + len(part.boxes))
            following += len(part.boxes)
        found.append(replace(part, box_ids=ids))
    return found


def _class_extra(parts: Sequence[Dataset]) -> tuple[Extra, ...] | None:
    said = [part for part in parts if part.class_extra is not None]
    found: list[dict[str, Any]] = [{} for _ in parts[0].classes]
    differing = []
    for part in said:
        for name, extra, all_extra in zip(part.classes, part.class_extra or (), found, strict=True):
            for key, value in extra.items():
                first = all_extra.setdefault(key, value)
                if first != value:
                    source = part.sources[0] if part.sources else "another file"
                    differing.append(f"{key!r} of class {name!r} is {value!r} in {source}, and {first!r} before")
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        message = f"files say different things of one class: {'; '.join(differing[:_SHOWN])}{more}. the first counts"
        warnings.warn(message, DetkitWarning, stacklevel=4)
    return tuple(found) if said else None


def save_columns(data: Dataset, file: Any, places: Sequence[str]) -> None:
    """Write every column but `paths` to an open ``.npz`` file; nothing is pickled.

    ``places`` take the place of the paths: where each image lies, relative to a folder.
    """
    columns: dict[str, Any] = {name: getattr(data, name) for name in ARRAYS}
    if data.box_ids is not None:
        columns["box_ids"] = data.box_ids
    if data.numbered:
        columns["numbered"] = True
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
        numbered = "numbered" in columns
        texts = {name: json.loads(columns[name].tobytes()) for name in (*_TEXTS, "places") if name in columns}
    places = texts.pop("places", None) or [f"images/{image_id}" for image_id in texts["image_ids"]]
    of_files = texts.pop("file_extra", {})
    lists: dict[str, Any] = {name: None if value is None else tuple(value) for name, value in texts.items()}
    paths = tuple(f"{root}/{place}" for place in places)
    return Dataset(paths=paths, file_extra=of_files, numbered=numbered, **lists, **arrays)


def _as_bytes(value: Any) -> Any:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
