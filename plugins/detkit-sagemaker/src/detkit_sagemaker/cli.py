"""``detkit sagemaker``: permissions, images, batch transform, and a simulated account to try it all in."""

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detkit.cli import messages
from detkit.cli.prediction import ModelPlace
from detkit.cli.runs import Json
from detkit.cli.words import sort_words

if TYPE_CHECKING:
    from detkit_sagemaker.container.build import BuildPlan

app = typer.Typer(
    help="Prepare an AWS account, build images, predict in batches, try it all out.", no_args_is_help=True
)

Region = Annotated[str | None, typer.Option("--region", metavar="REGION", help="Where none: as AWS is configured.")]

CONTAINER = "detkit:latest"
"""The image that ``detkit sagemaker local`` has where none is named: our container, as it is installed here."""


@app.command()
def setup(
    *,
    show: Annotated[bool, typer.Option("--print", help="Print the permissions; nothing is changed.")] = False,
    apply: Annotated[
        bool, typer.Option("--apply", help="Make the roles and the policy, or bring them up to date.")
    ] = False,
    bucket: Annotated[
        str | None, typer.Option(metavar="BUCKET", help="Where data and models lie; SageMaker's default one if absent.")
    ] = None,
    data_bucket: Annotated[
        list[str] | None,
        typer.Option(metavar="BUCKET", help="Another one, in which images may stay that are trained on; repeatable."),
    ] = None,
    region: Region = None,
    as_json: Json = False,
) -> None:
    """Show the permissions that detkit needs in an account, as small as they can be, or put them in place."""
    from detkit.errors import UsageError
    from detkit_sagemaker.aws import Aws
    from detkit_sagemaker.policies import Policies
    from detkit_sagemaker.policies import apply as put_in_place

    if show == apply:
        raise UsageError("give --print to see the permissions, or --apply to put them in place")
    aws = Aws(region)
    policies = Policies.of(aws, bucket, data_bucket or ())
    if show:
        messages.print_json(policies.document())
        return
    done = put_in_place(aws, policies)
    if as_json:
        messages.print_json({"done": done, "role": policies.role_arn(policies.execution_role)})
        return
    print("\n".join(done))
    print(f"next:  --role {policies.execution_role}, or DETKIT_ROLE={policies.execution_role}")


@app.command()
def ledger(region: Region = None, as_json: Json = False) -> None:
    """List what this machine began to create in the account and region, and does not know to be over or gone.

    Bucket, repository, project, roles and policy stay: detkit deletes none of them.
    """
    from detkit_sagemaker.aws import Aws
    from detkit_sagemaker.ledger import Ledger
    from detkit_sagemaker.resources import iso

    entries = Ledger.of(Aws(region)).pending()
    if as_json:
        messages.print_json([{"name": one.name, "kind": one.kind, "began": one.t} for one in entries])
    elif not entries:
        print("all that this machine began is known to be over or gone")
    else:
        messages.print_table(("name", "kind", "began"), [(one.name, one.kind, iso(one.t)) for one in entries])


@app.command()
def local(
    image: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COMMAND", help="A container and what stands for it; may be repeated."),
    ] = None,
    port: Annotated[int, typer.Option(metavar="PORT", help="On the loopback; 0 for any free one.")] = 4566,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the containers' /opt/ml folders; without it, temporary.")
    ] = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(metavar="FAULT", help="What goes wrong there, such as `throttle=3`; may be repeated."),
    ] = None,
) -> None:
    """Run a simulated AWS account on this machine until Ctrl-C: jobs really run, and nothing costs.

    It prints the lines that lead another shell to it. `detkit:latest` in it is our container, as installed here.

    Faults, as they are typed: `throttle=3` (every third call), `refuse=OPERATION:CODE` (once), `quota=NAME:NUMBER`,
    `capacity=TIMES`, `interrupt-spot`, `fail-upload=TIMES`, `expire-tokens`, `slow=SECONDS` (of every state),
    `late-objectives=SECONDS`.
    """
    from detkit.errors import UsageError

    try:
        from detkit_sagemaker.testing import serve_forever
    except ImportError as error:
        raise UsageError(f"{error}; the simulator needs: pip install 'detkit-sagemaker[testing]'") from error
    images = {CONTAINER: [sys.executable, "-m", "detkit_sagemaker.container"]}
    for given in image or []:
        name, equals, command = given.partition("=")
        if not (name and equals and command):
            raise UsageError(f'--image {given!r}: expected NAME=COMMAND, e.g. mine:latest="python -m mine"')
        images[name] = shlex.split(command)
    try:
        serve_forever(port, images, folder, fault or [])
    except ModuleNotFoundError as error:
        raise UsageError(f"{error}; the simulator needs: pip install 'detkit-sagemaker[testing]'") from error


@app.command("build-image")
def build_image(
    *,
    backends: Annotated[list[str], typer.Option("--with", metavar="BACKEND", help="What it has; may be repeated.")],
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the folder that it is built in; it must not exist.")
    ] = None,
    base: Annotated[str | None, typer.Option(metavar="IMAGE", help="What it is built on, e.g. one with CUDA.")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Your checkout of a framework that no package registry has, such as Detectron2."
        ),
    ] = None,
    codebuild: Annotated[
        bool | None, typer.Option("--codebuild/--docker", help="Where; with Docker if it is here, else CodeBuild.")
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="S3", help="S3 folder for what CodeBuild reads.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Build and push it; without, only say what would be done.")
    ] = False,
    region: Region = None,
    as_json: Json = False,
) -> None:
    """Build our container with the backends that a model needs, and push it to the account's registry."""
    from detkit_sagemaker import building
    from detkit_sagemaker.aws import Aws
    from detkit_sagemaker.container import build
    from detkit_sagemaker.hosting import root_of
    from detkit_sagemaker.images import dns_suffix
    from detkit_sagemaker.options import AccountOptions

    aws = Aws(region)
    there = codebuild if codebuild is not None else not building.has_docker()
    with tempfile.TemporaryDirectory(prefix="detkit-image-") as temporary:
        plan = build.plan(
            folder or Path(temporary) / "context",
            backends,
            region=aws.region,
            account=aws.account,
            domain=dns_suffix(aws.region),
            base=base or build.BASE,
            source=source,
        )
        done = building.is_there(aws, plan)
        if yes and not done:
            if there:
                building.build_there(aws, plan, root_of(aws, AccountOptions(output=output)), messages.tell)
            else:
                building.build_here(aws, plan, messages.tell)
            done = True
        _tell_image(plan, done=done, there=there, kept=folder is not None, as_json=as_json)


def _tell_image(plan: "BuildPlan", *, done: bool, there: bool, kept: bool, as_json: bool) -> None:
    if as_json:
        messages.print_json(
            {"image_uri": plan.image_uri, "pushed": done, "with": "codebuild" if there else "docker", "base": plan.base}
        )
    elif done:
        print(f"image  {plan.image_uri}")
        print(f"next:  --image-uri {plan.image_uri}, or DETKIT_IMAGE_URI={plan.image_uri}")
    else:
        print(plan)
        if not kept:
            print("that folder is removed now; keep one with --folder DIR to type these lines yourself")
        how = "CodeBuild would do it, which costs some cents" if there else "Docker is here and would do it"
        print(f"nothing was built: {how}. say --yes")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def transform(
    context: typer.Context,
    *,
    model: ModelPlace,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA[:SPLIT]] [--option VALUE]",
            help="The images, else those that its run kept aside; options such as `--instance-type ml.c5.xlarge`.",
            show_default=False,
        ),
    ] = None,
    collect: Annotated[
        str | None, typer.Option(metavar="JOB", help="Take what a job found that was started with `--wait false`.")
    ] = None,
    max_cost: Annotated[float | None, typer.Option(metavar="USD", help="What may be spent, by the estimate.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Start what costs money without --max-cost; `--wait false` needs it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and what it costs.")] = False,
    as_json: Json = False,
) -> None:
    """Let a model look at many images in a job at AWS that ends by itself, and keep what it found here.

    `detkit evaluate` and `detkit compare` then know it. Images that it has looked at before are not sent.
    """
    from detkit.errors import UnknownName, UsageError
    from detkit.params import set_fields
    from detkit.predictor import find_model
    from detkit.progress import shown
    from detkit.settings import Settings
    from detkit_sagemaker.options import TransformOptions
    from detkit_sagemaker.rescoring import Unknown
    from detkit_sagemaker.rescoring import transform as transform_dataset
    from detkit_sagemaker.transform import plan_batch, start_batch

    given = sort_words(
        [*(words or []), *context.args], {"json", "dry-run", "collect"}, usage="sagemaker transform MODEL DATA"
    )
    if len(given.positions) > 1:
        raise UsageError(f"transform takes one model, one data set and options, but got {', '.join(given.positions)}")
    data = given.positions[0] if given.positions else None
    again = "" if data is None else f" {shlex.quote(data)}"
    call: dict[str, Any] = {**given.settings, "yes": yes or None, "max_cost": max_cost}
    for name in call:
        if name not in TransformOptions.__struct_fields__:
            raise UnknownName("option of batch transform", name, TransformOptions.__struct_fields__)
    chosen = Settings(call, {}).choose(TransformOptions.__struct_fields__, {})
    options = set_fields(
        TransformOptions(),
        {name: setting.value for name, setting in chosen.items()},
        kind="option",
        origins={name: setting.origin for name, setting in chosen.items()},
    )
    opened = find_model(model)
    if dry_run or (collect is None and not options.wait):
        with shown():
            unknown = Unknown.of(opened, data)
        if unknown.digests and dry_run:
            plan = plan_batch(opened, unknown.paths, options)
            messages.print_json(plan.to_dict()) if as_json else print(plan)
            return
        if unknown.digests:
            with shown():
                name = start_batch(opened, unknown.paths, options, tell=messages.tell)
            if as_json:
                messages.print_json({"job": name})
            else:
                print(f"job    {name}")
                place = messages.shown(opened.path.parent)
                print(f"next:  detkit sagemaker transform {place}{again} --collect {name}")
            return
        looked, total = 0, unknown.total
    else:
        with shown():
            looked, total = transform_dataset(opened, data, options, job=collect or "", tell=messages.tell)
    if as_json:
        messages.print_json({"images": total, "looked_at": looked})
        return
    print(f"images  {total}, {total - looked} of them were known")
    print(f"next:   detkit evaluate {messages.shown(opened.path.parent)}{again}")
