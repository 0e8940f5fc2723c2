"""The training loop of engines that run their own optimizer: what the canonical parameters mean, step by step.

An engine subclasses `TrainingLoop` with what a batch, a step and a state are; order of images, learning rate, log,
progress, validation, the weights that are kept, early stopping, checkpoints and the loss that is not finite are the
same for all.
"""

from __future__ import annotations

import functools
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
import numpy as np

from detkit.checkpoints import Checkpoints
from detkit.data import Dataset
from detkit.errors import NonFiniteLoss, Stopped, UsageError
from detkit.events import validation_loss
from detkit.job import Job, WeightsOrigin, Workspace
from detkit.params import every_steps
from detkit.ranks import Alone, Ranks
from detkit.sampling import class_balanced_shares, epoch_order
from detkit.timing import Clock, Meter, tell

if TYPE_CHECKING:
    from detkit.scores import Scores

LOG_EVERY = 10
"""Steps between two metric events; the loss is their mean."""

HEADLINES = ("AP", "AP50", "AP75", "mask_AP", "mask_AP50")
"""The numbers that are logged and kept in the manifest, where there are such."""

ONE_CYCLE_RISE, ONE_CYCLE_START, ONE_CYCLE_END = 0.3, 1 / 25, 1 / 25e4
"""Share of the steps, and shares of the peak, as in ``torch.optim.lr_scheduler.OneCycleLR``, after Smith and Topin,
"Super-Convergence" (2018). Momentum is not cycled."""

_NAMED_BOXES = 5
"""Boxes of an image that an error lists."""

_RANK_SEEDS = 1 << 40
"""How far the seeds of two ranks lie apart."""

BatchT = TypeVar("BatchT")


@dataclass
class Best:
    """The weights kept so far: those of the highest ``best_metric``. Part of every checkpoint."""

    value: float = -1.0
    metrics: dict[str, float] | None = None
    score_threshold: float | None = None
    state: Any = None
    """What `TrainingLoop.snapshot` returned."""
    reference: float = -1.0
    """The value that early stopping wants to see surpassed."""
    stale: int = 0
    """Validations since then."""


class Counters(msgspec.Struct, frozen=True, kw_only=True):
    """What every engine's checkpoint holds beside weights and optimizer; JSON can carry it."""

    step: int
    total_steps: int
    best: dict[str, Any]
    """`Best` without its ``state``."""
    losses: list[dict[str, float]]
    """Those of the steps since the last metric event, which are part of the next mean."""
    origin: WeightsOrigin


class TrainingLoop(ABC, Generic[BatchT]):
    """One training run. `steps` does it; subclasses say what a step is.

    Everything random belongs to a seed and a step or an image alone, see `step_seed` and `image_seed`: then a resumed
    run ends like an uninterrupted one. Of several processes each runs the loop, see `detkit.ranks`; the first one has
    the scores, and writes.
    """

    def __init__(
        self,
        job: Job,
        workspace: Workspace,
        ranks: Ranks | None = None,
        synchronise: Callable[[], object] | None = None,
    ) -> None:
        """``synchronise`` waits for a device that works on its own, for `clock`."""
        self.ranks = ranks or Alone()
        self.clock = Clock(synchronise)
        data = workspace.dataset("train")
        assert data is not None
        self.job, self.workspace, self.params = job, workspace, job.params
        self.data: Dataset = data
        if self.params["batch_size"] < self.ranks.size:
            raise UsageError(
                f"batch_size={self.params['batch_size']} for {self.ranks.size} processes: it is the whole batch, of "
                f"which each has its share; give batch_size={self.ranks.size} or more"
            )
        shares = class_balanced_shares(data) if self.params.get("sampling") == "class_balanced" else None
        self.steps_per_epoch = len(epoch_order(len(data), self.params["batch_size"], 0, 0))
        self.total_steps: int = self.params["iterations"] or self.params["epochs"] * self.steps_per_epoch
        self.warmup_steps = self._warmup_steps(self.total_steps)
        self.step = 0
        self.best = Best()
        self.origin = WeightsOrigin()
        """Where the weights came from; an engine sets it before the first step."""
        self._unlogged: list[dict[str, float]] = []
        self._checkpoints = Checkpoints(workspace.checkpoints)
        self._from = self._checkpoints.newest(self.say) if self.ranks.rank == 0 else None
        self._resumes = self._agreed(self._from is not None)
        self._order = functools.lru_cache(maxsize=8)(
            lambda epoch: epoch_order(len(data), self.params["batch_size"], self.params["seed"], epoch, shares)
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
        """Score the validation images; None where there are none, and on all ranks but the first."""

    @abstractmethod
    def snapshot(self) -> Any:
        """Return a copy of the weights, for `Best.state`."""

    @abstractmethod
    def write_state(self, file: IO[bytes], counters: Counters) -> None:
        """Write all that continuing needs: weights, optimizer, ``best.state`` and the counters. Nothing is pickled."""

    @abstractmethod
    def read_state(self, file: Path) -> tuple[Counters, Any]:
        """Take up what `write_state` wrote and return the counters and ``best.state``."""

    def validation_losses(self) -> dict[str, float]:
        """Return ``loss`` and its parts on the validation images, where the engine can tell. Changes no weight."""
        return {}

    def share_statistics(self) -> None:
        """Make what each rank has learned of its own images, beside the gradients, the same on all."""

    @property
    def resumes(self) -> bool:
        """Whether this run goes on from a checkpoint; then `resume` takes it up, and nothing else gives weights."""
        return self._resumes

    def resume(self) -> None:
        """Take up the newest whole checkpoint, once network and optimizer are there."""
        with self._state_file() as file:
            counters, best_state = self.read_state(file)
        self.step, self.origin, self._unlogged = counters.step, counters.origin, list(counters.losses)
        self.best = Best(**counters.best, state=best_state)
        self.log("state", {"state": "resumed"})
        self.say(f"resumed after step {self.step} of {self.total_steps}")
        before = self.job.continued_from
        if counters.total_steps != self.total_steps or (before is not None and before.step == self.step):
            self.best.stale = 0  # a longer run has its patience anew
        if counters.total_steps != self.total_steps:
            was, now = self.learning_rate(self.step - 1, counters.total_steps), self.learning_rate(self.step)
            self.say(
                f"the {self.params['lr_scheduler']} schedule spans {self.total_steps} steps instead of "
                f"{counters.total_steps}: the learning rate goes on at {now:.3g}, it was {was:.3g}"
            )

    @contextmanager
    def _state_file(self) -> Iterator[Path]:
        """Yield the checkpoint's file; on other ranks than the first, which may be other machines, a copy of it."""
        whole = b""
        if self.ranks.size > 1:
            whole = self.ranks.broadcast(b"" if self._from is None else self._from.path.read_bytes())
        if self._from is not None:
            yield self._from.path
            return
        with tempfile.NamedTemporaryFile() as file:
            file.write(whole)
            file.flush()
            yield Path(file.name)

    def save_checkpoint(self) -> None:
        """Save a state that `resume` can take up; the one before stays beside it. Rank 0 does."""
        if self.ranks.rank > 0:
            return
        best = {name: value for name, value in vars(self.best).items() if name != "state"}
        counters = Counters(
            step=self.step, total_steps=self.total_steps, best=best, losses=self._unlogged, origin=self.origin
        )
        self._checkpoints.save(self.step, lambda file: self.write_state(file, counters))

    def steps(self) -> Iterator[int]:
        """Train, log, validate and save; yield the number of steps done after each."""
        validate_steps = every_steps(self.params["validate_every"], self.steps_per_epoch)
        checkpoint_steps = every_steps(self.params["checkpoint_every"], self.steps_per_epoch)
        meter = Meter(self.step, self.total_steps)
        if self.step % validate_steps == 0 and self._out_of_patience():
            return
        self.clock.started()
        for batch in self.clock.each(self.batches(), "data"):
            if self.ranks.size == 1:
                self.workspace.raise_if_stopped()
            self._unlogged.append(self.train_step(batch))
            self.step += 1
            self.clock.steps += 1
            ends = self.step == self.total_steps
            if self.step % LOG_EVERY == 0 or self.step % self.steps_per_epoch == 0 or ends:
                self._log_losses()
            if (progress := meter.update(self.step, len(self.batch_indices(self.step - 1)))) is not None:
                self.log("progress", progress)
            validates = self.step % validate_steps == 0 or ends
            saves = self.step % checkpoint_steps == 0 or ends
            if validates or saves:
                self.share_statistics()
            if validates:
                with self.clock.part("validation"):
                    scores, losses = self.validate(), self.validation_losses()
                if scores is not None:
                    self._judge(scores, losses)
                meter.restart(self.step)
            stops_early = validates and not ends and self._agreed(self._out_of_patience())
            if saves or stops_early:
                with self.clock.part("checkpoint"):
                    self.save_checkpoint()
            yield self.step
            if stops_early:
                without = f"{self.best.stale} validations without a better {self._best_metric}"
                self.say(f"stopped early after step {self.step}: {without}")
                return

    def agree(self, losses: dict[str, float]) -> dict[str, float]:
        """Return the sums of a pass's losses over all ranks, of which each gives its share.

        Raises `Stopped` on all of them where one was asked to stop; with several ranks an engine calls it in every
        step, before it changes a weight.
        """
        if self.ranks.size == 1:
            return losses
        with self.clock.part("communication"):
            *sums, stops = self.ranks.sum([*losses.values(), float(self.workspace.stop_requested)])
        if stops:
            raise Stopped
        return dict(zip(losses, sums, strict=True))

    def _agreed(self, is_so: bool) -> bool:
        """Return what rank 0 says on all ranks."""
        return self.ranks.sum([float(is_so and self.ranks.rank == 0)])[0] > 0

    def report_times(self, bytes_per_step: int = 0) -> dict[str, float]:
        """Return where the seconds of this process went, and say it."""
        seconds = self.clock.report()
        self.say(tell(seconds, self.ranks.place, bytes_per_step))
        return {**seconds, **({"bytes_per_step": float(bytes_per_step)} if bytes_per_step else {})}

    @property
    def learning_rate_scale(self) -> float:
        """How much the batch is larger than that of ``lr_batch_size``, where it is given."""
        meant_for = self.params.get("lr_batch_size")
        return float(self.params["batch_size"] / meant_for) if meant_for else 1.0

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at its highest."""
        return float(self.params["learning_rate"] * self.learning_rate_scale)

    def learning_rate(self, step: int, total_steps: int | None = None) -> float:
        """Return the learning rate of a step, counted from 0: linear warm-up, then the schedule.

        ``total_steps`` is that of this run unless given, and the warm-up is that of a run so long.
        """
        total = total_steps or self.total_steps
        warmup = self.warmup_steps if total == self.total_steps else self._warmup_steps(total)
        peak, schedule = self.peak_learning_rate, self.params["lr_scheduler"]
        if schedule == "one_cycle":
            return peak * _one_cycle(step, total, warmup)
        if step < warmup:
            return peak * (step + 1) / warmup
        if schedule == "constant":
            return peak
        if schedule == "step":
            passed = sum(step >= epoch * self.steps_per_epoch for epoch in self.params["lr_scheduler_step"])
            return float(peak * self.params["lr_scheduler_factor"] ** passed)
        done = (step - warmup) / max(1, total - warmup)
        return peak * 0.5 * (1 + math.cos(math.pi * done))

    def batch_indices(self, step: int) -> list[int]:
        """Return the training images of a step, by their position in the data."""
        epoch, position = divmod(step, self.steps_per_epoch)
        indices: list[int] = self._order(epoch)[position].tolist()
        return indices

    def image_seed(self, step: int, index: int) -> list[int]:
        """Return a seed for ``numpy.random.default_rng``, for what happens to one image in one epoch, or one step.

        A step counts where an epoch may have an image more than once.
        """
        uniform = self.params.get("sampling", "uniform") == "uniform"
        return [self.params["seed"], step // self.steps_per_epoch if uniform else step, index]

    def step_seed(self) -> int:
        """Return a seed for what happens inside the network at this step."""
        return int(self.params["seed"] * 1_000_003 + self.step + self.ranks.rank * _RANK_SEEDS)

    def check_finite(self, losses: Mapping[str, float], indices: Sequence[int]) -> None:
        """Raise `NonFiniteLoss` naming the step, the learning rate, the batch's files and their boxes.

        Only where ``loss`` is not finite.
        """
        if not math.isfinite(losses["loss"]):
            files = [_with_boxes(self.data, index) for index in indices]
            raise NonFiniteLoss(self.step + 1, self.learning_rate(self.step), dict(losses), files)

    def tell_origin(self) -> None:
        """Say where the weights came from and which classes they know, where they came from somewhere."""
        if self.origin.kept or self.origin.new:
            kept, new = (", ".join(names) or "none" for names in (self.origin.kept, self.origin.new))
            dropped = f"; dropped {', '.join(self.origin.dropped)}" if self.origin.dropped else ""
            self.say(f"weights from {self.origin.source}: kept {kept}; fresh {new}{dropped}")
        if self.origin.skipped:
            listed = ", ".join(self.origin.skipped[:8]) + (" ..." if len(self.origin.skipped) > 8 else "")
            self.say(f"weights that did not fit and were left out: {len(self.origin.skipped)}: {listed}")

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

    @property
    def _best_metric(self) -> str:
        return str(self.params.get("best_metric", "AP"))

    def _log_losses(self) -> None:
        means = {f"train/{name}": float(np.mean([one[name] for one in self._unlogged])) for name in self._unlogged[0]}
        self.log("metric", {**means, "train/learning_rate": self.learning_rate(self.step - 1)})
        self._unlogged = []

    def _judge(self, scores: Scores, losses: Mapping[str, float]) -> None:
        """Log the validation scores and losses, and keep the weights where they are the best."""
        metrics, best = (
            _headlines("val", scores) | {validation_loss(name): value for name, value in losses.items()},
            self.best,
        )
        if self._best_metric not in scores:
            known = ", ".join(name for name in HEADLINES if name in scores)
            raise UsageError(f"best_metric={self._best_metric}: the validation has no such score; it has {known}")
        value = scores[self._best_metric]
        self.log("metric", metrics)
        if value > best.value:
            best.value, best.metrics = value, metrics
            best.score_threshold, best.state = scores.score_threshold, self.snapshot()
        tolerance = self.params.get("early_stopping_tolerance", 0.0)
        if value > best.reference + tolerance * max(0.0, best.reference):
            best.reference, best.stale = value, 0
        elif math.isfinite(value):
            best.stale += 1

    def _out_of_patience(self) -> bool:
        patience = self.params.get("early_stopping_patience")
        least = self.params.get("early_stopping_min_epochs", 0) * self.steps_per_epoch
        return patience is not None and self.best.stale >= patience and self.step >= least

    def _warmup_steps(self, total_steps: int) -> int:
        epochs, iterations = self.params["warmup_epochs"], self.params["warmup_iterations"]
        if epochs is not None:
            return round(float(epochs) * self.steps_per_epoch)
        share = ONE_CYCLE_RISE if self.params["lr_scheduler"] == "one_cycle" else 0.05
        return round(share * total_steps) if iterations == "auto" else int(iterations or 0)


def _headlines(prefix: str, scores: Scores) -> dict[str, float]:
    return {f"{prefix}/{n}": scores[n] for n in HEADLINES if n in scores and math.isfinite(scores[n])}


def _one_cycle(step: int, total_steps: int, rise_steps: int) -> float:
    """Return the share of the peak: half a cosine up to the end of the rise, and one down to the last step."""
    top, last = max(1, rise_steps - 1), total_steps - 1
    if step <= top:
        return ONE_CYCLE_START + (1 - ONE_CYCLE_START) * (1 - math.cos(math.pi * step / top)) / 2
    done = min(1.0, (step - top) / max(1, last - top))
    return ONE_CYCLE_END + (1 - ONE_CYCLE_END) * (1 + math.cos(math.pi * done)) / 2


def _with_boxes(data: Dataset, index: int) -> str:
    """Name an image and its first boxes, for an error."""
    sample = data[index]
    boxes = [f"{name} {np.round(box, 1).tolist()}" for name, box in zip(sample.names, sample.boxes, strict=True)]
    more = f" and {len(boxes) - _NAMED_BOXES} more" if len(boxes) > _NAMED_BOXES else ""
    return f"{data.image_ids[index]}: {', '.join(boxes[:_NAMED_BOXES]) or 'no boxes'}{more}"
