"""The torchvision backend: small detectors that learn from scratch on a CPU, and torchvision's own.

Nothing here imports torch; the engine does, in the worker.
"""

from __future__ import annotations

from collections.abc import Iterable

from detkit.backends import LocalBackend
from detkit.hookspecs import hookimpl
from detkit_torchvision.params import MODELS, TorchvisionOptions, require, require_data, suggest, translate


@hookimpl
def detkit_backends() -> Iterable[LocalBackend]:
    """Offer the one backend."""
    yield LocalBackend(
        name="torchvision",
        summary="small detectors that learn from scratch on a CPU, and torchvision's own",
        engine="detkit_torchvision.engine:TorchvisionEngine",
        models=MODELS,
        options=TorchvisionOptions,
        install="pip install detkit-torchvision",
        requires=("torch", "torchvision", "safetensors"),
        resume="exact",
        incremental=True,
        formats=("onnx", "torchscript"),
        suggestion=suggest,
        translation=translate,
        requirement=require,
        data_requirement=require_data,
    )
