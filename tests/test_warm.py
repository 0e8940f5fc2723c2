"""Workers that are forks of one that has imported the engine: the same as others, however they end."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from detkit import Dataset, Trainer, plugins, trust
from detkit.backends import LocalBackend
from detkit.errors import RunFailed, WorkerDied
from detkit.processes import worker_command
from detkit.runs import LocalRun
from detkit.shapes import write_shapes
from detkit.warm import WarmWorker

pytestmark = [
    pytest.mark.usefixtures("clean"),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere forks of what imported a framework are not safe"),
]

Start = Callable[..., LocalRun]


@pytest.fixture
def start(tiny: Dataset) -> Iterator[Start]:
    """Return what starts runs of echo, kept warm from the first one on: pytest changes the environment before it."""
    trainer = Trainer(model="echo/memory", epochs=3)
    with contextlib.ExitStack() as stack:

        @functools.cache
        def backend() -> LocalBackend:
            found = plugins.backend("echo")
            assert isinstance(found, LocalBackend)
            return stack.enter_context(found.kept_warm(trainer.prepare(tiny, tiny, name="any").job))

        def begin(name: str, **settings: object) -> LocalRun:
            ready = trainer.prepare(tiny, tiny, name=name, **settings)
            if ready.code is not None:
                trust.remember(ready.code.digest)
            return backend().start(ready.job, ready.lay_out(Path(name)), leash=True)

        yield begin


def kept() -> psutil.Process:
    """Return the process that is forked: the only child of this one."""
    (process,) = psutil.Process().children()
    return process


def forks() -> list[int]:
    return [process.pid for process in kept().children()]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_forks_of_one_process_train_like_any_worker(start: Start, tiny: Dataset) -> None:
    runs = [start(name, seconds_per_step=0.05) for name in ("one", "two")]
    assert sorted(forks()) == sorted(run.record.pid for run in runs)
    alone = Trainer(model="echo/memory", epochs=3).fit(tiny, tiny, name="alone", quiet=True)
    for run in runs:
        assert run.wait().model.manifest.artifacts == alone.model.manifest.artifacts
    assert forks() == []


def test_a_fork_is_stopped_and_goes_on(start: Start) -> None:
    run = start("run", seconds_per_step=0.05)
    wait_for(lambda: run.metrics)
    run.stop()
    assert run.status == "stopped"
    assert run.resume(leash=True).wait().status == "finished"


def test_why_a_fork_failed(start: Start) -> None:
    run = start("run", learning_rate=1e30)
    with pytest.raises(RunFailed, match="finite"):
        run.wait()
    assert run.status == "failed"


def test_a_fork_is_killed(start: Start) -> None:
    run = start("run", seconds_per_step=1.0)
    wait_for(lambda: run.metrics)
    os.kill(run.record.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="was ended by SIGKILL"):
        run.wait()
    assert start("next").wait().status == "finished"


def test_the_process_that_is_forked_is_killed(start: Start) -> None:
    """Its forks end, too, as nobody could tell how they do otherwise; the next run is started as ever."""
    run = start("run", seconds_per_step=1.0)
    wait_for(lambda: run.metrics)
    worker = psutil.Process(run.record.pid)
    kept().kill()
    with pytest.raises(WorkerDied, match="was ended by SIGKILL"):
        run.wait()
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    after = start("next")
    assert after.record.pid in [child.pid for child in psutil.Process().children()]
    assert after.wait().status == "finished"


def test_who_started_them_is_killed(clean: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from detkit import Trainer, plugins
if __name__ == "__main__":
    ready = Trainer(model="echo/memory", seconds_per_step=0.1, epochs=99).prepare(sys.argv[1], name="run")
    with plugins.backend("echo").kept_warm(ready.job) as backend:
        run = backend.start(ready.job, ready.lay_out(Path("run")), leash=True)
        print(run.record.pid, flush=True)
        run.wait()
"""
    source = str(write_shapes(clean / "data", num_images=8, size=48))
    with subprocess.Popen([sys.executable, "-c", script, source], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        worker = psutil.Process(int(process.stdout.readline()))
        both = [worker, *psutil.Process(process.pid).children()]
        assert len(both) == 2
        process.kill()
        process.wait()
        wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in both))


@pytest.mark.parametrize(
    "imported",
    [
        "import threading, time; threading.Thread(target=time.sleep, args=[60], daemon=True).start()",
        "import os; kept = os.open(os.devnull, os.O_RDONLY)",
        "import a_module_that_nobody_has",
    ],
)
def test_no_fork_where_it_would_not_be_the_same(imported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork would lack the thread, and share the file."""
    (tmp_path / "strange.py").write_text(f"from detkit_echo.engine import EchoEngine as Engine\n{imported}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert fork(WarmWorker(sys.executable, "echo", "strange:Engine"), tmp_path) is None


def test_no_fork_for_another_environment_or_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm = WarmWorker(sys.executable, "echo", "detkit_echo.engine:EchoEngine")
    torchrun = [sys.executable, "-u", "-c", "from detkit.launching import launch; launch()", "run", "{}"]
    with Path(tmp_path / "log").open("wb") as log:
        assert warm.start(torchrun, log) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert fork(warm, tmp_path) is None
    assert not psutil.Process().children()


def fork(warm: WarmWorker, folder: Path) -> object:
    try:
        with Path(folder / "log").open("wb") as log:
            return warm.start(worker_command(sys.executable, "echo", str(folder / "run")), log)
    finally:
        warm.close()


def test_the_users_own_code_is_not_forked(start: Start, tmp_path: Path) -> None:
    """It is imported before the engine, and may change what that finds."""
    (tmp_path / "mine.py").write_text("")
    run = start("run", code=tmp_path / "mine.py")
    assert run.record.pid == kept().pid
    assert run.wait().status == "finished"


def test_no_fork_of_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    warm = WarmWorker("/nowhere/python", "echo", "detkit_echo.engine:EchoEngine")
    with Path(tmp_path / "log").open("wb") as log:
        assert warm.start(worker_command("/nowhere/python", "echo", str(tmp_path / "run")), log) is None
