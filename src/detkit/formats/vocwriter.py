"""Writing Pascal VOC."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import numpy as np

from detkit.errors import InvalidData
from detkit.files import inside
from detkit.formats.imagefiles import is_plain, place_images, require_finite, stem
from detkit.formats.splits import require_split_names
from detkit.formats.textlines import number_text
from detkit.images import EXTENSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from detkit.data import Dataset, Extra
    from detkit.params import Options

_OWN = {"name", "difficult", "bndbox", "part"}
_TAG = re.compile(r"[A-Za-z_][\w.-]*")
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def write(data: Dataset, folder: Path, _options: Options) -> None:
    """Write ``JPEGImages/``, ``Annotations/`` and, where the data came split, ``ImageSets/Main/``.

    VOC carries neither crowds, masks, areas nor unused classes; those stay behind.
    """
    require_finite(data)
    require_split_names(data)
    stems = _stems(data)
    if ((data.boxes[:, :2] == -1).any(axis=1)).any():
        raise InvalidData(
            "a box begins at -1, which VOC writes as 0 and readers take as a sign of 0-based files; move it to 0"
        )
    place_images(data, folder / "JPEGImages")
    annotations = folder / "Annotations"
    for parent in {name.rpartition("/")[0] for name in stems}:
        (annotations / parent).mkdir(parents=True, exist_ok=True)
    objects, offsets, sizes = _objects(data), data.offsets.tolist(), data.sizes.tolist()
    for i, name in enumerate(stems):
        text = _annotation(data.image_ids[i], sizes[i], objects[offsets[i] : offsets[i + 1]])
        if _UNWRITABLE.search(text):
            raise InvalidData(
                f"{data.image_ids[i]}: a name holds a control character, which XML cannot carry; rename it"
            )
        with open(f"{annotations}/{name}.xml", "wb", buffering=0) as file:  # noqa: PTH123 (thousands of files)
            left = text.encode()
            while left:
                left = left[file.write(left) :]
    if data.split_indices:
        main = folder / "ImageSets/Main"
        main.mkdir(parents=True)
        for split, indices in data.split_indices.items():
            lines = "".join(f"{stems[i]}\n" for i in indices)
            (main / f"{split}.txt").write_text(lines, encoding="utf-8")


def _stems(data: Dataset) -> list[str]:
    """The annotation files' names; each must lead back to one image."""
    first: dict[str, str] = {}
    for image_id in data.image_ids:
        ending = image_id[image_id.rfind(".") :] if is_plain(image_id) else inside(image_id).suffix
        if ending.lower() not in EXTENSIONS or ending == image_id:
            raise InvalidData(
                f"image id {image_id!r} has no image file's ending, so VOC readers would not find it; rename it"
            )
        other = first.setdefault(stem(image_id), image_id)
        if other != image_id:
            raise InvalidData(f"images {other!r} and {image_id!r} would share one XML file; rename one of them")
    return list(first)


def _annotation(image_id: str, size: list[int], objects: list[str]) -> str:
    """Return the text of one file."""
    folder, _, name = image_id.rpartition("/")
    return (
        f"<annotation>\n\t<folder>{escape(folder) or 'JPEGImages'}</folder>\n\t<filename>{escape(name)}</filename>\n"
        f"\t<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>\n"
        f"{''.join(objects)}</annotation>\n"
    )


def _objects(data: Dataset) -> list[str]:
    """Return the ``<object>`` of every box."""
    names = [escape(name) for name in data.classes]
    extras: Sequence[Extra] = data.box_extra or ({},) * len(data.boxes)
    middle = {id(extra): "".join(_extra_lines(extra)) for extra in {id(e): e for e in extras}.values()}
    corners = data.boxes + np.array([1, 1, 0, 0])
    whole = bool((corners == np.rint(corners)).all()) and bool((abs(corners) < 2**53).all())
    numbers = corners.astype(np.int64).tolist() if whole else [[*map(number_text, row)] for row in corners.tolist()]
    return [
        f"\t<object>\n\t\t<name>{names[label]}</name>\n{middle[id(extra)]}\t\t<difficult>{difficult}</difficult>\n"
        f"\t\t<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>\n\t</object>\n"
        for label, extra, difficult, (x0, y0, x1, y1) in zip(
            data.labels.tolist(), extras, data.difficult.astype(int).tolist(), numbers, strict=True
        )
    ]


def carries_key(key: str, value: object) -> bool:
    """Whether a key of an object becomes an element of its own; one that is written anyway does not."""
    return key not in _OWN and _TAG.fullmatch(key) is not None and isinstance(value, (str, int, float))


def _extra_lines(extra: Extra) -> Iterator[str]:
    for key, value in extra.items():
        if carries_key(key, value):
            yield f"\t\t<{key}>{escape(str(value))}</{key}>\n"
