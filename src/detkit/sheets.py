"""Pictures put together in one file, two beside each other."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

from PIL import Image as PillowImage

_COLUMNS = 2
_GAP = 18.0
"""Points between pictures, and around them all."""

_SIZE = re.compile(r'width="[\d.]+pt" height="[\d.]+pt" viewBox="0 0 ([\d.]+) ([\d.]+)"')
"""In the head of an SVG file by matplotlib; in points, both."""


def inline(svg: bytes) -> str:
    """Return an SVG file as an element for a page: without what stands before it."""
    drawn = svg.decode()
    return drawn[drawn.index("<svg") :]


def svg_sheet(pictures: Sequence[bytes]) -> bytes:
    """Put SVG files by matplotlib together in one."""
    elements = list(map(inline, pictures))
    sizes = [(float(width), float(height)) for width, height in (_SIZE.findall(one)[0] for one in elements)]
    places, (width, height) = _lay_out(sizes)
    inside = "\n".join(
        _SIZE.sub(f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" viewBox="0 0 {w:g} {h:g}"', element, count=1)
        for element, (x, y), (w, h) in zip(elements, places, sizes, strict=True)
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}pt" height="{height:g}pt" '
        f'viewBox="0 0 {width:g} {height:g}">\n<rect width="100%" height="100%" fill="white"/>\n{inside}\n</svg>\n'
    ).encode()


def png_sheet(pictures: Sequence[bytes], dpi: int) -> bytes:
    """Put PNG files together in one."""
    opened = [PillowImage.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    scale = dpi / 72
    places, (width, height) = _lay_out([(one.width / scale, one.height / scale) for one in opened])
    sheet = PillowImage.new("RGB", (math.ceil(width * scale), math.ceil(height * scale)), "white")
    for one, (x, y) in zip(opened, places, strict=True):
        sheet.paste(one, (round(x * scale), round(y * scale)))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    return stream.getvalue()


def _lay_out(sizes: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Return the left upper corners of pictures of these widths and heights, and the size of it all."""
    columns = min(_COLUMNS, len(sizes))
    widths = [max(width for width, _ in sizes[column::columns]) for column in range(columns)]
    heights = [max(height for _, height in sizes[at : at + columns]) for at in range(0, len(sizes), columns)]
    lefts = [sum(widths[:i]) + _GAP * (i + 1) for i in range(columns + 1)]
    tops = [sum(heights[:i]) + _GAP * (i + 1) for i in range(len(heights) + 1)]
    return [(lefts[i % columns], tops[i // columns]) for i in range(len(sizes))], (
        sum(widths) + _GAP * (columns + 1),
        sum(heights) + _GAP * (len(heights) + 1),
    )
