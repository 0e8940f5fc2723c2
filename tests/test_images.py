"""Reading one image, however it is stored."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from detkit import images
from detkit.errors import ImageError


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_pillow_turns(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 9, 3)).astype(np.uint8))
    stream = io.BytesIO()
    picture.save(stream, "PNG", exif=exif)
    with Image.open(io.BytesIO(stream.getvalue())) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    assert np.array_equal(images.read_image(stream.getvalue()), expected)


def test_damaged_exif_is_no_obstacle() -> None:
    """A tag of the wrong type, which cannot be written again, beside a sound orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x011A] = 72.0  # XResolution, a rational number
    stream = io.BytesIO()
    Image.new("RGB", (40, 20), (9, 9, 9)).save(stream, "JPEG", exif=exif)
    content = stream.getvalue()
    at = content.index(b"\x1a\x01\x05\x00") if b"\x1a\x01\x05\x00" in content else content.index(b"\x01\x1a\x00\x05")
    damaged = bytearray(content)
    little = b"\x1a\x01\x05\x00" in content
    damaged[at + 2 : at + 4] = b"\x02\x00" if little else b"\x00\x02"  # now it is text
    assert images.read_image(bytes(damaged)).shape == (40, 20, 3)


def test_url_that_nobody_here_can_read_is_an_image_that_cannot_be_read() -> None:
    with pytest.raises(ImageError, match="cannot read image nonsense://bucket/a.jpg"):
        images.read_header("nonsense://bucket/a.jpg")
