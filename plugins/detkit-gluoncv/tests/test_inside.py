"""What can only be looked at where mxnet is: the modules of ``inside``, run there by unittest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from detkit.environments import worker_variables

INSIDE = Path(__file__).parent / "inside"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("module", sorted(path.stem for path in INSIDE.glob("test_*.py")))
def test_inside(module: str, worker_python: str) -> None:
    variables = {**worker_variables(worker_python), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [worker_python, "-m", "unittest", module],
        cwd=INSIDE,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Ran 0 tests" not in done.stderr


def test_this_is_another_interpreter(worker_python: str) -> None:
    assert worker_python != sys.executable
    for name in ("mxnet", "gluoncv"):
        with pytest.raises(ImportError):
            __import__(name)
