"""What Detectron2 has released: weights of its zoo, and where its cache keeps them. Nothing here imports torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from detkit.errors import WeightsMissing
from detkit_detectron2.zoo import FROM_CONFIG, TINY

PREFIX = "detectron2://"
"""How Detectron2's configuration files begin the address of a file that it has released."""

LICENCE = "CC-BY-SA-3.0 (Detectron2's model zoo)"

_HOST = "https://dl.fbaipublicfiles.com/detectron2/"
_IMAGENET = f"{PREFIX}ImageNetPretrained/"
_OF_COCO = (f"{PREFIX}COCO-Detection/", f"{PREFIX}COCO-InstanceSegmentation/", f"{PREFIX}Misc/")
"""Where the zoo's models of COCO's 80 classes are."""

_DETECTION: Mapping[str, str] = {
    "faster_rcnn_R_50_C4_1x": "137257644/model_final_721ade.pkl",
    "faster_rcnn_R_50_DC5_1x": "137847829/model_final_51d356.pkl",
    "faster_rcnn_R_50_FPN_1x": "137257794/model_final_b275ba.pkl",
    "faster_rcnn_R_50_C4_3x": "137849393/model_final_f97cb7.pkl",
    "faster_rcnn_R_50_DC5_3x": "137849425/model_final_68d202.pkl",
    "faster_rcnn_R_50_FPN_3x": "137849458/model_final_280758.pkl",
    "faster_rcnn_R_101_C4_3x": "138204752/model_final_298dad.pkl",
    "faster_rcnn_R_101_DC5_3x": "138204841/model_final_3e0943.pkl",
    "faster_rcnn_R_101_FPN_3x": "137851257/model_final_f6e8b1.pkl",
    "faster_rcnn_X_101_32x8d_FPN_3x": "139173657/model_final_68b088.pkl",
    "retinanet_R_50_FPN_1x": "190397773/model_final_bfca0b.pkl",
    "retinanet_R_50_FPN_3x": "190397829/model_final_5bd44e.pkl",
    "retinanet_R_101_FPN_3x": "190397697/model_final_971ab9.pkl",
}
_SEGMENTATION: Mapping[str, str] = {
    "mask_rcnn_R_50_C4_1x": "137259246/model_final_9243eb.pkl",
    "mask_rcnn_R_50_DC5_1x": "137260150/model_final_4f86c3.pkl",
    "mask_rcnn_R_50_FPN_1x": "137260431/model_final_a54504.pkl",
    "mask_rcnn_R_50_C4_3x": "137849525/model_final_4ce675.pkl",
    "mask_rcnn_R_50_DC5_3x": "137849551/model_final_84107b.pkl",
    "mask_rcnn_R_50_FPN_3x": "137849600/model_final_f10217.pkl",
    "mask_rcnn_R_101_C4_3x": "138363239/model_final_a2914c.pkl",
    "mask_rcnn_R_101_DC5_3x": "138363294/model_final_0464b7.pkl",
    "mask_rcnn_R_101_FPN_3x": "138205316/model_final_a3ec72.pkl",
    "mask_rcnn_X_101_32x8d_FPN_3x": "139653917/model_final_2d9806.pkl",
}
"""As ``detectron2/model_zoo/model_zoo.py`` lists them, whose module imports what new setuptools have not."""

COCO: Mapping[str, str] = {
    **{name: f"{PREFIX}COCO-Detection/{name}/{rest}" for name, rest in _DETECTION.items()},
    **{name: f"{PREFIX}COCO-InstanceSegmentation/{name}/{rest}" for name, rest in _SEGMENTATION.items()},
}
"""The address of the weights trained on COCO 2017, by the model's name."""


def coco_file(model: str) -> str | None:
    """Return the address of a zoo model's weights trained on COCO 2017, None where nobody has released any."""
    return COCO.get(model)


def imagenet(depth: int, groups: int) -> str | None:
    """Return the address of a ResNet's weights trained on ImageNet-1K, None where there are none."""
    name = {(50, 1): "MSRA/R-50", (101, 1): "MSRA/R-101", (101, 32): "FAIR/X-101-32x8d"}.get((depth, groups))
    return f"{_IMAGENET}{name}.pkl" if name else None


def word(model: str, address: str) -> str:
    """Return what ``weights=`` is called here for a native ``MODEL.WEIGHTS``: a word where it is a release.

    A configuration file goes with any release of Detectron2's, a model of the zoo with those for its own pixels and
    layers. Raises `ValueError` with what is expected for another address.
    """
    if not address:
        return "none"
    if address.startswith(_HOST):
        address = address.replace(_HOST, PREFIX, 1)
    if "://" not in address:
        return address
    if model == FROM_CONFIG:
        if is_imagenet(address):
            return "imagenet"
        if is_coco(address):
            return "coco"
    elif address == COCO.get(model):
        return "coco"
    elif address == imagenet(*_layers(model)):
        return "imagenet"
    words = "none" if model in TINY else "imagenet, coco or none" if model in COCO else "imagenet or none"
    raise ValueError(f"weights={words}, or the path of a file: no other address is fetched for {model}")


def _layers(model: str) -> tuple[int, int]:
    """Return depth and groups of a zoo model's ResNet, by its name."""
    found = re.search(r"_([RX])_(\d+)_", model)
    return (int(found[2]), 32 if found[1] == "X" else 1) if found else (0, 0)


def url(address: str) -> str:
    """Return where a released file can be fetched."""
    return address.replace(PREFIX, _HOST, 1)


def cached(address: str) -> Path:
    """Return where Detectron2's cache has, or would have, a released file (``iopath``'s ``HTTPURLHandler``)."""
    cache = Path(os.environ.get("FVCORE_CACHE") or "~/.torch/iopath_cache").expanduser()
    return cache / "detectron2" / address.removeprefix(PREFIX).removeprefix(_HOST)


def is_coco(address: str) -> bool:
    """Tell whether a native ``MODEL.WEIGHTS`` is a release that knows COCO's 80 classes."""
    return address.replace(_HOST, PREFIX, 1).startswith(_OF_COCO)


def is_imagenet(address: str) -> bool:
    """Tell whether a native ``MODEL.WEIGHTS`` is a released classifier."""
    return address.replace(_HOST, PREFIX, 1).startswith(_IMAGENET)


def require(model: str, weights: str | None) -> None:
    """Raise `WeightsMissing` before any data is read where ``weights=auto`` finds nothing in the cache."""
    if weights == "auto":
        address = COCO.get(model)
        if address is None:
            raise WeightsMissing("auto", model, "weights=PATH", "nobody has released any")
        if not (path := cached(address)).is_file():
            raise WeightsMissing("auto", model, path, "they are not in the cache; weights=coco would fetch them")
