"""The template of a plugin package; the files beside this one, with ``$name`` and ``$package`` filled in."""

from __future__ import annotations

import re
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from string import Template

from detkit import plugins
from detkit.errors import InvalidValue, StorageError, UsageError

_FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "__init__.py.txt": "src/$package/__init__.py",
    "params.py.txt": "src/$package/params.py",
    "engine.py.txt": "src/$package/engine.py",
    "test_conformance.py.txt": "tests/test_conformance.py",
}
"""Template beside this module -> place in the package. They end in ``.txt`` so that no tool takes them for code."""


def write_plugin(name: str, folder: Path | None = None) -> list[Path]:
    """Write the package of a backend called ``name`` and return its files; all of them appear, or none."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or name.startswith("detkit"):
        raise InvalidValue("name", name, "small letters and digits, words joined by '-', without 'detkit-', e.g. mynet")
    if name in plugins.backends():
        raise UsageError(f"backend {name!r} is already installed; two cannot have one name, so choose another")
    target = (folder or Path(f"detkit-{name}")).absolute()
    if target.exists():
        raise UsageError(f"{target} is already there; nothing is overwritten, so choose another --folder or remove it")
    fields = {"name": name, "package": f"detkit_{name.replace('-', '_')}"}
    places = [Template(place).substitute(fields) for place in _FILES.values()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as beside:
            root = Path(beside) / target.name
            for template, place in zip(_FILES, places, strict=True):
                text = files(__name__).joinpath(template).read_text()
                (root / place).parent.mkdir(parents=True, exist_ok=True)
                (root / place).write_text(Template(text).substitute(fields))
            shutil.move(root, target)
    except OSError as error:
        raise StorageError(target, error) from error
    return [target / place for place in places]
