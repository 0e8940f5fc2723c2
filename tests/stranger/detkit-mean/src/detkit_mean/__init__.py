"""What the plugin offers; the engine is named by a string, so importing this is cheap."""

from __future__ import annotations

from collections.abc import Iterable

from detkit.backends import LocalBackend, ModelSpec
from detkit.events import Event
from detkit.formats import Format
from detkit.hookspecs import hookimpl
from detkit.metrics import Metric
from detkit.runs import Run
from detkit_mean import boxes_csv, count_error, tracker
from detkit_mean.params import MeanOptions, MeanParams

BLIND = "it looks at no pixel, so it finds objects only where they usually are"


@hookimpl
def detkit_backends() -> Iterable[LocalBackend]:
    yield LocalBackend(
        name="mean",
        summary="the average box of every class, in every picture",
        engine="detkit_mean.engine:MeanEngine",
        models={"boxes": ModelSpec(params=MeanParams(), summary="running averages of the boxes")},
        options=MeanOptions,
        install="pip install detkit-mean",
        gaps={"test_learns": BLIND, "test_names_out_as_in": BLIND},
    )


@hookimpl
def detkit_formats() -> Iterable[Format]:
    yield boxes_csv.FORMAT


@hookimpl
def detkit_metrics() -> Iterable[Metric]:
    yield count_error.METRIC


@hookimpl
def detkit_on_event(event: Event, run: Run) -> None:
    tracker.write(event, run)
