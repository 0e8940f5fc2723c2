"""Containers as processes: which command an image is, its environment, its end, and its lines in CloudWatch Logs."""

from __future__ import annotations

import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_INHERITED = {
    "PATH",
    "LANG",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "DETKIT_STAND_IN_ENGINE",  # what the stand-ins of AWS's images train with
}
"""Variables of the simulator's own environment that a container sees, besides ``LC_*``."""

_SUPERVISOR = [sys.executable, "-IS", str(Path(__file__).with_name("supervisor.py"))]

_LONGEST_LINE = 250_000
"""Bytes that fit into one event of CloudWatch Logs (256 KiB)."""


_MOUNT = 'mount -t tmpfs none /opt && mkdir /opt/ml && mount --bind "$0" /opt/ml && cd /opt/ml && exec "$@"'
"""Gives a process an ``/opt/ml`` of its own, and nothing else in ``/opt``. Needs user namespaces, thus Linux."""


@functools.cache
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
        from botocore.exceptions import ClientError

        self._logs, self._group, self._stream = logs, group, stream
        self._events: list[dict[str, Any]] = []
        self._lock, self._sending = threading.Lock(), threading.Lock()
        for create, arguments in (
            (logs.create_log_group, {"logGroupName": group}),
            (logs.create_log_stream, {"logGroupName": group, "logStreamName": stream}),
        ):
            try:
                create(**arguments)
            except ClientError as error:  # by its code: the classes of a client are another thread's where two begin
                if error.response["Error"]["Code"] != "ResourceAlreadyExistsException":
                    raise

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
        *,
        mounted: bool = False,
        image: Sequence[str] | None = None,
    ) -> None:
        """Start it. What it prints comes to ``on_line``, line by line. Raises `OSError` where it cannot start.

        ``base`` is what ``/opt/ml`` is in a container: the process finds it there when it is ``mounted``, else by the
        variable ``SAGEMAKER_BASE_DIR``, and parts of the command that begin with ``/opt/ml`` are changed. ``image`` is
        the image's own command where another one is run in it.
        """
        if mounted:
            line = ["unshare", "-Urm", "sh", "-c", _MOUNT, str(base), *command]
        else:
            line = [part.replace("/opt/ml", str(base), 1) if part.startswith("/opt/ml") else part for part in command]
            environment = {**environment, "SAGEMAKER_BASE_DIR": str(base)}
        # Not below base: a socket's path may have 107 bytes, and those of a container's temporary files are its own.
        self._scratch = Path(tempfile.mkdtemp(prefix="detkit-container-"))
        whole = _environment(image or command, {**_places(self._scratch), **environment})
        if shutil.which(line[0], path=whole.get("PATH", os.defpath)) is None:
            shutil.rmtree(self._scratch)
            raise FileNotFoundError(f"there is no program {line[0]}")
        self._process = subprocess.Popen(
            [*_SUPERVISOR, str(self._scratch), *line],
            env=whole,
            cwd=base,
            stdin=subprocess.PIPE,
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
        """Send SIGTERM to the process, as Docker does, and to nothing that it started."""
        self._process.terminate()

    def close(self) -> None:
        """Kill it where it still runs, with all that it started, and wait until all that it printed was read."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._reader.join(timeout=5)
        shutil.rmtree(self._scratch, ignore_errors=True)  # its supervisor has, unless it ended before it began

    def _read(self, on_line: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                on_line(line.decode(errors="replace").rstrip("\r\n"))


def _environment(image: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name in _INHERITED or name.startswith("LC_")}
    paths = [str(Path(path).resolve()) for path in inherited.get("PYTHONPATH", "").split(os.pathsep) if path]
    if image[0] == sys.executable:
        # An image of this interpreter has it as `python3`, and imports what this process can, installed or not.
        inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"
        own = [path for path in sys.path if Path(path).is_dir() and not Path(path).is_relative_to(sys.base_prefix)]
        paths = list(dict.fromkeys([*paths, *(path for path in own if not Path(path).is_relative_to(sys.prefix))]))
    if paths:
        inherited["PYTHONPATH"] = os.pathsep.join(paths)
    return {**inherited, "PYTHONUNBUFFERED": "1", **environment}


def _places(scratch: Path) -> dict[str, str]:
    """Return the variables for what a container writes besides its results, so that nothing goes to the user's home."""
    places = {"TMPDIR": scratch / "tmp", "HOME": scratch / "home", "DETKIT_CACHE": scratch / "cache"}
    for place in places.values():
        place.mkdir()
    return {name: str(place) for name, place in places.items()}


def fresh(folder: Path) -> Path:
    """Return a folder, new and empty."""
    if folder.exists():
        discard(folder)
    folder.mkdir(parents=True)
    return folder


def discard(folder: Path) -> None:
    """Remove a folder, also where things in it are read-only. One that is not there is no error."""
    for path, _, _ in os.walk(folder):
        Path(path).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Return a port of the loopback that no one uses now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
