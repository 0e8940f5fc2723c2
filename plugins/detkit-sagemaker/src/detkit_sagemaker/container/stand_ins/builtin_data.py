"""What the built-in algorithm trains on: RecordIO, images with a JSON file each, or an augmented manifest's stream."""

from __future__ import annotations

import io
import json
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image as PillowImage

from detkit import images
from detkit.data import Dataset
from detkit.errors import ClassMismatch, InvalidData
from detkit.io import read_dataset
from detkit.recordio import RecordFile, read_labels
from detkit_sagemaker.container.stand_ins.service import TrainingFolder, refuse

RECORDIO = "application/x-recordio"
_IMAGE_TYPES = {"image/jpeg", "image/png", "application/x-image"}
_KINDS = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png"}
_LABEL = "boxes"


def read(folder: TrainingFolder, values: Mapping[str, Any], scratch: Path) -> tuple[Dataset, Dataset]:
    """Return training and validation data; a class is called by its number. Raises `Failure` for what is refused."""
    names = ("train", "validation")
    places = {name: folder.channel(name) for name in names}
    types = {name: str(folder.channels[name].get("ContentType") or "") for name in names}
    for name, content_type in types.items():
        if content_type != RECORDIO and content_type not in _IMAGE_TYPES:
            raise refuse(
                f"content type {content_type!r} of the channel {name!r} is not supported; expected {RECORDIO}, "
                f"{', '.join(sorted(_IMAGE_TYPES))}"
            )
    try:
        if RECORDIO in types.values():
            parts = [_read_recordio(name, places[name], values, scratch) for name in names]
        else:
            for name in names:
                folder.channel(f"{name}_annotation")
            parts = _read_json(folder.base / "input/data")
        train, validation = (_checked(name, data, values) for name, data in zip(names, parts, strict=True))
    except InvalidData as error:
        raise refuse(str(error)) from error
    if len(train) != values["num_training_samples"]:
        raise refuse(
            f"num_training_samples is {values['num_training_samples']} and the channel 'train' has {len(train)} images"
        )
    return train, validation


def _read_json(folder: Path) -> list[Dataset]:
    """Read the four channels; what ``categories`` call a class is nothing to the algorithm."""
    first = next(iter(sorted((folder / "train_annotation").rglob("*.json"))), None)
    if first is None:
        raise refuse("the channel 'train_annotation' holds no JSON file")
    named = b'"categories"' in first.read_bytes()
    classes: dict[str, Any] = {} if named else {"classes": tuple(map(str, range(_largest_id(folder) + 1)))}
    data = read_dataset(folder, "sagemaker-json", **classes)
    numbers = [extra.get("class_id", i) for i, extra in enumerate(data.class_extra or [{}] * len(data.classes))]
    if numbers != list(range(len(numbers))):
        raise refuse(f"class ids are {', '.join(map(str, numbers))}; they have to be consecutive, from 0")
    data = replace(data, classes=tuple(map(str, numbers)), class_extra=None)
    return [data.splits["train"], data.splits["validation"]]


def _largest_id(folder: Path) -> int:
    files = [*(folder / "train_annotation").rglob("*.json"), *(folder / "validation_annotation").rglob("*.json")]
    records = [json.loads(file.read_bytes()) for file in files]
    return max((int(box["class_id"]) for record in records for box in record["annotations"]), default=0)


def _read_recordio(name: str, place: Path, values: Mapping[str, Any], scratch: Path) -> Dataset:
    """Read one pack; streams of Pipe mode are kept as files first, and every epoch is the same."""
    fifo = place.with_name(f"{name}_0")
    if fifo.exists() and stat.S_ISFIFO(fifo.stat().st_mode):
        file = scratch / f"{name}.rec"
        with fifo.open("rb") as stream, file.open("wb") as kept:
            shutil.copyfileobj(stream, kept)
    else:
        found = sorted(path for path in place.rglob("*") if path.is_file() and path.name[0] != ".")
        if len(found) != 1:
            raise refuse(f"the channel {name!r} holds {len(found)} files; expected one RecordIO file")
        file = found[0]
        if file.suffix != ".rec":
            file = scratch / f"{name}.rec"
            file.symlink_to(found[0])
    first = next((bytes(payload[:4]) for _, payload in RecordFile(file)), b"")
    if any(first.startswith(magic) for magic in _KINDS):
        return _from_pairs(_streamed(file), scratch / name)
    widths = [len(label) if not isinstance(label, float) else 1 for _, _, label, _ in read_labels(file)]
    if max(widths, default=0) > values["label_width"]:
        raise refuse(
            f"ImageDetRecordIter: label_pad_width: {values['label_width']} smaller than estimated width: "
            f"{max(widths)}; label_width is too small"
        )
    data = read_dataset(file, "recordio", classes=tuple(map(str, range(values["num_classes"]))))
    if (data.boxes_per_image() == 0).any():
        raise refuse(f"the channel {name!r} has images without any object")
    return data


def _streamed(file: Path) -> Iterator[tuple[bytes, Any]]:
    """Yield image and label of an augmented manifest's stream, where they take turns as records."""
    payloads = (bytes(payload) for _, payload in RecordFile(file))
    for image in payloads:
        label = next(payloads, None)
        if label is None or not image.startswith(tuple(_KINDS)):
            raise refuse("the stream does not alternate between images and labels; AttributeNames has another order")
        yield image, json.loads(label)


def _from_pairs(pairs: Iterable[tuple[bytes, Any]], folder: Path) -> Dataset:
    """Return images and their labels, whose ``-metadata`` the algorithm ignores, as data."""
    folder.mkdir()
    lines = []
    for i, (image, label) in enumerate(pairs):
        name = f"{i:06}{next((end for magic, end in _KINDS.items() if image.startswith(magic)), '')}"
        (folder / name).write_bytes(image)
        numbers = {str(box["class_id"]): str(box["class_id"]) for box in label["annotations"]}
        metadata = {"type": "groundtruth/object-detection", "class-map": numbers}
        lines.append(json.dumps({"source-ref": name, _LABEL: label, f"{_LABEL}-metadata": metadata}))
    manifest = folder / "lines.manifest"
    manifest.write_text("\n".join(lines))
    return replace(read_dataset(manifest, "manifest", images=str(folder)), class_extra=None)


def _checked(name: str, data: Dataset, values: Mapping[str, Any]) -> Dataset:
    """Return data with one class for each number below ``num_classes``."""
    if not len(data):
        raise refuse(f"the channel {name!r} has no images")
    for path, image_id in zip(data.paths, data.image_ids, strict=True):
        with PillowImage.open(io.BytesIO(images.read_bytes(path))) as image:
            if len(image.getbands()) != 3:
                bands = len(image.getbands())
                raise refuse(f"image {image_id} has {bands} channel(s); only images with 3 channels are supported")
    try:
        return data.with_classes(tuple(map(str, range(values["num_classes"]))), f"channel {name}")
    except ClassMismatch as error:
        raise refuse(f"class ids have to be below num_classes={values['num_classes']}: {error}") from error
