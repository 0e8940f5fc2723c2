"""Models in eight bits: ONNX Runtime's static quantization, with activations measured on calibration images.

Weights become seven bits with a sign, as processors without VNNI would overflow with eight, each output channel with a
scale of its own; activations become bytes, between the smallest and largest value that the calibration images give.
Convolutions and matrix products are quantized, with what lies between the convolutions of a backbone; the last layer of
each head stays float, and so does all that makes boxes and scores of what it says, because a box needs more than 256
positions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray

from detkit.errors import PluginError, UsageError
from detkit.files import atomic_write
from detkit.graphs import CALIBRATION, ONNX, PROPERTY, Graph, describe, graph_of, prepare, write_model
from detkit.images import read_image
from detkit.job import Model
from detkit.progress import track

_LAYERS = {"Conv", "Gemm", "MatMul"}
_BETWEEN = {
    "Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "HardSigmoid", "LeakyRelu", "MaxPool", "Mul", "Relu",
    "ReduceMean", "Resize", "Sigmoid",
}  # fmt: skip
"""Operators that are quantized where they lie between convolutions, so that values need not become floats again."""
_CHOOSERS = {"TopK", "NonMaxSuppression", "RoiAlign", "MaxRoiPool"}
"""Behind these, boxes are chosen: what lies there is no backbone any more."""


def quantize(model: Model, folder: Path) -> Path:
    """Write ``model.onnx``, in eight bits, and its manifest. The images are in the folder's `CALIBRATION`."""
    try:
        import onnx
        import onnxruntime
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError as error:
        raise PluginError(
            f"quantizing needs onnx ({error}); install it with `pip install 'detkit-onnx[int8]'`"
        ) from None
    source = graph_of(model)
    images = sorted((folder / CALIBRATION).glob("*"))
    if not images:
        raise UsageError(f"there are no images in {folder / CALIBRATION} to measure activations on; name some with "
                         "`--calibrate DATA`")  # fmt: skip
    graph = msgspec.structs.replace(source, file="model.onnx")
    onnxruntime.set_default_logger_severity(3)  # it warns of every constant that it folds
    with tempfile.TemporaryDirectory(dir=folder) as passing:
        whole, small = Path(passing) / "whole.onnx", Path(passing) / "small.onnx"
        quant_pre_process(str(model.path / source.file), str(whole), skip_symbolic_shape=True)
        chosen = nodes_to_quantize(onnx.load(str(whole)).graph)
        quantize_static(
            str(whole),
            str(small),
            _Reader(graph, images),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=chosen,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        result = onnx.load(str(small))
    manifest = describe(model, graph, **ONNX)
    onnx.helper.set_model_props(result, {PROPERTY: msgspec.json.encode(manifest).decode()})
    with atomic_write(folder / graph.file) as file:
        file.write(result.SerializeToString())
    write_model(model, graph, folder, **ONNX)
    return folder / graph.file


class _Reader:
    """Calibration images, one at a time, prepared as for prediction."""

    def __init__(self, graph: Graph, images: Sequence[Path]) -> None:
        shown = track(images, "calibrate", total=len(images))
        self._feeds: Iterator[dict[str, NDArray[Any]]] = (prepare(graph, [read_image(path)]) for path in shown)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._feeds, None)


def nodes_to_quantize(graph: Any) -> list[str]:
    """Return the names of a graph's nodes that are quantized, which see the top of this module."""
    makers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    chosen_boxes: set[str] = set()
    for node in graph.node:  # in the order of computation, as ONNX demands
        if node.op_type in _CHOOSERS or any(name in chosen_boxes for name in node.input):
            chosen_boxes.update(node.output)
    before_layer: set[str] = set()
    before_backbone: set[str] = set()
    names = []
    for node in reversed(graph.node):
        later = any(name in before_layer for name in node.output)
        backbone = any(name in before_backbone for name in node.output)
        layer = node.op_type in _LAYERS and any(name in constants for name in node.input[1:])
        if later and (layer or (backbone and node.op_type in _BETWEEN)):
            names.append(node.name)
        if later or layer:
            before_layer.update(node.input)
        if (backbone or node.op_type == "Conv") and not chosen_boxes.intersection(node.output):
            before_backbone.update(node.input)
    if not names:
        raise UsageError(
            f"nothing in this graph of {len(makers)} values can be quantized: no layer lies behind another one"
        )
    return names[::-1]
