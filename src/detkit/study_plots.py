"""What a study found, drawn by Optuna: history, importance of the parameters, parallel coordinates, courses of trials.

Optuna and matplotlib come with ``detkit-sdk[tune,plot]`` and are imported when something is drawn.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from detkit.comparison import compare
from detkit.errors import DetkitError, UsageError
from detkit.files import atomic_write
from detkit.learning_curves import COLOURS, INK, LINE, SOFT, STYLE, UNDATED, import_matplotlib, page, refuse_ending
from detkit.pages import text
from detkit.sheets import inline, png_sheet, svg_sheet
from detkit.studies import Study, Trial, open_study, short
from detkit.study_storage import import_optuna
from detkit.tables import html_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150

_LEAST_FOR_IMPORTANCE = 4
"""Finished trials; with fewer, the best tenth that the measure looks at is one of so few that it says nothing."""

_DARK = 0.85
"""Brightness, of 1, up to which lines are seen on white."""
_RUNNING_COLOUR = "#aa3f8f"
_FINISHED_COLOUR = "#9aa7b8"
_PRUNED_COLOUR = "#c2410c"


class StudyPlots:
    """Pictures of a study. Shows itself in a notebook; `save` writes a page or a picture."""

    def __init__(self, study: Study) -> None:
        self.study = study

    @cached_property
    def missing(self) -> dict[str, str]:
        """Which pictures there are not, by title, and why."""
        return {panel.title: why for panel in _PANELS if (why := panel.lacks(self.study, self._trials))}

    @property
    def drawn(self) -> tuple[str, ...]:
        """The titles of the others."""
        return tuple(panel.title for panel in _PANELS if panel.title not in self.missing)

    def to_dict(self) -> dict[str, Any]:
        """Return what is drawn, as JSON can carry it."""
        ranked = self.study.ranking()
        return {
            "study": str(self.study.path),
            "best": ranked[0].to_dict() if ranked else None,
            "drawn": list(self.drawn),
            "missing": self.missing,
        }

    def save(self, path: str | Path) -> Path:
        """Write a page (``.html``) or the pictures alone (``.svg``, ``.png``, ``.pdf``).

        The page also has the trials, and where some images were kept from all of them, the comparison on these. Raises
        `UsageError`, `Unsupported` where matplotlib is missing, and `StorageError`.
        """
        target = Path(path)
        refuse_ending(target)
        content = self._content(target.suffix.lower())
        with atomic_write(target) as file:
            file.write(content)
        return target

    def _content(self, ending: str) -> bytes:
        if ending == ".svg":
            return svg_sheet([picture for _, picture in self._pictures("svg")])
        if ending == ".png":
            return png_sheet([picture for _, picture in self._pictures("png")], _DPI)
        return self._pdf() if ending == ".pdf" else self._page()

    def _repr_html_(self) -> str:
        return "\n".join(self._figures())

    @cached_property
    def _trials(self) -> list[Trial]:
        return self.study.trials

    @contextmanager
    def _figure(self, panel: _Panel) -> Iterator[Figure]:
        """Let Optuna draw. It does so through pyplot, whose figure is closed and whose style is put back."""
        mpl = import_matplotlib()
        import_optuna()
        import optuna.visualization.matplotlib as drawing
        from matplotlib import pyplot

        with mpl.rc_context({**STYLE, "figure.figsize": (6.0, 3.8)}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that trials are few is said below the picture
            options = {} if panel.function == "plot_intermediate_values" else {"target_name": self.study.search.metric}
            axes: Axes = getattr(drawing, panel.function)(self.study.optuna_study, **options)
            figure: Any = axes.get_figure()
            try:
                _restyle(figure, axes, panel.title)
                panel.finish(axes, self.study)
                yield figure
            finally:
                pyplot.close(figure)

    def _picture(self, panel: _Panel, kind: str) -> bytes:
        stream = io.BytesIO()
        with self._figure(panel) as figure:
            figure.savefig(
                stream, format=kind, dpi=_DPI, facecolor="white", bbox_inches="tight", metadata=UNDATED.get(kind)
            )
        return stream.getvalue()

    def _pictures(self, kind: str) -> Iterator[tuple[_Panel, bytes]]:
        for panel in _PANELS:
            if panel.title not in self.missing:
                yield panel, self._picture(panel, kind)

    def _pdf(self) -> bytes:
        """Return a document with a page for each picture."""
        import_matplotlib()
        from matplotlib.backends.backend_pdf import PdfPages

        stream = io.BytesIO()
        with PdfPages(stream, metadata=UNDATED["pdf"]) as document:
            for panel in _PANELS:
                if panel.title not in self.missing:
                    with self._figure(panel) as figure:
                        document.savefig(figure, facecolor="white", bbox_inches="tight")
        return stream.getvalue()

    def _figures(self) -> Iterator[str]:
        for panel, picture in self._pictures("svg"):
            yield f"<figure>{inline(picture)}<figcaption>{text(panel.caption(self._trials))}</figcaption></figure>"
        for title, why in self.missing.items():
            yield f"<p><strong>{title}</strong> is not drawn: {text(why)}.</p>"

    def _page(self) -> bytes:
        parts = [
            f"<style>{_GRID}</style>",
            f"<p>{text(self._summary())}</p>",
            f'<div class="plots">{"".join(self._figures())}</div>',
            "<h2>On images that no trial saw</h2>",
            self._judged(),
            "<h2>Trials</h2>",
            html_table(*self.study.rows()),
        ]
        return page(self.study.name, "\n".join(parts)).encode()

    def _summary(self) -> str:
        search, trials, ranked = self.study.search, self._trials, self.study.ranking()
        counts = {state: sum(trial.state == state for trial in trials) for state in _SAID}
        said = [f"{count} {state}" for state, count in counts.items() if count]
        better = "more" if search.mode == "max" else "less"
        summary = (
            f"{self.study.record.backend}/{self.study.record.model}, judged by {search.metric} ({better} is better). "
            f"Trials: {', '.join(said)}; {search.trials} are wanted."
        )
        if not ranked:
            return summary
        values = ", ".join(f"{name} {short(value)}" for name, value in ranked[0].values.items())
        named = values or "the model's defaults"
        return f"{summary} The best is trial {ranked[0].number} with {ranked[0].value:.4g}: {named}."

    def _judged(self) -> str:
        """Return the comparison of the best trial with the next one and the defaults, or why there is none."""
        study = self.study
        command = f"detkit studies compare {study.path}"
        if study.workspace.dataset("test") is None:
            return "<p>Not compared: no images were kept from the trials.</p>"
        if not study.ranking():
            return "<p>Not compared: no trial has finished.</p>"
        if any(trial.state == "running" for trial in self._trials):
            return f"<p>Not compared yet, as trials are running. Afterwards: <code>{text(command)}</code></p>"
        try:
            comparison = compare(study.contenders())
        except DetkitError as error:
            return f"<p>Not compared: {text(error)}</p>"
        return (
            "<p>The pictures show values of validation images, by which the best was chosen, so that its own is too "
            f"good. These are not:</p>\n{comparison._repr_html_()}"
        )


def plot_study(study: Study | str | Path, to: str | Path | None = None) -> StudyPlots:
    """Return the pictures of a study; with ``to`` also write them there. It may be going on.

    Raises `UsageError` where nothing can be drawn yet, and `Unsupported` where matplotlib is missing.
    """
    if to is not None:
        refuse_ending(Path(to))
    found = study if isinstance(study, Study) else open_study(study)
    plots = StudyPlots(found)
    if not plots.drawn:
        raise UsageError(
            f"{found.path}: nothing can be drawn before a trial has been validated; look at `detkit studies show "
            f"{found.name}`"
        )
    if to is not None:
        plots.save(to)
    return plots


class _Panel(NamedTuple):
    """One picture."""

    title: str
    function: str
    """Of ``optuna.visualization.matplotlib``."""
    lacks: Callable[[Study, list[Trial]], str]
    """Says why it cannot be drawn; empty where it can."""
    finish: Callable[[Axes, Study], None]
    caption: Callable[[list[Trial]], str]


def _finished(trials: list[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.state == "finished"]


def _no_history(study: Study, trials: list[Trial]) -> str:
    return "" if _finished(trials) else "no trial has finished"


def _no_importance(study: Study, trials: list[Trial]) -> str:
    finished = [trial for trial in _finished(trials) if trial.values]
    searched = {name for trial in finished for name in trial.values}
    if len(study.search.space) < 2:
        return f"{next(iter(study.search.space))} is all that is searched"
    if len(finished) < _LEAST_FOR_IMPORTANCE:
        return f"it takes {_LEAST_FOR_IMPORTANCE} finished trials, and there are {len(finished)}"
    if len(searched) < 2 or len({trial.value for trial in finished}) < 2:
        return "all finished trials came out alike"
    return ""


def _no_coordinates(study: Study, trials: list[Trial]) -> str:
    finished = [trial for trial in _finished(trials) if trial.values]
    return "" if len(finished) > 1 else f"it takes two finished trials in the space, and there are {len(finished)}"


def _no_courses(study: Study, trials: list[Trial]) -> str:
    return "" if any(trial.intermediate for trial in trials) else "no trial was validated before its end"


def _finish_history(axes: Axes, study: Study) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("trial")
    for line in axes.get_lines():
        line.set(color=COLOURS[1], alpha=1.0, drawstyle="steps-post")
    for points in axes.collections:
        points.set_color(COLOURS[0])
    axes.legend([*axes.collections[:1], *axes.get_lines()[:1]], ["finished trials", "the best so far"], frameon=False)


def _finish_importance(axes: Axes, study: Study) -> None:
    axes.set(xlabel="share of the importance", ylabel="")
    if (legend := axes.get_legend()) is not None:
        legend.remove()
    for bar in axes.patches:
        bar.set_color(COLOURS[0])
    axes.grid(axis="y", visible=False)


def _finish_coordinates(axes: Axes, study: Study) -> None:
    """Leave out colours that cannot be told from the white behind them, and the bar: the first axis says the same."""
    from matplotlib.colors import ListedColormap

    for lines in axes.collections:
        colours = lines.get_cmap()(np.linspace(0, 1, 256))
        if lines.colorbar is not None:
            lines.colorbar.remove()
        lines.set_cmap(ListedColormap(colours[colours[:, :3].mean(axis=1) < _DARK]))
    figure: Any = axes.get_figure()
    for one in figure.axes:
        if one.get_yscale() == "log":  # its labels would be formulas, which this style does not set
            one.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            one.yaxis.set_minor_formatter(lambda value, _: "")
    axes.grid(visible=False)
    axes.tick_params(axis="x", colors=INK)


def _finish_courses(axes: Axes, study: Study) -> None:
    """Colour the lines by what became of the trials: one of a legend for each would be larger than the picture."""
    from matplotlib.lines import Line2D

    states = {trial.number: trial.state for trial in study.trials}
    ranked = study.ranking()
    best = ranked[0].number if ranked else None
    looks: dict[str, dict[str, Any]] = {
        "pruned": {"color": _PRUNED_COLOUR, "linewidth": 1.0, "alpha": 0.7, "zorder": 3},
        "finished": {"color": _FINISHED_COLOUR, "linewidth": 1.0, "alpha": 1.0, "zorder": 2},
        "running": {"color": _RUNNING_COLOUR, "linewidth": 1.4, "alpha": 1.0, "zorder": 4},
        "best": {"color": COLOURS[0], "linewidth": 2.2, "alpha": 1.0, "zorder": 5},
    }
    seen: set[str] = set()
    for line in axes.get_lines():
        number = int(str(line.get_label()).removeprefix("Trial"))
        kind = "best" if number == best else states.get(number, "running")
        seen.add(kind)
        line.set(**looks[kind])
    if (legend := axes.get_legend()) is not None:
        legend.remove()
    shown = [kind for kind in ("best", "finished", "pruned", "running") if kind in seen]
    names = {"best": f"the best, trial {best}", "pruned": "pruned: ended early"}
    axes.legend(
        [Line2D([], [], **{**looks[kind], "linewidth": 2.5}) for kind in shown],
        [names.get(kind, kind) for kind in shown],
        frameon=False,
    )
    axes.set(xlabel="share of the training that is done, %", ylabel=study.search.metric)


_PANELS = (
    _Panel(
        "History",
        "plot_optimization_history",
        _no_history,
        _finish_history,
        lambda trials: "What each finished trial came to, and the best until then.",
    ),
    _Panel(
        "Importance",
        "plot_param_importances",
        _no_importance,
        _finish_importance,
        lambda trials: (
            "How much each parameter decides whether a trial is among the best tenth (PED-ANOVA, Watanabe et al. "
            f"2023), from {len(_finished(trials))} finished trials; rough below 50."
        ),
    ),
    _Panel(
        "Parallel coordinates",
        "plot_parallel_coordinate",
        _no_coordinates,
        _finish_coordinates,
        lambda trials: "A line for each finished trial through its values, the darker the better.",
    ),
    _Panel(
        "Courses",
        "plot_intermediate_values",
        _no_courses,
        _finish_courses,
        lambda trials: "The metric while the trials were trained.",
    ),
)

_SAID = ("finished", "pruned", "failed", "running", "waiting")

_GRID = """
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { color: #48566a; font-size: .9rem; } h2 { font-size: 1.1rem; margin: 2rem 0 0; }
table { display: block; overflow-x: auto; }
"""


def _restyle(figure: Any, axes: Axes, title: str) -> None:
    """Undo the grey style that Optuna chooses."""
    for one in figure.axes:
        one.set_facecolor("white")
        one.tick_params(colors=SOFT, length=0)
        one.xaxis.label.set(color=SOFT, size=9.5)
        one.yaxis.label.set(color=SOFT, size=9.5)
        if one is not axes:
            one.grid(visible=False)
    axes.grid(color=LINE, linewidth=0.8)
    for place in ("left", "center", "right"):
        axes.set_title("", loc=place)
    axes.set_title(title, loc="left", color=INK, size=11, weight="bold")
