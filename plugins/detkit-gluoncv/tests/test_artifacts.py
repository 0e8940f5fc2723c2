"""What SageMaker's MXNet images leave, opened here: archives as AWS packs them, networks as MXNet itself wrote them.

The networks are this project's, see ``inside/symbols.py``; that AWS's look like them only a real artifact can prove.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import detkit
from detkit.backends import PredictOptions
from detkit.data import Sample
from detkit.errors import DetkitWarning, InvalidData, Unsupported
from detkit.job import Manifest, Model, WeightsOrigin
from detkit.prediction_store import PredictionStore, predict_all
from detkit.predictor import Predictor
from detkit.scores import SCORE_FLOOR
from detkit_gluoncv.graphs import Graph

SIZES = {"a": (128, 128), "b": (150, 90)}
"""Of the images, the first as large as the networks' input."""

FLOOR = 0.01
"""Scores up to this are no detections to MXNet."""

HYPERPARAMETERS = {"image_shape": "128", "nms_threshold": "0.45", "nms_topk": "400", "base_network": "resnet-50"}
JUMPSTART = "jumpstart/mxnet-od-ssd-300-mobilenet0-25-coco"
FORWARD = {"op": "Flatten", "name": "flat", "inputs": [[1, 0, 0]]}

pytestmark = pytest.mark.filterwarnings("ignore:.*is opened here as SSD is:detkit.errors.DetkitWarning")


@pytest.fixture(scope="module")
def networks(worker_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of networks, each with what MXNet alone finds with it on two images."""
    folder = tmp_path_factory.mktemp("networks")
    script = Path(__file__).parent / "inside/symbols.py"
    command = [worker_python, "-W", "ignore", str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def brought(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that packs files as AWS does, and lays them out as a finished run's model."""

    def bring(files: Path, model: str = "object-detection", said: dict[str, str] | None = None) -> Path:
        folder = tmp_path / "run/model"
        folder.mkdir(parents=True)
        with tarfile.open(folder / "model.tar.gz", "w:gz") as archive:
            for file in sorted(files.glob("*-*")):
                archive.add(file, file.name)
            if model == "object-detection":
                hyperparameters = tmp_path / "hyperparams.json"
                hyperparameters.write_text(json.dumps(HYPERPARAMETERS | (said or {})))
                archive.add(hyperparameters, hyperparameters.name)
        (folder / "detkit.json").write_bytes(msgspec.json.encode(manifest(model)))
        return folder

    return bring


def manifest(model: str) -> Manifest:
    return Manifest(
        backend="sagemaker",
        engine="",
        model=model,
        classes=["disc", "square"],
        params={},
        native={"image_shape": "512", "num_classes": "2"},
        options={},
        versions={},
        hardware={},
        data={},
        weights=WeightsOrigin(),
        metrics={},
        score_threshold=None,
        max_detections=100,
        started=0.0,
        seconds=0.0,
        artifacts={},
    )


def expected(folder: Path, name: str) -> np.ndarray:
    """Return what MXNet found, boxes in pixels and cut at the borders, those without area left out."""
    rows = np.array(json.loads((folder / "found.json").read_text())[name])
    rows[:, 2:] = np.clip(rows[:, 2:], 0, 1) * np.tile(SIZES[name], 2)
    rows = rows[(rows[:, 4:] > rows[:, 2:4]).all(axis=1)]
    assert len(rows) > 20
    assert len(np.unique(rows[:, 0])) == 2
    return rows


def check(found: detkit.Detections, rows: np.ndarray, but: int = 0) -> None:
    """Each detection is one of the rows, and each row is found, but for a few that a rounding may let in or out."""
    assert len(found) == len(rows)
    table = np.column_stack([found.labels, found.scores, found.boxes])
    gaps = (np.abs(table[:, None] - rows[None]) * [1, 100, 1, 1, 1, 1]).max(axis=2)
    for axis in (0, 1):
        assert np.count_nonzero(gaps.min(axis=axis) > 0.02) <= but


@pytest.mark.timeout(300)
@pytest.mark.parametrize("network", ["training", "losses", "deployed"])
def test_the_built_in_algorithm(networks: Path, brought: Callable[..., Path], network: str) -> None:
    """The network as training left it, with detections to watch or without, finds what the deployed one does."""
    files = networks / f"plain-{network}"
    with Predictor(brought(files), score_threshold=FLOOR, max_detections=1000) as predictor:
        for name in ("a", "b"):
            check(predictor(networks / f"{name}.png"), expected(files, name))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", ["raw", "centred"])
def test_what_the_network_was_trained_with_is_what_it_gets(
    networks: Path, brought: Callable[..., Path], variant: str
) -> None:
    """A ResNet tells by its running mean whether a mean was taken from the pixels before."""
    files = networks / f"{variant}-training"
    with Predictor(brought(files), score_threshold=FLOOR, max_detections=1000) as predictor:
        check(predictor(networks / "b.png"), expected(files, "b"))


@pytest.mark.timeout(300)
def test_jumpstart(networks: Path, brought: Callable[..., Path]) -> None:
    """GluonCV's network as its ``export`` writes it."""
    with Predictor(brought(networks / "gluoncv", JUMPSTART), score_threshold=FLOOR) as predictor:
        for name in ("a", "b"):
            check(predictor(networks / f"{name}.png"), expected(networks / "gluoncv", name), but=2)


@pytest.mark.timeout(300)
def test_suppression_can_be_chosen(networks: Path, brought: Callable[..., Path]) -> None:
    folder, counts = brought(networks / "plain-training"), []
    for threshold in (None, 0.1):
        with Predictor(folder, score_threshold=FLOOR, nms_threshold=threshold, max_detections=1000) as predictor:
            counts.append(len(predictor(networks / "a.png")))
    assert counts[1] < counts[0] / 2


@pytest.mark.timeout(300)
def test_what_is_found_here_is_not_taken_for_what_aws_found(
    networks: Path, brought: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is kept, so a batch transform still asks AWS; what that found counts where it is complete."""
    monkeypatch.setenv("DETKIT_CACHE", str(tmp_path / "cache"))
    model = Model(brought(networks / "plain-training"))
    images = [Sample(path=str(networks / f"{name}.png"), width=w, height=h) for name, (w, h) in SIZES.items()]
    data, digests = detkit.Dataset.from_samples(model.classes, images), ["a" * 64, "b" * 64]
    here = predict_all(model, data, digests)
    first = here.detections[0]
    with PredictionStore(model, PredictOptions(score_threshold=SCORE_FLOOR)) as store:
        assert store.get(digests) == [None, None]
        store.put(digests[0], first.best(1), 0.0, "SageMaker")
    assert [len(one) for one in predict_all(model, data, digests).detections] == [len(one) for one in here.detections]
    with PredictionStore(model, PredictOptions(score_threshold=SCORE_FLOOR)) as store:
        store.put(digests[1], here.detections[1].best(2), 0.0, "SageMaker")
    assert [len(one) for one in predict_all(model, data, digests).detections] == [1, 2]


@pytest.mark.timeout(300)
def test_it_is_said_that_nobody_knows(networks: Path, brought: Callable[..., Path]) -> None:
    with pytest.warns(DetkitWarning, match="its answers may differ"):
        Predictor(brought(networks / "plain-deployed"), score_threshold=0.5).close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("network", "said", "message"),
    [
        ("classifier", {}, r"no SSD of .*1 output\(s\), softmax, made by .*FullyConnected"),
        ("operator", {}, "operators that SSD does not: _Native"),
        ("torn", {}, "weights.params is no file of MXNet parameters, or damaged"),
        ("plain-training", {"image_shape": "9"}, "image_shape is 9; expected 32 to 2048"),
        ("plain-training", {"nms_topk": "all"}, "nms_topk is 'all'; expected a number"),
        ("nothing", {}, "found 0; model.tar.gz holds hyperparams.json"),
    ],
)
def test_what_does_not_open(
    networks: Path, brought: Callable[..., Path], network: str, said: dict[str, str], message: str
) -> None:
    """The reason, and where the model answers."""
    folder = brought(networks / network, said=said)
    with pytest.raises(Unsupported, match=message) as caught:
        Predictor(folder, score_threshold=0.5)
    assert f"detkit sagemaker transform {folder.parent}" in str(caught.value)
    assert f"detkit deploy {folder.parent}" in str(caught.value)


@pytest.mark.timeout(300)
def test_other_classes_than_the_network_has(networks: Path, brought: Callable[..., Path]) -> None:
    folder = brought(networks / "plain-training")
    changed = msgspec.structs.replace(manifest("object-detection"), classes=["disc", "square", "dog"])
    (folder / "detkit.json").write_bytes(msgspec.json.encode(changed))
    with pytest.raises(Unsupported, match=r"scores are \(1, 3, \d+\); expected 3 classes and the background"):
        Predictor(folder, score_threshold=0.5)


def test_without_an_environment_the_command_is_named(
    brought: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DETKIT_PYTHON_GLUONCV", raising=False)
    monkeypatch.setenv("DETKIT_ENVIRONMENTS", str(tmp_path / "none"))
    with pytest.raises(Unsupported, match=r"answers only there(.|\n)*open it here: .*detkit backends install"):
        Predictor(brought(tmp_path), score_threshold=0.5)


def test_pytorch_answers_only_there(brought: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="answers only there") as caught:
        Predictor(brought(tmp_path, "jumpstart/pytorch-od1-fasterrcnn-resnet50-fpn"), score_threshold=0.5)
    assert "gluoncv" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("{", "no symbol of MXNet"),
        ({"nodes": [], "heads": []}, "names no outputs"),
        ({"nodes": [FORWARD], "heads": [[0, 0, 0]]}, "needs what does not come before it"),
        ({"nodes": [{"op": "null", "name": "data", "inputs": []}], "heads": [[1, 0, 0]]}, "names no outputs"),
        ({"nodes": [{"op": "null", "name": "data", "inputs": []}], "heads": [[0, -1, 0]]}, "is no output of a node"),
        ({"nodes": [{"op": "null", "name": "x", "inputs": []}] * 20_001, "heads": [[0, 0, 0]]}, "20001 nodes"),
    ],
)
def test_symbols_that_are_none(tmp_path: Path, file: Any, message: str) -> None:
    """MXNet is not given a file that is no graph."""
    path = tmp_path / "symbol.json"
    path.write_text(file if isinstance(file, str) else json.dumps(file))
    with pytest.raises(InvalidData, match=message):
        Graph.read(path)
