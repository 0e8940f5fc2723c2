"""The examples that need an AWS account run to their end in a simulated one, made short by their ``# test:`` line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = [
    script
    for script in sorted((Path(__file__).parents[3] / "examples").glob("*.py"))
    if "\n# needs: an AWS account, real or simulated\n" in script.read_text()
]


def test_there_are_such_examples() -> None:
    assert SCRIPTS


@pytest.mark.timeout(240)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_example(script: Path, tmp_path: Path) -> None:
    text = script.read_text()
    arguments = re.search(r"^# test: (.*)$", text, flags=re.MULTILINE)
    printed = re.search(r"^# prints: (.*)$", text, flags=re.MULTILINE)
    assert arguments and printed, f"{script.name}: say `# test: ARGUMENTS` and `# prints: PATTERN`"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "DETKIT_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, script, *shlex.split(arguments[1])],
        cwd=tmp_path,
        env={**kept, "HOME": str(tmp_path / "home")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(printed[1], done.stdout, flags=re.DOTALL), done.stdout
