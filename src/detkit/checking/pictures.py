"""Images that cannot be decoded, are there twice, lie in two splits, or belong to nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detkit.errors import ImageError
from detkit.formats.findings import Finding
from detkit.images import EXTENSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from detkit.data import Dataset
    from detkit.formats.findings import Severity
    from detkit.formats.imagefacts import ImageFacts

NEAR_BITS = 10
"""Of the 256 bits of the difference hash, so many may differ between near-duplicates."""

_MOST_COMPARED = 50_000
"""Images above which near-duplicates are not looked for: every pair is compared."""
_BLOCK = 2048
_FLAT_BITS = 24
"""A hash with fewer bits set, or unset, is of a picture without structure, which resembles every other such picture."""


def check_pictures(data: Dataset, facts: Sequence[ImageFacts | ImageError]) -> Iterator[Finding]:
    """Yield what is wrong with the images themselves; files that cannot be opened at all are told by their headers."""

    def finding(i: int, code: str, severity: Severity, message: str) -> Finding:
        return Finding(code=code, severity=severity, message=message, file=data.paths[i], image=i)

    for i, fact in enumerate(facts):
        if isinstance(fact, ImageError):
            continue
        if fact.fault:
            code = "truncated-image" if "truncated" in fact.fault.lower() else "unreadable-image"
            yield finding(i, code, "error", fact.fault)
        elif fact.channels not in {0, 3}:
            yield finding(
                i,
                "channels",
                "note",
                f"it has {fact.channels} channel(s); detkit makes it RGB, SageMaker's built-in algorithm takes images "
                "with 3 only",
            )
    roles = _Membership(data)
    first: dict[str, int] = {}
    copies: set[tuple[int, int]] = set()
    for i, fact in enumerate(facts):
        if isinstance(fact, ImageError):
            continue
        j = first.setdefault(fact.digest, i)
        if j != i:
            copies.add((j, i))
            if leak := roles.leak(j, i):
                yield finding(i, "leaked-image", "error", f"byte for byte {data.paths[j]}, and {leak}")
            else:
                yield finding(i, "duplicate-image", "warning", f"byte for byte {data.paths[j]}")
    for i, j, bits in _near(facts):
        if (i, j) in copies:
            continue
        near = f"looks like {data.paths[i]} ({bits} of 256 bits differ)"
        if leak := roles.leak(i, j):
            yield finding(j, "near-duplicate-leak", "warning", f"{near}, and {leak}")
        else:
            yield finding(j, "near-duplicate", "note", near)
    yield from roles.overlaps()


class _Membership:
    """Which splits an image is in. A split that contains another, as trainval contains train, leaks nothing."""

    def __init__(self, data: Dataset) -> None:
        self._data = data
        self._splits = {name: set(at.tolist()) for name, at in data.split_indices.items()}

    def leak(self, i: int, j: int) -> str:
        """Say which splits two images that are alike are in, where no split contains both of them; else nothing."""
        mine, others = ([name for name, members in self._splits.items() if at in members] for at in (i, j))
        if not mine or not others or set(mine) & set(others):
            return ""
        return f"that one is in split {'/'.join(mine)}, this one in {'/'.join(others)}"

    def overlaps(self) -> Iterator[Finding]:
        """Yield an error for two splits that share images and of which neither contains the other."""
        names = list(self._splits)
        for a, b in ((a, b) for k, a in enumerate(names) for b in names[k + 1 :]):
            shared = sorted(self._splits[a] & self._splits[b])
            nested = self._splits[a] <= self._splits[b] or self._splits[b] <= self._splits[a]
            if shared and (not nested or "test" in {a, b}):
                listed = ", ".join(self._data.image_ids[i] for i in shared[:3])
                yield Finding(
                    code="leaked-image",
                    severity="error",
                    message=f"{len(shared)} image(s) are in split {a} and in {b}, for example {listed}",
                    file=self._data.sources[shared[0]] or self._data.paths[shared[0]],
                    image=shared[0],
                    place=self._data.image_ids[shared[0]],
                )


def _near(facts: Sequence[ImageFacts | ImageError]) -> Iterator[tuple[int, int, int]]:
    """Yield pairs of images whose hashes nearly agree, and in how many bits they do not, each image once."""
    hashed = [
        (i, f.difference_hash) for i, f in enumerate(facts) if not isinstance(f, ImageError) and f.difference_hash
    ]
    if not 2 <= len(hashed) <= _MOST_COMPARED:
        return
    bits = np.unpackbits(np.array([np.frombuffer(h, np.uint8) for _, h in hashed]), axis=1)
    set_bits = bits.sum(axis=1)
    structured = np.flatnonzero((set_bits >= _FLAT_BITS) & (set_bits <= 256 - _FLAT_BITS))
    index = np.array([i for i, _ in hashed])[structured]
    signs = bits[structured].astype(np.float32) * 2 - 1
    for start in range(0, len(signs), _BLOCK):
        block = signs[start : start + _BLOCK]
        differing = (256 - block @ signs[: start + len(block)].T) / 2
        rows, columns = np.nonzero(differing <= NEAR_BITS)
        earlier = columns < rows + start
        told: set[int] = set()
        for row, column in zip(rows[earlier].tolist(), columns[earlier].tolist(), strict=True):
            if row not in told:
                told.add(row)
                yield int(index[column]), int(index[row + start]), round(float(differing[row, column]))


def orphans(data: Dataset, root: Path, found: Sequence[Finding]) -> Iterator[Finding]:
    """Yield a warning for each image file beside those of the data set that no annotation names."""
    used = {str(Path(path).absolute()) for path in data.paths} | {str(Path(f.file).absolute()) for f in found}
    for folder in sorted(
        {Path(path).absolute().parent for path in data.paths if "#" not in path and "://" not in path}
    ):
        if not folder.is_dir() or not folder.is_relative_to(root.absolute() if root.is_dir() else folder):
            continue
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in EXTENSIONS and str(file) not in used and not file.name.startswith("."):
                yield Finding(
                    code="orphan-image",
                    severity="warning",
                    message="no annotation names this image, so it is not part of the data set",
                    file=str(file),
                )
