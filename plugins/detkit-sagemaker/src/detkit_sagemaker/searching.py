"""From a search to the exact request of a tuning job: what AWS's automatic model tuning, AMT, can do of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from detkit import catalog
from detkit.durations import duration
from detkit.errors import InvalidValue, UnknownName, Unsupported, UsageError
from detkit.events import pattern
from detkit.job import Job, Workspace
from detkit.params import INSTEAD, Params, coerce, set_fields
from detkit.plans import Concern, Plan, to_cents
from detkit.spaces import Choice, Range, Scalar, typing_hints
from detkit.tuning import Mode, Search
from detkit_sagemaker import builtin, creating, pricing, ranges, tunable, uploads
from detkit_sagemaker.aws import Aws, AwsError
from detkit_sagemaker.builtin import FOREIGN
from detkit_sagemaker.jumpstart import HubModel
from detkit_sagemaker.models import SagemakerModels
from detkit_sagemaker.options import SagemakerOptions
from detkit_sagemaker.ranges import STRATEGIES, Searched
from detkit_sagemaker.requests import Request, check_request, tuning_name, tuning_request
from detkit_sagemaker.resources import is_missing
from detkit_sagemaker.submission import Submission, kind_of, prepare

RECORD = "tuning.json"
"""The file of a study that says which tuning job it has."""

_MOST_DEFINITIONS, _MOST_HYPERPARAMETERS = 40, 99
"""As many as a request may have; one hyperparameter more is AMT's own (Developer Guide, "Best Practices")."""


def kept_back(model: str) -> tuple[str, ...]:
    """Return the channels of a study that its trials do not get: test images never, and what JumpStart would mix in."""
    return ("test", "validation") if kind_of(model) == "jumpstart" else ("test",)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Everything that starting a tuning job takes. Nothing of it has been done."""

    name: str
    request: Request
    ready: Submission
    """Of one of its training jobs."""
    searched: Mapping[str, Searched]
    objective: str
    trials: int
    options: SagemakerOptions
    seconds: float
    """That one training job may take."""
    notes: list[str]

    @property
    def price_per_hour(self) -> float | None:
        """US dollars of one training job."""
        return self.ready.estimate.price_per_hour

    def plan(self, aws: Aws) -> Plan:
        """Return what would be done. Looks at S3 and at the account; changes nothing."""
        ready, parallel = self.ready, self.request["HyperParameterTuningJobConfig"]["ResourceLimits"]
        at_once = min(parallel["MaxParallelTrainingJobs"], self.trials)
        waves = math.ceil(self.trials / at_once)
        price = None if self.price_per_hour is None else self.price_per_hour * self.trials / waves
        operation = f"Create{creating.TUNING.title}"
        rejected = [Concern(level="error", message=line) for line in check_request(operation, self.request)]
        return Plan(
            place=f"sagemaker {aws.region}, account {aws.account}",
            notes=tuple(self.notes),
            uploads=uploads.total((bundle, bundle.missing(aws, ready.root)) for bundle in ready.bundles),
            requests=((operation, self.request),),
            worst_case_s=waves * self.seconds,
            price_per_hour=price,
            price_source=ready.estimate.source,
            concerns=(*rejected, *ready.look_at_account(aws, at_once=at_once)),
        )


def prepared(aws: Aws, workspace: Workspace, job: Job, search: Search, folder: Path) -> Tuning:
    """Return a search's request and the data of its trials, written into ``folder``; only looks at AWS.

    Raises `Unsupported` for what AMT cannot do, `UsageError`, `MissingSettings` and `AwsError`.
    """
    if search.sampler not in STRATEGIES:
        raise UnknownName("sampler of SageMaker", search.sampler, STRATEGIES)
    objective = _objective(job, workspace, search)
    given = msgspec.convert(job.options, SagemakerOptions)
    name = tuning_name(workspace.path.name)
    for_one = msgspec.structs.replace(_with_ends(job, search), options={**job.options, "max_cost": None})
    ready = prepare(aws, workspace, for_one, folder, name=name, but=kept_back(job.model))
    found = ranges.searched(search.space, search.sampler, _wire(job, ready.hub))
    trials, notes = search.trials, [*ready.notes, *ranges.notes(found)]
    if search.sampler == "amt-grid":
        trials = ranges.combinations(found)
        if trials > search.trials:
            raise UsageError(
                f"the grid has {trials} combinations, and trials={search.trials}; give trials={trials}, or fewer values"
            )
    training = _training(ready, job, search, objective, found)
    seconds = training["StoppingCondition"]["MaxRuntimeInSeconds"]
    if given.max_cost is not None and (within := _within(given.max_cost, trials, ready)) < seconds:
        training["StoppingCondition"] = {**training["StoppingCondition"], "MaxRuntimeInSeconds": within}
        notes.append(f"max_cost={given.max_cost:g} ends each trial after {duration(within)}")
        seconds = within
    request = tuning_request(
        name=name,
        training=training,
        ranges=ranges.request_of(found),
        strategy=STRATEGIES[search.sampler],  # type: ignore[arg-type]
        objective=objective,
        mode=search.mode,
        trials=trials,
        parallel=min(search.parallel, trials),
        early_stopping=search.pruner == "median",
        seed=search.seed,
        budget_s=search.budget_s,
        epochs=_epochs(job, training) if search.sampler == "amt-hyperband" else None,
    )
    if search.parent:
        request["WarmStartConfig"] = warm_start(aws, search.parent, request)
        notes.append(f"learns from {search.parent}, as {request['WarmStartConfig']['WarmStartType']}")
    better = {"max": "more", "min": "less"}[search.mode]
    strategy, stopping = STRATEGIES[search.sampler], request["HyperParameterTuningJobConfig"]
    notes.insert(
        0,
        f"SageMaker searches by itself ({strategy}): {trials} trials, at most {min(search.parallel, trials)} at once, "
        f"judged by {objective}, {better} is better",
    )
    if stopping["TrainingJobEarlyStoppingType"] == "Auto":
        notes.append("AWS ends trials that are behind the median of the earlier ones; pruner=none lets all go on")
    return Tuning(
        name=name,
        request=request,
        ready=ready,
        searched=found,
        objective=objective,
        trials=trials,
        options=given,
        seconds=seconds,
        notes=notes,
    )


def _with_ends(job: Job, search: Search) -> Job:
    """Return a job of AWS's own with the largest of what is searched: what its data forbids, that forbids most."""
    if kind_of(job.model) == "ours":
        return job
    base = msgspec.convert(job.params, type(SagemakerModels()[job.model].params))
    hints = typing_hints(type(base))
    ends = {name: _largest(name, one, hints[name]) for name, one in search.space.items()}
    params = set_fields(base, ends, kind=f"parameter of {job.model}", origins=dict.fromkeys(ends, "the space"))
    return msgspec.structs.replace(job, params=msgspec.to_builtins(params))


def _largest(name: str, range_: Range, hint: Any) -> Scalar:
    """Return the largest number of a range; of words, which have no order, the last."""
    if not isinstance(range_, Choice):
        return range_.high
    typed = ((value, coerce(name, value, hint, origin="the space")) for value in range_.values)
    numbers = [(number, value) for value, number in typed if isinstance(number, int | float)]
    return max(numbers, key=lambda one: one[0])[1] if numbers else range_.values[-1]


def _objective(job: Job, workspace: Workspace, search: Search) -> str:
    """Return the metric as the request names it."""
    known = tunable.metrics(job.model)
    if search.metric not in known:
        told = ", ".join(f"{name} ({_mode_of(known, name)})" for name in known)
        raise Unsupported(f"SageMaker cannot judge {job.model} by {search.metric}; what it reports: {told}")
    if search.metric.startswith("val/") and workspace.dataset("validation") is None:
        raise UsageError(f"{search.metric} is of validation images, and there are none; give some (val=)")
    return search.metric.removeprefix(FOREIGN)


def _mode_of(known: Mapping[str, Mode], name: str) -> str:
    try:
        return known[name]
    except UsageError:  # its name does not tell
        return "max or min"


def _wire(job: Job, hub: HubModel | None) -> ranges.Wire:
    """Return what tells how a parameter's value is sent, and refuses one that the model does not take."""
    params = SagemakerModels()[job.model].params
    hints = typing_hints(type(params))

    def wire(name: str, value: Scalar) -> tuple[str, str]:
        typed = coerce(name, value, hints[name], origin="the space")
        if hub is not None:
            native, text = hub.native(name, typed)
            return native, msgspec.json.encode(text).decode()
        return name, builtin.text(typed) if kind_of(job.model) == "builtin" else text_of(typed)

    return wire


def text_of(value: Any) -> str:
    """Return a parameter as our container reads it from a text."""
    if isinstance(value, list | tuple):
        return ",".join(map(text_of, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _training(ready: Submission, job: Job, search: Search, objective: str, found: Mapping[str, Searched]) -> Request:
    """Return the request of a trial's training job, from that of one job that has nothing to search."""
    training = dict(ready.request)
    hyperparameters = dict(training.get("HyperParameters", {}))
    if ready.kind == "ours":
        hyperparameters = _fixed(job, search)
    if ready.kind != "builtin":  # whose metrics AWS knows
        regex = pattern(objective) if ready.kind == "ours" else ready.metrics[objective]
        training["AlgorithmSpecification"] = _reporting(training["AlgorithmSpecification"], objective, regex)
    if len({*hyperparameters, *(parameter.name for parameter in found.values())}) > _MOST_HYPERPARAMETERS:
        raise Unsupported(f"SageMaker takes {_MOST_HYPERPARAMETERS} hyperparameters, and {job.model} has more")
    return {**training, "HyperParameters": hyperparameters}


def _within(max_cost: float, trials: int, ready: Submission) -> int:
    """Return the seconds that each trial may take so that all of them cost no more."""
    price = ready.estimate.price_per_hour
    if price is None:
        raise UsageError(
            f"max_cost={max_cost:g} cannot be kept: the price of {ready.estimate.source}; or give yes=True (--yes) and "
            "rely on max_runtime"
        )
    seconds = int(max_cost / trials / price * 3600 + 1e-6)
    if seconds < pricing.SHORTEST:
        least = price * pricing.SHORTEST / 3600
        enough = int(max_cost / least + 1e-9)
        so = f"this is enough for trials={enough}" if enough else f"one trial takes {to_cents(least):.2f}"
        raise InvalidValue(
            "max_cost",
            max_cost,
            f"at least {to_cents(least * trials):.2f} for {trials} trials of {duration(pricing.SHORTEST)}, as starting "
            f"alone takes minutes; {so}",
        )
    return seconds


def _fixed(job: Job, search: Search) -> dict[str, str]:
    """Return the parameters that no trial changes, as texts for our container.

    Its job has them as well. They are sent so that all searches of a model name the same hyperparameters, searched or
    not: AWS asks for that before one search may learn from another.
    """
    params: Params = SagemakerModels()[job.model].params
    hints = typing_hints(type(params))
    either = {**INSTEAD, **{theirs: ours for ours, theirs in INSTEAD.items()}}
    left_out = {either[name] for name in search.space if name in either} | set(search.space)
    typed = msgspec.structs.asdict(msgspec.convert(job.params, type(params)))
    sent = {name: text_of(value) for name, value in typed.items() if name not in left_out}
    return {name: text for name, text in sent.items() if text and _reads_back(name, text, typed[name], hints[name])}


def _reads_back(name: str, text: str, value: Any, hint: Any) -> bool:
    try:
        return bool(coerce(name, text, hint) == value)
    except InvalidValue:
        return False


def _reporting(algorithm: Request, objective: str, regex: str) -> Request:
    definitions = [one for one in algorithm.get("MetricDefinitions", ()) if one["Name"] != objective]
    first = {"Name": objective, "Regex": regex}
    return {**algorithm, "MetricDefinitions": [first, *definitions][:_MOST_DEFINITIONS]}


def _epochs(job: Job, training: Request) -> int:
    """Return how many epochs a trial has at most. Raises `UsageError` where that is not said."""
    sent = training["HyperParameters"].get("epochs") or job.params.get("epochs")
    digits = re.sub(r"\D", "", str(sent))
    if not digits:
        raise UsageError("amt-hyperband gives trials a number of epochs; say how many at most: epochs=N")
    return int(digits)


def warm_start(aws: Aws, parent: str, request: Request) -> Request:
    """Return ``WarmStartConfig`` for learning from an earlier tuning job, also by its study.

    Raises `UsageError` for what AWS would refuse.
    """
    for place in (Path(parent), catalog.runs_folder() / parent):
        if (place / RECORD).is_file():
            parent = json.loads((place / RECORD).read_bytes())["name"]
            break
    try:
        found = creating.describe(aws, creating.TUNING, parent)
    except AwsError as error:
        if not is_missing(error):
            raise
        raise UsageError(
            f"there is no tuning job {parent} in account {aws.account}, {aws.region}; "
            "`aws sagemaker list-hyper-parameter-tuning-jobs` lists them"
        ) from error
    if found["HyperParameterTuningJobStatus"] not in ("Completed", "Stopped", "Failed"):
        raise UsageError(f"tuning job {parent} still goes on; wait for its end, or leave parent= out")
    theirs, ours = found["HyperParameterTuningJobConfig"], request["HyperParameterTuningJobConfig"]
    judged = [one.get("HyperParameterTuningJobObjective") for one in (theirs, ours)]
    if judged[0] != judged[1]:
        raise UsageError(f"tuning job {parent} is judged by {judged[0]}, and this one by {judged[1]}; use the same")
    before, now = _named(found), _named(request)
    if before != now:
        raise UsageError(
            f"AWS lets a search learn only from one with the same hyperparameters, searched or not; {parent} has "
            f"{', '.join(sorted(before - now)) or 'none'} that this one lacks, and lacks "
            f"{', '.join(sorted(now - before)) or 'none'}"
        )
    same = _data_and_algorithm(found) == _data_and_algorithm(request)
    return {
        "ParentHyperParameterTuningJobs": [{"HyperParameterTuningJobName": parent}],
        "WarmStartType": "IdenticalDataAndAlgorithm" if same else "TransferLearning",
    }


def _named(job: Mapping[str, Any]) -> set[str]:
    """Return the names of all hyperparameters, fixed and searched."""
    definition = job["TrainingJobDefinition"]
    tuned = job["HyperParameterTuningJobConfig"].get("ParameterRanges", {}).values()
    fixed = {name for name in definition.get("StaticHyperParameters", {}) if not name.startswith("_")}
    return fixed | {one["Name"] for kind in tuned for one in kind}


def _data_and_algorithm(job: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """Return the image and where each channel lies; places come of contents. Our job's own says what is searched."""
    definition = job["TrainingJobDefinition"]
    places = {
        one["ChannelName"]: one["DataSource"]["S3DataSource"]["S3Uri"]
        for one in definition.get("InputDataConfig", [])
        if one["ChannelName"] != "job"
    }
    return definition["AlgorithmSpecification"]["TrainingImage"], places
