"""Batch transform: a model predicts many images at AWS, in a job that ends by itself.

Images lie in S3 by their content; those that are there are not sent again, and no pixel is re-encoded but for what
AWS's own containers cannot read, see `detkit_sagemaker.answers.look`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from detkit.errors import DetkitError, InvalidValue, MissingSettings, RunFailed
from detkit.plans import Plan
from detkit_sagemaker import hosting, logs, pricing, requests, resources, uploads
from detkit_sagemaker.answers import MalformedAnswer
from detkit_sagemaker.aws import Aws, AwsError, explained
from detkit_sagemaker.defaults import complete, role_arn
from detkit_sagemaker.hosting import Container, container_of, root_of
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.resources import Step, Tell
from detkit_sagemaker.sending import Sent, refuse_large, stage
from detkit_sagemaker.spending import approve

if TYPE_CHECKING:
    from detkit.detections import Detections
    from detkit.job import Model
    from detkit_sagemaker.options import TransformOptions

_MEGABYTE = 1_000_000
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


def plan_batch(model: Model, sources: Iterable[str | Path], options: TransformOptions, aws: Aws | None = None) -> Plan:
    """Return what `predict_batch` would do: data that travels, exact requests, worst-case time and money."""
    with TemporaryDirectory(prefix="detkit-images-") as folder:
        return _Transform.prepare(model, sources, options, aws, Path(folder)).plan()


def predict_batch(
    model: Model,
    sources: Iterable[str | Path],
    options: TransformOptions,
    aws: Aws | None = None,
    *,
    score_threshold: float = 0.0,
    max_detections: int | None = None,
    tell: Tell = resources.to_stderr,
) -> Iterator[Detections]:
    """Yield the detections on each image, in order, once a batch transform job at AWS has ended.

    ``sources`` are files, images in packs, or ``s3://`` URLs. Nothing is sent before the first one is asked for.
    Ctrl-C stops the job. Images that fail do not hold up the others: they are left out, and at the end
    `TransformFailed` names them. Raises `MissingSettings`, `UsageError` for what costs money unsaid and for images that
    are too large, `ImageError`, and `AwsError`.
    """

    with TemporaryDirectory(prefix="detkit-images-") as folder:
        prepared = _Transform.prepare(model, sources, options, aws, Path(folder))
        approve(prepared.plan(), prepared.options)
        prepared.bring(tell)
    failure = prepared.run(tell)
    yield from prepared.answers(failure, score_threshold, max_detections)


@dataclass(frozen=True, kw_only=True)
class _Transform:
    """A batch transform with all that it needs; until `bring` it was only looked at."""

    aws: Aws
    name: str
    container: Container
    sent: list[Sent]
    bundle: uploads.Bundle
    root: str
    options: TransformOptions
    notes: tuple[str, ...]
    steps: tuple[Step, ...]

    @classmethod
    def prepare(
        cls,
        model: Model,
        sources: Iterable[str | Path],
        given: TransformOptions,
        aws: Aws | None,
        folder: Path,
    ) -> _Transform:
        options, completed = complete(given)
        role = _check(model, options)
        aws = aws or Aws(options.region)
        root = root_of(aws, options)
        container = container_of(model, aws, root, options.image_uri)
        sent, bundle = stage(aws, sources, container.answers.kind, folder)
        _refuse_large(sent, options)
        name = requests.job_name(f"transform-{model.manifest.model}"[:40])
        tags = resources.own_tags(aws, model.path.absolute().parent.name)
        create_model = requests.model_request(
            name=name,
            image=container.image,
            role=role_arn(role, partition=aws.partition, account=aws.account),
            model_data=container.artifact,
            options=options,
            environment=container.environment,
            tags=tags,
        )
        create_job = requests.transform_request(
            name=name,
            model=name,
            input_uri=bundle.url(root),
            output=f"{root}/transforms/{name}/",
            options=options,
            content_type=container.answers.content_type,
            accept=container.answers.accept,
            tags=tags,
        )
        return cls(
            aws=aws,
            name=name,
            container=container,
            sent=sent,
            bundle=bundle,
            root=root,
            options=options,
            notes=completed.notes(),
            steps=(Step("model", name, create_model), Step("transform-job", name, create_job)),
        )

    @property
    def output(self) -> str:
        return f"{self.root}/transforms/{self.name}/"

    def plan(self) -> Plan:
        """Return what would be done, by looking only."""
        options = self.options
        missing = self.bundle.missing(self.aws, self.root)
        counts = uploads.total([(self.bundle, missing)])
        cost = pricing.estimate(
            instance_type=options.instance_type,
            instance_count=options.instance_count,
            seconds=options.max_runtime,
            region=self.aws.region,
            use="transform",
        )
        return Plan(
            place=f"SageMaker batch transform in {self.aws.region}, {options.instance_count} x {options.instance_type}",
            notes=(
                *self.notes,
                f"{len(self.sent)} images are predicted in a job that ends by itself",
            ),
            uploads={
                **counts,
                "bytes": counts["bytes"] + self.container.bytes_to_upload,
                "files": counts["files"] + bool(self.container.to_upload),
            },
            requests=tuple((step.operation, step.request) for step in self.steps),
            worst_case_s=options.max_runtime,
            price_per_hour=cost.price_per_hour,
            price_source=cost.source,
        )

    def bring(self, tell: Tell) -> None:
        """Upload what is not in S3 yet."""
        uploads.ensure_bucket(self.aws, self.root)
        self.container.bring(self.aws)
        travels = self.bundle.missing(self.aws, self.root)
        tell(f"transform {self.name}: {len(travels)} of {len(self.bundle.files)} images to upload")
        self.bundle.upload(self.aws, self.root)

    def run(self, tell: Tell) -> str:
        """Run the job to its end, and return why it failed, empty where it did not.

        Whatever happens, the job is not left running, and the model at AWS not left over.
        """
        ledger = Ledger.of(self.aws)
        try:
            for step in self.steps:
                resources.create(self.aws, ledger, step)
            return self._wait(tell)
        except BaseException:
            tell(f"stopping transform {self.name}")
            raise
        finally:
            for step in reversed(self.steps):
                try:
                    resources.remove(self.aws, ledger, step.kind, step.name)
                except AwsError as error:
                    tell(f"{error}; `detkit endpoints rm --expired` removes what is left of {self.name} later")

    def _wait(self, tell: Tell) -> str:
        began, told = time.monotonic(), ""
        for _ in resources.waits():
            with explained(f"looking at transform job {self.name} (sagemaker:DescribeTransformJob)"):
                found = self.aws.client("sagemaker").describe_transform_job(TransformJobName=self.name)
            status = found["TransformJobStatus"]
            done = len(self._outputs()) if status == "InProgress" else None
            now = status if not done else f"{status}, {done} of {len(self.bundle.files)} images"
            if now != told:
                tell(f"transform {self.name}: {now}")
                told = now
            if status in {"Completed", "Failed", "Stopped"}:
                return "" if status == "Completed" else str(found.get("FailureReason") or f"the job was {status}")
            if time.monotonic() - began > self.options.max_runtime:
                return f"the job was stopped after max_runtime={self.options.max_runtime} s"
        raise AssertionError("unreachable: waiting has no end")

    def _outputs(self) -> dict[str, str]:
        """Return the URL of each answer by the object that it is of; folders below the output are the service's."""
        found = (name for name, _ in uploads.objects(self.aws, self.output) if name.endswith(".out"))
        return {name.rpartition("/")[2].removesuffix(".out"): f"{self.output}{name}" for name in found}

    def answers(self, failure: str, score_threshold: float, max_detections: int | None) -> Iterator[Detections]:
        """Yield what is there, in order, and raise at the end for what is not."""
        read = replace(self.container.answers, score_threshold=score_threshold, max_detections=max_detections)
        outputs, failed = self._outputs(), {}

        def answer(one: Sent) -> Detections | DetkitError:
            if one.name not in outputs:
                return MalformedAnswer(one.path, failure or "there is none")
            try:
                bucket, key = uploads.split(outputs[one.name])
                with explained(f"reading {outputs[one.name]} (s3:GetObject)"):
                    body = self.aws.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()
                return read.read(body, path=one.path, width=one.width, height=one.height)
            except DetkitError as error:
                return error

        pool = ThreadPoolExecutor(_READERS, thread_name_prefix="answers")
        try:
            for one, found in zip(self.sent, pool.map(answer, self.sent), strict=True):
                if isinstance(found, DetkitError):
                    failed[one.path] = str(found) if one.name in outputs else failure or "no answer"
                else:
                    yield found
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if failed:
            log = resources.last_lines(self.aws, logs.TRANSFORM, f"{self.name}/") if failure else ""
            why = f": {failure}" if failure else ""
            count = f"{len(failed)} of {len(self.sent)} images have no detections"
            raise TransformFailed(f"transform {self.name}{why}. {count}:", failed, log)


def _check(model: Model, options: TransformOptions) -> str:
    """Return the execution role. Raises for everything that is missing at once, before AWS is asked anything."""
    missing = []
    if options.role is None:
        missing.append(("role", hosting.ROLE_HINT))
    if hosting.needs_image(model) and options.image_uri is None:
        missing.append(("image_uri", hosting.IMAGE_HINT))
    if missing or options.role is None:
        raise MissingSettings(missing)
    return options.role


def _refuse_large(sent: list[Sent], options: TransformOptions) -> None:
    most = requests.LARGEST_TRANSFORM_MB // options.concurrency
    if options.max_payload > most:
        raise InvalidValue("max_payload", options.max_payload, f"at most {most} with concurrency={options.concurrency}")
    need = -(-max(one.bytes for one in sent) // _MEGABYTE)
    if need > requests.LARGEST_TRANSFORM_MB:
        hint = f"{requests.LARGEST_TRANSFORM_MB} MB is the most that a batch transform takes; make them smaller"
    else:
        hint = f"say max_payload={need}"
        if need * options.concurrency > requests.LARGEST_TRANSFORM_MB:
            hint += f" concurrency={requests.LARGEST_TRANSFORM_MB // need}"
    refuse_large(sent, options.max_payload * _MEGABYTE, hint)
