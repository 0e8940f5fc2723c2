"""The loop that engines share: order, learning rate, what is kept, when it stops, and that a resume changes nothing."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detkit.detections import Detections
from detkit.errors import NonFiniteLoss, UsageError
from detkit.events import Event
from detkit.job import Continued, Job, Workspace
from detkit.loading import load_ahead
from detkit.loop import Counters, TrainingLoop
from detkit.sampling import class_balanced_shares, epoch_order
from detkit.scores import Scores, score
from detkit.testing import tiny_dataset

DEFAULTS: dict[str, Any] = {
    "epochs": 6,
    "iterations": None,
    "batch_size": 3,
    "learning_rate": 0.1,
    "lr_scheduler": "cosine",
    "lr_scheduler_step": (),
    "lr_scheduler_factor": 0.1,
    "warmup_epochs": None,
    "warmup_iterations": 0,
    "validate_every": "1 epoch",
    "checkpoint_every": "1 epoch",
    "seed": 5,
}


class Walk(TrainingLoop[list[int]]):
    """Learns nothing, but takes real steps: its weight is the sum of what it saw, its scores are given."""

    def __init__(self, job: Job, workspace: Workspace, shares: list[float] | None = None) -> None:
        super().__init__(job, workspace)
        self.weight, self.shares = 0.0, shares
        self.losses: dict[int, float] = {}

    def batches(self) -> Iterator[list[int]]:
        return load_ahead(self.batch_indices, range(self.step, self.total_steps), num_workers=2)

    def train_step(self, batch: list[int]) -> dict[str, float]:
        noise = sum(float(np.random.default_rng(self.image_seed(self.step, index)).random()) for index in batch)
        losses = {"loss": self.losses.get(self.step, noise)}
        self.check_finite(losses, batch)
        self.weight += self.learning_rate(self.step) * noise
        return losses

    def validate(self) -> Scores | None:
        """Find the given share of the boxes."""
        if self.shares is None:
            return None
        share = self.shares[self.step // self.steps_per_epoch - 1]
        found = []
        for number, sample in enumerate(self.data):
            kept = len(sample.boxes) if number < share * len(self.data) else 0
            labels = np.array([self.data.classes.index(name) for name in sample.names[:kept]], dtype=np.int64)
            found.append(
                Detections(
                    path=sample.path,
                    width=sample.width,
                    height=sample.height,
                    classes=self.data.classes,
                    boxes=np.array(sample.boxes[:kept]),
                    labels=labels,
                    scores=np.full(kept, 0.75),
                )
            )
        return score(self.data, found)

    def snapshot(self) -> float:
        return self.weight

    def workspace_events(self) -> list[Event]:
        lines = self.workspace.metrics_file.read_bytes().splitlines()
        return [msgspec.json.decode(line, type=Event) for line in lines]

    def write_state(self, file: IO[bytes], counters: Counters) -> None:
        file.write(msgspec.json.encode([counters, self.weight, self.best.state]))

    def read_state(self, file: Path) -> tuple[Counters, Any]:
        counters, self.weight, state = msgspec.json.decode(file.read_bytes(), type=tuple[Counters, float, Any])
        return counters, state


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Return a function that lays out a run of eight images and returns its loop."""
    data = tiny_dataset(tmp_path / "images")
    numbers = iter(range(100))

    def make(
        shares: list[float] | None = None, after: Walk | None = None, continued: int | None = None, **params: Any
    ) -> Walk:
        origin = None if continued is None else Continued(run="first", manifest="", step=continued)
        job = Job(backend="walk", engine="tests:Walk", model="walk", params={**DEFAULTS, **params}, options={},
                  classes=list(data.classes), continued_from=origin)  # fmt: skip
        workspace = Workspace(tmp_path / f"run{next(numbers)}")
        workspace.create(job)
        workspace.write_dataset("train", data, [""] * len(data))
        if after is not None:
            shutil.copytree(after.workspace.checkpoints, workspace.checkpoints, dirs_exist_ok=True)
        loop = Walk(job, workspace, shares)
        if loop.resumes:
            loop.resume()
        return loop

    return make


def run(loop: Walk) -> Walk:
    for _ in loop.steps():
        pass
    return loop


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_every_image_once_an_epoch(num_images: int, batch_size: int, epoch: int) -> None:
    batches = epoch_order(num_images, batch_size, seed=0, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(num_images))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert len(batches) == 1 or 2 <= len(batches[-1]) <= batch_size + 1 or batch_size == 1


def test_order_changes_with_seed_and_epoch() -> None:
    orders = {tuple(np.concatenate(epoch_order(30, 4, *key)).tolist()) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    assert len(orders) == 4


def test_schedules(make: Any) -> None:
    cosine = make(warmup_iterations=2)
    rates = [cosine.learning_rate(step) for step in range(cosine.total_steps)]
    assert (len(rates), cosine.steps_per_epoch) == (18, 3)
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.05 * (1 + np.cos(np.pi * 15 / 16)))
    steps = make(lr_scheduler="step", lr_scheduler_step=(1, 3))
    assert [steps.learning_rate(step) for step in (0, 2, 3, 8, 9, 17)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3]
    )
    constant = make(lr_scheduler="constant", warmup_epochs=1.0)
    assert [constant.learning_rate(step) for step in (0, 1, 2, 17)] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.1])
    assert make(epochs=None, iterations=40, warmup_iterations="auto").warmup_steps == 2


def test_one_cycle_rises_and_falls(make: Any) -> None:
    loop = make(lr_scheduler="one_cycle", warmup_iterations="auto", epochs=10)
    rates = [loop.learning_rate(step) for step in range(loop.total_steps)]
    assert (loop.total_steps, loop.warmup_steps) == (30, 9)
    assert rates[0] == pytest.approx(0.1 / 25)
    assert rates.index(max(rates)) == 8
    assert max(rates) == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.1 / 25e4)
    assert rates == sorted(rates[:9]) + sorted(rates[9:], reverse=True)
    shorter = make(lr_scheduler="one_cycle", warmup_epochs=1.0, epochs=10)
    assert [shorter.learning_rate(step) for step in (2, 3)] == pytest.approx([0.1, 0.1], rel=0.01)


def test_linear_scaling(make: Any) -> None:
    """The peak belongs to a batch of ``lr_batch_size`` images; the shape of the schedule is the same."""
    plain, scaled = make(warmup_iterations=2), make(warmup_iterations=2, lr_batch_size=12)
    assert scaled.peak_learning_rate == pytest.approx(0.1 * 3 / 12)
    for step in range(plain.total_steps):
        assert scaled.learning_rate(step) == pytest.approx(plain.learning_rate(step) / 4)


def test_class_balanced_epochs(tmp_path: Path) -> None:
    """Every epoch has as many images as there are, a rare class's as often as its share says, rounded."""
    data = tiny_dataset(tmp_path)
    shares = class_balanced_shares(data)
    assert shares.sum() == pytest.approx(len(data))
    images = {name: {s.image_id for s in data if name in s.names} for name in data.classes}
    often = max(map(len, images.values()))
    for sample, share in zip(data, shares / shares.min(), strict=True):
        expected = max([1.0, *(np.sqrt(often / len(images[name])) for name in sample.names)])
        assert share == pytest.approx(expected)
    drawn = np.zeros(len(data))
    for epoch in range(200):
        order = np.concatenate(epoch_order(len(data), 3, 0, epoch, shares))
        counts = np.bincount(order, minlength=len(data))
        assert len(order) == len(data)
        assert (np.abs(counts - shares) < 1).all()
        drawn += counts
    assert drawn / 200 == pytest.approx(shares, abs=0.1)


def test_a_balanced_run_changes_an_image_anew_each_time(make: Any) -> None:
    loop = make(sampling="class_balanced")
    assert loop.image_seed(0, 3) != loop.image_seed(1, 3)
    uniform = make()
    assert uniform.image_seed(0, 3) == uniform.image_seed(1, 3) != uniform.image_seed(3, 3)


def test_another_number_of_epochs_goes_on_from_the_checkpoint(make: Any) -> None:
    """It says what becomes of the schedule, and patience begins anew."""
    shares = [0.5, 0.4, 0.4, 0.4, 0.4, 0.9]
    short = run(make(shares=shares, epochs=4, early_stopping_patience=2))
    assert short.step == 9
    assert short.best.stale == 2
    longer = make(shares=shares, after=short, early_stopping_patience=2)
    assert longer.best.stale == 0
    told = [event.values["message"] for event in longer.workspace_events() if event.kind == "log"]
    assert told[-1].startswith("the cosine schedule spans 18 steps instead of 12: the learning rate goes on at 0.05")
    assert run(longer).step == 15


def test_a_run_that_goes_on_after_early_stopping_has_its_patience_anew(make: Any) -> None:
    """It may get no more steps than the first was given, as that one did not use them."""
    shares, patience = [0.5, 0.4, 0.4, 0.4, 0.4, 0.9], {"early_stopping_patience": 2}
    short = run(make(shares=shares, **patience))
    assert (short.step, short.total_steps) == (9, 18)
    longer = run(make(shares=shares, after=short, continued=9, **patience))
    assert longer.step == 15
    assert run(make(shares=shares, after=longer, continued=9, **patience)).step == 15, "resumed, it has stopped already"


def test_the_learning_rate_that_was_had_the_warm_up_of_its_own_length(make: Any) -> None:
    short = run(make(epochs=2, warmup_iterations="auto", lr_scheduler="constant"))
    longer = make(epochs=60, after=short, warmup_iterations="auto", lr_scheduler="constant")
    told = [event.values["message"] for event in longer.workspace_events() if event.kind == "log"]
    assert longer.warmup_steps == 9
    assert told[-1].endswith("the learning rate goes on at 0.0778, it was 0.1")


def test_validation_losses_stand_beside_the_scores(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make(shares=[0.5] * 6)
    monkeypatch.setattr(loop, "validation_losses", lambda: {"loss": 2.0, "loss_rpn": 0.5, "classification": 1.5})
    run(loop)
    [row, *_] = [event.values for event in loop.workspace_events() if "val/AP" in event.values]
    assert (row["val/loss"], row["val/loss_rpn"], row["val/loss_classification"]) == (2.0, 0.5, 1.5)
    assert loop.best.metrics["val/loss"] == 2.0


def test_judged_by_another_score(make: Any) -> None:
    loop = run(make(shares=[0.2, 0.9, 0.5, 0.5, 0.5, 0.5], best_metric="AP50"))
    rows = [event.values["val/AP50"] for event in loop.workspace_events() if "val/AP50" in event.values]
    assert loop.best.value == max(rows)
    with pytest.raises(
        UsageError, match="best_metric=mask_AP: the validation has no such score; it has AP, AP50, AP75"
    ):
        run(make(shares=[0.2] * 6, best_metric="mask_AP"))


def test_the_best_weights_are_kept(make: Any) -> None:
    loop = run(make(shares=[0.2, 0.5, 0.9, 0.4, 0.9, 0.1]))
    rows = [event for event in loop.workspace_events() if "val/AP" in event.values]
    assert len(rows) == 6
    assert loop.best.value == max(row.values["val/AP"] for row in rows)
    assert 0 < loop.best.score_threshold <= 0.75
    at_third = make(shares=[0.2, 0.5, 0.9, 0.4, 0.9, 0.1])
    for step in at_third.steps():
        if step == 9:
            break
    assert loop.best.state == at_third.weight, "the first of two that are equally good"
    assert loop.final_metrics(None) == loop.best.metrics


def test_a_resumed_run_ends_like_an_uninterrupted_one(make: Any) -> None:
    shares = [0.2, 0.9, 0.5, 0.5, 0.5, 0.5]
    often = {"checkpoint_every": "2 iterations"}
    whole = run(make(shares=shares, **often))
    cut = make(shares=shares, **often)
    for step in cut.steps():
        if step == 11:  # one step after the checkpoint, which is one step after a mean was logged
            break
    again = make(shares=shares, after=cut, **often)
    assert again.step == 10
    run(again)
    assert (again.weight, again.best) == (whole.weight, whole.best)
    means = [
        [event.values["train/loss"] for event in loop.workspace_events() if "train/loss" in event.values]
        for loop in (whole, again)
    ]
    assert means[0][-len(means[1]) :] == means[1], "what was logged after the checkpoint, its first mean included"


@pytest.mark.parametrize(
    ("shares", "params", "last_epoch"),
    [
        ([0.5, 0.4, 0.4, 0.9, 0.9, 0.9], {"early_stopping_patience": 2}, 3),
        ([0.5, 0.4, 0.4, 0.9, 0.9, 0.9], {"early_stopping_patience": 3}, 6),
        ([0.5, 0.4, 0.4, 0.4, 0.4, 0.9], {"early_stopping_patience": 2, "early_stopping_min_epochs": 5}, 5),
        ([0.5, 0.63, 0.63, 0.63, 0.63, 0.63], {"early_stopping_patience": 2, "early_stopping_tolerance": 0.9}, 3),
        ([0.5, 0.4, 0.4, 0.4, 0.4, 0.4], {}, 6),
        (None, {"early_stopping_patience": 1}, 6),
    ],
)
def test_early_stopping(make: Any, shares: list[float] | None, params: dict[str, Any], last_epoch: int) -> None:
    loop = run(make(shares=shares, **params))
    assert loop.step == last_epoch * loop.steps_per_epoch
    told = [event.values["message"] for event in loop.workspace_events() if event.kind == "log"]
    assert any("stopped early" in message for message in told) == (last_epoch < 6)
    again = make(shares=shares, after=loop, **params)
    assert again.step == loop.step, "the checkpoint is of the last step"
    assert run(again).step == loop.step, "a run that was killed after its last step does not go on"


def test_a_loss_that_is_not_finite_stops_the_step(make: Any) -> None:
    loop = make()
    loop.losses[4] = float("nan")
    with pytest.raises(NonFiniteLoss, match="iteration 5") as caught:
        run(loop)
    assert loop.step == 4
    for index in loop.batch_indices(4):
        first = loop.data[index]
        box = f" {first.names[0]} {np.round(first.boxes[0], 1).tolist()}" if len(first.names) else " no boxes"
        assert f"\n  {first.image_id}:{box}" in str(caught.value)


def test_loading_ahead_keeps_order_and_stays_ahead() -> None:
    started: list[int] = []
    lock = threading.Lock()

    def load(step: int) -> int:
        with lock:
            started.append(step)
        return step * step

    loaded = load_ahead(load, range(3, 40), num_workers=3)
    assert next(loaded) == 9
    assert len(started) >= 2
    assert list(loaded) == [step * step for step in range(4, 40)]
    assert sorted(started) == list(range(3, 40))
    assert list(load_ahead(load, range(4), num_workers=0)) == [0, 1, 4, 9]


def test_loading_ahead_raises_where_the_item_is_due() -> None:
    def load(step: int) -> int:
        return 1 // (5 - step)

    loaded = load_ahead(load, range(10), num_workers=2)
    assert [next(loaded) for _ in range(5)] == [0, 0, 0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(loaded)
