"""Everything that is wrong, doubtful or too much for some backend in a data set, found in one pass.

Codes are stable. An *error* stops training, a *warning* is worth a look, a *note* is a limit that a backend would meet.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from detkit.checking.classes import check_classes
from detkit.checking.limits import check_corners, check_limits, declared
from detkit.checking.pictures import check_pictures, orphans
from detkit.checking.places import locate
from detkit.data import Dataset
from detkit.errors import DetkitWarning, ImageError, InvalidData
from detkit.formats.checks import check_annotations
from detkit.formats.findings import Finding
from detkit.formats.imagefacts import look as look_at
from detkit.io import read_dataset

__all__ = ["check", "read_and_check"]

Look: TypeAlias = Literal["pixels", "headers", "none"]

_LEAVING_OUT = {"split", "exclude", "corrupted", "unannotated", "unlabelled"}
"""Options of reading that leave images out on purpose."""


def check(
    data: Dataset | str | Path,
    *,
    look: Look = "pixels",
    format: str | None = None,
    **options: Any,
) -> list[Finding]:
    """Return everything that is found in a data set, or in files that become one, in the order of the files.

    ``look="pixels"`` decodes every image, ``"headers"`` only looks at sizes and bytes, ``"none"`` opens none; what
    was seen of a file is remembered until it changes. ``format`` and ``options`` are those of `detkit.read_dataset`.
    Files that cannot be read are findings, too: nothing is raised for them, and the rest is checked all the same.
    """
    return read_and_check(data, look=look, format=format, **options)[1]


def read_and_check(
    data: Dataset | str | Path,
    *,
    look: Look = "pixels",
    format: str | None = None,
    **options: Any,
) -> tuple[Dataset | None, list[Finding]]:
    """Return the data, as far as it can be read, and what `check` returns."""
    if isinstance(data, Dataset):
        return data, locate(_check(data, look))
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
        unread = any(finding.severity == "error" for finding in found)
        found += [finding for finding in _check(known, look) if finding not in found]
        # Of a split, of one file of several, and of what was left out on purpose, other images are no orphans.
        if look != "none" and not unread and not options.keys() & _LEAVING_OUT and Path(data).is_dir():
            found += orphans(known, Path(data))
    return known, locate(found)


def _check(data: Dataset, look: Look) -> list[Finding]:
    found = _look_through(data, look)
    return [f if f.image is None or f.image_file else replace(f, image_file=data.paths[f.image]) for f in found]


def _look_through(data: Dataset, look: Look) -> list[Finding]:
    if not len(data):
        return check_annotations(data, None)
    doubtful = [*check_classes(data), *check_limits(data), *check_corners(data)]
    if look == "none":
        return [*doubtful, *check_annotations(data, None)]
    facts = look_at(data.paths, decode=look == "pixels")
    headers = [fact if isinstance(fact, ImageError) else fact.header for fact in facts]
    strict = [limits.who for limits in declared() if limits.three_channels]
    return [*doubtful, *check_pictures(data, facts, strict), *check_annotations(data, headers)]
