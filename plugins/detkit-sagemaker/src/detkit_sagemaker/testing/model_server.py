"""A model server: the process of a hosting image with a model, asked over HTTP as the platform asks it."""

from __future__ import annotations

import http.client
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from detkit_sagemaker.testing import storage
from detkit_sagemaker.testing.account import TICK, Account, Job, Json
from detkit_sagemaker.testing.containers import Container, LogStream, discard, free_port, fresh
from detkit_sagemaker.testing.refusals import Refused


class Answer(NamedTuple):
    """What a container said to one request."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def container_of(model: Json) -> Json:
    """Return the one container of a model. Raises `Refused` for pipelines."""
    containers = [model["PrimaryContainer"]] if "PrimaryContainer" in model else model.get("Containers", [])
    if len(containers) != 1:
        raise Refused("a model has one container here; inference pipelines are not simulated")
    found: Json = containers[0]
    if "Image" not in found:
        raise Refused("the model's container names no Image; model packages are not simulated")
    return found


def model_data(container: Json) -> tuple[str, bool]:
    """Return the S3 URI of a model's data, empty where it has none, and whether it is an archive."""
    source = container.get("ModelDataSource", {}).get("S3DataSource")
    if source is not None:
        return source["S3Uri"], source["CompressionType"] == "Gzip"
    return container.get("ModelDataUrl", ""), True


class ModelServer:
    """``<image> serve`` in a folder of its own."""

    def __init__(self, account: Account, model: Json, folder: Path, log: LogStream, environment: Json) -> None:
        """Unpack the model and start the process. Raises `Refused` where that is not possible."""
        self._container: Container | None = None
        container = container_of(model)
        command = account.images.command(container["Image"])
        if command is None:
            raise Refused(f"Cannot find image {container['Image']}")
        base = fresh(folder) / "ml"
        (base / "model").mkdir(parents=True)
        self._model, self._keep = base / "model", account.keep
        _fetch(account, container, base)
        self.port, self.log = free_port(), log
        aws = {} if model.get("EnableNetworkIsolation") else account.container_environment
        environment = {
            **aws,
            "AWS_REGION": account.region,
            **container.get("Environment", {}),
            **environment,
            "DETKIT_PORT": str(self.port),
        }
        try:
            command = [*command, "serve"]
            self._container = Container(command, environment, base, log.write, mounted=account.mounted)
        except OSError as error:
            raise Refused(f"the container cannot be started: {error}") from error

    @property
    def runs(self) -> bool:
        """Whether the process is alive."""
        return self._container is not None and self._container.exit_code is None

    def is_healthy(self) -> bool:
        """Whether ``GET /ping`` answers 200 within 2 s."""
        try:
            return self.ask("GET", "/ping", timeout=2).status == 200
        except (OSError, http.client.HTTPException):
            return False

    def wait_healthy(self, seconds: float, job: Job) -> bool:
        """Wait until the server answers its ping; return False when it ended, or after ``seconds``."""
        deadline = time.monotonic() + seconds
        while self.runs and time.monotonic() < deadline:
            self.log.flush()
            if self.is_healthy():
                return True
            if job.wait(TICK):
                return False
        return False

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, timeout: float = 60
    ) -> Answer:
        """Send one request. Raises `OSError` or `http.client.HTTPException` where no answer comes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body=body or None, headers=dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def close(self) -> None:
        """End the process and send the rest of its log."""
        if self._container is not None:
            self._container.close()
        if not self._keep:
            discard(self._model)
        self.log.flush()


def _fetch(account: Account, container: Json, base: Path) -> None:
    uri, packed = model_data(container)
    if not uri:
        return
    if not packed:
        account.storage.download(account.storage.items(uri), base / "model")
        return
    archive = base / "model.tar.gz"
    archive.write_bytes(account.storage.read(uri))
    try:
        storage.unpack(archive, base / "model")
    except (tarfile.TarError, OSError) as error:
        raise Refused(f"Failed to extract model data archive from URL {uri}: {error}") from error
    archive.unlink()
