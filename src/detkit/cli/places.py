"""``detkit deploy``, ``detkit endpoints``, and the verbs that a backend brings itself, such as ``detkit sagemaker``."""

import importlib
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detkit.cli import messages
from detkit.cli.prediction import ModelPlace
from detkit.cli.runs import Json
from detkit.cli.words import sort_words

if TYPE_CHECKING:
    from detkit.backends import Endpoint

app = typer.Typer(help="List and delete endpoints, which cost money while they are there.", no_args_is_help=True)

Place = Annotated[
    str | None, typer.Option("--backend", metavar="BACKEND", help="Whose; of all that have some if absent.")
]
Region = Annotated[str | None, typer.Option("--region", metavar="REGION", help="Where the place has several.")]


def commands_of(name: str) -> Any:
    """Return the group of verbs that the backend of that name brings; None where there is no such backend or group."""
    from detkit import plugins

    backend = plugins.backends().get(name)
    if backend is None or not backend.commands:
        return None
    module, _, attribute = backend.commands.partition(":")
    group = typer.main.get_command(getattr(importlib.import_module(module), attribute))
    group.name = name
    return group


def describe(endpoint: "Endpoint") -> dict[str, Any]:
    """Return what ``--json`` prints of an endpoint."""
    return {
        "name": endpoint.name,
        "place": endpoint.place,
        "status": endpoint.status,
        "expires": endpoint.expires,
        "price_per_hour": endpoint.price_per_hour,
        "model": None if endpoint.model is None else endpoint.model.name,
    }


def deploy(
    context: typer.Context,
    *,
    model: ModelPlace,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[--option VALUE]", help="Options of the place, such as `--ttl 2h`.", show_default=False
        ),
    ] = None,
    backend: Annotated[str, typer.Option(metavar="BACKEND", help="Where.")] = "sagemaker",
    yes: Annotated[bool, typer.Option("--yes", help="Start what costs money without `--max-cost`.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be asked for, and at most paid; create nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Let a finished model answer at a place. What is paid by the hour needs `--ttl`: the place deletes it then."""
    from detkit.deployment import deploy, plan_deployment
    from detkit.errors import UsageError
    from detkit.progress import shown

    given = sort_words([*(words or []), *context.args], {"backend", "yes", "dry-run", "json"}, usage="deploy MODEL")
    if given.positions:
        raise UsageError(f"deploy takes one model and options, but got {', '.join(given.positions)}")
    call = {**given.settings, **({"yes": True} if yes else {})}
    if dry_run:
        plan = plan_deployment(model, backend=backend, **call)
        messages.print_json(plan.to_dict()) if as_json else print(plan)
        return
    with shown():
        endpoint = deploy(model, backend=backend, **call)
    if as_json:
        messages.print_json(describe(endpoint))
        return
    print(f"endpoint  {endpoint.name}, {endpoint.status} at {endpoint.place}")
    if endpoint.expires is not None:
        print(f"ends      {_when(endpoint.expires)}: the place itself deletes it")
    if endpoint.price_per_hour is not None:
        print(f"cost      about {endpoint.price_per_hour:.3g} USD/h, an estimate")
    print(f"next:     detkit endpoints rm {endpoint.name}")


@app.command("ls")
def list_endpoints(backend: Place = None, region: Region = None, as_json: Json = False) -> None:
    """List what answers just now, when it ends and what it costs."""
    from detkit.deployment import list_endpoints

    found = [describe(endpoint) for endpoint in list_endpoints(backend, **_given(region))]
    if as_json:
        messages.print_json(found)
    elif not found:
        print("no endpoint is there")
    else:
        messages.print_table(
            ("endpoint", "place", "status", "ends", "USD/h (estimate)", "model"),
            [
                (
                    record["name"],
                    record["place"],
                    record["status"],
                    "never" if record["expires"] is None else _when(record["expires"]),
                    None if record["price_per_hour"] is None else f"{record['price_per_hour']:.3g}",
                    record["model"],
                )
                for record in found
            ],
        )


@app.command()
def rm(
    *,
    names: Annotated[list[str] | None, typer.Argument(metavar="[ENDPOINT...]", show_default=False)] = None,
    expired: Annotated[
        bool, typer.Option("--expired", help="All whose time is over, and what was left half made.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="All that detkit deployed, also from other machines.")] = False,
    backend: Annotated[str, typer.Option(metavar="BACKEND", help="Where.")] = "sagemaker",
    region: Region = None,
    as_json: Json = False,
) -> None:
    """Delete endpoints with all that was made for them. What is gone already is no error."""
    from detkit import plugins
    from detkit.errors import UsageError

    if bool(names) + expired + every != 1:
        raise UsageError("name endpoints, or give --expired, or --all")
    removed = plugins.backend(backend).remove_endpoints(names or [], expired=expired, options=_given(region))
    if as_json:
        messages.print_json({"removed": removed})
    else:
        print("\n".join(f"removed {name}" for name in removed) or "nothing was there to remove")


def _given(region: str | None) -> dict[str, str]:
    return {} if region is None else {"region": region}


def _when(t: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(t))
