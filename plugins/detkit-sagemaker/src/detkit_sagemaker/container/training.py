"""``train``: ``/opt/ml`` is a detkit run directory, and this process is its worker.

The modules in the channel ``code`` run: whoever starts a job in an account has chosen them, and they are checked
against the job's digest. Hosting asks for more, see `detkit_sagemaker.container.serving`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import msgspec

from detkit import launching, plugins, worker
from detkit.backends import Backend, SeveralOptions
from detkit.environments import python_command
from detkit.errors import DetkitError, InvalidData, StorageError, Unsupported, UsageError
from detkit.files import atomic_write, file_sha256, inside, place
from detkit.job import Job, Manifest, Trained, Workspace
from detkit.launching import Machine
from detkit.params import Params, set_fields
from detkit.usercode import UserCode
from detkit_sagemaker.container import engines
from detkit_sagemaker.container.archives import unpack

REASON_LENGTH = 1024
"""So many characters of ``output/failure`` become the job's ``FailureReason``."""

IMAGES, LINKS = "-images", "links.json"
"""Images that stay where they lie in S3 come in a channel of their own, ``train-images``; ``links.json`` in ``train``
says for each file of that channel which one of the other it is."""

WEIGHTS = "weights"
"""Channel with the file that training starts from, where that is no model of detkit's; the job has its name alone."""

PORT = 29400
"""Where the first of several machines listens."""

_WORKER = "import sys; from detkit_sagemaker.container.training import work; work(sys.argv[1])"

CODE = "code"
"""Folder of a model that holds the modules of the user's own, where it takes some."""


class Container(Workspace):
    """The run directory of a container: it also has what SageMaker says of the job, and leaves by itself."""

    @property
    def hyperparameters_file(self) -> Path:
        return self.path / "input/config/hyperparameters.json"

    @property
    def hosts(self) -> list[str]:
        """The names of the job's machines, sorted; SageMaker says them in ``resourceconfig.json``."""
        file = self.path / "input/config/resourceconfig.json"
        return sorted(json.loads(file.read_bytes())["hosts"]) if file.is_file() else ["algo-1"]

    def job(self) -> Job:
        """Return the job with the strings of ``hyperparameters.json`` checked and converted.

        Raises `PluginError` where this image lacks the backend, `UnknownName` and `InvalidValue` for hyperparameters.
        """
        job = super().job()
        backend = engines.find(job.backend, job.engine)
        given = self._given()
        kind = f"hyperparameter of {job.backend}/{job.model}"
        own = {name: value for name, value in job.params.items() if name not in given}
        params = set_fields(backend.spec(job.model).params, own, kind=kind)
        overlay = {name: job.params[name] for name in given}
        origins = dict.fromkeys(given, "hyperparameters.json")
        params = set_fields(params, overlay, kind=kind, origins=origins)
        if (weights := self._weights_file(params)) is not None:
            params = msgspec.structs.replace(params, weights=str(weights))
        options = {**job.options, **self._several()} if trains_in_several(backend) else job.options
        return msgspec.structs.replace(job, params=msgspec.to_builtins(params), options=options)

    def _weights_file(self, params: Params) -> Path | None:
        weights = getattr(params, "weights", None)
        file = self.path / "input/data" / WEIGHTS / (weights or "")
        return file if file.is_file() else None

    def _several(self) -> dict[str, Any]:
        """Return the options that say how many processes train: one for each GPU of each machine."""
        gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
        return {"gpus": gpus or None, "nodes": len(self.hosts)}

    @property
    def machine(self) -> Machine | None:
        """Which of several machines this is."""
        if len(self.hosts) == 1:
            return None
        file = self.path / "input/config/resourceconfig.json"
        own = self.hosts.index(json.loads(file.read_bytes())["current_host"])
        port = int(os.environ.get("DETKIT_MASTER_PORT", PORT))
        return Machine(own, os.environ.get("DETKIT_MASTER_ADDR", self.hosts[0]), port)

    def _given(self) -> list[str]:
        """Return the names that `Workspace.job` takes from ``hyperparameters.json``."""
        if not self.hyperparameters_file.is_file():
            return []
        named: dict[str, Any] = json.loads(self.hyperparameters_file.read_bytes())
        return [name for name in named if not name.startswith(("_", "sagemaker_"))]

    def finish(self, job: Job, trained: Trained, *, started: float) -> Manifest:
        """Write the manifest, and before it the user's own modules: only ``model/`` leaves the container."""
        if job.code is not None and job.code.digest:
            UserCode.of(job.code, self.code).copy_to(self.model / CODE)
        return super().finish(job, trained, started=started)

    def shorten_failure(self) -> None:
        """Make the first line of ``output/failure`` no longer than what SageMaker keeps of it."""
        if not self.failure_file.is_file():
            return
        text = self.failure_file.read_text(errors="replace")
        first = text.partition("\n")[0]
        if len(first) > REASON_LENGTH:
            with atomic_write(self.failure_file) as file:
                file.write(f"{first[: REASON_LENGTH - 3]}...\n{text}".encode())


def train(base: Path) -> int:
    """Do the job that lies in a folder; returns the exit code. SIGTERM ends it after a step, with a checkpoint."""
    workspace = Container(base)
    try:
        for folder in (workspace.checkpoints, workspace.model, workspace.metrics_file.parent):
            folder.mkdir(parents=True, exist_ok=True)
        job = workspace.job()
        refuse_several_hosts(workspace, job)
        unpack_parent(workspace)
        link_images(workspace)
        workspace.is_silent = workspace.machine is not None and workspace.machine.rank > 0
        _tell_other_versions(workspace, job)
    except Exception as error:
        known = isinstance(error, DetkitError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        workspace.fail(reason, "" if known else traceback.format_exc())
        print(reason if known else traceback.format_exc(), file=sys.stderr, flush=True)
        code = error.exit_code if isinstance(error, DetkitError) else 3
    else:
        code = _launch(workspace, job) if launching.launches(job.options) else worker.train(workspace)
    workspace.shorten_failure()
    return code


def _launch(workspace: Container, job: Job) -> int:
    """Let torchrun start the workers of this machine, and wait for them. SIGTERM ends them all after a step."""
    worker_of_many = python_command(sys.executable, _WORKER, str(workspace.path))
    command = launching.command(sys.executable, worker_of_many, job.options, workspace.path, machine=workspace.machine)
    asked_to_stop = False
    with subprocess.Popen(command) as process:

        def stop(_number: int, _frame: FrameType | None) -> None:
            nonlocal asked_to_stop
            asked_to_stop = True
            process.terminate()

        signal.signal(signal.SIGTERM, stop)
        code = process.wait()
    return 0 if asked_to_stop and not workspace.failure_file.exists() else code


def work(base: str) -> NoReturn:
    """Be one of the workers that torchrun starts."""
    worker.leave(worker.train(Container(base)))


def refuse_several_hosts(workspace: Container, job: Job) -> None:
    """Raise `Unsupported` for a job on several machines whose engine exchanges no gradients."""
    backend = engines.find(job.backend, job.engine)
    if len(workspace.hosts) > 1 and not trains_in_several(backend):
        raise Unsupported(
            f"the job has {len(workspace.hosts)} machines ({', '.join(workspace.hosts)}), and {backend.name} trains on "
            "one; give instance_count=1, and a larger instance_type where one is too slow"
        )


def trains_in_several(backend: Backend) -> bool:
    """Return whether an engine trains one model in several processes."""
    return issubclass(backend.options, SeveralOptions)


def unpack_parent(workspace: Container) -> None:
    """Make the ``model`` channel, where there is one, a model's folder: SageMaker hands archives over as they are."""
    folder = workspace.parent_model
    if not folder.is_dir() or (folder / "detkit.json").is_file():
        return
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    archives = [path for path in found if path.name.endswith((".tar.gz", ".tgz", ".tar"))]
    if len(archives) != 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in found[:5]) or "nothing"
        raise UsageError(f"channel 'model' holds {names}; expected a finished model of detkit, or one model.tar.gz")
    try:
        unpack(archives[0], folder)
    except StorageError as error:
        raise UsageError(
            f"{error}. the channel 'model' needs the input mode File, as its archive is unpacked"
        ) from error
    if not (folder / "detkit.json").is_file():
        raise InvalidData(
            f"{archives[0].name} in channel 'model' has no detkit.json, so no engine of detkit trained it; start from "
            "a model of the same kind"
        )


def link_images(workspace: Container) -> None:
    """Make images appear in their channels that came in channels of their own. Raises `InvalidData` for odd names."""
    for file in sorted(workspace.path.glob(f"input/data/*/{LINKS}")):
        folder, images = file.parent, file.parent.with_name(file.parent.name + IMAGES)
        links: dict[str, str] = json.loads(file.read_bytes())
        for name, key in links.items():
            source = images / inside(key)
            if not source.is_file():
                raise InvalidData(f"{source}: channel {images.name!r} does not hold what {file} names")
            place(source, folder / inside(name))
        data = workspace.dataset(folder.name)
        digests = workspace.image_digests(folder.name)
        for path, digest in zip(data.paths if data is not None else (), digests, strict=False):
            if file_sha256(Path(path)) != digest:
                raise InvalidData(f"{path}: it is another image than when the run was begun; begin a new one")


def _tell_other_versions(workspace: Container, job: Job) -> None:
    here = plugins.versions(job.backend)
    other = {name: asked for name, asked in job.versions.items() if here.get(name, asked) != asked}
    if other:
        told = ", ".join(f"{name} {asked}, and the image has {here[name]}" for name, asked in other.items())
        workspace.log("log", {"message": f"the run was started with {told}; training goes on with the image's"})
