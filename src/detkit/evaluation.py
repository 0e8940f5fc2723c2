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
from detkit.errors import (
    DetkitWarning,
    ImageError,
    InvalidData,
    InvalidValue,
    SeenImages,
    UnknownName,
    UsageError,
)
from detkit.formats.checks import prepare
from detkit.formats.imagefacts import look
from detkit.io import read_dataset
from detkit.job import Model, Workspace
from detkit.prediction_store import predict_all
from detkit.predictions import read_predictions
from detkit.predictor import Predictor, find_model, is_model_file
from detkit.progress import shown, track
from detkit.remote import is_remote
from detkit.runs import Run
from detkit.scores import SCORE_FLOOR, Scores, score
from detkit.studies import Study

_ROLES = {"train": "training", "validation": "validation", "calibration": "calibration"}

Scorable: TypeAlias = "Run | Study | Model | Predictor | str | Path | Sequence[Detections]"
"""What can be scored: a model, opened or not, or what one found: a file for `read_predictions`, or one `Detections` for
each image."""

ClassMap: TypeAlias = "Mapping[str, str] | Mapping[str, Mapping[str, str]]"
"""``{model's name: data's name}``, or one such mapping for each entry, by its name."""

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
    class_map: ClassMap | None = None,
    device: str = "auto",
    batch_size: int = 8,
    fresh: bool = False,
    progress: bool = False,
    code: str | Path | None = None,
) -> Scores:
    """Score a model on a data set; without one, on the test images that its run kept aside.

    Predictions of other tools are scored, too: a COCO results file, or a sequence of `Detections`, with ``data``. So is
    a `Predictor` that is open, wherever it runs, by the options it was opened with.

    Images are compared by the sha256 of their files with those that the model was trained or validated on; an overlap
    raises `SeenImages`, or marks the scores with ``allow_seen=True``. Boxes of a class that the model does not know
    raise `ClassMismatch`, unless ``class_map`` says which name of the model's is meant (``{model's: data's}``); faulty
    boxes raise `InvalidData`, or are left out with ``on_invalid="drop"``. ``max_detections`` is the model's own where
    None. What the model found before on the same images is taken from the cache unless ``fresh``. Metrics of plugins
    come under their own names. ``code`` is as for `Predictor`.
    """
    if code is not None:
        if not isinstance(model, (Run, Model, str, Path)):
            raise UsageError("code= is for a model that is yet to be opened; leave it out")
        model = find_model(model, code)
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
    class_map: ClassMap | None = None,
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
    if max_detections is not None and max_detections < 1:
        raise InvalidValue("max_detections", max_detections, "a whole number from 1")
    own_limits = [model.manifest.max_detections for model in models.values() if model is not None]
    limit = max_detections or max(own_limits, default=_DEFAULT_LIMIT)
    maps = {name: _map_of(name, class_map) for name in subjects}
    seen = {}
    _refuse_strange_names(maps, subjects, models)
    for name, model in models.items():  # before anything takes time
        if model is not None:
            _refuse_classes(data, model.classes, maps[name], name or model.name)
            seen[name] = _overlap(model, data, digests, allow_seen)
    found: list[Evaluated] = []
    with shown(progress):
        for name, subject in subjects.items():
            model, seconds, where = models[name], None, ""
            detections: Sequence[Detections]
            if isinstance(subject, Predictor):
                detections, seconds = _look(subject, data)
            elif model is not None:
                predicted = predict_all(
                    model,
                    data,
                    digests,
                    score_threshold=SCORE_FLOOR,
                    # The model's limit is one for all classes of an image, the protocol's one for each class.
                    max_detections=max(_limit_of(model, max_detections, limit), model.manifest.max_detections),
                    device=device,
                    batch_size=batch_size,
                    fresh=fresh,
                )
                detections = predicted.detections
                seconds = predicted.seconds_per_image
                where = "" if predicted.device == "auto" else predicted.device
            elif isinstance(subject, (str, Path)):
                detections = read_predictions(subject, data, class_map=maps[name])
            else:
                detections = _listed(subject)
                _refuse_other_images(detections, data)
            if maps[name] and not is_prediction_file(subject):
                detections = [_rename(one, maps[name]) for one in detections]
            known = dict.fromkeys(one for found_there in detections for one in found_there.classes)
            if not known.keys() <= set(data.classes) and model is None:  # else they lack what they never found
                _refuse_classes(data, list(known), {}, name or "the detections")
            scores = score(data, detections, max_detections=limit, score_floor=SCORE_FLOOR)
            scores = _with_metrics(replace(scores, seen_in=seen.get(name, "")))
            found.append(Evaluated(name=name, scores=scores, model=model, seconds_per_image=seconds, device=where))
    return found


def is_prediction_file(subject: object) -> bool:
    """Say whether something is the path or URL of a file with predictions, not of a run or a model."""
    if not isinstance(subject, (str, Path)) or is_model_file(subject):
        return False
    return is_remote(subject) or Path(subject).is_file()


def _model(subject: Scorable) -> Model | None:
    if isinstance(subject, Predictor):
        return subject.model
    if isinstance(subject, (str, Path)):
        return None if is_prediction_file(subject) else find_model(subject)
    return find_model(subject) if isinstance(subject, (Run, Study, Model)) else None


def _look(predictor: Predictor, data: Dataset) -> tuple[list[Detections], float]:
    """Return what an opened model finds, and its mean seconds for an image; refuse one that leaves out much."""
    if predictor.score_threshold > SCORE_FLOOR:
        raise UsageError(
            f"the predictor leaves out what scores below {predictor.score_threshold:g}, and with it part of its AP; "
            f"open it with Predictor(..., score_threshold={SCORE_FLOOR})"
        )
    before = predictor.busy_s
    detections = list(track(predictor.predict(data), "evaluate", total=len(data)))
    return detections, (predictor.busy_s - before) / max(len(data), 1)


def _listed(subject: Scorable) -> Sequence[Detections]:
    """Return a list of detections as it is, refused where it is none."""
    if not isinstance(subject, Sequence) or isinstance(subject, str):
        raise UsageError(
            f"{type(subject).__name__} cannot be scored; expected a run, a model, the path of either or of a file with "
            "predictions, or a list of Detections, one for each image"
        )
    for i, one in enumerate(subject):
        if not isinstance(one, Detections):
            raise UsageError(
                f"item {i} is a {type(one).__name__}; expected Detections, which "
                "detkit.detections.as_detections makes of what other tools return"
            )
    return subject


def _refuse_other_images(detections: Sequence[Detections], data: Dataset) -> None:
    """Raise `UsageError` where detections say that they are on another image than the one in their place."""
    for i, (one, path) in enumerate(zip(detections, data.paths, strict=False)):
        if one.path and Path(one.path).name != Path(path).name:
            raise UsageError(
                f"item {i} has detections on {Path(one.path).name}, image {i} of the data is {Path(path).name}; "
                "expected one for each image, in the order of the data"
            )


def _map_of(name: str, class_map: ClassMap | None) -> Mapping[str, str]:
    """Return the class map of an entry. Raises `UsageError` where single ones and maps are mixed."""
    given = class_map or {}
    maps = {key: value for key, value in given.items() if not isinstance(value, str)}
    if not maps:
        return {key: value for key, value in given.items() if isinstance(value, str)}
    if len(maps) < len(given):
        raise UsageError("class_map mixes names and maps; give {model's: data's} for all, or {entry: {...}} for each")
    return maps.get(name, {})


def _with_metrics(scores: Scores) -> Scores:
    """Add the numbers of metric plugins; what a broken one would add is left out with a warning."""
    numbers, lower_is_better = dict(scores.numbers), []
    detections = [one.above(scores.protocol.score_floor) for one in scores.detections]
    for metric in plugins.metrics().values():
        try:
            computed = metric.compute(scores.data, detections)
            extra = {name: float(value) for name, value in computed.items()}
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


def _refuse_strange_names(
    maps: Mapping[str, Mapping[str, str]], subjects: Mapping[str, Scorable], models: Mapping[str, Model | None]
) -> None:
    """Raise `UsageError` for names in class maps that no model has; those of prediction files are not known yet."""
    if any(is_prediction_file(subject) for subject in subjects.values()):
        return
    known: dict[str, None] = {}
    for name, subject in subjects.items():
        model = models[name]
        several = [model.classes] if model is not None else [one.classes for one in _listed(subject)]
        known |= dict.fromkeys(one for classes in several for one in classes)
    unknown = [name for mapped in maps.values() for name in mapped if name not in known]
    if unknown:
        raise UnknownName("class of the model in class_map", unknown[0], known)


def _refuse_classes(data: Dataset, classes: Sequence[str], class_map: Mapping[str, str], name: str) -> None:
    """Raise `ClassMismatch` for a class of the data that has boxes and no counterpart."""
    data.with_classes(list(dict.fromkeys(class_map.get(known, known) for known in classes)), f"the data, for {name}")


def _rename(found: Detections, class_map: Mapping[str, str]) -> Detections:
    return replace(found, classes=tuple(class_map.get(name, name) for name in found.classes))


def _kept_test_images(models: Mapping[str, Model | None]) -> tuple[Dataset, list[str]]:
    kept: dict[str, tuple[Dataset, list[str]]] = {}
    for name, model in models.items():
        if model is not None:
            kept[name] = kept_test_images(model)
    if not kept:
        raise UsageError("predictions are scored against a data set; name it, e.g. `detkit evaluate FILE DATA:test`")
    first = next(iter(kept))
    data, digests = kept[first]
    for name, (other, other_digests) in kept.items():
        same = sorted(other_digests) == sorted(digests)
        if not same or set(other.classes) != set(data.classes) or _truth(other, other_digests) != _truth(data, digests):
            what = "annotations of their test images" if same else "test images aside"
            raise UsageError(
                f"{first} and {name} kept different {what} ({len(digests)} and {len(other_digests)} images), so "
                "their own scores do not compare; name one data set for all, e.g. `detkit compare A B DATA:test`"
            )
    return data, digests


def kept_test_images(model: Model) -> tuple[Dataset, list[str]]:
    """Return the test images that a run kept aside, and the sha256 of each file.

    Raises `UsageError` where it kept none, and `InvalidData` where they are no longer what the run was given.
    """
    workspace = Workspace(model.path.absolute().parent)
    data = workspace.dataset("test")
    if data is None:
        raise UsageError(
            f"{model.path} has no test images of its own; name a data set, e.g. `detkit evaluate RUN DATA:test`"
        )
    digests = workspace.image_digests("test")
    facts = look(data.paths, decode=False)
    changed = [
        image_id
        for image_id, fact, digest in zip(data.image_ids, facts, digests, strict=True)
        if isinstance(fact, ImageError) or fact.digest != digest
    ]
    if changed:
        raise InvalidData(
            f"{len(changed)} of the {len(data)} test images that {workspace.path} kept aside have changed since, for "
            f"example {', '.join(changed[:3])}; name the data set to score them as they are, e.g. "
            "`detkit evaluate RUN DATA:test`"
        )
    return data, digests


def _truth(data: Dataset, digests: Sequence[str]) -> list[tuple[str, list[tuple[str, tuple[float, ...]]]]]:
    """Return every image's digest with its boxes and names, in an order of their own."""
    return sorted(
        (digest, sorted((name, tuple(box)) for name, box in zip(one.names, one.boxes.tolist(), strict=True)))
        for digest, one in zip(digests, data, strict=True)
    )


def _limit_of(model: Model, asked: int | None, largest: int) -> int:
    """Return how many detections a model is asked for: as many as others find, unless its graph has cut them itself."""
    graph = model.manifest.native.get("graph") or {}
    return asked or (model.manifest.max_detections if graph.get("suppressed") else largest)


def _overlap(model: Model, data: Dataset, digests: list[str], allow: bool) -> str:
    if "train" not in model.seen():
        warnings.warn(
            f"which images {model.name} has seen is not known: no seen.json in {model.path} tells its training images",
            DetkitWarning,
            stacklevel=4,
        )
    for channel, role in _ROLES.items():
        known = set(model.seen().get(channel, []))
        files = [image_id for image_id, digest in zip(data.image_ids, digests, strict=True) if digest in known]
        if files and not allow:
            raise SeenImages(role, len(files), len(data), files)
        if files:
            return role
    return ""
