"""What the torchvision backend takes, its models with their own defaults, and the answer to ``model="auto"``."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, structs
from msgspec.structs import replace

from detkit.backends import ModelSpec, SeveralOptions, Suggestion
from detkit.data import Dataset
from detkit.errors import InvalidValue, WeightsMissing
from detkit.params import (
    AnchorRatios,
    AutoAmp,
    AutoAnchorSizes,
    AutoBatchSize,
    Backbone,
    EmaDecay,
    FrozenStages,
    GradAccumulation,
    GradientClip,
    ImageSize,
    LearningRate,
    LoopParams,
    MaxDetections,
    Momentum,
    NmsThreshold,
    Optimizer,
    Params,
    Proposals,
    WeightDecay,
    Weights,
)
from detkit_torchvision.architecture import require_architecture
from detkit_torchvision.masks import require_masks

Augmentation = Literal["hflip", "vflip", "zoom", "color", "mosaic", "iou_crop", "copy_paste"]


class TorchvisionParams(LoopParams, frozen=True):
    """Hyperparameters; the defaults are those of our own small family, learned from scratch."""

    batch_size: AutoBatchSize = 8  # type: ignore[assignment]  # wider than the loop's: the engine makes it a number
    grad_accumulation: GradAccumulation = 1
    learning_rate: LearningRate = 3e-3
    optimizer: Optimizer = "adamw"
    momentum: Momentum = 0.9
    weight_decay: WeightDecay = 0.02
    gradient_clip: GradientClip | None = 10.0
    ema_decay: EmaDecay | None = None
    amp: AutoAmp | None = None
    frozen_stages: FrozenStages = 0
    batch_norm: Annotated[
        Literal["auto", "train", "frozen"],
        Meta(
            description="whether batch norms learn or keep their weights and statistics; auto: as torchvision trains "
            "the model: frozen for its first versions where they start from weights"
        ),
    ] = "auto"
    image_size: ImageSize = "auto"
    multi_scale: Annotated[
        float,
        Meta(ge=0, lt=1, description="how far the size of a step's images may lie from image_size, as a share of it"),
    ] = 0.0
    augmentations: Annotated[
        tuple[Augmentation, ...],
        Meta(
            description="random changes to each training image: mirror, turn upside down, zoom and crop, light, a "
            "crop of four images together (not in the last quarter of training), SSD's crop around objects, and "
            "objects of another image pasted in (masks only)"
        ),
    ] = ("hflip",)
    weights: Weights = None
    nms_threshold: NmsThreshold | None = None
    max_detections: MaxDetections = "auto"
    backbone: Backbone | None = None
    anchor_sizes: AutoAnchorSizes = ()
    anchor_ratios: AnchorRatios = ()
    proposals: Proposals | None = None
    modify: Annotated[
        str | None,
        Meta(description="module:function of your own code that gets the built network and returns the one to train"),
    ] = None


class TorchvisionOptions(SeveralOptions, frozen=True, kw_only=True):
    """Where and how fast."""

    threads: Annotated[
        Annotated[int, Meta(ge=1)] | Literal["auto"],
        Meta(
            description="threads of a step on a CPU; auto: torch's own, one per core; 1 is far faster on a busy machine"
        ),
    ] = "auto"
    processes: Annotated[
        Annotated[int, Meta(ge=1)] | Literal["auto"],
        Meta(
            description="processes of each machine that train together on its CPU; auto: one, or one on each core "
            "where that is faster, tried before training; batch norms see the images of one process at a time"
        ),
    ] = 1  # type: ignore[assignment]  # wider than that of engines which measure nothing
    tune_step: Annotated[
        Literal["off", "auto"],
        Meta(
            description="auto: try before training in which layout and on how many threads a step is fastest; this "
            "changes the last bits of the results"
        ),
    ] = "off"
    compile: Annotated[
        bool | Literal["graphs"],
        Meta(
            description="compile the backbone (torch.compile): a minute or two at the beginning, for long trainings; "
            "graphs: also record it in CUDA graphs, on a GPU"
        ),
    ] = False


_STOCK = replace(
    TorchvisionParams(),
    epochs=12,
    optimizer="sgd",
    learning_rate=0.01,
    weight_decay=1e-4,
    weights="auto",
    batch_size=4,
)
"""For fine-tuning. Where a model names a learning rate as a product, it is that of torchvision's recipe (its
references/detection/README.md; pull requests 5756 and 5763 for the v2 models) times our batch over the recipe's."""

_ALL_WEIGHTS = ("coco", "imagenet", "auto")
_LICENCE = "BSD-3-Clause (torchvision); trained on COCO 2017, whose own terms may apply"

_ANCHORS = ("classification", "bbox_regression")
_TWO_STAGES = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
_LOSSES = {
    "ssd": _ANCHORS,
    "ssdlite320": _ANCHORS,
    "ssd300": _ANCHORS,
    "retinanet": _ANCHORS,
    "fcos": (*_ANCHORS, "bbox_iou"),
    "fasterrcnn": _TWO_STAGES,
    "maskrcnn": (*_TWO_STAGES, "loss_mask"),
}
"""Parts of the loss, as torchvision calls them, by the first part of a model's name."""

_SPECS: Mapping[str, ModelSpec] = {
    "ssd_tiny": ModelSpec(params=TorchvisionParams(), summary="0.8 M parameters, SSD head; the fastest, CPU"),
    "fcos_tiny": ModelSpec(
        params=TorchvisionParams(), summary="0.9 M parameters, FCOS head; learns from scratch in minutes, CPU"
    ),
    "fcos_small": ModelSpec(
        params=replace(
            TorchvisionParams(),
            epochs=90,
            batch_size=16,
            learning_rate=2e-3,
            weight_decay=0.05,
            ema_decay=0.998,
            augmentations=("hflip", "zoom", "color", "mosaic"),
            validate_every="4 epochs",
        ),
        summary="2.7 M parameters, FCOS head; the default from scratch, half an hour a thousand images, CPU",
    ),
    "ssdlite320_mobilenet_v3_large": ModelSpec(
        params=replace(_STOCK, learning_rate=0.02, batch_size=16),
        summary="torchvision's SSDlite at 320 pixels, COCO AP 21.3; for fine-tuning on a CPU",
        weights=("coco", "auto"),
        licence=_LICENCE,
    ),
    "fasterrcnn_mobilenet_v3_large_320_fpn": ModelSpec(
        params=_STOCK,
        summary="torchvision's light Faster R-CNN at 320 pixels, COCO AP 22.8; for a CPU",
        weights=_ALL_WEIGHTS,
        licence=_LICENCE,
    ),
    "ssd300_vgg16": ModelSpec(
        params=replace(_STOCK, learning_rate=0.002 * 8 / 32, weight_decay=5e-4, batch_size=8),
        summary="torchvision's SSD with VGG-16 at exactly 300 pixels, COCO AP 25.1; for a GPU",
        weights=_ALL_WEIGHTS,
        licence=_LICENCE,
    ),
    "fasterrcnn_mobilenet_v3_large_fpn": ModelSpec(
        params=replace(_STOCK, learning_rate=0.02 * 4 / 16),
        summary="torchvision's light Faster R-CNN at 800 pixels, COCO AP 32.8; for a GPU",
        weights=_ALL_WEIGHTS,
        licence=_LICENCE,
    ),
    "retinanet_resnet50_fpn": ModelSpec(
        params=replace(_STOCK, learning_rate=0.01 * 4 / 16),
        summary="torchvision's RetinaNet with ResNet-50, COCO AP 36.4; for a GPU",
        weights=_ALL_WEIGHTS,
        licence=_LICENCE,
    ),
    "fasterrcnn_resnet50_fpn": ModelSpec(
        params=replace(_STOCK, learning_rate=0.02 * 4 / 16),
        summary="torchvision's first Faster R-CNN with ResNet-50, COCO AP 37.0; for a GPU",
        weights=_ALL_WEIGHTS,
        licence=_LICENCE,
    ),
    "maskrcnn_resnet50_fpn": ModelSpec(
        params=replace(_STOCK, learning_rate=0.02 * 4 / 16),
        summary="torchvision's first Mask R-CNN with ResNet-50, COCO AP 37.9, of masks 34.6; for a GPU",
        weights=_ALL_WEIGHTS,
        licence=_LICENCE,
    ),
    "fcos_resnet50_fpn": ModelSpec(
        params=replace(_STOCK, learning_rate=0.01 * 4 / 16),
        summary="torchvision's FCOS with ResNet-50, COCO AP 39.2; for a GPU",
        weights=_ALL_WEIGHTS,
        licence=_LICENCE,
    ),
    "retinanet_resnet50_fpn_v2": ModelSpec(
        params=replace(_STOCK, optimizer="adamw", learning_rate=1e-4 * 4 / 16, weight_decay=0.05),
        summary="torchvision's improved RetinaNet with ResNet-50, COCO AP 41.5; for a GPU",
        weights=_ALL_WEIGHTS,
        licence=_LICENCE,
    ),
    "fasterrcnn_resnet50_fpn_v2": ModelSpec(
        params=replace(_STOCK, learning_rate=0.02 * 4 / 16),
        summary="torchvision's improved Faster R-CNN with ResNet-50, COCO AP 46.7; for a GPU",
        weights=_ALL_WEIGHTS,
        licence=_LICENCE,
    ),
    "maskrcnn_resnet50_fpn_v2": ModelSpec(
        params=replace(_STOCK, learning_rate=0.02 * 4 / 16),
        summary="torchvision's improved Mask R-CNN with ResNet-50, COCO AP 47.4, of masks 41.8; for a GPU",
        weights=_ALL_WEIGHTS,
        licence=_LICENCE,
    ),
}

MODELS: Mapping[str, ModelSpec] = {
    name: dataclasses.replace(
        spec,
        losses=(*_ANCHORS, "bbox_ctrness") if name == "fcos_resnet50_fpn" else _LOSSES[name.partition("_")[0]],
    )
    for name, spec in _SPECS.items()
}

COCO_FILES: Mapping[str, str] = {
    "ssdlite320_mobilenet_v3_large": "ssdlite320_mobilenet_v3_large_coco-a79551df.pth",
    "fasterrcnn_mobilenet_v3_large_320_fpn": "fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth",
    "ssd300_vgg16": "ssd300_vgg16_coco-b556d3b4.pth",
    "fasterrcnn_mobilenet_v3_large_fpn": "fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7.pth",
    "retinanet_resnet50_fpn": "retinanet_resnet50_fpn_coco-eeacb38b.pth",
    "fasterrcnn_resnet50_fpn": "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "maskrcnn_resnet50_fpn": "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    "fcos_resnet50_fpn": "fcos_resnet50_fpn_coco-99b0c9b7.pth",
    "retinanet_resnet50_fpn_v2": "retinanet_resnet50_fpn_v2_coco-5905b1c5.pth",
    "fasterrcnn_resnet50_fpn_v2": "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth",
    "maskrcnn_resnet50_fpn_v2": "maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth",
}
"""torchvision's file names, ordered by AP on COCO; repeated here so that looking for them needs no torch."""

_FROM_SCRATCH = "fcos_small"

_ON_A_CPU = ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn")
"""What a CPU fine-tunes in hours, the lighter first: below 1 GFLOP an image; the next needs 4.5."""

_ONLY_SIZE = {"ssd300_vgg16": 300}
"""Models whose default boxes are laid out for one size of input, in pixels."""


MASK_MODELS = ("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2")
"""Models that learn masks, and need data that have them."""


def weights_cache() -> Path:
    """Return where torch keeps what it fetched (``torch.hub.get_dir``, repeated so that looking needs no torch)."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("TORCH_HOME", str(Path(cache) / "torch"))
    return Path(home).expanduser() / "hub" / "checkpoints"


def suggest() -> Suggestion:
    """Prefer the best model whose COCO weights are here and which this machine can train; else start from scratch."""
    of_boxes = tuple(name for name in reversed(tuple(COCO_FILES)) if name not in MASK_MODELS)
    order = _ON_A_CPU if shutil.which("nvidia-smi") is None else of_boxes
    for model in order:
        if (weights_cache() / COCO_FILES[model]).is_file():
            return Suggestion(model, f"its COCO weights are in {weights_cache()}, so it is fine-tuned")
    return Suggestion(
        _FROM_SCRATCH,
        f"trained from scratch, as there are no COCO weights in {weights_cache()}; "
        f"`--model torchvision/{order[0]} weights=coco` would fetch some and fine-tune",
    )


def require(model: str, params: Params) -> None:
    """Raise before any data is read for a size that the model cannot have, or when ``weights=auto`` finds nothing."""
    assert isinstance(params, TorchvisionParams)
    size = _ONLY_SIZE.get(model)
    if size is not None and params.image_size not in {"auto", size}:
        raise InvalidValue("image_size", params.image_size, f"{model} takes inputs of {size} pixels only")
    if size is not None and params.multi_scale:
        raise InvalidValue("multi_scale", params.multi_scale, f"{model} takes inputs of {size} pixels only")
    require_architecture(model, structs.asdict(params), params.weights)
    if "copy_paste" in params.augmentations and model not in MASK_MODELS:
        expected = f"copy_paste needs masks, which {model} does not learn; {' and '.join(MASK_MODELS)} do"
        raise InvalidValue("augmentations", params.augmentations, expected)
    if params.weights == "auto" and not (path := weights_cache() / COCO_FILES[model]).is_file():
        raise WeightsMissing("auto", model, path, "they are not in the cache; weights=coco would fetch them")


def require_data(model: str, params: Params, channels: Mapping[str, Dataset]) -> None:
    """Raise before a run is started for data that a model cannot learn from."""
    if model in MASK_MODELS:
        require_masks(model, channels)


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
        "proposals": "rpn_{pre,post}_nms_top_n_test, and _train where above 2000",
        "momentum": "" if p.optimizer == "sgd" else f"not used by {p.optimizer}",
    }
