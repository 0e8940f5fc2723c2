"""What importing costs: nothing heavy for users, and so little for the worker that it fits into old environments."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import detkit

PUBLIC = [
    "Choice",
    "Comparison",
    "Dataset",
    "DetkitError",
    "Detections",
    "Float",
    "Int",
    "Model",
    "Predictor",
    "Run",
    "Sample",
    "Scores",
    "Study",
    "Trainer",
    "Tuner",
    "__version__",
    "check",
    "compare",
    "deploy",
    "draw",
    "evaluate",
    "export",
    "merge",
    "open_run",
    "open_study",
    "plot",
    "plot_study",
    "read_dataset",
    "read_predictions",
    "remap",
    "sample",
    "score",
    "write_dataset",
    "write_predictions",
]

WORKER_NEEDS = {"numpy", "PIL", "msgspec", "pluggy"}


def loaded_by(statement: str) -> dict[str, str | None]:
    """Return every module that a statement loads in a new interpreter, with its file."""
    script = (
        # msgspec looks for typing_extensions and does without.
        "import json, sys; sys.modules['typing_extensions'] = None; before = set(sys.modules)\n"
        f"{statement}\n"
        "print(json.dumps({n: getattr(m, '__file__', None) for n, m in sys.modules.items() if n not in before}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def third_party(modules: dict[str, str | None]) -> set[str]:
    tops = {name.partition(".")[0] for name in modules}
    return {name for name in tops if name not in sys.stdlib_module_names and not name.startswith(("__", "detkit"))}


def test_public_names() -> None:
    assert detkit.__all__ == sorted(PUBLIC)
    assert dir(detkit) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves(name: str) -> None:
    assert getattr(detkit, name) is not None


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'detkit' has no attribute 'Trianer'"):
        _ = detkit.Trianer  # type: ignore[attr-defined]


def test_import_detkit_loads_nothing() -> None:
    loaded = loaded_by("import detkit")
    assert not third_party(loaded)
    assert [name for name in loaded if name.startswith("detkit")] == ["detkit"]


def test_errors_and_params_load_no_numpy() -> None:
    assert not third_party(loaded_by("import detkit.errors"))
    assert third_party(loaded_by("import detkit.params")) == {"msgspec"}


def worker_modules() -> dict[str, str | None]:
    # The worker imports the formats only where it writes a channel; engines score with detkit.scores, and describe what
    # they export with detkit.graphs.
    return loaded_by("import detkit.worker, detkit.backends, detkit.hookspecs, detkit.scores, detkit.graphs")


def test_the_worker_needs_little() -> None:
    assert third_party(worker_modules()) <= WORKER_NEEDS


def test_controller_needs_no_engine_and_no_evaluator() -> None:
    found = third_party(loaded_by("from detkit import Trainer, Predictor, evaluate, read_dataset, open_run"))
    assert not found & {"torch", "torchvision", "hotcoco", "pycocotools", "yaml", "psutil", "rich", "typer"}


def test_the_worker_is_python_3_10() -> None:
    """Syntax only; the suite itself runs on 3.10 where that is installed (tox)."""
    files = [Path(file) for name, file in worker_modules().items() if name.startswith("detkit") and file]
    assert len(files) > 10
    for file in files:
        ast.parse(file.read_text(), str(file), feature_version=(3, 10))
