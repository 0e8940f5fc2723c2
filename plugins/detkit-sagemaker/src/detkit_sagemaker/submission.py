"""From a run that is laid out to the exact request of its training job, for each of the three kinds of model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from detkit import plugins
from detkit.backends import SeveralOptions
from detkit.data import Dataset
from detkit.errors import MissingSettings, Unsupported, UsageError
from detkit.events import pattern, validation_loss
from detkit.job import Job, Model, Workspace
from detkit.loop import HEADLINES
from detkit.plans import Concern
from detkit_sagemaker import builtin, channels, preflight, pricing
from detkit_sagemaker.artifacts import place_of
from detkit_sagemaker.aws import Aws
from detkit_sagemaker.channels import Staged
from detkit_sagemaker.defaults import complete, role_arn
from detkit_sagemaker.hosting import IMAGE_HINT, ROLE_HINT, root_of
from detkit_sagemaker.images import TRAINING_INSTANCE, builtin_image
from detkit_sagemaker.jumpstart import MODEL_CONTENT, HubModel
from detkit_sagemaker.models import BUILTIN, JumpstartParams, jumpstart_id, local_backend
from detkit_sagemaker.options import SagemakerOptions
from detkit_sagemaker.pricing import Estimate
from detkit_sagemaker.requests import Channel, Request, check_request, job_name, training_request
from detkit_sagemaker.resources import owner
from detkit_sagemaker.uploads import Bundle, split

if TYPE_CHECKING:
    from detkit_sagemaker.runs import RemoteJob

Kind = Literal["ours", "builtin", "jumpstart"]

_MOST_METRICS = 40
"""Definitions that a request may have (API reference, AlgorithmSpecification)."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Everything that starting a job takes. Nothing of it has been done."""

    kind: Kind
    name: str
    request: Request
    options: SagemakerOptions
    root: str
    """S3 folder below which everything lies."""
    staged: list[Staged]
    estimate: Estimate
    notes: list[str] = field(default_factory=list)
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Expressions for the log of an image that is not ours."""
    hosting: Mapping[str, Any] = field(default_factory=dict)
    """What will answer with the model at AWS, where its image is not ours."""
    concerns: list[Concern] = field(default_factory=list)
    hub: HubModel | None = None
    """What JumpStart says of its model."""

    @property
    def bundles(self) -> list[Bundle]:
        """All that has to lie in S3."""
        return [bundle for one in self.staged for bundle in one.bundles]

    def look_at_account(self, aws: Aws, *, at_once: int = 1) -> list[Concern]:
        """Return what is wrong with the account, and what speaks against the machine and the request; only looks.

        ``at_once`` is how many such jobs run together.
        """
        resources = self.request["ResourceConfig"]
        instance_type, count = resources["InstanceType"], resources["InstanceCount"]
        image = self.options.image_uri if self.kind == "ours" else None
        needs: dict[tuple[preflight.Use, str], int] = {
            ("spot" if self.options.spot else "training", instance_type): count * at_once
        }
        rejected = [Concern(level="error", message=line) for line in check_request("CreateTrainingJob", self.request)]
        return [
            *self.concerns,
            *rejected,
            *preflight.machine(self.kind, self.options, instance_type),
            *preflight.volume(
                self.options,
                resources["VolumeSizeInGB"],
                sum(one.bytes_on_disk for one in self.staged),
                sum(one.bytes_on_disk for one in self.staged if one.input_mode == "File"),
            ),
            *preflight.volume_key(self.options, instance_type),
            *(one for name in self._data_buckets() for one in preflight.data_bucket(aws, name)),
            *preflight.account(aws, role_arn=self.request["RoleArn"], output=self.root, needs=needs, image_uri=image),
        ]

    def _data_buckets(self) -> list[str]:
        """Return the buckets in which images stay, but for the job's own."""
        urls = [file.source for one in self.staged for file in one.left if isinstance(file.source, str)]
        return sorted({split(url)[0] for url in urls} - {split(self.root)[0]})


def kind_of(model: str) -> Kind:
    """Return which of the three ways a model is trained in."""
    return "builtin" if model == BUILTIN else "jumpstart" if jumpstart_id(model) is not None else "ours"


def prepare(
    aws: Aws,
    workspace: Workspace,
    job: Job,
    folder: Path,
    *,
    earlier: RemoteJob | None = None,
    spent: float | None = 0.0,
    name: str | None = None,
    but: Collection[str] = (),
) -> Submission:
    """Return the job's request and its data, written into ``folder`` where it needs another form; only looks at AWS.

    ``earlier`` is the job to go on from, ``spent`` the US dollars that the run has cost; None where nobody knows.
    ``name`` is the job's where it is not the run's, and ``but`` are channels of the run that it does not get.
    Raises `UsageError`, `MissingSettings` and `AwsError`.
    """
    given = msgspec.convert(job.options, SagemakerOptions)
    options, completed = complete(given)
    if options.role is None:
        raise MissingSettings([("role", ROLE_HINT)])
    kind, notes = kind_of(job.model), list(completed.notes())
    if options.max_cost is not None and spent != 0:
        options = msgspec.structs.replace(options, max_cost=_left(options.max_cost, spent))
        notes.append(f"of max_cost={given.max_cost:g}, {spent:.2f} USD are spent by the run's earlier jobs")
    way = {"ours": _ours, "builtin": _builtin, "jumpstart": _jumpstart}[kind]
    name = name or job_name(workspace.path.name)
    ready = way(_Common(aws, workspace, job, folder, options, notes, name, earlier, but))
    return replace(ready, notes=[*ready.notes, *channels.of_images_in_s3(ready.staged)])


def _left(max_cost: float, spent: float | None) -> float:
    """Return what is left of an amount. Raises `UsageError` where that is nothing, or not known."""
    if spent is None:
        raise UsageError(
            f"max_cost={max_cost:g} cannot be kept, as nobody knows what the run's earlier jobs cost; give yes=True "
            "(--yes) and rely on max_runtime, or start a new run"
        )
    if spent >= max_cost:
        raise UsageError(
            f"the run has cost about {spent:.2f} USD, and max_cost={max_cost:g} is for all of it; give more"
        )
    return max_cost - spent


@dataclass(frozen=True)
class _Common:
    aws: Aws
    workspace: Workspace
    job: Job
    folder: Path
    options: SagemakerOptions
    notes: list[str]
    name: str
    earlier: RemoteJob | None
    but: Collection[str]

    @property
    def root(self) -> str:
        return root_of(self.aws, self.options)

    @property
    def parts(self) -> dict[str, Dataset]:
        """What is trained with and what is validated on, where there is any."""
        found = {name: self.workspace.dataset(name) for name in ("train", "validation")}
        return {name: data for name, data in found.items() if data is not None}

    def request(
        self,
        *,
        image: str,
        instance_type: str,
        entries: list[Channel],
        metrics: Mapping[str, str] | None = None,
        **more: Any,
    ) -> tuple[Request, Estimate]:
        """Build the request; what may be spent ends the job. Of ``metrics`` the first count where they are too many."""
        options, names = self.options, list(metrics or ())
        if left := names[_MOST_METRICS:]:
            self.notes.append(
                f"AWS takes {_MOST_METRICS} metric definitions, and there are {len(names)}: CloudWatch does not get "
                f"{', '.join(left)}; the run has them"
            )
        use: dict[str, Any] = {"instance_type": instance_type, "region": self.aws.region, "use": "training"}
        if options.max_cost is not None:
            within = pricing.runtime_within(options.max_cost, instance_count=options.instance_count, **use)
            if within < options.max_runtime:
                self.notes.append(f"max_cost={options.max_cost:g} ends the job after {within} s")
                options = msgspec.structs.replace(options, max_runtime=within)
        request = training_request(
            name=self.name,
            image=image,
            role=role_arn(str(options.role), partition=self.aws.partition, account=self.aws.account),
            output=f"{self.root}/jobs",
            channels=entries,
            options=options,
            instance_type=instance_type,
            metrics={name: metrics[name] for name in names[:_MOST_METRICS]} if metrics else None,
            tags={"detkit:run": self.workspace.path.name, "detkit:owner": owner(self.aws), **more.pop("tags", {})},
            **more,
        )
        estimate = pricing.estimate(
            instance_count=options.instance_count, seconds=options.max_runtime, spot=options.spot, **use
        )
        return request, estimate


def _ours(given: _Common) -> Submission:
    found = local_backend(given.job.model)
    assert found is not None  # the model's parameters came from it
    backend, model = found
    if given.options.image_uri is None:
        raise MissingSettings([("image_uri", IMAGE_HINT)])
    if given.options.instance_count > 1 and not issubclass(backend.options, SeveralOptions):
        raise Unsupported(
            f"instance_count={given.options.instance_count}: {backend.name} trains on one machine; give "
            "instance_count=1, and a larger instance_type where one is too slow"
        )
    earlier, staged = given.earlier, list[Staged]()
    if earlier is None or not earlier.staged:
        params, weights = _starts_from(given)
        job = msgspec.structs.replace(
            given.job,
            backend=backend.name,
            model=model,
            engine=backend.engine,
            params=params,
            options=msgspec.to_builtins(backend.options()),
            versions=plugins.versions(backend.name),
        )
        staged = [*channels.for_our_container(given.workspace, job, given.folder, given.but), *weights]
    request, estimate = given.request(
        image=given.options.image_uri,
        instance_type=given.options.instance_type or TRAINING_INSTANCE,
        entries=[one.channel(given.root) for one in staged],
        metrics={name: pattern(name) for name in _printed(backend.models[model].losses)},
        checkpoints=f"{given.root}/checkpoints/{given.name}",
    )
    if earlier is not None:
        request["CheckpointConfig"] = earlier.request["CheckpointConfig"]
        chosen = {n: v for n, v in earlier.request.get("HyperParameters", {}).items() if not n.startswith("_")}
        if chosen:  # of a trial, whose job is that of all
            request["HyperParameters"] = chosen
        if earlier.staged:  # all that is to be done again lies in S3, and need not be here
            request["InputDataConfig"] = earlier.request["InputDataConfig"]
    return Submission(
        kind="ours",
        name=given.name,
        request=request,
        options=given.options,
        root=given.root,
        staged=staged,
        estimate=estimate,
        notes=given.notes,
    )


def _printed(losses: Sequence[str]) -> list[str]:
    """Return what our container prints of a model's training, first that by which a run is judged.

    ``losses`` are the parts of its loss.
    """
    scores = [f"{of}/{name}" for of in ("val", "test") for name in HEADLINES]
    parts = [*map(validation_loss, losses), *(f"train/{name}" for name in losses)]
    return [*scores, "val/loss", "train/loss", *parts, "train/learning_rate"]


def _starts_from(given: _Common) -> tuple[dict[str, Any], list[Staged]]:
    """Return the parameters as the container takes them, and the file of weights that it needs for them."""
    params = dict(given.job.params)
    wanted = params.get("weights")
    if wanted is None or (given.workspace.parent_model / "detkit.json").is_file():
        return params, []
    if (file := Path(wanted)).is_absolute():  # the trainer has made it so
        if not file.is_file():
            raise UsageError(f"weights={wanted}: there is no such file any more")
        return {**params, "weights": file.name}, [channels.weights(file)]
    if wanted == "auto" or given.options.network_isolation:
        raise UsageError(
            f"weights={wanted} would not be in our container, "
            + ("which reaches nothing" if given.options.network_isolation else "whose cache is empty")
            + "; name their file with weights=FILE, or train "
            + ("" if given.options.network_isolation else "with weights=coco, which it fetches, or ")
            + "with weights=none"
        )
    given.notes.append(f"our container fetches weights={wanted}; where it does not reach the network, the job fails")
    return params, []


def _builtin(given: _Common) -> Submission:
    params = msgspec.convert(given.job.params, builtin.ObjectDetectionParams)
    parent = _parent(given.workspace)
    parts = given.parts
    form = given.options.data_format or _usual_format(given.workspace, parts, parent)
    full_only = given.options.data_format is None
    concerns = [
        *preflight.builtin_image(given.aws.region),
        *preflight.builtin_data(params, parts, form, full_only=full_only),
    ]
    if parent is not None:
        concerns += preflight.incremental(params, given.job.classes, parent.manifest.native, parent.classes)
    _refuse_errors(concerns)
    staged, told = channels.for_builtin(given.workspace, given.folder, form, given.root, full_only=full_only)
    train = parts["train"]
    empty = int((train.boxes_per_image() == 0).sum()) if full_only or form == "recordio" else 0
    busiest = max(int(data.boxes_per_image().max(initial=0)) for data in parts.values())
    facts = {"num_training_samples": len(train) - empty, "label_width": builtin.needed_label_width(busiest)}
    count = given.options.instance_count
    hyperparameters = builtin.hyperparameters(params, num_classes=len(train.classes), instance_count=count, **facts)
    entries = [one.channel(given.root) for one in staged]
    if parent is not None:
        entries.append(Channel(name="model", s3_uri=_artifact(parent), content_type=MODEL_CONTENT, input_mode="File"))
    image = builtin_image(given.aws.region)
    request, estimate = given.request(
        image=image,
        instance_type=given.options.instance_type or TRAINING_INSTANCE,
        entries=entries,
        hyperparameters=hyperparameters,
        checkpoints=f"{given.root}/checkpoints/{given.name}" if given.options.spot else None,
    )
    return Submission(
        kind="builtin",
        name=given.name,
        request=request,
        options=given.options,
        root=given.root,
        staged=staged,
        estimate=estimate,
        notes=[*given.notes, *told, *builtin.notes(params, instance_count=count, **facts)],
        metrics=builtin.METRICS,
        hosting={"image": image},
        concerns=concerns,
    )


def _usual_format(workspace: Workspace, parts: Mapping[str, Dataset], parent: Model | None) -> channels.DataFormat:
    """Return how the built-in algorithm has its data where nobody chooses: a manifest where all images lie in S3.

    Else packs, whose writer refuses what it would read otherwise; also where it goes on from a model, which AWS
    documents for packs and images that are copied first.
    """
    if parent is not None or not channels.are_in_s3(workspace):
        return "recordio"
    return "recordio" if any(preflight.odd_images(data) for data in parts.values()) else "manifest"


def _jumpstart(given: _Common) -> Submission:
    params = msgspec.convert(given.job.params, JumpstartParams)
    hub = HubModel.read(given.aws, str(jumpstart_id(given.job.model)))
    hub.require_training()
    instance_type = hub.training_instance(given.options.instance_type)
    isolated = given.options.network_isolation
    isolated = hub.training_enable_network_isolation if isolated is None else isolated
    parts = given.parts
    _refuse_errors(
        [
            one
            for name, data in parts.items()
            for one in preflight.own_algorithm_data("JumpStart", name, preflight.odd_images(data))
        ]
    )
    staged, classes = channels.for_jumpstart(given.workspace, given.folder, given.but)
    if unknown := [name for name in given.job.classes if name not in classes]:
        given.notes.append(f"no image that is sent has a box of {', '.join(unknown)}, so the model will not know it")
    parent = _parent(given.workspace)
    (training,) = [one.channel(given.root) for one in staged]
    request, estimate = given.request(
        image=hub.training_image(instance_type),
        instance_type=instance_type,
        entries=hub.channels(
            training.s3_uri, parent_uri=None if parent is None else _artifact(parent), isolated=isolated
        ),
        hyperparameters=hub.wire(params, job_name=given.name, region=given.aws.region, isolated=isolated),
        metrics=hub.metrics,
        tags=hub.tags,
        isolated=hub.training_enable_network_isolation,
        encrypted=hub.encrypt_inter_container_traffic,
        volume_size=hub.training_volume_size,
    )
    host = hub.default_inference_instance_type or TRAINING_INSTANCE
    validation = parts.get("validation")
    split = "JumpStart takes no validation images: it divides what it is given, 80 to 20, by itself"
    if validation and "validation" in given.but:
        split += f"; the {len(validation)} validation images are kept from it"
    elif validation:
        split += f"; the {len(validation)} validation images are given to it as well, and count as seen"
    return Submission(
        kind="jumpstart",
        name=given.name,
        request=request,
        options=given.options,
        root=given.root,
        staged=staged,
        estimate=estimate,
        notes=[*given.notes, split],
        concerns=[] if parent is None else preflight.same_classes("JumpStart", classes, parent.classes),
        metrics=hub.metrics,
        hosting={
            "image": hub.hosting_image(host),
            "environment": hub.hosting_environment(),
            "version": hub.version,
            "classes": classes,
        },
        hub=hub,
    )


def _parent(workspace: Workspace) -> Model | None:
    return Model(workspace.parent_model) if (workspace.parent_model / "detkit.json").is_file() else None


def _artifact(parent: Model) -> str:
    place = place_of(parent.path)
    if place is None:
        raise UsageError(f"{parent.path} does not say where it lies in S3; train from a run that SageMaker trained")
    return place.artifact


def _refuse_errors(concerns: Sequence[Concern]) -> None:
    """Raise `UsageError` with all that the service would reject, where there is anything."""
    errors = [str(concern) for concern in concerns if concern.level == "error"]
    if errors:
        raise UsageError("AWS would reject this; nothing was started:\n" + "\n".join(errors))
