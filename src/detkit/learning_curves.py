"""Learning curves: losses, validation scores and learning rate of one or more runs, in one picture.

matplotlib draws them; it comes with ``detkit-sdk[plot]`` and is imported when a picture is made.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from detkit.catalog import open_run
from detkit.errors import UnknownName, Unsupported, UsageError
from detkit.files import atomic_write
from detkit.loop import HEADLINES
from detkit.pages import text
from detkit.runs import Run
from detkit.tables import html_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Position: TypeAlias = Literal["epoch", "step"]
RunLike: TypeAlias = Run | str | Path
Points: TypeAlias = tuple[list[float], list[float]]
"""Places and values, both in the order of training."""

ENDINGS = (".html", ".svg", ".png", ".pdf")

# Those of the comparison page: told apart with the common kinds of colour blindness, and dark enough on white.
COLOURS = ("#0072b2", "#c2410c", "#117733", "#aa3f8f", "#8a6d00", "#2a9d96", "#882255", "#4b3fae")
INK, SOFT, LINE = "#17202b", "#48566a", "#dde3ea"
STYLE: Any = {
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.dpi": 150,
    "font.size": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "detkit",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
UNDATED: Any = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Metadata of pictures that are the same whenever they are drawn."""

_SMOOTH_FROM, _SMOOTH_SHARE = 50, 1 / 30
"""Points from which on a loss is also drawn smoothly, and the share of them that each mean is taken over."""
_LOG_FROM = 8.0
"""Ratio of the highest to the lowest value from which on losses are drawn on a logarithmic scale."""
_MARKED_UP_TO = 40
"""Validations that are drawn as points on their line."""

_PAGE_STYLE = """
body { margin: 0 auto; padding: 2rem 1.5rem 3rem; max-width: 1280px; font: 15px/1.5 system-ui, sans-serif; }
body { color: #17202b; background: #fff; } h1 { font-size: 1.5rem; margin: 0 0 1.25rem; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; } table { border-collapse: collapse; margin-top: 1.5rem; font-size: .9rem; }
th, td { text-align: left; padding: .35rem 1.25rem .35rem 0; border-bottom: 1px solid #dde3ea; } th { color: #48566a; }
"""


@dataclass(frozen=True)
class RunCurves:
    """What one run has logged so far."""

    name: str
    path: Path
    model: str
    status: str
    series: Mapping[str, Points]
    """By the name of the metric, such as ``train/loss``."""
    judge: str
    """The metric that says which weights are kept, such as ``val/AP``."""
    best: tuple[float, float] | None
    """Place and value of the best validation by that; None before there is one."""


class LearningCurves:
    """The curves of some runs. Shows itself in a notebook; `save` writes a page or a picture."""

    def __init__(self, runs: Sequence[RunCurves], position: Position) -> None:
        self.runs, self.position = tuple(runs), position

    @property
    def panels(self) -> dict[str, list[str]]:
        """The metrics of each panel: training and validation of one quantity stand together."""
        names = dict.fromkeys(name for run in self.runs for name in run.series)
        first = ("loss", *HEADLINES, "learning_rate")
        quantities = dict.fromkeys(map(_quantity, names))
        ordered = [*(name for name in first if name in quantities), *(q for q in quantities if q not in first)]
        return {quantity: [name for name in names if _quantity(name) == quantity] for quantity in ordered}

    def to_dict(self) -> dict[str, Any]:
        """Return what is drawn, as JSON can carry it."""
        return {
            "position": self.position,
            "runs": [
                {
                    "name": run.name,
                    "path": str(run.path),
                    "status": run.status,
                    "best": None if run.best is None else {self.position: run.best[0], run.judge: run.best[1]},
                    "series": list(run.series),
                }
                for run in self.runs
            ],
        }

    def save(self, path: str | Path) -> Path:
        """Write a page (``.html``) or a picture (``.svg``, ``.png``, ``.pdf``). Raises `UsageError`, `StorageError`."""
        target = Path(path)
        refuse_ending(target)
        ending = target.suffix.lower()
        content = self._page().encode() if ending == ".html" else self._picture(ending[1:])
        with atomic_write(target) as file:
            file.write(content)
        return target

    def figure(self) -> Figure:
        """Draw. Raises `Unsupported` where matplotlib is missing."""
        mpl = import_matplotlib()
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        panels = self.panels
        columns = min(3 if len(panels) != 4 else 2, len(panels))
        rows = math.ceil(len(panels) / columns)
        with mpl.rc_context(STYLE):
            height = 2.7 * rows + 0.25 * math.ceil((len(self.runs) + 2) / 2) + 0.2
            spaced = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09)
            figure = Figure(figsize=(max(4.1 * columns, 6.2), height), layout=spaced)
            axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
            for axis, (quantity, names) in zip(axes, panels.items(), strict=False):
                self._draw(axis, quantity, names)
            for axis in axes[len(panels) :]:
                axis.set_visible(False)
            self._draw_legend(figure)
        return figure

    def _repr_html_(self) -> str:
        return self._inline()

    def _draw(self, axis: Axes, quantity: str, names: Sequence[str]) -> None:
        from matplotlib.ticker import MaxNLocator

        title = quantity.replace("_", " ")
        axis.set_title(title[:1].upper() + title[1:], color=INK)
        axis.grid(axis="y", color=LINE, linewidth=0.8)
        axis.set_axisbelow(True)
        for run, colour in zip(self.runs, self._colours(), strict=True):
            for name in names:
                _draw_series(axis, name, *run.series.get(name, ([], [])), colour)
                if run.best is not None and name.startswith("val/"):
                    at = dict(zip(*run.series.get(name, ([], [])), strict=True)).get(run.best[0], math.nan)
                    axis.plot(run.best[0], at, "o", color=colour, markersize=8, markeredgecolor="white", zorder=5)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.tick_params(labelbottom=True)
        axis.set_xlabel(self.position)
        values = [value for run in self.runs for name in names for value in run.series.get(name, ([], []))[1]]
        if quantity in HEADLINES:
            axis.set_ylim(bottom=0)
        elif quantity != "learning_rate" and 0 < min(values) * _LOG_FROM < max(values):
            _use_log_scale(axis, max(values) / min(values))

    def _draw_legend(self, figure: Figure) -> None:
        from matplotlib.lines import Line2D

        labels = [self._label(run) for run in self.runs]
        lines = [Line2D([], [], color=colour, linewidth=2.5) for colour in self._colours()]
        names = [name for run in self.runs for name in run.series]
        if any(name.startswith("val/") and f"train/{_quantity(name)}" in names for name in names):
            labels += ["training", "validation"]
            lines += [Line2D([], [], color=SOFT), Line2D([], [], color=SOFT, linestyle=(0, (4, 2)))]
        wide = max(map(len, labels)) > 48
        legend = figure.legend(
            lines, [""] * len(lines), loc="outside upper left", ncols=1 if wide else 2, frameon=False, fontsize=10
        )
        for shown, label in zip(legend.get_texts(), labels, strict=True):
            shown.set_text(label)  # a label that begins with "_" would be left out of a legend

    def _label(self, run: RunCurves) -> str:
        going_on = "" if run.status == "finished" else f" ({run.status})"
        if run.best is None:
            return run.name + going_on
        place, value = run.best
        return f"{run.name}{going_on}: best {run.judge.removeprefix('val/')} {value:.3f} at {self.position} {place:.4g}"

    def _colours(self) -> list[Any]:
        if len(self.runs) <= len(COLOURS):
            return list(COLOURS[: len(self.runs)])
        from matplotlib import colormaps

        return list(colormaps["viridis"](np.linspace(0, 0.92, len(self.runs))))

    def _picture(self, kind: str) -> bytes:
        figure = self.figure()
        stream = io.BytesIO()
        with import_matplotlib().rc_context(STYLE):
            figure.savefig(stream, format=kind, facecolor="white", metadata=UNDATED.get(kind))
        return stream.getvalue()

    def _inline(self) -> str:
        drawn = self._picture("svg").decode()
        return drawn[drawn.index("<svg") :]

    def _page(self) -> str:
        table = html_table(("run", "model", "status", *self._last_names()), self._rows())
        return page(" vs ".join(run.name for run in self.runs), f"{self._inline()}\n{table}")

    def _last_names(self) -> list[str]:
        return [name for names in self.panels.values() for name in names if name != "train/learning_rate"]

    def _rows(self) -> Iterator[tuple[str | None, ...]]:
        """Yield the latest numbers of each run, those of the best validation where it is one."""
        for run in self.runs:
            numbers = []
            for name in self._last_names():
                places, values = run.series.get(name, ([], []))
                at = dict(zip(places, values, strict=True))
                best = at.get(run.best[0]) if run.best is not None and name.startswith("val/") else None
                value = best if best is not None else values[-1] if values else None
                numbers.append(None if value is None else f"{value:.3f}")
            yield run.name, run.model, run.status, *numbers


def plot(
    runs: RunLike | Sequence[RunLike],
    to: str | Path | None = None,
    *,
    metrics: Sequence[str] | None = None,
    position: Position = "epoch",
) -> LearningCurves:
    """Return the learning curves of a run, or of several in one picture; with ``to`` also write them there.

    A run may be going on; it is drawn as far as it is. ``metrics`` are names as logged (``val/AP``), or without what
    stands before the slash (``AP``, ``loss``); all are drawn if None. Raises `UnknownName`, `UsageError` where nothing
    was logged yet, and `Unsupported` where matplotlib is missing.
    """
    several = [runs] if isinstance(runs, Run | str | Path) else list(runs)
    if not several:
        raise UsageError("no run to plot; name one, such as detkit.plot('last')")
    if to is not None:
        refuse_ending(Path(to))
    opened = [run if isinstance(run, Run) else open_run(run) for run in several]
    names = [run.name for run in opened]
    clear = names if len(set(names)) == len(names) else [str(run.path) for run in opened]
    found = [_read(run, name, position) for run, name in zip(opened, clear, strict=True)]
    if not any(run.series for run in found):
        raise UsageError(
            f"{', '.join(clear)}: no numbers are logged over {position}s yet; look at `detkit runs show {clear[0]}`"
        )
    curves = LearningCurves(_only(found, metrics) if metrics else found, position)
    if to is not None:
        curves.save(to)
    return curves


def import_matplotlib() -> Any:
    """Import matplotlib. Raises `Unsupported` with what to install."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise Unsupported(
            f"curves are drawn by matplotlib, which is not here ({error}); install it with: "
            "pip install 'detkit-sdk[plot]'"
        ) from None
    return mpl


def page(title: str, body: str) -> str:
    """Return a page in one file: ``title`` is untrusted text, ``body`` HTML."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_PAGE_STYLE}</style>\n</head>\n<body>\n<h1>{text(title)}</h1>\n"
        f"{body}\n</body>\n</html>\n"
    )


def refuse_ending(path: Path) -> None:
    """Raise `UsageError` for a file of a kind that is not drawn."""
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"{path}: curves are written to a file that ends in {', '.join(ENDINGS)}")


def _read(run: Run, name: str, position: Position) -> RunCurves:
    series: dict[str, Points] = {}
    for row in run.history:
        if position not in row:
            continue
        for metric, value in row.items():
            if metric.startswith(("train/", "val/")):
                places, values = series.setdefault(metric, ([], []))
                places.append(row[position])
                values.append(value)
    job = run.job
    judge = f"val/{job.params.get('best_metric', 'AP')}"
    best = max(zip(*series.get(judge, ([], [])), strict=True), key=lambda point: point[1], default=None)
    return RunCurves(name, run.path, f"{job.backend}/{job.model}", run.status, series, judge, best)


def _only(runs: Sequence[RunCurves], metrics: Sequence[str]) -> list[RunCurves]:
    known = dict.fromkeys(name for run in runs for name in run.series)
    for metric in metrics:
        if metric not in known and metric not in map(_quantity, known):
            raise UnknownName("metric", metric, [*known, *dict.fromkeys(map(_quantity, known))])
    kept = {metric for metric in known if metric in metrics or _quantity(metric) in metrics}
    return [replace(run, series={name: run.series[name] for name in run.series if name in kept}) for run in runs]


def _quantity(name: str) -> str:
    """Return what a metric measures, the same for training and validation.

    >>> _quantity("train/classification"), _quantity("val/loss_classification"), _quantity("val/loss")
    ('classification', 'classification', 'loss')
    """
    return name.partition("/")[2].removeprefix("loss_")


def _draw_series(axis: Axes, name: str, places: list[float], values: list[float], colour: Any) -> None:
    if name.startswith("val/"):
        is_score = _quantity(name) in HEADLINES
        style: Any = "-" if is_score else (0, (4, 2))
        size = 3.0 if (is_score and len(values) <= _MARKED_UP_TO) or len(values) == 1 else 0.0
        axis.plot(places, values, color=colour, linewidth=1.6, linestyle=style, marker="o", markersize=size)
    elif len(values) < _SMOOTH_FROM or name == "train/learning_rate":
        axis.plot(places, values, color=colour, linewidth=1.6, marker="o" if len(values) == 1 else "", markersize=5)
    else:
        axis.plot(places, values, color=colour, linewidth=0.7, alpha=0.3)
        axis.plot(places, _running_mean(values), color=colour, linewidth=1.8)


def _use_log_scale(axis: Axes, ratio: float) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 100 else (1,)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _running_mean(values: list[float]) -> Any:
    """Return the mean around each value; at the ends, over those that there are."""
    window = np.ones(2 * math.ceil(len(values) * _SMOOTH_SHARE / 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
