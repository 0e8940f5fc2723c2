"""torchvision's own models: the same detections from the same file, its numbers, and what they refuse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection

import detkit
from detkit.errors import InvalidValue, UnknownName
from detkit.job import Job, Workspace
from detkit_torchvision.copying import coco_weights, head_rows
from detkit_torchvision.engine import TorchvisionDetector
from detkit_torchvision.models import MODELS, build, final_size
from detkit_torchvision.params import COCO_FILES, weights_cache
from detkit_torchvision.weights import initialise


def as_torchvision_saved_it(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the layers of today to what they are called in torchvision's files of 2020 and 2021."""
    names = {}
    for name in state:
        old = re.sub(r"((?:inner|layer)_blocks\.\d)\.0\.", r"\1.", name)
        old = old.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        names[name] = re.sub(r"(head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", old)
    return {names[name]: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


@torch.no_grad()
def their_model(name: str, image: Tensor, **sizes: int) -> Any:
    """Return torchvision's 91-class network with random weights whose scores on an image are spread out."""
    torch.manual_seed(3)
    prefix = "box_" if name.startswith("fasterrcnn") else ""
    limits = {f"{prefix}score_thresh": 0.05, f"{prefix}detections_per_img": 20}
    theirs = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=91, **limits, **sizes).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1e-4)
            module.weight.fill_(0.007)
            if MODELS[name].coco_without_eps:
                module.eps = 0.0

    def spread(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        module.weight.div_(output.std() / 2)

    heads = [theirs.get_submodule(key.removesuffix(".weight")) for key in head_rows(theirs) if key.endswith("weight")]
    hooks = [head.register_forward_hook(spread) for head in heads]
    theirs([image])
    for hook in hooks:
        hook.remove()
    categories = MODELS[name].coco.meta["categories"]
    unused = [i for i, one in enumerate(categories) if one == "N/A" or i < 1 - MODELS[name].label_offset]
    for key, rows in head_rows(theirs).items():
        if key.endswith("bias"):
            theirs.state_dict()[key].view(-1, 91, rows)[:, unused] = -1000.0
    return theirs


@pytest.mark.parametrize(
    "name",
    ["ssd300_vgg16", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"],
)
def test_the_same_detections_as_torchvision(name: str, tmp_path: Path) -> None:
    """torchvision's file, read by class names into a network of COCO's 80, finds what torchvision finds with it.

    The image has its final size already, as torchvision resizes in float32 and we in uint8.
    """
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 3) if "ssd" in name else (64, 90, 3), dtype=np.uint8)
    size = 300 if "ssd" in name else 64
    assert final_size(name, size, image.shape[1], image.shape[0]) == (image.shape[1], image.shape[0])
    pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
    theirs = their_model(name, pixels, **({} if "ssd" in name else {"min_size": 64, "max_size": 107}))
    path = weights_cache() / COCO_FILES[name]
    path.parent.mkdir(parents=True)
    torch.save(as_torchvision_saved_it(theirs.state_dict()), path)

    known = coco_weights(name)
    assert known is not None
    classes = sorted(one for one in known.classes if one is not None)
    assert len(classes) == 80
    ours = build(name, 80, image_size=size, score_threshold=0.05, max_detections=20)
    job = Job(backend="torchvision", engine="", model=name, params={"weights": "coco"}, options={}, classes=classes)
    assert initialise(ours, job, Workspace(tmp_path / "run")).kept == classes
    [found] = TorchvisionDetector(ours, name, classes, size).detect([image])
    with torch.no_grad():
        [expected] = theirs([pixels])
    categories = MODELS[name].coco.meta["categories"]
    assert len(found) == 20
    assert len(set(found.names)) > 3
    assert np.ptp(found.scores) > 1e-3
    assert list(found.names) == [categories[label] for label in expected["labels"]]
    assert np.allclose(found.scores, expected["scores"].numpy(), atol=1e-4)
    assert np.allclose(found.boxes, expected["boxes"].numpy(), atol=1e-4)
