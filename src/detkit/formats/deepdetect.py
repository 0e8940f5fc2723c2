"""DeepDetect: lists of ``image bboxfile`` lines, and a file of ``class xmin ymin xmax ymax`` lines for each image.

Corners are pixels from 0, the right and lower one excluded. Class 0 is the background, so the first name of
``classes.txt`` is that of class 1. Paths are relative to the list's folder; of an absolute one, which DeepDetect writes
and which is seldom right on another machine, the longest end that exists below that folder counts.
"""

from __future__ import annotations

import math
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from detkit.errors import InvalidData
from detkit.files import inside
from detkit.formats import Format
from detkit.formats.findings import Finding
from detkit.formats.imagefiles import LARGEST_SIDE, leaves, place_images, require_finite, stem
from detkit.formats.rows import CLASS_FILE, Rows, read_class_names, write_class_names
from detkit.formats.splits import SPLIT_FOLDERS, join, parts, split_names
from detkit.formats.textlines import find_below, line_error, number_text, read_lines, read_number
from detkit.images import EXTENSIONS
from detkit.params import Options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from detkit.data import Dataset

_MOST_FILES = 64
_MOST_BLANKS = 64
"""Places at which a line may be cut in two."""
_SNIFFED = 2
_SNIFFED_BYTES = 1 << 14


class DeepDetectOptions(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to read DeepDetect's lists."""

    classes: Annotated[
        tuple[str, ...],
        Meta(description="class names, the first for number 1; those of classes.txt if absent"),
    ] = ()


def sniff(path: Path) -> bool:
    """Return whether a text file, or one in a folder, begins with lines that name an image and a file of boxes."""
    return bool(_find(path))


def read(path: Path, options: DeepDetectOptions) -> Dataset:
    """Read one list, or all those of a folder as splits.

    Raises one `InvalidData` with everything that is wrong in all of them.
    """
    files = _find(path) or ([path] if path.is_file() else [])
    if not files:
        raise InvalidData(f"{path}: no list of `image bboxfile` lines that name existing files; looked for *.txt")
    root = path if path.is_dir() else path.parent
    findings: list[Finding] = []
    listed = [_read_list(root, file, findings) for file in files]
    classes = read_class_names(root, options.classes, "DeepDetect")
    images = [image for pairs in listed for image, _ in pairs]
    # What we write, and what most people call that folder.
    common = "images/" if all(image.startswith("images/") for image in images) else ""
    read: list[tuple[str, Dataset]] = []
    for name, file, pairs in zip(split_names([file.stem for file in files]), files, listed, strict=True):
        rows = Rows(findings)
        for image, boxes in pairs:
            rows.add_image(image.removeprefix(common), str(root / image), source=str(root / boxes))
            _add_boxes(rows, root / boxes, classes)
        if not pairs and not findings and len(files) == 1:
            findings.append(line_error("no-images", file, 1, "the list is empty; expected `image bboxfile` lines"))
        read.append((name, rows.dataset(classes)))
    return join(read, findings)


def write(data: Dataset, folder: Path, _options: Options) -> None:
    """Write ``images/``, ``bboxes/``, ``classes.txt``, and ``list.txt`` or a list for each split.

    Paths are relative to the folder of the lists: run DeepDetect there. Raises `InvalidData` for names that cannot
    stand on a line.
    """
    require_finite(data)
    names: dict[str, str] = {}
    for image_id in data.image_ids:
        if PurePosixPath(inside(image_id)).suffix.lower() not in EXTENSIONS or len(image_id.split()) != 1:
            raise InvalidData(
                f"image id {image_id!r} cannot stand in a list; expected an image's ending and no blanks. rename it"
            )
        other = names.setdefault(stem(image_id), image_id)
        if other != image_id:
            raise InvalidData(f"images {other!r} and {image_id!r} would share one file of boxes; rename one of them")
    pieces = parts(data)
    reserved = {"classes"} & set(pieces)
    if reserved:
        raise InvalidData(f"a split cannot be called 'classes', as {CLASS_FILE} holds the class names; rename it")
    write_class_names(data.classes, folder)
    place_images(data, folder / "images")
    for i, image_id in enumerate(data.image_ids):
        rows = slice(int(data.offsets[i]), int(data.offsets[i + 1]))
        file = folder / "bboxes" / inside(f"{stem(image_id)}.txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        pairs = zip(data.labels[rows].tolist(), data.boxes[rows].tolist(), strict=True)
        file.write_text("".join(f"{label + 1} {' '.join(map(number_text, box))}\n" for label, box in pairs))
    for split, part in pieces.items():
        lines = "".join(f"images/{image_id} bboxes/{stem(image_id)}.txt\n" for image_id in part.image_ids)
        (folder / f"{split or 'list'}.txt").write_text(lines, encoding="utf-8")


def _find(path: Path) -> list[Path]:
    """Return the lists; beside one, an empty file and one called like a split count, too."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".txt" and _is_list(path) else []
    files = sorted(file for file in path.glob("*.txt") if file.name != CLASS_FILE and file.is_file())
    if len(files) > _MOST_FILES and not any(map(_is_list, files[:_MOST_FILES])):
        return []  # labels of something else
    found = [file for file in files if _is_list(file)]
    if not found:
        return []
    ours = (path / "bboxes").is_dir()  # there an empty file is an empty split of any name
    return [f for f in files if f in found or f.stem.lower() in SPLIT_FOLDERS or (ours and not f.stat().st_size)]


def _is_list(file: Path) -> bool:
    """Return whether one of the first lines names an image and a text file; a list for VOC names XML."""
    try:
        with file.open("rb") as stream:
            lines = stream.read(_SNIFFED_BYTES).decode("utf-8-sig", errors="ignore").splitlines()
    except OSError:
        return False
    first = list(islice((line.strip() for line in lines if line.strip()), _SNIFFED))
    return any(boxes.endswith(".txt") for line in first for _, boxes in _pairs(file.parent, line))


def _cuts(line: str) -> list[tuple[str, str]]:
    """Return every way to cut a line into two paths at a blank; the tab decides where there is one."""
    if line.count("\t") == 1:
        image, boxes = line.split("\t")
        return [(image.strip(), boxes.strip())]
    blanks = [i for i in range(1, len(line)) if line[i].isspace() and not line[i - 1].isspace()]
    return [(line[:i], line[i:].strip()) for i in blanks[:_MOST_BLANKS]]


def _pairs(root: Path, line: str) -> list[tuple[str, str]]:
    """Return the cuts that name two existing files, as paths below the folder."""
    found = [(find_below(root, image), find_below(root, boxes)) for image, boxes in _cuts(line)]
    return [(image, boxes) for image, boxes in found if image is not None and boxes is not None]


def _read_list(root: Path, file: Path, findings: list[Finding]) -> list[tuple[str, str]]:
    pairs: dict[str, str] = {}
    for number, line in read_lines(file, findings):
        found = _pairs(root, line)
        if len(found) == 1 and found[0][0] not in pairs:
            pairs.update(found)
        else:
            twice = len(found) == 1
            code, message = ("image-twice", f"{found[0][0]} is there already") if twice else _explain(root, line, found)
            findings.append(line_error(code, file, number, message))
    return list(pairs.items())


def _explain(root: Path, line: str, found: list[tuple[str, str]]) -> tuple[str, str]:
    """Return code and message for a line that does not name one image and one file of boxes."""
    cuts = _cuts(line)
    shown = repr(line if len(line) <= 120 else f"{line[:117]}...")
    if len(found) > 1:
        return (
            "ambiguous-line",
            f"{shown} can be cut in {len(found)} ways into existing files; put a tab between the two",
        )
    if not cuts:
        return "bad-columns", f"{shown} is one path; expected `image bboxfile`"
    if len(cuts) > 1:
        return "missing-file", f"no way to cut {shown} at a blank names two files below {root}"
    missing = [name for name in cuts[0] if find_below(root, name) is None]
    code = "outside-folder" if any(map(leaves, missing)) else "missing-file"
    return code, f"there is no {' and no '.join(map(repr, missing))} below {root}"


def _add_boxes(rows: Rows, file: Path, classes: Sequence[str]) -> None:
    for number, line in read_lines(file, rows.findings):
        fields = line.split()
        values = [read_number(field) for field in fields]
        wrong = [field for field, value in zip(fields, values, strict=True) if math.isnan(value)]
        code, message = "", ""
        if len(fields) != 5:
            code, message = "bad-columns", f"{len(fields)} columns; expected class xmin ymin xmax ymax"
        elif wrong:
            code, message = "bad-number", f"{wrong[0][:40]!r} is not a number; expected class xmin ymin xmax ymax"
        elif not values[0].is_integer() or abs(values[0]) > LARGEST_SIDE:
            code, message = "bad-class", f"class {fields[0][:40]} is no whole number"
        elif values[0] == 0:
            code, message = "background-class", "class 0 is the background; objects count from 1"
        elif not 0 < values[0] <= len(classes):
            code = "unknown-class"
            message = f"class {int(values[0])} has no name: there are {len(classes)}, counted from 1"
        if code:
            rows.findings.append(line_error(code, file, number, message))
        else:
            rows.add_box(values[1:], int(values[0]) - 1, number - 1)


FORMAT = Format(
    name="deepdetect",
    summary="DeepDetect: lists of `image bboxfile` lines, files of `class xmin ymin xmax ymax`, and classes.txt",
    sniff=sniff,
    read=read,
    write=write,
    options=DeepDetectOptions,
    carries=frozenset({"image_ids", "classes", "split_indices"}),
)
