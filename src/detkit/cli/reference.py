"""``python -m detkit.cli.reference PAGE`` writes what every verb takes between the two marks of a Markdown page."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer.main

from detkit.cli import app

if TYPE_CHECKING:
    from collections.abc import Iterator

BEGIN = "<!-- begin: written by `python -m detkit.cli.reference` -->"
END = "<!-- end -->"


def fill(page: str) -> str:
    """Return a page with the verbs as they are now between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    verbs = "\n".join(_commands("detkit", typer.main.get_command(app)))
    return f"{before}{BEGIN}\n\n{verbs}\n{END}{after}"


def _commands(path: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        for name, child in command.commands.items():
            if not child.hidden:
                yield from _commands(f"{path} {name}", child)
        return
    given = [parameter for parameter in command.params if "--help" not in parameter.opts]
    words = [parameter for parameter in given if parameter.param_type_name == "argument"]
    options = [parameter for parameter in given if parameter.param_type_name == "option"]
    usage = [path, *(word.metavar if word.required else f"[{word.metavar}]" for word in words)]
    yield f"### `{path}`\n"
    yield f"```text\n{' '.join([*usage, '[OPTIONS]'] if options else usage)}\n```\n"
    yield f"{inspect.cleandoc(command.help)}\n"
    yield "| | |\n|---|---|"
    yield from (_row(word.metavar, word) for word in words)
    yield from (_row(" ".join([*option.opts, option.metavar or ""]).strip(), option) for option in options)
    yield ""


def _row(name: str, parameter: Any) -> str:
    default = parameter.default
    shown = "" if default is None or default is False or parameter.param_type_name != "option" else f" `{default}`"
    text = f"{parameter.help}{f' Default:{shown}.' if shown else ''}"
    return f"| `{_cell(name)}` | {_cell(text)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(fill(target.read_text()))
