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
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from msgspec import Meta, to_builtins

from detkit import environments, launching, trust, usercode
from detkit.checkpoints import PROCESSES
from detkit.data import Dataset
from detkit.detections import Detections
from detkit.dialects import Dialect
from detkit.environments import Environment
from detkit.errors import PluginError, UnknownName, Unsupported, UsageError
from detkit.images import Image
from detkit.job import Job, Model, Trained, Workspace
from detkit.natives import Adopted
from detkit.params import Options, Params
from detkit.plans import Plan
from detkit.processes import WorkerDetector, export_in_worker, worker_command
from detkit.runs import LocalRun, Run
from detkit.spaces import Range, suggested
from detkit.tuning import Mode, Search, TuningJob, metrics_of_loops
from detkit.usercode import UserCode
from detkit.warm import WarmWorker

API = 1
"""Version of the contract in this module; a backend states the one it was written for."""


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
    python: Annotated[
        str | None,
        Meta(description="the interpreter of the engine; where none, the one installed for it, else this one"),
    ] = None
    num_workers: Annotated[
        Annotated[int, Meta(ge=0)] | Literal["auto"],
        Meta(description="threads that decode images ahead of the training step"),
    ] = "auto"


class SeveralOptions(LocalOptions, frozen=True, kw_only=True):
    """Options of a backend whose engine trains one model in several processes, which torchrun starts."""

    gpus: Annotated[
        Annotated[int, Meta(ge=1)] | Literal["all"] | None,
        Meta(description="GPUs of each machine to train on, a process for each; all: as many as there are"),
    ] = None
    processes: Annotated[int, Meta(ge=1, description="processes of each machine that train together on its CPU")] = 1
    nodes: Annotated[int, Meta(ge=1, description="machines that train together")] = 1
    rendezvous: Annotated[str, Meta(description="HOST:PORT of one of several machines, where they find each other")] = (
        ""
    )
    max_restarts: Annotated[
        int,
        Meta(
            ge=0,
            description="on one machine: how often all start again from the last checkpoint when one is lost",
        ),
    ] = 3
    compress_gradients: Annotated[
        Literal["none", "bf16", "fp16"],
        Meta(description="what gradients are sent as between processes: half the bytes, for a slow network"),
    ] = "none"


class Detector(Protocol):
    """An opened model."""

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        """Return the detections on each ``(h, w, 3)`` RGB uint8 image, best first, boxes in that image's pixels.

        The images' memory may hold others after the call.
        """
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
        """Write the model into ``to``, a folder, in a format that ``LocalBackend.formats`` declares.

        Makes the folder where it is not there, replaces its own files as a whole, and returns the main one.
        """
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
    losses: tuple[str, ...] = ()
    """What the training loss is the sum of: ``train/<name>`` and, in validation,
    `detkit.events.validation_loss` of each."""
    space: Mapping[str, Range] | None = None
    """What a tuner searches unless told; None: around the defaults, see `detkit.spaces.suggested`."""


class Suggestion(NamedTuple):
    """Answer to ``model="auto"``."""

    model: str
    reason: str
    """Why this one, and what would fine-tune instead; printed as the first line."""


class Endpoint(ABC):
    """A model that answers somewhere else, and is paid for as long as it is there. A context manager that ends it."""

    name: str
    place: str
    """Where it is, e.g. ``sagemaker eu-west-1``."""
    model: Model | None = None
    """What answers; None where that is not known here, as of an endpoint that another machine made."""

    @property
    @abstractmethod
    def status(self) -> str:
        """The place's own word, e.g. ``InService``."""

    @property
    @abstractmethod
    def expires(self) -> float | None:
        """When the place itself deletes it, seconds since the epoch (POSIX); None where it stays."""

    @property
    @abstractmethod
    def price_per_hour(self) -> float | None:
        """US dollars, estimated; None where that is not known."""

    @abstractmethod
    def open(self, options: PredictOptions) -> Detector:
        """Return what sends images to it."""

    @abstractmethod
    def delete(self) -> None:
        """Delete it with all that was made for it; what is gone already is no error."""

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_error: object) -> None:
        self.delete()


class Backend(ABC):
    """The controller's side: light, imports no framework."""

    name: str
    summary: str
    models: Mapping[str, ModelSpec]
    options: type[Options]
    formats: tuple[str, ...] = ()
    """Export formats."""
    quantized: tuple[str, ...] = ()
    """Those of `formats` that lose precision: `detkit.exporting` hands them images, and keeps them only by their AP."""
    opens: tuple[str, ...] = ()
    """Endings of the bare files that `read_model` takes, e.g. ``(".onnx",)``."""
    dialects: tuple[Dialect, ...] = ()
    """Other tools' hyperparameters that it understands, for ``like=``."""
    deploy_options: type[Options] | None = None
    """Options of `deploy`; None where nothing can be deployed."""
    leashed: bool = True
    """Whether a run can end with the process that started it."""
    commands: str = ""
    """``"package.module:app"``, a typer app of its own: the verbs of ``detkit <name>``."""
    samplers: Mapping[str, Sequence[str]] = {}
    """With which the place searches for the best parameters by itself, see `tune`, each with the pruners that it can
    have there; the first of them is what is done unless told. Where there are none, `detkit.Tuner` starts each trial
    as a run."""

    @abstractmethod
    def start(self, job: Job, workspace: Workspace, *, leash: bool) -> Run:
        """Start a job that `Workspace.create` laid out. With ``leash`` it ends when this process does."""

    @contextlib.contextmanager
    def kept_warm(self, job: Job) -> Iterator[Backend]:
        """Yield this backend as it should `start` many jobs like this one, short ones, with ``leash``."""
        yield self

    def plan(self, job: Job, workspace: Workspace) -> Plan:
        """Return what `start` would do with a job that is laid out. Starts nothing, creates nothing, costs nothing."""
        return Plan(place="this machine")

    def engine_of(self, model: str) -> str:
        """Return the engine that trains a model, ``"package.module:Class"``; empty where it is not one of detkit's."""
        return ""

    def trained_name(self, model: str) -> str:
        """Return the `Model.name` of what training a model ends in."""
        return f"{self.name}/{model}"

    def starts_from_models(self, model: str) -> bool:
        """Return whether training a model can start from an earlier one of its kind."""
        return False

    @abstractmethod
    def attach(self, workspace: Workspace) -> Run:
        """Find a run again from its directory."""

    def recover(self, name: str, options: Mapping[str, Any]) -> Run:
        """Make the run directory of what another machine started, by the place's own name of it."""
        raise Unsupported(f"runs of backend {self.name!r} lie on the machine that started them; name their directory")

    @abstractmethod
    def open(self, model: Model, options: PredictOptions, *, isolate: bool = False) -> Detector:
        """Open a finished model, in this process or, with ``isolate``, in a worker of its own."""

    def export(self, model: Model, format: str, to: Path) -> Path:
        """Write a finished model into a folder, in one of `formats`, and return the main file."""
        raise Unsupported(f"backend {self.name!r} exports nothing")

    def read_model(self, file: Path) -> Model:
        """Return a bare file, of `opens`, as a model. Raises `UsageError` where it says too little to be one."""
        raise Unsupported(f"backend {self.name!r} opens no bare files")

    def deploy(self, model: Model, options: Options) -> Endpoint:
        """Let a finished model answer. With `deploy_options` only."""
        raise Unsupported(f"backend {self.name!r} deploys nothing")

    def plan_deployment(self, model: Model, options: Options) -> Plan:
        """Return what `deploy` would do with the same. Creates nothing, costs nothing."""
        raise Unsupported(f"backend {self.name!r} deploys nothing")

    def endpoints(self, options: Mapping[str, Any]) -> Sequence[Endpoint]:
        """Return what detkit deployed, wherever from, and is there now. ``options`` are some of `deploy`'s."""
        return ()

    def remove_endpoints(self, names: Sequence[str], *, expired: bool, options: Mapping[str, Any]) -> list[str]:
        """Delete endpoints with all that was made for them: the named ones, else the ``expired``, else all of detkit's.

        With ``expired`` also what was left half made. Returns the names of what is gone now.
        """
        raise Unsupported(f"backend {self.name!r} deploys nothing")

    def require(self, model: str, params: Params, options: Options) -> None:  # noqa: B027 - most places need nothing of this machine
        """Raise before any data is read when what the engine needs is not here. Nothing to check by default."""

    def require_data(self, model: str, params: Params, channels: Mapping[str, Dataset]) -> None:  # noqa: B027 - most take any data
        """Raise before a run is started for data that a model cannot learn from. Nothing to check by default."""

    def space(self, model: str) -> Mapping[str, Range]:
        """Return what a tuner searches unless told."""
        spec = self.spec(model)
        return suggested(spec.params) if spec.space is None else spec.space

    def tuning_metrics(self, model: str) -> Mapping[str, Mode]:
        """Return what a search can judge trials by, as runs log it, and which way is better; the usual one first."""
        return metrics_of_loops(self.spec(model).losses)

    def plan_tuning(self, job: Job, workspace: Workspace, search: Search) -> Plan:
        """Return what `tune` would do with a job that is laid out. Creates nothing, costs nothing."""
        raise Unsupported(f"backend {self.name!r} does not search by itself")

    def tune(self, job: Job, workspace: Workspace, search: Search) -> TuningJob:
        """Start a search with one of `samplers` over the parameters of a job that is laid out, as for `start`.

        ``job.params`` are those of every trial, but for what is searched.
        """
        raise Unsupported(f"backend {self.name!r} does not search by itself")

    def attach_tuning(self, workspace: Workspace) -> TuningJob:
        """Find the search again that `tune` started, from the directory that it was given."""
        raise Unsupported(f"backend {self.name!r} does not search by itself")

    def suggest(self) -> Suggestion | None:
        """Answer ``model="auto"`` for this machine; None where the backend is no candidate."""
        return None

    def translate(self, model: str, params: Params) -> Mapping[str, str]:
        """Return what the framework will be told for each parameter whose name or value differs there."""
        return {}

    def adopt(self, model: str, keys: Mapping[str, str], given: Mapping[str, Any]) -> Adopted:
        """Return what native keys mean, beside the parameters that were given. Raises `UsageError` for unknown ones.

        Asked where the model's parameters have the field ``overrides``, see `detkit.natives`.
        """
        return Adopted(keys)

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
    environment: Environment | None = None
    """The environment of its own that ``detkit backends install NAME`` makes, for an engine that cannot run here."""
    resume: Literal["exact", "weights"] | None = None
    """``exact``: a resumed run ends like an uninterrupted one. ``weights``: it starts from the last weights."""
    incremental: bool = False
    """Whether training can start from another model, classes matched by name."""
    formats: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()
    gaps: Mapping[str, str] = field(default_factory=dict)
    """Cases of `detkit.testing.BackendTests` that fail, with the reason; one that passes after all is an error."""
    dialects: tuple[Dialect, ...] = ()
    suggestion: Callable[[], Suggestion | None] | None = None
    translation: Callable[[str, Params], Mapping[str, str]] | None = None
    adoption: Callable[[str, Mapping[str, str], Mapping[str, Any]], Adopted] | None = None
    """What `Backend.adopt` does."""
    requirement: Callable[[str, Params], None] | None = None
    """Raises when something that a model and its parameters need is not here, e.g. its weights."""
    data_requirement: Callable[[str, Params, Mapping[str, Dataset]], None] | None = None
    """Raises for data, by channel, that a model cannot learn from, e.g. without masks."""
    api: int = API
    """The version of this contract that the plugin was written for."""
    warm: WarmWorker | None = None
    """What `start` forks, where there is one; see `kept_warm`."""

    def __post_init__(self) -> None:
        if self.api != API:
            raise PluginError(
                f"backend {self.name!r} was written for version {self.api} of detkit.backends, this one is {API}; "
                "install matching versions of both"
            )

    def require(self, model: str, params: Params, options: Options) -> None:
        self.interpreter(getattr(options, "python", None))
        launching.check(to_builtins(options))
        if self.requirement is not None:
            self.requirement(model, params)

    def require_data(self, model: str, params: Params, channels: Mapping[str, Dataset]) -> None:
        if self.data_requirement is not None:
            self.data_requirement(model, params, channels)

    def engine_of(self, model: str) -> str:
        return self.engine

    def starts_from_models(self, model: str) -> bool:
        return self.incremental

    def start(self, job: Job, workspace: Workspace, *, leash: bool) -> LocalRun:
        self._refuse_other_engine(job.engine, workspace.path)
        trust.of_job(job, workspace)
        python = self.interpreter(job.options.get("python"))
        command = self._command(python, job, workspace)
        warm = self.warm if job.code is None else None  # which is imported before the engine
        return LocalRun.start(workspace, command, leash=leash, restart=self._restart(workspace), warm=warm)

    @contextlib.contextmanager
    def kept_warm(self, job: Job) -> Iterator[LocalBackend]:
        warm = WarmWorker(self.interpreter(job.options.get("python")), self.name, self.engine)
        try:
            yield replace(self, warm=warm)
        finally:
            warm.close()

    def joining(self, workspace: Workspace) -> list[str]:
        """Return the command with which another machine, which sees the run directory, takes part in a run.

        Raises `UsageError` for a run on one machine.
        """
        job = workspace.job()
        self._refuse_other_engine(job.engine, workspace.path)
        trust.of_job(job, workspace)
        if job.options.get("nodes", 1) == 1:
            raise UsageError(f"{workspace.path} trains on one machine; start one with nodes= and rendezvous=")
        return self._command(self.interpreter(job.options.get("python")), job, workspace)

    def _command(self, python: str, job: Job, workspace: Workspace) -> list[str]:
        command = worker_command(python, self.name, str(workspace.path))
        options = launching.decided(job, workspace)
        if not launching.launches(options):
            return command
        choice = workspace.checkpoints / PROCESSES if job.options.get("processes") == "auto" else None
        return launching.command(python, command, options, workspace.path, choice=choice)

    def attach(self, workspace: Workspace) -> LocalRun:
        return LocalRun(workspace, self._restart(workspace))

    def _restart(self, workspace: Workspace) -> Callable[[bool], LocalRun] | None:
        if self.resume is None:
            return None
        return lambda leash: self.start(workspace.job(), workspace, leash=leash)

    def open(self, model: Model, options: PredictOptions, *, isolate: bool = False) -> Detector:
        self._refuse_other_engine(model.manifest.engine, model.path)
        code, python = trust.of_model(model), self._opener(model)
        folder = None if code is None else code.source
        if isolate or not _can_be_here(python, code):
            return WorkerDetector(python, model, options, folder)
        usercode.load(model.manifest.code, folder, model=model.path)
        return load_engine(self.engine).load(model, options)

    def export(self, model: Model, format: str, to: Path) -> Path:
        self._refuse_other_engine(model.manifest.engine, model.path)
        code, python = trust.of_model(model), self._opener(model)
        folder = None if code is None else code.source
        if not _can_be_here(python, code):
            return export_in_worker(python, model, format, to, folder)
        usercode.load(model.manifest.code, folder, model=model.path)
        return load_engine(self.engine).export(model, format, to)

    def _refuse_other_engine(self, engine: str, place: Path) -> None:
        """Raise `UsageError` unless a model or a run names this backend's engine: it names what is imported."""
        if engine != self.engine:
            raise UsageError(
                f"{place} names the engine {engine!r}, and that of backend {self.name!r} is {self.engine!r}; nothing "
                "else is run. it was made by another version of the plugin, or by nobody to trust"
            )

    def _opener(self, model: Model) -> str:
        """Return the interpreter that opens a model; the one that trained it only where no other would do.

        A model may come from anywhere, so that one has to lie outside of the folder that the model came in.
        """
        trained_by = Path(str(model.manifest.options.get("python")))
        came_in = model.path.resolve().parent
        known = (
            trained_by.is_absolute()
            and shutil.which(trained_by)
            and not trained_by.parent.resolve().is_relative_to(came_in)
        )
        return self.interpreter(None, last=str(trained_by) if known else None)

    def suggest(self) -> Suggestion | None:
        return self.suggestion() if self.suggestion and not self.missing() else None

    def translate(self, model: str, params: Params) -> Mapping[str, str]:
        return self.translation(model, params) if self.translation else {}

    def adopt(self, model: str, keys: Mapping[str, str], given: Mapping[str, Any]) -> Adopted:
        return self.adoption(model, keys, given) if self.adoption else Adopted(keys)

    def missing(self) -> list[str]:
        """Return the modules of `requires` that this interpreter lacks."""
        return [name for name in self.requires if importlib.util.find_spec(name) is None]

    @property
    def installation(self) -> str:
        """The command that gives this backend what its engine needs."""
        if self.environment is None:
            return self.install
        return f"detkit backends install {self.name}" + (" --source PATH" if self.environment.checkout else "")

    @property
    def variable(self) -> str:
        """The environment variable that names an interpreter for this backend's engine."""
        return f"DETKIT_PYTHON_{self.name.upper().replace('-', '_')}"

    def interpreter(self, python: str | None, *, last: str | None = None) -> str:
        """Return the interpreter for this backend's engine.

        It is the option, ``DETKIT_PYTHON_<NAME>``, that of the environment that was installed for it, this one if it
        has what the engine needs, or ``last``. Raises `UsageError` for one that does not run, and `PluginError` when
        the environment is broken or holds other code than this interpreter, or when none is left.
        """
        chosen, origin = (python, "python=") if python else (os.environ.get(self.variable), self.variable)
        if not chosen:
            installed = environments.find(self.name) if self.environment else None
            if installed is not None:
                installed.check(self.engine)
                return installed.python
            if not self.missing():
                return sys.executable
            if last is not None:
                return last
            whose = ", PATH being your checkout of it" if self.environment and self.environment.checkout else ""
            raise PluginError(
                f"backend {self.name!r} needs {', '.join(self.missing())}, which this Python does not have; "
                f"install it with `{self.installation}`{whose}, or name another interpreter with python= or "
                f"{self.variable}"
            )
        found = shutil.which(chosen)
        if found is None:
            raise UsageError(f"{origin} names {chosen!r}, which is no executable; expected the path of a Python")
        return os.path.abspath(found)


def _can_be_here(python: str, code: UserCode | None) -> bool:
    """Return whether this process can do what an interpreter is wanted for."""
    return python == sys.executable and (code is None or usercode.fits_here(code))


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
