"""The models by name: which of Detectron2's configs each one is, and what the tiny ones change in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal["faster_rcnn", "retinanet", "mask_rcnn"]

LOSSES: Mapping[Family, tuple[str, ...]] = {
    "faster_rcnn": ("loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"),
    "retinanet": ("loss_cls", "loss_box_reg"),
    "mask_rcnn": ("loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"),
}
"""Parts of the loss, as Detectron2 calls them."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One of Detectron2's configs."""

    config: str
    """Below the folder of Detectron2's configs."""
    family: Family
    summary: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Native keys that differ from the config."""


_BOXES, _MASKS = "COCO-Detection", "COCO-InstanceSegmentation"

_TINY_BACKBONE: Mapping[str, Any] = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.FPN.NORM": "GN",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "INPUT.MIN_SIZE_TRAIN": [256],
    "INPUT.MIN_SIZE_TEST": 256,
    "INPUT.MAX_SIZE_TRAIN": 448,
    "INPUT.MAX_SIZE_TEST": 448,
}
"""A ResNet-18 that learns from scratch: norms that learn, and images scaled to unit variance."""

_TINY_STAGES: Mapping[str, Any] = {
    **_TINY_BACKBONE,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 200,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 200,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 100,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 128,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 128,
}

ENTRIES: Mapping[str, Entry] = {
    "faster_rcnn_tiny": Entry(
        config=f"{_BOXES}/faster_rcnn_R_50_FPN_1x.yaml",
        family="faster_rcnn",
        summary="Faster R-CNN with ResNet-18 and 64 channels, learned from scratch; for tests and a CPU",
        changes=_TINY_STAGES,
    ),
    "retinanet_tiny": Entry(
        config=f"{_BOXES}/retinanet_R_50_FPN_1x.yaml",
        family="retinanet",
        summary="RetinaNet with ResNet-18 and 64 channels, learned from scratch; for tests and a CPU",
        changes={
            **_TINY_BACKBONE,
            "MODEL.RETINANET.NUM_CONVS": 2,
            "MODEL.RETINANET.NORM": "GN",
            "MODEL.ANCHOR_GENERATOR.SIZES": [
                [base * 2 ** (i / 3) for i in range(3)] for base in (16, 32, 64, 128, 256)
            ],
        },
    ),
    "mask_rcnn_tiny": Entry(
        config=f"{_MASKS}/mask_rcnn_R_50_FPN_1x.yaml",
        family="mask_rcnn",
        summary="Mask R-CNN with ResNet-18 and 64 channels, learned from scratch; for tests and a CPU",
        changes={**_TINY_STAGES, "MODEL.ROI_MASK_HEAD.NUM_CONV": 2, "MODEL.ROI_MASK_HEAD.CONV_DIM": 64},
    ),
    "faster_rcnn_R_50_FPN_1x": Entry(
        config=f"{_BOXES}/faster_rcnn_R_50_FPN_1x.yaml",
        family="faster_rcnn",
        summary="Faster R-CNN with ResNet-50 and FPN, COCO AP 37.9; for a GPU",
    ),
    "faster_rcnn_R_50_FPN_3x": Entry(
        config=f"{_BOXES}/faster_rcnn_R_50_FPN_3x.yaml",
        family="faster_rcnn",
        summary="Faster R-CNN with ResNet-50 and FPN, COCO AP 40.2; for a GPU",
    ),
    "faster_rcnn_R_101_FPN_3x": Entry(
        config=f"{_BOXES}/faster_rcnn_R_101_FPN_3x.yaml",
        family="faster_rcnn",
        summary="Faster R-CNN with ResNet-101 and FPN, COCO AP 42.0; for a GPU",
    ),
    "faster_rcnn_X_101_32x8d_FPN_3x": Entry(
        config=f"{_BOXES}/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
        family="faster_rcnn",
        summary="Faster R-CNN with ResNeXt-101 and FPN, COCO AP 43.0; for a large GPU",
    ),
    "retinanet_R_50_FPN_1x": Entry(
        config=f"{_BOXES}/retinanet_R_50_FPN_1x.yaml",
        family="retinanet",
        summary="RetinaNet with ResNet-50, COCO AP 37.4; for a GPU",
    ),
    "retinanet_R_50_FPN_3x": Entry(
        config=f"{_BOXES}/retinanet_R_50_FPN_3x.yaml",
        family="retinanet",
        summary="RetinaNet with ResNet-50, COCO AP 38.7; for a GPU",
    ),
    "retinanet_R_101_FPN_3x": Entry(
        config=f"{_BOXES}/retinanet_R_101_FPN_3x.yaml",
        family="retinanet",
        summary="RetinaNet with ResNet-101, COCO AP 40.4; for a GPU",
    ),
    "mask_rcnn_R_50_FPN_1x": Entry(
        config=f"{_MASKS}/mask_rcnn_R_50_FPN_1x.yaml",
        family="mask_rcnn",
        summary="Mask R-CNN with ResNet-50 and FPN, COCO AP 38.6, of masks 35.2; for a GPU",
    ),
    "mask_rcnn_R_50_FPN_3x": Entry(
        config=f"{_MASKS}/mask_rcnn_R_50_FPN_3x.yaml",
        family="mask_rcnn",
        summary="Mask R-CNN with ResNet-50 and FPN, COCO AP 41.0, of masks 37.2; for a GPU",
    ),
    "mask_rcnn_R_101_FPN_3x": Entry(
        config=f"{_MASKS}/mask_rcnn_R_101_FPN_3x.yaml",
        family="mask_rcnn",
        summary="Mask R-CNN with ResNet-101 and FPN, COCO AP 42.9, of masks 38.6; for a GPU",
    ),
    "mask_rcnn_X_101_32x8d_FPN_3x": Entry(
        config=f"{_MASKS}/mask_rcnn_X_101_32x8d_FPN_3x.yaml",
        family="mask_rcnn",
        summary="Mask R-CNN with ResNeXt-101 and FPN, COCO AP 44.3, of masks 39.5; for a large GPU",
    ),
    "faster_rcnn_R_50_C4_1x": Entry(
        config=f"{_BOXES}/faster_rcnn_R_50_C4_1x.yaml",
        family="faster_rcnn",
        summary="Faster R-CNN on ResNet-50's fourth stage, COCO AP 35.7; for a GPU",
    ),
    "faster_rcnn_R_50_C4_3x": Entry(
        config=f"{_BOXES}/faster_rcnn_R_50_C4_3x.yaml",
        family="faster_rcnn",
        summary="Faster R-CNN on ResNet-50's fourth stage, COCO AP 38.4; for a GPU",
    ),
    "faster_rcnn_R_101_C4_3x": Entry(
        config=f"{_BOXES}/faster_rcnn_R_101_C4_3x.yaml",
        family="faster_rcnn",
        summary="Faster R-CNN on ResNet-101's fourth stage, COCO AP 41.1; for a GPU",
    ),
    "faster_rcnn_R_50_DC5_1x": Entry(
        config=f"{_BOXES}/faster_rcnn_R_50_DC5_1x.yaml",
        family="faster_rcnn",
        summary="Faster R-CNN on ResNet-50's fifth stage, dilated, COCO AP 37.3; for a GPU",
    ),
    "faster_rcnn_R_50_DC5_3x": Entry(
        config=f"{_BOXES}/faster_rcnn_R_50_DC5_3x.yaml",
        family="faster_rcnn",
        summary="Faster R-CNN on ResNet-50's fifth stage, dilated, COCO AP 39.0; for a GPU",
    ),
    "faster_rcnn_R_101_DC5_3x": Entry(
        config=f"{_BOXES}/faster_rcnn_R_101_DC5_3x.yaml",
        family="faster_rcnn",
        summary="Faster R-CNN on ResNet-101's fifth stage, dilated, COCO AP 40.6; for a GPU",
    ),
    "mask_rcnn_R_50_C4_1x": Entry(
        config=f"{_MASKS}/mask_rcnn_R_50_C4_1x.yaml",
        family="mask_rcnn",
        summary="Mask R-CNN on ResNet-50's fourth stage, COCO AP 36.8, of masks 32.2; for a GPU",
    ),
    "mask_rcnn_R_50_C4_3x": Entry(
        config=f"{_MASKS}/mask_rcnn_R_50_C4_3x.yaml",
        family="mask_rcnn",
        summary="Mask R-CNN on ResNet-50's fourth stage, COCO AP 39.8, of masks 34.4; for a GPU",
    ),
    "mask_rcnn_R_101_C4_3x": Entry(
        config=f"{_MASKS}/mask_rcnn_R_101_C4_3x.yaml",
        family="mask_rcnn",
        summary="Mask R-CNN on ResNet-101's fourth stage, COCO AP 42.6, of masks 36.7; for a GPU",
    ),
    "mask_rcnn_R_50_DC5_1x": Entry(
        config=f"{_MASKS}/mask_rcnn_R_50_DC5_1x.yaml",
        family="mask_rcnn",
        summary="Mask R-CNN on ResNet-50's fifth stage, dilated, COCO AP 38.3, of masks 34.2; for a GPU",
    ),
    "mask_rcnn_R_50_DC5_3x": Entry(
        config=f"{_MASKS}/mask_rcnn_R_50_DC5_3x.yaml",
        family="mask_rcnn",
        summary="Mask R-CNN on ResNet-50's fifth stage, dilated, COCO AP 40.0, of masks 35.9; for a GPU",
    ),
    "mask_rcnn_R_101_DC5_3x": Entry(
        config=f"{_MASKS}/mask_rcnn_R_101_DC5_3x.yaml",
        family="mask_rcnn",
        summary="Mask R-CNN on ResNet-101's fifth stage, dilated, COCO AP 41.9, of masks 37.3; for a GPU",
    ),
    "mask_rcnn_R_50_FPN_1x_giou": Entry(
        config=f"{_MASKS}/mask_rcnn_R_50_FPN_1x_giou.yaml",
        family="mask_rcnn",
        summary="Mask R-CNN with ResNet-50 and FPN, boxes learned by their GIoU; ImageNet weights only",
    ),
}

FROM_CONFIG = "config"
"""The model that ``config=PATH`` describes."""

TINY = ("faster_rcnn_tiny", "retinanet_tiny", "mask_rcnn_tiny")
"""Models that are learned from scratch, and of which there are no weights."""

WITHOUT_COCO = (*TINY, "mask_rcnn_R_50_FPN_1x_giou")
"""Models whose weights on COCO nobody has published."""
