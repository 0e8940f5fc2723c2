"""Unpacking a ``model.tar.gz``, which may be anybody's."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from detkit.errors import InvalidData, StorageError

_AT_ONCE = 2 << 20
"""Bytes; what is copied comes in pieces of half of it."""

MOST_FILES = 10_000
MOST_BYTES = 50_000_000_000
"""More than any detector has; what claims more is no model."""


class _Sparing(io.RawIOBase):
    """An archive's bytes, unpacked where they are packed. It refuses what no file needs: names that fill the memory."""

    def __init__(self, file: IO[bytes]) -> None:
        is_packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._file: IO[bytes] = gzip.GzipFile(fileobj=file, mode="rb") if is_packed else file  # type: ignore[assignment]

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _AT_ONCE:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the files of a tar archive into a folder that has none of them.

    Only folders and regular files are made, below ``folder``. Raises `InvalidData` for an archive that is damaged, too
    large, or holds anything else, such as links or paths that lead out, `StorageError` where it cannot be written.
    """
    try:
        with archive.open("rb") as file, tarfile.open(fileobj=_Sparing(file), mode="r:") as tar:
            left, free = MOST_BYTES, shutil.disk_usage(archive.parent).free
            for number, member in enumerate(tar):
                target = folder / _place(archive, member)
                left, free = left - member.size, free - member.size
                if number >= MOST_FILES or left < 0:
                    limits = f"{MOST_FILES} files and {MOST_BYTES / 1e9:.0f} GB"
                    raise InvalidData(f"{archive} holds more than {limits} at {member.name!r}")
                if free < 0:
                    raise StorageError(target, "the archive takes more than the free space of the disk")
                _write(tar, member, target)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidData(f"{archive} is damaged, or no tar archive: {error}; make it anew") from error


def _place(archive: Path, member: tarfile.TarInfo) -> Path:
    """Return where a member goes, relative to the folder. Raises `InvalidData`."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
        raise InvalidData(f"{archive}: {member.name!r} leads out of the folder that it is unpacked to; nothing is run")
    if not (member.isdir() or (member.isreg() and not member.issparse())):
        raise InvalidData(f"{archive}: {member.name!r} is a link or a device; expected files and folders alone")
    return Path(*name.parts)


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    try:
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
            return
        content = tar.extractfile(member)
        assert content is not None  # it is a regular file
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise InvalidData(f"{target} is there already, or twice in the archive; expected it once") from error
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise
        raise StorageError(target, error) from error
