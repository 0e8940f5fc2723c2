"""Endpoints that are there: talked to, listed, and removed, also those that a crash or another machine left.

What is there is asked of AWS every time. The ledger says what this machine began and did not finish.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from detkit.backends import Endpoint
from detkit.errors import DetkitWarning, Unsupported, UsageError
from detkit_sagemaker import answers, creating, hosting, pricing, resources, uploads
from detkit_sagemaker.answers import Answers
from detkit_sagemaker.aws import Aws, AwsError, explained
from detkit_sagemaker.invoking import MOST_BYTES, MOST_BYTES_SERVERLESS, EndpointDetector
from detkit_sagemaker.ledger import Kind, Ledger
from detkit_sagemaker.recovery import going_on
from detkit_sagemaker.resources import EXPIRES, OWNER, PREFIX, iso

if TYPE_CHECKING:
    from detkit.backends import PredictOptions
    from detkit.job import Model

DELETES = {"": ("deleteEndpoint", "EndpointName"), "-config": ("deleteEndpointConfig", "EndpointConfigName"),
           "-model": ("deleteModel", "ModelName")}  # fmt: skip
"""Schedules of a deployment by what is added to its name: the operation that each calls, and its parameter."""

_SETTLED_S = 3600.0
"""What was begun so long ago, and nothing uses, was left behind; younger, it may be under way in another process."""


def remove_all(aws: Aws, ledger: Ledger, name: str) -> bool:
    """Remove an endpoint with all that was made for it, and return whether any of it was there.

    What would delete it later goes last, and stays where the endpoint cannot be deleted just now. Raises `AwsError`.
    """
    found = resources.remove(aws, ledger, "endpoint", name)
    found |= resources.remove(aws, ledger, "endpoint-config", name)
    found |= resources.remove(aws, ledger, "model", name)
    for suffix in DELETES:
        found |= resources.remove(aws, ledger, "schedule", name + suffix)
    return found


class SagemakerEndpoint(Endpoint):
    """A live endpoint. Leaving the block that it is used in deletes it, with its configuration, model and schedules."""

    def __init__(self, aws: Aws, name: str, *, expires: float | None = None, model: Model | None = None) -> None:
        self.aws, self.name, self.model = aws, name, model
        self.place = f"sagemaker {aws.region}"
        self.owner = ""
        """Who created it; empty where that was this process."""
        self._expires = expires

    @property
    def arn(self) -> str:
        return self.aws.arn("sagemaker", f"endpoint/{self.name}")

    @property
    def url(self) -> str:
        """Where requests go, signed by AWS's rules."""
        return f"{self.aws.client('sagemaker-runtime').meta.endpoint_url}/endpoints/{self.name}/invocations"

    @property
    def status(self) -> str:
        """SageMaker's word, or ``Deleted``."""
        try:
            return str(self._describe()["EndpointStatus"])
        except AwsError as error:
            if resources.is_missing(error):
                return "Deleted"
            raise

    @property
    def expires(self) -> float | None:
        return self._expires

    @property
    def price_per_hour(self) -> float | None:
        variant = self._variant
        if "InstanceType" not in variant:  # serverless: waiting costs nothing
            return None
        return pricing.estimate(
            instance_type=variant["InstanceType"],
            instance_count=variant["InitialInstanceCount"],
            seconds=None,
            region=self.aws.region,
            use="hosting",
        ).price_per_hour

    def open(self, options: PredictOptions) -> EndpointDetector:
        """Return what sends images to it. Raises `Unsupported` for what only whoever opens a model can choose."""
        if options.nms_threshold is not None:
            raise Unsupported(
                f"endpoint {self.name} has the nms_threshold that it was deployed with; leave nms_threshold out"
            )
        kind, classes = self._talks()
        form = Answers(
            kind=kind,
            classes=classes,
            score_threshold=options.score_threshold,
            max_detections=options.max_detections,
        )
        most = MOST_BYTES_SERVERLESS if "ServerlessConfig" in self._variant else MOST_BYTES
        return EndpointDetector(self.aws, self.name, form, most_bytes=most)

    def delete(self) -> None:
        """Delete it with all that was made for it; what is gone already is no error."""
        try:
            remove_all(self.aws, Ledger.of(self.aws), self.name)
        except AwsError as error:
            ends = "" if self._expires is None else f"; AWS deletes it at {iso(self._expires)}"
            raise AwsError(f"{error}. try again with `detkit endpoints rm {self.name}`{ends}", error.code) from error

    def _describe(self) -> dict[str, Any]:
        with explained(f"looking at endpoint {self.name} (sagemaker:DescribeEndpoint)"):
            found: dict[str, Any] = self.aws.client("sagemaker").describe_endpoint(EndpointName=self.name)
        return found

    @cached_property
    def _variant(self) -> dict[str, Any]:
        config = self._describe()["EndpointConfigName"]
        with explained(f"looking at endpoint config {config} (sagemaker:DescribeEndpointConfig)"):
            found = self.aws.client("sagemaker").describe_endpoint_config(EndpointConfigName=config)
        variant: dict[str, Any] = found["ProductionVariants"][0]
        return variant

    def _talks(self) -> tuple[answers.Kind, tuple[str, ...]]:
        """Return how it answers and its class names: the model's at AWS says so in its environment."""
        name = self._variant["ModelName"]
        with explained(f"looking at model {name} (sagemaker:DescribeModel)"):
            found = self.aws.client("sagemaker").describe_model(ModelName=name)
        environment = found["PrimaryContainer"].get("Environment", {})
        kind = environment.get(hosting.KIND)
        if kind not in {"detkit", "object-detection", "jumpstart"}:
            raise UsageError(f"endpoint {self.name} was not deployed by detkit, so nobody knows how it answers")
        if self.model is not None:
            return kind, self.model.classes
        if hosting.CLASSES not in environment:
            raise UsageError(f"the class names of endpoint {self.name} are not known here; give the model, too")
        return kind, tuple(json.loads(environment[hosting.CLASSES]))


def list_endpoints(aws: Aws) -> list[SagemakerEndpoint]:
    """Return the endpoints that detkit deployed from any machine into the account and region, by their tags."""
    found = []
    for record in resources.names(aws, "endpoint"):
        tags = resources.tags_of(aws, record["EndpointArn"])
        if OWNER in tags and record["EndpointStatus"] != "Deleting":
            endpoint = SagemakerEndpoint(aws, record["Name"], expires=resources.from_iso(tags.get(EXPIRES, "")))
            endpoint.owner = tags[OWNER]
            found.append(endpoint)
    return found


def find_endpoint(aws: Aws, name: str, model: Model | None = None) -> SagemakerEndpoint:
    """Return the endpoint of a name. Raises `UsageError` where detkit did not deploy it, `AwsError` where none is."""
    endpoint = SagemakerEndpoint(aws, name, model=model)
    endpoint._describe()
    tags = resources.tags_of(aws, endpoint.arn)
    if OWNER not in tags:
        raise UsageError(f"endpoint {name} was not deployed by detkit: it has no tag {OWNER}")
    endpoint.owner, endpoint._expires = tags[OWNER], resources.from_iso(tags.get(EXPIRES, ""))
    return endpoint


def remove(aws: Aws, names: Sequence[str] | None = None, *, expired: bool = False) -> list[str]:
    """Remove endpoints with all that was made for them, and return the names of which anything was there.

    Those named; or with ``expired`` all whose time is over; or else all of whoever the credentials are. Without names,
    also what is left over: of deployments, transforms and uploads that ended half-way here, and of what others left
    more than an hour ago. What is gone already is no error. Raises `UsageError` for an endpoint that is not detkit's.
    """
    ledger = Ledger.of(aws)
    if names:
        for name in names:
            _refuse_foreign(aws, name)
        return _each(names, lambda name: remove_all(aws, ledger, name))
    there, me = list_endpoints(aws), resources.owner(aws)
    if expired:
        doomed = [one for one in there if one.expires is not None and one.expires < time.time()]
    else:
        doomed = [one for one in there if one.owner == me]
        others = [f"{one.name} ({one.owner})" for one in there if one.owner != me]
        if others:
            warnings.warn(
                f"left alone, as others deployed them: {', '.join(others)}; name them to remove them",
                DetkitWarning,
                stacklevel=2,
            )
        follow = {
            creating.TRAINING: "detkit runs attach NAME --backend sagemaker",
            creating.TUNING: "detkit tune --resume STUDY",
        }
        for kind, command in follow.items():
            if jobs := going_on(aws, kind):
                told = f"{kind.noun}s that were begun here go on: {', '.join(jobs)}"
                warnings.warn(f"{told}; `{command}`", DetkitWarning, stacklevel=2)
    uploads.clear_abandoned(aws)
    alive = {one.name for one in there}
    names = [*(one.name for one in doomed), *_left_over(aws, ledger, alive)]

    def clear(name: str) -> bool:
        stopped = name not in alive and resources.remove(aws, ledger, "transform-job", name)
        return remove_all(aws, ledger, name) or stopped

    return _each(names, clear)


def _each(names: Sequence[str], act: Callable[[str], bool]) -> list[str]:
    """Return the names for which something was done; one that fails does not hold up the others."""
    done, failed = [], []
    for name in names:
        try:
            if act(name):
                done.append(name)
        except AwsError as error:
            failed.append(error)
    if failed:
        told = "\n".join(map(str, failed))
        raise AwsError(f"{told}\nremoved: {', '.join(done) or 'nothing'}; try the others again later", failed[0].code)
    return done


def _refuse_foreign(aws: Aws, name: str) -> None:
    """Raise `UsageError` for an endpoint that is there and that detkit did not make."""
    try:
        find_endpoint(aws, name)
    except AwsError as error:
        if not resources.is_missing(error):
            raise
        if not name.startswith(PREFIX):
            raise UsageError(f"{name} is no name of detkit's; they begin with {PREFIX!r}") from error


def _left_over(aws: Aws, ledger: Ledger, alive: set[str]) -> list[str]:
    """Return the names of which something is there that no endpoint and no running transform uses."""
    abandoned, under_way, jobs = set[str](), set[str](), set[str]()
    for entry in ledger.pending():
        if entry.kind in resources.KINDS:
            is_over = entry.is_abandoned or time.time() - entry.t > _SETTLED_S
            (abandoned if is_over else under_way).add(_stem(entry.kind, entry.name))
            if entry.kind == "transform-job" and entry.is_abandoned:
                jobs.add(entry.name)
    running = {record["Name"] for record in resources.names(aws, "transform-job", StatusEquals="InProgress")}
    settled: set[str] = set()
    for record in resources.names(aws, "schedule"):
        if record["Target"]["Arn"].rpartition(":")[2] in {operation for operation, _ in DELETES.values()}:
            settled |= _old(_stem("schedule", record["Name"]), record["CreationTime"])
    both: dict[Kind, str] = {"model": "ModelArn", "endpoint-config": "EndpointConfigArn"}
    for kind, arn in both.items():
        for record in resources.names(aws, kind):
            name = record["Name"]
            if name not in alive | abandoned | under_way | running and OWNER in resources.tags_of(aws, record[arn]):
                settled |= _old(name, record["CreationTime"])
    # A running job is somebody's, unless whoever waited for it here is no more.
    return sorted((jobs | ((abandoned | settled) - under_way - running)) - alive)


def _old(name: str, created: datetime) -> set[str]:
    return {name} if time.time() - created.timestamp() > _SETTLED_S else set()


def _stem(kind: str, name: str) -> str:
    """Return the name that everything of a deployment has, from that of one of its schedules, too."""
    if kind == "schedule":
        for suffix in filter(None, DELETES):
            name = name.removesuffix(suffix)
    return name
