"""Exported models in OpenVINO: the same boxes in float32, nearly the same in bf16, and nobody is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import detkit
from detkit import Dataset, Predictor
from detkit.errors import UsageError

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")


def has_bf16() -> bool:
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize("device", ["openvino", "openvino:f32"])
def test_it_finds_what_onnx_runtime_finds(file: Path, unseen: Dataset, device: str) -> None:
    """Of images of two sizes, in batches of several lengths; one answer is not overwritten by the next."""
    with Predictor(file, score_threshold=0.01) as one, Predictor(file, score_threshold=0.01, device=device) as other:
        for pair in zip(list(one.predict(unseen)), list(other.predict(unseen)), strict=True):
            # Scores may tie, so they are put in the order of their boxes.
            here, there = (sorted(zip(found.boxes.tolist(), found.scores, strict=True)) for found in pair)
            np.testing.assert_allclose([box for box, _ in here], [box for box, _ in there], atol=1e-3)
            np.testing.assert_allclose([score for _, score in here], [score for _, score in there], atol=1e-5)
    assert detkit.evaluate(file.parent, unseen, device=device)["AP"] == pytest.approx(1)


@pytest.mark.skipif(not has_bf16(), reason="this CPU does not compute in bf16")
def test_bf16_is_for_who_asks_for_it(file: Path, unseen: Dataset) -> None:
    from detkit.graphs import graph_of
    from detkit_onnx.openvino import OpenVinoSession

    model = Predictor(file).model
    kinds = {
        device: OpenVinoSession(file, graph_of(model), device).compiled.get_property("INFERENCE_PRECISION_HINT")
        for device in ("openvino", "openvino:bf16")
    }
    assert kinds == {"openvino": openvino.Type.f32, "openvino:bf16": openvino.Type.bf16}
    assert detkit.evaluate(file.parent, unseen, device="openvino:bf16")["AP"] == pytest.approx(1)


def test_threads_are_as_many_as_asked_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detkit.graphs import graph_of
    from detkit_onnx.openvino import OpenVinoSession

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    compiled = OpenVinoSession(file, graph_of(Predictor(file).model), "openvino").compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_a_precision_that_it_does_not_have(file: Path) -> None:
    with pytest.raises(UsageError, match=r"no device 'openvino:f8'; expected openvino, .* openvino:f32, openvino:bf16"):
        Predictor(file, device="openvino:f8")


@pytest.mark.skipif(has_bf16(), reason="this CPU computes in bf16")
def test_a_cpu_without_bf16_says_so(file: Path) -> None:
    with pytest.raises(UsageError, match="this CPU does not compute in bf16; use openvino"):
        Predictor(file, device="openvino:bf16")


SILENT = """
import sys
heard = []
sys.addaudithook(lambda event, _: heard.append(event) if event.startswith("socket.") else None)
import detkit
with detkit.Predictor(sys.argv[1], device="openvino") as predictor:
    list(predictor.predict(sys.argv[2:]))
print(heard)
"""


def test_nobody_is_told(file: Path, unseen: Dataset) -> None:
    """Its distribution depends on one for telemetry, which is for other parts of it."""
    command = [sys.executable, "-c", SILENT, str(file), *unseen.paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
