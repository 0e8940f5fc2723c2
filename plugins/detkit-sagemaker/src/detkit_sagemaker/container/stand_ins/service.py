"""What AWS's images find in ``/opt/ml``, how they fail, and what their log looks like."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Failure(Exception):
    """Ends training; the text becomes the ``FailureReason``, with ``ClientError`` or ``AlgorithmError`` before it."""


def refuse(why: str) -> Failure:
    """Return the error for a mistake of whoever asked. AWS's own texts are others."""
    return Failure(f"ClientError: {why}")


class TrainingFolder:
    """``/opt/ml`` of a training job, by its named places."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.model = base / "model"
        for folder in (self.model, base / "output/data"):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def hyperparameters(self) -> Mapping[str, str]:
        """Every hyperparameter, as text."""
        given = self._config("hyperparameters")
        wrong = [name for name, value in given.items() if not isinstance(value, str)]
        if wrong:
            raise refuse(f"hyperparameters {', '.join(wrong)} are no strings")
        return given

    @property
    def channels(self) -> Mapping[str, Mapping[str, Any]]:
        """What ``inputdataconfig.json`` says of each channel."""
        return self._config("inputdataconfig")

    @property
    def hosts(self) -> list[str]:
        return list(self._config("resourceconfig").get("hosts", ["algo-1"]))

    def channel(self, name: str) -> Path:
        """Return a channel's folder, beside which its FIFOs are. Raises `Failure` where the job has none."""
        if name not in self.channels:
            raise refuse(f"the channel {name!r} is missing; the job has {', '.join(sorted(self.channels)) or 'none'}")
        return self.base / "input/data" / name

    def fail(self, reason: str) -> None:
        """Leave the reason of a failure."""
        (self.base / "output/failure").write_text(reason)

    def _config(self, name: str) -> dict[str, Any]:
        file = self.base / f"input/config/{name}.json"
        found: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
        return found


def log(text: str, level: str = "INFO") -> None:
    """Print a line as AWS's algorithms do: ``[11/21/2026 15:00:00 INFO 140] ...``."""
    print(f"[{time.strftime('%m/%d/%Y %H:%M:%S')} {level} {os.getpid()}] {text}", flush=True)
