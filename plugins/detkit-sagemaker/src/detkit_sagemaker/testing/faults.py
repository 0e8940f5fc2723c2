"""What goes wrong at AWS, made to happen: throttling, refusals, expired credentials, no capacity, interruptions."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable, Mapping

from detkit.errors import InvalidValue, UnknownName
from detkit_sagemaker.testing.refusals import Refused
from detkit_sagemaker.testing.validation import service_model

_SERVICES = ("sagemaker", "sagemaker-runtime", "s3", "logs", "scheduler", "ecr", "sts", "iam", "codebuild",
             "service-quotas")  # fmt: skip
"""Whose operations can be named, the most asked for first: reading the model of a service takes a while."""


@dataclasses.dataclass
class _Refusal:
    operation: str
    code: str
    message: str
    times: int
    status: int


class DropConnection(Exception):
    """The server closes the connection without an answer."""


class Faults:
    """The faults of one simulator. Every method may be called at any time, from any thread; `clear` ends them all."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        """Let everything work again."""
        with self._lock:
            self._every = 0
            self._calls = 0
            self._refusals: list[_Refusal] = []
            self._expired = False
            self._no_capacity = 0
            self._failing_uploads = 0
            self._interruptions: list[str | None] = []
            self._crashes: dict[tuple[str, str], Callable[[], None] | None] = {}
            self._quotas: dict[str, float] = {}
            self.seconds_per_state = 0.0
            self.seconds_to_objective = 0.0

    def throttle(self, every: int = 2) -> None:
        """Refuse every ``every``-th call of any service with ``ThrottlingException``; 0 ends it."""
        with self._lock:
            self._every, self._calls = every, 0

    def refuse(
        self, operation: str, code: str = "AccessDeniedException", message: str = "", times: int = 1, status: int = 400
    ) -> None:
        """Refuse the next ``times`` calls of an operation, e.g. ``refuse("CreateEndpoint", "ResourceLimitExceeded")``.

        The operation has AWS's name and may belong to any service, S3's ``PutObject`` for one. Raises `UnknownName`.
        """
        _require_operation(operation)
        with self._lock:
            self._refusals.append(_Refusal(operation, code, message or f"{operation} is refused", times, status))

    def expire_tokens(self) -> None:
        """Refuse every call as AWS does after the credentials have expired. What runs goes on."""
        with self._lock:
            self._expired = True

    def renew_tokens(self) -> None:
        """Accept the credentials again."""
        with self._lock:
            self._expired = False

    def capacity(self, times: int = 1) -> None:
        """Let the next ``times`` jobs or endpoints find no free instance: they fail in their first state."""
        with self._lock:
            self._no_capacity = times

    def slow(self, seconds: float) -> None:
        """Stay ``seconds`` in every state that is passed through: Starting, Downloading, Creating ..."""
        with self._lock:
            self.seconds_per_state = seconds

    def late_objectives(self, seconds: float) -> None:
        """Let a tuning job know the metric of a training job only ``seconds`` after that has ended."""
        with self._lock:
            self.seconds_to_objective = seconds

    def interrupt_spot(self, job: str | None = None) -> None:
        """Take the instances away from a managed spot training job, now or as soon as it trains; None: from any one.

        Its processes are killed; it starts again in an empty folder with the checkpoints that S3 has.
        """
        with self._lock:
            self._interruptions.append(job)

    def fail_upload(self, times: int = 1) -> None:
        """Let the upload of artifacts fail at the end of the next ``times`` training jobs."""
        with self._lock:
            self._failing_uploads = times

    def crash_before(self, operation: str, callback: Callable[[], None] | None = None) -> None:
        """Call ``callback`` when the next call of an operation arrives, before it does anything.

        None: the connection is dropped without an answer. A callback may kill the client. Raises `UnknownName`.
        """
        _require_operation(operation)
        with self._lock:
            self._crashes["before", operation] = callback

    def crash_after(self, operation: str, callback: Callable[[], None] | None = None) -> None:
        """Like `crash_before`, after the operation has been done and before its answer is sent."""
        _require_operation(operation)
        with self._lock:
            self._crashes["after", operation] = callback

    def quota(self, name: str, value: float) -> None:
        """Set a service quota, e.g. ``quota("ml.g4dn.xlarge for training job usage", 0)``."""
        with self._lock:
            self._quotas[name] = value

    def cause(self, text: str) -> None:
        """Let a fault happen that is one of `WORDS`, with what it takes behind ``=``, such as ``throttle=3``.

        Raises `UnknownName` and `InvalidValue`.
        """
        word, _, value = text.partition("=")
        if word not in WORDS:
            raise UnknownName("fault", word, WORDS)
        example, pattern, begin = WORDS[word]
        found = re.fullmatch(pattern, value)
        if found is None:
            raise InvalidValue("fault", text, f"expected {example}")
        begin(self, *found.groups())

    # What the simulator asks.

    def gate(self, service: str, operation: str) -> None:
        """Let a call through, or raise `Refused` or `DropConnection`."""
        self.crash("before", operation)
        with self._lock:
            if self._expired:
                said = "The security token included in the request is expired"
                named = "ExpiredToken" if service in ("s3", "sts", "iam") else "ExpiredTokenException"
                raise Refused(said, named, 403 if service in ("sts", "iam") else 400)
            for refusal in self._refusals:
                if refusal.operation == operation and refusal.times > 0:
                    refusal.times -= 1
                    raise Refused(refusal.message, refusal.code, refusal.status)
            self._calls += 1
            if self._every and self._calls % self._every == 0:
                if service == "s3":
                    raise Refused("Please reduce your request rate.", "SlowDown", 503)
                raise Refused("Rate exceeded", "Throttling" if service in ("sts", "iam") else "ThrottlingException")

    def crash(self, when: str, operation: str) -> None:
        """Do what was asked to happen ``"before"`` or ``"after"`` an operation, once."""
        with self._lock:
            if (when, operation) not in self._crashes:
                return
            callback = self._crashes.pop((when, operation))
        if callback is None:
            raise DropConnection
        callback()

    def takes_capacity(self) -> bool:
        """Whether there is no instance for what starts now."""
        with self._lock:
            self._no_capacity -= 1
            return self._no_capacity >= 0

    def takes_upload(self) -> bool:
        """Whether the upload that comes now fails."""
        with self._lock:
            self._failing_uploads -= 1
            return self._failing_uploads >= 0

    def takes_spot(self, job: str) -> bool:
        """Whether a spot job loses its instances now."""
        with self._lock:
            for wanted in (job, None):
                if wanted in self._interruptions:
                    self._interruptions.remove(wanted)
                    return True
            return False

    def quota_of(self, name: str, default: float) -> float:
        """Return the value of a service quota."""
        with self._lock:
            return self._quotas.get(name, default)


def _require_operation(name: str) -> None:
    """Raise `UnknownName` for what is no operation of AWS: nothing would ever go wrong."""
    if not any(name in service_model(service).operation_names for service in _SERVICES):
        known = {operation for service in _SERVICES for operation in service_model(service).operation_names}
        raise UnknownName("operation of AWS", name, sorted(known))


_TIMES, _SECONDS = r"([1-9]\d*)?", r"(\d+(?:\.\d+)?)"

WORDS: Mapping[str, tuple[str, str, Callable[..., None]]] = {
    "throttle": ("throttle or throttle=3", _TIMES, lambda faults, every: faults.throttle(int(every or 2))),
    "refuse": ("refuse=CreateEndpoint:ResourceLimitExceeded", r"([A-Za-z0-9]+):(\w+)", Faults.refuse),
    "expire-tokens": ("expire-tokens", "", Faults.expire_tokens),
    "capacity": ("capacity or capacity=3", _TIMES, lambda faults, times: faults.capacity(int(times or 1))),
    "slow": ("slow=0.5", _SECONDS, lambda faults, seconds: faults.slow(float(seconds))),
    "late-objectives": ("late-objectives=5", _SECONDS, lambda faults, seconds: faults.late_objectives(float(seconds))),
    "interrupt-spot": ("interrupt-spot or interrupt-spot=JOB", r"([\w-]+)?", Faults.interrupt_spot),
    "fail-upload": ("fail-upload or fail-upload=3", _TIMES, lambda faults, times: faults.fail_upload(int(times or 1))),
    "quota": (
        "quota=ml.g4dn.xlarge for training job usage:0",
        r"(.+):(\d+)",
        lambda faults, name, value: faults.quota(name, float(value)),
    ),
}
"""Faults as they are typed: an example of each, what its value is matched by, and the method that begins it."""
