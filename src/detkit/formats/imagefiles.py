"""The image files that annotations name: kept inside one folder, looked into with threads, placed when written."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

import numpy as np

from detkit.errors import ImageError, InvalidData
from detkit.files import inside
from detkit.images import Header, file_of, place_image, read_header
from detkit.progress import track
from detkit.remote import is_remote

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from detkit.data import Dataset

LARGEST_SIDE = 2**31
"""Pixels; a larger number in an annotation is no size."""

_THREADS = 8
"""Enough to hide a network disk's latency; decoding headers itself is serial in Python."""


def leaves(name: str) -> bool:
    """Return whether a file name found in an annotation would lead out of the image folder.

    >>> leaves("sub/a.jpg"), leaves("../a.jpg"), leaves("/etc/passwd"), leaves("C:\\\\a.jpg")
    (False, True, True, True)
    """
    if not any(sign in name for sign in ("..", ":", "\\", "\0")):
        return name.startswith("/")
    windows = PureWindowsPath(name)
    return bool(windows.anchor) or ".." in windows.parts or "\0" in name


def stem(image_id: str) -> str:
    """Return an image id without the file name's ending: ``sub/a.jpg`` becomes ``sub/a``."""
    head, _, ending = image_id.rpartition(".")
    return head if head and "/" not in ending else image_id


def is_file(path: str | Path) -> bool:
    """Return whether there is such a file; a name too long or too odd for any is no error, as it is for `Path`."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | Path) -> bool:
    """Return whether there is such a folder, likewise."""
    return os.path.isdir(path)  # noqa: PTH112


def walk(folder: Path, prefix: str = "") -> Iterator[str]:
    """Yield the files below a folder, relative to it, hidden ones left out; folders in it may be symbolic links."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith((".", "__MACOSX")):
                continue
            # Links further down could form a loop.
            if entry.is_dir(follow_symlinks=not prefix):
                yield from walk(folder / entry.name, f"{prefix}{entry.name}/")
            else:
                yield prefix + entry.name


def given_folder(root: Path, given: str) -> Path:
    """Return the folder that the option ``images`` names. Raises `InvalidData` where there is none."""
    folder = root / given
    if not folder.is_dir():
        raise InvalidData(
            f"read_dataset(..., images={given!r}): there is no folder {folder}; it is looked for from {root}"
        )
    return folder


def folder_of(names: Sequence[str], likely: Iterable[Path]) -> Path:
    """Return the folder that has most of a sample of the files; the likeliest one, the first, where none has any."""
    folders = [folder for folder in dict.fromkeys(likely) if folder.is_dir()]
    sample = [name for name in names[:: max(1, len(names) // 8)] if name and not leaves(name)]
    return max(folders, key=lambda folder: sum(is_file(f"{folder}/{name}") for name in sample))


def read_headers(paths: Sequence[str]) -> list[Header | ImageError]:
    """Open each file far enough for its size; an error takes the place of a header that cannot be read."""

    def attempt(path: str) -> Header | ImageError:
        try:
            return read_header(path)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(attempt, paths))


def place_images(data: Dataset, folder: Path) -> None:
    """Put every image under its id into a folder. Raises `InvalidData` naming those that are missing."""
    targets = [f"{folder}/{name if is_plain(name) else inside(name)}" for name in data.image_ids]
    missing = [p for p in data.paths if not is_remote(p) and not os.path.isfile(file_of(p))]  # noqa: PTH113 (many files)
    if missing:
        raise InvalidData(
            f"{len(missing)} of {len(data)} images are not there, for example {', '.join(missing[:3])}; "
            "nothing was written. bring them back, or write a data set without them (data.take)"
        )
    for path, target in track(zip(data.paths, targets, strict=True), "images", total=len(targets)):
        place_image(path, target)


def is_plain(name: str) -> bool:
    """Return whether a file name stays in its folder, as far as a quick look tells; nearly all do."""
    return name.isascii() and name not in {"", ".", ".."} and not any(sign in name for sign in "/\\\0")


def require_finite(data: Dataset) -> None:
    """Raise `InvalidData` where a box is not made of numbers; no file format can carry that."""
    bad = np.flatnonzero(~np.isfinite(data.boxes).all(axis=1))
    if len(bad):
        image = int(np.searchsorted(data.offsets, bad[0], side="right")) - 1
        raise InvalidData(
            f"{data.image_ids[image]}: {len(bad)} box(es) are not finite; run `detkit check` and mend them"
        )
