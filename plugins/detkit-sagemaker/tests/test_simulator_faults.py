"""Faults of the simulator, its quotas and its command, through plain boto3."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from detkit_sagemaker.testing import Simulator

CONTAINER = [sys.executable, str(Path(__file__).with_name("simulator_container.py"))]
ONCE = Config(retries={"total_max_attempts": 1})


@pytest.fixture
def simulator_images() -> dict[str, list[str]]:
    return {"mine:1": CONTAINER}


@pytest.fixture
def sagemaker(simulator: Simulator) -> Any:
    return boto3.client("sagemaker", config=ONCE)


def train(simulator: Simulator, sagemaker: Any, name: str = "job", count: int = 1) -> str:
    """Run a job; return its failure, or its status."""
    sagemaker.create_training_job(
        TrainingJobName=name,
        AlgorithmSpecification={"TrainingImage": simulator.image("mine:1"), "TrainingInputMode": "File"},
        RoleArn=simulator.role,
        OutputDataConfig={"S3OutputPath": f"s3://{simulator.bucket}/jobs"},
        ResourceConfig={"InstanceType": "ml.m5.large", "InstanceCount": count, "VolumeSizeInGB": 10},
        StoppingCondition={"MaxRuntimeInSeconds": 60},
    )
    simulator.wait()
    job = sagemaker.describe_training_job(TrainingJobName=name)
    return str(job.get("FailureReason", job["TrainingJobStatus"]))


def code(client: Any, call: str, **arguments: Any) -> str:
    """Return the error code of a call; empty where it is answered."""
    try:
        getattr(client, call)(**arguments)
    except ClientError as error:
        return str(error.response["Error"]["Code"])
    return ""


def test_throttling(simulator: Simulator, sagemaker: Any) -> None:
    simulator.faults.throttle(every=3)
    codes = [code(sagemaker, "list_models") for _ in range(6)]
    assert codes == ["", "", "ThrottlingException"] * 2
    patient = boto3.client("sagemaker", config=Config(retries={"mode": "standard", "total_max_attempts": 3}))
    for _ in range(6):
        patient.list_models()
    simulator.faults.clear()
    assert [code(sagemaker, "list_models") for _ in range(6)] == [""] * 6


def test_refusals_of_any_service(simulator: Simulator, sagemaker: Any) -> None:
    faults = simulator.faults
    faults.refuse("ListEndpoints", "ResourceLimitExceeded", "too many", times=2)
    assert [code(sagemaker, "list_endpoints") for _ in range(3)] == ["ResourceLimitExceeded"] * 2 + [""]
    faults.refuse("PutObject", "AccessDenied", status=403)
    faults.refuse("GetRole", "AccessDenied", status=403)
    faults.refuse("CreateSchedule", "AccessDeniedException", status=403)
    faults.refuse("GetLogEvents")
    faults.refuse("InvokeEndpoint", "ServiceUnavailable", status=503)
    s3, iam, logs = (boto3.client(name, config=ONCE) for name in ("s3", "iam", "logs"))
    scheduler, runtime = boto3.client("scheduler", config=ONCE), boto3.client("sagemaker-runtime", config=ONCE)
    assert code(s3, "put_object", Bucket=simulator.bucket, Key="a", Body=b"") == "AccessDenied"
    assert code(s3, "put_object", Bucket=simulator.bucket, Key="a", Body=b"") == ""
    assert code(iam, "get_role", RoleName="detkit-simulator") == "AccessDenied"
    assert code(iam, "get_role", RoleName="detkit-simulator") == ""
    assert code(logs, "get_log_events", logGroupName="a", logStreamName="b") == "AccessDeniedException"
    assert code(runtime, "invoke_endpoint", EndpointName="a", Body=b"") == "ServiceUnavailable"
    target = {"Arn": simulator.role, "RoleArn": simulator.role}
    wanted = {"Name": "a", "ScheduleExpression": "rate(1 day)", "FlexibleTimeWindow": {"Mode": "OFF"}, "Target": target}
    assert code(scheduler, "create_schedule", **wanted) == "AccessDeniedException"
    assert {"PutObject", "GetRole", "GetLogEvents", "InvokeEndpoint", "CreateSchedule"} <= set(simulator.calls)


def test_expired_credentials(simulator: Simulator, sagemaker: Any) -> None:
    simulator.faults.expire_tokens()
    s3, sts, logs = (boto3.client(name, config=ONCE) for name in ("s3", "sts", "logs"))
    assert code(sagemaker, "list_models") == code(logs, "describe_log_groups") == "ExpiredTokenException"
    assert code(s3, "list_objects_v2", Bucket=simulator.bucket) == code(sts, "get_caller_identity") == "ExpiredToken"
    simulator.faults.renew_tokens()
    assert code(sagemaker, "list_models") == ""
    simulator.faults.slow(0.3)
    sagemaker.create_training_job(
        TrainingJobName="going-on",
        AlgorithmSpecification={"TrainingImage": simulator.image("mine:1"), "TrainingInputMode": "File"},
        RoleArn=simulator.role,
        OutputDataConfig={"S3OutputPath": f"s3://{simulator.bucket}/jobs"},
        ResourceConfig={"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 10},
        StoppingCondition={"MaxRuntimeInSeconds": 60},
    )
    simulator.faults.expire_tokens()
    assert code(sagemaker, "describe_training_job", TrainingJobName="going-on") == "ExpiredTokenException"
    simulator.wait()
    simulator.faults.renew_tokens()
    job = sagemaker.describe_training_job(TrainingJobName="going-on")
    assert job["TrainingJobStatus"] == "Completed", "what runs goes on"


def test_capacity_uploads_and_slow_states(simulator: Simulator, sagemaker: Any) -> None:
    simulator.faults.capacity()
    assert train(simulator, sagemaker).startswith("CapacityError")
    simulator.faults.fail_upload()
    assert "upload failed" in train(simulator, sagemaker, "again")
    simulator.faults.slow(0.4)
    before = time.monotonic()
    assert train(simulator, sagemaker, "slowly") == "Completed"
    assert time.monotonic() - before > 1.0


def test_quotas(simulator: Simulator, sagemaker: Any) -> None:
    name = "ml.m5.large for training job usage"
    quotas = boto3.client("service-quotas", config=ONCE)
    pages = quotas.get_paginator("list_service_quotas").paginate(ServiceCode="sagemaker")
    found = {one["QuotaName"]: one for page in pages for one in page["Quotas"]}
    assert {name, "ml.g4dn.xlarge for spot training job usage", "ml.m5.large for endpoint usage"} <= set(found)
    simulator.faults.quota(name, 1)
    asked = {"ServiceCode": "sagemaker", "QuotaCode": found[name]["QuotaCode"]}
    assert quotas.get_service_quota(**asked)["Quota"]["Value"] == 1.0
    assert code(quotas, "get_service_quota", ServiceCode="sagemaker", QuotaCode="L-0") == "NoSuchResourceException"
    with pytest.raises(ClientError, match="ResourceLimitExceeded.*'ml.m5.large for training job usage' is 1"):
        train(simulator, sagemaker, count=2)
    assert train(simulator, sagemaker) == "Completed"


def test_crashes_before_and_after(simulator: Simulator, sagemaker: Any) -> None:
    seen: list[int] = []
    simulator.faults.crash_after("CreateTrainingJob", lambda: seen.append(len(simulator.created)))
    assert train(simulator, sagemaker) == "Completed"
    assert seen == [1]
    simulator.faults.crash_before("CreateTrainingJob")
    with pytest.raises(BotoCoreError):
        train(simulator, sagemaker, "never")
    assert len(simulator.created) == 1, "dropped before it did anything"
    simulator.faults.crash_after("CreateTrainingJob")
    with pytest.raises(BotoCoreError):
        train(simulator, sagemaker, "unknown")
    assert [request["TrainingJobName"] for _, request in simulator.created] == ["job", "unknown"]
    simulator.wait()


def test_a_client_may_be_killed_in_the_middle(simulator: Simulator) -> None:
    program = "import boto3; boto3.client('s3').create_bucket(Bucket='made'); print('not reached')"
    client = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    simulator.faults.crash_after("CreateBucket", client.kill)
    output, _ = client.communicate(timeout=30)
    assert client.returncode == -9 and output == b""
    buckets = boto3.client("s3").list_buckets()["Buckets"]
    assert "made" in [one["Name"] for one in buckets]


def test_the_command_prints_what_a_shell_needs(tmp_path: Path) -> None:
    image = f"mine:1={sys.executable} {CONTAINER[1]}"
    command = [sys.executable, "-m", "detkit_sagemaker.testing", "--port", "0", "--image", image]
    source = Path(__file__).parents[1] / "src"
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        exported = {}
        for line in server.stdout:
            if line.startswith("unset "):
                assert "AWS_CA_BUNDLE" in line.split()
                continue
            if not (found := re.fullmatch(r"export (\w+)=(\S+)\n", line)):
                break
            exported[found[1]] = found[2]
        assert "Ctrl-C" in line
        identity = "import boto3; print(boto3.client('sts').get_caller_identity()['Account'])"
        asked = [sys.executable, "-c", identity]
        answer = subprocess.run(asked, env={**os.environ, **exported}, capture_output=True, check=True, text=True)
        server.terminate()
        assert server.wait(timeout=20) == 0
    assert answer.stdout.strip() == "123456789012"


@pytest.mark.parametrize(
    ("operation", "call"),
    [
        ("CreateBucket", lambda s3, _: s3.create_bucket(Bucket="abc")),
        ("GetBucketLocation", lambda s3, bucket: s3.get_bucket_location(Bucket=bucket)),
        ("PutBucketTagging", lambda s3, bucket: s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": []})),
        ("ListObjectsV2", lambda s3, bucket: s3.list_objects_v2(Bucket=bucket)),
        ("ListMultipartUploads", lambda s3, bucket: s3.list_multipart_uploads(Bucket=bucket)),
        ("PutObject", lambda s3, bucket: s3.put_object(Bucket=bucket, Key="a/b", Body=b"1")),
        ("CopyObject", lambda s3, bucket: s3.copy_object(Bucket=bucket, Key="a", CopySource=f"{bucket}/b")),
        ("ListSchedules", lambda *_: boto3.client("scheduler").list_schedules()),
        ("GetCallerIdentity", lambda *_: boto3.client("sts").get_caller_identity()),
    ],
)
def test_a_fault_meets_the_call_of_its_name(
    simulator: Simulator, operation: str, call: Callable[[Any, str], object]
) -> None:
    simulator.faults.refuse(operation, "Refused")
    with pytest.raises(ClientError, match="Refused"):
        call(boto3.client("s3"), simulator.bucket)
