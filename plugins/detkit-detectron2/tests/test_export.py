"""Exported models find what the originals find, on images of any shape; and so do masks."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import to_builtins
from msgspec.structs import replace as replace_fields
from PIL import Image

import detkit
from detkit import plugins
from detkit.backends import PredictOptions
from detkit.errors import PluginError, Unsupported
from detkit.formats.checks import prepare
from detkit.graphs import PROPERTY, graph_of, paste_aligned
from detkit.job import Job, Model, Trained, Workspace
from detkit.masks import decode
from detkit.verification import agreement_of
from detkit_detectron2 import sources
from detkit_detectron2.params import MODELS, Detectron2Options

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
if plugins.backend("detectron2").missing():  # type: ignore[attr-defined]
    pytest.skip("needs Detectron2 in this interpreter, see docs/how-to/detectron2.md", allow_module_level=True)

sources.load()

import torch  # noqa: E402
from detectron2.layers.mask_ops import paste_masks_in_image  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from detkit_detectron2.configs import build_cfg, put  # noqa: E402
from detkit_detectron2.detector import open_network  # noqa: E402
from detkit_detectron2.exporting import export  # noqa: E402
from detkit_detectron2.weights import ARTIFACT, CONFIG  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("_checkout_stays")


def at_random(folder: Path, name: str, data: detkit.Dataset, **changes: Any) -> Model:
    """Return a model with random weights that finds something."""
    params = replace_fields(
        MODELS[name].params, iterations=1, epochs=None, image_size=64, max_detections=40, weights=None
    )
    job = Job(
        backend="detectron2",
        engine="detkit_detectron2.engine:Detectron2Engine",
        model=name,
        params=to_builtins(params),
        options=to_builtins(Detectron2Options(device="cpu")),
        classes=list(data.classes),
    )
    workspace = Workspace(folder)
    workspace.create(job)
    ready = prepare(data, on_invalid="raise")
    workspace.write_dataset("train", ready.data, ready.image_digests)
    cfg = build_cfg(job, workspace, ready.data)
    for key, value in changes.items():
        put(cfg, key, value)
    torch.manual_seed(5)
    network = build_model(cfg)
    with torch.no_grad():
        for key, value in network.named_parameters():
            if key.endswith(("box_predictor.cls_score.weight", "objectness_logits.weight")):
                value.normal_(0, 0.3)
            if key.endswith("conv3.norm.weight"):
                value.fill_(0.1)  # or activations grow from block to block
            if key == "head.cls_score.weight":
                value.normal_(0, 0.03)  # where scores are all 1, who wins says nothing
            if key.endswith("mask_head.predictor.weight"):
                value.normal_(0, 1)
            if key == "head.cls_score.bias":
                value.zero_()
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, workspace.model / ARTIFACT)
    (workspace.model / CONFIG).write_text(cfg.dump())
    workspace.finish(job, Trained(max_detections=40), started=time.time())
    return Model(workspace.model)


def in_other_shapes(data: detkit.Dataset, folder: Path) -> detkit.Dataset:
    """The same pictures with noise to their right or below, so that they are wide, tall and square."""
    folder.mkdir()
    samples = []
    for i, sample in enumerate(data):
        wider = (17, 0) if i % 3 == 0 else (0, 23) if i % 3 == 1 else (0, 0)
        pixels = np.random.default_rng(i).integers(0, 60, (sample.height + wider[1], sample.width + wider[0], 3))
        # No two places look the same: where scores tie, who wins says nothing.
        pixels[: sample.height, : sample.width] = sample.image() * 0.8 + pixels[: sample.height, : sample.width] * 0.5
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        samples.append(
            replace(
                sample,
                path=str(folder / f"{i}.png"),
                width=sample.width + wider[0],
                height=sample.height + wider[1],
            )
        )
    return detkit.Dataset.from_samples(data.classes, samples)


@pytest.mark.parametrize("name", ["faster_rcnn_tiny", "retinanet_tiny", "mask_rcnn_tiny", "faster_rcnn_R_50_C4_1x"])
def test_an_export_finds_what_the_original_finds(name: str, tiny: detkit.Dataset, tmp_path: Path) -> None:
    model = at_random(tmp_path / "run", name, tiny)
    pictures = in_other_shapes(tiny, tmp_path / "pictures")
    file = detkit.export(model, "onnx", tmp_path / "onnx", verify=pictures)
    exported = Model(file.parent)
    agreement = agreement_of(exported)
    assert agreement is not None
    assert agreement.detections > 10 * len(tiny)
    assert (agreement.disagreeing, agreement.corners_px_max < 0.05) == (0, True)
    graph = graph_of(exported)
    has_masks = name.startswith("mask")
    assert (graph.max_batch, graph.suppressed, len(graph.outputs)) == (1, True, 3 + has_masks)
    (told,) = [one for one in onnx.load(file).metadata_props if one.key == PROPERTY]
    assert '"engine":"detkit_onnx.engine:OnnxEngine"' in told.value
    options: Any = {"device": "cpu", "score_threshold": 0.05}
    with detkit.Predictor(model, **options) as original, detkit.Predictor(exported, **options) as graphed:
        images = [sample.image() for sample in pictures.take([0, 1, 2])]
        for first, second in zip(original.predict(images), graphed.predict(images), strict=True):
            assert len(first) == len(second) > 0
            assert (first.masks is None, second.masks is None) == (not has_masks, not has_masks)
            for one, other in zip(first.masks or (), second.masks or (), strict=True):
                size = (first.width, first.height)
                assert (decode(one, size) != decode(other, size)).mean() < 0.001


def test_a_graph_that_finds_nothing_finds_nothing(tiny: detkit.Dataset, tmp_path: Path) -> None:
    """Layers do not all take no regions."""
    model = at_random(tmp_path / "run", "mask_rcnn_tiny", tiny)
    network, cfg = open_network(model, PredictOptions(score_threshold=0.9999))
    file = export(network, cfg, model, "onnx", tmp_path / "onnx")
    with detkit.Predictor(Model(file.parent), device="cpu", score_threshold=0) as predictor:
        (found,) = predictor.predict([tiny[0].image()])
    assert (len(found), found.masks) == (0, ())


def test_refused(tiny: detkit.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = at_random(tmp_path / "run", "faster_rcnn_tiny", tiny)
    own_size = at_random(tmp_path / "own", "faster_rcnn_tiny", tiny, **{"INPUT.MIN_SIZE_TEST": 0})
    with pytest.raises(Unsupported, match="takes images at their own size"):
        detkit.export(own_size, "onnx", tmp_path / "onnx")
    network, cfg = open_network(model, PredictOptions())

    class Other(type(network)):  # type: ignore[misc]
        def inference(self, *inputs: Any, **more: Any) -> Any:
            return super().inference(*inputs, **more)

    network.__class__ = Other
    with pytest.raises(Unsupported, match="is a Other; of Detectron2's, GeneralizedRCNN and RetinaNet can be exported"):
        export(network, cfg, model, "onnx", tmp_path / "onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"needs onnx; install with `pip install 'detkit-detectron2\[export\]'`"):
        export(network, cfg, model, "onnx", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_masks_are_laid_into_boxes_as_detectron2_does() -> None:
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(-3, 50, (30, 2, 2)), axis=1).reshape(-1, 4)
    boxes = corners.clip(0, [47, 39, 47, 39])
    boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) > 0.2).all(axis=1)]
    masks = rng.random((len(boxes), 28, 28)).astype(np.float32)
    theirs = paste_masks_in_image(torch.from_numpy(masks), torch.from_numpy(boxes).float(), (39, 47)).numpy()
    ours = np.stack([paste_aligned(mask, box, 47, 39) for mask, box in zip(masks, boxes, strict=True)])
    assert theirs.any(axis=(1, 2)).sum() > 10
    assert (ours != theirs).sum() <= 2  # shares of one half, to the last bit
