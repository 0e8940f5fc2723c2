"""What is sound, and yet more than some default or backend takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from detkit import plugins
from detkit.dialects import SAGEMAKER_OBJECT_DETECTION, Limits
from detkit.formats.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detkit.data import Dataset

COCO_MAX_DETECTIONS = 100
"""Detections of an image that COCO's protocol counts (``maxDets`` of pycocotools)."""

_FIRST_IDS = {"id": (0, 1), "class_id": (0,), "category_id": (0,)}
"""How formats call the id of a class, and where their ids may begin: COCO's, SageMaker's, JumpStart's."""
_MANIFESTS = (".manifest", ".jsonl")
_LEAST_OUTSIDE, _LEAST_FITTING, _LEAST_BOXES = 0.25, 0.8, 4
_SHRUNK = 1.5
"""Boxes that reach no further than this many widths or heights may also be those of images made smaller later."""
_TOLERANCE_PX = 1.0


def declared() -> list[Limits]:
    """Return the limits of SageMaker's algorithm, whose formats are built in, and those of installed dialects."""
    found = [SAGEMAKER_OBJECT_DETECTION]
    dialects = [dialect for backend in plugins.backends().values() for dialect in backend.dialects]
    return [*found, *(d.limits for d in dialects if d.limits is not None and d.limits not in found)]


def label_width(data: Dataset) -> int:
    """Return what ``label_width`` of SageMaker's built-in algorithm has to be: 2, and 5 for each box of the fullest
    image (AWS: Object Detection Hyperparameters)."""
    return 2 + 5 * int(data.boxes_per_image().max(initial=0))


def check_limits(data: Dataset) -> Iterator[Finding]:
    """Yield a note for each limit of others that this data goes beyond, at the image that goes furthest."""
    counts = data.boxes_per_image()

    def note(code: str, message: str, image: int | None = None) -> Finding:
        source = data.sources[image or 0]
        return Finding(
            code=code,
            severity="note",
            message=message,
            file=source or ("" if image is None else data.paths[image]),
            image=image,
            place="" if image is None else data.image_ids[image],
        )

    fullest = int(np.argmax(counts))
    if counts[fullest] > COCO_MAX_DETECTIONS:
        over = int((counts > COCO_MAX_DETECTIONS).sum())
        yield note(
            "crowded-image",
            f"{over} image(s) have more boxes than the {COCO_MAX_DETECTIONS} detections that COCO's protocol counts, "
            f"this one {counts[fullest]}; train and evaluate with max_detections={2 * int(counts[fullest])}",
            fullest,
        )
    ids = _ids_told(data)
    empty = [i for i in np.flatnonzero(counts == 0).tolist() if data.sources[i].lower().endswith(_MANIFESTS)]
    for limits in declared():
        if limits.label_width is not None and label_width(data) > limits.label_width:
            yield note(
                "sagemaker-label-width",
                f"with {counts[fullest]} boxes, {limits.who} needs label_width={label_width(data)}, and stops at its "
                f"default of {limits.label_width}",
                fullest,
            )
        if limits.ids_from_zero and ids:
            yield note(
                "class-ids",
                f"{ids}; {limits.who} takes 0 to {len(data.classes) - 1} without gaps, which `detkit convert DATA OUT "
                "--to manifest`, or any of its other formats, writes",
            )
        if limits.needs_objects and empty:
            yield note(
                "no-objects",
                f"{len(empty)} line(s), of which this is the first, have no box, on which {limits.who} fails; leave "
                "them out of the manifest that it gets",
                empty[0],
            )


def _ids_told(data: Dataset) -> str:
    """Say what is unusual about the class ids of the file; nothing where they begin as usual and have no gaps."""
    for key, begins in _FIRST_IDS.items():
        kept = [extra.get(key) for extra in data.class_extra or ()]
        ids = sorted(number for number in kept if type(number) is int)
        if len(ids) == len(kept) > 0 and all(ids != list(range(at, at + len(ids))) for at in begins):
            gaps = " with gaps" if ids[-1] - ids[0] >= len(ids) else ""
            return f"the class ids of the file are {ids[0]} to {ids[-1]}{gaps} for {len(ids)} classes"
    return ""


def check_corners(data: Dataset) -> Iterator[Finding]:
    """Yield an error where boxes are corners and were read as left, top, width, height.

    Then many hang far out of their images, and nearly all lie in their images if widths and heights are taken for the
    right and lower edges; some may be wrong in another way. It is a warning where none hangs out far, as large boxes of
    images that were made smaller do the same.
    """
    if len(data.boxes) < _LEAST_BOXES:
        return
    owner = np.repeat(np.arange(len(data)), data.boxes_per_image())
    sizes = data.sizes[owner]
    low, high = data.boxes[:, :2], data.boxes[:, 2:]
    with np.errstate(invalid="ignore"):
        sides = high - low
    outside = (high > sizes + _TOLERANCE_PX).any(axis=1)
    fitting = ((sides > low) & (sides <= sizes + _TOLERANCE_PX)).all(axis=1)
    if outside.mean() < _LEAST_OUTSIDE or fitting.mean() < _LEAST_FITTING or not (outside & fitting).any():
        return
    row = int(np.flatnonzero(outside & fitting)[0])
    shrunk = bool((high <= _SHRUNK * sizes).all())
    unless = "unless the images were made smaller after they were annotated, " if shrunk else ""
    image = int(owner[row])
    x, y, w, h = (f"{value:g}" for value in (*low[row], *sides[row]))
    yield Finding(
        code="sizes-are-corners",
        severity="warning" if shrunk else "error",
        message=f"{int(outside.sum())} of {len(data.boxes)} boxes lie outside of their images, and "
        f"{'all' if fitting.all() else int(fitting.sum())} fit if their widths and heights are right and lower edges. "
        f"{unless}this one, left {x}, top {y}, width {w}, height {h}, probably "
        f"goes from {x}, {y} to {w}, {h}; write its width {sides[row, 0] - low[row, 0]:g} and height "
        f"{sides[row, 1] - low[row, 1]:g}, and so for all",
        file=data.sources[image] or data.paths[image],
        image=image,
        box=row,
        record=int(data.records[row]),
        place=data.image_ids[image],
    )
