"""Where Detectron2 is: installed in this Python, or an unbuilt checkout that ``DETKIT_DETECTRON2`` names.

Nothing of it has to be compiled for what detkit does: its ``_C`` serves rotated boxes, deformable convolutions and an
evaluation of its own, and everything else calls torchvision.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from detkit.distributions import Distribution
from detkit.errors import PluginError, UsageError
from detkit_detectron2.yamls import evaluate

VARIABLE = "DETKIT_DETECTRON2"
"""The environment variable that names a checkout to import without building it."""

INSTALL = "detkit backends install detectron2 --source PATH"

HOW = (
    "Detectron2 is in no package registry, and detkit fetches no code: get a checkout of facebookresearch/detectron2. "
    f"`{INSTALL}` makes an environment from it, or {VARIABLE}=PATH lets this Python import it as it lies, unbuilt"
)
"""What to do where there is none."""

REQUIREMENTS = {
    "cloudpickle": "cloudpickle",
    "fvcore": "fvcore>=0.1.5,<0.1.6",
    "hydra": "hydra-core>=1.1",
    "iopath": "iopath>=0.1.7,<0.1.10",
    "omegaconf": "omegaconf>=2.1,<2.4",
    "pycocotools": "pycocotools>=2.0.2",
    "tabulate": "tabulate",
    "termcolor": "termcolor>=1.1",
    "yacs": "yacs>=0.1.8",
}
"""What the modules that the engine needs import, as Detectron2's ``setup.py`` requires it."""

_ODD = {
    "cv2": "detectron2.utils.visualizer imports OpenCV: pip install opencv-python-headless. detkit draws without it",
    "pkg_resources": "detectron2.model_zoo imports pkg_resources, which setuptools 82 and later do not have: "
    "pip install 'setuptools<82'. detkit reads the zoo's configuration files without it",
}
"""Modules that Detectron2's own requirements leave out, with what needs them."""

_NEEDED = (
    "detectron2.config",
    "detectron2.structures",
    "detectron2.data.transforms",
    "detectron2.modeling",
    "detectron2.solver",
    "detectron2.checkpoint.c2_model_loading",
)
"""What the engine imports. It never imports ``detectron2.model_zoo`` or ``detectron2.utils.visualizer``, see `_ODD`."""

_NOT_BROUGHT = {"__pycache__", ".git"}


class _Checkout(MetaPathFinder):
    """Finds the package in a checkout, and none of the folders beside it, such as ``tools`` and ``tests``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        named = _named()
        return PathFinder.find_spec(fullname, [str(named)]) if named and fullname == "detectron2" else None


_finder = _Checkout()


def announce() -> None:
    """Make the checkout that ``DETKIT_DETECTRON2`` names importable; it goes before an installed Detectron2."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _named() -> Path | None:
    """Return the folder that holds the package, of the checkout that the variable names."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser().absolute() if named else None


def check_variable() -> None:
    """Raise `PluginError` where the variable names a folder that is no checkout, whatever else is installed."""
    named = _named()
    if named is not None and not (named / "detectron2" / "__init__.py").is_file():
        raise PluginError(
            f"{VARIABLE} names {named}, which is no checkout of Detectron2: it has no detectron2/__init__.py; "
            "expected the folder that has README.md, configs and detectron2"
        )


def package() -> Path | None:
    """Return the folder of the package, which is not imported; None where this Python has none.

    Raises `PluginError` where the variable names no checkout.
    """
    announce()
    check_variable()
    spec = importlib.util.find_spec("detectron2")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def configs() -> Path:
    """Return the folder of the zoo's configuration files. Raises `PluginError` where there is none.

    A built Detectron2 has them in its package; a checkout has them beside it.
    """
    found = package()
    if found is None:
        raise PluginError(_nowhere())
    folders = (found / "model_zoo" / "configs", found.parent / "configs")
    for folder in folders:
        if (folder / "COCO-Detection").is_dir():
            return folder
    raise PluginError(
        f"the Detectron2 in {found} has no configuration files of the zoo; expected them in {folders[0]}, or in "
        f"{folders[1]} of a whole checkout. give a configuration file of your own with config=, or put them there"
    )


def defaults() -> dict[str, Any] | None:
    """Return the native keys with their defaults, by dotted name, from the source and without importing it.

    None where this Python has no Detectron2. A default that is called for, as one is, is None.
    """
    found = package()
    if found is None:
        return None
    file = found / "config" / "defaults.py"
    try:
        lines = ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError) as error:
        raise PluginError(f"cannot read {file}, which has Detectron2's defaults: {error}. {HOW}") from None
    known: dict[str, Any] = {}
    for line in lines:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Attribute):
            root, _, key = ast.unparse(line.targets[0]).partition(".")
            if root != "_C":
                continue
            if isinstance(line.value, ast.Call) and ast.unparse(line.value.func) == "CN":
                # A section, some with a first key in it.
                for begins in (part for part in line.value.args if isinstance(part, ast.Dict)):
                    known |= {f"{key}.{name}": value for name, value in ast.literal_eval(begins).items()}
            else:
                known[key] = _literal(line.value)
    return known


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None if isinstance(node, ast.Call) else evaluate(ast.unparse(node))  # 1.0 / 1000


def load() -> None:
    """Import what the engine needs of Detectron2. Raises `PluginError` that says what is wrong and what to do."""
    announce()
    check_variable()
    for name in _NEEDED:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what torch deprecates there is much in it
                importlib.import_module(name)
        except Exception as error:
            raise PluginError(explain(error)) from error
    warnings.filterwarnings("ignore", "torch.meshgrid")  # of its anchors, at the first image


def explain(error: Exception) -> str:
    """Return why Detectron2 cannot be imported, and what to do."""
    found = package()
    if found is None:
        return _nowhere()
    missing = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    where = f"the Detectron2 in {found} cannot be imported by {sys.executable}: "
    if missing in _ODD:
        return f"{where}no module {missing!r}. {_ODD[missing]}"
    if missing in REQUIREMENTS:
        lacking = {name for name in REQUIREMENTS if name == missing or importlib.util.find_spec(name) is None}
        listed = " ".join(f"'{REQUIREMENTS[name]}'" for name in sorted(lacking))
        return f"{where}no module {missing!r}. install what it needs: pip install {listed}; or `{INSTALL}`"
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "torchvision"))
    return (
        f"{where}{type(error).__name__}: {str(error).strip()[:500]}. this Python has {versions}; where Detectron2 or "
        "torchvision was built for another torch, such names are missing. install a torchvision that belongs to this "
        f"torch, build Detectron2 anew, or let detkit import a checkout unbuilt with {VARIABLE}=PATH"
    )


def _nowhere() -> str:
    return f"there is no Detectron2 in {sys.executable}. {HOW}"


def _version(module: str) -> str:
    try:
        return str(importlib.import_module(module).__version__)
    except Exception as error:
        return f"that cannot be imported ({error})"


def read_checkout(path: Path) -> Distribution:
    """Return the package of a checkout as a distribution, with the zoo's configuration files in it.

    Compiled modules that a build left in the checkout are left out: they fit one torch only, and none is needed.
    Raises `UsageError` for a folder that is no checkout.
    """
    root = path.expanduser().absolute()
    package = root / "detectron2"
    if not (package / "__init__.py").is_file() or not (root / "configs" / "COCO-Detection").is_dir():
        raise UsageError(
            f"--source names {path}, which is no checkout of Detectron2; expected the folder that has its README.md, "
            "with detectron2/__init__.py and configs/COCO-Detection in it"
        )
    said = re.search(r'^__version__ = "([\w.]+)"', (package / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    own = _walk(package, root.resolve())
    files = {f"detectron2/{name}": file for name, file in own if not name.startswith("model_zoo/configs/")}
    files |= {f"detectron2/model_zoo/configs/{name}": file for name, file in _walk(root / "configs", root.resolve())}
    version = said[1] if said else "0"
    metadata = f"Metadata-Version: 2.1\nName: detectron2\nVersion: {version}\nLicense: Apache-2.0\n".encode()
    licence = {"licenses/LICENSE": (root / "LICENSE").read_bytes()} if (root / "LICENSE").is_file() else {}
    return Distribution(name="detectron2", version=version, files=files, metadata={"METADATA": metadata, **licence})


def _walk(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the regular files of a folder by their paths in it; links are not followed out of the checkout's root."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _NOT_BROUGHT)
        for name in sorted(names):
            file = Path(parent, name)
            lies_within = file.resolve().is_relative_to(root)
            if lies_within and file.suffix not in {".pyc", ".so", ".pyd"} and file.is_file():
                yield file.relative_to(folder).as_posix(), file
