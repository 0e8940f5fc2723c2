"""Detectors that others trained, in MXNet's own format: SSD as MXNet's ``example/ssd`` builds it, or as GluonCV does.

The model folder holds `NETWORK` and `WEIGHTS`, as MXNet wrote them, beside a manifest of the model ``symbol`` whose
``native`` has ``image_size``, the side of the square input in pixels, and may have ``nms_threshold`` and ``nms_topk``.
SageMaker's built-in algorithm leaves the first kind, mostly with the losses of training still in it; JumpStart's
fine-tuning of GluonCV's models is taken to leave the second, as ``HybridBlock.export`` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detkit.backends import PredictOptions
from detkit.detections import Detections
from detkit.errors import InvalidData, Unsupported
from detkit.images import Image
from detkit.job import Model
from detkit_gluoncv.batches import resize, to_input
from detkit_gluoncv.detector import to_detections
from detkit_gluoncv.graphs import Graph, MultiBoxHead
from detkit_gluoncv.runtime import MXNetError, choose_context, explained_errors, last_line, mx

NETWORK, WEIGHTS = "symbol.json", "weights.params"

MEAN = (123.0, 117.0, 104.0)
"""Of RGB values 0 to 255: what ``example/ssd`` subtracts (``--mean-r``, ``-g`` and ``-b`` of its evaluate.py)."""

_RAW = 60.0
"""A running mean of the image above this was made of values 0 to 255, below it of values that `MEAN` was taken from."""

_BILINEAR = 1
_NMS_THRESHOLD, _NMS_TOPK = 0.45, 400
"""Defaults of the built-in algorithm."""

_MOST_PARAMETER_BYTES, _MOST_BYTES = 4_000_000_000, 16_000_000_000
"""Of the file, and of all that the network computes for one image; VGG-16 at 512 pixels takes 105 MB and 1 GB."""


def open_artifact(model: Model, options: PredictOptions) -> SymbolDetector:
    """Open such a folder. Raises `InvalidData` where it is damaged, `Unsupported` for networks that are no such SSD."""
    known = model.manifest.native
    size = int(known["image_size"])
    graph = Graph.read(model.path / NETWORK)
    head = graph.find_multibox()
    if head is not None:
        symbol = _with_detection(graph, head, known, options, len(model.classes))
    elif graph.ends_in_gluoncv():
        changed = {} if options.nms_threshold is None else {"overlap_thresh": str(options.nms_threshold)}
        symbol = mx.sym.load_json(graph.part(graph.heads, {"_contrib_box_nms": changed}))
    else:
        raise Unsupported(
            f"{model.name} is no SSD of MXNet's example/ssd or of GluonCV: it has {len(graph.heads)} output(s), "
            f"{', '.join(graph.nodes[index].name for index, _ in graph.heads[:8])}, made by "
            f"{', '.join(graph.operators())[:400]}"
        )
    context = choose_context(options.device)
    network = _bind(symbol, _read_weights(model.path / WEIGHTS), size, context)
    mean = None if head is None else _mean(graph, network)
    return SymbolDetector(
        network,
        model.classes,
        image_size=size,
        mean=mean,
        context=context,
        score_threshold=options.score_threshold,
        max_detections=options.max_detections or model.manifest.max_detections,
    )


class SymbolDetector:
    """A bound symbol, which looks at one image at a time."""

    def __init__(
        self,
        network: Any,
        classes: Sequence[str],
        *,
        image_size: int,
        mean: Sequence[float] | None,
        context: Any,
        score_threshold: float,
        max_detections: int,
    ) -> None:
        """``mean`` is taken from the pixels; with None they are normalised as GluonCV's models want it."""
        self._network, self._classes, self._context = network, tuple(classes), context
        self._image_size, self._mean = image_size, mean
        self._score_threshold, self._max_detections = score_threshold, max_detections

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        with explained_errors():
            return [self._detect(image) for image in images]

    def _detect(self, image: Image) -> Detections:
        outputs = self._network.forward(is_train=False, data=self._input(image))
        # One table of shares of the image, or three of pixels of the input.
        rows = np.concatenate([one.asnumpy()[0] for one in outputs], axis=1).astype(np.float64)
        if (rows[:, 0] >= len(self._classes)).any():
            raise InvalidData(
                f"the network found class {rows[:, 0].max():g}; expected at most {len(self._classes) - 1}, as the "
                f"model has the classes {', '.join(self._classes)}"
            )
        return to_detections(
            rows,
            image,
            self._classes,
            sides=1 if len(outputs) == 1 else self._image_size,
            score_threshold=self._score_threshold,
            max_detections=self._max_detections,
        )

    def _input(self, image: Image) -> Any:
        if self._mean is None:
            return to_input([image], self._image_size, self._context)
        pixels = resize(mx.nd.array(image, dtype="uint8"), self._image_size, _BILINEAR).astype("float32")
        centred = pixels - mx.nd.array(self._mean)
        return centred.transpose((2, 0, 1)).expand_dims(0).as_in_context(self._context)

    def close(self) -> None:
        self._network = None


def _with_detection(
    graph: Graph, head: MultiBoxHead, known: Mapping[str, Any], options: PredictOptions, num_classes: int
) -> Any:
    """Return the symbol of the detections: without losses and labels, with suppression as it was trained with."""
    scores, offsets, anchors = mx.sym.load_json(graph.part([head.classes, head.offsets, head.anchors]))
    size = int(known["image_size"])
    _, shapes, _ = scores.infer_shape_partial(data=(1, 3, size, size))
    if len(shapes[0]) != 3 or shapes[0][1] != num_classes + 1:
        raise InvalidData(f"the network's scores are {shapes[0]}; expected {num_classes} classes and the background")
    if not head.are_scores:
        scores = mx.sym.softmax(scores, axis=1)
    settings = {name: head.settings[name] for name in ("clip", "force_suppress", "variances") if name in head.settings}
    return mx.sym.contrib.MultiBoxDetection(
        scores,
        offsets,
        anchors,
        threshold=options.score_threshold,
        nms_threshold=options.nms_threshold or float(known.get("nms_threshold", _NMS_THRESHOLD)),
        nms_topk=int(known.get("nms_topk", _NMS_TOPK)),
        **settings,
    )


def _read_weights(path: Path) -> dict[str, Any]:
    """Return the arrays of a file by name, without what tells arguments and states apart. Raises `InvalidData`."""
    if path.stat().st_size > _MOST_PARAMETER_BYTES:
        raise InvalidData(f"{path.name} has more than {_MOST_PARAMETER_BYTES / 1e9:.0f} GB, which is no detector")
    try:
        saved = mx.nd.load(str(path))
    except (MXNetError, OSError, ValueError) as error:
        raise InvalidData(f"{path.name} is no file of MXNet parameters, or damaged: {last_line(error)}") from None
    if not isinstance(saved, dict):
        raise InvalidData(f"{path.name} holds parameters without names; expected those of a checkpoint")
    return {name.partition(":")[2] if name.startswith(("arg:", "aux:")) else name: saved[name] for name in saved}


def _bind(symbol: Any, weights: Mapping[str, Any], image_size: int, context: Any) -> Any:
    """Return the symbol with its weights, ready for one image. Raises `InvalidData` where they do not fit."""
    shape = (1, 3, image_size, image_size)
    names, states = symbol.list_arguments(), symbol.list_auxiliary_states()
    missing = [name for name in (*names, *states) if name != "data" and name not in weights]
    if "data" not in names or missing:
        what = f"weights for {', '.join(missing[:5])}" if missing else "an input called 'data'"
        raise InvalidData(f"the network has no {what}; do symbol and parameters belong together?")
    given = {name: weights[name].shape for name in names if name != "data"}
    try:
        _, everything, auxiliary = symbol.get_internals().infer_shape(data=shape, **given)
    except MXNetError as error:
        raise InvalidData(f"the weights do not fit the network at {image_size} pixels: {last_line(error)}") from None
    if everything is None or [weights[name].shape for name in states] != [tuple(one) for one in auxiliary]:
        raise InvalidData(f"the weights do not fit the network at {image_size} pixels: shapes differ, or are not known")
    size = 4 * sum(int(np.prod(one, dtype=np.float64)) for one in everything)
    if size > _MOST_BYTES:
        raise InvalidData(f"the network computes {size / 1e9:.0f} GB for one image of {image_size} pixels: no detector")
    network = symbol.simple_bind(context, grad_req="null", data=shape)
    network.copy_params_from(
        {name: weights[name] for name in names if name != "data"}, {name: weights[name] for name in states}
    )
    return network


def _mean(graph: Graph, network: Any) -> tuple[float, ...]:
    """Return what is to be taken from the pixels.

    ``example/ssd`` takes `MEAN`. A ResNet begins with a normalisation of the image, whose running mean tells what it
    was trained with: SageMaker's own notebooks give such a network the pixels as they are.
    """
    name = graph.own_normalisation()
    if name is not None and float(network.aux_dict[name].mean().asscalar()) > _RAW:
        return (0.0, 0.0, 0.0)
    return MEAN
