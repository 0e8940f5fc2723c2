"""The tracker for TensorBoard: every followed run writes its numbers to ``RUN/output/tensorboard``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from detkit.events import Event
    from detkit.runs import Run


@hookimpl
def detkit_on_event(event: Event, run: Run) -> None:
    """Write the event. TensorBoard comes with the first number, so that importing this module is cheap."""
    if event.kind in {"metric", "state"}:
        from detkit_tensorboard.writer import write

        write(event, run)
