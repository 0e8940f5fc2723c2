"""Networks as graphs: modules of tensors only, which can be exported with any number of images of any size.

torchvision's own detectors take lists of images and go through their results one by one, which no exporter follows.
These take their parts, and give what a reader of exported graphs expects (`detkit.graphs`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign

from detkit_torchvision.graphs.one_stage import FcosGraph, RetinaNetGraph, SsdGraph
from detkit_torchvision.graphs.two_stage import RcnnGraph


def graph_of(network: Any, example: Tensor) -> nn.Module | None:
    """Return the graph of a network in evaluation mode, or None for one that torchvision does not run as its own.

    ``example`` are images as the graph will get them, with their sides in proportion where sizes are free.
    """
    graph: nn.Module
    if _runs_as(network, SSD):
        graph = SsdGraph(network, example)
    elif _runs_as(network, RetinaNet) and _grid(network):
        graph = RetinaNetGraph(network)
    elif _runs_as(network, FCOS) and _grid(network):
        graph = FcosGraph(network)
    elif _runs_as_rcnn(network):
        graph = RcnnGraph(network, example)
    else:
        return None
    return graph.eval().requires_grad_(False)


def _runs_as(network: Any, kind: type[nn.Module]) -> bool:
    own = ("forward", "postprocess_detections")
    return isinstance(network, kind) and all(getattr(type(network), n) is getattr(kind, n) for n in own)


def _grid(owner: Any) -> bool:
    return type(owner.anchor_generator) is AnchorGenerator


def _runs_as_rcnn(network: Any) -> bool:
    if not isinstance(network, GeneralizedRCNN) or type(network).forward is not GeneralizedRCNN.forward:
        return False
    heads = network.roi_heads
    if type(network.rpn) is not RegionProposalNetwork or type(heads) is not RoIHeads or heads.has_keypoint():
        return False
    pools = [heads.box_roi_pool, *([heads.mask_roi_pool] if heads.has_mask() else [])]
    return _grid(network.rpn) and all(type(pool) is MultiScaleRoIAlign for pool in pools)
