"""One endpoint: its container's process, from Creating until it is deleted."""

from __future__ import annotations

import uuid

from detkit_sagemaker.testing.account import Account, Job, Json, now
from detkit_sagemaker.testing.containers import LogStream
from detkit_sagemaker.testing.model_server import ModelServer, container_of
from detkit_sagemaker.testing.refusals import Refused

_STARTUP_SECONDS = 240
"""A container that does not answer its ping until then has failed."""


class Endpoint(Job):
    """An endpoint with one variant, thus one process."""

    kind, noun, title = "endpoint", "endpoint", "Endpoint"

    def __init__(self, account: Account, request: Json, variant: Json, model: Json) -> None:
        super().__init__(account, request)
        self.status = "Creating"
        self.server: ModelServer | None = None
        self.variant, self._model = variant, model

    @property
    def over(self) -> bool:
        """Whether it is gone."""
        return False

    @property
    def description(self) -> Json:
        """The answer of DescribeEndpoint."""
        with self.account.lock:
            variant = {"VariantName": self.variant["VariantName"], "CurrentWeight": 1.0, "DesiredWeight": 1.0}
            if "ServerlessConfig" in self.variant:
                variant["CurrentServerlessConfig"] = self.variant["ServerlessConfig"]
            else:
                count = self.variant.get("InitialInstanceCount", 1)
                variant |= {"CurrentInstanceCount": count, "DesiredInstanceCount": count}
            variant["DeployedImages"] = [{"SpecifiedImage": container_of(self._model)["Image"]}]
            answer = {
                **super().description,
                "EndpointStatus": self.status,
                "LastModifiedTime": self.modified,
                "ProductionVariants": [variant],
            }
            if self.failure:
                answer["FailureReason"] = self.failure
        return answer

    @property
    def summary(self) -> Json:
        """What ListEndpoints says."""
        return {**super().summary, "EndpointStatus": self.status, "LastModifiedTime": self.modified}

    def update(self, config: str, variant: Json, model: Json) -> None:
        """Begin to serve another model. Raises `Refused` where the endpoint is not in service."""
        with self.account.lock:
            if self.status != "InService":
                raise Refused(f'Cannot update in-progress endpoint "{self.arn}".')
            self.status, self.modified = "Updating", now()
            self.request["EndpointConfigName"] = config
            self.variant, self._model = variant, model
        self.account.start(self._run, f"{self.kind}/{self.name}")

    def delete(self) -> None:
        """Begin to delete it. Raises `Refused` while it is created or updated, as AWS does."""
        with self.account.lock:
            if self.status not in ("InService", "Failed"):
                raise Refused(f'Cannot update in-progress endpoint "{self.arn}".')
            self.status = "Deleting"
        self.stopping.set()

    def end(self, status: str, failure: str = "") -> None:
        """Set the status that the start came to."""
        super().end(status, failure.removeprefix("ClientError: "))
        if status == "Failed":
            self._stay()

    def run(self) -> None:
        """Start the process, and keep it until the endpoint is deleted or serves another."""
        before = self.server
        variant = self.variant["VariantName"]
        stream = f"{variant}/i-{uuid.uuid4().hex[:17]}"
        log = LogStream(self.account.client("logs"), f"/aws/sagemaker/Endpoints/{self.name}", stream)
        self.dwell()
        if self.account.faults.takes_capacity():
            raise Refused(
                "Unable to provision requested ML compute capacity due to InsufficientInstanceCapacity error. Please "
                "retry using a different ML instance type or after some time."
            )
        folder = self.account.folder / "endpoints" / self.name / stream
        server = ModelServer(self.account, self._model, folder, log, {})
        try:
            longest = self.variant.get("ContainerStartupHealthCheckTimeoutInSeconds", _STARTUP_SECONDS)
            if not server.wait_healthy(longest, self):
                raise Refused(
                    f"The primary container for production variant {variant} did not pass the ping health check. "
                    "Please check CloudWatch logs for this endpoint."
                )
            self.server = server
            self.end("InService")
            if before is not None:
                before.close()
            self._serve(server)
        finally:
            server.close()

    def _serve(self, server: ModelServer) -> None:
        """Wait for the end: the endpoint is deleted, or another process has taken over."""
        while self.server is server:
            if self.wait(0.2):
                self._gone()
                return
            server.log.flush()

    def _stay(self) -> None:
        """Stay Failed until deleted: also a failed endpoint has to be deleted by the user."""
        while not self.wait(0.2):
            pass
        self._gone()

    def _gone(self) -> None:
        self.server, server = None, self.server
        if server is not None:
            server.close()
        self.account.remove(self)

    def model_error(self, message: str, status: int) -> Refused:
        """Return the error of an invocation that the container did not answer with 200."""
        region, number = self.account.region, self.account.number
        group = f"/aws/sagemaker/Endpoints/{self.name}"
        where = f"https://{region}.console.aws.amazon.com/cloudwatch/home?region={region}#logEventViewer:group={group}"
        return Refused(
            f"Received {'server' if status >= 500 else 'client'} error ({status}) from primary with message "
            f'"{message[:1024]}". See {where} in account {number} for more information.',
            "ModelError",
            424,
            OriginalStatusCode=status,
            OriginalMessage=message[:1024],
            LogStreamArn=f"arn:aws:logs:{region}:{number}:log-group:{group}",
        )
