"""Trained networks as ONNX and TorchScript files, see `detkit_torchvision.graphs`; and TorchScript files opened."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor, nn

from detkit.errors import DetkitError, PluginError, Unsupported, UsageError
from detkit.files import atomic_write
from detkit.graphs import ONNX, PROPERTY, Graph, GraphDetector, describe, write_model
from detkit.graphs import graph_of as graph_in
from detkit_torchvision.devices import choose_device
from detkit_torchvision.graphs import graph_of
from detkit_torchvision.graphs.one_stage import SsdGraph
from detkit_torchvision.graphs.suppression import onnx_translations
from detkit_torchvision.graphs.two_stage import RcnnGraph
from detkit_torchvision.models import MODELS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from detkit.backends import PredictOptions
    from detkit.job import Model

INSTALL = "pip install 'detkit-torchvision[export]'"

_OPSET = 18
"""The operators that torch's exporter writes by itself; any ONNX Runtime since 1.14, of 2023, has them."""

_EXAMPLE = (320, 448)
"""Height and width of the images that a graph of free sizes is traced with: no level of a pyramid is of one pixel."""

_FILES = {"onnx": "model.onnx", "torchscript": "model.pt"}


def export(network: Any, model: Model, format: str, folder: Path) -> Path:
    """Write a network, built with the score floor, the nms_threshold and the max_detections to export.

    Raises `Unsupported` for one that ``modify=`` has made into something else, and `PluginError` where a package is
    missing.
    """
    if format == "onnx":
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise PluginError(f"export to ONNX needs {' and '.join(missing)}; install with `{INSTALL}`")
    manifest = model.manifest
    inputs = _examples(network, manifest.model, int(manifest.native["image_size"]))
    made = graph_of(network.eval(), inputs["images"])
    modify = manifest.params.get("modify")
    if made is None:
        raise Unsupported(
            f"modify={modify} made a {type(network).__name__} of {model.name} that does not run as torchvision's own, "
            f"so that it cannot be exported to {format!r}; new backbones, heads and predictors of its parts can"
        )
    graph = _describe(network, made, model, format, list(inputs))
    folder.mkdir(parents=True, exist_ok=True)
    write = _write_onnx if format == "onnx" else _write_torchscript
    try:
        write(made, inputs, model, graph, folder / graph.file)
    except Exception as error:
        if modify is None or isinstance(error, DetkitError):
            raise
        raise Unsupported(
            f"what modify={modify} made of {model.name} cannot be exported to {format!r}: {str(error).strip()[:500]}"
        ) from error
    origin = ONNX if format == "onnx" else {"backend": manifest.backend, "engine": manifest.engine}
    write_model(model, graph, folder, **origin)
    return folder / graph.file


def open_torchscript(model: Model, options: PredictOptions) -> GraphDetector:
    """Open what `export` wrote. Raises `UsageError` where the file is missing, damaged or of another format.

    The file is a program; whether it may run, `detkit.trust` has said before.
    """
    graph = graph_in(model)
    if graph.format != "torchscript":
        raise UsageError(f"{model.path} holds a graph in {graph.format!r}; this engine opens 'torchscript'")
    device = choose_device(options.device)
    try:
        with _quiet():
            module = torch.jit.load(model.path / graph.file, map_location=device)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise UsageError(f"{model.path / graph.file} is no TorchScript file: {str(error).splitlines()[0]}") from None

    @torch.inference_mode()
    def run(inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        outputs = module(*(torch.from_numpy(one).to(device) for one in inputs.values()))
        return [output.cpu().numpy() for output in outputs]

    return GraphDetector(graph, model.classes, run, options)


def _examples(network: Any, name: str, image_size: int) -> dict[str, Tensor]:
    """Return two images as the graph of a network takes them, by the names of its inputs."""
    if MODELS[name].max_ratio is None:
        return {"images": torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)}
    images = {"images": torch.zeros(2, 3, *_EXAMPLE)}
    return {**images, "sizes": torch.tensor([_EXAMPLE] * 2)} if hasattr(network, "roi_heads") else images


def _describe(network: Any, made: nn.Module, model: Model, format: str, inputs: list[str]) -> Graph:
    spec = MODELS[model.manifest.model]
    two_stages = isinstance(made, RcnnGraph)
    limits = network.roi_heads if two_stages else network
    red, green, blue = (255 * value for value in spec.mean)
    stretched = spec.max_ratio is None
    return Graph(
        format=format,
        file=_FILES[format],
        input="images",
        sizes="sizes" if "sizes" in inputs else "",
        outputs=["boxes", "scores", "labels", *(["masks"] if two_stages and made.has_masks else [])],
        dtype="uint8" if stretched else "float32",
        image_size=int(model.manifest.native["image_size"]),
        max_ratio=spec.max_ratio,
        size_divisible=1 if stretched else spec.size_divisible,
        # It becomes 0 where the graph normalises, as in `Normalize`.
        padding=(0.0, 0.0, 0.0) if stretched else (red, green, blue),
        suppressed=two_stages,
        nms_threshold=limits.nms_thresh,
        class_candidates=made.candidates if isinstance(made, SsdGraph) else None,
        max_detections=limits.detections_per_img,
    )


def _write_onnx(made: nn.Module, inputs: Mapping[str, Tensor], model: Model, graph: Graph, file: Path) -> None:
    batch = torch.export.Dim("batch")
    free = {0: batch}
    if graph.max_ratio is not None:
        free |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    shapes = [free if name == graph.input else {0: batch} for name in inputs]
    with _quiet():
        program = torch.onnx.export(
            made,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=graph.outputs,
            dynamic_shapes=tuple(shapes),
            opset_version=_OPSET,
            custom_translation_table=onnx_translations(),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for output in program.model.graph.outputs:
        shape: Any = output.shape
        if not isinstance(shape[1], int):  # a formula of height and width
            shape[1] = "found"
    program.model.metadata_props[PROPERTY] = msgspec.json.encode(describe(model, graph, **ONNX)).decode()
    with atomic_write(file) as target:
        target.write(program.model_proto.SerializeToString())


def _write_torchscript(made: nn.Module, inputs: Mapping[str, Tensor], model: Model, graph: Graph, file: Path) -> None:
    made.to(memory_format=torch.channels_last)
    with _quiet(), torch.inference_mode(), atomic_write(file) as target:
        traced = torch.jit.trace(made, tuple(inputs.values()), check_trace=False)  # type: ignore[no-untyped-call]
        # Norms become part of the convolutions before them: SSDlite takes 15 ms for an image instead of 25.
        torch.jit.save(torch.jit.freeze(traced), target)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch warns of: the age of TorchScript, and Python's numbers in a trace, which are all fixed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
        yield
