"""Runs: handles on training that goes on, or has ended, in a run directory.

Everything a `LocalRun` knows it reads from the directory, so any process can attach to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import msgspec

from detkit.errors import RunFailed, Unsupported, UsageError, WorkerDied
from detkit.events import Event
from detkit.files import atomic_write, lock_file, write_json
from detkit.forgetting_table import Forgetting, read_forgetting
from detkit.job import SCHEMA, Job, Model, Workspace
from detkit.processes import HELD_CODE, Caller, Leashed, end_group, how_it_ended, last_lines, start_worker
from detkit.tables import html_table
from detkit.warm import WarmWorker

Status: TypeAlias = Literal["running", "finished", "failed", "stopped", "interrupted"]
"""``interrupted`` is a worker that vanished without a word: killed, or the machine went down."""

_POLL_S = 0.05


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``run.json``: how the run was started, enough to find its process again and to start it anew."""

    backend: str
    model: str
    created: float
    """Seconds since the epoch (POSIX)."""
    pid: int = 0
    """Of the worker; 0 where it is no process of this machine."""
    pid_created: float = 0.0
    """When the process began (POSIX); tells it from a later one with the same number."""
    schema: int = SCHEMA


class Run(ABC):
    """A started or finished job. Backends subclass it."""

    on_interrupt: Literal["stop", "leave"] = "stop"
    """What Ctrl-C does to a run that `Trainer.fit` waits for: it is asked to stop, or goes on without this process."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.workspace.path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def record(self) -> RunRecord:
        """How the run was started."""
        if not self.workspace.run_file.is_file():
            raise UsageError(f"{self.path} holds no run: there is no run.json in it")
        return msgspec.json.decode(self.workspace.run_file.read_bytes(), type=RunRecord)

    @property
    def job(self) -> Job:
        """What was asked for, with every effective hyperparameter."""
        return self.workspace.job()

    @property
    @abstractmethod
    def status(self) -> Status:
        """Where the run stands."""

    def goes_on(self) -> bool:
        """Return whether more events may come. `events` asks before it looks for them."""
        return self.status == "running"

    @abstractmethod
    def stop(self, timeout_s: float = 60.0) -> None:
        """Ask training to end after its current step, keeping its last checkpoint; use force after the timeout."""

    @abstractmethod
    def wait(self) -> Run:
        """Block until training has ended and return the run. Raises `RunFailed` with the reason and the log's tail."""

    @abstractmethod
    def resume(self, *, leash: bool = False, options: Mapping[str, Any] | None = None) -> Run:
        """Continue an interrupted, stopped or failed run in place, with other ``options`` than before where given."""

    @property
    def model(self) -> Model:
        """The finished model. Raises `UsageError` before there is one."""
        if self.status != "finished":
            raise UsageError(
                f"run {self.path} is {self.status} and has no model yet; see `detkit runs show {self.path}`"
            )
        return Model(self.workspace.model)

    @property
    def cost(self) -> float | None:
        """US dollars that the run has cost, by an estimated price; None where nothing is paid, or it is not known."""
        return None

    @property
    def forgetting(self) -> Forgetting | None:
        """What the run did to the classes of the model that it started from; None where that was not measured."""
        return read_forgetting(self.path)

    @property
    def metrics(self) -> dict[str, float]:
        """The latest value of every metric; those of the model that was kept once the run is finished."""
        latest = {name: value for row in self.history for name, value in row.items() if name not in {"step", "epoch"}}
        return {**latest, **self.model.manifest.metrics} if self.status == "finished" else latest

    @property
    def history(self) -> list[dict[str, float]]:
        """One row per metric event: ``step``, ``epoch`` and the values. Steps that a resume repeats appear once."""
        rows: list[dict[str, float]] = []
        started_anew = False
        for event in self.events(follow=False):
            if event.kind == "state" and event.values.get("state") == "running":
                started_anew = True
            if event.kind == "metric":
                if started_anew and event.step is not None:
                    rows = [row for row in rows if row.get("step", -1) < event.step]
                    started_anew = False
                position = {"step": event.step, "epoch": event.epoch}
                row = {name: float(value) for name, value in position.items() if value is not None}
                rows.append({**row, **{name: float(value) for name, value in event.values.items()}})
        return rows

    @property
    def last_step(self) -> int:
        """The number of optimizer steps that the run has told of."""
        return max((event.step for event in self.events(follow=False) if event.step is not None), default=0)

    @property
    def position(self) -> int:
        """Bytes of events so far; `events` can begin there."""
        return self.workspace.metrics_file.stat().st_size if self.workspace.metrics_file.exists() else 0

    def events(self, *, follow: bool = True, since: int = 0) -> Iterator[Event]:
        """Yield events from a `position` on; with ``follow`` until the run has ended. A half-written line waits."""
        offset, rest = since, b""
        decoder = msgspec.json.Decoder(Event)
        while True:
            ended = not follow or not self.goes_on()
            if self.workspace.metrics_file.exists():
                with self.workspace.metrics_file.open("rb") as file:
                    file.seek(offset)
                    new = file.read()
                offset += len(new)
                *lines, rest = (rest + new).split(b"\n")
                for line in lines:
                    with contextlib.suppress(msgspec.DecodeError):  # a line cut short by a kill, continued by a resume
                        yield decoder.decode(line)
            if ended:
                return
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Let one at a time in, where the file system knows locks. The folder stays, while run.json is replaced."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def __repr__(self) -> str:
        numbers = ", ".join(f"{n} {v:.3f}" for n, v in sorted(self.metrics.items()) if n.endswith("AP"))
        model = f"{self.job.backend}/{self.job.model}"
        return f"<Run {self.path}: {model}, {self.status}{', ' + numbers if numbers else ''}>"

    def _repr_html_(self) -> str:
        numbers = {name: f"{value:.4g}" for name, value in sorted(self.metrics.items())}
        about = {"run": self.path, "model": f"{self.job.backend}/{self.job.model}", "status": self.status, **numbers}
        return html_table(["", ""], about.items())


class LocalRun(Run):
    """A run whose worker is a process on this machine."""

    def __init__(
        self,
        workspace: Workspace,
        restart: Callable[[bool], LocalRun] | None = None,
        process: Leashed | None = None,
    ) -> None:
        """``restart(leash)`` starts a worker anew, for `resume`; None where the backend cannot continue a run."""
        super().__init__(workspace)
        self._restart = restart
        self._process = process

    @classmethod
    def start(
        cls,
        workspace: Workspace,
        command: Sequence[str],
        *,
        leash: bool,
        restart: Callable[[bool], LocalRun] | None,
        warm: WarmWorker | None = None,
    ) -> LocalRun:
        """Start a worker in the run directory. With ``leash`` it ends when this process does, and may be a fork."""
        import psutil

        job = workspace.job()
        # What an earlier worker said last must not be taken for the word of this one.
        workspace.log("state", {"state": "starting"})
        with workspace.log_file.open("ab") as log:
            process: Leashed | None = warm.start(command, log) if warm is not None and leash else None
            if process is None:
                process = start_worker(command, leash=leash, stdout=log, stderr=subprocess.STDOUT)
        run = cls(workspace, restart, process)
        try:
            try:
                pid_created = psutil.Process(process.pid).create_time()
            except psutil.NoSuchProcess:
                pid_created = time.time()
            record = RunRecord(
                backend=job.backend,
                model=job.model,
                created=time.time(),
                pid=process.pid,
                pid_created=pid_created,
            )
            write_json(workspace.run_file, record)
        except BaseException:
            end_group(process.pid)
            run._reap()
            raise
        return run

    @property
    def status(self) -> Status:
        if self._alive():
            return "running"
        if (self.workspace.model / "detkit.json").is_file():
            return "finished"
        if self.workspace.failure_file.is_file():
            return "failed"
        states = [event.values["state"] for event in self.events(follow=False) if event.kind == "state"]
        return "stopped" if states and states[-1] == "stopped" else "interrupted"

    def wait(self) -> LocalRun:
        while self.status == "running":
            time.sleep(_POLL_S)
        self._reap()
        status = self.status
        if status == "failed":
            message, _, detail = self.workspace.failure_file.read_text().partition("\n")
            if not message:
                reason = f"{self._how_it_ended()}: not even the reason could be written; is the disk full?"
                raise WorkerDied(reason, self.workspace.log_file, self.log_tail())
            raise RunFailed(message + (f"\n{detail}" if detail else ""), self.log_tail())
        if status == "interrupted":
            raise WorkerDied(self._how_it_ended(), self.workspace.log_file, self.log_tail())
        return self

    def stop(self, timeout_s: float = 60.0) -> None:
        before = self.status
        if before != "running":
            self._reap()
            return
        pid = self.record.pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while self._alive() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if self._alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            while self._alive():
                time.sleep(_POLL_S)
        self._reap()
        if self.status == "interrupted":  # it ended before it could listen, or by force
            self._end_cut_line()
            self.workspace.log("state", {"state": "stopped"})

    def resume(self, *, leash: bool = False, options: Mapping[str, Any] | None = None) -> LocalRun:
        if self._restart is None:
            raise Unsupported(f"run {self.path}: its backend {self.record.backend!r} is not here, or cannot resume")
        with self._turn():  # of two who resume at once, the second finds it running
            status = self.status
            if status in {"running", "finished"}:
                raise UsageError(
                    f"run {self.path} is {status}; only an interrupted, stopped or failed run can be resumed"
                    + ("; a larger epochs= makes a new run that goes on from it" if status == "finished" else "")
                )
            self._refuse_other_worker()
            failure, job_file = self.workspace.failure_file, self.workspace.job_file
            number = 1 + sum(1 for _ in failure.parent.glob("failure.*"))
            before, aside = job_file.read_bytes(), failure.with_name(f"failure.{number}")
            self._end_cut_line()
            try:
                if status == "failed":
                    failure.rename(aside)
                if options:
                    job = self.job
                    write_json(job_file, msgspec.structs.replace(job, options={**job.options, **options}))
                return self._restart(leash)
            except BaseException:  # no worker was started, so the run is what it was
                if options:
                    with atomic_write(job_file) as file:
                        file.write(before)
                if status == "failed" and aside.exists():
                    aside.rename(failure)
                if self.status != status:
                    self.workspace.log("state", {"state": status})
                raise

    def log_tail(self) -> str:
        """Return the last lines that the worker printed."""
        if not self.workspace.log_file.is_file():
            return ""
        with self.workspace.log_file.open("rb") as log:
            return last_lines(log)

    def _reap(self) -> None:
        """Collect the ended process, where it is a child of this one, and let go of the leash."""
        if self._process is not None:
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()

    def _refuse_other_worker(self) -> None:
        """Raise `UsageError` where a worker that run.json does not name is at work, such as one started by hand."""
        try:
            held = lock_file(self.workspace.lock)
        except BlockingIOError:
            raise UsageError(
                f"a worker that detkit did not start is at work in {self.path}; wait for its end, or end it, and type "
                "this again"
            ) from None
        if held is not None:
            held.close()

    def _end_cut_line(self) -> None:
        """Give the next event a line of its own where a kill cut the last one short."""
        file = self.workspace.metrics_file
        if file.is_file() and not file.read_bytes().endswith(b"\n"):
            with file.open("ab") as end:
                end.write(b"\n")

    def _alive(self) -> bool:
        if self._process is not None:
            if self._process.returncode is None and self._process.poll() is not None:
                end_group(self._process.pid)  # a crashed worker's own children would go on
            if self._process.returncode is None:
                return True
        record = self.record
        if self._process is not None:
            if record.pid == self._process.pid:
                return False
            self._reap()
            self._process = None  # it was resumed by another handle, or another program
        import psutil

        try:
            process = psutil.Process(record.pid)
            same = math.isclose(process.create_time(), record.pid_created, abs_tol=1.0)
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def _how_it_ended(self) -> str:
        code = None if self._process is None else self._process.returncode
        states = [event.values["state"] for event in self.events(follow=False) if event.kind == "state"]
        if self._process is None or code not in range(128) or code == HELD_CODE or states[-1:] != ["starting"]:
            return how_it_ended(code)
        python = cast("list[str]", self._process.args)[0]
        return f"{how_it_ended(code, 'started')}; {Caller.here(self.job.backend).expects(python)}"
