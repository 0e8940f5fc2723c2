"""``detkit sagemaker``, typed as a user types it, against the simulated account."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.config import Config
from PIL import Image

from detkit import Dataset, Sample, write_dataset
from detkit.testing import tiny_dataset
from detkit_sagemaker.aws import Aws
from detkit_sagemaker.building import build_there
from detkit_sagemaker.cli import app
from detkit_sagemaker.container.build import plan
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.policies import Policies, apply
from detkit_sagemaker.testing import Faults, Simulator
from detkit_sagemaker.testing.faults import WORDS, DropConnection

if TYPE_CHECKING:
    from conftest import Trained
    from detkit.job import Model


@pytest.fixture
def simulator_images() -> dict[str, list[str]]:
    return {"echo:latest": [sys.executable, "-m", "detkit_sagemaker.container"]}


class Typed:
    """Types verbs of ``detkit sagemaker`` as `detkit.cli` does, and keeps what came."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._captured = capfd
        self.out = self.err = ""

    def __call__(self, *words: str) -> int:
        return self._type(app, "detkit sagemaker", words)

    def root(self, *words: str) -> int:
        """Type a verb of ``detkit`` itself."""
        from detkit.cli import app as detkit

        return self._type(detkit, "detkit", words)

    def _type(self, verbs: Any, name: str, words: tuple[str, ...]) -> int:
        from detkit.cli import messages
        from detkit.errors import DetkitError

        try:
            verbs(list(words), prog_name=name, standalone_mode=False)
            code = 0
        except DetkitError as error:
            code = messages.report(error, as_json="--json" in words)
        self.out, self.err = self._captured.readouterr()
        return code

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def typed(capfd: pytest.CaptureFixture[str]) -> Typed:
    return Typed(capfd)


def test_setup_prints_and_changes_nothing_or_applies(echo_account: Simulator, typed: Typed) -> None:
    assert typed("setup") == 2
    assert "--print" in typed.err
    assert typed("setup", "--print", "--bucket", "photos") == 0
    assert typed.json["bucket"] == "photos"
    assert "arn:aws:s3:::photos/*" in typed.out
    assert not [operation for operation, _ in echo_account.created if operation in {"CreateRole", "CreatePolicy"}]
    with pytest.raises(boto3.client("iam").exceptions.NoSuchEntityException):
        boto3.client("iam").get_role(RoleName="detkit-scheduler")
    assert typed("setup", "--apply", "--json") == 0
    assert typed.json["role"].endswith(":role/detkit-execution")
    assert len(typed.json["done"]) == 4
    assert boto3.client("iam").get_role(RoleName="detkit-scheduler")
    assert typed("setup", "--apply") == 0
    assert "--role detkit-execution" in typed.out


def test_transform_plans_then_predicts_and_is_known_to_evaluate(
    echo_account: Simulator, trained: Trained, aws_model: Model, typed: Typed, tmp_path: Path
) -> None:

    write_dataset(trained.data, tmp_path / "data", "coco")
    words = [str(aws_model.path), str(tmp_path / "data"), "--role", echo_account.role]
    assert typed("transform", *words, "--dry-run") == 0
    assert "CreateTransformJob" in typed.out
    assert "cost       at most" in typed.out
    assert typed("transform", *words) == 2
    assert "yes=True (--yes)" in typed.err
    assert typed("transform", *words, "--instance-tipe", "ml.c5.xlarge") == 2
    assert "did you mean 'instance_type'" in typed.err
    assert "CreateTransformJob" not in echo_account.calls
    assert typed("transform", *words, "--max-cost", "1", "--wait", "false") == 2
    assert "cannot be kept" in typed.err
    assert typed("transform", *words, "--yes", "--wait", "false", "--instance-type", "ml.c5.xlarge", "--json") == 0
    name = typed.json["job"]
    # Another machine has the images elsewhere; what counts is what is in them.
    (tmp_path / "data").rename(tmp_path / "moved")
    words[1] = str(tmp_path / "moved")
    write_dataset(trained.data.take([0]), tmp_path / "one", "coco")
    other = tmp_path / "other.jpg"
    Image.open(trained.data.paths[0]).rotate(90).save(other)
    others = Dataset.from_samples(trained.data.classes, [Sample(path=str(other), width=96, height=96)])
    write_dataset(others, tmp_path / "others", "coco")
    assert typed("transform", words[0], str(tmp_path / "others"), *words[2:], "--collect", name) == 2
    assert "looked at other images" in typed.err
    assert typed("transform", words[0], str(tmp_path / "one"), *words[2:], "--collect", name, "--json") == 0
    assert typed.json == {"images": 1, "looked_at": 1}
    assert typed("transform", *words, "--dry-run", "--json") == 0
    assert "7 images are predicted" in typed.out
    assert typed("transform", *words, "--collect", name, "--json") == 0
    assert typed.json == {"images": 8, "looked_at": 7}
    for more in ("--dry-run", "--wait=false"):
        assert typed("transform", *words, more) == 0
        assert "8, 8 of them were known" in typed.out
    [job] = [request for operation, request in echo_account.created if operation == "CreateTransformJob"]
    assert job["TransformResources"]["InstanceType"] == "ml.c5.xlarge"
    assert typed("transform", *words, "--yes") == 0
    assert "8, 8 of them were known" in typed.out
    assert echo_account.calls.count("CreateTransformJob") == 1


def test_a_deployment_is_planned_and_nothing_is_created(
    echo_account: Simulator, trained: Trained, typed: Typed
) -> None:
    words = ["deploy", str(trained.model.path), "--role", echo_account.role, "--image-uri"]
    before = echo_account.created
    assert typed.root(*words, echo_account.image("echo:latest"), "--ttl", "2h", "--dry-run") == 0, typed.err
    assert "CreateEndpoint " in typed.out
    assert "cost       at most 0.46 USD" in typed.out
    assert "time       at most 2 h" in typed.out
    assert typed.root(*words, echo_account.image("no:1"), "--ttl", "2h", "--dry-run", "--json") == 0
    assert [concern["level"] for concern in typed.json["concerns"]] == ["error"]
    assert echo_account.created == before


def test_an_image_is_planned_with_docker_or_built_with_codebuild(
    echo_account: Simulator, typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = tmp_path / "context"
    assert typed("build-image", "--with", "echo", "--docker", "--folder", str(context)) == 0
    assert (context / "Dockerfile").is_file()
    assert "docker push" in typed.out
    assert "nothing was built" in typed.out
    assert "is removed" not in typed.out
    assert typed("build-image", "--with", "echo", "--docker") == 0
    assert "that folder is removed now; keep one with --folder DIR" in typed.out
    assert typed("build-image", "--with", "ecko") == 2
    assert "did you mean 'echo'" in typed.err
    assert typed("build-image", "--with", "echo", "--source", str(tmp_path), "--yes") == 2
    assert "backend 'echo' takes no --source" in typed.err
    assert typed("setup", "--apply") == 0
    assert typed("build-image", "--with", "echo", "--codebuild", "--yes", "--json") == 0, typed.err
    uri = typed.json["image_uri"]
    assert re.fullmatch(r"123456789012\.dkr\.ecr\.us-east-1\.amazonaws\.com/detkit:echo-[0-9a-f]{12}", uri)
    assert boto3.client("ecr").describe_repositories(repositoryNames=["detkit"])["repositories"]
    assert boto3.client("codebuild").list_projects()["projects"] == ["detkit-build"]
    listed = boto3.client("s3").list_objects_v2(Bucket=echo_account.bucket, Prefix="detkit/images/")["Contents"]
    assert len(listed) == 1


def test_what_aws_refused_to_create_is_not_in_the_ledger(echo_account: Simulator, typed: Typed) -> None:
    echo_account.faults.refuse("CreateRole", "AccessDenied", "not authorized to perform iam:CreateRole", status=403)
    assert typed("setup", "--apply") == 3
    assert typed("ledger", "--json") == 0
    assert typed.json == []
    assert typed("setup", "--apply") == 0
    assert typed("ledger", "--json") == 0
    made = typed.json
    assert ("role", "detkit-execution") in [(one["kind"], one["name"]) for one in made]
    echo_account.faults.refuse("CreateRole", "AccessDenied", "not authorized to perform iam:CreateRole", status=403)
    assert typed("setup", "--apply") == 3
    assert typed("ledger", "--json") == 0
    assert {one["name"] for one in typed.json} == {one["name"] for one in made}, "it is there all the same"


def test_what_nobody_knows_to_be_created_stays_in_the_ledger(
    echo_account: Simulator, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detkit_sagemaker.aws._TRIES", 1)
    echo_account.faults.crash_after("CreateRole")
    assert typed("setup", "--apply") == 3
    assert typed("ledger", "--json") == 0
    assert [one["name"] for one in typed.json] == ["detkit-execution"]


def test_what_stays_in_an_account_is_written_down_before_it_is_made_and_kept(
    echo_account: Simulator, typed: Typed
) -> None:
    stays = {
        "CreateRole": ("role", "detkit-execution"),
        "CreatePolicy": ("policy", "detkit-user-us-east-1"),
        "CreateRepository": ("repository", "detkit"),
        "CreateBucket": ("bucket", echo_account.bucket),
        "CreateProject": ("project", "detkit-build"),
    }
    boto3.client("s3").delete_bucket(Bucket=echo_account.bucket)
    ledger, known = Ledger.of(Aws()), {}

    def look(operation: str) -> Callable[[], None]:
        return lambda: known.update({operation: [(one.kind, one.name) for one in ledger.pending()]})

    for operation in stays:
        echo_account.faults.crash_before(operation, look(operation))
    assert typed("ledger") == 0
    assert typed.out == "all that this machine began is known to be over or gone\n"
    for _ in range(2):  # what is there already is listed once
        assert typed("setup", "--apply") == 0
    assert typed("build-image", "--with", "echo", "--codebuild", "--yes") == 0, typed.err
    assert {operation: made in known[operation] for operation, made in stays.items()} == dict.fromkeys(stays, True)
    assert typed.root("endpoints", "rm", "--expired") == 0
    assert typed.out == "nothing was there to remove\n"
    assert typed.root("endpoints", "rm", "--all") == 0
    assert typed("ledger", "--json") == 0
    listed = [(one["kind"], one["name"]) for one in typed.json]
    roles = [("role", name) for name in ("detkit-execution", "detkit-scheduler", "detkit-build")]
    assert sorted(listed) == sorted({*stays.values(), *roles})
    assert typed("ledger") == 0
    assert echo_account.bucket in typed.out
    assert boto3.client("codebuild").list_projects()["projects"] == ["detkit-build"]
    assert boto3.client("ecr").describe_repositories(repositoryNames=["detkit"])["repositories"]
    for _, name in roles:
        assert boto3.client("iam").get_role(RoleName=name)
    boto3.client("s3").head_bucket(Bucket=echo_account.bucket)


SETUP, BUILD = ["setup", "--apply"], ["build-image", "--with", "echo", "--codebuild", "--yes"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ("CreateRole", SETUP),
        ("CreatePolicy", SETUP),
        ("CreateRepository", BUILD),
        ("CreateProject", BUILD),
        ("StartBuild", BUILD),
    ],
)
def test_killed_while_something_lasting_is_made(
    operation: str, words: list[str], when: str, echo_account: Simulator, typed: Typed
) -> None:
    """The ledger knows of it, nothing lives that costs, and the same command does the rest."""
    if words == BUILD:
        assert typed(*SETUP) == 0
    known = {one.kind for one in Ledger.of(Aws()).pending()}
    command = [sys.executable, "-m", "detkit.cli", "sagemaker", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:

        def kill() -> None:
            process.kill()
            if when == "before":
                raise DropConnection

        getattr(echo_account.faults, f"crash_{when}")(operation, kill)
        _, told = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, told.decode()
    kind = operation.removeprefix("Create").lower()
    assert kind in {one.kind for one in Ledger.of(Aws()).pending()} - known or operation == "StartBuild"
    assert echo_account.live() == []
    assert typed(*words) == 0, typed.err


def test_a_build_is_not_begun_twice_where_an_answer_gets_lost(echo_account: Simulator, tmp_path: Path) -> None:
    """The second call has the token of the first one, by which CodeBuild knows that it is the same build."""
    aws, tokens = Aws(), list[str]()
    apply(aws, Policies.of(aws))
    image = plan(tmp_path / "context", ["echo"], region=aws.region, account=aws.account)
    echo_account.faults.crash_after("StartBuild")

    def note(request: Any, **_: Any) -> None:
        tokens.append(json.loads(request.body)["idempotencyToken"])

    aws.client("codebuild").meta.events.register("before-send.codebuild.StartBuild", note)
    for _ in range(2):
        build_there(aws, image, f"s3://{aws.bucket}/detkit", lambda _: None)
    first, again, other = tokens
    assert first == again != other


def test_docker_is_run_as_it_is_said(
    echo_account: Simulator, typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program called docker that writes down what it is told; the real one is not everywhere."""
    docker, seen = tmp_path / "bin" / "docker", tmp_path / "seen"
    docker.parent.mkdir()
    docker.write_text(
        f'#!/bin/sh\necho "$@" >> {seen}\n[ "$1" = login ] && cat >> {seen} && echo >> {seen}\n[ "$1" != "$FAILING" ]\n'
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}{os.pathsep}{os.environ['PATH']}")
    assert typed("build-image", "--with", "echo", "--yes") == 0
    words = [line.split()[0] for line in seen.read_text().splitlines()]
    assert words[:4] == ["info", "buildx", "build", "login"]
    assert words[-1] == "push"
    assert "--password-stdin" in seen.read_text()
    monkeypatch.setenv("FAILING", "push")
    assert typed("build-image", "--with", "echo", "--yes") == 3
    assert "docker push" in typed.err
    assert "exit code 1" in typed.err
    monkeypatch.setenv("FAILING", "buildx")
    assert typed("build-image", "--with", "echo", "--yes") == 2
    assert "Docker is here without buildx" in typed.err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert typed("build-image", "--with", "echo", "--docker", "--yes") == 2
    assert "there is no command docker here" in typed.err
    assert "--codebuild" in typed.err


@contextlib.contextmanager
def local(folder: Path, *words: str) -> Iterator[dict[str, str]]:
    """Yield the variables that ``detkit sagemaker local`` prints, and end it with Ctrl-C."""
    command = [sys.executable, "-m", "detkit.cli", "sagemaker", "local", "--port", "0", "--folder", "aws", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        assert process.stdout is not None
        exported: dict[str, str] = {}
        for line in process.stdout:
            if line.startswith("# role"):
                break
            name, _, value = line.removeprefix("export ").strip().partition("=")
            exported[name] = value.strip("'")
        try:
            yield exported
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


def client_there(exported: Mapping[str, str], service: str) -> Any:
    """Return a client of an account, which tries nothing twice; boto3's default session is left to others."""
    return boto3.session.Session().client(
        service,
        endpoint_url=exported["AWS_ENDPOINT_URL"],
        region_name=exported["AWS_REGION"],
        aws_access_key_id=exported["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=exported["AWS_SECRET_ACCESS_KEY"],
        config=Config(retries={"total_max_attempts": 1}),
    )


def test_local_serves_an_account_until_ctrl_c(tmp_path: Path) -> None:
    with local(tmp_path) as exported:
        repositories = client_there(exported, "ecr").describe_repositories()["repositories"]
        assert [one["repositoryName"] for one in repositories] == ["detkit"]


def test_local_lets_go_wrong_what_is_asked_for(tmp_path: Path) -> None:
    """A client of boto3's is refused and throttled, and a training that detkit starts there finds no machine."""
    refused = "refuse=ListModels:ResourceLimitExceeded"
    with local(tmp_path, "--fault", "throttle=3", "--fault", refused) as exported:
        client = client_there(exported, "sagemaker")
        with pytest.raises(client.exceptions.ClientError, match="ResourceLimitExceeded"):
            client.list_models()
        for _ in range(2):
            client.list_models()
        with pytest.raises(client.exceptions.ClientError, match="ThrottlingException"):
            client.list_models()
    write_dataset(tiny_dataset(tmp_path / "data"), tmp_path / "coco")
    with local(tmp_path, "--fault", "capacity") as exported:
        image = "123456789012.dkr.ecr.us-east-1.amazonaws.com/detkit:latest"
        words = ["coco", "--backend", "sagemaker", "--model", "echo/memory", "--yes", "epochs=1"]
        words += ["--role", "detkit-simulator", "--image-uri", image]
        places = {f"DETKIT_{name}": str(tmp_path / name) for name in ("RUNS", "CACHE", "LEDGER")}
        done = subprocess.run(
            [sys.executable, "-m", "detkit.cli", "train", *words],
            env={**os.environ, **exported, **places},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 3, done.stderr
    assert "CapacityError" in done.stderr


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("trottle=3", "no fault 'trottle'; did you mean 'throttle'?"),
        ("throttle=0", "expected throttle or throttle=3"),
        ("refuse=CreateEndpoint", "expected refuse=CreateEndpoint:ResourceLimitExceeded"),
        (
            "refuse=CreateEndpont:ResourceLimitExceeded",
            "no operation of AWS 'CreateEndpont'; did you mean 'CreateEndpoi",
        ),
        ("quota=3", "expected quota=ml.g4dn.xlarge for training job usage:0"),
        ("slow=soon", "expected slow=0.5"),
        ("expire-tokens=1", "expected expire-tokens"),
    ],
)
def test_a_fault_that_nobody_knows_is_refused(fault: str, told: str, typed: Typed) -> None:
    assert typed("local", "--port", "0", "--fault", fault) == 2
    assert told in typed.err


TYPED: Mapping[str, Callable[[Faults], None]] = {
    "throttle": lambda faults: faults.throttle(),
    "throttle=3": lambda faults: faults.throttle(every=3),
    "refuse=CreateEndpoint:ResourceLimitExceeded": lambda f: f.refuse("CreateEndpoint", "ResourceLimitExceeded"),
    "expire-tokens": lambda faults: faults.expire_tokens(),
    "capacity": lambda faults: faults.capacity(),
    "capacity=3": lambda faults: faults.capacity(3),
    "slow=0.5": lambda faults: faults.slow(0.5),
    "late-objectives=5": lambda faults: faults.late_objectives(5),
    "interrupt-spot": lambda faults: faults.interrupt_spot(),
    "interrupt-spot=JOB": lambda faults: faults.interrupt_spot("JOB"),
    "fail-upload": lambda faults: faults.fail_upload(),
    "fail-upload=3": lambda faults: faults.fail_upload(3),
    "quota=ml.g4dn.xlarge for training job usage:0": lambda f: f.quota("ml.g4dn.xlarge for training job usage", 0),
}


def test_a_fault_that_is_typed_is_that_of_python(typed: Typed) -> None:
    for text, begin in TYPED.items():
        by_word, by_method = Faults(), Faults()
        by_word.cause(text)
        begin(by_method)
        states = [{name: value for name, value in vars(one).items() if name != "_lock"} for one in (by_word, by_method)]
        assert states[0] == states[1], text
    assert [text for example, _, _ in WORDS.values() for text in example.split(" or ")] == list(TYPED)
    assert typed("local", "--help") == 0
    assert [word for word in WORDS if word not in typed.out] == []


def test_nothing_of_aws_s_is_imported_by_the_commands() -> None:
    script = (
        "import sys, detkit_sagemaker, detkit_sagemaker.cli; print([m for m in ('boto3', 'moto') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
