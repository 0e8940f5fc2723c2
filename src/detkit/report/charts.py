"""Small drawings as SVG: intervals on a common axis, bars, curves.

What stands in a table has no size of its own: places are percentages, so it grows with its cell and text stays legible.
Colours come from the page's style: the class ``e0`` is that of the first entry, ``k0`` that of the first kind of error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from detkit.pages import text

if TYPE_CHECKING:
    from detkit.scores.protocol import Floats

UNKNOWN = "\N{EN DASH}"
"""What stands where nothing was measured or nothing is known."""
COLOURS, DASHES = 8, 7
"""Colours and dashes of entries in the page's style; a pair of both comes again after 56 entries only."""

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 440, 300, 44, 10, 428, 256
_EDGE = 0.05


def line_class(at: int) -> str:
    """Return the colour and the dash of an entry's line."""
    return f"e{at % COLOURS} d{at % DASHES}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number as the page shows it, a dash where nothing was measured."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:.{digits}f}"


@dataclass(frozen=True)
class Axis:
    """A range of numbers and the round ones in it; the lowest and the highest are round, too."""

    ticks: tuple[float, ...]
    digits: int

    def at(self, value: float) -> float:
        """Return the place of a value in percent of the width."""
        low, high = self.ticks[0], self.ticks[-1]
        share = _EDGE + (1 - 2 * _EDGE) * (value - low) / (high - low)
        return 100 * min(max(share, 0.0), 1.0)


def axis_over(values: Iterable[float]) -> Axis:
    """Return an axis that has room for all values that are numbers."""
    known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(known), max(known)
    span = max(high - low, 0.01)
    step = 10 ** math.floor(math.log10(span / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(tuple(n * step for n in range(first, last + 1)), digits)


def axis_head(axis: Axis, signed: bool = False) -> str:
    """Return the numbers of an axis, to stand above what it measures."""
    marks = ""
    for tick in axis.ticks:
        shown = f"{tick:+.{axis.digits}f}" if signed and tick else f"{tick or 0:.{axis.digits}f}"
        marks += f'<text x="{axis.at(tick):.1f}%" y="11" text-anchor="middle">{shown}</text>'
    return f'<svg class="axis" height="14" aria-hidden="true">{marks}</svg>'


def span(axis: Axis, low: float, value: float, high: float, kind: str) -> str:
    """Return a number with its interval, and the axis's lines behind it."""
    lines = "".join(
        f'<line class="{"zero" if tick == 0 else "grid"}" x1="{at}" x2="{at}" y1="0" y2="100%"/>'
        for tick, at in ((tick, f"{axis.at(tick):.1f}%") for tick in axis.ticks)
    )
    if math.isnan(value):
        return f'<svg class="span" height="22" aria-hidden="true">{lines}</svg>'
    ends = ""
    if not math.isnan(low):
        ends = (
            f'<line class="{kind} whisker" x1="{axis.at(low):.2f}%" x2="{axis.at(high):.2f}%" y1="50%" y2="50%"/>'
            + "".join(
                f'<line class="{kind} whisker" x1="{x:.2f}%" x2="{x:.2f}%" y1="32%" y2="68%"/>'
                for x in (axis.at(low), axis.at(high))
            )
        )
    label = f"{value:.3f}, from {low:.3f} to {high:.3f}" if ends else f"{value:.3f}"
    return (
        f'<svg class="span" height="22" role="img" aria-label="{label}">{lines}{ends}'
        f'<circle class="{kind}" cx="{axis.at(value):.2f}%" cy="50%" r="4.5"/></svg>'
    )


def bar(share: float, kind: str, label: str) -> str:
    """Return a bar of a share of the width with its number; NaN has a dash."""
    width = 0.0 if math.isnan(share) else 100 * min(max(share, 0.0), 1.0)
    return (
        f'<svg class="bar" height="12" role="img" aria-label="{text(label)}: {number(share)}">'
        f'<rect class="rail" width="100%" height="12"/><rect class="{kind}" width="{width:.1f}%" height="12"/>'
        f'<text x="{width:.1f}%" y="10" dx="6">{number(share)}</text></svg>'
    )


def stack(parts: Sequence[tuple[float, str, str]]) -> str:
    """Return bars one after the other: the share of the width of each, its class and its name."""
    at, out = 0.0, []
    for share, kind, label in parts:
        width = 100 * max(share, 0.0)
        out.append(
            f'<rect class="{kind}" x="{at:.2f}%" width="{width:.2f}%" height="18"><title>{text(label)}</title></rect>'
        )
        at += width
    said = text("; ".join(label for _, _, label in parts))
    return f'<svg class="bar" height="18" role="img" aria-label="{said}">{"".join(out)}</svg>'


@dataclass(frozen=True)
class Curve:
    """One line of a chart; NaN leaves a gap."""

    number: int
    """Of the entry."""
    name: str
    x: Floats
    y: Floats
    mark: tuple[float, float] | None = None
    """A place on it to point out."""


def curves(lines: Sequence[Curve], x_name: str, y_name: str) -> str:
    """Return a chart of curves, both axes from 0 to 1."""
    out = []
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        x, y = _x(tick), _y(tick)
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.1f}</text>')
        out.append(f'<text x="{x:.1f}" y="{_BOTTOM + 16}" text-anchor="middle">{tick:.1f}</text>')
    middle = (_LEFT + _RIGHT) / 2
    out.append(f'<text class="name" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{x_name}</text>')
    side = (_TOP + _BOTTOM) / 2
    out.append(f'<text class="name" transform="translate(12 {side}) rotate(-90)" text-anchor="middle">{y_name}</text>')
    for line in lines:
        name = f"<title>{text(line.name)}</title>"
        out.append(f'<path class="curve {line_class(line.number)}" d="{_path(line.x, line.y)}">{name}</path>')
    for line in lines:
        if line.mark is not None:
            x, y = _x(line.mark[0]), _y(line.mark[1])
            kind = f"e{line.number % COLOURS}"
            out.append(f'<line class="drop {kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{_BOTTOM}"/>')
            out.append(f'<circle class="{kind} mark" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')
    label = f"{y_name} against {x_name}"
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(out)}</svg>'


def _x(value: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * min(max(value, 0.0), 1.0)


def _y(value: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * min(max(value, 0.0), 1.0)


def _path(x: Floats, y: Floats) -> str:
    """Return the line, without the points inside of level stretches."""
    level = np.zeros(len(y), dtype=bool)
    level[1:-1] = (y[1:-1] == y[:-2]) & (y[1:-1] == y[2:])
    out, pen_down = [], False
    for px, py, skip in zip(x.tolist(), y.tolist(), level.tolist(), strict=True):
        if math.isnan(py):
            pen_down = False
        elif not skip:
            out.append(f"{'L' if pen_down else 'M'}{_x(px):.1f} {_y(py):.1f}")
            pen_down = True
    return "".join(out)
