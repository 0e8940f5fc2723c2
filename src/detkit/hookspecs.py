"""The four hooks of detkit. Implement any of them in a module and name it as an entry point of group ``detkit``.

::

    [project.entry-points.detkit]
    mine = "detkit_mine"

Importing that module must be cheap: heavy packages belong in the engine's module, which only the worker imports.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from detkit.backends import Backend
    from detkit.events import Event
    from detkit.formats import Format
    from detkit.metrics import Metric
    from detkit.runs import Run

hookspec = pluggy.HookspecMarker("detkit")
hookimpl = pluggy.HookimplMarker("detkit")
"""Decorator for a plugin's hook functions."""


@hookspec
def detkit_backends() -> Iterable[Backend]:  # type: ignore[empty-body]
    """Return backends: ways to train and to open models."""


@hookspec
def detkit_formats() -> Iterable[Format]:  # type: ignore[empty-body]
    """Return data set formats: how to recognise, read and write them."""


@hookspec
def detkit_metrics() -> Iterable[Metric]:  # type: ignore[empty-body]
    """Return metrics that every evaluation computes beside detkit's own."""


@hookspec
def detkit_on_event(event: Event, run: Run) -> None:
    """Receive each event of a followed run as it arrives. An exception is reported once and never ends the run.

    The last one says how the run ended: a ``state`` event with ``finished``, ``stopped``, ``failed`` or
    ``interrupted``. A run that is followed from its beginning once more sends its events once more.
    """
