"""The call that begins what costs money, so that afterwards it is known whether a job is there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from detkit.errors import DetkitWarning, UsageError
from detkit_sagemaker import ledger
from detkit_sagemaker.aws import Aws, AwsError, explained
from detkit_sagemaker.resources import is_missing


class Kind(NamedTuple):
    """A kind of job, in AWS's words."""

    noun: str
    title: str
    """In the names of operations and members: ``TrainingJob`` of ``CreateTrainingJob`` and ``TrainingJobName``."""
    method: str
    """In the names of boto3's methods: ``training_job``."""
    kept_as: ledger.Kind
    """In the ledger."""

    def name(self, request: Mapping[str, Any]) -> str:
        return str(request[f"{self.title}Name"])


TRAINING = Kind("training job", "TrainingJob", "training_job", "training-job")
TUNING = Kind("tuning job", "HyperParameterTuningJob", "hyper_parameter_tuning_job", "tuning-job")


def create(aws: Aws, kind: Kind, request: Mapping[str, Any], *, again: str, ends: str) -> Exception | None:
    """Create a job; return the error where AWS refused it, so that there is none. Ctrl-C stops it again.

    boto3 calls again where an answer got lost, so an error does not mean that there is no job; that is asked for.
    ``again`` and ``ends`` are what to type to follow the job, and to end it. Raises `AwsError` where nobody can tell.
    """
    name = kind.name(request)
    try:
        with explained(f"starting {kind.noun} {name} (sagemaker:Create{kind.title})"):
            getattr(aws.client("sagemaker"), f"create_{kind.method}")(**request)
    except UsageError as error:  # of boto3 itself, which sent nothing
        return error
    except AwsError as error:
        try:
            found = describe(aws, kind, name)
        except AwsError as unknown:
            if is_missing(unknown):
                return error
            raise type(error)(f"{error}. if it runs all the same, {again} follows it", error.code) from unknown
        # Its name has a part by chance, so with our role and place of output it is ours. AWS completes all else.
        return None if _work(found) == _work(request) else error
    except KeyboardInterrupt:
        told = f"asked AWS to stop {kind.noun} {name}, which was just beginning; {again} shows it"
        try:
            stop(aws, kind, name)
        except AwsError as error:
            told = f"{error}. if the job runs it costs: {ends} ends it"
        warnings.warn(told, DetkitWarning, stacklevel=2)
        raise
    return None


def describe(aws: Aws, kind: Kind, name: str) -> dict[str, Any]:
    """Ask AWS for a job. Raises `AwsError`."""
    with explained(f"asking for {kind.noun} {name} (sagemaker:Describe{kind.title})"):
        answer: dict[str, Any] = getattr(aws.client("sagemaker"), f"describe_{kind.method}")(
            **{f"{kind.title}Name": name}
        )
    return answer


def stop(aws: Aws, kind: Kind, name: str) -> None:
    """Ask AWS to stop a job. Raises `AwsError`."""
    with explained(f"stopping {kind.noun} {name} (sagemaker:Stop{kind.title})"):
        getattr(aws.client("sagemaker"), f"stop_{kind.method}")(**{f"{kind.title}Name": name})


def _work(job: Mapping[str, Any]) -> tuple[str, str]:
    definition = job.get("TrainingJobDefinition", job)
    return definition["RoleArn"], definition["OutputDataConfig"]["S3OutputPath"]
