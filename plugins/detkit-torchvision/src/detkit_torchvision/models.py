"""The networks: our small ones, built of torchvision's parts, and torchvision's own; nothing is downloaded here.

Every network takes uint8 images that already have their final size (`final_size`), and labels shifted by
`MODELS[name].label_offset`:

    losses = model(images, targets)   # in training mode: {loss name: scalar}
    results = model(images)           # in evaluation mode: [{"boxes", "labels", "scores"}, ...]
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.misc import Conv2dNormActivation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Network: TypeAlias = SSD | FCOS | FasterRCNN
Targets = list[dict[str, Tensor]]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------- the catalogue


@dataclass(frozen=True)
class Settings:
    """What a network is built for."""

    num_outputs: int
    """Classes, and background where the family has one."""
    image_size: int
    score_threshold: float
    nms_threshold: float
    max_detections: int


@dataclass(frozen=True)
class Spec:
    """What a caller must know of a model before it is built."""

    construct: Callable[[Settings], Network]
    image_size: int
    """The default: the side of a square, or the shorter side where `max_ratio` is given. A multiple of 32."""
    label_offset: int
    """Target label minus class index, in targets and results: 1 where label 0 is background."""
    nms_threshold: float
    """The default."""
    max_ratio: float | None = None
    """Longer side over shorter side, at most; None where images are stretched to a square."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    coco: Any = None
    """torchvision's enum member for weights trained on COCO."""


def build(
    name: str,
    num_classes: int,
    *,
    image_size: int,
    score_threshold: float = 0.01,
    nms_threshold: float | None = None,
    max_detections: int = 100,
) -> Network:
    """Builds a network with fresh weights; `num_classes` does not count a background."""
    spec = MODELS[name]
    settings = Settings(
        num_outputs=num_classes + spec.label_offset,
        image_size=image_size,
        score_threshold=score_threshold,
        nms_threshold=spec.nms_threshold if nms_threshold is None else nms_threshold,
        max_detections=max_detections,
    )
    model = spec.construct(settings)
    model.transform = Normalize(spec.mean, spec.std, size_divisible=32)
    return model


def final_size(name: str, image_size: int, width: int, height: int) -> tuple[int, int]:
    """The width and height to which an image is resized before it enters the network."""
    max_ratio = MODELS[name].max_ratio
    if max_ratio is None:
        return image_size, image_size
    scale = min(image_size / min(width, height), round(image_size * max_ratio) / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


# ------------------------------------------------------------------------------------------- what goes into it


class Normalize(nn.Module):
    """Stands in for torchvision's GeneralizedRCNNTransform, which resizes image by image in float32.

    Moves the images as uint8 to the network's device, normalises them there and pads them to a common size. Targets
    must lie on that device already. The caller sets `channels_last` together with the network's memory format.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, size_divisible: int) -> None:
        super().__init__()
        self.size_divisible = size_divisible
        self.channels_last = False
        # Not persistent: the state dict stays the one torchvision's own model has.
        shape = (3, 1, 1)
        self.register_buffer("scale", 1 / (255 * torch.tensor(std)).view(shape), persistent=False)
        self.register_buffer("shift", -(torch.tensor(mean) / torch.tensor(std)).view(shape), persistent=False)

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Targets | None = None
    ) -> tuple[ImageList, Targets | None]:
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (
            math.ceil(max(side) / self.size_divisible) * self.size_divisible for side in zip(*sizes, strict=True)
        )
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        device = self.scale.device
        if set(sizes) == {(height, width)}:
            stacked = images if isinstance(images, Tensor) else torch.stack(list(images))
            batch = stacked.to(device, torch.float32, non_blocking=True, memory_format=layout)
            batch.mul_(self.scale).add_(self.shift)
        else:
            # Padding is 0 after normalisation, as in torchvision: COCO weights were trained with it.
            batch = torch.zeros(len(sizes), 3, height, width, device=device).to(memory_format=layout)
            for padded, image, (h, w) in zip(batch, images, sizes, strict=True):
                padded[:, :h, :w] = image.to(device, non_blocking=True) * self.scale + self.shift
        return ImageList(batch, sizes), targets

    def postprocess(
        self,
        result: Targets,
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> Targets:
        """Leaves boxes in pixels of the input: the caller resized it and scales them back."""
        return result


# ------------------------------------------------------------------------------------------------- our own family


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


def _small_fcos(width: int, settings: Settings) -> FCOS:
    backbone = ConvPyramid(width)
    # A level gets the objects that reach 4 to 8 of its anchor sizes from the point that predicts them. Anchors as large
    # as the stride, FCOS's convention, leave small pictures to the first level alone; so ours grow with the picture.
    # Their sizes are even because AnchorGenerator rounds the halves.
    finest = 2 * max(1, round(settings.image_size / 80))
    anchors = AnchorGenerator(tuple((finest * 2**level,) for level in range(3)), ((1.0,),) * 3)
    head = FCOSHead(backbone.out_channels, 1, settings.num_outputs, num_convs=2)
    # torchvision clips distances with a ReLU: begun at 0 half of them would have no gradient.
    nn.init.constant_(head.regression_head.bbox_reg.bias, 3.0)
    return FCOS(
        backbone,
        settings.num_outputs,
        anchor_generator=anchors,
        head=head,
        center_sampling_radius=1.5 * 8 / finest,  # in anchor sizes: 1.5 strides
        score_thresh=settings.score_threshold,
        nms_thresh=settings.nms_threshold,
        detections_per_img=settings.max_detections,
        topk_candidates=max(1000, settings.max_detections),
    )


# --------------------------------------------------------------------------------------------- torchvision's own


def _ssdlite(settings: Settings) -> SSD:
    return detection.ssdlite320_mobilenet_v3_large(
        weights=None,
        weights_backbone=None,
        num_classes=settings.num_outputs,
        score_thresh=settings.score_threshold,
        nms_thresh=settings.nms_threshold,
        detections_per_img=settings.max_detections,
        topk_candidates=max(300, settings.max_detections),
    )


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


MODELS: dict[str, Spec] = {
    "ssd_tiny": Spec(partial(_small_ssd, 16), image_size=160, label_offset=1, nms_threshold=0.45),
    "fcos_tiny": Spec(partial(_small_fcos, 16), image_size=160, label_offset=0, nms_threshold=0.6),
    "fcos_small": Spec(partial(_small_fcos, 32), image_size=192, label_offset=0, nms_threshold=0.6),
    "ssdlite320_mobilenet_v3_large": Spec(
        _ssdlite,
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
        coco=detection.FasterRCNN_MobileNet_V3_Large_320_FPN_Weights.COCO_V1,
    ),
    "fasterrcnn_resnet50_fpn_v2": Spec(
        partial(_faster_rcnn, detection.fasterrcnn_resnet50_fpn_v2, 1000),
        image_size=800,
        label_offset=1,
        nms_threshold=0.5,
        max_ratio=1333 / 800,
        coco=detection.FasterRCNN_ResNet50_FPN_V2_Weights.COCO_V1,
    ),
}


# ------------------------------------------------------------------------------------------------ earlier weights


class CocoWeights(NamedTuple):
    url: str
    file_name: str
    classes: list[str | None]
    """By class index, without background; None where COCO left a number unused."""
    licence: str


@dataclass(frozen=True)
class CopyReport:
    """What `copy_by_name` carried over."""

    kept: list[str]
    """Classes whose outputs were copied."""
    new: list[str]
    """Classes the weights do not know: their outputs stay fresh."""
    dropped: list[str]
    """Classes of the weights that the model does not have."""
    skipped: list[str]
    """Parameters that only one side has, or whose shapes differ by more than the number of classes."""


def coco_weights(name: str) -> CocoWeights | None:
    """Where torchvision keeps this model's weights trained on COCO; None where it has none."""
    weights = MODELS[name].coco
    if weights is None:
        return None
    _background, *categories = weights.meta["categories"]
    return CocoWeights(
        url=weights.url,
        file_name=weights.url.rpartition("/")[2],
        classes=[None if category == "N/A" else category for category in categories],
        licence="BSD-3-Clause (torchvision); trained on COCO 2017, whose own terms may apply",
    )


def head_rows(model: Network) -> dict[str, int]:
    """The parameters that depend on the classes, by their name in the state dict, each with its rows per class.

    The rows of such a parameter are laid out as anchors x classes, background included, x rows per class.
    """
    if isinstance(model, SSD):
        levels = model.head.classification_head.module_list
        # A level of SSDLite is a block whose last layer predicts.
        layers = {level[-1] if isinstance(level, nn.Sequential) else level: 1 for level in levels}
    elif isinstance(model, FCOS):
        layers = {model.head.classification_head.cls_logits: 1}
    else:
        predictor = model.roi_heads.box_predictor
        layers = {predictor.cls_score: 1, predictor.bbox_pred: 4}
    names = {module: name for name, module in model.named_modules()}
    return {f"{names[layer]}.{part}": rows for layer, rows in layers.items() for part in ("weight", "bias")}


@torch.no_grad()
def copy_by_name(
    name: str,
    model: Network,
    state_dict: Mapping[str, Tensor],
    old_classes: Sequence[str | None],
    new_classes: Sequence[str],
) -> CopyReport:
    """Copies the weights of the same network trained with `old_classes` into `model`.

    Outputs follow the name of their class, also when both sides have equally many: their order may differ.
    """
    offset = MODELS[name].label_offset
    num_old, num_new = len(old_classes) + offset, len(new_classes) + offset
    kept = [class_name for class_name in new_classes if class_name in old_classes]
    background = list(range(offset))
    source = background + [old_classes.index(class_name) + offset for class_name in kept]
    target = background + [new_classes.index(class_name) + offset for class_name in kept]

    own = model.state_dict()
    rows = head_rows(model)
    # Weights trained with frozen norms lack this counter, which only a norm without momentum reads.
    skipped = [key for key in own.keys() ^ state_dict.keys() if not key.endswith("num_batches_tracked")]
    for key in own.keys() & state_dict.keys():
        fresh, earlier = own[key], state_dict[key]
        if key in rows and len(fresh) * num_old == len(earlier) * num_new and fresh.shape[1:] == earlier.shape[1:]:
            by_class = earlier.view(-1, num_old, rows[key], *earlier.shape[1:])[:, source]
            fresh.view(-1, num_new, rows[key], *fresh.shape[1:])[:, target] = by_class.to(fresh)
        elif key not in rows and fresh.shape == earlier.shape:
            fresh.copy_(earlier)
        else:
            skipped.append(key)
    return CopyReport(
        kept=kept,
        new=[class_name for class_name in new_classes if class_name not in kept],
        dropped=[class_name for class_name in old_classes if class_name is not None and class_name not in kept],
        skipped=sorted(skipped),
    )
