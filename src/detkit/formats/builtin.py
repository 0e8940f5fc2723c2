"""detkit's own formats, offered through the same hook as a stranger's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkit.formats import Format, coco, voc
from detkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Iterable


@hookimpl
def detkit_formats() -> Iterable[Format]:
    """Return Pascal VOC and COCO."""
    return [voc.FORMAT, coco.FORMAT]
