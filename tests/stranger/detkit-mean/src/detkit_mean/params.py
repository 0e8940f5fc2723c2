"""Hyperparameters and options of the backend."""

from __future__ import annotations

from detkit.backends import LocalOptions
from detkit.params import Epochs, Iterations, LearningRate, MaxDetections, Params, Seed


class MeanParams(Params, frozen=True, kw_only=True):
    epochs: Epochs | None = 4
    iterations: Iterations | None = None
    learning_rate: LearningRate = 0.2
    seed: Seed = 0
    max_detections: MaxDetections = "auto"


class MeanOptions(LocalOptions, frozen=True, kw_only=True):
    pause_s: float = 0.0
    """Rest after every step."""
