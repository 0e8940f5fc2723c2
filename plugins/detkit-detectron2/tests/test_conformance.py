"""The Detectron2 backend passes the suite that every backend has to pass, on its smallest model."""

from __future__ import annotations

from typing import ClassVar

import pytest

from detkit.testing import BackendTests


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of its anchors
@pytest.mark.usefixtures("worker_python")
class TestDetectron2(BackendTests):
    backend = "detectron2"
    model = "faster_rcnn_tiny"
    settings: ClassVar = {"image_size": 64, "batch_size": 4, "warmup_iterations": 0, "lr_scheduler": "constant"}
    options: ClassVar = {"device": "cpu", "threads": 1}
    learns: ClassVar = {"epochs": 60, "validate_every": "1000 epochs", "checkpoint_every": "1000 epochs"}
    like_two: ClassVar = {"grad_accumulation": 2}

    @pytest.fixture(autouse=True)
    def _same_checkout(self, _nothing_from_outside: None, _checkout_stays: None) -> None:
        """Let each case find Detectron2 where the whole run does."""
