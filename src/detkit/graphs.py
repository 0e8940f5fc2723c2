"""Exported graphs: what a reader has to know beside the graph, and what it does before and after running it.

A graph takes ``(b, 3, h, w)`` RGB images and returns candidates, ``boxes (b, n, 4)``, ``scores (b, n)`` and ``labels
(b, n)``: xyxy in pixels of the input, class indices from 0, -1 where there is none. A trailing axis of one is allowed.
Suppression of the candidates is the reader's, unless the graph has done it.

An exporter writes the graph's file and calls `write_model`; a reader hands `GraphDetector` what runs the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from detkit.backends import PredictOptions
from detkit.boxes import nms
from detkit.detections import Detections
from detkit.errors import InvalidData, UsageError
from detkit.files import file_sha256, inside, write_json
from detkit.images import Image
from detkit.job import Artifact, Manifest, Model
from detkit.masks import encode
from detkit.resizing import Resampling, apply, linear_taps, resize

PROPERTY = "detkit"
"""Where a format has room for texts, as ONNX's metadata properties: the name of the one that is the manifest's JSON, so
that the bare file can be opened, too. It has no artifacts, as a file cannot hold its own sha256."""

ONNX = {"backend": "onnx", "engine": "detkit_onnx.engine:OnnxEngine"}
"""Who opens ONNX files: arguments for `describe` and `write_model`."""

CALIBRATION = "calibration"
"""Folder of images, within that of an export, for an engine that quantizes; removed when it is done."""

_Size = Annotated[int, Meta(ge=1, le=16384)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_MOST_PIXELS = 1 << 26
"""Of an image as a graph takes it, padded; 8192 x 8192, which are 800 MB of floats."""
_IN_MASK = 0.5
"""Share from which a pixel is the object's, as torchvision's documentation has it."""

Runner: TypeAlias = "Callable[[Mapping[str, NDArray[Any]]], Sequence[NDArray[Any]]]"
"""Runs a graph: its inputs by name, in the order of the graph's, to the outputs in the order of `Graph.outputs`."""


class Graph(msgspec.Struct, frozen=True, kw_only=True):
    """What a reader of a graph has to know. Part of the exported model's manifest, as ``native["graph"]``."""

    format: str
    """``onnx``, ``torchscript`` ..."""
    file: str
    """The graph's file, by its name in the model's folder."""
    input: str
    """Name of the input."""
    sizes: str = ""
    """Name of a second input where there is one: ``(b, 2)`` int64 height and width of each image without padding."""
    outputs: list[str]
    """Names of the boxes, scores and labels, and of the masks where there are any: ``(b, n, 1, m, m)`` in 0..1, laid
    into their boxes."""
    dtype: str
    """Of the input: ``uint8``, or ``float32`` in 0..255 unless `mean` is given."""
    image_size: _Size
    """The side of a square to which images are stretched, or the shorter side where `max_ratio` is given."""
    max_ratio: Annotated[float, Meta(ge=1, le=64)] | None = None
    """Longer side over shorter side, at most: images keep their shape, and the longer side is
    ``round(image_size * max_ratio)`` at most. None where images are stretched."""
    resampling: Resampling = "bilinear"
    """How images are resized, see `detkit.resizing`."""
    size_divisible: _Size = 1
    """The images of a batch are padded to the right and below to a common size, a multiple of this."""
    padding: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """The colour that they are padded with, in the units of the input."""
    mean: list[float] = []
    """Where given, the input is ``(rgb / 255 - mean) / std``; the graph normalises otherwise."""
    std: list[float] = []
    max_batch: _Size | None = None
    """Images that the graph takes at once; any number where None."""
    clipped: bool = True
    """Whether boxes are cut off at the image's border before suppression; they always are after it."""
    suppressed: bool = False
    """Whether the graph has suppressed and cut the candidates itself, with the numbers below."""
    nms_threshold: _Share
    """Intersection over union above which the lower-scored of two boxes of one class goes."""
    class_candidates: Annotated[int, Meta(ge=1)] | None = None
    """The best so many candidates of each class enter suppression; all where None."""
    max_detections: Annotated[int, Meta(ge=1)]
    """The best so many of all classes are kept."""
    pasting: Literal["torchvision", "aligned"] = "torchvision"
    """How masks are laid into their boxes: as torchvision does it, or exactly, as Detectron2 does."""

    def final_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height to which an image is resized."""
        if self.max_ratio is None:
            return self.image_size, self.image_size
        scale = min(self.image_size / min(width, height), round(self.image_size * self.max_ratio) / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))


def describe(model: Model, graph: Graph, *, backend: str, engine: str) -> Manifest:
    """Return the manifest of an exported model, yet without artifacts: the original's, opened by another engine.

    It needs none of the user's modules, and no interpreter of the original's.
    """
    manifest = model.manifest
    return msgspec.structs.replace(
        manifest,
        backend=backend,
        engine=engine,
        # What the original was verified to says nothing of this one.
        native={**{k: v for k, v in manifest.native.items() if k != "verified"}, "graph": msgspec.to_builtins(graph)},
        options={name: value for name, value in manifest.options.items() if name != "python"},
        artifacts={},
        code=None,
    )


def write_model(model: Model, graph: Graph, folder: Path, *, backend: str, engine: str) -> Model:
    """Make a folder that holds ``graph.file`` a model: write ``seen.json`` and, last of all, ``detkit.json``."""
    return write_manifest(describe(model, graph, backend=backend, engine=engine), model, folder)


def write_manifest(manifest: Manifest, origin: Model, folder: Path) -> Model:
    """Write the manifest of `describe` with the artifacts, and beside it which images ``origin`` has seen.

    Those in the folder `CALIBRATION` count as seen, too, in a channel of that name.
    """
    seen = origin.seen()
    calibration = {file_sha256(file) for file in (folder / CALIBRATION).glob("*")}
    if calibration:
        seen[CALIBRATION] = sorted(calibration.union(seen.get(CALIBRATION, [])))
    if seen:
        write_json(folder / "seen.json", seen)
    files = [folder / manifest.native["graph"]["file"], *([folder / "seen.json"] if seen else [])]
    artifacts = {file.name: Artifact(sha256=file_sha256(file), bytes=file.stat().st_size) for file in files}
    write_json(folder / "detkit.json", msgspec.structs.replace(manifest, artifacts=artifacts))
    return Model(folder)


def graph_of(model: Model) -> Graph:
    """Return the description of an exported model's graph, whose file is there.

    Raises `UsageError` where the manifest has none, or the file is missing or not the one that was exported.
    """
    try:
        graph = msgspec.convert(model.manifest.native.get("graph"), Graph)
        file = model.path / inside(graph.file)
    except (msgspec.ValidationError, InvalidData) as error:
        raise UsageError(f"{model.path} holds no exported graph that can be read: {error}; export it again") from None
    if len(graph.outputs) not in {3, 4} or graph.dtype not in {"uint8", "float32"} or len(graph.mean) not in {0, 3}:
        raise UsageError(f"the graph in {model.path} is described in a way that this detkit does not know; upgrade it")
    if (
        len(graph.std) != len(graph.mean)
        or (graph.mean and graph.dtype != "float32")
        or not all(math.isfinite(value) for value in (*graph.mean, *graph.std, *graph.padding))
        or not all(value > 0 for value in graph.std)
    ):
        raise UsageError(
            f"the graph in {model.path} is normalised in a way that cannot be: mean {graph.mean}, std {graph.std}, "
            f"padding {graph.padding}, {graph.dtype}; export it again"
        )
    longest = round(graph.image_size * (graph.max_ratio or 1))
    side = -(-longest // graph.size_divisible) * graph.size_divisible
    if side**2 > _MOST_PIXELS:
        raise UsageError(
            f"the graph in {model.path} asks for images of up to {side} x {side} pixels, and {_MOST_PIXELS} pixels are "
            "the most; export it with a smaller image_size"
        )
    known = model.manifest.artifacts.get(graph.file)
    if not file.is_file():
        raise UsageError(f"{model.path} lacks its graph, {graph.file}; copy the whole folder, or export it again")
    if known is not None and (file.stat().st_size != known.bytes or file_sha256(file) != known.sha256):
        raise UsageError(f"{file} is not the file that was exported: its sha256 is another; export it again")
    return graph


class GraphDetector:
    """An opened graph. ``run`` is called with batches of `Graph.max_batch` images at most."""

    def __init__(self, graph: Graph, classes: Sequence[str], run: Runner, options: PredictOptions) -> None:
        if graph.suppressed and options.nms_threshold not in {None, graph.nms_threshold}:
            raise UsageError(
                f"this export suppresses by itself, at {graph.nms_threshold:g}; nms_threshold cannot be set: leave it "
                "out, or open the model that was exported"
            )
        if graph.suppressed and (options.max_detections or 0) > graph.max_detections:
            raise UsageError(
                f"this export keeps {graph.max_detections} detections by itself; max_detections cannot be "
                f"{options.max_detections}: ask for fewer, or open the model that was exported"
            )
        self.graph, self._classes, self._options = graph, tuple(classes), options
        self._run: Runner | None = run

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        most = self.graph.max_batch or max(len(images), 1)
        return [one for i in range(0, len(images), most) for one in self._batch(images[i : i + most])]

    def _batch(self, images: Sequence[Image]) -> list[Detections]:
        assert self._run is not None, "closed"
        inputs = [self.graph.final_size(image.shape[1], image.shape[0]) for image in images]
        outputs = self._run(prepare(self.graph, images))
        return [
            finish(
                self.graph,
                [one[i] for one in outputs],
                self._classes,
                self._options,
                input_size=input_size,
                size=(image.shape[1], image.shape[0]),
            )
            for i, (image, input_size) in enumerate(zip(images, inputs, strict=True))
        ]

    def close(self) -> None:
        self._run = None


def prepare(graph: Graph, images: Sequence[Image]) -> dict[str, NDArray[Any]]:
    """Return the inputs of a graph for ``(h, w, 3)`` RGB uint8 images of any sizes: resized, padded and normalised."""
    sizes = [graph.final_size(image.shape[1], image.shape[0]) for image in images]
    step = graph.size_divisible
    width, height = (-(-max(side) // step) * step for side in zip(*sizes, strict=True))
    batch = np.empty((len(images), 3, height, width), dtype=graph.dtype)
    for target, image, (w, h) in zip(batch, images, sizes, strict=True):
        if (w, h) != (width, height):
            target[:] = np.array(graph.padding).reshape(3, 1, 1)
        target[:, :h, :w] = _normalised(graph, resize(image, w, h, graph.resampling)).transpose(2, 0, 1)
    feed: dict[str, NDArray[Any]] = {graph.input: batch}
    if graph.sizes:
        feed[graph.sizes] = np.array(sizes, dtype=np.int64)[:, ::-1].copy()
    return feed


def _normalised(graph: Graph, image: Image) -> NDArray[Any]:
    if not graph.mean:
        return image
    mean, std = np.array([graph.mean, graph.std], dtype=np.float32)
    normalised: NDArray[np.float32] = (image.astype(np.float32) / np.float32(255) - mean) / std
    return normalised


def finish(
    graph: Graph,
    outputs: Sequence[NDArray[Any]],
    classes: tuple[str, ...],
    options: PredictOptions,
    *,
    input_size: tuple[int, int],
    size: tuple[int, int],
) -> Detections:
    """Return what a graph found on one image. Both sizes are width and height, that of the input without padding.

    Kept is what scores above the threshold. Raises `UsageError` for outputs of other shapes than the graph's
    description says, and for scores and labels that are no numbers, which are faults of the export.
    """
    boxes, scores, labels, masks = _one(outputs)
    if not (np.isfinite(labels).all() and np.isfinite(scores[labels >= 0]).all()):
        raise UsageError("the graph found scores or labels that are no finite numbers; export it again, and verify it")
    edge = np.array([*input_size, *input_size], dtype=np.float32)
    rows = np.flatnonzero((labels >= 0) & (scores > np.float32(options.score_threshold)))
    sound = np.isfinite(boxes[rows]).all(axis=1)
    if not graph.clipped:  # what lies wholly outside has no area there
        cut = np.clip(boxes[rows], 0, edge)
        sound &= (cut[:, 2:] > cut[:, :2]).all(axis=1)
    rows = rows[sound]
    boxes, scores, labels = boxes[rows].astype(np.float32), scores[rows], labels[rows].astype(np.int64)
    if len(labels) and labels.max() >= len(classes):
        raise UsageError(f"the graph found a class {labels.max()}, and the model has {len(classes)}; export it again")
    if graph.clipped:
        boxes = np.clip(boxes, 0, edge)
    most = options.max_detections or graph.max_detections
    if graph.suppressed:
        kept = np.argsort(-scores, kind="stable")[:most]
    else:
        threshold = graph.nms_threshold if options.nms_threshold is None else options.nms_threshold
        kept = nms(boxes, scores, labels, threshold, class_candidates=graph.class_candidates, limit=most)
    scale = np.array([*size, *size]) / edge.astype(np.float64)
    found = np.clip(boxes[kept] * scale, 0, [*size, *size])
    return Detections(
        path="",
        width=size[0],
        height=size[1],
        classes=classes,
        boxes=found,
        labels=labels[kept],
        scores=scores[kept].astype(np.float64),
        masks=None
        if masks is None
        else tuple(
            encode((paste_aligned if graph.pasting == "aligned" else paste)(masks[row], box, *size))
            for row, box in zip(rows[kept], found, strict=True)
        ),
    )


def _one(outputs: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    """Return the outputs for one image without axes of one."""
    boxes = outputs[0]
    n = len(boxes)
    if boxes.shape != (n, 4) or any(one.size != n for one in outputs[1:3]):
        raise UsageError(
            f"the graph's outputs have shapes {[one.shape for one in outputs]} for an image; expected (n, 4), (n,), "
            "(n,); export it again"
        )
    masks = outputs[3].reshape(n, *outputs[3].shape[-2:]) if len(outputs) > 3 else None
    return boxes, outputs[1].reshape(n), outputs[2].reshape(n), masks


def paste(mask: NDArray[Any], box: NDArray[np.float64], width: int, height: int) -> NDArray[np.bool_]:
    """Lay an ``(m, m)`` mask of shares into its box in an image, as torchvision's ``paste_masks_in_image`` does.

    There the mask gets a border of one, and the box grows with it; whole pixels are counted with both ends.
    """
    side = len(mask)
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * ((side + 2) / side)
    (left, top), (right, bottom) = (centre - half).astype(np.int64), (centre + half).astype(np.int64)
    w, h = max(int(right - left) + 1, 1), max(int(bottom - top) + 1, 1)
    shares = apply(np.pad(mask.astype(np.float32), 1), linear_taps(side + 2, h), linear_taps(side + 2, w))
    out = np.zeros((height, width), dtype=np.bool_)
    x0, x1, y0, y1 = max(left, 0), min(right + 1, width), max(top, 0), min(bottom + 1, height)
    if x1 > x0 and y1 > y0:
        out[y0:y1, x0:x1] = shares[y0 - top : y1 - top, x0 - left : x1 - left] >= _IN_MASK
    return out


def paste_aligned(mask: NDArray[Any], box: NDArray[np.float64], width: int, height: int) -> NDArray[np.bool_]:
    """Lay an ``(m, m)`` mask of shares into its box in an image, as Detectron2's ``paste_masks_in_image`` does.

    Each pixel's centre is looked up between the four shares around it; beyond the mask they are 0.
    """
    side = len(mask)
    out = np.zeros((height, width), dtype=np.bool_)
    (left, top), (right, bottom) = np.floor(box[:2]).astype(int) - 1, np.ceil(box[2:]).astype(int) + 1
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = max(x0, min(right, width)), max(y0, min(bottom, height))
    rows, columns = (
        _shares_at((np.arange(begin, end) + 0.5 - low) / (high - low) * side - 0.5, side)
        for begin, end, low, high in ((y0, y1, box[1], box[3]), (x0, x1, box[0], box[2]))
    )
    out[y0:y1, x0:x1] = rows @ mask.astype(np.float32) @ columns.T >= _IN_MASK
    return out


def _shares_at(places: NDArray[np.float64], side: int) -> NDArray[np.float32]:
    """Return ``(n, side)``: how much of each share a place between them gets."""
    shares: NDArray[np.float32] = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(side))).astype(np.float32)
    return shares
