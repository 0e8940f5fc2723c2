"""Decoded images that are kept: in the memory of a process, or once for all processes of a machine."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from detkit.ranks import Ranks

_IN_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps files in memory


class Cache(Protocol):
    """Images by their number, uint8 ``(3, h, w)``, in memory ``(h, w, 3)``."""

    def __getitem__(self, index: int) -> Tensor | None: ...
    def __setitem__(self, index: int, image: Tensor) -> None: ...


def shared_cache(sizes: Sequence[tuple[int, int]], ranks: Ranks) -> Cache | None:
    """Return what all ranks of a machine share, for images of these widths and heights; None where it has no room.

    All ranks call it together. The file has no name once all have it, so it is gone when they are.
    """
    place = ranks.place
    bounds: list[int] = np.cumsum([0, *(3 * width * height for width, height in sizes)]).tolist()
    num_bytes = bounds[-1] + len(sizes)
    # Each machine's first rank names the file; ranks of one machine follow each other.
    names = _exchanged(f".detkit-{os.urandom(16).hex()}".encode(), ranks)
    name = names[place.rank - place.local_rank].decode()
    try:
        if place.local_rank == 0:
            _make(name, num_bytes)
        ranks.sum([0.0])
        path = next((folder / name for folder in _folders() if (folder / name).is_file()), None)
        found = None if path is None else _Shared(path, bounds, sizes)
        have_it = ranks.sum([float(found is not None)])[0]
    finally:
        if place.local_rank == 0:
            for folder in _folders():
                (folder / name).unlink(missing_ok=True)
    return found if have_it == ranks.size else None


def _folders() -> list[Path]:
    return [folder for folder in (_IN_MEMORY, Path(tempfile.gettempdir())) if folder.is_dir()]


def _make(name: str, num_bytes: int) -> None:
    """Make a file where there is room for it, if anywhere."""
    for folder in _folders():
        with contextlib.suppress(OSError):
            if shutil.disk_usage(folder).free > 2 * num_bytes:
                descriptor = os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.truncate(num_bytes)
                    if hasattr(os, "posix_fallocate"):  # or a full disk would end whoever writes
                        os.posix_fallocate(file.fileno(), 0, num_bytes)
                return


def _exchanged(own: bytes, ranks: Ranks) -> list[bytes]:
    """Return what each rank gave, on all of them; all give as much."""
    together = ranks.broadcast(b"".join(ranks.gather(own)))
    size = len(together) // ranks.size
    return [together[i : i + size] for i in range(0, len(together), size)]


class _Shared:
    """A file that several processes map; a byte behind the images says of each whether it is there."""

    def __init__(self, path: Path, bounds: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
        with path.open("r+b") as file:
            self._bytes = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint8)
        self._bounds, self._sizes = bounds, sizes
        self._there = self._bytes[bounds[-1] :]

    def __getitem__(self, index: int) -> Tensor | None:
        return self._view(index) if self._there[index] else None

    def __setitem__(self, index: int, image: Tensor) -> None:
        self._view(index).copy_(image)
        self._there[index] = 1

    def _view(self, index: int) -> Tensor:
        width, height = self._sizes[index]
        pixels = self._bytes[self._bounds[index] : self._bounds[index + 1]]
        return torch.from_numpy(pixels.reshape(height, width, 3)).permute(2, 0, 1)
