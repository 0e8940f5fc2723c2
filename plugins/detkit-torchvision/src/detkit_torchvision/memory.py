"""How many images a training step has memory for."""

from __future__ import annotations

from typing import Any

import msgspec
import psutil
import torch

from detkit.files import write_json
from detkit.job import Job, Workspace
from detkit_torchvision.batches import CGROUP_LIMIT, Inputs, load_batch
from detkit_torchvision.devices import choose_device, describe_device, to_device
from detkit_torchvision.models import MODELS, build, input_size

MOST = 64
"""The largest batch that ``auto`` chooses."""

_LEAST_STEPS = 8
"""Steps of an epoch that ``auto`` leaves at least."""

_SHARE = 0.8
"""Share of the free memory that a step may take."""

_OVERHEAD = 2.0
"""What a step takes in all, over the tensors that it keeps for the backward pass: gradients of them, and workspaces."""


def with_batch_size(job: Job, workspace: Workspace) -> Job:
    """Return the job with a number where ``batch_size`` is ``auto``; the same one again where the run goes on."""
    if job.params["batch_size"] != "auto":
        return job
    chosen = workspace.checkpoints / "batch_size.json"
    if chosen.is_file():
        size = msgspec.json.decode(chosen.read_bytes(), type=int)
    else:
        data = workspace.dataset("train")
        assert data is not None
        device = choose_device(job.options["device"])
        image_size = input_size(job.params["image_size"], job.model, data)
        network: Any = build(job.model, len(job.classes), image_size=image_size)
        to_device(network, device)
        inputs = Inputs(data, job.model, image_size, 0)
        fits = images_that_fit(network, inputs, MODELS[job.model].label_offset, device)
        bound = max(1, min(fits * job.params["grad_accumulation"], MOST, len(data) // _LEAST_STEPS))
        size = 1 << (bound.bit_length() - 1)
        write_json(chosen, size)
        message = f"batch_size {size}: about {fits} images of {image_size} pixels fit on {describe_device(device)}"
        workspace.log("log", {"message": message})
    return msgspec.structs.replace(job, params={**job.params, "batch_size": size})


def images_that_fit(network: Any, inputs: Inputs, label_offset: int, device: torch.device) -> int:
    """Return about how many images one pass has memory for, by what the pass of one keeps for its backward pass.

    The image with the most pixels is that one. Raises what torch does where not even that one fits.
    """
    largest = max(range(len(inputs.sizes)), key=lambda index: inputs.sizes[index][0] * inputs.sizes[index][1])
    batch = load_batch(inputs, [largest], seeds=[[0]], label_offset=label_offset, augmentations=())
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    was_training = network.training
    network.train()
    norms = [part for part in network.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()  # this pass is none of training
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    targets = [{name: value.to(device) for name, value in target.items()} for target in batch.targets]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = network(batch.images, targets)
    del losses
    network.train(was_training)
    activations = sum(size for place, size in kept.items() if place not in own)
    return int(_SHARE * free_memory(device) / (_OVERHEAD * activations))


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device; of a container's memory, those that its limit leaves."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        available = min(available, int(limit) - psutil.Process().memory_info().rss)
    return max(0, available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or Python, could not get the memory that it asked for."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )
