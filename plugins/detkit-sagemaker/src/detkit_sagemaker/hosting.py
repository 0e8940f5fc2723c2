"""What a finished model needs to answer in SageMaker: an image, its artifact in S3, and how its answers are read."""

from __future__ import annotations

import gzip
import hashlib
import json
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from detkit import trust
from detkit.errors import MissingSettings, UnknownName, UsageError
from detkit.files import file_sha256
from detkit.job import Model
from detkit.plans import Concern
from detkit_sagemaker import artifacts, preflight, uploads
from detkit_sagemaker.answers import Answers, Kind
from detkit_sagemaker.aws import Aws
from detkit_sagemaker.container.training import CODE
from detkit_sagemaker.images import builtin_image
from detkit_sagemaker.jumpstart import HubModel
from detkit_sagemaker.models import jumpstart_id
from detkit_sagemaker.options import AccountOptions, DeployOptions, TransformOptions
from detkit_sagemaker.resources import Step

CLASSES, KIND = "DETKIT_CLASSES", "DETKIT_ANSWERS"
"""Environment variables that keep the class names, and whose container it is, with the model at AWS."""

ROLE_HINT = "an execution role, ARN or name; `detkit sagemaker setup --print` shows what it may"
IMAGE_HINT = "the address of our container in your ECR, which `detkit sagemaker build-image` makes and prints"

_OURS = {"DETKIT_SCORE_THRESHOLD": "0.001"}
"""Evaluation's floor; who asks leaves out more, see `Answers`."""

_LONGEST_VALUE = 1024
"""Characters of a variable's value (API reference, ContainerDefinition)."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """What ``CreateModel`` is told."""

    image: str
    artifact: str
    """S3 URL of the ``model.tar.gz``; it is not there yet where there is something `to_upload`."""
    answers: Answers
    environment: Mapping[str, str]
    isolated: bool = False
    """Whether it is to reach no network, where the options do not say."""
    concerns: tuple[Concern, ...] = ()
    """What speaks against the machine."""
    to_upload: Mapping[str, Path] = field(default_factory=dict)
    """Files that make the archive, by their names in it; or the archive itself, as the only one."""

    @property
    def bytes_to_upload(self) -> int:
        return sum(path.stat().st_size for path in self.to_upload.values())

    def bring(self, aws: Aws, kms_key: str | None = None) -> None:
        """Upload the artifact where it does not lie in S3 already."""
        if not self.to_upload:
            return
        uploads.ensure_bucket(aws, self.artifact)
        with tempfile.TemporaryDirectory(prefix="detkit-model-") as folder:
            made = self.to_upload.get(artifacts.ARCHIVE) or pack(self.to_upload, Path(folder) / artifacts.ARCHIVE)
            uploads.put_file(aws, self.artifact, made, kms_key)


def needs_image(model: Model) -> bool:
    """Return whether a model answers in our container, whose image somebody has to name."""
    return artifacts.place_of(model.path) is None


def root_of(aws: Aws, options: AccountOptions) -> str:
    """Return the S3 folder below which detkit puts things."""
    return (options.output or f"s3://{aws.bucket}/detkit").rstrip("/")


def container_of(model: Model, aws: Aws, root: str, *, image_uri: str | None, instance_type: str) -> Container:
    """Return what a model needs; looks at S3 and the hub, and changes nothing. ``root`` is detkit's folder in S3.

    Raises `MissingSettings` where our container's image is not known, `UsageError` where the artifact is nowhere, or
    comes with code of its own that the user has not given to detkit.
    """
    theirs = artifacts.place_of(model.path)
    if theirs is not None:
        return _of_aws(model, theirs, aws, root, instance_type)
    if image_uri is None:
        raise MissingSettings([("image_uri", IMAGE_HINT)])
    files = {path.relative_to(model.path).as_posix(): path for path in model.path.rglob("*") if path.is_file()}
    code = trust.of_model(model)
    environment = {KIND: "detkit", **_OURS}
    if code is not None:
        files |= {f"{CODE}/{name}": path for name, path in code.files.items()}
        environment["DETKIT_CODE"] = code.digest
    program = trust.program_of(model)
    if program is not None:
        environment["DETKIT_CODE"] = file_sha256(program)
    url = f"{root}/models/{_digest(files)}/{artifacts.ARCHIVE}"
    return Container(
        image=image_uri,
        artifact=url,
        answers=Answers(kind="detkit", classes=model.classes),
        environment=environment | _classes(model),
        to_upload={} if _is_there(aws, url) else files,
    )


def look_at_account(
    container: Container, options: TransformOptions | DeployOptions, steps: Sequence[Step], aws: Aws, root: str
) -> tuple[Concern, ...]:
    """Return what AWS would reject of what is about to be created, and what else speaks against it; only looks."""
    serverless = isinstance(options, DeployOptions) and options.serverless
    use: preflight.Use = "hosting" if isinstance(options, DeployOptions) else "transform"
    needs = {} if serverless else {(use, options.instance_type): options.instance_count}
    rejected = [Concern(level="error", message=f"{step.operation}: {line}") for step in steps for line in step.faults()]
    (role,) = (step.request["ExecutionRoleArn"] for step in steps if step.kind == "model")
    return (
        *container.concerns,
        *rejected,
        *([] if serverless else preflight.volume_key(options, options.instance_type)),
        *preflight.account(
            aws,
            role_arn=role,
            output=root,
            needs=needs,
            image_uri=container.image if container.answers.kind == "detkit" else None,
        ),
    )


def _of_aws(model: Model, place: artifacts.Place, aws: Aws, root: str, instance_type: str) -> Container:
    """Return what a model of AWS's own image needs, whatever image of ours is set for other models.

    Its artifact is used where it lies, in the same region.
    """
    kind: Kind = "jumpstart" if place.kind == "jumpstart" else "object-detection"
    url, here = place.artifact, model.path / artifacts.ARCHIVE
    to_upload: dict[str, Path] = {}
    if place.region != aws.region or not _is_there(aws, url):
        if not here.is_file():
            raise UsageError(f"the artifact of {model.path} is neither there ({artifacts.ARCHIVE}) nor at {url}")
        url = f"{root}/models/{file_sha256(here)[:32]}/{artifacts.ARCHIVE}"
        to_upload = {} if _is_there(aws, url) else {artifacts.ARCHIVE: here}
    container = Container(
        image=place.image,
        artifact=url,
        answers=Answers(kind=kind, classes=model.classes),
        environment={**place.environment, KIND: kind, **_classes(model)},
        to_upload=to_upload,
    )
    if kind == "jumpstart":
        return _as_hub_says(container, model, place, aws, instance_type)
    image = place.image if place.region == aws.region else builtin_image(aws.region)
    return replace(container, image=image, concerns=tuple(preflight.builtin_hosting(instance_type)))


def _as_hub_says(container: Container, model: Model, place: artifacts.Place, aws: Aws, instance_type: str) -> Container:
    """Return a container with the image that JumpStart has for the machine, whose kind decides between several.

    A hub that no longer has the model leaves what was noted when it was trained. Raises `UsageError` where that is of
    another region.
    """
    try:
        hub = HubModel.read(aws, jumpstart_id(model.manifest.model) or model.manifest.model, place.version)
    except UnknownName:
        if place.region == aws.region:
            return container
        raise UsageError(
            f"the model was trained in {place.region}, and which image opens it in {aws.region} is not known; use it "
            f"in {place.region} (--region {place.region})"
        ) from None
    return replace(
        container,
        image=hub.hosting_image(instance_type),
        environment={**container.environment, **hub.hosting_environment()},
        isolated=hub.inference_enable_network_isolation,
        concerns=tuple(hub.hosting_concerns(instance_type)),
    )


def pack(files: Mapping[str, Path], target: Path) -> Path:
    """Pack files into ``target``, a ``.tar.gz`` that is the same, byte by byte, whenever and wherever it is made."""
    with (
        target.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, path in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = path.stat().st_size, 0o644
            with path.open("rb") as content:
                tar.addfile(member, content)
    return target


def _digest(files: Mapping[str, Path]) -> str:
    """Return what names the archive of these files: sha256 over names and contents, shortened."""
    listed = [[name, file_sha256(path)] for name, path in sorted(files.items())]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]


def _classes(model: Model) -> dict[str, str]:
    names = json.dumps(list(model.classes))
    return {CLASSES: names} if len(names) <= _LONGEST_VALUE else {}


def _is_there(aws: Aws, url: str) -> bool:
    return any(name == "" for name, _ in uploads.objects(aws, url))
