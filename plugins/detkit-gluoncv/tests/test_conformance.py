"""The GluonCV backend passes detkit's conformance suite, from a controller that has no mxnet."""

from __future__ import annotations

from typing import ClassVar

from detkit.testing import BackendTests


class TestGluoncv(BackendTests):
    backend = "gluoncv"
    model = "ssd_300_mobilenet0.25"
    settings: ClassVar = {"batch_size": 4, "augmentations": ()}
    options: ClassVar = {"device": "cpu", "threads": 1}
    learns: ClassVar = {"iterations": 120, "learning_rate": 4e-3, "batch_size": 8, "validate_every": "120 iterations"}
    least_ap50 = 0.95
