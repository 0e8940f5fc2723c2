"""Averages boxes, with numpy 1.26 and no other: what it writes proves where it ran."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from detkit.backends import Engine, PredictOptions
from detkit.detections import Detections
from detkit.images import Image
from detkit.job import Job, Model, Trained, Workspace

if not np.__version__.startswith("1.26."):
    raise ImportError(f"expected numpy 1.26, this is {np.__version__}")


class ElderEngine(Engine):
    def train(self, job: Job, workspace: Workspace) -> Trained:
        data = workspace.dataset("train")
        assert data is not None
        sums, counts = np.zeros((len(data.classes), 4)), np.zeros((len(data.classes), 1))
        for step, sample in enumerate(data, start=1):
            workspace.raise_if_stopped()
            labels = [data.classes.index(name) for name in sample.names]
            np.add.at(sums, labels, sample.boxes)
            np.add.at(counts, labels, 1)
            workspace.log("metric", {"train/loss": 1 / step}, step=step)
        np.save(workspace.model / "means.npy", sums / np.maximum(counts, 1))
        return Trained(
            max_detections=job.params["max_detections"],
            score_threshold=0.5,
            versions={"numpy": np.__version__, "python": platform.python_version()},
        )

    def load(self, model: Model, options: PredictOptions) -> ElderDetector:
        return ElderDetector(np.load(model.path / "means.npy"), model.classes)


class ElderDetector:
    def __init__(self, means: NDArray[np.float64], classes: Sequence[str]) -> None:
        self._means, self._classes = means, tuple(classes)

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        count = len(self._classes)
        return [
            Detections(
                path="",
                width=image.shape[1],
                height=image.shape[0],
                classes=self._classes,
                boxes=self._means,
                labels=np.arange(count),
                scores=np.full(count, 0.9),
            )
            for image in images
        ]

    def close(self) -> None:
        pass
