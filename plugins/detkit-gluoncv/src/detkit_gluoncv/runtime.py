"""MXNet and GluonCV as they have to be started today: variables first, the names that numpy dropped, errors explained.

The other heavy modules of this plugin import MXNet's and GluonCV's names from here, which therefore come in order.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import ImageFile

from detkit.errors import DetkitError, UsageError
from detkit_gluoncv import numpy_names  # noqa: F401 - mxnet looks for them

os.environ.setdefault("MXNET_CPU_WORKER_NTHREADS", "1")
os.environ.setdefault("MXNET_SUBGRAPH_VERBOSE", "0")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # numpy's, scipy's and distutils' deprecations, which nobody will mend
    import mxnet as mx  # before gluoncv, which would hide why mxnet cannot be imported
    from gluoncv.data import COCODetection, VOCDetection
    from gluoncv.data.transforms import bbox as box_transforms
    from gluoncv.data.transforms import image as image_transforms
    from gluoncv.data.transforms.experimental.bbox import random_crop_with_constraints
    from gluoncv.data.transforms.experimental.image import random_color_distort
    from gluoncv.loss import SSDMultiBoxLoss
    from gluoncv.model_zoo.model_store import get_model_file
    from gluoncv.model_zoo.ssd.ssd import get_ssd
    from gluoncv.model_zoo.ssd.target import SSDTargetGenerator
    from gluoncv.model_zoo.ssd.vgg_atrous import vgg16_atrous_300, vgg16_atrous_512
    from gluoncv.nn.coder import MultiPerClassDecoder

__all__ = [
    "COCODetection",
    "MXNetError",
    "MultiPerClassDecoder",
    "SSDMultiBoxLoss",
    "SSDTargetGenerator",
    "VOCDetection",
    "box_transforms",
    "choose_context",
    "explained_errors",
    "get_model_file",
    "get_ssd",
    "image_transforms",
    "last_line",
    "mx",
    "random_color_distort",
    "random_crop_with_constraints",
    "versions",
    "vgg16_atrous_300",
    "vgg16_atrous_512",
]

# mxnet's own handler of a crash may wait for a lock that is held, and never end.
signal.signal(signal.SIGSEGV, signal.SIG_DFL)
faulthandler.enable(all_threads=False)

ImageFile.LOAD_TRUNCATED_IMAGES = False  # gluoncv sets it; half an image is an error here

MXNetError = mx.base.MXNetError


def choose_context(wanted: str) -> mx.Context:
    """Return the device; ``auto`` is the first GPU, else the CPU. Raises `UsageError` for one that is not there."""
    gpus = mx.context.num_gpus()
    if wanted in {"auto", "cuda"} and gpus:
        return mx.gpu(0)
    if wanted in {"auto", "cpu"}:
        return mx.cpu()
    kind, _, number = wanted.partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise UsageError(f"device={wanted!r} is no device; choose auto, cpu, cuda or cuda:N")
    if int(number or 0) >= gpus:
        raise UsageError(
            f"device={wanted!r}: mxnet {mx.__version__} sees {gpus} CUDA device(s), as the package `mxnet` is built "
            "without CUDA; choose device=cpu or device=auto"
        )
    return mx.gpu(int(number or 0))


@contextlib.contextmanager
def explained_errors() -> Iterator[None]:
    """Raise MXNet's errors with the line that says what happened; the stack of its C++ is logged with the cause."""
    try:
        yield
    except MXNetError as error:
        raise DetkitError(f"MXNet: {last_line(error)}") from error


def last_line(error: Exception) -> str:
    """Return what an error of MXNet says; what comes before is the stack of its C++."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("MXNetError: ") if lines else "an error without a message"


def versions() -> dict[str, str]:
    """Return the versions of the frameworks; gluoncv's own ``__version__`` names another release."""
    from importlib.metadata import version

    return {"mxnet": mx.__version__, "gluoncv": version("gluoncv"), "numpy": np.__version__}
