"""Which way of taking a step is fastest here, and how many processes: a few in each, by turns, before training begins.

Ways differ in what changes the last bits of a result and nothing else, and in its precision where that may be chosen.
A way is kept beside the checkpoints, so that a run that goes on does so in the same way, and in
``$DETKIT_CACHE/steps``, by default under ``~/.cache/detkit``, for the next run of its kind on this machine. So is the
number of processes, which changes results as a smaller batch does: batch norms see the images of one of them.
"""

from __future__ import annotations

import copy
import hashlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import msgspec
import torch
import torchvision

from detkit.checkpoints import PROCESSES, STEP
from detkit.errors import Stopped, StorageError
from detkit.files import cache_folder, write_json
from detkit.launching import LEAST_IMAGES
from detkit.loading import count_cores
from detkit.ranks import ALONE_THREADS, TrainsAlone
from detkit_torchvision.devices import (
    CHANNELS_LAST,
    CONTIGUOUS,
    business,
    describe_device,
    describe_processor,
    to_device,
)
from detkit_torchvision.distributed import Shared
from detkit_torchvision.optimizers import make_optimizer

if TYPE_CHECKING:
    from detkit_torchvision.batches import Batch
    from detkit_torchvision.training import Training

FoundT = TypeVar("FoundT", "Choice", "Together")

ROUNDS = 3
"""Timed steps in each way; one more before them is not timed."""

LEAST_GAIN = 0.05
"""Share of the time that another way must save: less lies within the noise of so few steps."""


class Way(msgspec.Struct, frozen=True):
    """How a step is taken."""

    layout: str
    """`CHANNELS_LAST` or `CONTIGUOUS`."""
    threads: int
    amp: str | None

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.layout}, {threads}, {self.amp or 'float32'}"


class Choice(msgspec.Struct, frozen=True):
    """The way that was fastest, and how many times as fast as the default."""

    way: Way
    speedup: float


class Together(msgspec.Struct, frozen=True):
    """How many times as fast as one process several were."""

    speedup: float


def default_way(amp: str | None, device: torch.device) -> Way:
    """Return the way of a run that measures nothing; ``amp=auto`` is bf16 on GPUs that have it."""
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else None
    return Way(CHANNELS_LAST, torch.get_num_threads(), amp)


Losses: TypeAlias = "Callable[[Any, Batch, Sequence[int], Way], Mapping[str, torch.Tensor]]"
"""Gives the losses of a network on some rows of a batch, taken in a way."""


def choose_way(training: Training, losses: Losses) -> Way:
    """Return the way in which a run is to take its steps, and say so where it was asked to measure.

    Nothing of the run is changed: not its weights and statistics, and not torch's random numbers.
    """
    options, default = training.job.options, training.way
    kept = training.workspace.checkpoints / STEP
    whole = training.ranks.broadcast(kept.read_bytes() if training.ranks.rank == 0 and kept.is_file() else b"")
    if whole:
        way = msgspec.json.decode(whole, type=Way)
        keeps_threads = options["threads"] == "auto" and training.ranks.size == 1
        return way if keeps_threads else msgspec.structs.replace(way, threads=default.threads)
    if options["tune_step"] == "off" or training.resumes:
        return default
    reason = "several processes take it" if training.ranks.size > 1 else business()
    if reason is not None:
        training.say(f"tune_step=auto measures nothing, as {reason}; a step is taken as by default: {default}")
        return default
    known = _known(training)
    choice = None if known is None else _read(known, Choice)
    told = "measured before"
    if choice is None:
        choice, told = _measured(training, losses), "measured now"
        if known is not None:
            _keep(known, choice)
    write_json(kept, choice.way)
    gain = "nothing else was faster" if choice.way == default else f"{choice.speedup:.2f} times as fast as {default}"
    training.say(f"tune_step=auto: {choice.way}; {gain}, {told}")
    return choice.way


def choose_processes(training: Training, losses: Losses) -> None:
    """Return where these processes are to train together, which is chosen as `choose_way` does; all of them call it.

    Raises `TrainsAlone` in all of them where one process with all of their threads is to train.
    """
    ranks = training.ranks
    if training.job.options["processes"] != "auto":
        return
    kept = training.workspace.checkpoints / PROCESSES
    if ranks.size == 1:
        if not kept.is_file():
            several = f"several need device=cpu, a core each, and {LEAST_IMAGES} images of a pass each"
            training.say(f"processes=auto: one process trains, on {training.device}; {several}")
            write_json(kept, 1)
        return

    def agreed(count: Callable[[], int]) -> int:
        return int(ranks.sum([float(count() if ranks.rank == 0 else 0)])[0])

    count = agreed(lambda: _remembered(training))
    if not count:
        speedup = _speedup(training, losses)
        count = agreed(lambda: _judged(training, Together(speedup)))
    if count == 1:
        ranks.leave()
        raise TrainsAlone


def _remembered(training: Training) -> int:
    """Return how many processes train where nothing is to be measured for it, else 0."""
    kept = training.workspace.checkpoints / PROCESSES
    if kept.is_file():
        return msgspec.json.decode(kept.read_bytes(), type=int)
    if training.ranks.place.restarts:
        training.say("processes=auto: one process trains, as one of several was lost while they measured")
        write_json(kept, 1)
        return 1
    known = _known(training, *_tried(training))
    if known is not None and (found := _read(known, Together)) is not None:
        return _decided(training, found, "measured before")
    if (reason := business()) is not None:
        training.say(f"processes=auto measures nothing, as {reason}; one process trains")
        write_json(kept, 1)
        return 1
    return 0


def _judged(training: Training, found: Together) -> int:
    known = _known(training, *_tried(training))
    if known is not None:
        _keep(known, found)
    return _decided(training, found, "measured now")


def _tried(training: Training) -> tuple[Any, ...]:
    """Return what the speed of these processes depends on, beside what that of one does."""
    return training.ranks.size, _alone(training), training.job.options["compress_gradients"]


def _alone(training: Training) -> Way:
    """Return the way in which one process would take a step."""
    threads = training.job.options["threads"]
    if threads == "auto":
        threads = int(os.environ.get(ALONE_THREADS) or count_cores())
    return msgspec.structs.replace(training.way, threads=threads)


def _decided(training: Training, found: Together, told: str) -> int:
    tried = training.ranks.size
    count = tried if found.speedup >= 1 / (1 - LEAST_GAIN) else 1
    who = "one process trains" if count == 1 else f"{count} processes train"
    training.say(f"processes=auto: {who}; {tried} are {found.speedup:.2f} times as fast as one, {told}")
    write_json(training.workspace.checkpoints / PROCESSES, count)
    return count


def _speedup(training: Training, losses: Losses) -> float:
    """Return how many times as fast as one process, which then has all images of a pass, these processes are.

    A step is a pass forward and back, and the optimizer's. Raises `Stopped` in all of them where one was asked to stop.
    """
    ranks, way, alone = training.ranks, training.way, _alone(training)
    batch = next(training.batches())
    own = list(range(min(training.images_per_pass, len(batch.indices))))
    training.network.train()
    training.frozen.keep()
    # Two copies on rank 0: gradients of one that is shared would wait for those of the others.
    mine, *single = (copy.deepcopy(training.network) for _ in range(2 if ranks.rank == 0 else 1))
    optimizers = {network: make_optimizer(network, training.params, 0.0) for network in (mine, *single)}
    compression = training.job.options["compress_gradients"]
    shared = Shared(mine, ranks, compression, may_be_unused=training.params.get("modify") is not None)

    def take(call: Any, network: Any, rows: list[int], way: Way) -> None:
        torch.set_num_threads(way.threads)
        torch.manual_seed(training.step_seed())
        torch.stack(list(losses(call, batch, rows, way).values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizers[network].step()
        optimizers[network].zero_grad()

    def agree() -> None:
        if ranks.sum([float(training.workspace.stop_requested)])[0]:
            raise Stopped

    seconds: dict[bool, list[float]] = {True: [], False: []}
    try:
        with torch.random.fork_rng([]):
            for _ in range(1 + ROUNDS):
                for together in (True, False):
                    agree()
                    started = time.perf_counter()
                    if together:
                        take(shared, mine, own, way)
                    else:
                        for network in single:
                            take(network, network, own * ranks.size, alone)
                    agree()
                    seconds[together].append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(way.threads)
    return statistics.median(seconds[False][1:]) / statistics.median(seconds[True][1:])


def fastest(default: Way, axes: Mapping[str, Sequence[Any]], take: Callable[[Way], object]) -> Choice:
    """Return the fastest way, looked for along one axis after the other.

    ``axes`` are the values that each of a way's fields may have; ``take`` takes a step.
    """
    best, speedup = default, 1.0
    for name, values in axes.items():
        ways = [best, *(msgspec.structs.replace(best, **{name: value}) for value in values)]
        ways = list(dict.fromkeys(ways))
        seconds: dict[Way, list[float]] = {way: [] for way in ways}
        for way in ways:
            take(way)
        for _ in range(ROUNDS):
            for way in ways:
                started = time.perf_counter()
                take(way)
                seconds[way].append(time.perf_counter() - started)
        medians = {way: statistics.median(one) for way, one in seconds.items()}
        quickest = min(ways, key=medians.__getitem__)
        if medians[quickest] <= (1 - LEAST_GAIN) * medians[best]:
            best, speedup = quickest, speedup * medians[best] / medians[quickest]
    return Choice(best, speedup)


def _measured(training: Training, losses: Losses) -> Choice:
    device, default = training.device, training.way
    batch = next(training.batches())
    rows = range(min(training.images_per_pass, len(batch.indices)))
    training.network.train()
    training.frozen.keep()
    copies: dict[str, Any] = {}
    for layout in (CHANNELS_LAST, CONTIGUOUS):
        copies[layout] = copy.deepcopy(training.network)
        to_device(copies[layout], device, layout)

    def step(way: Way) -> None:
        torch.set_num_threads(way.threads)
        torch.manual_seed(training.step_seed())  # two-stage detectors sample what they learn from
        network = copies[way.layout]
        torch.stack(list(losses(network, batch, rows, way).values())).sum().backward()  # type: ignore[no-untyped-call]
        network.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return fastest(default, _axes(training), step)
    finally:
        torch.set_num_threads(default.threads)


def _axes(training: Training) -> dict[str, Sequence[Any]]:
    axes: dict[str, Sequence[Any]] = {"layout": (CHANNELS_LAST, CONTIGUOUS)}
    if training.device.type == "cpu" and training.job.options["threads"] == "auto":
        axes["threads"] = sorted({1, max(1, training.way.threads // 2), training.way.threads})
    if training.params["amp"] == "auto":
        axes["amp"] = (None, "bf16")
    return axes


def _known(training: Training, *also: Any) -> Path | None:
    """Return the file for the choice of runs like this one, in what it depends on ``also``; None where none is kept."""
    folder = cache_folder()
    if folder is None or training.params.get("modify") is not None:  # whose code may change
        return None
    key = [
        *(training.job.model, len(training.job.classes), training.image_size, training.images_per_pass),
        *(training.architecture.native(), training.params["frozen_stages"], training.params["batch_norm"]),
        *(_axes(training), msgspec.to_builtins(training.way), *also),
        *(describe_device(training.device), describe_processor(), str(torch.__version__), torchvision.__version__),
    ]
    return folder / "steps" / f"{hashlib.sha256(msgspec.json.encode(key)).hexdigest()[:40]}.json"


def _read(file: Path, kind: type[FoundT]) -> FoundT | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def _keep(file: Path, choice: Choice | Together) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(file, choice)
    except (OSError, StorageError):
        return  # a full disk: it is measured again
