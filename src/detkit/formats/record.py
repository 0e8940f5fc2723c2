"""MXNet's RecordIO for detection: ``.rec`` packs of encoded images with their labels, with or without ``.idx``.

Images are not unpacked: the path of one is ``train.rec#12345``, its id ``train/00000007.jpg`` after the pack and the
record's number.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from msgspec import Meta

from detkit import images
from detkit.errors import BrokenRecord, DetkitWarning, ImageError, InvalidData
from detkit.files import inside
from detkit.formats import Format
from detkit.formats.checks import check_annotations
from detkit.formats.findings import Finding, count_codes, image_finding, raise_errors
from detkit.formats.mxlabels import (
    LabelReader,
    LabelWriteOptions,
    join_files,
    leave_out_negatives,
    turned_image,
    write_labels,
)
from detkit.formats.rows import FLOAT32, write_class_names
from detkit.formats.splits import containers, parts, split_names
from detkit.params import Options
from detkit.progress import track
from detkit.recordio import LARGEST, MAGIC, RecordWriter, pack, read_index, read_labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detkit.data import Dataset

_BUFFER = 1 << 20
"""Bytes written at a time; large ones also make a file that is mapped with fewer page faults."""
_KINDS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png"}
"""How the encoded images begin that MXNet decodes."""


class RecordOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to read RecordIO."""

    classes: Annotated[
        tuple[str, ...],
        Meta(description="class names in order of their numbers; those of classes.txt if absent"),
    ] = ()


class RecordWriteOptions(LabelWriteOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to write RecordIO."""

    on_invalid: Annotated[
        Literal["raise", "drop"],
        Meta(description="boxes outside the image or without area, which MXNet drops or learns: refuse or leave out"),
    ] = "raise"


def sniff(path: Path) -> bool:
    """Return whether a ``.rec`` file, or one of a folder's, begins with a record."""
    return any(_begins_with_record(file) for file in _find(path))


def read(path: Path, options: RecordOptions) -> Dataset:
    """Read one pack, or all those of a folder as splits. Raises one `InvalidData` with everything that is wrong."""
    files = _find(path)
    if not files:
        raise InvalidData(f"{path}: no .rec file; expected one, or a folder with some")
    findings: list[Finding] = []
    splits = split_names([file.stem for file in files])
    readers = [(split, _read_pack(file, findings)) for split, file in zip(splits, files, strict=True)]
    return join_files(readers, findings, path if path.is_dir() else path.parent, options.classes)


def _find(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.glob("*.rec") if file.is_file() and not file.name.startswith("."))
    return [path] if path.suffix.lower() == ".rec" and path.is_file() else []


def _begins_with_record(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def _read_pack(file: Path, findings: list[Finding]) -> LabelReader:
    reader = LabelReader(file, findings, normalised=FLOAT32)
    numbers: dict[int, int] = {}
    offsets: set[int] = set()
    single: list[tuple[int, str, float]] = []
    try:
        for record, (offset, index, label, image) in enumerate(read_labels(file)):
            offsets.add(offset)
            place = f"record {record} at byte {offset}"
            if isinstance(label, float):
                single.append((record, place, label))
            elif numbers.setdefault(index, record) != record:
                message = f"the number {index} is that of record {numbers[index]}, too; MXNet would find only one"
                reader.error("duplicate-index", message, place, record)
            elif len(label) < 2:
                reader.error("bad-header", f"the label is {label}; expected at least two numbers", place, record)
            else:
                name = f"{file.stem}/{index:08}.{_kind(image) or 'bin'}"
                reader.add(name, f"{file}#{offset}", label.tolist(), place=place, record=record)
    except BrokenRecord as error:
        place = f"record {error.record} at byte {error.offset}"
        reader.error("broken-record", error.why, place, error.record or 0)
    if single:
        _explain_single(reader, single)
    _compare_index(file, offsets)
    return reader


def _kind(image: bytes) -> str:
    return next((kind for magic, kind in _KINDS.items() if image.startswith(magic)), "")


def _explain_single(reader: LabelReader, single: Sequence[tuple[int, str, float]]) -> None:
    """Tell of records whose label is one number; they are usually all alike, so it is told once."""
    record, place, value = single[0]
    if all(value == 2 for _, _, value in single):
        why = (
            "im2rec keeps only the header's width where it runs without --pack-label; pack anew: im2rec PREFIX IMAGES "
        )
        why += "--pack-label --pass-through"
    else:
        why = "this is a pack for classification, or one made with an empty label"
    message = (
        f"{len(single)} record(s), of which this is the first, have one number for a label, here {value:g}; expected "
    )
    reader.error("no-boxes-packed", f"{message}header and objects. {why}", place, record)


def _compare_index(file: Path, offsets: set[int]) -> None:
    """Warn of an ``.idx`` that belongs to another pack: detkit does without, MXNet reads the wrong records."""
    index = file.with_suffix(".idx")
    if not index.is_file():
        return
    try:
        lost = [offset for offset in read_index(index).values() if offset not in offsets]
    except InvalidData as error:
        warnings.warn(f"{error}; detkit reads the pack without it, MXNet cannot", DetkitWarning, stacklevel=4)
        return
    if lost:
        told = f"{index} does not belong to {file.name}: no record begins at byte {lost[0]}"
        told += f" and {len(lost) - 1} more of its offsets" if len(lost) > 1 else ""
        warnings.warn(f"{told}. detkit does without it, MXNet would fail", DetkitWarning, stacklevel=4)


def write(data: Dataset, folder: Path, options: RecordWriteOptions) -> None:
    """Write ``train.rec``, ``train.idx`` and ``classes.txt``, or packs for each split; an image's bytes are its file's.

    Raises `InvalidData` with every box and image that MXNet could not read.
    """
    for image_id in data.image_ids:
        inside(image_id)
    data = _without_invalid(data, options.on_invalid)
    data = leave_out_negatives(data, options.negatives)
    write_class_names(data.classes, folder)
    index = {image_id: i for i, image_id in enumerate(data.image_ids)}
    findings: list[Finding] = []
    packed, put_together = 0, containers(data.split_indices)
    if put_together:
        warnings.warn(
            f"{', '.join(sorted(put_together))}: all of it is in other splits, and images are packed once; it is left "
            "out",
            DetkitWarning,
            stacklevel=3,
        )
    for split, part in parts(data, leave_out=put_together).items():
        labels = write_labels(part, difficult=options.difficult)
        target = folder / f"{split or 'train'}.rec"
        with target.open("wb", buffering=_BUFFER) as file, target.with_suffix(".idx").open("wb") as index_file:
            writer = RecordWriter(file, index_file)
            for i, label in track(enumerate(labels), f"pack {split}", total=len(labels)):
                content = _content(part, i, findings)
                if content and not findings:
                    writer.write(index[part.image_ids[i]], pack(label, index[part.image_ids[i]], content))
        packed += len(part)
    raise_errors(findings)
    if packed > len(data):
        warnings.warn(
            f"{packed - len(data)} images are in more than one split and packed once for each; they are read as "
            "different images",
            DetkitWarning,
            stacklevel=3,
        )


def _content(data: Dataset, i: int, findings: list[Finding]) -> bytes:
    """Return an image's bytes; empty, and a finding, where they cannot be packed."""
    try:
        content = images.read_bytes(data.paths[i])
        header = images.read_header(content, data.paths[i])
    except ImageError as error:
        findings.append(image_finding(error, i, error.path, data.image_ids[i]))
        return b""
    finding = turned_image(data, i, header)
    too_long = len(content) + 4 * len(data.labels) + 1024 > LARGEST
    if too_long or not _kind(content):
        finding = Finding(
            code="not-packable",
            severity="error",
            message="it is too large for a record" if too_long else "MXNet decodes JPEG and PNG only; convert it",
            file=data.paths[i],
            image=i,
            place=data.image_ids[i],
        )
    if finding is None:
        return content
    findings.append(finding)
    return b""


def _without_invalid(data: Dataset, on_invalid: Literal["raise", "drop"]) -> Dataset:
    errors = [finding for finding in check_annotations(data, None) if finding.severity == "error"]
    errors = [finding for finding in errors if finding.box is not None]
    if on_invalid == "raise":
        raise_errors(errors, "mend them, or leave these boxes out with on_invalid=drop")
    if not errors:
        return data
    keep = np.ones(len(data.boxes), dtype=bool)
    keep[[finding.box for finding in errors if finding.box is not None]] = False
    counts = ", ".join(f"{code} {count}" for code, count in count_codes(errors).items())
    warnings.warn(f"left out {(~keep).sum()} of {len(data.boxes)} boxes: {counts}", DetkitWarning, stacklevel=4)
    return data.keep_boxes(keep)


FORMAT = Format(
    name="recordio",
    summary="MXNet RecordIO: train.rec, with or without train.idx, and classes.txt; images stay in the pack",
    sniff=sniff,
    read=read,
    write=write,
    options=RecordOptions,
    write_options=RecordWriteOptions,
    carries=frozenset({"classes", "split_indices"}),
)
