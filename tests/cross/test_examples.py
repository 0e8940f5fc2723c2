"""The examples that need a framework in an environment of its own, as their ``# needs:`` line says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from detkit import plugins
from detkit.errors import DetkitError

NEEDS = {
    script: needed[1]
    for script in sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
    if (needed := re.search(r"^# needs: the (\S+) backend$", script.read_text(), flags=re.MULTILINE))
}


def test_there_are_such_examples() -> None:
    assert NEEDS


@pytest.mark.parametrize("script", NEEDS, ids=lambda script: script.name)
def test_example(script: Path, tmp_path: Path) -> None:
    """It runs to its end, made short by the arguments on its ``# test:`` line, and prints what it says it does."""
    try:
        plugins.backend(NEEDS[script]).interpreter(None)  # type: ignore[attr-defined]
    except DetkitError as error:
        pytest.skip(f"no interpreter for {NEEDS[script]}: {error}")
    text = script.read_text()
    arguments = re.search(r"^# test: (.*)$", text, flags=re.MULTILINE)
    printed = re.search(r"^# prints: (.*)$", text, flags=re.MULTILINE)
    assert arguments and printed, f"{script.name}: say `# test: ARGUMENTS` and `# prints: PATTERN`"
    done = subprocess.run(
        [sys.executable, script, *shlex.split(arguments[1])],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(printed[1], done.stdout, flags=re.DOTALL), done.stdout
