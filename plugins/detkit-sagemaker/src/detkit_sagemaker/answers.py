"""What containers answer, read as `Detections`, and what they are sent.

Three kinds: detkit's own container (`detkit.wire`), AWS's built-in object detection, and JumpStart's models. AWS's
own answer with boxes in shares of the image, without names or with a list of them, and do not leave out what is
unlikely. Sources: SageMaker developer guide, "Object Detection Request and Response Formats"; the notebook
"Introduction to JumpStart - Object Detection" of amazon-sagemaker-examples.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec
import numpy as np
from PIL import Image as PillowImage

from detkit import images, wire
from detkit.detections import Detections
from detkit.errors import DetkitError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from detkit.images import Image

Kind: TypeAlias = Literal["detkit", "object-detection", "jumpstart"]
"""Whose container it is."""

NO_OBJECT = -1
"""The class by which MXNet's detectors mark rows that hold nothing."""

_TOLERANCE = 1.0
"""A box may reach so far out of the image, in its sides; detectors do not clip. Farther, it is no share of a side."""

READ_BY_AWS = {"JPEG", "PNG"}
"""Formats, by Pillow's names, that AWS's containers are known to read."""


class MalformedAnswer(DetkitError):
    """A container's answer is not what it should be; the message names the image."""

    exit_code = 3

    def __init__(self, path: str, why: str) -> None:
        self.why = why
        super().__init__(
            f"{path or 'an image'}: the answer of the model's container cannot be read: {why}. does the image fit the "
            "model, and is it of a matching version?"
        )


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How a model's container is talked to. `read` leaves out what `PredictOptions` would have left out."""

    kind: Kind
    classes: tuple[str, ...]
    """The model's class names; AWS's containers answer with indices into them."""
    score_threshold: float = 0.0
    max_detections: int | None = None

    @property
    def content_type(self) -> str:
        """Of one image file, whatever its format."""
        return "application/x-image"

    @property
    def accept(self) -> str:
        return "application/json;verbose" if self.kind == "jumpstart" else "application/json"

    def read(self, body: bytes, *, path: str, width: int, height: int) -> Detections:
        """Return what was found on one image of so many pixels, which detkit's own container says, too.

        Raises `MalformedAnswer`.
        """
        try:
            answer = msgspec.json.decode(body)
        except msgspec.DecodeError as error:
            raise MalformedAnswer(path, f"it is no JSON ({error}): {_begin(body)}") from None
        if isinstance(answer, dict) and answer.get("error"):  # our container's, of an image that it cannot read
            raise MalformedAnswer(path, f"the container says: {answer['error']}")
        if self.kind == "detkit":
            return self._limit(self._read_own(body, path, width, height))
        if not isinstance(answer, dict):
            raise MalformedAnswer(path, f"expected a JSON object: {_begin(body)}")
        read = self._read_jumpstart if self.kind == "jumpstart" else self._read_built_in
        rows, classes = read(answer, path)
        return self._limit(self._assemble(rows, classes, path, width, height))

    def read_many(self, body: bytes, *, paths: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Return what our container found on several images sent at once; ``sizes`` are widths and heights."""
        found = _own(body, ", ".join(paths[:3]))
        if len(found) != len(paths):
            raise MalformedAnswer(", ".join(paths[:3]), f"it tells of {len(found)} images, {len(paths)} were sent")
        return [
            self._limit(self._checked(one, path, *size)) for one, path, size in zip(found, paths, sizes, strict=True)
        ]

    def _read_own(self, body: bytes, path: str, width: int, height: int) -> Detections:
        found = _own(body, path)
        if len(found) != 1:
            raise MalformedAnswer(path, f"it tells of {len(found)} images, one was sent")
        return self._checked(found[0], path, width, height)

    def _checked(self, found: Detections, path: str, width: int, height: int) -> Detections:
        if found.classes != self.classes:
            if len(found) or found.classes:  # an answer without images has no names
                raise MalformedAnswer(path, f"its classes are {list(found.classes)}, the model's {list(self.classes)}")
            found = replace(found, classes=self.classes)
        if not np.isfinite(found.boxes).all():
            raise MalformedAnswer(path, "boxes that are not finite")
        said, known = (found.width, found.height), (width, height)
        if said != known and (0, 0) not in {said, known}:
            raise MalformedAnswer(path, f"it speaks of {said} pixels (width, height), the image has {known}")
        return replace(found, path=path, width=width or found.width, height=height or found.height)

    def _read_built_in(self, answer: dict[str, Any], path: str) -> tuple[NDArray[np.float64], list[int]]:
        """Return rows of score and box, and the class of each, from ``[class, score, xmin, ymin, xmax, ymax]``."""
        table = _numbers(answer.get("prediction"), "prediction", path, columns=6)
        return table[:, 1:], self._indices(table[:, 0], path)

    def _read_jumpstart(self, answer: dict[str, Any], path: str) -> tuple[NDArray[np.float64], list[int]]:
        boxes = _numbers(answer.get("normalized_boxes"), "normalized_boxes", path, columns=4)
        scores = _numbers([[s] for s in _list(answer, "scores", path)], "scores", path, columns=1)
        raw = _list(answer, "classes", path)
        numbers = _numbers([[c] for c in raw], "classes", path, columns=1)[:, 0]
        if not len(boxes) == len(scores) == len(numbers):
            raise MalformedAnswer(
                path,
                f"{len(boxes)} normalized_boxes, {len(scores)} scores and {len(numbers)} classes; expected as many",
            )
        labels = answer.get("labels") or []
        if not isinstance(labels, list):
            raise MalformedAnswer(path, f"labels are no list: {labels!r:.80}")
        # Where the container knows our names, they count; else it goes by the numbers that it was trained with. Digits
        # are such numbers, also where a class of ours is called by one.
        known = {name: i for i, name in enumerate(self.classes)}
        if labels and all(str(name) in known and not str(name).isdigit() for name in labels):
            places = [known[str(name)] for name in labels]
            indices = self._indices(numbers, path, len(labels))
            classes = [i if i == NO_OBJECT else places[i] for i in indices]
        else:
            classes = self._indices(numbers, path)
        return np.concatenate([scores, boxes], axis=1), classes

    def _indices(self, values: NDArray[np.float64], path: str, count: int | None = None) -> list[int]:
        count = len(self.classes) if count is None else count
        wrong = np.flatnonzero((values != np.rint(values)) | (values < NO_OBJECT) | (values >= count))
        if len(wrong):
            raise MalformedAnswer(
                path,
                f"class {values[wrong[0]]:g}; expected a whole number from 0 to {count - 1}: the model has {count}",
            )
        return [int(value) for value in values]

    def _assemble(
        self, rows: NDArray[np.float64], classes: Sequence[int], path: str, width: int, height: int
    ) -> Detections:
        """Put together rows of score and box in shares of the image, in any order."""
        labels = np.array(classes, dtype=np.int64)
        there = labels != NO_OBJECT
        rows, labels = rows[there], labels[there]
        scores, shares = rows[:, 0], rows[:, 1:]
        if ((scores < 0) | (scores > 1)).any():
            raise MalformedAnswer(path, f"a score of {scores[(scores < 0) | (scores > 1)][0]:g}; expected 0 to 1")
        outside = ((shares < -_TOLERANCE) | (shares > 1 + _TOLERANCE)).any(axis=1)
        if outside.any():
            raise MalformedAnswer(path, f"box {shares[outside][0].tolist()} lies outside; expected shares from 0 to 1")
        inverted = (shares[:, 2:] < shares[:, :2]).any(axis=1)
        if inverted.any():
            raise MalformedAnswer(
                path, f"box {shares[inverted][0].tolist()} is inverted; expected xmin, ymin, xmax, ymax"
            )
        boxes = np.clip(shares, 0.0, 1.0) * np.array([width, height, width, height], dtype=np.float64)
        # What lies beside the image as a whole, or has no area, marks nothing in it.
        visible = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        return Detections.from_arrays(
            boxes[visible],
            scores[visible],
            labels[visible],
            classes=self.classes,
            path=path,
            width=width,
            height=height,
        )

    def _limit(self, found: Detections) -> Detections:
        kept = found.above(self.score_threshold)
        return kept if self.max_detections is None else kept.best(self.max_detections)


def look(kind: Kind, source: Path | bytes, name: str) -> tuple[int, int, bool]:
    """Return width and height of an image file in pixels as displayed, and whether a container is sent it as it is.

    ``source`` may be its first bytes. AWS's containers are not sent what they may not read (formats beside JPEG and
    PNG) or turn (EXIF): their boxes have to be those of the image as displayed. Raises `ImageError`.
    """
    header = images.read_header(source, name)
    as_it_is = kind == "detkit" or (header.orientation == 1 and _format(source) in READ_BY_AWS)
    return header.width, header.height, as_it_is


def file_to_send(kind: Kind, content: bytes, name: str) -> tuple[bytes, int, int]:
    """Return what a container is sent of an image file, the file's own bytes or a PNG, and its width and height."""
    width, height, as_it_is = look(kind, content, name)
    return (content if as_it_is else pixels_to_send(images.read_image(content, name))), width, height


def pixels_to_send(image: Image) -> bytes:
    """Return an ``(h, w, 3)`` RGB uint8 image as a PNG file: lossless, and in less bytes than raw pixels."""
    file = io.BytesIO()
    PillowImage.fromarray(np.ascontiguousarray(image)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _format(source: Path | bytes) -> str | None:
    with PillowImage.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return image.format


def _own(body: bytes, path: str) -> list[Detections]:
    try:
        return wire.decode_detections(body)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise MalformedAnswer(path, f"{type(error).__name__}: {error}: {_begin(body)}") from None


def _list(answer: dict[str, Any], name: str, path: str) -> list[Any]:
    value = answer.get(name)
    if not isinstance(value, list):
        raise MalformedAnswer(path, f"{name!r} is missing or no list; it has {', '.join(sorted(answer)) or 'nothing'}")
    return value


def _numbers(value: Any, name: str, path: str, *, columns: int) -> NDArray[np.float64]:
    if not isinstance(value, list):
        raise MalformedAnswer(path, f"{name!r} is missing or no list")
    try:
        table = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise MalformedAnswer(path, f"{name!r} is no table of numbers with {columns} column(s)") from None
    if not table.size:
        return np.zeros((0, columns))
    if table.ndim != 2 or table.shape[1] != columns:
        raise MalformedAnswer(path, f"{name!r} has the shape {table.shape}; expected (n, {columns})")
    if not np.isfinite(table).all():
        raise MalformedAnswer(path, f"{name!r} holds values that are not finite")
    return table


def _begin(body: bytes) -> str:
    return repr(body[:80].decode(errors="replace"))
