"""Detectron2's configuration of a model: its own file, the parameters, native keys, and what the data says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.data.transforms import ResizeShortestEdge

from detkit import usercode
from detkit.data import Dataset
from detkit.errors import DetkitError, InvalidValue
from detkit.job import Job, Model, Workspace
from detkit.scores import SCORE_FLOOR
from detkit_detectron2 import sources, yamls
from detkit_detectron2.keys import unknown
from detkit_detectron2.weights import CONFIG
from detkit_detectron2.zoo import ENTRIES, FROM_CONFIG, TINY
from detkit_torchvision import architecture

FROM_SCRATCH: Mapping[str, Any] = {
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.FPN.NORM": "GN",
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
}
"""What a model of the zoo needs that learns from random weights: frozen norms of no statistics diverge at once."""

_ASPECT = 1333 / 800
"""The longest side over the shortest that Detectron2's own sizes allow."""

_OCTAVES = [2 ** (i / 3) for i in range(3)]
"""RetinaNet's scales at each level."""

_PROPOSALS_PER_OBJECT = 10
"""What ``proposals=auto`` takes."""


def starts_from_scratch(job: Job, workspace: Workspace) -> bool:
    """Whether a model of the zoo begins with random weights."""
    has_parent = (workspace.parent_model / "detkit.json").is_file()
    return job.params["weights"] is None and not has_parent and job.model not in TINY


def build_cfg(job: Job, workspace: Workspace, data: Dataset) -> CfgNode:
    """Return the whole configuration of a model to train, for ``MODEL.DEVICE`` cpu and down to the score floor.

    Raises `UnknownName` and `InvalidValue` for native keys that neither Detectron2 nor ``add_config`` has, or of
    another type, and `UserCodeFailed` where that function fails.
    """
    params = job.params
    cfg = get_cfg()
    _add_own_keys(cfg, params.get("add_config"))
    if (workspace.parent_model / CONFIG).is_file():
        _merge(cfg, yamls.read(workspace.parent_model / CONFIG).values)
    elif job.model != FROM_CONFIG:
        entry = ENTRIES[job.model]
        _merge(cfg, yamls.read(sources.configs() / entry.config).values)
        for key, value in entry.changes.items():
            put(cfg, key, value)
    if starts_from_scratch(job, workspace):
        for key, value in FROM_SCRATCH.items():
            put(cfg, key, value)
    for key, text in params["overrides"].items():
        put(cfg, key, text)
    if job.model != FROM_CONFIG and ENTRIES[job.model].family == "mask_rcnn":
        cfg.MODEL.MASK_ON = True  # also where the earlier model learned none: then this head is fresh
    _put_params(cfg, params, data)
    put_classes(cfg, len(job.classes))
    put_thresholds(cfg, SCORE_FLOOR, params["nms_threshold"], params["max_detections"])
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def read_cfg(model: Model) -> CfgNode:
    """Return the configuration of a finished model, with the keys that the code of its training adds."""
    cfg = get_cfg()
    _add_own_keys(cfg, model.manifest.params.get("add_config"))
    _merge(cfg, yamls.read(model.path / CONFIG).values)
    return cfg


def put(cfg: CfgNode, key: str, value: Any) -> None:
    """Set a native key. Raises `UnknownName` and `InvalidValue`; a whole number is taken for a number."""
    try:
        before = yamls.flatten(cfg)[key]
    except KeyError:
        raise unknown(key, yamls.flatten(cfg)) from None
    if isinstance(value, str):
        value = CfgNode._decode_cfg_value(value)
    if isinstance(before, float) and isinstance(value, int):
        value = float(value)
    try:
        cfg.merge_from_list([key, value])
    except (ValueError, AssertionError) as error:
        raise InvalidValue(key, value, f"expected a {type(before).__name__} such as {before!r} ({error})") from None


def put_classes(cfg: CfgNode, num_classes: int) -> None:
    """Say how many classes there are; Detectron2 counts no background."""
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = num_classes


def put_thresholds(cfg: CfgNode, score: float, nms: float | None, max_detections: int) -> None:
    """Say what a model keeps of what it finds; ``nms`` None is the model's own."""
    for heads in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        heads.SCORE_THRESH_TEST = score
        if nms is not None:
            heads.NMS_THRESH_TEST = nms
    cfg.TEST.DETECTIONS_PER_IMAGE = max_detections


def test_size(cfg: CfgNode, width: int, height: int) -> tuple[int, int]:
    """Return the width and height at which a model looks at an image."""
    if cfg.INPUT.MIN_SIZE_TEST == 0:
        return width, height
    shape = ResizeShortestEdge.get_output_shape(height, width, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return shape[1], shape[0]


def _merge(cfg: CfgNode, values: Mapping[str, Any]) -> None:
    for key, value in yamls.flatten(values).items():
        put(cfg, key, value)


def _add_own_keys(cfg: CfgNode, reference: str | None) -> None:
    """Let the function that ``add_config`` names add its keys, as those of Detectron2's projects do."""
    if reference is None:
        return
    add = usercode.find_function(reference, "add_config")
    try:
        add(cfg)
    except DetkitError:
        raise
    except Exception as error:
        raise usercode.failure(f"add_config={reference}, given Detectron2's configuration,", error) from error


def _put_params(cfg: CfgNode, params: Mapping[str, Any], data: Dataset) -> None:
    if params["frozen_stages"] is not None:
        cfg.MODEL.BACKBONE.FREEZE_AT = params["frozen_stages"]
    cfg.MODEL.MASK_ON = bool(cfg.MODEL.MASK_ON and params["masks"])
    cfg.INPUT.MASK_FORMAT = "bitmask"
    size, longest = params["image_size"], params["max_image_size"]
    if size != "auto":
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (size,), size
        cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
        longest = longest or round(size * _ASPECT)
    sampling = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    if sampling not in {"choice", "range"} or (sampling == "range" and len(cfg.INPUT.MIN_SIZE_TRAIN) != 2):
        sizes = tuple(cfg.INPUT.MIN_SIZE_TRAIN)
        expected = "expected choice, or range with the two ends of it"
        raise InvalidValue("INPUT.MIN_SIZE_TRAIN_SAMPLING", sampling, f"{expected}; INPUT.MIN_SIZE_TRAIN is {sizes}")
    if longest is not None:
        cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = longest
    if params["proposals"] is not None:
        _put_proposals(cfg, params["proposals"], data)
    _put_anchors(cfg, params["anchor_sizes"], params["anchor_ratios"], data)
    if params["gradient_clip"] is not None:
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False  # which clips each weight by itself; the loop clips their norm
    cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY = params["momentum"], params["weight_decay"]
    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = params["batch_size"], params["seed"]
    cfg.SOLVER.GAMMA = params["lr_scheduler_factor"]


def _put_proposals(cfg: CfgNode, wanted: int | str, data: Dataset) -> None:
    rpn = cfg.MODEL.RPN
    if wanted == "auto":
        wanted = max(rpn.POST_NMS_TOPK_TEST, math.ceil(_PROPOSALS_PER_OBJECT * len(data.boxes) / len(data)))
    number = int(wanted)
    rpn.POST_NMS_TOPK_TEST = number
    rpn.PRE_NMS_TOPK_TEST = max(rpn.PRE_NMS_TOPK_TEST, number)
    rpn.PRE_NMS_TOPK_TRAIN = max(rpn.PRE_NMS_TOPK_TRAIN, number)
    rpn.POST_NMS_TOPK_TRAIN = max(rpn.POST_NMS_TOPK_TRAIN, number)


def _put_anchors(cfg: CfgNode, sizes: Sequence[float] | str, ratios: Sequence[float] | str, data: Dataset) -> None:
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    if "auto" in (sizes, ratios):
        inputs = [test_size(cfg, width, height) for width, height in data.sizes.tolist()]
        scales = np.repeat(np.tile(np.array(inputs) / data.sizes, 2), data.boxes_per_image(), axis=0)
        boxes = (data.boxes * scales)[~data.crowd]
        if ratios == "auto":
            ratios = architecture.anchor_ratios(boxes) if len(boxes) else ()
        if sizes == "auto":
            sizes = architecture.anchor_sizes(boxes) if len(boxes) else ()
            if len(sizes) and cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
                sizes = [size * octave for size in sizes for octave in _OCTAVES]
    if len(ratios):
        anchors.ASPECT_RATIOS = [[float(ratio) for ratio in ratios]]
    if sizes:
        one_stage = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
        levels = len((cfg.MODEL.RETINANET if one_stage else cfg.MODEL.RPN).IN_FEATURES)
        if len(sizes) % levels:
            raise InvalidValue(
                "anchor_sizes", list(sizes), f"expected as many, or twice, three times, as {levels} levels"
            )
        each = len(sizes) // levels
        anchors.SIZES = [[float(size) for size in sizes[i : i + each]] for i in range(0, len(sizes), each)]
