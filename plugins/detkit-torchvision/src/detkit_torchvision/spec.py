"""What a network is built for, and what a caller must know of it before it is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from detkit_torchvision.architecture import OWN, Architecture

if TYPE_CHECKING:
    from collections.abc import Callable

Network: TypeAlias = SSD | FCOS | RetinaNet | FasterRCNN

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Settings:
    """What a network is built for."""

    num_outputs: int
    """Classes, and background where the family has one."""
    image_size: int
    score_threshold: float
    nms_threshold: float
    max_detections: int
    architecture: Architecture = OWN


@dataclass(frozen=True)
class Spec:
    """What a caller must know of a model before it is built."""

    construct: Callable[[Settings], Network]
    image_size: int
    """The default: the side of a square, or the shorter side where `max_ratio` is given."""
    label_offset: int
    """Target label minus class index, in targets and results: 1 where label 0 is background."""
    nms_threshold: float
    """The default."""
    max_ratio: float | None = None
    """Longer side over shorter side, at most; None where images are stretched to a square."""
    size_divisible: int = 32
    """Batches are padded to multiples of this."""
    mean: tuple[float, float, float] = _IMAGENET_MEAN
    std: tuple[float, float, float] = _IMAGENET_STD
    coco: Any = None
    """torchvision's enum member for weights trained on COCO."""
    masks: bool = False
    """Whether it learns and finds masks: targets have ``masks``, ``(n, h, w)`` uint8."""
    frozen_norms: bool = False
    """Whether torchvision trains it with frozen batch norms when it starts from weights (its `FrozenBatchNorm2d`)."""
    coco_without_eps: bool = False
    """Whether the batch norms behind those weights divide by the variance alone (torchvision's `overwrite_eps`)."""
