"""The numbers of a comparison as tables with drawings in them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from detkit.pages import text
from detkit.report.charts import COLOURS, UNKNOWN, axis_head, axis_over, bar, number, span, stack
from detkit.scores.certainty import NUMBERS

if TYPE_CHECKING:
    from detkit.comparison import Comparison, Difference
    from detkit.scores import Scores
    from detkit.scores.protocol import Floats

_LATER = frozenset({"AR1", "AR10", "ARs", "ARm", "ARl"})
"""Numbers that are in the table of all numbers only, as their mask counterparts."""
_OURS = frozenset({"AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"})
"""Numbers of which more is better; what plugins add may go either way."""
_MOST_CLASSES = 60
"""Classes in the table of classes, and in a matrix `_MOST_IN_MATRIX`: those with most objects."""
_MOST_IN_MATRIX = 20


def label(comparison: Comparison, at: int) -> str:
    """Return the name of an entry in its colour, marked where it has seen the images."""
    entry = comparison.entries[at]
    seen = f' <strong class="seen">seen in {text(entry.scores.seen_in)}</strong>' if entry.scores.seen_in else ""
    return f'<span class="entry"><i class="swatch f{at % COLOURS}"></i><span>{text(entry.name)}{seen}</span></span>'


def scrolling(name: str) -> str:
    """Return the start of an area that scrolls sideways where it has no room, by the arrow keys, too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(name)}">'


def legend(comparison: Comparison) -> str:
    """Return the names of all entries with their colours."""
    return '<p class="legend">' + " ".join(label(comparison, at) for at in range(len(comparison))) + "</p>"


def numbers(comparison: Comparison) -> Iterator[str]:
    """Yield the table of entries: `Comparison.metric` with its interval, the other numbers, speed, origin."""
    metric, intervals = comparison.metric, comparison.intervals
    columns = [name for name in comparison.columns if name.removeprefix("mask_") not in _LATER and name != metric]
    axis = axis_over(end for one in intervals.values() for end in (one.low, one.value, one.high))
    rows = comparison.rows()
    timed = any(row["ms_per_image"] is not None for row in rows)
    best = {name: _best(comparison, name) for name in (metric, *columns)}
    yield f'{scrolling("Numbers")}<table class="numbers"><thead><tr><th>model</th>'
    yield f'<th class="n">{metric}, 95&nbsp;% interval</th><th class="plot">{axis_head(axis)}</th>'
    yield from (f'<th class="n">{text(name)}</th>' for name in columns)
    yield '<th class="n">ms per image</th>' if timed else ""
    yield "<th>started from</th></tr></thead><tbody>"
    for at, (entry, row) in enumerate(zip(comparison.entries, rows, strict=True)):
        ends = intervals[entry.name]
        seen = ' class="warned"' if entry.scores.seen_in else ""
        yield f'<tr{seen}><th scope="row">{label(comparison, at)}</th>'
        around = "" if math.isnan(ends.low) else f"<small>{number(ends.low)} to {number(ends.high)}</small>"
        yield f'<td class="n {best[metric].get(at, "")}"><span>{number(ends.value)}</span>{around}</td>'
        yield f'<td class="plot">{span(axis, ends.low, ends.value, ends.high, f"e{at % COLOURS}")}</td>'
        yield from (f'<td class="n {best[name].get(at, "")}"><span>{number(row[name])}</span></td>' for name in columns)
        if timed:
            where = f"<small>{text(entry.device)}</small>" if entry.device else ""
            yield f'<td class="n">{number(row["ms_per_image"], 1)}{where}</td>'
        yield f"<td>{text(row['start'])}</td></tr>"
    yield "</tbody></table></div>"
    if len(comparison) > 1:
        yield (
            '<p class="faint"><b class="ahead">Bold</b>: ahead of every other entry beyond chance (p &lt; 0.05 after '
            'Holm\'s correction; tested for AP, AP50 and AP75). <span class="highest">Underlined</span>: the highest '
            "of its column, which is not shown to be more than chance.</p>"
        )


def _best(comparison: Comparison, name: str) -> dict[int, str]:
    """Return the place of the highest number of a column with its mark; none where several share it or of plugins."""
    values = [entry.scores[name] for entry in comparison.entries]
    known = [value for value in values if not math.isnan(value)]
    if name.removeprefix("mask_") not in _OURS or len(known) < 2 or values.count(max(known)) > 1:
        return {}
    at = values.index(max(known))
    if name in NUMBERS and not _rivals(replace(comparison, metric=name), comparison.entries[at].name):
        return {at: "ahead"}
    return {at: "highest"}


def _rivals(comparison: Comparison, name: str) -> list[str]:
    """Return the entries that one is not really ahead of."""
    return [
        one.second if one.first == name else one.first
        for one in comparison.differences
        if name in {one.first, one.second} and one.winner != name
    ]


def verdict(comparison: Comparison) -> str:
    """Say in a sentence who is ahead."""
    values = {entry.name: entry.scores[comparison.metric] for entry in comparison.entries}
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    if len(known) < 2:
        return ""
    first = max(known, key=lambda name: known[name])
    rivals = _rivals(comparison, first)
    if not rivals:
        others = {1: "the other", 2: "both others"}.get(len(values) - 1, f"all {len(values) - 1} others")
        ahead = f"is ahead of {others} by {comparison.metric}, beyond chance"
        return f"<b>{text(first)}</b> {ahead}.{_but(comparison, first)}"
    beaten = [name for name in values if name != first and name not in rivals]
    more = f" It is ahead of {_bold(beaten)}." if beaten else ""
    return (
        f"<b>{text(first)}</b> has the highest {comparison.metric}, but is not shown to be ahead of "
        f"{_bold(rivals)}.{more}{_but(comparison, first)}"
    )


def _but(comparison: Comparison, name: str) -> str:
    seen = next(entry.scores.seen_in for entry in comparison.entries if entry.name == name)
    return f' <span class="seen">But it has seen images in {text(seen)}.</span>' if seen else ""


def _bold(names: Sequence[str]) -> str:
    return listed([f"<b>{text(name)}</b>" for name in names])


def listed(names: Sequence[str]) -> str:
    """Return a list as it is spoken."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def differences(comparison: Comparison) -> Iterator[str]:
    """Yield every pair as a sentence and on an axis with zero, the entry with the higher number first."""
    places = {entry.name: at for at, entry in enumerate(comparison.entries)}
    told = [_turned(one) for one in comparison.differences]
    axis = axis_over([0.0, *(end for _, _, *ends, _ in told for end in ends)])
    yield f'{scrolling("Pairs")}<table class="forest"><thead><tr><th>pair</th>'
    yield f'<th class="n">{comparison.metric} apart, 95&nbsp;% interval</th>'
    yield f'<th class="plot">{axis_head(axis, signed=True)}</th><th class="n">p, corrected</th></tr></thead><tbody>'
    for ahead, behind, low, value, high, one in told:
        a, b = label(comparison, places[ahead]), label(comparison, places[behind])
        won = one.winner is not None
        kind = f"e{places[ahead] % COLOURS}" if won else "unsure"
        said = f"{a} beats {b}" if won else f"{a} and {b}: no difference shown"
        said = f"{a} and {b}: too little was measured" if math.isnan(one.p_value) else said
        ends = "" if math.isnan(low) else f"<small>{low:+.3f} to {high:+.3f}</small>"
        yield f'<tr><td>{said}</td><td class="n{" ahead" if won else ""}">{number(value)}{ends}</td>'
        yield f'<td class="plot">{span(axis, low, value, high, kind)}</td>'
        yield f'<td class="n">{_p(one.corrected_p_value)}</td></tr>'
    yield "</tbody></table></div>"
    yield (
        '<p class="faint">Paired bootstrap over images: both of a pair are scored on the same images drawn again, '
        f"{comparison.differences[0].interval.replicates:,} times; bias-corrected intervals. A line that crosses zero "
        "may be chance. Single intervals of two models may overlap although their difference is sure.</p>"
    )


def _turned(one: Difference) -> tuple[str, str, float, float, float, Difference]:
    ends = one.interval
    if ends.value < 0:
        return one.second, one.first, -ends.high, -ends.value, -ends.low, one
    return one.first, one.second, ends.low, ends.value, ends.high, one


def _p(value: float) -> str:
    # Never so rounded that it seems to be on the other side of 0.05.
    return UNKNOWN if math.isnan(value) else f"{value:.{4 if 0.045 < value < 0.055 else 3}f}"


def classes(comparison: Comparison) -> Iterator[str]:
    """Yield AP of each class, the entries' bars below one another."""
    first = comparison.entries[0].scores
    names = frequent(first)
    yield legend(comparison)
    yield f'{scrolling("AP of each class")}<table class="classes"><thead><tr><th>class</th><th class="n">objects</th>'
    yield '<th class="plot">AP</th></tr></thead><tbody>'
    for name in names:
        rows = [entry.scores.per_class[name] for entry in comparison.entries]
        bars = "".join(
            bar(row["AP"], f"e{at % COLOURS}", entry.name)
            for at, (entry, row) in enumerate(zip(comparison.entries, rows, strict=True))
        )
        yield f'<tr><th scope="row">{text(name)}</th><td class="n">{rows[0]["boxes"]:,.0f}</td>'
        yield f'<td class="plot bars">{bars}</td></tr>'
    yield "</tbody></table></div>"
    if len(names) < len(first.per_class):
        yield f'<p class="faint">The {len(names)} of {len(first.per_class)} classes with most objects.</p>'


def frequent(scores: Scores, most: int = _MOST_CLASSES) -> list[str]:
    """Return the classes with most objects, in the order of the data."""
    counts = {name: row["boxes"] for name, row in scores.per_class.items()}
    kept = set(sorted(counts, key=lambda name: -counts[name])[:most])
    return [name for name in counts if name in kept]


_KINDS = {
    "classification": "on an object, wrong class",
    "localisation": "right class, box too far off (IoU 0.1 to 0.5)",
    "both": "wrong class and box off",
    "duplicate": "object found before",
    "background": "on no object",
    "missed": "objects without any detection",
}


def errors(comparison: Comparison) -> Iterator[str]:
    """Yield how much AP50 each kind of error costs each entry."""
    found = [entry.scores.error_types for entry in comparison.entries]
    whole = max([sum(kind.ap_cost for kind in kinds.values() if kind.ap_cost > 0) for kinds in found] + [0.01])
    yield f'{scrolling("Errors")}<table class="errors"><thead><tr><th>model</th><th class="plot">AP50 lost</th>'
    for at, (name, meaning) in enumerate(_KINDS.items()):
        yield f'<th class="n"><i class="swatch k{at}"></i>{name}<small>{meaning}</small></th>'
    yield "</tr></thead><tbody>"
    for at, kinds in enumerate(found):
        parts = [
            (kinds[name].ap_cost / whole, f"k{k}", f"{name}: {kinds[name].ap_cost:.3f}")
            for k, name in enumerate(_KINDS)
        ]
        yield f'<tr><th scope="row">{label(comparison, at)}</th><td class="plot">{stack(parts)}</td>'
        for name in _KINDS:
            yield f'<td class="n">{number(kinds[name].ap_cost)}<small>{kinds[name].count:,}</small></td>'
        yield "</tr>"
    yield "</tbody></table></div>"
    yield (
        '<p class="faint">By how much AP50 would rise, were all errors of one kind mended, and how many there are, '
        "over all detections that count (Bolya et al., TIDE, ECCV 2020). Costs of several kinds do not add up to what "
        "is missing to 1, as mending one changes the others.</p>"
    )


def confusions(comparison: Comparison) -> Iterator[str]:
    """Yield a matrix for each entry: rows are objects, columns are what they were found as."""
    kept = frequent(comparison.entries[0].scores, _MOST_IN_MATRIX)
    yield '<div class="matrices">'
    for at, entry in enumerate(comparison.entries):
        found = entry.scores.confusion
        names, matrix = _gathered(found.classes, found.matrix.astype(np.float64), kept)
        yield f"<figure><figcaption>{label(comparison, at)} from score {number(found.score_threshold)} on</figcaption>"
        yield f'{scrolling(f"Confusions of {entry.name}")}<table class="matrix"><thead><tr><th></th>'
        yield from (f"<th><span>{text(name)}</span></th>" for name in [*names, "(missed)"])
        yield "</tr></thead><tbody>"
        for r, name in enumerate([*names, "(background)"]):
            total = max(float(matrix[r].sum()), 1.0)
            yield f'<tr><th scope="row">{text(name)}</th>'
            for c, count in enumerate(matrix[r].tolist()):
                if r == len(names) == c:
                    yield "<td></td>"
                    continue
                heat = math.ceil(10 * count / total)
                right = "right" if r == c else "wrong"
                yield f'<td class="{right} h{heat}" title="{count:.0f} of {total:.0f}">{count:.0f}</td>'
            yield "</tr>"
        yield "</tbody></table></div></figure>"
    yield "</div>"
    yield (
        '<p class="faint">Rows: the class of an object; columns: the class it was found as, at IoU 0.5 and each '
        "model's best threshold. Shades are shares of the row. Last row: detections on no object."
    )
    left = len(comparison.entries[0].scores.per_class) - len(kept)
    yield f" (other) are the {left} classes with fewest objects, taken together.</p>" if left > 0 else "</p>"


def _gathered(names: Sequence[str], matrix: Floats, kept: Sequence[str]) -> tuple[list[str], Floats]:
    """Return the matrix with all classes but some summed up."""
    if len(kept) == len(names):
        return list(names), matrix
    to = {name: at for at, name in enumerate(kept)}
    target = np.array([to.get(name, len(kept)) for name in names] + [len(kept) + 1])
    out = np.zeros((len(kept) + 2, len(kept) + 2))
    np.add.at(out, (target[:, None], target[None, :]), matrix)
    return [*kept, "(other)"], out


def all_numbers(comparison: Comparison) -> Iterator[str]:
    """Yield every number of every entry, those of Pascal VOC's protocol too."""
    rows: dict[str, list[float | None]] = {
        name: [entry.scores[name] for entry in comparison.entries] for name in comparison.columns
    }
    rows["best mean F1 at IoU 0.5"] = [entry.scores.best_f1 for entry in comparison.entries]
    rows["score of that F1"] = [entry.scores.score_threshold for entry in comparison.entries]
    rows["VOC 2007 mAP, 11 points"] = [entry.scores.voc.map_07 for entry in comparison.entries]
    rows["VOC 2010 mAP, area"] = [entry.scores.voc.map_10 for entry in comparison.entries]
    cells = {name: [f'<td class="n">{number(value)}</td>' for value in values] for name, values in rows.items()}
    yield from _side_by_side(comparison, "All numbers", cells)


def facts(comparison: Comparison, found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what is known of how each entry came to be; ``found`` has one mapping for each."""
    names = list(dict.fromkeys(name for one in found for name in one))
    cells = {name: [f"<td>{text(one.get(name, UNKNOWN))}</td>" for one in found] for name in names}
    yield from _side_by_side(comparison, "How each came to be", cells)


def _side_by_side(comparison: Comparison, title: str, cells: Mapping[str, Sequence[str]]) -> Iterator[str]:
    yield f'{scrolling(title)}<table class="facts"><thead><tr><th></th>'
    yield from (f"<th>{label(comparison, at)}</th>" for at in range(len(comparison)))
    yield "</tr></thead><tbody>"
    yield from (f'<tr><th scope="row">{text(name)}</th>{"".join(row)}</tr>' for name, row in cells.items())
    yield "</tbody></table></div>"
