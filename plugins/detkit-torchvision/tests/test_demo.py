"""The promise of the README: a detector from nothing in about a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_quick_demo_learns(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "detkit.cli", "demo", "--quick", "--json", "--folder", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    result = json.loads(done.stdout)
    assert result["AP50"] > 0.80
    assert Path(result["sheet"]).is_file()
