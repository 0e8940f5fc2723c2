"""What the simulator keeps others from, and what it takes from the machine and gives back."""

from __future__ import annotations

import http.client
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from detkit_sagemaker.testing import Simulator
from detkit_sagemaker.testing.containers import Container, discard

CONTAINER = [sys.executable, str(Path(__file__).with_name("simulator_container.py"))]
SEES = """
import json, os, stat, sys
from pathlib import Path
base = Path(os.environ["SAGEMAKER_BASE_DIR"])
channel = base / "input/data/train"
modes = [stat.S_IMODE(path.stat().st_mode) for path in (channel, channel / "a.jpg")] if channel.exists() else []
import boto3
jobs = boto3.client("sagemaker").list_training_jobs()["TrainingJobSummaries"]
seen = {"environment": dict(os.environ), "modes": modes, "jobs": [one["TrainingJobName"] for one in jobs]}
Path(os.environ["TMPDIR"], "left").write_text("over")
(base / "model" / "seen.json").write_text(json.dumps(seen))
"""


@pytest.fixture
def simulator_images() -> dict[str, list[str]]:
    return {"mine:1": CONTAINER, "sees:1": [sys.executable, "-c", SEES]}


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def request(simulator: Simulator, image: str, **changes: Any) -> dict[str, Any]:
    return {
        "TrainingJobName": "job",
        "AlgorithmSpecification": {"TrainingImage": simulator.image(image), "TrainingInputMode": "FastFile"},
        "RoleArn": simulator.role,
        "OutputDataConfig": {"S3OutputPath": f"s3://{simulator.bucket}/jobs", "CompressionType": "NONE"},
        "ResourceConfig": {"InstanceType": "ml.m5.large", "InstanceCount": 1, "VolumeSizeInGB": 10},
        "StoppingCondition": {"MaxRuntimeInSeconds": 60},
        **changes,
    }


def signature(key: str, service: str) -> str:
    return (
        f"AWS4-HMAC-SHA256 Credential={key}/20260101/us-east-1/{service}/aws4_request, SignedHeaders=host, Signature=0"
    )


def asked(simulator: Simulator, method: str, path: str, body: str = "", **headers: str) -> tuple[int, dict[str, str]]:
    connection = http.client.HTTPConnection(simulator.url.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, body=body, headers={name.replace("_", "-"): headers[name] for name in headers})
        answer = connection.getresponse()
        answer.read()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


def test_nobody_without_the_key_can_call_it(simulator: Simulator) -> None:
    key = simulator.environment["AWS_ACCESS_KEY_ID"]
    job = {"X_Amz_Target": "SageMaker.CreateTrainingJob", "Content_Type": "application/x-amz-json-1.1"}
    wanted = request(simulator, "mine:1")
    wanted["AlgorithmSpecification"] |= {"ContainerEntrypoint": ["/bin/sh", "-c", "true"]}
    body, calls, port = json.dumps(wanted), len(simulator.calls), simulator.url.rpartition(":")[2]
    ours, guessed = (signature(one, "sagemaker") for one in (key, "testing"))
    for headers in (
        {"Authorization": guessed},
        {"Authorization": signature("SIMULATOR", "sagemaker")},
        {"Authorization": ours, "Origin": "https://example.com"},
        {"Authorization": ours, "Origin": "null"},
        {"Authorization": ours, "Host": f"example.com:{port}"},
        {},
    ):
        status, answered = asked(simulator, "POST", "/", body, **job, **headers)
        assert status == 403, headers
        assert not [name for name in answered if name.startswith("access-control")]
    preflight = {"Origin": "https://example.com", "Access_Control_Request_Method": "POST"}
    assert asked(simulator, "OPTIONS", "/", **preflight)[0] == 403
    s3 = boto3.client("s3")
    s3.put_object(Bucket=simulator.bucket, Key="a", Body=b"a")
    assert asked(simulator, "GET", f"/{simulator.bucket}/a")[0] == 403
    link = s3.generate_presigned_url("get_object", Params={"Bucket": simulator.bucket, "Key": "a"})
    assert asked(simulator, "GET", link.removeprefix(simulator.url))[0] == 403
    for headers in ({}, {"Authorization": signature(key, "s3")}):
        assert asked(simulator, "POST", "/moto-api/reset", **headers)[0] == 403
    assert asked(simulator, "GET", "/moto-api/data.json")[0] == 403
    assert s3.get_object(Bucket=simulator.bucket, Key="a")["Body"].read() == b"a"
    assert simulator.calls[calls:] == ["PutObject", "GetObject"]
    assert simulator.live() == []
    status, answered = asked(simulator, "POST", "/", body, **job, Authorization=ours)
    assert status == 200 and not [name for name in answered if name.startswith("access-control")]
    simulator.wait()


def test_a_container_has_places_of_its_own(simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "mine")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    s3 = boto3.client("s3")
    s3.put_object(Bucket=simulator.bucket, Key="data/a.jpg", Body=b"a")
    source = {"S3DataType": "S3Prefix", "S3Uri": f"s3://{simulator.bucket}/data/"}
    channels = [{"ChannelName": "train", "DataSource": {"S3DataSource": source}}]
    boto3.client("sagemaker").create_training_job(**request(simulator, "sees:1", InputDataConfig=channels))
    simulator.wait()
    answer = s3.get_object(Bucket=simulator.bucket, Key="jobs/job/output/model/seen.json")
    seen = json.loads(answer["Body"].read())
    assert seen["modes"] == [0o555, 0o444]
    assert seen["jobs"] == ["job"], "a container asks this SageMaker, too"
    environment = seen["environment"]
    assert "MY_SECRET" not in environment and environment["OMP_NUM_THREADS"] == "1"
    places = {environment[name] for name in ("HOME", "TMPDIR", "DETKIT_CACHE")}
    assert len(places) == 3 and str(Path.home()) not in places
    assert not any(Path(place).exists() for place in places)
    kept = Path(simulator.environment["AWS_CONFIG_FILE"]).parent / "training" / "job" / "algo-1" / "ml"
    until(lambda: not (kept / "input/data").exists() and not (kept / "model").exists())


HOSTS = """
import sys, time
import boto3
from detkit_sagemaker.testing.containers import Container
from pathlib import Path
program = "import os, subprocess, sys, time; sleep = [sys.executable, '-c', 'import time; time.sleep(99)']"
program += "; one = subprocess.Popen(sleep); print(os.getpid(), one.pid, os.environ['TMPDIR'], flush=True)"
program += "; time.sleep(99)"
Container([sys.executable, "-c", program], {}, Path(sys.argv[1]), lambda line: print(line, flush=True))
time.sleep(99)
"""


@pytest.mark.parametrize("ending", ["SIGTERM", "SIGKILL", "SIGHUP"])
def test_containers_end_with_their_simulator(ending: str, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOSTS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        *pids, place = host.stdout.readline().split()
        assert all(is_running(int(pid)) for pid in pids) and Path(place).is_dir()
        host.send_signal(getattr(signal, ending))
    until(lambda: not any(is_running(int(pid)) for pid in pids))
    until(lambda: not Path(place).exists())


def test_a_container_tells_how_it_ended(tmp_path: Path) -> None:
    for program, code in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        container = Container([sys.executable, "-c", program], {}, tmp_path, print)
        until(lambda one=container: one.exit_code is not None)
        assert container.exit_code == code
        container.close()
        assert not container._scratch.exists()


def test_a_users_own_settings_lead_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\nregion = eu-west-1\nendpoint_url = http://127.0.0.1:1\n")
    nowhere = "http://127.0.0.1:1"
    foreign = {
        **dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"), nowhere),
        **dict.fromkeys(("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL_SAGEMAKER", "AWS_ENDPOINT_URL"), nowhere),
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
        "AWS_PROFILE": "not-there",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
    }
    program = """
import os
from detkit_sagemaker.testing import Simulator
with Simulator(images={"mine:latest": ["true"]}) as aws:
    os.environ.update(aws.environment)
    import boto3
    print(boto3.client("ecr").list_images(repositoryName="mine")["imageIds"][0]["imageTag"])
    print(boto3.client("s3").list_buckets()["Buckets"][0]["Name"] == aws.bucket)
    print(boto3.client("sagemaker").list_models()["Models"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **foreign}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "latest\nTrue\n[]\n", done.stderr


def test_read_only_folders_can_be_discarded(tmp_path: Path) -> None:
    (tmp_path / "one" / "two").mkdir(parents=True)
    (tmp_path / "one" / "two" / "file").write_text("a")
    for path in (tmp_path / "one" / "two", tmp_path / "one"):
        path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    discard(tmp_path / "one")
    assert not (tmp_path / "one").exists()
    discard(tmp_path / "one")
