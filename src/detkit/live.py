"""What one sees while a run goes on: a live line in a terminal, plain lines elsewhere. Trackers get every event."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING

from detkit import plugins
from detkit.events import Event
from detkit.runs import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_PLAIN_EVERY_S = 10.0


def follow(run: Run, *, quiet: bool = False, since: int = 0, stop_on_interrupt: bool = False) -> Run:
    """Show a run until it has ended, then return it. Raises `detkit.errors.RunFailed` when it failed.

    ``since`` is where to begin, as `Run.position` gave it: what a resumed run did before is not shown again. Ctrl-C
    ends the watching, with ``stop_on_interrupt`` also the run, unless that is to be left (`Run.on_interrupt`); it is
    raised again once the run has ended.
    """
    seen, state = 0, ""

    def tell(event: Event) -> None:
        nonlocal seen, state
        seen += 1
        if event.kind == "state":
            state = str(event.values["state"])
        plugins.notify(event, run)

    def told() -> Iterator[Event]:
        for event in run.events(since=since):
            tell(event)
            yield event

    try:
        _show(run, told(), quiet=quiet, resumed=since > 0)
    except KeyboardInterrupt:
        if stop_on_interrupt and run.on_interrupt == "stop":
            if not quiet:
                print("stopping after this step; the last checkpoint stays", file=sys.stderr)
            run.stop()
            for event in islice(run.events(follow=False, since=since), seen, None):
                tell(event)
            _notify_of_untold_end(run, state)
        elif stop_on_interrupt and not quiet:
            place = os.path.relpath(run.path)
            print(
                f"{place} goes on; `detkit runs attach {place}` follows it, `detkit runs stop {place}` ends it",
                file=sys.stderr,
            )
        raise
    _notify_of_untold_end(run, state)
    return run.wait()


def _notify_of_untold_end(run: Run, state: str) -> None:
    """Tell trackers of an end that no worker wrote down: it failed, vanished, or was killed when the model was there.

    ``state`` is the last that they heard of.
    """
    if (status := run.status) != state and status != "running":
        plugins.notify(Event(t=time.time(), kind="state", values={"state": status}), run)


def _show(run: Run, events: Iterable[Event], *, quiet: bool, resumed: bool) -> None:
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    numbers = _Numbers(run, resumed=resumed)
    view = _live(console) if console.is_terminal and not quiet else nullcontext()
    with view as bar:
        last_line_t = 0.0
        for event in events:
            is_best = numbers.take(event)
            line = ""
            if event.kind == "log":
                line = str(event.values.get("message", ""))
            elif event.kind == "metric" and any(name.startswith(("val/", "test/")) for name in event.values):
                line = numbers.scores(event) + ("  (best so far)" if is_best else "")
            elif event.kind == "progress" and bar is not None:
                _update(bar, event, numbers)
            elif event.kind == "progress" and event.t - last_line_t >= _PLAIN_EVERY_S:
                last_line_t = event.t
                line = numbers.progress(event)
            if line or event.kind == "log":
                console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _live(console: Console) -> Iterator[tuple[Progress, TaskID]]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]train[/]"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress, progress.add_task("train", total=1, numbers="")


def _update(bar: tuple[Progress, TaskID], event: Event, numbers: _Numbers) -> None:
    progress, task = bar
    progress.update(
        task, completed=event.step or 0, total=float(event.values.get("total_steps", 1)), numbers=numbers.now()
    )


class _Numbers:
    """The latest value of everything, the best validation so far, and the lines made of them."""

    def __init__(self, run: Run, *, resumed: bool) -> None:
        self._judge = f"val/{run.job.params.get('best_metric', 'AP')}"
        earlier = [row[self._judge] for row in run.history if self._judge in row] if resumed else []
        self._best = max(earlier, default=-math.inf)
        self._latest: dict[str, float] = {}

    def take(self, event: Event) -> bool:
        """Take up an event; returns whether it is the best validation so far."""
        numbers = {name: value for name, value in event.values.items() if isinstance(value, float | int)}
        self._latest.update(numbers)
        is_best = numbers.get(self._judge, -math.inf) > self._best
        if is_best:
            self._best = numbers[self._judge]
        return is_best

    def now(self) -> str:
        behind = self._latest.get(self._judge, self._best) < self._best
        best = f" (best {self._best:.3f})" if behind else ""
        parts = [
            f"{label} {self._latest[name]:{form}}{unit}"
            for name, label, form, unit in (
                ("train/loss", "loss", ".3f", ""),
                ("val/loss", "val loss", ".3f", ""),
                (self._judge, self._judge.removeprefix("val/"), ".3f", best),
                ("train/learning_rate", "lr", ".2g", ""),
                ("images_per_s", "", ".1f", " images/s"),
            )
            if name in self._latest
        ]
        return "  ".join(part.strip() for part in parts)

    def progress(self, event: Event) -> str:
        eta = f"  ETA {_duration(self._latest['eta_s'])}" if "eta_s" in self._latest else ""
        return f"step {event.step}/{self._latest.get('total_steps', 0):.0f}  {self.now()}{eta}"

    def scores(self, event: Event) -> str:
        """Return the line of a validation or test; of the validation losses only their sum, the parts are many."""
        names = [name for name in event.values if not name.startswith(("train/", "val/loss_"))]
        where = f"epoch {event.epoch:.4g}" if event.epoch is not None else f"step {event.step}"
        loss = f"  loss {self._latest['train/loss']:.3f}" if "train/loss" in self._latest else ""
        return f"{where}{loss}  " + "  ".join(f"{name} {self._latest[name]:.3f}" for name in names)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
