"""The run directory as a place of its own: what another place may write into it, and what a reader refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from detkit.errors import InvalidData, RunExists
from detkit.files import inside
from detkit.job import Job, Workspace

JOB = Job(
    backend="echo",
    engine="detkit_echo.engine:EchoEngine",
    model="memory",
    params={"epochs": 4, "learning_rate": 0.3, "weights": None, "optimizer": "sgd", "steps": [1]},
    options={},
    classes=["a"],
)


def test_strings_of_a_place_become_typed(tmp_path: Path) -> None:
    """SageMaker and its tuner write every hyperparameter as text, and add some of their own."""
    workspace = Workspace(tmp_path / "run")
    workspace.create(JOB)
    config = workspace.path / "input/config/hyperparameters.json"
    config.parent.mkdir(parents=True)
    given = {"epochs": "7", "learning_rate": "1e-4", "optimizer": "adamw", "steps": "[3, 6]", "weights": "coco"}
    config.write_text(json.dumps({**given, "_tuning_objective_metric": "x", "sagemaker_program": "y"}))
    expected = {"epochs": 7, "learning_rate": 1e-4, "optimizer": "adamw", "steps": [3, 6], "weights": "coco"}
    assert workspace.job().params == expected


def test_a_used_directory_is_refused(tmp_path: Path) -> None:
    Workspace(tmp_path / "run").create(JOB)
    with pytest.raises(RunExists, match="already holds a run that never started"):
        Workspace(tmp_path / "run").create(JOB)


@pytest.mark.parametrize("image_id", ["", "/etc/passwd", "../a.jpg", "a/../../b.jpg", "a\\b.jpg", "a\0b.jpg"])
def test_image_ids_that_leave_their_folder(image_id: str) -> None:
    with pytest.raises(InvalidData, match="leaves its folder"):
        inside(image_id)
