"""Making one data set out of others: merged, sampled, with other class names. Nothing is read or written here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from detkit import numbering
from detkit.columns import concatenate
from detkit.data import Dataset
from detkit.errors import InvalidValue, UnknownName, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from detkit.data import Indices

_SHOWN = 3


def merge(data: Sequence[Dataset], *, prefixes: Sequence[str] | None = None) -> Dataset:
    """Return all images of several data sets, classes matched by name, splits of one name put together.

    Image ids have to differ; ``prefixes``, one for each data set, become a folder before its ids. Where only some data
    sets came split, the images of the others are in no split. Raises `UsageError` for an id that is there twice.
    """
    if not data:
        raise UsageError("nothing to merge; give at least one data set")
    if prefixes is not None:
        if len(prefixes) != len(data) or len(set(prefixes)) != len(prefixes):
            raise InvalidValue("prefixes", list(prefixes), f"{len(data)} different names, one for each data set")
        data = [_under(part, prefix) for part, prefix in zip(data, prefixes, strict=True)]
    first: dict[str, int] = {}
    twice = [name for i, part in enumerate(data) for name in part.image_ids if first.setdefault(name, i) != i]
    if twice:
        raise UsageError(
            f"{len(twice)} image ids are in more than one of the data sets, for example "
            f"{', '.join(twice[:_SHOWN])}; leave one of them out, or tell them apart with prefixes= (--prefix-names)"
        )
    classes = tuple(dict.fromkeys(name for part in data for name in part.classes))
    starts = np.cumsum([0, *(len(part) for part in data)])
    splits: dict[str, list[Indices]] = {}
    for part, start in zip(data, starts, strict=False):
        for name, at in part.split_indices.items():
            splits.setdefault(name, []).append(at + start)
    merged = concatenate([part.with_classes(classes) for part in data])
    return replace(merged, split_indices={name: np.concatenate(at) for name, at in splits.items()})


def _under(data: Dataset, prefix: str) -> Dataset:
    if not prefix or PurePosixPath(prefix).name != prefix or prefix == "..":
        raise InvalidValue("prefixes", prefix, "a name that a folder can have")
    return replace(data, image_ids=tuple(f"{prefix}/{image_id}" for image_id in data.image_ids))


def sample(data: Dataset, size: float, *, seed: int = 0) -> Dataset:
    """Return some of the images, in their order: ``size`` of them, or that share of them where it is below 1.

    Each class keeps its share of boxes as nearly as possible; images stay in the splits they were in.
    """
    wanted = size * len(data) if 0 < size < 1 else size
    number = round(wanted) if 0 < wanted <= len(data) else 0
    if number < 1 or not (0 < size < 1 or number == size):
        raise InvalidValue("size", size, f"a number of images from 1 to {len(data)}, or a share between 0 and 1")
    if number == len(data):
        return data
    share = number / len(data)
    chosen, _ = data.split_positions(share, 1 - share, seed=seed)
    return data.take(chosen, keep_splits=True)


def remap(data: Dataset, names: Mapping[str, str], *, drop: Iterable[str] = ()) -> Dataset:
    """Return the data with classes renamed, those that get the same name merged, and the boxes of some left out.

    ``names`` maps present names to new ones, and may swap them; a class that gets the name of one that stays takes its
    place, its id and whatever else the file says of it. ``drop`` lists classes whose boxes go; images stay,
    also without a box. Raises `UnknownName` for a class that is not in the data, `UsageError` for one that is in both.
    """
    dropped = tuple(drop)
    for name in (*names, *dropped):
        if name not in data.classes:
            raise UnknownName("class", name, data.classes)
        if name in names and name in dropped:
            raise UsageError(f"class {name!r} is both renamed and dropped; choose one")
    for new in names.values():
        if not new.strip():
            raise InvalidValue("names", dict(names), "a class name that is not empty")
    renamed = {name: names.get(name, name) for name in data.classes if name not in dropped}
    origin: dict[str, int] = {}
    """Of each new class, the present one whose place it takes, and what the file says of it."""
    for i, name in enumerate(data.classes):
        if name in renamed and (renamed[name] == name or renamed[name] not in origin):
            origin[renamed[name]] = i
    classes = tuple(sorted(origin, key=origin.__getitem__))
    if dropped:
        data = data.keep_boxes(~np.isin(data.labels, [data.classes.index(name) for name in dropped]))
    table = np.array([classes.index(renamed[n]) if n in renamed else -1 for n in data.classes], dtype=np.int64)
    extra = data.class_extra if len(classes) == len(data.classes) else numbering.class_extra(data)
    kept = None if extra is None else tuple(extra[origin[name]] for name in classes)
    return replace(data, classes=classes, labels=table[data.labels], class_extra=kept)
