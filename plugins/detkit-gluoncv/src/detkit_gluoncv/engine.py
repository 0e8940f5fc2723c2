"""Training, prediction and export with MXNet, in the worker.

MXNet reads the number of its threads while it is loaded, so the modules that import it are imported once that is known.
"""

from __future__ import annotations

import os
from pathlib import Path

from detkit.backends import Detector, Engine, PredictOptions
from detkit.errors import Unsupported
from detkit.job import Job, Model, Trained, Workspace
from detkit.loading import count_cores
from detkit_gluoncv import numpy_names  # noqa: F401 - from here on, mxnet and gluoncv can be imported

SYMBOL = "symbol"
"""The model that stands for any network in MXNet's own format, see `detkit_gluoncv.artifacts`; nothing trains it."""


class GluoncvEngine(Engine):
    """The worker's side."""

    def train(self, job: Job, workspace: Workspace) -> Trained:
        set_threads(job.options["threads"])
        from detkit_gluoncv.runtime import explained_errors
        from detkit_gluoncv.training import Training

        with explained_errors():
            return Training(job, workspace).run()

    def load(self, model: Model, options: PredictOptions) -> Detector:
        set_threads("auto")
        from detkit_gluoncv.artifacts import open_artifact
        from detkit_gluoncv.detector import open_model
        from detkit_gluoncv.runtime import explained_errors

        with explained_errors():
            return (open_artifact if model.manifest.model == SYMBOL else open_model)(model, options)

    def export(self, model: Model, format: str, to: Path) -> Path:
        set_threads("auto")
        from detkit_gluoncv.export import EXPORTERS
        from detkit_gluoncv.runtime import explained_errors

        if format not in EXPORTERS or model.manifest.model == SYMBOL:
            raise Unsupported(f"{model.name} cannot be exported to {format!r}; formats: {', '.join(EXPORTERS)}")
        with explained_errors():
            return EXPORTERS[format](model, to)


def set_threads(wanted: int | str) -> None:
    """Set MXNet's threads, before it is loaded; ``auto``: ``OMP_NUM_THREADS`` where set, else half of the cores.

    MXNet's threads wait for each other by spinning, so on cores that have other work they cost more than they do.
    """
    if wanted != "auto":
        os.environ["OMP_NUM_THREADS"] = str(wanted)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // 2)))
