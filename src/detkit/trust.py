"""Whose code runs: what a training is given as ``code=``, and what of it a model or a run may be opened with later.

Code that came with a model runs only where this user has given detkit the very same code, by its digest: with
``code=`` now, or when training was started from this account. An exported graph that is a program, as a TorchScript
file is, runs only where it was exported from this account, or is named. See decision 11 in the documentation.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detkit.errors import InvalidValue, StorageError, UnknownName, UsageError
from detkit.files import atomic_write, cache_folder, file_sha256, inside
from detkit.job import Code, Job, Model, Workspace
from detkit.usercode import DOTTED_NAME, UserCode, origin_of

PROGRAMS = frozenset({"torchscript"})
"""Formats of exported graphs whose files are code: TorchScript has operations that write files."""

_given: set[str] = set()
"""Digests of code that was given in this process."""


def prepare(code: Any, imports: Any) -> tuple[Code | None, UserCode | None]:
    """Check what a training is given as ``code`` and ``imports``; nothing is imported.

    Raises `UsageError` for names that are no modules of the code, and for modules that would hide installed ones. The
    worker tells of other names, as its interpreter may have other modules than this one.
    """
    code, imports = (None if value in ("", "none") else value for value in (code, imports))
    names = [name.strip() for name in imports.split(",")] if isinstance(imports, str) else imports or []
    if not isinstance(names, Sequence) or not all(
        isinstance(name, str) and DOTTED_NAME.fullmatch(name) for name in names
    ):
        raise InvalidValue("imports", imports, "names of modules, for example ['my_heads']")
    if code is None:
        return (Code(imports=list(names)) if names else None), None
    found = UserCode.read(code)
    _refuse_hiding(found)
    for name in names:
        if name.partition(".")[0] in found.tops and name not in found.modules:
            known = [module for module, file in found.modules.items() if file]
            raise UnknownName(f"module of imports= in {found.source}", name, known)
    return Code(digest=found.digest, imports=list(names)), found


def remember(digest: str) -> None:
    """Keep in mind that this user has given detkit this code: models trained with it may be opened with it."""
    _given.add(digest)
    file = _memory(digest)
    if file is not None:
        with contextlib.suppress(StorageError), atomic_write(file):  # what cannot be kept is asked for again
            pass


def allow(job: Job, source: str | Path) -> None:
    """Take a folder as this user's own that has the code of a run. Raises `UsageError` where it has not."""
    if job.code is None or not job.code.digest:
        raise UsageError(f"the run was started without code of its own; leave out code={str(source)!r}")
    remember(UserCode.of(job.code, source).digest)


def of_job(job: Job, workspace: Workspace) -> None:
    """Raise `UsageError` unless the code of a run is what it was started with, and this user's own."""
    if job.code is not None and job.code.digest:
        UserCode.of(job.code, workspace.code)
        if not _is_known(job.code.digest):
            raise UsageError(
                f"{workspace.path} holds code that was not given to detkit on this account, so it is not run. read "
                f"it, then allow it: `detkit train --resume {workspace.path} --code {workspace.code}`, in Python "
                f"Trainer().resume({str(workspace.path)!r}, code={str(workspace.code)!r})"
            )


def of_model(model: Model) -> UserCode | None:
    """Return the code that a model is opened with; None where it needs none.

    It is what `Model` was given as ``code``, else that of the model's run if this user trained it, or gave detkit the
    same code before. Raises `UsageError` where there is none, or another than the model was trained with.
    """
    code = model.manifest.code
    program = program_of(model)
    if program is not None:
        _require_program(model, program)
        return None
    if code is None or not code.digest:
        if model.code is not None:
            raise UsageError(f"{model.path} was trained without code of its own; leave out code={str(model.code)!r}")
        return None
    if model.code is not None:
        return UserCode.of(code, model.code)
    own = Workspace(model.path.absolute().parent).code
    if not own.is_dir():
        raise UsageError(
            f"{model.path} was trained with code of its own (sha256 {code.digest[:12]}...), which is not in the "
            "folder; say where it is: code='FOLDER', on the command line --code FOLDER"
        )
    found = UserCode.of(code, own)
    if not _is_known(code.digest):
        raise UsageError(
            f"{model.path} comes with code that was not given to detkit on this account, so it is not run. read it, "
            f"then allow it with code={str(own)!r}, on the command line --code {own}"
        )
    return found


def program_of(model: Model) -> Path | None:
    """Return the file of an exported graph that is a program; None where the model has none, or the file is missing."""
    graph = model.manifest.native.get("graph")
    if not isinstance(graph, dict) or graph.get("format") not in PROGRAMS:
        return None
    file = model.path / inside(str(graph.get("file")))
    return file if file.is_file() else None


def _require_program(model: Model, file: Path) -> None:
    """Raise `UsageError` unless the program of a model was exported from this account, or is named as its code."""
    if model.manifest.code is not None and model.manifest.code.digest:
        raise UsageError(f"{model.path} is an exported program that asks for other code, too; export it again")
    if model.code is not None:
        if not model.code.is_file() or not model.code.samefile(file):
            raise UsageError(f"the code of {model.path} is its program; expected code={str(file)!r}")
        return
    digest, exported = file_sha256(file), model.manifest.artifacts.get(file.name)
    if exported is not None and digest != exported.sha256:
        raise UsageError(f"{file} is not the file that was exported: its sha256 is another; export it again")
    if not _is_known(digest):
        raise UsageError(
            f"{file} is a program, which may write and delete files, and it was not exported from this account, so it "
            f"is not run. if you trust who made it, say so with code={str(file)!r}, on the command line --code {file}; "
            "an export to onnx runs no code"
        )


def _memory(digest: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "code" / digest


def _is_known(digest: str) -> bool:
    """Return whether this user has given this code to detkit. A note that somebody else left does not count."""
    file = _memory(digest)
    if digest in _given or file is None:
        return digest in _given
    try:
        return not hasattr(os, "getuid") or file.stat().st_uid == os.getuid()
    except OSError:
        return False


def _refuse_hiding(code: UserCode) -> None:
    """Raise `UsageError` for a module that would be imported instead of an installed one of the same name."""
    origins = {
        name: "the standard library" if name in sys.stdlib_module_names else origin_of(name) for name in code.tops
    }
    mine = code.source.resolve()
    hidden = [
        f"{name} ({origin})"
        for name, origin in sorted(origins.items())
        if origin and (name in sys.stdlib_module_names or not Path(origin).resolve().is_relative_to(mine))
    ]
    if hidden:
        raise UsageError(
            f"modules in {code.source} have the names of others that are installed: {', '.join(hidden)}. rename yours, "
            "or name a folder without them"
        )
