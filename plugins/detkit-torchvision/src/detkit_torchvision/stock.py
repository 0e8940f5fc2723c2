"""torchvision's own detectors, as its constructors make them, ordered by their AP on COCO."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torchvision.models import detection

from detkit_torchvision.architecture import OWN_BACKBONES, own_proposals
from detkit_torchvision.pyramids import fcos, one_stage_limits, rcnn, retinanet
from detkit_torchvision.spec import Network, Settings, Spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def _ssd(function: Callable[..., Network], num_candidates: int, settings: Settings) -> Network:
    """SSD or SSDlite; ``num_candidates`` is torchvision's number of boxes that suppression is given."""
    limits = one_stage_limits(settings, num_candidates)
    return function(weights=None, weights_backbone=None, num_classes=settings.num_outputs, **limits)


def _ssd300(settings: Settings) -> Network:
    assert settings.image_size == 300  # the controller checked; the steps of the default boxes are of 300 pixels
    return _ssd(detection.ssd300_vgg16, 400, settings)


def _on_pyramid(name: str, construct: Callable[..., Network], **facts: Any) -> Callable[[Settings], Network]:
    if construct is rcnn:
        facts["proposals"] = own_proposals(name)
    return partial(construct, own=OWN_BACKBONES[name], **facts)


_at_800 = partial(Spec, image_size=800, max_ratio=1333 / 800)

# torchvision's RetinaNet and FCOS count a background that they do not need. Ours have no row for it (label_offset=0),
# as a row without a meaning could be detected; `copying.coco_weights` leaves theirs out.
STOCK: Mapping[str, Spec] = {
    "ssdlite320_mobilenet_v3_large": Spec(
        partial(_ssd, detection.ssdlite320_mobilenet_v3_large, 300),
        image_size=320,
        label_offset=1,
        nms_threshold=0.55,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        coco=detection.SSDLite320_MobileNet_V3_Large_Weights.COCO_V1,
    ),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Spec(
        _on_pyramid("fasterrcnn_mobilenet_v3_large_320_fpn", rcnn),
        image_size=320,
        label_offset=1,
        nms_threshold=0.5,
        max_ratio=640 / 320,
        frozen_norms=True,
        coco=detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1,
    ),
    "ssd300_vgg16": Spec(
        _ssd300,
        image_size=300,
        label_offset=1,
        nms_threshold=0.45,
        size_divisible=1,
        mean=(0.48235, 0.45882, 0.40784),
        std=(1 / 255, 1 / 255, 1 / 255),
        coco=detection.SSD300_VGG16_Weights.COCO_V1,
    ),
    "fasterrcnn_mobilenet_v3_large_fpn": _at_800(
        _on_pyramid("fasterrcnn_mobilenet_v3_large_fpn", rcnn),
        label_offset=1,
        nms_threshold=0.5,
        frozen_norms=True,
        coco=detection.FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1,
    ),
    "retinanet_resnet50_fpn": _at_800(
        _on_pyramid("retinanet_resnet50_fpn", retinanet),
        label_offset=0,
        nms_threshold=0.5,
        frozen_norms=True,
        coco=detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
        coco_without_eps=True,
    ),
    "fasterrcnn_resnet50_fpn": _at_800(
        _on_pyramid("fasterrcnn_resnet50_fpn", rcnn),
        label_offset=1,
        nms_threshold=0.5,
        frozen_norms=True,
        coco=detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
        coco_without_eps=True,
    ),
    "maskrcnn_resnet50_fpn": _at_800(
        _on_pyramid("maskrcnn_resnet50_fpn", rcnn, masks=True),
        label_offset=1,
        nms_threshold=0.5,
        masks=True,
        frozen_norms=True,
        coco=detection.MaskRCNN_ResNet50_FPN_Weights.COCO_V1,
        coco_without_eps=True,
    ),
    "fcos_resnet50_fpn": _at_800(
        _on_pyramid("fcos_resnet50_fpn", fcos),
        label_offset=0,
        nms_threshold=0.6,
        frozen_norms=True,
        coco=detection.FCOS_ResNet50_FPN_Weights.COCO_V1,
    ),
    "retinanet_resnet50_fpn_v2": _at_800(
        _on_pyramid("retinanet_resnet50_fpn_v2", retinanet, improved=True),
        label_offset=0,
        nms_threshold=0.5,
        coco=detection.RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1,
    ),
    "fasterrcnn_resnet50_fpn_v2": _at_800(
        _on_pyramid("fasterrcnn_resnet50_fpn_v2", rcnn, improved=True),
        label_offset=1,
        nms_threshold=0.5,
        coco=detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    ),
    "maskrcnn_resnet50_fpn_v2": _at_800(
        _on_pyramid("maskrcnn_resnet50_fpn_v2", rcnn, improved=True, masks=True),
        label_offset=1,
        nms_threshold=0.5,
        masks=True,
        coco=detection.MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    ),
}
