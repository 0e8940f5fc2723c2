"""Splits as files: one annotation file for each, named after it, all about one set of images and classes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from detkit.columns import concatenate
from detkit.data import Dataset
from detkit.errors import InvalidData
from detkit.formats.findings import Finding, raise_errors

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from detkit.data import Indices

UNSPLIT = "unsplit"
"""Name of the file with the images of no split; it is not a split itself."""

SPLIT_FOLDERS = frozenset({"train", "val", "valid", "validation", "test", "trainval"})
"""Folder names, in lower case, that mean a split."""


def split_names(stems: Sequence[str]) -> list[str]:
    """Return short names, ``train`` for ``instances_train2017``, or the files' own where two would be alike."""
    short = [_split_name(stem) for stem in stems]
    return short if len(set(short)) == len(short) else list(stems)


def _split_name(stem: str) -> str:
    name = re.sub(r"[_.]?annotations(\.coco)?$", "", stem)
    name = re.sub(r"^annotations[_-]", "", name)
    if name.startswith("instances_"):
        name = re.sub(r"(?<=\D)(19|20)\d\d$", "", name.removeprefix("instances_"))
    return name.strip("_-. ") or "annotations"


def containers(splits: Mapping[str, Indices]) -> set[str]:
    """Return the splits that only put others together, as trainval does train and val."""
    members = {name: frozenset(at.tolist()) for name, at in splits.items()}
    found: set[str] = set()
    for name, whole in members.items():
        inner = [other for key, other in members.items() if key != name and other < whole]
        if inner and frozenset().union(*inner) == whole:
            found.add(name)
    return found


def require_split_names(data: Dataset) -> None:
    """Raise `InvalidData` where a split's name cannot be that of a file that is read back under the same name."""
    for name in data.split_indices:
        if not name or name.startswith(".") or any(sign in name for sign in "/\\\0"):
            raise InvalidData(f"a split cannot be called {name!r}, as it becomes the name of a file; rename it")
        if name == UNSPLIT:
            raise InvalidData(f"a split cannot be called {name!r}, the name of what is in no split; rename it")
    for name, back in zip(data.split_indices, split_names([*data.split_indices, UNSPLIT]), strict=False):
        if name != back:
            raise InvalidData(f"a split {name!r} would be read back as {back!r}; rename it")


def parts(data: Dataset, *, leave_out: Collection[str] = ()) -> dict[str, Dataset]:
    """Return what goes into each file: each split, and what is in none; everything under ``""`` where there are none.

    Splits to ``leave_out`` are those whose images are in others, too. A single file would be read as data without
    splits, so there are always two. Raises `InvalidData` for a split whose name cannot be that of a file.
    """
    if not data.split_indices:
        return {"": data}
    require_split_names(data)
    found = {name: part for name, part in data.splits.items() if name not in leave_out}
    rest = np.setdiff1d(np.arange(len(data)), np.concatenate(list(data.split_indices.values())))
    if len(rest) or len(found) == 1:
        found[UNSPLIT] = data.take(rest)
    return found


def join(named: Sequence[tuple[str, Dataset]], findings: Iterable[Finding] = ()) -> Dataset:
    """Put the files of several splits together; an image that is in more than one must be annotated alike.

    ``findings`` are those of reading the files. Raises one `InvalidData` where there is an error, with the data without
    what is at fault; then images may differ because of what is missing, and are not compared.
    """
    known = list(dict.fromkeys(findings))  # an image in two files is read twice
    joined, differing = _join(named)
    raise_errors(known, partial=joined)
    raise_errors(differing, "keep the image in one file, or with the same annotations in all", joined)
    if joined is None:
        raise InvalidData("nothing was read; is it the right folder?")
    return joined


def _join(named: Sequence[tuple[str, Dataset]]) -> tuple[Dataset | None, list[Finding]]:
    """Return the data in one, where there is any, and each image that is annotated in two ways."""
    if len(named) <= 1:
        return (named[0][1] if named else None), []
    classes = tuple(dict.fromkeys(name for _, part in named for name in part.classes))
    index: dict[str, int] = {}
    kept: list[Dataset] = []
    splits: dict[str, list[int]] = {}
    findings = []
    first: dict[str, tuple[Dataset, int]] = {}
    for split, narrow in named:
        part = narrow.with_classes(classes)
        new = []
        for i, image_id in enumerate(part.image_ids):
            if image_id not in index:
                index[image_id] = len(index)
                first[image_id] = (part, i)
                new.append(i)
            elif not _alike(*first[image_id], part, i):
                other, j = first[image_id]
                message = f"its annotations differ from those in {other.sources[j]}"
                findings.append(
                    Finding(
                        code="image-twice",
                        severity="error",
                        image=i,
                        file=part.sources[i],
                        place=image_id,
                        message=message,
                    )
                )
        kept.append(part if len(new) == len(part) else part.take(new))
        if split != UNSPLIT:
            splits[split] = [index[image_id] for image_id in part.image_ids]
    joined = concatenate(kept)
    joined = replace(joined, split_indices={name: np.array(at, dtype=np.int64) for name, at in splits.items()})
    return joined, findings


def _alike(a: Dataset, i: int, b: Dataset, j: int) -> bool:
    one, other = a[i], b[j]
    same = one.names == other.names and one.masks == other.masks and one.box_extra == other.box_extra
    columns = ("boxes", "difficult", "crowd", "area")
    return same and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in columns)
