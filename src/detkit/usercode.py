"""The user's own modules: copied into a run, imported by its worker, and by whoever opens the model.

A process imports from one folder of them at most, and from it only what was read for the digest. Whether it may is
decided in `detkit.trust`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from detkit.errors import DetkitError, InvalidValue, UnknownName, UsageError, UserCodeFailed
from detkit.files import atomic_write, file_sha256
from detkit.job import Code

MOST_BYTES = 50_000_000
"""Code is modules and small files beside them; what is larger is data that was not meant."""
_MOST_FILES = 10_000
DOTTED_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_NOT_CODE = ("pyvenv.cfg", "run.json")
"""Files that tell a folder to be a virtual environment, or a run."""
_WHERE_FROM = {
    "cv2": "OpenCV is installed with `pip install opencv-python-headless`",
    "pkg_resources": "setuptools 82 and later do not have it: `pip install 'setuptools<82'`",
}
"""Modules that others import without asking for them, whose names say nothing of what brings them."""


@dataclass(frozen=True)
class UserCode:
    """The files of a folder of modules, or a single module; `read` makes one."""

    source: Path
    files: Mapping[str, Path]
    """Where each lies, by its path in the folder, with slashes; sorted."""
    digests: Mapping[str, str]
    """sha256 of each."""
    digest: str
    """sha256 over the paths and contents."""

    @classmethod
    def read(cls, source: str | Path) -> UserCode:
        """Look at a folder, or a ``.py`` file.

        Hidden files, ``__pycache__``, virtual environments and runs are left out. Raises `UsageError` where there is
        nothing, too much, or a symbolic link that leaves the folder.
        """
        given, source = str(source), Path(source).expanduser().absolute()
        if source.is_file() and source.suffix == ".py":
            files = {source.name: source}
        elif source.is_dir():
            files = dict(sorted(_walk(source, source.resolve(), "")))
        else:
            raise UsageError(f"code={given!r} is no folder and no .py file; expected that of your modules")
        if not any(name.endswith(".py") for name in files):
            raise UsageError(f"code={given!r} has no .py file; expected the folder of your modules")
        size = sum(file.stat().st_size for file in files.values())
        if size > MOST_BYTES or len(files) > _MOST_FILES:
            raise UsageError(
                f"code={given!r} has {len(files)} files of {size / 1e6:.1f} MB; at most {_MOST_FILES} of "
                f"{MOST_BYTES / 1e6:.0f} MB are copied into a run; name a folder with modules alone"
            )
        digests = {name: file_sha256(file) for name, file in files.items()}
        lines = "".join(f"{name}\0{digest}\n" for name, digest in digests.items())
        return cls(source, files, digests, hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest())

    @classmethod
    def of(cls, code: Code, source: str | Path) -> UserCode:
        """Look at a folder that should hold the code of a training. Raises `UsageError` where it does not."""
        found = cls.read(source)
        if found.digest != code.digest:
            raise UsageError(
                f"the code in {source} is not that of the training: its sha256 is {found.digest[:12]}..., expected "
                f"{code.digest[:12]}...; put back what it was, or name another folder with code= (--code)"
            )
        return found

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """The file of each module by its dotted name; empty for a folder of modules without ``__init__.py``."""
        found: dict[str, str] = {}
        for file in self.files:
            *folders, last = file.removesuffix(".py").split("/")
            parts = folders if last == "__init__" else [*folders, last]
            if file.endswith(".py") and parts:
                found |= {name: "" for i in range(1, len(parts)) if (name := ".".join(parts[:i])) not in found}
                name = ".".join(parts)
                found[name] = file if last == "__init__" else found.get(name) or file  # as Python prefers packages
        return found

    @property
    def tops(self) -> set[str]:
        """The names that a program can import, without what is in them."""
        return {name for name in self.modules if "." not in name}

    def content(self, name: str) -> bytes:
        """Return what is in a file. Raises `UsageError` where that is no longer what was read for the digest."""
        content = self.files[name].read_bytes()
        if hashlib.sha256(content).hexdigest() != self.digests[name]:
            raise UsageError(f"{self.files[name]} was changed after detkit had looked at it; start again")
        return content

    def copy_to(self, folder: Path) -> None:
        """Copy the files: links would change with what they are linked to. Raises `StorageError`, `UsageError`."""
        for name in self.files:
            with atomic_write(folder / name) as copy:
                copy.write(self.content(name))


def _walk(folder: Path, root: Path, below: str) -> Iterator[tuple[str, Path]]:
    """Yield the regular files of a folder, with their paths from ``root`` on; follow links that stay inside."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    if below and any(entry.name in _NOT_CODE for entry in entries):
        return
    for entry in entries:
        if entry.name[0] == "." or entry.name == "__pycache__":
            continue
        path = Path(entry.path)
        if entry.is_symlink():
            target = path.resolve()
            if not target.exists() or not target.is_relative_to(root) or path.is_relative_to(target):
                raise UsageError(
                    f"{path} is a symbolic link to {target}, which is not in the code's folder; expected files in "
                    "the folder. put a copy in its place, or name a folder without it"
                )
        if entry.is_dir():
            yield from _walk(path, root, f"{below}{entry.name}/")
        elif entry.is_file():
            yield f"{below}{entry.name}", path


def origin_of(name: str) -> str:
    """Return the file of a module outside of the loaded code; empty where there is none, or only a folder."""
    finders = [finder for finder in sys.meta_path if not isinstance(finder, _Finder) and hasattr(finder, "find_spec")]
    spec = next((spec for finder in finders if (spec := finder.find_spec(name, None)) is not None), None)
    return spec.origin or "" if spec is not None else ""


def fits_here(code: UserCode) -> bool:
    """Return whether this process can import the code: it has no other, and no modules of the same names."""
    return code.digest == _finder.code.digest if _finder.code is not None else not code.tops & sys.modules.keys()


def load(code: Code | None, source: str | Path | None, *, model: Path | None = None) -> None:
    """Make the modules in ``source`` importable, for the rest of this process, and import those that are to be.

    ``model`` is the folder of the model that is opened, if one is. Raises `UsageError` where the modules are not the
    code that is meant, or this process has others, `UserCodeFailed` where one cannot be imported.
    """
    if model is not None:
        _opened.add(model.resolve())
    if code is None:
        return
    if code.digest:
        if source is None:
            raise UsageError(f"the code with sha256 {code.digest[:12]}... is needed, and no folder was named")
        found = UserCode.of(code, source)
        if not fits_here(found):
            same = sorted(found.tops & sys.modules.keys())
            raise UsageError(f"{found.source} needs a process of its own: this one has other modules {', '.join(same)}")
        if _finder.code is None:
            _finder.code = found
            sys.meta_path.insert(0, _finder)
    for name in code.imports:
        import_module(name)


def import_module(name: str) -> ModuleType:
    """Import a module of the code that was loaded, or an installed one.

    Raises `UserCodeFailed`, which says where it failed, and `UsageError` where it could have come with a model.
    """
    try:
        _refuse_brought(name)
        return importlib.import_module(name)
    except DetkitError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserCodeFailed(
                f"there is no module {name!r} in the run's code, nor in {sys.executable}; give the folder that it lies "
                "in to code="
            ) from None
        raise failure(f"importing {name}", error) from error


def _refuse_brought(name: str) -> None:
    """Raise `UsageError` for a module that lies where models are put, not where modules are installed.

    These are the current folder, where Python looks in ``python -c`` and notebooks, and those above an opened model.
    """
    if _finder.code is not None and name.partition(".")[0] in _finder.code.tops:
        return
    parts = name.split(".")
    for i in range(len(parts)):
        module = ".".join(parts[: i + 1])
        if module in sys.modules:
            continue
        spec = importlib.util.find_spec(module)  # its parents are imported for that; they were looked at before
        if spec is None or not spec.has_location or spec.origin is None:
            continue
        above = i + (spec.submodule_search_locations is not None)
        folder = [*Path(spec.origin).absolute().parents, Path("/")][above].resolve()
        if folder == Path.cwd() or any(model.is_relative_to(folder) for model in _opened):
            raise UsageError(
                f"module {name!r} would be imported from {folder}, the current folder or one that the model is in. it "
                "may have come with the model, so it is not run. if it is yours, give its folder to code= when you "
                "train, install it, or import it yourself before the model is opened"
            )


def find_function(reference: str, setting: str) -> Callable[..., Any]:
    """Return the function that ``"module:function"`` names. Raises `UserCodeFailed`, `InvalidValue`, `UnknownName`."""
    module, colon, name = reference.partition(":")
    if not (colon and DOTTED_NAME.fullmatch(module) and name.isidentifier()):
        raise InvalidValue(setting, reference, "module:function, for example my_heads:light_head")
    found = import_module(module)
    function = getattr(found, name, None)
    if not callable(function):
        known = [key for key, value in vars(found).items() if callable(value) and key[0] != "_"]
        raise UnknownName(f"function ({setting}={reference}) in {getattr(found, '__file__', module)}", name, known)
    result: Callable[..., Any] = function
    return result


def failure(doing: str, error: BaseException) -> UserCodeFailed:
    """Return the error that says in which file and line of the user's code another one arose."""
    if isinstance(error, SyntaxError) and error.filename:
        frames = [(error.filename, error.lineno)]
    else:
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = {str(file): name for name, file in _finder.code.files.items()} if _finder.code is not None else {}
    inside = [(own[file], line) for file, line in frames if file in own]
    outside = [(file, line) for file, line in frames if not file.startswith("<") and file != __file__]
    file, line = (inside or outside or [("", None)])[-1]
    place = f" at {file}, line {line}" if file else ""
    lacking = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    advice = f"; {_WHERE_FROM[lacking]}" if lacking in _WHERE_FROM else ""
    return UserCodeFailed(f"{doing} failed{place}: {type(error).__name__}: {error}{advice}")


class _Finder(MetaPathFinder):
    """Finds the modules of the one code that this process imports from, and nothing else that lies beside them."""

    code: UserCode | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        code = self.code
        if code is None or fullname.partition(".")[0] not in code.tops:
            return None
        if fullname not in code.modules:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)  # others would look beside them
        file, folder = code.modules[fullname], str(code.source / fullname.replace(".", "/"))
        if not file:
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [folder]
            return spec
        inside = [folder] if file.endswith("__init__.py") else None
        loader = _FromSource(fullname, code, file)
        return importlib.util.spec_from_file_location(fullname, loader=loader, submodule_search_locations=inside)


class _FromSource(SourceFileLoader):
    """Compiles what was looked at: bytecode that lies beside it may be of something else."""

    def __init__(self, fullname: str, code: UserCode, file: str) -> None:
        super().__init__(fullname, str(code.files[file]))
        self._code, self._file = code, file

    def path_stats(self, path: str) -> NoReturn:
        raise OSError("no bytecode")

    def get_data(self, path: str) -> bytes:
        return self._code.content(self._file) if path == self.path else super().get_data(path)


_finder = _Finder()
_opened: set[Path] = set()
"""The folders of models that were opened in this process."""
