"""Images with their boxes as drawings: each image is embedded once, and shown as often as there are entries."""

from __future__ import annotations

from collections.abc import Iterator
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
_MOST_BOXES = 100
"""Detections drawn on one image; all from the best threshold on are, whatever their number."""
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

    def _truth(self, image: int) -> str:
        data, drawing = self._data, _Drawing(self._frames[image])
        count = 0
        for row in self._objects(image):
            name = data.classes[data.labels[row]]
            why = "crowd" if data.crowd[row] else "difficult" if data.difficult[row] else ""
            count += not why
            title = f"{name} ({why})" if why else name
            drawing.add(_Mark(data.boxes[row], IGNORED if why else "truth", int(data.labels[row]), title, title))
        said = f'<span class="said"><b>{count}</b> object{"" if count == 1 else "s"}</span>'
        return f'<div class="tile">{drawing.svg(image, "ground truth")}<p><b>ground truth</b><br>{said}</p></div>'

    def _found(self, image: int, at: int) -> str:
        judged, drawing = self.judged[at], _Drawing(self._frames[image])
        counts = dict.fromkeys((RIGHT, FALSE, MISSED, IGNORED), 0)
        for mark in (*self._detections(image, judged), *self._missed(image, judged)):
            drawing.add(mark)
            counts[mark.kind] += mark.visible
        del counts[IGNORED]
        said = " ".join(f'<span class="said {kind}"><b>{count}</b> {kind}</span>' for kind, count in counts.items())
        return (
            f'<div class="tile found" data-best="{judged.threshold:.6f}">'
            f"{drawing.svg(image, self._comparison.entries[at].name)}<p>{label(self._comparison, at)}<br>"
            f'<span class="from">from {judged.threshold:.2f}</span> {said}</p></div>'
        )

    def _detections(self, image: int, judged: Judged) -> Iterator[_Mark]:
        for rank, row in enumerate(judged.on(image)):
            score, kind, of_class = float(judged.scores[row]), str(judged.kinds[row]), int(judged.labels[row])
            if score < (self.lowest if rank < _MOST_BOXES else judged.threshold):
                return
            name = self._data.classes[of_class]
            title, visible = f"{name} {score:.3f}, {kind}", score >= judged.threshold
            yield _Mark(judged.boxes[row], kind, of_class, f"{name} {score:.2f}", title, score, visible)

    def _missed(self, image: int, judged: Judged) -> Iterator[_Mark]:
        for row in self._objects(image):
            if judged.counts[row]:
                of_class, found_at = int(self._data.labels[row]), float(judged.found_at[row])
                name, visible = self._data.classes[of_class], found_at < judged.threshold
                yield _Mark(self._data.boxes[row], MISSED, of_class, name, f"{name}, missed", found_at, visible)


class _Drawing:
    """Boxes on one image; names are above all of them. Who comes first is on top and has the better place."""

    def __init__(self, frame: _Frame) -> None:
        self._frame = frame
        self._boxes: list[str] = []
        self._names: list[str] = []
        self._taken: list[tuple[float, float, float]] = []
        """Left, bottom and width of each name."""
        self._visible = 0

    def add(self, mark: _Mark) -> None:
        """Draw a box with its name."""
        width, height = self._frame.width, self._frame.height
        if not np.isfinite(mark.box).all():
            return
        x0, y0, x1, y1 = np.clip(mark.box * self._frame.scale, -10, [width + 10, height + 10] * 2).tolist()
        shape = f'x="{x0:.1f}" y="{y0:.1f}" width="{max(x1 - x0, 0):.1f}" height="{max(y1 - y0, 0):.1f}"'
        when, hidden = "" if mark.score is None else f' data-s="{mark.score:.6f}"', "" if mark.visible else " hidden"
        self._boxes.append(
            f'<g class="box {mark.kind}" data-c="{mark.label}"{when}{hidden}><title>{text(mark.title)}</title>'
            f'<rect class="rim" {shape}/><rect class="line" {shape}/></g>'
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
        """Return the drawing."""
        crowded = " crowded" if self._visible > _CROWDED else ""
        size = f"{self._frame.width:.1f} {self._frame.height:.1f}"
        return (
            f'<svg class="picture{crowded}" viewBox="0 0 {size}" role="img" aria-label="{text(name)}">'
            f'<use href="#i{image}"/>{"".join(reversed(self._boxes))}'
            f'<g class="names">{"".join(reversed(self._names))}</g></svg>'
        )
