"""What is created in an account for an endpoint or a transform, one kind after the other, and how each is removed.

All that belongs together has one name, so what is left over is found by its name: a model without an endpoint or a
transform of that name is used by nobody. What is made once and stays, such as a bucket, is created by `ensure`.
"""

from __future__ import annotations

import getpass
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TypeAlias

from detkit_sagemaker import logs
from detkit_sagemaker.aws import Aws, AwsError, Throttled, explained
from detkit_sagemaker.aws import may_pass as is_passing
from detkit_sagemaker.ledger import Kind, Ledger
from detkit_sagemaker.requests import check_request

PREFIX = "detkit-"
"""What every name begins with."""

OWNER, EXPIRES = "detkit:owner", "detkit:expires"
"""Tags: who created it, and when AWS deletes it, ISO 8601 in UTC or `NEVER`."""

NEVER = "never"

_BY_TIME = re.compile(r"botocore-session-\d+")
_TAKEN = {"ValidationException", "ResourceInUse", "ConflictException"}
_AT_ONCE = {"OperationAborted", "ConcurrentModification"}
"""AWS's codes, S3's and IAM's, for two who create the same thing at once."""

_PATIENCE_S = 60.0
"""So long they are asked again."""

_LOG_LINES = 20
_FIRST_WAIT_S, _LONGEST_WAIT_S, _SHARE = 0.2, 30.0, 0.05


@dataclass(frozen=True)
class Step:
    """One call that creates something."""

    kind: Kind
    name: str
    request: Mapping[str, Any]

    @property
    def operation(self) -> str:
        return _OPERATIONS[self.kind][1]

    def faults(self) -> list[str]:
        """Return what AWS would reject of the request, by its own model of it. Asks nobody."""
        return check_request(self.operation, self.request, _OPERATIONS[self.kind][0])


_OPERATIONS: Mapping[Kind, tuple[str, str, str, str]] = {
    "schedule": ("scheduler", "CreateSchedule", "delete_schedule", "Name"),
    "model": ("sagemaker", "CreateModel", "delete_model", "ModelName"),
    "endpoint-config": ("sagemaker", "CreateEndpointConfig", "delete_endpoint_config", "EndpointConfigName"),
    "endpoint": ("sagemaker", "CreateEndpoint", "delete_endpoint", "EndpointName"),
    "transform-job": ("sagemaker", "CreateTransformJob", "stop_transform_job", "TransformJobName"),
}
"""Service, operation that creates, method that removes, and its one parameter."""


KINDS = frozenset(_OPERATIONS)
"""What detkit removes again."""

_LASTING: Mapping[Kind, tuple[str, str, str, str]] = {
    "bucket": ("s3", "CreateBucket", "Bucket", "BucketAlreadyOwnedByYou"),
    "repository": ("ecr", "CreateRepository", "repositoryName", "RepositoryAlreadyExistsException"),
    "project": ("codebuild", "CreateProject", "name", "ResourceAlreadyExistsException"),
    "role": ("iam", "CreateRole", "RoleName", "EntityAlreadyExists"),
    "policy": ("iam", "CreatePolicy", "PolicyName", "EntityAlreadyExists"),
}
"""Service, operation that creates, parameter with the name, and AWS's code for one that is there."""


def create(aws: Aws, ledger: Ledger, step: Step) -> None:
    """Create one thing; the ledger knows of it before AWS does. Raises `AwsError`."""
    service, operation, _, _ = _OPERATIONS[step.kind]
    ledger.creating(step.kind, step.name)
    try:
        with explained(f"creating {step.kind} {step.name} ({service}:{operation})"):
            client = aws.client(service)
            getattr(client, _method(operation))(**step.request)
    except AwsError as error:
        # Its name has a part by chance, so it is ours: boto3 calls again where an answer got lost.
        if error.code not in _TAKEN or "already exist" not in str(error).lower():
            raise


def ensure(aws: Aws, kind: Kind, request: Mapping[str, Any]) -> bool:
    """Create what stays in the account, and return whether it was not there; the ledger knows of it before AWS does.

    Where another process creates it at this moment, AWS is asked again. Raises `AwsError`; the ledger forgets what AWS
    refused, unless it knew of that before.
    """
    service, operation, parameter, is_there = _LASTING[kind]
    name, ledger = request[parameter], Ledger.of(aws)
    was_known = any((one.kind, one.name) == (kind, name) for one in ledger.pending())
    ledger.creating(kind, name)
    began = time.monotonic()
    for _ in itertools.chain([None], waits()):
        try:
            with explained(f"creating {kind} {name} ({service}:{operation})"):
                getattr(aws.client(service), _method(operation))(**request)
        except AwsError as error:
            if error.code == is_there:
                return False
            if error.code in _AT_ONCE:
                if time.monotonic() - began < _PATIENCE_S:
                    continue
            elif not was_known and not may_pass(error):
                ledger.gone(kind, name)
            raise
        break
    return True


def remove(aws: Aws, ledger: Ledger, kind: Kind, name: str) -> bool:
    """Remove one thing, and return whether it was there. Raises `AwsError` where it is and stays."""
    service, _, method, parameter = _OPERATIONS[kind]
    operation = "".join(word.capitalize() for word in method.split("_"))
    try:
        with explained(f"removing {kind} {name} ({service}:{operation})"):
            getattr(aws.client(service), method)(**{parameter: name})
    except AwsError as error:
        over = (kind == "transform-job" and _is_over(aws, name)) or (kind == "endpoint" and _is_going(aws, name))
        if not over and not is_missing(error):
            raise
        ledger.gone(kind, name)
        return False
    ledger.gone(kind, name)
    return True


def is_missing(error: AwsError) -> bool:
    """Return whether AWS says that there is no such thing; SageMaker has no code of its own for it."""
    return error.code in {"ResourceNotFound", "ResourceNotFoundException"} or (
        error.code == "ValidationException"
        and any(said in str(error).lower() for said in ("could not find", "requested resource not found"))
    )


def may_pass(error: AwsError) -> bool:
    """Return whether AWS could not be reached or was in trouble of its own, so that asking again may help."""
    return type(error) in {AwsError, Throttled} and is_passing(error)


def is_busy(error: AwsError) -> bool:
    """Return whether AWS cannot remove an endpoint now, as it is just being created or changed."""
    return error.code == "ValidationException" and "in-progress" in str(error).lower()


def _is_going(aws: Aws, endpoint: str) -> bool:
    """Return whether an endpoint is being deleted, which cannot be asked for twice."""
    try:
        with explained(f"looking at endpoint {endpoint} (sagemaker:DescribeEndpoint)"):
            found = aws.client("sagemaker").describe_endpoint(EndpointName=endpoint)
    except AwsError:
        return False
    return bool(found["EndpointStatus"] == "Deleting")


def _is_over(aws: Aws, transform: str) -> bool:
    """Return whether a transform job has ended by itself; those stay in the account's list for ever."""
    try:
        with explained(f"looking at transform job {transform} (sagemaker:DescribeTransformJob)"):
            found = aws.client("sagemaker").describe_transform_job(TransformJobName=transform)
    except AwsError:
        return False
    return found["TransformJobStatus"] in {"Completed", "Failed", "Stopped", "Stopping"}


def _method(operation: str) -> str:
    """Return boto3's name of an operation.

    >>> _method("CreateEndpointConfig")
    'create_endpoint_config'
    """
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in operation).lstrip("_")


def names(aws: Aws, kind: Kind, contains: str = PREFIX, **more: str) -> Iterator[dict[str, Any]]:
    """Yield what AWS lists of a kind, page by page, of those whose names begin with ``contains``.

    Each is AWS's own record, with ``Name`` and ``CreationTime`` added where they are called otherwise.
    """
    operation, key, name, created = _LISTS[kind]
    service = _OPERATIONS[kind][0]
    wanted = {"NamePrefix": contains} if kind == "schedule" else {"NameContains": contains.rstrip("-")}
    with explained(f"listing {kind}s ({service}:{''.join(word.capitalize() for word in operation.split('_'))})"):
        for page in aws.client(service).get_paginator(operation).paginate(**wanted, **more):
            for record in page[key]:
                if record[name].startswith(contains):
                    yield {**record, "Name": record[name], "CreationTime": record.get(created)}


_LISTS: Mapping[Kind, tuple[str, str, str, str]] = {
    "schedule": ("list_schedules", "Schedules", "Name", "CreationDate"),
    "model": ("list_models", "Models", "ModelName", "CreationTime"),
    "endpoint-config": ("list_endpoint_configs", "EndpointConfigs", "EndpointConfigName", "CreationTime"),
    "endpoint": ("list_endpoints", "Endpoints", "EndpointName", "CreationTime"),
    "transform-job": ("list_transform_jobs", "TransformJobSummaries", "TransformJobName", "CreationTime"),
}
"""Operation, key of the page, keys of name and time of creation."""


def tags_of(aws: Aws, arn: str) -> dict[str, str]:
    """Return a resource's tags; none where it is gone."""
    found: dict[str, str] = {}
    try:
        with explained(f"reading the tags of {arn} (sagemaker:ListTags)"):
            for page in aws.client("sagemaker").get_paginator("list_tags").paginate(ResourceArn=arn):
                found |= {tag["Key"]: tag["Value"] for tag in page["Tags"]}
    except AwsError as error:
        if not is_missing(error):
            raise
    return found


def own_tags(aws: Aws, run: str) -> dict[str, str]:
    """Return detkit's tags for what is created now."""
    return {"detkit:run": run, OWNER: owner(aws)}


def owner(aws: Aws) -> str:
    """Return who the credentials are: the last part of their ARN, else the user of this machine.

    A session that botocore named by the time is another one every hour; then it is the role's name.
    """
    who, _, name = aws.identity["Arn"].rpartition("/")
    if _BY_TIME.fullmatch(name):
        name = who.rpartition("/")[2]
    return name or getpass.getuser()


def iso(t: float) -> str:
    """Return a POSIX time as ISO 8601 in UTC, in whole seconds."""
    return datetime.fromtimestamp(t, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def from_iso(text: str) -> float | None:
    """Read what `iso` wrote; None for `NEVER` and anything else."""
    try:
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        return None


def waits() -> Iterator[None]:
    """Sleep between looks, longer with time: a real account takes minutes, a simulator no time."""
    began = time.monotonic()
    while True:
        time.sleep(min(max((time.monotonic() - began) * _SHARE, _FIRST_WAIT_S), _LONGEST_WAIT_S))
        yield


def last_lines(aws: Aws, group: str, prefix: str) -> str:
    """Return the last lines that a container wrote; empty where they may not be read, lest that hide why it failed."""
    try:
        return logs.tail(aws, group, prefix, _LOG_LINES)
    except AwsError:
        return ""


Tell: TypeAlias = Callable[[str], object]
"""Takes a line about how it goes."""


def to_stderr(line: str) -> None:
    """Print where everything goes that is no answer."""
    print(line, file=sys.stderr, flush=True)
