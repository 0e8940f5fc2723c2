"""Where a setting comes from: the call, the constructor, ``DETKIT_*``, ``detkit.yaml``, or the model's default."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from detkit.errors import InvalidData, InvalidValue

FILE_NAME = "detkit.yaml"


class Setting(NamedTuple):
    """A value and where it was found."""

    value: Any
    origin: str


class Settings:
    """Layers of plain settings, the strongest first. None in a call counts as not given, but see `choose`."""

    def __init__(self, call: Mapping[str, Any], constructor: Mapping[str, Any]) -> None:
        self._layers = [
            {name: Setting(value, "the call") for name, value in call.items()},
            {name: Setting(value, "the constructor") for name, value in constructor.items()},
        ]
        self._file = find_file()
        self._from_file = read_file(self._file) if self._file else {}

    def get(self, name: str) -> Setting | None:
        """Return the strongest setting of a name, or None."""
        return self._find(name)[1]

    def _find(self, name: str, none_counts: bool = False) -> tuple[int, Setting | None]:
        """Return the strongest setting of a name and its layer's number, 0 for the call."""
        for number, layer in enumerate(self._layers):
            if name in layer and (none_counts or layer[name].value is not None):
                return number, layer[name]
        variable = f"DETKIT_{name.upper()}"
        if variable in os.environ:
            return 2, Setting(os.environ[variable], variable)
        if name in self._from_file:
            return 3, Setting(self._from_file[name], str(self._file))
        return 4, None

    def written(self) -> dict[str, Setting]:
        """Return every setting that somebody wrote down by hand; environment variables are looked up by name only."""
        from_file = {name: Setting(value, str(self._file)) for name, value in self._from_file.items()}
        given = ((name, setting) for layer in reversed(self._layers) for name, setting in layer.items())
        return {**from_file, **{name: setting for name, setting in given if setting.value is not None}}

    def choose(
        self, names: Iterable[str], instead: Mapping[str, str], nullable: Collection[str] = ()
    ) -> dict[str, Setting]:
        """Return the strongest setting of each of the names that has one.

        For the ``nullable`` names None is a value: ``weights=None`` in a call means none, whatever the default is.

        Of two names that exclude each other (``instead``) the one from the stronger layer is taken; both remain where
        they come from the same layer, for whoever checks them to complain.
        """
        found = {name: self._find(name, name in nullable) for name in names}
        for pair in instead.items():
            if all(name in found for name in pair):
                one, other = sorted(pair, key=lambda name: found[name][0])
                if found[one][0] < found[other][0]:
                    del found[other]
        return {name: setting for name, (_, setting) in found.items() if setting is not None}


def find_file() -> Path | None:
    """Return the nearest ``detkit.yaml`` in the current folder or above it."""
    here = Path.cwd()
    return next((folder / FILE_NAME for folder in (here, *here.parents) if (folder / FILE_NAME).is_file()), None)


def read_file(path: Path) -> dict[str, Any]:
    """Read a ``detkit.yaml``: one mapping of settings. Raises `InvalidData` with the line of a mistake."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InvalidData(f"{path} is not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InvalidValue(str(path), type(content).__name__, "one mapping of settings, such as `epochs: 20`")
    return content
