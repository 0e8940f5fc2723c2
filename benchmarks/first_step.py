"""Seconds from `start()` to the first optimizer step, against what the framework's import alone takes.

``python benchmarks/first_step.py [MODEL ...]``; both are measured in turns, with the interpreter that the backend uses.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import detkit
from detkit import plugins
from detkit.backends import LocalBackend
from detkit.environments import worker_variables
from detkit.testing import tiny_dataset

ROUNDS = 5
MODELS = ("torchvision/fcos_tiny", "gluoncv/ssd_300_mobilenet0.25")


def first_step(model: str, data: detkit.Dataset, folder: Path) -> float:
    """Return the seconds until the first step's metrics arrive."""
    began = time.perf_counter()
    run = detkit.Trainer(model=model, iterations=1, batch_size=2).start(data, name=str(folder), leash=True)
    next(event for event in run.events() if event.kind == "metric")
    seconds = time.perf_counter() - began
    run.wait()
    return seconds


def imports(backend: LocalBackend) -> float:
    """Return the seconds that starting the interpreter and importing the frameworks takes."""
    python = backend.interpreter(None)
    # The engine comes first: it makes old frameworks importable.
    engine = backend.engine.partition(":")[0]
    script = "; ".join(f"import {name}" for name in (engine, *backend.requires))
    began = time.perf_counter()
    subprocess.run([python, "-W", "ignore", "-c", script], env=worker_variables(python), check=True)
    return time.perf_counter() - began


def main() -> None:
    print(f"{'model':34}{'first step':>12}{'import':>9}{'ratio':>8}   medians of {ROUNDS} rounds, seconds")
    for model in sys.argv[1:] or MODELS:
        backend = plugins.backend(model.partition("/")[0])
        assert isinstance(backend, LocalBackend)
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            data = tiny_dataset(root / "images")
            rounds = [(first_step(model, data, root / f"run{i}"), imports(backend)) for i in range(ROUNDS)]
        step, load = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{model:34}{step:12.2f}{load:9.2f}{step / load:8.2f}")


if __name__ == "__main__":
    main()
