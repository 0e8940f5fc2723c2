"""Canonical hyperparameters: one name, unit and type each, whatever framework they end up in.

A plugin declares what it takes by subclassing `Params` with these types and its own defaults::

    class MyParams(Params, frozen=True, kw_only=True):
        epochs: Epochs | None = 20
        learning_rate: LearningRate = 1e-3
        my_knob: int = 3          # a native one, of the plugin's own

`Params` change the model that comes out; `Options` change where and how fast it runs.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union

import msgspec
from msgspec import Meta

from detkit.errors import InvalidValue, UnknownName

Epochs: TypeAlias = Annotated[int, Meta(ge=1, description="passes over the training images")]
Iterations: TypeAlias = Annotated[int, Meta(ge=1, description="optimizer steps, instead of epochs")]
BatchSize: TypeAlias = Annotated[int, Meta(ge=1, description="images per optimizer step over all devices")]
AutoBatchSize: TypeAlias = Annotated[
    Annotated[int, Meta(ge=1)] | Literal["auto"],
    Meta(
        description="images per optimizer step over all devices; auto: as many as are estimated to fit into memory, "
        "a power of two, at most 64"
    ),
]
GradAccumulation: TypeAlias = Annotated[
    int,
    Meta(ge=1, description="passes that a batch is divided into, for less memory; the step is taken on all of them"),
]
Sampling: TypeAlias = Annotated[
    Literal["uniform", "class_balanced"],
    Meta(
        description="which images an epoch has: each once, or as many, those of a rare class more often: "
        "sqrt(images of the most frequent class / its own) times"
    ),
]
LearningRate: TypeAlias = Annotated[float, Meta(gt=0, description="peak learning rate, at the batch size given")]
LrBatchSize: TypeAlias = Annotated[
    int,
    Meta(
        ge=1,
        description="linear scaling rule: the batch size that learning_rate is meant for; it is multiplied by "
        "batch_size / lr_batch_size; none: it is taken as it is",
    ),
]
LrScheduler: TypeAlias = Annotated[
    Literal["cosine", "step", "one_cycle", "constant"],
    Meta(
        description="how the learning rate falls after warm-up; one_cycle: rises from a 25th of the peak over 30 % of "
        "the steps, unless a warm-up is given, and falls to a 250,000th"
    ),
]
LrSchedulerStep: TypeAlias = Annotated[
    tuple[int, ...],
    Meta(description="epochs after each of which the 'step' schedule multiplies by lr_scheduler_factor"),
]
LrSchedulerFactor: TypeAlias = Annotated[float, Meta(gt=0, le=1, description="factor of the 'step' schedule")]
WarmupEpochs: TypeAlias = Annotated[float, Meta(ge=0, description="epochs of linear warm-up")]
WarmupIterations: TypeAlias = Annotated[
    Annotated[int, Meta(ge=0)] | Literal["auto"],
    Meta(description="steps of linear warm-up, instead of epochs; auto: 5 % of all steps"),
]
Optimizer: TypeAlias = Annotated[Literal["sgd", "adam", "adamw", "rmsprop", "adadelta"], Meta(description="optimizer")]
Momentum: TypeAlias = Annotated[float, Meta(ge=0, lt=1, description="momentum of sgd")]
WeightDecay: TypeAlias = Annotated[float, Meta(ge=0, description="weight decay; none on biases and norms")]
GradientClip: TypeAlias = Annotated[float, Meta(gt=0, description="largest global norm of the gradient")]
Amp: TypeAlias = Annotated[
    Literal["bf16", "fp16"],
    Meta(description="automatic mixed precision: what matrix products are computed in; fp16 needs a GPU"),
]
AutoAmp: TypeAlias = Annotated[
    Literal["bf16", "fp16", "auto"],
    Meta(
        description="automatic mixed precision: what matrix products are computed in; fp16 needs a GPU; auto: bf16 on "
        "a GPU that has it, and on a CPU where tune_step=auto finds it faster"
    ),
]
FrozenStages: TypeAlias = Annotated[
    int, Meta(ge=0, description="stages of the backbone, from the image on, whose weights stay as they are")
]
EmaDecay: TypeAlias = Annotated[
    float,
    Meta(gt=0, lt=1, description="decay a step of the moving average of the weights, which is what is scored and kept"),
]
ImageSize: TypeAlias = Annotated[
    Annotated[int, Meta(ge=32)] | Literal["auto"],
    Meta(description="pixels of the model's input, its shorter side where the shape is kept"),
]
Weights: TypeAlias = Annotated[
    str | None, Meta(description="coco, imagenet, auto (from the cache), none, a file, or a run to start from")
]
EarlyStoppingPatience: TypeAlias = Annotated[
    int, Meta(ge=1, description="validations without a better score after which training ends; none: it never does")
]
EarlyStoppingMinEpochs: TypeAlias = Annotated[int, Meta(ge=0, description="epochs that early stopping waits for")]
EarlyStoppingTolerance: TypeAlias = Annotated[
    float, Meta(ge=0, le=1, description="gain, as a share of the best score so far, that counts as better")
]
Seed: TypeAlias = Annotated[int, Meta(ge=0, lt=2**32, description="seed of weights, order and augmentation")]
MaxDetections: TypeAlias = Annotated[
    Annotated[int, Meta(ge=1)] | Literal["auto"],
    Meta(description="detections kept per image; auto: max(100, 2 x the busiest training image)"),
]
AnchorSizes: TypeAlias = Annotated[
    tuple[Annotated[float, Meta(gt=0)], ...],
    Meta(description="sides of the anchors in pixels of the model's input, ascending; none given: the model's own"),
]
AutoAnchorSizes: TypeAlias = Annotated[
    tuple[Annotated[float, Meta(gt=0)], ...] | Literal["auto"],
    Meta(
        description="sides of the anchors in pixels of the model's input, ascending; none given: the model's own; "
        "auto: quantiles of the sides of the training boxes"
    ),
]
AnchorRatios: TypeAlias = Annotated[
    tuple[Annotated[float, Meta(gt=0)], ...] | Literal["auto"],
    Meta(
        description="heights of the anchors over their widths; none given: the model's own; auto: quantiles of those "
        "of the training boxes"
    ),
]
Proposals: TypeAlias = Annotated[
    Annotated[int, Meta(ge=1)] | Literal["auto"],
    Meta(
        description="proposals per image that the second stage is given, before and after NMS; auto: ten times the "
        "objects of a training image, on average, and at least the model's own"
    ),
]
Backbone: TypeAlias = Annotated[
    str, Meta(description="the network that the model's features come from; none: the model's own")
]
NmsThreshold: TypeAlias = Annotated[float, Meta(gt=0, le=1, description="IoU above which the weaker of two boxes goes")]
BestMetric: TypeAlias = Annotated[
    Literal["AP", "AP50", "AP75", "mask_AP"],
    Meta(description="the validation score by which weights are kept and early stopping judges"),
]
ValidateEvery: TypeAlias = Annotated[
    str, Meta(pattern=r"^[1-9]\d* (epoch|iteration)s?$", description="when to score the validation images")
]
CheckpointEvery: TypeAlias = Annotated[
    str, Meta(pattern=r"^[1-9]\d* (epoch|iteration)s?$", description="when to save a resumable checkpoint")
]

CANONICAL: Mapping[str, Any] = {
    "epochs": Epochs,
    "iterations": Iterations,
    "batch_size": BatchSize,
    "grad_accumulation": GradAccumulation,
    "sampling": Sampling,
    "learning_rate": LearningRate,
    "lr_batch_size": LrBatchSize,
    "lr_scheduler": LrScheduler,
    "lr_scheduler_step": LrSchedulerStep,
    "lr_scheduler_factor": LrSchedulerFactor,
    "warmup_epochs": WarmupEpochs,
    "warmup_iterations": WarmupIterations,
    "optimizer": Optimizer,
    "momentum": Momentum,
    "weight_decay": WeightDecay,
    "gradient_clip": GradientClip,
    "ema_decay": EmaDecay,
    "amp": Amp,
    "frozen_stages": FrozenStages,
    "image_size": ImageSize,
    "weights": Weights,
    "early_stopping_patience": EarlyStoppingPatience,
    "early_stopping_min_epochs": EarlyStoppingMinEpochs,
    "early_stopping_tolerance": EarlyStoppingTolerance,
    "best_metric": BestMetric,
    "seed": Seed,
    "max_detections": MaxDetections,
    "nms_threshold": NmsThreshold,
    "backbone": Backbone,
    "anchor_sizes": AnchorSizes,
    "anchor_ratios": AnchorRatios,
    "proposals": Proposals,
    "validate_every": ValidateEvery,
    "checkpoint_every": CheckpointEvery,
}
"""Every canonical name and its type; a plugin that uses a name uses its type (`BackendTests` checks)."""

VARIANTS: Mapping[str, Any] = {"batch_size": AutoBatchSize, "anchor_sizes": AutoAnchorSizes, "amp": AutoAmp}
"""Types that a plugin may give a canonical name instead, as its engine can do more."""

INSTEAD: Mapping[str, str] = {"iterations": "epochs", "warmup_iterations": "warmup_epochs"}
"""Parameters of which only one has a value."""


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every plugin's hyperparameters."""


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every plugin's options: where and how fast, never what comes out."""


class LoopParams(Params, frozen=True, kw_only=True):
    """What `detkit.loop.TrainingLoop` understands; the parameters of an engine that is built on it begin with these."""

    epochs: Epochs | None = 30
    iterations: Iterations | None = None
    batch_size: BatchSize = 8
    sampling: Sampling = "uniform"
    learning_rate: LearningRate = 1e-3
    lr_batch_size: LrBatchSize | None = None
    lr_scheduler: LrScheduler = "cosine"
    lr_scheduler_step: LrSchedulerStep = ()
    lr_scheduler_factor: LrSchedulerFactor = 0.1
    warmup_epochs: WarmupEpochs | None = None
    warmup_iterations: WarmupIterations | None = "auto"
    validate_every: ValidateEvery = "1 epoch"
    checkpoint_every: CheckpointEvery = "1 epoch"
    early_stopping_patience: EarlyStoppingPatience | None = None
    early_stopping_min_epochs: EarlyStoppingMinEpochs = 0
    early_stopping_tolerance: EarlyStoppingTolerance = 0.0
    best_metric: BestMetric = "AP"
    seed: Seed = 0


StructT = TypeVar("StructT", bound=msgspec.Struct)


def describe(struct: type[msgspec.Struct]) -> dict[str, str]:
    """Return each field's description, empty where it has none."""
    hints = typing.get_type_hints(struct, include_extras=True)
    return {field.name: _description(hints[field.name]) for field in msgspec.structs.fields(struct)}


def nullable(struct: type[msgspec.Struct]) -> set[str]:
    """Return the fields of which None is a value of its own, and not only the absence of one."""
    hints = typing.get_type_hints(struct, include_extras=True)
    return {name for name, hint in hints.items() if _admits_none(hint)} - {*INSTEAD, *INSTEAD.values()}


def set_fields(
    base: StructT, values: Mapping[str, Any], *, kind: str, origins: Mapping[str, str] | None = None
) -> StructT:
    """Return ``base`` with ``values`` in place of its own, checked and coerced from strings.

    Giving ``iterations`` clears a default ``epochs`` and the other way round; giving both raises. Raises `UnknownName`
    with a did-you-mean and `InvalidValue` with the value's origin.
    """
    cls = type(base)
    hints = typing.get_type_hints(cls, include_extras=True)
    known = [field.name for field in msgspec.structs.fields(cls)]
    chosen: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise UnknownName(kind, name, known)
        chosen[name] = coerce(name, value, hints[name], origin=(origins or {}).get(name, ""))
    for one, other in [*INSTEAD.items(), *((b, a) for a, b in INSTEAD.items())]:
        if one in chosen and other in known and chosen[one] is not None:
            if chosen.get(other) is not None:
                raise InvalidValue(one, chosen[one], f"give {other} or {one}, not both")
            chosen[other] = None
    result = msgspec.structs.replace(base, **chosen)
    lengths = [getattr(result, name) for name in ("epochs", "iterations") if name in known]
    if len(lengths) == 2 and lengths == [None, None]:
        raise InvalidValue("epochs", None, "exactly one of epochs and iterations must have a value")
    return result


def coerce(name: str, value: Any, hint: Any, origin: str = "") -> Any:
    """Convert a value, or the text of one, to the type of a field. Raises `InvalidValue`.

    A type reads texts in its own way with ``Meta(extra={"read": function})``; the function raises `ValueError` with
    what is expected.
    """
    read = _reader(hint)
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in {"none", "null"} and _admits_none(hint):
            return None
        if read is not None:
            try:
                return coerce(name, read(text), hint, origin)
            except ValueError as error:
                raise InvalidValue(name, value, f"expected {error}", origin) from None
        is_list = _is_sequence(hint) and text not in _words(hint)
        value = [part.strip() for part in text.split(",") if part.strip()] if is_list else text
        if float in _arms(hint) and re.fullmatch(r"[+-]?\.\d+([eE][+-]?\d+)?", text):
            value = text.replace(".", "0.", 1)  # .9 is a number to everybody but JSON
    try:
        converted = msgspec.convert(value, hint, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidValue(name, value, _explain(str(error), hint), origin) from None
    if isinstance(converted, float) and not math.isfinite(converted):
        raise InvalidValue(name, value, "expected a finite number", origin)
    return converted


def every_steps(every: str, steps_per_epoch: int) -> int:
    """Convert ``"1 epoch"`` or ``"250 iterations"`` to a number of steps."""
    count, unit = every.split()
    return int(count) * (steps_per_epoch if unit.startswith("epoch") else 1)


def _arms(hint: Any) -> list[Any]:
    """The alternatives of a union, looked for below ``Annotated``."""
    if typing.get_origin(hint) is Annotated:
        return _arms(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [arm for part in typing.get_args(hint) for arm in _arms(part)]
    return [hint]


def _admits_none(hint: Any) -> bool:
    return type(None) in _arms(hint)


def _is_sequence(hint: Any) -> bool:
    return any(typing.get_origin(arm) in (tuple, list) for arm in _arms(hint))


def _words(hint: Any) -> list[Any]:
    """The literal alternatives."""
    return [v for arm in _arms(hint) if typing.get_origin(arm) is Literal for v in typing.get_args(arm)]


def _reader(hint: Any) -> Any:
    """Return the function of ``Meta(extra={"read": function})``, also of an arm of a union; None where none has one."""
    if typing.get_origin(hint) is Annotated:
        for meta in typing.get_args(hint)[1:]:
            if isinstance(meta, Meta) and meta.extra and "read" in meta.extra:
                return meta.extra["read"]
    inner = typing.get_args(hint) if typing.get_origin(hint) in (Annotated, Union, types.UnionType) else ()
    return next((read for part in inner if (read := _reader(part)) is not None), None)


def _description(hint: Any) -> str:
    for part in (hint, *typing.get_args(hint)):
        for meta in typing.get_args(part)[1:] if typing.get_origin(part) is Annotated else ():
            if isinstance(meta, Meta) and meta.description:
                return meta.description
    return ""


_KINDS = {int: "an int", float: "a float", bool: "true or false"}


def _explain(message: str, hint: Any) -> str:
    allowed = [repr(word) for word in _words(hint)] + [_KINDS[arm] for arm in _arms(hint) if arm in _KINDS]
    message = re.sub(r"`(int|float|str|bool|null|array)( \| null)?`", lambda m: m.group(1), message)
    return message + (f"; one of {', '.join(allowed)}" if allowed and "enum" in message else "")
