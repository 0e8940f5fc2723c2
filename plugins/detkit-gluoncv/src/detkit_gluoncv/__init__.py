"""The GluonCV backend: SSD on MXNet, which shares an environment with neither torch 2 nor numpy 2.

Nothing here imports mxnet; the engine does, in the worker, whose interpreter `detkit backends install gluoncv` makes.
"""

from __future__ import annotations

from collections.abc import Iterable

from detkit.backends import LocalBackend
from detkit.environments import Environment
from detkit.hookspecs import hookimpl
from detkit_gluoncv.builtin import DIALECT
from detkit_gluoncv.params import MODELS, GluoncvOptions, require, translate

ENVIRONMENT = Environment(
    pythons=("3.11", "3.12"),
    platforms=("linux-x86_64",),
    requirements=(
        "mxnet==1.9.1",
        "gluoncv==0.10.5.post0",
        "numpy==1.26.4",
        # What MXNet and GluonCV import; their metadata asks for opencv-python, matplotlib, pandas and more.
        "certifi==2026.10.18",
        "charset-normalizer==3.5.2",
        "graphviz==0.8.4",
        "idna==3.20",
        "portalocker==4.4.2",
        "requests==2.34.2",
        "scipy==1.17.1",
        "setuptools==80.9.0",  # Python 3.12 has no distutils, which mxnet imports
        "tqdm==4.70.1",
        "urllib3==2.8.0",
        # Export to ONNX.
        "ml_dtypes==0.5.4",
        "onnx==1.23.2",
        "protobuf==7.36.2",
        "typing_extensions==4.16.0",
        # detkit's worker, and its scores.
        "hotcoco==1.3.0",
        "msgspec==0.22.0",
        "pillow==13.0.0",
        "pluggy==1.7.0",
    ),
)
"""Pinned and complete. No newer mxnet or gluoncv will come: both projects have retired."""


@hookimpl
def detkit_backends() -> Iterable[LocalBackend]:
    """Offer the one backend."""
    yield LocalBackend(
        name="gluoncv",
        summary="GluonCV's SSD on MXNet, in an interpreter of its own",
        engine="detkit_gluoncv.engine:GluoncvEngine",
        models=MODELS,
        options=GluoncvOptions,
        install="detkit backends install gluoncv",
        environment=ENVIRONMENT,
        requires=("mxnet", "gluoncv"),
        resume="exact",
        incremental=True,
        formats=("mxnet", "onnx"),
        dialects=(DIALECT,),
        translation=translate,
        requirement=require,
    )
