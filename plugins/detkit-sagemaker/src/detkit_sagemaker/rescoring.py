"""What a model finds at AWS, kept here, so that `detkit.evaluate` and `detkit.compare` score it like any other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from detkit.backends import PredictOptions
from detkit.data import Dataset
from detkit.errors import UsageError
from detkit.evaluation import kept_test_images
from detkit.formats.checks import prepare
from detkit.io import read_dataset
from detkit.job import Model
from detkit.prediction_store import PredictionStore
from detkit.scores import SCORE_FLOOR
from detkit_sagemaker.aws import Aws
from detkit_sagemaker.options import TransformOptions
from detkit_sagemaker.resources import Tell, to_stderr
from detkit_sagemaker.transform import begin, find_batch, finish


@dataclass(frozen=True)
class Unknown:
    """The images of a data set that nobody has let a model look at, as far as is known here."""

    digests: Mapping[str, str]
    """sha256 of each image file, by its path."""
    total: int
    """How many images the data set has."""

    @property
    def paths(self) -> list[str]:
        return list(self.digests)

    @classmethod
    def of(
        cls, model: Model, data: Dataset | str | Path | None, *, on_invalid: Literal["raise", "drop"] = "raise"
    ) -> Unknown:
        """Look at a data set's images; without ``data`` they are the test images that the model's run kept aside."""
        if data is None:
            images, digests = kept_test_images(model)
        else:
            read = data if isinstance(data, Dataset) else read_dataset(data)
            prepared = prepare(read, on_invalid=on_invalid)
            images, digests = prepared.data, prepared.image_digests
        with _store(model) as store:
            known = store.get(digests)
        left = {path: d for path, d, one in zip(images.paths, digests, known, strict=True) if one is None}
        return cls(left, len(digests))


def transform(
    model: Model,
    data: Dataset | str | Path | None,
    options: TransformOptions,
    aws: Aws | None = None,
    *,
    on_invalid: Literal["raise", "drop"] = "raise",
    job: str = "",
    tell: Tell = to_stderr,
) -> tuple[int, int]:
    """Let a model look at a data set's images in a batch transform job, and keep what it found.

    Without ``data`` they are the test images that its run kept aside, which are what `detkit.evaluate` takes then.
    Images that it has looked at before are not sent. ``job`` names one that `start_batch` started on these images,
    here or on another machine: what that found is taken. Returns how many images are known now that were not, and how
    many there are. Raises as `detkit_sagemaker.transform.predict_batch` does, where what other images gave is kept, and
    `UsageError` for a ``job`` that looked at none of them or is of a model with other classes.
    """
    unknown = Unknown.of(model, data, on_invalid=on_invalid)
    if not unknown.digests:
        return 0, unknown.total
    if job:
        there = find_batch(job, options, aws)
        if there.record.classes != model.classes:
            raise UsageError(
                f"transform {job} is of a model with the classes {', '.join(there.record.classes)}, and {model.name} "
                f"has {', '.join(model.classes)}; name the model that it was started with"
            )
    else:
        there = begin(model, unknown.paths, options, aws, tell)
    # A path may be another one where the job was started, the content is the same.
    digests = {one.path: one.digest or unknown.digests.get(one.path, "") for one in there.record.sent}
    wanted, kept = set(unknown.digests.values()), set()
    if wanted.isdisjoint(digests.values()):
        raise UsageError(f"transform {job} looked at other images than these; name the data that it was started with")
    with _store(model) as store:
        for detections in finish(there, SCORE_FLOOR, None, tell):
            digest = digests[detections.path]
            if digest in wanted:
                store.put(digest, detections, math.nan, "SageMaker")
                kept.add(digest)
    return sum(digest in kept for digest in unknown.digests.values()), unknown.total


def _store(model: Model) -> PredictionStore:
    return PredictionStore(model, PredictOptions(score_threshold=SCORE_FLOOR))
