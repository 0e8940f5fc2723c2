"""What models found, read from files of any tool: COCO's results, and lines of JSON.

Nothing is guessed. An image is known by its name, or by the id it has in the COCO file that the data comes from; a
class by its name, or by an id that somebody has said the name of.
"""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from detkit import remote
from detkit.detections import Detections
from detkit.errors import DetkitWarning, InvalidData, UsageError, did_you_mean
from detkit.formats.findings import Finding, raise_errors
from detkit.formats.identities import AMBIGUOUS, CocoIds, ImageNames
from detkit.formats.jsonrecords import shown
from detkit.formats.resultfiles import ResultsFile
from detkit.formats.resultmasks import mask_fault

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from detkit.boxes import Boxes
    from detkit.data import Dataset, Indices
    from detkit.formats.identities import ClassKey, Id, ImageKey
    from detkit.formats.resultfiles import Records

_SHOWN = 3
_OUTSIDE_PX = 1.0
_MANY = 20
"""So many boxes, or images, tell whether something is wrong with all of them."""


def read_predictions(
    path: str | Path,
    data: Dataset,
    *,
    classes: Sequence[str] | None = None,
    class_ids: Mapping[int, str] | None = None,
    class_map: Mapping[str, str] | None = None,
    on_unknown: Literal["raise", "drop"] = "raise",
) -> list[Detections]:
    """Read what a model found on the images of ``data``: one `Detections` for each, in order, also where there is none.

    The file, which may lie at a URL, is a COCO results list of ``image_id``, ``category_id``, ``bbox``, ``score`` and
    maybe ``segmentation``, alone or as ``annotations`` beside ``images`` and ``categories``; or lines of JSON as
    ``detkit predict --json`` prints them. A record's ``file_name`` counts before its ``image_id``: a number is the id
    in the COCO file that the data was read from; text is that, or an image's id in the data, its path, file name, or
    file name without ending, where only one image has it. What a ``category_id`` stands for is told by ``class_ids``,
    e.g. ``{1: "crazing"}``, or by ``classes``, for ids counted from 0 in order; else by the record's
    ``category_name``, the file's ``categories``, or the COCO file that the data was read from. ``class_map`` then says
    which class of the data is meant by a name of the file's, ``{"crack": "crazing"}``; several may be the same.

    Raises one `InvalidData` with everything that is wrong. Images and classes that the data lacks are wrong, too, and
    left out with a warning where ``on_unknown="drop"``. Warns where the file passes over images that it should speak
    of, and where its boxes look as if they were made in another way.
    """
    if classes is not None and class_ids is not None:
        raise UsageError("read_predictions was given classes and class_ids; give one of them")
    if on_unknown not in {"raise", "drop"}:
        raise UsageError(f"on_unknown={on_unknown!r} is not valid: 'raise' or 'drop'")
    told = class_ids if classes is None else dict(enumerate(classes))
    findings: list[Finding] = []
    try:
        file = ResultsFile(remote.local(str(path)) if remote.is_remote(path) else Path(path), str(path), findings)
        reading = _Reading(data, file, told, class_map or {})
        for piece in file.records():
            reading.add(piece)
    except FileNotFoundError:
        raise UsageError(f"there is no file {path} (looked for from {Path.cwd()})") from None
    except OSError as error:
        raise InvalidData(f"cannot read {path}: {error.strerror or error}") from error
    unknown = reading.unknown()
    if on_unknown == "drop" and unknown:
        warnings.warn(f"{path}: left out: {'; '.join(f.message for f in unknown)}", DetkitWarning, stacklevel=2)
        unknown = []
    nameless = reading.nameless()
    raise_errors([*nameless, *unknown, *findings], _hint(nameless, unknown))
    for looks in filter(None, (reading.passed_over(), reading.other_boxes())):
        warnings.warn(f"{path}: {looks}", DetkitWarning, stacklevel=2)
    return reading.detections()


def looks_like_predictions(path: str | Path) -> bool:
    """Tell by its first 64 KB whether `read_predictions` may take a file: no ground truth, nor anything else.

    The first record has a ``score``, or is an image's with ``detections``, or the list is empty.
    """
    try:
        with (remote.local(str(path)) if remote.is_remote(path) else Path(path)).open("rb") as file:
            text = file.read(1 << 16).decode("utf-8-sig", "ignore").lstrip()
    except OSError:
        return False
    if text.startswith("["):
        first = text[1:].lstrip()
        return first.startswith("]") or any(key in {"score", "detections"} for key, _ in _keys(first))
    for key, value in _keys(text):
        if key in {"detections", "annotations"} and text[value : value + 1] == "[":
            return key == "detections" or any(key == "score" for key, _ in _keys(text[value + 1 :].lstrip()))
    return False


def _keys(text: str) -> Iterator[tuple[str, int]]:
    """Yield each key of a JSON object, and where its value begins, until the text ends or is none."""

    def skip(begin: int) -> int:
        return next((i for i in range(begin, len(text)) if not text[i].isspace()), len(text))

    decode, at = json.JSONDecoder().raw_decode, 0
    with suppress(ValueError, RecursionError):
        while text[at : at + 1] == ("," if at else "{"):
            key, at = decode(text, skip(at + 1))
            at = skip(skip(at) + 1)  # behind the colon
            yield str(key), at
            at = skip(decode(text, at)[1])


class _Reading:
    """Gathers the records of one file under the images and classes of the data."""

    def __init__(
        self, data: Dataset, file: ResultsFile, told: Mapping[Any, str] | None, class_map: Mapping[str, str]
    ) -> None:
        self._data, self._file, self._told, self._class_map = data, file, told, class_map
        self._ids = CocoIds(data)
        self._images = ImageNames(data, self._ids)
        self._image_of: dict[ImageKey, int] = {}
        self._name_of: dict[ClassKey, str | None] = {}
        self._label_of = {name: label for label, name in enumerate(data.classes)}
        self._claimed: dict[int, str] = {}
        self._lines: dict[int, int | None] = {}
        self._spoken_of = np.zeros(len(data), dtype=bool)
        self._lost_images: dict[ImageKey, _Lost] = {}
        self._lost_classes: dict[str, _Lost] = {}
        self._nameless: dict[Id, _Lost] = {}
        self._owner: list[Indices] = []
        self._labels: list[Indices] = []
        self._boxes: list[Boxes] = []
        self._scores: list[NDArray[np.float64]] = []
        self._masks: list[tuple[int, list[Any] | None]] = []

    def add(self, piece: Records) -> None:
        """Take up some records, those left out whose image or class is not known."""
        if piece.size is not None:
            self._check_image(piece, piece.size)
        n = len(piece.scores)
        owner = np.fromiter((self._image(key, piece) for key in piece.images), np.int64, n)
        names = [self._name(key) for key in piece.classes]
        labels = np.fromiter((self._label_of.get(name, -1) if name else -1 for name in names), np.int64, n)
        for row in np.flatnonzero(owner < 0).tolist():
            self._lost_images.setdefault(piece.images[row], _Lost(piece, row)).count += 1
        for row in np.flatnonzero(labels < 0).tolist():
            name, number = names[row], piece.classes[row][1]
            if name:
                self._lost_classes.setdefault(name, _Lost(piece, row)).count += 1
            elif number is not None:
                self._nameless.setdefault(number, _Lost(piece, row)).count += 1
        if piece.masks is not None:
            self._check_masks(piece, owner)
        self._spoken_of[owner[owner >= 0]] = True
        keep = (owner >= 0) & (labels >= 0)
        piece = piece.take(keep)
        self._owner.append(owner[keep])
        self._labels.append(labels[keep])
        self._boxes.append(piece.boxes)
        self._scores.append(piece.scores)
        self._masks.append((len(piece.scores), piece.masks))

    def _image(self, key: ImageKey, piece: Records) -> int:
        at = self._image_of.get(key)
        if at is None:
            name, number = key
            if not name and number is not None:
                name = self._file.file_names.get(number, "")
            at = self._image_of[key] = self._images.find((name, number))
            if not name and isinstance(number, str) and number not in self._ids.images:
                name = number
            if at >= 0 and name and self._claimed.setdefault(at, name) != name:
                message = f"{name!r} and {self._claimed[at]!r} both fit {self._data.image_ids[at]!r}"
                piece.place.error("ambiguous-image", message, piece.at(0) if len(piece.records) else "")
        return at

    def _name(self, key: ClassKey) -> str | None:
        if key not in self._name_of:
            name = self._look_up(*key)
            self._name_of[key] = self._class_map.get(name, name) if name else name
        return self._name_of[key]

    def _look_up(self, name: str, number: Id | None) -> str | None:
        if number is not None and self._told is not None and number in self._told:
            return self._told[number]
        if name or number is None:
            return name
        known: Mapping[Id, str] = (self._file.names or self._ids.categories) if self._told is None else {}
        return known.get(number, number if isinstance(number, str) else None)

    def _check_image(self, piece: Records, size: tuple[int, int]) -> None:
        at = self._image(piece.image, piece)
        if at < 0:
            self._lost_images.setdefault(piece.image, _Lost(piece, None))
            return
        if at in self._lines:
            before = f" in line {self._lines[at]}" if self._lines[at] else ""
            piece.place.error("image-twice", f"{self._data.image_ids[at]!r} is there already{before}")
        self._lines.setdefault(at, piece.place.line)
        self._spoken_of[at] = True
        known = tuple(self._data.sizes[at].tolist())
        if all(size) and all(known) and size not in (known, known[::-1]):
            message = f"{size[0]}x{size[1]}, and the data says {known[0]}x{known[1]}; boxes are pixels of that"
            piece.place.error("size-differs", message)

    def _check_masks(self, piece: Records, owner: Indices) -> None:
        for row, mask in enumerate(piece.masks or ()):
            if mask is not None and owner[row] >= 0:
                fault = mask_fault(mask, self._data.sizes[owner[row]].tolist())
                if fault:
                    piece.error(row, "bad-mask", fault, piece.mask_key)

    def unknown(self) -> list[Finding]:
        """Return what is wrong with images and classes that the data lacks."""
        findings = []
        for several in (False, True):
            lost = {key: v for key, v in self._lost_images.items() if (self._image_of[key] == AMBIGUOUS) == several}
            if lost:
                shown_keys = ", ".join(shown(name or number) for name, number in list(lost)[:_SHOWN])
                count = sum(one.count for one in lost.values())
                what = "may be any of several in the data" if several else "are not in the data"
                message = f"{len(lost)} image(s) of the file ({count} detections) {what}, for example {shown_keys}"
                if not several and not self._ids.images and any(not name for name, _ in lost):
                    message += ". a number is an id in the COCO file that the data was read from, and it was from none"
                code = "ambiguous-image" if several else "unknown-image"
                findings.append(next(iter(lost.values())).finding(code, message))
        for name, one in self._lost_classes.items():
            message = f"the data has no class {name!r} ({one.count} detections){did_you_mean(name, self._data.classes)}"
            findings.append(one.finding("unknown-class", message))
        return findings

    def nameless(self) -> list[Finding]:
        """Return what is wrong with ids of classes that nobody has said the names of."""
        if not self._nameless:
            return []
        ids = ", ".join(map(shown, list(self._nameless)[:20]))
        count = sum(one.count for one in self._nameless.values())
        message = f"{len(self._nameless)} category ids ({count} detections) have no name: {ids}"
        return [next(iter(self._nameless.values())).finding("nameless-class", message)]

    def passed_over(self) -> str:
        """Say that the file does not speak of images of the data; nothing where that may well be.

        Where it tells its images, line by line or in a list, each counts; else only many without a record are a sign.
        """
        told = self._lines or self._file.file_names
        spoken_of, n = self._spoken_of.copy(), len(self._data)
        listed = [self._images.find((name, number)) for number, name in self._file.file_names.items()]
        spoken_of[[at for at in listed if at >= 0]] = True
        silent = np.flatnonzero(~spoken_of)
        if not len(silent) or (not told and (n < _MANY or len(silent) * 2 <= n)):
            return ""
        examples = ", ".join(repr(self._data.image_ids[i]) for i in silent[:_SHOWN].tolist())
        return (
            f"no detections for {len(silent)} of {n} images, for example {examples}: it does not mention them, so they "
            "count as images where nothing was found. if the model never looked at them, leave them out of the data"
        )

    def other_boxes(self) -> str:
        """Say that boxes look as if they were made in another way than COCO's; nothing where they do not."""
        boxes, sizes = np.concatenate([np.zeros((0, 4)), *self._boxes]), self._data.sizes[_joined(self._owner)]
        known = (sizes > 0).all(axis=1)
        low, high, limits = boxes[known, :2], boxes[known, 2:], sizes[known] + _OUTSIDE_PX
        if len(low) < _MANY:
            return ""
        sides = high - low
        outside = (high > limits).any(axis=1).mean()
        looks = ""
        if outside > 0.2 and ((sides >= low) & (sides <= limits)).all(axis=1).mean() > 0.99:
            looks = f"{outside:.0%} of the boxes leave their image and all would fit as corners xmin, ymin, xmax, ymax"
        elif high.max() <= 1:
            looks = "all boxes lie within one pixel, as if they were shares of the image's sides"
        return looks and f"{looks}; they are taken as x, y, width, height in pixels, as COCO has them"

    def detections(self) -> list[Detections]:
        """Return one for each image."""
        data, owner, scores = self._data, _joined(self._owner), np.concatenate([np.zeros(0), *self._scores])
        order = np.lexsort((-scores, owner))
        boxes = np.concatenate([np.zeros((0, 4)), *self._boxes])[order]
        labels, scores = _joined(self._labels)[order], scores[order]
        masks: list[Any] | None = None
        if any(column is not None for _, column in self._masks):
            whole = [mask for n, column in self._masks for mask in (column if column is not None else [None] * n)]
            masks = [whole[i] for i in order.tolist()]
        ends = np.searchsorted(owner[order], np.arange(len(data) + 1)).tolist()
        return [
            Detections(
                path=path,
                width=width,
                height=height,
                classes=data.classes,
                boxes=boxes[begin:end],
                labels=labels[begin:end],
                scores=scores[begin:end],
                masks=None if masks is None else tuple(masks[begin:end]),
            )
            for path, (width, height), begin, end in zip(
                data.paths, data.sizes.tolist(), ends[:-1], ends[1:], strict=True
            )
        ]


class _Lost:
    """Records that cannot be used, and where the first is."""

    def __init__(self, piece: Records, row: int | None) -> None:
        self._place, self.count = piece.place, 0
        self._at = "" if row is None else piece.at(row)
        self._record = None if row is None else int(piece.records[row])

    def finding(self, code: str, message: str) -> Finding:
        """Return an error that names the place of the first."""
        found: list[Finding] = []
        replace(self._place, findings=found).error(code, message, self._at, self._record)
        return found[0]


def _joined(columns: list[Indices]) -> Indices:
    return np.concatenate([np.zeros(0, np.int64), *columns])


def _hint(nameless: list[Finding], unknown: list[Finding]) -> str:
    hints = []
    if nameless:
        hints.append(
            "say what the ids stand for: detkit.read_predictions(..., class_ids={1: 'crazing', 2: 'patches'}), or "
            "classes=['crazing', 'patches'] where they count from 0; or give each record its 'category_name'"
        )
    kinds = {finding.code for finding in unknown}
    if "unknown-class" in kinds:
        hints.append("say which class of the data is meant: class_map={'crack': 'crazing'}, theirs first")
    if kinds - {"unknown-class"}:
        hints.append("read the data set that the predictions were made on, or give each record its 'file_name'")
    if unknown:
        hints.append('leave out what the data lacks with detkit.read_predictions(..., on_unknown="drop")')
    return "\n".join(hints)
