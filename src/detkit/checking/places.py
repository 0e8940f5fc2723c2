"""Where in a file a finding is, to the line and column: the few files at fault are read once more for it."""

from __future__ import annotations

import bisect
import contextlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias
from xml.parsers import expat

from detkit import remote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from detkit.formats.findings import Finding

_TABLE = re.compile(r"(\w+)\[(\d+)\]")
"""How readers of JSON name a record: ``annotations[17]``."""
_LINES = {".lst", ".csv", ".txt", ".manifest", ".jsonl"}


Key: TypeAlias = "tuple[str, int | str]"
"""The table and the number of a record, or ``images`` and the name of one."""


class Position(NamedTuple):
    """Line and column, both from 1, and what else the record says of itself."""

    line: int
    column: int
    identity: str = ""


def locate(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings with line and column, in the order of files and lines; JSON records with their ids."""
    by_file: dict[str, list[Finding]] = {}
    for finding in findings:
        by_file.setdefault(finding.file, []).append(finding)
    located: list[Finding] = []
    for file, unplaced in sorted(by_file.items()):
        suffix = Path(file).suffix.lower()
        here = unplaced
        if suffix in _LINES:
            here = _on_lines(file, unplaced)
        elif suffix in _READERS:
            here = _read_again(file, unplaced, _READERS[suffix])
        located += sorted(here, key=lambda f: (f.line or 0, f.column or 0, f.record or 0))
    return located


def _read_again(
    file: str,
    findings: list[Finding],
    positions: Callable[[bytes, set[Key]], Mapping[Key, Position]],
) -> list[Finding]:
    wanted = {_key(f) for f in findings if f.line is None} - {None}
    if not wanted:
        return findings
    try:
        found = positions(_content(file), {key for key in wanted if key is not None})
    except (OSError, ValueError, RecursionError, expat.ExpatError):
        return findings  # the reader has said what is wrong with the file as a whole
    located = []
    for finding in findings:
        key = _key(finding)
        at = found.get(key) if key is not None and finding.line is None else None
        if at is None:
            located.append(finding)
            continue
        place = finding.place
        if at.identity:
            place = _TABLE.sub(lambda match, at=at: f"{match[0]}, {at.identity}", place, count=1)  # type: ignore[misc]
        located.append(replace(finding, line=at.line, column=at.column, place=place))
    return located


def _on_lines(file: str, findings: list[Finding]) -> list[Finding]:
    """Fill in the lines of records, and of images the first line that names one."""
    located = [replace(f, line=f.record + 1) if f.line is None and f.record is not None else f for f in findings]
    names = {f.place for f in located if f.line is None and f.place}
    if not names:
        return located
    first: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for number, line in enumerate(_content(file).decode(errors="replace").splitlines(), start=1):
            for name in {name for name in names if name in line}:
                first[name] = number
                names.discard(name)
    return [replace(f, line=first[f.place]) if f.line is None and f.place in first else f for f in located]


def _content(file: str) -> bytes:
    return remote.read(file) if remote.is_remote(file) else Path(file).read_bytes()


def _key(finding: Finding) -> Key | None:
    """Return the table and number of a finding's record, or the name of its image."""
    if (named := _TABLE.match(finding.place)) is not None:
        return named[1], int(named[2])
    if finding.record is not None:
        return "object", finding.record
    return ("images", finding.place) if finding.place else None


def _of_xml(content: bytes, wanted: set[Key]) -> dict[Key, Position]:
    """Return where each object of a VOC file begins, and of its image where the size is given."""
    found: dict[Key, Position] = {}
    parser = expat.ParserCreate()
    depth = objects = 0
    images = [key for key in wanted if key[0] == "images"]

    def start(name: str, _attributes: object) -> None:
        nonlocal depth, objects
        position = Position(parser.CurrentLineNumber, parser.CurrentColumnNumber + 1)
        if depth == 1 and name == "object":
            found["object", objects] = position
            objects += 1
        elif depth == 0 or (depth == 1 and name == "size"):
            found.update(dict.fromkeys(images, position))
        depth += 1

    def end(_name: str) -> None:
        nonlocal depth
        depth -= 1

    def refuse(*_declaration: object) -> None:
        raise ValueError("document types are not read")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.Parse(content, True)
    return found


def _of_json(content: bytes, wanted: set[Key]) -> dict[Key, Position]:
    """Return where the records wanted begin, of lists that are values of the outermost object, and their ids."""
    text = content.decode("utf-8-sig")
    decode = json.JSONDecoder().raw_decode
    blank = re.compile(r"[\s,:]*")
    breaks = [match.start() for match in re.finditer("\n", text)]

    def skip(at: int) -> int:
        return blank.match(text, at).end()  # type: ignore[union-attr]

    found: dict[Key, Position] = {}
    at = skip(0)
    if text[at : at + 1] != "{":
        return found
    at = skip(at + 1)
    while text[at : at + 1] not in {"}", ""}:
        key, at = decode(text, at)
        at = skip(at)
        if not any(table == key for table, _ in wanted) or text[at] != "[":
            _, at = decode(text, at)
        else:
            at, number = skip(at + 1), 0
            while text[at : at + 1] not in {"]", ""}:
                record, end = decode(text, at)
                keys: set[Key] = {(key, number)}
                if isinstance(record, dict) and isinstance(record.get("file_name"), str):
                    keys.add((key, record["file_name"]))
                for wish in keys & wanted:
                    line = bisect.bisect_left(breaks, at)
                    column = at - (breaks[line - 1] if line else -1)
                    identity = f"id {record['id']}" if isinstance(record, dict) and "id" in record else ""
                    found[wish] = Position(line + 1, column, identity)
                at, number = skip(end), number + 1
            at += 1
        at = skip(at)
    return found


_READERS = {".xml": _of_xml, ".json": _of_json}
