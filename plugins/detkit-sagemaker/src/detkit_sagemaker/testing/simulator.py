"""A simulated AWS account on the loopback."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from detkit_sagemaker.testing import hub
from detkit_sagemaker.testing.account import SECRET, USER_KEY, Account, Job, Json, Resource
from detkit_sagemaker.testing.containers import Images, can_mount, discard
from detkit_sagemaker.testing.faults import Faults
from detkit_sagemaker.testing.server import Endpoint

_ROLE = "detkit-simulator"
_TRUST = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Principal": {"Service": ["sagemaker.amazonaws.com", "scheduler.amazonaws.com"]},
            "Action": "sts:AssumeRole",
        }
    ],
}

_LOOPBACK = "127.0.0.1,localhost"

_SERVICES = (
    *("S3", "SAGEMAKER", "SAGEMAKER_RUNTIME", "CLOUDWATCH", "CLOUDWATCH_LOGS", "STS", "IAM", "ECR", "CODEBUILD"),
    *("SCHEDULER", "SERVICE_QUOTAS"),
)
"""Services that are used, as they stand in ``AWS_ENDPOINT_URL_<SERVICE>``, which wins over ``AWS_ENDPOINT_URL``."""

_FOREIGN = (
    *("AWS_CA_BUNDLE", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT"),
)
"""Variables of a user's own account, which mean nothing in this one, and for which there is no value that says so."""

_open = threading.Lock()
"""Held while a simulator is open: moto keeps its state per process."""


class Simulator:
    """An AWS account that answers on the loopback: S3, SageMaker, Logs, STS, IAM, ECR, Scheduler, Service Quotas.

    Training jobs, endpoints and transform jobs are really executed, each as a process. Use it as a context manager;
    one at a time in a process::

        with Simulator(images={"mine:latest": ["python", "-m", "mine"]}) as aws:
            subprocess.run([...], env={**os.environ, **aws.environment})
    """

    def __init__(
        self,
        images: Mapping[str, Sequence[str]] | None = None,
        folder: Path | str | None = None,
        *,
        region: str = "us-east-1",
        port: int = 0,
        grace: float = 120.0,
        opt_ml: bool = False,
        keep: bool = False,
    ) -> None:
        """Prepare an account; nothing runs before it is entered.

        ``images`` are the containers: ``repository:tag`` or a whole URI, and the command that stands for its
        entrypoint; ``train`` or ``serve`` is appended. ``folder`` is where the containers' ``/opt/ml`` are; without one
        it is temporary. With ``keep`` their data and models stay there, else they go when a container has ended.
        ``port`` 0 is any free one. ``grace`` are the seconds from SIGTERM to SIGKILL for a training job that is stopped
        (120 at AWS). With ``opt_ml`` containers find their folder at ``/opt/ml``, where the machine allows that to
        processes; without, at ``SAGEMAKER_BASE_DIR``.
        """
        self.region = region
        self.faults = Faults()
        """What goes wrong, on demand."""
        self._images = Images({**_stand_ins(), **(images or {})})
        self._own_images = Images(images or {}).names
        self._folder, self._port, self._grace, self._mounted = folder, port, grace, opt_ml
        self._keep = keep
        self._closing = contextlib.ExitStack()
        self.environment: dict[str, str] = {}
        """Variables that lead boto3, and with it everything, to this account. Who knows them can use it."""

    def __enter__(self) -> Simulator:
        """Start the server. Raises `RuntimeError` where another simulator is open in this process."""
        if self._mounted and not can_mount():
            raise RuntimeError("opt_ml needs Linux with user namespaces, and a Python outside of /opt; leave it away")
        if not _open.acquire(blocking=False):
            raise RuntimeError("another simulator is open in this process; moto has one state for all, close it first")
        with contextlib.ExitStack() as stack:
            stack.callback(_open.release)
            self._start(stack)
            self._closing = stack.pop_all()
        atexit.register(self.close)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process and the server. May be called again."""
        atexit.unregister(self.close)
        self._closing.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        from werkzeug.serving import make_server

        if self._folder is None:
            folder = Path(tempfile.mkdtemp(prefix="detkit-sagemaker-"))
            stack.callback(discard, folder)
        else:
            folder = Path(self._folder).resolve()
            folder.mkdir(parents=True, exist_ok=True)
        account = Account(
            self.region,
            folder,
            self._images,
            self.faults,
            environment=self.environment,
            grace=self._grace,
            mounted=self._mounted,
            keep=self._keep,
        )
        endpoint = Endpoint(account)
        server = make_server("127.0.0.1", self._port, endpoint, threaded=True, request_handler=_handler())
        stack.callback(server.server_close)
        self.url = f"http://127.0.0.1:{server.server_port}"
        """Where it answers; what ``AWS_ENDPOINT_URL`` is to be."""
        self.environment |= self._variables(folder)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        stack.callback(account.close)
        self._account, self._endpoint = account, endpoint
        self._furnish()

    def _variables(self, folder: Path) -> dict[str, str]:
        # No profile, address or proxy of the user's may lead elsewhere.
        config = folder / "aws-config"
        config.write_text("[default]\n")
        spared = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), _LOOPBACK]))
        return {
            "AWS_ENDPOINT_URL": self.url,
            **{f"AWS_ENDPOINT_URL_{service}": self.url for service in _SERVICES},
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "false",
            "AWS_ACCESS_KEY_ID": USER_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_SESSION_TOKEN": "simulated",
            "AWS_DEFAULT_REGION": self.region,
            "AWS_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_PROFILE": "default",
            "AWS_DEFAULT_PROFILE": "default",
            "AWS_CONFIG_FILE": str(config),
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "no-aws-credentials"),
            "NO_PROXY": spared,
            "no_proxy": spared,
        }

    def _furnish(self) -> None:
        """Give the empty account what every user has: a role, a bucket, the images of its own registry."""
        self._endpoint.reset()
        role = self._account.client("iam").create_role(RoleName=_ROLE, AssumeRolePolicyDocument=json.dumps(_TRUST))
        self.role: str = role["Role"]["Arn"]
        """The ARN of a role that SageMaker and the scheduler may take."""
        self.bucket = f"sagemaker-{self.region}-{self._account.number}"
        """A bucket that exists."""
        hub.create_bucket(self._account.client("s3"), self.bucket, self.region)
        ecr = self._account.client("ecr")
        for name in self._own_images:
            repository, _, tag = name.partition(":")
            with contextlib.suppress(ecr.exceptions.RepositoryAlreadyExistsException):
                ecr.create_repository(repositoryName=repository)
            kind = "application/vnd.oci.image.manifest.v1+json"
            config = {"digest": f"sha256:{hashlib.sha256(name.encode()).hexdigest()}", "size": 0}
            manifest = {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": []}
            ecr.put_image(repositoryName=repository, imageTag=tag, imageManifest=json.dumps(manifest))

    def image(self, name: str) -> str:
        """Return the URI of one of the account's own images, e.g. of ``"echo:latest"``."""
        return f"{self._account.number}.dkr.ecr.{self.region}.amazonaws.com/{name}"

    @property
    def created(self) -> list[tuple[str, Json]]:
        """Every create call that got through, with its request, the oldest first; also ``CreateSchedule``."""
        return list(self._endpoint.created)

    @property
    def calls(self) -> list[str]:
        """The name of every call that arrived, the oldest first, also of those that were refused."""
        return list(self._endpoint.calls)

    def live(self, kind: str = "") -> list[str]:
        """Return the names of everything that exists and may cost: endpoints, models, running jobs, schedules.

        ``kind`` is one of ``training-job``, ``transform-job``, ``hyper-parameter-tuning-job``, ``model``,
        ``endpoint-config``, ``endpoint`` and ``schedule``; all of them without.
        """
        found = [(one.kind, one.name) for one in self._account.all(Resource) if one.costs]
        found += [("schedule", name) for name in self._endpoint.schedules.names]
        return sorted(name for of, name in found if kind in ("", of))

    def elapse(self, seconds: float) -> None:
        """Let time pass for the schedules: what is due in the next ``seconds`` is due now."""
        self._account.elapsed += timedelta(seconds=seconds)
        self._endpoint.schedules.changed()

    def wait(self, seconds: float = 60.0) -> None:
        """Wait until no job runs. Raises `TimeoutError`."""
        for _ in range(round(seconds / 0.05)):
            running = [job for job in self._account.all(Job) if job.kind != "endpoint" and not job.over]
            if not running:
                return
            self._account.closing.wait(0.05)
        raise TimeoutError(f"after {seconds:g} s there still runs {', '.join(job.name for job in running)}")


def serve_forever(
    port: int = 4566,
    images: Mapping[str, Sequence[str]] | None = None,
    folder: Path | str | None = None,
    faults: Sequence[str] = (),
) -> None:
    """Serve an account until Ctrl-C or SIGTERM, after the lines to type into another shell were printed.

    What the containers had is kept in ``folder``, where one is given. ``faults`` happen from the beginning, see
    `Faults.cause`, which raises what this does.
    """
    account = Simulator(images=images, port=port, folder=folder, keep=folder is not None)
    for fault in faults:
        account.faults.cause(fault)
    if threading.current_thread() is threading.main_thread():
        for ending in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, ending):
                signal.signal(getattr(signal, ending), signal.default_int_handler)
    with account as aws:
        for line in exports(aws):
            print(line)
        if faults:
            print(f"# faults: {', '.join(faults)}")
        print(f"# role {aws.role}, bucket {aws.bucket}; Ctrl-C ends it and everything that runs in it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def exports(aws: Simulator) -> Iterator[str]:
    """Yield the shell lines that lead a shell to an account."""
    import shlex

    yield f"unset {' '.join(_FOREIGN)}"
    for name, value in aws.environment.items():
        yield f"export {name}={shlex.quote(value)}"


def _stand_ins() -> dict[str, list[str]]:
    """Return AWS's own images that are known here, each as the command of its stand-in."""
    command = [sys.executable, "-m", "detkit_sagemaker.container.stand_ins"]
    known = {"object-detection:1": [*command, "object-detection"]}
    return known | {uri.replace("{region}", "us-east-1"): [*command, "jumpstart"] for uri in hub.images()}


def _handler() -> type[Any]:
    from moto.moto_server.werkzeug_app import MotoRequestHandler

    class Handler(MotoRequestHandler):
        """moto's, without a line on stderr for every request."""

        def log(self, type: str, message: str, *args: Any) -> None:
            logging.getLogger("detkit.sagemaker.simulator.http").debug(message.rstrip(), *args)

        def connection_dropped(self, error: BaseException, environ: Any = None) -> None:
            self.close_connection = True

    return Handler
