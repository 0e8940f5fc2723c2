"""``detkit plot``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from detkit.cli import messages
from detkit.cli.runs import Json


def plot(
    *,
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...|STUDY", help="Folders, names, `last` or `best`; or one study.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A page (.html) or a picture (.svg, .png, .pdf); `output/curves.html` in the run or "
            "`output/study.html` in the study, `curves.html` here for several runs if absent.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Draw only this, such as `AP`, `loss`, `val/loss`; repeatable."),
    ] = None,
    steps: Annotated[bool, typer.Option("--steps", help="Draw over steps instead of epochs.")] = False,
    as_json: Json = False,
) -> None:
    """Draw losses, validation scores and learning rate of runs, or what a study found; also while they go on."""
    from detkit.learning_curves import plot

    if any(map(_is_study, runs)):
        _plot_study(runs, output, other=bool(metric) or steps, as_json=as_json)
        return
    curves = plot(runs, output, metrics=metric, position="step" if steps else "epoch")
    if output is None:
        output = curves.save(curves.runs[0].path / "output/curves.html" if len(runs) == 1 else Path("curves.html"))
    if as_json:
        messages.print_json({"file": output, **curves.to_dict()})
    else:
        print(messages.shown(output))


def _is_study(name: str) -> bool:
    from detkit.catalog import runs_folder
    from detkit.studies import is_study

    return is_study(name) or is_study(runs_folder() / name)


def _plot_study(names: list[str], output: Path | None, *, other: bool, as_json: bool) -> None:
    from detkit.errors import UsageError
    from detkit.study_plots import plot_study

    if len(names) > 1:
        raise UsageError("a study is drawn alone; name one study, or runs such as STUDY/trials/0000")
    if other:
        raise UsageError("--metric and --steps are of runs; a study is drawn by the metric that it was judged by")
    os.environ["MPLBACKEND"] = "agg"  # Optuna draws through pyplot, which would look for a screen
    plots = plot_study(names[0], output)
    if output is None:
        output = plots.save(plots.study.path / "output/study.html")
    for title, why in plots.missing.items():
        messages.tell(f"{title.lower()} is not drawn: {why}")
    if as_json:
        messages.print_json({"file": output, **plots.to_dict()})
    else:
        print(messages.shown(output))
