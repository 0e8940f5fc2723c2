"""The life of a run: started, followed, stopped, killed, resumed, found again. The echo backend does the work."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

import detkit
from detkit import Dataset, Detections, Predictor, Trainer, open_run
from detkit.errors import RunExists, RunFailed, StorageError, UnknownName, UsageError, WorkerDied
from detkit.events import Event
from detkit.files import write_json
from detkit.job import Job, Workspace
from detkit.processes import HELD_CODE
from detkit.runs import LocalRun, Run

pytestmark = pytest.mark.usefixtures("clean")

CONTROLLER = """
import sys
from pathlib import Path
from detkit import Trainer
from detkit.testing import tiny_dataset

how, folder, epochs, pause = sys.argv[1:]
data = tiny_dataset(Path(folder) / "images")
settings = {"epochs": int(epochs), "seconds_per_step": float(pause)}
trainer = Trainer(model="echo/memory", name=str(Path(folder) / "run"), **settings)
if how == "fit":
    trainer.fit(data, data)
else:
    run = trainer.start(data, data)
    print(run.path)
"""


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start another Python that trains; it and its worker are gone after the test."""
    started: list[subprocess.Popen[str]] = []

    def start(how: str, epochs: int = 1000, pause_s: float = 0.02) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CONTROLLER, how, str(tmp_path), str(epochs), str(pause_s)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
    if (tmp_path / "run/run.json").exists():
        open_run(tmp_path / "run").stop(timeout_s=1)


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def started(folder: Path, epochs: float = 1.0) -> LocalRun:
    """Wait for the run of another process to have trained that long, and attach to it."""
    until((folder / "run/run.json").exists)
    run = open_run(folder / "run")
    assert isinstance(run, LocalRun)
    until(lambda: any((event.epoch or 0) > epochs for event in run.events(follow=False)))
    return run


def losses(run: Run) -> list[tuple[float, float]]:
    return [(row["step"], row["train/loss"]) for row in run.history if "train/loss" in row]


def test_kill_9_of_the_controller_leaves_no_worker(
    control: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    controller = control("fit")
    run = started(tmp_path)
    worker = psutil.Process(run.record.pid)
    assert run.status == "running"
    controller.kill()
    psutil.wait_procs([worker], timeout=15)
    assert not worker.is_running()
    assert run.status == "stopped"
    assert any(run.workspace.checkpoints.glob("step-*"))


def test_kill_9_of_the_worker_gives_reason_and_log(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # a worker that prints much
    run = Trainer(model="echo/memory", epochs=1000, seconds_per_step=0.02).start(tiny, tiny, leash=True)
    assert isinstance(run, LocalRun)
    next(event for event in run.events() if event.kind == "metric")
    os.kill(run.record.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"ended by SIGKILL.*memory runs out") as caught:
        run.wait()
    assert "import time:" in caught.value.log_tail
    assert caught.value.log_tail in str(caught.value)
    assert str(run.workspace.log_file) in str(caught.value)
    assert run.status == "interrupted"
    with pytest.raises(UsageError, match="is interrupted and has no model"):
        _ = run.model


def test_attached_to_a_killed_run(tiny: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=1000, seconds_per_step=0.02, name="r").start(tiny, tiny)
    assert isinstance(run, LocalRun)
    next(event for event in run.events() if event.kind == "metric")
    os.kill(run.record.pid, signal.SIGKILL)
    until(lambda: run.status == "interrupted")
    with pytest.raises(WorkerDied, match="vanished"):
        open_run("r").wait()


def test_ctrl_c_keeps_the_checkpoint_and_resume_ends_alike(
    control: Callable[..., subprocess.Popen[str]], tmp_path: Path, tiny: Dataset
) -> None:
    controller = control("fit", epochs=4)
    run = started(tmp_path)
    controller.send_signal(signal.SIGINT)
    _, told = controller.communicate(timeout=30)
    assert controller.returncode != 0
    assert "KeyboardInterrupt" in told
    assert run.status == "stopped"
    assert any(run.workspace.checkpoints.glob("step-*"))
    resumed = Trainer().resume(run.path, quiet=True)
    whole = Trainer(model="echo/memory", epochs=4).fit(tiny, tiny, quiet=True)
    assert resumed.status == "finished"
    assert losses(resumed) == losses(whole)
    assert resumed.metrics == whole.metrics
    with pytest.raises(UsageError, match="is finished; only an interrupted"):
        resumed.resume()


def test_kill_before_the_first_checkpoint(tiny: Dataset) -> None:
    """Steps that run twice appear once in the history."""
    run = Trainer(model="echo/memory", epochs=2, seconds_per_step=0.05).start(tiny, tiny, leash=True)
    assert isinstance(run, LocalRun)
    next(event for event in run.events() if event.kind == "state")
    os.kill(run.record.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        run.wait()
    resumed = run.resume(leash=True).wait()
    whole = Trainer(model="echo/memory", epochs=2).fit(tiny, tiny, quiet=True)
    assert losses(resumed) == losses(whole)


LONG = Trainer(model="echo/memory", epochs=1000, seconds_per_step=0.02)


@pytest.fixture
def stopped(tiny: Dataset) -> Iterator[LocalRun]:
    """A run that was stopped by the handle that started it; nothing of it runs after the test."""
    run = LONG.start(tiny, tiny, name="r")
    assert isinstance(run, LocalRun)
    next(event for event in run.events() if event.kind == "metric")
    run.stop()
    yield run
    run.stop(timeout_s=5)


def test_a_handle_resumes_once(stopped: LocalRun) -> None:
    """Whoever started a run sees what becomes of it, though its own process has ended."""
    first = stopped.resume()
    with pytest.raises(UsageError, match="is running; only an interrupted"):
        stopped.resume()
    assert stopped.status == first.status == "running"
    assert stopped.record.pid == first.record.pid
    first.stop()
    assert stopped.status == "stopped"
    assert stopped.wait() is stopped


def test_of_two_who_resume_at_once_one_does(stopped: LocalRun) -> None:
    outcomes: list[object] = []

    def resume(run: Run) -> None:
        try:
            outcomes.append(run.resume())
        except UsageError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=resume, args=(open_run("r"),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert len(refused) == 2
    assert all("is running" in outcome for outcome in refused)
    [run] = [outcome for outcome in outcomes if isinstance(outcome, LocalRun)]
    run.stop()


def test_a_second_worker_leaves_the_run_as_it_is(stopped: LocalRun) -> None:
    run = stopped.resume()
    next(event for event in run.events(since=run.position) if event.kind == "metric")
    second = subprocess.run(
        [sys.executable, "-m", "detkit.worker", str(run.path)], capture_output=True, text=True, check=False
    )
    assert second.returncode == HELD_CODE
    assert f"another worker is at work in {run.path}" in second.stderr
    assert run.status == "running"
    assert not run.workspace.failure_file.exists()
    run.stop()


def test_a_worker_started_by_hand_is_not_joined_by_another(stopped: LocalRun) -> None:
    began = stopped.position
    worker = subprocess.Popen([sys.executable, "-m", "detkit.worker", str(stopped.path)], stderr=subprocess.DEVNULL)
    try:
        until(lambda: any(event.kind == "metric" for event in stopped.events(follow=False, since=began)))
        with pytest.raises(UsageError, match="a worker that detkit did not start is at work in"):
            stopped.resume()
    finally:
        worker.kill()
        worker.wait()
    run = stopped.resume()
    assert run.status == "running", "the lock went with the one who held it"
    run.stop()


def test_history_holds_a_repeated_step_once(tmp_path: Path) -> None:
    workspace = laid_out(tmp_path / "run")

    def log(*steps: int) -> None:
        workspace.log("state", {"state": "running"})
        for step in steps:
            workspace.log("metric", {"train/loss": 1 / step}, step=step)

    log(1, 2, 3, 4)
    log(3, 4, 5)
    log(1, 2)
    assert [row["step"] for row in LocalRun(workspace).history] == [1, 2]
    log(3)
    assert [row["step"] for row in LocalRun(workspace).history] == [1, 2, 3]


def test_used_directory_is_refused(tiny: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(model="echo/memory", epochs=1, name="mine")
    run = trainer.fit(tiny, tiny, quiet=True)
    before = (run.path / "input/data/job/job.json").read_bytes()
    with pytest.raises(RunExists, match=r"runs/mine already holds a finished run; choose another name"):
        trainer.fit(tiny, tiny, epochs=2, quiet=True)
    assert (run.path / "input/data/job/job.json").read_bytes() == before
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs/other/precious.txt").write_text("mine")
    with pytest.raises(RunExists):
        trainer.fit(tiny, tiny, name="other", quiet=True)
    assert [path.name for path in (tmp_path / "runs/other").iterdir()] == ["precious.txt"]


LAID_OUT = """
import sys
from detkit.catalog import create_run
from detkit.job import Job

job = Job(backend="echo", engine="", model="memory", params={}, options={}, classes=[], versions={})
print("ready", flush=True)
sys.stdin.readline()
print(*(create_run(job).path.name for _ in range(20)))
"""


def test_runs_without_a_name_that_begin_at_once_have_numbers_of_their_own(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAID_OUT]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    names = [name for process in started for name in process.communicate("go\n", timeout=60)[0].split()]
    assert len(names) == len(set(names)) == 60
    assert len(list((tmp_path / "runs").iterdir())) == 60


def test_names_are_counted_up(tiny: Dataset) -> None:
    trainer = Trainer(model="echo/memory", epochs=1)
    names = [trainer.fit(tiny, tiny, quiet=True).name for _ in range(2)]
    today = time.strftime("%Y%m%d")
    assert names == [f"{today}-memory-1", f"{today}-memory-2"] or names[0].split("-")[0] != today  # at midnight


def test_detached_run_survives_its_controller(control: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    controller = control("start", epochs=4, pause_s=0.05)
    out, _ = controller.communicate(timeout=30)
    run = open_run(out.strip())
    assert run.status == "running"
    states = [event.values["state"] for event in run.events() if event.kind == "state"]
    assert states == ["starting", "running", "finished"]
    assert run.wait().metrics["val/AP50"] > 0


def test_last_and_best(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="there is no run in runs"):
        open_run("last")
    with pytest.raises(UsageError, match="has a val/AP"):
        open_run("best")
    monkeypatch.setenv("DETKIT_RUNS", str(tmp_path / "elsewhere"))
    good = Trainer(model="echo/memory", epochs=8).fit(tiny, tiny, name="good", quiet=True)
    poor = Trainer(model="echo/memory", iterations=1).fit(tiny, tiny, name="poor", quiet=True)
    assert good.path == tmp_path / "elsewhere/good"
    assert open_run("last").path == poor.path
    assert open_run("best").path == good.path
    assert open_run(good.path).path == open_run("good").path == good.path
    with pytest.raises(UnknownName, match="did you mean 'good'"):
        open_run("goood")
    with pytest.raises(UsageError, match="holds no run"):
        open_run(tmp_path)


def test_runs_of_a_backend_that_is_gone(tiny: Dataset) -> None:
    """They stay in the list, and the others can be found beside them."""
    run = Trainer(model="echo/memory", epochs=1).fit(tiny, tiny, name="old", quiet=True)
    record = msgspec.json.decode((run.path / "run.json").read_bytes())
    write_json(run.path / "run.json", {**record, "backend": "gone"})
    assert open_run("last").metrics == run.metrics
    assert open_run("old").status == "finished"


def test_damaged_run_file(tiny: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=1).fit(tiny, tiny, name="old", quiet=True)
    (run.path / "run.json").write_text("{")
    with pytest.raises(UsageError, match=r"runs/old/run\.json was written by another version of detkit, or is damaged"):
        open_run("old")


def test_job_of_another_version(tiny: Dataset) -> None:
    for name in ("good", "other"):
        Trainer(model="echo/memory", epochs=1).fit(tiny, tiny, name=name, quiet=True)
    run = open_run("other")
    job = msgspec.json.decode(run.workspace.job_file.read_bytes())
    write_json(run.workspace.job_file, {**job, "controller": "x"})
    with pytest.raises(UsageError, match=r"other/.*/job\.json was written by another version of detkit"):
        _ = run.job
    manifest = run.workspace.model / "detkit.json"
    write_json(manifest, {**msgspec.json.decode(manifest.read_bytes()), "classes": 7})
    assert open_run("best").name == "good"
    run.workspace.job_file.unlink()
    with pytest.raises(UsageError, match=r"other holds no job: there is no input/data/job/job\.json"):
        _ = run.job


def laid_out(path: Path) -> Workspace:
    workspace = Workspace(path)
    workspace.create(Job(backend="echo", engine="-", model="memory", params={}, options={}, classes=[]))
    return workspace


def test_events_wait_for_the_end_of_a_line(tmp_path: Path) -> None:
    """The worker here writes half a line, waits until it is told to go on, and writes the rest."""
    workspace = laid_out(tmp_path / "run")
    script = (
        "import sys, os\nfile = open(sys.argv[1], 'ab', buffering=0)\n"
        """file.write(b'{"t":1,"kind":"log","values":{"message":"a"}}\\n{"t":2,"kind":"lo')\n"""
        "while not os.path.exists('go'): pass\n"
        """file.write(b'g","values":{"message":"b"}}\\n{"t":3')"""
    )
    command = [sys.executable, "-c", script, str(workspace.metrics_file)]
    run = LocalRun.start(workspace, command, leash=False, restart=None)
    got: list[Event] = []
    reader = threading.Thread(target=lambda: got.extend(run.events()))
    until(lambda: workspace.metrics_file.exists() and b'"lo' in workspace.metrics_file.read_bytes())
    reader.start()
    time.sleep(0.2)
    assert [event.values["message"] for event in run.events(follow=False) if event.kind == "log"] == ["a"]
    Path("go").touch()
    reader.join(timeout=20)
    assert [event.values["message"] for event in got if event.kind == "log"] == ["a", "b"]
    with pytest.raises(WorkerDied, match="exit code 0 while it started and left no reason"):
        run.wait()


def test_cut_line_does_not_swallow_the_next_event(tiny: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=2, seconds_per_step=0.05).start(tiny, tiny, leash=True)
    next(event for event in run.events() if event.values.get("state") == "running")
    run.stop()
    with run.workspace.metrics_file.open("ab") as file:
        file.write(b'{"t":3')
    resumed = run.resume(leash=True).wait()
    states = [event.values["state"] for event in resumed.events(follow=False) if event.kind == "state"]
    assert states.count("running") == 2


def test_stop_before_the_worker_can_listen(tiny: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=1000, seconds_per_step=0.01).start(tiny, tiny, leash=True)
    assert isinstance(run, LocalRun)
    run.stop()
    assert run.status == "stopped"
    assert not psutil.pid_exists(run.record.pid)
    run.stop()  # once more does no harm
    assert run.wait() is run
    resumed = run.resume(leash=True)
    assert resumed.status == "running"
    open_run(run.path).stop()  # another handle will do
    assert resumed.wait().status == "stopped"


def test_stop_by_force(tmp_path: Path) -> None:
    workspace = laid_out(tmp_path / "run")
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", deaf]
    run = LocalRun.start(workspace, command, leash=False, restart=None)
    until(lambda: "deaf" in run.log_tail())
    run.stop(timeout_s=0.2)
    assert run.status == "stopped"
    assert not psutil.pid_exists(run.record.pid)


def test_failed_run_can_be_resumed(tiny: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=2).start(tiny, tiny, device="cuda:99", leash=True)
    with pytest.raises(RunFailed, match="cuda:99") as caught:
        run.wait()
    assert not isinstance(caught.value, WorkerDied)
    assert "Traceback" in caught.value.log_tail
    assert run.status == "failed"
    job = msgspec.structs.replace(run.job, options={**run.job.options, "device": "cpu"})
    write_json(run.workspace.job_file, job)
    assert Trainer().resume(run, quiet=True).status == "finished"
    assert "cuda:99" in run.workspace.failure_file.with_name("failure.1").read_text()


def wrapper(path: Path, before: str) -> str:
    """A Python that does something in the shell first."""
    path.write_text(f'#!/bin/sh\n{before}\nexec "{sys.executable}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_full_disk(tiny: Dataset, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the system refuses the checkpoint in the middle of writing it."""
    python = wrapper(tmp_path / "limited", "ulimit -f 12")  # 512-byte or 1 KiB blocks; a checkpoint has 9 KB
    run = Trainer(model="echo/memory", epochs=2, python=python).start(tiny, tiny, leash=True)
    with pytest.raises(
        RunFailed, match=r"cannot write .*new: File too large; there is no earlier checkpoint\. nothing"
    ):
        run.wait()
    assert run.status == "failed"
    assert list(run.workspace.checkpoints.iterdir()) == []
    assert list(run.workspace.model.iterdir()) == []


def test_interpreter_that_is_none(tiny: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="python= names 'no-such-python', which is no executable"):
        Trainer(model="echo/memory", python="no-such-python", name="r").fit(tiny, tiny, quiet=True)
    assert not (tmp_path / "runs/r").exists(), "nothing half-written may stay"


def test_another_interpreter(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named in the environment, it trains, and predicts in a worker of its own."""
    python = wrapper(tmp_path / "python-of-echo", "echo started >> starts.txt")
    monkeypatch.setenv("DETKIT_PYTHON_ECHO", python)
    run = Trainer(model="echo/memory", epochs=1).fit(tiny, tiny, quiet=True)
    assert isinstance(run, LocalRun)
    with Predictor(run) as predictor:
        assert isinstance(predictor(tiny.paths[0]), Detections)
    assert (tmp_path / "starts.txt").read_text() == "started\n" * 2


def test_worker_of_another_version(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detkit, "__version__", "9.9.9")
    run = Trainer(model="echo/memory", epochs=1).start(tiny, tiny, leash=True)
    with pytest.raises(RunFailed, match=r"expected detkit-sdk 9\.9\.9 and .*, which has detkit-sdk .*; restart"):
        run.wait()


def refuse(*_: object, **__: object) -> None:
    raise OSError(1, "Operation not permitted")


@pytest.mark.parametrize("refused", [(), ("link",), ("link", "symlink")])
def test_links_are_copies_where_the_file_system_refuses_them(
    refused: tuple[str, ...], tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in refused:
        monkeypatch.setattr(os, name, refuse)
    run = Trainer(model="echo/memory", epochs=1).fit(tiny, tiny, quiet=True)
    assert run.status == "finished"
    image = run.workspace.channel("train") / "images" / tiny.image_ids[0]
    original = Path(tiny.paths[0])
    assert image.read_bytes() == original.read_bytes()
    assert image.is_symlink() == (refused == ("link",))
    assert (image.stat().st_ino == original.stat().st_ino) == (len(refused) < 2)
    assert not [path for path in image.parent.iterdir() if path.name.startswith(".")]


def test_disk_full_while_laying_out(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        Trainer(model="echo/memory", epochs=1, name="r").fit(tiny, tiny, quiet=True)
    assert not (tmp_path / "runs/r").exists()


def test_numbers_that_are_none_are_left_out(tiny: Dataset) -> None:
    """Validation images without boxes have no AP; the run ends well and its model opens."""
    empty = tiny.take([len(tiny) - 1])
    assert not len(empty.boxes)
    run = Trainer(model="echo/memory", epochs=1).fit(tiny, empty, quiet=True)
    assert "val/AP" not in run.metrics
    assert np.isfinite(list(run.metrics.values())).all()


def test_repr_tells_where_and_how_well(tiny: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=1, name="r").fit(tiny, tiny, quiet=True)
    assert repr(run) == f"<Run {run.path}: echo/memory, finished, val/AP {run.metrics['val/AP']:.3f}>"


def test_image_ids_in_folders_are_kept(tiny: Dataset) -> None:
    ids = tuple(f"sub/{image_id}" for image_id in tiny.image_ids)
    run = Trainer(model="echo/memory", epochs=1).fit(replace(tiny, image_ids=ids), tiny, quiet=True)
    stored = run.workspace.dataset("train")
    assert stored is not None
    assert stored.image_ids == ids
    assert all(Path(path).is_file() for path in stored.paths)


def test_copied_and_moved_runs_resume_where_they_are(tiny: Dataset, tmp_path: Path) -> None:
    run = Trainer(model="echo/memory", epochs=2, seconds_per_step=0.02, name="a").start(tiny, tiny, leash=True)
    next(event for event in run.events() if event.kind == "metric")
    run.stop()
    shutil.copytree(tmp_path / "runs/a", tmp_path / "runs/b")
    open_run("b").resume(leash=True).wait()
    assert (open_run("a").status, open_run("b").status) == ("stopped", "finished")
    (tmp_path / "runs/a").rename(tmp_path / "runs/c")
    assert open_run("c").resume(leash=True).wait().status == "finished"


def test_resumed_worker_that_dies_at_once(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the worker before it said last is not taken for its own word."""
    run = Trainer(model="echo/memory", epochs=1000, seconds_per_step=0.02, name="a").start(tiny, tiny, leash=True)
    run.stop()
    dead = tmp_path / "dead"
    dead.write_text("#!/bin/sh\nexit 7\n")
    dead.chmod(0o755)
    monkeypatch.setenv("DETKIT_PYTHON_ECHO", str(dead))
    with pytest.raises(WorkerDied, match="exit code 7"):
        open_run("a").resume(leash=True).wait()


def test_two_resumes_at_once(tiny: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=1000, seconds_per_step=0.02, name="a").start(tiny, tiny, leash=True)
    run.stop()
    resumed: list[Run] = []
    refused: list[UsageError] = []

    def resume() -> None:
        try:
            resumed.append(open_run("a").resume(leash=True))
        except UsageError as error:
            refused.append(error)

    threads = [threading.Thread(target=resume) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(resumed), len(refused)) == (1, 1)
    assert "is running" in str(refused[0])
    resumed[0].stop()
