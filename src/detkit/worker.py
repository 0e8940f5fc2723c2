"""``python -m detkit.worker RUN [CALLER]`` trains what a run directory asks for.

``--serve MODEL OPTIONS MEMORY CALLER [CODE]`` answers predictions; ``--export MODEL FORMAT FOLDER CALLER [CODE]``
writes a model; ``CODE`` is the folder of the user's own modules that it takes.
``--warm ENGINE CALLER`` imports an engine and forks for each run, see `detkit.warm`.
``CALLER`` is a `detkit.processes.Caller` as JSON; in a container, nobody calls.

A local process, a process of another virtual environment and a container all run this. What this module imports is
small on purpose: the standard library, numpy, pillow, msgspec and pluggy, on Python 3.10 and later.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

import msgspec

import detkit
from detkit import forgetting, usercode
from detkit.backends import PredictOptions, load_engine
from detkit.detections import Detections
from detkit.errors import DetkitError, Stopped, UsageError, UserCodeFailed
from detkit.files import lock_file
from detkit.images import Image
from detkit.job import Code, Model, Workspace
from detkit.processes import HELD_CODE, Caller, end_group
from detkit.ranks import Place, RankLost, TorchRanks, TrainsAlone, end_with_the_launcher
from detkit.warm import serve_forks
from detkit.wire import Exported, Opened, SharedMemory, serve

_HOLD_TRIES, _HOLD_S = 10, 0.05
LEASH_GRACE_S = 10.0
"""How long a worker may take to stop cleanly after its controller is gone."""


def main(arguments: list[str]) -> int:
    """Run the worker; returns the process's exit code."""
    if arguments[:1] == ["--serve"]:
        return serve_model(*arguments[1:])
    if arguments[:1] == ["--export"]:
        return export_model(*arguments[1:])
    if arguments[:1] == ["--warm"]:
        return keep_warm(*arguments[1:])
    return train(Workspace(arguments[0]), *arguments[1:])


def train(workspace: Workspace, caller: str = "") -> int:
    """Do the job of a run directory. A failure's reason ends up in ``output/failure``, never only in a log.

    Where another worker is at work in it, that one's run stays as it is, and the reason goes to standard error. Of
    several that torchrun started, the first one holds the directory and writes.
    """
    place = Place.here()
    if place.launched:
        end_with_the_launcher()
        if place.restarts and workspace.failure_file.exists():
            return 3  # it would fail again
    workspace.is_silent = place.rank > 0
    try:
        held = None if workspace.is_silent else hold(workspace)
    except BlockingIOError:
        message = f"another worker is at work in {workspace.path}; wait for its end: `detkit runs attach RUN` shows it"
        print(message, file=sys.stderr)
        return HELD_CODE
    with held or contextlib.nullcontext():
        return _train(workspace, caller, place)


def hold(workspace: Workspace) -> IO[bytes] | None:
    """Take the run directory's lock. Raises `BlockingIOError` where another worker has it."""
    for _ in range(_HOLD_TRIES):
        with contextlib.suppress(BlockingIOError):  # it may be somebody who only looks
            return lock_file(workspace.lock)
        time.sleep(_HOLD_S)
    return lock_file(workspace.lock)


def _train(workspace: Workspace, caller: str, place: Place) -> int:
    def request_stop(signum: int = 0, frame: FrameType | None = None) -> None:
        workspace.stop_requested = True

    def give_up(signum: int, frame: FrameType | None) -> NoReturn:
        raise RankLost(f"another of the {place.size} processes that train together ended; see the log")

    # torchrun sends SIGTERM where one of the processes is gone, and SIGINT where they are to stop.
    signal.signal(signal.SIGTERM, give_up if place.launched else request_stop)
    if place.launched or signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # that of a shell's background job
        signal.signal(signal.SIGINT, request_stop)
    hold_leash(request_stop)
    started = time.time()
    try:
        if caller:
            refuse_other_versions(caller)
        job = workspace.job()
        workspace.log("state", {"state": "running", "python": sys.executable})
        _load_code(job.engine, job.code, workspace.code)
        trained = load_engine(job.engine).train(job, workspace)
        if workspace.is_silent:
            return 0
        workspace.finish(job, trained, started=started)
        forgetting.report(job, workspace)
        workspace.log("state", {"state": "finished"})
    except TrainsAlone:
        if workspace.stop_requested:
            workspace.log("state", {"state": "stopped"})
        return 0
    except Stopped:
        workspace.log("state", {"state": "stopped"})
    except BaseException as error:
        if isinstance(error, RankLost):
            if workspace.stop_requested:  # so was the other one
                workspace.log("state", {"state": "stopped"})
                return 0
            if not TorchRanks.joined:
                print(error, file=sys.stderr, flush=True)
                return 3
            if place.restarts < place.max_restarts:
                workspace.log("log", {"message": f"{error}; all start again from the last checkpoint"})
                return 3
        reason, trace = _reason(error)
        if isinstance(error, UserCodeFailed):
            reason += ". mend it and start a new run; a run keeps the code that it was started with"
        workspace.fail(reason, trace)
        with contextlib.suppress(OSError):  # the log may lie on a disk that is full
            traceback.print_exc()
        return error.exit_code if isinstance(error, DetkitError) else 3
    return 0


def _load_code(engine: str, code: Code | None, source: Path | str | None, model: Path | None = None) -> None:
    """Import the user's own modules, and before them the plugin, which may know where its framework lies."""
    if code is not None:
        with contextlib.suppress(ImportError):  # `load_engine` will say so
            importlib.import_module(engine.partition(":")[0].partition(".")[0])
    usercode.load(code, source, model=model)


def serve_model(path: str, options: str, memory: str, caller: str, code: str = "") -> int:
    """Load a model, say so on standard output with an `Opened` as one line, and answer requests.

    ``options`` is a `PredictOptions`, as JSON. Standard output is a socket, and the requests come on it; ``memory`` is
    the descriptor of what both sides share, empty where there is none. ``code`` is the folder of the user's own modules
    that the model takes, if it does.
    """
    output = os.dup(1)
    os.dup2(2, 1)  # whatever a framework prints is no answer
    hold_leash(end_at_once)
    try:
        refuse_other_versions(caller)
        model = Model(path)
        _load_code(model.manifest.engine, model.manifest.code, code or None, model.path)
        detector = load_engine(model.manifest.engine).load(model, msgspec.json.decode(options, type=PredictOptions))
        opened = Opened(error="")
    except BaseException as error:
        traceback.print_exc()
        opened = Opened(error="\n".join(filter(None, _reason(error))))
    os.write(output, msgspec.json.encode(opened) + b"\n")
    if opened.error:
        return 3

    def detect(batch: list[Image], paths: list[str]) -> list[Detections]:
        found = detector.detect(batch)
        return [replace(one, path=path) for one, path in zip(found, paths, strict=True)]

    serve(detect, socket.socket(fileno=output), SharedMemory(int(memory)) if memory else None)
    return 0


def export_model(path: str, format: str, folder: str, caller: str, code: str = "") -> int:
    """Write a model in another format, say so on standard output with an `Exported` as one line."""
    output = os.dup(1)
    os.dup2(2, 1)
    hold_leash(end_at_once)
    try:
        refuse_other_versions(caller)
        model = Model(path)
        _load_code(model.manifest.engine, model.manifest.code, code or None, model.path)
        exported = Exported(file=str(load_engine(model.manifest.engine).export(model, format, Path(folder))), error="")
    except BaseException as error:
        traceback.print_exc()
        exported = Exported(file="", error="\n".join(filter(None, _reason(error))))
    os.write(output, msgspec.json.encode(exported) + b"\n")
    return 3 if exported.error else 0


def keep_warm(engine: str, caller: str) -> int:
    """Import an engine, and fork for what `main` is asked for on standard input, a socket, until its end."""
    refuse_other_versions(caller)
    serve_forks(lambda: load_engine(engine), lambda arguments: leave(main(arguments)))
    return 0


def refuse_other_versions(caller: str) -> None:
    """Raise `UsageError` unless detkit, and the plugin, have the same version here as where the caller is."""
    asking = msgspec.json.decode(caller, type=Caller)
    for name, version in asking.versions.items():
        here = detkit.__version__ if name == "detkit-sdk" else _version_here(name)
        if here != version:
            raise UsageError(asking.expects(sys.executable, found=f"{name} {here}" if here else f"no {name}"))


def _version_here(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _reason(error: BaseException) -> tuple[str, str]:
    """Return the message of a failure and, where detkit does not explain it, the traceback."""
    if isinstance(error, DetkitError):
        return str(error), ""
    return f"{type(error).__name__}: {error}", traceback.format_exc()


def hold_leash(let_go: Callable[[], object]) -> None:
    """Where ``DETKIT_LEASH`` is set, watch standard input: its end means that the controller is gone."""
    if os.environ.pop("DETKIT_LEASH", "") != "1":  # it is not that of what this process starts
        return

    def watch() -> None:
        while os.read(0, 4096):
            pass
        let_go()
        time.sleep(LEASH_GRACE_S)
        end_at_once()

    threading.Thread(target=watch, daemon=True, name="leash").start()


def end_at_once() -> None:
    """End this process and all that it started; a leash means that the group is its own."""
    if Place.here().launched:
        os.kill(os.getppid(), signal.SIGKILL)  # torchrun would start it again
    end_group(os.getpgrp())


def leave(code: int) -> NoReturn:
    """End this process without the clean-up of its frameworks, which crashes in some when all is done and written."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def run() -> NoReturn:
    """Do what the command line says and leave."""
    leave(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
