"""Images with their boxes as drawings: each image is embedded once, and shown as often as there are entries."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PillowImage

from detkit import images
from detkit.errors import ImageError
from detkit.pages import data_uri, text
from detkit.progress import track
from detkit.report.judging import FALSE, IGNORED, MISSED, RIGHT, Judged, one_of_each_class, worst_disagreements
from detkit.report.tables import frequent, label

if TYPE_CHECKING:
    from detkit.comparison import Comparison
    from detkit.scores.protocol import Floats

LOWEST_SCORE = 0.05
"""Detections below it are not drawn, unless the best threshold of a model is lower still."""

_SIDE = 480
"""Length of a drawing's longer side, in its own units."""
_MOST_BOXES, _MOST_IN_SCENE, _FEWEST_BOXES = 300, 720, 25
"""Boxes drawn on one image, and on one image for all entries together, but so many for each; the others are counted."""
_CROWDED = 12
"""Boxes on one image from which on their names would hide it; the page's script has the same number."""
_FONT, _LINE, _LETTER = 19.0, 23.0, 11.5
"""Size of names, height of their line and width of a letter about."""


@dataclass(frozen=True)
class _Frame:
    """How an image is placed in a drawing."""

    scale: float
    width: float
    height: float


@dataclass(frozen=True)
class _Mark:
    """A box to draw."""

    box: Floats
    kind: str
    label: int
    """Of the class."""
    name: str
    title: str
    """Shown under the pointer."""
    score: float | None = None
    """Where it comes, or goes if it is an object that was missed; None stands for a box that is always there."""
    visible: bool = True
    """At the model's best threshold."""


class Gallery:
    """The images of a page, and the drawings of them."""

    def __init__(self, comparison: Comparison, *, samples: int, disagreements: int, longest_side: int) -> None:
        self._comparison, self._data = comparison, comparison.data
        self.judged = [Judged(entry.scores) for entry in comparison.entries]
        names = frequent(comparison.entries[0].scores, samples)
        self.samples = one_of_each_class(self._data, names)
        """Images, each with the class it stands for."""
        self.disagreements = worst_disagreements(self.judged, disagreements)
        """Images."""
        lowest = min([LOWEST_SCORE, *(one.threshold for one in self.judged)])
        self.lowest = float(np.floor(100 * lowest) / 100)
        """Score from which on detections are drawn."""
        self._most = min(_MOST_BOXES, max(_FEWEST_BOXES, _MOST_IN_SCENE // len(comparison)))
        self._pictures = 0
        self._frames: dict[int, _Frame] = {}
        chosen = list(dict.fromkeys([*(i for i, _ in self.samples), *self.disagreements]))
        parts = [self._embed(i, longest_side) for i in track(chosen, "pictures", total=len(chosen))]
        self.store = f'<svg class="store" width="0" height="0" aria-hidden="true"><defs>{"".join(parts)}</defs></svg>'
        """The images themselves, to stand before the drawings, which refer to them."""

    def _embed(self, image: int, longest_side: int) -> str:
        try:
            pixels = images.read_image(self._data.paths[image])
        except ImageError:
            frame = self._frame(image, *(max(float(side), 1.0) for side in self._data.sizes[image]))
            return (
                f'<g id="i{image}"><rect class="unread" width="{frame.width:.1f}" height="{frame.height:.1f}"/>'
                f'<text class="unread" x="{frame.width / 2:.1f}" y="{frame.height / 2:.1f}" text-anchor="middle">'
                "this image cannot be read</text></g>"
            )
        frame = self._frame(image, pixels.shape[1], pixels.shape[0])
        picture = PillowImage.fromarray(pixels)
        picture.thumbnail((longest_side, longest_side), PillowImage.Resampling.LANCZOS)
        size = f'width="{frame.width:.1f}" height="{frame.height:.1f}"'
        return f'<image id="i{image}" {size} href="{data_uri(picture, "JPEG")}"/>'

    def _frame(self, image: int, width: float, height: float) -> _Frame:
        scale = _SIDE / max(width, height)
        self._frames[image] = _Frame(scale, max(scale * width, 1.0), max(scale * height, 1.0))
        return self._frames[image]

    def scene(self, image: int, title: str) -> Iterator[str]:
        """Yield one image: the ground truth and what every entry found."""
        name = text(self._data.image_ids[image])
        yield f'<figure class="scene"><figcaption><b>{title}</b> <span class="file">{name}</span></figcaption>'
        yield f'<div class="tiles">{self._truth(image)}'
        yield from (self._found(image, at) for at in range(len(self._comparison)))
        yield "</div></figure>"

    def _objects(self, image: int) -> range:
        return range(int(self._data.offsets[image]), int(self._data.offsets[image + 1]))

    def _tile(self, image: int, at: int | None, marks: Sequence[_Mark], said: str) -> str:
        """Return the image with boxes and what is said of them, of an entry or, where None, of the ground truth."""
        self._pictures += 1
        drawing, rest = _Drawing(self._frames[image], f"b{self._pictures}"), []
        chosen = _chosen(marks, _MOST_BOXES if at is None else self._most)
        for place, mark in enumerate(marks):
            if place in chosen:
                drawing.add(mark)
            else:
                rest.append(mark)
        name, attributes, threshold, more = "ground truth", 'class="tile"', 0.0, ""
        if at is not None:
            name, threshold = self._comparison.entries[at].name, float(self.judged[at].threshold)
            attributes = f'class="tile found" data-best="{threshold!r}"'
        if rest:
            hidden = sum(mark.visible for mark in rest)
            attributes += f' data-rest="{_listed(rest, threshold)}"'
            more = f' <span class="more">{f"{hidden} more not drawn" if hidden else ""}</span>'
        return f"<div {attributes}>{drawing.svg(image, name)}<p>{said}{more}</p></div>"

    def _truth(self, image: int) -> str:
        data, marks = self._data, []
        for row in self._objects(image):
            name = data.classes[data.labels[row]]
            why = "crowd" if data.crowd[row] else "difficult" if data.difficult[row] else ""
            title = f"{name} ({why})" if why else name
            marks.append(_Mark(data.boxes[row], IGNORED if why else "truth", int(data.labels[row]), title, title))
        count = sum(mark.kind != IGNORED for mark in marks)
        said = f'<b>ground truth</b><br><span class="said"><b>{count}</b> object{"" if count == 1 else "s"}</span>'
        return self._tile(image, None, marks, said)

    def _found(self, image: int, at: int) -> str:
        judged = self.judged[at]
        marks = [*self._detections(image, judged), *self._missed(image, judged)]
        counts = Counter(mark.kind for mark in marks if mark.visible)
        told = " ".join(
            f'<span class="said {kind}"><b>{counts[kind]}</b> {kind}</span>' for kind in (RIGHT, FALSE, MISSED)
        )
        said = f'{label(self._comparison, at)}<br><span class="from">from {judged.threshold:.2f}</span> {told}'
        return self._tile(image, at, marks, said)

    def _detections(self, image: int, judged: Judged) -> Iterator[_Mark]:
        for row in judged.on(image):
            score, kind, of_class = float(judged.scores[row]), str(judged.kinds[row]), int(judged.labels[row])
            if score < self.lowest:
                return
            name = self._data.classes[of_class]
            title, visible = f"{name} {score:.3f}, {kind}", score >= judged.threshold
            yield _Mark(judged.boxes[row], kind, of_class, f"{name} {score:.2f}", title, score, visible)

    def _missed(self, image: int, judged: Judged) -> Iterator[_Mark]:
        for row in sorted(self._objects(image), key=lambda row: float(judged.found_at[row])):
            if judged.counts[row]:
                of_class, found_at = int(self._data.labels[row]), float(judged.found_at[row])
                name, visible = self._data.classes[of_class], found_at < judged.threshold
                yield _Mark(self._data.boxes[row], MISSED, of_class, name, f"{name}, missed", found_at, visible)


def _chosen(marks: Sequence[_Mark], most: int) -> set[int]:
    """Return the places of those to draw: visible ones first, detections and missed objects by turns, best first."""
    turns: Counter[bool] = Counter()
    ranks: dict[int, tuple[bool, int]] = {}
    for at, mark in enumerate(marks):
        missed = mark.kind == MISSED
        turns[missed] += 1
        if np.isfinite(mark.box).all():
            ranks[at] = (not mark.visible, turns[missed])
    return set(sorted(ranks, key=lambda at: ranks[at])[:most])


def _listed(marks: Iterable[_Mark], threshold: float) -> str:
    """Return scores by kind and class, so that the page's script counts what is not drawn: ``right 3 0.5 0.4;...``."""
    scores = defaultdict(list)
    for mark in marks:
        scores[f"{mark.kind} {mark.label}"].append("-" if mark.score is None else repr(_short(mark.score, threshold)))
    return ";".join(f"{of} {' '.join(found)}" for of, found in scores.items())


def _short(score: float, threshold: float) -> float:
    """Return a score with three digits unless that takes it across the threshold or a step of the page's slider."""
    short = round(score, 3)
    return short if all((short >= at) == (score >= at) for at in (threshold, round(score, 2))) else score


class _Drawing:
    """Boxes on one image; names are above all of them. Who comes first is on top and has the better place."""

    def __init__(self, frame: _Frame, key: str) -> None:
        self._frame, self._key = frame, key
        self._boxes: list[str] = []
        self._names: list[str] = []
        self._taken: list[tuple[float, float, float]] = []
        """Left, bottom and width of each name."""
        self._visible = 0

    def add(self, mark: _Mark) -> None:
        """Draw a box, all of whose corners are finite, with its name."""
        ends = np.array([self._frame.width + 10, self._frame.height + 10] * 2) / self._frame.scale
        x0, y0, x1, y1 = (np.clip(mark.box, -10 / self._frame.scale, ends) * self._frame.scale).tolist()
        shape = f'x="{x0:.1f}" y="{y0:.1f}" width="{max(x1 - x0, 0):.1f}" height="{max(y1 - y0, 0):.1f}"'
        when, hidden = "" if mark.score is None else f' data-s="{mark.score!r}"', "" if mark.visible else " hidden"
        self._boxes.append(
            f'<rect class="box {mark.kind}" data-c="{mark.label}"{when} {shape}{hidden}>'
            f"<title>{text(mark.title)}</title></rect>"
        )
        place = self._place(x0, y0, y1, len(mark.name) * _LETTER)
        self._names.append(f"<text {place}{hidden}>{text(mark.name)}</text>")
        self._visible += mark.visible

    def _place(self, left: float, top: float, bottom: float, width: float) -> str:
        """Return where a name goes: the first place at the box's left that is inside and free, else the first."""
        left, anchor, x = max(left + 3, 3), "", max(left + 3, 3)
        if left + width > self._frame.width:  # the width is a guess, so the right end is what must stay inside
            x, anchor = self._frame.width - 3, ' text-anchor="end"'
            left = x - width
        lowest, highest = self._frame.height - 3, _FONT - 4
        wanted = (top - 5, top + _FONT - 1, bottom + _FONT - 1, bottom - 6)
        inside = [y for y in wanted if highest <= y <= lowest] or [min(max(top + _FONT, highest), lowest)]
        y = next((y for y in inside if self._is_free(left, y, width)), inside[0])
        self._taken.append((left, y, width))
        return f'x="{x:.0f}" y="{y:.0f}"{anchor}'

    def _is_free(self, left: float, y: float, width: float) -> bool:
        return not any(
            abs(y - other_y) < _LINE and left < other_left + other_width and other_left < left + width
            for other_left, other_y, other_width in self._taken
        )

    def svg(self, image: int, name: str) -> str:
        """Return the drawing; all boxes at once are used again below themselves, wider and dark, as their rims."""
        crowded = " crowded" if self._visible > _CROWDED else ""
        size = f"{self._frame.width:.1f} {self._frame.height:.1f}"
        return (
            f'<svg class="picture{crowded}" viewBox="0 0 {size}" role="img" aria-label="{text(name)}">'
            f'<use href="#i{image}"/><use class="rims" href="#{self._key}"/>'
            f'<g id="{self._key}">{"".join(reversed(self._boxes))}</g>'
            f'<g class="names">{"".join(reversed(self._names))}</g></svg>'
        )
