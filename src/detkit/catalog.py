"""The folder of runs: where new ones go, and how a name, ``last`` or ``best`` finds one again."""

from __future__ import annotations

import os
import re
import time
import warnings
from pathlib import Path

import msgspec

from detkit import plugins
from detkit.errors import PluginError, RunExists, UnknownName, UsageError
from detkit.job import Job, Workspace
from detkit.runs import LocalRun, Run, RunRecord


def runs_folder() -> Path:
    """Return ``DETKIT_RUNS``, else ``runs`` under the current folder."""
    return Path(os.environ.get("DETKIT_RUNS") or "runs")


def new_run_path(model: str, name: str | None = None) -> Path:
    """Return the directory of a new run: ``name``, else ``<date>-<model>-<n>``."""
    if name is not None:
        return Path(name) if os.sep in name else runs_folder() / name
    stem = f"{time.strftime('%Y%m%d')}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', model)}"
    taken = {path.name for path in runs_folder().glob(f"{stem}-*")}
    return runs_folder() / f"{stem}-{next(n for n in range(1, len(taken) + 2) if f'{stem}-{n}' not in taken)}"


def create_run(job: Job, name: str | None = None) -> Workspace:
    """Lay out the empty directory of a new run, see `new_run_path`. Raises `RunExists` for a name that is taken.

    A run without a name takes the next number where another process takes its number at the same moment.
    """
    while True:
        path = new_run_path(job.model, name)
        workspace = Workspace(path)
        try:
            workspace.create(job)
        except RunExists:
            if new_run_path(job.model, name) == path:  # no other number would help
                raise
        else:
            return workspace


def open_run(name: str | Path) -> Run:
    """Find a run by its directory, its name in the folder of runs, ``last`` or ``best``.

    ``last`` is the one started last. ``best`` is the finished one with the highest ``val/AP`` among those validated on
    the same images as the last finished one. Raises `UsageError`.
    """
    if str(name) in {"last", "best"}:
        return _last() if str(name) == "last" else _best()
    is_path = isinstance(name, Path) or os.sep in name
    for path in (Path(name),) if is_path else (Path(name), runs_folder() / name):
        if (path / "run.json").is_file():
            return _attach(path)
    for path in (Path(name), runs_folder() / name):
        if (path / "study.json").is_file():
            raise UsageError(f"{path} is a study of many runs; see `detkit studies show {path}`")
    if Path(name).is_dir():
        raise UsageError(f"{name} holds no run: there is no run.json in it")
    raise UnknownName("run", str(name), [run.name for run in list_runs()], "`last` and `best` are names, too")


def list_runs() -> list[Run]:
    """Return every run of the folder of runs, the one started last at the end."""
    found: list[tuple[float, Run]] = []
    for file in runs_folder().glob("*/run.json"):
        try:
            found.append((_record(file.parent).created, _attach(file.parent)))
        except UsageError as error:  # the others are still of use
            warnings.warn(f"run {file.parent} is left out: {error}", stacklevel=2)
    return [run for _, run in sorted(found, key=lambda pair: pair[0])]


def _last() -> Run:
    found = list_runs()
    if not found:
        raise UsageError(f"there is no run in {runs_folder()}; train one with `detkit train DATA`")
    return found[-1]


def _best() -> Run:
    finished = [run for run in list_runs() if _has_ap(run)]
    if not finished:
        raise UsageError(f"no finished run in {runs_folder()} has a val/AP")
    images = finished[-1].model.manifest.data["validation"]["digest"]
    comparable = [run for run in finished if run.model.manifest.data["validation"]["digest"] == images]
    return max(comparable, key=lambda run: run.model.manifest.metrics["val/AP"])


def _has_ap(run: Run) -> bool:
    try:
        return run.status == "finished" and "val/AP" in run.model.manifest.metrics
    except UsageError:  # a model of another version of detkit
        return False


def _record(path: Path) -> RunRecord:
    file = path / "run.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=RunRecord)
    except msgspec.DecodeError as error:
        raise UsageError(f"{file} was written by another version of detkit, or is damaged: {error}") from None


def _attach(path: Path) -> Run:
    name = _record(path).backend
    try:
        backend = plugins.backend(name)
    except (UnknownName, PluginError):  # not installed here, which is no reason to hide the run and those beside it
        return LocalRun(Workspace(path))
    return backend.attach(Workspace(path))
