"""``detkit export``."""

import sys
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
    verify: Annotated[
        str | None,
        typer.Option(metavar="DATA[:SPLIT]", help="Keep it only if it finds there what the original finds."),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="DATA[:SPLIT]", help="Images to measure activations on, for `onnx-int8`."),
    ] = None,
    max_ap_drop: Annotated[
        float | None, typer.Option(metavar="X", min=0, max=1, help="AP that `onnx-int8` may lose; 0.01 if absent.")
    ] = None,
    max_images: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Images of each data set that are used; 200 if absent.")
    ] = None,
    code: Code = None,
    as_json: Json = False,
) -> None:
    """Write a model in another format, and verify that it finds the same."""
    from detkit.exporting import MAX_IMAGES, export
    from detkit.job import Model
    from detkit.verification import agreement_of

    file = export(
        model,
        format,
        to,
        verify=verify,
        calibrate=calibrate,
        max_ap_drop=max_ap_drop,
        max_images=max_images or MAX_IMAGES,
        code=code,
        progress=sys.stderr.isatty(),
    )
    size = sum(path.lstat().st_size for path in file.parent.rglob("*") if path.is_file())
    agreement = agreement_of(Model(file.parent)) if verify is not None else None
    if as_json:
        messages.print_json({"file": file, "folder_bytes": size, "verified": agreement})
        return
    print(messages.shown(file))
    print(f"{size / 1e6:.1f} MB are in {messages.shown(file.parent)}")
    if agreement is not None:
        messages.print_table(("compared with the original", "", "allowed"), agreement.table())
