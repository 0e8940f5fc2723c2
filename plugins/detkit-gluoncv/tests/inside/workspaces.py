"""Runs laid out by hand, for tests inside MXNet's interpreter, where pytest is not."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image, ImageDraw

import detkit
from detkit.data import Dataset, Sample
from detkit.job import Job, Workspace
from detkit_gluoncv.params import MODELS

CLASSES = ("disc", "square")


_ROOT = tempfile.TemporaryDirectory(prefix="detkit-gluoncv-")


def folder() -> Path:
    """Return a new folder, which is gone when the tests are over."""
    return Path(tempfile.mkdtemp(dir=_ROOT.name))


def draw(num_images: int = 4, size: int = 120) -> Dataset:
    """Draw pictures with a square each; the last has none."""
    root, samples = folder(), []
    rng = np.random.default_rng(0)
    for i in range(num_images):
        image = Image.fromarray(rng.integers(100, 150, (size, size + 40, 3), dtype=np.uint8))
        x, y = (int(v) for v in rng.integers(5, size - 55, 2))
        ImageDraw.Draw(image).rectangle((x, y, x + 49, y + 39), fill=((200, 30, 30), (30, 30, 200))[i % 2])
        path = root / f"{i}.png"
        image.save(path)
        boxes = [] if i == num_images - 1 else [(x, y, x + 50, y + 40)]
        samples.append(
            Sample(
                path=str(path),
                width=size + 40,
                height=size,
                boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
                names=tuple(CLASSES[i % 2] for _ in boxes),
                image_id=path.name,
            )
        )
    return Dataset.from_samples(CLASSES, samples)


def lay_out(data: Dataset, model: str = "ssd_300_mobilenet0.25", **params: Any) -> tuple[Job, Workspace]:
    """Return a job and its run directory, data in place, for `Training`."""
    defaults = msgspec.to_builtins(MODELS[model].params)
    given = {"max_detections": 100, "weights": None, "augmentations": (), "batch_size": 2, **params}
    if given.get("iterations"):
        defaults["epochs"] = None
    job = Job(
        backend="gluoncv",
        engine="detkit_gluoncv.engine:GluoncvEngine",
        model=model,
        params={**defaults, **given},
        options={"device": "cpu", "threads": 1, "num_workers": 0},
        classes=list(data.classes),
        versions={"detkit-sdk": detkit.__version__},
    )
    workspace = Workspace(folder() / "run")
    workspace.create(job)
    for channel in ("train", "validation"):
        workspace.write_dataset(channel, data, ["0"] * len(data))
    return job, workspace
