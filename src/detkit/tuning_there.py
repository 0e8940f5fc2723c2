"""A search that a place does by itself: followed, its trials brought here as runs and into the study."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeGuard

import msgspec

from detkit import catalog
from detkit.backends import Backend
from detkit.errors import DetkitError, InvalidValue, RunFailed, UsageError
from detkit.events import Event
from detkit.files import place_all
from detkit.plugins import backend as find_backend
from detkit.proofs import prove
from detkit.spaces import Choice, Int, Scalar, chosen, steps_of
from detkit.studies import Study, short
from detkit.study_storage import distribution, import_optuna
from detkit.trials import HELD_BACK, Watcher, course_of
from detkit.tuning import PlaceTrial, TrialState, TuningJob

_POLL_S = 1.0
_PAUSE_S, _LAST_TRIES = 20.0, 3
"""A trial that could not be brought is tried again after a pause; when the search is over, so often."""


def search_there(study: Study, backend: Backend, watcher: Watcher, *, deadline: float) -> None:
    """Start the search unless it goes on already, and follow it to its end. Ctrl-C leaves it running.

    Raises `RunFailed` with what the place says where it fails, and where a trial cannot be brought here; that one is
    not in the study then, and is fetched when the search is followed again.
    """
    workspace = study.workspace
    if (study.path / "tuning.json").is_file():
        job = backend.attach_tuning(workspace)
    else:
        job = _begun(study, backend, watcher)
    watcher.said(f"{job.name} searches at {backend.name}; it goes on without this process")
    mirror = _Mirror(study, job, watcher)
    stopped = False
    while True:
        status = job.status
        mirror.look()
        watcher.changed(study, {})
        if status != "running":
            break
        if time.monotonic() > deadline and not stopped:
            watcher.said("the time is over: the search is stopped")
            job.stop()
            stopped = True
        time.sleep(_POLL_S)
    mirror.look_for_the_last()
    watcher.changed(study, {})
    failed = f"{job.name} failed: {job.reason}" if job.status == "failed" else ""
    if faults := [fault for fault in (failed, mirror.what_is_missing()) if fault]:
        raise RunFailed("\n".join(faults))
    if job.status == "finished":
        study.raise_if_all_failed()
    if job.reason:
        watcher.said(f"{job.name} was stopped: {job.reason}")


def stop_there(study: Study) -> None:
    """Ask a place to end the search that it does by itself. Raises `UsageError` where none was begun."""
    if not (study.path / "tuning.json").is_file():
        raise UsageError(f"{study.path} does not go on at a place; what is searched on a machine is stopped by Ctrl-C")
    find_backend(study.record.backend).attach_tuning(study.workspace).stop()


def _begun(study: Study, backend: Backend, watcher: Watcher) -> TuningJob:
    """Start the search, and say what the place says of it. Where nothing was begun, nothing stays of the study."""
    workspace = study.workspace
    try:
        job = backend.tune(workspace.job(), workspace, study.search)
    except BaseException:
        if not (study.path / "tuning.json").is_file():
            shutil.rmtree(study.path, ignore_errors=True)
        raise
    for line in workspace.metrics_file.read_bytes().splitlines() if workspace.metrics_file.is_file() else ():
        event = msgspec.json.decode(line, type=Event)
        if event.kind == "log":
            watcher.said(str(event.values["message"]))
    return job


class _Mirror:
    """Makes a study have the trials of a place, each once it has ended and is here."""

    def __init__(self, study: Study, job: TuningJob, watcher: Watcher) -> None:
        self._study, self._job, self._watcher = study, job, watcher
        self._told: set[str] = set()
        """Jobs that were said to have begun."""
        self._missing: dict[str, str] = {}
        """Jobs that have ended and could not be brought here, and why."""
        self._again = 0.0  # not before then these are tried again

    def look(self, *, at_once: bool = False) -> None:
        """Add the trials that have ended, and say of those that run what they try."""
        known = {trial.facts.job for trial in self._study.trials}
        tries_again = at_once or time.monotonic() >= self._again
        for trial in self._job.trials():
            if trial.state == "running" and trial.name not in self._told:
                self._told.add(trial.name)
                values = "  ".join(f"{name}={short(value)}" for name, value in trial.values.items())
                self._watcher.said(f"{trial.name} begins: {values}")
            is_due = trial.name not in self._missing or tries_again
            if trial.state not in {"running", "waiting"} and trial.name not in known and is_due:
                self._add(trial)

    def look_for_the_last(self) -> None:
        """Try a few times more to bring what is missing."""
        for _ in range(_LAST_TRIES):
            if not self._missing:
                return
            time.sleep(_PAUSE_S)
            self.look(at_once=True)

    def what_is_missing(self) -> str:
        """Say which trials could not be brought here, and how they can be; nothing where all are."""
        if not self._missing:
            return ""
        *_, why = self._missing.values()
        return (
            f"{len(self._missing)} trial(s) of {self._study.path} have ended and could not be brought here: "
            f"{', '.join(self._missing)}; the last: {why}. nothing of them is lost; "
            f"`detkit tune --resume {self._study.path}` fetches them"
        )

    def _add(self, trial: PlaceTrial) -> None:
        """Bring a trial and record it, or put that off where it may work later."""
        study, states = self._study, import_optuna().trial.TrialState
        number = len(study.frozen_trials())
        path = study.path / "trials" / f"{number:04d}"
        state, reason, value = trial.state, trial.reason if trial.state == "failed" else "", trial.value
        if value is not None and not math.isfinite(value):
            state, reason, value = "failed", f"{study.search.metric} is {value}", None
        elif state == "finished" and value is None:
            state, reason = "failed", f"{study.search.metric} never appeared"
        values, fault = _values(study, trial)
        if state != "failed":
            try:
                state, reason = self._bring(trial, path, number)
            except (DetkitError, OSError) as error:
                self._put_off(trial, error)
                return
            if fault:
                state, reason = "failed", fault
            if reason:
                self._watcher.said(f"trial {number} ({trial.name}) is {state}: {reason}")
        self._missing.pop(trial.name, None)
        facts: dict[str, Any] = {"job": trial.name, "reason": reason}
        course: dict[int, float] = {}
        if (path / "run.json").is_file():
            facts["run"] = str(path.relative_to(study.path))
            course = course_of(catalog.open_run(path), study.search.metric)
        if state != "failed" and (same := _same_values(study, values)) is not None:
            facts["repeats"] = same
            self._watcher.said(f"trials {same} and {number} have the same values; the place trained both")
        frozen = import_optuna().trial.create_trial(
            state={"finished": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[state],
            params=values,
            distributions={name: distribution(study.search.space[name]) for name in values},
            value=value if state == "finished" else None,
            intermediate_values=course or ({100: value} if state == "pruned" and value is not None else {}),
            user_attrs={name: fact for name, fact in facts.items() if fact != ""},
        )
        if trial.seconds is not None:
            frozen.datetime_start = frozen.datetime_complete - timedelta(seconds=trial.seconds)
        study.optuna_study.add_trial(frozen)

    def _bring(self, trial: PlaceTrial, path: Path, number: int) -> tuple[TrialState, str]:
        """Make a trial's run directory; return what the trial counts as, and why where that is not what was said.

        Raises what `TuningJob.bring` does where it may work later.
        """
        try:
            run = self._job.bring(trial, path)
        except RunFailed as error:
            return "failed", str(error)
        if run.status == "stopped":  # its value is of weights that nobody can open
            why = f"its time limit ended it before there was a model; `detkit train --resume {path}` goes on with it"
            return "pruned", why if trial.state == "finished" else ""
        if run.status != "finished":
            told = run.workspace.failure_file
            return "failed", told.read_text() if told.is_file() else f"its run is {run.status}"
        place_all(self._study.workspace.channel(HELD_BACK), run.workspace.channel(HELD_BACK))
        try:
            searched = {name: value for name, value in trial.values.items() if name in self._study.search.space}
            prove(run, searched, self._study.params, number)
        except DetkitError as error:
            return "failed", str(error)
        return trial.state, ""

    def _put_off(self, trial: PlaceTrial, error: Exception) -> None:
        if trial.name not in self._missing:
            self._watcher.said(f"{trial.name} has ended, and could not be brought here; tried again soon: {error}")
        self._missing[trial.name] = str(error)
        self._again = time.monotonic() + _PAUSE_S


def _same_values(study: Study, values: Mapping[str, Scalar]) -> int | None:
    """Return the number of the first trial with these values that was trained."""
    for trial in study.trials:
        if trial.values == values and trial.state != "failed" and trial.facts.repeats is None:
            return trial.number
    return None


def _values(study: Study, trial: PlaceTrial) -> tuple[dict[str, Scalar], str]:
    """Return a trial's values as the study's space has them, and what is wrong with those that it does not have."""
    found: dict[str, Scalar] = {}
    faults: list[str] = []
    for name, range_ in study.search.space.items():
        if not chosen(range_, trial.values, study.params):
            continue
        if name not in trial.values:
            faults.append(f"nobody told which {name} was chosen")
            continue
        try:
            found[name] = _nearest(study, name, trial.values[name])
        except InvalidValue as error:
            faults.append(str(error))
    return found, "; ".join(faults)


def _nearest(study: Study, name: str, value: Scalar) -> Scalar:
    """Return a value of the space: of numbers that it does not have, as digits are lost on the way, the nearest."""
    with contextlib.suppress(InvalidValue):
        return study.fit(name, value)
    range_ = study.search.space[name]
    if not _is_number(value):
        return study.fit(name, value)
    if isinstance(range_, Choice):
        near: list[float] = [one for one in range_.values if _is_number(one)]
    elif range_.log or range_.step in (None, 1):
        near = [min(max(value, range_.low), range_.high)]
    else:
        near = steps_of(range_)
    nearest = min(near, key=lambda one: abs(one - value), default=value)
    return study.fit(name, round(nearest) if isinstance(range_, Int) else nearest)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
