"""Pipe input mode: one FIFO per channel and epoch, and the RecordIO framing of what goes through it."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import os
import random
import select
import threading
from collections.abc import Callable
from pathlib import Path

from detkit.recordio import RecordWriter
from detkit_sagemaker.testing.refusals import Refused
from detkit_sagemaker.testing.storage import Item, Storage

Record = Callable[[], list[bytes]]
"""Reads the parts of one record: one part for a plain object, one per attribute of an augmented manifest's line."""


class Pipe:
    """The stream of a channel: ``<channel>_0`` for the first epoch, ``<channel>_1`` for the next, and so on."""

    def __init__(
        self, path: Path, records: list[Record], wrapped: bool, seed: int | None, over: threading.Event
    ) -> None:
        self._path, self._records, self._wrapped, self._seed, self._over = path, list(records), wrapped, seed, over
        self._fifo(0)

    def feed(self) -> None:
        """Write epoch after epoch, each as soon as it is read, until the job is over."""
        epoch = 0
        while (out := self._opened(epoch)) is not None:
            try:
                self._write_all(out)
            except BrokenPipeError:
                pass  # the reader has enough of this epoch
            finally:
                # A reader that sees the end of this epoch opens the next one at once.
                self._fifo(epoch + 1)
                os.close(out)
            epoch += 1

    def _fifo(self, epoch: int) -> Path:
        fifo = self._path.with_name(f"{self._path.name}_{epoch}")
        with contextlib.suppress(FileExistsError):
            os.mkfifo(fifo)
        return fifo

    def _opened(self, epoch: int) -> int | None:
        if self._seed is not None:
            random.Random(self._seed + epoch).shuffle(self._records)  # noqa: S311
        while not self._over.wait(0.02):
            try:
                return os.open(self._fifo(epoch), os.O_WRONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno != errno.ENXIO:  # no one reads yet
                    return None
        return None

    def _write_all(self, out: int) -> None:
        for record in self._records:
            for part in record():
                left = memoryview(framed(part) if self._wrapped else part)
                while left:
                    if self._over.is_set():
                        raise BrokenPipeError
                    if select.select([], [out], [], 0.1)[1]:
                        left = left[os.write(out, left) :]


def framed(content: bytes) -> bytes:
    """Return content as a RecordIO record."""
    record = io.BytesIO()
    RecordWriter(record).write(0, content)
    return record.getvalue()


def objects(storage: Storage, items: list[Item], compressed: bool) -> list[Record]:
    """Return the objects of a channel as records, unpacked where they are gzip files."""

    def read(item: Item) -> list[bytes]:
        content = storage.read(f"s3://{item.bucket}/{item.key}")
        return [gzip.decompress(content) if compressed else content]

    return [lambda item=item: read(item) for item in items]  # type: ignore[misc]


def augmented(storage: Storage, uri: str, attributes: list[str]) -> list[Record]:
    """Return the lines of an augmented manifest as records: the object of a ``-ref`` attribute, else its JSON text."""

    def read(line: dict[str, object]) -> list[bytes]:
        return [
            storage.read(str(line[name])) if name.endswith("-ref") else json.dumps(line[name]).encode()
            for name in attributes
        ]

    lines = []
    for number, text in enumerate(storage.read(uri).decode().splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            missing = [name for name in attributes if name not in line]
        except (ValueError, TypeError) as error:
            raise Refused(f"{uri}, line {number}: no JSON object") from error
        if missing:
            raise Refused(f"{uri}, line {number}: attribute {missing[0]} is missing")
        lines.append(line)
    return [lambda line=line: read(line) for line in lines]  # type: ignore[misc]
