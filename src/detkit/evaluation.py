"""Scoring models, and anybody's predictions, on images they have not seen."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from detkit import plugins
from detkit.data import Dataset
from detkit.detections import Detections
from detkit.errors import SeenImages, UsageError
from detkit.formats.checks import prepare
from detkit.io import read_dataset
from detkit.job import Model, Workspace
from detkit.prediction_store import predict_all
from detkit.predictions import read_predictions
from detkit.predictor import find_model
from detkit.progress import shown
from detkit.runs import Run
from detkit.scores import SCORE_FLOOR, Scores, score

_ROLES = {"train": "training", "validation": "validation"}

Scorable: TypeAlias = "Run | Model | str | Path | Sequence[Detections]"
"""What can be scored: a model, or what one found: a file for `read_predictions`, or one `Detections` for each image."""

_DEFAULT_LIMIT = 100
"""COCO's limit of detections, for predictions whose maker is not known."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluated:
    """One model, or somebody's predictions, with its scores."""

    name: str
    scores: Scores
    model: Model | None = None
    """None where only predictions were given."""
    seconds_per_image: float | None = None
    """Median time of the model alone, without decoding; None where unknown."""
    device: str = ""
    """Where that time was measured; empty where the engine chose."""


def evaluate(
    model: Scorable,
    data: Dataset | str | Path | None = None,
    *,
    allow_seen: bool = False,
    on_invalid: Literal["raise", "drop"] = "raise",
    max_detections: int | None = None,
    class_map: Mapping[str, str] | None = None,
    device: str = "auto",
    batch_size: int = 8,
    fresh: bool = False,
    progress: bool = False,
) -> Scores:
    """Score a model on a data set; without one, on the test images that its run kept aside.

    Predictions of other tools are scored, too: a COCO results file, or a sequence of `Detections`, with ``data``.

    Images are compared by the sha256 of their files with those that the model was trained or validated on; an overlap
    raises `SeenImages`, or marks the scores with ``allow_seen=True``. Boxes of a class that the model does not know
    raise `ClassMismatch`, unless ``class_map`` says which name of the model's is meant (``{model's: data's}``); faulty
    boxes raise `InvalidData`, or are left out with ``on_invalid="drop"``. ``max_detections`` is the model's own where
    None. What the model found before on the same images is taken from the cache unless ``fresh``. Metrics of plugins
    come under their own names.
    """
    (found,) = evaluate_all(
        {"": model},
        data,
        allow_seen=allow_seen,
        on_invalid=on_invalid,
        max_detections=max_detections,
        class_map=class_map,
        device=device,
        batch_size=batch_size,
        fresh=fresh,
        progress=progress,
    )
    return found.scores


def evaluate_all(
    subjects: Mapping[str, Scorable],
    data: Dataset | str | Path | None = None,
    *,
    allow_seen: bool = False,
    on_invalid: Literal["raise", "drop"] = "raise",
    max_detections: int | None = None,
    class_map: Mapping[str, str] | None = None,
    device: str = "auto",
    batch_size: int = 8,
    fresh: bool = False,
    progress: bool = False,
) -> list[Evaluated]:
    """Score several by one protocol, each under its name; else like `evaluate`.

    ``max_detections`` is the largest of the models' own where None. Without ``data`` all models have to have kept the
    same test images aside; other ones raise `UsageError`.
    """
    models = {name: _model(subject) for name, subject in subjects.items()}
    if data is None:
        data, digests = _kept_test_images(models)
    else:
        loaded = read_dataset(data) if isinstance(data, (str, Path)) else data
        prepared = prepare(loaded, on_invalid=on_invalid)
        data, digests = prepared.data, prepared.image_digests
    known = [model.manifest.max_detections for model in models.values() if model is not None]
    limit = max_detections or max(known, default=_DEFAULT_LIMIT)
    class_map = class_map or {}
    seen = {}
    for name, model in models.items():  # before anything takes time
        if model is not None:
            _refuse_classes(data, model.classes, class_map, name or model.name)
            seen[name] = _overlap(model, data, digests, allow_seen)
    found: list[Evaluated] = []
    with shown(progress):
        for name, subject in subjects.items():
            model, seconds, where = models[name], None, ""
            if model is not None:
                predicted = predict_all(
                    model,
                    data,
                    digests,
                    score_threshold=SCORE_FLOOR,
                    max_detections=limit,
                    device=device,
                    batch_size=batch_size,
                    fresh=fresh,
                )
                detections: Sequence[Detections] = predicted.detections
                seconds = predicted.seconds_per_image
                where = "" if predicted.device == "auto" else predicted.device
            else:
                detections = _given(subject, data)
                for classes in {one.classes for one in detections}:
                    _refuse_classes(data, classes, class_map, name or "predictions")
            renamed = [_rename(one, class_map) for one in detections] if class_map else detections
            scores = score(data, renamed, max_detections=limit, score_floor=SCORE_FLOOR)
            scores = _with_metrics(replace(scores, seen_in=seen.get(name, "")))
            found.append(Evaluated(name=name, scores=scores, model=model, seconds_per_image=seconds, device=where))
    return found


def is_prediction_file(subject: object) -> bool:
    """Say whether something is the path of a file with predictions, not of a run or a model."""
    return isinstance(subject, (str, Path)) and Path(subject).is_file()


def _model(subject: Scorable) -> Model | None:
    if isinstance(subject, (Run, Model)) or (isinstance(subject, (str, Path)) and not is_prediction_file(subject)):
        return find_model(subject)
    return None


def _given(subject: Scorable, data: Dataset) -> Sequence[Detections]:
    if isinstance(subject, (str, Path)):
        return read_predictions(subject, data)
    if isinstance(subject, Sequence) and not isinstance(subject, str):
        return subject
    raise UsageError(
        f"{type(subject).__name__} cannot be scored; expected a run, a model, the path of either or of a file with "
        "predictions, or a list of Detections, one for each image"
    )


def _with_metrics(scores: Scores) -> Scores:
    """Add the numbers of metric plugins; what a broken one would add is left out with a warning."""
    numbers, lower_is_better = dict(scores.numbers), []
    detections = [one.above(scores.protocol.score_floor) for one in scores.detections]
    for metric in plugins.metrics().values():
        try:
            extra = dict(metric.compute(scores.data, detections))
        except Exception as error:  # a stranger's code; the other numbers are worth having
            warnings.warn(f"metric {metric.name} is left out: {type(error).__name__}: {error}", stacklevel=2)
            continue
        taken = sorted(extra.keys() & numbers.keys())
        if taken:
            warnings.warn(f"metric {metric.name} is left out: {', '.join(taken)} is taken already", stacklevel=2)
            continue
        numbers |= extra
        lower_is_better += [] if metric.higher_is_better else list(extra)
    return replace(scores, numbers=numbers, lower_is_better=tuple(lower_is_better))


def _refuse_classes(data: Dataset, classes: Sequence[str], class_map: Mapping[str, str], name: str) -> None:
    """Raise `ClassMismatch` where the data has boxes of a class that has no counterpart."""
    data.with_classes(list(dict.fromkeys(class_map.get(known, known) for known in classes)), f"the data, for {name}")


def _rename(found: Detections, class_map: Mapping[str, str]) -> Detections:
    return replace(found, classes=tuple(class_map.get(name, name) for name in found.classes))


def _kept_test_images(models: Mapping[str, Model | None]) -> tuple[Dataset, list[str]]:
    kept: dict[str, tuple[Dataset, list[str]]] = {}
    for name, model in models.items():
        if model is None:
            continue
        workspace = Workspace(model.path.absolute().parent)
        data = workspace.dataset("test")
        if data is None:
            raise UsageError(
                f"{model.path} has no test images of its own; name a data set, e.g. `detkit evaluate RUN DATA:test`"
            )
        kept[name] = (data, workspace.image_digests("test"))
    if not kept:
        raise UsageError("predictions are scored against a data set; name it, e.g. `detkit evaluate FILE DATA:test`")
    first = next(iter(kept))
    for name, (_, digests) in kept.items():
        if sorted(digests) != sorted(kept[first][1]):
            raise UsageError(
                f"{first} and {name} kept different test images aside ({len(kept[first][1])} and {len(digests)}), so "
                "their own scores do not compare; name one data set for all, e.g. `detkit compare A B DATA:test`"
            )
    return kept[first]


def _overlap(model: Model, data: Dataset, digests: list[str], allow: bool) -> str:
    for channel, role in _ROLES.items():
        known = set(model.seen().get(channel, []))
        files = [image_id for image_id, digest in zip(data.image_ids, digests, strict=True) if digest in known]
        if files and not allow:
            raise SeenImages(role, len(files), len(data), files)
        if files:
            return role
    return ""
