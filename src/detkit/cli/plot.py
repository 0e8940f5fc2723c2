"""``detkit plot``."""

from pathlib import Path
from typing import Annotated

import typer

from detkit.cli import messages
from detkit.cli.runs import Json


def plot(
    *,
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders, names, `last` or `best`.", show_default=False)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A page (.html) or a picture (.svg, .png, .pdf); `output/curves.html` in the run, `curves.html` here "
            "for several if absent.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Draw only this, such as `AP`, `loss`, `val/loss`; repeatable."),
    ] = None,
    steps: Annotated[bool, typer.Option("--steps", help="Draw over steps instead of epochs.")] = False,
    as_json: Json = False,
) -> None:
    """Draw losses, validation scores and learning rate of runs, also while they go on."""
    from detkit.learning_curves import plot

    curves = plot(runs, output, metrics=metric, position="step" if steps else "epoch")
    if output is None:
        output = curves.save(curves.runs[0].path / "output/curves.html" if len(runs) == 1 else Path("curves.html"))
    if as_json:
        messages.print_json({"file": output, **curves.to_dict()})
    else:
        print(messages.shown(output))
