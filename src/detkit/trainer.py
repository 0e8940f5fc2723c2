"""Training, with any backend, by one call."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from detkit import catalog, plugins
from detkit.backends import Backend, LocalBackend, ModelSpec
from detkit.channels import divide, leaks, prepare_all, remarks, without_copies
from detkit.data import Dataset
from detkit.dialects import Note, refuse, typed
from detkit.errors import MissingSettings, UnknownName, Unsupported, UsageError, did_you_mean
from detkit.files import place
from detkit.formats.checks import Prepared
from detkit.job import Job, Model, Workspace
from detkit.live import follow
from detkit.params import INSTEAD, Options, Params, describe, nullable, set_fields
from detkit.predictor import find_model
from detkit.rehearsal import Rehearsal, refuse_contradictions, rehearse, weights_by_path
from detkit.runs import Run
from detkit.settings import Setting, Settings

OWN_SETTINGS = ("model", "backend", "like", "train", "val", "test", "name", "on_invalid")
"""Settings that the trainer itself understands; all others are parameters and options of the backend."""


class Row(msgspec.Struct, frozen=True):
    """One line of `Explanation`."""

    name: str
    value: Any
    origin: str
    kind: Literal["parameter", "option"]
    native: str
    """What the framework is told, where that differs."""
    description: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Every effective setting of a training call and where it came from."""

    backend: str
    model: str
    reason: str
    """Why this model, where it was chosen automatically."""
    rows: tuple[Row, ...]
    like: str = ""
    """Whose hyperparameters were given, if another tool's."""
    notes: tuple[Note, ...] = ()
    """What each of those becomes here."""

    def to_dict(self) -> dict[str, Any]:
        rows, notes = ([msgspec.structs.asdict(row) for row in found] for found in (self.rows, self.notes))
        about = {"backend": self.backend, "model": self.model, "reason": self.reason, "like": self.like}
        return {**about, "hyperparameters": notes, "settings": rows}


@dataclass(frozen=True, kw_only=True)
class _Resolved:
    backend: Backend
    model: str
    spec: ModelSpec
    params: Params
    options: Options
    origins: Mapping[str, str]
    reason: str
    rehearsal: Rehearsal | None = None


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
        **settings: Any,
    ) -> None:
        own = {"model": model, "backend": backend, "like": like, "train": train, "val": val, "test": test}
        self._constructor: dict[str, Any] = {**own, "name": name, "on_invalid": on_invalid, **settings}

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
        call = {"train": train, "val": val, "test": test, "name": name, **settings}
        layers = Settings(call, self._constructor)
        resolved = _resolve(layers)
        if resolved.rehearsal is not None:
            refuse(resolved.rehearsal.dialect, resolved.rehearsal.notes)
        if layers.get("train") is None:
            raise MissingSettings([("train", "the folder of your images and annotations")])
        resolved.backend.require(resolved.model, resolved.params, resolved.options)
        params, parent = _with_parent(resolved.params, resolved)
        seed = int(getattr(resolved.params, "seed", 0))
        on_invalid = _one_of("on_invalid", layers.get("on_invalid"), ("raise", "drop"), "raise")
        given = {name: setting.value for name in ("train", "val", "test") if (setting := layers.get(name)) is not None}
        channels, told, held_out = divide(given, seed)
        classes = channels["train"].classes
        prepared = prepare_all(
            {name: data.with_classes(classes, f"{name} data") for name, data in channels.items()}, on_invalid
        )
        if held_out:
            told += without_copies(prepared)
        told += remarks(prepared)
        if not len(prepared["train"].data.boxes):
            raise UsageError("the training images have no boxes; there is nothing to learn")
        told += leaks(prepared, parent)
        if resolved.rehearsal is not None:
            told = [*_tell(resolved.rehearsal, prepared), *told]
        params = _with_auto_detections(params, prepared["train"].data)
        name_setting = layers.get("name")
        workspace = Workspace(catalog.new_run_path(resolved.model, name_setting.value if name_setting else None))
        dropped = Counter[str]()
        for ready in prepared.values():
            dropped.update(ready.dropped)
        job = Job(
            backend=resolved.backend.name,
            engine=resolved.backend.engine if isinstance(resolved.backend, LocalBackend) else "",
            model=resolved.model,
            params=msgspec.to_builtins(params),
            options=msgspec.to_builtins(resolved.options),
            classes=list(classes),
            versions=plugins.versions(resolved.backend.name),
            dropped=dict(dropped),
        )
        workspace.create(job)
        try:
            _lay_out(workspace, prepared, parent)
            _announce(workspace, resolved, told, leash)
            return resolved.backend.start(job, workspace, leash=leash)
        except BaseException:
            shutil.rmtree(workspace.path, ignore_errors=True)  # `create` made it, and nothing half-written may stay
            raise

    def resume(self, run: Run | str | Path, *, quiet: bool = False) -> Run:
        """Continue an interrupted, stopped or failed run in place and return it when it is finished."""
        found = run if isinstance(run, Run) else catalog.open_run(run)
        since = found.position
        return watch(found.resume(leash=True), quiet=quiet, since=since)

    def explain(self, **settings: Any) -> Explanation:
        """Return every effective setting, its origin, and what the framework will be told. Starts nothing."""
        resolved = _resolve(Settings(settings, self._constructor))
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
    """Follow a run to its end; Ctrl-C stops it, keeps its last checkpoint and is raised again."""
    try:
        return follow(run, quiet=quiet, since=since)
    except KeyboardInterrupt:
        if not quiet:
            print("stopping after this step; the last checkpoint stays", file=sys.stderr)
        run.stop()
        raise


def _resolve(layers: Settings) -> _Resolved:
    """Find backend and model, route every other setting to parameters or options, and check them."""
    rehearsal = rehearse(layers)
    if rehearsal is None:
        model, backend, reason = _choose(layers.get("model"), layers.get("backend"))
    else:
        model, backend, reason = rehearsal.model, rehearsal.backend, ""
    spec = backend.spec(model)
    theirs = rehearsal.params.__struct_fields__ if rehearsal else ()
    param_names = [name for name in spec.params.__struct_fields__ if name not in theirs]
    option_names = backend.options.__struct_fields__
    known = [*theirs, *param_names, *option_names, *OWN_SETTINGS]
    for name, setting in layers.written().items():
        if name not in known:
            like = f" like {rehearsal.dialect.name}" if rehearsal else ""
            hint = rehearsal.dialect.hints.get(name, "") if rehearsal else ""
            raise UnknownName(f"setting of {backend.name}/{model}{like} (given in {setting.origin})", name, known, hint)
    given_params = layers.choose(param_names, INSTEAD, nullable(type(spec.params)))
    given_options = layers.choose(option_names, {})
    if "weights" in given_params:
        given_params["weights"] = weights_by_path(given_params["weights"])
    origins = {name: setting.origin for name, setting in {**given_params, **given_options}.items()}
    values = {name: setting.value for name, setting in given_params.items()}
    params = set_fields(spec.params, values, kind="parameter", origins=origins)
    if rehearsal is not None:
        said = rehearsal.said
        origins |= {name: rehearsal.notes_on(name)[-1].name or rehearsal.dialect.name for name in said}
        translated = set_fields(spec.params, said, kind="parameter", origins=origins)
        refuse_contradictions(given_params, params, layers.get("model"), translated, rehearsal)
        params = set_fields(spec.params, {**values, **said}, kind="parameter", origins=origins)
    options = set_fields(
        backend.options(), {n: s.value for n, s in given_options.items()}, kind="option", origins=origins
    )
    return _Resolved(
        backend=backend,
        model=model,
        spec=spec,
        params=params,
        options=options,
        origins=origins,
        reason=reason,
        rehearsal=rehearsal,
    )


def _choose(model: Setting | None, backend: Setting | None) -> tuple[str, Backend, str]:
    wanted = "auto" if model is None else str(model.value)
    if wanted == "auto":
        candidates = [plugins.backend(str(backend.value))] if backend else list(plugins.backends().values())
        for candidate in candidates:
            suggestion = candidate.suggest()
            if suggestion is not None:
                return suggestion.model, candidate, suggestion.reason
        raise UsageError(
            "no installed backend suggests a model; install one (pip install detkit-torchvision) or name a model, "
            "see `detkit models`"
        )
    engine, slash, name = wanted.partition("/")
    if backend is not None:
        chosen = plugins.backend(str(backend.value))
        return (name if slash and engine == chosen.name else wanted), chosen, ""
    if slash:
        return name, plugins.backend(engine), ""
    having = [candidate for candidate in plugins.backends().values() if wanted in candidate.models]
    if len(having) == 1:
        return wanted, having[0], ""
    every = [f"{b.name}/{m}" for b in plugins.backends().values() for m in b.models]
    if having:
        raise UsageError(f"model {wanted!r} is offered by {', '.join(b.name for b in having)}; write backend/model")
    bare = {name.partition("/")[2] for name in every}
    raise UnknownName("model", wanted, every, did_you_mean(wanted, bare).strip())


def _with_auto_detections(params: Params, train: Dataset) -> Params:
    if getattr(params, "max_detections", None) != "auto":
        return params
    return msgspec.structs.replace(params, max_detections=max(100, 2 * int(train.boxes_per_image().max(initial=0))))


def _with_parent(params: Params, resolved: _Resolved) -> tuple[Params, Model | None]:
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
    if parent.manifest.backend != resolved.backend.name or parent.manifest.model != resolved.model:
        raise UsageError(
            f"weights={str(weights)!r} is a {parent.name}; training a {resolved.backend.name}/{resolved.model} "
            "can only start from one of its own kind"
        )
    if isinstance(resolved.backend, LocalBackend) and not resolved.backend.incremental:
        raise Unsupported(f"backend {resolved.backend.name!r} cannot start from an earlier model")
    return msgspec.structs.replace(params, weights=str(parent.path.absolute())), parent


def _tell(rehearsal: Rehearsal, prepared: Mapping[str, Prepared]) -> list[str]:
    """Compare the hyperparameters with the data; return what is not the same here, and what the data has to say."""
    dialect, notes = rehearsal.dialect, rehearsal.notes
    channels = {name: ready.data for name, ready in prepared.items()}
    found = dialect.check(rehearsal.params, channels) if dialect.check else ()
    refuse(dialect, found)
    without_effect = [note for note in notes if note.fidelity == "unused" and note.origin != "default"]
    approximate = [note for note in notes if note.fidelity == "approximate"]
    return [str(note) for note in (*approximate, *without_effect, *found)]


def _lay_out(workspace: Workspace, prepared: Mapping[str, Prepared], parent: Model | None) -> None:
    for channel, ready in prepared.items():
        workspace.write_dataset(channel, ready.data, ready.image_digests)
    if parent is not None:
        for file in sorted(path for path in parent.path.rglob("*") if path.is_file()):
            place(file, workspace.parent_model / file.relative_to(parent.path))


def _announce(workspace: Workspace, resolved: _Resolved, told: list[str], leash: bool) -> None:
    life = "ends with this process" if leash else "goes on when this process ends; attach to it by its directory"
    shown = os.path.relpath(workspace.path)
    first = f"model {resolved.backend.name}/{resolved.model}" + (f": {resolved.reason}" if resolved.reason else "")
    events: list[dict[str, float | str]] = [{"message": first}, {"message": f"run {shown}; the worker {life}"}]
    if resolved.rehearsal is not None:
        events.append(_request(resolved.rehearsal))
    events += [{"message": message} for message in told]
    for values in events:
        workspace.log("log", values)


def _request(rehearsal: Rehearsal) -> dict[str, float | str]:
    """Return the event that keeps what was asked for: the given hyperparameters to read, all of them to compare."""
    given = typed({note.name: note.value for note in rehearsal.notes if note.origin != "default"})
    return {
        "message": f"like {rehearsal.dialect.name}, given {given or 'nothing'}; its defaults for the rest",
        "like": rehearsal.dialect.name,
        "hyperparameters": msgspec.json.encode(rehearsal.params).decode(),
    }


def _one_of(name: str, setting: Setting | None, allowed: tuple[Any, ...], default: Any) -> Any:
    from detkit.errors import InvalidValue

    if setting is None:
        return default
    if setting.value not in allowed:
        raise InvalidValue(name, setting.value, f"one of {', '.join(map(str, allowed))}", setting.origin)
    return setting.value
