"""Suites that plugin authors subclass, and a small data set to try things on. Needs pytest: ``detkit-sdk[testing]``."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

_HOME = {"BackendTests": "backends", "FormatTests": "formats", "tiny_dataset": "data"}

__all__ = ["BackendTests", "FormatTests", "tiny_dataset"]

if TYPE_CHECKING:
    from detkit.testing.backends import BackendTests
    from detkit.testing.data import tiny_dataset
    from detkit.testing.formats import FormatTests


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'detkit.testing' has no attribute {name!r}")
    module = f"detkit.testing.{_HOME[name]}"
    if name.endswith("Tests") and module not in sys.modules:
        import pytest

        pytest.register_assert_rewrite(module)  # a plugin author sees the values of a failed assertion
    return getattr(importlib.import_module(module), name)
