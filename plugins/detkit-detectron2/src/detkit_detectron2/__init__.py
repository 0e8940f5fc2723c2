"""The Detectron2 backend: its Faster R-CNN, RetinaNet and Mask R-CNN, trained by detkit's loop.

Nothing here imports torch or detectron2; the engine does, in the worker.
"""

from __future__ import annotations

from collections.abc import Iterable

from detkit.backends import LocalBackend
from detkit.hookspecs import hookimpl
from detkit_detectron2 import sources
from detkit_detectron2.environment import ENVIRONMENT
from detkit_detectron2.keys import adopt
from detkit_detectron2.params import MODELS, Detectron2Options, require, require_data, translate

sources.announce()


@hookimpl
def detkit_backends() -> Iterable[LocalBackend]:
    """Offer the one backend."""
    yield LocalBackend(
        name="detectron2",
        summary="Detectron2's Faster R-CNN, RetinaNet and Mask R-CNN",
        engine="detkit_detectron2.engine:Detectron2Engine",
        models=MODELS,
        options=Detectron2Options,
        install=sources.INSTALL,
        environment=ENVIRONMENT,
        requires=("detectron2", *sources.REQUIREMENTS, "torch", "torchvision", "safetensors"),
        resume="exact",
        incremental=True,
        formats=("onnx",),
        adoption=adopt,
        translation=translate,
        requirement=require,
        data_requirement=require_data,
    )
