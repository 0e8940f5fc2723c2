"""Getting our image into the account's registry: with Docker here, else with CodeBuild there."""

from __future__ import annotations

import base64
import secrets
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from detkit.errors import RunFailed, UsageError
from detkit_sagemaker import resources, uploads
from detkit_sagemaker.aws import Aws, AwsError, explained
from detkit_sagemaker.policies import BUILD_ROLE

if TYPE_CHECKING:
    from detkit_sagemaker.container.build import BuildPlan
    from detkit_sagemaker.resources import Tell

PROJECT = "detkit-build"
_TAGS = {"detkit:purpose": "images for SageMaker"}
_MISSING = {"ImageNotFoundException", "RepositoryNotFoundException"}
_SHOWN_LINES = 20


def has_docker() -> bool:
    """Return whether images can be built here: there is a Docker, and it answers."""
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "info"], capture_output=True, check=False).returncode == 0


def is_there(aws: Aws, plan: BuildPlan) -> bool:
    """Return whether the registry has the image; its tag is the digest of what is in it."""
    try:
        with explained(f"looking for {plan.image_uri} (ecr:DescribeImages)"):
            aws.client("ecr").describe_images(repositoryName=plan.repository, imageIds=[{"imageTag": plan.tag}])
    except AwsError as error:
        if error.code in _MISSING:
            return False
        raise
    return True


def build_here(aws: Aws, plan: BuildPlan, tell: Tell) -> None:
    """Build with Docker and push. Raises `RunFailed` with the command that failed, `UsageError` without buildx."""
    _require_buildx()
    resources.ensure(aws, "repository", plan.create_repository_request(_TAGS))
    _run(plan.build_command(), tell)
    with explained("signing Docker in (ecr:GetAuthorizationToken)"):
        token = aws.client("ecr").get_authorization_token()["authorizationData"][0]["authorizationToken"]
    user, _, password = base64.b64decode(token).decode().partition(":")
    _run(["docker", "login", "--username", user, "--password-stdin", plan.registry], tell, password)
    _run(["docker", "push", plan.image_uri], tell)


def build_there(aws: Aws, plan: BuildPlan, root: str, tell: Tell, role: str | None = None) -> None:
    """Build with CodeBuild, which costs some cents, and wait. ``root`` is detkit's folder in S3.

    ``role`` is the ARN of what CodeBuild works as, else ``detkit-build``. Raises `RunFailed` with the last lines.
    """
    resources.ensure(aws, "repository", plan.create_repository_request(_TAGS))
    role = role or f"arn:{aws.partition}:iam::{aws.account}:role/{BUILD_ROLE}"
    source = f"{root}/images/{plan.digest[:32]}.zip"
    uploads.ensure_bucket(aws, root)
    with tempfile.TemporaryDirectory(prefix="detkit-image-") as folder:
        uploads.put_file(aws, source, plan.pack(Path(folder) / "context.zip"))
    project = plan.project_request(name=PROJECT, role=role, tags=_TAGS)
    where = {"type": "S3", "location": source.removeprefix("s3://"), "buildspec": plan.buildspec}
    resources.ensure(aws, "project", {**project, "source": where})
    client = aws.client("codebuild")
    once = {"idempotencyToken": secrets.token_hex(16)}  # boto3 asks again where an answer got lost
    with explained(f"starting a build of {PROJECT} (codebuild:StartBuild)"):
        build = client.start_build(**plan.start_request(name=PROJECT, source=source), **once)["build"]["id"]
    try:
        _wait(aws, build, tell)
    except KeyboardInterrupt:
        tell(f"stopping build {build}")
        with explained(f"stopping build {build} (codebuild:StopBuild)"):
            client.stop_build(id=build)
        raise


def _require_buildx() -> None:
    """Raise `UsageError` where ``docker build`` would not know the Dockerfile's mounts, or be no command."""
    docker = shutil.which("docker")
    if docker is None:
        found = "there is no command docker here"
    elif subprocess.run([docker, "buildx", "version"], capture_output=True, check=False).returncode:
        found = "Docker is here without buildx, which this image is built with"
    else:
        return
    raise UsageError(f"{found}; install it (https://docs.docker.com/go/buildx/), or say --codebuild")


def _wait(aws: Aws, build: str, tell: Tell) -> None:
    told = ""
    for _ in resources.waits():
        with explained(f"looking at build {build} (codebuild:BatchGetBuilds)"):
            found = aws.client("codebuild").batch_get_builds(ids=[build])["builds"][0]
        status = f"{found['buildStatus']}, {found.get('currentPhase', '')}".rstrip(", ")
        if status != told:
            tell(f"build {build}: {status}")
            told = status
        if found["buildStatus"] == "SUCCEEDED":
            return
        if found["buildStatus"] != "IN_PROGRESS":
            where = found.get("logs") or {}
            log = resources.last_lines(aws, where.get("groupName") or "", where.get("streamName") or "")
            link = where.get("deepLink", "")
            raise RunFailed(f"build {build} ended with {found['buildStatus']}; its log: {link}\n{log}".rstrip(), log)


def _run(command: list[str], tell: Tell, given: str | None = None) -> None:
    """Run a command, its output passed on line by line."""
    tell(f"$ {shlex.join(command)}")
    lines = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdin is not None and process.stdout is not None  # they are pipes
        process.stdin.write(given or "")
        process.stdin.close()
        for line in process.stdout:
            lines.append(line.rstrip())
            tell(lines[-1])
    if process.returncode:
        log = "\n".join(lines[-_SHOWN_LINES:])
        raise RunFailed(f"{shlex.join(command)} ended with exit code {process.returncode}", log)
