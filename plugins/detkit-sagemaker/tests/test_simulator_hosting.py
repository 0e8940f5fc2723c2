"""Models, endpoints, batch transform, schedules and the hub in the simulator, through plain boto3."""

import io
import json
import os
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from detkit_sagemaker.testing import Simulator

CONTAINER = [sys.executable, str(Path(__file__).with_name("simulator_container.py"))]
TARGET = "arn:aws:scheduler:::aws-sdk:sagemaker:deleteEndpoint"
Json = dict[str, Any]


@pytest.fixture
def simulator_images() -> dict[str, list[str]]:
    return {"mine:1": CONTAINER}


@pytest.fixture
def s3(simulator: Simulator) -> Any:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        member = tarfile.TarInfo("name")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"model"))
    client = boto3.client("s3")
    client.put_object(Bucket=simulator.bucket, Key="model.tar.gz", Body=packed.getvalue())
    client.put_object(Bucket=simulator.bucket, Key="plain/name", Body=b"plain")
    client.put_object(Bucket=simulator.bucket, Key="broken.tar.gz", Body=b"no archive")
    return client


@pytest.fixture
def sagemaker(simulator: Simulator, s3: Any) -> Any:
    return boto3.client("sagemaker")


def create_model(simulator: Simulator, sagemaker: Any, name: str = "mine", **container: Any) -> None:
    data = f"s3://{simulator.bucket}/model.tar.gz"
    primary = {"Image": simulator.image("mine:1"), "ModelDataUrl": data, **container}
    primary = {key: value for key, value in primary.items() if value is not None}
    sagemaker.create_model(ModelName=name, PrimaryContainer=primary, ExecutionRoleArn=simulator.role)


def create_endpoint(sagemaker: Any, name: str = "mine", model: str = "mine", **variant: Any) -> None:
    settings = variant or {"InstanceType": "ml.m5.large", "InitialInstanceCount": 1}
    variants = [{"VariantName": "AllTraffic", "ModelName": model, **settings}]
    sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=variants)
    sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name)


def settled(sagemaker: Any, name: str = "mine", seconds: float = 20) -> Json:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer: Json = sagemaker.describe_endpoint(EndpointName=name)
        if answer["EndpointStatus"] not in ("Creating", "Updating"):
            return answer
        time.sleep(0.05)
    raise AssertionError(f"{name} is still {answer['EndpointStatus']}")


def until(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def refusal(call: Callable[..., object], **arguments: Any) -> tuple[str, str]:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    error = caught.value.response["Error"]
    return error["Code"], error["Message"]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_an_endpoint_serves_until_it_is_deleted(simulator: Simulator, sagemaker: Any) -> None:
    create_model(simulator, sagemaker, Environment={"COLOUR": "red"})
    create_endpoint(sagemaker)
    assert sagemaker.describe_endpoint(EndpointName="mine")["EndpointStatus"] == "Creating"
    refused = refusal(sagemaker.delete_endpoint, EndpointName="mine")
    assert refused[0] == "ValidationException", "AWS deletes no endpoint while it is created"
    assert settled(sagemaker)["EndpointStatus"] == "InService"
    assert simulator.live() == ["mine", "mine", "mine"]
    assert (simulator.live("endpoint"), simulator.live("training-job")) == (["mine"], [])

    runtime = boto3.client("sagemaker-runtime")
    picture = bytes(range(256))
    answer = runtime.invoke_endpoint(
        EndpointName="mine", Body=picture, ContentType="image/jpeg", Accept="application/x-own", CustomAttributes="a=b"
    )
    assert answer["Body"].read() == b"model:" + picture[::-1]
    assert answer["ContentType"] == "application/x-own"
    assert (answer["CustomAttributes"], answer["InvokedProductionVariant"]) == ("a=b!", "AllTraffic")
    environment = json.loads(runtime.invoke_endpoint(EndpointName="mine", Body=b"environment")["Body"].read())
    assert environment["COLOUR"] == "red" and environment["AWS_ENDPOINT_URL"] == simulator.url

    with pytest.raises(ClientError) as caught:
        runtime.invoke_endpoint(EndpointName="mine", Body=b"bad")
    assert caught.value.response["Error"]["Code"] == "ModelError"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 424
    assert (caught.value.response["OriginalStatusCode"], caught.value.response["OriginalMessage"]) == (
        400,
        "no picture",
    )
    assert refusal(runtime.invoke_endpoint, EndpointName="other", Body=b"")[0] == "ValidationError"
    once = boto3.client("sagemaker-runtime", config=Config(retries={"total_max_attempts": 1}))
    large = bytes(25 * 1024 * 1024 + 1)
    assert refusal(once.invoke_endpoint, EndpointName="mine", Body=large)[0] == "ValidationError"

    logs = boto3.client("logs")
    streams = logs.describe_log_streams(logGroupName="/aws/sagemaker/Endpoints/mine")["logStreams"]
    assert streams[0]["logStreamName"].startswith("AllTraffic/i-")

    pid = int(runtime.invoke_endpoint(EndpointName="mine", Body=b"pid")["Body"].read())
    assert is_running(pid)
    sagemaker.delete_endpoint(EndpointName="mine")
    until(lambda: not simulator.live("endpoint"))
    assert not is_running(pid)
    sagemaker.delete_endpoint_config(EndpointConfigName="mine")
    sagemaker.delete_model(ModelName="mine")
    assert simulator.live() == []
    for delete, member in (
        ("delete_endpoint", "Endpoint"),
        ("delete_endpoint_config", "EndpointConfig"),
        ("delete_model", "Model"),
    ):
        code, message = refusal(getattr(sagemaker, delete), **{f"{member}Name": "mine"})
        assert code == "ValidationException" and "Could not find" in message
    assert [one for one, _ in simulator.created] == ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"]


def test_endpoints_fail_with_a_reason(simulator: Simulator, sagemaker: Any) -> None:
    create_model(simulator, sagemaker, "broken", Environment={"BROKEN": "yes"})
    create_endpoint(sagemaker, "broken", "broken")
    create_model(simulator, sagemaker, "no-archive", ModelDataUrl=f"s3://{simulator.bucket}/broken.tar.gz")
    create_endpoint(sagemaker, "no-archive", "no-archive")
    assert "ping health check" in settled(sagemaker, "broken")["FailureReason"]
    assert "extract model data" in settled(sagemaker, "no-archive")["FailureReason"]
    assert sorted(simulator.live("endpoint")) == ["broken", "no-archive"], "AWS keeps failed endpoints"
    failed = sagemaker.list_endpoints(StatusEquals="Failed")["Endpoints"]
    assert {one["EndpointName"] for one in failed} == {"broken", "no-archive"}
    for name in ("broken", "no-archive"):
        sagemaker.delete_endpoint(EndpointName=name)
    until(lambda: not simulator.live("endpoint"))


def test_serverless_plain_models_and_updates(simulator: Simulator, sagemaker: Any) -> None:
    source = {
        "S3DataSource": {
            "S3Uri": f"s3://{simulator.bucket}/plain/",
            "S3DataType": "S3Prefix",
            "CompressionType": "None",
        }
    }
    create_model(simulator, sagemaker)
    create_model(simulator, sagemaker, "plain", ModelDataUrl=None, ModelDataSource=source)
    create_endpoint(sagemaker, ServerlessConfig={"MemorySizeInMB": 2048, "MaxConcurrency": 1})
    assert settled(sagemaker)["ProductionVariants"][0]["CurrentServerlessConfig"]["MemorySizeInMB"] == 2048
    variants = [{"VariantName": "New", "ModelName": "plain", "InstanceType": "ml.m5.large", "InitialInstanceCount": 1}]
    sagemaker.create_endpoint_config(EndpointConfigName="new", ProductionVariants=variants)
    runtime = boto3.client("sagemaker-runtime")
    pid = int(runtime.invoke_endpoint(EndpointName="mine", Body=b"pid")["Body"].read())
    sagemaker.update_endpoint(EndpointName="mine", EndpointConfigName="new")
    assert settled(sagemaker)["EndpointConfigName"] == "new"
    assert runtime.invoke_endpoint(EndpointName="mine", Body=b"ab")["Body"].read() == b"plain:ba"
    until(lambda: not is_running(pid))


def test_bad_models_and_endpoints_are_refused(simulator: Simulator, sagemaker: Any) -> None:
    for wrong in ({"Image": simulator.image("no:1")}, {"ModelDataUrl": f"s3://{simulator.bucket}/none.tar.gz"}):
        with pytest.raises(ClientError, match="ValidationException"):
            create_model(simulator, sagemaker, **wrong)
    with pytest.raises(ClientError, match="Could not find model"):
        create_endpoint(sagemaker)
    create_model(simulator, sagemaker)
    with pytest.raises(ClientError, match="already existing model"):
        create_model(simulator, sagemaker)
    assert simulator.live() == ["mine"]


def create_transform(simulator: Simulator, sagemaker: Any, name: str = "all", **changes: Any) -> None:
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{simulator.bucket}/in/"}
    whole = {
        "TransformJobName": name,
        "ModelName": "mine",
        "TransformInput": {"DataSource": {"S3DataSource": source}, "ContentType": "image/jpeg", "SplitType": "None"},
        "TransformOutput": {"S3OutputPath": f"s3://{simulator.bucket}/out/", "Accept": "application/json"},
        "TransformResources": {"InstanceType": "ml.m5.large", "InstanceCount": 1},
        **changes,
    }
    sagemaker.create_transform_job(**whole)


def transformed(sagemaker: Any, name: str = "all", seconds: float = 20) -> Json:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer: Json = sagemaker.describe_transform_job(TransformJobName=name)
        if answer["TransformJobStatus"] in ("Completed", "Failed", "Stopped"):
            return answer
        time.sleep(0.05)
    raise AssertionError(f"{name} is still {answer['TransformJobStatus']}")


def outputs(s3: Any, bucket: str) -> dict[str, bytes]:
    found = s3.list_objects_v2(Bucket=bucket, Prefix="out/").get("Contents", [])
    keys = [one["Key"] for one in found]
    return {key.removeprefix("out/"): s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@pytest.mark.parametrize("environment", [{}, {"PARALLEL": "yes"}])
def test_a_transform_job_ends_by_itself(simulator: Simulator, sagemaker: Any, s3: Any, environment: Json) -> None:
    create_model(simulator, sagemaker)
    for key, body in (("a.jpg", b"ab"), ("deep/er/b.jpg", b"cd"), ("c.env", b"environment"), ("d.pid", b"pid")):
        s3.put_object(Bucket=simulator.bucket, Key=f"in/{key}", Body=body)
    more = {} if environment else {"MaxConcurrentTransforms": 2, "MaxPayloadInMB": 5, "BatchStrategy": "SingleRecord"}
    create_transform(simulator, sagemaker, Environment=environment, **more)
    job = transformed(sagemaker)
    assert job["TransformJobStatus"] == "Completed"
    assert job["TransformEndTime"] >= job["TransformStartTime"]
    found = outputs(s3, simulator.bucket)
    assert set(found) == {"a.jpg.out", "deep/er/b.jpg.out", "c.env.out", "d.pid.out"}
    assert (found["a.jpg.out"], found["deep/er/b.jpg.out"]) == (b"model:ba", b"model:dc")
    seen = json.loads(found["c.env.out"])
    assert seen["SAGEMAKER_BATCH"] == "true"
    strategy = None if environment else "SINGLE_RECORD"
    assert seen.get("SAGEMAKER_BATCH_STRATEGY") == strategy
    assert seen.get("SAGEMAKER_MAX_PAYLOAD_IN_MB") == (None if environment else "5")
    assert not is_running(int(found["d.pid.out"]))
    assert simulator.live() == ["mine"], "only the model is left"
    listed = sagemaker.list_transform_jobs(StatusEquals="Completed")["TransformJobSummaries"]
    assert [one["TransformJobName"] for one in listed] == ["all"]


def test_a_bad_object_fails_the_transform_job_and_not_the_others(simulator: Simulator, sagemaker: Any, s3: Any) -> None:
    create_model(simulator, sagemaker)
    s3.put_object(Bucket=simulator.bucket, Key="in/1.jpg", Body=b"bad one")
    s3.put_object(Bucket=simulator.bucket, Key="in/2.jpg", Body=b"good")
    s3.put_object(Bucket=simulator.bucket, Key="in/3.jpg", Body=bytes(1024 * 1024 + 1))
    create_transform(simulator, sagemaker, MaxPayloadInMB=1)
    job = transformed(sagemaker)
    assert job["TransformJobStatus"] == "Failed" and job["FailureReason"].startswith("ClientError")
    assert outputs(s3, simulator.bucket) == {"2.jpg.out": b"model:doog"}
    logs, group = boto3.client("logs"), "/aws/sagemaker/TransformJobs"
    events = logs.filter_log_events(logGroupName=group, logStreamNamePrefix="all/")["events"]
    assert any("in/1.jpg" in event["message"] and "no picture" in event["message"] for event in events)

    s3.put_object(Bucket=simulator.bucket, Key="lines.jsonl", Body=b"ab\ncd\n")
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{simulator.bucket}/lines.jsonl"}
    by_line = {"DataSource": {"S3DataSource": source}, "SplitType": "Line"}
    target = {"S3OutputPath": f"s3://{simulator.bucket}/out", "AssembleWith": "Line"}
    create_transform(simulator, sagemaker, "lines", TransformInput=by_line, TransformOutput=target)
    assert transformed(sagemaker, "lines")["TransformJobStatus"] == "Completed"
    assert outputs(s3, simulator.bucket)["lines.jsonl.out"] == b"model:ba\nmodel:dc\n"


def test_transform_jobs_stop_and_are_refused(simulator: Simulator, sagemaker: Any, s3: Any) -> None:
    with pytest.raises(ClientError, match="Could not find model"):
        create_transform(simulator, sagemaker)
    create_model(simulator, sagemaker)
    with pytest.raises(ClientError, match="No S3 objects found"):
        create_transform(simulator, sagemaker)
    s3.put_object(Bucket=simulator.bucket, Key="in/a.jpg", Body=b"a")
    with pytest.raises(ClientError, match="100 MB"):
        create_transform(simulator, sagemaker, MaxConcurrentTransforms=20, MaxPayloadInMB=10)
    simulator.faults.slow(60)
    create_transform(simulator, sagemaker)
    assert simulator.live("transform-job") == ["all"]
    sagemaker.stop_transform_job(TransformJobName="all")
    assert transformed(sagemaker)["TransformJobStatus"] == "Stopped"


def schedule(simulator: Simulator, when: datetime, name: str = "end", **target: Any) -> Json:
    event = json.dumps({"EndpointName": "mine"})
    return {
        "Name": name,
        "ScheduleExpression": f"at({when:%Y-%m-%dT%H:%M:%S})",
        "FlexibleTimeWindow": {"Mode": "OFF"},
        "ActionAfterCompletion": "DELETE",
        "Target": {"Arn": TARGET, "RoleArn": simulator.role, "Input": event, **target},
    }


def test_a_schedule_deletes_an_endpoint(simulator: Simulator, sagemaker: Any) -> None:
    create_model(simulator, sagemaker)
    create_endpoint(sagemaker)
    settled(sagemaker)
    scheduler = boto3.client("scheduler")
    code, _ = refusal(scheduler.create_schedule, **schedule(simulator, datetime.now(UTC), RoleArn=simulator.role + "x"))
    assert code == "ValidationException"
    scheduler.create_schedule(**schedule(simulator, datetime.now(UTC) + timedelta(hours=2), "later"))
    scheduler.create_schedule(**schedule(simulator, datetime.now(UTC) + timedelta(hours=1)))
    assert [name for name, _ in simulator.created][-2:] == ["CreateSchedule"] * 2
    assert simulator.live("schedule") == ["end", "later"]
    simulator.elapse(3000)
    simulator.wait()
    assert simulator.live("endpoint") == ["mine"]
    simulator.elapse(1000)
    until(lambda: not simulator.live("endpoint"))
    until(lambda: simulator.live("schedule") == ["later"])
    scheduler.delete_schedule(Name="later")
    assert simulator.live("schedule") == []


def test_a_schedule_that_fails_tries_again_as_often_and_as_long_as_it_says(
    simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    def tried(name: str) -> int:
        return caplog.text.count(f"schedule {name}: DeleteEndpoint failed")

    policies = {"once-again": {"MaximumRetryAttempts": 1}, "a-minute": {"MaximumEventAgeInSeconds": 60}}
    for name, policy in policies.items():
        boto3.client("scheduler").create_schedule(**schedule(simulator, datetime.now(UTC), name, RetryPolicy=policy))
    until(lambda: simulator.live("schedule") == ["a-minute"])
    assert tried("once-again") == 2
    until(lambda: tried("a-minute") > 2)
    simulator.elapse(60)
    until(lambda: simulator.live("schedule") == [])


def test_the_hub_has_the_models_that_can_be_trained(simulator: Simulator, sagemaker: Any, s3: Any) -> None:
    pages: list[Json] = []
    more: Json = {}
    while not pages or more:
        pages.append(sagemaker.list_hub_contents(HubName="SageMakerPublicHub", HubContentType="Model", **more))
        more = {"NextToken": pages[-1]["NextToken"]} if "NextToken" in pages[-1] else {}
    names = [one["HubContentName"] for page in pages for one in page["HubContentSummaries"]]
    described = {}
    for name in names:
        answer = sagemaker.describe_hub_content(
            HubName="SageMakerPublicHub", HubContentType="Model", HubContentName=name
        )
        described[name] = json.loads(answer["HubContentDocument"])
        assert "Synthetic" in described[name]
    trained = {name: document for name, document in described.items() if document["TrainingSupported"]}
    assert len(trained) == 9 and len(described) > len(trained)
    for document in trained.values():
        assert {one["Name"] for one in document["Hyperparameters"]} >= {"epochs", "adam-learning-rate", "batch-size"}
        assert document["DefaultTrainingInstanceType"] in document["SupportedTrainingInstanceTypes"]
        for member in ("TrainingArtifactUri", "TrainingScriptUri", "HostingArtifactUri", "HostingScriptUri"):
            bucket, _, key = document[member].removeprefix("s3://").partition("/")
            assert bucket == "jumpstart-cache-prod-us-east-1"
            s3.head_object(Bucket=bucket, Key=key)
    for wrong in ({"HubContentName": "mxnet-od-none"}, {"HubName": "mine"}, {"HubContentVersion": "9.9.9"}):
        asked = {"HubName": "SageMakerPublicHub", "HubContentType": "Model", "HubContentName": names[0], **wrong}
        assert refusal(sagemaker.describe_hub_content, **asked)[0] == "ResourceNotFound"


@pytest.mark.parametrize("image", ["object-detection:1", "mxnet-training:1.9.0-gpu-py38"])
def test_images_of_aws_have_stand_ins(simulator: Simulator, sagemaker: Any, image: str) -> None:
    sagemaker.create_training_job(
        TrainingJobName="stand-in",
        AlgorithmSpecification={
            "TrainingImage": f"763104351884.dkr.ecr.eu-west-1.amazonaws.com/{image}",
            "TrainingInputMode": "File",
        },
        RoleArn=simulator.role,
        HyperParameters={"num_classes": "no number"},
        OutputDataConfig={"S3OutputPath": f"s3://{simulator.bucket}/jobs"},
        ResourceConfig={"InstanceType": "ml.g4dn.xlarge", "InstanceCount": 1, "VolumeSizeInGB": 10},
        StoppingCondition={"MaxRuntimeInSeconds": 60},
    )
    simulator.wait()
    reason = sagemaker.describe_training_job(TrainingJobName="stand-in")["FailureReason"]
    assert reason.startswith("ClientError: "), "the stand-in ran, and wants data"


def test_a_dead_container_is_a_model_error(simulator: Simulator, sagemaker: Any) -> None:
    create_model(simulator, sagemaker)
    create_endpoint(sagemaker)
    settled(sagemaker)
    runtime = boto3.client("sagemaker-runtime", config=Config(retries={"total_max_attempts": 1}))
    os.kill(int(runtime.invoke_endpoint(EndpointName="mine", Body=b"pid")["Body"].read()), signal.SIGKILL)
    until(lambda: refusal(runtime.invoke_endpoint, EndpointName="mine", Body=b"pid")[0] == "ModelError")
