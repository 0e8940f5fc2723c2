"""Everything that is wrong, doubtful or too much for some backend in a data set, found in one pass.

Codes are stable. An *error* stops training, a *warning* is worth a look, a *note* is a limit that a backend would meet.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

from detkit.checking.classes import check_classes
from detkit.checking.limits import check_limits
from detkit.checking.pictures import check_pictures, orphans
from detkit.checking.places import locate
from detkit.data import Dataset
from detkit.errors import DetkitWarning, ImageError, InvalidData
from detkit.formats.checks import check_annotations
from detkit.formats.findings import Finding
from detkit.formats.imagefacts import look
from detkit.io import read_dataset

__all__ = ["check", "read_and_check"]


def check(
    data: Dataset | str | Path,
    *,
    images: Literal["pixels", "headers", "none"] = "pixels",
    format: str | None = None,
    **options: Any,
) -> list[Finding]:
    """Return everything that is found in a data set, or in files that become one, in the order of the files.

    ``images="pixels"`` decodes every image, ``"headers"`` only looks at sizes and bytes, ``"none"`` opens none; what
    was seen of a file is remembered until it changes. ``format`` and ``options`` are those of `detkit.read_dataset`.
    Files that cannot be read are findings, too: nothing is raised for them, and the rest is checked all the same.
    """
    return read_and_check(data, images=images, format=format, **options)[1]


def read_and_check(
    data: Dataset | str | Path,
    *,
    images: Literal["pixels", "headers", "none"] = "pixels",
    format: str | None = None,
    **options: Any,
) -> tuple[Dataset | None, list[Finding]]:
    """Return the data, as far as it can be read, and what `check` returns."""
    if isinstance(data, Dataset):
        return data, locate(_check(data, images))
    found: list[Finding] = []
    known: Dataset | None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            known = read_dataset(data, format, **options)
        except InvalidData as error:
            known = error.partial
            found += error.findings or [
                Finding(code="unreadable", severity="error", message=str(error), file=str(data))
            ]
    for warning in told:
        if isinstance(warning.message, DetkitWarning):
            message = str(warning.message).removeprefix(f"{data}: ")
            found.append(Finding(code="assumed", severity="warning", message=message, file=str(data)))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if known is not None:
        found += [finding for finding in _check(known, images) if finding not in found]
        if Path(data).exists() and images != "none":  # of a split, the other images are no orphans
            found += orphans(known, Path(data), found)
    return known, locate(found)


def _check(data: Dataset, images: Literal["pixels", "headers", "none"]) -> list[Finding]:
    if not len(data):
        return check_annotations(data, None)
    doubtful = [*check_classes(data), *check_limits(data)]
    if images == "none":
        return [*doubtful, *check_annotations(data, None)]
    facts = look(data.paths, decode=images == "pixels")
    headers = [fact if isinstance(fact, ImageError) else fact.header for fact in facts]
    return [*doubtful, *check_pictures(data, facts), *check_annotations(data, headers)]
