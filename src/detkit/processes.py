"""Worker processes: how they are started and how they ended, models opened in them, and exports made by them.

A worker runs in whatever interpreter its backend needs, see `detkit.worker`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import msgspec

from detkit import plugins
from detkit.detections import Detections
from detkit.environments import made_here, python_command, worker_variables
from detkit.errors import RunFailed, UsageError, WorkerDied
from detkit.images import Image
from detkit.job import Model
from detkit.ranks import VARIABLES
from detkit.wire import Client, Exported, Opened, SharedMemory

if TYPE_CHECKING:
    from detkit.backends import PredictOptions

_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"

_SPINS = "20000"
"""How often a thread of GCC's OpenMP looks for work before it sleeps: ``GOMP_SPINCOUNT``, by default 300,000.

Its threads wait for each other at the end of every operation; where another process has the core of one of them, the
rest would spin for most of that process's turn. Measured with a step of ``fcos_small`` on two cores: beside one busy
process it takes half the time, and on a quiet machine 3 to 5 % less processor time in the same wall time.
"""

HELD_CODE = 75
"""Exit code of a worker that finds another one in its run directory; that of ``EX_TEMPFAIL``."""

_TAIL_LINES, _TAIL_COLUMNS = 20, 240
"""Of what a worker printed, so many lines are quoted, and so much of each."""

_WORKER_START_S = 120.0
_DEATH_S = 2.0
"""How long a worker that no longer answers may take to be gone."""
_OUTPUT_BYTES = 1 << 20
"""So much of what a prediction worker prints is kept."""
_TAIL_BYTES = 1 << 14
_CRASHED_THREAD = ("Current thread ", "Stack (most recent call first)")
_END_OF_DUMP = ("  File ", "  ...", "Extension modules: ")
"""How lines of faulthandler begin."""

_NATIVE_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}


class Leashed(Protocol):
    """A process that ends with its standard input, and the part of `subprocess.Popen` that runs use."""

    pid: int
    args: Any
    stdin: IO[bytes] | None
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


_leashed: weakref.WeakSet[Leashed] = weakref.WeakSet()


def hold(process: Leashed) -> None:
    """Let a process end with this one, and not with the last fork of this one."""
    _leashed.add(process)


def _let_go_of_leashes() -> None:
    """In a fork: its copy of a leash would keep the worker when the process that started it is gone."""
    for process in _leashed:
        if process.stdin is not None:
            process.stdin.close()


os.register_at_fork(after_in_child=_let_go_of_leashes)


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks a worker for something, said on its command line; a worker in a container has none.

    A worker of any version reads this first, so its fields stay.
    """

    backend: str
    python: str
    """The interpreter that asks."""
    versions: dict[str, str]
    """The distributions it has; the worker must have the same."""

    @classmethod
    def here(cls, backend: str) -> Caller:
        """Return this process as the caller."""
        return cls(backend=backend, python=sys.executable, versions=plugins.versions(backend))

    def expects(self, python: str, found: str = "") -> str:
        """Say what a worker's interpreter should have, what it has where that is known, and what to type."""
        needed = " and ".join(f"{name} {version}" for name, version in self.versions.items())
        if made_here(python):
            fix = f"type `detkit backends upgrade {self.backend}`"
        elif found and python == self.python:
            fix = "it was installed anew since; restart the Python that asked"
        else:
            exact = " ".join(f"{name}=={version}" for name, version in self.versions.items())
            fix = f"type `{python} -m pip install {exact}`"
        return f"expected {needed} in {python}{f', which has {found}' if found else ''}: {fix}"


def worker_command(python: str, backend: str, *arguments: str) -> list[str]:
    """Return the command of a worker that this process asks for something; see `detkit.worker`."""
    return python_command(python, "from detkit.worker import run; run()", *arguments, _json(Caller.here(backend)))


def worker_environment(python: str) -> dict[str, str]:
    """Return the environment variables of a new worker: none that torchrun gave this process, none of its leash.

    See `for_speed` for what is added.
    """
    not_its_own = {"DETKIT_LEASH", *VARIABLES}
    return for_speed({name: value for name, value in worker_variables(python).items() if name not in not_its_own})


def for_speed(variables: Mapping[str, str]) -> dict[str, str]:
    """Return environment variables with what C libraries read when a process starts, unless they say something else.

    glibc asks Linux for huge pages, about 5 % less processor time for a step of torch on a CPU (tunable
    ``glibc.malloc.hugetlb``); threads of OpenMP wait a shorter time for each other, see `_SPINS`. No result changes.
    """
    tunables = variables.get(_TUNABLES, "")
    if _HUGE_PAGES not in tunables:
        tunables = ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))
    waits = {} if "OMP_WAIT_POLICY" in variables else {"GOMP_SPINCOUNT": _SPINS}
    return {**waits, **variables, _TUNABLES: tunables}


def start_worker(command: Sequence[str], *, leash: bool, **streams: Any) -> subprocess.Popen[bytes]:
    """Start a worker in a process group of its own. With ``leash`` it ends when this process does.

    Raises `UsageError` where the command's interpreter cannot be run.
    """
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE if leash else subprocess.DEVNULL,
            env={**worker_environment(command[0]), **({"DETKIT_LEASH": "1"} if leash else {})},
            start_new_session=True,  # Ctrl-C reaches only the controller, which then asks the worker to stop
            **streams,
        )
    except OSError as error:
        raise UsageError(
            f"cannot run {command[0]!r}: {error.strerror}; expected the path of a Python that has detkit. name another "
            "with python="
        ) from error
    if leash:
        hold(process)
    return process


def end_group(pid: int) -> None:
    """End a worker and all that it started, by force; at once after its own end, lest the number means another."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left; what macOS says of zombies
        os.killpg(pid, signal.SIGKILL)


def how_it_ended(code: int | None, doing: str = "") -> str:
    """Say what a worker's exit code means, and what it was doing; None where the code is not known."""
    when = f" while it {doing}" if doing else ""
    if code is None:
        return "vanished: it was killed, or the machine went down"
    number = -code if code < 0 else code - 128  # what a shell makes of a signal
    if number in set(signal.Signals):
        ended_by = signal.Signals(number)
        hint = "; it crashed in native code" if ended_by in _NATIVE_CRASHES else ""
        hint = "; the system kills processes so when memory runs out" if ended_by == signal.SIGKILL else hint
        return f"was ended by {ended_by.name}{when}{hint}"
    if code == HELD_CODE:
        return "ended at once: another worker is at work in the run directory; follow it with `detkit runs attach RUN`"
    if code == 255:  # of MXNet's own handler of SIGSEGV
        return f"crashed in native code{when} (exit code 255)"
    return f"ended with exit code {code}{when} and left no reason"


class WorkerDetector:
    """A model opened in a process of its own, which answers HTTP on a socket that nobody else can reach.

    Threads may share it, processes may not. The worker ends with `close`, with this object or with this interpreter,
    whichever comes first. Raises `UsageError` for an interpreter that cannot be run, `RunFailed` with the worker's
    reason, and `WorkerDied` where it left none.
    """

    def __init__(self, python: str, model: Model, options: PredictOptions, code_folder: Path | None = None) -> None:
        """``code_folder`` is the folder, or file, of the user's own modules that the model takes."""
        backend = model.manifest.backend
        self._python, self._backend = python, backend
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._output = tempfile.TemporaryFile()
        weakref.finalize(self, self._output.close)
        fcntl.fcntl(self._output, fcntl.F_SETFL, os.O_APPEND)  # the worker goes on at the end when it is cut
        shared = SharedMemory.create()
        if shared is not None:
            weakref.finalize(self, shared.close)
        descriptors = () if shared is None else (shared.descriptor,)
        memory = "".join(map(str, descriptors))
        command = worker_command(python, backend, "--serve", str(model.path.absolute()), _json(options), memory)
        command += [] if code_folder is None else [str(code_folder.absolute())]
        self._socket, theirs = socket.socketpair()
        weakref.finalize(self, self._socket.close)
        with theirs:
            self._process = start_worker(command, leash=True, stdout=theirs, stderr=self._output, pass_fds=descriptors)
        self._end = weakref.finalize(self, _end_worker, self._process, self._owner)
        threading.Thread(target=_bury, args=(self._process,), daemon=True, name="bury").start()
        self._client = Client(self._socket, shared)
        try:
            self._wait_until_open()
        except BaseException:
            self.close()
            raise

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        if os.getpid() != self._owner:
            raise UsageError("this model was opened in another process; open it in the one that uses it")
        with self._lock:
            self._refuse_closed()
            if os.fstat(self._output.fileno()).st_size > _OUTPUT_BYTES:
                self._output.truncate(0)
            try:
                return self._client.detect(images)
            except RunFailed as error:
                error.log_tail = last_lines(self._output)
                raise
            except OSError as error:
                self._refuse_closed()  # by another thread
                raise self._failure("predicted", f"does not answer: {error}") from error
            except BaseException:
                self.close()  # an answer that nobody waited for would be taken for that of the next images
                raise

    def _refuse_closed(self) -> None:
        if not self._end.alive:
            raise UsageError("this model was closed, or interrupted while it predicted; open it anew")

    def close(self) -> None:
        """End the worker. In a fork of the process that owns it, only let go of it."""
        self._end()
        self._output.close()
        self._client.close()

    def _wait_until_open(self) -> None:
        opened = self._first_answer()
        if opened is None:
            raise self._failure(
                "opened the model",
                f"did not open the model within {_WORKER_START_S:.0f} s",
                f"; {Caller.here(self._backend).expects(self._python)}",
            )
        if opened.error:
            raise RunFailed(opened.error, last_lines(self._output))

    def _first_answer(self) -> Opened | None:
        """Return what the worker says of the model; None when it ended without a word, or is too slow."""
        deadline = time.monotonic() + _WORKER_START_S
        rest = b""
        while time.monotonic() < deadline:
            if not select.select([self._socket], [], [], 0.5)[0]:
                continue
            new = self._socket.recv(65536)
            if not new:
                return None
            *lines, rest = (rest + new).split(b"\n")
            for line in lines:
                with contextlib.suppress(msgspec.DecodeError):  # printed by what starts the interpreter
                    return msgspec.json.decode(line, type=Opened)
        return None

    def _failure(self, doing: str, silence: str, otherwise: str = "") -> RunFailed:
        """Say what happened to a worker that gives no answer: ``silence`` where it lives, else how it ended.

        ``otherwise`` is added where it did not crash but ended by itself.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_DEATH_S)
        code, tail = self._process.returncode, last_lines(self._output)
        if code is None:
            return RunFailed(f"the worker {silence}" + (f"\nlast lines of its output:\n{tail}" if tail else ""), tail)
        return WorkerDied(how_it_ended(code, doing) + (otherwise if code in range(128) else ""), "its output", tail)


def _bury(process: subprocess.Popen[bytes]) -> None:
    """When a worker has ended, end what it started: a child that lives on would hold the socket open."""
    process.wait()
    end_group(process.pid)


def _end_worker(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a worker with all that it started. A fork of the process that owns it must not."""
    if os.getpid() != owner:
        return
    if process.returncode is None:
        end_group(process.pid)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def export_in_worker(python: str, model: Model, format: str, folder: Path, code_folder: Path | None = None) -> Path:
    """Let a worker write a model in another format; return the main file.

    Raises `RunFailed` with the worker's reason, and `WorkerDied` where it left none.
    """
    backend = model.manifest.backend
    paths = str(model.path.absolute()), str(folder.absolute())
    command = worker_command(python, backend, "--export", paths[0], format, paths[1])
    command += [] if code_folder is None else [str(code_folder.absolute())]
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as output:
        process = start_worker(command, leash=True, stdout=answer, stderr=output)
        try:
            code = process.wait()
        finally:
            end_group(process.pid)  # a crashed worker's own children would go on
            process.communicate()
        answer.seek(0)
        for line in answer.read().splitlines():
            with contextlib.suppress(msgspec.DecodeError):
                exported = msgspec.json.decode(line, type=Exported)
                if exported.error:
                    raise RunFailed(exported.error, last_lines(output))
                return Path(exported.file)
        raise WorkerDied(how_it_ended(code, f"wrote the model as {format}"), "its output", last_lines(output))


def last_lines(output: IO[bytes]) -> str:
    """Return the last lines of what a worker printed into a file; of a crash in native code, where it happened."""
    size = os.fstat(output.fileno()).st_size
    text = os.pread(output.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode(errors="replace")
    lines = [line[:_TAIL_COLUMNS] for line in text.splitlines()]
    # faulthandler writes the innermost call first, behind every other thread, and a long list of modules last.
    starts = [i for i, line in enumerate(lines) if line.startswith(_CRASHED_THREAD)]
    if starts and lines[-1].startswith(_END_OF_DUMP):
        return "\n".join(lines[starts[-1] :][:_TAIL_LINES])
    return "\n".join(lines[-_TAIL_LINES:])


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
