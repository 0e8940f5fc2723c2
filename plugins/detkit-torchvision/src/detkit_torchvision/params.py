"""What the torchvision backend takes, its models with their own defaults, and the answer to ``model="auto"``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta
from msgspec.structs import replace

from detkit.backends import LocalOptions, ModelSpec, Suggestion
from detkit.errors import WeightsMissing
from detkit.params import (
    GradientClip,
    ImageSize,
    LearningRate,
    LoopParams,
    MaxDetections,
    Momentum,
    NmsThreshold,
    Optimizer,
    Params,
    WeightDecay,
    Weights,
)

Augmentation = Literal["hflip", "vflip", "zoom", "color"]


class TorchvisionParams(LoopParams, frozen=True):
    """Hyperparameters; the defaults are those of our own small family, learned from scratch."""

    learning_rate: LearningRate = 3e-3
    optimizer: Optimizer = "adamw"
    momentum: Momentum = 0.9
    weight_decay: WeightDecay = 0.02
    gradient_clip: GradientClip | None = 10.0
    image_size: ImageSize = "auto"
    augmentations: Annotated[
        tuple[Augmentation, ...],
        Meta(description="random changes to each training image: mirror, turn upside down, zoom and crop, light"),
    ] = ("hflip",)
    weights: Weights = None
    nms_threshold: NmsThreshold | None = None
    max_detections: MaxDetections = "auto"


class TorchvisionOptions(LocalOptions, frozen=True, kw_only=True):
    """Where and how fast."""

    threads: Annotated[
        Annotated[int, Meta(ge=1)] | Literal["auto"],
        Meta(
            description="threads of a step on a CPU; auto: torch's own, one per core; 1 is far faster on a busy machine"
        ),
    ] = "auto"


_STOCK = replace(
    TorchvisionParams(),
    epochs=12,
    optimizer="sgd",
    learning_rate=0.01,
    weight_decay=1e-4,
    weights="auto",
    batch_size=4,
)
_LICENCE = "BSD-3-Clause (torchvision); trained on COCO 2017, whose own terms may apply"

MODELS: Mapping[str, ModelSpec] = {
    "ssd_tiny": ModelSpec(params=TorchvisionParams(), summary="0.8 M parameters, SSD head; the fastest, CPU"),
    "fcos_tiny": ModelSpec(
        params=TorchvisionParams(), summary="0.9 M parameters, FCOS head; the default from scratch, CPU"
    ),
    "fcos_small": ModelSpec(
        params=replace(TorchvisionParams(), learning_rate=2e-3),
        summary="2.7 M parameters, FCOS head; best from scratch given time, CPU",
    ),
    "ssdlite320_mobilenet_v3_large": ModelSpec(
        params=replace(_STOCK, learning_rate=0.02, batch_size=16),
        summary="torchvision's SSDlite at 320 pixels; for fine-tuning on a CPU",
        weights=("coco", "auto"),
        licence=_LICENCE,
    ),
    "fasterrcnn_mobilenet_v3_large_320_fpn": ModelSpec(
        params=_STOCK,
        summary="torchvision's light Faster R-CNN at 320 pixels",
        weights=("coco", "imagenet", "auto"),
        licence=_LICENCE,
    ),
    "fasterrcnn_resnet50_fpn_v2": ModelSpec(
        params=replace(_STOCK, learning_rate=0.005),
        summary="torchvision's Faster R-CNN with ResNet-50; for a GPU",
        weights=("coco", "imagenet", "auto"),
        licence=_LICENCE,
    ),
}

COCO_FILES: Mapping[str, str] = {
    "ssdlite320_mobilenet_v3_large": "ssdlite320_mobilenet_v3_large_coco-a79551df.pth",
    "fasterrcnn_mobilenet_v3_large_320_fpn": "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth",
    "fasterrcnn_resnet50_fpn_v2": "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth",
}
"""torchvision's file names, repeated here so that looking for them needs no torch; a test compares."""

_FROM_SCRATCH = "fcos_tiny"


def weights_cache() -> Path:
    """Return where torch keeps what it fetched (``torch.hub.get_dir``, repeated so that looking needs no torch)."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", str(Path(cache) / "torch"))
    return Path(home).expanduser() / "hub" / "checkpoints"


def suggest() -> Suggestion:
    """Prefer the best model whose COCO weights are here and which this machine can train; else start from scratch."""
    gpu = shutil.which("nvidia-smi") is not None
    order = sorted(COCO_FILES, key=list(MODELS).index, reverse=gpu)
    for model in order if gpu else order[:1]:
        if (weights_cache() / COCO_FILES[model]).is_file():
            return Suggestion(model, f"its COCO weights are in {weights_cache()}, so it is fine-tuned")
    candidate = order[0]
    return Suggestion(
        _FROM_SCRATCH,
        f"trained from scratch, as there are no COCO weights in {weights_cache()}; "
        f"`--model torchvision/{candidate} weights=coco` would fetch some and fine-tune",
    )


def require_weights(model: str, params: Params) -> None:
    """Raise before any data is read when ``weights=auto`` finds nothing in the cache."""
    assert isinstance(params, TorchvisionParams)
    if params.weights == "auto" and not (path := weights_cache() / COCO_FILES[model]).is_file():
        raise WeightsMissing("auto", model, path, "they are not in the cache; weights=coco would fetch them")


def translate(model: str, params: Params) -> Mapping[str, str]:
    """Return what torch is told, for the parameters whose name or value differs there."""
    assert isinstance(params, TorchvisionParams)
    p = params
    names = {"sgd": f"SGD(momentum={p.momentum})", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}
    optimizer = f"torch.optim.{names.get(p.optimizer, 'Adadelta')}"
    length = "ceil(training images / batch_size) steps each" if p.epochs else "total steps"
    return {
        "epochs": length if p.epochs else "",
        "iterations": length if p.iterations else "",
        "optimizer": optimizer,
        "learning_rate": f"lr={p.learning_rate:g}, the peak of the schedule",
        "weight_decay": f"weight_decay={p.weight_decay:g}, 0 on biases and norms",
        "gradient_clip": f"clip_grad_norm_(max_norm={p.gradient_clip})" if p.gradient_clip else "",
        "nms_threshold": "nms_thresh / box_nms_thresh",
        "max_detections": "detections_per_img / box_detections_per_img",
        "momentum": "" if p.optimizer == "sgd" else f"not used by {p.optimizer}",
    }
