"""What a training job leaves in S3, brought back as a `Model`."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from pathlib import Path

import msgspec

from detkit.errors import InvalidData, RunFailed
from detkit.files import write_json
from detkit.job import Job, Trained, Workspace
from detkit_sagemaker import uploads
from detkit_sagemaker.aws import Aws, AwsError, code_of
from detkit_sagemaker.container.archives import unpack

ARCHIVE = "model.tar.gz"
PLACE = "aws.json"
"""The file in a model's folder that says where the model lies at AWS."""

_BESIDE = ".model-"
_MISSING = {"404", "NoSuchKey", "NoSuchBucket"}


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model of AWS's own lies, and what opens it there."""

    region: str
    artifact: str
    """``s3://.../model.tar.gz``."""
    image: str
    """That answers with it."""
    environment: dict[str, str] = {}
    """Of that image."""
    kind: str = "builtin"
    """``builtin`` or ``jumpstart``: the form of its answers."""
    version: str = ""
    """Of a JumpStart model: that of the hub's document which it was trained by."""
    training_job: str = ""


def place_of(model: Path) -> Place | None:
    """Return where the model in a folder lies at AWS; None for one that only lies here."""
    file = model / PLACE
    return msgspec.json.decode(file.read_bytes(), type=Place) if file.is_file() else None


def fetch_ours(aws: Aws, url: str, workspace: Workspace) -> None:
    """Unpack what our container left into the run's ``model/``; its manifest comes last of all.

    Raises `RunFailed` for what will not be another if it is fetched again; `AwsError`, `StorageError` and `OSError`
    for what may be.
    """
    for left in workspace.path.glob(f"{_BESIDE}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=workspace.path, prefix=_BESIDE) as beside:
        archive, folder = Path(beside) / ARCHIVE, Path(beside) / "model"
        _get(aws, url, archive)
        folder.mkdir()
        try:
            unpack(archive, folder)
        except InvalidData as error:
            raise RunFailed(f"{url}: {error}", "") from error
        if not (folder / "detkit.json").is_file():
            raise RunFailed(f"{url} holds no detkit.json, so the container did not finish a model of detkit's", "")
        workspace.model.mkdir(exist_ok=True)
        for path in sorted(folder.rglob("*"), key=lambda path: path.name == "detkit.json"):
            if path.is_file():
                target = workspace.model / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)


def fetch_theirs(
    aws: Aws,
    place: Place,
    workspace: Workspace,
    *,
    job: Job,
    hyperparameters: dict[str, str],
    metrics: dict[str, float],
    started: float,
) -> None:
    """Bring what AWS's image left, as it is, and write the manifest that its image could not.

    Raises what `fetch_ours` does.
    """
    archive = workspace.model / ARCHIVE
    _get(aws, place.artifact, archive)
    if not _holds_files(archive):
        archive.unlink()
        raise RunFailed(f"{place.artifact} holds no file that could be read: the image left no model", "")
    write_json(workspace.model / PLACE, place)
    trained = Trained(
        native=dict(hyperparameters),
        metrics=metrics,
        max_detections=int(job.params.get("max_detections") or 100),
        hardware={"device": "SageMaker"},
    )
    workspace.finish(job, trained, started=started)


def _get(aws: Aws, url: str, target: Path) -> None:
    try:
        uploads.get(aws, url, target)
    except AwsError as error:
        if code_of(error) not in _MISSING:
            raise
        raise RunFailed(f"{url} is not there: the job left no model, or it was deleted", "") from error


def _holds_files(archive: Path) -> bool:
    try:
        with tarfile.open(archive, "r:*") as tar:
            return any(member.isfile() for member in tar)
    except (tarfile.TarError, EOFError):
        return False
