"""Files that appear whole or not at all, and paths that stay in their folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import msgspec

from detkit.errors import InvalidData, StorageError
from detkit.recordio import packed, packed_image

if TYPE_CHECKING:
    from collections.abc import Iterator


def inside(relative: str) -> Path:
    """Return a relative path that stays where it is put. Raises `InvalidData` for one that would not."""
    pure = PurePosixPath(relative)
    if not relative or pure.is_absolute() or ".." in pure.parts or "\\" in relative or "\0" in relative:
        raise InvalidData(f"image id {relative!r} leaves its folder; expected a relative path without '..'")
    return Path(*pure.parts)


def place(source: Path, target: Path) -> None:
    """Make a file appear at another path: hard link, else symbolic link, else copy. Raises `StorageError`.

    An image in a pack becomes a file of its own; raises `BrokenRecord` where it cannot be read.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    where = packed(source)
    if where is not None:
        content = packed_image(*where)
        with atomic_write(target) as file:
            file.write(content)
        return
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        try:
            os.symlink(real, target)
        except OSError:
            with atomic_write(target) as file, real.open("rb") as original:
                shutil.copyfileobj(original, file)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces ``path`` only when the block ends well. Raises `StorageError`."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_UMASK)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()

_READ_BY_PEOPLE = 1 << 20
"""JSON below this many bytes is indented."""


def write_json(path: Path, value: Any) -> None:
    """Write any msgspec-encodable value beside and rename it; indented, unless it is too long for anybody to read."""
    compact = msgspec.json.encode(value)
    with atomic_write(path) as file:
        file.write(msgspec.json.format(compact, indent=1) if len(compact) < _READ_BY_PEOPLE else compact)


def cache_folder() -> Path:
    """Return where detkit keeps what it can make again: ``$DETKIT_CACHE``, else a folder in the user's cache."""
    chosen = os.environ.get("DETKIT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "detkit"


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    h = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            h.update(block)
    return h.hexdigest()
