"""The folder that our image is built in, and the requests that have it built.

Docker itself runs only where it is asked for: with ``pytest -m slow``, ``DETKIT_TEST_IMAGE_BASE`` in the environment, a
base such as ``python:3.11-slim-bookworm``, and a Docker with buildx that can get it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

import detkit
import detkit_sagemaker
from detkit.backends import PredictOptions
from detkit.errors import RunFailed, UnknownName, UsageError
from detkit.images import read_image
from detkit.processes import for_speed
from detkit.testing import tiny_dataset
from detkit_sagemaker import building
from detkit_sagemaker.container.build import BuildPlan, plan
from detkit_sagemaker.testing import Simulator

BASE = "DETKIT_TEST_IMAGE_BASE"
SOURCE = Path(detkit_sagemaker.__file__).parents[1]
AT = {"region": "eu-west-1", "account": "123456789012"}


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """This plugin's metadata, as an editable installation leaves it, where nobody installed it."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "detkit_sagemaker-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: detkit-sagemaker\nVersion: 0.1.0\nRequires-Dist: boto3\n"
    )
    (info / "entry_points.txt").write_text("[detkit]\nsagemaker = detkit_sagemaker\n")
    (info / "direct_url.json").write_text(json.dumps({"url": SOURCE.as_uri(), "dir_info": {"editable": True}}))
    (info / "RECORD").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, installed: None) -> BuildPlan:
    return plan(tmp_path_factory.mktemp("build") / "context", ["echo"], **AT)


def installed_wheels(built: BuildPlan, site: Path) -> Path:
    """Install the wheels of a context, and nothing that they require."""
    wheels = sorted(map(str, (built.context / "wheels").iterdir()))
    quiet = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, "--target", str(site), *wheels], check=True)
    return site


def test_the_context_is_complete(built: BuildPlan) -> None:
    names = sorted(path.relative_to(built.context).as_posix() for path in built.context.rglob("*") if path.is_file())
    assert [re.sub(r"-\d.*", "", name) for name in names] == [
        "Dockerfile", "pinned.txt", "wheels/detkit_echo", "wheels/detkit_sagemaker", "wheels/detkit_sdk",
    ]  # fmt: skip
    dockerfile = (built.context / "Dockerfile").read_text()
    for source in re.findall(r"source=([\w./]+)", dockerfile):
        assert (built.context / source).exists()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", dockerfile, re.MULTILINE)
    assert json.loads(entry) == ["python", "-m", "detkit_sagemaker.container"]
    assert "ARG BASE=python:3.11-slim-bookworm" in dockerfile
    for variable, value in for_speed({}).items():
        assert f"{variable}={value}" in dockerfile, "workers there are as fast as here"


def test_the_wheels_install_and_run_by_themselves(built: BuildPlan, tmp_path: Path) -> None:
    site = installed_wheels(built, tmp_path / "site")
    script = (
        "import detkit, detkit_echo, detkit_sagemaker, sys\n"
        "print([m.__file__ for m in (detkit, detkit_echo, detkit_sagemaker)])\n"
        "from detkit_sagemaker.container.__main__ import main; sys.exit(main(['check', 'echo']))"
    )
    variables = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=variables, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(site)) == 3
    assert (site / "detkit_sagemaker/container/Dockerfile").is_file()


def test_the_same_code_is_the_same_image(built: BuildPlan, tmp_path: Path) -> None:
    again = plan(tmp_path / "again", ["echo", "echo"], **AT)
    assert again.image_uri == built.image_uri
    assert plan(tmp_path / "other", ["echo"], base="ubuntu:24.04", **AT).image_uri != built.image_uri
    packed = [one.pack(tmp_path / f"{i}.zip").read_bytes() for i, one in enumerate((built, again))]
    assert packed[0] == packed[1]
    with zipfile.ZipFile(tmp_path / "0.zip") as archive:
        assert archive.testzip() is None
        assert "Dockerfile" in archive.namelist()


def test_the_commands(built: BuildPlan) -> None:
    uri = built.image_uri
    assert re.fullmatch(r"123456789012\.dkr\.ecr\.eu-west-1\.amazonaws\.com/detkit:echo-[0-9a-f]{12}", uri)
    build, repository, login, push = built.commands
    assert build.startswith("docker build --platform linux/amd64 --provenance=false")
    assert "--build-arg BACKENDS=echo" in build
    assert build.endswith(f"--tag {uri} {built.context}")
    assert "create-repository" in repository
    assert "--password-stdin 123456789012.dkr.ecr.eu-west-1.amazonaws.com" in login
    assert push == f"docker push {uri}"
    assert all(line in str(built) for line in built.commands)


def test_codebuild_is_asked_in_its_own_words(built: BuildPlan) -> None:
    import botocore.session
    from botocore.validate import ParamValidator

    project = built.project_request(name="detkit", role="arn:aws:iam::123456789012:role/build", tags={"a": "b"})
    start = built.start_request(name="detkit", source="s3://bucket/detkit/context.zip")
    repository = built.create_repository_request({"a": "b"})
    session = botocore.session.get_session()
    for service, operation, request in (
        ("codebuild", "CreateProject", project),
        ("codebuild", "StartBuild", start),
        ("ecr", "CreateRepository", repository),
    ):
        shape = session.get_service_model(service).operation_model(operation).input_shape
        report = ParamValidator().validate(request, shape)
        assert not report.has_errors(), report.generate_report()
    assert yaml.safe_load(project["source"]["buildspec"])["version"] == 0.2
    assert start["sourceLocationOverride"] == "bucket/detkit/context.zip"


def test_the_buildspec_is_yaml(built: BuildPlan) -> None:
    spec = yaml.safe_load(built.buildspec)
    assert spec["version"] == 0.2
    commands = {name: phase["commands"] for name, phase in spec["phases"].items()}
    assert commands["pre_build"] == [built.login_command]
    assert commands["build"] == [" ".join(built.build_command("."))]
    assert commands["post_build"] == [f'test "$CODEBUILD_BUILD_SUCCEEDING" = 1 && docker push {built.image_uri}']


def test_a_pinned_environment_is_the_image_s_own(tmp_path: Path) -> None:
    pytest.importorskip("detkit_gluoncv")
    built = plan(tmp_path / "gluoncv", ["gluoncv"], **AT)
    pinned = (built.context / "pinned.txt").read_text().splitlines()
    assert "mxnet==1.9.1" in pinned
    assert all("==" in line for line in pinned)
    with pytest.raises(UsageError, match="'gluoncv' needs an environment of its own, which echo cannot share"):
        plan(tmp_path / "both", ["gluoncv", "echo"], **AT)
    assert not (tmp_path / "both").exists()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What detkit looks for in a checkout of Detectron2."""
    folder = tmp_path / "checkout"
    for name in ("detectron2", "configs/COCO-Detection"):
        (folder / name).mkdir(parents=True)
    (folder / "detectron2/__init__.py").write_text('__version__ = "0.6"\n')
    (folder / "configs/COCO-Detection/one.yaml").write_text("VERSION: 2\n")
    return folder


def test_a_plugin_comes_with_those_that_it_builds_on_and_a_framework_of_no_registry(
    checkout: Path, tmp_path: Path
) -> None:
    """Its pinned environment is installed without dependencies, so nothing else would bring them."""
    pytest.importorskip("detkit_detectron2")
    built = plan(tmp_path / "context", ["detectron2"], source=checkout, **AT)
    names = ["detectron2", "detkit_detectron2", "detkit_sagemaker", "detkit_sdk", "detkit_torchvision"]
    assert [wheel.name.partition("-")[0] for wheel in sorted((built.context / "wheels").iterdir())] == names
    assert "torch==" in (built.context / "pinned.txt").read_text()
    site, *modules = installed_wheels(built, tmp_path / "site"), *names[:2], "detkit_detectron2.params", names[-1]
    script = f"import importlib\nfor name in {modules}: print(importlib.import_module(name).__file__)"
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True,
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(site)) == len(modules)
    assert (site / "detectron2/model_zoo/configs/COCO-Detection/one.yaml").is_file()

    (checkout / "detectron2/__init__.py").write_text('__version__ = "0.6"\nchanged = True\n')
    assert plan(tmp_path / "other", ["detectron2"], source=checkout, **AT).image_uri != built.image_uri


def test_a_framework_of_no_registry_is_asked_for_before_anything_is_built(tmp_path: Path) -> None:
    pytest.importorskip("detkit_detectron2")
    typed = "detkit sagemaker build-image --with detectron2 --source PATH"
    with pytest.raises(UsageError, match=f"get a checkout of its source and name it: `{typed}`"):
        plan(tmp_path / "context", ["detectron2"], **AT)
    with pytest.raises(UsageError, match="which is no checkout of Detectron2"):
        plan(tmp_path / "context", ["detectron2"], source=tmp_path, **AT)
    with pytest.raises(UsageError, match="'echo' takes no --source"):
        plan(tmp_path / "context", ["echo"], source=tmp_path, **AT)
    assert not (tmp_path / "context").exists()


def test_wheels_that_are_given_are_taken(built: BuildPlan, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "detkit_echo-0.2.0-py3-none-any.whl").write_bytes(b"another one")
    found = plan(tmp_path / "context", ["echo"], wheels=wheels, **AT)
    assert (found.context / "wheels/detkit_echo-0.2.0-py3-none-any.whl").read_bytes() == b"another one"
    assert not (found.context / "wheels/detkit_echo-0.1.0-py3-none-any.whl").exists()
    assert found.digest != built.digest


def test_what_cannot_be_built(built: BuildPlan, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'echo'"):
        plan(tmp_path / "a", ["ecko"], **AT)
    with pytest.raises(UsageError, match="name the backends"):
        plan(tmp_path / "a", [], **AT)
    with pytest.raises(UsageError, match="is there already"):
        plan(built.context, ["echo"], **AT)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, installed: None) -> Iterator[str]:
    """Our image with echo, really built."""
    if BASE not in os.environ:
        pytest.skip(f"{BASE} names no image to build ours on")
    if not building.has_docker():
        pytest.skip("no Docker answers here")
    built = plan(tmp_path_factory.mktemp("image") / "context", ["echo"], base=os.environ[BASE], **AT)
    docker, build, *words = built.build_command()
    subprocess.run([docker, build, "--network", "host", *words], check=True)
    yield built.image_uri
    subprocess.run([docker, "rmi", "--force", built.image_uri], check=True)


@pytest.fixture
def simulator_images(image: str) -> Iterator[Mapping[str, Sequence[str]]]:
    """The image as the account starts it, as whom the tests run, so that they may remove what it leaves."""
    label = f"detkit-test={uuid.uuid4()}"
    run = f"docker run --rm --network host --label {label} --user {os.getuid()}:{os.getgid()} --env HOME=/tmp"
    mounted = '--env DETKIT_PORT --volume "$SAGEMAKER_BASE_DIR:/opt/ml"'
    yield {"detkit:latest": ["sh", "-c", f'exec {run} {mounted} {image} "$0"']}
    # The simulator kills the client, which Docker does not notice.
    left = subprocess.run(["docker", "ps", "-aq", "--filter", f"label={label}"], capture_output=True, check=True)
    for container in left.stdout.decode().split():
        subprocess.run(["docker", "rm", "--force", container], check=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_image_trains_stops_and_serves(
    echo_account: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETKIT_RUNS", str(tmp_path / "runs"))
    data = tiny_dataset(tmp_path / "images")
    here: dict[str, Any] = {"role": echo_account.role, "image_uri": echo_account.image("detkit:latest"), "max_cost": 5}
    trainer = detkit.Trainer(backend="sagemaker", model="echo/memory", **here)
    run = trainer.fit(data, data, name="there", quiet=True)
    local = detkit.Trainer(model="echo/memory").fit(data, data, name="here", quiet=True)
    with detkit.Predictor(run) as there, detkit.Predictor(local) as own:
        wanted = [found.to_dict() for found in own.predict(data)]
        assert [found.to_dict() for found in there.predict(data)] == wanted

    endless = trainer.start(data, data, name="endless", epochs=1_000_000)
    kept = {"Bucket": echo_account.bucket, "Prefix": "detkit/checkpoints/detkit-endless-"}
    deadline = time.monotonic() + 60
    while not boto3.client("s3").list_objects_v2(**kept)["KeyCount"]:
        assert endless.goes_on() and time.monotonic() < deadline
        time.sleep(0.1)
    endless.stop()
    assert endless.status == "stopped"

    with pytest.raises(RunFailed, match="loss"):
        trainer.fit(data, data, name="failing", quiet=True, learning_rate=1e30)

    endpoint = detkit.deploy(run, ttl="1h", **{**here, "max_cost": 1})
    with contextlib.closing(endpoint.open(PredictOptions(score_threshold=0.5))) as served:
        (found,) = served.detect([read_image(data.paths[0])])
    assert found.names == data[0].names
    endpoint.delete()
