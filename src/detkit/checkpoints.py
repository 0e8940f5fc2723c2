"""Resumable states of a run: the two newest are kept, and one that is damaged is never taken up.

A state is the file ``step-<steps done>-<beginning of its sha256>``, whatever an engine writes into it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from detkit.errors import StorageError, UsageError
from detkit.files import atomic_write, file_sha256

KEPT = 2
BATCH_SIZE = "batch_size.json"
STEP = "step.json"
PROCESSES = "processes.json"
CHOICES = (BATCH_SIZE, STEP, PROCESSES)
"""Files that may lie beside the states and are none, of what was chosen at the start: the batch size, the way of a step
and the number of processes."""
_DIGITS = 16
"""Hexadecimal digits of the sha256 that a name has."""
_NEW = "new"
"""The name of a state that is not yet whole; `atomic_write` adds a point and some letters."""


class Checkpoint(NamedTuple):
    """One state, by its file's name."""

    step: int
    path: Path

    @property
    def is_whole(self) -> bool:
        """Whether the file has the bytes that were written."""
        return file_sha256(self.path)[:_DIGITS] == self.path.name.rpartition("-")[2]


class Checkpoints:
    """The states of a run's ``checkpoints`` folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, write: Callable[[IO[bytes]], object]) -> None:
        """Write a state beside the others, and then remove all but the newest two.

        Raises `StorageError`, for example where the disk is full; what was there before stays.
        """
        self._clear()
        new = self.folder / _NEW
        try:
            with atomic_write(new) as file:
                write(file)
            os.replace(new, self.folder / f"step-{step:09d}-{file_sha256(new)[:_DIGITS]}")
        except StorageError as error:
            raise StorageError(new, f"{error.why}; {self._what_is_left()}") from error
        for old in self._all()[KEPT:]:
            old.path.unlink(missing_ok=True)

    def newest(self, say: Callable[[str], object]) -> Checkpoint | None:
        """Return the newest whole state, None where none was ever saved.

        A damaged one is set aside as ``damaged-...``, and ``say`` is told. Raises `UsageError` where all are damaged,
        now or earlier.
        """
        self._clear()
        found = self._all()
        for checkpoint in found:
            if checkpoint.is_whole:
                return checkpoint
            aside = checkpoint.path.with_name(f"damaged-{checkpoint.path.name}")
            os.replace(checkpoint.path, aside)
            say(f"the checkpoint of step {checkpoint.step} is damaged ({aside}); going on from the one before")
        if any(self.folder.glob("damaged-*")):
            raise UsageError(f"no checkpoint in {self.folder} is whole, so this run cannot go on; train anew")
        return None

    def _clear(self) -> None:
        """Remove what a process that was killed had half written; only one process at a time works in the folder."""
        for left in (self.folder / _NEW, *self.folder.glob(f".{_NEW}.*")):
            left.unlink(missing_ok=True)

    def _all(self) -> list[Checkpoint]:
        """Return the states, the newest first."""
        found = [Checkpoint(int(path.name.split("-")[1]), path) for path in self.folder.glob("step-*-*")]
        return sorted(found, reverse=True)

    def _what_is_left(self) -> str:
        found = self._all()
        return f"the checkpoint of step {found[0].step} is still there" if found else "there is no earlier checkpoint"
