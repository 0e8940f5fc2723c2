"""Earlier weights of the same network: torchvision's, and how any are copied by the names of their classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNN
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FeaturePyramidNetwork

from detkit_torchvision.models import MODELS
from detkit_torchvision.spec import Network

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


_WITHOUT_CLASSES = ("backbone.", "rpn.")
"""How parameters are called that have nothing to do with classes, whatever the head."""


class CocoWeights(NamedTuple):
    url: str
    file_name: str
    classes: list[str | None]
    """By class index; None where COCO left a number unused, and for a background that our network does not count."""
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
    categories = weights.meta["categories"][MODELS[name].label_offset :]
    return CocoWeights(
        url=weights.url,
        file_name=weights.url.rpartition("/")[2],
        classes=[None if category in {"__background__", "N/A"} else category for category in categories],
        licence="BSD-3-Clause (torchvision); trained on COCO 2017, whose own terms may apply",
    )


def head_rows(model: Network) -> dict[str, int]:
    """The parameters that depend on the classes, by their name in the state dict, each with its rows per class.

    The rows of such a parameter are laid out as anchors x classes, background included, x rows per class. Empty where
    the user's own code has put another head in place of torchvision's.
    """
    try:
        layers = _class_layers(model)
    except AttributeError:
        return {}
    names = {module: name for name, module in model.named_modules()}
    found = {f"{names[layer]}.{part}": rows for layer, rows in layers.items() for part in ("weight", "bias")}
    own = model.state_dict().keys()
    return {key: rows for key, rows in found.items() if key in own}


def _class_layers(model: Network) -> dict[nn.Module, int]:
    if isinstance(model, SSD):
        levels = model.head.classification_head.module_list
        # A level of SSDLite is a block whose last layer predicts.
        return {level[-1] if isinstance(level, nn.Sequential) else level: 1 for level in levels}
    if isinstance(model, FasterRCNN):
        predictor = model.roi_heads.box_predictor
        layers = {predictor.cls_score: 1, predictor.bbox_pred: 4}
        if isinstance(model, MaskRCNN):
            layers[model.roi_heads.mask_predictor.mask_fcn_logits] = 1
        return layers
    return {model.head.classification_head.cls_logits: 1}


def _renamed(model: Network, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, by the names that layers have today.

    torchvision's files of 2020 and 2021 have other names for some, which its modules change as they load. Those below
    hold no parameters but those of their layers, so nothing is loaded here.
    """
    renamed = dict(state_dict)
    for name, module in model.named_modules():
        if isinstance(module, FeaturePyramidNetwork | RPNHead | RetinaNetClassificationHead | RetinaNetRegressionHead):
            module._load_from_state_dict(renamed, f"{name}.", {}, False, [], [], [])
    return renamed


@torch.no_grad()
def copy_by_name(
    name: str,
    model: Network,
    state_dict: Mapping[str, Tensor],
    old_classes: Sequence[str | None],
    new_classes: Sequence[str],
) -> CopyReport:
    """Copies the weights of the same network trained with `old_classes` into `model`.

    Outputs follow the name of their class, also when both sides have equally many: their order may differ. Where no
    name is known, no output is copied, not even the background's.

    In a head of the user's own nobody knows which outputs are of which class: it is copied by name and shape where the
    classes are the same in the same order, else only the backbone and the proposals are.
    """
    offset = MODELS[name].label_offset
    num_old, num_new = len(old_classes) + offset, len(new_classes) + offset
    kept = [class_name for class_name in new_classes if class_name in old_classes]
    background = list(range(offset))
    source = background + [old_classes.index(class_name) + offset for class_name in kept]
    target = background + [new_classes.index(class_name) + offset for class_name in kept]

    own = model.state_dict()
    state_dict = _renamed(model, state_dict)
    found_rows = head_rows(model).items()
    # What has not a number of rows for every class is for all of them, such as boxes that no class has to itself.
    rows = {key: n for key, n in found_rows if len(own[key]) % (n * num_new) == 0}
    unknown_head = not rows and list(old_classes) != list(new_classes)
    # Weights trained with frozen norms lack this counter, which only a norm without momentum reads.
    skipped = [key for key in own.keys() ^ state_dict.keys() if not key.endswith("num_batches_tracked")]
    for key in own.keys() & state_dict.keys():
        fresh, earlier = own[key], state_dict[key]
        if (key in rows and not any(old_classes)) or (unknown_head and not key.startswith(_WITHOUT_CLASSES)):
            skipped.append(key)
        elif key in rows and len(fresh) * num_old == len(earlier) * num_new and fresh.shape[1:] == earlier.shape[1:]:
            by_class = earlier.view(-1, num_old, rows[key], *earlier.shape[1:])[:, source]
            fresh.view(-1, num_new, rows[key], *fresh.shape[1:])[:, target] = by_class.to(fresh)
        elif key not in rows and fresh.shape == earlier.shape:
            fresh.copy_(earlier)
        else:
            skipped.append(key)
    if unknown_head or (rows and rows.keys() <= set(skipped)):
        kept = []
    return CopyReport(
        kept=kept,
        new=[class_name for class_name in new_classes if class_name not in kept],
        dropped=[class_name for class_name in old_classes if class_name is not None and class_name not in kept],
        skipped=sorted(skipped),
    )
