"""A warm worker: a process that has imported an engine, and of which the worker of each run is a fork.

Importing a framework takes seconds, most of a short trial. A fork has what its own import would have made, where the
import left neither threads nor open files (a fork has no threads, and would share a device). Where it did, and for a
run that asks for another interpreter or another environment, a worker is started as ever.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NoReturn

import msgspec

from detkit.processes import end_group, hold, worker_command, worker_environment

_START_S = 120.0
"""How long an import may take before runs are started without it."""
_POLL_S = 0.02


class _Request(msgspec.Struct, frozen=True):
    """What a fork shall do; it comes with the descriptors of its log and its leash."""

    arguments: list[str]
    """Of `detkit.worker`."""
    folder: str
    """Where it works."""


class _Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    pid: int
    code: int | None = None
    """How it ended, as `subprocess.Popen.returncode`; None: it has begun."""


class WarmWorker:
    """Starts workers of one engine as forks. It ends with `close`, or with this process; its forks hold their leash."""

    def __init__(self, python: str, backend: str, engine: str) -> None:
        """Nothing is started before the first `start`."""
        self._prefix = worker_command(python, backend)[:-1]
        self._command = worker_command(python, backend, "--warm", engine)
        self._environment = worker_environment(python)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._rest = b""
        self._answers: list[_Answer] = []
        self._codes: dict[int, int] = {}
        self._lock = threading.RLock()

    def start(self, command: Sequence[str], log: IO[bytes]) -> Fork | None:
        """Do what a command of `worker_command` says, leashed, in a fork. None where that would not be the same."""
        count = len(self._prefix)
        same = list(command[:count]) == self._prefix and worker_environment(command[0]) == self._environment
        if sys.platform != "linux" or not same:
            return None
        with self._lock:
            if not self._is_ready():
                return None
            return self._fork(command, _Request(list(command[count:]), str(Path.cwd())), log)

    def close(self) -> None:
        """End the process that was kept. Its forks have ended, or they are ended by force when they are asked about."""
        self._lose()
        if self._process is not None:
            end_group(self._process.pid)
            self._process.wait()

    def _is_ready(self) -> bool:
        """Return whether there is a process that can be forked; starts it, once, and waits for its import."""
        if self._process is None:
            self._socket, theirs = socket.socketpair()
            weakref.finalize(self, self._socket.close)
            ready = None
            try:
                with theirs, contextlib.suppress(OSError):  # no such interpreter, which `start_worker` will say
                    self._process = subprocess.Popen(
                        self._command,
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,  # what is wrong says the worker that is then started as ever
                        env=self._environment,
                        start_new_session=True,
                    )
                ready = self._next_begun()
            finally:
                if ready is None:
                    self._lose()
        return self._socket is not None

    def _fork(self, command: Sequence[str], request: _Request, log: IO[bytes]) -> Fork | None:
        assert self._socket is not None
        held, held_by = os.pipe()
        stdin = os.fdopen(held_by, "wb")
        begun = None
        try:
            with contextlib.suppress(OSError):  # the process is gone
                socket.send_fds(self._socket, [msgspec.json.encode(request) + b"\n"], [log.fileno(), held])
                begun = self._next_begun()
        finally:
            os.close(held)
            if begun is None:  # an answer that nobody waited for would be taken for the next one's
                stdin.close()
                self._lose()
        return None if begun is None else Fork(self, begun.pid, command, stdin)

    def _next_begun(self) -> _Answer | None:
        """Return the next answer that something has begun; None where none comes."""
        deadline = time.monotonic() + _START_S
        while self._socket is not None and time.monotonic() < deadline:
            begun = next((answer for answer in self._answers if answer.code is None), None)
            if begun is not None:
                self._answers.remove(begun)
                return begun
            self._read(0.5)
        return None

    def _read(self, wait_s: float) -> None:
        if self._socket is None or not select.select([self._socket], [], [], wait_s)[0]:
            return
        with contextlib.suppress(ConnectionError):
            if new := self._socket.recv(65536):
                *lines, self._rest = (self._rest + new).split(b"\n")
                self._answers += [msgspec.json.decode(line, type=_Answer) for line in lines]
                return
        self._lose()

    def _lose(self) -> None:
        """Go on without the process, which ends now; none is started again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def code_of(self, pid: int) -> int | None:
        """Return how a fork ended; None while it goes on. Those of a process that is gone are ended, too."""
        with self._lock:
            self._read(0)
            for answer in [one for one in self._answers if one.code is not None]:
                self._answers.remove(answer)
                self._codes[answer.pid] = answer.code or 0
            if pid not in self._codes and self._socket is None:
                end_group(pid)
                self._codes[pid] = -signal.SIGKILL
            return self._codes.get(pid)


class Fork:
    """A worker that is no child of this process, with the part of `subprocess.Popen` that runs use."""

    def __init__(self, warm: WarmWorker, pid: int, args: Sequence[str], stdin: IO[bytes]) -> None:
        self._warm = warm
        self.pid, self.args = pid, list(args)
        self.stdin: IO[bytes] | None = stdin
        self.returncode: int | None = None
        hold(self)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._warm.code_of(self.pid)
        return self.returncode

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(_POLL_S)
        return code


def serve_forks(load: Callable[[], object], work: Callable[[list[str]], NoReturn]) -> None:
    """Import an engine with ``load``, then fork for each request on standard input, a socket, until its end.

    A fork does ``work`` with the arguments of the request, and ends with it.
    """
    channel = socket.socket(fileno=os.dup(0))
    before = _traces()
    load()
    if _traces() != before:
        return
    _say(channel, _Answer(os.getpid()))
    forks: set[int] = set()
    while True:
        asked = select.select([channel], [], [], _POLL_S if forks else None)[0]
        for pid in [pid for pid in forks if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)]:
            end_group(pid)  # a crashed worker's own children would go on; until it is reaped, the number is its own
            forks.remove(pid)
            _say(channel, _Answer(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
        if asked:
            received, descriptors, _flags, _address = socket.recv_fds(channel, 1 << 16, 2)
            while received and not received.endswith(b"\n"):
                received += channel.recv(1 << 16)
            if not received:
                return
            pid = os.fork()
            if pid == 0:
                channel.close()
                _be_worker(msgspec.json.decode(received, type=_Request), descriptors, work)
            with contextlib.suppress(OSError):  # it has done so itself, and may have ended
                os.setpgid(pid, pid)
            for descriptor in descriptors:
                os.close(descriptor)
            forks.add(pid)
            _say(channel, _Answer(pid))


def _be_worker(request: _Request, descriptors: Sequence[int], work: Callable[[list[str]], NoReturn]) -> NoReturn:
    """Be what `detkit.processes.start_worker` would have started."""
    try:
        os.setpgid(0, 0)
        log, held = descriptors
        for descriptor, number in ((held, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, number)
        for descriptor in descriptors:
            os.close(descriptor)
        os.chdir(request.folder)
        os.environ["DETKIT_LEASH"] = "1"
        sys.argv[1:] = request.arguments
        work(request.arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _traces() -> tuple[int, set[str]]:
    """Return what a fork would not have, and what it would share: the number of threads, and open files."""
    threads, files = list(Path("/proc/self/task").iterdir()), list(Path("/proc/self/fd").iterdir())
    # What listed them is open while it does.
    return len(threads), {f"{file.name} {file.readlink()}" for file in files if os.path.lexists(file)}


def _say(channel: socket.socket, answer: _Answer) -> None:
    channel.sendall(msgspec.json.encode(answer) + b"\n")
