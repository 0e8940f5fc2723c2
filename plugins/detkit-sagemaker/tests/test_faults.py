"""What goes wrong on the way to a trained model: the right words, nothing left over, and a run that can go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from typer.testing import CliRunner

import detkit
from detkit import Dataset, Run, Trainer, open_run
from detkit.cli.runs import app as runs_verbs
from detkit.errors import DetkitWarning, RunFailed, UsageError
from detkit.testing import tiny_dataset
from detkit_sagemaker import runs
from detkit_sagemaker.aws import AccessDenied, Aws, CredentialsExpired
from detkit_sagemaker.backend import SagemakerBackend
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.testing import Simulator
from detkit_sagemaker.testing.faults import DropConnection

SLOWLY = """
import time, types
from detkit_echo import engine
from detkit_sagemaker.container.__main__ import run
engine.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(0.05))
run()
"""
"""Our container, where a step of echo takes a while."""

MODEL = "memory.npz"


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    container = [sys.executable, "-m", "detkit_sagemaker.container"]
    images = {"detkit:latest": container, "slow:latest": [sys.executable, "-c", SLOWLY]}
    with (
        Simulator(images=images, folder=tmp_path_factory.mktemp("aws")) as aws,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.delenv("AWS_PROFILE", raising=False)
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


def test_spot_goes_on_from_the_checkpoint(aws: Simulator, data: Dataset) -> None:
    run = trainer(aws, "slow:latest", epochs=12, spot=True).start(data, data, name="spot")
    checkpoints = f"detkit/checkpoints/{job_of(run)}/"

    def kept() -> bool:
        found = boto3.client("s3").list_objects_v2(Bucket=aws.bucket, Prefix=checkpoints)
        return bool(found.get("KeyCount"))

    wait_until(kept)
    aws.faults.interrupt_spot(job_of(run))
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
    with pytest.raises(CredentialsExpired, match=r"`detkit runs attach detkit-lost-.* --backend sagemaker` follows it"):
        trainer(aws).fit(data, data, name="lost")
    aws.faults.clear()
    assert listed() == {}
    name = aws.created[-1][1]["TrainingJobName"]
    assert [entry.name for entry in Ledger.of(Aws()).pending()] == [name]
    assert SagemakerBackend().recover(name, {}).wait().status == "finished"
    assert listed() == {name: "finished"}


def test_ctrl_c_at_the_start_leaves_no_job(aws: Simulator, data: Dataset) -> None:
    aws.faults.slow(0.5)
    aws.faults.crash_after("CreateTrainingJob", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer(aws).fit(data, data, name="unwanted")
    assert not path_of("unwanted").exists()
    aws.wait()
    name = aws.created[-1][1]["TrainingJobName"]
    assert boto3.client("sagemaker").describe_training_job(TrainingJobName=name)["TrainingJobStatus"] == "Stopped"


def train_and_be_killed(aws: Simulator, coco: Path, name: str, *, when: str, operation: str, calls: int = 1) -> None:
    """Let a process train that is killed at the n-th call of an operation, before or after that was done."""
    words = ["train", str(coco), str(coco), "--backend", "sagemaker", "--model", "echo/memory", "--name", name]
    words += ["--role", aws.role, "--image-uri", aws.image("detkit:latest"), "--yes"]
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
    process = subprocess.Popen([sys.executable, "-m", "detkit.cli", *words], stderr=subprocess.PIPE)
    _, told = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, told.decode()


def test_killed_while_uploading_sends_only_what_is_missing(aws: Simulator, tmp_path: Path) -> None:
    detkit.write_dataset(tiny_dataset(tmp_path / "many", num_images=24, seed=7), tmp_path / "coco")

    def there() -> set[str]:
        pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=aws.bucket, Prefix="detkit/data/")
        return {item["Key"] for page in pages for item in page.get("Contents", [])}

    before = there()
    train_and_be_killed(aws, tmp_path / "coco", "cut", when="after", operation="PutObject", calls=8)
    time.sleep(0.5)  # what was under way arrives
    first = there() - before
    assert 8 <= len(first) < 24
    assert listed() == {"cut": "interrupted"}
    sent = len([call for call in aws.calls if call == "PutObject"])
    assert Trainer().resume("cut", quiet=True).status == "finished"
    sent = len([call for call in aws.calls if call == "PutObject"]) - sent
    assert sent == len(there() - before - first) + 1, "and what another machine needs to follow it"


def test_killed_before_the_job_is_created(aws: Simulator, coco: Path) -> None:
    train_and_be_killed(aws, coco, "killed", when="before", operation="CreateTrainingJob")
    name = job_of("killed")
    assert [entry.name for entry in Ledger.of(Aws()).pending()] == [name]
    assert listed() == {"killed": "interrupted"}
    run = open_run("killed")
    with pytest.raises(RunFailed, match=f"{name} is not known to AWS(.|\n)*detkit train --resume"):
        run.wait()
    assert Trainer().resume(run, quiet=True).status == "finished"
    assert listed() == {"killed": "finished"}


def test_killed_after_the_job_is_created(aws: Simulator, coco: Path) -> None:
    train_and_be_killed(aws, coco, "killed", when="after", operation="CreateTrainingJob")
    name = job_of("killed")
    assert [entry.name for entry in Ledger.of(Aws()).pending()] == [name]
    assert set(listed()) == {"killed"}
    assert open_run("killed").wait().status == "finished"
    assert Ledger.of(Aws()).pending() == []


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
