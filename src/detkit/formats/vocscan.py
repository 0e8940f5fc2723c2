"""Pascal VOC's XML files into columns, by as many processes as pay.

This module needs nothing but the standard library and runs as a script, too: `detkit.formats.vocxml` starts it in
helper processes. A helper reads file names from its standard input and writes the columns of a `Scan` to its standard
output.
"""

from __future__ import annotations

import json
import os
import re
import sys
from array import array
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CORNERS = ["xmin", "ymin", "xmax", "ymax"]
_TRUE = frozenset({"1", "true"})
_BLOCK = 1 << 16
_tag, _text = attrgetter("tag"), attrgetter("text")


class Fault(NamedTuple):
    """What is wrong with a file; `detkit.formats.vocxml` makes a finding of it."""

    file: int
    """Index among the files."""
    code: str
    message: str
    place: str = ""
    record: int | None = None


class _Remembered(dict[Any, Any]):
    """What a function returned for each argument, looked up at the speed of a dictionary."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, key: Any) -> Any:
        value = self[key] = self._function(key)
        return value


class _Pattern(NamedTuple):
    """Where things are among the children of objects that are all alike."""

    tags: list[str]
    name: int
    box: int
    difficult: int
    """-1 where there is none."""
    others: list[int]
    extras: dict[tuple[str | None, ...], int]
    """The number of each list of the others' texts."""


@dataclass
class Scan:
    """The objects of some XML files, as columns."""

    filenames: list[str] = field(default_factory=list)
    """Of each file what ``<filename>`` says."""
    sides: array[float] = field(default_factory=lambda: array("d"))
    """Width and height of each file's ``<size>``, as it gives them; 0 where it does not."""
    counts: array[int] = field(default_factory=lambda: array("q"))
    """Usable objects of each file."""
    vocabulary: dict[str, int] = field(default_factory=dict)
    """Each name that occurs, and its number."""
    names: array[int] = field(default_factory=lambda: array("q"))
    """Number of each object's name."""
    corners: array[float] = field(default_factory=lambda: array("d"))
    """xmin, ymin, xmax, ymax of each object, as written."""
    difficult: bytearray = field(default_factory=bytearray)
    records: array[int] = field(default_factory=lambda: array("q"))
    extras: dict[tuple[tuple[str, str], ...], int] = field(default_factory=lambda: {(): 0})
    """Each list of further children that occurs, tag and text, and its number."""
    extra: array[int] = field(default_factory=lambda: array("q"))
    """Number of each object's list."""
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names = _Remembered(self._number_of)
        self._patterns: dict[tuple[str, ...], _Pattern | None] = _Remembered(self._pattern_of)

    def _number_of(self, text: str | None) -> int:
        """Return the number of a name as it stands in a file; -1 for none."""
        name = (text or "").strip()
        return self.vocabulary.setdefault(name, len(self.vocabulary)) if name else -1

    def _pattern_of(self, tags: tuple[str, ...]) -> _Pattern | None:
        """Return where things are in an object with these children; None where one is missing or there twice."""
        if tags.count("name") != 1 or tags.count("bndbox") != 1 or tags.count("difficult") > 1:
            return None
        others = [i for i, tag in enumerate(tags) if tag not in {"name", "bndbox", "difficult"}]

        def extra(texts: tuple[str | None, ...]) -> int:
            key = tuple((tags[i], text or "") for i, text in zip(others, texts, strict=True))
            return self.extras.setdefault(key, len(self.extras))

        difficult = tags.index("difficult") if "difficult" in tags else -1
        return _Pattern(list(tags), tags.index("name"), tags.index("bndbox"), difficult, others, _Remembered(extra))

    def read(self, file: str) -> None:
        """Add one XML file; what cannot be used becomes a fault."""
        at = len(self.counts)
        filename, width, height, objects = "", 0.0, 0.0, []
        for element in self._parse(file):
            tag = element.tag
            if tag == "object":
                objects.append(element)
            elif tag == "filename":
                filename = (element.text or "").strip()
            elif tag == "size":
                width, height = _side(element.findtext("width")), _side(element.findtext("height"))
        before = len(self.names)
        if objects and not self._alike(objects):
            for number, element in enumerate(objects):
                self._object(at, element, number)
        self.filenames.append(filename)
        self.sides.append(width)
        self.sides.append(height)
        self.counts.append(len(self.names) - before)

    def _alike(self, objects: list[ElementTree.Element]) -> bool:
        """Add objects column by column if all have the same children and nothing is unusual; else leave them alone."""
        n = len(objects)
        children = [child for element in objects for child in element[:]]
        tags = list(map(_tag, children))
        width = len(tags) // n
        pattern = self._patterns[tuple(tags[:width])]
        if pattern is None or pattern.tags * n != tags:
            return False
        corners = [corner for box in children[pattern.box :: width] for corner in box[:]]
        # As many grandchildren as corners: nothing else has children, such as a <part>.
        if list(map(_tag, corners)) != _CORNERS * n or sum(map(len, children)) != 4 * n:
            return False
        texts = list(map(_text, children))
        names = list(map(self._names.__getitem__, texts[pattern.name :: width]))
        if -1 in names:
            return False
        try:
            numbers = list(map(float, map(_text, corners)))
        except (TypeError, ValueError):
            return False
        self.corners.extend(numbers)
        self.names.extend(names)
        if pattern.difficult < 0:
            self.difficult.extend(bytes(n))
        else:
            self.difficult.extend(map(_flags.__getitem__, texts[pattern.difficult :: width]))
        self.records.extend(range(n))
        others = zip(*(texts[i::width] for i in pattern.others), strict=True)
        self.extra.extend(map(pattern.extras.__getitem__, others) if pattern.others else [0] * n)
        return True

    def _object(self, file: int, element: ElementTree.Element, number: int) -> None:
        name, difficult, box, others = "", False, None, []
        for child in element:
            tag, text = child.tag, child.text
            if tag == "name":
                name = (text or "").strip()
            elif tag == "bndbox":
                box = {corner.tag: corner.text for corner in child}
            elif tag == "difficult":
                difficult = _is_true(text)
            elif not len(child):
                others.append((tag, text or ""))
        place = f"object {number + 1} ({name})" if name else f"object {number + 1}"
        if not name:
            self.faults.append(Fault(file, "no-name", "it has no <name>", place, number))
        if box is None:
            self.faults.append(Fault(file, "no-box", "it has no <bndbox>", place, number))
            return
        corners = []
        for key in _CORNERS:
            try:
                corners.append(float(box[key]))  # type: ignore[arg-type]
            except (KeyError, TypeError, ValueError):
                what = f"is {box[key]!r}, not a number" if box.get(key) else "is missing"
                self.faults.append(Fault(file, "bad-box", f"<{key}> {what}", place, number))
        if len(corners) != len(_CORNERS):
            return
        self.corners.extend(corners)
        self.names.append(self.vocabulary.setdefault(name, len(self.vocabulary)))
        self.difficult.append(difficult)
        self.records.append(number)
        self.extra.append(self.extras.setdefault(tuple(others), len(self.extras)))

    def _parse(self, file: str) -> list[ElementTree.Element]:
        """Return the children of the root; none, and a fault, where the file cannot be used."""
        at = len(self.counts)
        try:
            root = parse_safely(_read_file(file))
        except ElementTree.ParseError as error:
            line, column = error.position
            why = f"not well-formed XML: {str(error).partition(': line')[0]}"
            self.faults.append(Fault(at, "malformed", why, f"line {line}, column {column + 1}"))
        except (OSError, ValueError, LookupError) as error:
            self.faults.append(Fault(at, "malformed", str(error)))
        else:
            if root.tag == "annotation":
                return root[:]  # a slice: iteration over an Element ends with an IndexError, which costs
            why = f"the outermost element is <{root.tag}>; expected <annotation>"
            self.faults.append(Fault(at, "malformed", why))
        return []

    def pack(self) -> bytes:
        """Return all columns as bytes: a line of JSON, then the arrays."""
        arrays = [bytes(getattr(self, name)) for name in _ARRAYS]
        texts = [self.filenames, list(self.vocabulary), list(self.extras), self.faults]
        return json.dumps([[len(part) for part in arrays], *texts]).encode() + b"\n" + b"".join(arrays)

    @classmethod
    def unpack(cls, packed: bytes) -> Scan:
        """Read what `pack` returned. Raises `ValueError` for what is cut off."""
        head, _, rest = packed.partition(b"\n")
        lengths, filenames, vocabulary, extras, faults = json.loads(head)
        if sum(lengths) != len(rest):
            raise ValueError("a helper's answer is incomplete")
        scan = cls(
            filenames=filenames,
            vocabulary={name: i for i, name in enumerate(vocabulary)},
            extras={tuple((tag, text) for tag, text in key): i for i, key in enumerate(extras)},
            faults=[Fault(*fault) for fault in faults],
        )
        begin = 0
        for name, length in zip(_ARRAYS, lengths, strict=True):
            column: Any = getattr(scan, name)
            part = rest[begin : begin + length]
            column.extend(part) if isinstance(column, bytearray) else column.frombytes(part)
            begin += length
        return scan


_ARRAYS = ("sides", "counts", "names", "corners", "difficult", "records", "extra")


def scan(files: Sequence[str]) -> Scan:
    """Read XML files in this process."""
    found = Scan()
    for file in files:
        found.read(file)
    return found


def main() -> None:
    """Read file names, each ended by a zero byte, from standard input, and write a packed `Scan`."""
    names = sys.stdin.buffer.read().split(b"\0")[:-1]
    sys.stdout.buffer.write(scan([os.fsdecode(name) for name in names]).pack())


def _read_file(file: str) -> bytes:
    """Return a file's bytes with fewer calls than `open` needs; there are thousands of files."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        parts = [os.read(descriptor, _BLOCK)]
        while len(parts[-1]) == _BLOCK:
            parts.append(os.read(descriptor, _BLOCK))
    finally:
        os.close(descriptor)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def parse_safely(content: bytes) -> ElementTree.Element:
    """Parse bytes without a document type, so without entities: the C parser at full speed, and no bombs."""
    if b"!" in content or b"\0" in content:
        _refuse_doctype(content.replace(b"\0", b""))
    try:
        parser = ElementTree.XMLParser()  # noqa: S314 (no document type gets this far)
        parser.feed(content)
        return parser.close()
    except ValueError as error:
        # Expat knows no multi-byte encodings but UTF-8 and UTF-16; Chinese tools write GB2312.
        declared = re.match(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.-]+)", content[:200])
        if declared is None or "multi-byte" not in str(error):
            raise
        text = content.decode(declared[1].decode())
        _refuse_doctype(text.encode())
        return ElementTree.fromstring(text)  # noqa: S314


def _refuse_doctype(content: bytes) -> None:
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise ValueError("it declares a document type or entities, which are not read for safety; remove the DOCTYPE")


def _is_true(text: str | None) -> bool:
    return (text or "").strip().lower() in _TRUE


def _side(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


_flags = _Remembered(_is_true)


if __name__ == "__main__":
    main()
