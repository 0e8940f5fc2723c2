"""A live endpoint as a `detkit.backends.Detector`: images go there in lossless form, a few at once."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import msgspec

from detkit import images, wire
from detkit.detections import Detections
from detkit.errors import UsageError
from detkit.images import Image
from detkit_sagemaker.answers import Answers, file_to_send, pixels_to_send
from detkit_sagemaker.aws import Aws, AwsError, explained

MOST_BYTES, MOST_BYTES_SERVERLESS = 25_000_000, 4_000_000
"""Of one request (SageMaker developer guide, "Endpoints and quotas" and "Serverless Inference")."""

_AT_ONCE = 4
"""Requests on their way together."""
_BATCH = 8
"""Images in one request to our container."""
_MOST_PIXELS = 100_000_000
"""In one request to our container, which decodes them all before the model sees one."""


class ImageRefused(AwsError):
    """The endpoint is there, and cannot answer for an image."""


@dataclass(frozen=True)
class _Prepared:
    path: str
    content: bytes
    width: int
    height: int


_Request: TypeAlias = list[_Prepared]


class EndpointDetector:
    """Sends images to an endpoint. botocore waits and tries again where AWS asks for patience.

    Our container takes several at once, AWS's own one after the other. Raises `AwsError`, `MalformedAnswer`.
    """

    def __init__(self, aws: Aws, endpoint: str, answers: Answers, *, most_bytes: int = MOST_BYTES) -> None:
        self._client = aws.client("sagemaker-runtime")
        self._endpoint, self._answers, self._most_bytes = endpoint, answers, most_bytes
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="invoke")

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        """Return the detections on each ``(h, w, 3)`` RGB uint8 image; it travels as a PNG."""
        return list(self._answer(self._prepare_pixels(image, i) for i, image in enumerate(images)))

    def predict(self, sources: Iterable[str | Path]) -> Iterator[Detections]:
        """Yield the detections on each image file, in order; it travels as it lies on disk where the model reads it."""
        return self._answer(self._prepare_file(str(source)) for source in sources)

    def close(self) -> None:
        """End the threads. The endpoint stays."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> EndpointDetector:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _prepare_pixels(self, image: Image, index: int) -> _Prepared:
        content = pixels_to_send(image)
        self._refuse_large(content, f"image {index}")
        return _Prepared("", content, image.shape[1], image.shape[0])

    def _prepare_file(self, path: str) -> _Prepared:
        content, width, height = file_to_send(self._answers.kind, images.read_bytes(path), path)
        self._refuse_large(content, path)
        return _Prepared(path, content, width, height)

    def _refuse_large(self, content: bytes, name: str) -> None:
        if len(content) > self._most_bytes:
            raise UsageError(
                f"{name} has {len(content) / 1e6:.1f} MB, and endpoint {self._endpoint} takes "
                f"{self._most_bytes / 1e6:.0f} MB; batch transform takes 100 MB"
            )

    def _answer(self, prepared: Iterable[_Prepared]) -> Iterator[Detections]:
        """Send some ahead while the first ones are waited for; what is raised stops the others."""
        waiting: deque[Future[list[Detections]]] = deque()
        try:
            for request in self._requests(prepared):
                waiting.append(self._pool.submit(self._send, request))
                if len(waiting) > _AT_ONCE:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _requests(self, prepared: Iterable[_Prepared]) -> Iterator[_Request]:
        """Group what may travel together."""
        together = _BATCH if self._answers.kind == "detkit" else 1
        group: _Request = []
        for one in prepared:
            size = sum(len(other.content) + len(other.path) + 64 for other in [*group, one])
            pixels = sum(other.width * other.height for other in [*group, one])
            if group and (len(group) == together or size > self._most_bytes or pixels > _MOST_PIXELS):
                yield group
                group = []
            group.append(one)
        if group:
            yield group

    def _send(self, request: _Request) -> list[Detections]:
        paths = [one.path for one in request]
        answers = self._answers
        if len(request) == 1:
            one = request[0]
            body = self._invoke(one.content, answers.content_type, one.path)
            return [answers.read(body, path=one.path, width=one.width, height=one.height)]
        sizes = [(one.width, one.height) for one in request]
        body = self._invoke(encode_files(request), wire.CONTENT_TYPE, *paths)
        return answers.read_many(body, paths=paths, sizes=sizes)

    def _invoke(self, body: bytes, content_type: str, *paths: str) -> bytes:
        try:
            with explained(f"asking endpoint {self._endpoint} (sagemaker:InvokeEndpoint)"):
                answer = self._client.invoke_endpoint(
                    EndpointName=self._endpoint, Body=body, ContentType=content_type, Accept=self._answers.accept
                )
                return bytes(answer["Body"].read())
        except AwsError as error:
            if error.code == "ModelError":
                named = ", ".join(filter(None, paths[:3])) or f"{len(paths)} image(s) of pixels"
                raise ImageRefused(f"{named}: {error}", error.code) from error
            if error.code == "ValidationError":
                raise AwsError(
                    f"{error}. was endpoint {self._endpoint} deleted, or has its time run out? `detkit endpoints ls` "
                    "lists what is there",
                    error.code,
                ) from error
            raise


def encode_files(request: Sequence[_Prepared]) -> bytes:
    """Pack image files into one body of `detkit.wire.CONTENT_TYPE`."""
    entries = [{"path": one.path, "bytes": len(one.content)} for one in request]
    header = msgspec.json.encode({"images": entries})
    return struct.pack("<I", len(header)) + header + b"".join(one.content for one in request)
