"""``detkit backends``: what is installed, a new one from a template, the proof that one works."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import detkit
from detkit.cli import messages
from detkit.cli.runs import Json
from detkit.cli.words import sort_words

if TYPE_CHECKING:
    from detkit.backends import Backend, LocalBackend
    from detkit.environments import Installed

app = typer.Typer(
    help="List backends, give one an environment of its own, begin a new one, prove that one works.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="An installed backend.")]
PythonOption = Annotated[
    str | None,
    typer.Option("--python", metavar="PATH", help="The Python to make it from; found by itself if absent."),
]
SourceOption = Annotated[
    Path | None,
    typer.Option(
        "--source",
        metavar="PATH",
        help="Your checkout of a framework that no package registry has, such as Detectron2.",
    ),
]


def missing(backend: "Backend") -> list[str]:
    """Return the modules that this Python lacks for a backend that would run in it."""
    from detkit import environments
    from detkit.backends import LocalBackend

    if not isinstance(backend, LocalBackend) or os.environ.get(backend.variable):
        return []
    return [] if backend.environment and backend.name in environments.names() else backend.missing()


def examine(backend: "Backend", *, deeply: bool) -> dict[str, Any]:
    """Return where a backend's engine runs, and in ``problem`` what stands in the way, empty where nothing does.

    ``deeply`` runs an interpreter that is not this one, and reports the versions of what it has.
    """
    from detkit import environments
    from detkit.backends import LocalBackend
    from detkit.errors import DetkitError
    from detkit.processes import Caller

    record: dict[str, Any] = {
        "name": backend.name, "python": None, "environment": None, "missing": missing(backend), "install": "",
        "problem": "",
    }  # fmt: skip
    if not isinstance(backend, LocalBackend):
        return record
    record["install"] = backend.installation
    try:
        record["environment"] = environments.find(backend.name) if backend.environment else None
        python = record["python"] = backend.interpreter(None)
    except DetkitError as error:
        return record | {"problem": str(error)}
    if not deeply or python == sys.executable:
        return record
    caller = Caller.here(backend.name)
    try:
        proof = environments.prove(python, backend)
    except DetkitError as error:
        return record | {"problem": f"{error}; {caller.expects(python)}"}
    if proof.detkit != detkit.__version__:
        why = caller.expects(python, found=f"detkit-sdk {proof.detkit}")
        record["problem"] = f"backend {backend.name!r}: {why}"
    return record | {"versions": {"python": proof.python, "detkit": proof.detkit, **proof.versions}}


@app.command("list", hidden=True)
@app.command("ls")
def list_backends(as_json: Json = False) -> None:
    """List the installed backends, where each would run, what is missing for it, and those that are broken."""
    from detkit import plugins

    found = plugins.backends()
    registry = plugins.registry()
    records: list[dict[str, Any]] = [
        {
            **examine(one, deeply=False),
            "summary": one.summary,
            "models": len(one.models),
            "plugin": registry.providers["backend", name],
        }
        for name, one in found.items()
    ]
    broken = [{"plugin": name, "error": f"{type(e).__name__}: {e}"} for name, e in registry.broken.items()]
    if as_json:
        messages.print_json({"backends": records, "broken": broken})
        return
    messages.print_table(
        ("backend", "models", "needs", "python", "summary"),
        [
            (
                r["name"],
                r["models"],
                f"{', '.join(r['missing'])}: {r['install']}" if r["missing"] else "",
                _place(r),
                r["summary"],
            )
            for r in records
        ],
    )
    for one in records:
        if one["problem"] and not one["missing"]:
            print(f"problem: {one['problem']}")
    for one in broken:
        print(f"broken: {one['plugin']}: {one['error']}")
    if not records:
        print("no backend is installed; for example: pip install detkit-torchvision")


def _place(record: dict[str, Any]) -> str:
    """Return where a backend runs, in a few words."""
    if record["environment"] is not None and record["python"] in {record["environment"].python, None}:
        return f"its own, {record['environment'].python_version}"
    return "this one" if record["python"] == sys.executable else record["python"]


@app.command()
def install(name: Name, python: PythonOption = None, source: SourceOption = None, as_json: Json = False) -> None:
    """Make the environment that a backend declares for itself, with detkit and the plugin as they are here.

    One that is there and in order is left as it is. The interpreter is this one where its version fits, else one on
    the PATH or of pyenv. uv is used where it is installed, else pip.
    """
    from detkit import plugins

    _make(plugins.backend(name), python, source, rebuild=False, as_json=as_json)


@app.command()
def upgrade(name: Name, python: PythonOption = None, source: SourceOption = None, as_json: Json = False) -> None:
    """Make a backend's environment anew, after detkit or the plugin has changed. Runs in the old one go on.

    What came from a checkout is taken from there again.
    """
    from detkit import environments, plugins
    from detkit.errors import UsageError

    backend = plugins.backend(name)
    if name not in environments.names():
        raise UsageError(f"backend {name!r} has no environment yet; make one with `detkit backends install {name}`")
    _make(backend, python, source, rebuild=True, as_json=as_json)


def _make(backend: "Backend", python: str | None, source: Path | None, *, rebuild: bool, as_json: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from detkit import environments, plugins

    # Ended from outside, the installers and what they left have to go, too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # by nohup
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    began = time.time()
    console = Console(stderr=True)
    with console.status("") as status:

        def tell(line: str) -> None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            status.update(Text(f"{line} ..."))

        record = environments.install(
            cast("LocalBackend", backend),
            plugins.distribution_of(backend.name),
            python=python,
            source=source,
            rebuild=rebuild,
            tell=tell,
        )
    if as_json:
        messages.print_json(record)
        return
    if record.made < began:
        print(f"{backend.name} has its environment already; `detkit backends upgrade {backend.name}` makes it anew")
    print(f"python   {record.python}  ({record.python_version}, made from {record.base})")
    print(f"size     {_size(record) / 1e6:.0f} MB")
    if record.made >= began:
        print(f"made in  {time.time() - began:.1f} s by {record.installer}")
    model = next(iter(backend.models), "MODEL")
    print(f"next:    detkit train DATA --model {backend.name}/{model}")


def _size(record: "Installed") -> int:
    files = Path(record.python).parents[1].rglob("*")
    return sum(file.lstat().st_size for file in files)


@app.command()
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A backend that has an environment of its own.")],
    as_json: Json = False,
) -> None:
    """Remove a backend's own environment. The plugin, its runs and its models stay."""
    from detkit import environments

    environments.remove(name, tell=messages.tell)
    if as_json:
        messages.print_json({"removed": name})
    else:
        print(f"removed the environment of {name}")


@app.command()
def doctor(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A backend; every one with an environment of its own if absent."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the interpreters of backends to see whether each can do its work. Leaves with 1 where one cannot."""
    from detkit import environments, plugins

    offered = plugins.backends()
    chosen = [name] if name is not None else environments.names()
    records = [examine(plugins.backend(one), deeply=True) for one in chosen if one in offered or one == name]
    lonely = [one for one in chosen if one not in offered]
    problems = [one["problem"] for one in records if one["problem"]]
    problems += [f"no plugin offers {one!r}; `detkit backends remove {one}` removes its environment" for one in lonely]
    if as_json:
        messages.print_json({"backends": records, "problems": problems})
    else:
        for one in records:
            versions = ", ".join(f"{what} {version}" for what, version in one.get("versions", {}).items())
            where = f", {one['python']}" if one["python"] else ""
            print(f"{one['name']}: {'not ready' if one['problem'] else 'ready'}{where}  {versions}".rstrip())
        for problem in problems:
            print(f"problem: {problem}")
        if not chosen:
            print("no backend has an environment of its own")
    if problems:
        raise typer.Exit(messages.FINDINGS)


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
    name: Name,
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
