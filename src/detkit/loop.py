"""The training loop of engines that run their own optimizer: what the canonical parameters mean, step by step.

An engine subclasses `TrainingLoop` with what a batch, a step and a checkpoint are; order of images, learning rate, log,
progress, validation, the weights that are kept, early stopping and the loss that is not finite are the same for all.
"""

from __future__ import annotations

import functools
import math
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from detkit.data import Dataset, Indices
from detkit.errors import NonFiniteLoss
from detkit.job import Job, Workspace
from detkit.params import every_steps

if TYPE_CHECKING:
    from detkit.scores import Scores

LOG_EVERY = 10
"""Steps between two metric events; the loss is their mean."""

HEADLINES = ("AP", "AP50", "AP75")
"""The numbers that are logged and kept in the manifest."""

_AHEAD = 2
"""Items made ready ahead of the step that needs them, beside one for each thread."""

_PROGRESS_EVERY_S = 0.5

BatchT = TypeVar("BatchT")
ItemT = TypeVar("ItemT")


@dataclass
class Best:
    """The weights kept so far: those of the highest ``val/AP``. Part of every checkpoint."""

    ap: float = -1.0
    metrics: dict[str, float] | None = None
    score_threshold: float | None = None
    state: Any = None
    """What `TrainingLoop.snapshot` returned."""
    reference: float = -1.0
    """The ``val/AP`` that early stopping wants to see surpassed."""
    stale: int = 0
    """Validations since then."""


class TrainingLoop(ABC, Generic[BatchT]):
    """One training run. `steps` does it; subclasses say what a step is.

    Everything random belongs to a seed and a step or an image alone, see `step_seed` and `image_seed`: then a resumed
    run ends like an uninterrupted one.
    """

    def __init__(self, job: Job, workspace: Workspace) -> None:
        data = workspace.dataset("train")
        assert data is not None
        self.job, self.workspace, self.params = job, workspace, job.params
        self.data: Dataset = data
        self.steps_per_epoch = len(epoch_order(len(data), self.params["batch_size"], 0, 0))
        self.total_steps: int = self.params["iterations"] or self.params["epochs"] * self.steps_per_epoch
        self.warmup_steps = self._warmup_steps()
        self.step = 0
        self.best = Best()
        self._order = functools.lru_cache(maxsize=8)(
            lambda epoch: epoch_order(len(data), self.params["batch_size"], self.params["seed"], epoch)
        )

    @abstractmethod
    def batches(self) -> Iterator[BatchT]:
        """Yield what `train_step` takes, for the steps ``self.step`` to ``self.total_steps - 1``."""

    @abstractmethod
    def train_step(self, batch: BatchT) -> dict[str, float]:
        """Do one optimizer step at ``learning_rate(self.step)`` and return ``loss`` and its parts.

        Calls `check_finite` before it changes any weight.
        """

    @abstractmethod
    def validate(self) -> Scores | None:
        """Score the validation images; None where there are none."""

    @abstractmethod
    def snapshot(self) -> Any:
        """Return a copy of the weights, for `Best.state`."""

    @abstractmethod
    def save_checkpoint(self) -> None:
        """Save all that continuing needs: weights, optimizer, ``step`` and ``best``. Atomically, and not pickled."""

    def steps(self) -> Iterator[int]:
        """Train, log, validate and save; yield the number of steps done after each."""
        validate_steps = every_steps(self.params["validate_every"], self.steps_per_epoch)
        checkpoint_steps = every_steps(self.params["checkpoint_every"], self.steps_per_epoch)
        window: list[dict[str, float]] = []
        meter = _Meter(self.step, self.total_steps)
        if self.step % validate_steps == 0 and self._out_of_patience():
            return
        for batch in self.batches():
            self.workspace.raise_if_stopped()
            window.append(self.train_step(batch))
            self.step += 1
            ends = self.step == self.total_steps
            if self.step % LOG_EVERY == 0 or self.step % self.steps_per_epoch == 0 or ends:
                means = {f"train/{name}": float(np.mean([w[name] for w in window])) for name in window[0]}
                self.log("metric", {**means, "train/learning_rate": self.learning_rate(self.step - 1)})
                window = []
            if (progress := meter.update(self.step, len(self.batch_indices(self.step - 1)))) is not None:
                self.log("progress", progress)
            if validates := (self.step % validate_steps == 0 or ends):
                scores = self.validate()
                if scores is not None:
                    self._judge(scores)
                meter.restart(self.step)
            stops_early = validates and not ends and self._out_of_patience()
            if self.step % checkpoint_steps == 0 or ends or stops_early:
                self.save_checkpoint()
            yield self.step
            if stops_early:
                self.say(f"stopped early after step {self.step}: {self.best.stale} validations without a better AP")
                return

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: linear warm-up, then the schedule."""
        peak = self.params["learning_rate"]
        if step < self.warmup_steps:
            return float(peak * (step + 1) / self.warmup_steps)
        if self.params["lr_scheduler"] == "constant":
            return float(peak)
        if self.params["lr_scheduler"] == "step":
            passed = sum(step >= epoch * self.steps_per_epoch for epoch in self.params["lr_scheduler_step"])
            return float(peak * self.params["lr_scheduler_factor"] ** passed)
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return float(peak * 0.5 * (1 + math.cos(math.pi * done)))

    def batch_indices(self, step: int) -> list[int]:
        """Return the training images of a step, by their position in the data."""
        epoch, position = divmod(step, self.steps_per_epoch)
        indices: list[int] = self._order(epoch)[position].tolist()
        return indices

    def image_seed(self, step: int, index: int) -> list[int]:
        """Return a seed for ``numpy.random.default_rng``, for what happens to one image in one epoch."""
        return [self.params["seed"], step // self.steps_per_epoch, index]

    def step_seed(self) -> int:
        """Return a seed for what happens inside the network at this step."""
        return int(self.params["seed"] * 1_000_003 + self.step)

    def check_finite(self, losses: Mapping[str, float], indices: Sequence[int]) -> None:
        """Raise `NonFiniteLoss` naming the step, the learning rate and the batch's files where ``loss`` is none."""
        if not math.isfinite(losses["loss"]):
            files = [self.data.image_ids[index] for index in indices]
            raise NonFiniteLoss(self.step + 1, self.learning_rate(self.step), dict(losses), files)

    def log(self, kind: Any, values: Mapping[str, float | str]) -> None:
        """Write an event at the current step."""
        self.workspace.log(kind, values, step=self.step, epoch=round(self.step / self.steps_per_epoch, 4))

    def say(self, message: str) -> None:
        """Write a message for the user."""
        self.log("log", {"message": message})

    def final_metrics(self, test: Scores | None) -> dict[str, float]:
        """Return the kept weights' ``val/*`` and, where there is a test set, log and add ``test/*``."""
        metrics = dict(self.best.metrics or {})
        if test is not None:
            tested = _headlines("test", test)
            self.log("metric", tested)
            metrics |= tested
        return metrics

    def _judge(self, scores: Scores) -> None:
        """Log the validation scores, and keep the weights where they are the best."""
        metrics, best, ap = _headlines("val", scores), self.best, scores["AP"]
        self.log("metric", metrics)
        if ap > best.ap:
            best.ap, best.metrics = ap, metrics
            best.score_threshold, best.state = scores.score_threshold, self.snapshot()
        tolerance = self.params.get("early_stopping_tolerance", 0.0)
        if ap > best.reference + tolerance * max(0.0, best.reference):
            best.reference, best.stale = ap, 0
        elif math.isfinite(ap):
            best.stale += 1

    def _out_of_patience(self) -> bool:
        patience = self.params.get("early_stopping_patience")
        least = self.params.get("early_stopping_min_epochs", 0) * self.steps_per_epoch
        return patience is not None and self.best.stale >= patience and self.step >= least

    def _warmup_steps(self) -> int:
        epochs, iterations = self.params["warmup_epochs"], self.params["warmup_iterations"]
        if epochs is not None:
            return round(float(epochs) * self.steps_per_epoch)
        return round(0.05 * self.total_steps) if iterations == "auto" else int(iterations or 0)


def epoch_order(num_images: int, batch_size: int, seed: int, epoch: int) -> list[Indices]:
    """Return the image indices of each batch of an epoch; a last batch of one image joins the one before it."""
    order = np.random.default_rng([seed, epoch]).permutation(num_images)
    batches = [order[start : start + batch_size] for start in range(0, num_images, batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation cannot train on one image's 1x1 maps
        last = batches.pop()
        batches[-1] = np.concatenate([batches[-1], last])
    return batches


def load_ahead(load: Callable[[int], ItemT], numbers: Iterable[int], num_workers: int) -> Iterator[ItemT]:
    """Yield ``load(number)`` for each step or image, in order, loaded by threads before they are needed."""
    if num_workers == 0:
        yield from map(load, numbers)
        return
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(num_workers, thread_name_prefix="decode"))
        waiting: deque[Future[ItemT]] = deque()
        stack.callback(lambda: [future.cancel() for future in waiting])
        for number in numbers:
            waiting.append(pool.submit(load, number))
            if len(waiting) > _AHEAD + num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loading_threads(asked: int | str) -> int:
    """Return the threads for `load_ahead`; ``auto`` is none on one or two cores, where they would only compete."""
    return int(asked) if asked != "auto" else 0 if count_cores() <= 2 else min(8, count_cores() - 1)


class _Meter:
    """Images per second and time left, over the steps since the last report."""

    def __init__(self, step: int, total: int) -> None:
        self._total = total
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin a new interval, after a report or something that is not training."""
        self._images, self._step, self._last = 0, step, time.monotonic()

    def update(self, step: int, num_images: int) -> dict[str, float] | None:
        """Count a step; returns numbers to report at most twice a second, and at the end."""
        self._images += num_images
        elapsed = time.monotonic() - self._last
        if elapsed < _PROGRESS_EVERY_S and step < self._total:
            return None
        numbers = {
            "total_steps": float(self._total),
            "images_per_s": self._images / elapsed if elapsed else 0.0,
            "eta_s": (self._total - step) * elapsed / (step - self._step),
        }
        self.restart(step)
        return numbers


def _headlines(prefix: str, scores: Scores) -> dict[str, float]:
    return {f"{prefix}/{name}": scores[name] for name in HEADLINES if math.isfinite(scores[name])}
