"""Going on with a run: in place where it was interrupted, in a new run directory where it had finished."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from detkit import catalog, launching, plugins, trust
from detkit.backends import Backend
from detkit.checkpoints import CHOICES
from detkit.errors import UnknownName, Unsupported, UsageError
from detkit.files import file_sha256, place, place_all
from detkit.job import Continued, Job, Workspace
from detkit.params import set_fields
from detkit.runs import Run

LENGTHS = ("epochs", "iterations")


def go_on(
    run: Run, settings: Mapping[str, Any], *, leash: bool, name: str | None = None, code: str | Path | None = None
) -> tuple[Run, int]:
    """Start the worker of a run again; with ``epochs`` or ``iterations`` in the settings, of a new run that is longer.

    Returns that run, and the `Run.position` at which what is new begins.
    All other settings are options of the backend, which then replace those of the run: its parameters stay. ``code``
    is the folder of the modules that it was started with; naming it allows them. Raises `UsageError` where the run
    cannot go on like that, `Unsupported` where its backend cannot.
    """
    if code is not None:
        trust.allow(run.job, code)
    given = {key: value for key, value in settings.items() if value is not None}
    length = {key: given.pop(key) for key in LENGTHS if key in given}
    if not length:
        if name is not None:
            raise UsageError(f"a run goes on under its own name; name={name!r} is for epochs=N, which makes a new run")
        since = run.position
        return run.resume(leash=leash, options=_options(run.job, given) if given else None), since
    shown = " ".join(f"{key}={value}" for key, value in length.items())
    if run.status != "finished":
        raise UsageError(
            f"run {run.path} is {run.status}, and {shown} would make a finished one longer; resume it first: "
            f"`detkit train --resume {os.path.relpath(run.path)}`"
        )
    job = run.job
    backend = plugins.backend(job.backend)
    if getattr(backend, "resume", None) is None:
        raise Unsupported(f"backend {backend.name!r} cannot go on with a run; start a new one with weights={run.path}")
    params = set_fields(msgspec.convert(job.params, type(backend.spec(job.model).params)), length, kind="parameter")
    step = run.last_step
    epoch = max((event.epoch for event in run.events(follow=False) if event.epoch is not None), default=0.0)
    for key, done in (("epochs", epoch), ("iterations", step)):
        wanted = getattr(params, key)
        if key in length and wanted is not None and wanted <= done:
            raise UsageError(
                f"{key}={wanted} is not longer than what {run.path} did, {epoch:g} epochs in {step} steps; give more"
            )
    kept = [
        path
        for path in run.workspace.checkpoints.rglob("*")
        if path.is_file() and not path.name.startswith(("damaged-", "."))
    ]
    if all(path.name in CHOICES for path in kept):  # which states an engine keeps is its own affair
        raise UsageError(
            f"the checkpoints of {run.path} are gone, so nothing can go on from them; start a new run from its "
            f"weights, with weights={os.path.relpath(run.path)}"
        )
    longer = msgspec.structs.replace(
        job,
        params=msgspec.to_builtins(params),
        options={**job.options, **_options(job, given)},
        versions=plugins.versions(job.backend),
        continued_from=Continued(run=run.name, manifest=file_sha256(run.workspace.model / "detkit.json"), step=step),
    )
    workspace = catalog.create_run(longer, name)
    try:
        place_all(run.workspace.path / "input/data", workspace.path / "input/data", but={"job"})
        for path in kept:
            place(path, workspace.checkpoints / path.relative_to(run.workspace.checkpoints), lasting=True)
        _announce(workspace, run, longer, epoch, f"{shown}; the worker " + life(leash))
        return backend.start(longer, workspace, leash=leash), 0
    except BaseException:
        if not workspace.run_file.is_file():  # else it was begun, and may go on elsewhere
            shutil.rmtree(workspace.path, ignore_errors=True)  # `create` made it, and nothing half-written may stay
        raise


def life(leash: bool) -> str:
    """Say how long a worker lives."""
    return "ends with this process" if leash else "goes on when this process ends; attach to it by its directory"


def _options(job: Job, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check options of a job's backend, given anew, and return them as JSON has them."""
    backend: Backend = plugins.backend(job.backend)
    known = backend.options.__struct_fields__
    for name in given:
        if name in job.params:
            raise UsageError(
                f"{name} is a parameter, and a run goes on with those it was started with; only options can be given "
                f"({', '.join(known)}), and a larger epochs= or iterations= where it is finished"
            )
        if name not in known:
            raise UnknownName(f"option of {backend.name}", name, [*known, *LENGTHS])
    checked = msgspec.to_builtins(set_fields(backend.options(), given, kind="option"))
    new = {name: checked[name] for name in given}
    launching.check({**job.options, **new})
    return new


def _announce(workspace: Workspace, run: Run, job: Job, epoch: float, rest: str) -> None:
    assert job.continued_from is not None
    here, there = os.path.relpath(workspace.path), os.path.relpath(run.path)
    step = job.continued_from.step
    for message in (
        f"model {job.backend}/{job.model}",
        f"run {here} goes on from {there}, {epoch:g} epochs in {step} steps done, to {rest}",
    ):
        workspace.log("log", {"message": message})
