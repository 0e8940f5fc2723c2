"""A training job at AWS, as a run: what it says is copied into the run directory while somebody looks."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from detkit.errors import DetkitWarning, RunFailed, Unsupported, UsageError
from detkit.events import Event, from_line
from detkit.files import lock_file, write_json
from detkit.job import Workspace
from detkit.runs import Run, Status
from detkit_sagemaker import logs
from detkit_sagemaker.artifacts import Place, fetch_ours, fetch_theirs
from detkit_sagemaker.aws import Aws, AwsError, CredentialsExpired, code_of, explained
from detkit_sagemaker.builtin import FOREIGN, read_line
from detkit_sagemaker.ledger import Ledger

if TYPE_CHECKING:
    from pathlib import Path

RECORD = "sagemaker.json"

_SHORTEST_S, _LONGEST_S, _SHARE = 0.3, 20.0, 0.05
"""AWS is asked again after a twentieth of the job's age, within these bounds."""
_SILENCE_S = 30.0
"""After so long without a line a job is said to be silent."""
_SETTLED_S = 10.0
"""A job that AWS does not know so long after it was to be created never was."""
_GONE_S = 3600.0
_TAIL = 50
_ENDED = {"Completed", "Failed", "Stopped"}
_UNKNOWN = {"ValidationException", "ResourceNotFound"}


class RemoteJob(msgspec.Struct, frozen=True, kw_only=True):
    """``sagemaker.json``: the job at AWS that fills in the run, and how far it was followed."""

    name: str
    """The training job's."""
    region: str
    account: str
    kind: Literal["ours", "builtin", "jumpstart"]
    request: dict[str, Any]
    """As it was sent."""
    created: float
    """Seconds since the epoch (POSIX)."""
    metrics: dict[str, str] = {}
    """Expressions by metric, for the lines of images that are not ours."""
    hosting: dict[str, Any] = {}
    """What answers with the model at AWS: ``image``, ``environment``; only for images that are not ours."""
    price_per_hour: float | None = None
    """US dollars for all machines, estimated."""
    status: str = "Creating"
    """SageMaker's word, as it was last heard; ``Creating`` until AWS has the job."""
    told: int = 0
    """Changes of its state that were told."""
    tokens: dict[str, str] = {}
    """Where to go on in each log."""
    billable_s: float | None = None
    failure: str = ""
    fetched: bool = False
    """Whether everything has been brought back."""
    earlier: list[str] = []
    """Jobs that this run was resumed from."""

    @property
    def arn_tail(self) -> str:
        return f"training-job/{self.name}"


class SagemakerRun(Run):
    """A run whose worker is a training job at AWS. Ctrl-C leaves it going on there."""

    on_interrupt = "leave"

    def __init__(
        self, workspace: Workspace, *, aws: Aws | None = None, restart: Callable[[SagemakerRun], Run] | None = None
    ) -> None:
        super().__init__(workspace)
        self._aws, self._restart = aws, restart
        self._asked = 0.0
        self._heard = time.monotonic()

    @property
    def remote(self) -> RemoteJob:
        """The job at AWS. Raises `UsageError` where the run has none."""
        file = self.path / RECORD
        if not file.is_file():
            raise UsageError(f"{self.path} was never sent to SageMaker: there is no {RECORD} in it")
        return msgspec.json.decode(file.read_bytes(), type=RemoteJob)

    @property
    def aws(self) -> Aws:
        """The account that the job is in. Raises `UsageError` where the credentials are of another one."""
        if self._aws is None:
            remote = self.remote
            aws = Aws(remote.region)
            if aws.account != remote.account:
                raise UsageError(
                    f"run {self.path} is in the AWS account {remote.account}, and the credentials are of "
                    f"{aws.account}; choose others, e.g. with AWS_PROFILE"
                )
            self._aws = aws
        return self._aws

    @property
    def cost(self) -> float | None:
        """US dollars so far, or in all, by the estimated price; None where that or the time is not known."""
        remote = self.remote
        if remote.price_per_hour is None or remote.billable_s is None:
            return None
        return remote.price_per_hour * remote.billable_s / 3600

    @property
    def status(self) -> Status:
        """Where the run stands; as it was last heard, with a warning, where AWS cannot be asked."""
        try:
            self.refresh()
        except (AwsError, UsageError) as error:
            warnings.warn(f"{self.name}: {error}; shown as it was last heard of", DetkitWarning, stacklevel=2)
        return self._known_status()

    def _known_status(self) -> Status:
        remote = self.remote
        if (self.workspace.model / "detkit.json").is_file() and remote.fetched:
            return "finished"
        if self.workspace.failure_file.is_file():
            return "failed"
        if remote.status == "Stopped" and remote.fetched:
            return "stopped"
        return "interrupted" if remote.status == "Missing" else "running"

    def goes_on(self) -> bool:
        try:
            self.refresh()
        except CredentialsExpired as error:
            job, again = self.remote.name, f"`detkit runs attach {self.path}`"
            raise CredentialsExpired(
                f"{error}. the job {job} is not affected; {again} follows it", error.code
            ) from error
        return self._known_status() == "running"

    def refresh(self, *, at_once: bool = False) -> None:
        """Copy what is new at AWS into the run directory; when the job has ended, also what it left.

        Asks no more often than makes sense, unless ``at_once``, and nothing once all is here. Raises `AwsError`.
        """
        remote = self.remote
        age = time.time() - remote.created
        if remote.fetched or (remote.status == "Missing" and age > _GONE_S):
            return
        wait = min(max(age * _SHARE, _SHORTEST_S), _LONGEST_S)
        if not at_once and time.monotonic() - self._asked < wait:
            return
        self._asked = time.monotonic()
        try:
            held = lock_file(self.workspace.lock)
        except BlockingIOError:  # another process is doing it
            return
        with held or contextlib.nullcontext():
            remote = self._look(self.remote)
            if remote.status in _ENDED and not remote.fetched:
                self._finish(remote)

    def _look(self, remote: RemoteJob) -> RemoteJob:
        with explained(f"asking for training job {remote.name} (sagemaker:DescribeTrainingJob)"):
            try:
                answer = self.aws.client("sagemaker").describe_training_job(TrainingJobName=remote.name)
            except Exception as error:
                if code_of(error) not in _UNKNOWN:
                    raise
                answer = None
        if answer is None:
            # It was written down; the call that creates it was never made, or refused, or AWS does not tell yet.
            if time.time() - remote.created < _SETTLED_S:
                return remote
            return self._keep(msgspec.structs.replace(remote, status="Missing"))
        changes = answer.get("SecondaryStatusTransitions", [])
        for change in changes[remote.told :]:
            message = change.get("StatusMessage", "")
            self.workspace.log("log", {"message": f"{change['Status']}" + (f": {message}" if message else "")})
        status = "InProgress" if answer["TrainingJobStatus"] == "Stopping" else answer["TrainingJobStatus"]
        # The log is read after the state, so that nothing is missed when that is the last one.
        tokens = dict(remote.tokens)
        lines = list(logs.new_lines(self.aws, logs.TRAINING, f"{remote.name}/", tokens))
        if lines:
            self._heard = time.monotonic()
            self._copy(lines, remote)
        elif time.monotonic() - self._heard > _SILENCE_S and status == "InProgress":
            self._heard = time.monotonic()
            self.workspace.log("log", {"message": f"no line for {_SILENCE_S:.0f} s; SageMaker says {status}"})
        return self._keep(
            msgspec.structs.replace(
                remote,
                status=status,
                told=max(len(changes), remote.told),
                tokens=tokens,
                billable_s=answer.get("BillableTimeInSeconds", remote.billable_s),
                failure=answer.get("FailureReason", ""),
            )
        )

    def _copy(self, lines: list[tuple[float, str, str]], remote: RemoteJob) -> None:
        """Keep log lines; those that are events, or tell a metric, also as events."""
        events: list[Event] = []
        with self.workspace.log_file.open("a", encoding="utf-8") as log:
            for t, _, text in lines:
                event = from_line(text)
                if event is not None:
                    events.append(event)
                    continue
                log.write(text + "\n")
                reading = read_line(text, remote.metrics)
                if reading is not None:
                    events.append(Event(t=t, kind="metric", values=dict(reading.values), epoch=reading.epoch))
        with self.workspace.metrics_file.open("ab") as file:
            for event in events:
                # How it ended is said once all that it left is here.
                if not (event.kind == "state" and event.values.get("state") in {"finished", "stopped"}):
                    file.write(msgspec.json.encode(event) + b"\n")

    def _finish(self, remote: RemoteJob) -> None:
        """Bring back what an ended job left. What cannot be brought makes the run a failed one, with the reason."""
        with explained(f"asking for training job {remote.name} (sagemaker:DescribeTrainingJob)"):
            answer = self.aws.client("sagemaker").describe_training_job(TrainingJobName=remote.name)
        state = {"Completed": "finished", "Stopped": "stopped"}.get(remote.status, "failed")
        try:
            if state == "finished":
                self._fetch(remote, answer)
        except RunFailed as error:
            state = "failed"
            self.workspace.fail(str(error))
        if remote.status == "Failed":
            reason = answer.get("FailureReason") or "SageMaker gives no reason"
            again = ""
            if remote.kind == "ours" and not reason.startswith("AlgorithmError"):
                again = f"\nthat was the platform; `detkit train --resume {self.path}` tries it again"
            self.workspace.fail(f"training job {remote.name} failed: {reason}\nlog: {self._console(remote)}{again}")
        if remote.status == "Stopped":
            seconds = remote.request["StoppingCondition"]["MaxRuntimeInSeconds"]
            if answer.get("SecondaryStatus", "").startswith("MaxRuntime"):
                self.workspace.log("log", {"message": f"SageMaker ended it after max_runtime, {seconds} s"})
        self._keep(msgspec.structs.replace(remote, fetched=True))
        Ledger.of(self.aws).gone("training-job", remote.name)
        self.workspace.log("state", {"state": state})

    def _fetch(self, remote: RemoteJob, answer: Mapping[str, Any]) -> None:
        artifact = answer["ModelArtifacts"]["S3ModelArtifacts"]
        if remote.kind == "ours":
            fetch_ours(self.aws, artifact, self.workspace)
            return
        place = Place(
            region=remote.region,
            artifact=artifact,
            image=remote.hosting["image"],
            environment=remote.hosting.get("environment", {}),
            kind=remote.kind,
            training_job=remote.name,
        )
        finals = {m["MetricName"]: float(m["Value"]) for m in answer.get("FinalMetricDataList", [])}
        fetch_theirs(
            self.aws,
            place,
            self.workspace,
            job=self.job,
            hyperparameters=remote.request.get("HyperParameters", {}),
            metrics={f"{FOREIGN}{name}": value for name, value in finals.items()},
            started=remote.created,
        )

    def _keep(self, remote: RemoteJob) -> RemoteJob:
        write_json(self.path / RECORD, remote)
        return remote

    def _console(self, remote: RemoteJob) -> str:
        return (
            f"https://{remote.region}.console.aws.amazon.com/sagemaker/home?region={remote.region}#/jobs/{remote.name}"
        )

    def wait(self) -> SagemakerRun:
        while self.goes_on():
            time.sleep(_SHORTEST_S)
        status = self._known_status()
        if status == "failed":
            raise RunFailed(self.workspace.failure_file.read_text(), self.log_tail())
        if status == "interrupted":
            raise RunFailed(
                f"training job {self.remote.name} is not known to AWS: it was never created, or is long gone; "
                f"`detkit train --resume {self.path}` starts it again",
                "",
            )
        return self

    def log_tail(self) -> str:
        """Return the last lines of the job's own log."""
        file: Path = self.workspace.log_file
        return "\n".join(file.read_text(errors="replace").splitlines()[-_TAIL:]) if file.is_file() else ""

    def stop(self, timeout_s: float = 60.0) -> None:
        """Ask AWS to stop the job and wait for that, at most ``timeout_s``; SageMaker gives the container 120 s."""
        self.refresh(at_once=True)
        if self._known_status() != "running":
            return
        name = self.remote.name
        try:
            with explained(f"stopping training job {name} (sagemaker:StopTrainingJob)"):
                self.aws.client("sagemaker").stop_training_job(TrainingJobName=name)
        except AwsError as error:
            if code_of(error) not in _UNKNOWN:  # else it has just ended
                raise
        deadline = time.monotonic() + timeout_s
        while self.goes_on() and time.monotonic() < deadline:
            time.sleep(_SHORTEST_S)

    def resume(self, *, leash: bool = False, options: Mapping[str, Any] | None = None) -> Run:
        """Start a new job that goes on from the checkpoints in S3, in this run directory."""
        status = self.status
        if self._restart is None or self.remote.kind != "ours":
            raise Unsupported(
                f"run {self.path}: AWS's own images keep nothing to go on from; start a new run, weights={self.name}"
            )
        if status not in {"stopped", "failed", "interrupted"}:
            raise UsageError(f"run {self.path} is {status}; only a stopped, failed or interrupted one can be resumed")
        if options:
            job = self.job
            write_json(self.workspace.job_file, msgspec.structs.replace(job, options={**job.options, **options}))
        return self._restart(self)
