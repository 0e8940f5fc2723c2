"""The trials of a study as runs: begun, watched, ended early where they are behind, and recorded with a proof."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from detkit import catalog, plugins, study_storage, trust
from detkit.backends import Backend
from detkit.errors import DetkitError, InvalidValue, RunFailed, UsageError
from detkit.events import Event
from detkit.files import place_all
from detkit.job import Job, Workspace
from detkit.params import Params, set_fields
from detkit.proofs import prove
from detkit.searching import grid, make_pruner, make_sampler, share_of_money, suggest
from detkit.spaces import Scalar, chosen, defaults_in, in_order
from detkit.studies import Facts, Study, Trial, facts_of, this_host
from detkit.study_storage import import_optuna

if TYPE_CHECKING:
    import optuna

    from detkit.runs import Run

HELD_BACK = "test"
"""The channel that no trial is given; it is laid beside a trial's others when its training has ended."""

_POLL_S, _LOOK_S = 0.1, 2.0
"""How often the runs are asked what is new, and the storage where there was nothing to begin."""
_STOPS = 5
"""So often a run that was told to end is told so again, each time waiting for its end as long as its place does."""
_PATIENCE_S = 300.0
"""How long a server may be silent."""
_GIVEN_UP_AFTER = 3
"""Trials that failed, where none has finished, after which the search ends."""


_TAKEN = "others do it anew, as they had not heard of this process for long"


class Watcher(Protocol):
    """Who is told how the search goes."""

    def changed(self, study: Study, progress: Mapping[int, str]) -> None:
        """A trial began or ended, or came further: ``progress`` says how far each running one is."""

    def said(self, message: str) -> None:
        """There is something to read."""


@dataclass
class _Going:
    """A trial whose run goes on."""

    trial: optuna.Trial
    values: dict[str, Scalar]
    run: Run
    slot: int
    read: int = 0
    """Bytes of events that were read."""
    step: int = 0
    total_steps: float = 0.0
    pruned: bool = False
    lost: bool = False
    """Whether others, who had not heard of this process for long, do the trial anew."""
    seen: set[int] = field(default_factory=set)
    """The percents at which the metric was reported."""


@dataclass
class _Twin:
    """A trial with the values of one that runs, of which it waits for the result."""

    trial: optuna.Trial
    values: dict[str, Scalar]
    of: int
    """The number of the other."""


class Trials:
    """Does the trials of a study, some at once, until there are as many as wanted or the time is over."""

    def __init__(
        self, study: Study, watcher: Watcher, *, deadline: float = math.inf, devices: Sequence[str] = ()
    ) -> None:
        """``deadline`` is a `time.monotonic`; ``devices`` are given to the trials that run at once, one each."""
        self._study, self._watcher, self._deadline = study, watcher, deadline
        self._devices = tuple(devices)
        self._search = study.search
        self._job: Job = study.workspace.job()
        self._backend: Backend = plugins.backend(self._job.backend)
        self._params: Params = study.params
        self._order = in_order(self._search.space)
        self._going: list[_Going] = []
        self._twins: list[_Twin] = []
        self._asked: list[optuna.Trial] = []
        """Trials that were asked for and have not begun: the server fell silent, or there is no money for them."""
        self._too_little, self._why_too_little = 0.0, "all of the money is spent, or promised to trials"
        """US dollars that were not enough for a trial, and what was said of them."""
        self._unpaid = False
        """Whether a trial that was begun cannot go on, as there is no money for it."""
        self._left: list[optuna.trial.FrozenTrial] = []
        """Trials that a process which is gone had begun."""
        self._waited_for: list[int] = []
        self._failures: dict[int, str] = {}
        """By the trial's number."""
        self._silent_since: float | None = None
        self._heard_of: set[int] = set()
        """The trials of others that were seen running."""
        self._held: dict[int, optuna.Trial] = {}
        """Trials that are this process's, from the moment they were asked for until their end is told."""
        self._optuna = import_optuna()

    def run(self) -> None:
        """Do them. Ctrl-C stops those that run, each after its step, and is raised again; `run` then goes on with them.

        Raises `RunFailed` where the first trials all failed, and `PluginError` where a trial was not trained with the
        values that were chosen for it.
        """
        study = self._study
        if not study.storage.shared:
            self._left = [one for one in study.frozen_trials() if one.state.name == "RUNNING"]
        with plugins.backend(self._job.backend).kept_warm(self._job) as self._backend:
            try:
                with _beating(study, lambda: list(self._held.values())):
                    self._go_on()
            except BaseException as error:
                self._stop_all("stopped" if isinstance(error, KeyboardInterrupt) else "")
                raise

    def _go_on(self) -> None:
        study, look_again = self._study, 0.0
        while True:
            if time.monotonic() > self._deadline:
                self._stop_all("the time is over")
                return
            with self._patience():
                ended = self._tend()
                looks = ended or time.monotonic() >= look_again
                if looks and len(self._going) < self._search.parallel:
                    self._look_at_twins()
                    if len(self._going) < self._search.parallel and self._begin_next():
                        continue
                    look_again = time.monotonic() + _LOOK_S
                    if not self._going and not self._twins and not self._others():
                        self._tell_of_money()
                        study.raise_if_all_failed()
                        return
            time.sleep(_POLL_S)

    def _tell_of_money(self) -> None:
        """Say that more is needed, where it is; raise `RunFailed` where nothing came of what there was."""
        trials = self._study.trials
        is_wanted = any(trial.state == "waiting" for trial in trials) or len(trials) < self._search.trials
        if not (is_wanted or self._asked or self._unpaid) or not self._is_short():
            return
        goes_on = f"`detkit tune --resume {self._study.path} --max-cost N` goes on"
        said = f"{self._why_too_little}. {goes_on}, N being US dollars for all trials together"
        if not any(trial.state in {"finished", "pruned"} for trial in trials):
            raise RunFailed(said)
        self._watcher.said(said)

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        """Wait where a server does not answer for a while; the runs go on, and what they tell is not lost."""
        try:
            yield
            self._silent_since = None
        except Exception as error:
            if not self._study.storage.shared or type(error).__module__.split(".")[0] not in {"sqlalchemy", "optuna"}:
                raise
            if self._silent_since is None:
                self._silent_since = time.monotonic()
                self._watcher.said(f"the study's server does not answer; waiting: {str(error).splitlines()[0]}")
            if time.monotonic() - self._silent_since > _PATIENCE_S:
                raise
            time.sleep(_LOOK_S)

    def _others(self) -> bool:
        """Return whether others still do trials of a shared study, which fall to this process where they are lost."""
        if not self._study.storage.shared:
            return False
        others = [trial for trial in self._study.trials if trial.number not in self._held]
        theirs = {"running"} if self._is_short() else {"running", "waiting"}
        running = [trial.number for trial in others if trial.state in theirs]
        if running and running != self._waited_for:
            self._watcher.said(f"others do trial {', '.join(map(str, running))}; this process waits for them")
            self._waited_for = running
        return bool(running)

    def _begin_next(self) -> bool:
        """Begin a trial where one is wanted; says whether it did."""
        if self._left:
            self._take_over(self._left.pop(0))
            self._changed()
            return True
        study = self._study
        if study.storage.shared:
            for trial in self._held.values():  # after a long silence, before they are taken for lost
                _beat(study, trial._trial_id)
            self._hear_of_all()
            self._optuna.storages.fail_stale_trials(study.optuna_study)
        states = [one.state.name for one in study.frozen_trials() if not _surplus(one)]
        if self._has_given_up(states) or self._is_short():
            return False
        if not self._asked:
            if "WAITING" not in states and len(states) >= self._search.trials:
                return False
            self._ask(len(states))
        trial = self._asked[0]
        if self._is_lost(trial):
            self._asked.remove(trial)
            return True
        if self._is_surplus(trial):
            self._note(trial, surplus=True, reason="others had begun the last trials")
            self._tell(trial, state=self._optuna.trial.TrialState.FAIL)
            self._asked.remove(trial)
            return False
        if not self._begin(trial, self._choose(trial)):
            return False
        self._asked.remove(trial)
        self._changed()
        return True

    def _ask(self, number: int) -> None:
        study = self._study
        study.optuna_study.sampler = make_sampler(self._search, None if study.storage.shared else number)
        study.optuna_study.pruner = make_pruner(self._search.pruner)
        trial = study.optuna_study.ask()
        self._asked.append(trial)
        self._held[trial.number] = trial
        if study.storage.shared:
            _beat(study, trial._trial_id)
        of_another = trial.user_attrs.keys() & {"run", "cut", "max_cost", "cost", "given_up"}  # of a run that was lost
        self._note(trial, **{name: getattr(Facts(), name) for name in of_another})

    def _is_lost(self, trial: optuna.Trial) -> bool:
        """Return whether others do a trial anew, as they had not heard of this process for long; says so."""
        own = (one for one in self._study.frozen_trials() if one.number == trial.number)
        if any(one.state.name == "RUNNING" for one in own):
            return False
        self._watcher.said(f"trial {trial.number}: {_TAKEN}")
        self._held.pop(trial.number, None)
        return True

    def _has_given_up(self, states: Sequence[str]) -> bool:
        """Return whether nothing more is to begin, as all has failed so far. Raises `RunFailed` once nothing runs."""
        if len(self._failures) < _GIVEN_UP_AFTER or {"COMPLETE", "PRUNED"} & set(states):
            return False
        if not self._going:
            *_, last = self._failures.values()
            count = len(self._failures)
            raise RunFailed(f"{count} trials of {self._study.path} failed and none finished; the last: {last}")
        return True

    def _is_short(self) -> bool:
        """Return whether what is left, for now, is too little for a trial."""
        share = self._share(self._asked[0].number if self._asked else None)
        return share is not None and share <= self._too_little

    def _share(self, of: int | None = None) -> float | None:
        """Return what a trial may cost; None where a search may cost anything."""
        trials = self._study.trials
        others = [trial for trial in trials if trial.number != of and trial.state != "waiting"]
        settled = sum(trial.state != "running" or trial.facts.max_cost is not None for trial in others)
        to_come = max(self._search.trials, len(trials)) - settled
        return share_of_money(self._study.max_cost, self._study.begun(but=of), to_come)

    def _hear_of_all(self) -> None:
        """Beat once for what others began: who is killed before a beat of its own would never be missed."""
        for one in self._study.frozen_trials():
            if one.state.name == "RUNNING" and one.number not in self._held and one.number not in self._heard_of:
                _beat(self._study, one._trial_id)
                self._heard_of.add(one.number)

    def _is_surplus(self, trial: optuna.Trial) -> bool:
        """Return whether others, at the same moment, have begun as many as are wanted."""
        if {"fixed_params", "retry_history"} & set(self._system_attrs(trial)):
            return False
        earlier = [one for one in self._study.frozen_trials() if one.number < trial.number and not _surplus(one)]
        return len(earlier) >= self._search.trials

    def _choose(self, trial: optuna.Trial) -> dict[str, Scalar]:
        """Return a trial's values; those of the default trial may lie outside of the space, and are none then."""
        if trial.user_attrs.get("default") and not self._system_attrs(trial).get("fixed_params"):
            return {}
        values: dict[str, Scalar] = {}
        for name in self._order:
            range_ = self._search.space[name]
            if chosen(range_, values, self._params):
                values[name] = suggest(trial, name, range_)
        return values

    def _system_attrs(self, trial: optuna.Trial) -> dict[str, Any]:
        return next(one.system_attrs for one in self._study.frozen_trials() if one.number == trial.number)

    def _begin(self, trial: optuna.Trial, values: dict[str, Scalar], seen: Iterable[int] = ()) -> bool:
        """Start the run of a trial, unless one with the same values has ended, or runs.

        Returns False where it cannot be paid, and stays as asked for. ``seen`` are the percents at which an earlier run
        of it reported the metric. Nothing that may fail comes after the start, so that what did not begin can be begun
        again.
        """
        try:
            params = set_fields(self._params, values, kind="parameter")
            if (same := self._twin(trial.number, params)) is not None:
                if same.state == "running":
                    self._twins.append(_Twin(trial, values, same.number))
                    return True
                self._note(trial, same_as=same.number, max_cost=None)
                if same.state == "pruned":
                    trial.report(same.value or 0.0, 100)
                    self._tell(trial, state=self._optuna.trial.TrialState.PRUNED)
                else:
                    self._tell(trial, same.value)
                return True
            run, slot = self._start(trial, params, values)
        except DetkitError as error:
            if not (self._study.path / "trials" / f"{trial.number:04d}" / "run.json").is_file():
                self._note(trial, max_cost=None, run="")  # nothing was begun, so nothing is paid
            if self._is_of_money(trial, error):
                return False
            self._failed(trial, str(error))
            return True
        self._going.append(_Going(trial, values, run, slot, seen=set(seen)))
        return True

    def _is_of_money(self, trial: optuna.Trial, error: DetkitError) -> bool:
        """Return whether an error says that a trial cannot be paid; nobody tries again before there is more for it."""
        if not isinstance(error, InvalidValue) or error.name != "max_cost":
            return False
        self._too_little, self._why_too_little = self._share(trial.number) or 0.0, str(error)
        return True

    def _start(self, trial: optuna.Trial, params: Params, values: Mapping[str, Scalar]) -> tuple[Run, int]:
        path = self._study.path / "trials" / f"{trial.number:04d}"
        if path.is_dir():  # whoever began it was killed before it was a run
            shutil.rmtree(path)
        taken = {one.slot for one in self._going}
        slot = next(number for number in itertools.count() if number not in taken)
        options = {**self._job.options, **self._share_of(slot)}
        if (most := self._share(trial.number)) is not None:
            if most == 0:
                raise InvalidValue("max_cost", self._study.max_cost, "more: all is spent, or promised to other trials")
            options["max_cost"] = most
            self._note(trial, max_cost=most, cost=None)
        job = msgspec.structs.replace(self._job, params=msgspec.to_builtins(params), options=options)
        workspace = Workspace(path)
        workspace.create(job)
        self._note(trial, run=str(path.relative_to(self._study.path)), host=this_host(), cut=False)
        place_all(self._study.path / "input/data", path / "input/data", but={"job", HELD_BACK})
        told = ", ".join(f"{name}={value}" for name, value in values.items()) or "the model's defaults"
        workspace.log("log", {"message": f"trial {trial.number} of {self._study.name}: {told}"})
        spec_options = set_fields(self._backend.options(), options, kind="option")
        self._backend.require(self._job.model, params, spec_options)
        if job.code is not None:
            trust.of_job(job, workspace)
        return self._backend.start(job, workspace, leash=True), slot

    def _share_of(self, slot: int) -> dict[str, Any]:
        """Return the options that give a trial its share of this machine."""
        own = dict(self._job.options)
        share: dict[str, Any] = {}
        if self._devices:
            share["device"] = self._devices[slot % len(self._devices)]
        if self._search.parallel > 1 and own.get("threads") == "auto":
            share["threads"] = max(1, (os.cpu_count() or 1) // self._search.parallel)
        return share

    def _take_over(self, frozen: optuna.trial.FrozenTrial) -> None:
        """Go on with a trial whose process is gone: with its run where that can be resumed, else anew."""
        trial = self._optuna.trial.Trial(self._study.optuna_study, frozen._trial_id)
        values = self._choose(trial)  # again what was chosen then
        path = self._study.path / "trials" / f"{frozen.number:04d}"
        if not (path / "run.json").is_file():
            if not self._begin(trial, values):
                self._asked.append(trial)
            return
        run, facts = catalog.open_run(path), facts_of(frozen)
        ends = self._backend.leashed or facts.cut  # with its process, which is gone, or it was told to
        for _ in range(_STOPS if ends else 0):
            if run.goes_on():
                run.stop()
        ended = run.status in {"finished", "failed"}
        # Some places count what was stopped halfway as finished, and then nobody can go on with it.
        is_half = run.status == "finished" and facts.cut and 100 not in course_of(run, self._search.metric)
        if is_half or not (ended or run.goes_on() or getattr(self._backend, "resume", None)):
            self._note(trial, given_up=facts.given_up + (run.cost or 0.0))
            if not self._begin(trial, values, seen=frozen.intermediate_values):
                self._asked.append(trial)
            return
        if not ended and not run.goes_on():
            try:
                run = self._resumed(run, trial)
            except DetkitError as error:
                if self._is_of_money(trial, error):
                    self._unpaid = True
                else:
                    self._failed(trial, str(error))
                return
        if facts.cut:
            self._note(trial, cut=False)
        taken = {one.slot for one in self._going}
        slot = next(number for number in itertools.count() if number not in taken)
        self._going.append(_Going(trial, values, run, slot, seen=set(frozen.intermediate_values)))
        self._changed()

    def _resumed(self, run: Run, trial: optuna.Trial) -> Run:
        """Let a trial's run go on, with what may be paid for it now."""
        most = self._share(trial.number)
        if most is None:
            return run.resume(leash=True)
        if most == 0:
            raise InvalidValue("max_cost", self._study.max_cost, "more: all is spent, or promised to other trials")
        run = run.resume(leash=True, options={"max_cost": most})
        self._note(trial, max_cost=most)
        return run

    def _tend(self) -> bool:
        """Read what the runs have told; end those that are behind, and record those that have ended.

        Says whether one has ended.
        """
        changed = False
        before = len(self._going)
        for going in list(self._going):
            goes_on = going.run.goes_on()
            changed |= self._hear(going)
            if going.lost:
                self._watcher.said(f"trial {going.trial.number}: {_TAKEN}")
                going.run.stop()
                self._held.pop(going.trial.number, None)
                self._going.remove(going)
            elif going.pruned or not goes_on:
                self._end(going)
                self._going.remove(going)
                changed = True
        if changed:
            self._changed()
        return len(self._going) < before

    def _look_at_twins(self) -> None:
        """Record trials whose twins have ended, or begin them where nothing came of those."""
        if not self._twins:
            return
        running = {trial.number for trial in self._study.trials if trial.state == "running" and trial.facts.run}
        for twin in [twin for twin in self._twins if twin.of not in running]:
            states = [one.state.name for one in self._study.frozen_trials()]
            if len(self._going) >= self._search.parallel or self._has_given_up(states):
                return
            if not self._is_lost(twin.trial) and not self._begin(twin.trial, twin.values):
                self._asked.append(twin.trial)
            self._twins.remove(twin)  # the first of them, where it waits for another now
            self._changed()

    def _hear(self, going: _Going) -> bool:
        """Read what a run has told since, also for trackers; says whether it is worth showing."""
        changed = False
        for event in _new_events(going):
            plugins.notify(event, going.run)
            changed |= self._take(going, event)
        return changed

    def _take(self, going: _Going, event: Event) -> bool:
        """Take up an event; says whether it is worth showing."""
        going.step = event.step or going.step
        if event.kind == "progress":
            going.total_steps = float(event.values.get("total_steps", going.total_steps))
            return True
        value = event.values.get(self._search.metric) if event.kind == "metric" else None
        if not isinstance(value, int | float):
            return False
        percent = percent_done(event, going.total_steps, going.run.job)
        if percent is not None and percent not in going.seen:
            going.seen.add(percent)
            try:
                going.trial.report(float(value), percent)
            except self._optuna.exceptions.UpdateFinishedTrialError:
                going.lost = True
                return True
            is_default = bool(going.trial.user_attrs.get("default"))  # the others are compared with it at the end
            going.pruned |= percent < 100 and not is_default and going.trial.should_prune()
        return True

    def _end(self, going: _Going) -> None:
        """Record what came of a trial."""
        states = self._optuna.trial.TrialState
        try:
            if going.pruned:
                going.run.stop()
                self._hear(going)
            if going.run.cost is not None:
                self._note(going.trial, cost=going.run.cost)
            was_faster = going.run.status == "finished" and 100 in going.seen
            if going.pruned and not was_faster:
                prove(going.run, going.values, self._params, going.trial.number)
                self._tell(going.trial, state=states.PRUNED)
                return
            run = going.run.wait()
            if run.status != "finished":
                self._failed(going.trial, f"its run was {run.status} by somebody else")
                return
        except RunFailed as error:
            self._failed(going.trial, str(error))
            return
        value = run.metrics.get(self._search.metric)
        if value is None or not math.isfinite(value):
            known = ", ".join(sorted(name for name in run.metrics if name.startswith("val/"))) or "none"
            self._failed(going.trial, f"{self._search.metric} never appeared; what it told of validation: {known}")
            return
        prove(run, going.values, self._params, going.trial.number)
        if (equal := self._equal(run, going)) is not None:
            self._note(going.trial, equals=equal)
            self._watcher.said(
                f"trials {equal} and {going.trial.number} have other values and came out with the very same weights: "
                "what differs has no effect on this model"
            )
        place_all(self._study.workspace.channel(HELD_BACK), run.workspace.channel(HELD_BACK))
        self._tell(going.trial, value)

    def _tell(self, trial: optuna.Trial, value: float | None = None, state: Any = None) -> None:
        try:
            self._study.optuna_study.tell(trial, value, state=state)
        except (ValueError, self._optuna.exceptions.UpdateFinishedTrialError):
            self._watcher.said(f"trial {trial.number}: {_TAKEN}")
        self._held.pop(trial.number, None)

    def _note(self, trial: optuna.Trial, **facts: Any) -> None:
        """Keep facts with a trial, unless others have it by now."""
        for name, value in facts.items():
            assert name in Facts.__struct_fields__
            with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
                trial.set_user_attr(name, value)

    def _failed(self, trial: optuna.Trial, reason: str) -> None:
        self._failures[trial.number] = reason
        self._note(trial, reason=reason)
        self._watcher.said(f"trial {trial.number} failed: {reason.splitlines()[0] if reason else 'nobody knows why'}")
        self._tell(trial, state=self._optuna.trial.TrialState.FAIL)
        self._changed()

    def _twin(self, number: int, params: Params) -> Trial | None:
        """Return the trial with the same parameters that has ended, or the earlier one whose run goes on.

        Of one that failed nothing is known.
        """
        for trial in self._study.trials:
            ended = trial.state in {"finished", "pruned"} and trial.facts.same_as is None
            runs = trial.state == "running" and trial.number < number and trial.facts.run
            same = trial.number != number and set_fields(self._params, trial.values, kind="parameter") == params
            if same and (ended or runs):
                return trial
        return None

    def _equal(self, run: Run, going: _Going) -> int | None:
        """Return the earlier trial with other values whose weights are these, byte by byte."""
        own = run.model.manifest.artifacts
        for trial in self._study.trials:
            if trial.state != "finished" or trial.path is None or trial.number == going.trial.number:
                continue
            if trial.values == going.values:  # both ran at once
                continue
            with contextlib.suppress(UsageError):
                if trial.run.model.manifest.artifacts == own:
                    return trial.number
        return None

    def _stop_all(self, why: str) -> None:
        """Stop the runs, each after its step; their trials stay as begun, and go on when the study does."""
        if self._going and why:
            self._watcher.said(f"{why}: {len(self._going)} running trial(s) stop after their step, and can go on")
        for going in self._going:
            with contextlib.suppress(Exception):  # the server may be gone; the runs stop all the same
                self._note(going.trial, cut=True)
            with contextlib.suppress(DetkitError):
                going.run.stop()
            for event in _new_events(going):
                plugins.notify(event, going.run)
        self._going.clear()
        self._twins.clear()

    def _changed(self) -> None:
        self._watcher.changed(
            self._study,
            {
                one.trial.number: f"{100 * one.step / one.total_steps:.0f} %" if one.total_steps else "starting"
                for one in self._going
            },
        )


def percent_done(event: Event, total_steps: float, job: Job) -> int | None:
    """Return how much of a training was done when an event was written; None where nobody can tell."""
    if total_steps and event.step is not None:
        return round(100 * event.step / total_steps)
    epochs = job.params.get("epochs")
    return round(100 * event.epoch / epochs) if epochs and event.epoch is not None else None


def course_of(run: Run, metric: str) -> dict[int, float]:
    """Return the metric by how much of the training was done, in percent, as far as the run tells."""
    total_steps, found = 0.0, dict[int, float]()
    for event in run.events(follow=False):
        if event.kind == "progress":
            total_steps = float(event.values.get("total_steps", total_steps))
        value = event.values.get(metric) if event.kind == "metric" else None
        if isinstance(value, int | float) and math.isfinite(value):
            percent = percent_done(event, total_steps, run.job)
            if percent is not None:
                found[percent] = float(value)
    return found


def begin(study: Study) -> None:
    """Queue the first trials of a new study: the model's defaults, and all combinations of a grid."""
    defaults = defaults_in(study.search.space, study.params)
    study.optuna_study.enqueue_trial(defaults, user_attrs={"default": True})
    if study.search.sampler == "grid":
        for values in grid(study.search.space):
            if values != defaults:
                study.optuna_study.enqueue_trial(values)


def _surplus(frozen: optuna.trial.FrozenTrial) -> bool:
    return bool(frozen.user_attrs.get("surplus"))


def _new_events(going: _Going) -> Iterator[Event]:
    """Yield the events that were written since the last call; a line that is half written waits."""
    file = going.run.workspace.metrics_file
    if not file.is_file():
        return
    with file.open("rb") as events:
        events.seek(going.read)
        new = events.read()
    whole = new[: new.rfind(b"\n") + 1]
    going.read += len(whole)
    for line in whole.splitlines():
        with contextlib.suppress(msgspec.DecodeError):  # cut short by a kill
            yield msgspec.json.decode(line, type=Event)


@contextlib.contextmanager
def _beating(study: Study, trials: Callable[[], Sequence[optuna.Trial]]) -> Iterator[None]:
    """Say now and then that this process lives, where a study is shared; its trials are begun anew otherwise."""
    if not study.storage.shared:
        yield
        return
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(study_storage.HEARTBEAT_S):
            for trial in trials():
                with contextlib.suppress(Exception):  # the next one may reach the server
                    _beat(study, trial._trial_id)

    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _beat(study: Study, trial_id: int) -> None:
    storage: Any = study.optuna_study._storage
    storage.record_heartbeat(trial_id)
