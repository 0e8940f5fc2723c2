"""What is sound, and yet more than some default or backend takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from detkit.formats.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detkit.data import Dataset

COCO_MAX_DETECTIONS = 100
"""Detections of an image that COCO's protocol counts (``maxDets`` of pycocotools)."""
SAGEMAKER_LABEL_WIDTH = 350
"""Default of ``label_width`` of SageMaker's built-in object detection: numbers in the label of an image."""


def label_width(data: Dataset) -> int:
    """Return what ``label_width`` of SageMaker's built-in algorithm has to be: 2, and 5 for each box of the fullest
    image (AWS: Object Detection Hyperparameters)."""
    return 2 + 5 * int(data.boxes_per_image().max(initial=0))


def check_limits(data: Dataset) -> Iterator[Finding]:
    """Yield a note for each limit of others that this data goes beyond, at the image that goes furthest."""
    counts = data.boxes_per_image()
    fullest = int(np.argmax(counts))

    def note(code: str, message: str) -> Finding:
        return Finding(
            code=code,
            severity="note",
            message=message,
            file=data.sources[fullest] or data.paths[fullest],
            image=fullest,
            place=data.image_ids[fullest],
        )

    if counts[fullest] > COCO_MAX_DETECTIONS:
        over = int((counts > COCO_MAX_DETECTIONS).sum())
        yield note(
            "crowded-image",
            f"{over} image(s) have more boxes than the {COCO_MAX_DETECTIONS} detections that COCO's protocol counts, "
            f"this one {counts[fullest]}; train and evaluate with max_detections={2 * int(counts[fullest])}",
        )
    if label_width(data) > SAGEMAKER_LABEL_WIDTH:
        yield note(
            "sagemaker-label-width",
            f"with {counts[fullest]} boxes, SageMaker's built-in object detection needs label_width="
            f"{label_width(data)}, and stops at its default of {SAGEMAKER_LABEL_WIDTH}",
        )
