"""Prediction over HTTP, by SageMaker's hosting contract: ``GET /ping`` and ``POST /invocations``.

A request to ``/invocations`` is one image file (content type ``image/*``), or a batch of type
``application/x-detkit-images``: four bytes of little-endian header length, a JSON header
``{"images": [{"path", "bytes", "shape"?}]}``, then the payloads one after the other. An entry with ``shape``
``[height, width, 3]`` is raw RGB uint8, one without is an image file as it lies on disk. Pixels are never re-encoded.
The answer is JSON: ``{"classes": [...], "images": [...]}`` with one `detkit.detections.Detections.to_dict` per image.

A worker answers on the socket that it was started with, which nobody but its controller can reach. Where the two have
memory in common, the payloads lie there (`SHARED_CONTENT_TYPE`), and the request ends with the header.

Source of the contract: Amazon SageMaker developer guide, "Use Your Own Inference Code with Hosting Services".
"""

from __future__ import annotations

import http.client
import json
import math
import mmap
import os
import socket
import struct
import traceback
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from detkit import images
from detkit.detections import Detections
from detkit.errors import DetkitError, ImageError, RunFailed
from detkit.images import Image

CONTENT_TYPE = "application/x-detkit-images"

SHARED_CONTENT_TYPE = "application/x-detkit-shared-images"

REQUEST_BYTES = 256_000_000
"""A client sends so much at once; a single image that is larger goes alone."""


class Opened(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker prints, as one line, when it has opened a model or could not."""

    error: str
    """Why the model could not be opened; empty where it was."""


class Exported(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker prints, as one line, when it has written a model in another format or could not."""

    file: str
    """The main file."""
    error: str
    """Why there is none; empty where there is."""


class _Entry(msgspec.Struct):
    """One image of a request's header."""

    bytes: Annotated[int, Meta(ge=0)]
    path: str = ""
    shape: tuple[int, int, int] | None = None


class _Header(msgspec.Struct):
    images: list[_Entry]


def encode_images(batch: Sequence[Image], paths: Sequence[str] | None = None) -> list[bytes | memoryview]:
    """Pack ``(h, w, 3)`` uint8 images into one request body: buffers to send one after the other. Copies no pixels."""
    names = paths or [""] * len(batch)
    entries = [
        _Entry(bytes=image.nbytes, path=name, shape=image.shape) for image, name in zip(batch, names, strict=True)
    ]
    header = msgspec.json.encode(_Header(entries))
    return [struct.pack("<I", len(header)) + header, *(np.ascontiguousarray(i).reshape(-1).data for i in batch)]


def decode_images(
    body: bytes | bytearray | memoryview,
    content_type: str = CONTENT_TYPE,
    payloads: memoryview | None = None,
    *,
    most_pixels: float = math.inf,
) -> tuple[list[Image], list[str]]:
    """Unpack a request body to images and their paths. Raises `DetkitError` for one that is malformed.

    The images are views of the body, or of ``payloads`` where these lie elsewhere, as writable as it is. Those in files
    are not decoded where they have more than ``most_pixels`` together.
    """
    body, left = memoryview(body), most_pixels

    def read(content: bytes, path: str = "") -> Image:
        nonlocal left
        if left < math.inf:
            header = images.read_header(content, path)
            left -= header.width * header.height
            if left < 0:
                raise ImageError(path or "<bytes>", f"more than {most_pixels:.0f} pixels in one request")
        return images.read_image(content, path)

    if content_type.startswith("image/"):
        return [read(bytes(body))], [""]
    if content_type != CONTENT_TYPE:
        raise DetkitError(f"content type {content_type!r} is not known; expected image/* or {CONTENT_TYPE}")
    batch = []
    try:
        (length,) = struct.unpack_from("<I", body)
        at = 4 + length
        header = msgspec.json.decode(body[4:at], type=_Header)
        if payloads is not None:
            body, at = payloads[: sum(entry.bytes for entry in header.images)], 0
        for entry in header.images:
            if entry.shape is None:
                batch.append(read(bytes(body[at : at + entry.bytes]), entry.path))
            else:
                batch.append(np.frombuffer(body, np.uint8, entry.bytes, at).reshape(entry.shape))
            at += entry.bytes
    except (struct.error, ValueError, msgspec.DecodeError) as error:
        raise DetkitError(f"the request is malformed: {error}") from None
    if at != len(body):
        raise DetkitError(f"the request has {len(body)} bytes, its header tells of {at}")
    return batch, [entry.path for entry in header.images]


def encode_detections(found: Sequence[Detections]) -> bytes:
    """Pack detections into a response body."""
    classes = found[0].classes if found else ()
    return msgspec.json.encode({"classes": classes, "images": [d.to_dict() for d in found]})


def decode_detections(body: bytes) -> list[Detections]:
    """Unpack what `encode_detections` packed."""
    answer = msgspec.json.decode(body)
    return [Detections.from_dict(record, answer["classes"]) for record in answer["images"]]


class Client:
    """One side of a connection, kept open between requests; `serve` is at the other."""

    def __init__(self, connected: socket.socket, shared: SharedMemory | None = None) -> None:
        self._shared = shared
        self._connection = http.client.HTTPConnection("worker")
        self._connection.sock = connected
        self._connection.auto_open = 0

    def detect(self, batch: Sequence[Image], paths: Sequence[str] | None = None) -> list[Detections]:
        """Send images and return their detections, in order.

        Raises `RunFailed` with the server's reason, and `ConnectionError` where no answer came.
        """
        names = paths or [""] * len(batch)
        found: list[Detections] = []
        start = size = 0
        for i, image in enumerate(batch):
            if i > start and size + image.nbytes > REQUEST_BYTES:
                found += self._request(batch[start:i], names[start:i])
                start, size = i, 0
            size += image.nbytes
        return found + self._request(batch[start:], names[start:])

    def _request(self, batch: Sequence[Image], paths: Sequence[str]) -> list[Detections]:
        head, *payloads = encode_images(batch, paths)
        size = sum(map(len, payloads))
        body, content_type = [head, *payloads], CONTENT_TYPE
        if self._shared is not None and size <= REQUEST_BYTES:
            self._shared.put(payloads)
            body, content_type = [head], SHARED_CONTENT_TYPE
        headers = {"Content-Type": content_type, "Content-Length": str(sum(map(len, body)))}
        try:
            self._connection.request("POST", "/invocations", body, headers)
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise ConnectionError(str(error) or type(error).__name__) from error
        if response.status != 200:
            raise RunFailed(msgspec.json.decode(answer)["error"])
        return decode_detections(answer)

    def close(self) -> None:
        self._connection.close()
        if self._shared is not None:
            self._shared.close()


class SharedMemory:
    """Memory that a worker and its controller both look into: pixels are copied once, and not through a socket.

    An image in it is another one with the next request.
    """

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)  # what a worker starts has no use for it
        self.descriptor = descriptor
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls) -> SharedMemory | None:
        """Make some, without a name; None where the system cannot (only Linux can)."""
        return cls(os.memfd_create("detkit")) if hasattr(os, "memfd_create") else None

    def put(self, payloads: Sequence[bytes | memoryview]) -> None:
        """Lay the payloads of a request one after the other."""
        size = sum(map(len, payloads))
        if os.fstat(self.descriptor).st_size < size:
            os.ftruncate(self.descriptor, size)
        view, at = self.view(), 0
        for payload in payloads:
            view[at : at + len(payload)] = payload
            at += len(payload)

    def view(self) -> memoryview:
        """Return all of it."""
        size = os.fstat(self.descriptor).st_size
        if size and (self._map is None or len(self._map) < size):
            self._map = mmap.mmap(self.descriptor, size)
        return memoryview(self._map or b"")

    def close(self) -> None:
        """Let go of it; pages go when both sides have."""
        self._map = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1


def serve(
    detect: Callable[[list[Image], list[str]], list[Detections]],
    connected: socket.socket,
    shared: SharedMemory | None = None,
) -> None:
    """Answer requests one at a time, as a model runs one batch at a time, until the other side closes."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(200 if self.path == "/ping" else 404, b"{}")

        def do_POST(self) -> None:
            if self.path != "/invocations":
                self.close_connection = True
                self._answer(404, b"{}")
                return
            length = int(self.headers.get("Content-Length", 0))
            body = memoryview(bytearray(length))
            if self.rfile.readinto(body) < length:
                self.close_connection = True
                return
            try:
                kind = self.headers.get("Content-Type", "")
                if kind == SHARED_CONTENT_TYPE and shared is not None:
                    batch, paths = decode_images(body, payloads=shared.view())
                else:
                    batch, paths = decode_images(body, kind)
                self._answer(200, encode_detections(detect(batch, paths)))
            except DetkitError as error:
                self._answer(400, json.dumps({"error": str(error)}).encode())
            except Exception as error:
                traceback.print_exc()
                self._answer(500, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())

        def _answer(self, status: int, body: bytes) -> None:
            reason = self.responses[status][0]
            head = (
                f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            self.wfile.write(head.encode() + body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing; failures travel in the answer."""

    Handler(connected, "", None)  # type: ignore[arg-type]  # handles until the end; there is no server
