"""A tuning job at AWS, as a search that detkit follows: started, looked at, stopped, and its trials brought here."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from detkit.errors import RunExists, RunFailed, UsageError
from detkit.files import place_all, write_json
from detkit.job import Job, Workspace
from detkit.plans import Plan
from detkit.tuning import PlaceTrial, Search, TrialState, TuningJob
from detkit_sagemaker import creating, ranges, recovery, searching, uploads
from detkit_sagemaker.aws import Aws, AwsError, code_of, explained, may_pass
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.resources import is_missing
from detkit_sagemaker.runs import RECORD as RUN_RECORD
from detkit_sagemaker.runs import RemoteJob, SagemakerRun
from detkit_sagemaker.searching import RECORD
from detkit_sagemaker.spending import approve
from detkit_sagemaker.trials import RemoteTuning, become_trial, sent

Attach: TypeAlias = Callable[[Workspace], SagemakerRun]

_SHORTEST_S, _LONGEST_S, _SHARE = 0.3, 20.0, 0.05
"""AWS is asked again after a twentieth of the search's age, within these bounds."""
_SETTLED_S = 10.0
"""A tuning job that AWS does not know so long after it was to be created never was."""
_PATIENCE_S = 300.0
"""So long the last answer stands where AWS cannot be reached or is too busy."""
_PENDING_S = 60.0
"""So long after the end of a training job AWS may still be reading its metric."""
_IN_VAIN = 3
"""A search is ended after so many trials that finished without a word of the metric, when none had one."""
_POLL_S = 0.1
_UNKNOWN = {"ValidationException", "ResourceNotFound"}
Json = dict[str, Any]


def plan(aws: Aws, job: Job, workspace: Workspace, search: Search) -> Plan:
    """Return what `start` would do. Looks at S3 and at the account; changes nothing."""
    with tempfile.TemporaryDirectory(prefix="detkit-sagemaker-") as folder:
        return searching.prepared(aws, workspace, job, search, Path(folder)).plan(aws)


def start(aws: Aws, job: Job, workspace: Workspace, search: Search, attach: Attach) -> SagemakerTuning:
    """Send the data of a study, and start its tuning job. Raises `UsageError`, and `AwsError` where AWS refuses it."""
    file = workspace.path / RECORD
    if file.is_file():
        raise UsageError(f"{workspace.path} has a tuning job already; begin a new study, which may learn from it")
    try:
        with tempfile.TemporaryDirectory(prefix="detkit-sagemaker-") as folder:
            found = searching.prepared(aws, workspace, job, search, Path(folder))
            planned = found.plan(aws)
            approve(planned, found.options)
            for line in planned.summary().splitlines():
                workspace.log("log", {"message": line})
            remote = RemoteTuning(
                name=found.name,
                region=aws.region,
                account=aws.account,
                kind=found.ready.kind,
                request=found.request,
                created=time.time(),
                searched=dict(found.searched),
                metrics=dict(found.ready.metrics),
                hosting=dict(found.ready.hosting),
                price_per_hour=found.price_per_hour,
                max_cost=found.options.max_cost,
            )
            uploads.ensure_bucket(aws, found.ready.root)
            for bundle in found.ready.bundles:
                bundle.upload(aws, found.ready.root, found.options.kms_key)
        write_json(file, msgspec.structs.replace(remote, created=time.time()))
        recovery.keep(aws, found.ready.root, workspace, found.name, found.options.kms_key)
        Ledger.of(aws).creating("tuning-job", found.name)
    except BaseException:  # nothing was begun
        file.unlink(missing_ok=True)
        raise
    again, ends = f"`detkit tune --resume {workspace.path}`", f"`detkit studies stop {workspace.path}`"
    refused = creating.create(aws, creating.TUNING, found.request, again=again, ends=ends)
    if refused is not None:
        file.unlink()
        Ledger.of(aws).gone("tuning-job", found.name)
        raise refused
    workspace.log("log", {"message": f"tuning job {found.name} in {aws.region}"})
    return SagemakerTuning(workspace, attach, aws=aws)


class SagemakerTuning(TuningJob):
    """A tuning job, followed from the directory of its study. It goes on when nobody looks."""

    def __init__(self, workspace: Workspace, attach: Attach, *, aws: Aws | None = None) -> None:
        """``attach`` makes a run of a trial's directory. Raises `UsageError` where no tuning job was started."""
        self.workspace = workspace
        self._attach, self._aws = attach, aws
        self._asked = 0.0  # not before then AWS is asked again
        self._unreachable_since: float | None = None  # by `time.monotonic`
        self._children: list[Json] | None = None
        self._stopped_by: dict[str, str] = {}
        """AWS's word for it, by training job."""
        self.name = self.remote.name

    @property
    def remote(self) -> RemoteTuning:
        """The job at AWS."""
        file = self.workspace.path / RECORD
        if not file.is_file():
            raise UsageError(f"{self.workspace.path} was never sent to SageMaker: there is no {RECORD} in it")
        return msgspec.json.decode(file.read_bytes(), type=RemoteTuning)

    @property
    def aws(self) -> Aws:
        """The account that the job is in. Raises `UsageError` where the credentials are of another one."""
        if self._aws is None:
            remote = self.remote
            self._aws = Aws.of_account(remote.account, remote.region, f"the tuning job of {self.workspace.path}")
        return self._aws

    @property
    def status(self) -> Literal["running", "finished", "failed", "stopped"]:
        self._refresh()
        remote = self.remote
        if not remote.is_over or self._is_pending:
            return "running"
        if remote.in_vain or remote.status in ("Failed", "Missing"):
            return "failed"
        return "finished" if remote.status == "Completed" else "stopped"

    @property
    def reason(self) -> str:
        return self.remote.reason

    @property
    def cost(self) -> float | None:
        price = self.remote.price_per_hour
        if price is None:
            return None
        return price * sum(map(_seconds, self._summaries())) / 3600

    def trials(self) -> list[PlaceTrial]:
        self._refresh()
        return [self._trial(one) for one in self._summaries()]

    def stop(self) -> None:
        try:
            creating.stop(self.aws, creating.TUNING, self.name)
        except AwsError as error:
            if code_of(error) not in _UNKNOWN:  # else it has just ended
                raise
        self._asked = 0.0

    def bring(self, trial: PlaceTrial, path: Path) -> SagemakerRun:
        """Make the run directory of a trial that has ended, and return its run, whose model can be opened.

        Raises `RunFailed` where the training job did not get the values that were chosen for it.
        """
        answer = creating.describe(self.aws, creating.TRAINING, trial.name)
        if not _is_of(path, trial.name):
            self._lay_out(trial, answer, path)
        run = self._attach(Workspace(path))
        while run.goes_on():
            time.sleep(_POLL_S)
        self._prove(trial, answer, run)
        return run

    def _refresh(self) -> None:
        """Ask AWS where the search stands, no more often than makes sense; end it where it is in vain, or spent."""
        remote = self.remote
        now, age = time.monotonic(), time.time() - remote.created
        if now < self._asked or (remote.is_over and self._children is not None and not self._is_pending):
            return
        self._asked = now + min(max(age * _SHARE, _SHORTEST_S), _LONGEST_S)
        try:
            answer = self._describe(remote)
            self._children = [] if answer is None else self._list()
        except AwsError as error:
            self._unreachable_since = self._unreachable_since or now
            if not may_pass(error) or now - self._unreachable_since > _PATIENCE_S:
                again = f"the tuning job {remote.name} is not affected; `detkit tune --resume {self.workspace.path}`"
                raise type(error)(f"{error}. {again} follows it", error.code) from error
            return
        self._unreachable_since = None
        if answer is None:
            if age > _SETTLED_S:
                reason = (
                    f"AWS knows no tuning job {remote.name}: it was never created, or is long gone; remove "
                    f"{self.workspace.path} and begin again"
                )
                self._keep(msgspec.structs.replace(remote, status="Missing", reason=reason))
            return
        said = answer.get("FailureReason", "")
        remote = msgspec.structs.replace(
            remote, status=answer["HyperParameterTuningJobStatus"], reason=remote.reason or said
        )
        self._keep(self._judged(remote))

    def _judged(self, remote: RemoteTuning) -> RemoteTuning:
        """End a search that cannot find anything, or that has spent its money; say why, also where it has ended."""
        completed = (one for one in self._children or () if one["TrainingJobStatus"] == "Completed")
        done = [one for one in completed if not _is_pending(one)]
        judged = [one for one in self._children or () if _objective_of(one) is not None]
        if not judged and not remote.in_vain and (len(done) >= _IN_VAIN or (done and remote.is_over)):
            reason = (
                f"{len(done)} trials finished, and none reported {remote.objective}, which the search is judged by; "
                f"look at the log of {done[0]['TrainingJobName']} for what it reports"
            )
            remote = msgspec.structs.replace(remote, in_vain=True, reason=reason)
        elif not remote.reason and not remote.is_over and (cost := self.cost) is not None:
            if remote.max_cost is None or cost < remote.max_cost:
                return remote
            reason = f"about {cost:.2f} USD are spent, and max_cost={remote.max_cost:g}"
            remote = msgspec.structs.replace(remote, reason=reason)
        else:
            return remote
        self.workspace.log("log", {"message": remote.reason})
        if remote.status == "InProgress":
            self.stop()
        return remote

    def _keep(self, remote: RemoteTuning) -> None:
        write_json(self.workspace.path / RECORD, remote)
        if remote.is_over:
            Ledger.of(self.aws).gone("tuning-job", remote.name)

    def _describe(self, remote: RemoteTuning) -> Json | None:
        try:
            return creating.describe(self.aws, creating.TUNING, remote.name)
        except AwsError as error:
            if is_missing(error):
                return None
            raise

    @property
    def _is_pending(self) -> bool:
        return any(map(_is_pending, self._children or ()))

    def _summaries(self) -> list[Json]:
        if self._children is None:
            self._children = self._list()
        return self._children

    def _list(self) -> list[Json]:
        operation = "list_training_jobs_for_hyper_parameter_tuning_job"
        pages = self.aws.client("sagemaker").get_paginator(operation)
        what = f"listing the trials of {self.name} (sagemaker:ListTrainingJobsForHyperParameterTuningJob)"
        with explained(what):
            found = pages.paginate(HyperParameterTuningJobName=self.name, SortBy="CreationTime", SortOrder="Ascending")
            listed = [one for page in found for one in page["TrainingJobSummaries"]]
        for one in listed:  # the list does not say who stopped one
            name = one["TrainingJobName"]
            if one["TrainingJobStatus"] == "Stopped" and _objective_of(one) is not None:
                if name not in self._stopped_by:
                    self._stopped_by[name] = creating.describe(self.aws, creating.TRAINING, name)["SecondaryStatus"]
                one["SecondaryStatus"] = self._stopped_by[name]
        return listed

    def _trial(self, summary: Mapping[str, Any]) -> PlaceTrial:
        remote = self.remote
        state, reason = _state(summary, remote.objective)
        return PlaceTrial(
            name=summary["TrainingJobName"],
            values=ranges.read(remote.searched, summary["TunedHyperParameters"]),
            state=state,
            value=_objective_of(summary),
            reason=reason,
            seconds=_seconds(summary),
        )

    def _lay_out(self, trial: PlaceTrial, answer: Mapping[str, Any], path: Path) -> None:
        """Make a run directory in which only what AWS has is missing; whole, or not at all."""
        study = self.workspace.job()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as beside:
            workspace = Workspace(Path(beside) / "run")
            workspace.create(study)
            but = {"job", *searching.kept_back(study.model)}
            place_all(self.workspace.path / "input/data", workspace.path / "input/data", but)
            become_trial(workspace, self.remote, trial.values, answer)
            if path.is_dir():
                if any(path.iterdir()) and not (path / RUN_RECORD).is_file():
                    raise RunExists(path, "other files")
                shutil.rmtree(path)  # another trial's, that could not be brought
            shutil.move(workspace.path, path)

    def _prove(self, trial: PlaceTrial, answer: Mapping[str, Any], run: SagemakerRun) -> None:
        """Raise `RunFailed` unless what was chosen is what was trained with."""
        there = sent(self.remote, answer)
        other: Json = {name: there.get(name) for name in trial.values if there.get(name) != trial.values[name]}
        if not other and self.remote.kind == "ours" and run.status == "finished":
            trained, asked = run.model.manifest.params, run.job.params
            other = {name: trained.get(name) for name in trial.values if trained.get(name) != asked[name]}
        if other:
            told = ", ".join(
                f"{name}={trial.values[name]} was chosen, and {value} used" for name, value in other.items()
            )
            raise RunFailed(f"training job {trial.name} did not get the values of its trial: {told}", run.log_tail())


def _is_of(path: Path, name: str) -> bool:
    """Return whether a directory is the run of a training job, or of what was resumed from it."""
    file = path / RUN_RECORD
    if not file.is_file():
        return False
    remote = msgspec.json.decode(file.read_bytes(), type=RemoteJob)
    return name in (remote.name, *remote.earlier)


def _objective_of(summary: Mapping[str, Any]) -> float | None:
    found = summary.get("FinalHyperParameterTuningJobObjectiveMetric")
    return None if found is None else float(found["Value"])


def _is_pending(summary: Mapping[str, Any]) -> bool:
    """Return whether a training job has just ended and AWS does not know its metric yet."""
    ended = summary.get("TrainingEndTime")
    waits = summary.get("ObjectiveStatus") == "Pending" and summary["TrainingJobStatus"] in ("Completed", "Stopped")
    return waits and ended is not None and abs(time.time() - ended.timestamp()) < _PENDING_S


def _state(summary: Mapping[str, Any], objective: str) -> tuple[TrialState, str]:
    """Return where a training job stands as a trial, and why it failed."""
    status, value = summary["TrainingJobStatus"], _objective_of(summary)
    if status in ("InProgress", "Stopping") or (value is None and _is_pending(summary)):
        return "running", ""
    if status == "Failed":
        return "failed", summary.get("FailureReason") or "SageMaker gives no reason"
    if value is None:
        ended = "it was stopped before it" if status == "Stopped" else "it finished and never"
        return "failed", f"{ended} reported {objective}"
    is_cut = summary.get("SecondaryStatus", "").startswith("Max")  # by its own time limit; AWS did not judge it
    return ("pruned" if status == "Stopped" and not is_cut else "finished"), ""


def _seconds(summary: Mapping[str, Any]) -> float:
    """Return for how long a training job has had its machines."""
    begun, ended = summary.get("TrainingStartTime"), summary.get("TrainingEndTime")
    if begun is None:
        return 0.0
    return float((time.time() if ended is None else ended.timestamp()) - begun.timestamp())
