"""The distributions that this Python has installed: the code they hold, and that very code packed into wheels.

An environment of a backend's own gets detkit and the plugin from here, so both sides run the same code. Nothing is
fetched, and no build backend is needed: what is installed is packed as it lies.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from detkit.errors import PluginError, Unsupported

_COMPILED = {".so", ".pyd", ".dylib"}
_OF_THIS_INSTALL = {"RECORD", "INSTALLER", "REQUESTED", "WHEEL", "METADATA", "direct_url.json", "uv_cache.json"}
"""Files beside the metadata that tell how a distribution came here; a wheel has its own or none."""
_WHEEL = "Wheel-Version: 1.0\nGenerator: detkit\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_REQUIRED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""The name that a requirement begins with."""
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""The time of every file in a wheel, so that the same code makes the same wheel."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """One distribution as it is installed now, ordinarily or as an editable source tree."""

    name: str
    version: str
    files: Mapping[str, Path]
    """The package's files: the path in site-packages, with ``/``, and where the file lies."""
    metadata: Mapping[str, bytes]
    """The files of the ``.dist-info`` folder that are worth keeping, by name."""

    @cached_property
    def digest(self) -> str:
        """The sha256 over paths and contents of the package's files. Raises `PluginError` when one cannot be read."""
        whole = hashlib.sha256()
        for path in sorted(self.files):
            whole.update(f"{path}\0{hashlib.sha256(self._read(path)).hexdigest()}\n".encode())
        return whole.hexdigest()

    def write_wheel(self, folder: Path) -> Path:
        """Pack the distribution into a wheel. Raises `Unsupported` for one with compiled modules."""
        compiled = [path for path in self.files if Path(path).suffix in _COMPILED]
        if compiled:
            raise Unsupported(
                f"{self.name} has compiled modules ({compiled[0]}), which fit only the Python they were built for; "
                "it cannot be brought along. make an environment by hand, with detkit-sdk, and choose it with python="
            )
        stem = f"{re.sub(r'[-_.]+', '_', self.name).lower()}-{self.version.replace('-', '_')}"
        info = f"{stem}.dist-info"
        contents = {path: self._read(path) for path in sorted(self.files)}
        contents |= {f"{info}/{name}": content for name, content in sorted(self.metadata.items())}
        contents[f"{info}/WHEEL"] = _WHEEL.encode()
        record = "".join(f"{path},{_record_hash(content)},{len(content)}\n" for path, content in contents.items())
        contents[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
        wheel = folder / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, content in contents.items():
                entry = zipfile.ZipInfo(path, _LONG_AGO)
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, content)
        return wheel

    def _read(self, path: str) -> bytes:
        try:
            return self.files[path].read_bytes()
        except OSError as error:
            raise PluginError(
                f"{self.name} {self.version} is damaged: cannot read {self.files[path]} ({error.strerror}); "
                f"install {self.name} anew"
            ) from error


def required_plugins(name: str) -> list[str]:
    """Return the plugins of detkit that a distribution requires, and those that these require."""
    found: dict[str, None] = {}
    waiting = [name]
    while waiting:
        for line in importlib.metadata.requires(waiting.pop()) or ():
            required = _REQUIRED.match(line)
            if required is None or "extra ==" in line:
                continue
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                other = importlib.metadata.distribution(required[0])
                if other.name not in found and any(entry.group == "detkit" for entry in other.entry_points):
                    found[other.name] = None
                    waiting.append(other.name)
    return list(found)


def find(name: str, modules: Iterable[str] = ()) -> Distribution:
    """Return an installed distribution; ``modules`` are top-level ones that may be of it, beside its entry points'.

    They are asked for only where the package lies in a source tree, of which no list of files exists. Raises
    `PluginError` for a distribution that is not installed, or not by an installer that lists its files.
    """
    try:
        installed = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise PluginError(f"no distribution {name!r} is installed in this Python") from None
    told = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
    files, metadata = {}, {"METADATA": told.encode()}
    editable = _is_editable(installed)
    if installed.files and not editable and installed.read_text("RECORD") is None:
        raise PluginError(
            f"{name} was installed in an old way, as an .egg-info folder without a RECORD of its files; "
            f"install it anew, with pip: pip install --force-reinstall --no-deps {name}"
        )
    for path in installed.files or ():
        folder, *rest = path.parts
        if folder != ".." and ".." in rest:
            raise PluginError(f"{name} is damaged: its RECORD names {path}, outside of its package; install it anew")
        if folder.endswith(".dist-info"):
            if "/".join(rest) not in _OF_THIS_INSTALL:
                metadata["/".join(rest)] = Path(str(path.locate())).read_bytes()
        elif folder not in {"..", os.sep, "__pycache__"} and path.suffix not in {".pyc", ".pth"}:
            files[path.as_posix()] = Path(str(path.locate()))
    if editable or not files:
        entry_points = installed.read_text("entry_points.txt")
        if entry_points:
            metadata["entry_points.txt"] = entry_points.encode()
        tops = {entry.module.partition(".")[0] for entry in installed.entry_points}
        tops |= {module for module in modules if not _is_elsewhere(module, installed)}
        files = {path: file for top in sorted(tops) for path, file in _source_files(top)}
    return Distribution(name=installed.name, version=installed.version, files=files, metadata=metadata)


def _is_editable(installed: importlib.metadata.Distribution) -> bool:
    return bool(_origin(installed).get("dir_info", {}).get("editable"))


def _origin(installed: importlib.metadata.Distribution) -> dict[str, Any]:
    origin: dict[str, Any] = json.loads(installed.read_text("direct_url.json") or "{}")
    return origin


def _is_elsewhere(module: str, installed: importlib.metadata.Distribution) -> bool:
    """Return whether a module lies outside of the source tree that a distribution is known to be."""
    url = urlsplit(_origin(installed).get("url", ""))
    tree = Path(unquote(url.path)).resolve()
    spec = importlib.util.find_spec(module)
    if url.scheme != "file" or not tree.is_dir() or spec is None or not spec.origin:
        return False
    return not Path(spec.origin).resolve().is_relative_to(tree)


def _source_files(module: str) -> Iterator[tuple[str, Path]]:
    """Yield the files of a top-level module; hidden ones are an editor's, not the package's."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise PluginError(f"module {module!r} of an installed plugin is not there; install the plugin anew")
    if spec.submodule_search_locations is None:
        if spec.origin:
            yield Path(spec.origin).name, Path(spec.origin)
        return
    for root in map(Path, spec.submodule_search_locations):
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
            for name in names:
                if not name.startswith(".") and not name.endswith(".pyc"):
                    file = Path(folder, name)
                    yield f"{module}/{file.relative_to(root).as_posix()}", file


def _record_hash(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
