"""What ``detkit backends install detectron2 --source PATH`` puts beside the checkout."""

from __future__ import annotations

from detkit.environments import Environment
from detkit_detectron2.sources import read_checkout

_CUDA = (
    "cuda-bindings==13.5.0",
    "cuda-pathfinder==1.9.0",
    "nvidia-cublas==13.1.1.3",
    "nvidia-cuda-cupti==13.0.85",
    "nvidia-cuda-nvrtc==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cudnn-cu13==9.24.0.43",
    "nvidia-cufft==12.0.0.61",
    "nvidia-cufile==1.15.1.6",
    "nvidia-curand==10.4.0.35",
    "nvidia-cusolver==12.0.4.66",
    "nvidia-cusparse==12.6.3.3",
    "nvidia-cusparselt-cu13==0.8.1",
    "nvidia-nccl-cu13==2.30.7",
    "nvidia-nvjitlink==13.5.37",
    "nvidia-nvshmem-cu13==3.4.5",
    "nvidia-nvtx==13.0.85",
    "triton==3.8.0",
)
"""What torch's own wheel for Linux loads."""

ENVIRONMENT = Environment(
    pythons=("3.11", "3.12"),
    checkout=read_checkout,
    requirements=(
        "torch==2.14.1",
        "torchvision==0.29.1",
        # What torch imports.
        "filelock==4.2.11",
        "fsspec==2026.9.0",
        "jinja2==3.1.6",
        "markupsafe==3.0.4",
        "mpmath==1.3.0",
        "networkx==3.6.1",
        "setuptools==81.0.0",  # the last that has pkg_resources, which detectron2.model_zoo imports
        "sympy==1.14.0",
        "typing_extensions==4.16.0",
        *(f'{line}; sys_platform == "linux"' for line in _CUDA),
        # What Detectron2 imports; its setup.py also asks for black, and for what only its drawing and logging take.
        "antlr4-python3-runtime==4.9.3",
        "cloudpickle==3.1.2",
        "fvcore==0.1.5.post20221221",
        "hydra-core==1.3.8",
        "iopath==0.1.9",
        "omegaconf==2.3.1",
        "packaging==26.3",
        "portalocker==4.4.2",
        "pycocotools==2.0.11",
        "pyyaml==6.0.3",
        "tabulate==0.10.0",
        "termcolor==3.3.0",
        "tqdm==4.70.1",
        "yacs==0.1.8",
        # The plugin's own: weights, and export to ONNX.
        "ml_dtypes==0.6.0",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "onnxscript==0.7.2",
        "protobuf==7.36.2",
        "safetensors==0.8.0",
        # detkit's worker, and its scores.
        "hotcoco==1.3.0",
        "msgspec==0.22.0",
        "numpy==2.4.6",
        "pillow==13.0.0",
        "pluggy==1.7.0",
    ),
)
"""Pinned and complete. Nothing is compiled: Detectron2's own operators serve rotated boxes and deformable layers."""
