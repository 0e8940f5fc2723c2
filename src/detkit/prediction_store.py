"""What models found on images, kept so that no model looks at an image twice.

One SQLite file for each model lies in ``$DETKIT_CACHE/predictions``, by default under ``~/.cache/detkit``;
``DETKIT_CACHE=off`` keeps nothing. An entry counts for the same model, thresholds, code of engine and detkit, versions
of what the engine needs, and bytes of the image file. Whatever is wrong with a file, the model merely looks again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import sqlite3
import sys
import time
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from detkit import plugins
from detkit.backends import LocalBackend, PredictOptions
from detkit.detections import Detections
from detkit.errors import DetkitError, DetkitWarning, UsageError
from detkit.files import cache_folder, file_sha256
from detkit.predictor import Predictor
from detkit.progress import track
from detkit.scores import SCORE_FLOOR

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from detkit.data import Dataset
    from detkit.job import Model

_VERSION = 1
"""Of the tables; part of the files' names."""
_OWN_CODE = (
    "backends", "boxes", "detections", "graphs", "images", "masks", "predictor", "recordio", "resizing", "sources",
    "videos", "wire", "worker",
)  # fmt: skip
"""What of detkit itself stands between an image file and the detections on it."""
_COLUMNS = "settings blob, image blob, width integer, height integer, found blob, seconds real, device text"
_DAMAGED = {11: "database disk image is malformed", 26: "file is not a database"}
"""SQLITE_CORRUPT and SQLITE_NOTADB; Python 3.10 has only the messages."""
_UNKNOWN_S = -1.0
"""In the table; SQLite has no NaN."""
_ASKED_AT_ONCE = 500
_FLUSH_S, _FLUSH_ROWS = 1.0, 512
"""So much is lost at most when the process is killed."""
_WAIT_S = 5.0
"""For another process that writes."""


class _Columns(msgspec.Struct, array_like=True):
    boxes: bytes
    labels: bytes
    scores: bytes
    masks: list[Any] | None


class Kept(NamedTuple):
    """What is known of one image."""

    detections: Detections
    """With an empty path: other files may have the same content."""
    seconds: float
    """That the model took for it; NaN where nobody knows."""
    device: str
    """As it was asked for, e.g. ``auto``."""


class PredictionStore:
    """Detections of one model with one set of options, by the sha256 of the image file. A context manager."""

    def __init__(self, model: Model, options: PredictOptions) -> None:
        self._classes = model.classes
        folder, name = cache_folder(), file_sha256(model.path / "detkit.json")[:32]
        self.path: Path | None = None if folder is None else folder / "predictions" / f"{name}-{_VERSION}.sqlite"
        """The file; None where nothing is kept."""
        limit = options.max_detections or model.manifest.max_detections
        self._limit = None if model.manifest.engine else limit
        """Of a model that no engine of detkit's opens, all is kept that it found, and cut when it is asked for."""
        key = json.dumps(
            {
                "score_threshold": float(options.score_threshold),
                "nms_threshold": None if options.nms_threshold is None else float(options.nms_threshold),
                "max_detections": limit if self._limit is None else "all",
                "versions": plugins.versions(model.manifest.backend),
                "needs": _needs(model),
                "code": [_code("detkit", _OWN_CODE), _code(model.manifest.engine.partition(":")[0].partition(".")[0])],
            },
            sort_keys=True,
        )
        self._settings = hashlib.sha256(key.encode()).digest()
        self._pending: list[tuple[bytes, bytes, int, int, bytes, float, str]] = []
        self._flushed = time.monotonic()
        self._database: sqlite3.Connection | None = None

    def __enter__(self) -> PredictionStore:
        self._open()
        return self

    def __exit__(self, *_error: object) -> None:
        self._flush()
        if self._database is not None:
            self._database.close()
        self._database = None

    def get(self, digests: Sequence[str]) -> list[Kept | None]:
        """Return what is known of each image, by the sha256 of its file; None where nothing is."""
        known: dict[str, Kept] = {}
        wanted = sorted({digest for digest in digests if _is_digest(digest)})
        with self._forgiven():
            self._flush()
            for start in range(0, len(wanted), _ASKED_AT_ONCE):
                if self._database is None:
                    break
                some = [bytes.fromhex(digest) for digest in wanted[start : start + _ASKED_AT_ONCE]]
                marks = ",".join("?" * len(some))
                rows = self._database.execute(
                    f"select image, width, height, found, seconds, device from found"
                    f" where settings = ? and image in ({marks})",
                    [self._settings, *some],
                )
                for image, *row in rows:
                    kept = self._unpack(*row)
                    if kept is not None:
                        known[image.hex()] = kept
        return [known.get(digest) for digest in digests]

    def put(self, digest: str, found: Detections, seconds: float, device: str = "") -> None:
        """Keep what the model found on an image, and how long that took; it is on disk within about a second."""
        if self._database is None or not _is_digest(digest):
            return
        columns = _Columns(
            np.ascontiguousarray(found.boxes, dtype="<f8").tobytes(),
            np.ascontiguousarray(found.labels, dtype="<i8").tobytes(),
            np.ascontiguousarray(found.scores, dtype="<f8").tobytes(),
            None if found.masks is None else list(found.masks),
        )
        content = msgspec.msgpack.encode(columns)
        content = zlib.crc32(content).to_bytes(4, "big") + content
        image = bytes.fromhex(digest)
        seconds = _UNKNOWN_S if math.isnan(seconds) else float(seconds)
        self._pending.append((self._settings, image, found.width, found.height, content, seconds, device))
        if time.monotonic() - self._flushed > _FLUSH_S or len(self._pending) >= _FLUSH_ROWS:
            self._flush()

    def _unpack(self, width: Any, height: Any, content: Any, seconds: Any, device: Any) -> Kept | None:
        """Return an entry; None where anything about it is not as it was written."""
        try:
            if zlib.crc32(memoryview(content)[4:]) != int.from_bytes(content[:4], "big"):
                return None
            columns = msgspec.msgpack.decode(memoryview(content)[4:], type=_Columns)
            found = Detections(
                path="",
                width=int(width),
                height=int(height),
                classes=self._classes,
                boxes=np.frombuffer(columns.boxes, dtype="<f8").astype(np.float64).reshape(-1, 4),
                labels=np.frombuffer(columns.labels, dtype="<i8").astype(np.int64),
                scores=np.frombuffer(columns.scores, dtype="<f8").astype(np.float64),
                masks=None if columns.masks is None else tuple(columns.masks),
            )
            kept = Kept(
                found if self._limit is None else found.best(self._limit),
                math.nan if seconds == _UNKNOWN_S else float(seconds),
                str(device),
            )
        except (ValueError, TypeError, msgspec.MsgspecError):
            return None
        return kept

    def _open(self) -> None:
        if self.path is None:
            return
        with self._forgiven():
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._database = sqlite3.connect(self.path, timeout=_WAIT_S)
            self._database.execute(f"create table if not exists found ({_COLUMNS}, primary key (settings, image))")
            columns = [name for (name,) in self._database.execute("select name from pragma_table_info('found')")]
            if columns != [column.split()[0] for column in _COLUMNS.split(",")]:
                self._set_aside("has the columns of another version", "other")

    def _flush(self) -> None:
        if not self._pending or self._database is None:
            return
        rows, self._pending = self._pending, []
        with self._forgiven(), self._database:
            self._database.executemany("insert or replace into found values (?,?,?,?,?,?,?)", rows)
        self._flushed = time.monotonic()

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        """Go on without what could not be read or written; a damaged file is set aside, and the next one is new."""
        try:
            yield
        except sqlite3.Error as error:  # else locked, no space, no permission
            if _is_damage(error):
                self._set_aside(f"is damaged ({error})", "damaged")
        except OSError:
            return

    def _set_aside(self, fault: str, ending: str) -> None:
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(sqlite3.Error):
                database.close()
        assert self.path is not None
        aside = self.path.with_suffix(f".{ending}")
        with contextlib.suppress(OSError):
            os.replace(self.path, aside)
            self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)  # it would mend the new one
            warnings.warn(
                f"{self.path} {fault} and is now called {aside.name}; images are looked at anew. it can be removed",
                DetkitWarning,
                stacklevel=5,
            )
            self._open()


@dataclass(frozen=True, eq=False, kw_only=True)
class Predicted:
    """What a model found on every image of a data set."""

    detections: list[Detections]
    """One for each image, in order."""
    seconds: NDArray[np.float64]
    """``(n,)`` seconds that the model took for each, decoding not counted; those of a batch share its time."""
    reused: int
    """How many came from the store."""
    device: str
    """As it was asked for when the model looked, e.g. ``auto``; all of them where there were several."""

    @property
    def seconds_per_image(self) -> float | None:
        """The median, which the slow first batch of a cold model does not move; None where no time is known."""
        known = self.seconds[np.isfinite(self.seconds)]
        return float(np.median(known)) if len(known) else None


def predict_all(
    model: Model,
    data: Dataset,
    digests: Sequence[str],
    *,
    score_threshold: float = SCORE_FLOOR,
    nms_threshold: float | None = None,
    max_detections: int | None = None,
    device: str = "auto",
    batch_size: int = 8,
    isolate: bool = False,
    fresh: bool = False,
    doing: str = "predict",
) -> Predicted:
    """Return what a model finds on every image of ``data``; it is opened only for images that it has not seen so.

    ``digests`` are the sha256 of the image files, in order. ``fresh`` looks at every image again, and keeps that. Of a
    model that is not one of detkit's engines', only what its own place found is kept, which the place's plugin does.
    A bar, with ``doing`` beside it, is shown within `detkit.progress.shown`. Raises as `Predictor` does.
    """
    if len(digests) != len(data):
        raise UsageError(f"{len(digests)} digests for {len(data)} images; expected one for each, in order")
    limit = max_detections or model.manifest.max_detections
    options = PredictOptions(
        device=device, score_threshold=score_threshold, nms_threshold=nms_threshold, max_detections=limit
    )
    with PredictionStore(model, options) as store:
        entries: list[Kept | None] = [None] * len(data) if fresh else store.get(digests)
        elsewhere = not model.manifest.engine
        if elsewhere and None in entries:  # what the place found is not mixed with what is found here
            entries = [None] * len(data)
        missing = [i for i, entry in enumerate(entries) if entry is None]
        if missing:
            todo = data if len(missing) == len(data) else data.take(missing)
            with Predictor(
                model,
                score_threshold=score_threshold,
                nms_threshold=nms_threshold,
                max_detections=limit,
                device=device,
                batch_size=batch_size,
                isolate=isolate,
            ) as predictor:
                found = track(_timed(predictor, todo), doing, total=len(todo))
                for i, (detections, seconds) in zip(missing, found, strict=True):
                    entries[i] = Kept(detections, seconds, device)
                    if not elsewhere:
                        store.put(digests[i], detections, seconds, device)
    complete = [entry for entry in entries if entry is not None]
    return Predicted(
        detections=[replace(entry.detections, path=path) for entry, path in zip(complete, data.paths, strict=True)],
        seconds=np.array([entry.seconds for entry in complete], dtype=np.float64),
        reused=len(data) - len(missing),
        device=", ".join(sorted({entry.device for entry in complete})),
    )


def _timed(predictor: Predictor, data: Dataset) -> Iterator[tuple[Detections, float]]:
    """Yield the detections on each image, and the share of its batch's time that falls to it."""
    busy_s, num_images, each = predictor.busy_s, predictor.num_images, 0.0
    for found in predictor.predict(data):
        if predictor.num_images > num_images:
            each = (predictor.busy_s - busy_s) / (predictor.num_images - num_images)
            busy_s, num_images = predictor.busy_s, predictor.num_images
        yield found, each


def store_size() -> int:
    """Return the bytes of all files in the store."""
    folder, size = cache_folder(), 0
    if folder is not None:
        with contextlib.suppress(OSError):
            size = sum(file.stat().st_size for file in (folder / "predictions").iterdir())
    return size


def _is_damage(error: sqlite3.Error) -> bool:
    code: int | None = getattr(error, "sqlite_errorcode", None)  # from Python 3.11 on
    return code & 0xFF in _DAMAGED if code is not None else str(error) in _DAMAGED.values()


def _needs(model: Model) -> dict[str, str]:
    """Return the versions of the distributions that hold what the engine needs, where they are known.

    They are called as the module is, or have more behind the name, as onnxruntime-gpu; all of them where there are two.
    They are those of the interpreter that opens the model. Which framework trained it, its manifest says, and each has
    a database of its own.
    """
    backend = plugins.backend(model.manifest.backend)
    if not isinstance(backend, LocalBackend):
        return {}
    try:
        python = backend.interpreter(None, last=str(model.manifest.options.get("python")))
    except DetkitError:  # which is for those to raise who open the model
        return {}
    folders = sys.path
    if python != sys.executable:
        folders = [str(folder) for folder in Path(python).parent.parent.glob("lib/python*/site-packages")]
    found = {}
    for name in backend.requires:
        with contextlib.suppress(Exception):  # none of this name, or its metadata is not whole
            found[name] = next(iter(importlib.metadata.distributions(name=name, path=folders))).version
        for place in sorted(place for folder in folders for place in Path(folder).glob(f"{name}_*.dist-info")):
            with contextlib.suppress(Exception):
                variant = importlib.metadata.PathDistribution(place)
                if name in (variant.read_text("top_level.txt") or "").split():
                    found[place.name.partition("-")[0]] = variant.version
    return found


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


@functools.cache
def _code(package: str, modules: tuple[str, ...] = ()) -> str:
    """Return the sha256 of the Python files of a package, or of a module that is in none.

    Plugins are developed, too, without a new version every time.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    h = hashlib.sha256()
    if spec is not None and spec.submodule_search_locations is None and spec.origin:
        with contextlib.suppress(OSError):
            h.update(Path(spec.origin).read_bytes())
    for folder in map(Path, (spec.submodule_search_locations or []) if spec is not None else []):
        for file in sorted(folder / f"{name}.py" for name in modules) or sorted(folder.rglob("*.py")):
            with contextlib.suppress(OSError):
                h.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return h.hexdigest()
