"""Automatic model tuning: jobs that really run training jobs of their own and compare their objective."""

from __future__ import annotations

import itertools
import time
import uuid
from datetime import timedelta
from typing import Any

from detkit_sagemaker.testing import metrics, sampling
from detkit_sagemaker.testing.account import TICK, Account, Job, Json, now
from detkit_sagemaker.testing.listing import listed, page
from detkit_sagemaker.testing.refusals import Refused
from detkit_sagemaker.testing.training import TrainingJobs
from detkit_sagemaker.testing.training_job import TrainingJob

_STATES = ("Completed", "InProgress", "RetryableError", "NonRetryableError", "Stopped")
_PASSED_ON = (
    "RoleArn",
    "InputDataConfig",
    "OutputDataConfig",
    "ResourceConfig",
    "StoppingCondition",
    "VpcConfig",
    "EnableNetworkIsolation",
    "EnableInterContainerTrafficEncryption",
    "EnableManagedSpotTraining",
    "RetryStrategy",
    "Environment",
)
_GIVEN_UP_AFTER = 5
"""A tuning job fails after so many failed training jobs when none has succeeded."""


class TuningJobs:
    """SageMaker's operations on hyperparameter tuning jobs."""

    def __init__(self, account: Account, training: TrainingJobs) -> None:
        self._account, self._training = account, training

    def create_hyper_parameter_tuning_job(self, request: Json) -> Json:
        """Start a job."""
        if "TrainingJobDefinition" not in request:
            raise Refused("TrainingJobDefinition is missing; several TrainingJobDefinitions are not simulated")
        settings, definition = request["HyperParameterTuningJobConfig"], request["TrainingJobDefinition"]
        algorithm = definition["AlgorithmSpecification"]
        if "TrainingImage" not in algorithm:
            raise Refused("AlgorithmSpecification.TrainingImage is missing; AlgorithmName is not simulated")
        known = metrics.definitions(algorithm["TrainingImage"], algorithm.get("MetricDefinitions", []))
        objective = settings.get("HyperParameterTuningJobObjective")
        if objective is None:
            raise Refused("HyperParameterTuningJobObjective is missing")
        allowed = [one["Name"] for one in known]
        if metrics.is_built_in(algorithm["TrainingImage"]):
            allowed = ["validation:mAP"]
        if objective["MetricName"] not in allowed:
            raise Refused(
                f"The objective metric {objective['MetricName']} is not among the metric definitions: {allowed}"
            )
        ranges = settings.get("ParameterRanges", definition.get("HyperParameterRanges", {}))
        sampling.check(settings["Strategy"], ranges, definition.get("StaticHyperParameters", {}))
        limits = settings["ResourceLimits"]
        if settings["Strategy"] != "Grid" and "MaxNumberOfTrainingJobs" not in limits:
            raise Refused("ResourceLimits.MaxNumberOfTrainingJobs is missing")
        if settings["Strategy"] == "Hyperband" and settings.get("TrainingJobEarlyStoppingType") == "Auto":
            raise Refused("TrainingJobEarlyStoppingType has to be Off with Hyperband, which stops jobs by itself")
        for parent in request.get("WarmStartConfig", {}).get("ParentHyperParameterTuningJobs", []):
            name = parent["HyperParameterTuningJobName"]
            _check_parent(self._account.find(TuningJob, name), objective, _names(ranges, definition))
        job = TuningJob(self._account, request, self._training, ranges)
        job.start()
        return {"HyperParameterTuningJobArn": job.arn}

    def describe_hyper_parameter_tuning_job(self, request: Json) -> Json:
        """Describe a job."""
        return self._found(request).description

    def list_hyper_parameter_tuning_jobs(self, request: Json) -> Json:
        """List the jobs."""
        return listed(self._account.all(TuningJob), request, "HyperParameterTuningJobSummaries")

    def stop_hyper_parameter_tuning_job(self, request: Json) -> Json:
        """Ask a job, and the training jobs it runs, to stop."""
        self._found(request).stop()
        return {}

    def list_training_jobs_for_hyper_parameter_tuning_job(self, request: Json) -> Json:
        """List the training jobs of a tuning job."""
        tuning = self._found(request)
        found = [one for one in tuning.children if request.get("StatusEquals", one.status) == one.status]
        if request.get("SortBy") == "FinalObjectiveMetricValue":
            found = [one for one in found if tuning.value(one) is not None]
            found.sort(key=lambda one: tuning.value(one) or 0.0)
        elif request.get("SortBy") == "Status":
            found.sort(key=lambda one: one.status)
        elif request.get("SortBy", "Name") == "Name":
            found.sort(key=lambda one: one.name)
        if request.get("SortOrder", "Ascending") == "Descending":
            found.reverse()
        return page([tuning.summary_of(one) for one in found], request, "TrainingJobSummaries")

    def _found(self, request: Json) -> TuningJob:
        return self._account.find(TuningJob, request["HyperParameterTuningJobName"])


def _names(ranges: Json, definition: Json) -> set[str]:
    """Return the names of all hyperparameters, searched or not."""
    return {*definition.get("StaticHyperParameters", {}), *(one["Name"] for kind in ranges.values() for one in kind)}


def _check_parent(parent: TuningJob, objective: Json, names: set[str]) -> None:
    """Raise `Refused` where a new tuning job may not learn from an earlier one. It learns nothing here."""
    if not parent.over:
        raise Refused(f"the parent {parent.name} is in status {parent.status}, and it has to be in a terminal one")
    if parent.objective != objective:
        raise Refused(f"the objective metric differs from that of the parent {parent.name}")
    if parent.names != names:
        differing = ", ".join(sorted(parent.names ^ names))
        raise Refused(f"the hyperparameters, static and tunable, differ from those of {parent.name}: {differing}")


class TuningJob(Job):
    """A hyperparameter tuning job."""

    kind, noun, title = "hyper-parameter-tuning-job", "tuning job", "HyperParameterTuningJob"

    def __init__(self, account: Account, request: Json, training: TrainingJobs, ranges: Json) -> None:
        super().__init__(account, request)
        self._training, self._ranges = training, ranges
        self._settings: Json = request["HyperParameterTuningJobConfig"]
        self._objective: dict[str, str] = self._settings["HyperParameterTuningJobObjective"]
        self._chosen: dict[str, dict[str, str]] = {}
        self.children: list[TrainingJob] = []
        """The training jobs that were started, the oldest first."""

    @property
    def objective(self) -> Json:
        """What its training jobs are judged by."""
        return self._objective

    @property
    def names(self) -> set[str]:
        """The names of all hyperparameters."""
        return _names(self._ranges, self.request["TrainingJobDefinition"])

    def value(self, child: TrainingJob) -> float | None:
        """Return the final objective of a training job; None where it has none, yet or ever."""
        return child.metrics.value(self._objective["MetricName"]) if self._is_judged(child) else None

    def _is_judged(self, child: TrainingJob) -> bool:
        late = timedelta(seconds=self.account.faults.seconds_to_objective)
        return child.over and (child.ended is None or now() - child.ended >= late)

    def summary_of(self, child: TrainingJob) -> Json:
        """Describe a training job as part of this tuning job."""
        described, value = child.description, self.value(child)
        names = ("TrainingStartTime", "TrainingEndTime", "FailureReason")
        answer = {
            "TrainingJobName": child.name,
            "TrainingJobArn": child.arn,
            "CreationTime": child.created,
            "TrainingJobStatus": child.status,
            "TunedHyperParameters": self._chosen[child.name],
            "ObjectiveStatus": self._objective_status(child),
            **{name: described[name] for name in names if name in described},
        }
        if value is not None:
            answer["FinalHyperParameterTuningJobObjectiveMetric"] = {**self._objective, "Value": value}
        return answer

    def _objective_status(self, child: TrainingJob) -> str:
        if not self._is_judged(child):
            return "Pending"
        return "Failed" if self.value(child) is None or child.status == "Failed" else "Succeeded"

    @property
    def _best(self) -> TrainingJob | None:
        good = [one for one in self.children if self._objective_status(one) == "Succeeded"]
        best = max if self._objective["Type"] == "Maximize" else min
        return best(good, key=lambda one: self.value(one) or 0.0, default=None)

    @property
    def _counters(self) -> Json:
        states = {"Failed": "NonRetryableError", "Stopping": "InProgress"}
        of_jobs = [states.get(one.status, one.status) for one in self.children]
        of_objectives = [self._objective_status(one) for one in self.children]
        return {
            "TrainingJobStatusCounters": {name: of_jobs.count(name) for name in _STATES},
            "ObjectiveStatusCounters": {name: of_objectives.count(name) for name in ("Succeeded", "Pending", "Failed")},
        }

    @property
    def description(self) -> Json:
        """The answer of DescribeHyperParameterTuningJob."""
        with self.account.lock:
            answer: dict[str, Any] = {
                **super().description,
                "HyperParameterTuningJobStatus": self.status,
                "LastModifiedTime": self.modified,
                **self._counters,
            }
            if self.ended is not None:
                answer["HyperParameterTuningEndTime"] = self.ended
            if self.failure:
                answer["FailureReason"] = self.failure
            if (best := self._best) is not None:
                answer["BestTrainingJob"] = self.summary_of(best)
        return answer

    @property
    def summary(self) -> Json:
        """What ListHyperParameterTuningJobs says."""
        ended = {} if self.ended is None else {"HyperParameterTuningEndTime": self.ended}
        return {
            **super().summary,
            "HyperParameterTuningJobStatus": self.status,
            "Strategy": self._settings["Strategy"],
            "LastModifiedTime": self.modified,
            "ResourceLimits": self._settings["ResourceLimits"],
            **self._counters,
            **ended,
        }

    def run(self) -> None:
        """Start training jobs, as many at once as allowed, until all are done, or it has to stop."""
        limits, begun = self._settings["ResourceLimits"], time.monotonic()
        strategy, seed = self._settings["Strategy"], self._settings.get("RandomSeed")
        wanted = itertools.islice(
            sampling.candidates(strategy, self._ranges, seed), limits.get("MaxNumberOfTrainingJobs")
        )
        coming = next(wanted, None)
        while True:
            running = [one for one in self.children if not one.over]
            longest = limits.get("MaxRuntimeInSeconds")
            late = longest is not None and time.monotonic() - begun > longest
            if self.stopping.is_set() or self.account.closing.is_set() or late or self._hopeless:
                break
            if coming is None and not running:
                break
            if coming is not None and len(running) < limits["MaxParallelTrainingJobs"]:
                try:
                    self._launch(coming)
                except Refused as error:
                    self._finish(f"ClientError: {error.message}")
                    return
                coming = next(wanted, None)
            else:
                self.stopping.wait(TICK)
        self._finish()

    @property
    def _hopeless(self) -> bool:
        states = [one.status for one in self.children]
        return "Completed" not in states and states.count("Failed") >= _GIVEN_UP_AFTER

    def _launch(self, chosen: dict[str, str]) -> None:
        definition: Json = self.request["TrainingJobDefinition"]
        name = f"{self.name}-{len(self.children) + 1:03d}-{uuid.uuid4().hex[:8]}"
        request = {
            **{key: definition[key] for key in _PASSED_ON if key in definition},
            "TrainingJobName": name,
            "AlgorithmSpecification": dict(definition["AlgorithmSpecification"]),
            "HyperParameters": {
                **definition.get("StaticHyperParameters", {}),
                **chosen,
                "_tuning_objective_metric": self._objective["MetricName"],
            },
            "Tags": [{"Key": key, "Value": value} for key, value in self.tags.items()],
        }
        if metrics.is_built_in(request["AlgorithmSpecification"]["TrainingImage"]):
            request["AlgorithmSpecification"].pop("MetricDefinitions", None)
        if "CheckpointConfig" in definition:  # each job has its own folder below the one that was given
            checkpoints = definition["CheckpointConfig"]
            uri = f"{checkpoints['S3Uri'].rstrip('/')}/{name}"
            request["CheckpointConfig"] = {**checkpoints, "S3Uri": uri}
        with self.account.lock:
            self._chosen[name] = chosen
            self.children.append(self._training.start(request, tuning={"TuningJobArn": self.arn}))

    def _finish(self, failure: str = "") -> None:
        """Stop what still runs, and end."""
        with self.account.lock:
            running = [one for one in self.children if not one.over]
        for one in running:
            try:
                one.stop()
            except Refused:
                continue  # it has just ended
        while any(not one.over for one in running) and not self.account.closing.is_set():
            self.account.closing.wait(TICK)
        if failure:
            self.end("Failed", failure)
        elif self.stopping.is_set():
            self.end("Stopped")
        elif self._hopeless or (self.children and all(one.status == "Failed" for one in self.children)):
            self.end("Failed", f"No training job succeeded after {len(self.children)} attempts.")
        else:
            self.end("Completed")
