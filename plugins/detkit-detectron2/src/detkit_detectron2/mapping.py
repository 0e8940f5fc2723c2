"""A dataset mapper of the user's own code: from an image's record in Detectron2's format to what its models take."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode, Instances
from torch import Tensor

from detkit import usercode
from detkit.data import Dataset
from detkit.errors import DetkitError, InvalidData, UserCodeFailed
from detkit.masks import decode, encode


class Mapper:
    """Makes the training examples of a data set by what ``mapper=module:name`` names.

    A class is made as ``Class(cfg, is_train=True)``, as Detectron2's own trainer makes its ``DatasetMapper``. Anything
    else is called with each image's record as it is.
    """

    def __init__(self, reference: str, data: Dataset, cfg: CfgNode) -> None:
        """Raises `UserCodeFailed`, `InvalidValue` and `UnknownName` for a name that stands for no mapper."""
        self._setting, self._data, self._has_masks = f"mapper={reference}", data, bool(cfg.MODEL.MASK_ON)
        self._map: Callable[..., Any] = usercode.find_function(reference, "mapper")
        if inspect.isclass(self._map):
            self._map = self._call("made with cfg and is_train=True", cfg, is_train=True)

    def example(self, index: int, seed: Sequence[int]) -> dict[str, Any]:
        """Return what the mapper makes of one image; its numbers of ``numpy.random`` and ``random`` are of the seed.

        Two threads must not call it at once. Raises `UserCodeFailed` where the mapper fails or returns something else,
        and `InvalidData` for an image or a mask that cannot be given to it.
        """
        record = self._record(index)
        doing = f"given {record['file_name']}"
        state = np.random.SeedSequence(list(seed)).generate_state(4)
        np.random.seed(state)
        random.seed(state.tobytes())
        example = self._call(doing, record)
        if (wrong := self._what_is_wrong(example)) is not None:
            raise UserCodeFailed(
                f"{self._setting}, {doing}, returned {wrong}; expected a dict with image, a tensor of 3 channels, "
                "height and width, and instances, with gt_boxes, gt_classes and, where masks are learned, gt_masks"
            )
        return {"image": example["image"], "instances": example["instances"]}

    def _call(self, doing: str, *given: Any, **named: Any) -> Any:
        try:
            return self._map(*given, **named)
        except DetkitError:
            raise
        except Exception as error:
            raise usercode.failure(f"{self._setting}, {doing},", error) from error

    def _record(self, index: int) -> dict[str, Any]:
        """Return one image in Detectron2's format: corners in pixels, labels from 0; crowd regions are left out."""
        data, file = self._data, Path(self._data.paths[index])
        if not file.is_file() or file.stat().st_size == 0:  # in a pack or a video, or a stand-in for one elsewhere
            raise InvalidData(
                f"{self._setting} reads image files by itself, and {file} is none on this machine; "
                "`detkit convert` writes the images of a data set as files"
            )
        width, height = data.sizes[index].tolist()
        rows = range(int(data.offsets[index]), int(data.offsets[index + 1]))
        return {
            "file_name": str(file),
            "image_id": data.image_ids[index],
            "width": width,
            "height": height,
            "annotations": [self._annotation(row, width, height) for row in rows if not data.crowd[row]],
        }

    def _annotation(self, row: int, width: int, height: int) -> dict[str, Any]:
        data = self._data
        found = {
            "bbox": data.boxes[row].tolist(),
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": int(data.labels[row]),
            "iscrowd": 0,
        }
        if self._has_masks and data.masks is not None:
            mask = data.masks[row]
            counts = mask.get("counts") if isinstance(mask, dict) else None
            # Detectron2 reads polygons and compressed lengths, no lists of them.
            found["segmentation"] = encode(decode(mask, (width, height))) if isinstance(counts, list) else mask
        return found

    def _what_is_wrong(self, example: Any) -> str | None:
        """Tell what an example is that no model could take, None where there is nothing wrong."""
        if not isinstance(example, dict):
            return type(example).__name__
        image, objects = example.get("image"), example.get("instances")
        if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3:
            return f"the image {tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__}"
        if not isinstance(objects, Instances):
            return f"the instances {type(objects).__name__}"
        needed = ("gt_boxes", "gt_classes", *(("gt_masks",) if self._has_masks and len(objects) else ()))
        lacking = [name for name in needed if not objects.has(name)]
        return f"instances without {', '.join(lacking)}" if lacking else None
