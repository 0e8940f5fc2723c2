"""The engine under the headline numbers: hotcoco, given columns, asked for its precision and recall arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from detkit.boxes import xyxy_to_xywh
from detkit.scores.matching import image_of_each_box
from detkit.scores.protocol import AREAS, IOU_THRESHOLDS, RECALLS

if TYPE_CHECKING:
    from detkit.data import Dataset, Flags
    from detkit.scores.matching import Found, Matching
    from detkit.scores.protocol import Floats

_IGNORED_AREA = -1.0
"""An area in no range: cocoapi ignores such an object everywhere. Its own ``ignore`` key is overwritten by iscrowd."""


def engine_name() -> str:
    """Return the engine and its version, as the protocol says it."""
    import hotcoco

    return f"hotcoco {hotcoco.__version__}"


def accumulate(
    data: Dataset, found: Found, limits: Sequence[int], kind: Literal["bbox", "segm"] = "bbox"
) -> tuple[Floats, Floats]:
    """Return precision ``(iou, recall, class, area, limit)`` and recall ``(iou, class, area, limit)``.

    Both are -1 where a class has no object of that size. ``segm`` compares masks instead of boxes.
    """
    if not len(data) or not data.classes:
        shape = (len(IOU_THRESHOLDS), len(data.classes), len(AREAS), len(limits))
        return np.full((shape[0], len(RECALLS), *shape[1:]), -1.0), np.full(shape, -1.0)
    evaluation = _evaluation(data, found, kind)
    evaluation.params.max_dets = list(limits)
    evaluation.evaluate()
    evaluation.accumulate()
    arrays = evaluation.eval
    assert arrays is not None
    return np.asarray(arrays["precision"]), np.asarray(arrays["recall"])


def error_types(matching: Matching, iou: float, background: float) -> dict[str, Any]:
    """Return hotcoco's ``tide_errors`` at one overlap: ``delta_ap`` and ``counts`` by type.

    hotcoco would take a detection beside a difficult object, or a crowd of its class, for a badly placed or wrongly
    named one. So it never sees these objects, nor the detections that found them; no other match changes by that, as
    an ignored object is only taken where no other is left.
    """
    matched = matching.at(iou)
    on_ignored = np.zeros(len(matched), dtype=bool)
    on_ignored[matched >= 0] = matching.ignored[matched[matched >= 0]]
    evaluation = _evaluation(matching.data, matching.found.take(~on_ignored), "bbox", ~matching.ignored)
    evaluation.params.max_dets = [max(len(matched), 1)]  # the matching has what the limit leaves
    evaluation.params.iou_thrs = [iou]
    evaluation.params.area_rng = [list(AREAS[0][1:])]
    evaluation.params.area_rng_lbl = [AREAS[0][0]]
    evaluation.evaluate()
    found_types: dict[str, Any] = evaluation.tide_errors(pos_thr=iou, bg_thr=background)
    return found_types


def _evaluation(data: Dataset, found: Found, kind: Literal["bbox", "segm"], objects: Flags | None = None) -> Any:
    """Return a ``COCOeval`` of all objects, or of those that a column of flags names."""
    import hotcoco

    masks = kind == "segm"
    rows = slice(None) if objects is None else objects
    truth = hotcoco.COCO.from_arrays(
        [{"id": i + 1, "width": w, "height": h} for i, (w, h) in enumerate(data.sizes.tolist())],
        [{"id": k + 1, "name": name} for k, name in enumerate(data.classes)],
        image_of_each_box(data)[rows] + 1,
        data.labels[rows] + 1,
        xyxy_to_xywh(data.boxes[rows]),
        area=np.where(data.difficult & ~data.crowd, _IGNORED_AREA, np.maximum(data.area, 0))[rows],
        iscrowd=data.crowd[rows],
        segmentation=list(data.masks) if masks and data.masks is not None else None,
    )
    columns = np.column_stack([found.images + 1.0, xyxy_to_xywh(found.boxes), found.scores, found.labels + 1.0])
    if not masks:
        return hotcoco.COCOeval(truth, truth.load_res(columns), kind)
    assert found.masks is not None
    results = truth.load_res(columns, segmentation=list(found.masks))
    # cocoapi's size of a detection is that of its mask; `load_res` took the box's, as it does for a record with both.
    areas = [float(hotcoco.mask.area(results.ann_to_rle(record))) for record in results.dataset["annotations"]]
    results.update_anns(ids=np.arange(1, len(areas) + 1), area=np.array(areas))
    return hotcoco.COCOeval(truth, results, kind)
