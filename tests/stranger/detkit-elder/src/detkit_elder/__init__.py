"""What the plugin offers, and the environment that its engine needs."""

from __future__ import annotations

from collections.abc import Iterable

from detkit.backends import LocalBackend, LocalOptions, ModelSpec
from detkit.environments import Environment
from detkit.hookspecs import hookimpl
from detkit.params import Epochs, Iterations, MaxDetections, Params, Seed


class ElderParams(Params, frozen=True, kw_only=True):
    epochs: Epochs | None = 1
    iterations: Iterations | None = None
    seed: Seed = 0
    max_detections: MaxDetections = "auto"


@hookimpl
def detkit_backends() -> Iterable[LocalBackend]:
    yield LocalBackend(
        name="elder",
        summary="the average box of each class, by a numpy of the last generation",
        engine="detkit_elder.engine:ElderEngine",
        models={"boxes": ModelSpec(params=ElderParams(), summary="averages of the boxes")},
        options=LocalOptions,
        install="detkit backends install elder",
        environment=Environment(
            requirements=("numpy==1.26.4", "pillow==11.3.0", "msgspec==0.19.0", "pluggy==1.5.0"),
            pythons=("3.12", "3.10", "3.11"),
        ),
    )
