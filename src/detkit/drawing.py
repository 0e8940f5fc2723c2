"""Pictures of boxes: one image with its detections and ground truth, and sheets of many.

Lines are whole pixels with a thin dark rim, so they are crisp and stand out on bright and dark images alike; labels
are anti-aliased chips in the colour of their class that stay inside the image and evade each other where they can.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFilter, ImageFont

from detkit import images
from detkit.boxes import iou
from detkit.data import Dataset, Sample
from detkit.detections import Detections
from detkit.errors import InvalidValue, UsageError
from detkit.files import atomic_write
from detkit.masks import decode

Picture: TypeAlias = PillowImage.Image
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour: TypeAlias = tuple[int, int, int]
_Rect: TypeAlias = tuple[int, int, int, int]

PALETTE: tuple[Colour, ...] = (
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (153, 153, 51),
    (170, 68, 153),
    (68, 170, 153),
    (136, 34, 85),
    (51, 34, 136),
)
"""Colours told apart with every common colour blindness: the seven of Okabe and Ito (2008, "Color Universal Design"),
then five of Paul Tol's "muted" scheme (SRON/EPS/TN/09-002). From the thirteenth class on they come again."""

_RIM = (0, 0, 0, 110)
_FILLED, _CONTOUR = 90, 220
"""Opacity of a mask and of its edge, of 255."""
_WHITE, _INK, _GREY, _PAPER = (255, 255, 255), (32, 33, 36), (105, 108, 114), (250, 250, 248)
_CROWDED = 10
"""Boxes in one picture of a sheet from which on class names would hide the image."""
_SMOOTH = 4
"""Chips and corners are drawn this many times larger and scaled down, which makes their edges smooth."""

# Pillow's own font lacks most accented letters; these are found by name where the system has them.
_FALLBACK_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc")


@dataclass(frozen=True)
class _Mark:
    box: tuple[float, float, float, float]
    name: str
    text: str
    """Written on the chip; none where empty."""
    colour: Colour
    dashed: bool
    mask: Any = None
    """COCO's polygons or run-length encoding; none where empty."""


def draw(
    image: str | Path | images.Image | Picture,
    detections: Detections | None = None,
    *,
    truth: Sample | None = None,
    score_threshold: float = 0.0,
    classes: Sequence[str] | None = None,
    min_side: int = 0,
    labels: bool = True,
) -> Picture:
    """Draw detections with solid lines, and ground truth with dashed ones, on a copy of an image.

    Masks are filled with the colour of their class, through which the image shows. Where both are given, only objects
    that were missed (no detection of their class at IoU 0.5) keep their label.
    A class's colour is that of its place in ``classes`` (by default those of the detections), so it is the same in
    every picture. An image whose shorter side has fewer than ``min_side`` pixels is enlarged first, which keeps labels
    legible. ``labels=False`` draws boxes only. Raises `detkit.errors.ImageError` for a file that cannot be read.
    """
    picture = _open(image)
    scale = max(1.0, min_side / max(min(picture.size), 1))
    picture = _scale_to(picture, scale)
    known = classes if classes is not None else detections.classes if detections is not None else ()
    shown = detections.above(score_threshold) if detections is not None else None
    marks = _truth_marks(truth, known) if truth is not None else []
    if truth is not None and shown is not None:
        for i, name in enumerate(truth.names):
            same = shown.boxes[np.array([n == name for n in shown.names], dtype=bool)]
            if (iou(truth.boxes[i : i + 1], same) >= 0.5).any():
                marks[i] = replace(marks[i], text="")
    marks += _detection_marks(shown, known) if shown is not None else []
    if not labels:
        marks = [replace(mark, text="") for mark in marks]
    return _annotate(picture, marks, scale, max(11, round(0.024 * math.sqrt(picture.width * picture.height))))


def sheet(
    pictures: Sequence[Picture],
    *,
    columns: int,
    titles: Sequence[str] = (),
    headings: Sequence[str] = (),
    caption: str = "",
    legend: Mapping[str, Colour] | None = None,
    cell: int = 480,
    group: int = 1,
) -> Picture:
    """Lay pictures out in rows on a light page, each scaled to ``cell`` pixels of width or 4/3 of it in height.

    ``titles`` stand below the pictures, ``headings`` above the columns, and at the bottom ``legend``, names with their
    colours, and ``caption``. Every ``group`` pictures of a row stand closer together.
    """
    if columns < 1 or columns % group:
        raise InvalidValue("columns", columns, f"a positive multiple of {group}")
    columns = min(columns, max(math.ceil(len(pictures) / group) * group, group))
    rows = [pictures[at : at + columns] for at in range(0, len(pictures), columns)]
    fitted = [[_scale_to(p, _cell_scale(p.size, cell)) for p in row] for row in rows]
    widest = max((picture.width for row in fitted for picture in row), default=cell)
    margin, gap, wide_gap, size = cell // 12, cell // 40, cell // 14, max(12, cell // 24)
    line = round(size * 1.9)
    lefts = [margin + c * widest + (c // group) * wide_gap + (c - c // group) * gap for c in range(columns)]
    heights = [max(picture.height for picture in row) for row in fitted]
    step = line if titles else 0
    width = lefts[-1] + widest + margin
    chips = [_chip(name, colour, size, width - 2 * margin) for name, colour in (legend or {}).items()]
    spots, legend_height = _flow([chip.size for chip in chips], width - 2 * margin, size // 2)
    height = 2 * margin + (line if headings else 0) + sum(heights) + len(rows) * step
    height += max(len(rows) - 1, 0) * wide_gap
    height += (legend_height + wide_gap if chips else 0) + (line if caption else 0)
    page = PillowImage.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(page)
    y = margin
    if headings:
        for left, heading in zip(lefts, headings, strict=False):
            _write(pen, (left, y + line // 2 - size // 4), heading, size, colour=_INK, max_width=widest)
        y += line
    for at, (row, row_height) in enumerate(zip(fitted, heights, strict=True)):
        for column, picture in enumerate(row):
            left, top = lefts[column] + (widest - picture.width) // 2, y + (row_height - picture.height) // 2
            page.paste(picture, (left, top), _rounded_mask(picture.size, max(4, cell // 60)))
            title = dict(enumerate(titles)).get(at * columns + column, "")
            _write(pen, (lefts[column], y + row_height + line // 2), title, size, colour=_GREY, max_width=widest)
        y += row_height + step + wide_gap
    for chip, (left, top) in zip(chips, spots, strict=True):
        page.paste(chip, (margin + left, y + top), chip)
    if caption:
        _write(pen, (margin, height - margin - size // 2), caption, size, colour=_GREY, max_width=width - 2 * margin)
    return page


def comparison_sheet(
    data: Dataset,
    detections: Sequence[Detections],
    *,
    columns: int = 4,
    score_threshold: float = 0.25,
    limit: int = 12,
    caption: str = "",
    cell: int = 480,
) -> Picture:
    """Lay out pairs of ground truth and prediction, ``columns`` pictures across.

    ``detections`` are one per image of ``data``, in order. At most ``limit`` images are shown, evenly spread over the
    data. Where a picture has many boxes their labels shrink to the score; the legend below tells the classes.
    """
    if len(detections) != len(data):
        raise UsageError(f"{len(detections)} detections for {len(data)} images; expected one for each, in order")
    if limit < 1:
        raise InvalidValue("limit", limit, "a whole number from 1")
    known = [*data.classes, *sorted({n for found in detections for n in found.classes} - set(data.classes))]
    chosen = np.unique(np.linspace(0, len(data) - 1, min(limit, len(data))).round().astype(int)).tolist()
    pictures: list[Picture] = []
    titles: list[str] = []
    occurring: set[str] = set()
    for i in chosen:
        sample, found = data[i], detections[i].above(score_threshold)
        picture = _open(sample.path)
        scale = _cell_scale(picture.size, cell)
        picture = _scale_to(picture, scale)
        crowded = max(len(sample.names), len(found)) > _CROWDED
        for marks in (_truth_marks(sample, known), _detection_marks(found, known)):
            short = [replace(mark, text=mark.text[len(mark.name) :].strip()) for mark in marks] if crowded else marks
            pictures.append(_annotate(picture, short, scale, max(12, cell // (32 if crowded else 27))))
        occurring |= {*sample.names, *found.names}
        titles += [f"{sample.image_id} · objects: {len(sample.names)}", f"detections: {len(found)}"]
    return sheet(
        pictures,
        columns=columns,
        titles=titles,
        headings=["ground truth", f"prediction, score {score_threshold:.2f} and up"] * (columns // 2),
        caption=caption,
        legend={name: colour_of(name, known) for name in known if name in occurring},
        cell=cell,
        group=2,
    )


def write_picture(picture: Picture, path: str | Path) -> None:
    """Write a picture in the format of the file's ending, beside and renamed. Raises `detkit.errors.StorageError`."""
    target = Path(path)
    known = PillowImage.registered_extensions()
    if known.get(target.suffix.lower()) not in PillowImage.SAVE:  # some can only be read
        raise InvalidValue("path", str(path), "a file name that ends in .png, .jpg or .webp")
    kind = known[target.suffix.lower()]
    with atomic_write(target) as file:
        picture.save(file, kind, **({"quality": 92, "subsampling": 0} if kind == "JPEG" else {}))


def colour_of(name: str, classes: Sequence[str] = ()) -> Colour:
    """Return the colour of a class: by its place in ``classes``, else by its name."""
    at = list(classes).index(name) if name in classes else zlib.crc32(name.encode())
    return PALETTE[at % len(PALETTE)]


def _open(image: str | Path | images.Image | Picture) -> Picture:
    if isinstance(image, PillowImage.Image):
        return PillowImage.fromarray(images.to_array(image))
    if isinstance(image, np.ndarray):
        return PillowImage.fromarray(image).convert("RGB")
    return PillowImage.fromarray(images.read_image(image))


def _truth_marks(truth: Sample, classes: Sequence[str]) -> list[_Mark]:
    return [
        _Mark((x0, y0, x1, y1), name, name, colour_of(name, classes), dashed=True, mask=mask)
        for name, (x0, y0, x1, y1), mask in zip(truth.names, truth.boxes.tolist(), _masks_of(truth), strict=True)
    ]


def _detection_marks(found: Detections, classes: Sequence[str]) -> list[_Mark]:
    return [
        _Mark((x0, y0, x1, y1), name, f"{name} {score:.2f}", colour_of(name, classes), dashed=False, mask=mask)
        for name, score, (x0, y0, x1, y1), mask in zip(
            found.names, found.scores.tolist(), found.boxes.tolist(), _masks_of(found), strict=True
        )
    ]


def _masks_of(objects: Sample | Detections) -> Sequence[Any]:
    return objects.masks if objects.masks is not None else (None,) * len(objects.names)


def _annotate(picture: Picture, marks: Sequence[_Mark], scale: float, font_size: int) -> Picture:
    """Draw marks in the coordinates of the unscaled image, the first one on top."""
    out = picture.copy()
    width = max(2, round(font_size / 6))
    rim = max(1, width // 4)
    rects = [_pixels(mark.box, scale, out.size) for mark in marks]
    order = range(len(marks) - 1, -1, -1)
    for i in order:
        if marks[i].mask:
            _fill(out, marks[i], scale, width)
    pen = ImageDraw.Draw(out, "RGBA")
    for i in order:
        for grow in (-width, rim):
            x0, y0, x1, y1 = rects[i]
            _frame(pen, (x0 - grow, y0 - grow, x1 + grow, y1 + grow), rim, _RIM)
        (_dashed if marks[i].dashed else _frame)(pen, rects[i], width, marks[i].colour)
    taken: list[_Rect] = []
    chips: list[Picture] = []
    for mark, rect in zip(marks, rects, strict=True):
        if mark.text:
            chips.append(_chip(mark.text, mark.colour, font_size, out.width))
            taken.append(_place(chips[-1].size, rect, taken, out.size))
    for chip, place in zip(reversed(chips), reversed(taken), strict=True):
        out.paste(chip, place[:2], chip)
    return out


def _fill(picture: Picture, mark: _Mark, scale: float, width: int) -> None:
    """Lay a mask over the picture: translucent, with a contour."""
    if isinstance(mark.mask, dict):
        size = (mark.mask["size"][1], mark.mask["size"][0])
    else:
        size = (picture.width / scale, picture.height / scale)
    inside = PillowImage.fromarray(decode(mark.mask, size, picture.size)).convert("L")
    core = inside.filter(ImageFilter.MinFilter(2 * max(1, width // 2) + 1))
    filled, contour = (PillowImage.new("L", picture.size, opacity) for opacity in (_FILLED, _CONTOUR))
    opacity = PillowImage.composite(
        filled, PillowImage.composite(contour, PillowImage.new("L", picture.size), inside), core
    )
    picture.paste(mark.colour, mask=opacity)


def _pixels(box: tuple[float, float, float, float], scale: float, size: tuple[int, int]) -> _Rect:
    """Return the first and last pixel of each side, inside the image."""
    x0, y0, x1, y1 = (round(side * scale) for side in box)
    left, top = min(max(x0, 0), size[0] - 1), min(max(y0, 0), size[1] - 1)
    return left, top, min(max(x1 - 1, left), size[0] - 1), min(max(y1 - 1, top), size[1] - 1)


def _frame(pen: ImageDraw.ImageDraw, rect: _Rect, width: int, colour: tuple[int, ...]) -> None:
    if rect[2] >= rect[0] and rect[3] >= rect[1]:
        pen.rectangle(rect, outline=colour, width=width)


def _dashed(pen: ImageDraw.ImageDraw, rect: _Rect, width: int, colour: Colour) -> None:
    """Draw a white frame with dashes of the colour; each side has a whole number of them and they meet in corners."""
    _frame(pen, rect, width, _WHITE)
    x0, y0, x1, y1 = rect
    for start, stop in _dashes(x0, x1, width):
        pen.rectangle((start, y0, stop, min(y0 + width - 1, y1)), fill=colour)
        pen.rectangle((start, max(y1 - width + 1, y0), stop, y1), fill=colour)
    for start, stop in _dashes(y0, y1, width):
        pen.rectangle((x0, start, min(x0 + width - 1, x1), stop), fill=colour)
        pen.rectangle((max(x1 - width + 1, x0), start, x1, stop), fill=colour)


def _dashes(first: int, last: int, width: int) -> list[tuple[int, int]]:
    """Return first and last pixel of each dash between two corners."""
    edges = np.linspace(first, last + 1, 2 * max(1, round((last - first) / (width * 8))) + 2).round().astype(int)
    return [
        (start, max(stop - 1, start)) for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    ]


def _place(size: tuple[int, int], rect: _Rect, taken: Sequence[_Rect], bounds: tuple[int, int]) -> _Rect:
    """Return where a chip goes: the first free of some places around its box, else the first."""
    (width, height), (x0, y0, x1, y1) = size, rect
    inside_right, right = x1 - width + 1, x1 + 2
    places = [(x0, y0 - height), (inside_right, y0 - height), (x0, y1 + 1), (inside_right, y1 + 1)]
    within = [(x0, y0), (inside_right, y0), (x0, y1 - height + 1), (inside_right, y1 - height + 1)]
    beside = [(right, y0), (x0 - width - 1, y0)]
    fits = [(x, y) for x, y in places if y >= 0 and y + height <= bounds[1]]
    candidates = []
    for x, y in [*fits, *within, *beside]:
        left, top = min(max(x, 0), max(bounds[0] - width, 0)), min(max(y, 0), max(bounds[1] - height, 0))
        candidates.append((left, top, left + width, top + height))
    others = np.array(taken, dtype=np.int64).reshape(-1, 4)
    for one in candidates:
        if not ((others[:, :2] < one[2:]) & (others[:, 2:] > one[:2])).all(axis=1).any():
            return one
    return candidates[0]


def _chip(text: str, colour: Colour, size: int, max_width: int) -> Picture:
    """Return a rounded label with its text, transparent outside, no wider than ``max_width``."""
    large = size * _SMOOTH
    font = _font(large, text)
    pad = round(large * 0.38)
    text = _shortened(text, font, max_width * _SMOOTH - 2 * pad)
    ascent = round(large * 0.74)
    height = round(large * 1.42 / _SMOOTH) * _SMOOTH
    width = min(math.ceil((font.getlength(text) + 2 * pad) / _SMOOTH), max_width) * _SMOOTH
    chip = PillowImage.new("RGBA", (width, height), (*colour, 0))
    pen = ImageDraw.Draw(chip)
    pen.rounded_rectangle((0, 0, width - 1, height - 1), radius=round(large * 0.3), fill=(*colour, 255))
    pen.text((pad, (height + ascent) // 2), text, font=font, fill=(*_text_colour(colour), 255), anchor="ls")
    return chip.resize((width // _SMOOTH, height // _SMOOTH), PillowImage.Resampling.BOX)


def _text_colour(colour: Colour) -> Colour:
    """Return black or white, whichever has the higher contrast (WCAG 2.2, relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (16, 17, 20) if (luminance + 0.05) ** 2 > 0.05 * 1.05 else _WHITE


def _write(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, *, colour: Colour, max_width: int
) -> None:
    font = _font(size, text)
    pen.text(at, _shortened(text, font, max_width), font=font, fill=colour, anchor="lm")


def _shortened(text: str, font: Font, max_width: float) -> str:
    if font.getlength(text) <= max_width:
        return text
    keep = len(text)
    while keep > 0 and font.getlength(text[:keep] + "…") > max_width:
        keep -= 1
    return text[:keep] + "…"


@functools.lru_cache(maxsize=256)
def _font(size: int, text: str) -> Font:
    """Return Pillow's own font, or the first on this system that has every letter of the text."""
    own = ImageFont.load_default(size)
    fonts: list[Font] = [own]
    for name in () if _has_all(own, text) else _FALLBACK_FONTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, round(size * 0.95)))
    return next((font for font in fonts if _has_all(font, text)), own)


def _has_all(font: Font, text: str) -> bool:
    missing = bytes(font.getmask("\uffff"))
    return all(bytes(font.getmask(letter)) != missing for letter in set(text) if not letter.isascii())


def _scale_to(picture: Picture, scale: float) -> Picture:
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture if size == picture.size else picture.resize(size, PillowImage.Resampling.LANCZOS)


def _cell_scale(size: tuple[int, int], cell: int) -> float:
    return min(cell / size[0], cell * 4 / 3 / size[1])


def _rounded_mask(size: tuple[int, int], radius: int) -> Picture:
    mask = PillowImage.new("L", (size[0] * _SMOOTH, size[1] * _SMOOTH))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), radius=radius * _SMOOTH, fill=255)
    return mask.resize(size, PillowImage.Resampling.BOX)


def _flow(sizes: Sequence[tuple[int, int]], width: int, gap: int) -> tuple[list[tuple[int, int]], int]:
    """Return left and top of each of a number of chips, set in lines like words, and the height of all lines."""
    spots: list[tuple[int, int]] = []
    x = y = 0
    for chip_width, chip_height in sizes:
        if x and x + chip_width > width:
            x, y = 0, y + chip_height + gap
        spots.append((x, y))
        x += chip_width + gap
    return spots, y + max((size[1] for size in sizes), default=0)
