"""detkit makes every object-detection stack look like one: the same data set, fit, predict and scores.

Importing this package loads none of its modules; each name arrives when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Choice": "spaces",
    "Comparison": "comparison",
    "Dataset": "data",
    "DetkitError": "errors",
    "Detections": "detections",
    "Float": "spaces",
    "Int": "spaces",
    "Model": "job",
    "Predictor": "predictor",
    "Run": "runs",
    "Sample": "data",
    "Scores": "scores",
    "Study": "studies",
    "Trainer": "trainer",
    "Tuner": "tuner",
    "check": "checking",
    "compare": "comparison",
    "deploy": "deployment",
    "draw": "drawing",
    "evaluate": "evaluation",
    "export": "exporting",
    "merge": "curation",
    "open_run": "catalog",
    "open_study": "studies",
    "plot": "learning_curves",
    "plot_study": "study_plots",
    "read_dataset": "io",
    "read_predictions": "predictions",
    "remap": "curation",
    "sample": "curation",
    "score": "scores",
    "write_dataset": "io",
    "write_predictions": "formats.resultwriter",
}

__all__ = [
    "Choice",
    "Comparison",
    "Dataset",
    "Detections",
    "DetkitError",
    "Float",
    "Int",
    "Model",
    "Predictor",
    "Run",
    "Sample",
    "Scores",
    "Study",
    "Trainer",
    "Tuner",
    "__version__",
    "check",
    "compare",
    "deploy",
    "draw",
    "evaluate",
    "export",
    "merge",
    "open_run",
    "open_study",
    "plot",
    "plot_study",
    "read_dataset",
    "read_predictions",
    "remap",
    "sample",
    "score",
    "write_dataset",
    "write_predictions",
]

if TYPE_CHECKING:
    from detkit.catalog import open_run
    from detkit.checking import check
    from detkit.comparison import Comparison, compare
    from detkit.curation import merge, remap, sample
    from detkit.data import Dataset, Sample
    from detkit.deployment import deploy
    from detkit.detections import Detections
    from detkit.drawing import draw
    from detkit.errors import DetkitError
    from detkit.evaluation import evaluate
    from detkit.exporting import export
    from detkit.formats.resultwriter import write_predictions
    from detkit.io import read_dataset, write_dataset
    from detkit.job import Model
    from detkit.learning_curves import plot
    from detkit.predictions import read_predictions
    from detkit.predictor import Predictor
    from detkit.runs import Run
    from detkit.scores import Scores, score
    from detkit.spaces import Choice, Float, Int
    from detkit.studies import Study, open_study
    from detkit.study_plots import plot_study
    from detkit.trainer import Trainer
    from detkit.tuner import Tuner


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'detkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"detkit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
