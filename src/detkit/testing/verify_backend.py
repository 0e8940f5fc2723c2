"""The suite for an installed backend, as ``detkit backends verify NAME`` runs it.

``pytest --pyargs detkit.testing.verify_backend`` with ``DETKIT_VERIFY_BACKEND=NAME`` in the environment;
``DETKIT_VERIFY_MODEL`` chooses a model other than the backend's first, ``DETKIT_VERIFY_SETTINGS`` holds a JSON object
of parameters and options that make training small, yet slow enough to be stopped halfway.
"""

from __future__ import annotations

import json
import os
from typing import Any, ClassVar

import pytest

from detkit import plugins
from detkit.testing import BackendTests

NAME = os.environ.get("DETKIT_VERIFY_BACKEND", "")


@pytest.mark.skipif(not NAME, reason="DETKIT_VERIFY_BACKEND names no backend")
class TestBackend(BackendTests):
    backend = NAME
    model = os.environ.get("DETKIT_VERIFY_MODEL") or (next(iter(plugins.backend(NAME).models)) if NAME else "")
    settings: ClassVar[dict[str, Any]] = json.loads(os.environ.get("DETKIT_VERIFY_SETTINGS") or "{}")
