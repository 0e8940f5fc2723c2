"""``detkit check``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from detkit.cli import messages
from detkit.cli.runs import Json
from detkit.cli.words import sort_words

_FORMATS = ("text", "json", "github", "sarif")
_LOOKS = ("pixels", "headers", "none")


def check(
    context: typer.Context,
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA[:SPLIT] [--option VALUE]",
            help="What to check; options are those of its format, such as `--origin 0`.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="DATA's format; recognised if absent.")
    ] = None,
    look: Annotated[
        str, typer.Option(metavar="pixels|headers|none", help="How far to look into images; pixels decodes all.")
    ] = "pixels",
    format: Annotated[str, typer.Option(metavar="text|json|github|sarif", help="How to print what is found.")] = "text",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with pictures, sizes and places of boxes, too.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Print every finding, not ten of a kind.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Leave with 1 for warnings, too.")] = False,
    as_json: Json = False,
) -> None:
    """Find everything that is wrong with a data set, each finding with its file, line and column.

    Leaves with 1 where there is an error. Images are read once and remembered until they change.
    """
    from detkit.checking import read_and_check, report
    from detkit.errors import InvalidValue, UsageError
    from detkit.progress import shown

    flags = [name.lstrip("-") for parameter in context.command.params for name in parameter.opts]
    given = sort_words([*(words or []), *context.args], flags, "check DATA")
    if len(given.positions) != 1:
        raise UsageError(f"expected one data set, found {len(given.positions)}; type `detkit check DATA`")
    for name, value, known in (("look", look, _LOOKS), ("format", format, _FORMATS)):
        if value not in known:
            raise InvalidValue(name, value, f"one of {', '.join(known)}")
    if as_json and format not in {"text", "json"}:
        raise UsageError(f"--json and --format {format} exclude one another; give one of them")
    if html is not None and html.exists():
        raise UsageError(f"{html} exists already; nothing is overwritten, so choose another file or remove it")
    with shown(sys.stderr.isatty()):
        data, findings = read_and_check(
            given.positions[0],
            look=look,  # type: ignore[arg-type]
            format=source,
            **given.settings,
        )
        if html is not None:
            from detkit.checking.overview import write_overview

            write_overview(data, findings, html, title=given.positions[0])
    if html is not None:
        messages.tell(f"page: {messages.shown(html)}")
    if as_json or format == "json":
        messages.print_json(report.as_json(data, findings))
    elif format == "sarif":
        messages.print_json(report.as_sarif(findings))
    else:
        lines = (
            report.as_github(findings) if format == "github" else report.as_text(data, findings, everything=everything)
        )
        for line in lines:
            print(line)
    stopping = {"error", "warning"} if strict else {"error"}
    if any(finding.severity in stopping for finding in findings):
        raise typer.Exit(messages.FINDINGS)
