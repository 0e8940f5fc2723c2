"""What the echo backend takes; canonical names keep their canonical types."""

from __future__ import annotations

from detkit.backends import LocalOptions
from detkit.params import Epochs, Iterations, LearningRate, MaxDetections, Params, Seed, Weights


class EchoParams(Params, frozen=True, kw_only=True):
    """Hyperparameters of the memory."""

    epochs: Epochs | None = 4
    iterations: Iterations | None = None
    learning_rate: LearningRate = 0.3
    """Share of the way that each step moves a remembered thumbnail towards the image."""
    seed: Seed = 0
    weights: Weights = None
    max_detections: MaxDetections = "auto"


class EchoOptions(LocalOptions, frozen=True, kw_only=True):
    """Where and how fast."""

    seconds_per_step: float = 0.0
    """Sleep this long in every step, to watch a run go on."""
