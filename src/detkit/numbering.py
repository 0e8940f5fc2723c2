"""Ids that only follow from a file's order: 1, 2, 3 ..., as most COCO files have them.

`Dataset.numbered` says so for all of them and costs nothing: that of an image is its place among those of its file,
that of a class its place, that of a box its record's. Where the order tells them no longer, as images or classes are
left out or other data is put beside, they are written out, to be kept as ids of any other kind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from detkit.data import Dataset, Extra, Indices

_NO_EXTRA: Extra = {}


def has_ids(column: Iterable[Extra] | None) -> bool:
    """Return whether any record has an id that is kept."""
    return any("id" in extra for extra in column or ())


def with_ids(column: Sequence[Extra] | None, ids: Indices) -> tuple[Extra, ...]:
    """Return what is kept of each record with its id; one that is there stays."""
    known = column if column is not None else (_NO_EXTRA,) * len(ids)
    return tuple({"id": i, **extra} for i, extra in zip(ids.tolist(), known, strict=True))


def image_numbers(sources: Sequence[str]) -> Indices:
    """Return the number of each image among those of its file, counted from 1."""
    if len(set(sources)) <= 1:
        return np.arange(1, len(sources) + 1)
    last = dict.fromkeys(sources, 0)
    numbers = np.empty(len(sources), dtype=np.int64)
    for i, source in enumerate(sources):
        last[source] = numbers[i] = last[source] + 1
    return numbers


def image_extra(data: Dataset, chosen: Indices) -> tuple[Extra, ...] | None:
    """Return ``extra`` of some images, with their ids where these no longer follow from the order."""
    extra = None if data.extra is None else tuple(data.extra[i] for i in chosen)
    if not data.numbered or has_ids(extra):
        return extra
    numbers = data.image_numbers[chosen]
    now = image_numbers([data.sources[i] for i in chosen])
    return extra if np.array_equal(numbers, now) else with_ids(extra, numbers)


def class_extra(data: Dataset) -> tuple[Extra, ...] | None:
    """Return ``class_extra`` with the ids of all classes."""
    if not data.numbered or has_ids(data.class_extra):
        return data.class_extra
    return with_ids(data.class_extra, np.arange(1, len(data.classes) + 1))


def spelled_out(data: Dataset, *, images: bool = True, boxes: bool = True, classes: bool = True) -> Dataset:
    """Return the same data with all ids kept that only follow from the order, of what is asked for."""
    if not data.numbered:
        return data
    changes: dict[str, Any] = {}
    if images and not has_ids(data.extra):
        changes["extra"] = with_ids(data.extra, data.image_numbers)
    if boxes and data.box_ids is None and not has_ids(data.box_extra):
        changes["box_ids"] = data.records + 1
    if classes:
        changes["class_extra"] = class_extra(data)
    return replace(data, **changes) if changes else data


def spelled_out_alike(parts: Sequence[Dataset]) -> list[Dataset]:
    """Return data sets with all ids of a kind kept where any of them has some, or gives none at all; those of images
    also where two parts have images of one file."""
    some = not all(part.numbered for part in parts)
    files = [set(part.sources) for part in parts]
    shared = len(set().union(*files)) < sum(map(len, files))
    images = some or shared or any(has_ids(part.extra) for part in parts)
    boxes = some or any(part.box_ids is not None or has_ids(part.box_extra) for part in parts)
    classes = some or any(has_ids(part.class_extra) for part in parts)
    return [spelled_out(part, images=images, boxes=boxes, classes=classes) for part in parts]
