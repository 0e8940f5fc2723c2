"""Automatic model tuning in the simulator, through plain boto3."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from detkit_sagemaker.testing import Simulator

CONTAINER = [sys.executable, str(Path(__file__).with_name("simulator_container.py"))]
RATE = {"Name": "rate", "MinValue": "0.0001", "MaxValue": "0.1", "ScalingType": "Logarithmic"}
Json = dict[str, Any]


@pytest.fixture
def simulator_images() -> dict[str, list[str]]:
    return {"mine:1": CONTAINER, "object-detection:1": CONTAINER}


@pytest.fixture
def sagemaker(simulator: Simulator) -> Any:
    return boto3.client("sagemaker")


def request(simulator: Simulator, name: str = "search", **config: Any) -> Json:
    return {
        "HyperParameterTuningJobName": name,
        "HyperParameterTuningJobConfig": {
            "Strategy": "Random",
            "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "score"},
            "ResourceLimits": {"MaxNumberOfTrainingJobs": 4, "MaxParallelTrainingJobs": 2},
            "ParameterRanges": {"ContinuousParameterRanges": [RATE]},
            "RandomSeed": 7,
            **config,
        },
        "TrainingJobDefinition": {
            "AlgorithmSpecification": {
                "TrainingImage": simulator.image("mine:1"),
                "TrainingInputMode": "File",
                "MetricDefinitions": [{"Name": "score", "Regex": r"\bscore=([-+0-9.eE]+);"}],
            },
            "RoleArn": simulator.role,
            "StaticHyperParameters": {"do": "", "epochs": "3"},
            "OutputDataConfig": {"S3OutputPath": f"s3://{simulator.bucket}/jobs"},
            "ResourceConfig": {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 10},
            "StoppingCondition": {"MaxRuntimeInSeconds": 60},
            "Environment": {"COLOUR": "red"},
        },
        "Tags": [{"Key": "detkit:run", "Value": "search"}],
    }


def finished(sagemaker: Any, name: str = "search", seconds: float = 30) -> Json:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer: Json = sagemaker.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=name)
        if answer["HyperParameterTuningJobStatus"] in ("Completed", "Failed", "Stopped"):
            return answer
        time.sleep(0.05)
    raise AssertionError(f"{name} is still {answer['HyperParameterTuningJobStatus']}")


def children(sagemaker: Any, name: str = "search", **more: Any) -> list[Json]:
    call = sagemaker.list_training_jobs_for_hyper_parameter_tuning_job
    found: list[Json] = call(HyperParameterTuningJobName=name, **more)["TrainingJobSummaries"]
    return found


def refusal(call: Callable[..., object], **arguments: Any) -> str:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    return str(caught.value.response["Error"]["Code"])


def test_a_search_runs_training_jobs_and_finds_the_best(simulator: Simulator, sagemaker: Any) -> None:
    sagemaker.create_hyper_parameter_tuning_job(**request(simulator))
    job = finished(sagemaker)
    assert job["HyperParameterTuningJobStatus"] == "Completed"
    assert job["TrainingJobStatusCounters"]["Completed"] == job["ObjectiveStatusCounters"]["Succeeded"] == 4
    found = children(sagemaker)
    rates = [float(one["TunedHyperParameters"]["rate"]) for one in found]
    assert len(set(rates)) == 4 and all(0.0001 <= rate <= 0.1 for rate in rates)
    for one, rate in zip(found, rates, strict=True):
        value = one["FinalHyperParameterTuningJobObjectiveMetric"]
        assert value["MetricName"] == "score" and value["Value"] == pytest.approx(3 * rate, rel=1e-4)
    best = job["BestTrainingJob"]
    assert float(best["TunedHyperParameters"]["rate"]) == max(rates)
    ranked = children(sagemaker, SortBy="FinalObjectiveMetricValue", SortOrder="Descending", MaxResults=1)
    assert [one["TrainingJobName"] for one in ranked] == [best["TrainingJobName"]]

    child = sagemaker.describe_training_job(TrainingJobName=best["TrainingJobName"])
    assert child["TuningJobArn"] == job["HyperParameterTuningJobArn"]
    assert child["HyperParameters"]["_tuning_objective_metric"] == "score"
    assert child["HyperParameters"]["epochs"] == "3" and child["Environment"] == {"COLOUR": "red"}
    assert sagemaker.list_tags(ResourceArn=child["TrainingJobArn"])["Tags"] == request(simulator)["Tags"]
    times = [(one["TrainingStartTime"], one["TrainingEndTime"]) for one in found]
    at_once = [sum(start <= moment < end for start, end in times) for moment, _ in times]
    assert max(at_once) <= 2, "as many as allowed"
    assert simulator.live() == []
    listed = sagemaker.list_hyper_parameter_tuning_jobs()["HyperParameterTuningJobSummaries"]
    assert [one["HyperParameterTuningJobName"] for one in listed] == ["search"]


def test_a_grid_is_searched_whole(simulator: Simulator, sagemaker: Any) -> None:
    ranges = {"CategoricalParameterRanges": [{"Name": "rate", "Values": ["1", "2"]}, {"Name": "x", "Values": ["a"]}]}
    limits = {"MaxParallelTrainingJobs": 2}
    objective = {"Type": "Minimize", "MetricName": "score"}
    wanted = request(
        simulator,
        Strategy="Grid",
        ParameterRanges=ranges,
        ResourceLimits=limits,
        HyperParameterTuningJobObjective=objective,
    )
    del wanted["HyperParameterTuningJobConfig"]["RandomSeed"]
    sagemaker.create_hyper_parameter_tuning_job(**wanted)
    job = finished(sagemaker)
    assert {one["TunedHyperParameters"]["rate"] for one in children(sagemaker)} == {"1", "2"}
    assert job["BestTrainingJob"]["TunedHyperParameters"] == {"rate": "1", "x": "a"}


def test_an_objective_that_never_appears(simulator: Simulator, sagemaker: Any) -> None:
    wanted = request(simulator, ResourceLimits={"MaxNumberOfTrainingJobs": 1, "MaxParallelTrainingJobs": 1})
    metric = [{"Name": "score", "Regex": "never=(.*)"}]
    wanted["TrainingJobDefinition"]["AlgorithmSpecification"]["MetricDefinitions"] = metric
    sagemaker.create_hyper_parameter_tuning_job(**wanted)
    job = finished(sagemaker)
    assert job["ObjectiveStatusCounters"]["Failed"] == 1 and "BestTrainingJob" not in job
    (child,) = children(sagemaker)
    assert (child["TrainingJobStatus"], child["ObjectiveStatus"]) == ("Completed", "Failed")


def test_failing_and_stopping(simulator: Simulator, sagemaker: Any) -> None:
    limits = {"MaxNumberOfTrainingJobs": 2, "MaxParallelTrainingJobs": 2}
    failing = request(simulator, "failing", ResourceLimits=limits)
    failing["TrainingJobDefinition"]["StaticHyperParameters"]["do"] = "fail"
    sagemaker.create_hyper_parameter_tuning_job(**failing)
    job = finished(sagemaker, "failing")
    assert job["HyperParameterTuningJobStatus"] == "Failed" and "No training job succeeded" in job["FailureReason"]
    assert job["TrainingJobStatusCounters"]["NonRetryableError"] == 2

    waiting = request(simulator, "waiting", ResourceLimits=limits)
    waiting["TrainingJobDefinition"]["StaticHyperParameters"]["do"] = "wait"
    sagemaker.create_hyper_parameter_tuning_job(**waiting)
    while len(simulator.live("training-job")) < 2:
        time.sleep(0.05)
    sagemaker.stop_hyper_parameter_tuning_job(HyperParameterTuningJobName="waiting")
    assert finished(sagemaker, "waiting")["HyperParameterTuningJobStatus"] == "Stopped"
    assert {one["TrainingJobStatus"] for one in children(sagemaker, "waiting")} == {"Stopped"}
    assert simulator.live() == []


def test_bad_searches_are_refused(simulator: Simulator, sagemaker: Any) -> None:
    call = sagemaker.create_hyper_parameter_tuning_job
    other = {"HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "other"}}
    backwards = {"ParameterRanges": {"ContinuousParameterRanges": [{**RATE, "MinValue": "1"}]}}
    zero = {"ParameterRanges": {"ContinuousParameterRanges": [{**RATE, "MinValue": "0"}]}}
    twice = {"ParameterRanges": {"CategoricalParameterRanges": [{"Name": "epochs", "Values": ["1"]}]}}
    for wrong in (other, backwards, zero, twice, {"Strategy": "Grid"}, {"ParameterRanges": {}}):
        assert refusal(call, **request(simulator, **wrong)) == "ValidationException", wrong
    assert refusal(call, **request(simulator, "a-name-of-more-than-thirty-two-characters")) == "ValidationException"
    built_in = request(simulator)
    algorithm = built_in["TrainingJobDefinition"]["AlgorithmSpecification"]
    algorithm["TrainingImage"] = "811284229777.dkr.ecr.us-east-1.amazonaws.com/object-detection:1"
    assert refusal(call, **built_in) == "ValidationException", "its metrics cannot be chosen"
    del algorithm["MetricDefinitions"]
    assert refusal(call, **built_in) == "ValidationException", "and its objective is validation:mAP"
    assert simulator.created == []


def test_a_search_may_learn_from_an_earlier_one(simulator: Simulator, sagemaker: Any) -> None:
    call = sagemaker.create_hyper_parameter_tuning_job
    limits = {"MaxNumberOfTrainingJobs": 1, "MaxParallelTrainingJobs": 1}
    parents = {
        "ParentHyperParameterTuningJobs": [{"HyperParameterTuningJobName": "search"}],
        "WarmStartType": "IdenticalDataAndAlgorithm",
    }
    call(**request(simulator, ResourceLimits=limits))
    later = {**request(simulator, "later", ResourceLimits=limits), "WarmStartConfig": parents}
    assert refusal(call, **later) == "ValidationException", "the parent still runs"
    finished(sagemaker)
    call(**later)
    assert finished(sagemaker, "later")["WarmStartConfig"] == parents
    differently = {**request(simulator, "other", ResourceLimits=limits), "WarmStartConfig": parents}
    differently["TrainingJobDefinition"]["StaticHyperParameters"]["more"] = "1"
    assert refusal(call, **differently) == "ValidationException", "the names are not the same"
    minimised = {"HyperParameterTuningJobObjective": {"Type": "Minimize", "MetricName": "score"}}
    assert refusal(call, **{**request(simulator, "other", **minimised), "WarmStartConfig": parents})
    unknown = {**parents, "ParentHyperParameterTuningJobs": [{"HyperParameterTuningJobName": "nobody"}]}
    assert refusal(call, **{**later, "HyperParameterTuningJobName": "other", "WarmStartConfig": unknown})


def test_hyperband_stops_jobs_by_itself(simulator: Simulator, sagemaker: Any) -> None:
    wanted = request(simulator, Strategy="Hyperband", TrainingJobEarlyStoppingType="Auto")
    assert refusal(sagemaker.create_hyper_parameter_tuning_job, **wanted) == "ValidationException"
