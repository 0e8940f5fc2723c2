"""Training jobs in the simulator, through plain boto3."""

import io
import json
import os
import struct
import sys
import tarfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, EndpointConnectionError

from detkit_sagemaker.testing import Simulator
from detkit_sagemaker.testing.containers import can_mount

CONTAINER = [sys.executable, str(Path(__file__).with_name("simulator_container.py"))]
Json = dict[str, Any]


@pytest.fixture
def simulator_images() -> dict[str, list[str]]:
    return {"mine:1": CONTAINER, "broken:1": ["/no/such/program"], "object-detection:1": CONTAINER}


@pytest.fixture
def s3(simulator: Simulator) -> Any:
    client = boto3.client("s3")
    client.put_object(Bucket=simulator.bucket, Key="data/train/a.jpg", Body=b"aa")
    client.put_object(Bucket=simulator.bucket, Key="data/train/more/b.jpg", Body=b"bb")
    client.put_object(Bucket=simulator.bucket, Key="data/model.tar.gz", Body=b"packed")
    return client


@pytest.fixture
def sagemaker(simulator: Simulator, s3: Any) -> Any:
    return boto3.client("sagemaker")


def request(simulator: Simulator, name: str = "job", **changes: Any) -> Json:
    """Return a request of CreateTrainingJob; a changed member replaces or, for None, removes the whole member."""
    whole = {
        "TrainingJobName": name,
        "AlgorithmSpecification": {
            "TrainingImage": simulator.image("mine:1"),
            "TrainingInputMode": "File",
            "MetricDefinitions": [{"Name": "val/score", "Regex": r"\bscore=([-+0-9.eE]+);"}],
        },
        "RoleArn": simulator.role,
        "HyperParameters": {"do": ""},
        "InputDataConfig": [channel(simulator, "train", "data/train/")],
        "OutputDataConfig": {"S3OutputPath": f"s3://{simulator.bucket}/jobs"},
        "ResourceConfig": {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 10},
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
        **changes,
    }
    return {key: value for key, value in whole.items() if value is not None}


def channel(simulator: Simulator, name: str, prefix: str, **changes: Any) -> Json:
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{simulator.bucket}/{prefix}"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, **changes}


def finished(sagemaker: Any, name: str = "job", seconds: float = 20) -> Json:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer: Json = sagemaker.describe_training_job(TrainingJobName=name)
        if answer["TrainingJobStatus"] in ("Completed", "Failed", "Stopped"):
            return answer
        time.sleep(0.05)
    raise AssertionError(f"{name} is still {answer['SecondaryStatus']}")


def until(condition: Callable[[], object], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def archive(s3: Any, bucket: str, key: str) -> dict[str, bytes]:
    content = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]


def log_lines(name: str) -> list[str]:
    logs, group = boto3.client("logs"), "/aws/sagemaker/TrainingJobs"
    try:
        streams = logs.describe_log_streams(logGroupName=group, logStreamNamePrefix=f"{name}/")["logStreams"]
    except logs.exceptions.ResourceNotFoundException:
        return []  # nothing has been trained yet
    names = [stream["logStreamName"] for stream in streams]
    pages = [logs.get_log_events(logGroupName=group, logStreamName=name, startFromHead=True) for name in names]
    return [event["message"] for page in pages for event in page["events"]]


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


def test_a_job_runs_its_container(simulator: Simulator, sagemaker: Any, s3: Any) -> None:
    channels = [
        channel(simulator, "train", "data/train/", ContentType="image/jpeg"),
        channel(simulator, "model", "data/model.tar.gz", InputMode="FastFile"),
    ]
    created = sagemaker.create_training_job(
        **request(simulator, InputDataConfig=channels, HyperParameters={"epochs": "3"}, Environment={"COLOUR": "red"})
    )
    job = finished(sagemaker)
    assert job["TrainingJobStatus"] == job["SecondaryStatus"] == "Completed"
    assert job["TrainingJobArn"] == created["TrainingJobArn"]
    walk = [one["Status"] for one in job["SecondaryStatusTransitions"]]
    assert walk == ["Starting", "Downloading", "Training", "Uploading", "Completed"]
    assert all(one["EndTime"] >= one["StartTime"] for one in job["SecondaryStatusTransitions"])
    assert job["TrainingEndTime"] >= job["TrainingStartTime"] >= job["CreationTime"]
    assert job["TrainingTimeInSeconds"] == job["BillableTimeInSeconds"] >= 1
    assert [(one["MetricName"], one["Value"]) for one in job["FinalMetricDataList"]] == [("val/score", 3.0)]
    assert isinstance(job["FinalMetricDataList"][0]["Timestamp"], datetime)

    artifact = job["ModelArtifacts"]["S3ModelArtifacts"]
    assert artifact == f"s3://{simulator.bucket}/jobs/job/output/model.tar.gz"
    seen = json.loads(archive(s3, simulator.bucket, "jobs/job/output/model.tar.gz")["algo-1.json"])
    assert seen["arguments"] == ["train"]
    assert seen["data"] == ["model/model.tar.gz", "train/a.jpg", "train/more/b.jpg"]
    assert seen["config"]["hyperparameters"] == {"epochs": "3"}
    assert seen["config"]["inputdataconfig"]["train"] == {
        "ContentType": "image/jpeg",
        "TrainingInputMode": "File",
        "S3DistributionType": "FullyReplicated",
        "RecordWrapperType": "None",
    }
    assert seen["config"]["inputdataconfig"]["model"]["TrainingInputMode"] == "FastFile"
    assert seen["config"]["resourceconfig"]["hosts"] == ["algo-1"]
    environment = {"COLOUR": "red", "TRAINING_JOB_NAME": "job", "TRAINING_JOB_ARN": job["TrainingJobArn"]}
    assert seen["environment"] == environment
    assert archive(s3, simulator.bucket, "jobs/job/output/output.tar.gz") == {"log.txt": b"done"}
    lines = log_lines("job")
    assert lines[0].startswith("training") and "epoch=2; score=3.0;" in lines
    assert simulator.live() == []
    assert [operation for operation, _ in simulator.created] == ["CreateTrainingJob"]


@pytest.mark.parametrize("mounted", [True, False])
def test_entrypoint_arguments_and_isolation(
    simulator: Simulator, sagemaker: Any, s3: Any, monkeypatch: pytest.MonkeyPatch, mounted: bool
) -> None:
    """What a request has run names ``/opt/ml`` itself; on machines that cannot mount one, its arguments are changed."""
    if not mounted:
        monkeypatch.setattr("detkit_sagemaker.testing.training_job.can_mount", lambda: False)
    elif not can_mount():
        pytest.skip("this machine lets nobody mount")
    algorithm = request(simulator)["AlgorithmSpecification"]
    entrypoint = {"ContainerEntrypoint": CONTAINER, "ContainerArguments": ["--at", "/opt/ml/model"]}
    changed = request(simulator, "own", AlgorithmSpecification={**algorithm, **entrypoint}, EnableNetworkIsolation=True)
    sagemaker.create_training_job(**changed)
    assert finished(sagemaker, "own")["TrainingJobStatus"] == "Completed"
    seen = json.loads(archive(s3, simulator.bucket, "jobs/own/output/model.tar.gz")["algo-1.json"])
    assert seen["arguments"][0] == "--at" and seen["arguments"][1].endswith("ml/model")
    assert (seen["arguments"][1] == "/opt/ml/model") == mounted
    assert seen["aws"] == ["AWS_REGION"]


def test_uncompressed_output(simulator: Simulator, sagemaker: Any, s3: Any) -> None:
    output = {"S3OutputPath": f"s3://{simulator.bucket}/jobs/", "CompressionType": "NONE"}
    sagemaker.create_training_job(**request(simulator, OutputDataConfig=output))
    job = finished(sagemaker)
    assert job["ModelArtifacts"]["S3ModelArtifacts"] == f"s3://{simulator.bucket}/jobs/job/output/model/"
    found = s3.list_objects_v2(Bucket=simulator.bucket, Prefix="jobs/")["Contents"]
    assert {one["Key"] for one in found} == {"jobs/job/output/model/algo-1.json", "jobs/job/output/data/log.txt"}


def test_failure(simulator: Simulator, sagemaker: Any, s3: Any) -> None:
    sagemaker.create_training_job(**request(simulator, HyperParameters={"do": "fail"}))
    job = finished(sagemaker)
    assert job["TrainingJobStatus"] == job["SecondaryStatus"] == "Failed"
    assert job["FailureReason"].startswith("AlgorithmError: the images are upside down")
    assert job["FailureReason"].endswith("exit code: 3") and len(job["FailureReason"]) == 1024
    assert "ModelArtifacts" not in job
    assert archive(s3, simulator.bucket, "jobs/job/output/output.tar.gz") == {"partial.txt": b"half"}
    broken = {**request(simulator)["AlgorithmSpecification"], "TrainingImage": simulator.image("broken:1")}
    sagemaker.create_training_job(**request(simulator, "never", AlgorithmSpecification=broken))
    assert "cannot be started" in finished(sagemaker, "never")["FailureReason"]


def test_stop(simulator: Simulator, sagemaker: Any, s3: Any) -> None:
    sagemaker.create_training_job(**request(simulator, HyperParameters={"do": "wait"}))
    until(lambda: sagemaker.describe_training_job(TrainingJobName="job")["SecondaryStatus"] == "Training")
    until(lambda: "waiting" in log_lines("job"))
    assert simulator.live() == ["job"]
    sagemaker.stop_training_job(TrainingJobName="job")
    assert sagemaker.describe_training_job(TrainingJobName="job")["TrainingJobStatus"] in ("Stopping", "Stopped")
    job = finished(sagemaker)
    assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "Stopped")
    assert archive(s3, simulator.bucket, "jobs/job/output/model.tar.gz") == {"stopped": b"at the signal"}
    assert refusal(sagemaker.stop_training_job, TrainingJobName="job")[0] == "ValidationException"


def test_the_time_limit_kills_what_does_not_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    with Simulator(images={"mine:1": CONTAINER}, folder=tmp_path, grace=0.2) as simulator:
        for name, value in simulator.environment.items():
            monkeypatch.setenv(name, value)
        sagemaker = boto3.client("sagemaker")
        stopping = {"MaxRuntimeInSeconds": 1}
        wanted = request(simulator, InputDataConfig=None, HyperParameters={"do": "hang"}, StoppingCondition=stopping)
        sagemaker.create_training_job(**wanted)
        job = finished(sagemaker)
        assert (job["TrainingJobStatus"], job["SecondaryStatus"]) == ("Stopped", "MaxRuntimeExceeded")
        pids = next(line for line in log_lines("job") if line.startswith("pids")).split()[1:]
        assert not any(is_running(int(pid)) for pid in pids)

        sagemaker.create_training_job(
            **{**wanted, "TrainingJobName": "left", "StoppingCondition": {"MaxRuntimeInSeconds": 60}}
        )
        until(lambda: len(log_lines("left")) == 2)
        pids = log_lines("left")[1].split()[1:]
        assert all(is_running(int(pid)) for pid in pids)
    assert not any(is_running(int(pid)) for pid in pids), "closing the simulator ends every process"
    with pytest.raises(EndpointConnectionError):
        boto3.client("sts", config=Config(retries={"total_max_attempts": 1})).get_caller_identity()


def test_containers_may_have_a_real_opt_ml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    simulator = Simulator(images={"mine:1": CONTAINER}, folder=tmp_path, opt_ml=True)
    if not can_mount():
        with pytest.raises(RuntimeError, match="user namespaces"):
            simulator.__enter__()
        return
    with simulator:
        for name, value in simulator.environment.items():
            monkeypatch.setenv(name, value)
        sagemaker = boto3.client("sagemaker")
        sagemaker.create_training_job(**request(simulator, InputDataConfig=None))
        assert finished(sagemaker)["TrainingJobStatus"] == "Completed"
        files = archive(boto3.client("s3"), simulator.bucket, "jobs/job/output/model.tar.gz")
        assert json.loads(files["algo-1.json"])["base"] == "/opt/ml"
        sagemaker.create_training_job(
            **request(simulator, "waiting", InputDataConfig=None, HyperParameters={"do": "wait"})
        )
        until(lambda: "waiting" in log_lines("waiting"))
        sagemaker.stop_training_job(TrainingJobName="waiting")
        finished(sagemaker, "waiting")
        files = archive(boto3.client("s3"), simulator.bucket, "jobs/waiting/output/model.tar.gz")
        assert files == {"stopped": b"at the signal"}, "the signal arrives"
    assert not Path("/opt/ml").exists()


def test_spot_jobs_go_on_from_their_checkpoints(simulator: Simulator, sagemaker: Any, s3: Any) -> None:
    spot = {
        "EnableManagedSpotTraining": True,
        "StoppingCondition": {"MaxRuntimeInSeconds": 60, "MaxWaitTimeInSeconds": 60},
        "CheckpointConfig": {"S3Uri": f"s3://{simulator.bucket}/checkpoints/job"},
        "HyperParameters": {"do": "checkpoint"},
    }
    sagemaker.create_training_job(**request(simulator, **spot))
    for epoch in range(2):
        until(lambda epoch=epoch: f"resumed at {epoch}" in log_lines("job"))  # type: ignore[misc]
        until(lambda: s3.list_objects_v2(Bucket=simulator.bucket, Prefix="checkpoints/job/")["KeyCount"])
        simulator.faults.interrupt_spot("job")
    job = finished(sagemaker)
    assert job["TrainingJobStatus"] == "Completed"
    walk = [one["Status"] for one in job["SecondaryStatusTransitions"]]
    attempt = ["Starting", "Downloading", "Training"]
    assert walk == [*[*attempt, "Interrupted"] * 2, *attempt, "Uploading", "Completed"]
    assert job["BillableTimeInSeconds"] <= job["TrainingTimeInSeconds"]
    assert "resumed at 2" in log_lines("job")
    found = s3.list_objects_v2(Bucket=simulator.bucket, Prefix="checkpoints/job/")["Contents"]
    assert [one["Key"].rsplit("/", 1)[1] for one in found] == ["0.ckpt", "1.ckpt", "2.ckpt"]
    for changes in ({"StoppingCondition": {"MaxRuntimeInSeconds": 60}}, {"EnableManagedSpotTraining": False}):
        wrong = request(simulator, "wrong", **{**spot, **changes})
        assert refusal(sagemaker.create_training_job, **wrong)[0] == "ValidationException"


def test_several_hosts(simulator: Simulator, sagemaker: Any, s3: Any) -> None:
    source = channel(simulator, "train", "data/train")
    source["DataSource"]["S3DataSource"]["S3DataDistributionType"] = "ShardedByS3Key"
    resources = {"InstanceType": "ml.m5.large", "InstanceCount": 2, "VolumeSizeInGB": 10}
    sagemaker.create_training_job(**request(simulator, ResourceConfig=resources, InputDataConfig=[source]))
    assert finished(sagemaker)["TrainingJobStatus"] == "Completed"
    files = archive(s3, simulator.bucket, "jobs/job/output/model.tar.gz")
    seen = {name: json.loads(content) for name, content in files.items()}
    assert set(seen) == {"algo-1.json", "algo-2.json"}
    for one in seen.values():
        assert one["config"]["resourceconfig"]["hosts"] == ["algo-1", "algo-2"]
        assert one["master"] == "127.0.0.1"
    assert [seen[f"algo-{host}.json"]["data"] for host in (1, 2)] == [["train/a.jpg"], ["train/more/b.jpg"]]


def test_manifests(simulator: Simulator, sagemaker: Any, s3: Any) -> None:
    start = f"s3://{simulator.bucket}/data/"
    manifest = json.dumps([{"prefix": start}, "train/more/b.jpg", "train/a.jpg"])
    s3.put_object(Bucket=simulator.bucket, Key="lists/some.manifest", Body=manifest)
    source = channel(simulator, "train", "lists/some.manifest")
    source["DataSource"]["S3DataSource"]["S3DataType"] = "ManifestFile"
    sagemaker.create_training_job(**request(simulator, InputDataConfig=[source]))
    finished(sagemaker)
    seen = json.loads(archive(s3, simulator.bucket, "jobs/job/output/model.tar.gz")["algo-1.json"])
    assert seen["data"] == ["train/train/a.jpg", "train/train/more/b.jpg"]


def test_augmented_manifests_are_streamed_as_recordio(simulator: Simulator, sagemaker: Any, s3: Any) -> None:
    magic = struct.pack("<I", 0xCED7230A)
    s3.put_object(Bucket=simulator.bucket, Key="data/magic.jpg", Body=b"head" + magic + b"tail!")
    lines = [
        {"source-ref": f"s3://{simulator.bucket}/data/train/a.jpg", "boxes": {"annotations": []}, "other": 1},
        {"source-ref": f"s3://{simulator.bucket}/data/magic.jpg", "boxes": 7},
    ]
    text = "\n".join(map(json.dumps, lines))
    s3.put_object(Bucket=simulator.bucket, Key="lists/train.jsonl", Body=text)
    source = channel(simulator, "train", "lists/train.jsonl", RecordWrapperType="RecordIO", InputMode="Pipe")
    source["DataSource"]["S3DataSource"] |= {
        "S3DataType": "AugmentedManifestFile",
        "AttributeNames": ["source-ref", "boxes"],
    }
    do = {"do": "pipe"}
    sagemaker.create_training_job(**request(simulator, InputDataConfig=[source], HyperParameters=do))
    assert finished(sagemaker)["TrainingJobStatus"] == "Completed"
    read = json.loads(archive(s3, simulator.bucket, "jobs/job/output/model.tar.gz")["read.json"])

    def record(kind: int, content: bytes) -> bytes:
        return magic + struct.pack("<I", kind << 29 | len(content)) + content + bytes(-len(content) % 4)

    expected = record(0, b"aa") + record(0, b'{"annotations": []}') + record(1, b"head") + record(3, b"tail!")
    assert [bytes.fromhex(one) for one in read] == [expected + record(0, b"7")] * 2

    for wrong in ({"InputMode": "File"}, {"RecordWrapperType": "RecordIO", "InputMode": "File"}):
        refused = request(simulator, "refused", InputDataConfig=[{**source, **wrong}])
        assert refusal(sagemaker.create_training_job, **refused)[0] == "ValidationException"
    source["DataSource"]["S3DataSource"]["AttributeNames"] = ["source-ref", "missing"]
    refused = request(simulator, "refused", InputDataConfig=[source])
    assert "missing" in refusal(sagemaker.create_training_job, **refused)[1]


def test_bad_requests_are_refused(simulator: Simulator, sagemaker: Any) -> None:
    algorithm = request(simulator)["AlgorithmSpecification"]
    resources = request(simulator)["ResourceConfig"]
    nowhere = [channel(simulator, "train", "nothing/")]
    elsewhere = {"S3OutputPath": "s3://no-such-bucket-anywhere/x"}
    stranger = simulator.role + "-unknown"
    unknown = {**algorithm, "TrainingImage": simulator.image("mine:2")}
    no_group = {**algorithm, "MetricDefinitions": [{"Name": "x", "Regex": "score=.*"}]}
    checkpoints = {"S3Uri": f"s3://{simulator.bucket}/x", "LocalPath": "/somewhere"}
    wrong: dict[str, tuple[Json, str]] = {
        "name": ({"TrainingJobName": "bad_name!"}, "regular expression"),
        "enum": ({"ResourceConfig": {**resources, "InstanceType": "ml.huge"}}, "enum"),
        "length": ({"HyperParameters": {"long": "x" * 3000}}, "length"),
        "data": ({"InputDataConfig": nowhere}, "No S3 objects found"),
        "twice": ({"InputDataConfig": [channel(simulator, "train", "data/train/")] * 2}, "Duplicate"),
        "bucket": ({"OutputDataConfig": elsewhere}, "no-such-bucket"),
        "role": ({"RoleArn": stranger}, "assume role"),
        "image": ({"AlgorithmSpecification": unknown}, "mine:2"),
        "group": ({"AlgorithmSpecification": no_group}, "group"),
        "checkpoints": ({"CheckpointConfig": checkpoints}, "/opt/ml"),
        "tags": ({"Tags": [{"Key": "aws:mine", "Value": ""}]}, "aws:"),
    }
    for what, (changes, said) in wrong.items():
        code, message = refusal(sagemaker.create_training_job, **request(simulator, **changes))
        assert code == "ValidationException", what
        assert said in message, what
    assert simulator.live() == [] and simulator.created == []
    # boto3 would not even send what lacks a member.
    raw = boto3.client("sagemaker", config=Config(parameter_validation=False))
    assert refusal(raw.create_training_job, TrainingJobName="x")[0] == "ValidationException"

    sagemaker.create_training_job(**request(simulator))
    assert refusal(sagemaker.create_training_job, **request(simulator))[0] == "ResourceInUse"
    code, message = refusal(sagemaker.describe_training_job, TrainingJobName="other")
    assert (code, message) == ("ValidationException", "Requested resource not found.")
    assert refusal(sagemaker.describe_notebook_instance, NotebookInstanceName="x")[0] == "UnknownOperationException"
    finished(sagemaker)


def test_the_built_in_has_its_own_metrics(simulator: Simulator, sagemaker: Any) -> None:
    built_in = {"TrainingImage": "811284229777.dkr.ecr.us-east-1.amazonaws.com/object-detection:1"}
    algorithm = {**built_in, "TrainingInputMode": "File"}
    sagemaker.create_training_job(**request(simulator, AlgorithmSpecification=algorithm))
    described = finished(sagemaker)["AlgorithmSpecification"]["MetricDefinitions"]
    assert "validation:mAP" in [one["Name"] for one in described]
    overriding = {**algorithm, "MetricDefinitions": [{"Name": "x", "Regex": "(.)"}]}
    wrong = request(simulator, "other", AlgorithmSpecification=overriding)
    assert refusal(sagemaker.create_training_job, **wrong)[0] == "ValidationException"


def test_lists_have_pages_filters_and_tags(simulator: Simulator, sagemaker: Any) -> None:
    tags = [{"Key": "detkit:run", "Value": "one"}]
    for number in range(12):
        name = f"{'odd' if number % 2 else 'even'}-{number}"
        fails = {"do": "fail"} if number == 5 else {"do": ""}
        sagemaker.create_training_job(**request(simulator, name, HyperParameters=fails, Tags=tags))
    simulator.wait(40)
    first = sagemaker.list_training_jobs()
    assert len(first["TrainingJobSummaries"]) == 10, "as many as AWS gives unasked"
    assert first["TrainingJobSummaries"][0]["TrainingJobName"] == "odd-11", "the newest first"
    pages = list(sagemaker.get_paginator("list_training_jobs").paginate(PaginationConfig={"PageSize": 5}))
    assert [len(page["TrainingJobSummaries"]) for page in pages] == [5, 5, 2]
    assert len({one["TrainingJobName"] for page in pages for one in page["TrainingJobSummaries"]}) == 12
    failed = sagemaker.list_training_jobs(StatusEquals="Failed")["TrainingJobSummaries"]
    assert [one["TrainingJobName"] for one in failed] == ["odd-5"]
    even = sagemaker.list_training_jobs(NameContains="even", SortBy="Name", SortOrder="Ascending", MaxResults=3)
    assert [one["TrainingJobName"] for one in even["TrainingJobSummaries"]] == ["even-0", "even-10", "even-2"]
    later = sagemaker.list_training_jobs(CreationTimeAfter=even["TrainingJobSummaries"][1]["CreationTime"])
    assert [one["TrainingJobName"] for one in later["TrainingJobSummaries"]] == ["odd-11", "even-10"]
    assert refusal(sagemaker.list_training_jobs, NextToken="rubbish")[0] == "ValidationException"
    assert refusal(sagemaker.list_training_jobs, MaxResults=1000)[0] == "ValidationException"

    arn = failed[0]["TrainingJobArn"]
    assert sagemaker.list_tags(ResourceArn=arn)["Tags"] == tags
    sagemaker.add_tags(ResourceArn=arn, Tags=[{"Key": "more", "Value": "2"}])
    sagemaker.delete_tags(ResourceArn=arn, TagKeys=["detkit:run"])
    assert sagemaker.list_tags(ResourceArn=arn)["Tags"] == [{"Key": "more", "Value": "2"}]
    assert refusal(sagemaker.list_tags, ResourceArn=arn + "x")[0] in ("ResourceNotFound", "ValidationException")


def test_one_simulator_at_a_time(simulator: Simulator) -> None:
    with pytest.raises(RuntimeError, match="another simulator is open"):
        Simulator().__enter__()
    assert boto3.client("sts").get_caller_identity()["Account"] in simulator.role
    images = boto3.client("ecr").describe_images(repositoryName="mine")["imageDetails"]
    assert images[0]["imageTags"] == ["1"]
    assert os.environ["AWS_ENDPOINT_URL"] == simulator.url
