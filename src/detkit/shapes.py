"""A small synthetic detection data set: labelled shapes on textured ground.

It serves the demo, the examples and the tests, so it is drawn and not downloaded.
"""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

if TYPE_CHECKING:
    from pathlib import Path

CLASSES = ("circle", "square", "star", "triangle")

Array = NDArray[np.float64]

_SUPERSAMPLING = 4
_MIN_VISIBLE = 0.7
"""No shape is hidden further by later ones: its class must stay plain to see."""


def write_shapes(folder: Path, *, num_images: int, size: int = 160, seed: int = 0) -> Path:
    """Draws square pictures into a Pascal VOC folder and returns it.

    Picture i depends on `seed`, `size` and i alone: a larger set begins with the smaller one.
    """
    images, annotations = folder / "JPEGImages", folder / "Annotations"
    images.mkdir(parents=True, exist_ok=True)
    annotations.mkdir(exist_ok=True)
    for number, child in enumerate(np.random.SeedSequence(seed).spawn(num_images), start=1):
        image, boxes, names = draw_scene(np.random.default_rng(child), size)
        image.save(images / f"{number:06}.jpg", quality=92)
        tree = _voc_annotation(f"{number:06}.jpg", size, boxes, names)
        tree.write(annotations / f"{number:06}.xml", encoding="utf-8")
    return folder


def draw_scene(rng: np.random.Generator, size: int) -> tuple[Image.Image, Array, list[str]]:
    """Draws one picture; returns it with the boxes (n, 4) and the class names of its shapes.

    A box has whole pixels and is tight around what later shapes leave visible.
    """
    canvas = _ground(rng, size)
    for _ in range(rng.integers(3, 9)):
        _paint_stroke(canvas, rng)
    names: list[str] = []
    wholes: list[Array] = []
    visible: list[Array] = []
    for _ in range(rng.integers(3, 8)):
        name = str(rng.choice(CLASSES))
        inside, border = _shape(rng, name, size)
        whole = np.maximum(inside, border)
        remaining = [mask * (1 - whole) for mask in visible]
        if any(left.sum() < _MIN_VISIBLE * mask.sum() for left, mask in zip(remaining, wholes, strict=True)):
            continue
        names.append(name)
        wholes.append(whole)
        visible = [*remaining, whole]
        _paint_shape(canvas, rng, inside, border)
    grain = rng.normal(0, 0.012, canvas.shape)
    image = Image.fromarray((255 * np.clip(canvas + grain, 0, 1)).round().astype(np.uint8))
    return image, np.array([_tight_box(mask) for mask in visible]), names


def _ground(rng: np.random.Generator, size: int) -> Array:
    """Two muted neighbouring colours, blended along a cloudy diagonal."""
    hue, value = rng.random(), rng.uniform(0.25, 0.92)
    first = _colour(hue, rng.uniform(0.08, 0.3), value)
    second = _colour(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.08, 0.3), value + rng.uniform(-0.2, 0.2))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:size, :size] / size - 0.5
    blend: Array = 0.5 + 0.6 * (np.cos(angle) * x + np.sin(angle) * y)
    blend += 0.35 * _clouds(rng, size, 5) + 0.12 * _clouds(rng, size, 24)
    return first + np.clip(blend, 0, 1)[..., None] * (second - first)


def _clouds(rng: np.random.Generator, size: int, cells: int) -> Array:
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)


def _paint_stroke(canvas: Array, rng: np.random.Generator) -> None:
    """A short bent line that carries no label: thin things are not what the detector looks for."""
    size = len(canvas)
    turns = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.5, 6))
    steps = size * rng.uniform(0.015, 0.05) * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    path = rng.uniform(0, size, 2) + np.cumsum(steps, axis=0)
    colour = _colour(rng.random(), rng.uniform(0.2, 0.7), rng.uniform(0.2, 0.95))
    _blend(canvas, 0.7 * _line_mask(size, path, size * rng.uniform(0.006, 0.014)), colour)


def _shape(rng: np.random.Generator, name: str, size: int) -> tuple[Array, Array]:
    """The coverage of a shape's inside and of its border, at a random place, size and rotation."""
    radius = size * rng.uniform(0.075, 0.2)
    centre = rng.uniform(1.1 * radius, size - 1.1 * radius, 2)
    corners = {"circle": 64, "square": 4, "star": 10, "triangle": 3}[name]
    angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(corners) / corners
    radii = np.full(corners, radius)
    if name == "star":
        radii[1::2] *= 0.45
    points = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    # Starting amid an edge gives every corner a rounded joint, the last one too.
    middle = (points[0] + points[-1]) / 2
    border = _line_mask(size, np.concatenate([[middle], points, [middle]]), size / 80)
    return _polygon_mask(size, points), border


def _paint_shape(canvas: Array, rng: np.random.Generator, inside: Array, border: Array) -> None:
    size = len(canvas)
    hue, saturation, value = rng.random(), rng.uniform(0.45, 0.9), rng.uniform(0.55, 1.0)
    shadow = Image.fromarray((255 * np.maximum(inside, border)).astype(np.uint8))
    shadow = shadow.filter(ImageFilter.GaussianBlur(size / 60))
    offset = round(size / 60)
    _blend(canvas, 0.35 / 255 * np.roll(np.asarray(shadow), (offset, offset), axis=(0, 1)), np.zeros(3))
    y, x = np.mgrid[:size, :size]
    height = (x + y) / size
    height = (height - height[inside > 0].mean()) / np.ptp(height[inside > 0])
    _blend(canvas, inside, _colour(hue, saturation, value) * (1 - 0.35 * height[..., None]))
    _blend(canvas, border, _colour(hue, saturation, 0.5 * value))


def _tight_box(visible: Array) -> Array:
    y, x = np.nonzero(visible > 0.5)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], dtype=np.float64)


def _polygon_mask(size: int, points: Array) -> Array:
    mask = Image.new("L", (_SUPERSAMPLING * size,) * 2)
    ImageDraw.Draw(mask).polygon((_SUPERSAMPLING * points).ravel().tolist(), fill=255)
    return _coverage(mask)


def _line_mask(size: int, points: Array, width: float) -> Array:
    mask = Image.new("L", (_SUPERSAMPLING * size,) * 2)
    path = (_SUPERSAMPLING * points).ravel().tolist()
    ImageDraw.Draw(mask).line(path, fill=255, width=round(_SUPERSAMPLING * width), joint="curve")
    return _coverage(mask)


def _coverage(mask: Image.Image) -> Array:
    return np.asarray(mask.reduce(_SUPERSAMPLING), dtype=np.float64) / 255


def _blend(canvas: Array, opacity: Array, colour: Array) -> None:
    covered = opacity > 0
    colours = np.broadcast_to(colour, canvas.shape)
    canvas[covered] += opacity[covered, None] * (colours[covered] - canvas[covered])


def _colour(hue: float, saturation: float, value: float) -> Array:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, min(max(value, 0), 1)))


def _voc_annotation(filename: str, size: int, boxes: Array, names: list[str]) -> ElementTree.ElementTree:
    root = ElementTree.Element("annotation")
    _add(root, "folder", "JPEGImages")
    _add(root, "filename", filename)
    dimensions = ElementTree.SubElement(root, "size")
    for tag, number in (("width", size), ("height", size), ("depth", 3)):
        _add(dimensions, tag, str(number))
    for name, (x0, y0, x1, y1) in zip(names, boxes.astype(int).tolist(), strict=True):
        item = ElementTree.SubElement(root, "object")
        _add(item, "name", name)
        _add(item, "truncated", "0")
        _add(item, "difficult", "0")
        box = ElementTree.SubElement(item, "bndbox")
        # VOC counts pixels from 1 and includes the last one.
        for tag, number in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
            _add(box, tag, str(number))
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)


def _add(parent: ElementTree.Element, tag: str, text: str) -> None:
    ElementTree.SubElement(parent, tag).text = text
