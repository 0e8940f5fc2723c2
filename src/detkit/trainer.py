"""Training, with any backend, by one call."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from detkit import catalog, plugins, trust
from detkit.channels import Gathered, Replay, gather
from detkit.data import Dataset
from detkit.dialects import refuse
from detkit.errors import InvalidValue, MissingSettings, UnknownName, Unsupported, UsageError
from detkit.explanation import Explanation, Row
from detkit.files import place
from detkit.forgetting import CHANNEL
from detkit.job import Job, Model, Workspace
from detkit.live import follow
from detkit.params import Params, describe
from detkit.plans import Plan
from detkit.predictor import find_model
from detkit.rehearsal import request_of, tell
from detkit.resolution import Resolved, resolve
from detkit.resuming import go_on, life
from detkit.runs import Run
from detkit.settings import Setting, Settings
from detkit.usercode import UserCode


class Trainer:
    """Trains a model; construct it with settings, call `fit` with data.

    Every setting may also come from the call, from ``DETKIT_<NAME>`` in the environment, or from a ``detkit.yaml`` in
    the current folder or above it. A setting that the backend does not know raises before anything heavy is imported.

    With ``like``, the settings are the hyperparameters of another tool, e.g. ``like="sagemaker-object-detection",
    mini_batch_size=16``; `explain` shows what each becomes. What cannot be had here is refused before anything starts.
    """

    def __init__(
        self,
        *,
        model: str | None = None,
        backend: str | None = None,
        like: str | None = None,
        train: Dataset | str | Path | None = None,
        val: Dataset | str | Path | None = None,
        test: Dataset | str | Path | None = None,
        name: str | None = None,
        on_invalid: Literal["raise", "drop"] | None = None,
        replay: Dataset | str | Path | None = None,
        replay_share: float | None = None,
        code: str | Path | None = None,
        imports: Sequence[str] | str | None = None,
        **settings: Any,
    ) -> None:
        """``replay`` is earlier data, or ``"parent"``, the training images of the run that ``weights`` names: some are
        trained on again, ``replay_share`` of all training images (0.2 unless given).

        ``code`` is a folder of your own modules, or a ``.py`` file: it is copied into the run, and its modules can be
        imported there. Those that ``imports`` names are, before the engine is.
        """
        own: dict[str, Any] = {
            "model": model,
            "backend": backend,
            "like": like,
            "train": train,
            "val": val,
            "test": test,
        }
        own |= {"name": name, "on_invalid": on_invalid, "replay": replay, "replay_share": replay_share}
        own |= {"code": code, "imports": imports}
        self._constructor: dict[str, Any] = {**own, **settings}

    def fit(
        self,
        train: Dataset | str | Path | None = None,
        val: Dataset | str | Path | None = None,
        test: Dataset | str | Path | None = None,
        *,
        name: str | None = None,
        quiet: bool = False,
        **settings: Any,
    ) -> Run:
        """Train and return the finished run. The worker ends with this process; Ctrl-C keeps the last checkpoint.

        With ``train`` alone, its own splits are used; where it has none, 20 % of the images are held out for a final
        test and 16 % for validation, spread evenly over the classes. Raises `detkit.errors.RunFailed`.
        """
        run = self.start(train, val, test, name=name, leash=True, **settings)
        return watch(run, quiet=quiet)

    def start(
        self,
        train: Dataset | str | Path | None = None,
        val: Dataset | str | Path | None = None,
        test: Dataset | str | Path | None = None,
        *,
        name: str | None = None,
        leash: bool = False,
        **settings: Any,
    ) -> Run:
        """Start training and return at once; the worker goes on when this process ends, unless on a leash."""
        ready = self.prepare(train, val, test, name=name, **settings)
        workspace = ready.fill(catalog.create_run(ready.job, ready.name))
        try:
            if ready.code is not None:
                trust.remember(ready.code.digest)
            _announce(workspace, ready.resolved, ready.told, leash)
            return ready.resolved.backend.start(ready.job, workspace, leash=leash)
        except BaseException:
            if not workspace.run_file.is_file():  # else it was begun, and may go on elsewhere
                shutil.rmtree(workspace.path, ignore_errors=True)
            raise

    def prepare(
        self,
        train: Dataset | str | Path | None = None,
        val: Dataset | str | Path | None = None,
        test: Dataset | str | Path | None = None,
        *,
        name: str | None = None,
        **settings: Any,
    ) -> Ready:
        """Return what `start` would lay out: settings resolved, data read and checked. Writes nothing."""
        return _make_ready(
            Settings({"train": train, "val": val, "test": test, "name": name, **settings}, self._constructor)
        )

    def plan(
        self,
        train: Dataset | str | Path | None = None,
        val: Dataset | str | Path | None = None,
        test: Dataset | str | Path | None = None,
        *,
        name: str | None = None,
        **settings: Any,
    ) -> Plan:
        """Return what `start` would do: data that travels, exact requests, worst-case time and money, what is wrong.

        The data is read and checked as for training. Nothing is started, and nothing created but for a while.
        """
        ready = self.prepare(train, val, test, name=name, **settings)
        with tempfile.TemporaryDirectory(prefix="detkit-plan-") as folder:
            workspace = ready.lay_out(Path(folder) / ready.path.name)
            plan = ready.resolved.backend.plan(ready.job, workspace)
        return replace(plan, notes=(*ready.told, *plan.notes))

    def resume(
        self,
        run: Run | str | Path,
        *,
        epochs: int | None = None,
        iterations: int | None = None,
        name: str | None = None,
        code: str | Path | None = None,
        quiet: bool = False,
        **options: Any,
    ) -> Run:
        """Continue an interrupted, stopped or failed run in place and return it when it is finished.

        With more ``epochs`` or ``iterations`` than a finished run did, a new run, ``name``, goes on from its last
        checkpoint with the same data and parameters. ``options`` replace those of the run. ``code`` is the folder of
        the modules that the run was started with, where that was on another account: naming it allows them. Raises
        `UsageError` where this trainer was given settings that the run does not have, and that are not given here.
        """
        found = run if isinstance(run, Run) else catalog.open_run(run)
        settings = {"epochs": epochs, "iterations": iterations, **options}
        self._refuse_other_settings(found.job, settings)
        going, since = go_on(found, settings, leash=True, name=name, code=code)
        return watch(going, quiet=quiet, since=since)

    def _refuse_other_settings(self, job: Job, given: Mapping[str, Any]) -> None:
        """Raise `UsageError` where the constructor's settings are not those of a run that is to go on."""
        has = {**job.params, **job.options, "model": f"{job.backend}/{job.model}", "backend": job.backend}
        other = {
            name: value
            for name, value in self._constructor.items()
            if value is not None
            and name not in {"code", "imports"}  # the run has its own copy
            and given.get(name) is None
            and str(value) not in (str(has.get(name)), job.model if name == "model" else None)
        }
        if other:
            told = ", ".join(f"{name}={value!r}" for name, value in other.items())
            raise UsageError(
                f"the run goes on with what it was started with, and Trainer({told}) has other settings; leave them "
                "out, Trainer().resume(run), or give to resume what may change: options, or a larger epochs="
            )

    def explain(self, **settings: Any) -> Explanation:
        """Return every effective setting, its origin, and what the framework will be told. Starts nothing."""
        resolved = resolve(Settings(settings, self._constructor))
        native = resolved.backend.translate(resolved.model, resolved.params)
        rows = [
            Row(
                name=name,
                value=value,
                origin=resolved.origins.get(name, "default"),
                kind=kind,  # type: ignore[arg-type]
                native=native.get(name, ""),
                description=describe(type(struct))[name],
            )
            for kind, struct in (("parameter", resolved.params), ("option", resolved.options))
            for name, value in msgspec.structs.asdict(struct).items()
        ]
        rehearsal = resolved.rehearsal
        return Explanation(
            backend=resolved.backend.name,
            model=resolved.model,
            reason=resolved.reason,
            rows=tuple(rows),
            like=rehearsal.dialect.name if rehearsal else "",
            notes=rehearsal.notes if rehearsal else (),
        )


def watch(run: Run, *, quiet: bool = False, since: int = 0) -> Run:
    """Follow a run to its end; Ctrl-C stops it, keeps its last checkpoint and is raised again.

    Only a run in a place that is paid and does not end with this process goes on, see `Run.on_interrupt`.
    """
    return follow(run, quiet=quiet, since=since, stop_on_interrupt=True)


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A job with its data, looked at, from which a run directory is laid out."""

    resolved: Resolved
    job: Job
    name: str | None
    """The run's, where it was given one."""
    gathered: Gathered
    told: list[str]
    parent: Model | None
    code: UserCode | None

    @property
    def path(self) -> Path:
        """Of the run directory, if nobody takes its number before."""
        return catalog.new_run_path(self.job.model, self.name)

    def lay_out(self, path: Path) -> Workspace:
        """Make a run directory that is named otherwise. Where that fails nothing stays of it."""
        workspace = Workspace(path)
        workspace.create(self.job)
        return self.fill(workspace)

    def fill(self, workspace: Workspace) -> Workspace:
        """Bring data, weights and code into a new run directory. Where that fails nothing stays of it."""
        try:
            for channel, ready in self.gathered.prepared.items():
                workspace.write_dataset(channel, ready.data, ready.image_digests)
            if self.parent is not None:
                for file in sorted(path for path in self.parent.path.rglob("*") if path.is_file()):
                    place(file, workspace.parent_model / file.relative_to(self.parent.path), lasting=True)
            if self.code is not None:
                self.code.copy_to(workspace.code)
            if (retention := self.gathered.retention) is not None:
                workspace.write_dataset(CHANNEL, retention.data, retention.image_digests)
        except BaseException:
            shutil.rmtree(workspace.path, ignore_errors=True)  # `create` made it, and nothing half-written may stay
            raise
        return workspace


def _make_ready(layers: Settings) -> Ready:
    """Resolve all settings, read the data and check both. Raises everything that can be known before a start."""
    resolved = resolve(layers)
    if resolved.rehearsal is not None:
        refuse(resolved.rehearsal.dialect, resolved.rehearsal.notes)
    if layers.get("train") is None:
        raise MissingSettings([("train", "the folder of your images and annotations")])
    resolved.backend.require(resolved.model, resolved.params, resolved.options)
    given_code = [setting.value if (setting := layers.get(name)) else None for name in ("code", "imports")]
    code, own_code = trust.prepare(*given_code)
    params, parent = _with_parent(resolved.params, resolved)
    seed = int(getattr(resolved.params, "seed", 0))
    on_invalid = _one_of("on_invalid", layers.get("on_invalid"), ("raise", "drop"), "raise")
    given = {name: setting.value for name in ("train", "val", "test") if (setting := layers.get(name)) is not None}
    found = gather(given, Replay.read(layers, parent), parent, on_invalid=on_invalid, seed=seed, code=code)
    told = [*(tell(resolved.rehearsal, found.prepared) if resolved.rehearsal is not None else []), *found.told]
    if own_code is not None:
        told.append(f"code {own_code.source}: {len(own_code.files)} files, sha256 {own_code.digest[:12]}...")
    channels = {channel: ready.data for channel, ready in found.prepared.items()}
    resolved.backend.require_data(resolved.model, resolved.params, channels)
    params = _with_auto_detections(params, channels["train"])
    job = Job(
        backend=resolved.backend.name,
        engine=resolved.backend.engine_of(resolved.model),
        model=resolved.model,
        params=msgspec.to_builtins(params),
        options=msgspec.to_builtins(resolved.options),
        classes=list(channels["train"].classes),
        versions=plugins.versions(resolved.backend.name),
        dropped=found.dropped,
        replayed=found.replayed,
        retention=found.retention.what if found.retention is not None else "",
        code=code,
    )
    name = layers.get("name")
    return Ready(
        resolved=resolved,
        job=job,
        name=name.value if name else None,
        gathered=found,
        told=told,
        parent=parent,
        code=own_code,
    )


def _with_auto_detections(params: Params, train: Dataset) -> Params:
    if getattr(params, "max_detections", None) != "auto":
        return params
    return msgspec.structs.replace(params, max_detections=max(100, 2 * int(train.boxes_per_image().max(initial=0))))


def _with_parent(params: Params, resolved: Resolved) -> tuple[Params, Model | None]:
    """Make ``weights`` what the engine understands: one of the model's words, None, a file, or a parent model."""
    weights = getattr(params, "weights", None)
    if weights is None or weights in resolved.spec.weights:
        return params, None
    path = Path(weights)
    if path.is_file() and (path.parent / "detkit.json").is_file():
        weights = path.parent  # a finished model's own file: class names and seen images come with it
    elif path.is_file():
        return msgspec.structs.replace(params, weights=str(path.absolute())), None
    try:
        parent = find_model(weights)
    except UnknownName:
        known = [*resolved.spec.weights, "none", "the path of a file", "a run"]
        raise UnknownName(f"weights for {resolved.backend.name}/{resolved.model}", str(weights), known) from None
    own = resolved.backend.trained_name(resolved.model)
    if parent.name != own:
        raise UsageError(
            f"weights={str(weights)!r} is a {parent.name}; training a {own} can only start from one of its own kind"
        )
    if not resolved.backend.starts_from_models(resolved.model):
        raise Unsupported(f"backend {resolved.backend.name!r} cannot start from an earlier model")
    return msgspec.structs.replace(params, weights=str(parent.path.absolute())), parent


def _announce(workspace: Workspace, resolved: Resolved, told: list[str], leash: bool) -> None:
    first = f"model {resolved.backend.name}/{resolved.model}" + (f": {resolved.reason}" if resolved.reason else "")
    lives = life(leash and resolved.backend.leashed)
    run = f"run {os.path.relpath(workspace.path)}; the worker {lives}"
    events: list[dict[str, float | str]] = [{"message": first}, {"message": run}]
    if resolved.rehearsal is not None:
        events.append(request_of(resolved.rehearsal))
    events += [{"message": message} for message in told]
    for values in events:
        workspace.log("log", values)


def _one_of(name: str, setting: Setting | None, allowed: tuple[Any, ...], default: Any) -> Any:
    if setting is None:
        return default
    if setting.value not in allowed:
        raise InvalidValue(name, setting.value, f"one of {', '.join(map(str, allowed))}", setting.origin)
    return setting.value
