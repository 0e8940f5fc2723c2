"""One controller without torch and mxnet, a worker in an environment of each: the same job, the same report."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import detkit
from detkit import plugins
from detkit.errors import DetkitError
from detkit.predictor import Predictor
from detkit.scores import SCORE_FLOOR
from detkit.shapes import write_shapes
from detkit.verification import AP_DELTA, SCORES

NEU = Path(__file__).parents[3] / "shared/data/neu-det"

MODELS = ("torchvision/ssd_tiny", "gluoncv/ssd_300_mobilenet0.25")


def ready() -> bool:
    """Tell whether both frameworks are there, and neither is here."""
    try:
        pythons = {plugins.backend(model.partition("/")[0]).interpreter(None) for model in MODELS}  # type: ignore[attr-defined]
    except DetkitError:
        return False
    return sys.executable not in pythons


pytestmark = pytest.mark.skipif(not ready(), reason="needs both frameworks in environments of their own: tox -e cross")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[detkit.Dataset, detkit.Dataset]:
    root = write_shapes(tmp_path_factory.mktemp("shapes") / "data", num_images=60, size=128, seed=1)
    data = detkit.read_dataset(root)
    return data.take(range(48)), data.take(range(48, 60))


@pytest.fixture(scope="module")
def runs(
    shapes: tuple[detkit.Dataset, detkit.Dataset], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, detkit.Run]:
    """Each model trained by the same call."""
    train, test = shapes
    folder = tmp_path_factory.mktemp("runs")
    return {
        model: detkit.Trainer(model=model, epochs=2, batch_size=8, threads=1).fit(
            train, test, name=str(folder / model.replace("/", "-")), quiet=True
        )
        for model in MODELS
    }


def command(*words: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "detkit.cli", *words, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_controller_has_no_framework() -> None:
    for name in ("torch", "torchvision", "mxnet", "gluoncv", "onnx"):
        assert importlib.util.find_spec(name) is None


@pytest.mark.parametrize("model", MODELS)
def test_a_search_in_the_framework_s_own_interpreter(
    model: str, shapes: tuple[detkit.Dataset, detkit.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trials at once, and what the framework's optimizer had is what was chosen."""
    monkeypatch.setenv("DETKIT_RUNS", str(tmp_path))
    train, val = shapes
    space = {"learning_rate": "1e-4..1e-2:log", "weight_decay": "1e-4..1e-1:log"}
    tuner = detkit.Tuner(detkit.Trainer(model=model, epochs=1, batch_size=8), space, trials=3, parallel=2)
    study = tuner.fit(train.take(range(16)), val, quiet=True)
    assert [trial.state for trial in study.trials] == ["finished"] * 3
    for trial in study.trials:
        manifest = trial.run.model.manifest
        assert len(trial.values) == 2
        for name, value in trial.values.items():
            assert manifest.native[name] == pytest.approx(value, rel=1e-9) == manifest.params[name]


def test_the_same_report(
    runs: dict[str, detkit.Run], shapes: tuple[detkit.Dataset, detkit.Dataset], tmp_path: Path
) -> None:
    """Metrics, manifests and scores differ in their values alone."""
    _, test = shapes
    manifests = [run.model.manifest for run in runs.values()]
    scores = [detkit.evaluate(run, test, allow_seen=True) for run in runs.values()]
    assert scores[0].protocol == scores[1].protocol
    assert set(scores[0]) == set(scores[1])
    assert list(scores[0].per_class) == list(scores[1].per_class) == list(test.classes)
    assert manifests[0].data == manifests[1].data
    kept = [{name for name in manifest.metrics if "loss" not in name} for manifest in manifests]
    assert kept[0] == kept[1], "the parts of a loss are each framework's own"
    assert {m.versions["detkit"] for m in manifests} == {detkit.__version__}
    assert "torch" in manifests[0].versions
    assert "mxnet" in manifests[1].versions
    events = [{(event.kind, *sorted(event.values)) for event in run.events(follow=False)} for run in runs.values()]
    kinds = [{kind for kind, *_ in one} for one in events]
    assert kinds[0] == kinds[1] == {"log", "metric", "progress", "state"}
    for run, expected in zip(runs.values(), scores, strict=True):
        assert run.metrics["val/AP"] == pytest.approx(expected["AP"], abs=1e-6), "the worker counts as we do"


def test_the_same_words(runs: dict[str, detkit.Run], shapes: tuple[detkit.Dataset, detkit.Dataset]) -> None:
    """`runs show` and `predict` print records of one shape."""
    picture = shapes[1].paths[0]
    shown = [command("runs", "show", str(run.path)) for run in runs.values()]
    assert set(shown[0]) == set(shown[1])
    found = [command("predict", str(run.path), picture, "--score-threshold", "0.001") for run in runs.values()]
    assert set(found[0]) == set(found[1])
    assert [record["path"] for record in found] == [picture, picture]


@pytest.mark.parametrize("model", MODELS)
def test_exports_open_here(
    runs: dict[str, detkit.Run], shapes: tuple[detkit.Dataset, detkit.Dataset], tmp_path: Path, model: str
) -> None:
    """A worker writes ONNX; what comes out needs no framework, as a folder and as a file."""
    _, test = shapes
    main = detkit.export(runs[model], "onnx")
    assert main.parent == runs[model].path / "export/onnx"
    alone = shutil.copy(main, tmp_path / "alone.onnx")
    original, exported = (Predictor(one, score_threshold=SCORE_FLOOR) for one in (runs[model], alone))
    with original, exported:
        assert exported.classes == test.classes
        for theirs, ours in zip(original.predict(test), exported.predict(test), strict=True):
            # Two epochs teach little: which of many alike is found is left to chance, how sure it is is not.
            np.testing.assert_allclose(ours.scores[:20], theirs.scores[:20], atol=SCORES)
            assert (ours.width, ours.height) == (theirs.width, theirs.height)
    ap = [detkit.evaluate(one, test, allow_seen=True)["AP"] for one in (main.parent, runs[model])]
    assert ap[0] == pytest.approx(ap[1], abs=AP_DELTA)


@pytest.mark.skipif(not NEU.is_dir(), reason="the real data lie beside a checkout only")
def test_one_word_changes_the_framework(tmp_path: Path) -> None:
    """A sample of NEU-DET through both, by the same call."""
    data = detkit.read_dataset(NEU)
    train, test = data.take(range(0, len(data), 60)), data.take(range(7, len(data), 90))
    for model in MODELS:
        run = detkit.Trainer(model=model, epochs=2, batch_size=8, threads=1).fit(
            train, test, name=str(tmp_path / model.replace("/", "-")), quiet=True
        )
        assert {"train/loss", "val/AP", "val/AP50"} <= set(run.metrics)
        with Predictor(run, score_threshold=SCORE_FLOOR) as predictor:
            found = list(predictor.predict(test))
        assert {one.classes for one in found} == {data.classes}
        assert [one.path for one in found] == list(test.paths)
