"""Containers as processes: which command an image is, its environment, its end, and its lines in CloudWatch Logs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_KEPT = "DETKIT_STAND_IN_ENGINE"
"""What the stand-ins of AWS's images train with."""

_STRIPPED = ("AWS_", "SM_", "SAGEMAKER_", "DETKIT_", "TRAINING_JOB_")
"""Variables of the simulator's own environment that no container sees."""

_LONGEST_LINE = 250_000
"""Bytes that fit into one event of CloudWatch Logs (256 KiB)."""


_MOUNT = 'mount -t tmpfs none /opt && mkdir /opt/ml && mount --bind "$0" /opt/ml && cd /opt/ml && exec "$@"'
"""Gives a process an ``/opt/ml`` of its own, and nothing else in ``/opt``. Needs user namespaces, thus Linux."""


def can_mount() -> bool:
    """Whether processes can have an ``/opt/ml`` of their own on this machine."""
    if shutil.which("unshare") is None or Path(sys.executable).resolve().is_relative_to("/opt"):
        return False
    with tempfile.TemporaryDirectory() as base:
        probe = ["unshare", "-Urm", "sh", "-c", _MOUNT, base, "true"]
        return subprocess.run(probe, check=False, capture_output=True).returncode == 0


class Images:
    """The images that exist, by name, and the command each of them runs."""

    def __init__(self, images: Mapping[str, Sequence[str]]) -> None:
        self._commands = {_without_registry(name): list(command) for name, command in images.items()}

    def command(self, uri: str) -> list[str] | None:
        """Return the command of an image, whichever registry its URI names; None where there is no such image."""
        return self._commands.get(_without_registry(uri))

    @property
    def names(self) -> list[str]:
        """``repository:tag`` of every image."""
        return list(self._commands)


def _without_registry(uri: str) -> str:
    """Return ``repository:tag`` of an image URI."""
    first, slash, rest = uri.partition("/")
    name = rest if slash and re.search(r"[.:]|^localhost$", first) else uri
    name, _, digest = name.partition("@")
    return name if ":" in name or digest else f"{name}:latest"


class LogStream:
    """One stream of CloudWatch Logs. Lines are kept until `flush`."""

    def __init__(self, logs: Any, group: str, stream: str) -> None:
        self._logs, self._group, self._stream = logs, group, stream
        self._events: list[dict[str, Any]] = []
        self._lock, self._sending = threading.Lock(), threading.Lock()
        for create, arguments in (
            (logs.create_log_group, {"logGroupName": group}),
            (logs.create_log_stream, {"logGroupName": group, "logStreamName": stream}),
        ):
            with contextlib.suppress(logs.exceptions.ResourceAlreadyExistsException):
                create(**arguments)

    def write(self, line: str) -> None:
        """Take a line."""
        with self._lock:
            self._events.append({"timestamp": int(time.time() * 1000), "message": line[:_LONGEST_LINE] or " "})

    def flush(self) -> None:
        """Send what was written."""
        with self._sending:  # in order, and without holding up who writes
            with self._lock:
                events, self._events = self._events, []
            for start in range(0, len(events), 500):
                self._logs.put_log_events(
                    logGroupName=self._group, logStreamName=self._stream, logEvents=events[start : start + 500]
                )


class Container:
    """One process of an image, with all that it starts."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        base: Path,
        on_line: Callable[[str], None],
        mounted: bool = False,
    ) -> None:
        """Start it. What it prints comes to ``on_line``, line by line. Raises `OSError` where it cannot start.

        ``base`` is what ``/opt/ml`` is in a container: the process finds it there when it is ``mounted``, else by the
        variable ``SAGEMAKER_BASE_DIR``, and parts of the command that begin with ``/opt/ml`` are changed.
        """
        if mounted:
            line = ["unshare", "-Urm", "sh", "-c", _MOUNT, str(base), *command]
        else:
            line = [part.replace("/opt/ml", str(base), 1) if part.startswith("/opt/ml") else part for part in command]
            environment = {**environment, "SAGEMAKER_BASE_DIR": str(base)}
        self._process = subprocess.Popen(
            line,
            env=_environment(command, environment),
            cwd=base,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        self._reader.start()

    @property
    def exit_code(self) -> int | None:
        """The exit code as Docker tells it, 137 for SIGKILL; None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def terminate(self) -> None:
        """Send SIGTERM to the process, as Docker does."""
        self._process.terminate()

    def kill(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill it where it still runs, and wait until all that it printed was read."""
        self.kill()
        self._process.wait()
        self._reader.join(timeout=5)

    def _read(self, on_line: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                on_line(line.decode(errors="replace").rstrip("\r\n"))


def _environment(command: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name == _KEPT or not name.startswith(_STRIPPED)}
    paths = [str(Path(path).resolve()) for path in inherited.get("PYTHONPATH", "").split(os.pathsep) if path]
    if command[0] == sys.executable:
        # An image of this interpreter imports what this process can, installed or not.
        own = [path for path in sys.path if Path(path).is_dir() and not Path(path).is_relative_to(sys.base_prefix)]
        paths = list(dict.fromkeys([*paths, *(path for path in own if not Path(path).is_relative_to(sys.prefix))]))
    if paths:
        inherited["PYTHONPATH"] = os.pathsep.join(paths)
    return {**inherited, "PYTHONUNBUFFERED": "1", **environment}


def fresh(folder: Path) -> Path:
    """Return a folder, new and empty."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def free_port() -> int:
    """Return a port of the loopback that no one uses now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
