"""Learns one box for each class by running averages, as fractions of the picture's size."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from detkit.backends import Engine, PredictOptions
from detkit.boxes import clip
from detkit.detections import Detections
from detkit.errors import NonFiniteLoss, Unsupported
from detkit.files import atomic_write
from detkit.images import Image
from detkit.job import Job, Model, Trained, Workspace
from detkit.scores import SCORE_FLOOR, score


class MeanEngine(Engine):
    def train(self, job: Job, workspace: Workspace) -> Trained:
        require_cpu(job.options["device"])
        data = workspace.dataset("train")
        assert data is not None
        rng = np.random.default_rng(job.params["seed"])
        means = np.sort(rng.random((len(data.classes), 2, 2)), axis=1).reshape(-1, 4)
        per_epoch = len(data)
        total = job.params["iterations"] or job.params["epochs"] * per_epoch
        for step in range(1, total + 1):
            workspace.raise_if_stopped()
            if step % per_epoch == 1:
                order = rng.permutation(per_epoch)
            sample = data[int(order[(step - 1) % per_epoch])]
            sample.image()  # not looked at, but a picture that cannot be read should not go unnoticed
            labels = np.array([data.classes.index(name) for name in sample.names], dtype=np.int64)
            gaps = sample.boxes / np.tile([sample.width, sample.height], 2) - means[labels]
            loss = float(np.mean(np.abs(gaps))) if len(gaps) else 0.0
            if not math.isfinite(loss):
                raise NonFiniteLoss(step, job.params["learning_rate"], {"loss": loss}, [sample.image_id])
            with np.errstate(over="ignore", invalid="ignore"):
                np.add.at(means, labels, job.params["learning_rate"] * gaps)
            workspace.log("metric", {"train/loss": loss}, step=step, epoch=step / per_epoch)
            workspace.log("progress", {"total_steps": total}, step=step, epoch=step / per_epoch)
            time.sleep(job.options["pause_s"])
        with atomic_write(workspace.model / "means.npy") as file:
            np.save(file, means)
        metrics, threshold = {}, None
        validation = workspace.dataset("validation")
        if validation is not None:
            detector = MeanDetector(means, data.classes, PredictOptions(score_threshold=SCORE_FLOOR))
            scores = score(validation, detector.detect([sample.image() for sample in validation]))
            metrics, threshold = {"val/AP": scores["AP"], "val/AP50": scores["AP50"]}, scores.score_threshold
            workspace.log("metric", metrics, step=total, epoch=total / per_epoch)
        return Trained(
            native={"learning_rate": job.params["learning_rate"]},
            metrics=metrics,
            score_threshold=threshold,
            max_detections=job.params["max_detections"],
            versions={"numpy": np.__version__},
        )

    def load(self, model: Model, options: PredictOptions) -> MeanDetector:
        require_cpu(options.device)
        return MeanDetector(np.load(model.path / "means.npy"), model.classes, options)


class MeanDetector:
    def __init__(self, means: NDArray[np.float64], classes: Sequence[str], options: PredictOptions) -> None:
        ordered = np.sort(means.reshape(-1, 2, 2), axis=1).reshape(-1, 4)
        self._means, self._classes, self._options = clip(ordered, 1, 1), tuple(classes), options

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        return [self._detect(image.shape[1], image.shape[0]) for image in images]

    def close(self) -> None:
        pass

    def _detect(self, width: int, height: int) -> Detections:
        boxes = self._means * np.tile([width, height], 2)
        scores = np.linspace(0.9, 0.5, len(boxes))
        solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        keep = np.flatnonzero(solid & (scores >= self._options.score_threshold))[: self._options.max_detections]
        return Detections(
            path="",
            width=width,
            height=height,
            classes=self._classes,
            boxes=boxes[keep],
            labels=keep,
            scores=scores[keep],
        )


def require_cpu(device: str) -> None:
    if device not in {"auto", "cpu"}:
        raise Unsupported(f"device={device!r}: averages are taken on the CPU; choose device=cpu")
