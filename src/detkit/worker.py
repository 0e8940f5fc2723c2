"""``python -m detkit.worker RUN`` trains what a run directory asks for; ``--serve MODEL OPTIONS`` answers predictions.

A local process, a process of another virtual environment and a container all run this. What this module imports is
small on purpose: the standard library, numpy, pillow, msgspec and pluggy, on Python 3.10 and later.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import msgspec

import detkit
from detkit.backends import PredictOptions, load_engine
from detkit.data import Detections
from detkit.errors import DetkitError, Stopped, UsageError
from detkit.images import Image
from detkit.job import Model, Workspace
from detkit.wire import serve

LEASH_GRACE_S = 10.0
"""How long a worker may take to stop cleanly after its controller is gone."""


def main(arguments: list[str]) -> int:
    """Run the worker; returns the process's exit code."""
    if arguments[:1] == ["--serve"]:
        return serve_model(arguments[1], arguments[2] if len(arguments) > 2 else "{}")
    return train(Workspace(arguments[0]))


def train(workspace: Workspace) -> int:
    """Do the job of a run directory. A failure's reason ends up in ``output/failure``, never only in a log."""

    def request_stop(signum: int = 0, frame: FrameType | None = None) -> None:
        workspace.stop_requested = True

    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGINT, request_stop)
    hold_leash(request_stop)
    started = time.time()
    try:
        job = workspace.job()
        if job.version != detkit.__version__:
            raise UsageError(
                f"the controller is detkit {job.version}, the worker in {sys.executable} is {detkit.__version__}; "
                "install the same version in both"
            )
        workspace.log("state", {"state": "running", "python": sys.executable})
        trained = load_engine(job.engine).train(job, workspace)
        workspace.finish(job, trained, started=started)
        workspace.log("state", {"state": "finished"})
    except Stopped:
        workspace.log("state", {"state": "stopped"})
    except BaseException as error:
        if isinstance(error, DetkitError):
            workspace.fail(str(error))
        else:
            workspace.fail(f"{type(error).__name__}: {error}", traceback.format_exc())
        with contextlib.suppress(OSError):  # the log may lie on a disk that is full
            traceback.print_exc()
        return error.exit_code if isinstance(error, DetkitError) else 3
    return 0


def serve_model(path: str, options: str) -> int:
    """Load a model, print ``{"port": N}`` as one line, and answer requests until standard input closes."""
    hold_leash(lambda: os._exit(0))
    try:
        model = Model(path)
        detector = load_engine(model.manifest.engine).load(
            model, msgspec.json.decode(options.encode(), type=PredictOptions)
        )
    except Exception as error:
        traceback.print_exc()
        print(msgspec.json.encode({"error": str(error)}).decode(), flush=True)
        return 3

    def detect(batch: list[Image], paths: list[str]) -> list[Detections]:
        found = detector.detect(batch)
        return [replace(one, path=path) for one, path in zip(found, paths, strict=True)]

    listening = socket.create_server(("127.0.0.1", 0))
    print(msgspec.json.encode({"port": listening.getsockname()[1]}).decode(), flush=True)
    os.dup2(2, 1)  # nobody reads the pipe from here on; a framework that prints would fill it and hang
    serve(detect, listening)
    return 0


def hold_leash(let_go: Callable[[], object]) -> None:
    """Where ``DETKIT_LEASH`` is set, watch standard input: its end means that the controller is gone."""
    if os.environ.get("DETKIT_LEASH") != "1":
        return

    def watch() -> None:
        while os.read(0, 4096):
            pass
        let_go()
        time.sleep(LEASH_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="leash").start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
