"""detkit makes every object-detection stack look like one: the same data set, fit, predict and scores.

Importing this package loads none of its modules; each name arrives when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Comparison": "comparison",
    "Dataset": "data",
    "DetkitError": "errors",
    "Detections": "detections",
    "Model": "job",
    "Predictor": "predictor",
    "Run": "runs",
    "Sample": "data",
    "Scores": "scores",
    "Trainer": "trainer",
    "check": "checking",
    "compare": "comparison",
    "deploy": "deployment",
    "draw": "drawing",
    "evaluate": "evaluation",
    "export": "exporting",
    "merge": "curation",
    "open_run": "catalog",
    "plot": "learning_curves",
    "read_dataset": "io",
    "read_predictions": "predictions",
    "remap": "curation",
    "sample": "curation",
    "score": "scores",
    "write_dataset": "io",
    "write_predictions": "predictions",
}

__all__ = [
    "Comparison",
    "Dataset",
    "Detections",
    "DetkitError",
    "Model",
    "Predictor",
    "Run",
    "Sample",
    "Scores",
    "Trainer",
    "__version__",
    "check",
    "compare",
    "deploy",
    "draw",
    "evaluate",
    "export",
    "merge",
    "open_run",
    "plot",
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
    from detkit.io import read_dataset, write_dataset
    from detkit.job import Model
    from detkit.learning_curves import plot
    from detkit.predictions import read_predictions, write_predictions
    from detkit.predictor import Predictor
    from detkit.runs import Run
    from detkit.scores import Scores, score
    from detkit.trainer import Trainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'detkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"detkit.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
