"""One thing that is wrong with a data set and where, as readers and checks report it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from detkit.errors import ImageError, InvalidData
from detkit.recordio import packed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from detkit.data import Dataset

Severity: TypeAlias = Literal["error", "warning", "note"]
"""An error stops training; a warning is told; a note is a limit that some backend would meet."""

_SHOWN = 10
_LINES, _ONE_BOX_A_LINE = {"lst", "manifest", "jsonl"}, {"csv", "txt"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong, and where."""

    code: str
    """Stable slug such as ``zero-area``."""
    severity: Severity
    message: str
    file: str
    """The annotation file, or the image where there is none."""
    record: int | None = None
    """Number of the record in the file, counted from 0."""
    image: int | None = None
    """Index of the image in the data set."""
    image_file: str = ""
    """The image, where it is about one and `file` may be its annotation."""
    box: int | None = None
    """Row of the box in the data set."""
    place: str = ""
    """The record as one looks for it in the file, e.g. ``object 3 (RBC)`` or ``annotations[17]``."""
    line: int | None = None
    """Line of the file, counted from 1."""
    column: int | None = None
    """Column of the line, counted from 1."""

    def __str__(self) -> str:
        return f"{': '.join(part for part in (self.file, self.place, self.message) if part)} [{self.code}]"


def count_codes(findings: Iterable[Finding]) -> dict[str, int]:
    """Return how often each code occurs, the most frequent first."""
    return dict(Counter(finding.code for finding in findings).most_common())


def raise_errors(findings: Iterable[Finding], hint: str = "", partial: Dataset | None = None) -> None:
    """Raise one `InvalidData` that carries every error among the findings; do nothing where there is none.

    ``partial`` is the data without what is at fault, where there is such a thing.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    counts = ", ".join(f"{code} {count}" for code, count in count_codes(errors).items())
    lines = [f"{len(errors)} error(s) in the data ({counts}):", *(f"  {finding}" for finding in errors[:_SHOWN])]
    if len(errors) > _SHOWN:
        lines.append(f"  ... and {len(errors) - _SHOWN} more")
    raise InvalidData("\n".join(lines), errors, hint, partial)


def image_finding(error: ImageError, index: int | None, file: str = "", place: str = "") -> Finding:
    """Return the finding for an image that could not be read."""
    missing = isinstance(error.__cause__, FileNotFoundError)
    return Finding(
        code="missing-image" if missing else "unreadable-image",
        severity="error",
        message=str(error),
        file=file or error.path,
        image=index,
        image_file=error.path,
        place=place,
    )


def record_place(source: str, record: int, position: int, path: str) -> str:
    """Say where a box stands in its file: ``record`` is the number of its record, ``position`` that among its image's.

    ``path`` is the image's, which tells the byte where it lies in a pack. JSON arrays and records count from 0, people
    and readers of lines from 1.
    """
    kind = source.rpartition(".")[2].lower()
    if kind == "json":
        return f"annotations[{record}]"
    if kind == "rec":
        where = packed(path)
        return f"record {record}{f' at byte {where[1]}' if where else ''}, object {position + 1}"
    if kind in _LINES:
        return f"line {record + 1}, object {position + 1}"
    return f"line {record + 1}" if kind in _ONE_BOX_A_LINE else f"object {record + 1}"
