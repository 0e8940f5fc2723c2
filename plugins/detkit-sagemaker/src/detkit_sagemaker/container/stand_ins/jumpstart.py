"""The stand-in for JumpStart's object detectors, those of MXNet and of PyTorch."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detkit.data import Dataset
from detkit.errors import InvalidData, UsageError
from detkit.events import Event
from detkit.io import read_dataset
from detkit_sagemaker.container.archives import unpack
from detkit_sagemaker.container.hosting import Answer, Refused, Request, host
from detkit_sagemaker.container.stand_ins import engine
from detkit_sagemaker.container.stand_ins.hyperparameters import read_jumpstart, read_script_arguments
from detkit_sagemaker.container.stand_ins.service import TrainingFolder, log, refuse

WEIGHTS, LABELS = "model.params", "labels.json"

_SPLIT_SEED = 0
_MOST_DETECTIONS = 100
_ON_DISK = "/opt/ml/"


def train(folder: TrainingFolder) -> None:
    """Train as the job says, on 80 % of the images. Raises `Failure` for what the script would refuse."""
    values = read_jumpstart(folder.hyperparameters)
    script = values["sagemaker_submit_directory"]
    if script.startswith(_ON_DISK) and not (folder.base / script.removeprefix(_ON_DISK)).is_file():
        raise refuse(f"there is no script at {script}; it comes in a channel of its own")
    _train(folder, values)


def run_script(folder: TrainingFolder, arguments: Sequence[str]) -> None:
    """Train as the script does that JumpStart's container is given. Raises `Failure` for what it would refuse.

    AWS's SDK has a script of its own call it, with hyperparameters as arguments: ``--epochs 2``.
    """
    names = [name.removeprefix("--") for name in arguments[::2]]
    _train(folder, read_script_arguments(dict(zip(names, arguments[1::2], strict=True))))


def _train(folder: TrainingFolder, values: Mapping[str, Any]) -> None:
    try:
        data = _read(folder.channel("training"))
        part, validation = data.split(0.8, 0.2, seed=_SPLIT_SEED)
    except (InvalidData, UsageError) as error:
        raise refuse(str(error)) from error
    settings = {"epochs": values["epochs"], "batch_size": values["batch-size"]}
    if values["adam-learning-rate"] is not None:
        settings["learning_rate"] = values["adam-learning-rate"]
    log(f"{len(part)} images to train on and {len(validation)} to validate on, of {len(data.classes)} categories")
    with tempfile.TemporaryDirectory(prefix="stand-in-") as scratch:
        parent = _parent(folder, Path(scratch))
        engine.train(part, validation, settings, parent=parent, tell=_tell, to=folder.model / WEIGHTS)
    (folder.model / LABELS).write_text(json.dumps(list(data.classes)))


def _read(folder: Path) -> Dataset:
    """Return the data with category ids, as text, for class names: the input has no others."""
    file = folder / "annotations.json"
    if not file.is_file() or not (folder / "images").is_dir():
        raise refuse("the channel 'training' needs annotations.json and a folder images")
    content: Any = json.loads(file.read_bytes())
    if not isinstance(content, dict) or not content.get("annotations") or not content.get("images"):
        raise refuse("annotations.json needs 'images' and 'annotations'")
    used = sorted({int(box["category_id"]) for box in content["annotations"]})
    names = tuple(map(str, range(used[-1] + 1)))
    data = read_dataset(folder, "jumpstart", classes=names, first_id=0)
    return replace(data.with_classes(tuple(map(str, used))), class_extra=None)


def _parent(folder: TrainingFolder, scratch: Path) -> Path | None:
    """Return the model to start from where the channel ``model`` has one of a stand-in, and no pretrained weights."""
    archives = sorted(folder.channel("model").rglob("*.tar.gz"))
    if len(archives) != 1:
        raise refuse(f"the channel 'model' holds {len(archives)} archives; expected one")
    try:
        unpack(archives[0], scratch / "parent")
        return engine.unpack_model(scratch / "parent" / WEIGHTS, scratch / "engine")
    except (InvalidData, OSError):
        log("the weights in the channel 'model' are not of a stand-in, so they are left aside")
        return None


def _tell(event: Event) -> None:
    """Print the validation's loss in the words of both frameworks: the engine's own, else 1 - AP50."""
    numbers = {name: float(value) for name, value in event.values.items() if not isinstance(value, str)}
    if event.kind != "metric":
        return
    epoch = max(math.ceil(event.epoch or 1) - 1, 0)
    if "train/loss" in numbers:
        log(f"[Epoch {epoch}][Batch {event.step}], CrossEntropy={numbers['train/loss']:.6f}")
    if any(name.startswith("val/") for name in numbers):
        loss = numbers.get("val/loss", 1 - numbers.get("val/AP50", 0.0))
        log(f"[Epoch {epoch}], Val_CrossEntropy={loss:.6f}")
        log(f"epoch: {epoch} val_loss: {loss:.6f}")


def serve(folder: Path) -> int:
    """Answer as JumpStart's inference scripts do."""
    return host(lambda: load(folder))


def load(folder: Path) -> Answer:
    """Open what `train` left."""
    labels = json.loads((folder / LABELS).read_bytes())
    opened = engine.Opened(folder / WEIGHTS, _MOST_DETECTIONS)

    def answer(request: Request) -> bytes:
        if request.content_type != "application/x-image":
            raise Refused(415, f"content type {request.content_type!r} is not supported; send application/x-image")
        found = opened.detect(bytes(request.body))
        accept = request.accept.replace(" ", "")
        limit = re.search(r";n_predictions=(\d+)", accept)
        n = len(found) if limit is None else int(limit[1])
        size = [found.width, found.height, found.width, found.height]
        boxes = [[v / side for v, side in zip(box, size, strict=True)] for box in found.boxes.tolist()]
        result: dict[str, Any] = {
            "normalized_boxes": boxes[:n],
            "classes": found.labels[:n].tolist(),
            "scores": found.scores[:n].tolist(),
        }
        if ";verbose" in accept:
            result["labels"] = labels
        return json.dumps(result).encode()

    return answer
