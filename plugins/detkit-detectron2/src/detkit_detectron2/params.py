"""What the Detectron2 backend takes, and its models with their own defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta
from msgspec.structs import replace

from detkit.backends import ModelSpec, SeveralOptions
from detkit.data import Dataset
from detkit.errors import InvalidData, InvalidValue, MissingSettings
from detkit.natives import Overrides
from detkit.params import (
    Amp,
    AnchorRatios,
    AutoAnchorSizes,
    BatchSize,
    Epochs,
    FrozenStages,
    GradAccumulation,
    GradientClip,
    ImageSize,
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
from detkit_detectron2 import earlier, releases
from detkit_detectron2.zoo import ENTRIES, FROM_CONFIG, LOSSES, TINY
from detkit_torchvision.masks import require_masks


class Detectron2Params(LoopParams, frozen=True):
    """Hyperparameters; the defaults are for fine-tuning Faster R-CNN."""

    epochs: Epochs | None = 12
    batch_size: BatchSize = 4
    grad_accumulation: GradAccumulation = 1
    lr_scheduler_iterations: Annotated[
        tuple[Annotated[int, Meta(ge=1)], ...],
        Meta(description="steps after each of which the 'step' schedule multiplies, beside lr_scheduler_step's epochs"),
    ] = ()
    optimizer: Optimizer = "sgd"
    momentum: Momentum = 0.9
    weight_decay: WeightDecay = 1e-4
    gradient_clip: GradientClip | None = None
    amp: Amp | None = None
    frozen_stages: FrozenStages | None = None
    image_size: ImageSize = "auto"
    max_image_size: (
        Annotated[
            int,
            Meta(ge=32, description="most pixels of the longer side; none: the model's own, or 5/3 of image_size"),
        ]
        | None
    ) = None
    weights: Weights = None
    nms_threshold: NmsThreshold | None = None
    max_detections: MaxDetections = "auto"
    anchor_sizes: AutoAnchorSizes = ()
    anchor_ratios: AnchorRatios = ()
    proposals: Proposals | None = None
    masks: Annotated[bool, Meta(description="whether Mask R-CNN learns masks, for which the data must have some")] = (
        True
    )
    config: Annotated[
        str | None,
        Meta(
            description="a configuration file of Detectron2, for the model detectron2/config: what it says and inherits"
        ),
    ] = None
    overrides: Overrides = {}  # noqa: RUF012 - msgspec copies it
    add_config: Annotated[
        str | None,
        Meta(description="module:function of your own code that adds keys to Detectron2's configuration"),
    ] = None
    mapper: Annotated[
        str | None,
        Meta(description="module:name of your own dataset mapper, a class or a function; it makes what is trained on"),
    ] = None


class Detectron2Options(SeveralOptions, frozen=True, kw_only=True):
    """Where and how fast."""

    threads: Annotated[
        Annotated[int, Meta(ge=1)] | Literal["auto"],
        Meta(
            description="threads of a step on a CPU; auto: torch's own, one per core; 1 is far faster on a busy machine"
        ),
    ] = "auto"


_TINY = replace(
    Detectron2Params(),
    epochs=30,
    batch_size=8,
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=0.02,
    gradient_clip=10.0,
    frozen_stages=0,
)
_RATES = {"faster_rcnn": 0.02 * 4 / 16, "mask_rcnn": 0.02 * 4 / 16, "retinanet": 0.01 * 4 / 16}
"""Those of Detectron2's configs, which take 16 images a step, for our batch."""


def _spec(name: str) -> ModelSpec:
    entry = ENTRIES[name]
    masks = entry.family == "mask_rcnn"
    if name in TINY:
        return ModelSpec(params=replace(_TINY, masks=masks), summary=entry.summary, losses=LOSSES[entry.family])
    return ModelSpec(
        params=replace(
            Detectron2Params(),
            learning_rate=_RATES[entry.family],
            weights="auto" if name in releases.COCO else "imagenet",
            masks=masks,
        ),
        summary=entry.summary,
        weights=("coco", "imagenet", "auto") if name in releases.COCO else ("imagenet",),
        licence=f"{releases.LICENCE}; trained on COCO 2017, whose own terms may apply",
        losses=LOSSES[entry.family],
    )


MODELS: Mapping[str, ModelSpec] = {
    **{name: _spec(name) for name in ENTRIES},
    FROM_CONFIG: ModelSpec(
        params=replace(Detectron2Params(), learning_rate=_RATES["faster_rcnn"]),
        summary="what a configuration file of yours describes: config=PATH",
        weights=("coco", "imagenet"),
    ),
}


def learns_masks(model: str, params: Params) -> bool:
    """Whether training a model needs masks."""
    assert isinstance(params, Detectron2Params)
    if model == FROM_CONFIG:
        return params.masks and _has_mask_head(params)
    return params.masks and ENTRIES[model].family == "mask_rcnn"


def _has_mask_head(params: Detectron2Params) -> bool:
    """Whether the network of the model ``config`` has one: by its keys, or as the earlier model that it starts from."""
    said = params.overrides.get("MODEL.MASK_ON")
    if said is None and earlier.is_model(params.weights):
        return earlier.has_masks(str(params.weights))
    return said == "True"


def require(model: str, params: Params) -> None:
    """Raise before any data is read for what a model cannot be given."""
    assert isinstance(params, Detectron2Params)
    if model == FROM_CONFIG and params.config is None and not earlier.is_model(params.weights):
        raise MissingSettings([("config", "config=my_config.yaml, a configuration file of Detectron2")])
    if model != FROM_CONFIG and params.config is not None:
        raise InvalidValue(
            "config", params.config, f"it describes the model itself; choose model=detectron2/{FROM_CONFIG}"
        )
    if model != FROM_CONFIG and params.proposals is not None and ENTRIES[model].family == "retinanet":
        raise InvalidValue("proposals", params.proposals, f"{model} has one stage, without proposals; R-CNNs have them")
    if params.overrides.get("SOLVER.NESTEROV") == "True" and params.optimizer != "sgd":
        raise InvalidValue("SOLVER.NESTEROV", "True", f"it is for optimizer=sgd, and optimizer is {params.optimizer}")
    if params.lr_scheduler_iterations and params.lr_scheduler != "step":
        expected = f"it is for lr_scheduler=step, and lr_scheduler is {params.lr_scheduler}"
        raise InvalidValue("lr_scheduler_iterations", list(params.lr_scheduler_iterations), expected)
    if (
        model == FROM_CONFIG
        and params.weights == "coco"
        and not releases.is_coco(params.overrides.get("MODEL.WEIGHTS", ""))
    ):
        expected = "a configuration file whose MODEL.WEIGHTS is a release for COCO; give weights=PATH, imagenet or none"
        raise InvalidValue("weights", "coco", f"expected {expected}")
    releases.require(model, params.weights)


def require_data(model: str, params: Params, channels: Mapping[str, Dataset]) -> None:
    """Raise before a run is started for data without masks, which a model is to learn."""
    if not learns_masks(model, params):
        return
    try:
        require_masks(model, channels)
    except InvalidData as error:
        hint = "give polygons or run-length encodings for all of them, as COCO's segmentation"
        raise InvalidData(str(error).splitlines()[0], hint=f"{hint}; masks=false trains it without") from None


def translate(model: str, params: Params) -> Mapping[str, str]:
    """Return what Detectron2 is told, for the parameters whose name or value differs there."""
    assert isinstance(params, Detectron2Params)
    p = params
    said: dict[str, str] = {
        "epochs": "SOLVER.MAX_ITER=ceil(training images / batch_size) each" if p.epochs else "",
        "iterations": f"SOLVER.MAX_ITER={p.iterations}" if p.iterations else "",
        "batch_size": f"SOLVER.IMS_PER_BATCH={p.batch_size}",
        "learning_rate": f"SOLVER.BASE_LR={p.learning_rate:g}, the peak of the schedule",
        "lr_scheduler_iterations": "SOLVER.STEPS" if p.lr_scheduler_iterations else "",
        "lr_scheduler_factor": f"SOLVER.GAMMA={p.lr_scheduler_factor:g}" if p.lr_scheduler == "step" else "",
        "warmup_iterations": "SOLVER.WARMUP_ITERS",
        "momentum": f"SOLVER.MOMENTUM={p.momentum:g}" if p.optimizer == "sgd" else f"not used by {p.optimizer}",
        "weight_decay": f"SOLVER.WEIGHT_DECAY={p.weight_decay:g}, SOLVER.WEIGHT_DECAY_NORM on norms",
        "gradient_clip": f"clip_grad_norm_(max_norm={p.gradient_clip})" if p.gradient_clip else "",
        "amp": f"torch.autocast({p.amp})" if p.amp else "",
        "frozen_stages": "" if p.frozen_stages is None else f"MODEL.BACKBONE.FREEZE_AT={p.frozen_stages}",
        "image_size": "" if p.image_size == "auto" else f"INPUT.MIN_SIZE_TRAIN, MIN_SIZE_TEST={p.image_size}",
        "max_image_size": f"INPUT.MAX_SIZE_TRAIN, MAX_SIZE_TEST={p.max_image_size}" if p.max_image_size else "",
        "nms_threshold": "MODEL.ROI_HEADS.NMS_THRESH_TEST, MODEL.RETINANET.NMS_THRESH_TEST" if p.nms_threshold else "",
        "max_detections": "TEST.DETECTIONS_PER_IMAGE",
        "anchor_sizes": "MODEL.ANCHOR_GENERATOR.SIZES" if p.anchor_sizes else "",
        "anchor_ratios": "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS" if p.anchor_ratios else "",
        "proposals": "MODEL.RPN.POST_NMS_TOPK_TEST, and its other TOPK where below" if p.proposals else "",
        "masks": "" if model != FROM_CONFIG and ENTRIES[model].family != "mask_rcnn" else f"MODEL.MASK_ON={p.masks}",
        "seed": f"SEED={p.seed}",
        "weights": "random weights, for which norms, freezing and clipping change" if _diverges(model, p) else "",
    }
    return said


def _diverges(model: str, params: Detectron2Params) -> bool:
    return params.weights is None and model not in TINY
