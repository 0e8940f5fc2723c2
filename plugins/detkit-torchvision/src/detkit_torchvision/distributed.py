"""One network in several processes: gradients averaged over the batch, statistics, and detections put together."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from detkit.detections import Detections
from detkit.job import Job
from detkit.loading import count_cores
from detkit.ranks import Alone, Place, Ranks, TorchRanks
from detkit_torchvision.devices import choose_device

HOOKS = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
"""What ``compress_gradients`` names."""


def device_of(job: Job) -> torch.device:
    """Return the device of this process. Raises `UsageError` for one that is not there."""
    place, options = Place.here(), job.options
    if options["gpus"] is not None:
        return choose_device(f"cuda:{place.local_rank}")
    on_cpu = options["processes"] != 1 and (options["processes"] != "auto" or place.size > 1)
    return choose_device("cpu" if on_cpu else options["device"])


def threads_of(job: Job, place: Place) -> int | str:
    """Return the threads of this process's step, or ``auto``; processes of one machine share its cores."""
    threads: int | str = job.options["threads"]
    return max(1, count_cores() // place.local_size) if threads == "auto" and place.local_size > 1 else threads


def join(device: torch.device) -> Ranks:
    """Return the processes that torchrun started with this one, which meet here; `Alone` where it started none."""
    if Place.here().size > 1 and device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    return TorchRanks(cuda=device.type == "cuda") if Place.here().size > 1 else Alone()


class Shared:
    """A network whose gradients are those of all ranks' images; called as the network is."""

    def __init__(self, network: nn.Module, ranks: Ranks, compression: str, *, may_be_unused: bool) -> None:
        """``may_be_unused`` says that some of the parameters may have no part in the losses."""
        self._network, self._compression = network, compression
        self._parallel: DistributedDataParallel | None = None
        if ranks.size > 1:
            # Statistics are averaged where they are needed, see `average_statistics`; torch would send those of rank 0.
            new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
            own: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
            with ranks.lost():
                self._parallel = DistributedDataParallel(network, find_unused_parameters=may_be_unused, **own)
            if compression != "none":
                self._parallel.register_comm_hook(None, HOOKS[compression])

    def __call__(self, *inputs: Any) -> Any:
        network: Any = self._parallel or self._network
        return network(*inputs)

    def last_pass(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Return a context for a pass over a part of the batch: gradients are exchanged in the last one."""
        found: contextlib.AbstractContextManager[None] = (
            contextlib.nullcontext() if is_last or self._parallel is None else self._parallel.no_sync()
        )
        return found

    def waited_s(self, steps: int) -> float:
        """Return about how long so many backward passes waited for the network; torch measures some of them."""
        if self._parallel is None:
            return 0.0
        known = self._parallel._get_ddp_logging_data()  # type: ignore[no-untyped-call]
        comm, overlap = (known.get(f"avg_backward_{name}_time", 0) for name in ("comm", "compute_comm_overlap"))
        return float(max(0, comm - overlap)) / 1e9 * steps

    @property
    def bytes_per_step(self) -> int:
        """Bytes of gradients that this rank gives to the others in a step."""
        if self._parallel is None:
            return 0
        trained = [one for one in self._network.parameters() if one.requires_grad]
        return sum(one.numel() * (one.element_size() if self._compression == "none" else 2) for one in trained)


@torch.no_grad()
def average_statistics(networks: Sequence[nn.Module | None], ranks: Ranks) -> None:
    """Give all ranks the mean of the statistics that their batch norms took, each of its own images.

    They are moving averages, which are linear, so the mean now is what the mean after every step would have been.
    """
    if ranks.size == 1:
        return
    found = [
        buffer
        for network in networks
        if network is not None
        for module in network.modules()
        if isinstance(module, _NormBase)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not found:
        return
    flat = torch.cat([buffer.flatten() for buffer in found]).cpu()
    with ranks.lost():
        torch.distributed.all_reduce(flat)
    flat /= ranks.size
    for buffer, mean in zip(found, torch.split(flat, [buffer.numel() for buffer in found]), strict=True):
        buffer.copy_(mean.view_as(buffer))


class _Found(msgspec.Struct, array_like=True):
    """Detections on one image as they travel: arrays as their bytes, so that nothing of a number is lost."""

    index: int
    boxes: bytes
    labels: bytes
    scores: bytes
    masks: list[Any] | None
    width: int
    height: int


def merged(found: Mapping[int, Detections], ranks: Ranks, classes: Sequence[str]) -> list[Detections]:
    """Return the detections on all images in order, of which each rank has some by number; only rank 0 has them all."""
    if ranks.size == 1:
        return [found[index] for index in sorted(found)]
    part = [
        _Found(
            index,
            one.boxes.tobytes(),
            one.labels.astype(np.int64).tobytes(),
            one.scores.tobytes(),
            None if one.masks is None else list(one.masks),
            one.width,
            one.height,
        )
        for index, one in found.items()
    ]
    parts = ranks.gather(msgspec.msgpack.encode(part))
    everything = [one for each in parts for one in msgspec.msgpack.decode(each, type=list[_Found])]
    return [
        Detections(
            path="",
            width=one.width,
            height=one.height,
            classes=tuple(classes),
            boxes=np.frombuffer(one.boxes).reshape(-1, 4),
            labels=np.frombuffer(one.labels, dtype=np.int64),
            scores=np.frombuffer(one.scores),
            masks=None if one.masks is None else tuple(one.masks),
        )
        for one in sorted(everything, key=lambda one: one.index)
    ]


def summed(values: Mapping[str, float], ranks: Ranks) -> dict[str, float]:
    """Return the sums over all ranks by name, of which a rank may lack some, on rank 0."""
    if ranks.size == 1:
        return dict(values)
    sums: dict[str, float] = {}
    for part in ranks.gather(msgspec.msgpack.encode(values)):
        for name, value in msgspec.msgpack.decode(part, type=dict[str, float]).items():
            sums[name] = sums.get(name, 0.0) + value
    return sums
