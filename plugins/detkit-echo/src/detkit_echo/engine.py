"""Training and prediction of the memory. One thumbnail is learned per training image, by real gradient steps, so that
losses, checkpoints, seeds and resuming mean here what they mean in a large framework."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from detkit.backends import Engine, PredictOptions
from detkit.boxes import Boxes, clip
from detkit.checkpoints import Checkpoints
from detkit.data import Dataset, Indices
from detkit.detections import Detections
from detkit.errors import NonFiniteLoss, Unsupported
from detkit.files import atomic_write
from detkit.images import Image
from detkit.job import Job, Model, Trained, WeightsOrigin, Workspace
from detkit.scores import SCORE_FLOOR, score

Thumbnails = NDArray[np.float32]

SIDE = 16
"""Pixels of a thumbnail's side."""


@dataclass
class Memory:
    """All that is learned: one thumbnail per image, and the image's boxes as fractions of its size."""

    thumbnails: Thumbnails
    """``(n, SIDE, SIDE)`` grey, 0..1."""
    offsets: Indices
    boxes: Boxes
    """``(m, 4)`` xyxy, as fractions of the image's width and height."""
    labels: Indices

    def save(self, file: Any) -> None:
        np.savez(file, **vars(self))

    @classmethod
    def load(cls, file: Any) -> Memory:
        with np.load(file, allow_pickle=False) as arrays:
            return cls(**arrays)


class EchoEngine(Engine):
    """The worker's side."""

    def train(self, job: Job, workspace: Workspace) -> Trained:
        params = job.params
        require_cpu(job.options["device"])
        data = workspace.dataset("train")
        assert data is not None
        targets = np.stack([thumbnail(sample.image()) for sample in data])
        validation = workspace.dataset("validation")
        rng = np.random.default_rng(params["seed"])
        memory = remember(data, rng)
        origin = WeightsOrigin()
        if workspace.parent_model.is_dir():
            memory, origin = with_parent(memory, Model(workspace.parent_model), data.classes)
            targets = np.concatenate([memory.thumbnails[: len(memory.thumbnails) - len(targets)], targets])
        per_epoch = len(targets)
        done = resume(workspace, memory, rng)
        total = params["iterations"] or params["epochs"] * per_epoch
        metrics: dict[str, float] = {}
        for epoch in range(done // per_epoch, math.ceil(total / per_epoch)):
            before = rng.bit_generator.state
            order = rng.permutation(per_epoch)[: total - epoch * per_epoch]
            for i, index in enumerate(order):
                step = epoch * per_epoch + i + 1
                if step <= done:
                    continue
                workspace.raise_if_stopped()
                gap = targets[index] - memory.thumbnails[index]
                with np.errstate(over="ignore", invalid="ignore"):  # a hopeless learning rate ends in the check below
                    loss = float(np.mean(gap**2))
                if not math.isfinite(loss):
                    names = [data.image_ids[index % len(data)]]
                    raise NonFiniteLoss(step, params["learning_rate"], {"loss": loss}, names)
                memory.thumbnails[index] += params["learning_rate"] * gap
                time.sleep(job.options["seconds_per_step"])
                if step % 10 == 0 or i == len(order) - 1:
                    at = epoch + (i + 1) / per_epoch
                    workspace.log("metric", {"train/loss": loss}, step=step, epoch=at)
                    workspace.log("progress", {"total_steps": total}, step=step, epoch=at)
            if validation is not None:
                metrics = headlines("val", memory, validation, params["max_detections"])
                workspace.log("metric", metrics, step=step, epoch=step / per_epoch)
            save_checkpoint(workspace, memory, before if step % per_epoch else rng.bit_generator.state, step)
        if validation is not None and not metrics:  # all steps had been done when it was ended
            metrics = headlines("val", memory, validation, params["max_detections"])
        with atomic_write(workspace.model / "memory.npz") as file:
            memory.save(file)
        test = workspace.dataset("test")
        if test is not None:
            final = headlines("test", memory, test, params["max_detections"])
            metrics |= final
            workspace.log("metric", final, step=total)
        return Trained(
            native={"learning_rate": params["learning_rate"]},
            weights=origin,
            metrics=metrics,
            score_threshold=0.5 if validation is not None else None,
            max_detections=params["max_detections"],
            versions={"numpy": np.__version__},
        )

    def load(self, model: Model, options: PredictOptions) -> EchoDetector:
        require_cpu(options.device)
        return EchoDetector(Memory.load(model.path / "memory.npz"), model.classes, options)


class EchoDetector:
    """Answers with the boxes of the most similar remembered image."""

    def __init__(self, memory: Memory, classes: Sequence[str], options: PredictOptions) -> None:
        self._memory, self._classes, self._options = memory, tuple(classes), options

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        return [self._detect(image) for image in images]

    def close(self) -> None:
        pass

    def _detect(self, image: Image) -> Detections:
        height, width = image.shape[:2]
        distance = np.mean((self._memory.thumbnails - thumbnail(image)) ** 2, axis=(1, 2))
        nearest = int(np.argmin(distance))
        rows = slice(self._memory.offsets[nearest], self._memory.offsets[nearest + 1])
        boxes = clip(self._memory.boxes[rows] * [width, height, width, height], width, height)
        scores = np.full(len(boxes), math.exp(-float(distance[nearest])))
        keep = np.flatnonzero(scores >= self._options.score_threshold)[: self._options.max_detections]
        return Detections(
            path="",
            width=width,
            height=height,
            classes=self._classes,
            boxes=boxes[keep],
            labels=self._memory.labels[rows][keep],
            scores=scores[keep],
        )


def require_cpu(device: str) -> None:
    """Raise where somebody asks for what is not there."""
    if device not in {"auto", "cpu"}:
        raise Unsupported(f"device={device!r}: the echo backend runs on the CPU; choose device=cpu")


def thumbnail(image: Image) -> Thumbnails:
    """Shrink an image to ``(SIDE, SIDE)`` grey values in 0..1."""
    small = PillowImage.fromarray(image).convert("L").resize((SIDE, SIDE), PillowImage.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / np.float32(255)


def remember(data: Dataset, rng: np.random.Generator) -> Memory:
    """Start with random thumbnails and the true boxes."""
    per_box = np.repeat(data.sizes, data.boxes_per_image(), axis=0)
    return Memory(
        thumbnails=rng.random((len(data), SIDE, SIDE), dtype=np.float32),
        offsets=np.array(data.offsets),
        boxes=data.boxes / np.tile(per_box, 2),
        labels=np.array(data.labels),
    )


def with_parent(memory: Memory, parent: Model, classes: Sequence[str]) -> tuple[Memory, WeightsOrigin]:
    """Put what the parent remembers before the new images; its classes are matched by name, unknown ones dropped."""
    old = Memory.load(parent.path / "memory.npz")
    index = {name: i for i, name in enumerate(classes)}
    table = np.array([index.get(name, -1) for name in parent.classes], dtype=np.int64)
    labels = table[old.labels]
    keep = labels >= 0
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    merged = Memory(
        thumbnails=np.concatenate([old.thumbnails, memory.thumbnails]),
        offsets=np.concatenate([kept_before[old.offsets], memory.offsets[1:] + kept_before[-1]]),
        boxes=np.concatenate([old.boxes[keep], memory.boxes]),
        labels=np.concatenate([labels[keep], memory.labels]),
    )
    kept = [name for name in classes if name in parent.classes]
    new = [name for name in classes if name not in parent.classes]
    return merged, WeightsOrigin(source=str(parent.path), kept=kept, new=new)


def headlines(prefix: str, memory: Memory, data: Dataset, max_detections: int) -> dict[str, float]:
    """Score the memory on a data set by detkit's own evaluator; return the numbers that are logged."""
    options = PredictOptions(score_threshold=SCORE_FLOOR, max_detections=max_detections)
    detector = EchoDetector(memory, data.classes, options)
    scores = score(data, detector.detect([sample.image() for sample in data]), max_detections=max_detections)
    return {f"{prefix}/{name}": scores[name] for name in ("AP", "AP50")}


def save_checkpoint(workspace: Workspace, memory: Memory, rng: Mapping[str, Any], step: int) -> None:
    """Leave everything that continuing exactly needs; ``rng`` is its state before the epoch of the next step."""
    encoded = np.frombuffer(json.dumps({"step": step, "rng": rng}).encode(), dtype=np.uint8)
    Checkpoints(workspace.checkpoints).save(
        step, lambda file: np.savez(file, thumbnails=memory.thumbnails, state=encoded)
    )


def resume(workspace: Workspace, memory: Memory, rng: np.random.Generator) -> int:
    """Restore the newest whole checkpoint, if there is one, and return the number of steps done."""
    found = Checkpoints(workspace.checkpoints).newest(lambda message: workspace.log("log", {"message": message}))
    if found is None:
        return 0
    with np.load(found.path, allow_pickle=False) as saved:
        memory.thumbnails[:] = saved["thumbnails"]
        state = json.loads(saved["state"].tobytes())
    rng.bit_generator.state = state["rng"]
    done = int(state["step"])
    workspace.log("state", {"state": "resumed"}, step=done, epoch=done / len(memory.thumbnails))
    return done
