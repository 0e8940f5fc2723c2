"""The columns of data sets that took long to read, kept for the next time.

They lie in ``$DETKIT_CACHE/datasets``, by default under ``~/.cache/detkit``; ``DETKIT_CACHE=off`` keeps nothing. What
is kept counts as long as nothing has changed: not the code that reads, and not size, time or inode of any file in the
folder that was read, or, where that was a file, of it, of the files beside it and one folder up, and of the images,
which must not have appeared in a folder nearby either. Data that changed within the last two seconds is not kept, as
the next change might carry the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

import detkit
from detkit.columns import ARRAYS
from detkit.data import Dataset
from detkit.errors import StorageError
from detkit.files import atomic_write, cache_folder
from detkit.images import file_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

SLOW_S = 0.3
"""Reading that takes longer is worth keeping."""

LIMIT = 2_000_000_000
"""Bytes of all that is kept; beyond, what was not used for longest goes."""

LARGEST = LIMIT // 4
"""Bytes of one data set that are kept at most."""

_MOST_FILES = 2_000_000
_DESCRIPTIONS = {".yaml", ".yml"}
"""Files that describe the folder they lie in, whose whole tree is read."""
_UNSETTLED_S = 2.0
"""The coarsest clock of a file system, that of FAT."""
_ENDING = ".dataset"
_NO_MASK: list[Any] = []
"""Shared, as whole data sets have nothing else."""


class _Column(msgspec.Struct, array_like=True):
    """Values that repeat: each once, and which of them every row has."""

    values: list[Any]
    rows: bytes


class _Kept(msgspec.Struct):
    state: str
    warnings: list[str]
    classes: list[str]
    image_ids: list[str]
    paths: list[str] | str
    """A prefix where every path is that and the image's id."""
    sources: _Column
    masks: list[Any] | None
    extra: _Column | None
    box_extra: _Column | None
    class_extra: list[dict[str, Any]] | None
    file_extra: dict[str, dict[str, Any]]
    arrays: dict[str, tuple[str, list[int], bytes]]
    splits: dict[str, bytes]
    numbered: bool


@dataclass(frozen=True)
class Reading:
    """One way of reading one path, which may be kept. `reading` returns it."""

    path: Path
    file: Path
    """Where it is kept."""

    def look_up(self) -> tuple[Dataset, list[str]] | None:
        """Return the data and the warnings of its reading, or None where it is not kept, or something has changed."""
        try:
            content = self.file.read_bytes()
            if zlib.crc32(memoryview(content)[4:]) != int.from_bytes(content[:4], "big"):
                return None
            kept = msgspec.msgpack.decode(memoryview(content)[4:], type=_Kept)
            data = _unpack(kept)
            if _state(self.path, data).digest != kept.state:
                return None
        except (OSError, ValueError, LookupError, TypeError, msgspec.MsgspecError):
            return None
        with contextlib.suppress(OSError):
            os.utime(self.file)  # used just now
        return data, kept.warnings

    def keep(self, data: Dataset, warnings: Sequence[str], began: float) -> None:
        """Keep what was read since ``began``, in seconds of the epoch. Nothing happens where that cannot be."""
        try:
            state = _state(self.path, data)
            if state.newest > began - _UNSETTLED_S:
                return
            content = msgspec.msgpack.encode(_pack(data, state.digest, warnings))
            if len(content) > LARGEST:
                return
            self.file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with atomic_write(self.file) as file:
                file.write(zlib.crc32(content).to_bytes(4, "big"))
                file.write(content)
            _shrink(self.file.parent)
        except (OSError, StorageError, ValueError, TypeError, OverflowError, RecursionError, msgspec.MsgspecError):
            return  # a full disk, a file name that is not text


def reading(
    path: Path, format: str | None, options: Mapping[str, Any], readers: Iterable[Callable[..., Any]]
) -> Reading | None:
    """Return the place for one way of reading a path; None where nothing is kept.

    ``readers`` are the functions that may read it; when their code changes, nothing earlier counts.
    """
    folder = _folder()
    if folder is None:
        return None
    code = sorted({os.path.dirname(getattr(sys.modules[r.__module__], "__file__", "") or "") for r in readers})  # noqa: PTH120
    try:
        listed = [[e.name, e.stat().st_size, e.stat().st_mtime_ns] for at in code for e in _entries(at, ".py")]
        named = {str(value): os.path.abspath(value) for value in options.values() if isinstance(value, (str, Path))}
        noted = {n: [at, os.stat(at).st_mtime_ns] for n, at in named.items() if os.path.exists(at)}  # noqa: PTH110, PTH116
        key = json.dumps(
            [detkit.__version__, listed, str(path), os.path.abspath(path), format, sorted(options.items()), noted]
        )
    except (OSError, TypeError, ValueError):
        return None
    return Reading(path, folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}{_ENDING}")


def _folder() -> Path | None:
    root = cache_folder()
    return None if root is None else root / "datasets"


def cache_size() -> int:
    """Return the bytes of all that is kept."""
    folder = _folder()
    return 0 if folder is None else sum(size for _, size, _ in _kept_files(folder))


def _entries(folder: str, ending: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if e.name.endswith(ending)), key=lambda e: e.name)


def _kept_files(folder: Path) -> list[tuple[float, int, str]]:
    """Return time of last use, size and path of everything kept, the oldest first."""
    found = []
    with contextlib.suppress(OSError):
        for entry in _entries(str(folder), ""):
            with contextlib.suppress(OSError):
                status = entry.stat()
                found.append((status.st_mtime, status.st_size, entry.path))
    return sorted(found)


def _shrink(folder: Path) -> None:
    kept = _kept_files(folder)
    total = sum(size for _, size, _ in kept)
    for _, size, path in kept:
        if total <= LIMIT:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
            total -= size


class _State:
    """Collects what files and folders look like."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._newest = 0

    @property
    def digest(self) -> str:
        """The sha256 of everything noted."""
        return hashlib.sha256("\0".join(self._lines).encode(errors="surrogateescape")).hexdigest()

    @property
    def newest(self) -> float:
        """When anything of it changed last, in seconds of the epoch."""
        return self._newest / 1e9

    def note(self, name: str, status: os.stat_result | None) -> None:
        """Add one file; None is for one that is not there."""
        if len(self._lines) > _MOST_FILES:
            raise ValueError("too many files")
        if status is None:
            self._lines.append(f"{name}\0-")
            return
        self._lines.append(f"{name}\0{status.st_size} {status.st_mtime_ns} {status.st_ino}")
        # A link more changes only ctime; so that counts for what may not be kept yet, and not for what has changed.
        self._newest = max(self._newest, status.st_mtime_ns, status.st_ctime_ns)

    def note_path(self, path: str) -> None:
        """Add a file by its path."""
        try:
            self.note(path, os.stat(path))  # noqa: PTH116 (many files)
        except OSError:
            self.note(path, None)

    def note_tree(self, folder: str) -> None:
        """Add a folder and everything below it; symbolic links are followed, each folder once."""
        seen: set[tuple[int, int]] = set()
        waiting = [folder]
        while waiting:
            folder = waiting.pop()
            status = os.stat(folder)  # noqa: PTH116
            self.note(folder, None)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            waiting += self._note_entries(folder)

    def note_neighbours(self, folder: str, images: Sequence[str]) -> None:
        """Add the files of a folder, and any of these images that lie in it, or up to two folders below."""
        for inner in self._note_entries(folder):
            deeper = []
            with contextlib.suppress(OSError), os.scandir(inner) as entries:
                deeper = [entry.path for entry in entries if entry.is_dir()]
            for near in (inner, *deeper):
                for image in images:
                    if os.path.lexists(f"{near}/{image}"):
                        self.note_path(f"{near}/{image}")

    def _note_entries(self, folder: str) -> list[str]:
        """Add the files of a folder and return its folders."""
        inner = []
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    if entry.is_dir():
                        inner.append(entry.path)
                    else:
                        self.note(entry.name, entry.stat())
                except OSError:
                    self.note(entry.name, None)
        return inner


def _state(path: Path, data: Dataset) -> _State:
    """Look at everything that reading depended on. Raises `OSError`, and `ValueError` for too many files."""
    state = _State()
    if path.is_dir():
        state.note_tree(str(path))
        covered = f"{path}/"
    elif path.suffix.lower() in _DESCRIPTIONS:
        state.note_tree(str(path.absolute().parent))
        covered = f"{path.absolute().parent}/"
    else:
        # Readers look beside a file and one folder up for images, class names and lists.
        sample = data.image_ids[:: max(1, len(data) // 8)]  # as readers do that look for the folder of the images
        for folder in dict.fromkeys((path.absolute().parent, path.absolute().parent.parent)):
            state.note_neighbours(str(folder), sample)
        state.note_path(str(path))
        covered = "\0"
    for name in dict.fromkeys(name for name in (*data.sources, *data.paths) if name and not name.startswith(covered)):
        state.note_path(str(file_of(name)))
    return state


def _distinct(values: Sequence[Any] | None, key: Callable[[Any], Any]) -> _Column | None:
    if values is None:
        return None
    keys = list(map(key, values))
    once = dict(zip(keys, values, strict=True))
    number = {k: i for i, k in enumerate(once)}
    rows = np.fromiter(map(number.__getitem__, keys), dtype=np.int64, count=len(keys))
    return _Column(list(once.values()), rows.tobytes())


def _spread(column: _Column | None) -> tuple[Any, ...] | None:
    if column is None:
        return None
    return tuple(column.values[i] for i in np.frombuffer(column.rows, dtype=np.int64).tolist())


def _pack(data: Dataset, state: str, warnings: Sequence[str]) -> _Kept:
    paths: list[str] | str = list(data.paths)
    if len(data):
        prefix = data.paths[0].removesuffix(data.image_ids[0])
        if all(path == prefix + name for path, name in zip(data.paths, data.image_ids, strict=True)):
            paths = prefix
    present = [*ARRAYS, *([] if data.box_ids is None else ["box_ids"])]
    arrays = {name: np.ascontiguousarray(getattr(data, name)) for name in present}
    return _Kept(
        state=state,
        warnings=list(warnings),
        classes=list(data.classes),
        image_ids=list(data.image_ids),
        paths=paths,
        sources=_distinct(data.sources, str) or _Column([], b""),
        masks=None if data.masks is None else list(data.masks),
        extra=_distinct(data.extra, id),
        box_extra=_distinct(data.box_extra, id),
        class_extra=None if data.class_extra is None else [dict(extra) for extra in data.class_extra],
        file_extra={source: dict(extra) for source, extra in data.file_extra.items()},
        arrays={name: (array.dtype.str, list(array.shape), array.tobytes()) for name, array in arrays.items()},
        splits={name: np.asarray(at, dtype=np.int64).tobytes() for name, at in data.split_indices.items()},
        numbered=data.numbered,
    )


def _unpack(kept: _Kept) -> Dataset:
    arrays: dict[str, Any] = {
        name: np.frombuffer(content, dtype=np.dtype(dtype)).reshape(shape)
        for name, (dtype, shape, content) in kept.arrays.items()
    }
    paths = kept.paths
    return Dataset(
        classes=tuple(kept.classes),
        image_ids=tuple(kept.image_ids),
        paths=tuple(paths + name for name in kept.image_ids) if isinstance(paths, str) else tuple(paths),
        sources=_spread(kept.sources) or (),
        masks=None if kept.masks is None else tuple(_NO_MASK if mask == [] else mask for mask in kept.masks),
        extra=_spread(kept.extra),
        box_extra=_spread(kept.box_extra),
        class_extra=None if kept.class_extra is None else tuple(kept.class_extra),
        file_extra=kept.file_extra,
        split_indices={name: np.frombuffer(at, dtype=np.int64) for name, at in kept.splits.items()},
        numbered=kept.numbered,
        **arrays,
    )
