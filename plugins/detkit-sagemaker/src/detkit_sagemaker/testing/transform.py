"""Batch transform jobs: a model server, one request per object, the answers in S3, and the end of the process."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import uuid
from typing import Any

from detkit_sagemaker.testing.account import Account, Job, Json, now
from detkit_sagemaker.testing.containers import LogStream
from detkit_sagemaker.testing.hosting import Model
from detkit_sagemaker.testing.listing import listed
from detkit_sagemaker.testing.model_server import ModelServer
from detkit_sagemaker.testing.refusals import Refused
from detkit_sagemaker.testing.storage import Item

_STARTUP_SECONDS = 240
_GROUP = "/aws/sagemaker/TransformJobs"


class TransformJobs:
    """SageMaker's operations on batch transform jobs."""

    def __init__(self, account: Account) -> None:
        self._account = account

    def create_transform_job(self, request: Json) -> Json:
        """Start a job."""
        model = self._account.find(Model, request["ModelName"])
        source, wanted = request["TransformInput"], request["TransformResources"]
        data = source["DataSource"]["S3DataSource"]
        if data["S3DataType"] not in ("S3Prefix", "ManifestFile"):
            raise Refused(f"S3DataType {data['S3DataType']} is not simulated")
        if source.get("SplitType", "None") not in ("None", "Line"):
            raise Refused(f"SplitType {source['SplitType']} is not simulated")
        if source.get("CompressionType", "None") != "None":
            raise Refused("compressed transform input is not simulated")
        if "DataProcessing" in request:
            raise Refused("DataProcessing is not simulated")
        self._account.storage.items(data["S3Uri"], data["S3DataType"])
        self._account.storage.check_bucket(request["TransformOutput"]["S3OutputPath"])
        if request.get("MaxConcurrentTransforms", 1) * request.get("MaxPayloadInMB", 6) > 100:
            raise Refused("MaxConcurrentTransforms * MaxPayloadInMB cannot exceed 100 MB")
        running = sum(
            job.request["TransformResources"]["InstanceCount"]
            for job in self._account.all(TransformJob)
            if not job.over and job.request["TransformResources"]["InstanceType"] == wanted["InstanceType"]
        )
        self._account.quotas.check("transform job usage", wanted["InstanceType"], running, wanted["InstanceCount"])
        job = TransformJob(self._account, request, model.request)
        job.start()
        return {"TransformJobArn": job.arn}

    def describe_transform_job(self, request: Json) -> Json:
        """Describe a job."""
        return self._account.find(TransformJob, request["TransformJobName"]).description

    def list_transform_jobs(self, request: Json) -> Json:
        """List the jobs."""
        return listed(self._account.all(TransformJob), request, "TransformJobSummaries")

    def stop_transform_job(self, request: Json) -> Json:
        """Ask a job to stop."""
        self._account.find(TransformJob, request["TransformJobName"]).stop()
        return {}


class TransformJob(Job):
    """A batch transform job."""

    kind, noun, title = "transform-job", "transform job", "TransformJob"

    def __init__(self, account: Account, request: Json, model: Json) -> None:
        super().__init__(account, request)
        self._model = model
        self._started: Json = {}

    @property
    def description(self) -> Json:
        """The answer of DescribeTransformJob."""
        with self.account.lock:
            answer = {**super().description, "TransformJobStatus": self.status, **self._started}
            if self.ended is not None:
                answer["TransformEndTime"] = self.ended
            if self.failure:
                answer["FailureReason"] = self.failure
        return answer

    @property
    def summary(self) -> Json:
        """What ListTransformJobs says."""
        described = self.description
        names = ("TransformJobStatus", "TransformEndTime", "FailureReason")
        kept = {name: described[name] for name in names if name in described}
        return {**super().summary, "LastModifiedTime": self.modified, **kept}

    def run(self) -> None:
        """Serve the model and send it every object."""
        if not self.dwell():
            self.end("Stopped")
        elif self.account.faults.takes_capacity():
            self.end("Failed", "CapacityError: Unable to provision requested ML compute capacity. Please retry later.")
        else:
            instance = f"{self.name}/i-{uuid.uuid4().hex[:17]}"
            log = LogStream(self.account.client("logs"), _GROUP, instance)
            folder = self.account.folder / "transform" / self.name
            server = ModelServer(self.account, self._model, folder, log, self._environment())
            try:
                failed = self._served(server, LogStream(self.account.client("logs"), _GROUP, f"{instance}/data-log"))
            finally:
                server.close()
            if self.stopping.is_set():
                self.end("Stopped")
            elif failed:
                self.end("Failed", f"{failed}: See job logs for more information")
            else:
                self.end("Completed")

    def _served(self, server: ModelServer, log: LogStream) -> str:
        """Wait for the server, then send every object; return the kind of the last error, empty where all went well."""
        self._started = {"TransformStartTime": now()}
        if server.wait_healthy(_STARTUP_SECONDS, self):
            return self._transform_all(server, log)
        if self.stopping.is_set():
            return ""
        log.write("the primary container did not pass the ping health check")
        log.flush()
        return "AlgorithmError"

    def _environment(self) -> dict[str, str]:
        environment = {**self.request.get("Environment", {}), "SAGEMAKER_BATCH": "true"}
        if "MaxPayloadInMB" in self.request:
            environment["SAGEMAKER_MAX_PAYLOAD_IN_MB"] = str(self.request["MaxPayloadInMB"])
        if "BatchStrategy" in self.request:
            named = {"MultiRecord": "MULTI_RECORD", "SingleRecord": "SINGLE_RECORD"}
            environment["SAGEMAKER_BATCH_STRATEGY"] = named[self.request["BatchStrategy"]]
        if "MaxConcurrentTransforms" in self.request:
            environment["SAGEMAKER_MAX_CONCURRENT_TRANSFORMS"] = str(self.request["MaxConcurrentTransforms"])
        return environment

    def _parameters(self, server: ModelServer) -> tuple[int, int]:
        """Return how many requests go at once, and the largest payload in bytes; the container may choose both."""
        offered: dict[str, Any] = {}
        try:
            answer = server.ask("GET", "/execution-parameters", timeout=2)
            if answer.status == 200:
                offered = json.loads(answer.body)
        except (OSError, http.client.HTTPException, ValueError):
            pass  # it is optional
        chosen = {**offered, **{name: value for name, value in self.request.items() if name in _PARAMETERS}}
        return int(chosen.get("MaxConcurrentTransforms", 1)) or 1, int(chosen.get("MaxPayloadInMB", 6)) * 1024 * 1024

    def _transform_all(self, server: ModelServer, log: LogStream) -> str:
        source = self.request["TransformInput"]["DataSource"]["S3DataSource"]
        items = self.account.storage.items(source["S3Uri"], source["S3DataType"])
        concurrency, largest = self._parameters(server)
        failed = ""

        def transform(item: Item) -> None:
            if not (self.stopping.is_set() or self.account.closing.is_set()):
                self._transform(server, item, largest)

        with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
            for item, done in [(item, pool.submit(transform, item)) for item in items]:
                try:
                    done.result()
                except Refused as error:
                    failed = error.code
                    log.write(f"{item.key}: {error.message}")
                server.log.flush()
                log.flush()
        return failed

    def _transform(self, server: ModelServer, item: Item, largest: int) -> None:
        """Send one object, whole or line by line, and write the answer. Raises `Refused`; then nothing is written."""
        source, target = self.request["TransformInput"], self.request["TransformOutput"]
        content = self.account.storage.read(f"s3://{item.bucket}/{item.key}")
        by_line = source.get("SplitType", "None") == "Line"
        parts = [line for line in content.split(b"\n") if line] if by_line else [content]
        answers = [self._answer(server, part, largest) for part in parts]
        if target.get("AssembleWith", "None") == "Line":
            answers = [answer.rstrip(b"\n") + b"\n" for answer in answers]
        self.account.storage.write(f"{target['S3OutputPath'].rstrip('/')}/{item.path}.out", b"".join(answers))

    def _answer(self, server: ModelServer, payload: bytes, largest: int) -> bytes:
        if len(payload) > largest:
            said = f"the record of {len(payload)} bytes is larger than the maximum payload of {largest}"
            raise Refused(said, "ClientError")
        source, target = self.request["TransformInput"], self.request["TransformOutput"]
        headers = {"Content-Type": source.get("ContentType", ""), "Accept": target.get("Accept", "")}
        timeout = self.request.get("ModelClientConfig", {}).get("InvocationsTimeoutInSeconds", 600)
        try:
            kept = {name: value for name, value in headers.items() if value}
            answer = server.ask("POST", "/invocations", payload, kept, timeout)
        except (OSError, http.client.HTTPException) as error:
            raise Refused(f"no answer from the model: {error}", "AlgorithmError") from error
        if answer.status != 200:
            kind = "ClientError" if answer.status < 500 else "AlgorithmError"
            raise Refused(f"Bad HTTP status received from algorithm: {answer.status}: {answer.body[:500]!r}", kind)
        return answer.body


_PARAMETERS = ("MaxConcurrentTransforms", "MaxPayloadInMB")
