"""Trained networks as ONNX files: Detectron2's own inference, traced with one image of any size."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from detectron2.modeling.meta_arch import GeneralizedRCNN, RetinaNet
from torch import Tensor, nn

from detkit.errors import PluginError, Unsupported
from detkit.files import atomic_write
from detkit.graphs import ONNX, PROPERTY, Graph, describe, write_model
from detkit.job import Model

_OPSET = 16
"""The first whose ``RoiAlign`` takes regions as Detectron2 does, by half pixels."""

_FILE = "model.onnx"


def export(network: Any, cfg: CfgNode, model: Model, format: str, folder: Path) -> Path:
    """Write a network, built with the score floor, the nms_threshold and the max_detections to export.

    Raises `Unsupported` for one that is neither a GeneralizedRCNN nor a RetinaNet, or cannot be traced, and
    `PluginError` where onnx is missing.
    """
    if format != "onnx":
        raise Unsupported(f"{model.name} cannot be exported to {format!r}; formats: onnx")
    if importlib.util.find_spec("onnx") is None:
        raise PluginError("export to ONNX needs onnx; install with `pip install 'detkit-detectron2[export]'`")
    if cfg.INPUT.MIN_SIZE_TEST == 0:
        raise Unsupported(f"{model.name} takes images at their own size, which exported graphs do not")
    infer = _inference(network, model)
    graph = _describe(network, cfg)
    content = _to_onnx(network, infer, cfg, graph, model)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / graph.file) as target:
        target.write(content)
    write_model(model, graph, folder, **ONNX)
    return folder / graph.file


def _inference(network: Any, model: Model) -> Any:
    """Return the function that `TracingAdapter` calls: a network and an image to detections."""
    if type(network).forward is GeneralizedRCNN.forward and type(network).inference is GeneralizedRCNN.inference:
        return _infer_two_stages
    if isinstance(network, RetinaNet) and type(network).forward is RetinaNet.forward:
        return _infer_one_stage
    raise Unsupported(
        f"{model.name} is a {type(network).__name__}; of Detectron2's, GeneralizedRCNN and RetinaNet can be exported"
    )


def _infer_two_stages(network: Any, inputs: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    return _outputs(network.inference(_with_channels(network, inputs), do_postprocess=False)[0])


def _infer_one_stage(network: Any, inputs: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    images = network.preprocess_image(_with_channels(network, inputs))
    features = network.backbone(images.tensor)
    features = [features[name] for name in network.head_in_features]
    return _outputs(network.forward_inference(images, features, network.head(features))[0])


def _with_channels(network: Any, inputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return a ``(1, 3, h, w)`` RGB image as the network takes it; `detkit.graphs` gives batches, here of one."""
    image = inputs[0]["image"][0]
    return [{"image": image.flip(0) if network.input_format == "BGR" else image}]


def _outputs(found: Any) -> tuple[Tensor, ...]:
    """Return the boxes, scores, labels and, where there are any, the masks of one image, as a batch of one."""
    fields = [found.pred_boxes.tensor, found.scores, found.pred_classes]
    if found.has("pred_masks"):
        masks = found.pred_masks
        fields.append(masks if isinstance(masks, Tensor) else masks.tensor[:, None])
    return tuple(field[None] for field in fields)


def _describe(network: Any, cfg: CfgNode) -> Graph:
    shortest, longest = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    heads = cfg.MODEL.RETINANET if isinstance(network, RetinaNet) else cfg.MODEL.ROI_HEADS
    return Graph(
        format="onnx",
        file=_FILE,
        input="images",
        outputs=["boxes", "scores", "labels", *(["masks"] if cfg.MODEL.MASK_ON else [])],
        dtype="float32",
        # Where the longest side is below the shortest, it alone decides.
        image_size=min(shortest, longest),
        max_ratio=max(longest / shortest, 1.0),
        max_batch=1,
        clipped=False,  # by one stage they are not, and Detectron2 leaves out what has no area within the image
        suppressed=True,
        nms_threshold=heads.NMS_THRESH_TEST,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        pasting="aligned",
    )


def _to_onnx(network: nn.Module, infer: Any, cfg: CfgNode, graph: Graph, model: Model) -> bytes:
    import onnx

    example = _example(cfg)
    adapter = TracingAdapter(network.eval(), [{"image": example}], infer)
    free: dict[str, dict[int, str]] = {name: {1: "found"} for name in graph.outputs}
    written: Any = io.BytesIO()
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                adapter.eval(),
                (example,),
                written,
                input_names=[graph.input],
                output_names=graph.outputs,
                dynamic_axes={graph.input: {2: "height", 3: "width"}, **free},
                opset_version=_OPSET,
                dynamo=False,
            )
    except Exception as error:
        raise Unsupported(f"{model.name} cannot be traced: {type(error).__name__}: {str(error)[:500]}") from error
    made = onnx.load_model_from_string(written.getvalue())
    told = made.metadata_props.add()
    told.key, told.value = PROPERTY, msgspec.json.encode(describe(model, graph, **ONNX)).decode()
    return bytes(made.SerializeToString())


def _example(cfg: CfgNode) -> Tensor:
    """Return an image to trace with: noise, in which an untrained network finds something, too."""
    height = min(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    width = min(round(height * 1.2), cfg.INPUT.MAX_SIZE_TEST)
    return 255 * torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch warns of: the age of its tracing, and Python's numbers in a trace, which are all fixed."""
    log = logging.getLogger("torch.fx._symbolic_trace")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
