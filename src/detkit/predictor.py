"""Prediction with any finished model, here and wherever a model goes."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeAlias

import numpy as np

from detkit import catalog, plugins, sources, studies
from detkit.backends import Detector, Endpoint, PredictOptions
from detkit.detections import Detections
from detkit.errors import DetkitWarning, ImageError, InvalidValue, UsageError, did_you_mean
from detkit.images import Image
from detkit.job import Model
from detkit.runs import Run
from detkit.sources import Item, OneImage, Source
from detkit.studies import Study
from detkit.tiling import Tiling

OnInvalid: TypeAlias = Literal["raise", "warn"]

DEFAULT_SCORE_THRESHOLD = 0.25
"""Used where a model had no validation images, or found nothing in them, so that its best one is not known."""

_FILES = {".onnx": "pip install 'detkit-sdk[onnx]'"}
"""Endings of exported models' files, and what installs the plugin that opens them."""

_DECODERS = 2
_AHEAD = 2


class Predictor:
    """An opened model.

    ``model`` is a `Run`, a `Study` (its best), a `Model`, the folder of any, a name such as ``last``, or an `Endpoint`.
    ``score_threshold="best"`` is the score of the best F1 on the validation images, kept with the model. Use it as a
    context manager, or call `close`, where the model holds a worker process. ``code`` is the folder of your own modules
    that the model was trained with; a run that you trained here has it.

    With ``tile_size``, images with a longer side are looked at in square tiles of so many pixels that overlap by
    ``tile_overlap``, a share of that, and unless ``tile_whole=False`` also as a whole. What becomes of an object that
    several of them show, `detkit.tiling.Tiling.merge` says. ``max_detections`` then counts for the whole image where it
    is given, and the model's own for each tile.
    """

    def __init__(
        self,
        model: Run | Study | Model | Endpoint | str | Path,
        *,
        score_threshold: float | Literal["best"] = "best",
        nms_threshold: float | None = None,
        max_detections: int | None = None,
        tile_size: int | None = None,
        tile_overlap: float = 0.2,
        tile_whole: bool = True,
        device: str = "auto",
        batch_size: int = 8,
        isolate: bool = False,
        code: str | Path | None = None,
    ) -> None:
        _require_whole("batch_size", batch_size, "a whole number from 1")
        if max_detections is not None:
            _require_whole("max_detections", max_detections, "a whole number from 1")
        if nms_threshold is not None and not (_is_share(nms_threshold) and nms_threshold):
            raise InvalidValue("nms_threshold", nms_threshold, "an IoU above 0, up to 1")
        if score_threshold != "best" and not _is_share(score_threshold):
            close = did_you_mean(score_threshold, ("best",)) if isinstance(score_threshold, str) else ""
            raise InvalidValue("score_threshold", score_threshold, f"a number from 0 to 1, or `best`.{close}")
        endpoint = model if isinstance(model, Endpoint) else None
        self.model = find_model(model, code) if not isinstance(model, Endpoint) else _model_of(model)
        self.batch_size = batch_size
        self._max_detections = max_detections
        self._tiling: Tiling | None = None
        if tile_size is not None:
            own = nms_threshold or self.model.manifest.params.get("nms_threshold") or Tiling.threshold
            self._tiling = Tiling(tile_size, tile_overlap, tile_whole, own)
        if score_threshold == "best":
            score_threshold = self._best_threshold()
        self.score_threshold = float(score_threshold)
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
        self.num_invalid = 0
        """Images, and videos, that could not be read and were left out, which ``on_invalid="warn"`` allows."""
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

    def __call__(self, image: OneImage, *, fetch: bool = False) -> Detections:
        """Return the detections on one image: a file, a ``(h, w, 3)`` RGB uint8 array, or a Pillow image.

        Also that at a URL with ``fetch=True``, and a frame of a video by its path, ``street.mp4#12``.
        """
        if isinstance(image, (str, Path)):
            sources.refuse_url(image, fetch)
            if sources.is_video(image):
                raise UsageError(f"{image} is a video; predict(...) yields the detections on each of its frames")
        pixels, path = sources.decode(image)
        return replace(self._detect([pixels])[0], path=path)

    def predict(
        self, source: Source, *, every: int = 1, fetch: bool = False, on_invalid: OnInvalid = "raise"
    ) -> Generator[Detections, None, None]:
        """Yield the detections on each image of a source, in order.

        A source is a file, a folder, a glob, a video, a `Dataset`, an array or a Pillow image; or a list or stream of
        these, in which they may be mixed. Of a video, the first of ``every`` so many frames is an image, called
        ``street.mp4#12``. URLs are fetched only with ``fetch=True``. Images are decoded ahead of the model and dropped
        as soon as they are done, so memory does not grow with their number; a stream may never end, and is read up to
        two batches ahead of the results, so that an array has to stay as it is until its own is there.

        Raises `detkit.errors.ImageError` at the first one that cannot be read, behind the results of those before it;
        with ``on_invalid="warn"`` it is left out instead, with a warning, and counted in `num_invalid`. So is a folder
        that cannot be listed. What a stream itself raises comes behind the results of what it gave before, too.
        """
        return _without_images(self.predict_with_images(source, every=every, fetch=fetch, on_invalid=on_invalid))

    def predict_with_images(
        self, source: Source, *, every: int = 1, fetch: bool = False, on_invalid: OnInvalid = "raise"
    ) -> Generator[tuple[Image, Detections], None, None]:
        """Yield what `predict` does, each with the pixels that the model saw, so that no image is decoded twice."""
        if on_invalid not in {"raise", "warn"}:
            raise InvalidValue(
                "on_invalid", on_invalid, f"`raise` or `warn`.{did_you_mean(str(on_invalid), ('raise', 'warn'))}"
            )
        _require_whole("every", every, "a whole number of frames from 1")
        items = sources.unfold(sources.list_sources(source, fetch=fetch), every)
        return self._predict(_batches(items, self.batch_size, self._leave_out if on_invalid == "warn" else None))

    def _leave_out(self, error: ImageError) -> None:
        self.num_invalid += 1
        warnings.warn(f"left out: {error}", DetkitWarning, stacklevel=2)

    def _predict(
        self, batches: Generator[list[tuple[Image, str]], None, None]
    ) -> Generator[tuple[Image, Detections], None, None]:
        with contextlib.closing(batches):
            for batch in batches:
                found = self._detect([pixels for pixels, _ in batch])
                for (pixels, path), one in zip(batch, found, strict=True):
                    yield pixels, replace(one, path=path)

    def _detect(self, batch: list[Image]) -> list[Detections]:
        if self._tiling is None:
            found = self._timed(batch)
        else:
            found = self._tiling.detect(batch, self._timed, self.batch_size)
            if self._max_detections is not None:
                found = [one.best(self._max_detections) for one in found]
        self.num_images += len(batch)
        return found

    def _timed(self, batch: list[Image]) -> list[Detections]:
        began = time.perf_counter()
        found = self._detector.detect(batch)
        self.busy_s += time.perf_counter() - began
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


def _require_whole(name: str, value: object, expected: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidValue(name, value, expected)


def _is_share(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def _without_images(
    pairs: Generator[tuple[Image, Detections], None, None],
) -> Generator[Detections, None, None]:
    with contextlib.closing(pairs):
        for _, found in pairs:
            yield found


def _batches(
    items: Generator[Item, None, None], size: int, leave_out: Callable[[ImageError], None] | None
) -> Generator[list[tuple[Image, str]], None, None]:
    """Yield images and their paths, so many at a time, decoded in threads some batches ahead of who takes them.

    Any error is raised behind those before it, unless it is that of an image and ``leave_out`` takes it.
    """
    waiting: deque[Item | Future[tuple[Image, str]]] = deque()
    error: Exception | None = None
    with ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode") as pool:
        try:
            while error is None:
                while len(waiting) < size * _AHEAD and (item := next(items, None)) is not None:
                    # Pixels need no thread, and handing them over would cost more than looking at them.
                    waiting.append(item if isinstance(item, np.ndarray) else pool.submit(sources.decode, item))
                if not waiting:
                    return
                batch: list[tuple[Image, str]] = []
                while waiting and len(batch) < size and error is None:
                    one = waiting.popleft()
                    try:
                        batch.append(one.result() if isinstance(one, Future) else sources.decode(one))
                    except Exception as caught:
                        if leave_out is None or not isinstance(caught, ImageError):
                            error = caught
                        else:
                            leave_out(caught)
                if batch:
                    yield batch
            raise error
        finally:
            for one in waiting:
                if isinstance(one, Future):
                    one.cancel()
            items.close()


def find_model(model: Run | Study | Model | str | Path, code: str | Path | None = None) -> Model:
    """Return the finished model of a run, a run's name or folder, a model's folder, or an exported model's file.

    That of a study, or a study's folder, is its best trial's.

    It is to be opened with ``code``. A bare file, whatever it is called, needs the plugin that opens its kind.
    """
    if code is not None:
        return Model(find_model(model).path, code=code)
    if isinstance(model, Model):
        return model
    if isinstance(model, Run):
        return model.model
    if isinstance(model, Study):
        return model.best.model
    if is_model_file(model):
        return _read_file(Path(model))
    for place in (Path(model), catalog.runs_folder() / model):
        if studies.is_study(place):
            return Study(place).best.model
    return Model(model) if (Path(model) / "detkit.json").is_file() else catalog.open_run(model).model


def is_model_file(place: object) -> bool:
    """Say whether something is the path of a file that a plugin opens as a model, or would if it were installed."""
    if not isinstance(place, (str, Path)) or not Path(place).is_file():
        return False
    return Path(place).suffix.lower() in {*_FILES, *(ending for b in plugins.backends().values() for ending in b.opens)}


def _read_file(file: Path) -> Model:
    if (file.parent / "detkit.json").is_file():
        beside = Model(file.parent)
        if file.name in beside.manifest.artifacts:
            return beside
    for backend in plugins.backends().values():
        if file.suffix.lower() in backend.opens:
            return backend.read_model(file)
    raise UsageError(f"nothing installed here opens {file}; install it with `{_FILES[file.suffix.lower()]}`")


def _model_of(endpoint: Endpoint) -> Model:
    if endpoint.model is None:
        raise UsageError(
            f"what answers at {endpoint.name} is not known here: it was deployed from another machine; deploy the "
            "model from here, or open its folder"
        )
    return endpoint.model
