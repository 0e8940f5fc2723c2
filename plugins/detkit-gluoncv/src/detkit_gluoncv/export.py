"""Finished models in other formats: MXNet's symbol and parameters, and ONNX without suppression.

Both take ``(b, 3, size, size)`` float32 RGB, 0 to 1, normalised by `detkit_gluoncv.batches.MEAN` and ``STD``; boxes
come in input pixels. What a reader has to know beside the graph is written as `detkit.graphs.Graph` says it.
"""

from __future__ import annotations

import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from detkit.files import atomic_write, write_json
from detkit.graphs import ONNX, PROPERTY, Graph, write_model
from detkit.graphs import describe as manifest
from detkit.job import Model
from detkit_gluoncv.batches import MEAN, STD
from detkit_gluoncv.networks import Net, load_artifact, settle
from detkit_gluoncv.runtime import mx

OPSET, IR_VERSION = 13, 8
"""The newest operator set that MXNet's exporter knows; it would stamp the newest that onnx knows."""


def describe(model: Model, format: str, file: str, *, suppressed: bool) -> Graph:
    """Return what a reader of the graph has to know.

    The best ``nms_topk`` boxes of each class enter suppression, the best ``max_detections`` of all classes are kept.
    """
    manifest = model.manifest
    return Graph(
        format=format,
        file=file,
        input="data",
        outputs=["boxes", "scores", "ids"],
        dtype="float32",
        image_size=int(manifest.native["image_size"]),
        resampling="opencv",
        mean=list(MEAN),
        std=list(STD),
        clipped=False,
        suppressed=suppressed,
        nms_threshold=manifest.params["nms_threshold"],
        class_candidates=max(int(manifest.params["nms_topk"]), manifest.max_detections),
        max_detections=manifest.max_detections,
    )


def export_mxnet(model: Model, folder: Path) -> Path:
    """Write ``model-symbol.json``, ``model-0000.params`` and ``model.json``; suppression is in the graph.

    Load it with ``mx.gluon.SymbolBlock.imports(symbol, ["data"], params)``; it returns ids, scores and boxes,
    ``(b, max_detections, 1 | 1 | 4)``, id -1 where there is none. GluonCV's suppression drops scores up to .01.
    """
    graph = describe(model, "mxnet", "model-symbol.json", suppressed=True)
    net = load_artifact(model)
    topk = (graph.class_candidates or 0) * len(model.classes)
    # At a threshold of 1 GluonCV would leave the rest of its suppression out, too.
    net.set_nms(min(graph.nms_threshold, 0.9999), topk, graph.max_detections)
    with tempfile.TemporaryDirectory(dir=_made(folder)) as temporary:
        for file in _export(net, graph.image_size, Path(temporary)):
            file.replace(folder / file.name)
    known = {"model": model.name, "classes": model.classes, "score_threshold": model.manifest.score_threshold}
    write_json(folder / "model.json", known | msgspec.to_builtins(graph))
    return folder / graph.file


def export_onnx(model: Model, folder: Path) -> Path:
    """Write ``model.onnx``, whose batch size is free, and what makes the folder a model that detkit-onnx opens.

    Its input is ``data``, its outputs are ``ids``, ``scores`` and ``boxes`` of every anchor and class,
    ``(b, classes * anchors, 1 | 1 | 4)``, one class after the other, id -1 below the score floor. Suppression within
    each class is the reader's: the exporter's own would let boxes of one class suppress those of another.
    """
    _mend_exporter()
    import onnx

    described = describe(model, "onnx", "model.onnx", suppressed=False)
    size = described.image_size
    net = load_artifact(model)
    net.set_nms(nms_thresh=-1)
    with tempfile.TemporaryDirectory(dir=_made(folder)) as temporary:
        symbol, parameters = _export(net, size, Path(temporary))
        file = Path(temporary) / "model.onnx"
        mx.onnx.export_model(
            str(symbol),
            str(parameters),
            in_shapes=[(1, 3, size, size)],
            in_types=np.float32,
            onnx_file_path=str(file),
            dynamic=True,
            dynamic_input_shapes=[("batch", 3, size, size)],
        )
        graph = onnx.load(str(file))
    del graph.opset_import[:]
    graph.opset_import.extend([onnx.helper.make_opsetid("", OPSET)])
    graph.ir_version = IR_VERSION
    _tidy(onnx, graph.graph, len(model.classes) * int(model.manifest.native["anchors"]))
    onnx.helper.set_model_props(graph, {PROPERTY: msgspec.json.encode(manifest(model, described, **ONNX)).decode()})
    onnx.checker.check_model(graph)
    with atomic_write(folder / described.file) as target:
        target.write(graph.SerializeToString())
    write_model(model, described, folder, **ONNX)
    return folder / described.file


EXPORTERS: Mapping[str, Callable[[Model, Path], Path]] = {"mxnet": export_mxnet, "onnx": export_onnx}


def _export(net: Net, image_size: int, folder: Path) -> tuple[Path, Path]:
    net.hybridize()
    net(mx.nd.zeros((1, 3, image_size, image_size)))
    settle()
    net.export(str(folder / "model"))
    return folder / "model-symbol.json", folder / "model-0000.params"


def _tidy(onnx: Any, graph: Any, num_boxes: int) -> None:
    """Name the outputs and their shapes; take weights from the inputs, where a reader could not fold them."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [one for one in graph.input if one.name not in weights]
    del graph.input[:]
    graph.input.extend(inputs)
    names = {output.name: name for output, name in zip(graph.output, ("ids", "scores", "boxes"), strict=True)}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    del graph.output[:]
    for name, width in (("ids", 1), ("scores", 1), ("boxes", 4)):
        shape = ["batch", num_boxes, width]
        graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _mend_exporter() -> None:
    """Give MXNet's exporter, of 2022, what it looks for in onnx: a module that is gone, an operator set it knows."""
    import onnx
    import onnx.helper

    if "onnx.mapping" not in sys.modules:
        mapping: Any = types.ModuleType("onnx.mapping")
        numbers = onnx.helper.get_all_tensor_dtypes()
        mapping.TENSOR_TYPE_TO_NP_TYPE = {number: onnx.helper.tensor_dtype_to_np_dtype(number) for number in numbers}
        mapping.NP_TYPE_TO_TENSOR_TYPE = {dtype: number for number, dtype in mapping.TENSOR_TYPE_TO_NP_TYPE.items()}
        sys.modules["onnx.mapping"] = onnx.mapping = mapping
    onnx.defs.onnx_opset_version = lambda: OPSET
