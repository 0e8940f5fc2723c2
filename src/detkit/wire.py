"""Prediction over HTTP, by SageMaker's hosting contract: ``GET /ping`` and ``POST /invocations``.

A request to ``/invocations`` is one image file (content type ``image/*``), or a batch of type
``application/x-detkit-images``: four bytes of little-endian header length, a JSON header
``{"images": [{"path", "bytes", "shape"?}]}``, then the payloads one after the other. An entry with ``shape``
``[height, width, 3]`` is raw RGB uint8, one without is an image file as it lies on disk. Pixels are never re-encoded.
The answer is JSON: ``{"classes": [...], "images": [...]}`` with one `detkit.data.Detections.to_dict` per image.

Source of the contract: Amazon SageMaker developer guide, "Use Your Own Inference Code with Hosting Services".
"""

from __future__ import annotations

import http.client
import json
import socket
import struct
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer

import msgspec
import numpy as np

from detkit import images
from detkit.data import Detections
from detkit.errors import DetkitError, RunFailed
from detkit.images import Image

CONTENT_TYPE = "application/x-detkit-images"

MAX_REQUEST_BYTES = 1 << 30
"""Larger requests are refused before they are read."""


def encode_images(batch: Sequence[Image], paths: Sequence[str] | None = None) -> bytes:
    """Pack ``(h, w, 3)`` uint8 images into one request body."""
    names = paths or [""] * len(batch)
    header = json.dumps(
        {
            "images": [
                {"path": name, "bytes": image.nbytes, "shape": image.shape}
                for image, name in zip(batch, names, strict=True)
            ]
        }
    ).encode()
    return b"".join([struct.pack("<I", len(header)), header, *(np.ascontiguousarray(i).tobytes() for i in batch)])


def decode_images(body: bytes, content_type: str = CONTENT_TYPE) -> tuple[list[Image], list[str]]:
    """Unpack a request body to images and their paths. Raises `DetkitError` for one that is malformed."""
    if content_type.startswith("image/"):
        return [images.read_image(body)], [""]
    if content_type != CONTENT_TYPE:
        raise DetkitError(f"content type {content_type!r} is not known; expected image/* or {CONTENT_TYPE}")
    try:
        (length,) = struct.unpack_from("<I", body)
        header = json.loads(body[4 : 4 + length])
        at = 4 + length
        batch, paths = [], []
        for entry in header["images"]:
            payload = body[at : at + entry["bytes"]]
            at += entry["bytes"]
            if "shape" in entry:
                batch.append(np.frombuffer(bytearray(payload), dtype=np.uint8).reshape(entry["shape"]))
            else:
                batch.append(images.read_image(payload, entry.get("path", "")))
            paths.append(str(entry.get("path", "")))
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise DetkitError(f"the request is malformed: {error}") from None
    if at != len(body):
        raise DetkitError(f"the request has {len(body)} bytes, its header tells of {at}")
    return batch, paths


def encode_detections(found: Sequence[Detections]) -> bytes:
    """Pack detections into a response body."""
    classes = found[0].classes if found else ()
    return msgspec.json.encode({"classes": classes, "images": [d.to_dict() for d in found]})


def decode_detections(body: bytes) -> list[Detections]:
    """Unpack what `encode_detections` packed."""
    answer = msgspec.json.decode(body)
    return [Detections.from_dict(record, answer["classes"]) for record in answer["images"]]


class Client:
    """A connection to one prediction server, kept open between requests."""

    def __init__(self, host: str, port: int, timeout_s: float = 600.0) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=timeout_s)

    def detect(self, batch: Sequence[Image], paths: Sequence[str] | None = None) -> list[Detections]:
        """Send images and return their detections, in order. Raises `RunFailed` with the server's reason."""
        try:
            headers = {"Content-Type": CONTENT_TYPE}
            self._connection.request("POST", "/invocations", encode_images(batch, paths), headers)
            response = self._connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise RunFailed(f"the prediction worker does not answer: {error or type(error).__name__}") from error
        if response.status != 200:
            raise RunFailed(f"the prediction worker answered {response.status}: {body.decode(errors='replace')}")
        return decode_detections(body)

    def close(self) -> None:
        self._connection.close()


def serve(detect: Callable[[list[Image], list[str]], list[Detections]], server_socket: socket.socket) -> None:
    """Answer requests on a listening socket until the process ends, one at a time: a model runs one batch at a time."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._answer(200 if self.path == "/ping" else 404, b"{}")

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            if self.path != "/invocations" or length > MAX_REQUEST_BYTES:
                self.close_connection = True
                self._answer(404 if self.path != "/invocations" else 413, b"{}")
                return
            try:
                batch, paths = decode_images(self.rfile.read(length), self.headers.get("Content-Type", ""))
                self._answer(200, encode_detections(detect(batch, paths)))
            except DetkitError as error:
                self._answer(400, json.dumps({"error": str(error)}).encode())
            except Exception as error:
                self._answer(500, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())

        def _answer(self, status: int, body: bytes) -> None:
            reason = self.responses[status][0]
            head = (
                f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            self.wfile.write(head.encode() + body)  # one write: header and body in two cost 44 ms a call

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing; failures travel in the answer."""

    server = HTTPServer(server_socket.getsockname(), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = server_socket
    server.serve_forever()
