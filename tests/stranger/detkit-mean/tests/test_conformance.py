"""The plugin passes detkit's own suites."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import ClassVar

import pytest

from detkit import Trainer, evaluate
from detkit.testing import BackendTests, FormatTests, tiny_dataset


class TestMean(BackendTests):
    backend = "mean"
    model = "boxes"
    slowly: ClassVar = {"pause_s": 0.02}
    diverges: ClassVar = {"learning_rate": 1e300}


class TestBoxesCsv(FormatTests):
    format_name = "boxes-csv"


def test_metric_and_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tiny_dataset(tmp_path / "data")
    run = Trainer(model="mean/boxes").fit(data, data, quiet=True)
    scores = evaluate(run, data, allow_seen=True)
    assert scores["count_error"] == pytest.approx(sum(abs(2 - n) for n in data.boxes_per_image()) / len(data))
    with (run.path / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [float(value) for _, name, value in rows if name == "train/loss"] == [
        row["train/loss"] for row in run.history if "train/loss" in row
    ]
