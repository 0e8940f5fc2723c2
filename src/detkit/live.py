"""What one sees while a run goes on: a live line in a terminal, plain lines elsewhere. Trackers get every event."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from detkit import plugins
from detkit.job import Event
from detkit.runs import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_PLAIN_EVERY_S = 10.0


def follow(run: Run, *, quiet: bool = False, since: int = 0) -> Run:
    """Show a run until it has ended, then return it. Raises `detkit.errors.RunFailed` when it failed.

    ``since`` is where to begin, as `Run.position` gave it: what a resumed run did before is not shown again.
    """
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    view = _live(console) if console.is_terminal and not quiet else nullcontext()
    with view as bar:
        last_line_t = 0.0
        latest: dict[str, float] = {}
        for event in run.events(since=since):
            plugins.notify(event, run)
            numbers = {name: value for name, value in event.values.items() if isinstance(value, float | int)}
            latest.update(numbers)
            if event.kind == "log":
                console.print(str(event.values.get("message", "")), highlight=False, markup=False, soft_wrap=True)
            elif event.kind == "metric" and any(name.startswith(("val/", "test/")) for name in numbers):
                console.print(_score_line(event, latest), highlight=False, markup=False, soft_wrap=True)
            elif event.kind == "progress" and bar is not None:
                _update(bar, event, latest)
            elif event.kind == "progress" and event.t - last_line_t >= _PLAIN_EVERY_S:
                last_line_t = event.t
                console.print(_progress_line(event, latest), highlight=False, markup=False, soft_wrap=True)
    return run.wait()


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


def _update(bar: tuple[Progress, TaskID], event: Event, latest: dict[str, float]) -> None:
    progress, task = bar
    progress.update(
        task, completed=event.step or 0, total=float(event.values.get("total_steps", 1)), numbers=_numbers(latest)
    )


def _numbers(latest: dict[str, float]) -> str:
    parts = [
        f"{label} {latest[name]:{form}}{unit}"
        for name, label, form, unit in (
            ("train/loss", "loss", ".3f", ""),
            ("val/AP", "AP", ".3f", ""),
            ("images_per_s", "", ".1f", " images/s"),
        )
        if name in latest
    ]
    return "  ".join(part.strip() for part in parts)


def _progress_line(event: Event, latest: dict[str, float]) -> str:
    eta = f"  ETA {_duration(latest['eta_s'])}" if "eta_s" in latest else ""
    return f"step {event.step}/{latest.get('total_steps', 0):.0f}  {_numbers(latest)}{eta}"


def _score_line(event: Event, latest: dict[str, float]) -> str:
    names = [name for name in event.values if not name.startswith("train/")]
    where = f"epoch {event.epoch:.4g}" if event.epoch is not None else f"step {event.step}"
    loss = f"  loss {latest['train/loss']:.3f}" if "train/loss" in latest else ""
    return f"{where}{loss}  " + "  ".join(f"{name} {latest[name]:.3f}" for name in names)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
