"""Bare ONNX files: the manifest in their metadata, and the model's folder that is made of it.

ONNX is protocol buffers. Only the outermost fields are looked at, and the graph is skipped, so that neither onnx nor
ONNX Runtime is needed to recognise a file, and no native code sees one that nobody has asked to run.
The encoding: https://protobuf.dev/programming-guides/encoding; the field: ``ModelProto.metadata_props`` in
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from detkit.errors import StorageError, UsageError
from detkit.files import cache_folder, file_sha256, place, write_json
from detkit.graphs import ONNX, PROPERTY, Graph
from detkit.job import SCHEMA, Artifact, Manifest, Model

GRAPH = "model.onnx"
_METADATA = 14
_KEY, _VALUE = 1, 2
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
"""Kinds of fields."""
_MOST_BYTES = 64 << 20
"""Metadata longer than this is nobody's manifest."""
_MOST_FIELDS = 100_000
"""An ONNX file has fewer fields, which are operators' functions and a few others."""
_LAST_NUMBER = (1 << 29) - 1
"""Numbers of fields are 1 to this."""


def read_model(file: Path) -> Model:
    """Return an ONNX file that detkit wrote as a model, in a folder of the cache.

    Which images it has seen is not in the file, so evaluations warn. Raises `UsageError` for a file that is no ONNX,
    or of another maker.
    """
    manifest = read_manifest(file)
    sha256 = file_sha256(file)
    folder = _folder(sha256)
    _link(file, folder / GRAPH)
    graph = {**manifest.native["graph"], "file": GRAPH}
    artifacts = {GRAPH: Artifact(sha256=sha256, bytes=file.stat().st_size)}
    native = {**manifest.native, "graph": graph}
    write_json(folder / "detkit.json", msgspec.structs.replace(manifest, native=native, artifacts=artifacts))
    return Model(folder)


def read_manifest(file: Path) -> Manifest:
    """Return the manifest that an ONNX file carries. Raises `UsageError` where it has none that can be opened."""
    try:
        with file.open("rb") as stream:
            content = _metadata(stream, file.stat().st_size, PROPERTY)
    except OSError as error:
        raise StorageError(file, error) from error
    except ValueError as error:
        raise UsageError(f"{file} is no whole ONNX file: {error}; copy it again") from None
    if content is None:
        raise UsageError(
            f"{file} was not written by detkit: it has no metadata property {PROPERTY!r}, which says the class names, "
            "how images are prepared, and what the outputs are; `detkit export RUN onnx` writes files that have it"
        )
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
        graph = msgspec.convert(manifest.native.get("graph"), Graph)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise UsageError(
            f"the metadata property {PROPERTY!r} of {file} was written by another version of detkit, or is damaged: "
            f"{error}; export it again"
        ) from None
    if manifest.schema > SCHEMA or manifest.engine != ONNX["engine"] or graph.format != "onnx":
        raise UsageError(f"{file} is for {manifest.engine}, not {ONNX['engine']}, or for a newer detkit; upgrade it")
    # Nothing in a file that came alone may choose what runs here.
    return msgspec.structs.replace(manifest, backend=ONNX["backend"], options={}, code=None)


def _folder(sha256: str) -> Path:
    cache = cache_folder()
    if cache is None:
        return _passing_folder(sha256)
    try:
        folder = cache / "opened" / sha256
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _passing_folder(sha256)
    return folder


@functools.cache
def _passing_folder(sha256: str) -> Path:
    """Return a folder for as long as this process lives, where nothing is to be kept."""
    holder = tempfile.TemporaryDirectory(prefix="detkit-onnx-")
    _passing.append(holder)
    return Path(holder.name)


_passing: list[tempfile.TemporaryDirectory[str]] = []


def _link(file: Path, target: Path) -> None:
    """Make the file appear there, also where an earlier one of the same content has gone or changed since."""
    with contextlib.suppress(OSError):
        if target.samefile(file):
            return
    beside = target.with_name(f".{secrets.token_hex(8)}")
    place(file, beside)
    os.replace(beside, target)


def _metadata(stream: IO[bytes], size: int, name: str) -> bytes | None:
    """Return the last metadata property of a name. Raises ValueError where the bytes are no message."""
    found = None
    for number, length in _fields(stream, size):
        if number != _METADATA:
            stream.seek(length, os.SEEK_CUR)
            continue
        if length > _MOST_BYTES:
            raise ValueError(f"metadata of {length} bytes")
        end = stream.tell() + length
        entry = {key: stream.read(part) for key, part in _fields(stream, end) if key in {_KEY, _VALUE}}
        if entry.get(_KEY) == name.encode():
            found = entry.get(_VALUE, b"")
    if not size:
        raise ValueError("it is empty")
    return found


def _fields(stream: IO[bytes], end: int) -> Iterator[tuple[int, int]]:
    """Yield number and length of each field of bytes up to ``end``, the stream where its bytes begin."""
    count = 0
    while stream.tell() < end:
        tag = _varint(stream)
        number, kind = tag >> 3, tag & 7
        count += 1
        if not 1 <= number <= _LAST_NUMBER or count > _MOST_FIELDS:
            raise ValueError(f"what is at byte {stream.tell()} is no field, or there are too many")
        if kind == _VARINT:
            _varint(stream)
            continue
        length = _varint(stream) if kind == _BYTES else {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind)
        if length is None or stream.tell() + length > end:
            raise ValueError(f"a field at byte {stream.tell()} is cut off, or none")
        after = stream.tell() + length
        if kind == _BYTES:
            yield number, length
        stream.seek(after)


def _varint(stream: IO[bytes]) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise ValueError("it ends within a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number has more than ten bytes")
