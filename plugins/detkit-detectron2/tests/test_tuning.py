"""A search over Detectron2's models: what was chosen is what its optimizer had."""

from __future__ import annotations

import pytest

from detkit import Choice, Dataset, Trainer, Tuner

pytest.importorskip("optuna", reason="pip install 'detkit-sdk[tune]'")


@pytest.mark.usefixtures("worker_python", "_checkout_stays")
def test_values_reach_the_optimizer(tiny: Dataset) -> None:
    space = {
        "learning_rate": "1e-3..1e-1:log",
        "weight_decay": "1e-5..1e-3:log",
        "batch_size": Choice((2, 4, 8)),
        "optimizer": "sgd|adamw",
    }
    trainer = Trainer(model="detectron2/retinanet_tiny", image_size=64, iterations=4, lr_batch_size=16, device="cpu")
    study = Tuner(trainer, space, trials=3, parallel=2, sampler="random", pruner="none").fit(tiny, tiny, quiet=True)
    assert [trial.state for trial in study.trials] == ["finished"] * 3
    for trial in study.trials:
        native, params = trial.run.model.manifest.native, trial.run.model.manifest.params
        assert {name: params[name] for name in trial.values} == trial.values
        assert native["optimizer"].casefold() == params["optimizer"]
        for name in ("learning_rate", "weight_decay", "batch_size"):
            assert native[name] == pytest.approx(params[name], rel=1e-9)
        assert native["peak_learning_rate"] == pytest.approx(params["learning_rate"] * params["batch_size"] / 16)
