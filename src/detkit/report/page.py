"""The page as a whole: its head, its sections in order, and its file."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import detkit
from detkit.files import atomic_write
from detkit.pages import text
from detkit.report import tables
from detkit.report.charts import Curve, curves, line_class, number
from detkit.report.pictures import Gallery

if TYPE_CHECKING:
    from detkit.comparison import Comparison
    from detkit.scores.protocol import Floats

SAMPLES, DISAGREEMENTS = 12, 12
"""Images in the grid of classes, and of the worst disagreements."""
LONGEST_SIDE = 480
"""Pixels to which images are scaled down."""

_SECTIONS = {
    "verdict": "Who beats whom",
    "classes": "Classes",
    "curves": "Precision, recall and the score threshold",
    "errors": "Errors",
    "pictures": "Pictures",
    "protocol": "Protocol and origin",
}


def write_page(
    comparison: Comparison,
    path: str | Path,
    *,
    title: str = "",
    command: str = "",
    samples: int = SAMPLES,
    disagreements: int = DISAGREEMENTS,
    longest_side: int = LONGEST_SIDE,
    date: datetime.date | None = None,
) -> Path:
    """Write a comparison as one self-contained HTML file; return its path. Raises `StorageError`.

    ``command`` is printed as the way to make the page again. ``samples`` is the number of images in the grid that has
    one for each class, ``disagreements`` that of the images on which the entries differ most; both are embedded as
    JPEGs of ``longest_side`` pixels. The same comparison gives the same bytes on the same ``date``, which is today's
    where None.
    """
    target = Path(path)
    gallery = Gallery(comparison, samples=samples, disagreements=disagreements, longest_side=longest_side)
    day = datetime.datetime.now(tz=datetime.timezone.utc).date() if date is None else date
    page = "\n".join(part for part in _page(comparison, gallery, title, command, day) if part)
    with atomic_write(target) as file:
        file.write(page.encode())
    return target


def _page(comparison: Comparison, gallery: Gallery, title: str, command: str, day: datetime.date) -> Iterator[str]:
    data = comparison.data
    title = title or " vs ".join(entry.name for entry in comparison.entries)
    style, script = (
        files("detkit.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    # Nothing is fetched, and no other style or script runs than these two, whatever names and files contain.
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f"<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}; base-uri 'none'; form-action 'none'\">"
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f'<meta name="generator" content="detkit {detkit.__version__}">'
    yield f"<title>{text(title)}</title>\n<style>{style}</style>\n</head>\n<body>"
    yield f'<header><p class="eyebrow">detkit comparison · {day.isoformat()}</p><h1>{text(title)}</h1>'
    objects = int((~(data.crowd | data.difficult)).sum())
    counts = {"model": len(comparison), "image": len(data), "object": objects, "class": len(data.classes)}
    yield '<p class="counts">'
    for name, count in counts.items():
        ending = "" if count == 1 else "es" if name == "class" else "s"
        yield f"<span><b>{count:,}</b> {name}{ending}</span>"
    yield "</p>"
    for entry in comparison.entries:
        if entry.scores.seen_in:
            yield (
                f'<p class="alarm"><b>{text(entry.name)}</b> has seen some of these images in '
                f"{text(entry.scores.seen_in)}: its numbers say nothing about new images.</p>"
            )
    yield f'<p class="verdict">{tables.verdict(comparison)}</p></header>'
    sections = {name: heading for name, heading in _SECTIONS.items() if name != "verdict" or len(comparison) > 1}
    links = " ".join(f'<a href="#{name}">{heading}</a>' for name, heading in sections.items())
    yield f"<nav>{links}</nav>\n<main>"
    yield '<section id="numbers"><h2>Numbers</h2>'
    yield from tables.numbers(comparison)
    yield from _signs(comparison)
    yield "</section>"
    makers = {
        "verdict": lambda: tables.differences(comparison),
        "classes": lambda: tables.classes(comparison),
        "curves": lambda: _curves(comparison),
        "errors": lambda: _errors(comparison),
        "pictures": lambda: _pictures(comparison, gallery),
        "protocol": lambda: _protocol(comparison, command),
    }
    for name, heading in sections.items():
        yield f'<section id="{name}"><h2>{heading}</h2>'
        yield from makers[name]()
        yield "</section>"
    yield f"</main>\n<script>{script}</script>\n</body>\n</html>\n"


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _signs(comparison: Comparison) -> Iterator[str]:
    if comparison.warnings:
        yield '<div class="warnings"><h3>Signs of mistakes</h3><ul>'
        yield from (f"<li>{text(one)}</li>" for one in comparison.warnings)
        yield "</ul></div>"
    else:
        yield (
            '<p class="faint">No sign of mixed-up classes, of boxes in another convention or a pixel off, or of lists '
            "of detections cut short.</p>"
        )


def _curves(comparison: Comparison) -> Iterator[str]:
    names = tables.frequent(comparison.entries[0].scores)
    yield '<p class="legend">'
    for at in range(len(comparison)):
        line = f'<line class="curve {line_class(at)}" x1="0" x2="32" y1="6" y2="6"/>'
        sample = f'<svg width="32" height="12" aria-hidden="true">{line}</svg>'
        yield f"<span>{sample} {tables.label(comparison, at)}</span>"
    yield '</p><p class="controls" hidden><label>Class <select id="curve"><option value="">mean of all classes</option>'
    yield from (f'<option value="{at}">{text(name)}</option>' for at, name in enumerate(names))
    yield "</select></label></p>"
    for at, name in enumerate([None, *names], start=-1):
        lines = [_lines(comparison, entry, name) for entry in range(len(comparison))]
        recalls = curves([one for one, _ in lines], "recall", "precision")
        scores = curves([one for _, one in lines], "score threshold", "F1")
        of_class = "Mean of all classes" if name is None else text(name)
        yield f'<div class="charts" data-c="{"" if name is None else at}"{"" if name is None else " hidden"}>'
        yield f"<figure>{recalls}<figcaption>{of_class}: best precision with at least that recall</figcaption></figure>"
        yield f"<figure>{scores}<figcaption>{of_class}: F1 of detections from a score on</figcaption></figure></div>"
    best = [
        f"<span>{tables.label(comparison, at)} {number(entry.scores.score_threshold)} "
        f"(mean F1 {number(entry.scores.best_f1)})</span>"
        for at, entry in enumerate(comparison.entries)
    ]
    yield f'<p class="legend">Marked: best score thresholds {" ".join(best)}</p>'
    yield '<p class="faint">Both at IoU 0.5. The area under the left curve is AP50.</p>'


def _lines(comparison: Comparison, at: int, name: str | None) -> tuple[Curve, Curve]:
    """Return precision against recall and F1 against the threshold, of a class or of all in the mean."""
    entry = comparison.entries[at]
    found, best = entry.scores.curves, entry.scores.score_threshold
    rows = range(len(found.classes)) if name is None else [found.classes.index(name)]
    precision, f1 = (_mean(curve[list(rows)]) for curve in (found.precision_at_recall, found.f1))
    # From the highest recall on, the curve would run along the axis.
    nothing = np.flatnonzero(precision == 0)
    precision[nothing[1:]] = np.nan
    mark = None
    if best is not None:
        height = entry.scores.best_f1 if name is None else float(np.interp(best, found.thresholds, np.nan_to_num(f1)))
        mark = (best, height or 0.0)
    return Curve(at, entry.name, found.recalls, precision), Curve(at, entry.name, found.thresholds, f1, mark)


def _mean(rows: Floats) -> Floats:
    measured = ~np.isnan(rows)
    count = measured.sum(axis=0)
    total = np.where(measured, rows, 0.0).sum(axis=0)
    return np.asarray(np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0))


def _errors(comparison: Comparison) -> Iterator[str]:
    yield from tables.errors(comparison)
    yield "<h3>Confusions</h3>"
    yield from tables.confusions(comparison)


def _pictures(comparison: Comparison, gallery: Gallery) -> Iterator[str]:
    if not gallery.samples and not gallery.disagreements:
        yield "<p>There is no image with objects or detections.</p>"
        return
    yield gallery.store
    yield '<div class="bar-of-controls controls" hidden>'
    lowest = f"{gallery.lowest:.2f}"
    yield f'<label>Score from <input type="range" id="score" min="{lowest}" max="1" step="0.01" value="0.5">'
    yield '<output id="readout" for="score"></output></label>'
    yield '<label><input type="checkbox" id="best" checked> each model\'s own best</label>'
    yield '<label>Class <select id="class"><option value="">all</option>'
    yield from (f'<option value="{at}">{text(name)}</option>' for at, name in enumerate(comparison.data.classes))
    yield "</select></label>"
    yield '<label>Size <input type="range" id="size" min="120" max="640" step="10" value="200"></label></div>'
    yield '<p class="legend keys">'
    for kind, meaning in {
        "truth": "ground truth",
        "right": "right",
        "false": "false",
        "missed": "missed object",
        "ignored": "not counted (crowd, difficult)",
    }.items():
        shape = 'x="3" y="3" width="24" height="12"'
        box = f'<rect class="box {kind}" {shape}/>'
        boxes = f'<g class="rims">{box}</g>{box}'
        sample = f'<svg class="key" width="30" height="18" aria-hidden="true">{boxes}</svg>'
        yield f"<span>{sample}{meaning}</span>"
    yield "</p>"
    if gallery.samples:
        yield "<h3>One image of each class</h3>"
        yield '<p class="faint">That with the most usual number of objects of the class.</p>'
        for image, name in gallery.samples:
            yield from gallery.scene(image, text(name))
    if gallery.disagreements:
        several = len(comparison) > 1
        yield f"<h3>Worst {'disagreements' if several else 'images'} first</h3>"
        how = "on which the numbers of mistakes lie furthest apart" if several else "with most mistakes"
        yield (
            f'<p class="faint">Images {how}: false detections and missed objects at each model\'s best threshold. No '
            "name is written where there are many boxes: point at one, or open the list below.</p>"
        )
        for image in gallery.disagreements:
            mistakes = [int(one.mistakes[image]) for one in gallery.judged]
            counts = tables.listed([str(one) for one in mistakes])
            yield from gallery.scene(image, f"{counts} mistake{'' if mistakes == [1] else 's'}")


def _protocol(comparison: Comparison, command: str) -> Iterator[str]:
    protocol = comparison.entries[0].scores.protocol
    areas = "; ".join(
        f"{name} {low:,.0f} to {high:,.0f}" if high < 1e10 else f"{name} from {low:,.0f}"
        for name, low, high in protocol.areas
        if name != "all"
    )
    classes = json.dumps(list(protocol.classes), ensure_ascii=False).strip("[]")
    replicates = next(iter(comparison.intervals.values())).replicates
    said = {
        "detections that count": f"the best {protocol.max_detections} of each class and image, "
        f"from score {protocol.score_floor:g} on",
        "overlaps": f"IoU {', '.join(f'{one:.2f}' for one in protocol.iou_thresholds)}",
        "object sizes": f"{areas} square pixels",
        "crowd": protocol.crowd,
        "difficult": protocol.difficult,
        "intervals": f"95 %, bias-corrected bootstrap over images, {replicates:,} replicates; pairs by the same draws, "
        "p-values after Holm",
        "images": f"{protocol.num_images:,}, list {protocol.images}",
        "classes": f"{len(protocol.classes)}: {classes}",
        "ground truth": protocol.data,
        "engine": protocol.engine,
        "made by": f"detkit {detkit.__version__}",
    }
    yield f'{tables.scrolling("Protocol")}<table class="facts"><tbody>'
    yield from (f'<tr><th scope="row">{name}</th><td>{text(value)}</td></tr>' for name, value in said.items())
    yield "</tbody></table></div>"
    yield "<h3>All numbers</h3>"
    yield from tables.all_numbers(comparison)
    yield "<h3>How each came to be</h3>"
    yield from tables.facts(comparison, [one["facts"] for one in comparison.to_dict()["entries"]])
    if command:
        yield f'<h3>Make it again</h3><pre tabindex="0">{text(command)}</pre>'
