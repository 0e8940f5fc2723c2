"""Class names that are probably one, and classes that are hardly there."""

from __future__ import annotations

import difflib
import re
from itertools import combinations
from typing import TYPE_CHECKING

from detkit.formats.findings import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detkit.data import Dataset

FEW_BOXES = 10
"""Boxes of a class below which it will hardly be learnt, nor scored with any certainty."""
IMBALANCE = 100
"""Boxes of the most frequent class for one of the rarest above which the rare one drowns."""

_ALIKE = 0.85
"""Share of letters two names have in common (`difflib.SequenceMatcher.ratio`) above which one may be a slip of the
other; "scratches" and "scratchs" have 0.94."""
_SLIP_SHARE = 0.1
"""A slip is rare beside what was meant."""
_SHORTEST = 4


def check_classes(data: Dataset) -> Iterator[Finding]:
    """Yield what is doubtful about classes: their names, how many boxes they have, and where."""
    counts = data.boxes_per_class()
    file = data.sources[0] if len(set(data.sources)) == 1 else ""

    def warning(code: str, message: str) -> Finding:
        return Finding(code=code, severity="warning", message=message, file=file)

    for a, b in combinations(data.classes, 2):
        rare, common = sorted((a, b), key=lambda name: counts[name])
        told = f"{rare!r} ({counts[rare]} boxes) and {common!r} ({counts[common]})"
        if _bare(a) == _bare(b):
            yield warning("class-typo", f"{told} differ only in case, blanks or signs; if they are one class, remap it")
        elif counts[rare] <= _SLIP_SHARE * counts[common] and _is_slip(rare, common):
            yield warning("class-typo", f"{told} are spelt nearly alike; if they are one class, remap it")
    for name, count in counts.items():
        if count == 0:
            yield warning("empty-class", f"class {name!r} has no box; nothing can be learnt of it")
        elif count < FEW_BOXES:
            yield warning("rare-class", f"class {name!r} has {count} boxes; too few to learn it, or to score it")
    present = {name: count for name, count in counts.items() if count}
    if present and max(present.values()) > IMBALANCE * min(present.values()):
        rare, common = min(present, key=lambda n: present[n]), max(present, key=lambda n: present[n])
        yield warning(
            "class-imbalance",
            f"{common!r} has {present[common] / present[rare]:.0f} times as many boxes as {rare!r} "
            f"({present[common]} and {present[rare]}); look at the scores of each class, not at their mean",
        )
    yield from _missing_in_splits(data, file)


def _missing_in_splits(data: Dataset, file: str) -> Iterator[Finding]:
    train = next((name for name in ("train", "trainval") if name in data.split_indices), None)
    for split in data.split_indices if train else ():
        lacking = {n for n, count in data.splits[split].boxes_per_class().items() if not count}
        learnt = {n for n, count in data.splits[train].boxes_per_class().items() if count}  # type: ignore[index]
        present = {name for name, count in data.boxes_per_class().items() if count}
        missing = (present - learnt) if split == train else (lacking & learnt)
        if missing:
            what = "cannot be learnt" if split == train else "cannot be scored on it"
            yield Finding(
                code="class-missing-in-split",
                severity="warning",
                message=f"split {split!r} has no box of {', '.join(sorted(missing))}, which {what}",
                file=file,
            )


def _bare(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _is_slip(a: str, b: str) -> bool:
    """Return whether names are spelt nearly alike; "type 1" and "type 2" are not."""
    if min(len(a), len(b)) < _SHORTEST or re.sub(r"\d", "", a) == re.sub(r"\d", "", b):
        return False
    return difflib.SequenceMatcher(None, a.casefold(), b.casefold()).ratio() >= _ALIKE
