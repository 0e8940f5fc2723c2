"""Help is quick, complete, and the same as the reference page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import detkit
from detkit.cli import app, reference

PAGE = Path(__file__).parents[2] / "docs/reference/command-line.md"

HEAVY = {"numpy", "PIL", "pluggy", "msgspec", "hotcoco", "yaml", "psutil", "torch"}

LOADED = """
import json, sys
from detkit.cli import main
try:
    main(sys.argv[1:])
except SystemExit as leaving:
    assert leaving.code == 0, leaving.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, *words], capture_output=True, text=True, check=True)
    assert not HEAVY & set(json.loads(done.stderr))


@pytest.mark.parametrize(
    "verb",
    [
        *("", "train", "predict", "evaluate", "models", "explain", "doctor", "demo"),
        *("runs", "runs ls", "runs show", "runs attach", "runs stop", "runs rm"),
        *("backends", "backends ls", "backends new", "backends verify"),
    ],
)
def test_every_verb_has_help(verb: str) -> None:
    result = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_version(cli: Any, tmp_path: Path) -> None:
    assert cli("--version", cwd=tmp_path).out == f"detkit {detkit.__version__}\n"


def test_reference_page_is_current() -> None:
    page = PAGE.read_text()
    assert page == reference.fill(page), f"run `python -m detkit.cli.reference {PAGE}`"


def test_wrong_use_is_2_and_json_says_so(cli: Any, tmp_path: Path) -> None:
    done = cli("predict", "--json", cwd=tmp_path)
    assert (done.code, done.json["code"]) == (2, 2)
    assert "RUN|MODEL" in done.err
