"""How much memory training takes, and how much there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from detkit_torchvision.batches import CGROUP_LIMIT
from detkit_torchvision.freezing import train_without_statistics

_SHARE = 0.8
"""Share of the free memory that a pass may take."""

_OVERHEAD = 2.0
"""What a pass takes in all, over the tensors that it keeps for the backward pass: gradients of them, and workspaces."""

_MESSAGES = ("allocate memory", "out of memory", "ALLOC_FAILED")
"""What torch's errors say of it: its CPU allocator, CUDA, and cuBLAS."""

_NO_KERNEL = "could not create a primitive"
"""All that oneDNN says where it has no memory for a kernel; of what it cannot do it says more."""


def kept_for_backward(network: Any, run: Callable[[], object]) -> int:
    """Return the bytes that a training pass keeps for its backward pass, 0 where there is no memory for it.

    ``run`` takes the pass; the network's statistics and its mode stay.
    """
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    was_training = network.training
    train_without_statistics(network)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return 0
    finally:
        network.train(was_training)
    return sum(size for place, size in kept.items() if place not in own)


def how_many(kept: float, device: torch.device) -> int:
    """Return how many images fit that keep so many bytes each; 0 where ``kept`` is, as it could not be measured."""
    return int(_SHARE * free_memory(device) / (_OVERHEAD * kept)) if kept else 0


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device; of a container's memory, those that its limit leaves."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    available = int(psutil.virtual_memory().available)
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        available = min(available, int(limit) - psutil.Process().memory_info().rss)
    return max(0, available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or Python, could not get the memory that it asked for."""
    said = str(error).strip()
    return isinstance(error, MemoryError) or said == _NO_KERNEL or any(message in said for message in _MESSAGES)
