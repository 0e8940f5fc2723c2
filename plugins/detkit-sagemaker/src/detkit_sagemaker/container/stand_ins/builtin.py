"""The stand-in for the built-in "Object Detection - MXNet"."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detkit.errors import InvalidData
from detkit.events import Event
from detkit_sagemaker.container.archives import unpack
from detkit_sagemaker.container.hosting import Answer, Refused, Request, host
from detkit_sagemaker.container.stand_ins import builtin_data, engine
from detkit_sagemaker.container.stand_ins.hyperparameters import read_builtin
from detkit_sagemaker.container.stand_ins.service import TrainingFolder, log, refuse

WEIGHTS, SYMBOL, SETTINGS = "model_algo_1-0000.params", "model_algo_1-symbol.json", "hyperparams.json"
"""The files of the algorithm's ``model.tar.gz``; what the first two hold is the stand-in's own."""

_SAME = ("base_network", "num_classes")
"""Hyperparameters that training from an earlier model may not change."""

_NAMES = {"mini_batch_size": "batch_size", "image_shape": "image_size"}
_HANDED_ON = ("epochs", "learning_rate", "optimizer", "momentum", "weight_decay", "nms_threshold", *_NAMES)

_CONTENT_TYPES = {"image/jpeg", "image/png", "application/x-image"}


def train(folder: TrainingFolder) -> None:
    """Train as the job says. Raises `Failure` for what the service would refuse."""
    values = read_builtin(folder.hyperparameters)
    log(f"Reading provided configuration: {dict(folder.hyperparameters)}")
    with tempfile.TemporaryDirectory(prefix="stand-in-") as scratch:
        data, validation = builtin_data.read(folder, values, Path(scratch))
        parent = _parent(folder, values, Path(scratch))
        settings = {_NAMES.get(name, name): values[name] for name in _HANDED_ON}
        lines = _Lines(folder.hosts[0], len(data))
        engine.train(data, validation, settings, parent=parent, tell=lines.tell, to=folder.model / WEIGHTS)
    lines.progress(100.0)
    (folder.model / SYMBOL).write_text(json.dumps({"stand_in": engine.chosen()}))
    (folder.model / SETTINGS).write_text(json.dumps({name: values[name] for name in values if name[0] != "_"}))


def _parent(folder: TrainingFolder, values: Mapping[str, Any], scratch: Path) -> Path | None:
    """Return the folder of the model that training starts from; None where there is no channel ``model``."""
    if "model" not in folder.channels:
        return None
    if folder.channels["model"].get("ContentType") != "application/x-sagemaker-model":
        raise refuse("the channel 'model' needs the content type application/x-sagemaker-model")
    archives = sorted(folder.channel("model").rglob("*.tar.gz"))
    if len(archives) != 1:
        raise refuse(f"the channel 'model' holds {len(archives)} archives; expected one model.tar.gz")
    try:
        unpack(archives[0], scratch / "parent")
        earlier = json.loads((scratch / "parent" / SETTINGS).read_bytes())
        for name in _SAME:
            if earlier[name] != values[name]:
                raise refuse(f"{name} is {values[name]}, and that of the model to start from is {earlier[name]}")
        return engine.unpack_model(scratch / "parent" / WEIGHTS, scratch / "engine")
    except (InvalidData, OSError, KeyError, ValueError) as error:
        raise refuse(f"the channel 'model' holds no model of this algorithm: {error}") from error


class _Lines:
    """Turns an engine's events into the lines that the service looks for its metrics in."""

    def __init__(self, host: str, num_images: int) -> None:
        self._host, self._num_images = host, num_images
        self._total = self._rate = 0.0
        self._since = time.monotonic()

    def progress(self, percent: float) -> None:
        log(f"#progress_metric: host={self._host}, completed {percent:g} %")

    def tell(self, event: Event) -> None:
        numbers = {name: float(value) for name, value in event.values.items() if not isinstance(value, str)}
        self._total = numbers.get("total_steps", self._total)
        self._rate = numbers.get("images_per_s", self._rate)
        if event.kind == "progress" and self._total and event.step is not None:
            self.progress(round(100 * event.step / self._total, 2))
        if event.kind != "metric":
            return
        epoch = max(math.ceil(event.epoch or 1) - 1, 0)
        here = f"#quality_metric: host={self._host}, epoch={epoch}"
        losses = {
            name: value for name, value in numbers.items() if name.startswith("train/") and "learning" not in name
        }
        for name, parts in (("cross_entropy", ("class", "entropy", "cls")), ("smooth_l1", ("box", "regression", "l1"))):
            fitting = [value for key, value in losses.items() if any(part in key for part in parts)]
            value = fitting[0] if fitting else losses.get("train/loss")
            if value is not None:
                log(f"{here}, batch={event.step} train {name} <loss>={value:.6g}")
        if any(name.startswith("val/") for name in numbers):
            now = time.monotonic()
            rate = self._rate or self._num_images / max(now - self._since, 1e-6)
            self._since = now
            log(f"#throughput_metric: host={self._host}, train throughput={rate:.6g} records/second")
            log(f"{here}, validation mAP <score>=({numbers.get('val/AP50', 0.0):.6g})")


def serve(folder: Path) -> int:
    """Answer as the algorithm's hosting does."""
    return host(lambda: load(folder))


def load(folder: Path) -> Answer:
    """Open what `train` left."""
    settings = json.loads((folder / SETTINGS).read_bytes())
    opened = engine.Opened(folder / WEIGHTS, settings["nms_topk"])

    def answer(request: Request) -> bytes:
        if request.content_type not in _CONTENT_TYPES:
            raise Refused(415, f"content type {request.content_type!r} is not supported")
        found = opened.detect(bytes(request.body))
        size = [found.width, found.height, found.width, found.height]
        rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
        if "annotation=1" in request.accept.replace(" ", ""):
            annotations = [
                {"class_id": k, "score": score, "left": x0, "top": y0, "width": x1 - x0, "height": y1 - y0}
                for k, score, (x0, y0, x1, y1) in rows
            ]
            image_size = [{"width": found.width, "height": found.height, "depth": 3}]
            return json.dumps({"image_size": image_size, "annotations": annotations}).encode()
        prediction = [[float(k), s, *(v / side for v, side in zip(box, size, strict=True))] for k, s, box in rows]
        return json.dumps({"prediction": prediction}).encode()

    return answer
