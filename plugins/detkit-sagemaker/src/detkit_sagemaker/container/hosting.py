"""SageMaker's contract of hosting: ``GET /ping``, ``POST /invocations``, ``GET /execution-parameters``.

Source: Amazon SageMaker developer guide, "Use Your Own Inference Code with Hosting Services" and "... with Batch
Transform".
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import NamedTuple, TypeAlias

from detkit.errors import DetkitError

PORT = 8080
_PIECE, _LINE, _DIGITS = 1 << 20, 1 << 10, 12
_PATIENCE_S = 60.0
"""For a client that sends nothing more; the platform itself waits no longer for an answer."""

MOST_BYTES = 100 << 20
"""Of one request; the most that batch transform sends. Endpoints get 25 MB."""

PARAMETERS = {"MaxConcurrentTransforms": 1, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 20}
"""What batch transform takes where it was told nothing else."""


class Request(NamedTuple):
    """The body of a request to ``/invocations``, and the headers that SageMaker passes on."""

    body: memoryview
    content_type: str
    """Lower case, without parameters."""
    accept: str
    """As it came; ``*/*`` where there was none."""


Answer: TypeAlias = Callable[[Request], bytes]
"""Returns JSON. Raises `Refused` or any `DetkitError` for a request that cannot be answered."""


class Refused(DetkitError):
    """A request that is refused with a status of its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def in_batch() -> bool:
    """Return whether this is a batch transform job, which fails as a whole where one request does."""
    return os.environ.get("SAGEMAKER_BATCH", "").lower() == "true"


def host(load: Callable[[], Answer], *, batch_error: Callable[[str], bytes] | None = None) -> int:
    """Serve until SIGTERM; ``load`` opens the model, and until it has, ``/ping`` answers 503.

    ``batch_error`` makes the answer of an image that cannot be read in a batch transform job, which would fail by it.
    Returns an exit code where the model cannot be opened, after saying why. ``DETKIT_PORT`` is a port of the loopback,
    for a simulator; without it, it is 8080 of every interface, as the platform wants.
    """
    signal.signal(signal.SIGTERM, _end)
    port = os.environ.get("DETKIT_PORT")
    address = ("127.0.0.1", int(port)) if port else ("0.0.0.0", PORT)  # noqa: S104  # nobody else reaches a container
    server = _Server(address, batch_error if in_batch() else None)
    threading.Thread(target=server.serve_forever, daemon=True, name="http").start()
    try:
        server.answer = load()
    except DetkitError as error:
        print(f"the model cannot be opened: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception:
        print("the model cannot be opened:", file=sys.stderr)
        traceback.print_exc()
        return 3
    print(f"answering on port {server.server_address[1]}", flush=True)
    threading.Event().wait()
    return 0


def _end(signum: int, frame: FrameType | None) -> None:
    sys.exit(0)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], batch_error: Callable[[str], bytes] | None) -> None:
        self.answer: Answer | None = None
        self.batch_error = batch_error
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        self.allow_reuse_address = True
        ThreadingHTTPServer.server_bind(self)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = _PATIENCE_S
    server: _Server

    def do_GET(self) -> None:
        if self.path == "/ping":
            self._send(200 if self.server.answer is not None else 503, b"{}")
        elif self.path == "/execution-parameters":
            self._send(200, json.dumps(PARAMETERS).encode())
        else:
            self._fail(404, f"there is no {self.path}; this server has /ping, /invocations and /execution-parameters")

    def do_POST(self) -> None:
        try:
            self._send(200, self._answer())
        except DetkitError as error:
            status = error.status if isinstance(error, Refused) else 400
            if self.server.batch_error is not None and status in (400, 413):
                print(f"an image is left out: {error}", file=sys.stderr, flush=True)
                self._send(200, self.server.batch_error(str(error)))
            else:
                self._fail(status, str(error))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            traceback.print_exc()
            self._fail(500, f"{type(error).__name__}: {error}")

    def _answer(self) -> bytes:
        body = self._read()
        if self.path != "/invocations":
            raise Refused(404, f"there is no {self.path} to post to; it is /invocations")
        if self.server.answer is None:
            raise Refused(503, "the model is being loaded; try again when /ping answers 200")
        content_type = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        return self.server.answer(Request(body, content_type, self.headers.get("Accept") or "*/*"))

    def _read(self) -> memoryview:
        """Return the body. What is not read is cut off with the connection, lest it be taken for the next request.

        Memory is taken as the bytes come, not as the client promises them.
        """
        body = bytearray()
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := self._chunk_size():
                self._take(size, body)
                self.rfile.readline(_LINE)
            while self.rfile.readline(_LINE).strip():  # trailers
                pass
            return memoryview(body)
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) <= _DIGITS):
            raise self._refusal(411, "expected a Content-Length")
        self._take(int(length), body)
        return memoryview(body)

    def _chunk_size(self) -> int:
        text = self.rfile.readline(_LINE).partition(b";")[0].strip()
        try:
            return int(text, 16) if len(text) <= _DIGITS else MOST_BYTES + 1
        except ValueError:
            raise self._refusal(400, "a chunk's size is no hexadecimal number") from None

    def _take(self, size: int, body: bytearray) -> None:
        """Read so many bytes more."""
        if not 0 <= size <= MOST_BYTES - len(body):
            raise self._refusal(
                413, f"the request has {len(body) + size} bytes or more; at most {MOST_BYTES} are taken"
            )
        while size:
            piece = self.rfile.read(min(size, _PIECE))
            if not piece:
                raise ConnectionError("the client has gone")
            body += piece
            size -= len(piece)

    def _refusal(self, status: int, message: str) -> Refused:
        self.close_connection = True
        return Refused(status, message)

    def _fail(self, status: int, message: str) -> None:
        self._send(status, json.dumps({"error": message}).encode())

    def _send(self, status: int, body: bytes) -> None:
        """Send head and body in one write: in two, the second may wait 40 ms for the first one's acknowledgement."""
        reason = self.responses[status][0]
        head = [f"HTTP/1.1 {status} {reason}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        if self.close_connection:
            head.append("Connection: close")
        self.wfile.write("\r\n".join([*head, "", ""]).encode() + body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of requests that went well: the platform pings every few seconds."""
