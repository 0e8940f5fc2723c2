"""Endpoints in the simulated account: they answer, they end, and nothing is left of them, whatever happens."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import msgspec
import numpy as np
import pytest

import detkit
from detkit.backends import PredictOptions
from detkit.errors import DetkitWarning, MissingSettings, Unsupported, UsageError
from detkit.images import read_image
from detkit.job import Model
from detkit_sagemaker import deployment, endpoints, resources
from detkit_sagemaker.aws import Aws, AwsError, CredentialsExpired, QuotaExceeded
from detkit_sagemaker.deployment import DeploymentFailed, ScheduleRefused, deploy, plan_deployment
from detkit_sagemaker.endpoints import find_endpoint, list_endpoints, remove
from detkit_sagemaker.hosting import container_of, pack
from detkit_sagemaker.invoking import EndpointDetector, ImageRefused
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.options import DeployOptions
from detkit_sagemaker.requests import check_request
from detkit_sagemaker.testing import Simulator
from detkit_sagemaker.testing.faults import DropConnection

if TYPE_CHECKING:
    from conftest import Trained

STEPS = [*["CreateSchedule"] * 3, "CreateModel", "CreateEndpointConfig", "CreateEndpoint"]
"""The calls that a deployment creates something with."""

ALL = PredictOptions(score_threshold=0.1)
OPENED: dict[str, Aws] = {}
CPU: dict[str, Any] = {"image_uri": None, "instance_type": "ml.m5.xlarge"}


@pytest.fixture
def simulator_images() -> dict[str, list[str]]:
    return {
        "echo:latest": [sys.executable, "-m", "detkit_sagemaker.container"],
        "broken:latest": [sys.executable, "-c", "import sys; sys.exit('the weights are missing')"],
    }


@pytest.fixture
def account(echo_account: Simulator) -> Simulator:
    return echo_account


def options(account: Simulator, **more: Any) -> DeployOptions:
    given = {"role": account.role, "image_uri": account.image("echo:latest"), "ttl": 3600, "yes": True, **more}
    return DeployOptions(**given)


def account_of() -> Aws:
    """Return the simulated account, opened once: reading AWS's service models takes longer than most tests."""
    url = os.environ["AWS_ENDPOINT_URL"]
    if url not in OPENED:
        OPENED[url] = Aws()
    return OPENED[url]


def is_clean(account: Simulator) -> bool:
    return account.live() == [] and Ledger.of(account_of()).pending() == []


def wait_until(true: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.1)


def test_an_endpoint_answers_as_the_model_does_here_and_is_gone_after_the_block(
    account: Simulator, trained: Trained, tmp_path: Path
) -> None:
    told: list[str] = []
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(trained.data.paths[0]).read_bytes()[:-200])
    with deploy(trained.model, options(account), account_of(), tell=told.append) as endpoint:
        assert endpoint.status == "InService"
        assert endpoint.expires == pytest.approx(time.time() + 3600, abs=60)
        assert endpoint.price_per_hour is not None
        assert [operation for operation, _ in account.created][-6:] == STEPS
        pictures = [read_image(path) for path in trained.data.paths]
        with endpoint.open(ALL) as detector:
            form = detector._answers
            there, files = detector.detect(pictures), list(detector.predict(trained.data.paths))
        with trained_here(trained) as local:
            here = local.detect(pictures)
        for one, other, file in zip(there, here, files, strict=True):
            assert one.names == other.names == file.names
            assert np.allclose(one.boxes, other.boxes)
            assert np.allclose(one.scores, other.scores)
        assert [file.path for file in files] == list(trained.data.paths)
        [listed] = list_endpoints(account_of())
        assert (listed.name, listed.expires) == (endpoint.name, float(int(endpoint.expires or 0)))
        with find_endpoint(account_of(), endpoint.name).open(
            PredictOptions(score_threshold=0.1, max_detections=1)
        ) as again:
            assert max(len(found) for found in again.detect(pictures)) == 1
            with pytest.raises(ImageRefused, match=r"broken\.jpg"):
                list(again.predict([broken]))
    endpoint.delete()  # a second time is no error
    with (
        pytest.raises(AwsError, match="was endpoint .* deleted"),
        EndpointDetector(account_of(), endpoint.name, form) as gone,
    ):
        gone.detect(pictures)
    wait_until(lambda: is_clean(account))
    assert endpoint.status == "Deleted"
    assert any("InService" in line for line in told)


class trained_here:
    """The same model, opened in this process with the endpoint's floor."""

    def __init__(self, trained: Trained) -> None:
        from detkit import plugins

        self.detector = plugins.backend("echo").open(trained.model, ALL)

    def __enter__(self) -> Any:
        return self.detector

    def __exit__(self, *_error: object) -> None:
        self.detector.close()


def test_a_plan_creates_nothing_and_says_what_it_may_cost(account: Simulator, trained: Trained) -> None:
    before = account.created
    plan = plan_deployment(trained.model, options(account), account_of())
    assert account.created == before
    assert [operation for operation, _ in plan.requests] == STEPS
    for operation, request in plan.requests:
        service = "scheduler" if operation == "CreateSchedule" else "sagemaker"
        assert check_request(operation, request, service) == []
    assert plan.worst_case_cost == plan.price_per_hour
    assert plan.uploads is not None and plan.uploads["bytes"] > 0


def test_nothing_that_costs_is_deployed_without_a_word(account: Simulator, trained: Trained) -> None:
    before = account.created
    with pytest.raises(UsageError, match=r"costs money(.|\n)*max_cost=0.2\d"):
        deploy(trained.model, options(account, yes=False), account_of())
    with pytest.raises(UsageError, match="more than max_cost=0.1"):
        deploy(trained.model, options(account, yes=False, max_cost=0.1), account_of())
    with pytest.raises(UsageError, match="nobody knows what this costs at most"):
        deploy(trained.model, options(account, yes=False, max_cost=10, ttl=None, keep=True), account_of())
    assert account.created == before


def test_everything_that_is_missing_is_said_at_once(
    account: Simulator, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MissingSettings, match=r"3 setting\(s\) missing(.|\n)*role(.|\n)*ttl(.|\n)*image_uri"):
        deploy(trained.model, DeployOptions(yes=True))
    with pytest.raises(UsageError, match="contradict"):
        deploy(trained.model, options(account, keep=True), account_of())


def test_where_no_schedule_may_be_created_nothing_is_deployed(account: Simulator, trained: Trained) -> None:
    account.faults.refuse(
        "CreateSchedule", "AccessDeniedException", "not authorized to perform scheduler:CreateSchedule"
    )
    with pytest.raises(ScheduleRefused) as raised:
        deploy(trained.model, options(account), account_of())
    assert "scheduler:CreateSchedule" in str(raised.value)
    assert "sagemaker:DeleteEndpoint" in str(raised.value)
    assert "keep=True" in str(raised.value)
    assert is_clean(account)
    with pytest.raises(ScheduleRefused, match="nobody"):
        deploy(trained.model, options(account), account_of(), scheduler_role="nobody")
    assert is_clean(account)
    assert "CreateEndpoint" not in account.calls


@pytest.mark.parametrize("why", ["InternalServerException", "lost network"])
def test_a_schedule_that_fails_for_a_while_is_no_missing_permission(
    account: Simulator, trained: Trained, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr("detkit_sagemaker.aws._TRIES", 1)
    if why == "lost network":
        account.faults.crash_after("CreateSchedule")
    else:
        account.faults.refuse("CreateSchedule", why, "Unexpected error occurred", status=500)
    with pytest.raises(DeploymentFailed) as raised:
        deploy(trained.model, options(account), Aws())
    told = {"InternalServerException": "Unexpected error occurred", "lost network": "AWS could not be reached"}
    assert told[why] in str(raised.value)
    assert str(raised.value).endswith("everything was removed again; try again later")
    assert "keep=True" not in str(raised.value) and "permission" not in str(raised.value)
    assert is_clean(account)


def test_a_container_that_does_not_start_is_told_with_its_last_lines(account: Simulator, trained: Trained) -> None:
    with pytest.raises(DeploymentFailed) as raised:
        deploy(trained.model, options(account, image_uri=account.image("broken:latest")), account_of())
    assert "the weights are missing" in str(raised.value)
    assert "ping health check" in str(raised.value)
    assert "everything was removed again" in str(raised.value)
    wait_until(lambda: is_clean(account))


@pytest.mark.parametrize("operation", ["CreateModel", "CreateEndpointConfig", "CreateEndpoint"])
def test_a_refused_call_leaves_nothing(account: Simulator, trained: Trained, operation: str) -> None:
    account.faults.refuse(operation, "ResourceLimitExceeded", "the account-level service limit is 0 instances")
    with pytest.raises(DeploymentFailed, match="service limit is 0") as raised:
        deploy(trained.model, options(account), account_of())
    assert isinstance(raised.value.__cause__, QuotaExceeded)
    assert is_clean(account)


def test_throttling_is_waited_out(account: Simulator, trained: Trained) -> None:
    account.faults.throttle(every=8)
    with deploy(trained.model, options(account), account_of()) as endpoint, endpoint.open(ALL) as detector:
        assert len(list(detector.predict(trained.data.paths))) == len(trained.data)
    account.faults.throttle(every=0)
    wait_until(lambda: is_clean(account))


def test_what_is_over_before_it_began_is_not_created(account: Simulator, trained: Trained) -> None:
    account.faults.crash_after("PutObject", lambda: time.sleep(1.2))
    with pytest.raises(DeploymentFailed, match="over when its model was uploaded, and nothing was created; try again"):
        deploy(trained.model, options(account, ttl=1), account_of())
    assert not set(account.calls) & set(STEPS)
    assert is_clean(account)


def test_what_is_over_as_the_last_step_comes_is_removed_again(
    account: Simulator, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_time_pass_after(account, monkeypatch, "CreateEndpointConfig")
    with pytest.raises(DeploymentFailed, match="over before it was created; give it more ttl. everything was removed"):
        deploy(trained.model, options(account), account_of())
    assert "CreateEndpoint" not in account.calls
    assert is_clean(account)


def test_an_endpoint_that_is_there_too_late_is_not_returned(
    account: Simulator, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_service() -> bool:
        found = boto3.client("sagemaker").list_endpoints()["Endpoints"]
        return [one["EndpointStatus"] for one in found] == ["InService"]

    account.faults.crash_after("CreateEndpoint", lambda: wait_until(in_service))
    let_time_pass_after(account, monkeypatch, "DescribeEndpoint")
    with pytest.raises(DeploymentFailed, match="is InService, and its time is over; give it more ttl"):
        deploy(trained.model, options(account), account_of())
    wait_until(lambda: is_clean(account))


def let_time_pass_after(account: Simulator, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    """Let the time of whatever is deployed be over as soon as an operation was done."""
    account.faults.crash_after(operation, lambda: monkeypatch.setattr(deployment._Deployment, "_is_over", True))


@pytest.mark.parametrize("when", ["before", "after"])
def test_answers_that_get_lost_are_asked_for_again(account: Simulator, trained: Trained, when: str) -> None:
    for operation in set(STEPS):
        getattr(account.faults, f"crash_{when}")(operation)
    before = len(account.created)
    with deploy(trained.model, options(account), account_of()) as endpoint:
        assert endpoint.status == "InService"
        assert [operation for operation, _ in account.created[before:]] == STEPS, "none is there twice"
    wait_until(lambda: is_clean(account))


def test_credentials_that_expire_while_it_is_created_say_what_is_left(account: Simulator, trained: Trained) -> None:
    account.faults.slow(0.5)
    account.faults.crash_after("CreateEndpoint", account.faults.expire_tokens)
    with pytest.raises(CredentialsExpired, match=r"detkit endpoints rm detkit-memory-(.|\n)*AWS deletes it at"):
        deploy(trained.model, options(account), account_of())
    account.faults.clear()
    wait_until(lambda: [one.status for one in list_endpoints(account_of())] == ["InService"])
    assert len(remove(account_of())) == 1
    wait_until(lambda: is_clean(account))


def test_ctrl_c_removes_what_is_just_created(
    account: Simulator, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    account.faults.slow(1.0)
    told: list[str] = []

    def interrupt(line: str) -> None:
        told.append(line)
        if "Creating" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deploy(trained.model, options(account), account_of(), tell=interrupt)
    assert any("as soon as AWS allows it" in line for line in told)
    account.faults.clear()
    wait_until(lambda: is_clean(account))


def test_a_serverless_endpoint_has_no_price_by_the_hour(account: Simulator, trained: Trained) -> None:
    with deploy(trained.model, options(account, serverless=True), account_of()) as endpoint:
        assert endpoint.price_per_hour is None
        with endpoint.open(ALL) as detector:
            noise = np.random.default_rng(0).integers(0, 255, (1500, 1500, 3), dtype=np.uint8)
            with pytest.raises(UsageError, match="takes 4 MB; batch transform takes 100 MB"):
                detector.detect([noise])
        with pytest.raises(Unsupported, match="nms_threshold"):
            endpoint.open(PredictOptions(nms_threshold=0.5))
    wait_until(lambda: is_clean(account))


def test_aws_s_own_model_answers_with_our_classes(account: Simulator, trained: Trained, aws_model: Model) -> None:
    pictures = [read_image(path) for path in trained.data.paths]
    with deploy(aws_model, options(account), account_of()) as endpoint:  # our image is for our models
        with find_endpoint(account_of(), endpoint.name).open(ALL) as detector:
            there = detector.detect(pictures)
        with trained_here(trained) as local:
            here = local.detect(pictures)
        for one, other in zip(there, here, strict=True):
            assert one.names == other.names
            assert np.allclose(one.boxes, other.boxes, atol=1e-6)
    wait_until(lambda: is_clean(account))


def test_a_model_takes_its_own_code_along(account: Simulator, trained: Trained, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "my_loss.py").write_text("print('my_loss is here', flush=True)\n")
    train, val = trained.data.split(0.75, 0.25, seed=0)
    trainer = detkit.Trainer(model="echo/memory", epochs=1, code=str(code), imports="my_loss")
    run = trainer.fit(train, val, name=str(tmp_path / "run"), quiet=True)
    with deploy(run.model, options(account), account_of()) as endpoint, endpoint.open(ALL) as detector:
        assert len(list(detector.predict(trained.data.paths))) == len(trained.data)
        group = f"/aws/sagemaker/Endpoints/{endpoint.name}"
        assert "my_loss is here" in resources.last_lines(account_of(), group, "all/")
    wait_until(lambda: is_clean(account))


def test_in_another_region_aws_s_model_gets_the_image_of_that_region(account: Simulator, aws_model: Model) -> None:
    there = container_of(aws_model, Aws("eu-west-1"), "s3://bucket/detkit", **CPU)
    assert there.image == "685385470294.dkr.ecr.eu-west-1.amazonaws.com/object-detection:1"
    assert list(there.to_upload) == ["model.tar.gz"]
    place = json.loads((aws_model.path / "aws.json").read_bytes())
    (aws_model.path / "aws.json").write_text(json.dumps({**place, "kind": "jumpstart"}))
    with pytest.raises(UsageError, match="trained in us-east-1"):
        container_of(aws_model, Aws("eu-west-1"), "s3://bucket/detkit", **CPU)


def test_jumpstart_s_image_is_that_of_the_machine_that_answers(account: Simulator, aws_model: Model) -> None:
    place = json.loads((aws_model.path / "aws.json").read_bytes())
    (aws_model.path / "aws.json").write_text(json.dumps({**place, "kind": "jumpstart", "image": "of-the-default"}))
    manifest = json.loads((aws_model.path / "detkit.json").read_bytes())
    model = "jumpstart/mxnet-od-ssd-512-resnet50-v1-coco"
    (aws_model.path / "detkit.json").write_text(json.dumps({**manifest, "model": model}))
    given: dict[str, Any] = {"image_uri": None}
    for instance_type, tag in (("ml.c5.2xlarge", "cpu"), ("ml.m5.xlarge", "cpu"), ("ml.g4dn.xlarge", "gpu")):
        there = container_of(Model(aws_model.path), Aws(), "s3://b/d", instance_type=instance_type, **given)
        assert there.image.endswith(f"/mxnet-inference:1.9.0-{tag}-py38")
        assert there.environment["SAGEMAKER_REGION"] == "us-east-1"
        assert there.concerns == ()
    odd = container_of(Model(aws_model.path), Aws(), "s3://b/d", instance_type="ml.inf2.xlarge", **given)
    assert "it may not run there" in odd.concerns[0].message


def test_what_aws_would_reject_is_found_before_anything_is_created(
    account: Simulator, trained: Trained, aws_model: Model
) -> None:
    before = account.created
    account.faults.quota("ml.m5.xlarge for endpoint usage", 0)
    with pytest.raises(UsageError, match=r"would reject this(.|\n)*is 0, and 1 are needed(.|\n)*no image .*nothing:1"):
        deploy(trained.model, options(account, image_uri=account.image("nothing:1")), account_of())
    account.faults.clear()
    plan = plan_deployment(trained.model, options(account, role="nobody", serverless=True), account_of())
    assert "there is no role nobody" in str(plan.errors)
    plan = plan_deployment(trained.model, options(account, subnets=("x y",), security_groups=("sg-1",)), account_of())
    assert any("CreateModel: " in concern.message for concern in plan.errors)
    plan = plan_deployment(aws_model, options(account, instance_type="ml.inf2.xlarge"), account_of())
    assert any("may not run there" in concern.message for concern in plan.concerns)
    assert account.created == before


@pytest.mark.parametrize(
    ("arn", "owner"),
    [
        ("arn:aws:iam::1:user/zoe", "zoe"),
        ("arn:aws:sts::1:assumed-role/Admins/zoe@example.com", "zoe@example.com"),
        ("arn:aws:sts::1:assumed-role/Admins/botocore-session-1763740000", "Admins"),
        ("arn:aws:sts::1:assumed-role/Admins/AWSCLI-Session", "AWSCLI-Session"),
    ],
)
def test_who_deploys_is_the_same_one_an_hour_later(arn: str, owner: str) -> None:
    aws = Aws("us-east-1")
    aws.__dict__["identity"] = {"Account": "1", "Arn": arn, "UserId": "x"}
    assert resources.owner(aws) == owner


def test_the_same_files_make_the_same_archive(trained: Trained, tmp_path: Path) -> None:
    files = {path.name: path for path in trained.model.path.iterdir()}
    first = pack(files, tmp_path / "a.tar.gz").read_bytes()
    for path in files.values():
        os.utime(path)
    assert pack(dict(reversed(files.items())), tmp_path / "b.tar.gz").read_bytes() == first


def test_only_what_is_detkit_s_and_one_s_own_or_over_is_listed_and_removed(
    account: Simulator, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = boto3.client("sagemaker")
    endpoint = deploy(trained.model, options(account, ttl=None, keep=True), account_of())
    assert account.live("schedule") == []
    client.create_endpoint_config(
        EndpointConfigName="theirs",
        ProductionVariants=[
            {"VariantName": "a", "ModelName": endpoint.name, "InstanceType": "ml.m5.large", "InitialInstanceCount": 1}
        ],
    )
    client.create_endpoint(EndpointName="detkit-theirs", EndpointConfigName="theirs")
    client.create_model(
        ModelName="detkit-left-0000",
        PrimaryContainer={"Image": account.image("echo:latest")},
        ExecutionRoleArn=account.role,
        Tags=[{"Key": "detkit:owner", "Value": "somebody-else"}],
    )
    monkeypatch.setenv("DETKIT_LEDGER", str(tmp_path / "another-machine.jsonl"))
    [listed] = list_endpoints(account_of())
    assert (listed.name, listed.expires, endpoint.expires) == (endpoint.name, None, None)
    with pytest.raises(UsageError, match="not deployed by detkit"):
        remove(account_of(), ["detkit-theirs"])
    with pytest.raises(UsageError, match="no name of detkit's"):
        remove(account_of(), ["theirs"])
    assert remove(account_of(), ["detkit-gone"]) == []
    assert remove(account_of(), expired=True) == []  # neither is over
    client.add_tags(ResourceArn=endpoint.arn, Tags=[{"Key": "detkit:owner", "Value": "somebody-else"}])
    with pytest.warns(DetkitWarning, match=f"{endpoint.name} .somebody-else."):
        assert remove(account_of()) == []
    client.add_tags(ResourceArn=endpoint.arn, Tags=[{"Key": "detkit:expires", "Value": "2020-01-01T00:00:00Z"}])
    assert remove(account_of(), expired=True) == [endpoint.name]
    assert account.live("model") == ["detkit-left-0000"]  # it may be under way
    monkeypatch.setattr(endpoints, "_SETTLED_S", 0.0)
    assert remove(account_of(), expired=True) == ["detkit-left-0000"]
    wait_until(lambda: account.live() == ["detkit-theirs", "theirs"])


@pytest.fixture(scope="module")
def launcher() -> Iterator[subprocess.Popen[str]]:
    """A process that has everything imported, and deploys in a child of its own for each line that it is given."""
    script = """
        import json, os, sys
        from detkit.job import Model
        from detkit_sagemaker import deployment, endpoints
        from detkit_sagemaker.options import DeployOptions
        import boto3
        for line in sys.stdin:
            asked = json.loads(line)
            child = os.fork()
            if child == 0:
                os.environ.update(asked["environment"])
                deployment.deploy(Model(asked["model"]), DeployOptions(**asked["options"]), tell=lambda line: None)
                os.kill(os.getpid(), 9)
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
    lines = "\n".join(line.removeprefix("        ") for line in script.splitlines())
    with subprocess.Popen(
        [sys.executable, "-c", lines], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def launch(launcher: subprocess.Popen[str], account: Simulator, trained: Trained, **more: Any) -> int:
    """Begin to deploy in a child, and return its number."""
    assert launcher.stdin is not None and launcher.stdout is not None
    given = msgspec.to_builtins(options(account, **more))
    ours = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "DETKIT_"))}
    print(
        json.dumps({"environment": ours, "model": str(trained.model.path), "options": given}),
        file=launcher.stdin,
        flush=True,
    )
    return int(launcher.stdout.readline())


def outcome(launcher: subprocess.Popen[str]) -> int:
    assert launcher.stdout is not None
    return int(launcher.stdout.readline())


def clean_up(account: Simulator) -> None:
    """What `detkit endpoints rm --expired` does, or `--all` where there is an endpoint; again while AWS makes that."""
    expired = not account.live("endpoint")

    def is_done() -> bool:
        try:
            remove(account_of(), expired=expired)
        except AwsError as error:
            assert resources.is_busy(error)
            return False
        return is_clean(account)

    wait_until(is_done)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(len(STEPS)), ids=lambda step: f"{step}-{STEPS[step]}")
def test_a_process_killed_at_a_create_call_leaves_nothing_that_clean_up_does_not_find(
    account: Simulator, trained: Trained, launcher: subprocess.Popen[str], step: int, when: str
) -> None:
    child: queue.Queue[int] = queue.Queue()
    crash, left = getattr(account.faults, f"crash_{when}"), [1 + STEPS[:step].count(STEPS[step])]

    def kill() -> None:
        left[0] -= 1
        if left[0]:
            crash(STEPS[step], kill)
            return
        os.kill(child.get(timeout=30), signal.SIGKILL)
        if when == "before":
            raise DropConnection

    crash(STEPS[step], kill)
    child.put(launch(launcher, account, trained))
    assert outcome(launcher) == -signal.SIGKILL
    assert [call for call in account.calls if call in STEPS] == STEPS[: step + 1]
    assert len(account.live()) == (step if when == "before" else step + 1)
    begun = [entry.kind for entry in Ledger.of(account_of()).pending()]
    assert len(begun) == step + 1, "it was not written down before"
    clean_up(account)


@pytest.mark.parametrize("operation", ["DeleteEndpoint", "DeleteModel", "DeleteSchedule"])
@pytest.mark.parametrize("finished_by", ["aws", "typing it again"])
def test_a_clean_up_that_is_killed_is_finished(
    account: Simulator, trained: Trained, operation: str, finished_by: str
) -> None:
    endpoint = deploy(trained.model, options(account), account_of())
    script = f"from detkit_sagemaker import aws, endpoints; endpoints.remove(aws.Aws(), [{endpoint.name!r}])"
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        account.faults.crash_after(operation, process.kill)
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert account.live()
    if finished_by == "aws":
        account.elapse(48 * 3600)  # for a day, the scheduler tries to delete what is gone already
        wait_until(lambda: account.live() == [])
    assert remove(account_of(), [endpoint.name]) == ([] if finished_by == "aws" else [endpoint.name])
    wait_until(lambda: is_clean(account))


def test_it_answers_until_its_time_is_over_and_then_goes_with_all_that_is_its(
    account: Simulator, trained: Trained
) -> None:
    endpoint, paths = deploy(trained.model, options(account), account_of()), list(trained.data.paths)
    end, passed = endpoint.expires, list[float]()
    assert end is not None

    def pass_until(t: float) -> None:
        """Let the scheduler's clock show a time, and wait until it has done all that is due: this schedule last."""
        target: dict[str, Any] = {
            "Arn": "arn:aws:scheduler:::aws-sdk:sagemaker:deleteModel",
            "RoleArn": account.role,
            "RetryPolicy": {"MaximumRetryAttempts": 0},
        }
        name = f"last-{len(passed)}"
        boto3.client("scheduler").create_schedule(
            Name=name,
            ScheduleExpression=f"at({resources.iso(t).removesuffix('Z')})",
            FlexibleTimeWindow={"Mode": "OFF"},
            ActionAfterCompletion="DELETE",
            Target={**target, "Input": json.dumps({"ModelName": "nothing"})},
        )
        passed.append(t - time.time() - sum(passed))
        account.elapse(passed[-1])
        wait_until(lambda: name not in account.live("schedule"))

    with endpoint.open(ALL) as detector:
        pass_until(end - 60)
        assert len(list(detector.predict(paths))) == len(paths)
        assert endpoint.status == "InService"
        assert len(account.live()) == len(STEPS)
        pass_until(end)
        wait_until(lambda: endpoint.status == "Deleted")
        with pytest.raises(AwsError, match=f"was endpoint {endpoint.name} deleted, or has its time run out"):
            list(detector.predict(paths))
    pass_until(end + deployment._LATER_S)
    wait_until(lambda: account.live() == [])


def test_aws_deletes_it_when_its_time_is_over_and_nobody_lives(
    account: Simulator, trained: Trained, launcher: subprocess.Popen[str]
) -> None:
    launch(launcher, account, trained)
    assert outcome(launcher) == -signal.SIGKILL  # it kills itself when the endpoint answers
    assert len(account.live("endpoint")) == 1
    assert len(account.live("schedule")) == 3
    account.elapse(24 * 3600)
    wait_until(lambda: account.live() == [])
    assert remove(account_of(), expired=True) == []
    assert is_clean(account)


def test_aws_deletes_what_is_only_just_created_when_its_time_is_over_and_nobody_lives(
    account: Simulator, trained: Trained, launcher: subprocess.Popen[str]
) -> None:
    """The first call is refused, as an endpoint cannot be deleted while it is created; the scheduler tries again."""
    account.faults.slow(2.0)
    child: queue.Queue[int] = queue.Queue()
    account.faults.crash_after("CreateEndpoint", lambda: os.kill(child.get(timeout=30), signal.SIGKILL))
    child.put(launch(launcher, account, trained))
    assert outcome(launcher) == -signal.SIGKILL
    account.elapse(3600 + deployment._LATER_S)
    wait_until(lambda: account.live("model") == [])
    assert [one.status for one in list_endpoints(account_of())] == ["Creating"]
    wait_until(lambda: account.live() == [])
    assert remove(account_of(), expired=True) == []
    assert is_clean(account)
