"""JSON whose records are looked at one by one: decoding it, naming places in it, boxes and class ids as SageMaker has
them."""

from __future__ import annotations

import json
import math
import reprlib
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

import msgspec
import numpy as np

from detkit.formats.findings import Finding
from detkit.formats.imagefiles import LARGEST_SIDE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detkit.data import Dataset, Extra

LARGEST_ID = 2**31
"""A class id from here on is none."""

BOX_KEYS = frozenset({"class_id", "left", "top", "width", "height"})
"""What SageMaker says of a box; pixels, from the upper left corner."""

_NUMBERS = frozenset({int, float})
_DEEPEST = 64
"""Levels of nesting in keys that are only kept; more are an attack, and would end in a `RecursionError` elsewhere."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80
_repr.maxlevel = 2


@dataclass(frozen=True)
class Place:
    """A record of a file, and the list that its faults are added to."""

    findings: list[Finding]
    file: str
    line: int | None = None

    def error(
        self, code: str, message: str, at: str = "", record: int | None = None, column: int | None = None
    ) -> None:
        """Add an error; ``at`` names the part of the record, as ``annotations[3]``."""
        line = f"line {self.line}" if self.line else ""
        self.findings.append(
            Finding(
                code=code,
                severity="error",
                message=message,
                file=self.file,
                place=", ".join(part for part in (line, at) if part),
                record=record,
                line=self.line,
                column=column,
            )
        )

    def decode(self, content: bytes) -> dict[str, Any] | None:
        """Return a JSON object; None, and an error with line and column, where there is none.

        NaN and Infinity, which JSON does not have and Python writes, are let through: whoever looks at a number finds
        them, and can name the record.
        """
        try:
            value = msgspec.json.decode(content)
        except (ValueError, RecursionError) as error:
            try:
                value = json.loads(content)
                msgspec.json.encode(value)  # text that is no Unicode
            except json.JSONDecodeError as fault:
                line = (self.line or 1) + fault.lineno - 1
                replace(self, line=line).error(
                    "malformed", f"not JSON: {fault.msg}", f"column {fault.colno}", column=fault.colno
                )
                return None
            except (ValueError, RecursionError, OverflowError):
                self.error("malformed", f"not JSON: {error}")
                return None
        if isinstance(value, dict):
            return value
        self.error("bad-record", f"expected an object, found {shown(value)}")
        return None

    def keep(self, extra: Extra, part: str = "") -> Extra:
        """Return keys that mean nothing here and are kept for writing; empty, and an error, where they cannot be."""
        if not extra:
            return extra
        begin = f"{part}." if part else ""
        stack: list[tuple[str, Any, int]] = [(f"{begin}{key}", value, 1) for key, value in extra.items()]
        while stack:
            at, value, depth = stack.pop()
            if depth > _DEEPEST:
                self.error("malformed", f"nested deeper than {_DEEPEST} levels", f"{at[:60]}...")
                return {}
            if isinstance(value, float) and not math.isfinite(value):
                self.error("non-finite", f"{value} is no number; JSON has neither NaN nor Infinity", at)
                return {}
            if isinstance(value, dict):
                stack += [(f"{at}.{key}", item, depth + 1) for key, item in value.items()]
            elif isinstance(value, list):
                stack += [(f"{at}[{i}]", item, depth + 1) for i, item in enumerate(value)]
        return extra

    def boxes(self, annotations: Any) -> Iterator[tuple[int, int, list[float], Extra]]:
        """Yield index, class id, corners and unknown keys of each of SageMaker's ``annotations`` that is sound."""
        if not isinstance(annotations, list):
            self.error("bad-record", f"'annotations' is {shown(annotations)}; expected a list")
            return
        for i, annotation in enumerate(annotations):
            at = f"annotations[{i}]"
            if not isinstance(annotation, dict):
                self.error("bad-record", f"expected an object, found {shown(annotation)}", at, i)
                continue
            sides = [annotation.get(key) for key in ("left", "top", "width", "height")]
            number = annotation.get("class_id")
            if not is_id(number):
                self.error("bad-id", f"'class_id' is {shown(number)}; expected a whole number from 0", at, i)
            elif not is_box(sides):
                found = ", ".join(shown(side) for side in sides)
                self.error("bad-box", f"left, top, width, height are {found}; expected four numbers", at, i)
            else:
                x, y, w, h = sides
                yield i, number, [x, y, x + w, y + h], {k: v for k, v in annotation.items() if k not in BOX_KEYS}


class ClassIds:
    """Class ids as they are met in records, and the names that maps all over the files give them.

    Boxes hold the *position* of their id among those met; `named` puts the names in once all maps are known.
    """

    def __init__(self) -> None:
        self._position: dict[int, int] = {}
        self._names: dict[int, tuple[str, str]] = {}
        self._contradicted: set[tuple[int, str]] = set()

    def position(self, number: int) -> int:
        """Return the number of an id among those met so far, from 0."""
        return self._position.setdefault(number, len(self._position))

    @property
    def positions(self) -> list[str]:
        """One unique text for each position, for the time being."""
        return [str(number) for number in self._position]

    @property
    def largest(self) -> int:
        """The largest id that a box has; -1 where there is none."""
        return max(self._position, default=-1)

    def __bool__(self) -> bool:
        """Whether any map has named a class."""
        return bool(self._names)

    def add(self, number: int, name: Any, place: Place, at: str, origin: str) -> None:
        """Note a name; another one for the same id is an error that names both places, ``origin`` this one."""
        if not isinstance(name, str) or not name.strip():
            place.error("no-name", f"class {number} is called {shown(name)}", at)
            return
        known, before = self._names.setdefault(number, (name, origin))
        if known != name and (number, name) not in self._contradicted:
            self._contradicted.add((number, name))
            message = f"class {number} is {name!r} here and {known!r} in {before}; an id has one name in all of them"
            place.error("class-contradiction", message, at)

    def named(self, data: Dataset, findings: list[Finding], *, lines: bool = False) -> Dataset:
        """Return data whose labels are positions with names for classes, in the order of the ids.

        A name that has several ids is one class. Boxes whose id has no name are errors, and left out. ``lines`` says
        that the boxes' records are lines.
        """
        classes = list(dict.fromkeys(self._names[number][0] for number in sorted(self._names)))
        index = {name: i for i, name in enumerate(classes)}
        numbers = list(self._position)
        known = [index[self._names[number][0]] if number in self._names else -1 for number in numbers]
        labels = np.array([*known, -1], dtype=np.int64)[data.labels]
        owner = np.repeat(np.arange(len(data)), data.boxes_per_image())
        named = ", ".join(map(str, sorted(self._names)[:20])) or "none"
        for row in np.flatnonzero(labels < 0).tolist():
            record = int(data.records[row])
            place = Place(findings, data.sources[owner[row]], record + 1 if lines else None)
            message = f"class {numbers[int(data.labels[row])]} has no name; those that have: {named}"
            place.error("unknown-class", message, "" if lines else f"annotations[{record}]", record)
        kept = data if (labels >= 0).all() else data.keep_boxes(labels >= 0)
        first = {self._names[number][0]: number for number in sorted(self._names, reverse=True)}
        told = [first[name] for name in classes] != list(range(len(classes)))
        return replace(
            kept,
            classes=tuple(classes),
            labels=labels[labels >= 0],
            class_extra=tuple({"class_id": first[name]} for name in classes) if told else None,
        )


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_id(value: object) -> TypeGuard[int]:
    """Return whether a value can be the id of a class, counted from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_ID


def is_box(value: object) -> TypeGuard[list[int | float]]:
    """Return whether a value is a list of four finite numbers; called for every box, so as quick as it can be."""
    if not isinstance(value, list) or len(value) != 4 or not _NUMBERS.issuperset(map(type, value)):
        return False
    try:
        return bool(sum(map(abs, value)) <= sys.float_info.max)
    except OverflowError:  # an integer beyond all floats
        return False


def size_of(image_size: Any) -> tuple[int, int]:
    """Return width and height from SageMaker's ``image_size``; zeros where it does not tell."""
    first = image_size[0] if isinstance(image_size, list) and image_size else image_size
    if not isinstance(first, dict):
        return 0, 0
    return side(first.get("width")), side(first.get("height"))


def side(value: Any) -> int:
    """Return one side of an image; 0 where it is unknown, and the file has to tell."""
    return int(value) if is_number(value) and 1 <= value <= LARGEST_SIDE else 0


def shown(value: Any) -> str:
    """Return a value as an error quotes it: short, however large and deep it is."""
    return "missing or null" if value is None else _repr.repr(value)


def plain(value: float) -> int | float:
    """Return a whole number as an int, as people write it."""
    return int(value) if value.is_integer() else value


def annotations_of(data: Dataset, image: int) -> list[dict[str, int | float]]:
    """Return SageMaker's ``annotations`` of an image; a class id is the class's index."""
    rows = slice(int(data.offsets[image]), int(data.offsets[image + 1]))
    return [
        {"class_id": label, "left": plain(x0), "top": plain(y0), "width": plain(x1 - x0), "height": plain(y1 - y0)}
        for label, (x0, y0, x1, y1) in zip(data.labels[rows].tolist(), data.boxes[rows].tolist(), strict=True)
    ]


def image_size_of(data: Dataset, image: int) -> list[dict[str, int]]:
    """Return SageMaker's ``image_size``; the built-in algorithm takes three channels only."""
    width, height = data.sizes[image].tolist()
    return [{"width": width, "height": height, "depth": 3}]
