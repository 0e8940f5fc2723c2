"""``detkit backends``: what is installed, a new one from a template, the proof that one works."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detkit.cli import messages
from detkit.cli.runs import Json
from detkit.cli.words import sort_words

if TYPE_CHECKING:
    from detkit.backends import Backend

app = typer.Typer(help="List backends, begin a new one, prove that one works.", no_args_is_help=True)


def missing(backend: "Backend") -> list[str]:
    """Return the modules a backend needs and this Python lacks."""
    from detkit.backends import LocalBackend

    return backend.missing() if isinstance(backend, LocalBackend) else []


@app.command("ls")
def list_backends(as_json: Json = False) -> None:
    """List the installed backends, those that are broken, and what is missing for each."""
    from detkit import plugins
    from detkit.backends import LocalBackend

    found = plugins.backends()
    registry = plugins.registry()
    records: list[dict[str, Any]] = [
        {
            "name": name,
            "summary": one.summary,
            "models": len(one.models),
            "plugin": registry.providers["backend", name],
            "missing": missing(one),
            "install": one.install if isinstance(one, LocalBackend) else "",
        }
        for name, one in found.items()
    ]
    broken = [{"plugin": name, "error": f"{type(e).__name__}: {e}"} for name, e in registry.broken.items()]
    if as_json:
        messages.print_json({"backends": records, "broken": broken})
        return
    messages.print_table(
        ("backend", "models", "needs", "summary"),
        [
            (r["name"], r["models"], f"{', '.join(r['missing'])}: {r['install']}" if r["missing"] else "", r["summary"])
            for r in records
        ],
    )
    for one in broken:
        print(f"broken: {one['plugin']}: {one['error']}")
    if not records:
        print("no backend is installed; for example: pip install detkit-torchvision")


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The backend's name, such as `mynet`.")],
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to put it; `detkit-NAME` here if absent.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a new plugin package: a small backend that works, with its tests, ready to be changed into yours."""
    from detkit.cli.scaffold import write_plugin

    files = write_plugin(name, folder)
    root = files[0].parent
    if as_json:
        messages.print_json({"folder": root, "files": [path.relative_to(root) for path in files]})
        return
    for path in files:
        print(messages.shown(path))
    print(f"next:  pip install -e {messages.shown(root)}")
    print(f"       pytest {messages.shown(root)}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def verify(
    context: typer.Context,
    *,
    name: Annotated[str, typer.Argument(metavar="NAME", help="An installed backend.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[--option VALUE] [param=value]", help="For every run, to make it small and quick."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Its first model if absent.")] = None,
    as_json: Json = False,
) -> None:
    """Run detkit's conformance suite against a backend. Leaves with 1 where a case fails."""
    from detkit import plugins
    from detkit.errors import UsageError

    backend = plugins.backend(name)
    given = sort_words([*(settings or []), *context.args], {"model"})
    if given.positions:
        raise UsageError(f"expected param=value, got {', '.join(given.positions)}")
    if model is not None:
        backend.spec(model)
    package = find_spec("detkit.testing")
    if package is None or package.origin is None or find_spec("pytest") is None:
        raise UsageError("the conformance suite runs on pytest, which is not here; pip install 'detkit-sdk[testing]'")
    suite = Path(package.origin).with_name("verify_backend.py")
    # Neither the user's pytest settings nor those of a checkout of detkit belong to the suite.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        os.devnull,
        "--rootdir",
        str(suite.parent),
        "-p",
        "no:cacheprovider",
    ]
    variables = {
        "DETKIT_VERIFY_BACKEND": name,
        "DETKIT_VERIFY_MODEL": model or "",
        "DETKIT_VERIFY_SETTINGS": json.dumps(given.settings),
    }
    done = subprocess.run(
        [*command, str(suite)], env={**os.environ, **variables}, stdout=sys.stderr if as_json else None, check=False
    )
    if as_json:
        messages.print_json({"backend": name, "passed": done.returncode == 0})
    if done.returncode:
        raise typer.Exit(messages.FINDINGS if done.returncode == 1 else messages.BACKEND_FAILED)
