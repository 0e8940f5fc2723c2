"""What a plugin author implements: an `Engine` in the worker, and usually one `LocalBackend` in the controller.

A *backend* knows how to get somebody to fill in a run's ``model/``; an *engine* is the code that fills it in, in
whatever interpreter it needs. Heavy packages (torch, mxnet ...) belong in the engine's module, which only the worker
imports, so a backend names its engine by a string.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import select
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from detkit.data import Detections
from detkit.errors import PluginError, RunFailed, UnknownName, Unsupported, UsageError
from detkit.images import Image
from detkit.job import Job, Model, Trained, Workspace
from detkit.params import Options, Params
from detkit.runs import LocalRun, Run
from detkit.wire import Client

API = 1
"""Version of the contract in this module; a backend states the one it was written for."""

_WORKER_START_S = 120.0


class PredictOptions(Options, frozen=True, kw_only=True):
    """How a model is opened for prediction."""

    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    score_threshold: float = 0.0
    nms_threshold: float | None = None
    """The model's own where None."""
    max_detections: int | None = None
    """The model's own where None."""


class LocalOptions(Options, frozen=True, kw_only=True):
    """Options of every backend that trains on this machine."""

    device: Annotated[
        str, Meta(description="auto, cpu, cuda or cuda:N; asking for one that is not there is an error")
    ] = "auto"
    python: Annotated[str | None, Meta(description="the interpreter that runs the engine; this one where none")] = None
    num_workers: Annotated[
        Annotated[int, Meta(ge=0)] | Literal["auto"],
        Meta(description="threads that decode images ahead of the training step"),
    ] = "auto"


class Detector(Protocol):
    """An opened model."""

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        """Return the detections on each ``(h, w, 3)`` RGB uint8 image, best first, boxes in that image's pixels."""
        ...

    def close(self) -> None:
        """Free what the model holds."""
        ...


class Engine(ABC):
    """The worker's side of a backend. Constructed without arguments, in the interpreter that has its framework."""

    @abstractmethod
    def train(self, job: Job, workspace: Workspace) -> Trained:
        """Train on ``workspace.dataset("train")``, leave the artifact in ``workspace.model``, return what was done.

        Continues from ``workspace.checkpoints`` when something is there; starts from ``workspace.parent_model`` when
        that holds a model. Calls ``workspace.log`` as it goes and ``workspace.raise_if_stopped`` at every step.
        """

    @abstractmethod
    def load(self, model: Model, options: PredictOptions) -> Detector:
        """Open a model that `train` left."""

    def export(self, model: Model, format: str, to: Path) -> Path:
        """Write the model in another format and return its path. Declared by ``LocalBackend.export``."""
        raise Unsupported(f"{model.name} cannot be exported to {format!r}")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One trainable model: its parameters with its own defaults, and what is known of its weights."""

    params: Params
    summary: str
    weights: tuple[str, ...] = ()
    """The words ``weights=`` takes beside ``none``, a file and a run, e.g. ``("coco",)``."""
    licence: str = ""
    """Licence of those weights."""


class Suggestion(NamedTuple):
    """Answer to ``model="auto"``."""

    model: str
    reason: str
    """Why this one, and what would fine-tune instead; printed as the first line."""


class Backend(ABC):
    """The controller's side: light, imports no framework."""

    name: str
    summary: str
    models: Mapping[str, ModelSpec]
    options: type[Options]

    @abstractmethod
    def start(self, job: Job, workspace: Workspace, *, leash: bool) -> Run:
        """Start a job that `Workspace.create` laid out. With ``leash`` it ends when this process does."""

    @abstractmethod
    def attach(self, workspace: Workspace) -> Run:
        """Find a run again from its directory."""

    @abstractmethod
    def open(self, model: Model, options: PredictOptions, *, isolate: bool = False) -> Detector:
        """Open a finished model, in this process or, with ``isolate``, in a worker of its own."""

    def require(self, model: str, params: Params, options: Options) -> None:  # noqa: B027 - most places need nothing of this machine
        """Raise before any data is read when what the engine needs is not here. Nothing to check by default."""

    def suggest(self) -> Suggestion | None:
        """Answer ``model="auto"`` for this machine; None where the backend is no candidate."""
        return None

    def translate(self, model: str, params: Params) -> Mapping[str, str]:
        """Return what the framework will be told for each parameter whose name or value differs there."""
        return {}

    def spec(self, model: str) -> ModelSpec:
        """Return a model's entry. Raises `UnknownName` with a did-you-mean."""
        if model not in self.models:
            raise UnknownName(f"model of backend {self.name!r}", model, self.models)
        return self.models[model]


@dataclass(frozen=True, kw_only=True)
class LocalBackend(Backend):
    """A backend whose engine runs in a worker process on this machine. Most plugins yield one of these."""

    name: str
    engine: str
    """``"package.engine:Engine"``; resolved only in the worker."""
    models: Mapping[str, ModelSpec]
    install: str
    """The command that installs what the engine needs."""
    summary: str = ""
    options: type[LocalOptions] = LocalOptions
    requires: tuple[str, ...] = ()
    """Modules the engine imports; looked for before a worker is started in this interpreter."""
    resume: Literal["exact", "weights"] | None = None
    """``exact``: a resumed run ends like an uninterrupted one. ``weights``: it starts from the last weights."""
    incremental: bool = False
    """Whether training can start from another model, classes matched by name."""
    formats: tuple[str, ...] = ()
    """Export formats."""
    gaps: Mapping[str, str] = field(default_factory=dict)
    """Cases of `detkit.testing.BackendTests` that fail, with the reason; one that passes after all is an error."""
    suggestion: Callable[[], Suggestion | None] | None = None
    translation: Callable[[str, Params], Mapping[str, str]] | None = None
    requirement: Callable[[str, Params], None] | None = None
    """Raises when something that a model and its parameters need is not here, e.g. its weights."""
    api: int = API
    """The version of this contract that the plugin was written for."""

    def __post_init__(self) -> None:
        if self.api != API:
            raise PluginError(
                f"backend {self.name!r} was written for version {self.api} of detkit.backends, this one is {API}; "
                "install matching versions of both"
            )

    def require(self, model: str, params: Params, options: Options) -> None:
        self.interpreter(getattr(options, "python", None))
        if self.requirement is not None:
            self.requirement(model, params)

    def start(self, job: Job, workspace: Workspace, *, leash: bool) -> LocalRun:
        python = self.interpreter(job.options.get("python"))
        command = [python, "-m", "detkit.worker", str(workspace.path)]
        return LocalRun.start(workspace, command, leash=leash, restart=self._restart(workspace))

    def attach(self, workspace: Workspace) -> LocalRun:
        return LocalRun(workspace, self._restart(workspace))

    def _restart(self, workspace: Workspace) -> Callable[[bool], LocalRun] | None:
        if self.resume is None:
            return None
        return lambda leash: self.start(workspace.job(), workspace, leash=leash)

    def open(self, model: Model, options: PredictOptions, *, isolate: bool = False) -> Detector:
        trained_by = model.manifest.options.get("python")
        python = self.interpreter(trained_by if trained_by and shutil.which(trained_by) else None)
        if isolate or python != sys.executable:
            return WorkerDetector(python, model, options)
        return load_engine(model.manifest.engine).load(model, options)

    def suggest(self) -> Suggestion | None:
        return self.suggestion() if self.suggestion and not self.missing() else None

    def translate(self, model: str, params: Params) -> Mapping[str, str]:
        return self.translation(model, params) if self.translation else {}

    def missing(self) -> list[str]:
        """Return the modules of `requires` that this interpreter lacks."""
        return [name for name in self.requires if importlib.util.find_spec(name) is None]

    def interpreter(self, python: str | None) -> str:
        """Return the interpreter for this backend's engine: the option, ``DETKIT_PYTHON_<NAME>``, or this one.

        Raises `UsageError` for one that does not run and `PluginError` when this one lacks what the engine needs.
        """
        variable = f"DETKIT_PYTHON_{self.name.upper().replace('-', '_')}"
        chosen, origin = (python, "python=") if python else (os.environ.get(variable), variable)
        if not chosen:
            if self.missing():
                raise PluginError(
                    f"backend {self.name!r} needs {', '.join(self.missing())}, which this Python does not have; "
                    f"install it with `{self.install}`, or name another interpreter with python= or {variable}"
                )
            return sys.executable
        found = shutil.which(chosen)
        if found is None:
            raise UsageError(f"{origin} names {chosen!r}, which is no executable; expected the path of a Python")
        return os.path.abspath(found)


def load_engine(reference: str) -> Engine:
    """Import ``"package.module:Class"`` and construct it. Raises `PluginError` naming what could not be imported."""
    module, _, name = reference.partition(":")
    try:
        engine = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise PluginError(f"cannot import engine {reference!r} in {sys.executable}: {error}") from error
    if not isinstance(engine, Engine):
        raise PluginError(f"{reference!r} is no detkit.backends.Engine")
    return engine


class WorkerDetector:
    """A model opened in a process of its own, spoken to over loopback HTTP; one worker serves many images."""

    def __init__(self, python: str, model: Model, options: PredictOptions) -> None:
        self._process = subprocess.Popen(
            [python, "-m", "detkit.worker", "--serve", str(model.path.absolute()), _json(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "DETKIT_LEASH": "1"},
            start_new_session=True,
        )
        try:
            answer = self._read_line()
            if not answer.get("port"):
                raise RunFailed(answer.get("error") or "the prediction worker ended before it could load the model")
        except BaseException:
            self.close()
            raise
        self._client = Client("127.0.0.1", int(answer["port"]))

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        return self._client.detect(images)

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if hasattr(self, "_client"):
            self._client.close()

    def _read_line(self) -> dict[str, Any]:
        """Read the worker's first JSON line; other prints of a framework are passed over."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()  # unbuffered: select does not see lines that a buffer already took
        deadline = time.monotonic() + _WORKER_START_S
        rest = b""
        while time.monotonic() < deadline:
            if not select.select([pipe], [], [], 0.5)[0]:
                continue
            new = os.read(pipe, 65536)
            if not new:
                return {}
            *lines, rest = (rest + new).split(b"\n")
            for line in lines:
                with contextlib.suppress(msgspec.DecodeError):
                    answer = msgspec.json.decode(line)
                    if isinstance(answer, dict):
                        return answer
        raise RunFailed(f"the prediction worker did not load the model within {_WORKER_START_S:.0f} s")


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
