"""Parts of a network that stay as they are while the rest learns: stages of the backbone, and batch norms."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from detkit.errors import InvalidValue
from detkit_torchvision.family import ConvPyramid


class Frozen:
    """What of a network is frozen; a frozen norm uses its stored statistics, also while the network trains."""

    def __init__(self, network: nn.Module, *, num_stages: int, norms: bool) -> None:
        """Raises `InvalidValue` where the backbone has fewer than ``num_stages``."""
        known = stages(network) if num_stages else []
        if num_stages > len(known):
            raise InvalidValue("frozen_stages", num_stages, f"this backbone has {len(known)} stages")
        modules = [module for stage in known[:num_stages] for module in stage]
        for module in modules:
            module.requires_grad_(requires_grad=False)
        inside = [part for module in modules for part in module.modules()]
        every = list(network.modules()) if norms else inside
        self._norms = [part for part in every if isinstance(part, nn.BatchNorm2d)]
        for norm in self._norms:
            norm.requires_grad_(requires_grad=False)

    def keep(self) -> None:
        """Undo for frozen norms what ``network.train()`` did; called after it."""
        for norm in self._norms:
            norm.eval()


def train_without_statistics(network: nn.Module) -> None:
    """Put a network into training mode, in which it has losses, without what its batch norms learn from a batch."""
    network.train()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()


def stages(network: Any) -> list[list[nn.Module]]:
    """Return the stages of a network's backbone, from the image on, each as its modules.

    For a ResNet they are the stem and its four layers, as torchvision counts; for a MobileNet or a VGG, what lies
    between two halvings of the picture, and SSD's own layers behind a VGG are none. Ours have a stem and three. A
    network of the user's own that is built otherwise has none.
    """
    backbone: Any = getattr(network, "backbone", None)
    if isinstance(backbone, ConvPyramid):
        return [[backbone.stem], *([stage] for stage in backbone.stages)]
    if isinstance(backbone, BackboneWithFPN):
        parts = dict(backbone.body.named_children())
        if "layer1" in parts:
            layers = [[part] for name, part in parts.items() if name.startswith("layer")]
            return [[part for name, part in parts.items() if not name.startswith("layer")], *layers]
        return _between_halvings(list(parts.values()))
    if not hasattr(backbone, "features"):
        return []
    body = [part for sequence in _sequences(backbone.features) for part in sequence]
    return _between_halvings(body)


def _sequences(features: nn.Sequential) -> list[list[nn.Module]]:
    """Return a backbone's layers; SSDlite's come in two sequences, cut inside of a block."""
    children = list(features.children())
    if all(isinstance(child, nn.Sequential) for child in children) and len(children) == 2:
        return [list(child.children()) for child in children]
    return [children]


def _between_halvings(layers: list[nn.Module]) -> list[list[nn.Module]]:
    starts = [0, *(i for i, layer in enumerate(layers) if i and _halves(layer)), len(layers)]
    return [layers[start:end] for start, end in pairwise(starts)]


def _halves(layer: nn.Module) -> bool:
    """Whether the picture behind a layer has half the side."""
    return any(
        getattr(part, "stride", 1) in (2, (2, 2))
        for part in layer.modules()
        if isinstance(part, nn.Conv2d | nn.MaxPool2d)
    )
