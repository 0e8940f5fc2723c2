"""Making our image: the folder that it is built in, the commands that build it, and CodeBuild where Docker is missing.

Nothing here runs Docker or calls AWS; what is returned says what to run and what to request.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detkit import distributions, plugins
from detkit.backends import Backend, LocalBackend
from detkit.environments import pack_framework
from detkit.errors import Unsupported, UsageError
from detkit.files import atomic_write, staged_folder

BASE = "python:3.11-slim-bookworm"
"""The Dockerfile's own."""

REPOSITORY = "detkit"

_CORE, _SELF = "detkit-sdk", "detkit-sagemaker"
_CODEBUILD_IMAGE = "aws/codebuild/amazonlinux-x86_64-standard:5.0"
_CODEBUILD_MINUTES = 60
_LONG_AGO = (1980, 1, 1, 0, 0, 0)

_DOCKER_BUILD = (
    # SageMaker runs x86 images, and takes no index of manifests, which is what attestations make of an image.
    *("docker", "build", "--platform", "linux/amd64", "--provenance=false", "--sbom=false"),
)


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """An image that can be built: what goes into it, what to type, and what to ask CodeBuild for."""

    context: Path
    """The folder that it is built in."""
    backends: tuple[str, ...]
    base: str
    digest: str
    """sha256 over all files of the folder and the base's name: the same code makes the same one."""
    region: str
    account: str
    domain: str = "amazonaws.com"
    """That of the region's services; ``amazonaws.com.cn`` in China."""
    repository: str = REPOSITORY
    build_args: Mapping[str, str] = field(default_factory=dict)
    """More arguments of the Dockerfile, e.g. ``SYSTEM``."""

    @property
    def tag(self) -> str:
        """``torchvision-0123456789ab``."""
        return f"{'-'.join(self.backends)[:100]}-{self.digest[:12]}"

    @property
    def registry(self) -> str:
        return f"{self.account}.dkr.ecr.{self.region}.{self.domain}"

    @property
    def image_uri(self) -> str:
        """What ``image_uri=`` is to be."""
        return f"{self.registry}/{self.repository}:{self.tag}"

    def build_command(self, context: str | None = None) -> list[str]:
        """Return the ``docker build`` command, as words."""
        arguments = {"BASE": self.base, "BACKENDS": " ".join(self.backends), **self.build_args}
        given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        return [*_DOCKER_BUILD, *given, "--tag", self.image_uri, str(self.context) if context is None else context]

    @property
    def login_command(self) -> str:
        """Signs Docker in; a line of a shell, as it is two commands."""
        password = f"aws ecr get-login-password --region {self.region}"
        return f"{password} | docker login --username AWS --password-stdin {self.registry}"

    @property
    def commands(self) -> list[str]:
        """Everything to type, in order, as lines of a shell: the image is built here and lies in ECR then."""
        described = f"aws ecr describe-repositories --region {self.region} --repository-names {self.repository}"
        create = f"aws ecr create-repository --region {self.region} --repository-name {self.repository}"
        return [
            shlex.join(self.build_command()),
            f"{described} > /dev/null || {create}",
            self.login_command,
            shlex.join(["docker", "push", self.image_uri]),
        ]

    def __str__(self) -> str:
        files = sorted(path.relative_to(self.context).as_posix() for path in self.context.rglob("*") if path.is_file())
        return "\n".join([f"image {self.image_uri}", f"built in {self.context}:", *(f"  {name}" for name in files),
                          "type:", *(f"  {line}" for line in self.commands)])  # fmt: skip

    def create_repository_request(self, tags: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the request of ECR's ``CreateRepository``: tags stay what they are, and what is pushed is scanned."""
        return {
            "repositoryName": self.repository,
            "imageTagMutability": "IMMUTABLE",
            "imageScanningConfiguration": {"scanOnPush": True},
            "tags": [{"Key": name, "Value": value} for name, value in (tags or {}).items()],
        }

    @property
    def buildspec(self) -> str:
        """What CodeBuild does with the folder, as YAML."""
        push = shlex.join(["docker", "push", self.image_uri])
        lines = {
            "pre_build": [self.login_command],
            "build": [shlex.join(self.build_command("."))],
            "post_build": [f'test "$CODEBUILD_BUILD_SUCCEEDING" = 1 && {push}'],
        }
        phases = "".join(
            f"  {phase}:\n    commands:\n" + "".join(f"      - {_quoted(command)}\n" for command in commands)
            for phase, commands in lines.items()
        )
        return f"version: 0.2\nenv:\n  variables:\n    DOCKER_BUILDKIT: '1'\nphases:\n{phases}"

    def project_request(self, *, name: str, role: str, tags: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the request of CodeBuild's ``CreateProject``; ``role`` may pull, push and write logs.

        One project builds any plan: what to build is in `start_request`.
        """
        return {
            "name": name,
            "description": "Builds detkit's images for SageMaker.",
            "source": {
                "type": "NO_SOURCE",
                "buildspec": "version: 0.2\nphases:\n  build:\n    commands:\n      - exit 1\n",
            },
            "artifacts": {"type": "NO_ARTIFACTS"},
            "environment": {
                "type": "LINUX_CONTAINER",
                "image": _CODEBUILD_IMAGE,
                "computeType": "BUILD_GENERAL1_MEDIUM",
                "privilegedMode": True,  # Docker runs in it
            },
            "serviceRole": role,
            "timeoutInMinutes": _CODEBUILD_MINUTES,
            "concurrentBuildLimit": 1,
            "tags": [{"key": key, "value": value} for key, value in (tags or {}).items()],
        }

    def start_request(self, *, name: str, source: str) -> dict[str, Any]:
        """Return the request of ``StartBuild``; ``source`` is ``s3://bucket/key`` of the `pack`-ed folder."""
        return {
            "projectName": name,
            "sourceTypeOverride": "S3",
            "sourceLocationOverride": source.removeprefix("s3://"),
            "buildspecOverride": self.buildspec,
        }

    def pack(self, archive: Path) -> Path:
        """Write the folder into a ``.zip``, the same byte by byte whenever it is made."""
        with atomic_write(archive) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in _files(self.context):
                entry = zipfile.ZipInfo(path.relative_to(self.context).as_posix(), _LONG_AGO)
                entry.external_attr = 0o644 << 16
                packed.writestr(entry, path.read_bytes())
        return archive


def plan(
    folder: Path,
    backends: Sequence[str],
    *,
    region: str,
    account: str,
    domain: str = "amazonaws.com",
    base: str = BASE,
    repository: str = REPOSITORY,
    wheels: Path | None = None,
    source: Path | None = None,
    build_args: Mapping[str, str] | None = None,
) -> BuildPlan:
    """Lay out the folder to build an image in that has these backends, and return what to do with it.

    detkit and the plugins, with those that they build on, are packed as they are installed here, editable ones, too;
    where ``wheels``, a folder, has a wheel of one, that is taken. ``source`` is the checkout of a framework that no
    package registry has. ``folder`` must not exist. Raises `UnknownName`, `UsageError` for backends that do not fit
    into one image and where a checkout is missing, `Unsupported` for a plugin with compiled modules and no wheel.
    """
    if not backends:
        raise UsageError("name the backends of the image, e.g. --with torchvision")
    if folder.exists():
        raise UsageError(f"{folder} is there already; name a new folder")
    names = tuple(dict.fromkeys(backends))
    found = [_local(plugins.backend(name)) for name in names]
    pinned = _pinned(found)
    command = " ".join(["detkit sagemaker build-image", *(f"--with {name}" for name in names), "--source PATH"])
    frameworks = [packed for one in found if (packed := pack_framework(one, source, command))]
    own = {plugins.distribution_of(one.name): [one.engine.partition(":")[0].partition(".")[0]] for one in found}
    below: dict[str, list[str]] = {other: [] for name in own for other in distributions.required_plugins(name)}
    tops = {**below, **own, _SELF: ["detkit_sagemaker"], _CORE: ["detkit"]}
    given = {_normal(path.name.partition("-")[0]): path for path in wheels.glob("*.whl")} if wheels is not None else {}
    with staged_folder(folder) as staged:
        (staged / "wheels").mkdir()
        for packed in frameworks:
            packed.write_wheel(staged / "wheels")
        for name, modules in tops.items():
            if _normal(name) in given:
                shutil.copy(given[_normal(name)], staged / "wheels")
            else:
                distributions.find(name, modules).write_wheel(staged / "wheels")
        (staged / "pinned.txt").write_text("".join(f"{line}\n" for line in pinned))
        shutil.copy(Path(__file__).with_name("Dockerfile"), staged / "Dockerfile")
    return BuildPlan(
        context=folder.absolute(),
        backends=names,
        base=base,
        digest=_digest(folder, base, build_args or {}),
        region=region,
        account=account,
        domain=domain,
        repository=repository,
        build_args=dict(build_args or {}),
    )


def _local(backend: Backend) -> LocalBackend:
    if isinstance(backend, LocalBackend):
        return backend
    raise Unsupported(f"backend {backend.name!r} has no engine that could run in a container")


def _pinned(backends: Sequence[LocalBackend]) -> tuple[str, ...]:
    """Return the pinned environment of a backend that has one; it is the image's own then, and shared with nobody."""
    own = [one for one in backends if one.environment is not None]
    if not own:
        return ()
    if len(backends) > 1:
        others = ", ".join(one.name for one in backends if one is not own[0])
        raise UsageError(
            f"backend {own[0].name!r} needs an environment of its own, which {others} cannot share; build one image "
            "for each"
        )
    assert own[0].environment is not None
    return own[0].environment.requirements


def _normal(name: str) -> str:
    return name.replace("-", "_").replace(".", "_").lower()


def _digest(folder: Path, base: str, build_args: Mapping[str, str]) -> str:
    whole = hashlib.sha256(f"{base}\0{sorted(build_args.items())}\n".encode())
    for path in _files(folder):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return whole.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _quoted(text: str) -> str:
    """Return YAML's single-quoted text."""
    return "'" + text.replace("'", "''") + "'"
