"""``detkit demo``, with the echo backend in place of a real detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image


def test_demo_and_again(cli: Any, tmp_path: Path) -> None:
    words = ("demo", "--quick", "--quiet", "--model", "echo/memory", "--folder", "show")
    done = cli(*words, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert set(done.json) == {"run", "model", "AP50", "AP", "seconds", "sheet", "data", "images"}
    assert done.json["images"] == {"train": 360, "validation": 40, "test": 100}
    assert Path(done.json["run"]) == tmp_path / "show/run-1"
    with Image.open(done.json["sheet"]) as sheet:
        assert sheet.width > 1000
    again = cli(*words, cwd=tmp_path)
    assert again.code == 0, again.err
    assert "detkit train YOUR_FOLDER" in again.out
    assert "detkit predict show/run-2" in again.out


def test_a_folder_with_something_else(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "shapes").mkdir()
    done = cli("demo", "--model", "echo/memory", "--folder", ".", cwd=tmp_path)
    assert done.code == 2
    assert "choose another --folder" in done.err
