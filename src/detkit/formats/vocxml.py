"""Reading Pascal VOC's XML: many files into columns, each problem noted and none fatal."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from detkit.formats.findings import Finding
from detkit.formats.imagefiles import LARGEST_SIDE

if TYPE_CHECKING:
    from detkit.data import Extra

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_NO_EXTRA: Extra = {}


def xml_error(code: str, file: str, message: str, place: str = "", record: int | None = None) -> Finding:
    """Return an error about one XML file."""
    return Finding(code=code, severity="error", message=message, file=file, place=place, record=record)


@dataclass
class Objects:
    """The objects of all XML files, as columns."""

    files: list[str] = field(default_factory=list)
    filenames: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    corners: list[float] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)
    extra: list[Extra] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    _extras: dict[tuple[tuple[str, str], ...], Extra] = field(default_factory=lambda: {(): _NO_EXTRA})

    def read(self, file: str) -> None:
        """Add one XML file; what cannot be used becomes a finding."""
        filename, width, height, count, before = "", 0, 0, 0, len(self.names)
        for element in self._parse(file):
            if element.tag == "object":
                self._object(file, element, count)
                count += 1
            elif element.tag == "filename":
                filename = (element.text or "").strip()
            elif element.tag == "size":
                width, height = _pixels(element.findtext("width")), _pixels(element.findtext("height"))
        self.files.append(file)
        self.filenames.append(filename)
        self.sizes.append((width, height))
        self.counts.append(len(self.names) - before)

    def _parse(self, file: str) -> list[ElementTree.Element]:
        """Return the children of the root; none, and a finding, where the file cannot be used."""
        try:
            content = Path(file).read_bytes()
            root = _parse_safely(content)
        except ElementTree.ParseError as error:
            line, column = error.position
            why = str(error).partition(": line")[0]
            self.findings.append(
                xml_error("malformed", file, f"not well-formed XML: {why}", f"line {line}, column {column + 1}")
            )
        except (OSError, ValueError, LookupError) as error:
            self.findings.append(xml_error("malformed", file, str(error)))
        else:
            if root.tag == "annotation":
                return list(root)
            self.findings.append(
                xml_error("malformed", file, f"the outermost element is <{root.tag}>; expected <annotation>")
            )
        return []

    def _object(self, file: str, element: ElementTree.Element, number: int) -> None:
        name, difficult, box, others = "", False, None, []
        for child in element:
            tag, text = child.tag, child.text
            if tag == "name":
                name = (text or "").strip()
            elif tag == "bndbox":
                box = {corner.tag: corner.text for corner in child}
            elif tag == "difficult":
                difficult = (text or "").strip().lower() in {"1", "true"}
            elif not len(child):
                others.append((tag, text or ""))
        place = f"object {number + 1} ({name})" if name else f"object {number + 1}"
        if not name:
            self.findings.append(xml_error("no-name", file, "it has no <name>", place, number))
        if box is None:
            self.findings.append(xml_error("no-box", file, "it has no <bndbox>", place, number))
            return
        corners = []
        for key in _CORNERS:
            try:
                corners.append(float(box[key]))  # type: ignore[arg-type]
            except (KeyError, TypeError, ValueError):
                what = f"is {box[key]!r}, not a number" if box.get(key) else "is missing"
                self.findings.append(xml_error("bad-box", file, f"<{key}> {what}", place, number))
        if len(corners) != len(_CORNERS):
            return
        self.corners += corners
        self.names.append(name)
        self.difficult.append(difficult)
        self.records.append(number)
        key_of_extra = tuple(others)
        self.extra.append(self._extras.setdefault(key_of_extra, dict(others)) if others else _NO_EXTRA)


def _parse_safely(content: bytes) -> ElementTree.Element:
    """Parse bytes without a document type, so without entities: the C parser at full speed, and no bombs."""
    _refuse_doctype(content.replace(b"\0", b"") if b"\0" in content else content)
    try:
        return ElementTree.fromstring(content)  # noqa: S314 (no document type gets this far)
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


def _pixels(text: str | None) -> int:
    """Return one side of the image; 0 where it is unknown, and the file has to tell."""
    try:
        side = float(text or 0)
    except ValueError:
        return 0
    return int(side) if 1 <= side <= LARGEST_SIDE else 0
