"""The run directory: what a job says, where everything lies, what a finished model carries.

The layout is that of a SageMaker container's ``/opt/ml``, so the same worker serves a local process and a container::

    RUN/
      run.json                         who started it and how; enough to find it again
      input/data/job/job.json          the `Job`
      input/data/{train,validation,test}/   annotations.json (COCO), columns.npz, images/, images.rec
      input/data/model/                incremental training: the earlier model
      input/data/code/                 the user's own modules
      input/data/retention/            incremental training: images held out of the earlier one, see `detkit.forgetting`
      input/config/hyperparameters.json     strings that overlay the params, where the place writes them
      checkpoints/                     the engine's resumable state
      model/                           the artifact; detkit.json is written last
      output/failure                   there if it failed; the first line is the message
      output/data/{metrics.jsonl,log.txt}

This module starts nothing. Files are written beside and renamed, so a reader sees a whole file or none.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

import detkit
from detkit.columns import load_columns, save_columns
from detkit.data import Dataset
from detkit.errors import RunExists, Stopped, StorageError, UsageError
from detkit.events import Event, to_line
from detkit.files import atomic_write, file_sha256, inside, place, write_json
from detkit.images import place_image
from detkit.recordio import packed
from detkit.remote import is_remote

SCHEMA = 1
"""Version of every JSON file detkit writes; readers refuse a newer one."""

CHANNELS = ("train", "validation", "test")


class Continued(msgspec.Struct, frozen=True, kw_only=True):
    """The finished run whose checkpoint a longer one goes on from."""

    run: str
    """Its name."""
    manifest: str
    """sha256 of its manifest."""
    step: int
    """Optimizer steps that it had done."""


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """Images of earlier data that were put among the training images."""

    source: str
    """The data set, or the run whose training images they were."""
    images: int
    boxes: int
    available: int
    """How many images there were to choose from."""


class Code(msgspec.Struct, frozen=True, kw_only=True):
    """The user's own modules that a training imports, see `detkit.usercode`."""

    digest: str = ""
    """sha256 over the paths and contents in ``input/data/code``; empty where there is no such folder."""
    imports: list[str] = []
    """Modules that are imported before the engine is."""


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the worker is to do."""

    backend: str
    engine: str
    """``"package.module:Class"``, resolved only in the worker."""
    model: str
    """The model's name without the engine's, e.g. ``ssdlite320_mobilenet_v3_large``."""
    params: dict[str, Any]
    """Every effective hyperparameter, defaults included."""
    options: dict[str, Any]
    classes: list[str]
    versions: dict[str, str] = {}
    """What the run was started with: detkit, the plugin, and their versions."""
    dropped: dict[str, int] = {}
    """How many boxes ``on_invalid="drop"`` left out, by code of the finding."""
    continued_from: Continued | None = None
    replayed: Replayed | None = None
    retention: str = ""
    """What the images of the ``retention`` channel are, on which parent and new model are compared at the end."""
    code: Code | None = None
    """The user's own modules, where there are any."""
    schema: int = SCHEMA


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a model and its identity."""

    sha256: str
    bytes: int


class WeightsOrigin(msgspec.Struct, frozen=True, kw_only=True):
    """Where the weights came from before training."""

    source: str = "none"
    """``none``, ``coco``, ``imagenet``, a file name, or the parent model."""
    sha256: str = ""
    licence: str = ""
    kept: list[str] = []
    """Class names whose head rows were kept."""
    new: list[str] = []
    """Class names that started fresh."""
    dropped: list[str] = []
    """Class names of the weights that the model does not have."""
    skipped: list[str] = []
    """Parameters that only one side has, or whose shapes differ by more than the number of classes."""


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine's ``train`` returns; the worker adds the rest of the `Manifest`."""

    native: dict[str, Any] = {}
    """The hyperparameters as the framework had them; what means the same as a parameter has its name."""
    weights: WeightsOrigin = WeightsOrigin()
    metrics: dict[str, float] = {}
    """Final numbers, e.g. ``val/AP`` of the weights that were kept."""
    score_threshold: float | None = None
    """Score of the best F1 on the validation images, if there were any."""
    max_detections: int = 100
    versions: dict[str, str] = {}
    """Versions of the frameworks."""
    hardware: dict[str, str] = {}
    timings: dict[str, float] = {}
    """Where the seconds of training went, see `detkit.timing.Clock.report`."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``model/detkit.json``: everything needed to open the model, and to know how it came to be."""

    backend: str
    """The backend whose engine opens the model."""
    engine: str
    model: str
    classes: list[str]
    params: dict[str, Any]
    native: dict[str, Any]
    options: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, str]
    data: dict[str, dict[str, Any]]
    """For each channel: digest, number of images, number of boxes."""
    weights: WeightsOrigin
    metrics: dict[str, float]
    score_threshold: float | None
    max_detections: int
    started: float
    """Seconds since the epoch (POSIX)."""
    seconds: float
    """Wall time of training, the time before a resume not counted."""
    artifacts: dict[str, Artifact]
    timings: dict[str, float] = {}
    """Where they went, of the process that wrote this; ``bytes_per_step`` are gradients sent to other processes."""
    dropped: dict[str, int] = {}
    parent: str = ""
    """sha256 of the parent's manifest, for incremental training."""
    continued_from: Continued | None = None
    """The run that this one made longer."""
    replayed: Replayed | None = None
    """What of earlier data was trained on beside the new."""
    code: Code | None = None
    """The user's own modules that opening the model takes, where there are any."""
    schema: int = SCHEMA


class Model:
    """A finished ``model/`` folder. Raises `UsageError` where there is none or it is of a newer detkit.

    ``code`` is the folder of the user's own modules that it was trained with; a model in a run that was trained on this
    account does without, see `detkit.trust.of_model`.
    """

    def __init__(self, path: str | Path, *, code: str | Path | None = None) -> None:
        self.path = Path(path)
        self.code = None if code is None else Path(code)
        manifest = self.path / "detkit.json"
        if not manifest.is_file():
            raise UsageError(f"{self.path} holds no finished model: there is no detkit.json in it")
        try:
            self.manifest = msgspec.json.decode(manifest.read_bytes(), type=Manifest)
        except msgspec.ValidationError as error:
            raise UsageError(f"{manifest} was written by another version of detkit: {error}") from None
        if self.manifest.schema > SCHEMA:
            raise UsageError(
                f"{manifest} has schema {self.manifest.schema}, this detkit knows up to {SCHEMA}; upgrade it"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the model's labels."""
        return tuple(self.manifest.classes)

    @property
    def name(self) -> str:
        """``engine/model``."""
        return f"{self.manifest.backend}/{self.manifest.model}"

    def seen(self) -> dict[str, list[str]]:
        """Return the sha256 of every image trained and validated on, by channel; a parent's count as trained on."""
        file = self.path / "seen.json"
        found: dict[str, list[str]] = json.loads(file.read_bytes()) if file.is_file() else {}
        return found


def _typed_like(example: Any, text: Any) -> Any:
    """Read a place's string as JSON, unless the parameter is text itself: SageMaker hands everything over as text."""
    if not isinstance(text, str) or (isinstance(example, str) and not text.startswith('"')):
        return text
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


class Workspace:
    """A run directory by its named places."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.stop_requested = False
        """Set by the worker when somebody asked it to stop; engines call `raise_if_stopped` at every step."""
        self.is_silent = False
        """Set by the worker where it is not the first of several that train together: that one's events are enough."""

    @property
    def run_file(self) -> Path:
        return self.path / "run.json"

    @property
    def lock(self) -> Path:
        """The file that a worker holds while it lives, see `detkit.files.lock_file`."""
        return self.path / ".lock"

    @property
    def job_file(self) -> Path:
        return self.path / "input/data/job/job.json"

    @property
    def checkpoints(self) -> Path:
        """The engine's own folder for resumable state."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def parent_model(self) -> Path:
        """Incremental training: the model that training starts from."""
        return self.path / "input/data/model"

    @property
    def code(self) -> Path:
        """The user's own modules."""
        return self.path / "input/data/code"

    @property
    def failure_file(self) -> Path:
        return self.path / "output/failure"

    @property
    def metrics_file(self) -> Path:
        return self.path / "output/data/metrics.jsonl"

    @property
    def log_file(self) -> Path:
        return self.path / "output/data/log.txt"

    def channel(self, name: str) -> Path:
        return self.path / "input/data" / name

    def create(self, job: Job) -> None:
        """Lay out an empty run. Raises `RunExists` where the directory holds anything, and `StorageError`."""
        if self.path.is_dir() and any(self.path.iterdir()):
            raise RunExists(self.path, self._holds())
        try:
            self.job_file.parent.mkdir(parents=True)
            for folder in (self.checkpoints, self.model, self.metrics_file.parent):
                folder.mkdir(parents=True)
            write_json(self.job_file, job)
        except FileExistsError:  # somebody else laid out a run here just now
            raise RunExists(self.path, self._holds()) from None
        except (OSError, StorageError) as error:
            shutil.rmtree(self.path, ignore_errors=True)
            raise error if isinstance(error, StorageError) else StorageError(self.path, error) from error

    def _holds(self) -> Literal["a finished run", "an unfinished run", "a run that never started", "other files"]:
        if (self.model / "detkit.json").is_file():
            return "a finished run"
        if self.run_file.is_file():
            return "an unfinished run"
        return "a run that never started" if self.job_file.is_file() else "other files"

    def job(self) -> Job:
        """Read the job, overlaid with the strings of ``input/config/hyperparameters.json`` where a place wrote them.

        Raises `UsageError` where there is no job, or one of another version of detkit.
        """
        try:
            job = msgspec.json.decode(self.job_file.read_bytes(), type=Job)
        except FileNotFoundError:
            raise UsageError(f"{self.path} holds no job: there is no {self.job_file.relative_to(self.path)}") from None
        except msgspec.DecodeError as error:
            raise UsageError(
                f"{self.job_file} was written by another version of detkit, or is damaged: {error}"
            ) from None
        overlay = self.path / "input/config/hyperparameters.json"
        if not overlay.is_file():
            return job
        given = {
            key: value
            for key, value in json.loads(overlay.read_bytes()).items()
            if not key.startswith(("_", "sagemaker_"))
        }
        typed = {key: _typed_like(job.params.get(key), value) for key, value in given.items()}
        return msgspec.structs.replace(job, params={**job.params, **typed})

    def write_dataset(self, channel: str, data: Dataset, image_digests: Sequence[str]) -> None:
        """Put a data set into a channel: columns, COCO annotations and links to the images.

        Images are hard-linked, else symbolically linked, else copied; those in a pack stay in it, and the pack is
        linked whole. ``image_digests`` are the sha256 of the images' files, in order. Raises `StorageError`, and
        `InvalidData` for an image id that leaves the folder.
        """
        from detkit.formats.coco import to_coco

        root = self.channel(channel)
        places = _link_images(data, root)
        with atomic_write(root / "columns.npz") as file:
            save_columns(data, file, places)
        write_json(root / "annotations.json", to_coco(data))
        origins = {
            place: source
            for place, source in zip(places, data.paths, strict=True)
            if is_remote(source) and packed(source) is None
        }
        write_json(root / "digests.json", {"images": list(image_digests), "origins": origins})

    def dataset(self, channel: str) -> Dataset | None:
        """Return a channel's data, or None where the run has none."""
        root = self.channel(channel)
        if not (root / "columns.npz").is_file():
            return None
        return load_columns(root / "columns.npz", root)

    def image_digests(self, channel: str) -> list[str]:
        """Return the sha256 of each image of a channel, in order; empty where the run has no such channel."""
        file = self.channel(channel) / "digests.json"
        digests: list[str] = json.loads(file.read_bytes())["images"] if file.is_file() else []
        return digests

    def image_origins(self, channel: str) -> dict[str, str]:
        """Return the URL that each image of a channel was fetched from, by its file's name in the channel's folder."""
        file = self.channel(channel) / "digests.json"
        origins: dict[str, str] = json.loads(file.read_bytes()).get("origins", {}) if file.is_file() else {}
        return origins

    def log(
        self,
        kind: Literal["log", "progress", "metric", "state"],
        values: Mapping[str, float | str],
        *,
        step: int | None = None,
        epoch: float | None = None,
    ) -> None:
        """Append one event to ``metrics.jsonl``; the controller reads it while the run goes on.

        Numbers that are not finite, such as the AP of images without objects, are left out: JSON has none. Where
        ``DETKIT_PRINT_EVENTS`` is 1, as in a container, the event is printed, too, see `detkit.events.to_line`.
        """
        if self.is_silent:
            return
        event = Event(t=time.time(), kind=kind, values=_finite(values), step=step, epoch=epoch)
        if os.environ.get("DETKIT_PRINT_EVENTS") == "1":
            print(to_line(event), flush=True)
        try:
            with self.metrics_file.open("ab", buffering=0) as file:
                file.write(msgspec.json.encode(event) + b"\n")
        except OSError as error:
            raise StorageError(self.metrics_file, error) from error

    def raise_if_stopped(self) -> None:
        """Raise `Stopped` when somebody asked for it. Engines call it once a step, where nothing is half written."""
        if self.stop_requested:
            raise Stopped

    def fail(self, message: str, detail: str = "") -> None:
        """Leave the reason of a failure; the first one stays."""
        with contextlib.suppress(OSError), self.failure_file.open("x") as file:  # there, or no space
            file.write(f"{message}\n{detail}" if detail else message)

    def finish(self, job: Job, trained: Trained, *, started: float) -> Manifest:
        """Write the manifest, last of all; from then on ``model/`` is a `Model`."""
        counts: dict[str, dict[str, Any]] = {}
        seen: dict[str, list[str]] = {}
        for channel in CHANNELS:
            data = self.dataset(channel)
            if data is not None:
                counts[channel] = {"digest": data.digest(), "images": len(data), "boxes": len(data.boxes)}
                if channel != "test":
                    seen[channel] = self.image_digests(channel)
        parent = ""
        if (self.parent_model / "detkit.json").is_file():
            parent = file_sha256(self.parent_model / "detkit.json")
            earlier = [digest for digests in Model(self.parent_model).seen().values() for digest in digests]
            seen["train"] = sorted({*seen.get("train", []), *earlier})
        write_json(self.model / "seen.json", seen)
        files = sorted(p for p in self.model.rglob("*") if p.is_file() and p.name != "detkit.json" and p.name[0] != ".")
        manifest = Manifest(
            backend=job.backend,
            engine=job.engine,
            model=job.model,
            classes=job.classes,
            params=job.params,
            native=trained.native,
            options=job.options,
            versions={"detkit": detkit.__version__, "python": platform.python_version(), **trained.versions},
            hardware={"machine": platform.machine(), "system": platform.system(), **trained.hardware},
            data=counts,
            weights=trained.weights,
            metrics=_finite(trained.metrics),
            score_threshold=trained.score_threshold,
            max_detections=trained.max_detections,
            started=started,
            seconds=time.time() - started,
            artifacts={
                p.relative_to(self.model).as_posix(): Artifact(sha256=file_sha256(p), bytes=p.stat().st_size)
                for p in files
            },
            timings=trained.timings,
            dropped=job.dropped,
            parent=parent,
            continued_from=job.continued_from,
            replayed=job.replayed,
            code=job.code,
        )
        write_json(self.model / "detkit.json", manifest)
        return manifest


def _link_images(data: Dataset, root: Path) -> list[str]:
    """Make the images appear in a folder, and return where each is, relative to it."""
    places: list[str] = []
    packs: dict[str, str] = {}
    for image_id, source in zip(data.image_ids, data.paths, strict=True):
        name, where = inside(image_id), packed(source)
        if where is None:
            place_image(source, root / "images" / name)
            places.append(f"images/{image_id}")
            continue
        pack, offset = where
        if pack not in packs:
            packs[pack] = "images.rec" if not packs else f"images-{len(packs) + 1}.rec"
            place(Path(pack), root / packs[pack])
        places.append(f"{packs[pack]}#{offset}")
    return places


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {n: value for n, value in values.items() if not isinstance(value, float) or math.isfinite(value)}
