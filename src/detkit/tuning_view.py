"""What one sees while a search goes on: a table that fills in a terminal, a line a trial elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from detkit.studies import Study, Trial, remark, short

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

_SHOWN = 15


class View:
    """A `detkit.trials.Watcher` that prints to standard error."""

    def __init__(self, study: Study, *, quiet: bool = False) -> None:
        self._study, self._quiet = study, quiet
        self._told: dict[int, str] = {}
        self._live: Live | None = None

    def __enter__(self) -> View:
        from rich.console import Console

        self._console: Console = Console(stderr=True, quiet=self._quiet)
        if self._console.is_terminal and not self._quiet:
            from rich.live import Live

            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def said(self, message: str) -> None:
        """Print a line."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def changed(self, study: Study, progress: Mapping[int, str]) -> None:
        """Show the table again, or print what is new."""
        if self._quiet:
            return
        trials = study.trials
        if self._live is not None:
            self._live.update(_table(study, trials, progress))
            return
        ranked = study.ranking()
        for trial in trials:
            if self._told.get(trial.number) == trial.state or trial.state == "waiting":
                continue
            self._told[trial.number] = trial.state
            self.said(_line(study, trial, best=bool(ranked) and ranked[0].number == trial.number))


def _line(study: Study, trial: Trial, *, best: bool) -> str:
    values = "  ".join(f"{name}={short(value)}" for name, value in trial.values.items()) or "the model's defaults"
    if trial.state == "running":
        return f"trial {trial.number} begins: {values}"
    value = "" if trial.value is None else f"  {study.search.metric} {trial.value:.4g}"
    time = "" if trial.seconds is None else f"  {trial.seconds:.0f} s"
    note = f"  ({note})" if (note := remark(trial)) else ""
    return f"trial {trial.number} {trial.state}{value}{time}  {values}{'  (best so far)' if best else ''}{note}"


def _table(study: Study, trials: list[Trial], progress: Mapping[int, str]) -> Table:
    from rich.table import Table

    head, rows = study.rows()
    done = sum(trial.state not in {"waiting", "running"} for trial in trials)
    table = Table(title=f"{study.name}: {done} of {study.search.trials} trials", title_justify="left", box=None)
    for name in head:
        table.add_column(name, justify="left" if name in {"state", ""} else "right")
    shown = [(trial, row) for trial, row in zip(trials, rows, strict=True) if trial.state != "waiting"]
    for trial, row in shown[-_SHOWN:]:
        state = progress.get(trial.number, trial.state) if trial.state == "running" else trial.state
        table.add_row(row[0], state, *row[2:], style="bold green" if row[0].startswith("*") else None)
    return table
