"""Options of training, batch transform and endpoints in SageMaker: where, how long and for how much, typed."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta, field

from detkit.durations import seconds
from detkit.params import Options


def pairs(text: str) -> dict[str, str]:
    """Read ``k=v,k=v``. Raises `ValueError` with what was expected; a value may hold ``=`` and no comma."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ValueError("names and values such as team=vision,cost-center=17")
        found[name.strip()] = value.strip()
    return found


Duration: TypeAlias = Annotated[int, Meta(ge=1, extra={"read": seconds})]
"""Seconds, also written as ``4h`` or ``90m``."""

Pairs: TypeAlias = Annotated[dict[str, str], Meta(extra={"read": pairs})]
"""Names and values, also written as ``k=v,k=v``."""

S3Uri: TypeAlias = Annotated[str, Meta(pattern=r"^s3://[^/]+(/.*)?$")]
InstanceType: TypeAlias = Annotated[str, Meta(pattern=r"^ml\.[a-z0-9-]+\.[a-z0-9]+$")]


class AccountOptions(Options, frozen=True, kw_only=True):
    """What every kind of job and endpoint takes."""

    region: Annotated[
        str | None, Meta(description="AWS region; where none, that of AWS_REGION or of the AWS configuration")
    ] = None
    role: Annotated[
        str | None,
        Meta(description="execution role, ARN or name; where none, that of the SageMaker SDK's defaults file"),
    ] = None
    output: Annotated[
        S3Uri | None,
        Meta(description="S3 folder for data and results; where none, s3://sagemaker-<region>-<account>/detkit"),
    ] = None
    subnets: Annotated[tuple[str, ...], Meta(description="subnet ids of the VPC that the containers run in")] = ()
    security_groups: Annotated[tuple[str, ...], Meta(description="security group ids, needed with subnets")] = ()
    network_isolation: Annotated[
        bool | None, Meta(description="whether the containers may reach no network; where none, as the image needs it")
    ] = None
    kms_key: Annotated[str | None, Meta(description="KMS key of what is written to S3")] = None
    volume_kms_key: Annotated[
        str | None, Meta(description="KMS key of the instances' volumes; not for types with disks of their own")
    ] = None
    tags: Annotated[Pairs, Meta(description="tags of everything that is created, k=v,k=v, beside detkit's own")] = (
        field(default_factory=dict)
    )
    max_cost: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="US dollars, by the estimate, that may be spent; becomes a limit on the time"),
    ] = None
    yes: Annotated[bool, Meta(description="start what costs money without max_cost")] = False


class SagemakerOptions(AccountOptions, frozen=True, kw_only=True):
    """Options of a training job."""

    instance_type: Annotated[
        InstanceType | None,
        Meta(description="where none: ml.g4dn.xlarge; for JumpStart the hub's own default"),
    ] = None
    instance_count: Annotated[int, Meta(ge=1, description="machines that train together")] = 1
    volume_size: Annotated[int, Meta(ge=1, description="gigabytes of disk of each machine")] = 30
    max_runtime: Annotated[Duration, Meta(description="time after which the service ends the job, e.g. 4h or 90m")] = (
        14400
    )
    input_mode: Annotated[
        Literal["file", "fastfile", "pipe"],
        Meta(description="file: data is copied first; fastfile: read as needed; pipe: streamed (built-in only)"),
    ] = "file"
    data_format: Annotated[
        Literal["recordio", "json", "manifest"] | None,
        Meta(
            description="built-in only: packs, images with a JSON file each, or an augmented manifest that is "
            "streamed; where none, packs, and a manifest for images that all lie in S3 already"
        ),
    ] = None
    spot: Annotated[
        bool, Meta(description="spot capacity: cheaper, may be interrupted, goes on from the last checkpoint")
    ] = False
    max_wait: Annotated[
        Duration | None,
        Meta(description="spot: time for waiting and running together; where none, twice max_runtime"),
    ] = None
    encrypt_traffic: Annotated[
        bool | None, Meta(description="whether traffic between machines is encrypted; where none, as the model asks")
    ] = None
    image_uri: Annotated[
        str | None, Meta(description="image of our container in ECR, for models of installed backends")
    ] = None


class TransformOptions(AccountOptions, frozen=True, kw_only=True):
    """Options of a batch transform job, which ends by itself."""

    instance_type: Annotated[InstanceType, Meta(description="machine that predicts")] = "ml.m5.xlarge"
    instance_count: Annotated[int, Meta(ge=1, description="machines that share the images")] = 1
    max_payload: Annotated[int, Meta(ge=1, le=100, description="megabytes of the largest image")] = 6
    concurrency: Annotated[int, Meta(ge=1, le=100, description="images that a machine is sent at once")] = 1
    max_runtime: Annotated[
        Duration, Meta(description="time after which detkit stops the job; the service itself has no such limit")
    ] = 3600
    wait: Annotated[bool, Meta(description="whether to wait for the answers")] = True
    image_uri: Annotated[str | None, Meta(description="image of our container; where none, the model's own")] = None


class DeployOptions(AccountOptions, frozen=True, kw_only=True):
    """Options of an endpoint."""

    instance_type: Annotated[InstanceType, Meta(description="machine that answers")] = "ml.m5.xlarge"
    instance_count: Annotated[int, Meta(ge=1, description="machines that answer")] = 1
    serverless: Annotated[bool, Meta(description="paid by the request, without machines of its own; CPU only")] = False
    memory_size: Annotated[
        Literal[1024, 2048, 3072, 4096, 5120, 6144], Meta(description="serverless: megabytes of memory")
    ] = 4096
    concurrency: Annotated[int, Meta(ge=1, le=200, description="serverless: requests that are answered at once")] = 5
    ttl: Annotated[
        Duration | None, Meta(description="time after which AWS deletes the endpoint, e.g. 2h; needed unless keep")
    ] = None
    keep: Annotated[bool, Meta(description="keep the endpoint, and pay for it, until it is deleted by hand")] = False
    image_uri: Annotated[str | None, Meta(description="image of our container; where none, the model's own")] = None
