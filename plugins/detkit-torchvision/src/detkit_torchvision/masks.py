"""Data that a network which learns masks can be trained on."""

from __future__ import annotations

from collections.abc import Mapping

from detkit.data import Dataset
from detkit.errors import InvalidData


def require_masks(model: str, channels: Mapping[str, Dataset]) -> None:
    """Raise `InvalidData` where objects to learn or to validate on, crowd regions left out, have no mask."""
    for name in ("train", "validation"):
        if (data := channels.get(name)) is None:
            continue
        masks = data.masks or (None,) * len(data.labels)
        without = [row for row, mask in enumerate(masks) if not mask and not data.crowd[row]]
        if without:
            image = int(data.offsets.searchsorted(without[0], side="right")) - 1
            objects = int((~data.crowd).sum())
            raise InvalidData(
                f"{model} learns masks, and {len(without)} of {objects} objects of the {name} data have none, first in "
                f"{data.image_ids[image]}",
                hint="give polygons or run-length encodings for all of them, as COCO's segmentation, or train a model "
                "that learns boxes only, e.g. torchvision/fasterrcnn_resnet50_fpn_v2",
            )
