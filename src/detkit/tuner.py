"""The best parameters for a budget, of any model on any backend."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from detkit import catalog, plugins, trust
from detkit.backends import Backend
from detkit.data import Dataset
from detkit.durations import seconds
from detkit.errors import InvalidValue, RunExists, UsageError
from detkit.evaluation import evaluate_all
from detkit.files import lock_file
from detkit.formats.checks import prepare
from detkit.io import read_dataset
from detkit.params import INSTEAD
from detkit.plans import Plan
from detkit.runs import Run
from detkit.searching import PRUNERS, SAMPLERS, grid, share_of_money
from detkit.spaces import Range, check_space, defaults_in, read_range
from detkit.studies import Study, StudyRecord, is_study, open_study
from detkit.study_storage import import_optuna, refuse_password
from detkit.trainer import Ready, Trainer
from detkit.trials import Trials, begin
from detkit.tuning import Mode, Search
from detkit.tuning_there import search_there
from detkit.tuning_view import View

DEFAULT_TRIALS = 20
_CONSENT = {"max_cost", "yes"}
"""The options by which somebody said what may be paid."""


class Tuner:
    """Searches for the parameters with which a trainer's model is best; call `fit` with data.

    ``space`` maps parameters to ranges, `detkit.Float`, `detkit.Int`, `detkit.Choice`, or their text, such as
    ``"1e-5..1e-2:log"``; ``"auto"`` is what is usually worth searching for the model. ``metric`` is what runs log of
    validation images, e.g. ``"val/AP"``, and ``mode`` whether more of it is better; ``"auto"`` are those by which the
    model's weights are kept. The first trial has the model's defaults, unless the place searches by itself.

    ``trials`` counts all of them, 20 unless given (of a grid, all combinations); ``budget`` is the time for the search,
    such as ``"2h"``, after which the running trials are stopped. ``parallel`` run at once: each on one of ``devices``,
    such as ``["cuda:0", "cuda:1"]``, or with its share of the cores.

    ``sampler``: ``tpe`` (Bergstra et al. 2011), ``random``, ``grid``, ``cmaes`` (Hansen and Ostermeier 2001), or what
    the backend's place searches with by itself, which is the default there. ``pruner`` ends trials that are behind:
    ``median`` (Golovin et al. 2017), ``asha`` (Li et al. 2020), ``hyperband`` (Li et al. 2018), ``none``; all but the
    place's own are Optuna's.

    ``storage`` names a database server on which several machines work on one study, e.g.
    ``postgresql+pg8000://user:$PASSWORD@host/studies``, where ``$PASSWORD`` is an environment variable; each of them is
    started with the same trainer, space, data and name.
    ``parent`` is an earlier study at a place that searches by itself, whose trials are learned from. Where trials are
    paid, ``max_cost`` among the trainer's settings is for all of them together.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        space: Mapping[str, Range | str] | Literal["auto"] = "auto",
        *,
        metric: str = "auto",
        mode: Mode | Literal["auto"] = "auto",
        trials: int | None = None,
        parallel: int = 1,
        budget: str | float | None = None,
        sampler: str = "auto",
        pruner: str = "auto",
        seed: int = 0,
        devices: Sequence[str] = (),
        storage: str = "",
        parent: str = "",
    ) -> None:
        _require_count("parallel", parallel)
        if trials is not None:
            _require_count("trials", trials)
        self.trainer = trainer or Trainer()
        self._space, self._metric, self._mode, self._trials, self._parallel = space, metric, mode, trials, parallel
        self._budget_s = _seconds(budget)
        self._sampler, self._pruner, self._seed = sampler, pruner, seed
        self._devices, self._storage, self._parent = tuple(devices), storage, parent

    def fit(
        self,
        train: Dataset | str | Path | None = None,
        val: Dataset | str | Path | None = None,
        test: Dataset | str | Path | None = None,
        *,
        name: str | None = None,
        quiet: bool = False,
        **settings: Any,
    ) -> Study:
        """Search, and return the study. The data is divided as for `Trainer.fit`; no trial sees the test images.

        Ctrl-C stops the running trials after their step and is raised again; `resume` goes on with them. Raises
        `detkit.errors.RunFailed` where no trial finishes, after the first three that failed.
        """
        ready = self.trainer.prepare(train, val, test, **settings)
        search = self._search(ready)
        study = self._open(ready, search, name)
        return self._go_on(study, quiet=quiet, ready=ready)

    def plan(
        self,
        train: Dataset | str | Path | None = None,
        val: Dataset | str | Path | None = None,
        test: Dataset | str | Path | None = None,
        **settings: Any,
    ) -> Plan:
        """Return what `fit` would do: the search, exact requests, worst-case time and money. Starts nothing."""
        ready = self.trainer.prepare(train, val, test, **settings)
        search, backend = self._search(ready), ready.resolved.backend
        with tempfile.TemporaryDirectory(prefix="detkit-plan-") as folder:
            workspace = ready.lay_out(Path(folder) / ready.path.name)
            if search.sampler in backend.samplers:
                plan = backend.plan_tuning(ready.job, workspace, search)
            else:
                share = share_of_money(search.max_cost, (), search.trials)
                options = {**ready.job.options, **({} if share is None else {"max_cost": share})}
                plan = _of_all(backend.plan(msgspec.structs.replace(ready.job, options=options), workspace), search)
        return replace(plan, notes=(*describe(search), *ready.told, *plan.notes))

    def resume(
        self,
        study: Study | str | Path,
        *,
        trials: int | None = None,
        budget: str | float | None = None,
        parallel: int | None = None,
        max_cost: float | None = None,
        quiet: bool = False,
    ) -> Study:
        """Go on with a study where it was left, or with more ``trials`` than it had: finished ones stay as they are.

        The search is the study's own; of this tuner only ``devices`` and ``budget`` count. ``max_cost`` are US dollars
        for all trials together, also those done.
        """
        found = study if isinstance(study, Study) else open_study(study)
        if trials is not None and trials < len(found.trials):
            raise InvalidValue("trials", trials, f"at least {len(found.trials)}: all trials together, also those done")
        if trials is not None and trials > found.search.trials and found.search.sampler == "grid":
            raise InvalidValue("trials", trials, f"{found.search.trials}: all combinations of the grid are among them")
        changes: dict[str, float] = {n: v for n, v in (("trials", trials), ("parallel", parallel)) if v is not None}
        for name, value in changes.items():
            _require_count(name, value)
        if max_cost is not None:
            if not 0 < max_cost < math.inf:
                raise InvalidValue("max_cost", max_cost, "US dollars above 0, for all trials together")
            if found.search.max_cost is None:
                raise UsageError(f"{found.path} was begun without max_cost, and goes on as it was")
            changes["max_cost"] = max_cost
        if self._devices:
            self._refuse_what_has_no_effect(plugins.backend(found.record.backend), found.search.sampler)
        if changes and found.searched_there:
            raise UsageError(
                f"{found.record.backend} searches by itself, with the numbers it was given; begin another search that "
                f"learns from this one: `detkit tune DATA ... --parent {found.name}`"
            )
        if budget is not None:
            self._budget_s = _seconds(budget)
        return self._go_on(found, quiet=quiet, changes=changes)

    def _search(self, ready: Ready) -> Search:
        """Return what is to be searched, checked against the model and what its place can do."""
        resolved = ready.resolved
        backend, model, params = resolved.backend, resolved.model, resolved.params
        full = f"{backend.name}/{model}"
        space = _read_space(backend.space(model) if self._space == "auto" else self._space)
        both = [name for name in space if resolved.origins.get(name) in {"the call", "the constructor"}]
        if both and self._space != "auto":
            raise UsageError(f"{', '.join(both)}: given a value and searched; leave one of both out")
        space = {name: range_ for name, range_ in space.items() if name not in both}
        check_space(space, params, full)
        samplers = (*backend.samplers, *SAMPLERS)
        sampler = samplers[0] if self._sampler == "auto" else self._sampler
        if sampler not in samplers:
            raise InvalidValue("sampler", sampler, f"one of {', '.join(samplers)}, or auto")
        pruners = backend.samplers.get(sampler, PRUNERS)
        pruner = pruners[0] if self._pruner == "auto" else self._pruner
        if pruner not in pruners:
            whose = f", which is what {sampler} can have at {backend.name}" if sampler in backend.samplers else ""
            raise InvalidValue("pruner", pruner, f"one of {', '.join(pruners)}{whose}; or auto")
        self._refuse_what_has_no_effect(backend, sampler)
        metric, mode = self._judge(backend, model, params)
        if metric.startswith("val/") and "validation" not in ready.gathered.prepared:
            raise UsageError(
                f"trials are judged by {metric}, and there are no validation images; give val=, in the command line a "
                "second data set, or data without splits, of which some are held out"
            )
        trials = self._trials or DEFAULT_TRIALS
        if sampler == "grid":
            combinations = list(grid(space))
            # The defaults come first, and may be beside the grid.
            trials = len(combinations) + (defaults_in(space, params) not in combinations)
            if self._trials is not None and self._trials != trials:
                raise InvalidValue(
                    "trials", self._trials, f"{trials}, all combinations and the defaults, or leave it out"
                )
        return Search(
            space=space,
            metric=metric,
            mode=mode,
            trials=trials,
            parallel=self._parallel,
            sampler=sampler,
            pruner=pruner,
            seed=self._seed,
            parent=self._parent,
            max_cost=ready.job.options.get("max_cost"),
            budget_s=self._budget_s if sampler in backend.samplers else None,
        )

    def _refuse_what_has_no_effect(self, backend: Backend, sampler: str) -> None:
        place = f"{backend.name} searches by itself (sampler {sampler})"
        if sampler not in backend.samplers:
            if self._parent:
                there = f"; choose one of {', '.join(backend.samplers)}" if backend.samplers else ""
                raise UsageError(f"parent={self._parent}: sampler {sampler} learns from no earlier search{there}")
            if self._devices and not hasattr(backend.options(), "device"):
                raise UsageError(
                    f"devices={','.join(self._devices)}: {backend.name} has no option device; leave it out"
                )
        elif self._devices:
            raise UsageError(f"devices={','.join(self._devices)}: {place}, not on this machine's; leave it out")
        elif self._storage:
            raise UsageError(f"storage= is for several machines that search together, and {place}; leave it out")

    def _judge(self, backend: Backend, model: str, params: Any) -> tuple[str, Mode]:
        known = backend.tuning_metrics(model)
        usual = f"val/{getattr(params, 'best_metric', '')}"
        metric = (usual if usual in known else next(iter(known))) if self._metric == "auto" else self._metric
        if metric not in known:
            raise InvalidValue("metric", metric, f"what {backend.name}/{model} reports: {', '.join(known)}")
        mode = known[metric] if self._mode == "auto" else self._mode
        if mode not in ("max", "min"):
            raise InvalidValue("mode", mode, "max or min")
        return metric, mode

    def _open(self, ready: Ready, search: Search, name: str | None) -> Study:
        """Lay out a new study, or join the one of that name where its results are kept for several to work on."""
        import_optuna()
        resolved = ready.resolved
        path = catalog.new_run_path(f"study-{resolved.model}", name)
        if self._storage and name is None:
            raise UsageError("a study on a server needs a name, by which others find it: name=, --name")
        if self._storage:
            refuse_password(self._storage)
        record = StudyRecord(
            backend=resolved.backend.name,
            model=resolved.model,
            search=search,
            storage=self._storage,
            name=path.name,
            created=time.time(),
        )
        if self._storage:
            with _alone(path):
                return _joined(Study(path), record, ready) if is_study(path) else _laid_out(path, record, ready)
        try:
            return _laid_out(path, record, ready)
        except RunExists:
            if catalog.new_run_path(f"study-{resolved.model}", name) == path:
                raise
            return self._open(ready, search, name)  # another process took its number at this moment

    def _go_on(
        self, study: Study, *, quiet: bool, ready: Ready | None = None, changes: Mapping[str, float] | None = None
    ) -> Study:
        backend = plugins.backend(study.record.backend)
        deadline = time.monotonic() + self._budget_s if self._budget_s is not None else math.inf
        with study.held(), View(study, quiet=quiet) as view:
            if changes:
                study.extend(**changes)
            for line in (*describe(study.search), *(ready.told if ready else ())):
                view.said(line)
            if study.search.sampler in backend.samplers:
                search_there(study, backend, view, deadline=deadline)
            else:
                Trials(study, view, deadline=deadline, devices=self._devices).run()
        return study


def retrain(study: Study | str | Path, *, name: str | None = None, quiet: bool = False, **settings: Any) -> Run:
    """Train the best trial's parameters on the training and validation images together, and return the run.

    Nothing is left to choose the weights by, so the last ones are kept; the study's test images are scored once.
    ``settings`` are parameters and options that are to differ. What the search was allowed to cost is not for this run:
    where it is paid, say so anew, e.g. ``max_cost=5``.
    """
    from detkit.curation import merge

    found = study if isinstance(study, Study) else open_study(study)
    best = found.best_trial
    workspace, job = found.workspace, found.workspace.job()
    parts = [data for channel in ("train", "validation") if (data := workspace.dataset(channel)) is not None]
    code = workspace.code if workspace.code.is_dir() else None
    imports = job.code.imports if job.code is not None else None
    trainer = Trainer(model=job.model, backend=job.backend, code=code, imports=imports)
    either = {**INSTEAD, **{theirs: ours for ours, theirs in INSTEAD.items()}}
    left_out = {*_CONSENT, *(either[name] for name in settings if name in either)}
    trained = {**job.params, **best.values, **job.options}
    kept = {name: value for name, value in trained.items() if name not in left_out}
    test = workspace.dataset("test")
    return trainer.fit(merge(parts), None, test, name=name, quiet=quiet, **{**kept, **settings})


def rescore(
    study: Study | str | Path, data: Dataset | str | Path | None = None, *, top: int = 3, progress: bool = False
) -> Study:
    """Score the ``top`` trials by detkit's own AP, on images that none of them saw, and rank them by it from then on.

    For a search that was judged by a number of its place: AWS's mAP, or a loss. Without ``data`` it is on the study's
    validation images, where the place kept them from its trials, as JumpStart does. Never on the test images, which are
    for the comparison at the end. Raises `SeenImages` where a trial saw the images, and `UsageError` for test images,
    and for models that answer only at their place, with what to type.
    """
    found = study if isinstance(study, Study) else open_study(study)
    workspace = found.workspace
    images = workspace.dataset("validation") if data is None else data
    if images is None:
        raise UsageError(f"{found.path} has no validation images; name images that no trial saw")
    prepared = prepare(read_dataset(images) if isinstance(images, (str, Path)) else images, on_invalid="raise")
    both = set(prepared.image_digests) & set(workspace.image_digests("test"))
    if both:
        raise UsageError(f"{len(both)} of the images are the study's test images, which are for the end; name others")
    runs = {trial.number: trial.run for trial in found.ranking()[:top]}
    if not runs:
        raise UsageError(f"no trial of {found.path} has finished yet")
    named = {f"trial {number}": run for number, run in runs.items()}
    scored = evaluate_all(named, prepared.data, progress=progress)
    found.keep_rescored({number: one.scores["AP"] for number, one in zip(runs, scored, strict=True)})
    return found


def describe(search: Search) -> list[str]:
    """Say what is searched, in sentences."""
    better = {"max": "more is better", "min": "less is better"}[search.mode]
    space = ", ".join(f"{name} {range_}" for name, range_ in search.space.items())
    ends = "" if search.pruner == "none" else f"; {search.pruner} ends those that are behind"
    at_once = "" if search.parallel == 1 else f", {search.parallel} at once"
    return [
        f"search {space}",
        f"judge  {search.metric}, {better}; {search.trials} trials{at_once}, chosen by {search.sampler}{ends}",
    ]


def _of_all(plan: Plan, search: Search) -> Plan:
    """Return the plan of all trials from that of one."""
    if plan.worst_case_s is None:
        return plan
    rounds = math.ceil(search.trials / search.parallel)
    price = None if plan.price_per_hour is None else plan.price_per_hour * search.trials / rounds
    note = f"the requests are those of one trial; there are {search.trials}"
    return replace(plan, worst_case_s=plan.worst_case_s * rounds, price_per_hour=price, notes=(*plan.notes, note))


def _laid_out(path: Path, record: StudyRecord, ready: Ready) -> Study:
    """Make a study's directory, and the study in its storage. Where that fails nothing stays of it."""
    ready.lay_out(path)
    if ready.code is not None:
        trust.remember(ready.code.digest)
    try:
        searched_there = record.search.sampler in ready.resolved.backend.samplers
        identity = _identity(record, ready)
        return Study.create(path, record, identity, (lambda _: None) if searched_there else begin)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time lay out, or join, the study of a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.parent / f".{path.name}.lock"
    while True:
        with contextlib.suppress(BlockingIOError):
            lock = lock_file(place)
            break
        time.sleep(0.05)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def _identity(record: StudyRecord, ready: Ready) -> dict[str, Any]:
    """Return what is the same for all who work on a study."""
    search = msgspec.to_builtins(record.search)
    kept = {name: search[name] for name in ("space", "metric", "mode", "sampler", "pruner", "seed")}
    data = {channel: prepared.data.digest() for channel, prepared in ready.gathered.prepared.items()}
    fixed = {name: value for name, value in ready.job.params.items() if name not in record.search.space}
    kept |= {
        "max_cost": search["max_cost"],
        "parameters": fixed,
        "code": ready.job.code.digest if ready.job.code is not None else "",
    }
    return {**kept, "model": f"{record.backend}/{record.model}", "classes": ready.job.classes, "data": data}


def _joined(study: Study, record: StudyRecord, ready: Ready) -> Study:
    if study.record.storage != record.storage:
        raise UsageError(f"{study.path} keeps its results elsewhere; choose another name, or that storage")
    for name in ("trials", "parallel"):  # what all agree in is compared below
        theirs, ours = getattr(study.search, name), getattr(record.search, name)
        if theirs != ours:
            raise UsageError(
                f"{study.path} was begun with {name}={theirs}, and this is {name}={ours}; "
                f"`detkit tune --resume {study.path} --{name} {ours}` changes that"
            )
    study.found(_identity(record, ready), begin)
    return study


def _read_space(given: Mapping[str, Range | str]) -> dict[str, Range]:
    space: dict[str, Range] = {}
    for name, range_ in given.items():
        read = read_range(name, range_) if isinstance(range_, str) else range_
        if read is None or isinstance(read, str):
            raise InvalidValue(name, range_, "a range, such as 1e-5..1e-2:log, 4..32 or sgd|adamw")
        space[name] = read
    return space


def _seconds(budget: str | float | None) -> float | None:
    if budget is None or isinstance(budget, int | float):
        if budget is not None and budget <= 0:
            raise InvalidValue("budget", budget, "a time above 0, such as 2h or 90m")
        return budget
    try:
        return _seconds(float(seconds(budget)))
    except ValueError as error:
        raise InvalidValue("budget", budget, str(error)) from None


def _require_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidValue(name, value, "a whole number from 1")
