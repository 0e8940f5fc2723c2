"""torchvision's own detectors, as its constructors make them, ordered by their AP on COCO."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import FasterRCNN

from detkit_torchvision.spec import Network, Settings, Spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def _one_stage(function: Callable[..., Network], num_candidates: int, settings: Settings) -> Network:
    """SSD, RetinaNet or FCOS; ``num_candidates`` is torchvision's number of boxes that suppression is given."""
    return function(
        weights=None,
        weights_backbone=None,
        num_classes=settings.num_outputs,
        score_thresh=settings.score_threshold,
        nms_thresh=settings.nms_threshold,
        detections_per_img=settings.max_detections,
        topk_candidates=max(num_candidates, settings.max_detections),
    )


def _ssd300(settings: Settings) -> Network:
    assert settings.image_size == 300  # the controller checked; the steps of the default boxes are of 300 pixels
    return _one_stage(detection.ssd300_vgg16, 400, settings)


def _faster_rcnn(function: Callable[..., FasterRCNN], num_proposals: int, settings: Settings) -> FasterRCNN:
    # Detections cannot outnumber proposals, and the 320 model has few of them.
    num_proposals = max(num_proposals, settings.max_detections)
    return function(
        weights=None,
        weights_backbone=None,
        num_classes=settings.num_outputs,
        box_score_thresh=settings.score_threshold,
        box_nms_thresh=settings.nms_threshold,
        box_detections_per_img=settings.max_detections,
        rpn_pre_nms_top_n_test=num_proposals,
        rpn_post_nms_top_n_test=num_proposals,
    )


_at_800 = partial(Spec, image_size=800, max_ratio=1333 / 800)

# torchvision's RetinaNet and FCOS count a background that they do not need. Ours have no row for it (label_offset=0),
# as a row without a meaning could be detected; `copying.coco_weights` leaves theirs out.
STOCK: Mapping[str, Spec] = {
    "ssdlite320_mobilenet_v3_large": Spec(
        partial(_one_stage, detection.ssdlite320_mobilenet_v3_large, 300),
        image_size=320,
        label_offset=1,
        nms_threshold=0.55,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        coco=detection.SSDLite320_MobileNet_V3_Large_Weights.COCO_V1,
    ),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Spec(
        partial(_faster_rcnn, detection.fasterrcnn_mobilenet_v3_large_320_fpn, 150),
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
        partial(_faster_rcnn, detection.fasterrcnn_mobilenet_v3_large_fpn, 1000),
        label_offset=1,
        nms_threshold=0.5,
        frozen_norms=True,
        coco=detection.FasterRCNN_MobileNet_V3_Large_FPN_Weights.COCO_V1,
    ),
    "retinanet_resnet50_fpn": _at_800(
        partial(_one_stage, detection.retinanet_resnet50_fpn, 1000),
        label_offset=0,
        nms_threshold=0.5,
        frozen_norms=True,
        coco=detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1,
        coco_without_eps=True,
    ),
    "fasterrcnn_resnet50_fpn": _at_800(
        partial(_faster_rcnn, detection.fasterrcnn_resnet50_fpn, 1000),
        label_offset=1,
        nms_threshold=0.5,
        frozen_norms=True,
        coco=detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
        coco_without_eps=True,
    ),
    "fcos_resnet50_fpn": _at_800(
        partial(_one_stage, detection.fcos_resnet50_fpn, 1000),
        label_offset=0,
        nms_threshold=0.6,
        frozen_norms=True,
        coco=detection.FCOS_ResNet50_FPN_Weights.COCO_V1,
    ),
    "retinanet_resnet50_fpn_v2": _at_800(
        partial(_one_stage, detection.retinanet_resnet50_fpn_v2, 1000),
        label_offset=0,
        nms_threshold=0.5,
        coco=detection.RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1,
    ),
    "fasterrcnn_resnet50_fpn_v2": _at_800(
        partial(_faster_rcnn, detection.fasterrcnn_resnet50_fpn_v2, 1000),
        label_offset=1,
        nms_threshold=0.5,
        coco=detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    ),
}
