"""Videos, frame by frame. PyAV decodes them; it comes with ``detkit-sdk[video]``.

A frame has a path, too, as an image in a pack has: ``street.mp4#12`` is the thirteenth frame of that file.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detkit.errors import ImageError, StorageError, UsageError

EXTENSIONS = frozenset(
    {".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mjpeg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv"}
    | {".ts", ".vob", ".webm", ".wmv", ".y4m"}
)
"""Lower-case file name endings that are taken for videos."""

_MOST_DIGITS = 18
_BITS = 0.2
"""Of a video that is written, for each pixel; enough for thin lines and small letters."""


@dataclass(frozen=True)
class Frame:
    """A frame whose pixels are still as the video has them, so that other threads can turn them into an image."""

    path: str
    """``street.mp4#12``; frames count from 0, those that are passed over included."""
    decoded: Any

    def image(self) -> NDArray[np.uint8]:
        """Return ``(height, width, 3)`` RGB pixels, turned and mirrored as players show them."""
        pixels = self.decoded.to_ndarray(format="rgb24")
        matrix = next((bytes(one) for one in self.decoded.side_data if one.type.name == "DISPLAYMATRIX"), None)
        return np.ascontiguousarray(pixels if matrix is None else _displayed(pixels, np.frombuffer(matrix, np.int32)))


def is_video(path: str | os.PathLike[str]) -> bool:
    """Return whether a file's name ends as those of videos do."""
    return os.path.splitext(path)[1].lower() in EXTENSIONS  # noqa: PTH122 - many paths


def numbered(path: str | os.PathLike[str]) -> tuple[str, int] | None:
    """Return the video and the number that the path of a frame names; None for any other path.

    >>> numbered("/data/street.mp4#12"), numbered("/data/a#1.jpg")
    (('/data/street.mp4', 12), None)
    """
    video, sign, digits = os.fspath(path).rpartition("#")
    if not sign or not (digits.isascii() and digits.isdigit()) or len(digits) > _MOST_DIGITS or not is_video(video):
        return None
    return None if Path(path).exists() else (video, int(digits))


def frames(path: str | Path, every: int = 1) -> Iterator[Frame]:
    """Yield each frame of a video, or the first of every so many, in the order of time.

    Only what the codec needs is held. Raises `ImageError` naming the file, and the frame where one cannot be decoded or
    where a file that was cut off ends: AVI, and MP4 or MOV not made for streaming, say how many frames they have, and
    the last one that went missing alone is not noticed. Of other containers the end of the file is the end. Raises
    `UsageError` where PyAV is not installed.
    """
    av = _av()
    number = 0
    decoded = None
    try:
        with av.open(str(path)) as container:
            stream = _first(container, path)
            stream.thread_type = "AUTO"
            for decoded in container.decode(stream):
                if number % every == 0:
                    yield Frame(f"{path}#{number}", decoded)
                number += 1
            if decoded is not None and number < stream.frames and _ends_early(container, stream, decoded):
                raise ImageError(f"{path}#{number}", f"the video ends after {number} of {stream.frames} frames")
    except (av.FFmpegError, OSError, ValueError) as error:
        where = f"{path}#{number}" if number else path
        raise ImageError(where, _why(error)) from error
    if not number:
        raise ImageError(path, "it holds no frame")


def read_frame(path: str | Path, number: int) -> NDArray[np.uint8]:
    """Return one frame as an image. All before it are decoded, too. Raises as `frames`, and where there is none."""
    for at, frame in enumerate(frames(path)):
        if at == number:
            return frame.image()
    raise ImageError(f"{path}#{number}", f"the video has {at + 1} frames, counted from 0")


def frame_rate(path: str | Path) -> Fraction:
    """Return the frames of a video in a second, on average; 25 where it does not say. Raises `ImageError`."""
    av = _av()
    try:
        with av.open(str(path)) as container:
            return Fraction(_first(container, path).average_rate or 25)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ImageError(path, _why(error)) from error


@contextlib.contextmanager
def writing(path: Path, rate: Fraction) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """Yield what appends an RGB picture to a new video without sound; it appears when the block ends well.

    The codec is the usual one of the file's kind, else MPEG-4, which has an even number of pixels in each direction:
    the last row or column comes twice where that is needed. Raises `StorageError`, and `UsageError` where there was no
    picture.
    """
    av = _av()
    beside = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    with contextlib.ExitStack() as closing:
        with _stored(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            closing.callback(beside.unlink, missing_ok=True)
            container = closing.enter_context(av.open(str(beside), "w"))
            stream = container.add_stream(_encoder(av, container), rate=rate.limit_denominator(1001))
            stream.pix_fmt = "yuv420p"
        sides: list[int] = []

        def append(picture: NDArray[np.uint8]) -> None:
            with _stored(path):
                if not sides:
                    sides[:] = (side + side % 2 for side in picture.shape[:2])
                    stream.height, stream.width = sides
                    stream.bit_rate = int(sides[0] * sides[1] * rate * _BITS)
                missing = [(0, max(side - there, 0)) for side, there in zip(sides, picture.shape, strict=False)]
                whole = np.pad(picture, [*missing, (0, 0)], mode="edge")[: sides[0], : sides[1]]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(whole), format="rgb24")))

        yield append
        if not sides:
            raise UsageError(f"{path} is not written: there is no frame to write")
        with _stored(path):
            container.mux(stream.encode())
            container.close()
            os.replace(beside, path)


@contextlib.contextmanager
def _stored(path: Path) -> Iterator[None]:
    try:
        yield
    except (_av().FFmpegError, OSError) as error:
        raise StorageError(path, _why(error)) from error


def num_frames(path: str | Path) -> int | None:
    """Return how many frames a video says that it has; None where it does not say, or cannot be opened."""
    av = _av()
    try:
        with av.open(str(path)) as container:
            return _first(container, path).frames or None
    except (av.FFmpegError, OSError, ValueError, ImageError):
        return None


def _ends_early(container: Any, stream: Any, last: Any) -> bool:
    """Return whether more than one frame's time is missing behind the last one.

    The number of frames alone does not tell: an MP4 counts those that its edit list leaves out, and an AVI the ticks at
    which the one before stays. The time of an AVI does not, either, as FFmpeg estimates it anew where a file is cut.
    """
    at = last.dts if last.pts is None else last.pts
    said = stream.frames if container.format.name == "avi" else stream.duration
    if at is None or said is None:
        return False
    usual = 1 / (stream.average_rate * stream.time_base) if stream.average_rate else 0
    shown = max(last.duration or 0, usual)
    return bool(at - (stream.start_time or 0) + 2 * shown < said)


def _first(container: Any, path: str | Path) -> Any:
    if not container.streams.video:
        raise ImageError(path, "it holds no pictures, only sound or other data")
    return container.streams.video[0]


def _encoder(av: Any, container: Any) -> str:
    """Return an encoder that this PyAV has, for a container's usual codec where there is one."""
    usual = str(container.default_video_codec)
    try:
        av.Codec(usual, "w")
    except (av.FFmpegError, ValueError):
        return "mpeg4"
    return usual


def _displayed(pixels: NDArray[np.uint8], matrix: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Turn pixels as a display matrix says, where it says quarter turns and reflections.

    ``matrix`` is ISO/IEC 14496-12's ``{a, b, u, c, d, v, x, y, w}``: column p of row q is shown in column a p + c q of
    row b p + d q. What it shifts is left out, as players do.
    """
    a, b, _, c, d = matrix[:5].tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UsageError(
            f"videos need a package that is not here ({error}); install it with: pip install 'detkit-sdk[video]'"
        ) from error
    return av


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
