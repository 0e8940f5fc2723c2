"""What is done before and after a graph runs: resizing, padding, suppression, masks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image as PillowImage

import detkit
from detkit import Dataset, Trainer
from detkit.backends import PredictOptions
from detkit.boxes import iou, nms
from detkit.errors import UsageError
from detkit.files import write_json
from detkit.graphs import (
    ONNX,
    Graph,
    GraphDetector,
    describe,
    finish,
    graph_of,
    paste,
    paste_aligned,
    prepare,
    write_model,
)
from detkit.job import Manifest, Model
from detkit.masks import decode
from detkit.resizing import apply, area_taps, cubic_taps, linear_taps, resize

SQUARE = Graph(
    format="onnx",
    file="model.onnx",
    input="images",
    outputs=["boxes", "scores", "labels"],
    dtype="uint8",
    image_size=64,
    nms_threshold=0.5,
    max_detections=10,
)


def changed(**fields: Any) -> Graph:
    return msgspec.structs.replace(SQUARE, **fields)


def slow_nms(
    boxes: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any], threshold: float, candidates: int | None
) -> list[int]:
    """Suppression as it is defined, one pair at a time."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    enter: list[int] = []
    for i in order:
        if candidates is None or sum(labels[j] == labels[i] for j in enter) < candidates:
            enter.append(i)
    kept: list[int] = []
    for i in enter:
        if all(labels[i] != labels[j] or iou(boxes[[i]], boxes[[j]])[0, 0] <= threshold for j in kept):
            kept.append(i)
    return kept


@st.composite
def candidates(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Few coordinates and scores, so that boxes touch, coincide and tie."""
    n = draw(st.integers(0, 24))
    low = draw(arrays(np.float64, (n, 2), elements=st.integers(0, 6)))
    sides = draw(arrays(np.float64, (n, 2), elements=st.integers(0, 4)))
    scores = draw(arrays(np.float64, n, elements=st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9])))
    labels = draw(arrays(np.int64, n, elements=st.integers(0, 2)))
    return np.concatenate([low, low + sides], axis=1), scores, labels


@given(candidates(), st.sampled_from([0.0, 0.3, 0.45, 0.7]), st.sampled_from([None, 1, 3]), st.integers(1, 30))
def test_suppression_is_what_its_definition_says(
    found: tuple[NDArray[Any], NDArray[Any], NDArray[Any]], threshold: float, most: int | None, limit: int
) -> None:
    expected = slow_nms(*found, threshold, most)
    assert nms(*found, threshold, class_candidates=most).tolist() == expected
    assert nms(*found, threshold, class_candidates=most, limit=limit).tolist() == expected[:limit]


@pytest.mark.parametrize(("shape", "to"), [((37, 61), (64, 64)), ((200, 90), (64, 64)), ((200, 40), (64, 64))])
def test_resampling_keeps_flat_colour_and_brightness(shape: tuple[int, int], to: tuple[int, int]) -> None:
    """Weights are of sum one wherever the border is; areas are exact means."""
    flat = np.full((*shape, 3), 137, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for resampling in ("bilinear", "opencv"):
        assert (resize(flat, *to, resampling) == 137).all()
        assert resize(noise, *to, resampling).shape == (to[1], to[0], 3)
    halves = resize(noise[:36, :40], 20, 18, "opencv")
    assert np.abs(halves - noise[:36, :40].reshape(18, 2, 20, 2, 3).mean(axis=(1, 3))).max() <= 0.5


def test_cubic_and_linear_kernels_go_through_the_pixels() -> None:
    row = np.array([[0.0, 10.0, 40.0, 90.0, 160.0]])
    for taps in (cubic_taps, linear_taps):
        tripled = apply(row, linear_taps(1, 1), taps(5, 15))
        assert tripled[0, 4] == pytest.approx(10) and tripled[0, 7] == pytest.approx(40)
    between = apply(row, linear_taps(1, 1), cubic_taps(5, 10))[0, 5]  # a quarter pixel right of the third
    # OpenCV's kernel with a = -0.75 at distances 1.25, 0.25, 0.75, 1.75
    assert between == pytest.approx(-0.10546875 * 10 + 0.87890625 * 40 + 0.26171875 * 90 - 0.03515625 * 160)
    thirds = apply(np.arange(4.0)[None], linear_taps(1, 1), area_taps(4, 3))[0]
    assert thirds.tolist() == pytest.approx([0.25, 1.5, 2.75])


def test_images_of_a_batch_keep_their_shape_and_are_padded() -> None:
    graph = changed(max_ratio=1.5, size_divisible=32, padding=(1.0, 2.0, 3.0), sizes="sizes")
    images = [np.full(shape, 200, np.uint8) for shape in ((40, 80, 3), (30, 20, 3), (64, 64, 3))]
    feed = prepare(graph, images)
    # 64 x 96 at most, by the shorter side or the longer one: (48, 96), (96, 64), (64, 64), and multiples of 32.
    assert feed["sizes"].tolist() == [[48, 96], [96, 64], [64, 64]]
    batch = feed["images"]
    assert batch.shape == (3, 3, 96, 96) and batch.dtype == np.uint8
    assert (batch[0, :, :48] == 200).all() and (batch[0, :, 48:] == np.array([1, 2, 3]).reshape(3, 1, 1)).all()
    assert (batch[1, :, :, :64] == 200).all() and (batch[1, 2, :, 64:] == 3).all()


def test_normalising_is_torchvisions() -> None:
    graph = changed(dtype="float32", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = (image / 255 - np.array(graph.mean)) / np.array(graph.std)
    np.testing.assert_allclose(prepare(graph, [image])["images"][0], expected.transpose(2, 0, 1), atol=1e-6)


def test_candidates_become_detections() -> None:
    boxes = np.array([[0, 0, 32, 32], [0, 0, 32, 30], [-8, 32, 80, 64], [0, 0, 32, 32], [9, 9, 12, 12]], np.float32)
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.95]], np.float32)
    labels = np.array([[0.0], [0.0], [1.0], [1.0], [-1.0]], np.float32)
    found = finish(SQUARE, [boxes, scores, labels], ("a", "b"), PredictOptions(), input_size=(64, 64), size=(128, 32))
    assert found.boxes.tolist() == [[0, 0, 64, 16], [0, 16, 128, 32], [0, 0, 64, 16]]
    assert found.names == ("a", "b", "b")
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    some = finish(
        SQUARE,
        [boxes, scores, labels],
        ("a", "b"),
        PredictOptions(score_threshold=float(scores[3, 0]), nms_threshold=0.99, max_detections=2),
        input_size=(64, 64),
        size=(128, 32),
    )
    assert some.names == ("a", "a"), "the numbers of the call count, and a score at the threshold is not above it"
    with pytest.raises(UsageError, match="found a class 1, and the model has 1"):
        finish(SQUARE, [boxes, scores, labels], ("a",), PredictOptions(), input_size=(64, 64), size=(128, 32))
    with pytest.raises(UsageError, match=r"shapes .*expected \(n, 4\)"):
        finish(SQUARE, [boxes, scores[:3], labels], ("a",), PredictOptions(), input_size=(64, 64), size=(9, 9))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_scores_and_labels_are_numbers(wrong: float) -> None:
    boxes = np.array([[0, 0, 32, 32], [0, 0, 32, 30]], np.float32)
    for scores, labels in (([wrong, 0.5], [0, 0]), ([0.5, 0.5], [0, wrong])):
        outputs = [boxes, np.array(scores, np.float32), np.array(labels, np.float32)]
        with pytest.raises(UsageError, match="no finite numbers"):
            finish(SQUARE, outputs, ("a",), PredictOptions(), input_size=(64, 64), size=(9, 9))
    unused = [boxes, np.array([0.5, wrong], np.float32), np.array([0, -1], np.float32)]
    assert len(finish(SQUARE, unused, ("a",), PredictOptions(), input_size=(64, 64), size=(9, 9))) == 1


def test_a_graph_that_suppresses_keeps_its_own_numbers() -> None:
    graph = changed(suppressed=True)
    boxes = np.array([[0, 0, 32, 32], [0, 0, 32, 32]], np.float32)
    outputs = [boxes, np.array([0.5, 0.8], np.float32), np.array([0, 0])]
    found = finish(graph, outputs, ("a",), PredictOptions(), input_size=(64, 64), size=(64, 64))
    assert found.scores.tolist() == pytest.approx([0.8, 0.5])
    with pytest.raises(UsageError, match=r"suppresses by itself, at 0\.5"):
        GraphDetector(graph, ("a",), lambda feed: [], PredictOptions(nms_threshold=0.3))
    for limit in (None, 3, 10):
        GraphDetector(graph, ("a",), lambda feed: [], PredictOptions(max_detections=limit))
    with pytest.raises(UsageError, match="keeps 10 detections by itself; max_detections cannot be 11"):
        GraphDetector(graph, ("a",), lambda feed: [], PredictOptions(max_detections=11))


def test_a_detector_runs_no_larger_batches_than_the_graph_takes() -> None:
    seen: list[int] = []

    def run(feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        batch = feed["images"]
        seen.append(len(batch))
        means = batch.mean(axis=(1, 2, 3), dtype=np.float64) / 255
        return [np.tile(np.float32([[[8, 16, 24, 32]]]), (len(batch), 1, 1)), means[:, None], np.zeros((len(batch), 1))]

    detector = GraphDetector(changed(max_batch=2), ("a",), run, PredictOptions())
    images = [np.full((16 * (i + 1), 32, 3), 51 * (i + 1), np.uint8) for i in range(5)]
    found = detector.detect(images)
    assert seen == [2, 2, 1]
    assert [one.scores.round(6).tolist() for one in found] == [[0.2], [0.4], [0.6], [0.8], [1.0]]
    assert [(one.width, one.height) for one in found] == [(32, 16 * (i + 1)) for i in range(5)]
    assert [one.boxes.tolist() for one in found[:2]] == [[[4, 4, 12, 8]], [[4, 8, 12, 16]]]
    assert detector.detect([]) == []
    assert GraphDetector(SQUARE, ("a",), run, PredictOptions()).detect([]) == []


def test_masks_are_laid_into_their_boxes() -> None:
    graph = changed(suppressed=True, outputs=["boxes", "scores", "labels", "masks"])
    shares = np.zeros((2, 1, 28, 28), np.float32)
    shares[0] = 1
    shares[1, :, :, :14] = 1
    outputs = [
        np.array([[8, 8, 24, 40], [0, 0, 64, 64]], np.float32),
        np.array([0.3, 0.9], np.float32),
        np.array([0, 0]),
        shares,
    ]
    found = finish(graph, outputs, ("a",), PredictOptions(), input_size=(64, 64), size=(64, 64))
    assert found.masks is not None
    half, whole = (decode(mask, (64, 64)) for mask in found.masks)
    assert half[2:-2, 2:31].all() and not half[:, 33:].any()
    inside = np.zeros((64, 64), bool)
    inside[8:40, 8:24] = True
    assert np.count_nonzero(whole ^ inside) <= 2 * (16 + 32), "at most the border's pixels differ"
    assert not paste(np.ones((28, 28)), np.array([-90.0, -90, -80, -80]), 64, 64).any()


def test_masks_are_laid_exactly() -> None:
    """A full mask is its box, also where the image cuts it off; half of one is half of it."""
    expected = np.zeros((10, 12), dtype=bool)
    expected[3:7, 2:10] = True
    np.testing.assert_array_equal(paste_aligned(np.ones((4, 4)), np.array([2.0, 3, 10, 7]), 12, 10), expected)
    half = np.ones((4, 4)) * (np.arange(4) < 2)
    left = paste_aligned(half, np.array([2.0, 3, 10, 7]), 12, 10)
    np.testing.assert_array_equal(left, expected & (np.arange(12) < 6))
    np.testing.assert_array_equal(
        paste_aligned(np.ones((4, 4)), np.array([-4.0, 3, 4, 30]), 12, 10)[:, 4:], np.zeros((10, 8), dtype=bool)
    )
    assert paste_aligned(np.ones((4, 4)), np.array([-4.0, 3, 4, 30]), 12, 10)[4:, :4].all()
    for outside in ([-90.0, -90, -80, -80], [-5, -5, -2.5, -2.5], [20, 20, 30, 30]):
        assert not paste_aligned(np.ones((4, 4)), np.array(outside), 12, 10).any()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: Dataset) -> detkit.Run:
    return Trainer(model="echo/memory", name=str(tmp_path_factory.mktemp("runs") / "one")).fit(tiny, tiny)


def test_an_export_is_a_model(run: detkit.Run, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"whatever")
    exported = write_model(run.model, SQUARE, tmp_path, **ONNX)
    ours, theirs = exported.manifest, run.model.manifest
    assert exported.name == "onnx/memory" and exported.seen() == run.model.seen() != {}
    assert (ours.classes, ours.params, ours.score_threshold) == (theirs.classes, theirs.params, theirs.score_threshold)
    assert sorted(ours.artifacts) == ["model.onnx", "seen.json"]
    assert graph_of(exported) == SQUARE
    embedded = msgspec.json.encode(describe(run.model, SQUARE, **ONNX))
    assert msgspec.json.decode(embedded, type=Manifest) == msgspec.structs.replace(ours, artifacts={})
    (tmp_path / "model.onnx").write_bytes(b"whatevre")
    with pytest.raises(UsageError, match="not the file that was exported"):
        graph_of(exported)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(UsageError, match=r"lacks its graph, model\.onnx"):
        graph_of(exported)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 10**9},
        {"nms_threshold": "half"},
        {"file": "../model.onnx"},
        {"file": "/etc/passwd"},
        {"outputs": ["boxes"]},
        {"dtype": "object"},
        {"mean": [0.5], "std": [0.5]},
        {"dtype": "float32", "mean": [0.5, 0.5, 0.5], "std": [0.5]},
        {"dtype": "float32", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.0]},
        {"std": [0.5, 0.5, 0.5]},
        {"image_size": 16384, "max_ratio": 64.0},
        {"image_size": 64, "size_divisible": 16384},
    ],
)
def test_a_hostile_description_is_refused(run: detkit.Run, tmp_path: Path, wrong: dict[str, Any]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"whatever")
    manifest = write_model(run.model, SQUARE, tmp_path, **ONNX).manifest
    native = {**manifest.native, "graph": {**manifest.native["graph"], **wrong}}
    write_json(tmp_path / "detkit.json", msgspec.structs.replace(manifest, native=native))
    with pytest.raises(
        UsageError, match="no exported graph that can be read|does not know|normalised|pixels are the most"
    ):
        graph_of(Model(tmp_path))


def test_an_export_of_an_export_is_not_verified(run: detkit.Run, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"whatever")
    verified = write_model(run.model, SQUARE, tmp_path, **ONNX)
    native = {**verified.manifest.native, "verified": {"kind": "exact"}}
    write_json(tmp_path / "detkit.json", msgspec.structs.replace(verified.manifest, native=native))
    assert "verified" not in describe(Model(tmp_path), SQUARE, **ONNX).native


def test_the_original_is_no_export(run: detkit.Run) -> None:
    with pytest.raises(UsageError, match="no exported graph that can be read"):
        graph_of(run.model)


def test_pillow_resizes_as_the_contract_says() -> None:
    """The same call as torchvision's own transforms on Pillow images."""
    image = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    expected = PillowImage.fromarray(image).resize((31, 90), PillowImage.Resampling.BILINEAR)
    np.testing.assert_array_equal(resize(image, 31, 90), np.asarray(expected))
