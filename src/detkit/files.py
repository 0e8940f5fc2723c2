"""Files that appear whole or not at all, and paths that stay in their folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import socket
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import msgspec

from detkit.errors import InvalidData, StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


def inside(relative: str) -> Path:
    """Return a relative path that stays where it is put. Raises `InvalidData` for one that would not."""
    pure = PurePosixPath(relative)
    if not relative or pure.is_absolute() or ".." in pure.parts or "\\" in relative or "\0" in relative:
        raise InvalidData(f"image id {relative!r} leaves its folder; expected a relative path without '..'")
    try:
        relative.encode()
    except UnicodeEncodeError:
        raise InvalidData(f"image id {relative!r} is no text, as its bytes are not UTF-8; rename the file") from None
    return Path(*pure.parts)


def place(source: str | Path, target: str | Path, *, lasting: bool = False) -> None:
    """Make a file appear at another path: hard link, else symbolic link, else copy. Raises `StorageError`.

    What is ``lasting`` stays when ``source`` is removed: it is no symbolic link.
    """
    # A hard link to a symbolic link is one more symbolic link; for all others the way to the file is not looked up.
    real = os.path.realpath(source) if os.path.islink(source) else source  # noqa: PTH114 (many files)
    with contextlib.suppress(OSError):
        os.link(real, target)
        return
    target, file_there = Path(target), Path(source).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file_there, target)
    except OSError:
        if not lasting:
            with contextlib.suppress(OSError):
                os.symlink(file_there, target)
                return
        with atomic_write(target) as file, file_there.open("rb") as original:
            shutil.copyfileobj(original, file)


def place_all(source: Path, target: Path, but: Collection[str] = ()) -> None:
    """Make every file below a folder appear in another, except what is in ``but``, some of its own folders.

    ``source`` may go afterwards: of what lies in it there is a hard link, else a copy. Its symbolic links lead to the
    user's own images, and stay such.
    """
    for folder, folders, files in os.walk(source):
        if Path(folder) == source:
            folders[:] = [name for name in folders if name not in but]
        for name in files:
            file = Path(folder, name)
            place(file, target / file.relative_to(source), lasting=not file.is_symlink())


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


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``, which becomes that when the block ends well. Raises `StorageError`.

    What a killed process of this machine left there for the same target goes first. One that still runs holds a lock
    on its folder, an hour after it made it at the latest; where the file system knows no locks, nothing is removed.
    """
    begin = f".{_short(target.name)}.{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]}-"
    beside = target.with_name(begin + secrets.token_hex(4))
    held = -1
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # a folder that may be written to, and not listed
            for left in target.parent.iterdir():
                if left.name.startswith(begin) and (left.suffix != _UNLOCKED or _is_old(left)):
                    _remove_left(left)
        # Nobody removes it before it is locked, as it has another name until then.
        unlocked = beside.with_name(beside.name + _UNLOCKED)
        unlocked.mkdir()
        held = _lock(unlocked)
        unlocked.rename(beside)
        yield beside
        os.replace(beside, target)
    except OSError as error:
        raise StorageError(target, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if held >= 0:
            os.close(held)


_UNLOCKED = ".new"
_OLD_S = 3600
_LONGEST_NAME = 200
"""Bytes of a target's name; file systems take 255, of which what is added takes 32."""


def _short(name: str) -> str:
    """Return a name, or the beginning of a long one with what tells it from others."""
    encoded = os.fsencode(name)
    if len(encoded) <= _LONGEST_NAME:
        return name
    return encoded[: _LONGEST_NAME - 17].decode(errors="ignore") + "-" + hashlib.sha256(encoded).hexdigest()[:16]


def _is_old(folder: Path) -> bool:
    """Return whether a folder was made so long ago that its process has locked it, or is dead."""
    return time.time() - folder.stat().st_mtime > _OLD_S


def _lock(folder: Path) -> int:
    """Return a descriptor that keeps a folder locked for as long as it is open; -1 where that cannot be."""
    if fcntl is None:
        return -1
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return -1
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return -1
    return held


def _remove_left(folder: Path) -> None:
    held = _lock(folder)
    if held >= 0:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def lock_file(path: Path) -> IO[bytes] | None:
    """Return a file that this process alone holds until it is closed or the process ends, made where it is not there.

    A process forked from this one does not hold it. None where it cannot be made, or the file system knows no locks.
    Raises `BlockingIOError` where another process holds it.
    """
    if fcntl is None:
        return None
    try:
        file = path.open("ab")
    except OSError:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(error.errno, f"another process holds {path}") from None
        return None
    return file


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


def cache_folder() -> Path | None:
    """Return where detkit keeps what it can make again: ``$DETKIT_CACHE``, else a folder in the user's cache.

    None where nothing is to be kept: ``DETKIT_CACHE=off``, or where nobody's home is known.
    """
    chosen = os.environ.get("DETKIT_CACHE", "")
    if chosen.lower() in {"off", "0"}:
        return None
    try:
        return Path(chosen or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/detkit").expanduser().absolute()
    except RuntimeError:
        return None


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    h = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            h.update(block)
    return h.hexdigest()
