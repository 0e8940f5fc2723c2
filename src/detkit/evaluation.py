"""Scoring a model on images it has not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from detkit import plugins
from detkit.data import Dataset
from detkit.errors import SeenImages, UsageError
from detkit.formats.checks import prepare
from detkit.io import read_dataset
from detkit.job import Model
from detkit.predictor import Predictor, find_model
from detkit.progress import shown, track
from detkit.runs import Run
from detkit.scores import SCORE_FLOOR, Scores, score

_ROLES = {"train": "training", "validation": "validation"}


def evaluate(
    model: Run | Model | str | Path,
    data: Dataset | str | Path | None = None,
    *,
    allow_seen: bool = False,
    on_invalid: Literal["raise", "drop"] = "raise",
    max_detections: int | None = None,
    device: str = "auto",
    batch_size: int = 8,
    progress: bool = False,
) -> Scores:
    """Score a model on a data set; without one, on the test images that its run kept aside.

    Images are compared by the sha256 of their files with those that the model was trained or validated on; an overlap
    raises `SeenImages`, or marks the scores with ``allow_seen=True``. Boxes of a class that the model does not know
    raise `ClassMismatch`; faulty boxes raise `InvalidData`, or are left out with ``on_invalid="drop"``.
    ``max_detections`` is the model's own where None. Metrics of plugins come under their own names.
    """
    found = find_model(model)
    if data is None:
        data, digests = _kept_test_images(found)
    else:
        loaded = read_dataset(data) if isinstance(data, (str, Path)) else data
        prepared = prepare(loaded, on_invalid=on_invalid)
        data, digests = prepared.data, prepared.image_digests
    data = data.with_classes(found.classes, f"the data, for {found.name}")
    seen_in = _overlap(found, data, digests, allow_seen)
    limit = max_detections or found.manifest.max_detections
    with (
        Predictor(
            found, score_threshold=SCORE_FLOOR, max_detections=limit, device=device, batch_size=batch_size
        ) as predictor,
        shown(progress),
    ):
        detections = list(track(predictor.predict(data), "evaluate", total=len(data)))
    scores = score(data, detections, max_detections=limit, score_floor=SCORE_FLOOR)
    extra = {
        name: value for metric in plugins.metrics().values() for name, value in metric.compute(data, detections).items()
    }
    return replace(scores, numbers={**scores.numbers, **extra}, seen_in=seen_in)


def _kept_test_images(model: Model) -> tuple[Dataset, list[str]]:
    from detkit.job import Workspace

    workspace = Workspace(model.path.absolute().parent)
    data = workspace.dataset("test")
    if data is None:
        raise UsageError(
            f"{model.path} has no test images of its own; name a data set, e.g. `detkit evaluate RUN DATA:test`"
        )
    return data, workspace.image_digests("test")


def _overlap(model: Model, data: Dataset, digests: list[str], allow: bool) -> str:
    for channel, role in _ROLES.items():
        known = set(model.seen().get(channel, []))
        files = [image_id for image_id, digest in zip(data.image_ids, digests, strict=True) if digest in known]
        if files and not allow:
            raise SeenImages(role, len(files), len(data), files)
        if files:
            return role
    return ""
