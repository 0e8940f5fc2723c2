"""Reading one image: always uint8, height x width x RGB, turned the way EXIF says it should be seen.

A path is that of a file, of an image in a RecordIO pack, ``train.rec#12345``, see `detkit.recordio`, or of a frame of a
video, ``street.mp4#12``, see `detkit.videos`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError

from detkit import remote, videos
from detkit.errors import BrokenRecord, ImageError, UsageError
from detkit.files import place
from detkit.recordio import packed, packed_image

Image: TypeAlias = NDArray[np.uint8]
"""``(height, width, 3)`` RGB pixels."""

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})
"""Lower-case file name endings that are looked for in folders of images."""

_EXIF_ORIENTATION = 0x0112
_METHODS = {
    2: PillowImage.Transpose.FLIP_LEFT_RIGHT,
    3: PillowImage.Transpose.ROTATE_180,
    4: PillowImage.Transpose.FLIP_TOP_BOTTOM,
    5: PillowImage.Transpose.TRANSPOSE,
    6: PillowImage.Transpose.ROTATE_270,
    7: PillowImage.Transpose.TRANSVERSE,
    8: PillowImage.Transpose.ROTATE_90,
}
"""How each orientation is undone, as `PIL.ImageOps.exif_transpose` does, which fails on damaged EXIF data."""


class Header(NamedTuple):
    """What an image file says about itself before its pixels are decoded."""

    width: int
    """Width in pixels as displayed, that is with the EXIF orientation applied."""
    height: int
    """Height in pixels as displayed."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 where the file has none."""


def file_of(path: str | Path) -> str:
    """Return the file that holds an image: the pack where it is in one."""
    where = packed(path)
    return str(path) if where is None else where[0]


def read_bytes(path: str | Path) -> bytes:
    """Return the bytes of an image file, of an image in a pack, or at a URL. Raises `ImageError`."""
    try:
        url = remote.origin(str(path))
        if remote.is_remote(url):
            return _fetched(url)
        where = packed(path)
        return Path(path).read_bytes() if where is None else bytes(packed_image(*where))
    except (OSError, ValueError) as error:
        raise ImageError(path, _why(error)) from error
    except BrokenRecord as error:
        raise ImageError(path, error.why) from error


def read_header(source: str | Path | bytes, name: str = "") -> Header:
    """Read size and orientation of a file, or of its bytes, without decoding the pixels. Raises `ImageError`."""
    label = name or ("<bytes>" if isinstance(source, bytes) else str(source))
    try:
        with PillowImage.open(_readable(source)) as image:
            orientation = _orientation(image)
            width, height = image.size
    except (OSError, ValueError, SyntaxError, PillowImage.DecompressionBombError) as error:
        raise ImageError(label, _why(error)) from error
    return Header(height, width, orientation) if orientation >= 5 else Header(width, height, orientation)


def read_image(source: str | Path | bytes, name: str = "") -> Image:
    """Decode a file, or the bytes of one, to ``(height, width, 3)`` RGB uint8 with the EXIF orientation applied.

    Grey, palette, CMYK and transparent images become RGB; 16-bit grey keeps its upper eight bits. Raises `ImageError`
    for a missing, truncated or foreign file and for images above Pillow's decompression-bomb limit.
    """
    label = name or ("<bytes>" if isinstance(source, bytes) else str(source))
    frame = None if isinstance(source, bytes) else videos.numbered(source)
    if frame is not None:
        return videos.read_frame(*frame)
    try:
        with PillowImage.open(_readable(source)) as image:
            return to_array(image, label)
    except (OSError, ValueError, SyntaxError, PillowImage.DecompressionBombError) as error:
        raise ImageError(label, _why(error)) from error


def to_array(image: PillowImage.Image, name: str = "<image>") -> Image:
    """Convert an opened Pillow image the way `read_image` does."""
    image.load()
    method = _METHODS.get(_orientation(image))
    if method is not None:
        image = image.transpose(method)
    if image.mode in {"I", "I;16", "I;16B", "I;16L"}:
        deep = np.asarray(image, dtype=np.int64)
        if deep.min(initial=0) < 0 or deep.max(initial=0) > 0xFFFF:
            raise ImageError(name, "32-bit integer pixels; convert it to 8 or 16 bits a channel")
        grey = (deep >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ImageError(name, "floating-point pixels; convert it to 8 or 16 bits a channel")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.uint8)


def list_images(folder: Path) -> list[Path]:
    """Return the image files below a folder, hidden ones left out, in sorted order."""
    return [Path(path) for path in map(_raised, walk_images(folder))]


def _raised(found: str | ImageError) -> str:
    if isinstance(found, ImageError):
        raise found
    return found


def walk_images(folder: str | Path) -> Iterator[str | ImageError]:
    """Yield what `list_images` returns, and the error of each folder that cannot be listed, in its place.

    One folder's names are in memory at a time.
    """
    top = str(Path(folder))
    yield from _walk("" if top == "." else top)


def _walk(folder: str) -> Iterator[str | ImageError]:
    try:
        with os.scandir(folder or ".") as found:
            entries = sorted((one for one in found if not one.name.startswith(".")), key=lambda one: one.name)
    except OSError as error:
        yield ImageError(folder or ".", _why(error))
        return
    for entry in entries:
        path = os.path.join(folder, entry.name)  # noqa: PTH118 - many paths
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path)
        elif os.path.splitext(path)[1].lower() in EXTENSIONS and entry.is_file():  # noqa: PTH122
            yield path


def _orientation(image: PillowImage.Image) -> int:
    value = image.getexif().get(_EXIF_ORIENTATION, 1)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def place_image(source: str, target: str | Path) -> None:
    """Make an image appear as a file: a link to its file where that is one, else a file of its own.

    Raises `StorageError` or `OSError`, and `ImageError` where an image in a pack or at a URL cannot be read.
    """
    if remote.is_remote(source):
        try:
            remote.place(source, Path(target))
        except OSError as error:
            raise ImageError(source, _why(error)) from error
    elif packed(source) is None:
        place(source, target)
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_bytes(read_bytes(source))


def _fetched(url: str) -> bytes:
    try:
        return remote.read(url)
    except UsageError as error:  # nobody here knows such URLs
        raise ImageError(url, str(error)) from error


def _readable(source: str | Path | bytes) -> io.BytesIO | str | Path:
    """Return what Pillow opens: a file by its name, so that no more than its header is read."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if remote.is_remote(remote.origin(str(source))):
        return io.BytesIO(read_bytes(source))
    return source if packed(source) is None else io.BytesIO(read_bytes(source))


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, UnidentifiedImageError):
        return "it is no image that Pillow knows, or it is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
