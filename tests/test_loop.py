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
from detkit.errors import NonFiniteLoss
from detkit.job import Event, Job, Workspace
from detkit.loop import Counters, TrainingLoop, epoch_order, load_ahead
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

    def make(shares: list[float] | None = None, after: Walk | None = None, **params: Any) -> Walk:
        job = Job(backend="walk", engine="tests:Walk", model="walk", params={**DEFAULTS, **params}, options={},
                  classes=list(data.classes))  # fmt: skip
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
    whole = run(make(shares=shares))
    cut = make(shares=shares)
    for step in cut.steps():
        if step == 10:  # one step after the checkpoint of the third epoch
            break
    again = make(shares=shares, after=cut)
    assert again.step == 9
    run(again)
    assert (again.weight, again.best) == (whole.weight, whole.best)


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
    assert all(loop.data.image_ids[index] in str(caught.value) for index in loop.batch_indices(4))


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
