"""MXNet's RecordIO: many records in one file, here images with their labels, read through a memory map.

A record is a frame: the magic word, a word of flag (3 bits) and length (29 bits), the payload, zeros up to a multiple
of four bytes. A payload that holds the magic word at a multiple of four bytes is cut there into parts (flag 1 first, 2
middle, 3 last; 0 is a whole record), and the reader puts the word back (dmlc-core, ``include/dmlc/recordio.h``). What
is written here is MXNet 1.9.1's own file, byte for byte.

A file of records with images is a *pack*. An image in it has a path, too: ``/data/train.rec#12345`` is the one whose
record begins at byte 12345.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from detkit.errors import BrokenRecord, InvalidData

Payload: TypeAlias = "memoryview | bytes"
"""A view of the map, or bytes of their own where the record is in several parts."""

Label: TypeAlias = "float | NDArray[np.float32]"
"""One number, or several."""

_MAGIC_WORD = 0xCED7230A
MAGIC = struct.pack("<I", _MAGIC_WORD)
LARGEST = 2**29 - 1
"""Bytes of the longest payload."""

_FRAME = struct.Struct("<4sI")
_HEADER = struct.Struct("<IfQQ")
_FLOAT = np.dtype("<f4")
_HEAD = struct.Struct("<4sIIfQQ")
"""A frame and the header in it."""
_READ_AT_ONCE = 448
"""Bytes, enough for a label of 20 objects; Python has a fast store for objects of up to 512."""
_BEGINNING = 8
"""Bytes of the image that tell its format."""
_OPEN_PACKS = 16
_MOST_DIGITS = 18
"""Of a byte offset; 2**59 bytes are no file."""


class RecordFile:
    """A file of records, mapped and never read as a whole. Raises `OSError` where it cannot be opened.

    One object serves any number of threads, and goes on after a fork.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        with open(path, "rb") as file:  # noqa: PTH123
            empty = os.fstat(file.fileno()).st_size == 0
            self._view = memoryview(b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def __iter__(self) -> Iterator[tuple[int, Payload]]:
        """Yield the byte offset and the payload of each record. Raises `BrokenRecord` behind the last sound one."""
        view, end, at, number = self._view, len(self._view), 0, 0
        unpack = _FRAME.unpack_from
        while at < end:
            if at + 8 <= end:
                magic, length = unpack(view, at)
                stop = at + 8 + length
                following = stop + (-length & 3)
                if magic == MAGIC and length <= LARGEST and following <= end:
                    yield at, view[at + 8 : stop]
                    at, number = following, number + 1
                    continue
            payload, following = self.assemble(at, number)
            yield at, payload
            at, number = following, number + 1

    def read(self, offset: int) -> Payload:
        """Return the payload of the record that begins at a byte. Raises `BrokenRecord`."""
        view, start = self._view, offset + 8
        if start <= len(view):
            magic, length = _FRAME.unpack_from(view, offset)
            if magic == MAGIC and length <= LARGEST and start + length <= len(view):
                return view[start : start + length]
        return self.assemble(offset, None)[0]

    def offsets(self) -> list[int]:
        """Return where each record begins, found without an ``.idx``. Raises `BrokenRecord`."""
        return [at for at, _ in self]

    def assemble(self, start: int, number: int | None) -> tuple[Payload, int]:
        """Return the payload of the record at a byte and where the next one begins; ``number`` is for the error."""
        view, end, at = self._view, len(self._view), start
        parts: list[memoryview] = []
        while True:
            if end - at < 8:
                what = f"the file ends at byte {end}, amid a frame; it is cut off"
                raise BrokenRecord(self.path, what, start, number)
            magic, word = _FRAME.unpack_from(view, at)
            flag, length = word >> 29, word & LARGEST
            stop = at + 8 + length
            if magic != MAGIC:
                what = f"expected the magic word {MAGIC.hex()} at byte {at}, found {magic.hex()}"
                raise BrokenRecord(self.path, what, start, number)
            if stop + (-length & 3) > end:
                what = f"{length} bytes are announced at byte {at} and {end - at - 8} are left; the file is cut off"
                raise BrokenRecord(self.path, what, start, number)
            if flag not in ((2, 3) if parts else (0, 1)):
                wanted = "the next part of the record" if parts else "the beginning of a record"
                raise BrokenRecord(self.path, f"expected {wanted} at byte {at}, found flag {flag}", start, number)
            parts.append(view[at + 8 : stop])
            at = stop + (-length & 3)
            if flag in {0, 3}:
                return (parts[0] if flag == 0 else MAGIC.join(parts)), at


def read_index(path: str | Path) -> dict[int, int]:
    """Return the byte offset of each key of an ``.idx`` file. Raises `InvalidData` naming the line, and `OSError`."""
    lines = Path(path).read_bytes().split(b"\n")
    index: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                key, offset = line.split()
                index[int(key)] = int(offset)
        except ValueError:
            shown = line[:80].decode(errors="replace")
            raise InvalidData(f"{path}: line {number}: expected a key and a byte offset, found {shown!r}") from None
    return index


class RecordWriter:
    """Writes records to an open binary file, and to a second one, where given, their index: ``key<TAB>offset``."""

    def __init__(self, file: IO[bytes], index: IO[bytes] | None = None) -> None:
        self._file = file
        self._index = index
        self._at = 0

    def write(self, key: int, payload: bytes) -> int:
        """Append a record and return its byte offset. Raises `InvalidData` for one of 2**29 bytes and more."""
        if len(payload) > LARGEST:
            raise InvalidData(
                f"record {key} has {len(payload)} bytes; RecordIO holds {LARGEST}. make the image smaller"
            )
        offset = self._at
        words = np.frombuffer(payload, "<u4", len(payload) // 4)
        cuts = (4 * np.flatnonzero(words == _MAGIC_WORD)).tolist()
        begin = 0
        for cut in cuts:
            self._write_part(2 if begin else 1, payload[begin:cut])
            begin = cut + 4
        self._write_part(3 if begin else 0, payload[begin:] if begin else payload)
        if self._index is not None:
            self._index.write(b"%d\t%d\n" % (key, offset))
        return offset

    def _write_part(self, flag: int, part: bytes) -> None:
        padding = -len(part) & 3
        self._file.write(b"".join((_FRAME.pack(MAGIC, flag << 29 | len(part)), part, bytes(padding))))
        self._at += _FRAME.size + len(part) + padding


class IRHeader(NamedTuple):
    """What stands before the image in a record."""

    flag: int
    """How many numbers the label has; 0 where it is a single one."""
    label: Label
    id: int
    id2: int = 0


def pack(label: float | Sequence[float] | NDArray[np.float32], number: int, image: bytes) -> bytes:
    """Return the payload of an image with its label and number; as ``mxnet.recordio.pack``."""
    if isinstance(label, (int, float)):
        return _HEADER.pack(0, label, number, 0) + image
    values = np.asarray(label, dtype=_FLOAT)
    return b"".join((_HEADER.pack(values.size, 0.0, number, 0), values.tobytes(), image))


def unpack(payload: Payload) -> tuple[IRHeader, Payload]:
    """Return a payload's header and the bytes of its image, both views of it. Raises `InvalidData`."""
    if len(payload) < _HEADER.size:
        raise InvalidData(f"{len(payload)} bytes are too few for the header of an image, which has {_HEADER.size}")
    flag, label, number, number2 = _HEADER.unpack_from(payload)
    if not flag:
        return IRHeader(0, label, number, number2), payload[_HEADER.size :]
    image = _HEADER.size + 4 * flag
    if image > len(payload):
        raise InvalidData(f"a label of {flag} numbers is announced in a record of {len(payload)} bytes")
    return IRHeader(flag, np.frombuffer(payload, _FLOAT, flag, _HEADER.size), number, number2), payload[image:]


def read_labels(path: str | Path) -> Iterator[tuple[int, int, Label, bytes]]:
    """Yield the byte offset, number and label of each record with an image, and the first bytes of the image.

    Small reads cost less than mapping the pages between the labels. Raises `BrokenRecord` behind the last sound one,
    and `OSError`.
    """
    frames = RecordFile(path)
    with Path(path).open("rb", buffering=0) as file:
        descriptor, end, at, record = file.fileno(), os.fstat(file.fileno()).st_size, 0, 0
        unpack_head, pread, labels = _HEAD.unpack_from, os.pread, _HEAD.size
        while at < end:
            head = pread(descriptor, _READ_AT_ONCE, at)
            if len(head) >= labels:
                magic, length, flag, label, number, _ = unpack_head(head)
                following = at + 8 + length + (-length & 3)
                image = labels + 4 * flag
                if magic == MAGIC and length <= LARGEST and image <= 8 + length and following <= end:
                    if image + _BEGINNING > len(head):
                        head = pread(descriptor, image + _BEGINNING, at)
                    if flag:
                        label = np.frombuffer(head[labels:image], _FLOAT)
                    yield at, number, label, head[image : min(image + _BEGINNING, 8 + length)]
                    at, record = following, record + 1
                    continue
            payload, following = frames.assemble(at, record)
            try:
                header, content = unpack(payload)
            except InvalidData as error:
                raise BrokenRecord(path, str(error), at, record) from None
            yield at, header.id, header.label, bytes(content[:_BEGINNING])
            at, record = following, record + 1


def open_pack(path: str | Path) -> RecordFile:
    """Return a pack, the same object as long as the file has not changed. Raises `OSError`."""
    status = Path(path).stat()
    return _opened(os.path.abspath(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=_OPEN_PACKS)
def _opened(path: str, *_identity: int) -> RecordFile:
    return RecordFile(path)


def packed(path: str | Path) -> tuple[str, int] | None:
    """Return the pack and the byte offset that the path of an image in a pack names; None for any other path.

    >>> packed("/data/train.rec#12345"), packed("/data/a#1.jpg")
    (('/data/train.rec', 12345), None)
    """
    pack_path, sign, digits = os.fspath(path).rpartition("#")
    if not sign or pack_path[-4:].lower() != ".rec" or not (digits.isascii() and digits.isdigit()):
        return None
    if len(digits) > _MOST_DIGITS or Path(path).exists():
        return None
    return pack_path, int(digits)


def packed_image(path: str, offset: int) -> Payload:
    """Return the bytes of the image in the record at an offset. Raises `BrokenRecord`, and `OSError` for the file."""
    try:
        return unpack(open_pack(path).read(offset))[1]
    except BrokenRecord:
        raise
    except InvalidData as error:
        raise BrokenRecord(path, str(error), offset) from None
