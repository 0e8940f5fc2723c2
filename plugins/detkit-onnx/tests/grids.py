"""A real detector in ONNX, without training: it finds bright cells of a grid of 4 x 4."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import detkit
from detkit import Dataset, Sample
from detkit.graphs import ONNX, PROPERTY, Graph, describe, write_model

GRAPH = Graph(
    format="onnx",
    file="model.onnx",
    input="images",
    outputs=["boxes", "scores", "labels"],
    dtype="uint8",
    image_size=64,
    nms_threshold=0.5,
    max_detections=16,
)


def pictures(folder: Path, count: int = 12, seed: int = 0) -> Dataset:
    """Draw dark pictures of two sizes with some bright cells; the last has none."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        side = 16 * (1 + i % 2)
        pixels = rng.integers(0, 40, (4 * side, 4 * side, 3), dtype=np.uint8)
        cells = rng.choice(16, size=0 if i == count - 1 else 1 + i % 4, replace=False)
        boxes = [(side * (c % 4), side * (c // 4), side * (c % 4 + 1), side * (c // 4 + 1)) for c in cells.tolist()]
        for x0, y0, x1, y1 in boxes:
            pixels[y0:y1, x0:x1] = rng.integers(120, 255)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        samples.append(
            Sample(
                image_id=f"{i}.png",
                path=str(folder / f"{i}.png"),
                width=4 * side,
                height=4 * side,
                boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
                names=("cell",) * len(boxes),
            )
        )
    return Dataset.from_samples(("cell",), samples)


def export_grid(run: detkit.Run, folder: Path, graph: Graph = GRAPH, *, gain: float = 1.0) -> Path:
    """Write the detector into a folder as the export of a run; ``gain`` multiplies its scores."""
    folder.mkdir(parents=True, exist_ok=True)
    network = make_network(gain)
    manifest = msgspec.json.encode(describe(run.model, graph, **ONNX)).decode()
    helper.set_model_props(network, {PROPERTY: manifest})
    onnx.save(network, str(folder / graph.file))
    write_model(run.model, graph, folder, **ONNX)
    return folder / graph.file


def make_network(gain: float = 1.0) -> onnx.ModelProto:
    """Two convolutions: one that copies the image, and the mean of each cell and channel."""
    copy = np.zeros((3, 3, 1, 1), np.float32)
    copy[range(3), range(3)] = 1 / 255
    mean = np.full((1, 3, 16, 16), gain / (3 * 256), np.float32)
    low = 16 * np.stack(np.meshgrid(range(4), range(4)), axis=-1).reshape(16, 2)
    constants = {
        "copy": copy,
        "mean": mean,
        "cells": np.concatenate([low, low + 16], axis=1).astype(np.float32)[None],
        "flat": np.array([0, 16], np.int64),
        "one": np.array([1, 16], np.int64),
        "zero": np.zeros(1, np.float32),
        "boxed": np.array([16, 4], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["floats", "copy"], ["copied"], "first"),
        helper.make_node("Relu", ["copied"], ["positive"], "relu"),
        helper.make_node("Conv", ["positive", "mean"], ["means"], "last", strides=[16, 16]),
        helper.make_node("Reshape", ["means", "flat"], ["scores"], "reshape"),
        helper.make_node("Mul", ["scores", "zero"], ["labels"], "labels"),
        helper.make_node("Shape", ["images"], ["batch"], "batch", end=1),
        helper.make_node("Concat", ["batch", "boxed"], ["shape"], "shape", axis=0),
        helper.make_node("Expand", ["cells", "shape"], ["boxes"], "expand"),
    ]
    graph = helper.make_graph(
        nodes,
        "grid",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["b", 3, 64, 64])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["b", 16, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["b", 16]),
            helper.make_tensor_value_info("labels", TensorProto.FLOAT, ["b", 16]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model
