"""One training job, really executed: ``/opt/ml`` laid out, the image's processes run, artifacts and logs kept."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from detkit_sagemaker.testing import channels, storage
from detkit_sagemaker.testing.account import TICK, Account, Job, Json, now
from detkit_sagemaker.testing.containers import Container, LogStream, can_mount, discard, free_port, fresh
from detkit_sagemaker.testing.metrics import Metrics
from detkit_sagemaker.testing.pipes import Pipe

_SYNC_TICKS = 10
"""Checkpoints go to S3 after every so many looks at the processes."""

_DEFAULT_RUNTIME = 86400

_MESSAGES = {
    "Starting": "Preparing the instances for training",
    "Downloading": "Downloading the training image and input data",
    "Training": "Training image download completed. Training in progress.",
    "Interrupted": "Training job interrupted: the spot instances were taken away",
    "Stopping": "Stopping the training job",
    "Uploading": "Uploading generated training model",
    "Completed": "Training job completed",
    "Failed": "Training job failed",
    "Stopped": "Training job stopped",
    "MaxRuntimeExceeded": "Training job runtime exceeded MaxRuntimeInSeconds provided",
    "MaxWaitTimeExceeded": "Training job exceeded MaxWaitTimeInSeconds provided",
}


_FAILURES = ("AlgorithmError:", "ClientError:", "InternalServerError:")


class _Ended(Exception):
    """The job's work is done: ``secondary`` is its last secondary status, ``upload`` whether artifacts are kept."""

    def __init__(self, secondary: str, failure: str = "", upload: bool = False) -> None:
        super().__init__(secondary)
        self.secondary, self.failure, self.upload = secondary, failure, upload


class _Interrupted(Exception):
    """The spot instances are gone."""


def _completed(request: Json) -> Json:
    """Return a request with what AWS fills in where nothing was said."""
    entries = []
    for channel in request.get("InputDataConfig", []):
        source = dict(channel["DataSource"])
        if "S3DataSource" in source:
            source["S3DataSource"] = {"S3DataDistributionType": "FullyReplicated", **source["S3DataSource"]}
        entries.append({"CompressionType": "None", "RecordWrapperType": "None", **channel, "DataSource": source})
    return {
        "EnableInterContainerTrafficEncryption": False,
        **request,
        **({"InputDataConfig": entries} if entries else {}),
        "OutputDataConfig": {"KmsKeyId": "", "CompressionType": "GZIP", **request["OutputDataConfig"]},
    }


class TrainingJob(Job):
    """A training job. ``tuning`` is what a tuning job adds to the description of its own."""

    kind, noun, title = "training-job", "training job", "TrainingJob"
    unknown = "Requested resource not found."

    def __init__(self, account: Account, request: Json, tuning: Json | None = None) -> None:
        super().__init__(account, request)
        self.metrics = Metrics(request["AlgorithmSpecification"]["MetricDefinitions"])
        self.started: float | None = None
        self._tuning = tuning or {}
        self._transitions: list[Json] = []
        self._secondary = "Starting"
        self._artifacts: Json = {}
        self._times: Json = {}
        self._trained = 0.0
        self._folder = account.folder / "training" / self.name
        self._pipes_over = threading.Event()
        """Set when the processes that read the pipes are gone."""
        self._synced: dict[Path, tuple[int, int]] = {}
        resources = request.get("ResourceConfig", {})
        self._hosts = [f"algo-{number + 1}" for number in range(resources.get("InstanceCount", 1))]

    @property
    def description(self) -> Json:
        """The answer of DescribeTrainingJob."""
        with self.account.lock:
            answer = {
                **_completed(super().description),
                "TrainingJobStatus": self.status,
                "SecondaryStatus": self._secondary,
                "SecondaryStatusTransitions": [dict(one) for one in self._transitions],
                "LastModifiedTime": self.modified,
                "EnableNetworkIsolation": self.request.get("EnableNetworkIsolation", False),
                "EnableManagedSpotTraining": self.request.get("EnableManagedSpotTraining", False),
                "FinalMetricDataList": self.metrics.final,
                **self._times,
                **self._artifacts,
                **self._tuning,
            }
            if self.failure:
                answer["FailureReason"] = self.failure
        return answer

    @property
    def summary(self) -> Json:
        """What ListTrainingJobs says."""
        names = ("TrainingJobStatus", "SecondaryStatus", "LastModifiedTime", "TrainingEndTime")
        described = self.description
        return {**super().summary, **{name: described[name] for name in names if name in described}}

    def run(self) -> None:
        """Walk through the states until the end."""
        try:
            self._run_through()
        finally:
            if not self.account.keep:
                self._discard()

    def _discard(self) -> None:
        """Free the disk of what S3 has."""
        for number in range(len(self._hosts)):
            for name in ("input/data", "model", "output/data"):
                discard(self._base(number) / name)
        for name in ("model", "output"):
            (self._folder / f"{name}.tar.gz").unlink(missing_ok=True)

    def _run_through(self) -> None:
        ended = self._work()
        if ended.upload:
            self._enter("Uploading")
            if ended.secondary == "Completed":
                self.dwell()
            try:
                self._upload(failed=ended.secondary == "Failed")
            except _Ended as failed:
                ended = failed
        self._finish(ended.secondary, ended.failure)

    def _work(self) -> _Ended:
        """Train until there is nothing more to train; return how it ended."""
        started = time.monotonic()
        while True:
            try:
                self._attempt(started)
                return _Ended("Completed", upload=True)
            except _Interrupted:
                self._enter("Interrupted")
            except _Ended as ended:
                return ended

    def end(self, status: str, failure: str = "") -> None:
        """Set the last status; also where the platform itself failed, the transitions end."""
        with self.account.lock:
            if self._secondary not in ("Completed", "Stopped", "MaxRuntimeExceeded", "MaxWaitTimeExceeded", "Failed"):
                self._enter(status)
            super().end(status, failure)

    def _finish(self, secondary: str, failure: str) -> None:
        with self.account.lock:
            time_ = now()
            self._times["TrainingEndTime"] = time_
            if "TrainingStartTime" in self._times:
                whole = int((time_ - self._times["TrainingStartTime"]).total_seconds()) + 1
                spot = self.request.get("EnableManagedSpotTraining", False)
                # Spot is about 70 % cheaper; the console shows the saving as the quotient of these two.
                self._times |= {
                    "TrainingTimeInSeconds": whole,
                    "BillableTimeInSeconds": max(1, int(whole * 0.3)) if spot else whole,
                }
            self._enter(secondary)
            self._transitions[-1]["EndTime"] = self._transitions[-1]["StartTime"]
            super().end(secondary if secondary in ("Completed", "Failed") else "Stopped", failure)

    def _enter(self, secondary: str) -> None:
        with self.account.lock:
            time_ = now()
            if self._transitions:
                self._transitions[-1].setdefault("EndTime", time_)
            self._secondary, self.modified = secondary, time_
            message = _MESSAGES[secondary]
            self._transitions.append({"Status": secondary, "StartTime": time_, "StatusMessage": message})

    def _pause(self) -> None:
        if not self.dwell():
            self._enter("Stopping")
            raise _Ended("Stopped")

    def _attempt(self, started: float) -> None:
        self._enter("Starting")
        self._pause()
        if self.account.faults.takes_capacity():
            raise _Ended(
                "Failed",
                "CapacityError: Unable to provision requested ML compute capacity. Please retry using a different ML "
                "instance type or after some time.",
            )
        self._enter("Downloading")
        self._times.setdefault("TrainingStartTime", now())
        self._pause()
        self._pipes_over = threading.Event()
        pipes = [pipe for number in range(len(self._hosts)) for pipe in self._lay_out(number)]
        self._enter("Training")
        self._train(pipes, started)

    def _base(self, number: int) -> Path:
        return self._folder / self._hosts[number] / "ml"

    def _lay_out(self, number: int) -> list[Pipe]:
        base, request = fresh(self._base(number)), self.request
        for name in ("input/config", "input/data", "model", "output/data", "checkpoints"):
            (base / name).mkdir(parents=True)
        mode = request["AlgorithmSpecification"]["TrainingInputMode"]
        wanted = request.get("InputDataConfig", [])
        kind = request["ResourceConfig"]["InstanceType"]
        documents = {
            "hyperparameters": request.get("HyperParameters", {}),
            "inputdataconfig": channels.config(wanted, mode),
            "resourceconfig": {
                "current_host": self._hosts[number],
                "current_instance_type": kind,
                "current_group_name": "homogeneousCluster",
                "hosts": self._hosts,
                "instance_groups": [
                    {"instance_group_name": "homogeneousCluster", "instance_type": kind, "hosts": self._hosts}
                ],
                "network_interface_name": "lo",
            },
        }
        for name, document in documents.items():
            (base / "input" / "config" / f"{name}.json").write_text(json.dumps(document))
        if "CheckpointConfig" in request:
            self._checkpoints(base).mkdir(parents=True, exist_ok=True)
            self.account.storage.restore(request["CheckpointConfig"]["S3Uri"], self._checkpoints(base))
        shard = number, len(self._hosts)
        return channels.lay_out(
            wanted, mode, self.account.storage, base / "input" / "data", shard=shard, over=self._pipes_over
        )

    def _checkpoints(self, base: Path) -> Path:
        path: str = self.request["CheckpointConfig"].get("LocalPath", "/opt/ml/checkpoints")
        return base / path.removeprefix("/opt/ml/")

    @property
    def _image(self) -> list[str]:
        image = self.account.images.command(self.request["AlgorithmSpecification"]["TrainingImage"])
        assert image is not None
        return image

    def _command(self) -> list[str]:
        algorithm = self.request["AlgorithmSpecification"]
        arguments = algorithm.get("ContainerArguments")
        if "ContainerEntrypoint" in algorithm:
            command = [*algorithm["ContainerEntrypoint"], *(arguments or [])]
        else:
            command = [*self._image, *(arguments or ["train"])]
        return command

    def _environment(self, port: int) -> dict[str, str]:
        # A container without network has no way to AWS; a process has, so it is only not told about it.
        aws = {} if self.request.get("EnableNetworkIsolation") else self.account.container_environment
        environment = {
            **aws,
            **self.request.get("Environment", {}),
            "TRAINING_JOB_NAME": self.name,
            "TRAINING_JOB_ARN": self.arn,
            "AWS_REGION": self.account.region,
        }
        if len(self._hosts) > 1:  # the hosts' names do not resolve on the loopback
            environment |= {"DETKIT_MASTER_ADDR": "127.0.0.1", "DETKIT_MASTER_PORT": str(port)}
        return environment

    def _train(self, pipes: list[Pipe], started: float) -> None:
        for pipe in pipes:
            self.account.start(pipe.feed, f"{self.name}/pipe")
        port = free_port()
        logs: list[LogStream] = []
        containers: list[Container] = []
        try:
            for number, host in enumerate(self._hosts):
                stream = f"{self.name}/{host}-{int(time.time() * 1000)}"
                logs.append(LogStream(self.account.client("logs"), "/aws/sagemaker/TrainingJobs", stream))
                containers.append(self._container(number, port, logs[-1]))
            self._follow(containers, logs, started)
        finally:
            for container in containers:
                container.close()
            self._pipes_over.set()
            self._sync()
            for log in logs:
                log.flush()

    def _container(self, number: int, port: int, log: LogStream) -> Container:
        def on_line(line: str) -> None:
            log.write(line)
            self.metrics.read(line)

        # What is run instead of the image's own command, AWS's SDK's scripts for one, names /opt/ml as it is.
        other = "ContainerEntrypoint" in self.request["AlgorithmSpecification"]
        environment, mounted = self._environment(port), self.account.mounted or (other and can_mount())
        try:
            return Container(
                self._command(), environment, self._base(number), on_line, mounted=mounted, image=self._image
            )
        except OSError as error:
            raise _Ended("Failed", f"AlgorithmError: the container cannot be started: {error}") from error

    def _follow(self, containers: list[Container], logs: list[LogStream], started: float) -> None:
        """Watch the processes until all have ended well. Raises `_Ended` or `_Interrupted` for all else."""
        limits, begun, looks = self.request["StoppingCondition"], time.monotonic(), 0
        spot = self.request.get("EnableManagedSpotTraining", False)
        while True:
            codes = [container.exit_code for container in containers]
            if all(code == 0 for code in codes):
                self._trained += time.monotonic() - begun
                return
            for number, code in enumerate(codes):
                if code:
                    containers[number].close()
                    raise _Ended("Failed", self._failure(number, code), upload=True)
            if self.account.closing.is_set():
                raise _Ended("Stopped")
            if self.stopping.is_set():
                self._stop(containers, "Stopped")
            if self._trained + time.monotonic() - begun > limits.get("MaxRuntimeInSeconds", _DEFAULT_RUNTIME):
                self._stop(containers, "MaxRuntimeExceeded")
            if spot and time.monotonic() - started > limits["MaxWaitTimeInSeconds"]:
                self._stop(containers, "MaxWaitTimeExceeded")
            if spot and self.account.faults.takes_spot(self.name):
                self._trained += time.monotonic() - begun
                raise _Interrupted
            self.stopping.wait(TICK)
            looks += 1
            for log in logs:
                log.flush()
            if looks % _SYNC_TICKS == 0:
                self._sync()

    def _stop(self, containers: list[Container], secondary: str) -> None:
        self._enter("Stopping")
        with self.account.lock:
            self.status = "Stopping"
        for container in containers:
            container.terminate()
        deadline = time.monotonic() + self.account.grace
        while any(container.exit_code is None for container in containers) and time.monotonic() < deadline:
            if self.account.closing.wait(TICK):
                break
        raise _Ended(secondary, upload=True)

    def _failure(self, number: int, code: int) -> str:
        file = self._base(number) / "output" / "failure"
        said = file.read_text(errors="replace") if file.is_file() else ""
        # AWS's own images name the kind of failure themselves.
        kind = "" if said.startswith(_FAILURES) else "AlgorithmError: "
        ending = f", exit code: {code}"
        return f"{kind}{said}"[: 1024 - len(ending)] + ending

    def _sync(self) -> None:
        """Copy checkpoints that are new to S3, as the platform does all the time."""
        if "CheckpointConfig" not in self.request:
            return
        uri = self.request["CheckpointConfig"]["S3Uri"].rstrip("/")
        for number in range(len(self._hosts)):
            folder = self._checkpoints(self._base(number))
            for file in sorted(folder.rglob("*")):
                try:
                    if not file.is_file():
                        continue
                    state = file.stat().st_mtime_ns, file.stat().st_size
                    if self._synced.get(file) != state:
                        self.account.storage.upload(file, f"{uri}/{file.relative_to(folder).as_posix()}")
                        self._synced[file] = state
                except FileNotFoundError:
                    continue  # renamed or deleted meanwhile

    def _upload(self, failed: bool) -> None:
        """Upload what is in ``output/data`` and, unless the job failed, in ``model``."""
        if self.account.faults.takes_upload():
            reason = "ClientError: Artifact upload failed:Error 7: The credentials received have been expired"
            raise _Ended("Failed", reason)
        settings: dict[str, Any] = self.request["OutputDataConfig"]
        target = f"{settings['S3OutputPath'].rstrip('/')}/{self.name}/output"
        bases = [self._base(number) for number in range(len(self._hosts))]
        outputs = [base / "output" / "data" for base in bases]
        plain = settings.get("CompressionType", "GZIP") == "NONE"
        if not all(storage.is_empty(folder) for folder in outputs):
            self._upload_folders(outputs, target, "output" if not plain else "data", plain)
        if not failed:
            models = [base / "model" for base in bases]
            uri = self._upload_folders(models, target, "model", plain)
            with self.account.lock:
                self._artifacts = {"ModelArtifacts": {"S3ModelArtifacts": uri}}

    def _upload_folders(self, folders: list[Path], target: str, name: str, plain: bool) -> str:
        if plain:
            for folder in folders:
                self.account.storage.upload_folder(folder, f"{target}/{name}")
            return f"{target}/{name}/"
        archive = self._folder / f"{name}.tar.gz"
        storage.pack(folders, archive)
        self.account.storage.upload(archive, f"{target}/{name}.tar.gz")
        return f"{target}/{name}.tar.gz"
