"""What the stand-ins really train and predict with: an engine of detkit."""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from detkit import images, plugins
from detkit.backends import Detector, PredictOptions
from detkit.data import Dataset
from detkit.detections import Detections
from detkit.errors import InvalidData
from detkit.events import Event
from detkit.job import Model
from detkit.trainer import Trainer
from detkit_sagemaker.container.archives import unpack

DEFAULT = "echo/memory"

_MOST_PIXELS = 178_956_970
"""As many as Pillow decodes of one image."""


def chosen() -> str:
    """Return the ``backend/model`` that stands in for AWS's."""
    return os.environ.get("DETKIT_STAND_IN_ENGINE") or DEFAULT


def train(
    train: Dataset,
    validation: Dataset,
    settings: Mapping[str, Any],
    *,
    parent: Path | None,
    tell: Callable[[Event], object],
    to: Path,
) -> None:
    """Train the engine and pack its model into the file ``to``; ``tell`` hears of every event.

    Of the ``settings``, by their canonical names, those count that the engine has. Raises `RunFailed`. SIGTERM, which
    raises `SystemExit` here, ends it after a step.
    """
    backend, _, model = chosen().partition("/")
    known = plugins.backend(backend).spec(model).params.__struct_fields__
    every_epoch = {"validate_every": "1 epoch", **settings}
    fitting = {name: value for name, value in every_epoch.items() if name in known}
    if parent is not None:
        fitting["weights"] = str(parent)
    with tempfile.TemporaryDirectory(prefix="stand-in-") as folder:
        os.chdir(folder)  # no detkit.yaml of anybody's lies above it
        trainer = Trainer(model=chosen(), on_invalid="drop", **fitting)
        run = trainer.start(_plain(train), _plain(validation), name=str(Path(folder) / "run"), leash=True)
        try:
            for event in run.events():
                tell(event)
            run.wait()
        except SystemExit:
            run.stop()
            raise
        finally:
            os.chdir("/")
        with tarfile.open(to, "w") as tar:
            tar.add(run.path / "model", ".")


def _plain(data: Dataset) -> Dataset:
    return replace(data, split_indices={})


def unpack_model(packed: Path, folder: Path) -> Path:
    """Unpack a model that `train` packed and return its folder. Raises `InvalidData`."""
    unpack(packed, folder)
    if not (folder / "detkit.json").is_file():
        raise InvalidData(f"{packed} is no model of a stand-in")
    return folder


class Opened:
    """A model that `train` packed, opened; everything that it finds is kept, however unlikely."""

    def __init__(self, packed: Path, max_detections: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="stand-in-")
        model = Model(unpack_model(packed, Path(self._folder.name)))
        options = PredictOptions(score_threshold=0.0, max_detections=max_detections)
        self._detector: Detector = plugins.backend(model.manifest.backend).open(model, options)
        self.classes = model.classes

    def detect(self, file: bytes) -> Detections:
        """Return what is found on an image file. Raises `ImageError`."""
        header = images.read_header(file)
        if header.width * header.height > _MOST_PIXELS:
            raise InvalidData(f"the image has more than {_MOST_PIXELS} pixels")
        pixels = images.read_image(file)
        found = self._detector.detect([pixels])[0]
        return replace(found, height=pixels.shape[0], width=pixels.shape[1])
