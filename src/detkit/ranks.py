"""Processes that train one model together: which one this is, what it has of a batch, and how they agree.

They are started by ``torchrun``, whose environment variables say which is which
(https://pytorch.org/docs/stable/elastic/run.html#environment-variables). Rank 0 alone writes events, checkpoints and
the model. detkit pickles nothing between them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np

from detkit.errors import DetkitError

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE",
)  # fmt: skip
"""What torchrun sets for the processes that it starts; a worker that it did not start must not see them."""

LAUNCHER = "DETKIT_LAUNCHER"
"""The environment variable in which `detkit.launching.launch` tells its workers its process number."""

LOAD_BEFORE = "DETKIT_LOAD_BEFORE"
"""The environment variable with the machine's load before processes started that measure how many of them train."""

ALONE_THREADS = "DETKIT_ALONE_THREADS"
"""The environment variable in which these are told how many threads torch gives one process here."""

_PR_SET_PDEATHSIG = 1
"""Of ``linux/prctl.h``: the signal that a process gets when the one that started it ends."""


class RankLost(DetkitError):
    """A process that trains with this one is gone, or no longer reachable."""

    exit_code = 3


class Place(NamedTuple):
    """Which of the processes this one is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of this machine; the number of its GPU."""
    local_size: int = 1
    restarts: int = 0
    """How often torchrun has started them all again."""
    max_restarts: int = 0
    launched: bool = False
    """Whether torchrun started this process."""

    @classmethod
    def here(cls, variables: Mapping[str, str] = os.environ) -> Place:
        """Read what torchrun says; alone where it did not start this process."""
        if "TORCHELASTIC_RUN_ID" not in variables:
            return cls()
        restarts, max_restarts = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", restarts, max_restarts)
        rank, size, local_rank, local_size, before, most = (int(variables[name]) for name in names)
        return cls(rank, size, local_rank, local_size, before, most, launched=True)


class TrainsAlone(Exception):
    """One process trains faster than these together, which have said so to `detkit.launching`; all of them end."""


class Ranks(ABC):
    """All processes of a training. Every method is called by all of them, in the same order.

    Raises `RankLost` where another one is gone.
    """

    place: Place

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.size

    @abstractmethod
    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all ranks, the same to the last bit on each."""

    @abstractmethod
    def gather(self, part: bytes) -> list[bytes]:
        """Return each rank's part, in order, on rank 0; nothing on the others."""

    @abstractmethod
    def broadcast(self, whole: bytes) -> bytes:
        """Return what rank 0 gave."""

    def leave(self) -> None:
        """Wait until rank 0 has all that it needs of the others; one that ends before could take it along."""
        self.broadcast(b"")

    def lost(self) -> Lost:
        """Return a context in which an error of the network between the ranks becomes `RankLost`."""
        return Lost(self.place)

    def mine(self, num_images: int) -> range:
        """Return the images that this rank has of so many; together they have each once."""
        return range(self.rank, num_images, self.size)

    def shares(self, num_images: int, num_passes: int) -> list[tuple[list[int], float]]:
        """Return, for each pass over a batch, the rows of the batch that this rank has and their share of the batch.

        The passes of all ranks together have each row once, in the order in which one process with ``size`` times as
        many passes would have them. A rank that a small batch leaves without a row takes one with a share of 0.
        """
        found = []
        for rows in np.array_split(np.arange(num_images), num_passes):
            own = np.array_split(rows, self.size)[self.rank].tolist()
            found.append((own or rows[:1].tolist(), len(own) / num_images))
        return found


class Alone(Ranks):
    """One process."""

    place = Place()

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather(self, part: bytes) -> list[bytes]:
        return [part]

    def broadcast(self, whole: bytes) -> bytes:
        return whole


class TorchRanks(Ranks):
    """The ranks of a ``torch.distributed`` process group, which this makes: gloo, and NCCL between GPUs."""

    joined: ClassVar[bool] = False
    """Whether this process has met the others: what goes wrong before is no failure of a run."""

    def __init__(self, *, cuda: bool) -> None:
        import torch

        self.place = Place.here()
        self._torch = torch
        place, distributed = self.place, cast("Any", torch.distributed)
        with self.lost():
            store, _, _ = next(distributed.rendezvous("env://"))
            # torchrun may keep its store for all attempts, and in it where the processes of an earlier one were.
            own = distributed.PrefixStore(f"detkit/{place.restarts}", store)
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            distributed.init_process_group(backend, store=own, rank=place.rank, world_size=place.size)
        TorchRanks.joined = True

    def sum(self, values: Sequence[float]) -> list[float]:
        tensor = self._torch.tensor(values, dtype=self._torch.float64)
        with self.lost():
            self._torch.distributed.all_reduce(tensor)
        found: list[float] = tensor.tolist()
        return found

    def gather(self, part: bytes) -> list[bytes]:
        torch, sizes = self._torch, self._sizes(len(part))
        mine = self._padded(part, max(sizes))
        theirs = [torch.empty_like(mine) for _ in sizes] if self.rank == 0 else None
        with self.lost():
            torch.distributed.gather(mine, theirs)
        return [one[:size].numpy().tobytes() for one, size in zip(theirs or [], sizes, strict=False)]

    def broadcast(self, whole: bytes) -> bytes:
        size = self._sizes(len(whole))[0]
        tensor = self._padded(whole if self.rank == 0 else b"", size)
        with self.lost():
            self._torch.distributed.broadcast(tensor, 0)
        return bytes(tensor[:size].numpy().tobytes())

    def _sizes(self, size: int) -> list[int]:
        sizes = [0.0] * self.size
        sizes[self.rank] = float(size)
        return [int(one) for one in self.sum(sizes)]

    def _padded(self, part: bytes, size: int) -> Any:
        tensor = self._torch.zeros(max(1, size), dtype=self._torch.uint8)
        if part:
            tensor[: len(part)] = self._torch.frombuffer(bytearray(part), dtype=self._torch.uint8)
        return tensor


class Lost:
    """A context in which torch's errors of a network between ranks become `RankLost`."""

    _SIGNS = ("gloo", "NCCL", "Connection closed", "Connection reset", "connection was", "TCPStore", "Broken pipe")

    def __init__(self, place: Place) -> None:
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, RuntimeError) and self._place.size > 1 and any(sign in str(error) for sign in self._SIGNS):
            raise RankLost(
                f"another of the {self._place.size} processes that train together is gone, or cannot be reached any "
                f"more (noticed by process {self._place.rank}: {str(error).splitlines()[0]})"
            ) from error


def end_with_the_launcher() -> None:
    """Let the system end this process when torchrun, which started it in a group of its own, is gone; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):  # it was gone before
            print("torchrun, which started this worker, is gone", file=sys.stderr, flush=True)
            os._exit(1)
