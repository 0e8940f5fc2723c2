"""The tracker for MLflow. It does something only where the environment names a server or an experiment."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from detkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from detkit.events import Event
    from detkit.runs import Run

ASKED_BY = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")
"""Environment variables of MLflow; one of them has to be set."""


@hookimpl
def detkit_on_event(event: Event, run: Run) -> None:
    """Log the event. MLflow is imported only where it was asked for, so that importing this module is cheap."""
    if event.kind in {"metric", "state"} and any(os.environ.get(name) for name in ASKED_BY):
        from detkit_mlflow.tracking import track

        track(event, run)
