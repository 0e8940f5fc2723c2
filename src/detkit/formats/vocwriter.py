"""Writing Pascal VOC."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from detkit.errors import InvalidData
from detkit.files import inside
from detkit.formats.imagefiles import place_images, require_finite, stem
from detkit.formats.splits import require_split_names
from detkit.images import EXTENSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    for parent in {(annotations / name).parent for name in stems}:
        parent.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(stems):
        text = "\n".join(_lines(data, i)) + "\n"
        if _UNWRITABLE.search(text):
            raise InvalidData(
                f"{data.image_ids[i]}: a name holds a control character, which XML cannot carry; rename it"
            )
        (annotations / f"{name}.xml").write_text(text, encoding="utf-8")
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
        inside(image_id)
        if PurePosixPath(image_id).suffix.lower() not in EXTENSIONS:
            raise InvalidData(
                f"image id {image_id!r} has no image file's ending, so VOC readers would not find it; rename it"
            )
        other = first.setdefault(stem(image_id), image_id)
        if other != image_id:
            raise InvalidData(f"images {other!r} and {image_id!r} would share one XML file; rename one of them")
    return list(first)


def _lines(data: Dataset, i: int) -> Iterator[str]:
    width, height = data.sizes[i].tolist()
    image_id = PurePosixPath(data.image_ids[i])
    yield "<annotation>"
    yield f"\t<folder>{escape(str(image_id.parent)) if image_id.parent.name else 'JPEGImages'}</folder>"
    yield f"\t<filename>{escape(image_id.name)}</filename>"
    yield f"\t<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    for row in range(int(data.offsets[i]), int(data.offsets[i + 1])):
        x0, y0, x1, y1 = data.boxes[row].tolist()
        yield "\t<object>"
        yield f"\t\t<name>{escape(data.classes[data.labels[row]])}</name>"
        yield from _extra_lines({} if data.box_extra is None else data.box_extra[row])
        yield f"\t\t<difficult>{int(data.difficult[row])}</difficult>"
        corners = zip(("xmin", "ymin", "xmax", "ymax"), (x0 + 1, y0 + 1, x1, y1), strict=True)
        yield f"\t\t<bndbox>{''.join(f'<{tag}>{_number(value)}</{tag}>' for tag, value in corners)}</bndbox>"
        yield "\t</object>"
    yield "</annotation>"


def carries_key(key: str, value: object) -> bool:
    """Whether a key of an object becomes an element of its own; one that is written anyway does not."""
    return key not in _OWN and _TAG.fullmatch(key) is not None and isinstance(value, (str, int, float))


def _extra_lines(extra: Extra) -> Iterator[str]:
    for key, value in extra.items():
        if carries_key(key, value):
            yield f"\t\t<{key}>{escape(str(value))}</{key}>"


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)
