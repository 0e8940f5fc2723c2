"""What each hyperparameter of SageMaker's built-in "Object Detection - MXNet" algorithm becomes here.

The algorithm's code is not published. It is taken to descend from MXNet's ``example/ssd``, whose names it uses
(``freeze_layer_pattern``, a ``label_width`` of 350), so what its documentation leaves open is as it is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from detkit.dialects import SAGEMAKER_OBJECT_DETECTION, Dialect, Note
from detkit.sagemaker_object_detection import BuiltinParams
from detkit_gluoncv.params import image_sizes

if TYPE_CHECKING:
    from detkit.data import Dataset


_BASES = {"vgg-16": "vgg16_atrous", "resnet-50": "resnet50_v1"}

_LARGE = 448
"""From this size on ``example/ssd`` builds VGG's larger network (its ``symbol_factory.py``)."""

_SCALES = (0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05)
"""Sides of the anchors as shares of the input's, in ``example/ssd``. It gives two for each feature map, the second the
geometric mean of the first and of the next map's; 1.05 is the next of the last one's."""

_LARGE_VGG_SCALES = (0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05)

VGG_LAYERS: Mapping[str, str] = {
    **{
        f"conv{stage + 1}_{i + 1}": f"features.stages.{stage}.{2 * i}"
        for stage, count in enumerate((2, 2, 3, 3, 3))
        for i in range(count)
    },
    "fc6": "features.stages.5.0",
    "fc7": "features.stages.5.2",
}
"""Layers of VGG-16 in ``example/ssd`` (``vgg16_reduced.py``) and the same ones in GluonCV; activations lie between."""


def translate(params: BuiltinParams, beside: Mapping[str, Any]) -> Sequence[Note]:
    """Return what each hyperparameter becomes; ``beside`` are canonical parameters given by their own names."""
    return [note for notes in (_network, _length, _schedule, _optimizer, _scoring) for note in notes(params, beside)]


def _network(params: BuiltinParams, beside: Mapping[str, Any]) -> Iterator[Note]:
    size = 512 if params.image_shape >= _LARGE else 300
    model = f"ssd_{size}_{_BASES[params.base_network]}"
    scales = _LARGE_VGG_SCALES if params.base_network == "vgg-16" and size == 512 else _SCALES
    anchors = {"anchor_sizes": tuple(round(scale * params.image_shape, 2) for scale in scales)}
    other_weights = beside.get("weights") not in (None, "imagenet", "auto")
    yield Note(
        "base_network",
        params.base_network,
        {"model": model} if other_weights else {"model": model, **anchors},
        "approximate",
        {
            "vgg-16": "the network of MXNet's example/ssd with its anchors, but pixels are normalised otherwise",
            "resnet-50": "a weak likeness: there batch normalisation comes before each convolution, and the feature "
            "maps are those of other layers",
        }[params.base_network] + ("; the anchors come with the weights" if other_weights else ""),
    )  # fmt: skip
    largest = image_sizes(model).stop - 1
    if params.image_shape > largest:
        yield Note("image_shape", params.image_shape, {}, "refused", f"{model} takes at most {largest} pixels here")
    else:
        exact = params.image_shape == size
        yield Note(
            "image_shape",
            params.image_shape,
            {"model": model, "image_size": params.image_shape},
            "exact" if exact else "approximate",
            "" if exact else f"the anchors of the last feature maps keep the distances they have at {size} pixels",
        )
    yield _weights(params, beside["weights"] if other_weights else None)
    yield _frozen(params)


def _weights(params: BuiltinParams, other: str | None) -> Note:
    name, value = "use_pretrained_model", params.use_pretrained_model
    if other is not None:
        why = (
            "given instead, as a model channel is there; the service takes only a model of its own, with equal classes"
        )
        return Note(name, value, {"weights": other}, "approximate", why)
    unsure = "say it in the paid job: its default is 1 in the documentation, 0 in the log of a job of 2019"
    if value == 0:
        return Note(name, value, {"weights": None}, "approximate", f"drawn from another distribution; {unsure}")
    return Note(name, value, {"weights": "imagenet"}, "approximate", f"GluonCV's own ImageNet weights; {unsure}")


def _frozen(params: BuiltinParams) -> Note:
    name, pattern = "freeze_layer_pattern", params.freeze_layer_pattern
    if pattern is None:
        return Note(name, None, {"freeze": None})
    if params.base_network != "vgg-16":
        return Note(
            name, pattern, {}, "refused", f"the layers of {params.base_network} have other names here; leave it out"
        )
    try:
        expression = re.compile(pattern)
    except re.error as error:
        return Note(name, pattern, {}, "refused", f"no regular expression: {error}")
    names = {f"{there}_{kind}": f"{here}.{kind}" for there, here in VGG_LAYERS.items() for kind in ("weight", "bias")}
    found = [here for there, here in names.items() if expression.match(there)]
    if not found:
        known = ", ".join(VGG_LAYERS)
        return Note(name, pattern, {}, "refused", f"matches none of {known}, each with _weight or _bias after it")
    freeze = f"^({'|'.join(map(re.escape, found))})$"
    return Note(
        name, pattern, {"freeze": freeze}, "exact", "the same layers of the base network; no others are looked at"
    )


def _length(params: BuiltinParams, _: Mapping[str, Any]) -> Iterator[Note]:
    compared = "taken from the data; training is refused where they differ"
    yield Note("num_classes", params.num_classes, why=compared)
    yield Note("num_training_samples", params.num_training_samples, why=compared)
    yield Note(
        "label_width", params.label_width, why="only the service needs it; training is refused where it is too small"
    )
    yield Note("epochs", params.epochs, {"epochs": params.epochs})
    yield Note("mini_batch_size", params.mini_batch_size, {"batch_size": params.mini_batch_size})
    several = "there is one host here; leave it out"
    yield Note("kv_store", params.kv_store, {}, "refused", several) if params.kv_store else Note("kv_store", None)
    if params.early_stopping:
        why = "it is COCO AP that has to rise, there VOC mAP"
        patience = f"{why}; counted in validations, there in epochs"
        yield Note("early_stopping", True, {}, "approximate", why)
        yield _same("early_stopping_patience", params, "approximate", patience)
        yield _same("early_stopping_min_epochs", params, "approximate", "epochs before it count towards patience")
        yield _same("early_stopping_tolerance", params, "approximate", why)
    else:
        yield Note("early_stopping", False, {"early_stopping_patience": None})
        for name in ("early_stopping_patience", "early_stopping_min_epochs", "early_stopping_tolerance"):
            yield Note(name, getattr(params, name), {}, "unused", "early_stopping is off")


def _schedule(params: BuiltinParams, _: Mapping[str, Any]) -> Iterator[Note]:
    steps, factor = params.lr_scheduler_step, params.lr_scheduler_factor
    if params.optimizer == "adadelta":
        for name in ("learning_rate", "lr_scheduler_step", "lr_scheduler_factor"):
            yield Note(name, getattr(params, name), {}, "unused", "adadelta has no learning rate in MXNet")
        return
    why = "the same number; the losses it multiplies are averaged over the boxes of the batch, there in another way"
    yield _same("learning_rate", params, "approximate", why)
    if list(steps) != sorted(set(steps)):
        why = "expected epochs that rise; MXNet's schedule stops at others"
        yield Note("lr_scheduler_step", steps, {}, "refused", why)
    else:
        kind = {"lr_scheduler": "step" if steps else "constant"}
        yield Note("lr_scheduler_step", steps, {**kind, "lr_scheduler_step": steps})
    if steps:
        yield _same("lr_scheduler_factor", params)
    else:
        yield Note("lr_scheduler_factor", factor, {}, "unused", "lr_scheduler_step is empty")


def _optimizer(params: BuiltinParams, _: Mapping[str, Any]) -> Iterator[Note]:
    optimizer = params.optimizer
    yield _same("optimizer", params)
    if optimizer != "sgd":
        yield Note("momentum", params.momentum, {}, "unused", f"{optimizer} takes none")
    elif params.momentum == 1:
        yield Note("momentum", params.momentum, {}, "refused", "nothing is ever forgotten; give less than 1")
    else:
        yield _same("momentum", params)
    if optimizer in ("sgd", "rmsprop") and params.base_network == "resnet-50":
        why = "not on the scales of batch normalisation, where MXNet's modules have it"
        yield _same("weight_decay", params, "approximate", why)
    elif optimizer in ("sgd", "rmsprop"):
        yield _same("weight_decay", params)
    else:
        yield Note(
            "weight_decay", params.weight_decay, {"weight_decay": 0.0}, "unused", f"{optimizer} takes none there"
        )


def _scoring(params: BuiltinParams, _: Mapping[str, Any]) -> Iterator[Note]:
    why = "max_detections boxes of an image are kept at the end, there up to 400"
    yield _same("nms_threshold", params, "approximate", why)
    why = "detkit reports COCO AP and AP50 and keeps the weights of the best AP, whatever this is"
    yield Note("overlap_threshold", params.overlap_threshold, {}, "approximate", why)
    yield Note(
        "",
        None,
        {"warmup_iterations": 0, "gradient_clip": None, "min_hard_negatives": 0},
        "approximate",
        "as in example/ssd; the service's random changes of the training images are not known, here they are SSD's",
    )


def _same(name: str, params: BuiltinParams, fidelity: Literal["exact", "approximate"] = "exact", why: str = "") -> Note:
    return Note(name, getattr(params, name), {name: getattr(params, name)}, fidelity, why)


def check(params: BuiltinParams, channels: Mapping[str, Dataset]) -> Sequence[Note]:
    """Return what the data says of the hyperparameters that describe it."""
    train = channels["train"]
    paid = [channels[name] for name in ("train", "validation") if name in channels]
    found = [
        _counted("num_classes", params.num_classes, len(train.classes),
                 f"has {len(train.classes)} classes ({', '.join(train.classes)})"),
        _counted("num_training_samples", params.num_training_samples, len(train),
                 f"has {len(train)} training images, and the service's steps of the learning rate are counted with it"),
        _without_boxes(train, channels.get("validation")),
        _label_width(params, max(int(data.boxes_per_image().max(initial=0)) for data in paid)),
    ]  # fmt: skip
    return [note for note in found if note is not None]


def _without_boxes(train: Dataset, validation: Dataset | None) -> Note | None:
    """RecordIO files with such images end the paid job, so whoever writes them leaves these images out."""
    empty = [0 if data is None else int((data.boxes_per_image() == 0).sum()) for data in (train, validation)]
    if not any(empty):
        return None
    why = (
        f"{empty[0]} training and {empty[1]} validation images have no boxes, which RecordIO files cannot hold; "
        f"without them the paid job needs num_training_samples={len(train) - empty[0]}"
    )
    return Note("num_training_samples", None, why=why)


def _label_width(params: BuiltinParams, busiest: int) -> Note | None:
    needed = 2 + 5 * busiest  # a header of two numbers; class, left, top, right, bottom of each box
    if params.label_width >= needed:
        return None
    why = (
        f"an image of the data has {busiest} boxes, so the paid job would fail on RecordIO files; "
        f"write label_width={needed} or more"
    )
    return Note("label_width", params.label_width, {}, "refused", why)


def _counted(name: str, given: int | None, found: int, why: str) -> Note | None:
    if given is None:
        return Note(name, None, why=f"the data {why}; the paid job needs {name}={found}")
    return Note(name, given, {}, "refused", f"the data {why}; write {name}={found}") if given != found else None


_INTERNAL = "the service sets names that begin with _ itself; leave it out"

DIALECT = Dialect(
    name="sagemaker-object-detection",
    summary="SageMaker's built-in object detection algorithm (MXNet)",
    params=BuiltinParams(),
    translate=translate,
    check=check,
    limits=SAGEMAKER_OBJECT_DETECTION,
    hints={
        "force_padding_label_width": "it is called label_width",
        "_kvstore": _INTERNAL,
        "_num_kv_servers": _INTERNAL,
        "_tuning_objective_metric": _INTERNAL,
    },
)
