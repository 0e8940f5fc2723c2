"""Exported models find what the originals find, whatever number of images of whatever shape they are given."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from in_process import SMALL, lay_out, make_job
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import nms

import detkit
from detkit import trust
from detkit.boxes import iou
from detkit.errors import PluginError, Unsupported, UsageError
from detkit.graphs import PROPERTY, graph_of, write_model
from detkit.job import Manifest, Model, Trained
from detkit.masks import decode
from detkit.scores import SCORE_FLOOR
from detkit.verification import agreement_of, compare
from detkit_torchvision.architecture import OWN as OWN_PARTS
from detkit_torchvision.architecture import Architecture
from detkit_torchvision.copying import head_rows
from detkit_torchvision.engine import TorchvisionEngine
from detkit_torchvision.graphs.suppression import onnx_translations, suppress
from detkit_torchvision.models import MODELS, build
from detkit_torchvision.weights import ARTIFACT

# torch says of each of its calls how old TorchScript is.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")

MOST, FEW = 30, Architecture(proposals=30)
"""Detections of models with random weights, and the proposals of those that have them."""

OWN, FORMATS = ("ssd_tiny", "fcos_tiny"), ("onnx", "torchscript")


@pytest.fixture(scope="module")
def pictures(tiny: detkit.Dataset, tmp_path_factory: pytest.TempPathFactory) -> detkit.Dataset:
    """Pictures of several shapes, a small one among them."""
    return in_shapes(tiny, ((96, 96), (130, 70), (61, 120), (96, 144), (33, 33)), tmp_path_factory.mktemp("pictures"))


def in_shapes(data: detkit.Dataset, shapes: Sequence[tuple[int, int]], folder: Path) -> detkit.Dataset:
    """Cut pictures of widths and heights out of drawn ones laid beside each other, with the objects of the first."""
    samples = []
    for i, (width, height) in enumerate(shapes):
        pixels = np.tile(data[i].image(), (4, 4, 1))[:height, :width]
        # No two places look the same: where scores tie, who wins says nothing.
        pixels = (pixels + np.random.default_rng(i).normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        inside = [
            (name, box)
            for name, box in zip(data[i].names, data[i].boxes, strict=True)
            if box[2] <= width and box[3] <= height
        ]
        Image.fromarray(pixels).save(folder / f"{i}.png")
        samples.append(
            detkit.Sample(
                path=str(folder / f"{i}.png"),
                width=width,
                height=height,
                boxes=np.array([box for _, box in inside]).reshape(-1, 4),
                names=tuple(name for name, _ in inside),
            )
        )
    return detkit.Dataset.from_samples(data.classes, samples)


def trained(folder: Path, name: str, data: detkit.Dataset, **settings: Any) -> Model:
    """Train for real, long enough to find the drawn shapes."""
    started = time.time()
    job = make_job(name, data, **settings)
    workspace = lay_out(folder, job, data)
    workspace.finish(job, TorchvisionEngine().train(job, workspace), started=started)
    return Model(workspace.model)


def at_random(
    folder: Path, name: str, data: detkit.Dataset, architecture: Architecture = OWN_PARTS
) -> tuple[Model, detkit.Dataset]:
    """A model with random weights that finds something, and pictures of the input's size, in all shapes it takes."""
    spec = MODELS[name]
    size = SMALL.get(name, 96)
    stretched = spec.max_ratio is None
    more = [(0, 0)] * 4 if stretched else [(0, 0), (40, 0), (0, 60), (10, 0)]
    (folder / "pictures").mkdir(parents=True)
    pictures = in_shapes(data, [(size + w, size + h) for w, h in more], folder / "pictures")
    torch.manual_seed(5)
    network = build(
        name,
        len(data.classes),
        image_size=size,
        score_threshold=SCORE_FLOOR,
        max_detections=MOST,
        architecture=architecture,
    )
    fit(network, [torch.from_numpy(sample.image().copy()).permute(2, 0, 1) for sample in pictures])
    workspace = lay_out(folder / "run", make_job(name, data, image_size=size), data)
    save_file(network.state_dict(), workspace.model / ARTIFACT)
    workspace.finish(
        workspace.job(),
        Trained(native={"image_size": size, **architecture.native()}, max_detections=MOST),
        started=time.time(),
    )
    return Model(workspace.model), pictures


@torch.no_grad()
def fit(network: Any, inputs: list[torch.Tensor]) -> None:
    """Give each norm the statistics of some images, and the layers that tell classes apart an output spread of two."""
    network.eval()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
            module.train()
    network(inputs)
    network.eval()
    spreads: dict[nn.Module, float] = {}
    layers = {key.rpartition(".")[0] for key in head_rows(network)}
    if hasattr(network, "roi_heads"):
        layers |= {"rpn.head.cls_logits"}
    for layer in layers:
        network.get_submodule(layer).register_forward_hook(
            lambda layer, _, output: spreads.__setitem__(layer, max(spreads.get(layer, 0.0), float(output.std())))
        )
    network(inputs)
    for layer, spread in spreads.items():
        wanted = 0.5 if "bbox_pred" in str(layer) else 2.0
        layer.weight.mul_(wanted / max(spread, 1e-6))
        layer._forward_hooks.clear()


@pytest.fixture(scope="module")
def originals(tiny: detkit.Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("models")
    settings = {"iterations": 150, "batch_size": 4, "learning_rate": 3e-3, "image_size": 96}
    return {name: trained(folder / name, name, tiny, **settings) for name in OWN}


@pytest.fixture(scope="module")
def exports(
    originals: dict[str, Model], pictures: detkit.Dataset, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Model]:
    """Each of our own in each format, compared with the original on the pictures (`detkit.verification`)."""
    return {
        (name, format): Model(detkit.export(model, format, tmp_path_factory.mktemp("exports"), verify=pictures).parent)
        for name, model in originals.items()
        for format in FORMATS
    }


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", OWN)
def test_the_same_detections(
    name: str,
    format: str,
    originals: dict[str, Model],
    exports: dict[tuple[str, str], Model],
    pictures: detkit.Dataset,
) -> None:
    found = agreement_of(exports[name, format])
    assert found is not None
    assert (found.images, found.disagreeing) == (len(pictures), 0)
    assert found.original["AP50"] > 0.5, "it has learned something that could get lost"
    assert found.scores_max < 0.003, "what resizing with Pillow and with torch may differ by"
    exported, original = exports[name, format].manifest, originals[name].manifest
    assert (exported.model, exported.classes, exported.metrics) == (original.model, original.classes, original.metrics)
    assert exports[name, format].seen() == originals[name].seen()


@pytest.mark.parametrize("name", OWN)
def test_onnx_runtime_computes_what_torch_does(name: str, exports: dict[tuple[str, str], Model]) -> None:
    """The outputs themselves, for one image and for three, of both files."""
    session = onnxruntime.InferenceSession(str(exports[name, "onnx"].path / "model.onnx"))
    module = torch.jit.load(exports[name, "torchscript"].path / "model.pt")
    for num_images in (1, 3):
        images = np.random.default_rng(num_images).integers(0, 256, (num_images, 3, 96, 96), dtype=np.uint8)
        found = session.run(["boxes", "scores", "labels"], {"images": images})
        expected = [one.numpy() for one in module(torch.from_numpy(images))]
        assert [one.shape for one in found] == [one.shape for one in expected]
        assert found[2].dtype == np.int64
        # Equal scores may come in another order, so rows are compared where theirs are.
        assert np.allclose(found[1], expected[1], atol=1e-5)
        alone = np.ones_like(found[1], dtype=bool)
        near = np.abs(np.diff(expected[1], axis=1)) < 1e-5
        alone[:, 1:] &= ~near
        alone[:, :-1] &= ~near
        assert alone.mean() > 0.2
        assert np.allclose(found[0][alone], expected[0][alone], atol=1e-2)
        assert (found[2][alone] == expected[2][alone]).all()


def test_an_onnx_file_says_what_it_is(exports: dict[tuple[str, str], Model], originals: dict[str, Model]) -> None:
    model = exports["ssd_tiny", "onnx"]
    session = onnxruntime.InferenceSession(str(model.path / "model.onnx"))
    [images] = session.get_inputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(uint8)", [3, 96, 96])
    assert isinstance(images.shape[0], str)
    told = msgspec.json.decode(session.get_modelmeta().custom_metadata_map[PROPERTY], type=Manifest)
    assert told.native["graph"] == model.manifest.native["graph"]
    assert told.classes == originals["ssd_tiny"].manifest.classes
    graph = graph_of(model)
    assert (graph.class_candidates, graph.max_detections, graph.suppressed) == (400, 100, False)


def test_thresholds_are_the_readers(exports: dict[tuple[str, str], Model], pictures: detkit.Dataset) -> None:
    for format in FORMATS:
        with detkit.Predictor(exports["fcos_tiny", format], score_threshold=0.3, nms_threshold=0.1) as predictor:
            for found in predictor.predict(pictures):
                assert (found.scores > 0.3).all()
                for name in set(found.names):
                    rows = [i for i, other in enumerate(found.names) if other == name]
                    overlap = iou(found.boxes[rows], found.boxes[rows])
                    assert np.count_nonzero(overlap > 0.1) == len(rows), "each overlaps itself alone"


def test_two_stages(tiny: detkit.Dataset, tmp_path: Path) -> None:
    """Proposals, pooled regions and suppression, in TorchScript; the other formats and models are slow."""
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    model, pictures = at_random(tmp_path, name, tiny)
    file = detkit.export(model, "torchscript", tmp_path / "export", verify=pictures)
    assert graph_of(Model(file.parent)).suppressed
    found = agreement_of(Model(file.parent))
    assert found is not None
    assert found.detections > MOST
    assert found.disagreeing == 0
    assert found.corners_px_max < 0.01
    assert found.scores_max < 1e-4
    with pytest.raises(UsageError, match="nms_threshold cannot be set"):
        detkit.Predictor(file.parent, score_threshold=0.1, nms_threshold=0.1)


@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
def test_suppression_in_onnx_is_torchvisions(threshold: float, tmp_path: Path) -> None:
    class Suppression(nn.Module):
        def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return suppress(boxes, scores, threshold, 20)

    draw = torch.Generator().manual_seed(0)
    corners = 100 * torch.rand(3, 50, 2, generator=draw)
    boxes = torch.cat([corners, corners + 5 + 60 * torch.rand(3, 50, 2, generator=draw)], dim=2)
    scores = torch.rand(3, 50, generator=draw)
    scores[:, ::7] = 0.0
    free = {0: torch.export.Dim("lists"), 1: torch.export.Dim("boxes")}
    torch.onnx.export(
        Suppression().eval(),
        (boxes[:2, :40], scores[:2, :40]),
        tmp_path / "nms.onnx",
        dynamo=True,
        verbose=False,
        input_names=["boxes", "scores"],
        dynamic_shapes=(free, free),
        custom_translation_table=onnx_translations(),
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "nms.onnx"))
    [found] = session.run(None, {"boxes": boxes.numpy(), "scores": scores.numpy()})
    expected = torch.zeros_like(scores)
    for i in range(3):
        there = (scores[i] > 0).nonzero()[:, 0]
        kept = there[nms(boxes[i, there], scores[i, there], threshold)[:20]]
        expected[i, kept] = scores[i, kept]
    assert (found == expected.numpy()).all()
    assert (found == suppress(boxes, scores, threshold, 20).numpy()).all()


def test_what_cannot_be_exported_is_told(
    originals: dict[str, Model],
    exports: dict[tuple[str, str], Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Unsupported, match="is an export itself"):
        detkit.export(exports["ssd_tiny", "torchscript"], "onnx", tmp_path / "again")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(PluginError, match=r"needs onnxscript; install with `pip install .*\[export\]"):
            detkit.export(originals["ssd_tiny"], "onnx", tmp_path / "without")
    assert not (tmp_path / "without").exists()


def test_a_damaged_file_is_told(exports: dict[tuple[str, str], Model], tmp_path: Path) -> None:
    shutil.copytree(exports["ssd_tiny", "torchscript"].path, tmp_path / "copy")
    (tmp_path / "copy" / "model.pt").write_bytes(b"no archive")
    with pytest.raises(UsageError, match="is not the file that was exported"):
        detkit.Predictor(tmp_path / "copy")


@pytest.fixture
def nobody_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this process nor the cache knows which programs were exported here."""
    monkeypatch.setenv("DETKIT_CACHE", str(tmp_path / "another-account"))
    monkeypatch.setattr(trust, "_given", set())


@pytest.mark.usefixtures("nobody_said_so")
@pytest.mark.parametrize("isolate", [False, True])
def test_a_strangers_program_does_not_run(isolate: bool, exports: dict[tuple[str, str], Model], tmp_path: Path) -> None:
    """TorchScript has operations that write files."""
    proof, folder = tmp_path / "written", tmp_path / "theirs"
    shutil.copytree(exports["ssd_tiny", "torchscript"].path, folder)
    own = folder / "model.pt"

    class Writes(nn.Module):
        def __init__(self, path: str) -> None:
            super().__init__()
            self.path = path

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            torch.save(images, self.path)
            flat = torch.zeros(images.shape[0], 1)
            return torch.zeros(images.shape[0], 1, 4), flat, flat

    torch.jit.save(torch.jit.script(Writes(str(proof))), own)
    write_model(Model(folder), graph_of(exports["ssd_tiny", "torchscript"]), folder, **stock_origin(Model(folder)))
    for code, message in (
        (None, r"is a program.*was not exported from this account.*--code .*model\.pt"),
        (folder, "is its program; expected code="),
    ):
        with pytest.raises(UsageError, match=message):
            detkit.Predictor(folder, isolate=isolate, code=code)
    assert not proof.exists()
    with detkit.Predictor(folder, isolate=isolate, code=own) as predictor:
        predictor(np.zeros((9, 9, 3), np.uint8))
    assert proof.exists()
    with pytest.raises(UsageError, match="was not exported from this account"):
        detkit.Predictor(folder)  # it was allowed once


def stock_origin(model: Model) -> dict[str, str]:
    return {"backend": model.manifest.backend, "engine": model.manifest.engine}


@pytest.mark.usefixtures("nobody_said_so")
def test_an_export_of_ones_own_opens(originals: dict[str, Model], tmp_path: Path) -> None:
    """In this process and in a worker, by the note that its export has left."""
    image = np.zeros((64, 64, 3), np.uint8)
    folder = detkit.export(originals["ssd_tiny"], "torchscript", tmp_path / "own").parent
    for isolate in (False, True):
        trust._given.clear()
        with detkit.Predictor(folder, isolate=isolate) as predictor:
            predictor(image)


HEADS = """
from torch import nn

class Doubled(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, features):
        return self.head([2 * one for one in features])

def other_head(network, num_outputs):
    network.head = Doubled(network.head)
    return network

class Wrapped(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.transform = network, network.transform

    def forward(self, images, targets=None):
        return self.network(images, targets)

def wrapped(network, num_outputs):
    return Wrapped(network)
"""


def test_networks_that_the_user_changed(tiny: detkit.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that still runs as torchvision's is exported with its new parts; another is refused."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "exported_heads.py").write_text(HEADS)
    monkeypatch.syspath_prepend(tmp_path / "src")
    changed = trained(
        tmp_path / "a",
        "ssd_tiny",
        tiny,
        iterations=80,
        batch_size=4,
        learning_rate=3e-3,
        modify="exported_heads:other_head",
    )
    file = detkit.export(changed, "torchscript", tmp_path / "export", verify=tiny)
    found = agreement_of(Model(file.parent))
    assert found is not None
    assert found.disagreeing == 0
    wrapped = trained(tmp_path / "b", "ssd_tiny", tiny, iterations=2, batch_size=2, modify="exported_heads:wrapped")
    for format in FORMATS:
        with pytest.raises(Unsupported, match="modify=exported_heads:wrapped made a Wrapped"):
            detkit.export(wrapped, format, tmp_path / "refused")


def all_agree(model: Model, file: Path, pictures: detkit.Dataset) -> None:
    """Compare an export with its original on pictures alone, which have several shapes, and on several at once."""
    for batch_size in (1, 3):
        with ExitStack() as opened:
            both = [
                opened.enter_context(
                    detkit.Predictor(one, score_threshold=SCORE_FLOOR, device="cpu", batch_size=batch_size)
                )
                for one in (model, file.parent)
            ]
            pairs = list(zip(both[0].predict(pictures), both[1].predict(pictures), strict=True))
        found = compare(pictures, pairs, "exact", MOST)
        assert found.detections > MOST
        assert found.disagreeing == 0
        assert found.corners_px_max < 0.1
        assert found.scores_max < 1e-3
        if MODELS[model.manifest.model].masks:
            assert all(same_masks(*pair) for pair in pairs)


def same_masks(first: detkit.Detections, second: detkit.Detections) -> bool:
    """Whether nearly all pixels of masks are the same; those on an outline may not be."""
    assert first.masks is not None
    assert second.masks is not None
    size = (first.width, first.height)
    return all(
        (decode(a, size, size) != decode(b, size, size)).mean() < 0.01
        for a, b, x, y in zip(first.masks, second.masks, first.scores, second.scores, strict=True)
        if abs(x - y) < 1e-6
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted({*MODELS} - {*OWN}))
def test_stock_models_in_torchscript(name: str, tiny: detkit.Dataset, tmp_path: Path) -> None:
    """Random weights; pictures that need no resizing, as those weights make much of the least difference."""
    model, pictures = at_random(tmp_path, name, tiny, FEW if "rcnn" in name else OWN_PARTS)
    all_agree(model, detkit.export(model, "torchscript", tmp_path / "export"), pictures)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("ssdlite320_mobilenet_v3_large", OWN_PARTS),
        ("retinanet_resnet50_fpn_v2", Architecture(backbone="resnet18")),
        ("maskrcnn_resnet50_fpn_v2", Architecture(backbone="resnet18", proposals=30)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.backbone or "own",
)
def test_stock_models_in_onnx(name: str, architecture: Architecture, tiny: detkit.Dataset, tmp_path: Path) -> None:
    """Some of each kind, as torch's exporter takes half a minute or more for a network of free sizes."""
    model, pictures = at_random(tmp_path, name, tiny, architecture)
    all_agree(model, detkit.export(model, "onnx", tmp_path / "export"), pictures)
