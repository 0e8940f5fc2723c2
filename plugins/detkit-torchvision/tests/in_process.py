"""Jobs for an engine that trains in the test's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import to_builtins
from msgspec.structs import replace

from detkit.data import Dataset
from detkit.formats.checks import prepare
from detkit.job import Job, Workspace
from detkit_torchvision.params import MODELS as SPECS
from detkit_torchvision.params import TorchvisionOptions

SMALL = {"ssdlite320_mobilenet_v3_large": 320, "ssd300_vgg16": 300}
"""Input sizes of models that cannot have 64 pixels."""


def make_job(model: str, data: Dataset, **settings: Any) -> Job:
    size = SMALL.get(model, 64)
    quick = {"iterations": 1, "epochs": None, "batch_size": 2, "image_size": size, "weights": None}
    params = replace(SPECS[model].params, **{**quick, "max_detections": 100, **settings})
    return Job(
        backend="torchvision",
        engine="detkit_torchvision.engine:TorchvisionEngine",
        model=model,
        params=to_builtins(params),
        options=to_builtins(TorchvisionOptions(device="cpu")),
        classes=list(data.classes),
    )


def lay_out(folder: Path, job: Job, data: Dataset) -> Workspace:
    workspace = Workspace(folder)
    workspace.create(job)
    ready = prepare(data, on_invalid="raise")
    for channel in ("train", "validation"):
        workspace.write_dataset(channel, ready.data, ready.image_digests)
    return workspace


def replace_option(job: Job, **options: Any) -> Job:
    return replace(job, options={**job.options, **options})
