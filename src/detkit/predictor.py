"""Prediction with any finished model, here and wherever a model goes."""

from __future__ import annotations

import glob
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image as PillowImage

from detkit import catalog, images, plugins
from detkit.backends import Detector, Endpoint, PredictOptions
from detkit.data import Dataset
from detkit.detections import Detections
from detkit.errors import UsageError
from detkit.images import Image
from detkit.job import Model
from detkit.runs import Run

OneImage: TypeAlias = "str | Path | Image | PillowImage.Image"
Source: TypeAlias = "OneImage | Dataset | Iterable[OneImage]"

DEFAULT_SCORE_THRESHOLD = 0.25
"""Used where a model had no validation images, or found nothing in them, so that its best one is not known."""

_DECODERS = 2
_AHEAD = 2


class Predictor:
    """An opened model.

    ``model`` is a `Run`, a `Model`, the folder of either, a run's name such as ``last``, or an `Endpoint`.
    ``score_threshold="best"`` is the score of the best F1 on the validation images, kept with the model. Use it as a
    context manager, or call `close`, where the model holds a worker process. ``code`` is the folder of your own modules
    that the model was trained with; a run that you trained here has it.
    """

    def __init__(
        self,
        model: Run | Model | Endpoint | str | Path,
        *,
        score_threshold: float | Literal["best"] = "best",
        nms_threshold: float | None = None,
        max_detections: int | None = None,
        device: str = "auto",
        batch_size: int = 8,
        isolate: bool = False,
        code: str | Path | None = None,
    ) -> None:
        endpoint = model if isinstance(model, Endpoint) else None
        self.model = find_model(model, code) if not isinstance(model, Endpoint) else _model_of(model)
        self.batch_size = batch_size
        if score_threshold == "best":
            score_threshold = self._best_threshold()
        self.score_threshold: float = score_threshold
        """Detections below it are left out."""
        options = PredictOptions(
            device=device,
            score_threshold=self.score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections or self.model.manifest.max_detections,
        )
        self.busy_s = 0.0
        """Seconds that the model itself has taken so far, decoding of images not counted."""
        self.num_images = 0
        """Images that it has taken them for."""
        if endpoint is not None:
            self._detector: Detector = endpoint.open(options)
            return
        backend = plugins.backend(self.model.manifest.backend)
        self._detector = backend.open(self.model, options, isolate=isolate)

    def _best_threshold(self) -> float:
        known = self.model.manifest.score_threshold
        if known is not None:
            return known
        warnings.warn(
            f"score threshold {DEFAULT_SCORE_THRESHOLD}: the best one of {self.model.name} is not known, as it found "
            "nothing in validation images, or had none; score_threshold sets another",
            stacklevel=3,
        )
        return DEFAULT_SCORE_THRESHOLD

    @property
    def classes(self) -> tuple[str, ...]:
        return self.model.classes

    def __call__(self, image: OneImage) -> Detections:
        """Return the detections on one image: a file, a ``(h, w, 3)`` RGB uint8 array, or a Pillow image."""
        pixels, path = _decode(image)
        return replace(self._detect([pixels])[0], path=path)

    def predict(self, source: Source) -> Iterator[Detections]:
        """Yield the detections on each image of a file, folder, glob, `Dataset` or iterable, in order.

        Images are decoded ahead of the model and dropped as soon as they are done, so memory does not grow with their
        number. Raises `detkit.errors.ImageError` at the first one that cannot be read.
        """
        todo = iter(list_sources(source))
        waiting: deque[Future[tuple[Image, str]]] = deque()
        with ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode") as pool:
            try:
                while True:
                    while len(waiting) < self.batch_size * _AHEAD and (item := next(todo, None)) is not None:
                        waiting.append(pool.submit(_decode, item))
                    if not waiting:
                        return
                    batch = [waiting.popleft().result() for _ in range(min(self.batch_size, len(waiting)))]
                    found = self._detect([pixels for pixels, _ in batch])
                    yield from (replace(one, path=path) for one, (_, path) in zip(found, batch, strict=True))
            finally:
                for future in waiting:
                    future.cancel()

    def _detect(self, batch: list[Image]) -> list[Detections]:
        began = time.perf_counter()
        found = self._detector.detect(batch)
        self.busy_s += time.perf_counter() - began
        self.num_images += len(batch)
        return found

    def close(self) -> None:
        """Free the model, and its worker if it has one."""
        self._detector.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def find_model(model: Run | Model | str | Path, code: str | Path | None = None) -> Model:
    """Return the finished model of a run, a run's name or folder, or a model's folder, to be opened with ``code``."""
    if code is not None:
        return Model(find_model(model).path, code=code)
    if isinstance(model, Model):
        return model
    if isinstance(model, Run):
        return model.model
    return Model(model) if (Path(model) / "detkit.json").is_file() else catalog.open_run(model).model


def _model_of(endpoint: Endpoint) -> Model:
    if endpoint.model is None:
        raise UsageError(
            f"what answers at {endpoint.name} is not known here: it was deployed from another machine; deploy the "
            "model from here, or open its folder"
        )
    return endpoint.model


def list_sources(source: Source) -> Iterable[OneImage]:
    """Return the images a source names. Raises `UsageError` where there are none."""
    if isinstance(source, Dataset):
        return source.paths
    if isinstance(source, (np.ndarray, PillowImage.Image)):
        return [source]
    if not isinstance(source, (str, Path)):
        return source
    if Path(source).is_dir():
        found: list[Path] = images.list_images(Path(source))
    elif glob.has_magic(str(source)) and not Path(source).exists():
        found = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
    else:
        return [source]
    if not found:
        raise UsageError(f"no image in {source}; looked for {', '.join(sorted(images.EXTENSIONS))}")
    return found


def _decode(image: OneImage) -> tuple[Image, str]:
    if isinstance(image, PillowImage.Image):
        return images.to_array(image), ""
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise UsageError(f"an image array of {image.dtype} {image.shape}; expected uint8 (height, width, 3), RGB")
        return image, ""
    return images.read_image(image), str(image)
