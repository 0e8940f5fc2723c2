"""What a training job leaves in S3, brought back as a `Model`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import msgspec

from detkit.errors import InvalidData, RunFailed
from detkit.files import write_json
from detkit.job import Job, Trained, Workspace
from detkit_sagemaker import uploads
from detkit_sagemaker.aws import Aws
from detkit_sagemaker.container.archives import unpack

ARCHIVE = "model.tar.gz"
PLACE = "aws.json"
"""The file in a model's folder that says where the model lies at AWS."""

_BESIDE = ".model-"


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
    training_job: str = ""


def place_of(model: Path) -> Place | None:
    """Return where the model in a folder lies at AWS; None for one that only lies here."""
    file = model / PLACE
    return msgspec.json.decode(file.read_bytes(), type=Place) if file.is_file() else None


def fetch_ours(aws: Aws, url: str, workspace: Workspace) -> None:
    """Unpack what our container left into the run's ``model/``; its manifest comes last of all."""
    for left in workspace.path.glob(f"{_BESIDE}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=workspace.path, prefix=_BESIDE) as beside:
        archive, folder = Path(beside) / ARCHIVE, Path(beside) / "model"
        uploads.get(aws, url, archive)
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
    """Bring what AWS's image left, as it is, and write the manifest that its image could not."""
    uploads.get(aws, place.artifact, workspace.model / ARCHIVE)
    write_json(workspace.model / PLACE, place)
    trained = Trained(
        native=dict(hyperparameters),
        metrics=metrics,
        max_detections=int(job.params.get("max_detections") or 100),
        hardware={"device": "SageMaker"},
    )
    workspace.finish(job, trained, started=started)
