"""Prediction: the network without its own suppression, then suppression within each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from detkit.backends import PredictOptions
from detkit.detections import Detections
from detkit.images import Image
from detkit.job import Model
from detkit_gluoncv.batches import to_input
from detkit_gluoncv.networks import Net, load_artifact
from detkit_gluoncv.runtime import choose_context, explained_errors, mx

_MOST_BOXES = 4_000_000
"""Boxes of all images, classes and anchors that the network gives at a time; each takes some 270 bytes."""


def open_model(model: Model, options: PredictOptions) -> SsdDetector:
    """Open a finished model."""
    manifest = model.manifest
    context = choose_context(options.device)
    net = load_artifact(model)
    net.collect_params().reset_ctx(context)
    return SsdDetector(
        net,
        model.classes,
        image_size=int(manifest.native["image_size"]),
        num_anchors=int(manifest.native["anchors"]),
        context=context,
        score_threshold=options.score_threshold,
        nms_threshold=options.nms_threshold or manifest.params["nms_threshold"],
        nms_topk=int(manifest.params["nms_topk"]),
        max_detections=options.max_detections or manifest.max_detections,
    )


class SsdDetector:
    """An opened network; also what validation uses while it trains."""

    def __init__(
        self,
        net: Net,
        classes: Sequence[str],
        *,
        image_size: int,
        num_anchors: int,
        context: Any,
        score_threshold: float,
        nms_threshold: float,
        nms_topk: int,
        max_detections: int,
    ) -> None:
        """``nms_topk`` boxes of each class, the best, enter suppression; ``num_anchors`` are those of the network."""
        self._net, self._classes, self._context, self._image_size = net, tuple(classes), context, image_size
        self._score_threshold, self._nms_threshold = score_threshold, nms_threshold
        self._topk, self._max_detections = max(nms_topk, max_detections), max_detections
        self._batch = max(1, _MOST_BOXES // (num_anchors * len(classes)))
        # A graph that was traced while training returns training outputs; both calls make the network trace anew.
        net.set_nms(nms_thresh=-1)
        net.hybridize(static_alloc=True, static_shape=True)

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        found: list[Detections] = []
        with explained_errors():
            for start in range(0, len(images), self._batch):
                part = images[start : start + self._batch]
                found += map(self._detections, self._suppressed(part), part)
        return found

    def _suppressed(self, images: Sequence[Image]) -> np.ndarray:
        """Return ``(b, n, 6)`` rows of label, score and box in input pixels; label -1 where there is none."""
        ids, scores, boxes = self._net(to_input(images, self._image_size, self._context))
        # The network gives one class after the other. Each becomes a batch entry of its own, as suppression takes the
        # best of an entry first and would let a class with many boxes crowd out the others.
        rows = mx.nd.concat(ids, scores, boxes, dim=-1).reshape((len(images) * len(self._classes), -1, 6))
        kept = mx.nd.contrib.box_nms(
            rows,
            overlap_thresh=self._nms_threshold,
            topk=self._topk,
            valid_thresh=self._score_threshold,
            id_index=0,
            score_index=1,
            coord_start=2,
        )
        best = kept.slice_axis(axis=1, begin=0, end=self._max_detections)
        return np.asarray(best.reshape((len(images), -1, 6)).asnumpy(), dtype=np.float64)

    def _detections(self, rows: np.ndarray, image: Image) -> Detections:
        return to_detections(
            rows,
            image,
            self._classes,
            sides=self._image_size,
            score_threshold=self._score_threshold,
            max_detections=self._max_detections,
        )

    def close(self) -> None:
        self._net = None


def to_detections(
    rows: np.ndarray,
    image: Image,
    classes: tuple[str, ...],
    *,
    sides: float,
    score_threshold: float,
    max_detections: int,
) -> Detections:
    """Read ``(n, 6)`` rows of label, score and corners, label -1 where there is none; the input has ``sides``."""
    height, width = image.shape[:2]
    corners = np.array([width, height, width, height], dtype=np.float64)
    boxes = np.clip(np.nan_to_num(rows[:, 2:]) * (corners / sides), 0, corners)
    # A network that has learned little yet also finds boxes outside of the image.
    keep = (rows[:, 0] >= 0) & (rows[:, 1] >= score_threshold) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    order = np.flatnonzero(keep)[np.argsort(-rows[keep, 1], kind="stable")][:max_detections]
    return Detections(
        path="",
        width=width,
        height=height,
        classes=classes,
        boxes=boxes[order],
        labels=rows[order, 0].astype(np.int64),
        scores=rows[order, 1],
    )
