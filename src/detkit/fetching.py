"""Images at URLs, for those who ask for them."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.request
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from detkit import remote
from detkit.errors import ImageError, UsageError

LIMIT = 100_000_000
"""Bytes of the largest answer that is taken."""
_PATIENCE_S, _DEADLINE_S = 20.0, 120.0
"""Seconds without a byte, and for all of the answer with its headers and redirects."""
_PIECE = 1 << 16
_WEB = ("http", "https")


def fetch(url: str) -> bytes:
    """Return the bytes of an image at a URL: ``http(s)://``, or what `detkit.remote` reads. Raises `ImageError`.

    Redirects lead to ``http(s)://`` only, and from ``https://`` never to ``http://``; addresses of your own network are
    not left out, so fetch only what you trust.
    """
    scheme = urlsplit(url).scheme.lower()
    try:
        return _from_web(url) if scheme in _WEB else remote.read(url)
    except HTTPError as error:
        error.close()
        raise ImageError(url, f"the server answers {error.code} {error.reason}") from error
    except URLError as error:
        raise ImageError(url, str(error.reason)) from error
    except (OSError, HTTPException, ValueError, UsageError) as error:
        raise ImageError(url, str(error) or type(error).__name__) from error


def _from_web(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "detkit", "Accept": "image/*"})  # noqa: S310
    deadline = _Deadline(_DEADLINE_S)
    try:
        with deadline, _opener(deadline).open(request, timeout=_PATIENCE_S) as answer:
            content = _content(url, answer)
    except (OSError, HTTPException, ImageError):
        if not deadline.passed:
            raise
    if deadline.passed:
        raise ImageError(url, f"it did not arrive within {_DEADLINE_S:g} s")
    return content


def _content(url: str, answer: Any) -> bytes:
    pieces, size = [], 0
    while piece := answer.read1(_PIECE):
        size += len(piece)
        if size > LIMIT:
            raise ImageError(url, f"it is larger than {LIMIT // 1_000_000} MB; download it yourself")
        pieces.append(piece)
    announced = answer.headers.get("Content-Length", "")
    if announced.isdigit() and int(announced) != size:
        raise ImageError(url, f"the answer ends after {size} of {announced} bytes")
    return b"".join(pieces)


class _Deadline:
    """Shuts the connections made with `connect` after some seconds, whatever of an answer is waited for."""

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._made: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def connect(self, *address: Any, **more: Any) -> socket.socket:
        """Return what `socket.create_connection` does."""
        made = socket.create_connection(*address, **more)
        with self._lock:
            self._made.append(made.dup())  # TLS takes the first one's descriptor away
        if self.passed:
            self._shut()
        return made

    def _end(self) -> None:
        self.passed = True
        self._shut()

    def _shut(self) -> None:
        with self._lock:
            for one in self._made:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_error: object) -> None:
        self._timer.cancel()
        with self._lock:
            while self._made:
                self._made.pop().close()


class _Web(urllib.request.HTTPHandler):
    """Opens connections that a deadline ends."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: Any) -> Any:
        return self.do_open(self._connecting(HTTPConnection), req)

    def https_open(self, req: Any) -> Any:
        return self.do_open(self._connecting(HTTPSConnection), req)

    def https_request(self, req: Any) -> Any:
        return self.do_request_(req)

    def _connecting(self, kind: Callable[..., Any]) -> Any:
        def connection(*host: Any, **more: Any) -> Any:
            made = kind(*host, **more)
            made._create_connection = self._deadline.connect
            return made

        return connection


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, *answer: Any) -> Any:
        newurl = answer[-1]
        before, after = urlsplit(req.full_url).scheme.lower(), urlsplit(newurl).scheme.lower()
        if after not in _WEB or (before == "https" and after == "http"):
            answer[0].close()
            raise URLError(f"it redirects to {newurl}, which is not followed")
        return super().redirect_request(req, *answer)


def _opener(deadline: _Deadline) -> urllib.request.OpenerDirector:
    """Return what knows http(s) alone: neither files nor FTP."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        _Web(deadline),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener
