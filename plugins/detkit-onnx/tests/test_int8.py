"""Quantizing: what becomes eight bits, and what is kept of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grids
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import detkit
from detkit import Dataset
from detkit.errors import ExportDiffers, SeenImages, Unsupported, UsageError
from detkit.job import Model
from detkit.verification import agreement_of
from detkit_onnx.quantization import nodes_to_quantize


def test_int8_keeps_its_ap(file: Path, unseen: Dataset, tmp_path: Path) -> None:
    calibration = grids.pictures(tmp_path / "calibration", seed=2)
    main = detkit.export(file.parent, "onnx-int8", calibrate=calibration, verify=unseen)
    assert main == file.parent.parent / "onnx-int8" / "model.onnx", "beside what it was made of"
    kinds = {node.name: node.op_type for node in onnx.load(str(main)).graph.node}
    assert any("QuantizeLinear" in kind for kind in kinds.values())
    with detkit.Predictor(main.parent, score_threshold=0.3) as predictor:
        assert predictor.model.name == "onnx/memory"
        agreement = agreement_of(predictor.model)
        boxes = [sorted(one.boxes.tolist()) for one in predictor.predict(unseen)]
    assert boxes == [sorted(sample.boxes.tolist()) for sample in unseen], "decoding stays float"
    assert agreement is not None and agreement.kind == "quantized"
    assert agreement.exported["AP"] == pytest.approx(1)
    assert agreement.scores_max > 0, "eight bits are not the same"
    assert [path.name for path in sorted(main.parent.iterdir())] == ["detkit.json", "model.onnx", "seen.json"]
    alone = detkit.Predictor(main).model
    calibrated = main.parent
    assert sorted(Model(calibrated).seen()) == ["calibration", "train", "validation"]
    assert len(Model(calibrated).seen()["calibration"]) == len(calibration)
    with pytest.raises(SeenImages, match="used in calibration"):
        detkit.evaluate(calibrated, calibration)
    assert alone.manifest.artifacts["model.onnx"].bytes == main.stat().st_size


def test_int8_that_loses_is_refused(run: detkit.Run, unseen: Dataset, tmp_path: Path) -> None:
    """Calibrated on dark images only, what is bright is cut off: all cells score alike."""
    black = grids.pictures(tmp_path / "dark", 4)
    for path in black.paths:
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[0, 0] = 1
        grids.Image.fromarray(pixels).save(path)
    model = grids.export_grid(run, tmp_path / "export").parent
    with pytest.raises(
        ExportDiffers, match=r"AP drops by 0\.\d+, and 0\.01 is allowed.*calibrate on more images"
    ) as error:
        detkit.export(model, "onnx-int8", tmp_path / "int8", calibrate=black, verify=unseen)
    assert "AP " in str(error.value) and error.value.exit_code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dark", "export"], "nothing is left of it"
    detkit.export(model, "onnx-int8", tmp_path / "int8", calibrate=black, verify=unseen, max_ap_drop=0.99)
    kept = {path: path.read_bytes() for path in (tmp_path / "int8").iterdir()}
    with pytest.raises(ExportDiffers):
        detkit.export(model, "onnx-int8", tmp_path / "int8", calibrate=black, verify=unseen)
    assert {path: path.read_bytes() for path in (tmp_path / "int8").iterdir()} == kept, "an earlier one stays"


def test_int8_needs_images(file: Path, unseen: Dataset, tmp_path: Path) -> None:
    for given in ({}, {"calibrate": unseen}, {"verify": unseen}):
        with pytest.raises(UsageError, match=r"--calibrate DATA:train --verify DATA:val"):
            detkit.export(file.parent, "onnx-int8", tmp_path, **given)
    for drop in (float("nan"), -1.0, 2.0):
        with pytest.raises(UsageError, match="an AP from 0 to 1"):
            detkit.export(file.parent, "onnx-int8", tmp_path, calibrate=unseen, verify=unseen, max_ap_drop=drop)
    with pytest.raises(UsageError, match=r"3 of 12 images to verify on are also those to calibrate on, for example"):
        detkit.export(file.parent, "onnx-int8", tmp_path, calibrate=unseen.take([1, 4, 7]), verify=unseen)
    bare = unseen.take([len(unseen) - 1])
    with pytest.raises(UsageError, match="these images have no boxes"):
        detkit.export(file.parent, "onnx-int8", tmp_path, calibrate=unseen, verify=bare)
    with pytest.raises(Unsupported, match="'onnx' does not write 'onnx'"):
        detkit.export(file.parent, "onnx", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_line(file: Path, seen: Dataset, unseen: Dataset, tmp_path: Path) -> None:
    for name, data in (("seen", seen), ("unseen", unseen)):
        detkit.write_dataset(data, tmp_path / name, format="coco")
    words = [
        str(file),
        "onnx-int8",
        "--calibrate",
        "seen",
        "--verify",
        "unseen",
        "--to",
        "int8",
        "--max-ap-drop",
        "0.02",
    ]
    command = [sys.executable, "-m", "detkit.cli", "export", *words, "--max-images", "6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "int8/model.onnx" in done.stdout and "AP" in done.stdout
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    record = json.loads(done.stdout)
    assert record["verified"]["images"] == 6 and record["verified"]["exported"]["AP"] == pytest.approx(1)


def test_heads_and_what_follows_stay_float() -> None:
    """Of a backbone with two heads, behind one of which boxes are chosen and a second stage begins."""
    weights = {name: np.zeros((4, 4, 1, 1), np.float32) for name in ("w0", "w1", "w2", "w3")}
    weights |= {name: np.zeros((4, 4), np.float32) for name in ("m0", "m1")}
    nodes = [
        ("Conv", "stem", ["image", "w0"]), ("Relu", "stem_relu", ["stem"]), ("Conv", "body", ["stem_relu", "w1"]),
        ("Add", "sum", ["body", "stem_relu"]), ("Conv", "head", ["sum", "w2"]), ("Sigmoid", "scores", ["head"]),
        ("Conv", "other", ["sum", "w3"]), ("Add", "decoded", ["other", "head"]), ("TopK", "chosen", ["decoded"]),
        ("MatMul", "hidden", ["chosen", "m0"]), ("Relu", "hidden_relu", ["hidden"]),
        ("MatMul", "classes", ["hidden_relu", "m1"]), ("MatMul", "pair", ["classes", "chosen"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [name], name) for kind, name, inputs in nodes],
        "two stages",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("pair", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    # `head` and `other` have a layer behind them, the second stage, and so are its input's makers.
    assert nodes_to_quantize(graph) == ["stem", "stem_relu", "body", "sum", "head", "other", "hidden"]
