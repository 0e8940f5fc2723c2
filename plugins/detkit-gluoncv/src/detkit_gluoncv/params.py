"""What the GluonCV backend takes, and its models with their own defaults. Imports no mxnet."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta
from msgspec.structs import replace

from detkit.backends import LocalOptions, ModelSpec
from detkit.errors import InvalidValue, Unsupported, WeightsMissing
from detkit.params import (
    AnchorSizes,
    BatchSize,
    GradientClip,
    ImageSize,
    LoopParams,
    MaxDetections,
    Momentum,
    NmsThreshold,
    Optimizer,
    Params,
    WeightDecay,
    Weights,
)

Augmentation = Literal["color", "expand", "crop", "hflip"]


class GluoncvParams(LoopParams, frozen=True, kw_only=True):
    """Hyperparameters of SSD (Liu et al., 2016, arXiv:1512.02325)."""

    batch_size: BatchSize = 16
    optimizer: Optimizer = "sgd"
    momentum: Momentum = 0.9
    weight_decay: WeightDecay = 5e-4
    gradient_clip: GradientClip | None = 10.0
    image_size: ImageSize = "auto"
    anchor_sizes: AnchorSizes = ()
    augmentations: Annotated[
        tuple[Augmentation, ...],
        Meta(description="random changes to each training image: light, zoom out, crop, mirror; all are SSD's recipe"),
    ] = ("color", "expand", "crop", "hflip")
    min_hard_negatives: Annotated[
        int, Meta(ge=0, description="anchors learned as background in images without objects; 0 learns nothing there")
    ] = 3
    freeze: Annotated[
        str | None,
        Meta(description="regular expression of the parameters that stay as they are, e.g. features.stages.[01]"),
    ] = None
    weights: Weights = "auto"
    nms_threshold: NmsThreshold = 0.45
    nms_topk: Annotated[int, Meta(ge=1, description="boxes of a class and image that enter NMS, the best ones")] = 400
    max_detections: MaxDetections = "auto"


class GluoncvOptions(LocalOptions, frozen=True, kw_only=True):
    """Where and how fast."""

    threads: Annotated[
        Annotated[int, Meta(ge=1)] | Literal["auto"],
        Meta(description="OpenMP threads of a step; auto: half the cores, as MXNet's threads wait by spinning"),
    ] = "auto"


class Network(NamedTuple):
    """How a model is put together; the arguments are those of GluonCV's ``get_ssd``."""

    base: str
    """The base network, by its name in GluonCV's model zoo."""
    size: int
    """Side of the square input that the anchors are made for, pixels."""
    sizes: tuple[float, ...]
    """Sides of the anchors, pixels."""
    steps: tuple[int, ...]
    """Pixels between two anchors on each feature map."""
    features: tuple[str, ...] = ()
    """Outputs of the base network that are feature maps; VGG has an extractor of its own."""
    filters: tuple[int, ...] = ()
    """Channels of the feature maps that are added on top."""


_RESNET, _MOBILENET = ("stage3_activation5", "stage4_activation2"), ("relu22_fwd", "relu26_fwd")
_VOC_300 = (30, 60, 111, 162, 213, 264, 315)
# The maps of a 300 pixel input are 19, 10, 5, 3, 2 and 1 wide where the first has a stride of 16.
_STEPS_300 = (16, 30, 60, 100, 150, 300)
_STEPS_512 = (16, 32, 64, 128, 256, 512)

NETWORKS: Mapping[str, Network] = {
    "ssd_300_vgg16_atrous": Network("vgg16_atrous", 300, (21, 45, 99, 153, 207, 261, 315), (8, 16, 32, 64, 100, 300)),
    "ssd_512_vgg16_atrous": Network(
        "vgg16_atrous", 512, (51.2, 76.8, 153.6, 230.4, 307.2, 384, 460.8, 537.6), (8, 16, 32, 64, 128, 256, 512)
    ),
    "ssd_300_resnet50_v1": Network("resnet50_v1", 300, _VOC_300, _STEPS_300, _RESNET, (512, 512, 256, 256)),
    "ssd_512_resnet50_v1": Network(
        "resnet50_v1", 512, (51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72), _STEPS_512, _RESNET,
        (512, 512, 256, 256),
    ),
    "ssd_300_mobilenet1.0": Network("mobilenet1.0", 300, _VOC_300, _STEPS_300, _MOBILENET, (512, 512, 256, 256)),
    "ssd_512_mobilenet1.0": Network(
        "mobilenet1.0", 512, (51.2, 102.4, 189.4, 276.4, 363.52, 450.6, 492), _STEPS_512, _MOBILENET,
        (512, 512, 256, 256),
    ),
    "ssd_300_mobilenet0.25": Network(
        "mobilenet0.25", 300, (21, 45, 99, 153, 207, 261, 315), _STEPS_300, _MOBILENET, (256, 256, 128, 128)
    ),
}  # fmt: skip
"""The presets of GluonCV 0.10.5 (``model_zoo/ssd/presets.py``, those named ``_custom``).

Where GluonCV has no such preset (ResNet-50 and MobileNet-1.0 at 300 pixels) the anchors are those of its VOC preset
for 300 pixels. Its preset of MobileNet-0.25 spaces the anchors of the first map by 8 pixels, which covers a quarter of
the image; here they lie 16 apart, as the map does.
"""

_BASE_FILES = {
    "vgg16_atrous": "vgg16_atrous-4fa2e1ad",
    "resnet50_v1": "resnet50_v1-cc729d95",
    "mobilenet1.0": "mobilenet1.0-efbb2ca3",
    "mobilenet0.25": "mobilenet0.25-f0046a3d",
}

PUBLISHED: Mapping[tuple[str, str], str] = {
    ("ssd_300_vgg16_atrous", "voc"): "ssd_300_vgg16_atrous_voc-0e169fbb",
    ("ssd_300_vgg16_atrous", "coco"): "ssd_300_vgg16_atrous_coco-b302ad8a",
    ("ssd_512_vgg16_atrous", "voc"): "ssd_512_vgg16_atrous_voc-daf8181b",
    ("ssd_512_vgg16_atrous", "coco"): "ssd_512_vgg16_atrous_coco-5c860642",
    ("ssd_512_resnet50_v1", "voc"): "ssd_512_resnet50_v1_voc-9c8b225a",
    ("ssd_512_resnet50_v1", "coco"): "ssd_512_resnet50_v1_coco-c4835162",
    ("ssd_512_mobilenet1.0", "voc"): "ssd_512_mobilenet1.0_voc-37c18076",
    ("ssd_512_mobilenet1.0", "coco"): "ssd_512_mobilenet1.0_coco-da9756fa",
    **{(name, "imagenet"): _BASE_FILES[network.base] for name, network in NETWORKS.items()},
}
"""GluonCV's file of each model and word of ``weights=``; repeated so that looking needs no mxnet, a test compares."""

_LICENCE = "Apache-2.0 (GluonCV); trained on {}, whose own terms may apply"
LICENCES: Mapping[str, str] = {
    "coco": _LICENCE.format("COCO 2017"),
    "voc": _LICENCE.format("Pascal VOC 2007 and 2012"),
    "imagenet": _LICENCE.format("ImageNet-1K"),
}

_WORDS = ("coco", "voc", "imagenet")
"""The order in which ``weights=auto`` looks."""

_SUMMARIES = {
    "vgg16_atrous": "VGG-16: slow, accurate on small objects",
    "resnet50_v1": "ResNet-50",
    "mobilenet1.0": "MobileNet: for a CPU",
    "mobilenet0.25": "a quarter of MobileNet: for trying things out, CPU",
}


def _spec(name: str, network: Network) -> ModelSpec:
    words = tuple(word for word in _WORDS if (name, word) in PUBLISHED)
    params = GluoncvParams()
    if network.base == "mobilenet0.25":
        params = replace(params, weights=None, optimizer="adam", weight_decay=1e-4)
    return ModelSpec(
        params=params,
        summary=f"SSD at {network.size} pixels on {_SUMMARIES[network.base]}",
        weights=(*words, "auto"),
        licence=LICENCES["coco" if "coco" in words else "imagenet"],
        losses=("classification", "bbox_regression"),
    )


MODELS: Mapping[str, ModelSpec] = {name: _spec(name, network) for name, network in NETWORKS.items()}


def weights_cache() -> Path:
    """Return where GluonCV keeps what it fetched (its ``get_model_file``, repeated so that looking needs no mxnet)."""
    return Path(os.environ.get("MXNET_HOME", "~/.mxnet")).expanduser() / "models"


def weights_file(model: str, word: str) -> Path:
    """Return where a model's published weights lie, or would."""
    return weights_cache() / f"{PUBLISHED[model, word]}.params"


def cached_word(model: str) -> str | None:
    """Return what ``weights=auto`` stands for: the best of a model's published weights that is in the cache."""
    found = (word for word in _WORDS if (model, word) in PUBLISHED and weights_file(model, word).is_file())
    return next(found, None)


def image_sizes(model: str) -> range:
    """Return the sides of the input that a model can have, in pixels.

    GluonCV keeps 128 x 128 anchors of the first map; the last maps of VGG have no padding and vanish on small inputs
    (257 was found by trying).
    """
    network = NETWORKS[model]
    return range(32 if network.features else 257, 128 * network.steps[0] + 1)


def require(model: str, params: Params) -> None:
    """Raise before any data is read where GluonCV cannot do what is asked, or ``weights=auto`` finds nothing."""
    assert isinstance(params, GluoncvParams)
    network = NETWORKS[model]
    if params.optimizer == "adamw":
        raise Unsupported("MXNet 1.9 has no adamw; gluoncv takes optimizer=sgd, adam, rmsprop or adadelta")
    if params.anchor_sizes and len(params.anchor_sizes) != len(network.sizes):
        expected = f"{len(network.sizes)} ascending sides for {model}, which by default are {network.sizes}"
        raise InvalidValue("anchor_sizes", params.anchor_sizes, expected)
    if params.anchor_sizes and list(params.anchor_sizes) != sorted(params.anchor_sizes):
        raise InvalidValue("anchor_sizes", params.anchor_sizes, "expected ascending sides")
    possible = image_sizes(model)
    if params.image_size != "auto" and params.image_size not in possible:
        expected = f"{model} takes inputs of {possible.start} to {possible.stop - 1} pixels"
        raise InvalidValue("image_size", params.image_size, expected)
    if params.weights == "auto" and cached_word(model) is None:
        words = " or ".join(f"weights={word}" for word in MODELS[model].weights if word != "auto")
        path = weights_file(model, MODELS[model].weights[0])
        raise WeightsMissing("auto", model, path, f"no published weights are in the cache; {words} would fetch them")


def translate(model: str, params: Params) -> Mapping[str, str]:
    """Return what MXNet is told, for the parameters whose name or value differs there."""
    assert isinstance(params, GluoncvParams)
    p = params
    length = "ceil(training images / batch_size) steps each" if p.epochs else "total steps"
    adadelta = "not used by adadelta" if p.optimizer == "adadelta" else ""
    decay = "subtracted whole at every step" if adadelta else "wd_mult=0 on biases and norms"
    return {
        "epochs": length if p.epochs else "",
        "iterations": length if p.iterations else "",
        "optimizer": f"gluon.Trainer({p.optimizer!r})",
        "learning_rate": adadelta or f"Trainer.set_learning_rate({p.learning_rate:g}), the peak of the schedule",
        "lr_scheduler": adadelta,
        "warmup_iterations": adadelta,
        "momentum": "" if p.optimizer == "sgd" else f"not used by {p.optimizer}",
        "weight_decay": f"wd={p.weight_decay:g}, {decay}",
        "gradient_clip": f"gluon.utils.clip_global_norm({p.gradient_clip:g})" if p.gradient_clip else "",
        "image_size": f"{NETWORKS[model].size} x {NETWORKS[model].size}" if p.image_size == "auto" else "",
        "augmentations": "SSDDefaultTrainTransform" if len(p.augmentations) == 4 else "",
        "min_hard_negatives": "SSDMultiBoxLoss(min_hard_negatives)",
        "freeze": "Parameter.grad_req = 'null'" if p.freeze else "",
        "nms_threshold": "set_nms(nms_thresh)",
        "nms_topk": "set_nms(nms_topk)",
        "max_detections": "set_nms(post_nms)",
    }
