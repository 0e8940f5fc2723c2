"""An exported graph in OpenVINO, which computes in bf16 where that is asked for: much faster on CPUs that have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detkit.errors import UsageError
from detkit.graphs import Graph
from detkit_onnx.engine import Session, count_threads, first_line

DEVICE = "openvino"
PRECISIONS = ("f32", "bf16")
"""What ``openvino:PRECISION`` may name. Left to itself OpenVINO takes bf16 where the CPU has it, and finds other boxes
than the model that was exported."""


class OpenVinoSession:
    """A graph that OpenVINO has compiled for the CPU."""

    def __init__(self, file: Path, graph: Graph, device: str) -> None:
        """Raises `UsageError` for a file that is refused, without OpenVINO, and for a precision that it does not have.

        ONNX Runtime opens the file first: it keeps a graph from reading other files, and looks at what it takes.
        """
        _, colon, precision = device.partition(":")
        if colon and precision not in PRECISIONS:
            expected = ", ".join(f"{DEVICE}:{one}" for one in PRECISIONS)
            raise UsageError(f"there is no device {device!r}; expected {DEVICE}, which is {DEVICE}:f32, or {expected}")
        try:
            import openvino
        except ImportError as error:
            raise UsageError(f"device {device!r} needs OpenVINO: `pip install 'detkit-onnx[openvino]'`") from error
        Session(file, graph, "cpu")
        core = openvino.Core()
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UsageError(f"this CPU does not compute in bf16; use {DEVICE}")
        settings = {
            "INFERENCE_PRECISION_HINT": precision or "f32",
            "INFERENCE_NUM_THREADS": count_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            self.compiled = core.compile_model(core.read_model(str(file)), "CPU", settings)
        except RuntimeError as error:
            raise UsageError(f"OpenVINO {openvino.__version__} cannot open {file}: {first_line(error)}") from error
        self._request = self.compiled.create_infer_request()
        self._file, self._outputs = file, graph.outputs

    def __call__(self, feed: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        try:
            found = self._request.infer(dict(feed))
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in feed.items())
            raise UsageError(f"{self._file} fails on {shapes}: {first_line(error)}") from error
        # The next call writes into the same memory.
        return [np.array(found[name]) for name in self._outputs]
