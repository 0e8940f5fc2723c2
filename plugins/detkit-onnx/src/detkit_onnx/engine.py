"""What the worker calls: open an exported graph in ONNX Runtime, or make an int8 one of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from detkit.backends import Engine, PredictOptions
from detkit.errors import PluginError, Unsupported, UsageError
from detkit.graphs import Graph, GraphDetector, graph_of
from detkit.job import Job, Model, Trained, Workspace
from detkit.loading import count_cores

_OLDEST = (1, 31)
"""As in pyproject.toml; earlier ones read weights from anywhere on the disk, if a graph says so."""
_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_BEHIND = {"tensorrt": ("cuda", "cpu"), "cuda": ("cpu",), "cpu": ()}
"""What runs the nodes that a device's provider does not know."""


class OnnxEngine(Engine):
    """The worker's side."""

    def train(self, job: Job, workspace: Workspace) -> Trained:
        raise Unsupported("ONNX Runtime trains nothing; train with another backend, and export its model to onnx")

    def load(self, model: Model, options: PredictOptions) -> GraphDetector:
        graph = graph_of(model)
        file, device = model.path / graph.file, options.device
        if device.partition(":")[0] == "openvino":
            from detkit_onnx.openvino import OpenVinoSession

            return GraphDetector(graph, model.classes, OpenVinoSession(file, graph, device), options)
        return GraphDetector(graph, model.classes, Session(file, graph, device), options)

    def export(self, model: Model, format: str, to: Path) -> Path:
        from detkit_onnx import INT8

        if format != INT8:
            raise Unsupported(f"{model.name} cannot be exported to {format!r}; formats: {INT8}")
        from detkit_onnx.quantization import quantize

        return quantize(model, to)


class Session:
    """A graph that ONNX Runtime has opened."""

    def __init__(self, file: Path, graph: Graph, device: str) -> None:
        """Raises `UsageError` for a file that ONNX Runtime refuses, and for a device that it was not built for.

        Raises `PluginError` for an ONNX Runtime that is too old.
        """
        require_version(ort.__version__)
        self.options = options = ort.SessionOptions()
        options.log_severity_level = 3  # errors; it warns of every constant that it folds
        # By itself it takes the machine's cores, whatever a container may use, and binds threads to them.
        options.intra_op_num_threads = count_threads()
        wished = providers(device)
        try:
            self._session = ort.InferenceSession(str(file), options, providers=wished)
        except Exception as error:  # its errors have no common class
            raise UsageError(f"ONNX Runtime {ort.__version__} cannot open {file}: {first_line(error)}") from error
        if device != "auto" and wished[0][0] not in self._session.get_providers():  # it would go on with the next one
            raise UsageError(
                f"ONNX Runtime {ort.__version__} cannot use {device}: {wished[0][0]} was not started; it needs a "
                "device, and CUDA, cuDNN or TensorRT of the versions in ONNX Runtime's documentation"
            )
        self._file, self._outputs = file, graph.outputs
        wanted = [{graph.input, graph.sizes} - {""}, set(graph.outputs)]
        there = [{one.name for one in self._session.get_inputs()}, {one.name for one in self._session.get_outputs()}]
        if wanted[0] != there[0] or not wanted[1] <= there[1]:
            raise UsageError(
                f"{file} has the inputs {sorted(there[0])} and outputs {sorted(there[1])}, and its description speaks "
                f"of {sorted(wanted[0])} and {sorted(wanted[1])}; export it again"
            )

    def __call__(self, feed: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        try:
            found: Sequence[NDArray[Any]] = self._session.run(self._outputs, dict(feed))
        except Exception as error:
            shapes = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in feed.items())
            raise UsageError(f"{self._file} fails on {shapes}: {first_line(error)}") from error
        return found


def require_version(version: str) -> None:
    """Raise `PluginError` for a version of ONNX Runtime that is too old, such as ``1.9.0``."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise PluginError(
            f"ONNX Runtime {version} is older than {oldest}, the first that keeps a graph from reading other files; "
            f"`pip install 'onnxruntime>={oldest}'`, or onnxruntime-gpu in its place"
        )


def count_threads() -> int:
    """Return OpenMP's OMP_NUM_THREADS, of a list such as ``4,2`` the first; else the cores of this process."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else count_cores()


def providers(device: str) -> list[Any]:
    """Return ONNX Runtime's providers for ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``tensorrt`` ..., best first.

    Raises `UsageError` for one that this ONNX Runtime was not built for, with those that it has.
    """
    available = ort.get_available_providers()
    name, _, number = device.partition(":")
    if name == "auto":
        name = "cuda" if _PROVIDERS["cuda"] in available else "cpu"
    if _PROVIDERS.get(name) not in available or (number and not number.isdigit()):
        names = [known for known, provider in _PROVIDERS.items() if provider in available]
        raise UsageError(
            f"this ONNX Runtime {ort.__version__} has no device {device!r}: it has {', '.join(['auto', *names])} "
            f"({', '.join(available)}), and openvino; CUDA and TensorRT come with onnxruntime-gpu, installed instead "
            "of onnxruntime"
        )
    numbered = {"device_id": number} if number and name != "cpu" else {}
    chosen: list[Any] = [(_PROVIDERS[name], numbered)]
    return chosen + [(_PROVIDERS[one], numbered if one == "cuda" else {}) for one in _BEHIND[name]]


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return next(iter(str(error).splitlines()), type(error).__name__)
