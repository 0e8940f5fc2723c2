"""What is wrong with boxes and with the headers of image files, and what training does about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from detkit import boxes as box_geometry
from detkit.errors import ImageError
from detkit.formats.findings import Finding, count_codes, image_finding, raise_errors, record_place
from detkit.formats.imagefacts import look
from detkit.formats.imagefiles import read_headers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from detkit.data import Dataset, Flags, Indices
    from detkit.formats.findings import Severity
    from detkit.images import Header

TOLERANCE_PX = 1.0
"""How far a box may hang over the image's border before that is an error; annotation tools round."""

_ROUNDING = 1e-6


def check_annotations(data: Dataset, headers: Sequence[Header | ImageError] | None) -> list[Finding]:
    """Return everything that is wrong with boxes and with the headers of the images, where these were looked at.

    Pixels are not decoded: a file that is cut off after its header is found by whoever reads the image.
    """
    if not len(data):
        return [_no_images()]
    if headers is None:
        return _check_boxes(data, data.sizes)
    looked = _compare(data, headers)
    # Boxes are judged in the frame they were drawn in; only an unknown size is taken from the file.
    sizes = np.where(_unknown(data)[:, None], looked.sizes, data.sizes)
    return [*looked.findings, *_check_boxes(data, sizes)]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A data set that is fit to train and score on."""

    data: Dataset
    image_digests: list[str]
    """sha256 of each image file, in order."""
    dropped: dict[str, int]
    """How many boxes were left out, by code."""
    warnings: list[Finding]


def prepare(data: Dataset, *, on_invalid: Literal["raise", "drop"]) -> Prepared:
    """Look at each image file and return the data with sizes and boxes as the images are displayed.

    An image that EXIF turns, whose recorded size is that of the stored pixels, gets its boxes turned along, with a
    warning. Faulty boxes raise `InvalidData`, or are left out and counted; faulty images always raise.
    """
    if not len(data):
        raise_errors([_no_images()])
    facts = look(data.paths, decode=False)
    looked = _compare(data, [fact if isinstance(fact, ImageError) else fact.header for fact in facts])
    raise_errors(
        looked.findings, "mend or remove these images and their annotations; images are never dropped silently"
    )
    data = _turn(data, looked)
    findings = _check_boxes(data, data.sizes)
    errors = [finding for finding in findings if finding.severity == "error"]
    if on_invalid == "raise":
        raise_errors(errors, "mend them, or leave these boxes out with --on-invalid drop (on_invalid='drop')")
    elif errors:
        keep: Flags = np.ones(len(data.boxes), dtype=bool)
        keep[[finding.box for finding in errors if finding.box is not None]] = False
        data = data.keep_boxes(keep)
        findings = _check_boxes(data, data.sizes)
    return Prepared(
        data=data,
        image_digests=[fact.digest for fact in facts if not isinstance(fact, ImageError)],
        dropped=count_codes(errors),
        warnings=[*looked.findings, *findings],
    )


def as_displayed(data: Dataset) -> Dataset:
    """Return the data with sizes and boxes as the images are displayed, for formats that give shares of the sides.

    Raises `InvalidData` for images that cannot be read, and those that have another size than the data says: whoever
    reads such shares takes the size from the image.
    """
    looked = _compare(replace(data, masks=None), read_headers(data.paths))
    raise_errors(
        looked.findings, "boxes become shares of the images' sides here; mend the sizes, or take these images out"
    )
    return _turn(data, looked)


def _no_images() -> Finding:
    return Finding(code="no-images", severity="error", message="no images; is it the right folder or split?", file="")


@dataclass(frozen=True)
class _Looked:
    """Headers against records."""

    findings: list[Finding]
    sizes: Indices
    """As displayed; the recorded one where the image could not be read."""
    turned: list[tuple[int, Header]]
    """Images whose boxes were drawn on the stored pixels."""


def _unknown(data: Dataset) -> Flags:
    return np.asarray((data.sizes <= 0).any(axis=1))


def _compare(data: Dataset, headers: Sequence[Header | ImageError]) -> _Looked:
    findings: list[Finding] = []
    turned: list[tuple[int, Header]] = []
    sizes = data.sizes.copy()
    unknown = _unknown(data)
    for i, header in enumerate(headers):
        if isinstance(header, ImageError):
            findings.append(image_finding(header, i))
            continue
        recorded = (int(data.sizes[i, 0]), int(data.sizes[i, 1]))
        displayed = (header.width, header.height)
        sizes[i] = displayed
        if header.orientation == 1 and (unknown[i] or recorded == displayed):
            continue
        severity: Severity = "warning"
        shown = f"{displayed[0]}x{displayed[1]}"
        if unknown[i] or recorded == displayed:
            if header.orientation >= 5 and header.width != header.height and not unknown[i]:
                continue
            code = "turned-image"
            message = f"EXIF orientation {header.orientation}; the boxes are taken as drawn on the picture as displayed"
        elif header.orientation >= 5 and recorded == displayed[::-1]:
            code = "turned-boxes"
            message = (
                f"its boxes were drawn on the stored pixels, which EXIF orientation {header.orientation} shows as "
                f"{shown}; training turns the boxes along"
            )
            turned.append((i, header))
            if data.masks is not None and any(data.masks[row] for row in _rows(data, i)):
                severity, code = "error", "turned-masks"
                message = (
                    f"EXIF orientation {header.orientation} turns it, and its masks were drawn on the stored pixels; "
                    "turn the image file itself, or remove the tag"
                )
        else:
            severity, code = "error", "wrong-size"
            message = f"the annotation says {recorded[0]}x{recorded[1]}, the image is {shown}"
            if header.orientation != 1:
                message += f" as displayed (EXIF orientation {header.orientation})"
        findings.append(
            Finding(
                code=code,
                severity=severity,
                message=message,
                file=data.sources[i] or data.paths[i],
                image=i,
                image_file=data.paths[i],
                place=data.image_ids[i] if data.sources[i] else "",
            )
        )
    return _Looked(findings, sizes, turned)


def _rows(data: Dataset, image: int) -> range:
    return range(int(data.offsets[image]), int(data.offsets[image + 1]))


def _turn(data: Dataset, looked: _Looked) -> Dataset:
    moved = data.boxes.copy()
    for i, header in looked.turned:
        rows = slice(int(data.offsets[i]), int(data.offsets[i + 1]))
        moved[rows] = box_geometry.orient(moved[rows], header.orientation, header.height, header.width)
    return replace(data, sizes=looked.sizes, boxes=moved)


def _check_boxes(data: Dataset, sizes: Indices) -> list[Finding]:
    boxes = data.boxes
    owner = np.repeat(np.arange(len(data)), data.boxes_per_image())
    x0, y0, x1, y1 = boxes.T
    width, height = sizes[owner].T
    finite: Flags = np.asarray(np.isfinite(boxes).all(axis=1))
    with np.errstate(invalid="ignore"):
        w, h = x1 - x0, y1 - y0
        inverted = finite & ((w < 0) | (h < 0))
        # VOC writes a point as xmin = xmax, ymin = ymax, which is one pixel: nobody can have meant that.
        empty = finite & ~inverted & ((w == 0) | (h == 0) | ((w <= 1) & (h <= 1)))
        over = np.maximum.reduce([-x0, -y0, x1 - width, y1 - height]) if len(boxes) else np.zeros(0)
        beyond = (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height)
    sound = finite & ~inverted & ~empty
    sized = sound & (width > 0) & (height > 0)
    outside = sized & ((over > TOLERANCE_PX + _ROUNDING) | beyond)
    overhang = sized & ~outside & (over > _ROUNDING)
    original = _originals(data, owner, finite)
    duplicate = original >= 0

    found: list[Finding] = []

    def note(rows: Flags, code: str, severity: Severity, message: str) -> None:
        for row in np.flatnonzero(rows).tolist():
            image = int(owner[row])
            corners = ", ".join(f"{value:.10g}" for value in boxes[row])
            text = message.format(box=f"box {corners}", over=f"{over[row]:.4g}", size=f"{width[row]}x{height[row]}")
            if code == "duplicate":
                text += _place(data, owner, original[row])
            name = data.classes[int(data.labels[row])]
            found.append(
                Finding(
                    code=code,
                    severity=severity,
                    message=text,
                    file=data.sources[image] or data.paths[image],
                    record=int(data.records[row]),
                    image=image,
                    box=row,
                    place=f"{_place(data, owner, row)} ({name})",
                )
            )

    note(~finite, "non-finite", "error", "{box} is not made of numbers")
    note(inverted, "inverted", "error", "{box} (xyxy, from 0) has its corners swapped")
    note(empty, "zero-area", "error", "{box} (xyxy, from 0) has no area, or is a single pixel")
    note(outside, "outside", "error", "{box} (xyxy, from 0) lies {over} px beyond the image of {size}")
    note(overhang, "overhang", "warning", "{box} (xyxy, from 0) hangs {over} px over the image of {size}")
    note(duplicate, "duplicate", "warning", "same class and box as ")
    return sorted(found, key=lambda finding: finding.box or 0)


def _originals(data: Dataset, owner: Indices, finite: Flags) -> NDArray[np.int64]:
    """For each box the row of an earlier one with the same image, class and corners; -1 where there is none."""
    original = np.full(len(data.boxes), -1, dtype=np.int64)
    if len(data.boxes) < 2:
        return original
    keys = np.column_stack([owner, data.labels, data.boxes])
    order = np.lexsort(keys.T)
    same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1) & finite[order[1:]]
    at = np.flatnonzero(same)
    original[order[at + 1]] = order[at]
    return original


def _place(data: Dataset, owner: Indices, row: int) -> str:
    image = int(owner[row])
    position = row - int(data.offsets[image])
    return record_place(data.sources[image], int(data.records[row]), position, data.paths[image])
