"""Every model that can be trained in SageMaker: AWS's own algorithm, JumpStart's, and those of installed backends."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated

from msgspec import Meta, field

from detkit import plugins
from detkit.backends import Backend, LocalBackend, ModelSpec
from detkit.errors import UsageError
from detkit.params import BatchSize, Epochs, LearningRate, Params, Weights
from detkit_sagemaker.builtin import ObjectDetectionParams
from detkit_sagemaker.options import Pairs

BACKEND = "sagemaker"

BUILTIN = "object-detection"
"""AWS's built-in algorithm."""

JUMPSTART = "jumpstart/"
"""What the names of JumpStart's models begin with."""

FINE_TUNABLE = (
    "mxnet-od-ssd-300-vgg16-atrous-coco",
    "mxnet-od-ssd-300-vgg16-atrous-voc",
    "mxnet-od-ssd-512-vgg16-atrous-coco",
    "mxnet-od-ssd-512-vgg16-atrous-voc",
    "mxnet-od-ssd-512-resnet50-v1-coco",
    "mxnet-od-ssd-512-resnet50-v1-voc",
    "mxnet-od-ssd-512-mobilenet1-0-coco",
    "mxnet-od-ssd-512-mobilenet1-0-voc",
    "pytorch-od1-fasterrcnn-resnet50-fpn",
)
"""JumpStart's object detectors that can be trained, by the table of the SageMaker SDK's documentation. Whether the hub
still offers one is known when it is asked."""

_ID = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
"""What the API allows as the name of a hub's content."""


class JumpstartParams(Params, frozen=True, kw_only=True):
    """Hyperparameters of a JumpStart model; what is left out is what the hub's document says."""

    epochs: Epochs | None = None
    learning_rate: LearningRate | None = None
    batch_size: BatchSize | None = None
    hyperparameters: Annotated[
        Pairs, Meta(description="others that the hub's document lists, by their names there: name=value,name=value")
    ] = field(default_factory=dict)
    weights: Weights = "pretrained"


class SagemakerModels(Mapping[str, ModelSpec]):
    """Model specs by name, looked up when they are asked for, as backends may be installed at any time.

    `ModelSpec` of a JumpStart id that is not in `FINE_TUNABLE` is returned as well; whether the hub has it is known
    at run time. Iteration has the nine that are documented.
    """

    def __getitem__(self, name: str) -> ModelSpec:
        if name == BUILTIN:
            return ModelSpec(
                params=ObjectDetectionParams(),
                summary="AWS's built-in algorithm: SSD on MXNet, which is retired (legacy)",
            )
        if name.startswith(JUMPSTART) and _ID.fullmatch(name.removeprefix(JUMPSTART)):
            return _jumpstart(name.removeprefix(JUMPSTART))
        found = local_backend(name)
        if found is not None and found[1] in found[0].models:
            return found[0].models[found[1]]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield BUILTIN
        yield from (JUMPSTART + name for name in FINE_TUNABLE)
        for backend in _local_backends().values():
            yield from (f"{backend.name}/{model}" for model in backend.models)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _jumpstart(name: str) -> ModelSpec:
    framework = name.partition("-")[0]
    legacy = ", which is retired (legacy)" if framework == "mxnet" else ""
    return ModelSpec(
        params=JumpstartParams(),
        summary=f"JumpStart's {name}, fine-tuned by AWS's own script" + (f" on MXNet{legacy}" if legacy else ""),
        weights=("pretrained",),
    )


def local_backend(name: str) -> tuple[LocalBackend, str] | None:
    """Return the backend and the model's name there of ``<backend>/<model>``; None for AWS's own models.

    The model may be unknown to that backend.
    """
    backend, slash, model = name.partition("/")
    found = _local_backends().get(backend) if slash else None
    return None if found is None else (found, model)


def jumpstart_id(name: str) -> str | None:
    """Return the JumpStart id of ``jumpstart/<id>``; None for any other model."""
    return name.removeprefix(JUMPSTART) if name.startswith(JUMPSTART) else None


def _local_backends() -> dict[str, LocalBackend]:
    installed: Mapping[str, Backend] = plugins.backends()
    return {name: b for name, b in installed.items() if isinstance(b, LocalBackend) and name != BACKEND}


def refuse_without_weights(name: str, params: JumpstartParams) -> None:
    """Raise `UsageError` for ``weights=none``: a JumpStart model always starts from weights."""
    if params.weights is None:
        raise UsageError(f"{JUMPSTART}{name} always starts from its own weights; leave weights= out")
