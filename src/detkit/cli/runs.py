"""``detkit runs``: look at runs, follow them, end them, remove them."""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detkit.cli import messages

if TYPE_CHECKING:
    from detkit.runs import Run

app = typer.Typer(help="List runs, follow them, end them, remove them.", no_args_is_help=True)

RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, its name, `last` or `best`.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def describe(run: "Run") -> dict[str, Any]:
    """Return what ``--json`` prints of a run wherever one is printed."""
    import msgspec

    status = run.status
    record: dict[str, Any] = {
        "run": str(run.path),
        "status": status,
        "model": f"{run.job.backend}/{run.job.model}",
        "created": run.record.created,
        "step": run.last_step,
        "metrics": run.metrics,
        "classes": run.job.classes,
    }
    if run.cost is not None:
        record["cost"] = run.cost
    if status == "finished":
        manifest = run.model.manifest
        record |= {"seconds": manifest.seconds, "score_threshold": manifest.score_threshold}
        if run.forgetting is not None:
            record["forgetting"] = msgspec.to_builtins(run.forgetting)
    return record


def print_summary(run: "Run") -> None:
    """Print how a run ended and what to type next."""
    place = messages.shown(run.path)
    if run.status != "finished":
        print(f"{run.status} at step {run.last_step}; continue with `detkit train --resume {place}`")
        return
    manifest = run.model.manifest
    print(f"run    {place}")
    print(f"model  {run.model.name}, {len(manifest.classes)} classes, trained in {manifest.seconds:.1f} s")
    for channel, images in (("val", "to choose the weights by"), ("test", "never seen in training")):
        numbers = {n: v for n, v in manifest.metrics.items() if n in {f"{channel}/AP", f"{channel}/AP50"}}
        if numbers:
            print(f"{channel:<5}  " + "  ".join(f"{n} {v:.3f}" for n, v in numbers.items()) + f"  (images {images})")
    if run.cost is not None:
        print(f"cost   {run.cost:.2f} USD, an estimate")
    if run.forgetting is not None:
        print(run.forgetting)
    print(f"next:  detkit evaluate {place}" + ("" if "test" in manifest.data else " DATA"))
    print(f"       detkit predict {place} images/ --save out/")


@app.command("ls")
def list_runs(as_json: Json = False) -> None:
    """List the runs under `runs/` (or `DETKIT_RUNS`), the one started last at the end."""
    from detkit import catalog
    from detkit.errors import UsageError

    records = []
    for run in catalog.list_runs():
        try:
            records.append(describe(run))
        except UsageError as error:  # of another version of detkit; the others are still of use
            messages.tell(f"warning: run {messages.shown(run.path)} is left out: {error}")
    if as_json:
        messages.print_json(records)
        return
    if not records:
        print(f"no run in {catalog.runs_folder()}; train one with `detkit train DATA`")
        return
    messages.print_table(
        ("run", "status", "model", "step", "val/AP", "started"),
        [
            (
                Path(record["run"]).name,
                record["status"],
                record["model"],
                record["step"],
                f"{record['metrics']['val/AP']:.3f}" if "val/AP" in record["metrics"] else None,
                time.strftime("%Y-%m-%d %H:%M", time.localtime(record["created"])) if record["created"] else None,
            )
            for record in records
        ],
    )


@app.command()
def show(run: RunName, as_json: Json = False) -> None:
    """Show a run: status, data, parameters, numbers, and why it failed if it did."""
    from detkit import catalog

    found = catalog.open_run(run)
    failure = found.workspace.failure_file
    reason = failure.read_text().splitlines()[0] if failure.is_file() else None
    record = {
        **describe(found),
        "params": found.job.params,
        "options": found.job.options,
        "data": found.model.manifest.data if found.status == "finished" else {},
        "failure": reason,
        "log": str(found.workspace.log_file),
    }
    if as_json:
        messages.print_json(record)
        return
    print(f"run        {messages.shown(found.path)}")
    print(f"status     {record['status']} at step {record['step']}" + (f": {reason}" if reason else ""))
    print(f"model      {record['model']}")
    print(f"classes    {', '.join(record['classes'])}")
    for channel, counts in record["data"].items():
        print(f"{channel:<10} {counts['images']} images, {counts['boxes']} boxes")
    if (came_from := found.job.continued_from) is not None:
        print(f"goes on    from step {came_from.step} of {came_from.run}")
    if (replayed := found.job.replayed) is not None:
        print(f"replay     {replayed.images} images of {replayed.source}")
    for title in ("metrics", "params", "options"):
        listed = (f"{n}={v:.4g}" if isinstance(v, float) else f"{n}={v}" for n, v in record[title].items())
        print(f"{title:<10} {'  '.join(listed) or '-'}")
    if found.forgetting is not None:
        print(found.forgetting)
    print(f"log        {messages.shown(found.workspace.log_file)}")


@app.command()
def attach(
    run: RunName,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="BACKEND", help="Whose job RUN is, where another machine started it; it gets a folder here."
        ),
    ] = None,
    region: Annotated[str | None, typer.Option(metavar="REGION", help="Where that place has several.")] = None,
) -> None:
    """Follow a run to its end. Ctrl-C leaves it running."""
    from detkit import catalog, plugins
    from detkit.errors import UsageError
    from detkit.live import follow

    if backend is None and region is not None:
        raise UsageError("--region is for a job that another machine started; name its place with --backend")
    if backend is None:
        found = catalog.open_run(run)
    else:
        found = plugins.backend(backend).recover(run, {} if region is None else {"region": region})
    try:
        follow(found, quiet=quiet)
    except KeyboardInterrupt:
        messages.tell(f"{messages.shown(found.path)} goes on; `detkit runs stop {messages.shown(found.path)}` ends it")
        raise typer.Exit(messages.STOPPED) from None
    if as_json:
        messages.print_json(describe(found))
    else:
        print_summary(found)
    if found.status == "stopped":
        raise typer.Exit(messages.STOPPED)


@app.command()
def join(run: RunName) -> None:
    """Take part in a run that was started with --nodes on another machine; its folder has to lie where both see it."""
    from detkit import catalog, plugins
    from detkit.backends import LocalBackend
    from detkit.errors import Unsupported, UsageError
    from detkit.processes import worker_environment

    found = catalog.open_run(run)
    backend = plugins.backend(found.job.backend)
    if not isinstance(backend, LocalBackend):
        raise Unsupported(f"runs of backend {backend.name!r} find their machines by themselves")
    command = backend.joining(found.workspace)
    if found.status != "running":
        raise UsageError(f"run {messages.shown(found.path)} is {found.status}; start it, and join it while it waits")
    os.execvpe(command[0], command, worker_environment(command[0]))


@app.command()
def stop(
    run: RunName,
    as_json: Json = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="End it by force after that.")] = 60.0,
) -> None:
    """Ask a run to end after its current step; its last checkpoint stays."""
    from detkit import catalog

    found = catalog.open_run(run)
    found.stop(timeout)
    if as_json:
        messages.print_json(describe(found))
    else:
        print_summary(found)


@app.command()
def rm(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders, names, `last` or `best`.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove runs with their models. Your images are only linked there and stay."""
    from detkit.errors import StorageError, UsageError

    folders = list(dict.fromkeys(_run_folder(name) for name in runs))
    listed = ", ".join(messages.shown(folder) for folder in folders)
    if not yes and not sys.stdin.isatty():
        raise UsageError(f"this removes {listed}; say so with --yes")
    if not yes:
        typer.confirm(f"remove {listed}?", abort=True, err=True)
    for folder in folders:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise StorageError(folder, error) from error
    if as_json:
        messages.print_json({"removed": folders})
    else:
        print(f"removed {listed}")


def _run_folder(name: str) -> Path:
    """Find a run that may go, also one that ended before its worker was started."""
    from detkit import catalog
    from detkit.errors import UsageError
    from detkit.job import Workspace

    for path in (Path(name),) if os.sep in name else (Path(name), catalog.runs_folder() / name):
        if Workspace(path).job_file.is_file() and not (path / "run.json").is_file():
            return path.absolute()
    run = catalog.open_run(name)
    if run.status == "running":
        raise UsageError(f"{messages.shown(run.path)} is running; end it first with `detkit runs stop {name}`")
    return run.path
