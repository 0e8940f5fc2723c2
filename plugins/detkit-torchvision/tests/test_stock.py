"""torchvision's own models: the same detections from the same file, its numbers, and what they refuse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection, get_model_builder, list_models

import detkit
from detkit.errors import InvalidValue, UnknownName, UsageError
from detkit.job import Job, Workspace
from detkit_torchvision.architecture import BACKBONES, OWN_BACKBONES
from detkit_torchvision.copying import coco_weights, copy_by_name, head_rows
from detkit_torchvision.detector import TorchvisionDetector
from detkit_torchvision.models import MODELS, build, final_size
from detkit_torchvision.params import COCO_FILES, suggest, weights_cache
from detkit_torchvision.params import MODELS as SPECS
from detkit_torchvision.weights import initialise


def as_in_their_file(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the layers of today to what torchvision's files of 2020 and 2021 call them, which had frozen norms."""
    if name.endswith("_v2"):
        return state
    names = {}
    for key in state:
        old = re.sub(r"((?:inner|layer)_blocks\.\d)\.0\.", r"\1.", key)
        old = old.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        names[key] = re.sub(r"(_head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", old)
    return {names[key]: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


@torch.no_grad()
def their_model(name: str, image: Tensor, **sizes: int) -> Any:
    """Return torchvision's 91-class network with random weights whose scores on an image are spread out."""
    torch.manual_seed(3)
    limits = {"score_thresh": 0.05, "detections_per_img": 20}
    theirs = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=91, **limits, **sizes).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1e-4)  # so small that what is added to it shows
            module.weight.fill_(0.01)
            if name == "retinanet_resnet50_fpn":
                module.eps = 0.0  # as torchvision's constructor does for this file, and Faster R-CNN's

    heads = [theirs.get_submodule(key.removesuffix(".weight")) for key in head_rows(theirs) if key.endswith("weight")]
    spreads = {head: [0.0] for head in heads}  # RetinaNet's is applied to each level
    hooks = [head.register_forward_hook(lambda head, _, out: spreads[head].append(float(out.std()))) for head in heads]
    theirs([image])
    for head, hook in zip(heads, hooks, strict=True):
        hook.remove()
        head.weight.div_(max(spreads[head]) / 2)
    categories = MODELS[name].coco.meta["categories"]
    unused = [i for i, one in enumerate(categories) if one == "N/A" or i < 1 - MODELS[name].label_offset]
    for key, rows in head_rows(theirs).items():
        if key.endswith("bias"):
            theirs.state_dict()[key].view(-1, 91, rows)[:, unused] = -1000.0
    return theirs


@pytest.mark.parametrize("name", ["ssd300_vgg16", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"])
def test_the_same_detections_as_torchvision(name: str, tmp_path: Path) -> None:
    """torchvision's file, read by class names into a network of COCO's 80, finds what torchvision finds with it.

    The image has its final size already, as torchvision resizes in float32 and we in uint8.
    """
    width, height, sizes = (300, 300, {}) if "ssd" in name else (90, 64, {"min_size": 64, "max_size": 107})
    assert final_size(name, height, width, height) == (width, height)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
    theirs = their_model(name, pixels, **sizes)
    path = weights_cache() / COCO_FILES[name]
    path.parent.mkdir(parents=True)
    torch.save(as_in_their_file(name, theirs.state_dict()), path)

    known = coco_weights(name)
    assert known is not None
    classes = sorted(one for one in known.classes if one is not None)
    assert len(classes) == 80
    ours = build(name, 80, image_size=height, score_threshold=0.05, max_detections=20)
    job = Job(backend="torchvision", engine="", model=name, params={"weights": "coco"}, options={}, classes=classes)
    assert initialise(ours, job, Workspace(tmp_path / "run")).kept == classes
    [found] = TorchvisionDetector(ours, name, classes, height).detect([image])
    with torch.no_grad():
        [expected] = theirs([pixels])
    categories = MODELS[name].coco.meta["categories"]
    assert len(found) == 20
    assert len(set(found.names)) > 3
    assert np.ptp(found.scores) > 0.01
    assert list(found.names) == [categories[label] for label in expected["labels"]]
    assert np.allclose(found.scores, expected["scores"].numpy(), atol=1e-4)
    assert np.allclose(found.boxes, expected["boxes"].numpy(), atol=1e-4)


@pytest.mark.parametrize("name", sorted(COCO_FILES))
def test_models_are_torchvisions(name: str) -> None:
    """The state dict has the names and shapes of torchvision's, and takes all that its files hold."""
    num_outputs = 3 + MODELS[name].label_offset
    theirs = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=num_outputs).state_dict()
    ours = build(name, 3, image_size=MODELS[name].image_size)
    shapes = {key: value.shape for key, value in theirs.items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    report = copy_by_name(name, ours, as_in_their_file(name, theirs), ["a", "b", "c"], ["a", "b", "c"])
    assert report.skipped == []
    copied = ours.state_dict()
    assert all(torch.equal(copied[key], theirs[key]) for key in theirs)


def test_file_names_are_torchvisions_in_the_order_of_their_scores() -> None:
    """They are written down twice, so that looking for them needs no torch."""
    weights = {name: spec.coco for name, spec in MODELS.items() if spec.coco is not None}
    assert {name: coco_weights(name).file_name for name in weights} == COCO_FILES
    scores = {name: one.meta["_metrics"]["COCO-val2017"]["box_map"] for name, one in weights.items()}
    assert list(COCO_FILES) == list(weights) == sorted(scores, key=scores.__getitem__)
    assert all(f"COCO AP {scores[name]}" in SPECS[name].summary for name in scores)


def test_every_box_detector_of_torchvision_is_here() -> None:
    assert set(list_models(module=detection)) - {"keypointrcnn_resnet50_fpn"} == set(COCO_FILES)


def test_backbones_are_torchvisions() -> None:
    """Every network of its kinds; `detkit_torchvision.architecture` repeats the names, so that it needs no torch."""
    kinds = {f"torchvision.models.{kind}" for kind in ("resnet", "mobilenetv2", "mobilenetv3")}
    names = {name for name in list_models(module=models) if get_model_builder(name).__module__ in kinds}
    assert set(BACKBONES) == names
    pyramids = {name for name, spec in MODELS.items() if spec.coco is not None and not name.startswith("ssd")}
    assert set(OWN_BACKBONES) == pyramids


@pytest.mark.parametrize("name", sorted(set(OWN_BACKBONES) - {"retinanet_resnet50_fpn_v2"}))
def test_fresh_networks_are_torchvisions_to_the_bit(name: str) -> None:
    """What we put together is what its constructor makes, drawn in the same order."""
    num_outputs = 3 + MODELS[name].label_offset
    torch.manual_seed(7)
    theirs: Any = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=num_outputs)
    torch.manual_seed(7)
    ours: Any = build(name, 3, image_size=64)
    assert all(torch.equal(a, b) for a, b in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True))
    one, other = (getattr(model, "rpn", model) for model in (theirs, ours))
    assert one.anchor_generator.sizes == other.anchor_generator.sizes
    assert one.anchor_generator.aspect_ratios == other.anchor_generator.aspect_ratios
    for limit in ("_pre_nms_top_n", "_post_nms_top_n", "nms_thresh", "topk_candidates"):
        if "nms_thresh" not in limit or hasattr(theirs, "rpn"):
            assert getattr(one, limit, None) == getattr(other, limit, None)


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        ("fasterrcnn_resnet50_fpn", {"backbone": "resnet51"}, "did you mean 'resnet50'"),
        ("ssd300_vgg16", {"backbone": "resnet50"}, "ssd300_vgg16 has only its own"),
        ("fcos_tiny", {"backbone": "resnet18"}, "fcos_tiny has only its own"),
        ("retinanet_resnet50_fpn", {"backbone": "resnet18", "weights": "coco"}, "those weights are of resnet50"),
        ("retinanet_resnet50_fpn", {"backbone": "resnet18"}, "choose weights=imagenet, none or a file"),
        ("fcos_resnet50_fpn", {"anchor_sizes": "auto"}, "anchors of fcos_resnet50_fpn cannot be chosen"),
        ("ssdlite320_mobilenet_v3_large", {"anchor_ratios": "1,2"}, "anchors of ssdlite320.* cannot be chosen"),
        ("retinanet_resnet50_fpn", {"anchor_sizes": "8,16,32"}, "5 ascending sides"),
        ("fasterrcnn_resnet50_fpn", {"anchor_sizes": "8,16,32,24,64"}, "5 ascending sides"),
        ("fasterrcnn_resnet50_fpn", {"anchor_sizes": "8,16,32,64,-1"}, "> 0"),
        ("retinanet_resnet50_fpn", {"proposals": 2000}, "has one stage"),
        ("fasterrcnn_resnet50_fpn", {"augmentations": "hflip,copy_paste"}, "copy_paste needs masks"),
    ],
)
def test_what_a_model_cannot_have_is_refused_at_once(
    model: str, settings: dict[str, Any], reason: str, tiny: detkit.Dataset
) -> None:
    trainer = detkit.Trainer(model=f"torchvision/{model}", **settings)
    with pytest.raises(UsageError, match=reason):
        trainer.fit(tiny, tiny, quiet=True)
    assert not Path("runs").exists()


def test_suggestions_on_a_gpu_begin_with_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU gets only what it can train; a GPU the best of what is in the cache and needs no masks."""
    weights_cache().mkdir(parents=True)
    for name in (
        "ssd300_vgg16",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "fcos_resnet50_fpn",
        "maskrcnn_resnet50_fpn_v2",
    ):
        (weights_cache() / COCO_FILES[name]).touch()
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert suggest().model == "fcos_resnet50_fpn"
    monkeypatch.setenv("PATH", "")
    assert suggest().model == "fasterrcnn_mobilenet_v3_large_320_fpn"
    (weights_cache() / COCO_FILES["fasterrcnn_mobilenet_v3_large_320_fpn"]).unlink()
    assert suggest().model == "fcos_small"


@pytest.mark.parametrize("image_size", [299, 512])
def test_ssd300_takes_300_pixels_only(image_size: int, tiny: detkit.Dataset) -> None:
    trainer = detkit.Trainer(model="torchvision/ssd300_vgg16", iterations=1, weights="none", device="cpu")
    with pytest.raises(InvalidValue, match=rf"image_size={image_size}.*ssd300_vgg16 takes inputs of 300 pixels only"):
        trainer.fit(tiny, tiny, image_size=image_size, quiet=True)
    assert not Path("runs").exists()


def test_unknown_word_for_weights(tiny: detkit.Dataset) -> None:
    with pytest.raises(UnknownName, match="did you mean 'imagenet'"):
        detkit.Trainer(model="torchvision/retinanet_resnet50_fpn").fit(tiny, tiny, weights="imagnet", quiet=True)
