"""The controller's side: what to ask AWS for, and when not to."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from detkit import catalog, plugins, trust
from detkit.backends import Backend, Detector, Endpoint, PredictOptions, Suggestion
from detkit.errors import MissingSettings, UsageError
from detkit.files import atomic_write, write_json
from detkit.job import Job, Model, Workspace
from detkit.natives import Adopted
from detkit.params import Options, Params, set_fields
from detkit.plans import Plan
from detkit.runs import RunRecord
from detkit.spaces import Range
from detkit.tuning import Mode, Search
from detkit_sagemaker.models import BACKEND, SagemakerModels, local_backend
from detkit_sagemaker.options import DeployOptions, SagemakerOptions

if TYPE_CHECKING:
    from detkit.data import Dataset
    from detkit_sagemaker.aws import Aws
    from detkit_sagemaker.runs import RemoteJob, SagemakerRun
    from detkit_sagemaker.submission import Submission
    from detkit_sagemaker.tuning import SagemakerTuning


class SagemakerBackend(Backend):
    """Training jobs in Amazon SageMaker: AWS's own algorithms, and the engines of installed backends."""

    name = BACKEND
    summary = "Amazon SageMaker: the built-in algorithm, JumpStart, and installed backends in our container"
    models = SagemakerModels()
    options = SagemakerOptions
    deploy_options = DeployOptions
    leashed = False
    commands = "detkit_sagemaker.cli:app"
    samplers: Mapping[str, Sequence[str]] = {
        "amt": ("median", "none"),
        "amt-random": ("median", "none"),
        "amt-hyperband": ("hyperband",),
        "amt-grid": ("median", "none"),
    }
    """AWS's automatic model tuning: Bayesian, random, Hyperband, grid. Its early stopping is by the median of earlier
    trials; Hyperband ends trials by itself."""
    resume = "exact"
    """For our container; what AWS's images do is not known."""

    def suggest(self) -> Suggestion | None:
        """Suggest what the torchvision backend would train here."""
        local = plugins.backends().get("torchvision")
        found = None if local is None else local.suggest()
        if found is None:
            return None
        return Suggestion(f"torchvision/{found.model}", f"in our container in SageMaker; {found.reason}")

    def require(self, model: str, params: Params, options: Options) -> None:
        assert isinstance(options, SagemakerOptions)
        from detkit_sagemaker.aws import Aws
        from detkit_sagemaker.defaults import complete
        from detkit_sagemaker.hosting import IMAGE_HINT, ROLE_HINT

        missing = []
        if complete(options)[0].role is None:
            missing.append(("role", ROLE_HINT))
        if local_backend(model) is not None and options.image_uri is None:
            missing.append(("image_uri", IMAGE_HINT))
        if missing:
            raise MissingSettings(missing)
        Aws(options.region)

    def require_data(self, model: str, params: Params, channels: Mapping[str, Dataset]) -> None:
        found = local_backend(model)
        if found is not None:
            found[0].require_data(found[1], params, channels)

    def translate(self, model: str, params: Params) -> Mapping[str, str]:
        found = local_backend(model)
        return {} if found is None else found[0].translate(found[1], params)

    def adopt(self, model: str, keys: Mapping[str, str], given: Mapping[str, Any]) -> Adopted:
        found = local_backend(model)
        return Adopted(keys) if found is None else found[0].adopt(found[1], keys, given)

    def engine_of(self, model: str) -> str:
        found = local_backend(model)
        return "" if found is None else found[0].engine

    def trained_name(self, model: str) -> str:
        return f"{self.name}/{model}" if local_backend(model) is None else model

    def starts_from_models(self, model: str) -> bool:
        found = local_backend(model)
        return found is None or found[0].incremental

    def plan(self, job: Job, workspace: Workspace) -> Plan:
        """Return what a job would ask for, at AWS and of the purse. Looks at S3 and at the account; changes nothing."""
        from detkit_sagemaker import submission

        aws = self._aws(job)
        with tempfile.TemporaryDirectory(prefix="detkit-sagemaker-") as folder:
            return _plan(aws, submission.prepare(aws, workspace, job, Path(folder)))

    def start(self, job: Job, workspace: Workspace, *, leash: bool) -> SagemakerRun:
        trust.of_job(job, workspace)
        return self._submit(job, workspace)

    def attach(self, workspace: Workspace) -> SagemakerRun:
        from detkit_sagemaker.runs import SagemakerRun

        return SagemakerRun(workspace, restart=self._again)

    def recover(self, name: str, options: Mapping[str, Any]) -> SagemakerRun:
        from detkit_sagemaker.recovery import recover

        return self.attach(recover(self._account(options), name, catalog.new_run_path(name, name)))

    def space(self, model: str) -> Mapping[str, Range]:
        from detkit_sagemaker import tunable

        return tunable.space(model)

    def tuning_metrics(self, model: str) -> Mapping[str, Mode]:
        from detkit_sagemaker import tunable

        return tunable.metrics(model)

    def plan_tuning(self, job: Job, workspace: Workspace, search: Search) -> Plan:
        from detkit_sagemaker import tuning

        return tuning.plan(self._aws(job), job, workspace, search)

    def tune(self, job: Job, workspace: Workspace, search: Search) -> SagemakerTuning:
        from detkit_sagemaker import tuning

        trust.of_job(job, workspace)
        return tuning.start(self._aws(job), job, workspace, search, self.attach)

    def attach_tuning(self, workspace: Workspace) -> SagemakerTuning:
        from detkit_sagemaker import tuning

        return tuning.SagemakerTuning(workspace, self.attach)

    def _again(self, run: SagemakerRun) -> SagemakerRun:
        return self._submit(run.job, run.workspace, resumed=run)

    def _submit(self, job: Job, workspace: Workspace, *, resumed: SagemakerRun | None = None) -> SagemakerRun:
        from detkit_sagemaker import creating, recovery, submission, uploads
        from detkit_sagemaker.ledger import Ledger
        from detkit_sagemaker.runs import RemoteJob, SagemakerRun
        from detkit_sagemaker.spending import approve

        aws = self._aws(job)
        earlier = None if resumed is None else resumed.remote
        spent = 0.0 if resumed is None else resumed.cost
        with _alone(workspace), _put_back(workspace) as begun:
            # Gigabytes may lie in the folder, so it is gone before the job is there: nobody shall wait meanwhile.
            with tempfile.TemporaryDirectory(prefix="detkit-sagemaker-") as folder:
                ready = submission.prepare(aws, workspace, job, Path(folder), earlier=earlier, spent=spent)
                plan = _plan(aws, ready)
                approve(plan, ready.options)
                for line in plan.summary().splitlines():
                    workspace.log("log", {"message": line})
                remote = RemoteJob(
                    name=ready.name,
                    region=aws.region,
                    account=aws.account,
                    kind=ready.kind,
                    request=ready.request,
                    created=time.time(),
                    metrics=dict(ready.metrics),
                    hosting=dict(ready.hosting),
                    price_per_hour=ready.estimate.price_per_hour,
                    earlier=[] if earlier is None else [*earlier.earlier, earlier.name],
                    spent=spent,
                )
                # What is begun is written down first, so that no crash makes a run or a job that nobody knows of.
                _note(workspace, remote)
                _put_aside(workspace.failure_file)
                uploads.ensure_bucket(aws, ready.root)
                for bundle in ready.bundles:
                    bundle.upload(aws, ready.root, ready.options.kms_key)
            _note(workspace, msgspec.structs.replace(remote, created=time.time(), staged=True))
            recovery.keep(aws, ready.root, workspace, ready.name, ready.options.kms_key)
            workspace.log("log", {"message": f"training job {ready.name} in {aws.region}"})
            Ledger.of(aws).creating("training-job", ready.name)
            begun()
            attach, end = f"`detkit runs attach {workspace.path}`", f"`detkit runs stop {workspace.path}`"
            refused = creating.create(aws, creating.TRAINING, ready.request, again=attach, ends=end)
            if refused is not None:
                begun(False)
                Ledger.of(aws).gone("training-job", ready.name)
                raise refused
        return SagemakerRun(workspace, aws=aws, restart=self._again)

    def open(self, model: Model, options: PredictOptions, *, isolate: bool = False) -> Detector:
        from detkit_sagemaker.opening import open_here

        return open_here(model, options)

    def deploy(self, model: Model, options: Options) -> Endpoint:
        from detkit_sagemaker.deployment import deploy

        assert isinstance(options, DeployOptions)
        return deploy(model, options)

    def plan_deployment(self, model: Model, options: Options) -> Plan:
        from detkit_sagemaker.deployment import plan_deployment

        assert isinstance(options, DeployOptions)
        return plan_deployment(model, options)

    def endpoints(self, options: Mapping[str, Any]) -> Sequence[Endpoint]:
        from detkit_sagemaker.endpoints import list_endpoints

        return list_endpoints(self._account(options))

    def remove_endpoints(self, names: Sequence[str], *, expired: bool, options: Mapping[str, Any]) -> list[str]:
        from detkit_sagemaker.endpoints import remove

        return remove(self._account(options), names or None, expired=expired)

    def _account(self, options: Mapping[str, Any]) -> Aws:
        from detkit_sagemaker.aws import Aws

        return Aws(set_fields(DeployOptions(), dict(options), kind="option").region)

    def _aws(self, job: Job) -> Aws:
        from detkit_sagemaker.aws import Aws

        return Aws(msgspec.convert(job.options, SagemakerOptions).region)


def _plan(aws: Aws, ready: Submission) -> Plan:
    from detkit_sagemaker import uploads

    return Plan(
        place=f"sagemaker {aws.region}, account {aws.account}",
        notes=tuple(ready.notes),
        uploads=uploads.total((bundle, bundle.missing(aws, ready.root)) for bundle in ready.bundles),
        requests=(("CreateTrainingJob", ready.request),),
        worst_case_s=ready.estimate.seconds,
        price_per_hour=ready.estimate.price_per_hour,
        price_source=ready.estimate.source,
        concerns=tuple(ready.look_at_account(aws)),
    )


@contextlib.contextmanager
def _alone(workspace: Workspace) -> Iterator[None]:
    """Hold a run while its job is prepared, so that nobody else asks AWS for it before it is there."""
    from detkit.worker import hold

    try:
        held = hold(workspace)
    except BlockingIOError:
        raise UsageError(f"another process is just starting or following {workspace.path}; wait for it") from None
    with held or contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _put_back(workspace: Workspace) -> Iterator[Callable[..., None]]:
    """Where the block fails, let the run be what it was, unless a job may have begun.

    Yields what says whether one may have: ``begun()``, and ``begun(False)`` where it is known that none has.
    """
    from detkit_sagemaker.runs import RECORD

    files = [workspace.path / RECORD, workspace.run_file, workspace.failure_file]
    before = {file: file.read_bytes() if file.is_file() else None for file in files}
    is_begun = False

    def begun(is_so: bool = True) -> None:
        nonlocal is_begun
        is_begun = is_so

    try:
        yield begun
    except BaseException:
        if not is_begun:
            for file, content in before.items():
                if content is None:
                    file.unlink(missing_ok=True)
                else:
                    with atomic_write(file) as restored:
                        restored.write(content)
        raise


def _note(workspace: Workspace, remote: RemoteJob) -> None:
    """Write down what the run is and which job is to fill it in."""
    from detkit_sagemaker.runs import RECORD

    write_json(workspace.path / RECORD, remote)
    record = RunRecord(backend=BACKEND, model=workspace.job().model, created=remote.created)
    write_json(workspace.run_file, record)


def _put_aside(failure: Path) -> None:
    """Keep what was said of an earlier job under another name, now that a new one is begun."""
    if failure.is_file():
        failure.rename(failure.with_name(f"failure.{1 + len(list(failure.parent.glob('failure.*')))}"))
