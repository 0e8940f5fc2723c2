"""What a model finds at AWS, kept here, so that `detkit.evaluate` and `detkit.compare` score it like any other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from detkit.backends import PredictOptions
from detkit.data import Dataset
from detkit.evaluation import kept_test_images
from detkit.formats.checks import prepare
from detkit.io import read_dataset
from detkit.job import Model
from detkit.prediction_store import PredictionStore
from detkit.scores import SCORE_FLOOR
from detkit_sagemaker.aws import Aws
from detkit_sagemaker.options import TransformOptions
from detkit_sagemaker.resources import Tell, to_stderr
from detkit_sagemaker.transform import collect_batch, predict_batch


def images_of(model: Model, data: Dataset | str | Path | None) -> Dataset:
    """Return the data set that is named, else the test images that the model's run kept aside."""
    if data is None:
        return kept_test_images(model)[0]
    return data if isinstance(data, Dataset) else read_dataset(data)


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
    Images that it has looked at before are not sent. ``job`` names one that `start_batch` started on this data: what
    that found is taken. Returns how many it looked at now, and how many there are. Raises as
    `detkit_sagemaker.transform.predict_batch` does; what other images gave is kept then, too.
    """
    if data is None:
        images, digests = kept_test_images(model)
    else:
        prepared = prepare(images_of(model, data), on_invalid=on_invalid)
        images, digests = prepared.data, prepared.image_digests
    with PredictionStore(model, PredictOptions(score_threshold=SCORE_FLOOR)) as store:
        missing = {
            path: digest
            for path, digest, known in zip(images.paths, digests, store.get(digests), strict=True)
            if known is None
        }
        if missing:
            if job:
                found = collect_batch(job, options, aws, score_threshold=SCORE_FLOOR, tell=tell)
            else:
                found = predict_batch(model, list(missing), options, aws, score_threshold=SCORE_FLOOR, tell=tell)
            for detections in (one for one in found if one.path in missing):
                store.put(missing[detections.path], detections, math.nan, "SageMaker")
    return len(missing), len(digests)
