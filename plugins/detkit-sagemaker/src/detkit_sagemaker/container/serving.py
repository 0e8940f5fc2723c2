"""``serve``: the model in ``/opt/ml/model`` answers `detkit.wire`'s requests."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

from detkit import trust, wire
from detkit.backends import Detector, PredictOptions
from detkit.detections import Detections
from detkit.errors import UsageError
from detkit.files import file_sha256
from detkit.images import Image
from detkit.job import Manifest, Model
from detkit.params import set_fields
from detkit.predictor import DEFAULT_SCORE_THRESHOLD
from detkit_sagemaker.container import engines
from detkit_sagemaker.container.hosting import Answer, Refused, Request, host
from detkit_sagemaker.container.training import CODE

MOST_PIXELS = 178_956_970
"""Of all images of one request together: as many as Pillow decodes of one, twice its limit of a warning."""

_BATCH = 8
"""Images that the model is given at once."""

_READABLE = {"*/*", "application/*", "application/json"}


def serve(base: Path) -> int:
    """Open the model and answer until SIGTERM; returns an exit code where it cannot be opened."""
    return host(lambda: load(base / "model"), batch_error=_row_of)


def load(folder: Path) -> Answer:
    """Open a model and return what answers requests. Raises `DetkitError`."""
    model = with_code(Model(folder))
    backend = engines.find(model.manifest.backend, model.manifest.engine)
    options = options_for(model.manifest)
    detector = backend.open(model, options)
    print(f"{model.name}: {', '.join(model.classes)}; score_threshold {options.score_threshold:g}", flush=True)
    return _Answerer(detector)


def with_code(model: Model) -> Model:
    """Return a model with the folder of its own modules, where it takes some.

    They lie in its folder ``code``, and run only where ``DETKIT_CODE`` is their sha256: whoever deploys the model says
    so after having looked at them, and what came with a model is not run because it came (decision 11). Raises
    `UsageError`.
    """
    program = trust.program_of(model)
    if program is not None and os.environ.get("DETKIT_CODE") == file_sha256(program):
        return Model(model.path, code=program)
    code = model.manifest.code
    if code is None or not code.digest:
        return model
    if not (model.path / CODE).is_dir():
        raise UsageError(
            f"{model.name} takes modules of the user's own (sha256 {code.digest[:12]}...), and there is no folder "
            f"{CODE!r} in it; deploy it with detkit from where it was trained, which puts them there"
        )
    if os.environ.get("DETKIT_CODE") != code.digest:
        raise UsageError(
            f"{model.name} comes with code of its own, and nobody said that it may run here; deploy it with detkit, or "
            f"read the code and set DETKIT_CODE={code.digest} in the environment of the SageMaker model"
        )
    return Model(model.path, code=model.path / CODE)


def options_for(manifest: Manifest) -> PredictOptions:
    """Return how to open a model: ``DETKIT_SCORE_THRESHOLD`` and the like, else what the model says of itself."""
    best = DEFAULT_SCORE_THRESHOLD if manifest.score_threshold is None else manifest.score_threshold
    defaults = PredictOptions(score_threshold=best, max_detections=manifest.max_detections)
    variables = {name: f"DETKIT_{name.upper()}" for name in PredictOptions.__struct_fields__}
    given = {name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)}
    return set_fields(defaults, given, kind="option", origins=variables)


class _Answerer:
    """Decodes requests side by side and gives their images to the model one request after the other."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self._turn = threading.Lock()

    def __call__(self, request: Request) -> bytes:
        content_type = request.content_type
        if content_type == "application/x-image":
            content_type = "image/x"
        if not content_type.startswith("image/") and content_type != wire.CONTENT_TYPE:
            expected = f"image/jpeg or another image/*, application/x-image, {wire.CONTENT_TYPE}"
            raise Refused(415, f"content type {content_type!r}; expected {expected}")
        if not _READABLE & {part.partition(";")[0].strip().lower() for part in request.accept.split(",")}:
            raise Refused(406, f"Accept: {request.accept}; this server answers with application/json")
        batch, paths = wire.decode_images(request.body, content_type, most_pixels=MOST_PIXELS)
        for image, path in zip(batch, paths, strict=True):
            if image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise Refused(400, f"image {path!r} has the shape {image.shape}; expected height, width, 3")
        with self._turn:
            found = self._detect(batch)
        return wire.encode_detections([replace(one, path=path) for one, path in zip(found, paths, strict=True)])

    def _detect(self, batch: list[Image]) -> list[Detections]:
        starts = range(0, len(batch), _BATCH)
        return [one for start in starts for one in self._detector.detect(batch[start : start + _BATCH])]


def _row_of(error: str) -> bytes:
    return json.dumps({"error": error, "images": []}).encode()
