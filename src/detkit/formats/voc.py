"""Pascal VOC: one XML file per image.

Pixels count from 1 and the last one is included: ``xmin - 1, ymin - 1, xmax, ymax`` is detkit's box. Many tools write
plain 0-based corners instead; ``origin`` says which, and "auto" takes a coordinate of 0 as proof for the whole set.
Only an object's own ``<name>``, ``<bndbox>`` and ``<difficult>`` count: a ``<part>`` is left alone. Other simple
children (pose, truncated ...) are kept for writing; what stands above the objects (source, segmented ...) is not.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from msgspec import Meta

from detkit.boxes import Boxes, area
from detkit.data import Dataset
from detkit.errors import DetkitWarning, ImageError, InvalidData, did_you_mean
from detkit.formats import Format
from detkit.formats.findings import image_finding, raise_errors
from detkit.formats.imagefiles import leaves, read_headers, stem, walk
from detkit.formats.splits import SPLIT_FOLDERS
from detkit.formats.vocwriter import carries_key, write
from detkit.formats.vocxml import Objects, xml_error
from detkit.images import EXTENSIONS
from detkit.params import Options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detkit.formats.findings import Finding

_ANNOTATION_FOLDERS = ("annotations", "annotation", "xml", "xmls", "labels")
_IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img", "pictures", "photos")
_MASK_FOLDERS = frozenset({"segmentationclass", "segmentationobject", "trimaps"})
"""Folders, in lower case, whose pictures are masks."""
_SNIFFED = 4
"""XML files of a folder that are looked into for its format."""


class VocOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to read Pascal VOC."""

    origin: Annotated[
        Literal["auto", 1, 0],
        Meta(description="name of the first pixel: 1 (the last pixel of a box included) or 0 (excluded)"),
    ] = "auto"
    classes: Annotated[
        tuple[str, ...], Meta(description="class names in order; where not given, those that occur, sorted")
    ] = ()
    unannotated: Annotated[
        Literal["raise", "negatives", "ignore"], Meta(description="what an image without an XML file means")
    ] = "raise"


def sniff(path: Path) -> bool:
    """Return whether a folder, one below it, or one below ``annotations``, holds a VOC annotation."""
    if not path.is_dir():
        return False
    root = _unwrap(path)
    below = [entry for entry in _visible(root) if entry.is_dir()]
    nested = [e for d in below if d.name.lower() in _ANNOTATION_FOLDERS for e in _visible(Path(d)) if e.is_dir()]
    return any(_holds_voc(Path(folder)) for folder in (root, *below, *nested))


def read(path: Path, options: VocOptions) -> Dataset:
    """Read every XML file below a folder. Raises one `InvalidData` with everything that is wrong in all of them."""
    if not path.is_dir():
        raise InvalidData(f"{path}: expected the folder of a Pascal VOC data set")
    layout = _find(_unwrap(path))
    found = Objects([f"{layout.annotations}/{file}" for file in layout.xml])
    found.findings += _unused(layout, options.unannotated)
    image_of = _match_images(layout, found)
    spare = sorted(set(layout.images) - set(image_of))
    if options.unannotated == "raise":
        found.findings += [
            xml_error(
                "unannotated",
                str(layout.pictures / name),
                "has no XML file. in Python, read_dataset(..., unannotated='negatives') says that nothing is on it, "
                "unannotated='ignore' leaves it out",
            )
            for name in spare
        ]
    extra_images = spare if options.unannotated == "negatives" else []
    classes = _classes(found, options.classes)
    image_ids = [name or "" for name in image_of] + extra_images
    splits = _splits(layout, image_ids, found)
    found.findings += [
        xml_error("image-twice", str(layout.pictures / name), f"{count} XML files are about this image; expected one")
        for name, count in Counter(filter(None, image_of)).items()
        if count > 1
    ]
    data = _dataset(layout, found, classes, image_ids, splits, options.origin)
    raise_errors(found.findings, partial=data)
    return data


@dataclass(frozen=True)
class _Layout:
    """Where annotations and images lie; files are named relative to those two folders."""

    root: Path
    annotations: Path
    pictures: Path
    xml: list[str]
    images: list[str]
    unused_xml: dict[str, list[str]]
    """Annotations of other folders at the top of ``root``."""
    unused_images: dict[str, list[str]]


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith((".", "__MACOSX"))), key=lambda e: e.name)


def _unwrap(folder: Path) -> Path:
    """Step into the only folder of a folder, as in ``VOCdevkit/VOC2007`` or an unpacked archive."""
    entries = _visible(folder)
    while len(entries) == 1 and entries[0].is_dir() and not any(_holds_voc(Path(f)) for f in (folder, entries[0])):
        folder = Path(entries[0])
        entries = _visible(folder)
    return folder


def _holds_voc(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        found = [e for e in entries if e.name[-4:].lower() == ".xml" and not e.name.startswith((".", "__MACOSX"))]
    files = (Path(entry) for entry in sorted(found, key=lambda e: e.name) if entry.is_file())
    return any(map(_is_annotation, islice(files, _SNIFFED)))


def _is_annotation(file: Path) -> bool:
    """Return whether the outermost element is ``<annotation>``, as far as the beginning of a file tells."""
    try:
        with file.open("rb") as stream:
            beginning = re.sub(rb"\0|<!--.*?-->", b"", stream.read(4096), flags=re.DOTALL)
    except OSError:
        return True  # reading it says what is wrong
    element = re.search(rb"<([A-Za-z_][^\s/>]*)", beginning)
    return element is not None and element[1] == b"annotation"


def _find(root: Path) -> _Layout:
    xml: dict[str, list[str]] = {}
    images: dict[str, list[str]] = {}
    for name in sorted(walk(root)):
        suffix = f".{name.rpartition('.')[2].lower()}"
        top, _, rest = name.rpartition("/") if name.count("/") == 0 else name.partition("/")
        if suffix == ".xml":
            xml.setdefault(top, []).append(rest)
        elif suffix in EXTENSIONS and _MASK_FOLDERS.isdisjoint(name.lower().split("/")):
            images.setdefault(top, []).append(rest)
    if not xml:
        raise InvalidData(f"{root}: no XML files; expected a Pascal VOC folder with Annotations/*.xml and JPEGImages/")
    if not images:
        raise InvalidData(f"{root}: no image files beside the XML files; looked for {', '.join(sorted(EXTENSIONS))}")
    # Other XML means nothing here, unless there is nothing else.
    xml = {top: names for top, names in xml.items() if any(_is_annotation(root / top / n) for n in names)} or xml
    annotation_folder = _choose(xml, _ANNOTATION_FOLDERS)
    image_folder = _choose(images, _IMAGE_FOLDERS)
    if annotation_folder is None and image_folder is None and set(xml) <= set(images) and len(images) > 1:
        # XML beside the images in several folders, for example train/, valid/, test/; one of them may have no XML.
        return _Layout(root, root, root, _under(xml, sorted(xml)), _under(images, sorted(images)), {}, {})
    annotation_folder = annotation_folder or max(sorted(xml), key=lambda top: len(xml[top]))
    if image_folder is None:
        beside_xml = annotation_folder in images
        image_folder = annotation_folder if beside_xml else max(sorted(images), key=lambda top: len(images[top]))
    annotations, pictures = root / annotation_folder, root / image_folder
    return _Layout(root, annotations, pictures, xml.pop(annotation_folder), images.pop(image_folder), xml, images)


def _unused(layout: _Layout, unannotated: str) -> Iterator[Finding]:
    """Yield an error for each folder that is not read; images may be left out where the user says so."""
    what = f"only {layout.annotations} is read. move them there, or read the folders one by one"
    for top, names in layout.unused_xml.items():
        yield xml_error("unused-folder", str(layout.root / top), f"{len(names)} XML files are not read: {what}")
    what = f"only {layout.pictures} is read. move them there, or keep them elsewhere; in Python, "
    what += "read_dataset(..., unannotated='ignore') leaves them out"
    for top, names in layout.unused_images.items() if unannotated != "ignore" else ():
        yield xml_error("unused-folder", str(layout.root / top), f"{len(names)} images are not read: {what}")


def _under(files: dict[str, list[str]], tops: list[str]) -> list[str]:
    return [f"{top}/{name}" if top else name for top in tops for name in files[top]]


def _choose(files: dict[str, list[str]], known: tuple[str, ...]) -> str | None:
    by_name = {top.lower(): top for top in files}
    return next((by_name[name] for name in known if name in by_name), None)


def _match_images(layout: _Layout, found: Objects) -> list[str | None]:
    """Return each XML file's image: the one of its own name first, then the one that ``<filename>`` names."""
    by_stem: dict[str, list[str]] = {}
    for image in layout.images:
        by_stem.setdefault(stem(image), []).append(image)
    by_name: dict[str, list[str]] = {}
    matched: list[str | None] = []
    contradicting: list[str] = []
    for xml, file, filename in zip(layout.xml, found.files, found.filenames, strict=True):
        own = stem(xml)
        fitting = by_stem.get(own, [])
        if len(fitting) == 1 and filename == _name(fitting[0]) and "\\" not in filename:
            matched.append(fitting[0])
            continue
        if not by_name:  # the rule is that both names agree, and then it is not needed
            for image in layout.images:
                name = _name(image)
                by_name.setdefault(name, []).append(image)
                by_name.setdefault(stem(name), []).append(image)
        own_name, written = _name(own), _name(filename.replace("\\", "/").rstrip("/"))
        candidates = fitting or by_name.get(own_name, [])
        # An absolute path to a file of the XML's own name is some tool's habit, and not followed.
        if leaves(filename) and (not candidates or stem(written) != own_name):
            found.findings.append(
                xml_error(
                    "outside-folder",
                    file,
                    f"<filename> {filename!r} leads out of the image folder; expected a file name in it",
                )
            )
            matched.append(None)
            continue
        named = by_name.get(written) or by_name.get(stem(written)) or []
        if len(candidates) == 1 and named and candidates[0] not in named:
            contradicting.append(f"{file} names {filename!r} and is taken for {candidates[0]}")
        if len(candidates) != 1:
            candidates = [name for name in named if name in candidates] if candidates else named
        if len(candidates) == 1:
            matched.append(candidates[0])
            continue
        matched.append(None)
        tried = f"{own}.* and {filename!r}" if filename else f"{own}.*"
        what = f"several images fit: {', '.join(candidates[:3])}" if candidates else "there is no such image"
        found.findings.append(
            xml_error(
                "ambiguous-image" if candidates else "missing-image",
                file,
                f"{what} (looked for {tried} in {layout.pictures})",
            )
        )
    if contradicting:
        warnings.warn(
            f"{len(contradicting)} XML files name another image in <filename> than the one called like themselves, "
            f"which is taken: {'; '.join(contradicting[:3])}",
            DetkitWarning,
            stacklevel=3,
        )
    return matched


def _name(path: str) -> str:
    return path[path.rfind("/") + 1 :]


def _classes(found: Objects, wanted: tuple[str, ...]) -> tuple[str, ...]:
    used = np.bincount(found.names, minlength=len(found.vocabulary)).tolist()
    present = {name for name, count in zip(found.vocabulary, used, strict=True) if name and count}
    if not wanted:
        return tuple(sorted(present))
    if present - set(wanted):
        rows = np.repeat(np.arange(len(found.files)), found.counts).tolist()
        named = [found.vocabulary[i] for i in found.names.tolist()]
        found.findings += [
            xml_error(
                "unknown-class",
                found.files[row],
                f"no class {name!r} in classes={','.join(wanted)};{did_you_mean(name, wanted)}".rstrip(";"),
                f"object {record + 1} ({name})",
                record,
            )
            for row, name, record in zip(rows, named, found.records.tolist(), strict=True)
            if name and name not in wanted
        ]
    return wanted


def _splits(layout: _Layout, image_ids: list[str], found: Objects) -> dict[str, list[int]]:
    main = next((f for f in (layout.root / "ImageSets/Main", layout.root / "ImageSets") if f.is_dir()), None)
    lists = sorted(main.glob("*.txt")) if main else []
    if not lists:
        tops = [image_id.partition("/")[0] for image_id in image_ids]
        if layout.root == layout.pictures and len(set(tops)) > 1 and {top.lower() for top in tops} <= SPLIT_FOLDERS:
            return {name: [i for i, top in enumerate(tops) if top == name] for name in sorted(set(tops))}
        return {}
    index = {stem(xml): i for i, xml in enumerate(layout.xml)}
    index |= {stem(name): i for i, name in enumerate(image_ids) if name and stem(name) not in index}
    splits: dict[str, list[int]] = {}
    for file in lists:
        lines = [line.strip() for line in file.read_text("utf-8-sig", errors="surrogateescape").splitlines()]
        entries = [(number, line) for number, line in enumerate(lines, start=1) if line]
        known = [index.get(entry, index.get(stem(entry))) for _, entry in entries]
        if entries and None in known and all(re.search(r"\s(-1|0|1)$", entry) for _, entry in entries):
            continue  # <class>_train.txt: presence of one class in each image, no split
        found.findings += [
            xml_error(
                "missing-annotation", str(file), f"{entry!r} has no XML file in {layout.annotations}", f"line {number}"
            )
            for (number, entry), i in zip(entries, known, strict=True)
            if i is None
        ]
        first: dict[int, int] = {}
        found.findings += [
            xml_error("listed-twice", str(file), f"{entry!r} is there already, in line {first[i]}", f"line {number}")
            for (number, entry), i in zip(entries, known, strict=True)
            if i is not None and first.setdefault(i, number) != number
        ]
        splits[file.stem] = list(first)
    return splits


def _dataset(  # noqa: PLR0917
    layout: _Layout,
    found: Objects,
    classes: tuple[str, ...],
    image_ids: list[str],
    splits: dict[str, list[int]],
    origin: Literal["auto", 1, 0],
) -> Dataset:
    """Return the columns without the images and boxes that are at fault; an unreadable size adds to the findings."""
    blank = len(image_ids) - len(found.files)
    first: dict[str, int] = {}
    usable = np.array([bool(n) and first.setdefault(n, i) == i for i, n in enumerate(image_ids)], dtype=bool)
    paths = [f"{layout.pictures}/{name}" for name in image_ids]
    sizes = np.concatenate([found.sizes, np.zeros((blank, 2), dtype=np.int64)])
    unknown = np.flatnonzero((sizes <= 0).any(axis=1) & usable).tolist()
    for i, header in zip(unknown, read_headers([paths[i] for i in unknown]), strict=True):
        if isinstance(header, ImageError):
            usable[i] = False
            found.findings.append(image_finding(header, None))
        else:
            sizes[i] = header.width, header.height
    boxes = found.corners
    if _origin(boxes, origin, layout.root) == 1:
        boxes[:, :2] -= 1
    label_of = {name: i for i, name in enumerate(classes)}
    labels = np.array([label_of.get(name, -1) for name in found.vocabulary], dtype=np.int64)[found.names]
    data = Dataset(
        classes=classes,
        image_ids=tuple(n if good else f"\0{i}" for i, (n, good) in enumerate(zip(image_ids, usable, strict=True))),
        paths=tuple(paths),
        sizes=sizes,
        offsets=np.concatenate([[0], np.cumsum(found.counts), np.full(blank, found.counts.sum())]).astype(np.int64),
        boxes=boxes,
        labels=labels,
        difficult=found.difficult,
        crowd=np.zeros(len(boxes), dtype=bool),
        area=area(boxes),
        records=found.records,
        sources=tuple(found.files + [""] * blank),
        box_extra=tuple(found.extra) if any(found.extra) else None,
        split_indices={name: np.array(at, dtype=np.int64) for name, at in splits.items()},
    )
    data = data if (labels >= 0).all() else data.keep_boxes(labels >= 0)
    return data if usable.all() else data.take(np.flatnonzero(usable), keep_splits=True)


def _origin(boxes: Boxes, origin: Literal["auto", 1, 0], root: Path) -> int:
    if origin != "auto":
        return origin
    zeros = int((boxes[:, :2] == 0).any(axis=1).sum())
    if not zeros:
        return 1
    warnings.warn(
        f"{root}: {zeros} of {len(boxes)} boxes have xmin or ymin 0, so the whole set is read as 0-based; "
        "VOC itself counts from 1. in Python, read_dataset(..., origin=0) or origin=1 decides",
        DetkitWarning,
        stacklevel=2,
    )
    return 0


FORMAT = Format(
    name="voc",
    summary="Pascal VOC: a folder of images, a folder of XML files, ImageSets/Main/*.txt",
    sniff=sniff,
    read=read,
    write=write,
    options=VocOptions,
    carries=frozenset({"image_ids", "difficult", "box_extra", "split_indices"}),
    carries_key=carries_key,
)
