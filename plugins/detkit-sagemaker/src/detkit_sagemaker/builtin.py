"""AWS's built-in "Object Detection - MXNet" algorithm: its hyperparameters as they are sent, its metrics and its log.

Sources: the pages "Object Detection - MXNet", "Object Detection Hyperparameters" and "Tune an Object Detection Model"
of the SageMaker Developer Guide, and the console's description of a job of 2019.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec

from detkit.errors import InvalidValue
from detkit.params import Weights
from detkit.sagemaker_object_detection import BuiltinParams

DEFAULT_LABEL_WIDTH = 350
"""What the algorithm takes unless told."""

FOREIGN = "aws/"
"""What the names of AWS's own metrics begin with in detkit: they are not detkit's and do not compare with them."""


class ObjectDetectionParams(BuiltinParams, frozen=True, kw_only=True):
    """`BuiltinParams`, and the earlier model of this algorithm that training goes on from."""

    weights: Weights = None
    """A finished run or model with equal ``base_network`` and classes; the base network's own weights are chosen by
    ``use_pretrained_model``."""


@dataclass(frozen=True, kw_only=True)
class Tunable:
    """A range within which AWS's tuner searches a hyperparameter."""

    kind: Literal["Integer", "Continuous", "Categorical"]
    low: float = 0
    high: float = 0
    values: tuple[str, ...] = ()


TUNABLE: Mapping[str, Tunable] = {
    "learning_rate": Tunable(kind="Continuous", low=1e-6, high=0.5),
    "mini_batch_size": Tunable(kind="Integer", low=8, high=64),
    "momentum": Tunable(kind="Continuous", low=0.0, high=0.999),
    "optimizer": Tunable(kind="Categorical", values=("sgd", "adam", "rmsprop", "adadelta")),
    "weight_decay": Tunable(kind="Continuous", low=0.0, high=0.999),
}
"""What can be tuned and the ranges that AWS recommends. Momentum and weight decay of 0 are in them, although training
itself asks for more than 0: the two pages disagree."""

OBJECTIVE = "validation:mAP"
"""The only metric that AWS's tuner can judge this algorithm by; more is better."""

METRICS: Mapping[str, str] = {
    "train:progress": r"#progress_metric: host=\S+, completed (\S+) %",
    "train:smooth_l1": r"#quality_metric: host=\S+, epoch=\S+, batch=\S+ train smooth_l1 <loss>=(\S+)",
    "train:cross_entropy": r"#quality_metric: host=\S+, epoch=\S+, batch=\S+ train cross_entropy <loss>=(\S+)",
    "train:throughput": r"#throughput_metric: host=\S+, train throughput=(\S+) records/second",
    "validation:mAP": r"#quality_metric: host=\S+, epoch=\S+, validation mAP <score>=\((\S+)\)",
}
"""The definitions that the service attaches by itself to a job of this algorithm; a request may hold none."""

_EPOCH = re.compile(r"epoch=(\d+)")


class Reading(NamedTuple):
    """What one line of a job's log says in numbers."""

    values: dict[str, float]
    """By name, each beginning with `FOREIGN`."""
    epoch: int | None
    """Where the line names one, from 0."""


def read_line(line: str, metrics: Mapping[str, str] = METRICS) -> Reading | None:
    """Return the numbers that metric definitions find in a line of a log, as CloudWatch would; None without any."""
    values: dict[str, float] = {}
    for name, regex in metrics.items():
        found = re.search(regex, line)
        if found is None or not found.groups():
            continue
        try:
            values[FOREIGN + name] = float(found[1].strip("()"))
        except ValueError:  # no number, so no metric
            continue
    epoch = _EPOCH.search(line)
    return Reading(values, int(epoch[1]) if epoch else None) if values else None


def hyperparameters(
    params: BuiltinParams, *, num_classes: int, num_training_samples: int, label_width: int, instance_count: int = 1
) -> dict[str, str]:
    """Return the hyperparameters as they are sent, text all of them, with what the data says of itself filled in.

    ``label_width`` is what the image with the most boxes needs, see `needed_label_width`. Raises `InvalidValue` where
    the user's own numbers and the data disagree. ``use_pretrained_model`` is always sent, as the documentation and the
    algorithm disagree on its default.
    """
    own: dict[str, object] = {
        "num_classes": _counted("num_classes", params.num_classes, num_classes),
        "num_training_samples": _counted("num_training_samples", params.num_training_samples, num_training_samples),
        "label_width": _label_width(params, label_width),
    }
    if instance_count > 1 and params.kv_store is None:
        own["kv_store"] = "dist_sync"
    values = {
        name: value
        for name, value in {**msgspec.structs.asdict(params), **own}.items()
        if name in BuiltinParams.__struct_fields__ and value not in (None, ())
    }
    if not params.early_stopping:
        values = {name: value for name, value in values.items() if not name.startswith("early_stopping_")}
    return {name: text(value) for name, value in values.items()}


def notes(
    params: BuiltinParams, *, num_training_samples: int, label_width: int, instance_count: int = 1
) -> tuple[str, ...]:
    """Return what `hyperparameters` decides by itself, for the plan."""
    told = []
    chosen = _label_width(params, label_width)
    if chosen != params.label_width:
        told.append(
            f"label_width={chosen}: the busiest image needs {label_width}, more than the default of "
            f"{DEFAULT_LABEL_WIDTH}"
        )
    if params.num_training_samples is None:
        told.append(f"num_training_samples={num_training_samples}, counted in the data")
    if instance_count > 1:
        told.append(
            f"mini_batch_size={params.mini_batch_size} is that of each machine: a step has "
            f"{params.mini_batch_size * instance_count} images"
            + ("" if params.kv_store else "; kv_store=dist_sync, as there are several machines")
        )
    told.append("AWS's validation:mAP is shown as aws/validation:mAP; it does not compare with detkit's val/AP")
    return tuple(told)


def needed_label_width(busiest: int) -> int:
    """Return the width of a label with so many boxes: a header of two numbers and five for each box."""
    return 2 + 5 * busiest


def _label_width(params: BuiltinParams, needed: int) -> int:
    if params.label_width >= needed:
        return params.label_width
    if params.label_width == DEFAULT_LABEL_WIDTH:
        return -(-(needed + 5) // 10) * 10  # room for one box more, as AWS advises a little more than is needed
    raise InvalidValue(
        "label_width",
        params.label_width,
        f"at least {needed}: an image of the data has {(needed - 2) // 5} boxes, of five numbers each; "
        "leave it out and detkit fills it in",
    )


def _counted(name: str, given: int | None, found: int) -> int:
    if given not in (None, found):
        raise InvalidValue(name, given, f"{found}, counted in the data; leave it out and detkit fills it in")
    return found


def text(value: object) -> str:
    """Return a value as it is sent: booleans are ``True`` and ``False`` there, and lists have commas."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
