"""The torchvision backend passes the suite that every backend has to pass, on its smallest model."""

from __future__ import annotations

from typing import ClassVar

from detkit.testing import BackendTests


class TestTorchvision(BackendTests):
    backend = "torchvision"
    model = "fcos_tiny"
    settings: ClassVar = {"image_size": 64, "batch_size": 4, "warmup_iterations": 0, "lr_scheduler": "constant"}
    options: ClassVar = {"device": "cpu"}
    learns: ClassVar = {"epochs": 60, "validate_every": "1000 epochs", "checkpoint_every": "1000 epochs"}
    like_two: ClassVar = {"grad_accumulation": 2}
