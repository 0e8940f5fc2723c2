"""Batch transform: a model predicts many images at AWS, in a job that ends by itself.

Images lie in S3 by their content; those that are there are not sent again, and no pixel is re-encoded but for what
AWS's own containers cannot read, see `detkit_sagemaker.answers.look`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import msgspec

from detkit.errors import InvalidValue, MissingSettings
from detkit.plans import Plan
from detkit_sagemaker import hosting, pricing, requests, resources, uploads
from detkit_sagemaker.aws import Aws, AwsError
from detkit_sagemaker.batchjobs import BatchJob, Record, TransformFailed, output_of
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

__all__ = ["TransformFailed", "collect_batch", "plan_batch", "predict_batch", "start_batch"]

_MEGABYTE = 1_000_000


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
    Ctrl-C stops the job; where AWS cannot be asked any more it goes on, and the error says how to collect it. Images
    that fail do not hold up the others: they are left out, and at the end `TransformFailed` names them. Raises
    `MissingSettings`, `UsageError` for what costs money unsaid and for images that are too large, `ImageError`, and
    `AwsError`.
    """

    job = begin(model, sources, msgspec.structs.replace(options, wait=True), aws, tell)
    yield from finish(job, score_threshold, max_detections, tell)


def start_batch(
    model: Model,
    sources: Iterable[str | Path],
    options: TransformOptions,
    aws: Aws | None = None,
    *,
    tell: Tell = resources.to_stderr,
) -> str:
    """Start what `predict_batch` does, and return the job's name for `collect_batch`, here or on another machine.

    Nobody stops it after ``max_runtime`` then but who collects it, so ``max_cost`` cannot be kept and ``yes`` is
    needed. Raises as `predict_batch` does.
    """
    job = begin(model, sources, msgspec.structs.replace(options, wait=False), aws, tell)
    job.leave()
    return job.name


def collect_batch(
    name: str,
    options: TransformOptions,
    aws: Aws | None = None,
    *,
    score_threshold: float = 0.0,
    max_detections: int | None = None,
    tell: Tell = resources.to_stderr,
) -> Iterator[Detections]:
    """Wait for a job of `start_batch` and yield as `predict_batch` does. It may be collected again later.

    Of the ``options``, region and output count. Raises `UsageError` where there is no such job, and `TransformFailed`.
    """
    yield from finish(find_batch(name, options, aws), score_threshold, max_detections, tell)


def find_batch(name: str, options: TransformOptions, aws: Aws | None = None) -> BatchJob:
    """Return a job of `start_batch`. Raises `UsageError` where there is none of that name."""
    options, _ = complete(options)
    aws = aws or Aws(options.region)
    return BatchJob.find(aws, name, root_of(aws, options))


def begin(
    model: Model, sources: Iterable[str | Path], options: TransformOptions, aws: Aws | None, tell: Tell
) -> BatchJob:
    """Start a job. Raises as `predict_batch` does; nothing is left of what fails."""
    with TemporaryDirectory(prefix="detkit-images-") as folder:
        prepared = _Transform.prepare(model, sources, options, aws, Path(folder))
        approve(prepared.plan(), prepared.options)
        return prepared.start(tell)


def finish(job: BatchJob, score_threshold: float, max_detections: int | None, tell: Tell) -> Iterator[Detections]:
    """Wait, remove the job's model, and yield what there is; the job is stopped by Ctrl-C and by its limit.

    Where AWS cannot be asked any more it goes on, and so it does where a machine lost its network.
    """
    try:
        failure = job.wait(tell)
    except AwsError as error:
        job.leave()
        hint = f"transform {job.name} goes on at AWS; `detkit sagemaker transform MODEL DATA --collect {job.name}`"
        raise type(error)(f"{error}. {hint} takes what it finds", error.code) from error
    except BaseException:
        job.clear(tell)
        raise
    job.clear(tell)
    yield from job.detections(failure, score_threshold, max_detections)


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
        container = container_of(model, aws, root, image_uri=options.image_uri, instance_type=options.instance_type)
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
            isolated=container.isolated,
            tags=tags,
        )
        create_job = requests.transform_request(
            name=name,
            model=name,
            input_uri=bundle.url(root),
            output=output_of(root, name),
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
                "the limit on the time is kept by this process; the service has none for such jobs"
                if options.wait
                else "nobody waits for it, so nothing limits its time and cost until it is collected",
            ),
            uploads={
                **counts,
                "bytes": counts["bytes"] + self.container.bytes_to_upload,
                "files": counts["files"] + bool(self.container.to_upload),
            },
            requests=tuple((step.operation, step.request) for step in self.steps),
            worst_case_s=options.max_runtime if options.wait else None,
            price_per_hour=cost.price_per_hour,
            price_source=cost.source,
            concerns=hosting.look_at_account(self.container, options, self.steps, self.aws, self.root),
        )

    def bring(self, tell: Tell) -> None:
        """Upload what is not in S3 yet."""
        uploads.ensure_bucket(self.aws, self.root)
        self.container.bring(self.aws, self.options.kms_key)
        travels = self.bundle.missing(self.aws, self.root)
        tell(f"transform {self.name}: {len(travels)} of {len(self.bundle.files)} images to upload")
        self.bundle.upload(self.aws, self.root, self.options.kms_key)

    def start(self, tell: Tell) -> BatchJob:
        """Bring what is missing and start the job. What fails leaves nothing."""
        self.bring(tell)
        answers = self.container.answers
        record = Record(
            name=self.name,
            kind=answers.kind,
            classes=answers.classes,
            sent=self.sent,
            max_runtime=self.options.max_runtime,
        )
        job, ledger = BatchJob(self.aws, output_of(self.root, self.name), record), Ledger.of(self.aws)
        job.write_record(self.options.kms_key)
        try:
            for step in self.steps:
                resources.create(self.aws, ledger, step)
        except BaseException:
            job.clear(tell)
            raise
        return job


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
