"""Following a run: what is shown, and what trackers are told, however it ends."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from detkit import Dataset, Trainer, open_run, plugins
from detkit.errors import RunFailed, WorkerDied
from detkit.events import Event
from detkit.hookspecs import hookimpl
from detkit.job import Job, Workspace
from detkit.live import follow
from detkit.runs import LocalRun, Run

pytestmark = pytest.mark.usefixtures("clean")


class Tracker:
    """Keeps what it is told; ``at_first_metric`` is done when the first numbers come."""

    def __init__(self) -> None:
        self.seen: list[Event] = []
        self.at_first_metric = lambda run: None

    @hookimpl
    def detkit_on_event(self, event: Event, run: Run) -> None:
        is_first = event.kind == "metric" and not any(one.kind == "metric" for one in self.seen)
        self.seen.append(event)
        if is_first:
            self.at_first_metric(run)

    @property
    def states(self) -> list[object]:
        return [event.values["state"] for event in self.seen if event.kind == "state"]


@pytest.fixture
def tracker() -> Iterator[Tracker]:
    plugins.registry.cache_clear()
    tracker = Tracker()
    plugins.registry().manager.register(tracker, name="guest")
    yield tracker
    plugins.registry.cache_clear()


def test_trackers_hear_of_a_failure(tracker: Tracker, tiny: Dataset) -> None:
    with pytest.raises(RunFailed, match="cuda:9"):
        Trainer(model="echo/memory", epochs=1, device="cuda:9").fit(tiny, tiny, quiet=True)
    assert tracker.states == ["starting", "running", "failed"]


def test_trackers_hear_of_a_worker_that_vanished(tracker: Tracker, tiny: Dataset) -> None:
    def kill(run: Run) -> None:
        assert isinstance(run, LocalRun)
        os.kill(run.record.pid, signal.SIGKILL)

    tracker.at_first_metric = kill
    with pytest.raises(WorkerDied, match="SIGKILL"):
        Trainer(model="echo/memory", epochs=1000, seconds_per_step=0.02).fit(tiny, tiny, quiet=True)
    assert tracker.states == ["starting", "running", "interrupted"]


def test_trackers_hear_of_all_until_ctrl_c_has_stopped_the_run(
    tracker: Tracker, tiny: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker.at_first_metric = lambda run: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Trainer(model="echo/memory", epochs=1000, seconds_per_step=0.02, name="r").fit(tiny, tiny)
    run = open_run("r")
    assert run.status == "stopped"
    assert tracker.seen == list(run.events(follow=False))
    assert tracker.states[-1] == "stopped"
    assert "stopping after this step" in capsys.readouterr().err


def test_ctrl_c_leaves_a_run_that_is_only_watched(tracker: Tracker, tiny: Dataset) -> None:
    tracker.at_first_metric = lambda run: signal.raise_signal(signal.SIGINT)
    run = Trainer(model="echo/memory", epochs=1000, seconds_per_step=0.02).start(tiny, tiny, leash=True)
    with pytest.raises(KeyboardInterrupt):
        follow(run, quiet=True)
    assert (run.status, tracker.states) == ("running", ["starting", "running"])
    run.stop()


def test_trackers_hear_of_an_end_that_nobody_wrote_down(tracker: Tracker, tiny: Dataset) -> None:
    """A worker that is killed once the model is there, before it could say that it has finished."""
    run = Trainer(model="echo/memory", epochs=1).start(tiny, tiny, leash=True).wait()
    *before, last = run.workspace.metrics_file.read_bytes().splitlines(keepends=True)
    assert b"finished" in last
    run.workspace.metrics_file.write_bytes(b"".join(before))
    assert follow(run, quiet=True).status == "finished"
    assert tracker.states == ["starting", "running", "finished"]


def test_best_validation_is_marked(tiny: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    run = Trainer(model="echo/memory", epochs=8).fit(tiny, tiny)
    lines = [line for line in capsys.readouterr().err.splitlines() if "val/AP " in line]
    values = [row["val/AP"] for row in run.history if "val/AP" in row]
    expected = [value > max([-1.0, *values[:i]]) for i, value in enumerate(values)]
    assert [line.endswith("(best so far)") for line in lines] == expected
    assert True in expected and False in expected, values


def test_resumed_run_knows_what_was_best(tiny: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    run = Trainer(model="echo/memory", epochs=8, seconds_per_step=0.05).start(tiny, tiny, leash=True)
    next(event for event in run.events() if event.values.get("val/AP", 0) == 1)
    run.stop()
    Trainer().resume(run)
    lines = [line for line in capsys.readouterr().err.splitlines() if "val/AP " in line]
    assert lines and not any("best so far" in line for line in lines)


WORKER = """
import sys, time
from detkit.job import Workspace
workspace = Workspace(sys.argv[1])
def metric(step, **values):
    named = {name.replace("_", "/", 1): value for name, value in values.items()}
    workspace.log("metric", named, step=step, epoch=step / 10)
metric(10, train_loss=2.5, train_learning_rate=0.003)
metric(10, val_loss=2.25, val_loss_classification=0.75, val_AP=0.4)
metric(20, train_loss=1.5, train_learning_rate=0.00125)
metric(20, val_loss=1.75, val_loss_classification=0.5, val_AP=0.3)
workspace.log("progress", {"total_steps": 40, "images_per_s": 12.25}, step=20)
time.sleep(0.5)
"""


def watched(folder: Path) -> LocalRun:
    workspace = Workspace(folder)
    workspace.create(Job(backend="echo", engine="-", model="memory", params={}, options={}, classes=[]))
    return LocalRun.start(workspace, [sys.executable, "-c", WORKER, str(folder)], leash=False, restart=None)


def test_validation_losses_and_learning_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerDied):
        follow(watched(tmp_path / "r"))
    shown = capsys.readouterr().err
    assert "epoch 1  loss 2.500  val/loss 2.250  val/AP 0.400  (best so far)\n" in shown
    assert "epoch 2  loss 1.500  val/loss 1.750  val/AP 0.300\n" in shown
    assert "step 20/40  loss 1.500  val loss 1.750  AP 0.300 (best 0.400)  lr 0.0013  12.2 images/s" in shown


def test_line_in_a_terminal(tmp_path: Path) -> None:
    run = watched(tmp_path / "r")
    controller, terminal = pty.openpty()
    words = [sys.executable, "-m", "detkit.cli", "runs", "attach", str(tmp_path / "r")]
    environment = {**os.environ, "COLUMNS": "140", "TERM": "xterm", "NO_COLOR": "1"}
    with subprocess.Popen(words, stdout=terminal, stderr=terminal, env=environment):
        os.close(terminal)
        shown = b""
        while True:
            try:
                shown += os.read(controller, 4096)
            except OSError:  # nobody has the other end any more
                break
    os.close(controller)
    with pytest.raises(WorkerDied):
        run.wait()
    assert b"loss 1.500  val loss 1.750  AP 0.300 (best 0.400)  lr 0.0013  12.2 images/s" in shown
