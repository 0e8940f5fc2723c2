"""What changes the weights: optimizers, and the moving average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adadelta": torch.optim.Adadelta,
}

FUSED = {"cpu": ("adam", "adamw"), "cuda": ("sgd", "adam", "adamw")}
"""Those that are taken in one pass over the weights instead of a dozen. This rounds otherwise, so on CPUs it is done
where it pays: for Adam, which is 3 to 5 times as fast so, 3 to 7 % of a small network's step."""


def make_optimizer(network: nn.Module, params: Mapping[str, Any], rate: float) -> torch.optim.Optimizer:
    """Return the optimizer of what a network learns; there is no weight decay on biases and norms."""
    trainable = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": params["weight_decay"]},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    name = params["optimizer"]
    settings: dict[str, Any] = {"momentum": params["momentum"]} if name == "sgd" else {}
    if name in FUSED.get(next(network.parameters()).device.type, ()):
        settings["fused"] = True
    return OPTIMIZERS[name](groups, lr=rate, **settings)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take up a saved state; each tensor is laid out in memory as its weight is.

    Fused optimizers read both from the first number to the last, and torch does not check that they agree.
    """
    optimizer.load_state_dict(saved)
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


class Averaging:
    """Moves one network's weights and statistics towards another's; both keep their tensors."""

    def __init__(self, average: nn.Module, network: nn.Module) -> None:
        pairs = list(zip(average.state_dict().values(), network.state_dict().values(), strict=True))
        self._means, self._values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def move(self, share: float) -> None:
        """Move by a share of the way; counts are copied."""
        torch._foreach_lerp_(self._means, self._values, share)
        for kept, own in self._counts:
            kept.copy_(own)
