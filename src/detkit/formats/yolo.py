"""YOLO: a text file of ``class cx cy w h`` lines for each image, in shares of its sides, and a ``data.yaml``.

Shares next to a whole pixel become that pixel. A line with an outline instead of a box, ``class x1 y1 x2 y2 ...``,
becomes the box around it, and the outline a mask; nine columns may also be an oriented box, whose four corners are such
an outline. An image without a label file is, by YOLO's own convention, one without objects.
"""

from __future__ import annotations

import math
import warnings
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from msgspec import Meta

from detkit.errors import DetkitWarning, InvalidData
from detkit.files import inside
from detkit.formats import Format
from detkit.formats.checks import as_displayed
from detkit.formats.findings import raise_errors
from detkit.formats.imagefiles import LARGEST_SIDE, is_file, place_images, require_finite, walk
from detkit.formats.rows import CLASS_FILE, Rows, read_class_names
from detkit.formats.splits import join, parts, require_split_names
from detkit.formats.textlines import file_error, line_error, read_lines, read_number
from detkit.formats.yololayout import SPLIT_KEYS, find_layout, is_yolo_yaml, orphans, plain_folders, twin, twin_folder
from detkit.images import EXTENSIONS
from detkit.params import Options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from detkit.data import Dataset
    from detkit.formats.findings import Finding
    from detkit.formats.yololayout import Layout

_SLACK = 0.01
"""How far beyond 0..1 a share may lie, as in Ultralytics; whether a box hangs over its image is for a check to say."""
_ROUNDING = 0.8e-6
"""How far an edge may lie from the pixel it stands for: six decimals of a centre, 0.5e-6, and half a size, 0.25e-6."""
_ALL_DECIMALS = 17
"""Shares with as many decimals, zeros included, are not rounded to whole pixels; we write so what is no whole pixel."""
_SNIFFED = 4


class YoloOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to read YOLO."""

    classes: Annotated[
        tuple[str, ...],
        Meta(description="class names in order of their numbers; those of data.yaml or classes.txt if absent"),
    ] = ()
    unlabelled: Annotated[
        Literal["negatives", "raise", "ignore"], Meta(description="what an image without a label file means")
    ] = "negatives"


def sniff(path: Path) -> bool:
    """Return whether a data.yaml names classes and splits, or images and YOLO's labels lie beside each other."""
    if path.is_file():
        return path.suffix.lower() in {".yaml", ".yml"} and is_yolo_yaml(path)
    if not path.is_dir():
        return False
    if any(is_yolo_yaml(file) for pattern in ("*.yaml", "*.yml") for file in islice(path.glob(pattern), _SNIFFED)):
        return True
    return any(_holds_labels(path / twin_folder(f"{folder}/")) for folder in plain_folders(path))


def read(path: Path, options: YoloOptions) -> Dataset:
    """Read images, labels and splits. Raises one `InvalidData` with everything that is wrong."""
    findings: list[Finding] = []
    layout = find_layout(path, findings)
    described = not findings
    if not layout.splits:
        raise_errors(findings)
    given = options.classes or layout.classes
    classes = read_class_names(layout.root, (), "YOLO", file=layout.names_file) if given is None else given
    read: list[tuple[str, Dataset]] = []
    labelled: dict[str, int] = {}
    for split, images in layout.splits.items():
        rows = Rows(findings, normalised=_ROUNDING)
        labelled[split] = _add_images(rows, layout, images, classes, options)
        read.append((split, rows.dataset(classes)))
    everything = {image for images in layout.splits.values() for image in images}
    findings += [*orphans(layout, everything), *_shared(layout, everything)]
    if everything and not any(labelled.values()):
        findings.append(
            file_error(
                "no-labels",
                layout.root,
                f"none of {len(everything)} images has a label file; looked for {twin(min(everything))} and the like",
            )
        )
    if not described:
        raise_errors(findings)
    data = join(read or [("", Rows(findings).dataset(classes))], findings)
    bare = [f"{split} ({len(images)})" for split, images in layout.splits.items() if images and not labelled[split]]
    if bare and options.unlabelled == "negatives":
        warnings.warn(
            f"no image of {', '.join(bare)} has a label file; all are taken for images without objects. "
            "unlabelled='ignore' leaves them out",
            DetkitWarning,
            stacklevel=3,
        )
    return data


def _holds_labels(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = (name for name in walk(folder) if name.endswith(".txt") and PurePosixPath(name).name != CLASS_FILE)
    lines = [read_lines(folder / name, [])[:1] for name in islice(names, _SNIFFED)]
    first = [line for found in lines for _, line in found]
    return bool(lines) and (not first or any(isinstance(_parse(line), _Line) for line in first))


def _add_images(
    rows: Rows, layout: Layout, images: dict[str, str], classes: Sequence[str], options: YoloOptions
) -> int:
    """Add the images of a split with their boxes; return how many have a label file."""
    count = 0
    for image, name in images.items():
        labels = layout.root / twin(image)
        if is_file(labels):
            count += 1
            rows.add_image(name, str(layout.root / image), source=str(labels))
            _add_boxes(rows, labels, classes)
        elif options.unlabelled == "negatives":
            rows.add_image(name, str(layout.root / image), source="")
        elif options.unlabelled == "raise":
            message = (
                f"has no label file {twin(image)}. unlabelled='negatives' says that nothing is on it, "
                "unlabelled='ignore' leaves it out"
            )
            rows.findings.append(file_error("unlabelled", layout.root / image, message))
    return count


def _add_boxes(rows: Rows, file: Path, classes: Sequence[str]) -> None:
    for number, text in read_lines(file, rows.findings):
        line = _parse(text)
        if not isinstance(line, _Line):
            rows.findings.append(line_error(line[0], file, number, line[1]))
        elif not 0 <= line.label < len(classes):
            message = f"class {line.label} has no name: there are {len(classes)}, counted from 0"
            rows.findings.append(line_error("unknown-class", file, number, message))
        else:
            rows.add_box(line.corners, line.label, number - 1, polygon=line.polygon, exact=line.exact)


class _Line(NamedTuple):
    label: int
    corners: Sequence[float]
    polygon: Sequence[float]
    exact: bool


def _parse(text: str) -> _Line | tuple[str, str]:
    """Return what a line says, or the code of what is wrong and a message."""
    fields = text.split()
    values = [read_number(field) for field in fields]
    if len(fields) == 6:
        return "predictions", "6 columns: the last is a confidence, so these are predictions; expected class cx cy w h"
    if len(fields) != 5 and (len(fields) < 7 or len(fields) % 2 == 0):
        return "bad-columns", f"{len(fields)} columns; expected class cx cy w h, or class x1 y1 x2 y2 x3 y3 ..."
    wrong = [field for field, value in zip(fields, values, strict=True) if math.isnan(value)]
    if wrong:
        return "bad-number", f"{wrong[0][:40]!r} is not a number; expected class cx cy w h"
    label, *shares = values
    if not label.is_integer() or abs(label) > LARGEST_SIDE:
        return "bad-class", f"class {fields[0][:40]} is no whole number"
    beyond = [value for value in shares if not -_SLACK <= value <= 1 + _SLACK]
    if beyond:
        what = "pixels, or percentages" if max(beyond) > 1 else "coordinates of another kind"
        return "not-normalised", f"{beyond[0]:g} is no share of the image's side, from 0 to 1; these look like {what}"
    if len(shares) == 4:
        cx, cy, w, h = shares
        exact = all(len(field.partition(".")[2]) == _ALL_DECIMALS for field in fields[1:])
        return _Line(int(label), (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), (), exact)
    xs, ys = shares[::2], shares[1::2]
    return _Line(int(label), (min(xs), min(ys), max(xs), max(ys)), shares, False)


def _shared(layout: Layout, images: set[str]) -> Iterator[Finding]:
    first: dict[str, str] = {}
    for image in sorted(images):
        other = first.setdefault(twin(image), image)
        if other != image and is_file(layout.root / twin(image)):
            message = f"it would be about both {other} and {image}; rename one of them"
            yield file_error("shared-labels", layout.root / twin(image), message)


def write(data: Dataset, folder: Path, _options: Options) -> None:
    """Write ``data.yaml``, images and labels, in a folder for each split where no image is in two.

    Otherwise, all images lie in one folder, and a list names those of each split. Raises `InvalidData` for an image
    that YOLO's readers would not find, one that has another size than the data says, and a box far beyond its image.
    """
    import yaml

    require_finite(data)
    require_split_names(data)
    _require_names(data)
    data = as_displayed(data)
    pieces = parts(data)
    apart = sum(map(len, pieces.values())) == len(data)
    places: dict[str, str] = {}
    for split, part in pieces.items() if apart else [("", data)]:
        if not len(part):  # an empty folder does not survive an archive or a bucket
            places[split] = f"{split}.txt"
            (folder / places[split]).write_text("", encoding="utf-8")
            continue
        images = f"images/{split}" if split else "images"
        (folder / images).mkdir(parents=True, exist_ok=True)
        place_images(part, folder / images)
        for i, image_id in enumerate(part.image_ids):
            labels = folder / inside(twin(f"{images}/{image_id}"))
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text("".join(_lines(part, i)), encoding="utf-8")
        places[split] = images
    if not apart:
        places = {split: f"{split}.txt" for split in pieces}
        for split, part in pieces.items():
            # Ultralytics takes "./" for the list's own folder, and anything else for the current one.
            lines = "".join(f"./images/{image_id}\n" for image_id in part.image_ids)
            (folder / places[split]).write_text(lines, encoding="utf-8")
    if "" in places:
        places = {"train": places[""], "val": places[""]}
    description: dict[str, Any] = {key: places[key] for key in SPLIT_KEYS if key in places}
    others = {split: place for split, place in places.items() if split not in SPLIT_KEYS}
    description |= {"splits": others} if others else {}
    description |= {"nc": len(data.classes), "names": dict(enumerate(data.classes))}
    text = yaml.safe_dump(description, allow_unicode=True, sort_keys=False)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def _require_names(data: Dataset) -> None:
    first: dict[str, str] = {}
    for image_id in data.image_ids:
        path = PurePosixPath(inside(image_id))
        if path.suffix.lower() not in EXTENSIONS or any(part.startswith((".", "__MACOSX")) for part in path.parts):
            raise InvalidData(f"image id {image_id!r} is none that YOLO readers would find; rename it")
        if image_id != image_id.strip() or len(image_id.splitlines()) != 1:
            raise InvalidData(f"image id {image_id!r} cannot stand on a line of a list; rename it")
        other = first.setdefault(twin(f"images/{image_id}"), image_id)
        if other != image_id:
            raise InvalidData(f"images {other!r} and {image_id!r} would share one label file; rename one of them")
    for name in data.classes:
        if not name or name != name.strip():
            raise InvalidData(f"the class name {name!r} cannot stand in data.yaml; rename it")


def _lines(data: Dataset, image: int) -> Iterator[str]:
    rows = slice(int(data.offsets[image]), int(data.offsets[image + 1]))
    width, height = data.sizes[image].tolist()
    x0, y0, x1, y1 = data.boxes[rows].T
    shares = np.stack([(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height], axis=1)
    if len(shares) and (shares.min() < -_SLACK or shares.max() > 1 + _SLACK):
        raise InvalidData(
            f"{data.image_ids[image]}: a box lies beyond the image, which YOLO cannot say; "
            "run `detkit check` and mend it"
        )
    whole = (data.boxes[rows] == np.rint(data.boxes[rows])).all(axis=1)
    for label, values, short in zip(data.labels[rows].tolist(), shares.tolist(), whole.tolist(), strict=True):
        texts = (repr(value) if short else f"{value:.{_ALL_DECIMALS}f}" for value in values)
        yield f"{label} {' '.join(texts)}\n"


FORMAT = Format(
    name="yolo",
    summary="YOLO: data.yaml, images/ and labels/*.txt with class cx cy w h, or the same in train/, valid/, test/",
    sniff=sniff,
    read=read,
    write=write,
    options=YoloOptions,
    carries=frozenset({"image_ids", "classes", "split_indices"}),
)
