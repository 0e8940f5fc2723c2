"""The reference backend passes the suite that every backend has to pass."""

from __future__ import annotations

from typing import ClassVar

from detkit.testing import BackendTests


class TestEcho(BackendTests):
    backend = "echo"
    model = "memory"
    slowly: ClassVar = {"seconds_per_step": 0.02}
