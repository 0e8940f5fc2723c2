"""The proof that a trial was trained with the values that were chosen for it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from detkit.errors import PluginError
from detkit.params import Params, coerce
from detkit.spaces import Scalar, typing_hints

if TYPE_CHECKING:
    from detkit.runs import Run


def prove(run: Run, values: Mapping[str, Scalar], params: Params, number: int) -> None:
    """Raise `PluginError` unless a run's manifest says that it was trained with the values chosen for it.

    Where the manifest's native configuration has that name, as the framework was told it, that one, too; engines have
    it for what `detkit.backends.Backend.space` suggests. A run that was ended early has no manifest: of it the job is
    looked at that its worker read.
    """
    finished = run.status == "finished"
    trained = run.model.manifest.params if finished else run.job.params
    native = run.model.manifest.native if finished else {}
    hints = typing_hints(type(params))
    for name, value in values.items():
        wanted = msgspec.to_builtins(coerce(name, value, hints[name]))
        told = {"the run": trained.get(name)}
        if name in native and wanted not in (None, "auto"):
            told["the framework"] = native[name]
        for who, found in told.items():
            if not _same(found, wanted):
                raise PluginError(
                    f"trial {number} was to be trained with {name}={wanted}, and {who} had {found} (see "
                    f"{run.path}); its result says nothing about that value, so the search ends. it is a fault of "
                    f"backend {run.job.backend!r}"
                )


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, list | tuple) and isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    if isinstance(found, int | float) and isinstance(wanted, int | float):
        return math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(found, str) and isinstance(wanted, str):
        return found.casefold() == wanted.casefold()
    if isinstance(found, str) and isinstance(wanted, int | float):  # as places send it that take texts
        with contextlib.suppress(ValueError):
            return _same(float(found), wanted)
    return bool(found == wanted)
