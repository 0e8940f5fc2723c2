"""Findings as text, JSON, annotations of a GitHub pull request, and SARIF."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import detkit
from detkit.formats.findings import Finding, count_codes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from detkit.data import Dataset

_SHOWN_OF_A_CODE = 10
_GITHUB = {"error": "error", "warning": "warning", "note": "notice"}
SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def as_text(data: Dataset | None, findings: Sequence[Finding], *, everything: bool = False) -> Iterator[str]:
    """Yield lines for people: findings by severity and code, of each code the first ten unless ``everything``."""
    return (_on_one_line(line) for line in _lines(data, findings, everything))


def _on_one_line(text: str) -> str:
    """Return a text without control characters, which could do anything to a terminal."""
    return "".join(sign if sign.isprintable() or sign == " " else repr(sign)[1:-1] for sign in text)


def _lines(data: Dataset | None, findings: Sequence[Finding], everything: bool) -> Iterator[str]:
    for severity in ("error", "warning", "note"):
        of_severity = [finding for finding in findings if finding.severity == severity]
        for code, count in count_codes(of_severity).items():
            yield f"{severity}: {code} ({count})"
            of_code = [finding for finding in of_severity if finding.code == code]
            shown = of_code if everything else of_code[:_SHOWN_OF_A_CODE]
            yield from (f"  {_place(finding)}: {finding.message}" for finding in shown)
            if len(shown) < len(of_code):
                yield f"  ... and {len(of_code) - len(shown)} more (--all)"
    if data is not None:
        splits = "; splits: " + ", ".join(f"{n} {len(at)}" for n, at in data.split_indices.items())
        yield f"{len(data)} images, {len(data.boxes)} boxes{splits if data.split_indices else ''}"
        yield "classes: " + ", ".join(f"{name} {count}" for name, count in data.boxes_per_class().items())
    numbers = [(sum(f.severity == s for f in findings), s) for s in ("error", "warning", "note")]
    yield ", ".join(f"{n} {name}{'' if n == 1 else 's'}" for n, name in numbers)


def as_json(data: Dataset | None, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return plain JSON values: counts, and every finding with its file, place, line and column."""
    return {
        "images": None if data is None else len(data),
        "boxes": None if data is None else len(data.boxes),
        "classes": None if data is None else data.boxes_per_class(),
        "splits": {} if data is None else {name: len(at) for name, at in data.split_indices.items()},
        "counts": count_codes(findings),
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "message": finding.message,
                "file": finding.file,
                "line": finding.line,
                "column": finding.column,
                "place": finding.place,
                "record": finding.record,
                "image": None if data is None or finding.image is None else data.image_ids[finding.image],
                "image_file": finding.image_file or None,
            }
            for finding in findings
        ],
    }


def as_github(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield GitHub's workflow commands, which become annotations of the lines at fault.

    https://docs.github.com/actions/reference/workflow-commands-for-github-actions
    """
    for finding in findings:
        position = "".join(f",{n}={v}" for n, v in (("line", finding.line), ("col", finding.column)) if v is not None)
        file = f"file={_escaped(_relative(finding.file), ',:')}{position}," if finding.file else ""
        properties = f"{file}title={finding.code}"
        message = ": ".join(part for part in (finding.place, finding.message) if part)
        yield f"::{_GITHUB[finding.severity]} {properties}::{_escaped(message)}"


def as_sarif(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return a SARIF 2.1.0 log (OASIS), which code hosts and editors show."""
    return {
        "$schema": SARIF_SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "detkit",
                        "version": detkit.__version__,
                        "rules": [{"id": code} for code in sorted(count_codes(findings))],
                    }
                },
                "results": [_sarif_result(finding) for finding in findings],
            }
        ],
    }


def _sarif_result(finding: Finding) -> Mapping[str, Any]:
    result = {"ruleId": finding.code, "level": finding.severity, "message": {"text": finding.message}}
    if not finding.file:
        return result
    physical: dict[str, Any] = {"artifactLocation": {"uri": _uri(finding.file)}}
    if finding.line is not None:
        physical["region"] = {"startLine": finding.line}
        if finding.column is not None:
            physical["region"]["startColumn"] = finding.column
    location: dict[str, Any] = {"physicalLocation": physical}
    if finding.place:
        location["logicalLocations"] = [{"fullyQualifiedName": finding.place}]
    return {**result, "locations": [location]}


def _uri(file: str) -> str:
    shown = _relative(file)
    if "://" in shown:
        return shown
    return Path(shown).as_uri() if os.path.isabs(shown) else quote(shown.encode(errors="surrogateescape"))  # noqa: PTH117


def _place(finding: Finding) -> str:
    position = "".join(f":{number}" for number in (finding.line, finding.column) if number is not None)
    told = finding.place and not (finding.line is not None and finding.place == f"line {finding.line}")
    return f"{_relative(finding.file)}{position}{f': {finding.place}' if told else ''}" or "data"


def _relative(file: str) -> str:
    if not file or "://" in file:
        return file
    relative = os.path.relpath(file)
    return file if relative.startswith("..") else relative


def _escaped(text: str, further: str = "") -> str:
    return "".join(f"%{ord(sign):02X}" if sign in f"%\r\n{further}" else sign for sign in text)
