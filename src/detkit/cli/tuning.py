"""``detkit tune`` and ``detkit studies``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detkit.cli import messages
from detkit.cli.runs import Json, describe, print_summary
from detkit.cli.training import BackendName, ModelName, own_flags, read_data
from detkit.cli.words import Words, sort_words

if TYPE_CHECKING:
    from detkit.comparison import Comparison
    from detkit.studies import Study
    from detkit.tuner import Tuner

app = typer.Typer(help="Show searches for the best parameters, and use what they found.", no_args_is_help=True)

StudyName = Annotated[
    str, typer.Argument(metavar="STUDY", help="A study's name or folder, or `last`.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def tune(
    context: typer.Context,
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA [VAL] [--option VALUE] [param=value] [param=low..high:log] [param=a|b]",
            help="As for `detkit train`; a range is searched. Without one, what is usual for the model.",
            show_default=False,
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(metavar="DATA[:SPLIT]", help="For the final comparison; no trial sees it. Held out if absent."),
    ] = None,
    model: ModelName = None,
    backend: BackendName = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The study's name under `runs/`, or its folder.")
    ] = None,
    metric: Annotated[
        str, typer.Option(metavar="NAME", help="What trials are judged by, e.g. `val/AP50`; `auto`: the usual one.")
    ] = "auto",
    mode: Annotated[str, typer.Option(metavar="max|min", help="Whether more or less of it is better.")] = "auto",
    trials: Annotated[
        int | None, typer.Option(metavar="N", help="All of them together; 20 if absent, of a grid all.")
    ] = None,
    parallel: Annotated[int | None, typer.Option(metavar="N", help="How many at once; 1 if absent.")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time for the search, e.g. `2h`; then it can be resumed.")
    ] = None,
    sampler: Annotated[
        str, typer.Option(metavar="NAME", help="tpe, random, grid, cmaes, or the place's own; `auto`: the usual one.")
    ] = "auto",
    pruner: Annotated[
        str, typer.Option(metavar="NAME", help="Ends trials that are behind: median, asha, hyperband, none.")
    ] = "auto",
    search_seed: Annotated[int, typer.Option(metavar="N", help="Seed of what is tried; `seed=` is the trials'.")] = 0,
    devices: Annotated[
        str | None, typer.Option(metavar="cuda:0,cuda:1", help="Devices of the trials that run at once.")
    ] = None,
    storage: Annotated[
        str, typer.Option(metavar="URL", help="A database server, for several machines that work on one study.")
    ] = "",
    parent: Annotated[
        str, typer.Option(metavar="NAME", help="An earlier search at the same place, to learn from (SageMaker).")
    ] = "",
    on_invalid: Annotated[
        str | None, typer.Option(metavar="raise|drop", help="Refuse unusable boxes, or leave them out and count them.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="The data's format; recognised if absent.")
    ] = None,
    code: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Your own modules, a folder or a .py file.")
    ] = None,
    imports: Annotated[
        list[str] | None, typer.Option("--import", metavar="MODULE", help="Import it before training; repeatable.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="STUDY", help="Go on with a study; with more --trials, beyond its end.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be searched, and at most paid; start nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Start what costs money, without `--max-cost`.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Search for the parameters with which a model is best, each trial a run.

    The data is divided as for `detkit train`; the test images are seen by no trial. At the end the best trial, the one
    behind it and the model's defaults are compared on them.
    """
    from detkit.errors import UsageError
    from detkit.trainer import Trainer
    from detkit.tuner import Tuner

    given = sort_words([*(words or []), *context.args], own_flags(context))
    settings, space = _ranges(given)
    if yes:
        settings["yes"] = "true"
    trainer = Trainer(
        model=model,
        backend=backend,
        on_invalid=on_invalid,  # type: ignore[arg-type]  # the trainer says which there are
        code=code,
        imports=imports or None,
        **settings,
    )
    tuner = Tuner(
        trainer,
        space or "auto",
        metric=metric,
        mode=mode,  # type: ignore[arg-type]  # the tuner says which there are
        trials=trials,
        parallel=1 if parallel is None else parallel,
        budget=budget,
        sampler=sampler,
        pruner=pruner,
        seed=search_seed,
        devices=[] if devices is None else [device.strip() for device in devices.split(",")],
        storage=storage,
        parent=parent,
    )
    if resume is not None:
        typed = [name for name in context.params if _is_typed(context, name)]
        money = settings.pop("max_cost", None)
        settings.pop("yes", None)
        other = [*given.positions, *settings, *space]
        other += [f"--{name.replace('_', '-')}" for name in typed if name not in _OF_RESUME]
        if other:
            raise UsageError(
                f"--resume goes on with a study as it was begun; leave out {', '.join(other)}: only --trials, "
                "--parallel, --budget, --max-cost and --devices are new"
            )
    if dry_run:
        _print_plan(tuner, read_data(given, test, format), as_json=as_json)
        return
    try:
        if resume is not None:
            study = tuner.resume(
                resume, trials=trials, budget=budget, parallel=parallel, max_cost=_dollars(money), quiet=quiet
            )
        else:
            study = tuner.fit(*read_data(given, test, format), name=name, quiet=quiet)
    except KeyboardInterrupt:
        messages.tell(f"`detkit tune --resume {resume or 'last'}` goes on with it")
        raise typer.Exit(messages.STOPPED) from None
    _print(study, as_json=as_json, judged=True)


_OF_RESUME = {"resume", "words", "trials", "parallel", "budget", "devices", "quiet", "as_json"}


def _dollars(text: str | None) -> float | None:
    from detkit.errors import InvalidValue

    try:
        return None if text is None else float(text)
    except ValueError:
        raise InvalidValue("max_cost", text, "US dollars, such as 5") from None


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command("ls")
def ls(*, as_json: Json = False) -> None:
    """List the studies, the newest at the end."""
    from detkit.studies import list_studies

    found = list_studies()
    if as_json:
        messages.print_json([{name: study.to_dict()[name] for name in _HEAD} for study in found])
        return
    rows = []
    for study in found:
        ranked = study.ranking()
        best = f"{ranked[0].value:.4g}" if ranked else ""
        rows.append((study.name, f"{study.record.backend}/{study.record.model}", f"{len(study.trials)}", best))
    messages.print_table(("study", "model", "trials", "best"), rows)


_HEAD = ("study", "model", "metric", "mode", "space", "wanted", "best")


@app.command("show")
def show(study: StudyName, *, as_json: Json = False) -> None:
    """Show the trials of a study, also while it goes on."""
    from detkit.studies import open_study

    _print(open_study(study), as_json=as_json, judged=False)


@app.command("stop")
def stop(study: StudyName) -> None:
    """Ask a place that searches by itself, such as SageMaker, to end the search and the trials that run."""
    from detkit.studies import open_study
    from detkit.tuning_there import stop_there

    found = open_study(study)
    stop_there(found)
    messages.tell(f"asked to stop; `detkit tune --resume {messages.shown(found.path)}` brings what it found")


@app.command("compare")
def compare(study: StudyName, *, as_json: Json = False) -> None:
    """Compare the best trial, the one behind it and the defaults on the images that no trial saw."""
    from detkit.studies import open_study

    comparison = _judge(open_study(study))
    if as_json:
        messages.print_json(comparison.to_dict())
    else:
        print(comparison)


@app.command("rescore")
def rescore(
    study: StudyName,
    data: Annotated[str | None, typer.Argument(metavar="[DATA]", help="Images that no trial saw.")] = None,
    *,
    top: Annotated[int, typer.Option(min=1, help="How many of the best trials.")] = 3,
    as_json: Json = False,
) -> None:
    """Score the best trials by detkit's AP on images that none of them saw, and rank them by it.

    Without DATA: on the study's validation images, where the place kept them from its trials.
    """
    from detkit.tuner import rescore

    _print(rescore(study, data, top=top, progress=not as_json), as_json=as_json, judged=False)


@app.command("enqueue", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def enqueue(context: typer.Context, study: StudyName, *, as_json: Json = False) -> None:
    """Have values tried next, `param=value ...`; the search takes them when it goes on."""
    from detkit.studies import open_study

    values = _settings(context, "studies enqueue STUDY")
    found = open_study(study)
    found.enqueue(**values)
    if as_json:
        messages.print_json(found.to_dict())
    else:
        print(f"next:  detkit tune --resume {messages.shown(found.path)}")


@app.command("retrain", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def retrain(
    context: typer.Context,
    study: StudyName,
    *,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The run's name under `runs/`.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Start what costs money, without `--max-cost`.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train the best trial's values on training and validation images together.

    `param=value` and `--option VALUE` are what is to differ. Where it is paid, `--max-cost` or `--yes` is for this run.
    """
    from detkit.tuner import retrain

    settings: dict[str, Any] = _settings(context, "studies retrain STUDY")
    if yes:
        settings["yes"] = "true"
    run = retrain(study, name=name, quiet=quiet, **settings)
    if as_json:
        messages.print_json(describe(run))
    else:
        print_summary(run)


def _settings(context: typer.Context, usage: str) -> dict[str, str]:
    from detkit.errors import UsageError

    given = sort_words(context.args, own_flags(context), usage)
    if given.positions:
        raise UsageError(f"`detkit {usage} param=value ...` takes no {given.positions[0]!r}")
    return given.settings


def _ranges(given: Words) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that have one value, and the space."""
    from detkit.spaces import read_range

    settings: dict[str, Any] = {}
    space: dict[str, Any] = {}
    for name, text in given.settings.items():
        range_ = read_range(name, text)
        if range_ is None:
            settings[name] = text
        else:
            space[name] = range_
    return settings, space


def _judge(study: "Study") -> "Comparison":
    from detkit.comparison import compare

    return compare(study.contenders())


def _print(study: "Study", *, as_json: bool, judged: bool) -> None:
    from detkit.errors import DetkitError

    ranked, comparison = study.ranking(), None
    if judged and ranked and study.workspace.dataset("test") is not None:
        try:
            comparison = _judge(study)
        except DetkitError as error:  # they answer only where they were trained, or lie on another machine
            messages.tell(f"the trials were not compared on the test images: {error}")
    if as_json:
        messages.print_json({**study.to_dict(), "comparison": comparison.to_dict() if comparison else None})
        return
    messages.print_table(*study.rows())
    if comparison is not None:
        print(f"\non {len(comparison.data)} test images that no trial saw")
        print(comparison)
    place = messages.shown(study.path)
    print(f"\nstudy  {place}")
    if ranked:
        print(f"best   {messages.shown(ranked[0].path or study.path)}")
    print(f"next:  detkit plot {place}")
    if ranked and not study.search.metric.startswith("val/") and all(trial.rescored is None for trial in ranked):
        print(f"       detkit studies rescore {place}   # {study.search.metric} is not detkit's; rank by AP")
    print(f"       detkit studies retrain {place}")
    if not study.searched_there and study.search.sampler != "grid":
        print(f"       detkit tune --resume {place} --trials {study.search.trials * 2}")


def _print_plan(tuner: "Tuner", data: list[Any], *, as_json: bool) -> None:
    plan = tuner.plan(*data)
    if as_json:
        messages.print_json(plan.to_dict())
    else:
        print(plan)
    if plan.errors:
        raise typer.Exit(messages.FINDINGS)
