"""SSD networks: built, filled with weights, their classes exchanged by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detkit.errors import InvalidValue, UsageError, WeightsMissing
from detkit.files import file_sha256
from detkit.job import Job, Model, WeightsOrigin, Workspace
from detkit.scores import SCORE_FLOOR
from detkit_gluoncv.params import LICENCES, NETWORKS, cached_word, weights_cache, weights_file
from detkit_gluoncv.runtime import (
    COCODetection,
    MultiPerClassDecoder,
    MXNetError,
    VOCDetection,
    get_model_file,
    get_ssd,
    last_line,
    mx,
    vgg16_atrous_300,
    vgg16_atrous_512,
)

ARTIFACT = "weights.params"
"""The parameters of a finished model, in its folder: Gluon's own file (``net.load_parameters``), nothing pickled."""

_RATIOS_FEW, _RATIOS_MANY = [1, 2, 0.5], [1, 2, 0.5, 3, 1.0 / 3]

Net = Any
"""A ``gluoncv.model_zoo.ssd.SSD``; mxnet has no types."""


class Filled(NamedTuple):
    """A network with weights, and where they came from."""

    net: Net
    origin: WeightsOrigin


def build(model: str, classes: Sequence[str], *, anchor_sizes: Sequence[float] = (), imagenet: bool = False) -> Net:
    """Return a network whose parameters have their shapes and first values.

    ``imagenet`` fills the base network with GluonCV's published weights, which are fetched where the cache lacks them.
    Randomness is that of ``mx.random.seed``.
    """
    network = NETWORKS[model]
    layers = len(network.sizes) - 1
    ratios = [_RATIOS_FEW] + [_RATIOS_MANY] * (layers - 3) + [_RATIOS_FEW] * 2
    features: Any = list(network.features)
    if not features:
        features = {300: vgg16_atrous_300, 512: vgg16_atrous_512}[network.size]
    net = get_ssd(
        network.base,
        network.size,
        features=features,
        filters=list(network.filters) or None,
        sizes=list(anchor_sizes or network.sizes),
        ratios=ratios,
        steps=list(network.steps),
        classes=list(classes),
        dataset="",
        pretrained=False,
        pretrained_base=imagenet,
        root=str(weights_cache()),
    )
    for parameter in net.collect_params().values():
        if parameter._data is None:  # base networks come filled
            parameter.initialize(init=parameter.init or _first_values(parameter.name))
    net(mx.nd.zeros((1, 3, network.size, network.size)))  # now every parameter knows its shape
    _lower_floor(net)
    return net


def load_artifact(model: Model) -> Net:
    """Return a finished model's network."""
    net = build(model.manifest.model, model.classes)
    _load(net, model.path / ARTIFACT, model.name)
    return net


def initialise(job: Job, workspace: Workspace) -> Filled:
    """Build the network of a job as its ``weights`` say. Raises `WeightsMissing`, and `UsageError` for a wrong file."""
    model, classes, sizes = job.model, job.classes, job.params["anchor_sizes"]
    wanted = job.params["weights"]
    if wanted == "auto":
        wanted = cached_word(model)
        if wanted is None:
            raise _missing("auto", model, FileNotFoundError("they were in the cache before"))
    if (workspace.parent_model / "detkit.json").is_file():
        parent = Model(workspace.parent_model)
        _refuse_anchors(sizes, wanted)
        source, file = str(wanted or parent.path), parent.path / ARTIFACT
        return _with_classes(load_artifact(parent), classes, parent.classes, source=source, file=file)
    if wanted is None:
        return Filled(build(model, classes, anchor_sizes=sizes), WeightsOrigin())
    if wanted == "imagenet":
        try:
            net = build(model, classes, anchor_sizes=sizes, imagenet=True)
        except (OSError, RuntimeError, ValueError) as error:  # what gluoncv raises where it cannot fetch
            raise _missing(wanted, model, error) from None
        digest = file_sha256(weights_file(model, "imagenet"))
        return Filled(net, WeightsOrigin(source=wanted, sha256=digest, licence=LICENCES[wanted], new=list(classes)))
    _refuse_anchors(sizes, wanted)
    published = wanted in LICENCES
    path = _fetch(model, wanted) if published else Path(wanted)
    names = published_classes(wanted) if published else _classes_of(model, path)
    net = build(model, names)
    _load(net, path, model)
    return _with_classes(net, classes, names, source=wanted, file=path, licence=LICENCES.get(wanted, ""))


def published_classes(word: str) -> tuple[str, ...]:
    """Return the class names of GluonCV's detectors trained on ``coco`` or ``voc``, in the order of their outputs."""
    detection = {"coco": COCODetection, "voc": VOCDetection}[word]
    return tuple(detection.CLASSES)


def parameters(net: Net) -> Mapping[str, Any]:
    """Return a network's parameters by their place in it, ``features.stages.0.0.weight``.

    Their own names hold a counter of this process, and twice the prefix once classes were exchanged.
    """
    found: dict[str, Any] = net._collect_params_with_prefix()
    return found


def state(net: Net) -> dict[str, np.ndarray]:
    """Return a copy of every parameter."""
    settle()
    return {name: parameter.data().asnumpy() for name, parameter in parameters(net).items()}


def set_state(net: Net, values: Mapping[str, np.ndarray]) -> None:
    """Put the copy that `state` made into a network of the same shapes."""
    for name, parameter in parameters(net).items():
        parameter.set_data(mx.nd.array(values[name], dtype=values[name].dtype))


def settle() -> None:
    """Wait until MXNet has nothing left to do. Comes before parameters are read.

    A forward pass for prediction leaves the weights to be put into another order of memory in the background. What is
    read meanwhile is, about once in 200 times on a CPU, neither the one order nor the other.
    """
    mx.nd.waitall()


def anchors(net: Net, image_size: int, context: Any) -> Any:
    """Return the ``(1, n, 4)`` anchors, centre and sides in input pixels, that the network has at an input size.

    Only a forward pass in training mode tells them, which also moves the running means; they are put back.
    """
    moving = [parameter for parameter in net.collect_params().values() if parameter.grad_req == "null"]
    before = [parameter.data().copy() for parameter in moving]
    with mx.autograd.train_mode():
        found = net(mx.nd.zeros((1, 3, image_size, image_size), ctx=context))[2]
    settle()  # all of the pass, not only what leads to the anchors
    for parameter, value in zip(moving, before, strict=True):
        parameter.set_data(value)
    return found


def freeze(net: Net, pattern: str) -> list[str]:
    """Let the parameters that a regular expression matches from their start stay as they are; return their names."""
    import re

    try:
        matches = re.compile(pattern).match
    except re.error as error:
        raise InvalidValue("freeze", pattern, f"no regular expression: {error}") from None
    chosen = {name: parameter for name, parameter in parameters(net).items() if matches(name)}
    if not chosen:
        listed = ", ".join(list(parameters(net))[:4])
        raise InvalidValue("freeze", pattern, f"it matches no parameter; they are called {listed} ...")
    for parameter in chosen.values():
        parameter.grad_req = "null"
    if all(parameter.grad_req == "null" for parameter in parameters(net).values()):
        raise InvalidValue("freeze", pattern, "it leaves nothing to train")
    return list(chosen)


def _first_values(name: str) -> Any:
    """Return the initialiser of a parameter that has none: for those of symbols MXNet would draw even BN's gammas."""
    known = {"gamma": "ones", "_var": "ones", "beta": "zeros", "bias": "zeros", "_mean": "zeros"}
    word = next((word for ending, word in known.items() if name.endswith(ending)), None)
    return word or mx.init.Xavier(rnd_type="gaussian", factor_type="out", magnitude=2)  # as in its FeatureExpander


def _lower_floor(net: Net) -> None:
    """Let boxes through down to the score that evaluation asks for; GluonCV's own limit is .01."""
    net.cls_decoder = MultiPerClassDecoder(len(net.classes) + 1, thresh=SCORE_FLOOR)


def _with_classes(
    net: Net, classes: Sequence[str], known: Sequence[str], *, source: str, file: Path, licence: str = ""
) -> Filled:
    """Give a trained network other classes; the outputs of those it knows by name are kept, whatever their order."""
    kept = [name for name in classes if name in known]
    new = [name for name in classes if name not in known]
    if tuple(classes) != tuple(known):
        net.reset_class(list(classes), reuse_weights={name: name for name in kept})
        _lower_floor(net)
    return Filled(net, WeightsOrigin(source=source, sha256=file_sha256(file), licence=licence, kept=kept, new=new))


def _load(net: Net, path: Path, model: str) -> None:
    try:
        net.load_parameters(str(path))
    except (MXNetError, AssertionError, ValueError, OSError) as error:
        raise UsageError(f"{path} does not fill a {model}: {last_line(error)}") from None


def _fetch(model: str, word: str) -> Path:
    """Return GluonCV's file from the cache, or fetch it; its hash is looked at either way."""
    try:
        return Path(get_model_file(f"{model}_{word}", root=str(weights_cache())))
    except (OSError, RuntimeError, ValueError) as error:
        raise _missing(word, model, error) from None


def _missing(word: str, model: str, error: Exception) -> WeightsMissing:
    first = (str(error).splitlines() or [type(error).__name__])[0].partition(" (Caused by")[0]
    return WeightsMissing(word, model, weights_file(model, word), f"they cannot be fetched ({first})")


def _classes_of(model: str, path: Path) -> tuple[str, ...]:
    """Return the class names behind a file's outputs: those of a published one, else unknown."""
    for word in ("coco", "voc"):
        if path.stem.startswith(f"{model}_{word}-"):
            return published_classes(word)
    try:
        saved = mx.nd.load(str(path))
    except (MXNetError, OSError) as error:
        raise UsageError(f"{path} is no file of MXNet parameters: {last_line(error)}") from None
    key = "class_predictors.0.predictor.bias"
    if not isinstance(saved, dict) or key not in saved:
        raise UsageError(
            f"{path} is not the file of an SSD that GluonCV's save_parameters wrote: there is no {key!r} in it"
        )
    per_anchor = saved[key].shape[0] // (len(_RATIOS_FEW) + 1)
    return tuple(f"unknown {i}" for i in range(per_anchor - 1))


def _refuse_anchors(sizes: Sequence[float], wanted: str | None) -> None:
    if sizes:
        raise UsageError(
            f"anchor_sizes cannot be chosen with weights={str(wanted)!r}: a trained detector brings the anchors it "
            "learned with; leave out anchor_sizes, or start from weights=imagenet or none"
        )
