"""``detkit train`` and ``detkit explain``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detkit.cli import messages
from detkit.cli.runs import Json, describe, print_summary
from detkit.cli.words import Words, sort_words

if TYPE_CHECKING:
    from detkit.explanation import Explanation
    from detkit.runs import Run

ModelName = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="`backend/model`, see `detkit models`; chosen if absent.")
]
BackendName = Annotated[
    str | None, typer.Option("--backend", metavar="BACKEND", help="Who trains it, where the model does not tell.")
]
Like = Annotated[
    str | None,
    typer.Option(
        "--like",
        metavar="DIALECT",
        help="Whose hyperparameters are given, if another tool's, such as `sagemaker-object-detection`.",
    ),
]

_FLAGS = {"imports": "--import"}
"""Flags whose names are not those of what they set."""


def train(
    context: typer.Context,
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA [VAL] [--option VALUE] [param=value]",
            help="A data set, PATH or PATH:SPLIT; options and parameters of the backend, see `detkit explain`.",
            show_default=False,
        ),
    ] = None,
    test: Annotated[
        str | None, typer.Option(metavar="DATA[:SPLIT]", help="Scored once, at the end; held out of DATA if absent.")
    ] = None,
    model: ModelName = None,
    backend: BackendName = None,
    like: Like = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The run's name under `runs/`, or its folder.")
    ] = None,
    on_invalid: Annotated[
        str | None, typer.Option(metavar="raise|drop", help="Refuse unusable boxes, or leave them out and count them.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="The data's format; recognised if absent.")
    ] = None,
    replay: Annotated[
        str | None,
        typer.Option(
            metavar="DATA|parent", help="Train on some earlier images again; `parent`: those of the run in `weights=`."
        ),
    ] = None,
    replay_share: Annotated[
        str | None, typer.Option(metavar="SHARE", help="How much of the training images they are; 0.2 if absent.")
    ] = None,
    code: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Your own modules, a folder or a .py file; copied into the run."),
    ] = None,
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="MODULE", help="Import it before training, of --code or installed; repeatable."
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Continue a stopped, interrupted or failed run in place; with more `epochs=`, a finished one anew.",
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Start it, leave it running, and return.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be asked for, and at most paid; start nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Start what costs money, without `--max-cost`.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Train a detector on a folder of images and annotations.

    Data without splits of its own is cut: 64 % to train, 16 % to choose the weights by, 20 % for the final test.
    Options say where and how fast (`--device cpu`); parameters change the model that comes out (`epochs=20`).
    """
    from detkit.trainer import watch

    given = sort_words([*(words or []), *context.args], own_flags(context))
    if yes:
        given.settings["yes"] = "true"
    own: dict[str, Any] = {"model": model, "backend": backend, "like": like, "name": name, "on_invalid": on_invalid}
    own |= {"replay": replay, "replay_share": replay_share, "code": code, "imports": imports or None}
    if dry_run:
        _print_plan(given, {**own, "resume": resume}, test=test, data_format=format, as_json=as_json)
        return
    run: Run | None = None
    since = 0
    try:
        if resume is None:
            run = _start(given, own, test=test, data_format=format, detach=detach)
        else:
            run, since = _resume(resume, given, {**own, "test": test, "format": format}, detach=detach)
        if not detach:
            watch(run, quiet=quiet, since=since)
    except KeyboardInterrupt:
        _print_stopped(run, as_json=as_json)
        raise typer.Exit(messages.STOPPED) from None
    if detach and not quiet:
        for event in run.events(follow=False):
            if event.kind == "log":
                messages.tell(str(event.values.get("message", "")))
    if as_json:
        messages.print_json(describe(run))
    elif detach:
        place = messages.shown(run.path)
        print(f"run    {place}")
        print(f"next:  detkit runs attach {place}")
        print(f"       detkit runs stop {place}")
    else:
        print_summary(run)
    if not detach and run.status != "finished":
        raise typer.Exit(messages.STOPPED)


def _start(given: Words, own: dict[str, Any], *, test: str | None, data_format: str | None, detach: bool) -> "Run":
    from detkit.trainer import Trainer

    return Trainer(**own).start(*read_data(given, test, data_format), leash=not detach, **given.settings)


def _print_plan(given: Words, own: dict[str, Any], *, test: str | None, data_format: str | None, as_json: bool) -> None:
    from detkit.errors import UsageError
    from detkit.trainer import Trainer

    if own.pop("resume") is not None:
        raise UsageError("--dry-run plans a new run; leave out --resume")
    plan = Trainer(**own).plan(*read_data(given, test, data_format), **given.settings)
    if as_json:
        messages.print_json(plan.to_dict())
    else:
        print(plan)
    if plan.errors:
        raise typer.Exit(messages.FINDINGS)


def read_data(given: Words, test: str | None, data_format: str | None) -> list[Any]:
    from detkit.errors import UsageError
    from detkit.io import read_dataset

    if len(given.positions) > 2:
        raise UsageError(
            f"{len(given.positions)} data sets: {', '.join(given.positions)}; expected DATA and at most one for "
            "validation; test data goes to --test"
        )
    data: list[Any] = [*given.positions, None, None][:2]
    data.append(test)
    if data_format is not None:
        data = [None if path is None else read_dataset(path, format=data_format) for path in data]
    return data


def _resume(name: str, given: Words, own: dict[str, Any], *, detach: bool) -> "tuple[Run, int]":
    """Return the run and where its new events begin."""
    from detkit import catalog
    from detkit.errors import UsageError
    from detkit.resuming import go_on

    new_name, code = own.pop("name"), own.pop("code")
    extra = [*given.positions, *(_FLAGS.get(n, f"--{n.replace('_', '-')}") for n, v in own.items() if v is not None)]
    if extra:
        raise UsageError(f"--resume continues a run as it was started; leave out {', '.join(extra)}")
    return go_on(catalog.open_run(name), given.settings, leash=not detach, name=new_name, code=code)


def _print_stopped(run: "Run | None", *, as_json: bool) -> None:
    if run is None:
        messages.tell("stopped before training began")
    elif as_json:
        messages.print_json(describe(run))
    elif run.status == "finished":
        messages.tell("training had already finished")
        print_summary(run)
    if run is not None and (status := run.status) != "finished":
        place = messages.shown(run.path)
        if status == "running":  # elsewhere; who followed it has said so
            return
        messages.tell(f"stopped at step {run.last_step}; continue with `detkit train --resume {place}`")


def explain(
    context: typer.Context,
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[--option VALUE] [param=value]",
            help="Options and parameters as for `detkit train`.",
            show_default=False,
        ),
    ] = None,
    model: ModelName = None,
    backend: BackendName = None,
    like: Like = None,
    as_json: Json = False,
) -> None:
    """Show every setting of a training: its value, where that comes from, and what the framework is told.

    Stronger first: the command line, `DETKIT_<NAME>` in the environment, the nearest `detkit.yaml`, the default.
    With `--like`, also what each hyperparameter of the other tool becomes here, and how well; the exit code is 1 where
    training would refuse one.
    """
    from detkit.errors import UsageError
    from detkit.trainer import Trainer

    given = sort_words([*(words or []), *context.args], own_flags(context))
    if given.positions:
        raise UsageError(f"explain takes no data, but got {', '.join(given.positions)}")
    found = Trainer(model=model, backend=backend, like=like).explain(**given.settings)
    if as_json:
        messages.print_json(found.to_dict())
    else:
        _print_explanation(found)
    if any(note.fidelity == "refused" for note in found.notes):
        raise typer.Exit(messages.FINDINGS)


def _print_explanation(found: "Explanation") -> None:
    from detkit.dialects import text, typed

    print(f"model {found.backend}/{found.model}" + (f": {found.reason}" if found.reason else ""))
    if found.like:
        print(f"\nlike {found.like}")
        messages.print_table(
            ("name", "value", "from", "becomes", "how", "why"),
            [
                (note.name or "(always)", text(note.value), note.origin, typed(note.becomes), note.fidelity, note.why)
                for note in found.notes
            ],
        )
    for kind, title in (("parameter", "parameters (param=value)"), ("option", "options (--option value)")):
        print(f"\n{title}")
        messages.print_table(
            ("name", "value", "from", "native", "description"),
            [(row.name, row.value, row.origin, row.native, row.description) for row in found.rows if row.kind == kind],
        )


def own_flags(context: typer.Context) -> set[str]:
    return {
        flag.removeprefix("--") for parameter in context.command.params for flag in parameter.opts if flag[:2] == "--"
    }
