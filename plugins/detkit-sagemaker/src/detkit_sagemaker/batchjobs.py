"""A batch transform job that was started: waited for, read, and cleared away, by whoever started it or others later."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from detkit.errors import DetkitError, RunFailed, UsageError
from detkit_sagemaker import logs, resources, uploads
from detkit_sagemaker.answers import Answers, Kind, MalformedAnswer
from detkit_sagemaker.aws import Aws, AwsError, explained
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.resources import Tell
from detkit_sagemaker.sending import Sent

if TYPE_CHECKING:
    from detkit.detections import Detections

RECORD = "images.json"
"""What is beside a job's answers in S3: what was asked, and which object is which image."""

_PATIENCE_S = 300.0
"""The network or the service may be away so long."""
_READERS = 8
_SHOWN = 5


class TransformFailed(RunFailed):
    """Images that a batch transform has no detections for; `failed` says of each why."""

    def __init__(self, message: str, failed: Mapping[str, str], log_tail: str = "") -> None:
        self.failed = dict(failed)
        told = "\n".join(f"  {path}: {why}" for path, why in list(failed.items())[:_SHOWN])
        more = f"\n  and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
        log = f"\nlast lines of the container:\n{log_tail}" if log_tail else ""
        super().__init__(f"{message}\n{told}{more}{log}", log_tail)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """``images.json``."""

    name: str
    """The job's, and its model's."""
    kind: Kind
    classes: tuple[str, ...]
    sent: list[Sent]
    max_runtime: int
    """Seconds after which whoever waits stops the job."""


@dataclass(frozen=True)
class BatchJob:
    """A job with its record."""

    aws: Aws
    output: str
    """The S3 folder that its answers are written to."""
    record: Record

    @classmethod
    def find(cls, aws: Aws, name: str, root: str) -> BatchJob:
        """Return a job by its name. Raises `UsageError` where there is no record of it below ``root``."""
        output = output_of(root, name)
        bucket, key = uploads.split(output + RECORD)
        try:
            with explained(f"reading {output}{RECORD} (s3:GetObject)"):
                content = aws.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
        except AwsError as error:
            if error.code not in {"NoSuchKey", "NoSuchBucket"}:
                raise
            raise UsageError(f"there is no transform {name!r} in {root}; output= names another folder") from error
        return cls(aws, output, msgspec.json.decode(content, type=Record))

    @property
    def name(self) -> str:
        return self.record.name

    def write_record(self, kms_key: str | None = None) -> None:
        uploads.put(self.aws, self.output + RECORD, msgspec.json.encode(self.record), kms_key)

    def wait(self, tell: Tell) -> str:
        """Wait for the end, and return why it failed, empty where it did not. After ``max_runtime`` that is why.

        Raises `AwsError` where AWS cannot be asked, some minutes after it could be.
        """
        told, total, heard = "", len({one.name for one in self.record.sent}), time.monotonic()
        for _ in resources.waits():
            try:
                with explained(f"looking at transform job {self.name} (sagemaker:DescribeTransformJob)"):
                    found = self.aws.client("sagemaker").describe_transform_job(TransformJobName=self.name)
                status = found["TransformJobStatus"]
                done = len(self._answers()) if status == "InProgress" else None
            except AwsError as error:
                if not resources.may_pass(error) or time.monotonic() - heard > _PATIENCE_S:
                    raise
                if told != str(error):
                    tell(f"transform {self.name}: {error}; it goes on at AWS, and is asked for again")
                    told = str(error)
                continue
            heard = time.monotonic()
            now = status if not done else f"{status}, {done} of {total} images"
            if now != told:
                tell(f"transform {self.name}: {now}")
                told = now
            if status in {"Completed", "Failed", "Stopped"}:
                return "" if status == "Completed" else str(found.get("FailureReason") or f"the job was {status}")
            if time.time() - found["CreationTime"].timestamp() > self.record.max_runtime:
                return f"the job was stopped after max_runtime={self.record.max_runtime} s"
        raise AssertionError("unreachable: waiting has no end")

    def leave(self) -> None:
        """Let it go on: it ends by itself and somebody wants its answers, so clean-up is not to stop it."""
        Ledger.of(self.aws).gone("transform-job", self.name)

    def clear(self, tell: Tell) -> None:
        """Stop the job if it runs, and remove the model at AWS; what cannot be removed is told."""
        ledger = Ledger.of(self.aws)
        for kind in ("transform-job", "model"):
            try:
                resources.remove(self.aws, ledger, kind, self.name)
            except AwsError as error:
                tell(f"{error}; `detkit endpoints rm --expired` removes what is left of {self.name} later")

    def detections(self, failure: str, score_threshold: float, max_detections: int | None) -> Iterator[Detections]:
        """Yield what there is, in the order of the images, and raise `TransformFailed` at the end for what is not."""
        answers, failed, record = self._answers(), {}, self.record
        form = Answers(
            kind=record.kind,
            classes=record.classes,
            score_threshold=score_threshold,
            max_detections=max_detections,
        )

        def read(one: Sent) -> Detections | DetkitError:
            if one.name not in answers:
                return MalformedAnswer(one.path, failure or "there is none")
            bucket, key = uploads.split(answers[one.name])
            try:
                with explained(f"reading {answers[one.name]} (s3:GetObject)"):
                    body = self.aws.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
                return form.read(body, path=one.path, width=one.width, height=one.height)
            except DetkitError as error:
                return error

        pool = ThreadPoolExecutor(_READERS, thread_name_prefix="answers")
        try:
            for one, found in zip(record.sent, pool.map(read, record.sent), strict=True):
                if isinstance(found, DetkitError):
                    failed[one.path] = found.why if isinstance(found, MalformedAnswer) else str(found)
                else:
                    yield found
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if failed:
            log = resources.last_lines(self.aws, logs.TRANSFORM, f"{self.name}/") if failure else ""
            why = f": {failure}" if failure else ""
            count = f"{len(failed)} of {len(record.sent)} images have no detections"
            raise TransformFailed(f"transform {self.name}{why}. {count}:", failed, log)

    def _answers(self) -> dict[str, str]:
        """Return the URL of each answer by the object that it is of; folders below the output are the service's."""
        found = (name for name, _ in uploads.objects(self.aws, self.output) if name.endswith(".out"))
        return {name.rpartition("/")[2].removesuffix(".out"): f"{self.output}{name}" for name in found}


def output_of(root: str, name: str) -> str:
    """Return the S3 folder of a job's answers."""
    return f"{root}/transforms/{name}/"
