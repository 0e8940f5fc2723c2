"""Finished models in other formats."""

from __future__ import annotations

from pathlib import Path

from detkit import plugins
from detkit.errors import Unsupported, UsageError, did_you_mean
from detkit.job import Model, Workspace
from detkit.predictor import find_model
from detkit.runs import Run


def export(
    model: Run | Model | str | Path, format: str, to: str | Path | None = None, *, code: str | Path | None = None
) -> Path:
    """Write a finished model in another format into the folder ``to`` and return the main file.

    ``model`` is a `Run`, a `Model`, the folder of either, or a run's name such as ``last``. Without ``to`` the folder
    is ``export/FORMAT`` in the run. Files of an earlier export are replaced, others stay. ``code`` is as for
    `detkit.predictor.Predictor`. Raises `detkit.errors.Unsupported` for a format that the model's backend does not
    write.
    """
    found = find_model(model, code)
    backend = plugins.backend(found.manifest.backend)
    if format not in backend.formats:
        known = f"it writes {', '.join(backend.formats)}" if backend.formats else "it exports nothing"
        hint = did_you_mean(format, backend.formats)
        raise Unsupported(f"backend {backend.name!r} does not write {format!r};{hint} {known}")
    folder = Path(to) if to is not None else _in_run(found) / "export" / format
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; an export goes into a folder")
    return backend.export(found, format, folder)


def _in_run(model: Model) -> Path:
    run = Workspace(model.path.absolute().parent)
    if model.path.absolute() != run.model or not run.job_file.is_file():
        raise UsageError(f"{model.path} belongs to no run; name the folder for its export with --to (to=)")
    return run.path
