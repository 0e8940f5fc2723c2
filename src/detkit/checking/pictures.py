"""Images that cannot be decoded, are there twice, lie in two splits, or belong to nothing."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detkit.errors import ImageError
from detkit.formats.findings import Finding
from detkit.formats.splits import containers
from detkit.images import EXTENSIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from detkit.data import Dataset
    from detkit.formats.findings import Severity
    from detkit.formats.imagefacts import ImageFacts

NEAR_BITS = 10
"""Of the 256 bits of the difference hash, so many may differ between near-duplicates."""

_MOST_COMPARED = 50_000
"""Images above which near-duplicates are not looked for: every pair is compared."""
_BLOCK = 2048
_TOGETHER = {"trainval", "all"}
"""Splits that put others together by their name, also where only one of these is there."""
_MOST_ALIKE = 64
"""Earlier images that one is compared with further, where a film has made hundreds alike."""
_FLAT_BITS = 24
"""A hash with fewer bits set, or unset, is of a picture without structure, which resembles every other such picture."""


def check_pictures(
    data: Dataset, facts: Sequence[ImageFacts | ImageError], strict: Sequence[str] = ()
) -> Iterator[Finding]:
    """Yield what is wrong with the images themselves; files that cannot be opened at all are told by their headers.

    ``strict`` names those who take images with three channels only.
    """

    def finding(i: int, code: str, severity: Severity, message: str) -> Finding:
        return Finding(code=code, severity=severity, message=message, file=data.paths[i], image=i)

    for i, fact in enumerate(facts):
        if isinstance(fact, ImageError):
            continue
        if fact.fault:
            code = "truncated-image" if "truncated" in fact.fault.lower() else "unreadable-image"
            yield finding(i, code, "error", fact.fault)
        elif strict and fact.channels not in {0, 3}:
            yield finding(
                i,
                "channels",
                "note",
                f"it has {fact.channels} channel(s); detkit makes it RGB, {' and '.join(strict)} takes images with 3 "
                "only",
            )
    roles = _Membership(data)
    same: dict[str, list[int]] = {}
    copies: set[tuple[int, int]] = set()
    for i, fact in enumerate(facts):
        if isinstance(fact, ImageError):
            continue
        earlier = same.setdefault(fact.digest, [])
        copies |= {(j, i) for j in earlier}
        if earlier:
            j, leak = roles.worst(earlier, i)
            message = f"byte for byte {data.paths[j]}"
            if leak:
                yield finding(i, "leaked-image", "error", f"{message}, and {leak}")
            else:
                yield finding(i, "duplicate-image", "warning", message)
        earlier.append(i)
    yield from roles.overlaps()
    if len(facts) > _MOST_COMPARED:
        message = f"near-duplicates among more than {_MOST_COMPARED} images are not looked for; check a part of them"
        yield Finding(code="not-compared", severity="note", message=message, file="")
        return
    for i, nearby in _near(facts):
        bits = {j: count for j, count in nearby.items() if (j, i) not in copies}
        if not bits:
            continue
        j, leak = roles.worst(bits, i)
        message = f"looks like {data.paths[j]} ({bits[j]} of 256 bits differ)"
        if leak:
            yield finding(i, "near-duplicate-leak", "warning", f"{message}, and {leak}")
        else:
            yield finding(i, "near-duplicate", "note", message)


class _Membership:
    """Which splits an image is in; those that only put others together, as trainval does, do not count."""

    def __init__(self, data: Dataset) -> None:
        self._data = data
        aside = containers(data.split_indices) | _TOGETHER
        self._splits = {name: set(at.tolist()) for name, at in data.split_indices.items() if name not in aside}

    def worst(self, earlier: Iterable[int], i: int) -> tuple[int, str]:
        """Return one of the images that are like image ``i``, and between which splits it leaks; "" for none."""
        told = [(j, self._leak(j, i)) for j in earlier]
        return next(((j, leak) for j, leak in told if leak), told[0])

    def _leak(self, i: int, j: int) -> str:
        mine, others = ([name for name, members in self._splits.items() if at in members] for at in (i, j))
        if not mine or not others or set(mine) & set(others):
            return ""
        return f"that one is in split {'/'.join(mine)}, this one in {'/'.join(others)}"

    def overlaps(self) -> Iterator[Finding]:
        """Yield an error for two splits that share images."""
        for a, b in combinations(self._splits, 2):
            shared = sorted(self._splits[a] & self._splits[b])
            if shared:
                listed = ", ".join(self._data.image_ids[i] for i in shared[:3])
                yield Finding(
                    code="leaked-image",
                    severity="error",
                    message=f"{len(shared)} image(s) are in split {a} and in {b}, for example {listed}",
                    file=self._data.sources[shared[0]] or self._data.paths[shared[0]],
                    image=shared[0],
                    place=self._data.image_ids[shared[0]],
                )


def _near(facts: Sequence[ImageFacts | ImageError]) -> Iterator[tuple[int, dict[int, int]]]:
    """Yield images with earlier ones whose hashes nearly agree, some if there are many, and how many bits differ."""
    hashed = [
        (i, f.difference_hash) for i, f in enumerate(facts) if not isinstance(f, ImageError) and f.difference_hash
    ]
    if len(hashed) < 2:
        return
    bits = np.unpackbits(np.array([np.frombuffer(h, np.uint8) for _, h in hashed]), axis=1)
    set_bits = bits.sum(axis=1)
    structured = np.flatnonzero((set_bits >= _FLAT_BITS) & (set_bits <= 256 - _FLAT_BITS))
    index = np.array([i for i, _ in hashed])[structured]
    signs = bits[structured].astype(np.float32) * 2 - 1
    for start in range(0, len(signs), _BLOCK):
        block = signs[start : start + _BLOCK]
        differing = (256 - block @ signs[: start + len(block)].T) / 2
        for row, counts in enumerate(differing):
            columns = np.flatnonzero(counts[: start + row] <= NEAR_BITS)[:_MOST_ALIKE]
            if len(columns):
                yield int(index[start + row]), {int(index[column]): round(float(counts[column])) for column in columns}


def orphans(data: Dataset, root: Path) -> Iterator[Finding]:
    """Yield a warning for each image file beside those of the data set, in its folder, that no annotation names."""
    local = [Path(path).absolute() for path in data.paths if "#" not in path and "://" not in path]
    # Some formats keep an image of two splits twice.
    used = {path.name for path in local}
    for folder in sorted({path.parent for path in local}):
        if not folder.is_dir() or not folder.is_relative_to(root.absolute()):
            continue
        for file in sorted(folder.iterdir()):
            known = file.name in used or file.name.startswith(".")
            if file.suffix.lower() in EXTENSIONS and not known:
                yield Finding(
                    code="orphan-image",
                    severity="warning",
                    message="no annotation names this image, so it is not part of the data set",
                    file=str(file),
                )
