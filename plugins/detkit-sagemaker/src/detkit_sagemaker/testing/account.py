"""The simulated account: what exists in it, its clients of the other services, and the threads that do its work."""

from __future__ import annotations

import functools
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from detkit_sagemaker.testing.containers import Images
from detkit_sagemaker.testing.faults import Faults
from detkit_sagemaker.testing.quotas import Quotas
from detkit_sagemaker.testing.refusals import Exists, NotFound, Refused
from detkit_sagemaker.testing.storage import Storage
from detkit_sagemaker.testing.validation import botocore_session

Json = dict[str, Any]
TICK = 0.05
"""Seconds between two looks at what runs."""

USER_KEY, INTERNAL_KEY = (f"ASIA{secrets.token_hex(16).upper()}" for _ in range(2))
"""Access keys that nobody can guess: the user's, and that of the simulator and its containers, whom no fault meets.

They are a process's and not an account's, since a boto3 session keeps the key that it was first used with.
"""

SECRET = secrets.token_hex(20)

log = logging.getLogger("detkit.sagemaker.simulator")


class Account:
    """One account in one region. Its number is moto's."""

    number = "123456789012"

    def __init__(
        self,
        region: str,
        folder: Path,
        images: Images,
        faults: Faults,
        *,
        environment: dict[str, str],
        grace: float,
        mounted: bool,
        keep: bool,
    ) -> None:
        self.region = region
        self.folder = folder
        self.images = images
        self.faults = faults
        self.quotas = Quotas(self)
        self.environment = environment
        """What a client needs to reach this account."""
        self.mounted = mounted
        """Whether containers have an ``/opt/ml``."""
        self.keep = keep
        """Whether what a container was given and left stays on the disk when it has ended."""
        self.grace = grace
        """Seconds between SIGTERM and SIGKILL for a container that is stopped."""
        self.elapsed = timedelta()
        """How far the clock of the schedules is ahead."""
        self.closing = threading.Event()
        self.lock = threading.RLock()
        """Held while resources, or what describes them, change."""
        self._resources: dict[tuple[type[Resource], str], Resource] = {}
        self._clients: dict[str, Any] = {}
        self._threads: list[threading.Thread] = []

    def client(self, service: str) -> Any:
        """Return a boto client of this account that no fault meets."""
        from botocore.config import Config

        with self.lock:
            if service not in self._clients:
                self._clients[service] = botocore_session().create_client(
                    service,
                    region_name=self.region,
                    endpoint_url=self.environment["AWS_ENDPOINT_URL"],
                    aws_access_key_id=INTERNAL_KEY,
                    aws_secret_access_key=SECRET,
                    config=Config(
                        max_pool_connections=50,
                        proxies={},
                        ignore_configured_endpoint_urls=True,
                        use_fips_endpoint=False,
                        use_dualstack_endpoint=False,
                        retries={"total_max_attempts": 1},
                        request_checksum_calculation="when_required",
                        response_checksum_validation="when_required",
                    ),
                )
            return self._clients[service]

    @property
    def container_environment(self) -> dict[str, str]:
        """What a container needs to reach this account, with credentials of its own, which do not expire."""
        return {**self.environment, "AWS_ACCESS_KEY_ID": INTERNAL_KEY}

    @functools.cached_property
    def storage(self) -> Storage:
        """The account's S3."""
        return Storage(self.client("s3"))

    def arn(self, kind: str, name: str) -> str:
        """Return the ARN of a SageMaker resource."""
        return f"arn:aws:sagemaker:{self.region}:{self.number}:{kind}/{name}"

    def check_role(self, role: str, service: str = "sagemaker.amazonaws.com") -> None:
        """Raise `Refused` unless the role exists and the service may take it."""
        from botocore.exceptions import ClientError

        said = f"Could not assume role {role}. Please ensure that the role exists and allows principal '{service}'"
        if role.split(":")[4] != self.number:
            raise Refused(f"Cross-account pass role is not allowed: {role}", "AccessDeniedException")
        try:
            found = self.client("iam").get_role(RoleName=role.rsplit("/", 1)[-1])["Role"]
        except ClientError as error:
            raise Refused(said) from error
        if found["Arn"] != role or service not in str(found["AssumeRolePolicyDocument"]):
            raise Refused(said)

    def add(self, resource: Resource) -> None:
        """Take in a resource. Raises `Exists` where its name is taken."""
        with self.lock:
            key = type(resource), resource.name
            if key in self._resources:
                raise Exists(f'Cannot create already existing {resource.noun} "{resource.arn}".')
            self._resources[key] = resource

    def remove(self, resource: Resource) -> None:
        """Forget a resource."""
        with self.lock:
            self._resources.pop((type(resource), resource.name), None)

    def find(self, kind: type[R], name: str) -> R:
        """Return a resource. Raises `NotFound`."""
        with self.lock:
            found = self._resources.get((kind, name))
        if found is None:
            if kind.unknown:
                raise Refused(kind.unknown)
            raise NotFound(f'Could not find {kind.noun} "{self.arn(kind.kind, name)}".')
        return found  # type: ignore[return-value]

    def all(self, kind: type[R]) -> list[R]:
        """Return the resources of a kind, the oldest first."""
        with self.lock:
            return [resource for resource in self._resources.values() if isinstance(resource, kind)]

    def with_arn(self, arn: str) -> Resource:
        """Return the resource of an ARN. Raises `NotFound`."""
        for resource in self.all(Resource):
            if resource.arn == arn:
                return resource
        raise NotFound(f'Could not find resource "{arn}".')

    def start(self, work: Callable[[], None], name: str) -> threading.Thread:
        """Do something in a thread of its own; `close` waits for it."""
        thread = threading.Thread(target=work, name=name, daemon=True)
        with self.lock:
            self._threads = [one for one in self._threads if one.is_alive()]
            self._threads.append(thread)
        thread.start()
        return thread

    def close(self) -> None:
        """End everything that runs."""
        self.closing.set()
        with self.lock:
            threads, clients = list(self._threads), list(self._clients.values())
        for thread in threads:
            thread.join(timeout=20)
        for client in clients:
            client.close()


class Resource:
    """Something that has a name, an ARN and tags. The answer to its Describe operation is made from its request."""

    kind: ClassVar[str] = ""
    """In ARNs: ``training-job``."""
    noun: ClassVar[str] = "resource"
    """In messages: ``training job``."""
    title: ClassVar[str] = ""
    """In the names of members: ``TrainingJob`` of ``TrainingJobName``."""
    unknown: ClassVar[str] = ""
    """What AWS says where there is none of a name, if that is nothing like what it says of other kinds."""

    def __init__(self, account: Account, request: Json) -> None:
        self.account = account
        self.request = {name: value for name, value in request.items() if name != "Tags"}
        self.name: str = request[f"{self.title}Name"]
        self.arn = account.arn(self.kind, self.name)
        self.tags: dict[str, str] = {}
        self.tag(request.get("Tags", []))
        self.created = self.modified = now()
        self.status = ""
        self.failure = ""

    def tag(self, tags: list[dict[str, str]]) -> None:
        """Add tags. Raises `Refused` for those only AWS may set."""
        for tag in tags:
            if tag["Key"].lower().startswith("aws:"):
                raise Refused(f"aws: prefixed tag key names are not allowed for external use: {tag['Key']}")
        self.tags |= {tag["Key"]: tag["Value"] for tag in tags}

    @property
    def summary(self) -> Json:
        """What the List operation says."""
        return {f"{self.title}Name": self.name, f"{self.title}Arn": self.arn, "CreationTime": self.created}

    @property
    def description(self) -> Json:
        """What the Describe operation says."""
        return {**self.request, f"{self.title}Arn": self.arn, "CreationTime": self.created}

    @property
    def costs(self) -> bool:
        """Whether it is there and may cost something."""
        return True


R = TypeVar("R", bound=Resource)


class Job(Resource):
    """A resource that is a piece of work: it runs in a thread and ends by itself."""

    ended: datetime | None = None

    def __init__(self, account: Account, request: Json) -> None:
        super().__init__(account, request)
        self.status = "InProgress"
        self.stopping = threading.Event()
        """Set when the job is to stop, by the user or because the simulator closes."""

    @property
    def over(self) -> bool:
        """Whether the job has come to its end."""
        return self.status in ("Completed", "Failed", "Stopped")

    @property
    def costs(self) -> bool:
        """Whether the job runs."""
        return not self.over

    def start(self) -> None:
        """Take the job in and begin it."""
        self.account.add(self)
        self.account.start(self._run, f"{self.kind}/{self.name}")

    def stop(self) -> None:
        """Ask for the end. Raises `Refused` where it is over."""
        with self.account.lock:
            if self.over:
                raise Refused(f"The request was rejected because the {self.noun} is in status {self.status}.")
            self.status, self.modified = "Stopping", now()
        self.stopping.set()

    def dwell(self) -> bool:
        """Stay in a state as long as the faults ask; return whether the job is to go on."""
        return not self.wait(self.account.faults.seconds_per_state)

    def wait(self, seconds: float) -> bool:
        """Wait; return True, at once, when the job is to stop."""
        for _ in ticks(seconds):
            if self.account.closing.is_set() or self.stopping.wait(min(TICK, seconds)):
                return True
        return self.account.closing.is_set() or self.stopping.is_set()

    def end(self, status: str, failure: str = "") -> None:
        """Set the last status."""
        with self.account.lock:
            self.status, self.failure = status, failure[:1024]
            self.ended = self.modified = now()

    def run(self) -> None:
        """Do the work, and call `end`. What it raises fails the job."""
        raise NotImplementedError

    def _run(self) -> None:
        try:
            self.run()
        except Refused as error:
            self.end("Failed", f"ClientError: {error.message}")
        except Exception as error:
            if not self.account.closing.is_set():
                log.exception("the simulator failed in %s %s", self.noun, self.name)
            self.end("Failed", f"InternalServerError: the simulator failed: {error!r}")


def ticks(seconds: float) -> Iterator[None]:
    """Yield as often as `TICK` goes into some seconds."""
    for _ in range(round(seconds / TICK)):
        yield


def now() -> datetime:
    """Return the time as AWS gives it."""
    return datetime.now(UTC)
