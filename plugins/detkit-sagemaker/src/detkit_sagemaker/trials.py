"""A training job that a tuning job started, as a run: the study's job, with the values that were chosen for it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

import msgspec

from detkit.files import write_json
from detkit.job import Workspace
from detkit.params import set_fields
from detkit.runs import RunRecord
from detkit.spaces import Scalar
from detkit_sagemaker import runs, searching
from detkit_sagemaker.models import BACKEND, SagemakerModels
from detkit_sagemaker.ranges import Searched
from detkit_sagemaker.submission import Kind

Json = dict[str, Any]

_OF_A_REQUEST = (
    *("TrainingJobName", "AlgorithmSpecification", "HyperParameters", "InputDataConfig", "OutputDataConfig"),
    *("ResourceConfig", "StoppingCondition", "RoleArn", "CheckpointConfig", "Environment", "VpcConfig"),
    *("EnableNetworkIsolation", "EnableInterContainerTrafficEncryption", "EnableManagedSpotTraining"),
)


class RemoteTuning(msgspec.Struct, frozen=True, kw_only=True):
    """``tuning.json`` in a study: the tuning job at AWS, and what reading its trials takes."""

    name: str
    region: str
    account: str
    kind: Kind
    request: Json
    """As it was sent."""
    created: float
    """Seconds since the epoch (POSIX)."""
    searched: dict[str, Searched]
    metrics: dict[str, str] = {}
    """Expressions by metric, for the lines of images that are not ours."""
    hosting: Json = {}
    """As in `detkit_sagemaker.runs.RemoteJob`."""
    price_per_hour: float | None = None
    """US dollars of one trial's machines, estimated."""
    max_cost: float | None = None
    """US dollars after which it is ended."""
    status: str = "Creating"
    """SageMaker's word, as it was last heard; ``Missing`` for one that it does not know."""
    reason: str = ""
    """Why it failed, or was ended here."""
    in_vain: bool = False
    """Whether it was ended as no trial reported the metric."""

    @property
    def is_over(self) -> bool:
        return self.status in ("Completed", "Failed", "Stopped", "Missing")

    @property
    def objective(self) -> str:
        """The metric, by AWS's name."""
        judged: Json = self.request["HyperParameterTuningJobConfig"]["HyperParameterTuningJobObjective"]
        return str(judged["MetricName"])


def sent(remote: RemoteTuning, answer: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return the values that a training job was given of what is searched, from AWS's description of it."""
    given = answer.get("HyperParameters", {})
    return {name: one.read(given[one.name]) for name, one in remote.searched.items() if one.name in given}


def become_trial(
    workspace: Workspace, remote: RemoteTuning, values: Mapping[str, Scalar], answer: Mapping[str, Any]
) -> None:
    """Make a copy of a study's job and data the run of one of its trials, in which only what AWS has is missing."""
    study = workspace.job()
    base = msgspec.convert(study.params, type(SagemakerModels()[study.model].params))
    params = set_fields(base, values, kind=f"parameter of {study.model}")
    write_json(workspace.job_file, msgspec.structs.replace(study, params=msgspec.to_builtins(params)))
    for channel in searching.kept_back(study.model):
        shutil.rmtree(workspace.channel(channel), ignore_errors=True)
    for file in (searching.RECORD, "study.json"):
        (workspace.path / file).unlink(missing_ok=True)
    created = answer["CreationTime"].timestamp()
    record = runs.RemoteJob(
        name=answer["TrainingJobName"],
        region=remote.region,
        account=remote.account,
        kind=remote.kind,
        request={name: answer[name] for name in _OF_A_REQUEST if name in answer},
        created=created,
        metrics=remote.metrics,
        hosting=remote.hosting,
        price_per_hour=remote.price_per_hour,
        staged=True,
    )
    write_json(workspace.path / runs.RECORD, record)
    write_json(workspace.run_file, RunRecord(backend=BACKEND, model=study.model, created=created))
