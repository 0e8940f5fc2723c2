"""A run of torch that is killed, damaged, made longer or trained on from: it ends as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detkit import Dataset, Predictor, Trainer, evaluate, open_run, read_dataset
from detkit.errors import RunFailed, WorkerDied
from detkit.runs import LocalRun, Run
from detkit.scores import SCORE_FLOOR, score
from detkit.shapes import write_shapes
from detkit.testing import tiny_dataset
from detkit_torchvision.weights import ARTIFACT

EPOCHS = 10
TRAINER = Trainer(
    model="torchvision/ssd_tiny",
    epochs=EPOCHS,
    image_size=64,
    batch_size=4,
    lr_scheduler="constant",
    warmup_iterations=0,
    checkpoint_every="1 iterations",
    device="cpu",
    threads=1,
)


def weights(run: Run) -> str:
    return run.model.manifest.artifacts[ARTIFACT].sha256


def scores(run: Run) -> list[dict[str, float]]:
    """Return the rows of validation."""
    return [row for row in run.history if "val/AP" in row]


def messages(run: Run) -> str:
    return "\n".join(str(event.values["message"]) for event in run.events(follow=False) if event.kind == "log")


def kill(run: Run) -> None:
    assert isinstance(run, LocalRun)
    os.kill(run.record.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        run.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lifecycle")


@pytest.fixture(scope="module")
def whole(tiny: Dataset, folder: Path) -> Run:
    """A run that nobody disturbed."""
    return TRAINER.fit(tiny, tiny, name=str(folder / "whole"), quiet=True)


@pytest.fixture(scope="module")
def cut_off(tiny: Dataset, folder: Path) -> Path:
    """The same, killed when two checkpoints were there."""
    run = TRAINER.start(tiny, tiny, name=str(folder / "cut-off"), leash=True)
    while len(list(run.workspace.checkpoints.glob("step-*"))) < 2:
        time.sleep(0.01)
    kill(run)
    return run.path


@pytest.fixture
def interrupted(cut_off: Path, tmp_path: Path) -> Run:
    return open_run(shutil.copytree(cut_off, tmp_path / "interrupted"))


def test_kill_9_at_random_moments(tiny: Dataset, whole: Run) -> None:
    rng = np.random.default_rng(0)
    run = TRAINER.start(tiny, tiny, leash=True)
    for step in sorted(rng.choice(range(1, 2 * EPOCHS - 2), 3, replace=False).tolist()):
        since = run.position
        next((event for event in run.events(since=since) if (event.step or 0) >= step), None)
        time.sleep(rng.uniform(0, 0.05))
        assert run.status == "running", "it was over before it could be killed"
        kill(run)
        run = run.resume(leash=True)
    run.wait()
    assert weights(run) == weights(whole)
    assert scores(run) == scores(whole)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut])
def test_damaged_checkpoint(damage: Any, interrupted: Run, whole: Run) -> None:
    first, last = sorted(interrupted.workspace.checkpoints.glob("step-*"))
    damage(last)
    run = Trainer().resume(interrupted, quiet=True)
    told = messages(run)
    assert f"the checkpoint of step {int(last.name.split('-')[1])} is damaged" in told
    assert f"resumed after step {int(first.name.split('-')[1])} of {2 * EPOCHS}" in told
    assert weights(run) == weights(whole)


def test_no_checkpoint_is_whole(interrupted: Run) -> None:
    for file in interrupted.workspace.checkpoints.glob("step-*"):
        cut(file)
    with pytest.raises(RunFailed, match=r"no checkpoint in .* is whole, so this run cannot go on; train anew"):
        Trainer().resume(interrupted, quiet=True)


def test_other_number_of_workers(interrupted: Run, whole: Run) -> None:
    assert whole.job.options["num_workers"] == "auto"
    run = Trainer().resume(interrupted, num_workers=2, quiet=True)
    assert run.model.manifest.options["num_workers"] == 2
    assert weights(run) == weights(whole)
    assert scores(run) == scores(whole)


def test_two_epochs_and_the_rest_are_all(tiny: Dataset, whole: Run) -> None:
    short = TRAINER.fit(tiny, tiny, epochs=2, name="short", quiet=True)
    longer = Trainer().resume(short, epochs=EPOCHS, name="longer", quiet=True)
    assert weights(longer) == weights(whole) != weights(short)
    assert longer.model.manifest.metrics == whole.model.manifest.metrics
    assert scores(longer) == [row for row in scores(whole) if row["step"] > 4]
    assert scores(longer)
    assert "run longer goes on from short" in messages(longer).replace("runs/", "")
    assert longer.model.manifest.continued_from is not None
    assert longer.model.manifest.continued_from.step == 4


def test_longer_schedule_is_told(tiny: Dataset) -> None:
    short = TRAINER.fit(tiny, tiny, epochs=1, lr_scheduler="cosine", quiet=True)
    longer = Trainer().resume(short, epochs=2, quiet=True)
    assert "the cosine schedule spans 4 steps instead of 2: the learning rate goes on at" in messages(longer)


def test_forgetting_and_replay(tiny: Dataset, tmp_path: Path, whole: Run) -> None:
    """The parent is opened and scored by its own engine; a new class gets outputs of its own."""
    new = tiny_dataset(tmp_path / "new", num_images=6, classes=("star", "disc"), seed=1)
    run = TRAINER.fit(new.take([0, 1]), new.take([2, 3, 4, 5]), epochs=1, weights=whole, replay="parent", quiet=True)
    assert run.job.classes == ["star", "disc", "square"]
    assert run.job.replayed is not None
    assert (run.job.replayed.source, run.job.replayed.images) == ("whole", 1)
    found = run.forgetting
    assert found is not None, messages(run)
    assert found.data == "validation images of this run that have a class of whole"
    assert (found.classes["square"].objects, found.classes["square"].before) == (0, None)
    assert found.overall.before == run.metrics["forgetting/AP_before"]
    with Predictor(whole, score_threshold=SCORE_FLOOR) as predictor:
        data = run.workspace.dataset("retention")
        assert data is not None
        before = score(data, list(predictor.predict(data)), score_floor=SCORE_FLOOR)
    assert found.classes["disc"].before == pytest.approx(before.per_class["disc"]["AP"], abs=1e-6)


@pytest.mark.slow
def test_one_epoch_from_a_model_beats_one_from_scratch(tmp_path: Path) -> None:
    """AWS's incremental training: new images arrive, and one more epoch does what one epoch alone cannot."""
    data = read_dataset(write_shapes(tmp_path / "shapes", num_images=240, size=64))
    first, later, test = data.split(0.6, 0.2, 0.2, seed=0)
    trainer = Trainer(model="torchvision/fcos_tiny", image_size=64, device="cpu")
    parent = trainer.fit(first, name="parent", epochs=12, validate_every="12 epochs", quiet=True)
    child = trainer.fit(later, test, name="child", epochs=1, weights=parent, quiet=True)
    scratch = trainer.fit(later, test, name="scratch", epochs=1, quiet=True)
    found = [evaluate(run, test, allow_seen=True)["AP50"] for run in (child, scratch)]
    assert found[0] > found[1] + 0.05, found
