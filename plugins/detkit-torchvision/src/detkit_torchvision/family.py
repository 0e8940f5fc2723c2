"""Our own small networks, built of torchvision's parts to learn from scratch on a CPU."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.misc import Conv2dNormActivation

from detkit_torchvision.alignment import AlignedFCOS
from detkit_torchvision.spec import Settings, Spec

if TYPE_CHECKING:
    from collections.abc import Mapping


class ConvPyramid(nn.Module):
    """A plain convolutional network with a feature pyramid on its strides 8, 16 and 32."""

    def __init__(self, width: int, *, out_channels: int = 64) -> None:
        super().__init__()
        self.out_channels = out_channels
        block = partial(Conv2dNormActivation, kernel_size=3)
        self.stem = nn.Sequential(
            block(3, width, stride=2),
            block(width, 2 * width, stride=2),
            block(2 * width, 2 * width),
        )
        channels = [2 * width, 4 * width, 8 * width, 8 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(block(before, after, stride=2), block(after, after)) for before, after in pairwise(channels)
        )
        self.pyramid = FeaturePyramidNetwork(channels[1:], out_channels, norm_layer=nn.BatchNorm2d)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        levels = OrderedDict[str, Tensor]()
        for index, stage in enumerate(self.stages):
            x = levels[str(index)] = stage(x)
        merged: dict[str, Tensor] = self.pyramid(levels)
        return merged


def _small_ssd(width: int, settings: Settings) -> SSD:
    num_outputs = settings.num_outputs
    backbone = ConvPyramid(width)
    # Sides are fractions of the picture; the fourth only bounds the third level's intermediate box.
    boxes = DefaultBoxGenerator([[2], [2, 3], [2, 3]], scales=[0.12, 0.25, 0.5, 0.9])
    num_boxes = boxes.num_anchors_per_location()
    head = SSDHead([backbone.out_channels] * len(num_boxes), num_boxes, num_outputs)
    # Nearly every box is background. Saying so at the start, as focal loss does, took AP50 after 400 iterations on the
    # shapes from .73 to .94.
    for conv in head.classification_head.module_list:
        nn.init.normal_(conv.weight, std=0.01)
        bias = torch.zeros(len(conv.bias) // num_outputs, num_outputs)
        bias[:, 0] = math.log(99 * (num_outputs - 1))
        conv.bias.data.copy_(bias.flatten())
    for conv in head.regression_head.module_list:
        nn.init.normal_(conv.weight, std=0.01)
    return SSD(
        backbone,
        boxes,
        (settings.image_size, settings.image_size),
        num_outputs,
        head=head,
        score_thresh=settings.score_threshold,
        nms_thresh=settings.nms_threshold,
        detections_per_img=settings.max_detections,
        topk_candidates=max(400, settings.max_detections),
    )


def _small_fcos(width: int, settings: Settings) -> AlignedFCOS:
    backbone = ConvPyramid(width)
    # An anchor's size is the unit of its point's distances to the sides of a box. It grows with the picture, so that
    # the distances to learn do not. Sizes are even because AnchorGenerator rounds the halves.
    finest = 2 * max(1, round(settings.image_size / 80))
    anchors = AnchorGenerator(tuple((finest * 2**level,) for level in range(3)), ((1.0,),) * 3)
    head = FCOSHead(backbone.out_channels, 1, settings.num_outputs, num_convs=2)
    # torchvision clips distances with a ReLU: begun at 0 half of them would have no gradient.
    nn.init.constant_(head.regression_head.bbox_reg.bias, 3.0)
    return AlignedFCOS(
        backbone,
        settings.num_outputs,
        anchor_generator=anchors,
        head=head,
        score_thresh=settings.score_threshold,
        nms_thresh=settings.nms_threshold,
        detections_per_img=settings.max_detections,
        topk_candidates=max(1000, settings.max_detections),
    )


FAMILY: Mapping[str, Spec] = {
    "ssd_tiny": Spec(partial(_small_ssd, 16), image_size=160, label_offset=1, nms_threshold=0.45),
    "fcos_tiny": Spec(partial(_small_fcos, 16), image_size=160, label_offset=0, nms_threshold=0.6),
    "fcos_small": Spec(partial(_small_fcos, 32), image_size=192, label_offset=0, nms_threshold=0.6),
}
