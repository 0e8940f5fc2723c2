"""SageMaker's augmented manifest, which Ground Truth writes: one JSON object a line, for each image one.

Boxes are left, top, width, height in pixels. A label is called anyhow and known by its ``<label>-metadata``, whose
``type`` is ``groundtruth/object-detection``. Its ``class-map`` may have gaps and tell only the classes of its own line.
Keys of a line, and of the metadata, that mean nothing here are kept as the image's; those of ``objects``, such as
``confidence``, as the box's.
"""

from __future__ import annotations

import posixpath
import warnings
from itertools import takewhile
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from detkit.errors import DetkitWarning, InvalidData, UnknownName
from detkit.formats import Format
from detkit.formats.imagefiles import given_folder, is_file, leaves
from detkit.formats.jsonrecords import BOX_KEYS, ClassIds, Place, is_id, shown, size_of
from detkit.formats.manifestwriter import ManifestWriteOptions, in_s3, unless_usual, write
from detkit.formats.rows import Rows
from detkit.formats.splits import join, split_names
from detkit.params import Options

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detkit.data import Dataset, Extra
    from detkit.formats.findings import Finding

TYPE = "groundtruth/object-detection"
_METADATA = "-metadata"
_SUFFIXES = (".manifest", ".jsonl")
_FIRST_LINE = 1 << 20
"""Bytes of a file that are looked into for its format."""
_raw_line = msgspec.json.Decoder(dict[str, msgspec.Raw])


class ManifestOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to read augmented manifests."""

    label: Annotated[
        str, Meta(description="name of the label attribute; where not given, the only one, or the last one, with boxes")
    ] = ""
    unlabelled: Annotated[
        Literal["raise", "negatives", "ignore"], Meta(description="what a line without the label means")
    ] = "raise"
    images: Annotated[str, Meta(description="local folder with the images that the lines name elsewhere, as in S3")] = (
        ""
    )


def sniff(path: Path) -> bool:
    """Return whether a file, or one of a folder's, begins with a line that has ``source-ref``."""
    return any(_begins_well(file) for _, file in _files(path))


def read(path: Path, options: ManifestOptions) -> Dataset:
    """Read one file, or all those of a folder as splits, classes matched by name.

    Images in S3 keep their URL for a path unless ``images`` is given. Raises one `InvalidData` with everything that is
    wrong in all of them, `UnknownName` for a label that no line has.
    """
    files = _files(path)
    if not files:
        raise InvalidData(f"{path}: no augmented manifest; looked for *.manifest and *.jsonl with 'source-ref' lines")
    folder = files[0][1].parent
    given = given_folder(folder, options.images) if options.images else None
    findings: list[Finding] = []
    surveys = [_Survey(file) for _, file in files]
    places = _Places({ref for survey in surveys for ref in survey.references}, folder, given)
    parts = [
        (split, _read_file(file, _choose_label(file, survey, options), places, options, findings))
        for (split, file), survey in zip(files, surveys, strict=True)
    ]
    return join(parts, findings)


def _files(path: Path) -> list[tuple[str, Path]]:
    """Return the manifests of a folder, or of a Ground Truth job's output, with the names of their splits."""
    if path.is_file():
        return [("", path)] if _begins_well(path) or path.suffix.lower() == ".manifest" else []
    for folder in (path, path / "manifests/output"):
        listed = sorted(folder.iterdir()) if folder.is_dir() else []
        known = [file for file in listed if file.suffix.lower() in _SUFFIXES and file.is_file()]
        files = [file for file in known if file.suffix.lower() == ".manifest" or _begins_well(file)]
        if len(files) == 1:
            return [("", files[0])]
        if files:
            return list(zip(split_names([file.stem for file in files]), files, strict=True))
    return []


def _begins_well(file: Path) -> bool:
    if file.suffix.lower() not in (*_SUFFIXES, ".json"):
        return False
    with file.open("rb") as stream:
        line = stream.readline(_FIRST_LINE).removeprefix(b"\xef\xbb\xbf").lstrip()
    return line.startswith(b"{") and b'"source-ref"' in line


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number, from 1, and content of each line that has any."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
            if content:
                yield number, content


class _Survey:
    """What a first look at every line tells: the images, and the labels in the order in which they turn up."""

    def __init__(self, file: Path) -> None:
        self.references: list[str] = []
        self.types: dict[str, str] = {}
        for number, line in _lines(file):
            reference, types = self._look(number, line)
            if isinstance(reference, str):
                self.references.append(reference)
            for label, kind in types:
                self.types.setdefault(label, kind)

    def _look(self, number: int, line: bytes) -> tuple[Any, list[tuple[str, str]]]:
        record: dict[str, Any] | None
        try:
            record = dict(_raw_line.decode(line))
            new = [key for key in record if key.endswith(_METADATA) and key.removesuffix(_METADATA) not in self.types]
            for key in ("source-ref", *new):
                record[key] = msgspec.json.decode(record.get(key, b"null"))
        except (ValueError, RecursionError):
            record = Place([], "", number).decode(line)  # what is wrong is told when the line is read
            new = [key for key in record or () if key.endswith(_METADATA)]
        found = []
        for key in new:
            kind = record[key].get("type") if record and isinstance(record[key], dict) else None
            if isinstance(kind, str):
                found.append((key.removesuffix(_METADATA), kind))
        return (record or {}).get("source-ref"), found


def _choose_label(file: Path, survey: _Survey, options: ManifestOptions) -> str:
    """Return the label to read, empty where no line has any. Never mixes labels: one of a file is read, or none."""
    types = survey.types
    fitting = [label for label, kind in types.items() if kind == TYPE]
    if options.label:
        if types and options.label not in types:
            raise UnknownName(f"label in {file}:", options.label, types)
        if types and options.label not in fitting:
            raise InvalidData(f"{file}: {_refusal(options.label, types[options.label])}")
        return options.label
    if not fitting:
        if types:
            raise InvalidData("\n".join(f"{file}: {_refusal(label, kind)}" for label, kind in types.items()))
        return ""
    if len(fitting) > 1:
        others = ", ".join(map(repr, fitting[:-1]))
        warnings.warn(
            f"{file} has several labels with boxes. {fitting[-1]!r}, the last one, is read; {others} stay with the "
            f"images as they are. label={fitting[-1]!r} says so for good",
            DetkitWarning,
            stacklevel=4,
        )
    for label, kind in types.items():
        if kind.endswith("-verification"):
            warnings.warn(
                f"{file}: {label!r} says which boxes a verification job found wrong; this is kept and not applied",
                DetkitWarning,
                stacklevel=4,
            )
    return fitting[-1]


def _refusal(label: str, kind: str) -> str:
    if kind.endswith("-verification"):
        why = "a verification job says whether boxes are right and has none itself; read the label that it verified"
    elif kind.startswith("groundtruth/video"):
        why = (
            "its lines are sequences of video frames whose boxes lie in a SeqLabel.json; detkit reads one image a "
            "line, so write such lines, or label the frames as images"
        )
    else:
        why = f"expected {TYPE!r}"
    return f"the label {label!r} is of the type {kind!r}: {why}"


class _Places:
    """Where the images are that lines name, and what they are called."""

    def __init__(self, references: set[str], folder: Path, given: Path | None) -> None:
        self._folder, self._given = folder, given
        self._keys = {ref: _key(ref) for ref in references}
        self._far = references if given else {ref for ref in references if in_s3(ref) or _absolute(ref)}
        folders = [self._keys[ref].split("/")[:-1] for ref in self._far]
        ends = zip(min(folders), max(folders), strict=False) if folders else ()
        self._common = len(list(takewhile(lambda pair: pair[0] == pair[1], ends)))
        near = [self._keys[ref] for ref in references - self._far]
        self._images = "images/" if near and all(key.startswith("images/") for key in near) else ""
        names = [posixpath.basename(key) for key in self._keys.values()]
        self._unique = len(set(names)) == len(names)

    def find(self, reference: str, place: Place) -> tuple[str, str] | None:
        """Return image id and path; None, and an error, where the reference leads out of the manifest's folder."""
        key, absolute = self._keys[reference], _absolute(reference)
        far = "/".join(key.split("/")[self._common :])
        image_id = far if reference in self._far else key.removeprefix(self._images)
        if leaves(image_id) or ".." in key.split("/") or not posixpath.basename(image_id):
            place.error("outside-folder", f"source-ref {reference!r} names no file that stays in its folder")
        elif absolute and self._given is None:
            message = (
                f"source-ref {reference!r} leads out of the manifest's folder; expected s3://BUCKET/KEY or a relative "
                "path. read_dataset(..., images=FOLDER) says where such images are"
            )
            place.error("outside-folder", message)
        elif self._given is not None:
            name = posixpath.basename(image_id)
            flat = self._unique and not is_file(f"{self._given}/{image_id}") and is_file(f"{self._given}/{name}")
            return image_id, f"{self._given}/{name if flat else image_id}"
        elif in_s3(reference):
            return image_id, reference
        else:
            return image_id, f"{self._folder}/{key}"
        return None


def _absolute(reference: str) -> bool:
    if in_s3(reference) or not (":" in reference or reference.startswith(("/", "\\"))):
        return False
    return "://" in reference or bool(PureWindowsPath(reference).anchor)


def _key(reference: str) -> str:
    """Return bucket and key of a URL, or a path, without what begins it."""
    rest = reference.partition("://")[2] or reference
    if in_s3(reference):
        return rest
    return posixpath.normpath(rest.replace("\\", "/")).lstrip("/")


def _read_file(file: Path, label: str, places: _Places, options: ManifestOptions, findings: list[Finding]) -> Dataset:
    rows, ids = Rows(findings), ClassIds()
    for number, line in _lines(file):
        place = Place(findings, str(file), number)
        record = place.decode(line)
        if record is None:
            continue
        reference = record.get("source-ref")
        if not isinstance(reference, str) or not reference:
            place.error("no-file-name", f"'source-ref' is {shown(reference)}; expected the place of an image")
            continue
        found = places.find(reference, place)
        if reference.lower().endswith(".json"):
            message = f"source-ref {reference!r} is a sequence of video frames; detkit reads one image a line"
            place.error("video", message)
        elif found is not None:
            _read_line(record, found, label, rows, ids, place, options)
    return ids.named(rows.dataset(ids.positions), findings, lines=True)


def _read_line(  # noqa: PLR0917
    record: dict[str, Any],
    found: tuple[str, str],
    label: str,
    rows: Rows,
    ids: ClassIds,
    place: Place,
    options: ManifestOptions,
) -> None:
    value, metadata = (record.get(key) if label else None for key in (label, label + _METADATA))
    metadata = metadata if isinstance(metadata, dict) else {}
    if value is None and options.unlabelled == "ignore":
        return
    if value is None and options.unlabelled == "raise":
        reason = f" ({metadata['failure-reason']})" if "failure-reason" in metadata else ""
        what = f"has no label {label!r}{reason}" if label else f"has no label of the type {TYPE!r}"
        hint = "read_dataset(..., unlabelled='negatives') says that nothing is on it, unlabelled='ignore' leaves it out"
        place.error("unlabelled", f"{what}. in Python, {hint}")
        return
    if value is not None and not isinstance(value, dict):
        place.error("bad-record", f"{label!r} is {shown(value)}; expected 'image_size' and 'annotations'")
        return
    _read_classes(metadata.get("class-map"), ids, place)
    others = {k: v for k, v in metadata.items() if k not in ("objects", "class-map", "type")}
    kept = {k: v for k, v in record.items() if k not in ("source-ref", label, label + _METADATA)}
    size = size_of(value.get("image_size")) if value is not None else (0, 0)
    line = (place.line or 1) - 1
    extra = place.keep({**unless_usual(others), **kept})
    rows.add_image(found[0], found[1], source=place.file, size=size, extra=extra)
    if value is None:
        return
    annotations = value.get("annotations")
    objects = _read_objects(metadata.get("objects"), annotations, place)
    for i, number, corners, more in place.boxes(annotations):
        rows.add_box(
            corners,
            ids.position(number),
            line,
            extra=place.keep({**more, **objects[i]} if objects else more, f"annotations[{i}]"),
        )


def _read_classes(names: Any, ids: ClassIds, place: Place) -> None:
    if names is None:
        return
    if not isinstance(names, dict):
        place.error("bad-record", f"'class-map' is {shown(names)}; expected an object")
        return
    for key, name in names.items():
        number = int(key) if key.isascii() and key.isdecimal() and len(key) <= 10 else None
        if is_id(number):
            ids.add(number, name, place, "class-map", f"line {place.line}")
        else:
            place.error("bad-id", f"{shown(key)} is the id of no class; expected a whole number from 0", "class-map")


def _read_objects(objects: Any, annotations: Any, place: Place) -> list[Extra]:
    """Return what the metadata says of each box."""
    if objects is None or not isinstance(annotations, list):
        return []
    if isinstance(objects, list) and len(objects) == len(annotations) and all(isinstance(o, dict) for o in objects):
        return [{k: v for k, v in known.items() if k not in BOX_KEYS} for known in objects]
    count = f"{len(objects)} entries" if isinstance(objects, list) else shown(objects)
    place.error("bad-record", f"'objects' has {count} for {len(annotations)} boxes; expected an object for each")
    return []


FORMAT = Format(
    name="manifest",
    summary="SageMaker augmented manifest (Ground Truth): *.manifest or *.jsonl, one image a line",
    sniff=sniff,
    read=read,
    write=write,
    options=ManifestOptions,
    write_options=ManifestWriteOptions,
    carries=frozenset({"image_ids", "classes", "extra", "box_extra", "split_indices"}),
    carries_key=lambda key, value: key not in BOX_KEYS,
)
