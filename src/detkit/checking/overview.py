"""One page about a data set, to look at: counts, samples of each class, sizes and places of boxes, findings.

The page is a single file that fetches nothing. Every text from the data is escaped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PillowImage

from detkit import images
from detkit.errors import ImageError
from detkit.files import atomic_write
from detkit.formats.findings import count_codes
from detkit.pages import data_uri, text
from detkit.progress import track

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from detkit.data import Dataset
    from detkit.formats.findings import Finding

SAMPLES = 8
"""Pictures of each class."""
SMALL_SIDE, MEDIUM_SIDE = 32, 96
"""Sides in pixels of a square below which COCO calls an object small, and medium (areas of 32 and 96 squared)."""

_CROP_SIDE, _MARGIN = 112, 0.15
_GRID = 32
_MOST_CLASSES = 100
"""Classes of which samples are shown; the tables have all."""
_BARS = 24

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --faint: #667; --ground: #fff; --bar: #3b7dd8; --line: #d5dae2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --faint: #9aa3b0; --ground: #14181e; --bar: #6aa3f0; --line: #333b47; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 2rem auto;
  max-width: 1100px; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; }
.tiles div { border: 1px solid var(--line); border-radius: 8px; padding: .5rem 1rem; }
.tiles b { display: block; font-size: 1.4rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption, .faint { color: var(--faint); font-size: .85rem; }
svg { width: 100%; height: auto; } svg rect { fill: var(--bar); } svg text { fill: var(--faint); font-size: 11px; }
svg line { stroke: var(--line); }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .25rem .75rem .25rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { background: var(--bar); height: .7rem; border-radius: 2px; min-width: 1px; }
.crops { display: flex; flex-wrap: wrap; gap: 4px; } .crops img { height: 112px; border-radius: 4px; }
.map img { width: 100%; max-width: 320px; image-rendering: pixelated; border: 1px solid var(--line); }
.error { color: #d33; font-weight: 600; } .warning { color: #b70; font-weight: 600; } .note { color: var(--faint); }
"""


def write_overview(data: Dataset | None, findings: Sequence[Finding], file: Path, *, title: str) -> None:
    """Write the page; of data that cannot be read at all, None, it has the findings only.

    Images that cannot be read are left out of the samples; the findings name them.
    """
    page = "\n".join(_page(data, findings, title))
    with atomic_write(file) as stream:
        stream.write(page.encode())


def _page(data: Dataset | None, findings: Sequence[Finding], title: str) -> Iterator[str]:
    severities = {name: sum(f.severity == name for f in findings) for name in ("error", "warning", "note")}
    yield '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{text(title)}</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>{text(title)}</h1>"
    tiles: dict[str, int] = {}
    if data is not None:
        tiles = {"images": len(data), "boxes": len(data.boxes), "classes": len(data.classes)}
        tiles |= {f"split {name}": len(at) for name, at in data.split_indices.items()}
    tiles |= {f"{name}s": count for name, count in severities.items()}
    yield '<div class="tiles">'
    yield from (f"<div><b>{count:,}</b>{text(name)}</div>" for name, count in tiles.items())
    yield "</div>"
    yield from _findings(findings)
    if data is not None:
        yield from _classes(data)
        yield from _boxes(data)
    yield "</body></html>"


def _boxes(data: Dataset) -> Iterator[str]:
    yield "<h2>Boxes</h2><div class='charts'>"
    sides = np.sqrt(np.maximum((data.boxes[:, 2] - data.boxes[:, 0]) * (data.boxes[:, 3] - data.boxes[:, 1]), 0))
    small, medium = int((sides < SMALL_SIDE).sum()), int(((sides >= SMALL_SIDE) & (sides < MEDIUM_SIDE)).sum())
    sizes = f"small (below {SMALL_SIDE}²) {small:,}, medium {medium:,}, large (from {MEDIUM_SIDE}²) "
    yield _histogram(sides, "Size: square root of the area, pixels", f"{sizes}{len(sides) - small - medium:,}")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (data.boxes[:, 2] - data.boxes[:, 0]) / (data.boxes[:, 3] - data.boxes[:, 1])
    yield _histogram(ratios, "Shape: width / height", "")
    counts = data.boxes_per_image().astype(np.float64)
    empty = int((counts == 0).sum())
    fullest = data.image_ids[int(np.argmax(counts))] if len(data) else ""
    most = f"{int(counts.max(initial=0)):,} on {fullest}; {empty:,} images without"
    yield _histogram(counts, "Boxes of an image", most)
    yield _heat_map(data)
    yield "</div>"


def _findings(findings: Sequence[Finding]) -> Iterator[str]:
    yield "<h2>Findings</h2>"
    if not findings:
        yield "<p>None.</p>"
        return
    yield "<table><tr><th>code</th><th>how often</th><th>the first one</th></tr>"
    for code, count in count_codes(findings).items():
        first = next(finding for finding in findings if finding.code == code)
        place = ": ".join(part for part in (first.file, first.place) if part)
        yield (
            f'<tr><td class="{first.severity}">{text(code)}</td><td class="n">{count:,}</td>'
            f'<td>{text(first.message)}<div class="faint">{text(place)}</div></td></tr>'
        )
    yield "</table>"


def _classes(data: Dataset) -> Iterator[str]:
    counts = data.boxes_per_class()
    most = max([*counts.values(), 1])
    yield "<h2>Classes</h2><table><tr><th>class</th><th>boxes</th><th></th></tr>"
    for name, count in counts.items():
        width = 100 * count / most
        yield (
            f'<tr><td>{text(name)}</td><td class="n">{count:,}</td>'
            f'<td style="width:50%"><div class="bar" style="width:{width:.1f}%"></div></td></tr>'
        )
    yield "</table>"
    shown = [name for name in data.classes if counts[name]][:_MOST_CLASSES]
    crops = _crops(data, shown)
    for name in shown:
        yield f'<h2>{text(name)}</h2><div class="crops">'
        yield from (f'<img alt="{text(alt)}" src="{source}">' for alt, source in crops[name])
        yield "</div>"


def _crops(data: Dataset, names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Return pictures of some boxes of each class, spread over the data set; each image is decoded once."""
    owner = np.repeat(np.arange(len(data)), data.boxes_per_image())
    chosen: dict[int, list[int]] = {}
    for name in names:
        of_class = np.flatnonzero(data.labels == data.classes.index(name))
        spread = np.linspace(0, len(of_class) - 1, min(SAMPLES, len(of_class))).astype(int)
        for row in of_class[spread].tolist():
            chosen.setdefault(int(owner[row]), []).append(row)
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for i, rows in track(sorted(chosen.items()), "samples", total=len(chosen)):
        try:
            pixels = images.read_image(data.paths[i])
        except ImageError:
            continue
        for row in rows:
            crop = _crop(pixels, data.boxes[row])
            if crop is not None:
                found[data.classes[int(data.labels[row])]].append((data.image_ids[i], data_uri(crop, "JPEG")))
    return found


def _crop(pixels: images.Image, box: NDArray[np.float64]) -> PillowImage.Image | None:
    height, width = pixels.shape[:2]
    if not np.isfinite(box).all():
        return None
    margin = _MARGIN * max(box[2] - box[0], box[3] - box[1], 8)
    x0, y0 = np.clip(np.floor(box[:2] - margin), 0, [width, height]).astype(int)
    x1, y1 = np.clip(np.ceil(box[2:] + margin), 0, [width, height]).astype(int)
    if x1 - x0 < 1 or y1 - y0 < 1:
        return None
    crop = PillowImage.fromarray(np.ascontiguousarray(pixels[y0:y1, x0:x1]))
    wanted = max(1, min(3 * _CROP_SIDE, round(crop.width * _CROP_SIDE / crop.height)))
    return crop.resize((wanted, _CROP_SIDE), PillowImage.Resampling.BICUBIC)


def _histogram(values: NDArray[np.float64], caption: str, remark: str) -> str:
    """Return a bar chart with bins of equal ratio where the values span much, else of equal width."""
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    low, high = float(values.min()), float(values.max())
    if low > 0 and high > 20 * low:
        edges = np.geomspace(low, high, _BARS + 1)
    else:
        whole = bool((values == np.rint(values)).all()) and high - low < _BARS
        edges = np.arange(low, high + 2) - 0.5 if whole else np.linspace(low, max(high, low + 1e-9), _BARS + 1)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    counts, _ = np.histogram(values, edges)
    width, height, base = 320, 130, 110
    step = width / len(counts)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{base - 100 * n / counts.max():.1f}" width="{max(step - 1, 0.5):.1f}" '
        f'height="{100 * n / counts.max():.1f}">'
        f"<title>{_short(edges[i])} to {_short(edges[i + 1])}: {n:,}</title></rect>"
        for i, n in enumerate(counts.tolist())
    )
    labels = (("start", 0, low), ("end", width, high))
    texts = "".join(f'<text x="{x}" y="{base + 15}" text-anchor="{a}">{_short(v)}</text>' for a, x, v in labels)
    middle = _short(float(np.median(values)))
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(caption)}">'
        f'{bars}<line x1="0" x2="{width}" y1="{base}" y2="{base}"/>{texts}</svg>'
        f"<figcaption>{text(caption)}; median {middle}{f'. {text(remark)}' if remark else ''}</figcaption></figure>"
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"


def _heat_map(data: Dataset) -> str:
    """Return how often each place of the picture is inside a box, on a grid over images of any size."""
    owner = np.repeat(np.arange(len(data)), data.boxes_per_image())
    sizes = np.concatenate([data.sizes, data.sizes], axis=1)[owner]
    usable = np.isfinite(data.boxes).all(axis=1) & (sizes > 0).all(axis=1)
    share = np.clip(data.boxes[usable] / sizes[usable], 0, 1) * _GRID
    low, high = np.floor(share[:, :2]).astype(int), np.ceil(share[:, 2:]).astype(int)
    # Each box adds 1 between its corners: differences at the corners, summed up along both axes.
    edges = np.zeros((_GRID + 1, _GRID + 1), dtype=np.int64)
    np.add.at(edges, (low[:, 1], low[:, 0]), 1)
    np.add.at(edges, (high[:, 1], high[:, 0]), 1)
    np.add.at(edges, (low[:, 1], high[:, 0]), -1)
    np.add.at(edges, (high[:, 1], low[:, 0]), -1)
    heat = edges.cumsum(axis=0).cumsum(axis=1)[:_GRID, :_GRID]
    strength = (255 * heat / max(int(heat.max()), 1)).astype(np.uint8)
    ramp = np.stack([strength, (strength * 0.55).astype(np.uint8), 96 - (strength * 0.3).astype(np.uint8)], axis=2)
    source = data_uri(PillowImage.fromarray(ramp), "PNG")
    return (
        f'<figure class="map"><img alt="places of boxes" src="{source}">'
        f"<figcaption>Places: how many boxes cover each part of the picture; the brightest {int(heat.max()):,}"
        "</figcaption></figure>"
    )
