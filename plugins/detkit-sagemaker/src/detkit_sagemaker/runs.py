"""A training job at AWS, as a run: what it says is copied into the run directory while somebody looks."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from detkit.errors import DetkitWarning, RunFailed, StorageError, Unsupported, UsageError
from detkit.files import atomic_write, lock_file, write_json
from detkit.job import Workspace
from detkit.runs import Run, Status
from detkit_sagemaker import history, logs
from detkit_sagemaker.artifacts import Place, fetch_ours, fetch_theirs
from detkit_sagemaker.aws import Aws, AwsError, CredentialsExpired, code_of, explained, may_pass
from detkit_sagemaker.builtin import FOREIGN
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.resources import is_missing

RECORD = "sagemaker.json"

_SHORTEST_S, _LONGEST_S, _SHARE = 0.3, 20.0, 0.05
"""AWS is asked again after a twentieth of the job's age, within these bounds."""
_SILENCE_S = 30.0
"""After so long without a line a job is said to be silent."""
_SETTLED_S = 10.0
"""A job that AWS does not know so long after it was to be created never was."""
_GONE_S = 3600.0
_LAG_S = 5.0
"""The last lines of a job reach CloudWatch so long after its end."""
_PATIENCE_S, _PAUSE_S = 300.0, 10.0
"""So long, and so often, AWS is asked again where it cannot be reached or is too busy."""
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
    """What answers with the model at AWS: ``image``, ``environment``, and for JumpStart ``version`` and ``classes``, by
    their numbers there; only for images that are not ours."""
    price_per_hour: float | None = None
    """US dollars for all machines, estimated."""
    staged: bool = False
    """Whether all that the request's channels name lies in S3."""
    status: str = "Creating"
    """SageMaker's word, as it was last heard; ``Creating`` until AWS has the job."""
    told: int = 0
    """Changes of its state that were told."""
    tokens: dict[str, logs.Position] = {}
    """Where to go on in each log."""
    ended: float | None = None
    """Seconds since the epoch (POSIX)."""
    billable_s: float | None = None
    fetched: bool = False
    """Whether everything has been brought back."""
    earlier: list[str] = []
    """Jobs that this run was resumed from."""
    spent: float | None = 0.0
    """US dollars that those have cost, estimated; None where that is not known."""


class SagemakerRun(Run):
    """A run whose worker is a training job at AWS. Ctrl-C leaves it going on there."""

    on_interrupt = "leave"

    def __init__(
        self, workspace: Workspace, *, aws: Aws | None = None, restart: Callable[[SagemakerRun], Run] | None = None
    ) -> None:
        super().__init__(workspace)
        self._aws, self._restart = aws, restart
        self._asked, self._heard = 0.0, time.monotonic()
        self._unreachable_since: float | None = None  # by `time.monotonic`
        self._is_deaf = False  # whether it was said that the log cannot be read

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
            self._aws = Aws.of_account(remote.account, remote.region, f"run {self.path}")
        return self._aws

    @property
    def cost(self) -> float | None:
        """US dollars so far, or in all, by the estimated price; None where that or the time is not known."""
        remote = self.remote
        if remote.spent is None:
            return None
        if remote.billable_s is None:  # AWS says it at the end; a job that found no machine has none
            return remote.spent if remote.spent or remote.fetched or remote.status == "Missing" else None
        if remote.price_per_hour is None:
            return None
        return remote.spent + remote.price_per_hour * remote.billable_s / 3600

    @property
    def status(self) -> Status:
        """Where the run stands; as it was last heard, with a warning, where AWS cannot be asked."""
        try:
            self.refresh()
        except (AwsError, UsageError, StorageError) as error:
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
        again = f"`detkit runs attach {self.path}`"
        try:
            self.refresh()
        except AwsError as error:
            if may_pass(error) and self._is_patient(error):
                return True
            follows = f"the job {self.remote.name} is not affected; {again} follows it"
            raise type(error)(f"{error}. {follows}", error.code) from error
        except StorageError as error:
            raise StorageError(
                self.path, f"{error.why}; what the job left stays in S3, and {again} fetches it"
            ) from error
        self._unreachable_since = None
        return self._known_status() == "running"

    def _is_patient(self, error: AwsError) -> bool:
        """Return whether to ask AWS again after a while; says so the first time."""
        now = time.monotonic()
        if self._unreachable_since is None:
            self._unreachable_since = now
            self.workspace.log("log", {"message": f"{error}; asked again for {_PATIENCE_S:.0f} s"})
        if now - self._unreachable_since > _PATIENCE_S:
            return False
        self._asked = now + _PAUSE_S
        return True

    def refresh(self, *, at_once: bool = False) -> None:
        """Copy what is new at AWS into the run directory; when the job has ended, also what it left.

        Asks no more often than makes sense, unless ``at_once``, and nothing once all is here. Raises `AwsError`.
        """
        remote = self.remote
        age = time.time() - remote.created
        if remote.fetched or (remote.status == "Missing" and age > _GONE_S):
            return
        if not at_once and time.monotonic() < self._asked:
            return
        self._asked = time.monotonic() + min(max(age * _SHARE, _SHORTEST_S), _LONGEST_S)
        try:
            held = lock_file(self.workspace.lock)
        except BlockingIOError:  # another process is doing it
            return
        with held or contextlib.nullcontext():
            remote = self._look(self.remote)
            if remote.status not in _ENDED or remote.fetched:
                return
            if _is_lagging(remote):
                self._asked = time.monotonic() + _LAG_S
                return
            try:
                self._finish(remote)
            except OSError as error:
                raise StorageError(self.path, error) from error

    def _look(self, remote: RemoteJob) -> RemoteJob:
        try:
            answer = self._describe(remote.name)
        except AwsError as error:
            if not is_missing(error):
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
        lines = self._new_lines(remote, tokens)
        if lines:
            self._heard = time.monotonic()
            history.keep(self.workspace, lines, remote.metrics)
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
                ended=answer["TrainingEndTime"].timestamp() if "TrainingEndTime" in answer else None,
            )
        )

    def _describe(self, name: str) -> dict[str, Any]:
        with explained(f"asking for training job {name} (sagemaker:DescribeTrainingJob)"):
            answer: dict[str, Any] = self.aws.client("sagemaker").describe_training_job(TrainingJobName=name)
        return answer

    def _new_lines(self, remote: RemoteJob, positions: dict[str, logs.Position]) -> list[history.Line]:
        """Return the lines that are new. A log that may not be read is said once, and holds up nothing else."""
        read = dict(positions)
        try:
            lines = list(logs.new_lines(self.aws, logs.TRAINING, f"{remote.name}/", read))
            positions.update(read)
            return lines
        except CredentialsExpired:
            raise
        except AwsError as error:
            if not self._is_deaf:
                self._is_deaf = True
                self.workspace.log("log", {"message": f"the job's log cannot be read: {error}"})
            return []

    def _finish(self, remote: RemoteJob) -> None:
        """Bring back what an ended job left. What cannot be brought makes the run a failed one, with the reason."""
        answer = self._describe(remote.name)
        state = {"Completed": "finished", "Stopped": "stopped"}.get(remote.status, "failed")
        if state == "finished":
            try:
                self._fetch(remote, answer)
            except RunFailed as error:
                state = "failed"
                self.workspace.fail(str(error))
        elif state == "stopped" and remote.kind != "ours":
            # AWS's algorithms keep their model when they are stopped, and nothing to go on from.
            with contextlib.suppress(RunFailed):
                self._fetch(remote, answer)
                state = "finished"
                self.workspace.log("log", {"message": "SageMaker stopped it; the model is what it had by then"})
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
        self._complete_events(remote)
        self._keep(msgspec.structs.replace(remote, fetched=True))
        Ledger.of(self.aws).gone("training-job", remote.name)
        self.workspace.log("state", {"state": state})

    def _complete_events(self, remote: RemoteJob) -> None:
        """Leave no event of the job out, and none twice: its own file, or else its whole log, tells them all."""
        told = None
        if remote.kind == "ours":
            output = remote.request["OutputDataConfig"]["S3OutputPath"].rstrip("/")
            told = history.told_by(self.aws, f"{output}/{remote.name}/output/output.tar.gz", self.workspace)
        if told is None:
            lines = sorted(self._new_lines(remote, {}), key=lambda line: line[0])
            told, _ = history.events_of(lines, remote.metrics)
        history.complete(self.workspace, told)

    def _fetch(self, remote: RemoteJob, answer: Mapping[str, Any]) -> None:
        artifact = answer.get("ModelArtifacts", {}).get("S3ModelArtifacts")
        if artifact is None:
            raise RunFailed(f"SageMaker names no model of {remote.name}", "")
        if remote.kind == "ours":
            fetch_ours(self.aws, artifact, self.workspace)
            return
        place = Place(
            region=remote.region,
            artifact=artifact,
            image=remote.hosting["image"],
            environment=remote.hosting.get("environment", {}),
            kind=remote.kind,
            version=remote.hosting.get("version", ""),
            training_job=remote.name,
        )
        classes = list(remote.hosting.get("classes") or self.job.classes)
        finals = {m["MetricName"]: float(m["Value"]) for m in answer.get("FinalMetricDataList", [])}
        fetch_theirs(
            self.aws,
            place,
            self.workspace,
            job=msgspec.structs.replace(self.job, classes=classes),
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
        file = self.workspace.log_file
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
        if self._restart is None or self.remote.kind != "ours":
            raise Unsupported(
                f"run {self.path}: AWS's own images keep nothing to go on from; start a new run, weights={self.name}"
            )
        with self._turn():  # of two who resume at once, the second finds it running
            status = self.status
            if status not in {"stopped", "failed", "interrupted"}:
                raise UsageError(f"{self.path} is {status}; only a stopped, failed or interrupted one can be resumed")
            job, job_file, earlier = self.job, self.workspace.job_file, self.remote.name
            before = job_file.read_bytes()
            try:
                if options:
                    write_json(job_file, msgspec.structs.replace(job, options={**job.options, **options}))
                return self._restart(self)
            except BaseException:
                if options and self.remote.name == earlier:  # nothing was started, so the run is what it was
                    with atomic_write(job_file) as file:
                        file.write(before)
                raise


def _is_lagging(remote: RemoteJob) -> bool:
    """Return whether the job ended so lately that its log, where that is all it leaves, may not be whole."""
    is_all = remote.kind != "ours" or remote.status == "Failed"
    return is_all and remote.ended is not None and 0 <= time.time() - remote.ended < _LAG_S
