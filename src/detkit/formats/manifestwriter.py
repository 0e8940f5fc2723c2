"""Writing SageMaker's augmented manifest."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from detkit.errors import DetkitWarning, InvalidValue
from detkit.files import inside
from detkit.formats.imagefiles import place_images, require_finite
from detkit.formats.jsonrecords import BOX_KEYS, annotations_of, image_size_of
from detkit.formats.splits import parts
from detkit.params import Options

if TYPE_CHECKING:
    from pathlib import Path

    from detkit.data import Dataset, Extra

LONGEST_LINE = 100_000
"""Characters; Ground Truth refuses input manifests with longer lines, training does not."""

_USUAL = {"human-annotated": "yes", "creation-date": "2000-01-01T00:00:00.000000", "job-name": "detkit"}
"""What the metadata says where the data says nothing: always alike, so that the same data gives the same bytes."""
_OF_METADATA = frozenset({*_USUAL, "adjustment-status"})

_LABEL = re.compile(r"(?![0-9]+$)[a-zA-Z0-9](-*[a-zA-Z0-9]){0,126}")
"""SageMaker's LabelAttributeName."""


class ManifestWriteOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to write augmented manifests."""

    label: Annotated[str, Meta(description="name of the label attribute")] = "bounding-box"
    prefix: Annotated[
        str, Meta(description="s3://BUCKET/FOLDER that the written folder will be copied to; relative paths if absent")
    ] = ""


def in_s3(path: str) -> bool:
    """Return whether an image lies in S3."""
    return path.startswith("s3://")


def unless_usual(metadata: Extra) -> Extra:
    """Return the keys of a label's metadata that say more than what is written anyway."""
    return {key: value for key, value in metadata.items() if _USUAL.get(key) != value}


def write(data: Dataset, folder: Path, options: ManifestWriteOptions) -> None:
    """Write ``images/`` and ``output.manifest``, or ``<split>.manifest`` where the data came split.

    Images in S3 are named and not copied. Warns of lines too long for Ground Truth. Raises `InvalidValue` for options
    that SageMaker would refuse, `InvalidData` where a box is not finite.
    """
    label, prefix = options.label, options.prefix.rstrip("/")
    if not _LABEL.fullmatch(label) or label.endswith("-ref") or "-metadata" in label or label == "source-ref":
        expected = "letters and digits with hyphens between, not ending in -ref and without -metadata, at most 127"
        raise InvalidValue("label", label, expected)
    if prefix and not (in_s3(prefix) and prefix.removeprefix("s3://").split("/")[0]):
        raise InvalidValue("prefix", options.prefix, "expected s3://BUCKET/FOLDER")
    _require_free_label(data, options.label)
    require_finite(data)
    found = {f"{name or 'output'}.manifest": part for name, part in parts(data).items()}
    here = [i for i, path in enumerate(data.paths) if not in_s3(path)]
    for i in here:
        inside(data.image_ids[i])
    place_images(data if len(here) == len(data) else data.take(here), folder / "images")
    root = f"{prefix}/images" if prefix else "images"
    for name, part in found.items():
        long = []
        with (folder / inside(name)).open("wb") as file:
            for i in range(len(part)):
                line = msgspec.json.encode(_line(part, i, label, root))
                file.write(line + b"\n")
                if len(line) > LONGEST_LINE and len(line.decode()) > LONGEST_LINE:
                    long.append(i + 1)
        if long:
            listed = ", ".join(map(str, long[:10])) + (" ..." if len(long) > 10 else "")
            warnings.warn(
                f"{name}: {len(long)} line(s) are longer than {LONGEST_LINE:,} characters, which a Ground Truth job "
                f"refuses as its input (training does not mind): {listed}",
                DetkitWarning,
                stacklevel=3,
            )


def _require_free_label(data: Dataset, label: str) -> None:
    taken = sum(label in extra or f"{label}-metadata" in extra for extra in data.extra or ())
    if taken:
        raise InvalidValue(
            "label", label, f"{taken} image(s) keep another label of that name; choose one for the boxes written now"
        )


def _line(data: Dataset, i: int, label: str, root: str) -> dict[str, Any]:
    extra = {} if data.extra is None else data.extra[i]
    rows = range(int(data.offsets[i]), int(data.offsets[i + 1]))
    own = {"source-ref", label, f"{label}-metadata"}
    path = data.paths[i]
    return {
        "source-ref": path if in_s3(path) else f"{root}/{data.image_ids[i]}",
        # Other labels stand before this one, so that it is the last one, which is read.
        **{key: value for key, value in extra.items() if key not in own and key not in _OF_METADATA},
        label: {"image_size": image_size_of(data, i), "annotations": annotations_of(data, i)},
        f"{label}-metadata": {
            "objects": [_object({} if data.box_extra is None else data.box_extra[row]) for row in rows],
            "class-map": {str(number): name for number, name in enumerate(data.classes)},
            "type": "groundtruth/object-detection",
            **_USUAL,
            **{key: value for key, value in extra.items() if key in _OF_METADATA},
        },
    }


def _object(extra: Extra) -> Extra:
    return {key: value for key, value in extra.items() if key not in BOX_KEYS}
