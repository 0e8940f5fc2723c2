"""``detkit export``."""

from pathlib import Path
from typing import Annotated

import typer

from detkit.cli import messages
from detkit.cli.prediction import Code, ModelPlace
from detkit.cli.runs import Json


def export(
    *,
    model: ModelPlace,
    format: Annotated[
        str, typer.Argument(metavar="FORMAT", help="One that the model's backend writes, such as `onnx`.")
    ],
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to put it; `export/FORMAT` in the run if absent.")
    ] = None,
    code: Code = None,
    as_json: Json = False,
) -> None:
    """Write a model in another format."""
    from detkit.exporting import export

    file = export(model, format, to, code=code)
    size = sum(path.lstat().st_size for path in file.parent.rglob("*") if path.is_file())
    if as_json:
        messages.print_json({"file": file, "folder_bytes": size})
        return
    print(messages.shown(file))
    print(f"{size / 1e6:.1f} MB are in {messages.shown(file.parent)}")
