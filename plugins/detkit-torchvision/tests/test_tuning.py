"""A search over a real network: what was chosen is what torch's optimizer had, and trials at once share the cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from detkit import Choice, Dataset, Trainer, Tuner
from detkit.errors import PluginError
from detkit.proofs import prove

pytest.importorskip("optuna", reason="pip install 'detkit-sdk[tune]'")

SPACE = {
    "learning_rate": "1e-4..1e-2:log",
    "weight_decay": "1e-4..1e-1:log",
    "batch_size": Choice((4, 8)),
    "optimizer": "sgd|adamw",
}


def test_values_reach_the_optimizer(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(model="torchvision/ssd_tiny", image_size=64, epochs=1, lr_batch_size=8, device="cpu")
    study = Tuner(trainer, SPACE, trials=4, parallel=2, sampler="random", pruner="none").fit(tiny, tiny, quiet=True)
    assert [trial.state for trial in study.trials] == ["finished"] * 4
    for trial in study.trials:
        native, values = trial.run.model.manifest.native, trial.values
        assert native["learning_rate"] == pytest.approx(values["learning_rate"], rel=1e-9)
        assert native["peak_learning_rate"] == pytest.approx(native["learning_rate"] * values["batch_size"] / 8)  # type: ignore[operator]
        assert native["weight_decay"] == values["weight_decay"]
        assert native["optimizer"].casefold() == values["optimizer"]
        assert native["batch_size"] == values["batch_size"]
        assert trial.run.job.options["threads"] == max(1, (os.cpu_count() or 1) // 2)
    first = study.trials[0]
    for name, other in {"learning_rate": 0.5, "weight_decay": 0.5, "optimizer": "sgd", "batch_size": 4}.items():
        with pytest.raises(PluginError, match=f"to be trained with {name}="):
            prove(first.run, {name: other}, study.params, 0)
