"""The command line, ``detkit``: one grammar, one file per group of verbs.

``detkit VERB [RUN|MODEL] [DATA[:SPLIT]] [--option value] [param=value ...]``

``detkit --help`` loads neither numpy nor a plugin: every command imports what it needs when it runs.
"""

import io
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import detkit
from detkit.cli import (
    backends,
    check,
    comparison,
    curation,
    demo,
    doctor,
    evaluation,
    export,
    messages,
    models,
    places,
    plot,
    prediction,
    runs,
    training,
    tuning,
)
from detkit.errors import DetkitError


class _WithPlaces(TyperGroup):
    """The verbs, and the backends that have some of their own, which are only looked for when they are typed."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or places.commands_of(cmd_name)


app = typer.Typer(
    name="detkit",
    cls=_WithPlaces,
    help="Train, use and compare object detectors of any framework.",
    epilog="Exit codes: 0 done, 1 findings or a failed threshold, 2 wrong use, 3 failure of a backend, 130 stopped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Flags that a backend declares are not known here: `train` and `explain` collect them.
_OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}

for verb in (check.check, curation.convert, curation.split, curation.merge, curation.sample, curation.remap):
    app.command(context_settings=_OPEN)(verb)
app.command(context_settings=_OPEN)(training.train)
app.command(context_settings=_OPEN)(tuning.tune)
app.command()(prediction.predict)
app.command()(evaluation.evaluate)
app.command()(comparison.compare)
app.command()(plot.plot)
app.command()(export.export)
app.command()(models.models)
app.command(context_settings=_OPEN)(training.explain)
app.add_typer(runs.app, name="runs")
app.add_typer(tuning.app, name="studies")
app.add_typer(backends.app, name="backends")
app.command(context_settings=_OPEN)(places.deploy)
app.add_typer(places.app, name="endpoints")
app.command()(doctor.doctor)
app.command()(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"detkit {detkit.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Train, use and compare object detectors of any framework."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command and leave the process with its exit code; what detkit can explain comes without a traceback."""
    words = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in words
    warnings.showwarning = messages.show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may be no text
    try:
        app(words, prog_name="detkit")
    except DetkitError as error:
        sys.exit(messages.report(error, as_json=as_json))
    except SystemExit as leaving:
        if leaving.code == messages.WRONG_USE and as_json:  # typer has said on standard error what is wrong
            messages.print_json({"error": "the command line is not understood", "code": messages.WRONG_USE})
        raise
