"""Studies: searches for the best parameters, each in a directory with a run for every trial.

    STUDY/
      study.json             the `StudyRecord`: what is searched, by what it is judged, where the results are kept
      study.db               what was tried and what came of it, by Optuna; elsewhere where ``storage`` names a server
      input/data/            the data, laid out once as for a run; a ``test`` channel is kept from every trial
      trials/0000/ ...       a run directory each

Optuna is imported when a study is opened; it comes with ``detkit-sdk[tune]``.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from detkit import catalog
from detkit.errors import PluginError, RunFailed, UnknownName, UsageError
from detkit.files import lock_file, write_json
from detkit.job import SCHEMA, Workspace
from detkit.params import Params, coerce
from detkit.plugins import backend as find_backend
from detkit.spaces import Scalar, chosen, fitted, typing_hints
from detkit.study_storage import (
    GRACE_S,
    Storage,
    import_optuna,
    neutral,
    open_storage,
    plain_errors,
    with_password,
    without_password,
)
from detkit.tables import html_table
from detkit.tuning import Search, TrialState

if TYPE_CHECKING:
    import optuna

    from detkit.runs import Run

RECORD = "study.json"

_IDENTITY = "detkit"
"""The attribute that holds what all who work on a study agree in."""

_RESCORED = "rescored"
"""The attribute that holds the AP of trials, by their number, on images that no trial saw."""

_STATES: Mapping[str, TrialState] = {
    "WAITING": "waiting",
    "RUNNING": "running",
    "COMPLETE": "finished",
    "PRUNED": "pruned",
    "FAIL": "failed",
}


class StudyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``study.json``."""

    backend: str
    model: str
    search: Search
    storage: str = ""
    """URL of the database server that keeps the results; empty: ``study.db`` beside this file. A password in it is the
    name of an environment variable, ``$NAME``."""
    name: str
    """Of the study in that database."""
    created: float
    """Seconds since the epoch (POSIX)."""
    schema: int = SCHEMA


class Facts(msgspec.Struct, kw_only=True):
    """What is kept with a trial beside its values; Optuna's user attributes."""

    run: str = ""
    """The run's directory, relative to the study's."""
    host: str = ""
    """The machine that has it."""
    reason: str = ""
    """Why it failed, or was not run."""
    default: bool = False
    """Whether it has the model's default values."""
    same_as: int | None = None
    """The earlier trial with the same values, whose result is this one's, too: it was not run."""
    repeats: int | None = None
    """The earlier trial with the same values; a place that searches by itself trained both."""
    equals: int | None = None
    """The earlier trial with other values that came out with the very same weights."""
    surplus: bool = False
    """Whether it was begun when others had begun the last ones; it was not run."""
    job: str = ""
    """A place's own name of what ran it."""
    cut: bool = False
    """Whether it was told to stop before its end, and did not go on since."""
    max_cost: float | None = None
    """US dollars that it may cost, of what the search may."""
    cost: float | None = None
    """US dollars that it has cost, by an estimated price."""
    given_up: float = 0.0
    """US dollars that runs of it have cost which came to nothing, and were done anew."""

    def to_dict(self) -> dict[str, Any]:
        """Return what there is to tell."""
        usual = msgspec.to_builtins(Facts())
        return {name: value for name, value in msgspec.to_builtins(self).items() if value != usual[name]}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial of a study."""

    number: int
    state: TrialState
    values: dict[str, Scalar]
    """What was searched and chosen; the rest is as in the study's job."""
    value: float | None
    """Of the metric: of the weights that were kept. Of a pruned trial, the last."""
    seconds: float | None
    intermediate: dict[int, float] = field(default_factory=dict)
    """The metric by how much of the training was done, in percent."""
    rescored: float | None = None
    """AP on images that no trial saw, see `detkit.tuner.rescore`; None where that was not measured."""
    path: Path | None = None
    """The run's directory; None where it has none, or lies on another machine."""
    facts: Facts = field(default_factory=Facts)

    @property
    def run(self) -> Run:
        """The trial's run. Raises `UsageError` where it is not here."""
        if self.path is None or not (self.path / "run.json").is_file():
            where = f"it was trained on {self.facts.host}" if self.facts.host else "it never began, or was removed"
            raise UsageError(f"the run of trial {self.number} is not in this directory: {where}")
        return catalog.open_run(self.path)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "number": self.number,
            "state": self.state,
            "value": self.value,
            "rescored": self.rescored,
            "seconds": self.seconds,
            "values": self.values,
            "run": None if self.path is None else str(self.path),
            **{name: value for name, value in self.facts.to_dict().items() if name != "run"},
        }


class Study:
    """A search for the best parameters, and what came of it. Any process may read one while it goes on."""

    def __init__(self, path: str | Path) -> None:
        """``path`` is the study's directory. Raises `UsageError` where there is none."""
        self.path = Path(path)
        file = self.path / RECORD
        if not file.is_file():
            raise UsageError(f"{self.path} holds no study: there is no {RECORD} in it")
        try:
            self.record = msgspec.json.decode(file.read_bytes(), type=StudyRecord)
        except msgspec.DecodeError as error:
            raise UsageError(f"{file} was written by another version of detkit, or is damaged: {error}") from None

    @classmethod
    def create(
        cls, path: Path, record: StudyRecord, identity: Mapping[str, Any], queue: Callable[[Study], object]
    ) -> Study:
        """Make a study of a directory with a job and data: first in its storage, see `found`, then the record."""
        study = cls.__new__(cls)
        study.path, study.record = path, record
        study.found(identity, queue)
        write_json(path / RECORD, record)
        return study

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def workspace(self) -> Workspace:
        """The study's job and data."""
        return Workspace(self.path)

    @property
    def search(self) -> Search:
        return self.record.search

    @property
    def searched_there(self) -> bool:
        """Whether the backend's place searches by itself."""
        return self.search.sampler in find_backend(self.record.backend).samplers

    @cached_property
    def params(self) -> Params:
        """The parameters of every trial, but for what is searched."""
        struct = type(find_backend(self.record.backend).spec(self.record.model).params)
        return msgspec.convert(self.workspace.job().params, struct)

    @property
    def storage(self) -> Storage:
        if self.record.storage:
            return Storage(with_password(self.record.storage), shared=True)
        file = quote(str(self.path.absolute() / "study.db"))  # a path may have "?" in it, and braces are Optuna's
        return Storage(f"sqlite:///file:{file}?uri=true", shared=False)

    @cached_property
    def optuna_study(self) -> optuna.Study:
        """The study as Optuna has it: for its own plots, samplers and analyses."""
        with plain_errors(self.storage.url):
            try:
                found: optuna.Study = import_optuna().load_study(
                    study_name=self.record.name, storage=open_storage(self.storage), **neutral()
                )
            except KeyError:
                raise PluginError(
                    f"{without_password(self.storage.url)} has no study {self.record.name!r} any more; its runs are "
                    f"in {self.path / 'trials'}"
                ) from None
        return found

    @property
    def max_cost(self) -> float | None:
        """US dollars that all trials together may cost, as all agree in who work on it."""
        agreed = self.optuna_study.user_attrs.get(_IDENTITY, {})
        most: float | None = agreed.get("max_cost", self.search.max_cost)
        return most

    def found(self, identity: Mapping[str, Any], queue: Callable[[Study], object]) -> None:
        """Make the study in its storage and ``queue`` its first trials; where others have, see that it is the same.

        ``identity`` is what all who work on it have to agree in. Raises `UsageError` where they do not.
        """
        there = import_optuna()
        identity = msgspec.json.decode(msgspec.json.encode(identity))  # as it comes back from there
        with plain_errors(self.storage.url):
            try:
                self.optuna_study = there.create_study(
                    storage=open_storage(self.storage),
                    study_name=self.record.name,
                    direction={"max": "maximize", "min": "minimize"}[self.search.mode],
                    **neutral(),
                )
            except there.exceptions.DuplicatedStudyError:
                self._refuse_other(identity)
                return
            queue(self)
            self.optuna_study.set_user_attr(_IDENTITY, dict(identity))  # last: whoever sees it finds all the rest

    def _refuse_other(self, identity: Mapping[str, Any]) -> None:
        deadline = time.monotonic() + GRACE_S
        while (theirs := self.optuna_study.user_attrs.get(_IDENTITY)) is None:
            if time.monotonic() > deadline:
                raise UsageError(f"whoever began the study {self.record.name!r} did not get far; choose another name")
            time.sleep(0.2)
        if theirs != identity:
            differing = ", ".join(name for name in identity if identity[name] != theirs.get(name))
            raise UsageError(
                f"the study {self.record.name!r} at that server was begun with another {differing}; give this one "
                "another name, or the same settings and data"
            )

    @property
    def trials(self) -> list[Trial]:
        """Every trial so far; those that were begun in vain are left out, see `Facts.surplus`."""
        rescored = self.optuna_study.user_attrs.get(_RESCORED, {})
        found = [self._trial(frozen, rescored.get(str(frozen.number))) for frozen in self.frozen_trials()]
        return [trial for trial in found if not trial.facts.surplus]

    def begun(self, but: int | None = None) -> list[Facts]:
        """Return the facts of every trial that has begun, also of those that were lost and done anew."""
        found = self.optuna_study.get_trials(deepcopy=False)
        return [facts_of(one) for one in found if one.state.name != "WAITING" and one.number != but]

    def frozen_trials(self) -> list[optuna.trial.FrozenTrial]:
        """Return Optuna's trials; of one that was done anew after its process was lost only the new one."""
        found = self.optuna_study.get_trials(deepcopy=False)
        anew = {number for one in found for number in one.system_attrs.get("retry_history", ())}
        return [one for one in found if one.number not in anew]

    @property
    def best_trial(self) -> Trial:
        """The finished trial that comes first in `ranking`. Raises `UsageError` before there is one."""
        ranked = self.ranking()
        if not ranked:
            failed = [trial for trial in self.trials if trial.state == "failed"]
            why = f": {len(failed)} failed, the last with: {failed[-1].facts.reason}" if failed else ""
            raise UsageError(f"no trial of {self.path} has finished yet{why}")
        return ranked[0]

    @property
    def best(self) -> Run:
        """The run of the best trial."""
        return self.best_trial.run

    @property
    def default_trial(self) -> Trial | None:
        """The finished trial with the model's default values; None where there is none."""
        return next((trial for trial in self.trials if trial.facts.default and trial.state == "finished"), None)

    def ranking(self) -> list[Trial]:
        """Return the finished trials that have a run, the best first: those that were rescored, then by their value."""
        own = [t for t in self.trials if t.state == "finished" and t.value is not None and t.facts.same_as is None]
        sign = -1 if self.search.mode == "max" else 1

        def place(trial: Trial) -> tuple[float, float, int]:
            return (math.inf if trial.rescored is None else -trial.rescored, sign * (trial.value or 0.0), trial.number)

        return sorted(own, key=place)

    def keep_rescored(self, found: Mapping[int, float]) -> None:
        """Rank trials by their AP on images that none of them saw; what was kept before goes."""
        self.optuna_study.set_user_attr(_RESCORED, {str(number): value for number, value in found.items()})

    def contenders(self) -> dict[str, Run]:
        """Return the runs that tell whether the search was worth it, for `detkit.compare`: best, next, and defaults."""
        default = self.default_trial
        roles = {trial.number: [role] for role, trial in zip(("best", "next"), self.ranking(), strict=False)}
        if default is not None:
            roles.setdefault(default.number, []).append("defaults")
        runs = {trial.number: trial.run for trial in self.trials if trial.number in roles}
        return {f"{', '.join(said)} (trial {number})": runs[number] for number, said in roles.items()}

    def enqueue(self, **values: Any) -> None:
        """Have a point tried next that you know to be good, or want to know; what is not given stays as it is.

        Raises `UsageError` for a value that the space does not have.
        """
        if self.searched_there:
            raise UsageError(f"{self.record.backend} searches by itself, and takes no values of yours")
        space, hints = self.search.space, typing_hints(type(self.params))
        checked: dict[str, Scalar] = {}
        for name, value in values.items():
            if name not in space:
                raise UnknownName("searched parameter", name, space, "the others are the same in all trials")
            checked[name] = self.fit(name, coerce(name, value, hints[name]))
        for name, range_ in space.items():
            if name not in checked and chosen(range_, checked, self.params):
                checked[name] = self.fit(name, getattr(self.params, name))
        for trial in self.trials:
            if trial.values == checked:
                raise UsageError(f"trial {trial.number} has these values; it is {trial.state}")
        self.optuna_study.enqueue_trial(checked)

    def fit(self, name: str, value: Any) -> Scalar:
        """Return a value as a trial has it. Raises `InvalidValue` where it is not in the space."""
        return fitted(name, self.search.space[name], value, typing_hints(type(self.params))[name])

    def raise_if_all_failed(self) -> None:
        """Raise `RunFailed` with the last reason where no trial came to anything."""
        trials = self.trials
        if trials and all(trial.state == "failed" for trial in trials):
            raise RunFailed(f"no trial of {self.path} finished; the last: {trials[-1].facts.reason}")

    def extend(self, **changes: Any) -> None:
        """Change the record's search: more trials, others in parallel. What was found stays."""
        search = msgspec.structs.replace(self.search, **changes)
        if "max_cost" in changes:
            agreed = self.optuna_study.user_attrs[_IDENTITY]
            self.optuna_study.set_user_attr(_IDENTITY, {**agreed, "max_cost": changes["max_cost"]})
        self.record = msgspec.structs.replace(self.record, search=search)
        write_json(self.path / RECORD, self.record)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from working on a study whose results are kept in its own directory. Raises `UsageError`."""
        if self.storage.shared:
            yield
            return
        try:
            lock = lock_file(self.path / ".lock")
        except BlockingIOError:
            raise UsageError(
                f"another process works on {self.path}; wait for its end, or keep the results on a server that several "
                "can share: --storage postgresql+pg8000://..."
            ) from None
        try:
            yield
        finally:
            if lock is not None:
                lock.close()

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        trials = self.trials
        ranked = self.ranking()
        return {
            "study": str(self.path),
            "model": f"{self.record.backend}/{self.record.model}",
            "metric": self.search.metric,
            "mode": self.search.mode,
            "space": {name: str(range_) for name, range_ in self.search.space.items()},
            "wanted": self.search.trials,
            "best": ranked[0].to_dict() if ranked else None,
            "trials": [trial.to_dict() for trial in trials],
        }

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the head and the rows of a table of the trials, the best one marked."""
        names = list(self.search.space)
        ranked = self.ranking()
        best = ranked[0].number if ranked else None
        rows = [
            [
                f"{'*' if trial.number == best else ''}{trial.number}",
                trial.state,
                "" if trial.value is None else f"{trial.value:.4g}",
                *(short(trial.values[name]) if name in trial.values else "" for name in names),
                "" if trial.seconds is None else f"{trial.seconds:.0f} s",
                remark(trial),
            ]
            for trial in self.trials
        ]
        return ["trial", "state", self.search.metric, *names, "time", ""], rows

    def __repr__(self) -> str:
        ranked = self.ranking()
        best = f", best {self.search.metric} {ranked[0].value:.4g} in trial {ranked[0].number}" if ranked else ""
        return f"<Study {self.path}: {self.record.backend}/{self.record.model}, {len(self.trials)} trials{best}>"

    def _repr_html_(self) -> str:
        return html_table(*self.rows())

    def _trial(self, frozen: optuna.trial.FrozenTrial, rescored: float | None) -> Trial:
        facts = facts_of(frozen)
        state = _STATES[frozen.state.name]
        if state == "failed" and facts.same_as is not None:
            state = "finished"
        waiting = frozen.system_attrs.get("fixed_params", {}) if state == "waiting" else {}
        path = self.path / facts.run if facts.run and (self.path / facts.run).is_dir() else None
        return Trial(
            number=frozen.number,
            state=state,
            values={**waiting, **frozen.params},
            value=frozen.value,
            seconds=None if frozen.duration is None else frozen.duration.total_seconds(),
            intermediate=dict(sorted(frozen.intermediate_values.items())),
            rescored=rescored,
            path=path,
            facts=facts,
        )


def facts_of(frozen: optuna.trial.FrozenTrial) -> Facts:
    """Return what is kept with one of Optuna's trials."""
    return msgspec.convert(dict(frozen.user_attrs), Facts)


def open_study(name: str | Path) -> Study:
    """Find a study by its directory, or its name in the folder of runs; ``last`` is the newest."""
    if str(name) == "last":
        found = list_studies()
        if not found:
            raise UsageError(f"there is no study in {catalog.runs_folder()}; begin one with `detkit tune DATA`")
        return found[-1]
    for path in (Path(name), catalog.runs_folder() / name):
        if is_study(path):
            return Study(path)
    raise UnknownName("study", str(name), [study.name for study in list_studies()])


def is_study(path: str | Path) -> bool:
    """Return whether a directory holds a study."""
    return (Path(path) / RECORD).is_file()


def list_studies() -> list[Study]:
    """Return every study of the folder of runs, the newest at the end."""
    found: list[Study] = []
    for file in catalog.runs_folder().glob(f"*/{RECORD}"):
        try:
            found.append(Study(file.parent))
        except UsageError as error:  # the others are still of use
            warnings.warn(f"study {file.parent} is left out: {error}", stacklevel=2)
    return sorted(found, key=lambda study: study.record.created)


def short(value: Scalar) -> str:
    """Return a value as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def remark(trial: Trial) -> str:
    """Return what there is to say of a trial beside its numbers."""
    facts = trial.facts
    said = [
        "default" if facts.default else "",
        f"the values of trial {facts.same_as}" if facts.same_as is not None else "",
        f"has the values of trial {facts.repeats}, too" if facts.repeats is not None else "",
        f"came out exactly as trial {facts.equals}" if facts.equals is not None else "",
        f"AP {trial.rescored:.4g} on images that no trial saw" if trial.rescored is not None else "",
        facts.reason.partition("\n")[0][:80] if trial.state == "failed" else "",
    ]
    return "; ".join(filter(None, said))


def this_host() -> str:
    """Return the name by which trials remember this machine."""
    return socket.gethostname() or os.uname().nodename
