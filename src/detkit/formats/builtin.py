"""detkit's own formats, offered through the same hook as a stranger's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkit.formats import (
    Format,
    coco,
    deepdetect,
    jumpstart,
    lst,
    manifest,
    record,
    sagemaker_json,
    sku110k,
    voc,
    yolo,
)
from detkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def detkit_formats() -> Iterable[Format]:
    """Return them, the most usual first."""
    return [
        voc.FORMAT,
        coco.FORMAT,
        lst.FORMAT,
        record.FORMAT,
        manifest.FORMAT,
        sagemaker_json.FORMAT,
        jumpstart.FORMAT,
        yolo.FORMAT,
        sku110k.FORMAT,
        deepdetect.FORMAT,
    ]
