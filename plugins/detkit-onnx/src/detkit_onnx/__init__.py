"""The ONNX backend: opens what other backends export, with ONNX Runtime or OpenVINO. It trains nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from detkit.backends import LocalBackend
from detkit.graphs import ONNX
from detkit.hookspecs import hookimpl
from detkit.job import Model

INT8 = "onnx-int8"


@dataclass(frozen=True, kw_only=True)
class OnnxBackend(LocalBackend):
    """A local backend that also opens bare files."""

    opens: tuple[str, ...] = (".onnx",)

    def read_model(self, file: Path) -> Model:
        from detkit_onnx.files import read_model

        return read_model(file)


@hookimpl
def detkit_backends() -> Iterable[LocalBackend]:
    """Offer the one backend."""
    yield OnnxBackend(
        name=ONNX["backend"],
        summary="opens exported models with ONNX Runtime, and makes them int8; trains nothing",
        engine=ONNX["engine"],
        models={},
        install="pip install 'detkit-onnx[cpu]', 'detkit-onnx[openvino]' or 'detkit-onnx[gpu]'",
        requires=("onnxruntime",),
        formats=(INT8,),
        quantized=(INT8,),
    )
