"""torchvision's detectors on feature pyramids, put together as its constructors do, of any backbone and anchors."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torchvision.models import ResNet, get_model
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _mobilenet_extractor, _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNConvFCHead
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detkit_torchvision.spec import Settings

SIZES = (32, 64, 128, 256, 512)
RATIOS = (0.5, 1.0, 2.0)
"""torchvision's anchors: sides in pixels of the input, and height over width."""

_TRAIN_PROPOSALS = 2000
"""torchvision's number while training, before and after NMS."""

_RESNET_STAGES, _MOBILENET_STAGES = 5, 6

# The stages of a ResNet and of a MobileNet that a pyramid begins with, by their strides. Light R-CNNs take the last two
# of a MobileNet, both of stride 32, and strides 16 and 32 of a ResNet.
_FROM_4, _FROM_8, _LIGHT = ([1, 2, 3, 4], [1, 2, 3, 5]), ([2, 3, 4], [2, 3, 5]), ([3, 4], [4, 5])


def rcnn(settings: Settings, *, own: str, proposals: int, improved: bool = False, masks: bool = False) -> FasterRCNN:
    """Faster R-CNN or Mask R-CNN; ``improved`` is the second version, ``proposals`` torchvision's number at test time.

    Those whose own backbone is a MobileNet have two levels and a pooled one; each has all sizes of anchors.
    """
    light = own.startswith("mobilenet")
    backbone = _pyramid(settings, own, _LIGHT if light else _FROM_4, norm_layer=nn.BatchNorm2d if improved else None)
    sizes = settings.architecture.anchor_sizes or SIZES
    anchors = _anchors(settings, [sizes] * 3 if light else [(size,) for size in sizes])
    chosen = settings.architecture.proposals
    # Detections cannot outnumber proposals, and the 320 model has few of them.
    at_test = max(proposals if chosen is None else chosen, settings.max_detections)
    parts: dict[str, Any] = {"rpn_score_thresh": 0.05} if light else {}
    if improved:
        channels, convolutions = backbone.out_channels, [256, 256, 256, 256]
        parts["rpn_head"] = RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2)
        parts["box_head"] = FastRCNNConvFCHead((channels, 7, 7), convolutions, [1024], norm_layer=nn.BatchNorm2d)
        if masks:
            parts["mask_head"] = MaskRCNNHeads(channels, convolutions, 1, norm_layer=nn.BatchNorm2d)
    return (MaskRCNN if masks else FasterRCNN)(
        backbone,
        num_classes=settings.num_outputs,
        rpn_anchor_generator=anchors,
        box_score_thresh=settings.score_threshold,
        box_nms_thresh=settings.nms_threshold,
        box_detections_per_img=settings.max_detections,
        rpn_pre_nms_top_n_test=at_test,
        rpn_post_nms_top_n_test=at_test,
        rpn_pre_nms_top_n_train=max(_TRAIN_PROPOSALS, chosen or 0),
        rpn_post_nms_top_n_train=max(_TRAIN_PROPOSALS, chosen or 0),
        **parts,
    )


def retinanet(settings: Settings, *, own: str, improved: bool = False) -> RetinaNet:
    """RetinaNet, whose anchors come in three scales an octave; ``improved`` is the second version."""
    # The first version makes its sixth level of the pyramid's fifth, the second of the backbone's.
    backbone = _pyramid(settings, own, _FROM_8, sixth=None if improved else 256)
    sizes = settings.architecture.anchor_sizes or SIZES
    anchors = _anchors(settings, [(size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))) for size in sizes])
    head = None
    if improved:
        num_anchors, norm = anchors.num_anchors_per_location()[0], partial(nn.GroupNorm, 32)
        head = RetinaNetHead(backbone.out_channels, num_anchors, settings.num_outputs, norm_layer=norm)
        head.regression_head._loss_type = "giou"
    return RetinaNet(
        backbone, settings.num_outputs, anchor_generator=anchors, head=head, **one_stage_limits(settings, 1000)
    )


def fcos(settings: Settings, *, own: str) -> FCOS:
    """FCOS, which has no anchors but points."""
    backbone = _pyramid(settings, own, _FROM_8, sixth=256)
    return FCOS(backbone, settings.num_outputs, **one_stage_limits(settings, 1000))


def one_stage_limits(settings: Settings, num_candidates: int) -> dict[str, Any]:
    """What SSD, RetinaNet and FCOS are told; ``num_candidates`` is torchvision's number that suppression is given."""
    return {
        "score_thresh": settings.score_threshold,
        "nms_thresh": settings.nms_threshold,
        "detections_per_img": settings.max_detections,
        "topk_candidates": max(num_candidates, settings.max_detections),
    }


def _pyramid(
    settings: Settings,
    own: str,
    levels: tuple[list[int], list[int]],
    *,
    sixth: int | None = 0,
    norm_layer: type[nn.Module] | None = None,
) -> BackboneWithFPN:
    """A backbone with its pyramid.

    ``sixth`` is the channels of what the sixth level is made of, None those of the backbone's last layer; 0 has a
    pooled level instead.
    """
    body = get_model(settings.architecture.backbone or own, weights=None, norm_layer=nn.BatchNorm2d)
    is_resnet = isinstance(body, ResNet)
    last = body.inplanes if is_resnet else body.features[-1].out_channels
    extra = None if sixth == 0 else LastLevelP6P7(sixth or last, 256)
    if is_resnet:
        return _resnet_fpn_extractor(body, _RESNET_STAGES, levels[0], extra, norm_layer)
    pyramid: BackboneWithFPN = _mobilenet_extractor(body, True, _MOBILENET_STAGES, levels[1], extra, norm_layer)
    return pyramid


def _anchors(settings: Settings, sizes: Sequence[Sequence[float]]) -> AnchorGenerator:
    ratios = settings.architecture.anchor_ratios or RATIOS
    return AnchorGenerator(tuple(tuple(level) for level in sizes), (tuple(ratios),) * len(sizes))
