"""Images at URLs: fetched from a real server, and from nowhere unless somebody says so."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from detkit import Dataset, Predictor, Run, Trainer, fetching
from detkit.errors import ImageError, UsageError
from detkit.fetching import fetch
from detkit.testing import tiny_dataset


class Server:
    """A web server of this machine with some pages; ``asked`` are the paths that were asked for."""

    def __init__(self) -> None:
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                code, headers, body = outer.pages.get(self.path, (404, {}, b"nothing"))
                self.send_response(code)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_words: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def redirect(self, path: str, to: str) -> str:
        self.pages[path] = (302, {"Location": to}, b"")
        return self.url + path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever)
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def png(side: int = 96) -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(np.full((side, side, 3), 99, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def test_bytes_come_as_they_are(server: Server) -> None:
    server.pages["/a.png?token=1"] = (200, {}, png())
    assert fetch(f"{server.url}/a.png?token=1") == png()
    assert fetch(server.redirect("/moved.png", "/a.png?token=1")) == png()


def test_what_servers_say_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match=rf"cannot read image {server.url}/none.png: the server answers 404 Not Found"):
        fetch(f"{server.url}/none.png")
    server.pages["/cut.png"] = (200, {"Content-Length": "999999"}, png())
    with pytest.raises(ImageError, match=r"cut.png: .*(ends after|IncompleteRead|timed out)"):
        monkeypatch.setattr(fetching, "_PATIENCE_S", 0.5)
        fetch(f"{server.url}/cut.png")
    monkeypatch.setattr(fetching, "LIMIT", 1_000_000)
    server.pages["/large.png"] = (200, {}, bytes(1_000_001))
    with pytest.raises(ImageError, match=r"large.png: it is larger than 1 MB; download it yourself"):
        fetch(f"{server.url}/large.png")
    with pytest.raises(ImageError, match="Connection refused"):
        fetch("http://127.0.0.1:9/a.png")


@pytest.mark.parametrize("part", ["status", "headers", "body"])
def test_a_server_that_trickles_is_left_at_the_deadline(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and all of them never would."""
    head = {"status": b"", "headers": b"HTTP/1.0 200 OK\r\nX: ", "body": b"HTTP/1.0 200 OK\r\n\r\n"}[part]
    left = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(head)
                for _ in range(300):
                    connection.sendall(b"H")
                    if left.wait(0.02):
                        break

        thread = threading.Thread(target=trickle)
        thread.start()
        monkeypatch.setattr(fetching, "_DEADLINE_S", 0.3)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        began = time.monotonic()
        with pytest.raises(ImageError, match=r"a.png: it did not arrive within 0.3 s"):
            fetch(f"http://127.0.0.1:{listening.getsockname()[1]}/a.png")
        assert time.monotonic() - began < 4
        left.set()
        thread.join()


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "data:image/png;base64,AA"])
def test_redirects_lead_to_the_web_only(to: str, server: Server) -> None:
    with pytest.raises(ImageError, match=r"a.png: .*[Rr]edirect(s|ion) to") as caught:
        fetch(server.redirect("/a.png", to))
    assert to in str(caught.value)


def test_redirects_in_a_circle_end(server: Server) -> None:
    with pytest.raises(ImageError, match="the server answers 302"):
        fetch(server.redirect("/a.png", "/a.png"))
    assert len(server.asked) < 20


def test_no_redirect_from_https_to_http() -> None:
    redirects, request = fetching._Redirects(), fetching.urllib.request.Request("https://127.0.0.1/a.png")
    with pytest.raises(fetching.URLError, match="which is not followed"):
        redirects.redirect_request(request, io.BytesIO(), 302, "Found", {}, "http://127.0.0.1/a.png")
    followed = redirects.redirect_request(request, None, 302, "Found", {}, "https://127.0.0.1/b.png")
    assert followed.full_url == "https://127.0.0.1/b.png"


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Dataset]:
    folder = tmp_path_factory.mktemp("fetching")
    data = tiny_dataset(folder / "images", num_images=4)
    return Trainer(model="echo/memory", epochs=8).fit(data, data, name=str(folder / "run"), quiet=True), data


def test_a_predictor_fetches_only_where_it_may(memory: tuple[Run, Dataset], server: Server) -> None:
    run, data = memory
    for i, path in enumerate(data.paths):
        server.pages[f"/{i}"] = (200, {}, Path(path).read_bytes())
    urls = [f"{server.url}/{i}" for i in range(4)]
    with Predictor(run) as predictor:
        for source in (urls[0], urls, iter(urls)):
            with pytest.raises(UsageError, match=r"is a URL, and nothing is fetched unless you say so: fetch=True"):
                list(predictor.predict(source))
        with pytest.raises(UsageError, match="nothing is fetched"):
            predictor(urls[0])
        assert server.asked == []
        found = list(predictor.predict([*urls, data], fetch=True))
        assert [one.path for one in found] == [*urls, *data.paths]
        assert [one.names for one in found[:4]] == [one.names for one in found[4:]]
        assert predictor(urls[1], fetch=True).names == found[1].names
        with pytest.raises(UsageError, match="is a video; download it"):
            list(predictor.predict(f"{server.url}/a.mp4?x=1", fetch=True))
        with pytest.raises(ImageError, match="5: the server answers 404"):
            list(predictor.predict([f"{server.url}/5"], fetch=True))
