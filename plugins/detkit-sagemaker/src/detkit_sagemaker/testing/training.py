"""Training jobs: what is checked when one is created, how they are listed and stopped."""

from __future__ import annotations

from typing import Any

from detkit_sagemaker.testing import channels, metrics
from detkit_sagemaker.testing.account import Account, Json
from detkit_sagemaker.testing.listing import listed
from detkit_sagemaker.testing.refusals import Refused
from detkit_sagemaker.testing.training_job import TrainingJob


class TrainingJobs:
    """SageMaker's operations on training jobs."""

    def __init__(self, account: Account) -> None:
        self._account = account

    def create_training_job(self, request: Json) -> Json:
        """Start a job."""
        return {"TrainingJobArn": self.start(request).arn}

    def start(self, request: Json, **more: Any) -> TrainingJob:
        """Check a request, start its job and return it. Raises `Refused`."""
        algorithm = request["AlgorithmSpecification"]
        wanted = metrics.definitions(algorithm["TrainingImage"], algorithm.get("MetricDefinitions", []))
        request = {**request, "AlgorithmSpecification": {**algorithm, "MetricDefinitions": wanted}}
        job = TrainingJob(self._account, request, **more)
        self._check(request)
        job.start()
        return job

    def _check(self, request: Json) -> None:
        account, algorithm = self._account, request["AlgorithmSpecification"]
        for name in ("ResourceConfig", "OutputDataConfig", "StoppingCondition"):
            if name not in request:
                raise Refused(f"{name} is missing: serverless training jobs are not simulated")
        account.check_role(request["RoleArn"])
        check_image(account, algorithm["TrainingImage"])
        mode = algorithm["TrainingInputMode"]
        channels.check(request.get("InputDataConfig", []), mode, account.storage)
        account.storage.check_bucket(request["OutputDataConfig"]["S3OutputPath"])
        checkpoints = request.get("CheckpointConfig")
        if checkpoints is not None:
            account.storage.check_bucket(checkpoints["S3Uri"])
            path = checkpoints.get("LocalPath", "/opt/ml/checkpoints")
            if not path.startswith("/opt/ml/") or ".." in path:
                raise Refused(f"CheckpointConfig.LocalPath {path} is not below /opt/ml, which is not simulated")
        self._check_spot(request)
        self._check_instances(request)

    @staticmethod
    def _check_spot(request: Json) -> None:
        stopping = request["StoppingCondition"]
        longest = stopping.get("MaxWaitTimeInSeconds")
        if request.get("EnableManagedSpotTraining"):
            if longest is None or longest < stopping.get("MaxRuntimeInSeconds", 86400):
                raise Refused(
                    "Invalid MaxWaitTimeInSeconds. It must be present and be greater than or equal to "
                    "MaxRuntimeInSeconds"
                )
        elif longest is not None:
            raise Refused("MaxWaitTimeInSeconds above 0 is not supported when EnableManagedSpotTraining is false")

    def _check_instances(self, request: Json) -> None:
        resources = request["ResourceConfig"]
        if "InstanceType" not in resources:
            raise Refused("ResourceConfig.InstanceType is missing: instance groups are not simulated")
        spot = request.get("EnableManagedSpotTraining", False)
        running = sum(
            job.request["ResourceConfig"].get("InstanceCount", 1)
            for job in self._account.all(TrainingJob)
            if not job.over
            and job.request["ResourceConfig"]["InstanceType"] == resources["InstanceType"]
            and job.request.get("EnableManagedSpotTraining", False) == spot
        )
        usage = "spot training job usage" if spot else "training job usage"
        self._account.quotas.check(usage, resources["InstanceType"], running, resources.get("InstanceCount", 1))

    def describe_training_job(self, request: Json) -> Json:
        """Describe a job."""
        return self._account.find(TrainingJob, request["TrainingJobName"]).description

    def list_training_jobs(self, request: Json) -> Json:
        """List the jobs."""
        return listed(self._account.all(TrainingJob), request, "TrainingJobSummaries")

    def stop_training_job(self, request: Json) -> Json:
        """Ask a job to stop."""
        self._account.find(TrainingJob, request["TrainingJobName"]).stop()
        return {}


def check_image(account: Account, image: str) -> None:
    """Raise `Refused` where there is no such image."""
    if account.images.command(image) is None:
        known = ", ".join(account.images.names)
        raise Refused(f"Cannot find image {image}. The simulator has {known}; give Simulator(images={{name: command}})")
