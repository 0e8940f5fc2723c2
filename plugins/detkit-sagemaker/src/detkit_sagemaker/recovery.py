"""A run directory on another machine: what it takes lies in S3 beside the job, and is fetched by the job's name."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from detkit.errors import InvalidData, UsageError
from detkit.job import CHANNELS, Workspace
from detkit_sagemaker import creating, hosting, uploads
from detkit_sagemaker.aws import Aws, AwsError, explained
from detkit_sagemaker.container.archives import unpack
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.resources import is_missing

_OF_A_CHANNEL = ("columns.npz", "digests.json")
"""What a run has to know of its images without having them."""


def keep(aws: Aws, root: str, workspace: Workspace, name: str, kms_key: str | None = None) -> None:
    """Put into S3 what `recover` takes: the job, and which images it is about; not the images."""
    files = {"input/data/job/job.json": workspace.job_file}
    for channel in (*CHANNELS, "retention"):
        for file in _OF_A_CHANNEL:
            path = workspace.channel(channel) / file
            if path.is_file():
                files[path.relative_to(workspace.path).as_posix()] = path
    for path in workspace.path.glob("*.json"):
        files[path.name] = path
    with tempfile.TemporaryDirectory(prefix="detkit-run-") as folder:
        archive = hosting.pack(files, Path(folder) / "run.tar.gz")
        uploads.put(aws, _url(root, name), archive.read_bytes(), kms_key)


def recover(aws: Aws, name: str, folder: Path) -> Workspace:
    """Make the run directory of a training job that another machine started, or a tuning job of its.

    Raises `UsageError`, also where the directory is there.
    """
    try:
        with explained(f"asking for training job {name} (sagemaker:DescribeTrainingJob)"):
            job = aws.client("sagemaker").describe_training_job(TrainingJobName=name)
    except AwsError as error:
        if not is_missing(error):
            raise
        raise UsageError(
            f"there is no training job {name} in account {aws.account}, {aws.region}; "
            "`aws sagemaker list-training-jobs` lists them, and --region names another region"
        ) from error
    if folder.exists():
        raise _taken(folder)
    root = job["OutputDataConfig"]["S3OutputPath"].rstrip("/").removesuffix("/jobs")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        archive, run = Path(beside) / "run.tar.gz", Path(beside) / "run"
        try:
            kept_as = job["TuningJobArn"].rpartition("/")[2] if "TuningJobArn" in job else name
            uploads.get(aws, _url(root, kept_as), archive)
            run.mkdir()
            unpack(archive, run)
            if kept_as != name:
                _make_trial(Workspace(run), job)
        except (AwsError, InvalidData) as error:
            raise UsageError(
                f"training job {name} was not started by detkit, or what it kept is gone: {error}"
            ) from error
        workspace = Workspace(run)
        for place in (workspace.checkpoints, workspace.model, workspace.metrics_file.parent):
            place.mkdir(parents=True, exist_ok=True)
        try:
            run.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            raise _taken(folder) from None  # another process has just made it
    return Workspace(folder)


def _make_trial(workspace: Workspace, job: Mapping[str, Any]) -> None:
    from detkit_sagemaker import searching, trials

    record = (workspace.path / searching.RECORD).read_bytes()
    remote = msgspec.json.decode(record, type=trials.RemoteTuning)
    trials.become_trial(workspace, remote, trials.sent(remote, job), job)


def _taken(folder: Path) -> UsageError:
    follow = f"`detkit runs attach {folder}` follows the run in it"
    return UsageError(f"{folder} is there already; {follow}, and DETKIT_RUNS names another folder for runs")


def _url(root: str, name: str) -> str:
    return f"{root}/runs/{name}.tar.gz"


def going_on(aws: Aws, kind: creating.Kind) -> list[str]:
    """Return the jobs of a kind that this machine began, and that go on; those AWS does not know are forgotten."""
    ledger, found = Ledger.of(aws), []
    for entry in ledger.pending():
        if entry.kind != kind.kept_as:
            continue
        try:
            job = creating.describe(aws, kind, entry.name)
        except AwsError as error:
            if not is_missing(error):
                raise
            if entry.is_abandoned:  # else it may just be beginning
                ledger.gone(kind.kept_as, entry.name)
            continue
        if job[f"{kind.title}Status"] in {"InProgress", "Stopping"}:
            found.append(entry.name)
    return found
