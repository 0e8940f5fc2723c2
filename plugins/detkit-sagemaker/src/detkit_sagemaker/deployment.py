"""Endpoints that cannot be forgotten.

Before an endpoint, schedules are created by which AWS itself deletes it, and what belongs to it, when its time is
over; no process of detkit's has to live for that. Everything has one name, is in the ledger before it is created, and
goes together: the endpoint first, what would delete it last.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from detkit.durations import duration
from detkit.errors import MissingSettings, UsageError
from detkit.plans import Plan
from detkit_sagemaker import hosting, logs, pricing, requests, resources
from detkit_sagemaker.aws import AccessDenied, Aws, AwsError, CredentialsExpired, explained
from detkit_sagemaker.defaults import complete, role_arn
from detkit_sagemaker.endpoints import DELETES, SagemakerEndpoint, remove_all
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.options import DeployOptions
from detkit_sagemaker.policies import SCHEDULER_ROLE, Policies, policy
from detkit_sagemaker.resources import Step, Tell, iso
from detkit_sagemaker.spending import approve

if TYPE_CHECKING:
    from detkit.job import Model

SCHEDULER_VARIABLE = "DETKIT_SCHEDULER_ROLE"
"""Environment variable with the role, name or ARN, by which EventBridge Scheduler deletes endpoints."""

_LATER_S = 120.0
"""An endpoint's configuration and model go so long after it at most; the scheduler is exact to a minute."""

_RETRIES, _RETRY_S = 185, 86400
"""The most that the scheduler takes: it tries again for a day where the call fails."""


class DeploymentFailed(AwsError):
    """No endpoint came of it. What had been created was removed, or the message says what was not."""


class ScheduleRefused(UsageError):
    """The schedule that would delete the endpoint cannot be created, so the endpoint was not, either."""


def plan_deployment(
    model: Model, options: DeployOptions, aws: Aws | None = None, *, scheduler_role: str | None = None
) -> Plan:
    """Return what `deploy` would do: exact requests, money, and what travels. Creates nothing."""
    return _Deployment.prepare(model, options, aws, scheduler_role).plan()


def deploy(
    model: Model,
    options: DeployOptions,
    aws: Aws | None = None,
    *,
    scheduler_role: str | None = None,
    tell: Tell = resources.to_stderr,
) -> SagemakerEndpoint:
    """Let a model answer at an endpoint, and return that once it does. Without ``keep`` AWS deletes it after ``ttl``.

    ``scheduler_role`` is a role's name or ARN, else ``DETKIT_SCHEDULER_ROLE``, else ``detkit-scheduler``. Where
    anything fails, or on Ctrl-C, everything is removed again. Raises `MissingSettings`, `UsageError` for what costs
    money unsaid, `ScheduleRefused`, and `DeploymentFailed` with the reason and the container's last lines.
    """
    prepared = _Deployment.prepare(model, options, aws, scheduler_role)
    approve(prepared.plan(), prepared.options)
    return prepared.start(tell)


@dataclass(frozen=True, kw_only=True)
class _Deployment:
    """All that a deployment needs; until `start` it was only looked at."""

    aws: Aws
    model: Model
    name: str
    root: str
    container: hosting.Container
    options: DeployOptions
    notes: tuple[str, ...]
    expires: float | None
    steps: tuple[Step, ...]

    @classmethod
    def prepare(cls, model: Model, given: DeployOptions, aws: Aws | None, scheduler_role: str | None) -> _Deployment:
        options, completed = complete(given)
        role = _check(model, options)
        aws = aws or Aws(options.region)
        root = hosting.root_of(aws, options)
        container = hosting.container_of(
            model, aws, root, image_uri=options.image_uri, instance_type=options.instance_type
        )
        name = requests.job_name(model.manifest.model[:40])
        expires = None if options.ttl is None else time.time() + options.ttl
        end = resources.NEVER if expires is None else iso(expires)
        tags = resources.own_tags(aws, model.path.absolute().parent.name) | {resources.EXPIRES: end}
        create_model = requests.model_request(
            name=name,
            image=container.image,
            role=role_arn(role, partition=aws.partition, account=aws.account),
            model_data=container.artifact,
            options=options,
            environment=container.environment,
            isolated=container.isolated,
            tags=tags,
        )
        create_config = requests.endpoint_config_request(name=name, model=name, options=options, tags=tags)
        create_endpoint = requests.endpoint_request(name=name, config=name, options=options, tags=tags)
        steps: tuple[Step, ...] = (
            Step("model", name, create_model),
            Step("endpoint-config", name, create_config),
            Step("endpoint", name, create_endpoint),
        )
        if expires is not None:
            arn = _scheduler_role(aws, scheduler_role)
            later = min(_LATER_S, (options.ttl or 0) / 4)
            times = {"": expires, "-config": expires + later, "-model": expires + later}
            steps = (*(_schedule(aws, name, suffix, t, arn) for suffix, t in times.items()), *steps)
        return cls(
            aws=aws,
            model=model,
            name=name,
            root=root,
            container=container,
            options=options,
            notes=completed.notes(),
            expires=expires,
            steps=steps,
        )

    def plan(self) -> Plan:
        options, cost = self.options, _estimate(self.aws, self.options)
        where = "serverless" if options.serverless else f"{options.instance_count} x {options.instance_type}"
        if self.expires is None:
            end = f"nothing ends it: it is paid until `detkit endpoints rm {self.name}`"
        else:
            end = f"AWS deletes it by itself after {duration(options.ttl or 0)}, at {iso(self.expires)}"
        return Plan(
            place=f"SageMaker endpoint in {self.aws.region}, {where}",
            notes=(*self.notes, end),
            uploads={"bytes": self.container.bytes_to_upload, "files": int(bool(self.container.to_upload))},
            requests=tuple((step.operation, step.request) for step in self.steps),
            worst_case_s=options.ttl,
            price_per_hour=cost.price_per_hour,
            price_source=cost.source,
            concerns=hosting.look_at_account(self.container, options, self.steps, self.aws, self.root),
        )

    def start(self, tell: Tell) -> SagemakerEndpoint:
        ledger = Ledger.of(self.aws)
        self.container.bring(self.aws, self.options.kms_key)
        if self._is_over:  # a schedule of the past may never delete anything
            raise DeploymentFailed(
                f"the time of endpoint {self.name} was over when its model was uploaded, and nothing was created; try "
                "again, as the model is there now, or give it more ttl"
            )
        try:
            for step in self.steps:
                if step.kind == "endpoint" and self._is_over:
                    raise DeploymentFailed(
                        f"the time of endpoint {self.name} was over before it was created; give it more ttl"
                    )
                self._create(ledger, step)
            self._wait(tell)
        except CredentialsExpired as error:
            raise CredentialsExpired(f"{error}. {self._left()}", error.code) from error
        except BaseException as error:
            left = self._roll_back(ledger, tell)
            if isinstance(error, AwsError):
                left = left or "everything was removed again" + (
                    "; try again later" if resources.may_pass(error) else ""
                )
                raise DeploymentFailed(f"{error}. {left}", error.code) from error
            if left:
                tell(left)
            raise
        price = _estimate(self.aws, self.options)
        end = "it stays until it is deleted" if self.expires is None else f"AWS deletes it at {iso(self.expires)}"
        tell(f"endpoint {self.name}: {price}. {end}; before that: detkit endpoints rm {self.name}")
        return SagemakerEndpoint(self.aws, self.name, expires=self.expires, model=self.model)

    @property
    def _is_over(self) -> bool:
        return self.expires is not None and time.time() > self.expires

    def _create(self, ledger: Ledger, step: Step) -> None:
        try:
            resources.create(self.aws, ledger, step)
        except AwsError as error:
            if step.kind == "schedule" and _is_about_rights(error):
                self._refuse(step, error)
            raise

    def _refuse(self, step: Step, error: AwsError) -> NoReturn:
        role = str(step.request["Target"]["RoleArn"])
        needed = replace(Policies.of(self.aws), scheduler_role=role.rpartition(":role/")[2])
        user, scheduler = (json.dumps(policy(part), indent=2) for part in (needed.schedule, needed.expiry))
        raise ScheduleRefused(
            f"{error}\nAWS is to delete the endpoint when its time is over, and that cannot be scheduled, so nothing "
            f"was deployed. whoever deploys needs this policy:\n{user}\nand the role {role} has to exist "
            f"(`detkit sagemaker setup --apply` makes it; else {SCHEDULER_VARIABLE}), trusted by the scheduler, "
            f"with this policy:\n{scheduler}\nor say keep=True (--keep) without ttl, and delete the endpoint yourself"
        ) from error

    def _wait(self, tell: Tell) -> None:
        told, began = "", time.monotonic()
        for _ in resources.waits():
            with explained(f"looking at endpoint {self.name} (sagemaker:DescribeEndpoint)"):
                found = self.aws.client("sagemaker").describe_endpoint(EndpointName=self.name)
            status = str(found["EndpointStatus"])
            if status != told:
                tell(f"endpoint {self.name}: {status} after {duration(time.monotonic() - began)}")
                told = status
            if self._is_over and status != "Failed":
                raise DeploymentFailed(f"endpoint {self.name} is {status}, and its time is over; give it more ttl")
            if status == "InService":
                return
            if status not in {"Creating", "Updating", "SystemUpdating"}:
                reason = found.get("FailureReason") or "SageMaker gives no reason"
                log = resources.last_lines(self.aws, f"{logs.ENDPOINTS}/{self.name}", "all/")
                lines = f"\nlast lines of the container:\n{log}\n" if log else ""
                raise DeploymentFailed(f"endpoint {self.name} is {status}: {reason}{lines}")

    def _roll_back(self, ledger: Ledger, tell: Tell) -> str:
        """Remove everything again, and return what to say where that was not possible.

        An endpoint cannot be deleted while it is created, so that is waited for; Ctrl-C ends the waiting.
        """
        told = False
        try:
            for _ in resources.waits():
                try:
                    remove_all(self.aws, ledger, self.name)
                    return ""
                except AwsError as error:
                    if not resources.is_busy(error):
                        return f"{error}. {self._left()}"
                    if not told:
                        tell(f"endpoint {self.name}: to be deleted as soon as AWS allows it; Ctrl-C leaves it")
                        told = True
        except KeyboardInterrupt:
            pass
        return self._left()

    def _left(self) -> str:
        ends = "nothing else ends it" if self.expires is None else f"AWS deletes it at {iso(self.expires)}"
        return (
            f"{self.name} may be left at AWS, and costs money; remove it with `detkit endpoints rm {self.name}`; {ends}"
        )


def _check(model: Model, options: DeployOptions) -> str:
    """Return the execution role. Raises for everything that is missing at once, before AWS is asked anything."""
    missing = []
    if options.role is None:
        missing.append(("role", hosting.ROLE_HINT))
    if options.ttl is None and not options.keep:
        missing.append(("ttl", "2h, after which AWS deletes the endpoint; or keep=True, and you pay until you do"))
    if hosting.needs_image(model) and options.image_uri is None:
        missing.append(("image_uri", hosting.IMAGE_HINT))
    if missing or options.role is None:
        raise MissingSettings(missing)
    if options.ttl is not None and options.keep:
        raise UsageError("ttl and keep contradict each other; give ttl for an end, or keep=True for none")
    return options.role


def _is_about_rights(error: AwsError) -> bool:
    """Return whether a schedule was refused for want of a permission, or as the scheduler cannot take its role."""
    about_role = error.code == "ValidationException" and "execution role" in str(error).lower()
    return isinstance(error, AccessDenied) or about_role


def _scheduler_role(aws: Aws, chosen: str | None) -> str:
    role = chosen or os.environ.get(SCHEDULER_VARIABLE) or SCHEDULER_ROLE
    return role_arn(role, partition=aws.partition, account=aws.account)


def _schedule(aws: Aws, name: str, suffix: str, t: float, role: str) -> Step:
    """Return the creation of a schedule that deletes one thing once, at a time, and then itself."""
    operation, parameter = DELETES[suffix]
    request = {
        "Name": name + suffix,
        "Description": f"detkit: {operation} {name}",
        "ScheduleExpression": f"at({iso(t).removesuffix('Z')})",
        "ScheduleExpressionTimezone": "UTC",
        "FlexibleTimeWindow": {"Mode": "OFF"},
        "ActionAfterCompletion": "DELETE",
        "Target": {
            "Arn": f"arn:{aws.partition}:scheduler:::aws-sdk:sagemaker:{operation}",
            "RoleArn": role,
            "Input": json.dumps({parameter: name}),
            "RetryPolicy": {"MaximumRetryAttempts": _RETRIES, "MaximumEventAgeInSeconds": _RETRY_S},
        },
    }
    return Step("schedule", name + suffix, request)


def _estimate(aws: Aws, options: DeployOptions) -> pricing.Estimate:
    if options.serverless:
        return pricing.serverless(memory_size=options.memory_size, concurrency=options.concurrency, region=aws.region)
    return pricing.estimate(
        instance_type=options.instance_type,
        instance_count=options.instance_count,
        seconds=options.ttl,
        region=aws.region,
        use="hosting",
    )
