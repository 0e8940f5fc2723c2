"""What goes wrong on the way to a trained model: the right words, nothing left over, and a run that can go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from typer.testing import CliRunner

import detkit
from detkit import Dataset, Run, Trainer, Tuner, open_run
from detkit.cli.runs import app as runs_verbs
from detkit.errors import DetkitWarning, RunFailed, StorageError, UsageError
from detkit.testing import tiny_dataset
from detkit_sagemaker import aws as aws_module
from detkit_sagemaker import builtin, history, logs, runs, submission, tuning, uploads
from detkit_sagemaker.aws import AccessDenied, Aws, AwsError, CredentialsExpired
from detkit_sagemaker.backend import SagemakerBackend
from detkit_sagemaker.endpoints import remove
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.options import TransformOptions
from detkit_sagemaker.runs import SagemakerRun
from detkit_sagemaker.testing import Simulator
from detkit_sagemaker.testing.faults import DropConnection
from detkit_sagemaker.transform import predict_batch

SLOWLY = """
import time, types
from detkit_echo import engine
from detkit_sagemaker.container.__main__ import run
engine.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(0.05))
run()
"""
"""Our container, where a step of echo takes a while."""

HELD = """
import sys, time, types
from pathlib import Path
from detkit_echo import engine
from detkit_sagemaker.container.__main__ import run
go = Path(sys.argv.pop(1))
def hold(seconds):
    while any(Path("checkpoints").iterdir()) and not go.exists():
        time.sleep(0.02)
engine.time = types.SimpleNamespace(sleep=hold)
run()
"""
"""Our container, where echo takes no step after its first checkpoint until a file is there."""

AT_ONCE = """
import sys
import boto3, numpy
import detkit.tuner, detkit_sagemaker.backend, detkit_sagemaker.recovery, detkit_sagemaker.submission
from detkit.cli import main
print(flush=True)
sys.stdin.readline()
main()
"""
"""The command line, which has imported what takes long and waits for a line before it begins."""

SEARCH = ("--trials", "2", "--parallel", "2", "epochs=1", "learning_rate=0.1..0.9:log")
MODEL = "memory.npz"

LEFT = """
import os, pathlib, signal, sys, time
def end(*_):
    if sys.argv[1] == "left":
        pathlib.Path(os.environ["SAGEMAKER_BASE_DIR"], "model", "model_algo_1-0000.params").write_bytes(b"weights")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
time.sleep(60)
"""
"""An algorithm that goes on for ever, and keeps its model, or does not, when it is stopped."""


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the image ``held`` waits for."""
    return tmp_path_factory.mktemp("go") / "go"


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory, go: Path) -> Iterator[Simulator]:
    container = [sys.executable, "-m", "detkit_sagemaker.container"]
    images = {"detkit:latest": container, "slow:latest": [sys.executable, "-c", SLOWLY]}
    images["held:latest"] = [sys.executable, "-c", HELD, str(go)]
    images |= {f"{name}:latest": [sys.executable, "-c", LEFT, name] for name in ("left", "empty")}
    with (
        Simulator(images=images, folder=tmp_path_factory.mktemp("aws")) as aws,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("boto3.DEFAULT_SESSION", None)
        for name, value in aws.environment.items():
            patch.setenv(name, value)
        yield aws


@pytest.fixture(autouse=True)
def aws(account: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    """The account, in which nothing may live on after a test; runs, cache and ledger are the test's own."""
    for name, place in {"RUNS": "runs", "CACHE": "cache", "LEDGER": "ledger.jsonl"}.items():
        monkeypatch.setenv(f"DETKIT_{name}", str(tmp_path / place))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "etc"))
    monkeypatch.setattr(runs, "_SETTLED_S", 0.0)  # this account forgets nothing, so a job that is not there never was
    yield account
    account.faults.clear()
    assert account.live() == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def coco(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco") / "data"
    detkit.write_dataset(data, folder)
    return folder


def trainer(aws: Simulator, image: str = "detkit:latest", **settings: Any) -> Trainer:
    given = {"model": "echo/memory", "role": aws.role, "image_uri": aws.image(image), "yes": True, **settings}
    return Trainer(backend="sagemaker", **given)


def path_of(name: str) -> Path:
    return Path(os.environ["DETKIT_RUNS"], name)


def job_of(run: Run | str) -> str:
    path = path_of(run) if isinstance(run, str) else run.path
    return str(json.loads((path / "sagemaker.json").read_bytes())["name"])


def messages(run: Run) -> str:
    return "\n".join(str(event.values.get("message")) for event in run.events(follow=False))


def listed() -> dict[str, str]:
    """What `detkit runs ls` prints: the status of each run by its name."""
    done = CliRunner().invoke(runs_verbs, ["ls", "--json"])
    assert done.exit_code == 0, done.output
    return {Path(record["run"]).name: record["status"] for record in json.loads(done.stdout)}


def wait_until(true: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


# Refused before anything is there.


def not_trusted() -> str:
    trust = {"Statement": [{"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "*"}]}
    role = boto3.client("iam").create_role(RoleName="for-lambda", AssumeRolePolicyDocument=json.dumps(trust))
    return str(role["Role"]["Arn"])


def quota(aws: Simulator, use: str, **settings: Any) -> dict[str, Any]:
    """Let there be no machine for a use, and return the settings that want one."""
    aws.faults.quota(f"ml.g4dn.xlarge for {use} usage", 0)
    return settings


REFUSED: dict[str, tuple[Callable[[Simulator], dict[str, Any]], str]] = {
    "bucket": (lambda aws: {"output": "s3://not-there/x"}, "there is no bucket not-there; `aws s3 mb s3://not-there"),
    "role": (
        lambda aws: {"role": f"{aws.role}-not"},
        "no role detkit-simulator-not;.*`detkit sagemaker setup --print`",
    ),
    "trust": (lambda aws: {"role": not_trusted()}, "for-lambda does not trust sagemaker.amazonaws.com.*setup --print"),
    "image": (
        lambda aws: {"image_uri": aws.image("detkit:never")},
        "there is no image .*detkit:never; `detkit sagemaker build-image`",
    ),
    "image's place": (lambda aws: {"image_uri": "docker.io/detkit:1"}, "is no image in ECR.*`detkit sagemaker build"),
    "region": (
        lambda aws: {"model": "object-detection", "image_uri": None, "region": "mx-central-1"},
        "mx-central-1",
    ),
    "quota": (
        lambda aws: quota(aws, "training job"),
        "quota 'ml.g4dn.xlarge for training job usage' is 0, and 1 are needed; ask for more .*instance_type",
    ),
    "spot's quota": (
        lambda aws: quota(aws, "spot training job", spot=True),
        "'ml.g4dn.xlarge for spot training job usage' is 0",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_aws_would_reject_is_said_before(fault: str, aws: Simulator, data: Dataset) -> None:
    arrange, said = REFUSED[fault]
    settings = arrange(aws)
    before = len(aws.calls)
    with pytest.raises(UsageError, match=said):
        trainer(aws, **settings).fit(data, data, name="refused")
    writes = ("Create", "Put", "Upload", "Delete", "Start", "Stop", "Update", "Add")
    assert [call for call in aws.calls[before:] if call.startswith(writes)] == []
    assert not path_of("refused").exists()
    assert not Path(os.environ["DETKIT_LEDGER"]).exists()


def test_an_upload_that_is_refused_leaves_no_run(aws: Simulator, data: Dataset) -> None:
    before = len(aws.created)
    aws.faults.refuse("PutObject", "AccessDenied", "not authorized to perform s3:PutObject", status=403)
    with pytest.raises(AccessDenied, match=r"writing s3://.*s3:PutObject.*setup --print"):
        trainer(aws).fit(data, data, name="refused")
    assert not path_of("refused").exists()
    assert len(aws.created) == before


# Failed jobs.


def test_no_capacity_and_then_again(aws: Simulator, data: Dataset) -> None:
    """What failed at the start is tried again in the same run; what is refused meanwhile leaves it as it is."""
    aws.faults.capacity()
    with pytest.raises(
        RunFailed, match=r"CapacityError: Unable to provision(.|\n)*detkit train --resume .*again"
    ) as raised:
        trainer(aws).fit(data, data, name="again")
    first = job_of("again")
    assert first in str(raised.value)
    run = open_run("again")
    assert run.status == "failed"
    assert not any(run.workspace.model.iterdir())
    with pytest.raises(UsageError, match="no bucket not-there"):
        Trainer().resume(run, output="s3://not-there/x", quiet=True)
    assert listed() == {"again": "failed"}
    assert Trainer().resume(run, output=f"s3://{aws.bucket}/detkit", quiet=True).status == "finished"
    assert job_of(run) != first
    assert Ledger.of(Aws()).pending() == []


def test_what_the_engine_says_in_failing_arrives(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    code = tmp_path / "my_own.py"
    code.write_text(
        "from detkit_echo import engine\n"
        "def broken(image):\n"
        "    print('looking at', image.shape, flush=True)\n"
        "    raise ValueError('this image is upside down')\n"
        "engine.thumbnail = broken\n",
    )
    with pytest.raises(RunFailed, match="AlgorithmError: .*this image is upside down") as raised:
        trainer(aws, code=code, imports=["my_own"]).fit(data, data, name="broken")
    assert job_of("broken") in str(raised.value)
    assert "https://us-east-1.console.aws.amazon.com/" in str(raised.value)
    assert "looking at (96, 96, 3)" in raised.value.log_tail
    assert "my_own.py" in raised.value.log_tail
    assert listed() == {"broken": "failed"}


def test_an_artifact_that_was_not_uploaded(aws: Simulator, data: Dataset) -> None:
    aws.faults.fail_upload()
    with pytest.raises(RunFailed, match=r"Artifact upload failed(.|\n)*detkit train --resume"):
        trainer(aws).fit(data, data, name="lost")
    run = open_run("lost")
    assert run.status == "failed"
    assert not any(run.workspace.model.iterdir())
    assert Trainer().resume(run, quiet=True).status == "finished", "its checkpoints are still there"


def test_time_that_is_over_ends_the_job(aws: Simulator, data: Dataset) -> None:
    run = trainer(aws, "slow:latest", epochs=10_000, max_runtime="3s").fit(data, data, name="long")
    assert run.status == "stopped"
    assert "ended it after max_runtime, 3 s" in messages(run)
    with pytest.raises(UsageError, match="is stopped and has no model yet"):
        _ = run.model


def test_spot_goes_on_from_the_checkpoint(aws: Simulator, data: Dataset, go: Path) -> None:
    run = trainer(aws, "held:latest", epochs=12, spot=True).start(data, data, name="spot")
    checkpoints = f"detkit/checkpoints/{job_of(run)}/"

    def kept() -> bool:
        found = boto3.client("s3").list_objects_v2(Bucket=aws.bucket, Prefix=checkpoints)
        return bool(found.get("KeyCount"))

    wait_until(kept)
    aws.faults.interrupt_spot(job_of(run))
    client = boto3.client("sagemaker")

    def interrupted() -> bool:
        job = client.describe_training_job(TrainingJobName=job_of(run))
        return "Interrupted" in [one["Status"] for one in job["SecondaryStatusTransitions"]]

    wait_until(interrupted)
    go.touch()
    run.wait()
    assert "Interrupted" in messages(run)
    whole = Trainer(model="echo/memory", epochs=12).fit(data, data, name="whole", quiet=True)
    assert run.model.manifest.artifacts[MODEL] == whole.model.manifest.artifacts[MODEL]
    assert [row["step"] for row in run.history] == [row["step"] for row in whole.history]


# Following.


def test_credentials_that_expire_while_following(aws: Simulator, data: Dataset) -> None:
    aws.faults.slow(0.2)
    run = trainer(aws).start(data, data, name="follow")
    aws.faults.crash_after("DescribeTrainingJob", aws.faults.expire_tokens)
    with pytest.raises(CredentialsExpired, match=rf"expired.*job {job_of(run)} is not affected; `detkit runs attach"):
        run.wait()
    with pytest.warns(DetkitWarning, match="shown as it was last heard of"):
        assert listed() == {"follow": "running"}
    aws.wait()
    aws.faults.renew_tokens()
    assert open_run("follow").wait().status == "finished"
    assert listed() == {"follow": "finished"}
    assert open_run("follow").model.classes == data.classes


def test_credentials_that_expire_while_the_model_comes(aws: Simulator, data: Dataset) -> None:
    run = trainer(aws).start(data, data, name="follow")
    aws.wait()
    aws.faults.refuse("HeadObject", "ExpiredToken", status=400)
    aws.faults.refuse("GetObject", "ExpiredToken", status=400)
    with pytest.raises(CredentialsExpired, match="detkit runs attach"):
        run.wait()
    assert not any(run.workspace.model.iterdir())
    aws.faults.clear()
    assert open_run("follow").wait().status == "finished"
    rows = [row["step"] for row in open_run("follow").history if "train/loss" in row]
    assert rows == sorted(set(rows)), "a line was read twice"


# Too many calls.


def test_every_third_call_of_all_is_throttled(aws: Simulator, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, a batch transform, an endpoint and its end all get there; boto3 waits here for nothing."""
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr("botocore.retries.bucket.TokenBucket._sleep_amount", lambda *_: 0.0)
    monkeypatch.setenv("DETKIT_SCHEDULER_ROLE", aws.role)
    given = {"role": aws.role, "image_uri": aws.image("detkit:latest"), "yes": True}
    before, paths = len(aws.created), list(data.paths)
    aws.faults.throttle(every=3)
    run = trainer(aws).fit(data, data, name="busy")
    in_batch = list(predict_batch(run.model, paths, TransformOptions(**given)))
    with detkit.deploy(run, ttl="1h", **given) as endpoint, detkit.Predictor(endpoint) as predictor:
        answered = list(predictor.predict(data))
    assert endpoint.status == "Deleted"
    aws.faults.clear()
    created = [operation for operation, _ in aws.created[before:]]
    assert created == [
        *("CreateTrainingJob", "CreateModel", "CreateTransformJob"),
        *(["CreateSchedule"] * 3), *("CreateModel", "CreateEndpointConfig", "CreateEndpoint"),
    ]  # fmt: skip
    assert begun() == []
    with detkit.Predictor(run) as here:
        expected = [found.names for found in here.predict(data)]
    assert [found.names for found in answered] == expected
    assert len(in_batch) == len(paths)


# Answers that get lost, and processes that are killed.


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_answer_that_gets_lost(when: str, aws: Simulator, data: Dataset) -> None:
    before = len(aws.created)
    getattr(aws.faults, f"crash_{when}")("CreateTrainingJob")
    assert trainer(aws).fit(data, data, name="lost").status == "finished"
    assert [operation for operation, _ in aws.created[before:]] == ["CreateTrainingJob"]


def test_an_answer_that_gets_lost_with_the_credentials(aws: Simulator, data: Dataset) -> None:
    """Nobody can tell whether there is a job; the error names it, and what would follow it."""

    def expire() -> None:
        aws.faults.expire_tokens()
        raise DropConnection

    aws.faults.crash_after("CreateTrainingJob", expire)
    with pytest.raises(CredentialsExpired, match=r"`detkit runs attach .*lost` follows it"):
        trainer(aws).fit(data, data, name="lost")
    aws.faults.clear()
    name = aws.created[-1][1]["TrainingJobName"]
    assert [entry.name for entry in Ledger.of(Aws()).pending()] == [job_of("lost")] == [name]
    assert open_run("lost").wait().status == "finished"
    assert listed() == {"lost": "finished"}


@pytest.mark.parametrize("is_stopped", [True, False])
def test_ctrl_c_at_the_start_forgets_no_job(is_stopped: bool, aws: Simulator, data: Dataset) -> None:
    """The job is stopped, or said to go on where that fails; the run directory that knows of it stays."""
    aws.faults.slow(0.3)
    aws.faults.crash_after("CreateTrainingJob", lambda: os.kill(os.getpid(), signal.SIGINT))
    if not is_stopped:
        aws.faults.refuse("StopTrainingJob")
    told = "asked AWS to stop" if is_stopped else "StopTrainingJob.*if the job runs it costs: `detkit runs stop .*cut`"
    with pytest.raises(KeyboardInterrupt), pytest.warns(DetkitWarning, match=told):
        trainer(aws).fit(data, data, name="cut")
    assert job_of("cut") == aws.created[-1][1]["TrainingJobName"]
    run = open_run("cut")
    if not is_stopped:
        with pytest.warns(DetkitWarning, match=f"training jobs .* go on: {job_of(run)}"):
            remove(Aws())
    assert run.wait().status == ("stopped" if is_stopped else "finished")


def command(aws: Simulator, coco: Path, verb: str, name: str) -> list[str]:
    """Return what is typed to train, or to search."""
    words = [verb, str(coco), str(coco), "--backend", "sagemaker", "--model", "echo/memory", "--name", name]
    words += ["--role", aws.role, "--image-uri", aws.image("detkit:latest"), "--yes"]
    return [*words, *SEARCH] if verb == "tune" else words


def be_killed(
    aws: Simulator, coco: Path, name: str, *, when: str, operation: str, calls: int = 1, verb: str = "train"
) -> None:
    """Let a process train or tune that is killed at the n-th call of an operation, before or after that was done."""
    crash, left = getattr(aws.faults, f"crash_{when}"), [calls]

    def kill() -> None:
        left[0] -= 1
        if left[0]:
            crash(operation, kill)
        else:
            process.kill()
            if when == "before":
                raise DropConnection

    crash(operation, kill)
    process = subprocess.Popen(
        [sys.executable, "-m", "detkit.cli", *command(aws, coco, verb, name)], stderr=subprocess.PIPE
    )
    _, told = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, told.decode()


def test_killed_while_uploading_sends_only_what_is_missing(aws: Simulator, tmp_path: Path) -> None:
    detkit.write_dataset(tiny_dataset(tmp_path / "many", num_images=24, seed=7), tmp_path / "coco")

    def there() -> set[str]:
        pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=aws.bucket, Prefix="detkit/data/")
        return {item["Key"] for page in pages for item in page.get("Contents", [])}

    before = there()
    be_killed(aws, tmp_path / "coco", "cut", when="after", operation="PutObject", calls=8)
    time.sleep(0.5)  # what was under way arrives
    first = there() - before
    assert 8 <= len(first) < 24
    assert listed() == {"cut": "interrupted"}
    sent = len([call for call in aws.calls if call == "PutObject"])
    assert Trainer().resume("cut", quiet=True).status == "finished"
    sent = len([call for call in aws.calls if call == "PutObject"]) - sent
    assert sent == len(there() - before - first) + 1, "and what another machine needs to follow it"


def test_killed_before_the_job_is_created(aws: Simulator, coco: Path) -> None:
    be_killed(aws, coco, "killed", when="before", operation="CreateTrainingJob")
    name = job_of("killed")
    assert [entry.name for entry in Ledger.of(Aws()).pending()] == [name]
    assert listed() == {"killed": "interrupted"}
    run = open_run("killed")
    with pytest.raises(RunFailed, match=f"{name} is not known to AWS(.|\n)*detkit train --resume"):
        run.wait()
    assert Trainer().resume(run, quiet=True).status == "finished"
    assert listed() == {"killed": "finished"}


def test_killed_after_the_job_is_created(aws: Simulator, coco: Path) -> None:
    be_killed(aws, coco, "killed", when="after", operation="CreateTrainingJob")
    name = job_of("killed")
    assert [entry.name for entry in Ledger.of(Aws()).pending()] == [name]
    assert set(listed()) == {"killed"}
    assert open_run("killed").wait().status == "finished"
    assert Ledger.of(Aws()).pending() == []


def tuning_jobs(aws: Simulator) -> list[str]:
    """The names of all tuning jobs that were ever created."""
    called = [request for operation, request in aws.created if operation == "CreateHyperParameterTuningJob"]
    return [request["HyperParameterTuningJobName"] for request in called]


def search_of(study: str) -> str:
    return str(json.loads((path_of(study) / "tuning.json").read_bytes())["name"])


def begun() -> list[tuple[str, str]]:
    return [(entry.kind, entry.name) for entry in Ledger.of(Aws()).pending()]


def test_killed_before_the_search_is_created(aws: Simulator, coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, before = "CreateHyperParameterTuningJob", tuning_jobs(aws)
    be_killed(aws, coco, "killed", when="before", operation=operation, verb="tune")
    assert begun() == [("tuning-job", search_of("killed"))]
    monkeypatch.setattr(tuning, "_SETTLED_S", 0.0)
    with pytest.raises(RunFailed, match=f"AWS knows no tuning job {search_of('killed')}: it was never created"):
        Tuner().resume("killed", quiet=True)
    assert tuning_jobs(aws) == before
    assert begun() == []


def test_killed_after_the_search_is_created(aws: Simulator, coco: Path) -> None:
    aws.faults.slow(0.3)
    operation, before = "CreateHyperParameterTuningJob", tuning_jobs(aws)
    be_killed(aws, coco, "killed", when="after", operation=operation, verb="tune")
    name = search_of("killed")
    assert begun() == [("tuning-job", name)]
    with pytest.warns(DetkitWarning, match=f"tuning jobs .* go on: {name}; `detkit tune --resume STUDY`"):
        assert remove(Aws()) == []
    study = Tuner().resume("killed", quiet=True)
    assert [trial.state for trial in study.trials] == ["finished"] * 2
    assert tuning_jobs(aws) == [*before, name], "it was followed, not begun again"
    assert begun() == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_as_the_bucket_is_created(when: str, aws: Simulator, coco: Path) -> None:
    bucket = boto3.resource("s3").Bucket(aws.bucket)
    bucket.objects.delete()
    bucket.delete()
    before = len(aws.created)
    be_killed(aws, coco, "killed", when=when, operation="CreateBucket")
    assert begun() == [("bucket", aws.bucket)]
    assert listed() == {"killed": "interrupted"}
    assert Trainer().resume("killed", quiet=True).status == "finished"
    assert [operation for operation, _ in aws.created[before:]] == ["CreateTrainingJob"]
    assert begun() == [("bucket", aws.bucket)], "it stays"


def test_of_two_who_make_the_bucket_at_once_both_have_it(aws: Simulator) -> None:
    """Outside of us-east-1 the second one is told that it is there."""
    there = Aws("eu-west-1")
    place = {"LocationConstraint": "eu-west-1"}
    other = boto3.client("s3", region_name="eu-west-1")
    aws.faults.crash_before(
        "CreateBucket", lambda: other.create_bucket(Bucket=there.bucket, CreateBucketConfiguration=place)
    )
    uploads.ensure_bucket(there, f"s3://{there.bucket}/detkit")
    assert aws.calls[-2:] == ["CreateBucket"] * 2


@pytest.mark.parametrize("made", [True, False], ids=["the other one makes it", "the other one fails"])
def test_a_bucket_that_another_one_is_just_making_is_asked_for_again(aws: Simulator, made: bool) -> None:
    there = Aws("eu-central-1" if made else "eu-west-3")
    place = {"LocationConstraint": there.region}
    other = boto3.client("s3", region_name=there.region)

    def make() -> None:
        if made:
            other.create_bucket(Bucket=there.bucket, CreateBucketConfiguration=place)

    said = "A conflicting conditional operation is currently in progress against this resource. Try again."
    aws.faults.refuse("CreateBucket", "OperationAborted", said, times=2, status=409)
    aws.faults.crash_before("CreateBucket", make)
    uploads.ensure_bucket(there, f"s3://{there.bucket}/detkit")
    other.head_bucket(Bucket=there.bucket)


def test_killed_while_the_model_comes(aws: Simulator, data: Dataset) -> None:
    run = trainer(aws).start(data, data, name="killed")
    aws.wait()
    attach = [sys.executable, "-m", "detkit.cli", "runs", "attach", "killed"]
    with subprocess.Popen(attach, stderr=subprocess.PIPE) as process:
        aws.faults.crash_after("GetObject", process.kill)
        assert process.wait(60) == -signal.SIGKILL
    assert any(run.path.glob(".model-*"))
    assert not any(run.workspace.model.iterdir())
    assert subprocess.run(attach, capture_output=True, check=False).returncode == 0
    assert not any(run.path.glob(".model-*"))
    assert listed() == {"killed": "finished"}
    steps = [row["step"] for row in run.history if "train/loss" in row]
    assert steps == sorted(set(steps))


# Two at once.


def at_once(*commands: list[str]) -> list[tuple[int, str]]:
    """Type commands into shells of their own at the same moment; return how each ended, and what it said."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen([sys.executable, "-c", AT_ONCE, *words], text=True, **pipes) for words in commands]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=90)[1] for process in processes]
    return [(process.returncode, said) for process, said in zip(processes, told, strict=True)]


@pytest.mark.parametrize(
    ("verb", "operation"), [("train", "CreateTrainingJob"), ("tune", "CreateHyperParameterTuningJob")]
)
def test_of_two_that_begin_under_one_name_one_does(verb: str, operation: str, aws: Simulator, coco: Path) -> None:
    before = aws.calls.count(operation)
    ends = at_once(*[command(aws, coco, verb, "same")] * 2)
    assert sorted(code for code, _ in ends) == [0, 2], ends
    (refused,) = (said for code, said in ends if code == 2)
    assert re.search("same already holds .*; choose another name", refused), refused
    assert aws.calls.count(operation) == before + 1
    assert begun() == []
    assert list(listed()) == (["same"] if verb == "train" else [])


def test_of_two_that_recover_a_run_at_once_one_does(
    aws: Simulator, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = job_of(trainer(aws).fit(data, data, name="there"))
    monkeypatch.setenv("DETKIT_RUNS", str(tmp_path / "here"))
    ends = at_once(*[["runs", "attach", name, "--backend", "sagemaker"]] * 3)
    assert sorted(code for code, _ in ends) == [0, 2, 2], ends
    assert [f"`detkit runs attach {path_of(name)}` follows" in said for code, said in ends if code == 2] == [True] * 2
    assert listed() == {name: "finished"}
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == [name]
    assert not (path_of(name) / "run").exists()


# Going on.


def failed_run(aws: Simulator, data: Dataset, name: str, **settings: Any) -> Run:
    """Return a run whose job found no machine."""
    aws.faults.capacity()
    with pytest.raises(RunFailed, match="CapacityError"):
        trainer(aws, **settings).fit(data, data, name=name)
    return open_run(name)


def test_of_two_who_resume_one_does(aws: Simulator, data: Dataset) -> None:
    runs_ = [failed_run(aws, data, "twice"), open_run("twice")]
    before, ends = len(aws.created), []

    def resume(run: Run) -> None:
        try:
            ends.append(run.resume().wait().status)
        except UsageError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=resume, args=(run,)) for run in runs_]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(aws.created) == before + 1
    assert "finished" in ends
    assert any("only a stopped, failed or interrupted one" in end for end in ends)


def test_resumed_on_another_machine(
    aws: Simulator, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory without images is enough: what the job reads lies in S3, and nothing travels."""
    name = job_of(failed_run(aws, data, "there"))
    first = aws.created[-1][1]
    monkeypatch.setenv("DETKIT_RUNS", str(tmp_path / "here"))
    run = SagemakerBackend().recover(name, {})
    assert run.status == "failed"
    puts = aws.calls.count("PutObject")
    assert run.resume().wait().status == "finished"
    assert aws.calls.count("PutObject") == puts + 1, "what another machine needs"
    again = aws.created[-1][1]
    same = ("InputDataConfig", "CheckpointConfig")
    assert {key: again[key] for key in same} == {key: first[key] for key in same}
    assert detkit.evaluate(open_run(name), data, allow_seen=True)["AP50"] > 0.85


def test_the_cost_of_all_jobs(aws: Simulator, data: Dataset) -> None:
    """A run's cost goes on with it, and what may be spent is for all of its jobs."""
    run = failed_run(aws, data, "dear", max_cost=2.0, yes=False)
    record = json.loads((run.path / "sagemaker.json").read_bytes())
    (run.path / "sagemaker.json").write_text(json.dumps({**record, "billable_s": 3600.0}))
    spent = run.cost
    assert spent == pytest.approx(record["price_per_hour"])
    with pytest.raises(UsageError, match="has cost about 0.74 USD, and max_cost=0.5 is for all"):
        Trainer().resume(run, max_cost=0.5, quiet=True)
    assert run.job.options["max_cost"] == 2.0, "as it was"
    run.resume().wait()
    limit = aws.created[-1][1]["StoppingCondition"]["MaxRuntimeInSeconds"]
    assert limit == pytest.approx((2.0 - spent) / record["price_per_hour"] * 3600, abs=2)
    cost = open_run("dear").cost
    assert cost is not None
    assert spent < cost < spent + 0.1


# What comes back.


def test_a_token_of_yesterday(aws: Simulator, data: Dataset) -> None:
    run = trainer(aws, "slow:latest", epochs=8).start(data, data, name="old")
    wait_until(lambda: run.goes_on() and json.loads((run.path / "sagemaker.json").read_bytes())["tokens"])
    aws.faults.refuse("GetLogEvents", "InvalidParameterException", "The specified nextToken is invalid.")
    assert run.wait().status == "finished"
    assert "cannot be read" not in messages(run)
    steps = [row["step"] for row in run.history if "train/loss" in row]
    assert steps == sorted(set(steps))


def test_a_log_that_may_not_be_read(aws: Simulator, data: Dataset) -> None:
    """The model comes all the same, and the container's own file tells what the log would have."""
    aws.faults.refuse("GetLogEvents", "AccessDeniedException", times=10_000)
    run = trainer(aws).fit(data, data, name="mute")
    assert messages(run).count("log cannot be read") == 1
    local = Trainer(model="echo/memory").fit(data, data, name="local", quiet=True)
    assert [row["step"] for row in run.history] == [row["step"] for row in local.history]


@pytest.mark.parametrize("model", ["echo/memory", "object-detection"])
def test_every_event_once(model: str, aws: Simulator, data: Dataset) -> None:
    """Lines that come late are not lost, and those of a process that was killed between two writes not doubled."""
    image = {} if model.startswith("echo") else {"image_uri": None, "mini_batch_size": 4}
    run = trainer(aws, model=model, **image).start(data, data, name="whole")
    aws.wait()
    new_lines = logs.new_lines

    def first_half(*arguments: Any) -> Iterator[tuple[float, str, str]]:
        lines = list(new_lines(*arguments))
        yield from lines[: len(lines) // 2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "new_lines", first_half)
        patch.setattr(SagemakerRun, "_finish", lambda *_: None)
        run.refresh(at_once=True)  # type: ignore[attr-defined]
    assert run.history
    events = run.workspace.metrics_file
    events.write_bytes(events.read_bytes() + b"".join(events.read_bytes().splitlines(keepends=True)[-2:]))
    assert run.wait().status == "finished"
    told, _ = history.events_of(new_lines(Aws(), logs.TRAINING, f"{job_of(run)}/", {}), builtin.METRICS)
    had = [event for event in run.events(follow=False) if event.kind == "metric"]
    assert had == [event for event in told if event.kind == "metric"]
    assert len(had) > 10


def test_the_test_images_are_scored_as_here(aws: Simulator, data: Dataset) -> None:
    run = trainer(aws).fit(data, data, data, name="tested")
    local = Trainer(model="echo/memory").fit(data, data, data, name="local", quiet=True)
    tested = {name: value for name, value in local.model.manifest.metrics.items() if name.startswith("test/")}
    assert tested
    assert tested.items() <= run.model.manifest.metrics.items()
    assert run.model.manifest.data == local.model.manifest.data


def test_a_full_disk_is_not_the_end(aws: Simulator, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(aws).start(data, data, name="full")
    aws.wait()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        with pytest.raises(StorageError, match="free space.*`detkit runs attach .*full` fetches it"):
            run.wait()
    assert not run.workspace.failure_file.exists()
    assert open_run("full").wait().status == "finished"


def test_a_model_that_is_gone_is_the_end(aws: Simulator, data: Dataset) -> None:
    run = trainer(aws).start(data, data, name="gone")
    aws.wait()
    key = f"detkit/jobs/{job_of(run)}/output/model.tar.gz"
    boto3.client("s3").delete_object(Bucket=aws.bucket, Key=key)
    with pytest.raises(RunFailed, match=r"model\.tar\.gz is not there"):
        run.wait()
    assert listed() == {"gone": "failed"}


def test_a_log_is_waited_for(aws: Simulator, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the log is all that tells, a job's run has not ended before its last lines are there."""
    monkeypatch.setattr(runs, "_LAG_S", 1.5)
    run = trainer(aws, model="object-detection", image_uri=None, mini_batch_size=4).start(data, data, name="late")
    aws.wait()
    assert run.status == "running"
    assert run.wait().status == "finished"
    job = boto3.client("sagemaker").describe_training_job(TrainingJobName=job_of(run))
    assert time.time() - job["TrainingEndTime"].timestamp() > 1.5


@pytest.mark.parametrize("leaves", [True, False])
def test_what_a_stopped_algorithm_of_aws_leaves(leaves: bool, aws: Simulator, data: Dataset) -> None:
    """AWS's algorithms keep their model when their time is over."""
    image = "left:latest" if leaves else "empty:latest"
    run = trainer(aws, image_uri=None, model="object-detection", mini_batch_size=4, max_runtime="2s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submission, "builtin_image", lambda _: aws.image(image))
        done = run.fit(data, data, name="over")
    assert "ended it after max_runtime, 2 s" in messages(done)
    assert done.status == ("finished" if leaves else "stopped")
    assert (done.workspace.model / "model.tar.gz").is_file() == leaves


def test_aws_that_is_not_reached_for_a_while(aws: Simulator, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws_module, "_TRIES", 1)
    monkeypatch.setattr(runs, "_PAUSE_S", 0.05)
    run = trainer(aws).start(data, data, name="away")
    aws.faults.refuse("DescribeTrainingJob", "ThrottlingException", times=3)
    assert run.wait().status == "finished"
    assert messages(run).count("too many calls") == 1
    monkeypatch.setattr(runs, "_PATIENCE_S", 0.1)
    run = trainer(aws).start(data, data, name="long")
    aws.faults.refuse("DescribeTrainingJob", "ServiceUnavailable", times=10_000, status=503)
    with pytest.raises(AwsError, match=rf"job {job_of(run)} is not affected; `detkit runs attach .*long` follows"):
        run.wait()
    aws.faults.clear()
    assert run.wait().status == "finished"
