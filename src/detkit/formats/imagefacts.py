"""What the image files of a data set are: size, digest, whether they can be decoded; remembered between looks."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PillowImage

from detkit import images
from detkit.errors import ImageError
from detkit.files import cache_folder
from detkit.images import Header
from detkit.progress import track

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

THUMBNAIL = 16
"""The difference hash compares neighbours in a picture of 17 x 16 grey pixels: 256 bits."""

_THREADS = 8
"""Enough to hide a network disk's latency; hashing and decoding run beside one another."""
_SETTLED_S = 2.0
"""A file that changed a moment ago may change again within the same tick of the clock."""
_MOST_REMEMBERED = 2_000_000


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What one reading of an image file told."""

    header: Header
    digest: str
    """sha256 of the image file's bytes."""
    channels: int = 0
    """1 for grey, 3 for colour and palette, 4 for CMYK and transparent pictures; 0 where it was not decoded."""
    difference_hash: bytes = b""
    """32 bytes: for each of 16 rows, whether each of 16 pixels is darker than its right neighbour; empty where it was
    not decoded."""
    fault: str = ""
    """Why the pixels cannot be decoded, although the header is sound."""


def look(paths: Sequence[str], *, decode: bool) -> list[ImageFacts | ImageError]:
    """Read each image once, with threads; what cannot be read becomes an error in its place.

    ``decode`` looks at the pixels, too. Facts about files that have not changed, by path, size and time, come from
    earlier looks.
    """
    identities = [_identity(path) for path in paths]
    with _Memory() as memory:
        known = memory.recall(identities, decode)
        todo = [i for i, identity in enumerate(identities) if identity not in known]

        def attempt(i: int) -> ImageFacts | ImageError:
            try:
                return _look(paths[i], decode)
            except ImageError as error:
                return error

        found: dict[int, ImageFacts | ImageError] = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            for i, facts in zip(todo, track(pool.map(attempt, todo), "images", total=len(todo)), strict=True):
                found[i] = facts
        memory.remember({identities[i]: facts for i, facts in found.items() if isinstance(facts, ImageFacts)}, decode)
    return [found[i] if i in found else known[identity] for i, identity in enumerate(identities)]


@dataclass(frozen=True, slots=True)
class _Identity:
    path: str
    size: int
    mtime: int
    """Nanoseconds; 0 for a file that is not there or has only just been written, which is not remembered."""


def _identity(path: str) -> _Identity:
    absolute = os.path.abspath(path)
    try:
        status = Path(images.file_of(absolute)).stat()
    except (OSError, ValueError):
        return _Identity(absolute, 0, 0)
    settled = time.time() - status.st_mtime > _SETTLED_S
    return _Identity(absolute, status.st_size, status.st_mtime_ns if settled else 0)


def _look(path: str, decode: bool) -> ImageFacts:
    content = images.read_bytes(path)
    header, digest = images.read_header(content, path), hashlib.sha256(content).hexdigest()
    if not decode:
        return ImageFacts(header, digest)
    try:
        pixels = images.read_image(content, path)
    except ImageError as error:
        return ImageFacts(header, digest, fault=str(error))
    return ImageFacts(header, digest, _channels(content), difference_hash(pixels))


def _channels(content: bytes) -> int:
    with PillowImage.open(io.BytesIO(content)) as image:
        return 3 if image.mode == "P" else len(image.getbands())


def difference_hash(pixels: images.Image) -> bytes:
    """Return 256 bits that stay nearly the same when a picture is scaled, re-encoded or made a little brighter.

    dHash: http://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html, with 16 x 16 comparisons.
    """
    grey = PillowImage.fromarray(pixels).convert("L").resize((THUMBNAIL + 1, THUMBNAIL), PillowImage.Resampling.BOX)
    small = np.asarray(grey, dtype=np.int16)
    return np.packbits(small[:, :-1] < small[:, 1:]).tobytes()


class _Memory:
    """Facts by identity in a small database; whatever is wrong with it, one merely looks again."""

    def __enter__(self) -> _Memory:
        self._database: sqlite3.Connection | None = None
        with _forgiven():
            folder = cache_folder()
            if folder is None:
                return self
            folder.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(folder / "images-1.sqlite", timeout=5)
            self._database.execute(
                "create table if not exists images (path text primary key, size integer, mtime integer, width integer,"
                " height integer, orientation integer, digest text, decoded integer, channels integer, hash blob,"
                " fault text) without rowid"
            )
        return self

    def __exit__(self, *_error: object) -> None:
        if self._database is not None:
            self._database.close()

    def recall(self, identities: Sequence[_Identity], decode: bool) -> dict[_Identity, ImageFacts]:
        """Return what is known of these files as they are now."""
        known: dict[_Identity, ImageFacts] = {}
        if self._database is None:
            return known
        wanted = {identity.path: identity for identity in identities if identity.mtime}
        paths = list(wanted)
        with _forgiven():
            for start in range(0, len(paths), 500):
                some = paths[start : start + 500]
                marks = ",".join("?" * len(some))
                rows = self._database.execute(f"select * from images where path in ({marks})", some)
                for path, size, mtime, width, height, orientation, digest, decoded, channels, bits, fault in rows:
                    identity = wanted[path]
                    if (size, mtime) == (identity.size, identity.mtime) and decoded >= decode:
                        header = Header(width, height, orientation)
                        known[identity] = ImageFacts(header, digest, channels, bits, fault)
        return known

    def remember(self, found: dict[_Identity, ImageFacts], decoded: bool) -> None:
        if self._database is None:
            return
        rows = [
            (i.path, i.size, i.mtime, *f.header, f.digest, int(decoded), f.channels, f.difference_hash, f.fault)
            for i, f in found.items()
            if i.mtime
        ]
        if not rows:
            return
        with _forgiven(), self._database:
            (count,) = self._database.execute("select count(*) from images").fetchone()
            if count + len(rows) > _MOST_REMEMBERED:
                self._database.execute("delete from images")
            marks = ",".join("?" * len(rows[0]))
            self._database.executemany(f"insert or replace into images values ({marks})", rows)


@contextlib.contextmanager
def _forgiven() -> Iterator[None]:
    with contextlib.suppress(sqlite3.Error, OSError):
        yield
