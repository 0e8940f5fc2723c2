"""What of a network can be chosen: backbone, anchors, proposals. Nothing here imports torch; the controller checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detkit.boxes import Boxes
from detkit.errors import InvalidValue, UnknownName

BACKBONES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
    *("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
)
"""torchvision's names, repeated here so that refusing others needs no torch."""

OWN_BACKBONES: Mapping[str, str] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": "mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_fpn": "mobilenet_v3_large",
    "retinanet_resnet50_fpn": "resnet50",
    "fasterrcnn_resnet50_fpn": "resnet50",
    "maskrcnn_resnet50_fpn": "resnet50",
    "fcos_resnet50_fpn": "resnet50",
    "retinanet_resnet50_fpn_v2": "resnet50",
    "fasterrcnn_resnet50_fpn_v2": "resnet50",
    "maskrcnn_resnet50_fpn_v2": "resnet50",
}
"""The models that can have another backbone, each with its own."""

NUM_SIZES = 5
"""Anchor sizes of each model that has them: one for each level of its pyramid; the light Faster R-CNNs, whose pyramids
have three levels, have all at each level."""

_SIZE_STEP = 2 ** (1 / 3)
"""Least ratio of two sizes that ``auto`` chooses: that of two scales of RetinaNet's anchors."""

_LEAST_SIZE = 4
"""Pixels of the smallest anchor that ``auto`` chooses: the stride of the finest level."""

_RATIO_QUANTILES = (1 / 6, 1 / 2, 5 / 6)
"""As many ratios as torchvision's models have, so that their weights fit."""


@dataclass(frozen=True)
class Architecture:
    """What of a network differs from the model's own."""

    backbone: str | None = None
    anchor_sizes: tuple[float, ...] = ()
    """Sides in pixels of the network's input, ascending."""
    anchor_ratios: tuple[float, ...] = ()
    """Height over width."""
    proposals: int | None = None

    @classmethod
    def from_native(cls, native: Mapping[str, Any]) -> Architecture:
        """Read what `native` wrote into a manifest; the model's own where that says nothing."""
        return cls(
            backbone=native.get("backbone"),
            anchor_sizes=tuple(native.get("anchor_sizes", ())),
            anchor_ratios=tuple(native.get("anchor_ratios", ())),
            proposals=native.get("proposals"),
        )

    def native(self) -> dict[str, Any]:
        """Return what is not the model's own, as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items() if value}


OWN = Architecture()


def own_proposals(model: str) -> int:
    """Return torchvision's number of proposals at test time, before and after NMS."""
    return 150 if "_320_" in model else 1000


def require_architecture(model: str, architecture: Mapping[str, Any], weights: str | None) -> None:
    """Raise `InvalidValue` or `UnknownName` for what a model cannot have; values are those of the parameters."""
    backbone, sizes, ratios, proposals = (
        architecture[name] for name in ("backbone", "anchor_sizes", "anchor_ratios", "proposals")
    )
    own = OWN_BACKBONES.get(model)
    if backbone is not None:
        if own is None:
            raise InvalidValue(
                "backbone", backbone, f"{model} has only its own; {', '.join(OWN_BACKBONES)} have others"
            )
        if backbone not in BACKBONES:
            raise UnknownName("backbone", backbone, BACKBONES)
        if backbone != own and weights in {"coco", "auto"}:
            expected = f"those weights are of {own}; with backbone={backbone} choose weights=imagenet, none or a file"
            raise InvalidValue("weights", weights, expected)
    if (sizes or ratios) and (own is None or model.startswith("fcos")):
        name, value = ("anchor_sizes", sizes) if sizes else ("anchor_ratios", ratios)
        raise InvalidValue(name, value, f"the anchors of {model} cannot be chosen; R-CNNs and RetinaNets have a choice")
    if sizes and sizes != "auto" and (len(sizes) != NUM_SIZES or list(sizes) != sorted(set(sizes))):
        raise InvalidValue("anchor_sizes", sizes, f"expected auto or {NUM_SIZES} ascending sides in pixels")
    if any(not math.isfinite(value) for values in (sizes, ratios) if values != "auto" for value in values):
        raise InvalidValue("anchor_sizes", sizes, "expected finite numbers")
    if proposals is not None and "rcnn" not in model:
        raise InvalidValue("proposals", proposals, f"{model} has one stage, without proposals; R-CNNs have them")


def anchor_sizes(boxes: Boxes) -> tuple[float, ...]:
    """Return the sizes for boxes in pixels of the input: the 10, 30, 50, 70 and 90 % quantiles of ``sqrt(area)``.

    They are whole, at least 4 pixels, and each at least ``2 ** (1/3)`` times the one before, even where all boxes are
    of one size.
    """
    chosen: list[float] = []
    for quantile in np.quantile(np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)), np.linspace(0.1, 0.9, NUM_SIZES)):
        least = math.ceil(chosen[-1] * _SIZE_STEP) if chosen else _LEAST_SIZE
        chosen.append(float(max(least, round(quantile))))
    return tuple(chosen)


def anchor_ratios(boxes: Boxes) -> tuple[float, ...]:
    """Return the quantiles at 1/6, 1/2 and 5/6 of height over width of boxes in pixels of the input."""
    sides: NDArray[np.float64] = np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-6)
    return tuple(round(float(q), 3) for q in np.quantile(sides[:, 1] / sides[:, 0], _RATIO_QUANTILES))
