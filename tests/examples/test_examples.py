"""Every script in examples/ runs to its end, made short by the arguments on its ``# test:`` line."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted(
    script
    for script in (Path(__file__).parents[2] / "examples").glob("*.py")
    if "\n# needs: " not in script.read_text()  # tests/cross runs those that need another environment
)


def test_there_are_examples() -> None:
    assert SCRIPTS


@pytest.mark.skipif(
    importlib.util.find_spec("detkit_torchvision") is None,
    reason="examples are run where the torchvision plugin is, in `tox -e examples`",
)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_example(script: Path, tmp_path: Path) -> None:
    text = script.read_text()
    arguments = re.search(r"^# test: (.*)$", text, flags=re.MULTILINE)
    printed = re.search(r"^# prints: (.*)$", text, flags=re.MULTILINE)
    assert arguments and printed, f"{script.name}: say `# test: ARGUMENTS` and `# prints: PATTERN`"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DETKIT_")}
    done = subprocess.run(
        [sys.executable, script, *shlex.split(arguments[1])],
        cwd=tmp_path,
        env={**kept, "HOME": str(tmp_path / "home"), "TORCH_HOME": str(tmp_path / "home/torch")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(printed[1], done.stdout, flags=re.DOTALL), done.stdout
