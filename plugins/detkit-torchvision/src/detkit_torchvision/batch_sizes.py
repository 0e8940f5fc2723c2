"""``batch_size=auto``: how many images a step has, by what the device has memory for."""

from __future__ import annotations

import msgspec

from detkit.checkpoints import BATCH_SIZE
from detkit.errors import OutOfMemory
from detkit.files import write_json
from detkit.job import Job, Workspace
from detkit.ranks import Ranks
from detkit_torchvision.devices import describe_device, to_device
from detkit_torchvision.training import Training

LARGEST_AUTO_BATCH = 64
"""What ``batch_size=auto`` chooses at most."""

_LEAST_STEPS = 8
"""Steps of an epoch that it leaves at least."""


def with_batch_size(job: Job, workspace: Workspace, ranks: Ranks) -> Job:
    """Return the job with a number where ``batch_size`` is ``auto``; the same one again where the run goes on.

    It is a power of two, of which an epoch has at least 8. Raises `OutOfMemory` where not one image fits.
    """
    if job.params["batch_size"] != "auto":
        return job
    size = _choose_batch_size(job, workspace, ranks) if ranks.rank == 0 else 0
    return _with_batches_of(job, int(ranks.sum([float(size)])[0]))


def _choose_batch_size(job: Job, workspace: Workspace, ranks: Ranks) -> int:
    chosen = workspace.checkpoints / BATCH_SIZE
    if chosen.is_file():
        return int(msgspec.json.decode(chosen.read_bytes(), type=int))
    probe = Training(_with_batches_of(job, 1), workspace)
    to_device(probe.network, probe.device)
    fits, device = probe.images_that_fit(), describe_device(probe.device)
    if not fits:
        advice = f"choose an image_size below {probe.image_size}, a lighter model, or free memory"
        raise OutOfMemory(1, probe.image_size, device, advice)
    devices = ranks.size if probe.device.type == "cuda" else ranks.size // ranks.place.local_size
    most = min(fits * devices * job.params["grad_accumulation"], LARGEST_AUTO_BATCH, len(probe.data) // _LEAST_STEPS)
    size: int = 1 << (max(most, ranks.size, 1).bit_length() - 1)
    write_json(chosen, size)
    message = f"batch_size {size}: about {fits} images of {probe.image_size} pixels fit on {device}"
    workspace.log("log", {"message": message})
    return size


def _with_batches_of(job: Job, size: int) -> Job:
    return msgspec.structs.replace(job, params={**job.params, "batch_size": size})
