"""The /invocations contract, spoken to a real prediction worker."""

from __future__ import annotations

import http.client
import io
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from detkit import Dataset, Detections, Model, Predictor, Trainer, wire
from detkit.backends import PredictOptions
from detkit.errors import DetkitError, RunFailed, UsageError, WorkerDied
from detkit.processes import WorkerDetector, start_worker, worker_command
from detkit.wire import (
    CONTENT_TYPE,
    Client,
    SharedMemory,
    decode_detections,
    decode_images,
    encode_detections,
    encode_images,
    serve,
)

PIXELS = [np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3), np.full((4, 1, 3), 200, dtype=np.uint8)]


def body(batch: list[np.ndarray], paths: list[str] | None = None) -> bytes:
    return b"".join(encode_images(batch, paths))


def test_images_travel_unchanged() -> None:
    batch, paths = decode_images(body(PIXELS, ["a.jpg", "ü b.jpg"]))
    assert paths == ["a.jpg", "ü b.jpg"]
    for sent, got in zip(PIXELS, batch, strict=True):
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(sent, got)


def test_no_pixel_is_copied() -> None:
    buffers = encode_images(PIXELS)
    for buffer, image in zip(buffers[1:], PIXELS, strict=True):
        assert np.shares_memory(np.frombuffer(buffer, np.uint8), image)
    received = bytearray(b"".join(buffers))
    batch, _ = decode_images(received)
    assert all(np.shares_memory(np.frombuffer(received, np.uint8), image) for image in batch)
    assert all(image.flags.writeable for image in batch)


def test_shared_memory_carries_the_pixels() -> None:
    """What one side puts the other sees without a copy; it grows, and is never cut."""
    shared = SharedMemory.create()
    assert shared is not None, "Linux has it"
    other = SharedMemory(os.dup(shared.descriptor))
    for height in (4, 300, 7):
        batch = [np.full((height, 5, 3), value, np.uint8) for value in (1, 2, 255)]
        head, *payloads = encode_images(batch, ["a", "b", "c"])
        shared.put(payloads)
        images, paths = decode_images(head, payloads=other.view())
        assert paths == ["a", "b", "c"]
        for image, sent in zip(images, batch, strict=True):
            np.testing.assert_array_equal(image, sent)
        shared.put([b"\x09" * 15])
        assert (images[0][0] == 9).all(), "the very memory"
    with pytest.raises(DetkitError, match="malformed|tells of"):
        decode_images(encode_images([np.zeros((999, 999, 3), np.uint8)])[0], payloads=other.view())
    for one in (shared, other):
        one.close()
        one.close()


def served(detect: Callable[[list[np.ndarray], list[str]], list[Detections]]) -> Client:
    """Return a client whose requests are answered by a thread."""
    ours, theirs = socket.socketpair()

    def answer() -> None:
        with theirs:
            serve(detect, theirs)

    threading.Thread(target=answer, daemon=True).start()
    return Client(ours)


def test_many_pixels_travel_in_several_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "REQUEST_BYTES", 100)
    got: list[list[str]] = []
    none = {"boxes": np.zeros((0, 4)), "labels": np.zeros(0, dtype=np.int64), "scores": np.zeros(0)}

    def detect(batch: list[np.ndarray], paths: list[str]) -> list[Detections]:
        got.append(paths)
        return [
            Detections(path=path, width=image.shape[1], height=image.shape[0], classes=("a",), **none)
            for image, path in zip(batch, paths, strict=True)
        ]

    client = served(detect)
    widths = [10, 20, 4, 200, 1, 32, 33, 34]  # of 3 bytes each
    names = [f"{i}.jpg" for i in range(len(widths))]
    found = client.detect([np.zeros((1, width, 3), np.uint8) for width in widths], names)
    assert [(one.path, one.width) for one in found] == list(zip(names, widths, strict=True))
    assert got == [names[:2], names[2:3], names[3:4], names[4:6], names[6:7], names[7:]]
    assert client.detect([]) == []
    client.close()


def test_words_of_a_worker_that_cannot_do_it() -> None:
    def detect(batch: list[np.ndarray], paths: list[str]) -> list[Detections]:
        if paths == ["known"]:
            raise DetkitError('no "room"\nat all')
        raise KeyError("näher")

    client = served(detect)
    for path, said in (("known", 'no "room"\nat all'), ("unknown", "KeyError: 'näher'")):
        with pytest.raises(RunFailed) as caught:
            client.detect(PIXELS[:1], [path])
        assert str(caught.value) == said
    client.close()


def test_views_are_packed_in_order() -> None:
    flipped = PIXELS[0][:, ::-1]
    (got,), _ = decode_images(body([flipped]))
    np.testing.assert_array_equal(got, flipped)


def test_empty_batch() -> None:
    assert decode_images(body([])) == ([], [])
    assert decode_detections(encode_detections([])) == []


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_files_travel_as_they_are() -> None:
    content = png(PIXELS[0])
    (whole,), _ = decode_images(content, "image/png")
    np.testing.assert_array_equal(whole, PIXELS[0])
    header = json.dumps({"images": [{"path": "a.png", "bytes": len(content)}]}).encode()
    batch, paths = decode_images(struct.pack("<I", len(header)) + header + content)
    assert paths == ["a.png"]
    np.testing.assert_array_equal(batch[0], PIXELS[0])


@pytest.mark.parametrize(
    ("content", "content_type", "message"),
    [
        (b"", CONTENT_TYPE, "the request is malformed"),
        (b"\x04\x00\x00\x00nope", CONTENT_TYPE, "the request is malformed"),
        (b"\x02\x00\x00\x00{}", CONTENT_TYPE, "the request is malformed"),
        (b"\x02\x00\x00\x00[]", CONTENT_TYPE, "the request is malformed"),
        (body(PIXELS)[:-1], CONTENT_TYPE, "the request is malformed"),
        (body(PIXELS) + b"x", CONTENT_TYPE, r"the request has \d+ bytes, its header tells of \d+"),
        (b"no image", "image/jpeg", "cannot read image"),
        (b"{}", "application/json", r"content type 'application/json' is not known; expected image/\*"),
    ],
)
def test_malformed_requests(content: bytes, content_type: str, message: str) -> None:
    with pytest.raises(DetkitError, match=message):
        decode_images(content, content_type)


def test_detections_survive_the_way_exactly() -> None:
    rng = np.random.default_rng(0)
    one = Detections(
        path="a/ü.jpg", width=31, height=17, classes=("b", "a", "never"), boxes=rng.random((3, 4)) / 3,
        labels=np.array([1, 0, 1]), scores=np.array([1 / 3, 0.1 + 0.2, 1e-9]),
    )  # fmt: skip
    none = Detections(
        path="", width=1, height=1, classes=one.classes, boxes=np.zeros((0, 4)), labels=np.zeros(0, dtype=np.int64),
        scores=np.zeros(0),
    )  # fmt: skip
    back = decode_detections(encode_detections([one, none]))
    for sent, got in zip([one, none], back, strict=True):
        assert (got.path, got.width, got.height, got.classes) == (sent.path, sent.width, sent.height, sent.classes)
        for name in ("boxes", "labels", "scores"):
            np.testing.assert_array_equal(getattr(got, name), getattr(sent, name))
            assert getattr(got, name).dtype == getattr(sent, name).dtype


@pytest.fixture(scope="module")
def model(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("wire")
    return Trainer(model="echo/memory", epochs=6).fit(tiny, tiny, name=str(folder / "run"), quiet=True).model


@pytest.fixture
def worker(model: Model) -> Iterator[socket.socket]:
    """A prediction worker; gives the socket that it answers on."""
    command = worker_command(sys.executable, "echo", "--serve", str(model.path), "{}", "")
    ours, theirs = socket.socketpair()
    with ours, theirs, start_worker(command, leash=True, stdout=theirs) as process:
        theirs.close()
        assert ours.recv(65536) == b'{"error":""}\n'
        yield ours
        process.kill()


def request(
    worker: socket.socket, method: str, path: str, body: bytes = b"", content_type: str = ""
) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection("worker")
    connection.sock = worker
    connection.request(method, path, body, {"Content-Type": content_type} if content_type else {})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_ping(worker: socket.socket) -> None:
    assert request(worker, "GET", "/ping") == (200, {})
    assert request(worker, "GET", "/elsewhere")[0] == 404
    assert request(worker, "POST", "/elsewhere")[0] == 404


def test_one_image_file(worker: socket.socket, model: Model, tiny: Dataset) -> None:
    status, answer = request(worker, "POST", "/invocations", Path(tiny.paths[0]).read_bytes(), "image/jpeg")
    assert status == 200
    assert answer["classes"] == list(tiny.classes)
    with Predictor(model, score_threshold=0) as predictor:
        expected = predictor(tiny.paths[0]).to_dict()
    assert answer["images"] == [{**expected, "path": ""}]


def test_answers_after_a_bad_request(worker: socket.socket, tiny: Dataset) -> None:
    status, answer = request(worker, "POST", "/invocations", b"no image", "image/jpeg")
    assert status == 400
    assert "cannot read image" in str(answer["error"])
    assert request(worker, "POST", "/invocations", b"", "image/jpeg")[0] == 400
    client = Client(worker)
    with pytest.raises(RunFailed, match="^TypeError: Cannot handle[^{]*$"):
        client.detect([np.zeros((2, 3, 5), dtype=np.uint8)])
    assert len(client.detect([tiny[0].image(), tiny[1].image()], ["a", "b"])) == 2
    assert [found.path for found in client.detect([tiny[0].image()], ["a"])] == ["a"]
    client.close()


def test_worker_detector_ends_with_close(model: Model, tiny: Dataset) -> None:
    children = set(psutil.Process().children())
    detector = WorkerDetector(sys.executable, model, PredictOptions())
    (process,) = set(psutil.Process().children()) - children
    assert len(detector.detect([tiny[0].image()])) == 1
    detector.close()
    assert not process.is_running()


def test_worker_that_cannot_load(model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunFailed, match=r"^device='cuda:99': .*device=cpu$") as caught:
        Predictor(model, device="cuda:99", isolate=True)
    assert "Traceback" in caught.value.log_tail
    assert capfd.readouterr().err == ""


def test_worker_that_dies(model: Model, tiny: Dataset) -> None:
    children = set(psutil.Process().children())
    detector = WorkerDetector(sys.executable, model, PredictOptions())
    (process,) = set(psutil.Process().children()) - children
    process.kill()
    for _ in range(2):
        with pytest.raises(WorkerDied, match="worker was ended by SIGKILL while it predicted; .* memory runs out"):
            detector.detect([tiny[0].image()])
    detector.close()
    with pytest.raises(UsageError, match="this model was closed"):
        detector.detect([tiny[0].image()])


def chatty(path: Path, code: str) -> str:
    """A Python whose frameworks print while they are imported."""
    (path / "sitecustomize.py").write_text(code)
    script = path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_prints_of_a_framework_are_passed_over(model: Model, tiny: Dataset, tmp_path: Path) -> None:
    python = chatty(tmp_path, "print('hello'); print('[1, 2]'); print('no newline here: ', end='\\n')")
    detector = WorkerDetector(python, model, PredictOptions())
    assert len(detector.detect([tiny[0].image()])) == 1
    detector.close()


def test_prints_after_the_start_do_not_block(model: Model, tiny: Dataset, tmp_path: Path) -> None:
    code = (
        "import threading, time\n"
        "def talk():\n"
        "    time.sleep(1)\n"
        "    while True: print('x' * 4096, flush=True)\n"
        "threading.Thread(target=talk, daemon=True).start()"
    )
    python = chatty(tmp_path, code + "\nimport os; os.dup2(os.open(os.devnull, os.O_WRONLY), 2)")
    detector = WorkerDetector(python, model, PredictOptions())
    time.sleep(1.5)
    found: list[Detections] = []
    reader = threading.Thread(target=lambda: found.extend(detector.detect([tiny[0].image()])), daemon=True)
    reader.start()
    reader.join(timeout=30)
    assert found
    detector.close()
