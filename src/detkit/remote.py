"""Data behind URLs such as ``s3://bucket/folder``: annotations are fetched, images stay there until they are needed.

fsspec does the transfers; it and what a kind of URL needs (s3fs for ``s3://``) come with ``detkit-sdk[s3]``.
Credentials and endpoints are what those libraries find, for S3 the usual ``AWS_*`` variables and files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from detkit.errors import InvalidData, StorageError, UsageError
from detkit.files import atomic_write, cache_folder, inside
from detkit.progress import track
from detkit.recordio import packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_LISTING = ".detkit-listing.json"
_FRESH_S = 60.0
"""So long a file that was looked up is taken for unchanged."""
_BATCH = 256
"""Files that are asked for together."""
LIMIT = 20_000_000_000
"""Bytes of all copies that are kept; beyond, those go that were fetched first."""
_ANNOTATIONS = (
    *(".json", ".jsonl", ".manifest", ".xml", ".txt", ".csv", ".lst", ".rec", ".idx", ".yaml", ".yml", ".names"),
)
_LARGEST_OTHER = 16_000_000
"""Bytes of a file of another kind; a larger one is a model or an archive, and no annotation."""

_mirrors: dict[str, tuple[str, int]] = {}
"""Local folders whose empty image files stand for those at a URL, and how many are reading them."""
_lock = threading.RLock()
_looked_up: dict[str, tuple[float, Path]] = {}


def is_remote(place: str | Path) -> bool:
    """Return whether a place is a URL.

    >>> is_remote("s3://bucket/a.jpg"), is_remote("C:/a.jpg"), is_remote("data:train")
    (True, False, False)
    """
    return _URL.match(str(place)) is not None


def origin(place: str) -> str:
    """Return the URL that a place stands for: itself, or that of an image's empty stand-in in a mirror."""
    for root, (url, _) in list(_mirrors.items()):
        if place.startswith(root) and packed(place) is None:
            return url + place[len(root) :]
    return place


def exists(url: str) -> bool:
    """Return whether there is a file or folder at a URL."""
    files, path = _open(url)
    with _explained(url):
        return bool(files.exists(path))


def find(url: str) -> list[str]:
    """Return the URLs of all files at or below one, sorted. Raises `UsageError` where there is none."""
    files, path = _open(url)
    with _explained(url):
        found = [url] if files.isfile(path) else [str(files.unstrip_protocol(one)) for one in sorted(files.find(path))]
    if not found:
        raise UsageError(f"there is no file or folder {url}")
    return found


def read(url: str) -> bytes:
    """Return a file's bytes, from a copy in the cache where it has not changed. Raises `OSError`."""
    return local(url).read_bytes()


def local(url: str) -> Path:
    """Return a copy of a file in the cache, fetched where there is none, or an older one. Raises `OSError`."""
    known = _looked_up.get(url)
    if known is not None and time.monotonic() - known[0] < _FRESH_S and known[1].is_file():
        return known[1]
    files, path = _open(url)
    try:
        info = files.info(path)
        name = hashlib.sha256(f"{url}\n{_version(info)}".encode()).hexdigest()
        copy = _cache() / "remote" / name[:2] / f"{name}{Path(path).suffix}"
        if not copy.is_file():
            with atomic_write(copy) as file:
                files.get_file(path, file.name)
    except OSError:
        raise
    except Exception as error:  # each kind of file system has errors of its own
        raise OSError(str(error)) from error
    _looked_up[url] = time.monotonic(), copy
    return copy


class Mirror(NamedTuple):
    """A folder here that has the annotations of one at a URL, and an empty file for each image."""

    path: Path
    """What stands for the URL: a folder, or a file in `root`."""
    root: Path
    url: str
    """What `root` stands for."""
    there: str
    """The same, as its file system says it."""

    def place(self, path: str) -> str:
        """Return the URL of a place below `root`, of an image in a pack the copy of that pack; others stay."""
        where = packed(path)
        if where is not None:
            return f"{os.path.realpath(where[0])}#{where[1]}"
        root = f"{self.root}/"
        return f"{self.url}/{path[len(root) :]}" if path.startswith(root) else path

    def told(self, text: str) -> str:
        """Return a text that names URLs where it named files of the mirror."""
        return text.replace(str(self.root), self.url)


@contextlib.contextmanager
def mirrored(url: str, is_image: Callable[[str], bool]) -> Iterator[Mirror]:
    """Yield a mirror of a folder, or of what lies around a file; `origin` knows its images within the block.

    Files that have not changed since the last time are not fetched again. Raises `UsageError` where there is nothing,
    `InvalidData` for a name that leaves the folder.
    """
    files, path = _open(url)
    with _explained(url):
        single = files.isfile(path)
        top = path.rstrip("/")
        if single:
            top = top.rpartition("/")[0]
            top = top.rpartition("/")[0] if top.rpartition("/")[2].lower() == "annotations" else top
        listed: Mapping[str, Any] = files.find(top, detail=True)
    if not listed:
        raise UsageError(f"there is no file or folder {url}")
    base = url.partition("://")[0]
    root = _cache() / "mirrors" / hashlib.sha256(f"{base}://{top}".encode()).hexdigest()[:32]
    versions = {}
    for name, info in listed.items():
        relative = name[len(top) :].lstrip("/")
        if not relative or relative.endswith("/"):
            continue
        inside(relative)
        known = is_image(relative) or relative.lower().endswith(_ANNOTATIONS)
        if known or (info.get("size") or 0) <= _LARGEST_OTHER:
            versions[relative] = _version(info)
    found = Mirror(root / path[len(top) :].strip("/"), root, f"{base}://{top}", top)
    key = f"{root}/"
    with _lock:
        _refresh(files, found, versions, is_image)
        _mirrors[key] = f"{found.url}/", _mirrors.get(key, ("", 0))[1] + 1
    try:
        yield found
    finally:
        with _lock:
            url_there, users = _mirrors.pop(key)
            if users > 1:
                _mirrors[key] = url_there, users - 1


def _refresh(files: Any, mirror: Mirror, versions: Mapping[str, str], is_image: Callable[[str], bool]) -> None:
    """Bring a mirror up to date; each file is replaced whole, and whoever has it open keeps what it was."""
    root = mirror.root
    root.mkdir(parents=True, exist_ok=True)
    _shrink(_cache() / "remote")
    listing = root / _LISTING
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(listing.read_bytes())
    for name in known.keys() - versions.keys():
        (root / name).unlink(missing_ok=True)
        for folder in (root / name).parents:
            if folder == root or any(folder.iterdir()):
                break
            folder.rmdir()
    changed = [n for n, version in versions.items() if known.get(n) != version or not (root / n).exists()]
    for name in changed:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if is_image(name):
            (root / name).touch()
        elif name.lower().endswith(".rec"):
            # Of a pack, older copies are kept, as images of data sets that are in use lie in them.
            with _explained(f"{mirror.url}/{name}"):
                link = root / f"{name}.{secrets.token_hex(4)}"
                link.symlink_to(local(f"{mirror.url}/{name}"))
                os.replace(link, root / name)
    wanted = [name for name in changed if not is_image(name) and not name.lower().endswith(".rec")]
    batches = [wanted[i : i + _BATCH] for i in range(0, len(wanted), _BATCH)]
    for batch in track(batches, "fetching", total=len(batches)):
        with _explained(mirror.url), tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as fetched:
            places = [str(Path(fetched) / str(i)) for i in range(len(batch))]
            files.get([f"{mirror.there}/{name}" for name in batch], places)
            for name, place in zip(batch, places, strict=True):
                os.replace(place, root / name)
    with atomic_write(listing) as file:
        file.write(json.dumps(versions).encode())


def _shrink(folder: Path) -> None:
    """Remove the copies that were not fetched or used for longest, where all of them are too much."""
    kept = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in folder.glob("*/*") if file.is_file())
    total = sum(size for _, size, _ in kept)
    for _, size, file in kept:
        if total <= LIMIT:
            return
        file.unlink(missing_ok=True)
        total -= size


_copies: ContextVar[dict[str, str] | None] = ContextVar("_copies", default=None)


def place(url: str, target: Path) -> None:
    """Make a file at a URL appear here; within `uploading` only a note that it is to be copied over there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    copies = _copies.get()
    if copies is not None:
        target.touch()
        copies[str(target)] = url
        return
    shutil.copyfile(local(url), target)  # a link would let changes to it into the cache


@contextlib.contextmanager
def uploading(staged: Path, url: str, is_image: Callable[[str], bool]) -> Iterator[None]:
    """Write a folder at a URL out of what the block puts into ``staged``: images first, what makes it a data set last.

    Images that lie in the same place already are copied over there and do not travel. Raises `UsageError` where
    anything is at the URL, `StorageError` where a transfer fails; then what had been written is removed.
    """
    files, path = _open(url)
    with _explained(url):
        if files.exists(path) and files.find(path):
            raise UsageError(f"{url} is not empty; nothing is overwritten, so choose another folder or remove it")
    copies: dict[str, str] = {}
    token = _copies.set(copies)
    try:
        yield
    finally:
        _copies.reset(token)
    found = sorted(str(file.relative_to(staged)) for file in staged.rglob("*") if file.is_file())
    # What readers look for first lies at the top, and is written last.
    ordered = sorted(found, key=lambda name: (not is_image(name), -name.count("/"), name))
    written: list[str] = []
    try:
        for name in track(ordered, "writing", total=len(ordered)):
            source, target = str(staged / name), f"{path.rstrip('/')}/{name}"
            written.append(target)
            if source not in copies:
                files.put_file(source, target)
                continue
            other, there = _open(copies[source])
            if other is files:
                files.cp_file(there, target)
            else:
                files.put_file(str(local(copies[source])), target)
    except BaseException as error:
        for target in written:
            with contextlib.suppress(Exception):
                files.rm_file(target)
        if not isinstance(error, Exception):
            raise
        raise StorageError(url, str(error)) from error


def _cache() -> Path:
    """Return the folder for copies; where nothing is to be kept, one that lasts as long as this process."""
    return cache_folder() or Path(_temporary().name)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="detkit-")


def _open(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it. Raises `UsageError` where nobody knows such URLs."""
    try:
        from fsspec.core import url_to_fs

        files, path = url_to_fs(url)
    except ImportError as error:
        raise UsageError(
            f"{url} needs a package that is not here ({error}); install it with: pip install 'detkit-sdk[s3]'"
        ) from error
    except ValueError as error:
        raise UsageError(f"{url}: {error}") from error
    return files, str(path)


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except (UsageError, InvalidData):
        raise
    except Exception as error:
        why = str(error) or type(error).__name__
        raise UsageError(f"{url} cannot be read: {why}. check the address, and the credentials and endpoint") from error


def _version(info: Mapping[str, Any]) -> str:
    """Return what changes when a file does: its tag, else its time, and its size."""
    tag = next((info[key] for key in _MARKS if info.get(key)), None)
    # Where nothing tells, it may have changed at any time.
    return f"{time.time_ns() if tag is None else tag} {info.get('size')}"


_MARKS = (
    *("ETag", "etag", "content_hash", "Content-MD5", "md5Hash", "LastModified", "last_modified", "updated", "mtime"),
    *("modify", "created"),
)
